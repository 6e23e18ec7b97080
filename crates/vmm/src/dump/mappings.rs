//! All linear addresses that a vCPU's page tables map to RAM. Intel SDM Vol. 3A chapter 4.

use anyhow::{Result, bail};
use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;
use pyrite_x86::bits::{cr0, cr4, efer};

use super::Load;

/// LIMIT: page tables that are looked at; a guest can have them refer to each other.
const TABLES_MAX: usize = 1 << 20;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits 51:12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

struct Walk<'a> {
    memory: &'a GuestMemory,
    /// Entries have 4 bytes.
    narrow: bool,
    pse: bool,
    room: usize,
    tables: usize,
    found: Vec<Load>,
}

impl Walk<'_> {
    /// Looks at the table at `table`, each entry of which maps 2^`shift` bytes from `linear` on.
    fn table(&mut self, table: u64, shift: u32, linear: u64) -> Result<()> {
        self.tables += 1;
        if self.tables > TABLES_MAX {
            bail!("the guest has more than {TABLES_MAX} page tables; dump without --virtual");
        }
        let (count, bytes) = if self.narrow { (1024, 4) } else { (512, 8) };
        for n in 0..count {
            let at = table + n * bytes;
            let entry = if self.narrow {
                self.memory.read_u32(at).map(u64::from)
            } else {
                self.memory.read_u64(at)
            };
            // Tables that are not in RAM map nothing.
            let Ok(e) = entry else { return Ok(()) };
            if e & PRESENT == 0 {
                continue;
            }
            let here = linear | n << shift;
            let may_be_large = match (self.narrow, shift) {
                (true, 22) => self.pse,
                (false, 21 | 30) => true,
                _ => false,
            };
            if shift == 12 || (may_be_large && e & LARGE != 0) {
                let size = 1u64 << shift;
                let mut gpa = e & ADDRESS & !(size - 1);
                if self.narrow && shift == 22 {
                    // PSE-36, §4.3.
                    gpa = e & 0xffc0_0000 | (e >> 13 & 0xff) << 32;
                }
                self.add(here, gpa, size)?;
            } else {
                let next = if self.narrow { 12 } else { shift - 9 };
                self.table(e & ADDRESS, next, here)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, linear: u64, gpa: u64, bytes: u64) -> Result<()> {
        // Bit 47 or 56 is repeated in the bits above.
        let linear = if self.narrow || linear >> 32 == 0 {
            linear
        } else {
            linear | sign(linear)
        };
        if self.memory.ram_offset(gpa, bytes).is_none() {
            return self.add_parts(linear, gpa, bytes);
        }
        if let Some(last) = self.found.last_mut()
            && last.linear.checked_add(last.bytes) == Some(linear)
            && last.gpa + last.bytes == gpa
            && self
                .memory
                .ram_offset(last.gpa, last.bytes + bytes)
                .is_some()
        {
            last.bytes += bytes;
            return Ok(());
        }
        if self.found.len() >= self.room {
            bail!(
                "the guest has more than {} mappings, which do not fit into a core; dump without \
                 --virtual",
                self.room
            );
        }
        self.found.push(Load { linear, gpa, bytes });
        Ok(())
    }

    /// A large page of which only a part is RAM.
    fn add_parts(&mut self, linear: u64, gpa: u64, bytes: u64) -> Result<()> {
        let regions: Vec<(u64, u64)> = (self.memory.regions().iter())
            .map(|r| {
                (
                    r.gpa.max(gpa),
                    (r.gpa + r.size_bytes).min(gpa.saturating_add(bytes)),
                )
            })
            .filter(|(start, end)| start < end)
            .collect();
        for (start, end) in regions {
            if self.memory.ram_offset(start, end - start).is_some() {
                self.add(linear + (start - gpa), start, end - start)?;
            }
        }
        Ok(())
    }
}

/// The bits above a canonical address of 48 or 57 bits: 4-level paging has bit 47 as its highest.
fn sign(linear: u64) -> u64 {
    let bits = if linear >> 48 != 0 { 57 } else { 48 };
    if linear >> (bits - 1) & 1 != 0 {
        u64::MAX << bits
    } else {
        0
    }
}

/// The mappings of a vCPU, at most `room`, in pieces as large as they are contiguous.
pub fn all(memory: &GuestMemory, s: &CpuState, room: usize) -> Result<Vec<Load>> {
    let long = s.efer & efer::LMA != 0;
    let pae = s.cr4 & cr4::PAE != 0;
    let mut w = Walk {
        memory,
        narrow: !long && !pae,
        pse: s.cr4 & cr4::PSE != 0,
        room,
        tables: 0,
        found: Vec::new(),
    };
    if s.cr0 & cr0::PG == 0 {
        // Linear addresses are physical ones, which are there already.
        return Ok(Vec::new());
    }
    if long {
        let top = if s.cr4 & cr4::LA57 != 0 { 48 } else { 39 };
        w.table(s.cr3 & ADDRESS, top, 0)?;
    } else if pae {
        for (n, pdpte) in (0..).zip(s.pdpte) {
            if pdpte & PRESENT != 0 {
                w.table(pdpte & ADDRESS, 21, n << 30)?;
            }
        }
    } else {
        w.table(s.cr3 & 0xffff_f000, 22, 0)?;
    }
    Ok(w.found)
}
