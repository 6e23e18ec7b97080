//! Operands: effective addresses, registers of every size, loads and stores of up to 8 bytes.

use iced_x86::{CodeSize, Instruction, OpKind, Register};
use pyrite_x86::bits::{cr0, rflags, vector};
use pyrite_x86::paging::AccessKind;
use pyrite_x86::sreg;

use crate::exception::Exception;
use crate::interp::memory;
use crate::mmu::Priv;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// Mask of the low `size` bytes (1, 2, 4 or 8).
#[inline]
pub const fn size_mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// Number of a segment register in encoding order; DS for anything else.
#[inline]
pub fn segment_number(r: Register) -> usize {
    match r {
        Register::ES => sreg::ES,
        Register::CS => sreg::CS,
        Register::SS => sreg::SS,
        Register::FS => sreg::FS,
        Register::GS => sreg::GS,
        _ => sreg::DS,
    }
}

/// Segment register number of the memory operand, override prefixes included.
#[inline]
pub fn segment(i: &Instruction) -> usize {
    let seg = segment_number(i.memory_segment());
    if i.code_size() == CodeSize::Code64 && seg < sreg::FS && i.has_segment_prefix() {
        // 64-bit mode ignores the prefix; which fault an address raises follows from the base.
        return match i.memory_base() {
            Register::RSP | Register::RBP | Register::ESP | Register::EBP => sreg::SS,
            _ => sreg::DS,
        };
    }
    seg
}

/// Mask of the address size of the memory operand.
#[inline]
pub fn address_mask(i: &Instruction) -> u64 {
    let by_register = |r: Register| match r {
        _ if is_gpr64(r) || r == Register::RIP => u64::MAX,
        _ if is_gpr32(r) || r == Register::EIP => 0xffff_ffff,
        _ => 0xffff,
    };
    let (base, index) = (i.memory_base(), i.memory_index());
    if base != Register::None {
        by_register(base)
    } else if index.is_gpr() {
        by_register(index)
    } else {
        match i.memory_displ_size() {
            8 => u64::MAX,
            4 => 0xffff_ffff,
            _ => 0xffff,
        }
    }
}

/// Effective offset of the memory operand, truncated to the address size. The vector index of a
/// gather or scatter is not part of it.
#[inline]
pub fn offset(v: &SoftVcpu, i: &Instruction) -> u64 {
    let base = i.memory_base();
    // For RIP-relative operands the decoder has already added the next RIP.
    let mut o = i.memory_displacement64();
    if base != Register::None && base != Register::RIP && base != Register::EIP {
        o = o.wrapping_add(read_reg(v, base));
    }
    let index = i.memory_index();
    if index != Register::None && index.is_gpr() {
        o = o.wrapping_add(read_reg(v, index).wrapping_mul(u64::from(i.memory_index_scale())));
    }
    o & address_mask(i)
}

/// True while misaligned accesses raise #AC. Intel SDM Vol. 3A §6.15, interrupt 17.
#[inline]
pub fn alignment_checked(v: &SoftVcpu) -> bool {
    let c = &v.frame.cpu;
    c.rflags & rflags::AC != 0 && c.cr0 & cr0::AM != 0 && c.cpl() == 3
}

/// Linear address of the memory operand, of `len` bytes, with the checks of its segment and of
/// alignment (#AC).
#[inline]
pub fn mem_lin(
    v: &mut SoftVcpu,
    i: &Instruction,
    len: usize,
    access: SegAccess,
) -> Result<u64, Exception> {
    let lin = v.linear(segment(i), offset(v, i), len, access)?;
    if len.is_power_of_two() && lin & (len as u64 - 1) != 0 && len <= 8 && alignment_checked(v) {
        return Err(Exception::AC);
    }
    Ok(lin)
}

/// The fault of an operand that is accessed in pieces and of which [`mem_lin`] refused the whole
/// with `refusal`: if its first piece, of `first` bytes at `at`, is canonical, that one's page fault
/// comes before. The manuals leave the order open; processors do it for x87 and masked operands.
#[cold]
pub fn split_fault(
    v: &mut SoftVcpu,
    i: &Instruction,
    at: usize,
    first: usize,
    access: SegAccess,
    refusal: Exception,
) -> Exception {
    if refusal.vector == vector::AC {
        return refusal;
    }
    let o = offset(v, i).wrapping_add(at as u64);
    if !v.long64() && o > 0xffff_ffff {
        return refusal;
    }
    let o = if v.long64() { o & address_mask(i) } else { o };
    let Ok(lin) = v.linear(segment(i), o, first, access) else {
        return refusal;
    };
    let kind = match access {
        SegAccess::Read => AccessKind::Read,
        SegAccess::Write => AccessKind::Write,
    };
    match v.probe(lin, first, kind, Priv::Current) {
        Ok(()) => refusal,
        Err(page) => page,
    }
}

