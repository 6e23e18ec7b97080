//! Stack instructions and everything that leaves a block.

use iced_x86::{FlowControl, Mnemonic, OpKind};

use super::classify::condition;
use super::{Cold, Decoded, Exit, Front, HOST_SP, SP, gpr_of, host_reg};
use crate::xlate::emit::{Address, Depends, Label, T0, T1};
use crate::xlate::layout::{self, gpr};

/// True for what is canonical under four-level paging, and so under any.
pub(super) fn canonical(rip: u64) -> bool {
    (rip as i64) << 16 >> 16 == rip as i64
}

impl Front<'_> {
    /// Size in bytes of a stack slot.
    pub(super) fn slot(&self) -> usize {
        if self.code64 { 8 } else { 4 }
    }

    /// Checks the slot below the stack pointer for writing: `[T1 + T0]`.
    pub(super) fn push_check(&mut self, flags_live: bool) -> Address {
        let n = self.slot();
        self.check_with(n, true, flags_live, Self::slot_below)
    }

    /// T0 = address of the slot below the stack pointer.
    fn slot_below(&mut self) {
        let a = Address {
            base: Some(HOST_SP),
            index: None,
            disp: -(self.slot() as i32),
        };
        self.t.e.lea(T0, a, self.code64);
    }

    /// Checks the slot at the stack pointer for reading.
    pub(super) fn pop_check(&mut self, base: u8, flags_live: bool) -> Address {
        let (n, w) = (self.slot(), self.code64);
        self.check_with(n, false, flags_live, |f| f.t.e.mov(T0, base, w))
    }

    pub(super) fn move_sp(&mut self, by: i32) {
        let a = Address {
            base: Some(HOST_SP),
            index: None,
            disp: by,
        };
        self.t.e.lea(HOST_SP, a, self.code64);
    }

    pub(super) const OPERAND: Address = Address {
        base: Some(T1),
        index: Some((T0, 0)),
        disp: 0,
    };

    pub(super) fn push_const(&mut self, d: &Decoded, value: u64, flags_live: bool) {
        let to = self.push_slot(d, flags_live);
        self.store_const(to, value, false);
    }

    /// Where a push stores, checked.
    fn push_slot(&mut self, d: &Decoded, flags_live: bool) -> Address {
        if d.stack {
            return self.stack_in_run(-(self.slot() as i32));
        }
        self.push_check(flags_live)
    }

    /// Where a pop loads from, checked.
    fn pop_slot(&mut self, d: &Decoded, flags_live: bool) -> Address {
        if d.stack {
            return self.stack_in_run(0);
        }
        self.pop_check(HOST_SP, flags_live)
    }

    /// The same operand without T0.
    pub(super) fn free_t0(&mut self, a: Address) -> Address {
        if a.index != Some((T0, 0)) {
            return a;
        }
        self.t1_run = None;
        self.t.e.lea(T1, a, true);
        Address {
            base: Some(T1),
            ..Address::default()
        }
    }

    /// What follows the check of a push of a constant.
    fn store_const(&mut self, to: Address, value: u64, is_rip: bool) {
        let (n, w) = (self.slot() as i32, self.code64);
        let small = if w {
            i32::try_from(value as i64).ok()
        } else {
            Some(value as u32 as i32)
        };
        if let Some(v) = small {
            self.t.e.fixed |= is_rip;
            self.t.e.store_mem_imm(to, v, w);
        } else {
            let to = self.free_t0(to);
            if is_rip {
                self.t.e.mov_rip(T0, value, Depends::Rip);
            } else {
                self.t.e.mov_imm(T0, value);
            }
            self.t.e.store_mem(to, T0, w);
        }
        self.move_sp(-n);
    }

    /// Pushes what is in a frame slot.
    pub(super) fn push_frame(&mut self, d: &Decoded, at: usize, flags_live: bool) {
        let (n, w) = (self.slot() as i32, self.code64);
        let to = self.push_slot(d, flags_live);
        let to = self.free_t0(to);
        self.t.e.load(T0, at);
        self.t.e.store_mem(to, T0, w);
        self.move_sp(-n);
    }

    /// PUSH, POP and LEAVE.
    pub(super) fn stack(&mut self, d: &Decoded) {
        let i = &d.i;
        let live = d.live != 0;
        let (n, w) = (self.slot() as i32, self.code64);
        match i.mnemonic() {
            Mnemonic::Push => match i.op0_kind() {
                OpKind::Register => {
                    let g = gpr_of(i.op0_register()).map_or(0, |(g, _)| g);
                    match host_reg(g) {
                        Some(h) => {
                            let to = self.push_slot(d, live);
                            self.t.e.store_mem(to, h, w);
                            self.move_sp(-n);
                        }
                        None => self.push_frame(d, gpr(g), live),
                    }
                }
                OpKind::Memory => {
                    let from = self.operand_slot(d, live);
                    self.t.e.load_mem(T0, from, w);
                    self.t.e.store(layout::VALUE, T0);
                    self.push_frame(d, layout::VALUE, live);
                }
                _ => self.push_const(d, i.immediate(0), live),
            },
            Mnemonic::Pop => {
                let g = gpr_of(i.op0_register()).map_or(0, |(g, _)| g);
                let from = self.pop_slot(d, live);
                match host_reg(g) {
                    Some(h) => {
                        self.t.e.load_mem(h, from, w);
                        if g != SP {
                            self.move_sp(n);
                        }
                    }
                    None => {
                        self.t.e.load_mem(T0, from, w);
                        self.t.e.store(gpr(g), T0);
                        self.move_sp(n);
                    }
                }
            }
            _ => {
                // LEAVE: RSP = RBP + slot, RBP = [RBP].
                let from = self.pop_check(5, live);
                self.t.e.load_mem(T0, from, w);
                self.t.e.lea(
                    HOST_SP,
                    Address {
                        base: Some(5),
                        index: None,
                        disp: n,
                    },
                    w,
                );
                self.t.e.mov(5, T0, w);
            }
        }
    }

    pub(super) fn branch(&mut self, d: &Decoded) {
        let i = &d.i;
        let next = self.wrap_ip(i.next_ip());
        match i.flow_control() {
            FlowControl::UnconditionalBranch => {
                let t = self.wrap_ip(i.near_branch_target());
                self.direct_exit(t);
            }
            FlowControl::ConditionalBranch => {
                let cc = condition(i);
                let t = self.wrap_ip(i.near_branch_target());
                self.conditional_exit(cc, t);
                self.direct_exit(next);
            }
            FlowControl::Call => {
                let to = self.push_slot(d, true);
                self.store_const(to, next, true);
                let t = self.wrap_ip(i.near_branch_target());
                self.direct_exit(t);
            }
            FlowControl::IndirectCall => {
                self.load_target(d);
                let (n, w) = (self.slot(), self.code64);
                let to = if d.stack {
                    self.target_check_in_run(i.ip());
                    self.stack_in_run(-(n as i32))
                } else {
                    self.check_with(n, true, true, |f| {
                        if w {
                            f.target_check(i.ip());
                        }
                        f.slot_below();
                    })
                };
                self.store_const(to, next, true);
                self.t.e.load(T0, layout::TARGET);
                self.indirect_exit();
            }
            FlowControl::IndirectBranch => {
                self.load_target(d);
                self.note_branch();
                self.t.e.load(T0, layout::TARGET);
                self.indirect_exit();
            }
            _ => {
                let extra = if i.op_count() == 1 {
                    i32::from(i.immediate16())
                } else {
                    0
                };
                let n = self.slot() as i32;
                let from = self.pop_slot(d, true);
                self.t.e.load_mem(T0, from, self.code64);
                self.move_sp(n + extra);
                self.note_branch();
                self.indirect_exit();
            }
        }
    }

    /// The operand of an indirect branch, to `FrameArea::target`.
    pub(super) fn load_target(&mut self, d: &Decoded) {
        let (i, w) = (&d.i, self.code64);
        if i.op0_kind() == OpKind::Register {
            let g = gpr_of(i.op0_register()).map_or(0, |(g, _)| g);
            match host_reg(g) {
                Some(h) => self.t.e.store(layout::TARGET, h),
                None => {
                    self.t.e.load(T0, gpr(g));
                    self.t.e.store(layout::TARGET, T0);
                }
            }
        } else {
            let from = self.operand_slot(d, true);
            self.t.e.load_mem(T0, from, w);
            self.t.e.store(layout::TARGET, T0);
        }
    }

    /// A memory operand of the size of a stack slot that is read, checked.
    fn operand_slot(&mut self, d: &Decoded, flags_live: bool) -> Address {
        if let Some((base, place)) = self.run_of_operand(d) {
            return self.in_run(base, place, d.i.memory_displacement64() as i32);
        }
        self.check(&d.i, self.slot(), false, flags_live)
    }

    /// As `target_check`, but keeps the flags, and takes addresses of the other half for rare.
    fn target_check_in_run(&mut self, rip: u64) {
        let at = self.t.e.label();
        self.t.e.store(layout::SAVE_RCX, 1);
        self.t.e.load(1, layout::TARGET);
        self.t.e.pext_frame(1, 1, layout::CANONICAL_MASK);
        if self.view != crate::frame::View::User as usize {
            let all_ones = Address {
                base: Some(1),
                index: None,
                disp: -0x1ffff,
            };
            self.t.e.lea(1, all_ones, true);
        }
        self.t.e.jrcxz_over(|e| {
            e.load(1, layout::SAVE_RCX);
            e.jmp(at);
        });
        self.t.e.load(1, layout::SAVE_RCX);
        self.t.cold.push(Cold::Interpret { at, rip });
    }

    /// Notes which JMP or RET leaves the block: no block is at a non-canonical target, so such a
    /// target ends in a look-up, which raises #GP at the branch that is noted (`undo_branch`).
    fn note_branch(&mut self) {
        if self.code64 {
            let at = self.t.e.address() as u32;
            self.t.e.store_dependent(layout::BRANCH, at, Depends::Host);
        }
    }

    /// Leaves for the interpreter if the target of a CALL is not canonical: unlike JMP and RET it
    /// cannot be undone once it has pushed. The flags are saved; uses T0.
    fn target_check(&mut self, rip: u64) {
        let at = self.t.e.label();
        self.t.e.load(T0, layout::TARGET);
        self.t.e.sar(T0, 47);
        let next = Address {
            base: Some(T0),
            index: None,
            disp: 1,
        };
        self.t.e.lea(T0, next, true);
        self.t.e.cmp_imm(T0, 1);
        self.t.e.jcc(7, at);
        self.t.cold.push(Cold::InterpretSaved { at, rip });
    }

    /// Goes on at the guest RIP in T0, through the jump cache.
    pub(super) fn indirect_exit(&mut self) {
        let fold = Address {
            base: Some(T1),
            index: Some((T0, 0)),
            disp: 0,
        };
        if self.host.bmi2 {
            self.t.e.rorx(T1, T0, layout::JC_BITS as u8);
            self.t.e.lea(T1, fold, true);
            self.t.e.pext_frame(T1, T1, layout::JC_MASK_AT);
        } else {
            // The flags must survive: they may be live in the target.
            self.t.e.save_flags();
            self.t.e.mov(T1, T0, true);
            self.t.e.ror(T1, layout::JC_BITS as u8);
            self.t.e.lea(T1, fold, true);
            self.t.e.and32(T1, layout::JC_MASK as u32);
            self.t.e.restore_flags();
        }
        self.t.e.jmp_table(self.jump_cache());
    }

    /// True if exits are linked: within a page the mapping is the same, the entry from other
    /// pages checks it.
    pub(super) fn linkable(&self) -> bool {
        self.options.link
    }

    pub(super) fn far_jump(&mut self, target: u64) {
        if self.code64 && !canonical(target) {
            // Code that runs on beyond the last canonical address: the fault is at the next.
            self.interpret_at(target);
            return;
        }
        self.t.e.fixed = true;
        self.t.e.mov_imm(T0, target);
        let slot = layout::jump_slot(target);
        self.t.e.jmp_frame(self.jump_cache() + 8 * slot);
    }

    /// Offset of the jump cache of the block's mode.
    fn jump_cache(&self) -> usize {
        layout::jump_cache(self.view)
    }

    /// Ends the block by going on at `target`.
    pub(super) fn direct_exit(&mut self, target: u64) {
        if self.linkable() {
            let stub = self.new_exit(target);
            self.t.e.jmp(stub);
            self.note_patch();
        } else {
            self.far_jump(target);
        }
    }

    pub(super) fn conditional_exit(&mut self, cc: u8, target: u64) {
        if self.linkable() {
            let stub = self.new_exit(target);
            self.t.e.jcc(cc, stub);
            self.note_patch();
        } else {
            let at = self.t.e.label();
            self.t.e.jcc(cc, at);
            self.t.cold.push(Cold::JumpFar { at, target });
        }
    }

    pub(super) fn new_exit(&mut self, target: u64) -> Label {
        let at = self.t.e.label();
        self.t.exits.push((
            Exit {
                target,
                plain: false,
                patch_at: 0,
                stub_at: 0,
                linked: None,
                owner: 0,
            },
            at,
            0,
        ));
        self.t.cold.push(Cold::ExitStub { at });
        at
    }

    /// Remembers the rel32 just emitted as the last exit's patch place.
    pub(super) fn note_patch(&mut self) {
        let at = self.t.e.len() - 4;
        if let Some(x) = self.t.exits.last_mut() {
            x.2 = at;
        }
    }
}
