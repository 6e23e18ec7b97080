//! The saved form of [`CpuState`]: a section of kind `vcpu`.
//!
//! A saved state is hostile input. [`load`] accepts only states that a processor can be in, as far
//! as an engine relies on it: canonical addresses, no reserved bits in control registers, modes
//! that fit together. What it accepts, an engine may still refuse (a feature that it lacks), but
//! must not be harmed by.

use minicbor::{Decode, Encode};
use pyrite_state::{Section, StateError};
use pyrite_x86::bits::{cr0, cr4, efer, rflags};
use pyrite_x86::{
    Activity, ApicState, CpuState, InterruptShadow, Msrs, PendingEvent, Segment, TableReg,
    XSAVE_AREA_BYTES, XsaveArea, sreg,
};

/// Kind of the section.
pub const KIND: &str = "vcpu";
/// Version of the saved form that this program writes.
pub const VERSION: u16 = 1;

#[derive(Clone, Copy, Encode, Decode)]
#[cbor(map)]
struct SavedSegment {
    #[n(0)]
    base: u64,
    #[n(1)]
    limit: u32,
    #[n(2)]
    attr: u32,
    #[n(3)]
    selector: u16,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedTable {
    #[n(0)]
    base: u64,
    #[n(1)]
    limit: u32,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedEvent {
    #[n(0)]
    vector: u8,
    #[n(1)]
    error_code: Option<u32>,
    #[n(2)]
    software: bool,
    #[n(3)]
    external: bool,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedMsrs {
    #[n(0)]
    star: u64,
    #[n(1)]
    lstar: u64,
    #[n(2)]
    cstar: u64,
    #[n(3)]
    sfmask: u64,
    #[n(4)]
    kernel_gs_base: u64,
    #[n(5)]
    sysenter_cs: u64,
    #[n(6)]
    sysenter_esp: u64,
    #[n(7)]
    sysenter_eip: u64,
    #[n(8)]
    tsc_aux: u64,
    #[n(9)]
    tsc_adjust: u64,
    #[n(10)]
    apic_base: u64,
    #[n(11)]
    pat: u64,
    #[n(12)]
    misc_enable: u64,
    #[n(13)]
    spec_ctrl: u64,
    #[n(14)]
    debugctl: u64,
    #[n(15)]
    mtrr_def_type: u64,
    #[n(16)]
    mtrr_var: [u64; 16],
    #[n(17)]
    mtrr_fixed: [u64; 11],
    #[n(18)]
    bios_sign_id: u64,
    #[n(19)]
    mcg_status: u64,
    #[n(20)]
    kvm_wall_clock: u64,
    #[n(21)]
    kvm_system_time: u64,
    #[n(22)]
    kvm_poll_control: u64,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedVcpu {
    #[n(0)]
    gpr: [u64; 16],
    #[n(1)]
    rip: u64,
    #[n(2)]
    rflags: u64,
    #[n(3)]
    cr0: u64,
    #[n(4)]
    cr2: u64,
    #[n(5)]
    cr3: u64,
    #[n(6)]
    cr4: u64,
    #[n(7)]
    cr8: u64,
    #[n(8)]
    efer: u64,
    #[n(9)]
    xcr0: u64,
    #[n(10)]
    xss: u64,
    #[n(11)]
    seg: [SavedSegment; 6],
    #[n(12)]
    ldtr: SavedSegment,
    #[n(13)]
    tr: SavedSegment,
    #[n(14)]
    gdtr: SavedTable,
    #[n(15)]
    idtr: SavedTable,
    #[n(16)]
    dr: [u64; 8],
    #[n(17)]
    pdpte: [u64; 4],
    #[n(18)]
    msrs: SavedMsrs,
    #[n(19)]
    tsc: u64,
    #[n(20)]
    activity: u8,
    #[n(21)]
    interrupt_shadow: u8,
    #[n(22)]
    nmi_blocked: bool,
    #[n(23)]
    nmi_pending: bool,
    #[n(24)]
    sipi_pending: Option<u8>,
    #[n(25)]
    pending_event: Option<SavedEvent>,
    #[cbor(n(26), with = "minicbor::bytes")]
    apic_regs: Vec<u8>,
    #[n(27)]
    apic_tsc_deadline: u64,
    #[n(28)]
    apic_timer_start_ns: u64,
    #[cbor(n(29), with = "minicbor::bytes")]
    xsave: Vec<u8>,
}

fn save_segment(s: &Segment) -> SavedSegment {
    let Segment {
        base,
        limit,
        attr,
        selector,
        reserved: _,
    } = *s;
    SavedSegment {
        base,
        limit,
        attr,
        selector,
    }
}

fn load_segment(s: &SavedSegment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        attr: s.attr,
        selector: s.selector,
        reserved: [0; 3],
    }
}

fn save_msrs(m: &Msrs) -> SavedMsrs {
    // Exhaustive: a new field cannot be forgotten.
    let Msrs {
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        tsc_aux,
        tsc_adjust,
        apic_base,
        pat,
        misc_enable,
        spec_ctrl,
        debugctl,
        mtrr_def_type,
        mtrr_var,
        mtrr_fixed,
        bios_sign_id,
        mcg_status,
        kvm_wall_clock,
        kvm_system_time,
        kvm_poll_control,
    } = *m;
    SavedMsrs {
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        tsc_aux,
        tsc_adjust,
        apic_base,
        pat,
        misc_enable,
        spec_ctrl,
        debugctl,
        mtrr_def_type,
        mtrr_var,
        mtrr_fixed,
        bios_sign_id,
        mcg_status,
        kvm_wall_clock,
        kvm_system_time,
        kvm_poll_control,
    }
}

fn load_msrs(m: &SavedMsrs) -> Msrs {
    Msrs {
        star: m.star,
        lstar: m.lstar,
        cstar: m.cstar,
        sfmask: m.sfmask,
        kernel_gs_base: m.kernel_gs_base,
        sysenter_cs: m.sysenter_cs,
        sysenter_esp: m.sysenter_esp,
        sysenter_eip: m.sysenter_eip,
        tsc_aux: m.tsc_aux,
        tsc_adjust: m.tsc_adjust,
        apic_base: m.apic_base,
        pat: m.pat,
        misc_enable: m.misc_enable,
        spec_ctrl: m.spec_ctrl,
        debugctl: m.debugctl,
        mtrr_def_type: m.mtrr_def_type,
        mtrr_var: m.mtrr_var,
        mtrr_fixed: m.mtrr_fixed,
        bios_sign_id: m.bios_sign_id,
        mcg_status: m.mcg_status,
        kvm_wall_clock: m.kvm_wall_clock,
        kvm_system_time: m.kvm_system_time,
        kvm_poll_control: m.kvm_poll_control,
    }
}

/// The section of the vCPU called `unit`.
pub fn save(unit: &str, state: &CpuState) -> Section {
    let CpuState {
        gpr,
        rip,
        rflags,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        xcr0,
        xss,
        seg,
        ldtr,
        tr,
        gdtr,
        idtr,
        dr,
        pdpte,
        msrs,
        tsc,
        activity,
        interrupt_shadow,
        nmi_blocked,
        nmi_pending,
        sipi_pending,
        pending_event,
        apic,
        xsave,
    } = state;
    let body = SavedVcpu {
        gpr: *gpr,
        rip: *rip,
        rflags: *rflags,
        cr0: *cr0,
        cr2: *cr2,
        cr3: *cr3,
        cr4: *cr4,
        cr8: *cr8,
        efer: *efer,
        xcr0: *xcr0,
        xss: *xss,
        seg: seg.each_ref().map(save_segment),
        ldtr: save_segment(ldtr),
        tr: save_segment(tr),
        gdtr: SavedTable {
            base: gdtr.base,
            limit: gdtr.limit,
        },
        idtr: SavedTable {
            base: idtr.base,
            limit: idtr.limit,
        },
        dr: *dr,
        pdpte: *pdpte,
        msrs: save_msrs(msrs),
        tsc: *tsc,
        activity: *activity as u8,
        interrupt_shadow: *interrupt_shadow as u8,
        nmi_blocked: *nmi_blocked,
        nmi_pending: *nmi_pending,
        sipi_pending: *sipi_pending,
        pending_event: pending_event.map(|p| SavedEvent {
            vector: p.vector,
            error_code: p.error_code,
            software: p.software,
            external: p.external,
        }),
        apic_regs: apic.regs.iter().flat_map(|r| r.to_le_bytes()).collect(),
        apic_tsc_deadline: apic.tsc_deadline,
        apic_timer_start_ns: apic.timer_start_ns,
        xsave: xsave.0.to_vec(),
    };
    Section::new(unit, KIND, VERSION, &body)
}

/// The state in a section, checked. `features` bounds XCR0 and XSS: the XSAVE components of the
/// vCPU's CPUID (leaf 0DH).
pub fn load(section: &Section, features: u64) -> Result<CpuState, StateError> {
    let b: SavedVcpu = section.decode(KIND, VERSION)?;
    let invalid = |detail: String| StateError::Invalid {
        unit: section.unit.clone(),
        detail,
    };
    let mut apic = ApicState {
        tsc_deadline: b.apic_tsc_deadline,
        timer_start_ns: b.apic_timer_start_ns,
        ..ApicState::default()
    };
    if b.apic_regs.len() != apic.regs.len() * 4 {
        return Err(invalid(format!(
            "{} bytes of APIC registers",
            b.apic_regs.len()
        )));
    }
    for (reg, bytes) in apic.regs.iter_mut().zip(b.apic_regs.chunks_exact(4)) {
        *reg = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    let area: [u8; XSAVE_AREA_BYTES] = b
        .xsave
        .as_slice()
        .try_into()
        .map_err(|_| invalid(format!("{} bytes of XSAVE area", b.xsave.len())))?;
    let state = CpuState {
        gpr: b.gpr,
        rip: b.rip,
        rflags: b.rflags,
        cr0: b.cr0,
        cr2: b.cr2,
        cr3: b.cr3,
        cr4: b.cr4,
        cr8: b.cr8,
        efer: b.efer,
        xcr0: b.xcr0,
        xss: b.xss,
        seg: b.seg.each_ref().map(load_segment),
        ldtr: load_segment(&b.ldtr),
        tr: load_segment(&b.tr),
        gdtr: TableReg {
            base: b.gdtr.base,
            limit: b.gdtr.limit,
            reserved: 0,
        },
        idtr: TableReg {
            base: b.idtr.base,
            limit: b.idtr.limit,
            reserved: 0,
        },
        dr: b.dr,
        pdpte: b.pdpte,
        msrs: load_msrs(&b.msrs),
        tsc: b.tsc,
        activity: match b.activity {
            0 => Activity::Running,
            1 => Activity::Halted,
            2 => Activity::WaitForSipi,
            3 => Activity::Shutdown,
            n => return Err(invalid(format!("activity {n}"))),
        },
        interrupt_shadow: match b.interrupt_shadow {
            0 => InterruptShadow::None,
            1 => InterruptShadow::Sti,
            2 => InterruptShadow::MovSs,
            n => return Err(invalid(format!("interrupt shadow {n}"))),
        },
        nmi_blocked: b.nmi_blocked,
        nmi_pending: b.nmi_pending,
        sipi_pending: b.sipi_pending,
        pending_event: b.pending_event.map(|p| PendingEvent {
            vector: p.vector,
            error_code: p.error_code,
            software: p.software,
            external: p.external,
        }),
        apic,
        xsave: XsaveArea(area),
    };
    check(&state, features).map_err(invalid)?;
    Ok(state)
}

const CR4_KNOWN: u64 = 0x7f_ffff | cr4::PKE | 1 << 23 | 1 << 24 | 1 << 28;
const EFER_KNOWN: u64 = efer::SCE
    | efer::LME
    | efer::LMA
    | efer::NXE
    | efer::SVME
    | efer::FFXSR
    | efer::AUTOIBRS
    | 1 << 13
    | 1 << 15;
const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// x87, SSE, AVX, AVX-512 (3), PKRU: the components that fit into the area.
const XCR0_KNOWN: u64 = 0x2e7;

/// Canonical for the paging in use. Intel SDM Vol. 1 §3.3.7.1.
fn canonical(a: u64, la57: bool) -> bool {
    let unused = if la57 { 7 } else { 16 };
    ((a << unused) as i64 >> unused) as u64 == a
}

/// Why a processor cannot be in this state.
pub fn check(s: &CpuState, features: u64) -> Result<(), String> {
    check_control(s)?;
    check_addresses(s)?;
    check_segments(s)?;
    check_xsave(s, features)?;
    check_events(s)
}

fn check_control(s: &CpuState) -> Result<(), String> {
    let no = |name: &str, v: u64| Err(format!("{name} {v:#x} has reserved or impossible bits"));
    let (pe, pg) = (s.cr0 & cr0::PE != 0, s.cr0 & cr0::PG != 0);
    if s.cr0 & !CR0_KNOWN != 0 || (pg && !pe) || (s.cr0 & cr0::NW != 0 && s.cr0 & cr0::CD == 0) {
        return no("CR0", s.cr0);
    }
    if s.cr4 & !CR4_KNOWN != 0 || s.cr4 & (cr4::VMXE | cr4::SMXE) != 0 {
        return no("CR4", s.cr4);
    }
    if s.cr8 > 15 {
        return no("CR8", s.cr8);
    }
    let lma = s.efer & efer::LMA != 0;
    // Intel SDM Vol. 3A §4.1.1: long mode is active exactly if LME and PG are set, with PAE.
    if s.efer & !EFER_KNOWN != 0
        || lma != (s.efer & efer::LME != 0 && pg)
        || (lma && s.cr4 & cr4::PAE == 0)
    {
        return no("EFER", s.efer);
    }
    if s.cr4 & cr4::PCIDE != 0 && !lma {
        return no("CR4 (PCIDE outside long mode)", s.cr4);
    }
    if s.cr3 >> 52 != 0 || (!lma && s.cr3 >> 32 != 0) {
        return no("CR3", s.cr3);
    }
    if s.rflags & !rflags::ALL != 0 || s.rflags & rflags::FIXED1 == 0 {
        return no("RFLAGS", s.rflags);
    }
    if s.rflags & rflags::VM != 0 && (!pe || lma && s.seg[sreg::CS].l()) {
        return no("RFLAGS.VM", s.rflags);
    }
    if s.dr[6] >> 32 != 0 || s.dr[7] >> 32 != 0 {
        return Err(format!(
            "DR6 {:#x} or DR7 {:#x} has high bits",
            s.dr[6], s.dr[7]
        ));
    }
    // Bits 7:0 of each PAT entry: types 0, 1, 4-7. Intel SDM Vol. 3A §11.12.2.
    if s.msrs
        .pat
        .to_le_bytes()
        .iter()
        .any(|t| matches!(t, 2 | 3 | 8..))
    {
        return no("IA32_PAT", s.msrs.pat);
    }
    // x2APIC without the APIC enabled is impossible. Intel SDM Vol. 3A table 10-5.
    let base = s.msrs.apic_base;
    if base >> 52 != 0 || base & 0x2ff != 0 || base & 0xc00 == 0x400 {
        return no("IA32_APIC_BASE", base);
    }
    Ok(())
}

fn check_addresses(s: &CpuState) -> Result<(), String> {
    let la57 = s.cr4 & cr4::LA57 != 0;
    let addresses = [
        ("GDTR", s.gdtr.base),
        ("IDTR", s.idtr.base),
        ("LDTR", s.ldtr.base),
        ("TR", s.tr.base),
        ("FS", s.seg[sreg::FS].base),
        ("GS", s.seg[sreg::GS].base),
        ("KERNEL_GS_BASE", s.msrs.kernel_gs_base),
        ("LSTAR", s.msrs.lstar),
        ("CSTAR", s.msrs.cstar),
        ("SYSENTER_ESP", s.msrs.sysenter_esp),
        ("SYSENTER_EIP", s.msrs.sysenter_eip),
    ];
    for (name, a) in addresses {
        // MSRs keep what was canonical for 5 levels when those are switched off.
        if !canonical(a, true) || (!la57 && name.len() <= 4 && !canonical(a, false)) {
            return Err(format!("{name} {a:#x} is not canonical"));
        }
    }
    let long = s.efer & efer::LMA != 0;
    let code64 = long && s.seg[sreg::CS].l();
    if (code64 && !canonical(s.rip, la57)) || (!code64 && s.rip >> 32 != 0) {
        return Err(format!("RIP {:#x} is out of range for the mode", s.rip));
    }
    for (name, t) in [("GDTR", &s.gdtr), ("IDTR", &s.idtr)] {
        if t.limit > 0xffff {
            return Err(format!("{name} limit {:#x}", t.limit));
        }
    }
    Ok(())
}

fn check_segments(s: &CpuState) -> Result<(), String> {
    const KNOWN: u32 = 0x1_f0ff;
    const NAMES: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];
    let (protected, vm86) = (s.cr0 & cr0::PE != 0, s.rflags & rflags::VM != 0);
    let long = s.efer & efer::LMA != 0;
    for (n, (seg, name)) in s.seg.iter().zip(NAMES).enumerate() {
        let bad = |why: &str| Err(format!("{name} attributes {:#x}: {why}", seg.attr));
        if seg.attr & !KNOWN != 0 {
            return bad("reserved bits");
        }
        if n < sreg::FS && n != sreg::CS && seg.base >> 32 != 0 && !long {
            return bad("a base above 4 GiB");
        }
        if seg.unusable() {
            // A null SS exists in 64-bit mode below ring 3 only; a null CS never.
            if n == sreg::CS {
                return bad("CS cannot be null");
            }
            continue;
        }
        if seg.attr & (Segment::S | Segment::P) != Segment::S | Segment::P {
            return bad("not a present code or data segment");
        }
        let code = seg.ty() & 8 != 0;
        match n {
            // Without paging it may be what real mode left, before the first far jump.
            sreg::CS if s.cr0 & cr0::PG != 0 && !vm86 && !code => return bad("CS is not code"),
            sreg::CS if seg.l() && seg.db() && long => return bad("L and D together"),
            sreg::SS if protected && !vm86 && (code || seg.ty() & 2 == 0) => {
                return bad("SS is not writable data");
            }
            sreg::DS | sreg::ES | sreg::FS | sreg::GS if code && seg.ty() & 2 == 0 => {
                return bad("not readable");
            }
            _ => {}
        }
    }
    if !s.tr.unusable() && !matches!(s.tr.attr & 0x1f, 1 | 3 | 9 | 11) {
        return Err(format!("TR attributes {:#x} are not a TSS's", s.tr.attr));
    }
    if !s.ldtr.unusable() && s.ldtr.attr & 0x1f != 2 {
        return Err(format!(
            "LDTR attributes {:#x} are not an LDT's",
            s.ldtr.attr
        ));
    }
    if (s.tr.attr | s.ldtr.attr) & !KNOWN != 0 {
        return Err("TR or LDTR attributes have reserved bits".to_owned());
    }
    Ok(())
}

fn check_xsave(s: &CpuState, features: u64) -> Result<(), String> {
    let x = s.xcr0;
    // x87 always; AVX needs SSE; the AVX-512 bits come together and need AVX. SDM Vol. 1 §13.3.
    let avx512 = x & 0xe0;
    if x & 1 == 0
        || x & !XCR0_KNOWN != 0
        || x & !features != 0
        || x & 6 == 4
        || (avx512 != 0 && (avx512 != 0xe0 || x & 4 == 0))
    {
        return Err(format!(
            "XCR0 {x:#x} is impossible or not offered ({features:#x})"
        ));
    }
    let word = |at: usize| {
        let bytes = s.xsave.0.get(at..at + 8).and_then(|b| b.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    // Legacy region needs no XCR0 bit; the rest of the header must be zero in the standard format.
    if word(512) & !(x | 3) != 0 || (520..576).step_by(8).any(|at| word(at) != 0) {
        return Err(format!(
            "XSTATE_BV {:#x} does not fit XCR0 {x:#x}",
            word(512)
        ));
    }
    let mxcsr = word(24) as u32;
    if mxcsr & !0xffff != 0 {
        return Err(format!("MXCSR {mxcsr:#x} has reserved bits"));
    }
    if s.xss & !features != 0 {
        return Err(format!("IA32_XSS {:#x} is not offered", s.xss));
    }
    Ok(())
}

fn check_events(s: &CpuState) -> Result<(), String> {
    if let Some(p) = &s.pending_event {
        let pushes = matches!(p.vector, 8 | 10..=14 | 17 | 21);
        if (p.external && (p.software || p.error_code.is_some()))
            || (p.error_code.is_some() && (p.software || !pushes))
            || p.error_code.is_some_and(|e| e > 0xffff && p.vector != 14)
            || (!p.external && !p.software && p.vector > 31)
        {
            return Err(format!("pending event {p:?} is impossible"));
        }
    }
    if s.sipi_pending.is_some() && s.activity != Activity::WaitForSipi {
        return Err("a start-up IPI is latched but nobody waits for it".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
