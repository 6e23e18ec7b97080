//! Reception: address filter, descriptors, checksums. 8254x manual §3.2.

use pyrite_net::offload;

use super::E1000;
use super::regs::*;
use crate::net::fcs::fcs;
use crate::net::{Host, Reception};

const DESCRIPTOR_BYTES: u64 = 16;
/// Longest frame without FCS that is no long packet; with a VLAN tag, four more.
const MAX_FRAME_BYTES: usize = 1514;
/// Longest frame that the card stores.
const MAX_LONG_BYTES: usize = 16_384;
const FCS_BYTES: usize = 4;
const VLAN_AT: usize = 12;
const VLAN_BYTES: usize = 4;

const STATUS_DD: u8 = 1 << 0;
const STATUS_EOP: u8 = 1 << 1;
const STATUS_IXSM: u8 = 1 << 2;
const STATUS_VP: u8 = 1 << 3;
const STATUS_TCPCS: u8 = 1 << 5;
const STATUS_IPCS: u8 = 1 << 6;
const STATUS_PIF: u8 = 1 << 7;
const ERROR_TCPE: u8 = 1 << 5;
const ERROR_IPE: u8 = 1 << 6;

/// What the filter says of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    None,
    Exact,
    /// By hash: the driver has to look again.
    Inexact,
}

impl E1000 {
    /// Bytes of a receive buffer. §3.2.2.
    fn buffer_bytes(&self) -> usize {
        let rctl = self.get(RCTL);
        match (rctl & RCTL_BSEX != 0, rctl >> 16 & 3) {
            (false, n) => 2048 >> n,
            // 0 is reserved.
            (true, 0) => 2048,
            (true, n) => 32_768 >> n,
        }
    }

    fn rx_ring(&self) -> u32 {
        self.get(RDLEN) / DESCRIPTOR_BYTES as u32
    }

    /// Descriptors that the driver has given.
    fn rx_free(&self) -> u32 {
        let (count, head, tail) = (self.rx_ring(), self.get(RDH), self.get(RDT));
        if count == 0 || head >= count || tail >= count {
            return 0;
        }
        if tail >= head {
            tail - head
        } else {
            count - head + tail
        }
    }

    pub(super) fn has_room(&self, host: &Host) -> bool {
        let enabled = self.get(RCTL) & RCTL_EN != 0 && self.phy.link(host.link_up());
        let room = self.rx_free() as usize * self.buffer_bytes();
        enabled && host.memory().is_some() && room >= MAX_FRAME_BYTES + VLAN_BYTES + FCS_BYTES
    }

    fn filter(&self, frame: &[u8]) -> Match {
        let rctl = self.get(RCTL);
        let Some(to) = frame.first_chunk::<6>() else {
            return Match::None;
        };
        if rctl & RCTL_VFE != 0 && self.is_tagged(frame) {
            let tag = u16::from_be_bytes([frame[VLAN_AT + 2], frame[VLAN_AT + 3]]);
            let id = u32::from(tag & 0xfff);
            let entry = self.get(VFTA + (id >> 5) * 4);
            let cfi = u32::from(tag >> 12 & 1);
            let refused = rctl & RCTL_CFIEN != 0 && cfi != (rctl & RCTL_CFI) >> 20;
            if entry >> (id & 31) & 1 == 0 || refused {
                return Match::None;
            }
        }
        let multicast = to[0] & 1 != 0;
        if *to == [0xff; 6] && rctl & RCTL_BAM != 0 {
            return Match::Exact;
        }
        if (multicast && rctl & RCTL_MPE != 0) || (!multicast && rctl & RCTL_UPE != 0) {
            return Match::Exact;
        }
        for n in 0..16 {
            let (low, high) = (self.get(RAL + n * 8), self.get(RAL + n * 8 + 4));
            let [a, b, c, d] = low.to_le_bytes();
            let [e, f, ..] = high.to_le_bytes();
            // ASEL: destination address.
            if high & RAH_AV != 0 && high >> 16 & 3 == 0 && *to == [a, b, c, d, e, f] {
                return Match::Exact;
            }
        }
        if multicast && self.multicast_hash(to) {
            return Match::Inexact;
        }
        Match::None
    }

    /// §13.5.1: RCTL.MO chooses 12 bits of the last two bytes.
    fn multicast_hash(&self, to: &[u8; 6]) -> bool {
        let shift = [4, 3, 2, 0][(self.get(RCTL) >> 12 & 3) as usize];
        let hash = u32::from(u16::from_le_bytes([to[4], to[5]])) >> shift & 0xfff;
        self.get(MTA + (hash >> 5) * 4) >> (hash & 31) & 1 != 0
    }

    fn is_tagged(&self, frame: &[u8]) -> bool {
        let ethertype = frame.get(VLAN_AT..).and_then(|f| f.first_chunk::<4>());
        ethertype.is_some_and(|e| u32::from(u16::from_be_bytes([e[0], e[1]])) == self.get(VET))
    }

