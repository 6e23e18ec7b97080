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

mod classify;
mod facts;
mod flags;
mod flow;
mod liveness;
mod operand;
mod runs;
mod system;

use iced_x86::{Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use self::classify::{
    Fpu, condition, ends_block, fpu_kind, goes_on_behind, is_hint, may_keep_flags, reads_selector,
    stack_op, uses_mask, uses_vector,
};
use self::facts::{AllFacts, Memory};
use self::liveness::flags_read;
use super::cache::{Block, BlockKey, Exit, OtherEntries};
use super::code_tlb::PageCheck;
use super::emit::{Address, Depends, Emitter, Label, T0, T1};
use super::layout::{self, reason};
use super::mode;
use crate::interp::is_exchange;
use crate::vm::SoftOptions;

const ARITH: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;
const SP: usize = 4;
/// LIMIT: guest instructions of a block, whatever the options say.
pub const INSNS_MAX: usize = 64;
/// LIMIT: conditional branches behind which a block goes on, whatever the options say.
const BRANCHES_MAX: usize = 7;
/// LIMIT: other parts of the page whose flags' liveness a block depends on.
pub const LOOKED_MAX: usize = 6;
const HOST_SP: u8 = 15;

/// What the host CPU offers the emitter.
#[derive(Clone, Copy, Debug)]
pub struct HostFeatures {
    /// PEXT is there and fast.
    pub bmi2: bool,
    /// How the decoder treats encodings on which vendors differ: that of the guest's CPUID.
    pub decoder: u32,
}

/// What a translation produced.
pub struct Translated<'a> {
    pub code: &'a [u8],
    pub block: Block,
    pub exits: Vec<Exit>,
}

enum Cold {
    Slow {
        at: Label,
        retry: Label,
        done: Label,
        size: usize,
        bits: u8,
    },
    Poll {
        at: Label,
    },
    FpuLoad {
        at: Label,
        back: Label,
    },
    ExitStub {
        at: Label,
    },
    JumpFar {
        at: Label,
        target: u64,
    },
    /// R10 is the RIP of something else; RCX is in R11.
    Lost {
        at: Label,
    },
    /// The page may be mapped to something else by now; at `with_rcx`, RCX is in R11.
    Moved {
        at: Label,
        with_rcx: Option<Label>,
    },
    /// Leave at `rip` so that the run loop takes a waiting interrupt; `shadow`: after STI, one
    /// instruction later.
    Waiting {
        at: Label,
        rip: u64,
        shadow: bool,
    },
    /// A run's check failed: look in the second level, or go on without runs.
    Run {
        at: Label,
        retry: Label,
        span: u32,
        bits: u8,
        exit: usize,
        stub: Label,
    },
    /// Leave for the interpreter at `rip`.
    Interpret {
        at: Label,
        rip: u64,
    },
    /// The same with the flags in `FrameArea::flags`.
    InterpretSaved {
        at: Label,
        rip: u64,
    },
}

/// One instruction's place in the block.
struct Decoded {
    i: Instruction,
    /// Arithmetic flags that are live before it.
    live: u32,
    /// It is left to the interpreter.
    refused: bool,
    /// A conditional branch behind which the block goes on.
    goes_on: bool,
    /// Its stack accesses are in a run, see `runs.rs`.
    stack: bool,
    /// Its operand is in a run of another base, whose distance is in this place.
    run: Option<u8>,
    /// RSP before it, relative to the beginning of its segment.
    sp: i64,
}

/// Buffers that live from block to block.
pub struct Tools {
    e: Emitter,
    facts: AllFacts,
    cold: Vec<Cold>,
    exits: Vec<(Exit, Label, usize)>,
    list: Vec<Decoded>,
}

impl Tools {
    /// Empty buffers.
    pub fn new() -> Tools {
        Tools {
            e: Emitter::new(),
            facts: AllFacts::new(),
            cold: Vec::new(),
            exits: Vec::new(),
            list: Vec::new(),
        }
    }
}

/// The ways into a block.
struct Prologue {
    entry: Label,
    /// What follows the poll.
    past_poll: Label,
    /// The far and the checked entry.
    others: Option<(Label, Label)>,
    polls: bool,
}

/// Where a block that has no other entries than the plain one is to get them.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    /// The block's index.
    pub id: u32,
    /// Its view.
    pub view: usize,
    /// The block's RIP.
    pub rip: u64,
    /// Host address at which they will execute.
    pub base: u64,
    /// Host address of the plain entry.
    pub entry: u64,
    /// The flags are live there.
    pub live: bool,
    /// The checks of the pages.
    pub page: PageCheck,
    /// See `page`.
    pub second: Option<PageCheck>,
}

