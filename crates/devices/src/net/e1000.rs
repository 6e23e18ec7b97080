//! Intel 82540EM, the Gigabit Ethernet controller that drivers call e1000.
//!
//! PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual (8254x,
//! 317453) is the manual meant by section numbers here.
//!
//! ```text
//! BAR 0, 128 KiB: registers, rings by RDBAL/TDBAL     BAR 2, 64 ports: IOADDR, IODATA
//! ```
//!
//! Negotiation, EEPROM and PHY accesses take no time. Interrupts are delayed as ITR, RDTR, RADV,
//! TIDV and TADV say. Segments that the driver wants cut go to the back end in one piece.

use minicbor::{Decode, Encode};
use pyrite_state::Inspect;
use pyrite_vdev::BarKind;
use pyrite_vdev::pci::PciIds;

use super::microwire::{Microwire, WORDS};
use super::{Host, Mac, Model, Reception};
use crate::dwords::{read_dwords, write_dwords};

mod phy;
mod regs;
mod rx;
#[cfg(test)]
mod tests;
mod tx;

use phy::{Phy, eeprom, eeprom_mac};
use regs::*;
use tx::{Context, Packet};

const VENDOR_ID: u16 = 0x8086;
const DEVICE_ID: u16 = 0x100e;
/// A desktop adapter PRO/1000 MT.
const SUBSYSTEM_ID: u16 = 0x001e;

const REGISTERS_BAR: u8 = 0;
const IO_BAR: u8 = 2;
const COUNT: usize = (REGISTERS_END / 4) as usize;
/// The PHY's address on MDIO.
const PHY_ADDRESS: u32 = 1;
/// ITR counts these, in ns; RDTR and the others 4 of them.
const TICK_NS: u64 = 256;
const DELAY_NS: u64 = 1024;

/// The card.
pub struct E1000 {
    eeprom: [u16; WORDS],
    port: Microwire,
    phy: Phy,
    /// Registers by address / 4.
    registers: Box<[u32; COUNT]>,
    /// IOADDR.
    io_address: u32,
    icr: u32,
    ims: u32,
    packet: Packet,
    /// For plain and for segmented packets.
    contexts: [Context; 2],
    /// When the line may be raised again (ITR).
    quiet_until: u64,
    /// When delayed causes are due: packet and absolute timers.
    rx_due: Option<u64>,
    rx_limit: Option<u64>,
    tx_due: Option<u64>,
    tx_limit: Option<u64>,
    level: bool,
    /// What the timer was set to.
    armed: Option<u64>,
}

/// The saved form.
#[derive(Encode, Decode)]
#[cbor(map)]
pub struct Saved {
    /// Registers that are not zero: address and value.
    #[n(0)]
    registers: Vec<(u32, u32)>,
    #[n(1)]
    port: Microwire,
    #[n(2)]
    phy: Phy,
    #[n(3)]
    io_address: u32,
    #[n(4)]
    icr: u32,
    #[n(5)]
    ims: u32,
    #[n(6)]
    packet: Packet,
    #[n(7)]
    contexts: [Context; 2],
    #[n(8)]
    quiet_until: u64,
    #[n(9)]
    rx_due: Option<u64>,
    #[n(10)]
    rx_limit: Option<u64>,
    #[n(11)]
    tx_due: Option<u64>,
    #[n(12)]
    tx_limit: Option<u64>,
    #[n(13)]
    level: bool,
}

impl E1000 {
    /// A register as it is kept; 0 beyond the registers.
    fn get(&self, register: u32) -> u32 {
        let at = (register / 4) as usize;
        self.registers.get(at).copied().unwrap_or(0)
    }
    fn set(&mut self, register: u32, value: u32) {
        if let Some(r) = self.registers.get_mut((register / 4) as usize) {
            *r = value;
        }
    }

