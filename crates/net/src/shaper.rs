//! A cable with limits: rate in bytes and frames, loss, delay.
//!
//! Each direction is a queue of its own. What need not wait passes on the caller's thread; the
//! rest is sent when it is due by one thread (`net-shaper`).
//!
//! Rates are kept by virtual scheduling (ITU-T I.371, GCRA): a burst may run ahead of the rate by
//! as much time as it takes at that rate. Losses come from a generator with a seed, so the same
//! frames are lost in every run. Frames that wait are not part of a VM's saved state: a restored
//! guest finds them lost, as on a wire.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{FrameSink, NetBackend};

/// LIMIT: frames that wait in one direction.
const QUEUE_FRAMES: usize = 4096;
/// LIMIT: bytes of them.
const QUEUE_BYTES: usize = 8 << 20;
/// From guest and to guest.
const OUT: usize = 0;
const IN: usize = 1;

/// So much a second, with bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units in a second; more than 0.
    pub per_second: u64,
    /// Units that may come at once after silence.
    pub burst: u64,
}

/// What a cable does to frames, in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Limit in bytes.
    pub bytes: Option<Rate>,
    /// Limit in frames.
    pub frames: Option<Rate>,
    /// Frames that are lost, of a million.
    pub loss_ppm: u32,
    /// How long a frame is on its way.
    pub delay: Duration,
    /// Chooses which frames are lost.
    pub seed: u64,
}

impl Shape {
    /// True if the cable is as good as none.
    pub fn is_none(&self) -> bool {
        let Shape {
            bytes,
            frames,
            loss_ppm,
            delay,
            seed: _,
        } = self;
        bytes.is_none() && frames.is_none() && *loss_ppm == 0 && delay.is_zero()
    }
}

/// When the next unit is due if all come as slowly as the rate wants.
struct Pace {
    rate: Rate,
    next: Instant,
}

impl Pace {
    fn time(&self, units: u64) -> Duration {
        let ns = u128::from(units) * 1_000_000_000 / u128::from(self.rate.per_second.max(1));
        // A frame does not wait for years.
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)).min(Duration::from_secs(3600))
    }
    /// When `units` may pass, at `now` or later.
    fn when(&self, now: Instant) -> Instant {
        let ahead = self.time(self.rate.burst);
        self.next.checked_sub(ahead).map_or(now, |t| t.max(now))
    }
    fn took(&mut self, at: Instant, units: u64) {
        self.next = self.next.max(at) + self.time(units);
    }
}

struct Lane {
    bytes: Option<Pace>,
    frames: Option<Pace>,
    loss_ppm: u32,
    delay: Duration,
    random: u64,
    queue: VecDeque<(Instant, Vec<u8>)>,
    queued_bytes: usize,
    last_due: Option<Instant>,
    /// The worker has taken frames that are not delivered yet.
    busy: bool,
    /// The receiver had no room; it says when it has.
    blocked: bool,
    lost: u64,
    overflowed: u64,
}

impl Lane {
    fn new(shape: &Shape, seed: u64, now: Instant) -> Lane {
        let pace = |rate: Option<Rate>| rate.map(|rate| Pace { rate, next: now });
        Lane {
            bytes: pace(shape.bytes),
            frames: pace(shape.frames),
            loss_ppm: shape.loss_ppm,
            delay: shape.delay,
            random: seed,
            queue: VecDeque::new(),
            queued_bytes: 0,
            last_due: None,
            busy: false,
            blocked: false,
            lost: 0,
            overflowed: 0,
        }
    }

