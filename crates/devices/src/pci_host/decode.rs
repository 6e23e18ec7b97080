//! Decoding of BAR addresses, and their assignment.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{DoorbellAt, EXPANSION_ROM, reg};
use pyrite_vdev::{AddressDecoder, BarKind, BarMemory, PciFunction};

use super::{
    PciHost, ToldDoorbells, WINDOW_IO_BYTES, WINDOW_IO_START, WINDOW32_BYTES, WINDOW32_START,
    WINDOW64_BYTES, WINDOW64_START, Windows, intx_gsi,
};

/// A function in its slot, and where it was found to decode.
pub(super) struct Function {
    pub device: Arc<Mutex<dyn PciFunction>>,
    bars: [Option<(BarKind, u64)>; BARS],
    at: [Option<u64>; BARS],
    pub doorbells: ToldDoorbells,
    /// Memories behind BARs, and where they were last told that they are.
    memories: Vec<(u8, Arc<dyn BarMemory>, Option<u64>)>,
}

/// Base address registers of a function, with the one of the expansion ROM.
const BARS: usize = EXPANSION_ROM as usize + 1;

impl Function {
    pub(super) fn new(device: Arc<Mutex<dyn PciFunction>>) -> Function {
        let (bars, memories) = {
            let d = lock(&device);
            let memory = |n| d.bar_memory(n).map(|m| (n, m, None));
            let memories = (0..BARS as u8).filter_map(memory).collect();
            (std::array::from_fn(|n| d.bar(n as u8)), memories)
        };
        let mut f = Function {
            device,
            bars,
            at: [None; BARS],
            doorbells: Vec::new(),
            memories,
        };
        f.query();
        f
    }

    /// Asks where the function decodes now; says whether that changed.
    pub(super) fn query(&mut self) -> bool {
        let d = lock(&self.device);
        let now = std::array::from_fn(|n| d.bar_address(n as u8));
        drop(d);
        std::mem::replace(&mut self.at, now) != now
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = (usize, u64)> {
        self.at
            .iter()
            .enumerate()
            .filter_map(|(n, at)| Some((n, (*at)?)))
    }

    /// True if `table` decodes a memory behind a BAR elsewhere than it was last told.
    pub(super) fn memories_move(&self, table: &DecodeTable, devfn: u8) -> bool {
        (self.memories.iter()).any(|(bar, _, told)| table.start_of(devfn, *bar) != *told)
    }

    /// Tells the memories behind BARs where `table` decodes them.
    pub(super) fn place_memories(&mut self, table: &DecodeTable, devfn: u8) {
        for (bar, memory, told) in &mut self.memories {
            let now = table.start_of(devfn, *bar);
            if now != *told {
                memory.place(now);
                *told = now;
            }
        }
    }

    /// The doorbells whose BAR `table` decodes.
    pub(super) fn doorbells_in(&self, table: &DecodeTable, devfn: u8) -> ToldDoorbells {
        let all = lock(&self.device).doorbells();
        all.into_iter()
            .filter_map(|doorbell| {
                let e = table
                    .entries
                    .iter()
                    .find(|e| e.devfn == devfn && e.bar == doorbell.bar)?;
                let gpa = e
                    .start
                    .checked_add(doorbell.offset)
                    .filter(|a| *a <= e.last)?;
                Some(DoorbellAt { gpa, doorbell })
            })
            .collect()
    }
}

struct Entry {
    start: u64,
    last: u64,
    devfn: u8,
    bar: u8,
    device: Arc<Mutex<dyn PciFunction>>,
}

/// What decodes where, ascending and without overlap.
#[derive(Default)]
pub(super) struct DecodeTable {
    entries: Vec<Entry>,
}

/// The windows that a BAR of this kind may lie in.
fn windows(all: &Windows, kind: BarKind) -> [(u64, u64); 2] {
    match kind {
        BarKind::Io => [all.io; 2],
        BarKind::Mem32 => [all.mem32; 2],
        BarKind::Mem64 | BarKind::Mem64Prefetch => [all.mem64, all.mem32],
    }
}

impl DecodeTable {
    /// The BARs of the wanted kinds. One that lies outside the windows (a driver is sizing it) or
    /// over one of a lower function does not decode.
    pub(super) fn build(
        functions: &BTreeMap<u8, Function>,
        within: &Windows,
        wanted: impl Fn(BarKind) -> bool,
    ) -> DecodeTable {
        let mut entries: Vec<Entry> = Vec::new();
        for (devfn, f) in functions {
            for bar in 0..BARS as u8 {
                let n = usize::from(bar);
                let (Some((kind, size)), Some(start)) = (f.bars[n], f.at[n]) else {
                    continue;
                };
                let Some(last) = start.checked_add(size.saturating_sub(1)) else {
                    continue;
                };
                let inside = |(from, len): &(u64, u64)| start >= *from && last < from + len;
                if !wanted(kind) || !windows(within, kind).iter().any(inside) {
                    continue;
                }
                let at = entries.partition_point(|e| e.start < start);
                let before = at.checked_sub(1).and_then(|b| entries.get(b));
                if before.is_some_and(|e| e.last >= start)
                    || entries.get(at).is_some_and(|e| e.start <= last)
                {
                    tracing::debug!(devfn, bar, start, "BAR overlaps another one");
                    continue;
                }
                let device = Arc::clone(&f.device);
                entries.insert(
                    at,
                    Entry {
                        start,
                        last,
                        devfn: *devfn,
                        bar,
                        device,
                    },
                );
            }
        }
        DecodeTable { entries }
    }

    /// Where a BAR decodes.
    fn start_of(&self, devfn: u8, bar: u8) -> Option<u64> {
        let at = |e: &&Entry| e.devfn == devfn && e.bar == bar;
        self.entries.iter().find(at).map(|e| e.start)
    }

