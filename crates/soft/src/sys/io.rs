//! IN, OUT, INS, OUTS and their permission checks. Intel SDM Vol. 1 chapter 19.

use std::sync::Arc;

use iced_x86::{Instruction, OpKind, Register};
use pyrite_x86::bits::{cr0, rflags};
use pyrite_x86::{gpr, sreg};

use crate::exception::Exception;
use crate::interp::operand;
use crate::mmu::Priv;
use crate::sys::seg::{SegAccess, system};
use crate::sys::{Next, debug};
use crate::vcpu::SoftVcpu;

/// LIMIT: iterations of a repeated INS or OUTS per step, so that interrupts are taken in between.
const REP_MAX: u64 = 1024;

/// #GP(0) unless the program may use `size` ports from `port`; the breakpoints that it meets there
/// are noted. Intel SDM Vol. 1 §19.5.
fn check(v: &mut SoftVcpu, port: u16, size: usize) -> Result<(), Exception> {
    permitted(v, port, size)?;
    v.pending_dr6 |= debug::io_breakpoints(&v.frame.cpu, port, size);
    Ok(())
}

/// #GP(0) unless the program may use `size` ports from `port`.
fn permitted(v: &mut SoftVcpu, port: u16, size: usize) -> Result<(), Exception> {
    let c = &v.frame.cpu;
    let free = c.cr0 & cr0::PE == 0 || (!v.v86() && c.cpl() <= v.iopl());
    if !free {
        let tr = c.tr;
        let gp = Exception::gp(0);
        if tr.unusable() || tr.ty() & !2 != system::TSS32 || tr.limit < 103 {
            return Err(gp);
        }
        let at = v.wrap_system(tr.base.wrapping_add(102));
        let byte = v.read_uint(at, 2, Priv::System)? + u64::from(port >> 3);
        // Two bytes are always read.
        if byte + 1 > u64::from(tr.limit) {
            return Err(gp);
        }
        let at = v.wrap_system(tr.base.wrapping_add(byte));
        let bits = v.read_uint(at, 2, Priv::System)? >> (port & 7);
        if bits & ((1 << size) - 1) != 0 {
            return Err(gp);
        }
    }
    Ok(())
}

fn port_in(v: &SoftVcpu, port: u16, size: usize) -> u64 {
    let mut b = [0u8; 8];
    v.vm.io.pio_read(v.index, port, &mut b[..size]);
    u64::from_le_bytes(b)
}

fn port_out(v: &SoftVcpu, port: u16, value: u64, size: usize) {
    let io = Arc::clone(&v.vm.io);
    io.pio_write(v.index, port, &value.to_le_bytes()[..size]);
}

fn port_operand(v: &SoftVcpu, i: &Instruction, op: u32) -> u16 {
    if i.op_kind(op) == OpKind::Register {
        v.frame.cpu.gpr[gpr::RDX] as u16
    } else {
        i.immediate8().into()
    }
}

/// IN.
pub fn input(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let to = i.op0_register();
    let port = port_operand(v, i, 1);
    check(v, port, to.size())?;
    let value = port_in(v, port, to.size());
    operand::write_reg(v, to, value);
    Ok(())
}

/// OUT.
pub fn output(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let from = i.op1_register();
    let port = port_operand(v, i, 0);
    check(v, port, from.size())?;
    port_out(v, port, operand::read_reg(v, from), from.size());
    Ok(())
}

/// Mask of the address size of a string operand.
fn string_mask(kind: OpKind) -> u64 {
    match kind {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 0xffff,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Writes an index or count register at the address size.
fn put(v: &mut SoftVcpu, r: usize, value: u64, mask: u64) {
    let q = &mut v.frame.cpu.gpr[r];
    *q = if mask == 0xffff {
        *q & !mask | value & mask
    } else {
        value & mask
    };
}

/// INS and OUTS, repeated or not.
pub fn string(v: &mut SoftVcpu, i: &Instruction, size: usize) -> Result<Next, Exception> {
    let ins = i.op0_kind() != OpKind::Register;
    let kind = if ins { i.op0_kind() } else { i.op1_kind() };
    let mask = string_mask(kind);
    let rep = i.has_rep_prefix() || i.has_repne_prefix();
    let port = v.frame.cpu.gpr[gpr::RDX] as u16;
    let mut left = if rep {
        v.frame.cpu.gpr[gpr::RCX] & mask
    } else {
        1
    };
    if left == 0 {
        // The right to the port is asked for even so.
        permitted(v, port, size)?;
        return Ok(Next::Sequential);
    }
    check(v, port, size)?;
    let single = v.frame.cpu.rflags & rflags::TF != 0 || debug::active(&v.frame.cpu);
    let batch = if single { 1 } else { left.min(REP_MAX) };
    let index = if ins { gpr::RDI } else { gpr::RSI };
    let step = if v.frame.cpu.rflags & rflags::DF != 0 {
        (size as u64).wrapping_neg()
    } else {
        size as u64
    };
    for _ in 0..batch {
        let at = v.frame.cpu.gpr[index] & mask;
        if ins {
            let lin = v.linear(sreg::ES, at, size, SegAccess::Write)?;
            // The device must not lose a datum to a page fault.
            v.probe_write(lin, size, Priv::Current)?;
            let value = port_in(v, port, size);
            v.write_uint(lin, value, size, Priv::Current)?;
        } else {
            let segment = match i.memory_segment() {
                Register::None => sreg::DS,
                r => operand::segment_number(r),
            };
            let lin = v.linear(segment, at, size, SegAccess::Read)?;
            let value = v.read_uint(lin, size, Priv::Current)?;
            port_out(v, port, value, size);
        }
        put(v, index, at.wrapping_add(step), mask);
        if rep {
            left -= 1;
            put(v, gpr::RCX, left, mask);
        }
    }
    Ok(if rep && left != 0 {
        Next::Jumped
    } else {
        Next::Sequential
    })
}