#[inline]
fn within(r: Register, first: Register, last: Register) -> bool {
    (first as u32..=last as u32).contains(&(r as u32))
}

#[inline]
fn is_gpr64(r: Register) -> bool {
    within(r, Register::RAX, Register::R15)
}

#[inline]
fn is_gpr32(r: Register) -> bool {
    within(r, Register::EAX, Register::R15D)
}

/// Where a general-purpose register is: its number, its size in bytes, and whether it is one of
/// AH, CH, DH, BH.
#[inline]
pub fn gpr_place(r: Register) -> Option<(usize, usize, bool)> {
    let n = r as usize;
    let from = |first: Register| n - first as usize;
    if is_gpr64(r) {
        Some((from(Register::RAX) & 15, 8, false))
    } else if is_gpr32(r) {
        Some((from(Register::EAX) & 15, 4, false))
    } else if within(r, Register::AX, Register::R15W) {
        Some((from(Register::AX) & 15, 2, false))
    } else if within(r, Register::AL, Register::BL) {
        Some((from(Register::AL) & 15, 1, false))
    } else if within(r, Register::AH, Register::BH) {
        Some((from(Register::AH) & 15, 1, true))
    } else if within(r, Register::SPL, Register::R15L) {
        Some(((from(Register::SPL) + 4) & 15, 1, false))
    } else {
        None
    }
}

/// Reads a general-purpose register of any size, or a segment selector, zero-extended.
#[inline]
pub fn read_reg(v: &SoftVcpu, r: Register) -> u64 {
    match gpr_place(r) {
        Some((n, size, high)) => {
            let q = v.frame.cpu.gpr[n] >> if high { 8 } else { 0 };
            q & size_mask(size)
        }
        None if r.is_segment_register() => u64::from(v.frame.cpu.seg[segment_number(r)].selector),
        None => 0,
    }
}

/// Writes a general-purpose register of any size: 8- and 16-bit writes keep the other bits,
/// 32-bit writes clear bits 63:32. Other registers are ignored.
#[inline]
pub fn write_reg(v: &mut SoftVcpu, r: Register, value: u64) {
    let Some((n, size, high)) = gpr_place(r) else {
        return;
    };
    let q = &mut v.frame.cpu.gpr[n];
    match size {
        8 => *q = value,
        4 => *q = value & 0xffff_ffff,
        2 => *q = *q & !0xffff | value & 0xffff,
        _ if high => *q = *q & !0xff00 | (value & 0xff) << 8,
        _ => *q = *q & !0xff | value & 0xff,
    }
}

/// Reads a register, memory or immediate operand of up to 8 bytes, zero-extended from `size`.
/// For a near branch operand: the target offset.
#[inline]
pub fn read(v: &mut SoftVcpu, i: &Instruction, op: u32, size: usize) -> Result<u64, Exception> {
    match i.op_kind(op) {
        OpKind::Register => Ok(read_reg(v, i.op_register(op)) & size_mask(size)),
        OpKind::Memory => {
            let lin = mem_lin(v, i, size, SegAccess::Read)?;
            memory::load(v, lin, size)
        }
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Ok(i.near_branch_target())
        }
        _ => Ok(i.immediate(op) & size_mask(size)),
    }
}

/// Writes a register or memory operand of up to 8 bytes.
#[inline]
pub fn write(
    v: &mut SoftVcpu,
    i: &Instruction,
    op: u32,
    value: u64,
    size: usize,
) -> Result<(), Exception> {
    match i.op_kind(op) {
        OpKind::Register => {
            write_reg(v, i.op_register(op), value);
            Ok(())
        }
        OpKind::Memory => {
            let lin = mem_lin(v, i, size, SegAccess::Write)?;
            memory::store(v, lin, value, size)
        }
        _ => Err(Exception::UD),
    }
}
