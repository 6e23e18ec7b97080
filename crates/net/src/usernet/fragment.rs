//! IPv4 reassembly: RFC 791, with overlaps refused as in RFC 5722.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::{IpProtocol, Ipv4FragKey, Ipv4Packet};

/// LIMIT: datagrams under way; the oldest makes room.
const DATAGRAMS: usize = 16;
/// LIMIT: bytes of a datagram.
const BYTES: usize = u16::MAX as usize;
/// RFC 1122 §3.3.2 recommends 60 to 120 s for slow networks; this one is memory.
const PATIENCE: Duration = Duration::from_secs(15);
/// Offsets count units of eight bytes.
const UNIT: usize = 8;
const WORDS: usize = BYTES.div_ceil(UNIT * 64);

struct Datagram {
    key: Ipv4FragKey,
    data: Vec<u8>,
    /// One bit per unit that has arrived.
    have: [u64; WORDS],
    units: usize,
    /// Length, known with the last fragment.
    total: Option<usize>,
    begun: Instant,
}

/// A whole datagram.
pub(super) struct Whole {
    pub(super) src: Ipv4Addr,
    pub(super) dst: Ipv4Addr,
    pub(super) protocol: IpProtocol,
    pub(super) payload: Vec<u8>,
}

/// What became of a fragment.
pub(super) enum Taken {
    Whole(Whole),
    Waiting,
    Dropped,
}

/// Datagrams of which parts are missing.
#[derive(Default)]
pub(super) struct Reassembly {
    /// Oldest first.
    datagrams: Vec<Datagram>,
}

impl Reassembly {
    /// Takes a fragment whose header was checked.
    pub(super) fn take(&mut self, packet: &Ipv4Packet<&[u8]>, now: Instant) -> Taken {
        self.datagrams
            .retain(|d| now.duration_since(d.begun) < PATIENCE);
        let (key, payload) = (packet.get_key(), packet.payload());
        let start = usize::from(packet.frag_offset());
        let end = start + payload.len();
        let last = !packet.more_frags();
        // Only the last fragment may end within a unit.
        if payload.is_empty() || end > BYTES || (!last && payload.len() % UNIT != 0) {
            return Taken::Dropped;
        }
        let index = match self.datagrams.iter().position(|d| d.key == key) {
            Some(index) => index,
            None => {
                if self.datagrams.len() >= DATAGRAMS {
                    self.datagrams.remove(0);
                }
                self.datagrams.push(Datagram {
                    key,
                    data: Vec::new(),
                    have: [0; WORDS],
                    units: 0,
                    total: None,
                    begun: now,
                });
                self.datagrams.len() - 1
            }
        };
        let Some(datagram) = self.datagrams.get_mut(index) else {
            return Taken::Dropped;
        };
        if !datagram.add(start, payload, last) {
            self.datagrams.remove(index);
            return Taken::Dropped;
        }
        if datagram
            .total
            .is_none_or(|t| datagram.units != t.div_ceil(UNIT))
        {
            return Taken::Waiting;
        }
        let whole = self.datagrams.remove(index);
        Taken::Whole(Whole {
            src: packet.src_addr(),
            dst: packet.dst_addr(),
            protocol: packet.next_header(),
            payload: whole.data,
        })
    }
}

impl Datagram {
    /// Adds a fragment. False if it contradicts what is there.
    fn add(&mut self, start: usize, payload: &[u8], last: bool) -> bool {
        let end = start + payload.len();
        if last && (self.total.is_some() || self.data.len() > end) {
            return false;
        }
        if self.total.is_some_and(|t| end > t) {
            return false;
        }
        for unit in start / UNIT..end.div_ceil(UNIT) {
            let (word, bit) = (unit / 64, 1 << (unit % 64));
            let Some(have) = self.have.get_mut(word) else {
                return false;
            };
            if *have & bit != 0 {
                return false;
            }
            *have |= bit;
            self.units += 1;
        }
        if last {
            self.total = Some(end);
        }
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        self.data[start..end].copy_from_slice(payload);
        true
    }
}
