//! Network device. virtio 1.3 §5.1.
//!
//! Queue pairs and a control queue. Frames pass between the rings and the back end together with
//! what is left out of them ([`Offload`]): a segment of 64 KiB goes from the guest into its stream
//! in one piece. Back ends without use for that get ordinary frames, whatever the guest leaves out.
//!
//! With several queue pairs a flow is received where it is sent (§5.1.6.5.5, automatic steering).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_net::{FrameSink, MAX_FRAME_BYTES, NetBackend, Offload};
use pyrite_state::{Inspect, StateError};
use pyrite_vdev::bus::lock;

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::queue::Chain;
use crate::spec::VIRTIO_ID_NET;

mod control;
mod header;
mod steering;
#[cfg(test)]
mod tests;

use control::Filter;
use header::{GUEST_OFFLOADS, HEADER_BYTES};
use steering::Steering;

const VIRTIO_NET_F_CSUM: u32 = 0;
const VIRTIO_NET_F_GUEST_CSUM: u32 = 1;
const VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: u32 = 2;
const VIRTIO_NET_F_MTU: u32 = 3;
const VIRTIO_NET_F_MAC: u32 = 5;
const VIRTIO_NET_F_GUEST_TSO4: u32 = 7;
const VIRTIO_NET_F_GUEST_TSO6: u32 = 8;
const VIRTIO_NET_F_HOST_TSO4: u32 = 11;
const VIRTIO_NET_F_HOST_TSO6: u32 = 12;
const VIRTIO_NET_F_MRG_RXBUF: u32 = 15;
const VIRTIO_NET_F_STATUS: u32 = 16;
const VIRTIO_NET_F_CTRL_VQ: u32 = 17;
const VIRTIO_NET_F_CTRL_RX: u32 = 18;
const VIRTIO_NET_F_CTRL_RX_EXTRA: u32 = 20;
const VIRTIO_NET_F_GUEST_ANNOUNCE: u32 = 21;
const VIRTIO_NET_F_MQ: u32 = 22;
const VIRTIO_NET_F_CTRL_MAC_ADDR: u32 = 23;

const VIRTIO_NET_S_LINK_UP: u16 = 1;
const VIRTIO_NET_S_ANNOUNCE: u16 = 2;

/// The transmit queue of the first pair, after its receive queue; each pair has two more.
const TX: usize = 1;
/// LIMIT: queue pairs of a card.
const MAX_PAIRS: u16 = 16;
const CTRL_QUEUE_SIZE: u16 = 64;

/// Offset of num_buffers in the header.
const NUM_BUFFERS_AT: usize = 10;
/// Destination, source and type of an Ethernet frame.
const MIN_FRAME_BYTES: usize = 14;
/// LIMIT: chains that one frame may be spread over.
const MAX_MERGED: usize = 256;

/// How a network card is shown to the guest.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Hardware address; not multicast.
    pub mac: [u8; 6],
    /// Largest IP packet, 68 to 65521.
    pub mtu: u16,
    /// Entries of the receive and the transmit queue, a power of two up to 1024.
    pub queue_size: u16,
    /// Queue pairs, 1 to 16.
    pub pairs: u16,
}

impl NetConfig {
    /// A card with this address, MTU 1500.
    pub fn new(mac: [u8; 6]) -> NetConfig {
        NetConfig {
            mac,
            mtu: 1500,
            queue_size: 256,
            pairs: 1,
        }
    }
}

