//! Numbers from "Virtual I/O Device (VIRTIO) Version 1.3".

/// PCI vendor of all virtio devices. virtio 1.3 §4.1.2.
pub const VIRTIO_PCI_VENDOR: u16 = 0x1af4;
/// PCI device id of device type 0; the type is added. virtio 1.3 §4.1.2.
pub const VIRTIO_PCI_DEVICE_BASE: u16 = 0x1040;

/// Device types, virtio 1.3 §5.
pub const VIRTIO_ID_NET: u16 = 1;
/// Block device.
pub const VIRTIO_ID_BLOCK: u16 = 2;
/// Console.
pub const VIRTIO_ID_CONSOLE: u16 = 3;
/// Entropy source.
pub const VIRTIO_ID_RNG: u16 = 4;
/// Memory balloon.
pub const VIRTIO_ID_BALLOON: u16 = 5;
/// SCSI host, virtio 1.3 §5.6.
pub const VIRTIO_ID_SCSI: u16 = 8;
/// 9P transport, reserved in §5.
pub const VIRTIO_ID_9P: u16 = 9;
/// Socket device.
pub const VIRTIO_ID_VSOCK: u16 = 19;
/// File system device.
pub const VIRTIO_ID_FS: u16 = 26;

/// Device status bits, virtio 1.3 §2.1.
pub const VIRTIO_CONFIG_S_ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive the device.
pub const VIRTIO_CONFIG_S_DRIVER: u8 = 2;
/// The driver is set up.
pub const VIRTIO_CONFIG_S_DRIVER_OK: u8 = 4;
/// Feature negotiation is complete.
pub const VIRTIO_CONFIG_S_FEATURES_OK: u8 = 8;
/// The device has experienced an error it cannot recover from.
pub const VIRTIO_CONFIG_S_NEEDS_RESET: u8 = 0x40;
/// The driver has given up.
pub const VIRTIO_CONFIG_S_FAILED: u8 = 0x80;

/// Reserved feature bits, virtio 1.3 §6: indirect descriptors.
pub const VIRTIO_F_INDIRECT_DESC: u32 = 28;
/// used_event and avail_event.
pub const VIRTIO_F_EVENT_IDX: u32 = 29;
/// Compliance with version 1 or later.
pub const VIRTIO_F_VERSION_1: u32 = 32;
/// Packed virtqueue layout.
pub const VIRTIO_F_RING_PACKED: u32 = 34;

/// No MSI-X vector. virtio 1.3 §4.1.5.1.2.
pub const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;
