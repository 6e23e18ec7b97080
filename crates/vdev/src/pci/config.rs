//! Configuration space of a type 0 function: header, BARs and capabilities.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyrite_state::Inspect;

use super::interrupts::{MSIX_ENTRY_BYTES, MSIX_MAX_VECTORS, MsixEntry, PciInterrupts};
use super::{BarKind, ConfigSaved};
use crate::bus::lock;
use crate::irq::{IrqLine, MsiSink};

/// Registers of the type 0 header. PCI Local Bus Specification 3.0 §6.1.
#[allow(missing_docs, reason = "register names")]
pub mod reg {
    pub const VENDOR_ID: u16 = 0x00;
    pub const DEVICE_ID: u16 = 0x02;
    pub const COMMAND: u16 = 0x04;
    pub const STATUS: u16 = 0x06;
    pub const REVISION_ID: u16 = 0x08;
    pub const CLASS_CODE: u16 = 0x09;
    pub const HEADER_TYPE: u16 = 0x0e;
    pub const BAR0: u16 = 0x10;
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    pub const SUBSYSTEM_ID: u16 = 0x2e;
    pub const EXPANSION_ROM: u16 = 0x30;
    pub const CAPABILITIES_POINTER: u16 = 0x34;
    pub const INTERRUPT_LINE: u16 = 0x3c;
    pub const INTERRUPT_PIN: u16 = 0x3d;

    pub const COMMAND_IO: u16 = 1 << 0;
    pub const COMMAND_MEMORY: u16 = 1 << 1;
    pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
    pub const COMMAND_PARITY: u16 = 1 << 6;
    pub const COMMAND_SERR: u16 = 1 << 8;
    pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
    pub const STATUS_INTERRUPT: u16 = 1 << 3;
    pub const STATUS_CAPABILITIES: u16 = 1 << 4;
}

/// Capability ids. PCI Local Bus Specification 3.0, appendix H.
#[allow(missing_docs, reason = "register names")]
pub mod cap {
    pub const MSI: u8 = 0x05;
    pub const VENDOR: u8 = 0x09;
    pub const PCI_EXPRESS: u8 = 0x10;
    pub const MSIX: u8 = 0x11;
}

/// Size of conventional configuration space. Beyond it (to 4096) everything reads as zero:
/// no extended capability.
const CONFIG_BYTES: usize = 256;
/// First byte that a capability may use.
const FIRST_CAPABILITY: usize = 0x40;

/// Index of the expansion ROM's register among the BARs, for [`super::PciFunction::bar`].
pub const EXPANSION_ROM: u8 = 6;
/// The ROM decodes.
const ROM_ENABLE: u32 = 1 << 0;

const MSI_ENABLE: u16 = 1 << 0;
const MSI_64BIT: u16 = 1 << 7;
const MSI_MASKING: u16 = 1 << 8;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const MSIX_ENABLE: u16 = 1 << 15;

/// What a function is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciIds {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, sub-class and programming interface, e.g. `0x01_08_02`.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID.
    pub subsystem_id: u16,
}

/// Where the MSI-X table and the pending bit array are. Offsets are multiples of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in it; the table takes 16 bytes per vector.
    pub table_offset: u32,
    /// BAR of the pending bits.
    pub pba_bar: u8,
    /// Offset of the pending bits; they take 8 bytes per 64 vectors.
    pub pba_offset: u32,
}

/// The configuration space of one type 0 function.
///
/// The `add_*` methods describe the function while it is built; they panic on a layout that
/// cannot be (a BAR size that is no power of two, no room for a capability), which is a mistake in
/// the device model and not reachable by a guest. Everything else accepts any input.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Values after reset.
    reset: [u8; CONFIG_BYTES],
    /// Bits that the guest can write.
    writable: [u8; CONFIG_BYTES],
    bars: [Option<(BarKind, u64)>; 6],
    rom_bytes: Option<u64>,
    last_capability: Option<usize>,
    next_free: usize,
    msi: Option<usize>,
    msix: Option<(usize, MsixLayout, u16)>,
    bus_master: Arc<AtomicBool>,
    interrupts: PciInterrupts,
}

