//! The conformance suite for every platform device, on a whole chipset.

use std::sync::Arc;

use pyrite_mem::GuestMemory;
use pyrite_vdev::bus::lock;
use pyrite_vdev::conformance::{self, Target};
use pyrite_vdev::{
    Bus, IntrSink, MachineEvents, MmioDevice, MsiMessage, MsiSink, PioDevice, VmClock,
};

use crate::chipset::{Chipset, ChipsetConfig, FirmwareBoard};
use crate::flash::{Flash, Volatile};
use crate::pci_host::Windows;
use crate::uart::NoSerial;

struct Outside;
impl IntrSink for Outside {
    fn set_intr(&self, _level: bool) {}
}
impl MsiSink for Outside {
    fn send(&self, _msi: MsiMessage) {}
}
impl MachineEvents for Outside {
    fn power_off(&self) {}
    fn reset(&self) {}
    fn suspend(&self) {}
    fn debug_exit(&self, _code: u32) {}
}

fn machine() -> (Chipset, Arc<VmClock>) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    build(memory, None)
}

/// The board for firmware, with a ROM and flash.
fn firmware_machine() -> (Chipset, Arc<VmClock>) {
    let memory = GuestMemory::with_rom(1 << 20, &[0x5a; 0x2_0000]).unwrap();
    let flash = Flash::new(vec![0xff; 0x8000], Box::new(Volatile)).unwrap();
    let windows = Windows {
        mem32: (0x8000_0000, 0x7ec0_0000),
        mem64: (1 << 32, 1 << 40),
        io: (0x1000, 0xf000),
    };
    let flash = Some((0xfff0_0000, flash));
    build(memory, Some(FirmwareBoard { windows, flash }))
}

fn build(memory: GuestMemory, firmware: Option<FirmwareBoard>) -> (Chipset, Arc<VmClock>) {
    let outside = Arc::new(Outside);
    let clock = Arc::new(VmClock::default());
    let chipset = Chipset::build(ChipsetConfig {
        memory: Arc::new(memory),
        clock: clock.clone(),
        msi: outside.clone(),
        intr: outside.clone(),
        events: outside,
        wall_clock: Arc::new(|| 1_700_000_000),
        vcpus: 2,
        serial: [Box::new(NoSerial), Box::new(NoSerial)],
        debugcon: Box::new(NoSerial),
        doorbells: None,
        firmware,
    })
    .unwrap();
    (chipset, clock)
}

/// A bus seen as one device, so that decoders are driven too.
struct Ports<'a>(&'a Bus<dyn PioDevice>);
impl PioDevice for Ports<'_> {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        self.0.read(port, data);
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        self.0.write(port, data);
    }
}
struct Memory<'a>(&'a Bus<dyn MmioDevice>, u64);
impl MmioDevice for Memory<'_> {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(self.1 + offset, data);
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(self.1 + offset, data);
    }
}

/// Drives every device with arbitrary accesses, with time passing in between.
fn exercise(c: &Chipset, clock: &VmClock, seed: u64) {
    let step = |b: u8| {
        clock.advance(if b & 1 == 0 {
            0
        } else {
            1 << (b >> 3 & 0x1f).min(22)
        })
    };
    for (first, last, name) in c.io.ranges() {
        let bytes = conformance::pseudo_random(seed ^ first << 8, 1500);
        let (first, last) = (first as u16, (last as u16).min(first as u16 | 0xff));
        let device = &mut Ports(&c.io);
        tracing::debug!(name, "fuzz");
        conformance::fuzz_device(
            Target::Pio {
                device,
                first,
                last,
            },
            &bytes,
            step,
        );
        conformance::odd_port_accesses(&mut Ports(&c.io), first, last);
        conformance::fuzz_device(
            Target::Pio {
                device: &mut Ports(&c.io),
                first,
                last,
            },
            &bytes[700..],
            step,
        );
    }
    for (first, last, _) in c.mmio.ranges() {
        let bytes = conformance::pseudo_random(seed ^ first, 4000);
        let len = (last - first + 1).min(1 << 15);
        let device = &mut Memory(&c.mmio, first);
        conformance::fuzz_device(Target::Mmio { device, len }, &bytes, step);
        conformance::odd_memory_accesses(&mut Memory(&c.mmio, first), len);
        let device = &mut Memory(&c.mmio, first);
        conformance::fuzz_device(Target::Mmio { device, len }, &bytes[1000..], step);
    }
    lock(&c.i8042).key(0x1e, true);
    lock(&c.i8042).mouse(seed as i32, -3, 1, 3);
    lock(&c.uarts[0]).receive(b"input");
    lock(&c.pm).press_power_button();
}

