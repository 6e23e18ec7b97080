//! What every back end must do, as a test that any of them can be put through.
//!
//! The functions panic at the first difference; call them from tests.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use pyrite_mem::GuestMemory;

use crate::{BlockBackend, BlockRequest, DiskError, IoBuf};

/// Makes a disk of zeroes: size in bytes, read-only.
pub type MakeDisk<'a> = &'a dyn Fn(u64, bool) -> Arc<dyn BlockBackend>;

const SIZE: u64 = 256 << 10;
const RAM: u64 = 4 << 20;

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(RAM).expect("guest memory"))
}

fn start(
    disk: &dyn BlockBackend,
    memory: &Arc<GuestMemory>,
    request: BlockRequest,
) -> Receiver<Result<(), DiskError>> {
    let (sender, receiver) = channel();
    let done = move |outcome| sender.send(outcome).expect("the test waits for it");
    disk.submit(memory, request, Box::new(done));
    receiver
}

fn run(
    disk: &dyn BlockBackend,
    memory: &Arc<GuestMemory>,
    request: BlockRequest,
) -> Result<(), DiskError> {
    start(disk, memory, request)
        .recv()
        .expect("called exactly once")
}

/// Everything below.
pub fn check_all(make: MakeDisk<'_>) {
    check_model(make, 1);
    check_model(make, 2);
    check_parallel(make);
    check_limits(make);
    check_read_only(make);
    check_dirty_log(make);
}

struct Random(u64);

impl Random {
    /// xorshift64.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Cuts `len` bytes at the start of guest memory into pieces that are odd and not in order.
fn scatter(random: &mut Random, len: u64) -> Vec<IoBuf> {
    let mut bufs = Vec::new();
    let mut left = len;
    let mut page = 0;
    while left > 0 {
        let n = (1 + random.below(3000)).min(left);
        bufs.push(IoBuf {
            gpa: page * 8192 + random.below(4096),
            len: n as u32,
        });
        left -= n;
        page += 1;
    }
    if bufs.len() > 1 {
        bufs.reverse();
    }
    bufs
}

/// Random requests against a plain vector.
pub fn check_model(make: MakeDisk<'_>, seed: u64) {
    let disk = make(SIZE, false);
    let memory = memory();
    let mut model = vec![0_u8; SIZE as usize];
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
    assert_eq!(disk.info().size_bytes, SIZE);
    for step in 0..400 {
        let offset = random.below(SIZE / 512) * 512;
        let len = (random.below(64) * 512).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(8) {
            0..=2 => {
                let bufs = scatter(&mut random, len);
                let mut at = offset as usize;
                for buf in &bufs {
                    let data: Vec<u8> = (0..buf.len).map(|_| random.next() as u8).collect();
                    memory.write(buf.gpa, &data).expect("RAM");
                    model[at..at + data.len()].copy_from_slice(&data);
                    at += data.len();
                }
                let fua = random.below(8) == 0;
                let request = BlockRequest::Write { offset, bufs, fua };
                run(&*disk, &memory, request).expect("write");
            }
            3..=5 => {
                let bufs = scatter(&mut random, len);
                let request = BlockRequest::Read {
                    offset,
                    bufs: bufs.clone(),
                };
                run(&*disk, &memory, request).expect("read");
                let mut read = Vec::new();
                for buf in &bufs {
                    let mut data = vec![0; buf.len as usize];
                    memory.read(buf.gpa, &mut data).expect("RAM");
                    read.extend_from_slice(&data);
                }
                assert!(read == model[range], "step {step}: read {offset}+{len}");
            }
            6 => {
                let may_unmap = random.below(2) == 0;
                let request = BlockRequest::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                };
                run(&*disk, &memory, request).expect("write zeroes");
                model[range].fill(0);
            }
            _ => {
                run(&*disk, &memory, BlockRequest::Discard { offset, len }).expect("discard");
                run(&*disk, &memory, BlockRequest::Flush).expect("flush");
                // What discarded blocks read as is not promised: make it known again.
                let request = BlockRequest::WriteZeroes {
                    offset,
                    len,
                    may_unmap: false,
                };
                run(&*disk, &memory, request).expect("write zeroes");
                model[range].fill(0);
            }
        }
    }
    assert_eq!(read_all(&*disk, &memory), model);
}

fn read_all(disk: &dyn BlockBackend, memory: &Arc<GuestMemory>) -> Vec<u8> {
    let size = disk.info().size_bytes;
    let bufs = vec![IoBuf {
        gpa: 0,
        len: size as u32,
    }];
    run(disk, memory, BlockRequest::Read { offset: 0, bufs }).expect("read all");
    let mut all = vec![0; size as usize];
    memory.read(0, &mut all).expect("RAM");
    all
}

