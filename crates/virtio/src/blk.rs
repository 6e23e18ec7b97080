//! Block device. virtio 1.3 §5.2.
//!
//! A notification takes every available chain, parses it and submits it; the completion, on a
//! thread of the back end, returns the chain. Nothing waits. A pause stops taking chains; the
//! device is drained when the last completion has run.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_disk::{BlockBackend, BlockRequest, Completion, DiskError};
use pyrite_state::{Inspect, StateError};
use pyrite_vdev::bus::lock;

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::queue::Chain;
use crate::spec::VIRTIO_ID_BLOCK;

mod request;
#[cfg(test)]
mod tests;

use request::{Parsed, Request, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

const VIRTIO_BLK_F_SEG_MAX: u32 = 2;
const VIRTIO_BLK_F_RO: u32 = 5;
const VIRTIO_BLK_F_BLK_SIZE: u32 = 6;
const VIRTIO_BLK_F_FLUSH: u32 = 9;
const VIRTIO_BLK_F_TOPOLOGY: u32 = 10;
const VIRTIO_BLK_F_CONFIG_WCE: u32 = 11;
const VIRTIO_BLK_F_MQ: u32 = 12;
const VIRTIO_BLK_F_DISCARD: u32 = 13;
const VIRTIO_BLK_F_WRITE_ZEROES: u32 = 14;

/// Bytes of a sector, the unit of the device's addresses.
const SECTOR_BYTES: u64 = 512;
/// LIMIT: sectors in one discard or write-zeroes range (1 GiB): bounds the work of a request.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// LIMIT: ranges in one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
/// Offset of the `writeback` field in the configuration, virtio 1.3 §5.2.4.
const CONFIG_WRITEBACK: u64 = 32;

/// How a disk is shown to the guest.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// What GET_ID answers; cut at 20 bytes.
    pub serial: String,
    /// Number of request queues, 1 to 64.
    pub queues: u16,
    /// Entries of each queue, a power of two up to 1024.
    pub queue_size: u16,
}

impl Default for BlkConfig {
    fn default() -> Self {
        BlkConfig {
            serial: String::new(),
            queues: 1,
            queue_size: 256,
        }
    }
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedBlk {
    #[n(0)]
    writeback: bool,
    #[n(1)]
    size_bytes: u64,
}

/// The device.
pub struct Blk {
    backend: Arc<dyn BlockBackend>,
    config: BlkConfig,
    link: Option<Arc<DriverLink>>,
    writeback: bool,
    counters: Arc<Counters>,
}

impl Blk {
    /// A disk on `backend`.
    pub fn new(backend: Arc<dyn BlockBackend>, mut config: BlkConfig) -> Blk {
        config.queues = config.queues.clamp(1, 64);
        config.queue_size = config.queue_size.clamp(4, 1024).next_power_of_two();
        Blk {
            backend,
            config,
            link: None,
            writeback: true,
            counters: Arc::default(),
        }
    }

    fn image(&self) -> [u8; 60] {
        // virtio 1.3 §5.2.4, struct virtio_blk_config.
        let info = self.backend.info();
        let mut c = [0; 60];
        let mut put = |at: usize, b: &[u8]| c[at..at + b.len()].copy_from_slice(b);
        put(0, &(info.size_bytes / SECTOR_BYTES).to_le_bytes());
        // seg_max: header and status take two descriptors of the ring.
        put(12, &(u32::from(self.config.queue_size) - 2).to_le_bytes());
        put(20, &info.block_bytes.to_le_bytes());
        // Topology: physical_block_exp, alignment_offset 0, min_io_size in logical blocks.
        let physical = 4096_u32.max(info.block_bytes) / info.block_bytes.max(1);
        put(24, &[physical.trailing_zeros() as u8, 0]);
        put(26, &(physical as u16).to_le_bytes());
        put(CONFIG_WRITEBACK as usize, &[u8::from(self.writeback)]);
        put(34, &self.config.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(
            44,
            &physical
                .saturating_mul(info.block_bytes / 512)
                .to_le_bytes(),
        );
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[u8::from(info.discard)]);
        c
    }