/// What the receive side and the driver's commands share.
struct Card {
    mac: [u8; 6],
    filter: Filter,
    link_up: bool,
    announce: bool,
    /// Queue pairs that the driver uses.
    pairs: u16,
    /// Features of [`GUEST_OFFLOADS`] that are on.
    offloads: u64,
    steering: Steering,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedNet {
    #[cbor(n(0), with = "minicbor::bytes")]
    mac: [u8; 6],
    #[n(1)]
    filter: Filter,
    #[n(2)]
    link_up: bool,
    #[n(3)]
    announce: bool,
    /// Missing in states of cards without offloads and with one pair.
    #[n(4)]
    pairs: Option<u16>,
    #[n(5)]
    offloads: Option<u64>,
}

#[derive(Default)]
struct Counters {
    rx_frames: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_dropped: AtomicU64,
}

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Delivery {
    Done,
    /// Later, when the driver has added buffers.
    NoRoom,
    /// Never.
    TooLarge,
}

/// The guest's side of the cable.
struct Receiver {
    link: Arc<DriverLink>,
    // LOCK ORDER: VirtioPciDevice < this < queue. Serialises takers of the receive queue.
    card: Arc<Mutex<Card>>,
    starved: Arc<AtomicBool>,
    counters: Arc<Counters>,
}

impl Receiver {
    /// Puts a frame into one chain of queue `rx` or, with mergeable buffers, several.
    fn deliver(&self, rx: usize, header: &mut [u8; HEADER_BYTES], frame: &[u8]) -> Delivery {
        let total = (HEADER_BYTES + frame.len()) as u64;
        let merge = self.link.has(VIRTIO_NET_F_MRG_RXBUF);
        let ring = self.link.queue_len(rx);
        let max = if merge { MAX_MERGED.min(ring) } else { 1 };
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < total && chains.len() < max {
            let Some(c) = self.link.pop(rx) else { break };
            room += c.writable_len();
            chains.push(c);
        }
        let first = chains.first().map_or(0, Chain::writable_len);
        if room < total || (!chains.is_empty() && first < HEADER_BYTES as u64) {
            // Buffers of this size never hold the frame: waiting would not help.
            let hopeless = chains.len() == max || (room >= total);
            self.link.unpop(rx, chains);
            self.link.arm(rx);
            return if hopeless {
                Delivery::TooLarge
            } else {
                Delivery::NoRoom
            };
        }
        let count = if merge { chains.len() as u16 } else { 1 };
        header[NUM_BUFFERS_AT..].copy_from_slice(&count.to_le_bytes());
        let memory = self.link.memory();
        let mut rest = frame;
        for (n, chain) in chains.into_iter().enumerate() {
            let at = if n == 0 {
                chain.write_at(memory, 0, &*header)
            } else {
                0
            };
            let copied = chain.write_at(memory, at as u64, rest);
            rest = rest.get(copied..).unwrap_or_default();
            self.link.push(rx, chain, (at + copied) as u32);
        }
        Delivery::Done
    }

    /// Delivers to the queue of the frame's flow, or another one if that has no room.
    fn deliver_somewhere(
        &self,
        card: &Card,
        header: &mut [u8; HEADER_BYTES],
        frame: &[u8],
    ) -> (Delivery, usize) {
        let pairs = usize::from(card.pairs.max(1));
        let first = card.steering.pair(frame, pairs);
        let mut last = (Delivery::NoRoom, 2 * first);
        for n in 0..pairs {
            let rx = 2 * ((first + n) % pairs);
            last = (self.deliver(rx, header, frame), rx);
            if last.0 == Delivery::Done {
                break;
            }
        }
        last
    }
}

impl FrameSink for Receiver {
    fn receive(&self, frame: &[u8]) -> bool {
        self.receive_offloaded(frame, &Offload::NONE)
    }

