//! Firmware that a machine starts with: its image and variables, and what it is told of the machine.
//!
//! The board of such a machine is board version 1 with another host bridge, an LPC bridge, a ROM and
//! flash (`docs/adr/0007-firmware.md`). Firmware finds out the rest from fw_cfg: memory map, ACPI
//! and SMBIOS tables, boot order.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use pyrite_api::v1::{ConsoleKind, FirmwareSpec, SmbiosSpec, SpecError, VgaKind, VmSpec};
use pyrite_devices::chipset::{Chipset, FirmwareBoard};
use pyrite_devices::flash::{self, Flash, FlashStore, Volatile};
use pyrite_devices::fw_cfg::{self, FwCfg, FwCfgError};
use pyrite_devices::pci_host::{EcamBase, Q35_ECAM_BYTES, Windows};
use pyrite_devices::uart::SerialBackend;
use pyrite_engine::CpuidTable;
use pyrite_mem::{FIRMWARE_LOW_RAM_END, GuestMemory, HIGH_RAM_START};
use pyrite_vdev::bus::lock;

use crate::board::{IOAPIC_ADDR, firmware as board};
use crate::boot::{acpi, smbios};

#[cfg(test)]
mod tests;

/// LIMIT: bytes of code and variables together: what is below 4 GiB and above the local APIC.
const MAX_BYTES: u64 = 16 << 20;
/// LIMIT: bytes of a line of firmware's debug output.
const MAX_LINE: usize = 1024;

/// Firmware's files, opened.
pub struct Firmware {
    /// The ROM, which ends at 4 GiB: taken by whoever makes guest memory.
    pub code: Vec<u8>,
    code_bytes: u64,
    vars: Option<Flash>,
    order: Vec<String>,
    once: Option<String>,
    menu_ms: Option<u32>,
}

/// What a device is called in a boot order, and its path for firmware (IEEE 1275 notation).
pub type BootDevices = BTreeMap<String, String>;

fn read_image(field: &str, path: &Path) -> Result<Vec<u8>, SpecError> {
    let fail = |problem: String| {
        SpecError::new(
            format!("boot.firmware.{field}"),
            format!("{}: {problem}", path.display()),
        )
    };
    let meta = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?;
    if !meta.is_file() {
        return Err(fail(
            "expected a firmware image, which is a regular file".into(),
        ));
    }
    let size = meta.len();
    if size == 0 || size > MAX_BYTES || !size.is_multiple_of(pyrite_mem::PAGE_SIZE) {
        return Err(fail(format!(
            "has {size} bytes; expected a firmware image, which has whole 4 KiB pages and at most \
             16 MiB"
        )));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| fail(e.to_string()))?;
    file.take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|e| fail(e.to_string()))?;
    if bytes.len() as u64 != size {
        return Err(fail("the file changed while it was read".into()));
    }
    Ok(bytes)
}

/// Whether distributions name an image so that is built to need system management mode. Nothing in
/// the image says it: all of it but the reset vector is compressed.
fn needs_smm(code: &Path) -> bool {
    let path = std::fs::canonicalize(code).unwrap_or_else(|_| code.to_owned());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.to_lowercase().contains("secboot")
}

/// Reads code and template; says what is wrong with them.
fn read_images(spec: &FirmwareSpec) -> Result<(Vec<u8>, Option<Vec<u8>>), SpecError> {
    let code = read_image("code", &spec.code)?;
    let vars = match &spec.vars_template {
        Some(path) => Some(read_image("vars_template", path)?),
        None => None,
    };
    let all = code.len() + vars.as_ref().map_or(0, Vec::len);
    if all as u64 > MAX_BYTES {
        let problem = "code and variables have more than 16 MiB together";
        return Err(SpecError::new("boot.firmware.code", problem));
    }
    Ok((code, vars))
}

