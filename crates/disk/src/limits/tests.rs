use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::{DiskError, IoBuf, MemDisk};

const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    memory: Arc<GuestMemory>,
    disk: Limited,
    inner: Arc<MemDisk>,
    sender: Sender<(u32, bool)>,
    done: Receiver<(u32, bool)>,
}

fn rig(limits: Limits) -> Rig {
    let inner = Arc::new(MemDisk::new(4 << 20));
    let disk = Limited::new(inner.clone());
    disk.set(&limits).unwrap();
    let (sender, done) = channel();
    Rig {
        memory: Arc::new(GuestMemory::new(4 << 20).unwrap()),
        disk,
        inner,
        sender,
        done,
    }
}

impl Rig {
    fn start(&self, id: u32, request: BlockRequest) {
        let sender = self.sender.clone();
        let done = Box::new(move |r: Result<(), DiskError>| sender.send((id, r.is_ok())).unwrap());
        self.disk.submit(&self.memory, request, done);
    }

    fn transfer(&self, id: u32, write: bool, len: u32) {
        let bufs = vec![IoBuf { gpa: 0, len }];
        self.start(
            id,
            if write {
                let fua = false;
                BlockRequest::Write {
                    offset: 0,
                    bufs,
                    fua,
                }
            } else {
                BlockRequest::Read { offset: 0, bufs }
            },
        );
    }

    /// Ids of the next requests that are done.
    fn next(&self, n: usize) -> Vec<u32> {
        let one = |_| self.done.recv_timeout(PATIENCE).expect("in time");
        let all: Vec<_> = (0..n).map(one).collect();
        assert!(all.iter().all(|(_, fine)| *fine));
        all.into_iter().map(|(id, _)| id).collect()
    }
}

fn rate(per_second: u64, burst: u64) -> Option<Rate> {
    Some(Rate { per_second, burst })
}

#[test]
fn requests_come_no_faster_than_the_rate_and_in_order() {
    let limits = Limits {
        requests: Rates {
            total: rate(100, 10),
            ..Rates::default()
        },
        ..Limits::default()
    };
    let r = rig(limits);
    assert_eq!(r.disk.limits(), limits);
    let began = Instant::now();
    for n in 0..40 {
        r.transfer(n, true, 512);
    }
    assert_eq!(r.next(40), (0..40).collect::<Vec<_>>());
    // 10 at once, and one that the burst lets pass; the others a hundredth of a second each.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(285), "{took:?}");
    let counted = || r.disk.waits();
    let limit = Instant::now() + Duration::from_secs(20);
    while counted().0 != 0 && Instant::now() < limit {
        std::thread::yield_now();
    }
    let (waiting, delayed) = counted();
    assert!(waiting == 0 && delayed >= 10, "{waiting} {delayed}");
}

#[test]
fn bytes_are_limited_and_large_requests_pass() {
    let r = rig(Limits {
        bytes: Rates {
            write: rate(1 << 20, 64 << 10),
            ..Rates::default()
        },
        ..Limits::default()
    });
    let began = Instant::now();
    // Larger than the burst: the first passes, the next waits until it is paid for.
    for n in 0..3 {
        r.transfer(n, true, 128 << 10);
    }
    // Neither reads nor flushes nor discards are counted.
    for n in 10..200 {
        r.transfer(n, false, 128 << 10);
    }
    r.start(200, BlockRequest::Flush);
    let first = r.next(192);
    assert_eq!(first[..3], [0, 10, 11], "only the first write passed");
    assert_eq!(r.next(2), [1, 2]);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(187), "{took:?}");
    r.start(
        201,
        BlockRequest::Discard {
            offset: 0,
            len: 4 << 20,
        },
    );
    assert_eq!(r.next(1), [201]);
}

#[test]
fn writes_do_not_hold_up_reads_and_the_total_counts_both() {
    let r = rig(Limits {
        requests: Rates {
            total: rate(100, 1),
            write: rate(1, 1),
            ..Rates::default()
        },
        ..Limits::default()
    });
    let began = Instant::now();
    for n in 0..3 {
        r.transfer(n, true, 512);
    }
    for n in 10..20 {
        r.transfer(n, false, 512);
    }
    let mut seen = Vec::new();
    while !seen.contains(&19) {
        seen.extend(r.next(1));
    }
    assert!(began.elapsed() >= Duration::from_millis(80));
    let reads: Vec<u32> = seen.iter().copied().filter(|id| *id >= 10).collect();
    assert_eq!(reads, (10..20).collect::<Vec<_>>());
    // What still waits goes at once if it is to hurry.
    r.disk.hurry(true);
    while seen.len() < 13 {
        seen.extend(r.next(1));
    }
    // A request is told of just before it is no longer counted.
    let limit = Instant::now() + Duration::from_secs(20);
    while r.disk.in_flight() != 0 && Instant::now() < limit {
        std::thread::yield_now();
    }
    assert_eq!(r.disk.in_flight(), 0);
    let writes: Vec<u32> = seen.into_iter().filter(|id| *id < 10).collect();
    assert_eq!(writes, [0, 1, 2]);
}

#[test]
fn limits_change_while_requests_wait() {
    let slow = Limits {
        requests: Rates {
            read: rate(1, 1),
            ..Rates::default()
        },
        ..Limits::default()
    };
    let r = rig(slow);
    for n in 0..1000 {
        r.transfer(n, false, 512);
    }
    assert!(r.disk.in_flight() >= 900);
    r.disk.set(&Limits::default()).unwrap();
    assert_eq!(r.next(1000), (0..1000).collect::<Vec<_>>());
    // Without limits nothing waits any more, also in front of what was limited before.
    while r.disk.shared.active.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(1));
    }
    r.transfer(1, false, 512);
    assert_eq!(r.done.try_recv(), Ok((1, true)));
    r.disk.set(&slow).unwrap();
    for n in 0..3 {
        r.transfer(n, false, 512);
    }
    // Dropping it finishes what was submitted.
    let Rig {
        disk, inner, done, ..
    } = r;
    drop(disk);
    assert_eq!(done.try_iter().count(), 3);
    assert_eq!(inner.in_flight(), 0);
}