    /// splitmix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn loses(&mut self) -> bool {
        let lost = self.loss_ppm > 0 && self.random() % 1_000_000 < u64::from(self.loss_ppm);
        self.lost += u64::from(lost);
        lost
    }

    fn has_room(&self) -> bool {
        self.queue.len() < QUEUE_FRAMES && self.queued_bytes < QUEUE_BYTES
    }

    /// When a frame of this length is due.
    fn schedule(&mut self, len: usize, now: Instant) -> Instant {
        let mut at = now;
        for pace in [&self.bytes, &self.frames].into_iter().flatten() {
            at = at.max(pace.when(now));
        }
        if let Some(p) = &mut self.bytes {
            p.took(at, len as u64);
        }
        if let Some(p) = &mut self.frames {
            p.took(at, 1);
        }
        // Frames do not overtake each other.
        let due = (at + self.delay).max(self.last_due.unwrap_or(now));
        self.last_due = Some(due);
        due
    }

    /// Takes a frame: true if it may pass at once, on this thread.
    fn enter(&mut self, frame: &[u8], now: Instant, paused: bool) -> bool {
        if self.loses() {
            return false;
        }
        if !self.has_room() {
            self.overflowed += 1;
            return false;
        }
        let due = self.schedule(frame.len(), now);
        if due <= now && self.queue.is_empty() && !self.busy && !paused {
            return true;
        }
        self.queued_bytes += frame.len();
        self.queue.push_back((due, frame.to_vec()));
        false
    }

    fn pop_due(&mut self, now: Instant) -> Option<Vec<u8>> {
        let (due, _) = self.queue.front()?;
        if self.blocked || *due > now {
            return None;
        }
        let (_, frame) = self.queue.pop_front()?;
        self.queued_bytes -= frame.len();
        Some(frame)
    }
}

struct State {
    lanes: [Lane; 2],
    paused: bool,
    stop: bool,
    /// The back end was told that there is no room.
    inner_waits: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    sink: OnceLock<Arc<dyn FrameSink>>,
    /// Gone once the shaper is dropped: the back end holds our sink.
    inner: Mutex<Option<Arc<dyn NetBackend>>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn inner(&self) -> Option<Arc<dyn NetBackend>> {
        lock(&self.inner).clone()
    }

    /// Sends what is due in a direction; false if nothing was.
    fn send_due(&self, lane: usize) -> bool {
        let now = Instant::now();
        let frame = {
            let mut s = lock(&self.state);
            if s.paused {
                return false;
            }
            let l = &mut s.lanes[lane];
            let frame = l.pop_due(now);
            l.busy = frame.is_some();
            frame
        };
        let Some(frame) = frame else { return false };
        let taken = if lane == OUT {
            if let Some(inner) = self.inner() {
                inner.transmit(&frame);
            }
            true
        } else {
            match self.sink.get() {
                // Blocked before it is asked: it may say that it has room before we note that it
                // has none.
                Some(sink) => {
                    lock(&self.state).lanes[IN].blocked = true;
                    sink.ready() && sink.receive(&frame)
                }
                None => true,
            }
        };
        let wake_inner = {
            let mut s = lock(&self.state);
            let l = &mut s.lanes[lane];
            l.busy = false;
            if taken {
                l.blocked = false;
            } else {
                l.queued_bytes += frame.len();
                l.queue.push_front((now, frame));
            }
            s.lanes[IN].has_room() && std::mem::take(&mut s.inner_waits)
        };
        if wake_inner && let Some(inner) = self.inner() {
            inner.receive_ready();
        }
        taken
    }

    fn run(&self) {
        loop {
            while self.send_due(OUT) | self.send_due(IN) {}
            let s = lock(&self.state);
            if s.stop {
                return;
            }
            let due = s
                .lanes
                .iter()
                .filter(|l| !l.blocked && !s.paused)
                .filter_map(|l| l.queue.front().map(|(due, _)| *due))
                .min();
            match due.map(|d| d.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => {}
                Some(wait) => drop(self.changed.wait_timeout(s, wait)),
                None => drop(self.changed.wait(s)),
            }
        }
    }
}

