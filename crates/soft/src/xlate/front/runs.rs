//! Runs of accesses: one check for many.
//!
//! Most blocks touch the stack more than once, and always through RSP, which changes by constants;
//! many touch several fields of an object through one register. Accesses through one base register
//! that changes by constants only, without an index, form a run. The run is checked once, in the
//! soft TLB: all its bytes must be in one page, writable if one of them is written. Then each
//! access is the guest's own, with the distance between host and linear addresses added. The check
//! clobbers flags and so goes to a place at or before the first access where they are dead, if
//! there is one.
//!
//! If the check fails because the bytes are in two pages, or may not be written, the block goes
//! on, at the instruction before which the check stands, in a variant without runs ([`PLAIN`]).
//!
//! The soft TLB cannot change between a check and its accesses in a way that matters: an
//! instruction that the interpreter does ends a run.
//!
//! The stack has always a place for its distance in the frame; other runs share [`PLACES`] - 1, and
//! the accesses of one that finds none are checked one by one.
//!
//! [`PLAIN`]: crate::xlate::mode

use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::classify::is_hint;
use super::facts::Memory;
use super::{Cold, Decoded, Front, SP, flags, gpr_of, host_reg, stack_op, system};
use crate::xlate::emit::{Address, T0, T1};
use crate::xlate::layout::RUN_PLACES as PLACES;
use crate::xlate::{layout, mode};

/// LIMIT: bytes of a run; the descriptor of the slow path has 8 bits for it.
const RUN_MAX: i64 = 255;
/// How many instructions before its first access a check may stand.
const EARLIER_MAX: usize = 8;
/// The stack's place for its distance.
const STACK_PLACE: u8 = 0;

/// A check of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Index of the instruction before which it stands.
    pub before: usize,
    /// Host register of the base.
    base: u8,
    /// First byte, relative to the base there.
    disp: i32,
    /// Bytes.
    span: u32,
    write: bool,
    /// Which of the places of the frame holds the distance.
    place: u8,
}

/// What an instruction does to RSP.
enum Effect {
    Moves(i64),
    Lost,
}

/// A run in the making, relative to its base at the beginning of the base's segment.
#[derive(Clone, Copy)]
struct Run {
    base: usize,
    first: usize,
    last: usize,
    lo: i64,
    hi: i64,
    write: bool,
    /// The base at the first access, relative to that at the beginning of the segment.
    at_first: i64,
    /// Where its check may stand at the earliest.
    earliest: usize,
    /// Its instructions, a bit each.
    members: u64,
}

/// What is known of a base register on the way through a block.
#[derive(Clone, Copy, Default)]
struct Track {
    open: Option<Run>,
    /// Less its value at the beginning of the segment.
    off: i64,
    /// Behind the last check's run, and behind what is not known.
    segment: usize,
    /// Behind the last change.
    changed: usize,
}

/// An operand addressed through one register.
struct Operand {
    base: usize,
    lo: i64,
    hi: i64,
    write: bool,
}

fn is_sp(r: Register) -> bool {
    r.is_gpr() && r.full_register() == Register::RSP
}

fn effect(i: &Instruction) -> Effect {
    let imm = |n: i64| {
        if n.unsigned_abs() <= 1 << 20 {
            Effect::Moves(n)
        } else {
            Effect::Lost
        }
    };
    match i.mnemonic() {
        Mnemonic::Push => return Effect::Moves(-8),
        Mnemonic::Pop if is_sp(i.op0_register()) => return Effect::Lost,
        Mnemonic::Pop => return Effect::Moves(8),
        Mnemonic::Leave | Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Mulx => {
            return if (i.mnemonic() == Mnemonic::Leave)
                || (0..i.op_count())
                    .any(|n| i.op_kind(n) == OpKind::Register && is_sp(i.op_register(n)))
            {
                Effect::Lost
            } else {
                Effect::Moves(0)
            };
        }
        _ => {}
    }
    if i.op0_kind() != OpKind::Register || !is_sp(i.op0_register()) {
        return Effect::Moves(0);
    }
    if i.op0_register() != Register::RSP {
        return Effect::Lost;
    }
    let constant = matches!(
        i.op1_kind(),
        OpKind::Immediate8to64 | OpKind::Immediate32to64
    );
    match i.mnemonic() {
        Mnemonic::Cmp | Mnemonic::Test => Effect::Moves(0),
        Mnemonic::Add if constant => imm(i.immediate(1) as i64),
        Mnemonic::Sub if constant => imm((i.immediate(1) as i64).wrapping_neg()),
        Mnemonic::Lea if i.memory_base() == Register::RSP && i.memory_index() == Register::None => {
            imm(i.memory_displacement64() as i64)
        }
        _ => Effect::Lost,
    }
}

