//! Builds instructions: random encodings of a given form, with memory operands that mostly hit the
//! data, and sequences of them with patched branches.

use iced_x86::{
    Code, ConstantOffsets, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix,
    Mnemonic, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
};

use super::machine::{CODE, CODE16, DATA, DATA_BYTES, END, END16, END32, Mode, RO_BYTES, Start};
use super::rng::Rng;

/// One instruction of a sequence.
#[derive(Clone, Debug)]
pub struct Insn {
    pub bytes: Vec<u8>,
    /// For near branches: where the displacement is, its size, and the identity of the target
    /// instruction (`u32::MAX` = the end).
    pub branch: Option<(usize, usize, u32)>,
    /// For RIP-relative operands: where the displacement is and the address meant.
    pub rip_data: Option<(usize, u64)>,
    /// Identity within the sequence, which survives the removal of others.
    pub id: u32,
}

/// Random bytes that may be an instruction of the form.
fn candidate(op: &OpCodeInfo, r: &mut Rng, mode: Mode) -> Option<Vec<u8>> {
    let mut b = Vec::with_capacity(24);
    let map = match op.table() {
        OpCodeTableKind::Normal => 0,
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        OpCodeTableKind::MAP8 => 8,
        OpCodeTableKind::MAP9 => 9,
        OpCodeTableKind::MAP10 => 10,
        _ => return None,
    };
    let pp = match op.mandatory_prefix() {
        MandatoryPrefix::None | MandatoryPrefix::PNP => 0,
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
    };
    let w = match op.w() {
        _ if op.is_wig() => r.below(2) as u8,
        n => n as u8,
    };
    let l = if op.is_lig() {
        r.below(3) as u8
    } else {
        op.l() as u8
    };
    // Prefixes that every encoding may have.
    if r.one_in(12) {
        b.push(*r.pick(&[0x64u8, 0x65, 0x64, 0x65, 0x3e]));
    }
    let other = if mode == Mode::Flat32 { 16 } else { 32 };
    let vsib = op.op_kinds().iter().any(|k| {
        use OpCodeOperandKind as K;
        matches!(
            k,
            K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
                | K::mem_vsib32z
                | K::mem_vsib64z
        )
    });
    // A vector of indices needs a SIB byte, which 16-bit addresses do not have.
    let change = match mode {
        Mode::Seg16 if vsib => true,
        Mode::Flat32 if vsib => false,
        _ => op.address_size() == other || (op.address_size() == 0 && r.one_in(16)),
    };
    if change {
        b.push(0x67);
    }
    // Bits that select registers 8 to 31, and tell VEX and EVEX from LDS, LES and BOUND.
    let low = if mode == Mode::Long { 0 } else { 0xc0 };
    let inv = |r: &mut Rng| r.next() as u8;
    match op.encoding() {
        EncodingKind::Legacy => legacy(op, r, &mut b, map, mode),
        EncodingKind::VEX | EncodingKind::XOP => {
            let xop = op.encoding() == EncodingKind::XOP;
            let vvvv = if r.one_in(2) { 0x78 } else { inv(r) & 0x78 };
            if !xop && map == 1 && w == 0 && r.one_in(2) {
                b.extend([0xc5, inv(r) & 0x80 | vvvv | (l & 1) << 2 | pp | low]);
            } else {
                let rxb = if r.one_in(3) { 0xe0 } else { inv(r) & 0xe0 };
                b.extend([if xop { 0x8f } else { 0xc4 }, rxb | map | low]);
                b.push(w << 7 | vvvv | (l & 1) << 2 | pp);
            }
            b.push(op.op_code() as u8);
        }
        EncodingKind::EVEX => {
            let p0 = if r.one_in(3) { 0xf0 } else { inv(r) & 0xf0 };
            let vvvv = if r.one_in(2) { 0x78 } else { inv(r) & 0x78 };
            let v2 = if r.one_in(2) { 8 } else { inv(r) & 8 };
            let bcst = if r.one_in(4) { 0x10 } else { 0 };
            let aaa = if r.one_in(2) { 0 } else { inv(r) & 7 };
            let z = if aaa != 0 && r.one_in(2) { 0x80 } else { 0 };
            b.extend([
                0x62,
                p0 | map | low,
                w << 7 | vvvv | 4 | pp,
                z | l << 5 | bcst | v2 | aaa,
            ]);
            b.push(op.op_code() as u8);
        }
        _ => return None,
    }
    let n = b.len();
    for _ in 0..8 {
        b.extend(r.next().to_le_bytes());
    }
    let mut modrm = b[n];
    // Registers and memory in equal parts.
    modrm = if r.one_in(2) {
        modrm | 0xc0
    } else {
        modrm & 0x7f
    };
    if op.is_group() && op.group_index() >= 0 {
        modrm = modrm & !0x38 | (op.group_index() as u8) << 3;
    }
    if op.is_rm_group() && op.rm_group_index() >= 0 {
        modrm = modrm & 0x38 | 0xc0 | op.rm_group_index() as u8;
    }
    b[n] = modrm;
    b.truncate(n + 12);
    Some(b)
}

