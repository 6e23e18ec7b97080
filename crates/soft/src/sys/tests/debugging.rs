//! Single step, breakpoints, general detect.

use pyrite_x86::bits::rflags;
use pyrite_x86::gpr;

use super::bench::*;

const BD: u64 = 1 << 13;
const BS: u64 = 1 << 14;

#[test]
fn single_step_traps_after_the_instruction() {
    let mut b = Bench::protected();
    b.cpu.rflags |= rflags::TF;
    let f = b.frame(&[0x90, 0x90]);
    assert_eq!(f[..2], [1, CODE as u32 + 1]);
    assert_eq!(b.cpu.dr[6] & (BS | 0xf), BS);
    assert_eq!(b.cpu.rflags & rflags::TF, 0);
}

#[test]
fn single_step_waits_for_the_instruction_after_mov_ss() {
    let mut b = Bench::protected();
    b.cpu.rflags |= rflags::TF;
    b.cpu.gpr[gpr::RAX] = DATA0.into();
    let f = b.frame(&[0x8e, 0xd0, 0x90, 0x90]);
    assert_eq!(f[..2], [1, CODE as u32 + 3]);
}

#[test]
fn instruction_breakpoint_is_a_fault_that_rf_suppresses() {
    let mut b = Bench::protected();
    b.cpu.dr[0] = CODE + 1;
    b.cpu.dr[7] = 0x401;
    let f = b.frame(&[0x90, 0x90]);
    assert_eq!(f[..2], [1, CODE as u32 + 1]);
    assert_eq!(b.cpu.dr[6] & 0xf, 1);
    let mut b = Bench::protected();
    b.cpu.dr[0] = CODE;
    b.cpu.dr[7] = 0x401;
    b.cpu.rflags |= rflags::RF;
    assert!(b.passes(&[0x90, 0x90]));
}

#[test]
fn data_breakpoint_traps_after_the_access() {
    let mut b = Bench::protected();
    b.cpu.dr[1] = 0x8004;
    // Write, 4 bytes, breakpoint 1.
    b.cpu.dr[7] = 0x400 | 1 << 2 | 0xd << 20;
    // MOV EAX, [8004H] does not hit; MOV [8006H], AL does.
    let f = b.frame(&[0xa1, 4, 0x80, 0, 0, 0xa2, 6, 0x80, 0, 0, 0x90]);
    assert_eq!(f[..2], [1, CODE as u32 + 10]);
    assert_eq!(b.cpu.dr[6] & 0xf, 2);
}

#[test]
fn general_detect_faults_on_debug_register_access() {
    let mut b = Bench::protected();
    b.cpu.dr[7] = 0x400 | BD;
    // MOV EAX, DR0.
    let f = b.frame(&[0x0f, 0x21, 0xc0]);
    assert_eq!(f[..2], [1, CODE as u32]);
    assert_ne!(b.cpu.dr[6] & BD, 0);
    assert_eq!(b.cpu.dr[7] & BD, 0);
}