/// Offsets from RSP, first and behind the last, of an operand addressed through RSP alone.
pub fn operand(i: &Instruction) -> Option<(i64, i64)> {
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if !memory
        || i.mnemonic() == Mnemonic::Lea
        || i.memory_base() != Register::RSP
        || i.memory_index() != Register::None
        || matches!(i.memory_segment(), Register::FS | Register::GS)
    {
        return None;
    }
    let size = i.memory_size().size();
    if !matches!(size, 1 | 2 | 4 | 8 | 10 | 16 | 32 | 64) {
        return None;
    }
    let at = i.memory_displacement64() as i64;
    Some((at, at.checked_add(size as i64)?))
}

/// Offsets from RSP of the slot that a push, pop, call or return uses.
fn slot(i: &Instruction) -> Option<(i64, i64)> {
    match i.mnemonic() {
        Mnemonic::Push | Mnemonic::Call => Some((-8, 0)),
        Mnemonic::Pop | Mnemonic::Ret => Some((0, 8)),
        _ => None,
    }
}

/// The operand of an instruction that is addressed through one register other than RSP.
fn through_register(i: &Instruction) -> Option<Operand> {
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    let base = i.memory_base();
    if !memory
        || !base.is_gpr64()
        || base == Register::RSP
        || i.memory_index() != Register::None
        || i.mnemonic() == Mnemonic::Lea
        || is_hint(i.mnemonic())
        || matches!(i.memory_segment(), Register::FS | Register::GS)
    {
        return None;
    }
    let (base, _) = gpr_of(base)?;
    host_reg(base)?;
    let size = i.memory_size().size();
    if !matches!(size, 1 | 2 | 4 | 8 | 10 | 16 | 32 | 64) {
        return None;
    }
    let lo = i.memory_displacement64() as i64;
    Some(Operand {
        base,
        lo,
        hi: lo.checked_add(size as i64)?,
        write: false,
    })
}

/// By how much an instruction that writes a register changes it, if that is a constant.
fn constant_change(i: &Instruction) -> Option<i64> {
    if i.op0_kind() != OpKind::Register || !i.op0_register().is_gpr64() {
        return None;
    }
    let constant = matches!(
        i.op1_kind(),
        OpKind::Immediate8to64 | OpKind::Immediate32to64
    );
    let by = match i.mnemonic() {
        Mnemonic::Inc => 1,
        Mnemonic::Dec => -1,
        Mnemonic::Add if constant => i.immediate(1) as i64,
        Mnemonic::Sub if constant => (i.immediate(1) as i64).wrapping_neg(),
        Mnemonic::Lea
            if i.memory_base() == i.op0_register() && i.memory_index() == Register::None =>
        {
            i.memory_displacement64() as i64
        }
        _ => return None,
    };
    (by.unsigned_abs() <= 1 << 20).then_some(by)
}

impl Track {
    /// Adds an access, in the run that is open if it fits, else in a new one.
    /// `straight`: behind the last conditional branch.
    fn access(&mut self, n: usize, o: &Operand, done: &mut Vec<Run>, straight: usize) {
        let (lo, hi) = (self.off.saturating_add(o.lo), self.off.saturating_add(o.hi));
        if let Some(r) = &mut self.open {
            let (all_lo, all_hi) = (lo.min(r.lo), hi.max(r.hi));
            // A store behind a branch may never come: a page that must not be written is no reason
            // then to leave the block.
            let as_good = r.write || !o.write || r.first >= straight;
            if all_hi.saturating_sub(all_lo) <= RUN_MAX && as_good {
                (r.lo, r.hi, r.last) = (all_lo, all_hi, n);
                r.write |= o.write;
                r.members |= 1 << n;
                return;
            }
        }
        self.close(done);
        if hi.saturating_sub(lo) > RUN_MAX {
            return;
        }
        self.open = Some(Run {
            base: o.base,
            first: n,
            last: n,
            lo,
            hi,
            write: o.write,
            at_first: self.off,
            earliest: if o.base == SP {
                self.segment
            } else {
                // A branch may have asked whether the base points anywhere.
                self.segment.max(self.changed).max(straight)
            }
            .max(n.saturating_sub(EARLIER_MAX)),
            members: 1 << n,
        });
    }

