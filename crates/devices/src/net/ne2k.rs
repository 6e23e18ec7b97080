//! NE2000 on PCI: a Realtek RTL8029AS.
//!
//! National Semiconductor's data sheet "DP8390D/NS32490D" is meant by section numbers here;
//! registers beyond it are those of Realtek's "RTL8029AS".
//!
//! ```text
//! BAR 0, 32 ports: 00 CR, 01-0F registers of four pages, 10 data port, 18 reset port
//! card memory: 0000 address PROM, 4000-BFFF packet buffer in pages of 256 bytes
//! ```

use minicbor::{Decode, Encode};
use pyrite_net::Offload;
use pyrite_state::Inspect;
use pyrite_vdev::BarKind;
use pyrite_vdev::pci::PciIds;

use super::fcs::multicast_bit;
use super::{Host, Mac, Model, Reception};

#[cfg(test)]
mod tests;

const MEMORY_BYTES: usize = 0xc000;
const BUFFER_START: usize = 0x4000;
const PAGE_BYTES: usize = 256;
/// The address PROM has each byte twice, as the bus is 16 bits wide, and marks at its end.
const PROM_BYTES: usize = 32;
const DATA_PORT: u64 = 0x10;
const RESET_PORT: u64 = 0x18;

const CR_STP: u8 = 1 << 0;
const CR_STA: u8 = 1 << 1;
const CR_TXP: u8 = 1 << 2;
const CR_RD: u8 = 7 << 3;
const CR_RD_ABORT: u8 = 4 << 3;

const ISR_PRX: u8 = 1 << 0;
const ISR_PTX: u8 = 1 << 1;
const ISR_TXE: u8 = 1 << 3;
const ISR_OVW: u8 = 1 << 4;
const ISR_RDC: u8 = 1 << 6;
const ISR_RST: u8 = 1 << 7;

const TSR_PTX: u8 = 1 << 0;
const TSR_ABT: u8 = 1 << 3;
const RSR_PRX: u8 = 1 << 0;
const RSR_PHY: u8 = 1 << 5;

const RCR_AB: u8 = 1 << 2;
const RCR_AM: u8 = 1 << 3;
const RCR_PRO: u8 = 1 << 4;
const RCR_MON: u8 = 1 << 5;
const TCR_LB: u8 = 3 << 1;
/// Header of a packet in the buffer.
const HEAD_BYTES: usize = 4;
/// Longest frame without FCS.
const MAX_FRAME_BYTES: usize = 1518;

/// Registers of the chip, written or read as §10 has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    cr: u8,
    #[n(1)]
    pstart: u8,
    #[n(2)]
    pstop: u8,
    #[n(3)]
    bnry: u8,
    #[n(4)]
    curr: u8,
    #[n(5)]
    tpsr: u8,
    #[n(6)]
    tbcr: u16,
    #[n(7)]
    isr: u8,
    #[n(8)]
    imr: u8,
    #[n(9)]
    rsar: u16,
    #[n(10)]
    rbcr: u16,
    #[n(11)]
    rcr: u8,
    #[n(12)]
    tcr: u8,
    #[n(13)]
    dcr: u8,
    #[n(14)]
    tsr: u8,
    #[n(15)]
    rsr: u8,
    #[n(16)]
    par: Mac,
    #[n(17)]
    mar: [u8; 8],
    #[n(18)]
    missed: u8,
}

/// The card.
pub struct Ne2k {
    mac: Mac,
    r: Registers,
    memory: Box<[u8; MEMORY_BYTES]>,
}

/// The saved form.
#[derive(Encode, Decode)]
#[cbor(map)]
pub struct Saved {
    #[n(0)]
    registers: Registers,
    #[cbor(n(1), with = "minicbor::bytes")]
    buffer: Vec<u8>,
}

impl Ne2k {
    /// The reset port, §11: the chip stops; what it was told stays.
    fn reset(&mut self) {
        self.r.cr = CR_STP | CR_RD_ABORT;
        self.r.isr = ISR_RST;
        self.r.imr = 0;
        self.r.rbcr = 0;
    }

    fn loops_back(&self) -> bool {
        self.r.tcr & TCR_LB != 0
    }

