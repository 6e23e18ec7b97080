//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS. Lean: translated code calls them directly.
//! Intel SDM Vol. 2B; AMD APM Vol. 3 for the legacy forms that only AMD has.

use pyrite_x86::bits::{cr0, efer, rflags};
use pyrite_x86::{Segment, gpr, sreg};

use crate::exception::Exception;
use crate::sys::control::require_cpl0;
use crate::sys::cpuid::is_amd;
use crate::vcpu::SoftVcpu;

/// Flat segments as these instructions load them: access rights without DPL.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const STACK: u32 = 0xc093;

fn flat(selector: u16, attr: u32, dpl: u32) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        attr: attr | dpl << 5,
        selector,
        reserved: [0; 3],
    }
}

/// SYSCALL; `next_rip` goes to RCX.
#[inline]
pub fn syscall(v: &mut SoftVcpu, next_rip: u64) -> Result<(), Exception> {
    let long64 = v.long64();
    if v.frame.cpu.efer & efer::SCE == 0 || (!long64 && !legacy_allowed(v)) {
        return Err(Exception::UD);
    }
    let lma = v.lma();
    let c = &mut v.frame.cpu;
    let selector = (c.msrs.star >> 32) as u16 & 0xfffc;
    c.gpr[gpr::RCX] = next_rip;
    if lma {
        c.gpr[gpr::R11] = c.rflags & !rflags::RF;
        c.rip = if long64 { c.msrs.lstar } else { c.msrs.cstar };
        c.rflags &= !(c.msrs.sfmask | rflags::RF);
        c.rflags |= rflags::FIXED1;
        c.seg[sreg::CS] = flat(selector, CODE64, 0);
    } else {
        c.rip = c.msrs.star & 0xffff_ffff;
        c.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        c.seg[sreg::CS] = flat(selector, CODE32, 0);
    }
    c.seg[sreg::SS] = flat(selector.wrapping_add(8), STACK, 0);
    Ok(())
}

/// Outside 64-bit mode only AMD has SYSCALL and SYSRET.
#[cold]
fn legacy_allowed(v: &SoftVcpu) -> bool {
    is_amd(v) && !v.real_or_v86()
}

/// SYSRET; `wide`: with REX.W, to 64-bit mode.
#[inline]
pub fn sysret(v: &mut SoftVcpu, wide: bool) -> Result<(), Exception> {
    let long64 = v.long64();
    if v.frame.cpu.efer & efer::SCE == 0 || (!long64 && !legacy_allowed(v)) {
        return Err(Exception::UD);
    }
    require_cpl0(v)?;
    let rcx = v.frame.cpu.gpr[gpr::RCX];
    if wide && !v.canonical(rcx) {
        return Err(Exception::gp(0));
    }
    let c = &mut v.frame.cpu;
    let base = (c.msrs.star >> 48) as u16;
    if wide {
        c.rip = rcx;
        c.seg[sreg::CS] = flat(base.wrapping_add(16) | 3, CODE64, 3);
    } else {
        c.rip = rcx & 0xffff_ffff;
        c.seg[sreg::CS] = flat(base | 3, CODE32, 3);
    }
    c.seg[sreg::SS] = flat(base.wrapping_add(8) | 3, STACK, 3);
    if long64 {
        // RF and VM are not loaded. Intel SDM Vol. 2B, SYSRET.
        c.rflags = c.gpr[gpr::R11] & 0x3c_7fd7 | rflags::FIXED1;
    } else {
        c.rflags |= rflags::IF;
    }
    Ok(())
}

/// SYSENTER.
pub fn sysenter(v: &mut SoftVcpu) -> Result<(), Exception> {
    let lma = v.lma();
    if lma && is_amd(v) {
        return Err(Exception::UD);
    }
    let c = &mut v.frame.cpu;
    let selector = c.msrs.sysenter_cs as u16 & 0xfffc;
    if c.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(Exception::gp(0));
    }
    c.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    let width = if lma { u64::MAX } else { 0xffff_ffff };
    c.gpr[gpr::RSP] = c.msrs.sysenter_esp & width;
    c.rip = c.msrs.sysenter_eip & width;
    c.seg[sreg::CS] = flat(selector, if lma { CODE64 } else { CODE32 }, 0);
    c.seg[sreg::SS] = flat(selector.wrapping_add(8), STACK, 0);
    Ok(())
}

/// SYSEXIT; `wide`: with REX.W, to 64-bit mode.
pub fn sysexit(v: &mut SoftVcpu, wide: bool) -> Result<(), Exception> {
    if v.lma() && is_amd(v) {
        return Err(Exception::UD);
    }
    let base = v.frame.cpu.msrs.sysenter_cs as u16 & 0xfffc;
    if base == 0 || v.frame.cpu.cr0 & cr0::PE == 0 {
        return Err(Exception::gp(0));
    }
    require_cpl0(v)?;
    let (rip, rsp) = (v.frame.cpu.gpr[gpr::RDX], v.frame.cpu.gpr[gpr::RCX]);
    if wide && !(v.canonical(rip) && v.canonical(rsp)) {
        return Err(Exception::gp(0));
    }
    let c = &mut v.frame.cpu;
    let (width, cs, attr) = if wide {
        (u64::MAX, base.wrapping_add(32), CODE64)
    } else {
        (0xffff_ffff, base.wrapping_add(16), CODE32)
    };
    c.rip = rip & width;
    c.gpr[gpr::RSP] = rsp & width;
    c.seg[sreg::CS] = flat(cs | 3, attr, 3);
    c.seg[sreg::SS] = flat(cs.wrapping_add(8) | 3, STACK, 3);
    Ok(())
}

/// SWAPGS.
#[inline]
pub fn swapgs(v: &mut SoftVcpu) -> Result<(), Exception> {
    if !v.long64() {
        return Err(Exception::UD);
    }
    require_cpl0(v)?;
    let c = &mut v.frame.cpu;
    std::mem::swap(&mut c.seg[sreg::GS].base, &mut c.msrs.kernel_gs_base);
    Ok(())
}
