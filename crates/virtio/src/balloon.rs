//! Memory balloon. virtio 1.3 §5.5.
//!
//! The guest gives pages up (inflate) and takes them back (deflate); pages given up, and pages
//! that it reports free, are returned to the host and read as zero afterwards. Handing memory
//! back is a system call a page run, so it happens on the device's own thread.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_mem::PAGE_SIZE;
use pyrite_state::{Inspect, StateError};
use pyrite_vdev::bus::lock;

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::queue::Chain;
use crate::spec::VIRTIO_ID_BALLOON;
use crate::worker::Worker;

#[cfg(test)]
mod tests;

const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;

/// LIMIT: page numbers read of one request (4 GiB of guest memory).
const MAX_PAGES: u64 = 1 << 20;
/// Page numbers copied at a time.
const CHUNK_PAGES: u64 = 1024;
/// LIMIT: statistics kept; §5.5.6.4 defines ten, tags beyond are dropped.
const MAX_STATS: usize = 16;
/// Bytes of struct virtio_balloon_stat.
const STAT_BYTES: usize = 10;
/// Offset of the field `actual` in the configuration, §5.5.4.
const CONFIG_ACTUAL: u64 = 4;

/// What host and device share.
struct Shared {
    link: Mutex<Option<Arc<DriverLink>>>,
    /// Pages that the host wants in the balloon.
    target_pages: AtomicU32,
    /// Pages that the driver says are in it.
    actual_pages: AtomicU32,
    reclaimed_bytes: AtomicU64,
    // LOCK ORDER: this < queue. Also serialises takers of the statistics queue.
    stats: Mutex<Vec<(u16, u64)>>,
}

impl Shared {
    fn link(&self) -> Option<Arc<DriverLink>> {
        lock(&self.link).clone()
    }

    /// The reporting queue: its number depends on which features exist before it (§5.5.2).
    fn reporting_queue(link: &DriverLink) -> usize {
        if link.has(VIRTIO_BALLOON_F_STATS_VQ) {
            3
        } else {
            2
        }
    }

    fn work(&self, queue: usize) {
        let Some(link) = self.link() else { return };
        let stats = link.has(VIRTIO_BALLOON_F_STATS_VQ);
        if queue == STATS && stats {
            self.read_stats(&link);
            return;
        }
        while let Some(chain) = link.pop(queue) {
            if queue == INFLATE {
                self.inflate(&link, &chain);
            } else if queue == Shared::reporting_queue(&link)
                && link.has(VIRTIO_BALLOON_F_REPORTING)
            {
                for s in chain.writable() {
                    self.discard(&link, s.gpa, u64::from(s.len));
                }
            }
            // Deflate needs nothing: the page comes back at the first touch.
            link.complete(queue, chain, 0);
        }
    }

    fn discard(&self, link: &DriverLink, gpa: u64, len: u64) {
        match link.memory().discard(gpa, len) {
            Ok(n) => {
                self.reclaimed_bytes.fetch_add(n, Ordering::Relaxed);
            }
            // A page number outside RAM is the guest's mistake and costs nobody anything.
            Err(e) => tracing::debug!("balloon page not discarded: {e}"),
        }
    }

    fn inflate(&self, link: &DriverLink, chain: &Chain) {
        let pages = (chain.readable_len() / 4).min(MAX_PAGES);
        let mut bytes = [0; 4 * CHUNK_PAGES as usize];
        let mut run: Option<(u64, u64)> = None;
        for first in (0..pages).step_by(CHUNK_PAGES as usize) {
            let n = (pages - first).min(CHUNK_PAGES) as usize * 4;
            let n = chain.read_at(link.memory(), first * 4, &mut bytes[..n]);
            for b in bytes[..n].as_chunks::<4>().0 {
                let page = u64::from(u32::from_le_bytes(*b));
                run = match run {
                    Some((start, len)) if start + len == page => Some((start, len + 1)),
                    // Drivers also hand out pages downwards.
                    Some((start, len)) if page + 1 == start => Some((page, len + 1)),
                    other => {
                        if let Some((start, len)) = other {
                            self.discard(link, start * PAGE_SIZE, len * PAGE_SIZE);
                        }
                        Some((page, 1))
                    }
                };
            }
        }
        if let Some((start, len)) = run {
            self.discard(link, start * PAGE_SIZE, len * PAGE_SIZE);
        }
    }

    /// The driver leaves one buffer of statistics; it goes back when new ones are wanted.
    fn read_stats(&self, link: &DriverLink) {
        let mut kept = lock(&self.stats);
        let Some(chain) = link.pop(STATS) else { return };
        let mut bytes = [0; MAX_STATS * STAT_BYTES];
        let n = chain.read_at(link.memory(), 0, &mut bytes);
        link.unpop(STATS, vec![chain]);
        // Nothing more is expected, but an armed queue is what the next refill needs.
        link.arm(STATS);
        *kept = bytes[..n]
            .as_chunks::<STAT_BYTES>()
            .0
            .iter()
            .map(|[t0, t1, v @ ..]| (u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(*v)))
            .collect();
    }
}

