//! Vector, x87 and other pure computation on the host's own units.
//!
//! A guest instruction is prepared once: its memory operand becomes a bounce buffer behind a free
//! register, RSP is renamed if it is an operand, the result is encoded again for 64-bit mode and
//! put in a stub ([`unit`]). To run it, the operand is copied in, the guest's registers are loaded,
//! the stub is called and everything is saved again. All checks that depend on the guest's state
//! come before; exceptions of the computation itself are the host's and become the guest's.
//!
//! Differences from hardware: with CR0.NE clear a pending x87 exception is dropped (there is no
//! FERR# pin to IRQ 13).

// UNSAFETY: calls stubs whose only instruction was built here.
#![allow(unsafe_code, reason = "runs prepared host instructions")]

pub mod feature;
pub mod lanes;
pub mod registers;
pub mod unit;
pub mod x87;

use std::collections::HashMap;
use std::sync::Arc;

use iced_x86::{
    Code, CodeSize, CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register,
};
use pyrite_engine::{CpuidTable, EngineError, StopReason};
use pyrite_x86::bits::{cr0, cr4, rflags, vector};
use pyrite_x86::{gpr, sreg};

use crate::exception::{Exception, Trap};
use crate::interp::Op;
use crate::interp::integer::{self, Done};
use crate::interp::operand::{
    address_mask, alignment_checked, gpr_place, mem_lin, offset, segment, split_fault,
};
use crate::mmu::Priv;
use crate::sys::Next;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

use feature::Announced;
use lanes::Lanes;
use unit::{STUBS_MAX, Unit, component};

/// The state an instruction works on, which decides what is checked and loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// General-purpose registers only.
    Integer,
    /// x87; `waits`: looks for pending exceptions first.
    X87 { waits: bool },
    /// MMX registers.
    Mmx,
    /// XMM registers by legacy encoding, perhaps with MMX registers.
    Sse { mmx: bool },
    /// XMM and YMM registers by VEX or XOP encoding.
    Avx,
    /// ZMM or opmask registers.
    Avx512,
}

/// The memory operand of a prepared instruction.
#[derive(Clone, Copy)]
struct Memory {
    bytes: usize,
    read: bool,
    write: bool,
    /// Register (number) that holds the bounce address.
    base: usize,
    lanes: Lanes,
    alignment: Alignment,
    /// A mask keeps lanes from being stored but suppresses no fault.
    checks_all: bool,
}

/// Whether a memory operand must be aligned to its size. A misaligned one raises #GP before any
/// page fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alignment {
    /// Anywhere.
    Free,
    /// Legacy SSE: aligned unless MXCSR.MM is set. AMD APM Vol. 1 §4.4.1.
    Legacy,
    /// Always aligned: aligned and non-temporal moves.
    Strict,
}

impl Alignment {
    /// Intel SDM Vol. 1 §14.9, Vol. 2A §2.4 (exception types 1, 2, 4).
    fn of(i: &Instruction, state: State, bytes: usize) -> Alignment {
        use Mnemonic as M;
        if bytes < 16 {
            return Alignment::Free;
        }
        match i.mnemonic() {
            M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Pcmpestri64
            | M::Pcmpestrm64
            | M::Sha1msg1
            | M::Sha1msg2
            | M::Sha1nexte
            | M::Sha1rnds4
            | M::Sha256msg1
            | M::Sha256msg2
            | M::Sha256rnds2 => Alignment::Free,
            M::Movaps
            | M::Movapd
            | M::Movdqa
            | M::Movntps
            | M::Movntpd
            | M::Movntdq
            | M::Movntdqa
            | M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovdqa32
            | M::Vmovdqa64
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa => Alignment::Strict,
            _ if matches!(state, State::Sse { .. }) => Alignment::Legacy,
            _ => Alignment::Free,
        }
    }

    /// True if an operand there raises #GP.
    fn refuses(self, v: &SoftVcpu, lin: u64, bytes: usize) -> bool {
        const MM: u8 = 1 << 1;
        let misaligned = !lin.is_multiple_of(bytes as u64);
        match self {
            Alignment::Free => false,
            Alignment::Strict => misaligned,
            // Bit 17 of MXCSR.
            Alignment::Legacy => misaligned && v.frame.cpu.xsave.0[26] & MM == 0,
        }
    }
}

