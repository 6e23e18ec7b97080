//! CPU models as data.

/// Who makes the processor: decides the shape of several leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD (and compatible).
    Amd,
}

/// A named model: what any processor with these features looks like, whatever the host is.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// How it is asked for.
    pub name: &'static str,
    /// `None`: the host's, with its generic signature.
    pub vendor: Option<Vendor>,
    /// Family, model, stepping as software computes them; ignored if `vendor` is `None`.
    pub signature: (u32, u32, u32),
    /// Feature lists that make it up.
    pub features: &'static [&'static [&'static str]],
}

/// Signatures of models that follow the host's vendor. Both are server parts that guests know.
pub const GENERIC_INTEL: (u32, u32, u32) = (6, 0x55, 7);
/// See [`GENERIC_INTEL`].
pub const GENERIC_AMD: (u32, u32, u32) = (0x19, 0x01, 1);

/// What every model has: costs nothing and makes a virtual machine keep time well.
const PLATFORM: &[&str] = &[
    "x2apic",
    "tsc_deadline_timer",
    "tsc_adjust",
    "arat",
    "invtsc",
    "topoext",
    "fdp_excptn_only",
    "zero_fcs_fds",
    "lfence_rdtsc",
    "null_sel_clr_base",
    "no_nested_data_bp",
    "spec_ctrl",
    "arch_capabilities",
    "amd_ssb_no",
    "btc_no",
    "autoibrs",
    "srso_no",
    "tsa_sq_no",
    "tsa_l1_no",
];

/// x86-64 psABI baseline and what systems expect with it.
const V1: &[&str] = &[
    "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr", "pge",
    "mca", "cmov", "pat", "pse36", "clflush", "mmx", "fxsr", "sse", "sse2", "syscall", "nx", "lm",
];
/// x86-64-v2 of the psABI.
const V2: &[&str] = &[
    "cx16", "lahf_lm", "popcnt", "sse3", "ssse3", "sse4_1", "sse4_2",
];
/// x86-64-v3 of the psABI.
const V3: &[&str] = &[
    "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
];
/// x86-64-v4 of the psABI.
const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];
/// System features of the time of v2.
const SYSTEM_V2: &[&str] = &["rdtscp", "pdpe1gb"];
/// System features of the time of v3.
const SYSTEM_V3: &[&str] = &["pcid", "invpcid", "fsgsbase", "smep", "erms", "xsaveopt"];
/// System features of the time of v4.
const SYSTEM_V4: &[&str] = &["smap", "umip", "xsavec", "xgetbv1"];
const CRYPTO: &[&str] = &["aes", "pclmulqdq", "rdrand"];
const BROADWELL: &[&str] = &["adx", "rdseed", "smap", "3dnowprefetch"];
const SKYLAKE: &[&str] = &["clflushopt", "xsavec", "xgetbv1"];
const ICELAKE: &[&str] = &[
    "sha_ni",
    "umip",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "rdpid",
    "fsrm",
    "avx512ifma",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
];
const ZEN1: &[&str] = &[
    "aes",
    "pclmulqdq",
    "rdrand",
    "rdseed",
    "adx",
    "sha_ni",
    "clflushopt",
    "sse4a",
    "mmxext",
    "3dnowprefetch",
    "fsgsbase",
    "smep",
    "smap",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
];
const ZEN3: &[&str] = &[
    "clwb",
    "umip",
    "rdpid",
    "pcid",
    "invpcid",
    "erms",
    "fsrm",
    "vaes",
    "vpclmulqdq",
];
const ZEN4: &[&str] = &[
    "gfni",
    "avx512ifma",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "avx512_bf16",
];

const fn generic(name: &'static str, features: &'static [&'static [&'static str]]) -> Model {
    Model {
        name,
        vendor: None,
        signature: (0, 0, 0),
        features,
    }
}

/// All models but `host`, which is whatever the host has.
pub const MODELS: &[Model] = &[
    generic("x86-64", &[PLATFORM, V1]),
    generic("x86-64-v2", &[PLATFORM, V1, V2, SYSTEM_V2]),
    generic("x86-64-v3", &[PLATFORM, V1, V2, V3, SYSTEM_V2, SYSTEM_V3]),
    generic(
        "x86-64-v4",
        &[PLATFORM, V1, V2, V3, V4, SYSTEM_V2, SYSTEM_V3, SYSTEM_V4],
    ),
    generic(
        "qemu64",
        &[PLATFORM, V1, &["sse3", "cx16", "lahf_lm", "popcnt"]],
    ),
    Model {
        name: "Nehalem",
        vendor: Some(Vendor::Intel),
        signature: (6, 26, 3),
        features: &[PLATFORM, V1, V2, &["rdtscp"]],
    },
    Model {
        name: "Haswell",
        vendor: Some(Vendor::Intel),
        signature: (6, 60, 4),
        features: &[PLATFORM, V1, V2, V3, SYSTEM_V2, SYSTEM_V3, CRYPTO],
    },
    Model {
        name: "Skylake-Server",
        vendor: Some(Vendor::Intel),
        signature: (6, 85, 4),
        features: &[
            PLATFORM,
            V1,
            V2,
            V3,
            V4,
            SYSTEM_V2,
            SYSTEM_V3,
            CRYPTO,
            BROADWELL,
            SKYLAKE,
            &["clwb"],
        ],
    },
    Model {
        name: "Icelake-Server",
        vendor: Some(Vendor::Intel),
        signature: (6, 106, 6),
        features: &[
            PLATFORM,
            V1,
            V2,
            V3,
            V4,
            SYSTEM_V2,
            SYSTEM_V3,
            CRYPTO,
            BROADWELL,
            SKYLAKE,
            &["clwb"],
            ICELAKE,
        ],
    },
    Model {
        name: "EPYC",
        vendor: Some(Vendor::Amd),
        signature: (0x17, 1, 2),
        features: &[PLATFORM, V1, V2, V3, SYSTEM_V2, ZEN1],
    },
    Model {
        name: "EPYC-Milan",
        vendor: Some(Vendor::Amd),
        signature: (0x19, 1, 1),
        features: &[PLATFORM, V1, V2, V3, SYSTEM_V2, ZEN1, ZEN3],
    },
    Model {
        name: "EPYC-Genoa",
        vendor: Some(Vendor::Amd),
        signature: (0x19, 0x11, 1),
        features: &[PLATFORM, V1, V2, V3, V4, SYSTEM_V2, ZEN1, ZEN3, ZEN4],
    },
];

/// The model of that name, in any case.
pub fn model(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(name))
}

/// True for what is in every model for the sake of the platform; its absence is not worth a word.
pub fn is_platform(feature: &str) -> bool {
    PLATFORM.contains(&feature)
}
