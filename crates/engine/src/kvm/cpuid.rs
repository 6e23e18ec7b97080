//! The CPUID table of one vCPU in the form KVM wants.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::{CpuidEntry, CpuidTable, EngineError};

/// Hypervisor leaves. Linux, Documentation/virt/kvm/x86/cpuid.rst.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const KVM_FEATURE_POLL_CONTROL: u32 = 1 << 12;
const KVM_FEATURE_CLOCKSOURCE_STABLE_BIT: u32 = 1 << 24;

/// `table` with the per-vCPU fields of vCPU `index` of `vcpus` and the hypervisor leaves.
///
/// Intel SDM Vol. 2A, CPUID: leaf 1 EBX, leaves 0BH and 1FH; AMD APM Vol. 3 appendix E:
/// 8000_001EH.
pub fn for_vcpu(table: &CpuidTable, index: u32, vcpus: u32, tsc_khz: u64) -> CpuidTable {
    let mut entries = Vec::with_capacity(table.entries.len() + 8);
    let core_shift = vcpus.next_power_of_two().trailing_zeros();
    for e in &table.entries {
        let mut e = *e;
        match e.leaf {
            1 => {
                e.ebx = (e.ebx & 0xffff) | (index & 0xff) << 24 | vcpus.min(255) << 16;
                // HTT says that EBX[23:16] is meaningful.
                if vcpus > 1 {
                    e.edx |= 1 << 28;
                } else {
                    e.edx &= !(1 << 28);
                }
            }
            0xb | 0x1f => continue,
            0x8000_001e => {
                e.eax = index;
                e.ebx = index & 0xff;
                e.ecx = 0;
            }
            _ => {}
        }
        entries.push(e);
    }
    for leaf in [0xb, 0x1f] {
        if table.entries.iter().any(|e| e.leaf == leaf) {
            let level = |subleaf, eax, ebx, kind: u32| CpuidEntry {
                leaf,
                subleaf,
                indexed: true,
                eax,
                ebx,
                ecx: subleaf | kind << 8,
                edx: index,
            };
            // One thread per core, all cores in one package.
            entries.push(level(0, 0, 1, 1));
            entries.push(level(1, core_shift, vcpus, 2));
            entries.push(level(2, 0, 0, 0));
        }
    }
    if !table.entries.iter().any(|e| e.leaf == HYPERVISOR_BASE) {
        entries.extend(hypervisor_leaves(tsc_khz));
    }
    CpuidTable { entries }
}

fn hypervisor_leaves(tsc_khz: u64) -> [CpuidEntry; 3] {
    let word = |b: &[u8; 4]| u32::from_le_bytes(*b);
    [
        CpuidEntry {
            leaf: HYPERVISOR_BASE,
            eax: HYPERVISOR_BASE + 0x10,
            ebx: word(b"KVMK"),
            ecx: word(b"VMKV"),
            edx: word(b"M\0\0\0"),
            ..CpuidEntry::default()
        },
        CpuidEntry {
            leaf: HYPERVISOR_BASE + 1,
            eax: KVM_FEATURE_CLOCKSOURCE2
                | KVM_FEATURE_POLL_CONTROL
                | KVM_FEATURE_CLOCKSOURCE_STABLE_BIT,
            ..CpuidEntry::default()
        },
        // Frequencies in kHz: TSC, and the 1 GHz bus that KVM's APIC timer counts.
        CpuidEntry {
            leaf: HYPERVISOR_BASE + 0x10,
            eax: u32::try_from(tsc_khz).unwrap_or(u32::MAX),
            ebx: 1_000_000,
            ..CpuidEntry::default()
        },
    ]
}

/// The structure of KVM_SET_CPUID2.
pub(super) fn to_kvm(table: &CpuidTable) -> Result<CpuId, EngineError> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .entries
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.leaf,
            index: if e.indexed { e.subleaf } else { 0 },
            flags: if e.indexed {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..kvm_cpuid_entry2::default()
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|e| EngineError::Unsupported(format!("too many CPUID leaves for KVM: {e:?}")))
}

/// What KVM can offer on this host, as a table: the upper bound of a guest's CPUID.
pub fn supported(kvm: &kvm_ioctls::Kvm) -> Result<CpuidTable, EngineError> {
    let list = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(super::os("read the CPUID leaves that KVM supports"))?;
    let entries = list
        .as_slice()
        .iter()
        .map(|e| CpuidEntry {
            leaf: e.function,
            subleaf: e.index,
            indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        })
        .collect();
    Ok(CpuidTable { entries })
}
