//! 64-bit mode: delivery, SYSCALL, segment loads, XSAVE.

use pyrite_x86::bits::{cr0, cr4, rflags};
use pyrite_x86::{gpr, sreg};

use super::bench::*;

#[test]
fn interrupt_from_ring_3_aligns_the_stack_and_nulls_ss() {
    let mut b = Bench::long().user();
    assert_eq!(b.run(&[0xcd, 0x60]), End::Stopped);
    let f = b.stack64(6);
    assert_eq!(f[..3], [0x60, CODE + 2, u64::from(CODE64) | 3]);
    assert_eq!(f[4..], [STACK, u64::from(DATA3)]);
    assert_eq!(b.cpu.gpr[gpr::RSP], STACK0 - 48);
    assert_eq!(b.cpu.seg[sreg::SS].selector, 0);
    assert!(b.cpu.seg[sreg::SS].unusable());
    assert_eq!(b.cpu.cpl(), 0);
}

#[test]
fn interrupt_stack_table_is_used_and_aligned() {
    let mut b = Bench::long();
    assert_eq!(b.run(&[0xcd, 0x61]), End::Stopped);
    assert_eq!(b.cpu.gpr[gpr::RSP], (IST1 & !15) - 48);
    assert_eq!(b.stack64(5)[4], STACK);
}

#[test]
fn page_fault_sets_cr2_and_pushes_the_code() {
    let mut b = Bench::long();
    // MOV [40000000H], EAX: not mapped.
    let code = [0x89, 0x04, 0x25, 0, 0, 0, 0x40];
    assert_eq!(b.run(&code), End::Stopped);
    assert_eq!(b.stack64(3), [14, 2, CODE]);
    assert_eq!(b.cpu.cr2, 0x4000_0000);
}

#[test]
fn kernel_stack_that_is_not_mapped_makes_a_double_fault_on_its_own_stack() {
    let mut b = Bench::long().user();
    b.write(TSS + 4, &0x4000_0000u64.to_le_bytes());
    // #DF on IST 1.
    let low = gate(CODE64, STUBS + 64, 0x8e, 1);
    b.write(IDT + 16 * 8, &low.to_le_bytes());
    assert_eq!(b.run(&[0x0f, 0x0b]), End::Stopped);
    // #UD is benign: its #PF comes next, and a #PF while delivering a #PF is a #DF.
    assert_eq!(b.stack64(2), [8, 0]);
}

#[test]
fn iretq_goes_to_ring_3_and_back() {
    let mut b = Bench::long();
    // The ring 3 code segment of 64 bits: an entry of its own.
    b.write(GDT + u64::from(CODE64), &flat(0xfb, 0xa).to_le_bytes());
    b.write(GATE_TARGET, &[0xcd, 0x60]);
    // PUSH DATA3; PUSH 8000H; PUSHFQ; PUSH CODE64|3; PUSH 6000H; IRETQ.
    let code = [
        0x6a, 0x23, 0x68, 0, 0x80, 0, 0, 0x9c, 0x6a, 0x5b, 0x68, 0, 0x60, 0, 0, 0x48, 0xcf,
    ];
    // The handler needs a ring 0 segment.
    b.write(GDT + u64::from(CONFORMING), &flat(0x9b, 0xa).to_le_bytes());
    let low = gate(CONFORMING, STUBS + 8 * 0x60, 0xee, 0);
    b.write(IDT + 16 * 0x60, &low.to_le_bytes());
    assert_eq!(b.run(&code), End::Stopped);
    let f = b.stack64(6);
    assert_eq!(f[..3], [0x60, GATE_TARGET + 2, u64::from(CODE64) | 3]);
    assert_eq!(f[4..], [0x8000, u64::from(DATA3)]);
}

#[test]
fn syscall_and_sysret_load_flat_segments() {
    let mut b = Bench::long().user();
    b.cpu.msrs.star = 0x0013_0008 << 32;
    b.cpu.msrs.lstar = GATE_TARGET;
    b.cpu.msrs.sfmask = rflags::IF | rflags::DF;
    b.cpu.rflags |= rflags::IF | rflags::DF;
    b.write(GATE_TARGET, &[0xe6, 0xf4]);
    assert_eq!(b.run(&[0x0f, 0x05]), End::Stopped);
    assert_eq!(b.cpu.gpr[gpr::RCX], CODE + 2);
    assert_eq!(b.cpu.gpr[gpr::R11], 0x602);
    assert_eq!(b.cpu.rflags, 2);
    assert_eq!((b.cpu.seg[sreg::CS].selector, b.cpu.cpl()), (8, 0));
    // SYSRETQ, then a stop by fault.
    b.write(GATE_TARGET, &[0x48, 0x0f, 0x07]);
    b.write(CODE + 2, &[0xcd, 0x60]);
    b.cpu.rip = GATE_TARGET;
    assert_eq!(b.resume(), End::Stopped);
    let f = b.stack64(6);
    assert_eq!(f[1..4], [CODE + 4, 0x23, 0x602]);
    assert_eq!(f[5], 0x1b);
}

