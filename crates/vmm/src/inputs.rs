//! Looks at every file that a specification names, before anything is started.
//!
//! A missing, cut-off or foreign file is found here and named with what was expected. The VM
//! process opens the files again; a file that changes in between fails there, less politely.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use pyrite_api::v1::{DiskFormat, DiskSpec, SpecError, VgaKind, VmSpec};

use crate::boot::{BootError, BootFile, BootImage, BootInput, KernelFormat};

#[cfg(test)]
mod tests;

/// All errors in the files of a specification. `with_boot`: the kernel is given already.
pub fn check(spec: &VmSpec, with_boot: bool) -> Vec<SpecError> {
    let mut errors = Vec::new();
    if let Some(dir) = &spec.restore {
        errors.extend(check_snapshot(dir).err());
    } else if let Some(firmware) = &spec.boot.firmware {
        errors.extend(crate::firmware::check(firmware).err());
    } else if with_boot {
        check_boot(spec, &mut errors);
    }
    for (n, disk) in spec.disks.iter().enumerate() {
        if let Err(problem) = check_disk(disk) {
            let problem = format!("{}: {problem}", disk.path.display());
            errors.push(SpecError::new(format!("disks[{n}].path"), problem));
        }
    }
    for (n, cdrom) in spec.cdroms.iter().enumerate() {
        if let Some(path) = &cdrom.path
            && let Err(problem) = check_medium(path)
        {
            let problem = format!("{}: {problem}", path.display());
            errors.push(SpecError::new(format!("cdroms[{n}].path"), problem));
        }
    }
    if let Err((n, problem)) = crate::machine::floppy_kinds(spec) {
        errors.push(SpecError::new(format!("floppies[{n}].path"), problem));
    }
    for (n, card) in spec.net.cards.iter().enumerate() {
        if let Some(path) = &card.pcap
            && let Err(problem) = crate::output::check(path)
        {
            let problem = format!("{}: {problem}", path.display());
            errors.push(SpecError::new(format!("net.cards[{n}].pcap"), problem));
        }
    }
    if let Some(path) = &spec.vsock {
        errors.extend(check_vsock(path).err());
    }
    for (n, share) in spec.shares.iter().enumerate() {
        if let Err(problem) = check_share(&share.path) {
            let problem = format!("{}: {problem}", share.path.display());
            errors.push(SpecError::new(format!("shares[{n}].path"), problem));
        }
    }
    if spec.screen.vga != VgaKind::None
        && let Err(problem) = crate::machine::check_video_bios(&spec.screen)
    {
        errors.push(SpecError::new("screen.vga_rom", problem));
    }
    for (field, path) in [("serial2", &spec.serial2), ("debugcon", &spec.debugcon)] {
        if let Some(path) = path
            && let Err(problem) = crate::output::check(path)
        {
            let problem = format!("{}: {problem}", path.display());
            errors.push(SpecError::new(field, problem));
        }
    }
    errors
}

/// A boot error with the path of its field.
pub(crate) fn spec_error(e: &BootError) -> SpecError {
    let path = match e.input {
        BootInput::Kernel => "boot.kernel",
        BootInput::Initrd => "boot.initrd",
        BootInput::Append => "boot.append",
        BootInput::Module => "boot.modules",
        BootInput::Memory => "memory_bytes",
    };
    SpecError::new(path, e.problem.clone())
}

/// Opens everything that is booted.
pub(crate) fn open_boot(spec: &VmSpec) -> Result<BootImage, Vec<BootError>> {
    let mut errors = Vec::new();
    let mut open = |input, path: &Path| match BootFile::open(input, path) {
        Ok(f) => Some(f),
        Err(e) => {
            errors.push(e);
            None
        }
    };
    let kernel = open(BootInput::Kernel, &spec.boot.kernel);
    let initrd = spec
        .boot
        .initrd
        .as_ref()
        .map(|p| open(BootInput::Initrd, p));
    let modules: Vec<_> = spec
        .boot
        .modules
        .iter()
        .filter_map(|m| open(BootInput::Module, &m.path).map(|f| (f, m.args.clone())))
        .collect();
    match kernel {
        Some(kernel) if errors.is_empty() => Ok(BootImage {
            kernel,
            initrd: initrd.flatten(),
            modules,
            cmdline: spec.boot.append.clone(),
            has_text_screen: spec.screen.vga == VgaKind::Std,
            identity: spec.smbios.clone(),
            // A wrong one is told by `check`.
            floppies: crate::machine::floppy_kinds(spec).unwrap_or_default(),
        }),
        _ => Err(errors),
    }
}

