//! C mode: four transmit buffers, and one receive buffer that is a ring of bytes. §5.

use pyrite_net::Offload;

use super::*;
use crate::net::fcs::fcs;

const TSD_SIZE: u32 = 0x1fff;
const TSD_OWN: u32 = 1 << 13;
const TSD_TOK: u32 = 1 << 15;
const TSD_TABT: u32 = 1 << 30;
/// Longest packet that is sent. §6.2: the size is limited to 1792 bytes.
const MAX_SEND_BYTES: u32 = 1792;

const RX_ROK: u16 = 1 << 0;
const RX_BAR: u16 = 1 << 13;
const RX_PAM: u16 = 1 << 14;
const RX_MAR: u16 = 1 << 15;
/// Status and length before a packet, FCS after it.
const HEAD_BYTES: usize = 4;
const FCS_BYTES: usize = 4;
/// CAPR is so much behind the place of the next packet to be read. §6.7.
const CAPR_OFFSET: u32 = 16;
/// Longest packet that is received.
const MAX_RECEIVE_BYTES: usize = 1792;

impl<const PLUS: bool> Rtl8139<PLUS> {
    /// Sends transmit buffer `n` if it is the card's.
    pub(super) fn transmit_buffer(&mut self, host: &mut Host, n: u8) {
        let tsd = self.get(TSD0 + 4 * n);
        let Some(memory) = host.memory() else { return };
        if self.get(CR) & CR_TE == 0 || tsd & TSD_OWN != 0 {
            return;
        }
        let size = tsd & TSD_SIZE;
        let mut data = vec![0; size.min(MAX_SEND_BYTES) as usize];
        let address = u64::from(self.get(TSAD0 + 4 * n));
        if size > MAX_SEND_BYTES || memory.read(address, &mut data).is_err() {
            self.set(TSD0 + 4 * n, tsd | TSD_OWN | TSD_TABT);
            self.raise(ISR_TER);
            host.dropped();
            return;
        }
        self.set(TSD0 + 4 * n, tsd | TSD_OWN | TSD_TOK);
        self.raise(ISR_TOK);
        self.send(host, &mut data, &Offload::NONE);
    }

    /// Bytes of the receive buffer: RCR.RBLEN.
    fn buffer_bytes(&self) -> u32 {
        8192 << (self.get(RCR) >> 11 & 3)
    }

    fn write_place(&self) -> u32 {
        self.get(CBR) % self.buffer_bytes()
    }

    fn read_place(&self) -> u32 {
        (self.get(CAPR) + CAPR_OFFSET) % self.buffer_bytes()
    }

    pub(super) fn ring_is_empty(&self) -> bool {
        self.write_place() == self.read_place()
    }

    /// True if a packet of this length, with what goes around it, leaves a gap.
    pub(super) fn buffer_has_room(&self, len: usize) -> bool {
        let size = self.buffer_bytes();
        let free = (size + self.read_place() - self.write_place()) % size;
        let needed = (HEAD_BYTES + len + FCS_BYTES).next_multiple_of(4);
        free == 0 || needed < free as usize
    }

    pub(super) fn receive_to_buffer(
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
        if !self.buffer_has_room(frame.len()) {
            return self.missed(ISR_RXOVW);
        }
        let status = RX_ROK
            | match matched {
                Match::Physical => RX_PAM,
                Match::Multicast => RX_MAR,
                Match::Broadcast => RX_BAR,
                Match::Any => 0,
            };
        let length = (frame.len() + FCS_BYTES) as u16;
        let mut packet = Vec::with_capacity(frame.len() + 12);
        packet.extend_from_slice(&status.to_le_bytes());
        packet.extend_from_slice(&length.to_le_bytes());
        packet.extend_from_slice(frame);
        packet.extend_from_slice(&fcs(frame));
        packet.resize(packet.len().next_multiple_of(4), 0);
        let (base, size) = (u64::from(self.get(RBSTART)), self.buffer_bytes());
        let at = self.write_place();
        // With WRAP a packet goes on behind the end; with 64 KiB it cannot. §6.9.
        let linear = self.get(RCR) & RCR_WRAP != 0 && size < 65_536;
        let first = if linear {
            packet.len()
        } else {
            packet.len().min((size - at) as usize)
        };
        let (one, two) = packet.split_at(first);
        // Memory that is not there takes nothing.
        let _ = memory.write(base + u64::from(at), one);
        let _ = memory.write(base, two);
        self.set(CBR, (at + packet.len() as u32) % size);
        self.raise(ISR_ROK);
        Reception::Stored
    }
}
