use std::sync::mpsc::channel;

use pyrite_disk::scsi::{execute, with_parameters};
use pyrite_disk::{DiskError, IoBuf, MemDisk};
use pyrite_vdev::conformance::pseudo_random;

use super::*;
use crate::storage::testing::{cd_medium, memory, names};

/// Runs a command with its data at 0; registers and bytes moved.
fn run(d: &mut Device, t: TaskFile, packet: &[u8]) -> (Registers, u64) {
    let memory = MEMORY.get_or_init(memory);
    let bufs = [IoBuf {
        gpa: 0,
        len: 1 << 20,
    }];
    let mut c = d.command(&t);
    if let Protocol::Packet { .. } = c.protocol {
        c.plan = d.packet(packet);
    }
    let plan = with_parameters(c.plan, memory, &bufs, |w, data| d.parameters(w, data));
    let (sender, receiver) = channel();
    execute(
        plan,
        memory,
        &bufs,
        Box::new(move |o| sender.send(o).unwrap()),
    );
    let outcome = receiver.try_recv().unwrap();
    (d.finish(&c.pending, &outcome), outcome.bytes)
}

static MEMORY: std::sync::OnceLock<Arc<pyrite_mem::GuestMemory>> = std::sync::OnceLock::new();

fn simple(command: u8) -> TaskFile {
    TaskFile {
        command,
        device: 0x40,
        ..TaskFile::default()
    }
}

fn data(n: usize) -> Vec<u8> {
    let mut b = vec![0; n];
    MEMORY.get_or_init(memory).read(0, &mut b).unwrap();
    b
}

fn put(bytes: &[u8]) {
    MEMORY.get_or_init(memory).write(0, bytes).unwrap();
}

fn word(b: &[u8], n: usize) -> u16 {
    u16::from_le_bytes([b[2 * n], b[2 * n + 1]])
}

// One test: they share memory.
#[test]
fn commands_do_what_the_standard_says() {
    disk_identifies_itself();
    sectors_are_addressed_in_three_ways();
    errors_are_told_in_registers();
    trim_and_logs();
    packets();
    arbitrary_commands();
}

fn disk_identifies_itself() {
    let disk = Arc::new(MemDisk::new(64 << 20));
    let mut d = Device::disk(disk, names("PYRITE HARDDISK"), true);
    let (r, n) = run(&mut d, simple(0xec), &[]);
    assert_eq!((r.status, n), (status::READY, 512));
    let id = data(512);
    assert_eq!(id.iter().fold(0_u8, |s, b| s.wrapping_add(*b)), 0);
    assert_eq!(&id[54..58], b"YPIR", "characters are swapped in words");
    assert_eq!(
        u32::from(word(&id, 60)) | u32::from(word(&id, 61)) << 16,
        131_072
    );
    assert_eq!(word(&id, 100), 0);
    assert_eq!(word(&id, 101), 2);
    assert_eq!(word(&id, 75), 31);
    assert_eq!(word(&id, 106), 0x6003);
    // Settings are seen.
    run(
        &mut d,
        TaskFile {
            features: 0x82,
            ..simple(0xef)
        },
        &[],
    );
    run(
        &mut d,
        TaskFile {
            features: 3,
            count: 0x22,
            ..simple(0xef)
        },
        &[],
    );
    run(&mut d, simple(0xec), &[]);
    let id = data(512);
    assert_eq!((word(&id, 85) & 0x20, word(&id, 63)), (0, 0x407));
    let (r, _) = run(
        &mut d,
        TaskFile {
            features: 0x77,
            ..simple(0xef)
        },
        &[],
    );
    assert_eq!((r.status & status::ERR, r.error), (1, error::ABRT));
    assert_eq!(d.signature().lba, 1);
    assert_eq!(run(&mut d, simple(0xe5), &[]).0.count, 0xff);
    let (r, _) = run(&mut d, simple(0xf8), &[]);
    assert_eq!(r.lba, 131_071);
}