fn legacy(op: &OpCodeInfo, r: &mut Rng, b: &mut Vec<u8>, map: u8, mode: Mode) {
    if op.can_use_lock_prefix() && r.one_in(3) {
        b.push(0xf0);
    }
    let strings = op.can_use_rep_prefix() || op.can_use_repne_prefix();
    if strings && r.one_in(2) {
        b.push(if op.can_use_repne_prefix() && r.one_in(2) {
            0xf2
        } else {
            0xf3
        });
    }
    if op.fwait() {
        b.insert(0, 0x9b);
    }
    let prefixed = if mode == Mode::Seg16 { 32 } else { 16 };
    if op.operand_size() == prefixed {
        b.push(0x66);
    }
    match op.mandatory_prefix() {
        MandatoryPrefix::P66 => b.push(0x66),
        MandatoryPrefix::PF3 => b.push(0xf3),
        MandatoryPrefix::PF2 => b.push(0xf2),
        _ => {}
    }
    let wide = op.w() == 1 || (op.operand_size() == 64 && !op.default_op_size64());
    let mut rex = r.next() as u8 & if r.one_in(2) { 7 } else { 0 };
    if wide || (op.operand_size() == 64 && r.one_in(8)) {
        rex |= 8;
    }
    if mode == Mode::Long && (rex != 0 || r.one_in(4)) {
        b.push(0x40 | rex);
    }
    match map {
        1 => b.push(0x0f),
        2 => b.extend([0x0f, 0x38]),
        3 => b.extend([0x0f, 0x3a]),
        _ => {}
    }
    let mut code = op.op_code();
    let plus = op.op_kinds().iter().any(|k| {
        use OpCodeOperandKind as K;
        matches!(
            k,
            K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode
        )
    });
    if plus {
        code |= r.below(8) as u32;
    }
    if op.op_code_len() == 2 {
        b.push((code >> 8) as u8);
    }
    b.push(code as u8);
}

/// Decoder options of the host's vendor.
fn vendor() -> u32 {
    static AMD: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let b = std::arch::x86_64::__cpuid(0).ebx;
        b == u32::from_le_bytes(*b"Auth") || b == u32::from_le_bytes(*b"Hygo")
    });
    if *AMD {
        DecoderOptions::AMD
    } else {
        DecoderOptions::NONE
    }
}

fn decode(bytes: &[u8], mode: Mode) -> Option<(Instruction, ConstantOffsets)> {
    let mut d = Decoder::with_ip(mode.bits(), bytes, mode.code(), vendor());
    let i = d.decode();
    // LIMIT: the decoder takes F3 REX.B 90 for PAUSE; processors execute XCHG.
    if i.is_invalid()
        || (mode == Mode::Long
            && i.mnemonic() == Mnemonic::Pause
            && bytes[..i.len()].iter().any(|b| b & 0xf1 == 0x41))
    {
        return None;
    }
    let c = d.get_constant_offsets(&i);
    Some((i, c))
}

/// Decodes an instruction of a sequence.
pub fn decoded(mode: Mode, bytes: &[u8]) -> Instruction {
    decode(bytes, mode).map_or_else(Instruction::default, |(i, _)| i)
}

fn data_address(r: &mut Rng, mode: Mode) -> u64 {
    let at = if r.one_in(16) {
        Start::pointer(r)
    } else {
        DATA + 0x100 + (r.below(0x1c00) & !if r.one_in(4) { 0 } else { 63 })
    };
    at - mode.data_base()
}

