//! Direct execution: guest user code on the host's processor, in a process of its own.
//!
//! Guest and host have the same instruction set and the same processor, so a user program can run
//! unchanged if the host's page tables show it what the guest's would. Each guest address space that
//! earns it gets a process ([`process`], [`stub`]) in which nothing but pages of that address space are
//! mapped, at their addresses ([`space`]), and which cannot make a system call. It is traced: whatever it
//! does that is not plain computation stops it, and the vCPU goes on with its state as after any other
//! instruction, in the interpreter and the translator. Those remain what they were; this is a tier above
//! them that may be left at any instruction.
//!
//! A stop costs about 20 us, so the tier is for programs that compute: a vCPU changes to it when it has
//! met few entries into the guest's kernel between two interrupts, and back when stops eat up what is
//! won ([`Account`]).
//!
//! # Where guest and host differ
//!
//! What faults on the host (privileged and port instructions, RDTSC by `PR_SET_TSC`, breakpoints,
//! exceptions) is interpreted. What does not fault and would tell of the host must not run: see
//! [`scan`]. The state is taken over only when it looks the same: selectors as Linux has them for user
//! code, XCR0 of the host.

// UNSAFETY: reads the host's time-stamp counter.
#![allow(unsafe_code, reason = "RDTSC")]

mod patched;
mod process;
mod scan;
mod space;
mod stub;

pub use self::patched::Patched;
pub use self::process::interrupt;
pub use self::scan::Found;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;

use pyrite_engine::{EngineError, StopReason};
use pyrite_state::Inspect;
use pyrite_x86::bits::{cr4, efer, rflags};
use pyrite_x86::{InterruptShadow, gpr, sreg};

use self::process::{CpuSet, Regs, Stop};
use self::space::{Outcome, Space};
use crate::exception::{Exception, Trap};
use crate::interp;
use crate::vcpu::SoftVcpu;
use crate::vm::DirectPolicy;
use crate::{sys, xlate};

/// User selectors of 64-bit Linux: what CS and SS hold in the process.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// LIMIT: address spaces of a vCPU that have a process.
const SPACES_MAX: usize = 16;
/// LIMIT: address spaces whose accounts are kept.
const ACCOUNTS_MAX: usize = 64;
/// Instructions that are interpreted in a page that must not be executed before that is given up.
const STEPS_MAX: u32 = 2000;

/// Flags that a program changes by itself.
const PROGRAM_FLAGS: u64 = rflags::ARITH | rflags::DF | rflags::AC | rflags::NT;
/// Flags with which a program is not taken over: it is being traced, or they cannot be set.
const STRANGE_FLAGS: u64 = rflags::TF | rflags::AC | rflags::VM | rflags::ID | rflags::IOPL;

/// Estimates in ns: what a stop costs, what a change of tiers costs besides, what a page costs that is
/// mapped (it will be used again).
const STOP_NS: i64 = 16_000;
const CHANGE_NS: i64 = 8_000;
const PAGE_NS: i64 = 2_000;
/// What a process costs that is made.
const PROCESS_NS: i64 = 2_000_000;
/// Of a stop, what the stopwatch around the program's run sees.
const RESUME_NS: i64 = 14_000;
/// What is won per ns of direct execution: translated code takes about three times as long.
const GAIN: i64 = 2;
/// What an address space may lose before it is given up, and the most that it can have saved.
const CREDIT_NS: i64 = 6_000_000;
const SAVINGS_NS: i64 = 40_000_000;
/// Entries into the kernel must be this far apart, in ns, before a program is taken over.
const APART_NS: u64 = 40_000;
/// LIMIT: interrupts to wait for after an address space was given up.
const HOLD_MAX: u32 = 256;
/// How long the threads are kept on one processor before the host may choose again, in ns.
const KEEP_NS: u64 = 20_000_000;

