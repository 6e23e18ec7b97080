//! What the state driver does for a debugger; see [`crate::gdb`].

use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use pyrite_api::control::Ending;
use pyrite_engine::{DebugPlan, DebugStop, saved};
use pyrite_x86::CpuState;

use super::{Running, xsave_components};
use crate::gdb::{Cause, Go, Notice, Request, Resume};

/// How long the debugger may take to be told that the VM ends.
const TELL_WITHIN: Duration = Duration::from_secs(1);

/// The debugger of a VM, if it has one.
#[derive(Default)]
pub(super) struct Debugger {
    notices: Option<Sender<Notice>>,
    /// It has the VM stopped, and nobody else may let it go on.
    pub holds: bool,
    /// What happened on other vCPUs while the VM was being stopped.
    late: VecDeque<(u32, DebugStop)>,
    /// vCPUs that stand before a breakpoint of which the debugger was told.
    told: BTreeSet<u32>,
}

impl Debugger {
    /// A vCPU came back to the debugger while the VM was being stopped for another reason.
    pub fn note(&mut self, vcpu: u32, stop: DebugStop) {
        // Breakpoints are met again, and steps are taken again.
        if self.notices.is_some() && matches!(stop, DebugStop::Watchpoint { .. }) {
            self.late.push_back((vcpu, stop));
        }
    }

    /// The vCPUs have new states.
    pub fn forget_places(&mut self) {
        self.late.clear();
        self.told.clear();
    }

    /// Something is left to be told.
    pub fn has_late(&self) -> bool {
        !self.holds && !self.late.is_empty()
    }

    fn tell(&mut self, vcpu: u32, cause: Cause, rip: u64) {
        self.holds = true;
        if cause == Cause::Debug(DebugStop::Breakpoint) {
            self.told.insert(vcpu);
        }
        if let Some(n) = &self.notices {
            // The session ends by a request, whatever becomes of its threads.
            let _ = n.send(Notice::Stopped { vcpu, cause, rip });
        }
    }
}

impl Running {
    /// Tells the debugger that the VM stands still.
    fn tell(&mut self, vcpu: u32, cause: Cause) {
        let rip = self.vcpus.state(vcpu).map_or(0, |s| s.rip);
        self.debugger.tell(vcpu, cause, rip);
    }

    /// A vCPU came back to the debugger.
    pub(super) fn debug_stop(&mut self, vcpu: u32, stop: DebugStop) {
        if self.debugger.notices.is_none() {
            if self.running {
                self.vcpus.run();
            }
            return;
        }
        if let Err(e) = self.pause() {
            tracing::warn!("the guest does not stop for its debugger: {e:#}");
            return;
        }
        self.tell(vcpu, Cause::Debug(stop));
    }

    /// Tells the debugger what happened while the VM was stopped for somebody else.
    pub(super) fn tell_late(&mut self) {
        if let Some((vcpu, stop)) = self.debugger.late.pop_front() {
            self.debug_stop(vcpu, stop);
        }
    }

    /// Does what a debugger asks.
    pub(super) fn debugger_asks(&mut self, request: Request) -> Option<Ending> {
        // An answer that nobody waits for any more is none.
        match request {
            Request::Attach { notices, answer } => {
                let done = self.pause().map_err(|e| format!("{e:#}"));
                if done.is_ok() {
                    tracing::info!("a debugger has stopped the guest");
                    self.debugger = Debugger {
                        notices: Some(notices),
                        holds: true,
                        ..Debugger::default()
                    };
                }
                let _ = answer.send(done);
            }
            Request::Interrupt => {
                if self.debugger.holds {
                    return None;
                }
                match self.pause() {
                    Ok(()) => self.tell(0, Cause::Interrupted),
                    Err(e) => tracing::warn!("the guest does not stop for its debugger: {e:#}"),
                }
            }
            Request::Resume(how) => self.debugger_resumes(&how),
            Request::State { vcpu, answer } => {
                let state = self.while_held(|r| r.vcpus.state(vcpu).map_err(|e| e.to_string()));
                let _ = answer.send(state);
            }
            Request::SetState {
                vcpu,
                state,
                answer,
            } => {
                let done = self.while_held(|r| r.set_state_checked(vcpu, state));
                let _ = answer.send(done);
            }
            Request::Reset { answer } => {
                let done = self.while_held(|_| Ok(()));
                let ending = if done.is_ok() { self.reset() } else { None };
                self.resets_in_a_row = 0;
                let _ = answer.send(done);
                return ending;
            }
            Request::Detach { is_lost } => self.debugger_goes(is_lost),
            Request::Kill => return Some(Ending::Stopped),
        }
        None
    }

