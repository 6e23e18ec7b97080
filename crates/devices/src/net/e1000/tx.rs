//! Transmission: descriptors, checksums, segmentation. 8254x manual §3.3 to §3.6.

use minicbor::{Decode, Encode};
use pyrite_net::offload::{self, Checksum, Offload, Segment};

use super::E1000;
use super::regs::*;
use crate::net::{HEADER_BYTES, Host};

const DESCRIPTOR_BYTES: u64 = 16;
/// LIMIT: bytes of one frame before segmentation: a full PAYLEN with its header.
const MAX_PACKET_BYTES: usize = (1 << 20) + 256;
/// LIMIT: bytes of a frame that is not segmented.
const MAX_PLAIN_BYTES: usize = 16 << 10;
const VLAN_AT: usize = 12;

/// DCMD and TUCMD bits, in the upper byte of the second double word.
const CMD_EOP: u32 = 1 << 24;
const CMD_IC: u32 = 1 << 26;
const CMD_TSE: u32 = 1 << 26;
const CMD_RS: u32 = 1 << 27;
const CMD_RPS: u32 = 1 << 28;
const CMD_DEXT: u32 = 1 << 29;
const CMD_VLE: u32 = 1 << 30;
const CMD_IDE: u32 = 1 << 31;
const TUCMD_TCP: u32 = 1 << 24;
const TUCMD_IP: u32 = 1 << 25;
/// DTYP, bits 23:20: 0 context, 1 data.
const DTYP: u32 = 15 << 20;
const DTYP_DATA: u32 = 1 << 20;
const POPTS_IXSM: u8 = 1 << 0;
const POPTS_TXSM: u8 = 1 << 1;
const STATUS_DD: u8 = 1 << 0;

/// Offsets for checksums and, for segmentation, lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Context {
    /// First byte, place and last byte of the IP checksum.
    #[n(0)]
    ipcss: u8,
    #[n(1)]
    ipcso: u8,
    #[n(2)]
    ipcse: u16,
    /// The same of TCP or UDP; an end of 0 is that of the packet.
    #[n(3)]
    tucss: u8,
    #[n(4)]
    tucso: u8,
    #[n(5)]
    tucse: u16,
    /// Payload of a packet that is segmented.
    #[n(6)]
    paylen: u32,
    /// Length of its headers.
    #[n(7)]
    hdrlen: u8,
    /// Payload of a segment.
    #[n(8)]
    mss: u16,
    #[n(9)]
    tcp: bool,
    #[n(10)]
    ipv4: bool,
}

/// A packet that is being gathered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Packet {
    #[cbor(n(0), with = "minicbor::bytes")]
    data: Vec<u8>,
    /// POPTS of the first descriptor.
    #[n(1)]
    popts: u8,
    #[n(2)]
    segment: bool,
    #[n(3)]
    begun: bool,
    /// A buffer could not be read, or there is too much: the packet is dropped at its end.
    #[n(4)]
    bad: bool,
}

impl Packet {
    pub(super) fn valid(&self) -> bool {
        self.data.len() <= MAX_PACKET_BYTES
    }

    fn gather(&mut self, host: &Host, address: u64, length: usize) {
        let limit = if self.segment {
            MAX_PACKET_BYTES
        } else {
            MAX_PLAIN_BYTES
        };
        let at = self.data.len();
        let Some(memory) = host.memory() else {
            self.bad = true;
            return;
        };
        if at + length > limit {
            self.bad = true;
            return;
        }
        self.data.resize(at + length, 0);
        let Some(place) = self.data.get_mut(at..) else {
            return;
        };
        self.bad |= memory.read(address, place).is_err();
    }
}

/// Sums `data[start..=end]` (an end of 0 or beyond the data is their end) into the place `at`.
fn insert_checksum(data: &mut [u8], start: u8, at: u8, end: u16) {
    let last = match usize::from(end) {
        0 => data.len(),
        n => data.len().min(n + 1),
    };
    let Some(range) = data.get(usize::from(start)..last) else {
        return;
    };
    let sum = !offload::ones_sum(range);
    if let Some(place) = data.get_mut(usize::from(at)..)
        && let Some(place) = place.first_chunk_mut()
    {
        *place = sum.to_be_bytes();
    }
}

