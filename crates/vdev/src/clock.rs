//! `VmClock`: the only time that devices know, and the timers on it.
//!
//! Guest time is in nanoseconds since the machine was created, stands still while the VM is
//! paused, and is saved and restored. A test uses a clock that it steps by hand.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use crate::bus::lock;

/// Called when a timer expires, on the timer thread (or in [`VmClock::advance`]) with no clock
/// lock held. It may arm timers again.
pub trait TimerTarget: Send + Sync {
    /// `now_ns` is the clock at the call, not earlier than the deadline.
    fn fire(&self, now_ns: u64);
}

enum Source {
    /// Follows the host's monotonic clock: guest time at `since`.
    Running { since: Instant, at_ns: u64 },
    /// Stands still (paused, or stepped by a test).
    Stopped { at_ns: u64 },
}

struct Armed {
    deadline_ns: u64,
    id: u64,
}

struct Inner {
    source: Source,
    armed: Vec<Armed>,
    targets: Vec<(u64, Weak<dyn TimerTarget>)>,
    next_id: u64,
    /// A target is being called.
    firing: bool,
    stopping: bool,
}

/// The clock of one VM. Starts stopped at 0.
pub struct VmClock {
    inner: Mutex<Inner>,
    changed: std::sync::Condvar,
}

impl Default for VmClock {
    fn default() -> Self {
        VmClock {
            inner: Mutex::new(Inner {
                source: Source::Stopped { at_ns: 0 },
                armed: Vec::new(),
                targets: Vec::new(),
                next_id: 0,
                firing: false,
                stopping: false,
            }),
            changed: std::sync::Condvar::new(),
        }
    }
}

impl Inner {
    fn now(&self) -> u64 {
        match self.source {
            Source::Stopped { at_ns } => at_ns,
            Source::Running { since, at_ns } => {
                at_ns.saturating_add(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX))
            }
        }
    }
    /// Takes the earliest timer that is due.
    fn take_due(&mut self) -> Option<Arc<dyn TimerTarget>> {
        let now = self.now();
        let (n, _) = self
            .armed
            .iter()
            .enumerate()
            .filter(|(_, a)| a.deadline_ns <= now)
            .min_by_key(|(_, a)| a.deadline_ns)?;
        let id = self.armed.swap_remove(n).id;
        self.targets
            .iter()
            .find(|(i, _)| *i == id)
            .and_then(|(_, t)| t.upgrade())
    }
}

impl VmClock {
    /// Guest time now, in ns.
    pub fn now_ns(&self) -> u64 {
        lock(&self.inner).now()
    }

    /// Lets time run from where it stands.
    pub fn start(&self) {
        let mut i = lock(&self.inner);
        if let Source::Stopped { at_ns } = i.source {
            i.source = Source::Running {
                since: Instant::now(),
                at_ns,
            };
        }
        self.changed.notify_all();
    }

    /// Stops time. No timer fires after that; a call that has begun is waited for, so the caller
    /// must not hold what it needs.
    pub fn stop(&self) {
        let mut i = lock(&self.inner);
        i.source = Source::Stopped { at_ns: i.now() };
        self.changed.notify_all();
        drop(
            self.changed
                .wait_while(i, |i| i.firing)
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
    }

    /// Sets guest time (restore). Only while stopped; ignored otherwise.
    pub fn set_ns(&self, now_ns: u64) {
        let mut i = lock(&self.inner);
        if let Source::Stopped { at_ns } = &mut i.source {
            *at_ns = now_ns;
        }
    }

    /// When the next timer is due, in ns of guest time.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        let i = lock(&self.inner);
        i.armed.iter().map(|a| a.deadline_ns).min()
    }

    /// Steps a stopped clock and fires what becomes due, in order of deadline. For tests.
    pub fn advance(&self, by_ns: u64) {
        let end = self.now_ns().saturating_add(by_ns);
        loop {
            let target = {
                let mut i = lock(&self.inner);
                let next = i.armed.iter().map(|a| a.deadline_ns).min();
                let now = i.now();
                i.source = Source::Stopped {
                    at_ns: next.unwrap_or(end).clamp(now, end),
                };
                i.take_due()
            };
            match target {
                Some(t) => t.fire(self.now_ns()),
                None => {
                    let mut i = lock(&self.inner);
                    if i.armed.iter().any(|a| a.deadline_ns <= end) {
                        continue;
                    }
                    i.source = Source::Stopped { at_ns: end };
                    return;
                }
            }
        }
    }

