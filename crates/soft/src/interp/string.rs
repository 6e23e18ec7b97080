//! String instructions. A repeated one does a bounded number of iterations per step and leaves
//! RIP on itself, so that interrupts are taken in time, as on the processor.

// UNSAFETY: copies and fills whole runs inside pages that the soft TLB vouches for.
#![allow(unsafe_code, reason = "runs of memory at host speed")]

use std::sync::atomic::Ordering;

use iced_x86::{Instruction, OpKind, Register};
use pyrite_x86::bits::rflags;
use pyrite_x86::{gpr, sreg};

use crate::exception::Exception;
use crate::interp::integer::Done;
use crate::interp::operand::{alignment_checked, read_reg, segment, size_mask, write_reg};
use crate::interp::{Op, alu, memory};
use crate::mmu::Priv;
use crate::sys::Next;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// LIMIT: bytes that one step moves at most; bounds the latency of interrupts.
const BYTES_PER_STEP: u64 = 16 * 4096;
/// LIMIT: iterations that one step does at most when they go one by one.
const ITERATIONS_PER_STEP: u64 = 1024;

/// What a string instruction does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Cmps,
    Scas,
    Lods,
    Stos,
}

/// True for a string instruction with a repeat prefix.
pub fn repeats(i: &Instruction) -> bool {
    i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix())
}

/// Size of the index registers in bytes.
fn address_size(i: &Instruction) -> usize {
    let kind = |op| match i.op_kind(op) {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
        _ => None,
    };
    kind(0).or(kind(1)).unwrap_or(4)
}

/// The registers of a string instruction at the address size.
struct Walk {
    size: u64,
    mask: u64,
    address_bytes: usize,
    source: usize,
    down: bool,
}

impl Walk {
    fn new(v: &SoftVcpu, op: &Op) -> Walk {
        let address_bytes = address_size(&op.i);
        Walk {
            size: op.size as u64,
            mask: size_mask(address_bytes),
            address_bytes,
            source: segment(&op.i),
            down: v.frame.cpu.rflags & rflags::DF != 0,
        }
    }

    fn get(&self, v: &SoftVcpu, r: usize) -> u64 {
        v.frame.cpu.gpr[r] & self.mask
    }

    fn set(&self, v: &mut SoftVcpu, r: usize, value: u64) {
        let q = &mut v.frame.cpu.gpr[r];
        *q = match self.address_bytes {
            2 => *q & !0xffff | value & 0xffff,
            _ => value & self.mask,
        };
    }

    /// Moves an index register by `n` elements.
    fn advance(&self, v: &mut SoftVcpu, r: usize, n: u64) {
        let by = self.size.wrapping_mul(n);
        let at = self.get(v, r);
        let to = if self.down {
            at.wrapping_sub(by)
        } else {
            at.wrapping_add(by)
        };
        self.set(v, r, to);
    }

    fn lin(&self, v: &SoftVcpu, seg: usize, r: usize, access: SegAccess) -> Result<u64, Exception> {
        let lin = v.linear(seg, self.get(v, r), self.size as usize, access)?;
        if lin & (self.size - 1) != 0 && alignment_checked(v) {
            return Err(Exception::AC);
        }
        Ok(lin)
    }

    /// Elements from index register `r` upwards that stay in one page and do not wrap, and the
    /// linear address of the first; 0 if the segment forbids the run.
    fn run(&self, v: &SoftVcpu, seg: usize, r: usize, most: u64, access: SegAccess) -> (u64, u64) {
        let at = self.get(v, r);
        let Ok(lin) = self.lin(v, seg, r, access) else {
            return (0, 0);
        };
        let room = (0x1000 - (lin & 0xfff)).min((self.mask - at).saturating_add(1).max(1));
        let n = most.min(room / self.size);
        if n == 0 || v.linear(seg, at, (n * self.size) as usize, access).is_err() {
            return (0, 0);
        }
        (n, lin)
    }
}

/// One iteration; registers other than RCX are updated. Faults come before any change.
#[inline]
fn iterate(v: &mut SoftVcpu, op: &Op, w: &Walk, kind: Kind) -> Result<(), Exception> {
    let size = op.size;
    let read_source = |v: &mut SoftVcpu| {
        let lin = w.lin(v, w.source, gpr::RSI, SegAccess::Read)?;
        memory::load(v, lin, size)
    };
    let read_target = |v: &mut SoftVcpu| {
        let lin = w.lin(v, sreg::ES, gpr::RDI, SegAccess::Read)?;
        memory::load(v, lin, size)
    };
    let acc = match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    let compare = |v: &mut SoftVcpu, a: u64, b: u64| {
        let mut flags = v.frame.cpu.rflags;
        alu::cmp(size, a, b, &mut flags);
        v.frame.cpu.rflags = flags;
    };
    match kind {
        Kind::Movs => {
            let x = read_source(v)?;
            let lin = w.lin(v, sreg::ES, gpr::RDI, SegAccess::Write)?;
            memory::store(v, lin, x, size)?;
        }
        Kind::Stos => {
            let lin = w.lin(v, sreg::ES, gpr::RDI, SegAccess::Write)?;
            memory::store(v, lin, read_reg(v, acc), size)?;
        }
        Kind::Lods => {
            let x = read_source(v)?;
            write_reg(v, acc, x);
        }
        Kind::Scas => {
            let x = read_target(v)?;
            compare(v, read_reg(v, acc), x);
        }
        Kind::Cmps => {
            let a = read_source(v)?;
            let b = read_target(v)?;
            compare(v, a, b);
        }
    }
    if matches!(kind, Kind::Movs | Kind::Lods | Kind::Cmps) {
        w.advance(v, gpr::RSI, 1);
    }
    if kind != Kind::Lods {
        w.advance(v, gpr::RDI, 1);
    }
    Ok(())
}