    /// Adds to a statistic, which stays at its end. §13.7.
    fn count(&mut self, register: u32, by: u32) {
        self.set(register, self.get(register).saturating_add(by));
    }
    fn count_wide(&mut self, low: u32, by: u64) {
        let now = u64::from(self.get(low + 4)) << 32 | u64::from(self.get(low));
        let then = now.saturating_add(by);
        self.set(low, then as u32);
        self.set(low + 4, (then >> 32) as u32);
    }
    /// A frame in the statistics: size classes, all frames, all bytes, good frames, good bytes,
    /// broadcasts, multicasts.
    fn count_frame(
        &mut self,
        frame: &[u8],
        [class, all, bytes, good, good_bytes, broad, multi]: [u32; 7],
    ) {
        // With the FCS.
        let len = frame.len() + 4;
        let n = [64, 127, 255, 511, 1023]
            .iter()
            .filter(|c| len > **c)
            .count();
        self.count(class + 4 * n as u32, 1);
        self.count(all, 1);
        self.count(good, 1);
        self.count_wide(bytes, len as u64);
        self.count_wide(good_bytes, len as u64);
        match frame.first_chunk::<6>() {
            Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => self.count(broad, 1),
            Some(to) if to[0] & 1 != 0 => self.count(multi, 1),
            _ => {}
        }
    }

    /// Sets causes.
    fn raise(&mut self, causes: u32) {
        self.icr |= causes & ICR_ALL;
    }

    fn loops_back(&self) -> bool {
        self.phy.loops_back() || self.get(RCTL) & RCTL_LBM != 0
    }

    /// A frame was stored: the cause now, or when the timers say. §13.4.30.
    fn rx_done(&mut self, host: &Host) {
        let delay = u64::from(self.get(RDTR));
        if delay == 0 {
            self.raise(ICR_RXT0);
            return;
        }
        let now = host.now_ns();
        self.rx_due = Some(now + delay * DELAY_NS);
        let limit = u64::from(self.get(RADV));
        if limit > 0 {
            self.rx_limit.get_or_insert(now + limit * DELAY_NS);
        }
    }

    /// A descriptor was written back. §13.4.44.
    fn tx_done(&mut self, host: &Host, may_wait: bool) {
        let delay = u64::from(self.get(TIDV));
        if delay == 0 || !may_wait {
            self.raise(ICR_TXDW);
            return;
        }
        let now = host.now_ns();
        self.tx_due = Some(now + delay * DELAY_NS);
        let limit = u64::from(self.get(TADV));
        if limit > 0 {
            self.tx_limit.get_or_insert(now + limit * DELAY_NS);
        }
    }

    /// Raises causes whose time has come.
    fn expire(&mut self, now: u64) {
        let passed = |at: Option<u64>| at.is_some_and(|at| at <= now);
        if passed(self.rx_due) || passed(self.rx_limit) {
            (self.rx_due, self.rx_limit) = (None, None);
            self.raise(ICR_RXT0);
        }
        if passed(self.tx_due) || passed(self.tx_limit) {
            (self.tx_due, self.tx_limit) = (None, None);
            self.raise(ICR_TXDW);
        }
    }

    /// CTRL.RST: all but PHY and EEPROM. §13.4.1.
    fn reset(&mut self, link: bool) {
        self.registers.fill(0);
        self.set(CTRL, CTRL_FD | CTRL_ASDE | CTRL_SPEED_1000);
        self.set(FCAL, 0x00c2_8001);
        self.set(FCAH, 0x0000_0100);
        self.set(FCT, 0x0000_8808);
        self.set(VET, 0x0000_8100);
        self.set(PBA, 0x0010_0030);
        self.set(TIPG, 0x0060_2008);
        self.set(LEDCTL, 0x0706_8302);
        self.set(RXDCTL, 0x0001_0000);
        let [a, b, c, d, e, f] = eeprom_mac(&self.eeprom);
        self.set(RAL, u32::from_le_bytes([a, b, c, d]));
        self.set(RAL + 4, u32::from_le_bytes([e, f, 0, 0]) | RAH_AV);
        self.port = Microwire::default();
        self.packet = Packet::default();
        self.contexts = [Context::default(); 2];
        self.icr = 0;
        self.ims = 0;
        self.quiet_until = 0;
        (self.rx_due, self.rx_limit) = (None, None);
        (self.tx_due, self.tx_limit) = (None, None);
        if link {
            self.raise(ICR_LSC);
        }
    }

