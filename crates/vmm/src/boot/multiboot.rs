//! Multiboot 1 kernels with modules. Multiboot Specification 0.6.96.

use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;
use pyrite_x86::state::gpr;

use super::elf::{self, Elf, slice, u32_at};
use super::{BootError, BootImage, BootInput, e820, entry, write};
use crate::board::low;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const BOOTLOADER_MAGIC: u64 = 0x2bad_b002;
/// §3.1: the header is in the first 8192 bytes.
const SEARCH_BYTES: u64 = 8192;
/// Header flag 2: a video mode is wanted (we have none; the field is advice).
const FLAG_VIDEO: u32 = 1 << 2;
/// Header flag 16: the address fields are valid.
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Flags whose meaning we know; others of the low 16 are requirements that we cannot meet.
const KNOWN_REQUIRED: u32 = 1 << 0 | 1 << 1 | FLAG_VIDEO;
/// LIMIT: modules.
const MAX_MODULES: usize = 64;
const INFO_BYTES: u64 = 120;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODS: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// Offset of the header in the file.
pub(super) fn find_header(file: &[u8]) -> Option<u64> {
    let end = (file.len() as u64).min(SEARCH_BYTES);
    (0..end.saturating_sub(11)).step_by(4).find(|&at| {
        let (magic, flags, sum) = (u32_at(file, at), u32_at(file, at + 4), u32_at(file, at + 8));
        match (magic, flags, sum) {
            (Some(HEADER_MAGIC), Some(f), Some(s)) => {
                HEADER_MAGIC.wrapping_add(f).wrapping_add(s) == 0
            }
            _ => false,
        }
    })
}

/// Copies the kernel; returns its entry point and the end of what it occupies.
fn load_kernel(
    image: &BootImage,
    file: &[u8],
    memory: &GuestMemory,
) -> Result<(u64, u64), BootError> {
    let damaged = || {
        image
            .kernel
            .error("this Multiboot kernel is truncated or damaged")
    };
    let at = find_header(file).ok_or_else(damaged)?;
    let flags = u32_at(file, at + 4).ok_or_else(damaged)?;
    let unknown = flags & 0xffff & !KNOWN_REQUIRED;
    if unknown != 0 {
        return Err(image.kernel.error(format_args!(
            "this Multiboot kernel requires unknown features {unknown:#x}"
        )));
    }
    if flags & FLAG_ADDRESSES == 0 {
        if !elf::is_elf(file) {
            return Err(image.kernel.error(
                "this Multiboot kernel is neither ELF nor says where \
                                           it wants to be loaded",
            ));
        }
        let elf = Elf::parse(file).map_err(|e| image.kernel.error(e))?;
        let entry = elf.physical_entry().ok_or_else(|| {
            image
                .kernel
                .error("the entry point of this Multiboot kernel is outside of what it loads")
        })?;
        let end = elf.load(memory)?;
        return Ok((entry, end));
    }
    let field = |n: u64| u32_at(file, at + n).map(u64::from).ok_or_else(damaged);
    let (header_addr, load_addr, load_end) = (field(12)?, field(16)?, field(20)?);
    let (bss_end, entry) = (field(24)?, field(28)?);
    let into = header_addr.checked_sub(load_addr).ok_or_else(damaged)?;
    let start = at.checked_sub(into).ok_or_else(damaged)?;
    let bytes = match load_end {
        0 => file.len() as u64 - start,
        end => end.checked_sub(load_addr).ok_or_else(damaged)?,
    };
    let data = slice(file, start, bytes).ok_or_else(damaged)?;
    if load_addr < low::END {
        return Err(image
            .kernel
            .error("this Multiboot kernel wants to be loaded below 1 MiB"));
    }
    write(memory, load_addr, data, BootInput::Kernel)?;
    Ok((entry, (load_addr + bytes).max(bss_end)))
}

/// Strings and structures that the information points to.
struct Strings {
    base: u64,
    bytes: Vec<u8>,
}

impl Strings {
    fn add(&mut self, bytes: &[u8]) -> u32 {
        let at = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        at as u32
    }
    fn add_string(&mut self, text: &str) -> u32 {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.add(&bytes)
    }
}

pub(super) fn load(
    image: &BootImage,
    file: &[u8],
    memory: &GuestMemory,
) -> Result<CpuState, BootError> {
    let (entry, mut top) = load_kernel(image, file, memory)?;
    if image.modules.len() > MAX_MODULES {
        let problem = format!("at most {MAX_MODULES} modules can be given");
        return Err(BootError::new(BootInput::Module, problem));
    }
    let mut strings = Strings {
        base: low::MULTIBOOT_INFO + INFO_BYTES,
        bytes: Vec::new(),
    };
    let mut modules = Vec::new();
    // A plain initrd is the first module, as GRUB users expect.
    let initrd = image.initrd.iter().map(|f| (f, ""));
    for (module, args) in initrd.chain(image.modules.iter().map(|(f, a)| (f, a.as_str()))) {
        let start = top.next_multiple_of(pyrite_mem::PAGE_SIZE);
        let end = start
            .checked_add(module.size_bytes())
            .filter(|e| *e <= super::low_ram_end(memory));
        let end = end.ok_or_else(|| module.error("does not fit into guest memory"))?;
        module.copy_to(memory, start)?;
        let name = strings.add_string(args);
        modules.extend([start as u32, end as u32, name, 0]);
        top = end;
    }
    let modules: Vec<u8> = modules.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mods_count = (modules.len() / 16) as u32;
    let mods_addr = strings.add(&modules);
    let cmdline = strings.add_string(&image.cmdline);
    let loader = strings.add_string("pyrite");
    let mut map = Vec::new();
    for r in e820::memory_map(memory) {
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&r.start.to_le_bytes());
        map.extend_from_slice(&r.size_bytes.to_le_bytes());
        map.extend_from_slice(&(r.kind as u32).to_le_bytes());
    }
    let map_at = strings.add(&map);

    let mut info = vec![0u8; INFO_BYTES as usize];
    let mut put = |at: usize, v: u32| {
        if let Some(slot) = info.get_mut(at..at + 4) {
            slot.copy_from_slice(&v.to_le_bytes());
        }
    };
    put(
        0,
        INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_LOADER_NAME,
    );
    put(4, (low::EBDA >> 10) as u32);
    put(8, ((super::low_ram_end(memory) - low::END) >> 10) as u32);
    put(16, cmdline);
    put(20, mods_count);
    put(24, mods_addr);
    put(44, map.len() as u32);
    put(48, map_at);
    put(64, loader);
    info.extend_from_slice(&strings.bytes);
    if info.len() as u64 > low::CMDLINE - low::MULTIBOOT_INFO {
        return Err(BootError::new(
            BootInput::Append,
            "the command line is too long",
        ));
    }
    write(memory, low::MULTIBOOT_INFO, &info, BootInput::Memory)?;
    let mut s = entry::protected_32(memory, entry)?;
    s.gpr[gpr::RAX] = BOOTLOADER_MAGIC;
    s.gpr[gpr::RBX] = low::MULTIBOOT_INFO;
    Ok(s)
}