impl ConfigSpace {
    /// A function without BARs, capabilities and interrupt pin.
    pub fn new(ids: PciIds) -> ConfigSpace {
        let mut c = ConfigSpace {
            bytes: [0; CONFIG_BYTES],
            reset: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: [None; 6],
            rom_bytes: None,
            last_capability: None,
            next_free: FIRST_CAPABILITY,
            msi: None,
            msix: None,
            bus_master: Arc::new(AtomicBool::new(false)),
            interrupts: PciInterrupts::new(),
        };
        c.fix(reg::VENDOR_ID, &ids.vendor_id.to_le_bytes());
        c.fix(reg::DEVICE_ID, &ids.device_id.to_le_bytes());
        c.fix(reg::REVISION_ID, &[ids.revision]);
        c.fix(reg::CLASS_CODE, &ids.class.to_le_bytes()[..3]);
        c.fix(
            reg::SUBSYSTEM_VENDOR_ID,
            &ids.subsystem_vendor_id.to_le_bytes(),
        );
        c.fix(reg::SUBSYSTEM_ID, &ids.subsystem_id.to_le_bytes());
        let command = reg::COMMAND_IO
            | reg::COMMAND_MEMORY
            | reg::COMMAND_BUS_MASTER
            | reg::COMMAND_PARITY
            | reg::COMMAND_SERR
            | reg::COMMAND_INTX_DISABLE;
        c.allow(reg::COMMAND, &command.to_le_bytes());
        c.allow(reg::INTERRUPT_LINE, &[0xff]);
        c.allow(0x0c, &[0xff]); // Cache Line Size: written by firmware, without effect
        c
    }

    /// Sets bytes, now and after each reset.
    fn fix(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.reset[at..at + data.len()].copy_from_slice(data);
    }

    /// Makes bits writable.
    fn allow(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn word(&self, offset: u16) -> u16 {
        let at = usize::from(offset);
        match self.bytes.get(at..at + 2) {
            Some(b) => u16::from_le_bytes([b[0], b[1]]),
            None => 0xffff,
        }
    }

    fn dword(&self, offset: u16) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// Says in the header that the device has more functions than this one.
    pub fn set_multifunction(&mut self) {
        self.fix(reg::HEADER_TYPE, &[0x80]);
    }

    /// Adds registers of the function's own at `offset`: their values after reset, and which bits
    /// the guest can write (missing = read-only).
    pub fn add_register(&mut self, offset: u16, reset: &[u8], writable: &[u8]) {
        assert!(
            usize::from(offset) + reset.len() <= CONFIG_BYTES && writable.len() <= reset.len(),
            "register {offset:#x}"
        );
        self.fix(offset, reset);
        self.allow(offset, writable);
    }

    /// Adds a base address register of `size` bytes: a power of two, 16 or more for memory,
    /// 4 to 256 for I/O. 64-bit kinds take `index` and `index + 1`. §6.2.5.1.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) {
        let n = usize::from(index);
        let wide = matches!(kind, BarKind::Mem64 | BarKind::Mem64Prefetch);
        let (least, most) = match kind {
            BarKind::Io => (4, 256),
            BarKind::Mem32 => (16, 1 << 31),
            BarKind::Mem64 | BarKind::Mem64Prefetch => (16, 1 << 38),
        };
        assert!(
            size.is_power_of_two() && (least..=most).contains(&size),
            "BAR size {size:#x}"
        );
        assert!(
            n + usize::from(wide) < 6 && self.bars[n].is_none(),
            "BAR index {index}"
        );
        self.bars[n] = Some((kind, size));
        let offset = reg::BAR0 + 4 * u16::from(index);
        let flags = match kind {
            BarKind::Io => 0x1,
            BarKind::Mem32 => 0x0,
            BarKind::Mem64 => 0x4,
            BarKind::Mem64Prefetch => 0xc,
        };
        self.fix(offset, &[flags]);
        let mask = !(size - 1);
        if wide {
            self.allow(offset, &mask.to_le_bytes());
        } else {
            self.allow(offset, &(mask as u32).to_le_bytes());
        }
    }

    /// Adds the expansion ROM base address register for a ROM of `size` bytes: a power of two from
    /// 2 KiB to 16 MiB. It is BAR [`EXPANSION_ROM`]. §6.2.5.2.
    pub fn add_rom(&mut self, size: u64) {
        assert!(
            size.is_power_of_two() && (2048..=16 << 20).contains(&size),
            "ROM size {size:#x}"
        );
        self.rom_bytes = Some(size);
        let mask = !(size - 1) as u32 | ROM_ENABLE;
        self.allow(reg::EXPANSION_ROM, &mask.to_le_bytes());
    }

