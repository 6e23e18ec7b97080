//! The translator: a cache of the interpreter.
//!
//! Guest code is translated a block at a time, within one page, by copying its instructions with
//! registers renamed and memory operands replaced ([`front`]); blocks live in a per-vCPU cache
//! ([`cache`]), jump to each other directly, checking the mapping of pages that they enter
//! ([`code_tlb`]), and through a jump cache where the target varies.
//! What the translator does not do itself, an exit hands to the interpreter, one instruction at a
//! time. Dropping all translations at any moment is correct.
//!
//! # Who may write where
//!
//! A page that code was translated from has `PAGE_CODE` and a bit per 64 bytes in [`CodeMap`]. No
//! soft TLB holds a write entry for it. A store goes through `mmu`, and if it hits a translated
//! part, all vCPUs stand still while the store is done and the page's translations are declared
//! stale; each vCPU drops its own before it runs on.

// UNSAFETY: enters emitted code and is called back from it.
#![allow(unsafe_code, reason = "runs emitted code")]

mod cache;
mod callbacks;
mod code_map;
mod code_tlb;
mod cold;
mod emit;
pub mod fast;
mod front;
#[cfg(test)]
mod golden;
mod layout;
mod moved;
mod stubs;

use std::cell::Cell;
use std::sync::atomic::Ordering;

use pyrite_engine::EngineError;
use pyrite_mem::{PAGE_CODE, PAGE_SIZE, PAGE_WRITE_CACHED};
use pyrite_x86::bits::{cr0, cr4, efer, rflags};
use pyrite_x86::{Activity, InterruptShadow, Segment, sreg};

use self::cache::{AddrMap, Block, BlockKey, Cache, Exit};
use self::code_map::mark;
pub use self::code_map::{CodeMap, covers};
use self::code_tlb::{CodeTlb, PageCheck};
use self::cold::{ColdPlaces, interpret_block};
use self::front::{Entries, Front, HostFeatures, Place, Tools};
pub use self::layout::{FrameArea, Hot};
use self::layout::{JC_MASK, JC2_ENTRIES, JumpEntry, jump_slot, jump_slot2, reason};
use crate::direct;
use crate::exception::Trap;
use crate::frame::{Frame, NO_PAGE, TLB_ENTRIES, View, empty_tag};
use crate::interp;
use crate::mmu::Priv;
use crate::vcpu::{FrameRef, SoftVcpu};
use crate::vm::{VmShared, event, lock};

/// Bits of the mode word of a block's key: all that changes what the same bytes mean.
mod mode {
    /// The [`super::View`] of data accesses.
    pub const VIEW: u32 = 3;
    /// 64-bit code; else flat 32-bit code.
    pub const CODE64: u32 = 1 << 2;
    /// x87 and MMX instructions execute.
    pub const X87: u32 = 1 << 3;
    /// SSE instructions execute.
    pub const SSE: u32 = 1 << 4;
    /// AVX instructions execute.
    pub const AVX: u32 = 1 << 5;
    /// AVX-512 instructions execute.
    pub const AVX512: u32 = 1 << 6;
    /// FS is usable without a limit check (32-bit code).
    pub const FS_FLAT: u32 = 1 << 7;
    /// GS likewise.
    pub const GS_FLAT: u32 = 1 << 8;
    /// Not of the processor's mode: the variant of a block without runs of accesses.
    pub const PLAIN: u32 = 1 << 9;
    /// All but the view, for which there are jump caches of their own.
    pub const UNITS: u32 = !(VIEW | PLAIN);
}

/// Counters of the translator, for `inspect` and benchmarks.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "named by what they count")]
pub struct XlateStats {
    pub blocks: u64,
    /// Blocks copied from another RIP instead of being translated.
    pub moved: u64,
    /// Blocks that got their entries from other pages after they were translated.
    pub late_entries: u64,
    pub guest_insns: u64,
    pub enters: u64,
    pub lookups: u64,
    /// Entries into known blocks whose page had to be looked up.
    pub page_checks: u64,
    /// Jump-cache entries that took the place of others.
    pub jump_conflicts: u64,
    pub links: u64,
    pub polls: u64,
    pub interpreted: u64,
    /// Time spent translating and copying translations, in ns.
    pub translating_ns: u64,
    /// Instructions that were interpreted because their block was met for the first time.
    pub interpreted_cold: u64,
    pub slow_memory: u64,
    pub signals: u64,
    pub stale_pages: u64,
}

/// The translator of one vCPU.
pub struct Translator {
    cache: Cache,
    tools: Tools,
    host: HostFeatures,
    /// Mappings of the pages that code was translated from.
    code_tlb: CodeTlb,
    /// [`mode::UNITS`] that the code TLB's content is for.
    units: u32,
    /// Buffer for blocks that are moved.
    moving: Vec<u8>,
    /// What an instruction interpreted in place ended with.
    trap: Option<Trap>,
    /// Blocks that must poll at their entry because a backward jump leads there.
    must_poll: AddrMap<BlockKey, ()>,
    /// What was met once and is not translated yet.
    cold: ColdPlaces,
    /// Copies of instructions for operands in two pages, by the host address of what follows their
    /// checks.
    splits: AddrMap<u64, u64>,
    /// Counters.
    pub stats: XlateStats,
}

