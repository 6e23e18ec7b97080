use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyrite_disk::medium::Tray;
use pyrite_disk::scsi::{Identity, Kind};
use pyrite_vdev::Lifecycle;

use super::*;
use crate::testing::{BUFFERS_AT, Bench, MemDisk, fuzz_one, noise};

const REQUEST: u64 = BUFFERS_AT;
const RESPONSE: u64 = BUFFERS_AT + 0x100;
const EVENTS: u64 = BUFFERS_AT + 0x200;
const DATA: u64 = BUFFERS_AT + 0x1000;

fn identity(product: &str) -> Identity {
    Identity {
        vendor: "PYRITE".into(),
        product: product.into(),
        revision: "1".into(),
        serial: "s1".into(),
    }
}

fn disk_unit(disk: &Arc<MemDisk>) -> Unit {
    Unit::new(Kind::Disk(disk.clone()), identity("HARDDISK"), false)
}

fn host(disk: &Arc<MemDisk>, tray: &Arc<Tray>) -> Scsi {
    let cd = Unit::new(Kind::Cd(tray.clone()), identity("CD-ROM"), false);
    let config = ScsiConfig {
        queues: 2,
        ..ScsiConfig::default()
    };
    Scsi::new(vec![disk_unit(disk), cd], config)
}

fn medium(size: usize) -> Arc<MemDisk> {
    MemDisk::new(size, true)
}

/// Puts a command into a request queue without a notification.
fn put(b: &mut Bench, queue: usize, lun: [u8; 8], cdb: &[u8], data: &[(u64, u32, bool)]) {
    let mut h = lun.to_vec();
    h.extend([0; 11]);
    h.extend(cdb);
    h.resize(51, 0);
    b.memory.write(REQUEST, &h).unwrap();
    b.memory.write(RESPONSE, &[0xee; 108]).unwrap();
    let mut chain = vec![(REQUEST, 51, false)];
    chain.extend(data.iter().filter(|d| !d.2));
    chain.push((RESPONSE, 108, true));
    chain.extend(data.iter().filter(|d| d.2));
    b.add(queue, &chain);
}

/// Response code, residual, sense key and code, length used.
fn outcome(b: &mut Bench, queue: usize) -> Option<(u8, u32, [u8; 2], u32)> {
    let (_, used) = b.used(queue)?;
    let r = b.bytes(RESPONSE, 108);
    let sense = match r[10] {
        0 => [0, 0],
        2 => [r[14], r[24]],
        other => panic!("status {other}"),
    };
    let left = u32::from_le_bytes([r[4], r[5], r[6], r[7]]);
    Some((r[11], left, sense, used))
}

fn run(
    b: &mut Bench,
    target: u8,
    cdb: &[u8],
    data: &[(u64, u32, bool)],
) -> (u8, u32, [u8; 2], u32) {
    put(b, 2, lun_of(target), cdb, data);
    b.kick(2);
    outcome(b, 2).expect("not answered")
}

const READY: [u8; 6] = [0; 6];

#[test]
fn disks_and_cds_take_commands() {
    let disk = MemDisk::new(1 << 20, false);
    let tray = Tray::new(Some(medium(20 * 2048)));
    let mut b = Bench::new(host(&disk, &tray));
    b.up(0);
    assert_eq!(b.config_bytes(0, 4), [2, 0, 0, 0], "request queues");
    assert_eq!(b.config_bytes(20, 8), [96, 0, 0, 0, 32, 0, 0, 0]);
    assert_eq!(run(&mut b, 0, &READY, &[]), (0, 0, [6, 0x29], 108));
    assert_eq!(run(&mut b, 0, &READY, &[]), (0, 0, [0, 0], 108));
    // A reply that is shorter than its buffer leaves a residual.
    let inquiry = run(&mut b, 0, &[0x12, 0, 0, 0, 96, 0], &[(DATA, 96, true)]);
    assert_eq!(inquiry, (0, 60, [0, 0], 108 + 36));
    assert_eq!(b.bytes(DATA + 8, 14), b"PYRITE  HARDDI");
    b.memory.write(DATA, &[7; 1024]).unwrap();
    let pieces = [(DATA, 512, false), (DATA + 512, 512, false)];
    let write = [0x2a, 0, 0, 0, 0, 4, 0, 0, 2, 0];
    assert_eq!(run(&mut b, 0, &write, &pieces), (0, 0, [0, 0], 108));
    assert_eq!(lock(&disk.bytes)[2048..3072], [7; 1024]);
    let read = [0x28, 0, 0, 0, 0, 5, 0, 0, 1, 0];
    assert_eq!(
        run(&mut b, 0, &read, &[(DATA + 0x1000, 512, true)]),
        (0, 0, [0, 0], 620)
    );
    assert_eq!(b.bytes(DATA + 0x1000, 512), [7; 512]);
    // UNMAP
    let mut list = vec![0; 24];
    (list[1], list[3], list[15], list[19]) = (22, 16, 4, 1);
    b.memory.write(DATA, &list).unwrap();
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(run(&mut b, 0, &unmap, &[(DATA, 24, false)]).2, [0, 0]);
    assert_eq!(lock(&disk.bytes)[2048], 0);
    // The CD, as the second target.
    assert_eq!(run(&mut b, 1, &READY, &[]).2, [6, 0x29]);
    let capacity = run(&mut b, 1, &[0x25; 1], &[(DATA, 8, true)]);
    assert_eq!(capacity.2, [0, 0]);
    assert_eq!(b.bytes(DATA, 8), [0, 0, 0, 19, 0, 0, 8, 0]);
    tray.remove(false).unwrap();
    assert_eq!(run(&mut b, 1, &READY, &[]).2, [2, 0x3a]);
}

