//! Boot images: what is in memory and in the first vCPU's registers when the guest begins.
//!
//! A kernel is entered directly, as a boot loader that has done its work would: there is no
//! firmware. [`BootImage::load`] writes the kernel, the initrd, the command line and everything a
//! firmware would have left behind (ACPI tables, MP table, memory map, BIOS data area), and returns
//! the registers. It is called before the first start and again after each reset of the machine.
//!
//! Files are hostile: every offset and size in them is checked against the file and guest memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use pyrite_api::v1::SmbiosSpec;
use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;

pub mod acpi;
pub mod cpio;
pub mod e820;
mod elf;
pub(crate) mod entry;
mod linux;
mod lowmem;
mod mptable;
mod multiboot;
mod pvh;
pub mod smbios;

#[cfg(test)]
mod tests;

/// Which input a boot error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootInput {
    /// The kernel file.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// The kernel command line.
    Append,
    /// A Multiboot module.
    Module,
    /// The size of memory.
    Memory,
}

impl BootInput {
    /// The field of the VM specification, which is also the name of the command's option.
    pub fn field(self) -> &'static str {
        match self {
            BootInput::Kernel => "kernel",
            BootInput::Initrd => "initrd",
            BootInput::Append => "append",
            BootInput::Module => "module",
            BootInput::Memory => "memory",
        }
    }
}

/// Why a guest cannot be booted from what was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct BootError {
    /// What was wrong.
    pub input: BootInput,
    /// What about it, and what was expected.
    pub problem: String,
}

impl BootError {
    pub(crate) fn new(input: BootInput, problem: impl Into<String>) -> BootError {
        BootError {
            input,
            problem: problem.into(),
        }
    }
}

/// One file, opened once: a reset must boot the same bytes even if the path has changed since.
#[derive(Debug)]
pub struct BootFile {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    input: BootInput,
}

impl BootFile {
    /// Opens a regular file.
    pub fn open(input: BootInput, path: &Path) -> Result<BootFile, BootError> {
        let fail = |what: &str, e: std::io::Error| {
            BootError::new(input, format!("cannot {what} {}: {e}", path.display()))
        };
        // A FIFO would block in open; nothing but a regular file can be read twice anyway.
        let meta = std::fs::metadata(path).map_err(|e| fail("open", e))?;
        if !meta.is_file() {
            return Err(BootError::new(
                input,
                format!("{} is not a regular file", path.display()),
            ));
        }
        let file = File::open(path).map_err(|e| fail("open", e))?;
        let size_bytes = file.metadata().map_err(|e| fail("read", e))?.len();
        Ok(BootFile {
            path: path.to_owned(),
            file,
            size_bytes,
            input,
        })
    }

    /// Its size when it was opened.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn error(&self, problem: impl std::fmt::Display) -> BootError {
        BootError::new(self.input, format!("{}: {problem}", self.path.display()))
    }

    /// The whole content, if it is at most `limit` bytes.
    fn read_all(&self, limit: u64) -> Result<Vec<u8>, BootError> {
        if self.size_bytes > limit {
            return Err(self.error(format_args!(
                "{} bytes do not fit into guest memory",
                self.size_bytes
            )));
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0)).map_err(|e| self.error(e))?;
        let mut out = Vec::with_capacity(usize::try_from(self.size_bytes).unwrap_or(0));
        file.take(self.size_bytes)
            .read_to_end(&mut out)
            .map_err(|e| self.error(e))?;
        if out.len() as u64 != self.size_bytes {
            return Err(self.error("the file became shorter while it was read"));
        }
        Ok(out)
    }

    /// Copies the content to guest memory, a piece at a time.
    fn copy_to(&self, memory: &GuestMemory, gpa: u64) -> Result<(), BootError> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0)).map_err(|e| self.error(e))?;
        let mut piece = vec![0; 1 << 20];
        let mut done = 0u64;
        while done < self.size_bytes {
            let want = usize::try_from(self.size_bytes - done).unwrap_or(usize::MAX);
            let part = piece.len().min(want);
            let Some(part) = piece.get_mut(..part) else {
                break;
            };
            file.read_exact(part).map_err(|e| self.error(e))?;
            write(memory, gpa + done, part, self.input)?;
            done += part.len() as u64;
        }
        Ok(())
    }
}