impl Translator {
    /// Bytes of the code cache that are in use.
    pub fn cache_use(&self) -> usize {
        self.cache.used()
    }

    /// An empty translator.
    pub fn new(vm: &VmShared, frame: &mut FrameRef) -> Result<Translator, EngineError> {
        let cache = Cache::new(vm.options.code_cache_bytes).map_err(|source| EngineError::Os {
            what: "cannot map the code cache".to_owned(),
            source,
        })?;
        let hot = &mut frame.hot;
        hot.tlb_mask = (TLB_ENTRIES as u64 - 1) << 12;
        hot.jc_mask = JC_MASK;
        hot.stub_run = stubs::run as *const () as u64;
        hot.stub_slow = stubs::slow as *const () as u64;
        hot.stub_link = stubs::link as *const () as u64;
        hot.stub_poll = stubs::poll as *const () as u64;
        let x = &mut frame.xlate;
        x.xsave_mask = host_xsave_mask();
        x.mxcsr_host = 0x1f80;
        x.stub_exit = stubs::exit as *const () as u64;
        x.stub_split_done = stubs::split_done as *const () as u64;
        x.stub_fpu = stubs::fpu_load as *const () as u64;
        x.stub_moved = stubs::moved as *const () as u64;
        x.stub_miss = stubs::misses(fast_pext());
        x.jc2_mask = JC2_ENTRIES as u64 - 1;
        x.canonical_mask = !0 << 47;
        x.stub_step = stubs::step as *const () as u64;
        x.stub_step_jump = stubs::step_jump as *const () as u64;
        x.fast = fast::addresses();
        x.tsc_offset_at = vm.tsc_offset.as_ptr() as u64;
        for (view, jc) in x.jump_cache.iter_mut().enumerate() {
            jc.fill(x.stub_miss[view]);
        }
        x.jump_cache2.fill(stubs::no_jump());
        Ok(Translator {
            cache,
            tools: Tools::new(),
            host: HostFeatures {
                bmi2: fast_pext(),
                decoder: interp::vendor_options(vm.cpuid.get(0, 0)),
            },
            code_tlb: CodeTlb::default(),
            units: 0,
            moving: Vec::new(),
            trap: None,
            must_poll: AddrMap::default(),
            splits: AddrMap::default(),
            cold: ColdPlaces::new(vm.options.translate_at_once),
            stats: XlateStats::default(),
        })
    }

    /// True if the instruction of which these are all bytes in its page needs more.
    fn cuts_off(&self, key: BlockKey, bytes: &[u8]) -> bool {
        let bits = if key.mode & mode::CODE64 != 0 { 64 } else { 32 };
        let mut d = iced_x86::Decoder::with_ip(bits, bytes, key.rip, self.host.decoder);
        let _ = d.decode();
        d.last_error() == iced_x86::DecoderError::NoMoreBytes
    }

    /// Bytes of emitted code now.
    pub fn code_bytes(&self) -> usize {
        self.cache.used()
    }

    /// How often the cache was emptied because it was full.
    pub fn flushes(&self) -> u64 {
        self.cache.flushes
    }
}

/// PEXT exists and is not microcoded (AMD before family 19H).
fn fast_pext() -> bool {
    if !std::arch::is_x86_feature_detected!("bmi2") {
        return false;
    }
    let vendor = std::arch::x86_64::__cpuid(0);
    let amd = vendor.ebx == u32::from_le_bytes(*b"Auth");
    let sig = std::arch::x86_64::__cpuid(1).eax;
    let family = (sig >> 8 & 0xf) + (sig >> 20 & 0xff);
    !amd || family >= 0x19
}

/// User state components that the host has enabled and the engine keeps for guests: x87, SSE,
/// AVX, AVX-512.
pub fn host_xsave_mask() -> u32 {
    let xcr0 = if std::arch::is_x86_feature_detected!("xsave") {
        // SAFETY: XGETBV exists where the operating system has enabled XSAVE.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    } else {
        3
    };
    (xcr0 & 0xe7) as u32
}

