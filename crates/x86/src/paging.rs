//! The page walk, as a pure function over a reader of guest-physical memory.
//!
//! Intel SDM Vol. 3A chapter 4; AMD APM Vol. 2 chapter 5.

use crate::bits::{cr0, cr4, efer, pf};

/// Why the memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write, or the read half of a read-modify-write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// The registers that decide how a linear address is translated.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "register names of the manual")]
pub struct PagingMode {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// EFLAGS.AC, which suspends SMAP for explicit supervisor accesses.
    pub ac: bool,
    /// PDPTE registers of PAE paging.
    pub pdpte: [u64; 4],
    /// Width of a physical address in bits (CPUID 8000_0008H).
    pub maxphyaddr: u8,
}

/// A successful walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the byte asked for.
    pub gpa: u64,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub page_shift: u8,
    /// User-mode accesses are allowed (U/S at every level).
    pub user: bool,
    /// R/W is set at every level (CR0.WP decides what a supervisor may do without it).
    pub writable: bool,
    /// Fetches are allowed (no XD at any level).
    pub executable: bool,
    /// The dirty flag of the leaf is set.
    pub dirty: bool,
    /// The leaf is global and CR4.PGE is set.
    pub global: bool,
}

/// Reads and updates page-table entries in guest-physical memory.
pub trait PageTables {
    /// Reads `size` bytes (4 or 8), little-endian. Memory that is not there reads as all-ones.
    fn read_entry(&mut self, gpa: u64, size: u8) -> u64;
    /// Sets `bits` in the entry if it still equals `old`, atomically; false = it has changed.
    fn set_bits(&mut self, gpa: u64, size: u8, old: u64, bits: u64) -> bool;
}

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// Walks the page tables for one byte at `lin`.
///
/// `user`: the access counts as a user-mode access (CPL 3 and not an implicit supervisor access).
/// `implicit`: an implicit supervisor access (descriptor tables, TSS), for which SMAP ignores AC.
///
/// Sets A bits on the path and D on a write, atomically. Returns the #PF error code on failure;
/// the caller adds CR2. A non-canonical address is the caller's business.
pub fn walk(
    mode: &PagingMode,
    tables: &mut dyn PageTables,
    lin: u64,
    kind: AccessKind,
    user: bool,
    implicit: bool,
) -> Result<Translation, u32> {
    if mode.cr0 & cr0::PG == 0 {
        return Ok(Translation {
            gpa: lin & 0xffff_ffff,
            page_shift: 12,
            user: true,
            writable: true,
            executable: true,
            dirty: true,
            global: true,
        });
    }
    // An entry may change under our feet (another vCPU); the walk then starts again. LIMIT: a
    // racing guest cannot hold us here for ever.
    for _ in 0..64 {
        if let Some(r) = walk_once(mode, tables, lin, kind, user, implicit) {
            return r;
        }
    }
    Err(pf::P | fault_bits(mode, kind, user))
}

fn fault_bits(mode: &PagingMode, kind: AccessKind, user: bool) -> u32 {
    let mut e = 0;
    if kind == AccessKind::Write {
        e |= pf::WR;
    }
    if user {
        e |= pf::US;
    }
    // I/D is reported only when XD or SMEP can make a fetch special. SDM Vol. 3A §4.7.
    let nxe = mode.efer & efer::NXE != 0 && (mode.cr4 & cr4::PAE != 0);
    if kind == AccessKind::Execute && (nxe || mode.cr4 & cr4::SMEP != 0) {
        e |= pf::ID;
    }
    e
}

