//! The platform devices of board version 1, and [`chipset::Chipset`] that assembles them.
//!
//! One module per device. A device's registers are one struct that is also its saved form: fields
//! are numbered, and `save` destructures the device exhaustively so that nothing is forgotten.
#![forbid(unsafe_code)]

/// `start`, `pause` and `drained` of a device that has no work of its own: it acts only when it is
/// accessed or when the machine's clock, which stands still while paused, fires a timer.
macro_rules! passive {
    () => {
        fn start(&mut self) {}
        fn pause(&mut self) {}
        fn drained(&mut self) -> bool {
            true
        }
    };
}

pub mod acpi_pm;
pub mod chipset;
pub mod debug_ports;
pub mod display;
mod dwords;
pub mod flash;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod irq;
pub mod lpc;
pub mod net;
pub mod pci_host;
pub mod pit;
pub mod pvpanic;
pub mod reset_ports;
pub mod rtc;
pub mod storage;
#[cfg(test)]
mod tests;
pub mod uart;
pub mod usb;