/// The mode word of the current state, if the translator handles the mode.
fn mode_of(v: &SoftVcpu) -> Option<u32> {
    let c = &v.frame.cpu;
    if c.cr0 & cr0::PE == 0 || c.rflags & (rflags::VM | rflags::TF) != 0 || c.dr[7] & 0xff != 0 {
        return None;
    }
    if matches!(c.cpl(), 1 | 2) || v.debug.stops_in_page(c.rip) {
        return None;
    }
    // Alignment checks are the interpreter's.
    if c.cr0 & cr0::AM != 0 && c.rflags & rflags::AC != 0 && c.cpl() == 3 {
        return None;
    }
    let mut m = v.view(Priv::Current) as u32;
    if c.efer & efer::LMA != 0 && c.seg[sreg::CS].l() {
        m |= mode::CODE64;
    } else {
        let flat = |s: &Segment| s.base == 0 && s.limit == u32::MAX && !s.unusable();
        let writable = |s: &Segment| s.ty() & 0xa == 2 && s.ty() & 4 == 0;
        let (cs, ss) = (&c.seg[sreg::CS], &c.seg[sreg::SS]);
        let data_ok = [sreg::DS, sreg::ES]
            .iter()
            .all(|&n| flat(&c.seg[n]) && writable(&c.seg[n]));
        if !cs.db() || !flat(cs) || !flat(ss) || !ss.db() || !writable(ss) || !data_ok {
            return None;
        }
        // A CS override reads through CS: it must be readable.
        if cs.ty() & 2 == 0 {
            return None;
        }
        for (n, bit) in [(sreg::FS, mode::FS_FLAT), (sreg::GS, mode::GS_FLAT)] {
            let s = &c.seg[n];
            if s.limit == u32::MAX && !s.unusable() && writable(s) {
                m |= bit;
            }
        }
    }
    if c.cr0 & (cr0::EM | cr0::TS) == 0 {
        m |= mode::X87;
        if c.cr4 & cr4::OSFXSR != 0 {
            m |= mode::SSE;
        }
        if c.cr4 & cr4::OSXSAVE != 0 {
            if c.xcr0 & 6 == 6 {
                m |= mode::AVX;
            }
            if c.xcr0 & 0xe6 == 0xe6 {
                m |= mode::AVX512;
            }
        }
    }
    Some(m)
}

/// True for 64-bit user code that may use the units that the host has.
pub fn runs_units(v: &SoftVcpu) -> bool {
    let wanted = mode::CODE64 | mode::X87 | mode::SSE | View::User as u32;
    mode_of(v).is_some_and(|m| m & (wanted | mode::VIEW) == wanted)
}

/// True if the current mode is one that the translator handles.
pub fn can_run(v: &SoftVcpu) -> bool {
    v.frame.cpu.interrupt_shadow == InterruptShadow::None && mode_of(v).is_some()
}

thread_local! {
    /// The frame and the executable range of the vCPU that runs on this thread, for the signal
    /// handler.
    static RUNNING: Cell<(u64, u64, u64)> = const { Cell::new((0, 0, 0)) };
}

/// Signal handlers for the calling thread.
pub fn prepare_thread() {
    crate::signals::install_signal_handlers();
    crate::signals::set_translator_hook(on_signal);
}

/// A signal in translated code becomes an exit; RSP is the frame there, by construction.
fn on_signal(_signal: i32, context: &mut libc::ucontext_t) -> bool {
    let (frame, start, end) = RUNNING.get();
    let regs = &mut context.uc_mcontext.gregs;
    let rip = regs[libc::REG_RIP as usize] as u64;
    if frame == 0 || !(start..end).contains(&rip) || regs[libc::REG_RSP as usize] as u64 != frame {
        return false;
    }
    // SAFETY: RUNNING holds the frame of the vCPU on this thread, which was interrupted in
    // emitted code, so no Rust reference to it is in use.
    unsafe { (*(frame as *mut Frame)).xlate.fault_rip = rip };
    regs[libc::REG_RIP as usize] = stubs::signal_exit as *const () as i64;
    true
}

/// True when the run loop has something to do before more guest code runs.
pub fn run_loop_wanted(v: &SoftVcpu) -> bool {
    let c = &v.frame.cpu;
    v.shared().events.load(Ordering::SeqCst) != 0
        || v.frame.hot.exit_request.load(Ordering::SeqCst) != 0
        || c.activity != Activity::Running
        || c.interrupt_shadow != InterruptShadow::None
        || (v.irq_waiting && c.rflags & rflags::IF != 0)
        || (c.nmi_pending && !c.nmi_blocked)
        || v.debug.has_hit()
}

