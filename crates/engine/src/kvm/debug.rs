//! Debugging from outside with the processor's debug registers, which KVM lends to the debugger
//! while it lasts. Linux, Documentation/virt/kvm/api.rst, KVM_SET_GUEST_DEBUG.

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use pyrite_x86::bits::rflags;

use super::{Shared, os};
use crate::{DebugCaps, DebugPlan, DebugStop, EngineError, WatchKind};

/// Breakpoints that the processor has: DR0-DR3.
const REGISTERS: usize = 4;
/// DR6: single step. Intel SDM Vol. 3B §17.2.3.
const DR6_BS: u64 = 1 << 14;

/// What this KVM can do.
pub(super) fn caps(fd: &VmFd) -> DebugCaps {
    DebugCaps {
        points: if fd.check_extension(Cap::SetGuestDebug) {
            REGISTERS
        } else {
            0
        },
        registers: true,
    }
}

/// Address and bits of DR7 (condition, length) of each point. Intel SDM Vol. 3B §17.2.4.
fn points(plan: &DebugPlan) -> impl Iterator<Item = (u64, u64)> + '_ {
    // A step is one instruction, wherever it is.
    let stops = plan.stops.iter().filter(|_| !plan.step);
    let watches = plan.watches.iter().map(|w| {
        let condition = if w.kind == WatchKind::Write { 1 } else { 3 };
        let len = match w.len {
            1 => 0,
            2 => 1,
            8 => 2,
            _ => 3,
        };
        (w.at, condition | len << 2)
    });
    // Watches first: their numbers do not depend on whether it is a step.
    watches.chain(stops.map(|at| (*at, 0)))
}

/// The debug structure of a plan. `blocks`: KVM_GUESTDBG_BLOCKIRQ is known.
fn structure(plan: &DebugPlan, blocks: bool) -> kvm_guest_debug {
    let mut d = kvm_guest_debug::default();
    if plan.is_empty() {
        return d;
    }
    d.control = KVM_GUESTDBG_ENABLE;
    if plan.step {
        d.control |= KVM_GUESTDBG_SINGLESTEP;
        if plan.hold_interrupts && blocks {
            d.control |= KVM_GUESTDBG_BLOCKIRQ;
        }
    }
    // Bit 10 is always set.
    let mut dr7 = 1 << 10;
    for (n, (at, bits)) in points(plan).take(REGISTERS).enumerate() {
        d.control |= KVM_GUESTDBG_USE_HW_BP;
        if let Some(r) = d.arch.debugreg.get_mut(n) {
            *r = at;
        }
        dr7 |= 2 << (2 * n) | bits << (16 + 4 * n);
    }
    if let Some(r) = d.arch.debugreg.get_mut(7) {
        *r = dr7;
    }
    d
}

/// Has a vCPU stop for a plan.
pub(super) fn apply(fd: &VcpuFd, shared: &Shared, plan: &DebugPlan) -> Result<(), EngineError> {
    if !plan.is_empty() {
        (caps(&shared.fd).check(plan)).map_err(EngineError::Unsupported)?;
    }
    let known = (shared.fd).check_extension_raw(u64::from(KVM_CAP_SET_GUEST_DEBUG2));
    let blocks = u32::try_from(known).is_ok_and(|k| k & KVM_GUESTDBG_BLOCKIRQ != 0);
    if plan.pass {
        let mut regs = fd.get_regs().map_err(os("read registers from KVM"))?;
        // RF: instruction breakpoints do not count for one instruction.
        regs.rflags |= rflags::RF;
        fd.set_regs(&regs).map_err(os("write registers to KVM"))?;
    }
    fd.set_guest_debug(&structure(plan, blocks))
        .map_err(os("have KVM debug the guest"))
}

/// Why KVM came back, by the DR6 that it shows.
pub(super) fn why(plan: &DebugPlan, dr6: u64) -> DebugStop {
    for n in 0..plan.watches.len().min(REGISTERS) {
        if dr6 >> n & 1 != 0
            && let Some(w) = plan.watches.get(n)
        {
            return DebugStop::Watchpoint {
                at: w.at,
                kind: w.kind,
            };
        }
    }
    if plan.step && (dr6 & DR6_BS != 0 || dr6 & 0xf == 0) {
        return DebugStop::Step;
    }
    DebugStop::Breakpoint
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Watch;

    #[test]
    fn plan_becomes_debug_registers() {
        let plan = DebugPlan {
            stops: vec![0x1000, 0x2000],
            watches: vec![Watch {
                at: 0x3008,
                len: 8,
                kind: WatchKind::Write,
            }],
            ..DebugPlan::default()
        };
        let d = structure(&plan, true);
        assert_eq!(d.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(d.arch.debugreg[..3], [0x3008, 0x1000, 0x2000]);
        // G0-G2; a write of 8 bytes; two instructions.
        assert_eq!(d.arch.debugreg[7], 0x400 | 0x2a | 0b1001 << 16);
        let step = DebugPlan {
            step: true,
            hold_interrupts: true,
            ..plan.clone()
        };
        let d = structure(&step, true);
        assert_eq!(d.arch.debugreg[..3], [0x3008, 0, 0]);
        assert_ne!(d.control & KVM_GUESTDBG_BLOCKIRQ, 0);
        assert_eq!(structure(&step, false).control & KVM_GUESTDBG_BLOCKIRQ, 0);
        assert_eq!(structure(&DebugPlan::default(), true).control, 0);
        assert_eq!(why(&plan, 2), DebugStop::Breakpoint);
        assert_eq!(why(&step, DR6_BS), DebugStop::Step);
        let at = DebugStop::Watchpoint {
            at: 0x3008,
            kind: WatchKind::Write,
        };
        assert_eq!(why(&step, DR6_BS | 1), at);
    }
}
