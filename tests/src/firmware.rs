//! Machines that start with firmware: the firmware itself, and disks with an EFI system partition.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::fixtures::{self, Guest, KernelPackage};
use crate::{Scratch, Session, pyrite};

/// The release that firmware, boot loaders and kernels are from.
pub const DEBIAN_12: KernelPackage = KernelPackage {
    suite: "bookworm",
    arch: "amd64",
    package: "linux-image-cloud-amd64",
};
/// How long a guest may take for one answer.
pub const MINUTE: Duration = Duration::from_secs(60);

const SECTOR: u64 = 512;
/// First sector of the partition.
const ESP_START: u64 = 2048;
/// Sectors of the partition.
const ESP_SECTORS: u64 = 64 << 20 >> 9;
/// Sectors of a table of 128 partitions.
const TABLE_SECTORS: u64 = 32;

/// A file of a Debian package, or a loud word about why there is none.
pub fn package_file(package: &str, dir: &str, name: &str) -> Option<PathBuf> {
    let KernelPackage { suite, arch, .. } = DEBIAN_12;
    found(fixtures::file_of(suite, arch, package, dir, name), name)
}

/// A directory of a Debian package, in the same way.
pub fn package_directory(package: &str, dir: &str) -> Option<PathBuf> {
    let KernelPackage { suite, arch, .. } = DEBIAN_12;
    found(fixtures::directory_of(suite, arch, package, dir), package)
}

fn found(file: Result<PathBuf, fixtures::Reason>, name: &str) -> Option<PathBuf> {
    file.inspect_err(|why| crate::skipped(format_args!("no {name}: {why}")))
        .ok()
}

