//! Options about firmware, and where hosts keep it.

use std::path::{Path, PathBuf};

use clap::Args;
use pyrite_api::v1::{FirmwareSpec, SmbiosSpec, VmSpec};

/// SeaBIOS as distributions install it.
const BIOS: [&str; 4] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/seabios/bios.bin",
    "/usr/share/qemu-kvm/bios-256k.bin",
];
/// OVMF without secure boot (which would need system management mode), and its empty variables.
const UEFI: [(&str, &str); 5] = [
    (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    (
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
        "/usr/share/edk2/x64/OVMF_VARS.4m.fd",
    ),
    (
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        "/usr/share/edk2/ovmf/OVMF_VARS.fd",
    ),
    (
        "/usr/share/qemu/ovmf-x86_64-code.bin",
        "/usr/share/qemu/ovmf-x86_64-vars.bin",
    ),
    (
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_VARS.fd",
    ),
];

/// How long a boot menu waits if nothing is said, in milliseconds.
const MENU_MS: u32 = 5000;

/// Options of `pyrite run` about firmware.
#[derive(Debug, Args)]
pub struct FirmwareArgs {
    /// Start with firmware instead of a kernel: bios, uefi, or an image
    ///
    /// bios and uefi are SeaBIOS and OVMF as this host has them installed (packages seabios and
    /// ovmf). An image that has CODE in its name finds its empty variables under the name with VARS.
    /// Builds that need system management mode (secboot) do not start.
    #[arg(
        long,
        value_name = "bios|uefi|FILE",
        conflicts_with_all = ["kernel", "restore"],
        value_parser = find_firmware
    )]
    pub firmware: Option<FirmwareSpec>,
    /// File that keeps the variables of UEFI firmware; made if it is not there
    ///
    /// It is made as a copy of template=FILE, by default of the variables that belong to the
    /// firmware. With those that have keys (OVMF_VARS_4M.ms.fd) UEFI starts only what is signed.
    /// Without this option variables are lost at the end.
    #[arg(
        long,
        value_name = "FILE[,template=FILE]",
        requires = "firmware",
        value_parser = parse_vars
    )]
    pub firmware_vars: Option<VarsFile>,
    /// What firmware boots: order=disk1:disk0:net0, once=DEVICE until the first reset, menu[=TIME]
    #[arg(
        long,
        value_name = "[order=DEVICE:...][,once=DEVICE][,menu[=MS]]",
        requires = "firmware",
        value_parser = parse_boot
    )]
    pub boot: Option<BootOrder>,
    /// Who the machine says that it is (SMBIOS); a comma in a text is written twice
    #[arg(
        long,
        value_name = "[vendor=TEXT][,product=TEXT][,version=TEXT][,serial=TEXT][,uuid=UUID]",
        value_parser = parse_smbios,
        conflicts_with = "restore"
    )]
    pub smbios: Option<SmbiosSpec>,
}

/// What `--firmware-vars` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VarsFile {
    file: PathBuf,
    template: Option<PathBuf>,
}

/// What `--boot` says.
#[derive(Clone, Debug, Default)]
pub struct BootOrder {
    order: Vec<String>,
    once: Option<String>,
    menu_ms: Option<u32>,
}

impl FirmwareArgs {
    /// Puts the options into a specification.
    pub fn fill(&self, spec: &mut VmSpec) {
        if let Some(f) = &self.firmware {
            let boot = self.boot.clone().unwrap_or_default();
            let vars = self.firmware_vars.as_ref();
            let template = vars.and_then(|v| v.template.clone());
            spec.boot.firmware = Some(FirmwareSpec {
                vars: vars.map(|v| v.file.clone()),
                vars_template: template.or_else(|| f.vars_template.clone()),
                order: boot.order,
                once: boot.once,
                menu_ms: boot.menu_ms,
                ..f.clone()
            });
        }
        spec.smbios = self.smbios.clone().unwrap_or_default();
    }
}

/// The image that a name means.
fn find_firmware(text: &str) -> Result<FirmwareSpec, String> {
    let spec = |code: &Path, vars: Option<PathBuf>| FirmwareSpec {
        code: code.to_owned(),
        vars_template: vars,
        ..FirmwareSpec::default()
    };
    match text {
        "" => Err("expected bios, uefi or a firmware image".into()),
        "bios" => {
            let found = BIOS.iter().map(Path::new).find(|p| p.is_file());
            let found = found.ok_or(
                "SeaBIOS is not installed here; install it (package seabios) or name an image",
            )?;
            Ok(spec(found, None))
        }
        "uefi" => {
            let there = |p: &&(&str, &str)| Path::new(p.0).is_file() && Path::new(p.1).is_file();
            let (code, vars) = UEFI
                .iter()
                .find(there)
                .ok_or("OVMF is not installed here; install it (package ovmf) or name an image")?;
            Ok(spec(Path::new(code), Some(vars.into())))
        }
        path => {
            let path = Path::new(path);
            let name = path.file_name().map(|n| n.to_string_lossy());
            let vars = name.and_then(|n| {
                let vars = n.replace("CODE", "VARS").replace("code", "vars");
                (vars != n).then(|| path.with_file_name(vars))
            });
            Ok(spec(path, vars.filter(|v| v.is_file())))
        }
    }
}

