//! High precision event timer: three comparators on a 64-bit counter at 100 MHz.
//! IA-PC HPET Specification 1.0a.
//!
//! Like the PIT it is not stepped. A comparator that is already behind the counter when it is
//! written fires at once: a virtual CPU may be held up between reading the counter and writing the
//! comparator for longer than a driver allows for, and would otherwise wait for a wrap.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{
    DeviceTimer, IrqLine, Lifecycle, MmioDevice, MsiMessage, MsiSink, TimedDevice, VmClock,
};

const KIND: &str = "hpet";
const VERSION: u16 = 1;
const TIMERS: usize = 3;
/// Length of a counter tick.
const TICK_NS: u64 = 10;
/// LIMIT: a periodic comparator fires at most every 20 µs; shorter periods are merged, so that a
/// guest cannot keep the timer thread busy for ever.
const MIN_PERIOD_TICKS: u64 = 2_000;
/// GSIs that a comparator can be routed to: 20-23.
const ROUTES: u32 = 0x00f0_0000;
const FIRST_ROUTE: u32 = 20;

// §2.3.4 General Capabilities: period in fs, vendor 8086H, legacy route, 64 bits, 3 timers, rev 1.
const CAPABILITIES: u64 =
    (TICK_NS * 1_000_000) << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;
// §2.3.5 General Configuration.
const ENABLE_CNF: u64 = 1 << 0;
const LEG_RT_CNF: u64 = 1 << 1;
// §2.3.8 Timer n Configuration and Capability.
const TN_INT_TYPE_LEVEL: u64 = 1 << 1;
const TN_INT_ENB: u64 = 1 << 2;
const TN_TYPE_PERIODIC: u64 = 1 << 3;
const TN_PER_INT_CAP: u64 = 1 << 4;
const TN_SIZE_CAP: u64 = 1 << 5;
const TN_VAL_SET: u64 = 1 << 6;
const TN_32MODE: u64 = 1 << 8;
const TN_INT_ROUTE_SHIFT: u32 = 9;
const TN_FSB_EN: u64 = 1 << 14;
const TN_FSB_INT_DEL_CAP: u64 = 1 << 15;
const TN_CAPABILITIES: u64 =
    TN_PER_INT_CAP | TN_SIZE_CAP | TN_FSB_INT_DEL_CAP | (ROUTES as u64) << 32;
const TN_WRITABLE: u64 = TN_INT_TYPE_LEVEL
    | TN_INT_ENB
    | TN_TYPE_PERIODIC
    | TN_VAL_SET
    | TN_32MODE
    | 0x1f << TN_INT_ROUTE_SHIFT
    | TN_FSB_EN;

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Comparator {
    #[n(0)]
    config: u64,
    #[n(1)]
    value: u64,
    #[n(2)]
    period: u64,
    /// FSB Interrupt Route: data below, address above.
    #[n(3)]
    fsb: u64,
    /// Counter value, extended beyond 32 bits, at which it fires next.
    #[n(4)]
    due: Option<u64>,
}

impl Comparator {
    fn power_on() -> Comparator {
        Comparator {
            value: u64::MAX,
            ..Comparator::default()
        }
    }

    fn is_periodic(&self) -> bool {
        self.config & TN_TYPE_PERIODIC != 0
    }

    fn is_32bit(&self) -> bool {
        self.config & TN_32MODE != 0
    }

    /// Works out when it fires next, from its registers.
    fn plan(&mut self, counter: u64) {
        let ahead = if self.is_32bit() {
            i64::from((self.value as u32).wrapping_sub(counter as u32) as i32)
        } else {
            self.value.wrapping_sub(counter) as i64
        };
        // All ones is the value after reset: it means never, not "just missed".
        let is_never = !self.is_32bit() && self.value == u64::MAX;
        self.due = (!is_never).then(|| counter.saturating_add(ahead.max(0) as u64));
    }

    /// Plans what follows an expiry. Missed periods are skipped.
    fn plan_next(&mut self, counter: u64) {
        let Some(due) = self.due else { return };
        let mask = if self.is_32bit() {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        };
        let period = self.period & mask;
        self.due = if self.is_periodic() && period != 0 {
            let merged = if period < MIN_PERIOD_TICKS {
                MIN_PERIOD_TICKS
            } else {
                0
            };
            let steps = (counter.saturating_sub(due).saturating_add(merged)) / period + 1;
            let next = due.saturating_add(steps.saturating_mul(period));
            self.value = next & mask;
            Some(next)
        } else if self.is_32bit() {
            // §2.3.9.2.1: a one-shot of 32 bits comes again when the counter has wrapped.
            Some(due.saturating_add(1 << 32))
        } else {
            None
        };
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    config: u64,
    #[n(1)]
    status: u64,
    /// Main counter while halted; else its value at `since_ns`.
    #[n(2)]
    counter: u64,
    #[n(3)]
    since_ns: u64,
    #[n(4)]
    comparators: [Comparator; TIMERS],
}

impl Registers {
    fn power_on() -> Registers {
        let comparators = std::array::from_fn(|_| Comparator::power_on());
        Registers {
            config: 0,
            status: 0,
            counter: 0,
            since_ns: 0,
            comparators,
        }
    }

