//! Moves, arithmetic, conditions, stack instructions, flags.

use iced_x86::{Code, ConditionCode, DecoderOptions, Instruction, OpKind, Register};
use pyrite_x86::bits::rflags::{self, AF, CF, OF, PF, SF, ZF};
use pyrite_x86::gpr;

use crate::exception::{Exception, Trap};
use crate::interp::operand::{
    address_mask, mem_lin, offset, read, read_reg, segment, size_mask, write, write_reg,
};
use crate::interp::{Op, alu, memory, stack};
use crate::sys::Next;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// What a handler returns.
pub type Done = Result<Next, Trap>;

const NEXT: Done = Ok(Next::Sequential);

/// Two-operand arithmetic: `f(size, a, b, flags)`. `WRITE`: operand 0 receives the result.
#[inline(always)]
fn binary<const WRITE: bool>(
    v: &mut SoftVcpu,
    op: &Op,
    f: impl Fn(usize, u64, u64, &mut u64) -> u64,
) -> Done {
    let (i, size) = (&op.i, op.size);
    let b = read(v, i, 1, size)?;
    let mut flags = v.frame.cpu.rflags;
    if !WRITE || i.op0_kind() == OpKind::Register {
        let a = read(v, i, 0, size)?;
        let r = f(size, a, b, &mut flags);
        if WRITE {
            write_reg(v, i.op0_register(), r);
        }
    } else {
        let before = flags;
        memory::modify(v, op, i.has_lock_prefix(), |a| {
            flags = before;
            f(size, a, b, &mut flags)
        })?;
    }
    v.frame.cpu.rflags = flags;
    NEXT
}

/// One-operand arithmetic.
#[inline(always)]
fn unary(v: &mut SoftVcpu, op: &Op, f: impl Fn(usize, u64, &mut u64) -> u64) -> Done {
    let (i, size) = (&op.i, op.size);
    let mut flags = v.frame.cpu.rflags;
    if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        let new = f(size, read_reg(v, r), &mut flags);
        write_reg(v, r, new);
    } else {
        let before = flags;
        memory::modify(v, op, i.has_lock_prefix(), |a| {
            flags = before;
            f(size, a, &mut flags)
        })?;
    }
    v.frame.cpu.rflags = flags;
    NEXT
}

