//! The features that a guest may be shown, by name: where their bits are, who must provide them,
//! and what they build on.
//!
//! A feature that is not in this table is never shown. That is how AMX, TSX, MPX, CET, protection
//! keys for supervisor pages, SGX, VMX, SVM, MONITOR, WAITPKG, user interrupts, performance
//! counters, RDPRU, FRED, LAM and all that are not known yet are hidden.
//!
//! Sources: Intel SDM Vol. 2A "CPUID"; AMD APM Vol. 3 appendix E.

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Who makes a feature work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The host's execution units, on either engine.
    Host,
    /// The software engine itself; the host's processor under KVM.
    Engine,
    /// Only KVM with a host that has it.
    Kvm,
    /// Only the software engine: says that a weakness of the silicon does not concern the guest.
    /// Under KVM the host must have it.
    Immunity,
}

/// One feature bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// As Linux names it in /proc/cpuinfo where it does.
    pub name: &'static str,
    /// CPUID leaf (EAX).
    pub leaf: u32,
    /// Sub-leaf (ECX).
    pub subleaf: u32,
    /// Output register.
    pub register: Register,
    /// Bit number.
    pub bit: u8,
    /// Who makes it work.
    pub provider: Provider,
}

use Provider::{Engine, Host, Immunity, Kvm};
use Register::{Eax, Ebx, Ecx, Edx};

const fn f(
    name: &'static str,
    (leaf, subleaf): (u32, u32),
    register: Register,
    bit: u8,
    provider: Provider,
) -> Feature {
    Feature {
        name,
        leaf,
        subleaf,
        register,
        bit,
        provider,
    }
}

const L1: (u32, u32) = (1, 0);
const L6: (u32, u32) = (6, 0);
const L7: (u32, u32) = (7, 0);
const L7_1: (u32, u32) = (7, 1);
const LD_1: (u32, u32) = (0xd, 1);
const X1: (u32, u32) = (0x8000_0001, 0);
const X7: (u32, u32) = (0x8000_0007, 0);
const X8: (u32, u32) = (0x8000_0008, 0);
const X21: (u32, u32) = (0x8000_0021, 0);