    /// Does something that needs all vCPUs stopped.
    fn while_held<T>(
        &mut self,
        f: impl FnOnce(&mut Running) -> Result<T, String>,
    ) -> Result<T, String> {
        if !self.debugger.holds || self.running {
            return Err("the guest runs; interrupt it first".into());
        }
        f(self)
    }

    /// Replaces the registers of a vCPU if a processor could have them.
    fn set_state_checked(&mut self, vcpu: u32, state: Box<CpuState>) -> Result<(), String> {
        saved::check(&state, xsave_components(&self.d.machine.cpuid))?;
        self.debugger.told.remove(&vcpu);
        self.vcpus.set_state(vcpu, state).map_err(|e| e.to_string())
    }

    fn debugger_resumes(&mut self, how: &Resume) {
        if !self.debugger.holds {
            return;
        }
        if let Some((vcpu, stop)) = self.debugger.late.pop_front() {
            self.tell(vcpu, Cause::Debug(stop));
            return;
        }
        for (vcpu, go) in (0..).zip(&how.goes) {
            self.vcpus.hold(vcpu, go.is_none());
            let Some(go) = go else { continue };
            let plan = DebugPlan {
                stops: how.stops.clone(),
                watches: how.watches.clone(),
                step: *go == Go::Step,
                hold_interrupts: how.hold_interrupts,
                pass: self.debugger.told.contains(&vcpu),
            };
            if let Err(e) = self.vcpus.set_debug(vcpu, plan) {
                self.tell(vcpu, Cause::Failed(e.to_string()));
                return;
            }
        }
        let goes = |n: &u32| matches!(how.goes.get(*n as usize), Some(Some(_)));
        self.debugger.told.retain(|n| !goes(n));
        self.debugger.holds = false;
        self.run();
    }

    /// The debugger has gone: the guest runs as it does without one.
    fn debugger_goes(&mut self, is_lost: bool) {
        let was_held = self.debugger.holds;
        if let Err(e) = self.pause() {
            tracing::warn!("the guest does not stop for its debugger to go: {e:#}");
            return;
        }
        self.debugger = Debugger::default();
        for vcpu in 0..self.d.machine.vcpus {
            self.vcpus.hold(vcpu, false);
            if let Err(e) = self.vcpus.set_debug(vcpu, DebugPlan::default()) {
                tracing::warn!(vcpu, "breakpoints stay: {e}");
            }
        }
        if is_lost && was_held {
            tracing::warn!(
                "the debugger went away with the guest stopped; connect again, or let it go on with \
                 pyrite ctl SOCKET resume"
            );
        } else {
            self.run();
        }
    }

    /// Tells the debugger how the VM ends, before the process does.
    pub(super) fn tell_debugger(&mut self, ending: &Ending) {
        let Some(notices) = self.debugger.notices.take() else {
            return;
        };
        let (told, waiting) = channel();
        let is_clean = matches!(
            ending,
            Ending::PowerOff | Ending::Stopped | Ending::ResetStopped
        );
        if notices.send(Notice::Ended { is_clean, told }).is_ok() {
            let _ = waiting.recv_timeout(TELL_WITHIN);
        }
    }
}
