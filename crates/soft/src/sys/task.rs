//! Hardware task switches. Intel SDM Vol. 3A chapter 7.
//!
//! Up to the commit point (the new TR is loaded) every fault belongs to the old task, whose
//! registers are unchanged; after it, to the new task, whose segment registers that are not loaded
//! yet are null.

use pyrite_x86::bits::{cr0, cr4, rflags};
use pyrite_x86::paging::AccessKind;
use pyrite_x86::{Segment, gpr, sreg};

use crate::exception::Exception;
use crate::mmu::Priv;
use crate::sys::control;
use crate::sys::event::{Event, dr6};
use crate::sys::seg::{Descriptor, Fault, V86_ATTR, code, null_segment, system};
use crate::sys::stack::Frame;
use crate::vcpu::SoftVcpu;

/// How a task is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// JMP.
    Jump,
    /// CALL: nests.
    Call,
    /// IRET with NT.
    Iret,
    /// Exception or interrupt through a task gate: nests.
    Event,
}

/// Registers in TSS order. Intel SDM Vol. 3A figures 7-2 and 7-10.
const GPRS: [usize; 8] = [
    gpr::RAX,
    gpr::RCX,
    gpr::RDX,
    gpr::RBX,
    gpr::RSP,
    gpr::RBP,
    gpr::RSI,
    gpr::RDI,
];

/// Offsets in a TSS of one width.
struct Layout {
    /// Element size: 2 or 4.
    size: usize,
    /// Smallest limit.
    limit_min: u32,
    ip: u64,
    flags: u64,
    gprs: u64,
    sregs: u64,
    sreg_count: usize,
    ldt: u64,
}

const TSS16: Layout = Layout {
    size: 2,
    limit_min: 0x2b,
    ip: 14,
    flags: 16,
    gprs: 18,
    sregs: 34,
    sreg_count: 4,
    ldt: 42,
};

const TSS32: Layout = Layout {
    size: 4,
    limit_min: 0x67,
    ip: 0x20,
    flags: 0x24,
    gprs: 0x28,
    sregs: 0x48,
    sreg_count: 6,
    ldt: 0x60,
};

const TSS_BYTES_MAX: usize = 0x68;

fn layout(ty: u32) -> &'static Layout {
    if ty & 8 != 0 { &TSS32 } else { &TSS16 }
}

fn get(image: &[u8; TSS_BYTES_MAX], at: u64, size: usize) -> u64 {
    let mut b = [0u8; 8];
    let at = at as usize;
    b[..size].copy_from_slice(&image[at..at + size]);
    u64::from_le_bytes(b)
}

/// IRET with NT set: back to the task in the link field. Intel SDM Vol. 3A §7.4.
pub fn back(v: &mut SoftVcpu, next_rip: u64) -> Result<(), Exception> {
    let link = v.read_uint(v.wrap_system(v.frame.cpu.tr.base), 2, Priv::System)? as u16;
    switch(v, link, Entry::Iret, next_rip, 0)
}

/// An event through a task gate in the IDT.
pub fn through_gate(v: &mut SoftVcpu, selector: u16, event: &Event) -> Result<(), Exception> {
    let ext = event.ext();
    // The image of EFLAGS that is saved has RF as the event would push it.
    let (old_flags, old_tr) = (v.frame.cpu.rflags, v.frame.cpu.tr);
    v.frame.cpu.rflags = event.flags;
    let result = switch(v, selector, Entry::Event, event.return_rip, ext);
    if let Err(e) = result {
        // Before the commit point the old task is still here: it gets its own flags back.
        if v.frame.cpu.tr == old_tr {
            v.frame.cpu.rflags = old_flags;
        }
        return Err(e.with_ext(ext));
    }
    if let Some(code) = event.error_code {
        let size = layout(v.frame.cpu.tr.ty()).size;
        let mut f = Frame::current(v, size);
        f.push(u64::from(code));
        f.check(v, ext)?;
        f.write(v, Priv::Current)?;
        f.commit(v);
    }
    Ok(())
}

