//! What happens when the host reports an error: the guest is told, or the request is kept until
//! somebody has seen to it.
//!
//! A kept request is in flight as far as its controller knows. Whoever owns the VM is told of the
//! first one, stops the VM, and has what is kept tried again, or failed, when it goes on. Errors
//! that are the guest's own (a request beyond the end, no RAM) are always its to see.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyrite_mem::GuestMemory;

use crate::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo};

/// What an error of the host does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum OnError {
    /// The guest is told, as its controller would.
    #[default]
    Report,
    /// The request is kept if the host is out of space; other errors are reported.
    KeepIfFull,
    /// The request is kept.
    Keep,
}

struct Kept {
    memory: Arc<GuestMemory>,
    request: BlockRequest,
    done: Completion,
    error: DiskError,
}

type Notice = Box<dyn Fn() + Send + Sync>;

struct Shared {
    inner: Arc<dyn BlockBackend>,
    on_error: AtomicU8,
    /// LIMIT: as many as the frontend has requests in flight.
    kept: Mutex<Vec<Kept>>,
    notice: Mutex<Option<Notice>>,
    errors: AtomicU64,
}

/// A disk whose failed requests may be kept.
pub struct Guarded(Arc<Shared>);

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guarded {
    /// A disk whose errors are reported.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Guarded {
        Guarded(Arc::new(Shared {
            inner,
            on_error: AtomicU8::new(OnError::Report as u8),
            kept: Mutex::default(),
            notice: Mutex::default(),
            errors: AtomicU64::new(0),
        }))
    }

    /// Changes what errors do from the next one on. What is kept stays so.
    pub fn set(&self, on_error: OnError) {
        self.0.on_error.store(on_error as u8, Ordering::Release);
    }

    /// `notice` is called, on any thread, when a request is kept and none was.
    pub fn notify(&self, notice: Notice) {
        *lock(&self.0.notice) = Some(notice);
    }

    /// How many requests are kept, and the error of the first.
    pub fn kept(&self) -> Option<(usize, String)> {
        let kept = lock(&self.0.kept);
        let first = kept.first()?;
        let mut text = first.error.to_string();
        if let Some(cause) = std::error::Error::source(&first.error) {
            text = format!("{text}: {cause}");
        }
        Some((kept.len(), text))
    }

    /// Errors of the host so far.
    pub fn errors(&self) -> u64 {
        self.0.errors.load(Ordering::Relaxed)
    }

    /// Requests in flight that are not kept.
    pub fn active(&self) -> usize {
        self.0.inner.in_flight()
    }

    /// Tries what is kept again, or, if errors are now reported, fails it.
    pub fn release(&self) {
        let kept = std::mem::take(&mut *lock(&self.0.kept));
        for k in kept {
            if Shared::keeps(&self.0, &k.error) {
                self.submit(&k.memory, k.request, k.done);
            } else {
                (k.done)(Err(k.error));
            }
        }
    }

    /// Fails what is kept.
    pub fn give_up(&self) {
        let kept = std::mem::take(&mut *lock(&self.0.kept));
        for k in kept {
            (k.done)(Err(k.error));
        }
    }
}

impl Shared {
    fn keeps(&self, error: &DiskError) -> bool {
        let on_error = self.on_error.load(Ordering::Acquire);
        match error {
            DiskError::NoSpace => on_error >= OnError::KeepIfFull as u8,
            DiskError::Io(_) | DiskError::Corrupt(_) => on_error >= OnError::Keep as u8,
            DiskError::OutOfRange { .. }
            | DiskError::ReadOnly
            | DiskError::BadBuffer
            | DiskError::Unsupported(_) => false,
        }
    }

    fn keep(&self, kept: Kept) {
        let mut all = lock(&self.kept);
        all.push(kept);
        let first = all.len() == 1;
        drop(all);
        if first && let Some(notice) = &*lock(&self.notice) {
            notice();
        }
    }
}

impl BlockBackend for Guarded {
    fn info(&self) -> DiskInfo {
        self.0.inner.info()
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        if self.0.on_error.load(Ordering::Acquire) == OnError::Report as u8 {
            return self.0.inner.submit(memory, request, done);
        }
        let shared = Arc::clone(&self.0);
        let (again, ram) = (request.clone(), Arc::clone(memory));
        let done = move |outcome: Result<(), DiskError>| match outcome {
            Err(error) if shared.keeps(&error) => {
                shared.errors.fetch_add(1, Ordering::Relaxed);
                shared.keep(Kept {
                    memory: ram,
                    request: again,
                    done,
                    error,
                });
            }
            other => done(other),
        };
        self.0.inner.submit(memory, request, Box::new(done));
    }

    fn in_flight(&self) -> usize {
        // This order: a request that is kept in between is counted twice, not missed.
        let active = self.0.inner.in_flight();
        active + lock(&self.0.kept).len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::MemDisk;

    #[test]
    fn failed_requests_are_kept_tried_again_and_given_up() {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let inner = Arc::new(MemDisk::new(1 << 20));
        let disk = Guarded::new(inner.clone());
        let notices = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&notices);
        disk.notify(Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        }));
        let notices = || notices.load(Ordering::SeqCst);
        let (sender, outcomes) = channel();
        let start = |request| {
            let sender = sender.clone();
            let done = Box::new(move |r: Result<(), DiskError>| sender.send(r.is_ok()).unwrap());
            disk.submit(&memory, request, done);
        };
        let io = || DiskError::Io(std::io::Error::from_raw_os_error(libc::EIO));
        inner.fail_request(0, DiskError::NoSpace);
        start(BlockRequest::Flush);
        assert_eq!((outcomes.try_recv(), notices()), (Ok(false), 0), "reported");

        disk.set(OnError::KeepIfFull);
        inner.fail_request(0, io());
        start(BlockRequest::Flush);
        assert_eq!(outcomes.try_recv(), Ok(false), "reported");
        inner.fail_request(0, DiskError::NoSpace);
        inner.fail_request(1, DiskError::NoSpace);
        start(BlockRequest::Flush);
        start(BlockRequest::Flush);
        assert!(outcomes.try_recv().is_err());
        assert_eq!((notices(), disk.in_flight(), disk.active()), (1, 2, 0));
        let (kept, why) = disk.kept().unwrap();
        assert!(kept == 2 && why.contains("no space"), "{why}");
        // One fails again, the other does not.
        inner.fail_request(1, DiskError::NoSpace);
        disk.release();
        assert_eq!(outcomes.try_iter().collect::<Vec<_>>(), [true]);
        assert_eq!((notices(), disk.in_flight()), (2, 1));
        disk.release();
        assert_eq!(outcomes.try_recv(), Ok(true));
        assert!(disk.kept().is_none());

        disk.set(OnError::Keep);
        inner.fail_request(0, io());
        start(BlockRequest::Flush);
        let (_, why) = disk.kept().unwrap();
        assert!(why.contains("Input/output error"), "{why}");
        // The guest's own mistakes are not kept.
        start(BlockRequest::Discard {
            offset: 1 << 20,
            len: 512,
        });
        assert_eq!(outcomes.try_recv(), Ok(false));
        // Errors are reported from now on: also this one.
        disk.set(OnError::Report);
        disk.release();
        assert_eq!(outcomes.try_recv(), Ok(false));
        disk.set(OnError::Keep);
        inner.fail_request(0, io());
        start(BlockRequest::Flush);
        disk.give_up();
        assert_eq!(outcomes.try_recv(), Ok(false));
        assert_eq!((disk.in_flight(), disk.errors()), (0, 5));
    }
}