/// The cable.
pub struct Shaper {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

impl Shaper {
    /// Puts a cable of this shape in front of `inner`. Fails if the host gives no thread.
    pub fn new(inner: Arc<dyn NetBackend>, shape: &Shape) -> io::Result<Shaper> {
        let now = Instant::now();
        // The directions lose different frames.
        let lane = |n: u64| Lane::new(shape, shape.seed.wrapping_mul(2).wrapping_add(n), now);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                lanes: [lane(0), lane(1)],
                paused: false,
                stop: false,
                inner_waits: false,
            }),
            changed: Condvar::new(),
            sink: OnceLock::new(),
            inner: Mutex::new(Some(inner)),
        });
        let ours = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name("net-shaper".into())
            .spawn(move || ours.run())?;
        Ok(Shaper {
            shared,
            worker: Some(worker),
        })
    }

    /// Frames lost on purpose and for lack of room: from the guest, to the guest.
    pub fn lost(&self) -> [(u64, u64); 2] {
        let s = lock(&self.shared.state);
        [&s.lanes[OUT], &s.lanes[IN]].map(|l| (l.lost, l.overflowed))
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.changed.notify_all();
        if let Some(w) = self.worker.take()
            && w.join().is_err()
        {
            tracing::error!("the thread of a shaped network has panicked");
        }
        *lock(&self.shared.inner) = None;
    }
}

/// The guest's side.
struct ShapedSink(Arc<Shared>);

impl FrameSink for ShapedSink {
    fn receive(&self, frame: &[u8]) -> bool {
        let Some(sink) = self.0.sink.get() else {
            return false;
        };
        let now = Instant::now();
        let direct = {
            let mut s = lock(&self.0.state);
            let paused = s.paused;
            let direct = s.lanes[IN].enter(frame, now, paused);
            // The worker keeps out until this frame is gone.
            s.lanes[IN].busy |= direct;
            direct
        };
        if !direct {
            self.0.changed.notify_all();
            return true;
        }
        let taken = sink.ready() && sink.receive(frame);
        let mut s = lock(&self.0.state);
        s.lanes[IN].busy = false;
        if !taken {
            s.lanes[IN].queued_bytes += frame.len();
            s.lanes[IN].queue.push_front((now, frame.to_vec()));
        }
        drop(s);
        self.0.changed.notify_all();
        true
    }

    fn ready(&self) -> bool {
        let mut s = lock(&self.0.state);
        let room = s.lanes[IN].has_room() && !s.paused;
        s.inner_waits |= !room;
        room
    }
}

