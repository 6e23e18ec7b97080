//! Realtek RTL8139C+ and RTL8139C, Fast Ethernet controllers.
//!
//! The data sheets "RTL8139C(L)+" (1.6) and "RTL8139C(L)" (1.4) are meant by section numbers here;
//! names are theirs. The C+ has, besides the C's four transmit buffers and receive ring ("C mode"),
//! descriptor rings with checksums, segmentation and VLAN tags ("C+ mode").
//!
//! ```text
//! BAR 0, 256 ports and BAR 1, 256 bytes: the same registers
//! ```

use minicbor::{Decode, Encode};
use pyrite_state::Inspect;
use pyrite_vdev::BarKind;
use pyrite_vdev::pci::PciIds;

use super::fcs::multicast_bit;
use super::microwire::{Microwire, WORDS};
use super::{Host, Mac, Model, Reception};

mod c_mode;
mod plus;
#[cfg(test)]
mod tests;

use plus::Gathering;

const REGISTERS: usize = 256;

// Registers, §6. A width follows from the next one.
const IDR0: u8 = 0x00;
const MAR0: u8 = 0x08;
const TSD0: u8 = 0x10;
const TSAD0: u8 = 0x20;
const RBSTART: u8 = 0x30;
const ERBCR: u8 = 0x34;
const CR: u8 = 0x37;
const CAPR: u8 = 0x38;
const CBR: u8 = 0x3a;
const IMR: u8 = 0x3c;
const ISR: u8 = 0x3e;
const TCR: u8 = 0x40;
const RCR: u8 = 0x44;
const TCTR: u8 = 0x48;
const MPC: u8 = 0x4c;
const CR9346: u8 = 0x50;
const CONFIG0: u8 = 0x51;
const CONFIG1: u8 = 0x52;
const TIMERINT: u8 = 0x54;
const MSR: u8 = 0x58;
const CONFIG3: u8 = 0x59;
const CONFIG4: u8 = 0x5a;
const TSAD: u8 = 0x60;
const BMCR: u8 = 0x62;
const BMSR: u8 = 0x64;
const ANAR: u8 = 0x66;
const ANLPAR: u8 = 0x68;
const ANER: u8 = 0x6a;
const NWAYTR: u8 = 0x70;
const CSCR: u8 = 0x74;
const CONFIG5: u8 = 0xd8;
const TPPOLL: u8 = 0xd9;
const CPCR: u8 = 0xe0;
const RDSAR: u8 = 0xe4;

const CR_BUFE: u32 = 1 << 0;
const CR_TE: u32 = 1 << 2;
const CR_RE: u32 = 1 << 3;
const CR_RST: u32 = 1 << 4;

const ISR_ROK: u32 = 1 << 0;
const ISR_TOK: u32 = 1 << 2;
const ISR_TER: u32 = 1 << 3;
/// Receive buffer overflow; in C+ mode no descriptor.
const ISR_RXOVW: u32 = 1 << 4;
/// Link change.
const ISR_PUN: u32 = 1 << 5;
const ISR_FOVW: u32 = 1 << 6;
/// Transmit descriptor unavailable.
const ISR_TDU: u32 = 1 << 7;
const ISR_SWINT: u32 = 1 << 8;
const ISR_TIMEOUT: u32 = 1 << 14;
/// Causes that exist.
const ISR_ALL: u32 = 0xe1ff;

const TCR_LBK: u32 = 3 << 17;
/// Hardware version, bits 30:26 and 23:22.
const TCR_VERSION_PLUS: u32 = 0x7480_0000;
const TCR_VERSION_C: u32 = 0x7400_0000;
const TCR_VERSION_MASK: u32 = 0x7cc0_0000;

const RCR_AAP: u32 = 1 << 0;
const RCR_APM: u32 = 1 << 1;
const RCR_AM: u32 = 1 << 2;
const RCR_AB: u32 = 1 << 3;
const RCR_WRAP: u32 = 1 << 7;

const CR9346_EEDO: u32 = 1 << 0;
const CR9346_EEDI: u32 = 1 << 1;
const CR9346_EESK: u32 = 1 << 2;
const CR9346_EECS: u32 = 1 << 3;
/// Operating modes: EEPROM programming, and configuration registers writable.
const CR9346_EEM: u32 = 3 << 6;
const CR9346_PROGRAM: u32 = 2 << 6;
const CR9346_CONFIG: u32 = 3 << 6;

/// No link (the bit is inverted).
const MSR_LINKB: u32 = 1 << 2;