    fn command(&mut self, host: &mut Host, value: u8) {
        let r = &mut self.r;
        r.cr = value & !CR_TXP;
        if value & CR_STP != 0 {
            r.isr |= ISR_RST;
            return;
        }
        r.isr &= !ISR_RST;
        // A remote transfer of no bytes is over at once.
        let transfers = matches!(value & CR_RD, 0x08 | 0x10);
        if transfers && r.rbcr == 0 {
            r.isr |= ISR_RDC;
        }
        if value & CR_TXP != 0 && value & CR_STA != 0 {
            self.transmit(host);
        }
    }

    fn transmit(&mut self, host: &mut Host) {
        let start = usize::from(self.r.tpsr) * PAGE_BYTES;
        let length = usize::from(self.r.tbcr);
        let data = self.memory.get(start..start + length);
        match data.filter(|_| start >= BUFFER_START && length <= MAX_FRAME_BYTES) {
            Some(data) => {
                let mut frame = data.to_vec();
                if self.loops_back() {
                    frame.resize(length.max(super::MIN_FRAME_BYTES), 0);
                    self.receive_frame(&frame);
                } else {
                    host.transmit(&mut frame, &Offload::NONE);
                }
                self.r.tsr = TSR_PTX;
                self.r.isr |= ISR_PTX;
            }
            None => {
                host.dropped();
                self.r.tsr = TSR_ABT;
                self.r.isr |= ISR_TXE;
            }
        }
    }

    /// A byte by the data port: remote DMA, §9.
    fn remote(&mut self, store: Option<u8>) -> u8 {
        let r = &mut self.r;
        let write = store.is_some();
        let wanted = if write { 0x10 } else { 0x08 };
        if r.rbcr == 0 || r.cr & CR_RD != wanted {
            return 0xff;
        }
        let at = usize::from(r.rsar);
        let mut value = 0xff;
        match store {
            // The PROM cannot be written.
            Some(byte) if at >= BUFFER_START => {
                if let Some(b) = self.memory.get_mut(at) {
                    *b = byte;
                }
            }
            Some(_) => {}
            None => value = self.memory.get(at).copied().unwrap_or(0xff),
        }
        r.rsar = r.rsar.wrapping_add(1);
        // The receive ring closes at its end.
        if r.rsar == u16::from(r.pstop) << 8 && r.rsar != 0 {
            r.rsar = u16::from(r.pstart) << 8;
        }
        r.rbcr -= 1;
        if r.rbcr == 0 {
            r.isr |= ISR_RDC;
        }
        value
    }

    fn load(&mut self, register: u8) -> u8 {
        let r = &mut self.r;
        let [rsar_low, rsar_high] = r.rsar.to_le_bytes();
        match (r.cr >> 6, register) {
            (_, 0) => r.cr,
            (0, 0x01) => 0,
            (0, 0x02) => r.curr,
            (0, 0x03) => r.bnry,
            (0, 0x04) => r.tsr,
            (0, 0x07) => r.isr,
            (0, 0x08) => rsar_low,
            (0, 0x09) => rsar_high,
            // The RTL8029AS tells itself from others.
            (0, 0x0a) => 0x50,
            (0, 0x0b) => 0x43,
            (0, 0x0c) => r.rsr,
            (0, 0x0f) => std::mem::take(&mut r.missed),
            (1, n @ 0x01..=0x06) => r.par[usize::from(n - 1)],
            (1, 0x07) => r.curr,
            (1, n @ 0x08..=0x0f) => r.mar[usize::from(n - 8)],
            (2, 0x01) => r.pstart,
            (2, 0x02) => r.pstop,
            (2, 0x04) => r.tpsr,
            (2, 0x0c) => r.rcr | 0xc0,
            (2, 0x0d) => r.tcr | 0xe0,
            (2, 0x0e) => r.dcr | 0x80,
            (2, 0x0f) => r.imr | 0x80,
            // CONFIG3: full duplex.
            (3, 0x06) => 0x40,
            _ => 0,
        }
    }

