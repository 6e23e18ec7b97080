//! CLI, STI, PUSHF, POPF: flags that depend on privilege. Intel SDM Vol. 2; Vol. 3A §20.3, §20.4.

use pyrite_x86::bits::{cr4, rflags};
use pyrite_x86::{InterruptShadow, gpr};

use crate::exception::Exception;
use crate::interp::stack;
use crate::vcpu::SoftVcpu;

/// Which flag CLI and STI act on.
enum Which {
    Real,
    Virtual,
}

/// Intel SDM Vol. 2A table 3-7 (CLI), Vol. 2B table 4-20 (STI).
fn which(v: &SoftVcpu) -> Result<Which, Exception> {
    let c = &v.frame.cpu;
    let (cpl, iopl) = (c.cpl(), v.iopl());
    if cpl <= iopl {
        return Ok(Which::Real);
    }
    let virt = if v.v86() {
        c.cr4 & cr4::VME != 0
    } else {
        cpl == 3 && c.cr4 & cr4::PVI != 0
    };
    if virt {
        Ok(Which::Virtual)
    } else {
        Err(Exception::gp(0))
    }
}

/// CLI.
pub fn cli(v: &mut SoftVcpu) -> Result<(), Exception> {
    match which(v)? {
        Which::Real => v.frame.cpu.rflags &= !rflags::IF,
        Which::Virtual => v.frame.cpu.rflags &= !rflags::VIF,
    }
    Ok(())
}

/// STI. The instruction that follows one that sets IF is still shielded.
pub fn sti(v: &mut SoftVcpu) -> Result<(), Exception> {
    match which(v)? {
        Which::Real => {
            if v.frame.cpu.rflags & rflags::IF == 0 {
                v.frame.cpu.rflags |= rflags::IF;
                v.frame.cpu.interrupt_shadow = InterruptShadow::Sti;
                v.irq_waiting = true;
            }
        }
        Which::Virtual => {
            if v.frame.cpu.rflags & rflags::VIP != 0 {
                return Err(Exception::gp(0));
            }
            v.frame.cpu.rflags |= rflags::VIF;
        }
    }
    Ok(())
}

/// PUSHF, PUSHFD, PUSHFQ.
pub fn pushf(v: &mut SoftVcpu, size: usize) -> Result<(), Exception> {
    let mut image = v.frame.cpu.rflags & !(rflags::VM | rflags::RF);
    if v.v86() && v.iopl() < 3 {
        if size != 2 || v.frame.cpu.cr4 & cr4::VME == 0 {
            return Err(Exception::gp(0));
        }
        let vif = image & rflags::VIF != 0;
        image = image & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
    }
    stack::push(v, image, size)
}

/// POPF, POPFD, POPFQ.
pub fn popf(v: &mut SoftVcpu, size: usize) -> Result<(), Exception> {
    let (cpl, iopl, v86) = (v.frame.cpu.cpl(), v.iopl(), v.v86());
    let limited = v86 && iopl < 3;
    if limited && (size != 2 || v.frame.cpu.cr4 & cr4::VME == 0) {
        return Err(Exception::gp(0));
    }
    let value = stack::read_stack(v, 0, size)?;
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    let mut new = value;
    if limited {
        let vip = v.frame.cpu.rflags & rflags::VIP != 0;
        if value & rflags::TF != 0 || (vip && value & rflags::IF != 0) {
            return Err(Exception::gp(0));
        }
        mask |= rflags::VIF;
        new &= !rflags::VIF;
        if value & rflags::IF != 0 {
            new |= rflags::VIF;
        }
    } else {
        if cpl <= iopl {
            mask |= rflags::IF;
        }
        if cpl == 0 && !v86 {
            mask |= rflags::IOPL;
        }
        if size > 2 {
            mask |= rflags::AC | rflags::ID | rflags::RF;
            new &= !rflags::RF;
        }
    }
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(size as u64);
    stack::set_sp(v, sp);
    let f = &mut v.frame.cpu.rflags;
    *f = *f & !mask | new & mask | rflags::FIXED1;
    if *f & rflags::IF != 0 {
        v.irq_waiting = true;
    }
    Ok(())
}
