//! How a driver reaches a virtio device.

pub mod pci;