fn insert_tag(data: &mut Vec<u8>, ethertype: u32, special: u16) {
    if data.len() >= VLAN_AT {
        let [a, b] = (ethertype as u16).to_be_bytes();
        let [c, d] = special.to_be_bytes();
        data.splice(VLAN_AT..VLAN_AT, [a, b, c, d]);
    }
}

impl E1000 {
    /// Sends what is between TDH and TDT.
    pub(super) fn transmit(&mut self, host: &mut Host) {
        let Some(memory) = host.memory() else { return };
        let count = self.get(TDLEN) / DESCRIPTOR_BYTES as u32;
        if self.get(TCTL) & TCTL_EN == 0 || count == 0 {
            return;
        }
        let base = u64::from(self.get(TDBAH)) << 32 | u64::from(self.get(TDBAL));
        let mut head = self.get(TDH);
        if head == self.get(TDT) {
            return;
        }
        // A ring's worth at most: a tail beyond the ring is never met.
        for _ in 0..count {
            if head == self.get(TDT) {
                break;
            }
            if head >= count {
                head = 0;
                continue;
            }
            let at = base.wrapping_add(u64::from(head) * DESCRIPTOR_BYTES);
            let mut d = [0; DESCRIPTOR_BYTES as usize];
            if memory.read(at, &mut d).is_err() {
                // No memory there: the hardware would stop with a bus error.
                break;
            }
            let report = self.descriptor(host, &d);
            if let Some(ide) = report {
                // Only the status: the driver may look at the rest.
                let _ = memory.write(at + 12, &[d[12] | STATUS_DD]);
                self.tx_done(host, ide);
            }
            head = if head + 1 >= count { 0 } else { head + 1 };
        }
        self.set(TDH, head);
        if head == self.get(TDT) {
            self.raise(ICR_TXQE);
        }
    }

    /// Processes a descriptor. `Some` if its status is to be written back; the value says whether
    /// the interrupt may be delayed.
    fn descriptor(&mut self, host: &mut Host, d: &[u8; 16]) -> Option<bool> {
        let address = u64::from_le_bytes([d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]);
        let low = u32::from_le_bytes([d[8], d[9], d[10], d[11]]);
        let popts = d[13];
        let special = u16::from_le_bytes([d[14], d[15]]);
        let report = (low & (CMD_RS | CMD_RPS) != 0).then_some(low & CMD_IDE != 0);
        if low & CMD_DEXT != 0 && low & DTYP != DTYP_DATA {
            self.context(d, low);
            return report;
        }
        let mut packet = std::mem::take(&mut self.packet);
        let extended = low & CMD_DEXT != 0;
        let length = if extended {
            if !packet.begun {
                packet.popts = popts;
                packet.segment = low & CMD_TSE != 0;
            }
            low & 0xf_ffff
        } else {
            low & 0xffff
        };
        packet.begun = true;
        packet.gather(host, address, length as usize);
        if low & CMD_EOP == 0 {
            self.packet = packet;
            return report;
        }
        let tag = (low & CMD_VLE != 0 && self.get(CTRL) & CTRL_VME != 0).then_some(special);
        if packet.bad || packet.data.len() < HEADER_BYTES {
            host.dropped();
        } else if extended {
            self.send_extended(host, &mut packet, tag);
        } else {
            if low & CMD_IC != 0 {
                // CSO and CSS.
                insert_checksum(&mut packet.data, d[13], d[10], 0);
            }
            self.send(host, &mut packet.data, tag, &Offload::NONE);
        }
        // The allocation serves the next packet.
        packet.data.clear();
        self.packet = Packet {
            data: packet.data,
            ..Packet::default()
        };
        report
    }

