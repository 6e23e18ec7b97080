//! A stopped machine as an ELF core: memory and registers for `gdb` and `crash`.
//!
//! ```text
//! ELF header · program headers · notes · RAM, sparse
//! ```
//!
//! One PT_LOAD per range of RAM, whose physical address is the guest's; its virtual address is the
//! same, so that a debugger can be asked for physical memory. With linear addresses, the mappings of
//! the first vCPU's page tables follow and refer to the same bytes of the file. Notes: NT_PRSTATUS
//! per vCPU as in Linux's cores (include/linux/elfcore.h), what QEMU's `dump-guest-memory` says of
//! each vCPU (target/i386/arch_dump.c: control registers, with which `crash` finds a kernel at a
//! random address), and the VMCOREINFO that a Linux guest has for this.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use pyrite_mem::{GuestMemory, PAGE_SIZE, RamRegion};
use pyrite_x86::{CpuState, Segment, gpr, sreg};

mod mappings;
#[cfg(test)]
mod tests;
mod vmcoreinfo;

pub use vmcoreinfo::{FILE as VMCOREINFO_FILE, OFFER as VMCOREINFO_OFFER};

/// Memory is copied in pieces of this size; a piece of zeroes is not written.
const PIECE: usize = 64 << 10;

/// ELF-64 Object File Format 1.5: sizes of headers.
const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Read, write, execute.
const RWX: u32 = 7;
/// LIMIT: program headers; e_phnum has 16 bits, and FFFFH means more (gABI, PN_XNUM).
const PHDRS_MAX: usize = 0xfffe;

const NT_PRSTATUS: u32 = 1;

/// Part of the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    linear: u64,
    gpa: u64,
    bytes: u64,
}

/// Writes a core to the new file `path`, for its owner only. On error nothing is left behind.
/// `linear`: with the linear addresses of the first vCPU. `told`: what the guest wrote to the
/// firmware file [`VMCOREINFO_FILE`].
pub fn write(
    path: &Path,
    memory: &GuestMemory,
    states: &[Box<CpuState>],
    linear: bool,
    told: Option<&[u8]>,
) -> Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    let file = options
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    let done = fill(&file, memory, states, linear, told);
    if done.is_err() {
        let _ = fs::remove_file(path);
    }
    done
}

fn fill(
    file: &File,
    memory: &GuestMemory,
    states: &[Box<CpuState>],
    linear: bool,
    told: Option<&[u8]>,
) -> Result<()> {
    let regions = memory.regions();
    let mut loads: Vec<Load> = regions
        .iter()
        .map(|r| Load {
            linear: r.gpa,
            gpa: r.gpa,
            bytes: r.size_bytes,
        })
        .collect();
    if linear && let Some(first) = states.first() {
        let room = PHDRS_MAX - 1 - loads.len();
        loads.extend(mappings::all(memory, first, room)?);
    }
    let ram = File::from(memory.fd().try_clone().context("cannot read memory")?);
    let mut notes = Vec::new();
    for (n, s) in (1..).zip(states) {
        note(&mut notes, b"CORE\0", NT_PRSTATUS, &prstatus(n, s));
    }
    for s in states {
        note(&mut notes, b"QEMU\0", 0, &qemu_state(s));
    }
    if let Some(info) = vmcoreinfo::find(memory, &ram, told) {
        note(&mut notes, b"VMCOREINFO\0", 0, &info);
    }

    let notes_at = EHDR_BYTES + PHDR_BYTES * (1 + loads.len());
    let ram_at = (notes_at + notes.len()).next_multiple_of(PAGE_SIZE as usize) as u64;
    let mut head = header(1 + loads.len());
    program_header(
        &mut head,
        PT_NOTE,
        0,
        notes_at as u64,
        [0; 2],
        notes.len() as u64,
    );
    for l in &loads {
        let at = ram_at + offset_of(regions, l).context("a mapping is outside RAM")?;
        program_header(&mut head, PT_LOAD, RWX, at, [l.linear, l.gpa], l.bytes);
    }
    head.extend(notes);
    file.write_all_at(&head, 0)
        .context("cannot write the core")?;
    file.set_len(ram_at + memory.size_bytes())
        .context("cannot size the core")?;
    let mut piece = vec![0; PIECE];
    for at in (0..memory.size_bytes()).step_by(PIECE) {
        let n = (memory.size_bytes() - at).min(PIECE as u64) as usize;
        let part = piece.get_mut(..n).unwrap_or_default();
        // Through the file: reading what the guest never touched takes no memory.
        ram.read_exact_at(part, at).context("cannot read memory")?;
        if part.iter().any(|b| *b != 0) {
            file.write_all_at(part, ram_at + at)
                .context("cannot write the core")?;
        }
    }
    file.sync_all().context("cannot write the core")
}

