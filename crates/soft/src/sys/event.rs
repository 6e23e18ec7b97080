//! Delivery of exceptions, interrupts, INIT and start-up IPIs. Intel SDM Vol. 3A chapter 6.
//!
//! Nothing of the guest's state changes before the last check of a delivery has passed, so a fault
//! on the way is an exception of its own on the unchanged state (task gates: see [`super::task`]).

use pyrite_engine::StopReason;
use pyrite_x86::bits::{cr0, cr4, rflags, vector};
use pyrite_x86::{Activity, CpuState, InterruptShadow, PendingEvent, Segment, gpr, sreg};

use crate::exception::{Exception, Trap};
use crate::mmu::Priv;
use crate::sys::seg::{Descriptor, code, null_segment, system};
use crate::sys::stack::Frame;
use crate::sys::task;
use crate::vcpu::SoftVcpu;

/// DR6 bits.
#[allow(missing_docs, reason = "names of the manual")]
pub mod dr6 {
    pub const B: u64 = 0xf;
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    pub const ALL: u64 = B | BD | BS | BT;
}

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// External interrupt or NMI.
    External,
    /// The processor found it.
    Exception,
    /// INT n.
    IntN,
    /// INT3 and INTO: as INT n, but never redirected or refused by IOPL in virtual-8086 mode.
    Int3,
    /// INT1: no DPL check, counts as external.
    Int1,
}

/// An event on its way through the IDT.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Vector.
    pub vector: u8,
    /// Error code to push.
    pub error_code: Option<u32>,
    /// Where it comes from.
    pub origin: Origin,
    /// The RIP to return to.
    pub return_rip: u64,
    /// Flags to push.
    pub flags: u64,
}

impl Event {
    /// The EXT bit of error codes that its delivery raises. Intel SDM Vol. 3A §6.13.
    pub fn ext(&self) -> u32 {
        u32::from(!self.software())
    }
    /// Subject to the gate's DPL.
    fn software(&self) -> bool {
        matches!(self.origin, Origin::IntN | Origin::Int3)
    }
    /// Error code naming the IDT entry.
    fn idt_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }
}

