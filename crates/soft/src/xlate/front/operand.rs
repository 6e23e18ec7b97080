//! Copied instructions: operands, addresses, the soft-TLB check.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::classify::{normalise, splittable};
use super::facts::Memory;
use super::{Cold, Decoded, Front, gpr_of, host_reg, reg_named};
use crate::frame::TLB_BITS;
use crate::interp::operand::segment_number;
use crate::xlate::emit::{Address, Depends, T0, T1};
use crate::xlate::layout::{self, gpr};

impl Front<'_> {
    /// Copies an instruction with registers renamed and its memory operand replaced. False if it
    /// has to be left to the interpreter; nothing was emitted then that matters.
    pub(super) fn copy(&mut self, d: &Decoded) -> bool {
        let mut i = d.i;
        normalise(&mut i);
        let m = i.mnemonic();
        let mem_op = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
        // Spilled registers among the explicit operands, with what happens to them.
        let mut spilled: Vec<(usize, bool)> = Vec::new(); // empty, and then not allocated, as a rule
        {
            let facts = self.t.facts.of(&i);
            for n in 0..i.op_count() {
                if i.op_kind(n) != OpKind::Register {
                    continue;
                }
                let Some((g, _)) = gpr_of(i.op_register(n)) else {
                    continue;
                };
                if host_reg(g).is_none() {
                    let written = facts.writes(n);
                    match spilled.iter_mut().find(|(s, _)| *s == g) {
                        Some(s) => s.1 |= written,
                        None => spilled.push((g, written)),
                    }
                }
            }
        }
        let is_lea = m == Mnemonic::Lea;
        let room = if mem_op.is_some() && !is_lea { 1 } else { 2 };
        if spilled.len() > room {
            return false;
        }
        let rewrite = |i: &mut Instruction, spilled: &[(usize, bool)], first: u8| {
            for n in 0..i.op_count() {
                if i.op_kind(n) == OpKind::Register
                    && let Some((g, size)) = gpr_of(i.op_register(n))
                {
                    let host = host_reg(g).unwrap_or_else(|| {
                        let at = spilled.iter().position(|(s, _)| *s == g).unwrap_or(0);
                        if at == 0 { first } else { T1 }
                    });
                    i.set_op_register(n, reg_named(host, size));
                }
            }
        };
        if is_lea {
            return self.lea(&d.i, &spilled);
        }
        if let Some(op) = mem_op {
            let size = i.memory_size().size();
            let write = match self.t.facts.of(&i).memory {
                Memory::None => return false,
                Memory::Named | Memory::Read => false,
                Memory::Write | Memory::Several => true,
            };
            if let Some((base, place)) = self.run_of_operand(d) {
                let mut probe = i;
                rewrite(&mut probe, &spilled, T0);
                probe.set_segment_prefix(Register::None);
                probe.set_memory_base(reg_named(base, 8));
                probe.set_memory_index(Register::R11);
                probe.set_memory_index_scale(1);
                probe.set_memory_displacement64(d.i.memory_displacement64());
                probe.set_memory_displ_size(1);
                let Some(encoded) = self.t.e.encode(&probe) else {
                    return false;
                };
                self.in_run(base, place, 0);
                if let Some(&(g, _)) = spilled.first() {
                    self.t.e.load(T0, gpr(g));
                }
                self.t.e.add(&encoded);
                if let Some(&(g, true)) = spilled.first() {
                    self.t.e.store(gpr(g), T0);
                }
                return true;
            }
            // Encode first, so that a refusal leaves nothing behind.
            let mut probe = i;
            let t0_taken = !spilled.is_empty() || self.restores(d);
            self.set_memory(&mut probe, op, t0_taken);
            rewrite(&mut probe, &spilled, T0);
            let Some(encoded) = self.t.e.encode(&probe) else {
                return false;
            };
            self.splittable = write && splittable(&i);
            let at = self.check(&d.i, size, write, d.live != 0);
            self.splittable = false;
            if let Some(&(g, _)) = spilled.first() {
                self.free_t0(at);
                self.t.e.load(T0, gpr(g));
            }
            self.t.e.add(&encoded);
            if let Some(&(g, true)) = spilled.first() {
                self.t.e.store(gpr(g), T0);
            }
            return true;
        }
        let mut probe = i;
        rewrite(&mut probe, &spilled, T0);
        let Some(encoded) = self.t.e.encode(&probe) else {
            return false;
        };
        if spilled.len() > 1 {
            self.t1_run = None;
        }
        for (n, &(g, _)) in spilled.iter().enumerate() {
            self.t.e.load(if n == 0 { T0 } else { T1 }, gpr(g));
        }
        self.t.e.add(&encoded);
        for (n, &(g, written)) in spilled.iter().enumerate() {
            if written {
                self.t.e.store(gpr(g), if n == 0 { T0 } else { T1 });
            }
        }
        true
    }

    /// MOV of a segment register's selector.
    pub(super) fn selector(&mut self, i: &Instruction) {
        let Some((g, _)) = gpr_of(i.op0_register()) else {
            return;
        };
        let from = layout::seg_selector(segment_number(i.op1_register()));
        match host_reg(g) {
            Some(h) => self.t.e.load16(h, from),
            None => {
                self.t.e.load16(T0, from);
                self.t.e.store(gpr(g), T0);
            }
        }
    }

    /// True if the flags come back between an instruction's check and the instruction.
    fn restores(&self, d: &Decoded) -> bool {
        d.live != 0 && !self.quiet
    }

    /// Replaces the memory operand by `[T1 + T0]`, or `[T1]` if T0 is needed.
    pub(super) fn set_memory(&self, i: &mut Instruction, op: u32, t0_taken: bool) {
        let _ = op;
        i.set_segment_prefix(Register::None);
        i.set_memory_base(Register::R11);
        i.set_memory_index(if t0_taken {
            Register::None
        } else {
            Register::R10
        });
        i.set_memory_index_scale(1);
        i.set_memory_displacement64(0);
        i.set_memory_displ_size(0);
    }

    pub(super) fn lea(&mut self, i: &Instruction, spilled: &[(usize, bool)]) -> bool {
        let Some((g, size)) = gpr_of(i.op_register(0)) else {
            return false;
        };
        if size == 2 {
            return false;
        }
        let _ = spilled;
        self.address_into(T0, i, false);
        match (host_reg(g), size) {
            (Some(h), 8) => self.t.e.mov(h, T0, true),
            (Some(h), _) => self.t.e.mov(h, T0, false),
            (None, 8) => self.t.e.store(gpr(g), T0),
            (None, _) => {
                self.t.e.mov(T0, T0, false);
                self.t.e.store(gpr(g), T0);
            }
        }
        true
    }

    /// Computes an instruction's effective (with segment base: linear) address into `dst`.
    /// Keeps flags; uses T0 and T1.
    pub(super) fn address_into(&mut self, dst: u8, i: &Instruction, with_segment: bool) {
        let base = i.memory_base();
        let index = i.memory_index();
        let asz64 = if base != Register::None {
            base.size() == 8
        } else if index != Register::None {
            index.size() == 8
        } else {
            self.code64 && i.memory_displ_size() == 8 || i.memory_displacement64() > 0xffff_ffff
        };
        let disp = i.memory_displacement64();
        if base.is_ip() || (base == Register::None && index == Register::None) {
            let addr = if self.code64 {
                disp
            } else {
                disp & 0xffff_ffff
            };
            if base.is_ip() {
                self.t.e.mov_rip(dst, addr, Depends::Rip);
            } else {
                self.t.e.mov_imm(dst, addr);
            }
        } else {
            let mut a = Address {
                disp: disp as u32 as i32,
                ..Address::default()
            };
            if let Some((g, _)) = gpr_of(base) {
                a.base = Some(match host_reg(g) {
                    Some(h) => h,
                    None => {
                        self.t.e.load(T0, gpr(g));
                        T0
                    }
                });
            }
            if let Some((g, _)) = gpr_of(index) {
                let h = match host_reg(g) {
                    Some(h) => h,
                    None => {
                        self.t1_run = None;
                        self.t.e.load(T1, gpr(g));
                        T1
                    }
                };
                a.index = Some((h, i.memory_index_scale().trailing_zeros() as u8));
            }
            self.t.e.lea(dst, a, asz64);
        }
        let seg = match i.memory_segment() {
            Register::FS => Some(pyrite_x86::sreg::FS),
            Register::GS => Some(pyrite_x86::sreg::GS),
            _ => None,
        };
        if with_segment && let Some(s) = seg {
            self.t1_run = None;
            self.t.e.load(T1, layout::seg_base(s));
            let a = Address {
                base: Some(dst),
                index: Some((T1, 0)),
                disp: 0,
            };
            self.t.e.lea(dst, a, self.code64);
        }
    }

    /// Soft-TLB check of the instruction's memory operand, which is then at the returned address.
    pub(super) fn check(
        &mut self,
        i: &Instruction,
        size: usize,
        write: bool,
        flags_live: bool,
    ) -> Address {
        let i = *i;
        self.check_with(size, write, flags_live, |f| f.address_into(T0, &i, true))
    }

    pub(super) fn check_with(
        &mut self,
        size: usize,
        write: bool,
        flags_live: bool,
        address: impl FnOnce(&mut Self),
    ) -> Address {
        self.t1_run = None;
        if flags_live && !self.flags_saved {
            self.t.e.save_flags_by(T0);
        }
        let retry = self.t.e.here();
        address(self);
        if self.host.bmi2 {
            self.t.e.pext_frame(T1, T0, layout::TLB_MASK);
        } else {
            self.t.e.mov(T1, T0, false);
            self.t.e.shr32(T1, 12);
            self.t.e.and32(T1, (1 << TLB_BITS) - 1);
        }
        let tags = if write {
            layout::tlb_write(self.view)
        } else {
            layout::tlb_read(self.view)
        };
        self.t.e.table_op(0x33, T0, tags);
        self.t.e.cmp_imm(T0, 4096 - size as i32);
        let at = self.t.e.label();
        self.t.e.jcc(7, at);
        self.t.e.table_op(0x8b, T1, layout::tlb_host(self.view));
        let done = self.t.e.here();
        let mut operand = Self::OPERAND;
        if flags_live && self.quiet {
            self.flags_saved = true;
        } else if flags_live {
            operand = self.free_t0(operand);
            self.t.e.restore_flags_by(T0);
        }
        let split = if self.splittable {
            crate::xlate::stubs::SPLITTABLE
        } else {
            0
        };
        self.t.cold.push(Cold::Slow {
            at,
            retry,
            done,
            size,
            bits: crate::xlate::stubs::bits(write, self.view, flags_live) | split,
        });
        operand
    }
}
