use std::sync::atomic::Ordering;

use pyrite_vdev::bus::lock;
use pyrite_vdev::{Lifecycle, PciFunction};

use crate::rng::Rng;
use crate::spec::*;
use crate::testing::{BUFFERS_AT, Bench};

fn bench() -> Bench {
    Bench::new(Rng::from_source(Box::new(std::io::repeat(0x5a))))
}

fn ask(b: &mut Bench) {
    b.add(0, &[(BUFFERS_AT, 16, true)]);
    b.kick(0);
}

#[test]
fn ids_and_capabilities_are_those_of_a_modern_device() {
    let b = bench();
    let mut d = lock(&b.device);
    assert_eq!(d.config_read(0), 0x1044_1af4);
    assert_eq!(d.config_read(8) & 0xff, 1);
    let mut kinds = Vec::new();
    let mut at = (d.config_read(0x34) & 0xff) as u16;
    while at != 0 {
        let v = d.config_read(at);
        if v & 0xff == 9 {
            kinds.push(v >> 24);
        }
        at = (v >> 8 & 0xff) as u16;
    }
    kinds.sort_unstable();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
}

#[test]
fn features_without_version_1_or_unknown_are_refused() {
    let b = bench();
    for (low, high) in [(0, 0), (1 << 5, 1)] {
        b.set_status(0);
        b.set_status(3);
        for (half, value) in [(0_u32, low), (1, high)] {
            b.write(8, &half.to_le_bytes());
            b.write(12, &(value as u32).to_le_bytes());
        }
        b.set_status(11);
        assert_eq!(b.status(), 3);
        // DRIVER_OK without FEATURES_OK is not accepted either.
        b.set_status(7);
        assert_eq!(b.status(), 3);
    }
}

#[test]
fn intx_is_raised_and_acknowledged_by_reading_isr() {
    let mut b = bench();
    b.up(0);
    ask(&mut b);
    assert!(b.line.0.load(Ordering::SeqCst));
    assert_eq!(b.read_u8(0x1000), 1);
    assert!(!b.line.0.load(Ordering::SeqCst));
    assert_eq!(b.read_u8(0x1000), 0);
    assert_eq!(b.used(0), Some((0, 16)));
    assert_eq!(b.bytes(BUFFERS_AT, 16), [0x5a; 16]);
    assert!(lock(&b.msis.0).is_empty());
}

#[test]
fn msix_sends_the_vector_of_the_queue() {
    let mut b = bench();
    b.enable_msix(2);
    b.up(0);
    b.write(26, &1_u16.to_le_bytes());
    assert_eq!(b.read_u16(26), 1);
    ask(&mut b);
    let sent: Vec<u32> = lock(&b.msis.0).iter().map(|m| m.data).collect();
    assert_eq!(sent, [1]);
    assert!(!b.line.0.load(Ordering::SeqCst));
    // A vector that does not exist reads back as none.
    b.write(26, &2_u16.to_le_bytes());
    assert_eq!(b.read_u16(26), VIRTIO_MSI_NO_VECTOR);
    ask(&mut b);
    assert_eq!(lock(&b.msis.0).len(), 1);
}

#[test]
fn nothing_is_taken_without_bus_mastering_or_before_driver_ok() {
    let mut b = bench();
    lock(&b.device).start();
    b.enable_pci();
    b.negotiate(0);
    ask(&mut b);
    assert_eq!(b.used(0), None);
    lock(&b.device).config_write(4, &2_u16.to_le_bytes());
    b.set_status(15);
    assert_eq!(b.used(0), None);
    b.enable_pci();
    b.kick(0);
    assert!(b.used(0).is_some());
}

#[test]
fn driver_reaches_registers_through_the_pci_cfg_capability() {
    let mut b = bench();
    b.up(0);
    let mut d = lock(&b.device);
    let mut at = (d.config_read(0x34) & 0xff) as u16;
    while d.config_read(at) & 0xff != 9 || d.config_read(at) >> 24 != 5 {
        at = (d.config_read(at) >> 8 & 0xff) as u16;
    }
    d.config_write(at + 4, &[0]);
    d.config_write(at + 8, &20_u32.to_le_bytes());
    d.config_write(at + 12, &1_u32.to_le_bytes());
    assert_eq!(d.config_read(at + 16), 15);
    d.config_write(at + 16, &[0]);
    assert_eq!(d.config_read(at + 16), 0);
}

#[test]
fn bad_ring_address_needs_reset() {
    let mut b = bench();
    b.enable_pci();
    b.negotiate(0);
    b.set_status(0);
    b.set_status(3);
    b.write(8, &1_u32.to_le_bytes());
    b.write(12, &1_u32.to_le_bytes());
    b.set_status(11);
    b.write(32, &(!15_u64).to_le_bytes());
    b.write(28, &1_u16.to_le_bytes());
    assert_eq!(
        b.status() & VIRTIO_CONFIG_S_NEEDS_RESET,
        VIRTIO_CONFIG_S_NEEDS_RESET
    );
    assert_eq!(b.read_u16(28), 0);
}

#[test]
fn state_survives_and_machine_reset_clears_it() {
    let mut b = bench();
    b.enable_msix(2);
    b.up(1 << VIRTIO_F_EVENT_IDX);
    ask(&mut b);
    b.save_restore_save(&Bench::with_memory(
        std::sync::Arc::clone(&b.memory),
        Rng::from_source(Box::new(std::io::repeat(0))),
    ));
    lock(&b.device).reset();
    assert_eq!(b.status(), 0);
    assert_eq!(lock(&b.device).config_read(4) & 7, 0);
}
