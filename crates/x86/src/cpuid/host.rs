//! What the host's processor says.

use super::models::Vendor;
use super::{CpuidEntry, CpuidTable};

/// The host's CPUID (or the part of it that KVM supports) and the frequency of its TSC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCpuid {
    /// Its leaves.
    pub table: CpuidTable,
    /// Frequency of the TSC that the guest will see, in kHz; 0 = unknown, the guest is not told.
    pub tsc_khz: u64,
}

/// Leaves that depend on ECX, and the highest sub-leaf worth reading.
const INDEXED: &[(u32, u32)] = &[(0x4, 7), (0x7, 2), (0xb, 2), (0xd, 18), (0x8000_001d, 7)];

impl HostCpuid {
    /// Executes CPUID on this processor.
    #[cfg(target_arch = "x86_64")]
    pub fn read(tsc_khz: u64) -> HostCpuid {
        use std::arch::x86_64::__cpuid_count;
        HostCpuid::read_with(tsc_khz, |leaf, subleaf| {
            let r = __cpuid_count(leaf, subleaf);
            [r.eax, r.ebx, r.ecx, r.edx]
        })
    }

    /// Reads all leaves of interest with `cpuid(leaf, subleaf)` = EAX, EBX, ECX, EDX.
    pub fn read_with(tsc_khz: u64, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> HostCpuid {
        let mut entries = Vec::new();
        for first in [0, 0x8000_0000] {
            // LIMIT: leaves beyond these are not used; a strange maximum costs nothing.
            let last = cpuid(first, 0)[0].clamp(first, first + 0x30);
            for leaf in first..=last {
                let subleaves = INDEXED.iter().find(|(l, _)| *l == leaf);
                for subleaf in 0..=subleaves.map_or(0, |(_, n)| *n) {
                    let [eax, ebx, ecx, edx] = cpuid(leaf, subleaf);
                    entries.push(CpuidEntry {
                        leaf,
                        subleaf,
                        indexed: subleaves.is_some(),
                        eax,
                        ebx,
                        ecx,
                        edx,
                    });
                }
            }
        }
        HostCpuid {
            table: CpuidTable { entries },
            tsc_khz,
        }
    }

    /// A register quadruple; zero for what the host does not have.
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        self.table.get(leaf, subleaf).copied().unwrap_or_default()
    }

    /// The host's vendor; AMD's licensees count as AMD, all others as Intel.
    pub fn vendor(&self) -> Vendor {
        match self.leaf(0, 0).ebx {
            // "Auth"enticAMD, "Hygo"nGenuine
            0x6874_7541 | 0x6f67_7948 => Vendor::Amd,
            _ => Vendor::Intel,
        }
    }
}
