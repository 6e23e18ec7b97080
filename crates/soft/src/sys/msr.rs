//! RDMSR and WRMSR. Intel SDM Vol. 4 §2.1; AMD APM Vol. 2 appendix A.
//!
//! An MSR that is not here raises #GP(0), as on hardware: kernels probe for MSRs and handle that.

use pyrite_x86::bits::{cr0, efer, msr};
use pyrite_x86::{gpr, sreg};

use crate::apic;
use crate::exception::Exception;
use crate::sys::control::require_cpl0;
use crate::sys::cpuid::{Reg, feature, is_amd};
use crate::vcpu::SoftVcpu;

const GP: Exception = Exception::gp(0);

/// Memory-type MSRs of IA32_MTRRCAP: 8 variable ranges, fixed ranges, write-combining.
const MTRR_CAP: u64 = 8 | 1 << 8 | 1 << 10;
/// Bits of IA32_MISC_ENABLE that exist. SDM Vol. 4 table 2-2.
const MISC_ENABLE_MASK: u64 =
    1 | 1 << 3 | 1 << 7 | 3 << 11 | 1 << 16 | 1 << 18 | 3 << 22 | 1 << 34 | 1 << 38;
/// IA32_FLUSH_CMD.
const IA32_FLUSH_CMD: u32 = 0x10b;
/// IA32_MCG_CAP: banks.
const MCG_BANKS: u32 = 10;
const IA32_MC0_CTL: u32 = 0x400;
const IA32_MC_LAST: u32 = IA32_MC0_CTL + 4 * MCG_BANKS - 1;

/// AMD's MSRs that kernels use on processors that call themselves AMD. AMD APM Vol. 2 appendix A.
mod amd {
    pub const SYSCFG: u32 = 0xc001_0010;
    pub const HWCR: u32 = 0xc001_0015;
    pub const IORR_BASE0: u32 = 0xc001_0016;
    pub const IORR_MASK1: u32 = 0xc001_0019;
    pub const TOP_MEM: u32 = 0xc001_001a;
    pub const TOP_MEM2: u32 = 0xc001_001d;
    pub const NB_CFG: u32 = 0xc001_001f;
    pub const PATCH_LOADER: u32 = 0xc001_0020;
    pub const INT_PENDING: u32 = 0xc001_0055;
    pub const PSTATE_LIMIT: u32 = 0xc001_0061;
    pub const PSTATE0: u32 = 0xc001_0064;
    pub const PSTATE7: u32 = 0xc001_006b;
    pub const VM_CR: u32 = 0xc001_0114;
    pub const OSVW_ID_LENGTH: u32 = 0xc001_0140;
    pub const OSVW_STATUS: u32 = 0xc001_0141;
    pub const LS_CFG: u32 = 0xc001_1020;
    pub const IC_CFG: u32 = 0xc001_1021;
    pub const DC_CFG: u32 = 0xc001_1022;
    pub const BU_CFG2: u32 = 0xc001_102a;
    pub const DE_CFG: u32 = 0xc001_1029;
    pub const FP_CFG: u32 = 0xc001_1028;
    /// LFENCE is serialising.
    pub const DE_CFG_LFENCE: u64 = 1 << 1;
    /// TSC runs at P0 frequency.
    pub const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
}

