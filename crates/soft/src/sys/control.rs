//! Control and debug registers, TLB maintenance. Intel SDM Vol. 3A §2.5, Vol. 2B MOV.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use pyrite_x86::bits::{cr0, cr4, efer};
use pyrite_x86::sreg;

use crate::exception::Exception;
use crate::interp::operand;
use crate::mmu::Priv;
use crate::sys::cpuid::{self, Reg};
use crate::sys::event::dr6;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// #GP(0) unless CPL is 0.
pub fn require_cpl0(v: &SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.cpl() == 0 {
        Ok(())
    } else {
        Err(Exception::gp(0))
    }
}

fn physical_mask(v: &SoftVcpu) -> u64 {
    (1u64 << v.vm.maxphyaddr.min(52)) - 1
}

/// Reads and checks the PDPTEs that CR3 points to. #GP(0) on reserved bits. SDM Vol. 3A §4.4.1.
pub fn read_pdptes(v: &mut SoftVcpu, cr3: u64) -> Result<[u64; 4], Exception> {
    let reserved = !physical_mask(v) | 0x1e6;
    let mut entries = [0u64; 4];
    for (n, e) in entries.iter_mut().enumerate() {
        let mut b = [0u8; 8];
        v.read_phys((cr3 & 0xffff_ffe0) + 8 * n as u64, &mut b);
        *e = u64::from_le_bytes(b);
        if *e & 1 != 0 && *e & reserved != 0 {
            return Err(Exception::gp(0));
        }
    }
    Ok(entries)
}

fn pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

/// MOV to CR0 (also LMSW and CLTS).
pub fn set_cr0(v: &mut SoftVcpu, value: u64) -> Result<(), Exception> {
    use cr0::{AM, CD, EM, ET, MP, NE, NW, PE, PG, TS, WP};
    let gp = Err(Exception::gp(0));
    if value >> 32 != 0 {
        return gp;
    }
    let new = value & (PE | MP | EM | TS | NE | WP | AM | NW | CD | PG) | ET;
    if (new & PG != 0 && new & PE == 0) || (new & NW != 0 && new & CD == 0) {
        return gp;
    }
    let c = &v.frame.cpu;
    let (old, mut efer, cr4) = (c.cr0, c.efer, c.cr4);
    if new & !old & PG != 0 && efer & efer::LME != 0 {
        // A 16-bit TSS cannot serve in IA-32e mode. SDM Vol. 3A §9.8.5.
        let tss16 = c.tr.ty() & !2 == 1;
        if cr4 & cr4::PAE == 0 || c.seg[sreg::CS].l() || tss16 {
            return gp;
        }
        efer |= efer::LMA;
    }
    if old & !new & PG != 0 {
        if v.long64() || cr4 & cr4::PCIDE != 0 {
            return gp;
        }
        efer &= !efer::LMA;
    }
    let changed = old ^ new;
    if changed & (PG | CD | NW) != 0 && pae_paging(new, cr4, efer) {
        let cr3 = v.frame.cpu.cr3;
        v.frame.cpu.pdpte = read_pdptes(v, cr3)?;
    }
    v.frame.cpu.cr0 = new;
    v.frame.cpu.efer = efer;
    if changed & (PG | PE | WP) != 0 {
        v.flush_tlb(false);
    }
    Ok(())
}

/// MOV to CR3.
pub fn set_cr3(v: &mut SoftVcpu, value: u64) -> Result<(), Exception> {
    let c = &v.frame.cpu;
    let mut value = value;
    if c.efer & efer::LMA != 0 {
        // Bit 63 asks to keep translations of the PCID. They carry no PCID here, so they go.
        if c.cr4 & cr4::PCIDE != 0 {
            value &= !(1 << 63);
        }
        if value & !physical_mask(v) != 0 {
            return Err(Exception::gp(0));
        }
    } else {
        value &= 0xffff_ffff;
    }
    load_cr3(v, value)
}

fn load_cr3(v: &mut SoftVcpu, value: u64) -> Result<(), Exception> {
    let c = &v.frame.cpu;
    if pae_paging(c.cr0, c.cr4, c.efer) {
        v.frame.cpu.pdpte = read_pdptes(v, value)?;
    }
    v.frame.cpu.cr3 = value;
    v.flush_tlb(true);
    crate::direct::address_space_changed(v);
    Ok(())
}

/// CR3 from a TSS; only when paging is on.
pub fn load_cr3_for_task(v: &mut SoftVcpu, value: u64) -> Result<(), Exception> {
    load_cr3(v, value)
}