    fn find(&self, addr: u64) -> Option<&Entry> {
        let at = self.entries.partition_point(|e| e.start <= addr);
        self.entries
            .get(at.checked_sub(1)?)
            .filter(|e| addr <= e.last)
    }

    fn read(&self, addr: u64, data: &mut [u8]) {
        if let Some(e) = self.find(addr) {
            let n = data.len().min(
                usize::try_from(e.last - addr)
                    .unwrap_or(63)
                    .saturating_add(1),
            );
            lock(&e.device).bar_read(e.bar, addr - e.start, &mut data[..n]);
        }
    }

    fn write(&self, addr: u64, data: &[u8]) {
        if let Some(e) = self.find(addr) {
            let n = data.len().min(
                usize::try_from(e.last - addr)
                    .unwrap_or(63)
                    .saturating_add(1),
            );
            lock(&e.device).bar_write(e.bar, addr - e.start, &data[..n]);
        }
    }
}

/// The memory windows on the memory bus.
pub struct MemoryWindow(pub Arc<PciHost>);

impl AddressDecoder for MemoryWindow {
    fn read(&self, addr: u64, data: &mut [u8]) {
        if self.0.is_ecam(addr) {
            return super::Ecam(Arc::clone(&self.0)).read(addr, data);
        }
        // `load_full`: the function may be busy for long, and a guard must not be held that long.
        self.0.memory.load_full().read(addr, data);
    }
    fn write(&self, addr: u64, data: &[u8]) {
        if self.0.is_ecam(addr) {
            return super::Ecam(Arc::clone(&self.0)).write(addr, data);
        }
        self.0.memory.load_full().write(addr, data);
    }
}

/// The I/O window on the port bus.
pub struct IoWindow(pub Arc<PciHost>);

impl AddressDecoder for IoWindow {
    fn read(&self, addr: u64, data: &mut [u8]) {
        self.0.io.load_full().read(addr, data);
    }
    fn write(&self, addr: u64, data: &[u8]) {
        self.0.io.load_full().write(addr, data);
    }
}

/// A BAR found no room in its window.
#[derive(Debug, thiserror::Error)]
#[error("no room for BAR {bar} ({size:#x} bytes) of PCI function 00:{:02x}.{}", devfn >> 3, devfn & 7)]
pub struct BarSpaceError {
    devfn: u8,
    bar: u8,
    size: u64,
}

/// Largest 64-bit BAR that is put below 4 GiB: 32 of these would fill the window.
const LOW_BAR_BYTES: u64 = WINDOW32_BYTES / 32;

/// Addresses that are handed out from below.
struct Window {
    next: u64,
    end: u64,
}

impl Window {
    fn new(start: u64, bytes: u64) -> Window {
        Window {
            next: start,
            end: start + bytes,
        }
    }
    /// The next `size` bytes, aligned to themselves.
    fn take(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size.max(1))?;
        let end = start.checked_add(size).filter(|e| *e <= self.end)?;
        self.next = end;
        Some(start)
    }
}

/// Gives addresses, largest first so that alignment wastes nothing.
pub(super) fn assign(functions: &BTreeMap<u8, Function>) -> Result<(), BarSpaceError> {
    let mut bars: Vec<(u64, u8, u8, BarKind)> = Vec::new();
    for (devfn, f) in functions {
        // Nothing may decode while addresses move.
        lock(&f.device).config_write(reg::COMMAND, &[0, 0]);
        for (n, bar) in f.bars.iter().enumerate() {
            if let Some((kind, size)) = bar {
                bars.push((*size, *devfn, n as u8, *kind));
            }
        }
    }
    bars.sort_by_key(|(size, devfn, bar, _)| (std::cmp::Reverse(*size), *devfn, *bar));
    let mut io = Window::new(WINDOW_IO_START, WINDOW_IO_BYTES);
    let mut low = Window::new(WINDOW32_START, WINDOW32_BYTES);
    let mut high = Window::new(WINDOW64_START, WINDOW64_BYTES);
    for (size, devfn, bar, kind) in bars {
        let start = match kind {
            BarKind::Io => io.take(size),
            BarKind::Mem32 => low.take(size),
            // A BAR that 32-bit guests can reach is one that all can. What is so large that 32-bit
            // BARs might find no room after it goes up.
            _ if size <= LOW_BAR_BYTES => low.take(size).or_else(|| high.take(size)),
            _ => high.take(size),
        };
        let start = start.ok_or(BarSpaceError { devfn, bar, size })?;
        let Some(f) = functions.get(&devfn) else {
            continue;
        };
        let offset = match bar {
            EXPANSION_ROM => reg::EXPANSION_ROM,
            _ => reg::BAR0 + 4 * u16::from(bar),
        };
        let mut device = lock(&f.device);
        device.config_write(offset, &(start as u32).to_le_bytes());
        if matches!(kind, BarKind::Mem64 | BarKind::Mem64Prefetch) {
            device.config_write(offset + 4, &((start >> 32) as u32).to_le_bytes());
        }
    }
    for (devfn, f) in functions {
        let mut device = lock(&f.device);
        let mut command = 0;
        for (kind, _) in f.bars.iter().flatten() {
            command |= if *kind == BarKind::Io {
                reg::COMMAND_IO
            } else {
                reg::COMMAND_MEMORY
            };
        }
        device.config_write(reg::COMMAND, &command.to_le_bytes());
        let pin = (device.config_read(reg::INTERRUPT_LINE) >> 8) as u8;
        if let Some(pin) = pin.checked_sub(1) {
            let gsi = intx_gsi(devfn >> 3, pin);
            device.config_write(reg::INTERRUPT_LINE, &[gsi as u8]);
        }
    }
    Ok(())
}