/// Offset in RAM of a part, if all of it is in one region.
fn offset_of(regions: &[RamRegion], l: &Load) -> Option<u64> {
    regions.iter().find_map(|r| {
        let at = l.gpa.checked_sub(r.gpa)?;
        (at.checked_add(l.bytes)? <= r.size_bytes).then_some(r.ram_offset + at)
    })
}

fn header(phdrs: usize) -> Vec<u8> {
    // 64-bit, little-endian, version 1, System V.
    let mut h = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    h.extend(ET_CORE.to_le_bytes());
    h.extend(EM_X86_64.to_le_bytes());
    h.extend(1u32.to_le_bytes());
    // Entry; program headers; no sections; flags.
    for word in [0, EHDR_BYTES as u64, 0] {
        h.extend(word.to_le_bytes());
    }
    h.extend([0; 4]);
    for half in [EHDR_BYTES, PHDR_BYTES, phdrs, 0, 0, 0] {
        h.extend((half as u16).to_le_bytes());
    }
    h
}

fn program_header(to: &mut Vec<u8>, kind: u32, flags: u32, at: u64, addr: [u64; 2], bytes: u64) {
    to.extend(kind.to_le_bytes());
    to.extend(flags.to_le_bytes());
    // Offset, virtual and physical address, bytes in the file and in memory, alignment.
    for word in [at, addr[0], addr[1], bytes, bytes, 0] {
        to.extend(word.to_le_bytes());
    }
}

/// Adds a note. Name and description are padded to 4 bytes each.
fn note(to: &mut Vec<u8>, name: &[u8], kind: u32, description: &[u8]) {
    for word in [name.len() as u32, description.len() as u32, kind] {
        to.extend(word.to_le_bytes());
    }
    for part in [name, description] {
        to.extend(part);
        to.resize(to.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus` of x86-64: identity and registers of a thread.
fn prstatus(pid: u32, s: &CpuState) -> Vec<u8> {
    let mut b = vec![0; 32];
    b.extend(pid.to_le_bytes());
    // Parents, and four times.
    b.resize(112, 0);
    let g = |n: usize| s.gpr.get(n).copied().unwrap_or(0);
    let selector = |n: usize| s.seg.get(n).map_or(0, |x| u64::from(x.selector));
    let base = |n: usize| s.seg.get(n).map_or(0, |x| x.base);
    let registers = [
        g(15),
        g(14),
        g(13),
        g(12),
        g(gpr::RBP),
        g(gpr::RBX),
        g(11),
        g(10),
        g(9),
        g(8),
        g(gpr::RAX),
        g(gpr::RCX),
        g(gpr::RDX),
        g(gpr::RSI),
        g(gpr::RDI),
        // No system call is to be restarted.
        u64::MAX,
        s.rip,
        selector(sreg::CS),
        s.rflags,
        g(gpr::RSP),
        selector(sreg::SS),
        base(sreg::FS),
        base(sreg::GS),
        selector(sreg::DS),
        selector(sreg::ES),
        selector(sreg::FS),
        selector(sreg::GS),
    ];
    for r in registers {
        b.extend(r.to_le_bytes());
    }
    // No floating-point registers follow.
    b.extend([0; 8]);
    b
}

/// QEMU's `QEMUCPUState`, version 1.
fn qemu_state(s: &CpuState) -> Vec<u8> {
    const BYTES: u32 = 8 + 18 * 8 + 10 * 24 + 5 * 8 + 8;
    let mut b = Vec::new();
    b.extend(1u32.to_le_bytes());
    b.extend(BYTES.to_le_bytes());
    use gpr::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
    for n in [
        RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, 8, 9, 10, 11, 12, 13, 14, 15,
    ] {
        b.extend(s.gpr.get(n).copied().unwrap_or(0).to_le_bytes());
    }
    b.extend(s.rip.to_le_bytes());
    b.extend(s.rflags.to_le_bytes());
    let table = |t: &pyrite_x86::TableReg| Segment {
        base: t.base,
        limit: t.limit,
        ..Segment::default()
    };
    let segment = |n: usize| s.seg.get(n).copied().unwrap_or_default();
    let all = [
        segment(sreg::CS),
        segment(sreg::DS),
        segment(sreg::ES),
        segment(sreg::FS),
        segment(sreg::GS),
        segment(sreg::SS),
        s.ldtr,
        s.tr,
        table(&s.gdtr),
        table(&s.idtr),
    ];
    for x in all {
        // Flags are the descriptor's upper double word: our access rights from bit 8 on.
        let flags = (x.attr & 0xf0ff) << 8;
        for word in [u32::from(x.selector), x.limit, flags, 0] {
            b.extend(word.to_le_bytes());
        }
        b.extend(x.base.to_le_bytes());
    }
    for c in [s.cr0, 0, s.cr2, s.cr3, s.cr4, s.msrs.kernel_gs_base] {
        b.extend(c.to_le_bytes());
    }
    b
}
