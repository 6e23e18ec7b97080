//! Network back ends: what a network card is plugged into.
//!
//! A frame is an Ethernet frame without preamble and FCS, at most [`MAX_FRAME_BYTES`] long.
#![forbid(unsafe_code)]

use std::sync::Arc;

/// Longest frame in bytes: a 64 KiB segment with its headers (no offloads: 1514).
pub const MAX_FRAME_BYTES: usize = 65_550;

/// Takes frames for the guest. Called on back-end threads; must not block.
pub trait FrameSink: Send + Sync {
    /// A frame for the guest. Returns false if it was dropped (no buffer).
    fn receive(&self, frame: &[u8]) -> bool;
    /// True if a frame would be taken now. A back end that can wait (TCP) asks before it reads.
    fn ready(&self) -> bool;
}

/// The other end of a network card's cable.
pub trait NetBackend: Send + Sync {
    /// Connects the guest's side, once, before the first frame.
    fn attach(&self, sink: Arc<dyn FrameSink>);
    /// A frame from the guest. Never blocks; what cannot be handled is dropped and counted.
    fn transmit(&self, frame: &[u8]);
    /// The guest has buffers again after `ready` was false.
    fn receive_ready(&self);
    /// Stops (true) or resumes (false) delivery to the guest.
    fn pause(&self, paused: bool);
}
