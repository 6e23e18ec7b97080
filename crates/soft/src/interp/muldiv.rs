//! Multiplication and division.

// UNSAFETY: the host's DIV and IDIV, after proof that they do not trap.
#![allow(unsafe_code, reason = "the host divides")]

use iced_x86::Register;
use pyrite_x86::gpr;

use crate::exception::Exception;
use crate::interp::integer::{Done, sign_extend};
use crate::interp::operand::{read, read_reg, size_mask, write_reg};
use crate::interp::{Op, alu};
use crate::sys::Next;
use crate::vcpu::SoftVcpu;

/// Names of the low and high half of a double-width value.
fn halves(size: usize) -> (Register, Register) {
    match size {
        1 => (Register::AL, Register::AH),
        2 => (Register::AX, Register::DX),
        4 => (Register::EAX, Register::EDX),
        _ => (Register::RAX, Register::RDX),
    }
}

fn store_pair(v: &mut SoftVcpu, size: usize, lo: u64, hi: u64) {
    if size == 1 {
        write_reg(v, Register::AX, lo);
    } else {
        let (l, h) = halves(size);
        write_reg(v, l, lo);
        write_reg(v, h, hi);
    }
}

/// MUL.
pub fn mul(v: &mut SoftVcpu, op: &Op) -> Done {
    let b = read(v, &op.i, 0, op.size)?;
    let mut flags = v.frame.cpu.rflags;
    let a = read_reg(v, halves(op.size).0);
    let (lo, hi) = alu::mul(op.size, a, b, &mut flags);
    store_pair(v, op.size, lo, hi);
    v.frame.cpu.rflags = flags;
    Ok(Next::Sequential)
}

/// IMUL with one, two or three operands.
pub fn imul(v: &mut SoftVcpu, op: &Op) -> Done {
    let mut flags = v.frame.cpu.rflags;
    match op.i.op_count() {
        1 => {
            let b = read(v, &op.i, 0, op.size)?;
            let a = read_reg(v, halves(op.size).0);
            let (lo, hi) = alu::imul(op.size, a, b, &mut flags);
            store_pair(v, op.size, lo, hi);
        }
        n => {
            let a = read(v, &op.i, n - 2, op.size)?;
            let b = read(v, &op.i, n - 1, op.size)?;
            let r = alu::imul2(op.size, a, b, &mut flags);
            write_reg(v, op.i.op0_register(), r);
        }
    }
    v.frame.cpu.rflags = flags;
    Ok(Next::Sequential)
}

/// The dividend: low and high half.
fn dividend(v: &SoftVcpu, size: usize) -> (u64, u64) {
    if size == 1 {
        let ax = v.frame.cpu.gpr[gpr::RAX] & 0xffff;
        (ax, ax >> 8)
    } else {
        let (l, h) = halves(size);
        (read_reg(v, l), read_reg(v, h))
    }
}

/// DIV.
pub fn div(v: &mut SoftVcpu, op: &Op) -> Done {
    let b = read(v, &op.i, 0, op.size)?;
    let (lo, hi) = dividend(v, op.size);
    // The quotient fits exactly if the high half is less than the divisor (which is then not 0).
    if hi >= b {
        return Err(Exception::DE.into());
    }
    let mut flags = v.frame.cpu.rflags;
    // SAFETY: just proved.
    let (q, r) = unsafe { alu::div(op.size, lo, hi, b, &mut flags) };
    store_pair(v, op.size, q, r);
    v.frame.cpu.rflags = flags;
    Ok(Next::Sequential)
}

/// IDIV.
pub fn idiv(v: &mut SoftVcpu, op: &Op) -> Done {
    let b = read(v, &op.i, 0, op.size)?;
    let (lo, hi) = dividend(v, op.size);
    let bits = 8 * op.size as u32;
    let low = u128::from(lo & size_mask(op.size));
    let wide = i128::from(sign_extend(hi, op.size)) << bits | low as i128;
    let divisor = i128::from(sign_extend(b, op.size));
    let fits = wide
        .checked_div(divisor)
        .is_some_and(|q| (-(1i128 << (bits - 1))..1i128 << (bits - 1)).contains(&q));
    if !fits {
        return Err(Exception::DE.into());
    }
    let mut flags = v.frame.cpu.rflags;
    // SAFETY: the divisor is not 0 and the quotient fits, as just computed.
    let (q, r) = unsafe { alu::idiv(op.size, lo, hi, b, &mut flags) };
    store_pair(v, op.size, q, r);
    v.frame.cpu.rflags = flags;
    Ok(Next::Sequential)
}
