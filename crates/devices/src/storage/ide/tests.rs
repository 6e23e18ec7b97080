use pyrite_disk::medium::Tray;
use pyrite_disk::{DiskError, MemDisk};
use pyrite_vdev::conformance::{self, Target, fuzz_device, pseudo_random};

use super::*;
use crate::storage::testing::{Interrupts, cd_medium, enable, memory, names};

const TABLE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;

/// A disk as master and a CD as slave of the first channel.
struct Rig {
    memory: Arc<GuestMemory>,
    irq: Arc<Interrupts>,
    ide: Arc<Mutex<Ide>>,
    io: Bus<dyn PioDevice>,
    disk: Arc<MemDisk>,
    tray: Arc<Tray>,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(memory(), Arc::new(MemDisk::new(1 << 20)))
    }
    fn with(memory: Arc<GuestMemory>, disk: Arc<MemDisk>) -> Rig {
        let irq = Arc::new(Interrupts::default());
        let tray = Tray::new(Some(cd_medium(100)));
        let drives = [
            [
                Some(Device::disk(disk.clone(), names("DISK"), false)),
                Some(Device::cd(tray.clone(), names("PYRITE CD"), false)),
            ],
            [None, None],
        ];
        let lines = [irq.line(), Arc::new(Interrupts::default()).line()];
        let ide = Ide::new("ide0", drives, memory.clone(), lines).unwrap();
        let io = Bus::default();
        lock(&ide).register(&io).unwrap();
        enable(&ide);
        Rig {
            memory,
            irq,
            ide,
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
    fn status(&self) -> u8 {
        self.inb(0x1f7)
    }
    /// Issues a command with a 28-bit address.
    fn issue(&self, drive: u8, command: u8, lba: u32, count: u8) {
        self.outb(0x1f6, 0xe0 | drive << 4 | (lba >> 24) as u8);
        self.outb(0x1f2, count);
        for n in 0..3 {
            self.outb(0x1f3 + n, (lba >> (8 * n)) as u8);
        }
        self.outb(0x1f7, command);
    }
    /// Reads a DRQ block word by word.
    fn take(&self, bytes: usize) -> Vec<u8> {
        assert_eq!(self.inb(0x3f6) & 0x88, 8, "DRQ");
        let mut out = vec![0; bytes];
        for w in out.chunks_mut(2) {
            self.io.read(0x1f0, w);
        }
        out
    }
    fn give(&self, data: &[u8]) {
        assert_eq!(self.inb(0x3f6) & 0x88, 8, "DRQ");
        for w in data.chunks(4) {
            self.io.write(0x1f0, w);
        }
    }
    fn packet(&self, cdb: &[u8], dma: bool, limit: u16) {
        self.outb(0x1f6, 0xf0);
        self.outb(0x1f1, u8::from(dma));
        self.outb(0x1f4, limit as u8);
        self.outb(0x1f5, (limit >> 8) as u8);
        self.outb(0x1f7, 0xa0);
        let mut packet = [0; 12];
        packet[..cdb.len()].copy_from_slice(cdb);
        self.give(&packet);
    }
    fn bm(&self, at: u64, data: &[u8]) {
        lock(&self.ide).bar_write(4, at, data);
    }
    fn bm_status(&self) -> u8 {
        let mut b = [0];
        lock(&self.ide).bar_read(4, 2, &mut b);
        b[0]
    }
    /// A PRD table, the last entry marked.
    fn table(&self, entries: &[(u32, u16)]) {
        for (n, (gpa, len)) in entries.iter().enumerate() {
            let end = u32::from(n + 1 == entries.len()) << 31;
            let e = u64::from(*gpa) | u64::from(u32::from(*len) | end) << 32;
            self.memory
                .write(TABLE + 8 * n as u64, &e.to_le_bytes())
                .unwrap();
        }
        self.bm(4, &(TABLE as u32).to_le_bytes());
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }
}

#[test]
fn drives_are_found_by_their_signatures() {
    let r = Rig::new();
    assert_eq!(lock(&r.ide).config_read(0), 0x7010_8086);
    assert_eq!(lock(&r.ide).config_read(8), 0x0101_8000);
    assert_eq!(lock(&r.ide).config_read(0x40), 0x8000_8000);
    for (drive, signature) in [(0xa0, [1, 0, 0]), (0xb0, [1, 0x14, 0xeb])] {
        r.outb(0x1f6, drive);
        assert_eq!([r.inb(0x1f3), r.inb(0x1f4), r.inb(0x1f5)], signature);
        assert_eq!(r.inb(0x1f6) & 0xb0, drive);
    }
    assert_eq!(
        (r.inb(0x177), r.inb(0x376)),
        (0, 0),
        "nobody on the second channel"
    );
    r.issue(0, 0xec, 0, 0);
    assert!(r.irq.is_up());
    assert_eq!(r.status(), 0x58);
    assert!(
        !r.irq.is_up(),
        "reading the status takes the interrupt back"
    );
    let id = r.take(512);
    assert_eq!((&id[54..56], r.status()), (&b"ID"[..], 0x50));
    assert_eq!(u16::from_le_bytes([id[186], id[187]]), 0x6001);
    r.issue(1, 0xec, 0, 0);
    assert_eq!((r.status() & 1, r.inb(0x1f5)), (1, 0xeb));
    r.issue(1, 0xa1, 0, 0);
    assert_eq!(r.take(512)[1], 0x85);
}

#[test]
fn sectors_go_through_the_data_register() {
    let r = Rig::new();
    // 300 sectors by 48-bit PIO: more than the buffer has room for.
    let data: Vec<u8> = (0..300 * 512_u32)
        .map(|n| (n / 512) as u8 ^ n as u8)
        .collect();
    r.outb(0x1f6, 0xe0);
    for (port, old, new) in [(0x1f2, 1, 44), (0x1f3, 0, 7), (0x1f4, 0, 0), (0x1f5, 0, 0)] {
        r.outb(port, old);
        r.outb(port, new);
    }
    r.outb(0x3f6, 0x80);
    assert_eq!(r.inb(0x1f2), 1, "the register that was written before");
    r.outb(0x1f7, 0x34);
    assert!(!r.irq.is_up(), "no interrupt before the first block");
    for block in data.chunks(512) {
        r.give(block);
        assert!(r.irq.is_up());
        r.status();
    }
    assert_eq!(r.status(), 0x50);
    assert_eq!(r.disk.content()[7 * 512..307 * 512], data);
    // Back, in blocks of 16 sectors.
    r.issue(0, 0xc6, 0, 16);
    assert_eq!(r.status(), 0x50);
    let mut back = Vec::new();
    for (lba, count) in [(7_u32, 200_usize), (207, 100)] {
        r.issue(0, 0xc4, lba, count as u8);
        let mut left = count * 512;
        while left > 0 {
            assert!(r.irq.is_up());
            r.status();
            let n = left.min(16 * 512);
            back.extend(r.take(n));
            left -= n;
        }
        assert!(!r.irq.is_up(), "none after the last block");
    }
    assert_eq!(back, data);
    // Flush, and errors.
    r.issue(0, 0xe7, 0, 0);
    assert_eq!((r.status(), r.disk.flushes()), (0x50, 1));
    r.disk
        .fail_request(0, DiskError::Io(std::io::ErrorKind::Other.into()));
    r.issue(0, 0x20, 9, 1);
    assert_eq!((r.status(), r.inb(0x1f1), r.inb(0x1f3)), (0x51, 0x40, 9));
    r.issue(0, 0x20, 2048, 1);
    assert_eq!((r.status(), r.inb(0x1f1)), (0x51, 0x10));
    // nIEN
    r.outb(0x3f6, 2);
    r.issue(0, 0x20, 0, 1);
    assert!(!r.irq.is_up());
    r.outb(0x3f6, 0);
    assert!(r.irq.is_up());
}

#[test]
fn the_bus_master_moves_data() {
    let r = Rig::new();
    r.memory.write(DATA, &[5; 0x20000]).unwrap();
    // Write 256 sectors: two entries of 64 KiB, whose count is 0.
    r.table(&[(DATA as u32, 0), (DATA as u32 + 0x10000, 0)]);
    r.issue(0, 0xca, 3, 0);
    assert_eq!(r.inb(0x3f6) & 0x88, 8, "waits for the bus master");
    r.bm(0, &[1]);
    assert!(r.irq.is_up());
    assert_eq!((r.status(), r.bm_status() & 7), (0x50, 4));
    r.bm(2, &[4 | 0x60]);
    assert_eq!(r.bm_status(), 0x60);
    assert_eq!(r.disk.content()[3 * 512..259 * 512], [5; 0x20000]);
    r.bm(0, &[0]);
    // Bus master first, then the command; the table is longer than the data.
    r.table(&[(DATA as u32 + 0x30000, 512), (DATA as u32 + 0x31000, 1024)]);
    r.bm(0, &[9]);
    r.issue(0, 0xc8, 3, 2);
    assert_eq!((r.status(), r.bm_status() & 7), (0x50, 5));
    r.bm(0, &[8]);
    assert_eq!(r.bm_status() & 1, 0);
    assert_eq!(r.bytes(DATA + 0x30000, 512), [5; 512]);
    assert_eq!(r.bytes(DATA + 0x31000, 512), [5; 512]);
    assert_eq!(r.bytes(DATA + 0x31200, 512), [0; 512]);
    // A table that is too short, and one outside RAM.
    r.bm(2, &[4]);
    r.table(&[(DATA as u32, 512)]);
    r.bm(0, &[9]);
    r.issue(0, 0xc8, 3, 2);
    assert_eq!((r.status(), r.bm_status() & 7), (0x51, 6));
    r.bm(0, &[8]);
    r.bm(4, &[0xff; 4]);
    r.bm(0, &[9]);
    r.issue(0, 0xc8, 3, 2);
    assert_eq!(r.status(), 0x51);
    r.bm(0, &[8]);
    // Trim.
    r.memory.fill_zero(DATA, 512).unwrap();
    r.memory
        .write(DATA, &(3_u64 | 1 << 48).to_le_bytes())
        .unwrap();
    r.table(&[(DATA as u32, 512)]);
    r.outb(0x1f1, 1);
    r.issue(0, 0x06, 0, 1);
    r.bm(0, &[1]);
    assert_eq!((r.status(), r.disk.content()[3 * 512]), (0x50, 0));
}

#[test]
fn packets_by_pio_and_dma() {
    let r = Rig::new();
    r.packet(&[0], false, 0);
    assert_eq!((r.status(), r.inb(0x1f1) >> 4), (0x51, 6), "unit attention");
    // REQUEST SENSE tells, in blocks of at most 8 bytes.
    r.packet(&[3, 0, 0, 0, 18], false, 8);
    let mut sense = Vec::new();
    for n in [8, 8, 2] {
        assert!(r.irq.is_up());
        assert_eq!((r.status(), r.inb(0x1f2), r.inb(0x1f4)), (0x58, 2, n));
        sense.extend(r.take(n.into()));
    }
    assert_eq!((r.status(), r.inb(0x1f2)), (0x50, 3));
    assert_eq!(sense[12], 0x29);
    // 70 sectors by PIO, more than a piece.
    r.packet(&[0x28, 0, 0, 0, 0, 5, 0, 0, 70, 0], false, 0x8000);
    let mut left = 70 * 2048;
    let mut all = Vec::new();
    while left > 0 {
        let n = usize::from(r.inb(0x1f4)) | usize::from(r.inb(0x1f5)) << 8;
        assert!(n > 0 && n <= 0x8000);
        all.extend(r.take(n));
        left -= n;
    }
    for (n, sector) in all.chunks(2048).enumerate() {
        assert_eq!(sector[0], 5 + n as u8);
    }
    assert_eq!(r.status(), 0x50);
    // By DMA.
    r.table(&[(DATA as u32, 4096)]);
    r.packet(&[0x28, 0, 0, 0, 0, 50, 0, 0, 2, 0], true, 0);
    r.bm(0, &[9]);
    assert_eq!((r.status(), r.inb(0x1f2), r.bm_status() & 7), (0x50, 3, 4));
    assert_eq!(
        (r.bytes(DATA, 1), r.bytes(DATA + 2048, 1)),
        (vec![50], vec![51])
    );
    r.bm(0, &[8]);
    // MODE SELECT takes parameters.
    r.packet(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, 8], false, 0xfffe);
    assert_eq!(r.inb(0x1f2), 0, "from the host");
    r.give(&[0; 8]);
    assert_eq!(r.status(), 0x50);
    // The medium goes while it is read.
    r.packet(&[0x28, 0, 0, 0, 0, 5, 0, 0, 70, 0], false, 0xfffe);
    r.tray.remove(false).unwrap();
    for _ in 0..3 {
        if r.inb(0x3f6) & 8 == 0 {
            break;
        }
        let n = usize::from(r.inb(0x1f4)) | usize::from(r.inb(0x1f5)) << 8;
        r.take(n);
    }
    assert_eq!((r.status(), r.inb(0x1f1) >> 4), (0x51, 2));
    // DEVICE RESET in the middle of a command, without an interrupt.
    r.packet(&[0x12, 0, 0, 0, 36], false, 4);
    r.status();
    r.outb(0x1f7, 8);
    assert!(!r.irq.is_up());
    assert_eq!((r.status(), r.inb(0x1f5)), (0, 0xeb));
}