/// Which block is translated, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub key: BlockKey,
    /// Host address at which it will execute.
    pub base: u64,
    /// Index that its first exit will get.
    pub first_exit: u32,
    /// Index that it will get.
    pub id: u32,
    /// Its entry must poll, whatever the flags.
    pub force_poll: bool,
    /// What proves that its page is mapped as it is now.
    pub page: PageCheck,
    /// It is one instruction that reaches into the next page: the same for that.
    pub second: Option<PageCheck>,
    /// It is wanted by jumps from other pages or through the jump cache. If that turns out later,
    /// [`emit_entries`] makes a way in.
    pub entries: bool,
}

/// The translation of one block.
pub struct Front<'a> {
    t: &'a mut Tools,
    key: BlockKey,
    options: &'a SoftOptions,
    host: HostFeatures,
    fpu_ready: bool,
    /// T1 holds what this place of `Hot::run_delta` does.
    t1_run: Option<u8>,
    /// The flags are live, but in `Hot::flags`.
    flags_saved: bool,
    /// The instruction in hand leaves them there: see [`Front::is_quiet`].
    quiet: bool,
    /// The instruction in hand can do its store in a copy of its operand.
    splittable: bool,
    /// Other parts of the page that the flags' liveness was read from: offset and length.
    looked: [(u16, u16); LOOKED_MAX],
    code64: bool,
    view: usize,
    id: u32,
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

/// What [`emit_checks`] leaves to be bound.
struct Checks {
    far: Label,
    checked: Label,
    lost: Label,
    moved: Label,
    moved_rcx: Option<Label>,
}

/// The checked entry proves that R10 is the block's RIP, and goes on with the far entry, which
/// proves that the mapping is the one that was translated, and goes on with what follows. Every way
/// in from another page polls the exit request: here where the flags are live, else the plain entry
/// does.
fn emit_checks(e: &mut Emitter, rip: u64, pages: [Option<PageCheck>; 2], live: bool) -> Checks {
    let pages = pages.into_iter().flatten();
    let diff = |index: Option<(u8, u8)>, disp: u32| Address {
        base: Some(1),
        index,
        disp: disp as i32,
    };
    // Flag-free even if the flags are dead here: another block's jump may arrive by a
    // collision in the jump cache, and the flags may be live where it really goes.
    let checked = e.here();
    let lost = e.label();
    e.mov(T1, 1, true);
    e.mov_rip(1, rip.wrapping_neg(), Depends::NegRip);
    e.lea(1, diff(Some((T0, 0)), 0), true);
    e.jrcxz_over(|e| e.jmp(lost));
    e.mov(1, T1, true);
    let far = e.here();
    let moved = e.label();
    let mut moved_rcx = None;
    if live {
        let with_rcx = e.label();
        e.mov(T1, 1, true);
        e.load32(T0, layout::EXIT_REQUEST);
        for p in pages {
            e.load_code_slot(1, layout::code_tlb(p.slot));
            e.lea(1, diff(Some((T0, 0)), p.value.wrapping_neg()), false);
            e.jrcxz_over(|e| e.jmp(with_rcx));
        }
        e.mov(1, T1, true);
        moved_rcx = Some(with_rcx);
    } else {
        for p in pages {
            e.cmp_code_slot(layout::code_tlb(p.slot), p.value);
            e.jcc(5, moved);
        }
    }
    Checks {
        far,
        checked,
        lost,
        moved,
        moved_rcx,
    }
}

/// R10 is the RIP of something else; RCX is in R11.
fn emit_lost(e: &mut Emitter, at: Label, view: usize) {
    e.bind(at);
    e.mov(1, T1, true);
    e.jmp_frame(layout::stub_miss(view));
}

/// The page may be mapped to something else by now; at `with_rcx`, RCX is in R11. The block's index
/// stands after the call, which does not return.
fn emit_moved(e: &mut Emitter, at: Label, with_rcx: Option<Label>, id: u32) {
    if let Some(l) = with_rcx {
        e.bind(l);
        e.mov(1, T1, true);
    }
    e.bind(at);
    e.call_frame(layout::STUB_MOVED);
    e.data_dependent(id, Depends::Id);
}

/// Bytes of the call of a stub whose address is in `Hot`.
pub const STUB_CALL_BYTES: u64 = 4;

