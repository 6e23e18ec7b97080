//! From a decoded instruction to the function that executes it.

use iced_x86::{Code, CodeSize, FlowControl, Instruction, Mnemonic, OpKind};

use crate::exception::{Exception, Trap};
use crate::interp::{Handler, Op, bits, branch, decimal, integer, muldiv, native, string};
use crate::sys::{self, Next};
use crate::vcpu::SoftVcpu;

/// Runs an instruction of the system side.
fn system(v: &mut SoftVcpu, op: &Op) -> Result<Next, Trap> {
    sys::execute(v, &op.i)
}

/// Finds the handler of an instruction and what it wants to know.
pub fn select(v: &mut SoftVcpu, i: &Instruction, mode: u32, bytes: u128) -> Result<Op, Exception> {
    let mut op = Op {
        i: *i,
        run: integer::undefined,
        size: operand_size(i),
        bits: mode,
        plan: 0,
    };
    let own = special(i, &mut op.size).or_else(|| stack_or_branch(i, &mut op.size));
    // The system side makes its own checks of CPUID.
    if own.is_none() && sys::handles(i.mnemonic()) {
        op.run = system;
        return Ok(op);
    }
    let m = i.mnemonic();
    if let Some(run) = own.or_else(|| arithmetic(m)).or_else(|| other(m)) {
        op.run = match m {
            _ if v.interp.allows(i) => run,
            // The prefix that makes them is ignored where they do not exist.
            Mnemonic::Tzcnt => bits::bsf,
            Mnemonic::Lzcnt => bits::bsr,
            _ => integer::undefined,
        };
    } else if !i.is_privileged() && i.flow_control() == FlowControl::Next {
        native::prepare(v, &mut op, bytes)?;
    }
    Ok(op)
}

/// Size of operand 0, or of the memory operand.
fn operand_size(i: &Instruction) -> usize {
    if i.op_count() == 0 {
        return 0;
    }
    if i.op0_kind() == OpKind::Register {
        return i.op0_register().size();
    }
    i.memory_size().size()
}

/// Instructions whose mnemonic does not tell enough.
fn special(i: &Instruction, size: &mut usize) -> Option<Handler> {
    let is_segment =
        |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register();
    let is_gpr = |n: u32| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr();
    if i.is_string_instruction() {
        *size = i.memory_size().size();
        let run: Handler = match i.code() {
            Code::Movsb_m8_m8 | Code::Movsw_m16_m16 | Code::Movsd_m32_m32 | Code::Movsq_m64_m64 => {
                string::movs
            }
            Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64 => {
                string::cmps
            }
            Code::Scasb_AL_m8 | Code::Scasw_AX_m16 | Code::Scasd_EAX_m32 | Code::Scasq_RAX_m64 => {
                string::scas
            }
            Code::Lodsb_AL_m8 | Code::Lodsw_AX_m16 | Code::Lodsd_EAX_m32 | Code::Lodsq_RAX_m64 => {
                string::lods
            }
            Code::Stosb_m8_AL | Code::Stosw_m16_AX | Code::Stosd_m32_EAX | Code::Stosq_m64_RAX => {
                string::stos
            }
            _ => system,
        };
        return Some(run);
    }
    match i.mnemonic() {
        Mnemonic::Mov if is_segment(1) => Some(integer::mov_from_sreg),
        // To segment, control and debug registers.
        Mnemonic::Mov if !is_gpr(0) || !is_gpr(1) => Some(system),
        Mnemonic::Mov => Some(integer::mov),
        Mnemonic::Pop if is_segment(0) => Some(system),
        Mnemonic::Vzeroall | Mnemonic::Vzeroupper if i.code_size() != CodeSize::Code64 => {
            Some(native::registers::zero_low)
        }
        // 0F 0D is PREFETCHW and its kin: of memory only.
        Mnemonic::Reservednop
            if i.op0_kind() == OpKind::Register
                && matches!(
                    i.code(),
                    Code::Reservednop_rm16_r16_0F0D
                        | Code::Reservednop_rm32_r32_0F0D
                        | Code::Reservednop_rm64_r64_0F0D
                ) =>
        {
            Some(integer::undefined)
        }
        _ => None,
    }
}