    fn process(&self, link: &Arc<DriverLink>, queue: usize, chain: Chain) {
        let memory = link.memory();
        let parsed = match Request::parse(memory, &chain) {
            Ok(p) => p,
            Err(e) => {
                // Without a place for the status byte the request cannot be answered.
                link.fail(&e);
                return;
            }
        };
        let Parsed {
            status_gpa,
            data_written,
            request,
        } = parsed;
        let answer = Answer {
            link: Arc::clone(link),
            queue,
            chain,
            status_gpa,
            counters: Arc::clone(&self.counters),
        };
        let info = self.backend.info();
        match request {
            Request::Read { sector, bufs } => {
                self.counters.reads.fetch_add(1, Ordering::Relaxed);
                let offset = sector.saturating_mul(SECTOR_BYTES);
                self.submit(
                    BlockRequest::Read { offset, bufs },
                    answer.done(data_written),
                );
            }
            Request::Write { sector, bufs } => {
                if info.read_only {
                    return answer.finish(VIRTIO_BLK_S_IOERR, 0);
                }
                self.counters.writes.fetch_add(1, Ordering::Relaxed);
                let offset = sector.saturating_mul(SECTOR_BYTES);
                let fua = !self.writeback;
                self.submit(BlockRequest::Write { offset, bufs, fua }, answer.done(0));
            }
            Request::Flush => {
                self.counters.flushes.fetch_add(1, Ordering::Relaxed);
                self.submit(BlockRequest::Flush, answer.done(0));
            }
            Request::GetId => {
                let mut id = [0; 20];
                let serial = self.config.serial.as_bytes();
                let n = serial.len().min(id.len());
                id[..n].copy_from_slice(&serial[..n]);
                let room = id
                    .len()
                    .min(usize::try_from(data_written).unwrap_or(usize::MAX));
                let n = answer.chain.write_at(memory, 0, &id[..room]);
                answer.finish(VIRTIO_BLK_S_OK, n as u32);
            }
            Request::Ranges { .. } if info.read_only => answer.finish(VIRTIO_BLK_S_IOERR, 0),
            Request::Ranges { requests } => self.submit_all(requests, answer),
            Request::Failed(status) => answer.finish(status, 0),
        }
    }

    fn submit(&self, request: BlockRequest, done: Completion) {
        if let Some(link) = &self.link {
            self.backend.submit(link.memory(), request, done);
        }
    }

    /// Submits several ranges; the answer follows the last one.
    fn submit_all(&self, requests: Vec<BlockRequest>, answer: Answer) {
        if requests.is_empty() {
            return answer.finish(VIRTIO_BLK_S_OK, 0);
        }
        struct Rest {
            left: AtomicUsize,
            outcome: Mutex<(Option<Answer>, u8)>,
        }
        let rest = Arc::new(Rest {
            left: AtomicUsize::new(requests.len()),
            outcome: Mutex::new((Some(answer), VIRTIO_BLK_S_OK)),
        });
        for r in requests {
            let rest = Arc::clone(&rest);
            let done = move |result: Result<(), DiskError>| {
                let status = status_of(&result);
                let mut o = lock(&rest.outcome);
                if o.1 == VIRTIO_BLK_S_OK {
                    o.1 = status;
                }
                if rest.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let (answer, status) = (o.0.take(), o.1);
                    drop(o);
                    if let Some(a) = answer {
                        a.finish(status, 0);
                    }
                }
            };
            self.submit(r, Box::new(done));
        }
    }
}

/// A request on its way back to the driver.
struct Answer {
    link: Arc<DriverLink>,
    queue: usize,
    chain: Chain,
    status_gpa: u64,
    counters: Arc<Counters>,
}