    /// A context descriptor. §3.3.6.
    fn context(&mut self, d: &[u8; 16], low: u32) {
        let word = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
        let context = Context {
            ipcss: d[0],
            ipcso: d[1],
            ipcse: word(2),
            tucss: d[4],
            tucso: d[5],
            tucse: word(6),
            paylen: low & 0xf_ffff,
            hdrlen: d[13],
            mss: word(14),
            tcp: low & TUCMD_TCP != 0,
            ipv4: low & TUCMD_IP != 0,
        };
        // There is one context for segmentation and one for the rest.
        if low & CMD_TSE != 0 {
            self.contexts[1] = context;
        } else {
            self.contexts[0] = context;
        }
    }

    fn send_extended(&mut self, host: &mut Host, packet: &mut Packet, tag: Option<u16>) {
        let c = self.contexts[usize::from(packet.segment)];
        let data = &mut packet.data;
        if packet.segment {
            return self.send_segmented(host, data, &c, tag);
        }
        if packet.popts & POPTS_IXSM != 0 {
            insert_checksum(data, c.ipcss, c.ipcso, c.ipcse);
        }
        let mut offload = Offload::NONE;
        if packet.popts & POPTS_TXSM != 0 {
            let whole = c.tucse == 0 || usize::from(c.tucse) + 1 >= data.len();
            let inside = usize::from(c.tucso) + 2 <= data.len();
            if whole && inside && c.tucso >= c.tucss {
                offload.checksum = Some(Checksum {
                    start: u16::from(c.tucss),
                    offset: u16::from(c.tucso - c.tucss),
                });
            } else {
                insert_checksum(data, c.tucss, c.tucso, c.tucse);
            }
        }
        self.send(host, data, tag, &offload);
    }

    /// A TCP packet to be cut. §3.5.
    fn send_segmented(
        &mut self,
        host: &mut Host,
        data: &mut Vec<u8>,
        c: &Context,
        tag: Option<u16>,
    ) {
        let expected = usize::from(c.hdrlen) + c.paylen as usize;
        let Some(h) = offload::headers(data).filter(|h| h.ip == usize::from(c.ipcss)) else {
            return host.dropped();
        };
        let tcp = usize::from(c.tucss);
        if !c.tcp || c.ipv4 == h.v6 || tcp < h.transport || data.len() > expected || c.mss == 0 {
            return host.dropped();
        }
        // The driver leaves the length out of the header and of the pseudo-header's sum.
        if h.set_length(data).is_none() {
            return host.dropped();
        }
        let pseudo = h.pseudo_sum(data, 6, data.len().saturating_sub(tcp));
        let Some(field) = data.get_mut(tcp + 16..).and_then(|f| f.first_chunk_mut()) else {
            return host.dropped();
        };
        *field = pseudo.to_be_bytes();
        let several = data.len() > usize::from(c.hdrlen) + usize::from(c.mss);
        let offload = Offload {
            checksum: Some(Checksum {
                start: u16::from(c.tucss),
                offset: 16,
            }),
            segment: several.then_some(Segment {
                payload_bytes: c.mss,
            }),
        };
        self.count(TSCTC, 1);
        self.send(host, data, tag, &offload);
    }

    fn send(&mut self, host: &mut Host, data: &mut Vec<u8>, tag: Option<u16>, offload: &Offload) {
        let mut offload = *offload;
        if let Some(special) = tag {
            insert_tag(data, self.get(VET), special);
            if let Some(c) = &mut offload.checksum {
                c.start += 4;
            }
        }
        self.count_frame(data, [PTC64, TPT, TOTL, GPTC, GOTCL, BPTC, MPTC]);
        if self.loops_back() {
            let mut frames = Vec::new();
            offload::complete(data, &offload, &mut |f| frames.push(f.to_vec()));
            for mut f in frames {
                f.resize(f.len().max(crate::net::MIN_FRAME_BYTES), 0);
                let _ = self.receive_frame(host, &f);
            }
        } else if self.phy.link(host.link_up()) {
            host.transmit(data, &offload);
        } else {
            host.dropped();
        }
    }
}