/// Counters, for `inspect`.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "named by what they count")]
pub struct Stats {
    pub runs: u64,
    pub stops: u64,
    pub faults: u64,
    pub system_calls: u64,
    pub interpreted: u64,
    pub sensitive: u64,
    pub interruptions: u64,
    pub run_ns: u64,
    pub processes: u64,
    pub given_up: u64,
}

/// What an address space has won and lost by direct execution.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    active: bool,
    /// Tells the address space from a later one that has its root at the same place.
    fingerprint: u64,
    balance_ns: i64,
    /// Interrupts to wait for before it is tried again, and next time.
    hold: u32,
    next_hold: u32,
}

/// What was seen at the last interrupt of user code.
#[derive(Clone, Copy, Debug, Default)]
struct Tick {
    root: u64,
    entries: u64,
    tsc: u64,
}

/// Direct execution of one vCPU.
#[derive(Default)]
pub struct Direct {
    spaces: Vec<Space>,
    accounts: HashMap<u64, Account>,
    tick: Tick,
    clock: u64,
    /// The host refused; it is not asked again.
    refused: bool,
    xstate: Vec<u8>,
    /// Processors that the thread may use, while it is kept on one, and since when (TSC).
    kept: Option<(CpuSet, u64)>,
    /// Counters.
    pub stats: Stats,
}

// SAFETY: of the fields only processes and a set of processors are no plain data, and both may be moved.
unsafe impl Send for Direct {}

fn tsc() -> u64 {
    // SAFETY: every processor that the engine runs on has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn ns(v: &SoftVcpu, cycles: u64) -> u64 {
    cycles.saturating_mul(1_000_000) / v.vm.tsc_khz.max(1)
}

/// Guest-physical address of the root of the page tables.
fn root(v: &SoftVcpu) -> u64 {
    v.frame.cpu.cr3 & 0x000f_ffff_ffff_f000
}

impl Direct {
    /// Translations of linear addresses are to be forgotten.
    pub fn invalidate(&mut self) {
        self.spaces.iter_mut().for_each(Space::invalidate);
    }

    /// Lets the host choose a processor again.
    pub fn roam(&mut self) {
        if let Some((set, _)) = self.kept.take() {
            process::set_cpus(&set);
        }
    }

    /// For `inspect`.
    pub fn inspect(&self) -> Inspect {
        let s = &self.stats;
        let sum = |f: fn(&Space) -> u64| Inspect::Uint(self.spaces.iter().map(f).sum());
        Inspect::node([
            ("available", Inspect::Bool(!self.refused)),
            ("runs", Inspect::Uint(s.runs)),
            ("run-ns", Inspect::Uint(s.run_ns)),
            ("stops", Inspect::Uint(s.stops)),
            ("faults", Inspect::Uint(s.faults)),
            ("system-calls", Inspect::Uint(s.system_calls)),
            ("interpreted", Inspect::Uint(s.interpreted)),
            ("sensitive", Inspect::Uint(s.sensitive)),
            ("interruptions", Inspect::Uint(s.interruptions)),
            ("processes-started", Inspect::Uint(s.processes)),
            ("given-up", Inspect::Uint(s.given_up)),
            ("processes", Inspect::Uint(self.spaces.len() as u64)),
            ("pages-mapped", sum(|s| s.pages)),
            ("sensitive-pages", sum(|s| s.sensitive)),
            ("mappings", sum(|s| s.mappings() as u64)),
        ])
    }
}

/// Another address space is loaded: is it one of those that run directly?
pub fn address_space_changed(v: &mut SoftVcpu) {
    if v.vm.options.direct == DirectPolicy::Always {
        v.frame.xlate.direct = u32::from(!v.direct.refused);
        return;
    }
    let root = root(v);
    let mut active = false;
    if let Some(account) = v.direct.accounts.get_mut(&root)
        && account.active
    {
        active = account.fingerprint == space::fingerprint(&v.vm.memory, root);
        if !active {
            *account = Account::default();
        }
    }
    v.frame.xlate.direct = u32::from(active);
}