    /// Adds a capability. `body` starts after the id and next bytes; `writable` masks the bits of
    /// `body` that the guest can change (missing = read-only). Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_free;
        let end = at + 2 + body.len();
        assert!(
            end <= CONFIG_BYTES && writable.len() <= body.len(),
            "capability {id:#x}"
        );
        self.next_free = end.next_multiple_of(4);
        let pointer = [at as u8];
        match self.last_capability {
            Some(previous) => self.fix(previous as u16 + 1, &pointer),
            None => {
                self.fix(reg::CAPABILITIES_POINTER, &pointer);
                self.fix(reg::STATUS, &reg::STATUS_CAPABILITIES.to_le_bytes());
            }
        }
        self.last_capability = Some(at);
        self.fix(at as u16, &[id, 0]);
        self.fix(at as u16 + 2, body);
        self.allow(at as u16 + 2, writable);
        at as u8
    }

    /// Gives a function without capabilities registers of its own at `offset` (40H to FFH):
    /// their values after reset, and the bits that the guest can change.
    pub fn add_registers(&mut self, offset: u8, reset: &[u8], writable: &[u8]) {
        let end = usize::from(offset) + reset.len().max(writable.len());
        assert!(
            usize::from(offset) >= FIRST_CAPABILITY
                && end <= CONFIG_BYTES
                && self.last_capability.is_none(),
            "registers at {offset:#x}"
        );
        // A capability that is added later must not lie there.
        self.next_free = self.next_free.max(end.next_multiple_of(4));
        self.fix(offset.into(), reset);
        self.allow(offset.into(), writable);
    }

    /// Adds MSI with `1 << vectors_log2` vectors (at most 32), 64-bit addresses and masking.
    pub fn add_msi(&mut self, vectors_log2: u8, sink: Arc<dyn MsiSink>) -> u8 {
        assert!(
            vectors_log2 <= 5 && self.msi.is_none(),
            "MSI with 2^{vectors_log2} vectors"
        );
        let control = u16::from(vectors_log2) << 1 | MSI_64BIT | MSI_MASKING;
        let mut body = [0; 22];
        body[..2].copy_from_slice(&control.to_le_bytes());
        let all = u32::MAX >> (32 - (1u32 << vectors_log2));
        let mut mask = [0; 22];
        mask[..2].copy_from_slice(&[0x71, 0x00]); // MSI Enable, Multiple Message Enable
        mask[2..6].copy_from_slice(&(!3u32).to_le_bytes()); // Message Address
        mask[6..12].fill(0xff); // Message Upper Address, Message Data
        mask[14..18].copy_from_slice(&all.to_le_bytes()); // Mask Bits
        let at = self.add_capability(cap::MSI, &body, &mask);
        self.msi = Some(usize::from(at));
        let _ = self.interrupts.shared.sink.set(sink);
        at
    }

    /// Adds MSI-X with `vectors` vectors (1 to 2048). The table's BAR must have been added.
    pub fn add_msix(&mut self, vectors: u16, layout: MsixLayout, sink: Arc<dyn MsiSink>) -> u8 {
        assert!(
            (1..=MSIX_MAX_VECTORS).contains(&vectors) && self.msix.is_none(),
            "MSI-X"
        );
        assert!(
            (layout.table_offset | layout.pba_offset) & 7 == 0,
            "MSI-X offsets"
        );
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        let table = layout.table_offset | u32::from(layout.table_bar);
        let pba = layout.pba_offset | u32::from(layout.pba_bar);
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pba.to_le_bytes());
        let mask = (MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes();
        let at = self.add_capability(cap::MSIX, &body, &mask);
        self.msix = Some((usize::from(at), layout, vectors));
        self.interrupts.shared.load(|s| {
            s.msix = vec![MsixEntry::RESET; usize::from(vectors)];
            s.msix_pending = vec![0; usize::from(vectors).div_ceil(64)];
        });
        let _ = self.interrupts.shared.sink.set(sink);
        at
    }

    /// Adds the PCI Express capability of a root-complex integrated endpoint, which has no link.
    /// PCI Express Base Specification 3.0 §7.8.
    pub fn add_pci_express(&mut self) -> u8 {
        let mut body = [0; 58];
        // PCI Express Capabilities: version 2, device/port type 9.
        body[..2].copy_from_slice(&0x0092u16.to_le_bytes());
        // Device Capabilities: role-based error reporting, 128-byte payload.
        body[2..6].copy_from_slice(&0x0000_8000u32.to_le_bytes());
        let mut mask = [0; 8];
        // Device Control: error reporting enables, relaxed ordering, no snoop.
        mask[6..].copy_from_slice(&0x081fu16.to_le_bytes());
        self.add_capability(cap::PCI_EXPRESS, &body, &mask)
    }

    /// Gives the function an interrupt pin (0 = INTA … 3 = INTD) and the line that it drives.
    pub fn set_intx(&mut self, pin: u8, line: IrqLine) {
        assert!(pin < 4, "INTx pin {pin}");
        self.fix(reg::INTERRUPT_PIN, &[pin + 1]);
        let _ = self.interrupts.shared.line.set(line);
    }

    /// The bus-master bit, for [`super::Dma::new`].
    pub fn bus_master(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.bus_master)
    }

    /// The function's interrupts.
    pub fn interrupts(&self) -> PciInterrupts {
        self.interrupts.clone()
    }

    /// Reads 4 bytes at a multiple of 4 ([`super::PciFunction::config_read`]).
    pub fn read(&self, offset: u16) -> u32 {
        let offset = offset & !3;
        if usize::from(offset) >= CONFIG_BYTES {
            return 0;
        }
        let mut v = self.dword(offset);
        if offset == reg::COMMAND && lock(&self.interrupts.shared.state).intx_level {
            v |= u32::from(reg::STATUS_INTERRUPT) << 16;
        }
        if let Some(at) = self.msi
            && usize::from(offset) == at + 20
        {
            v = lock(&self.interrupts.shared.state).msi.pending;
        }
        v
    }

    /// Writes configuration space ([`super::PciFunction::config_write`]): registers, then what
    /// follows from them (bus mastering, interrupts).
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, b) in (usize::from(offset)..CONFIG_BYTES).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (b & mask);
        }
        self.apply(true);
    }

    /// Brings bus mastering and interrupts in line with the registers.
    fn apply(&mut self, send: bool) {
        let command = self.word(reg::COMMAND);
        self.bus_master
            .store(command & reg::COMMAND_BUS_MASTER != 0, Ordering::Release);
        let msi = self.msi.map(|at| at as u16);
        let msix = self.msix.map(|(at, ..)| self.word(at as u16 + 2));
        let change = |s: &mut super::interrupts::IrqState| {
            s.intx_disabled = command & reg::COMMAND_INTX_DISABLE != 0;
            if let Some(at) = msi {
                let control = self.word(at + 2);
                s.msi.enabled = control & MSI_ENABLE != 0;
                s.msi.granted_log2 = (control >> 4 & 7).min(control >> 1 & 7) as u8;
                s.msi.addr = u64::from(self.dword(at + 4)) | u64::from(self.dword(at + 8)) << 32;
                s.msi.data = self.word(at + 12);
                s.msi.mask = self.dword(at + 16);
            }
            if let Some(control) = msix {
                s.msix_enabled = control & MSIX_ENABLE != 0;
                s.msix_masked = control & MSIX_FUNCTION_MASK != 0;
            }
        };
        if send {
            self.interrupts.shared.update(change);
        } else {
            self.interrupts.shared.load(change);
        }
    }

    /// Kind and size of a BAR ([`super::PciFunction::bar`]).
    pub fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        if index == EXPANSION_ROM {
            return self.rom_bytes.map(|size| (BarKind::Mem32, size));
        }
        *self.bars.get(usize::from(index))?
    }

    /// Where a BAR decodes now ([`super::PciFunction::bar_address`]).
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let (kind, _) = self.bar(index)?;
        let command = self.word(reg::COMMAND);
        if index == EXPANSION_ROM {
            let v = self.dword(reg::EXPANSION_ROM);
            let decodes = command & reg::COMMAND_MEMORY != 0 && v & ROM_ENABLE != 0;
            return decodes.then(|| u64::from(v & !0x7ff));
        }
        let offset = reg::BAR0 + 4 * u16::from(index);
        let low = self.dword(offset);
        match kind {
            BarKind::Io => (command & reg::COMMAND_IO != 0).then(|| u64::from(low & !3)),
            _ if command & reg::COMMAND_MEMORY == 0 => None,
            BarKind::Mem32 => Some(u64::from(low & !0xf)),
            BarKind::Mem64 | BarKind::Mem64Prefetch => {
                Some(u64::from(low & !0xf) | u64::from(self.dword(offset + 4)) << 32)
            }
        }
    }

    /// Serves a load from the MSI-X table or pending bits; `false` = the place is another one.
    pub fn msix_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        match self.msix_place(bar, offset) {
            Some((true, at)) => self.interrupts.table_read(at, data),
            Some((false, at)) => self.interrupts.pba_read(at, data),
            None => return false,
        }
        true
    }

    /// Serves a store to the MSI-X table or pending bits; `false` = the place is another one.
    pub fn msix_write(&mut self, bar: u8, offset: u64, data: &[u8]) -> bool {
        match self.msix_place(bar, offset) {
            Some((true, at)) => self.interrupts.table_write(at, data),
            Some((false, _)) => {}
            None => return false,
        }
        true
    }

    /// Offset within the table (`true`) or the pending bits.
    fn msix_place(&self, bar: u8, offset: u64) -> Option<(bool, u64)> {
        let (_, l, vectors) = self.msix?;
        let inside = |place_bar: u8, start: u32, len: u64| {
            let at = offset.checked_sub(u64::from(start))?;
            (place_bar == bar && at < len).then_some(at)
        };
        let table_bytes = u64::from(vectors) * MSIX_ENTRY_BYTES;
        let pba_bytes = u64::from(vectors).div_ceil(64) * 8;
        inside(l.table_bar, l.table_offset, table_bytes)
            .map(|at| (true, at))
            .or_else(|| inside(l.pba_bar, l.pba_offset, pba_bytes).map(|at| (false, at)))
    }

    /// Power-on state: nothing decodes, no bus mastering, INTx released, vectors masked.
    pub fn reset(&mut self) {
        self.bytes = self.reset;
        self.interrupts.shared.load(|s| {
            s.intx_level = false;
            s.msi.pending = 0;
            s.msix.fill(MsixEntry::RESET);
            s.msix_pending.fill(0);
        });
        self.apply(false);
    }

    /// The state, for the function's own section.
    pub fn save(&self) -> ConfigSaved {
        let s = lock(&self.interrupts.shared.state);
        ConfigSaved {
            bytes: self.bytes.to_vec(),
            intx_level: s.intx_level,
            msix_table: s.msix.iter().flat_map(|e| e.to_bytes()).collect(),
            msix_pending: s.msix_pending.clone(),
            msi_pending: s.msi.pending,
        }
    }

    /// Takes a state over. Says what is wrong if it is of a function of another shape; the
    /// configuration space is then in its power-on state.
    pub fn restore(&mut self, saved: &ConfigSaved) -> Result<(), String> {
        self.reset();
        let ConfigSaved {
            bytes,
            intx_level,
            msix_table,
            msix_pending,
            msi_pending,
        } = saved;
        let vectors = usize::from(self.msix.map_or(0, |(.., n)| n));
        if bytes.len() != CONFIG_BYTES {
            return Err(format!("configuration space of {} bytes", bytes.len()));
        }
        if msix_table.len() != vectors * MSIX_ENTRY_BYTES as usize
            || msix_pending.len() != vectors.div_ceil(64)
        {
            return Err(format!("MSI-X table of {} bytes", msix_table.len()));
        }
        for ((to, from), mask) in self.bytes.iter_mut().zip(bytes).zip(self.writable) {
            *to = (*to & !mask) | (from & mask);
        }
        let table: Vec<MsixEntry> = msix_table
            .as_chunks::<16>()
            .0
            .iter()
            .map(MsixEntry::from_bytes)
            .collect();
        self.interrupts.shared.load(|s| {
            s.msix = table;
            s.msix_pending.clone_from(msix_pending);
            s.msi.pending = *msi_pending;
            // The line itself is driven by `apply`, when it is known whether messages replace it.
            s.intx_disabled = true;
            s.intx_level = *intx_level;
        });
        self.apply(false);
        Ok(())
    }

    /// What a person may see.
    pub fn inspect(&self) -> Inspect {
        let s = lock(&self.interrupts.shared.state);
        let bars = (0..=EXPANSION_ROM)
            .filter(|i| self.bar(*i).is_some())
            .map(|i| {
                let at = match self.bar_address(i) {
                    Some(a) => Inspect::Hex(a),
                    None => Inspect::Text("disabled".into()),
                };
                (i.to_string(), at)
            })
            .collect();
        Inspect::node([
            ("vendor_id", Inspect::Hex(self.word(reg::VENDOR_ID).into())),
            ("device_id", Inspect::Hex(self.word(reg::DEVICE_ID).into())),
            ("command", Inspect::Hex(self.word(reg::COMMAND).into())),
            ("bars", Inspect::Node(bars)),
            ("intx", Inspect::Bool(s.intx_level)),
            ("msi_enabled", Inspect::Bool(s.msi.enabled)),
            ("msix_enabled", Inspect::Bool(s.msix_enabled)),
            ("msix_masked", Inspect::Bool(s.msix_masked)),
            ("msix", s.inspect_msix()),
        ])
    }
}
