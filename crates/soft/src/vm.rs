//! What the vCPUs of a VM share: memory, the outside, event flags, the stop-the-world gate.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyrite_engine::{CpuIo, CpuidTable, EngineCaps, EngineError, Vcpu, VcpuControl, Vm, VmConfig};
use pyrite_mem::{CodeListener, GuestMemory};
use pyrite_state::Inspect;

use crate::apic::Apic;
use crate::frame::{EXIT_WANTED, FrameMapping};
use crate::vcpu::SoftVcpu;

/// Event flags of a vCPU: why it should look up from its work.
pub mod event {
    /// `VcpuControl::stop`.
    pub const STOP: u32 = 1 << 0;
    /// The APIC or the PIC may have an interrupt.
    pub const INTERRUPT: u32 = 1 << 1;
    /// An NMI is to be latched.
    pub const NMI: u32 = 1 << 2;
    /// INIT signal.
    pub const INIT: u32 = 1 << 3;
    /// A start-up IPI; its vector is in `VcpuShared::sipi_vector`.
    pub const SIPI: u32 = 1 << 4;
    /// Another vCPU wants all others to stand still.
    pub const EXCLUSIVE: u32 = 1 << 5;
    /// Pages were written by a device: see `VcpuShared::stale_pages`.
    pub const STALE_CODE: u32 = 1 << 6;
    /// Drop write permission from the soft TLBs.
    pub const DROP_WRITE: u32 = 1 << 7;
    /// The APIC timer may have expired.
    pub const TIMER: u32 = 1 << 8;
    /// Somebody wants to see the counters.
    pub const SAMPLE: u32 = 1 << 9;
    /// Guest-physical pages lead elsewhere: all translations of addresses and code must go.
    pub const REMAPPED: u32 = 1 << 10;
}

/// Which user programs are executed directly ([`crate::direct`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectPolicy {
    /// None.
    Never,
    /// Those that compute for long enough between entries into the guest's kernel.
    WhenItPays,
    /// All that can be, which is slow: for tests.
    Always,
}

/// How the engine is tuned and tested.
#[derive(Clone, Debug)]
pub struct SoftOptions {
    /// Use the translator; off = interpreter only.
    pub translate: bool,
    /// Which user programs run on the host's processor itself, where the host allows it.
    pub direct: DirectPolicy,
    /// Link blocks directly.
    pub link: bool,
    /// Check runs of accesses once.
    pub share_checks: bool,
    /// Copy translations for the same code at another address.
    pub move_blocks: bool,
    /// Translate a block when it is met first, not the second time.
    pub translate_at_once: bool,
    /// Most guest instructions of a block.
    pub block_insns_max: usize,
    /// Most conditional branches behind which a block goes on.
    pub branches_max: usize,
    /// Keep even flags exact that no later instruction reads, at every memory access.
    pub precise_flags: bool,
    /// Size of the code cache per vCPU, in bytes. Memory is taken as it fills. One that is too small
    /// for a program is emptied over and over: at 16 MiB a single run of the C compiler filled it 34
    /// times, at 64 MiB 3 times.
    pub code_cache_bytes: usize,
}

impl Default for SoftOptions {
    fn default() -> Self {
        SoftOptions {
            translate: true,
            direct: DirectPolicy::WhenItPays,
            link: true,
            share_checks: true,
            move_blocks: true,
            translate_at_once: false,
            block_insns_max: 64,
            branches_max: 5,
            precise_flags: false,
            code_cache_bytes: 64 << 20,
        }
    }
}

/// The side of a vCPU that other threads may touch.
pub struct VcpuShared {
    /// Bits of [`event`].
    pub events: AtomicU32,
    /// Vector of the latched start-up IPI.
    pub sipi_vector: AtomicU32,
    /// Guest-physical pages whose translations must go. `None` = all of them (overflow).
    pub stale_pages: Mutex<Option<Vec<u64>>>,
    /// The local APIC.
    pub apic: Apic,
    /// The frame's mapping, for the exit request.
    pub frame: FrameMapping,
    /// The process in which the vCPU executes a user program now, by its id; 0 = none.
    pub direct_runner: AtomicI32,
    /// Pages that user programs may write directly have become pages that they may not.
    pub direct_stale: AtomicBool,
    /// True while the vCPU may touch guest memory or translated code: see [`Gate`].
    pub in_guest: AtomicBool,
    parked: Mutex<bool>,
    wake: Condvar,
    sample: Mutex<Sample>,
    sampled: Condvar,
}

/// What a vCPU shows of itself: the latest copy, which it makes when asked.
#[derive(Default)]
struct Sample {
    /// Inside `run`.
    running: bool,
    /// Copies made.
    count: u64,
    tree: Option<Inspect>,
}