fn sectors_are_addressed_in_three_ways() {
    let disk = Arc::new(MemDisk::new(64 << 20));
    let mut d = Device::disk(disk.clone(), names("D"), true);
    put(&[9; 1024]);
    // 48 bits, FUA.
    let write = TaskFile {
        count: 2,
        lba: 2016,
        ..simple(0x3d)
    };
    let (r, n) = run(&mut d, write, &[]);
    assert_eq!((r.status, n, r.lba), (status::READY, 1024, 2017));
    assert_eq!(disk.flushes(), 1);
    assert_eq!(disk.content()[2016 * 512..2018 * 512], [9; 1024]);
    put(&[0; 1024]);
    // 28 bits.
    let read = TaskFile {
        count: 1,
        lba: 2017,
        ..simple(0x20)
    };
    assert_eq!(run(&mut d, read, &[]).1, 512);
    assert_eq!(data(512), [9; 512]);
    put(&[0; 1024]);
    // Cylinder 2, head 0, sector 1 of 16 heads and 63 sectors.
    let read = TaskFile {
        command: 0xc8,
        count: 1,
        lba: 0x00_0201,
        ..TaskFile::default()
    };
    assert_eq!(run(&mut d, read, &[]).1, 512);
    assert_eq!(data(512), [9; 512]);
    // A count of zero is the most there is.
    assert_eq!(run(&mut d, simple(0x20), &[]).1, 256 * 512);
    // Another geometry: 8 heads, 32 sectors: block 2016 is cylinder 7, head 7, sector 1.
    run(
        &mut d,
        TaskFile {
            command: 0x91,
            count: 32,
            device: 7,
            ..TaskFile::default()
        },
        &[],
    );
    put(&[0; 1024]);
    let read = TaskFile {
        command: 0xc8,
        count: 1,
        lba: 0x00_0701,
        device: 7,
        ..TaskFile::default()
    };
    run(&mut d, read, &[]);
    assert_eq!(data(512), [9; 512]);
    let bad = TaskFile {
        lba: 0x00_0700,
        ..read
    };
    assert_eq!(run(&mut d, bad, &[]).0.error, error::IDNF);
}

fn errors_are_told_in_registers() {
    let disk = Arc::new(MemDisk::new(1 << 20));
    let mut d = Device::disk(disk.clone(), names("D"), true);
    let io = || DiskError::Io(std::io::ErrorKind::Other.into());
    let failed = status::READY | status::ERR;
    disk.fail_request(0, io());
    let (r, _) = run(
        &mut d,
        TaskFile {
            count: 1,
            lba: 7,
            ..simple(0x25)
        },
        &[],
    );
    assert_eq!((r.status, r.error, r.lba), (failed, error::UNC, 7));
    disk.fail_request(0, DiskError::NoSpace);
    let (r, _) = run(
        &mut d,
        TaskFile {
            count: 1,
            lba: 7,
            ..simple(0x35)
        },
        &[],
    );
    assert_eq!((r.status, r.error), (failed | status::DF, error::ABRT));
    let (r, n) = run(
        &mut d,
        TaskFile {
            count: 2,
            lba: 2047,
            ..simple(0x25)
        },
        &[],
    );
    assert_eq!((r.error, n), (error::IDNF, 0));
    for command in [0xa0, 0x08, 0x00, 0x5f, 0xb0] {
        assert_eq!(run(&mut d, simple(command), &[]).0.error, error::ABRT);
    }
    let ro = Arc::new(MemDisk::with_content(vec![0; 4096], true));
    let mut d = Device::disk(ro, names("D"), true);
    let (r, _) = run(
        &mut d,
        TaskFile {
            count: 1,
            ..simple(0x35)
        },
        &[],
    );
    assert_eq!(r.error, error::ABRT);
}

