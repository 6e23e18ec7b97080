//! A debugger outside the guest: stop addresses, watched data, single step.
//!
//! Nothing is written into guest memory and nothing is kept in guest registers, so the guest cannot
//! see any of it, and code that changes itself changes nothing. Pages with stop addresses are left
//! to the interpreter, which looks before every instruction; the translator runs all others. Pages
//! with watched data are never in a soft TLB, so that every access to them comes to [`crate::mmu`].

use std::collections::BTreeSet;

use pyrite_engine::{DebugCaps, DebugPlan, DebugStop, EngineError, StopReason, Watch};
use pyrite_mem::PAGE_SIZE;
use pyrite_x86::{Activity, CpuState, sreg};

use crate::exception::Trap;
use crate::vcpu::SoftVcpu;
use crate::{interp, xlate};

/// LIMIT: breakpoints and watchpoints; each watch is looked at on every soft-TLB fill.
const POINTS_MAX: usize = 1024;
/// LIMIT: pages that are kept from the translator because a debugger stopped there before.
const PAGES_MAX: usize = 4096;

/// What this engine does for debuggers.
pub const CAPS: DebugCaps = DebugCaps {
    points: POINTS_MAX,
    registers: false,
};

/// A debugger's wishes, as the engine looks at them.
#[derive(Default)]
pub struct HostDebug {
    /// There are any.
    armed: bool,
    /// Ascending.
    stops: Vec<u64>,
    /// Addresses of pages of which there are no translations: those with stop addresses, and with
    /// such as were there a moment ago. Debuggers take all of them away for every step.
    pages: BTreeSet<u64>,
    watches: Vec<Watch>,
    step: bool,
    hold_interrupts: bool,
    /// Linear address of the instruction that is executed although it is a stop address.
    pass: Option<u64>,
    hit: Option<DebugStop>,
}

impl HostDebug {
    /// True if a debugger wants anything.
    #[inline]
    pub fn armed(&self) -> bool {
        self.armed
    }

    /// True if the translator must leave the page around `lin` alone.
    #[inline]
    pub fn stops_in_page(&self, lin: u64) -> bool {
        self.armed && self.pages.contains(&(lin & !(PAGE_SIZE - 1)))
    }

    /// True if data is watched in the page around `lin`.
    #[inline]
    pub fn watches_page(&self, lin: u64) -> bool {
        let page = lin & !(PAGE_SIZE - 1);
        let touches =
            |w: &Watch| page.wrapping_sub(w.at) < w.len || w.at.wrapping_sub(page) < PAGE_SIZE;
        self.watches.iter().any(touches)
    }

    /// Notes an access to linear memory.
    pub fn note_access(&mut self, lin: u64, len: usize, write: bool) {
        if self.hit.is_some() {
            return;
        }
        self.hit = self.watches.iter().find_map(|w| {
            let at = w.hit(lin, len as u64, write)?;
            Some(DebugStop::Watchpoint { at, kind: w.kind })
        });
    }

    /// Watched data was touched.
    #[inline]
    pub fn has_hit(&self) -> bool {
        self.hit.is_some()
    }

    /// The touch of watched data, once, as a reason to stop.
    #[inline]
    pub fn take_hit(&mut self) -> Option<StopReason> {
        self.hit.take().map(StopReason::Debug)
    }

    /// Interrupts wait until the step is done.
    #[inline]
    pub fn holds_interrupts(&self, cpu: &CpuState) -> bool {
        self.step && self.hold_interrupts && cpu.activity == Activity::Running
    }
}

/// Linear address of the next instruction.
fn linear_rip(v: &SoftVcpu) -> u64 {
    let c = &v.frame.cpu;
    if v.long64() {
        c.rip
    } else {
        c.seg[sreg::CS].base.wrapping_add(c.rip) & 0xffff_ffff
    }
}

/// Replaces the debugger's wishes.
pub fn arm(v: &mut SoftVcpu, plan: &DebugPlan) -> Result<(), EngineError> {
    if !plan.is_empty() {
        CAPS.check(plan).map_err(EngineError::Unsupported)?;
    }
    let at = linear_rip(v);
    let d = &mut v.debug;
    d.armed = !plan.is_empty();
    d.hit = None;
    d.step = plan.step;
    d.hold_interrupts = plan.hold_interrupts;
    d.pass = plan.pass.then_some(at);
    d.stops.clone_from(&plan.stops);
    d.stops.sort_unstable();
    if !d.armed || d.pages.len() > PAGES_MAX {
        d.pages.clear();
    }
    let mut is_new = false;
    for stop in &plan.stops {
        is_new |= d.pages.insert(stop & !(PAGE_SIZE - 1));
    }
    let watches_change = d.watches != plan.watches;
    d.watches.clone_from(&plan.watches);
    if is_new {
        xlate::drop_everything(v);
    }
    if watches_change {
        v.flush_tlb(false);
    }
    Ok(())
}

/// Runs guest code for a debugger until something needs the run loop.
#[cold]
pub fn execute(v: &mut SoftVcpu) -> Result<(), Trap> {
    let at = linear_rip(v);
    let passes = v.debug.pass.take() == Some(at);
    if v.debug.step {
        interp::step(v)?;
        let stop = v.debug.take_hit();
        return Err(Trap::Stop(
            stop.unwrap_or(StopReason::Debug(DebugStop::Step)),
        ));
    }
    if !passes && v.debug.stops.binary_search(&at).is_ok() {
        return Err(Trap::Stop(StopReason::Debug(DebugStop::Breakpoint)));
    }
    if v.vm.options.translate && xlate::can_run(v) {
        xlate::run(v)
    } else {
        interp::step(v)
    }
}
