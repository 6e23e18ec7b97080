//! The conformance suite for every platform device, on a whole chipset.

use std::sync::Arc;

use pyrite_mem::GuestMemory;
use pyrite_vdev::bus::lock;
use pyrite_vdev::conformance::{self, Target};
use pyrite_vdev::{
    Bus, IntrSink, MachineEvents, MmioDevice, MsiMessage, MsiSink, PioDevice, VmClock,
};

use crate::chipset::{Chipset, ChipsetConfig};
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
    let outside = Arc::new(Outside);
    let clock = Arc::new(VmClock::default());
    let chipset = Chipset::build(ChipsetConfig {
        memory: Arc::new(GuestMemory::new(1 << 20).unwrap()),
        clock: clock.clone(),
        msi: outside.clone(),
        intr: outside.clone(),
        events: outside,
        wall_clock: Arc::new(|| 1_700_000_000),
        vcpus: 2,
        serial: [Box::new(NoSerial), Box::new(NoSerial)],
        debugcon: Box::new(NoSerial),
        doorbells: None,
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
