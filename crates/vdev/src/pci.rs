//! PCI functions: the trait that the root complex drives, their configuration space, interrupts
//! and DMA.
//!
//! A function usually holds a [`ConfigSpace`] and forwards to it:
//!
//! ```text
//! let mut config = ConfigSpace::new(PciIds { vendor_id: 0x1af4, ..PciIds::default() });
//! config.add_bar(0, BarKind::Mem64, 0x4000);
//! config.add_msix(9, MsixLayout { table_bar: 0, table_offset: 0x2000, pba_bar: 0,
//!     pba_offset: 0x3000 }, msi_sink);
//! config.set_intx(0, intx_line);              // INTA; the line comes from the root complex
//! let cap = config.add_capability(0x09, &body, &[]);   // offset of the capability
//! let dma = Dma::new(memory, config.bus_master());
//! let interrupts = config.interrupts();       // clonable, for worker threads
//!
//! // PciFunction:
//! fn config_read(&mut self, offset: u16) -> u32 { self.config.read(offset) }
//! fn config_write(&mut self, offset: u16, data: &[u8]) { self.config.write(offset, data) }
//! fn bar(&self, index: u8) -> Option<(BarKind, u64)> { self.config.bar(index) }
//! fn bar_address(&self, index: u8) -> Option<u64> { self.config.bar_address(index) }
//! fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
//!     if self.config.msix_read(index, offset, data) { return; }
//!     ...
//! }
//! // an event for vector n: MSI-X or MSI if the driver enabled one, else INTx
//! if !interrupts.signal(n) { interrupts.set_intx(true) }
//! ```
//!
//! Register names are those of the PCI Local Bus Specification 3.0, chapter 6.

mod config;
mod interrupts;
mod state;
#[cfg(test)]
mod tests;

pub use config::{ConfigSpace, EXPANSION_ROM, MsixLayout, PciIds, cap, reg};
pub use interrupts::PciInterrupts;
pub use state::ConfigSaved;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyrite_mem::{GuestMemory, MemError};

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// 32-bit memory.
    Mem32,
    /// 64-bit memory; takes two registers.
    Mem64,
    /// 64-bit prefetchable memory.
    Mem64Prefetch,
}

/// A PCI function. The root complex owns address decoding; the function owns its registers.
pub trait PciFunction: Send {
    /// Reads 4 bytes of configuration space at a multiple of 4 below 4096.
    fn config_read(&mut self, offset: u16) -> u32;
    /// Writes configuration space: `data` is 1, 2 or 4 bytes inside one aligned double word.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// Size and kind of BAR `index` (0-5, or [`EXPANSION_ROM`]); `None` = not implemented. Constant.
    fn bar(&self, index: u8) -> Option<(BarKind, u64)>;
    /// Where BAR `index` decodes now; `None` while its decoding is disabled in the command
    /// register. The root complex asks after each configuration write and reset.
    fn bar_address(&self, index: u8) -> Option<u64>;
    /// Load from a BAR.
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]);
    /// Store to a BAR.
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]);
    /// Places in memory BARs whose stores only wake a worker. Constant.
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }
    /// What the guest reaches in place of [`PciFunction::bar_read`] and
    /// [`PciFunction::bar_write`] where BAR `index` decodes: a memory of the device. Constant.
    fn bar_memory(&self, index: u8) -> Option<Arc<dyn BarMemory>> {
        let _ = index;
        None
    }
}

/// A memory behind a BAR, which the guest reaches without a call of the device.
pub trait BarMemory: Send + Sync {
    /// The BAR decodes at `gpa` now, or (`None`) nowhere. Called with the root complex locked,
    /// only when that changes.
    fn place(&self, gpa: Option<u64>);
}

/// A place in a memory BAR where a store only has to signal an event descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Which BAR.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
    /// Store size in bytes; 0 = any.
    pub size_bytes: u32,
    /// Only stores of this value, if given.
    pub datamatch: Option<u64>,
    /// The eventfd, which the function keeps open as long as it exists.
    pub fd: RawFd,
}

/// A [`Doorbell`] at the address where it decodes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorbellAt {
    /// Guest-physical address.
    pub gpa: u64,
    /// The doorbell.
    pub doorbell: Doorbell,
}

/// Wires doorbells into an engine that can signal descriptors without leaving the guest.
/// A store that is not caught there still arrives at [`PciFunction::bar_write`].
pub trait DoorbellSink: Send + Sync {
    /// The doorbells of function `devfn` that decode now, in place of those told before.
    fn replace(&self, devfn: u8, doorbells: &[DoorbellAt]);
}

/// A function's access to guest memory: refuses while the bus-master bit is off.
#[derive(Clone)]
pub struct Dma {
    memory: Arc<GuestMemory>,
    enabled: Arc<AtomicBool>,
}

impl Dma {
    /// Access for a function that keeps `enabled` equal to its bus-master bit.
    pub fn new(memory: Arc<GuestMemory>, enabled: Arc<AtomicBool>) -> Dma {
        Dma { memory, enabled }
    }
    /// Access that is always on, for devices outside PCI.
    pub fn always(memory: Arc<GuestMemory>) -> Dma {
        Dma {
            memory,
            enabled: Arc::new(AtomicBool::new(true)),
        }
    }
    /// The memory if bus mastering is on.
    pub fn memory(&self) -> Result<&Arc<GuestMemory>, MemError> {
        if self.enabled.load(Ordering::Acquire) {
            Ok(&self.memory)
        } else {
            Err(MemError::NotRam { gpa: 0, len: 0 })
        }
    }
}
