//! Linux: bzImage and vmlinux by the x86 boot protocol (Documentation/arch/x86/boot.rst).

use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;
use pyrite_x86::state::gpr;

use super::elf::{Elf, slice, u16_at, u32_at, u64_at};
use super::{BootError, BootImage, BootInput, e820, entry, load_initrd, write, write_cmdline};
use crate::board::low;

// Offsets in the setup header and in boot_params, which share them.
const SCREEN_MODE: u64 = 0x006;
const SCREEN_LINES: u64 = 0x00e;
const SETUP_SECTS: u64 = 0x1f1;
const SYSSIZE: u64 = 0x1f4;
const BOOT_FLAG: u64 = 0x1fe;
const JUMP: u64 = 0x201;
const HDRS: u64 = 0x202;
const VERSION: u64 = 0x206;
const TYPE_OF_LOADER: u64 = 0x210;
const LOADFLAGS: u64 = 0x211;
const CODE32_START: u64 = 0x214;
const RAMDISK_IMAGE: u64 = 0x218;
const RAMDISK_SIZE: u64 = 0x21c;
const CMD_LINE_PTR: u64 = 0x228;
const INITRD_ADDR_MAX: u64 = 0x22c;
const KERNEL_ALIGNMENT: u64 = 0x230;
const RELOCATABLE_KERNEL: u64 = 0x234;
const XLOADFLAGS: u64 = 0x236;
const CMDLINE_SIZE: u64 = 0x238;
const PREF_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;
// Only in boot_params.
const ACPI_RSDP_ADDR: u64 = 0x070;
const E820_ENTRIES: u64 = 0x1e8;
const E820_TABLE: u64 = 0x2d0;
const E820_MAX: usize = 128;
const ALT_MEM_K: u64 = 0x1e0;
const EXT_MEM_K: u64 = 0x002;

const LOADED_HIGH: u8 = 1 << 0;
const KEEP_SEGMENTS: u8 = 1 << 6;
const CAN_USE_HEAP: u8 = 1 << 7;
const XLF_KERNEL_64: u16 = 1 << 0;
/// "Undefined" boot loader: no number is assigned to this program.
const LOADER_UNDEFINED: u8 = 0xff;
/// Entry of a 64-bit kernel, from its load address.
const ENTRY_64: u64 = 0x200;
/// Size of boot_params.
const ZERO_PAGE_BYTES: usize = 4096;
/// Oldest protocol with a 32-bit command line pointer.
const MIN_VERSION: u16 = 0x0202;
/// Highest initrd address of kernels that do not say one.
const DEFAULT_INITRD_MAX: u32 = 0x37ff_ffff;

/// True for a file with the Linux boot header.
pub(super) fn is_linux(file: &[u8]) -> bool {
    slice(file, HDRS, 4) == Some(b"HdrS") && u16_at(file, BOOT_FLAG) == Some(0xaa55)
}

/// What the setup header says.
struct Setup {
    version: u16,
    /// File offset of the protected-mode code.
    code_offset: u64,
    xloadflags: u16,
    relocatable: bool,
    alignment: u64,
    pref_address: u64,
    /// Memory that the kernel needs from its load address on.
    init_bytes: u64,
    initrd_addr_max: u64,
    cmdline_limit: u64,
}

