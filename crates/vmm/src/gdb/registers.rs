//! Registers as a debugger sees them: the target description, and where each is in [`CpuState`].
//! GDB manual, appendix "Target Descriptions", section "i386 Features".

use pyrite_x86::bits::{cr0, efer};
use pyrite_x86::{CpuState, Segment, gpr, sreg};

/// Where XSTATE_BV is in an XSAVE area. Intel SDM Vol. 1 §13.4.2.
const XSTATE_BV: usize = 512;
/// Its bits: x87, SSE, AVX. Vol. 1 §13.1.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// MXCSR after reset.
const MXCSR_INIT: u32 = 0x1f80;
/// FCW after FNINIT, which is what the initial configuration of the component is.
const FCW_INIT: u16 = 0x37f;

/// Which registers there are. A debugger takes the description once, so it stays for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// i386:x86-64.
    Amd64,
    /// i386.
    I386,
}

impl Arch {
    /// What fits a processor now: 64-bit if it runs in IA-32e mode, or could be brought there by
    /// what it is just booting; 32-bit if it runs a 32-bit system.
    pub fn of(state: &CpuState, has_long_mode: bool) -> Arch {
        let is_paging = state.cr0 & cr0::PG != 0;
        if state.efer & efer::LMA != 0 || has_long_mode && !is_paging {
            Arch::Amd64
        } else {
            Arch::I386
        }
    }
}

/// Which part of the state a register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Gpr(usize),
    Rip,
    Flags,
    Selector(usize),
    Base(usize),
    St(usize),
    Fctrl,
    Fstat,
    Ftag,
    Fiseg,
    Fioff,
    Foseg,
    Fooff,
    Fop,
    Xmm(usize),
    Mxcsr,
    YmmHigh(usize),
    KernelGsBase,
    Cr(u8),
    Efer,
}

struct Register {
    name: String,
    bytes: usize,
    kind: &'static str,
    /// Shown by `info float`.
    is_float: bool,
    field: Field,
}