impl Answer {
    /// `data`: bytes written to the guest before the status byte.
    fn finish(self, status: u8, data: u32) {
        if status != VIRTIO_BLK_S_OK {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        let written = data.saturating_add(1);
        self.link
            .push_status(self.queue, self.chain, written, self.status_gpa, status);
        self.link.signal(self.queue);
    }

    fn done(self, data: u32) -> Completion {
        Box::new(move |result| {
            let status = status_of(&result);
            self.finish(status, if status == VIRTIO_BLK_S_OK { data } else { 0 });
        })
    }
}

fn status_of(result: &Result<(), DiskError>) -> u8 {
    match result {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(e) => {
            tracing::debug!("disk request failed: {e}");
            VIRTIO_BLK_S_IOERR
        }
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK
    }

    fn class_code(&self) -> u32 {
        0x01_80_00
    }

    fn features(&self) -> u64 {
        let info = self.backend.info();
        let mut f = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        if self.config.queues > 1 {
            f |= 1 << VIRTIO_BLK_F_MQ;
        }
        if info.read_only {
            f |= 1 << VIRTIO_BLK_F_RO;
        } else {
            f |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            if info.discard {
                f |= 1 << VIRTIO_BLK_F_DISCARD;
            }
        }
        f
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.config.queue_size; usize::from(self.config.queues)]
    }

    fn attach(&mut self, link: Arc<DriverLink>) {
        self.link = Some(link);
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        read_config(&self.image(), offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        // virtio 1.3 §5.2.5.2: the driver may set the cache mode if CONFIG_WCE was negotiated.
        let allowed = self
            .link
            .as_ref()
            .is_some_and(|l| l.has(VIRTIO_BLK_F_CONFIG_WCE));
        if let (true, CONFIG_WRITEBACK, &[mode]) = (allowed, offset, data) {
            self.writeback = mode != 0;
        }
    }

    fn activate(&mut self) {
        // virtio 1.3 §5.2.5.1: without CONFIG_WCE a driver that knows FLUSH gets write-back, one
        // that does not gets write-through.
        if let Some(l) = &self.link
            && !l.has(VIRTIO_BLK_F_CONFIG_WCE)
        {
            self.writeback = l.has(VIRTIO_BLK_F_FLUSH);
        }
    }

    fn notify(&mut self, queue: usize) {
        let Some(link) = self.link.clone() else {
            return;
        };
        while let Some(chain) = link.pop(queue) {
            self.process(&link, queue, chain);
        }
    }

    fn reset(&mut self) {
        self.writeback = true;
    }

    fn start(&mut self) {}

    fn pause(&mut self) {}

    fn drained(&mut self) -> bool {
        true
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let size_bytes = self.backend.info().size_bytes;
        Ok(encode_body(&SavedBlk {
            writeback: self.writeback,
            size_bytes,
        }))
    }

    fn restore(&mut self, body: &[u8], _active: bool) -> Result<(), StateError> {
        let unit = self.link.as_ref().map_or("virtio-blk", |l| l.name());
        let SavedBlk {
            writeback,
            size_bytes,
        } = decode_body(unit, body)?;
        let ours = self.backend.info().size_bytes;
        if size_bytes != ours {
            return Err(StateError::Invalid {
                unit: unit.to_owned(),
                detail: format!("disk had {size_bytes} bytes, now has {ours}"),
            });
        }
        self.writeback = writeback;
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let count = |c: &AtomicU64| Inspect::Uint(c.load(Ordering::Relaxed));
        let info = self.backend.info();
        Inspect::node([
            ("size_bytes", Inspect::Uint(info.size_bytes)),
            ("block_bytes", Inspect::Uint(u64::from(info.block_bytes))),
            ("read_only", Inspect::Bool(info.read_only)),
            ("writeback", Inspect::Bool(self.writeback)),
            ("reads", count(&self.counters.reads)),
            ("writes", count(&self.counters.writes)),
            ("flushes", count(&self.counters.flushes)),
            ("errors", count(&self.counters.errors)),
            (
                "backend_in_flight",
                Inspect::Uint(self.backend.in_flight() as u64),
            ),
        ])
    }
}
