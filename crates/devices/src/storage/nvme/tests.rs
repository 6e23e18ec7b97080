use std::sync::atomic::Ordering;

use pyrite_disk::MemDisk;
use pyrite_vdev::conformance::{self, Target, fuzz_device, pseudo_random};

use super::*;
use crate::storage::testing::{Interrupts, enable, memory};

const ASQ: u64 = 0x1_0000;
const ACQ: u64 = 0x2_0000;
const SQ: u64 = 0x3_0000;
const CQ: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const ENTRIES: u32 = 16;

/// A driver with an admin queue and one I/O queue.
struct Rig {
    memory: Arc<GuestMemory>,
    interrupts: Arc<Interrupts>,
    nvme: Arc<Mutex<Nvme>>,
    disk: Arc<MemDisk>,
    /// Tail of the submission queues, head of the completion queues.
    at: [(u32, u32); 2],
}

impl Rig {
    fn new() -> Rig {
        Rig::with(memory(), Arc::new(MemDisk::new(8 << 20)))
    }
    fn with(memory: Arc<GuestMemory>, disk: Arc<MemDisk>) -> Rig {
        let interrupts = Arc::new(Interrupts::default());
        let names = NvmeNames {
            model: "PYRITE NVME".into(),
            serial: "n1".into(),
            firmware: "1.0".into(),
        };
        let second: Arc<dyn BlockBackend> = Arc::new(MemDisk::with_content(vec![9; 8192], true));
        let nvme = Nvme::new(
            "nvme0",
            names,
            vec![disk.clone(), second],
            memory.clone(),
            interrupts.clone(),
            interrupts.line(),
        );
        Rig {
            memory,
            interrupts,
            nvme,
            disk,
            at: [(0, 0); 2],
        }
    }
    fn read(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        lock(&self.nvme).bar_read(0, at, &mut b);
        u32::from_le_bytes(b)
    }
    fn write(&self, at: u64, v: u32) {
        lock(&self.nvme).bar_write(0, at, &v.to_le_bytes());
    }
    fn up(mut self) -> Rig {
        enable(&self.nvme);
        lock(&self.nvme).start();
        self.enable();
        self.create_queues(1);
        self
    }
    fn enable(&mut self) {
        self.at = [(0, 0); 2];
        for at in [ACQ, CQ] {
            self.memory.fill_zero(at, 0x1000).unwrap();
        }
        self.write(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        lock(&self.nvme).bar_write(0, 0x28, &ASQ.to_le_bytes());
        lock(&self.nvme).bar_write(0, 0x30, &ACQ.to_le_bytes());
        self.write(0x14, 0x0046_0001);
        assert_eq!(self.read(0x1c), 1);
    }
    fn create_queues(&mut self, vector: u32) {
        let size = (ENTRIES - 1) << 16 | 1;
        assert_eq!(self.admin(5, 0, CQ, &[size, 3 | vector << 16]), (0, 0));
        assert_eq!(self.admin(1, 0, SQ, &[size, 1 | 1 << 16]), (0, 0));
    }
    /// Puts a command into a queue; its identifier is its place.
    fn put(&mut self, queue: usize, opcode: u8, ns: u32, prp: [u64; 2], dwords: &[u32]) -> u32 {
        let tail = self.at[queue].0;
        let mut c = [0; 64];
        c[0] = opcode;
        c[2] = tail as u8;
        c[4..8].copy_from_slice(&ns.to_le_bytes());
        c[24..32].copy_from_slice(&prp[0].to_le_bytes());
        c[32..40].copy_from_slice(&prp[1].to_le_bytes());
        for (n, d) in dwords.iter().enumerate() {
            c[40 + 4 * n..44 + 4 * n].copy_from_slice(&d.to_le_bytes());
        }
        let base = [ASQ, SQ][queue];
        self.memory.write(base + 64 * u64::from(tail), &c).unwrap();
        self.at[queue].0 = (tail + 1) % ENTRIES;
        tail
    }
    fn ring(&self, queue: usize) {
        self.write(0x1000 + 8 * queue as u64, self.at[queue].0);
    }
    /// The next completion: identifier, status, result.
    fn completion(&mut self, queue: usize) -> Option<(u16, u16, u32)> {
        let head = self.at[queue].1;
        let at = [ACQ, CQ][queue] + 16 * u64::from(head);
        let mut e = [0; 16];
        self.memory.read(at, &mut e).unwrap();
        let (id, status) = (
            u16::from_le_bytes([e[12], e[13]]),
            u16::from_le_bytes([e[14], e[15]]),
        );
        // Completions of this test's rounds: the phase is looked up in the status that is there.
        if status & 1 == 0 {
            return None;
        }
        self.memory.write(at + 14, &[0; 2]).unwrap();
        self.at[queue].1 = (head + 1) % ENTRIES;
        self.write(0x1004 + 8 * queue as u64, self.at[queue].1);
        Some((
            id,
            status >> 1,
            u32::from_le_bytes([e[0], e[1], e[2], e[3]]),
        ))
    }
    /// Rings are used once round at most, so that the phase is always 1.
    fn run(&mut self, queue: usize, op: u8, ns: u32, prp: [u64; 2], dw: &[u32]) -> (u16, u32) {
        let id = self.put(queue, op, ns, prp, dw);
        self.ring(queue);
        let (got, status, result) = self.completion(queue).expect("completed");
        assert_eq!(u32::from(got), id);
        if self.at[queue].0 == 0 {
            self.restart();
        }
        (status, result)
    }
    /// The queues begin anew, so that the phase is 1 again.
    fn restart(&mut self) {
        self.write(0x14, 0);
        assert_eq!(self.read(0x1c), 0);
        self.enable();
        self.create_queues(1);
    }
    fn admin(&mut self, op: u8, ns: u32, prp: u64, dw: &[u32]) -> (u16, u32) {
        self.run(0, op, ns, [prp, prp + 0x1000], dw)
    }
    fn io(&mut self, op: u8, prp: [u64; 2], lba: u32, dw12: u32) -> u16 {
        self.run(1, op, 1, prp, &[lba, 0, dw12]).0
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }
    fn enable_msix(&self) {
        let mut d = lock(&self.nvme);
        for n in 0..4_u64 {
            let at = 0x2000 + 16 * n;
            d.bar_write(0, at, &0xfee0_0000_u64.to_le_bytes());
            d.bar_write(0, at + 8, &n.to_le_bytes());
        }
        let mut cap = (d.config_read(0x34) & 0xff) as u16;
        while d.config_read(cap) & 0xff != 0x11 {
            cap = (d.config_read(cap) >> 8 & 0xff) as u16;
        }
        d.config_write(cap + 2, &0x8000_u16.to_le_bytes());
    }
}

#[test]
fn a_controller_says_what_it_is() {
    let mut r = Rig::new();
    assert_eq!(lock(&r.nvme).config_read(8) >> 8, 0x01_08_02);
    assert_eq!(
        (r.read(0) & 0xffff, r.read(8), r.read(0x1c)),
        (1023, 0x10400, 0)
    );
    r = r.up();
    assert_eq!(r.admin(6, 0, DATA, &[1]).0, 0);
    let id = r.bytes(DATA, 4096);
    assert_eq!(&id[4..7], b"n1 ");
    assert_eq!(&id[24..36], b"PYRITE NVME ");
    assert_eq!((id[77], id[512], id[513], id[516]), (9, 0x66, 0x44, 2));
    assert_eq!(r.admin(6, 1, DATA, &[0]).0, 0);
    let ns = r.bytes(DATA, 256);
    assert_eq!((&ns[..3], ns[130], ns[99]), (&[0, 0x40, 0][..], 9, 0));
    r.admin(6, 2, DATA, &[0]);
    assert_eq!(r.bytes(DATA + 99, 1), [1], "write protected");
    r.admin(6, 0, DATA, &[2]);
    assert_eq!(r.bytes(DATA, 12), [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(r.admin(6, 1, DATA, &[3]).0, 0);
    assert_eq!(r.bytes(DATA, 2), [1, 8]);
    assert_eq!(r.admin(6, 9, DATA, &[3]).0 & 0xff, 0x0b);
    assert_eq!(r.admin(2, 0, DATA, &[127 << 16 | 2]).0, 0);
    assert_eq!(r.bytes(DATA + 3, 1), [100]);
    assert_eq!(r.admin(2, 0, DATA, &[127 << 16 | 0x77]).0 & 0x7ff, 0x109);
    // Number of queues, write cache.
    assert_eq!(r.admin(9, 0, 0, &[7, 3 | 99 << 16]), (0, 3 | 15 << 16));
    assert_eq!(r.admin(9, 0, 0, &[6, 0]).0, 0);
    assert_eq!(r.admin(10, 0, 0, &[6]), (0, 0));
    assert_eq!(r.admin(10, 0, 0, &[6 | 1 << 8]), (0, 1), "by default");
    assert_eq!(r.admin(10, 0, 0, &[0x7f]).0 & 0xff, 2);
}

#[test]
fn blocks_are_read_and_written_by_prps() {
    let mut r = Rig::new().up();
    for n in 0..64_u64 {
        r.memory
            .write(DATA + n * 4096, &[n as u8 + 1; 4096])
            .unwrap();
    }
    // One page, a page in the middle, two pages.
    assert_eq!(r.io(1, [DATA, 0], 0, 7), 0);
    assert_eq!(r.disk.content()[..4096], [1; 4096]);
    assert_eq!(r.io(1, [DATA + 0x1800, DATA + 0x4000], 8, 7), 0);
    assert_eq!(r.disk.content()[4096..6144], [2; 2048]);
    assert_eq!(r.disk.content()[6144..8192], [5; 2048]);
    // A list: 32 pages, in reverse.
    let list: Vec<u8> = (0..31_u64)
        .rev()
        .flat_map(|n| (DATA + n * 4096).to_le_bytes())
        .collect();
    r.memory.write(0x8000, &list).unwrap();
    assert_eq!(r.io(1, [DATA + 31 * 4096, 0x8000], 16, 255 | 1 << 30), 0);
    for n in 0..32_usize {
        assert_eq!(r.disk.content()[8192 + n * 4096], 32 - n as u8);
    }
    assert_eq!(r.disk.flushes(), 1, "FUA");
    // The same read back by a list that ends in a link.
    let back = DATA + 0x10_0000;
    let link: Vec<u8> = [back + 4096, 0x9000]
        .iter()
        .flat_map(|v| u64::to_le_bytes(*v))
        .collect();
    r.memory.write(0x8ff0, &link).unwrap();
    let rest: Vec<u8> = (2..32_u64)
        .flat_map(|n| (back + n * 4096).to_le_bytes())
        .collect();
    r.memory.write(0x9000, &rest).unwrap();
    assert_eq!(r.io(2, [back, 0x8ff0], 16, 255), 0);
    assert_eq!(
        r.bytes(back, 32 * 4096),
        r.disk.content()[8192..8192 + 32 * 4096]
    );
    // Mistakes.
    assert_eq!(r.io(2, [DATA + 2, 0], 0, 0) & 0xff, 0x13);
    assert_eq!(r.io(2, [DATA, DATA + 8], 0, 15) & 0xff, 0x13);
    assert_eq!(r.io(2, [1 << 40, 0], 0, 0) & 0xff, 0x04);
    assert_eq!(r.io(2, [DATA, 1 << 40], 0, 255) & 0xff, 0x04);
    assert_eq!(r.io(2, [DATA, 0], 16384, 0) & 0xff, 0x80);
    assert_eq!(
        r.io(2, [DATA, 0x8000], 0, 0xffff) & 0xff,
        0x02,
        "more than MDTS"
    );
    assert_eq!(r.io(0x7f, [0; 2], 0, 0) & 0xff, 0x01);
    assert_eq!(r.run(1, 2, 7, [DATA, 0], &[0; 3]).0 & 0xff, 0x0b);
    assert_eq!(r.run(1, 1, 2, [DATA, 0], &[0; 3]).0 & 0xff, 0x20);
    assert_eq!(r.run(1, 2, 2, [DATA, 0], &[0; 3]).0, 0);
    assert_eq!(r.bytes(DATA, 512), [9; 512]);
    r.disk.fail_request(0, DiskError::NoSpace);
    assert_eq!(r.io(1, [DATA, 0], 0, 0) & 0x7ff, 0x81);
    r.disk
        .fail_request(0, DiskError::Io(std::io::ErrorKind::Other.into()));
    assert_eq!(r.io(2, [DATA, 0], 0, 0) & 0x7ff, 0x281);
}

#[test]
fn space_is_given_back_and_flushed() {
    let mut r = Rig::new().up();
    r.memory.write(DATA, &[7; 4096]).unwrap();
    r.io(1, [DATA, 0], 0, 7);
    assert_eq!(r.io(8, [0; 2], 1, 1), 0);
    let content = r.disk.content();
    assert_eq!(
        (content[511], content[512], content[1535], content[1536]),
        (7, 0, 0, 7)
    );
    let mut ranges = Vec::new();
    for (lba, blocks) in [(4_u64, 1_u32), (6, 2)] {
        ranges.extend([0; 4]);
        ranges.extend(blocks.to_le_bytes());
        ranges.extend(lba.to_le_bytes());
    }
    r.memory.write(DATA, &ranges).unwrap();
    assert_eq!(r.run(1, 9, 1, [DATA, 0], &[1, 4]).0, 0);
    let content = r.disk.content();
    assert_eq!(
        (content[4 * 512], content[5 * 512], content[7 * 512]),
        (0, 7, 0)
    );
    r.memory.write(DATA + 8, &u64::MAX.to_le_bytes()).unwrap();
    assert_eq!(r.run(1, 9, 1, [DATA, 0], &[1, 4]).0 & 0xff, 0x80);
    assert_eq!(r.run(1, 0, 1, [0; 2], &[]).0, 0);
    assert_eq!(r.disk.flushes(), 1);
    // A shutdown flushes.
    r.write(0x14, 0x0046_4001);
    assert_eq!((r.read(0x1c), r.disk.flushes()), (9, 2));
}

#[test]
fn queues_and_interrupts_follow_the_rules() {
    let mut r = Rig::new().up();
    let size = (ENTRIES - 1) << 16;
    for (op, dw, status) in [
        (5, [size, 3], 0x101),
        (5, [size | 1, 3], 0x101),
        (5, [2, 3], 0x102),
        (5, [5000 << 16 | 2, 3], 0x102),
        (5, [size | 2, 2], 0x002),
        (5, [size | 2, 3 | 99 << 16], 0x108),
        (1, [size | 2, 1 | 7 << 16], 0x100),
        (4, [1, 0], 0x10c),
        (4, [3, 0], 0x101),
        (0, [0, 0], 0x101),
    ] {
        assert_eq!(r.admin(op, 0, SQ, &dw).0 & 0x7ff, status, "{op} {dw:?}");
    }
    // INTx while a completion waits, unless masked.
    r.put(1, 0, 1, [0; 2], &[]);
    r.ring(1);
    assert!(r.interrupts.is_up());
    r.write(0x0c, 2);
    assert!(!r.interrupts.is_up());
    r.write(0x10, 2);
    assert!(r.interrupts.is_up());
    r.completion(1).unwrap();
    assert!(!r.interrupts.is_up());
    r.enable_msix();
    r.put(1, 0, 1, [0; 2], &[]);
    r.ring(1);
    assert_eq!(r.interrupts.messages.load(Ordering::SeqCst), 1);
    r.completion(1).unwrap();
    // Async events wait for ever, up to a limit; one is aborted.
    r.restart();
    for n in 0..5 {
        r.put(0, 12, 0, [0; 2], &[]);
        r.ring(0);
        let limit = r.completion(0).map(|c| c.1 & 0x7ff);
        assert_eq!(limit, (n == 4).then_some(0x105));
    }
    let first = 2; // after the two that made the queues
    let abort = r.put(0, 8, 0, [0; 2], &[first << 16]);
    r.ring(0);
    assert_eq!(r.completion(0).unwrap().1, 7);
    assert_eq!(r.completion(0), Some((abort as u16, 0, 0)));
    // A queue is deleted when its last command is back.
    r.disk.hold(true);
    r.put(1, 2, 1, [DATA, 0], &[0; 3]);
    r.ring(1);
    r.put(0, 0, 0, [0; 2], &[1]);
    r.ring(0);
    assert_eq!(r.completion(0), None);
    r.disk.hold(false);
    assert_eq!(r.completion(0).unwrap().1, 0);
    assert_eq!(r.completion(1).unwrap().1, 0);
    assert_eq!(r.admin(4, 0, 0, &[1]).0, 0);
}

#[test]
fn a_full_completion_queue_holds_answers_back() {
    let mut r = Rig::new().up();
    // A queue of two completions, for a queue of 16 commands.
    assert_eq!(r.admin(0, 0, 0, &[1]).0, 0);
    assert_eq!(r.admin(4, 0, 0, &[1]).0, 0);
    assert_eq!(r.admin(5, 0, CQ, &[1 << 16 | 1, 3]).0, 0);
    assert_eq!(
        r.admin(1, 0, SQ, &[(ENTRIES - 1) << 16 | 1, 1 | 1 << 16]).0,
        0
    );
    for _ in 0..5 {
        r.put(1, 0, 1, [0; 2], &[]);
    }
    r.ring(1);
    assert_eq!(r.disk.flushes(), 5);
    let seen = |r: &Rig, n: u64| r.bytes(CQ + 16 * n + 12, 3);
    assert_eq!((seen(&r, 0), seen(&r, 1)[2]), (vec![0, 0, 1], 0));
    lock(&r.nvme).pause();
    let other = Rig::with(r.memory.clone(), r.disk.clone());
    conformance::state_moves(&mut *lock(&r.nvme), &mut *lock(&other.nvme));
    lock(&other.nvme).start();
    for (head, slot, id, phase) in [(1, 1, 1, 1), (0, 0, 2, 0), (1, 1, 3, 0), (0, 0, 4, 1)] {
        other.write(0x100c, head);
        assert_eq!(seen(&other, slot), [id, 0, phase]);
    }
}

#[test]
fn resets_with_commands_in_flight_are_clean() {
    let mut r = Rig::new().up();
    r.disk.hold(true);
    r.put(1, 2, 1, [DATA, 0], &[0; 3]);
    r.ring(1);
    r.write(0x14, 0);
    assert_eq!(r.read(0x1c), 1, "not at rest yet");
    r.write(0x14, 0x0046_0001);
    assert_eq!(r.read(0x1c), 0, "not ready yet");
    r.disk.hold(false);
    assert_eq!(r.read(0x1c), 1);
    assert_eq!(r.completion(1), None);
    r.write(0x14, 0);
    assert_eq!(r.read(0x1c), 0);
    // Page sizes that there are not.
    r.write(0x14, 0x0046_0081);
    assert_eq!(r.read(0x1c), 2);
    r.write(0x14, 0);
    r.enable();
    // Queues outside memory.
    r.write(0x14, 0);
    lock(&r.nvme).bar_write(0, 0x28, &(1_u64 << 40).to_le_bytes());
    r.write(0x14, 0x0046_0001);
    r.write(0x1000, 1);
    assert_eq!(r.read(0x1c), 3, "fatal");
}

#[test]
fn state_moves_with_commands_waiting() {
    let mut r = Rig::new().up();
    r.disk.hold(true);
    r.put(1, 2, 1, [DATA, 0], &[0; 3]);
    r.ring(1);
    lock(&r.nvme).pause();
    assert!(!lock(&r.nvme).drained());
    assert!(lock(&r.nvme).save().is_err());
    r.put(1, 1, 1, [DATA + 0x1000, 0], &[4, 0, 0]);
    r.ring(1);
    r.disk.hold(false);
    r.memory.write(DATA + 0x1000, &[8; 512]).unwrap();
    let mut other = Rig::with(r.memory.clone(), r.disk.clone());
    conformance::state_moves(&mut *lock(&r.nvme), &mut *lock(&other.nvme));
    other.at = r.at;
    assert_eq!(other.completion(1), Some((0, 0, 0)));
    lock(&other.nvme).start();
    assert_eq!(other.completion(1), Some((1, 0, 0)));
    assert_eq!(r.disk.content()[4 * 512], 8);
    conformance::reset_is_idempotent(&mut *lock(&other.nvme));
    let fresh = Rig::with(r.memory.clone(), r.disk.clone()).up();
    lock(&fresh.nvme).pause();
    conformance::damaged_state_is_survived(&mut *lock(&fresh.nvme), &pseudo_random(4, 4000));
}

#[test]
fn hostile_programming_neither_panics_nor_hangs() {
    for seed in 0..40_u64 {
        let mut r = Rig::new().up();
        let noise = pseudo_random(seed, 40_000);
        for op in noise.chunks_exact(24) {
            let queue = usize::from(op[0] & 1);
            let opcode = if op[1] & 0x80 == 0 {
                op[1] & 0xf
            } else {
                op[1]
            };
            let prp = |b: &[u8]| match b[0] & 7 {
                0 => u64::from_le_bytes([b[0], b[1], b[2], b[3], b[0], b[1], b[2], b[3]]),
                _ => u64::from(b[1]) << 12 | u64::from(b[2] & 0x10) << 4,
            };
            let dw = [
                u32::from(op[10]),
                u32::from(op[11] & 3),
                u32::from(op[12]) << (op[13] & 8),
            ];
            let mut dw = dw.to_vec();
            if queue == 0 && opcode < 6 {
                dw = vec![
                    u32::from(op[14] & 3) | u32::from(op[15] & 31) << 16,
                    u32::from(op[16] & 3) | u32::from(op[17] & 3) << 16,
                ];
            }
            r.put(
                queue,
                opcode,
                u32::from(op[3] & 3),
                [prp(&op[4..]), prp(&op[7..])],
                &dw,
            );
            r.ring(queue);
            r.write(0x1004 + 8 * queue as u64, u32::from(op[18] & 15));
            if op[19] == 0 {
                fuzz_device(Target::Pci(&mut *lock(&r.nvme)), &noise[..2000], |_| {});
                enable(&r.nvme);
                r.write(0x14, 0);
                r.write(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
                lock(&r.nvme).bar_write(0, 0x28, &ASQ.to_le_bytes());
                lock(&r.nvme).bar_write(0, 0x30, &ACQ.to_le_bytes());
                r.write(0x14, 0x0046_0001);
                r.at = [(0, 0); 2];
            }
        }
        let mut d = lock(&r.nvme);
        d.pause();
        assert!(d.drained());
        let section = d.save().unwrap();
        d.restore(&section).unwrap();
    }
}