    fn status(&self, host: &Host) -> u32 {
        let link = self.phy.link(host.link_up());
        STATUS_FD | STATUS_SPEED_1000 | STATUS_ASDV_1000 | if link { STATUS_LU } else { 0 }
    }

    /// The EEPROM's pins as they are read. §13.4.3.
    fn eecd(&self) -> u32 {
        let kept = self.get(EECD);
        let out = if self.port.out() { EECD_DO } else { 0 };
        let granted = if kept & EECD_REQ != 0 { EECD_GNT } else { 0 };
        kept | out | granted | EECD_PRES
    }

    /// MDI control. §13.4.8.
    fn mdic(&mut self, host: &Host, value: u32) {
        let register = (value >> 16 & 31) as usize;
        let mut result = value & !MDIC_ERROR | MDIC_READY;
        if value >> 21 & 31 != PHY_ADDRESS {
            result |= MDIC_ERROR;
        } else {
            match value >> 26 & 3 {
                1 => {
                    if self.phy.write(register, value as u16) {
                        self.raise(ICR_LSC);
                    }
                }
                2 => {
                    let data = self.phy.read(register, host.link_up());
                    result = result & 0xffff_0000 | u32::from(data);
                }
                _ => result |= MDIC_ERROR,
            }
        }
        self.set(MDIC, result);
        if value & MDIC_INTERRUPT != 0 {
            self.raise(ICR_MDAC);
        }
    }

    fn load(&mut self, host: &Host, register: u32) -> u32 {
        match register {
            CTRL..CTRL_EXT => match register {
                0x0000 | 0x0004 => self.get(CTRL),
                STATUS => self.status(host),
                EECD => self.eecd(),
                EERD => self.get(EERD),
                _ => 0,
            },
            ICR => std::mem::take(&mut self.icr),
            ICS | IMC => 0,
            IMS => self.ims,
            STATISTICS..STATISTICS_END => {
                let value = self.get(register);
                self.set(register, 0);
                value
            }
            _ => self.get(register),
        }
    }

