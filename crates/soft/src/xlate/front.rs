//! The front end: decodes a guest block, decides per instruction, emits host code.
//!
//! # Registers
//!
//! Guest and host registers have the same number, except: guest RSP lives in host R15; guest R10,
//! R11 and R15 live in the frame, because host RSP holds the frame and host R10/R11 are scratch.
//! R10, R11 and R15 are nobody's implicit operand and the least used ones.
//!
//! # Flags
//!
//! The host's arithmetic flags are the guest's. DF, IF and the rest are only in `CpuState`. A
//! memory check clobbers the flags; where liveness says that they are still needed they are saved
//! around the check. Flags that no later instruction of the block reads before writing count as
//! dead; if an instruction faults meanwhile, the dead flags in the exception's image may differ
//! from hardware, unless `SoftOptions::precise_flags` is on.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use super::cache::{Block, BlockKey, Exit};
use super::emit::{Address, Emitter, Label, T0, T1};
use super::layout::{self, gpr, reason};
use super::mode;
use crate::frame::TLB_BITS;
use crate::vm::SoftOptions;

const ARITH: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;
const SP: usize = 4;
const HOST_SP: u8 = 15;

/// What the host CPU offers the emitter.
#[derive(Clone, Copy, Debug)]
pub struct HostFeatures {
    /// PEXT is there and fast.
    pub bmi2: bool,
}

/// What a translation produced.
pub struct Translated {
    pub code: Vec<u8>,
    pub block: Block,
    pub exits: Vec<Exit>,
}

enum Cold {
    Slow {
        at: Label,
        retry: Label,
        tags: usize,
        desc: u32,
        rip: u64,
    },
    Poll {
        at: Label,
        rip: u64,
    },
    Miss {
        at: Label,
    },
    FpuLoad {
        at: Label,
        back: Label,
    },
    ExitStub {
        at: Label,
        exit: usize,
    },
    JumpFar {
        at: Label,
        target: u64,
    },
}

/// One instruction's place in the block.
struct Decoded {
    i: Instruction,
    /// Arithmetic flags that are live before it.
    live: u32,
}

pub struct Front<'a> {
    e: Emitter,
    key: BlockKey,
    options: &'a SoftOptions,
    host: HostFeatures,
    info: InstructionInfoFactory,
    cold: Vec<Cold>,
    exits: Vec<(Exit, Label, usize)>,
    first_exit: u32,
    fpu_ready: bool,
    code64: bool,
    view: usize,
}

/// Host register for a guest register that lives in one.
fn host_reg(g: usize) -> Option<u8> {
    match g {
        SP => Some(HOST_SP),
        10 | 11 | 15 => None,
        _ => Some(g as u8),
    }
}

/// Number and size in bytes of a general-purpose register; `None` for others and AH-BH.
fn gpr_of(r: Register) -> Option<(usize, usize)> {
    if r.is_gpr8() {
        let n = r as usize - Register::AL as usize;
        // AL CL DL BL, AH CH DH BH, SPL BPL SIL DIL, R8L …
        return match n {
            0..=3 => Some((n, 1)),
            4..=7 => None,
            _ => Some((n - 4, 1)),
        };
    }
    if r.is_gpr() {
        return Some((r.number(), r.size()));
    }
    None
}

