//! Real and 32-bit protected mode: delivery, segment loads, far transfers, control, ports.

use pyrite_x86::bits::{cr4, rflags};
use pyrite_x86::{gpr, sreg};

use super::bench::*;

#[test]
fn real_interrupt_pushes_three_words_and_clears_if() {
    let mut b = Bench::real();
    b.cpu.rflags |= rflags::IF | rflags::AC;
    // INT 21H. The stub's PUSH is 2 bytes wide here.
    assert_eq!(b.run(&[0xcd, 0x21]), End::Stopped);
    assert_eq!(b.cpu.rflags & (rflags::IF | rflags::AC), 0);
    let sp = b.cpu.gpr[gpr::RSP];
    assert_eq!(sp, STACK - 8);
    assert_eq!(b.read64(sp), 0x0202_0000_5002_0021);
}

#[test]
fn real_delivery_beyond_idt_limit_ends_in_triple_fault() {
    let mut b = Bench::real();
    b.cpu.idtr.limit = 0;
    assert_eq!(b.run(&[0xcd, 0x21]), End::Triple);
}

#[test]
fn software_interrupt_from_ring_3_switches_stack() {
    let mut b = Bench::protected().user();
    let f = b.frame(&[0xcd, 0x80]);
    assert_eq!(f[0], 0xffff_ff80);
    assert_eq!(f[1], CODE as u32 + 2);
    assert_eq!(f[2], u32::from(CODE3));
    assert_eq!((f[4], f[5]), (STACK as u32, u32::from(DATA3)));
    assert_eq!(b.cpu.cpl(), 0);
    assert_eq!(b.cpu.gpr[gpr::RSP], STACK0 - 24);
}

#[test]
fn software_interrupt_below_gate_dpl_faults_with_idt_code() {
    let mut b = Bench::protected().user();
    assert_eq!(b.fault(&[0xcd, 0x30]), (13, 0x30 * 8 + 2));
    let f = b.stack32(4);
    // A fault: EIP at the instruction, RF set in the image.
    assert_eq!(f[2], CODE as u32);
}

#[test]
fn fault_image_has_rf() {
    let mut b = Bench::protected();
    // UD2.
    let f = b.frame(&[0x0f, 0x0b]);
    assert_eq!(f[0], 6);
    assert_ne!(f[3] & rflags::RF as u32, 0);
}

#[test]
fn segment_loads_check_descriptors() {
    // MOV AX, selector; MOV DS, AX.
    let load = |s: u16| [0x66, 0xb8, s as u8, (s >> 8) as u8, 0x8e, 0xd8];
    let cases = [
        (ABSENT, 11, u32::from(ABSENT)),
        (0x1000, 13, 0x1000),
        (0x14, 13, 0x14),
        (TR, 13, u32::from(TR)),
    ];
    for (selector, vector, code) in cases {
        let mut b = Bench::protected();
        assert_eq!(b.fault(&load(selector)), (vector, code), "{selector:#x}");
    }
    for selector in [0, 3, DATA3, READ_ONLY, CODE0, CONFORMING] {
        assert!(Bench::protected().passes(&load(selector)), "{selector:#x}");
    }
    // Ring 3 may not have a ring 0 segment, but a conforming one if it is readable.
    assert_eq!(Bench::protected().user().fault(&load(DATA0)), (13, 0x10));
}

#[test]
fn stack_segment_loads_check_rpl_and_type() {
    let load = |s: u16| [0x66, 0xb8, s as u8, (s >> 8) as u8, 0x8e, 0xd0];
    for selector in [DATA3, READ_ONLY, CODE0, DATA0 | 1] {
        let code = u32::from(selector & !3);
        assert_eq!(Bench::protected().fault(&load(selector)), (13, code));
    }
    assert_eq!(Bench::protected().fault(&load(0)), (13, 0));
    assert_eq!(Bench::protected().fault(&load(ABSENT)), (12, 0x50));
    assert!(Bench::protected().passes(&load(DATA0)));
}

#[test]
fn segment_load_sets_accessed_bit() {
    let mut b = Bench::protected();
    b.write(GDT + u64::from(DATA0) + 5, &[0x92]);
    assert!(b.passes(&[0x66, 0xb8, 0x10, 0, 0x8e, 0xd8]));
    assert_eq!(b.read32(GDT + u64::from(DATA0) + 4) >> 8 & 0xff, 0x93);
}

#[test]
fn call_gate_copies_parameters_to_inner_stack() {
    let mut b = Bench::protected().user();
    b.write(GATE_TARGET, &[0xe6, 0xf4]);
    // PUSH 11H; PUSH 22H; CALL far CALL_GATE|3:0.
    let code = [
        0x6a,
        0x11,
        0x6a,
        0x22,
        0x9a,
        0,
        0,
        0,
        0,
        CALL_GATE as u8 | 3,
        0,
    ];
    assert_eq!(b.run(&code), End::Stopped);
    assert_eq!(b.cpu.gpr[gpr::RSP], STACK0 - 24);
    let f = b.stack32(6);
    assert_eq!(f[0], CODE as u32 + code.len() as u32);
    assert_eq!(f[1], u32::from(CODE3));
    assert_eq!(f[2..], [0x22, 0x11, STACK as u32 - 8, u32::from(DATA3)]);
}