/// The host's control of a balloon.
#[derive(Clone)]
pub struct BalloonControl {
    shared: Arc<Shared>,
}

impl BalloonControl {
    /// Asks the guest to have this much memory in the balloon. Rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        if self.shared.target_pages.swap(pages, Ordering::AcqRel) != pages
            && let Some(l) = self.shared.link()
        {
            l.config_changed();
        }
    }

    /// Bytes that the host wants in the balloon.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target_pages.load(Ordering::Acquire)) * PAGE_SIZE
    }

    /// Bytes that the driver says are in the balloon.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual_pages.load(Ordering::Acquire)) * PAGE_SIZE
    }

    /// The latest statistics: tag (§5.5.6.4) and value.
    pub fn stats(&self) -> Vec<(u16, u64)> {
        lock(&self.shared.stats).clone()
    }

    /// Asks the driver for new statistics. False if it cannot give any now.
    pub fn request_stats(&self) -> bool {
        let Some(link) = self.shared.link() else {
            return false;
        };
        if !link.has(VIRTIO_BALLOON_F_STATS_VQ) {
            return false;
        }
        let _kept = lock(&self.shared.stats);
        let Some(chain) = link.pop(STATS) else {
            return false;
        };
        link.complete(STATS, chain, 0);
        // Looks at the emptied queue, which arms the notification of the refill.
        link.has_avail(STATS);
        true
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedBalloon {
    #[n(0)]
    target_pages: u32,
    #[n(1)]
    actual_pages: u32,
}

/// The device.
pub struct Balloon {
    shared: Arc<Shared>,
    worker: Worker,
}

impl Balloon {
    /// An empty balloon. Fails if its thread cannot be started.
    pub fn new() -> std::io::Result<Balloon> {
        let shared = Arc::new(Shared {
            link: Mutex::new(None),
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            reclaimed_bytes: AtomicU64::new(0),
            stats: Mutex::new(Vec::new()),
        });
        let on_thread = Arc::clone(&shared);
        let worker = Worker::new("virtio-balloon", move |queue| on_thread.work(queue))?;
        Ok(Balloon { shared, worker })
    }

    /// A handle for the host's side.
    pub fn control(&self) -> BalloonControl {
        BalloonControl {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BALLOON
    }
    fn class_code(&self) -> u32 {
        0x05_80_00
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_STATS_VQ
            | 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | 1 << VIRTIO_BALLOON_F_REPORTING
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128; 4]
    }
    fn attach(&mut self, link: Arc<DriverLink>) {
        *lock(&self.shared.link) = Some(link);
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        // virtio 1.3 §5.5.4: num_pages, actual.
        let mut image = [0; 8];
        let target = self.shared.target_pages.load(Ordering::Acquire);
        let actual = self.shared.actual_pages.load(Ordering::Acquire);
        image[..4].copy_from_slice(&target.to_le_bytes());
        image[4..].copy_from_slice(&actual.to_le_bytes());
        read_config(&image, offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, &[a, b, c, d]) = (offset, data) {
            self.shared
                .actual_pages
                .store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
        }
    }

    fn activate(&mut self) {}
    fn notify(&mut self, queue: usize) {
        // Deflate is answered here: it is cheap, and a guest out of memory waits for it.
        if queue == DEFLATE {
            self.shared.work(queue)
        } else {
            self.worker.kick(queue)
        }
    }
    fn reset(&mut self) {
        self.shared.actual_pages.store(0, Ordering::Release);
        lock(&self.shared.stats).clear();
    }
    fn start(&mut self) {}
    fn pause(&mut self) {}
    fn drained(&mut self) -> bool {
        true
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(encode_body(&SavedBalloon {
            target_pages: self.shared.target_pages.load(Ordering::Acquire),
            actual_pages: self.shared.actual_pages.load(Ordering::Acquire),
        }))
    }

    fn restore(&mut self, body: &[u8], _active: bool) -> Result<(), StateError> {
        let link = self.shared.link();
        let unit = link.as_ref().map_or("virtio-balloon", |l| l.name());
        let SavedBalloon {
            target_pages,
            actual_pages,
        } = decode_body(unit, body)?;
        self.shared
            .target_pages
            .store(target_pages, Ordering::Release);
        self.shared
            .actual_pages
            .store(actual_pages, Ordering::Release);
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let pages = |a: &AtomicU32| Inspect::Uint(u64::from(a.load(Ordering::Relaxed)) * PAGE_SIZE);
        Inspect::node([
            ("target_bytes", pages(&self.shared.target_pages)),
            ("actual_bytes", pages(&self.shared.actual_pages)),
            (
                "reclaimed_bytes",
                Inspect::Uint(self.shared.reclaimed_bytes.load(Ordering::Relaxed)),
            ),
        ])
    }
}
