use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyrite_vdev::bus::lock;
use pyrite_vdev::{Lifecycle, PciFunction};

use super::{Blk, BlkConfig};
use crate::testing::{BUFFERS_AT, Bench, MemDisk, fuzz_one, noise};

const HEADER: u64 = BUFFERS_AT;
const STATUS: u64 = BUFFERS_AT + 0x100;
const DATA: u64 = BUFFERS_AT + 0x1000;

fn bench(disk: &Arc<MemDisk>) -> Bench {
    let config = BlkConfig {
        serial: "serial-1".into(),
        ..BlkConfig::default()
    };
    Bench::new(Blk::new(Arc::clone(disk) as _, config))
}

fn header(b: &Bench, kind: u32, sector: u64) {
    let mut h = kind.to_le_bytes().to_vec();
    h.extend_from_slice(&[0; 4]);
    h.extend_from_slice(&sector.to_le_bytes());
    b.memory.write(HEADER, &h).unwrap();
    b.memory.write(STATUS, &[0xee]).unwrap();
}

fn request(b: &mut Bench, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    header(b, kind, sector);
    let mut chain = vec![(HEADER, 16, false)];
    chain.extend_from_slice(data);
    chain.push((STATUS, 1, true));
    b.add(0, &chain);
    b.kick(0);
    let (_, len) = b.used(0).expect("not answered");
    (b.bytes(STATUS, 1)[0], len)
}

#[test]
fn write_then_read_gives_the_data_back() {
    let disk = MemDisk::new(1 << 20, false);
    let mut b = bench(&disk);
    b.up(0);
    b.memory.write(DATA, &[7; 1024]).unwrap();
    assert_eq!(
        request(
            &mut b,
            1,
            4,
            &[(DATA, 512, false), (DATA + 512, 512, false)]
        ),
        (0, 1)
    );
    assert_eq!(lock(&disk.bytes)[2048..3072], [7; 1024]);
    assert_eq!(
        request(&mut b, 0, 4, &[(DATA + 0x1000, 1024, true)]),
        (0, 1025)
    );
    assert_eq!(b.bytes(DATA + 0x1000, 1024), [7; 1024]);
    assert_eq!(request(&mut b, 4, 0, &[]), (0, 1));
}

#[test]
fn errors_are_answered_with_a_status() {
    let disk = MemDisk::new(1 << 20, true);
    let mut b = bench(&disk);
    b.up(0);
    assert_eq!(b.offered() >> 5 & 1, 1, "VIRTIO_BLK_F_RO");
    assert_eq!(request(&mut b, 1, 0, &[(DATA, 512, false)]).0, 1);
    assert_eq!(request(&mut b, 0, 1 << 40, &[(DATA, 512, true)]).0, 1);
    assert_eq!(request(&mut b, 0, u64::MAX, &[(DATA, 512, true)]).0, 1);
    assert_eq!(request(&mut b, 77, 0, &[]).0, 2);
    assert_eq!(request(&mut b, 8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(b.bytes(DATA, 9), b"serial-1\0");
}

#[test]
fn discard_and_write_zeroes_take_several_ranges() {
    let disk = MemDisk::new(1 << 20, false);
    lock(&disk.bytes).fill(9);
    let mut b = bench(&disk);
    b.up(0);
    let mut ranges = Vec::new();
    for sector in [2_u64, 8] {
        ranges.extend_from_slice(&sector.to_le_bytes());
        ranges.extend_from_slice(&1_u32.to_le_bytes());
        ranges.extend_from_slice(&0_u32.to_le_bytes());
    }
    b.memory.write(DATA, &ranges).unwrap();
    for kind in [11, 13] {
        assert_eq!(request(&mut b, kind, 0, &[(DATA, 32, false)]).0, 0);
    }
    assert_eq!(lock(&disk.bytes)[1024..1536], [0; 512]);
    assert_eq!(lock(&disk.bytes)[4096..4608], [0; 512]);
    assert_eq!(lock(&disk.bytes)[1536], 9);
    // An unknown flag, and a range of half an entry.
    b.memory.write(DATA + 12, &2_u32.to_le_bytes()).unwrap();
    assert_eq!(request(&mut b, 13, 0, &[(DATA, 32, false)]).0, 2);
    assert_eq!(request(&mut b, 13, 0, &[(DATA, 24, false)]).0, 1);
}

#[test]
fn chain_without_status_breaks_the_device_until_reset() {
    let disk = MemDisk::new(1 << 20, false);
    let mut b = bench(&disk);
    b.up(0);
    header(&b, 0, 0);
    b.add(0, &[(HEADER, 16, false)]);
    b.kick(0);
    assert_eq!(b.status() & 0x40, 0x40);
    b.set_status(0);
    assert_eq!(b.status(), 0);
    b.up(0);
    assert_eq!(request(&mut b, 4, 0, &[]).0, 0);
}

#[test]
fn reset_in_flight_reads_zero_only_when_the_backend_is_done() {
    let disk = MemDisk::new(1 << 20, false);
    let mut b = bench(&disk);
    b.up(0);
    disk.hold.store(true, Ordering::SeqCst);
    header(&b, 0, 0);
    b.add(
        0,
        &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)],
    );
    b.kick(0);
    b.set_status(0);
    assert_ne!(b.status(), 0);
    disk.release();
    assert_eq!(b.status(), 0);
    assert_eq!(b.used(0), None);
    assert_eq!(b.bytes(STATUS, 1), [0xee]);
}

#[test]
fn pause_waits_for_requests_and_state_survives() {
    let disk = MemDisk::new(1 << 20, false);
    let mut b = bench(&disk);
    b.up(!(1 << 34));
    disk.hold.store(true, Ordering::SeqCst);
    header(&b, 0, 0);
    b.add(
        0,
        &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)],
    );
    b.kick(0);
    lock(&b.device).pause();
    assert!(!lock(&b.device).drained());
    assert!(lock(&b.device).save().is_err());
    disk.release();
    assert!(lock(&b.device).drained());
    assert!(b.used(0).is_some());
    let config = BlkConfig {
        serial: "serial-1".into(),
        ..BlkConfig::default()
    };
    let mut other = Bench::with_memory(
        Arc::clone(&b.memory),
        Blk::new(Arc::clone(&disk) as _, config),
    );
    b.save_restore_save(&other);
    // The driver goes on where it was.
    std::mem::swap(&mut other.rings, &mut b.rings);
    lock(&other.device).start();
    assert_eq!(request(&mut other, 4, 0, &[]).0, 0);
    // A disk of another size is refused and leaves the device as after power-on.
    let section = {
        let mut d = lock(&other.device);
        d.pause();
        d.save().unwrap()
    };
    let small = bench(&MemDisk::new(512, false));
    assert!(lock(&small.device).restore(&section).is_err());
    assert_eq!(small.status(), 0);
    assert_eq!(lock(&small.device).config_read(4) & 4, 0);
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..40 {
        let disk = MemDisk::new(1 << 20, false);
        let config = BlkConfig {
            queues: 2,
            ..BlkConfig::default()
        };
        let device = Blk::new(disk as _, config);
        // Every other time with packed rings.
        fuzz_one(device, !((seed & 1) << 34), &noise(seed, 6000));
    }
}