/// Checks the descriptor of the new TSS.
fn new_tss(v: &mut SoftVcpu, selector: u16, entry: Entry) -> Result<Descriptor, Exception> {
    let fault: Fault = if entry == Entry::Iret {
        Exception::ts
    } else {
        Exception::gp
    };
    let err = code(selector);
    if selector & 4 != 0 || selector & 0xfffc == 0 {
        return Err(fault(err));
    }
    let d = v.descriptor(selector, fault)?;
    let wanted = if entry == Entry::Iret {
        [system::TSS16_BUSY, system::TSS32_BUSY]
    } else {
        [system::TSS16, system::TSS32]
    };
    if d.is_segment() || !wanted.contains(&d.ty()) {
        return Err(fault(err));
    }
    if !d.present() {
        return Err(Exception::np(err));
    }
    if d.limit() < layout(d.ty()).limit_min {
        return Err(Exception::ts(err));
    }
    Ok(d)
}

/// Switches to the task of TSS `selector`. `return_rip` is saved in the old task's TSS.
pub fn switch(
    v: &mut SoftVcpu,
    selector: u16,
    entry: Entry,
    return_rip: u64,
    ext: u32,
) -> Result<(), Exception> {
    let d = new_tss(v, selector, entry)?;
    let new = layout(d.ty());
    let old_tr = v.frame.cpu.tr;
    let old = layout(old_tr.ty());
    if old_tr.unusable() || old_tr.limit < old.limit_min {
        return Err(Exception::ts(code(old_tr.selector)));
    }
    let nested = matches!(entry, Entry::Call | Entry::Event);

    // Everything that may fault before the commit point.
    let mut image = [0u8; TSS_BYTES_MAX];
    let len = new.limit_min as usize + 1;
    v.read_bytes(v.wrap_system(d.base()), &mut image[..len], Priv::System)?;
    let old_len = old.limit_min as usize + 1;
    v.probe_write(v.wrap_system(old_tr.base), old_len, Priv::System)?;
    if nested {
        v.probe_write(v.wrap_system(d.base()), 2, Priv::System)?;
    }
    v.probe(d.addr, 8, AccessKind::Write, Priv::System)?;
    let cr3 = get(&image, 0x1c, 4);
    let load_cr3 = new.size == 4 && v.paging();
    if load_cr3 && v.frame.cpu.cr4 & cr4::PAE != 0 {
        control::read_pdptes(v, cr3)?;
    }

    // Old task: busy bit, EFLAGS.NT, registers.
    if !nested {
        let old_d = v.descriptor(old_tr.selector & !7, Exception::ts)?;
        v.update_type(old_d.addr, 0, 2)?;
    }
    if entry == Entry::Iret {
        v.frame.cpu.rflags &= !rflags::NT;
    }
    save(v, &old_tr, old, return_rip)?;
    if nested {
        let link = u64::from(old_tr.selector);
        v.write_uint(v.wrap_system(d.base()), link, 2, Priv::System)?;
    }
    if entry != Entry::Iret {
        v.update_type(d.addr, 2, 0)?;
    }

    // Commit point.
    let c = &mut v.frame.cpu;
    c.tr = Segment {
        attr: d.segment(selector).attr | 2,
        ..d.segment(selector)
    };
    c.cr0 |= cr0::TS;
    c.dr[7] &= !0x155;
    if load_cr3 {
        control::load_cr3_for_task(v, cr3)?;
    }
    load(v, &image, new, nested, ext)?;
    if new.size == 4 && image[0x64] & 1 != 0 {
        v.pending_dr6 |= dr6::BT;
    }
    if v.frame.cpu.rflags & rflags::IF != 0 {
        v.irq_waiting = true;
    }
    Ok(())
}

/// Saves the registers of the outgoing task.
fn save(v: &mut SoftVcpu, tr: &Segment, l: &Layout, rip: u64) -> Result<(), Exception> {
    let base = tr.base;
    let put = |v: &mut SoftVcpu, at: u64, value: u64, size: usize| {
        v.write_uint(
            v.wrap_system(base.wrapping_add(at)),
            value,
            size,
            Priv::System,
        )
    };
    put(v, l.ip, rip, l.size)?;
    let flags = v.frame.cpu.rflags;
    put(v, l.flags, flags, l.size)?;
    for (n, r) in GPRS.into_iter().enumerate() {
        let value = v.frame.cpu.gpr[r];
        put(v, l.gprs + (n * l.size) as u64, value, l.size)?;
    }
    for n in 0..l.sreg_count {
        let selector = u64::from(v.frame.cpu.seg[n].selector);
        put(v, l.sregs + (n * l.size) as u64, selector, 2)?;
    }
    Ok(())
}

