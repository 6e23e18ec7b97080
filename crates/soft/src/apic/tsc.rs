//! The time-stamp counter: the host's frequency, the guest's offset.
//!
//! Guest TSC of a vCPU = host TSC + offset of the VM + IA32_TSC_ADJUST of the vCPU.
//! Intel SDM Vol. 3B §17.17.
//!
//! A VM that starts from reset, and is never paused, has the host's TSC: user programs that run on the host's
//! processor itself ([`crate::direct`]) can then read it without a trap. Nothing promises that the counter
//! begins at 0 but the manual, and firmware and earlier kernels run before anybody looks.
//!
//! While no vCPU runs, the TSC advances exactly as guest time does, which stands still during a
//! pause: a guest that compares its clocks must not find that one of them has jumped.

// UNSAFETY: RDTSC and prctl are unsafe functions by their signatures only.
#![allow(unsafe_code, reason = "RDTSC and prctl")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::vm::{VmShared, lock};

/// The host's TSC.
#[inline]
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets user code execute it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's TSC in kHz. The first call may take 20 ms.
pub fn host_tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| enumerated_khz().unwrap_or_else(calibrated_khz))
}

/// What CPUID says: crystal and ratio (leaf 15H), or a hypervisor's timing leaf (4000_0010H).
///
/// Leaf 16H is of no use: its base frequency is rounded to MHz and need not be the TSC's.
fn enumerated_khz() -> Option<u64> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(0).eax >= 0x15 {
        let r = __cpuid_count(0x15, 0);
        if r.eax != 0 && r.ebx != 0 && r.ecx != 0 {
            return Some(u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax) / 1000);
        }
    }
    if __cpuid(1).ecx >> 31 != 0 {
        let max = __cpuid(0x4000_0000).eax;
        if (0x4000_0010..0x4001_0000).contains(&max) {
            let khz = u64::from(__cpuid(0x4000_0010).eax);
            return (khz > 100_000).then_some(khz);
        }
    }
    None
}

/// A moment in both times, read as close together as the scheduler allowed in a few tries.
fn moment() -> (Instant, u64) {
    let mut best = (u64::MAX, Instant::now(), 0);
    for _ in 0..8 {
        let before = host_tsc();
        let t = Instant::now();
        let after = host_tsc();
        let gap = after.wrapping_sub(before);
        if gap < best.0 {
            best = (gap, t, before.wrapping_add(gap / 2));
        }
    }
    (best.1, best.2)
}

fn calibrated_khz() -> u64 {
    let (t0, c0) = moment();
    std::thread::sleep(Duration::from_millis(18));
    let (t1, c1) = moment();
    let ns = (t1 - t0).as_nanos().max(1);
    let khz = u128::from(c1.wrapping_sub(c0)) * 1_000_000 / ns;
    u64::try_from(khz).unwrap_or(1_000_000).max(1)
}

/// The TSC between runs.
pub struct TscStand {
    /// No vCPU runs: `tsc` counts, not the host's.
    stands: AtomicBool,
    /// The VM was reset and has not run since: it will have the host's TSC.
    fresh: AtomicBool,
    /// The guest TSC when it came to stand.
    tsc: AtomicU64,
    since: Mutex<Since>,
}

#[derive(Default)]
struct Since {
    /// vCPUs that run.
    running: u32,
    /// Guest time in ns that belongs to `TscStand::tsc`.
    at_ns: u64,
}

impl Default for TscStand {
    /// Of a VM that has not run: 0, whatever the host's is, so that no deadline of a state that is loaded
    /// has passed.
    fn default() -> Self {
        TscStand {
            stands: AtomicBool::new(true),
            fresh: AtomicBool::new(true),
            tsc: AtomicU64::new(0),
            since: Mutex::default(),
        }
    }
}

impl TscStand {
    /// The TSC that belongs to guest time now.
    fn standing(&self, vm: &VmShared, since: &Since) -> u64 {
        let ns = (vm.clock)().saturating_sub(since.at_ns);
        let tsc = self.tsc.load(Ordering::SeqCst);
        tsc.wrapping_add(ns_to_cycles(ns, vm.tsc_khz))
    }

    fn stand(&self, vm: &VmShared, since: &mut Since, tsc: u64) {
        since.at_ns = (vm.clock)();
        self.tsc.store(tsc, Ordering::SeqCst);
        self.stands.store(true, Ordering::SeqCst);
    }
}

/// A vCPU begins to run.
pub fn vcpu_starts(vm: &VmShared) {
    let stand = &vm.tsc_stand;
    let mut since = lock(&stand.since);
    since.running += 1;
    if stand.stands.load(Ordering::SeqCst) {
        let offset = if stand.fresh.swap(false, Ordering::SeqCst) {
            0
        } else {
            stand.standing(vm, &since).wrapping_sub(host_tsc())
        };
        vm.tsc_offset.store(offset as i64, Ordering::SeqCst);
        stand.stands.store(false, Ordering::SeqCst);
        super::clock_runs(vm);
    }
}

/// A vCPU has come back.
pub fn vcpu_stops(vm: &VmShared) {
    let stand = &vm.tsc_stand;
    let mut since = lock(&stand.since);
    since.running = since.running.saturating_sub(1);
    if since.running == 0 {
        let tsc = guest_tsc(vm);
        stand.stand(vm, &mut since, tsc);
    }
}

/// The guest TSC that belongs to the state of a stopped vCPU.
pub fn saved_tsc(vm: &VmShared) -> u64 {
    let since = lock(&vm.tsc_stand.since);
    if vm.tsc_stand.stands.load(Ordering::SeqCst) {
        vm.tsc_stand.standing(vm, &since)
    } else {
        guest_tsc(vm)
    }
}

/// The guest TSC now, without IA32_TSC_ADJUST of a vCPU.
#[inline]
pub fn guest_tsc(vm: &VmShared) -> u64 {
    if vm.tsc_stand.stands.load(Ordering::Relaxed) {
        return vm.tsc_stand.tsc.load(Ordering::SeqCst);
    }
    host_tsc().wrapping_add_signed(vm.tsc_offset.load(Ordering::Relaxed))
}

/// Sets the guest TSC of the VM (restore).
pub fn set_guest_tsc(vm: &VmShared, tsc: u64) {
    {
        let mut since = lock(&vm.tsc_stand.since);
        vm.tsc_stand.fresh.store(tsc == 0, Ordering::SeqCst);
        if since.running == 0 {
            vm.tsc_stand.stand(vm, &mut since, tsc);
        } else {
            let offset = tsc.wrapping_sub(host_tsc()) as i64;
            vm.tsc_offset.store(offset, Ordering::SeqCst);
        }
    }
    super::clock_changed(vm);
}

/// Lets the calling thread's timed waits end when they should instead of up to 50 µs later, as
/// Linux allows itself by default.
pub fn sleep_precisely() {
    // SAFETY: changes nothing but the timer slack of this thread; failure is harmless.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) };
}

/// Cycles to time.
pub fn cycles_to_ns(cycles: u64, khz: u64) -> u64 {
    u64::try_from(u128::from(cycles) * 1_000_000 / u128::from(khz.max(1))).unwrap_or(u64::MAX)
}

/// Time to cycles.
pub fn ns_to_cycles(ns: u64, khz: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}
