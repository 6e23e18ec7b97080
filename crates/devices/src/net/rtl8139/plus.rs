//! C+ mode: descriptor rings. RTL8139C+ data sheet §5.

use minicbor::{Decode, Encode};
use pyrite_net::offload::{self, Checksum, Offload, Segment};

use super::*;
use crate::net::fcs::fcs;

const DESCRIPTOR_BYTES: u64 = 16;
/// LIMIT: descriptors of a ring whose end is not marked. §5: 64.
const RING: u32 = 64;
/// LIMIT: bytes of a packet that is gathered.
const MAX_PACKET_BYTES: usize = 64 << 10;
const MAX_RECEIVE_BYTES: usize = 4096;
const VLAN_AT: usize = 12;
const VLAN_BYTES: usize = 4;

const OWN: u32 = 1 << 31;
/// Underrun, error summary, collisions out of the window, link failure, too many collisions and their
/// number, as the card leaves them in the first word. §8.2.2.
const TX_STATUS: u32 = 1 << 25 | 0xff << 16;
const EOR: u32 = 1 << 30;
const FS: u32 = 1 << 29;
const LS: u32 = 1 << 28;
const TX_LGSEN: u32 = 1 << 27;
const TX_IPCS: u32 = 1 << 18;
const TX_UDPCS: u32 = 1 << 17;
const TX_TCPCS: u32 = 1 << 16;
const TX_TAGC: u32 = 1 << 17;
const RX_MAR: u32 = 1 << 27;
const RX_PAM: u32 = 1 << 26;
const RX_BAR: u32 = 1 << 25;
const RX_TCP: u32 = 1 << 16;
const RX_UDP: u32 = 2 << 16;
const RX_IP: u32 = 3 << 16;
const RX_IPF: u32 = 1 << 15;
const RX_UDPF: u32 = 1 << 14;
const RX_TCPF: u32 = 1 << 13;
const RX_TAVA: u32 = 1 << 16;
const RX_SIZE: u32 = 0x1fff;

const TPPOLL_NPQ: u32 = 1 << 6;
const TPPOLL_HPQ: u32 = 1 << 7;

/// A packet made of several descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Gathering {
    #[cbor(n(0), with = "minicbor::bytes")]
    data: Vec<u8>,
    #[n(1)]
    bad: bool,
}

impl Gathering {
    pub(super) fn valid(&self) -> bool {
        self.data.len() <= MAX_PACKET_BYTES
    }
}

/// VLAN tags are in network order in the descriptor.
fn tag(opts2: u32) -> u16 {
    (opts2 as u16).swap_bytes()
}

impl<const PLUS: bool> Rtl8139<PLUS> {
    /// Sends what is in the rings that `poll` names: high priority first. True if there is nothing
    /// more in one of them.
    pub(super) fn transmit_rings(&mut self, host: &mut Host, poll: u32) -> bool {
        if self.get(CR) & CR_TE == 0 || !self.plus(CPCR_TX) {
            return false;
        }
        let mut empty = false;
        for (ring, bit) in [(1, TPPOLL_HPQ), (0, TPPOLL_NPQ)] {
            if poll & bit != 0 {
                empty |= self.transmit_ring(host, ring);
            }
        }
        empty
    }