/// RDMSR.
pub fn rdmsr(v: &mut SoftVcpu) -> Result<(), Exception> {
    require_cpl0(v)?;
    let index = v.frame.cpu.gpr[gpr::RCX] as u32;
    let Some(value) = read(v, index) else {
        tracing::debug!("RDMSR of unknown {index:#x} at {:#x}", v.frame.cpu.rip);
        return Err(GP);
    };
    v.frame.cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    v.frame.cpu.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

/// WRMSR.
pub fn wrmsr(v: &mut SoftVcpu) -> Result<(), Exception> {
    require_cpl0(v)?;
    let g = &v.frame.cpu.gpr;
    let index = g[gpr::RCX] as u32;
    let value = g[gpr::RAX] & 0xffff_ffff | g[gpr::RDX] << 32;
    let result = write(v, index, value);
    if result.is_err() {
        tracing::debug!(
            "WRMSR of {index:#x} <- {value:#x} refused at {:#x}",
            v.frame.cpu.rip
        );
    }
    result
}

/// Reads an MSR; `None` is #GP(0).
pub fn read(v: &mut SoftVcpu, index: u32) -> Option<u64> {
    if let Some(r) = apic::msr_read(&v.vm, v.index, index) {
        return r.ok();
    }
    let c = &v.frame.cpu;
    let m = &c.msrs;
    Some(match index {
        // P5_MC_ADDR and P5_MC_TYPE.
        0 | 1 => 0,
        msr::IA32_TSC => tsc(v),
        msr::IA32_PLATFORM_ID => 0,
        // EBL_CR_POWERON, core-frequency and bus-speed registers that old kernels look at.
        0x2a | 0xcd => 0,
        // EBC_FREQUENCY_ID and PERF_STATUS, of all processors as KVM has them: memory testers take
        // the bus speed from there, by the family alone, and have nobody to take the fault.
        0x2c => 1 << 24,
        0x198 => 1000 | 4 << 40,
        msr::IA32_FEATURE_CONTROL if !is_amd(v) => 1,
        msr::IA32_TSC_ADJUST if has_tsc_adjust(v) => m.tsc_adjust,
        msr::IA32_SPEC_CTRL if spec_ctrl_mask(v) != 0 => m.spec_ctrl,
        msr::IA32_BIOS_SIGN_ID => m.bios_sign_id,
        msr::IA32_MTRRCAP if has_mtrr(v) => MTRR_CAP,
        msr::IA32_ARCH_CAPABILITIES if feature(v, 7, Reg::Edx, 29) => {
            pyrite_x86::cpuid::SOFT_ARCH_CAPABILITIES
        }
        msr::IA32_SYSENTER_CS => m.sysenter_cs,
        msr::IA32_SYSENTER_ESP => m.sysenter_esp,
        msr::IA32_SYSENTER_EIP => m.sysenter_eip,
        msr::IA32_MCG_CAP => u64::from(MCG_BANKS) | 1 << 24,
        msr::IA32_MCG_STATUS => m.mcg_status,
        msr::IA32_MISC_ENABLE => m.misc_enable,
        msr::IA32_DEBUGCTL => m.debugctl,
        msr::IA32_MTRR_PHYSBASE0..=0x20f if has_mtrr(v) => {
            m.mtrr_var[(index - msr::IA32_MTRR_PHYSBASE0) as usize]
        }
        0x250..=0x26f if has_mtrr(v) => m.mtrr_fixed[fixed_mtrr(index)?],
        msr::IA32_PAT => m.pat,
        msr::IA32_MTRR_DEF_TYPE if has_mtrr(v) => m.mtrr_def_type,
        IA32_MC0_CTL..=IA32_MC_LAST => 0,
        msr::IA32_XSS if has_xss(v) => c.xss,
        msr::EFER => c.efer,
        msr::STAR => m.star,
        msr::LSTAR => m.lstar,
        msr::CSTAR => m.cstar,
        msr::SFMASK => m.sfmask,
        msr::FS_BASE => c.seg[sreg::FS].base,
        msr::GS_BASE => c.seg[sreg::GS].base,
        msr::KERNEL_GS_BASE => m.kernel_gs_base,
        msr::TSC_AUX if has_tsc_aux(v) => m.tsc_aux,
        msr::KVM_WALL_CLOCK_NEW | 0x11 if kvm(v, 0, 3, index == 0x11) => m.kvm_wall_clock,
        msr::KVM_SYSTEM_TIME_NEW | 0x12 if kvm(v, 0, 3, index == 0x12) => m.kvm_system_time,
        msr::KVM_POLL_CONTROL if kvm(v, 12, 12, false) => m.kvm_poll_control,
        0xc001_0000..=0xc001_1fff if is_amd(v) => return read_amd(v, index),
        _ => return None,
    })
}

fn read_amd(v: &SoftVcpu, index: u32) -> Option<u64> {
    Some(match index {
        // Performance counters that do not count, as on processors whose PMU is hidden.
        0xc001_0000..=0xc001_0007 => 0,
        amd::HWCR => amd::HWCR_TSC_FREQ_SEL,
        amd::DE_CFG => amd::DE_CFG_LFENCE,
        // OSVW: no erratum is known to apply.
        amd::OSVW_ID_LENGTH | amd::OSVW_STATUS if feature(v, 0x8000_0001, Reg::Ecx, 9) => 0,
        // SVM is disabled and locked, in case it is looked for.
        amd::VM_CR => 1 << 4 | 1 << 3,
        amd::SYSCFG
        | amd::IORR_BASE0..=amd::IORR_MASK1
        | amd::TOP_MEM
        | amd::TOP_MEM2
        | amd::NB_CFG
        | amd::INT_PENDING
        | amd::PSTATE_LIMIT
        | amd::PSTATE0..=amd::PSTATE7
        | amd::LS_CFG
        | amd::IC_CFG
        | amd::DC_CFG
        | amd::FP_CFG
        | amd::BU_CFG2 => 0,
        _ => return None,
    })
}

/// Writes an MSR with all checks.
pub fn write(v: &mut SoftVcpu, index: u32, value: u64) -> Result<(), Exception> {
    if index == msr::IA32_APIC_BASE {
        apic::set_apic_base(&v.vm, v.index, value).map_err(|()| GP)?;
        v.frame.cpu.msrs.apic_base = value;
        v.flush_tlb(false);
        return Ok(());
    }
    if let Some(r) = apic::msr_write(&v.vm, v.index, index, value) {
        v.irq_waiting = true;
        return r.map_err(|()| GP);
    }
    match index {
        msr::EFER => return write_efer(v, value),
        msr::IA32_TSC => {
            // A change of the TSC shows in TSC_ADJUST by as much. SDM Vol. 3B §17.17.3.
            let delta = value.wrapping_sub(tsc(v));
            set_tsc_adjust(v, v.frame.cpu.msrs.tsc_adjust.wrapping_add(delta));
            return Ok(());
        }
        msr::IA32_TSC_ADJUST if has_tsc_adjust(v) => {
            set_tsc_adjust(v, value);
            return Ok(());
        }
        msr::KVM_WALL_CLOCK_NEW | msr::KVM_SYSTEM_TIME_NEW | 0x11 | 0x12
            if kvm(v, 0, 3, index < 0x100) =>
        {
            // The first interface has the same registers at other numbers.
            let number = match index {
                0x11 => msr::KVM_WALL_CLOCK_NEW,
                0x12 => msr::KVM_SYSTEM_TIME_NEW,
                n => n,
            };
            return if crate::kvmclock::write_msr(v, number, value) {
                Ok(())
            } else {
                Err(GP)
            };
        }
        0x200..=0x2ff => return write_memory_type(v, index, value),
        0xc001_0000..=0xc001_1fff if is_amd(v) => return write_amd(v, index),
        _ => {}
    }
    let canonical = v.canonical(value);
    let fits32 = value >> 32 == 0;
    let (spec_mask, pred_mask) = (spec_ctrl_mask(v), pred_cmd_mask(v));
    let l1d_flush = feature(v, 7, Reg::Edx, 28);
    let poll = kvm(v, 12, 12, false);
    let (xss, aux, debugctl) = (has_xss(v), has_tsc_aux(v), debugctl_mask(v));
    let c = &mut v.frame.cpu;
    let m = &mut c.msrs;
    match index {
        0 | 1 | 0x2a if value == 0 => {}
        // A microcode update "succeeds" without changing the revision.
        msr::IA32_BIOS_UPDT_TRIG => {}
        msr::IA32_BIOS_SIGN_ID => {}
        msr::IA32_SPEC_CTRL if spec_mask != 0 && value & !spec_mask == 0 => m.spec_ctrl = value,
        msr::IA32_PRED_CMD if pred_mask != 0 && value & !pred_mask == 0 => {}
        IA32_FLUSH_CMD if l1d_flush && value & !1 == 0 => {}
        msr::IA32_SYSENTER_CS => m.sysenter_cs = value & 0xffff_ffff,
        msr::IA32_SYSENTER_ESP if canonical => m.sysenter_esp = value,
        msr::IA32_SYSENTER_EIP if canonical => m.sysenter_eip = value,
        msr::IA32_MCG_STATUS if value & !7 == 0 => m.mcg_status = value,
        msr::IA32_MISC_ENABLE if value & !MISC_ENABLE_MASK == 0 => m.misc_enable = value,
        msr::IA32_DEBUGCTL if value & !debugctl == 0 => m.debugctl = value,
        // MCi_CTL takes anything; the status registers take only 0 (SDM Vol. 3B §15.3.2.2).
        IA32_MC0_CTL..=IA32_MC_LAST if index & 3 == 0 || value == 0 => {}
        // No supervisor state component is supported.
        msr::IA32_XSS if xss && value == 0 => c.xss = value,
        msr::STAR => m.star = value,
        msr::LSTAR if canonical => m.lstar = value,
        msr::CSTAR if canonical => m.cstar = value,
        msr::SFMASK => m.sfmask = value & 0xffff_ffff,
        msr::FS_BASE if canonical => c.seg[sreg::FS].base = value,
        msr::GS_BASE if canonical => c.seg[sreg::GS].base = value,
        msr::KERNEL_GS_BASE if canonical => m.kernel_gs_base = value,
        msr::TSC_AUX if aux && fits32 => m.tsc_aux = value,
        msr::KVM_POLL_CONTROL if poll && value & !1 == 0 => m.kvm_poll_control = value,
        _ => return Err(GP),
    }
    Ok(())
}

fn write_amd(v: &SoftVcpu, index: u32) -> Result<(), Exception> {
    match index {
        amd::PATCH_LOADER => Ok(()),
        // What can be read is accepted and does nothing: chicken bits of hardware.
        _ if read_amd(v, index).is_some() && index != amd::VM_CR => Ok(()),
        _ => Err(GP),
    }
}

/// Intel SDM Vol. 3A §2.2.1; AMD APM Vol. 2 §3.1.7.
fn write_efer(v: &mut SoftVcpu, value: u64) -> Result<(), Exception> {
    let mut mask = 0;
    for (bit, efer_bit) in [(11, efer::SCE), (20, efer::NXE), (25, efer::FFXSR)] {
        if feature(v, 0x8000_0001, Reg::Edx, bit) {
            mask |= efer_bit;
        }
    }
    if feature(v, 0x8000_0001, Reg::Edx, 29) {
        mask |= efer::LME | efer::SCE;
    }
    // Translation cache extension: nothing is cached that it would keep.
    if feature(v, 0x8000_0001, Reg::Ecx, 17) {
        mask |= 1 << 15;
    }
    if feature(v, 0x8000_0021, Reg::Eax, 8) {
        // Plain storage: there is no prediction to restrict.
        mask |= efer::AUTOIBRS;
    }
    let c = &v.frame.cpu;
    let old = c.efer;
    // LMA is the processor's; writes to it are ignored.
    let new = value & !efer::LMA | old & efer::LMA;
    if value & !(mask | efer::LMA) != 0 {
        return Err(GP);
    }
    if (old ^ new) & efer::LME != 0 && c.cr0 & cr0::PG != 0 {
        return Err(GP);
    }
    v.frame.cpu.efer = new;
    if (old ^ new) & (efer::NXE | efer::LME) != 0 {
        v.flush_tlb(false);
    }
    Ok(())
}

/// Memory types that PAT and MTRR fields may hold. SDM Vol. 3A tables 11-8 and 11-10.
fn memory_type(t: u64, pat: bool) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6) || (pat && t == 7)
}