/// A prepared instruction.
struct Plan {
    code: usize,
    mask: u64,
    state: State,
    memory: Option<Memory>,
    /// Register that stands for RSP.
    rsp: Option<usize>,
    /// General-purpose registers that are written.
    written: u16,
    /// x87 opcode for FOP; `None` for what does not set the last-instruction pointers.
    fop: Option<u16>,
}

/// Prepared host instructions of one vCPU.
pub struct Native {
    pub(crate) unit: Unit,
    plans: Vec<Arc<Plan>>,
    /// By instruction bytes and code width.
    known: HashMap<(u128, u32), u32>,
    announced: Announced,
    info: InstructionInfoFactory,
}

impl Native {
    /// MXCSR bits that the host knows.
    pub(crate) fn mxcsr_mask(&self) -> u32 {
        self.unit.mxcsr_mask
    }

    /// Nothing prepared.
    pub fn new(cpuid: &CpuidTable) -> Result<Native, EngineError> {
        Ok(Native {
            unit: Unit::new()?,
            plans: Vec::new(),
            known: HashMap::new(),
            announced: Announced::new(cpuid),
            info: InstructionInfoFactory::new(),
        })
    }

    /// True if the guest's CPUID announces what the instruction belongs to.
    pub fn allows(&self, i: &Instruction) -> bool {
        self.announced.all(i.cpuid_features())
    }
}

/// Chooses the handler of an instruction that the other modules do not execute.
pub fn prepare(v: &mut SoftVcpu, op: &mut Op, bytes: u128) -> Result<(), Exception> {
    op.run = integer::undefined;
    if !v.interp.native.allows(&op.i) {
        return Ok(());
    }
    if let Some(run) = x87::handler(&op.i).or_else(|| lanes::handler(&op.i)) {
        op.run = run;
        return Ok(());
    }
    let keep = u128::MAX >> (128 - 8 * op.i.len() as u32);
    let key = (bytes & keep, op.bits);
    if let Some(&n) = v.interp.native.known.get(&key) {
        (op.plan, op.run) = (n, execute);
        return Ok(());
    }
    if v.interp.native.plans.len() >= STUBS_MAX - 1 {
        // Numbers in decoded instructions would dangle.
        v.interp.forget();
        let n = &mut v.interp.native;
        n.plans.clear();
        n.known.clear();
        n.unit.clear();
    }
    let n = &mut v.interp.native;
    if let Some(plan) = build(n, &op.i, bytes) {
        op.plan = n.plans.len() as u32;
        op.run = execute;
        n.plans.push(Arc::new(plan));
        n.known.insert(key, op.plan);
    }
    Ok(())
}

/// Registers that may stand for others, most easily encoded first. RBP and R13 would need a
/// displacement as base, R12 an index byte.
const SPARE: [Register; 10] = [
    Register::RSI,
    Register::RDI,
    Register::RBX,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R14,
    Register::R15,
    Register::RCX,
];

fn number(r: Register) -> Option<usize> {
    gpr_place(r).map(|(n, _, _)| n)
}

