//! Instructions on descriptor tables and selectors: LGDT … STR, LAR … ARPL, segment registers.
//! Intel SDM Vol. 2.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use pyrite_x86::bits::{cr4, rflags};
use pyrite_x86::{InterruptShadow, Segment, TableReg, gpr, sreg};

use crate::exception::Exception;
use crate::interp::{operand, stack};
use crate::mmu::Priv;
use crate::sys::control::require_cpl0;
use crate::sys::far;
use crate::sys::seg::{Descriptor, SegAccess, code, null_segment, system};
use crate::vcpu::SoftVcpu;

/// #GP(0) if CR4.UMIP refuses the instruction at this CPL.
pub fn check_umip(v: &SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.cr4 & cr4::UMIP != 0 && v.frame.cpu.cpl() > 0 {
        return Err(Exception::gp(0));
    }
    Ok(())
}

/// #UD in real and virtual-8086 mode.
fn require_protected(v: &SoftVcpu) -> Result<(), Exception> {
    if v.real_or_v86() {
        Err(Exception::UD)
    } else {
        Ok(())
    }
}

/// LGDT, LIDT, SGDT, SIDT.
pub fn table_register(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    use Mnemonic::{Lgdt, Lidt, Sgdt};
    let load = matches!(i.mnemonic(), Lgdt | Lidt);
    let base_len = if v.long64() { 8 } else { 4 };
    if load {
        require_cpl0(v)?;
        let lin = operand::mem_lin(v, i, 2 + base_len, SegAccess::Read)?;
        let mut b = [0u8; 16];
        v.read_bytes(lin, &mut b[..2 + base_len], Priv::Current)?;
        let wide = u128::from_le_bytes(b);
        let mut base = (wide >> 16) as u64;
        if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
            base &= 0xff_ffff;
        }
        if !v.canonical(base) {
            return Err(Exception::gp(0));
        }
        let register = TableReg {
            base,
            limit: wide as u32 & 0xffff,
            reserved: 0,
        };
        if i.mnemonic() == Lgdt {
            v.frame.cpu.gdtr = register;
        } else {
            v.frame.cpu.idtr = register;
        }
        return Ok(());
    }
    check_umip(v)?;
    let register = if i.mnemonic() == Sgdt {
        v.frame.cpu.gdtr
    } else {
        v.frame.cpu.idtr
    };
    let image = u128::from(register.limit as u16) | u128::from(register.base) << 16;
    let lin = operand::mem_lin(v, i, 2 + base_len, SegAccess::Write)?;
    v.write_bytes(lin, &image.to_le_bytes()[..2 + base_len], Priv::Current)
}

/// Stores a selector: 16 bits to memory, zero-extended to a register.
fn store_selector(v: &mut SoftVcpu, i: &Instruction, selector: u16) -> Result<(), Exception> {
    if i.op0_kind() == OpKind::Memory {
        operand::write(v, i, 0, selector.into(), 2)
    } else {
        operand::write_reg(v, i.op0_register(), selector.into());
        Ok(())
    }
}

/// Reads a 16-bit selector operand.
fn read_selector(v: &mut SoftVcpu, i: &Instruction, op: u32) -> Result<u16, Exception> {
    Ok(operand::read(v, i, op, 2)? as u16)
}

/// SLDT, STR, LLDT, LTR.
pub fn system_segment(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    require_protected(v)?;
    match i.mnemonic() {
        Mnemonic::Sldt => {
            check_umip(v)?;
            let selector = v.frame.cpu.ldtr.selector;
            store_selector(v, i, selector)
        }
        Mnemonic::Str => {
            check_umip(v)?;
            let selector = v.frame.cpu.tr.selector;
            store_selector(v, i, selector)
        }
        Mnemonic::Lldt => {
            require_cpl0(v)?;
            let selector = read_selector(v, i, 0)?;
            lldt(v, selector)
        }
        _ => {
            require_cpl0(v)?;
            let selector = read_selector(v, i, 0)?;
            ltr(v, selector)
        }
    }
}

fn system_descriptor(v: &mut SoftVcpu, selector: u16) -> Result<Descriptor, Exception> {
    if selector & 4 != 0 {
        return Err(Exception::gp(code(selector)));
    }
    let d = v.descriptor(selector, Exception::gp)?;
    if d.is_segment() {
        return Err(Exception::gp(code(selector)));
    }
    let d = v.widen(d, selector, Exception::gp)?;
    if v.lma() && !v.canonical(d.base()) {
        return Err(Exception::gp(code(selector)));
    }
    Ok(d)
}

