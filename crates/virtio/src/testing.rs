//! A driver, back ends and interrupt sinks for tests.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pyrite_disk::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo, IoBuf};
use pyrite_mem::GuestMemory;
use pyrite_net::{FrameSink, NetBackend, Offload};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{IrqLine, IrqSink, Lifecycle, MsiMessage, MsiSink, PciFunction};

use crate::device::VirtioDevice;
use crate::spec::*;
use crate::transport::pci::VirtioPciDevice;

pub(crate) const RAM_BYTES: u64 = 4 << 20;
const RINGS_AT: u64 = 0x10_0000;
const RING_SPACE: u64 = 0x8000;
/// Where tests put buffers.
pub(crate) const BUFFERS_AT: u64 = 0x20_0000;

#[derive(Default)]
pub(crate) struct Msis(pub(crate) Mutex<Vec<MsiMessage>>);

impl MsiSink for Msis {
    fn send(&self, msi: MsiMessage) {
        lock(&self.0).push(msi);
    }
}

#[derive(Default)]
pub(crate) struct Line(pub(crate) AtomicBool);

impl IrqSink for Line {
    fn set_level(&self, _gsi: u32, level: bool) {
        self.0.store(level, Ordering::SeqCst);
    }
}

/// The driver's side of a split ring.
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next_desc: u16,
    pub(crate) avail_idx: u16,
    pub(crate) used_idx: u16,
}

/// One machine with one device, and its driver.
pub(crate) struct Bench {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) device: Arc<Mutex<VirtioPciDevice>>,
    pub(crate) msis: Arc<Msis>,
    pub(crate) line: Arc<Line>,
    pub(crate) rings: Vec<Ring>,
    queues: usize,
}

impl Bench {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Bench {
        Bench::with_memory(Arc::new(GuestMemory::new(RAM_BYTES).unwrap()), device)
    }

