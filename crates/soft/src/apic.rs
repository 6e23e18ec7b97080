//! Local APICs, inter-processor interrupts, APIC timers, guest TSC.
//!
//! Intel SDM Vol. 3A chapter 10. Each APIC has one small lock; no code holds two of them, and
//! nothing outside ([`CpuIo::eoi`](pyrite_engine::CpuIo::eoi), `VcpuShared::raise`, the clock) is
//! called with one held.
//!
//! What the MSR and CR8 instructions need: [`msr_read`], [`msr_write`], [`set_apic_base`],
//! [`Apic::cr8`], [`set_cr8`], [`Apic::set_tsc_adjust`], [`Apic::init_reset`].

mod count;
mod deliver;
mod msr;
mod regs;
mod show;
mod timer;
mod tsc;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

use pyrite_x86::ApicState;

use self::regs::{Regs, esr, reg};
use self::timer::{KeeperLink, TscAdjust};
use crate::vm::{VmShared, event, lock};

pub use self::count::BUS_KHZ;
pub use self::deliver::{deliver_msi, lint0_edge};
pub use self::msr::{msr_read, msr_write, set_apic_base};
pub use self::show::inspect;
pub(crate) use self::timer::TimeKeeper;
pub use self::timer::{
    clock_changed, clock_runs, poll_timer, start_timer_thread, thread_sleeps_ns, time_to_timer,
};
pub use self::tsc::{
    TscStand, guest_tsc, host_tsc_khz, saved_tsc, set_guest_tsc, sleep_precisely, vcpu_starts,
    vcpu_stops,
};

/// One local APIC. Interior lock: any thread may deliver to it.
pub struct Apic {
    regs: Mutex<Regs>,
    tsc_adjust: TscAdjust,
    keeper: OnceLock<KeeperLink>,
}

impl Apic {
    /// In its reset state.
    pub fn new(id: u32) -> Apic {
        Apic {
            regs: Mutex::new(Regs::new(id)),
            tsc_adjust: TscAdjust::default(),
            keeper: OnceLock::new(),
        }
    }

    fn attach(&self, keeper: &Arc<TimeKeeper>) {
        let _ = self.keeper.set(KeeperLink(Arc::clone(keeper)));
    }

    /// The VM's time, once the timer thread was started.
    pub(crate) fn keeper(&self) -> Option<&TimeKeeper> {
        self.keeper.get().map(|k| &*k.0)
    }

    /// Takes the highest pending interrupt above the processor priority: IRR to ISR.
    pub fn acknowledge(&self) -> Option<u8> {
        lock(&self.regs).acknowledge()
    }

    /// An interrupt waits that the processor priority lets through.
    pub fn has_interrupt(&self) -> bool {
        lock(&self.regs).deliverable().is_some()
    }

    /// LINT0 passes the PIC's interrupts (virtual wire), or the APIC is disabled.
    pub fn accepts_extint(&self) -> bool {
        lock(&self.regs).accepts_extint()
    }

    /// CR8: bits 7:4 of the task priority.
    pub fn cr8(&self) -> u64 {
        lock(&self.regs).cr8()
    }

    /// IA32_TSC_ADJUST of the vCPU, which TSC deadlines are measured with. The owner of the MSR
    /// states it whenever it changes.
    pub fn set_tsc_adjust(&self, adjust: u64) {
        self.tsc_adjust.0.store(adjust as i64, Ordering::Relaxed);
    }

    /// INIT: all registers but id, version and mode. Intel SDM Vol. 3A §10.4.7.3, §10.12.5.1.
    pub fn init_reset(&self) {
        lock(&self.regs).reset();
    }

    /// Saved form.
    pub fn save(&self) -> ApicState {
        let now_ns = self.keeper().map_or(0, TimeKeeper::now_ns);
        lock(&self.regs).save(now_ns)
    }

    /// Takes a saved form and IA32_APIC_BASE over.
    pub fn restore(&self, state: &ApicState, apic_base: u64) {
        lock(&self.regs).restore(state, apic_base);
        // Timers may have come with it; the thread plans anew.
        if let Some(keeper) = self.keeper() {
            keeper.kick();
        }
    }
}

/// CR8 write; the upper bits were checked by the caller.
pub fn set_cr8(vm: &VmShared, index: u32, value: u64) {
    let v = &vm.vcpus[index as usize];
    let wake = lock(&v.apic.regs).set_tpr((value as u8 & 0xf) << 4);
    if wake {
        v.raise(event::INTERRUPT);
    }
}

/// Guest time, if a load of register `n` depends on it.
fn now_for_read(vm: &VmShared, n: usize) -> u64 {
    match n {
        reg::CURRENT_COUNT => (vm.clock)(),
        _ => 0,
    }
}

/// Guest time, if a store to register `n` depends on it. The clock is not asked under the lock.
fn now_for_write(vm: &VmShared, n: usize) -> u64 {
    match n {
        reg::INITIAL_COUNT | reg::DIVIDE | reg::LVT_TIMER => (vm.clock)(),
        _ => 0,
    }
}

/// Register load in the xAPIC page.
///
/// Registers are 4 bytes at multiples of 16; other bytes read as zero. Intel SDM Vol. 3A §10.4.1.
pub fn mmio_read(vm: &VmShared, index: u32, offset: u64, out: &mut [u8]) {
    out.fill(0);
    let Some(v) = vm.vcpus.get(index as usize) else {
        return;
    };
    let n = (offset >> 4) as usize & 0xff;
    let now_ns = now_for_read(vm, n);
    let (value, wake) = {
        let mut regs = lock(&v.apic.regs);
        match regs.read(n, || now_ns) {
            Ok(value) => (value, false),
            Err(_) => (0, regs.error(esr::ILLEGAL_REGISTER)),
        }
    };
    if wake {
        v.raise(event::INTERRUPT);
    }
    let bytes = value.to_le_bytes();
    let first = (offset & 0xf) as usize;
    for (to, from) in out.iter_mut().zip(bytes.iter().skip(first)) {
        *to = *from;
    }
}

/// Register store in the xAPIC page. Only aligned 32-bit stores have an effect.
pub fn mmio_write(vm: &VmShared, index: u32, offset: u64, data: &[u8]) {
    let (Some(v), Ok(bytes)) = (vm.vcpus.get(index as usize), <[u8; 4]>::try_from(data)) else {
        return;
    };
    if offset & 0xf != 0 {
        return;
    }
    let n = (offset >> 4) as usize & 0xff;
    let value = u32::from_le_bytes(bytes);
    let now_ns = now_for_write(vm, n);
    let effect = {
        let mut regs = lock(&v.apic.regs);
        match regs.write(n, value, || now_ns) {
            Ok(e) => e,
            Err(_) => regs::Effect {
                interrupt: regs.error(esr::ILLEGAL_REGISTER),
                ..regs::Effect::default()
            },
        }
    };
    if effect.timer {
        timer::armed(vm, index);
    }
    deliver::apply(vm, index, effect, false);
}

#[cfg(test)]
mod tests;
