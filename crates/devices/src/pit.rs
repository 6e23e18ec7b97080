//! 8254 programmable interval timer and port 61H. Intel 8254 data sheet (order number 231164);
//! port 61H: Intel ICH9 data sheet §13.7.2 (NMI_SC).
//!
//! Counters are not stepped: each holds the time at which it began to count, and everything that
//! can be read follows from the clock. Only counter 0 needs a timer, for its interrupt; if the
//! timer comes late, the missed periods are one interrupt, not a burst.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{DeviceTimer, IrqLine, Lifecycle, PioDevice, TimedDevice, VmClock};

const KIND: &str = "pit-8254";
const VERSION: u16 = 1;
/// Input clock.
const HZ: u128 = 1_193_182;

/// LIMIT: counter 0 interrupts at most every 20 µs; shorter periods are merged, so that a guest
/// cannot keep the timer thread busy for ever.
const MIN_PERIOD_NS: u64 = 20_000;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * HZ / 1_000_000_000) as u64
}

/// The first moment at which `ticks` have passed.
fn ns(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000)
        .div_ceil(HZ)
        .min(u128::from(u64::MAX)) as u64
}

/// One counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Counter {
    /// 0-5.
    #[n(0)]
    mode: u8,
    #[n(1)]
    bcd: bool,
    /// RW1:RW0: 1 = least significant byte, 2 = most significant, 3 = both.
    #[n(2)]
    access: u8,
    /// Initial count, 1 to 65536; 0 = none was written since the control word.
    #[n(3)]
    initial: u32,
    /// Counting since this time; `None` = waiting for a count, a trigger or the gate.
    #[n(4)]
    since_ns: Option<u64>,
    /// Ticks counted before `since_ns` (the gate stopped it in between).
    #[n(5)]
    before: u64,
    #[n(6)]
    gate: bool,
    /// First byte of a two-byte count.
    #[n(7)]
    low_byte: Option<u8>,
    /// The next read of a two-byte count gives the upper byte.
    #[n(8)]
    read_upper: bool,
    #[n(9)]
    latched: Option<u16>,
    #[n(10)]
    latched_status: Option<u8>,
}