/// Loads the registers of the incoming task.
fn load(
    v: &mut SoftVcpu,
    image: &[u8; TSS_BYTES_MAX],
    l: &Layout,
    nested: bool,
    ext: u32,
) -> Result<(), Exception> {
    let c = &mut v.frame.cpu;
    c.rip = get(image, l.ip, l.size);
    let mut flags = get(image, l.flags, l.size) & rflags::ALL | rflags::FIXED1;
    if l.size == 2 {
        flags &= 0xffff;
    }
    if nested {
        flags |= rflags::NT;
    }
    c.rflags = flags;
    for (n, r) in GPRS.into_iter().enumerate() {
        // The upper halves after a 16-bit switch are undefined; hardware leaves ones.
        let upper = if l.size == 2 { 0xffff_0000 } else { 0 };
        c.gpr[r] = get(image, l.gprs + (n * l.size) as u64, l.size) | upper;
    }
    // All selectors are visible before any descriptor is loaded.
    let mut selectors = [0u16; 6];
    for (n, s) in selectors.iter_mut().enumerate().take(l.sreg_count) {
        *s = get(image, l.sregs + (n * l.size) as u64, 2) as u16;
    }
    let v86 = flags & rflags::VM != 0;
    for (n, s) in selectors.into_iter().enumerate() {
        c.seg[n] = if v86 {
            Segment::real(s, V86_ATTR)
        } else {
            null_segment(s, (selectors[sreg::CS] & 3) as u8)
        };
    }
    let ldt = get(image, l.ldt, 2) as u16;
    c.ldtr = null_segment(ldt, 0);
    load_ldt(v, ldt, ext)?;
    if !v86 {
        load_code(v, selectors[sreg::CS], ext)?;
        let cpl = (selectors[sreg::CS] & 3) as u8;
        v.frame.cpu.seg[sreg::SS] =
            v.stack_segment(selectors[sreg::SS], cpl, Exception::ts, ext)?;
        for n in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            let s = v.data_segment(n, selectors[n]).map_err(to_ts)?;
            v.frame.cpu.seg[n] = s;
        }
    }
    if v.frame.cpu.rip > u64::from(v.frame.cpu.seg[sreg::CS].limit) {
        return Err(Exception::gp(ext));
    }
    Ok(())
}

/// Data segments from a TSS: #GP becomes #TS.
fn to_ts(e: Exception) -> Exception {
    match (e.vector, e.error_code) {
        (pyrite_x86::bits::vector::GP, Some(c)) => Exception::ts(c),
        _ => e,
    }
}

fn load_ldt(v: &mut SoftVcpu, selector: u16, ext: u32) -> Result<(), Exception> {
    if selector & 0xfffc == 0 {
        return Ok(());
    }
    let fault = Exception::ts(code(selector) | ext);
    if selector & 4 != 0 {
        return Err(fault);
    }
    let d = v.descriptor(selector, Exception::ts)?;
    if d.is_segment() || d.ty() != system::LDT || !d.present() {
        return Err(fault);
    }
    v.frame.cpu.ldtr = d.segment(selector);
    Ok(())
}

fn load_code(v: &mut SoftVcpu, selector: u16, ext: u32) -> Result<(), Exception> {
    let fault = Exception::ts(code(selector) | ext);
    if selector & 0xfffc == 0 {
        return Err(Exception::ts(ext));
    }
    let d = v.descriptor(selector, Exception::ts)?;
    let rpl = (selector & 3) as u8;
    let level_ok = if d.is_conforming() {
        d.dpl() <= rpl
    } else {
        d.dpl() == rpl
    };
    if !d.is_code() || !level_ok {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::np(code(selector) | ext));
    }
    v.set_accessed(&d)?;
    v.frame.cpu.seg[sreg::CS] = d.segment(selector);
    Ok(())
}
