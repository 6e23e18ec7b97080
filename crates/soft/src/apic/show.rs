//! What a local APIC shows of itself: enough to see why a vCPU does not wake up.

use pyrite_state::Inspect;

use super::regs::{Regs, TimerMode};
use super::timer::{Deadline, deadline};
use super::tsc::{cycles_to_ns, guest_tsc};
use crate::vm::{VmShared, lock};

/// The vectors whose bits are set, in hexadecimal, ascending; "-" if there are none.
fn vectors(bits: &[u32; 8]) -> Inspect {
    let set: Vec<String> = (0..256usize)
        .filter(|n| bits[n / 32] >> (n % 32) & 1 != 0)
        .map(|n| format!("{n:02x}"))
        .collect();
    Inspect::Text(if set.is_empty() {
        "-".to_owned()
    } else {
        set.join(" ")
    })
}

/// The registers of the APIC of vCPU `index`, and how long its timer has to go. Asks nobody: the
/// vCPU is not disturbed.
pub fn inspect(vm: &VmShared, index: u32) -> Inspect {
    let Some(v) = vm.vcpus.get(index as usize) else {
        return Inspect::Node(Vec::new());
    };
    // Times first: the clock is not asked with the APIC locked.
    let (now_ns, now_tsc) = ((vm.clock)(), guest_tsc(vm));
    let due = deadline(vm, index);
    let regs: Regs = lock(&v.apic.regs).clone();
    let mode = match (regs.enabled(), regs.x2apic()) {
        (false, _) => "disabled",
        (true, false) => "xapic",
        (true, true) => "x2apic",
    };
    let timer_mode = match regs.timer_mode() {
        TimerMode::OneShot => "one-shot",
        TimerMode::Periodic => "periodic",
        TimerMode::Deadline => "tsc-deadline",
    };
    // Negative: it should have fired so long ago.
    let left_ns = due.map(|d| match d {
        Deadline::Count(at) => i128::from(at) - i128::from(now_ns),
        Deadline::Tsc(at) => {
            let ns = cycles_to_ns(at.abs_diff(now_tsc), vm.tsc_khz);
            if at >= now_tsc {
                ns.into()
            } else {
                -i128::from(ns)
            }
        }
    });
    let lvt = regs
        .lvt_entries()
        .map(|(n, e)| (n.to_owned(), Inspect::Hex(e.into())));
    Inspect::node([
        ("mode", Inspect::Text(mode.to_owned())),
        ("id", Inspect::Uint(regs.id.into())),
        ("accepts", Inspect::Bool(regs.accepts_fixed())),
        ("tpr", Inspect::Hex(regs.cr8() << 4)),
        ("ppr", Inspect::Hex(regs.ppr().into())),
        ("irr", vectors(regs.irr())),
        ("isr", vectors(regs.isr())),
        ("tmr", vectors(regs.tmr())),
        (
            "deliverable",
            match regs.deliverable() {
                Some(n) => Inspect::Hex(n.into()),
                None => Inspect::Text("-".to_owned()),
            },
        ),
        ("icr", Inspect::Hex(regs.icr())),
        ("lvt", Inspect::Node(lvt.collect())),
        (
            "timer",
            Inspect::node([
                ("mode", Inspect::Text(timer_mode.to_owned())),
                ("tsc", Inspect::Uint(now_tsc)),
                ("tsc-deadline", Inspect::Uint(regs.tsc_deadline)),
                (
                    "expires-in-ns",
                    Inspect::Text(left_ns.map_or_else(|| "-".to_owned(), |n| n.to_string())),
                ),
            ]),
        ),
    ])
}