/// What a second exception during the delivery of a first makes. Intel SDM Vol. 3A table 6-5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(v: u8) -> Class {
    match v {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// Delivers an exception to the guest: double and triple faults included. `Err` only for a stop.
pub fn exception(v: &mut SoftVcpu, e: Exception) -> Result<(), Trap> {
    let mut current = e;
    v.stats.exceptions += 1;
    // Data breakpoints of an instruction that is started again count when it is.
    v.pending_dr6 = 0;
    loop {
        let event = prepare(v, &current);
        let Err(second) = deliver(v, &event) else {
            return task_trap(v);
        };
        use Class::{Contributory, DoubleFault, PageFault};
        current = match (class(current.vector), class(second.vector)) {
            (DoubleFault, Contributory | PageFault | DoubleFault) => {
                return Err(shutdown(v));
            }
            (Contributory, Contributory) | (PageFault, Contributory | PageFault) => Exception {
                vector: vector::DF,
                error_code: Some(0),
                payload: 0,
            },
            _ => second,
        };
    }
}

/// The debug trap of a task that was entered through a task gate and has its T bit set.
fn task_trap(v: &mut SoftVcpu) -> Result<(), Trap> {
    if v.pending_dr6 & dr6::BT == 0 {
        return Ok(());
    }
    v.pending_dr6 = 0;
    // The handler of #DB may itself be a task with the T bit: it does not trap again.
    let event = prepare(v, &Exception::db(dr6::BT));
    match deliver(v, &event) {
        Ok(()) => {
            v.pending_dr6 = 0;
            Ok(())
        }
        Err(e) => exception(v, e),
    }
}

/// Takes up an event whose delivery was interrupted by a save.
pub fn pending(v: &mut SoftVcpu, p: PendingEvent) -> Result<(), Trap> {
    if p.external {
        return interrupt(v, p.vector);
    }
    if p.software {
        // RIP was saved behind the instruction, as hardware reports it.
        let rip = v.frame.cpu.rip;
        return match software(v, p.vector, Origin::IntN, rip) {
            Ok(()) => Ok(()),
            Err(e) => exception(v, e),
        };
    }
    exception(
        v,
        Exception {
            error_code: p.error_code,
            payload: if p.vector == vector::PF {
                v.frame.cpu.cr2
            } else {
                0
            },
            vector: p.vector,
        },
    )
}

/// Triple fault.
fn shutdown(v: &mut SoftVcpu) -> Trap {
    tracing::debug!(
        rip = v.frame.cpu.rip,
        cr2 = v.frame.cpu.cr2,
        "vCPU {} shut down (triple fault)",
        v.index
    );
    v.frame.cpu.activity = Activity::Shutdown;
    Trap::Stop(StopReason::TripleFault)
}

/// The state that changes before delivery (CR2, DR6), and the event to deliver.
fn prepare(v: &mut SoftVcpu, e: &Exception) -> Event {
    let c = &mut v.frame.cpu;
    let mut fault = !matches!(e.vector, vector::BP | vector::OF | vector::DF | vector::MC);
    match e.vector {
        vector::PF => c.cr2 = e.payload,
        vector::DB => {
            // Intel SDM Vol. 3B §17.2.3: B0-B3 are renewed, the others stay until software clears
            // them. DR7.GD is cleared so that the handler can use the registers (§17.2.4).
            c.dr[6] = c.dr[6] & !dr6::B | e.payload & dr6::ALL;
            c.dr[7] &= !(1 << 13);
            // DEBUGCTL.LBR is cleared on #DB.
            c.msrs.debugctl &= !3;
            // RF is pushed set by faults only, and not by instruction breakpoints.
            fault = e.payload & dr6::BD != 0;
        }
        _ => {}
    }
    let rf = if fault { rflags::RF } else { 0 };
    Event {
        vector: e.vector,
        error_code: e.error_code,
        origin: Origin::Exception,
        return_rip: c.rip,
        flags: c.rflags | rf,
    }
}

/// Delivers an external interrupt or NMI between two instructions.
pub fn interrupt(v: &mut SoftVcpu, vector: u8) -> Result<(), Trap> {
    let event = Event {
        vector,
        error_code: None,
        origin: Origin::External,
        return_rip: v.frame.cpu.rip,
        flags: v.frame.cpu.rflags,
    };
    match deliver(v, &event) {
        Ok(()) => task_trap(v),
        Err(e) => exception(v, e),
    }
}

/// INT n, INT3, INTO, INT1, whose next instruction is at `next_rip`. `Err`: the instruction faults.
pub fn software(
    v: &mut SoftVcpu,
    vector: u8,
    origin: Origin,
    next_rip: u64,
) -> Result<(), Exception> {
    let event = Event {
        vector,
        error_code: None,
        origin,
        return_rip: next_rip,
        flags: v.frame.cpu.rflags & !rflags::RF,
    };
    if origin == Origin::Int1 {
        v.frame.cpu.dr[7] &= !(1 << 13);
    }
    if origin == Origin::IntN && v.v86() {
        // Intel SDM Vol. 3A table 20-2.
        let redirect = v.frame.cpu.cr4 & cr4::VME != 0 && !redirected(v, vector)?;
        if redirect {
            return v86_redirect(v, &event);
        }
        if v.iopl() < 3 {
            return Err(Exception::gp(0));
        }
    }
    deliver(v, &event)
}

/// Bit `vector` of the software interrupt redirection bit map: set = through the IDT.
/// Intel SDM Vol. 3A §20.3.3.
fn redirected(v: &mut SoftVcpu, vector: u8) -> Result<bool, Exception> {
    let tr = v.frame.cpu.tr;
    if tr.ty() & !2 != system::TSS32 || tr.limit < 103 {
        return Err(Exception::gp(0));
    }
    let io_base = v.read_uint(v.wrap_system(tr.base + 102), 2, Priv::System)?;
    // The map is the 32 bytes below the I/O permission bit map.
    let Some(at) = (io_base + u64::from(vector >> 3)).checked_sub(32) else {
        return Err(Exception::gp(0));
    };
    if at > u64::from(tr.limit) {
        return Err(Exception::gp(0));
    }
    let byte = v.read_uint(v.wrap_system(tr.base.wrapping_add(at)), 1, Priv::System)?;
    Ok(byte >> (vector & 7) & 1 != 0)
}

/// INT n in virtual-8086 mode through the 8086 program's own vector table.
fn v86_redirect(v: &mut SoftVcpu, event: &Event) -> Result<(), Exception> {
    let at = u64::from(event.vector) * 4;
    let entry = v.read_uint(at, 4, Priv::Current)?;
    let mut flags = event.flags;
    let mut clear = rflags::TF;
    if v.iopl() == 3 {
        clear |= rflags::IF;
    } else {
        // The program sees VIF as IF and IOPL 3.
        flags = flags & !rflags::IF | rflags::IOPL;
        if flags & rflags::VIF != 0 {
            flags |= rflags::IF;
        }
        clear |= rflags::VIF;
    }
    let frame = real_frame(v, event, flags)?;
    frame.write(v, Priv::Current)?;
    frame.commit(v);
    v.load_cs_real((entry >> 16) as u16, entry & 0xffff);
    v.frame.cpu.rflags &= !(clear | rflags::NT | rflags::RF);
    finish(v);
    Ok(())
}

fn real_frame(v: &SoftVcpu, event: &Event, flags: u64) -> Result<Frame, Exception> {
    let mut f = Frame::current(v, 2);
    f.push(flags);
    f.push(u64::from(v.frame.cpu.seg[sreg::CS].selector));
    f.push(event.return_rip);
    f.check(v, 0)?;
    Ok(f)
}

/// Takes an event through the IDT of the current mode.
fn deliver(v: &mut SoftVcpu, event: &Event) -> Result<(), Exception> {
    if v.frame.cpu.cr0 & cr0::PE == 0 {
        real(v, event)?;
    } else {
        let gate = gate(v, event)?;
        if gate.ty() == system::TASK_GATE {
            task::through_gate(v, gate.gate_selector(), event)?;
        } else {
            let target = target(v, event, &gate)?;
            if v.lma() {
                long(v, event, &gate, &target)?;
            } else {
                legacy(v, event, &gate, &target)?;
            }
        }
    }
    finish(v);
    Ok(())
}

fn finish(v: &mut SoftVcpu) {
    v.frame.cpu.interrupt_shadow = InterruptShadow::None;
    v.frame.cpu.activity = Activity::Running;
    if v.frame.cpu.rflags & rflags::IF != 0 {
        v.irq_waiting = true;
    }
}

/// Real mode: through the interrupt vector table. Intel SDM Vol. 3A §20.1.4.
fn real(v: &mut SoftVcpu, event: &Event) -> Result<(), Exception> {
    let at = u64::from(event.vector) * 4;
    if at + 3 > u64::from(v.frame.cpu.idtr.limit) {
        return Err(Exception::gp(event.idt_code()));
    }
    let at = v.wrap_system(v.frame.cpu.idtr.base.wrapping_add(at));
    let entry = v.read_uint(at, 4, Priv::System)?;
    let frame = real_frame(v, event, event.flags)?;
    frame.write(v, Priv::Current)?;
    frame.commit(v);
    v.load_cs_real((entry >> 16) as u16, entry & 0xffff);
    v.frame.cpu.rflags &= !(rflags::IF | rflags::TF | rflags::RF | rflags::AC);
    Ok(())
}

/// Reads and checks the gate. Intel SDM Vol. 2A, INT n.
fn gate(v: &mut SoftVcpu, event: &Event) -> Result<Descriptor, Exception> {
    let size = if v.lma() { 16u64 } else { 8 };
    let at = u64::from(event.vector) * size;
    let fault = Exception::gp(event.idt_code());
    if at + size - 1 > u64::from(v.frame.cpu.idtr.limit) {
        return Err(fault);
    }
    let addr = v.wrap_system(v.frame.cpu.idtr.base.wrapping_add(at));
    let mut d = Descriptor {
        low: v.read_uint(addr, 8, Priv::System)?,
        high: 0,
        addr,
    };
    let known = if v.lma() {
        d.high = v.read_uint(addr.wrapping_add(8), 8, Priv::System)? & 0xffff_ffff;
        matches!(d.ty(), system::INT_GATE32 | system::TRAP_GATE32)
    } else {
        use system::{INT_GATE16, INT_GATE32, TASK_GATE, TRAP_GATE16, TRAP_GATE32};
        matches!(
            d.ty(),
            TASK_GATE | INT_GATE16 | TRAP_GATE16 | INT_GATE32 | TRAP_GATE32
        )
    };
    if d.is_segment() || !known || (event.software() && d.dpl() < v.frame.cpu.cpl()) {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::np(event.idt_code()));
    }
    Ok(d)
}