/// How long a vCPU may take to show its counters; one that waits in a device takes longer.
const SAMPLE_WITHIN: Duration = Duration::from_millis(100);

impl VcpuShared {
    /// Raises events and makes the vCPU look.
    pub fn raise(&self, events: u32) {
        self.events.fetch_or(events, Ordering::SeqCst);
        self.ask_to_leave();
        let parked = lock(&self.parked);
        if *parked {
            self.wake.notify_all();
        }
    }

    /// Makes the vCPU leave guest code, whatever executes it.
    fn ask_to_leave(&self) {
        self.frame
            .exit_request()
            .store(EXIT_WANTED, Ordering::SeqCst);
        let runner = self.direct_runner.load(Ordering::SeqCst);
        if runner != 0 {
            crate::direct::interrupt(runner);
        }
    }

    /// Notes that the vCPU is inside `run` or has left it.
    pub(crate) fn set_running(&self, running: bool) {
        lock(&self.sample).running = running;
    }

    /// Takes a copy of what the vCPU shows of itself.
    pub(crate) fn show(&self, tree: Inspect) {
        let mut s = lock(&self.sample);
        s.count += 1;
        s.tree = Some(tree);
        self.sampled.notify_all();
    }

    /// What the vCPU shows of itself, fresh if it answers in time.
    fn inspect(&self) -> Inspect {
        let mut s = lock(&self.sample);
        if s.running {
            let count = s.count;
            drop(s);
            self.raise(event::SAMPLE);
            s = lock(&self.sample);
            s = self
                .sampled
                .wait_timeout_while(s, SAMPLE_WITHIN, |s| s.count == count && s.running)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        s.tree.clone().unwrap_or(Inspect::Node(Vec::new()))
    }

    /// Where the vCPU is as seen from outside, without disturbing it.
    fn waits(&self) -> Inspect {
        let parked = *lock(&self.parked);
        Inspect::node([
            ("parked", Inspect::Bool(parked)),
            (
                "in-guest",
                Inspect::Bool(self.in_guest.load(Ordering::SeqCst)),
            ),
            (
                "events",
                Inspect::Hex(self.events.load(Ordering::SeqCst).into()),
            ),
            (
                "exit-request",
                Inspect::Uint(self.frame.exit_request().load(Ordering::SeqCst).into()),
            ),
        ])
    }

    /// Waits until an event is raised or `timeout` has passed.
    pub fn park(&self, timeout: Option<std::time::Duration>) {
        let mut parked = lock(&self.parked);
        *parked = true;
        if self.events.load(Ordering::SeqCst) == 0 {
            parked = match timeout {
                Some(t) => {
                    self.wake
                        .wait_timeout(parked, t)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self
                    .wake
                    .wait(parked)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        *parked = false;
    }
}

/// Locks a mutex; poison is not a state because a panic ends the process.
pub fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all vCPUs and the APICs share.
pub struct VmShared {
    /// RAM.
    pub memory: Arc<GuestMemory>,
    /// Everything outside.
    pub io: Arc<dyn CpuIo>,
    /// Guest time in ns.
    pub clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// CPUID, common part.
    pub cpuid: CpuidTable,
    /// Guest TSC = host TSC + this, in cycles.
    pub tsc_offset: AtomicI64,
    /// The guest TSC while no vCPU runs.
    pub tsc_stand: crate::apic::TscStand,
    /// Frequency of the TSC in kHz.
    pub tsc_khz: u64,
    /// Width of a guest-physical address in bits.
    pub maxphyaddr: u8,
    /// Tuning.
    pub options: SoftOptions,
    /// By vCPU index = APIC id.
    pub vcpus: Vec<VcpuShared>,
    /// Level of the PIC's INTR output (LINT0 of vCPU 0).
    pub pic_intr: AtomicBool,
    /// Held by the vCPU that made the others stand still.
    pub exclusive: Mutex<()>,
    /// The vCPU that is exclusive now, plus 1; 0 = none.
    pub exclusive_owner: AtomicU32,
    /// Counts exclusive sections, for statistics.
    pub exclusive_count: AtomicU64,
    /// What has been translated.
    pub code_map: crate::xlate::CodeMap,
    /// What user programs must not execute directly.
    pub found: crate::direct::Found,
    /// Copies of pages that have such instructions, without them.
    pub patched: crate::direct::Patched,
}

impl VmShared {
    /// What the vCPUs of a new VM share; nothing runs yet.
    pub(crate) fn new(
        config: VmConfig,
        options: SoftOptions,
    ) -> Result<Arc<VmShared>, EngineError> {
        let os = |source| EngineError::Os {
            what: "cannot map a vCPU frame".to_owned(),
            source,
        };
        let mut vcpus = Vec::new();
        for n in 0..config.vcpus {
            vcpus.push(VcpuShared {
                events: AtomicU32::new(0),
                sipi_vector: AtomicU32::new(0),
                stale_pages: Mutex::new(Some(Vec::new())),
                apic: Apic::new(n),
                frame: FrameMapping::new().map_err(os)?,
                direct_runner: AtomicI32::new(0),
                direct_stale: AtomicBool::new(false),
                in_guest: AtomicBool::new(false),
                parked: Mutex::new(false),
                wake: Condvar::new(),
                sample: Mutex::default(),
                sampled: Condvar::new(),
            });
        }
        let tsc_khz = crate::apic::host_tsc_khz();
        let maxphyaddr = config
            .cpuid
            .get(0x8000_0008, 0)
            .map_or(40, |e| (e.eax & 0xff) as u8)
            .clamp(36, 52);
        let code_map = crate::xlate::CodeMap::new(&config.memory);
        let shared = Arc::new(VmShared {
            memory: config.memory,
            io: config.io,
            clock: config.clock,
            cpuid: config.cpuid,
            tsc_offset: AtomicI64::new(0),
            tsc_stand: crate::apic::TscStand::default(),
            tsc_khz,
            maxphyaddr,
            options,
            vcpus,
            pic_intr: AtomicBool::new(false),
            exclusive: Mutex::new(()),
            exclusive_owner: AtomicU32::new(0),
            exclusive_count: AtomicU64::new(0),
            code_map,
            found: crate::direct::Found::default(),
            patched: crate::direct::Patched::default(),
        });
        shared
            .memory
            .set_code_listener(Box::new(StaleCode(Arc::downgrade(&shared))));
        Ok(shared)
    }

    /// Runs `f` while no other vCPU executes guest code or touches guest memory.
    ///
    /// The calling vCPU must have `in_guest` set; it is cleared while waiting for the gate, so two
    /// vCPUs that ask at once take turns.
    pub fn exclusive<R>(&self, me: u32, f: impl FnOnce() -> R) -> R {
        if self.vcpus.len() == 1 || self.exclusive_owner.load(Ordering::SeqCst) == me + 1 {
            return f();
        }
        let mine = &self.vcpus[me as usize];
        mine.in_guest.store(false, Ordering::SeqCst);
        let guard = lock(&self.exclusive);
        self.exclusive_count.fetch_add(1, Ordering::Relaxed);
        for (n, v) in self.vcpus.iter().enumerate() {
            if n != me as usize {
                v.events.fetch_or(event::EXCLUSIVE, Ordering::SeqCst);
                v.ask_to_leave();
            }
        }
        for (n, v) in self.vcpus.iter().enumerate() {
            let mut spins = 0u32;
            while n != me as usize && v.in_guest.load(Ordering::SeqCst) {
                spins += 1;
                if spins < 200 {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
        }
        self.exclusive_owner.store(me + 1, Ordering::SeqCst);
        let r = f();
        self.exclusive_owner.store(0, Ordering::SeqCst);
        for v in &self.vcpus {
            v.events.fetch_and(!event::EXCLUSIVE, Ordering::SeqCst);
        }
        drop(guard);
        mine.enter_guest(self);
        r
    }
}

impl VcpuShared {
    /// Declares that this vCPU is about to touch guest state; waits while another is exclusive.
    pub fn enter_guest(&self, vm: &VmShared) {
        loop {
            self.in_guest.store(true, Ordering::SeqCst);
            if self.events.load(Ordering::SeqCst) & event::EXCLUSIVE == 0 {
                return;
            }
            self.in_guest.store(false, Ordering::SeqCst);
            drop(lock(&vm.exclusive));
        }
    }

    /// The counterpart of [`VcpuShared::enter_guest`].
    pub fn leave_guest(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }
}

/// A VM of the software engine.
pub struct SoftVm {
    shared: Arc<VmShared>,
    caps: EngineCaps,
    vcpus: Mutex<Vec<Option<Box<SoftVcpu>>>>,
}

struct StaleCode(std::sync::Weak<VmShared>);

impl CodeListener for StaleCode {
    fn code_written(&self, page_gpa: u64) {
        // LIMIT: longer lists become "everything".
        const STALE_MAX: usize = 256;
        let Some(vm) = self.0.upgrade() else { return };
        if let Some(off) = vm.memory.ram_offset(page_gpa, 1) {
            vm.patched.forget(off);
        }
        for v in &vm.vcpus {
            v.direct_stale.store(true, Ordering::SeqCst);
            {
                let mut stale = lock(&v.stale_pages);
                if stale.as_ref().is_some_and(|p| p.len() >= STALE_MAX) {
                    *stale = None;
                } else if let Some(p) = stale.as_mut() {
                    p.push(page_gpa);
                }
            }
            v.raise(event::STALE_CODE);
        }
    }
    fn mapping_changed(&self, _first: u64, _last: u64) {
        let Some(vm) = self.0.upgrade() else { return };
        for v in &vm.vcpus {
            v.raise(event::REMAPPED);
        }
    }
}

impl SoftVm {
    /// Creates a VM with default options.
    pub fn new(config: VmConfig) -> Result<Arc<SoftVm>, EngineError> {
        SoftVm::with_options(config, SoftOptions::default())
    }

    /// Creates a VM.
    pub fn with_options(
        config: VmConfig,
        options: SoftOptions,
    ) -> Result<Arc<SoftVm>, EngineError> {
        let count = config.vcpus;
        let shared = VmShared::new(config, options)?;
        let tsc_khz = shared.tsc_khz;
        let vcpus = (0..count)
            .map(|n| SoftVcpu::new(Arc::clone(&shared), n).map(|v| Some(Box::new(v))))
            .collect::<Result<Vec<_>, _>>()?;
        crate::apic::start_timer_thread(&shared)?;
        Ok(Arc::new(SoftVm {
            shared,
            caps: EngineCaps {
                name: "soft",
                max_vcpus: 64,
                tsc_khz,
                debug: crate::debug::CAPS,
            },
            vcpus: Mutex::new(vcpus),
        }))
    }
}

impl SoftVm {
    /// The vCPU `index` by its own type, once: for tests that reach into its state between runs
    /// without the cost of [`Vcpu::set_state`]. Otherwise as [`Vm::take_vcpu`].
    pub fn take_soft_vcpu(&self, index: u32) -> Result<Box<SoftVcpu>, EngineError> {
        lock(&self.vcpus)
            .get_mut(index as usize)
            .and_then(Option::take)
            .ok_or_else(|| EngineError::Internal(format!("vCPU {index} is not there or was taken")))
    }
}

#[cfg(test)]
impl SoftVm {
    /// The vCPU itself, for tests of the parts.
    pub(crate) fn take_soft(&self, index: u32) -> Option<Box<SoftVcpu>> {
        lock(&self.vcpus).get_mut(index as usize)?.take()
    }
}

struct Control {
    shared: Arc<VmShared>,
    index: u32,
}

impl VcpuControl for Control {
    fn stop(&self) {
        if let Some(v) = self.shared.vcpus.get(self.index as usize) {
            v.raise(event::STOP);
        }
    }
}

impl Vm for SoftVm {
    fn caps(&self) -> &EngineCaps {
        &self.caps
    }
    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        self.take_soft_vcpu(index).map(|v| v as Box<dyn Vcpu>)
    }
    fn control(&self, index: u32) -> Arc<dyn VcpuControl> {
        Arc::new(Control {
            shared: Arc::clone(&self.shared),
            index,
        })
    }
    fn send_msi(&self, addr: u64, data: u32) {
        crate::apic::deliver_msi(&self.shared, addr, data);
    }
    fn set_pic_intr(&self, level: bool) {
        let was = self.shared.pic_intr.swap(level, Ordering::SeqCst);
        if level && !was {
            crate::apic::lint0_edge(&self.shared);
        }
        if level && let Some(v) = self.shared.vcpus.first() {
            v.raise(event::INTERRUPT);
        }
    }
    fn send_nmi(&self, index: u32) {
        if let Some(v) = self.shared.vcpus.get(index as usize) {
            v.raise(event::NMI);
        }
    }
    fn drop_write_permission(&self) {
        for v in &self.shared.vcpus {
            v.raise(event::DROP_WRITE);
        }
    }
    fn inspect(&self) -> Inspect {
        let shared = &self.shared;
        let exclusive = shared.exclusive_count.load(Ordering::Relaxed);
        let mut children = vec![
            ("tsc-khz".to_owned(), Inspect::Uint(shared.tsc_khz)),
            ("exclusive-sections".to_owned(), Inspect::Uint(exclusive)),
        ];
        if let Some(ns) = crate::apic::thread_sleeps_ns(shared) {
            children.push(("timer-thread-sleeps-ns".to_owned(), Inspect::Uint(ns)));
        }
        // First what can be seen without asking: a vCPU that is asked wakes up, and what kept it
        // asleep would be gone.
        let outside: Vec<_> = (0..)
            .zip(&shared.vcpus)
            .map(|(n, v)| (v.waits(), crate::apic::inspect(shared, n)))
            .collect();
        for (n, (v, (waits, apic))) in shared.vcpus.iter().zip(outside).enumerate() {
            let mut tree = v.inspect();
            if let Inspect::Node(c) = &mut tree {
                c.push(("waits".to_owned(), waits));
                c.push(("apic".to_owned(), apic));
            }
            children.push((format!("vcpu{n}"), tree));
        }
        Inspect::Node(children)
    }
}
