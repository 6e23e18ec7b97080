//! kvmclock: guest time without leaving the guest.
//!
//! The guest registers a page per vCPU; we put a pair (TSC, guest time) and the scale between
//! them there, and the guest computes the time from its TSC. All vCPUs get the same pair, so that
//! time is the same on each of them (`TSC_STABLE`). The pair is renewed when guest time and TSC
//! have come apart: after a pause or a restore.
//!
//! The interface is described in Linux, `Documentation/virt/kvm/x86/msr.rst`.

use std::time::{SystemTime, UNIX_EPOCH};

use pyrite_mem::GuestMemory;
use pyrite_x86::bits::msr;

use crate::apic::{self, TimeKeeper};
use crate::vcpu::SoftVcpu;
use crate::vm::{VmShared, lock};

/// Bit 0 of MSR_KVM_SYSTEM_TIME_NEW: the page is in use.
const ENABLED: u64 = 1;
/// `flags`: the time is the same on all vCPUs.
const TSC_STABLE: u8 = 1;
/// Bytes of `pvclock_vcpu_time_info`.
const TIME_INFO_BYTES: usize = 32;

/// Writes a kvmclock MSR. False if `number` is not one of them.
pub fn write_msr(v: &mut SoftVcpu, number: u32, value: u64) -> bool {
    match number {
        msr::KVM_WALL_CLOCK_NEW => {
            v.frame.cpu.msrs.kvm_wall_clock = value;
            write_wall_clock(&v.vm, value);
        }
        msr::KVM_SYSTEM_TIME_NEW => {
            v.frame.cpu.msrs.kvm_system_time = value;
            update(v);
        }
        _ => return false,
    }
    true
}

/// Brings the vCPU's page up to date when the vCPU goes on after a pause or a restore.
pub fn refresh(v: &mut SoftVcpu) {
    update(v);
}

fn update(v: &SoftVcpu) {
    let register = v.frame.cpu.msrs.kvm_system_time;
    if register & ENABLED == 0 {
        return;
    }
    let Some((tsc, ns)) = common_pair(&v.vm) else {
        return;
    };
    let info = TimeInfo {
        // The guest reads its own TSC, which has the vCPU's adjustment in it.
        tsc_timestamp: tsc.wrapping_add(v.frame.cpu.msrs.tsc_adjust),
        system_time: ns,
        scale: Scale::of_khz(v.vm.tsc_khz),
    };
    info.publish(&v.vm.memory, register & !ENABLED);
}

/// The pair (VM's TSC, guest ns) that all vCPUs count from.
fn common_pair(vm: &VmShared) -> Option<(u64, u64)> {
    let keeper: &TimeKeeper = vm.vcpus.first()?.apic.keeper()?;
    // 20 µs: less than that no reader can tell from the time that reading takes.
    let enough = vm.tsc_khz / 50;
    let now = moment(|| apic::guest_tsc(vm), || keeper.now_ns(), enough);
    let mut pair = lock(&keeper.pair);
    if let Some(base) = *pair
        && still_together(base, now, vm.tsc_khz)
    {
        return Some(base);
    }
    *pair = Some(now);
    Some(now)
}

/// Both clocks at one moment. On a busy host the thread may lose its processor between the two
/// readings; such a pair would put the clock of one vCPU ahead of the others', for good. So the
/// pair whose readings were closest together is taken, the first within `enough` cycles.
fn moment(mut tsc: impl FnMut() -> u64, mut ns: impl FnMut() -> u64, enough: u64) -> (u64, u64) {
    // LIMIT: a host that interrupts every one of them gets the best.
    const TRIES: u32 = 16;
    let mut best = (u64::MAX, (0, 0));
    for _ in 0..TRIES {
        let before = tsc();
        let at = ns();
        let gap = tsc().saturating_sub(before);
        if gap < best.0 {
            best = (gap, (before + gap / 2, at));
        }
        if gap <= enough {
            break;
        }
    }
    best.1
}

