//! PCI functions and their DMA.

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
    /// Size and kind of BAR `index` (0-5); `None` = not implemented. Constant.
    fn bar(&self, index: u8) -> Option<(BarKind, u64)>;
    /// Where BAR `index` decodes now; `None` while its decoding is disabled in the command
    /// register. The root complex asks after each configuration write and reset.
    fn bar_address(&self, index: u8) -> Option<u64>;
    /// Load from a BAR.
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]);
    /// Store to a BAR.
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]);
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
