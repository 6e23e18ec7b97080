//! What the stubs call while translated code runs: soft-TLB misses, instructions that the
//! interpreter does in the middle of a block.

// UNSAFETY: called from emitted code with the address of the frame of the vCPU that runs.
#![allow(unsafe_code, reason = "called by translated code")]

use pyrite_mem::PAGE_SIZE;
use pyrite_x86::bits::rflags;

use super::layout::{JumpEntry, jump_slot, jump_slot2, reason};
use super::{
    flags_from_lahf, flags_to_lahf, locate, mode, mode_of, run_loop_wanted, split_code, stubs,
};
use crate::frame::{Frame, View};
use crate::interp;
use crate::mmu::Priv;
use crate::vcpu::SoftVcpu;

/// Called by the slow stub on a soft-TLB miss. `bits` and `size` are those of the access, `retry` is
/// the host address of its check, `done` that of what follows. 0 = try again, 1 = leave translated
/// code, 2 = the operand was copied to `FrameArea::split`: go on at `FrameArea::split_resume`.
pub unsafe extern "sysv64" fn slow_memory(
    frame: *mut Frame,
    lin: u64,
    size: u32,
    bits: u32,
    retry: u64,
    done: u64,
) -> u32 {
    // SAFETY: `run` stored the vCPU's address and does not touch it while translated code runs.
    let v = unsafe { &mut *((*frame).xlate.vcpu as *mut SoftVcpu) };
    v.xlate.stats.slow_memory += 1;
    let size = size as usize;
    let write = bits & u32::from(stubs::WRITE) != 0;
    let view = view_of(bits);
    // A non-canonical address and every fault are left to the interpreter, which knows the exact
    // exception of the instruction.
    if (!v.long64() || v.canonical(lin)) && v.refill(lin, size, write, view) == Ok(true) {
        return 0;
    }
    if !write && v.copy_split(lin, size) {
        v.frame.xlate.split_resume = done;
        return 2;
    }
    if bits & u32::from(stubs::SPLITTABLE) != 0
        && v.split_store(lin, size, view)
        && let Some(copy) = split_code(v, done)
    {
        v.frame.xlate.split_resume = copy;
        return 2;
    }
    v.frame.hot.reason = reason::INTERPRET;
    if let Err(trap) = locate(v, retry) {
        v.frame.hot.reason = reason::STEPPED;
        v.xlate.trap = Some(trap);
    }
    1
}

/// Called by the run stub: makes the soft TLB able to serve a run of accesses, if that changes nothing
/// that the guest can see but accessed flags: pages that must become dirty are left to the accesses
/// themselves. 0 = it cannot.
pub unsafe extern "sysv64" fn refill_run(frame: *mut Frame, lin: u64, span: u32, bits: u32) -> u32 {
    // SAFETY: as in `slow_memory`.
    let v = unsafe { &mut *((*frame).xlate.vcpu as *mut SoftVcpu) };
    v.xlate.stats.slow_memory += 1;
    let view = view_of(bits);
    let write = bits & u32::from(stubs::WRITE) != 0;
    let refilled = (!v.long64() || v.canonical(lin))
        && v.refill(lin, span as usize, false, view) == Ok(true)
        && v.hit(lin, span as usize, view, write).is_some();
    u32::from(refilled)
}

/// The view in a stub's [`stubs::bits`].
fn view_of(bits: u32) -> View {
    match bits >> stubs::VIEW_SHIFT & 3 {
        0 => View::Supervisor,
        1 => View::SupervisorSmap,
        _ => View::User,
    }
}

impl SoftVcpu {
    /// Copies an operand that lies in two pages to `FrameArea::split`, at the same alignment. False
    /// if it is in one page (and so not plain memory), or faults.
    fn copy_split(&mut self, lin: u64, size: usize) -> bool {
        let crosses = (lin & (PAGE_SIZE - 1)) as usize + size > PAGE_SIZE as usize;
        let last = lin.wrapping_add(size as u64 - 1);
        let canonical = !self.long64() || (self.canonical(lin) && self.canonical(last));
        let mut bytes = [0u8; 64];
        let Some(bytes) = bytes.get_mut(..size) else {
            return false;
        };
        // A breakpoint stops right behind the instruction: the interpreter's.
        let watched = self.has_data_breakpoint(lin) || self.has_data_breakpoint(last);
        if !crosses || !canonical || watched || self.read_bytes(lin, bytes, Priv::Current).is_err()
        {
            return false;
        }
        let at = (lin & 63) as usize;
        let split = &mut self.frame.xlate.split.0;
        split[at..at + size].copy_from_slice(bytes);
        let address = &raw const split[at] as u64;
        self.frame.xlate.split_at = address;
        true
    }
}