/// Builds the host's form of an instruction; `None` if there is none.
fn build(n: &mut Native, i: &Instruction, bytes: u128) -> Option<Plan> {
    let state = state_of(i)?;
    let mut used = 0u16;
    let mut written = 0u16;
    let info = n.info.info(i);
    for r in info.used_registers() {
        if let Some(k) = number(r.register()) {
            used |= 1 << k;
            let is_address = r.access() == OpAccess::Read;
            if !is_address {
                written |= 1 << k;
            }
        }
    }
    let mut host = *i;
    let mut spare = SPARE
        .into_iter()
        .filter(|&r| number(r).is_some_and(|k| used >> k & 1 == 0));
    let mut memory = None;
    for op in 0..i.op_count() {
        if i.op_kind(op) == OpKind::Memory {
            let access = info.op_access(op);
            let base = spare.next()?;
            host.set_segment_prefix(Register::None);
            host.set_memory_base(base);
            host.set_memory_index(Register::None);
            host.set_memory_index_scale(1);
            host.set_memory_displacement64(0);
            host.set_memory_displ_size(0);
            let bytes = i.memory_size().size();
            // LIMIT: 64 bytes is the largest operand of the units.
            if !(1..=64).contains(&bytes) || i.is_vsib() {
                return None;
            }
            memory = Some(Memory {
                bytes,
                // A store by the x87 unit does not happen if it raises an exception that is not
                // masked; the instruction completes all the same.
                read: matches!(state, State::X87 { .. })
                    || !matches!(
                        access,
                        OpAccess::Write | OpAccess::CondWrite | OpAccess::NoMemAccess
                    ),
                write: !matches!(
                    access,
                    OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
                ),
                base: number(base)?,
                lanes: Lanes::of(i, op),
                alignment: Alignment::of(i, state, bytes),
                checks_all: lanes::stores_check_all(i.mnemonic()),
            });
        } else if i.op_kind(op) != OpKind::Register && !is_immediate(i.op_kind(op)) {
            return None;
        }
    }
    // RSP as an operand: another register stands for it, in the same size.
    let mut rsp = None;
    for op in 0..i.op_count() {
        if i.op_kind(op) != OpKind::Register || number(i.op_register(op)) != Some(gpr::RSP) {
            continue;
        }
        let (_, size, high) = gpr_place(i.op_register(op))?;
        if high {
            continue;
        }
        let k = match rsp {
            Some(k) => k,
            None => number(spare.next()?)?,
        };
        rsp = Some(k);
        let k = k as u32;
        let stand_in = match size {
            8 => Register::RAX + k,
            4 => Register::EAX + k,
            2 => Register::AX + k,
            // SPL needs REX, with which the others have their low bytes too.
            1 if k < 4 => Register::AL + k,
            1 => Register::SPL + (k - 4),
            _ => return None,
        };
        host.set_op_register(op, stand_in);
    }
    host.set_code_size(CodeSize::Code64);
    let mut encoder = Encoder::new(64);
    if i.mnemonic() == Mnemonic::Rdseed {
        encode_rdseed(&mut encoder, &host, spare.next()?)?;
    } else {
        encoder.encode(&host, 0x1000).ok()?;
    }
    let code = n.unit.add(&encoder.take_buffer())?;
    let mask = match state {
        State::Integer => 0,
        State::X87 { .. } | State::Mmx | State::Sse { mmx: true } => {
            component::X87 | component::SSE
        }
        State::Sse { mmx: false } => component::SSE,
        State::Avx => component::SSE | component::AVX | component::ZMM_HI256,
        State::Avx512 => component::ALL & !component::X87,
    };
    Some(Plan {
        code,
        mask,
        state,
        memory,
        rsp,
        written,
        fop: matches!(state, State::X87 { .. })
            .then(|| x87::opcode(i, bytes))
            .flatten(),
    })
}

/// RDSEED in its 64-bit form, of which the guest gets as many bits as it wants: the narrow forms of
/// some processors return zeros and call them random (AMD-SB-7055).
fn encode_rdseed(encoder: &mut Encoder, host: &Instruction, seed: Register) -> Option<()> {
    let to = host.op_register(0);
    let (n, size, _) = gpr_place(seed)?;
    debug_assert_eq!(size, 8);
    let n = n as u32;
    let (mov, low) = match to.size() {
        8 => (Code::Mov_r64_rm64, seed),
        4 => (Code::Mov_r32_rm32, Register::EAX + n),
        _ => (Code::Mov_r16_rm16, Register::AX + n),
    };
    let rdseed = Instruction::with1(Code::Rdseed_r64, seed).ok()?;
    let len = encoder.encode(&rdseed, 0x1000).ok()?;
    let mov = Instruction::with2(mov, to, low).ok()?;
    encoder.encode(&mov, 0x1000 + len as u64).ok()?;
    Some(())
}

