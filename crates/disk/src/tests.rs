use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;

use pyrite_mem::GuestMemory;

use crate::conformance;
use crate::mem_disk::MemDisk;
use crate::raw::{OpenError, RawDisk};
use crate::{BlockBackend, BlockRequest, DiskError, IoBuf};

/// A file of zeroes that is gone with the test.
struct Image(std::path::PathBuf);

impl Image {
    fn new(size_bytes: u64) -> Image {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pyrite-disk-test-{}-{n}.img", std::process::id());
        let path = std::env::temp_dir().join(name);
        File::create(&path).unwrap().set_len(size_bytes).unwrap();
        Image(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn mem_disk_conforms() {
    conformance::check_all(&|size, read_only| {
        Arc::new(MemDisk::with_content(vec![0; size as usize], read_only))
    });
}

#[test]
fn raw_disk_conforms() {
    conformance::check_all(&|size, read_only| {
        // The open file outlives its name.
        let image = Image::new(size);
        Arc::new(RawDisk::open(&image.0, read_only).unwrap())
    });
}

#[test]
fn raw_disk_second_writer_is_refused() {
    let image = Image::new(4096);
    let writer = RawDisk::open(&image.0, false).unwrap();
    let error = RawDisk::open(&image.0, false).err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }));
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(matches!(
        RawDisk::open(&image.0, true),
        Err(OpenError::InUse { .. })
    ));
    drop(writer);
    let _reader = RawDisk::open(&image.0, true).unwrap();
    let _another = RawDisk::open(&image.0, true).unwrap();
    assert!(matches!(
        RawDisk::open(&image.0, false),
        Err(OpenError::InUse { .. })
    ));
}

#[test]
fn raw_disk_odd_size_is_named() {
    let image = Image::new(1000);
    let error = RawDisk::open(&image.0, false).err().unwrap().to_string();
    assert!(
        error.contains("1000 bytes") && error.contains("multiple of 512"),
        "{error}"
    );
    assert!(error.contains("1024"), "{error}");
    let empty = Image::new(0);
    assert!(matches!(
        RawDisk::open(&empty.0, false),
        Err(OpenError::Size { .. })
    ));
}

#[test]
fn raw_disk_directory_and_missing_file_are_refused() {
    assert!(matches!(
        RawDisk::open(&std::env::temp_dir(), true),
        Err(OpenError::Kind { .. } | OpenError::Open { .. })
    ));
    let missing = Path::new("/nonexistent/disk.img");
    assert!(matches!(
        RawDisk::open(missing, true),
        Err(OpenError::Open { .. })
    ));
}

#[test]
fn raw_disk_full_host_is_no_space() {
    // A character device is not a disk, but its errors are those of a full file system.
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let memory = GuestMemory::new(1 << 20).unwrap();
    let bufs = [IoBuf { gpa: 0, len: 512 }];
    let outcome = crate::io::transfer(
        &full,
        &memory,
        crate::io::Direction::Write,
        0,
        &bufs,
        crate::io::AtEnd::Error,
    );
    assert!(matches!(outcome, Err(DiskError::NoSpace)), "{outcome:?}");
}

#[test]
fn raw_disk_truncated_behind_our_back_fails_the_read() {
    let image = Image::new(4096);
    let disk = RawDisk::open(&image.0, false).unwrap();
    File::options()
        .write(true)
        .open(&image.0)
        .unwrap()
        .set_len(512)
        .unwrap();
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    let (sender, receiver) = channel();
    let bufs = vec![IoBuf { gpa: 0, len: 4096 }];
    disk.submit(
        &memory,
        BlockRequest::Read { offset: 0, bufs },
        Box::new(move |r| sender.send(r).unwrap()),
    );
    assert!(matches!(receiver.recv().unwrap(), Err(DiskError::Io(_))));
}

#[test]
fn raw_disk_drop_finishes_what_was_submitted() {
    let image = Image::new(1 << 20);
    let disk = RawDisk::open(&image.0, false).unwrap();
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    memory.write(0, &[7; 512]).unwrap();
    let (sender, receiver) = channel();
    for n in 0..200 {
        let sender = sender.clone();
        let bufs = vec![IoBuf { gpa: 0, len: 512 }];
        disk.submit(
            &memory,
            BlockRequest::Write {
                offset: n * 512,
                bufs,
                fua: false,
            },
            Box::new(move |r| sender.send(r.is_ok()).unwrap()),
        );
    }
    drop((disk, sender));
    assert_eq!(receiver.iter().filter(|ok| *ok).count(), 200);
    assert_eq!(
        std::fs::read(&image.0).unwrap()[..200 * 512],
        [7; 200 * 512]
    );
}

#[test]
fn raw_disk_many_pieces_exceed_one_system_call() {
    let image = Image::new(1 << 20);
    let disk = RawDisk::open(&image.0, false).unwrap();
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    let data: Vec<u8> = (0..4096_u32).map(|n| (n / 3) as u8).collect();
    memory.write(0x1000, &data).unwrap();
    let bufs = (0..4096)
        .map(|n| IoBuf {
            gpa: 0x1000 + n,
            len: 1,
        })
        .collect();
    let (sender, receiver) = channel();
    disk.submit(
        &memory,
        BlockRequest::Write {
            offset: 512,
            bufs,
            fua: true,
        },
        Box::new(move |r| sender.send(r).unwrap()),
    );
    receiver.recv().unwrap().unwrap();
    assert_eq!(std::fs::read(&image.0).unwrap()[512..512 + 4096], data);
}

#[test]
fn mem_disk_fails_the_chosen_request() {
    let disk = MemDisk::new(4096);
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    disk.fail_request(1, DiskError::NoSpace);
    let outcomes = Arc::new(std::sync::Mutex::new(Vec::new()));
    for _ in 0..3 {
        let outcomes = outcomes.clone();
        disk.submit(
            &memory,
            BlockRequest::Flush,
            Box::new(move |r| outcomes.lock().unwrap().push(r.is_ok())),
        );
    }
    assert_eq!(*outcomes.lock().unwrap(), [true, false, true]);
    assert_eq!(disk.flushes(), 2);
}

#[test]
fn mem_disk_held_requests_wait() {
    let disk = MemDisk::new(4096);
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    disk.hold(true);
    let (sender, receiver) = channel();
    disk.submit(
        &memory,
        BlockRequest::Flush,
        Box::new(move |r| sender.send(r).unwrap()),
    );
    assert!(receiver.try_recv().is_err());
    assert_eq!(disk.in_flight(), 1);
    disk.hold(false);
    assert!(receiver.try_recv().unwrap().is_ok());
    assert_eq!(disk.in_flight(), 0);
}
