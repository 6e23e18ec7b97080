use pyrite_disk::MemDisk;
use pyrite_vdev::conformance::{self, pseudo_random};

use super::*;
use crate::storage::testing::{Interrupts, memory};

struct Rig {
    memory: Arc<GuestMemory>,
    irq: Arc<Interrupts>,
    floppy: Arc<Mutex<Floppy>>,
    io: Bus<dyn PioDevice>,
    disk: Arc<MemDisk>,
    tray: Arc<Tray>,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(memory(), DriveKind::D1440, 1440)
    }
    fn with(memory: Arc<GuestMemory>, kind: DriveKind, kib: u64) -> Rig {
        Rig::with_disk(memory, kind, Arc::new(MemDisk::new(kib << 10)))
    }
    fn with_disk(memory: Arc<GuestMemory>, kind: DriveKind, disk: Arc<MemDisk>) -> Rig {
        let irq = Arc::new(Interrupts::default());
        let tray = Tray::new(Some(disk.clone() as Arc<dyn BlockBackend>));
        let dma = IsaDma::new(memory.clone());
        let io = Bus::default();
        IsaDma::register(&dma, &io).unwrap();
        let floppy = Floppy::new(
            "floppy0",
            [Some((kind, tray.clone())), None],
            dma,
            irq.line(),
        )
        .unwrap();
        lock(&floppy).register(&io).unwrap();
        Rig {
            memory,
            irq,
            floppy,
            io,
            disk,
            tray,
        }
    }
    fn inb(&self, port: u16) -> u8 {
        let mut b = [0];
        self.io.read(port, &mut b);
        b[0]
    }
    fn outb(&self, port: u16, v: u8) {
        self.io.write(port, &[v]);
    }
    fn command(&self, bytes: &[u8]) {
        for b in bytes {
            assert_eq!(self.inb(0x3f4) & 0xc0, 0x80, "{bytes:x?}");
            self.outb(0x3f5, *b);
        }
    }
    fn result(&self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.inb(0x3f4) & 0xf0 == 0xd0 {
            out.push(self.inb(0x3f5));
        }
        out
    }
    /// What a driver does first.
    fn up(self) -> Rig {
        self.outb(0x3f2, 0);
        assert_eq!(self.inb(0x3f4), 0);
        self.outb(0x3f2, 0x1c);
        assert!(self.irq.is_up());
        for n in 0..4 {
            self.command(&[8]);
            assert_eq!(self.result(), [0xc0 | n, 0]);
        }
        assert!(!self.irq.is_up());
        self.outb(0x3f7, 0);
        self.command(&[3, 0xaf, 2]);
        self.seek(0);
        self
    }
    fn seek(&self, cylinder: u8) {
        self.command(&[0x0f, 0, cylinder]);
        assert!(self.irq.is_up());
        self.command(&[8]);
        assert_eq!(self.result(), [0x20, cylinder]);
    }
    fn program(&self, mode: u8, gpa: u32, bytes: u16) {
        self.outb(0x0a, 6);
        self.outb(0x0c, 0);
        self.outb(0x0b, mode | 2);
        self.outb(0x04, gpa as u8);
        self.outb(0x04, (gpa >> 8) as u8);
        self.outb(0x81, (gpa >> 16) as u8);
        let count = bytes - 1;
        self.outb(0x05, count as u8);
        self.outb(0x05, (count >> 8) as u8);
        self.outb(0x0a, 2);
    }
}

const DATA: u32 = 0x2_1000;

