//! The leaves of a guest's CPUID table, made from its features.

use super::features::{FeatureSet, Register};
use super::host::HostCpuid;
use super::models::{GENERIC_AMD, GENERIC_INTEL, Model, Vendor};
use super::{CpuidEntry, CpuidTable, EngineKind};

/// What to build from.
pub struct Blueprint<'a> {
    pub host: &'a HostCpuid,
    pub engine: EngineKind,
    pub vendor: Vendor,
    /// `None`: the host's own.
    pub model: Option<&'static Model>,
    pub features: FeatureSet,
    pub vcpus: u32,
}

/// Frequency of the APIC timer before its divider, in kHz: both engines' APICs run at 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Widest guest-physical address that is offered.
const PHYSICAL_BITS_MAX: u32 = 46;

/// One cache, in the encoding that leaf 4 and leaf 8000_001DH share.
#[derive(Clone, Copy, Debug)]
struct Cache {
    level: u32,
    /// 1 data, 2 instruction, 3 unified.
    kind: u32,
    ways: u32,
    line: u32,
    sets: u32,
    /// EDX: write-back invalidate, inclusive, complex indexing.
    flags: u32,
}

impl Cache {
    fn bytes(self) -> u64 {
        u64::from(self.ways) * u64::from(self.line) * u64::from(self.sets)
    }
}

const fn cache(level: u32, kind: u32, ways: u32, sets: u32) -> Cache {
    Cache {
        level,
        kind,
        ways,
        line: 64,
        sets,
        flags: 0,
    }
}

/// Caches of named models: the same on every host.
const MODEL_CACHES: &[Cache] = &[
    cache(1, 1, 8, 64),
    cache(1, 2, 8, 64),
    cache(2, 3, 8, 1024),
    cache(3, 3, 16, 16384),
];

/// Builds the table.
pub fn build(b: &Blueprint<'_>) -> CpuidTable {
    let mut t = Builder {
        b,
        entries: Vec::new(),
    };
    t.basic();
    t.topology();
    t.xsave();
    t.hypervisor();
    t.extended();
    t.features();
    CpuidTable { entries: t.entries }
}

struct Builder<'a, 'b> {
    b: &'a Blueprint<'b>,
    entries: Vec<CpuidEntry>,
}

/// Bits that hold a number of `n` things: the shift of an APIC id.
fn id_bits(n: u32) -> u32 {
    n.next_power_of_two().trailing_zeros()
}

/// Family, model and stepping as leaf 1 encodes them. Intel SDM Vol. 2A figure 3-6.
fn signature((family, model, stepping): (u32, u32, u32)) -> u32 {
    let (base, extended) = (family.min(15), family.saturating_sub(15));
    extended << 20 | model >> 4 << 16 | base << 8 | (model & 0xf) << 4 | stepping & 0xf
}

impl Builder<'_, '_> {
    fn put(&mut self, leaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) {
        self.entries.push(CpuidEntry {
            leaf,
            eax,
            ebx,
            ecx,
            edx,
            ..CpuidEntry::default()
        });
    }

    fn put_sub(&mut self, leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) {
        self.entries.push(CpuidEntry {
            leaf,
            subleaf,
            indexed: true,
            eax,
            ebx,
            ecx,
            edx,
        });
    }

    fn is_host(&self) -> bool {
        self.b.model.is_none()
    }

    fn amd(&self) -> bool {
        self.b.vendor == Vendor::Amd
    }

    fn has(&self, name: &str) -> bool {
        self.b.features.has(name)
    }

    fn signature(&self) -> u32 {
        match self.b.model {
            None => self.b.host.leaf(1, 0).eax,
            Some(Model {
                vendor: Some(_),
                signature: s,
                ..
            }) => signature(*s),
            Some(_) if self.amd() => signature(GENERIC_AMD),
            Some(_) => signature(GENERIC_INTEL),
        }
    }