    /// Status and errors of the checksums. §3.2.9.
    fn checksums(&self, frame: &[u8]) -> (u8, u8) {
        let rxcsum = self.get(RXCSUM);
        let (mut status, mut errors) = (0, 0);
        let headers = offload::headers(frame);
        let Some(h) = headers.filter(|_| rxcsum & (RXCSUM_IPOFLD | RXCSUM_TUOFLD) != 0) else {
            return (STATUS_IXSM, 0);
        };
        if rxcsum & RXCSUM_IPOFLD != 0 && !h.v6 {
            status |= STATUS_IPCS;
            if !h.ip_checksum_right(frame) {
                errors |= ERROR_IPE;
            }
        }
        if rxcsum & RXCSUM_TUOFLD != 0
            && let Some(right) = h.transport_checksum_right(frame)
        {
            status |= STATUS_TCPCS;
            if !right {
                errors |= ERROR_TCPE;
            }
        }
        (if status == 0 { STATUS_IXSM } else { status }, errors)
    }

    /// A frame from the wire or looped back.
    pub(super) fn receive_frame(&mut self, host: &mut Host, frame: &[u8]) -> Reception {
        let rctl = self.get(RCTL);
        let Some(memory) = host.memory() else {
            return Reception::NoRoom;
        };
        if rctl & RCTL_EN == 0 || !self.phy.link(host.link_up()) {
            return Reception::NoRoom;
        }
        let tagged = self.is_tagged(frame);
        let longest = MAX_FRAME_BYTES + if tagged { VLAN_BYTES } else { 0 };
        let too_long = frame.len() > longest && rctl & (RCTL_LPE | RCTL_SBP) == 0;
        if too_long || frame.len() > MAX_LONG_BYTES {
            self.count(ROC, 1);
            return Reception::Filtered;
        }
        let matched = self.filter(frame);
        if matched == Match::None {
            return Reception::Filtered;
        }
        let strip = tagged && self.get(CTRL) & CTRL_VME != 0;
        let crc = if rctl & RCTL_SECRC == 0 { FCS_BYTES } else { 0 };
        let taken_out = if strip { VLAN_BYTES } else { 0 };
        let total = frame.len() - taken_out + crc;
        let buffer = self.buffer_bytes();
        let needed = total.div_ceil(buffer) as u32;
        if needed > self.rx_free() {
            self.raise(ICR_RXO);
            self.count(MPC, 1);
            self.count(RNBC, 1);
            return Reception::NoRoom;
        }
        let (mut status, errors) = self.checksums(frame);
        status |= STATUS_DD;
        let mut special = 0;
        if strip {
            status |= STATUS_VP;
            special = u16::from_be_bytes([frame[VLAN_AT + 2], frame[VLAN_AT + 3]]);
        }
        if matched == Match::Inexact {
            status |= STATUS_PIF;
        }
        // §3.2.9.1: an unadjusted sum from PCSS to the end.
        let from = (self.get(RXCSUM) & 0xff) as usize;
        let packet_sum = offload::ones_sum(frame.get(from..).unwrap_or_default());
        let check = if crc > 0 { fcs(frame) } else { [0; 4] };
        let without_tag;
        let body: &[u8] = if strip {
            without_tag = [&frame[..VLAN_AT], &frame[VLAN_AT + VLAN_BYTES..]].concat();
            &without_tag
        } else {
            frame
        };
        let base = u64::from(self.get(RDBAH)) << 32 | u64::from(self.get(RDBAL));
        let count = self.rx_ring();
        let mut head = self.get(RDH);
        let mut done = 0;
        while done < total {
            let at = base.wrapping_add(u64::from(head) * DESCRIPTOR_BYTES);
            let n = buffer.min(total - done);
            let last = done + n == total;
            let mut address = [0; 8];
            if memory.read(at, &mut address).is_ok() {
                let address = u64::from_le_bytes(address);
                // Data, then what is left of the FCS. Memory that is not there takes nothing.
                let data = body.get(done..body.len().min(done + n)).unwrap_or_default();
                let _ = memory.write(address, data);
                if data.len() < n {
                    let start = (done + data.len()).saturating_sub(body.len());
                    let rest = &check[start..start + n - data.len()];
                    let _ = memory.write(address.wrapping_add(data.len() as u64), rest);
                }
                let mut d = [0; 8];
                d[..2].copy_from_slice(&(n as u16).to_le_bytes());
                d[2..4].copy_from_slice(&packet_sum.to_le_bytes());
                d[5] = errors;
                d[6..].copy_from_slice(&special.to_le_bytes());
                let _ = memory.write(at + 8, &d);
                let now = status | if last { STATUS_EOP } else { 0 };
                // The driver looks at the status first, so it comes last.
                let _ = memory.write(at + 12, &[now]);
            }
            done += n;
            head = if head + 1 >= count { 0 } else { head + 1 };
        }
        self.set(RDH, head);
        self.count_frame(frame, [PRC64, TPR, TORL, GPRC, GORCL, BPRC, MPRC]);
        self.rx_done(host);
        // §13.4.22, RDMTS: a half, a quarter or an eighth of the ring.
        if self.rx_free() <= count >> ((rctl >> 8 & 3) + 1).min(3) {
            self.raise(ICR_RXDMT0);
        }
        Reception::Stored
    }
}
