//! Notifications by event descriptors: for engines that catch the driver's store to a queue's
//! notification address and signal a descriptor. One thread of the device waits for all of them, so
//! the vCPU goes on while the device works.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The descriptors and their thread; it ends when this is dropped.
pub(super) struct Doorbells {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// One for each queue.
    bells: Vec<EventFd>,
    stop: EventFd,
    rings: AtomicU64,
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl Doorbells {
    /// Descriptors for `count` queues, and a thread named `name` that calls `ring` with the number
    /// of a queue whose descriptor was signalled.
    pub(super) fn new(
        name: &str,
        count: usize,
        ring: impl Fn(usize) + Send + 'static,
    ) -> io::Result<Doorbells> {
        let bells = (0..count).map(|_| event()).collect::<io::Result<_>>()?;
        let shared = Arc::new(Shared {
            bells,
            stop: event()?,
            rings: AtomicU64::new(0),
        });
        let epoll = Epoll::new()?;
        let all = shared.bells.iter().chain([&shared.stop]);
        for (n, e) in (0..).zip(all) {
            let interest = EpollEvent::new(EventSet::IN, n);
            epoll.ctl(ControlOperation::Add, e.as_raw_fd(), interest)?;
        }
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || serve(&theirs, &epoll, ring))?;
        Ok(Doorbells {
            shared,
            thread: Some(thread),
        })
    }

    /// Descriptors in the order of queues.
    pub(super) fn fds(&self) -> impl Iterator<Item = RawFd> {
        self.shared.bells.iter().map(AsRawFd::as_raw_fd)
    }

    /// How often a descriptor was found signalled.
    pub(super) fn rings(&self) -> u64 {
        self.shared.rings.load(Ordering::Relaxed)
    }
}

fn serve(shared: &Shared, epoll: &Epoll, ring: impl Fn(usize)) {
    let mut events = [EpollEvent::default(); 16];
    loop {
        let n = match epoll.wait(-1, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                tracing::error!("doorbells: {e}");
                return;
            }
        };
        for e in events.iter().take(n) {
            let index = e.data() as usize;
            let Some(bell) = shared.bells.get(index) else {
                return; // asked to stop
            };
            // Nothing to read: another wait has seen it already.
            if bell.read().is_ok() {
                shared.rings.fetch_add(1, Ordering::Relaxed);
                ring(index);
            }
        }
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(t) = self.thread.take() {
            // The thread itself may have held the device last.
            if t.thread().id() != std::thread::current().id() {
                // A panic there has been reported by the panic hook.
                let _ = t.join();
            }
        }
    }
}
