//! The memory map that firmware would report (ACPI 6.5 §15, "E820").

use pyrite_mem::GuestMemory;

use crate::board::{ECAM_BYTES, ECAM_START, HPET_ADDR, IOAPIC_ADDR, IOAPIC_BYTES, LAPIC_ADDR, low};

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// AddressRangeMemory.
    Ram = 1,
    /// AddressRangeReserved.
    Reserved = 2,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size_bytes: u64,
    /// Kind.
    pub kind: RangeKind,
}

/// The map of a machine: ascending, without overlap. What is not in it is free for PCI.
pub fn memory_map(memory: &GuestMemory) -> Vec<Range> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if end > start {
            map.push(Range {
                start,
                size_bytes: end - start,
                kind,
            });
        }
    };
    let low_end = super::low_ram_end(memory);
    add(0, low::EBDA, RangeKind::Ram);
    add(low::EBDA, low::CONVENTIONAL_END, RangeKind::Reserved);
    add(low::ACPI, low::END, RangeKind::Reserved);
    add(low::END, low_end, RangeKind::Ram);
    add(ECAM_START, ECAM_START + ECAM_BYTES, RangeKind::Reserved);
    let ioapic = u64::from(IOAPIC_ADDR);
    add(ioapic, ioapic + IOAPIC_BYTES, RangeKind::Reserved);
    let hpet = u64::from(HPET_ADDR);
    add(hpet, hpet + 0x1000, RangeKind::Reserved);
    let lapic = u64::from(LAPIC_ADDR);
    add(lapic, lapic + 0x10_0000, RangeKind::Reserved);
    for r in memory
        .regions()
        .iter()
        .filter(|r| r.gpa >= pyrite_mem::HIGH_RAM_START)
    {
        add(r.gpa, r.gpa + r.size_bytes, RangeKind::Ram);
    }
    map
}