#[test]
fn sectors_go_by_dma() {
    let r = Rig::new().up();
    r.command(&[0x10]);
    assert_eq!(r.result(), [0x90]);
    let data: Vec<u8> = (0..9 * 1024_u32).map(|n| (n / 512) as u8 + 1).collect();
    r.memory.write(DATA.into(), &data).unwrap();
    // The last two sectors of head 0 and 16 of head 1, cylinder 3.
    r.program(0x48, DATA, 9 * 1024);
    r.command(&[0xc5, 0, 3, 0, 17, 2, 18, 0x1b, 0xff]);
    assert!(r.irq.is_up());
    assert_eq!(r.result(), [4, 0, 0, 3, 1, 17, 2]);
    assert!(!r.irq.is_up());
    let at = ((3 * 2) * 18 + 16) * 512;
    assert_eq!(r.disk.content()[at..at + 9 * 1024], data);
    assert_eq!(r.disk.flushes(), 1, "there is no command to flush");
    // Three of them back.
    r.program(0x44, DATA + 0x8000, 1536);
    r.command(&[0xe6, 0, 3, 0, 18, 2, 18, 0x1b, 0xff]);
    assert_eq!(r.result(), [4, 0, 0, 3, 1, 3, 2]);
    let mut b = vec![0; 2048];
    r.memory.read(u64::from(DATA) + 0x8000, &mut b).unwrap();
    assert_eq!((b[0], b[512], b[1024], b[1535], b[1536]), (2, 3, 4, 4, 0));
    // More than the track has: no terminal count.
    r.program(0x44, DATA, 2048);
    r.command(&[0x46, 0, 0, 0, 17, 2, 18, 0x1b, 0xff]);
    assert_eq!(r.result(), [0x40, 0x80, 0, 1, 0, 1, 2]);
    // VERIFY, READ ID, SENSE DRIVE.
    r.command(&[0x56, 0, 0, 0, 1, 2, 18, 0x1b, 0]);
    assert_eq!(r.result()[..3], [0, 0, 0]);
    r.command(&[0x4a, 4]);
    assert_eq!(r.result(), [4, 0, 0, 0, 1, 1, 2]);
    r.command(&[0x04, 0]);
    assert_eq!(r.result(), [0x38]);
    // FORMAT fills the track.
    r.seek(3);
    r.program(0x48, DATA, 72);
    r.command(&[0x4d, 4, 2, 18, 0x54, 0xf6]);
    assert_eq!(r.result()[..3], [4, 0, 0]);
    let at = ((3 * 2) + 1) * 18 * 512;
    assert_eq!(r.disk.content()[at..at + 18 * 512], [0xf6; 18 * 512]);
}

#[test]
fn mistakes_are_told_in_status_registers() {
    let r = Rig::new().up();
    for (command, st1) in [
        ([0x46, 0, 80, 0, 1, 2, 18, 0x1b, 0xff], 4),
        ([0x46, 0, 0, 0, 19, 2, 18, 0x1b, 0xff], 4),
        ([0x46, 0, 0, 0, 1, 3, 18, 0x1b, 0xff], 4),
        ([0x46, 4, 0, 0, 1, 2, 18, 0x1b, 0xff], 4),
        ([0x46, 1, 0, 0, 1, 2, 18, 0x1b, 0xff], 1),
    ] {
        r.command(&command);
        let result = r.result();
        assert_eq!((result[0] & 0xc0, result[1]), (0x40, st1), "{command:x?}");
    }
    // Not even SPECIFY with a bit that it does not have.
    for op in [0x1f, 0x83] {
        r.command(&[op]);
        assert_eq!(r.result(), [0x80], "invalid");
    }
    r.command(&[8]);
    assert_eq!(r.result(), [0x80], "no interrupt is pending");
    // Drive 1 is not there.
    r.command(&[7, 1]);
    r.command(&[8]);
    assert_eq!(r.result(), [0x71, 0]);
    r.disk.fail_request(0, DiskError::NoSpace);
    r.command(&[0x46, 0, 0, 0, 1, 2, 18, 0x1b, 0xff]);
    assert_eq!(r.result()[..3], [0x40, 0x20, 0x20]);
    // Another data rate finds nothing.
    r.outb(0x3f7, 2);
    r.command(&[0x4a, 0]);
    assert_eq!(r.result()[1], 1);
    r.outb(0x3f7, 0);
    // Media come and go; the change line says so until the head is moved.
    assert_eq!(r.inb(0x3f7) & 0x80, 0);
    r.tray.remove(false).unwrap();
    assert_eq!(r.inb(0x3f7) & 0x80, 0x80);
    r.seek(1);
    assert_eq!(r.inb(0x3f7) & 0x80, 0x80, "there is no medium");
    let fixed = MemDisk::with_content(vec![3; 1440 << 10], true);
    r.tray.insert(Arc::new(fixed), false).unwrap();
    r.seek(0);
    assert_eq!(r.inb(0x3f7) & 0x80, 0);
    r.program(0x48, DATA, 512);
    r.command(&[0x45, 0, 0, 0, 1, 2, 18, 0x1b, 0xff]);
    assert_eq!(r.result()[1], 2, "write-protected");
    r.command(&[0x04, 0]);
    assert_eq!(r.result(), [0x78]);
}