/// An interrupt is about to be delivered to user code: how has it been running?
pub fn tick(v: &mut SoftVcpu) {
    let policy = v.vm.options.direct;
    if v.direct.refused || policy != DirectPolicy::WhenItPays || v.frame.xlate.direct != 0 {
        return;
    }
    let now = Tick {
        root: root(v),
        entries: v.frame.xlate.system_calls + v.stats.exceptions + v.stats.interrupts,
        tsc: tsc(),
    };
    let last = std::mem::replace(&mut v.direct.tick, now);
    let apart = ns(v, now.tsc.wrapping_sub(last.tsc));
    let computes = last.root == now.root
        && apart < 100_000_000
        && (now.entries.wrapping_sub(last.entries)).saturating_mul(APART_NS) < apart;
    if !computes {
        return;
    }
    let d = &mut v.direct;
    if d.accounts.len() >= ACCOUNTS_MAX && !d.accounts.contains_key(&now.root) {
        d.accounts.clear();
    }
    let account = d.accounts.entry(now.root).or_default();
    if account.hold > 0 {
        account.hold -= 1;
        return;
    }
    account.active = true;
    account.balance_ns = CREDIT_NS;
    account.fingerprint = space::fingerprint(&v.vm.memory, now.root);
    v.frame.xlate.direct = 1;
}

/// Enters what a stay of direct execution has brought. Gives the address space up if it loses.
fn settle(v: &mut SoftVcpu, gain_ns: i64) {
    let root = root(v);
    let d = &mut v.direct;
    let Some(a) = d.accounts.get_mut(&root) else {
        return;
    };
    a.balance_ns = (a.balance_ns + gain_ns).min(SAVINGS_NS);
    if a.balance_ns == SAVINGS_NS {
        a.next_hold = 0;
    }
    if a.balance_ns < 0 {
        a.active = false;
        a.next_hold = (2 * a.next_hold).clamp(2, HOLD_MAX);
        a.hold = a.next_hold;
        d.stats.given_up += 1;
        d.roam();
        v.frame.xlate.direct = 0;
    }
}

/// True if the program's state is one that the process can take over.
fn can_run(v: &SoftVcpu) -> bool {
    let c = &v.frame.cpu;
    let units = u64::from(xlate::host_xsave_mask());
    let data = |n: usize| matches!(c.seg[n].selector, 0 | USER_SS);
    c.cpl() == 3
        && v.long64()
        && c.interrupt_shadow == InterruptShadow::None
        && c.dr[7] & 0xff == 0
        && c.efer & efer::SCE != 0
        && c.cr4 & cr4::LA57 == 0
        && c.cr4 & cr4::OSXSAVE != 0
        && c.xcr0 & 0xe7 == units
        && c.rflags & STRANGE_FLAGS == 0
        && c.rip < stub::TOP
        && c.seg[sreg::CS].selector == USER_CS
        && c.seg[sreg::SS].selector == USER_SS
        && data(sreg::DS)
        && data(sreg::ES)
        && c.seg[sreg::FS].selector == 0
        && c.seg[sreg::GS].selector == 0
        && xlate::runs_units(v)
}

/// The host's time-stamp counter is the guest's, and its programs may read it.
fn reads_host_tsc(v: &SoftVcpu) -> bool {
    v.vm.tsc_offset.load(Ordering::SeqCst) == 0
        && v.frame.cpu.msrs.tsc_adjust == 0
        && v.frame.cpu.cr4 & cr4::TSD == 0
}

