//! Expiry of APIC timers: the thread that watches those of running vCPUs.
//!
//! A vCPU that arms its timer only compares the deadline with what the thread already waits for;
//! it wakes the thread if the new deadline is earlier. After serving a timer the thread stays up
//! for a moment: a periodic guest arms its next tick in that time and costs no wake-up at all.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use pyrite_engine::EngineError;

use super::tsc::{cycles_to_ns, guest_tsc, host_tsc, ns_to_cycles};
use crate::vm::{VmShared, event, lock};

/// How long the thread stays up after serving a timer.
const LINGER: Duration = Duration::from_micros(200);
/// Longest sleep towards a count-down deadline while guest time may stand still.
const STANDSTILL_MAX: Duration = Duration::from_millis(10);

/// Time of one VM: its clocks and the timer thread's waiting place.
pub(crate) struct TimeKeeper {
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Host TSC at which the thread wakes by itself; `u64::MAX` = not planned, wake it.
    wakes_at: AtomicU64,
    kicked: Mutex<bool>,
    changed: Condvar,
    stopping: AtomicBool,
    /// kvmclock's common (guest TSC, guest ns) pair.
    pub(crate) pair: Mutex<Option<(u64, u64)>>,
}

impl TimeKeeper {
    /// Guest time in ns.
    pub(crate) fn now_ns(&self) -> u64 {
        (self.clock)()
    }

    pub(super) fn kick(&self) {
        *lock(&self.kicked) = true;
        self.changed.notify_all();
    }
}

/// Holds the keeper for an APIC; the thread ends when the APICs go.
pub(super) struct KeeperLink(pub(super) Arc<TimeKeeper>);

impl Drop for KeeperLink {
    fn drop(&mut self) {
        self.0.stopping.store(true, Ordering::SeqCst);
        self.0.kick();
    }
}

/// Cycles that this vCPU's TSC is ahead of the VM's: IA32_TSC_ADJUST.
#[derive(Default)]
pub(super) struct TscAdjust(pub(super) AtomicI64);

/// When the timer of a vCPU expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deadline {
    /// Guest time in ns.
    Count(u64),
    /// Guest TSC without the adjustment of the vCPU.
    Tsc(u64),
}

pub(super) fn deadline(vm: &VmShared, index: u32) -> Option<Deadline> {
    let apic = &vm.vcpus.get(index as usize)?.apic;
    let regs = lock(&apic.regs);
    if regs.tsc_deadline != 0 {
        let adjust = apic.tsc_adjust.0.load(Ordering::Relaxed);
        // A deadline before the VM's zero has passed long ago.
        return Some(Deadline::Tsc(
            u64::try_from(i128::from(regs.tsc_deadline) - i128::from(adjust)).unwrap_or(0),
        ));
    }
    regs.count_deadline_ns().map(Deadline::Count)
}

/// Time until the APIC timer of a vCPU expires. `None`: it is not armed.
pub fn time_to_timer(vm: &VmShared, index: u32) -> Option<Duration> {
    let ns = match deadline(vm, index)? {
        Deadline::Count(at) => at.saturating_sub((vm.clock)()),
        Deadline::Tsc(at) => cycles_to_ns(at.saturating_sub(guest_tsc(vm)), vm.tsc_khz),
    };
    Some(Duration::from_nanos(ns))
}

/// What the timer thread has planned, for `inspect`: how long until it wakes by itself, in ns.
pub fn thread_sleeps_ns(vm: &VmShared) -> Option<u64> {
    let keeper = vm.vcpus.first()?.apic.keeper()?;
    let at = keeper.wakes_at.load(Ordering::SeqCst);
    (at != u64::MAX).then(|| cycles_to_ns(at.saturating_sub(host_tsc()), vm.tsc_khz))
}

/// Fires the APIC timer if it has expired.
pub fn poll_timer(vm: &VmShared, index: u32) {
    fire_if_due(vm, index);
}

/// True if the timer had expired.
fn fire_if_due(vm: &VmShared, index: u32) -> bool {
    // Time is asked with no lock held: the clock has a lock of its own.
    let due = match deadline(vm, index) {
        None => return false,
        Some(Deadline::Count(at)) => {
            let now = (vm.clock)();
            (now >= at).then_some(now)
        }
        Some(Deadline::Tsc(at)) => (guest_tsc(vm) >= at).then_some(0),
    };
    let (Some(now), Some(v)) = (due, vm.vcpus.get(index as usize)) else {
        return false;
    };
    let wake = {
        let mut regs = lock(&v.apic.regs);
        // It may have been armed anew meanwhile: look again under the lock.
        let expired = if regs.tsc_deadline != 0 {
            let adjust = v.apic.tsc_adjust.0.load(Ordering::Relaxed);
            let passed = guest_tsc(vm).wrapping_add_signed(adjust) >= regs.tsc_deadline;
            if passed {
                regs.tsc_deadline = 0;
            }
            passed
        } else {
            regs.take_count(now)
        };
        if !expired {
            return false;
        }
        regs.timer_expired()
    };
    if wake {
        v.raise(event::INTERRUPT);
    }
    true
}