fn trim_and_logs() {
    let disk = Arc::new(MemDisk::with_content(vec![7; 1 << 20], false));
    let mut d = Device::disk(disk.clone(), names("D"), true);
    let mut ranges = vec![0; 512];
    ranges[..8].copy_from_slice(&(4_u64 | 2 << 48).to_le_bytes());
    ranges[8..16].copy_from_slice(&(8_u64 | 1 << 48).to_le_bytes());
    put(&ranges);
    let trim = TaskFile {
        features: 1,
        count: 1,
        ..simple(0x06)
    };
    assert_eq!(run(&mut d, trim, &[]).0.status, status::READY);
    let content = disk.content();
    assert_eq!(content[4 * 512..6 * 512], [0; 1024]);
    assert_eq!((content[8 * 512], content[9 * 512]), (0, 7));
    ranges[..8].copy_from_slice(&(2047_u64 | 2 << 48).to_le_bytes());
    put(&ranges);
    assert_eq!(run(&mut d, trim, &[]).0.error, error::IDNF);
    // The queued error log: empty, then the command that failed, once.
    let log = TaskFile {
        count: 1,
        lba: 0x10,
        ..simple(0x2f)
    };
    run(&mut d, log, &[]);
    assert_eq!(data(1), [0x80]);
    disk.fail_request(0, DiskError::NoSpace);
    let queued = TaskFile {
        features: 1,
        count: 5 << 3,
        lba: 3,
        ..simple(0x61)
    };
    assert_eq!(run(&mut d, queued, &[]).0.status & status::ERR, 1);
    run(&mut d, log, &[]);
    let page = data(512);
    assert_eq!((page[0], page[2] & 1, page[4]), (5, 1, 3));
    assert_eq!(page.iter().fold(0_u8, |s, b| s.wrapping_add(*b)), 0);
    run(&mut d, log, &[]);
    assert_eq!(data(1), [0x80]);
}

fn packets() {
    let tray = Tray::new(Some(cd_medium(30)));
    let mut d = Device::cd(tray, names("PYRITE DVD-ROM"), false);
    assert_eq!(d.signature().lba, 0xeb_14_01);
    let (r, _) = run(&mut d, simple(0xec), &[]);
    assert_eq!((r.status & 1, r.lba), (1, 0xeb_14_01));
    run(&mut d, simple(0xa1), &[]);
    assert_eq!(word(&data(512), 0), 0x85c0);
    let packet = simple(0xa0);
    let (r, _) = run(&mut d, packet, &[0; 12]);
    assert_eq!((r.status & 1, r.error >> 4), (1, 6), "unit attention first");
    let (r, n) = run(&mut d, packet, &[0x12, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((r.status, r.count, n), (status::READY, 3, 36));
    assert_eq!(&data(36)[8..32], b"PYRITE  DVD-ROM         ");
    let read = [0x28, 0, 0, 0, 0, 21, 0, 0, 2, 0, 0, 0];
    assert_eq!(run(&mut d, packet, &read).1, 4096);
    assert_eq!(data(1), [21]);
    let far = [0x28, 0, 0, 0, 0, 29, 0, 0, 2, 0, 0, 0];
    assert_eq!(run(&mut d, packet, &far).0.error, 0x54);
    run(&mut d, packet, &[3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(data(13)[12], 0x21, "REQUEST SENSE");
    // State, also of the tray, moves to a drive of the same kind only.
    let saved = d.save();
    let mut other = Device::cd(Tray::new(Some(cd_medium(30))), names("X"), false);
    other.restore(&saved).unwrap();
    assert_eq!(other.save(), saved);
    let mut disk = Device::disk(Arc::new(MemDisk::new(512)), names("D"), true);
    assert!(disk.restore(&saved).is_err());
    assert!(d.restore(&disk.save()).is_err());
}

fn arbitrary_commands() {
    for kind in 0..2 {
        let mut d = if kind == 0 {
            Device::disk(Arc::new(MemDisk::new(1 << 20)), names("D"), true)
        } else {
            Device::cd(Tray::new(Some(cd_medium(30))), names("C"), true)
        };
        for b in pseudo_random(kind, 400_000).chunks_exact(20) {
            let t = TaskFile {
                command: b[0],
                features: u16::from_le_bytes([b[1], 0]),
                count: u16::from_le_bytes([b[2], b[3] & 3]),
                lba: u64::from(b[4]) | u64::from(b[5]) << (b[6] & 31),
                device: b[7],
            };
            let (r, _) = run(&mut d, t, &b[8..20]);
            assert_eq!(r.status & (status::BSY | status::DRQ), 0);
            let saved = d.save();
            d.restore(&saved).unwrap();
        }
    }
}