const CPCR_TX: u32 = 1 << 0;
const CPCR_RX: u32 = 1 << 1;
const CPCR_RX_CHECKSUM: u32 = 1 << 5;
const CPCR_RX_VLAN: u32 = 1 << 6;

/// Clock of TCTR: that of PCI.
const CLOCK_HZ: u128 = 33_000_000;

/// How a frame came in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Physical,
    Multicast,
    Broadcast,
    /// Only because all are taken.
    Any,
}

/// The card; `PLUS`: an RTL8139C+.
pub struct Rtl8139<const PLUS: bool> {
    mac: Mac,
    eeprom: [u16; WORDS],
    port: Microwire,
    registers: [u8; REGISTERS],
    /// ISR is no plain register.
    isr: u32,
    /// Guest time when TCTR was 0.
    timer_zero: u64,
    /// The next descriptors in C+ mode: receive, transmit of normal and high priority.
    rx_next: u32,
    tx_next: [u32; 2],
    gathering: [Gathering; 2],
    /// What the timer was set to.
    armed: Option<u64>,
}

/// The saved form.
#[derive(Encode, Decode)]
#[cbor(map)]
pub struct Saved {
    #[cbor(n(0), with = "minicbor::bytes")]
    registers: Vec<u8>,
    #[n(1)]
    port: Microwire,
    #[n(2)]
    isr: u32,
    #[n(3)]
    timer_zero: u64,
    #[n(4)]
    rx_next: u32,
    #[n(5)]
    tx_next: [u32; 2],
    #[n(6)]
    gathering: [Gathering; 2],
}

/// First byte and length of the register that a place belongs to.
fn register_of(at: u8) -> (u8, u8) {
    match at {
        ERBCR..=0x35 | CAPR..=0x3f | TSAD..=0x73 | CPCR..=0xe3 => (at & !1, 2),
        0x36 | CR | CR9346..=0x53 | MSR..=0x5b | 0x5c..=0x5f | CONFIG5..=0xdf => (at, 1),
        IDR0..=0x0f => (at, 1),
        _ => (at & !3, 4),
    }
}

/// Content of the EEPROM, §7.
fn eeprom(mac: Mac) -> [u16; WORDS] {
    let mut words = [0; WORDS];
    words[0] = 0x8129;
    words[1] = 0x10ec;
    words[2] = 0x8139;
    words[3] = 0x10ec;
    words[4] = 0x8139;
    words[5] = 0x4020; // MXLAT, MNGNT
    words[6] = 0xe512;
    for (word, pair) in words[7..].iter_mut().zip(mac.as_chunks::<2>().0) {
        *word = u16::from_le_bytes(*pair);
    }
    words[10] = 0x4d10;
    words[11] = 0xf7c2;
    words[12] = 0x8801;
    words
}

impl<const PLUS: bool> Rtl8139<PLUS> {
    fn get(&self, register: u8) -> u32 {
        let (start, len) = register_of(register);
        let bytes = self.registers.iter().skip(start.into()).take(len.into());
        bytes.rev().fold(0, |v, b| v << 8 | u32::from(*b))
    }
    fn set(&mut self, register: u8, value: u32) {
        let (start, len) = register_of(register);
        let bytes = self
            .registers
            .iter_mut()
            .skip(start.into())
            .take(len.into());
        for (to, from) in bytes.zip(value.to_le_bytes()) {
            *to = from;
        }
    }
    fn raise(&mut self, causes: u32) {
        self.isr |= causes & ISR_ALL;
    }

    fn loops_back(&self) -> bool {
        self.get(TCR) & TCR_LBK == TCR_LBK
    }

    /// True if descriptor rings are used for a direction.
    fn plus(&self, direction: u32) -> bool {
        PLUS && self.get(CPCR) & direction != 0
    }

    /// CR.RST, §6.5: rings and interrupts; addresses and configuration stay.
    fn reset(&mut self) {
        for n in 0..4 {
            self.set(TSD0 + 4 * n, 1 << 13); // OWN: the host's
            self.set(TSAD0 + 4 * n, 0);
        }
        for register in [
            RBSTART,
            ERBCR,
            CBR,
            IMR,
            RCR,
            MPC,
            TIMERINT,
            CPCR,
            RDSAR,
            RDSAR + 4,
        ] {
            self.set(register, 0);
        }
        self.set(CAPR, 0xfff0);
        self.set(CR, CR_BUFE);
        self.set(TCR, 0);
        self.isr = 0;
        self.rx_next = 0;
        self.tx_next = [0; 2];
        self.gathering = Default::default();
    }

    fn link(host: &Host) -> bool {
        host.link_up()
    }

