use std::sync::atomic::Ordering;

use pyrite_disk::medium::Tray;
use pyrite_disk::{BlockBackend, DiskError, MemDisk};
use pyrite_vdev::conformance::{self, Target, fuzz_device, pseudo_random};

use super::*;
use crate::storage::testing::{
    Interrupts, RAM_BYTES, cd_medium, enable, enable_msi, memory, names,
};

const LIST: u64 = 0x1000;
const RECEIVED: u64 = 0x2000;
/// Command tables, 0x200 bytes each.
const TABLES: u64 = 0x4000;
const DATA: u64 = 0x10_0000;

/// A driver of port 0 (a disk) and port 1 (a CD).
struct Rig {
    memory: Arc<GuestMemory>,
    interrupts: Arc<Interrupts>,
    ahci: Arc<Mutex<Ahci>>,
    disk: Arc<MemDisk>,
    tray: Arc<Tray>,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(memory(), Arc::new(MemDisk::new(1 << 20)))
    }

    fn with(memory: Arc<GuestMemory>, disk: Arc<MemDisk>) -> Rig {
        let interrupts = Arc::new(Interrupts::default());
        let tray = Tray::new(Some(cd_medium(20)));
        let drives = vec![
            Some(Device::disk(disk.clone(), names("DISK"), true)),
            Some(Device::cd(tray.clone(), names("PYRITE CD"), true)),
        ];
        let (msi, line) = (interrupts.clone(), interrupts.line());
        let ahci = Ahci::new("ahci0", drives, memory.clone(), msi, line);
        Rig {
            memory,
            interrupts,
            ahci,
            disk,
            tray,
        }
    }

    fn up(self) -> Rig {
        enable(&self.ahci);
        lock(&self.ahci).start();
        self.write(4, 0x8000_0002);
        for port in 0..2 {
            self.port_up(port);
        }
        self
    }

    fn port_up(&self, port: u64) {
        let at = 0x100 + port * 0x80;
        self.write(at, (LIST + port * 0x400) as u32);
        self.write(at + 8, (RECEIVED + port * 0x100) as u32);
        self.write(at + 0x30, u32::MAX);
        self.write(at + 0x10, u32::MAX);
        self.write(at + 0x14, 0x7dc0_00ff);
        self.write(at + 0x18, 0x16);
        self.write(at + 0x18, 0x17);
        self.write(8, u32::MAX);
    }

    fn read(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        lock(&self.ahci).bar_read(5, at, &mut b);
        u32::from_le_bytes(b)
    }
    fn write(&self, at: u64, v: u32) {
        lock(&self.ahci).bar_write(5, at, &v.to_le_bytes());
    }

    /// Puts a command into a slot without starting it.
    fn put(&self, port: u64, slot: u64, frame: &[u8], packet: &[u8], data: &[(u64, u32)]) {
        let table = TABLES + (port * 32 + slot) * 0x200;
        let mut header = vec![5 | u8::from(!packet.is_empty()) << 5, 0];
        header.extend_from_slice(&(data.len() as u16).to_le_bytes());
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&table.to_le_bytes());
        let list = LIST + port * 0x400;
        self.memory.write(list + slot * 32, &header).unwrap();
        self.memory.write(table, frame).unwrap();
        self.memory.write(table + 0x40, packet).unwrap();
        for (n, (gpa, len)) in data.iter().enumerate() {
            let mut e = gpa.to_le_bytes().to_vec();
            e.extend_from_slice(&[0; 4]);
            e.extend_from_slice(&(len - 1).to_le_bytes());
            self.memory.write(table + 0x80 + 16 * n as u64, &e).unwrap();
        }
    }

    fn frame(command: u8, lba: u64, count: u16, features: u16) -> [u8; 20] {
        let l = lba.to_le_bytes();
        let (c, f) = (count.to_le_bytes(), features.to_le_bytes());
        [
            0x27, 0x80, command, f[0], l[0], l[1], l[2], 0x40, l[3], l[4], l[5], f[1], c[0], c[1],
            0, 0, 0, 0, 0, 0,
        ]
    }

    /// Runs a disk command in slot 3; the task file after it.
    fn ata(&self, command: u8, lba: u64, count: u16, data: &[(u64, u32)]) -> u32 {
        self.put(0, 3, &Rig::frame(command, lba, count, 0), &[], data);
        self.write(0x138, 1 << 3);
        self.read(0x120)
    }

    fn packet(&self, cdb: &[u8], data: &[(u64, u32)]) -> u32 {
        let mut packet = [0; 16];
        packet[..cdb.len()].copy_from_slice(cdb);
        self.put(1, 0, &Rig::frame(0xa0, 0, 0, 1), &packet, data);
        self.write(0x1b8, 1);
        self.read(0x1a0)
    }

    /// What a driver does after an error.
    fn recover(&self, port: u64) {
        let at = 0x100 + port * 0x80;
        self.write(at + 0x18, 0x16);
        self.write(at + 0x10, u32::MAX);
        self.write(at + 0x18, 0x17);
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }
}