fn lldt(v: &mut SoftVcpu, selector: u16) -> Result<(), Exception> {
    if selector & 0xfffc == 0 {
        v.frame.cpu.ldtr = null_segment(selector, 0);
        return Ok(());
    }
    let d = system_descriptor(v, selector)?;
    if d.ty() != system::LDT {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    v.frame.cpu.ldtr = d.segment(selector);
    Ok(())
}

fn ltr(v: &mut SoftVcpu, selector: u16) -> Result<(), Exception> {
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let d = system_descriptor(v, selector)?;
    let known = d.ty() == system::TSS32 || (d.ty() == system::TSS16 && !v.lma());
    if !known {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    v.update_type(d.addr, 2, 0)?;
    let mut tr = d.segment(selector);
    tr.attr |= 2;
    v.frame.cpu.tr = tr;
    Ok(())
}

fn set_zf(v: &mut SoftVcpu, on: bool) {
    let f = &mut v.frame.cpu.rflags;
    *f = *f & !rflags::ZF | if on { rflags::ZF } else { 0 };
}

/// LAR, LSL, VERR, VERW: what the descriptor says, `None` if it may not be looked at.
fn inspect(
    v: &mut SoftVcpu,
    selector: u16,
    mnemonic: Mnemonic,
) -> Result<Option<Descriptor>, Exception> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let d = match v.descriptor(selector, Exception::gp) {
        Ok(d) => d,
        // Outside its table: not an exception here. Page faults are.
        Err(e) if e.vector == pyrite_x86::bits::vector::GP => return Ok(None),
        Err(e) => return Err(e),
    };
    let level = v.frame.cpu.cpl().max((selector & 3) as u8);
    let reachable = d.is_conforming() || d.dpl() >= level;
    let long = v.lma();
    let known = match mnemonic {
        _ if d.is_segment() => match mnemonic {
            Mnemonic::Verr => d.is_readable(),
            Mnemonic::Verw => d.is_writable_data(),
            _ => true,
        },
        Mnemonic::Lar => match d.ty() {
            2 | 9 | 11 | 12 => true,
            1 | 3 | 4 | 5 => !long,
            _ => false,
        },
        Mnemonic::Lsl => match d.ty() {
            2 | 9 | 11 => true,
            1 | 3 => !long,
            _ => false,
        },
        _ => false,
    };
    Ok((reachable && known).then_some(d))
}

/// LAR, LSL, VERR, VERW.
pub fn verify(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    require_protected(v)?;
    let loads = matches!(i.mnemonic(), Mnemonic::Lar | Mnemonic::Lsl);
    let selector = read_selector(v, i, u32::from(loads))?;
    let found = inspect(v, selector, i.mnemonic())?;
    if let (true, Some(d)) = (loads, &found) {
        let value = if i.mnemonic() == Mnemonic::Lar {
            d.low >> 32 & 0x00ff_ff00
        } else {
            u64::from(d.limit())
        };
        operand::write_reg(v, i.op0_register(), value);
    }
    set_zf(v, found.is_some());
    Ok(())
}

/// ARPL.
pub fn arpl(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    require_protected(v)?;
    let source = operand::read(v, i, 1, 2)?;
    let target = operand::read(v, i, 0, 2)?;
    let raise = target & 3 < source & 3;
    if raise {
        let value = target & !3 | source & 3;
        if i.op0_kind() == OpKind::Register {
            // Of a register too it changes 16 bits, whatever the operand size.
            let r = i.op0_register();
            let upper = operand::read_reg(v, r) & !0xffff;
            operand::write_reg(v, r, upper | value);
        } else {
            operand::write(v, i, 0, value, 2)?;
        }
    }
    set_zf(v, raise);
    Ok(())
}

/// Loads a segment register and shields the instruction after a load of SS.
fn load(v: &mut SoftVcpu, n: usize, selector: u16) -> Result<(), Exception> {
    v.load_segment(n, selector)?;
    if n == sreg::SS {
        v.frame.cpu.interrupt_shadow = InterruptShadow::MovSs;
    }
    Ok(())
}

/// MOV to or from a segment register.
pub fn mov(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
        if i.op0_register() == Register::CS {
            return Err(Exception::UD);
        }
        let selector = read_selector(v, i, 1)?;
        return load(v, operand::segment_number(i.op0_register()), selector);
    }
    let n = operand::segment_number(i.op1_register());
    let selector = v.frame.cpu.seg[n].selector;
    store_selector(v, i, selector)
}

/// PUSH of a segment register.
pub fn push(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let n = operand::segment_number(i.op0_register());
    let selector = v.frame.cpu.seg[n].selector;
    stack::push(v, selector.into(), stack_size(i))
}

/// POP of a segment register.
pub fn pop(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let n = operand::segment_number(i.op0_register());
    let size = stack_size(i);
    let selector = stack::read_stack(v, 0, size)? as u16;
    // The new SS may have another stack size: the pointer moves by the old one.
    let old = v.frame.cpu.gpr[gpr::RSP];
    stack::set_sp(v, old.wrapping_add(size as u64));
    let result = load(v, n, selector);
    if result.is_err() {
        v.frame.cpu.gpr[gpr::RSP] = old;
    }
    result
}

fn stack_size(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

/// LDS, LES, LFS, LGS, LSS.
pub fn load_far_pointer(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let n = match i.mnemonic() {
        Mnemonic::Lds => sreg::DS,
        Mnemonic::Les => sreg::ES,
        Mnemonic::Lfs => sreg::FS,
        Mnemonic::Lgs => sreg::GS,
        _ => sreg::SS,
    };
    let size = i.op0_register().size();
    let at = operand::offset(v, i);
    let (selector, offset) = far::pointer(v, operand::segment(i), at, size)?;
    v.load_segment(n, selector)?;
    operand::write_reg(v, i.op0_register(), offset);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub fn segment_base(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    if !v.long64() || v.frame.cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::UD);
    }
    let n = match i.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => sreg::FS,
        _ => sreg::GS,
    };
    let r = i.op0_register();
    if matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = v.frame.cpu.seg[n].base;
        operand::write_reg(v, r, base);
        return Ok(());
    }
    let base = operand::read_reg(v, r);
    if !v.canonical(base) {
        return Err(Exception::gp(0));
    }
    let s: &mut Segment = &mut v.frame.cpu.seg[n];
    s.base = base;
    Ok(())
}