/// LIMIT: bytes of what [`emit_entries`] emits.
pub const ENTRIES_BYTES_MAX: usize = 256;

/// The far and the checked entry of a block that was translated without them: the code, and where
/// they are in it.
pub fn emit_entries(tools: &mut Tools, x: Entries) -> (&[u8], OtherEntries) {
    let e = &mut tools.e;
    e.restart(x.base);
    let c = emit_checks(e, x.rip, [Some(x.page), x.second], x.live);
    e.jmp_to(x.entry);
    emit_moved(e, c.moved, c.moved_rcx, x.id);
    emit_lost(e, c.lost, x.view);
    let others = OtherEntries {
        far: e.offset_of(c.far) as u32,
        checked: e.offset_of(c.checked) as u32,
    };
    (e.finish(), others)
}

/// A copy, for host address `at`, of the part of an instruction that follows its check, which then has
/// its operand brought home and goes on at `next`.
pub fn emit_split<'t>(tools: &'t mut Tools, at: u64, code: &[u8], next: u64) -> &'t [u8] {
    let e = &mut tools.e;
    e.restart(at);
    e.data(code);
    e.call_frame(layout::STUB_SPLIT_DONE);
    e.jmp_to(next);
    e.finish()
}

impl<'a> Front<'a> {
    /// Translates the block at `bytes` (from the block's first byte, within its page). `page_bytes`:
    /// the whole page, or nothing.
    pub fn translate(
        tools: &'a mut Tools,
        bytes: &[u8],
        page_bytes: &[u8],
        place: Place,
        allows: &dyn Fn(&Instruction) -> bool,
        options: &'a SoftOptions,
        host: HostFeatures,
    ) -> Translated<'a> {
        let Place {
            key,
            base,
            first_exit,
            page,
            second,
            ..
        } = place;
        tools.e.restart(base);
        tools.cold.clear();
        tools.exits.clear();
        let mut f = Front {
            t: tools,
            key,
            options,
            host,
            fpu_ready: false,
            t1_run: None,
            flags_saved: false,
            quiet: false,
            splittable: false,
            looked: [(0, 0); LOOKED_MAX],
            code64: key.mode & mode::CODE64 != 0,
            view: (key.mode & mode::VIEW) as usize,
            id: place.id,
        };
        let mut list = std::mem::take(&mut f.t.list);
        let most = if second.is_some() {
            1
        } else {
            options.block_insns_max
        };
        f.decode(bytes, allows, most, page_bytes, &mut list);
        let Prologue {
            entry,
            past_poll,
            others,
            polls,
        } = f.prologue(&list, &place);
        let mut map = Vec::with_capacity(list.len().max(1));
        let checks = f.plan_runs(&mut list);
        let mut checks = checks.into_iter().peekable();
        let mut ended = false;
        let mut next_rip = key.rip;
        for (n, d) in list.iter().enumerate() {
            map.push((f.t.e.len() as u32, (d.i.ip() - key.rip) as u16));
            while let Some(c) = checks.next_if(|c| c.before == n) {
                f.run_check(c, d);
            }
            next_rip = f.wrap_ip(d.i.next_ip());
            if f.one(d) {
                ended = true;
                break;
            }
        }
        if list.is_empty() {
            // The first instruction reaches into the next page or does not decode.
            map.push((f.t.e.len() as u32, 0));
            f.interpret_at(key.rip);
        } else if !ended {
            f.bring_flags_back();
            f.direct_exit(next_rip);
        }
        f.emit_cold();
        let block = Block {
            key,
            entry: f.t.e.offset_of(entry) as u32,
            past_poll: f.t.e.offset_of(past_poll) as u32,
            others: others.map(|(far, checked)| OtherEntries {
                far: f.t.e.offset_of(far) as u32,
                checked: f.t.e.offset_of(checked) as u32,
            }),
            flags_live: list.first().is_none_or(|d| d.live != 0),
            start: 0,
            end: f.t.e.len() as u32,
            page,
            second: None,
            guest_len: next_rip.wrapping_sub(key.rip).clamp(1, 4096) as u32,
            insns: list.len().max(1) as u32,
            map,
            incoming: Vec::new(),
            interpret_first: list.is_empty(),
            polls,
            relocs: if second.is_some() || f.t.e.fixed {
                None
            } else {
                Some(f.t.e.relocs.as_slice().into())
            },
            first_exit,
            exits: f.t.exits.len() as u32,
            looked: f.looked,
            pops: match list.last() {
                Some(d) if d.i.mnemonic() == Mnemonic::Ret => d.i.stack_pointer_increment() as u32,
                _ => 0,
            },
            dead: false,
        };
        let exits = f.t.exits.iter().map(|(x, stub, at)| Exit {
            patch_at: *at as u32,
            stub_at: f.t.e.offset_of(*stub) as u32,
            ..x.clone()
        });
        let exits = exits.collect();
        f.t.list = list;
        Translated {
            code: f.t.e.finish(),
            block,
            exits,
        }
    }

    fn wrap_ip(&self, ip: u64) -> u64 {
        if self.code64 { ip } else { ip & 0xffff_ffff }
    }

    /// Decodes up to the first instruction that ends the block, then computes flag liveness.
    fn decode(
        &mut self,
        bytes: &[u8],
        allows: &dyn Fn(&Instruction) -> bool,
        insns_max: usize,
        page: &[u8],
        list: &mut Vec<Decoded>,
    ) {
        let bits = if self.code64 { 64 } else { 32 };
        let mut dec = Decoder::with_ip(bits, bytes, self.key.rip, self.host.decoder);
        list.clear();
        let mut branches = self.options.branches_max.min(BRANCHES_MAX);
        while list.len() < insns_max.min(INSNS_MAX) && dec.can_decode() {
            let i = dec.decode();
            if i.is_invalid() {
                // Undefined, or cut off by the end of the page: the interpreter knows.
                break;
            }
            let at = i.ip().wrapping_sub(self.key.rip) as usize;
            let exchange = bytes.get(at..).is_some_and(|b| is_exchange(&i, b));
            let refused = exchange || !allows(&i) || self.refuses(&i);
            let system = system::handles(&i, self.key.mode).is_some_and(system::System::ends_block);
            let goes_on = !refused && branches > 0 && goes_on_behind(&i);
            branches -= usize::from(goes_on);
            let ends = system
                || (i.flow_control() != FlowControl::Next && !goes_on)
                || (refused && ends_block(&i));
            list.push(Decoded {
                i,
                live: 0,
                refused,
                goes_on: false,
                stack: false,
                run: None,
                sp: 0,
            });
            if ends {
                break;
            }
        }
        // No interrupt may come between STI and the instruction after it, or STI; HLT would sleep
        // through the one it waits for. Within a block nothing comes between; at its end the
        // interpreter keeps the shadow.
        if let Some(last) = list.last_mut()
            && last.i.code() == Code::Sti
        {
            last.refused = true;
        }
        let mut live = self.live_after(list, page);
        let last = list.len().saturating_sub(1);
        for (n, d) in list.iter_mut().enumerate().rev() {
            if n < last && d.i.is_jcc_short_or_near() {
                // The flags at its target count as well.
                d.goes_on = true;
                if live != ARITH {
                    live |= self.live_at(self.wrap_ip(d.i.near_branch_target()), page);
                }
            }
            if d.refused || system::handles(&d.i, self.key.mode).is_some() {
                live = ARITH;
            } else {
                let kills = if may_keep_flags(&d.i) {
                    0
                } else {
                    d.i.rflags_modified() & ARITH
                };
                live = (live & !kills) | flags_read(&d.i);
            }
            d.live = if self.options.precise_flags {
                ARITH
            } else {
                live
            };
        }
    }

    /// True for instructions that this translator leaves to the interpreter.
    fn refuses(&mut self, i: &Instruction) -> bool {
        let m = i.mnemonic();
        if flags::handles(i, self.key.mode) || system::handles(i, self.key.mode).is_some() {
            return false;
        }
        if i.is_privileged() || i.is_string_instruction() {
            return true;
        }
        // A NOP or undefined, or an operand of 2 or 4 bytes, by vendor.
        if matches!(
            i.code(),
            Code::Movsxd_r16_rm16
                | Code::Reservednop_rm16_r16_0F0D
                | Code::Reservednop_rm32_r32_0F0D
                | Code::Reservednop_rm64_r64_0F0D
        ) {
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
                | Mnemonic::Wait
                | Mnemonic::Maskmovq
                | Mnemonic::Maskmovdqu
                | Mnemonic::Vmaskmovdqu
                | Mnemonic::Clflush
                | Mnemonic::Clflushopt
                | Mnemonic::Clwb
                | Mnemonic::Clzero
                | Mnemonic::Salc
                // The interpreter knows how to get good ones from every processor.
                | Mnemonic::Rdseed
        ) {
            return true;
        }
        // Fewer registers than on the host.
        if !self.code64 && matches!(m, Mnemonic::Vzeroall | Mnemonic::Vzeroupper) {
            return true;
        }
        if reads_selector(i) {
            return false;
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
            return self.t.facts.of(i).memory != Memory::None;
        }
        let bit_string = matches!(
            m,
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        ) && i.op0_kind() == OpKind::Memory
            && i.op1_kind() == OpKind::Register;
        if bit_string || i.is_vsib() || !self.plain_memory(i) {
            return true;
        }
        match self.t.facts.of(i).memory {
            Memory::None => m != Mnemonic::Lea && !is_hint(m),
            Memory::Named => false,
            Memory::Read | Memory::Write => {
                !matches!(i.memory_size().size(), 1 | 2 | 4 | 8 | 10 | 16 | 32 | 64)
            }
            Memory::Several => true,
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
            // Not writable outside 64-bit mode; rare enough for the interpreter.
            Register::CS => self.code64,
            _ => true,
        }
    }

    fn branch_supported(&self, i: &Instruction) -> bool {
        let near = match i.op0_kind() {
            OpKind::NearBranch16 => return false,
            OpKind::NearBranch32 => !self.code64,
            OpKind::NearBranch64 => self.code64 && flow::canonical(i.near_branch_target()),
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

    /// Entry points: the others, if they are wanted, and the plain one, which may poll.
    fn prologue(&mut self, list: &[Decoded], place: &Place) -> Prologue {
        let live = list.first().is_none_or(|d| d.live != 0);
        let mut others = None;
        if place.entries {
            let pages = [Some(place.page), place.second];
            let e = emit_checks(&mut self.t.e, self.key.rip, pages, live);
            self.t.cold.push(Cold::Moved {
                at: e.moved,
                with_rcx: e.moved_rcx,
            });
            self.t.cold.push(Cold::Lost { at: e.lost });
            others = Some((e.far, e.checked));
        }
        let entry = self.t.e.here();
        let at = self.t.e.label();
        if !live {
            self.t.e.cmp_frame32_zero(layout::EXIT_REQUEST);
            self.t.e.jcc(5, at);
            self.t.cold.push(Cold::Poll { at });
        } else if place.force_poll {
            self.t.e.store(layout::SAVE_RCX, 1);
            self.t.e.load32(1, layout::EXIT_REQUEST);
            self.t.e.jrcxz_over(|e| {
                e.load(1, layout::SAVE_RCX);
                e.jmp(at);
            });
            self.t.e.load(1, layout::SAVE_RCX);
            self.t.cold.push(Cold::Poll { at });
        }
        Prologue {
            entry,
            past_poll: self.t.e.here(),
            others,
            polls: !live || place.force_poll,
        }
    }

    /// Emits one instruction. True if it ended the block.
    fn one(&mut self, d: &Decoded) -> bool {
        let i = &d.i;
        self.quiet = self.is_quiet(d);
        if d.live == 0 {
            self.flags_saved = false;
        } else if !self.quiet {
            self.bring_flags_back();
        }
        if d.refused && i.flow_control() == FlowControl::Next && !ends_block(i) {
            self.interpret_in_place(i);
            return false;
        }
        if d.refused {
            self.interpret_and_jump(i.ip());
            return true;
        }
        if let Some(what) = system::handles(i, self.key.mode) {
            self.system(i, what, d.live != 0);
            return what.ends_block();
        }
        if d.goes_on {
            let target = self.wrap_ip(i.near_branch_target());
            self.conditional_exit(condition(i), target);
            return false;
        }
        if i.flow_control() != FlowControl::Next {
            self.branch(d);
            return true;
        }
        if flags::handles(i, self.key.mode) {
            self.t1_run = None;
            self.flag_insn(d);
            return false;
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
        if reads_selector(i) {
            self.selector(i);
            return false;
        }
        if self.copy(d) {
            return false;
        }
        self.bring_flags_back();
        self.interpret_at(i.ip());
        true
    }

    /// Leaves for the interpreter at `rip`.
    fn interpret_at(&mut self, rip: u64) {
        self.t.e.store_rip(layout::RIP, rip, T0);
        self.t.e.store_imm32(layout::REASON, reason::INTERPRET);
        self.t.e.jmp_frame(layout::STUB_EXIT);
    }

    /// Has the interpreter do one instruction and goes on with the next.
    fn interpret_in_place(&mut self, i: &Instruction) {
        self.prepare_step(i);
        self.t.e.call_frame(layout::STUB_STEP);
    }

    /// What `stubs::step` needs to know.
    fn prepare_step(&mut self, i: &Instruction) {
        self.t1_run = None;
        let next = self.wrap_ip(i.next_ip());
        self.t.e.store_rip(layout::RIP, i.ip(), T0);
        self.t.e.store_rip(layout::EXPECTED, next, T0);
        self.t
            .e
            .store_imm32(layout::MODE, self.key.mode & !mode::PLAIN);
    }

    /// Has the interpreter do an instruction that changes RIP or the mode, and goes on where that
    /// leads, if the jump cache knows the place.
    fn interpret_and_jump(&mut self, rip: u64) {
        self.t.e.store_rip(layout::RIP, rip, T0);
        self.t.e.call_frame(layout::STUB_STEP_JUMP);
    }

    /// Makes sure that the guest's vector state is in the host's registers.
    fn need_fpu(&mut self, flags_live: bool) {
        if std::mem::replace(&mut self.fpu_ready, true) {
            return;
        }
        self.t1_run = None;
        if flags_live {
            self.t.e.store(layout::SAVE_RCX, 1);
            self.t.e.load32(1, layout::FPU_LIVE);
            self.t.e.unless_rcxz(|e| e.call_frame(layout::STUB_FPU));
            self.t.e.load(1, layout::SAVE_RCX);
        } else {
            let (at, back) = (self.t.e.label(), self.t.e.label());
            self.t.e.cmp_frame32_zero(layout::FPU_LIVE);
            self.t.e.jcc(4, at);
            self.t.e.bind(back);
            self.t.cold.push(Cold::FpuLoad { at, back });
        }
    }

    fn emit_cold(&mut self) {
        for c in std::mem::take(&mut self.t.cold) {
            match c {
                Cold::Slow {
                    at,
                    retry,
                    done,
                    size,
                    bits,
                } => {
                    let after = self.t.e.offset_of(done) - self.t.e.offset_of(retry);
                    self.t.e.data(&[after as u8, size as u8, bits]);
                    self.t.e.bind(at);
                    self.t.e.call_frame(layout::STUB_SLOW);
                    self.t.e.jmp(retry);
                }
                Cold::Poll { at } => {
                    self.t.e.bind(at);
                    self.t.e.call_frame(layout::STUB_POLL);
                }
                Cold::FpuLoad { at, back } => {
                    self.t.e.bind(at);
                    self.t.e.call_frame(layout::STUB_FPU);
                    self.t.e.jmp(back);
                }
                Cold::ExitStub { at } => {
                    self.t.e.bind(at);
                    self.t.e.call_frame(layout::STUB_LINK);
                }
                Cold::JumpFar { at, target } => {
                    self.t.e.bind(at);
                    self.far_jump(target);
                }
                Cold::Lost { at } => emit_lost(&mut self.t.e, at, self.view),
                Cold::Moved { at, with_rcx } => {
                    emit_moved(&mut self.t.e, at, with_rcx, self.id);
                }
                Cold::Waiting { at, rip, shadow } => {
                    self.t.e.bind(at);
                    if shadow {
                        self.t.e.store_imm8(layout::SHADOW, 1);
                    }
                    self.t.e.store_rip(layout::RIP, rip, T0);
                    self.t.e.store_imm32(layout::REASON, reason::POLL);
                    self.t.e.jmp_frame(layout::STUB_EXIT);
                }
                Cold::Run {
                    at,
                    retry,
                    span,
                    bits,
                    exit,
                    stub,
                } => {
                    self.t.e.data(&[span as u8, bits]);
                    self.t.e.bind(at);
                    // Comes back after the first jump if that cannot serve the run.
                    self.t.e.call_frame(layout::STUB_RUN);
                    self.t.e.jmp(retry);
                    if bits & crate::xlate::stubs::FLAGS_SAVED != 0 {
                        self.t.e.restore_flags_by(T0);
                    }
                    self.t.e.jmp(stub);
                    self.t.exits[exit].2 = self.t.e.len() - 4;
                }
                Cold::Interpret { at, rip } => {
                    self.t.e.bind(at);
                    self.interpret_at(rip);
                }
                Cold::InterpretSaved { at, rip } => {
                    self.t.e.bind(at);
                    self.t.e.restore_flags_by(T0);
                    self.interpret_at(rip);
                }
            }
        }
    }
}
