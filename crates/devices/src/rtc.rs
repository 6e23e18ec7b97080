//! MC146818 real-time clock with 256 bytes of CMOS RAM.
//! Motorola MC146818 data sheet (ADI-856); extended bank: Intel ICH9 data sheet §13.6.
//!
//! The time of day is the host's plus an offset, which changes when the guest sets the clock.
//! What the guest sees moves at whole seconds of guest time, so that it fits UIP and the update
//! interrupt.

mod calendar;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use calendar::DateTime;
use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{DeviceTimer, IrqLine, Lifecycle, PioDevice, TimedDevice, VmClock};

const KIND: &str = "rtc-mc146818";
const VERSION: u16 = 1;
const SECOND_NS: u64 = 1_000_000_000;
/// UIP is set from this long before the update: 244 µs plus the update cycle of 1984 µs.
const UIP_NS: u64 = 2_228_000;

// Register addresses.
const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const DAY_OF_WEEK: usize = 0x06;
const DATE: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
const CENTURY: usize = 0x32;

const A_UIP: u8 = 1 << 7;
const B_SET: u8 = 1 << 7;
const B_PIE: u8 = 1 << 6;
const B_AIE: u8 = 1 << 5;
const B_UIE: u8 = 1 << 4;
const B_SQWE: u8 = 1 << 3;
const B_DM_BINARY: u8 = 1 << 2;
const B_24H: u8 = 1 << 1;
const C_IRQF: u8 = 1 << 7;
const C_PF: u8 = 1 << 6;
const C_AF: u8 = 1 << 5;
const C_UF: u8 = 1 << 4;
const D_VRT: u8 = 1 << 7;
/// Alarm bytes from C0H on match anything.
const ALARM_ANY: u8 = 0xc0;

/// Source of the host's time of day in Unix seconds.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    /// CMOS RAM; time, registers A, C and D are computed.
    #[cbor(n(0), with = "minicbor::bytes")]
    cmos: Vec<u8>,
    /// Address in the lower and in the upper bank.
    #[n(1)]
    index: [u8; 2],
    /// Guest's time of day less the host's, in seconds.
    #[n(2)]
    offset_s: i64,
    /// Time shown while SET stops the updates.
    #[n(3)]
    held: Option<i64>,
    /// Interrupt flags of register C.
    #[n(4)]
    flags: u8,
    /// Guest time up to which flags were worked out.
    #[n(5)]
    seen_ns: u64,
    /// Time of day shown since the last whole second of guest time.
    #[n(6)]
    shown: i64,
}

/// The clock and its CMOS RAM.
pub struct Rtc {
    regs: Registers,
    /// Content of CMOS when the machine was made (memory sizes).
    factory: Vec<u8>,
    wall_clock: WallClock,
    timer: DeviceTimer,
    line: IrqLine,
    legacy_replaced: Arc<AtomicBool>,
}

/// CMOS as firmware would have filled it in, for this layout of RAM.
fn factory_cmos(low_ram_bytes: u64, high_ram_bytes: u64) -> Vec<u8> {
    let mut c = vec![0; 256];
    let mut put = |at: usize, v: u64, bytes: usize| {
        c[at..at + bytes].copy_from_slice(&v.to_le_bytes()[..bytes]);
    };
    put(REG_A, 0x26, 1); // 32.768 kHz time base, 1024 Hz
    put(REG_B, B_24H.into(), 1);
    put(0x14, 0x06, 1); // equipment: coprocessor, PS/2 mouse
    put(0x15, 640, 2); // base memory in KiB
    let above_1m = (low_ram_bytes.saturating_sub(1 << 20) >> 10).min(0xffff);
    put(0x17, above_1m, 2);
    put(0x30, above_1m, 2);
    put(
        0x34,
        (low_ram_bytes.saturating_sub(16 << 20) >> 16).min(0xffff),
        2,
    );
    put(0x5b, (high_ram_bytes >> 16).min(0xff_ffff), 3);
    c
}

