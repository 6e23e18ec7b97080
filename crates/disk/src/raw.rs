//! Raw images: the file or block device is the disk, byte for byte.
//!
//! A few named threads take requests from one queue and move data between the file and guest
//! memory without a copy. The file is locked while it is open, so that two VMs cannot write it.
//!
//! LIMIT: the queue itself is not bounded; a frontend has no more requests in flight than its
//! rings have entries, and that is what bounds it.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pyrite_mem::GuestMemory;

use crate::check::check_request;
use crate::io::{Direction, Punch, is_unsupported, map_error, punch, transfer};
use crate::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo};

/// Threads of one disk: enough to keep a solid-state disk busy, few enough to be cheap.
const WORKERS: usize = 4;
/// The unit that sizes and requests are multiples of, in bytes.
const SECTOR_BYTES: u64 = 512;
/// Zeroes are written in pieces of this many bytes where the file system cannot zero a range.
const ZERO_PIECE: usize = 256 << 10;

/// Why a raw image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host does not give us the file.
    #[error("cannot open disk {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk {} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Another process, or this one, has it open.
    #[error("disk {} is in use by another VM or tool; only read-only users can share it", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The size is not that of a disk.
    #[error(
        "disk {} has {size_bytes} bytes; expected a multiple of 512, at least 512 \
         (the next larger is {})",
        path.display(),
        next_size(*size_bytes)
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// What it has.
        size_bytes: u64,
    },
    /// A thread could not be started.
    #[error("cannot start the threads of disk {}", path.display())]
    Thread {
        /// The image.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

fn next_size(size_bytes: u64) -> u64 {
    size_bytes
        .max(1)
        .checked_next_multiple_of(SECTOR_BYTES)
        .unwrap_or(u64::MAX)
}

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
    file: File,
    info: DiskInfo,
    queue: Mutex<Queue>,
    filled: Condvar,
    in_flight: AtomicUsize,
    /// The file has said that it cannot punch holes: not asked again.
    no_holes: AtomicBool,
    /// As above, for zeroing a range.
    no_zero_range: AtomicBool,
}

/// A disk whose content is a file or a block device. Dropping it finishes what was submitted.
pub struct RawDisk {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl RawDisk {
    /// Opens the image at `path` and locks it: exclusively, or shared with other readers if
    /// `read_only`.
    pub fn open(path: &Path, read_only: bool) -> Result<RawDisk, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|source| OpenError::Open {
                path: path.into(),
                source,
            })?;
        RawDisk::from_file(file, path, read_only)
    }

    /// Takes an open file, which must permit writing unless `read_only`. `name` is for messages.
    pub fn from_file(mut file: File, name: &Path, read_only: bool) -> Result<RawDisk, OpenError> {
        let path = || name.to_path_buf();
        let open = |source| OpenError::Open {
            path: path(),
            source,
        };
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path() });
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path: path() }),
            // File systems without locks: refusing them would refuse network shares.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!("disk {}: the file system has no locks", name.display());
            }
            Err(TryLockError::Error(source)) => return Err(open(source)),
        }
        // The length in the metadata of a block device is zero.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(open)?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::Size {
                path: path(),
                size_bytes,
            });
        }
        let info = DiskInfo {
            size_bytes,
            block_bytes: SECTOR_BYTES as u32,
            read_only,
            discard: !read_only,
        };
        let shared = Arc::new(Shared {
            file,
            info,
            queue: Mutex::default(),
            filled: Condvar::new(),
            in_flight: AtomicUsize::new(0),
            no_holes: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        });
        let mut disk = RawDisk {
            shared,
            workers: Vec::new(),
        };
        for n in 0..WORKERS {
            let shared = disk.shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("disk-{n}"))
                .spawn(move || shared.work())
                .map_err(|source| OpenError::Thread {
                    path: path(),
                    source,
                })?;
            disk.workers.push(worker);
        }
        Ok(disk)
    }
}

impl Drop for RawDisk {
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
    }
}

impl BlockBackend for RawDisk {
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
                transfer(&self.file, memory, Direction::Read, offset, &bufs)
            }
            BlockRequest::Write { offset, bufs, fua } => {
                transfer(&self.file, memory, Direction::Write, offset, &bufs)?;
                if fua { self.flush() } else { Ok(()) }
            }
            BlockRequest::Flush => self.flush(),
            BlockRequest::Discard { offset, len } => self.discard(offset, len),
            BlockRequest::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => self.write_zeroes(offset, len, may_unmap),
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.info.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(map_error)
    }

    /// Punches unless the file has refused before. True if it is done.
    fn try_punch(
        &self,
        how: Punch,
        refused: &AtomicBool,
        offset: u64,
        len: u64,
    ) -> Result<bool, DiskError> {
        if refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match punch(&self.file, how, offset, len) {
            Ok(()) => Ok(true),
            Err(e) if is_unsupported(&e) => {
                refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(map_error(e)),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if len > 0 {
            // Discard is advice: a file without holes keeps its content.
            self.try_punch(Punch::Hole, &self.no_holes, offset, len)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        if len == 0
            || (may_unmap && self.try_punch(Punch::Hole, &self.no_holes, offset, len)?)
            || self.try_punch(Punch::Zero, &self.no_zero_range, offset, len)?
        {
            return Ok(());
        }
        let zeroes = vec![0; ZERO_PIECE.min(len as usize)];
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let n = (end - at).min(zeroes.len() as u64) as usize;
            self.file
                .write_all_at(&zeroes[..n], at)
                .map_err(map_error)?;
            at += n as u64;
        }
        Ok(())
    }
}