/// True if the memory operand lies in the data, by the registers at the start.
fn hits(i: &Instruction, s: &Start) -> bool {
    for n in 0..i.op_count() {
        if i.op_kind(n) != OpKind::Memory || i.is_vsib() {
            continue;
        }
        let at = i.virtual_address(n, 0, |reg, _, _| {
            Some(match reg {
                Register::FS => s.fs_base,
                Register::GS => s.gs_base,
                Register::CS => s.mode.code() & !CODE,
                r if r.is_segment_register() => s.mode.data_base(),
                r if r.is_gpr() => s.gpr[r.number()],
                _ => 0,
            })
        });
        let Some(mut at) = at else { return false };
        if i.is_ip_rel_memory_operand() {
            continue;
        }
        if i.memory_base().is_gpr32() || i.memory_index().is_gpr32() {
            at &= 0xffff_ffff;
        }
        if !(DATA + 64..DATA + (DATA_BYTES + RO_BYTES) as u64 - 64).contains(&at) {
            return false;
        }
        let x = matches!(
            i.mnemonic(),
            Mnemonic::Xsave
                | Mnemonic::Xsave64
                | Mnemonic::Xsavec
                | Mnemonic::Xsavec64
                | Mnemonic::Xsaveopt
                | Mnemonic::Xsaveopt64
                | Mnemonic::Xrstor
                | Mnemonic::Xrstor64
        );
        if x && (!at.is_multiple_of(64) || at > DATA + 0x1000) {
            return false;
        }
        // Aligned where that matters to most instructions.
        if i.memory_size().size() >= 16 && !at.is_multiple_of(16) {
            return false;
        }
    }
    true
}

/// A random instruction of this form; `None` if none was found.
pub fn instruction(code: Code, r: &mut Rng, s: &Start, tries: usize) -> Option<Insn> {
    let op = code.op_code();
    let mut fallback = None;
    let wild = r.one_in(10);
    for _ in 0..tries {
        let mut b = candidate(op, r, s.mode)?;
        let Some((i, c)) = decode(&b, s.mode) else {
            continue;
        };
        if i.code() != code || i.len() > 15 {
            continue;
        }
        b.truncate(i.len());
        // LIMIT: EVEX.X has no meaning with a general-purpose register in ModRM.rm, but with it
        // set and RSP named, a processor at hand reads RSP as before the last push.
        let ignored_x = op.encoding() == EncodingKind::EVEX
            && b.iter()
                .position(|&x| x == 0x62)
                .is_some_and(|p| b[p + 1] & 0x40 == 0)
            && (0..i.op_count())
                .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr());
        if ignored_x {
            continue;
        }
        let mut insn = Insn {
            bytes: b,
            branch: None,
            rip_data: None,
            id: 0,
        };
        if c.displacement_size() > 0 {
            displacement(&mut insn, &i, &c, r, s.mode);
        }
        if c.immediate_size() > 0 {
            let at = c.immediate_offset();
            if matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32) {
                let far = far_pointer(c.immediate_size());
                insn.bytes[at..at + far.len()].copy_from_slice(&far);
            } else if matches!(
                i.op0_kind(),
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
            ) {
                insn.branch = Some((at, c.immediate_size(), u32::MAX));
            } else if i.mnemonic() == Mnemonic::Enter {
                insn.bytes[at + 1] = 0;
                insn.bytes[at + 2] &= if r.one_in(4) { 0x1f } else { 3 };
            } else if r.one_in(3) {
                // Small or simple.
                let v = super::machine::interesting(r).to_le_bytes();
                let n = c.immediate_size().min(8);
                insn.bytes[at..at + n].copy_from_slice(&v[..n]);
            }
        }
        let Some((j, _)) = decode(&insn.bytes, s.mode) else {
            continue;
        };
        if j.code() != code || j.len() != insn.bytes.len() {
            continue;
        }
        if matches!(j.mnemonic(), Mnemonic::In | Mnemonic::Out)
            && j.op_kinds().any(|k| k == OpKind::Immediate8)
            && j.immediate8() == super::guest::PORT
        {
            continue; // the harness has a use for it
        }
        if wild || hits(&j, s) {
            return Some(insn);
        }
        fallback = Some(insn);
    }
    fallback
}

fn displacement(insn: &mut Insn, i: &Instruction, c: &ConstantOffsets, r: &mut Rng, mode: Mode) {
    let (at, n) = (c.displacement_offset(), c.displacement_size());
    let lone = i.memory_base() == Register::None && i.memory_index() == Register::None;
    if i.is_ip_rel_memory_operand() {
        insn.rip_data = Some((at, data_address(r, mode)));
        return;
    }
    let v = if lone {
        data_address(r, mode) as i64
    } else if n == 1 {
        r.below(32) as i64 - 16
    } else if r.one_in(2) {
        (r.below(16) as i64 - 8) * 64
    } else {
        r.below(512) as i64 - 256
    };
    insn.bytes[at..at + n].copy_from_slice(&v.to_le_bytes()[..n]);
}