    fn load(&self, host: &Host, register: u8) -> u32 {
        let kept = self.get(register);
        let link = Self::link(host);
        match register {
            CR => {
                let empty = if self.ring_is_empty() { CR_BUFE } else { 0 };
                kept & !CR_BUFE | empty
            }
            ISR => self.isr,
            TCR => {
                let version = if PLUS {
                    TCR_VERSION_PLUS
                } else {
                    TCR_VERSION_C
                };
                kept & !TCR_VERSION_MASK | version
            }
            TCTR => self.ticks(host),
            CR9346 => {
                let out = if self.port.out() { CR9346_EEDO } else { 0 };
                kept & !CR9346_EEDO | out
            }
            MSR => kept & !MSR_LINKB | if link { 0 } else { MSR_LINKB },
            TSAD => self.transmit_summary(),
            // IEEE 802.3 §22.2.4: capabilities, negotiated, link.
            BMSR => 0x7809 | if link { 0x24 } else { 0 },
            ANLPAR if link => 0x45e1,
            ANER => u32::from(link),
            CSCR => kept | if link { 0x0400 } else { 0 },
            CPCR | RDSAR if !PLUS => 0,
            _ => kept,
        }
    }

    /// TSAD: what all four transmit status registers say. §6.18.
    fn transmit_summary(&self) -> u32 {
        (0..4_u8).fold(0, |sum, n| {
            let tsd = self.get(TSD0 + 4 * n);
            let bit = |from: u32, to: u32| (tsd >> from & 1) << (to + u32::from(n));
            sum | bit(13, 0) | bit(30, 4) | bit(14, 8) | bit(15, 12)
        })
    }

    fn ticks(&self, host: &Host) -> u32 {
        let ns = u128::from(host.now_ns().saturating_sub(self.timer_zero));
        (ns * CLOCK_HZ / 1_000_000_000) as u32
    }

    /// Arms TIMERINT: a cause when TCTR comes to its value. §6.13.
    fn arm(&mut self, host: &Host) {
        let goal = self.get(TIMERINT);
        let mut next = None;
        if goal != 0 {
            let left = goal.wrapping_sub(self.ticks(host));
            let left = if left == 0 { 1 << 32 } else { u64::from(left) };
            let ns = (u128::from(left) * 1_000_000_000).div_ceil(CLOCK_HZ);
            next = Some(host.now_ns().saturating_add(ns as u64));
        }
        self.armed = next;
        host.set_timer(next);
    }

    /// `value` for the bits of `mask`.
    fn store(&mut self, host: &mut Host, register: u8, value: u32, mask: u32) {
        let kept = self.get(register);
        let merged = kept & !mask | value & mask;
        let unlocked = self.get(CR9346) & CR9346_EEM == CR9346_CONFIG;
        match register {
            IDR0..=0x05 | CONFIG0 | CONFIG1 | CONFIG3 | CONFIG4 | CONFIG5 if !unlocked => {}
            IDR0..=0x0f | CONFIG0..=0x53 | CONFIG3..=0x5b | CONFIG5 => self.set(register, merged),
            TSD0..TSAD0 if !self.plus(CPCR_TX) => {
                self.set(register, merged);
                self.transmit_buffer(host, (register - TSD0) / 4);
            }
            TSAD0..=0x2f => {
                self.set(register, merged);
                // In C+ mode these are the starts of the transmit rings.
                if self.plus(CPCR_TX) || PLUS {
                    self.tx_next[usize::from(register >= 0x28)] = 0;
                }
            }
            RBSTART => {
                self.set(register, merged);
                self.set(CBR, 0);
            }
            CR => {
                if merged & CR_RST != 0 {
                    return self.reset();
                }
                self.set(CR, merged & (CR_TE | CR_RE));
                self.transmit_waiting(host);
            }
            CAPR => self.set(CAPR, merged),
            IMR => self.set(IMR, merged & ISR_ALL),
            ISR => self.isr &= !(value & mask),
            TCR => self.set(TCR, merged & !TCR_VERSION_MASK),
            RCR => self.set(RCR, merged & 0x0fff_ffff),
            TCTR => {
                self.timer_zero = host.now_ns();
                self.arm(host);
            }
            TIMERINT => {
                self.set(TIMERINT, merged);
                self.arm(host);
            }
            MPC => self.set(MPC, 0),
            CR9346 => {
                self.set(CR9346, merged & !CR9346_EEDO);
                let pin = |bit| merged & bit != 0 && merged & CR9346_EEM == CR9346_PROGRAM;
                let (cs, sk, di) = (pin(CR9346_EECS), pin(CR9346_EESK), pin(CR9346_EEDI));
                self.port.pins(&self.eeprom, cs, sk, di);
            }
            MSR => self.set(MSR, merged & 0xc0),
            BMCR => {
                // Reset and restart of the negotiation are done at once.
                self.set(BMCR, merged & !(1 << 15 | 1 << 9));
            }
            ANAR | NWAYTR | CSCR => self.set(register, merged),
            TPPOLL => {
                if value & mask & 1 != 0 {
                    self.raise(ISR_SWINT);
                }
                if self.transmit_rings(host, value & mask) {
                    self.raise(ISR_TDU);
                }
            }
            CPCR if PLUS => self.set(CPCR, merged & 0x7f),
            RDSAR..=0xeb if PLUS => {
                self.set(
                    register,
                    merged & if register == RDSAR { !0xff } else { !0 },
                );
                self.rx_next = 0;
            }
            // Interrupt mitigation, early transmit threshold.
            0xe2 | 0xec if PLUS => self.set(register, merged),
            _ => {}
        }
    }

