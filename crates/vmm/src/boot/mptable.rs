//! MP configuration table, for kernels without ACPI. MultiProcessor Specification 1.4.

use crate::board::{IOAPIC_ADDR, LAPIC_ADDR, intx_gsi};

/// Highest APIC id that the table can name; FFH is broadcast.
const MAX_APIC_ID: u32 = 254;
/// PCI slots that the interrupt table lists.
const PCI_SLOTS: u32 = 32;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const BUS_PCI: u8 = 0;
const BUS_ISA: u8 = 1;

const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// Active low, level-triggered (§4.3.4).
const LOW_LEVEL: u16 = 0xf;

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}

fn set(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = bytes.get_mut(at..at + value.len()) {
        slot.copy_from_slice(value);
    }
}

/// The floating pointer followed by the table, to be put at `gpa`.
pub(super) fn build(gpa: u64, vcpus: u32) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    let cpus = vcpus.min(MAX_APIC_ID + 1);
    for id in 0..cpus {
        let flags = 1 | if id == 0 { 2 } else { 0 }; // enabled, bootstrap
        // Family 6, FPU and APIC: §4.3.1. Real values come from CPUID.
        add(&[
            ENTRY_PROCESSOR,
            id as u8,
            0x14,
            flags,
            0,
            6,
            0,
            0,
            1,
            2,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    add(&[ENTRY_BUS, BUS_PCI, b'P', b'C', b'I', b' ', b' ', b' ']);
    add(&[ENTRY_BUS, BUS_ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic_id = vcpus.min(MAX_APIC_ID) as u8;
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, 0x11, 1];
    ioapic.extend_from_slice(&IOAPIC_ADDR.to_le_bytes());
    add(&ioapic);
    let mut interrupt = |kind: u8, ty: u8, flags: u16, bus: u8, irq: u8, apic: u8, pin: u8| {
        let [lo, hi] = flags.to_le_bytes();
        add(&[kind, ty, lo, hi, bus, irq, apic, pin]);
    };
    for irq in 0..16u8 {
        match irq {
            2 => {}
            // The PIT's line is on pin 2, as the MADT override says.
            0 => interrupt(ENTRY_IO_INTERRUPT, INT, 0, BUS_ISA, 0, ioapic_id, 2),
            9 => interrupt(ENTRY_IO_INTERRUPT, INT, LOW_LEVEL, BUS_ISA, 9, ioapic_id, 9),
            n => interrupt(ENTRY_IO_INTERRUPT, INT, 0, BUS_ISA, n, ioapic_id, n),
        }
    }
    for slot in 0..PCI_SLOTS {
        for pin in 0..4 {
            let irq = (slot << 2 | pin) as u8;
            let gsi = intx_gsi(slot, pin) as u8;
            interrupt(
                ENTRY_IO_INTERRUPT,
                INT,
                LOW_LEVEL,
                BUS_PCI,
                irq,
                ioapic_id,
                gsi,
            );
        }
    }
    interrupt(ENTRY_LOCAL_INTERRUPT, EXTINT, 0, BUS_ISA, 0, 0, 0);
    interrupt(ENTRY_LOCAL_INTERRUPT, NMI, 0, BUS_ISA, 0, 0xff, 1);

    // Floating pointer structure, §4.1.
    let mut out = vec![0u8; 16];
    set(&mut out, 0, b"_MP_");
    set(&mut out, 4, &((gpa + 16) as u32).to_le_bytes());
    set(&mut out, 8, &[1, 4]); // 16 bytes, revision 1.4
    let sum = checksum(&out);
    set(&mut out, 10, &[sum]);

    // Configuration table header, §4.2.
    let mut header = vec![0u8; 44];
    set(&mut header, 0, b"PCMP");
    set(&mut header, 4, &((44 + entries.len()) as u16).to_le_bytes());
    set(&mut header, 6, &[4]);
    set(&mut header, 8, b"PYRITE  BOARD 1     ");
    set(&mut header, 34, &count.to_le_bytes());
    set(&mut header, 36, &LAPIC_ADDR.to_le_bytes());
    header.extend_from_slice(&entries);
    let sum = checksum(&header);
    set(&mut header, 7, &[sum]);
    out.extend_from_slice(&header);
    out
}