/// Runs translated code until something needs the run loop.
pub fn run(v: &mut SoftVcpu) -> Result<(), Trap> {
    let mut variant = 0;
    // The block to go on with if its page is still mapped as it was.
    let mut moved = None;
    loop {
        let Some(m) = mode_of(v) else { return Ok(()) };
        if v.frame.xlate.direct != 0
            && !v.debug.armed()
            && m & mode::VIEW == View::User as u32
            && direct::run(v)?
        {
            if run_loop_wanted(v) {
                return Ok(());
            }
            continue;
        }
        let m = m | std::mem::take(&mut variant);
        let linear_rip = v.frame.cpu.rip;
        let fetched = match v.fetch_page(linear_rip) {
            Ok(g) if v.canonical(linear_rip) || m & mode::CODE64 == 0 => g,
            // The interpreter raises the fetch's exception.
            _ => return interp::step(v),
        };
        let key = BlockKey {
            gpa: fetched.gpa,
            rip: linear_rip,
            mode: m,
        };
        // Room for entries that a block turns out to need.
        if !v.xlate.cache.fits(front::ENTRIES_BYTES_MAX) {
            drop_everything(v);
        }
        let unchanged = moved.take().filter(|id| {
            let b = v.xlate.cache.blocks.get(*id as usize);
            b.is_some_and(|b| !b.dead && b.key == key && b.second.is_none())
        });
        v.xlate.stats.page_checks += u64::from(unchanged.is_some());
        let known = unchanged.or_else(|| {
            let ripe = v.xlate.cold.is_ripe(&v.xlate.cache, &key, true);
            ripe.then(|| find_or_translate(v, key, true)).flatten()
        });
        let Some(id) = known else {
            if interpret_block(v)? {
                return Ok(());
            }
            continue;
        };
        let b = &v.xlate.cache.blocks[id as usize];
        if b.interpret_first {
            v.xlate.stats.interpreted += 1;
            interp::step(v)?;
            if run_loop_wanted(v) {
                return Ok(());
            }
            continue;
        }
        let base = v.xlate.cache.base();
        let view = (m & mode::VIEW) as usize;
        let entry = b.entry;
        let (page, second) = (b.page, b.second);
        let checked = b.others.map_or_else(|| make_entries(v, id), |o| o.checked);
        if v.xlate.units != m & mode::UNITS {
            forget_code_pages(v, false);
            v.xlate.units = m & mode::UNITS;
        }
        // What saves the next look-up of this target.
        let frame = &mut v.frame.xlate;
        let checked = base + u64::from(checked);
        if m & mode::PLAIN == 0 && unchanged.is_none() {
            let cached = &mut frame.jump_cache[view][jump_slot(linear_rip)];
            let known = std::mem::replace(cached, checked);
            let miss = frame.stub_miss[view];
            frame.jump_cache2[jump_slot2(linear_rip)] = JumpEntry {
                tag: JumpEntry::tag(linear_rip, view),
                host: checked,
            };
            v.xlate.stats.jump_conflicts += u64::from(known != checked && known != miss);
        }
        v.xlate
            .code_tlb
            .fill(&mut frame.code_tlb, page, linear_rip, fetched);
        if let Some((_, page)) = second {
            let next = next_page(linear_rip);
            if let Ok(from) = v.fetch_page(next) {
                let table = &mut v.frame.xlate.code_tlb;
                v.xlate.code_tlb.fill(table, page, next, from);
            }
        }
        v.frame.hot.target = base + u64::from(entry);
        enter(v);
        // Calls of stubs tell where they were by the address after them.
        let left_at = v.frame.xlate.left_at.wrapping_sub(1);
        match v.frame.hot.reason {
            reason::LINK => variant = link(v, left_at)?,
            reason::MOVED => {
                moved = v.xlate.cache.block_named_at(left_at + 1);
                let id = moved.ok_or_else(|| nowhere(left_at))?;
                v.frame.cpu.rip = v.xlate.cache.blocks[id as usize].key.rip;
            }
            reason::POLL_ENTRY => {
                v.frame.cpu.rip = block_rip(v, left_at)?;
                v.xlate.stats.polls += 1;
                return Ok(());
            }
            reason::LOOKUP => {
                v.xlate.stats.lookups += 1;
                if v.long64() && !v.canonical(v.frame.cpu.rip) {
                    undo_branch(v)?;
                    interp::step(v)?;
                }
            }
            reason::POLL => {
                v.xlate.stats.polls += 1;
                return Ok(());
            }
            reason::STEPPED => {
                if let Some(t) = v.xlate.trap.take() {
                    return Err(t);
                }
            }
            reason::SIGNAL => {
                v.xlate.stats.signals += 1;
                locate(v, v.frame.xlate.fault_rip)?;
                v.xlate.stats.interpreted += 1;
                interp::step(v)?;
            }
            _ => {
                v.xlate.stats.interpreted += 1;
                interp::step(v)?;
            }
        }
        if run_loop_wanted(v) {
            return Ok(());
        }
    }
}

/// Arithmetic flags to and from LAHF form.
fn flags_to_lahf(f: u64) -> u64 {
    (f & 0xd5 | 2) << 8 | (f >> 11 & 1)
}

fn flags_from_lahf(l: u64) -> u64 {
    (l >> 8 & 0xd5) | (l & 1) << 11
}