fn bytes_are_types(value: u64, pat: bool) -> bool {
    value
        .to_le_bytes()
        .into_iter()
        .all(|b| memory_type(u64::from(b), pat))
}

/// Index of a fixed-range MTRR in `Msrs::mtrr_fixed`.
fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        msr::IA32_MTRR_FIX64K_00000 => Some(0),
        0x258 | 0x259 => Some((index - 0x258) as usize + 1),
        0x268..=0x26f => Some((index - 0x268) as usize + 3),
        _ => None,
    }
}

/// MTRRs and PAT: checked and kept, without effect: guest memory is the host's write-back memory.
fn write_memory_type(v: &mut SoftVcpu, index: u32, value: u64) -> Result<(), Exception> {
    let physical = (1u64 << v.vm.maxphyaddr) - 1;
    let mtrr = has_mtrr(v);
    let m = &mut v.frame.cpu.msrs;
    match index {
        msr::IA32_PAT if bytes_are_types(value, true) => m.pat = value,
        _ if !mtrr => return Err(GP),
        msr::IA32_MTRR_DEF_TYPE if value & !0xcff == 0 && memory_type(value & 0xff, false) => {
            m.mtrr_def_type = value;
        }
        0x200..=0x20f => {
            let base = index & 1 == 0;
            let allowed = physical & !0xfff | if base { 0xff } else { 0x800 };
            if value & !allowed != 0 || (base && !memory_type(value & 0xff, false)) {
                return Err(GP);
            }
            m.mtrr_var[(index - 0x200) as usize] = value;
        }
        _ => {
            let n = fixed_mtrr(index).ok_or(GP)?;
            if !bytes_are_types(value, false) {
                return Err(GP);
            }
            m.mtrr_fixed[n] = value;
        }
    }
    Ok(())
}

