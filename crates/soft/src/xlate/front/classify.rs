//! What kind of instruction it is: pure questions about decoded instructions.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// True for instructions after which the mode is as a rule another one, or the processor waits:
/// when the interpreter does them, the block ends.
pub fn ends_block(i: &Instruction) -> bool {
    let system = (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && {
            let r = i.op_register(n);
            n == 0 && (r.is_segment_register() || r.is_cr() || r.is_dr())
        }
    });
    system
        || matches!(
            i.mnemonic(),
            Mnemonic::Clac
                | Mnemonic::Stac
                | Mnemonic::Hlt
                | Mnemonic::Clts
                | Mnemonic::Lmsw
                | Mnemonic::Xsetbv
                | Mnemonic::Invlpg
                | Mnemonic::Invpcid
                | Mnemonic::INVALID
        )
}

/// True for instructions that may store to a copy of their operand, which is brought to its place
/// afterwards: those that write all of it, once, not atomically, and do not fault on their own.
pub fn splittable(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Memory
        && !i.has_lock_prefix()
        && !uses_mask(i)
        && matches!(
            i.mnemonic(),
            Mnemonic::Mov
                | Mnemonic::Add
                | Mnemonic::Sub
                | Mnemonic::And
                | Mnemonic::Or
                | Mnemonic::Xor
                | Mnemonic::Inc
                | Mnemonic::Dec
                | Mnemonic::Not
                | Mnemonic::Neg
                | Mnemonic::Movd
                | Mnemonic::Movq
                | Mnemonic::Movss
                | Mnemonic::Movups
                | Mnemonic::Movupd
                | Mnemonic::Movdqu
                | Mnemonic::Movlps
                | Mnemonic::Movhps
                | Mnemonic::Movlpd
                | Mnemonic::Movhpd
                | Mnemonic::Vmovd
                | Mnemonic::Vmovq
                | Mnemonic::Vmovss
                | Mnemonic::Vmovsd
                | Mnemonic::Vmovups
                | Mnemonic::Vmovupd
                | Mnemonic::Vmovdqu
                | Mnemonic::Vmovdqu8
                | Mnemonic::Vmovdqu16
                | Mnemonic::Vmovdqu32
                | Mnemonic::Vmovdqu64
        )
}

/// True for conditional branches behind which a block goes on: forward ones, which are as a rule
/// not taken. One that goes back ends a loop.
pub fn goes_on_behind(i: &Instruction) -> bool {
    i.is_jcc_short_or_near() && i.near_branch_target() > i.ip()
}

/// True for MOV of a segment register to all of a general-purpose one.
pub fn reads_selector(i: &Instruction) -> bool {
    matches!(i.code(), Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg)
        && i.op0_kind() == OpKind::Register
}

/// Condition code of a Jcc.
pub fn condition(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// PUSH, POP and LEAVE forms that the translator does itself, for the mode's slot size.
pub fn stack_op(i: &Instruction, code64: bool) -> bool {
    match i.code() {
        Code::Push_r64
        | Code::Pushq_imm8
        | Code::Pushq_imm32
        | Code::Push_rm64
        | Code::Pop_r64
        | Code::Leaveq => code64,
        Code::Push_r32
        | Code::Pushd_imm8
        | Code::Pushd_imm32
        | Code::Push_rm32
        | Code::Pop_r32
        | Code::Leaved => !code64,
        _ => false,
    }
}

/// Instructions without architectural effect.
pub fn is_hint(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Nop
            | Mnemonic::Pause
            | Mnemonic::Endbr32
            | Mnemonic::Endbr64
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchwt1
            | Mnemonic::Reservednop
    )
}

/// Shifts and rotates leave the flags alone when the masked count is zero. Multiplications,
/// divisions and bit instructions leave those alone, on some processors, that the manual calls undefined.
pub fn may_keep_flags(i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Mul
        | Mnemonic::Imul
        | Mnemonic::Div
        | Mnemonic::Idiv
        | Mnemonic::Lzcnt
        | Mnemonic::Tzcnt
        | Mnemonic::Bsf
        | Mnemonic::Bsr
        | Mnemonic::Bt
        | Mnemonic::Bts
        | Mnemonic::Btr
        | Mnemonic::Btc => true,
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr => match i.op1_kind() {
            OpKind::Immediate8 => i.immediate8() & 0x1f == 0,
            _ => true,
        },
        Mnemonic::Shld | Mnemonic::Shrd => match i.op2_kind() {
            OpKind::Immediate8 => i.immediate8_2nd() & 0x1f == 0 || i.immediate8() & 0x1f == 0,
            _ => true,
        },
        _ => false,
    }
}

/// Short forms that do not exist in 64-bit code become their long twins.
pub fn normalise(i: &mut Instruction) {
    let code = match i.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return,
    };
    i.set_code(code);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
/// The unit of a legacy-encoded instruction.
pub enum Fpu {
    None,
    X87,
    Sse,
}

pub fn uses_mask(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_k())
}

pub fn uses_vector(i: &Instruction) -> bool {
    // Those that may have no vector register among their operands, but use MXCSR or all of them.
    if matches!(
        i.mnemonic(),
        Mnemonic::Vzeroupper
            | Mnemonic::Vzeroall
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Vcvtss2si
            | Mnemonic::Vcvtsd2si
            | Mnemonic::Vcvttss2si
            | Mnemonic::Vcvttsd2si
            | Mnemonic::Vcvtss2usi
            | Mnemonic::Vcvtsd2usi
            | Mnemonic::Vcvttss2usi
            | Mnemonic::Vcvttsd2usi
    ) {
        return true;
    }
    (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && {
            let r = i.op_register(n);
            r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k()
        }
    })
}

/// Which unit a legacy-encoded instruction needs.
pub fn fpu_kind(i: &Instruction) -> Fpu {
    use iced_x86::CpuidFeature as F;
    let vector = (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_vector_register());
    if vector {
        return Fpu::Sse;
    }
    let mm =
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    if mm {
        return Fpu::X87;
    }
    for f in i.cpuid_features() {
        match f {
            F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY | F::MMX => return Fpu::X87,
            F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 => {
                return match i.mnemonic() {
                    // Integer and fence instructions that came with SSE.
                    Mnemonic::Movnti
                    | Mnemonic::Lfence
                    | Mnemonic::Mfence
                    | Mnemonic::Sfence
                    | Mnemonic::Prefetchnta
                    | Mnemonic::Prefetcht0
                    | Mnemonic::Prefetcht1
                    | Mnemonic::Prefetcht2
                    | Mnemonic::Pause => Fpu::None,
                    Mnemonic::Fisttp => Fpu::X87,
                    _ => Fpu::Sse,
                };
            }
            _ => {}
        }
    }
    Fpu::None
}