    pub(crate) fn with_memory(
        memory: Arc<GuestMemory>,
        device: impl VirtioDevice + 'static,
    ) -> Bench {
        let msis = Arc::new(Msis::default());
        let line = Arc::new(Line::default());
        let queues = device.queue_sizes().len();
        let device = VirtioPciDevice::new(
            "unit0",
            Box::new(device),
            Arc::clone(&memory),
            Arc::clone(&msis) as Arc<dyn MsiSink>,
            IrqLine::new(Arc::clone(&line) as Arc<dyn IrqSink>, 16),
        );
        Bench {
            memory,
            device,
            msis,
            line,
            rings: Vec::new(),
            queues,
        }
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.device).bar_write(0, offset, data);
    }
    pub(crate) fn read_u8(&self, offset: u64) -> u8 {
        let mut b = [0];
        lock(&self.device).bar_read(0, offset, &mut b);
        b[0]
    }
    pub(crate) fn read_u16(&self, offset: u64) -> u16 {
        let mut b = [0; 2];
        lock(&self.device).bar_read(0, offset, &mut b);
        u16::from_le_bytes(b)
    }
    pub(crate) fn read_u32(&self, offset: u64) -> u32 {
        let mut b = [0; 4];
        lock(&self.device).bar_read(0, offset, &mut b);
        u32::from_le_bytes(b)
    }
    pub(crate) fn config_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        lock(&self.device).bar_read(0, 0x2000 + offset, &mut b);
        b
    }
    pub(crate) fn status(&self) -> u8 {
        self.read_u8(20)
    }
    pub(crate) fn set_status(&self, s: u8) {
        self.write(20, &[s]);
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(0, &0_u32.to_le_bytes());
        let low = self.read_u32(4);
        self.write(0, &1_u32.to_le_bytes());
        u64::from(low) | u64::from(self.read_u32(4)) << 32
    }

    /// Bus mastering and memory decoding on.
    pub(crate) fn enable_pci(&self) {
        lock(&self.device).config_write(4, &6_u16.to_le_bytes());
    }

    /// Goes through the status machine with `features` of those offered, and starts the device.
    pub(crate) fn up(&mut self, features: u64) {
        self.enable_pci();
        lock(&self.device).start();
        self.negotiate(features);
        self.set_status(15);
        assert_eq!(self.status(), 15);
    }

    /// Up to FEATURES_OK, with all queues enabled.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.set_status(1);
        self.set_status(3);
        let f = self.offered() & (features | 1 << VIRTIO_F_VERSION_1);
        for half in 0..2_u32 {
            self.write(8, &half.to_le_bytes());
            self.write(12, &((f >> (32 * half)) as u32).to_le_bytes());
        }
        self.set_status(11);
        assert_eq!(self.status(), 11, "features refused");
        self.rings.clear();
        assert_eq!(usize::from(self.read_u16(18)), self.queues);
        for n in 0..self.queues {
            self.enable_queue(n as u16, 64);
        }
    }

    fn enable_queue(&mut self, index: u16, size: u16) {
        let desc = RINGS_AT + u64::from(index) * RING_SPACE;
        let (avail, used) = (desc + 0x4000, desc + 0x5000);
        self.memory.fill_zero(desc, RING_SPACE).unwrap();
        self.write(22, &index.to_le_bytes());
        let size = size.min(self.read_u16(24));
        self.write(24, &size.to_le_bytes());
        self.write(26, &index.to_le_bytes());
        for (at, v) in [(32, desc), (40, avail), (48, used)] {
            self.write(at, &(v as u32).to_le_bytes());
            self.write(at + 4, &((v >> 32) as u32).to_le_bytes());
        }
        self.write(28, &1_u16.to_le_bytes());
        self.rings.push(Ring {
            size,
            desc,
            avail,
            used,
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
        });
    }

    /// Enables MSI-X: vector n sends data n.
    pub(crate) fn enable_msix(&self, vectors: u16) {
        let mut d = lock(&self.device);
        for n in 0..vectors {
            let at = 0x4000 + 16 * u64::from(n);
            d.bar_write(0, at, &0xfee0_0000_u32.to_le_bytes());
            d.bar_write(0, at + 4, &0_u32.to_le_bytes());
            d.bar_write(0, at + 8, &u32::from(n).to_le_bytes());
            d.bar_write(0, at + 12, &0_u32.to_le_bytes());
        }
        let mut cap = (d.config_read(0x34) & 0xff) as u16;
        while d.config_read(cap) & 0xff != 0x11 {
            cap = (d.config_read(cap) >> 8 & 0xff) as u16;
            assert_ne!(cap, 0);
        }
        d.config_write(cap + 2, &0x8000_u16.to_le_bytes());
    }

    pub(crate) fn put_descriptor(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut b = addr.to_le_bytes().to_vec();
        b.extend_from_slice(&len.to_le_bytes());
        b.extend_from_slice(&flags.to_le_bytes());
        b.extend_from_slice(&next.to_le_bytes());
        self.memory.write(at, &b).unwrap();
    }

    /// Makes a chain of (address, length, device-writable) available; returns its head.
    pub(crate) fn add(&mut self, queue: usize, chain: &[(u64, u32, bool)]) -> u16 {
        let (desc, size, mut at) = {
            let r = &self.rings[queue];
            (r.desc, r.size, r.next_desc)
        };
        let head = at;
        for (n, &(addr, len, writable)) in chain.iter().enumerate() {
            let next = (at + 1) % size;
            let more = n + 1 < chain.len();
            let flags = u16::from(more) | u16::from(writable) << 1;
            self.put_descriptor(desc + 16 * u64::from(at), addr, len, flags, next);
            at = next;
        }
        self.rings[queue].next_desc = at;
        self.publish(queue, head);
        head
    }

    /// Puts a head into the available ring.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let r = &mut self.rings[queue];
        let slot = u64::from(r.avail_idx % r.size);
        self.memory
            .write(r.avail + 4 + 2 * slot, &head.to_le_bytes())
            .unwrap();
        r.avail_idx = r.avail_idx.wrapping_add(1);
        self.memory
            .store_u16(r.avail + 2, r.avail_idx, Ordering::Release)
            .unwrap();
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, &(queue as u16).to_le_bytes());
    }

    /// The next used element, if there is one: head and length.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let r = &mut self.rings[queue];
        if self.memory.load_u16(r.used + 2, Ordering::Acquire).unwrap() == r.used_idx {
            return None;
        }
        let at = r.used + 4 + 8 * u64::from(r.used_idx % r.size);
        r.used_idx = r.used_idx.wrapping_add(1);
        let head = self.memory.read_u32(at).unwrap() as u16;
        Some((head, self.memory.read_u32(at + 4).unwrap()))
    }

    /// Waits for another thread to use a buffer.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let start = std::time::Instant::now();
        loop {
            if let Some(u) = self.used(queue) {
                return u;
            }
            assert!(
                start.elapsed().as_secs() < 20,
                "no used buffer in queue {queue}"
            );
            std::thread::yield_now();
        }
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read(at, &mut b).unwrap();
        b
    }

    /// Pauses, drains, saves; restores into `other` and saves again: must be equal.
    pub(crate) fn save_restore_save(&self, other: &Bench) {
        let first = {
            let mut d = lock(&self.device);
            d.pause();
            while !d.drained() {
                std::thread::yield_now();
            }
            d.save().unwrap()
        };
        let mut d = lock(&other.device);
        d.restore(&first).unwrap();
        assert_eq!(d.save().unwrap(), first);
    }
}