impl SoftVcpu {
    /// Copies an operand that lies in two pages, and is to be stored to, to `FrameArea::split`, and
    /// notes where its parts belong. False if it is in one page, not plain memory, or faults.
    fn split_store(&mut self, lin: u64, size: usize, view: View) -> bool {
        let first = (PAGE_SIZE - (lin & (PAGE_SIZE - 1))) as usize;
        let next = lin.wrapping_add(first as u64);
        let canonical = !self.long64() || (self.canonical(lin) && self.canonical(next));
        let wraps = !self.long64() && next >> 32 != 0;
        if first >= size || size > 64 || !canonical || wraps {
            return false;
        }
        let rest = size - first;
        if self.refill(next, rest, true, view) != Ok(true)
            || self.refill(lin, first, true, view) != Ok(true)
        {
            return false;
        }
        let (Some(p1), Some(p2)) = (
            self.hit(lin, first, view, true),
            self.hit(next, rest, view, true),
        ) else {
            return false;
        };
        let x = &mut self.frame.xlate;
        let at = (lin & 63) as usize;
        let copy = &mut x.split.0[at..at + size];
        // SAFETY: hits prove that both parts are in pages of guest RAM, which are not the frame.
        unsafe {
            std::ptr::copy_nonoverlapping(p1, copy.as_mut_ptr(), first);
            std::ptr::copy_nonoverlapping(p2, copy[first..].as_mut_ptr(), rest);
        }
        x.split_at = copy.as_ptr() as u64;
        x.split_to = [p1 as u64, first as u64, p2 as u64, rest as u64];
        true
    }
}

/// Called by the step stub: interprets the instruction at RIP. 0 = the block goes on, 1 = leave.
pub unsafe extern "sysv64" fn step_in_place(frame: *mut Frame) -> u32 {
    // SAFETY: as in `slow_memory`.
    let v = unsafe { &mut *((*frame).xlate.vcpu as *mut SoftVcpu) };
    v.xlate.stats.interpreted += 1;
    let flags = flags_from_lahf(v.frame.hot.flags);
    v.frame.cpu.rflags = (v.frame.cpu.rflags & !rflags::ARITH) | flags;
    let outcome = interp::step(v);
    v.frame.hot.flags = flags_to_lahf(v.frame.cpu.rflags);
    v.frame.xlate.irq_waiting = u32::from(v.irq_waiting);
    let goes_on = outcome.is_ok()
        && v.frame.cpu.rip == v.frame.xlate.expected
        && !run_loop_wanted(v)
        && mode_of(v) == Some(v.frame.xlate.mode);
    if let Err(trap) = outcome {
        v.xlate.trap = Some(trap);
    }
    if goes_on {
        return 0;
    }
    v.frame.hot.reason = reason::STEPPED;
    1
}

/// Called by the step-and-jump stub: interprets the instruction at RIP, which goes elsewhere or
/// changes the mode. The host address at which to go on, 0 = leave.
pub unsafe extern "sysv64" fn step_and_jump(frame: *mut Frame) -> u64 {
    // SAFETY: as in `slow_memory`.
    let v = unsafe { &mut *((*frame).xlate.vcpu as *mut SoftVcpu) };
    v.xlate.stats.interpreted += 1;
    let flags = flags_from_lahf(v.frame.hot.flags);
    v.frame.cpu.rflags = (v.frame.cpu.rflags & !rflags::ARITH) | flags;
    let outcome = interp::step(v);
    v.frame.hot.flags = flags_to_lahf(v.frame.cpu.rflags);
    v.frame.xlate.irq_waiting = u32::from(v.irq_waiting);
    v.frame.hot.reason = reason::STEPPED;
    if let Err(trap) = outcome {
        v.xlate.trap = Some(trap);
        return 0;
    }
    if run_loop_wanted(v) {
        return 0;
    }
    let Some(m) = mode_of(v) else { return 0 };
    if v.frame.xlate.direct != 0 && m & mode::VIEW == View::User as u32 {
        return 0;
    }
    if v.xlate.units != m & mode::UNITS {
        return 0;
    }
    let rip = v.frame.cpu.rip;
    let (frame, view) = (&v.frame.xlate, (m & mode::VIEW) as usize);
    let to = frame.jump_cache[view][jump_slot(rip)];
    if to != frame.stub_miss[view] {
        return to;
    }
    let JumpEntry { tag, host } = frame.jump_cache2[jump_slot2(rip)];
    if tag == JumpEntry::tag(rip, view) {
        host
    } else {
        0
    }
}