#[test]
fn resets_with_a_command_in_flight_are_clean() {
    let r = Rig::new();
    r.disk.hold(true);
    r.issue(0, 0x20, 0, 4);
    assert_eq!(r.status(), 0x80);
    r.outb(0x3f6, 4);
    r.outb(0x3f6, 0);
    assert_eq!(r.status(), 0x80, "not before the back end is done");
    r.issue(0, 0xec, 0, 0);
    assert!(!lock(&r.ide).drained());
    r.disk.hold(false);
    assert_eq!((r.status(), r.inb(0x1f3)), (0x50, 1));
    assert!(!r.irq.is_up());
    r.issue(0, 0x90, 0, 0);
    assert_eq!((r.inb(0x1f1), r.irq.is_up()), (1, true));
}

#[test]
fn state_moves_in_the_middle_of_commands() {
    // What the driver has done so far, and what it does with the restored controller.
    type Step = fn(&Rig);
    let cases: [(Step, Step); 5] = [
        (
            |r| {
                r.issue(0, 0x20, 0, 2);
                r.take(100);
            },
            |r| {
                assert_eq!(r.take(412), [7; 412]);
                assert_eq!(r.take(512), [7; 512]);
            },
        ),
        (
            |r| {
                r.issue(0, 0x30, 8, 2);
                r.give(&[1; 600]);
            },
            |r| {
                r.give(&[1; 424]);
                assert_eq!(r.disk.content()[8 * 512..10 * 512], [1; 1024]);
            },
        ),
        (
            |r| {
                r.table(&[(DATA as u32, 512)]);
                r.issue(0, 0xc8, 1, 1);
            },
            |r| {
                r.bm(0, &[9]);
                assert_eq!(r.bytes(DATA, 512), [7; 512]);
            },
        ),
        (
            |r| {
                r.packet(&[0], false, 0);
                r.outb(0x1f7, 0xa0);
                r.give(&[0x12, 0, 0, 0]);
            },
            |r| {
                r.give(&[36, 0, 0, 0, 0, 0, 0, 0]);
                assert_eq!(&r.take(36)[8..14], b"PYRITE");
            },
        ),
        (
            |r| {
                r.packet(&[0], false, 0);
                r.table(&[(DATA as u32, 36)]);
                r.packet(&[0x12, 0, 0, 0, 36], true, 0);
            },
            |r| {
                r.bm(0, &[9]);
                assert_eq!(r.bytes(DATA + 8, 6), b"PYRITE");
            },
        ),
    ];
    for (before, after) in cases {
        let content = vec![7; 1 << 20];
        let r = Rig::with(memory(), Arc::new(MemDisk::with_content(content, false)));
        before(&r);
        let other = Rig::with(r.memory.clone(), r.disk.clone());
        conformance::state_moves(&mut *lock(&r.ide), &mut *lock(&other.ide));
        lock(&other.ide).start();
        assert_eq!(other.irq.is_up(), r.irq.is_up());
        after(&other);
        conformance::reset_is_idempotent(&mut *lock(&other.ide));
        let fresh = Rig::with(r.memory.clone(), r.disk.clone());
        before(&fresh);
        conformance::damaged_state_is_survived(&mut *lock(&fresh.ide), &pseudo_random(5, 3000));
    }
}