/// A disk in memory. While `hold` is set, requests wait for [`MemDisk::release`].
pub(crate) struct MemDisk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) read_only: bool,
    pub(crate) hold: AtomicBool,
    held: Mutex<Vec<(Arc<GuestMemory>, BlockRequest, Completion)>>,
    pub(crate) log: Mutex<Vec<String>>,
    busy: AtomicUsize,
}

impl MemDisk {
    pub(crate) fn new(size: usize, read_only: bool) -> Arc<MemDisk> {
        Arc::new(MemDisk {
            bytes: Mutex::new(vec![0; size]),
            read_only,
            hold: AtomicBool::new(false),
            held: Mutex::new(Vec::new()),
            log: Mutex::new(Vec::new()),
            busy: AtomicUsize::new(0),
        })
    }

    pub(crate) fn release(&self) {
        self.hold.store(false, Ordering::SeqCst);
        for (memory, request, done) in std::mem::take(&mut *lock(&self.held)) {
            self.busy.fetch_sub(1, Ordering::SeqCst);
            done(self.execute(&memory, &request));
        }
    }

    fn execute(&self, memory: &GuestMemory, request: &BlockRequest) -> Result<(), DiskError> {
        let mut bytes = lock(&self.bytes);
        let size = bytes.len() as u64;
        let range = |offset: u64, len: u64| {
            let end = offset.checked_add(len).filter(|e| *e <= size);
            match end {
                Some(e) if offset.is_multiple_of(512) && len.is_multiple_of(512) => {
                    Ok((offset as usize, e as usize))
                }
                _ => Err(DiskError::OutOfRange { offset, len }),
            }
        };
        let total = |bufs: &[IoBuf]| bufs.iter().map(|b| u64::from(b.len)).sum::<u64>();
        match request {
            BlockRequest::Read { offset, bufs } => {
                let (mut at, _) = range(*offset, total(bufs))?;
                for b in bufs {
                    let end = at + b.len as usize;
                    memory
                        .write(b.gpa, &bytes[at..end])
                        .map_err(|_| DiskError::BadBuffer)?;
                    at = end;
                }
            }
            BlockRequest::Write { offset, bufs, .. } => {
                let (mut at, _) = range(*offset, total(bufs))?;
                for b in bufs {
                    let end = at + b.len as usize;
                    memory
                        .read(b.gpa, &mut bytes[at..end])
                        .map_err(|_| DiskError::BadBuffer)?;
                    at = end;
                }
            }
            BlockRequest::Flush => {}
            BlockRequest::Discard { offset, len }
            | BlockRequest::WriteZeroes { offset, len, .. } => {
                let (start, end) = range(*offset, *len)?;
                bytes[start..end].fill(0);
            }
        }
        Ok(())
    }
}

impl BlockBackend for MemDisk {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size_bytes: lock(&self.bytes).len() as u64,
            block_bytes: 512,
            read_only: self.read_only,
            discard: true,
        }
    }
    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        lock(&self.log).push(format!("{request:?}"));
        if self.hold.load(Ordering::SeqCst) {
            self.busy.fetch_add(1, Ordering::SeqCst);
            lock(&self.held).push((Arc::clone(memory), request, done));
        } else {
            done(self.execute(memory, &request));
        }
    }
    fn in_flight(&self) -> usize {
        self.busy.load(Ordering::SeqCst)
    }
}

