//! The common configuration structure. virtio 1.3 §4.1.4.3.

use pyrite_vdev::bus::lock;

use super::VirtioPciDevice;
use crate::queue::QueueState;
use crate::spec::{VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_MSI_NO_VECTOR};

const DEVICE_FEATURE_SELECT: u64 = 0;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_MSIX_VECTOR: u64 = 16;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_MSIX_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;

/// One half of a 64-bit feature set.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Replaces one half of a 64-bit register.
fn set_half(register: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *register = (*register & !(0xffff_ffff << shift)) | u64::from(value) << shift;
}

impl VirtioPciDevice {
    /// The structure as the driver reads it.
    pub(super) fn common_image(&mut self) -> [u8; 64] {
        let mut c = [0; 64];
        let status = self.status();
        let mut put = |at: usize, b: &[u8]| c[at..at + b.len()].copy_from_slice(b);
        put(0, &self.device_feature_select.to_le_bytes());
        put(
            4,
            &half(self.offered(), self.device_feature_select).to_le_bytes(),
        );
        put(8, &self.driver_feature_select.to_le_bytes());
        put(
            12,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(18, &(self.link.queue_count() as u16).to_le_bytes());
        put(20, &[status, self.link.generation()]);
        put(22, &self.queue_select.to_le_bytes());
        let v = lock(&self.signal.vectors);
        put(16, &v.config.to_le_bytes());
        let index = usize::from(self.queue_select);
        let vector = v.queues.get(index).copied().unwrap_or(VIRTIO_MSI_NO_VECTOR);
        drop(v);
        // A queue that does not exist has size 0.
        if let Some(q) = self.link.queue(index) {
            let s = q.state();
            put(24, &s.size.to_le_bytes());
            put(26, &vector.to_le_bytes());
            put(28, &u16::from(s.ready).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            put(32, &s.desc.to_le_bytes());
            put(40, &s.driver.to_le_bytes());
            put(48, &s.device.to_le_bytes());
        }
        c
    }

    /// A store by the driver: each field with its own width, 64-bit ones also by halves.
    pub(super) fn common_write(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [a] if offset == DEVICE_STATUS => self.write_status(a),
            [a, b] => self.common_write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.common_write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.common_write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.common_write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn common_write_u16(&mut self, offset: u64, value: u16) {
        // A vector beyond the table reads back as NO_VECTOR: §4.1.5.1.2.
        let vector = if value < self.vectors {
            value
        } else {
            VIRTIO_MSI_NO_VECTOR
        };
        let index = usize::from(self.queue_select);
        match offset {
            CONFIG_MSIX_VECTOR => lock(&self.signal.vectors).config = vector,
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_SIZE => self.configure_queue(|s| s.size = value),
            QUEUE_MSIX_VECTOR => {
                if let Some(v) = lock(&self.signal.vectors).queues.get_mut(index) {
                    *v = vector;
                }
            }
            // §4.1.4.3.2: "The driver MUST NOT write a 0 to queue_enable."
            QUEUE_ENABLE if value == 1 => self.enable_queue(),
            _ => {}
        }
    }

    fn common_write_u32(&mut self, offset: u64, value: u32) {
        let high = offset & 4 != 0;
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE => {
                // §2.2.1: no change after FEATURES_OK.
                let fixed = self.link.status() & VIRTIO_CONFIG_S_FEATURES_OK != 0;
                if !fixed && self.driver_feature_select < 2 {
                    set_half(
                        &mut self.driver_features,
                        self.driver_feature_select == 1,
                        value,
                    );
                }
            }
            o if o & !4 == QUEUE_DESC => {
                self.configure_queue(|s| set_half(&mut s.desc, high, value))
            }
            o if o & !4 == QUEUE_DRIVER => {
                self.configure_queue(|s| set_half(&mut s.driver, high, value));
            }
            o if o & !4 == QUEUE_DEVICE => {
                self.configure_queue(|s| set_half(&mut s.device, high, value));
            }
            _ => {}
        }
    }

    fn configure_queue(&mut self, change: impl FnOnce(&mut QueueState)) {
        if let Some(mut q) = self.link.queue(usize::from(self.queue_select)) {
            q.configure(change);
        }
    }
}
