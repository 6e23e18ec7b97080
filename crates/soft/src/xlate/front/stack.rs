//! Runs of stack accesses: one check for many.
//!
//! Most blocks touch the stack more than once, and always through RSP, which changes by constants.
//! Such accesses form a run. The run is checked once, in the soft TLB: all its bytes must be in one
//! writable page. Then each access is the guest's own, with the distance between host and linear
//! addresses added. The check clobbers flags and so goes to a place at or before the first access
//! where they are dead, if there is one.
//!
//! If the check fails because the bytes are in two pages, or may not be written, the block goes
//! on, at the instruction before which the check stands, in a variant without runs ([`PLAIN`]).
//!
//! The soft TLB cannot change between a check and its accesses in a way that matters: an
//! instruction that the interpreter does ends a run.
//!
//! [`PLAIN`]: crate::xlate::mode

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Cold, Decoded, Front, HOST_SP, flags, stack_op, system};
use crate::xlate::emit::{Address, T0, T1};
use crate::xlate::{layout, mode};

/// LIMIT: bytes of a run; the descriptor of the slow path has 8 bits for it.
const RUN_MAX: i64 = 255;
/// How many instructions before its first access a check may stand.
const EARLIER_MAX: usize = 8;

/// A check of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackCheck {
    /// Index of the instruction before which it stands.
    pub before: usize,
    /// First byte, relative to RSP there.
    disp: i32,
    /// Bytes.
    span: u32,
}

/// What an instruction does to RSP.
enum Effect {
    Moves(i64),
    Lost,
}

/// A run in the making, relative to RSP at the beginning of its segment.
struct Run {
    first: usize,
    last: usize,
    lo: i64,
    hi: i64,
}

impl Run {
    fn with(&self, n: usize, lo: i64, hi: i64) -> Option<Run> {
        let (lo, hi) = (lo.min(self.lo), hi.max(self.hi));
        (hi - lo <= RUN_MAX).then_some(Run {
            first: self.first,
            last: n,
            lo,
            hi,
        })
    }
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

impl Front<'_> {
    /// Finds the runs of a block and where their checks stand.
    pub(super) fn plan_stack(&self, list: &mut [Decoded]) -> Vec<StackCheck> {
        let mut checks = Vec::new();
        if !self.code64
            || !self.host.bmi2
            || !self.options.share_checks
            || self.key.mode & mode::PLAIN != 0
        {
            return checks;
        }
        let mut run: Option<Run> = None;
        // Where a check may stand at the earliest.
        let mut segment = 0;
        let mut sp = 0i64;
        for n in 0..list.len() {
            let d = &mut list[n];
            d.sp = sp;
            let i = &d.i;
            let pushes = i.is_stack_instruction() && !stack_op(i, true) && slot(i).is_none();
            let other = flags::handles(i, self.key.mode)
                && !matches!(i.mnemonic(), Mnemonic::Cli | Mnemonic::Sti);
            if d.refused
                || pushes
                || other
                || system::handles(i, self.key.mode).is_some_and(system::System::may_step)
            {
                self.close(&mut run, &mut segment, list, &mut checks);
                (segment, sp) = (n + 1, 0);
                continue;
            }
            let touched = [operand(i), slot(i)];
            let lo = touched.iter().flatten().map(|t| t.0).min();
            let hi = touched.iter().flatten().map(|t| t.1).max();
            if let (Some(lo), Some(hi)) = (lo, hi)
                && hi - lo <= RUN_MAX
            {
                let (lo, hi) = (sp + lo, sp + hi);
                d.stack = true;
                let longer = run.as_ref().and_then(|r| r.with(n, lo, hi));
                if longer.is_none() {
                    self.close(&mut run, &mut segment, list, &mut checks);
                }
                run = Some(longer.unwrap_or(Run {
                    first: n,
                    last: n,
                    lo,
                    hi,
                }));
            }
            match effect(&list[n].i) {
                Effect::Moves(by) => sp += by,
                Effect::Lost => {
                    self.close(&mut run, &mut segment, list, &mut checks);
                    (segment, sp) = (n + 1, 0);
                }
            }
        }
        self.close(&mut run, &mut segment, list, &mut checks);
        checks
    }

    /// Ends a run: its check stands at the last place where the flags are dead, if there is one.
    fn close(
        &self,
        run: &mut Option<Run>,
        segment: &mut usize,
        list: &[Decoded],
        checks: &mut Vec<StackCheck>,
    ) {
        let Some(r) = run.take() else { return };
        let from = (*segment).max(r.first.saturating_sub(EARLIER_MAX));
        // There is one place for the distance: the next check may use it when this run has ended.
        *segment = r.last + 1;
        let before = (from..=r.first)
            .rev()
            .find(|&n| list[n].live == 0)
            .unwrap_or(r.first);
        checks.push(StackCheck {
            before,
            disp: (r.lo - list[before].sp) as i32,
            span: (r.hi - r.lo) as u32,
        });
    }

    /// Emits the check of a run before instruction `d`.
    pub(super) fn stack_check(&mut self, c: StackCheck, d: &Decoded) {
        let flags_live = d.live != 0;
        if flags_live && !self.flags_saved {
            self.t.e.save_flags_by(T0);
        }
        // They come back when an instruction wants them.
        self.flags_saved = flags_live;
        let retry = self.t.e.here();
        let first = Address {
            base: Some(HOST_SP),
            index: None,
            disp: c.disp,
        };
        self.t.e.lea(T0, first, true);
        self.t.e.pext_frame(T1, T0, layout::TLB_MASK);
        self.t.e.table_op(0x33, T0, layout::tlb_write(self.view));
        self.t.e.cmp_imm(T0, 4096 - c.span as i32);
        let at = self.t.e.label();
        self.t.e.jcc(7, at);
        self.t.e.table_op(0x8b, T1, layout::tlb_delta(self.view));
        self.t.e.store(layout::RUN_DELTA, T1);
        self.t1_delta = true;
        let exit = self.t.exits.len();
        let stub = self.new_exit(d.i.ip());
        self.t.exits[exit].0.plain = true;
        self.t.cold.push(Cold::Stack {
            at,
            retry,
            disp: c.disp,
            span: c.span,
            bits: crate::xlate::stubs::bits(true, self.view, flags_live),
            exit,
            stub,
        });
    }

    /// The stack operand at `disp` from RSP, of an instruction in a run. Uses T1.
    pub(super) fn in_run(&mut self, disp: i32) -> Address {
        if !std::mem::replace(&mut self.t1_delta, true) {
            self.t.e.load(T1, layout::RUN_DELTA);
        }
        Address {
            base: Some(HOST_SP),
            index: Some((T1, 0)),
            disp,
        }
    }
}