/// All of them, ascending by place.
pub const FEATURES: &[Feature] = &[
    f("sse3", L1, Ecx, 0, Host),
    f("pclmulqdq", L1, Ecx, 1, Host),
    f("ssse3", L1, Ecx, 9, Host),
    f("fma", L1, Ecx, 12, Host),
    f("cx16", L1, Ecx, 13, Engine),
    f("pcid", L1, Ecx, 17, Engine),
    f("sse4_1", L1, Ecx, 19, Host),
    f("sse4_2", L1, Ecx, 20, Host),
    f("x2apic", L1, Ecx, 21, Engine),
    f("movbe", L1, Ecx, 22, Host),
    f("popcnt", L1, Ecx, 23, Host),
    f("tsc_deadline_timer", L1, Ecx, 24, Engine),
    f("aes", L1, Ecx, 25, Host),
    f("xsave", L1, Ecx, 26, Engine),
    f("avx", L1, Ecx, 28, Host),
    f("f16c", L1, Ecx, 29, Host),
    f("rdrand", L1, Ecx, 30, Host),
    f("fpu", L1, Edx, 0, Engine),
    f("vme", L1, Edx, 1, Engine),
    f("de", L1, Edx, 2, Engine),
    f("pse", L1, Edx, 3, Engine),
    f("tsc", L1, Edx, 4, Engine),
    f("msr", L1, Edx, 5, Engine),
    f("pae", L1, Edx, 6, Engine),
    f("mce", L1, Edx, 7, Engine),
    f("cx8", L1, Edx, 8, Engine),
    f("apic", L1, Edx, 9, Engine),
    f("sep", L1, Edx, 11, Engine),
    f("mtrr", L1, Edx, 12, Engine),
    f("pge", L1, Edx, 13, Engine),
    f("mca", L1, Edx, 14, Engine),
    f("cmov", L1, Edx, 15, Engine),
    f("pat", L1, Edx, 16, Engine),
    f("pse36", L1, Edx, 17, Engine),
    f("clflush", L1, Edx, 19, Engine),
    f("mmx", L1, Edx, 23, Engine),
    f("fxsr", L1, Edx, 24, Engine),
    f("sse", L1, Edx, 25, Engine),
    f("sse2", L1, Edx, 26, Engine),
    f("arat", L6, Eax, 2, Engine),
    f("fsgsbase", L7, Ebx, 0, Engine),
    f("tsc_adjust", L7, Ebx, 1, Engine),
    f("bmi1", L7, Ebx, 3, Host),
    f("avx2", L7, Ebx, 5, Host),
    // x87 pointers are saved only on exceptions: how the host's x87 behaves, not a capability.
    f("fdp_excptn_only", L7, Ebx, 6, Host),
    f("smep", L7, Ebx, 7, Engine),
    f("bmi2", L7, Ebx, 8, Host),
    f("erms", L7, Ebx, 9, Engine),
    f("invpcid", L7, Ebx, 10, Engine),
    f("zero_fcs_fds", L7, Ebx, 13, Host),
    f("avx512f", L7, Ebx, 16, Host),
    f("avx512dq", L7, Ebx, 17, Host),
    f("rdseed", L7, Ebx, 18, Host),
    f("adx", L7, Ebx, 19, Host),
    f("smap", L7, Ebx, 20, Engine),
    f("avx512ifma", L7, Ebx, 21, Host),
    f("clflushopt", L7, Ebx, 23, Host),
    f("clwb", L7, Ebx, 24, Host),
    f("avx512cd", L7, Ebx, 28, Host),
    f("sha_ni", L7, Ebx, 29, Host),
    f("avx512bw", L7, Ebx, 30, Host),
    f("avx512vl", L7, Ebx, 31, Host),
    f("avx512vbmi", L7, Ecx, 1, Host),
    f("umip", L7, Ecx, 2, Engine),
    f("pku", L7, Ecx, 3, Kvm),
    f("avx512_vbmi2", L7, Ecx, 6, Host),
    f("gfni", L7, Ecx, 8, Host),
    f("vaes", L7, Ecx, 9, Host),
    f("vpclmulqdq", L7, Ecx, 10, Host),
    f("avx512_vnni", L7, Ecx, 11, Host),
    f("avx512_bitalg", L7, Ecx, 12, Host),
    f("avx512_vpopcntdq", L7, Ecx, 14, Host),
    f("rdpid", L7, Ecx, 22, Engine),
    f("fsrm", L7, Edx, 4, Engine),
    f("avx512_vp2intersect", L7, Edx, 8, Host),
    f("md_clear", L7, Edx, 10, Kvm),
    f("avx512_fp16", L7, Edx, 23, Host),
    f("spec_ctrl", L7, Edx, 26, Immunity),
    f("intel_stibp", L7, Edx, 27, Kvm),
    f("flush_l1d", L7, Edx, 28, Kvm),
    f("arch_capabilities", L7, Edx, 29, Immunity),
    f("spec_ctrl_ssbd", L7, Edx, 31, Kvm),
    f("avx_vnni", L7_1, Eax, 4, Host),
    f("avx512_bf16", L7_1, Eax, 5, Host),
    f("avx_ifma", L7_1, Eax, 23, Host),
    f("avx_vnni_int8", L7_1, Edx, 4, Host),
    f("avx_ne_convert", L7_1, Edx, 5, Host),
    f("xsaveopt", LD_1, Eax, 0, Engine),
    f("xsavec", LD_1, Eax, 1, Engine),
    f("xgetbv1", LD_1, Eax, 2, Engine),
    f("xsaves", LD_1, Eax, 3, Engine),
    f("lahf_lm", X1, Ecx, 0, Engine),
    f("abm", X1, Ecx, 5, Host),
    f("sse4a", X1, Ecx, 6, Host),
    f("3dnowprefetch", X1, Ecx, 8, Host),
    f("topoext", X1, Ecx, 22, Engine),
    f("syscall", X1, Edx, 11, Engine),
    f("nx", X1, Edx, 20, Engine),
    f("mmxext", X1, Edx, 22, Host),
    f("pdpe1gb", X1, Edx, 26, Engine),
    f("rdtscp", X1, Edx, 27, Engine),
    f("lm", X1, Edx, 29, Engine),
    f("invtsc", X7, Edx, 8, Engine),
    f("ibpb", X8, Ebx, 12, Kvm),
    f("ibrs", X8, Ebx, 14, Kvm),
    f("amd_stibp", X8, Ebx, 15, Kvm),
    f("stibp_always_on", X8, Ebx, 17, Kvm),
    f("amd_ssbd", X8, Ebx, 24, Kvm),
    f("virt_ssbd", X8, Ebx, 25, Kvm),
    f("amd_ssb_no", X8, Ebx, 26, Immunity),
    f("btc_no", X8, Ebx, 29, Immunity),
    f("no_nested_data_bp", X21, Eax, 0, Engine),
    f("lfence_rdtsc", X21, Eax, 2, Host),
    f("null_sel_clr_base", X21, Eax, 6, Engine),
    f("autoibrs", X21, Eax, 8, Immunity),
    f("sbpb", X21, Eax, 27, Kvm),
    f("ibpb_brtype", X21, Eax, 28, Kvm),
    f("srso_no", X21, Eax, 29, Immunity),
    f("tsa_sq_no", X21, Ecx, 1, Immunity),
    f("tsa_l1_no", X21, Ecx, 2, Immunity),
];