#[test]
fn syscall_is_undefined_without_sce() {
    let mut b = Bench::long();
    b.cpu.efer &= !1;
    assert_eq!(b.run(&[0x0f, 0x05]), End::Stopped);
    assert_eq!(b.stack64(2), [6, CODE]);
}

#[test]
fn null_stack_segment_is_good_in_ring_0_only() {
    // XOR EAX, EAX; MOV SS, AX.
    let code = [0x31, 0xc0, 0x8e, 0xd0];
    assert!(Bench::long().passes(&code));
    let mut b = Bench::long().user();
    assert_eq!(b.run(&code), End::Stopped);
    assert_eq!(b.stack64(2), [13, 0]);
}

#[test]
fn swapgs_exchanges_bases() {
    let mut b = Bench::long();
    b.cpu.seg[sreg::GS].base = 0x1000;
    b.cpu.msrs.kernel_gs_base = 0xffff_8000_0000_0000;
    assert!(b.passes(&[0x0f, 0x01, 0xf8]));
    assert_eq!(b.cpu.seg[sreg::GS].base, 0xffff_8000_0000_0000);
    assert_eq!(b.cpu.msrs.kernel_gs_base, 0x1000);
}

#[test]
fn write_of_a_base_that_is_not_canonical_faults() {
    let mut b = Bench::long();
    b.cpu.cr4 |= cr4::FSGSBASE;
    b.cpu.gpr[gpr::RAX] = 0x8000_0000_0000;
    // WRFSBASE RAX.
    assert_eq!(b.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), End::Stopped);
    assert_eq!(b.stack64(2), [13, 0]);
}

#[test]
fn xsave_area_is_checked() {
    // XRSTOR [8000H] with all components.
    let xrstor = [
        0x83, 0xc8, 0xff, 0x31, 0xd2, 0x0f, 0xae, 0x2c, 0x25, 0, 0x80, 0, 0,
    ];
    let cases: [(u64, u8); 3] = [(0x8000 + 513, 0x80), (0x8000 + 520, 1), (0x8000 + 535, 1)];
    for (at, value) in cases {
        let mut b = Bench::long();
        b.write(at, &[value]);
        assert_eq!(b.run(&xrstor), End::Stopped);
        assert_eq!(b.stack64(2), [13, 0], "{at:#x}");
    }
    // A reserved bit of MXCSR.
    let mut b = Bench::long();
    b.cpu.xcr0 = 3;
    b.write(0x8000 + 26, &[1]);
    b.write(0x8000 + 512, &[2]);
    assert_eq!(b.run(&xrstor), End::Stopped);
    assert_eq!(b.stack64(2), [13, 0]);
    // CR0.TS.
    let mut b = Bench::long();
    b.cpu.cr0 |= cr0::TS;
    assert_eq!(b.run(&xrstor), End::Stopped);
    assert_eq!(b.stack64(2), [7, CODE + 5]);
}

#[test]
fn xsavec_leaves_initial_components_out() {
    if std::arch::x86_64::__cpuid_count(0xd, 1).eax & 2 == 0 {
        println!("SKIP: the host has no XSAVEC");
        return;
    }
    let avx_at = std::arch::x86_64::__cpuid_count(0xd, 2).ebx as usize;
    let mut b = Bench::long();
    b.cpu.xcr0 = 7;
    b.cpu.xsave.0[512] = 4;
    b.cpu.xsave.0[avx_at] = 0x5a;
    b.write(0x8000 + 160, &[0x77]);
    // OR EAX, -1; XOR EDX, EDX; XSAVEC [8000H].
    let code = [
        0x83, 0xc8, 0xff, 0x31, 0xd2, 0x0f, 0xc7, 0x24, 0x25, 0, 0x80, 0, 0,
    ];
    assert!(b.passes(&code));
    assert_eq!(b.read64(0x8000 + 512), 4);
    assert_eq!(b.read64(0x8000 + 520), 1 << 63 | 7);
    // XMM0 is initial: not written. The AVX component follows the header.
    assert_eq!(b.read32(0x8000 + 160), 0x77);
    assert_eq!(b.read32(0x8000 + 576), 0x5a);
    // And back.
    b.write(0x8000 + 576, &[0x5b]);
    b.cpu.rip = CODE;
    let code = [
        0x83, 0xc8, 0xff, 0x31, 0xd2, 0x0f, 0xae, 0x2c, 0x25, 0, 0x80, 0, 0,
    ];
    assert!(b.passes(&code));
    assert_eq!(b.cpu.xsave.0[512], 4);
    assert_eq!(b.cpu.xsave.0[avx_at], 0x5b);
}