fn parse(file: &[u8]) -> Result<Setup, String> {
    let cut = || "this Linux kernel is truncated".to_owned();
    let version = u16_at(file, VERSION).ok_or_else(cut)?;
    if version < MIN_VERSION {
        return Err(format!(
            "this Linux kernel has boot protocol {}.{:02}; 2.02 or newer is needed",
            version >> 8,
            version & 0xff
        ));
    }
    let flags = *file.get(LOADFLAGS as usize).ok_or_else(cut)?;
    if flags & LOADED_HIGH == 0 {
        return Err("this Linux kernel is a zImage; a bzImage is needed".into());
    }
    let sects = match file.get(SETUP_SECTS as usize).copied().ok_or_else(cut)? {
        0 => 4,
        n => u64::from(n),
    };
    let code_offset = (sects + 1) * 512;
    // Protocol 2.04 made the size field 32 bits wide.
    let syssize = u32_at(file, SYSSIZE).ok_or_else(cut)?;
    let syssize = if version >= 0x0204 {
        syssize
    } else {
        syssize & 0xffff
    };
    let code_bytes = u64::from(syssize) * 16;
    let have = (file.len() as u64).saturating_sub(code_offset);
    // The size is rounded up to paragraphs; the file need not be.
    if code_offset + 16 > file.len() as u64 || (version >= 0x0204 && have + 15 < code_bytes) {
        return Err(format!(
            "this Linux kernel is truncated: {} bytes instead of {}",
            file.len(),
            code_offset + code_bytes
        ));
    }
    let since = |v: u16, at: u64| (version >= v).then(|| u32_at(file, at)).flatten();
    let relocatable = version >= 0x0205 && file.get(RELOCATABLE_KERNEL as usize) == Some(&1);
    let pref = (version >= 0x020a)
        .then(|| u64_at(file, PREF_ADDRESS))
        .flatten();
    Ok(Setup {
        version,
        code_offset,
        xloadflags: if version >= 0x020c {
            u16_at(file, XLOADFLAGS).unwrap_or(0)
        } else {
            0
        },
        relocatable,
        alignment: u64::from(since(0x0205, KERNEL_ALIGNMENT).unwrap_or(0)),
        pref_address: pref.unwrap_or(low::END),
        init_bytes: u64::from(since(0x020a, INIT_SIZE).unwrap_or(0)).max(have),
        initrd_addr_max: u64::from(since(0x0203, INITRD_ADDR_MAX).unwrap_or(DEFAULT_INITRD_MAX)),
        cmdline_limit: u64::from(since(0x0206, CMDLINE_SIZE).unwrap_or(255)),
    })
}

/// Checks a file for which [`is_linux`] holds.
pub(super) fn check(file: &[u8]) -> Result<(), String> {
    parse(file).map(|_| ())
}

/// Where to load: the preferred address if there is room, else the lowest one that the kernel can
/// be relocated to.
fn load_address(setup: &Setup, memory: &GuestMemory) -> Result<u64, BootError> {
    let end = super::low_ram_end(memory);
    let fits =
        |at: u64| at >= low::END && at.checked_add(setup.init_bytes).is_some_and(|e| e <= end);
    if fits(setup.pref_address) {
        return Ok(setup.pref_address);
    }
    if setup.relocatable && setup.alignment.is_power_of_two() {
        let at = low::END.next_multiple_of(setup.alignment);
        if fits(at) {
            return Ok(at);
        }
    }
    Err(BootError::new(
        BootInput::Memory,
        format!(
            "this kernel needs {} MiB to start; give it more than {} MiB",
            (setup.init_bytes + low::END).div_ceil(1 << 20),
            memory.size_bytes() >> 20
        ),
    ))
}

/// `boot_params` under construction.
struct ZeroPage(Vec<u8>);

