//! Interrupts of one PCI function: INTx, MSI and MSI-X.
//!
//! MSI: PCI Local Bus Specification 3.0 §6.8.1; MSI-X: §6.8.2; INTx: §6.2.2 and §6.2.3
//! (Interrupt Disable, Interrupt Status).

use std::sync::{Arc, Mutex, OnceLock};

use pyrite_state::Inspect;

use crate::bus::lock;
use crate::irq::{IrqLine, MsiMessage, MsiSink};

/// Most vectors of an MSI-X table.
pub(super) const MSIX_MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
pub(super) const MSIX_ENTRY_BYTES: u64 = 16;
/// Mask Bit of a table entry's Vector Control.
const VECTOR_MASKED: u32 = 1;

#[derive(Default)]
pub(super) struct MsiState {
    pub enabled: bool,
    pub addr: u64,
    pub data: u16,
    /// log2 of the number of vectors that the driver granted (MME).
    pub granted_log2: u8,
    pub mask: u32,
    pub pending: u32,
}

#[derive(Clone, Copy)]
pub(super) struct MsixEntry {
    pub addr: u64,
    pub data: u32,
    pub control: u32,
}

impl MsixEntry {
    /// §6.8.2.9: vectors are masked after reset.
    pub(super) const RESET: MsixEntry = MsixEntry {
        addr: 0,
        data: 0,
        control: VECTOR_MASKED,
    };

    fn message(&self) -> MsiMessage {
        MsiMessage {
            addr: self.addr,
            data: self.data,
        }
    }
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.addr.to_le_bytes());
        b[8..12].copy_from_slice(&self.data.to_le_bytes());
        b[12..].copy_from_slice(&self.control.to_le_bytes());
        b
    }
    pub(super) fn from_bytes(b: &[u8; 16]) -> MsixEntry {
        let v = u128::from_le_bytes(*b);
        MsixEntry {
            addr: v as u64 & !3,
            data: (v >> 64) as u32,
            control: (v >> 96) as u32 & VECTOR_MASKED,
        }
    }
}

#[derive(Default)]
pub(super) struct IrqState {
    /// The function asserts INTx.
    pub intx_level: bool,
    /// Command register's Interrupt Disable.
    pub intx_disabled: bool,
    /// What the line was last told.
    pub intx_driven: bool,
    pub msi: MsiState,
    pub msix_enabled: bool,
    /// Function Mask of the MSI-X Message Control.
    pub msix_masked: bool,
    pub msix: Vec<MsixEntry>,
    pub msix_pending: Vec<u64>,
}

impl IrqState {
    fn pending_bit(&mut self, vector: u16) -> Option<(&mut u64, u64)> {
        self.msix_pending
            .get_mut(usize::from(vector / 64))
            .map(|w| (w, 1 << (vector % 64)))
    }

    /// The MSI-X table with its pending bits.
    pub(super) fn inspect_msix(&self) -> Inspect {
        let vectors = self.msix.iter().enumerate().map(|(n, e)| {
            let pending = self
                .msix_pending
                .get(n / 64)
                .is_some_and(|w| w >> (n % 64) & 1 != 0);
            let node = Inspect::node([
                ("address", Inspect::Hex(e.addr)),
                ("data", Inspect::Hex(e.data.into())),
                ("masked", Inspect::Bool(e.control & VECTOR_MASKED != 0)),
                ("pending", Inspect::Bool(pending)),
            ]);
            (n.to_string(), node)
        });
        Inspect::Node(vectors.collect())
    }

    fn signal_msix(&mut self, vector: u16) -> Option<MsiMessage> {
        let e = *self.msix.get(usize::from(vector))?;
        if !self.msix_masked && e.control & VECTOR_MASKED == 0 {
            return Some(e.message());
        }
        if let Some((word, bit)) = self.pending_bit(vector) {
            *word |= bit;
        }
        None
    }

    fn signal_msi(&mut self, vector: u16) -> Option<MsiMessage> {
        let granted = 1u16 << self.msi.granted_log2.min(5);
        // A function that was granted fewer vectors than it has shares the ones it got.
        let n = vector % granted;
        if self.msi.mask >> n & 1 != 0 {
            self.msi.pending |= 1 << n;
            return None;
        }
        let data = (self.msi.data & !(granted - 1)) | n;
        Some(MsiMessage {
            addr: self.msi.addr,
            data: u32::from(data),
        })
    }

    /// Takes everything that is pending and no longer masked.
    fn take_unmasked(&mut self) -> Vec<MsiMessage> {
        let mut out = Vec::new();
        if self.msix_enabled && !self.msix_masked {
            for (n, e) in self.msix.iter().enumerate() {
                if let Some(w) = self.msix_pending.get_mut(n / 64)
                    && e.control & VECTOR_MASKED == 0
                    && *w >> (n % 64) & 1 != 0
                {
                    *w &= !(1 << (n % 64));
                    out.push(e.message());
                }
            }
        }
        if self.msi.enabled && !self.msix_enabled {
            let ready = self.msi.pending & !self.msi.mask;
            self.msi.pending &= !ready;
            for n in (0..32).filter(|n| ready >> n & 1 != 0) {
                out.extend(self.signal_msi(n));
            }
        }
        out
    }
}