    fn receive_offloaded(&self, frame: &[u8], offload: &Offload) -> bool {
        let fits = (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame.len());
        let card = lock(&self.card);
        if !fits || !card.link_up || !self.link.active() {
            self.counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        if !card.filter.accepts(&card.mac, frame) {
            // Taken and thrown away, as a card does with what is for others.
            return true;
        }
        let Some(mut header) = header::to_guest(frame, offload, card.offloads) else {
            // The back end does not know yet that the guest has turned something off.
            drop(card);
            let mut first = None;
            let whole = pyrite_net::offload::complete(frame, offload, &mut |f| {
                let taken = self.receive(f);
                first.get_or_insert(taken);
            });
            return !whole || first.unwrap_or(true);
        };
        // Set first: a buffer that the driver adds after the queue was found empty must find it.
        self.starved.store(true, Ordering::SeqCst);
        let (delivery, rx) = self.deliver_somewhere(&card, &mut header, frame);
        drop(card);
        if delivery == Delivery::Done {
            self.counters.rx_frames.fetch_add(1, Ordering::Relaxed);
            self.link.signal(rx);
        } else {
            self.counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
        }
        if delivery != Delivery::NoRoom {
            self.starved.store(false, Ordering::SeqCst);
        }
        delivery != Delivery::NoRoom
    }

    fn takes(&self, offload: &Offload) -> bool {
        header::takes(offload, lock(&self.card).offloads)
    }

    fn ready(&self) -> bool {
        self.starved.store(true, Ordering::SeqCst);
        let (pairs, link_up) = {
            let card = lock(&self.card);
            (usize::from(card.pairs.max(1)), card.link_up)
        };
        let ready = link_up && (0..pairs).any(|n| self.link.has_avail(2 * n));
        if ready {
            self.starved.store(false, Ordering::SeqCst);
        }
        ready
    }
}

/// Changes a card from the host's side while the device runs.
#[derive(Clone)]
pub struct NetControl {
    backend: Arc<dyn NetBackend>,
    card: Arc<Mutex<Card>>,
    link: Arc<Mutex<Option<Arc<DriverLink>>>>,
}

impl pyrite_net::Cable for NetControl {
    fn set_link(&self, up: bool) {
        let changed = {
            let mut c = lock(&self.card);
            std::mem::replace(&mut c.link_up, up) != up
        };
        let link = lock(&self.link).clone();
        if let (true, Some(l)) = (changed, link) {
            l.config_changed();
        }
        if up && changed {
            // It may have found the cable pulled.
            self.backend.receive_ready();
        }
    }
}

/// The device.
pub struct Net {
    backend: Arc<dyn NetBackend>,
    config: NetConfig,
    link: Option<Arc<DriverLink>>,
    control_link: Arc<Mutex<Option<Arc<DriverLink>>>>,
    card: Arc<Mutex<Card>>,
    starved: Arc<AtomicBool>,
    counters: Arc<Counters>,
    /// Restored: the network must learn where the guest is now.
    announce_at_start: bool,
    frame: Vec<u8>,
}

impl Net {
    /// A card plugged into `backend`.
    pub fn new(backend: Arc<dyn NetBackend>, mut config: NetConfig) -> Net {
        config.queue_size = config.queue_size.clamp(4, 1024).next_power_of_two();
        config.mtu = config.mtu.clamp(68, 65521);
        config.pairs = config.pairs.clamp(1, MAX_PAIRS);
        let card = Card {
            mac: config.mac,
            filter: Filter::default(),
            link_up: true,
            announce: false,
            pairs: 1,
            offloads: 0,
            steering: Steering::default(),
        };
        Net {
            backend,
            config,
            link: None,
            control_link: Arc::default(),
            card: Arc::new(Mutex::new(card)),
            starved: Arc::default(),
            counters: Arc::default(),
            announce_at_start: false,
            frame: Vec::new(),
        }
    }

    /// A handle for the host's side.
    pub fn control(&self) -> NetControl {
        NetControl {
            backend: Arc::clone(&self.backend),
            card: Arc::clone(&self.card),
            link: Arc::clone(&self.control_link),
        }
    }

    /// Index of the control queue. §5.1.2.
    fn control_queue(&self, link: &DriverLink) -> usize {
        if link.has(VIRTIO_NET_F_MQ) {
            2 * usize::from(self.config.pairs)
        } else {
            2
        }
    }

