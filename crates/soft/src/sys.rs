//! The system side of the processor: everything that is not plain computation on registers and
//! memory of the current segment setup.
//!
//! - [`event`]: exceptions, interrupts, INIT, start-up IPIs; [`task`]: hardware task switches.
//! - [`seg`], [`stack`]: descriptors, segment loads, frames of far transfers.
//! - [`far`], [`iret`], [`syscall`]: transfers between privilege levels.
//! - [`tables`]: descriptor-table and selector instructions.
//! - [`control`], [`msr`], [`cpuid`], [`flags`], [`io`], [`xsave`], [`debug`]: the rest.
//!
//! An instruction that faults leaves the guest's registers as they were, but for what the manual
//! says (accessed bits in memory, NMI unblocking by IRET).

pub mod control;
pub mod cpuid;
pub mod debug;
pub mod event;
pub mod far;
pub mod flags;
pub mod io;
pub mod iret;
pub mod msr;
pub mod seg;
pub mod stack;
pub mod syscall;
pub mod tables;
pub mod task;
pub mod xsave;

#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use pyrite_x86::bits::{cr4, rflags, vector};
use pyrite_x86::{Activity, gpr};

use crate::exception::{Exception, Trap};
use crate::interp::operand;
use crate::mmu::Priv;
use crate::vcpu::SoftVcpu;
use cpuid::{Reg, feature};
use event::Origin;
use seg::SegAccess;

/// What RIP must become after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// RIP goes on to the next instruction (the caller advances it).
    Sequential,
    /// The instruction has set RIP.
    Jumped,
}

/// True if [`execute`] implements every form of the mnemonic; the interpreter does all others.
/// Mnemonics of which only some forms are system instructions: see [`claims`].
pub fn handles(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Retf | Iret
            | Iretd
            | Iretq
            | Int
            | Int1
            | Int3
            | Into
            | Bound
            | Syscall
            | Sysret
            | Sysretq
            | Sysenter
            | Sysexit
            | Sysexitq
            | Swapgs
            | Lgdt
            | Lidt
            | Sgdt
            | Sidt
            | Lldt
            | Ltr
            | Sldt
            | Str
            | Smsw
            | Lmsw
            | Clts
            | Lar
            | Lsl
            | Verr
            | Verw
            | Arpl
            | Lds
            | Les
            | Lfs
            | Lgs
            | Lss
            | Rdfsbase
            | Rdgsbase
            | Wrfsbase
            | Wrgsbase
            | Cli
            | Sti
            | Pushf
            | Pushfd
            | Pushfq
            | Popf
            | Popfd
            | Popfq
            | Hlt
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Rdtsc
            | Rdtscp
            | Rdpmc
            | Rdpid
            | Cpuid
            | Rdmsr
            | Wrmsr
            | Invlpg
            | Invpcid
            | Invd
            | Wbinvd
            | Wbnoinvd
            | Fxsave
            | Fxsave64
            | Fxrstor
            | Fxrstor64
            | Xsave
            | Xsave64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
            | Xsaves
            | Xsaves64
            | Xrstor
            | Xrstor64
            | Xrstors
            | Xrstors64
            | Xgetbv
            | Xsetbv
            | Rdpkru
            | Wrpkru
            | Monitor
            | Mwait
            | Stac
            | Clac
            | Vmcall
            | Vmmcall
    ) || is_absent(mnemonic)
}

/// Instructions of extensions that no guest is offered: #UD.
fn is_absent(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Rsm | Getsec
            | Getsecq
            | Vmclear
            | Vmfunc
            | Vmlaunch
            | Vmptrld
            | Vmptrst
            | Vmread
            | Vmresume
            | Vmwrite
            | Vmxoff
            | Vmxon
            | Invept
            | Invvpid
            | Vmrun
            | Vmload
            | Vmsave
            | Clgi
            | Stgi
            | Skinit
            | Invlpga
            | Vmgexit
            | Monitorx
            | Mwaitx
            | Umonitor
            | Umwait
            | Tpause
            | Encls
            | Enclu
            | Enclv
            | Pconfig
            | Seamcall
            | Seamops
            | Seamret
            | Tdcall
            | Psmash
            | Pvalidate
            | Rmpadjust
            | Rmpupdate
            | Rmpquery
            | Invlpgb
            | Tlbsync
            | Uiret
            | Testui
            | Clui
            | Stui
            | Senduipi
            | Hreset
            | Lkgs
            | Erets
            | Eretu
            | Rdmsrlist
            | Wrmsrlist
            | Wrmsrns
            | Setssbsy
            | Clrssbsy
            | Rstorssp
            | Saveprevssp
            | Wrssd
            | Wrssq
            | Wrussd
            | Wrussq
            | Incsspd
            | Incsspq
            | Loadall
            | Rdpru
            | Mcommit
            | Ptwrite
    )
}

