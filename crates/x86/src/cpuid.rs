//! CPUID policy: what a guest is told about its processor.
//!
//! A guest is shown a feature only if it is known by name ([`FEATURES`]), its provider really has
//! it on this host and engine, and everything it builds on is there too. See [`guest_cpuid`].
//!
//! # What differs per vCPU
//!
//! The table is common to all vCPUs. The engines fill in what is not, see [`CpuidTable::answer`]:
//!
//! - leaf 1: EBX 31:24 initial APIC id, ECX 27 OSXSAVE = CR4.OSXSAVE;
//! - leaf 7: ECX 4 OSPKE = CR4.PKE;
//! - leaf 0BH: EDX x2APIC id, ECX 7:0 the sub-leaf asked for;
//! - leaf 0DH: sub-leaf 0 EBX and sub-leaf 1 EBX, sizes for the current XCR0 (and IA32_XSS);
//! - leaf 8000_001EH: EAX APIC id, EBX 7:0 core id.

mod features;
mod host;
mod leaves;
mod models;

pub use features::{FEATURES, Feature, FeatureSet, Provider, REQUIRES, Register, feature};
pub use host::HostCpuid;
pub use models::{MODELS, Model, Vendor, model};

/// One CPUID leaf as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub struct CpuidEntry {
    pub leaf: u32,
    /// Sub-leaf; meaningful if `indexed`.
    pub subleaf: u32,
    /// The leaf depends on ECX.
    pub indexed: bool,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidEntry {
    /// One output register.
    pub fn register(&self, r: Register) -> u32 {
        match r {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }
    /// The same, to change it.
    pub fn register_mut(&mut self, r: Register) -> &mut u32 {
        match r {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// A CPUID table: leaves before per-vCPU fields (APIC id, topology) are filled in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    /// Entries, any order, at most one per (leaf, subleaf).
    pub entries: Vec<CpuidEntry>,
}

/// The state of a vCPU that CPUID depends on.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "register names")]
pub struct VcpuView {
    pub apic_id: u32,
    pub cr4: u64,
    pub xcr0: u64,
    pub xss: u64,
}

impl CpuidTable {
    /// The entry for a leaf and sub-leaf.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf))
    }

    /// True if the table shows the feature.
    pub fn has(&self, f: &Feature) -> bool {
        self.get(f.leaf, f.subleaf)
            .is_some_and(|e| e.register(f.register) >> f.bit & 1 != 0)
    }

    /// Says that physical addresses have at most this many bits (leaf 8000_0008H, EAX 7:0; Intel SDM
    /// Vol. 2A table 3-8). A guest that is told less than there is uses less.
    pub fn limit_physical_bits(&mut self, bits: u8) {
        for e in self.entries.iter_mut().filter(|e| e.leaf == 0x8000_0008) {
            e.eax = e.eax & !0xff | (e.eax & 0xff).min(u32::from(bits));
        }
    }

    /// What the CPUID instruction returns on a vCPU: the table with the fields of that vCPU.
    /// Leaves that do not exist read as zero.
    pub fn answer(&self, leaf: u32, subleaf: u32, v: &VcpuView) -> CpuidEntry {
        let mut e = self.get(leaf, subleaf).copied().unwrap_or(CpuidEntry {
            leaf,
            subleaf,
            ..CpuidEntry::default()
        });
        match leaf {
            1 => {
                e.ebx = e.ebx & 0x00ff_ffff | v.apic_id << 24;
                e.ecx =
                    e.ecx & !(1 << 27) | u32::from(v.cr4 & crate::bits::cr4::OSXSAVE != 0) << 27;
            }
            7 if subleaf == 0 => {
                let pke = v.cr4 & crate::bits::cr4::PKE != 0;
                e.ecx = e.ecx & !(1 << 4) | u32::from(pke) << 4;
            }
            0xb => {
                e.ecx = e.ecx & !0xff | subleaf & 0xff;
                e.edx = v.apic_id;
            }
            0xd if subleaf == 0 && e.eax != 0 => e.ebx = self.xsave_bytes(v.xcr0, false),
            0xd if subleaf == 1 && e.eax & 0b1010 != 0 => {
                e.ebx = self.xsave_bytes(v.xcr0 | v.xss, true);
            }
            0x8000_001e if e.ebx | e.ecx | e.eax != 0 || self.get(leaf, subleaf).is_some() => {
                e.eax = v.apic_id;
                e.ebx = e.ebx & !0xff | v.apic_id & 0xff;
            }
            _ => {}
        }
        e
    }

    /// Bytes of the XSAVE area for the components in `bits`. Intel SDM Vol. 1 §13.4.3.
    pub fn xsave_bytes(&self, bits: u64, compacted: bool) -> u32 {
        let mut end = 576;
        for n in 2..63 {
            if bits >> n & 1 == 0 {
                continue;
            }
            let Some(c) = self.get(0xd, n) else { continue };
            if c.eax == 0 {
                continue;
            }
            if compacted {
                if c.ecx & 2 != 0 {
                    end = u32::next_multiple_of(end, 64);
                }
                end += c.eax;
            } else {
                end = end.max(c.ebx + c.eax);
            }
        }
        end
    }
}

/// Which engine the guest runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// Software.
    Soft,
    /// KVM.
    Kvm,
}

/// IA32_ARCH_CAPABILITIES of the software engine on processors of Intel's kind.
///
/// RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO. A guest's
/// mitigations are instruction sequences for silicon; they would do nothing for translated code
/// but slow it down. What protects the host is that the engine's own process is the boundary.
pub const SOFT_ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// What became of a model specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestCpuid {
    /// What the guest sees.
    pub table: CpuidTable,
    /// Features of the model that this host and engine do not have, by name.
    pub dropped: Vec<&'static str>,
    /// Everything that is shown, by name.
    pub features: Vec<&'static str>,
}