#[test]
fn sectors_go_through_the_fifo() {
    let r = Rig::new().up();
    r.command(&[3, 0xaf, 3]);
    r.command(&[0x45, 0, 0, 0, 18, 2, 18, 0x1b, 0xff]);
    for _ in 0..512 {
        assert_eq!(r.inb(0x3f4), 0xb0);
        r.outb(0x3f5, 0x77);
    }
    assert_eq!(r.result(), [0, 0, 0, 1, 0, 1, 2]);
    assert_eq!(r.disk.content()[17 * 512..18 * 512], [0x77; 512]);
    r.command(&[0x46, 0, 0, 0, 18, 2, 18, 0x1b, 0xff]);
    for _ in 0..512 {
        assert_eq!((r.inb(0x3f4), r.inb(0x3f5)), (0xf0, 0x77));
    }
    assert_eq!(r.result(), [0, 0, 0, 1, 0, 1, 2]);
}

/// Every format, in every drive that reads it.
#[test]
fn formats_have_their_rates_and_geometries() {
    for kind in DriveKind::ALL {
        for g in kind.formats() {
            let r = Rig::with(memory(), kind, g.bytes() >> 10).up();
            // Only one data rate finds anything.
            for rate in 0..4 {
                r.outb(0x3f7, rate);
                r.command(&[0x4a, 0]);
                assert_eq!(r.result()[1] == 0, rate == g.rate, "{kind:?} {g:?} {rate}");
            }
            r.outb(0x3f7, g.rate);
            let (last, end) = (g.cylinders - 1, g.sectors);
            // The last sector of all.
            r.memory.write(DATA.into(), &[0x5a; 512]).unwrap();
            r.program(0x48, DATA, 512);
            r.command(&[0x45, 4, last, 1, end, 2, end, 0x1b, 0xff]);
            assert_eq!(r.result()[..3], [4, 0, 0], "{kind:?} {g:?}");
            let content = r.disk.content();
            assert_eq!(content[content.len() - 512..], [0x5a; 512]);
            assert!(content[..content.len() - 512].iter().all(|b| *b == 0));
            // None behind it, none on a longer track.
            for (c, s) in [(g.cylinders, 1), (0, end + 1)] {
                r.program(0x44, DATA, 512);
                r.command(&[0x46, 0, c, 0, s, 2, 63, 0x1b, 0xff]);
                assert_eq!(r.result()[..2], [0x40, 4], "{kind:?} {g:?} {c} {s}");
            }
            // The head is where the drive's steps have brought it.
            r.seek(10 * g.steps);
            r.command(&[0x4a, 0]);
            assert_eq!(r.result()[3], 10);
            r.program(0x48, DATA, u16::from(end) * 4);
            r.command(&[0x4d, 0, 2, end, 0x54, 0xe5]);
            assert_eq!(r.result()[..3], [0, 0, 0]);
            let (at, len) = (20 * usize::from(end) * 512, usize::from(end) * 512);
            let content = r.disk.content();
            assert!(content[at..at + len].iter().all(|b| *b == 0xe5));
            assert_eq!((content[at - 1], content[at + len]), (0, 0));
        }
    }
    // A medium that the drive cannot read is as one that was never formatted.
    let r = Rig::with(memory(), DriveKind::D1440, 2880).up();
    r.outb(0x3f7, 3);
    r.command(&[0x4a, 0]);
    assert_eq!(r.result()[..2], [0x40, 1]);
}

#[test]
fn a_track_is_formatted_through_the_fifo() {
    let r = Rig::new().up();
    r.command(&[3, 0xaf, 3]);
    r.command(&[0x4d, 0, 2, 18, 0x54, 0xe5]);
    assert!(r.irq.is_up());
    for n in 0..72 {
        assert_eq!(r.inb(0x3f4), 0xb0, "{n}");
        r.outb(0x3f5, n);
    }
    assert_eq!(r.result()[..3], [0, 0, 0]);
    assert_eq!(r.disk.content()[..18 * 512], [0xe5; 18 * 512]);
}