fn check_boot(spec: &VmSpec, errors: &mut Vec<SpecError>) {
    let image = match open_boot(spec) {
        Ok(i) => i,
        Err(e) => {
            errors.extend(e.iter().map(spec_error));
            return;
        }
    };
    let format = match image.format() {
        Ok(f) => f,
        Err(e) => {
            errors.push(spec_error(&e));
            return;
        }
    };
    let is_linux = matches!(format, KernelFormat::BzImage | KernelFormat::Vmlinux);
    if format != KernelFormat::Multiboot && !spec.boot.modules.is_empty() {
        let problem = "only a Multiboot kernel takes modules, and this kernel is none";
        errors.push(SpecError::new("boot.modules", problem));
    }
    // Other kernels may take any bytes as their initrd.
    if is_linux
        && let Some(path) = &spec.boot.initrd
        && let Err(problem) = check_initrd(path)
    {
        let problem = format!("{}: {problem}", path.display());
        errors.push(SpecError::new("boot.initrd", problem));
    }
}

/// Reads up to `N` bytes at `offset`; what is not there is zero.
fn peek<const N: usize>(file: &mut File, offset: u64) -> std::io::Result<[u8; N]> {
    let mut out = [0; N];
    file.seek(SeekFrom::Start(offset))?;
    let mut done = 0;
    while done < N {
        match file.read(out.get_mut(done..).unwrap_or_default())? {
            0 => break,
            n => done += n,
        }
    }
    Ok(out)
}

/// What Linux takes as an initrd: cpio, or something that it can uncompress or mount.
fn check_initrd(path: &Path) -> Result<(), String> {
    const EXPECTED: &str = "expected a cpio archive (newc), possibly compressed";
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let size = file.metadata().map_err(|e| e.to_string())?.len();
    if size == 0 {
        return Err(format!("the file is empty; {EXPECTED}"));
    }
    let head: [u8; 8] = peek(&mut file, 0).map_err(|e| e.to_string())?;
    let ext: [u8; 2] = peek(&mut file, 1080).map_err(|e| e.to_string())?;
    if head.starts_with(b"070701") || head.starts_with(b"070702") {
        return check_cpio(&mut file, size);
    }
    const COMPRESSED: [&[u8]; 8] = [
        &[0x1f, 0x8b],
        b"BZh",
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        &[0x5d, 0, 0],
        &[0x28, 0xb5, 0x2f, 0xfd],
        &[0x02, 0x21, 0x4c, 0x18],
        &[0x89, b'L', b'Z', b'O'],
        &[0x04, 0x22, 0x4d, 0x18],
    ];
    let known = COMPRESSED.iter().any(|magic| head.starts_with(magic))
        || head.starts_with(b"hsqs")
        || head.starts_with(b"-rom1fs-")
        || ext == [0x53, 0xef];
    if known {
        Ok(())
    } else {
        Err(format!("this is no initial RAM disk; {EXPECTED}"))
    }
}

/// Follows the headers of a cpio archive to its trailer.
fn check_cpio(file: &mut File, size: u64) -> Result<(), String> {
    /// LIMIT: entries that are looked at.
    const MAX_ENTRIES: u32 = 1 << 20;
    let mut at = 0u64;
    for _ in 0..MAX_ENTRIES {
        if at + 110 > size {
            return Err("this cpio archive is truncated".into());
        }
        let header: [u8; 110] = peek(file, at).map_err(|e| e.to_string())?;
        if !header.starts_with(b"07070") {
            return Err("this cpio archive is damaged".into());
        }
        let field = |n: usize| {
            let text = header.get(6 + n * 8..14 + n * 8)?;
            u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
        };
        let (Some(bytes), Some(name)) = (field(6), field(11)) else {
            return Err("this cpio archive is damaged".into());
        };
        let trailer: [u8; 11] = peek(file, at + 110).map_err(|e| e.to_string())?;
        if &trailer == b"TRAILER!!!\0" {
            return Ok(());
        }
        at = (at + 110 + name).next_multiple_of(4);
        at = (at + bytes).next_multiple_of(4);
    }
    Ok(())
}

/// What can lie in a CD drive.
pub(crate) fn check_medium(path: &Path) -> Result<(), String> {
    let meta = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err("expected a CD image (ISO 9660) or a block device".into());
    }
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let size = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    if size < 2048 {
        return Err("is smaller than a sector; expected a CD image (ISO 9660)".into());
    }
    match foreign_image(&mut file).map_err(|e| e.to_string())? {
        Some(format) => Err(format!(
            "this is a {format} image; expected a CD image (convert it with pyrite image convert)"
        )),
        None => Ok(()),
    }
}