#[test]
fn hostile_programming_neither_panics_nor_hangs() {
    for seed in 0..40_u64 {
        let r = Rig::new();
        r.memory
            .write(TABLE, &pseudo_random(seed + 99, 0x4000))
            .unwrap();
        for op in pseudo_random(seed, 60_000).chunks_exact(6) {
            let port = [
                0x1f0, 0x1f0, 0x1f1, 0x1f2, 0x1f3, 0x1f4, 0x1f5, 0x1f6, 0x1f7, 0x1f7, 0x3f6,
            ][usize::from(op[1]) % 11];
            // Commands that exist, mostly.
            let commands = [
                0x20, 0x30, 0xc4, 0xc5, 0xc8, 0xca, 0xa0, 0xa0, 0x24, 0x34, 0xec, 0x06,
            ];
            let value = if port == 0x1f7 && op[2] & 7 != 0 {
                commands[usize::from(op[3]) % commands.len()]
            } else if port == 0x3f6 {
                op[3] & if op[2] & 7 == 0 { 0xff } else { 0x82 }
            } else {
                op[3]
            };
            match op[0] % 8 {
                0 => drop(r.inb(port)),
                1 => {
                    for _ in 0..64 {
                        r.io.read(0x1f0, &mut [0; 4]);
                    }
                }
                2 => {
                    for _ in 0..64 {
                        r.io.write(0x1f0, &op[2..6]);
                    }
                }
                3 => r.bm(u64::from(op[2] & 15), &[value]),
                4 => r.table(&[(DATA as u32 + u32::from(op[2]) * 256, u16::from(op[3]) * 64)]),
                _ => r.outb(port, value),
            }
        }
        let mut ide = lock(&r.ide);
        fuzz_device(Target::Pci(&mut *ide), &pseudo_random(seed, 6000), |_| {});
        assert!(ide.drained());
        let section = ide.save().unwrap();
        ide.restore(&section).unwrap();
    }
}