#[test]
fn every_device_survives_arbitrary_accesses_and_moves_its_state() {
    survives(machine);
}

#[test]
fn the_firmware_board_survives_arbitrary_accesses_and_moves_its_state() {
    survives(firmware_machine);
}

fn survives(machine: fn() -> (Chipset, Arc<VmClock>)) {
    for seed in 1..12 {
        let (used, clock) = machine();
        exercise(&used, &clock, seed);
        let (fresh, fresh_clock) = machine();
        fresh_clock.set_ns(clock.now_ns());
        assert_eq!(used.units.len(), fresh.units.len());
        for (u, f) in used.units.iter().zip(&fresh.units) {
            conformance::state_moves(&mut *lock(u), &mut *lock(f));
        }
        let bytes = conformance::pseudo_random(seed, 3000);
        for u in &fresh.units {
            conformance::damaged_state_is_survived(&mut *lock(u), &bytes);
            exercise(&fresh, &fresh_clock, seed);
        }
        for u in &used.units {
            conformance::reset_is_idempotent(&mut *lock(u));
        }
    }
}

#[test]
fn unit_names_are_unique_and_the_root_complex_is_last() {
    let (c, _) = machine();
    let mut names: Vec<String> = c.units.iter().map(|u| lock(u).unit().to_owned()).collect();
    assert_eq!(names.last().map(String::as_str), Some("pci-host"));
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn pit_reaches_the_pic() {
    let (c, clock) = machine();
    for (p, v) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
    ] {
        c.io.write(p, &[v]);
    }
    for (p, v) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
        c.io.write(p, &[v]);
    }
    clock.advance(60_000_000);
    assert_eq!(c.pic.ack(), Some(0x20));
    assert_eq!(c.pic.ack(), None);
}

#[test]
fn firmware_moves_configuration_space_and_shadows_its_rom() {
    let memory = GuestMemory::with_rom(1 << 20, &[0x5a; 0x2_0000]).unwrap();
    let windows = Windows {
        mem32: (0x8000_0000, 0x7ec0_0000),
        mem64: (1 << 32, 1 << 40),
        io: (0x1000, 0xf000),
    };
    let flash = None;
    let (c, _) = build(memory, Some(FirmwareBoard { windows, flash }));
    let config = |at: u32, v: u8| {
        c.io.write(0xcf8, &(0x8000_0000 | at & !3).to_le_bytes());
        c.io.write(0xcfc + (at & 3) as u16, &[v]);
    };
    let id = |at: u64| {
        let mut b = [0; 4];
        c.mmio.read(at, &mut b);
        u32::from_le_bytes(b)
    };
    assert_eq!(c.pci.ecam().get(), None);
    for base in [0xb000_0000u64, 0xe000_0000] {
        config(0x60, 0);
        config(0x63, (base >> 24) as u8);
        assert_eq!(id(base), u32::MAX, "not enabled");
        config(0x60, 1);
        assert_eq!(c.pci.ecam().get(), Some(base));
        assert_eq!(id(base), 0x29c0_8086);
        assert_eq!(id(base + (31 << 15)), 0x2918_8086);
    }
    let m = &c.memory;
    let byte = || {
        let mut b = [0];
        m.read(0xf_1234, &mut b).unwrap();
        b[0]
    };
    // Loads from ROM, stores to RAM; then RAM; then RAM that is read-only.
    config(0x90, 0x20);
    m.write(0xf_1234, &[1]).unwrap();
    assert_eq!(byte(), 0x5a);
    config(0x90, 0x30);
    assert_eq!(byte(), 1);
    config(0x90, 0x10);
    assert!(m.write(0xf_1234, &[2]).is_err());
    // C4000H only.
    config(0x91, 0x30);
    assert!(m.write(0xc_4000, &[3]).is_ok() && m.write(0xc_3fff, &[3]).is_err());
    assert!(m.write(0xc_8000, &[3]).is_err());
    config(0x96, 0x33);
    assert!(m.write(0xe_8000, &[3]).is_ok() && m.write(0xe_7fff, &[3]).is_err());
    // A restored machine has it all again.
    let (again, _) = firmware_machine();
    for (u, n) in c
        .units
        .iter()
        .zip(again.units.iter().filter(|u| lock(u).unit() != "flash"))
    {
        let section = lock(u).save().unwrap();
        lock(n).restore(&section).unwrap();
    }
    assert_eq!(again.pci.ecam().get(), Some(0xe000_0000));
    assert!(again.memory.write(0xc_4000, &[3]).is_ok());
    assert!(again.memory.write(0xf_1234, &[2]).is_err());
    c.reset();
    assert_eq!((c.pci.ecam().get(), byte()), (None, 0x5a));
    assert!(m.write(0xc_4000, &[3]).is_err());
}