/// The handler's code segment.
struct Target {
    descriptor: Descriptor,
    selector: u16,
    cpl: u8,
    offset: u64,
}

fn target(v: &mut SoftVcpu, event: &Event, gate: &Descriptor) -> Result<Target, Exception> {
    let ext = event.ext();
    let selector = gate.gate_selector();
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(ext));
    }
    let err = code(selector) | ext;
    let d = v
        .descriptor(selector, Exception::gp)
        .map_err(|e| e.with_ext(ext))?;
    let now = v.frame.cpu.cpl();
    if !d.is_code() || d.dpl() > now || (v.lma() && (!d.l() || d.db())) {
        return Err(Exception::gp(err));
    }
    if !d.present() {
        return Err(Exception::np(err));
    }
    let cpl = if d.is_conforming() { now } else { d.dpl() };
    if v.v86() && cpl != 0 {
        return Err(Exception::gp(err));
    }
    let offset = gate.gate_offset();
    let reachable = if v.lma() {
        v.canonical(offset)
    } else {
        offset <= u64::from(d.limit())
    };
    if !reachable {
        return Err(Exception::gp(ext));
    }
    Ok(Target {
        descriptor: d,
        selector: selector & !3 | u16::from(cpl),
        cpl,
        offset,
    })
}

/// Reads the stack pointer for an inner level from the TSS, legacy modes: SS selector and ESP.
pub fn tss_stack(v: &mut SoftVcpu, cpl: u8, ext: u32) -> Result<(u16, u64), Exception> {
    let tr = v.frame.cpu.tr;
    let fault = Exception::ts(code(tr.selector) | ext);
    let wide = tr.ty() & 8 != 0;
    let (at, size) = if wide {
        (u64::from(cpl) * 8 + 4, 4u64)
    } else {
        (u64::from(cpl) * 4 + 2, 2)
    };
    if tr.unusable() || at + size + 1 > u64::from(tr.limit) {
        return Err(fault);
    }
    let sp = v.wrap_system(tr.base.wrapping_add(at));
    let ss = v.wrap_system(sp.wrapping_add(size));
    let sp = v.read_uint(sp, size as usize, Priv::System)?;
    Ok((v.read_uint(ss, 2, Priv::System)? as u16, sp))
}

