//! Hardware task switches.

use pyrite_x86::bits::{cr0, rflags};
use pyrite_x86::{gpr, sreg};

use super::bench::*;

/// Fills the second TSS: EIP GATE_TARGET, ESP C000H, ring 0.
fn task2(b: &mut Bench) {
    let put = |b: &mut Bench, at: u64, value: u32| b.write(TSS2 + at, &value.to_le_bytes());
    put(b, 0x20, GATE_TARGET as u32);
    put(b, 0x24, 2);
    put(b, 0x28, 0x1234);
    put(b, 0x38, 0xc000);
    for at in [0x48, 0x50, 0x54, 0x58, 0x5c] {
        put(b, at, DATA0.into());
    }
    put(b, 0x4c, CODE0.into());
}

fn busy(b: &Bench, selector: u16) -> bool {
    b.read32(GDT + u64::from(selector) + 4) >> 9 & 1 != 0
}

#[test]
fn call_to_tss_nests_and_iret_returns() {
    let mut b = Bench::protected();
    task2(&mut b);
    b.cpu.gpr[gpr::RBX] = 0x77;
    // The task: INC EAX; IRETD; then, entered again: OUT F4H.
    b.write(GATE_TARGET, &[0x40, 0xcf, 0xe6, 0xf4]);
    let call = [0x9a, 0, 0, 0, 0, TASK2 as u8, 0];
    assert!(b.passes(&call));
    assert_eq!(b.cpu.tr.selector, TR);
    assert_eq!(b.cpu.gpr[gpr::RBX], 0x77);
    assert_eq!(b.cpu.rflags & rflags::NT, 0);
    assert_ne!(b.cpu.cr0 & cr0::TS, 0);
    assert!(busy(&b, TR) && !busy(&b, TASK2));
    // What the task left in its TSS: EAX, EIP behind IRETD, and the link.
    assert_eq!(b.read32(TSS2 + 0x28), 0x1235);
    assert_eq!(b.read32(TSS2 + 0x20), GATE_TARGET as u32 + 2);
    assert_eq!(b.read32(TSS2) & 0xffff, u32::from(TR));
}

#[test]
fn jump_to_tss_does_not_nest() {
    let mut b = Bench::protected();
    task2(&mut b);
    b.write(GATE_TARGET, &[0xe6, 0xf4]);
    assert_eq!(b.run(&[0xea, 0, 0, 0, 0, TASK2 as u8, 0]), End::Stopped);
    assert_eq!(b.cpu.tr.selector, TASK2);
    assert_eq!(b.cpu.rflags & rflags::NT, 0);
    assert!(!busy(&b, TR) && busy(&b, TASK2));
    assert_eq!(b.read32(TSS + 0x20), CODE as u32 + 7);
    assert_eq!(b.cpu.gpr[gpr::RSP], 0xc000);
}

#[test]
fn exception_through_task_gate_pushes_error_code_on_new_stack() {
    let mut b = Bench::protected();
    task2(&mut b);
    b.write(GATE_TARGET, &[0xe6, 0xf4]);
    b.write(IDT + 8 * 13, &gate(TASK2, 0, 0x85, 0).to_le_bytes());
    assert_eq!(b.run(&[0xea, 0, 0, 0, 0, 0x1b, 0]), End::Stopped);
    assert_eq!(b.cpu.tr.selector, TASK2);
    assert_eq!(b.cpu.gpr[gpr::RSP], 0xc000 - 4);
    assert_eq!(b.read32(0xc000 - 4), 0x18);
    assert_ne!(b.cpu.rflags & rflags::NT, 0);
    assert_eq!(b.read32(TSS + 0x20), CODE as u32);
}

#[test]
fn task_gate_call_and_short_tss() {
    let mut b = Bench::protected().user();
    task2(&mut b);
    b.write(GATE_TARGET, &[0xe6, 0xf4]);
    let call = [0x9a, 0, 0, 0, 0, TASK_GATE as u8 | 3, 0];
    assert_eq!(b.run(&call), End::Stopped);
    assert_eq!(b.cpu.cpl(), 0);
    let mut b = Bench::protected();
    b.write(
        GDT + u64::from(TASK2),
        &segment(TSS2, 0x66, 0x89).to_le_bytes(),
    );
    assert_eq!(b.fault(&call), (10, u32::from(TASK2)));
}

#[test]
fn bad_segment_of_new_task_faults_in_the_new_task() {
    let mut b = Bench::protected();
    task2(&mut b);
    b.write(TSS2 + 0x54, &0x1000u32.to_le_bytes());
    let f = b.frame(&[0xea, 0, 0, 0, 0, TASK2 as u8, 0]);
    assert_eq!(f[..3], [10, 0x1000, GATE_TARGET as u32]);
    assert_eq!(b.cpu.tr.selector, TASK2);
    assert!(b.cpu.seg[sreg::DS].unusable());
}

#[test]
fn iret_with_nt_to_a_free_task_faults() {
    let mut b = Bench::protected();
    b.cpu.rflags |= rflags::NT;
    b.write(TSS, &u32::from(TASK2).to_le_bytes());
    assert_eq!(b.fault(&[0xcf]), (10, u32::from(TASK2)));
}

#[test]
fn t_bit_traps_after_the_switch() {
    let mut b = Bench::protected();
    task2(&mut b);
    b.write(TSS2 + 0x64, &[1]);
    let f = b.frame(&[0xea, 0, 0, 0, 0, TASK2 as u8, 0]);
    assert_eq!(f[..2], [1, GATE_TARGET as u32]);
    assert_ne!(b.cpu.dr[6] & 1 << 15, 0);
}