/// Looks at the files without making or changing any.
pub fn check(spec: &FirmwareSpec) -> Result<(), SpecError> {
    let (_, template) = read_images(spec)?;
    let (Some(path), Some(template)) = (&spec.vars, template) else {
        return Ok(());
    };
    let fail = |problem: String| {
        let problem = format!("{}: {problem}", path.display());
        Err(SpecError::new("boot.firmware.vars", problem))
    };
    match std::fs::metadata(path) {
        Ok(m) if !m.is_file() => fail("expected a file for variables".into()),
        Ok(m) if m.len() != template.len() as u64 => fail(format!(
            "has {} bytes, but variables of this firmware have {}; it belongs to another firmware",
            m.len(),
            template.len()
        )),
        Ok(_) => match File::options().read(true).write(true).open(path) {
            Ok(_) => Ok(()),
            Err(e) => fail(e.to_string()),
        },
        Err(e) if e.kind() == ErrorKind::NotFound => {
            match path.parent().filter(|p| !p.as_os_str().is_empty()) {
                Some(dir) if !dir.is_dir() => fail(format!("{} is no directory", dir.display())),
                _ => Ok(()),
            }
        }
        Err(e) => fail(e.to_string()),
    }
}

/// The file of the variables, made from the template if it is not there, and locked.
fn open_vars(path: &Path, template: &[u8]) -> Result<(Vec<u8>, File), String> {
    let text = |e: std::io::Error| e.to_string();
    if !path.exists() {
        // All of it under another name first: nobody ever finds half a file.
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let whole = Path::new(&name);
        let made = File::create(whole)
            .and_then(|mut f| f.write_all(template).and_then(|()| f.sync_all()))
            .and_then(|()| std::fs::hard_link(whole, path));
        let _ = std::fs::remove_file(whole);
        match made {
            // Somebody was faster.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            other => other.map_err(text)?,
        }
    }
    let mut file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(text)?;
    if file.metadata().map_err(text)?.file_type().is_fifo() {
        return Err("expected a file for variables".into());
    }
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err("another VM uses these variables; give each VM a file of its own".into());
        }
        Err(TryLockError::Error(e)) => return Err(text(e)),
    }
    let mut content = Vec::new();
    (&mut file)
        .take(MAX_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(text)?;
    if content.len() != template.len() {
        return Err(format!(
            "has {} bytes, but variables of this firmware have {}; it belongs to another firmware",
            content.len(),
            template.len()
        ));
    }
    Ok((content, file))
}

impl Firmware {
    /// Opens the files; makes that of the variables.
    pub fn open(spec: &FirmwareSpec) -> Result<Firmware, SpecError> {
        let (code, template) = read_images(spec)?;
        if needs_smm(&spec.code) {
            tracing::warn!(
                "{} wants system management mode, which this machine does not have, and will \
                 probably not start; OVMF_CODE_4M.fd with the same variables has secure boot too",
                spec.code.display()
            );
        }
        let vars = match (template, &spec.vars) {
            (None, _) => None,
            (Some(t), None) => {
                tracing::info!("firmware variables are lost at the end of this run");
                Some((t, Box::new(Volatile) as Box<dyn FlashStore>))
            }
            (Some(t), Some(path)) => {
                let (content, file) = open_vars(path, &t).map_err(|e| {
                    let problem = format!("{}: {e}", path.display());
                    SpecError::new("boot.firmware.vars", problem)
                })?;
                Some((content, Box::new(file) as Box<dyn FlashStore>))
            }
        };
        let vars = match vars {
            Some((content, store)) => {
                let chip = Flash::new(content, store).ok_or_else(|| {
                    let problem = format!("expected whole blocks of {} bytes", flash::BLOCK_BYTES);
                    SpecError::new("boot.firmware.vars_template", problem)
                })?;
                Some(chip)
            }
            None => None,
        };
        Ok(Firmware {
            code_bytes: code.len() as u64,
            code,
            vars,
            order: spec.order.clone(),
            once: spec.once.clone(),
            menu_ms: spec.menu_ms,
        })
    }

    /// What the chipset has for it: taken once.
    pub fn board(&mut self, memory: &GuestMemory) -> FirmwareBoard {
        let top = HIGH_RAM_START - self.code_bytes;
        FirmwareBoard {
            windows: windows(memory),
            flash: self.vars.take().map(|f| (top - f.size_bytes(), f)),
        }
    }

