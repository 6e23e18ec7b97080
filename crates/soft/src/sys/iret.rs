//! IRET. Intel SDM Vol. 2A, IRET; Vol. 3A §20.2, §20.3 for virtual-8086 mode.

use pyrite_x86::bits::{cr4, rflags};
use pyrite_x86::{Segment, gpr, sreg};

use crate::exception::Exception;
use crate::interp::stack::{read_stack, stack_mask};
use crate::sys::far::{self, check_return, leave_to_outer, set_code};
use crate::sys::seg::V86_ATTR;
use crate::sys::stack::set_sp;
use crate::sys::task;
use crate::vcpu::SoftVcpu;

/// Executes IRET with operands of `size` bytes; `next_rip` is where a nested task goes on.
pub fn iret(v: &mut SoftVcpu, size: usize, next_rip: u64) -> Result<(), Exception> {
    // NMIs are unblocked even if IRET faults. Intel SDM Vol. 3A §6.7.1 with Vol. 3C §26.3.
    v.frame.cpu.nmi_blocked = false;
    if v.v86() {
        v86(v, size)?;
    } else if v.real_or_v86() {
        real(v, size)?;
    } else {
        protected(v, size, next_rip)?;
    }
    Ok(())
}

/// Flags that every IRET and POPF writes.
const ALWAYS: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;

/// IP, CS and flags from the stack.
fn three(v: &mut SoftVcpu, size: usize) -> Result<(u64, u16, u64), Exception> {
    let step = size as u64;
    let rip = read_stack(v, 0, size)?;
    let cs = read_stack(v, step, size)? as u16;
    let flags = read_stack(v, 2 * step, size)?;
    Ok((rip, cs, flags))
}

fn write_flags(v: &mut SoftVcpu, value: u64, mask: u64) {
    let f = &mut v.frame.cpu.rflags;
    *f = *f & !mask | value & mask | rflags::FIXED1;
}

fn pop_real(v: &mut SoftVcpu, rip: u64, cs: u16, size: usize) {
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(3 * size as u64);
    let mask = stack_mask(v);
    v.load_cs_real(cs, rip);
    set_sp(v, sp, mask);
}

fn real(v: &mut SoftVcpu, size: usize) -> Result<(), Exception> {
    let (rip, cs, flags) = three(v, size)?;
    if rip > u64::from(v.frame.cpu.seg[sreg::CS].limit) {
        return Err(Exception::gp(0));
    }
    pop_real(v, rip, cs, size);
    let mut mask = ALWAYS | rflags::IF | rflags::IOPL;
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    write_flags(v, flags, mask);
    Ok(())
}

fn v86(v: &mut SoftVcpu, size: usize) -> Result<(), Exception> {
    if v.iopl() < 3 && (size != 2 || v.frame.cpu.cr4 & cr4::VME == 0) {
        return Err(Exception::gp(0));
    }
    let (rip, cs, flags) = three(v, size)?;
    if rip > 0xffff {
        return Err(Exception::gp(0));
    }
    if v.iopl() == 3 {
        pop_real(v, rip, cs, size);
        let mut mask = ALWAYS | rflags::IF;
        if size > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        write_flags(v, flags, mask);
        return Ok(());
    }
    let vip = v.frame.cpu.rflags & rflags::VIP != 0;
    if flags & rflags::TF != 0 || (vip && flags & rflags::IF != 0) {
        return Err(Exception::gp(0));
    }
    pop_real(v, rip, cs, size);
    // VIF takes the place of IF (bit 9 → bit 19).
    write_flags(v, flags, ALWAYS);
    write_flags(v, flags << 10, rflags::VIF);
    Ok(())
}

/// Flags that IRET at `cpl` may write in protected mode.
fn protected_mask(v: &SoftVcpu, cpl: u8, size: usize) -> u64 {
    let mut mask = ALWAYS;
    if cpl <= v.iopl() {
        mask |= rflags::IF;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
    }
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
        if cpl == 0 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    mask
}

fn protected(v: &mut SoftVcpu, size: usize, next_rip: u64) -> Result<(), Exception> {
    if v.frame.cpu.rflags & rflags::NT != 0 {
        if v.lma() {
            return Err(Exception::gp(0));
        }
        return task::back(v, next_rip);
    }
    let (rip, cs, flags) = three(v, size)?;
    let step = size as u64;
    let cpl = v.frame.cpu.cpl();
    if flags & rflags::VM != 0 && cpl == 0 && size == 4 && !v.lma() {
        return to_v86(v, rip, cs, flags);
    }
    // Which flags may change is decided by the level that executes IRET.
    let mask = protected_mask(v, cpl, size);
    let to = check_return(v, cs, rip)?;
    if v.long64() || to.cpl() > cpl {
        let sp = read_stack(v, 3 * step, size)?;
        let ss = read_stack(v, 4 * step, size)? as u16;
        if to.cpl() > cpl {
            leave_to_outer(v, &to, rip, ss, sp, 0)?;
        } else {
            let ss = far::check_return_stack(v, ss, &to)?;
            v.set_accessed(&to.descriptor)?;
            set_code(v, &to.descriptor, cs, to.cpl(), rip);
            v.frame.cpu.seg[sreg::SS] = ss;
            let mask = stack_mask(v);
            set_sp(v, sp, mask);
        }
    } else {
        v.set_accessed(&to.descriptor)?;
        let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(3 * step);
        let sp_mask = stack_mask(v);
        set_code(v, &to.descriptor, cs, to.cpl(), rip);
        set_sp(v, sp, sp_mask);
    }
    write_flags(v, flags, mask);
    Ok(())
}

/// Return to virtual-8086 mode from ring 0.
fn to_v86(v: &mut SoftVcpu, rip: u64, cs: u16, flags: u64) -> Result<(), Exception> {
    if rip > 0xffff {
        return Err(Exception::gp(0));
    }
    let sp = read_stack(v, 12, 4)?;
    let mut selectors = [0u16; 6];
    selectors[sreg::CS] = cs;
    let order = [sreg::SS, sreg::ES, sreg::DS, sreg::FS, sreg::GS];
    for (n, s) in order.into_iter().enumerate() {
        selectors[s] = read_stack(v, 16 + 4 * n as u64, 4)? as u16;
    }
    for (n, s) in selectors.into_iter().enumerate() {
        v.frame.cpu.seg[n] = Segment::real(s, V86_ATTR);
    }
    v.frame.cpu.rip = rip;
    v.frame.cpu.gpr[gpr::RSP] = sp;
    write_flags(v, flags, rflags::ALL);
    Ok(())
}