/// True if [`execute`] implements this instruction: also the far forms of JMP and CALL, and the
/// forms of MOV, PUSH and POP that name segment, control or debug registers.
pub fn claims(i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => is_far(i.code()),
        Mnemonic::Mov => {
            is_system_register(i, 0)
                || (i.op1_kind() == OpKind::Register && is_system_register(i, 1))
        }
        Mnemonic::Push | Mnemonic::Pop => is_system_register(i, 0),
        m => handles(m),
    }
}

fn is_system_register(i: &Instruction, op: u32) -> bool {
    if i.op_kind(op) != OpKind::Register {
        return false;
    }
    let r = i.op_register(op);
    r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr()
}

fn is_far(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Jmp_ptr1616
            | Jmp_ptr1632
            | Jmp_m1616
            | Jmp_m1632
            | Jmp_m1664
            | Call_ptr1616
            | Call_ptr1632
            | Call_m1616
            | Call_m1632
            | Call_m1664
    )
}

/// RIP of the instruction behind `i`, at the width of the mode.
fn next_rip(v: &SoftVcpu, i: &Instruction) -> u64 {
    let next = v.frame.cpu.rip.wrapping_add(i.len() as u64);
    if v.long64() { next } else { next & 0xffff_ffff }
}

/// Executes a system instruction. RIP still points at it.
pub fn execute(v: &mut SoftVcpu, i: &Instruction) -> Result<Next, Trap> {
    Ok(dispatch(v, i)?)
}

fn dispatch(v: &mut SoftVcpu, i: &Instruction) -> Result<Next, Exception> {
    use Mnemonic::*;
    match i.mnemonic() {
        Jmp | Call | Retf | Iret | Iretd | Iretq | Int | Int1 | Int3 | Into | Syscall | Sysret
        | Sysretq | Sysenter | Sysexit | Sysexitq => return transfer(v, i),
        Insb | Outsb => return io::string(v, i, 1),
        Insw | Outsw => return io::string(v, i, 2),
        Insd | Outsd => return io::string(v, i, 4),
        Mov if is_segment_mov(i) => tables::mov(v, i)?,
        Mov => control::mov(v, i)?,
        Push => tables::push(v, i)?,
        Pop => tables::pop(v, i)?,
        Lds | Les | Lfs | Lgs | Lss => tables::load_far_pointer(v, i)?,
        Lgdt | Lidt | Sgdt | Sidt => tables::table_register(v, i)?,
        Lldt | Ltr | Sldt | Str => tables::system_segment(v, i)?,
        Lar | Lsl | Verr | Verw => tables::verify(v, i)?,
        Arpl => tables::arpl(v, i)?,
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => tables::segment_base(v, i)?,
        Smsw | Lmsw | Clts => control::machine_status(v, i)?,
        Invlpg | Invpcid | Invd | Wbinvd | Wbnoinvd => control::invalidate(v, i)?,
        Cli => flags::cli(v)?,
        Sti => flags::sti(v)?,
        Pushf => flags::pushf(v, 2)?,
        Pushfd => flags::pushf(v, 4)?,
        Pushfq => flags::pushf(v, 8)?,
        Popf => flags::popf(v, 2)?,
        Popfd => flags::popf(v, 4)?,
        Popfq => flags::popf(v, 8)?,
        In => io::input(v, i)?,
        Out => io::output(v, i)?,
        Cpuid => cpuid::cpuid(v),
        Rdmsr => msr::rdmsr(v)?,
        Wrmsr => msr::wrmsr(v)?,
        Swapgs => syscall::swapgs(v)?,
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 => xsave::fx(v, i)?,
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64 => {
            xsave::xsave(v, i)?;
        }
        Xrstor | Xrstor64 | Xrstors | Xrstors64 => xsave::xrstor(v, i)?,
        Xgetbv => xsave::xgetbv(v)?,
        Xsetbv => xsave::xsetbv(v)?,
        _ => small(v, i)?,
    }
    Ok(Next::Sequential)
}

