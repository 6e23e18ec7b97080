//! The stack: pushes and pops at the stack's width. Intel SDM Vol. 1 §6.2.

use pyrite_x86::{gpr, sreg};

use crate::exception::Exception;
use crate::interp::memory;
use crate::interp::operand::alignment_checked;

use crate::mmu::Priv;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// Mask of the stack pointer: 64 bits in 64-bit mode, else 32 or 16 by SS.B.
#[inline]
pub fn stack_mask(v: &SoftVcpu) -> u64 {
    if v.long64() {
        u64::MAX
    } else if v.frame.cpu.seg[sreg::SS].db() {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// Sets the stack pointer at the stack's width: a 16-bit stack keeps the upper bits of ESP.
#[inline]
pub fn set_sp(v: &mut SoftVcpu, value: u64) {
    let mask = stack_mask(v);
    let sp = &mut v.frame.cpu.gpr[gpr::RSP];
    *sp = if mask == 0xffff {
        *sp & !mask | value & mask
    } else {
        value & mask
    };
}

/// Linear address of `size` bytes at the offset `sp` (already masked) of the stack segment.
#[inline]
fn stack_lin(v: &SoftVcpu, sp: u64, size: usize, access: SegAccess) -> Result<u64, Exception> {
    let lin = v.linear(sreg::SS, sp, size, access)?;
    if lin & (size as u64 - 1) != 0 && alignment_checked(v) {
        return Err(Exception::AC);
    }
    Ok(lin)
}

/// Checks that a push of `size` bytes would succeed.
pub fn probe_push(v: &mut SoftVcpu, size: usize) -> Result<(), Exception> {
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_sub(size as u64) & stack_mask(v);
    let lin = stack_lin(v, sp, size, SegAccess::Write)?;
    v.probe_write(lin, size, Priv::Current)
}

/// Pushes the low `size` (2, 4 or 8) bytes. RSP changes only on success.
#[inline]
pub fn push(v: &mut SoftVcpu, value: u64, size: usize) -> Result<(), Exception> {
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_sub(size as u64) & stack_mask(v);
    let lin = stack_lin(v, sp, size, SegAccess::Write)?;
    memory::store(v, lin, value, size)?;
    set_sp(v, sp);
    Ok(())
}

/// Pops `size` (2, 4 or 8) bytes, zero-extended. RSP changes only on success.
#[inline]
pub fn pop(v: &mut SoftVcpu, size: usize) -> Result<u64, Exception> {
    let value = read_stack(v, 0, size)?;
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(size as u64);
    set_sp(v, sp);
    Ok(value)
}

/// Reads `size` bytes at `displacement` above the stack pointer, which does not change.
#[inline]
pub fn read_stack(v: &mut SoftVcpu, displacement: u64, size: usize) -> Result<u64, Exception> {
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(displacement) & stack_mask(v);
    let lin = stack_lin(v, sp, size, SegAccess::Read)?;
    memory::load(v, lin, size)
}

/// Writes `size` bytes at `displacement` from the stack pointer, which does not change.
#[inline]
pub fn write_stack(
    v: &mut SoftVcpu,
    displacement: u64,
    value: u64,
    size: usize,
) -> Result<(), Exception> {
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(displacement) & stack_mask(v);
    let lin = stack_lin(v, sp, size, SegAccess::Write)?;
    memory::store(v, lin, value, size)
}
