//! The state a test sequence starts from and what it leaves behind, the same for the host and for
//! every engine; and the address layout that both use.

use std::arch::x86_64::__cpuid_count;

use pyrite_x86::XsaveArea;

use super::rng::Rng;

/// Two pages of code, readable and executable.
pub const CODE: u64 = 0x1000_0000;
pub const CODE_BYTES: usize = 0x2000;
/// Two pages of data that may be written, one that may only be read; nothing behind.
pub const DATA: u64 = 0x1001_0000;
pub const DATA_BYTES: usize = 0x2000;
pub const RO_BYTES: usize = 0x1000;
/// Every sequence ends with a jump to here.
pub const END: u64 = 0x7003_0000;
/// The same for 32-bit code.
pub const END32: u64 = END + 0x10;
/// The same for 16-bit code, as an offset in the code pages: a far jump to [`END32`].
pub const END16: usize = CODE_BYTES - 0x10;

/// What the code segment says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// 64-bit mode.
    #[default]
    Long,
    /// Compatibility mode, 32-bit code, flat segments but FS.
    Flat32,
    /// Compatibility mode, 16-bit code in a segment of its own, and so its data and stack.
    Seg16,
}

/// Selectors of the local descriptor table.
pub const CODE16: u16 = 0x07;
const DATA16: u16 = 0x0f;
const STACK16: u16 = 0x17;
const READ_ONLY: u16 = 0x1f;
/// Base, limit in bytes, access byte, flags (bit 2 = D/B) of its entries.
pub const LDT: [(u64, u32, u16, u16); 4] = [
    (CODE, CODE_BYTES as u32 - 1, 0xfb, 0),
    (DATA, (DATA_BYTES + RO_BYTES) as u32 - 1, 0xf3, 4),
    (DATA, 0xffff, 0xf3, 0),
    (DATA, 0xfff, 0xf1, 4),
];

impl Mode {
    pub const ALL: [Mode; 3] = [Mode::Long, Mode::Flat32, Mode::Seg16];

    /// Width of code in bits.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Flat32 => 32,
            Mode::Seg16 => 16,
        }
    }

    /// Address of the code pages in the code segment.
    pub fn code(self) -> u64 {
        if self == Mode::Seg16 { 0 } else { CODE }
    }

    /// Base of the segments of data and stack.
    pub fn data_base(self) -> u64 {
        if self == Mode::Seg16 { DATA } else { 0 }
    }

    /// Selectors that a sequence starts with: ES CS SS DS FS GS.
    pub fn selectors(self) -> [u16; 6] {
        match self {
            Mode::Long => [0, 0x33, 0x2b, 0, 0, 0],
            Mode::Flat32 => [0x2b, 0x23, 0x2b, 0x2b, DATA16, 0x2b],
            Mode::Seg16 => [DATA16, CODE16, STACK16, DATA16, 0x2b, READ_ONLY],
        }
    }

    /// A jump from `at` in the code pages to the end.
    pub fn way_out(self, at: usize) -> Vec<u8> {
        let near = |to: u64| {
            let rel = to.wrapping_sub(CODE + at as u64 + 5) as u32;
            [&[0xe9][..], &rel.to_le_bytes()].concat()
        };
        match self {
            Mode::Long => near(END),
            Mode::Flat32 => near(END32),
            Mode::Seg16 => {
                let far = [&[0x66, 0xea][..], &(END32 as u32).to_le_bytes(), &[0x23, 0]];
                far.concat()
            }
        }
    }
}

/// Start state of a sequence.
#[derive(Clone)]
pub struct Start {
    pub mode: Mode,
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub xsave: XsaveArea,
    /// The writable data, then the read-only page.
    pub data: Vec<u8>,
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It reached [`END`].
    Through,
    /// An exception; the code is 0 where there is none, CR2 only for #PF.
    Exception { vector: u8, code: u32, cr2: u64 },
    /// It did not end in time.
    Lost,
}

/// What a sequence left behind.
#[derive(Clone)]
pub struct Outcome {
    pub end: End,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// ES CS SS DS FS GS.
    pub selectors: [u16; 6],
    pub xsave: XsaveArea,
    pub data: Vec<u8>,
}

/// Offset and size of a component in the standard format.
pub fn component(n: u32) -> (usize, usize) {
    let r = __cpuid_count(0xd, n);
    (r.ebx as usize, r.eax as usize)
}

/// Byte ranges of the components that are compared, by number.
pub struct Components(pub Vec<(u32, std::ops::Range<usize>)>);

impl Components {
    pub fn of_host() -> Components {
        let mask = pyrite_soft::xlate::host_xsave_mask();
        // FCW FSW FTW; ST0-7. The pointers of the last instruction are in `pointers`.
        let mut list = vec![(0, 0..5), (0, 32..160), (1, 160..416)];
        for n in [2u32, 5, 6, 7] {
            if mask >> n & 1 != 0 {
                let (at, len) = component(n);
                list.push((n, at..at + len));
            }
        }
        Components(list)
    }