    fn close(&mut self, done: &mut Vec<Run>) {
        if let Some(r) = self.open.take() {
            // A lone access off the stack is cheaper with a check of its own.
            if r.base == SP || r.members.count_ones() > 1 {
                // There is one place for the stack's distance.
                self.segment = r.last + 1;
                done.push(r);
            }
        }
    }

    fn lose(&mut self, n: usize, done: &mut Vec<Run>) {
        self.close(done);
        (self.segment, self.changed, self.off) = (n + 1, n + 1, 0);
    }
}

impl Front<'_> {
    /// Finds the runs of a block and where their checks stand.
    pub(super) fn plan_runs(&mut self, list: &mut [Decoded]) -> Vec<Check> {
        if !self.code64
            || !self.host.bmi2
            || !self.options.share_checks
            || self.key.mode & mode::PLAIN != 0
        {
            return Vec::new();
        }
        let shared = shared_bases(list);
        let mut done: Vec<Run> = Vec::new();
        let mut tracks = [Track::default(); 16];
        // Behind the last conditional branch.
        let mut straight = 0;
        for (n, d) in list.iter_mut().enumerate() {
            d.sp = tracks[SP].off;
            let i = &d.i;
            if self.ends_runs(d) {
                for t in &mut tracks {
                    t.lose(n, &mut done);
                }
                continue;
            }
            let touched = [operand(i), slot(i)];
            let lo = touched.iter().flatten().map(|t| t.0).min();
            let hi = touched.iter().flatten().map(|t| t.1).max();
            if let (Some(lo), Some(hi)) = (lo, hi) {
                let o = Operand {
                    base: SP,
                    lo,
                    hi,
                    write: true,
                };
                tracks[SP].access(n, &o, &mut done, straight);
            }
            let through = through_register(i).filter(|o| shared & 1 << o.base != 0);
            if let Some(mut o) = through {
                o.write = self.writes_operand(i);
                tracks[o.base].access(n, &o, &mut done, straight);
            }
            if d.goes_on {
                straight = n + 1;
            }
            match effect(i) {
                Effect::Moves(by) => tracks[SP].off += by,
                Effect::Lost => tracks[SP].lose(n, &mut done),
            }
            if shared != 0 {
                for u in self.t.facts.registers(i) {
                    let reads_only = matches!(
                        u.access(),
                        OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
                    );
                    let Some((g, _)) = gpr_number(u.register()).filter(|_| !reads_only) else {
                        continue;
                    };
                    let t = &mut tracks[g];
                    if g == SP || shared & 1 << g == 0 {
                        continue;
                    }
                    match constant_change(i) {
                        Some(by) => {
                            t.off += by;
                            t.changed = n + 1;
                        }
                        None => t.lose(n, &mut done),
                    }
                }
            }
        }
        for t in &mut tracks {
            t.close(&mut done);
        }
        place(&done, list)
    }

    /// True for what the interpreter does, and what is not known to leave the soft TLB alone.
    fn ends_runs(&self, d: &Decoded) -> bool {
        let i = &d.i;
        let pushes = i.is_stack_instruction() && !stack_op(i, true) && slot(i).is_none();
        let other = flags::handles(i, self.key.mode)
            && !matches!(i.mnemonic(), Mnemonic::Cli | Mnemonic::Sti);
        d.refused
            || pushes
            || other
            || system::handles(i, self.key.mode).is_some_and(system::System::may_step)
    }

    /// True if an instruction that is copied writes its memory operand.
    fn writes_operand(&mut self, i: &Instruction) -> bool {
        if stack_op(i, true) || slot(i).is_some() || i.is_jmp_near_indirect() {
            return false;
        }
        self.t.facts.of(i).memory == Memory::Write
    }

    /// Emits the check of a run before instruction `d`.
    pub(super) fn run_check(&mut self, c: Check, d: &Decoded) {
        let flags_live = d.live != 0;
        if flags_live && !self.flags_saved {
            self.t.e.save_flags_by(T0);
        }
        // They come back when an instruction wants them.
        self.flags_saved = flags_live;
        let retry = self.t.e.here();
        let first = Address {
            base: Some(c.base),
            index: None,
            disp: c.disp,
        };
        self.t.e.lea(T0, first, true);
        self.t.e.pext_frame(T1, T0, layout::TLB_MASK);
        let tags = if c.write {
            layout::tlb_write(self.view)
        } else {
            layout::tlb_read(self.view)
        };
        self.t.e.table_op(0x33, T0, tags);
        self.t.e.cmp_imm(T0, 4096 - c.span as i32);
        let at = self.t.e.label();
        self.t.e.jcc(7, at);
        self.t.e.table_op(0x8b, T1, layout::tlb_delta(self.view));
        self.t.e.store(layout::run_delta(c.place), T1);
        self.t1_run = Some(c.place);
        let exit = self.t.exits.len();
        let stub = self.new_exit(d.i.ip());
        self.t.exits[exit].0.plain = true;
        self.t.cold.push(Cold::Run {
            at,
            retry,
            span: c.span,
            bits: crate::xlate::stubs::bits(c.write, self.view, flags_live),
            exit,
            stub,
        });
    }

    /// The operand at `disp` from host register `base`, of an instruction in the run whose distance
    /// is in `place`. Uses T1.
    pub(super) fn in_run(&mut self, base: u8, place: u8, disp: i32) -> Address {
        if self.t1_run.replace(place) != Some(place) {
            self.t.e.load(T1, layout::run_delta(place));
        }
        Address {
            base: Some(base),
            index: Some((T1, 0)),
            disp,
        }
    }

    /// The run that an instruction's explicit memory operand is in: host register of its base, and
    /// place.
    pub(super) fn run_of_operand(&self, d: &Decoded) -> Option<(u8, u8)> {
        if d.stack && operand(&d.i).is_some() {
            return Some((super::HOST_SP, STACK_PLACE));
        }
        let place = d.run?;
        let (base, _) = gpr_of(d.i.memory_base())?;
        Some((host_reg(base)?, place))
    }

    /// The stack slot at `disp` from RSP, of an instruction in a run of the stack.
    pub(super) fn stack_in_run(&mut self, disp: i32) -> Address {
        self.in_run(super::HOST_SP, STACK_PLACE, disp)
    }
}

