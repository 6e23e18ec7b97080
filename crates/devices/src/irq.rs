//! Interrupt controllers: dual 8259 PIC, IO-APIC, and the router that feeds both.
//!
//! Each controller has its own lock, taken only for the change of registers. Messages and the INTR
//! level go out after it is released: an engine may call [`Pic::ack`] or [`IoApic::eoi`] with its
//! own locks held, from one thread, while another raises a line.

pub mod ioapic;
pub mod pic;
pub mod pirq;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

pub use ioapic::{IoApic, IoApicDevice};
pub use pic::{Pic, PicDevice};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{IrqLine, IrqSink};

/// Number of global system interrupts: the pins of the IO-APIC.
pub const GSI_COUNT: u32 = 24;
/// The IO-APIC pin of GSI 0 (the MADT's interrupt source override 0 → 2).
const PIT_PIN: u32 = 2;

/// Feeds GSIs to the controllers: 0-15 to both, 16-23 to the IO-APIC only.
pub struct InterruptRouter {
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
}

impl InterruptRouter {
    /// A router into these controllers.
    pub fn new(pic: Arc<Pic>, ioapic: Arc<IoApic>) -> InterruptRouter {
        InterruptRouter { pic, ioapic }
    }
}

impl IrqSink for InterruptRouter {
    fn set_level(&self, gsi: u32, level: bool) {
        match gsi {
            0 => {
                self.pic.set_line(0, level);
                self.ioapic.set_pin(PIT_PIN, level);
            }
            // The PIC's IRQ 2 is the cascade and pin 2 is GSI 0: nothing else is wired there.
            2 => {}
            1..16 => {
                self.pic.set_line(gsi as u8, level);
                self.ioapic.set_pin(gsi, level);
            }
            16..GSI_COUNT => self.ioapic.set_pin(gsi, level),
            _ => tracing::debug!(gsi, "no such interrupt line"),
        }
    }
}

/// Wired-OR of several drivers per line, for lines that devices share.
///
/// Drivers' levels are not saved: each device states its own again when it is restored.
pub struct SharedLines {
    sink: Arc<dyn IrqSink>,
    // LOCK ORDER: device < this < interrupt controllers. Held while the sink is called, so that a
    // rise and a fall from two threads arrive in order.
    lines: Mutex<[LineDrivers; GSI_COUNT as usize]>,
}

#[derive(Clone, Copy, Default)]
struct LineDrivers {
    /// One bit per driver: it asserts.
    asserted: u128,
    /// Drivers handed out.
    count: u32,
}

impl SharedLines {
    /// Shared lines into `sink`.
    pub fn new(sink: Arc<dyn IrqSink>) -> Arc<SharedLines> {
        Arc::new(SharedLines {
            sink,
            lines: Mutex::default(),
        })
    }

    /// A new driver of line `gsi`, or `None` if there is no such line or it has 128 drivers.
    pub fn line(self: &Arc<Self>, gsi: u32) -> Option<IrqLine> {
        let mut lines = lock(&self.lines);
        let l = lines
            .get_mut(gsi as usize)
            .filter(|l| l.count < u128::BITS)?;
        let driver = Driver {
            lines: Arc::clone(self),
            bit: 1 << l.count,
        };
        l.count += 1;
        Some(IrqLine::new(Arc::new(driver), gsi))
    }
}

struct Driver {
    lines: Arc<SharedLines>,
    bit: u128,
}

impl IrqSink for Driver {
    fn set_level(&self, gsi: u32, level: bool) {
        let mut lines = lock(&self.lines.lines);
        let Some(l) = lines.get_mut(gsi as usize) else {
            return;
        };
        l.asserted = if level {
            l.asserted | self.bit
        } else {
            l.asserted & !self.bit
        };
        self.lines.sink.set_level(gsi, l.asserted != 0);
    }
}
