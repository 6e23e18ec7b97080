//! Stack instructions and everything that leaves a block.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

use super::classify::condition;
use super::{Cold, Decoded, Exit, Front, HOST_SP, SP, gpr_of, host_reg};
use crate::xlate::emit::{Address, Label, T0, T1};
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
    pub(super) fn push_check(&mut self, rip: u64, flags_live: bool) {
        let n = self.slot();
        self.check_with(rip, n, true, flags_live, Self::slot_below);
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
    pub(super) fn pop_check(&mut self, rip: u64, base: u8, flags_live: bool) {
        let (n, w) = (self.slot(), self.code64);
        self.check_with(rip, n, false, flags_live, |f| f.t.e.mov(T0, base, w));
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

    pub(super) fn push_const(&mut self, rip: u64, value: u64, flags_live: bool) {
        self.push_check(rip, flags_live);
        self.store_const(value);
    }

    /// What follows the check of a push of a constant.
    fn store_const(&mut self, value: u64) {
        let (n, w) = (self.slot() as i32, self.code64);
        let small = if w {
            i32::try_from(value as i64).ok()
        } else {
            Some(value as u32 as i32)
        };
        if let Some(v) = small {
            self.t.e.store_mem_imm(Self::OPERAND, v, w);
        } else {
            self.t.e.lea(T1, Self::OPERAND, true);
            self.t.e.mov_imm(T0, value);
            self.t.e.store_mem(
                Address {
                    base: Some(T1),
                    ..Address::default()
                },
                T0,
                w,
            );
        }
        self.move_sp(-n);
    }

    /// Pushes what is in a frame slot.
    pub(super) fn push_frame(&mut self, rip: u64, at: usize, flags_live: bool) {
        let (n, w) = (self.slot() as i32, self.code64);
        self.push_check(rip, flags_live);
        self.t.e.lea(T1, Self::OPERAND, true);
        self.t.e.load(T0, at);
        self.t.e.store_mem(
            Address {
                base: Some(T1),
                ..Address::default()
            },
            T0,
            w,
        );
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
                            self.push_check(i.ip(), live);
                            self.t.e.store_mem(Self::OPERAND, h, w);
                            self.move_sp(-n);
                        }
                        None => self.push_frame(i.ip(), gpr(g), live),
                    }
                }
                OpKind::Memory => {
                    self.check(i, n as usize, false, live);
                    self.t.e.load_mem(T0, Self::OPERAND, w);
                    self.t.e.store(layout::VALUE, T0);
                    self.push_frame(i.ip(), layout::VALUE, live);
                }
                _ => self.push_const(i.ip(), i.immediate(0), live),
            },
            Mnemonic::Pop => {
                let g = gpr_of(i.op0_register()).map_or(0, |(g, _)| g);
                self.pop_check(i.ip(), HOST_SP, live);
                match host_reg(g) {
                    Some(h) => {
                        self.t.e.load_mem(h, Self::OPERAND, w);
                        if g != SP {
                            self.move_sp(n);
                        }
                    }
                    None => {
                        self.t.e.load_mem(T0, Self::OPERAND, w);
                        self.t.e.store(gpr(g), T0);
                        self.move_sp(n);
                    }
                }
            }
            _ => {
                // LEAVE: RSP = RBP + slot, RBP = [RBP].
                self.pop_check(i.ip(), 5, live);
                self.t.e.load_mem(T0, Self::OPERAND, w);
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
                self.push_const(i.ip(), next, true);
                let t = self.wrap_ip(i.near_branch_target());
                self.direct_exit(t);
            }
            FlowControl::IndirectCall => {
                self.load_target(i);
                let (n, w) = (self.slot(), self.code64);
                self.check_with(i.ip(), n, true, true, |f| {
                    if w {
                        f.target_check(i.ip());
                    }
                    f.slot_below();
                });
                self.store_const(next);
                self.t.e.load(T0, layout::TARGET);
                self.indirect_exit();
            }
            FlowControl::IndirectBranch => {
                self.load_target(i);
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
                self.pop_check(i.ip(), HOST_SP, true);
                self.t.e.load_mem(T0, Self::OPERAND, self.code64);
                self.move_sp(n + extra);
                self.note_branch();
                self.indirect_exit();
            }
        }
    }

    /// The operand of an indirect branch, to `FrameArea::target`.
    pub(super) fn load_target(&mut self, i: &Instruction) {
        let w = self.code64;
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
            self.check(i, self.slot(), false, true);
            self.t.e.load_mem(T0, Self::OPERAND, w);
            self.t.e.store(layout::TARGET, T0);
        }
    }

    /// Notes which JMP or RET leaves the block: no block is at a non-canonical target, so such a
    /// target ends in a look-up, which raises #GP at the branch that is noted (`undo_branch`).
    fn note_branch(&mut self) {
        if self.code64 {
            let at = self.t.e.address() as u32;
            self.t.e.store_imm32(layout::BRANCH, at);
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
        let exit = self.t.exits.len();
        self.t.exits.push((
            Exit {
                target,
                patch_at: 0,
                stub_at: 0,
                linked: None,
                owner: 0,
            },
            at,
            0,
        ));
        self.t.cold.push(Cold::ExitStub { at, exit });
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