#[test]
fn wrong_requests_are_told() {
    let disk = MemDisk::new(1 << 20, true);
    let tray = Tray::new(None);
    let mut b = Bench::new(host(&disk, &tray));
    b.up(0);
    run(&mut b, 0, &READY, &[]);
    assert_eq!(run(&mut b, 9, &READY, &[]).0, VIRTIO_SCSI_S_BAD_TARGET);
    let read = [0x28, 0, 0, 0, 0, 5, 0, 0, 2, 0];
    let short = run(&mut b, 0, &read, &[(DATA, 512, true)]);
    assert_eq!((short.0, short.1), (VIRTIO_SCSI_S_OVERRUN, 512));
    let write = [0x2a, 0, 0, 0, 0, 4, 0, 0, 1, 0];
    assert_eq!(run(&mut b, 0, &write, &[(DATA, 512, false)]).2, [7, 0x27]);
    let far = [0x28, 0, 0xff, 0, 0, 5, 0, 0, 1, 0];
    assert_eq!(run(&mut b, 0, &far, &[(DATA, 512, true)]).2, [5, 0x21]);
    // Another logical unit, and an address that is none.
    let mut lun = lun_of(0);
    lun[3] = 5;
    put(&mut b, 3, lun, &[0x12, 0, 0, 0, 36, 0], &[(DATA, 36, true)]);
    b.kick(3);
    assert_eq!(outcome(&mut b, 3).unwrap().2, [0, 0]);
    assert_eq!(b.bytes(DATA, 1), [0x7f]);
    put(&mut b, 3, lun, &READY, &[]);
    b.kick(3);
    assert_eq!(outcome(&mut b, 3).unwrap().2, [5, 0x25]);
    put(&mut b, 3, [9; 8], &READY, &[]);
    b.kick(3);
    assert_eq!(outcome(&mut b, 3).unwrap().0, VIRTIO_SCSI_S_BAD_TARGET);
    // No room for a response.
    b.add(2, &[(REQUEST, 51, false), (RESPONSE, 8, true)]);
    b.kick(2);
    assert_eq!(b.status() & 0x40, 0x40);
}

fn manage(b: &mut Bench, function: u32, target: u8) {
    let mut h = vec![0; 4];
    h.extend(function.to_le_bytes());
    h.extend(lun_of(target));
    h.extend([0; 8]);
    b.memory.write(REQUEST + 0x80, &h).unwrap();
    b.memory.write(RESPONSE + 0x80, &[0xee]).unwrap();
    b.add(
        0,
        &[(REQUEST + 0x80, 24, false), (RESPONSE + 0x80, 1, true)],
    );
    b.kick(0);
}

#[test]
fn task_management_waits_for_commands() {
    let disk = MemDisk::new(1 << 20, false);
    let mut b = Bench::new(host(&disk, &Tray::new(None)));
    b.up(0);
    run(&mut b, 0, &READY, &[]);
    disk.hold.store(true, Ordering::SeqCst);
    put(
        &mut b,
        2,
        lun_of(0),
        &[0x28, 0, 0, 0, 0, 5, 0, 0, 1, 0],
        &[(DATA, 512, true)],
    );
    b.kick(2);
    manage(&mut b, 6, 0);
    assert!(b.used(0).is_some());
    assert_eq!(
        b.bytes(RESPONSE + 0x80, 1),
        [VIRTIO_SCSI_S_FUNCTION_SUCCEEDED]
    );
    manage(&mut b, 5, 0);
    assert!(b.used(0).is_none(), "a command is in flight");
    disk.release();
    assert!(b.used(2).is_some() && b.used(0).is_some());
    assert_eq!(
        b.bytes(RESPONSE + 0x80, 1),
        [VIRTIO_SCSI_S_FUNCTION_SUCCEEDED]
    );
    assert_eq!(run(&mut b, 0, &READY, &[]).2, [6, 0x29], "it was reset");
    for (function, target, response) in [(6, 0, 0), (5, 7, 3), (2, 0, 11), (99, 0, 11)] {
        manage(&mut b, function, target);
        b.used(0).unwrap();
        assert_eq!(b.bytes(RESPONSE + 0x80, 1), [response]);
    }
}

