//! USB: a host controller, and devices that are plugged into its ports.
//!
//! ```text
//!   xhci                                     rings, slots, ports: what the guest's driver sees
//!     │  device::UsbDevice                   requests of the default pipe, transfers of the others
//!     ├── hid::keyboard, hid::tablet         reports of what people do
//!     └── storage ── disk::scsi              commands in wrappers
//! ```
//!
//! A transfer is all of a driver's transfer descriptor: a device is not asked for packets. What it
//! has nothing for yet stays in the driver's ring and is looked at again when the device has
//! something, so that nothing but a request to a disk is ever under way.

pub mod device;
pub mod hid;
pub mod storage;
pub mod xhci;