#[test]
fn a_driver_finds_its_drives() {
    let r = Rig::new();
    assert_eq!(lock(&r.ahci).config_read(0), 0x2922_8086);
    assert_eq!(lock(&r.ahci).config_read(8), 0x0106_0102);
    let r = r.up();
    assert_eq!(r.read(0) & 0xff1f, 0x1f05, "32 slots, 6 ports");
    assert_eq!(r.read(0x0c), 0x3f);
    assert_eq!(
        (r.read(0x128), r.read(0x1a8), r.read(0x228)),
        (0x123, 0x123, 0)
    );
    assert_eq!((r.read(0x124), r.read(0x1a4)), (0x0000_0101, 0xeb14_0101));
    assert_eq!((r.read(0x120) & 0x88, r.read(0x220)), (0, 0x7f));
    assert_eq!(r.bytes(RECEIVED + 0x40, 3), [0x34, 0x40, 0x50]);
    // IDENTIFY comes by PIO.
    assert_eq!(r.ata(0xec, 0, 0, &[(DATA, 512)]) & 0xff, 0x50);
    assert_eq!(r.bytes(DATA, 2), [0x40, 0]);
    assert_eq!(r.bytes(RECEIVED + 0x20, 18)[15..], [0x50, 0, 2]);
    assert_eq!(
        r.bytes(LIST + 3 * 32 + 4, 4),
        512_u32.to_le_bytes(),
        "PRDBC"
    );
    assert_eq!((r.read(0x110), r.read(8), r.read(0x138)), (2, 1, 0));
    assert!(r.interrupts.is_up());
    r.write(8, 1);
    assert!(r.interrupts.is_up(), "the port still has its event");
    r.write(0x110, 2);
    r.write(8, 1);
    assert!(!r.interrupts.is_up());
}

#[test]
fn data_goes_both_ways_in_pieces() {
    let r = Rig::new().up();
    r.memory.write(DATA, &[3; 1024]).unwrap();
    let pieces = [(DATA, 100), (DATA + 100, 412), (DATA + 512, 512)];
    assert_eq!(r.ata(0x35, 5, 2, &pieces) & 0xff, 0x50);
    assert_eq!(r.disk.content()[5 * 512..7 * 512], [3; 1024]);
    assert_eq!(
        r.ata(0x25, 5, 2, &[(DATA + 0x1000, 1000), (DATA + 0x2000, 24)]),
        0x50
    );
    assert_eq!(r.bytes(DATA + 0x1000, 1000), [3; 1000]);
    assert_eq!(r.bytes(DATA + 0x2000, 24), [3; 24]);
    assert_eq!(r.ata(0xea, 0, 0, &[]), 0x50);
    assert_eq!(r.disk.flushes(), 1);
    // Too little room, and no RAM at all.
    assert_eq!(r.ata(0x25, 0, 2, &[(DATA, 1000)]), 0x0451);
    assert_ne!(r.read(0x110) & 1 << 30, 0);
    r.write(0x138, 2);
    assert_eq!(r.read(0x138) & 2, 2, "nothing starts after an error");
    r.recover(0);
    assert_eq!(r.ata(0x25, 0, 2, &[(RAM_BYTES - 512, 1024)]), 0x0451);
    r.recover(0);
    assert_eq!(r.ata(0x25, 5, 1, &[(DATA, 512)]), 0x50);
    // Trim reads its ranges from memory.
    r.memory.fill_zero(DATA, 512).unwrap();
    r.memory
        .write(DATA, &(5_u64 | 1 << 48).to_le_bytes())
        .unwrap();
    r.put(0, 3, &Rig::frame(0x06, 0, 1, 1), &[], &[(DATA, 512)]);
    r.write(0x138, 1 << 3);
    assert_eq!((r.read(0x120), r.disk.content()[5 * 512]), (0x50, 0));
}