#[test]
fn far_return_to_outer_level_drops_inner_segments() {
    let mut b = Bench::protected();
    // PUSH DATA3; PUSH 8000H; PUSH CODE3; PUSH 6000H; RETF.
    b.write(GATE_TARGET, &[0xcd, 0x80]);
    let code = [
        0x6a, 0x23, 0x68, 0, 0x80, 0, 0, 0x6a, 0x1b, 0x68, 0, 0x60, 0, 0, 0xcb,
    ];
    let f = b.frame(&code);
    assert_eq!((f[1], f[2]), (GATE_TARGET as u32 + 2, u32::from(CODE3)));
    assert_eq!((f[4], f[5]), (0x8000, u32::from(DATA3)));
    assert!(b.cpu.seg[sreg::DS].unusable());
}

#[test]
fn far_jumps_check_levels() {
    let jump = |s: u16| [0xea, 0, 0x60, 0, 0, s as u8, (s >> 8) as u8];
    for selector in [CODE3, 0, DATA0, CODE3 & !3] {
        let code = u32::from(selector & !3);
        assert_eq!(Bench::protected().fault(&jump(selector)), (13, code));
    }
    let mut b = Bench::protected().user();
    b.write(GATE_TARGET, &[0xcd, 0x80]);
    let f = b.frame(&jump(CONFORMING));
    // A conforming segment keeps the CPL.
    assert_eq!(f[2], u32::from(CONFORMING) | 3);
}

#[test]
fn iret_to_outer_level_loads_what_it_popped() {
    let mut b = Bench::protected();
    b.write(GATE_TARGET, &[0xcd, 0x80]);
    // PUSH DATA3; PUSH 8000H; PUSHFD; PUSH CODE3; PUSH 6000H; IRETD.
    let code = [
        0x6a, 0x23, 0x68, 0, 0x80, 0, 0, 0x9c, 0x6a, 0x1b, 0x68, 0, 0x60, 0, 0, 0xcf,
    ];
    let f = b.frame(&code);
    assert_eq!(f[1..3], [GATE_TARGET as u32 + 2, u32::from(CODE3)]);
    assert_eq!(f[4..6], [0x8000, u32::from(DATA3)]);
}

#[test]
fn absent_gate_makes_a_double_fault_only_for_contributory_exceptions() {
    let mut b = Bench::protected();
    // #GP's gate is not present: #GP, then #NP = #DF with code 0.
    b.write(IDT + 8 * 13 + 5, &[0x0e]);
    assert_eq!(b.fault(&[0xea, 0, 0x60, 0, 0, 0x1b, 0]), (8, 0));
    // #UD is benign: the #NP is delivered, with EXT and IDT bits.
    let mut b = Bench::protected();
    b.write(IDT + 8 * 6 + 5, &[0x0e]);
    assert_eq!(b.fault(&[0x0f, 0x0b]), (11, 6 * 8 + 3));
}

#[test]
fn inner_stack_that_does_not_fit_faults_with_its_selector() {
    let mut b = Bench::protected().user();
    b.write(TSS + 8, &u32::from(DATA3).to_le_bytes());
    // #TS from the gate of INT 80H; its own delivery fails in the same way: #DF, then shutdown.
    assert_eq!(b.run(&[0xcd, 0x80]), End::Triple);
}

#[test]
fn ports_follow_iopl_and_bit_map() {
    // IN AL, 3; IN AL, 40H.
    let mut b = Bench::protected().user();
    assert_eq!(b.fault(&[0xe4, 0x03, 0xe4, 0x40]), (13, 0));
    assert_eq!(b.cpu.gpr[gpr::RAX], 3);
    let mut b = Bench::protected().user();
    b.set_iopl(3);
    assert!(b.passes(&[0xe4, 0x40]));
    // A word that reaches into a forbidden port.
    let mut b = Bench::protected().user();
    assert_eq!(b.fault(&[0x66, 0xe5, 0x07]), (13, 0));
}

#[test]
fn repeated_outs_moves_registers() {
    let mut b = Bench::protected();
    b.write(0x8000, &[1, 0, 2, 0, 3, 0]);
    b.cpu.gpr[gpr::RSI] = 0x8000;
    b.cpu.gpr[gpr::RCX] = 3;
    b.cpu.gpr[gpr::RDX] = 0x99;
    assert!(b.passes(&[0xf3, 0x66, 0x6f]));
    assert_eq!(b.port_writes(), [(0x99, 1), (0x99, 2), (0x99, 3)]);
    assert_eq!(b.cpu.gpr[gpr::RCX], 0);
    assert_eq!(b.cpu.gpr[gpr::RSI], 0x8006);
}