impl ZeroPage {
    fn new() -> ZeroPage {
        ZeroPage(vec![0; ZERO_PAGE_BYTES])
    }
    fn put(&mut self, at: u64, bytes: &[u8]) {
        if let Some(slot) = self.0.get_mut(at as usize..at as usize + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    }
    fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// What every kernel is told, and the page itself into memory.
    fn finish(
        mut self,
        image: &BootImage,
        memory: &GuestMemory,
        rsdp: u64,
        initrd: (u64, u64),
        cmdline_limit: u64,
    ) -> Result<(), BootError> {
        write_cmdline(memory, &image.cmdline, cmdline_limit)?;
        if image.has_text_screen {
            // screen_info: cursor at 0, 0; page, mode, columns; lines, VGA, lines of a character.
            self.put(SCREEN_MODE, &[3, 80]);
            self.put(SCREEN_LINES, &[25, 1, 16, 0]);
        }
        self.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
        self.put32(CMD_LINE_PTR, low::CMDLINE as u32);
        self.put32(RAMDISK_IMAGE, initrd.0 as u32);
        self.put32(RAMDISK_SIZE, initrd.1 as u32);
        self.put(ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
        // KiB above 1 MiB, for kernels that read nothing better.
        let above_k = (super::low_ram_end(memory) - low::END) >> 10;
        self.put(EXT_MEM_K, &(above_k.min(0xfc00) as u16).to_le_bytes());
        self.put32(ALT_MEM_K, above_k as u32);
        let map = e820::memory_map(memory);
        self.put(E820_ENTRIES, &[map.len().min(E820_MAX) as u8]);
        for (n, r) in map.iter().take(E820_MAX).enumerate() {
            let at = E820_TABLE + n as u64 * 20;
            self.put(at, &r.start.to_le_bytes());
            self.put(at + 8, &r.size_bytes.to_le_bytes());
            self.put32(at + 16, r.kind as u32);
        }
        write(memory, low::ZERO_PAGE, &self.0, BootInput::Memory)
    }
}

pub(super) fn load_bzimage(
    image: &BootImage,
    file: &[u8],
    memory: &GuestMemory,
    rsdp: u64,
) -> Result<CpuState, BootError> {
    let setup = parse(file).map_err(|e| image.kernel.error(e))?;
    let at = load_address(&setup, memory)?;
    let code = file.get(setup.code_offset as usize..).unwrap_or_default();
    write(memory, at, code, BootInput::Kernel)?;
    let floor = at + setup.init_bytes;
    let initrd = load_initrd(image.initrd.as_ref(), memory, floor, setup.initrd_addr_max)?;

    let mut page = ZeroPage::new();
    // The setup header ends where the byte at 201H says (the displacement of a short jump).
    let end = 0x202 + u64::from(file.get(JUMP as usize).copied().unwrap_or(0));
    let header = slice(file, SETUP_SECTS, end.saturating_sub(SETUP_SECTS)).unwrap_or_default();
    page.put(SETUP_SECTS, header);
    let flags = file.get(LOADFLAGS as usize).copied().unwrap_or(0);
    page.put(LOADFLAGS, &[(flags | CAN_USE_HEAP) & !KEEP_SEGMENTS]);
    page.put32(CODE32_START, at as u32);
    tracing::debug!(
        version = setup.version,
        load = at,
        initrd = initrd.0,
        "bzImage placed"
    );
    page.finish(image, memory, rsdp, initrd, setup.cmdline_limit)?;
    enter(memory, setup.xloadflags & XLF_KERNEL_64 != 0, at)
}

pub(super) fn load_vmlinux(
    image: &BootImage,
    file: &[u8],
    memory: &GuestMemory,
    rsdp: u64,
) -> Result<CpuState, BootError> {
    let elf = Elf::parse(file).map_err(|e| image.kernel.error(e))?;
    if !elf.loads(elf.entry) {
        return Err(image.kernel.error(
            "the entry point of this ELF file is not a physical address inside it; expected a \
             Linux vmlinux or a PVH kernel",
        ));
    }
    let floor = elf.load(memory)?;
    let max = u64::from(if elf.is_64 {
        0x7fff_ffff
    } else {
        DEFAULT_INITRD_MAX
    });
    let initrd = load_initrd(image.initrd.as_ref(), memory, floor, max)?;
    let mut page = ZeroPage::new();
    // A loader of vmlinux makes up the header that only the bzImage carries.
    page.put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
    page.put(HDRS, b"HdrS");
    page.put(VERSION, &0x020fu16.to_le_bytes());
    page.put(LOADFLAGS, &[LOADED_HIGH]);
    page.put32(KERNEL_ALIGNMENT, 0x100_0000);
    page.finish(image, memory, rsdp, initrd, 2047)?;
    if elf.is_64 {
        let mut s = entry::long_64(memory, elf.entry)?;
        s.gpr[gpr::RSI] = low::ZERO_PAGE;
        Ok(s)
    } else {
        enter(memory, false, elf.entry)
    }
}

/// Registers for a bzImage loaded at `at`: 64-bit entry if it has one, else the 32-bit one.
fn enter(memory: &GuestMemory, is_64: bool, at: u64) -> Result<CpuState, BootError> {
    let mut s = if is_64 {
        entry::long_64(memory, at + ENTRY_64)?
    } else {
        entry::protected_32(memory, at)?
    };
    s.gpr[gpr::RSI] = low::ZERO_PAGE;
    s.gpr[gpr::RSP] = low::STACK_TOP;
    Ok(s)
}
