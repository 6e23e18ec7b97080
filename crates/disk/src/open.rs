//! Opening images by path, with the files that they refer to.
//!
//! The format is always said by the caller, or by the image whose backing file it is; it is never
//! taken from what is in a file, which a guest may have written. Other files are opened only if
//! the caller allows it, never for writing, and each at most once in a chain.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::image::{Format, Image, ImageError, References};
use crate::qcow2::{self, Qcow2};
use crate::raw::RawImage;
use crate::storage::{HostFile, Storage};
use crate::{vdi, vhd, vhdx, vmdk};

/// LIMIT: images of a chain.
const MAX_CHAIN: usize = 64;

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Its format.
    pub format: Format,
    /// Nothing is written, and others may read it meanwhile.
    pub read_only: bool,
    /// Which other files may be opened.
    pub references: References,
}

impl OpenOptions {
    /// For reading and writing, without other files.
    pub fn new(format: Format) -> OpenOptions {
        OpenOptions {
            format,
            read_only: false,
            references: References::Refuse,
        }
    }

    /// The same, for reading only.
    pub fn read_only(mut self) -> OpenOptions {
        self.read_only = true;
        self
    }

    /// The same; other files may be opened as well.
    pub fn follow(mut self) -> OpenOptions {
        self.references = References::Follow;
        self
    }
}

/// Opens an image.
pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<dyn Image>, ImageError> {
    open_in_chain(path, options, &mut Vec::new())
}

/// Opens a qcow2 image, for what only it can do.
pub fn open_qcow2(
    path: &Path,
    read_only: bool,
    references: References,
) -> Result<Qcow2, ImageError> {
    let options = OpenOptions {
        format: Format::Qcow2,
        read_only,
        references,
    };
    qcow2_in_chain(path, options, &mut Vec::new())
}

fn open_in_chain(
    path: &Path,
    options: OpenOptions,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Arc<dyn Image>, ImageError> {
    let file = |read_only| HostFile::open(path, read_only);
    Ok(match options.format {
        Format::Raw if options.read_only && seen.is_empty() => {
            Arc::new(RawImage::padded(file(true)?)?)
        }
        Format::Raw => {
            note(path, seen)?;
            let file = file(options.read_only)?;
            if options.read_only {
                Arc::new(RawImage::padded(file)?)
            } else {
                Arc::new(RawImage::new(file, false)?)
            }
        }
        Format::Qcow2 => Arc::new(qcow2_in_chain(path, options, seen)?),
        Format::Vmdk => {
            note(path, seen)?;
            vmdk::open(path, options.read_only, options.references)?
        }
        Format::Vdi | Format::Vhd | Format::Vhdx => {
            note(path, seen)?;
            let file = Box::new(file(options.read_only)?);
            let image = match options.format {
                Format::Vdi => vdi::open(file, options.read_only),
                Format::Vhd => vhd::open(file, options.read_only),
                _ => vhdx::open(file, options.read_only),
            };
            Arc::new(image.map_err(ImageError::disk(path))?)
        }
    })
}

/// Refuses a file that is in the chain already.
fn note(path: &Path, seen: &mut Vec<(u64, u64)>) -> Result<(), ImageError> {
    let meta = std::fs::metadata(path).map_err(|source| crate::raw::OpenError::Open {
        path: path.into(),
        source,
    })?;
    let id = (meta.dev(), meta.ino());
    if seen.contains(&id) {
        return Err(ImageError::content(
            path,
            "the chain of backing files leads back to this image",
        ));
    }
    if seen.len() >= MAX_CHAIN {
        return Err(ImageError::content(
            path,
            format!("more than {MAX_CHAIN} images in a chain; commit or convert some of them"),
        ));
    }
    seen.push(id);
    Ok(())
}

fn qcow2_in_chain(
    path: &Path,
    options: OpenOptions,
    seen: &mut Vec<(u64, u64)>,
) -> Result<Qcow2, ImageError> {
    let failed = ImageError::disk(path);
    note(path, seen)?;
    let file = HostFile::open(path, options.read_only)?;
    let backing = match qcow2::backing_name(&file).map_err(&failed)? {
        None => None,
        Some(b) => {
            let (at, format) = resolve(path, &b.name, b.format.as_deref(), options.references)?;
            let below = OpenOptions {
                format,
                read_only: true,
                references: options.references,
            };
            Some(open_in_chain(&at, below, seen)?)
        }
    };
    Qcow2::open(Box::new(file), backing, options.read_only).map_err(&failed)
}

/// Path and format of the backing file that an image names.
pub fn resolve(
    image: &Path,
    name: &str,
    format: Option<&str>,
    references: References,
) -> Result<(PathBuf, Format), ImageError> {
    if references == References::Refuse {
        return Err(ImageError::content(
            image,
            format!(
                "the image needs the backing file {name:?}; allow it (backing=allow) if the image \
                 comes from somebody you trust with your files"
            ),
        ));
    }
    let Some(format) = format else {
        return Err(ImageError::content(
            image,
            format!(
                "the image does not say which format its backing file {name:?} has, and it is not \
                 guessed; record it: qemu-img rebase -u -b {name} -F FORMAT {}",
                image.display()
            ),
        ));
    };
    let format = format
        .parse::<Format>()
        .map_err(|e| ImageError::content(image, format!("the backing file {name:?}: {e}")))?;
    let plain = name.strip_prefix("file:").unwrap_or(name);
    let scheme = plain.split('/').next().unwrap_or_default();
    if plain.is_empty() || scheme.contains(':') {
        return Err(ImageError::content(
            image,
            format!("the backing file {name:?} is not a file name"),
        ));
    }
    // Relative names are relative to the image. An absolute one replaces the directory.
    let dir = image.parent().unwrap_or(Path::new(""));
    Ok((dir.join(plain), format))
}

/// What a file looks like. For showing and for warning only: see the module.
pub fn looks_like(storage: &dyn Storage) -> std::io::Result<Option<Format>> {
    let mut head = [0; 80];
    storage.read_at(0, &mut head)?;
    let found = match &head {
        [b'Q', b'F', b'I', 0xfb, ..] => Some(Format::Qcow2),
        [b'K', b'D', b'M', b'V', ..] => Some(Format::Vmdk),
        h if h.starts_with(b"# Disk DescriptorFile") => Some(Format::Vmdk),
        h if h.starts_with(b"vhdxfile") => Some(Format::Vhdx),
        h if h.starts_with(b"conectix") => Some(Format::Vhd),
        h if h.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => Some(Format::Vdi),
        _ => None,
    };
    if found.is_some() {
        return Ok(found);
    }
    let len = storage.len()?;
    if len >= 1024 {
        // A fixed VHD has only a footer.
        let mut tail = [0; 8];
        storage.read_at(len - 512, &mut tail)?;
        if &tail == b"conectix" {
            return Ok(Some(Format::Vhd));
        }
    }
    Ok(None)
}