/// The iced register for a number and size.
fn reg_named(n: u8, size: usize) -> Register {
    let base = match size {
        1 if n < 4 => return Register::AL + u32::from(n),
        1 => return Register::SPL + u32::from(n - 4),
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + u32::from(n)
}

impl<'a> Front<'a> {
    /// Translates the block at `bytes` (from the block's first byte to the end of its page), which
    /// will execute at `base`. `first_exit` is the index its first exit will get.
    pub fn translate(
        bytes: &[u8],
        key: BlockKey,
        base: u64,
        first_exit: u32,
        force_poll: bool,
        allows: &dyn Fn(&Instruction) -> bool,
        options: &'a SoftOptions,
        host: HostFeatures,
    ) -> Translated {
        let code64 = key.mode & mode::CODE64 != 0;
        let mut f = Front {
            e: Emitter::new(base),
            key,
            options,
            host,
            info: InstructionInfoFactory::new(),
            cold: Vec::new(),
            exits: Vec::new(),
            first_exit,
            fpu_ready: false,
            code64,
            view: (key.mode & mode::VIEW) as usize,
        };
        let list = f.decode(bytes, allows);
        let (entry, checked, polls) = f.prologue(&list, force_poll);
        let mut map = Vec::with_capacity(list.len());
        let mut ended = false;
        let mut next_rip = key.rip;
        for d in &list {
            map.push((f.e.len() as u32, (d.i.ip() - key.rip) as u16));
            next_rip = f.wrap_ip(d.i.next_ip());
            if f.one(d) {
                ended = true;
                break;
            }
        }
        if list.is_empty() {
            // The first instruction reaches into the next page or does not decode.
            map.push((f.e.len() as u32, 0));
            f.interpret_at(key.rip);
        } else if !ended {
            f.direct_exit(next_rip);
        }
        f.emit_cold();
        let mut refused = |d: &Decoded| d.i.code() == Code::INVALID || f.refuses(&d.i);
        let first = list.first().is_none_or(refused);
        f.finish(
            list.len() as u32,
            next_rip,
            map,
            entry,
            checked,
            polls,
            first,
        )
    }

    fn finish(
        self,
        insns: u32,
        next_rip: u64,
        map: Vec<(u32, u16)>,
        entry: Label,
        checked: Label,
        polls: bool,
        interpret_first: bool,
    ) -> Translated {
        let exits = self
            .exits
            .iter()
            .map(|(x, stub, at)| Exit {
                patch_at: *at as u32,
                stub_at: self.e.offset_of(*stub) as u32,
                ..x.clone()
            })
            .collect();
        let block = Block {
            key: self.key,
            entry: self.e.offset_of(entry) as u32,
            checked_entry: self.e.offset_of(checked) as u32,
            start: 0,
            end: self.e.len() as u32,
            guest_len: next_rip.wrapping_sub(self.key.rip).clamp(1, 4096) as u32,
            insns: insns.max(1),
            map,
            incoming: Vec::new(),
            interpret_first,
            polls,
            dead: false,
        };
        Translated {
            code: self.e.finish(),
            block,
            exits,
        }
    }

    fn wrap_ip(&self, ip: u64) -> u64 {
        if self.code64 { ip } else { ip & 0xffff_ffff }
    }

    /// Decodes up to the first instruction that ends the block, then computes flag liveness.
    fn decode(&mut self, bytes: &[u8], allows: &dyn Fn(&Instruction) -> bool) -> Vec<Decoded> {
        let bits = if self.code64 { 64 } else { 32 };
        let mut dec = Decoder::with_ip(bits, bytes, self.key.rip, DecoderOptions::NONE);
        let mut list = Vec::new();
        while list.len() < self.options.block_insns_max && dec.can_decode() {
            let i = dec.decode();
            if i.is_invalid() {
                // Undefined, or cut off by the end of the page: the interpreter knows.
                break;
            }
            let ends = i.flow_control() != FlowControl::Next || !allows(&i) || self.refuses(&i);
            list.push(Decoded { i, live: 0 });
            if ends {
                break;
            }
        }
        let mut live = ARITH;
        for d in list.iter_mut().rev() {
            let i = &d.i;
            if !allows(i) || self.refuses(i) {
                live = ARITH;
            } else {
                let kills = if may_keep_flags(i) {
                    0
                } else {
                    i.rflags_modified() & ARITH
                };
                live = (live & !kills) | (i.rflags_read() & ARITH);
            }
            d.live = if self.options.precise_flags {
                ARITH
            } else {
                live
            };
            if !allows(i) {
                // Marked for the interpreter by an impossible code.
                d.i.set_code(Code::INVALID);
            }
        }
        list
    }

    /// True for instructions that this translator leaves to the interpreter.
    fn refuses(&mut self, i: &Instruction) -> bool {
        let m = i.mnemonic();
        if i.code() == Code::INVALID || i.is_privileged() || i.is_string_instruction() {
            return true;
        }
        if matches!(
            i.flow_control(),
            FlowControl::ConditionalBranch
                | FlowControl::UnconditionalBranch
                | FlowControl::IndirectBranch
                | FlowControl::Call
                | FlowControl::IndirectCall
                | FlowControl::Return
        ) {
            return !self.branch_supported(i);
        }
        if i.flow_control() != FlowControl::Next {
            return true;
        }
        if stack_op(i, self.code64) {
            return i.op0_kind() == OpKind::Memory && !self.plain_memory(i);
        }
        if crate::sys::handles(m) || i.is_stack_instruction() || !self.fpu_enabled(i) {
            return true;
        }
        if matches!(
            m,
            Mnemonic::Xlatb
                | Mnemonic::Cld
                | Mnemonic::Std
                | Mnemonic::Fldenv
                | Mnemonic::Fnstenv
                | Mnemonic::Fstenv
                | Mnemonic::Fnsave
                | Mnemonic::Fsave
                | Mnemonic::Frstor
                | Mnemonic::Maskmovq
                | Mnemonic::Maskmovdqu
                | Mnemonic::Vmaskmovdqu
                | Mnemonic::Clflush
                | Mnemonic::Clflushopt
                | Mnemonic::Clwb
                | Mnemonic::Clzero
                | Mnemonic::Ldmxcsr
                | Mnemonic::Vldmxcsr
                | Mnemonic::Salc
        ) {
            return true;
        }
        for n in 0..i.op_count() {
            if i.op_kind(n) == OpKind::Register {
                let r = i.op_register(n);
                if r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr() {
                    return true;
                }
            }
        }
        let explicit = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if !explicit {
            // Implicit memory operands (pushes, strings) are not plain computation.
            return !self.info.info(i).used_memory().is_empty();
        }
        let bit_string = matches!(
            m,
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        ) && i.op0_kind() == OpKind::Memory
            && i.op1_kind() == OpKind::Register;
        if bit_string || i.is_vsib() || !self.plain_memory(i) {
            return true;
        }
        let mem = self.info.info(i).used_memory().to_vec();
        match mem.as_slice() {
            [] => m != Mnemonic::Lea && !is_hint(m),
            [one] => {
                one.access() != OpAccess::NoMemAccess
                    && !matches!(i.memory_size().size(), 1 | 2 | 4 | 8 | 10 | 16 | 32 | 64)
            }
            _ => true,
        }
    }

    /// The memory operand can be addressed: known base sizes, segments whose base is 0 or is read
    /// from the frame.
    fn plain_memory(&self, i: &Instruction) -> bool {
        let part = |r: Register| r == Register::None || r.is_gpr32() || r.is_gpr64() || r.is_ip();
        if !part(i.memory_base()) || !part(i.memory_index()) {
            return false;
        }
        match i.memory_segment() {
            Register::FS => self.code64 || self.key.mode & mode::FS_FLAT != 0,
            Register::GS => self.code64 || self.key.mode & mode::GS_FLAT != 0,
            _ => true,
        }
    }

    fn branch_supported(&self, i: &Instruction) -> bool {
        let near = match i.op0_kind() {
            OpKind::NearBranch16 => return false,
            OpKind::NearBranch32 => !self.code64,
            OpKind::NearBranch64 => self.code64,
            _ => false,
        };
        match i.code() {
            Code::Retnq | Code::Retnq_imm16 => true,
            Code::Retnd | Code::Retnd_imm16 => !self.code64,
            Code::Call_rm64 | Code::Jmp_rm64 | Code::Call_rm32 | Code::Jmp_rm32 => {
                i.op0_kind() == OpKind::Register || self.plain_memory(i)
            }
            _ if i.is_jcc_short_or_near() || i.is_jmp_short_or_near() || i.is_call_near() => near,
            _ => false,
        }
    }

    /// The units the instruction needs are switched on in this mode (else it raises #NM or #UD).
    fn fpu_enabled(&self, i: &Instruction) -> bool {
        use iced_x86::EncodingKind as K;
        let m = self.key.mode;
        match i.encoding() {
            K::VEX if uses_mask(i) => m & mode::AVX512 != 0,
            K::VEX if uses_vector(i) => m & mode::AVX != 0,
            K::VEX => true,
            K::EVEX => m & mode::AVX512 != 0,
            K::Legacy | K::D3NOW => match fpu_kind(i) {
                Fpu::None => true,
                Fpu::X87 => m & mode::X87 != 0,
                Fpu::Sse => m & mode::SSE != 0,
            },
            _ => false,
        }
    }

    /// Entry points. The checked entry proves that R10 is this block's RIP; the plain entry may
    /// poll the exit request.
    fn prologue(&mut self, list: &[Decoded], force_poll: bool) -> (Label, Label, bool) {
        let live = list.first().is_none_or(|d| d.live != 0);
        let rip = self.key.rip;
        let checked = self.e.here();
        if live {
            // Flag-free: RCX = (R10 - RIP) + exit request, zero if all is well.
            self.e.store(layout::SAVE_RCX, 1);
            self.e.mov_imm(1, rip.wrapping_neg());
            self.e.lea(
                1,
                Address {
                    base: Some(1),
                    index: Some((T0, 0)),
                    disp: 0,
                },
                true,
            );
            self.e.load32(T1, layout::EXIT_REQUEST);
            self.e.lea(
                1,
                Address {
                    base: Some(1),
                    index: Some((T1, 0)),
                    disp: 0,
                },
                true,
            );
            self.e.jrcxz_over(|e| {
                e.load(1, layout::SAVE_RCX);
                e.jmp_frame(layout::STUB_MISS);
            });
            self.e.load(1, layout::SAVE_RCX);
        } else {
            match i32::try_from(rip as i64) {
                Ok(v) => self.e.cmp_imm(T0, v),
                Err(_) => {
                    self.e.mov_imm(T1, rip);
                    self.e.cmp(T0, T1);
                }
            }
            let at = self.e.label();
            self.e.jcc(5, at);
            self.cold.push(Cold::Miss { at });
        }
        let entry = self.e.here();
        let at = self.e.label();
        if !live {
            self.e.cmp_frame32_zero(layout::EXIT_REQUEST);
            self.e.jcc(5, at);
            self.cold.push(Cold::Poll { at, rip });
        } else if force_poll {
            self.e.store(layout::SAVE_RCX, 1);
            self.e.load32(1, layout::EXIT_REQUEST);
            self.e.jrcxz_over(|e| {
                e.load(1, layout::SAVE_RCX);
                e.jmp(at);
            });
            self.e.load(1, layout::SAVE_RCX);
            self.cold.push(Cold::Poll { at, rip });
        }
        (entry, checked, !live || force_poll)
    }

    /// Emits one instruction. True if it ended the block.
    fn one(&mut self, d: &Decoded) -> bool {
        let i = &d.i;
        if i.code() == Code::INVALID || self.refuses(i) {
            self.interpret_at(i.ip());
            return true;
        }
        if i.flow_control() != FlowControl::Next {
            self.branch(d);
            return true;
        }
        if stack_op(i, self.code64) {
            self.stack(d);
            return false;
        }
        if is_hint(i.mnemonic()) && i.mnemonic() != Mnemonic::Pause {
            return false;
        }
        if fpu_kind(i) != Fpu::None || uses_vector(i) {
            self.need_fpu(d.live != 0);
        }
        if self.copy(d) {
            return false;
        }
        self.interpret_at(i.ip());
        true
    }

    /// Leaves for the interpreter at `rip`.
    fn interpret_at(&mut self, rip: u64) {
        self.e.store_imm64(layout::RIP, rip, T0);
        self.e.store_imm32(layout::REASON, reason::INTERPRET);
        self.e.jmp_frame(layout::STUB_EXIT);
    }

    /// Makes sure that the guest's vector state is in the host's registers.
    fn need_fpu(&mut self, flags_live: bool) {
        if std::mem::replace(&mut self.fpu_ready, true) {
            return;
        }
        if flags_live {
            self.e.store(layout::SAVE_RCX, 1);
            self.e.load32(1, layout::FPU_LIVE);
            self.e.unless_rcxz(|e| e.call_frame(layout::STUB_FPU));
            self.e.load(1, layout::SAVE_RCX);
        } else {
            let (at, back) = (self.e.label(), self.e.label());
            self.e.cmp_frame32_zero(layout::FPU_LIVE);
            self.e.jcc(4, at);
            self.e.bind(back);
            self.cold.push(Cold::FpuLoad { at, back });
        }
    }

    /// Copies an instruction with registers renamed and its memory operand replaced. False if it
    /// has to be left to the interpreter; nothing was emitted then that matters.
    fn copy(&mut self, d: &Decoded) -> bool {
        let mut i = d.i;
        normalise(&mut i);
        let m = i.mnemonic();
        let mem_op = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
        // Spilled registers among the explicit operands, with what happens to them.
        let mut spilled: Vec<(usize, bool)> = Vec::new();
        {
            let info = self.info.info(&i);
            for n in 0..i.op_count() {
                if i.op_kind(n) != OpKind::Register {
                    continue;
                }
                let Some((g, _)) = gpr_of(i.op_register(n)) else {
                    continue;
                };
                if host_reg(g).is_none() {
                    let written = !matches!(info.op_access(n), OpAccess::Read | OpAccess::CondRead);
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
            let (size, write) = {
                let info = self.info.info(&i);
                let Some(u) = info.used_memory().first() else {
                    return false;
                };
                let write = !matches!(u.access(), OpAccess::Read | OpAccess::CondRead);
                (i.memory_size().size(), write)
            };
            // Try the encoding first, so that a refusal leaves nothing behind.
            let mut probe = i;
            self.set_memory(&mut probe, op, !spilled.is_empty());
            rewrite(&mut probe, &spilled, T0);
            if !Emitter::new(0).insn(&probe) {
                return false;
            }
            self.check(&d.i, size, write, d.live != 0);
            if let Some(&(g, _)) = spilled.first() {
                self.e.lea(
                    T1,
                    Address {
                        base: Some(T1),
                        index: Some((T0, 0)),
                        disp: 0,
                    },
                    true,
                );
                self.e.load(T0, gpr(g));
            }
            self.e.insn(&probe);
            if let Some(&(g, true)) = spilled.first() {
                self.e.store(gpr(g), T0);
            }
            return true;
        }
        let mut probe = i;
        rewrite(&mut probe, &spilled, T0);
        if !Emitter::new(0).insn(&probe) {
            return false;
        }
        for (n, &(g, _)) in spilled.iter().enumerate() {
            self.e.load(if n == 0 { T0 } else { T1 }, gpr(g));
        }
        self.e.insn(&probe);
        for (n, &(g, written)) in spilled.iter().enumerate() {
            if written {
                self.e.store(gpr(g), if n == 0 { T0 } else { T1 });
            }
        }
        true
    }

    /// Replaces the memory operand by `[T1 + T0]`, or `[T1]` if T0 is needed.
    fn set_memory(&self, i: &mut Instruction, op: u32, t0_taken: bool) {
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

    fn lea(&mut self, i: &Instruction, spilled: &[(usize, bool)]) -> bool {
        let Some((g, size)) = gpr_of(i.op_register(0)) else {
            return false;
        };
        if size == 2 {
            return false;
        }
        let _ = spilled;
        self.address_into(T0, i, false);
        match (host_reg(g), size) {
            (Some(h), 8) => self.e.mov(h, T0, true),
            (Some(h), _) => self.e.mov(h, T0, false),
            (None, 8) => self.e.store(gpr(g), T0),
            (None, _) => {
                self.e.mov(T0, T0, false);
                self.e.store(gpr(g), T0);
            }
        }
        true
    }

    /// Computes an instruction's effective (with segment base: linear) address into `dst`.
    /// Keeps flags; uses T0 and T1.
    fn address_into(&mut self, dst: u8, i: &Instruction, with_segment: bool) {
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
            self.e.mov_imm(dst, addr);
        } else {
            let mut a = Address {
                disp: disp as u32 as i32,
                ..Address::default()
            };
            if let Some((g, _)) = gpr_of(base) {
                a.base = Some(match host_reg(g) {
                    Some(h) => h,
                    None => {
                        self.e.load(T0, gpr(g));
                        T0
                    }
                });
            }
            if let Some((g, _)) = gpr_of(index) {
                let h = match host_reg(g) {
                    Some(h) => h,
                    None => {
                        self.e.load(T1, gpr(g));
                        T1
                    }
                };
                a.index = Some((h, i.memory_index_scale().trailing_zeros() as u8));
            }
            self.e.lea(dst, a, asz64);
        }
        let seg = match i.memory_segment() {
            Register::FS => Some(pyrite_x86::sreg::FS),
            Register::GS => Some(pyrite_x86::sreg::GS),
            _ => None,
        };
        if with_segment && let Some(s) = seg {
            self.e.load(T1, layout::seg_base(s));
            let a = Address {
                base: Some(dst),
                index: Some((T1, 0)),
                disp: 0,
            };
            self.e.lea(dst, a, self.code64);
        }
    }

    /// Soft-TLB check of the instruction's memory operand. Afterwards `[T1 + T0]` is the operand.
    fn check(&mut self, i: &Instruction, size: usize, write: bool, flags_live: bool) {
        let i = *i;
        self.check_with(i.ip(), size, write, flags_live, |f| {
            f.address_into(T0, &i, true)
        });
    }

    fn check_with(
        &mut self,
        rip: u64,
        size: usize,
        write: bool,
        flags_live: bool,
        address: impl FnOnce(&mut Self),
    ) {
        if flags_live {
            self.e.save_flags();
        }
        let retry = self.e.here();
        address(self);
        if self.host.bmi2 {
            self.e.pext_frame(T1, T0, layout::TLB_MASK);
        } else {
            self.e.mov(T1, T0, false);
            self.e.shr32(T1, 12);
            self.e.and32(T1, (1 << TLB_BITS) - 1);
        }
        let tags = if write {
            layout::tlb_write(self.view)
        } else {
            layout::tlb_read(self.view)
        };
        self.e.table_op(0x33, T0, tags);
        self.e.cmp_imm(T0, 4096 - size as i32);
        let at = self.e.label();
        self.e.jcc(7, at);
        self.e.table_op(0x8b, T1, layout::tlb_host(self.view));
        if flags_live {
            self.e.restore_flags();
        }
        let mut desc = size as u32 | u32::from(write) << 8 | (self.view as u32) << 16;
        if flags_live {
            desc |= super::stubs::DESC_FLAGS_SAVED;
        }
        self.cold.push(Cold::Slow {
            at,
            retry,
            tags,
            desc,
            rip,
        });
    }

    /// Size in bytes of a stack slot.
    fn slot(&self) -> usize {
        if self.code64 { 8 } else { 4 }
    }

    /// Checks the slot below the stack pointer for writing: `[T1 + T0]`.
    fn push_check(&mut self, rip: u64, flags_live: bool) {
        let n = self.slot();
        let w = self.code64;
        self.check_with(rip, n, true, flags_live, |f| {
            let a = Address {
                base: Some(HOST_SP),
                index: None,
                disp: -(n as i32),
            };
            f.e.lea(T0, a, w);
        });
    }

    /// Checks the slot at the stack pointer for reading.
    fn pop_check(&mut self, rip: u64, base: u8, flags_live: bool) {
        let (n, w) = (self.slot(), self.code64);
        self.check_with(rip, n, false, flags_live, |f| f.e.mov(T0, base, w));
    }

    fn move_sp(&mut self, by: i32) {
        let a = Address {
            base: Some(HOST_SP),
            index: None,
            disp: by,
        };
        self.e.lea(HOST_SP, a, self.code64);
    }

    const OPERAND: Address = Address {
        base: Some(T1),
        index: Some((T0, 0)),
        disp: 0,
    };

    fn push_const(&mut self, rip: u64, value: u64, flags_live: bool) {
        let (n, w) = (self.slot() as i32, self.code64);
        self.push_check(rip, flags_live);
        let small = if w {
            i32::try_from(value as i64).ok()
        } else {
            Some(value as u32 as i32)
        };
        if let Some(v) = small {
            self.e.store_mem_imm(Self::OPERAND, v, w);
        } else {
            self.e.lea(T1, Self::OPERAND, true);
            self.e.mov_imm(T0, value);
            self.e.store_mem(
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
    fn push_frame(&mut self, rip: u64, at: usize, flags_live: bool) {
        let (n, w) = (self.slot() as i32, self.code64);
        self.push_check(rip, flags_live);
        self.e.lea(T1, Self::OPERAND, true);
        self.e.load(T0, at);
        self.e.store_mem(
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
    fn stack(&mut self, d: &Decoded) {
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
                            self.e.store_mem(Self::OPERAND, h, w);
                            self.move_sp(-n);
                        }
                        None => self.push_frame(i.ip(), gpr(g), live),
                    }
                }
                OpKind::Memory => {
                    self.check(i, n as usize, false, live);
                    self.e.load_mem(T0, Self::OPERAND, w);
                    self.e.store(layout::VALUE, T0);
                    self.push_frame(i.ip(), layout::VALUE, live);
                }
                _ => self.push_const(i.ip(), i.immediate(0), live),
            },
            Mnemonic::Pop => {
                let g = gpr_of(i.op0_register()).map_or(0, |(g, _)| g);
                self.pop_check(i.ip(), HOST_SP, live);
                match host_reg(g) {
                    Some(h) => {
                        self.e.load_mem(h, Self::OPERAND, w);
                        if g != SP {
                            self.move_sp(n);
                        }
                    }
                    None => {
                        self.e.load_mem(T0, Self::OPERAND, w);
                        self.e.store(gpr(g), T0);
                        self.move_sp(n);
                    }
                }
            }
            _ => {
                // LEAVE: RSP = RBP + slot, RBP = [RBP].
                self.pop_check(i.ip(), 5, live);
                self.e.load_mem(T0, Self::OPERAND, w);
                self.e.lea(
                    HOST_SP,
                    Address {
                        base: Some(5),
                        index: None,
                        disp: n,
                    },
                    w,
                );
                self.e.mov(5, T0, w);
            }
        }
    }

    fn branch(&mut self, d: &Decoded) {
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
                self.push_const(i.ip(), next, true);
                self.e.load(T0, layout::TARGET);
                self.indirect_exit();
            }
            FlowControl::IndirectBranch => {
                self.load_target(i);
                self.e.load(T0, layout::TARGET);
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
                self.e.load_mem(T0, Self::OPERAND, self.code64);
                self.move_sp(n + extra);
                self.indirect_exit();
            }
        }
    }

    /// The operand of an indirect branch, to `FrameArea::target`.
    fn load_target(&mut self, i: &Instruction) {
        let w = self.code64;
        if i.op0_kind() == OpKind::Register {
            let g = gpr_of(i.op0_register()).map_or(0, |(g, _)| g);
            match host_reg(g) {
                Some(h) => self.e.store(layout::TARGET, h),
                None => {
                    self.e.load(T0, gpr(g));
                    self.e.store(layout::TARGET, T0);
                }
            }
        } else {
            self.check(i, self.slot(), false, true);
            self.e.load_mem(T0, Self::OPERAND, w);
            self.e.store(layout::TARGET, T0);
        }
    }

    /// Goes on at the guest RIP in T0, through the jump cache.
    fn indirect_exit(&mut self) {
        if self.host.bmi2 {
            self.e.pext_frame(T1, T0, layout::JC_MASK_AT);
        } else {
            // The flags must survive: they may be live in the target.
            self.e.save_flags();
            self.e.mov(T1, T0, false);
            self.e.and32(T1, layout::JC_MASK as u32);
            self.e.restore_flags();
        }
        self.e.jmp_table(layout::jump_cache(self.view));
    }

    /// True if a direct link to `target` stays right as long as this block is reachable: it is in
    /// the same page of the same mapping.
    fn linkable(&self, target: u64) -> bool {
        self.options.link && (target ^ self.key.rip) >> 12 == 0
    }

    fn far_jump(&mut self, target: u64) {
        self.e.mov_imm(T0, target);
        let slot = (target & layout::JC_MASK) as usize;
        self.e.jmp_frame(layout::jump_cache(self.view) + 8 * slot);
    }

    /// Ends the block by going on at `target`.
    fn direct_exit(&mut self, target: u64) {
        if self.linkable(target) {
            let stub = self.new_exit(target);
            self.e.jmp(stub);
            self.note_patch();
        } else {
            self.far_jump(target);
        }
    }

    fn conditional_exit(&mut self, cc: u8, target: u64) {
        if self.linkable(target) {
            let stub = self.new_exit(target);
            self.e.jcc(cc, stub);
            self.note_patch();
        } else {
            let at = self.e.label();
            self.e.jcc(cc, at);
            self.cold.push(Cold::JumpFar { at, target });
        }
    }

    fn new_exit(&mut self, target: u64) -> Label {
        let at = self.e.label();
        let exit = self.exits.len();
        self.exits.push((
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
        self.cold.push(Cold::ExitStub { at, exit });
        at
    }

    /// Remembers the rel32 just emitted as the last exit's patch place.
    fn note_patch(&mut self) {
        let at = self.e.len() - 4;
        if let Some(x) = self.exits.last_mut() {
            x.2 = at;
        }
    }

    fn emit_cold(&mut self) {
        for c in std::mem::take(&mut self.cold) {
            match c {
                Cold::Slow {
                    at,
                    retry,
                    tags,
                    desc,
                    rip,
                } => {
                    self.e.bind(at);
                    self.e.table_op(0x33, T0, tags); // T0 = linear address again
                    self.e.store_imm64(layout::RIP, rip, T1);
                    self.e.mov_imm(T1, u64::from(desc));
                    self.e.call_frame(layout::STUB_SLOW);
                    self.e.jmp(retry);
                }
                Cold::Poll { at, rip } => {
                    self.e.bind(at);
                    self.e.store_imm64(layout::RIP, rip, T0);
                    self.e.store_imm32(layout::REASON, reason::POLL);
                    self.e.jmp_frame(layout::STUB_EXIT);
                }
                Cold::Miss { at } => {
                    self.e.bind(at);
                    self.e.jmp_frame(layout::STUB_MISS);
                }
                Cold::FpuLoad { at, back } => {
                    self.e.bind(at);
                    self.e.call_frame(layout::STUB_FPU);
                    self.e.jmp(back);
                }
                Cold::ExitStub { at, exit } => {
                    self.e.bind(at);
                    let target = self.exits[exit].0.target;
                    self.e.store_imm64(layout::RIP, target, T0);
                    self.e.store_imm32(layout::REASON, reason::LINK);
                    self.e
                        .store_imm32(layout::LINK, self.first_exit + exit as u32);
                    self.e.jmp_frame(layout::STUB_EXIT);
                }
                Cold::JumpFar { at, target } => {
                    self.e.bind(at);
                    self.far_jump(target);
                }
            }
        }
    }
}

/// Condition code of a Jcc.
fn condition(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// PUSH, POP and LEAVE forms that the translator does itself, for the mode's slot size.
fn stack_op(i: &Instruction, code64: bool) -> bool {
    match i.code() {
        Code::Push_r64
        | Code::Pushq_imm8
        | Code::Pushq_imm32
        | Code::Push_rm64
        | Code::Pop_r64
        | Code::Leaveq => code64,
        Code::Push_r32
        | Code::Pushd_imm8
        | Code::Pushd_imm32
        | Code::Push_rm32
        | Code::Pop_r32
        | Code::Leaved => !code64,
        _ => false,
    }
}

/// Instructions without architectural effect.
fn is_hint(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Nop
            | Mnemonic::Pause
            | Mnemonic::Endbr32
            | Mnemonic::Endbr64
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchwt1
            | Mnemonic::Reservednop
    )
}

/// Shifts and rotates leave the flags alone when the masked count is zero.
fn may_keep_flags(i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr => match i.op1_kind() {
            OpKind::Immediate8 => i.immediate8() & 0x1f == 0,
            _ => true,
        },
        Mnemonic::Shld | Mnemonic::Shrd => match i.op2_kind() {
            OpKind::Immediate8 => i.immediate8_2nd() & 0x1f == 0 || i.immediate8() & 0x1f == 0,
            _ => true,
        },
        _ => false,
    }
}

/// Short forms that do not exist in 64-bit code become their long twins.
fn normalise(i: &mut Instruction) {
    let code = match i.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return,
    };
    i.set_code(code);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fpu {
    None,
    X87,
    Sse,
}

fn uses_mask(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_k())
}

fn uses_vector(i: &Instruction) -> bool {
    if matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
        return true;
    }
    (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && {
            let r = i.op_register(n);
            r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k()
        }
    })
}

/// Which unit a legacy-encoded instruction needs.
fn fpu_kind(i: &Instruction) -> Fpu {
    use iced_x86::CpuidFeature as F;
    let vector = (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_vector_register());
    if vector {
        return Fpu::Sse;
    }
    let mm =
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    if mm {
        return Fpu::X87;
    }
    for f in i.cpuid_features() {
        match f {
            F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY | F::MMX => return Fpu::X87,
            F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 => {
                return match i.mnemonic() {
                    // Integer and fence instructions that came with SSE.
                    Mnemonic::Movnti
                    | Mnemonic::Lfence
                    | Mnemonic::Mfence
                    | Mnemonic::Sfence
                    | Mnemonic::Prefetchnta
                    | Mnemonic::Prefetcht0
                    | Mnemonic::Prefetcht1
                    | Mnemonic::Prefetcht2
                    | Mnemonic::Pause => Fpu::None,
                    Mnemonic::Fisttp => Fpu::X87,
                    _ => Fpu::Sse,
                };
            }
            _ => {}
        }
    }
    Fpu::None
}