    /// All that firmware can ask for, but the boot order.
    pub fn describe(&self, spec: &VmSpec, chipset: &Chipset) -> Result<(), FwCfgError> {
        lock(&chipset.rtc).set_boot_flags();
        lock(&chipset.pm).set_off_type(board::SLP_TYP_S5.into());
        let mut f = lock(&chipset.fw_cfg);
        let cpus = (spec.cpus as u16).to_le_bytes();
        f.set_item(fw_cfg::CPUS, cpus);
        f.set_item(fw_cfg::MAX_CPUS, cpus);
        let no_screen = u16::from(spec.screen.vga == VgaKind::None);
        f.set_item(fw_cfg::NO_GRAPHIC, no_screen.to_le_bytes());
        f.set_item(fw_cfg::IRQ0_OVERRIDE, [1]);
        if let Some(uuid) = spec.smbios.uuid_bytes() {
            f.set_item(fw_cfg::UUID, uuid);
        }
        f.set_item(
            fw_cfg::BOOT_MENU,
            u16::from(self.menu_ms.is_some()).to_le_bytes(),
        );
        if let Some(ms) = self.menu_ms {
            let ms = u16::try_from(ms).unwrap_or(u16::MAX);
            f.add_file("etc/boot-menu-wait", ms.to_le_bytes())?;
        }
        f.add_file("etc/e820", e820(&chipset.memory))?;
        // Which sleep states there are: S5 only, with its value. QEMU documentation, fw_cfg.
        const SUPPORTED: u8 = 1 << 7;
        let states = [SUPPORTED, 0, 0, 0, 0, SUPPORTED | board::SLP_TYP_S5];
        f.add_file("etc/system-states", states)?;
        if spec.console != ConsoleKind::None {
            f.add_file("etc/sercon-port", 0x3f8u16.to_le_bytes())?;
        }
        let (anchor, tables) = smbios_files(spec.cpus, &chipset.memory, &spec.smbios);
        f.add_file("etc/smbios/smbios-anchor", anchor)?;
        f.add_file("etc/smbios/smbios-tables", tables)?;
        add_acpi(
            &mut f,
            chipset.pci.ecam(),
            windows(&chipset.memory),
            spec.cpus,
            crate::machine::acpi_extras(spec),
        )
    }

    /// Checks the names of the boot order.
    pub fn check_order(&self, devices: &BootDevices) -> Result<(), SpecError> {
        let known = || devices.keys().cloned().collect::<Vec<_>>().join(", ");
        let fields = self.order.iter().map(|name| ("order", name));
        for (field, name) in fields.chain(self.once.iter().map(|name| ("once", name))) {
            if !devices.contains_key(name) {
                let problem = format!("there is no {name}; this VM has {}", known());
                return Err(SpecError::new(format!("boot.firmware.{field}"), problem));
            }
        }
        Ok(())
    }

    /// Tells the boot order; `first`: the machine has not been reset yet.
    pub fn tell_order(
        &self,
        fw_cfg: &mut FwCfg,
        devices: &BootDevices,
        first: bool,
    ) -> Result<(), FwCfgError> {
        let once = self.once.iter().filter(|_| first);
        let paths = once.chain(&self.order).filter_map(|n| devices.get(n));
        let mut list: Vec<&str> = Vec::new();
        for p in paths {
            if !list.contains(&p.as_str()) {
                list.push(p);
            }
        }
        if list.is_empty() && self.once.is_none() {
            return Ok(());
        }
        let mut text = list.join("\n").into_bytes();
        text.push(0);
        fw_cfg.set_file("bootorder", text)
    }
}

/// End of RAM, or of the addresses below 4 GiB if that is more.
fn ram_end(memory: &GuestMemory) -> u64 {
    let ends = memory.regions().iter().map(|r| r.gpa + r.size_bytes);
    ends.fold(HIGH_RAM_START, u64::max)
}

