//! One vCPU: its state, its run loop, the order in which events are taken.

// UNSAFETY: dereferences the frame pointer, which is valid while the VM's shared part lives.
#![allow(unsafe_code, reason = "the frame lives in a mapping")]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyrite_engine::{DebugPlan, EngineError, StopReason, Vcpu};
use pyrite_state::Inspect;
use pyrite_x86::bits::{rflags, vector};
use pyrite_x86::{Activity, CpuState, InterruptShadow, gpr, sreg};

use crate::debug::{self, HostDebug};
use crate::exception::Trap;
use crate::frame::Frame;
use crate::mmu::TlbNotes;
use crate::vm::{VcpuShared, VmShared, event, lock};
use crate::{apic, direct, interp, kvmclock, sys, xlate};

/// Events that change the state of the processor when they are taken.
const SIGNALS: u32 = event::INIT | event::SIPI | event::NMI;

/// The frame of this vCPU.
pub struct FrameRef(NonNull<Frame>);

// SAFETY: the frame is owned by one vCPU; moving the owner between threads moves the frame.
unsafe impl Send for FrameRef {}

impl Deref for FrameRef {
    type Target = Frame;
    #[inline]
    fn deref(&self) -> &Frame {
        // SAFETY: the mapping lives in VmShared, which SoftVcpu holds; see SoftVcpu::new.
        unsafe { self.0.as_ref() }
    }
}

impl DerefMut for FrameRef {
    #[inline]
    fn deref_mut(&mut self) -> &mut Frame {
        // SAFETY: as above, and the vCPU is the only one to make references.
        unsafe { self.0.as_mut() }
    }
}

/// Counters, for `inspect`.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "named by what they count")]
pub struct Stats {
    pub interpreted: u64,
    /// By [`iced_x86::Mnemonic`].
    pub by_mnemonic: Box<[u64]>,
    pub interrupts: u64,
    pub exceptions: u64,
    pub halts: u64,
    pub mmio_reads: u64,
    pub mmio_writes: u64,
    pub tlb_flushes: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Stats {
            interpreted: 0,
            by_mnemonic: vec![0; iced_x86::Mnemonic::values().len()].into(),
            interrupts: 0,
            exceptions: 0,
            halts: 0,
            mmio_reads: 0,
            mmio_writes: 0,
            tlb_flushes: 0,
        }
    }
}

impl Stats {
    /// Mnemonics that `inspect` shows: those interpreted most often.
    const SHOWN: usize = 24;

    /// The instructions that were interpreted most often, with how often.
    fn most_interpreted(&self) -> Inspect {
        let mut all: Vec<(u64, iced_x86::Mnemonic)> = iced_x86::Mnemonic::values()
            .zip(&self.by_mnemonic)
            .filter(|(_, n)| **n != 0)
            .map(|(m, n)| (*n, m))
            .collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.truncate(Self::SHOWN);
        Inspect::Node(
            all.into_iter()
                .map(|(n, m)| (format!("{m:?}").to_lowercase(), Inspect::Uint(n)))
                .collect(),
        )
    }
}

/// One vCPU of the software engine.
pub struct SoftVcpu {
    /// Declared before `vm`, which owns the mapping behind it.
    pub frame: FrameRef,
    /// Shared with the other vCPUs.
    pub vm: Arc<VmShared>,
    /// Index = APIC id.
    pub index: u32,
    /// Side tables of the soft TLB.
    pub notes: Box<TlbNotes>,
    /// The interpreter's caches.
    pub interp: interp::Interp,
    /// The translator.
    pub xlate: xlate::Translator,
    /// User programs that run on the host's processor itself.
    pub direct: direct::Direct,
    /// Counters.
    pub stats: Stats,
    /// An interrupt may be waiting for IF or the shadow.
    pub irq_waiting: bool,
    /// DR6 bits of data breakpoints that the current instruction hit.
    pub pending_dr6: u64,
    /// What a debugger outside waits for.
    pub debug: HostDebug,
}

