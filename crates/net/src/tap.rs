//! A TAP interface of the host: frames go to and come from its network stack, a bridge, or
//! whatever the host's administrator has it connected to.
//!
//! Opening one by name needs the right to administer networks, or an interface that was made for
//! this user; a descriptor that somebody else has opened needs nothing.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use crate::pump::{Port, Pump};
use crate::{FrameSink, NetBackend, Offload, Offloads, offload, sys, vnet};

struct TapPort {
    fd: Arc<OwnedFd>,
    /// A header is before each frame.
    header: bool,
}

impl Port for TapPort {
    fn fd(&self) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.fd))
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<(usize, usize, Offload)> {
        let n = sys::read(self.fd.as_fd(), buffer)?;
        if !self.header {
            return Ok((0, n, Offload::NONE));
        }
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let read = buffer.get(..n).unwrap_or_default();
        let (header, frame) = read.split_first_chunk().ok_or_else(invalid)?;
        let offload = vnet::decode_for(header, frame).ok_or_else(invalid)?;
        Ok((vnet::BYTES, frame.len(), offload))
    }

    fn write(&self, frame: &[u8], offload: &Offload) -> io::Result<()> {
        if self.header {
            let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
            let (header, _) = vnet::encode(frame, offload).ok_or_else(invalid)?;
            return sys::write(self.fd.as_fd(), &header, frame);
        }
        let mut result = Ok(());
        let mut send = |f: &[u8]| {
            let sent = sys::write(self.fd.as_fd(), &[], f);
            if result.is_ok() {
                result = sent;
            }
        };
        if !offload::complete(frame, offload, &mut send) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        result
    }

    fn set_offloads(&self, offloads: Offloads) {
        if !self.header {
            return;
        }
        let large = |bytes| bytes > 0;
        let set = sys::set_tap_offloads(
            self.fd.as_fd(),
            offloads.to_guest_unchecked,
            large(offloads.to_guest_segment_bytes),
            large(offloads.to_guest_segment_bytes_v6),
        );
        if let Err(e) = set {
            tracing::warn!("a TAP interface does not take its offloads: {e}");
        }
    }

    fn failed(&self, error: &io::Error) -> Duration {
        // EIO: the interface is down; EBADFD: it is gone. It may be set up again.
        tracing::debug!("TAP interface: {error}");
        Duration::from_millis(200)
    }

    fn connect(&self) -> bool {
        true
    }
}

/// The interface.
pub struct Tap(Pump<TapPort>);

impl Tap {
    /// Opens the interface of this name.
    pub fn open(name: &str) -> io::Result<Tap> {
        Tap::new(sys::open_tap(name)?)
    }

    /// Takes over a descriptor of an open interface that the process was given.
    pub fn inherited(fd: RawFd) -> io::Result<Tap> {
        Tap::new(sys::inherited(fd)?)
    }

    fn new(fd: OwnedFd) -> io::Result<Tap> {
        sys::set_nonblocking(fd.as_fd())?;
        let header = sys::prepare_tap(fd.as_fd(), vnet::BYTES)?;
        let port = TapPort {
            fd: Arc::new(fd),
            header,
        };
        // What an earlier user of the descriptor has set.
        port.set_offloads(Offloads::default());
        Ok(Tap(Pump::new(port, "tap")?))
    }
}

impl NetBackend for Tap {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        self.0.attach(sink);
    }
    fn transmit(&self, frame: &[u8]) {
        self.0.transmit(frame);
    }
    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        self.0.transmit_offloaded(frame, offload);
    }
    fn receive_ready(&self) {
        self.0.receive_ready();
    }
    fn pause(&self, paused: bool) {
        self.0.pause(paused);
    }
    fn set_offloads(&self, offloads: Offloads) {
        self.0.set_offloads(offloads);
    }
}