fn enter(v: &mut SoftVcpu) {
    v.xlate.stats.enters += 1;
    let frame: *mut Frame = &raw mut *v.frame;
    let base = v.xlate.cache.base();
    RUNNING.set((
        frame as u64,
        base,
        base + v.vm.options.code_cache_bytes as u64,
    ));
    let me: *mut SoftVcpu = v;
    // SAFETY: the frame is this vCPU's; target is a live entry of its cache; while the code runs
    // only `slow_memory` uses the vCPU, through the pointer stored here.
    unsafe {
        (*frame).xlate.vcpu = me as u64;
        (*frame).xlate.irq_waiting = u32::from((*me).irq_waiting);
        (*frame).hot.flags = flags_to_lahf((*frame).cpu.rflags);
        stubs::enter(frame);
        let c = &mut (*frame).cpu;
        c.rflags = (c.rflags & !rflags::ARITH) | flags_from_lahf((*frame).hot.flags);
    }
    RUNNING.set((0, 0, 0));
}

/// Sets RIP to the guest instruction whose emitted code is at `at`. Returns what `Block::pops` says.
fn locate(v: &mut SoftVcpu, at: u64) -> Result<u32, Trap> {
    let cache = &v.xlate.cache;
    let found = cache.block_at(at).and_then(|b| {
        let off = (at - cache.base()) as u32 - b.start;
        let n = b.map.partition_point(|(h, _)| *h <= off);
        let (_, g) = b.map.get(n.checked_sub(1)?)?;
        Some((b.key.rip.wrapping_add(u64::from(*g)), b.pops))
    });
    match found {
        Some((rip, pops)) => {
            v.frame.cpu.rip = rip;
            Ok(pops)
        }
        None => Err(nowhere(at)),
    }
}

#[cold]
fn nowhere(at: u64) -> Trap {
    let text = format!("{at:#x} belongs to no translated block");
    Trap::Stop(pyrite_engine::StopReason::Failed(EngineError::Internal(
        text,
    )))
}

/// RIP of the block whose emitted code is at `at`.
fn block_rip(v: &SoftVcpu, at: u64) -> Result<u64, Trap> {
    let b = v.xlate.cache.block_at(at).ok_or_else(|| nowhere(at))?;
    Ok(b.key.rip)
}

/// The copy of the instruction whose check ends at host address `done`, which works on a copied operand
/// and then brings it home. `None`: there is no room.
fn split_code(v: &mut SoftVcpu, done: u64) -> Option<u64> {
    /// LIMIT: bytes of the copy besides the instruction.
    const REST: usize = 16;
    let t = &mut v.xlate;
    let recent = &mut v.frame.xlate.splits[layout::split_slot(done)];
    if let Some(&at) = t.splits.get(&done) {
        *recent = [done, at];
        return Some(at);
    }
    let base = t.cache.base();
    let b = t.cache.block_at(done)?;
    let off = (done - base) as u32 - b.start;
    // The beginning of the next instruction.
    let n = b.map.partition_point(|(h, _)| *h <= off);
    let next = base + u64::from(b.start) + u64::from(b.map.get(n)?.0);
    let code = t.cache.bytes(done, next)?;
    if !t.cache.fits(code.len() + REST) {
        return None;
    }
    let at = base + t.cache.free_at() as u64;
    let copy = front::emit_split(&mut t.tools, at, code, next);
    t.cache.append(copy);
    t.splits.insert(done, at);
    *recent = [done, at];
    Some(at)
}

/// Gives a block the entries for jumps from other pages and through the jump cache. Cache offset of
/// the checked one.
fn make_entries(v: &mut SoftVcpu, id: u32) -> u32 {
    let t = &mut v.xlate;
    let b = &t.cache.blocks[id as usize];
    let at = Entries {
        id,
        view: (b.key.mode & mode::VIEW) as usize,
        rip: b.key.rip,
        base: t.cache.base() + t.cache.free_at() as u64,
        entry: t.cache.base() + u64::from(b.entry),
        live: b.flags_live,
        page: b.page,
        second: b.second.map(|(_, page)| page),
    };
    let (code, others) = front::emit_entries(&mut t.tools, at);
    t.cache.add_entries(id, code, others);
    t.stats.late_entries += 1;
    t.cache.blocks[id as usize].others.map_or(0, |o| o.checked)
}

/// An indirect JMP or RET has led to a non-canonical address, where the processor raises #GP at the
/// branch: back to the state before it. Intel SDM Vol. 2A (JMP), Vol. 2B (RET).
fn undo_branch(v: &mut SoftVcpu) -> Result<(), Trap> {
    let base = v.xlate.cache.base();
    let offset = v.frame.hot.branch.wrapping_sub(base as u32);
    let pops = locate(v, base + u64::from(offset))?;
    let sp = &mut v.frame.cpu.gpr[pyrite_x86::gpr::RSP];
    *sp = sp.wrapping_sub(u64::from(pops));
    Ok(())
}

/// Links the exit that was just taken to its target, if it can be found or made.
///
/// Sets RIP to where the exit leads. Returns which variant to go on in, as mode bits.
fn link(v: &mut SoftVcpu, left_at: u64) -> Result<u32, Trap> {
    let stub = (left_at + 1).wrapping_sub(front::STUB_CALL_BYTES);
    let x = v.xlate.cache.exit_at(stub).ok_or_else(|| nowhere(stub))?;
    v.frame.cpu.rip = v.xlate.cache.exits[x as usize].target;
    Ok(link_exit(v, x))
}