pub(super) struct Shared {
    // LOCK ORDER: device < this < interrupt controllers. Held while the INTx line is driven, so
    // that two threads cannot swap a rise and a fall; never held while a message is sent.
    pub state: Mutex<IrqState>,
    pub line: OnceLock<IrqLine>,
    pub sink: OnceLock<Arc<dyn MsiSink>>,
}

impl Shared {
    fn drive_line(&self, s: &mut IrqState) {
        let level = s.intx_level && !s.intx_disabled && !s.msi.enabled && !s.msix_enabled;
        if level != s.intx_driven {
            s.intx_driven = level;
            if let Some(l) = self.line.get() {
                l.set(level);
            }
        }
    }

    fn send(&self, messages: &[MsiMessage]) {
        if let Some(sink) = self.sink.get() {
            messages.iter().for_each(|m| sink.send(*m));
        }
    }

    /// Changes registers, then drives the line and sends what became unmasked.
    pub(super) fn update(&self, change: impl FnOnce(&mut IrqState)) {
        let messages = {
            let mut s = lock(&self.state);
            change(&mut s);
            self.drive_line(&mut s);
            s.take_unmasked()
        };
        self.send(&messages);
    }

    /// Changes registers and drives the line, but sends nothing (reset, restore).
    pub(super) fn load(&self, change: impl FnOnce(&mut IrqState)) {
        let mut s = lock(&self.state);
        change(&mut s);
        self.drive_line(&mut s);
    }
}

/// The interrupts of one function. Clones are the same interrupts; any thread may use them,
/// with or without the device locked.
#[derive(Clone)]
pub struct PciInterrupts {
    pub(super) shared: Arc<Shared>,
}

impl PciInterrupts {
    pub(super) fn new() -> PciInterrupts {
        PciInterrupts {
            shared: Arc::new(Shared {
                state: Mutex::new(IrqState::default()),
                line: OnceLock::new(),
                sink: OnceLock::new(),
            }),
        }
    }

    /// Signals `vector` by MSI-X or MSI, whichever the driver enabled; a masked vector becomes
    /// pending. `false` = neither is enabled: the function shall use [`PciInterrupts::set_intx`].
    pub fn signal(&self, vector: u16) -> bool {
        let message = {
            let mut s = lock(&self.shared.state);
            if s.msix_enabled {
                s.signal_msix(vector)
            } else if s.msi.enabled {
                s.signal_msi(vector)
            } else {
                return false;
            }
        };
        self.shared.send(message.as_slice());
        true
    }

    /// Asserts or releases the function's INTx. The pin follows unless INTx is disabled or
    /// replaced by messages.
    pub fn set_intx(&self, level: bool) {
        let mut s = lock(&self.shared.state);
        s.intx_level = level;
        self.shared.drive_line(&mut s);
    }

    /// The driver enabled MSI-X.
    pub fn msix_enabled(&self) -> bool {
        lock(&self.shared.state).msix_enabled
    }

    /// The driver enabled MSI-X or MSI.
    pub fn messages_enabled(&self) -> bool {
        let s = lock(&self.shared.state);
        s.msix_enabled || s.msi.enabled
    }

    /// The message of an MSI-X vector if it would be sent now (for routing in an engine).
    pub fn msix_message(&self, vector: u16) -> Option<MsiMessage> {
        let s = lock(&self.shared.state);
        let e = s.msix.get(usize::from(vector))?;
        (s.msix_enabled && !s.msix_masked && e.control & VECTOR_MASKED == 0).then(|| e.message())
    }

    /// Reads the MSI-X table; bytes past its end stay as they are.
    pub(super) fn table_read(&self, offset: u64, data: &mut [u8]) {
        let s = lock(&self.shared.state);
        for (at, b) in (offset..).zip(data) {
            if let Some(e) = s.msix.get((at / MSIX_ENTRY_BYTES) as usize) {
                *b = e.to_bytes()[(at % MSIX_ENTRY_BYTES) as usize];
            }
        }
    }

    /// Writes the MSI-X table. §6.8.2: only aligned double and quad words are defined; others
    /// change the bytes that they cover.
    pub(super) fn table_write(&self, offset: u64, data: &[u8]) {
        self.shared.update(|s| {
            for (at, b) in (offset..).zip(data) {
                if let Some(e) = s.msix.get_mut((at / MSIX_ENTRY_BYTES) as usize) {
                    let mut bytes = e.to_bytes();
                    bytes[(at % MSIX_ENTRY_BYTES) as usize] = *b;
                    *e = MsixEntry::from_bytes(&bytes);
                }
            }
        });
    }

    /// Reads the pending bits; they are read-only.
    pub(super) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let s = lock(&self.shared.state);
        for (at, b) in (offset..).zip(data) {
            if let Some(w) = s.msix_pending.get((at / 8) as usize) {
                *b = w.to_le_bytes()[(at % 8) as usize];
            }
        }
    }
}
