//! The interpreter: complete, and the reference for the translator.
//!
//! [`step`] executes one instruction with everything around it. An instruction is decoded once
//! into an [`Op`], which names the function that executes it; the decode cache proves on each hit
//! that the bytes in memory are still the same, so it never needs invalidation.
//!
//! Integer instructions are written out in Rust around single host instructions ([`alu`]), so that
//! even undefined flags are the host's. Vector and x87 computation runs on the host's own units
//! ([`native`]). What concerns the system is in [`crate::sys`].
//!
//! Rule for every instruction: whatever can fault comes before the first change of a register.

// UNSAFETY: reads code bytes through the address that `GuestMemory` bounds.
#![allow(unsafe_code, reason = "reads code bytes of guest RAM")]

pub mod alu;
pub mod bits;
pub mod branch;
pub mod decimal;
pub mod integer;
pub mod memory;
pub mod muldiv;
pub mod native;
pub mod operand;
pub mod select;
pub mod stack;
pub mod string;
#[cfg(test)]
mod tests;

use iced_x86::{
    Code, CodeSize, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, Register,
};
use pyrite_engine::{CpuidEntry, CpuidTable, EngineError};
use pyrite_x86::bits::rflags;
use pyrite_x86::{InterruptShadow, sreg};

use crate::exception::{Exception, Trap};
use crate::sys::{self, Next};
use crate::vcpu::SoftVcpu;

/// Executes one decoded instruction.
pub type Handler = fn(&mut SoftVcpu, &Op) -> Result<Next, Trap>;

/// A decoded instruction, ready to run.
#[derive(Clone, Copy)]
pub struct Op {
    /// As decoded, with the offset in the code segment as its IP.
    pub i: Instruction,
    /// What executes it.
    pub run: Handler,
    /// Size of operand 0 in bytes, or what the handler wants to know instead.
    pub size: usize,
    /// Width of the code it is in: 16, 32 or 64.
    pub bits: u32,
    /// Number of the prepared host instruction, for [`native`].
    pub plan: u32,
}

/// One slot of the decode cache.
struct Cached {
    /// Linear address; with `mode`, the key.
    lin: u64,
    /// Code width in bits; 0 = empty.
    mode: u32,
    /// The bytes that were decoded, little-endian, zero beyond the instruction.
    bytes: u128,
    op: Op,
}

/// Slots of the decode cache. LIMIT: about 120 bytes each.
const CACHE_SLOTS: usize = 8192;
/// Most bytes of an instruction. Intel SDM Vol. 2A §2.3.11.
const INSN_BYTES_MAX: usize = 15;

/// The interpreter's caches.
pub struct Interp {
    cache: Box<[Option<Cached>]>,
    /// Prepared host instructions.
    pub(crate) native: native::Native,
    /// How the decoder treats encodings on which vendors differ.
    options: u32,
}

impl Interp {
    /// Empty caches.
    pub fn new(cpuid: &CpuidTable) -> Result<Interp, EngineError> {
        Ok(Interp {
            cache: (0..CACHE_SLOTS).map(|_| None).collect(),
            native: native::Native::new(cpuid)?,
            options: vendor_options(cpuid.get(0, 0)),
        })
    }

    /// Empties the decode cache.
    pub(crate) fn forget(&mut self) {
        self.cache.iter_mut().for_each(|c| *c = None);
    }

    /// True if the guest's CPUID advertises the instruction, for the translator.
    pub fn allows(&self, i: &Instruction) -> bool {
        self.native.allows(i)
    }
}

/// Executes one instruction at CS:RIP and delivers the exception it raises, if any.
pub fn step(v: &mut SoftVcpu) -> Result<(), Trap> {
    v.stats.interpreted += 1;
    match one(v) {
        Ok(()) => Ok(()),
        Err(Trap::Exception(e)) => sys::event::exception(v, e),
        Err(stop) => Err(stop),
    }
}