    fn transmit_ring(&mut self, host: &mut Host, ring: usize) -> bool {
        let Some(memory) = host.memory() else {
            return false;
        };
        let start = if ring == 0 { TSAD0 } else { TSAD0 + 8 };
        let base = u64::from(self.get(start + 4)) << 32 | u64::from(self.get(start) & !0xff);
        if base == 0 {
            return false;
        }
        let (mut sent, mut empty) = (false, false);
        // A ring's worth at most: the driver may fill it again meanwhile.
        for _ in 0..RING {
            let at = base.wrapping_add(u64::from(self.tx_next[ring]) * DESCRIPTOR_BYTES);
            let mut d = [0; DESCRIPTOR_BYTES as usize];
            if memory.read(at, &mut d).is_err() {
                break;
            }
            let word = |n: usize| u32::from_le_bytes([d[n], d[n + 1], d[n + 2], d[n + 3]]);
            let (opts1, opts2) = (word(0), word(4));
            if opts1 & OWN == 0 {
                empty = true;
                break;
            }
            let address = u64::from(word(12)) << 32 | u64::from(word(8));
            let mut packet = std::mem::take(&mut self.gathering[ring]);
            if opts1 & FS != 0 {
                packet.data.clear();
                packet.bad = false;
            }
            let (old, more) = (packet.data.len(), (opts1 & 0xffff) as usize);
            if old + more > MAX_PACKET_BYTES {
                packet.bad = true;
            } else {
                packet.data.resize(old + more, 0);
                packet.bad |= memory.read(address, &mut packet.data[old..]).is_err();
            }
            if opts1 & LS != 0 {
                if packet.bad {
                    host.dropped();
                } else {
                    self.send_packet(host, &mut packet.data, opts1, opts2);
                }
                sent = true;
                packet.data.clear();
                packet.bad = false;
            }
            self.gathering[ring] = packet;
            // OWN goes, and status, where the MSS was, is all good.
            let _ = memory.write(at, &(opts1 & !(OWN | TX_STATUS)).to_le_bytes());
            let next = self.tx_next[ring] + 1;
            self.tx_next[ring] = if opts1 & EOR != 0 || next >= RING {
                0
            } else {
                next
            };
        }
        if sent {
            self.raise(ISR_TOK);
        }
        empty
    }

    fn send_packet(&mut self, host: &mut Host, data: &mut Vec<u8>, opts1: u32, opts2: u32) {
        let mut offload = Offload::NONE;
        if opts1 & (TX_LGSEN | TX_IPCS | TX_UDPCS | TX_TCPCS) != 0
            && let Some(h) = offload::headers(data)
        {
            let segment = opts1 & TX_LGSEN != 0;
            let transport = match h.protocol {
                6 => segment || opts1 & TX_TCPCS != 0,
                17 => opts1 & TX_UDPCS != 0,
                _ => false,
            };
            if segment || opts1 & TX_IPCS != 0 {
                let end = h.end;
                if segment {
                    h.set_length(data);
                } else if !h.v6 {
                    // As given, but for the checksum: the frame may be padded.
                    data[h.ip + 10..h.ip + 12].fill(0);
                    let sum = !offload::ones_sum(&data[h.ip..h.transport]);
                    data[h.ip + 10..h.ip + 12].copy_from_slice(&sum.to_be_bytes());
                    data.truncate(end);
                }
            }
            if transport && let Some(field) = h.checksum_offset() {
                let place = h.transport + usize::from(field);
                let pseudo = h.pseudo_sum(data, h.protocol, data.len() - h.transport);
                if let Some(bytes) = data.get_mut(place..place + 2) {
                    bytes.copy_from_slice(&pseudo.to_be_bytes());
                    offload.checksum = Some(Checksum {
                        start: h.transport as u16,
                        offset: field,
                    });
                }
                let mss = (opts1 >> 16 & 0x7ff) as u16;
                let head = data
                    .get(h.transport + 12)
                    .map_or(0, |b| usize::from(b >> 4) * 4);
                if segment && data.len() > h.transport + head + usize::from(mss) {
                    offload.segment = Some(Segment { payload_bytes: mss });
                }
            }
        }
        if opts2 & TX_TAGC != 0 && data.len() >= VLAN_AT {
            let [a, b] = tag(opts2).to_be_bytes();
            data.splice(VLAN_AT..VLAN_AT, [0x81, 0, a, b]);
            if let Some(c) = &mut offload.checksum {
                c.start += VLAN_BYTES as u16;
            }
        }
        self.send(host, data, &offload);
    }

    fn rx_descriptor(&self, n: u32) -> u64 {
        let base = u64::from(self.get(RDSAR + 4)) << 32 | u64::from(self.get(RDSAR));
        base.wrapping_add(u64::from(n) * DESCRIPTOR_BYTES)
    }