    fn store(&mut self, host: &mut Host, register: u8, value: u8) {
        if register == 0 {
            return self.command(host, value);
        }
        let r = &mut self.r;
        let low = |word: u16| word & 0xff00 | u16::from(value);
        let high = |word: u16| word & 0x00ff | u16::from(value) << 8;
        match (r.cr >> 6, register) {
            (0, 0x01) => r.pstart = value,
            (0, 0x02) => r.pstop = value,
            (0, 0x03) => r.bnry = value,
            (0, 0x04) => r.tpsr = value,
            (0, 0x05) => r.tbcr = low(r.tbcr),
            (0, 0x06) => r.tbcr = high(r.tbcr),
            // RST is no cause that can be taken back; §10.3.
            (0, 0x07) => r.isr &= !(value & !ISR_RST),
            (0, 0x08) => r.rsar = low(r.rsar),
            (0, 0x09) => r.rsar = high(r.rsar),
            (0, 0x0a) => r.rbcr = low(r.rbcr),
            (0, 0x0b) => r.rbcr = high(r.rbcr),
            (0, 0x0c) => r.rcr = value & 0x3f,
            (0, 0x0d) => r.tcr = value & 0x1f,
            (0, 0x0e) => r.dcr = value & 0x7f,
            (0, 0x0f) => r.imr = value & 0x7f,
            (1, n @ 0x01..=0x06) => r.par[usize::from(n - 1)] = value,
            (1, 0x07) => r.curr = value,
            (1, n @ 0x08..=0x0f) => r.mar[usize::from(n - 8)] = value,
            _ => {}
        }
    }

    /// Pages of the ring: first, count. `None` for a ring that cannot be.
    fn ring(&self) -> Option<(usize, usize)> {
        let (start, stop) = (usize::from(self.r.pstart), usize::from(self.r.pstop));
        let inside = start * PAGE_BYTES >= BUFFER_START && stop * PAGE_BYTES <= MEMORY_BYTES;
        (inside && start < stop).then(|| (start, stop - start))
    }

    /// Pages between CURR and BNRY. §7.
    fn free_pages(&self) -> usize {
        let Some((start, count)) = self.ring() else {
            return 0;
        };
        let place = |page: u8| usize::from(page).checked_sub(start).filter(|p| *p < count);
        match (place(self.r.curr), place(self.r.bnry)) {
            (Some(curr), Some(bnry)) if curr == bnry => count,
            (Some(curr), Some(bnry)) => (count + bnry - curr) % count,
            // The driver has not set one of them up yet.
            _ => 0,
        }
    }

    fn accepts(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else {
            return false;
        };
        let rcr = self.r.rcr;
        if rcr & RCR_PRO != 0 && to[0] & 1 == 0 {
            return true;
        }
        if *to == [0xff; 6] {
            return rcr & RCR_AB != 0;
        }
        if to[0] & 1 != 0 {
            let bit = multicast_bit(to);
            let byte = self.r.mar[(bit / 8) as usize];
            return rcr & RCR_AM != 0 && byte >> (bit % 8) & 1 != 0;
        }
        *to == self.r.par
    }

    fn started(&self) -> bool {
        self.r.cr & (CR_STP | CR_STA) == CR_STA
    }

    fn receive_frame(&mut self, frame: &[u8]) -> Reception {
        if !self.started() {
            return Reception::NoRoom;
        }
        if frame.len() > MAX_FRAME_BYTES || self.r.rcr & RCR_MON != 0 || !self.accepts(frame) {
            return Reception::Filtered;
        }
        let total = HEAD_BYTES + frame.len();
        let pages = total.div_ceil(PAGE_BYTES);
        let Some((start, count)) = self.ring().filter(|_| pages < self.free_pages()) else {
            self.r.isr |= ISR_OVW;
            self.r.missed = self.r.missed.saturating_add(1);
            return Reception::NoRoom;
        };
        let first = usize::from(self.r.curr) - start;
        let next = (start + (first + pages) % count) as u8;
        let multicast = frame.first().is_some_and(|b| b & 1 != 0);
        let status = RSR_PRX | if multicast { RSR_PHY } else { 0 };
        let [low, high] = (total as u16).to_le_bytes();
        let bytes = [status, next, low, high]
            .into_iter()
            .chain(frame.iter().copied());
        let (base, ring) = (start * PAGE_BYTES, count * PAGE_BYTES);
        for (n, b) in bytes.enumerate() {
            let at = base + (first * PAGE_BYTES + n) % ring;
            if let Some(place) = self.memory.get_mut(at) {
                *place = b;
            }
        }
        self.r.curr = next;
        self.r.rsr = status;
        self.r.isr |= ISR_PRX;
        Reception::Stored
    }
}

