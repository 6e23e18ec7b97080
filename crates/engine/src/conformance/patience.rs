//! How long a guest may take. The time of day would fail a good guest on a host that is busy with
//! other things; so what counts is what its vCPUs' threads were given, and when they all slept.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often to look.
pub(super) const TICK: Duration = Duration::from_millis(50);
/// LIMIT: processor time without progress, of all vCPUs together.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
/// LIMIT: processor time in all.
const TOTAL_LIMIT: Duration = Duration::from_secs(120);
/// LIMIT: time without progress in which no vCPU's thread had anything to do. Longer than an
/// interrupt that is still on its way through another thread can take.
const IDLE_LIMIT: Duration = Duration::from_secs(20);
/// Unit of times in `/proc`: USER_HZ is 100 on x86.
const CLOCK_TICK: Duration = Duration::from_millis(10);

/// The file with the state and the times of the calling thread; `None` without `/proc`.
pub(super) fn this_thread() -> Option<PathBuf> {
    let link = std::fs::read_link("/proc/thread-self").ok()?;
    Some(Path::new("/proc").join(link).join("stat"))
}

/// What a thread does and has done: runnable (or waiting for its memory), and its processor time.
/// proc(5), `/proc/pid/stat`. A thread that has ended does nothing.
fn read(stat: &Path) -> (bool, Duration) {
    let text = std::fs::read_to_string(stat).unwrap_or_default();
    parse(&text).unwrap_or_default()
}

fn parse(text: &str) -> Option<(bool, Duration)> {
    // The name, in parentheses, may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let mut times = fields.skip(10).map(str::parse::<u32>);
    let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
    Some((
        matches!(state, "R" | "D"),
        CLOCK_TICK * user.saturating_add(system),
    ))
}

/// What is left to a guest.
pub(super) struct Patience {
    threads: Vec<PathBuf>,
    progress: u64,
    /// Processor time at the beginning, at the last progress, and when last looked at.
    at_begin: Duration,
    at_progress: Duration,
    used: Duration,
    idle: Duration,
    looked: Instant,
}

impl Patience {
    /// With the files of the vCPUs' threads ([`this_thread`]); without, the time of day counts.
    pub(super) fn new(threads: Vec<PathBuf>) -> Patience {
        let used = threads.iter().map(|t| read(t).1).sum();
        Patience {
            threads,
            progress: 0,
            at_begin: used,
            at_progress: used,
            used,
            idle: Duration::ZERO,
            looked: Instant::now(),
        }
    }

    /// Begins anew.
    pub(super) fn renew(&mut self) {
        self.at_begin = self.used;
        self.got_on();
    }

    fn got_on(&mut self) {
        self.at_progress = self.used;
        self.idle = Duration::ZERO;
    }

    /// Looks again; why the guest has failed if it may take no longer. `progress` is a number that
    /// changes when the guest gets on. Every [`TICK`].
    pub(super) fn lost(&mut self, progress: u64) -> Option<String> {
        let mut busy = false;
        let mut used = Duration::ZERO;
        for t in &self.threads {
            let (runs, time) = read(t);
            busy |= runs;
            used += time;
        }
        let passed = self.looked.elapsed();
        self.looked = Instant::now();
        self.count(progress, busy, used, passed)
    }

    fn count(
        &mut self,
        progress: u64,
        busy: bool,
        used: Duration,
        passed: Duration,
    ) -> Option<String> {
        // Threads that have ended are not seen any more.
        let used = used.max(self.used);
        let slept = !busy && used == self.used;
        self.used = used;
        if progress != self.progress {
            self.progress = progress;
            self.got_on();
        } else if slept {
            // This thread may not have run for long either.
            self.idle += passed.min(2 * TICK);
        }
        if self.idle >= IDLE_LIMIT {
            return Some(format!("all vCPUs slept for {IDLE_LIMIT:?}"));
        }
        let busy = used.saturating_sub(self.at_progress);
        if busy >= BUSY_LIMIT {
            return Some(format!("no progress in {busy:?} of processor time"));
        }
        let all = used.saturating_sub(self.at_begin);
        (all >= TOTAL_LIMIT).then(|| format!("not done after {all:?} of processor time"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(
        p: &mut Patience,
        n: u32,
        mut look: impl FnMut(u32) -> (u64, bool, u64),
    ) -> Option<u32> {
        (0..n).find(|&n| {
            let (progress, busy, used_ms) = look(n);
            let lost = p.count(progress, busy, Duration::from_millis(used_ms), TICK);
            lost.is_some()
        })
    }

    #[test]
    fn starved_threads_have_all_the_time() {
        let mut p = Patience::new(Vec::new());
        assert_eq!(looks(&mut p, 100_000, |_| (0, true, 0)), None);
        // And guests that get on, as long as they do not do so for ever.
        let mut p = Patience::new(Vec::new());
        let all = looks(&mut p, 100_000, |n| (n.into(), true, u64::from(n) * 50));
        assert_eq!(all, Some(120 * 20));
    }

    #[test]
    fn sleeping_and_spinning_guests_are_lost() {
        let mut p = Patience::new(Vec::new());
        assert_eq!(looks(&mut p, 1000, |_| (0, false, 0)), Some(20 * 20 - 1));
        let mut p = Patience::new(Vec::new());
        let spins = looks(&mut p, 1000, |n| (0, true, u64::from(n) * 50));
        assert_eq!(spins, Some(10 * 20));
        // A suspended host is not the guest's fault.
        let mut p = Patience::new(Vec::new());
        let hour = Duration::from_secs(3600);
        assert_eq!(p.count(0, false, Duration::ZERO, hour), None);
    }

    #[test]
    fn times_of_threads_are_read() {
        let line = "7 (a) b) R 1 2 3 4 5 6 7 8 9 10 150 50 0 0";
        assert_eq!(parse(line), Some((true, Duration::from_secs(2))));
        assert_eq!(parse("7 (x) S 1"), None);
        let me = this_thread().expect("/proc");
        let begin = Instant::now();
        while read(&me).1 < CLOCK_TICK {
            assert!(begin.elapsed() < Duration::from_secs(60), "no time passes");
        }
        assert!(read(&me).0, "this thread runs");
        let (to, from) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            let _ = tell.send(this_thread());
            let _ = from.recv();
        });
        let other = told.recv().expect("told").expect("/proc");
        while read(&other).0 {
            std::thread::yield_now();
        }
        drop(to);
        sleeper.join().expect("ends");
        assert_eq!(read(&other), (false, Duration::ZERO));
    }
}