    /// Writes the initial value over components that XSTATE_BV declares initial, and clears what
    /// is not state.
    pub fn normalise(&self, area: &mut XsaveArea) {
        let a = &mut area.0;
        let bv = u64::from_le_bytes(a[512..520].try_into().unwrap());
        for (n, range) in &self.0 {
            if bv >> n & 1 == 0 {
                a[range.clone()].fill(0);
                if *n == 0 && range.start == 0 {
                    a[..2].copy_from_slice(&0x37fu16.to_le_bytes());
                }
            }
        }
        if bv & 1 == 0 {
            a[6..24].fill(0);
        }
        // ST registers have 80 bits.
        for n in 0..8 {
            a[32 + 16 * n + 10..32 + 16 * n + 16].fill(0);
        }
    }
}

/// A number that instructions find interesting.
pub fn interesting(r: &mut Rng) -> u64 {
    match r.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => 1,
        3 => 1 << r.below(64),
        4 => (1u64 << r.below(64)).wrapping_sub(1),
        5 => r.below(256),
        6 => r.next() & 0xffff_ffff,
        7 => (r.next() as i32) as i64 as u64,
        8 => 0x8000_0000 + r.below(3) - 1,
        9 => (r.below(64) as i64 - 32) as u64,
        _ => r.next(),
    }
}

const F32: [u32; 14] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    1,
    0x007f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x4f00_0000,
    0xcf00_0000,
];
const F64: [u64; 14] = [
    0,
    1 << 63,
    0x3ff0 << 48,
    0xbff0 << 48,
    0x7ff0 << 48,
    0xfff0 << 48,
    0x7ff8 << 48,
    0x7ff0_0000_0000_0001,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010 << 48,
    0x7fef_ffff_ffff_ffff,
    0x41e0 << 48,
    0xc3e0 << 48,
];

/// Fills bytes with integers, floats of both sizes, small numbers or noise.
pub fn fill(r: &mut Rng, out: &mut [u8]) {
    for chunk in out.chunks_mut(16) {
        let mut b = [0u8; 16];
        match r.below(7) {
            0 => {
                for w in b.chunks_mut(4) {
                    w.copy_from_slice(&F32[r.below(14) as usize].to_le_bytes());
                }
            }
            1 => {
                for w in b.chunks_mut(8) {
                    w.copy_from_slice(&F64[r.below(14) as usize].to_le_bytes());
                }
            }
            2 => {
                for w in b.chunks_mut(4) {
                    w.copy_from_slice(&((r.next() as i8) as f32 / 4.0).to_le_bytes());
                }
            }
            3 => {
                for w in b.chunks_mut(8) {
                    w.copy_from_slice(&((r.next() as i16) as f64 / 16.0).to_le_bytes());
                }
            }
            4 => {
                for w in b.chunks_mut(8) {
                    w.copy_from_slice(&interesting(r).to_le_bytes());
                }
            }
            _ => {
                for w in b.chunks_mut(8) {
                    w.copy_from_slice(&r.next().to_le_bytes());
                }
            }
        }
        chunk.copy_from_slice(&b[..chunk.len()]);
    }
}

impl Start {
    /// Nothing in any register.
    pub fn zero() -> Start {
        Start {
            mode: Mode::Long,
            gpr: [0; 16],
            rflags: 0x202,
            fs_base: 0,
            gs_base: 0,
            xsave: XsaveArea([0; pyrite_x86::state::XSAVE_AREA_BYTES]),
            data: vec![0; DATA_BYTES + RO_BYTES],
        }
    }

    /// A pointer into the data, most often well inside.
    pub fn pointer(r: &mut Rng) -> u64 {
        match r.below(16) {
            0 => DATA + r.below(DATA_BYTES as u64),
            // Near the page boundary, the read-only page and the end.
            1 => DATA + 0x1000 - r.below(70),
            2 => DATA + DATA_BYTES as u64 - r.below(70),
            3 => DATA + (DATA_BYTES + RO_BYTES) as u64 - r.below(70),
            _ => DATA + 0x200 + (r.below(0x1800) & !63),
        }
    }