/// A raw image or a block device that can be opened as the guest will use it.
fn check_disk(disk: &DiskSpec) -> Result<(), String> {
    let meta = std::fs::metadata(&disk.path).map_err(|e| e.to_string())?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err("expected a disk image file or a block device".into());
    }
    let open = File::options()
        .read(true)
        .write(!disk.read_only)
        .open(&disk.path);
    let mut file = open.map_err(|e| {
        if !disk.read_only && e.kind() == std::io::ErrorKind::PermissionDenied {
            format!("{e}; add ,ro if the guest need not write to it")
        } else {
            e.to_string()
        }
    })?;
    let size = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    if size == 0 {
        return Err("the file is empty; expected a disk image".into());
    }
    if disk.format != DiskFormat::Raw {
        drop(file);
        return check_image(disk);
    }
    if let Some(format) = foreign_image(&mut file).map_err(|e| e.to_string())? {
        let name = format.to_lowercase();
        return Err(format!(
            "this is a {format} image; expected a raw disk image (add ,format={name} if the \
             image comes from somebody you trust)"
        ));
    }
    if !size.is_multiple_of(512) {
        return Err(format!(
            "has {size} bytes; expected a raw disk image, which has a multiple of 512 (cut off?)"
        ));
    }
    match bytes_described(&mut file).map_err(|e| e.to_string())? {
        Some(wanted) if wanted > size => Err(format!(
            "is truncated: it has {size} bytes, but what is on it reaches to byte {wanted}"
        )),
        _ => Ok(()),
    }
}

/// An image of another format than raw, which is opened as far as it can be without changing it.
fn check_image(disk: &DiskSpec) -> Result<(), String> {
    if disk.format == DiskFormat::Vhdx && !disk.read_only {
        return Err(
            "VHDX images can only be read; add ,ro, or convert it (pyrite image convert)".into(),
        );
    }
    let options = crate::machine::open_options(disk).read_only();
    match pyrite_disk::open::open(&disk.path, options) {
        Ok(_) => Ok(()),
        Err(e) => {
            // The path is said by the caller.
            let text = e.to_string();
            let path = format!("{}: ", disk.path.display());
            Err(text.strip_prefix(&path).unwrap_or(&text).to_owned())
        }
    }
}

/// The name of an image format that would be garbage as a raw disk.
fn foreign_image(file: &mut File) -> std::io::Result<Option<&'static str>> {
    let head: [u8; 80] = peek(file, 0)?;
    Ok(match &head {
        [b'Q', b'F', b'I', 0xfb, ..] => Some("qcow2"),
        [b'K', b'D', b'M', b'V', ..] => Some("VMDK"),
        [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..] => Some("VHDX"),
        [b'c', b'o', b'n', b'e', b'c', b't', b'i', b'x', ..] => Some("VHD"),
        h if h.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => Some("VDI"),
        _ => None,
    })
}

/// How many bytes the partition table or file system at the start of a disk says there are.
fn bytes_described(file: &mut File) -> std::io::Result<Option<u64>> {
    const GPT_PROTECTIVE: u8 = 0xee;
    let le32 = |b: &[u8], at: usize| {
        b.get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    let gpt: [u8; 40] = peek(file, 512)?;
    if gpt.starts_with(b"EFI PART") {
        // AlternateLBA is the last sector of the disk. UEFI 2.10 table 5.5.
        let last = gpt
            .get(32..40)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_le_bytes);
        return Ok(last.checked_add(1).and_then(|n| n.checked_mul(512)));
    }
    let superblock: [u8; 96] = peek(file, 1024)?;
    if superblock.get(56..58) == Some(&[0x53, 0xef]) {
        // ext2/3/4: s_blocks_count_lo, s_log_block_size. Volumes beyond 2^32 blocks are not
        // looked at further.
        let blocks = u64::from(le32(&superblock, 4));
        let shift = le32(&superblock, 24);
        return Ok((shift <= 6).then(|| blocks << (10 + shift)));
    }
    let mbr: [u8; 512] = peek(file, 0)?;
    if mbr.get(510..) != Some(&[0x55, 0xaa]) {
        return Ok(None);
    }
    let entries: Vec<&[u8]> = mbr
        .get(446..510)
        .map_or(Vec::new(), |t| t.chunks(16).collect());
    // A boot sector of a file system has code where the table would be.
    if entries.iter().any(|e| !matches!(e.first(), Some(0 | 0x80))) {
        return Ok(None);
    }
    Ok(entries
        .iter()
        .filter(|e| !matches!(e.get(4), None | Some(&0 | &GPT_PROTECTIVE)))
        .map(|e| (u64::from(le32(e, 8)) + u64::from(le32(e, 12))) * 512)
        .max())
}

fn check_share(path: &Path) -> Result<(), String> {
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => Ok(()),
        Ok(_) => Err("is not a directory; expected a folder to share".into()),
        Err(e) => Err(e.to_string()),
    }
}

fn check_vsock(path: &Path) -> Result<(), SpecError> {
    let bad = |text: String| Err(SpecError::new("vsock", text));
    match std::fs::symlink_metadata(path) {
        Ok(m) if m.file_type().is_socket() => bad(format!(
            "{} exists already (another VM's socket?)",
            path.display()
        )),
        Ok(_) => bad(format!("{} exists and is no socket", path.display())),
        Err(_) => match path.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(dir) if !dir.is_dir() => bad(format!("{} is no directory", dir.display())),
            _ => Ok(()),
        },
    }
}

fn check_snapshot(dir: &Path) -> Result<(), SpecError> {
    crate::snapshot::Manifest::read(dir)
        .map(|_| ())
        .map_err(|e| SpecError::new("restore", format!("{}: {e}", dir.display())))
}
