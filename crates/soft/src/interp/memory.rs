//! Loads, stores and read-modify-writes, locked ones as atomics of the host.

// UNSAFETY: accesses guest RAM through the pointers that the soft TLB gives out.
#![allow(unsafe_code, reason = "plain and atomic accesses to guest RAM")]

use core::arch::asm;

use crate::exception::Exception;
use crate::interp::Op;
use crate::interp::operand::mem_lin;
use crate::mmu::Priv;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// Loads 1, 2, 4 or 8 bytes in one host access.
///
/// # Safety
/// `p` has `size` bytes of mapped memory behind it.
#[inline]
unsafe fn peek(p: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise; unaligned loads are one instruction on this processor.
    unsafe {
        match size {
            1 => u64::from(p.read_volatile()),
            2 => u64::from(p.cast::<u16>().read_unaligned()),
            4 => u64::from(p.cast::<u32>().read_unaligned()),
            _ => p.cast::<u64>().read_unaligned(),
        }
    }
}

/// Stores 1, 2, 4 or 8 bytes in one host access.
///
/// # Safety
/// `p` has `size` bytes of mapped, writable memory behind it.
#[inline]
unsafe fn poke(p: *mut u8, size: usize, value: u64) {
    // SAFETY: as for `peek`.
    unsafe {
        match size {
            1 => p.write_volatile(value as u8),
            2 => p.cast::<u16>().write_unaligned(value as u16),
            4 => p.cast::<u32>().write_unaligned(value as u32),
            _ => p.cast::<u64>().write_unaligned(value),
        }
    }
}

/// Loads 1, 2, 4 or 8 bytes of linear memory.
#[inline]
pub fn load(v: &mut SoftVcpu, lin: u64, size: usize) -> Result<u64, Exception> {
    if let Some(p) = v.hit(lin, size, v.view(Priv::Current), false) {
        // SAFETY: a hit proves that `size` bytes at `p` are guest RAM.
        return Ok(unsafe { peek(p, size) });
    }
    v.read_uint(lin, size, Priv::Current)
}

/// Stores 1, 2, 4 or 8 bytes to linear memory.
#[inline]
pub fn store(v: &mut SoftVcpu, lin: u64, value: u64, size: usize) -> Result<(), Exception> {
    if let Some(p) = v.hit(lin, size, v.view(Priv::Current), true) {
        // SAFETY: a write hit proves that `size` bytes at `p` are guest RAM without duties.
        unsafe { poke(p, size, value) };
        return Ok(());
    }
    v.write_uint(lin, value, size, Priv::Current)
}

/// Compare-and-swap of any alignment: the value found, equal to `old` if the swap was done.
///
/// # Safety
/// `p` has `size` bytes of mapped, writable memory behind it.
unsafe fn compare_swap(p: *mut u8, size: usize, old: u64, new: u64) -> u64 {
    let mut a = old;
    // SAFETY: the caller's promise; LOCK CMPXCHG works at any alignment.
    unsafe {
        match size {
            1 => {
                asm!("lock cmpxchg byte ptr [{p}], {n}", p = in(reg) p, n = in(reg_byte) new as u8, inout("rax") a)
            }
            2 => {
                asm!("lock cmpxchg word ptr [{p}], {n:x}", p = in(reg) p, n = in(reg) new, inout("rax") a)
            }
            4 => {
                asm!("lock cmpxchg dword ptr [{p}], {n:e}", p = in(reg) p, n = in(reg) new, inout("rax") a)
            }
            _ => {
                asm!("lock cmpxchg qword ptr [{p}], {n}", p = in(reg) p, n = in(reg) new, inout("rax") a)
            }
        }
    }
    a & super::operand::size_mask(size)
}

/// Replaces the memory operand by `f` of it and returns the old value. Faults come before any
/// effect. `locked` makes it one atomic access for all vCPUs. `f` may run several times.
pub fn modify(
    v: &mut SoftVcpu,
    op: &Op,
    locked: bool,
    f: impl FnMut(u64) -> u64,
) -> Result<u64, Exception> {
    let lin = mem_lin(v, &op.i, op.size, SegAccess::Write)?;
    modify_at(v, lin, op.size, locked, f)
}

/// [`modify`] at a linear address.
pub fn modify_at(
    v: &mut SoftVcpu,
    lin: u64,
    size: usize,
    locked: bool,
    mut f: impl FnMut(u64) -> u64,
) -> Result<u64, Exception> {
    if let Some(p) = v.rmw_ptr(lin, size, Priv::Current)? {
        // SAFETY: rmw_ptr gives `size` bytes of guest RAM that may be written.
        let mut old = unsafe { peek(p, size) };
        if !locked {
            let new = f(old);
            // SAFETY: as above.
            unsafe { poke(p, size, new) };
            return Ok(old);
        }
        loop {
            let new = f(old);
            // SAFETY: as above.
            let found = unsafe { compare_swap(p, size, old, new) };
            if found == old {
                return Ok(old);
            }
            old = found;
        }
    }
    let mut slow = |v: &mut SoftVcpu| {
        let old = v.read_uint(lin, size, Priv::Current)?;
        let new = f(old);
        v.write_uint(lin, new, size, Priv::Current)?;
        Ok(old)
    };
    if locked { v.exclusive(slow) } else { slow(v) }
}

/// CMPXCHG16B: compares 16 bytes with `old` and replaces them by `new` if equal. Returns what was
/// there. Always atomic.
pub fn compare_swap_16(
    v: &mut SoftVcpu,
    lin: u64,
    old: u128,
    new: u128,
) -> Result<u128, Exception> {
    if let Some(p) = v.rmw_ptr(lin, 16, Priv::Current)? {
        let (mut lo, mut hi) = (old as u64, (old >> 64) as u64);
        // SAFETY: 16 bytes of guest RAM, aligned because the instruction demands it. RBX is the
        // compiler's, so it is exchanged around the instruction.
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "lock cmpxchg16b xmmword ptr [rdi]",
                "mov rbx, rsi",
                in("rdi") p,
                inout("rsi") new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") lo,
                inout("rdx") hi,
            );
        }
        return Ok(u128::from(hi) << 64 | u128::from(lo));
    }
    v.exclusive(|v| {
        let mut b = [0u8; 16];
        v.read_bytes(lin, &mut b, Priv::Current)?;
        let found = u128::from_le_bytes(b);
        let value = if found == old { new } else { found };
        v.write_bytes(lin, &value.to_le_bytes(), Priv::Current)?;
        Ok(found)
    })
}
