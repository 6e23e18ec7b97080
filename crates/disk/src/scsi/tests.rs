use super::*;
use crate::MemDisk;

fn identity() -> Identity {
    Identity {
        vendor: "PYRITE".into(),
        product: "DISK".into(),
        revision: "1".into(),
        serial: "s1".into(),
    }
}

struct Rig {
    memory: Arc<GuestMemory>,
    unit: Unit,
}

impl Rig {
    fn disk(disk: &Arc<MemDisk>) -> Rig {
        Rig::of(Kind::Disk(disk.clone()))
    }
    fn of(kind: Kind) -> Rig {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let mut unit = Unit::new(kind, identity(), false);
        assert!(
            matches!(unit.plan(&[0; 6]), Plan::Fail(Sense::POWER_ON)),
            "attention once"
        );
        Rig { memory, unit }
    }
    /// Runs a command with data at 0; its outcome.
    fn run(&mut self, cdb: &[u8]) -> Outcome {
        let bufs = [IoBuf {
            gpa: 0,
            len: 1 << 16,
        }];
        let mut plan = self.unit.plan(cdb);
        if let Plan::Parameters { len, what } = plan {
            let mut data = vec![0; len as usize];
            gather(&self.memory, &bufs, &mut data).unwrap();
            plan = self.unit.parameters(what, &data);
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let done = Box::new(move |o| sender.send(o).unwrap());
        execute(plan, &self.memory, &bufs, done);
        receiver.try_recv().expect("done")
    }
    fn read(&mut self, cdb: &[u8]) -> Vec<u8> {
        let o = self.run(cdb);
        assert_eq!(o.result, Ok(()), "{cdb:x?}");
        let mut out = vec![0; o.bytes as usize];
        self.memory.read(0, &mut out).unwrap();
        out
    }
    fn fails(&mut self, cdb: &[u8]) -> Sense {
        self.run(cdb).result.expect_err("should fail")
    }
}

#[test]
fn a_disk_is_read_written_flushed_and_unmapped() {
    let disk = Arc::new(MemDisk::new(1 << 20));
    let mut r = Rig::disk(&disk);
    r.memory.write(0, &[7; 1024]).unwrap();
    assert_eq!(
        r.run(&[0x2a, 8, 0, 0, 0, 4, 0, 0, 2, 0]).bytes,
        1024,
        "WRITE (10), FUA"
    );
    assert_eq!(disk.flushes(), 1);
    assert_eq!(disk.content()[2048..3072], [7; 1024]);
    r.memory.fill_zero(0, 4096).unwrap();
    let read16 = [0x88, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0];
    assert_eq!(r.read(&read16), [7; 512]);
    assert_eq!(r.read(&[0x08, 0, 0, 3, 1, 0]), [0; 512]);
    assert_eq!(r.run(&[0x35; 1]).result, Ok(()));
    assert_eq!(disk.flushes(), 2);
    // UNMAP of blocks 4 to 5.
    let mut list = vec![0; 24];
    list[1] = 22;
    list[3] = 16;
    list[15] = 4;
    list[19] = 2;
    r.memory.write(0, &list).unwrap();
    assert_eq!(r.run(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]).result, Ok(()));
    assert_eq!(disk.content()[2048..3072], [0; 1024]);
    // Beyond the end, in every form.
    assert_eq!(
        r.fails(&[0x28, 0, 0, 0, 8, 0, 0, 0, 1, 0]),
        Sense::OUT_OF_RANGE
    );
    let far = [
        0x8a, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 2, 0, 0,
    ];
    assert_eq!(r.fails(&far), Sense::OUT_OF_RANGE);
    list[8] = 1;
    r.memory.write(0, &list).unwrap();
    assert_eq!(
        r.fails(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]),
        Sense::OUT_OF_RANGE
    );
    assert_eq!(r.fails(&[0xff]), Sense::INVALID_COMMAND);
    assert_eq!(r.read(&[0x03, 0, 0, 0, 18, 0])[12], 0x20);
    assert_eq!(r.read(&[0x03, 0, 0, 0, 18, 0])[12], 0, "told once");
}