    fn vendor_words(&self) -> [u32; 3] {
        let host = self.b.host.leaf(0, 0);
        match self.b.vendor {
            // EBX, ECX, EDX.
            _ if self.is_host() && host.ebx != 0 => [host.ebx, host.ecx, host.edx],
            Vendor::Intel => [0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            Vendor::Amd => [0x6874_7541, 0x444d_4163, 0x6974_6e65],
        }
    }

    fn basic(&mut self) {
        let max = if self.amd() { 0xd } else { 0x16 };
        let [ebx, ecx, edx] = self.vendor_words();
        self.put(0, [max, ebx, ecx, edx]);
        let n = self.b.vcpus;
        // CLFLUSH line in 8-byte units, number of APIC ids. ECX 31: there is a hypervisor.
        // EDX 28 (HTT): the number of APIC ids is valid.
        self.put(
            1,
            [
                self.signature(),
                8 << 8 | n << 16,
                1 << 31,
                u32::from(n > 1) << 28,
            ],
        );
        if !self.amd() {
            // 01 = one query is enough, FF = see leaf 4, F0 = 64-byte prefetch.
            self.put(2, [0x00fe_ff01, 0, 0, 0xf0]);
        }
        self.put(6, [0; 4]);
        let max_7 = u32::from(
            self.b
                .features
                .iter()
                .any(|f| f.leaf == 7 && f.subleaf == 1),
        );
        self.put_sub(7, 0, [max_7, 0, 0, 0]);
        if max_7 > 0 {
            self.put_sub(7, 1, [0; 4]);
        }
        if !self.amd() && self.b.host.tsc_khz != 0 {
            let (num, den) = ratio(self.b.host.tsc_khz, u64::from(APIC_BUS_KHZ));
            self.put(0x15, [den, num, APIC_BUS_KHZ * 1000, 0]);
            let mhz = u32::try_from(self.b.host.tsc_khz / 1000).unwrap_or(0) & 0xffff;
            self.put(0x16, [mhz, mhz, 100, 0]);
        }
    }

    /// The caches: the host's for the host model.
    fn caches(&self) -> Vec<Cache> {
        let mut found = Vec::new();
        if self.is_host() {
            let leaf = if self.amd() { 0x8000_001d } else { 4 };
            for n in 0..8 {
                let e = self.b.host.leaf(leaf, n);
                if e.eax & 0x1f == 0 {
                    break;
                }
                found.push(Cache {
                    level: e.eax >> 5 & 7,
                    kind: e.eax & 0x1f,
                    ways: (e.ebx >> 22) + 1,
                    line: (e.ebx & 0xfff) + 1,
                    sets: e.ecx.saturating_add(1),
                    flags: e.edx & 7,
                });
            }
        }
        if found.is_empty() {
            found = MODEL_CACHES.to_vec();
        }
        found
    }

    /// One socket with n cores of one thread each. APIC ids are 0…n-1.
    fn topology(&mut self) {
        let n = self.b.vcpus;
        let bits = id_bits(n);
        let caches = self.caches();
        let leaf = if self.amd() { 0x8000_001d } else { 4 };
        // Leaf 8000_001DH exists only with TOPOEXT.
        if !self.amd() || self.has("topoext") {
            for (sub, c) in (0u32..).zip(&caches) {
                // The last level is shared by all cores; counts are rounded to powers of two.
                let sharing = if c.level >= 3 { (1 << bits) - 1 } else { 0 };
                let cores = if self.amd() {
                    0
                } else {
                    ((1 << bits) - 1).min(0x3f)
                };
                let eax = c.kind | c.level << 5 | 1 << 8 | sharing << 14 | cores << 26;
                let ebx = (c.line - 1) | ((c.ways - 1) << 22);
                self.put_sub(leaf, sub, [eax, ebx, c.sets - 1, c.flags]);
            }
            self.put_sub(leaf, caches.len() as u32, [0; 4]);
        }
        // Thread level (1), core level (2), end.
        self.put_sub(0xb, 0, [0, 1, 0x100, 0]);
        self.put_sub(0xb, 1, [bits, n, 0x201, 0]);
        self.put_sub(0xb, 2, [0, 0, 2, 0]);
        if self.amd() {
            self.amd_caches(&caches);
            self.put(0x8000_0008, [0, 0, (bits << 12) | (n - 1), 0]);
            if self.has("topoext") {
                // EAX and EBX 7:0 are per vCPU; one thread per core, one node.
                self.put(0x8000_001e, [0; 4]);
            }
        } else {
            self.put(0x8000_0008, [0; 4]);
            self.put(0x8000_0006, [0, 0, l2_word(&caches), 0]);
        }
    }

    /// Leaves 8000_0005H and 8000_0006H. AMD APM Vol. 3 §E.4.4-E.4.5.
    fn amd_caches(&mut self, caches: &[Cache]) {
        let l1 = |kind| {
            caches
                .iter()
                .find(|c| c.level == 1 && c.kind == kind)
                .map_or(0, |c| {
                    let kib = (c.bytes() / 1024).min(255) as u32;
                    kib << 24 | c.ways.min(255) << 16 | 1 << 8 | c.line & 0xff
                })
        };
        let (data, code) = (l1(1), l1(2));
        let l3 = caches.iter().find(|c| c.level == 3).map_or(0, |c| {
            let halves = (c.bytes() / (512 * 1024)).min(0x3fff) as u32;
            halves << 18 | associativity(c.ways) << 12 | 1 << 8 | c.line & 0xff
        });
        // TLBs: 64 entries each, fully associative; second level 1024, 8 ways.
        self.put(0x8000_0005, [0xff40_ff40, 0xff40_ff40, data, code]);
        self.put(0x8000_0006, [0x6400_6400, 0x6400_6400, l2_word(caches), l3]);
    }

    /// XSAVE components with the host's sizes and offsets.
    fn xsave(&mut self) {
        if !self.has("xsave") {
            return;
        }
        let mut xcr0 = 0b11u64;
        for (feature, bits) in [("avx", 0b100), ("avx512f", 0xe0), ("pku", 0x200)] {
            if self.has(feature) {
                xcr0 |= bits;
            }
        }
        let mut size = 576u32;
        for n in 2..10 {
            if xcr0 >> n & 1 == 0 {
                continue;
            }
            let c = self.b.host.leaf(0xd, n);
            self.put_sub(0xd, n, [c.eax, c.ebx, c.ecx & 2, 0]);
            size = size.max(c.eax.saturating_add(c.ebx));
        }
        // EBX follows XCR0 at run time; here with only x87 and SSE enabled, as after reset.
        self.put_sub(0xd, 0, [xcr0 as u32, 576, size, (xcr0 >> 32) as u32]);
        // No supervisor states: IA32_XSS has no bits.
        self.put_sub(0xd, 1, [0; 4]);
    }

    /// The leaves by which a guest knows KVM's paravirtual clock.
    fn hypervisor(&mut self) {
        // "KVMKVMKVM\0\0\0"
        self.put(
            0x4000_0000,
            [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x0000_004d],
        );
        // NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE_BIT.
        self.put(0x4000_0001, [1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0]);
        let khz = u32::try_from(self.b.host.tsc_khz).unwrap_or(0);
        let bus = if khz == 0 { 0 } else { APIC_BUS_KHZ };
        self.put(0x4000_0010, [khz, bus, 0, 0]);
    }

    fn extended(&mut self) {
        let max = if self.amd() { 0x8000_0021 } else { 0x8000_0008 };
        let [ebx, ecx, edx] = if self.amd() {
            self.vendor_words()
        } else {
            [0; 3]
        };
        self.put(0x8000_0000, [max, ebx, ecx, edx]);
        let n = self.b.vcpus;
        let signature = if self.amd() { self.signature() } else { 0 };
        // CmpLegacy: several cores, no threads. AMD APM Vol. 3 §E.4.2.
        let legacy = u32::from(self.amd() && n > 1) << 1;
        self.put(0x8000_0001, [signature, 0, legacy, 0]);
        for (k, words) in self.brand().chunks_exact(4).enumerate() {
            self.put(
                0x8000_0002 + k as u32,
                [words[0], words[1], words[2], words[3]],
            );
        }
        self.put(0x8000_0007, [0; 4]);
        let host_bits = match self.b.host.leaf(0x8000_0008, 0).eax & 0xff {
            0 => 40,
            n => n,
        };
        // The software engine walks page tables itself; KVM must not exceed the host.
        let physical = host_bits.min(PHYSICAL_BITS_MAX);
        if let Some(e) = self.entry(0x8000_0008, 0) {
            e.eax = physical | 48 << 8;
        }
        if self.amd() {
            self.put(0x8000_0021, [0; 4]);
            if self.is_host() {
                // How wide the floating-point units are: a hint.
                let hint = self.b.host.leaf(0x8000_001a, 0).eax & 7;
                self.put(0x8000_001a, [hint, 0, 0, 0]);
            }
        }
    }

    fn brand(&self) -> [u32; 12] {
        let mut words = [0; 12];
        if self.is_host() {
            for leaf in 0..3 {
                let e = self.b.host.leaf(0x8000_0002 + leaf, 0);
                let at = leaf as usize * 4;
                words[at..at + 4].copy_from_slice(&[e.eax, e.ebx, e.ecx, e.edx]);
            }
            if words[0] != 0 {
                return words;
            }
        }
        let name = self.b.model.map_or("host", |m| m.name);
        let mut text = format!("Pyrite Virtual CPU {name}").into_bytes();
        // 47 characters and a NUL.
        text.truncate(47);
        text.resize(48, 0);
        for (w, c) in words.iter_mut().zip(text.chunks_exact(4)) {
            *w = u32::from_le_bytes([c[0], c[1], c[2], c[3]]);
        }
        words
    }

    fn entry(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.entries
            .iter_mut()
            .find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf))
    }

    /// Sets the bit of each feature.
    fn features(&mut self) {
        for f in self.b.features.iter() {
            if let Some(e) = self.entry(f.leaf, f.subleaf) {
                *e.register_mut(f.register) |= 1 << f.bit;
            }
        }
        if self.amd() {
            // AMD repeats the early bits of leaf 1 EDX. AMD APM Vol. 3 §E.4.2.
            const REPEATED: u32 = 0x0183_f3ff;
            let edx = self
                .entry(1, 0)
                .map_or(0, |e| e.register(Register::Edx) & REPEATED);
            if let Some(e) = self.entry(0x8000_0001, 0) {
                e.edx |= edx;
            }
        }
        if self.b.engine == EngineKind::Soft && !self.has("arat") {
            // Nothing depends on C-states here; leaf 6 stays empty.
            if let Some(e) = self.entry(6, 0) {
                e.eax = 0;
            }
        }
    }
}

