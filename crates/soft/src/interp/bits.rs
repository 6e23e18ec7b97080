//! Bit tests and bit scans.

use iced_x86::OpKind;

use crate::exception::Exception;
use crate::interp::integer::{Done, sign_extend};
use crate::interp::operand::{address_mask, offset, read, read_reg, segment, write_reg};
use crate::interp::{Op, alu, memory};
use crate::sys::Next;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// BT, BTS, BTR, BTC. With memory and a register index the operand is a bit string: the index,
/// signed, chooses the element too. Intel SDM Vol. 2A §3.1.1.9 "Bit(BitBase, BitOffset)".
#[inline(always)]
fn bit(
    v: &mut SoftVcpu,
    op: &Op,
    write: bool,
    f: impl Fn(usize, u64, u64, &mut u64) -> u64,
) -> Done {
    let (i, size) = (&op.i, op.size);
    let index = read(v, i, 1, size)?;
    let mut flags = v.frame.cpu.rflags;
    if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        let new = f(size, read_reg(v, r), index, &mut flags);
        if write {
            write_reg(v, r, new);
        }
        v.frame.cpu.rflags = flags;
        return Ok(Next::Sequential);
    }
    let bits = 8 * size as i64;
    let mut at = offset(v, i);
    if i.op1_kind() == OpKind::Register {
        let element = sign_extend(index, size).div_euclid(bits);
        at = at.wrapping_add((element * size as i64) as u64) & address_mask(i);
    }
    let access = if write {
        SegAccess::Write
    } else {
        SegAccess::Read
    };
    let lin = v.linear(segment(i), at, size, access)?;
    if lin & (size as u64 - 1) != 0 && crate::interp::operand::alignment_checked(v) {
        return Err(Exception::AC.into());
    }
    let index = index & (bits as u64 - 1);
    if write {
        let before = flags;
        memory::modify_at(v, lin, size, i.has_lock_prefix(), |a| {
            flags = before;
            f(size, a, index, &mut flags)
        })?;
    } else {
        let a = memory::load(v, lin, size)?;
        f(size, a, index, &mut flags);
    }
    v.frame.cpu.rflags = flags;
    Ok(Next::Sequential)
}

/// BT.
pub fn bt(v: &mut SoftVcpu, op: &Op) -> Done {
    bit(v, op, false, |size, a, b, f| {
        alu::bt(size, a, b, f);
        a
    })
}

/// BTS.
pub fn bts(v: &mut SoftVcpu, op: &Op) -> Done {
    bit(v, op, true, alu::bts)
}

/// BTR.
pub fn btr(v: &mut SoftVcpu, op: &Op) -> Done {
    bit(v, op, true, alu::btr)
}

/// BTC.
pub fn btc(v: &mut SoftVcpu, op: &Op) -> Done {
    bit(v, op, true, alu::btc)
}

/// Scans and counts: `f` sees and gives all 64 bits of the destination, because BSF and BSR of 0
/// leave it alone.
#[inline(always)]
fn scan(v: &mut SoftVcpu, op: &Op, f: impl Fn(usize, u64, u64, &mut u64) -> u64) -> Done {
    let b = read(v, &op.i, 1, op.size)?;
    let r = op.i.op0_register().full_register();
    let mut flags = v.frame.cpu.rflags;
    let new = f(op.size, read_reg(v, r), b, &mut flags);
    write_reg(v, r, new);
    v.frame.cpu.rflags = flags;
    Ok(Next::Sequential)
}

/// BSF.
pub fn bsf(v: &mut SoftVcpu, op: &Op) -> Done {
    scan(v, op, alu::bsf)
}

/// BSR.
pub fn bsr(v: &mut SoftVcpu, op: &Op) -> Done {
    scan(v, op, alu::bsr)
}

/// TZCNT.
pub fn tzcnt(v: &mut SoftVcpu, op: &Op) -> Done {
    scan(v, op, alu::tzcnt)
}

/// LZCNT.
pub fn lzcnt(v: &mut SoftVcpu, op: &Op) -> Done {
    scan(v, op, alu::lzcnt)
}

/// POPCNT.
pub fn popcnt(v: &mut SoftVcpu, op: &Op) -> Done {
    scan(v, op, alu::popcnt)
}