/// The space of the current page tables, taken out of its list.
fn take_space(v: &mut SoftVcpu) -> Option<Space> {
    let root = root(v);
    let me = process::thread_id();
    let tsc = reads_host_tsc(v);
    let d = &mut v.direct;
    // Only the thread that made a process may run it.
    (d.spaces).retain(|s| s.process.tracer() == me && s.reads_tsc() == tsc);
    d.clock += 1;
    let clock = d.clock;
    let found = d.spaces.iter().position(|s| s.root == root);
    let mut space = match found {
        Some(n) => d.spaces.swap_remove(n),
        None => {
            if d.spaces.len() >= SPACES_MAX {
                let oldest = (0..d.spaces.len()).min_by_key(|&n| d.spaces[n].used)?;
                d.spaces.swap_remove(oldest);
            }
            match Space::new(v, root, tsc) {
                Ok(s) => {
                    v.direct.stats.processes += 1;
                    s
                }
                Err(e) => {
                    tracing::info!(vcpu = v.index, "no direct execution: {e}");
                    v.direct.refused = true;
                    v.direct.accounts.clear();
                    v.frame.xlate.direct = 0;
                    return None;
                }
            }
        }
    };
    // What the buffer holds is of the process that was left last.
    space.has_xstate &= space.used + 1 == clock;
    Some(space)
}

/// What ended a stay.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The run loop has something to do.
    Interrupted,
    /// The interpreter executes the instruction at RIP.
    Step,
    /// The page at RIP is interpreted.
    Sensitive,
    /// A system call.
    SystemCall,
    /// A breakpoint or a single step.
    Trap(i32),
}

/// Runs the user program directly until it must be left. False: it cannot be run so now.
pub fn run(v: &mut SoftVcpu) -> Result<bool, Trap> {
    if !can_run(v) {
        settle(v, -CREDIT_NS / 64);
        return Ok(false);
    }
    let Some(mut space) = take_space(v) else {
        return Ok(false);
    };
    if v.shared().direct_stale.swap(false, Ordering::SeqCst) {
        v.direct.invalidate();
        space.invalidate();
    }
    keep_together(v, &mut space);
    let pages = space.pages;
    let is_new = space.used == 0;
    let mut regs = match space.catch_up(v).and_then(|()| enter(v, &mut space)) {
        Ok(regs) => regs,
        Err(e) => {
            // Nothing was run yet; the translator goes on, and a new process may do better.
            tracing::debug!(vcpu = v.index, "address space lost: {e}");
            return Ok(false);
        }
    };
    v.direct.stats.runs += 1;
    space.used = v.direct.clock;
    let mut won = -CHANGE_NS - i64::from(is_new) * PROCESS_NS;
    let end = stay(v, &mut space, &mut won).and_then(|end| {
        leave(v, &mut space, &mut regs, end)?;
        Ok(end)
    });
    v.shared().direct_runner.store(0, Ordering::SeqCst);
    won -= (space.pages - pages) as i64 * PAGE_NS;
    let end = match end {
        Ok(end) => end,
        Err(source) => {
            // Its registers are gone with it.
            return Err(Trap::Stop(StopReason::Failed(EngineError::Os {
                what: "the process of a guest address space ended; the host may be out of memory"
                    .to_owned(),
                source,
            })));
        }
    };
    v.direct.spaces.push(space);
    settle(v, won);
    finish(v, end)?;
    Ok(true)
}

/// Keeps the threads that wait for each other on one processor: the host would start each on an idle
/// one, and waking that takes longer than a stop.
fn keep_together(v: &mut SoftVcpu, space: &mut Space) {
    let now = tsc();
    let long_ago =
        (v.direct.kept).is_some_and(|(_, since)| ns(v, now.wrapping_sub(since)) > KEEP_NS);
    if long_ago {
        // This once the host may choose.
        v.direct.roam();
        return;
    }
    let cpu = process::this_cpu();
    if v.direct.kept.is_none() {
        v.direct.kept = Some((process::cpus(), now));
        process::keep_on(0, cpu);
    }
    space.process.keep_on(cpu);
}