/// Stack instructions and near branches; `size` becomes the operand size.
fn stack_or_branch(i: &Instruction, size: &mut usize) -> Option<Handler> {
    let slot = i.stack_pointer_increment().unsigned_abs() as usize;
    let run: Handler = match i.mnemonic() {
        Mnemonic::Push | Mnemonic::Pop => {
            *size = slot;
            if i.mnemonic() == Mnemonic::Push {
                integer::push
            } else {
                integer::pop
            }
        }
        Mnemonic::Pusha | Mnemonic::Popa => {
            *size = 2;
            if i.mnemonic() == Mnemonic::Pusha {
                integer::pusha
            } else {
                integer::popa
            }
        }
        Mnemonic::Pushad | Mnemonic::Popad => {
            *size = 4;
            if i.mnemonic() == Mnemonic::Pushad {
                integer::pusha
            } else {
                integer::popa
            }
        }
        Mnemonic::Enter | Mnemonic::Leave => {
            *size = match i.code() {
                Code::Enterw_imm16_imm8 | Code::Leavew => 2,
                Code::Enterd_imm16_imm8 | Code::Leaved => 4,
                _ => 8,
            };
            if i.mnemonic() == Mnemonic::Enter {
                integer::enter
            } else {
                integer::leave
            }
        }
        Mnemonic::Ret => {
            *size = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            branch::ret
        }
        Mnemonic::Call | Mnemonic::Jmp => {
            if i.is_call_far()
                || i.is_call_far_indirect()
                || i.is_jmp_far()
                || i.is_jmp_far_indirect()
            {
                return Some(system);
            }
            *size = match i.op0_kind() {
                OpKind::Register => i.op0_register().size(),
                OpKind::Memory => i.memory_size().size(),
                _ => branch_size(i),
            };
            if i.mnemonic() == Mnemonic::Call {
                branch::call
            } else {
                branch::jmp
            }
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            *size = branch_size(i);
            branch::loop_
        }
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            *size = branch_size(i);
            branch::jcxz
        }
        _ if i.is_jcc_short_or_near() => {
            *size = branch_size(i);
            branch::jcc
        }
        _ => return None,
    };
    Some(run)
}

fn branch_size(i: &Instruction) -> usize {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}

pub(crate) fn arithmetic(m: Mnemonic) -> Option<Handler> {
    Some(match m {
        Mnemonic::Add => integer::add,
        Mnemonic::Or => integer::or,
        Mnemonic::Adc => integer::adc,
        Mnemonic::Sbb => integer::sbb,
        Mnemonic::And => integer::and,
        Mnemonic::Sub => integer::sub,
        Mnemonic::Xor => integer::xor,
        Mnemonic::Cmp => integer::cmp,
        Mnemonic::Test => integer::test,
        Mnemonic::Inc => integer::inc,
        Mnemonic::Dec => integer::dec,
        Mnemonic::Neg => integer::neg,
        Mnemonic::Not => integer::not,
        Mnemonic::Rol => integer::shift_rol,
        Mnemonic::Ror => integer::shift_ror,
        Mnemonic::Rcl => integer::shift_rcl,
        Mnemonic::Rcr => integer::shift_rcr,
        Mnemonic::Shl | Mnemonic::Sal => integer::shift_shl,
        Mnemonic::Shr => integer::shift_shr,
        Mnemonic::Sar => integer::shift_sar,
        Mnemonic::Shld => integer::shld,
        Mnemonic::Shrd => integer::shrd,
        Mnemonic::Mul => muldiv::mul,
        Mnemonic::Imul => muldiv::imul,
        Mnemonic::Div => muldiv::div,
        Mnemonic::Idiv => muldiv::idiv,
        Mnemonic::Bt => bits::bt,
        Mnemonic::Bts => bits::bts,
        Mnemonic::Btr => bits::btr,
        Mnemonic::Btc => bits::btc,
        Mnemonic::Bsf => bits::bsf,
        Mnemonic::Bsr => bits::bsr,
        Mnemonic::Tzcnt => bits::tzcnt,
        Mnemonic::Lzcnt => bits::lzcnt,
        Mnemonic::Popcnt => bits::popcnt,
        Mnemonic::Daa => decimal::daa,
        Mnemonic::Das => decimal::das,
        Mnemonic::Aaa => decimal::aaa,
        Mnemonic::Aas => decimal::aas,
        Mnemonic::Aam => decimal::aam,
        Mnemonic::Aad => decimal::aad,
        Mnemonic::Xadd => integer::xadd,
        Mnemonic::Cmpxchg => integer::cmpxchg,
        Mnemonic::Cmpxchg8b => integer::cmpxchg8b,
        Mnemonic::Cmpxchg16b => integer::cmpxchg16b,
        _ => return None,
    })
}