/// A Debian kernel whose shell has these modules too.
pub fn kernel(what: &str, modules: &[&str]) -> Option<Guest> {
    match fixtures::guest_with(DEBIAN_12, what, modules) {
        Ok(guest) => Some(guest),
        Err(why) => {
            crate::skipped(format_args!("no kernel: {why}"));
            None
        }
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

/// A machine with a serial console that starts with `firmware`.
pub fn start(firmware: &Path, more: &[&str]) -> Session {
    let mut command = Command::new(pyrite());
    command
        .args(["run", "--engine", "soft", "--net", "none"])
        .args(["--console", "serial", "--firmware", text(firmware)])
        .args(more);
    Session::start(&mut command)
}

/// What the guest's shell prints for a command that succeeds.
pub fn ask(s: &mut Session, command: &str) -> String {
    s.send(&format!("{command}; echo done=$?.\n"));
    let out = s.until("done=0.", MINUTE);
    s.expect("# ", MINUTE);
    out
}

/// SeaBIOS.
pub fn bios() -> Option<PathBuf> {
    package_file("seabios", "usr/share/seabios", "bios-256k.bin")
}

/// Types a character at a time, because a BIOS keeps few that nobody has read.
pub fn type_slowly(s: &mut Session, line: &str) {
    for c in line.chars() {
        s.send(&c.to_string());
        s.expect(&c.to_string(), MINUTE);
    }
    s.send("\r");
}

/// Debian's GRUB rescue image, as a disk, and a disk that is a tar archive, which GRUB reads: a
/// kernel and what GRUB is to do with it.
pub fn grub_disks(dir: &Scratch) -> Option<(PathBuf, PathBuf)> {
    let image = package_file(
        "grub-rescue-pc",
        "usr/lib/grub-rescue",
        "grub-rescue-cdrom.iso",
    )?;
    let guest = kernel("", &[])?;
    let mut bytes = std::fs::read(image).expect("GRUB");
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let grub = dir.file("grub.img", &bytes);
    let script = "serial --unit=0\nterminal_output serial\nterminal_input serial\n\
                  linux (hd1)/vmlinuz console=ttyS0 quiet\ninitrd (hd1)/initrd.img\nboot\n";
    dir.file("g", script.as_bytes());
    let tar = dir.0.join("data.tar");
    let kernels = guest.kernel.parent().expect("directory of the guest");
    let done = Command::new("tar")
        .args(["--format=ustar", "-cf", text(&tar), "-C", text(&dir.0), "g"])
        .args(["-C", text(kernels), "vmlinuz", "initrd.img"])
        .status();
    assert!(done.expect("tar").success());
    Some((grub, tar))
}

/// OVMF; its variables are found by their name.
pub fn uefi() -> Option<PathBuf> {
    package_file("ovmf", "usr/share/OVMF", "OVMF_VARS_4M.fd")?;
    package_file("ovmf", "usr/share/OVMF", "OVMF_CODE_4M.fd")
}

/// Debian's GRUB for UEFI, which looks for `/EFI/debian/grub.cfg`.
pub fn signed_grub() -> Option<PathBuf> {
    let dir = "usr/lib/grub/x86_64-efi-signed";
    package_file("grub-efi-amd64-signed", dir, "grubx64.efi")
}

/// Past the seconds in which the shell of UEFI offers to leave out `startup.nsh`.
pub fn into_shell(s: &mut Session) {
    s.expect("any other key to continue", MINUTE);
    s.send("\r");
}

/// What the shell of UEFI prints for a command.
pub fn ask_shell(s: &mut Session, command: &str) -> String {
    s.send(&format!("{command}\r"));
    s.until("Shell>", MINUTE)
}

fn crc32(bytes: &[u8]) -> [u8; 4] {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

/// Header of a GUID partition table of a disk with `sectors`. UEFI 2.10 §5.3.2.
fn gpt_header(sectors: u64, table: &[u8], backup: bool) -> Vec<u8> {
    let last = sectors - 1;
    let (here, there, table_at) = match backup {
        false => (1, last, 2),
        true => (last, 1, last - TABLE_SECTORS),
    };
    let mut h = b"EFI PART\0\0\x01\0\x5c\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    for lba in [here, there, 2 + TABLE_SECTORS, last - TABLE_SECTORS - 1] {
        h.extend(lba.to_le_bytes());
    }
    h.extend([0xd1; 16]);
    h.extend(table_at.to_le_bytes());
    h.extend([128, 0, 0, 0, 128, 0, 0, 0]);
    h.extend(crc32(table));
    let sum = crc32(&h);
    h[16..20].copy_from_slice(&sum);
    h
}

/// A disk with a GUID partition table and an EFI system partition with these files: paths of
/// directories end with a slash.
pub fn esp(dir: &Scratch, name: &str, files: &[(&str, &[u8])]) -> Option<PathBuf> {
    let mtools = package_file("mtools", "usr/bin", "mtools")?;
    std::fs::set_permissions(&mtools, Permissions::from_mode(0o755)).expect("mtools can be run");
    let path = dir.0.join(name);
    let sectors = ESP_START + ESP_SECTORS + 2048;
    // C12A7328-F81F-11D2-BA4B-00A0C93EC93B, which is an EFI system partition.
    let mut table = vec![
        0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9,
        0x3b,
    ];
    table.extend([0xe5; 16]);
    table.extend(ESP_START.to_le_bytes());
    table.extend((ESP_START + ESP_SECTORS - 1).to_le_bytes());
    table.resize((TABLE_SECTORS * SECTOR) as usize, 0);
    // One protective partition from sector 1 on.
    let mut mbr = vec![0; SECTOR as usize];
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&((sectors - 1) as u32).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = File::create(&path).expect("a disk");
    disk.set_len(sectors * SECTOR).expect("a disk");
    let last = sectors - 1;
    for (lba, bytes) in [
        (0, &mbr),
        (1, &gpt_header(sectors, &table, false)),
        (2, &table),
        (last - TABLE_SECTORS, &table),
        (last, &gpt_header(sectors, &table, true)),
    ] {
        disk.write_all_at(bytes, lba * SECTOR).expect("a disk");
    }
    let volume = format!("{}@@{}", text(&path), ESP_START * SECTOR);
    let run = |args: &[&str]| {
        // One program for all commands: it is called by the name of each.
        let done = Command::new(&mtools)
            .arg0(args[0])
            .env("MTOOLS_SKIP_CHECK", "1")
            .args(["-i", &volume])
            .args(&args[1..])
            .output()
            .expect("mtools");
        let problem = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "mtools {args:?}: {problem}");
    };
    let size = ESP_SECTORS.to_string();
    run(&[
        "mformat", "-T", &size, "-h", "64", "-s", "32", "-v", "PYRITE", "::",
    ]);
    for (path, content) in files {
        if path.ends_with('/') {
            run(&["mmd", &format!("::{}", path.trim_end_matches('/'))]);
        } else {
            let from = dir.file("copied", content);
            run(&["mcopy", text(&from), &format!("::{path}")]);
        }
    }
    Some(path)
}
