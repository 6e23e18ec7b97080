//! Floppy drives: which there are, what lies in them.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use pyrite_api::v1::{FloppyKind, VmSpec};
use pyrite_devices::storage::floppy::{DriveKind, Floppy};
use pyrite_devices::storage::isa_dma::IsaDma;
use pyrite_disk::medium::Tray;
use pyrite_disk::raw::{RawDisk, RawImage};
use pyrite_disk::storage::HostFile;
use pyrite_disk::{BlockBackend, ImageDisk};
use pyrite_vdev::bus::{BusOverlap, lock};
use pyrite_vdev::{IrqLine, IrqSink};

use super::{AssemblyError, Machine, Slots, input};

/// The floppy drives of a machine, A and B, and what lies in them.
pub(super) type FloppyDrives = Vec<(DriveKind, Arc<Tray>)>;

fn kind_of(kind: FloppyKind) -> DriveKind {
    match kind {
        FloppyKind::D1200 => DriveKind::D1200,
        FloppyKind::D1440 => DriveKind::D1440,
        FloppyKind::D2880 => DriveKind::D2880,
    }
}

/// Looks at an image; the drive that reads it, which is `drive` if that is given, and the size of
/// the disk. One that is read-only may be a part of a disk: images are often cut where the data end.
fn drive_for(
    path: &Path,
    read_only: bool,
    drive: Option<DriveKind>,
) -> Result<(DriveKind, u64), String> {
    // Writing is tried as well: a protected file is found out now, not at the guest's first write.
    let open = File::options().read(true).write(!read_only).open(path);
    let hint = |e: std::io::Error| match e.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if !read_only => {
            format!("{e}; a disk that may not be written is given with ro")
        }
        _ => e.to_string(),
    };
    let mut file = open.map_err(hint)?;
    let size = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let drives = match &drive {
        Some(kind) => std::slice::from_ref(kind),
        None => &DriveKind::ALL,
    };
    let formats = drives
        .iter()
        .flat_map(|k| k.formats().iter().map(|g| (*k, g.bytes())));
    // The smallest disk, in the first drive that reads it.
    let fits = |bytes: u64| bytes == size || read_only && size > 0 && size < bytes;
    let found = formats
        .filter(|(_, bytes)| fits(*bytes))
        .min_by_key(|(_, bytes)| *bytes);
    found.ok_or_else(|| {
        let expected = match drive {
            Some(kind) => {
                let sizes = kind.formats().iter().map(|g| g.bytes().to_string());
                let sizes: Vec<String> = sizes.collect();
                format!(
                    "this drive reads raw images of {} bytes",
                    sizes.join(" or ")
                )
            }
            None => {
                "expected a raw image of a floppy disk of 360, 720, 1200, 1440 or 2880 KiB".into()
            }
        };
        format!(
            "has {size} bytes; {expected} (less is enough if it is given as read-only, with ro)"
        )
    })
}

/// The floppy drives that a specification asks for; or which one is wrong, and how.
pub(crate) fn kinds(spec: &VmSpec) -> Result<Vec<DriveKind>, (usize, String)> {
    Ok(drives(spec)?.into_iter().map(|(kind, _)| kind).collect())
}

/// The drives, and the sizes of what lies in them.
fn drives(spec: &VmSpec) -> Result<Vec<(DriveKind, u64)>, (usize, String)> {
    let kind = |f: &pyrite_api::v1::FloppySpec| {
        let drive = f.drive.map(kind_of);
        match &f.path {
            Some(path) => {
                drive_for(path, f.read_only, drive).map_err(|e| format!("{}: {e}", path.display()))
            }
            None => Ok((drive.unwrap_or_default(), 0)),
        }
    };
    let all = spec.floppies.iter().enumerate();
    all.map(|(n, f)| kind(f).map_err(|e| (n, e))).collect()
}

fn open(path: &Path, read_only: bool, bytes: u64) -> Result<Arc<dyn BlockBackend>, String> {
    let problem = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    if !read_only {
        let disk = RawDisk::open(path, false).map_err(|e| problem(&e))?;
        return Ok(Arc::new(disk));
    }
    let file = HostFile::open(path, true).map_err(|e| problem(&e))?;
    let image = RawImage::padded_to(file, bytes).map_err(|e| problem(&e))?;
    let disk = ImageDisk::new(Arc::new(image)).map_err(|e| problem(&e))?;
    Ok(Arc::new(disk))
}