#[test]
fn targets_come_and_go() {
    let disk = MemDisk::new(1 << 20, false);
    let tray = Tray::new(None);
    let scsi = host(&disk, &tray);
    let control = scsi.control();
    let mut b = Bench::new(scsi);
    b.up(u64::MAX);
    b.add(1, &[(EVENTS, 16, true)]);
    b.kick(1);
    assert!(control.plug(1, disk_unit(&disk)).is_err());
    assert!(control.unplug(5).is_err());
    control.plug(5, disk_unit(&disk)).unwrap();
    assert_eq!(b.used(1), Some((0, 16)));
    assert_eq!(
        b.bytes(EVENTS, 16),
        [1, 0, 0, 0, 1, 5, 0x40, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(run(&mut b, 5, &READY, &[]).2, [6, 0x29]);
    // Without a buffer events wait, and too many of them are missed.
    disk.hold.store(true, Ordering::SeqCst);
    put(
        &mut b,
        2,
        lun_of(5),
        &[0x28, 0, 0, 0, 0, 5, 0, 0, 1, 0],
        &[(DATA, 512, true)],
    );
    b.kick(2);
    control.unplug(5).unwrap();
    assert!(control.unplug(5).is_err());
    put(&mut b, 3, lun_of(5), &READY, &[]);
    b.kick(3);
    assert_eq!(outcome(&mut b, 3).unwrap().0, VIRTIO_SCSI_S_BAD_TARGET);
    assert!(control.plug(5, disk_unit(&disk)).is_err(), "not yet");
    disk.release();
    assert!(b.used(2).is_some());
    control.plug(5, disk_unit(&disk)).unwrap();
    for _ in 0..MAX_EVENTS {
        control.medium_changed(1);
    }
    b.add(1, &[(EVENTS, 16, true)]);
    b.kick(1);
    assert!(b.used(1).is_some());
    assert_eq!(
        b.bytes(EVENTS, 4),
        [1, 0, 0, 0x80],
        "removed, and some are missed"
    );
    assert_eq!(b.bytes(EVENTS + 12, 1), [2]);
}

#[test]
fn state_survives_and_another_set_of_targets_is_refused() {
    let disk = MemDisk::new(1 << 20, false);
    let tray = Tray::new(Some(medium(20 * 2048)));
    let mut b = Bench::new(host(&disk, &tray));
    b.up(!(1 << 34));
    run(&mut b, 1, &READY, &[]);
    run(&mut b, 1, &[0x1e, 0, 0, 0, 1, 0], &[]);
    disk.hold.store(true, Ordering::SeqCst);
    put(&mut b, 2, lun_of(0), &READY, &[]);
    b.kick(2);
    put(
        &mut b,
        2,
        lun_of(0),
        &[0x28, 0, 0, 0, 0, 5, 0, 0, 1, 0],
        &[(DATA, 512, true)],
    );
    b.kick(2);
    lock(&b.device).pause();
    assert!(!lock(&b.device).drained());
    disk.release();
    let trays = Tray::new(Some(medium(20 * 2048)));
    let mut other = Bench::with_memory(Arc::clone(&b.memory), host(&disk, &trays));
    b.save_restore_save(&other);
    assert!(trays.is_locked());
    std::mem::swap(&mut other.rings, &mut b.rings);
    other.used(2).unwrap();
    other.used(2).unwrap();
    lock(&other.device).start();
    assert_eq!(run(&mut other, 1, &READY, &[]), (0, 0, [0, 0], 108));
    let section = {
        let mut d = lock(&other.device);
        d.pause();
        d.save().unwrap()
    };
    let fewer = Bench::new(Scsi::new(vec![disk_unit(&disk)], ScsiConfig::default()));
    assert!(lock(&fewer.device).restore(&section).is_err());
    let swapped = Scsi::new(
        vec![
            Unit::new(Kind::Cd(trays.clone()), identity("CD"), false),
            disk_unit(&disk),
        ],
        ScsiConfig {
            queues: 2,
            ..ScsiConfig::default()
        },
    );
    let swapped = Bench::new(swapped);
    assert!(lock(&swapped.device).restore(&section).is_err());
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..40 {
        let disk = MemDisk::new(1 << 20, false);
        let tray = Tray::new(Some(medium(20 * 2048)));
        fuzz_one(host(&disk, &tray), !((seed & 1) << 34), &noise(seed, 6000));
    }
}
