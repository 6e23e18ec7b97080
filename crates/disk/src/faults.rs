//! A disk that fails on purpose, to see what those above it make of that.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyrite_mem::GuestMemory;

use crate::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo, check_request};

/// Bytes of a sector, the unit in which ranges are given.
const SECTOR_BYTES: u64 = 512;

/// What fails.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Reads that touch one of these sectors of 512 bytes fail with EIO.
    pub reads: Option<RangeInclusive<u64>>,
    /// Writes, discards and zeroing that touch one of these fail with EIO.
    pub writes: Option<RangeInclusive<u64>>,
    /// Flushes fail with EIO.
    pub flushes: bool,
    /// Writes and zeroing that reach beyond this byte fail with ENOSPC.
    pub full_at: Option<u64>,
}

impl Faults {
    /// How a request fails, if it does.
    fn hit(&self, request: &BlockRequest) -> Option<DiskError> {
        let io = || Some(DiskError::Io(std::io::Error::from_raw_os_error(libc::EIO)));
        let sum = |bufs: &[crate::IoBuf]| bufs.iter().map(|b| u64::from(b.len)).sum::<u64>();
        let (range, offset, len, grows) = match request {
            BlockRequest::Read { offset, bufs } => (&self.reads, *offset, sum(bufs), false),
            BlockRequest::Write { fua: true, .. } if self.flushes => return io(),
            BlockRequest::Write { offset, bufs, .. } => (&self.writes, *offset, sum(bufs), true),
            BlockRequest::WriteZeroes { offset, len, .. } => (&self.writes, *offset, *len, true),
            BlockRequest::Discard { offset, len } => (&self.writes, *offset, *len, false),
            BlockRequest::Flush => return if self.flushes { io() } else { None },
        };
        let end = offset.saturating_add(len);
        if let Some(r) = range
            && len > 0
            && offset / SECTOR_BYTES <= *r.end()
            && (end - 1) / SECTOR_BYTES >= *r.start()
        {
            return io();
        }
        if grows && self.full_at.is_some_and(|full| end > full) {
            return Some(DiskError::NoSpace);
        }
        None
    }
}

/// A disk whose requests fail as [`Faults`] say; the others are passed on.
pub struct Faulty {
    inner: Arc<dyn BlockBackend>,
    active: AtomicBool,
    faults: Mutex<Faults>,
    hits: AtomicU64,
}

impl Faulty {
    /// A disk that does not fail yet.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Faulty {
        Faulty {
            inner,
            active: AtomicBool::new(false),
            faults: Mutex::default(),
            hits: AtomicU64::new(0),
        }
    }

    /// Changes what fails from the next request on.
    pub fn set(&self, faults: Faults) {
        let active = faults != Faults::default();
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
        self.active.store(active, Ordering::Release);
    }

    /// How many requests have failed on purpose.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }
}

impl BlockBackend for Faulty {
    fn info(&self) -> DiskInfo {
        self.inner.info()
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        if self.active.load(Ordering::Acquire) {
            // What is wrong anyway fails for that reason.
            if let Err(e) = check_request(&self.info(), memory, &request) {
                return done(Err(e));
            }
            let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(e) = faults.hit(&request) {
                drop(faults);
                self.hits.fetch_add(1, Ordering::Relaxed);
                return done(Err(e));
            }
        }
        self.inner.submit(memory, request, done);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IoBuf, MemDisk};

    #[test]
    fn what_touches_a_bad_sector_fails_as_it_should() {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let disk = Faulty::new(Arc::new(MemDisk::new(1 << 20)));
        let run = |request| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let done = Box::new(move |r| sender.send(r).unwrap());
            disk.submit(&memory, request, done);
            match receiver.try_recv().expect("completed") {
                Ok(()) => "fine",
                Err(DiskError::Io(e)) if e.raw_os_error() == Some(libc::EIO) => "EIO",
                Err(DiskError::NoSpace) => "ENOSPC",
                Err(DiskError::OutOfRange { .. }) => "range",
                Err(e) => panic!("{e}"),
            }
        };
        let bufs = |len| vec![IoBuf { gpa: 0, len }];
        let read = |sector: u64, len| BlockRequest::Read {
            offset: sector * 512,
            bufs: bufs(len),
        };
        let write = |sector: u64, len, fua| BlockRequest::Write {
            offset: sector * 512,
            bufs: bufs(len),
            fua,
        };
        let zero = |offset, len| BlockRequest::WriteZeroes {
            offset,
            len,
            may_unmap: true,
        };
        let discard = |offset, len| BlockRequest::Discard { offset, len };
        disk.set(Faults {
            reads: Some(8..=9),
            ..Faults::default()
        });
        for (sector, len, outcome) in [
            (7, 512, "fine"),
            (7, 1024, "EIO"),
            (8, 512, "EIO"),
            (9, 4096, "EIO"),
            (10, 512, "fine"),
            (0, 65536, "EIO"),
            (8, 0, "fine"),
            (2048, 512, "range"),
        ] {
            assert_eq!(run(read(sector, len)), outcome, "{sector}+{len}");
        }
        assert_eq!(run(write(8, 512, true)), "fine");
        disk.set(Faults {
            writes: Some(8..=9),
            full_at: Some(64 << 10),
            ..Faults::default()
        });
        assert_eq!(run(read(8, 512)), "fine");
        assert_eq!(run(write(9, 512, false)), "EIO");
        assert_eq!(run(zero(0, 8192)), "EIO");
        assert_eq!(run(discard(0, 8192)), "EIO");
        assert_eq!(run(write(127, 512, false)), "fine");
        assert_eq!(run(write(127, 1024, false)), "ENOSPC");
        assert_eq!(run(zero(1 << 19, 8192)), "ENOSPC");
        assert_eq!(run(discard(1 << 19, 8192)), "fine");
        disk.set(Faults {
            flushes: true,
            ..Faults::default()
        });
        assert_eq!(run(write(9, 512, false)), "fine");
        assert_eq!(run(write(9, 512, true)), "EIO");
        assert_eq!(run(BlockRequest::Flush), "EIO");
        disk.set(Faults::default());
        assert_eq!(run(BlockRequest::Flush), "fine");
        assert_eq!(disk.hits(), 11);
    }
}
