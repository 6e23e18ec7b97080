//! Near transfers of control.

use iced_x86::{OpKind, Register};
use pyrite_x86::{gpr, sreg};

use crate::exception::Exception;
use crate::interp::integer::{Done, condition};
use crate::interp::operand::{read, size_mask};
use crate::interp::{Op, code_bits, stack};
use crate::sys::Next;
use crate::vcpu::SoftVcpu;

/// Truncates a target to the operand size and checks it against CS. Nothing changes.
#[inline]
pub fn checked_target(v: &SoftVcpu, target: u64, size: usize) -> Result<u64, Exception> {
    let target = target & size_mask(size);
    if code_bits(v) == 64 {
        if !v.canonical(target) {
            return Err(Exception::gp(0));
        }
    } else if target > u64::from(v.frame.cpu.seg[sreg::CS].limit) {
        return Err(Exception::gp(0));
    }
    Ok(target)
}

#[inline]
fn jump(v: &mut SoftVcpu, target: u64, size: usize) -> Done {
    v.frame.cpu.rip = checked_target(v, target, size)?;
    Ok(Next::Jumped)
}

/// JMP near, direct and indirect. `size` is the operand size.
pub fn jmp(v: &mut SoftVcpu, op: &Op) -> Done {
    let target = read(v, &op.i, 0, op.size)?;
    jump(v, target, op.size)
}

/// Jcc.
pub fn jcc(v: &mut SoftVcpu, op: &Op) -> Done {
    if condition(op.i.condition_code(), v.frame.cpu.rflags) {
        jump(v, op.i.near_branch_target(), op.size)
    } else {
        Ok(Next::Sequential)
    }
}

/// The counter of LOOP and JrCXZ has the address size, which the decoder tells by the code.
fn counter_size(op: &Op) -> usize {
    use iced_x86::Code;
    match op.i.code() {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

/// LOOP, LOOPE, LOOPNE.
pub fn loop_(v: &mut SoftVcpu, op: &Op) -> Done {
    let r = match counter_size(op) {
        2 => Register::CX,
        4 => Register::ECX,
        _ => Register::RCX,
    };
    let mask = size_mask(counter_size(op));
    let count = v.frame.cpu.gpr[gpr::RCX].wrapping_sub(1) & mask;
    // The target is checked before the counter changes.
    let taken = count != 0 && condition(op.i.condition_code(), v.frame.cpu.rflags);
    let next = if taken {
        jump(v, op.i.near_branch_target(), op.size)?
    } else {
        Next::Sequential
    };
    crate::interp::operand::write_reg(v, r, count);
    Ok(next)
}

/// JCXZ, JECXZ, JRCXZ.
pub fn jcxz(v: &mut SoftVcpu, op: &Op) -> Done {
    if v.frame.cpu.gpr[gpr::RCX] & size_mask(counter_size(op)) == 0 {
        jump(v, op.i.near_branch_target(), op.size)
    } else {
        Ok(Next::Sequential)
    }
}

/// CALL near, direct and indirect.
pub fn call(v: &mut SoftVcpu, op: &Op) -> Done {
    let target = match op.i.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            op.i.near_branch_target()
        }
        _ => read(v, &op.i, 0, op.size)?,
    };
    // A stack that cannot take the return address is found before a target that cannot be reached.
    stack::probe_push(v, op.size)?;
    let target = checked_target(v, target, op.size)?;
    stack::push(v, op.i.next_ip(), op.size)?;
    v.frame.cpu.rip = target;
    Ok(Next::Jumped)
}

/// RET near, with or without parameter bytes.
pub fn ret(v: &mut SoftVcpu, op: &Op) -> Done {
    let target = stack::read_stack(v, 0, op.size)?;
    let target = checked_target(v, target, op.size)?;
    let extra = if op.i.op_count() == 1 {
        op.i.immediate(0)
    } else {
        0
    };
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(op.size as u64 + extra);
    stack::set_sp(v, sp);
    v.frame.cpu.rip = target;
    Ok(Next::Jumped)
}
