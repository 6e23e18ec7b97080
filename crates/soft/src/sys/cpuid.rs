//! CPUID: the VM's table with what depends on the vCPU and on control registers filled in.
//! Intel SDM Vol. 2A, CPUID.

use pyrite_engine::CpuidEntry;
use pyrite_x86::bits::cr4;
use pyrite_x86::gpr;

use crate::sys::xsave;
use crate::vcpu::SoftVcpu;

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A feature bit of sub-leaf 0 of `leaf`.
pub fn feature(v: &SoftVcpu, leaf: u32, reg: Reg, bit: u32) -> bool {
    feature_at(v, leaf, 0, reg, bit)
}

/// A feature bit.
pub fn feature_at(v: &SoftVcpu, leaf: u32, subleaf: u32, reg: Reg, bit: u32) -> bool {
    v.vm.cpuid.get(leaf, subleaf).is_some_and(|e| {
        let r = match reg {
            Reg::Eax => e.eax,
            Reg::Ebx => e.ebx,
            Reg::Ecx => e.ecx,
            Reg::Edx => e.edx,
        };
        r >> bit & 1 != 0
    })
}

/// The processor calls itself AMD (or Hygon), which decides where the vendors differ.
pub fn is_amd(v: &SoftVcpu) -> bool {
    // "AuthenticAMD", "HygonGenuine": the EBX parts.
    v.vm.cpuid
        .get(0, 0)
        .is_some_and(|e| matches!(e.ebx, 0x6874_7541 | 0x6f67_7948))
}

/// Executes CPUID.
pub fn cpuid(v: &mut SoftVcpu) {
    let leaf = v.frame.cpu.gpr[gpr::RAX] as u32;
    let subleaf = v.frame.cpu.gpr[gpr::RCX] as u32;
    let e = lookup(v, leaf, subleaf);
    let g = &mut v.frame.cpu.gpr;
    g[gpr::RAX] = e.eax.into();
    g[gpr::RBX] = e.ebx.into();
    g[gpr::RCX] = e.ecx.into();
    g[gpr::RDX] = e.edx.into();
}

/// What this vCPU answers to a leaf now.
pub fn lookup(v: &SoftVcpu, leaf: u32, subleaf: u32) -> CpuidEntry {
    let mut leaf = leaf;
    if !is_amd(v) && leaf < 0x4000_0000 {
        // Above the maximum, Intel answers with the highest basic leaf.
        leaf = leaf.min(v.vm.cpuid.get(0, 0).map_or(0, |e| e.eax));
    }
    let mut e = match v.vm.cpuid.get(leaf, subleaf) {
        Some(e) => *e,
        None => CpuidEntry {
            leaf,
            subleaf,
            // Sub-leaves beyond the last topology level repeat ECX[7:0]. SDM Vol. 2A table 3-8.
            ecx: if matches!(leaf, 0xb | 0x1f) {
                subleaf & 0xff
            } else {
                0
            },
            ..CpuidEntry::default()
        },
    };
    let c = &v.frame.cpu;
    let flag = |on: bool, bit: u32| u32::from(on) << bit;
    match leaf {
        1 => {
            e.ebx = e.ebx & 0x00ff_ffff | v.index << 24;
            e.ecx = e.ecx & !(1 << 27) | flag(c.cr4 & cr4::OSXSAVE != 0, 27);
            // CPUID.1 EDX.APIC follows IA32_APIC_BASE.EN.
            if c.msrs.apic_base & 1 << 11 == 0 {
                e.edx &= !(1 << 9);
            }
        }
        7 if subleaf == 0 => {
            e.ecx = e.ecx & !(1 << 4) | flag(c.cr4 & cr4::PKE != 0, 4);
        }
        0xb | 0x1f if v.vm.cpuid.get(leaf, 0).is_some() => e.edx = v.index,
        0xd if subleaf == 0 => e.ebx = xsave::standard_size(v, c.xcr0),
        0xd if subleaf == 1 && e.eax & 0xa != 0 => {
            e.ebx = xsave::compacted_size(v, c.xcr0 | c.xss);
        }
        0x8000_001e if v.vm.cpuid.get(leaf, 0).is_some() => e.eax = v.index,
        _ => {}
    }
    e
}