impl SoftVcpu {
    /// Creates vCPU `index` in its reset state.
    pub fn new(vm: Arc<VmShared>, index: u32) -> Result<SoftVcpu, EngineError> {
        let mapping = &vm.vcpus[index as usize].frame;
        let ptr = NonNull::new(mapping.frame_ptr())
            .ok_or_else(|| EngineError::Internal("no frame".to_owned()))?;
        let mut frame = FrameRef(ptr);
        // SAFETY: the mapping is zeroed, which is a valid Frame except for CpuState, written here
        // before anything reads it.
        unsafe {
            std::ptr::addr_of_mut!((*ptr.as_ptr()).cpu).write(CpuState::reset(index, index == 0))
        };
        for t in &mut frame.tlb {
            t.flush();
        }
        for t in &mut frame.tlb2 {
            t.flush2();
        }
        let xlate = xlate::Translator::new(&vm, &mut frame)?;
        let interp = interp::Interp::new(&vm.cpuid)?;
        let mut v = SoftVcpu {
            frame,
            vm,
            index,
            notes: Box::default(),
            interp,
            xlate,
            direct: direct::Direct::default(),
            stats: Stats::default(),
            irq_waiting: true,
            pending_dr6: 0,
            debug: HostDebug::default(),
        };
        let state = CpuState::reset(index, index == 0);
        v.load(&state);
        Ok(v)
    }

    /// The part of this vCPU that other threads may touch.
    pub fn shared(&self) -> &VcpuShared {
        &self.vm.vcpus[self.index as usize]
    }

    fn load(&mut self, state: &CpuState) {
        self.frame.cpu = state.clone();
        self.shared()
            .apic
            .restore(&state.apic, state.msrs.apic_base);
        self.shared().apic.set_tsc_adjust(state.msrs.tsc_adjust);
        self.irq_waiting = true;
        self.flush_tlb(false);
        direct::address_space_changed(self);
    }

    /// Notes accesses to data breakpoints (DR0-DR3). Intel SDM Vol. 3B §17.2.
    pub fn note_data_access(&mut self, lin: u64, len: usize, write: bool) {
        if self.frame.cpu.dr[7] & 0xff != 0 {
            self.pending_dr6 |= sys::debug::data_breakpoints(&self.frame.cpu, lin, len, write);
        }
        self.debug.note_access(lin, len, write);
    }

    /// Handles event flags. `Some` = leave `run`.
    fn take_events(&mut self) -> Option<StopReason> {
        let me = self.shared();
        me.frame.exit_request().store(0, Ordering::SeqCst);
        let mut events = me.events.fetch_and(event::EXCLUSIVE, Ordering::SeqCst);
        if events & event::EXCLUSIVE != 0 {
            // Stand still until the other vCPU is done; it may leave new events behind.
            me.leave_guest();
            let vm = Arc::clone(&self.vm);
            self.shared().enter_guest(&vm);
            events |= self
                .shared()
                .events
                .fetch_and(event::EXCLUSIVE, Ordering::SeqCst);
        }
        if events & event::STALE_CODE != 0 {
            let stale = lock(&self.shared().stale_pages).replace(Vec::new());
            xlate::drop_stale(self, stale);
        }
        if events & event::REMAPPED != 0 {
            self.flush_tlb(false);
            xlate::drop_everything(self);
        }
        if events & event::DROP_WRITE != 0 {
            self.drop_write_entries();
        }
        self.take_signals(events);
        if events & event::SAMPLE != 0 {
            self.shared().show(self.counters());
        }
        if events & (event::INTERRUPT | event::TIMER) != 0 {
            self.irq_waiting = true;
        }
        (events & event::STOP != 0).then_some(StopReason::Requested)
    }

    /// What comes to the processor's pins: INIT, start-up IPI, NMI.
    fn take_signals(&mut self, events: u32) {
        if events & event::INIT != 0 {
            sys::event::init(self);
        }
        if events & event::SIPI != 0 {
            let vector = self.shared().sipi_vector.load(Ordering::SeqCst) as u8;
            sys::event::startup(self, vector);
        }
        if events & event::NMI != 0 {
            self.frame.cpu.nmi_pending = true;
        }
    }

