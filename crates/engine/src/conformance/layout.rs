//! What a micro-guest finds in memory and registers when it starts.
//!
//! ```text
//! 1000H GDT        2000H IDT, 64-bit   3000H IDT, 32-bit   4000H 64-bit stubs, 4400H handlers
//! 4800H 32-bit stubs, 4C00H handlers   5400H TSS, 64-bit   5600H TSS, 32-bit
//! 6000H variables (see asm.rs)         7F00H stack         8000H the guest
//! 10000H-1FFFFH free, user pages       20000H page tables  1F000H ring 0 stack of the TSS
//! ```
//!
//! The first 2 MiB are mapped by 4 KiB pages, writable and for user mode, so that a guest can
//! change single pages; above it large pages map guest-physical addresses one to one, also for
//! 3-4 GiB. In long mode a 1 GiB page at 4000_0000H shows guest-physical 0.

use pyrite_mem::{GuestMemory, MemError};
use pyrite_x86::bits::{cr0, cr4, efer};
use pyrite_x86::{Activity, CpuState, Segment, TableReg, gpr, sreg};

use super::asm;

/// Where guests are loaded.
pub(super) const LOAD: u64 = 0x8000;
/// RAM of a micro-guest's VM.
pub(super) const RAM_BYTES: u64 = 4 << 20;
/// Size of the ROM in bytes: it ends at 4 GiB and, unless RAM is there, at 1 MiB.
const ROM_BYTES: usize = 64 << 10;
/// What the ROM begins with, 16-bit code: two functions that return 1 in EAX, the
/// second after it has written AL to port E4H.
const ROM_CODE: [u8; 25] = [
    0x66, 0xb8, 1, 0, 0, 0, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0, // mov $1, %eax; lret
    0xe6, 0xe4, 0x66, 0xb8, 1, 0, 0, 0, 0xcb, // out %al, $0xe4; mov $1, %eax; lret
];
const GDT: u64 = 0x1000;
const IDT64: u64 = 0x2000;
const IDT32: u64 = 0x3000;
const STUBS64: u64 = 0x4000;
const HANDLERS64: u64 = 0x4400;
const STUBS32: u64 = 0x4800;
const HANDLERS32: u64 = 0x4c00;
const GIVE_UP: u64 = 0x4700;
pub(super) const VARIABLES: u64 = 0x6000;
/// Bytes of variables that show whether a guest gets on.
pub(super) const VARIABLES_BYTES: usize = 0x800;
const TSS64: u64 = 0x5400;
const TSS32: u64 = 0x5600;
/// The I/O permission bitmap allows ports 0-FFH to every ring.
const TSS_LIMIT: u64 = 0x88;
const STACK: u64 = 0x7f00;
/// Between the stacks of two processors.
const STACK_BYTES: u64 = 0x200;
const STACK_RING0: u64 = 0x1_f000;
const STACK_IST1: u64 = 0x1_e000;
/// Vectors with a handler.
const VECTORS: u64 = 64;

/// Selectors. SYSCALL wants 08H/10H, SYSRET 20H/28H/30H in this order.
const CODE64: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE32: u16 = 0x18;
const TSS: u16 = 0x48;

/// The mode a guest starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Real mode, CS:IP = 0:8000H, IVT at 0.
    Real,
    /// Protected mode, flat 32-bit segments, no paging.
    Protected,
    /// The same with 32-bit paging (4 MiB pages but the first).
    Paging32,
    /// The same with PAE paging.
    Pae,
    /// 64-bit mode.
    Long,
    /// The same on all processors at once, without INIT and SIPI: RDI = index, a stack for each.
    LongTogether,
}

impl Entry {
    fn long(self) -> bool {
        matches!(self, Entry::Long | Entry::LongTogether)
    }
}

const DESCRIPTORS: [u64; 9] = [
    0,
    0x00af_9b00_0000_ffff, // 08 code, 64-bit
    0x00cf_9300_0000_ffff, // 10 data
    0x00cf_9b00_0000_ffff, // 18 code, 32-bit
    0x00cf_fb00_0000_ffff, // 20 code, 32-bit, DPL 3
    0x00cf_f300_0000_ffff, // 28 data, DPL 3
    0x00af_fb00_0000_ffff, // 30 code, 64-bit, DPL 3
    0x0000_9b00_0000_ffff, // 38 code, 16-bit, base 0
    0x0000_9300_0000_ffff, // 40 data, 16-bit, base 0
];

