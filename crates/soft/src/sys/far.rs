//! Far JMP, CALL and RET. Intel SDM Vol. 2A (CALL, JMP), Vol. 2B (RET), Vol. 3A §5.8.

use pyrite_x86::{Segment, gpr, sreg};

use crate::exception::Exception;
use crate::interp::stack::{read_stack, stack_mask};
use crate::mmu::Priv;
use crate::sys::event::{tss_stack, tss_stack64};
use crate::sys::seg::{Descriptor, SegAccess, code, null_segment, system};
use crate::sys::stack::{Frame, set_sp};
use crate::sys::task::{self, Entry};
use crate::vcpu::SoftVcpu;

/// Low bits that an operand size keeps.
pub fn truncate(value: u64, size: usize) -> u64 {
    value & (u64::MAX >> (64 - 8 * size))
}

/// Checks that `offset` can be executed in the code segment `d`. #GP(0) if not.
fn check_offset(v: &SoftVcpu, d: &Descriptor, offset: u64) -> Result<(), Exception> {
    let ok = if v.lma() && d.l() {
        v.canonical(offset)
    } else {
        offset <= u64::from(d.limit())
    };
    if ok { Ok(()) } else { Err(Exception::gp(0)) }
}

/// Checks a code segment as the target of a JMP or CALL without gate.
fn check_direct(v: &SoftVcpu, d: &Descriptor, selector: u16) -> Result<(), Exception> {
    let cpl = v.frame.cpu.cpl();
    let rpl = (selector & 3) as u8;
    let allowed = if d.is_conforming() {
        d.dpl() <= cpl
    } else {
        rpl <= cpl && d.dpl() == cpl
    };
    if !allowed || (v.lma() && d.l() && d.db()) {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    Ok(())
}

/// Loads CS from a checked descriptor and sets RIP.
pub fn set_code(v: &mut SoftVcpu, d: &Descriptor, selector: u16, cpl: u8, rip: u64) {
    v.frame.cpu.seg[sreg::CS] = d.segment(selector & !3 | u16::from(cpl));
    v.frame.cpu.rip = rip;
}

/// IP of a far transfer in real and virtual-8086 mode must be inside CS.
fn check_real(v: &SoftVcpu, ip: u64) -> Result<(), Exception> {
    let limit = if v.v86() {
        0xffff
    } else {
        v.frame.cpu.seg[sreg::CS].limit
    };
    if ip > u64::from(limit) {
        return Err(Exception::gp(0));
    }
    Ok(())
}

/// Far JMP to `selector:offset`; `next_rip` is where a task switch returns to.
pub fn jump(v: &mut SoftVcpu, selector: u16, offset: u64, next_rip: u64) -> Result<(), Exception> {
    if v.real_or_v86() {
        check_real(v, offset)?;
        v.load_cs_real(selector, offset);
        return Ok(());
    }
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let d = v.descriptor(selector, Exception::gp)?;
    if d.is_segment() {
        if !d.is_code() {
            return Err(Exception::gp(code(selector)));
        }
        check_direct(v, &d, selector)?;
        check_offset(v, &d, offset)?;
        v.set_accessed(&d)?;
        let cpl = v.frame.cpu.cpl();
        set_code(v, &d, selector, cpl, offset);
        return Ok(());
    }
    match system_target(v, d, selector)? {
        SystemTarget::Task(tss) => task::switch(v, tss, Entry::Jump, next_rip, 0),
        SystemTarget::Gate(gate) => {
            let (target, target_selector) = gate_target(v, &gate)?;
            let cpl = v.frame.cpu.cpl();
            if !target.is_conforming() && target.dpl() != cpl {
                return Err(Exception::gp(code(target_selector)));
            }
            check_offset(v, &target, gate.gate_offset())?;
            v.set_accessed(&target)?;
            set_code(v, &target, target_selector, cpl, gate.gate_offset());
            Ok(())
        }
    }
}

/// What a system descriptor leads to.
enum SystemTarget {
    Gate(Descriptor),
    /// Selector of a TSS.
    Task(u16),
}

/// Checks a call gate, task gate or TSS descriptor as the target of a JMP or CALL.
fn system_target(
    v: &mut SoftVcpu,
    d: Descriptor,
    selector: u16,
) -> Result<SystemTarget, Exception> {
    use system::{CALL_GATE16, CALL_GATE32, TASK_GATE, TSS16, TSS32};
    let fault = Exception::gp(code(selector));
    let legacy = !v.lma();
    let known = match d.ty() {
        CALL_GATE32 => true,
        CALL_GATE16 | TASK_GATE | TSS16 | TSS32 => legacy,
        _ => false,
    };
    let rpl = (selector & 3) as u8;
    if !known || d.dpl() < v.frame.cpu.cpl() || d.dpl() < rpl {
        return Err(fault);
    }
    let d = v.widen(d, selector, Exception::gp)?;
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    Ok(match d.ty() {
        TASK_GATE => SystemTarget::Task(d.gate_selector()),
        TSS16 | TSS32 => SystemTarget::Task(selector),
        _ => SystemTarget::Gate(d),
    })
}

/// Reads and checks the code segment of a call gate.
fn gate_target(v: &mut SoftVcpu, gate: &Descriptor) -> Result<(Descriptor, u16), Exception> {
    let selector = gate.gate_selector();
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let d = v.descriptor(selector, Exception::gp)?;
    let bad_mode = v.lma() && (!d.l() || d.db());
    if !d.is_code() || d.dpl() > v.frame.cpu.cpl() || bad_mode {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    Ok((d, selector))
}

/// Far CALL to `selector:offset` with elements of `size` bytes.
pub fn call(
    v: &mut SoftVcpu,
    selector: u16,
    offset: u64,
    size: usize,
    next_rip: u64,
) -> Result<(), Exception> {
    if v.real_or_v86() {
        check_real(v, offset)?;
        push_return(v, size, next_rip)?;
        v.load_cs_real(selector, offset);
        return Ok(());
    }
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let d = v.descriptor(selector, Exception::gp)?;
    if d.is_segment() {
        if !d.is_code() {
            return Err(Exception::gp(code(selector)));
        }
        check_direct(v, &d, selector)?;
        check_offset(v, &d, offset)?;
        v.set_accessed(&d)?;
        push_return(v, size, next_rip)?;
        let cpl = v.frame.cpu.cpl();
        set_code(v, &d, selector, cpl, offset);
        return Ok(());
    }
    match system_target(v, d, selector)? {
        SystemTarget::Task(tss) => task::switch(v, tss, Entry::Call, next_rip, 0),
        SystemTarget::Gate(gate) => call_gate(v, &gate, next_rip),
    }
}

/// Pushes CS and the return address on the current stack.
fn push_return(v: &mut SoftVcpu, size: usize, next_rip: u64) -> Result<(), Exception> {
    let mut f = Frame::current(v, size);
    f.push(u64::from(v.frame.cpu.seg[sreg::CS].selector));
    f.push(next_rip);
    f.check(v, 0)?;
    f.write(v, Priv::Current)?;
    f.commit(v);
    Ok(())
}

fn call_gate(v: &mut SoftVcpu, gate: &Descriptor, next_rip: u64) -> Result<(), Exception> {
    let (target, selector) = gate_target(v, gate)?;
    let now = v.frame.cpu.cpl();
    let offset = gate.gate_offset();
    let size = match (v.lma(), gate.ty() & 8 != 0) {
        (true, _) => 8,
        (false, true) => 4,
        (false, false) => 2,
    };
    if target.is_conforming() || target.dpl() == now {
        check_offset(v, &target, offset)?;
        v.set_accessed(&target)?;
        push_return(v, size, next_rip)?;
        set_code(v, &target, selector, now, offset);
        return Ok(());
    }
    let cpl = target.dpl();
    let (mut f, ss) = if v.lma() {
        let rsp = tss_stack64(v, u64::from(cpl) * 8 + 4, 0)?;
        (Frame::on64(rsp), null_segment(u16::from(cpl), cpl))
    } else {
        let (ss, sp) = tss_stack(v, cpl, 0)?;
        let ss = v.stack_segment(ss, cpl, Exception::ts, 0)?;
        (Frame::on(ss, sp, size), ss)
    };
    f.push(u64::from(v.frame.cpu.seg[sreg::SS].selector));
    f.push(v.frame.cpu.gpr[gpr::RSP]);
    if !v.lma() {
        copy_parameters(v, &mut f, (gate.low >> 32 & 0x1f) as usize, size)?;
    }
    f.push(u64::from(v.frame.cpu.seg[sreg::CS].selector));
    f.push(next_rip);
    f.check(v, if v.lma() { 0 } else { code(ss.selector) })?;
    check_offset(v, &target, offset)?;
    v.set_accessed(&target)?;
    f.write(v, Frame::who(v, cpl))?;
    v.frame.cpu.seg[sreg::SS] = ss;
    set_code(v, &target, selector, cpl, offset);
    f.commit(v);
    Ok(())
}

/// Copies parameters of a call gate from the caller's stack, the one at the highest address first.
fn copy_parameters(
    v: &mut SoftVcpu,
    f: &mut Frame,
    count: usize,
    size: usize,
) -> Result<(), Exception> {
    for n in (0..count).rev() {
        let value = read_stack(v, (n * size) as u64, size)?;
        f.push(value);
    }
    Ok(())
}

/// A return target whose checks have passed.
pub struct Return {
    /// Code segment.
    pub descriptor: Descriptor,
    /// Its selector; RPL = the new CPL.
    pub selector: u16,
}

impl Return {
    /// The new CPL.
    pub fn cpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
}

/// Checks the CS popped by RET or IRET in protected mode. Intel SDM Vol. 2B, RET.
pub fn check_return(v: &mut SoftVcpu, selector: u16, rip: u64) -> Result<Return, Exception> {
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let d = v.descriptor(selector, Exception::gp)?;
    let rpl = (selector & 3) as u8;
    let level_ok = if d.is_conforming() {
        d.dpl() <= rpl
    } else {
        d.dpl() == rpl
    };
    let bad_mode = v.lma() && d.l() && d.db();
    if !d.is_code() || rpl < v.frame.cpu.cpl() || !level_ok || bad_mode {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    check_offset(v, &d, rip)?;
    Ok(Return {
        descriptor: d,
        selector,
    })
}

/// Checks the SS popped by a return. A null SS is good when going to 64-bit code above ring 3.
pub fn check_return_stack(
    v: &mut SoftVcpu,
    selector: u16,
    to: &Return,
) -> Result<Segment, Exception> {
    let cpl = to.cpl();
    if selector & 0xfffc == 0 {
        let to_long = v.lma() && to.descriptor.l();
        if to_long && cpl < 3 && (selector & 3) as u8 == cpl {
            return Ok(null_segment(selector, cpl));
        }
        return Err(Exception::gp(0));
    }
    let err = code(selector);
    let d = v.descriptor(selector, Exception::gp)?;
    if (selector & 3) as u8 != cpl || d.dpl() != cpl || !d.is_writable_data() {
        return Err(Exception::gp(err));
    }
    if !d.present() {
        return Err(Exception::ss(err));
    }
    v.set_accessed(&d)?;
    Ok(d.segment(selector))
}

/// Far RET with elements of `size` bytes, releasing `extra` bytes of parameters.
pub fn ret(v: &mut SoftVcpu, size: usize, extra: u64) -> Result<(), Exception> {
    let step = size as u64;
    let rip = read_stack(v, 0, size)?;
    let selector = read_stack(v, step, size)? as u16;
    let sp = v.frame.cpu.gpr[gpr::RSP];
    if v.real_or_v86() {
        check_real(v, rip)?;
        v.load_cs_real(selector, rip);
        set_sp(v, sp.wrapping_add(2 * step + extra), stack_mask(v));
        return Ok(());
    }
    let to = check_return(v, selector, rip)?;
    if to.cpl() == v.frame.cpu.cpl() {
        v.set_accessed(&to.descriptor)?;
        let mask = stack_mask(v);
        set_code(v, &to.descriptor, selector, to.cpl(), rip);
        set_sp(v, sp.wrapping_add(2 * step + extra), mask);
        return Ok(());
    }
    let new_sp = read_stack(v, 2 * step + extra, size)?;
    let new_ss = read_stack(v, 3 * step + extra, size)? as u16;
    leave_to_outer(v, &to, rip, new_ss, new_sp, extra)
}

/// Loads CS:RIP and SS:RSP for an outer level.
pub fn leave_to_outer(
    v: &mut SoftVcpu,
    to: &Return,
    rip: u64,
    ss: u16,
    sp: u64,
    extra: u64,
) -> Result<(), Exception> {
    let ss = check_return_stack(v, ss, to)?;
    v.set_accessed(&to.descriptor)?;
    set_code(v, &to.descriptor, to.selector, to.cpl(), rip);
    v.frame.cpu.seg[sreg::SS] = ss;
    let mask = stack_mask(v);
    set_sp(v, sp.wrapping_add(extra), mask);
    v.drop_inner_segments(to.cpl());
    Ok(())
}

/// Reads a far pointer operand at linear address of `seg:at`: (selector, offset).
pub fn pointer(
    v: &mut SoftVcpu,
    segment: usize,
    at: u64,
    size: usize,
) -> Result<(u16, u64), Exception> {
    let lin = v.linear(segment, at, size + 2, SegAccess::Read)?;
    let mut b = [0u8; 10];
    v.read_bytes(lin, &mut b[..size + 2], Priv::Current)?;
    let mut offset = [0u8; 8];
    offset[..size].copy_from_slice(&b[..size]);
    let selector = u16::from_le_bytes([b[size], b[size + 1]]);
    Ok((selector, u64::from_le_bytes(offset)))
}