/// Gives the program's state to its process.
fn enter(v: &mut SoftVcpu, space: &mut Space) -> io::Result<Regs> {
    let p = &space.process;
    let mut r = p.regs()?;
    let c = &v.frame.cpu;
    let g = |n: usize| c.gpr[n];
    r.rax = g(gpr::RAX);
    r.rcx = g(gpr::RCX);
    r.rdx = g(gpr::RDX);
    r.rbx = g(gpr::RBX);
    r.rsp = g(gpr::RSP);
    r.rbp = g(gpr::RBP);
    r.rsi = g(gpr::RSI);
    r.rdi = g(gpr::RDI);
    (r.r8, r.r9, r.r10, r.r11) = (g(8), g(9), g(10), g(11));
    (r.r12, r.r13, r.r14, r.r15) = (g(12), g(13), g(14), g(15));
    r.rip = c.rip;
    r.eflags = c.rflags & PROGRAM_FLAGS | rflags::IF | rflags::FIXED1;
    // No system call is to be made or made again.
    r.orig_rax = u64::MAX;
    let selector = |n: usize| u64::from(c.seg[n].selector);
    (r.cs, r.ss) = (selector(sreg::CS), selector(sreg::SS));
    (r.ds, r.es) = (selector(sreg::DS), selector(sreg::ES));
    (r.fs, r.gs) = (0, 0);
    r.fs_base = c.seg[sreg::FS].base;
    r.gs_base = c.seg[sreg::GS].base;
    p.set_regs(&r)?;
    let x = &mut v.direct.xstate;
    x.resize(p.xstate_bytes(), 0);
    let n = x.len().min(c.xsave.0.len());
    // Kernels hardly touch it.
    if !space.has_xstate || x[..464] != c.xsave.0[..464] || x[512..n] != c.xsave.0[512..n] {
        x[..n].copy_from_slice(&c.xsave.0[..n]);
        p.set_xstate(x)?;
    }
    Ok(r)
}

/// Runs the program until it must be left. `won`: balance of the stay in ns.
fn stay(v: &mut SoftVcpu, space: &mut Space, won: &mut i64) -> io::Result<End> {
    let me = v.index as usize;
    let runner = space.process.runner();
    // Published first, looked for second: whoever raises an event does it the other way round.
    v.shared().direct_runner.store(runner, Ordering::SeqCst);
    loop {
        let s = &v.vm.vcpus[me];
        if s.events.load(Ordering::SeqCst) != 0
            || s.frame.exit_request().load(Ordering::SeqCst) != 0
            || s.direct_stale.load(Ordering::SeqCst)
        {
            v.direct.stats.interruptions += 1;
            return Ok(End::Interrupted);
        }
        let began = tsc();
        let stop = space.process.run()?;
        let ran = ns(v, tsc().wrapping_sub(began));
        let stats = &mut v.direct.stats;
        stats.stops += 1;
        stats.run_ns += ran;
        *won += GAIN * (ran as i64 - RESUME_NS).max(0) - STOP_NS;
        let signal = match stop {
            Stop::SystemCall => {
                stats.system_calls += 1;
                return Ok(End::SystemCall);
            }
            // The events will tell; it may be left over from another stay.
            Stop::Signal(libc::SIGURG) => continue,
            Stop::Signal(libc::SIGTRAP) => {
                return Ok(End::Trap(space.process.fault()?.code));
            }
            Stop::Signal(n) => n,
        };
        if signal == libc::SIGSEGV {
            let fault = space.process.fault()?;
            // SEGV_MAPERR, SEGV_ACCERR: the address is that of the access.
            if matches!(fault.code, 1 | 2) {
                stats.faults += 1;
                match space.fault(v, fault.address, process::Process::rip)? {
                    Outcome::Mapped => continue,
                    Outcome::Interpret => {}
                    Outcome::Sensitive => return Ok(End::Sensitive),
                }
            }
        }
        return Ok(End::Step);
    }
}

