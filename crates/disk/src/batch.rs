//! Several requests with one completion.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyrite_mem::GuestMemory;

use crate::{BlockBackend, BlockRequest, Completion, DiskError};

/// Starts `requests`, in no particular order; `done` is called after the last one, with the first
/// error that happened. The caller bounds their number.
pub fn submit_all(
    backend: &dyn BlockBackend,
    memory: &Arc<GuestMemory>,
    mut requests: Vec<BlockRequest>,
    done: Completion,
) {
    let Some(last) = requests.pop() else {
        return done(Ok(()));
    };
    if requests.is_empty() {
        return backend.submit(memory, last, done);
    }
    struct Rest {
        left: AtomicUsize,
        outcome: Mutex<(Option<Completion>, Option<DiskError>)>,
    }
    let rest = Arc::new(Rest {
        left: AtomicUsize::new(requests.len() + 1),
        outcome: Mutex::new((Some(done), None)),
    });
    for request in requests.into_iter().chain([last]) {
        let rest = Arc::clone(&rest);
        let one = move |result: Result<(), DiskError>| {
            let mut o = rest.outcome.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = result {
                o.1.get_or_insert(e);
            }
            if rest.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                let (done, error) = (o.0.take(), o.1.take());
                drop(o);
                if let Some(done) = done {
                    done(error.map_or(Ok(()), Err));
                }
            }
        };
        backend.submit(memory, request, Box::new(one));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemDisk;

    #[test]
    fn the_completion_follows_the_last_request_and_has_the_first_error() {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let disk = MemDisk::new(1 << 20);
        for (fail, count) in [(None, 0), (None, 1), (None, 4), (Some(0), 1), (Some(2), 4)] {
            if let Some(n) = fail {
                disk.fail_request(n, DiskError::NoSpace);
            }
            disk.hold(true);
            let flushes = (0..count).map(|_| BlockRequest::Flush).collect();
            let (sender, receiver) = std::sync::mpsc::channel();
            submit_all(
                &disk,
                &memory,
                flushes,
                Box::new(move |r| sender.send(r).unwrap()),
            );
            assert_eq!(receiver.try_recv().is_ok(), count == 0);
            disk.hold(false);
            if count > 0 {
                let outcome = receiver.try_recv().expect("completed");
                assert_eq!(outcome.is_err(), fail.is_some(), "{count} {fail:?}");
            }
            assert!(receiver.try_recv().is_err(), "once");
        }
    }
}