    /// Registers a target. The timer lives as long as the handle; the target is held weakly.
    pub fn timer(self: &Arc<Self>, target: Weak<dyn TimerTarget>) -> Timer {
        let mut i = lock(&self.inner);
        i.next_id += 1;
        let id = i.next_id;
        i.targets.push((id, target));
        Timer {
            clock: Arc::clone(self),
            id,
        }
    }

    /// Body of the timer thread: fires timers until [`VmClock::shut_down`].
    pub fn run_timers(&self) {
        let mut i = lock(&self.inner);
        while !i.stopping {
            let running = matches!(i.source, Source::Running { .. });
            if running && let Some(t) = i.take_due() {
                let now = i.now();
                i.firing = true;
                drop(i);
                t.fire(now);
                i = lock(&self.inner);
                i.firing = false;
                self.changed.notify_all();
                continue;
            }
            let now = i.now();
            let next = i
                .armed
                .iter()
                .map(|a| a.deadline_ns)
                .min()
                .filter(|_| running);
            i = match next {
                Some(d) => {
                    let wait = std::time::Duration::from_nanos(d.saturating_sub(now));
                    self.changed
                        .wait_timeout(i, wait)
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .0
                }
                None => self
                    .changed
                    .wait(i)
                    .unwrap_or_else(std::sync::PoisonError::into_inner),
            };
        }
    }

    /// Ends [`VmClock::run_timers`].
    pub fn shut_down(&self) {
        lock(&self.inner).stopping = true;
        self.changed.notify_all();
    }
}

/// One timer of a device. One-shot: it fires once per [`Timer::arm`].
pub struct Timer {
    clock: Arc<VmClock>,
    id: u64,
}

impl Timer {
    /// Fires at `deadline_ns` of guest time, at once if that has passed; replaces what was armed.
    pub fn arm(&self, deadline_ns: u64) {
        let mut i = lock(&self.clock.inner);
        let before = i.armed.iter().map(|a| a.deadline_ns).min();
        i.armed.retain(|a| a.id != self.id);
        i.armed.push(Armed {
            deadline_ns,
            id: self.id,
        });
        // The thread that waits for an earlier deadline wakes soon enough, in vain at worst.
        if before.is_none_or(|b| deadline_ns < b) {
            self.clock.changed.notify_all();
        }
    }
    /// Takes the deadline back. A call of `fire` that has begun still finishes.
    pub fn disarm(&self) {
        lock(&self.clock.inner).armed.retain(|a| a.id != self.id);
    }
    /// The clock.
    pub fn clock(&self) -> &Arc<VmClock> {
        &self.clock
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut i = lock(&self.clock.inner);
        i.armed.retain(|a| a.id != self.id);
        i.targets.retain(|(id, _)| *id != self.id);
    }
}

/// A device behind a mutex that owns timers.
pub trait TimedDevice: Send {
    /// One of the device's deadlines has come. `now_ns` is the clock at the call.
    fn timer_fired(&mut self, now_ns: u64);
}

struct DeviceTarget<T: TimedDevice>(Weak<Mutex<T>>);

impl<T: TimedDevice> TimerTarget for DeviceTarget<T> {
    fn fire(&self, now_ns: u64) {
        if let Some(d) = self.0.upgrade() {
            lock(&d).timer_fired(now_ns);
        }
    }
}

/// A [`Timer`] that calls the device which owns it, with the device locked.
pub struct DeviceTimer {
    timer: Timer,
    /// Keeps the target alive; the clock holds it weakly.
    _target: Arc<dyn TimerTarget>,
}

impl DeviceTimer {
    /// A timer of `clock` for a device that is being built with `Arc::new_cyclic`.
    pub fn new<T: TimedDevice + 'static>(
        clock: &Arc<VmClock>,
        device: &Weak<Mutex<T>>,
    ) -> DeviceTimer {
        let target: Arc<dyn TimerTarget> = Arc::new(DeviceTarget(Weak::clone(device)));
        DeviceTimer {
            timer: clock.timer(Arc::downgrade(&target)),
            _target: target,
        }
    }
    /// Arms at `Some` deadline, disarms at `None`.
    pub fn set(&self, deadline_ns: Option<u64>) {
        match deadline_ns {
            Some(d) => self.timer.arm(d),
            None => self.timer.disarm(),
        }
    }
    /// Guest time now.
    pub fn now_ns(&self) -> u64 {
        self.timer.clock().now_ns()
    }
}