/// Number of the register that a general-purpose register is a part of.
fn gpr_number(r: Register) -> Option<(usize, usize)> {
    gpr_of(r.full_register())
}

/// The registers other than RSP, a bit each, that address more than one operand.
fn shared_bases(list: &[Decoded]) -> u32 {
    let (mut once, mut more) = (0u32, 0u32);
    for d in list {
        if let Some(o) = through_register(&d.i) {
            more |= once & 1 << o.base;
            once |= 1 << o.base;
        }
    }
    more
}

/// Gives the runs their places, and the checks in the order in which they stand.
fn place(runs: &[Run], list: &mut [Decoded]) -> Vec<Check> {
    let mut checks: Vec<(Check, &Run)> = Vec::with_capacity(runs.len());
    for r in runs {
        let before = (r.earliest..=r.first)
            .rev()
            .find(|&n| list[n].live == 0)
            .unwrap_or(r.first);
        let (base, there) = if r.base == SP {
            (super::HOST_SP, list[before].sp)
        } else {
            let Some(h) = host_reg(r.base) else { continue };
            (h, r.at_first)
        };
        let check = Check {
            before,
            base,
            disp: (r.lo - there) as i32,
            span: (r.hi - r.lo) as u32,
            write: r.write,
            place: STACK_PLACE,
        };
        checks.push((check, r));
    }
    checks.sort_by_key(|(c, _)| c.before);
    // Behind which instruction each place is free.
    let mut free = [0usize; PLACES];
    checks.retain_mut(|(c, r)| {
        let members = (0..list.len()).filter(|n| r.members & 1 << n != 0);
        if r.base == SP {
            members.for_each(|n| list[n].stack = true);
            return true;
        }
        let places = usize::from(STACK_PLACE) + 1..PLACES;
        let Some(p) = places.into_iter().find(|&p| free[p] <= c.before) else {
            return false;
        };
        free[p] = r.last + 1;
        c.place = p as u8;
        members.for_each(|n| list[n].run = Some(c.place));
        true
    });
    checks.into_iter().map(|(c, _)| c).collect()
}