#[test]
fn xsetbv_refuses_avx_without_sse() {
    let mut b = Bench::long();
    // XOR ECX, ECX; MOV EAX, 5; XOR EDX, EDX; XSETBV.
    let code = [0x31, 0xc9, 0xb8, 5, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x01, 0xd1];
    assert_eq!(b.run(&code), End::Stopped);
    assert_eq!(b.stack64(2), [13, 0]);
}

#[test]
fn mov_to_cr0_cannot_leave_paging_in_64_bit_mode() {
    let mut b = Bench::long();
    // MOV EAX, 11H; MOV CR0, RAX.
    assert_eq!(
        b.run(&[0xb8, 0x11, 0, 0, 0, 0x0f, 0x22, 0xc0]),
        End::Stopped
    );
    assert_eq!(b.stack64(2), [13, 0]);
}

#[test]
fn cpuid_shows_control_registers_and_the_vcpu() {
    let mut b = Bench::long();
    b.cpu.gpr[gpr::RAX] = 1;
    assert!(b.passes(&[0x0f, 0xa2]));
    assert_ne!(b.cpu.gpr[gpr::RCX] & 1 << 27, 0);
    assert_eq!(b.cpu.gpr[gpr::RBX] >> 24, 0);
}

/// Runs code that ends with the last canonical address of the lower half: what #GP pushes as RIP
/// and RSP, and what the slot below the stack pointer holds then.
fn at_the_border(translate: bool, code: &[u8]) -> (u64, u64, u64) {
    let mut b = Bench::long_in(translate);
    // 2 MiB up to 0000_8000_0000_0000H, at 2 MiB of memory.
    b.write(TABLES + 8 * 255, &((TABLES + 0x3000) | 7).to_le_bytes());
    let last = TABLES + 0x3000 + 8 * 511;
    b.write(last, &((TABLES + 0x4000) | 7).to_le_bytes());
    b.write(last + 0x1000, &0x20_0087u64.to_le_bytes());
    b.write(0x40_0000 - code.len() as u64, code);
    b.cpu.rip = (1 << 47) - code.len() as u64;
    b.cpu.gpr[gpr::RSP] = 0x1_8000;
    b.write(0x1_7ff8, &0x5555u64.to_le_bytes());
    // #GP on a stack of its own.
    b.write(
        IDT + 16 * 13,
        &gate(CODE64, STUBS + 8 * 13, 0x8e, 1).to_le_bytes(),
    );
    assert_eq!(b.resume(), End::Stopped);
    let f = b.stack64(6);
    assert_eq!(f[..2], [13, 0]);
    (f[2], f[5], b.read64(0x1_7ff8))
}

#[test]
fn code_that_runs_out_of_canonical_addresses_faults_at_the_next_one() {
    for translate in [false, true] {
        let got = at_the_border(translate, &[0x90, 0x90, 0xff, 0xc0]);
        assert_eq!(got, (1 << 47, 0x1_8000, 0x5555), "{translate}");
        // JC, not taken: CF is clear.
        let got = at_the_border(translate, &[0x90, 0x72, 0x02]);
        assert_eq!(got, (1 << 47, 0x1_8000, 0x5555), "{translate}");
    }
}

#[test]
fn direct_branches_to_non_canonical_addresses_fault_where_they_are() {
    for translate in [false, true] {
        // After a NOP: JMP, JNC, CALL beyond the border.
        for code in [
            &[0x90, 0xeb, 2][..],
            &[0x90, 0x73, 2],
            &[0x90, 0xe8, 2, 0, 0, 0],
        ] {
            let at = (1 << 47) - code.len() as u64 + 1;
            let got = at_the_border(translate, code);
            assert_eq!(got, (at, 0x1_8000, 0x5555), "{translate} {code:x?}");
        }
    }
}
