//! Debug registers, single step, breakpoints. Intel SDM Vol. 3B chapter 17.

use pyrite_x86::bits::{cr4, rflags};
use pyrite_x86::{CpuState, InterruptShadow, sreg};

use crate::exception::Exception;
use crate::sys::event::dr6;
use crate::vcpu::SoftVcpu;

/// A breakpoint condition of DR7. Intel SDM Vol. 3B §17.2.4.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    Io,
    ReadWrite,
}

/// Enabled breakpoint `n`: its condition and length.
fn breakpoint(cpu: &CpuState, n: usize) -> Option<(Condition, u64)> {
    let dr7 = cpu.dr[7];
    if dr7 >> (2 * n) & 3 == 0 {
        return None;
    }
    let condition = match dr7 >> (16 + 4 * n) & 3 {
        0 => Condition::Execute,
        1 => Condition::Write,
        2 if cpu.cr4 & cr4::DE == 0 => return None,
        2 => Condition::Io,
        _ => Condition::ReadWrite,
    };
    let len = match dr7 >> (18 + 4 * n) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    };
    Some((condition, len))
}

/// B0-B3 of the breakpoints of one of the `conditions` that `len` bytes at `at` touch. The low
/// bits of a breakpoint's address are ignored up to its length.
fn hits(cpu: &CpuState, at: u64, len: usize, conditions: &[Condition]) -> u64 {
    let mut bits = 0;
    for n in 0..4 {
        let Some((condition, width)) = breakpoint(cpu, n) else {
            continue;
        };
        let first = cpu.dr[n] & !(width - 1);
        let touches = at.wrapping_sub(first) < width || first.wrapping_sub(at) < len as u64;
        if conditions.contains(&condition) && touches {
            bits |= 1 << n;
        }
    }
    bits
}

/// DR6 bits B0-B3 of the enabled data breakpoints that an access of `len` bytes at `lin` hits.
pub fn data_breakpoints(cpu: &CpuState, lin: u64, len: usize, write: bool) -> u64 {
    if write {
        hits(cpu, lin, len, &[Condition::Write, Condition::ReadWrite])
    } else {
        hits(cpu, lin, len, &[Condition::ReadWrite])
    }
}

/// DR6 bits B0-B3 of the enabled I/O breakpoints that an access to `port` hits (CR4.DE).
pub fn io_breakpoints(cpu: &CpuState, port: u16, len: usize) -> u64 {
    if cpu.dr[7] & 0xff == 0 {
        return 0;
    }
    hits(cpu, u64::from(port), len, &[Condition::Io])
}

/// True if instructions must be looked at one by one: TF, or a breakpoint is enabled.
#[inline]
pub fn active(cpu: &CpuState) -> bool {
    cpu.rflags & rflags::TF != 0 || cpu.dr[7] & 0xff != 0
}

/// Instruction breakpoints. Call before the fetch of the instruction at CS:RIP.
#[inline]
pub fn before_instruction(v: &SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.dr[7] & 0xff == 0 {
        return Ok(());
    }
    breakpoint_at_rip(v)
}

#[cold]
fn breakpoint_at_rip(v: &SoftVcpu) -> Result<(), Exception> {
    let c = &v.frame.cpu;
    if c.rflags & rflags::RF != 0 || c.interrupt_shadow == InterruptShadow::MovSs {
        return Ok(());
    }
    let lin = if v.long64() {
        c.rip
    } else {
        c.seg[sreg::CS].base.wrapping_add(c.rip) & 0xffff_ffff
    };
    match hits(c, lin, 1, &[Condition::Execute]) {
        0 => Ok(()),
        bits => Err(Exception::db(bits)),
    }
}

/// Debug traps of an instruction that has completed (RIP is past it). `single_step`: TF was set
/// when it began and it did not enter a handler that cleared it. After MOV SS and POP SS they wait
/// for the next instruction, except for the single step, which is lost.
#[inline]
pub fn after_instruction(v: &mut SoftVcpu, single_step: bool) -> Result<(), Exception> {
    if !single_step && v.pending_dr6 == 0 {
        return Ok(());
    }
    if v.frame.cpu.interrupt_shadow == InterruptShadow::MovSs {
        return Ok(());
    }
    let mut bits = std::mem::take(&mut v.pending_dr6);
    if single_step {
        bits |= dr6::BS;
    }
    if bits == 0 {
        return Ok(());
    }
    Err(Exception::db(bits))
}
