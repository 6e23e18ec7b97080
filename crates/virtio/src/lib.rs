//! virtio devices over PCI. "Virtual I/O Device (VIRTIO) Version 1.3", cited as virtio 1.3.
//!
//! # Assembling
//!
//! A device is made from its back end, then put behind a PCI function, which is both the
//! [`pyrite_vdev::PciFunction`] to plug into the root complex and the
//! [`pyrite_vdev::Lifecycle`] unit of the machine:
//!
//! ```text
//! let disk = Blk::new(backend, BlkConfig { serial: "root".into(), ..BlkConfig::default() });
//! let function: Arc<Mutex<VirtioPciDevice>> = VirtioPciDevice::new(
//!     "virtio-blk0",            // unit name
//!     Box::new(disk),
//!     Arc::clone(&memory),      // Arc<GuestMemory>
//!     Arc::clone(&msi_sink),    // Arc<dyn MsiSink>
//!     IrqLine::new(sink, gsi),  // INTA
//! );
//! ```
//!
//! | device | made by | host's control |
//! |---|---|---|
//! | [`Blk`] | `Blk::new(Arc<dyn BlockBackend>, BlkConfig)` | |
//! | [`Net`] | `Net::new(Arc<dyn NetBackend>, NetConfig)` | [`Net::control`] |
//! | [`Console`] | `Console::new(Vec<PortConfig>)` | [`PortSink`], given to each back end |
//! | [`Rng`] | `Rng::new()?` | |
//! | [`Balloon`] | `Balloon::new()?` | [`Balloon::control`] |
//! | [`Scsi`] | `Scsi::new(Vec<Unit>, ScsiConfig)` | [`Scsi::control`] |
//! | [`Vsock`] | `Vsock::new(VsockConfig)?` | Unix sockets |
//! | [`Share`] | `Share::new(ShareProtocol, tag, Arc<Folder>)?` | |
//!
//! Take a control handle before the device is boxed. Unit names end in a number of their kind, as
//! in `virtio-blk0`; the saved section is of kind `virtio-pci` for all of them.
//!
//! Nothing happens before `Lifecycle::start`. Devices keep no reference to the function, so
//! dropping it ends their threads.
//!
//! # Threads and locks
//!
//! LOCK ORDER: [`VirtioPciDevice`] < state of a device (ports, receive side) < [`queue::Queue`] <
//! interrupt vectors < [`pyrite_vdev::pci::PciInterrupts`] < interrupt controllers. Back ends are
//! called with at most the first of these held, so a back end may call back at once, on the same
//! thread. Back-end threads enter at the second level and never take the first.
#![deny(unsafe_code)]

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod link;
pub mod net;
pub mod queue;
pub mod rng;
pub mod scsi;
pub mod share;
pub mod spec;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
mod worker;

pub use balloon::{Balloon, BalloonControl};
pub use blk::{Blk, BlkConfig};
pub use console::{Console, PortBackend, PortConfig, PortSink};
pub use device::VirtioDevice;
pub use link::DriverLink;
pub use net::{Net, NetConfig, NetControl};
pub use rng::Rng;
pub use scsi::{Scsi, ScsiConfig, ScsiControl};
pub use share::{Share, ShareProtocol};
pub use transport::pci::VirtioPciDevice;
pub use vsock::{Vsock, VsockConfig};
