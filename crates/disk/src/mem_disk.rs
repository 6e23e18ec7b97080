//! A disk in the host's memory, for tests: it can be told to fail and to wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyrite_mem::GuestMemory;

use crate::check::check_request;
use crate::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo};

/// A disk that forgets. Requests are carried out in `submit`, unless it is held.
pub struct MemDisk {
    info: DiskInfo,
    state: Mutex<State>,
    in_flight: AtomicUsize,
}

struct State {
    content: Vec<u8>,
    held: Option<VecDeque<(Arc<GuestMemory>, BlockRequest, Completion)>>,
    /// Requests until the fault, which is then used up.
    faults: Vec<(u64, DiskError)>,
    requests: u64,
    flushes: u64,
}

impl MemDisk {
    /// A writable disk of zeroes. The size is rounded up to a multiple of 512.
    pub fn new(size_bytes: u64) -> MemDisk {
        MemDisk::with_content(vec![0; size_bytes as usize], false)
    }

    /// A disk with content, which is filled up with zeroes to a multiple of 512.
    pub fn with_content(mut content: Vec<u8>, read_only: bool) -> MemDisk {
        content.resize(content.len().next_multiple_of(512), 0);
        let info = DiskInfo {
            size_bytes: content.len() as u64,
            block_bytes: 512,
            read_only,
            discard: !read_only,
        };
        let state = State {
            content,
            held: None,
            faults: Vec::new(),
            requests: 0,
            flushes: 0,
        };
        MemDisk {
            info,
            state: Mutex::new(state),
            in_flight: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the `n`-th request from now (0: the next) fail with `error`, without any effect.
    pub fn fail_request(&self, n: u64, error: DiskError) {
        let mut state = self.lock();
        let at = state.requests + n;
        state.faults.push((at, error));
    }

    /// Keeps requests waiting from now on (true), or carries out what waits (false).
    pub fn hold(&self, held: bool) {
        if held {
            self.lock().held.get_or_insert_default();
            return;
        }
        let waiting = self.lock().held.take().unwrap_or_default();
        for (memory, request, done) in waiting {
            self.complete(&memory, &request, done);
        }
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        self.lock().content.clone()
    }

    /// Flushes carried out, those of FUA writes included.
    pub fn flushes(&self) -> u64 {
        self.lock().flushes
    }

    fn complete(&self, memory: &GuestMemory, request: &BlockRequest, done: Completion) {
        let outcome = self.lock().execute(memory, request);
        done(outcome);
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

impl State {
    fn execute(&mut self, memory: &GuestMemory, request: &BlockRequest) -> Result<(), DiskError> {
        let number = self.requests;
        self.requests += 1;
        if let Some(index) = self.faults.iter().position(|(at, _)| *at == number) {
            return Err(self.faults.swap_remove(index).1);
        }
        match request {
            BlockRequest::Read { offset, bufs } => {
                let mut at = *offset as usize;
                for buf in bufs.iter().filter(|b| b.len > 0) {
                    let end = at + buf.len as usize;
                    let data = self.content.get(at..end).ok_or(DiskError::BadBuffer)?;
                    memory
                        .write(buf.gpa, data)
                        .map_err(|_| DiskError::BadBuffer)?;
                    at = end;
                }
            }
            BlockRequest::Write { offset, bufs, fua } => {
                let mut at = *offset as usize;
                for buf in bufs.iter().filter(|b| b.len > 0) {
                    let end = at + buf.len as usize;
                    let data = self.content.get_mut(at..end).ok_or(DiskError::BadBuffer)?;
                    memory
                        .read(buf.gpa, data)
                        .map_err(|_| DiskError::BadBuffer)?;
                    at = end;
                }
                self.flushes += u64::from(*fua);
            }
            BlockRequest::Flush => self.flushes += 1,
            BlockRequest::Discard { offset, len }
            | BlockRequest::WriteZeroes { offset, len, .. } => {
                let range = *offset as usize..(*offset + *len) as usize;
                self.content
                    .get_mut(range)
                    .ok_or(DiskError::BadBuffer)?
                    .fill(0);
            }
        }
        Ok(())
    }
}

impl BlockBackend for MemDisk {
    fn info(&self) -> DiskInfo {
        self.info
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        if let Err(e) = check_request(&self.info, memory, &request) {
            return done(Err(e));
        }
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        if let Some(held) = &mut self.lock().held {
            held.push_back((memory.clone(), request, done));
            return;
        }
        self.complete(memory, &request, done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }
}