pub(crate) fn other(m: Mnemonic) -> Option<Handler> {
    Some(match m {
        Mnemonic::Movzx => integer::movzx,
        Mnemonic::Movsx | Mnemonic::Movsxd => integer::movsx,
        Mnemonic::Lea => integer::lea,
        Mnemonic::Xchg => integer::xchg,
        Mnemonic::Bswap => integer::bswap,
        Mnemonic::Movbe => integer::movbe,
        Mnemonic::Movnti | Mnemonic::Movdiri => integer::mov,
        Mnemonic::Movdir64b => integer::movdir64b,
        Mnemonic::Clzero => integer::clzero,
        Mnemonic::Cbw => |v, op| integer::extend_accumulator(v, &Op { size: 1, ..*op }),
        Mnemonic::Cwde => |v, op| integer::extend_accumulator(v, &Op { size: 2, ..*op }),
        Mnemonic::Cdqe => |v, op| integer::extend_accumulator(v, &Op { size: 4, ..*op }),
        Mnemonic::Cwd => |v, op| integer::extend_to_rdx(v, &Op { size: 2, ..*op }),
        Mnemonic::Cdq => |v, op| integer::extend_to_rdx(v, &Op { size: 4, ..*op }),
        Mnemonic::Cqo => |v, op| integer::extend_to_rdx(v, &Op { size: 8, ..*op }),
        Mnemonic::Xlatb => integer::xlat,
        Mnemonic::Salc => integer::salc,
        Mnemonic::Lahf => integer::lahf,
        Mnemonic::Sahf => integer::sahf,
        Mnemonic::Clc => integer::clc,
        Mnemonic::Stc => integer::stc,
        Mnemonic::Cmc => integer::cmc,
        Mnemonic::Cld => integer::cld,
        Mnemonic::Std => integer::std,
        Mnemonic::Nop | Mnemonic::Pause | Mnemonic::Reservednop => integer::nop,
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => integer::undefined,
        _ => return flexible(m),
    })
}

/// Conditional moves and sets, hints, fences, cache control.
fn flexible(m: Mnemonic) -> Option<Handler> {
    Some(match m {
        Mnemonic::Cmova
        | Mnemonic::Cmovae
        | Mnemonic::Cmovb
        | Mnemonic::Cmovbe
        | Mnemonic::Cmove
        | Mnemonic::Cmovg
        | Mnemonic::Cmovge
        | Mnemonic::Cmovl
        | Mnemonic::Cmovle
        | Mnemonic::Cmovne
        | Mnemonic::Cmovno
        | Mnemonic::Cmovnp
        | Mnemonic::Cmovns
        | Mnemonic::Cmovo
        | Mnemonic::Cmovp
        | Mnemonic::Cmovs => integer::cmov,
        Mnemonic::Seta
        | Mnemonic::Setae
        | Mnemonic::Setb
        | Mnemonic::Setbe
        | Mnemonic::Sete
        | Mnemonic::Setg
        | Mnemonic::Setge
        | Mnemonic::Setl
        | Mnemonic::Setle
        | Mnemonic::Setne
        | Mnemonic::Setno
        | Mnemonic::Setnp
        | Mnemonic::Setns
        | Mnemonic::Seto
        | Mnemonic::Setp
        | Mnemonic::Sets => integer::setcc,
        Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq => integer::nop,
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence | Mnemonic::Serialize => {
            integer::fence
        }
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => integer::touch,
        _ => return None,
    })
}
