//! A named thread that works on queues that were notified.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Kicks {
    /// One bit a queue.
    queues: u64,
    stop: bool,
}

/// The thread; ends when dropped.
pub(crate) struct Worker {
    shared: Arc<(Mutex<Kicks>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that calls `work` with the number of each queue kicked (below 64).
    pub(crate) fn new(
        name: &str,
        work: impl Fn(usize) + Send + 'static,
    ) -> std::io::Result<Worker> {
        let shared = Arc::new((Mutex::new(Kicks::default()), Condvar::new()));
        let theirs = Arc::clone(&shared);
        let body = move || {
            let (kicks, changed) = &*theirs;
            loop {
                let queues = {
                    let mut k = lock(kicks);
                    while k.queues == 0 && !k.stop {
                        k = changed.wait(k).unwrap_or_else(PoisonError::into_inner);
                    }
                    if k.stop {
                        return;
                    }
                    std::mem::take(&mut k.queues)
                };
                (0..64).filter(|n| queues >> n & 1 != 0).for_each(&work);
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)?;
        Ok(Worker {
            shared,
            thread: Some(thread),
        })
    }

    /// Wakes the thread for a queue. Never blocks for long.
    pub(crate) fn kick(&self, queue: usize) {
        if queue < 64 {
            lock(&self.shared.0).queues |= 1 << queue;
            self.shared.1.notify_one();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        lock(&self.shared.0).stop = true;
        self.shared.1.notify_one();
        if let Some(t) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = t.join();
        }
    }
}