fn link_exit(v: &mut SoftVcpu, x: u32) -> u32 {
    let exit = v.xlate.cache.exits[x as usize].clone();
    let owner = &v.xlate.cache.blocks[exit.owner as usize];
    if owner.dead {
        return 0;
    }
    // The mode may be another than that in which translated code was entered.
    let variant = if exit.plain { mode::PLAIN } else { 0 };
    let m = owner.key.mode & !mode::PLAIN | variant;
    let near = (exit.target ^ owner.key.rip) >> 12 == 0;
    let backward = near && exit.target <= owner.key.rip.wrapping_add(u64::from(owner.guest_len));
    let gpa = if near {
        // Same page, same mapping: the physical address follows from the owner's.
        (owner.key.gpa & !0xfff) | (exit.target & 0xfff)
    } else {
        if m & mode::CODE64 != 0 && !v.canonical(exit.target) {
            return variant;
        }
        match v.fetch_gpa(exit.target) {
            Ok(gpa) => gpa,
            // The run loop meets the same fault and raises it.
            Err(_) => return variant,
        }
    };
    let key = BlockKey {
        gpa,
        rip: exit.target,
        mode: m,
    };
    let flushes = v.xlate.cache.flushes;
    if !v.xlate.cold.is_ripe(&v.xlate.cache, &key, false) {
        return variant;
    }
    let Some(mut to) = find_or_translate(v, key, !near) else {
        return variant;
    };
    if backward && !v.xlate.cache.blocks[to as usize].polls {
        // Every loop must notice the exit request: translate the target again, polling.
        v.xlate.must_poll.insert(key, ());
        kill(v, to);
        match find_or_translate(v, key, !near) {
            Some(t) => to = t,
            None => return variant,
        }
    }
    if v.xlate.cache.flushes == flushes {
        let b = &v.xlate.cache.blocks[to as usize];
        if b.others.is_none() && (!near || b.second.is_some()) {
            make_entries(v, to);
        }
        v.xlate.stats.links += 1;
        v.xlate.cache.link(x, to, near);
    }
    variant
}

/// Drops one block.
fn kill(v: &mut SoftVcpu, id: u32) {
    v.xlate.cache.kill(id);
    forget_target(v, id);
}

/// Takes a block that is dropped out of the jump caches.
fn forget_target(v: &mut SoftVcpu, id: u32) {
    let b = &v.xlate.cache.blocks[id as usize];
    let Some(others) = b.others else { return };
    let at = v.xlate.cache.base() + u64::from(others.checked);
    let slot = jump_slot(b.key.rip);
    let slot2 = jump_slot2(b.key.rip);
    let frame = &mut v.frame.xlate;
    for (view, cache) in frame.jump_cache.iter_mut().enumerate() {
        if cache[slot] == at {
            cache[slot] = frame.stub_miss[view];
        }
    }
    if frame.jump_cache2[slot2].host == at {
        frame.jump_cache2[slot2] = stubs::no_jump();
    }
}

/// The block for a key, translated now if need be, with entries from other pages if they are wanted
/// now. `None`: not RAM, or a debugger stops somewhere in its page.
fn find_or_translate(v: &mut SoftVcpu, key: BlockKey, entries: bool) -> Option<u32> {
    if v.debug.stops_in_page(key.rip) {
        return None;
    }
    if let Some(id) = v.xlate.cache.find(&key) {
        let Some(second) = v.xlate.cache.blocks[id as usize].second else {
            return Some(id);
        };
        // The next page may be mapped to something else by now.
        if second_page(v, key.rip) == Some(second.0) {
            return Some(id);
        }
        kill(v, id);
    }
    let began = std::time::Instant::now();
    let id = translate(v, key, entries);
    v.xlate.stats.translating_ns += began.elapsed().as_nanos() as u64;
    id
}

/// First byte of the page after the one that holds `rip`.
fn next_page(rip: u64) -> u64 {
    (rip | (PAGE_SIZE - 1)).wrapping_add(1)
}

/// Guest-physical address of the page after the one that holds `rip`, if it can be fetched from.
fn second_page(v: &mut SoftVcpu, rip: u64) -> Option<u64> {
    let next = next_page(rip);
    let ok = if v.long64() {
        v.canonical(next)
    } else {
        next >> 32 == 0
    };
    if !ok {
        return None;
    }
    v.fetch_gpa(next).ok()
}

/// Most bytes of host code of a block; a cache with less room than this is emptied first.
const BLOCK_CODE_MAX: usize = 128 * 1024;

/// Most guest bytes of a block.
const GUEST_BYTES_MAX: usize = 1024;

/// Most bytes of an instruction. Intel SDM Vol. 2A §2.3.11.
const INSN_BYTES_MAX: usize = 15;

