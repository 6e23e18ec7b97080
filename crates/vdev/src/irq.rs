//! Interrupt lines and message-signalled interrupts.

use std::sync::Arc;

/// Receives level changes of global system interrupts (GSI).
pub trait IrqSink: Send + Sync {
    /// The line's level changed, or is stated again.
    fn set_level(&self, gsi: u32, level: bool);
}

/// One interrupt line, held by the device that drives it. Clones drive the same line.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    gsi: u32,
}

impl IrqLine {
    /// Line `gsi` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> IrqLine {
        IrqLine { sink, gsi }
    }
    /// Drives the line.
    pub fn set(&self, level: bool) {
        self.sink.set_level(self.gsi, level);
    }
    /// Low to high to low: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
    /// The GSI.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
}

/// A message-signalled interrupt. Intel SDM Vol. 3A §10.11.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub addr: u64,
    /// Message data.
    pub data: u32,
}

/// Delivers messages to local APICs.
pub trait MsiSink: Send + Sync {
    /// Sends one message. Never blocks.
    fn send(&self, msi: MsiMessage);
    /// A way of its own for a message that will be sent often; `None` if there is no better way
    /// than [`MsiSink::send`].
    fn open_route(&self, msi: MsiMessage) -> Option<Box<dyn MsiRoute>> {
        let _ = msi;
        None
    }
}

/// A message that can be sent again and again without looking it up.
pub trait MsiRoute: Send + Sync {
    /// Sends it. Never blocks.
    fn trigger(&self);
    /// From now on another message; `false` if that failed.
    fn change(&self, msi: MsiMessage) -> bool;
}

/// Receives the level of the PIC's INTR output.
pub trait IntrSink: Send + Sync {
    /// INTR has this level now, or it is stated again. Called with no interrupt controller locked.
    fn set_intr(&self, level: bool);
}
