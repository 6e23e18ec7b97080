//! Raw images: the file or block device is the disk, byte for byte.
//!
//! The file is locked while it is open, so that two VMs cannot write it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyrite_mem::GuestMemory;

use crate::image::{Details, Extent, Format, Image};
use crate::io::map_error;
use crate::payload::{Source, Target};
use crate::served::ImageDisk;
use crate::storage::{HostFile, Punch, Storage, write_zeroes};
use crate::{BlockBackend, BlockRequest, Completion, DiskError, DiskInfo};

/// The unit that sizes and requests are multiples of, in bytes.
const SECTOR_BYTES: u64 = 512;

/// Why a raw image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host does not give us the file.
    #[error("cannot open disk {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk {} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Another process, or this one, has it open.
    #[error("disk {} is in use by another VM or tool; only read-only users can share it", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The size is not that of a disk.
    #[error(
        "disk {} has {size_bytes} bytes; expected a multiple of 512, at least 512 \
         (the next larger is {})",
        path.display(),
        next_size(*size_bytes)
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// What it has.
        size_bytes: u64,
    },
    /// A thread could not be started.
    #[error("cannot start the threads of disk {}", path.display())]
    Thread {
        /// The image.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

fn next_size(size_bytes: u64) -> u64 {
    size_bytes
        .max(1)
        .checked_next_multiple_of(SECTOR_BYTES)
        .unwrap_or(u64::MAX)
}

/// The image: see the module.
pub struct RawImage {
    storage: Box<dyn Storage>,
    size_bytes: AtomicU64,
    /// Bytes of the file; less than the size only of an image that is read-only.
    file_bytes: u64,
    read_only: bool,
}

impl RawImage {
    /// Takes a file whose length is a multiple of 512 bytes, and not 0.
    pub fn new(file: HostFile, read_only: bool) -> Result<RawImage, OpenError> {
        let path = file.path().to_path_buf();
        let size_bytes = file.len().map_err(|source| OpenError::Open {
            path: path.clone(),
            source,
        })?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::Size { path, size_bytes });
        }
        Ok(RawImage::with_storage(
            Box::new(file),
            size_bytes,
            read_only,
        ))
    }

    /// Takes a file of any length to read from; a last part of a sector is filled up with zeroes.
    pub fn padded(file: HostFile) -> Result<RawImage, OpenError> {
        let path = file.path().to_path_buf();
        let size_bytes = file
            .len()
            .map_err(|source| OpenError::Open { path, source })?;
        Ok(RawImage::with_storage(Box::new(file), size_bytes, true))
    }

    /// As [`RawImage::padded`], but filled up with zeroes to `size_bytes` (whole sectors), if the
    /// file has less.
    pub fn padded_to(file: HostFile, size_bytes: u64) -> Result<RawImage, OpenError> {
        let image = RawImage::padded(file)?;
        let size = image.size().max(next_size(size_bytes));
        image.size_bytes.store(size, Ordering::Release);
        Ok(image)
    }

    /// On any storage.
    pub fn with_storage(storage: Box<dyn Storage>, file_bytes: u64, read_only: bool) -> RawImage {
        RawImage {
            storage,
            size_bytes: AtomicU64::new(file_bytes.next_multiple_of(SECTOR_BYTES)),
            file_bytes,
            read_only,
        }
    }

    fn size(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }
}

impl Image for RawImage {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size_bytes: self.size(),
            block_bytes: SECTOR_BYTES as u32,
            read_only: self.read_only,
            discard: !self.read_only,
        }
    }

    fn read(&self, offset: u64, target: &mut Target<'_>) -> Result<(), DiskError> {
        let len = target.remaining();
        if self.read_only && self.file_bytes < offset.saturating_add(len) {
            return target.fill_from(&*self.storage, offset, len);
        }
        target.fill_exact(&*self.storage, offset, len)
    }

    fn write(&self, offset: u64, source: &mut Source<'_>) -> Result<(), DiskError> {
        source.write_to(&*self.storage, offset, source.remaining())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        write_zeroes(&*self.storage, may_unmap, offset, len).map_err(map_error)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if len > 0 {
            // Discard is advice: a file without holes keeps its content.
            self.storage
                .punch(Punch::Hole, offset, len)
                .map_err(map_error)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.storage.sync().map_err(map_error)
    }

    fn extent(&self, offset: u64, max: u64) -> Result<Extent, DiskError> {
        let (data, end) = self.storage.extent_at(offset).map_err(map_error)?;
        // Extents of the file system need not end at sectors.
        let end = end.next_multiple_of(SECTOR_BYTES);
        let len = end.saturating_sub(offset).clamp(1, max);
        Ok(if data {
            Extent::data(len, Some(offset))
        } else {
            Extent::zero(len)
        })
    }

    fn resize(&self, size_bytes: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.storage.set_len(size_bytes).map_err(map_error)?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    fn details(&self) -> Details {
        Details::plain(Format::Raw)
    }
}

/// A disk whose content is a file or a block device. Dropping it finishes what was submitted.
pub struct RawDisk(ImageDisk);

impl RawDisk {
    /// Opens the image at `path` and locks it: exclusively, or shared with other readers if
    /// `read_only`.
    pub fn open(path: &Path, read_only: bool) -> Result<RawDisk, OpenError> {
        RawDisk::from_host(HostFile::open(path, read_only)?, read_only)
    }

    /// Takes an open file, which must permit writing unless `read_only`. `name` is for messages.
    pub fn from_file(file: File, name: &Path, read_only: bool) -> Result<RawDisk, OpenError> {
        RawDisk::from_host(HostFile::from_file(file, name, read_only)?, read_only)
    }

    fn from_host(file: HostFile, read_only: bool) -> Result<RawDisk, OpenError> {
        let path = file.path().to_path_buf();
        let image = Arc::new(RawImage::new(file, read_only)?);
        ImageDisk::new(image)
            .map(RawDisk)
            .map_err(|source| OpenError::Thread { path, source })
    }
}

impl BlockBackend for RawDisk {
    fn info(&self) -> DiskInfo {
        self.0.info()
    }

    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion) {
        self.0.submit(memory, request, done);
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}