/// Many requests at once: each completes once, a flush after them succeeds, all data is there,
/// and nothing is in flight at the end.
pub fn check_parallel(make: MakeDisk<'_>) {
    let disk = make(SIZE, false);
    let memory = memory();
    let mut waiting = Vec::new();
    for n in 0..SIZE / 512 {
        let gpa = n * 512;
        memory.write(gpa, &[n as u8; 512]).expect("RAM");
        let bufs = vec![IoBuf { gpa, len: 512 }];
        let request = BlockRequest::Write {
            offset: n * 512,
            bufs,
            fua: false,
        };
        waiting.push(start(&*disk, &memory, request));
    }
    for receiver in waiting {
        receiver.recv().expect("called").expect("write");
        assert!(receiver.recv().is_err(), "called once");
    }
    run(&*disk, &memory, BlockRequest::Flush).expect("flush");
    memory.fill_zero(0, SIZE).expect("RAM");
    let all = read_all(&*disk, &memory);
    assert!(
        all.chunks(512)
            .enumerate()
            .all(|(n, c)| c.iter().all(|b| *b == n as u8))
    );
    while disk.in_flight() != 0 {
        std::thread::yield_now();
    }
}

/// Ranges, alignment and buffers that must be refused, with no effect.
pub fn check_limits(make: MakeDisk<'_>) {
    let disk = make(SIZE, false);
    let memory = memory();
    memory.write(0, &[0xaa; 4096]).expect("RAM");
    let buf = |gpa, len| vec![IoBuf { gpa, len }];
    let out_of_range = [
        (SIZE, 512),
        (SIZE - 512, 1024),
        (u64::MAX - 511, 512),
        (1, 512),
        (0, 100),
    ];
    for (offset, len) in out_of_range {
        for request in [
            BlockRequest::Read {
                offset,
                bufs: buf(0, len),
            },
            BlockRequest::Write {
                offset,
                bufs: buf(0, len),
                fua: false,
            },
            BlockRequest::Discard {
                offset,
                len: u64::from(len),
            },
            BlockRequest::WriteZeroes {
                offset,
                len: u64::from(len),
                may_unmap: true,
            },
        ] {
            let outcome = run(&*disk, &memory, request.clone());
            assert!(
                matches!(outcome, Err(DiskError::OutOfRange { .. })),
                "{request:?}: {outcome:?}"
            );
        }
    }
    let zeroes = BlockRequest::WriteZeroes {
        offset: 512,
        len: u64::MAX - 511,
        may_unmap: false,
    };
    assert!(matches!(
        run(&*disk, &memory, zeroes),
        Err(DiskError::OutOfRange { .. })
    ));
    for gpa in [RAM, RAM - 256, u64::MAX - 100] {
        let write = BlockRequest::Write {
            offset: 0,
            bufs: buf(gpa, 512),
            fua: false,
        };
        assert!(matches!(
            run(&*disk, &memory, write),
            Err(DiskError::BadBuffer)
        ));
        let read = BlockRequest::Read {
            offset: 0,
            bufs: buf(gpa, 512),
        };
        assert!(matches!(
            run(&*disk, &memory, read),
            Err(DiskError::BadBuffer)
        ));
    }
    // Nothing at the very end is a request, and so is nothing in no buffers.
    run(
        &*disk,
        &memory,
        BlockRequest::Read {
            offset: SIZE,
            bufs: vec![],
        },
    )
    .expect("empty read");
    let empty = BlockRequest::Write {
        offset: 0,
        bufs: buf(RAM, 0),
        fua: true,
    };
    run(&*disk, &memory, empty).expect("empty write");
    assert!(read_all(&*disk, &memory).iter().all(|b| *b == 0));
}

/// A read-only disk reads and flushes, and refuses the rest.
pub fn check_read_only(make: MakeDisk<'_>) {
    let disk = make(SIZE, true);
    let memory = memory();
    assert!(disk.info().read_only && !disk.info().discard);
    let bufs = vec![IoBuf { gpa: 0, len: 512 }];
    run(
        &*disk,
        &memory,
        BlockRequest::Read {
            offset: 0,
            bufs: bufs.clone(),
        },
    )
    .expect("read");
    run(&*disk, &memory, BlockRequest::Flush).expect("flush");
    for request in [
        BlockRequest::Write {
            offset: 0,
            bufs,
            fua: false,
        },
        BlockRequest::Discard {
            offset: 0,
            len: 512,
        },
        BlockRequest::WriteZeroes {
            offset: 0,
            len: 512,
            may_unmap: false,
        },
    ] {
        assert!(matches!(
            run(&*disk, &memory, request),
            Err(DiskError::ReadOnly)
        ));
    }
}

/// What a read writes into guest memory is in the dirty log.
pub fn check_dirty_log(make: MakeDisk<'_>) {
    let disk = make(SIZE, false);
    let memory = memory();
    memory.start_dirty_log();
    let bufs = vec![
        IoBuf {
            gpa: 0x3000,
            len: 512,
        },
        IoBuf {
            gpa: 0x7f00,
            len: 512,
        },
    ];
    run(&*disk, &memory, BlockRequest::Read { offset: 0, bufs }).expect("read");
    let pages = memory.take_dirty_log();
    assert_eq!(pages.first().copied(), Some(1 << 3 | 1 << 7 | 1 << 8));
}