    /// What the vCPU shows of itself.
    fn counters(&self) -> Inspect {
        let (c, s, x) = (&self.frame.cpu, &self.stats, &self.xlate.stats);
        let cache = self.xlate.cache_use();
        Inspect::node([
            ("activity", Inspect::Text(format!("{:?}", c.activity))),
            ("cs-base", Inspect::Hex(c.seg[sreg::CS].base)),
            ("rip", Inspect::Hex(c.rip)),
            ("cpl", Inspect::Uint(c.cpl().into())),
            ("lstar", Inspect::Hex(c.msrs.lstar)),
            ("rflags", Inspect::Hex(c.rflags)),
            (
                "interrupt-enabled",
                Inspect::Bool(c.rflags & rflags::IF != 0),
            ),
            (
                "interrupt-shadow",
                Inspect::Text(format!("{:?}", c.interrupt_shadow)),
            ),
            ("interrupt-may-wait", Inspect::Bool(self.irq_waiting)),
            ("nmi-pending", Inspect::Bool(c.nmi_pending)),
            ("nmi-blocked", Inspect::Bool(c.nmi_blocked)),
            ("rsp", Inspect::Hex(c.gpr[gpr::RSP])),
            ("cr0", Inspect::Hex(c.cr0)),
            ("cr3", Inspect::Hex(c.cr3)),
            ("cr4", Inspect::Hex(c.cr4)),
            ("efer", Inspect::Hex(c.efer)),
            ("cpu-ns", Inspect::Uint(cpu_ns())),
            ("interpreted", Inspect::Uint(s.interpreted)),
            ("interpreted-most", s.most_interpreted()),
            ("interrupts", Inspect::Uint(s.interrupts)),
            ("exceptions", Inspect::Uint(s.exceptions)),
            ("halts", Inspect::Uint(s.halts)),
            ("mmio-reads", Inspect::Uint(s.mmio_reads)),
            ("mmio-writes", Inspect::Uint(s.mmio_writes)),
            ("tlb-flushes", Inspect::Uint(s.tlb_flushes)),
            ("direct", self.direct.inspect()),
            (
                "translator",
                Inspect::node([
                    ("translating-ns", Inspect::Uint(x.translating_ns)),
                    ("blocks", Inspect::Uint(x.blocks)),
                    ("moved-blocks", Inspect::Uint(x.moved)),
                    ("guest-instructions", Inspect::Uint(x.guest_insns)),
                    ("enters", Inspect::Uint(x.enters)),
                    ("lookups", Inspect::Uint(x.lookups)),
                    ("page-checks", Inspect::Uint(x.page_checks)),
                    ("jump-conflicts", Inspect::Uint(x.jump_conflicts)),
                    ("links", Inspect::Uint(x.links)),
                    ("polls", Inspect::Uint(x.polls)),
                    ("interpreted", Inspect::Uint(x.interpreted)),
                    ("interpreted-cold", Inspect::Uint(x.interpreted_cold)),
                    ("slow-memory", Inspect::Uint(x.slow_memory)),
                    ("signals", Inspect::Uint(x.signals)),
                    ("stale-pages", Inspect::Uint(x.stale_pages)),
                    ("cache-bytes", Inspect::Uint(cache as u64)),
                ]),
            ),
        ])
    }

    /// Delivers an NMI or interrupt if one can be taken now. True if something was delivered.
    fn take_interrupt(&mut self) -> Result<bool, Trap> {
        let cpu = &mut self.frame.cpu;
        if cpu.interrupt_shadow != InterruptShadow::None || self.debug.holds_interrupts(cpu) {
            return Ok(false);
        }
        if cpu.nmi_pending && !cpu.nmi_blocked {
            cpu.nmi_pending = false;
            cpu.nmi_blocked = true;
            cpu.activity = Activity::Running;
            sys::event::interrupt(self, vector::NMI)?;
            return Ok(true);
        }
        if !self.irq_waiting || cpu.rflags & rflags::IF == 0 {
            return Ok(false);
        }
        let vm = Arc::clone(&self.vm);
        let vector = match vm.vcpus[self.index as usize].apic.acknowledge() {
            Some(v) => Some(v),
            None if self.index == 0
                && vm.pic_intr.load(Ordering::SeqCst)
                && vm.vcpus[0].apic.accepts_extint() =>
            {
                vm.io.ack_pic()
            }
            None => None,
        };
        let Some(vector) = vector else {
            self.irq_waiting = false;
            return Ok(false);
        };
        self.stats.interrupts += 1;
        if self.frame.cpu.cpl() == 3 {
            direct::tick(self);
        }
        self.frame.cpu.activity = Activity::Running;
        sys::event::interrupt(self, vector)?;
        Ok(true)
    }

