//! Decimal adjustments (16- and 32-bit code only). Intel SDM Vol. 2A, "DAA" and following.

use iced_x86::Register;
use pyrite_x86::bits::rflags::{AF, ARITH, CF, OF, PF, SF, ZF};

use crate::exception::Exception;
use crate::interp::Op;
use crate::interp::integer::Done;
use crate::interp::operand::{read_reg, write_reg};
use crate::sys::Next;
use crate::vcpu::SoftVcpu;

/// SF, ZF and PF of a byte.
fn byte_flags(x: u64) -> u64 {
    let x = x as u8;
    let mut f = 0;
    if x == 0 {
        f |= ZF;
    }
    if x & 0x80 != 0 {
        f |= SF;
    }
    if x.count_ones().is_multiple_of(2) {
        f |= PF;
    }
    f
}

fn set_flags(v: &mut SoftVcpu, flags: u64) {
    let f = &mut v.frame.cpu.rflags;
    *f = *f & !ARITH | flags;
}

fn packed(v: &mut SoftVcpu, add: bool) -> Done {
    let old = read_reg(v, Register::AL);
    let f = v.frame.cpu.rflags;
    let mut al = old;
    let mut out = 0;
    let step = |al: u64, n: u64| {
        if add {
            al.wrapping_add(n)
        } else {
            al.wrapping_sub(n)
        }
    };
    if old & 0xf > 9 || f & AF != 0 {
        al = step(al, 6);
        out |= AF;
        // DAS reports the borrow of this step too.
        if !add && old < 6 {
            out |= CF;
        }
    }
    if old > 0x99 || f & CF != 0 {
        al = step(al, 0x60);
        out |= CF;
    }
    al &= 0xff;
    // Formally undefined: that of the one addition or subtraction.
    let by = if add {
        al.wrapping_sub(old)
    } else {
        old.wrapping_sub(al)
    };
    let same_sign = if add { !(old ^ by) } else { old ^ by };
    if same_sign & (old ^ al) & 0x80 != 0 {
        out |= OF;
    }
    write_reg(v, Register::AL, al);
    set_flags(v, out | byte_flags(al));
    Ok(Next::Sequential)
}

/// DAA.
pub fn daa(v: &mut SoftVcpu, _: &Op) -> Done {
    packed(v, true)
}

/// DAS.
pub fn das(v: &mut SoftVcpu, _: &Op) -> Done {
    packed(v, false)
}

fn unpacked(v: &mut SoftVcpu, add: bool) -> Done {
    let ax = read_reg(v, Register::AX);
    let (by, mut out) = if ax & 0xf > 9 || v.frame.cpu.rflags & AF != 0 {
        (0x106, AF | CF)
    } else {
        (0, 0)
    };
    let new = if add {
        ax.wrapping_add(by) & 0xffff
    } else {
        ax.wrapping_sub(by) & 0xffff
    };
    // OF, SF, ZF and PF, formally undefined, are those of the 16-bit operation, before the high
    // half of AL is cleared.
    let same_sign = if add { !(ax ^ by) } else { ax ^ by };
    if same_sign & (ax ^ new) & 0x8000 != 0 {
        out |= OF;
    }
    if new & 0x8000 != 0 {
        out |= SF;
    }
    if new == 0 {
        out |= ZF;
    }
    out |= byte_flags(new) & PF;
    write_reg(v, Register::AX, new & 0xff0f);
    set_flags(v, out);
    Ok(Next::Sequential)
}

/// AAA.
pub fn aaa(v: &mut SoftVcpu, _: &Op) -> Done {
    unpacked(v, true)
}

/// AAS.
pub fn aas(v: &mut SoftVcpu, _: &Op) -> Done {
    unpacked(v, false)
}

/// AAM: #DE for base 0.
pub fn aam(v: &mut SoftVcpu, op: &Op) -> Done {
    let base = op.i.immediate(0) & 0xff;
    let al = read_reg(v, Register::AL);
    let (Some(q), Some(r)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(Exception::DE.into());
    };
    write_reg(v, Register::AX, q << 8 | r);
    set_flags(v, byte_flags(r));
    Ok(Next::Sequential)
}

/// AAD.
pub fn aad(v: &mut SoftVcpu, op: &Op) -> Done {
    let base = op.i.immediate(0) & 0xff;
    let (al, ah) = (read_reg(v, Register::AL), read_reg(v, Register::AH));
    // The processor adds; OF, AF and CF, formally undefined, are those of that addition.
    let (a, b) = (al, ah.wrapping_mul(base) & 0xff);
    let sum = a + b;
    let mut f = byte_flags(sum);
    if sum > 0xff {
        f |= CF;
    }
    if (a ^ b ^ sum) & 0x10 != 0 {
        f |= AF;
    }
    if (a ^ sum) & (b ^ sum) & 0x80 != 0 {
        f |= OF;
    }
    write_reg(v, Register::AX, sum & 0xff);
    set_flags(v, f);
    Ok(Next::Sequential)
}
