//! The registers with which boot protocols enter a kernel, and the GDT and page tables they need.

use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;
use pyrite_x86::bits::{cr0, cr4, efer, rflags};
use pyrite_x86::state::{Segment, TableReg, gpr, sreg};

use super::{BootError, BootInput, write};
use crate::board::low;

/// Access rights of a flat 64-bit code segment: present, accessed, execute/read, L, G.
const CODE64: u32 = 0xa09b;
/// A flat 32-bit code segment: present, accessed, execute/read, D, G.
const CODE32: u32 = 0xc09b;
/// A flat data segment: present, accessed, read/write, B, G.
const DATA: u32 = 0xc093;

/// `__BOOT_CS` of the Linux boot protocol.
const BOOT_CS: u16 = 0x10;
/// `__BOOT_DS`.
const BOOT_DS: u16 = 0x18;
/// A task register must be present and busy for VM entry; 64-bit kernels expect one too.
const BOOT_TSS: u16 = 0x20;

/// A descriptor of base 0. Intel SDM Vol. 3A §3.4.5.
fn descriptor(attr: u32, limit: u32) -> u64 {
    let limit = if attr & Segment::G != 0 {
        limit >> 12
    } else {
        limit
    };
    let limit = u64::from(limit);
    (limit & 0xffff)
        | u64::from(attr & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | u64::from(attr >> 12 & 0xf) << 52
}

fn flat(selector: u16, attr: u32) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        attr,
        selector,
        reserved: [0; 3],
    }
}

fn write_gdt(memory: &GuestMemory, code: u32) -> Result<TableReg, BootError> {
    let gdt = [
        0,
        0,
        descriptor(code, !0),
        descriptor(DATA, !0),
        descriptor(0x8b, 0x67),
        0,
    ];
    let bytes: Vec<u8> = gdt.iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
    write(memory, low::GDT, &bytes, BootInput::Memory)?;
    Ok(TableReg {
        base: low::GDT,
        limit: bytes.len() as u32 - 1,
        reserved: 0,
    })
}

fn protected(memory: &GuestMemory, code: u32, rip: u64) -> Result<CpuState, BootError> {
    let mut s = CpuState::reset(0, true);
    s.gdtr = write_gdt(memory, code)?;
    s.idtr = TableReg::default();
    s.seg = [flat(BOOT_DS, DATA); 6];
    s.seg[sreg::CS] = flat(BOOT_CS, code);
    s.tr = Segment {
        base: 0,
        limit: 0x67,
        attr: 0x8b,
        selector: BOOT_TSS,
        reserved: [0; 3],
    };
    s.cr0 = cr0::PE | cr0::ET;
    s.rip = rip;
    s.rflags = rflags::FIXED1;
    Ok(s)
}

/// Flat 32-bit protected mode without paging, interrupts off.
pub(crate) fn protected_32(memory: &GuestMemory, rip: u64) -> Result<CpuState, BootError> {
    protected(memory, CODE32, rip)
}

/// 64-bit mode with the first 4 GiB mapped one to one, interrupts off.
pub(super) fn long_64(memory: &GuestMemory, rip: u64) -> Result<CpuState, BootError> {
    const PRESENT_WRITE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const GIB: u64 = 4;
    let pml4 = low::PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    let pd = pdpt + 0x1000;
    let put = |gpa: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        write(memory, gpa, &bytes, BootInput::Memory)
    };
    put(pml4, &[pdpt | PRESENT_WRITE])?;
    let tables: Vec<u64> = (0..GIB)
        .map(|n| (pd + n * 0x1000) | PRESENT_WRITE)
        .collect();
    put(pdpt, &tables)?;
    let pages: Vec<u64> = (0..GIB * 512)
        .map(|n| n << 21 | PRESENT_WRITE | LARGE)
        .collect();
    put(pd, &pages)?;
    let mut s = protected(memory, CODE64, rip)?;
    s.cr3 = pml4;
    s.cr4 = cr4::PAE;
    s.efer = efer::LME | efer::LMA;
    s.cr0 |= cr0::PG;
    s.gpr[gpr::RSP] = low::STACK_TOP;
    Ok(s)
}
