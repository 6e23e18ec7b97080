//! PVH: an ELF kernel entered in 32-bit protected mode with a start info structure.
//!
//! Xen public headers, `arch-x86/hvm/start_info.h`, and docs/misc/pvh.pandoc.

use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;
use pyrite_x86::state::gpr;

use super::elf::Elf;
use super::{BootError, BootImage, BootInput, e820, entry, load_initrd, write, write_cmdline};
use crate::board::low;

const START_MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const INFO_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;
/// The structures reach to the zero page, which PVH does not use.
const LIMIT: u64 = low::ZERO_PAGE;

pub(super) fn load(
    image: &BootImage,
    file: &[u8],
    memory: &GuestMemory,
    rsdp: u64,
) -> Result<CpuState, BootError> {
    let elf = Elf::parse(file).map_err(|e| image.kernel.error(e))?;
    let entry = elf
        .pvh_entry()
        .map_err(|e| image.kernel.error(e))?
        .ok_or_else(|| image.kernel.error("this ELF file has no PVH entry note"))?;
    if !elf.loads(u64::from(entry)) {
        return Err(image
            .kernel
            .error("the PVH entry point is outside the kernel"));
    }
    let floor = elf.load(memory)?;
    let (initrd, initrd_bytes) =
        load_initrd(image.initrd.as_ref(), memory, floor, u64::from(u32::MAX))?;
    write_cmdline(memory, &image.cmdline, low::CMDLINE_BYTES)?;

    let modules = low::PVH_INFO + INFO_BYTES.next_multiple_of(16);
    let map_at = modules + MODULE_BYTES;
    let map = e820::memory_map(memory);
    let mut info = Vec::new();
    let put32 = |info: &mut Vec<u8>, v: u32| info.extend_from_slice(&v.to_le_bytes());
    let put64 = |info: &mut Vec<u8>, v: u64| info.extend_from_slice(&v.to_le_bytes());
    put32(&mut info, START_MAGIC);
    put32(&mut info, VERSION);
    put32(&mut info, 0); // flags
    put32(&mut info, u32::from(initrd_bytes > 0)); // nr_modules
    put64(&mut info, if initrd_bytes > 0 { modules } else { 0 });
    put64(&mut info, low::CMDLINE);
    put64(&mut info, rsdp);
    put64(&mut info, map_at);
    put32(&mut info, map.len() as u32);
    put32(&mut info, 0);
    info.resize((modules - low::PVH_INFO) as usize, 0);
    for word in [initrd, initrd_bytes, 0, 0] {
        put64(&mut info, word);
    }
    for r in &map {
        put64(&mut info, r.start);
        put64(&mut info, r.size_bytes);
        put32(&mut info, r.kind as u32);
        put32(&mut info, 0);
    }
    if low::PVH_INFO + info.len() as u64 > LIMIT {
        return Err(BootError::new(
            BootInput::Memory,
            "the memory map is too long for PVH",
        ));
    }
    write(memory, low::PVH_INFO, &info, BootInput::Memory)?;
    let mut s = entry::protected_32(memory, u64::from(entry))?;
    s.gpr[gpr::RBX] = low::PVH_INFO;
    Ok(s)
}