/// Features that need another one: (feature, what it builds on).
pub const REQUIRES: &[(&str, &str)] = &[
    ("sse2", "sse"),
    ("sse", "fxsr"),
    ("sse3", "sse2"),
    ("ssse3", "sse3"),
    ("sse4_1", "ssse3"),
    ("sse4_2", "sse4_1"),
    ("sse4a", "sse3"),
    ("aes", "sse2"),
    ("pclmulqdq", "sse2"),
    ("sha_ni", "sse2"),
    ("gfni", "sse2"),
    ("avx", "xsave"),
    ("avx", "sse4_2"),
    ("avx2", "avx"),
    ("fma", "avx"),
    ("f16c", "avx"),
    ("vaes", "avx"),
    ("vaes", "aes"),
    ("vpclmulqdq", "avx"),
    ("vpclmulqdq", "pclmulqdq"),
    ("avx_vnni", "avx2"),
    ("avx_ifma", "avx2"),
    ("avx_vnni_int8", "avx2"),
    ("avx_ne_convert", "avx2"),
    ("avx512f", "avx2"),
    ("avx512f", "fma"),
    ("avx512f", "f16c"),
    ("avx512dq", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512vbmi", "avx512bw"),
    ("avx512_vbmi2", "avx512bw"),
    ("avx512_vnni", "avx512f"),
    ("avx512_bitalg", "avx512bw"),
    ("avx512_vpopcntdq", "avx512f"),
    ("avx512_vp2intersect", "avx512f"),
    ("avx512_bf16", "avx512bw"),
    ("avx512_fp16", "avx512bw"),
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsavec"),
    ("pku", "xsave"),
    ("x2apic", "apic"),
    ("tsc_deadline_timer", "apic"),
    ("tsc_adjust", "tsc"),
    ("rdtscp", "tsc"),
    ("invtsc", "tsc"),
    ("lm", "pae"),
    ("lm", "nx"),
    ("lm", "syscall"),
    ("lm", "sse2"),
    ("lm", "cx8"),
    ("lm", "cmov"),
    ("lm", "pge"),
    ("nx", "pae"),
    ("pdpe1gb", "lm"),
    ("pcid", "lm"),
    ("invpcid", "pcid"),
    ("fsgsbase", "lm"),
    ("lahf_lm", "lm"),
    ("cx16", "lm"),
];

/// The feature of that name.
pub fn feature(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|f| f.name == name)
}

/// A set of [`FEATURES`], by position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet(u128);

// The set has one bit per feature.
const _: () = assert!(FEATURES.len() <= 128);

impl FeatureSet {
    /// True if it holds the feature.
    pub fn has(self, name: &str) -> bool {
        FEATURES
            .iter()
            .position(|f| f.name == name)
            .is_some_and(|n| self.0 >> n & 1 != 0)
    }
    /// Adds or takes away.
    pub fn set(&mut self, name: &str, on: bool) {
        if let Some(n) = FEATURES.iter().position(|f| f.name == name) {
            self.0 = self.0 & !(1 << n) | u128::from(on) << n;
        }
    }
    /// What it holds, in the order of the table.
    pub fn iter(self) -> impl Iterator<Item = &'static Feature> {
        FEATURES
            .iter()
            .enumerate()
            .filter(move |(n, _)| self.0 >> n & 1 != 0)
            .map(|(_, f)| f)
    }
    /// In both.
    pub fn and(self, other: FeatureSet) -> FeatureSet {
        FeatureSet(self.0 & other.0)
    }
    /// In this one only.
    pub fn without(self, other: FeatureSet) -> FeatureSet {
        FeatureSet(self.0 & !other.0)
    }
    /// Takes away, until nothing changes, what builds on something that is missing.
    pub fn drop_unsupported(&mut self) {
        loop {
            let before = *self;
            for (name, needs) in REQUIRES {
                if !self.has(needs) {
                    self.set(name, false);
                }
            }
            if *self == before {
                return;
            }
        }
    }
}

impl<'a> FromIterator<&'a str> for FeatureSet {
    fn from_iter<T: IntoIterator<Item = &'a str>>(names: T) -> FeatureSet {
        let mut s = FeatureSet::default();
        for n in names {
            s.set(n, true);
        }
        s
    }
}