/// Does as many iterations of an ascending REP MOVS or REP STOS as one page allows at once.
/// Returns how many; 0 = use [`iterate`].
fn fast(v: &mut SoftVcpu, w: &Walk, kind: Kind, count: u64) -> u64 {
    let most = count.min(BYTES_PER_STEP / w.size);
    let (n, to) = w.run(v, sreg::ES, gpr::RDI, most, SegAccess::Write);
    if n == 0 {
        return 0;
    }
    let view = v.view(Priv::Current);
    if kind == Kind::Stos {
        let len = (n * w.size) as usize;
        let Some(p) = v.hit(to, len, view, true) else {
            return 0;
        };
        let x = v.frame.cpu.gpr[gpr::RAX];
        // SAFETY: a write hit proves that len bytes at p are guest RAM without duties.
        unsafe {
            match w.size {
                1 => p.write_bytes(x as u8, len),
                _ if x & size_mask(w.size as usize) == 0 => p.write_bytes(0, len),
                2 => (0..n as usize).for_each(|k| p.cast::<u16>().add(k).write_unaligned(x as u16)),
                4 => (0..n as usize).for_each(|k| p.cast::<u32>().add(k).write_unaligned(x as u32)),
                _ => (0..n as usize).for_each(|k| p.cast::<u64>().add(k).write_unaligned(x)),
            }
        }
        w.advance(v, gpr::RDI, n);
        return n;
    }
    let (n, from) = w.run(v, w.source, gpr::RSI, n, SegAccess::Read);
    let len = (n * w.size) as usize;
    if n == 0 {
        return 0;
    }
    let (Some(src), Some(dst)) = (v.hit(from, len, view, false), v.hit(to, len, view, true)) else {
        return 0;
    };
    // A target just above the source repeats what was written: element by element.
    let ahead = (dst as usize).wrapping_sub(src as usize);
    if ahead != 0 && ahead < len {
        return 0;
    }
    // SAFETY: hits prove both runs; `copy` allows the remaining overlap (target below source).
    unsafe { std::ptr::copy(src, dst, len) };
    w.advance(v, gpr::RSI, n);
    w.advance(v, gpr::RDI, n);
    n
}

#[inline]
fn run(v: &mut SoftVcpu, op: &Op, kind: Kind) -> Done {
    let w = Walk::new(v, op);
    if !repeats(&op.i) {
        iterate(v, op, &w, kind)?;
        return Ok(Next::Sequential);
    }
    let compares = matches!(kind, Kind::Cmps | Kind::Scas);
    let single_step = v.frame.cpu.rflags & rflags::TF != 0;
    let may_run =
        matches!(kind, Kind::Movs | Kind::Stos) && !w.down && !single_step && !alignment_checked(v);
    let mut bytes_left = BYTES_PER_STEP;
    let mut iterations = 0;
    loop {
        let count = w.get(v, gpr::RCX);
        if count == 0 {
            return Ok(Next::Sequential);
        }
        let n = if may_run { fast(v, &w, kind, count) } else { 0 };
        let n = if n == 0 {
            iterate(v, op, &w, kind)?;
            1
        } else {
            n
        };
        w.set(v, gpr::RCX, count - n);
        if compares {
            let equal = v.frame.cpu.rflags & rflags::ZF != 0;
            if equal == op.i.has_repne_prefix() {
                return Ok(Next::Sequential);
            }
        }
        if count == n {
            return Ok(Next::Sequential);
        }
        iterations += 1;
        bytes_left = bytes_left.saturating_sub(n * w.size);
        if single_step
            || v.pending_dr6 != 0
            || bytes_left == 0
            || iterations >= ITERATIONS_PER_STEP
            || v.shared().events.load(Ordering::Relaxed) != 0
        {
            return Ok(Next::Jumped);
        }
    }
}

macro_rules! handlers {
    ($($name:ident $kind:ident;)*) => {$(
        #[doc = concat!(stringify!($kind), " of every size, repeated or not.")]
        pub fn $name(v: &mut SoftVcpu, op: &Op) -> Done {
            run(v, op, Kind::$kind)
        }
    )*};
}

handlers! { movs Movs; cmps Cmps; scas Scas; lods Lods; stos Stos; }