/// Width of code in bits.
#[inline]
pub fn code_bits(v: &SoftVcpu) -> u32 {
    if v.long64() {
        64
    } else if v.frame.cpu.seg[sreg::CS].db() {
        32
    } else {
        16
    }
}

fn one(v: &mut SoftVcpu) -> Result<(), Trap> {
    let had_rf = v.frame.cpu.rflags & rflags::RF != 0;
    sys::debug::before_instruction(v)?;
    let op = decode(v)?;
    v.stats.by_mnemonic[op.i.mnemonic() as usize] += 1;
    let start = v.frame.cpu.rip;
    let mut single_step = v.frame.cpu.rflags & rflags::TF != 0;
    // The shadow lasts for one instruction; STI and MOV SS set it anew. RF holds for one
    // instruction too; a fault's stack image has RF set whatever it was.
    v.frame.cpu.interrupt_shadow = InterruptShadow::None;
    v.frame.cpu.rflags &= !rflags::RF;
    match (op.run)(v, &op)? {
        Next::Sequential => {
            let next = op.i.next_ip();
            v.frame.cpu.rip = if op.bits == 64 {
                next
            } else {
                next & 0xffff_ffff
            };
        }
        Next::Jumped => {
            // An interrupt or a system call that clears TF clears the trap as well.
            if matches!(
                op.i.mnemonic(),
                Mnemonic::Int
                    | Mnemonic::Int1
                    | Mnemonic::Int3
                    | Mnemonic::Into
                    | Mnemonic::Syscall
            ) {
                single_step &= v.frame.cpu.rflags & rflags::TF != 0;
            }
            // A repeated string instruction that goes on keeps RF.
            if had_rf && v.frame.cpu.rip == start && string::repeats(&op.i) {
                v.frame.cpu.rflags |= rflags::RF;
            }
        }
    }
    sys::debug::after_instruction(v, single_step)?;
    Ok(())
}

/// Bytes of the instruction at `lin`, zero-padded, how many are there, and the fault that the
/// next byte would raise.
#[inline]
fn code_bytes(v: &mut SoftVcpu, lin: u64) -> Result<(u128, usize, Option<Exception>), Exception> {
    if lin & 0xfff <= 0x1000 - 16 {
        let gpa = v.fetch_gpa(lin)?;
        if let Some(p) = v.vm.memory.read_ptr(gpa, 16) {
            // SAFETY: read_ptr proved that 16 bytes are RAM or ROM.
            let bytes = unsafe { p.cast::<u128>().read_unaligned() };
            return Ok((u128::from_le(bytes), INSN_BYTES_MAX, None));
        }
    }
    let mut b = [0u8; INSN_BYTES_MAX];
    let (n, fault) = v.fetch(lin, &mut b)?;
    let mut wide = [0u8; 16];
    wide[..n].copy_from_slice(&b[..n]);
    Ok((u128::from_le_bytes(wide), n, fault))
}

#[inline]
fn decode(v: &mut SoftVcpu) -> Result<Op, Exception> {
    let cpu = &v.frame.cpu;
    let mode = code_bits(v);
    let rip = cpu.rip;
    let cs = &cpu.seg[sreg::CS];
    let lin = if mode == 64 {
        if !v.canonical(rip) {
            return Err(Exception::gp(0));
        }
        rip
    } else {
        if rip > u64::from(cs.limit) {
            return Err(Exception::gp(0));
        }
        cs.base.wrapping_add(rip) & 0xffff_ffff
    };
    let (bytes, room, fault) = code_bytes(v, lin)?;
    let slot = (lin ^ lin >> 13) as usize & (CACHE_SLOTS - 1);
    let op = match &v.interp.cache[slot] {
        Some(c)
            if c.lin == lin
                && c.mode == mode
                && (bytes ^ c.bytes) << (128 - 8 * c.op.i.len() as u32) == 0
                && c.op.i.len() <= room
                && c.op.i.ip() == rip =>
        {
            c.op
        }
        _ => decode_new(v, lin, mode, bytes, room, fault)?,
    };
    if mode != 64 && rip + op.i.len() as u64 - 1 > u64::from(v.frame.cpu.seg[sreg::CS].limit) {
        return Err(Exception::gp(0));
    }
    Ok(op)
}