/// Empties a cache that has no room for any block.
fn make_room(v: &mut SoftVcpu) {
    let most = BLOCK_CODE_MAX.min(v.vm.options.code_cache_bytes / 2);
    if !v.xlate.cache.fits(most) {
        tracing::debug!(
            vcpu = v.index,
            blocks = v.xlate.stats.blocks,
            "code cache is full"
        );
        drop_everything(v);
    }
}

fn translate(v: &mut SoftVcpu, key: BlockKey, entries: bool) -> Option<u32> {
    let vm = std::sync::Arc::clone(&v.vm);
    let page_gpa = key.gpa & !(PAGE_SIZE - 1);
    let page_off = vm.memory.read_offset(page_gpa, PAGE_SIZE)?;
    if let Some(id) = moved::move_block(v, key) {
        return Some(id);
    }
    protect(v, page_off);
    let at = (key.gpa & (PAGE_SIZE - 1)) as usize;
    let mut page_bytes = [0u8; PAGE_SIZE as usize];
    vm.memory.read(page_gpa, &mut page_bytes).ok()?;
    let mut bytes = [0u8; GUEST_BYTES_MAX];
    let mut first = GUEST_BYTES_MAX.min(PAGE_SIZE as usize - at);
    let mut have = first;
    bytes[..first].copy_from_slice(&page_bytes[at..at + first]);
    let mut second = None;
    if first < INSN_BYTES_MAX && v.xlate.cuts_off(key, &bytes[..first]) {
        // A block of one instruction, whose rest is in the next page.
        let gpa = second_page(v, key.rip)?;
        let rest = INSN_BYTES_MAX - first;
        protect(v, vm.memory.read_offset(gpa, PAGE_SIZE)?);
        vm.memory
            .read(gpa, &mut bytes[first..INSN_BYTES_MAX])
            .ok()?;
        have = INSN_BYTES_MAX;
        second = Some((gpa, rest));
    } else {
        first = have;
    }
    let bytes = &bytes[..have];
    make_room(v);
    if v.xlate.code_tlb.needs_clearing(key.mode & mode::UNITS) {
        drop_everything(v);
    }
    let user = key.mode & mode::VIEW == View::User as u32;
    let next = next_page(key.rip);
    let (Some(first_slot), Some(next_slot)) = (
        v.xlate.code_tlb.slot(key.rip, user),
        v.xlate
            .code_tlb
            .slot(if second.is_some() { next } else { key.rip }, user),
    ) else {
        tracing::debug!(vcpu = v.index, "code TLB is full");
        drop_everything(v);
        return translate(v, key, entries);
    };
    let page = PageCheck {
        slot: first_slot,
        value: v.xlate.code_tlb.value(key.gpa, key.mode & mode::UNITS)?,
    };
    let second_check = match second {
        Some((gpa, _)) => Some(PageCheck {
            slot: next_slot,
            value: v.xlate.code_tlb.value(gpa, key.mode & mode::UNITS)?,
        }),
        None => None,
    };
    let force_poll = v.xlate.must_poll.contains_key(&key);
    let start = v.xlate.cache.free_at();
    let base = v.xlate.cache.base() + start as u64;
    let first_exit = v.xlate.cache.exits.len() as u32;
    let place = Place {
        key,
        base,
        first_exit,
        id: v.xlate.cache.blocks.len() as u32,
        force_poll,
        page,
        second: second_check,
        entries: entries || second.is_some(),
    };
    let interp = &v.interp;
    let mut t = Front::translate(
        &mut v.xlate.tools,
        bytes,
        if second.is_some() { &[] } else { &page_bytes },
        place,
        &|i| interp.allows(i),
        &vm.options,
        v.xlate.host,
    );
    // Mark first, then look whether the bytes are still those that were translated: a store that
    // came before the mark is seen here, a later one sees the mark.
    let len = (t.block.guest_len as usize).min(bytes.len());
    let mut again = [0u8; GUEST_BYTES_MAX];
    let here = len.min(first);
    mark(&vm, page_off, at as u64, here)?;
    vm.memory.read(key.gpa, &mut again[..here]).ok()?;
    if let Some((gpa, rest)) = second {
        mark(&vm, vm.memory.read_offset(gpa, PAGE_SIZE)?, 0, rest)?;
        vm.memory.read(gpa, &mut again[here..len]).ok()?;
    }
    if again[..len] != bytes[..len] {
        return None;
    }
    for (at, len) in t.block.looked {
        let (at, len) = (at as usize, len as usize);
        mark(&vm, page_off, at as u64, len)?;
        // LIMIT: a few instructions.
        let again = &mut again[..len];
        vm.memory.read(page_gpa + at as u64, again).ok()?;
        if again != &page_bytes[at..at + len] {
            return None;
        }
    }
    t.block.second = second.map(|(gpa, _)| gpa).zip(second_check);
    if !v.xlate.cache.fits(t.code.len()) {
        return None;
    }
    v.xlate.stats.blocks += 1;
    v.xlate.stats.guest_insns += u64::from(t.block.insns);
    Some(add(&mut v.xlate.cache, t.code, t.block, t.exits))
}