macro_rules! handlers {
    ($shape:expr, $($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`.")]
        pub fn $name(v: &mut SoftVcpu, op: &Op) -> Done {
            $shape(v, op, alu::$name)
        }
    )*};
}

handlers! { binary::<true>, add or adc sbb and sub xor rol ror rcl rcr shl shr sar }
handlers! { binary::<false>, cmp test }
handlers! { unary, inc dec neg }

/// `not`.
pub fn not(v: &mut SoftVcpu, op: &Op) -> Done {
    unary(v, op, |_, a, _| !a)
}

/// Shifts by an immediate or CL: the count is a byte whatever the operand size.
macro_rules! shifts {
    ($($name:ident $f:ident;)*) => {$(
        #[doc = concat!("`", stringify!($f), "` with a byte as count.")]
        pub fn $name(v: &mut SoftVcpu, op: &Op) -> Done {
            let count = read(v, &op.i, 1, 1)?;
            unary(v, op, |size, a, flags| alu::$f(size, a, count, flags))
        }
    )*};
}

shifts! {
    shift_rol rol; shift_ror ror; shift_rcl rcl; shift_rcr rcr; shift_shl shl; shift_shr shr;
    shift_sar sar;
}

/// SHLD.
pub fn shld(v: &mut SoftVcpu, op: &Op) -> Done {
    let b = read(v, &op.i, 1, op.size)?;
    let count = read(v, &op.i, 2, 1)?;
    unary(v, op, |size, a, flags| alu::shld(size, a, b, count, flags))
}

/// SHRD.
pub fn shrd(v: &mut SoftVcpu, op: &Op) -> Done {
    let b = read(v, &op.i, 1, op.size)?;
    let count = read(v, &op.i, 2, 1)?;
    unary(v, op, |size, a, flags| alu::shrd(size, a, b, count, flags))
}

/// MOV of general-purpose registers, memory and immediates; MOVNTI.
pub fn mov(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = read(v, &op.i, 1, op.size)?;
    write(v, &op.i, 0, x, op.size)?;
    NEXT
}

/// MOV from a segment register: a register operand is zero-extended, memory gets 16 bits.
pub fn mov_from_sreg(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = read_reg(v, op.i.op1_register());
    write(v, &op.i, 0, x, 2)?;
    NEXT
}

/// MOVZX.
pub fn movzx(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = read(v, &op.i, 1, source_size(&op.i))?;
    write_reg(v, op.i.op0_register(), x);
    NEXT
}

/// MOVSX, MOVSXD.
pub fn movsx(v: &mut SoftVcpu, op: &Op) -> Done {
    let size = source_size(&op.i);
    // AMD's processors load 32 bits whatever the operand size of MOVSXD.
    let loads_dword = op.i.code() == Code::Movsxd_r16_rm16
        && op.i.op1_kind() == OpKind::Memory
        && v.interp.options & DecoderOptions::AMD != 0;
    let x = read(v, &op.i, 1, if loads_dword { 4 } else { size })?;
    write_reg(v, op.i.op0_register(), sign_extend(x, size) as u64);
    NEXT
}

fn source_size(i: &Instruction) -> usize {
    if i.op1_kind() == OpKind::Register {
        i.op1_register().size()
    } else {
        i.memory_size().size()
    }
}

/// Sign extension of the low `size` bytes.
#[inline]
pub fn sign_extend(x: u64, size: usize) -> i64 {
    let shift = 64 - 8 * size as u32;
    (x << shift) as i64 >> shift
}

/// LEA.
pub fn lea(v: &mut SoftVcpu, op: &Op) -> Done {
    let o = offset(v, &op.i);
    write_reg(v, op.i.op0_register(), o);
    NEXT
}

/// XCHG; implicitly locked with memory.
pub fn xchg(v: &mut SoftVcpu, op: &Op) -> Done {
    let i = &op.i;
    let (target, source) = if i.op0_kind() == OpKind::Memory {
        (None, i.op1_register())
    } else if i.op1_kind() == OpKind::Memory {
        (None, i.op0_register())
    } else {
        (Some(i.op0_register()), i.op1_register())
    };
    let new = read_reg(v, source);
    let old = match target {
        Some(r) => {
            let old = read_reg(v, r);
            write_reg(v, r, new);
            old
        }
        None => memory::modify(v, op, true, |_| new)?,
    };
    write_reg(v, source, old);
    NEXT
}

/// XADD.
pub fn xadd(v: &mut SoftVcpu, op: &Op) -> Done {
    let (i, size) = (&op.i, op.size);
    let b = read_reg(v, i.op1_register());
    let mut flags = v.frame.cpu.rflags;
    if i.op0_kind() == OpKind::Register {
        let a = read_reg(v, i.op0_register());
        let sum = alu::add(size, a, b, &mut flags);
        write_reg(v, i.op1_register(), a);
        write_reg(v, i.op0_register(), sum);
    } else {
        let before = flags;
        let a = memory::modify(v, op, i.has_lock_prefix(), |a| {
            flags = before;
            alu::add(size, a, b, &mut flags)
        })?;
        write_reg(v, i.op1_register(), a);
    }
    v.frame.cpu.rflags = flags;
    NEXT
}

fn accumulator(size: usize) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

/// CMPXCHG. The memory operand is always written, with its old value if they differ.
pub fn cmpxchg(v: &mut SoftVcpu, op: &Op) -> Done {
    let (i, size) = (&op.i, op.size);
    let acc = accumulator(size);
    let expected = read_reg(v, acc);
    let new = read_reg(v, i.op1_register());
    let old = if i.op0_kind() == OpKind::Register {
        let old = read_reg(v, i.op0_register());
        if old == expected {
            write_reg(v, i.op0_register(), new);
        }
        old
    } else {
        let lock = i.has_lock_prefix();
        memory::modify(v, op, lock, |old| if old == expected { new } else { old })?
    };
    let mut flags = v.frame.cpu.rflags;
    alu::cmp(size, expected, old, &mut flags);
    v.frame.cpu.rflags = flags;
    if old != expected {
        write_reg(v, acc, old);
    }
    NEXT
}

/// CMPXCHG8B.
pub fn cmpxchg8b(v: &mut SoftVcpu, op: &Op) -> Done {
    let g = &v.frame.cpu.gpr;
    let join = |hi: u64, lo: u64| hi << 32 | lo & 0xffff_ffff;
    let expected = join(g[gpr::RDX], g[gpr::RAX]);
    let new = join(g[gpr::RCX], g[gpr::RBX]);
    let lock = op.i.has_lock_prefix();
    let old = memory::modify(v, op, lock, |old| if old == expected { new } else { old })?;
    if old == expected {
        v.frame.cpu.rflags |= ZF;
    } else {
        v.frame.cpu.rflags &= !ZF;
        write_reg(v, Register::EAX, old);
        write_reg(v, Register::EDX, old >> 32);
    }
    NEXT
}

/// CMPXCHG16B.
pub fn cmpxchg16b(v: &mut SoftVcpu, op: &Op) -> Done {
    let lin = mem_lin(v, &op.i, 16, SegAccess::Write);
    // Alignment comes before what the stack segment has to say about the address.
    if lin.as_ref().map_or_else(|_| offset(v, &op.i), |l| *l) & 15 != 0 {
        return Err(Exception::gp(0).into());
    }
    let lin = lin?;
    let g = &v.frame.cpu.gpr;
    let join = |hi: u64, lo: u64| u128::from(hi) << 64 | u128::from(lo);
    let expected = join(g[gpr::RDX], g[gpr::RAX]);
    let new = join(g[gpr::RCX], g[gpr::RBX]);
    let old = memory::compare_swap_16(v, lin, expected, new)?;
    if old == expected {
        v.frame.cpu.rflags |= ZF;
    } else {
        v.frame.cpu.rflags &= !ZF;
        v.frame.cpu.gpr[gpr::RAX] = old as u64;
        v.frame.cpu.gpr[gpr::RDX] = (old >> 64) as u64;
    }
    NEXT
}

/// BSWAP; of a 16-bit register the result is undefined, and 0 on every known processor.
pub fn bswap(v: &mut SoftVcpu, op: &Op) -> Done {
    let r = op.i.op0_register();
    let x = read_reg(v, r);
    let y = match op.size {
        8 => x.swap_bytes(),
        4 => u64::from((x as u32).swap_bytes()),
        _ => 0,
    };
    write_reg(v, r, y);
    NEXT
}

/// MOVBE.
pub fn movbe(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = read(v, &op.i, 1, op.size)?;
    let y = x.swap_bytes() >> (64 - 8 * op.size as u32);
    write(v, &op.i, 0, y, op.size)?;
    NEXT
}

/// The condition of Jcc, SETcc, CMOVcc, LOOPcc.
#[inline]
pub fn condition(cc: ConditionCode, f: u64) -> bool {
    let has = |m: u64| f & m != 0;
    let less = has(SF) != has(OF);
    match cc {
        ConditionCode::None => true,
        ConditionCode::o => has(OF),
        ConditionCode::no => !has(OF),
        ConditionCode::b => has(CF),
        ConditionCode::ae => !has(CF),
        ConditionCode::e => has(ZF),
        ConditionCode::ne => !has(ZF),
        ConditionCode::be => has(CF | ZF),
        ConditionCode::a => !has(CF | ZF),
        ConditionCode::s => has(SF),
        ConditionCode::ns => !has(SF),
        ConditionCode::p => has(PF),
        ConditionCode::np => !has(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || has(ZF),
        ConditionCode::g => !less && !has(ZF),
    }
}

/// CMOVcc: memory is read whatever the condition, and a 32-bit register is zero-extended.
pub fn cmov(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = read(v, &op.i, 1, op.size)?;
    let r = op.i.op0_register();
    let taken = condition(op.i.condition_code(), v.frame.cpu.rflags);
    let y = if taken { x } else { read_reg(v, r) };
    write_reg(v, r, y);
    NEXT
}

/// SETcc.
pub fn setcc(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = u64::from(condition(op.i.condition_code(), v.frame.cpu.rflags));
    write(v, &op.i, 0, x, 1)?;
    NEXT
}

/// CBW, CWDE, CDQE; `size` is that of the source.
pub fn extend_accumulator(v: &mut SoftVcpu, op: &Op) -> Done {
    let x = sign_extend(v.frame.cpu.gpr[gpr::RAX], op.size) as u64;
    write_reg(v, accumulator(2 * op.size), x);
    NEXT
}

/// CWD, CDQ, CQO; `size` is that of the source.
pub fn extend_to_rdx(v: &mut SoftVcpu, op: &Op) -> Done {
    let sign = (sign_extend(v.frame.cpu.gpr[gpr::RAX], op.size) >> 63) as u64;
    let r = match op.size {
        2 => Register::DX,
        4 => Register::EDX,
        _ => Register::RDX,
    };
    write_reg(v, r, sign);
    NEXT
}

/// PUSH of a register (segment registers too), memory or immediate.
pub fn push(v: &mut SoftVcpu, op: &Op) -> Done {
    let i = &op.i;
    let x = match i.op0_kind() {
        // A selector is 16 bits; the rest of the slot is written as 0.
        OpKind::Register => read_reg(v, i.op0_register()),
        _ => read(v, i, 0, op.size)?,
    };
    stack::push(v, x, op.size)?;
    NEXT
}

/// POP to a register or memory. An address based on RSP uses its value after the pop.
pub fn pop(v: &mut SoftVcpu, op: &Op) -> Done {
    let sp = v.frame.cpu.gpr[gpr::RSP];
    let x = stack::pop(v, op.size)?;
    if let Err(e) = write(v, &op.i, 0, x, op.size) {
        v.frame.cpu.gpr[gpr::RSP] = sp;
        return Err(e.into());
    }
    NEXT
}

/// PUSHA, PUSHAD.
pub fn pusha(v: &mut SoftVcpu, op: &Op) -> Done {
    let size = op.size as u64;
    // As the processor does it: EAX to the highest slot first.
    for n in 0..8u64 {
        let x = v.frame.cpu.gpr[n as usize];
        let below = size.wrapping_mul(n + 1).wrapping_neg();
        stack::write_stack(v, below, x, op.size)?;
    }
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_sub(8 * size);
    stack::set_sp(v, sp);
    NEXT
}

/// POPA, POPAD: the saved stack pointer is skipped.
pub fn popa(v: &mut SoftVcpu, op: &Op) -> Done {
    let size = op.size as u64;
    for n in (0..8).rev() {
        let x = stack::read_stack(v, size * (7 - n as u64), op.size)?;
        // As the processor does it: what was read before a fault stays in its register. The
        // instruction can be repeated, because the stack pointer moves last.
        if n != gpr::RSP {
            let r = &mut v.frame.cpu.gpr[n];
            *r = *r & !size_mask(op.size) & 0xffff_ffff | x;
        }
    }
    let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_add(8 * size);
    stack::set_sp(v, sp);
    NEXT
}

/// ENTER, with nesting. Intel SDM Vol. 2A.
pub fn enter(v: &mut SoftVcpu, op: &Op) -> Done {
    let size = op.size as u64;
    let alloc = op.i.immediate(0) & 0xffff;
    let level = op.i.immediate(1) & 31;
    let mask = stack::stack_mask(v);
    let (old_sp, rbp) = (v.frame.cpu.gpr[gpr::RSP], v.frame.cpu.gpr[gpr::RBP]);
    let body = |v: &mut SoftVcpu| -> Result<(), Exception> {
        stack::push(v, rbp, op.size)?;
        let frame = v.frame.cpu.gpr[gpr::RSP];
        for n in 1..level {
            let at = rbp.wrapping_sub(n * size) & mask;
            let lin = v.linear(pyrite_x86::sreg::SS, at, op.size, SegAccess::Read)?;
            let x = memory::load(v, lin, op.size)?;
            stack::push(v, x, op.size)?;
        }
        if level > 0 {
            stack::push(v, frame, op.size)?;
        }
        let sp = v.frame.cpu.gpr[gpr::RSP].wrapping_sub(alloc);
        stack::set_sp(v, sp);
        // The new top of the stack must be writable; nothing is written there.
        let sp = v.frame.cpu.gpr[gpr::RSP] & mask;
        let lin = v.linear(pyrite_x86::sreg::SS, sp, op.size, SegAccess::Write)?;
        v.probe_write(lin, op.size, crate::mmu::Priv::Current)?;
        let r = match op.size {
            2 => Register::BP,
            4 => Register::EBP,
            _ => Register::RBP,
        };
        write_reg(v, r, frame);
        Ok(())
    };
    if let Err(e) = body(v) {
        v.frame.cpu.gpr[gpr::RSP] = old_sp;
        return Err(e.into());
    }
    NEXT
}

/// LEAVE.
pub fn leave(v: &mut SoftVcpu, op: &Op) -> Done {
    let sp = v.frame.cpu.gpr[gpr::RSP];
    let rbp = v.frame.cpu.gpr[gpr::RBP];
    stack::set_sp(v, rbp);
    match stack::pop(v, op.size) {
        Ok(x) => {
            let r = match op.size {
                2 => Register::BP,
                4 => Register::EBP,
                _ => Register::RBP,
            };
            write_reg(v, r, x);
            NEXT
        }
        Err(e) => {
            v.frame.cpu.gpr[gpr::RSP] = sp;
            Err(e.into())
        }
    }
}

/// XLATB: the base register has the address size.
pub fn xlat(v: &mut SoftVcpu, op: &Op) -> Done {
    let al = v.frame.cpu.gpr[gpr::RAX] & 0xff;
    // The decoder shows the operand as [rBX+AL].
    let o = read_reg(v, op.i.memory_base()).wrapping_add(al) & address_mask(&op.i);
    let lin = v.linear(segment(&op.i), o, 1, SegAccess::Read)?;
    let x = memory::load(v, lin, 1)?;
    write_reg(v, Register::AL, x);
    NEXT
}

/// SALC (undocumented): AL = CF ? FFH : 0.
pub fn salc(v: &mut SoftVcpu, _: &Op) -> Done {
    let x = if v.frame.cpu.rflags & CF != 0 {
        0xff
    } else {
        0
    };
    write_reg(v, Register::AL, x);
    NEXT
}

/// LAHF.
pub fn lahf(v: &mut SoftVcpu, _: &Op) -> Done {
    let f = v.frame.cpu.rflags & (SF | ZF | AF | PF | CF) | rflags::FIXED1;
    write_reg(v, Register::AH, f);
    NEXT
}

/// SAHF.
pub fn sahf(v: &mut SoftVcpu, _: &Op) -> Done {
    const M: u64 = SF | ZF | AF | PF | CF;
    let ah = read_reg(v, Register::AH);
    let f = &mut v.frame.cpu.rflags;
    *f = *f & !M | ah & M;
    NEXT
}

/// CLC, STC, CMC, CLD, STD.
macro_rules! flag_handlers {
    ($($name:ident: $f:ident => $e:expr;)*) => {$(
        #[doc = concat!("`", stringify!($name), "`.")]
        pub fn $name(v: &mut SoftVcpu, _: &Op) -> Done {
            let $f = v.frame.cpu.rflags;
            v.frame.cpu.rflags = $e;
            NEXT
        }
    )*};
}

flag_handlers! {
    clc: f => f & !CF;
    stc: f => f | CF;
    cmc: f => f ^ CF;
    cld: f => f & !rflags::DF;
    std: f => f | rflags::DF;
}

/// NOP, PAUSE, hints, cache control that has no effect here.
pub fn nop(_: &mut SoftVcpu, _: &Op) -> Done {
    NEXT
}

/// Fences and serialising instructions: the host's fence, which is stronger than needed.
pub fn fence(_: &mut SoftVcpu, _: &Op) -> Done {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    NEXT
}

/// CLFLUSH, CLFLUSHOPT, CLWB: only the checks of a byte load.
pub fn touch(v: &mut SoftVcpu, op: &Op) -> Done {
    let lin = mem_lin(v, &op.i, 1, SegAccess::Read)?;
    let kind = pyrite_x86::paging::AccessKind::Read;
    v.probe(lin, 1, kind, crate::mmu::Priv::Current)?;
    NEXT
}

/// MOVDIR64B: 64 bytes to ES:[register], which must be aligned.
pub fn movdir64b(v: &mut SoftVcpu, op: &Op) -> Done {
    let from = mem_lin(v, &op.i, 64, SegAccess::Read)?;
    let mut data = [0u8; 64];
    v.read_bytes(from, &mut data, crate::mmu::Priv::Current)?;
    let to = read_reg(v, op.i.op0_register());
    let lin = v.linear(pyrite_x86::sreg::ES, to, 64, SegAccess::Write)?;
    if lin & 63 != 0 {
        return Err(Exception::gp(0).into());
    }
    v.write_bytes(lin, &data, crate::mmu::Priv::Current)?;
    NEXT
}

/// CLZERO: zeroes the cache line around DS:rAX. AMD APM Vol. 3.
pub fn clzero(v: &mut SoftVcpu, op: &Op) -> Done {
    let at = match op.bits {
        64 => v.frame.cpu.gpr[gpr::RAX],
        _ => v.frame.cpu.gpr[gpr::RAX] & 0xffff_ffff,
    } & !63;
    let seg = match op.i.segment_prefix() {
        Register::None => pyrite_x86::sreg::DS,
        r => crate::interp::operand::segment_number(r),
    };
    let lin = v.linear(seg, at, 64, SegAccess::Write)?;
    v.write_bytes(lin, &[0; 64], crate::mmu::Priv::Current)?;
    NEXT
}

/// UD0, UD1, UD2 and whatever is not an instruction of this processor.
pub fn undefined(_: &mut SoftVcpu, _: &Op) -> Done {
    Err(Exception::UD.into())
}