#[cold]
fn decode_new(
    v: &mut SoftVcpu,
    lin: u64,
    mode: u32,
    bytes: u128,
    room: usize,
    fault: Option<Exception>,
) -> Result<Op, Exception> {
    let raw = bytes.to_le_bytes();
    let rip = v.frame.cpu.rip;
    let mut decoder = Decoder::with_ip(mode, &raw[..room], rip, v.interp.options);
    let mut i = Instruction::default();
    decoder.decode_out(&mut i);
    match decoder.last_error() {
        DecoderError::None => {}
        DecoderError::NoMoreBytes => {
            // Either the instruction reaches into a page that faults, or it is too long.
            return Err(fault.unwrap_or(Exception::gp(0)));
        }
        // The decoder gives up at the 15th byte of what is too long.
        _ if decoder.position() == INSN_BYTES_MAX => return Err(Exception::gp(0)),
        _ => return Err(Exception::UD),
    }
    if i.code() == Code::INVALID {
        return Err(Exception::UD);
    }
    i.set_ip(rip);
    if let Some(x) = exchange_of_pause(&i, &raw) {
        i = x;
    }
    let op = select::select(v, &i, mode, bytes)?;
    let keep = u128::MAX >> (128 - 8 * i.len() as u32);
    let slot = (lin ^ lin >> 13) as usize & (CACHE_SLOTS - 1);
    v.interp.cache[slot] = Some(Cached {
        lin,
        mode,
        bytes: bytes & keep,
        op,
    });
    Ok(op)
}

/// True for F3 90 with REX.B, which the decoder takes for PAUSE. `bytes`: of the instruction and
/// what follows.
pub(crate) fn is_exchange(i: &Instruction, bytes: &[u8]) -> bool {
    i.code() == Code::Pause
        && i.code_size() == CodeSize::Code64
        && (i.len().checked_sub(2))
            .and_then(|rex| bytes.get(rex))
            .is_some_and(|b| b & 0xf1 == 0x41)
}

/// The instruction that F3 90 with REX.B is: XCHG of R8 and RAX, on which F3 has no effect.
/// Intel SDM Vol. 2B, NOP and XCHG.
fn exchange_of_pause(i: &Instruction, bytes: &[u8]) -> Option<Instruction> {
    if !is_exchange(i, bytes) {
        return None;
    }
    let prefixes = bytes.get(..i.len().checked_sub(2)?)?;
    let wide = bytes.get(prefixes.len())? & 8 != 0;
    let (code, low, acc) = if wide {
        (Code::Xchg_r64_RAX, Register::R8, Register::RAX)
    } else if prefixes.contains(&0x66) {
        (Code::Xchg_r16_AX, Register::R8W, Register::AX)
    } else {
        (Code::Xchg_r32_EAX, Register::R8D, Register::EAX)
    };
    let mut x = Instruction::with2(code, low, acc).ok()?;
    x.set_len(i.len());
    x.set_ip(i.ip());
    x.set_code_size(CodeSize::Code64);
    Some(x)
}

/// AMD and Intel differ in what 66H does to near branches in 64-bit code, among others. The guest
/// gets what its CPUID says it is.
pub(crate) fn vendor_options(leaf0: Option<&CpuidEntry>) -> u32 {
    // EBX of "AuthenticAMD" and "HygonGenuine".
    let amd = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
    match leaf0 {
        Some(e) if amd.contains(&e.ebx) => DecoderOptions::AMD,
        _ => DecoderOptions::NONE,
    }
}