    /// What was waiting for the transmitter or for memory.
    fn transmit_waiting(&mut self, host: &mut Host) {
        if self.plus(CPCR_TX) {
            self.transmit_rings(host, 0xc0);
        } else {
            for n in 0..4 {
                self.transmit_buffer(host, n);
            }
        }
    }

    /// What the receive filter says. §6.9.
    fn filter(&self, frame: &[u8]) -> Option<Match> {
        let rcr = self.get(RCR);
        let to = frame.first_chunk::<6>()?;
        let address: [u8; 6] = *self.registers.first_chunk()?;
        let found = if *to == [0xff; 6] {
            (rcr & RCR_AB != 0).then_some(Match::Broadcast)
        } else if to[0] & 1 != 0 {
            let bit = multicast_bit(to);
            let byte = self.registers[usize::from(MAR0) + (bit / 8) as usize];
            let hit = rcr & RCR_AM != 0 && byte >> (bit % 8) & 1 != 0;
            hit.then_some(Match::Multicast)
        } else {
            (rcr & RCR_APM != 0 && *to == address).then_some(Match::Physical)
        };
        found.or((rcr & RCR_AAP != 0).then_some(Match::Any))
    }

    /// A frame from the wire or looped back.
    fn receive_frame(&mut self, host: &mut Host, frame: &[u8]) -> Reception {
        if self.get(CR) & CR_RE == 0 {
            return Reception::NoRoom;
        }
        let Some(matched) = self.filter(frame) else {
            return Reception::Filtered;
        };
        if self.plus(CPCR_RX) {
            self.receive_to_ring(host, frame, matched)
        } else {
            self.receive_to_buffer(host, frame, matched)
        }
    }

    /// A frame was lost for lack of room.
    fn missed(&mut self, cause: u32) -> Reception {
        self.raise(cause);
        self.set(MPC, (self.get(MPC) + 1) & 0xff_ffff);
        Reception::NoRoom
    }

    /// Sends a frame, or takes it in if the card loops back.
    fn send(&mut self, host: &mut Host, data: &mut Vec<u8>, offload: &pyrite_net::Offload) {
        if self.loops_back() {
            let mut frames = Vec::new();
            pyrite_net::offload::complete(data, offload, &mut |f| frames.push(f.to_vec()));
            for mut f in frames {
                f.resize(f.len().max(super::MIN_FRAME_BYTES), 0);
                let _ = self.receive_frame(host, &f);
            }
        } else {
            host.transmit(data, offload);
        }
    }
}

impl<const PLUS: bool> Model for Rtl8139<PLUS> {
    const KIND: &'static str = if PLUS { "rtl8139" } else { "rtl8139c" };
    const VERSION: u16 = 1;
    const IDS: PciIds = PciIds {
        vendor_id: 0x10ec,
        device_id: 0x8139,
        revision: if PLUS { 0x20 } else { 0x10 },
        class: 0x02_00_00,
        subsystem_vendor_id: 0x10ec,
        subsystem_id: 0x8139,
    };
    const BARS: &'static [(u8, BarKind, u64)] = &[(0, BarKind::Io, 256), (1, BarKind::Mem32, 256)];
    type Saved = Saved;

    fn new(mac: Mac) -> Self {
        Rtl8139 {
            mac,
            eeprom: eeprom(mac),
            port: Microwire::default(),
            registers: [0; REGISTERS],
            isr: 0,
            timer_zero: 0,
            rx_next: 0,
            tx_next: [0; 2],
            gathering: Default::default(),
            armed: None,
        }
    }