    /// Chooses everything anew. `vectors`: x87 and vector registers too (else as they were).
    pub fn randomise(&mut self, r: &mut Rng, c: &Components, vectors: bool) {
        let mut data = std::mem::take(&mut self.data);
        // Not all of it each time: that would be most of the work.
        let at = r.below((data.len() / 512) as u64) as usize * 512;
        fill(r, &mut data[at..at + 512]);
        self.data = data;
        for n in 0..16 {
            self.gpr[n] = match r.below(8) {
                0..=3 => Start::pointer(r),
                4 | 5 => r.below(64),
                _ => interesting(r),
            };
        }
        self.gpr[4] = DATA + 0x800 + (r.below(0x1000) & !15);
        let arith = r.next() & pyrite_x86::bits::rflags::ARITH;
        self.rflags = 0x202 | arith | if r.below(10) == 0 { 0x400 } else { 0 };
        self.fs_base = r.below(4) * 64;
        self.gs_base = r.below(4) * 8;
        if self.mode != Mode::Long {
            self.narrow();
        }
        if vectors {
            self.random_vectors(r, c);
        }
    }

    /// Makes the registers fit a mode with 32-bit registers.
    fn narrow(&mut self) {
        let base = self.mode.data_base();
        for (n, g) in self.gpr.iter_mut().enumerate() {
            if (DATA..DATA + (DATA_BYTES + RO_BYTES) as u64).contains(g) {
                *g -= base;
            }
            *g = if n < 8 { *g & 0xffff_ffff } else { 0 };
        }
        if self.mode == Mode::Seg16 {
            // IRETQ keeps bits 31:16 of RSP when it goes to a 16-bit stack; this is what the host
            // has there.
            self.gpr[4] = self.gpr[4] & 0xffff | super::host::CONTEXT & 0xffff_0000;
        }
        let [.., fs, gs] = self.mode.selectors().map(segment_base);
        (self.fs_base, self.gs_base) = (fs, gs);
    }

    /// Offset in the data that the stack pointer has.
    pub fn stack_at(&self) -> usize {
        match self.mode {
            Mode::Seg16 => self.gpr[4] as usize & 0xffff,
            _ => (self.gpr[4] - DATA) as usize,
        }
    }

    fn random_vectors(&mut self, r: &mut Rng, c: &Components) {
        let a = &mut self.xsave.0;
        for (n, range) in &c.0 {
            if range.len() < 8 {
                continue;
            }
            fill(r, &mut a[range.clone()]);
            if *n == 5 && r.below(2) == 0 {
                // Masks that are full, or have few lanes.
                for k in a[range.clone()].chunks_mut(8) {
                    let m = if r.below(2) == 0 {
                        u64::MAX
                    } else {
                        r.next() & r.next()
                    };
                    k.copy_from_slice(&m.to_le_bytes());
                }
            }
        }
        let small = r.below(8);
        if small < 2 {
            // Indices for gathers.
            for (n, range) in &c.0 {
                if matches!(n, 1 | 2 | 6 | 7) && range.len() >= 16 {
                    for w in a[range.clone()].chunks_mut(if small == 0 { 4 } else { 8 }) {
                        w.fill(0);
                        w[0] = r.next() as u8 & 0x7f;
                    }
                }
            }
        }
        for n in 0..8 {
            a[32 + 16 * n + 10..32 + 16 * n + 16].fill(0);
            if r.below(2) == 0 {
                // A normal number.
                let e = (0x3fff + r.below(40) as u16 - 20) | (r.next() as u16 & 0x8000);
                a[32 + 16 * n + 7] |= 0x80;
                a[32 + 16 * n + 8..32 + 16 * n + 10].copy_from_slice(&e.to_le_bytes());
            }
        }
        let fcw: u16 = match r.below(4) {
            0 => 0x040 | (r.next() as u16 & 0xf3f),
            1 => 0x07f | (r.next() as u16 & 0xf00),
            _ => 0x37f,
        };
        a[..2].copy_from_slice(&fcw.to_le_bytes());
        let top = (r.below(8) as u16) << 11;
        let fsw = match r.below(6) {
            0 => top | (r.next() as u16 & 0x4700),
            _ => top,
        };
        a[2..4].copy_from_slice(&fsw.to_le_bytes());
        a[4] = if r.below(3) == 0 {
            0xff
        } else {
            r.next() as u8
        };
        let mxcsr: u32 = match r.below(4) {
            0 => 0x1f80 | (r.next() as u32 & 0xe07f),
            1 => r.next() as u32 & 0xffc0,
            _ => 0x1f80,
        };
        a[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        let mut bv = pyrite_soft::xlate::host_xsave_mask() as u64;
        if r.below(8) == 0 {
            bv &= r.next();
        }
        a[512..520].copy_from_slice(&bv.to_le_bytes());
    }
}

/// Base of a segment of the layout.
pub fn segment_base(selector: u16) -> u64 {
    if selector & 4 == 0 {
        return 0;
    }
    LDT.get(usize::from(selector >> 3)).map_or(0, |d| d.0)
}

/// Bits of RFLAGS that are compared: arithmetic, DF, AC, ID, NT.
pub const FLAGS: u64 = 0x8d5 | 0x400 | 1 << 18 | 1 << 21 | 1 << 14;

/// How two outcomes may differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// Flags that need not agree.
    pub flags: u64,
    /// Arithmetic flags need not agree if there was an exception.
    pub flags_at_fault: bool,
    /// Of an operand larger than the processor's accesses any byte of a missing page may be named.
    pub cr2_page_only: bool,
    /// Vector registers need not agree if there was an exception.
    pub partial_vectors: bool,
    /// Operands may reach beyond the end of a flat segment of 4 GiB.
    pub may_wrap: bool,
}

