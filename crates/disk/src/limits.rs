//! Limits of a disk: requests and bytes in a second, with bursts.
//!
//! What need not wait passes on the caller's thread; the rest waits in two queues, of reads and of
//! writes, and one thread (`disk-limits`) submits it when it is due. The order within a queue is
//! kept. Flushes pass at once: they cover only writes that were completed before.
//!
//! Rates are kept by virtual scheduling (ITU-T I.371, GCRA), which is a token bucket without a
//! refill: a burst may run ahead of the rate by as much time as it takes at that rate. A request
//! passes when every limit that counts it has caught up, also if it is larger than the burst.
//!
//! LIMIT: the queues are not bounded; a frontend has no more requests in flight than its rings have
//! entries.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pyrite_mem::GuestMemory;

use crate::{BlockBackend, BlockRequest, Completion, DiskInfo};

/// So much a second, with bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Requests or bytes in a second; 0 counts as 1.
    pub per_second: u64,
    /// As many may come at once after silence.
    pub burst: u64,
}

/// Rates of one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of reads and writes together.
    pub total: Option<Rate>,
    /// Of reads.
    pub read: Option<Rate>,
    /// Of writes, discards and zeroing.
    pub write: Option<Rate>,
}

/// What a disk may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// In requests.
    pub requests: Rates,
    /// In bytes that are read and written; discards and zeroing move none.
    pub bytes: Rates,
}

impl Limits {
    /// Nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Limits::default()
    }
}

const READ: usize = 0;
const WRITE: usize = 1;
/// No request waits for longer than this on account of one before it.
const LONGEST: Duration = Duration::from_secs(3600);

/// When the next unit is due if all come as slowly as the rate wants.
struct Pace {
    rate: Rate,
    next: Instant,
}

impl Pace {
    fn time(&self, units: u64) -> Duration {
        let ns = u128::from(units) * 1_000_000_000 / u128::from(self.rate.per_second.max(1));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)).min(LONGEST)
    }

    fn due(&self, now: Instant) -> Instant {
        let ahead = self.time(self.rate.burst);
        self.next.checked_sub(ahead).map_or(now, |t| t.max(now))
    }

    fn took(&mut self, at: Instant, units: u64) {
        self.next = self.next.max(at) + self.time(units);
    }
}

/// Total, reads, writes of one unit.
struct Paces([Option<Pace>; 3]);

impl Paces {
    fn new(rates: &Rates, now: Instant) -> Paces {
        let pace = |rate: Option<Rate>| rate.map(|rate| Pace { rate, next: now });
        Paces([pace(rates.read), pace(rates.write), pace(rates.total)])
    }

    fn of(&self, side: usize) -> impl Iterator<Item = &Pace> {
        [&self.0[side], &self.0[2]].into_iter().flatten()
    }

    fn took(&mut self, side: usize, at: Instant, units: u64) {
        for n in [side, 2] {
            if let Some(p) = &mut self.0[n] {
                p.took(at, units);
            }
        }
    }
}

struct Waiting {
    bytes: u64,
    memory: Arc<GuestMemory>,
    request: BlockRequest,
    done: Completion,
}

struct State {
    limits: Limits,
    requests: Paces,
    bytes: Paces,
    queues: [VecDeque<Waiting>; 2],
    /// Side that passed last: the other one is first if both are due.
    last: usize,
    hurry: bool,
    stop: bool,
}

impl State {
    fn due(&self, side: usize, now: Instant) -> Instant {
        if self.hurry || self.stop {
            return now;
        }
        let paces = self.requests.of(side).chain(self.bytes.of(side));
        paces.map(|p| p.due(now)).max().unwrap_or(now)
    }

    fn took(&mut self, side: usize, at: Instant, bytes: u64) {
        self.requests.took(side, at, 1);
        self.bytes.took(side, at, bytes);
        self.last = side;
    }

    /// The request that may pass now, or when there will be one; neither if none waits.
    fn pop(&mut self, now: Instant) -> Result<Waiting, Option<Instant>> {
        let sides = [1 - self.last, self.last];
        let waiting = sides.into_iter().filter(|s| !self.queues[*s].is_empty());
        // The first of equals.
        let next = waiting.map(|s| (self.due(s, now), s));
        match next.min_by_key(|(due, _)| *due) {
            Some((due, side)) if due <= now => {
                let w = self.queues[side].pop_front().ok_or(None)?;
                self.took(side, now, w.bytes);
                Ok(w)
            }
            next => Err(next.map(|(due, _)| due)),
        }
    }
}

struct Shared {
    inner: Arc<dyn BlockBackend>,
    /// Something is limited, or waits: without, nothing is locked.
    active: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    waiting: AtomicUsize,
    /// Requests that have waited.
    delayed: AtomicU64,
}