/// The timer of a vCPU was armed: makes sure that the thread will see it in time.
pub(super) fn armed(vm: &VmShared, index: u32) {
    let Some(keeper) = vm.vcpus.get(index as usize).and_then(|v| v.apic.keeper()) else {
        return;
    };
    let Some(left) = time_to_timer(vm, index) else {
        return;
    };
    let ns = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
    let at = host_tsc().saturating_add(ns_to_cycles(ns, vm.tsc_khz));
    if at < keeper.wakes_at.load(Ordering::SeqCst) {
        keeper.kick();
    }
}

/// Guest time or TSC jumped, or runs again: plans are void.
pub fn clock_changed(vm: &VmShared) {
    if let Some(keeper) = vm.vcpus.first().and_then(|v| v.apic.keeper()) {
        *lock(&keeper.pair) = None;
        keeper.kick();
    }
}

/// Guest time runs again: the timer thread plans anew.
pub fn clock_runs(vm: &VmShared) {
    if let Some(keeper) = vm.vcpus.first().and_then(|v| v.apic.keeper()) {
        keeper.kick();
    }
}

/// Starts the thread that watches the APIC timers of running vCPUs.
pub fn start_timer_thread(vm: &Arc<VmShared>) -> Result<(), EngineError> {
    let keeper = Arc::new(TimeKeeper {
        clock: Arc::clone(&vm.clock),
        wakes_at: AtomicU64::new(u64::MAX),
        kicked: Mutex::new(false),
        changed: Condvar::new(),
        stopping: AtomicBool::new(false),
        pair: Mutex::new(None),
    });
    for v in &vm.vcpus {
        v.apic.attach(&keeper);
    }
    let weak = Arc::downgrade(vm);
    std::thread::Builder::new()
        .name("apic-timer".to_owned())
        .spawn(move || watch(&weak, &keeper))
        .map_err(|source| EngineError::Os {
            what: "cannot start the APIC timer thread".to_owned(),
            source,
        })?;
    Ok(())
}

fn watch(vm: &Weak<VmShared>, keeper: &TimeKeeper) {
    super::tsc::sleep_precisely();
    let mut last_clock = None;
    while !keeper.stopping.load(Ordering::SeqCst) {
        // From here until the plan is made, whoever arms a timer wakes us.
        keeper.wakes_at.store(u64::MAX, Ordering::SeqCst);
        *lock(&keeper.kicked) = false;
        let Some(vm) = vm.upgrade() else { return };
        let wait = serve(&vm, &mut last_clock);
        if let Some(wait) = wait {
            let ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
            let at = host_tsc().saturating_add(ns_to_cycles(ns, vm.tsc_khz));
            keeper.wakes_at.store(at, Ordering::SeqCst);
        }
        drop(vm);
        let kicked = lock(&keeper.kicked);
        if *kicked || keeper.stopping.load(Ordering::SeqCst) {
            continue;
        }
        match wait {
            Some(d) => drop(
                keeper
                    .changed
                    .wait_timeout(kicked, d)
                    .unwrap_or_else(PoisonError::into_inner),
            ),
            None => drop(
                keeper
                    .changed
                    .wait(kicked)
                    .unwrap_or_else(PoisonError::into_inner),
            ),
        }
    }
}

/// Fires what is due; how long to sleep then.
fn serve(vm: &VmShared, last_clock: &mut Option<u64>) -> Option<Duration> {
    let mut fired = false;
    for n in 0..vm.vcpus.len() as u32 {
        fired |= fire_if_due(vm, n);
    }
    let mut wait = fired.then_some(LINGER);
    let mut counts = false;
    for n in 0..vm.vcpus.len() as u32 {
        if let Some(left) = time_to_timer(vm, n) {
            counts |= matches!(deadline(vm, n), Some(Deadline::Count(_)));
            wait = Some(wait.map_or(left, |w| w.min(left)));
        }
    }
    if counts {
        // A clock that stands still would make us wake again and again for nothing.
        let now = (vm.clock)();
        if last_clock.replace(now) == Some(now) {
            wait = wait.map(|w| w.max(STANDSTILL_MAX));
        }
    } else {
        *last_clock = None;
    }
    wait
}