    fn run_loop(&mut self) -> StopReason {
        loop {
            if let Some(stop) = self.debug.take_hit() {
                return stop;
            }
            // The exit request may be left over from an event that was withdrawn; taking events
            // clears it, else translated code would leave at once, for ever.
            let me = self.shared();
            let wanted =
                me.events.load(Ordering::SeqCst) | me.frame.exit_request().load(Ordering::SeqCst);
            if wanted != 0
                && let Some(reason) = self.take_events()
            {
                return reason;
            }
            match self.frame.cpu.activity {
                Activity::Shutdown => return StopReason::TripleFault,
                Activity::WaitForSipi => {
                    self.idle();
                    continue;
                }
                Activity::Running | Activity::Halted => {}
            }
            if let Some(p) = self.frame.cpu.pending_event.take() {
                if let Err(Trap::Stop(reason)) = sys::event::pending(self, p) {
                    return reason;
                }
                continue;
            }
            let trap = match self.take_interrupt() {
                Ok(true) => continue,
                Ok(false) if self.frame.cpu.activity == Activity::Halted => {
                    self.stats.halts += 1;
                    self.idle();
                    continue;
                }
                Ok(false) => self.execute(),
                Err(t) => Err(t),
            };
            if let Err(Trap::Stop(reason)) = trap {
                return reason;
            }
        }
    }

    /// Waits for an event outside guest code.
    fn idle(&mut self) {
        self.direct.roam();
        self.shared().leave_guest();
        let wait = apic::time_to_timer(&self.vm, self.index);
        self.shared().park(wait);
        apic::poll_timer(&self.vm, self.index);
        let vm = Arc::clone(&self.vm);
        self.shared().enter_guest(&vm);
    }

    /// Runs guest code until something needs the run loop. Exceptions are delivered inside.
    fn execute(&mut self) -> Result<(), Trap> {
        if self.debug.armed() {
            return debug::execute(self);
        }
        if self.vm.options.translate && xlate::can_run(self) {
            xlate::run(self)
        } else {
            interp::step(self)
        }
    }
}

/// Processor time of this thread, in ns; 0 if the host does not say. proc(5), schedstat.
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|n| n.parse().ok()).unwrap_or(0)
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> StopReason {
        let vm = Arc::clone(&self.vm);
        apic::vcpu_starts(&vm);
        self.shared().set_running(true);
        xlate::prepare_thread();
        apic::sleep_precisely();
        self.shared().enter_guest(&vm);
        // Guest time may have stood still since the last run.
        kvmclock::refresh(self);
        let reason = self.run_loop();
        self.direct.roam();
        self.shared().leave_guest();
        self.shared().show(self.counters());
        self.shared().set_running(false);
        apic::vcpu_stops(&vm);
        reason
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        // Signals that came after the vCPU stopped belong to the state: it takes them now.
        let events = self.shared().events.fetch_and(!SIGNALS, Ordering::SeqCst);
        self.take_signals(events);
        let mut s = self.frame.cpu.clone();
        s.apic = self.shared().apic.save();
        s.tsc = apic::saved_tsc(&self.vm);
        Ok(s)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        // Nothing of the time before may reach the new state.
        self.shared().events.fetch_and(!SIGNALS, Ordering::SeqCst);
        self.load(state);
        apic::set_guest_tsc(&self.vm, state.tsc);
        if let Some(v) = state.sipi_pending {
            self.shared()
                .sipi_vector
                .store(u32::from(v), Ordering::SeqCst);
            self.shared().raise(event::SIPI);
        }
        xlate::drop_everything(self);
        Ok(())
    }

    fn set_debug(&mut self, plan: &DebugPlan) -> Result<(), EngineError> {
        debug::arm(self, plan)
    }
}