    fn power_on(&mut self, _: bool) {
        self.registers = [0; REGISTERS];
        for (to, from) in self.registers.iter_mut().zip(self.mac) {
            *to = from;
        }
        self.port = Microwire::default();
        self.timer_zero = 0;
        self.armed = None;
        self.reset();
        self.set(CONFIG1, 0x0c); // I/O and memory mapping
        self.set(CONFIG3, 0x01);
        self.set(BMCR, 0x1000); // negotiates
        self.set(ANAR, 0x05e1);
        self.set(CSCR, 0x0100);
    }

    fn read(&mut self, host: &mut Host, _: u8, offset: u64, data: &mut [u8]) {
        for (at, b) in (offset..).zip(data) {
            let at = at as u8;
            let (start, _) = register_of(at);
            let value = self.load(host, start).to_le_bytes();
            *b = value[usize::from(at - start)];
        }
    }

    fn write(&mut self, host: &mut Host, _: u8, offset: u64, data: &[u8]) {
        let mut at = offset as usize;
        let mut rest = data;
        while let Ok(place) = u8::try_from(at)
            && !rest.is_empty()
        {
            let (start, len) = register_of(place);
            let skip = usize::from(place - start);
            let n = rest.len().min(usize::from(len) - skip);
            let (mut value, mut mask) = ([0; 4], [0; 4]);
            value[skip..skip + n].copy_from_slice(&rest[..n]);
            mask[skip..skip + n].fill(0xff);
            self.store(
                host,
                start,
                u32::from_le_bytes(value),
                u32::from_le_bytes(mask),
            );
            at += n;
            rest = &rest[n..];
        }
    }

    fn resume(&mut self, host: &mut Host) {
        if self.armed.is_none() {
            self.arm(host);
        }
        self.transmit_waiting(host);
    }

    fn timer(&mut self, host: &mut Host, _: u64) {
        self.raise(ISR_TIMEOUT);
        self.arm(host);
    }

    fn link_changed(&mut self, _: &mut Host) {
        self.raise(ISR_PUN);
    }

    fn can_receive(&self, host: &Host) -> bool {
        let on = self.get(CR) & CR_RE != 0 && Self::link(host);
        on && if self.plus(CPCR_RX) {
            self.ring_has_room(host)
        } else {
            host.memory().is_some() && self.buffer_has_room(super::HEADER_BYTES + 1500)
        }
    }

    fn frame_waits(&mut self) {
        if self.get(CR) & CR_RE != 0 && !self.plus(CPCR_RX) && !self.ring_is_empty() {
            self.raise(ISR_ROK);
        }
    }

    fn receive(&mut self, host: &mut Host, frame: &[u8]) -> Reception {
        if self.loops_back() {
            return Reception::Filtered;
        }
        self.receive_frame(host, frame)
    }

    fn interrupt(&mut self, _: &mut Host) -> bool {
        self.isr & self.get(IMR) != 0
    }

    fn mac(&self) -> Mac {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.registers[..6]);
        mac
    }

    fn save(&self) -> Saved {
        let Rtl8139 {
            mac: _,
            eeprom: _,
            port,
            registers,
            isr,
            timer_zero,
            rx_next,
            tx_next,
            gathering,
            armed: _,
        } = self;
        Saved {
            registers: registers.to_vec(),
            port: *port,
            isr: *isr,
            timer_zero: *timer_zero,
            rx_next: *rx_next,
            tx_next: *tx_next,
            gathering: gathering.clone(),
        }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), String> {
        let Ok(registers) = saved.registers.try_into() else {
            return Err("another number of registers".into());
        };
        if !saved.port.valid() || !saved.gathering.iter().all(Gathering::valid) {
            return Err("impossible state of EEPROM or packet".into());
        }
        self.registers = registers;
        self.port = saved.port;
        self.isr = saved.isr & ISR_ALL;
        self.timer_zero = saved.timer_zero;
        self.rx_next = saved.rx_next;
        self.tx_next = saved.tx_next;
        self.gathering = saved.gathering;
        self.armed = None;
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let register = |r| Inspect::Hex(self.get(r).into());
        Inspect::node([
            ("cr", register(CR)),
            ("isr", Inspect::Hex(self.isr.into())),
            ("imr", register(IMR)),
            ("tcr", register(TCR)),
            ("rcr", register(RCR)),
            ("cpcr", register(CPCR)),
            ("capr", register(CAPR)),
            ("cbr", register(CBR)),
        ])
    }
}