#[test]
fn a_disk_says_what_it_is() {
    let disk = Arc::new(MemDisk::new(1 << 20));
    let mut r = Rig::disk(&disk);
    let inquiry = r.read(&[0x12, 0, 0, 0, 255, 0]);
    assert_eq!(&inquiry[8..24], b"PYRITE  DISK    ");
    assert_eq!(r.read(&[0x12, 0, 0, 0, 5, 0]).len(), 5);
    assert_eq!(r.read(&[0x12, 1, 0x80, 0, 255, 0]), b"\0\x80\0\x02s1");
    for page in r.read(&[0x12, 1, 0, 0, 255, 0])[4..].to_vec() {
        let data = r.read(&[0x12, 1, page, 0, 255, 0]);
        assert_eq!(usize::from(be16(&data, 2)), data.len() - 4, "page {page:x}");
    }
    assert_eq!(r.read(&[0x25; 1]), [0, 0, 7, 0xff, 0, 0, 2, 0]);
    let mut capacity = [0; 16];
    capacity[..2].copy_from_slice(&[0x9e, 0x10]);
    capacity[13] = 32;
    assert_eq!(be64(&r.read(&capacity), 0), 2047);
    let modes = r.read(&[0x1a, 0, 0x3f, 0, 255, 0]);
    assert_eq!(usize::from(modes[0]), modes.len() - 1);
    assert_eq!(modes[12..15], [0x08, 18, 0x04], "write cache");
    let long = r.read(&[0x5a, 8, 0x08, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(usize::from(be16(&long, 0)), long.len() - 2);
    assert_eq!(r.read(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16])[3], 8);
}

#[test]
fn failures_of_the_back_end_become_sense_data() {
    let disk = Arc::new(MemDisk::new(1 << 20));
    let mut r = Rig::disk(&disk);
    let io = || DiskError::Io(std::io::ErrorKind::Other.into());
    for (error, cdb, sense) in [
        (io(), [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], Sense::READ_ERROR),
        (io(), [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], Sense::WRITE_ERROR),
        (
            DiskError::NoSpace,
            [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0],
            Sense::SPACE_EXHAUSTED,
        ),
    ] {
        disk.fail_request(0, error);
        assert_eq!(r.fails(&cdb), sense);
    }
    let read_only = Arc::new(MemDisk::with_content(vec![0; 4096], true));
    let mut r = Rig::disk(&read_only);
    for cdb in [
        [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        [0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0],
        [0x41, 0, 0, 0, 0, 0, 0, 0, 8, 0],
    ] {
        assert_eq!(r.fails(&cdb), Sense::WRITE_PROTECTED);
    }
    assert_eq!(r.read(&[0x1a, 0, 0x08, 0, 255, 0])[2] & 0x80, 0x80);
}

fn cd(byte: u8, sectors: usize) -> Arc<dyn BlockBackend> {
    Arc::new(MemDisk::with_content(vec![byte; sectors * 2048], true))
}

const READY: [u8; 6] = [0; 6];
const EVENTS: [u8; 10] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];

#[test]
fn a_cd_is_read_and_described() {
    let tray = Tray::new(Some(cd(3, 20)));
    let mut r = Rig::of(Kind::Cd(tray));
    assert_eq!(r.read(&[0x25; 1]), [0, 0, 0, 19, 0, 0, 8, 0]);
    assert_eq!(r.read(&[0x28, 0, 0, 0, 0, 18, 0, 0, 2, 0]), [3; 4096]);
    assert_eq!(
        r.fails(&[0x28, 0, 0, 0, 0, 19, 0, 0, 2, 0]),
        Sense::OUT_OF_RANGE
    );
    let read_cd = [0xbe, 0, 0, 0, 0, 1, 0, 0, 1, 0x10, 0, 0];
    assert_eq!(r.read(&read_cd), [3; 2048]);
    let toc = r.read(&[0x43, 0, 0, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(
        toc,
        [
            0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 0, 20
        ]
    );
    let msf = r.read(&[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 255, 0]);
    assert_eq!(msf[8..], [0, 0, 2, 20]);
    for format in [1, 2] {
        let toc = r.read(&[0x43, 0, format, 0, 0, 0, 0, 0, 255, 0]);
        assert_eq!(usize::from(be16(&toc, 0)), toc.len() - 2);
    }
    let config = r.read(&[0x46, 0, 0, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(be32(&config, 0) as usize, config.len() - 4);
    assert_eq!(be16(&config, 6), 8, "CD-ROM");
    assert_eq!(r.read(&[0x46, 2, 0, 3, 0, 0, 0, 0, 255, 0]).len(), 16);
    let modes = r.read(&[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(usize::from(be16(&modes, 0)), modes.len() - 2);
    for cdb in [[0x51, 0], [0x52, 1]] {
        let mut c = [0; 10];
        c[..2].copy_from_slice(&cdb);
        c[5] = 1;
        c[8] = 255;
        let data = r.read(&c);
        assert_eq!(usize::from(be16(&data, 0)), data.len() - 2);
    }
    assert_eq!(r.fails(&[0x2a; 10]), Sense::INVALID_COMMAND, "no writing");
}

#[test]
fn media_are_changed_ejected_and_locked() {
    let tray = Tray::new(Some(cd(1, 4)));
    let mut r = Rig::of(Kind::Cd(tray.clone()));
    assert_eq!(r.run(&READY).result, Ok(()));
    // The guest locks the tray: the host can only ask, or force.
    assert_eq!(r.run(&[0x1e, 0, 0, 0, 1, 0]).result, Ok(()));
    assert!(tray.insert(cd(2, 8), false).is_err());
    assert!(tray.remove(false).is_err());
    assert_eq!(r.read(&EVENTS)[4..6], [1, 2], "eject request");
    assert_eq!(r.read(&EVENTS)[4..6], [0, 2], "told once");
    assert_eq!(
        r.fails(&[0x1b, 0, 0, 0, 2, 0]),
        Sense::REMOVAL_PREVENTED,
        "the guest's own lock"
    );
    r.run(&[0x1e, 0, 0, 0, 0, 0]);
    tray.insert(cd(2, 8), false).unwrap();
    assert_eq!(r.fails(&READY), Sense::MEDIUM_CHANGED);
    assert_eq!(r.run(&READY).result, Ok(()));
    assert_eq!(r.read(&EVENTS)[4..6], [2, 2]);
    assert_eq!(r.read(&[0x28, 0, 0, 0, 0, 7, 0, 0, 1, 0]), [2; 2048]);
    // The guest opens and closes it.
    assert_eq!(r.run(&[0x1b, 0, 0, 0, 2, 0]).result, Ok(()));
    assert_eq!(r.fails(&READY), Sense::NO_MEDIUM_TRAY_OPEN);
    assert_eq!(r.read(&EVENTS)[4..6], [3, 1]);
    assert_eq!(r.run(&[0x1b, 0, 0, 0, 3, 0]).result, Ok(()));
    assert_eq!(r.run(&READY).result, Ok(()), "it is the same medium");
    assert_eq!(r.read(&EVENTS)[4..6], [2, 2]);
    // A state with this medium is restored where there is another one.
    let saved = r.unit.save();
    let other = Tray::new(Some(cd(5, 3)));
    let mut o = Rig::of(Kind::Cd(other));
    o.unit.restore(&saved).unwrap();
    assert_eq!(o.fails(&READY), Sense::MEDIUM_CHANGED);
    let same = Tray::new(Some(cd(2, 8)));
    let mut s = Rig::of(Kind::Cd(same));
    s.unit.restore(&saved).unwrap();
    assert_eq!(s.run(&READY).result, Ok(()));
    // The host takes it out.
    tray.remove(false).unwrap();
    assert_eq!(r.fails(&READY), Sense::NO_MEDIUM_TRAY_OPEN);
    assert_eq!(r.run(&[0x1b, 0, 0, 0, 3, 0]).result, Ok(()));
    assert_eq!(r.fails(&READY), Sense::NO_MEDIUM);
}

#[test]
fn arbitrary_commands_neither_panic_nor_ask_for_absurd_amounts() {
    let mut x = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 24) as u8
    };
    for kind in 0..2 {
        let mut r = if kind == 0 {
            Rig::disk(&Arc::new(MemDisk::new(1 << 16)))
        } else {
            Rig::of(Kind::Cd(Tray::new(Some(cd(1, 9)))))
        };
        for _ in 0..40_000 {
            let mut cdb = [0; 16];
            let live = 1 + usize::from(random() % 16);
            cdb[..live].fill_with(&mut random);
            if random() & 1 == 0 {
                // Mostly small numbers.
                cdb.iter_mut().skip(1).for_each(|b| *b &= 0x13);
            }
            let len = usize::from(random() % 17);
            let o = r.run(&cdb[..len]);
            assert!(o.bytes <= 1 << 16, "{cdb:x?}");
        }
    }
}