/// `None` = an entry changed while it was being updated.
fn walk_once(
    mode: &PagingMode,
    tables: &mut dyn PageTables,
    lin: u64,
    kind: AccessKind,
    user: bool,
    implicit: bool,
) -> Option<Result<Translation, u32>> {
    let base_err = fault_bits(mode, kind, user);
    let long = mode.efer & efer::LMA != 0;
    let pae = mode.cr4 & cr4::PAE != 0;
    let nxe = mode.efer & efer::NXE != 0;
    let phys_mask = ((1u64 << mode.maxphyaddr.min(52)) - 1) & !0xfff;
    let entry_size: u8 = if pae { 8 } else { 4 };
    let mut path: [(u64, u64); 5] = [(0, 0); 5];
    let mut depth = 0usize;

    let (mut table, mut shift, index_bits): (u64, u32, u32) = if long {
        let top = if mode.cr4 & cr4::LA57 != 0 { 48 } else { 39 };
        (mode.cr3 & phys_mask, top, 9)
    } else if pae {
        let pdpte = mode.pdpte[((lin >> 30) & 3) as usize];
        if pdpte & P == 0 {
            return Some(Err(base_err));
        }
        (pdpte & phys_mask, 21, 9)
    } else {
        (mode.cr3 & 0xffff_f000, 22, 10)
    };

    let (mut rw, mut us, mut nx) = (true, true, false);
    let lin = if long { lin } else { lin & 0xffff_ffff };
    loop {
        let index = (lin >> shift) & ((1 << index_bits) - 1);
        let gpa = table + index * u64::from(entry_size);
        let e = tables.read_entry(gpa, entry_size);
        if e & P == 0 {
            return Some(Err(base_err));
        }
        let large_ok = match (long || pae, shift) {
            (true, 21) => true,
            (true, 30) => long,
            (false, 22) => mode.cr4 & cr4::PSE != 0,
            _ => false,
        };
        let leaf = shift == 12 || (large_ok && e & PS != 0);
        // Reserved bits. SDM Vol. 3A §4.3-4.5: address bits above MAXPHYADDR, XD without NXE, PS
        // where no large page exists, low address bits of a large page (bit 12 is PAT).
        let mut reserved = 0u64;
        if pae {
            reserved |= 0x000f_ffff_ffff_f000 & !phys_mask;
            if !nxe {
                reserved |= NX;
            }
            if !long {
                reserved |= 0x7ff0_0000_0000_0000;
            }
            if shift >= 39 {
                reserved |= PS;
            }
            if leaf && shift > 12 {
                reserved |= ((1u64 << shift) - 1) & !0x1fff;
            }
        } else if leaf && shift == 22 {
            reserved |= 1 << 21; // PSE-36: bits 20:13 are address bits 39:32
        }
        if e & reserved != 0 {
            return Some(Err(base_err | pf::P | pf::RSVD));
        }
        rw &= e & RW != 0;
        us &= e & US != 0;
        nx |= pae && nxe && e & NX != 0;
        if depth < path.len() {
            path[depth] = (gpa, e);
            depth += 1;
        }
        if !leaf {
            table = if pae { e & phys_mask } else { e & 0xffff_f000 };
            shift -= index_bits;
            continue;
        }
        if !allowed(mode, kind, user, implicit, rw, us, nx) {
            return Some(Err(base_err | pf::P));
        }
        let mut dirty = e & D != 0;
        for (n, &(gpa, e)) in path[..depth].iter().enumerate() {
            let last = n + 1 == depth;
            let want = A | if last && kind == AccessKind::Write {
                D
            } else {
                0
            };
            if e & want != want && !tables.set_bits(gpa, entry_size, e, want) {
                return None;
            }
            if last && kind == AccessKind::Write {
                dirty = true;
            }
        }
        let page_mask = (1u64 << shift) - 1;
        let frame = if pae {
            e & phys_mask & !page_mask
        } else if shift == 22 {
            (e & 0xffc0_0000) | ((e >> 13) & 0xff) << 32
        } else {
            e & 0xffff_f000
        };
        return Some(Ok(Translation {
            gpa: frame | (lin & page_mask),
            page_shift: shift as u8,
            user: us,
            writable: rw,
            executable: !nx,
            dirty,
            global: e & G != 0 && mode.cr4 & cr4::PGE != 0,
        }));
    }
}

/// SDM Vol. 3A §4.6.1.
fn allowed(
    mode: &PagingMode,
    kind: AccessKind,
    user: bool,
    implicit: bool,
    rw: bool,
    us: bool,
    nx: bool,
) -> bool {
    match kind {
        AccessKind::Execute => {
            if nx || (user && !us) {
                return false;
            }
            user || !us || mode.cr4 & cr4::SMEP == 0
        }
        AccessKind::Read | AccessKind::Write => {
            if user {
                return us && (kind == AccessKind::Read || rw);
            }
            if us && mode.cr4 & cr4::SMAP != 0 && (implicit || !mode.ac) {
                return false;
            }
            kind == AccessKind::Read || rw || mode.cr0 & cr0::WP == 0
        }
    }
}