/// Everything a guest is booted from.
#[derive(Debug)]
pub struct BootImage {
    /// The kernel.
    pub kernel: BootFile,
    /// Initial RAM disk.
    pub initrd: Option<BootFile>,
    /// Multiboot modules with their arguments.
    pub modules: Vec<(BootFile, String)>,
    /// Kernel command line.
    pub cmdline: String,
    /// There is a VGA in text mode 3.
    pub has_text_screen: bool,
    /// Who the machine says that it is.
    pub identity: SmbiosSpec,
    /// Floppy drives.
    pub extras: acpi::Extras,
}

/// What kind of kernel a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// Linux bzImage, Documentation/arch/x86/boot.rst.
    BzImage,
    /// ELF with a PVH entry note.
    Pvh,
    /// ELF vmlinux without one.
    Vmlinux,
    /// Multiboot 1.
    Multiboot,
}

const EXPECTED: &str = "expected a Linux bzImage, an ELF vmlinux or PVH kernel, or a Multiboot 1 \
                        kernel";

impl BootImage {
    /// Writes everything into `memory`, which must be zeroed, and returns the registers with which
    /// the first vCPU (of `vcpus`) begins.
    pub fn load(&self, memory: &GuestMemory, vcpus: u32) -> Result<CpuState, BootError> {
        if self.cmdline.contains('\0') {
            return Err(BootError::new(
                BootInput::Append,
                "contains a NUL character",
            ));
        }
        let kernel = self.kernel.read_all(memory.size_bytes())?;
        let format = self.format_of(&kernel)?;
        tracing::info!(?format, bytes = kernel.len(), "loading kernel");
        if format != KernelFormat::Multiboot && !self.modules.is_empty() {
            return Err(BootError::new(
                BootInput::Module,
                "only a Multiboot kernel takes modules, and this kernel is none",
            ));
        }
        let rsdp = lowmem::write_tables(memory, vcpus, &self.identity, &self.extras)?;
        match format {
            KernelFormat::BzImage => linux::load_bzimage(self, &kernel, memory, rsdp),
            KernelFormat::Vmlinux => linux::load_vmlinux(self, &kernel, memory, rsdp),
            KernelFormat::Pvh => pvh::load(self, &kernel, memory, rsdp),
            KernelFormat::Multiboot => multiboot::load(self, &kernel, memory),
        }
    }

    /// The kind of kernel, or an error that says what was expected.
    pub fn format(&self) -> Result<KernelFormat, BootError> {
        // LIMIT: a kernel file of more than 2 GiB is no kernel.
        self.format_of(&self.kernel.read_all(1 << 31)?)
    }

    fn format_of(&self, kernel: &[u8]) -> Result<KernelFormat, BootError> {
        if kernel.is_empty() {
            return Err(self
                .kernel
                .error(format_args!("the file is empty; {EXPECTED}")));
        }
        if linux::is_linux(kernel) {
            linux::check(kernel).map_err(|e| self.kernel.error(e))?;
            return Ok(KernelFormat::BzImage);
        }
        let multiboot = multiboot::find_header(kernel).is_some();
        if elf::is_elf(kernel) {
            let elf = elf::Elf::parse(kernel).map_err(|e| self.kernel.error(e))?;
            let pvh = elf.pvh_entry().map_err(|e| self.kernel.error(e))?.is_some();
            return match (pvh, multiboot) {
                (true, false) => Ok(KernelFormat::Pvh),
                (true, true) if self.modules.is_empty() => Ok(KernelFormat::Pvh),
                (_, true) => Ok(KernelFormat::Multiboot),
                (false, false) => Ok(KernelFormat::Vmlinux),
            };
        }
        if multiboot {
            return Ok(KernelFormat::Multiboot);
        }
        let what = match kernel {
            [0x1f, 0x8b, ..] => "a gzip file",
            [0x1f, 0x9d, ..] | [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', b'Z', ..] => {
                "a compressed file"
            }
            [b'!', b'<', b'a', b'r', b'c', b'h', ..] => "a package",
            [b'M', b'Z', ..] => "an EFI or DOS program without a Linux boot header",
            _ => "not a kernel",
        };
        Err(self
            .kernel
            .error(format_args!("this is {what}; {EXPECTED}")))
    }
}

/// "All updates are applied": kernels compare the revision with the one that fixes an erratum, and
/// errata are the host's affair. Intel keeps it in the upper half.
pub fn microcode(s: &mut CpuState, cpuid: &pyrite_engine::CpuidTable) {
    /// "Genu", of "GenuineIntel".
    const INTEL_EBX: u32 = 0x756e_6547;
    let intel = cpuid.get(0, 0).is_some_and(|e| e.ebx == INTEL_EBX);
    s.msrs.bios_sign_id = u64::from(u32::MAX) << if intel { 32 } else { 0 };
}