/// Why there is no such processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuidError {
    /// No such model.
    UnknownModel(String),
    /// No such feature.
    UnknownFeature(String),
    /// A modifier that is neither `+name` nor `-name`.
    BadModifier(String),
    /// Features that were asked for with `+` and that this host and engine do not have.
    Unavailable(Vec<&'static str>),
    /// A feature asked for with `+` needs one that is missing from the model or was taken away.
    MissingRequirement {
        /// What was asked for.
        feature: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// Not 1 to 255 vCPUs.
    BadCount(u32),
}

impl std::fmt::Display for CpuidError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CpuidError::UnknownModel(name) => {
                let all: Vec<_> = MODELS.iter().map(|m| m.name).collect();
                write!(
                    f,
                    "unknown CPU model {name:?}; there are host, {}",
                    all.join(", ")
                )
            }
            CpuidError::UnknownFeature(name) => {
                let all: Vec<_> = FEATURES.iter().map(|f| f.name).collect();
                write!(
                    f,
                    "unknown CPU feature {name:?}; there are {}",
                    all.join(", ")
                )
            }
            CpuidError::BadModifier(text) => {
                write!(f, "CPU modifier {text:?} must be +feature or -feature")
            }
            CpuidError::Unavailable(names) => {
                write!(
                    f,
                    "this host cannot provide the CPU features {}",
                    names.join(", ")
                )
            }
            CpuidError::MissingRequirement { feature, needs } => {
                write!(f, "CPU feature {feature} needs {needs}")
            }
            CpuidError::BadCount(n) => write!(f, "{n} vCPUs are not between 1 and 255"),
        }
    }
}

impl std::error::Error for CpuidError {}

/// A parsed specification: `model[,+feature|,-feature]…`.
struct Spec {
    model: Option<&'static Model>,
    add: FeatureSet,
    remove: FeatureSet,
}