fn l2_word(caches: &[Cache]) -> u32 {
    caches.iter().find(|c| c.level == 2).map_or(0, |c| {
        let kib = (c.bytes() / 1024).min(0xffff) as u32;
        kib << 16 | associativity(c.ways) << 12 | 1 << 8 | c.line & 0xff
    })
}

/// Encoding of a number of ways in leaf 8000_0006H. AMD APM Vol. 3 table E-4.
fn associativity(ways: u32) -> u32 {
    match ways {
        0 | 1 => ways,
        2 | 3 => 2,
        4 | 5 => 4,
        6 | 7 => 5,
        8..=15 => 6,
        16..=31 => 8,
        32..=47 => 10,
        48..=63 => 11,
        64..=95 => 12,
        96..=127 => 13,
        _ => 14,
    }
}

/// The best fraction for `a / b` whose numerator, times the crystal's kHz, fits 32 bits: guests
/// compute in such words. Continued fraction.
fn ratio(a: u64, b: u64) -> (u32, u32) {
    const NUMERATOR_MAX: u64 = u32::MAX as u64 / APIC_BUS_KHZ as u64;
    let (mut a, mut b) = (a, b);
    let (mut n0, mut n1, mut d0, mut d1) = (0u64, 1u64, 1u64, 0u64);
    while b != 0 {
        let q = a / b;
        let (n2, d2) = (q.saturating_mul(n1) + n0, q.saturating_mul(d1) + d0);
        if n2 > NUMERATOR_MAX {
            break;
        }
        (n0, n1, d0, d1) = (n1, n2, d1, d2);
        (a, b) = (b, a % b);
    }
    if d1 == 0 {
        // A TSC faster than 4 THz does not exist.
        return (1, 1);
    }
    (n1 as u32, d1 as u32)
}
