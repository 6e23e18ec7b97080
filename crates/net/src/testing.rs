//! Ends of a cable for tests: a back end that notes what it is sent, and a card.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::{FrameSink, NetBackend};

/// A back end that notes what it is sent.
#[derive(Default)]
pub(crate) struct Recorder {
    sent: Mutex<Vec<Vec<u8>>>,
    sink: OnceLock<Arc<dyn FrameSink>>,
    told: AtomicUsize,
}

impl Recorder {
    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
    pub(crate) fn deliver(&self, frame: &[u8]) -> bool {
        self.sink.get().expect("attached").receive(frame)
    }
    pub(crate) fn ready(&self) -> bool {
        self.sink.get().expect("attached").ready()
    }
    /// How often it was told that there is room.
    pub(crate) fn told(&self) -> usize {
        self.told.load(Ordering::SeqCst)
    }
}

impl NetBackend for Recorder {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        let _ = self.sink.set(sink);
    }
    fn transmit(&self, frame: &[u8]) {
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(frame.to_vec());
    }
    fn receive_ready(&self) {
        self.told.fetch_add(1, Ordering::SeqCst);
    }
    fn pause(&self, _: bool) {}
}

/// A card that keeps what it gets.
#[derive(Default)]
pub(crate) struct Collector {
    frames: Mutex<Vec<Vec<u8>>>,
    refuse: AtomicBool,
}

impl Collector {
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        self.frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
    pub(crate) fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::SeqCst);
    }
}

impl FrameSink for Collector {
    fn receive(&self, frame: &[u8]) -> bool {
        if !self.ready() {
            return false;
        }
        self.frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(frame.to_vec());
        true
    }
    fn ready(&self) -> bool {
        !self.refuse.load(Ordering::SeqCst)
    }
}