impl Counter {
    fn power_on(gate: bool) -> Counter {
        Counter {
            access: 3,
            gate,
            ..Counter::default()
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, now_ns: u64) -> u64 {
        let running = self.since_ns.map_or(0, |s| ticks(now_ns.saturating_sub(s)));
        self.before.saturating_add(running)
    }

    /// OUT. Data sheet, "Mode Definitions".
    fn out(&self, now_ns: u64) -> bool {
        let n = u64::from(self.initial);
        let t = self.elapsed(now_ns);
        if n == 0 {
            return self.mode != 0;
        }
        match self.mode {
            0 => t >= n,
            1 => self.since_ns.is_none() || t >= n,
            // The gate low forces OUT high.
            2 => !self.gate || t % n != n - 1,
            3 => !self.gate || t % n < n.div_ceil(2),
            _ => self.since_ns.is_none() || t != n,
        }
    }

    /// The counting element.
    fn count(&self, now_ns: u64) -> u16 {
        let n = u64::from(self.initial);
        if n == 0 {
            return 0;
        }
        let t = self.elapsed(now_ns);
        let wrap = if self.bcd { 10_000 } else { 0x1_0000 };
        let v = match self.mode {
            2 => n - t % n,
            // Counts down by two, twice in a period.
            3 => (n - (2 * (t % n)) % n) & !1,
            _ => (n + wrap - t % wrap) % wrap,
        };
        if self.bcd {
            to_bcd(v as u16 % 10_000)
        } else {
            v as u16
        }
    }

    fn control(&mut self, v: u8) {
        *self = Counter {
            // Modes 6 and 7 are 2 and 3.
            mode: match v >> 1 & 7 {
                m @ 6.. => m - 4,
                m => m,
            },
            bcd: v & 1 != 0,
            access: v >> 4 & 3,
            gate: self.gate,
            ..Counter::default()
        };
    }

    fn load(&mut self, value: u16, now_ns: u64) {
        let n = if self.bcd {
            u32::from(from_bcd(value))
        } else {
            u32::from(value)
        };
        self.initial = match (n, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (n, _) => n,
        };
        // Modes 1 and 5 wait for the gate to rise; the others count while it is high.
        if !matches!(self.mode, 1 | 5) {
            self.before = 0;
            self.since_ns = self.gate.then_some(now_ns);
        }
    }

    fn write(&mut self, v: u8, now_ns: u64) {
        match self.access {
            1 => self.load(v.into(), now_ns),
            2 => self.load(u16::from(v) << 8, now_ns),
            _ => match self.low_byte.take() {
                Some(low) => self.load(u16::from_le_bytes([low, v]), now_ns),
                None => {
                    self.low_byte = Some(v);
                    // The first byte stops mode 0 until the second is written.
                    if self.mode == 0 {
                        self.since_ns = None;
                    }
                }
            },
        }
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched
            .unwrap_or_else(|| self.count(now_ns))
            .to_le_bytes();
        match self.access {
            1 => {
                self.latched = None;
                low
            }
            2 => {
                self.latched = None;
                high
            }
            _ => {
                self.read_upper = !self.read_upper;
                if self.read_upper {
                    return low;
                }
                self.latched = None;
                high
            }
        }
    }

    fn status(&self, now_ns: u64) -> u8 {
        u8::from(self.out(now_ns)) << 7
            | u8::from(self.initial == 0) << 6
            | self.access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn set_gate(&mut self, gate: bool, now_ns: u64) {
        let rose = gate && !self.gate;
        let fell = !gate && self.gate;
        let t = self.elapsed(now_ns);
        self.gate = gate;
        if self.initial == 0 || !(rose || fell) {
            return;
        }
        match self.mode {
            0 | 4 if rose => self.since_ns = Some(now_ns),
            0 | 4 => {
                self.before = t;
                self.since_ns = None;
            }
            _ if rose => {
                self.before = 0;
                self.since_ns = Some(now_ns);
            }
            2 | 3 => {
                self.before = t;
                self.since_ns = None;
            }
            _ => {}
        }
    }

    /// When OUT rises next after `now_ns`.
    fn next_rise(&self, now_ns: u64) -> Option<u64> {
        let since = self.since_ns?;
        let n = u64::from(self.initial);
        let t = self.elapsed(now_ns);
        let target = if self.is_periodic() {
            (t.checked_div(n)? + 1).checked_mul(n)?
        } else {
            n
        };
        // Mode 4 and 5 strobe low for one tick; the rise is the end of it.
        let target = target + u64::from(matches!(self.mode, 4 | 5));
        (target > t).then(|| since.saturating_add(ns(target.saturating_sub(self.before))))
    }

    fn is_valid(&self) -> bool {
        self.mode <= 5 && (1..=3).contains(&self.access) && self.initial <= 0x1_0000
    }
}

fn to_bcd(v: u16) -> u16 {
    (0..4).fold(0, |bcd, n| bcd | (v / 10u16.pow(n) % 10) << (4 * n))
}

fn from_bcd(v: u16) -> u16 {
    // A digit above 9 is not defined; it counts as written and stays within range.
    let n: u32 = (0..4)
        .map(|n| u32::from(v >> (4 * n) & 0xf) * 10u32.pow(n))
        .sum();
    (n % 10_000) as u16
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    counters: [Counter; 3],
    /// Bits 0-3 of port 61H.
    #[n(1)]
    port61: u8,
    /// When counter 0 interrupts next.
    #[n(2)]
    deadline_ns: Option<u64>,
}

impl Registers {
    fn power_on() -> Registers {
        let counters = [
            Counter::power_on(true),
            Counter::power_on(true),
            Counter::power_on(false),
        ];
        Registers {
            counters,
            port61: 0,
            deadline_ns: None,
        }
    }
}

/// The timer chip and port 61H.
pub struct Pit {
    regs: Registers,
    timer: DeviceTimer,
    line: IrqLine,
    /// The HPET has taken over IRQ 0.
    legacy_replaced: Arc<AtomicBool>,
}

impl Pit {
    /// A PIT on `clock` whose counter 0 drives `line`, unless `legacy_replaced`.
    pub fn new(
        clock: &Arc<VmClock>,
        line: IrqLine,
        legacy_replaced: Arc<AtomicBool>,
    ) -> Arc<Mutex<Pit>> {
        Arc::new_cyclic(|me| {
            Mutex::new(Pit {
                regs: Registers::power_on(),
                timer: DeviceTimer::new(clock, me),
                line,
                legacy_replaced,
            })
        })
    }

    fn schedule(&mut self, now_ns: u64) {
        self.regs.deadline_ns = self.regs.counters[0].next_rise(now_ns);
        self.timer.set(self.regs.deadline_ns);
    }

    fn command(&mut self, v: u8, now_ns: u64) {
        let select = usize::from(v >> 6);
        if let Some(c) = self.regs.counters.get_mut(select) {
            if v & 0x30 == 0 {
                // Counter latch; a second one before the read is ignored.
                let count = c.count(now_ns);
                c.latched.get_or_insert(count);
            } else {
                c.control(v);
                if select == 0 {
                    self.schedule(now_ns);
                }
            }
            return;
        }
        // Read-back.
        for (n, c) in self.regs.counters.iter_mut().enumerate() {
            if v >> (n + 1) & 1 == 0 {
                continue;
            }
            if v & 0x20 == 0 {
                let count = c.count(now_ns);
                c.latched.get_or_insert(count);
            }
            if v & 0x10 == 0 {
                let status = c.status(now_ns);
                c.latched_status.get_or_insert(status);
            }
        }
    }

    fn read(&mut self, port: u16) -> Option<u8> {
        let now = self.timer.now_ns();
        match port {
            0x40..=0x42 => Some(self.regs.counters[usize::from(port - 0x40)].read(now)),
            0x61 => {
                // Bit 4 toggles with each refresh request, every 15 µs.
                let refresh = ((now / 15_000) & 1) as u8;
                let out2 = u8::from(self.regs.counters[2].out(now));
                Some(self.regs.port61 | refresh << 4 | out2 << 5)
            }
            _ => None,
        }
    }

    fn write(&mut self, port: u16, v: u8) {
        let now = self.timer.now_ns();
        match port {
            0x40..=0x42 => {
                self.regs.counters[usize::from(port - 0x40)].write(v, now);
                if port == 0x40 {
                    self.schedule(now);
                }
            }
            0x43 => self.command(v, now),
            0x61 => {
                self.regs.port61 = v & 0x0f;
                self.regs.counters[2].set_gate(v & 1 != 0, now);
            }
            _ => {}
        }
    }
}

impl TimedDevice for Pit {
    fn timer_fired(&mut self, now_ns: u64) {
        // The deadline may have been taken back while the call was on its way.
        if self.regs.deadline_ns.is_none_or(|d| d > now_ns) {
            return;
        }
        let c = &self.regs.counters[0];
        let merge = c.is_periodic() && ns(u64::from(c.initial)) < MIN_PERIOD_NS;
        self.schedule(now_ns.saturating_add(if merge { MIN_PERIOD_NS } else { 0 }));
        if !self.legacy_replaced.load(Ordering::Relaxed) {
            self.line.pulse();
        }
    }
}

impl PioDevice for Pit {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        for (port, b) in (port..).zip(data) {
            *b = self.read(port).unwrap_or(0xff);
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        for (port, b) in (port..).zip(data) {
            self.write(port, *b);
        }
    }
}

impl Lifecycle for Pit {
    fn unit(&self) -> &str {
        "pit"
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::power_on();
        self.timer.set(None);
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let Pit {
            regs,
            timer: _,
            line: _,
            legacy_replaced: _,
        } = self;
        Ok(Section::new("pit", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let saved: Registers = section.decode(KIND, VERSION)?;
        if !saved.counters.iter().all(Counter::is_valid) {
            let detail = "a counter's mode, access or count is out of range".into();
            return Err(StateError::Invalid {
                unit: "pit".into(),
                detail,
            });
        }
        self.regs = saved;
        self.timer.set(self.regs.deadline_ns);
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let now = self.timer.now_ns();
        let counter = |n: usize| {
            let c = &self.regs.counters[n];
            Inspect::node([
                ("mode", Inspect::Uint(c.mode.into())),
                ("initial", Inspect::Uint(c.initial.into())),
                ("count", Inspect::Uint(c.count(now).into())),
                ("out", Inspect::Bool(c.out(now))),
            ])
        };
        Inspect::node([
            ("counter0", counter(0)),
            ("counter1", counter(1)),
            ("counter2", counter(2)),
            ("port61", Inspect::Hex(self.regs.port61.into())),
        ])
    }
}
