//! New images of every format, by path.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::DiskError;
use crate::image::{Details, Format, Image, ImageError, References};
use crate::io::map_error;
use crate::jobs::{Packed, Plain, Progress, copy};
use crate::open::{OpenOptions, open};
use crate::qcow2::{self, Qcow2};
use crate::raw::RawImage;
use crate::storage::{HostFile, Storage};
use crate::{vdi, vhd, vhdx, vmdk};

/// What to make.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// What a qcow2 image is like; its size is taken from here.
    pub qcow2: qcow2::CreateOptions,
    /// Without a table of blocks (vhd, vmdk).
    pub flat: bool,
    /// An existing file is replaced.
    pub overwrite: bool,
}

/// Random identifiers.
fn random_id() -> Result<[u8; 16], DiskError> {
    let mut id = [0; 16];
    let mut source = std::fs::File::open("/dev/urandom").map_err(map_error)?;
    source.read_exact(&mut id).map_err(map_error)?;
    // A random UUID, RFC 9562 section 5.4.
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The descriptor has the name in quotes.
    name.replace(['"', '\n'], "_")
}

/// Makes an empty image. A file that could not be completed is removed again.
pub fn create(path: &Path, options: &TargetOptions) -> Result<(), ImageError> {
    guarded(path, options, || make(path, options).map(drop))
}

fn guarded(
    path: &Path,
    options: &TargetOptions,
    work: impl FnOnce() -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let existed = path.symlink_metadata().is_ok();
    let outcome = work();
    if outcome.is_err() && !existed && !options.overwrite {
        // Best effort: the error that is reported is the first one.
        let _ = std::fs::remove_file(path);
    }
    outcome
}

/// Makes an empty image and opens it for filling; raw and qcow2 images keep their type.
fn make(path: &Path, options: &TargetOptions) -> Result<Made, ImageError> {
    let failed = ImageError::disk(path);
    let size = options.size_bytes;
    let id = random_id().map_err(&failed)?;
    let cid = u32::from_le_bytes([id[0], id[1], id[2], id[3]]);
    if options.format == Format::Vmdk && options.flat {
        vmdk::create_flat(path, size, options.overwrite, cid)?;
        let image = vmdk::open(path, false, References::Follow)?;
        return Ok(Made::Image(image));
    }
    let file = HostFile::create(path, options.overwrite)?;
    let made = || -> Result<Made, DiskError> {
        Ok(Made::Image(match options.format {
            Format::Raw => {
                if size == 0 {
                    return Err(DiskError::Unsupported(
                        "a disk has at least 512 bytes".into(),
                    ));
                }
                file.set_len(size).map_err(map_error)?;
                Arc::new(RawImage::with_storage(Box::new(file), size, false))
            }
            Format::Qcow2 => {
                qcow2::create(&file, &options.qcow2)?;
                // Its backing file is not needed to be filled.
                return Ok(Made::Qcow2(Box::new(Qcow2::open_top(Box::new(file))?)));
            }
            Format::Vdi => {
                vdi::create(&file, size, id)?;
                Arc::new(vdi::open(Box::new(file), false)?)
            }
            Format::Vhd => {
                vhd::create(&file, size, options.flat, id)?;
                Arc::new(vhd::open(Box::new(file), false)?)
            }
            Format::Vhdx => {
                vhdx::create(&file, size, [id, random_id()?, random_id()?])?;
                Arc::new(vhdx::open_new(Box::new(file))?)
            }
            Format::Vmdk => {
                vmdk::create_sparse(&file, size, &file_name(path), cid)?;
                Arc::new(vmdk::open_sparse(Box::new(file), false)?)
            }
        }))
    };
    made().map_err(&failed)
}

enum Made {
    Image(Arc<dyn Image>),
    Qcow2(Box<Qcow2>),
}

/// Copies an image into a new one.
pub fn convert(
    source: &dyn Image,
    path: &Path,
    options: &TargetOptions,
    compress: bool,
    progress: Progress<'_>,
) -> Result<(), ImageError> {
    let failed = ImageError::disk(path);
    guarded(path, options, || {
        if compress && options.format == Format::Vmdk && !options.flat {
            let file = HostFile::create(path, options.overwrite)?;
            let id = random_id().map_err(&failed)?;
            let cid = u32::from_le_bytes([id[0], id[1], id[2], id[3]]);
            let mut stream = vmdk::Stream::new(&file, options.size_bytes, &file_name(path), cid)
                .map_err(&failed)?;
            return copy(source, &mut stream, progress).map_err(&failed);
        }
        if compress && options.format != Format::Qcow2 {
            return Err(ImageError::content(
                path,
                format!(
                    "{} images cannot be compressed; qcow2 and sparse vmdk images can",
                    options.format
                ),
            ));
        }
        match make(path, options)? {
            Made::Qcow2(q) if compress => copy(source, &mut Packed::new(&q), progress),
            Made::Qcow2(q) => copy(source, &mut Plain(&*q), progress),
            Made::Image(i) => copy(source, &mut Plain(&*i), progress),
        }
        .map_err(&failed)
    })
}

/// What an image is, and the size of its disk. Files that it refers to are not opened.
pub fn details(path: &Path, format: Format) -> Result<(Details, u64), ImageError> {
    let failed = ImageError::disk(path);
    if format == Format::Qcow2 {
        let image = Qcow2::open_details(Box::new(HostFile::open(path, true)?)).map_err(&failed)?;
        return Ok((image.details(), image.info().size_bytes));
    }
    // A descriptor of VMDK extents names files beside it only.
    let image = open(path, OpenOptions::new(format).read_only().follow())?;
    Ok((image.details(), image.info().size_bytes))
}