#[test]
fn queued_commands_run_side_by_side_and_fail_with_a_log() {
    let r = Rig::new().up();
    enable_msi(&r.ahci);
    r.disk.hold(true);
    for slot in 0..4_u64 {
        let frame = Rig::frame(0x61, slot, (slot as u16) << 3, 1);
        r.put(0, slot, &frame, &[], &[(DATA + slot * 512, 512)]);
        r.memory
            .write(DATA + slot * 512, &[slot as u8 + 1; 512])
            .unwrap();
    }
    r.write(0x134, 0xf);
    r.write(0x138, 0xf);
    assert_eq!((r.read(0x138), r.read(0x134)), (0, 0xf), "all were taken");
    assert_eq!(r.disk.in_flight(), 4);
    // A command that is not queued waits.
    r.put(0, 9, &Rig::frame(0xea, 0, 0, 0), &[], &[]);
    r.write(0x138, 1 << 9);
    assert_eq!((r.disk.in_flight(), r.read(0x138)), (4, 1 << 9));
    r.disk.hold(false);
    assert_eq!((r.read(0x138), r.read(0x134)), (0, 0));
    for (n, sector) in r.disk.content().chunks(512).take(4).enumerate() {
        assert_eq!(sector, [n as u8 + 1; 512]);
    }
    assert_eq!(r.disk.flushes(), 1);
    assert_eq!(r.bytes(RECEIVED + 0x58, 1), [0xa1]);
    assert_eq!(r.read(0x110) & 9, 9, "set device bits and register frames");
    assert!(r.interrupts.messages.load(Ordering::SeqCst) > 0);
    assert!(!r.interrupts.is_up(), "messages replace the line");
    // The second of three fails.
    r.disk
        .fail_request(1, DiskError::Io(std::io::ErrorKind::Other.into()));
    for slot in 0..3_u64 {
        let frame = Rig::frame(0x60, 8 + slot, (slot as u16) << 3, 1);
        r.put(0, slot, &frame, &[], &[(DATA, 512)]);
    }
    r.write(0x134, 7);
    r.write(0x138, 7);
    assert_ne!(r.read(0x110) & 1 << 30, 0, "task file error");
    let active = r.read(0x134);
    assert_eq!(
        active.count_ones(),
        2,
        "the one that failed, and one that never ran"
    );
    r.recover(0);
    assert_eq!((r.read(0x134), r.read(0x138)), (0, 0));
    assert_eq!(r.ata(0x2f, 0x10, 1, &[(DATA, 512)]), 0x50);
    let log = r.bytes(DATA, 8);
    assert!(active >> log[0] & 1 == 1 && log[3] == 0x40, "{log:x?}");
    // A tag twice is the host's mistake.
    r.disk.hold(true);
    r.put(0, 0, &Rig::frame(0x60, 0, 0, 1), &[], &[(DATA, 512)]);
    r.write(0x138, 1);
    r.write(0x138, 1);
    assert_eq!((r.disk.in_flight(), r.read(0x110) >> 27 & 1), (1, 1));
    r.disk.hold(false);
}

#[test]
fn packets_go_to_the_cd() {
    let r = Rig::new().up();
    assert_eq!(r.packet(&[0], &[]), 0x6051, "unit attention");
    r.recover(1);
    assert_eq!(r.packet(&[0], &[]), 0x50);
    assert_eq!(
        r.packet(&[0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0], &[(DATA, 4096)]),
        0x50
    );
    assert_eq!(r.bytes(DATA, 4), [7, 0, 0, 0]);
    assert_eq!(r.bytes(DATA + 2048, 4), [8, 0, 0, 0]);
    // A reply longer than its buffer is cut.
    assert_eq!(r.packet(&[0x12, 0, 0, 0, 36, 0], &[(DATA, 16)]), 0x50);
    assert_eq!(r.bytes(LIST + 0x404, 4), [16, 0, 0, 0]);
    r.tray.remove(false).unwrap();
    assert_eq!(r.packet(&[0], &[]), 0x2051);
    r.recover(1);
    r.tray.insert(cd_medium(3), false).unwrap();
    assert_eq!(r.packet(&[0], &[]), 0x6051);
}