/// The clocks have not come apart since `base`, but for the error of the measured frequency.
fn still_together(base: (u64, u64), now: (u64, u64), khz: u64) -> bool {
    let (Some(cycles), Some(ns)) = (now.0.checked_sub(base.0), now.1.checked_sub(base.1)) else {
        return false;
    };
    let predicted = u128::from(cycles) * 1_000_000 / u128::from(khz.max(1));
    // 1 ms for the two clocks not being read at once, 50 ppm for the frequency.
    predicted.abs_diff(u128::from(ns)) <= 1_000_000 + predicted / 20_000
}

/// Multiplier and shift that turn cycles into ns: `ns = (cycles << shift) * mul >> 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    fn of_khz(khz: u64) -> Scale {
        // ns per cycle as a fraction with 64 binary places; the 32 highest bits become `mul`.
        let fraction = (1_000_000u128 << 64) / u128::from(khz.max(1));
        let width = 128 - fraction.leading_zeros() as i32;
        let mul = if width >= 32 {
            fraction >> (width - 32)
        } else {
            fraction << (32 - width)
        };
        // fraction ≈ mul × 2^(width - 32); ns = cycles × fraction / 2^64
        Scale {
            mul: mul as u32,
            shift: (width - 64).clamp(-31, 31) as i8,
        }
    }
}

/// `pvclock_vcpu_time_info` without its version.
#[derive(Clone, Copy, Debug)]
struct TimeInfo {
    tsc_timestamp: u64,
    system_time: u64,
    scale: Scale,
}

impl TimeInfo {
    /// Writes the structure; a reader that sees an odd or a changed version tries again.
    fn publish(&self, memory: &GuestMemory, gpa: u64) {
        // An address that is unaligned or not RAM is the guest's own problem.
        if !gpa.is_multiple_of(4) || memory.ram_offset(gpa, TIME_INFO_BYTES as u64).is_none() {
            return;
        }
        let Ok(old) = memory.read_u32(gpa) else {
            return;
        };
        let busy = old.wrapping_add(1) | 1;
        let mut b = [0u8; TIME_INFO_BYTES];
        b[0..4].copy_from_slice(&busy.to_le_bytes());
        b[8..16].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        b[16..24].copy_from_slice(&self.system_time.to_le_bytes());
        b[24..28].copy_from_slice(&self.scale.mul.to_le_bytes());
        b[28] = self.scale.shift as u8;
        b[29] = TSC_STABLE;
        publish(memory, gpa, &mut b);
    }
}

/// Odd version, content, even version, each visible before the next.
fn publish(memory: &GuestMemory, gpa: u64, bytes: &mut [u8]) {
    use std::sync::atomic::{Ordering, fence};
    let Some((version, body)) = bytes.split_at_mut_checked(4) else {
        return;
    };
    let busy = u32::from_le_bytes([version[0], version[1], version[2], version[3]]);
    // The range was checked to be RAM, so these cannot fail half-way.
    let _ = memory.write(gpa, version);
    fence(Ordering::SeqCst);
    let _ = memory.write(gpa + 4, body);
    fence(Ordering::SeqCst);
    let _ = memory.write(gpa, &busy.wrapping_add(1).to_le_bytes());
}

/// `pvclock_wall_clock`: the time of day at which guest time was 0.
fn write_wall_clock(vm: &VmShared, gpa: u64) {
    if !gpa.is_multiple_of(4) || vm.memory.ram_offset(gpa, 12).is_none() {
        return;
    }
    let Ok(old) = vm.memory.read_u32(gpa) else {
        return;
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let zero = now.saturating_sub(std::time::Duration::from_nanos((vm.clock)()));
    let mut b = [0u8; 12];
    b[0..4].copy_from_slice(&(old.wrapping_add(1) | 1).to_le_bytes());
    // The interface has 32 bits of seconds; it ends in 2106.
    b[4..8].copy_from_slice(&(zero.as_secs() as u32).to_le_bytes());
    b[8..12].copy_from_slice(&zero.subsec_nanos().to_le_bytes());
    publish(&vm.memory, gpa, &mut b);
}

#[cfg(test)]
mod tests;