impl Rtc {
    /// A clock that follows `wall_clock` and drives `line` (GSI 8) unless the HPET replaced it.
    /// RAM below 4 GiB and above it is told in CMOS.
    pub fn new(
        clock: &Arc<VmClock>,
        wall_clock: WallClock,
        line: IrqLine,
        legacy_replaced: Arc<AtomicBool>,
        ram_bytes: [u64; 2],
    ) -> Arc<Mutex<Rtc>> {
        let factory = factory_cmos(ram_bytes[0], ram_bytes[1]);
        let now = host_time(&wall_clock);
        Arc::new_cyclic(|me| {
            let regs = Registers {
                cmos: factory.clone(),
                index: [0; 2],
                offset_s: 0,
                held: None,
                flags: 0,
                seen_ns: 0,
                shown: now,
            };
            let timer = DeviceTimer::new(clock, me);
            Mutex::new(Rtc {
                regs,
                factory,
                wall_clock,
                timer,
                line,
                legacy_replaced,
            })
        })
    }

    /// Says in CMOS from which kinds of devices a BIOS boots: hard disk, CD, floppy,
    /// in this order. For use before the first start.
    pub fn set_boot_flags(&mut self) {
        for (at, v) in [(0x38, 0x10), (0x3d, 0x32)] {
            if let Some(b) = self.factory.get_mut(at) {
                *b = v;
            }
            self.set_cmos(at, v);
        }
    }

    /// Tells in CMOS which floppy drives there are, A and B, by their types (0: none). Before the
    /// machine starts.
    pub fn set_floppy_drives(&mut self, [a, b]: [u8; 2]) {
        let count = u8::from(a != 0) + u8::from(b != 0);
        // Equipment: bit 0 there are some, bits 7-6 how many more than one.
        let equipment = u8::from(count > 0) | count.saturating_sub(1) << 6;
        let other = self.cmos(0x14) & !0xc1;
        for (at, v) in [(0x10, a << 4 | b & 0xf), (0x14, other | equipment)] {
            if let Some(byte) = self.factory.get_mut(at) {
                *byte = v;
            }
            self.set_cmos(at, v);
        }
    }

    fn cmos(&self, at: usize) -> u8 {
        self.regs.cmos.get(at).copied().unwrap_or(0xff)
    }

    fn set_cmos(&mut self, at: usize, v: u8) {
        if let Some(b) = self.regs.cmos.get_mut(at) {
            *b = v;
        }
    }

    /// Length of the periodic interrupt, `None` if it is off.
    fn period_ns(&self) -> Option<u64> {
        let rate = match self.cmos(REG_A) & 0x0f {
            0 => return None,
            // Rates 1 and 2 repeat 8 and 9 with the 32.768 kHz time base.
            n @ 1..=2 => n + 7,
            n => n,
        };
        Some((SECOND_NS << (rate - 1)) / 32_768)
    }

    /// Works out what happened since the last look: seconds, alarms, periods.
    fn catch_up(&mut self) {
        let now = self.timer.now_ns();
        let seen = std::mem::replace(&mut self.regs.seen_ns, now);
        if let Some(p) = self.period_ns()
            && now / p != seen / p
        {
            self.regs.flags |= C_PF;
        }
        if now / SECOND_NS == seen / SECOND_NS || self.regs.held.is_some() {
            return;
        }
        self.regs.flags |= C_UF;
        let before = self.regs.shown;
        let after = host_time(&self.wall_clock).saturating_add(self.regs.offset_s);
        self.regs.shown = after;
        // LIMIT: every alarm comes within a day, so no more seconds than that are looked at.
        let first = after.saturating_sub(86_399).max(before.saturating_add(1));
        if (first..=after).any(|t| self.alarm_matches(t)) {
            self.regs.flags |= C_AF;
        }
    }

    fn alarm_matches(&self, time: i64) -> bool {
        let t = DateTime::from_unix(time);
        let matches = |at: usize, v: u8| {
            let alarm = self.cmos(at);
            alarm >= ALARM_ANY || alarm == v
        };
        matches(SECONDS_ALARM, self.encode(t.second))
            && matches(MINUTES_ALARM, self.encode(t.minute))
            && matches(HOURS_ALARM, self.encode_hour(t.hour))
    }