/// Takes the program's state back.
fn leave(v: &mut SoftVcpu, space: &mut Space, r: &mut Regs, end: End) -> io::Result<()> {
    let p = &space.process;
    *r = p.regs()?;
    if let End::SystemCall = end {
        // At the stop RAX is the error for "no such call", and RIP is behind the instruction.
        r.rax = r.orig_rax;
        if r.rip < stub::TOP {
            r.rip = r.rip.wrapping_sub(2);
        }
    }
    let c = &mut v.frame.cpu;
    c.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    c.rip = r.rip;
    c.rflags = c.rflags & !PROGRAM_FLAGS | r.eflags & PROGRAM_FLAGS;
    c.seg[sreg::FS].base = r.fs_base;
    c.seg[sreg::GS].base = r.gs_base;
    let x = &mut v.direct.xstate;
    let have = p.get_xstate(x)?;
    space.has_xstate = true;
    // Bytes 464-511 are the host's own; components that the guest does not know stay out.
    let n = have.min(v.frame.cpu.xsave.0.len());
    let area = &mut v.frame.cpu.xsave.0;
    area[..464].copy_from_slice(&x[..464]);
    area[512..n].copy_from_slice(&x[512..n]);
    area[512] &= xlate::host_xsave_mask() as u8;
    area[513..520].fill(0);
    let selectors = [
        (sreg::CS, r.cs),
        (sreg::SS, r.ss),
        (sreg::DS, r.ds),
        (sreg::ES, r.es),
        (sreg::FS, r.fs),
        (sreg::GS, r.gs),
    ];
    for (n, selector) in selectors {
        let selector = selector as u16;
        if v.frame.cpu.seg[n].selector != selector {
            take_selector(v, n, selector);
        }
    }
    Ok(())
}

/// The program loaded a selector by itself, which the host's tables allowed: what the guest's say.
#[cold]
fn take_selector(v: &mut SoftVcpu, n: usize, selector: u16) {
    let loaded = match n {
        sreg::CS | sreg::SS => v
            .descriptor(selector, Exception::gp)
            .map(|d| d.segment(selector)),
        _ => v.data_segment(n, selector),
    };
    // The guest's tables may lack it; the program could not have got there in the guest.
    if let Ok(mut segment) = loaded {
        if matches!(n, sreg::FS | sreg::GS) {
            segment.base = v.frame.cpu.seg[n].base;
        }
        v.frame.cpu.seg[n] = segment;
    }
}

/// Does what the program was left for.
fn finish(v: &mut SoftVcpu, end: End) -> Result<(), Trap> {
    match end {
        End::Interrupted => Ok(()),
        End::SystemCall => interp::step(v),
        End::Step => {
            v.direct.stats.interpreted += 1;
            interp::step(v)
        }
        End::Sensitive => {
            v.direct.stats.sensitive += 1;
            let page = v.frame.cpu.rip >> 12;
            for _ in 0..STEPS_MAX {
                interp::step(v)?;
                let c = &v.frame.cpu;
                if c.rip >> 12 != page || c.cpl() != 3 || xlate::run_loop_wanted(v) {
                    return Ok(());
                }
            }
            // A loop of its own, which the translator does better.
            settle(v, -CREDIT_NS / 4);
            Ok(())
        }
        End::Trap(code) => {
            /// TRAP_TRACE: a single step, after the instruction.
            const TRACE: i32 = 2;
            if code == TRACE {
                v.frame.cpu.rflags |= rflags::TF;
                return sys::event::exception(v, Exception::db(sys::event::dr6::BS));
            }
            // INT3, INT1 or INT n: back to its beginning.
            let rip = v.frame.cpu.rip;
            let mut before = [0; 15];
            let short = match v.fetch(rip.wrapping_sub(1), &mut before) {
                Ok(_) => matches!(before[0], 0xcc | 0xf1),
                Err(_) => false,
            };
            v.frame.cpu.rip = rip.wrapping_sub(if short { 1 } else { 2 });
            interp::step(v)
        }
    }
}