#[test]
fn control_registers_refuse_illegal_values() {
    // MOV EAX, imm32; MOV CRn, EAX.
    let mov = |cr: u8, value: u32| {
        let mut code = vec![0xb8];
        code.extend(value.to_le_bytes());
        code.extend([0x0f, 0x22, 0xc0 | cr << 3]);
        code
    };
    assert_eq!(Bench::protected().fault(&mov(0, 0x8000_0010)), (13, 0));
    assert_eq!(Bench::protected().fault(&mov(0, 0x2000_0011)), (13, 0));
    assert_eq!(Bench::protected().fault(&mov(4, 1 << 31)), (13, 0));
    assert_eq!(Bench::protected().fault(&mov(4, 1 << 17)), (13, 0));
    assert!(Bench::protected().passes(&mov(4, 0x10)));
    assert_eq!(Bench::protected().user().fault(&mov(3, 0)), (13, 0));
}

#[test]
fn unknown_and_malformed_msrs_fault() {
    let code = |index: u32, high: u32, op: u8| {
        let mut c = vec![0xb9];
        c.extend(index.to_le_bytes());
        c.push(0xba);
        c.extend(high.to_le_bytes());
        c.extend([0x31, 0xc0, 0x0f, op]);
        c
    };
    const READ: u8 = 0x32;
    const WRITE: u8 = 0x30;
    assert_eq!(Bench::protected().fault(&code(0xdead, 0, READ)), (13, 0));
    assert_eq!(Bench::protected().fault(&code(0xdead, 0, WRITE)), (13, 0));
    // EFER: bit 63. LSTAR: not canonical. PAT: type 2 does not exist.
    assert_eq!(
        Bench::protected().fault(&code(0xc000_0080, 1 << 31, WRITE)),
        (13, 0)
    );
    assert_eq!(
        Bench::protected().fault(&code(0xc000_0082, 1 << 31, WRITE)),
        (13, 0)
    );
    assert_eq!(Bench::protected().fault(&code(0x277, 2, WRITE)), (13, 0));
    assert!(Bench::protected().passes(&code(0x277, 0x0606_0606, WRITE)));
    assert!(Bench::protected().passes(&code(0x10, 0, READ)));
    assert_eq!(
        Bench::protected().user().fault(&code(0x10, 0, READ)),
        (13, 0)
    );
}

#[test]
fn verification_instructions_answer_in_zf() {
    // MOV EAX, selector; LAR ECX, EAX / LSL ECX, EAX / VERR AX / VERW AX.
    let zf = |selector: u16, op: &[u8]| {
        let mut b = Bench::protected();
        let mut code = vec![0xb8, selector as u8, (selector >> 8) as u8, 0, 0];
        code.extend(op);
        assert!(b.passes(&code));
        let set = b.cpu.rflags & rflags::ZF != 0;
        set.then_some(b.cpu.gpr[gpr::RCX])
    };
    const LAR: [u8; 3] = [0x0f, 0x02, 0xc8];
    const LSL: [u8; 3] = [0x0f, 0x03, 0xc8];
    const VERR: [u8; 3] = [0x0f, 0x00, 0xe0];
    const VERW: [u8; 3] = [0x0f, 0x00, 0xe8];
    // AMD APM Vol. 3: the mask is 00FF_FF00H. Intel SDM Vol. 2A leaves bits 19:16 undefined.
    assert_eq!(zf(CODE0, &LAR), Some(0x00cf_9b00));
    assert_eq!(zf(DATA0, &LSL), Some(0xffff_ffff));
    assert_eq!(zf(TR, &LSL), Some(0x2ff));
    assert_eq!(zf(CALL_GATE, &LSL), None);
    assert_eq!(zf(0, &LAR), None);
    assert_eq!(zf(0x1000, &LAR), None);
    assert!(zf(READ_ONLY, &VERR).is_some());
    assert!(zf(READ_ONLY, &VERW).is_none());
    assert!(zf(DATA0, &VERW).is_some());
    assert!(zf(TR, &VERR).is_none());
}

#[test]
fn umip_hides_tables_from_ring_3() {
    // SGDT [8000H].
    let code = [0x0f, 0x01, 0x05, 0, 0x80, 0, 0];
    let mut b = Bench::protected().user();
    assert!({
        b.set_iopl(3);
        b.passes(&code)
    });
    assert_eq!(b.read32(0x8002), GDT as u32);
    let mut b = Bench::protected().user();
    b.cpu.cr4 |= cr4::UMIP;
    assert_eq!(b.fault(&code), (13, 0));
}

#[test]
fn ltr_marks_the_tss_busy_and_refuses_a_busy_one() {
    let code = [0x66, 0xb8, TASK2 as u8, 0, 0x0f, 0x00, 0xd8];
    let mut b = Bench::protected();
    assert!(b.passes(&code));
    assert_eq!(b.cpu.tr.base, TSS2);
    assert_eq!(b.read32(GDT + u64::from(TASK2) + 4) >> 8 & 0xff, 0x8b);
    b.cpu.rip = CODE;
    assert_eq!(b.fault(&code), (13, u32::from(TASK2)));
}