/// The registers of a session.
pub struct Registers {
    arch: Arch,
    /// Features in the order of the description, and their registers.
    features: Vec<(&'static str, Vec<Register>)>,
    /// Offset of the AVX component in an XSAVE area.
    avx_at: usize,
}

const EFLAGS: &str = r#"<flags id="eflags_bits" size="4">
<field name="CF" start="0" end="0"/><field name="" start="1" end="1"/>
<field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/>
<field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/>
<field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/>
<field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/>
<field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/>
<field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/>
<field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/>
<field name="ID" start="21" end="21"/></flags>
"#;

const VECTORS: &str = r#"<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/>
<vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>
<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/></union>
<flags id="mxcsr_bits" size="4"><field name="IE" start="0" end="0"/>
<field name="DE" start="1" end="1"/><field name="ZE" start="2" end="2"/>
<field name="OE" start="3" end="3"/><field name="UE" start="4" end="4"/>
<field name="PE" start="5" end="5"/><field name="DAZ" start="6" end="6"/>
<field name="IM" start="7" end="7"/><field name="DM" start="8" end="8"/>
<field name="ZM" start="9" end="9"/><field name="OM" start="10" end="10"/>
<field name="UM" start="11" end="11"/><field name="PM" start="12" end="12"/>
<field name="FZ" start="15" end="15"/></flags>
"#;

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE_FEATURE: &str = "org.gnu.gdb.i386.sse";

/// Segment registers in the debugger's order.
const SEGMENTS: [(&str, usize); 6] = [
    ("cs", sreg::CS),
    ("ss", sreg::SS),
    ("ds", sreg::DS),
    ("es", sreg::ES),
    ("fs", sreg::FS),
    ("gs", sreg::GS),
];

fn register(name: &str, bytes: usize, kind: &'static str, field: Field) -> Register {
    Register {
        name: name.to_owned(),
        bytes,
        kind,
        is_float: false,
        field,
    }
}

fn core(arch: Arch) -> Vec<Register> {
    use gpr::{R8, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
    let wide = [
        ("rax", RAX),
        ("rbx", RBX),
        ("rcx", RCX),
        ("rdx", RDX),
        ("rsi", RSI),
        ("rdi", RDI),
        ("rbp", RBP),
        ("rsp", RSP),
    ];
    let narrow = [
        ("eax", RAX),
        ("ecx", RCX),
        ("edx", RDX),
        ("ebx", RBX),
        ("esp", RSP),
        ("ebp", RBP),
        ("esi", RSI),
        ("edi", RDI),
    ];
    let kind = |n: usize, int| {
        if n == RSP || n == RBP {
            "data_ptr"
        } else {
            int
        }
    };
    let mut all = Vec::new();
    if arch == Arch::Amd64 {
        let low = wide.map(|(name, n)| register(name, 8, kind(n, "int64"), Field::Gpr(n)));
        all.extend(low);
        all.extend((R8..16).map(|n| register(&format!("r{n}"), 8, "int64", Field::Gpr(n))));
        all.push(register("rip", 8, "code_ptr", Field::Rip));
    } else {
        all.extend(narrow.map(|(name, n)| register(name, 4, kind(n, "int32"), Field::Gpr(n))));
        all.push(register("eip", 4, "code_ptr", Field::Rip));
    }
    all.push(register("eflags", 4, "eflags_bits", Field::Flags));
    all.extend(SEGMENTS.map(|(name, n)| register(name, 4, "int32", Field::Selector(n))));
    all.extend((0..8).map(|n| register(&format!("st{n}"), 10, "i387_ext", Field::St(n))));
    for (name, field) in [
        ("fctrl", Field::Fctrl),
        ("fstat", Field::Fstat),
        ("ftag", Field::Ftag),
        ("fiseg", Field::Fiseg),
        ("fioff", Field::Fioff),
        ("foseg", Field::Foseg),
        ("fooff", Field::Fooff),
        ("fop", Field::Fop),
    ] {
        all.push(Register {
            is_float: true,
            ..register(name, 4, "int", field)
        });
    }
    all
}

/// What no standard feature has.
fn system(arch: Arch) -> Vec<Register> {
    let int = |name: &str, field| register(name, 8, "int64", field);
    let is_standard = |n: usize| arch == Arch::Amd64 && matches!(n, sreg::FS | sreg::GS);
    let mut all: Vec<Register> = SEGMENTS
        .into_iter()
        .filter(|(_, n)| !is_standard(*n))
        .map(|(name, n)| int(&format!("{name}_base"), Field::Base(n)))
        .collect();
    all.push(int("k_gs_base", Field::KernelGsBase));
    all.extend([0, 2, 3, 4, 8].map(|n| int(&format!("cr{n}"), Field::Cr(n))));
    all.push(int("efer", Field::Efer));
    all
}

/// Bytes of the area, little-endian; zeroes beyond it.
fn get<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(area.iter().skip(at)) {
        *to = *from;
    }
    out
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in area.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

fn has_component(s: &CpuState, bit: u64) -> bool {
    u64::from_le_bytes(get(&s.xsave.0, XSTATE_BV)) & bit != 0
}

/// Gives a component its initial values if it has not been used, so that a part can be written.
fn begin_component(s: &mut CpuState, bit: u64, avx_at: usize) {
    if has_component(s, bit) {
        return;
    }
    let area = &mut s.xsave.0;
    match bit {
        X87 => {
            put(area, 0, &[0; 24]);
            put(area, 0, &FCW_INIT.to_le_bytes());
            put(area, 32, &[0; 128]);
        }
        SSE => {
            put(area, 24, &MXCSR_INIT.to_le_bytes());
            put(area, 160, &[0; 256]);
        }
        _ => put(area, avx_at, &[0; 256]),
    }
    let bv = u64::from_le_bytes(get(area, XSTATE_BV)) | bit;
    put(area, XSTATE_BV, &bv.to_le_bytes());
}

/// The tag word, two bits per register, from the form in which FXSAVE keeps it. Intel SDM Vol. 2A,
/// FXSAVE, table "Recreating FSAVE Format".
fn full_tags(area: &[u8]) -> u16 {
    let [there] = get(area, 4);
    let top = u16::from_le_bytes(get(area, 2)) >> 11 & 7;
    (0..8u16).fold(0, |tags, physical| {
        let st = usize::from(physical.wrapping_sub(top) & 7);
        let value = u128::from_le_bytes({
            let mut v: [u8; 16] = get(area, 32 + 16 * st);
            v[10..].fill(0);
            v
        });
        let (exponent, mantissa) = ((value >> 64) as u16 & 0x7fff, value as u64);
        let tag = match (there >> physical & 1, exponent, mantissa) {
            (0, ..) => 3,
            (_, 0, 0) => 1,
            (_, 1..0x7fff, m) if m >> 63 != 0 => 0,
            _ => 2,
        };
        tags | tag << (2 * physical)
    })
}

impl Registers {
    /// The registers of a processor. `avx_at`: where AVX state is in its XSAVE area, if it has AVX.
    pub fn new(arch: Arch, avx_at: Option<usize>) -> Registers {
        let vectors = if arch == Arch::Amd64 { 16 } else { 8 };
        let named = |prefix: &'static str, suffix: &'static str| {
            move |n: usize| format!("{prefix}{n}{suffix}")
        };
        let xmm = named("xmm", "");
        let mut sse: Vec<Register> = (0..vectors)
            .map(|n| register(&xmm(n), 16, "vec128", Field::Xmm(n)))
            .collect();
        sse.push(register("mxcsr", 4, "mxcsr_bits", Field::Mxcsr));
        let mut features = vec![(CORE, core(arch)), (SSE_FEATURE, sse)];
        if arch == Arch::Amd64 {
            let bases = [("fs_base", sreg::FS), ("gs_base", sreg::GS)];
            let bases = bases.map(|(name, n)| register(name, 8, "int64", Field::Base(n)));
            features.push(("org.gnu.gdb.i386.segments", bases.into()));
        }
        if avx_at.is_some() {
            let ymm = named("ymm", "h");
            let high = (0..vectors).map(|n| register(&ymm(n), 16, "uint128", Field::YmmHigh(n)));
            features.push(("org.gnu.gdb.i386.avx", high.collect()));
        }
        features.push(("org.pyrite.system", system(arch)));
        Registers {
            arch,
            features,
            avx_at: avx_at.unwrap_or(0),
        }
    }

    /// The target description.
    pub fn description(&self) -> String {
        let architecture = match self.arch {
            Arch::Amd64 => "i386:x86-64",
            Arch::I386 => "i386",
        };
        let mut xml = format!(
            "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n\
             <target version=\"1.0\"><architecture>{architecture}</architecture>\n"
        );
        for (name, registers) in &self.features {
            xml += &format!("<feature name=\"{name}\">\n");
            match *name {
                CORE => xml += EFLAGS,
                SSE_FEATURE => xml += VECTORS,
                _ => {}
            }
            for r in registers {
                let group = if r.is_float { " group=\"float\"" } else { "" };
                let (name, bits, kind) = (&r.name, r.bytes * 8, r.kind);
                xml +=
                    &format!("<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"{group}/>\n");
            }
            xml += "</feature>\n";
        }
        xml += "</target>\n";
        xml
    }

    fn all(&self) -> impl Iterator<Item = &Register> {
        self.features.iter().flat_map(|(_, r)| r)
    }

    /// All values, one after another.
    pub fn read_all(&self, s: &CpuState) -> Vec<u8> {
        self.all().flat_map(|r| self.value(r, s)).collect()
    }

    /// The value of a register, by number; `None` if there is no such register.
    pub fn read(&self, s: &CpuState, number: usize) -> Option<Vec<u8>> {
        self.all().nth(number).map(|r| self.value(r, s))
    }

    fn value(&self, r: &Register, s: &CpuState) -> Vec<u8> {
        let area = &s.xsave.0;
        let (x87, sse) = (has_component(s, X87), has_component(s, SSE));
        let word = |at: usize| u64::from(u16::from_le_bytes(get(area, at)));
        let dword = |at: usize| u64::from(u32::from_le_bytes(get(area, at)));
        let of_x87 = |value: u64| if x87 { value } else { 0 };
        let plain = match r.field {
            Field::Gpr(n) => s.gpr.get(n).copied().unwrap_or(0),
            Field::Rip => s.rip,
            Field::Flags => s.rflags,
            Field::Selector(n) => s.seg.get(n).map_or(0, |g| g.selector.into()),
            Field::Base(n) => s.seg.get(n).map_or(0, |g| g.base),
            Field::KernelGsBase => s.msrs.kernel_gs_base,
            Field::Cr(0) => s.cr0,
            Field::Cr(2) => s.cr2,
            Field::Cr(3) => s.cr3,
            Field::Cr(4) => s.cr4,
            Field::Cr(_) => s.cr8,
            Field::Efer => s.efer,
            Field::Fctrl if !x87 => FCW_INIT.into(),
            Field::Fctrl => word(0),
            Field::Fstat => of_x87(word(2)),
            Field::Ftag if !x87 => 0xffff,
            Field::Ftag => full_tags(area).into(),
            Field::Fop => of_x87(word(6)),
            Field::Fioff => of_x87(dword(8)),
            Field::Fiseg => of_x87(word(12)),
            Field::Fooff => of_x87(dword(16)),
            Field::Foseg => of_x87(word(20)),
            Field::Mxcsr if !sse && !has_component(s, AVX) => MXCSR_INIT.into(),
            Field::Mxcsr => dword(24),
            Field::St(n) if x87 => return get::<10>(area, 32 + 16 * n).to_vec(),
            Field::Xmm(n) if sse => return get::<16>(area, 160 + 16 * n).to_vec(),
            Field::YmmHigh(n) if has_component(s, AVX) => {
                return get::<16>(area, self.avx_at + 16 * n).to_vec();
            }
            Field::St(_) | Field::Xmm(_) | Field::YmmHigh(_) => return vec![0; r.bytes],
        };
        let mut bytes = plain.to_le_bytes().to_vec();
        bytes.truncate(r.bytes);
        bytes
    }

    /// Changes all registers; says what is wrong with the values otherwise.
    pub fn write_all(&self, s: &mut CpuState, mut bytes: &[u8]) -> Result<(), &'static str> {
        for r in self.all() {
            let (value, rest) = bytes
                .split_at_checked(r.bytes)
                .ok_or("too few bytes for all registers")?;
            if value != self.value(r, s) {
                self.set(r, s, value)?;
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Changes a register; says what is wrong otherwise.
    pub fn write(&self, s: &mut CpuState, number: usize, bytes: &[u8]) -> Result<(), &'static str> {
        let r = self.all().nth(number).ok_or("no such register")?;
        if bytes.len() != r.bytes {
            return Err("a value of another size");
        }
        self.set(r, s, bytes)
    }

    fn set(&self, r: &Register, s: &mut CpuState, bytes: &[u8]) -> Result<(), &'static str> {
        let plain = u64::from_le_bytes(get(bytes, 0));
        let component = match r.field {
            Field::St(_)
            | Field::Fctrl
            | Field::Fstat
            | Field::Ftag
            | Field::Fiseg
            | Field::Fioff
            | Field::Foseg
            | Field::Fooff
            | Field::Fop => Some(X87),
            Field::Xmm(_) | Field::Mxcsr => Some(SSE),
            Field::YmmHigh(_) => Some(AVX),
            _ => None,
        };
        if let Some(bit) = component {
            begin_component(s, bit, self.avx_at);
        }
        let area = &mut s.xsave.0;
        let half = plain as u16;
        match r.field {
            Field::Gpr(n) => {
                if let Some(g) = s.gpr.get_mut(n) {
                    *g = plain;
                }
            }
            Field::Rip => s.rip = plain,
            Field::Flags => s.rflags = s.rflags & !0xffff_ffff | plain | 2,
            Field::Selector(n) => return set_selector(s, n, half),
            Field::Base(n) => {
                if let Some(g) = s.seg.get_mut(n) {
                    g.base = plain;
                }
            }
            Field::KernelGsBase => s.msrs.kernel_gs_base = plain,
            Field::Cr(0) => s.cr0 = plain,
            Field::Cr(2) => s.cr2 = plain,
            Field::Cr(3) => s.cr3 = plain,
            Field::Cr(4) => s.cr4 = plain,
            Field::Cr(_) => return Err("CR8 belongs to the local APIC"),
            Field::Efer => s.efer = plain,
            Field::Fctrl => put(area, 0, &half.to_le_bytes()),
            Field::Fstat => put(area, 2, &half.to_le_bytes()),
            Field::Ftag => {
                let there = (0..8).fold(0u8, |t, n| t | u8::from(half >> (2 * n) & 3 != 3) << n);
                put(area, 4, &[there]);
            }
            Field::Fop => put(area, 6, &half.to_le_bytes()),
            Field::Fioff => put(area, 8, &(plain as u32).to_le_bytes()),
            Field::Fiseg => put(area, 12, &half.to_le_bytes()),
            Field::Fooff => put(area, 16, &(plain as u32).to_le_bytes()),
            Field::Foseg => put(area, 20, &half.to_le_bytes()),
            // Reserved bits would make the processor refuse the whole area.
            Field::Mxcsr => put(area, 24, &(plain as u32 & 0xffff).to_le_bytes()),
            Field::St(n) => put(area, 32 + 16 * n, bytes),
            Field::Xmm(n) => put(area, 160 + 16 * n, bytes),
            Field::YmmHigh(n) => put(area, self.avx_at + 16 * n, bytes),
        }
        Ok(())
    }
}

/// Loads a segment register as real mode does. In other modes a selector stands for a descriptor,
/// which a debugger should not change behind the guest's back.
fn set_selector(s: &mut CpuState, n: usize, selector: u16) -> Result<(), &'static str> {
    let is_real = s.cr0 & cr0::PE == 0;
    let Some(g) = s.seg.get_mut(n) else {
        return Err("no such segment");
    };
    if g.selector == selector {
        return Ok(());
    }
    if !is_real {
        return Err("segment registers can be changed in real mode only");
    }
    *g = Segment {
        base: u64::from(selector) << 4,
        selector,
        ..*g
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(r: &Registers, name: &str) -> usize {
        r.all().position(|x| x.name == name).expect("a register")
    }

    #[test]
    fn every_register_keeps_what_is_written() {
        for (arch, avx_at) in [(Arch::Amd64, Some(576)), (Arch::I386, None)] {
            let registers = Registers::new(arch, avx_at);
            let mut s = CpuState::reset(0, true);
            let count = registers.all().count();
            for n in 0..count {
                let r = registers.all().nth(n).expect("a register");
                let mut value: Vec<u8> = (0..r.bytes).map(|b| (b * 7 + n + 1) as u8).collect();
                match r.field {
                    Field::Cr(8) => {
                        assert!(registers.write(&mut s, n, &value).is_err());
                        continue;
                    }
                    Field::Flags => value[0] |= 2,
                    Field::Ftag => value = vec![0xff, 0xff, 0, 0],
                    Field::Selector(_)
                    | Field::Mxcsr
                    | Field::Fctrl
                    | Field::Fstat
                    | Field::Fiseg
                    | Field::Foseg
                    | Field::Fop => value[2..].fill(0),
                    _ => {}
                }
                // The stack's top is part of the tags.
                if r.field == Field::Fstat {
                    value[1] = 0;
                }
                if matches!(r.field, Field::Cr(0)) {
                    value[0] &= !1;
                }
                registers.write(&mut s, n, &value).expect("writes");
                assert_eq!(registers.read(&s, n), Some(value), "{}", r.name);
            }
            let all = registers.read_all(&s);
            let mut again = CpuState::reset(0, true);
            again.cr8 = s.cr8;
            registers.write_all(&mut again, &all).expect("writes");
            assert_eq!(registers.read_all(&again), all);
            assert!(registers.write_all(&mut again, &all[1..]).is_err());
            assert!(registers.read(&s, count).is_none());
            assert!(registers.write(&mut s, 0, &[0; 3]).is_err());
            assert!(registers.write(&mut s, count, &[0; 4]).is_err());
        }
    }

    #[test]
    fn state_that_was_never_used_has_its_initial_values() {
        let r = Registers::new(Arch::Amd64, Some(576));
        let mut s = CpuState::reset(0, true);
        s.xsave.0.fill(0xa5);
        s.xsave.0[512..520].fill(0);
        let read = |s: &CpuState, name| r.read(s, number(&r, name)).expect("a register");
        assert_eq!(read(&s, "fctrl"), [0x7f, 3, 0, 0]);
        assert_eq!(read(&s, "ftag"), [0xff, 0xff, 0, 0]);
        assert_eq!(read(&s, "mxcsr"), [0x80, 0x1f, 0, 0]);
        assert_eq!(read(&s, "ymm3h"), [0; 16]);
        assert_eq!(read(&s, "st5"), [0; 10]);
        r.write(&mut s, number(&r, "xmm1"), &[7; 16]).unwrap();
        assert_eq!(read(&s, "xmm0"), [0; 16]);
        assert_eq!(read(&s, "xmm1"), [7; 16]);
        assert_eq!(read(&s, "st0"), [0; 10]);
        assert_eq!(s.xsave.0[512], 2);
    }

    #[test]
    fn description_fits_the_mode() {
        let mut s = CpuState::reset(0, true);
        assert_eq!(Arch::of(&s, true), Arch::Amd64);
        assert_eq!(Arch::of(&s, false), Arch::I386);
        s.cr0 |= cr0::PE | cr0::PG;
        assert_eq!(Arch::of(&s, true), Arch::I386);
        s.efer |= efer::LMA;
        assert_eq!(Arch::of(&s, true), Arch::Amd64);
        let xml = Registers::new(Arch::I386, None).description();
        assert!(xml.contains("<architecture>i386<") && !xml.contains("rip"));
        let r = Registers::new(Arch::Amd64, None);
        // The order that debuggers know without a description.
        for (n, name) in ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8"]
            .into_iter()
            .enumerate()
        {
            assert_eq!(number(&r, name), n);
        }
        assert_eq!(number(&r, "rip"), 16);
    }

    #[test]
    fn selectors_change_in_real_mode_only() {
        let r = Registers::new(Arch::I386, None);
        let ds = number(&r, "ds");
        let mut s = CpuState::reset(0, true);
        r.write(&mut s, ds, &[0x34, 0x12, 0, 0]).unwrap();
        assert_eq!(s.seg[sreg::DS].base, 0x12340);
        s.cr0 |= cr0::PE;
        assert!(r.write(&mut s, ds, &[0x10, 0, 0, 0]).is_err());
        r.write(&mut s, ds, &[0x34, 0x12, 0, 0]).unwrap();
    }

    #[test]
    fn tags_tell_what_registers_hold() {
        let mut s = CpuState::reset(0, true);
        let area = &mut s.xsave.0;
        // TOP = 6: ST0 is register 6, ST1 is register 7, ST2 is register 0.
        put(area, 2, &(6u16 << 11).to_le_bytes());
        put(area, 4, &[0b1100_0001]);
        put(area, 32, &[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        put(area, 48, &[0; 10]);
        put(area, 64, &[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f]);
        assert_eq!(full_tags(area), 0b01_00_11_11_11_11_11_10);
    }
}
