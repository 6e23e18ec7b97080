//! Entropy device. virtio 1.3 §5.4.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use pyrite_state::{Inspect, StateError};

use crate::device::VirtioDevice;
use crate::link::DriverLink;
use crate::spec::VIRTIO_ID_RNG;

#[cfg(test)]
mod tests;

/// LIMIT: bytes given for one request; §5.4.6.2 allows fewer than the buffer has.
const MAX_REQUEST_BYTES: u64 = 4096;

/// The device, fed by the host kernel's generator, which does not block once seeded.
pub struct Rng {
    source: Box<dyn Read + Send>,
    link: Option<Arc<DriverLink>>,
    bytes: u64,
}

impl Rng {
    /// A device on `/dev/urandom`.
    pub fn new() -> std::io::Result<Rng> {
        Ok(Rng::from_source(Box::new(File::open("/dev/urandom")?)))
    }

    /// A device on any source that never blocks.
    pub fn from_source(source: Box<dyn Read + Send>) -> Rng {
        Rng {
            source,
            link: None,
            bytes: 0,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_RNG
    }
    fn class_code(&self) -> u32 {
        0x10_00_00
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }
    fn attach(&mut self, link: Arc<DriverLink>) {
        self.link = Some(link);
    }
    fn config_read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self) {}

    fn notify(&mut self, queue: usize) {
        let Some(link) = self.link.clone() else {
            return;
        };
        while let Some(chain) = link.pop(queue) {
            let n = chain.writable_len().min(MAX_REQUEST_BYTES) as usize;
            let mut buffer = vec![0; n];
            if let Err(e) = self.source.read_exact(&mut buffer) {
                // Never hand out zeroes as entropy: leave the request where it is.
                tracing::error!("host entropy source failed: {e}");
                link.unpop(queue, vec![chain]);
                break;
            }
            let written = chain.write_at(link.memory(), 0, &buffer);
            self.bytes += written as u64;
            link.push(queue, chain, written as u32);
        }
        link.signal(queue);
    }

    fn reset(&mut self) {}
    fn start(&mut self) {}
    fn pause(&mut self) {}
    fn drained(&mut self) -> bool {
        true
    }
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        // Nothing: entropy must not be saved.
        Ok(Vec::new())
    }
    fn restore(&mut self, _body: &[u8], _active: bool) -> Result<(), StateError> {
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([("bytes", Inspect::Uint(self.bytes))])
    }
}