/// The TSC of this vCPU.
pub fn tsc(v: &SoftVcpu) -> u64 {
    apic::guest_tsc(&v.vm).wrapping_add(v.frame.cpu.msrs.tsc_adjust)
}

fn set_tsc_adjust(v: &mut SoftVcpu, value: u64) {
    v.frame.cpu.msrs.tsc_adjust = value;
    v.shared().apic.set_tsc_adjust(value);
}

fn has_mtrr(v: &SoftVcpu) -> bool {
    feature(v, 1, Reg::Edx, 12)
}

fn has_tsc_adjust(v: &SoftVcpu) -> bool {
    feature(v, 7, Reg::Ebx, 1)
}

fn has_tsc_aux(v: &SoftVcpu) -> bool {
    feature(v, 0x8000_0001, Reg::Edx, 27) || feature(v, 7, Reg::Ecx, 22)
}

fn has_xss(v: &SoftVcpu) -> bool {
    super::cpuid::feature_at(v, 0xd, 1, Reg::Eax, 3)
}

/// Bits of IA32_SPEC_CTRL: IBRS, STIBP, SSBD. SDM Vol. 4 table 2-2; AMD 8000_0008H EBX.
fn spec_ctrl_mask(v: &SoftVcpu) -> u64 {
    let mut mask = 0;
    if feature(v, 7, Reg::Edx, 26) || feature(v, 0x8000_0008, Reg::Ebx, 14) {
        mask |= 1;
    }
    if feature(v, 7, Reg::Edx, 27) || feature(v, 0x8000_0008, Reg::Ebx, 15) {
        mask |= 2;
    }
    if feature(v, 7, Reg::Edx, 31) || feature(v, 0x8000_0008, Reg::Ebx, 24) {
        mask |= 4;
    }
    if mask != 0 && feature(v, 0x8000_0008, Reg::Ebx, 28) {
        mask |= 1 << 7;
    }
    mask
}

/// Bits of IA32_PRED_CMD: IBPB, SBPB.
fn pred_cmd_mask(v: &SoftVcpu) -> u64 {
    let ibpb = feature(v, 7, Reg::Edx, 26) || feature(v, 0x8000_0008, Reg::Ebx, 12);
    let sbpb = feature(v, 0x8000_0021, Reg::Eax, 27);
    u64::from(ibpb) | u64::from(sbpb) << 7
}

/// DEBUGCTL: LBR and BTF are accepted; branch records are not made.
fn debugctl_mask(v: &SoftVcpu) -> u64 {
    if is_amd(v) { 0x3f } else { 0x3 }
}

/// A KVM paravirtual feature: CPUID 4000_0001H EAX `new` (or bit `old` of the first interface).
fn kvm(v: &SoftVcpu, old: u32, new: u32, legacy_index: bool) -> bool {
    let bit = if legacy_index { old } else { new };
    feature(v, 0x4000_0001, Reg::Eax, bit)
}