fn put(m: &GuestMemory, at: u64, words: &[u64]) -> Result<(), MemError> {
    for (n, w) in words.iter().enumerate() {
        m.write(at + 8 * n as u64, &w.to_le_bytes())?;
    }
    Ok(())
}

/// A system descriptor. Intel SDM Vol. 3A figure 3-8.
fn system_descriptor(base: u64, limit: u64, access: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

fn stubs(m: &GuestMemory, at: u64, handlers: u64) -> Result<(), MemError> {
    for v in 0..VECTORS {
        let mut code = Vec::new();
        // These push an error code themselves. Intel SDM Vol. 3A table 6-1.
        if !matches!(v, 8 | 10..=14 | 17 | 21) {
            code.extend([0x6a, 0]); // push 0
        }
        code.extend([0x6a, v as u8]); // push vector
        let next = at + v * 16 + code.len() as u64 + 5;
        code.push(0xe9); // jmp
        code.extend((handlers.wrapping_sub(next) as u32).to_le_bytes());
        m.write(at + v * 16, &code)?;
    }
    Ok(())
}

/// Memory of a micro-guest: RAM, and the ROM behind the last 64 KiB of the first MiB.
pub(super) fn memory() -> Result<GuestMemory, MemError> {
    let mut rom = vec![0; ROM_BYTES];
    rom[..ROM_CODE.len()].copy_from_slice(&ROM_CODE);
    let m = GuestMemory::with_rom(RAM_BYTES, &rom)?;
    let ram = pyrite_mem::Route {
        read_ram: true,
        write_ram: true,
    };
    m.set_route(pyrite_mem::LEGACY_START, pyrite_mem::LEGACY_END, ram);
    Ok(m)
}

/// Fills memory for a guest whose code is `image`.
pub(super) fn fill(m: &GuestMemory, image: &[u8], entry: Entry) -> Result<(), MemError> {
    m.write(LOAD, image)?;
    if entry == Entry::Real {
        return Ok(());
    }
    put(m, GDT, &DESCRIPTORS)?;
    if entry.long() {
        put(
            m,
            GDT + 0x48,
            &[system_descriptor(TSS64, TSS_LIMIT, 0x8b), 0],
        )?;
    } else {
        put(m, GDT + 0x48, &[system_descriptor(TSS32, TSS_LIMIT, 0x8b)])?;
    }
    stubs(m, STUBS64, HANDLERS64)?;
    stubs(m, STUBS32, HANDLERS32)?;
    m.write(HANDLERS64, &asm::handlers64()[..0x200])?;
    m.write(HANDLERS32, &asm::handlers32()[..0x200])?;
    // Where an exception that nobody expects goes: mov $2, %al; out %al, $0xf4; jmp .
    m.write(GIVE_UP, &[0xb0, 2, 0xe6, 0xf4, 0xeb, 0xfe])?;
    m.write(VARIABLES + 4, &(GIVE_UP as u32).to_le_bytes())?;
    m.write(VARIABLES + 8, &(STACK as u32).to_le_bytes())?;
    for v in 0..VECTORS {
        let (a, b) = (STUBS64 + v * 16, STUBS32 + v * 16);
        let dpl = if matches!(v, 3 | 4 | 0x3f) {
            3 << 45
        } else {
            0
        };
        let ist = u64::from(v == 8) << 32;
        let gate = |at: u64, cs: u16| at & 0xffff | u64::from(cs) << 16 | 0x8e << 40 | dpl;
        put(m, IDT64 + v * 16, &[gate(a, CODE64) | ist, 0])?;
        put(m, IDT32 + v * 8, &[gate(b, CODE32)])?;
    }
    m.write(TSS64 + 4, &STACK_RING0.to_le_bytes())?;
    m.write(TSS64 + 36, &STACK_IST1.to_le_bytes())?;
    m.write(TSS64 + 102, &0x68u16.to_le_bytes())?;
    m.write(TSS64 + TSS_LIMIT, &[0xff])?;
    m.write(TSS32 + TSS_LIMIT, &[0xff])?;
    m.write(TSS32 + 4, &(STACK_RING0 as u32).to_le_bytes())?;
    m.write(TSS32 + 8, &u32::from(DATA).to_le_bytes())?;
    m.write(TSS32 + 102, &0x68u16.to_le_bytes())?;
    page_tables(m)
}

fn page_tables(m: &GuestMemory) -> Result<(), MemError> {
    // 4 levels: 20000 PML4, 21000 PDPT, 22000 PD (0-1 GiB), 23000 PT, 24000 PD (3-4 GiB).
    put(m, 0x20000, &[0x21007])?;
    put(m, 0x21000, &[0x22007, 0x87, 0, 0x24007])?;
    let large = |base: u64| (0..512u64).map(move |n| (base + n * 0x20_0000) | 0x87);
    let small = (0..512u64).map(|n| n << 12 | 7).collect::<Vec<_>>();
    let mut low: Vec<u64> = large(0).collect();
    low[0] = 0x23007;
    put(m, 0x22000, &low)?;
    put(m, 0x23000, &small)?;
    put(m, 0x24000, &large(0xc000_0000).collect::<Vec<_>>())?;
    // 2 levels: 26000 PD, 27000 PT (0-4 MiB).
    for n in 0..1024u32 {
        let pde = if n == 0 { 0x27007 } else { n << 22 | 0x87 };
        m.write(0x26000 + 4 * u64::from(n), &pde.to_le_bytes())?;
        m.write(0x27000 + 4 * u64::from(n), &(n << 12 | 7).to_le_bytes())?;
    }
    // PAE: 28000 PDPT, 29000 PD, 2a000 PT, 2b000 PD (3-4 GiB).
    put(m, 0x28000, &[0x29001, 0, 0, 0x2b001])?;
    low[0] = 0x2a007;
    put(m, 0x29000, &low)?;
    put(m, 0x2a000, &small)?;
    put(m, 0x2b000, &large(0xc000_0000).collect::<Vec<_>>())
}

/// Registers of processor `index` at the start.
pub(super) fn start_state(entry: Entry, index: u32) -> CpuState {
    let mut s = CpuState::reset(index, index == 0);
    if index != 0 && entry != Entry::LongTogether {
        return s;
    }
    s.rip = LOAD;
    s.gpr[gpr::RSP] = STACK - STACK_BYTES * u64::from(index);
    s.gpr[gpr::RDI] = index.into();
    s.activity = Activity::Running;
    let flat = |selector: u16, attr: u32| Segment {
        base: 0,
        limit: 0xffff_ffff,
        attr,
        selector,
        reserved: [0; 3],
    };
    if entry == Entry::Real {
        s.seg[sreg::CS] = Segment::real(0, 0x9b);
        s.idtr = TableReg {
            base: 0,
            limit: 0x3ff,
            reserved: 0,
        };
        return s;
    }
    s.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::WP;
    s.seg = [flat(DATA, 0xc093); 6];
    s.gdtr = TableReg {
        base: GDT,
        limit: 0x1ff,
        reserved: 0,
    };
    let tss = |base: u64| Segment {
        base,
        limit: TSS_LIMIT as u32,
        attr: 0x8b,
        selector: TSS,
        reserved: [0; 3],
    };
    s.ldtr = Segment {
        attr: Segment::UNUSABLE | 0x82,
        ..Segment::default()
    };
    if entry.long() {
        s.seg[sreg::CS] = flat(CODE64, 0xa09b);
        s.tr = tss(TSS64);
        s.idtr = TableReg {
            base: IDT64,
            limit: 0xfff,
            reserved: 0,
        };
        s.cr0 |= cr0::PG;
        s.cr4 = cr4::PAE | cr4::OSFXSR;
        s.cr3 = 0x20000;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        return s;
    }
    s.seg[sreg::CS] = flat(CODE32, 0xc09b);
    s.tr = tss(TSS32);
    s.idtr = TableReg {
        base: IDT32,
        limit: 0x7ff,
        reserved: 0,
    };
    match entry {
        Entry::Paging32 => {
            s.cr0 |= cr0::PG;
            s.cr4 = cr4::PSE;
            s.cr3 = 0x26000;
        }
        Entry::Pae => {
            s.cr0 |= cr0::PG;
            s.cr4 = cr4::PAE;
            s.cr3 = 0x28000;
            s.efer = efer::NXE;
            s.pdpte = [0x29001, 0, 0, 0x2b001];
        }
        _ => {}
    }
    s
}
