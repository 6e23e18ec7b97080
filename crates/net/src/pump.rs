//! A back end behind one descriptor that carries a frame in each read and write: the thread that
//! waits for it, and what waits to be written.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::offload::complete;
use crate::sys::{Waker, wait};
use crate::{FrameSink, MAX_FRAME_BYTES, NetBackend, Offload, Offloads};

/// LIMIT: frames that wait to be written.
const QUEUE_FRAMES: usize = 1024;
/// LIMIT: bytes of them.
const QUEUE_BYTES: usize = 8 << 20;
/// Frames read before the other direction gets its turn.
const TURN_FRAMES: usize = 256;

/// A descriptor that carries frames.
pub(crate) trait Port: Send + Sync + 'static {
    /// The descriptor; none while there is no connection.
    fn fd(&self) -> Option<Arc<OwnedFd>>;
    /// Reads a frame into `buffer` without waiting; where it is in there.
    fn read(&self, buffer: &mut [u8]) -> io::Result<(usize, usize, Offload)>;
    /// Writes a frame without waiting.
    fn write(&self, frame: &[u8], offload: &Offload) -> io::Result<()>;
    /// What the card wants left out.
    fn set_offloads(&self, offloads: Offloads);
    /// The connection has failed. How soon `connect` is to be called.
    fn failed(&self, error: &io::Error) -> Duration;
    /// Tries to connect again; true if that has gone well.
    fn connect(&self) -> bool;
}

/// Frames for the card.
type Held = VecDeque<(Vec<u8>, Offload)>;

#[derive(Default)]
struct Queue {
    frames: VecDeque<(Vec<u8>, Offload)>,
    bytes: usize,
}

struct Shared<P> {
    port: P,
    queue: Mutex<Queue>,
    waker: Waker,
    sink: OnceLock<Arc<dyn FrameSink>>,
    paused: AtomicBool,
    stop: AtomicBool,
    dropped: AtomicU64,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread and its port.
pub(crate) struct Pump<P: Port> {
    shared: Arc<Shared<P>>,
    worker: Option<JoinHandle<()>>,
}

impl<P: Port> Shared<P> {
    /// Delivers frames while there are any and the card takes them. True if it does not; `held` are
    /// frames that it had no room for although it was ready, or that one was cut into.
    fn read(&self, buffer: &mut [u8], held: &mut Held) -> io::Result<bool> {
        let Some(sink) = self.sink.get() else {
            return Ok(true);
        };
        for _ in 0..TURN_FRAMES {
            while let Some((frame, offload)) = held.front() {
                if !sink.ready() || !sink.receive_offloaded(frame, offload) {
                    return Ok(true);
                }
                held.pop_front();
            }
            if !sink.ready() {
                return Ok(true);
            }
            let (at, len, offload) = match self.port.read(buffer) {
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // A frame that is none.
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Err(e) => return Err(e),
            };
            let frame = buffer.get(at..at + len).unwrap_or_default();
            if sink.takes(&offload) {
                if !sink.receive_offloaded(frame, &offload) {
                    held.push_back((frame.to_vec(), offload));
                }
            } else {
                let mut keep = |f: &[u8]| held.push_back((f.to_vec(), Offload::NONE));
                if !complete(frame, &offload, &mut keep) {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(false)
    }

    /// Writes what waits. True if some of it still does.
    fn flush(&self) -> io::Result<bool> {
        let mut queue = lock(&self.queue);
        while let Some((frame, offload)) = queue.frames.front() {
            match self.port.write(frame, offload) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                Err(e) => return Err(e),
            }
            if let Some((frame, _)) = queue.frames.pop_front() {
                queue.bytes -= frame.len();
            }
        }
        Ok(false)
    }

    fn run(&self) {
        // Room for a header before the frame.
        let mut buffer = vec![0; MAX_FRAME_BYTES + 64];
        let mut held = Held::new();
        // Set while there is no connection: how long to wait before the next attempt.
        let mut broken: Option<Duration> = None;
        while !self.stop.load(Ordering::Acquire) {
            if let Some(pause) = broken {
                wait(None, false, false, &self.waker, Some(pause));
                self.waker.drain();
                if self.port.connect() {
                    broken = None;
                }
                continue;
            }
            let Some(fd) = self.port.fd() else {
                broken = Some(Duration::ZERO);
                continue;
            };
            let turn = if self.paused.load(Ordering::Acquire) {
                self.flush().map(|writing| (true, writing))
            } else {
                self.read(&mut buffer, &mut held)
                    .and_then(|full| self.flush().map(|writing| (full, writing)))
            };
            match turn {
                // Without room in the card only its word, by the waker, is of interest.
                Ok((full, writing)) => {
                    wait(Some(fd.as_fd()), !full, writing, &self.waker, None);
                    self.waker.drain();
                }
                Err(e) => {
                    broken = Some(self.port.failed(&e));
                    *lock(&self.queue) = Queue::default();
                }
            }
        }
    }
}

impl<P: Port> Pump<P> {
    pub(crate) fn new(port: P, name: &str) -> io::Result<Pump<P>> {
        let shared = Arc::new(Shared {
            port,
            queue: Mutex::default(),
            waker: Waker::new()?,
            sink: OnceLock::new(),
            paused: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
        });
        let ours = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || ours.run())?;
        Ok(Pump {
            shared,
            worker: Some(worker),
        })
    }
}

impl<P: Port> Drop for Pump<P> {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.waker.wake();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            tracing::error!("the thread of a network has panicked");
        }
    }
}

impl<P: Port> NetBackend for Pump<P> {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        let _ = self.shared.sink.set(sink);
        self.shared.waker.wake();
    }

    fn transmit(&self, frame: &[u8]) {
        self.transmit_offloaded(frame, &Offload::NONE);
    }

    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        let s = &self.shared;
        let mut queue = lock(&s.queue);
        if queue.frames.is_empty() && s.port.fd().is_some() {
            match s.port.write(frame, offload) {
                Ok(()) => return,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // The thread finds out for itself what is wrong.
                Err(_) => {
                    s.dropped.fetch_add(1, Ordering::Relaxed);
                    drop(queue);
                    return s.waker.wake();
                }
            }
        }
        let full = queue.frames.len() >= QUEUE_FRAMES || queue.bytes + frame.len() > QUEUE_BYTES;
        if full || s.port.fd().is_none() {
            s.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes += frame.len();
        queue.frames.push_back((frame.to_vec(), *offload));
        drop(queue);
        s.waker.wake();
    }

    fn receive_ready(&self) {
        self.shared.waker.wake();
    }

    fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Release);
        self.shared.waker.wake();
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.shared.port.set_offloads(offloads);
    }
}