impl NetBackend for Shaper {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        let _ = self.shared.sink.set(sink);
        if let Some(inner) = self.shared.inner() {
            inner.attach(Arc::new(ShapedSink(Arc::clone(&self.shared))));
        }
    }

    fn transmit(&self, frame: &[u8]) {
        let direct = {
            let mut s = lock(&self.shared.state);
            let paused = s.paused;
            s.lanes[OUT].enter(frame, Instant::now(), paused)
        };
        if direct {
            if let Some(inner) = self.shared.inner() {
                inner.transmit(frame);
            }
        } else {
            self.shared.changed.notify_all();
        }
    }

    fn receive_ready(&self) {
        lock(&self.shared.state).lanes[IN].blocked = false;
        self.shared.changed.notify_all();
        if let Some(inner) = self.shared.inner() {
            inner.receive_ready();
        }
    }

    fn pause(&self, paused: bool) {
        let waited = {
            let mut s = lock(&self.shared.state);
            s.paused = paused;
            !paused && std::mem::take(&mut s.inner_waits)
        };
        self.shared.changed.notify_all();
        if let Some(inner) = self.shared.inner() {
            inner.pause(paused);
            if waited {
                inner.receive_ready();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Collector, Recorder};

    const PATIENCE: Duration = Duration::from_secs(20);

    fn shaped(shape: Shape) -> (Arc<Recorder>, Arc<Collector>, Shaper) {
        let inner = Arc::new(Recorder::default());
        let shaper = Shaper::new(inner.clone(), &shape).unwrap();
        let sink = Arc::new(Collector::default());
        shaper.attach(sink.clone());
        (inner, sink, shaper)
    }

    fn until(what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn numbered(n: u32) -> Vec<u8> {
        let mut f = vec![0; 100];
        f[..4].copy_from_slice(&n.to_le_bytes());
        f
    }

    #[test]
    fn bytes_come_no_faster_than_the_rate_and_in_order() {
        let rate = Rate {
            per_second: 20_000,
            burst: 1000,
        };
        let (inner, sink, shaper) = shaped(Shape {
            bytes: Some(rate),
            ..Shape::default()
        });
        let began = Instant::now();
        for n in 0..50 {
            shaper.transmit(&numbered(n));
            inner.deliver(&numbered(n));
        }
        let at_once = inner.sent().len();
        assert!((10..=13).contains(&at_once), "{at_once}");
        until("all frames", || {
            inner.sent().len() == 50 && sink.frames().len() == 50
        });
        // 5000 bytes, 1000 of them (and the last frame) at once.
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(190), "{took:?}");
        let all: Vec<_> = (0..50).map(numbered).collect();
        assert_eq!(inner.sent(), all);
        assert_eq!(sink.frames(), all);
    }

    #[test]
    fn frames_come_no_faster_than_the_rate() {
        let rate = Rate {
            per_second: 100,
            burst: 2,
        };
        let (inner, _, shaper) = shaped(Shape {
            frames: Some(rate),
            ..Shape::default()
        });
        let began = Instant::now();
        for n in 0..12 {
            shaper.transmit(&numbered(n));
        }
        until("all frames", || inner.sent().len() == 12);
        assert!(began.elapsed() >= Duration::from_millis(85));
    }

    #[test]
    fn the_same_seed_loses_the_same_frames() {
        let run = |seed| {
            let (inner, sink, shaper) = shaped(Shape {
                loss_ppm: 300_000,
                seed,
                ..Shape::default()
            });
            for n in 0..1000 {
                shaper.transmit(&numbered(n));
                inner.deliver(&numbered(n));
            }
            assert_eq!(shaper.lost()[0].0 as usize, 1000 - inner.sent().len());
            (inner.sent(), sink.frames())
        };
        let (a, b) = (run(1), run(1));
        assert_eq!(a, b);
        assert_ne!(a, run(2));
        assert_ne!(a.0, a.1, "directions differ");
        assert!((600..800).contains(&a.0.len()), "{}", a.0.len());
    }

    #[test]
    fn delay_is_kept_in_both_directions() {
        let (inner, sink, shaper) = shaped(Shape {
            delay: Duration::from_millis(60),
            ..Shape::default()
        });
        let began = Instant::now();
        shaper.transmit(&numbered(1));
        inner.deliver(&numbered(2));
        assert!(inner.sent().is_empty() && sink.frames().is_empty());
        until("both", || {
            !inner.sent().is_empty() && !sink.frames().is_empty()
        });
        assert!(began.elapsed() >= Duration::from_millis(60));
    }

    #[test]
    fn a_full_card_is_waited_for_and_the_back_end_too() {
        let (inner, sink, shaper) = shaped(Shape {
            delay: Duration::from_micros(10),
            ..Shape::default()
        });
        sink.refuse(true);
        let mut n = 0;
        while inner.ready() {
            inner.deliver(&numbered(n));
            n += 1;
        }
        assert_eq!(n as usize, QUEUE_FRAMES);
        assert!(sink.frames().is_empty());
        sink.refuse(false);
        shaper.receive_ready();
        until("all frames", || sink.frames().len() == n as usize);
        until("the back end is told", || inner.told() > 1);
        let all: Vec<_> = (0..n).map(numbered).collect();
        assert_eq!(sink.frames(), all);
    }

    #[test]
    fn nothing_passes_while_paused() {
        let (inner, sink, shaper) = shaped(Shape {
            delay: Duration::from_millis(1),
            ..Shape::default()
        });
        shaper.pause(true);
        shaper.transmit(&numbered(1));
        assert!(!inner.ready());
        std::thread::sleep(Duration::from_millis(20));
        assert!(inner.sent().is_empty());
        shaper.pause(false);
        until("the frame", || inner.sent().len() == 1);
        assert!(sink.frames().is_empty());
    }

    #[test]
    fn a_flood_is_bounded() {
        let rate = Rate {
            per_second: 1,
            burst: 0,
        };
        let (inner, _, shaper) = shaped(Shape {
            frames: Some(rate),
            ..Shape::default()
        });
        for n in 0..10_000 {
            shaper.transmit(&numbered(n));
        }
        assert!(shaper.lost()[0].1 > 5000);
        assert!(inner.sent().len() < 3);
    }
}