fn is_segment_mov(i: &Instruction) -> bool {
    let segment = |op| i.op_kind(op) == OpKind::Register && i.op_register(op).is_segment_register();
    segment(0) || segment(1)
}

/// Instructions that set RIP.
fn transfer(v: &mut SoftVcpu, i: &Instruction) -> Result<Next, Exception> {
    use Mnemonic::*;
    let next = next_rip(v, i);
    match i.mnemonic() {
        Jmp | Call => far_transfer(v, i, next)?,
        Retf => {
            let size = match i.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let extra = if i.op_count() == 1 {
                i.immediate16()
            } else {
                0
            };
            far::ret(v, size, extra.into())?;
        }
        Iret => iret::iret(v, 2, next)?,
        Iretd => iret::iret(v, 4, next)?,
        Iretq => iret::iret(v, 8, next)?,
        Int => event::software(v, i.immediate8(), Origin::IntN, next)?,
        Int3 => event::software(v, vector::BP, Origin::Int3, next)?,
        Int1 => event::software(v, vector::DB, Origin::Int1, next)?,
        Into => {
            if v.frame.cpu.rflags & rflags::OF == 0 {
                return Ok(Next::Sequential);
            }
            event::software(v, vector::OF, Origin::Int3, next)?;
        }
        Syscall => syscall::syscall(v, next)?,
        Sysret | Sysretq => {
            syscall::sysret(v, i.mnemonic() == Sysretq)?;
            step_by_new_tf(v);
        }
        Sysenter => syscall::sysenter(v)?,
        _ => syscall::sysexit(v, i.mnemonic() == Sysexitq)?,
    }
    Ok(Next::Jumped)
}

/// SYSRET single-steps by the TF that it sets. AMD APM Vol. 3, SYSRET.
fn step_by_new_tf(v: &mut SoftVcpu) {
    if v.frame.cpu.rflags & rflags::TF != 0 {
        v.pending_dr6 |= event::dr6::BS;
    }
}

fn far_transfer(v: &mut SoftVcpu, i: &Instruction, next: u64) -> Result<(), Exception> {
    use Code::*;
    let size = match i.code() {
        Jmp_ptr1616 | Call_ptr1616 | Jmp_m1616 | Call_m1616 => 2,
        Jmp_m1664 | Call_m1664 => 8,
        _ => 4,
    };
    let (selector, offset) = match i.op0_kind() {
        OpKind::FarBranch16 => (i.far_branch_selector(), i.far_branch16().into()),
        OpKind::FarBranch32 => (i.far_branch_selector(), i.far_branch32().into()),
        _ => far::pointer(v, operand::segment(i), operand::offset(v, i), size)?,
    };
    if i.mnemonic() == Mnemonic::Jmp {
        far::jump(v, selector, offset, next)
    } else {
        far::call(v, selector, offset, size, next)
    }
}

/// The short ones.
fn small(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    use Mnemonic::*;
    match i.mnemonic() {
        Hlt => {
            control::require_cpl0(v)?;
            v.frame.cpu.activity = Activity::Halted;
        }
        Rdtsc | Rdtscp => time_stamp(v, i.mnemonic() == Rdtscp)?,
        // No performance counter exists.
        Rdpmc => return Err(Exception::gp(0)),
        Rdpid => {
            if !feature(v, 7, Reg::Ecx, 22) {
                return Err(Exception::UD);
            }
            let aux = v.frame.cpu.msrs.tsc_aux;
            operand::write_reg(v, i.op0_register(), aux);
        }
        Bound => bound(v, i)?,
        Stac | Clac => {
            if v.frame.cpu.cpl() > 0 || !feature(v, 7, Reg::Ebx, 20) {
                return Err(Exception::UD);
            }
            let f = &mut v.frame.cpu.rflags;
            *f = *f & !rflags::AC | if i.mnemonic() == Stac { rflags::AC } else { 0 };
        }
        Monitor | Mwait => monitor(v, i)?,
        Vmcall | Vmmcall => hypercall(v)?,
        Rdpkru | Wrpkru => pkru(v, i.mnemonic() == Wrpkru)?,
        _ => return Err(Exception::UD),
    }
    Ok(())
}