    fn drive(&mut self) {
        let enabled = self.cmos(REG_B) & (B_PIE | B_AIE | B_UIE);
        let active = self.regs.flags & enabled & (C_PF | C_AF | C_UF) != 0;
        self.line
            .set(active && !self.legacy_replaced.load(Ordering::Relaxed));
        let now = self.regs.seen_ns;
        let b = self.cmos(REG_B);
        let second = (b & (B_AIE | B_UIE) != 0 && self.regs.held.is_none()).then_some(SECOND_NS);
        let period = self.period_ns().filter(|_| b & B_PIE != 0);
        // While a flag waits to be read, nothing new can be seen on the line; reading register C
        // schedules again.
        let next = [second, period]
            .into_iter()
            .flatten()
            .map(|p| (now / p + 1).saturating_mul(p));
        self.timer.set(if active { None } else { next.min() });
    }

    fn encode(&self, v: u8) -> u8 {
        if self.cmos(REG_B) & B_DM_BINARY != 0 {
            v
        } else {
            ((v / 10) << 4) | (v % 10)
        }
    }

    fn decode(&self, v: u8) -> u8 {
        if self.cmos(REG_B) & B_DM_BINARY != 0 {
            v
        } else {
            (v >> 4).saturating_mul(10).saturating_add(v & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.cmos(REG_B) & B_24H != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) {
            12
        } else {
            hour % 12
        };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, v: u8) -> u8 {
        if self.cmos(REG_B) & B_24H != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    fn time(&self) -> DateTime {
        DateTime::from_unix(self.regs.held.unwrap_or(self.regs.shown))
    }

    fn read_time(&self, at: usize) -> Option<u8> {
        let t = self.time();
        Some(match at {
            SECONDS => self.encode(t.second),
            MINUTES => self.encode(t.minute),
            HOURS => self.encode_hour(t.hour),
            DAY_OF_WEEK => self.encode(t.weekday()),
            DATE => self.encode(t.day),
            MONTH => self.encode(t.month),
            YEAR => self.encode((t.year % 100) as u8),
            CENTURY => self.encode((t.year / 100) as u8),
            _ => return None,
        })
    }

    /// Sets one field of the time; the others stay, except where the calendar has no such day.
    fn write_time(&mut self, at: usize, v: u8) -> bool {
        let mut t = self.time();
        let two_digits = self.decode(v);
        match at {
            SECONDS => t.second = two_digits.min(59),
            MINUTES => t.minute = two_digits.min(59),
            HOURS => t.hour = self.decode_hour(v).min(23),
            DAY_OF_WEEK => return true, // follows from the date
            DATE => t.day = two_digits.clamp(1, 31),
            MONTH => t.month = two_digits.clamp(1, 12),
            YEAR => t.year = t.year / 100 * 100 + u16::from(two_digits.min(99)),
            CENTURY => t.year = u16::from(two_digits.clamp(1, 99)) * 100 + t.year % 100,
            _ => return false,
        }
        let unix = t.to_unix();
        match &mut self.regs.held {
            Some(held) => *held = unix,
            None => self.set_time(unix),
        }
        true
    }

    fn set_time(&mut self, unix: i64) {
        self.regs.shown = unix;
        self.regs.offset_s = unix.saturating_sub(host_time(&self.wall_clock));
    }

    fn read(&mut self, at: usize) -> u8 {
        self.catch_up();
        if let Some(v) = self.read_time(at) {
            return v;
        }
        match at {
            REG_A => {
                let left = SECOND_NS - self.regs.seen_ns % SECOND_NS;
                let updating = left <= UIP_NS && self.regs.held.is_none();
                self.cmos(REG_A) & !A_UIP | if updating { A_UIP } else { 0 }
            }
            REG_C => {
                let flags = std::mem::take(&mut self.regs.flags);
                let enabled = self.cmos(REG_B) & (B_PIE | B_AIE | B_UIE);
                flags | if flags & enabled != 0 { C_IRQF } else { 0 }
            }
            REG_D => D_VRT,
            _ => self.cmos(at),
        }
    }

    fn write(&mut self, at: usize, v: u8) {
        self.catch_up();
        if self.write_time(at, v) {
            return;
        }
        match at {
            REG_A => self.set_cmos(REG_A, v & !A_UIP),
            REG_B => {
                if v & B_SET != 0 {
                    self.regs.held.get_or_insert(self.regs.shown);
                } else if let Some(held) = self.regs.held.take() {
                    self.set_time(held);
                }
                // The data sheet clears UIE with SET.
                self.set_cmos(REG_B, if v & B_SET != 0 { v & !B_UIE } else { v });
            }
            REG_C | REG_D => {}
            _ => self.set_cmos(at, v),
        }
    }

    /// CMOS byte 0FH, the shutdown status that firmware asks for after a reset.
    pub fn shutdown_status(&self) -> u8 {
        self.cmos(0x0f)
    }
}

fn host_time(wall_clock: &WallClock) -> i64 {
    i64::try_from(wall_clock()).unwrap_or(i64::MAX)
}

impl TimedDevice for Rtc {
    fn timer_fired(&mut self, _now_ns: u64) {
        self.catch_up();
        self.drive();
    }
}

impl PioDevice for Rtc {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        for (port, b) in (port..=0x73).zip(data) {
            let bank = usize::from(port >> 1 & 1);
            let at = usize::from(self.regs.index[bank]) | bank << 7;
            // The address ports are write-only on a PC.
            *b = if port & 1 != 0 { self.read(at) } else { 0xff };
        }
        self.drive();
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        for (port, v) in (port..=0x73).zip(data) {
            let bank = usize::from(port >> 1 & 1);
            if port & 1 == 0 {
                // Bit 7 masks NMI, which nothing here raises.
                self.regs.index[bank] = v & 0x7f;
            } else {
                self.write(usize::from(self.regs.index[bank]) | bank << 7, *v);
            }
        }
        self.drive();
    }
}

impl Lifecycle for Rtc {
    fn unit(&self) -> &str {
        "rtc"
    }
    passive!();
    /// The battery keeps time and CMOS; the reset pin clears interrupt enables and flags.
    fn reset(&mut self) {
        self.catch_up();
        let b = self.cmos(REG_B) & !(B_PIE | B_AIE | B_UIE | B_SQWE);
        self.set_cmos(REG_B, b);
        self.regs.flags = 0;
        self.regs.index = [0; 2];
        self.drive();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let Rtc {
            regs,
            factory: _,
            wall_clock: _,
            timer: _,
            line: _,
            legacy_replaced: _,
        } = self;
        Ok(Section::new("rtc", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.regs = Registers {
            cmos: self.factory.clone(),
            index: [0; 2],
            offset_s: 0,
            held: None,
            flags: 0,
            seen_ns: self.timer.now_ns(),
            shown: host_time(&self.wall_clock),
        };
        let saved: Registers = section.decode(KIND, VERSION)?;
        if saved.cmos.len() != 256 || saved.index.iter().any(|i| *i > 0x7f) {
            let detail = format!(
                "CMOS of {} bytes, index {:?}",
                saved.cmos.len(),
                saved.index
            );
            return Err(StateError::Invalid {
                unit: "rtc".into(),
                detail,
            });
        }
        self.regs = saved;
        self.drive();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let t = self.time();
        let text = format!(
            "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
            t.year, t.month, t.day, t.hour, t.minute, t.second
        );
        Inspect::node([
            ("time", Inspect::Text(text)),
            ("reg_a", Inspect::Hex(self.cmos(REG_A).into())),
            ("reg_b", Inspect::Hex(self.cmos(REG_B).into())),
            ("flags", Inspect::Hex(self.regs.flags.into())),
        ])
    }
}
