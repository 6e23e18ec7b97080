//! Network back ends: what a network card is plugged into.
//!
//! A frame is an Ethernet frame without preamble and FCS, at most [`MAX_FRAME_BYTES`] long.
//!
//! [`usernet`] is the back end that needs no rights on the host: a router, a DHCP server and a
//! DNS forwarder for one guest, with every connection carried by a socket of this process.
//!
//! [`tap`] is an interface of the host, [`switch`] connects virtual machines to each other and to
//! nothing else, [`open`] is a cable that ends in the air.
//!
//! Filters are back ends in front of another: [`capture`] writes a pcapng file, [`shaper`] limits,
//! loses and delays.

// Only `sys` and `usernet::sys` opt in.
#![deny(unsafe_code)]

use std::sync::Arc;

pub mod capture;
pub mod offload;
pub mod open;
mod pump;
pub mod shaper;
pub mod switch;
mod sys;
pub mod tap;
#[cfg(test)]
mod testing;
pub mod usernet;
pub mod vnet;

pub use offload::Offload;

/// Longest frame in bytes: a 64 KiB segment with its headers (no offloads: 1514).
pub const MAX_FRAME_BYTES: usize = 65_550;

/// What frames to the guest may leave out. All off after a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames may come by [`FrameSink::receive_offloaded`] with TCP and UDP checksums not filled in.
    pub to_guest_unchecked: bool,
    /// Longest TCP segment over IPv4, with its IP header, that the guest takes in one frame
    /// regardless of the MTU, given [`Offloads::to_guest_unchecked`]. Zero: no more than the MTU.
    pub to_guest_segment_bytes: u32,
    /// The same for IPv6.
    pub to_guest_segment_bytes_v6: u32,
}

/// Takes frames for the guest. Called on back-end threads; must not block.
pub trait FrameSink: Send + Sync {
    /// A frame for the guest. Returns false if it was dropped (no buffer).
    fn receive(&self, frame: &[u8]) -> bool;
    /// A frame with something left out. Whoever cannot make use of that gets it completed; of
    /// several frames that it makes, what has no room after the first is lost.
    fn receive_offloaded(&self, frame: &[u8], offload: &Offload) -> bool {
        let mut first = None;
        let whole = offload::complete(frame, offload, &mut |f| {
            let taken = self.receive(f);
            first.get_or_insert(taken);
        });
        // What is no frame at all is not to be kept and tried again.
        !whole || first.unwrap_or(true)
    }
    /// True if a frame with this left out goes to the guest as it is. A back end that can wait
    /// completes it otherwise, and sends the frames that it makes one by one.
    fn takes(&self, offload: &Offload) -> bool {
        offload.is_none()
    }
    /// True if a frame would be taken now. A back end that can wait (TCP) asks before it reads.
    fn ready(&self) -> bool;
}

/// The other end of a network card's cable.
///
/// No method but [`NetBackend::attach`] calls the [`FrameSink`] before it returns: a card may hold
/// its own lock.
pub trait NetBackend: Send + Sync {
    /// Connects the guest's side, once, before the first frame.
    fn attach(&self, sink: Arc<dyn FrameSink>);
    /// A frame from the guest. Never blocks; what cannot be handled is dropped and counted.
    fn transmit(&self, frame: &[u8]);
    /// A frame from the guest with something left out. Back ends that cannot make use of that get
    /// it completed.
    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        offload::complete(frame, offload, &mut |f| self.transmit(f));
    }
    /// The guest has buffers again after `ready` was false.
    fn receive_ready(&self);
    /// Stops (true) or resumes (false) delivery to the guest.
    fn pause(&self, paused: bool);
    /// What may be left out of frames from now on. Back ends that cannot make use of it ignore it.
    fn set_offloads(&self, offloads: Offloads) {
        let _ = offloads;
    }
}

/// The cable of a card, for whoever plugs it in and out while the machine runs.
pub trait Cable: Send + Sync {
    /// Plugs it in or out.
    fn set_link(&self, up: bool);
}
