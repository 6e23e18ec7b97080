//! The device model: what a device may ask for and what it must offer.
//!
//! Devices never see an engine. They are reached through [`PioDevice`], [`MmioDevice`] and
//! [`PciFunction`], raise interrupts through [`IrqLine`] and [`MsiSink`], reach guest memory
//! through [`Dma`], know time only from [`VmClock`], and are driven by [`Lifecycle`].
//!
//! # Threads and locks
//!
//! A device is behind one mutex. vCPU threads, the timer thread and worker threads call it.
//! LOCK ORDER: bus map < device < interrupt controllers < engine. A device must not call back into
//! a bus while it is locked.
#![forbid(unsafe_code)]

pub mod bus;
pub mod clock;
pub mod conformance;
pub mod irq;
pub mod lifecycle;
pub mod machine;
pub mod pci;

pub use bus::{AddressDecoder, Bus, MmioDevice, PioDevice};
pub use clock::{DeviceTimer, TimedDevice, Timer, TimerTarget, VmClock};
pub use irq::{IntrSink, IrqLine, IrqSink, MsiMessage, MsiRoute, MsiSink};
pub use lifecycle::Lifecycle;
pub use machine::MachineEvents;
pub use pci::{BarKind, BarMemory, ConfigSpace, Dma, PciFunction, PciIds, PciInterrupts};