/// Adds a block, whose offsets are relative to its first byte, to the cache.
fn add(
    cache: &mut Cache,
    code: &[u8],
    mut block: Block,
    exits: impl IntoIterator<Item = Exit>,
) -> u32 {
    let start = cache.free_at() as u32;
    block.start = start;
    block.end += start;
    block.entry += start;
    block.past_poll += start;
    block.others = block.others.map(|o| o.plus(start));
    cache.append(code);
    let id = cache.insert(block);
    for mut x in exits {
        x.patch_at += start;
        x.stub_at += start;
        x.owner = id;
        cache.exits.push(x);
    }
    id
}

/// Marks a page as holding translated code and takes write entries for it out of all soft TLBs.
fn protect(v: &SoftVcpu, page_off: u64) {
    let vm = std::sync::Arc::clone(&v.vm);
    let flags = vm.memory.page_flags(page_off);
    flags.fetch_or(PAGE_CODE, Ordering::SeqCst);
    if flags.load(Ordering::SeqCst) & PAGE_WRITE_CACHED == 0 {
        return;
    }
    let host = vm.memory.host_base() as u64 + page_off;
    vm.exclusive(v.index, || {
        for other in &vm.vcpus {
            other.direct_stale.store(true, Ordering::SeqCst);
            // SAFETY: all vCPUs but this one stand still outside guest code (exclusive), and this
            // one holds no reference into its frame here.
            let frame = unsafe { &mut *other.frame.frame_ptr() };
            for t in &mut frame.tlb {
                for n in 0..TLB_ENTRIES {
                    if t.host[n] == host {
                        t.write[n] = empty_tag(n);
                    }
                }
            }
            for t in &mut frame.tlb2 {
                for n in 0..TLB_ENTRIES {
                    if t.host[n] == host {
                        t.write[n] = NO_PAGE;
                    }
                }
            }
        }
        flags.fetch_and(!PAGE_WRITE_CACHED, Ordering::SeqCst);
    });
}

/// Declares that all of a page is code that something was made from, which must go when it is written.
pub fn claim_page(v: &SoftVcpu, page_off: u64) -> Option<()> {
    protect(v, page_off);
    mark(&v.vm, page_off, 0, PAGE_SIZE as usize)
}

/// Mappings changed: what code goes to in other pages must be looked up again.
pub fn forget_code_pages(v: &mut SoftVcpu, keep_global: bool) {
    let table = &mut v.frame.xlate.code_tlb;
    v.xlate.code_tlb.flush(table, keep_global);
}

/// The mapping of the page around `lin`, large or not, changed.
pub fn forget_code_page(v: &mut SoftVcpu, lin: u64) {
    let table = &mut v.frame.xlate.code_tlb;
    v.xlate.code_tlb.flush_page(table, lin);
}

/// Tells all vCPUs to drop the translations of a page. Inside an exclusive section.
pub fn drop_page(vm: &VmShared, ram_offset: u64) {
    let page = ram_offset & !(PAGE_SIZE - 1);
    if let Some(m) = vm.code_map.page(page) {
        m.store(0, Ordering::SeqCst);
    }
    vm.memory
        .page_flags(page)
        .fetch_and(!PAGE_CODE, Ordering::SeqCst);
    let Some(gpa) = vm.memory.gpa_of_offset(page) else {
        return;
    };
    vm.patched.forget(page);
    for v in &vm.vcpus {
        v.direct_stale.store(true, Ordering::SeqCst);
        if let Some(p) = lock(&v.stale_pages).as_mut() {
            p.push(gpa);
        }
        v.raise(event::STALE_CODE);
    }
}

/// Drops this vCPU's translations of some guest-physical pages (`None` = all).
pub fn drop_stale(v: &mut SoftVcpu, pages: Option<Vec<u64>>) {
    let Some(pages) = pages else {
        drop_everything(v);
        return;
    };
    for p in pages {
        v.xlate.stats.stale_pages += 1;
        for id in v.xlate.cache.kill_page(p & !(PAGE_SIZE - 1)) {
            forget_target(v, id);
        }
    }
}

/// Drops all translations of this vCPU.
pub fn drop_everything(v: &mut SoftVcpu) {
    v.xlate.cache.clear();
    v.xlate.must_poll.clear();
    v.xlate.splits.clear();
    v.frame.xlate.splits.fill([0; 2]);
    v.xlate.code_tlb.clear(&mut v.frame.xlate.code_tlb);
    let frame = &mut v.frame.xlate;
    for (view, cache) in frame.jump_cache.iter_mut().enumerate() {
        cache.fill(frame.stub_miss[view]);
    }
    frame.jump_cache2.fill(stubs::no_jump());
}
