//! The count-down of the APIC timer, computed from guest time instead of ticking.
//!
//! The counter is clocked at 1 GHz (1 ns) divided by the divide configuration, as CPUID leaf
//! 4000_0010H tells the guest. Intel SDM Vol. 3A §10.5.4.

/// Frequency that the divider divides, in kHz.
pub const BUS_KHZ: u32 = 1_000_000;

/// Shortest distance of two expiries of a periodic timer that the host is willing to serve, in
/// ns. LIMIT: a guest cannot keep a host processor busy with a period of a few cycles.
const PERIOD_MIN_NS: u64 = 50_000;

/// A running or stopped count-down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountDown {
    running: bool,
    start_ns: u64,
}

/// The divisor that a divide-configuration value means. Intel SDM Vol. 3A figure 10-10.
pub fn divisor(divide: u32) -> u64 {
    match (divide & 3) | (divide >> 1 & 4) {
        7 => 1,
        n => 2 << n,
    }
}

impl CountDown {
    /// Counting.
    pub fn running(&self) -> bool {
        self.running
    }

    /// Guest time of the last (re)start.
    pub fn started_ns(&self) -> u64 {
        self.start_ns
    }

    /// Starts at `now_ns`, or stops if `initial` is 0.
    pub fn start(&mut self, now_ns: u64, initial: u32) {
        self.running = initial != 0;
        self.start_ns = now_ns;
    }

    /// Stops.
    pub fn stop(&mut self) {
        self.running = false;
    }

    /// Continues from `left` with another divisor.
    pub fn rebase(&mut self, now_ns: u64, initial: u32, left: u32, divide: u32) {
        let done = u64::from(initial.saturating_sub(left)).saturating_mul(divisor(divide));
        self.start_ns = now_ns.saturating_sub(done);
    }

    fn period_ns(initial: u32, divide: u32) -> u64 {
        u64::from(initial) * divisor(divide)
    }

    /// Guest time of the next expiry.
    pub fn deadline_ns(&self, initial: u32, divide: u32, periodic: bool) -> Option<u64> {
        if !self.running || initial == 0 {
            return None;
        }
        let period = Self::period_ns(initial, divide);
        let periods = if periodic {
            PERIOD_MIN_NS.div_ceil(period)
        } else {
            1
        };
        Some(self.start_ns.saturating_add(period * periods))
    }

    /// Accounts for an expiry that was seen at `now_ns`; missed periods are lost, not caught up.
    pub fn expire(&mut self, now_ns: u64, initial: u32, divide: u32, periodic: bool) {
        let period = Self::period_ns(initial, divide);
        if !periodic || period == 0 {
            self.running = false;
            return;
        }
        let elapsed = now_ns.saturating_sub(self.start_ns);
        self.start_ns += elapsed - elapsed % period;
    }

    /// The current-count register.
    pub fn current(&self, now_ns: u64, initial: u32, divide: u32, periodic: bool) -> u32 {
        if !self.running || initial == 0 {
            return 0;
        }
        let ticks = now_ns.saturating_sub(self.start_ns) / divisor(divide);
        let initial = u64::from(initial);
        let left = if periodic {
            initial - ticks % initial
        } else {
            initial.saturating_sub(ticks)
        };
        left as u32
    }
}
