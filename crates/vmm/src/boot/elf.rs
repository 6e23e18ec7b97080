//! ELF executables as kernels: loadable segments and notes. System V ABI, ELF-64 and ELF-32.

use pyrite_mem::GuestMemory;

use super::{BootError, BootInput, write};
use crate::board::low;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit physical entry point of the PVH ABI.
const PHYS32_ENTRY: u32 = 18;
/// LIMIT: program headers of a kernel.
const MAX_SEGMENTS: u16 = 256;

/// A program header.
#[derive(Clone, Copy, Debug)]
struct Segment {
    ty: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_bytes: u64,
    mem_bytes: u64,
}

/// A parsed executable.
pub(super) struct Elf<'a> {
    file: &'a [u8],
    /// 64-bit class.
    pub is_64: bool,
    /// Entry point.
    pub entry: u64,
    segments: Vec<Segment>,
}

pub(super) fn is_elf(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

pub(super) fn u16_at(b: &[u8], at: u64) -> Option<u16> {
    let at = usize::try_from(at).ok()?;
    b.get(at..at.checked_add(2)?)?
        .try_into()
        .ok()
        .map(u16::from_le_bytes)
}

pub(super) fn u32_at(b: &[u8], at: u64) -> Option<u32> {
    let at = usize::try_from(at).ok()?;
    b.get(at..at.checked_add(4)?)?
        .try_into()
        .ok()
        .map(u32::from_le_bytes)
}

pub(super) fn u64_at(b: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    b.get(at..at.checked_add(8)?)?
        .try_into()
        .ok()
        .map(u64::from_le_bytes)
}

/// The bytes `start..start+len` of a file.
pub(super) fn slice(b: &[u8], start: u64, len: u64) -> Option<&[u8]> {
    let end = usize::try_from(start.checked_add(len)?).ok()?;
    b.get(usize::try_from(start).ok()?..end)
}

impl<'a> Elf<'a> {
    /// Parses the headers and checks that every segment is in the file.
    pub fn parse(file: &'a [u8]) -> Result<Elf<'a>, String> {
        let cut = || "this ELF file is truncated".to_owned();
        let is_64 = match file.get(4) {
            Some(1) => false,
            Some(2) => true,
            _ => return Err("this ELF file is damaged: unknown class".into()),
        };
        if file.get(5) != Some(&1) {
            return Err("this ELF file is big-endian; expected an x86 kernel".into());
        }
        let machine = u16_at(file, 18).ok_or_else(cut)?;
        if machine != EM_386 && machine != EM_X86_64 {
            return Err(format!(
                "this ELF file is for machine {machine}, not for x86"
            ));
        }
        let kind = u16_at(file, 16).ok_or_else(cut)?;
        if kind != 2 && kind != 3 {
            return Err("this ELF file is not executable (a module or object file?)".into());
        }
        let (entry, table, size, count) = if is_64 {
            (
                u64_at(file, 24),
                u64_at(file, 32),
                u16_at(file, 54),
                u16_at(file, 56),
            )
        } else {
            let wide = |at| u32_at(file, at).map(u64::from);
            (wide(24), wide(28), u16_at(file, 42), u16_at(file, 44))
        };
        let (entry, table) = (entry.ok_or_else(cut)?, table.ok_or_else(cut)?);
        let (size, count) = (size.ok_or_else(cut)?, count.ok_or_else(cut)?);
        let smallest = if is_64 { 56 } else { 32 };
        if count == 0 || count > MAX_SEGMENTS || size < smallest {
            return Err("this ELF file has no usable program headers".into());
        }
        let mut segments = Vec::new();
        for n in 0..u64::from(count) {
            let at = table.checked_add(n * u64::from(size)).ok_or_else(cut)?;
            let s = Self::segment(file, is_64, at).ok_or_else(cut)?;
            if matches!(s.ty, PT_LOAD | PT_NOTE) && slice(file, s.offset, s.file_bytes).is_none() {
                return Err(cut());
            }
            if s.ty == PT_LOAD && s.file_bytes > s.mem_bytes {
                return Err("this ELF file is damaged: a segment is larger than its memory".into());
            }
            segments.push(s);
        }
        if !segments.iter().any(|s| s.ty == PT_LOAD && s.mem_bytes > 0) {
            return Err("this ELF file has nothing to load".into());
        }
        Ok(Elf {
            file,
            is_64,
            entry,
            segments,
        })
    }

    fn segment(file: &[u8], is_64: bool, at: u64) -> Option<Segment> {
        let wide = |field: u64| u32_at(file, at.checked_add(field)?).map(u64::from);
        let long = |field: u64| u64_at(file, at.checked_add(field)?);
        let ty = u32_at(file, at)?;
        Some(if is_64 {
            Segment {
                ty,
                offset: long(8)?,
                vaddr: long(16)?,
                paddr: long(24)?,
                file_bytes: long(32)?,
                mem_bytes: long(40)?,
            }
        } else {
            Segment {
                ty,
                offset: wide(4)?,
                vaddr: wide(8)?,
                paddr: wide(12)?,
                file_bytes: wide(16)?,
                mem_bytes: wide(20)?,
            }
        })
    }

    /// Copies the loadable segments; what is not in the file stays zero. Returns the end of the
    /// highest one.
    pub fn load(&self, memory: &GuestMemory) -> Result<u64, BootError> {
        let end_of_ram = super::low_ram_end(memory);
        let mut top = low::END;
        for s in self
            .segments
            .iter()
            .filter(|s| s.ty == PT_LOAD && s.mem_bytes > 0)
        {
            let end = s
                .paddr
                .checked_add(s.mem_bytes)
                .filter(|e| *e <= end_of_ram);
            let end = end.ok_or_else(|| {
                BootError::new(
                    BootInput::Kernel,
                    format!(
                        "a segment of the kernel at {:#x} ({} bytes) does not fit into {} MiB of \
                         guest memory",
                        s.paddr,
                        s.mem_bytes,
                        memory.size_bytes() >> 20
                    ),
                )
            })?;
            if s.paddr < low::END {
                return Err(BootError::new(
                    BootInput::Kernel,
                    format!(
                        "a segment of the kernel wants address {:#x}, below 1 MiB",
                        s.paddr
                    ),
                ));
            }
            let data = slice(self.file, s.offset, s.file_bytes).unwrap_or_default();
            write(memory, s.paddr, data, BootInput::Kernel)?;
            top = top.max(end);
        }
        Ok(top)
    }

    /// Physical address of the entry point, which the header may give as a virtual one: that of a
    /// segment is tried first, as GRUB does for Multiboot kernels.
    pub fn physical_entry(&self) -> Option<u64> {
        self.segments
            .iter()
            .filter(|s| s.ty == PT_LOAD)
            .find(|s| self.entry >= s.vaddr && self.entry - s.vaddr < s.mem_bytes)
            .map(|s| (self.entry - s.vaddr).wrapping_add(s.paddr))
            .or(Some(self.entry))
            .filter(|at| self.loads(*at))
    }

    /// True if `paddr` is inside a loaded segment.
    pub fn loads(&self, paddr: u64) -> bool {
        self.segments
            .iter()
            .any(|s| s.ty == PT_LOAD && paddr >= s.paddr && paddr - s.paddr < s.mem_bytes)
    }

    /// The PVH entry point from the notes, if there is one.
    pub fn pvh_entry(&self) -> Result<Option<u32>, String> {
        for s in self.segments.iter().filter(|s| s.ty == PT_NOTE) {
            let notes = slice(self.file, s.offset, s.file_bytes).unwrap_or_default();
            let mut at = 0u64;
            while let (Some(name), Some(desc), Some(ty)) = (
                u32_at(notes, at),
                u32_at(notes, at + 4),
                u32_at(notes, at + 8),
            ) {
                let name_at = at + 12;
                let desc_at = name_at + u64::from(name).next_multiple_of(4);
                let is_xen = slice(notes, name_at, u64::from(name)) == Some(b"Xen\0");
                if is_xen && ty == PHYS32_ENTRY {
                    // Four or eight bytes; the address is below 4 GiB either way.
                    return u32_at(notes, desc_at)
                        .filter(|_| desc >= 4)
                        .map(Some)
                        .ok_or_else(|| "the PVH note of this ELF file is damaged".to_owned());
                }
                at = desc_at + u64::from(desc).next_multiple_of(4);
            }
        }
        Ok(None)
    }
}
