//! Saved form of a virtio PCI function.

use minicbor::{Decode, Encode};
use pyrite_state::{Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::ConfigSaved;

use super::{Vectors, VirtioPciDevice};
use crate::queue::QueueState;
use crate::spec::VIRTIO_MSI_NO_VECTOR;

const KIND: &str = "virtio-pci";
const VERSION: u16 = 1;

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedVirtioPci {
    #[n(0)]
    device_type: u16,
    #[n(1)]
    config: ConfigSaved,
    #[n(2)]
    isr: u8,
    #[n(3)]
    config_vector: u16,
    #[n(4)]
    queue_vectors: Vec<u16>,
    #[n(5)]
    status: u8,
    #[n(6)]
    generation: u8,
    #[n(7)]
    driver_features: u64,
    #[n(8)]
    negotiated: u64,
    #[n(9)]
    device_feature_select: u32,
    #[n(10)]
    driver_feature_select: u32,
    #[n(11)]
    queue_select: u16,
    #[n(12)]
    queues: Vec<QueueState>,
    #[cbor(n(13), with = "minicbor::bytes")]
    device: Vec<u8>,
}

impl VirtioPciDevice {
    pub(super) fn save_section(&mut self) -> Result<Section, StateError> {
        if self.link.running() || self.link.in_flight() > 0 {
            return Err(StateError::Unsupported {
                unit: self.unit.clone(),
                reason: format!(
                    "not paused and drained, {} in flight",
                    self.link.in_flight()
                ),
            });
        }
        let device = self.device.save()?;
        let queues = (0..self.link.queue_count())
            .filter_map(|n| self.link.queue(n).map(|q| q.state().clone()))
            .collect();
        let status = self.status();
        let v = lock(&self.signal.vectors);
        let Vectors {
            isr,
            config: config_vector,
            queues: queue_vectors,
        } = &*v;
        let saved = SavedVirtioPci {
            device_type: self.device.device_type(),
            config: self.config.save(),
            isr: *isr,
            config_vector: *config_vector,
            queue_vectors: queue_vectors.clone(),
            status,
            generation: self.link.generation(),
            driver_features: self.driver_features,
            negotiated: self.link.features(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            queues,
            device,
        };
        Ok(Section::new(&self.unit, KIND, VERSION, &saved))
    }

    pub(super) fn restore_section(&mut self, section: &Section) -> Result<(), StateError> {
        let SavedVirtioPci {
            device_type,
            config,
            isr,
            config_vector,
            queue_vectors,
            status,
            generation,
            driver_features,
            negotiated,
            device_feature_select,
            driver_feature_select,
            queue_select,
            queues,
            device,
        } = section.decode(KIND, VERSION)?;
        let unit = self.unit.clone();
        let invalid = |detail: String| StateError::Invalid {
            unit: unit.clone(),
            detail,
        };
        let ours = self.device.device_type();
        if device_type != ours {
            return Err(invalid(format!(
                "is device type {device_type}, here is type {ours}"
            )));
        }
        let count = self.link.queue_count();
        if queues.len() != count || queue_vectors.len() != count {
            return Err(invalid(format!(
                "has {} queues, here are {count}",
                queues.len()
            )));
        }
        let missing = negotiated & !self.offered();
        if missing != 0 {
            return Err(invalid(format!(
                "uses features {missing:#x} that are not offered here"
            )));
        }
        let vectors = self.vectors;
        let bad = |v: &u16| *v >= vectors && *v != VIRTIO_MSI_NO_VECTOR;
        if bad(&config_vector) || queue_vectors.iter().any(bad) {
            return Err(invalid("has an MSI-X vector beyond its table".into()));
        }
        self.reset_device();
        self.config.restore(&config).map_err(&invalid)?;
        *lock(&self.signal.vectors) = Vectors {
            isr,
            config: config_vector,
            queues: queue_vectors,
        };
        self.link.set_features(negotiated);
        let (packed, event_idx, indirect) = self.ring_features();
        for (n, state) in queues.iter().enumerate() {
            if let Some(mut q) = self.link.queue(n) {
                q.restore(&self.memory, state, packed, event_idx, indirect)
                    .map_err(|e| invalid(format!("queue {n}: {e}")))?;
            }
        }
        self.driver_features = driver_features;
        self.device_feature_select = device_feature_select;
        self.driver_feature_select = driver_feature_select;
        self.queue_select = queue_select;
        self.link.set_generation(generation);
        self.link.set_status(status);
        self.device.restore(&device, self.link.driver_ok())
    }
}