/// The floppy controller with the ISA DMA that it needs.
pub(super) fn plug(spec: &VmSpec, slots: &mut Slots<'_>) -> Result<FloppyDrives, AssemblyError> {
    let wrong = |(n, e): (usize, String)| input(format!("floppies[{n}].path"), e);
    let asked = drives(spec).map_err(wrong)?;
    let mut drives = FloppyDrives::new();
    for (n, (f, (kind, bytes))) in spec.floppies.iter().zip(asked).enumerate() {
        let path = f.path.as_deref();
        let medium = path.map(|p| open(p, f.read_only, bytes)).transpose();
        drives.push((kind, Tray::new(medium.map_err(|e| wrong((n, e)))?)));
        // SeaBIOS looks for the controller below the LPC bridge.
        let path = format!("/pci@i0cf8/isa@1f/fdc@03f0/floppy@{n:x}");
        slots.boot.insert(format!("floppy{n}"), path);
    }
    if drives.is_empty() {
        return Ok(drives);
    }
    let taken = |e: BusOverlap| AssemblyError::Host(e.into());
    let chipset = slots.chipset;
    let dma = IsaDma::new(Arc::clone(slots.memory));
    IsaDma::register(&dma, &chipset.io).map_err(taken)?;
    let sink: Arc<dyn IrqSink> = chipset.router.clone();
    let irq = IrqLine::new(sink, 6);
    let both = [0, 1].map(|n| drives.get(n).cloned());
    let types = [0, 1].map(|n| drives.get(n).map_or(0, |(kind, _)| kind.bios_type()));
    let floppy = Floppy::new("floppy0", both, Arc::clone(&dma), irq)
        .map_err(|e| AssemblyError::Host(e.into()))?;
    lock(&floppy).register(&chipset.io).map_err(taken)?;
    lock(&chipset.rtc).set_floppy_drives(types);
    slots.units.push(dma);
    slots.units.push(floppy);
    Ok(drives)
}

impl Machine {
    /// Puts a floppy disk into drive `drive`, or takes the one there is out.
    pub fn change_floppy(
        &self,
        drive: usize,
        path: Option<&Path>,
        read_only: bool,
    ) -> anyhow::Result<()> {
        let Some((kind, tray)) = self.floppies.get(drive) else {
            anyhow::bail!(
                "this VM has no floppy drive fd{drive}; it has {} (see --floppy)",
                self.floppies.len()
            );
        };
        let Some(path) = path else {
            return Ok(tray.remove(true)?);
        };
        let fail = |e: String| anyhow::anyhow!("{}: {e}", path.display());
        let (_, bytes) = drive_for(path, read_only, Some(*kind)).map_err(fail)?;
        // The old disk's file is free before the new one is locked: it may be the same.
        tray.remove(true)?;
        let disk = open(path, read_only, bytes).map_err(anyhow::Error::msg)?;
        Ok(tray.insert(disk, true)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_find_their_drives() {
        let name = format!("pyrite-floppies-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let look = |bytes: u64, read_only, drive| {
            let file = File::create(&path).unwrap();
            file.set_len(bytes).unwrap();
            let found = drive_for(&path, read_only, drive);
            if let Ok((_, size)) = found {
                let disk = open(&path, read_only, size).unwrap();
                assert_eq!(disk.info().size_bytes, size);
                assert_eq!(disk.info().read_only, read_only);
            }
            found
        };
        let large = Some(DriveKind::D2880);
        for (bytes, read_only, drive, kind, kib) in [
            (1440 << 10, false, None, DriveKind::D1440, 1440),
            (360 << 10, false, None, DriveKind::D1200, 360),
            (1440 << 10, false, large, DriveKind::D2880, 1440),
            // A part of a disk can be read.
            (1_296_384, true, None, DriveKind::D1440, 1440),
            (1000, true, large, DriveKind::D2880, 720),
        ] {
            assert_eq!(look(bytes, read_only, drive), Ok((kind, kib << 10)));
        }
        for (bytes, read_only, drive, says) in [
            (1_296_384, false, None, "with ro"),
            (0, true, None, "has 0 bytes"),
            (3 << 20, true, None, "expected a raw image"),
            (
                1440 << 10,
                false,
                Some(DriveKind::D1200),
                "1228800 or 368640",
            ),
        ] {
            let error = look(bytes, read_only, drive).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(drive_for(&path, true, None).is_err());
    }
}
