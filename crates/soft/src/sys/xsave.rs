//! FXSAVE, FXRSTOR and the XSAVE family: between the guest's images and the state in the frame.
//! Intel SDM Vol. 1 chapter 13, Vol. 2 (each instruction).
//!
//! The frame's area is in the host's standard format. Where its XSTATE_BV has a bit clear, the
//! component is in its initial configuration and the bytes of the area mean nothing.

use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic};
use pyrite_x86::bits::{cr0, cr4, efer};
use pyrite_x86::{XSAVE_AREA_BYTES, gpr, sreg};

use crate::exception::Exception;
use crate::interp::native::x87;
use crate::interp::operand;
use crate::mmu::Priv;
use crate::sys::control::require_cpl0;
use crate::sys::cpuid::{Reg, feature_at};
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

const LEGACY_BYTES: usize = 512;
const HEADER_BYTES: usize = 64;
const EXTENDED_AT: usize = LEGACY_BYTES + HEADER_BYTES;
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// XCOMP_BV bit 63: compacted format.
const COMPACTED: u64 = 1 << 63;
const MXCSR_INIT: u32 = 0x1f80;
const MXCSR_AT: usize = 24;
const XMM_AT: usize = 160;
/// Largest image: all components of the standard format plus alignment.
const IMAGE_MAX: usize = 2 * XSAVE_AREA_BYTES;

/// Where extended component `n` lies.
#[derive(Clone, Copy)]
struct Component {
    size: usize,
    /// In the frame's area (the host's standard format).
    host_at: usize,
    /// In the guest's standard format.
    at: usize,
    /// Aligned to 64 bytes in the compacted format.
    aligned: bool,
}

/// Size and offset of the host's components. CPUID is slow where the host is itself a guest.
fn host_layout() -> &'static [(usize, usize); 64] {
    static LAYOUT: OnceLock<[(usize, usize); 64]> = OnceLock::new();
    LAYOUT.get_or_init(|| {
        let mut all = [(0, 0); 64];
        for (n, c) in (0u32..63).zip(all.iter_mut()).skip(2) {
            let r = std::arch::x86_64::__cpuid_count(0xd, n);
            *c = (r.eax as usize, r.ebx as usize);
        }
        all
    })
}

/// Component `n` (2-62) if this VM has it.
fn component(v: &SoftVcpu, n: u32) -> Option<Component> {
    let e = v.vm.cpuid.get(0xd, n).filter(|e| e.indexed && e.eax != 0)?;
    let (host_size, host_at) = host_layout()[n as usize];
    let (size, at) = (e.eax as usize, e.ebx as usize);
    let fits = |at: usize| at >= EXTENDED_AT && at + size <= XSAVE_AREA_BYTES;
    // Supervisor components (ECX bit 0) have no place in the standard format.
    (size <= host_size && fits(at) && fits(host_at) && e.ecx & 1 == 0).then_some(Component {
        size,
        host_at,
        at,
        aligned: e.ecx & 2 != 0,
    })
}

/// Extended components in `mask`, lowest first.
fn bits(mask: u64) -> impl Iterator<Item = u32> {
    (2..63).filter(move |n| mask >> n & 1 != 0)
}

/// Bytes of a standard image of the components in `mask`.
pub fn standard_size(v: &SoftVcpu, mask: u64) -> u32 {
    bits(mask)
        .filter_map(|n| component(v, n))
        .map(|c| c.at + c.size)
        .fold(EXTENDED_AT, usize::max) as u32
}

/// Bytes of a compacted image of the components in `mask`.
pub fn compacted_size(v: &SoftVcpu, mask: u64) -> u32 {
    compacted_layout(v, mask).1 as u32
}

/// Offsets in a compacted image: (component number, component with `at` replaced), total.
fn compacted_layout(v: &SoftVcpu, mask: u64) -> (Vec<(u32, Component)>, usize) {
    let mut at = EXTENDED_AT;
    let mut all = Vec::new();
    for n in bits(mask) {
        let Some(c) = component(v, n) else { continue };
        if c.aligned {
            at = at.next_multiple_of(64);
        }
        all.push((n, Component { at, ..c }));
        at += c.size;
    }
    (all, at)
}

fn standard_layout(v: &SoftVcpu, mask: u64) -> (Vec<(u32, Component)>, usize) {
    let all: Vec<_> = bits(mask)
        .filter_map(|n| component(v, n).map(|c| (n, c)))
        .collect();
    let end = all
        .iter()
        .map(|(_, c)| c.at + c.size)
        .fold(EXTENDED_AT, usize::max);
    (all, end)
}

