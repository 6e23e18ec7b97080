//! Which flags are live, and when they may stay in the frame.

use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, RflagsBits};

use super::classify::{Fpu, fpu_kind, may_keep_flags, uses_mask, uses_vector};
use super::{ARITH, Decoded, Front, flags, system};
use crate::xlate::emit::T0;

/// Arithmetic flags that an instruction reads.
pub fn flags_read(i: &Instruction) -> u32 {
    // A rotation through CF by a multiple of its length still makes OF from CF, which the decoder
    // does not say.
    let through_carry = matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
    let also = if through_carry { RflagsBits::CF } else { 0 };
    (i.rflags_read() & ARITH) | also
}

impl Front<'_> {
    /// Arithmetic flags that are live behind the block: those that a place where it leads on the same
    /// page may read before it writes them.
    pub(super) fn live_after(&mut self, list: &[Decoded], page: &[u8]) -> u32 {
        let Some(last) = list.last() else {
            return ARITH;
        };
        let i = last.i;
        let next = self.wrap_ip(i.next_ip());
        let target = self.wrap_ip(i.near_branch_target());
        match i.flow_control() {
            _ if last.refused || system::handles(&i, self.key.mode).is_some() => ARITH,
            FlowControl::Next => self.live_at(next, page),
            FlowControl::UnconditionalBranch => self.live_at(target, page),
            FlowControl::ConditionalBranch => {
                let live = self.live_at(next, page);
                if live == ARITH {
                    return ARITH;
                }
                live | self.live_at(target, page)
            }
            _ => ARITH,
        }
    }

    /// Arithmetic flags that code at `rip` may read before it writes them.
    pub(super) fn live_at(&mut self, rip: u64, page: &[u8]) -> u32 {
        /// LIMIT: instructions that are looked at.
        const AHEAD: usize = 3;
        let at = (rip & 0xfff) as usize;
        let Some(free) = self.looked.iter().position(|l| l.1 == 0) else {
            return ARITH;
        };
        if (rip ^ self.key.rip) >> 12 != 0 || page.len() <= at || self.options.precise_flags {
            return ARITH;
        }
        let bits = if self.code64 { 64 } else { 32 };
        let mut dec = Decoder::with_ip(bits, &page[at..], rip, self.host.decoder);
        let (mut live, mut open) = (0, ARITH);
        for _ in 0..AHEAD {
            if !dec.can_decode() {
                break;
            }
            let i = dec.decode();
            // A repeated comparison of nothing keeps the flags.
            if i.is_invalid() || i.is_string_instruction() {
                break;
            }
            live |= flags_read(&i) & open;
            if !may_keep_flags(&i) {
                open &= !i.rflags_modified();
            }
            if open == 0 || i.flow_control() != FlowControl::Next {
                break;
            }
        }
        if live | open != ARITH {
            self.looked[free] = (at as u16, dec.position() as u16);
        }
        live | open
    }

    /// True for instructions that neither use the flags nor can raise a signal: around them the flags
    /// may stay in the frame.
    pub(super) fn is_quiet(&self, d: &Decoded) -> bool {
        let i = &d.i;
        !d.refused
            && i.flow_control() == FlowControl::Next
            && i.rflags_read() == 0
            && i.rflags_modified() == 0
            && flags_read(i) == 0
            && fpu_kind(i) == Fpu::None
            && !uses_vector(i)
            && !uses_mask(i)
            && !flags::handles(i, self.key.mode)
            && system::handles(i, self.key.mode).is_none()
    }

    /// Puts the flags where instructions want them. Uses T0.
    pub(super) fn bring_flags_back(&mut self) {
        if std::mem::take(&mut self.flags_saved) {
            self.t.e.restore_flags_by(T0);
        }
    }
}