/// Bits of CR4 that this processor has, by CPUID.
fn cr4_mask(v: &SoftVcpu) -> u64 {
    use cr4::{
        DE, FSGSBASE, LA57, MCE, OSFXSR, OSXMMEXCPT, OSXSAVE, PAE, PCE, PCIDE, PGE, PKE, PSE, PVI,
        SMAP, SMEP, TSD, UMIP, VME,
    };
    let features: [(u32, Reg, u32, u64); 18] = [
        (1, Reg::Edx, 1, VME | PVI),
        (1, Reg::Edx, 4, TSD),
        (1, Reg::Edx, 2, DE),
        (1, Reg::Edx, 3, PSE),
        (1, Reg::Edx, 6, PAE),
        (1, Reg::Edx, 7, MCE),
        (1, Reg::Edx, 13, PGE),
        (1, Reg::Edx, 24, OSFXSR),
        (1, Reg::Edx, 25, OSXMMEXCPT),
        (1, Reg::Ecx, 17, PCIDE),
        (1, Reg::Ecx, 26, OSXSAVE),
        (7, Reg::Ebx, 0, FSGSBASE),
        (7, Reg::Ebx, 7, SMEP),
        (7, Reg::Ebx, 20, SMAP),
        (7, Reg::Ecx, 2, UMIP),
        (7, Reg::Ecx, 3, PKE),
        (7, Reg::Ecx, 16, LA57),
        (1, Reg::Edx, 0, PCE),
    ];
    features
        .into_iter()
        .filter(|&(leaf, reg, bit, _)| cpuid::feature(v, leaf, reg, bit))
        .fold(0, |m, f| m | f.3)
}

/// MOV to CR4.
pub fn set_cr4(v: &mut SoftVcpu, new: u64) -> Result<(), Exception> {
    use cr4::{LA57, PAE, PCIDE, PGE, PKE, PSE, SMAP, SMEP};
    let gp = Err(Exception::gp(0));
    if new & !cr4_mask(v) != 0 {
        return gp;
    }
    let c = &v.frame.cpu;
    let changed = c.cr4 ^ new;
    if c.efer & efer::LMA != 0 {
        if new & PAE == 0 || changed & LA57 != 0 {
            return gp;
        }
    } else if new & PCIDE != 0 {
        return gp;
    }
    if changed & new & PCIDE != 0 && c.cr3 & 0xfff != 0 {
        return gp;
    }
    if changed & (PAE | PGE | PSE | SMEP) != 0 && pae_paging(c.cr0, new, c.efer) {
        let cr3 = c.cr3;
        v.frame.cpu.pdpte = read_pdptes(v, cr3)?;
    }
    v.frame.cpu.cr4 = new;
    if changed & (PSE | PAE | PGE | PCIDE | SMEP | SMAP | LA57 | PKE) != 0 {
        v.flush_tlb(false);
    }
    Ok(())
}

/// MOV to or from a control or debug register.
pub fn mov(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    let (to, from) = (i.op0_register(), i.op1_register());
    if to.is_cr() {
        let value = operand::read_reg(v, from);
        write_cr(v, to, value)
    } else if from.is_cr() {
        let value = read_cr(v, from)?;
        operand::write_reg(v, to, value);
        Ok(())
    } else if to.is_dr() {
        let value = operand::read_reg(v, from);
        write_dr(v, to, value)
    } else if from.is_dr() {
        let n = debug_register(v, from)?;
        let value = v.frame.cpu.dr[n];
        operand::write_reg(v, to, value);
        Ok(())
    } else {
        // Test registers are gone since the 486.
        Err(Exception::UD)
    }
}

fn read_cr(v: &mut SoftVcpu, r: Register) -> Result<u64, Exception> {
    let value = match r {
        Register::CR0 => v.frame.cpu.cr0,
        Register::CR2 => v.frame.cpu.cr2,
        Register::CR3 => v.frame.cpu.cr3,
        Register::CR4 => v.frame.cpu.cr4,
        Register::CR8 => v.shared().apic.cr8(),
        _ => return Err(Exception::UD),
    };
    require_cpl0(v)?;
    Ok(value)
}