/// Components that XCR0 may enable. Intel SDM Vol. 1 §13.3.
pub fn supported(v: &SoftVcpu) -> u64 {
    let claimed =
        v.vm.cpuid
            .get(0xd, 0)
            .map_or(X87, |e| u64::from(e.eax) | u64::from(e.edx) << 32);
    bits(claimed)
        .filter(|&n| component(v, n).is_some())
        .fold(claimed & (X87 | SSE), |m, n| m | 1 << n)
}

/// Components in use: not in their initial configuration.
fn in_use(v: &SoftVcpu) -> u64 {
    get64(&v.frame.cpu.xsave.0, LEGACY_BYTES)
}

fn set_in_use(v: &mut SoftVcpu, mask: u64) {
    put64(&mut v.frame.cpu.xsave.0, LEGACY_BYTES, mask);
}

fn get64(b: &[u8], at: usize) -> u64 {
    let mut x = [0; 8];
    x.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(x)
}

fn put64(b: &mut [u8], at: usize, value: u64) {
    b[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn mxcsr(b: &[u8]) -> u32 {
    get64(b, MXCSR_AT) as u32
}

/// MXCSR_MASK as the host reports it: reserved bits are those that are clear.
fn mxcsr_mask(v: &SoftVcpu) -> u32 {
    v.interp.native.mxcsr_mask()
}

fn xmm_bytes(v: &SoftVcpu) -> usize {
    if v.long64() { 256 } else { 128 }
}

/// Bytes of extended component `n`, of `size`, that the mode reaches: outside 64-bit mode there are
/// registers 0 to 7 only. Intel SDM Vol. 1 §13.5.3, §13.5.5.
fn reach(v: &SoftVcpu, n: u32, size: usize) -> usize {
    match n {
        _ if v.long64() => size,
        2 | 6 => size / 2,
        7 => 0,
        _ => size,
    }
}

/// Writes the x87 part of an image.
fn copy_x87(v: &SoftVcpu, image: &mut [u8]) {
    let a = &v.frame.cpu.xsave.0;
    if in_use(v) & X87 != 0 {
        image[..MXCSR_AT].copy_from_slice(&a[..MXCSR_AT]);
        image[32..XMM_AT].copy_from_slice(&a[32..XMM_AT]);
    } else {
        // As after FNINIT: FCW = 037FH, all else 0.
        image[..MXCSR_AT].fill(0);
        image[32..XMM_AT].fill(0);
        image[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }
}

fn copy_xmm(v: &SoftVcpu, image: &mut [u8]) {
    let n = xmm_bytes(v);
    if in_use(v) & SSE != 0 {
        image[XMM_AT..XMM_AT + n].copy_from_slice(&v.frame.cpu.xsave.0[XMM_AT..XMM_AT + n]);
    } else {
        image[XMM_AT..XMM_AT + n].fill(0);
    }
}

fn copy_mxcsr(v: &SoftVcpu, image: &mut [u8]) {
    image[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&v.frame.cpu.xsave.0[MXCSR_AT..MXCSR_AT + 4]);
    image[MXCSR_AT + 4..32].copy_from_slice(&mxcsr_mask(v).to_le_bytes());
}

fn set_mxcsr(v: &mut SoftVcpu, value: u32) {
    v.frame.cpu.xsave.0[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&value.to_le_bytes());
}

fn load_x87(v: &mut SoftVcpu, image: &[u8]) {
    let a = &mut v.frame.cpu.xsave.0;
    a[..MXCSR_AT].copy_from_slice(&image[..MXCSR_AT]);
    a[32..XMM_AT].copy_from_slice(&image[32..XMM_AT]);
    let used = in_use(v) | X87;
    set_in_use(v, used);
    x87::settle(v);
}

fn load_xmm(v: &mut SoftVcpu, image: &[u8]) {
    let n = xmm_bytes(v);
    if in_use(v) & SSE == 0 {
        // XMM8-15 stay initial outside 64-bit mode.
        v.frame.cpu.xsave.0[XMM_AT..XMM_AT + 256].fill(0);
    }
    v.frame.cpu.xsave.0[XMM_AT..XMM_AT + n].copy_from_slice(&image[XMM_AT..XMM_AT + n]);
    let used = in_use(v) | SSE;
    set_in_use(v, used);
}

/// FXSAVE and FXRSTOR. Intel SDM Vol. 2A.
pub fn fx(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let c = &v.frame.cpu;
    if c.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Exception::NM);
    }
    let fast = c.efer & efer::FFXSR != 0 && v.long64() && c.cpl() == 0;
    let save = matches!(i.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64);
    // Bytes 464-511 are software's.
    const USED: usize = 464;
    let access = if save {
        SegAccess::Write
    } else {
        SegAccess::Read
    };
    let lin = v.linear(
        operand::segment(i),
        operand::offset(v, i),
        LEGACY_BYTES,
        access,
    )?;
    if lin & 15 != 0 {
        return Err(Exception::gp(0));
    }
    let sse = v.frame.cpu.cr4 & cr4::OSFXSR != 0;
    let mut image = [0u8; USED];
    if save {
        v.probe_write(lin, LEGACY_BYTES, Priv::Current)?;
        v.read_bytes(lin, &mut image, Priv::Current)?;
        copy_x87(v, &mut image);
        copy_mxcsr(v, &mut image);
        if !fast {
            copy_xmm(v, &mut image);
        }
        return v.write_bytes(lin, &image, Priv::Current);
    }
    v.read_bytes(lin, &mut image, Priv::Current)?;
    let new = mxcsr(&image);
    if new & !mxcsr_mask(v) != 0 {
        return Err(Exception::gp(0));
    }
    load_x87(v, &image);
    if sse || v.long64() {
        set_mxcsr(v, new);
        if !fast {
            load_xmm(v, &image);
        }
    }
    Ok(())
}

/// #UD, #NM of the XSAVE family.
fn require_xsave(v: &SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    if v.frame.cpu.cr0 & cr0::TS != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

/// EDX:EAX, the instruction mask.
fn instruction_mask(v: &SoftVcpu) -> u64 {
    let g = &v.frame.cpu.gpr;
    g[gpr::RAX] & 0xffff_ffff | g[gpr::RDX] << 32
}

fn area_address(v: &SoftVcpu, i: &Instruction, len: usize, a: SegAccess) -> Result<u64, Exception> {
    let (seg, offset) = (operand::segment(i), operand::offset(v, i));
    let fault = match v.linear(seg, offset, len, a) {
        Ok(lin) if lin & 63 == 0 => return Ok(lin),
        Ok(_) => Exception::gp(0),
        Err(e) => e,
    };
    // The #GP of a misaligned area comes before the #SS of one beyond the limit.
    let base = if v.long64() && seg < sreg::FS {
        0
    } else {
        v.frame.cpu.seg[seg].base
    };
    if base.wrapping_add(offset) & 63 != 0 {
        return Err(Exception::gp(0));
    }
    Err(fault)
}

/// Feature bit of leaf 0DH.1 EAX that an instruction needs.
fn has_form(v: &SoftVcpu, m: Mnemonic) -> bool {
    match m {
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => feature_at(v, 0xd, 1, Reg::Eax, 0),
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => feature_at(v, 0xd, 1, Reg::Eax, 1),
        Mnemonic::Xsaves | Mnemonic::Xsaves64 | Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
            feature_at(v, 0xd, 1, Reg::Eax, 3)
        }
        _ => true,
    }
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES. Intel SDM Vol. 1 §13.7-13.11.
pub fn xsave(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let m = i.mnemonic();
    if !has_form(v, m) {
        return Err(Exception::UD);
    }
    require_xsave(v)?;
    let supervisor = matches!(m, Mnemonic::Xsaves | Mnemonic::Xsaves64);
    if supervisor {
        require_cpl0(v)?;
    }
    let compact = supervisor || matches!(m, Mnemonic::Xsavec | Mnemonic::Xsavec64);
    let init_skip = compact || matches!(m, Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    let rfbm = v.frame.cpu.xcr0 & instruction_mask(v);
    let (parts, end) = if compact {
        compacted_layout(v, rfbm)
    } else {
        standard_layout(v, rfbm)
    };
    let lin = area_address(v, i, end, SegAccess::Write)?;
    let mut used = in_use(v);
    // MXCSR belongs to SSE in the compacted format.
    let mxcsr_now = mxcsr(&v.frame.cpu.xsave.0);
    if compact && mxcsr_now != MXCSR_INIT {
        used |= SSE;
    }
    let written = if init_skip { rfbm & used } else { rfbm };
    // Bytes that the instruction does not write keep what they were: the image starts from memory.
    let mut image = [0u8; IMAGE_MAX];
    let image = &mut image[..end.min(IMAGE_MAX)];
    probe_range(v, lin, image.len())?;
    read_range(v, lin, image)?;
    if written & X87 != 0 {
        copy_x87(v, image);
    }
    let with_mxcsr = if compact {
        written & SSE != 0
    } else {
        rfbm & (SSE | AVX) != 0
    };
    if with_mxcsr {
        copy_mxcsr(v, image);
    }
    if written & SSE != 0 {
        copy_xmm(v, image);
    }
    for (n, c) in parts {
        if written >> n & 1 == 0 {
            continue;
        }
        let size = reach(v, n, c.size);
        let out = &mut image[c.at..c.at + size];
        if in_use(v) >> n & 1 != 0 {
            out.copy_from_slice(&v.frame.cpu.xsave.0[c.host_at..c.host_at + size]);
        } else {
            out.fill(0);
        }
    }
    if compact {
        put64(image, LEGACY_BYTES, rfbm & used);
        put64(image, LEGACY_BYTES + 8, rfbm | COMPACTED);
    } else {
        let old = get64(image, LEGACY_BYTES);
        put64(image, LEGACY_BYTES, old & !rfbm | rfbm & used);
    }
    write_range(v, lin, image)
}

/// The pages of a range can be written. In chunks, as one access spans two pages at most.
fn probe_range(v: &mut SoftVcpu, lin: u64, len: usize) -> Result<(), Exception> {
    for at in (0..len).step_by(1024) {
        let n = (len - at).min(1024);
        v.probe_write(lin.wrapping_add(at as u64), n, Priv::Current)?;
    }
    Ok(())
}

fn read_range(v: &mut SoftVcpu, lin: u64, out: &mut [u8]) -> Result<(), Exception> {
    for (n, part) in out.chunks_mut(1024).enumerate() {
        v.read_bytes(lin.wrapping_add(1024 * n as u64), part, Priv::Current)?;
    }
    Ok(())
}

fn write_range(v: &mut SoftVcpu, lin: u64, data: &[u8]) -> Result<(), Exception> {
    for (n, part) in data.chunks(1024).enumerate() {
        v.write_bytes(lin.wrapping_add(1024 * n as u64), part, Priv::Current)?;
    }
    Ok(())
}

/// XRSTOR, XRSTORS. Intel SDM Vol. 1 §13.8, §13.12.
pub fn xrstor(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let m = i.mnemonic();
    if !has_form(v, m) {
        return Err(Exception::UD);
    }
    require_xsave(v)?;
    let supervisor = matches!(m, Mnemonic::Xrstors | Mnemonic::Xrstors64);
    if supervisor {
        require_cpl0(v)?;
    }
    let xcr0 = v.frame.cpu.xcr0;
    let rfbm = xcr0 & instruction_mask(v);
    let lin = area_address(v, i, EXTENDED_AT, SegAccess::Read)?;
    let mut image = [0u8; IMAGE_MAX];
    read_range(v, lin, &mut image[..EXTENDED_AT])?;
    let xstate_bv = get64(&image, LEGACY_BYTES);
    let xcomp_bv = get64(&image, LEGACY_BYTES + 8);
    let compact = check_header(v, &image, xstate_bv, xcomp_bv, supervisor)?;
    let (parts, end) = if compact {
        compacted_layout(v, xcomp_bv & !COMPACTED)
    } else {
        standard_layout(v, rfbm)
    };
    let lin = area_address(v, i, end, SegAccess::Read)?;
    read_range(v, lin, &mut image[..end.min(IMAGE_MAX)])?;

    let load = rfbm & xstate_bv;
    // MXCSR: in the compacted format it goes with SSE, in the standard format with the mask.
    let new_mxcsr = match (compact, rfbm & SSE != 0, load & SSE != 0) {
        (true, _, true) => Some(mxcsr(&image)),
        (true, true, false) => Some(MXCSR_INIT),
        (true, false, false) => None,
        (false, ..) => (rfbm & (SSE | AVX) != 0).then(|| mxcsr(&image)),
    };
    if new_mxcsr.is_some_and(|x| x & !mxcsr_mask(v) != 0) {
        return Err(Exception::gp(0));
    }
    if let Some(x) = new_mxcsr {
        set_mxcsr(v, x);
    }
    if load & X87 != 0 {
        load_x87(v, &image);
    }
    if load & SSE != 0 {
        load_xmm(v, &image);
    } else if rfbm & SSE != 0 && !v.long64() && in_use(v) & SSE != 0 {
        // Only XMM0-7 are reached outside 64-bit mode.
        v.frame.cpu.xsave.0[XMM_AT..XMM_AT + 128].fill(0);
    }
    for (n, c) in parts {
        if load >> n & 1 != 0 {
            let size = reach(v, n, c.size);
            let here = c.host_at..c.host_at + c.size;
            if size < c.size && in_use(v) >> n & 1 == 0 {
                v.frame.cpu.xsave.0[here].fill(0);
            }
            v.frame.cpu.xsave.0[c.host_at..c.host_at + size]
                .copy_from_slice(&image[c.at..c.at + size]);
        }
    }
    // What is in the mask but not in the image becomes initial; what the mode does not reach stays.
    let mut used = in_use(v) & !rfbm | load;
    if !v.long64() {
        for n in bits(rfbm & !load & in_use(v)) {
            if let Some(c) = component(v, n)
                && reach(v, n, c.size) < c.size
            {
                let size = reach(v, n, c.size);
                v.frame.cpu.xsave.0[c.host_at..c.host_at + size].fill(0);
                used |= 1 << n;
            }
        }
        used |= in_use(v) & rfbm & !load & SSE;
    }
    set_in_use(v, used);
    Ok(())
}

/// Header checks. True = compacted format.
fn check_header(
    v: &SoftVcpu,
    image: &[u8],
    xstate_bv: u64,
    xcomp_bv: u64,
    supervisor: bool,
) -> Result<bool, Exception> {
    let gp = Err(Exception::gp(0));
    let allowed = v.frame.cpu.xcr0 | if supervisor { v.frame.cpu.xss } else { 0 };
    let zero = |from: usize, to: usize| image[from..to].iter().all(|&b| b == 0);
    if xcomp_bv & COMPACTED == 0 {
        // XRSTORS knows only the compacted format; bytes 23:8 of the header must be 0.
        let bad = supervisor || xstate_bv & !allowed != 0 || !zero(520, 536);
        return if bad { gp } else { Ok(false) };
    }
    let has_compact = feature_at(v, 0xd, 1, Reg::Eax, 1);
    let components = xcomp_bv & !COMPACTED;
    let bad = !has_compact
        || components & !allowed != 0
        || xstate_bv & !components != 0
        || !zero(528, EXTENDED_AT);
    if bad { gp } else { Ok(true) }
}

/// XGETBV.
pub fn xgetbv(v: &mut SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let value = match v.frame.cpu.gpr[gpr::RCX] as u32 {
        0 => v.frame.cpu.xcr0,
        1 if feature_at(v, 0xd, 1, Reg::Eax, 2) => {
            let sse = mxcsr(&v.frame.cpu.xsave.0) != MXCSR_INIT;
            v.frame.cpu.xcr0 & (in_use(v) | if sse { SSE } else { 0 })
        }
        _ => return Err(Exception::gp(0)),
    };
    v.frame.cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    v.frame.cpu.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

/// XSETBV. Intel SDM Vol. 2D; Vol. 1 §13.3 for the combinations.
pub fn xsetbv(v: &mut SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    require_cpl0(v)?;
    let new = instruction_mask(v);
    const AVX512: u64 = 0xe0;
    const MPX: u64 = 0x18;
    let bad = v.frame.cpu.gpr[gpr::RCX] as u32 != 0
        || new & X87 == 0
        || new & !supported(v) != 0
        || (new & AVX != 0 && new & SSE == 0)
        || (new & AVX512 != 0 && (new & AVX512 != AVX512 || new & AVX == 0))
        || (new & MPX != 0 && new & MPX != MPX);
    if bad {
        return Err(Exception::gp(0));
    }
    v.frame.cpu.xcr0 = new;
    Ok(())
}

const PKRU: u32 = 9;

/// PKRU. Intel SDM Vol. 3A §4.6.2.
pub fn pkru(v: &SoftVcpu) -> u32 {
    match component(v, PKRU) {
        Some(c) if in_use(v) >> PKRU & 1 != 0 => get64(&v.frame.cpu.xsave.0, c.host_at) as u32,
        _ => 0,
    }
}

/// Sets PKRU.
pub fn set_pkru(v: &mut SoftVcpu, value: u32) {
    if let Some(c) = component(v, PKRU) {
        v.frame.cpu.xsave.0[c.host_at..c.host_at + 4].copy_from_slice(&value.to_le_bytes());
        let used = in_use(v) & !(1 << PKRU) | u64::from(value != 0) << PKRU;
        set_in_use(v, used);
        v.flush_tlb(false);
    }
}
