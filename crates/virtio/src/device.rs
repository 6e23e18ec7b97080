//! What a transport asks of a virtio device.

use std::sync::Arc;

use pyrite_state::{Inspect, StateError};

use crate::link::DriverLink;

/// A virtio device without its transport. Called with the transport's lock held: no method may
/// block.
pub trait VirtioDevice: Send {
    /// Device type, virtio 1.3 §5.
    fn device_type(&self) -> u16;
    /// PCI class code: base class, subclass, interface in bits 23-0.
    fn class_code(&self) -> u32;
    /// Features of the device type; the transport adds those of rings and transport.
    fn features(&self) -> u64;
    /// Largest size of each queue; the length is the number of queues. Constant.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Gives the link, once, before anything else.
    fn attach(&mut self, link: Arc<DriverLink>);
    /// Reads device configuration; what is beyond its end stays 0.
    fn config_read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes device configuration; most fields are read-only.
    fn config_write(&mut self, offset: u64, data: &[u8]);
    /// The driver set DRIVER_OK.
    fn activate(&mut self);
    /// The driver made buffers available in a queue. Also called for every queue after a pause.
    fn notify(&mut self, queue: usize);
    /// The driver reset the device, or the machine did. The queues are reset already.
    fn reset(&mut self);
    /// Begins or goes on working; the queues are notified after.
    fn start(&mut self);
    /// Stops taking work from host and guest.
    fn pause(&mut self);
    /// True if nothing but chains (counted by the link) is in flight. Asked while paused.
    fn drained(&mut self) -> bool;
    /// Encoded state of the device itself.
    fn save(&mut self) -> Result<Vec<u8>, StateError>;
    /// Takes state over. `active`: the driver is ready.
    fn restore(&mut self, body: &[u8], active: bool) -> Result<(), StateError>;
    /// What a person may see.
    fn inspect(&self) -> Inspect;
}

/// Fills `data` from a configuration structure image at `offset`; beyond its end is 0.
pub fn read_config(image: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(from) = usize::try_from(offset).ok().and_then(|o| image.get(o..)) else {
        return;
    };
    let n = from.len().min(data.len());
    data[..n].copy_from_slice(&from[..n]);
}

/// Decodes a device's saved body.
pub fn decode_body<'a, T: minicbor::Decode<'a, ()>>(
    unit: &str,
    body: &'a [u8],
) -> Result<T, StateError> {
    minicbor::decode(body).map_err(|e| StateError::Damaged {
        unit: unit.to_owned(),
        detail: e.to_string(),
    })
}

/// Encodes a device's saved body.
pub fn encode_body<T: minicbor::Encode<()>>(body: &T) -> Vec<u8> {
    // Encoding into a Vec cannot fail.
    minicbor::to_vec(body).unwrap_or_default()
}
