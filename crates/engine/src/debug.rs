//! What a debugger outside the guest wants of a vCPU. Nothing of it is visible to the guest: its
//! debug registers, flags and memory stay its own.

/// What makes a vCPU come back with [`crate::StopReason::Debug`]. Addresses are linear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugPlan {
    /// Instructions before which to stop.
    pub stops: Vec<u64>,
    /// Data whose accesses stop the vCPU after the instruction that made them.
    pub watches: Vec<Watch>,
    /// Stop after one instruction, or before the first of a handler if it raises an exception.
    pub step: bool,
    /// While stepping, interrupts wait, unless the processor is halted.
    pub hold_interrupts: bool,
    /// The next instruction is executed even if it is one of `stops`.
    pub pass: bool,
}

impl DebugPlan {
    /// True if the vCPU runs as it does without a debugger.
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty() && self.watches.is_empty() && !self.step
    }
}

/// What an engine can do for a debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugCaps {
    /// Most breakpoints and watchpoints together; 0 = no debugger.
    pub points: usize,
    /// Watched data must be what a debug register can name: 1, 2, 4 or 8 bytes, aligned, and not
    /// watched for reads alone. Intel SDM Vol. 3B §17.2.4.
    pub registers: bool,
}

/// LIMIT: bytes of one watch.
const WATCH_BYTES_MAX: u64 = 1 << 20;

impl DebugCaps {
    /// Says what an engine cannot do of a plan.
    pub fn check(&self, plan: &DebugPlan) -> Result<(), String> {
        if self.points == 0 {
            return Err("the debug facility is missing; use --engine soft".into());
        }
        if plan.stops.len() + plan.watches.len() > self.points {
            return Err(format!(
                "more than {} breakpoints and watchpoints; delete some, or use --engine soft",
                self.points
            ));
        }
        for w in &plan.watches {
            if !(1..=WATCH_BYTES_MAX).contains(&w.len) {
                return Err(format!("{} bytes cannot be watched; at most 1 MiB", w.len));
            }
            if self.registers && (!matches!(w.len, 1 | 2 | 4 | 8) || w.at % w.len != 0) {
                return Err(format!(
                    "{} bytes at {:#x} cannot be watched by the processor; watch 1, 2, 4 or 8 \
                     aligned bytes, or use --engine soft",
                    w.len, w.at
                ));
            }
            if self.registers && w.kind == WatchKind::Read {
                return Err("the processor cannot watch for reads alone; use awatch".into());
            }
        }
        Ok(())
    }
}

/// What is done to data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchKind {
    /// It is written.
    Write,
    /// It is read.
    Read,
    /// Either.
    Access,
}

/// Data that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Linear address of its first byte.
    pub at: u64,
    /// Bytes, 1 or more.
    pub len: u64,
    /// Which accesses count.
    pub kind: WatchKind,
}

impl Watch {
    /// The first byte that an access of `len` bytes at `at` has in common with it, if it counts.
    pub fn hit(&self, at: u64, len: u64, write: bool) -> Option<u64> {
        let counts = match self.kind {
            WatchKind::Write => write,
            WatchKind::Read => !write,
            WatchKind::Access => true,
        };
        if !counts {
            return None;
        }
        if at.wrapping_sub(self.at) < self.len {
            Some(at)
        } else if self.at.wrapping_sub(at) < len {
            Some(self.at)
        } else {
            None
        }
    }
}

/// Why a vCPU came back to its debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugStop {
    /// The step is done.
    Step,
    /// The next instruction is one of [`DebugPlan::stops`].
    Breakpoint,
    /// The last instruction touched watched data.
    Watchpoint {
        /// The first byte of it that was touched, as linear address.
        at: u64,
        /// What the watch was for.
        kind: WatchKind,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_watch_less_than_the_software_engine() {
        let watch = |at, len, kind| DebugPlan {
            watches: vec![Watch { at, len, kind }],
            ..DebugPlan::default()
        };
        let soft = DebugCaps {
            points: 2,
            registers: false,
        };
        let hard = DebugCaps {
            points: 4,
            registers: true,
        };
        let none = DebugCaps {
            points: 0,
            registers: false,
        };
        assert!(hard.check(&watch(8, 8, WatchKind::Write)).is_ok());
        for odd in [
            watch(4, 8, WatchKind::Write),
            watch(4, 3, WatchKind::Access),
            watch(4, 4, WatchKind::Read),
        ] {
            assert!(hard.check(&odd).is_err());
            assert!(soft.check(&odd).is_ok());
        }
        assert!(soft.check(&watch(0, 0, WatchKind::Write)).is_err());
        assert!(soft.check(&watch(0, u64::MAX, WatchKind::Write)).is_err());
        let stops = DebugPlan {
            stops: vec![1, 2, 3],
            ..DebugPlan::default()
        };
        assert!(soft.check(&stops).is_err() && hard.check(&stops).is_ok());
        assert!(none.check(&DebugPlan::default()).is_err());
    }

    #[test]
    fn accesses_hit_what_they_touch() {
        let w = |kind| Watch {
            at: 0x1004,
            len: 4,
            kind,
        };
        assert_eq!(w(WatchKind::Write).hit(0x1004, 1, true), Some(0x1004));
        assert_eq!(w(WatchKind::Write).hit(0x1007, 8, true), Some(0x1007));
        assert_eq!(w(WatchKind::Write).hit(0x1000, 5, true), Some(0x1004));
        assert_eq!(w(WatchKind::Write).hit(0x1000, 4, true), None);
        assert_eq!(w(WatchKind::Write).hit(0x1008, 4, true), None);
        assert_eq!(w(WatchKind::Write).hit(0x1004, 4, false), None);
        assert_eq!(w(WatchKind::Read).hit(0x1004, 4, true), None);
        assert_eq!(w(WatchKind::Access).hit(0x1006, 4, false), Some(0x1006));
        let last = Watch {
            at: u64::MAX,
            len: 1,
            kind: WatchKind::Access,
        };
        assert_eq!(last.hit(u64::MAX - 3, 4, true), Some(u64::MAX));
        assert_eq!(last.hit(0, 4, true), None);
    }
}