/// DCR: remote transfers are of words.
const DCR_WTS: u8 = 1;

impl Model for Ne2k {
    const KIND: &'static str = "ne2k-pci";
    const VERSION: u16 = 1;
    const IDS: PciIds = PciIds {
        vendor_id: 0x10ec,
        device_id: 0x8029,
        revision: 0,
        class: 0x02_00_00,
        subsystem_vendor_id: 0x10ec,
        subsystem_id: 0x8029,
    };
    const BARS: &'static [(u8, BarKind, u64)] = &[(0, BarKind::Io, 32)];
    type Saved = Saved;

    fn new(mac: Mac) -> Ne2k {
        Ne2k {
            mac,
            r: Registers::default(),
            memory: Box::new([0; MEMORY_BYTES]),
        }
    }

    fn power_on(&mut self, _: bool) {
        self.r = Registers::default();
        self.memory.fill(0);
        for (pair, byte) in self.memory.chunks_mut(2).zip(self.mac) {
            pair.fill(byte);
        }
        // A 16-bit card.
        self.memory[28..PROM_BYTES].fill(0x57);
        self.reset();
    }

    fn read(&mut self, _: &mut Host, _: u8, offset: u64, data: &mut [u8]) {
        let lone = data.len() == 1;
        for (at, b) in (offset..).zip(data) {
            *b = match offset {
                // However wide, an access of the data port takes as many bytes of the buffer.
                DATA_PORT..RESET_PORT => {
                    let byte = self.remote(None);
                    if lone && self.r.dcr & DCR_WTS != 0 {
                        // A transfer is of words: the other half is lost. §9, §10.3.
                        self.remote(None);
                    }
                    byte
                }
                RESET_PORT.. => {
                    self.reset();
                    0
                }
                _ => self.load(at as u8 & 0x0f),
            };
        }
    }

    fn write(&mut self, host: &mut Host, _: u8, offset: u64, data: &[u8]) {
        let lone = data.len() == 1;
        for (at, b) in (offset..).zip(data) {
            match offset {
                DATA_PORT..RESET_PORT => {
                    self.remote(Some(*b));
                    if lone && self.r.dcr & DCR_WTS != 0 {
                        self.remote(Some(0));
                    }
                }
                RESET_PORT.. => {}
                _ => self.store(host, at as u8 & 0x0f, *b),
            }
        }
    }

    fn resume(&mut self, _: &mut Host) {}

    fn timer(&mut self, _: &mut Host, _: u64) {}

    // The chip does not tell.
    fn link_changed(&mut self, _: &mut Host) {}

    fn can_receive(&self, host: &Host) -> bool {
        let needed = (HEAD_BYTES + MAX_FRAME_BYTES).div_ceil(PAGE_BYTES);
        host.link_up() && self.started() && self.free_pages() > needed
    }

    fn frame_waits(&mut self) {
        if self.started() && self.r.curr != self.r.bnry {
            self.r.isr |= ISR_PRX;
        }
    }

    fn receive(&mut self, _: &mut Host, frame: &[u8]) -> Reception {
        if self.loops_back() {
            return Reception::Filtered;
        }
        self.receive_frame(frame)
    }

    fn interrupt(&mut self, _: &mut Host) -> bool {
        self.r.isr & self.r.imr & !ISR_RST != 0
    }

    fn mac(&self) -> Mac {
        self.r.par
    }

    fn save(&self) -> Saved {
        let Ne2k { mac: _, r, memory } = self;
        Saved {
            registers: r.clone(),
            buffer: memory[BUFFER_START..].to_vec(),
        }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), String> {
        let place = &mut self.memory[BUFFER_START..];
        if saved.buffer.len() != place.len() {
            return Err(format!("a packet buffer of {} bytes", saved.buffer.len()));
        }
        place.copy_from_slice(&saved.buffer);
        self.r = saved.registers;
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let byte = |b: u8| Inspect::Hex(b.into());
        Inspect::node([
            ("cr", byte(self.r.cr)),
            ("isr", byte(self.r.isr)),
            ("imr", byte(self.r.imr)),
            ("rcr", byte(self.r.rcr)),
            ("curr", byte(self.r.curr)),
            ("bnry", byte(self.r.bnry)),
        ])
    }
}