/// Reads RSPn or ISTn from a 64-bit TSS at byte `at`. Intel SDM Vol. 3A figure 7-11.
pub fn tss_stack64(v: &mut SoftVcpu, at: u64, ext: u32) -> Result<u64, Exception> {
    let tr = v.frame.cpu.tr;
    if tr.unusable() || at + 7 > u64::from(tr.limit) {
        return Err(Exception::ts(code(tr.selector) | ext));
    }
    let rsp = v.read_uint(tr.base.wrapping_add(at), 8, Priv::System)?;
    if !v.canonical(rsp) {
        return Err(Exception::ss(ext));
    }
    Ok(rsp)
}

/// Through a 16- or 32-bit interrupt or trap gate.
fn legacy(
    v: &mut SoftVcpu,
    event: &Event,
    gate: &Descriptor,
    target: &Target,
) -> Result<(), Exception> {
    let ext = event.ext();
    let size = if gate.ty() & 8 != 0 { 4 } else { 2 };
    let from_v86 = v.v86();
    let inner = target.cpl < v.frame.cpu.cpl();
    let mut f = if inner {
        let (ss, sp) = tss_stack(v, target.cpl, ext)?;
        let ss = v.stack_segment(ss, target.cpl, Exception::ts, ext)?;
        let mut f = Frame::on(ss, sp, size);
        let c = &v.frame.cpu;
        if from_v86 {
            for n in [sreg::GS, sreg::FS, sreg::DS, sreg::ES] {
                f.push(u64::from(c.seg[n].selector));
            }
        }
        f.push(u64::from(c.seg[sreg::SS].selector));
        f.push(c.gpr[gpr::RSP]);
        f
    } else {
        Frame::current(v, size)
    };
    f.push(event.flags);
    f.push(u64::from(v.frame.cpu.seg[sreg::CS].selector));
    f.push(event.return_rip);
    if let Some(e) = event.error_code {
        f.push(u64::from(e));
    }
    let ss_code = if inner {
        code(f.ss.selector) | ext
    } else {
        ext
    };
    f.check(v, ss_code)?;
    v.set_accessed(&target.descriptor)?;
    f.write(v, Frame::who(v, target.cpl))?;
    if inner {
        v.frame.cpu.seg[sreg::SS] = f.ss;
    }
    if from_v86 {
        for n in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            v.frame.cpu.seg[n] = null_segment(0, 0);
        }
    }
    enter(v, gate, target);
    f.commit(v);
    Ok(())
}