fn write_cr(v: &mut SoftVcpu, r: Register, value: u64) -> Result<(), Exception> {
    use Register::{CR0, CR2, CR3, CR4, CR8};
    if !matches!(r, CR0 | CR2 | CR3 | CR4 | CR8) {
        return Err(Exception::UD);
    }
    require_cpl0(v)?;
    match r {
        CR0 => set_cr0(v, value),
        CR2 => {
            v.frame.cpu.cr2 = value;
            Ok(())
        }
        CR3 => set_cr3(v, value),
        CR4 => set_cr4(v, value),
        _ => {
            if value & !0xf != 0 {
                return Err(Exception::gp(0));
            }
            crate::apic::set_cr8(&v.vm, v.index, value);
            Ok(())
        }
    }
}

/// Number of the debug register after the checks of MOV DR. Intel SDM Vol. 3B §17.2.
fn debug_register(v: &mut SoftVcpu, r: Register) -> Result<usize, Exception> {
    let n = r as usize - Register::DR0 as usize;
    let n = match n {
        4 | 5 if v.frame.cpu.cr4 & cr4::DE != 0 => return Err(Exception::UD),
        4 | 5 => n + 2,
        0..=3 | 6 | 7 => n,
        _ => return Err(Exception::UD),
    };
    require_cpl0(v)?;
    if v.frame.cpu.dr[7] & 1 << 13 != 0 {
        return Err(Exception::db(dr6::BD));
    }
    Ok(n)
}

fn write_dr(v: &mut SoftVcpu, r: Register, value: u64) -> Result<(), Exception> {
    let n = debug_register(v, r)?;
    if n >= 6 && value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    v.frame.cpu.dr[n] = match n {
        6 => value & 0xe00f | 0xffff_0ff0,
        7 => value & 0xffff_27ff | 0x400,
        _ => value,
    };
    // Pages with enabled data breakpoints must not be in the soft TLB.
    if n != 6 && v.frame.cpu.dr[7] & 0xff != 0 {
        v.flush_tlb(false);
    }
    Ok(())
}

/// CLTS, LMSW, SMSW.
pub fn machine_status(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    match i.mnemonic() {
        Mnemonic::Clts => {
            require_cpl0(v)?;
            v.frame.cpu.cr0 &= !cr0::TS;
            Ok(())
        }
        Mnemonic::Lmsw => {
            require_cpl0(v)?;
            let value = operand::read(v, i, 0, 2)?;
            let old = v.frame.cpu.cr0;
            // PE can be set but not cleared.
            set_cr0(v, old & !0xe | value & 0xf)
        }
        _ => {
            super::tables::check_umip(v)?;
            let value = v.frame.cpu.cr0;
            if i.op0_kind() == OpKind::Memory {
                operand::write(v, i, 0, value, 2)
            } else {
                operand::write_reg(v, i.op0_register(), value);
                Ok(())
            }
        }
    }
}

/// INVLPG, INVPCID, INVD, WBINVD, WBNOINVD.
pub fn invalidate(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    if v.v86() {
        return Err(Exception::gp(0));
    }
    match i.mnemonic() {
        Mnemonic::Invlpg => {
            require_cpl0(v)?;
            let segment = operand::segment(i);
            let base = if v.long64() && segment < sreg::FS {
                0
            } else {
                v.frame.cpu.seg[segment].base
            };
            let mut lin = base.wrapping_add(operand::offset(v, i));
            if !v.long64() {
                lin &= 0xffff_ffff;
            }
            v.flush_page(lin);
            Ok(())
        }
        Mnemonic::Invpcid => invpcid(v, i),
        // Guest caches are the host's and coherent.
        _ => require_cpl0(v),
    }
}

/// Intel SDM Vol. 2A, INVPCID.
fn invpcid(v: &mut SoftVcpu, i: &Instruction) -> Result<(), Exception> {
    if !cpuid::feature(v, 7, Reg::Ebx, 10) {
        return Err(Exception::UD);
    }
    require_cpl0(v)?;
    let kind = operand::read_reg(v, i.op0_register());
    let lin = operand::mem_lin(v, i, 16, SegAccess::Read)?;
    let mut b = [0u8; 16];
    v.read_bytes(lin, &mut b, Priv::Current)?;
    let wide = u128::from_le_bytes(b);
    let (pcid, address) = (wide as u64, (wide >> 64) as u64);
    let no_pcid = v.frame.cpu.cr4 & cr4::PCIDE == 0;
    let bad = kind > 3
        || pcid & !0xfff != 0
        || (kind < 2 && no_pcid && pcid != 0)
        || (kind == 0 && !v.canonical(address));
    if bad {
        return Err(Exception::gp(0));
    }
    match kind {
        0 => v.flush_page(address),
        2 => v.flush_tlb(false),
        _ => v.flush_tlb(true),
    }
    Ok(())
}