    fn is_enabled(&self) -> bool {
        self.config & ENABLE_CNF != 0
    }

    fn counter(&self, now_ns: u64) -> u64 {
        if self.is_enabled() {
            self.counter
                .wrapping_add(now_ns.saturating_sub(self.since_ns) / TICK_NS)
        } else {
            self.counter
        }
    }

    /// Moves comparators without an interrupt past the expiries that nobody heard.
    fn catch_up(&mut self, now_ns: u64) {
        let counter = self.counter(now_ns);
        if !self.is_enabled() {
            return;
        }
        for c in &mut self.comparators {
            if c.config & TN_INT_ENB == 0 && c.due.is_some_and(|d| d <= counter) {
                c.plan_next(counter);
            }
        }
    }

    fn read(&self, register: u64, now_ns: u64) -> u64 {
        match register {
            0x000 => CAPABILITIES,
            0x010 => self.config,
            0x020 => self.status,
            0x0f0 => self.counter(now_ns),
            0x100.. => {
                let n = (register - 0x100) / 0x20;
                match (self.comparators.get(n as usize), register & 0x18) {
                    (Some(c), 0x00) => c.config | TN_CAPABILITIES,
                    (Some(c), 0x08) => c.value,
                    (Some(c), 0x10) => c.fsb,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }
}

/// Interrupt lines of the HPET.
pub struct HpetLines {
    /// GSI 0, for comparator 0 with legacy replacement.
    pub irq0: IrqLine,
    /// GSI 8, for comparator 1 with legacy replacement.
    pub irq8: IrqLine,
    /// GSI 20-23.
    pub routes: [IrqLine; 4],
}

/// The HPET.
pub struct Hpet {
    regs: Registers,
    timer: DeviceTimer,
    lines: HpetLines,
    msi: Arc<dyn MsiSink>,
    /// Tells PIT and RTC that their interrupts are replaced.
    legacy_replaced: Arc<AtomicBool>,
}

impl Hpet {
    /// An HPET on `clock`. `legacy_replaced` is shared with PIT and RTC.
    pub fn new(
        clock: &Arc<VmClock>,
        lines: HpetLines,
        msi: Arc<dyn MsiSink>,
        legacy_replaced: Arc<AtomicBool>,
    ) -> Arc<Mutex<Hpet>> {
        Arc::new_cyclic(|me| {
            Mutex::new(Hpet {
                regs: Registers::power_on(),
                timer: DeviceTimer::new(clock, me),
                lines,
                msi,
                legacy_replaced,
            })
        })
    }

    /// Arms the timer for the comparator that interrupts first. One whose interrupt is disabled
    /// costs no wake-up: what it did meanwhile is worked out by [`Registers::catch_up`].
    fn schedule(&self) {
        let r = &self.regs;
        let heard = r.comparators.iter().filter(|c| c.config & TN_INT_ENB != 0);
        let first = heard.filter_map(|c| c.due).min();
        let deadline = first.filter(|_| r.is_enabled()).map(|due| {
            r.since_ns
                .saturating_add(due.saturating_sub(r.counter).saturating_mul(TICK_NS))
        });
        self.timer.set(deadline);
    }

    fn plan_all(&mut self, now_ns: u64) {
        let counter = self.regs.counter(now_ns);
        for c in &mut self.regs.comparators {
            c.plan(counter);
        }
    }

    fn line_of(&self, n: usize) -> Option<&IrqLine> {
        let c = self.regs.comparators.get(n)?;
        if self.regs.config & LEG_RT_CNF != 0 && n < 2 {
            return Some(if n == 0 {
                &self.lines.irq0
            } else {
                &self.lines.irq8
            });
        }
        let route = (c.config >> TN_INT_ROUTE_SHIFT & 0x1f) as u32;
        self.lines
            .routes
            .get(route.checked_sub(FIRST_ROUTE)? as usize)
    }

    fn raise(&mut self, n: usize) {
        let Some(c) = self.regs.comparators.get(n) else {
            return;
        };
        if c.config & TN_INT_ENB == 0 {
            return;
        }
        if c.config & TN_FSB_EN != 0 {
            self.msi.send(MsiMessage {
                addr: c.fsb >> 32,
                data: c.fsb as u32,
            });
        } else if c.config & TN_INT_TYPE_LEVEL != 0 {
            self.regs.status |= 1 << n;
            if let Some(l) = self.line_of(n) {
                l.set(true);
            }
        } else if let Some(l) = self.line_of(n) {
            l.pulse();
        }
    }

    /// States the level of every line: a line may have been given up by a change of routing.
    fn drive(&self) {
        let active = |line: &IrqLine| {
            (0..TIMERS).any(|n| {
                self.regs.status >> n & 1 != 0
                    && self.line_of(n).is_some_and(|l| l.gsi() == line.gsi())
            })
        };
        for l in &self.lines.routes {
            l.set(active(l));
        }
        if self.regs.config & LEG_RT_CNF != 0 {
            self.lines.irq0.set(active(&self.lines.irq0));
            self.lines.irq8.set(active(&self.lines.irq8));
        }
    }

    fn write(&mut self, register: u64, v: u64, now_ns: u64) {
        let counter = self.regs.counter(now_ns);
        match register {
            0x010 => {
                let was_legacy = self.regs.config & LEG_RT_CNF != 0;
                self.regs.counter = counter;
                self.regs.since_ns = now_ns;
                let was_enabled = self.regs.is_enabled();
                self.regs.config = v & (ENABLE_CNF | LEG_RT_CNF);
                let is_legacy = self.regs.config & LEG_RT_CNF != 0;
                if was_legacy && !is_legacy {
                    self.lines.irq0.set(false);
                    self.lines.irq8.set(false);
                }
                self.legacy_replaced.store(is_legacy, Ordering::Relaxed);
                if self.regs.is_enabled() && !was_enabled {
                    self.plan_all(now_ns);
                }
                self.drive();
            }
            0x020 => {
                self.regs.status &= !v;
                self.drive();
            }
            // §2.3.7: written only while halted; a running counter is set all the same.
            0x0f0 => {
                self.regs.counter = v;
                self.regs.since_ns = now_ns;
                self.plan_all(now_ns);
            }
            0x100.. => {
                let n = ((register - 0x100) / 0x20) as usize;
                let Some(c) = self.regs.comparators.get_mut(n) else {
                    return;
                };
                match register & 0x18 {
                    0x00 => {
                        c.config = v & TN_WRITABLE;
                        if c.config & (TN_INT_ENB | TN_INT_TYPE_LEVEL)
                            != TN_INT_ENB | TN_INT_TYPE_LEVEL
                        {
                            self.regs.status &= !(1 << n);
                        }
                        // An expiry that is planned stays planned.
                        self.drive();
                    }
                    0x08 => {
                        // §2.3.9.2.2: in periodic mode VAL_SET lets one write set the value;
                        // every write sets the period.
                        if !c.is_periodic() || c.config & TN_VAL_SET != 0 {
                            c.value = v;
                        }
                        if c.is_periodic() {
                            c.period = v;
                        }
                        c.config &= !TN_VAL_SET;
                        c.plan(counter);
                    }
                    0x10 => c.fsb = v,
                    _ => return,
                }
            }
            _ => return,
        }
        self.schedule();
    }
}

impl TimedDevice for Hpet {
    fn timer_fired(&mut self, now_ns: u64) {
        if !self.regs.is_enabled() {
            return;
        }
        let counter = self.regs.counter(now_ns);
        for n in 0..TIMERS {
            let Some(c) = self.regs.comparators.get_mut(n) else {
                break;
            };
            if c.due.is_some_and(|d| d <= counter) {
                c.plan_next(counter);
                self.raise(n);
            }
        }
        self.schedule();
    }
}

impl MmioDevice for Hpet {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.timer.now_ns();
        self.regs.catch_up(now);
        for (at, b) in (offset..).zip(data) {
            *b = (self.regs.read(at & !7, now) >> (8 * (at & 7))) as u8;
        }
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let now = self.timer.now_ns();
        self.regs.catch_up(now);
        let register = offset & !7;
        // Parts of a register keep its other bytes; status bits are cleared only where written.
        let old = if register == 0x020 {
            0
        } else {
            self.regs.read(register, now)
        };
        let mut bytes = old.to_le_bytes();
        for (to, from) in bytes.iter_mut().skip((offset & 7) as usize).zip(data) {
            *to = *from;
        }
        self.write(register, u64::from_le_bytes(bytes), now);
    }
}

impl Lifecycle for Hpet {
    fn unit(&self) -> &str {
        "hpet"
    }
    passive!();
    fn reset(&mut self) {
        self.write(0x010, 0, 0);
        self.regs = Registers::power_on();
        self.drive();
        self.timer.set(None);
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let Hpet {
            regs,
            timer: _,
            lines: _,
            msi: _,
            legacy_replaced: _,
        } = self;
        Ok(Section::new("hpet", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let mut saved: Registers = section.decode(KIND, VERSION)?;
        saved.config &= ENABLE_CNF | LEG_RT_CNF;
        for c in &mut saved.comparators {
            c.config &= TN_WRITABLE;
        }
        self.regs = saved;
        self.legacy_replaced
            .store(self.regs.config & LEG_RT_CNF != 0, Ordering::Relaxed);
        self.drive();
        self.schedule();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let now = self.timer.now_ns();
        let comparators = self.regs.comparators.iter().enumerate().map(|(n, c)| {
            let node = Inspect::node([
                ("config", Inspect::Hex(c.config)),
                ("value", Inspect::Hex(c.value)),
                ("period", Inspect::Uint(c.period)),
            ]);
            (n.to_string(), node)
        });
        Inspect::node([
            ("config", Inspect::Hex(self.regs.config)),
            ("status", Inspect::Hex(self.regs.status)),
            ("counter", Inspect::Hex(self.regs.counter(now))),
            ("comparators", Inspect::Node(comparators.collect())),
        ])
    }
}