    /// True if the next descriptor is the card's.
    pub(super) fn ring_has_room(&self, host: &Host) -> bool {
        let Some(memory) = host.memory() else {
            return false;
        };
        memory
            .read_u32(self.rx_descriptor(self.rx_next))
            .is_ok_and(|opts1| opts1 & OWN != 0 && opts1 & RX_SIZE != 0)
    }

    /// What the checksums of a frame say.
    fn rx_checksums(frame: &[u8]) -> u32 {
        let Some(h) = offload::headers(frame).filter(|h| !h.v6) else {
            return 0;
        };
        let mut bits = match h.protocol {
            6 => RX_TCP,
            17 => RX_UDP,
            _ => RX_IP,
        };
        if !h.ip_checksum_right(frame) {
            bits |= RX_IPF;
        }
        if h.transport_checksum_right(frame) == Some(false) {
            bits |= if h.protocol == 6 { RX_TCPF } else { RX_UDPF };
        }
        bits
    }

    pub(super) fn receive_to_ring(
        &mut self,
        host: &mut Host,
        frame: &[u8],
        matched: Match,
    ) -> Reception {
        let Some(memory) = host.memory() else {
            return Reception::NoRoom;
        };
        if frame.len() > MAX_RECEIVE_BYTES {
            return Reception::Filtered;
        }
        let mut status = match matched {
            Match::Physical => RX_PAM,
            Match::Multicast => RX_MAR,
            Match::Broadcast => RX_BAR,
            Match::Any => 0,
        };
        let cpcr = self.get(CPCR);
        if cpcr & CPCR_RX_CHECKSUM != 0 {
            status |= Self::rx_checksums(frame);
        }
        let mut opts2 = 0;
        let mut packet;
        if cpcr & CPCR_RX_VLAN != 0 && frame.get(VLAN_AT..VLAN_AT + 2) == Some(&[0x81, 0]) {
            let tci = u16::from_le_bytes([frame[VLAN_AT + 2], frame[VLAN_AT + 3]]);
            opts2 = RX_TAVA | u32::from(tci);
            packet = frame.to_vec();
            packet.drain(VLAN_AT..VLAN_AT + VLAN_BYTES);
        } else {
            packet = frame.to_vec();
        }
        packet.extend_from_slice(&fcs(frame));
        // The whole packet must fit into descriptors that are the card's.
        let mut plan: Vec<(u32, u64, u32, usize)> = Vec::new();
        let mut room = 0;
        let mut next = self.rx_next;
        while room < packet.len() && plan.len() < RING as usize {
            let at = self.rx_descriptor(next);
            let mut d = [0; DESCRIPTOR_BYTES as usize];
            if memory.read(at, &mut d).is_err() {
                return self.missed(ISR_RXOVW | ISR_FOVW);
            }
            let word = |n: usize| u32::from_le_bytes([d[n], d[n + 1], d[n + 2], d[n + 3]]);
            let opts1 = word(0);
            let size = (opts1 & RX_SIZE) as usize;
            if opts1 & OWN == 0 || size == 0 {
                return self.missed(ISR_RXOVW);
            }
            plan.push((
                next,
                u64::from(word(12)) << 32 | u64::from(word(8)),
                opts1,
                size,
            ));
            room += size;
            next = if opts1 & EOR != 0 || next + 1 >= RING {
                0
            } else {
                next + 1
            };
        }
        if room < packet.len() {
            return self.missed(ISR_RXOVW);
        }
        let last = plan.len() - 1;
        let mut rest = packet.as_slice();
        for (n, (index, address, opts1, size)) in plan.into_iter().enumerate() {
            let (part, more) = rest.split_at(rest.len().min(size));
            rest = more;
            // Memory that is not there takes nothing.
            let _ = memory.write(address, part);
            let at = self.rx_descriptor(index);
            let mut now = opts1 & EOR | status | packet.len() as u32 & RX_SIZE;
            now |= if n == 0 { FS } else { 0 };
            now |= if n == last { LS } else { 0 };
            let _ = memory.write(at + 4, &opts2.to_le_bytes());
            // OWN goes last.
            let _ = memory.write(at, &now.to_le_bytes());
        }
        self.rx_next = next;
        self.raise(ISR_ROK);
        Reception::Stored
    }
}