fn parse(spec: &str) -> Result<Spec, CpuidError> {
    let mut parts = spec.split(',').map(str::trim);
    let name = parts.next().unwrap_or_default();
    let model = if name.eq_ignore_ascii_case("host") {
        None
    } else {
        Some(model(name).ok_or_else(|| CpuidError::UnknownModel(name.to_owned()))?)
    };
    let mut s = Spec {
        model,
        add: FeatureSet::default(),
        remove: FeatureSet::default(),
    };
    for part in parts {
        let (on, name) = match (part.strip_prefix('+'), part.strip_prefix('-')) {
            (Some(n), _) => (true, n),
            (_, Some(n)) => (false, n),
            _ => return Err(CpuidError::BadModifier(part.to_owned())),
        };
        // Linux writes some names with underscores, QEMU with hyphens.
        let wanted = name.replace('-', "_");
        let f = feature(&wanted).ok_or_else(|| CpuidError::UnknownFeature(name.to_owned()))?;
        // The last word about a feature counts.
        s.add.set(f.name, on);
        s.remove.set(f.name, !on);
    }
    Ok(s)
}

/// True if processors of this vendor can have the feature at all.
fn fits_vendor(f: &Feature, vendor: Vendor) -> bool {
    let amd_only = matches!(f.leaf, 0x8000_0008 | 0x8000_0021)
        || matches!(f.name, "topoext" | "sse4a" | "mmxext");
    let intel_only = f.leaf == 7 && f.register == Register::Edx && f.bit >= 26;
    match vendor {
        Vendor::Intel => !amd_only,
        Vendor::Amd => !intel_only,
    }
}

/// What this host and engine can provide to a guest of that vendor.
pub fn available(host: &HostCpuid, engine: EngineKind, vendor: Vendor) -> FeatureSet {
    let mut set: FeatureSet = FEATURES
        .iter()
        .filter(|f| fits_vendor(f, vendor))
        .filter(|f| {
            let in_host = host.table.has(f);
            match (engine, f.provider) {
                (EngineKind::Kvm, _) | (EngineKind::Soft, Provider::Host) => in_host,
                (EngineKind::Soft, Provider::Engine | Provider::Immunity) => true,
                (EngineKind::Soft, Provider::Kvm) => false,
            }
        })
        .map(|f| f.name)
        .collect();
    set.drop_unsupported();
    set
}

/// Makes the CPUID table of a guest with `vcpus` processors from a specification such as
/// `host`, `x86-64-v3` or `host,-avx512f,+sha_ni`.
///
/// `host.table` is what CPUID says here, or, for [`EngineKind::Kvm`], what KVM supports.
/// Features of a model that are not available are left out and listed; features asked for with
/// `+` that are not available are an error.
pub fn guest_cpuid(
    spec: &str,
    host: &HostCpuid,
    engine: EngineKind,
    vcpus: u32,
) -> Result<GuestCpuid, CpuidError> {
    // LIMIT: xAPIC ids, and with them all that leaf 1 can express, end at 254.
    if !(1..=255).contains(&vcpus) {
        return Err(CpuidError::BadCount(vcpus));
    }
    let spec = parse(spec)?;
    let vendor = spec.model.and_then(|m| m.vendor).unwrap_or(host.vendor());
    let available = available(host, engine, vendor);
    let wanted: FeatureSet = match spec.model {
        None => available,
        Some(m) => m.features.iter().flat_map(|l| l.iter().copied()).collect(),
    };
    let impossible = spec.add.without(available);
    if impossible != FeatureSet::default() {
        return Err(CpuidError::Unavailable(
            impossible.iter().map(|f| f.name).collect(),
        ));
    }
    let mut shown = wanted.and(available);
    for f in spec.add.iter() {
        shown.set(f.name, true);
    }
    shown = shown.without(spec.remove);
    for (name, needs) in REQUIRES {
        if spec.add.has(name) && !shown.has(needs) {
            return Err(CpuidError::MissingRequirement {
                feature: name,
                needs,
            });
        }
    }
    shown.drop_unsupported();
    let dropped = wanted
        .without(shown)
        .without(spec.remove)
        .iter()
        .filter(|f| {
            fits_vendor(f, vendor) && !available.has(f.name) && !models::is_platform(f.name)
        })
        .map(|f| f.name)
        .collect();
    let table = leaves::build(&leaves::Blueprint {
        host,
        engine,
        vendor,
        model: spec.model,
        features: shown,
        vcpus,
    });
    Ok(GuestCpuid {
        table,
        dropped,
        features: shown.iter().map(|f| f.name).collect(),
    })
}

#[cfg(test)]
mod tests;