#[test]
fn resets_with_commands_in_flight_are_clean() {
    let r = Rig::new().up();
    r.disk.hold(true);
    r.ata(0x25, 0, 8, &[(DATA, 4096)]);
    assert_eq!(r.read(0x120) & 0x80, 0x80);
    // The port is stopped: it says that it still runs.
    r.write(0x118, 0x16);
    assert_ne!(r.read(0x118) & 1 << 15, 0);
    assert_eq!(r.read(0x138), 0);
    // A driver that does not wait gets nothing done.
    r.write(0x118, 0x17);
    r.put(0, 3, &Rig::frame(0xea, 0, 0, 0), &[], &[]);
    r.write(0x138, 1 << 3);
    assert_eq!(r.disk.flushes(), 0);
    r.disk.hold(false);
    r.write(0x118, 0x17);
    assert_eq!((r.read(0x138), r.disk.flushes()), (0, 1), "it went on");
    // COMRESET.
    r.write(0x118, 0x16);
    r.write(0x12c, 1);
    assert_eq!((r.read(0x128), r.read(0x120)), (0, 0x7f));
    r.write(0x12c, 0);
    assert_eq!((r.read(0x128), r.read(0x124)), (0x123, 0x101));
    assert_ne!(r.read(0x130) & 1 << 26, 0);
    r.port_up(0);
    // The whole controller.
    r.disk.hold(true);
    r.ata(0x25, 0, 8, &[(DATA, 4096)]);
    r.write(4, 0x8000_0001);
    assert_eq!(r.read(4), 0x8000_0001, "not yet");
    r.disk.hold(false);
    assert_eq!(r.read(4), 0x8000_0000);
    assert_eq!((r.read(0x114), r.read(0x118) & 0xc011), (0, 0));
    // A software reset by frames.
    r.write(4, 0x8000_0002);
    r.port_up(0);
    let mut frame = [0; 20];
    (frame[0], frame[15]) = (0x27, 4);
    r.put(0, 0, &frame, &[], &[]);
    frame[15] = 0;
    r.put(0, 1, &frame, &[], &[]);
    r.memory.fill_zero(RECEIVED, 0x100).unwrap();
    r.write(0x138, 1);
    r.write(0x138, 2);
    assert_eq!((r.read(0x138), r.bytes(RECEIVED + 0x40, 1)[0]), (0, 0x34));
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let r = Rig::new().up();
    lock(&r.ahci).config_write(4, &2_u16.to_le_bytes());
    r.ata(0xec, 0, 0, &[(DATA, 512)]);
    assert_eq!(r.read(0x138), 1 << 3);
    enable(&r.ahci);
    assert_eq!(r.read(0x138), 0);
}

#[test]
fn state_moves_with_commands_waiting() {
    let r = Rig::new().up();
    r.disk.hold(true);
    r.ata(0x25, 0, 8, &[(DATA, 4096)]);
    lock(&r.ahci).pause();
    assert!(!lock(&r.ahci).drained());
    assert!(lock(&r.ahci).save().is_err());
    // This one comes while paused.
    r.put(0, 4, &Rig::frame(0x35, 9, 1, 0), &[], &[(DATA, 512)]);
    r.write(0x138, 1 << 4);
    r.disk.hold(false);
    assert!(lock(&r.ahci).drained());
    assert_eq!(r.read(0x138), 1 << 4);
    r.tray.set_locked(true);
    let other = Rig::with(r.memory.clone(), r.disk.clone());
    conformance::state_moves(&mut *lock(&r.ahci), &mut *lock(&other.ahci));
    assert!(other.tray.is_locked());
    assert!(other.interrupts.is_up(), "the first command's interrupt");
    r.memory.write(DATA, &[6; 512]).unwrap();
    lock(&other.ahci).start();
    assert_eq!((other.read(0x138), r.disk.content()[9 * 512]), (0, 6));
    conformance::reset_is_idempotent(&mut *lock(&other.ahci));
    let fresh = Rig::with(r.memory.clone(), r.disk.clone());
    conformance::damaged_state_is_survived(&mut *lock(&fresh.ahci), &pseudo_random(3, 4000));
}

#[test]
fn hostile_programming_neither_panics_nor_hangs() {
    for seed in 0..40 {
        let r = Rig::new().up();
        let noise = pseudo_random(seed, 60_000);
        // Lists and tables of noise, with every other header and frame plausible.
        r.memory.write(LIST, &noise[..0x7000]).unwrap();
        for slot in 0..32_u64 {
            let at = slot as usize * 64;
            let frame = Rig::frame(
                noise[at],
                u64::from(noise[at + 1]),
                u16::from(noise[at + 2]),
                1,
            );
            let data = (
                DATA + u64::from(noise[at + 3]) * 512,
                u32::from(noise[at + 4]) * 64 + 1,
            );
            if seed & 1 == 0 {
                r.put(slot & 1, slot, &frame, &noise[at + 8..at + 24], &[data; 8]);
            }
        }
        let step = |b: u8| {
            // `between` runs without the device locked by the rig.
            let _ = b;
        };
        let mut device = lock(&r.ahci);
        for chunk in noise.chunks(600) {
            fuzz_device(Target::Pci(&mut *device), chunk, step);
            // Keep the controller alive: noise clears bus mastering and ST soon.
            device.config_write(4, &7_u16.to_le_bytes());
            for port in 0..2_u64 {
                let at = 0x100 + port * 0x80;
                device.bar_write(5, at, &((LIST + port * 0x400) as u32).to_le_bytes());
                device.bar_write(5, at + 4, &[0; 4]);
                device.bar_write(5, at + 0x2c, &[0; 4]);
                device.bar_write(5, at + 0x18, &0x16_u32.to_le_bytes());
                device.bar_write(5, at + 0x18, &0x17_u32.to_le_bytes());
                device.bar_write(5, at + 0x38, &chunk[..4]);
            }
        }
        device.pause();
        assert!(device.drained());
        let section = device.save().unwrap();
        device.restore(&section).unwrap();
    }
}