/// Through a 64-bit gate. Intel SDM Vol. 3A §6.14.
fn long(
    v: &mut SoftVcpu,
    event: &Event,
    gate: &Descriptor,
    target: &Target,
) -> Result<(), Exception> {
    let ext = event.ext();
    let now = v.frame.cpu.cpl();
    let ist = gate.low >> 32 & 7;
    let rsp = if ist != 0 {
        tss_stack64(v, ist * 8 + 28, ext)?
    } else if target.cpl < now {
        tss_stack64(v, u64::from(target.cpl) * 8 + 4, ext)?
    } else {
        v.frame.cpu.gpr[gpr::RSP]
    };
    let c = &v.frame.cpu;
    let values = [
        u64::from(c.seg[sreg::SS].selector),
        c.gpr[gpr::RSP],
        event.flags,
        u64::from(c.seg[sreg::CS].selector),
        event.return_rip,
    ];
    let mut bytes = [0u8; 48];
    let count = 5 + usize::from(event.error_code.is_some());
    let error = event.error_code.map_or(0, u64::from);
    // Ascending addresses: the last pushed first.
    let descending = values.iter().copied().chain([error]).take(count);
    for (n, value) in descending.enumerate() {
        let at = (count - 1 - n) * 8;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let len = count * 8;
    let new_rsp = (rsp & !0xf).wrapping_sub(len as u64);
    if !v.canonical(new_rsp) || !v.canonical(new_rsp.wrapping_add(len as u64 - 1)) {
        return Err(Exception::ss(ext));
    }
    v.set_accessed(&target.descriptor)?;
    v.write_bytes(new_rsp, &bytes[..len], Frame::who(v, target.cpl))?;
    if target.cpl < now {
        v.frame.cpu.seg[sreg::SS] = null_segment(u16::from(target.cpl), target.cpl);
    }
    v.frame.cpu.gpr[gpr::RSP] = new_rsp;
    enter(v, gate, target);
    Ok(())
}

/// The last part that all gates share.
fn enter(v: &mut SoftVcpu, gate: &Descriptor, target: &Target) {
    let c = &mut v.frame.cpu;
    c.seg[sreg::CS] = target.descriptor.segment(target.selector);
    c.rip = target.offset;
    // Bit 0 of the type tells a trap gate from an interrupt gate.
    let if_bit = if gate.ty() & 1 == 0 { rflags::IF } else { 0 };
    c.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM | if_bit);
}

/// INIT: to the reset state but for the caches, FPU and most MSRs. Intel SDM Vol. 3A table 9-1.
pub fn init(v: &mut SoftVcpu) {
    let bootstrap = v.frame.cpu.msrs.apic_base & 1 << 8 != 0;
    let fresh = CpuState::reset(v.index, bootstrap);
    let c = &mut v.frame.cpu;
    let old_cr0 = c.cr0;
    // CPUID.1 EAX is in EDX after reset; 0x600 is the family of every P6 and later.
    let signature = v.vm.cpuid.get(1, 0).map_or(0x600, |e| e.eax);
    c.gpr = fresh.gpr;
    c.gpr[gpr::RDX] = u64::from(signature);
    c.rip = fresh.rip;
    c.rflags = fresh.rflags;
    // CD and NW are left as they are.
    c.cr0 = cr0::ET | old_cr0 & (cr0::CD | cr0::NW);
    (c.cr2, c.cr3, c.cr4, c.efer) = (0, 0, 0, 0);
    c.seg = fresh.seg;
    (c.ldtr, c.tr, c.gdtr, c.idtr) = (fresh.ldtr, fresh.tr, fresh.gdtr, fresh.idtr);
    c.dr = fresh.dr;
    c.pdpte = [0; 4];
    c.activity = fresh.activity;
    c.interrupt_shadow = InterruptShadow::None;
    (c.nmi_blocked, c.nmi_pending) = (false, false);
    c.pending_event = None;
    v.shared().apic.init_reset();
    v.pending_dr6 = 0;
    v.irq_waiting = true;
    v.flush_tlb(false);
}

/// Start-up IPI with `vector`: starts a waiting processor at `vector << 12` in real mode.
pub fn startup(v: &mut SoftVcpu, vector: u8) {
    if v.frame.cpu.activity != Activity::WaitForSipi {
        return;
    }
    let c = &mut v.frame.cpu;
    c.seg[sreg::CS] = Segment {
        base: u64::from(vector) << 12,
        selector: u16::from(vector) << 8,
        ..c.seg[sreg::CS]
    };
    c.rip = 0;
    c.activity = Activity::Running;
}
