//! Guest memory as a debugger sees it: by linear address, through the page tables of a vCPU that
//! stands still, with the rights of nobody in particular and without leaving traces.

use pyrite_mem::{GuestMemory, PAGE_SIZE};
use pyrite_x86::CpuState;
use pyrite_x86::bits::{cr4, efer};
use pyrite_x86::paging::{self, AccessKind, PageTables, PagingMode};

/// Page tables that are only looked at.
struct Tables<'a>(&'a GuestMemory);

impl PageTables for Tables<'_> {
    fn read_entry(&mut self, gpa: u64, size: u8) -> u64 {
        if size == 8 {
            self.0.read_u64(gpa).unwrap_or(u64::MAX)
        } else {
            self.0.read_u32(gpa).map_or(u64::MAX, u64::from)
        }
    }
    fn set_bits(&mut self, _gpa: u64, _size: u8, _old: u64, _bits: u64) -> bool {
        true
    }
}

/// A view of guest memory.
pub struct View<'a> {
    /// The memory.
    pub memory: &'a GuestMemory,
    /// Whose page tables; addresses are guest-physical without.
    pub tables: Option<&'a CpuState>,
    /// Width of a guest-physical address in bits.
    pub physical_bits: u8,
}

/// The guest-physical address behind a linear one, and log2 of its page's size; `None` if it is not
/// mapped.
pub fn translate(
    memory: &GuestMemory,
    s: &CpuState,
    physical_bits: u8,
    lin: u64,
) -> Option<(u64, u8)> {
    if s.efer & efer::LMA != 0 {
        let bits = if s.cr4 & cr4::LA57 != 0 { 57 } else { 48 };
        if (lin.cast_signed() << (64 - bits) >> (64 - bits)).cast_unsigned() != lin {
            return None;
        }
    }
    let mode = PagingMode {
        cr0: s.cr0,
        cr3: s.cr3,
        // Pages of programs can be read, whoever runs.
        cr4: s.cr4 & !cr4::SMAP,
        efer: s.efer,
        ac: true,
        pdpte: s.pdpte,
        maxphyaddr: physical_bits,
    };
    let tables = &mut Tables(memory);
    let found = paging::walk(&mode, tables, lin, AccessKind::Read, false, false).ok()?;
    Some((found.gpa, found.page_shift))
}

impl View<'_> {
    /// The guest-physical address behind `at`, and the bytes from there to the end of its page.
    fn place(&self, at: u64) -> Option<(u64, usize)> {
        let gpa = match self.tables {
            Some(s) => translate(self.memory, s, self.physical_bits, at)?.0,
            None => at,
        };
        Some((gpa, (PAGE_SIZE - (gpa & (PAGE_SIZE - 1))) as usize))
    }

    /// What is at an address, up to `len` bytes: as much as is mapped and is RAM or ROM. Registers
    /// of devices are not touched.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        while out.len() < len {
            let Some(from) = at.checked_add(out.len() as u64) else {
                break;
            };
            let Some((gpa, room)) = self.place(from) else {
                break;
            };
            let mut part = vec![0; room.min(len - out.len())];
            if self.memory.read(gpa, &mut part).is_err() {
                break;
            }
            out.append(&mut part);
        }
        out
    }

    /// Changes memory, also such as the guest may only read; all of it or, if not all is RAM,
    /// nothing.
    pub fn write(&self, at: u64, data: &[u8]) -> bool {
        let mut parts = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let place = at.checked_add(done as u64).and_then(|a| self.place(a));
            let Some((gpa, room)) = place else {
                return false;
            };
            let n = room.min(data.len() - done);
            if self.memory.write_offset(gpa, n as u64).is_none() {
                return false;
            }
            let Some(part) = data.get(done..done + n) else {
                return false;
            };
            parts.push((gpa, part));
            done += n;
        }
        parts
            .iter()
            .all(|(gpa, part)| self.memory.write(*gpa, part).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pyrite_x86::bits::cr0;

    /// 4-level tables: FFFF_8000_0000_0000H is 5000H (read-only, of a program), the page behind it
    /// is 7000H, and the one behind that is not RAM.
    fn machine() -> (GuestMemory, CpuState) {
        let m = GuestMemory::new(16 << 20).unwrap();
        let put = |at: u64, v: u64| m.write(at, &v.to_le_bytes()).unwrap();
        put(0x1000 + 8 * 256, 0x2007);
        put(0x2000, 0x3007);
        put(0x3000, 0x4007);
        put(0x4000, 0x5005);
        put(0x4008, 0x7003);
        put(0x4010, 0xe000_0003);
        let mut s = CpuState::reset(0, true);
        s.cr0 |= cr0::PE | cr0::PG | cr0::WP;
        s.cr3 = 0x1000;
        s.cr4 = cr4::PAE | cr4::SMAP;
        s.efer = efer::LME | efer::LMA;
        (m, s)
    }

    const AT: u64 = 0xffff_8000_0000_0000;

    #[test]
    fn linear_memory_is_read_and_written_across_pages() {
        let (memory, s) = machine();
        let v = View {
            memory: &memory,
            tables: Some(&s),
            physical_bits: 40,
        };
        assert!(v.write(AT + 0xffe, &[1, 2, 3, 4]));
        assert_eq!(v.read(AT + 0xffe, 4), [1, 2, 3, 4]);
        let mut b = [0; 2];
        memory.read(0x7000, &mut b).unwrap();
        assert_eq!(b, [3, 4]);
        // No traces: neither accessed nor dirty.
        assert_eq!(memory.read_u64(0x4000).unwrap(), 0x5005);
        // Up to where it ends.
        assert_eq!(v.read(AT + 0x1ffc, 100).len(), 4);
        assert!(!v.write(AT + 0x1ffc, &[9; 8]));
        assert_eq!(v.read(AT + 0x1ffc, 4), [0; 4]);
        for nothing in [0, AT + 0x3000, 1 << 47, 1 << 63, u64::MAX, AT + 0x2000] {
            assert!(v.read(nothing, 4).is_empty(), "{nothing:#x}");
            assert!(!v.write(nothing, &[0]));
        }
    }

    #[test]
    fn physical_memory_needs_no_tables() {
        let (memory, _) = machine();
        let v = View {
            memory: &memory,
            tables: None,
            physical_bits: 40,
        };
        assert_eq!(v.read(0x1800, 2), [7, 0x20]);
        assert!(v.write(0x5ffe, &[1, 2, 3, 4]));
        assert_eq!(v.read(0x5ffe, 4), [1, 2, 3, 4]);
        assert!(v.read(u64::MAX - 1, 8).is_empty());
        assert!(!v.write(u64::MAX - 1, &[0; 8]));
        assert_eq!(v.read((16 << 20) - 2, 8).len(), 2);
    }
}