/// RDTSC and RDTSCP.
fn time_stamp(v: &mut SoftVcpu, with_aux: bool) -> Result<(), Exception> {
    if with_aux && !feature(v, 0x8000_0001, Reg::Edx, 27) {
        return Err(Exception::UD);
    }
    let c = &v.frame.cpu;
    if c.cr4 & cr4::TSD != 0 && c.cpl() > 0 {
        return Err(Exception::gp(0));
    }
    let tsc = msr::tsc(v);
    let c = &mut v.frame.cpu;
    c.gpr[gpr::RAX] = tsc & 0xffff_ffff;
    c.gpr[gpr::RDX] = tsc >> 32;
    if with_aux {
        c.gpr[gpr::RCX] = c.msrs.tsc_aux & 0xffff_ffff;
    }
    Ok(())
}

/// BOUND. Intel SDM Vol. 2A.
fn bound(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let size = i.op0_register().size();
    let extend = |x: u64| {
        if size == 2 {
            i64::from(x as i16)
        } else {
            i64::from(x as i32)
        }
    };
    // One after the other, as processors do it: the first may fault before the second's limit
    // does.
    let seg = operand::segment(i);
    let at = operand::offset(v, i);
    let next = at.wrapping_add(size as u64) & operand::address_mask(i);
    let mut bounds = [0; 2];
    for (offset, bound) in [at, next].into_iter().zip(&mut bounds) {
        let lin = v.linear(seg, offset, size, SegAccess::Read)?;
        if operand::alignment_checked(v) && !lin.is_multiple_of(size as u64) {
            return Err(Exception::AC);
        }
        *bound = extend(v.read_uint(lin, size, Priv::Current)?);
    }
    let [low, high] = bounds;
    let index = extend(operand::read_reg(v, i.op0_register()));
    if index < low || index > high {
        return Err(Exception::plain(vector::BR));
    }
    Ok(())
}

/// MONITOR and MWAIT: a wait that ends at once, which the manual allows.
fn monitor(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    if !feature(v, 1, Reg::Ecx, 3) || v.frame.cpu.cpl() > 0 {
        return Err(Exception::UD);
    }
    let ecx = v.frame.cpu.gpr[gpr::RCX] as u32;
    if i.mnemonic() == Mnemonic::Monitor {
        if ecx != 0 {
            return Err(Exception::gp(0));
        }
        // DS:rAX at the address size, or an overriding segment.
        let mask = match i.code() {
            Code::Monitorw => 0xffff,
            Code::Monitord => 0xffff_ffff,
            _ => u64::MAX,
        };
        let at = v.frame.cpu.gpr[gpr::RAX] & mask;
        let lin = v.linear(operand::segment(i), at, 1, SegAccess::Read)?;
        v.read_uint(lin, 1, Priv::Current)?;
    } else if ecx & !1 != 0 {
        return Err(Exception::gp(0));
    }
    std::thread::yield_now();
    Ok(())
}

/// KVM's hypercalls: none is offered. -KVM_ENOSYS, or -KVM_EPERM outside ring 0.
fn hypercall(v: &mut SoftVcpu) -> Result<(), Exception> {
    if !feature(v, 1, Reg::Ecx, 31) {
        return Err(Exception::UD);
    }
    let result: i64 = if v.frame.cpu.cpl() > 0 { -1 } else { -1000 };
    let width = if v.long64() { u64::MAX } else { 0xffff_ffff };
    v.frame.cpu.gpr[gpr::RAX] = result as u64 & width;
    Ok(())
}

/// RDPKRU and WRPKRU: XSAVE component 9.
fn pkru(v: &mut SoftVcpu, write: bool) -> Result<(), Exception> {
    let g = &v.frame.cpu.gpr;
    if v.frame.cpu.cr4 & cr4::PKE == 0 {
        return Err(Exception::UD);
    }
    if g[gpr::RCX] as u32 != 0 || (write && g[gpr::RDX] as u32 != 0) {
        return Err(Exception::gp(0));
    }
    if write {
        let value = g[gpr::RAX] as u32;
        xsave::set_pkru(v, value);
    } else {
        let value = xsave::pkru(v);
        v.frame.cpu.gpr[gpr::RAX] = value.into();
        v.frame.cpu.gpr[gpr::RDX] = 0;
    }
    Ok(())
}
