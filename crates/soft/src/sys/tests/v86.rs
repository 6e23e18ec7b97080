//! Virtual-8086 mode with and without VME, and PVI.

use pyrite_x86::bits::{cr4, rflags};
use pyrite_x86::{Segment, gpr};

use super::bench::*;

/// A virtual-8086 program at 0:CODE with its stack at 0:8000H.
fn program(iopl: u64, vme: bool) -> Bench {
    let mut b = Bench::protected();
    b.cpu.seg = [Segment::real(0, 0xf3); 6];
    b.cpu.rflags |= rflags::VM;
    b.set_iopl(iopl);
    b.cpu.gpr[gpr::RSP] = 0x8000;
    if vme {
        b.cpu.cr4 |= cr4::VME;
    }
    b
}

#[test]
fn interrupt_to_ring_0_pushes_data_segments() {
    let mut b = program(3, false);
    let f = b.frame(&[0xcd, 0x80]);
    assert_eq!(f[0], 0xffff_ff80);
    assert_eq!(f[1..3], [CODE as u32 + 2, 0]);
    assert_ne!(f[3] & rflags::VM as u32, 0);
    assert_eq!(f[4..6], [0x8000, 0]);
    assert_eq!(b.cpu.gpr[gpr::RSP], STACK0 - 40);
    assert_eq!(b.cpu.rflags & rflags::VM, 0);
    assert_eq!(b.cpu.cpl(), 0);
}

#[test]
fn sensitive_instructions_fault_below_iopl_3() {
    // CLI, STI, PUSHF, POPF, INT 80H, IRET, PUSHFD.
    for code in [
        &[0xfa][..],
        &[0xfb],
        &[0x9c],
        &[0x9d],
        &[0xcd, 0x80],
        &[0xcf],
        &[0x66, 0x9c],
        &[0xf4],
    ] {
        assert_eq!(program(0, false).fault(code), (13, 0), "{code:x?}");
    }
    // INT3 is not sensitive to IOPL, but to the gate.
    assert_eq!(program(0, false).fault(&[0xcc]), (13, 3 * 8 + 2));
}

#[test]
fn vme_virtualises_the_interrupt_flag() {
    // STI; PUSHF; CLI; then port 80H is refused: look at the state.
    let mut b = program(0, true);
    assert_eq!(b.fault(&[0xfb, 0x9c, 0xe4, 0x80]), (13, 0));
    // Flags image on the ring 0 stack: VIF set, IF clear.
    let flags = b.stack32(5)[4];
    assert_ne!(flags & rflags::VIF as u32, 0);
    assert_eq!(flags & rflags::IF as u32, 0);
    // The image that the program pushed: IF set, IOPL 3.
    let pushed = u64::from(b.read32(0x7ffe)) & 0xffff;
    assert_eq!(
        pushed & (rflags::IF | rflags::IOPL),
        rflags::IF | rflags::IOPL
    );
}

#[test]
fn vme_redirects_software_interrupts() {
    let mut b = program(0, true);
    // The redirection map is below the I/O bit map at 100H: all clear = to the program.
    b.write(TSS + 0xe0, &[0; 32]);
    b.write(4 * 0x21, &[0x00, 0x60, 0x00, 0x00]);
    // Its handler: IRET. Then port 80H is refused.
    b.write(GATE_TARGET, &[0xcf]);
    assert_eq!(b.fault(&[0xcd, 0x21, 0xe4, 0x80]), (13, 0));
    assert_eq!(b.stack32(3)[2], CODE as u32 + 2);
    // A set bit: through the IDT, which IOPL 0 forbids.
    let mut b = program(0, true);
    b.write(TSS + 0xe0, &[0xff; 32]);
    assert_eq!(b.fault(&[0xcd, 0x21]), (13, 0));
}

#[test]
fn vme_sti_with_vip_faults() {
    let mut b = program(0, true);
    b.cpu.rflags |= rflags::VIP;
    assert_eq!(b.fault(&[0xfb]), (13, 0));
}

#[test]
fn pvi_gives_ring_3_a_virtual_interrupt_flag() {
    let mut b = Bench::protected().user();
    b.cpu.cr4 |= cr4::PVI;
    // STI; IN AL, 80H.
    assert_eq!(b.fault(&[0xfb, 0xe4, 0x80]), (13, 0));
    assert_ne!(b.stack32(5)[4] & rflags::VIF as u32, 0);
    assert_eq!(Bench::protected().user().fault(&[0xfb]), (13, 0));
}