/// Offset and selector of the end for a far transfer with an offset of this many bytes; the
/// selector has 2 bytes.
pub fn far_pointer(offset_bytes: usize) -> Vec<u8> {
    let (offset, selector) = match offset_bytes {
        2 => (END16 as u64, CODE16),
        4 => (END32, 0x23),
        _ => (END, 0x33),
    };
    let mut b = offset.to_le_bytes()[..offset_bytes].to_vec();
    b.extend(selector.to_le_bytes());
    b
}

/// A sequence at a place in the code pages.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    pub mode: Mode,
    pub at: usize,
    pub insns: Vec<Insn>,
}

impl Sequence {
    /// The bytes, with displacements for this place and the final jump to `END`.
    pub fn bytes(&self) -> Vec<u8> {
        let mut starts = Vec::new();
        let mut at = self.at;
        for i in &self.insns {
            starts.push((i.id, at));
            at += i.bytes.len();
        }
        let end = at;
        let mut out = Vec::with_capacity(end - self.at + 5);
        for i in &self.insns {
            let mut b = i.bytes.clone();
            let next = self.at + out.len() + b.len();
            if let Some((off, n, target)) = i.branch {
                // A target that was removed: the next one that is there.
                let later = starts
                    .iter()
                    .filter(|(id, _)| *id >= target)
                    .min_by_key(|(id, _)| *id);
                let to = if target == u32::MAX {
                    end
                } else {
                    later.map_or(end, |(_, a)| *a)
                };
                let rel = to as i64 - next as i64;
                if n > 1 || i8::try_from(rel).is_ok() {
                    b[off..off + n].copy_from_slice(&rel.to_le_bytes()[..n]);
                } else {
                    b[off] = 0;
                }
            }
            if let Some((off, target)) = i.rip_data {
                let mut rel = target.wrapping_sub(CODE + next as u64);
                let d = decoded(self.mode, &b);
                if d.memory_base() == Register::EIP {
                    rel &= 0xffff_ffff;
                }
                b[off..off + 4].copy_from_slice(&rel.to_le_bytes()[..4]);
            }
            out.extend(b);
        }
        out.extend(self.mode.way_out(end));
        out
    }
}

/// Why a form is not compared with the host.
pub fn excluded(code: Code, mode: Mode) -> Option<&'static str> {
    use Mnemonic::*;
    let op = code.op_code();
    if !op.is_instruction() {
        return Some("not an instruction");
    }
    let exists = match mode {
        Mode::Long => op.mode64(),
        Mode::Flat32 => op.mode32(),
        Mode::Seg16 => op.mode16(),
    };
    if !exists {
        return Some("does not exist in this mode");
    }
    if op.decoder_option() & !DecoderOptions::AMD != 0 || matches!(op.mnemonic(), Montmul | Pcommit)
    {
        return Some("an extension of no processor that hosts this");
    }
    if code == Code::Popw_CS {
        return Some("an instruction of the 8086 only");
    }
    if op.fwait() {
        return Some("two instructions, WAIT and another");
    }
    Some(match op.mnemonic() {
        Cpuid | Xgetbv | Rdtsc | Rdtscp | Rdpid | Rdpmc | Rdpru => {
            "the answer is the machine's, not the processor's"
        }
        Rdrand | Rdseed => "random by definition",
        Syscall | Sysenter | Sysret | Sysretq | Sysexit | Sysexitq | Int | Int1 => {
            "enters the host's kernel; see the conformance suite"
        }
        Sgdt | Sidt | Sldt | Str | Smsw => {
            "the host's kernel emulates it; see the conformance suite"
        }
        Xbegin | Xend | Xabort | Xtest => "transactions are not announced",
        Vmcall | Vmmcall | Vmfunc => "a call to the host's hypervisor",
        Monitor | Mwait | Monitorx | Mwaitx | Umonitor | Umwait | Tpause => {
            "waits; see the conformance suite"
        }
        Invlpga | Skinit | Vmload | Vmrun | Vmsave | Stgi | Clgi | Getsec | Rsm => {
            "belongs to the host's hypervisor"
        }
        _ => return None,
    })
}

/// True for instructions that use selectors: [`super::forms`] gives them good ones.
pub fn takes_selectors(code: Code) -> bool {
    use Mnemonic::*;
    use OpCodeOperandKind as K;
    let op = code.op_code();
    matches!(
        op.mnemonic(),
        Iret | Iretd | Iretq | Retf | Lar | Lsl | Verr | Verw | Lss | Lfs | Lgs | Lds | Les
    ) || is_far(code)
        || matches!(op.mnemonic(), Mov | Pop)
            && op.op_kinds().first().is_some_and(|k| {
                matches!(
                    k,
                    K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs
                )
            })
}

/// True for far JMP and CALL.
pub fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Call_ptr1616
            | Code::Call_ptr1632
    )
}