#[test]
fn nobody_answers_the_requests_for_data() {
    let r = Rig::new().up();
    r.outb(0x0a, 6);
    r.command(&[0x45, 0, 0, 0, 1, 2, 18, 0x1b, 0xff]);
    assert_eq!(r.result()[..2], [0x40, 0x10]);
    r.command(&[0x4d, 0, 2, 18, 0x54, 0xe5]);
    assert_eq!(r.result()[..2], [0x40, 0x10]);
    assert_eq!(r.disk.content()[..512], [0; 512]);
}

#[test]
fn resets_and_state_in_the_middle() {
    let r = Rig::new().up();
    r.disk.hold(true);
    r.program(0x44, DATA, 512);
    r.command(&[0x46, 0, 0, 0, 1, 2, 18, 0x1b, 0xff]);
    assert_eq!(r.inb(0x3f4), 0x10);
    assert!(!lock(&r.floppy).drained());
    assert!(lock(&r.floppy).save().is_err());
    r.outb(0x3f2, 0x18);
    r.outb(0x3f2, 0x1c);
    assert_eq!(r.inb(0x3f4), 0, "not before the back end is done");
    r.disk.hold(false);
    assert_eq!(r.inb(0x3f4), 0x80);
    // In the middle of a command, of data, of a result.
    for n in 0..3 {
        let r = Rig::new().up();
        match n {
            0 => r.command(&[0x46, 0, 0]),
            1 => {
                r.command(&[3, 0xaf, 3]);
                r.command(&[0x46, 0, 0, 0, 18, 2, 18, 0x1b, 0xff]);
                r.inb(0x3f5);
            }
            _ => {
                r.command(&[0x4a, 0]);
                r.inb(0x3f5);
            }
        }
        let other = Rig::with_disk(r.memory.clone(), DriveKind::D1440, r.disk.clone());
        conformance::state_moves(&mut *lock(&r.floppy), &mut *lock(&other.floppy));
        assert_eq!(
            (other.inb(0x3f4), other.irq.is_up()),
            (r.inb(0x3f4), r.irq.is_up())
        );
        if n == 2 {
            assert_eq!(other.result(), r.result());
        }
        conformance::reset_is_idempotent(&mut *lock(&other.floppy));
        conformance::damaged_state_is_survived(&mut *lock(&r.floppy), &pseudo_random(n, 3000));
    }
}

#[test]
fn hostile_programming_neither_panics_nor_hangs() {
    for seed in 0..40_u64 {
        let r = Rig::new().up();
        for op in pseudo_random(seed, 40_000).chunks_exact(4) {
            let commands = [
                0x46, 0xe6, 0x45, 0xc5, 0x4d, 0x42, 0x56, 0x0f, 0x07, 0x08, 0x03, 0x4a, 0x13, 0x0e,
            ];
            match op[0] % 8 {
                0 => drop(r.inb(0x3f0 + u16::from(op[1] & 7))),
                1 if op[2] & 7 == 0 => r.outb(0x3f0 + u16::from(op[1] & 7), op[3]),
                2 => r.outb(u16::from(op[1] & 0xf), op[3]),
                3 => r.program(0x44 | op[1] & 0xc, DATA, u16::from(op[2]) << 6 | 1),
                4 => {
                    for _ in 0..64 {
                        r.inb(0x3f5);
                    }
                }
                5 => r.outb(0x3f5, commands[usize::from(op[1]) % commands.len()]),
                _ => r.outb(0x3f5, op[1] & if op[2] & 1 == 0 { 3 } else { 0x1f }),
            }
            if op[0] == 0 {
                r.outb(0x3f2, 0x18);
                r.outb(0x3f2, 0x1c);
            }
        }
        // And the ports by themselves, in any order and size.
        let mut ports = FloppyPorts(Arc::clone(&lock(&r.floppy).shared));
        let target = conformance::Target::Pio {
            device: &mut ports,
            first: 0x3f0,
            last: 0x3f7,
        };
        conformance::fuzz_device(target, &pseudo_random(seed, 6000), |_| {});
        conformance::odd_port_accesses(&mut ports, 0x3f0, 0x3f7);
        let mut floppy = lock(&r.floppy);
        assert!(floppy.drained());
        let section = floppy.save().unwrap();
        floppy.restore(&section).unwrap();
    }
}