/// Lists the differences; empty = equal.
pub fn differences(want: &Outcome, got: &Outcome, c: &Components, t: Tolerance) -> Vec<String> {
    let mut out = Vec::new();
    let end_differs = match (want.end, got.end) {
        // High addresses belong to the host: present or not is its affair.
        (
            End::Exception {
                vector: 14,
                code: a,
                cr2: x,
            },
            End::Exception {
                vector: 14,
                code: b,
                cr2: y,
            },
        ) => {
            let mask = if t.cr2_page_only { !0xfff } else { u64::MAX };
            (x ^ y) & mask != 0
                || (if x >= 0x7000_0000_0000 {
                    (a ^ b) & !1
                } else {
                    a ^ b
                }) != 0
        }
        // At the end of a segment whose limit is FFFFFFFFH, accesses that wrap "may or may not cause"
        // the exception, and "may vary from one execution to another": Intel SDM Vol. 3A §6.3.
        (
            End::Exception {
                vector: 14,
                cr2: 0xffff_ff00..=0xffff_ffff,
                ..
            },
            End::Exception {
                vector: 12 | 13,
                code: 0,
                ..
            },
        ) if t.may_wrap => false,
        // A far return reads a new stack pointer and checks the selector in an order of its own:
        // within a class the priority is "implementation-dependent", Intel SDM Vol. 3A §6.9.
        (
            End::Exception { vector: 14, .. },
            End::Exception {
                vector: 10..=13,
                code: 4..,
                ..
            },
        ) => false,
        // FS or GS and an offset that is not canonical, whose sum is: some processors refuse it.
        (
            End::Exception {
                vector: 13,
                code: 0,
                ..
            },
            End::Exception {
                vector: 14,
                cr2: 0xffff_8000_0000_0000..=0xffff_8000_0000_0fff,
                ..
            },
        ) => false,
        (a, b) => a != b,
    };
    if end_differs {
        out.push(format!("end: {:x?}, not {:x?}", got.end, want.end));
    }
    for n in 0..16 {
        if want.gpr[n] != got.gpr[n] {
            out.push(format!(
                "gpr {n}: {:#x}, not {:#x}",
                got.gpr[n], want.gpr[n]
            ));
        }
    }
    if want.selectors != got.selectors {
        out.push(format!(
            "selectors: {:x?}, not {:x?}",
            got.selectors, want.selectors
        ));
    }
    if want.rip != got.rip {
        out.push(format!("rip: {:#x}, not {:#x}", got.rip, want.rip));
    }
    let mut flags = FLAGS & !t.flags;
    if t.flags_at_fault && matches!(want.end, End::Exception { .. }) {
        flags &= !0x8d5;
    }
    if (want.rflags ^ got.rflags) & flags != 0 {
        out.push(format!("rflags: {:#x}, not {:#x}", got.rflags, want.rflags));
    }
    if (want.fs_base, want.gs_base) != (got.fs_base, got.gs_base) {
        out.push(format!(
            "fs/gs base: {:#x} {:#x}, not {:#x} {:#x}",
            got.fs_base, got.gs_base, want.fs_base, want.gs_base
        ));
    }
    for (n, range) in c.0.iter().cloned().chain([(1, 24..28)]) {
        if t.partial_vectors && matches!(n, 1 | 2 | 6 | 7) && want.end != End::Through {
            continue;
        }
        let (w, g) = (&want.xsave.0[range.clone()], &got.xsave.0[range.clone()]);
        if w != g {
            let at = w.iter().zip(g).position(|(a, b)| a != b).unwrap_or(0);
            let end = (at + 16).min(w.len());
            out.push(format!(
                "xsave component {n} at {}+{at}: {:02x?}, not {:02x?}",
                range.start,
                &g[at..end],
                &w[at..end]
            ));
        }
    }
    if want.data != got.data {
        let at = want
            .data
            .iter()
            .zip(&got.data)
            .position(|(a, b)| a != b)
            .unwrap_or(0);
        let end = (at + 16).min(want.data.len());
        out.push(format!(
            "memory at {:#x}: {:02x?}, not {:02x?}",
            DATA + at as u64,
            &got.data[at..end],
            &want.data[at..end]
        ));
    }
    out
}
