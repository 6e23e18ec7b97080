//! Which instructions the guest's CPUID announces.

use iced_x86::CpuidFeature as F;
use pyrite_engine::CpuidTable;

/// Where CPUID announces something.
enum Rule {
    /// Every processor of this engine has it.
    Always,
    /// Leaf, sub-leaf, register (0 = EAX … 3 = EDX), bit.
    Bit(u32, u32, u8, u8),
    /// Not an instruction set of this engine.
    Never,
}

/// Intel SDM Vol. 2A, CPUID; AMD APM Vol. 3 appendix E.
fn rule(f: F) -> Rule {
    use Rule::{Always, Bit, Never};
    const A: u8 = 0;
    const B: u8 = 1;
    const C: u8 = 2;
    const D: u8 = 3;
    match f {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64
        | F::PAUSE | F::MULTIBYTENOP | F::CPUID
        // NOPs where they are not announced.
        | F::PREFETCHW | F::PREFETCHWT1 | F::PREFETCHITI | F::CET_IBT | F::CET_SS
        | F::CLDEMOTE
        | F::INTEL8086_ONLY => Always,
        F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY => Bit(1, 0, D, 0),
        F::CX8 => Bit(1, 0, D, 8),
        F::CMOV => Bit(1, 0, D, 15),
        F::CLFSH => Bit(1, 0, D, 19),
        F::MMX => Bit(1, 0, D, 23),
        F::FXSR => Bit(1, 0, D, 24),
        F::SSE => Bit(1, 0, D, 25),
        F::SSE2 => Bit(1, 0, D, 26),
        F::SSE3 => Bit(1, 0, C, 0),
        F::PCLMULQDQ => Bit(1, 0, C, 1),
        F::SSSE3 => Bit(1, 0, C, 9),
        F::FMA => Bit(1, 0, C, 12),
        F::CMPXCHG16B => Bit(1, 0, C, 13),
        F::SSE4_1 => Bit(1, 0, C, 19),
        F::SSE4_2 => Bit(1, 0, C, 20),
        F::MOVBE => Bit(1, 0, C, 22),
        F::POPCNT => Bit(1, 0, C, 23),
        F::AES => Bit(1, 0, C, 25),
        F::AVX => Bit(1, 0, C, 28),
        F::F16C => Bit(1, 0, C, 29),
        F::RDRAND => Bit(1, 0, C, 30),
        F::BMI1 => Bit(7, 0, B, 3),
        F::AVX2 => Bit(7, 0, B, 5),
        F::BMI2 => Bit(7, 0, B, 8),
        F::AVX512F => Bit(7, 0, B, 16),
        F::AVX512DQ => Bit(7, 0, B, 17),
        F::RDSEED => Bit(7, 0, B, 18),
        F::ADX => Bit(7, 0, B, 19),
        F::AVX512_IFMA => Bit(7, 0, B, 21),
        F::CLFLUSHOPT => Bit(7, 0, B, 23),
        F::CLWB => Bit(7, 0, B, 24),
        F::AVX512CD => Bit(7, 0, B, 28),
        F::SHA => Bit(7, 0, B, 29),
        F::AVX512BW => Bit(7, 0, B, 30),
        F::AVX512VL => Bit(7, 0, B, 31),
        F::AVX512_VBMI => Bit(7, 0, C, 1),
        F::AVX512_VBMI2 => Bit(7, 0, C, 6),
        F::GFNI => Bit(7, 0, C, 8),
        F::VAES => Bit(7, 0, C, 9),
        F::VPCLMULQDQ => Bit(7, 0, C, 10),
        F::AVX512_VNNI => Bit(7, 0, C, 11),
        F::AVX512_BITALG => Bit(7, 0, C, 12),
        F::AVX512_VPOPCNTDQ => Bit(7, 0, C, 14),
        F::MOVDIRI => Bit(7, 0, C, 27),
        F::MOVDIR64B => Bit(7, 0, C, 28),
        F::AVX512_VP2INTERSECT => Bit(7, 0, D, 8),
        F::SERIALIZE => Bit(7, 0, D, 14),
        F::AVX512_FP16 => Bit(7, 0, D, 23),
        F::SHA512 => Bit(7, 1, A, 0),
        F::SM3 => Bit(7, 1, A, 1),
        F::SM4 => Bit(7, 1, A, 2),
        F::AVX_VNNI => Bit(7, 1, A, 4),
        F::AVX512_BF16 => Bit(7, 1, A, 5),
        F::AVX_IFMA => Bit(7, 1, A, 23),
        F::AVX_VNNI_INT8 => Bit(7, 1, D, 4),
        F::AVX_NE_CONVERT => Bit(7, 1, D, 5),
        F::AVX_VNNI_INT16 => Bit(7, 1, D, 10),
        F::LZCNT => Bit(0x8000_0001, 0, C, 5),
        F::SSE4A => Bit(0x8000_0001, 0, C, 6),
        F::XOP => Bit(0x8000_0001, 0, C, 11),
        F::FMA4 => Bit(0x8000_0001, 0, C, 16),
        F::TBM => Bit(0x8000_0001, 0, C, 21),
        F::D3NOWEXT => Bit(0x8000_0001, 0, D, 30),
        F::D3NOW => Bit(0x8000_0001, 0, D, 31),
        F::CLZERO => Bit(0x8000_0008, 0, B, 0),
        // Of the system side, which checks for itself; here for the translator.
        F::TSC => Bit(1, 0, D, 4),
        F::MSR => Bit(1, 0, D, 5),
        F::SEP => Bit(1, 0, D, 11),
        F::MONITOR => Bit(1, 0, C, 3),
        F::XSAVE => Bit(1, 0, C, 26),
        F::FSGSBASE => Bit(7, 0, B, 0),
        F::INVPCID => Bit(7, 0, B, 10),
        F::SMAP => Bit(7, 0, B, 20),
        F::PKU => Bit(7, 0, C, 3),
        F::RDPID => Bit(7, 0, C, 22),
        F::XSAVEOPT => Bit(0xd, 1, A, 0),
        F::XSAVEC => Bit(0xd, 1, A, 1),
        F::XSAVES => Bit(0xd, 1, A, 3),
        F::SYSCALL => Bit(0x8000_0001, 0, D, 11),
        F::RDTSCP => Bit(0x8000_0001, 0, D, 27),
        F::WBNOINVD => Bit(0x8000_0008, 0, B, 9),
        _ => Never,
    }
}

/// The set of announced features.
#[derive(Clone, Copy)]
pub struct Announced([u64; 4]);

impl Announced {
    /// Reads a CPUID table.
    pub fn new(table: &CpuidTable) -> Announced {
        let mut set = [0u64; 4];
        for f in F::values() {
            let has = match rule(f) {
                Rule::Always => true,
                Rule::Never => false,
                Rule::Bit(leaf, sub, reg, bit) => table.get(leaf, sub).is_some_and(|e| {
                    let r = [e.eax, e.ebx, e.ecx, e.edx][usize::from(reg)];
                    r >> bit & 1 != 0
                }),
            };
            let n = f as usize;
            if has && n < 256 {
                set[n / 64] |= 1 << (n % 64);
            }
        }
        Announced(set)
    }

    /// True if every one of `features` is announced.
    pub fn all(&self, features: &[F]) -> bool {
        features.iter().all(|&f| {
            let n = f as usize;
            n < 256 && self.0[n / 64] >> (n % 64) & 1 != 0
        })
    }
}