    fn transmit(&mut self, link: &DriverLink, tx: usize) {
        let features = link.features();
        while let Some(chain) = link.pop(tx) {
            let sent = self.send(link, &chain, features, tx / 2);
            let c = if sent {
                &self.counters.tx_frames
            } else {
                &self.counters.tx_dropped
            };
            c.fetch_add(1, Ordering::Relaxed);
            link.push(tx, chain, 0);
        }
        link.signal(tx);
    }

    /// Sends the frame in a chain; false if it is dropped.
    fn send(&mut self, link: &DriverLink, chain: &Chain, features: u64, pair: usize) -> bool {
        let len = chain.readable_len();
        let max = (HEADER_BYTES + MAX_FRAME_BYTES) as u64;
        if len < (HEADER_BYTES + MIN_FRAME_BYTES) as u64 || len > max {
            return false;
        }
        self.frame.resize(len as usize, 0);
        let n = chain.read_at(link.memory(), 0, &mut self.frame);
        let Some((header, frame)) = self.frame.split_first_chunk::<HEADER_BYTES>() else {
            return false;
        };
        let Some(offload) = header::from_guest(header, features) else {
            return false;
        };
        {
            let mut card = lock(&self.card);
            if n != len as usize || !card.link_up {
                return false;
            }
            if card.pairs > 1 {
                card.steering.note(frame, pair);
            }
        }
        if offload.is_none() {
            self.backend.transmit(frame);
        } else {
            self.backend.transmit_offloaded(frame, &offload);
        }
        true
    }

    fn commands(&mut self, link: &DriverLink, queue: usize) {
        let before = lock(&self.card).offloads;
        while let Some(chain) = link.pop(queue) {
            let limits = control::Limits {
                pairs: self.config.pairs,
                offloads: link.features() & GUEST_OFFLOADS,
            };
            let ack = control::execute(link, &chain, &mut lock(&self.card), &limits);
            let n = chain.write_at(link.memory(), 0, &[ack]);
            link.push(queue, chain, n as u32);
        }
        link.signal(queue);
        let now = lock(&self.card).offloads;
        if now != before {
            self.backend.set_offloads(header::offloads(now));
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_NET
    }

    fn class_code(&self) -> u32 {
        0x02_00_00
    }

    fn features(&self) -> u64 {
        let several = if self.config.pairs > 1 {
            1 << VIRTIO_NET_F_MQ
        } else {
            0
        };
        several
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | GUEST_OFFLOADS
            | 1 << VIRTIO_NET_F_MTU
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_RX
            | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
            | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.config.queue_size; 2 * usize::from(self.config.pairs)];
        sizes.push(CTRL_QUEUE_SIZE);
        sizes
    }

    fn attach(&mut self, link: Arc<DriverLink>) {
        *lock(&self.control_link) = Some(Arc::clone(&link));
        self.backend.attach(Arc::new(Receiver {
            link: Arc::clone(&link),
            card: Arc::clone(&self.card),
            starved: Arc::clone(&self.starved),
            counters: Arc::clone(&self.counters),
        }));
        self.link = Some(link);
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        // virtio 1.3 §5.1.4: mac, status, max_virtqueue_pairs, mtu.
        let c = lock(&self.card);
        let mut status = 0;
        if c.link_up {
            status |= VIRTIO_NET_S_LINK_UP;
        }
        if c.announce {
            status |= VIRTIO_NET_S_ANNOUNCE;
        }
        let mut image = [0; 12];
        image[..6].copy_from_slice(&c.mac);
        image[6..8].copy_from_slice(&status.to_le_bytes());
        image[8..10].copy_from_slice(&self.config.pairs.to_le_bytes());
        image[10..].copy_from_slice(&self.config.mtu.to_le_bytes());
        read_config(&image, offset, data);
    }

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self) {
        if let Some(link) = &self.link {
            let on = link.features() & GUEST_OFFLOADS;
            lock(&self.card).offloads = on;
            self.backend.set_offloads(header::offloads(on));
        }
    }