    fn store(&mut self, host: &mut Host, register: u32, value: u32, mask: u32) {
        match register {
            0x0000 | 0x0004 => {
                let value = self.get(CTRL) & !mask | value & mask;
                if value & CTRL_PHY_RST != 0 {
                    self.phy = Phy::new();
                    self.raise(ICR_LSC);
                }
                if value & CTRL_RST != 0 {
                    self.reset(false);
                } else {
                    self.set(CTRL, value & !CTRL_PHY_RST);
                }
            }
            EECD => {
                let pins = self.eecd() & !mask | value & mask;
                let kept = EECD_SK | EECD_CS | EECD_DI | EECD_REQ | EECD_FWE;
                self.set(EECD, pins & kept);
                let pin = |bit| pins & bit != 0;
                let (select, clock, data) = (pin(EECD_CS), pin(EECD_SK), pin(EECD_DI));
                self.port.pins(&self.eeprom, select, clock, data);
            }
            EERD if value & mask & EERD_START != 0 => {
                let word = self.eeprom[(value >> 8) as usize % WORDS];
                let done = value & 0xff00 | EERD_DONE;
                self.set(EERD, u32::from(word) << 16 | done);
            }
            MDIC => self.mdic(host, self.get(MDIC) & !mask | value & mask),
            ICR => self.icr &= !(value & mask),
            ICS => self.raise(value & mask),
            IMS => self.ims |= value & mask & ICR_ALL,
            IMC => self.ims &= !(value & mask),
            RDTR if value & mask & 1 << 31 != 0 => {
                // FPD: what waits comes now.
                self.set(RDTR, value & mask & 0xffff);
                if self.rx_due.take().is_some() {
                    self.rx_limit = None;
                    self.raise(ICR_RXT0);
                }
            }
            _ => {
                let Some(kept) = kept(register) else { return };
                let mask = mask & kept;
                self.set(register, self.get(register) & !mask | value & mask);
                match register {
                    TDT | TCTL => self.transmit(host),
                    CTRL_EXT if value & mask & CTRL_EXT_EE_RST != 0 => {
                        self.set(CTRL_EXT, self.get(CTRL_EXT) & !CTRL_EXT_EE_RST);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Arms the timer for whatever comes first.
    fn arm(&mut self, host: &Host, throttled: Option<u64>) {
        let next = [
            throttled,
            self.rx_due,
            self.rx_limit,
            self.tx_due,
            self.tx_limit,
        ];
        let next = next.into_iter().flatten().min();
        if next != self.armed {
            self.armed = next;
            host.set_timer(next);
        }
    }
}

impl Model for E1000 {
    const KIND: &'static str = "e1000";
    const VERSION: u16 = 1;
    const IDS: PciIds = PciIds {
        vendor_id: VENDOR_ID,
        device_id: DEVICE_ID,
        revision: 2,
        class: 0x02_00_00,
        subsystem_vendor_id: VENDOR_ID,
        subsystem_id: SUBSYSTEM_ID,
    };
    const BARS: &'static [(u8, BarKind, u64)] = &[
        (REGISTERS_BAR, BarKind::Mem32, 0x2_0000),
        (IO_BAR, BarKind::Io, 64),
    ];
    type Saved = Saved;

    fn new(mac: Mac) -> E1000 {
        E1000 {
            eeprom: eeprom(mac),
            port: Microwire::default(),
            phy: Phy::new(),
            registers: Box::new([0; COUNT]),
            io_address: 0,
            icr: 0,
            ims: 0,
            packet: Packet::default(),
            contexts: [Context::default(); 2],
            quiet_until: 0,
            rx_due: None,
            rx_limit: None,
            tx_due: None,
            tx_limit: None,
            level: false,
            armed: None,
        }
    }

    fn power_on(&mut self, link_up: bool) {
        self.phy = Phy::new();
        self.io_address = 0;
        self.level = false;
        self.armed = None;
        self.reset(link_up);
    }

    fn read(&mut self, host: &mut Host, bar: u8, offset: u64, data: &mut [u8]) {
        if bar == REGISTERS_BAR {
            let mut at = None;
            // A register is read once, however the load is made up: some change by it.
            let mut value = 0;
            for (place, b) in (offset..).zip(data) {
                let register = (place & !3) as u32;
                if at != Some(register) {
                    at = Some(register);
                    value = self.load(host, register);
                }
                *b = value.to_le_bytes()[(place & 3) as usize];
            }
            return;
        }
        let value = if offset & !3 == 4 {
            self.load(host, self.io_address & !3)
        } else {
            self.io_address
        };
        read_dwords(offset, data, |at| if at < 8 { value } else { u32::MAX });
    }

    fn write(&mut self, host: &mut Host, bar: u8, offset: u64, data: &[u8]) {
        write_dwords(offset, data, |at, value, mask| match (bar, at) {
            (REGISTERS_BAR, _) => self.store(host, at as u32, value, mask),
            (IO_BAR, 0) => self.io_address = self.io_address & !mask | value & mask,
            // Memory of the card beyond the registers is not reached this way.
            (IO_BAR, 4) => self.store(host, self.io_address & !3, value, mask),
            _ => {}
        });
    }

    fn resume(&mut self, host: &mut Host) {
        self.transmit(host);
    }

    fn timer(&mut self, _: &mut Host, now_ns: u64) {
        self.armed = None;
        self.expire(now_ns);
    }

    fn link_changed(&mut self, _: &mut Host) {
        self.raise(ICR_LSC);
    }

    fn can_receive(&self, host: &Host) -> bool {
        self.has_room(host)
    }

    fn receive(&mut self, host: &mut Host, frame: &[u8]) -> Reception {
        if self.loops_back() {
            return Reception::Filtered;
        }
        self.receive_frame(host, frame)
    }

    fn interrupt(&mut self, host: &mut Host) -> bool {
        let wanted = self.icr & self.ims != 0;
        let mut throttled = None;
        if !wanted {
            self.level = false;
        } else if !self.level {
            let interval = u64::from(self.get(ITR)) * TICK_NS;
            let now = if interval > 0 || self.quiet_until > 0 {
                host.now_ns()
            } else {
                0
            };
            if now >= self.quiet_until {
                self.level = true;
                self.quiet_until = if interval > 0 { now + interval } else { 0 };
            } else {
                throttled = Some(self.quiet_until);
            }
        }
        self.arm(host, throttled);
        self.level
    }

    fn mac(&self) -> Mac {
        let [a, b, c, d] = self.get(RAL).to_le_bytes();
        let [e, f, ..] = self.get(RAL + 4).to_le_bytes();
        [a, b, c, d, e, f]
    }

    fn save(&self) -> Saved {
        let E1000 {
            eeprom: _,
            port,
            phy,
            registers,
            io_address,
            icr,
            ims,
            packet,
            contexts,
            quiet_until,
            rx_due,
            rx_limit,
            tx_due,
            tx_limit,
            level,
            armed: _,
        } = self;
        let all = (0_u32..).step_by(4).zip(registers.iter().copied());
        Saved {
            registers: all.filter(|(_, v)| *v != 0).collect(),
            port: *port,
            phy: phy.clone(),
            io_address: *io_address,
            icr: *icr,
            ims: *ims,
            packet: packet.clone(),
            contexts: *contexts,
            quiet_until: *quiet_until,
            rx_due: *rx_due,
            rx_limit: *rx_limit,
            tx_due: *tx_due,
            tx_limit: *tx_limit,
            level: *level,
        }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), String> {
        if !saved.phy.valid() || !saved.packet.valid() || !saved.port.valid() {
            return Err("impossible state of PHY, EEPROM or packet".into());
        }
        self.registers.fill(0);
        for (register, value) in &saved.registers {
            if *register >= REGISTERS_END || register % 4 != 0 {
                return Err(format!("there is no register {register:#x}"));
            }
            self.set(*register, *value);
        }
        self.port = saved.port;
        self.phy = saved.phy;
        self.io_address = saved.io_address;
        self.icr = saved.icr & ICR_ALL;
        self.ims = saved.ims & ICR_ALL;
        self.packet = saved.packet;
        self.contexts = saved.contexts;
        self.quiet_until = saved.quiet_until;
        (self.rx_due, self.rx_limit) = (saved.rx_due, saved.rx_limit);
        (self.tx_due, self.tx_limit) = (saved.tx_due, saved.tx_limit);
        self.level = saved.level;
        self.armed = None;
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let register = |r| Inspect::Hex(self.get(r).into());
        Inspect::node([
            ("ctrl", register(CTRL)),
            ("rctl", register(RCTL)),
            ("tctl", register(TCTL)),
            ("icr", Inspect::Hex(self.icr.into())),
            ("ims", Inspect::Hex(self.ims.into())),
            ("itr", register(ITR)),
            ("rdh", register(RDH)),
            ("rdt", register(RDT)),
            ("rdlen", register(RDLEN)),
            ("tdh", register(TDH)),
            ("tdt", register(TDT)),
            ("tdlen", register(TDLEN)),
        ])
    }
}
