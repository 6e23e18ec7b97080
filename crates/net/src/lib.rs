//! Network back ends: what a network card is plugged into.
//!
//! A frame is an Ethernet frame without preamble and FCS, at most [`MAX_FRAME_BYTES`] long.
//!
//! [`usernet`] is the back end that needs no rights on the host: a router, a DHCP server and a
//! DNS forwarder for one guest, with every connection carried by a socket of this process.

// Only `usernet::sys` opts in.
#![deny(unsafe_code)]

use std::sync::Arc;

pub mod usernet;

/// Longest frame in bytes: a 64 KiB segment with its headers (no offloads: 1514).
pub const MAX_FRAME_BYTES: usize = 65_550;

/// What the guest's driver and the network card have agreed on. All off after a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// TCP and UDP checksums in frames from the guest may be missing and are not verified.
    pub from_guest_unchecked: bool,
    /// TCP and UDP checksums in frames to the guest may be left zero.
    pub to_guest_unchecked: bool,
    /// Longest TCP segment, with its IP header, that the guest takes in one frame regardless of
    /// the MTU. Zero: no more than the MTU.
    pub to_guest_segment_bytes: u32,
}

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
    /// What may be left out of frames from now on. Back ends that cannot make use of it ignore it.
    fn set_offloads(&self, offloads: Offloads) {
        let _ = offloads;
    }
}