fn is_immediate(k: OpKind) -> bool {
    matches!(
        k,
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// Which state an instruction works on; `None` for what must not run natively.
pub(crate) fn state_of(i: &Instruction) -> Option<State> {
    let features = i.cpuid_features();
    let is_x87 = features.iter().any(|f| {
        matches!(
            f,
            CpuidFeature::FPU
                | CpuidFeature::FPU287
                | CpuidFeature::FPU387
                | CpuidFeature::FPU287XL_ONLY
        )
    });
    // FISTTP belongs to SSE3.
    if is_x87 || i.mnemonic() == Mnemonic::Fisttp {
        let waits = !matches!(
            i.mnemonic(),
            Mnemonic::Fninit
                | Mnemonic::Fnclex
                | Mnemonic::Fnstcw
                | Mnemonic::Fnstsw
                | Mnemonic::Fneni
                | Mnemonic::Fndisi
                | Mnemonic::Fnsetpm
        );
        return Some(State::X87 { waits });
    }
    let (mut mm, mut xmm, mut k) = (false, false, i.op_mask() != Register::None);
    for op in 0..i.op_count() {
        if i.op_kind(op) == OpKind::Register {
            let r = i.op_register(op);
            mm |= r.is_mm();
            xmm |= r.is_xmm();
            k |= r.is_k();
        }
    }
    let mxcsr = matches!(
        i.mnemonic(),
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
    );
    match i.encoding() {
        EncodingKind::Legacy | EncodingKind::D3NOW => legacy_state(i, mm, xmm || mxcsr),
        EncodingKind::EVEX => Some(State::Avx512),
        EncodingKind::VEX | EncodingKind::XOP if k => Some(State::Avx512),
        EncodingKind::VEX | EncodingKind::XOP => {
            let integer = features.iter().all(|f| {
                matches!(
                    f,
                    CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::TBM | CpuidFeature::X64
                )
            });
            Some(if integer { State::Integer } else { State::Avx })
        }
        _ => None,
    }
}

/// [`state_of`] for legacy encodings: an allow-list, because everything else of the processor is
/// encoded this way too. `mm`, `xmm`: the kinds of registers among the operands.
fn legacy_state(i: &Instruction, mm: bool, xmm: bool) -> Option<State> {
    use CpuidFeature as F;
    use Mnemonic as M;
    let features = i.cpuid_features();
    if xmm {
        return Some(State::Sse { mmx: mm });
    }
    match i.mnemonic() {
        // From memory, with the SSE unit.
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi => {
            return Some(State::Sse { mmx: true });
        }
        M::Emms | M::Femms => return Some(State::Mmx),
        M::Crc32 | M::Adcx | M::Adox | M::Rdrand | M::Rdseed => return Some(State::Integer),
        _ if mm => return Some(State::Mmx),
        _ => {}
    }
    // Conversions from memory to general-purpose registers.
    let sse = matches!(
        i.mnemonic(),
        M::Cvtss2si | M::Cvttss2si | M::Cvtsd2si | M::Cvttsd2si
    );
    (sse && features
        .iter()
        .all(|f| matches!(f, F::SSE | F::SSE2 | F::X64)))
    .then_some(State::Sse { mmx: false })
}

/// Checks of control registers that come before any operand is touched. Intel SDM Vol. 2A §2.4,
/// §2.8; Vol. 3A §2.5, §13.1.
fn check_state(v: &mut SoftVcpu, state: State, encoding: EncodingKind) -> Result<(), Exception> {
    let c = &v.frame.cpu;
    let (em, ts) = (c.cr0 & cr0::EM != 0, c.cr0 & cr0::TS != 0);
    let vex_like = matches!(
        encoding,
        EncodingKind::VEX | EncodingKind::EVEX | EncodingKind::XOP
    );
    if vex_like && v.real_or_v86() {
        return Err(Exception::UD);
    }
    let c = &v.frame.cpu;
    let enabled = |bits: u64| c.cr4 & cr4::OSXSAVE != 0 && c.xcr0 & bits == bits;
    match state {
        State::Integer => return Ok(()),
        State::X87 { .. } => {
            if em || ts {
                return Err(Exception::NM);
            }
        }
        State::Mmx => {
            if em {
                return Err(Exception::UD);
            }
        }
        State::Sse { .. } => {
            if em || c.cr4 & cr4::OSFXSR == 0 {
                return Err(Exception::UD);
            }
        }
        State::Avx => {
            if !enabled(component::SSE | component::AVX) {
                return Err(Exception::UD);
            }
        }
        State::Avx512 => {
            if !enabled(component::SSE | component::AVX | component::AVX512) {
                return Err(Exception::UD);
            }
        }
    }
    if ts {
        return Err(Exception::NM);
    }
    if matches!(
        state,
        State::X87 { waits: true } | State::Mmx | State::Sse { mmx: true }
    ) {
        x87::check_pending(v)?;
    }
    Ok(())
}

/// The checks of vector instructions for the handlers that work in Rust.
pub(crate) fn check_vector(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    match state_of(i) {
        Some(state) => check_state(v, state, i.encoding()),
        None => Err(Exception::UD),
    }
}

/// Runs a prepared instruction.
fn execute(v: &mut SoftVcpu, op: &Op) -> Done {
    let Some(plan) = v.interp.native.plans.get(op.plan as usize).map(Arc::clone) else {
        return Err(Exception::UD.into());
    };
    check_state(v, plan.state, op.i.encoding())?;
    let mut lin = 0;
    let mut lanes = u64::MAX;
    if let Some(m) = plan.memory {
        (lin, lanes) = copy_in(v, op, &m)?;
    }
    let old_pointers = x87::pointers(v);
    let at = 64 + (lin as usize & 63);
    {
        let unit = &mut v.interp.native.unit;
        let bounce = unit.call.bounce.as_ptr() as u64 + at as u64;
        unit.call.gpr = v.frame.cpu.gpr;
        if let Some(k) = plan.rsp {
            unit.call.gpr[k] = v.frame.cpu.gpr[gpr::RSP];
        }
        if let Some(m) = plan.memory {
            unit.call.gpr[m.base] = bounce;
        }
        unit.call.flags = v.frame.cpu.rflags;
    }
    // SAFETY: `build` made the stub: only registers, and memory at the base register, which is in
    // the bounce buffer with at least 64 bytes behind it.
    let fault = unsafe {
        v.interp
            .native
            .unit
            .run(plan.code, plan.mask, &mut v.frame.cpu.xsave)
    };
    if plan.mask & component::X87 != 0 {
        x87::set_pointers(v, old_pointers);
    }
    if let Some(trap) = fault {
        return Err(host_trap(v, op, trap));
    }
    let call = &v.interp.native.unit.call;
    for n in 0..16 {
        if plan.written >> n & 1 != 0 {
            let from = if n == gpr::RSP {
                plan.rsp.unwrap_or(n)
            } else {
                n
            };
            v.frame.cpu.gpr[n] = call.gpr[from];
        }
    }
    let f = &mut v.frame.cpu.rflags;
    *f = *f & !rflags::ARITH | call.flags & rflags::ARITH;
    if let State::X87 { .. } = plan.state {
        x87::note_instruction(v, &op.i, plan.fop);
    }
    if let Some(m) = plan.memory
        && m.write
    {
        let mut data = [0u8; 64];
        data[..m.bytes].copy_from_slice(&v.interp.native.unit.call.bounce[at..at + m.bytes]);
        m.lanes.store(v, lin, &data[..m.bytes], lanes)?;
    }
    Ok(Next::Sequential)
}

/// True if the operand's offset breaks its alignment.
fn misaligned(v: &SoftVcpu, op: &Op, m: &Memory) -> bool {
    m.alignment.refuses(v, offset(v, &op.i), m.bytes)
}

/// True for an operand with an opmask whose elements are aligned, though the whole may not be.
fn elements_aligned(v: &SoftVcpu, op: &Op, m: &Memory, access: SegAccess) -> bool {
    let element = m.lanes.element.max(1) as u64;
    m.lanes.by_opmask()
        && v.linear(segment(&op.i), offset(v, &op.i), m.bytes, access)
            .is_ok_and(|lin| lin.is_multiple_of(element))
}

/// Checks the memory operand and copies it into the bounce buffer. Returns its linear address and
/// the lanes that count.
fn copy_in(v: &mut SoftVcpu, op: &Op, m: &Memory) -> Result<(u64, u64), Exception> {
    let access = if m.write {
        SegAccess::Write
    } else {
        SegAccess::Read
    };
    let lanes = m.lanes.active(v, &op.i, m.bytes);
    let whole = m.lanes.all(m.bytes);
    // With lanes switched off, the operand may reach beyond the segment or into a missing page.
    let lin = match mem_lin(v, &op.i, m.bytes, access) {
        Ok(lin) => lin,
        Err(e) if e.vector == vector::AC && lanes != 0 && !elements_aligned(v, op, m, access) => {
            return Err(e);
        }
        Err(e) if e.vector == vector::SS && lanes != 0 && misaligned(v, op, m) => {
            // The #GP of a misaligned operand comes before the #SS of a non-canonical one.
            return Err(Exception::gp(0));
        }
        Err(e) if m.bytes == 10 => return Err(split_fault(v, &op.i, 0, 8, access, e)),
        Err(e) if e.vector != vector::AC && (lanes == whole || m.checks_all) => {
            if (m.lanes.by_opmask() || m.lanes.by_vector()) && !m.checks_all {
                return Err(split_fault(v, &op.i, 0, m.lanes.element, access, e));
            }
            return Err(e);
        }
        Err(e) => {
            let seg = segment(&op.i);
            let first = lanes.trailing_zeros() as u64 * m.lanes.element as u64;
            if lanes != 0 {
                let o = offset(v, &op.i).wrapping_add(first);
                // In 64-bit mode addresses wrap, elsewhere they run into the limit.
                let (o, wraps) = match op.bits {
                    64 => (o & address_mask(&op.i), false),
                    _ => (o, o > 0xffff_ffff),
                };
                let last = 64 - lanes.leading_zeros() as u64;
                let len = last as usize * m.lanes.element - first as usize;
                if wraps || v.linear(seg, o, len, access).is_err() {
                    // The lanes are accessed one by one.
                    return Err(split_fault(
                        v,
                        &op.i,
                        first as usize,
                        m.lanes.element,
                        access,
                        e,
                    ));
                }
            }
            let base = if op.bits == 64 && seg < sreg::FS {
                0
            } else {
                v.frame.cpu.seg[seg].base
            };
            base.wrapping_add(offset(v, &op.i))
        }
    };
    // Masked out as a whole, an operand is not looked at.
    if lanes != 0 && m.alignment.refuses(v, lin, m.bytes) {
        return Err(Exception::gp(0));
    }
    // An alignment check comes before page faults. The manuals leave open what it asks for; the
    // processors at hand want the elements of an operand with an opmask aligned, 64 bits of an
    // 80-bit one, and never more than 16 bytes. Loads and stores by a vector mask have none.
    let unit = if m.lanes.by_opmask() && !m.checks_all {
        m.lanes.element
    } else if m.bytes == 10 {
        8
    } else {
        m.bytes.min(16)
    };
    if m.bytes > 8
        && (lanes != 0 || m.checks_all)
        && !m.lanes.by_vector()
        && alignment_checked(v)
        && !lin.is_multiple_of(unit.max(1) as u64)
    {
        return Err(Exception::AC);
    }
    let at = 64 + (lin as usize & 63);
    let mut data = [0u8; 64];
    if m.write {
        if m.checks_all {
            v.probe_write(lin, m.bytes, Priv::Current)?;
        }
        m.lanes.probe(v, lin, m.bytes, lanes)?;
    }
    if m.read {
        let out = &mut data[..m.bytes];
        match v.read_bytes(lin, out, Priv::Current) {
            Ok(()) => {}
            Err(e) if lanes == whole => return Err(e),
            Err(_) => {
                out.fill(0);
                m.lanes.load(v, lin, out, lanes)?;
            }
        }
    }
    v.interp.native.unit.call.bounce[at..at + m.bytes].copy_from_slice(&data[..m.bytes]);
    Ok((lin, lanes))
}

/// An exception that the host raised for the guest's instruction.
fn host_trap(v: &SoftVcpu, op: &Op, trap: u8) -> Trap {
    match trap {
        vector::DE => Exception::DE.into(),
        vector::UD => Exception::UD.into(),
        vector::NM => Exception::NM.into(),
        vector::GP => Exception::gp(0).into(),
        vector::MF => Exception::MF.into(),
        vector::XM if v.frame.cpu.cr4 & cr4::OSXMMEXCPT == 0 => Exception::UD.into(),
        vector::XM => Exception::XM.into(),
        n => Trap::Stop(StopReason::Failed(EngineError::Internal(format!(
            "host exception {n} in {:?} at {:#x}",
            op.i.code(),
            v.frame.cpu.rip
        )))),
    }
}