fn parse_vars(text: &str) -> Result<VarsFile, String> {
    let mut parts = crate::args::split_at_commas(text).into_iter();
    let file = parts.next().filter(|f| !f.is_empty());
    let mut vars = VarsFile {
        file: file.ok_or("expected a file")?.into(),
        template: None,
    };
    for part in parts {
        match part.split_once('=') {
            Some(("template", file)) if !file.is_empty() => vars.template = Some(file.into()),
            _ => {
                return Err(format!(
                    "unknown setting {part:?}; expected template=FILE (a comma in a name is \
                     written ,,)"
                ));
            }
        }
    }
    Ok(vars)
}

fn parse_boot(text: &str) -> Result<BootOrder, String> {
    const EXPECTED: &str =
        "expected order=DEVICE:..., once=DEVICE, menu or menu=MS, e.g. order=disk0:net0,menu";
    let mut boot = BootOrder::default();
    let names = |list: &str| -> Vec<String> { list.split(':').map(str::to_owned).collect() };
    for part in text.split(',') {
        match part.split_once('=') {
            None if part == "menu" => boot.menu_ms = Some(MENU_MS),
            Some(("menu", ms)) => boot.menu_ms = Some(ms.parse().map_err(|_| EXPECTED)?),
            Some(("order", list)) if !list.is_empty() => boot.order = names(list),
            Some(("once", name)) if !name.is_empty() => boot.once = Some(name.to_owned()),
            _ => return Err(EXPECTED.into()),
        }
    }
    Ok(boot)
}

fn parse_smbios(text: &str) -> Result<SmbiosSpec, String> {
    let mut id = SmbiosSpec::default();
    for part in crate::args::split_at_commas(text) {
        let field = part.split_once('=').and_then(|(name, value)| {
            let field = match name {
                "vendor" => &mut id.vendor,
                "product" => &mut id.product,
                "version" => &mut id.version,
                "serial" => &mut id.serial,
                "uuid" => &mut id.uuid,
                _ => return None,
            };
            *field = Some(value.to_owned());
            Some(())
        });
        field.ok_or_else(|| {
            format!(
                "unknown setting {part:?}; expected vendor=TEXT, product=TEXT, version=TEXT, \
                 serial=TEXT or uuid=UUID (a comma in a text is written ,,)"
            )
        })?;
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_orders() {
        let b = parse_boot("order=disk1:net0,once=disk0,menu").unwrap();
        assert_eq!(b.order, ["disk1", "net0"]);
        assert_eq!(
            (b.once.as_deref(), b.menu_ms),
            (Some("disk0"), Some(MENU_MS))
        );
        assert_eq!(parse_boot("menu=100").unwrap().menu_ms, Some(100));
        for wrong in ["", "disk0", "order=", "once=", "menu=soon", "order=a,,menu"] {
            assert!(parse_boot(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn files_of_variables() {
        let v = parse_vars("a,,b,template=c").unwrap();
        assert_eq!((v.file, v.template), ("a,b".into(), Some("c".into())));
        assert_eq!(parse_vars("a").unwrap().template, None);
        for wrong in ["", ",template=c", "a,template=", "a,b", "a,size=1"] {
            assert!(parse_vars(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn identities() {
        let id = parse_smbios("vendor=A,, B,serial=x=1,uuid=u").unwrap();
        assert_eq!(id.vendor.as_deref(), Some("A, B"));
        assert_eq!(id.serial.as_deref(), Some("x=1"));
        assert_eq!(id.uuid.as_deref(), Some("u"));
        assert!(parse_smbios("colour=red").is_err() && parse_smbios("").is_err());
    }

    #[test]
    fn an_image_finds_its_variables() {
        let dir = std::env::temp_dir().join(format!("pyrite-firmware-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let code = dir.join("X_CODE.fd");
        std::fs::write(dir.join("X_VARS.fd"), "v").unwrap();
        let spec = find_firmware(&code.to_string_lossy()).unwrap();
        assert_eq!(spec.vars_template, Some(dir.join("X_VARS.fd")));
        let alone = find_firmware(&dir.join("bios.bin").to_string_lossy()).unwrap();
        assert_eq!(
            (alone.code, alone.vars_template),
            (dir.join("bios.bin"), None)
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
