//! An image as a back end: threads that carry out requests on it.
//!
//! A few named threads take requests from one queue and move data between the image and guest
//! memory, without a copy where the image keeps data as it is.
//!
//! LIMIT: the queue itself is not bounded; a frontend has no more requests in flight than its
//! rings have entries, and that is what bounds it.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pyrite_mem::GuestMemory;

use crate::check::check_request;
use crate::image::Image;
use crate::payload::{Source, Target};
use crate::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo};

/// Threads of one disk: enough to keep a solid-state disk busy, few enough to be cheap.
const WORKERS: usize = 4;

struct Job {
    memory: Arc<GuestMemory>,
    request: BlockRequest,
    done: Completion,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    image: Arc<dyn Image>,
    info: DiskInfo,
    queue: Mutex<Queue>,
    filled: Condvar,
    in_flight: AtomicUsize,
}

/// A disk whose content is an image. Dropping it finishes what was submitted and closes the image.
pub struct ImageDisk {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl ImageDisk {
    /// Starts the threads. Fails only if the host gives none.
    pub fn new(image: Arc<dyn Image>) -> io::Result<ImageDisk> {
        let info = image.info();
        let shared = Arc::new(Shared {
            image,
            info,
            queue: Mutex::default(),
            filled: Condvar::new(),
            in_flight: AtomicUsize::new(0),
        });
        let mut disk = ImageDisk {
            shared,
            workers: Vec::new(),
        };
        for n in 0..WORKERS {
            let shared = disk.shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("disk-{n}"))
                .spawn(move || shared.work())?;
            disk.workers.push(worker);
        }
        Ok(disk)
    }
}

impl Drop for ImageDisk {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.filled.notify_all();
        let here = std::thread::current().id();
        for worker in self.workers.drain(..) {
            // The last owner may be a completion, which runs on a worker.
            if worker.thread().id() != here && worker.join().is_err() {
                tracing::error!("a disk thread has panicked");
            }
        }
        if !self.shared.info.read_only
            && let Err(e) = self.shared.image.close()
        {
            tracing::error!("a disk image was not closed cleanly: {e}");
        }
    }
}

impl BlockBackend for ImageDisk {
    fn info(&self) -> DiskInfo {
        self.shared.info
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        if let Err(e) = check_request(&self.shared.info, memory, &request) {
            return done(Err(e));
        }
        self.shared.in_flight.fetch_add(1, Ordering::AcqRel);
        self.shared.lock().jobs.push_back(Job {
            memory: memory.clone(),
            request,
            done,
        });
        self.shared.filled.notify_one();
    }

    fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Acquire)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self
                .filled
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work(&self) {
        while let Some(Job {
            memory,
            request,
            done,
        }) = self.next()
        {
            let outcome = self.execute(&memory, request);
            done(outcome);
            // Only now: who waits for zero may rely on every completion having been called.
            self.in_flight.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn execute(&self, memory: &GuestMemory, request: BlockRequest) -> Result<(), DiskError> {
        match request {
            BlockRequest::Read { offset, bufs } => {
                self.image.read(offset, &mut Target::guest(memory, &bufs))
            }
            BlockRequest::Write { offset, bufs, fua } => {
                self.image
                    .write(offset, &mut Source::guest(memory, &bufs))?;
                if fua { self.image.flush() } else { Ok(()) }
            }
            BlockRequest::Flush if self.info.read_only => Ok(()),
            BlockRequest::Flush => self.image.flush(),
            BlockRequest::Discard { len: 0, .. } | BlockRequest::WriteZeroes { len: 0, .. } => {
                Ok(())
            }
            BlockRequest::Discard { offset, len } => self.image.discard(offset, len),
            BlockRequest::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => self.image.write_zeroes(offset, len, may_unmap),
        }
    }
}