/// What firmware programs into every processor: memory types, microcode, and on the first one the local
/// interrupts that connect the PIC and NMI ("virtual wire mode", MultiProcessor Specification 1.4
/// §3.6.2.2).
pub fn firmware_registers(s: &mut CpuState, cpuid: &pyrite_engine::CpuidTable, bootstrap: bool) {
    const WRITE_BACK: u64 = 6;
    const UNCACHEABLE: u64 = 0;
    /// Fixed-range and all MTRRs enabled. Intel SDM Vol. 3A §11.11.2.1.
    const ENABLE: u64 = 1 << 11 | 1 << 10;
    const VALID: u64 = 1 << 11;
    let bits = cpuid
        .get(0x8000_0008, 0)
        .map_or(36, |e| e.eax & 0xff)
        .clamp(32, 52);
    microcode(s, cpuid);
    s.msrs.mtrr_def_type = ENABLE | WRITE_BACK;
    // Everything from 3 GiB to 4 GiB is devices.
    s.msrs.mtrr_var[0] = pyrite_mem::LOW_RAM_END | UNCACHEABLE;
    s.msrs.mtrr_var[1] = ((1 << bits) - 1) & !((1 << 30) - 1) | VALID;
    s.msrs.mtrr_fixed = [0x0606_0606_0606_0606; 11];
    s.msrs.mtrr_fixed[2] = 0; // A0000-BFFFF: no memory there
    if bootstrap {
        const SVR: usize = 0xf;
        const LVT_LINT0: usize = 0x35;
        const LVT_LINT1: usize = 0x36;
        s.apic.regs[SVR] = 0x1ff; // enabled
        s.apic.regs[LVT_LINT0] = 0x700; // ExtINT
        s.apic.regs[LVT_LINT1] = 0x400; // NMI
    }
}

/// End of RAM below the PCI hole.
pub(crate) fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.low_ram_end()
}

/// Writes to guest memory; a failure is about `input`.
pub(crate) fn write(
    memory: &GuestMemory,
    gpa: u64,
    data: &[u8],
    input: BootInput,
) -> Result<(), BootError> {
    memory.write(gpa, data).map_err(|_| {
        BootError::new(
            input,
            format!(
                "{} bytes at {gpa:#x} do not fit into {} MiB of guest memory",
                data.len(),
                memory.size_bytes() >> 20
            ),
        )
    })
}

/// Writes the command line with its NUL at [`crate::board::low::CMDLINE`]; at most `limit` bytes
/// without it.
pub(crate) fn write_cmdline(
    memory: &GuestMemory,
    cmdline: &str,
    limit: u64,
) -> Result<(), BootError> {
    let limit = limit.min(crate::board::low::CMDLINE_BYTES - 1);
    if cmdline.len() as u64 > limit {
        return Err(BootError::new(
            BootInput::Append,
            format!(
                "the command line has {} bytes, but this kernel takes at most {limit}",
                cmdline.len()
            ),
        ));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(
        memory,
        crate::board::low::CMDLINE,
        &bytes,
        BootInput::Append,
    )
}

/// Places and copies the initrd: page-aligned, as high as possible below `addr_max` (inclusive)
/// and the end of low RAM, above `floor`. Returns its address and size; (0, 0) without one.
pub(crate) fn load_initrd(
    initrd: Option<&BootFile>,
    memory: &GuestMemory,
    floor: u64,
    addr_max: u64,
) -> Result<(u64, u64), BootError> {
    let Some(file) = initrd else {
        return Ok((0, 0));
    };
    if file.size_bytes == 0 {
        return Err(file.error("the file is empty; expected an initial RAM disk (cpio archive)"));
    }
    let end = low_ram_end(memory).min(addr_max.saturating_add(1));
    let addr = end
        .checked_sub(file.size_bytes)
        .map(|a| a & !(pyrite_mem::PAGE_SIZE - 1))
        .filter(|a| *a >= floor)
        .ok_or_else(|| {
            file.error(format_args!(
                "{} MiB of initrd and the kernel do not fit into {} MiB of guest memory; give \
                 more with --memory",
                file.size_bytes.div_ceil(1 << 20),
                memory.size_bytes() >> 20
            ))
        })?;
    file.copy_to(memory, addr)?;
    Ok((addr, file.size_bytes))
}