    fn notify(&mut self, queue: usize) {
        let Some(link) = self.link.clone() else {
            return;
        };
        match queue {
            _ if queue == self.control_queue(&link) => self.commands(&link, queue),
            // The control queue of a driver that could use more pairs.
            _ if queue >= 2 * usize::from(self.config.pairs) => {}
            _ if queue % 2 == TX => self.transmit(&link, queue),
            _ if self.starved.swap(false, Ordering::SeqCst) => self.backend.receive_ready(),
            _ => {}
        }
    }

    fn reset(&mut self) {
        let mut c = lock(&self.card);
        c.mac = self.config.mac;
        c.filter = Filter::default();
        c.announce = false;
        c.pairs = 1;
        c.offloads = 0;
        c.steering = Steering::default();
        self.backend.set_offloads(header::offloads(0));
        // A driver that comes back finds an empty queue: the back end waits for it.
        self.starved.store(true, Ordering::SeqCst);
    }

    fn start(&mut self) {
        self.starved.store(true, Ordering::SeqCst);
        self.backend.pause(false);
        if std::mem::take(&mut self.announce_at_start)
            && let Some(l) = &self.link
            && l.has(VIRTIO_NET_F_GUEST_ANNOUNCE)
            && l.driver_ok()
        {
            lock(&self.card).announce = true;
            l.config_changed();
        }
    }

    fn pause(&mut self) {
        self.backend.pause(true);
    }

    fn drained(&mut self) -> bool {
        true
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let c = lock(&self.card);
        let Card {
            mac,
            filter,
            link_up,
            announce,
            pairs,
            offloads,
            // Flows are steered anew by what is sent.
            steering: _,
        } = &*c;
        Ok(encode_body(&SavedNet {
            mac: *mac,
            filter: filter.clone(),
            link_up: *link_up,
            announce: *announce,
            pairs: Some(*pairs),
            offloads: Some(*offloads),
        }))
    }

    fn restore(&mut self, body: &[u8], active: bool) -> Result<(), StateError> {
        let unit = self.link.as_ref().map_or("virtio-net", |l| l.name());
        let SavedNet {
            mac,
            filter,
            link_up,
            announce,
            pairs,
            offloads,
        } = decode_body(unit, body)?;
        let pairs = pairs.unwrap_or(1);
        let offloads = offloads.unwrap_or(0) & GUEST_OFFLOADS;
        if !filter.valid() || pairs == 0 || pairs > self.config.pairs {
            let detail = "impossible address table or queue pairs".to_owned();
            return Err(StateError::Invalid {
                unit: unit.to_owned(),
                detail,
            });
        }
        *lock(&self.card) = Card {
            mac,
            filter,
            link_up,
            announce,
            pairs,
            offloads,
            steering: Steering::default(),
        };
        self.backend.set_offloads(header::offloads(offloads));
        self.announce_at_start = active;
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let c = lock(&self.card);
        let [m0, m1, m2, m3, m4, m5] = c.mac;
        let mac = format!("{m0:02x}:{m1:02x}:{m2:02x}:{m3:02x}:{m4:02x}:{m5:02x}");
        let count = |c: &AtomicU64| Inspect::Uint(c.load(Ordering::Relaxed));
        Inspect::node([
            ("mac", Inspect::Text(mac)),
            ("mtu", Inspect::Uint(u64::from(self.config.mtu))),
            ("link_up", Inspect::Bool(c.link_up)),
            ("promiscuous", Inspect::Bool(c.filter.promiscuous())),
            ("queue_pairs", Inspect::Uint(c.pairs.into())),
            ("guest_offloads", Inspect::Hex(c.offloads)),
            ("rx_frames", count(&self.counters.rx_frames)),
            ("rx_dropped", count(&self.counters.rx_dropped)),
            ("tx_frames", count(&self.counters.tx_frames)),
            ("tx_dropped", count(&self.counters.tx_dropped)),
        ])
    }
}