/// The processor as a guest sees it that starts with firmware.
pub fn limit_cpuid(cpuid: &mut CpuidTable, memory_bytes: u64) {
    // Where RAM ends if all that is below 4 GiB is elsewhere.
    let end = HIGH_RAM_START.saturating_add(memory_bytes);
    cpuid.limit_physical_bits(board::physical_bits(end));
}

/// Where PCI functions may decode.
pub(crate) fn windows(memory: &GuestMemory) -> Windows {
    let start = ram_end(memory);
    Windows {
        mem32: (
            FIRMWARE_LOW_RAM_END,
            u64::from(IOAPIC_ADDR) - FIRMWARE_LOW_RAM_END,
        ),
        mem64: (start, (1 << board::physical_bits(start)) - start),
        io: (
            u64::from(board::PCI_IO_START),
            0x1_0000 - u64::from(board::PCI_IO_START),
        ),
    }
}

/// The tables' view of the board, with configuration space where firmware has put it.
pub fn acpi_board(ecam: Option<u64>, windows: Windows) -> acpi::Board {
    let (start, len) = windows.mem32;
    let end = start + len;
    // Firmware that has not said where reads tables that it will not use.
    let room = (start + pyrite_mem::PAGE_SIZE)..=(end - Q35_ECAM_BYTES - pyrite_mem::PAGE_SIZE);
    let ecam = ecam
        .filter(|a| room.contains(a))
        .unwrap_or(board::ECAM_USUAL);
    acpi::Board {
        table_id: board::TABLE_ID,
        ecam: Some(ecam),
        windows32: vec![
            (start as u32, (ecam - 1) as u32),
            ((ecam + Q35_ECAM_BYTES) as u32, (end - 1) as u32),
        ],
        window64: (windows.mem64.0, windows.mem64.0 + (windows.mem64.1 - 1)),
        io_start: windows.io.0 as u16,
        off_type: board::SLP_TYP_S5,
        extras: acpi::Extras::default(),
    }
}

fn add_acpi(
    f: &mut FwCfg,
    ecam: EcamBase,
    windows: Windows,
    vcpus: u32,
    extras: acpi::Extras,
) -> Result<(), FwCfgError> {
    f.add_computed(Box::new(move || {
        let board = acpi::Board {
            extras: extras.clone(),
            ..acpi_board(ecam.get(), windows)
        };
        let files = acpi::files(&board, vcpus);
        vec![
            ("etc/acpi/tables", files.tables),
            ("etc/acpi/rsdp", files.rsdp),
            ("etc/table-loader", files.loader),
        ]
    }))
}

/// RAM, as firmware takes it: start, length, kind of each range.
fn e820(memory: &GuestMemory) -> Vec<u8> {
    const RAM: u32 = 1;
    let range = |r: &pyrite_mem::RamRegion| {
        let mut b = r.gpa.to_le_bytes().to_vec();
        b.extend_from_slice(&r.size_bytes.to_le_bytes());
        b.extend_from_slice(&RAM.to_le_bytes());
        b
    };
    memory.regions().iter().flat_map(range).collect()
}

/// SMBIOS entry point and structures.
fn smbios_files(vcpus: u32, memory: &GuestMemory, identity: &SmbiosSpec) -> (Vec<u8>, Vec<u8>) {
    let ram: Vec<(u64, u64)> = memory
        .regions()
        .iter()
        .map(|r| (r.gpa, r.size_bytes))
        .collect();
    smbios::files(&smbios::Facts {
        vcpus,
        ram: &ram,
        identity,
    })
}

/// Debug output of firmware as lines of the log.
#[derive(Default)]
pub struct LogLines(Vec<u8>);

impl SerialBackend for LogLines {
    fn write(&mut self, data: &[u8]) {
        for byte in data {
            if *byte != b'\n' && self.0.len() < MAX_LINE {
                self.0.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.0);
            tracing::debug!(target: "pyrite_vmm::firmware", "{}", line.trim_end().escape_debug());
            self.0.clear();
        }
    }
}