/// A cable whose other end is the card itself; frames that it does not take wait.
#[derive(Default)]
pub(crate) struct LoopbackNet {
    sink: Mutex<Option<Arc<dyn FrameSink>>>,
    pub(crate) waiting: Mutex<Vec<Vec<u8>>>,
    pub(crate) sent: AtomicUsize,
    pub(crate) paused: AtomicBool,
}

impl LoopbackNet {
    pub(crate) fn deliver(&self, frame: &[u8]) -> bool {
        let sink = lock(&self.sink).clone().unwrap();
        sink.receive(frame)
    }
    pub(crate) fn ready(&self) -> bool {
        let sink = lock(&self.sink).clone().unwrap();
        sink.ready()
    }
}

impl NetBackend for LoopbackNet {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        *lock(&self.sink) = Some(sink);
    }
    fn transmit(&self, frame: &[u8]) {
        self.transmit_offloaded(frame, &Offload::NONE);
    }
    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        let sink = lock(&self.sink).clone().unwrap();
        if !sink.receive_offloaded(frame, offload) {
            lock(&self.waiting).push(frame.to_vec());
        }
    }
    fn receive_ready(&self) {
        let frames = std::mem::take(&mut *lock(&self.waiting));
        for f in frames {
            if !self.deliver(&f) {
                lock(&self.waiting).push(f);
            }
        }
    }
    fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }
}

/// Feeds bytes to a device as a hostile driver: register accesses, ring contents, notifications.
pub(crate) fn fuzz_one(device: impl VirtioDevice + 'static, features: u64, input: &[u8]) {
    let mut b = Bench::new(device);
    b.up(features);
    let queues = b.rings.len();
    let mut rest = input;
    while let Some((op, tail)) = rest.split_first_chunk::<12>() {
        rest = tail;
        let [kind, q, x, y, v @ ..] = *op;
        let value = u64::from_le_bytes(v);
        let queue = usize::from(q) % queues;
        match kind % 8 {
            // A register of the BAR.
            0 => b.write(u64::from(x) | u64::from(y & 0x7f) << 8, &v[..1 << (q % 4)]),
            // Device configuration.
            1 => b.write(0x2000 + u64::from(x), &v[..1 << (q % 4)]),
            2 => b.kick(queue),
            // A descriptor, mostly of RAM, sometimes of anything.
            3 => {
                let addr = if y & 7 == 0 {
                    value
                } else {
                    BUFFERS_AT + (value & 0xf_ffff)
                };
                let len = (value >> 32) as u32 & if y & 8 == 0 { 0xfff } else { u32::MAX };
                let at = b.rings[queue].desc + 16 * u64::from(x % 64);
                b.put_descriptor(at, addr, len, u16::from(y >> 4), u16::from(v[7] % 70));
            }
            4 => {
                b.publish(queue, u16::from(x % 66));
                b.kick(queue);
            }
            // A raw avail index.
            5 => b
                .memory
                .store_u16(b.rings[queue].avail + 2, value as u16, Ordering::Release)
                .unwrap(),
            // Buffer contents.
            6 => b
                .memory
                .write(BUFFERS_AT + (u64::from(x) << 4 & 0xfff), &v)
                .unwrap(),
            _ => {
                let mut data = [0; 8];
                let at = u64::from(x) | u64::from(y & 0x7f) << 8;
                lock(&b.device).bar_read(0, at, &mut data[..1 << (q % 4)]);
            }
        }
        if b.status() & 0xc0 != 0 || b.status() != 15 {
            b.set_status(0);
            b.enable_pci();
            b.negotiate(features);
            b.set_status(15);
        }
    }
    let mut d = lock(&b.device);
    d.pause();
    while !d.drained() {
        drop(d);
        std::thread::yield_now();
        d = lock(&b.device);
    }
    let section = d.save().unwrap();
    d.restore(&section).unwrap();
}

/// Pseudo-random input for [`fuzz_one`], the same every time. xorshift64.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 24) as u8
        })
        .collect()
}