/// A disk with limits.
pub struct Limited {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Limited {
    /// A disk without limits.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Limited {
        let now = Instant::now();
        let none = Rates::default();
        let shared = Arc::new(Shared {
            inner,
            active: AtomicBool::new(false),
            state: Mutex::new(State {
                limits: Limits::default(),
                requests: Paces::new(&none, now),
                bytes: Paces::new(&none, now),
                queues: Default::default(),
                last: WRITE,
                hurry: false,
                stop: false,
            }),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            delayed: AtomicU64::new(0),
        });
        Limited {
            shared,
            worker: Mutex::new(None),
        }
    }

    /// Sets the limits; what waits goes by the new ones. Fails if the host gives no thread.
    pub fn set(&self, limits: &Limits) -> io::Result<()> {
        let mut worker = lock(&self.worker);
        if worker.is_none() && !limits.is_none() {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name("disk-limits".into());
            *worker = Some(builder.spawn(move || shared.run())?);
        }
        let now = Instant::now();
        let mut s = lock(&self.shared.state);
        s.limits = *limits;
        s.requests = Paces::new(&limits.requests, now);
        s.bytes = Paces::new(&limits.bytes, now);
        if !limits.is_none() {
            self.shared.active.store(true, Ordering::Release);
        }
        drop(s);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// What the limits are.
    pub fn limits(&self) -> Limits {
        lock(&self.shared.state).limits
    }

    /// Lets everything pass (true), until told otherwise: what waits is to be done soon. It counts
    /// all the same, so that the mean rate is kept.
    pub fn hurry(&self, hurry: bool) {
        lock(&self.shared.state).hurry = hurry;
        self.shared.changed.notify_all();
    }

    /// Requests that wait now, and that have waited.
    pub fn waits(&self) -> (usize, u64) {
        (
            self.shared.waiting.load(Ordering::Acquire),
            self.shared.delayed.load(Ordering::Relaxed),
        )
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.changed.notify_all();
        let worker = lock(&self.worker).take();
        // The last owner may be a completion, which runs on the worker.
        if let Some(w) = worker
            && w.thread().id() != std::thread::current().id()
            && w.join().is_err()
        {
            tracing::error!("the thread of a disk's limits has panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut s = lock(&self.state);
        loop {
            match s.pop(Instant::now()) {
                Ok(w) => {
                    drop(s);
                    self.inner.submit(&w.memory, w.request, w.done);
                    // Only now: who waits for zero must not miss it between here and there.
                    self.waiting.fetch_sub(1, Ordering::AcqRel);
                    s = lock(&self.state);
                }
                Err(_) if s.stop => return,
                Err(Some(due)) => {
                    let wait = due.saturating_duration_since(Instant::now());
                    s = self
                        .changed
                        .wait_timeout(s, wait)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                Err(None) => {
                    if s.limits.is_none() {
                        self.active.store(false, Ordering::Release);
                    }
                    s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// Side and bytes of a request; none of a flush.
fn charge(request: &BlockRequest) -> Option<(usize, u64)> {
    let sum = |bufs: &[crate::IoBuf]| bufs.iter().map(|b| u64::from(b.len)).sum();
    match request {
        BlockRequest::Read { bufs, .. } => Some((READ, sum(bufs))),
        BlockRequest::Write { bufs, .. } => Some((WRITE, sum(bufs))),
        BlockRequest::Discard { .. } | BlockRequest::WriteZeroes { .. } => Some((WRITE, 0)),
        BlockRequest::Flush => None,
    }
}

impl BlockBackend for Limited {
    fn info(&self) -> DiskInfo {
        self.shared.inner.info()
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        if self.shared.active.load(Ordering::Acquire)
            && let Some((side, bytes)) = charge(&request)
        {
            let now = Instant::now();
            let mut s = lock(&self.shared.state);
            if !s.queues[side].is_empty() || s.due(side, now) > now {
                self.shared.waiting.fetch_add(1, Ordering::AcqRel);
                self.shared.delayed.fetch_add(1, Ordering::Relaxed);
                let memory = Arc::clone(memory);
                s.queues[side].push_back(Waiting {
                    bytes,
                    memory,
                    request,
                    done,
                });
                drop(s);
                self.shared.changed.notify_all();
                return;
            }
            s.took(side, now, bytes);
        }
        self.shared.inner.submit(memory, request, done);
    }

    fn in_flight(&self) -> usize {
        self.shared.waiting.load(Ordering::Acquire) + self.shared.inner.in_flight()
    }
}

#[cfg(test)]
mod tests;
