//! Images: a disk in some format, of which every operation is a plain call that may block.
//!
//! This is the one trait that formats implement. [`ImageDisk`](crate::served::ImageDisk) turns an
//! image into a [`BlockBackend`](crate::BlockBackend) with threads; `pyrite image` uses images
//! directly. All methods may be called from several threads at once. Ranges must lie within the
//! disk and be multiples of 512 bytes: [`check_request`](crate::check_request) and
//! [`check_span`] see to that.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::check::check_span;
use crate::payload::{Source, Target};
use crate::raw::OpenError;
use crate::{DiskError, DiskInfo};

/// A disk in some format.
pub trait Image: Send + Sync {
    /// Size and properties.
    fn info(&self) -> DiskInfo;
    /// Fills `target` from `offset` on.
    fn read(&self, offset: u64, target: &mut Target<'_>) -> Result<(), DiskError>;
    /// Writes `source` from `offset` on. Not durable before a flush.
    fn write(&self, offset: u64, source: &mut Source<'_>) -> Result<(), DiskError>;
    /// Makes a range read as zeroes; gives its space back if `may_unmap` and possible.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError>;
    /// Says that the content of a range is no longer needed. What it reads as afterwards is old
    /// content or zeroes, but never content of a backing file that was not visible before.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;
    /// Makes all completed writes durable.
    fn flush(&self) -> Result<(), DiskError>;
    /// What is at `offset`, for as far as it is alike, at most `max` bytes. `offset` lies within
    /// the disk and `max` is not zero.
    fn extent(&self, offset: u64, max: u64) -> Result<Extent, DiskError>;
    /// Changes the size, a multiple of 512. What is cut off is lost; what is new reads as zeroes.
    fn resize(&self, size_bytes: u64) -> Result<(), DiskError>;
    /// What `pyrite image info` shows.
    fn details(&self) -> Details;
    /// Writes everything back and marks the image as cleanly closed. Called once, at the end;
    /// afterwards only reads work. Dropping an image closes it too, but nobody sees the error.
    fn close(&self) -> Result<(), DiskError> {
        self.flush()
    }
}

/// How a range is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// As data.
    Data,
    /// Not at all: reads as zeroes.
    Zero,
}

/// A range that is stored in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, not zero.
    pub len: u64,
    /// How.
    pub stored: Stored,
    /// Which image of a backing chain says so: 0 is the image itself.
    pub depth: u32,
    /// False if no image of the chain has anything for it.
    pub present: bool,
    /// Compressed data.
    pub compressed: bool,
    /// Where in the image's file the data is, if it can be read from there as it is.
    pub host_offset: Option<u64>,
}

impl Extent {
    /// Nothing is known of the range: it reads as zeroes.
    pub fn absent(len: u64, depth: u32) -> Extent {
        Extent {
            len,
            stored: Stored::Zero,
            depth,
            present: false,
            compressed: false,
            host_offset: None,
        }
    }

    /// Zeroes that the image itself says are there.
    pub fn zero(len: u64) -> Extent {
        Extent {
            present: true,
            ..Extent::absent(len, 0)
        }
    }

    /// Plain data.
    pub fn data(len: u64, host_offset: Option<u64>) -> Extent {
        Extent {
            len,
            stored: Stored::Data,
            depth: 0,
            present: true,
            compressed: false,
            host_offset,
        }
    }
}

/// What is known of an image beyond its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// Its format.
    pub format: Format,
    /// Unit of allocation in bytes, if there is one.
    pub cluster_bytes: Option<u64>,
    /// The backing file as the image names it, and the format it names.
    pub backing: Option<(String, Option<String>)>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Properties of the format, name and value.
    pub properties: Vec<(&'static str, String)>,
}

impl Details {
    /// Details of a format without clusters, backing files or snapshots.
    pub fn plain(format: Format) -> Details {
        Details {
            format,
            cluster_bytes: None,
            backing: None,
            snapshots: Vec::new(),
            properties: Vec::new(),
        }
    }
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in the image.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// Size of the disk then, in bytes.
    pub disk_bytes: u64,
    /// Size of the saved VM state in bytes, usually 0.
    pub vm_state_bytes: u64,
    /// When it was made, in seconds since 1970.
    pub unix_seconds: u32,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
    /// VMware: sparse, flat, stream-optimised.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Virtual PC, also called VPC: fixed and dynamic.
    Vhd,
    /// Hyper-V.
    Vhdx,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 6] = [
        Format::Raw,
        Format::Qcow2,
        Format::Vmdk,
        Format::Vdi,
        Format::Vhd,
        Format::Vhdx,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vdi => "vdi",
            Format::Vhd => "vhd",
            Format::Vhdx => "vhdx",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Format, String> {
        // QEMU calls VHD "vpc"; backing files name formats in its words.
        let s = if s == "vpc" { "vhd" } else { s };
        Format::ALL
            .into_iter()
            .find(|f| f.name() == s)
            .ok_or_else(|| {
                let names = Format::ALL.map(Format::name).join(", ");
                format!("unknown image format {s:?}; expected one of {names}")
            })
    }
}

/// Why an image could not be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file itself.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What is in it is damaged, or refers to what is not there.
    #[error("{}: {problem}", path.display())]
    Content {
        /// The image.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: DiskError,
    },
}

impl ImageError {
    /// Damaged or unsuitable content.
    pub fn content(path: &Path, problem: impl Into<String>) -> ImageError {
        ImageError::Content {
            path: path.into(),
            problem: problem.into(),
        }
    }

    /// A failed operation on `path`.
    pub fn disk(path: &Path) -> impl Fn(DiskError) -> ImageError {
        move |source| match source {
            DiskError::Corrupt(problem) | DiskError::Unsupported(problem) => ImageError::Content {
                path: path.into(),
                problem,
            },
            source => ImageError::Disk {
                path: path.into(),
                source,
            },
        }
    }
}

/// Which files other than the image itself may be opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum References {
    /// None: an image that needs another file is refused.
    #[default]
    Refuse,
    /// The files that the image names, and that those name.
    Follow,
}

/// Reads into a buffer, with the range checked.
pub fn read_into(image: &dyn Image, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
    check_span(&image.info(), offset, buf.len() as u64)?;
    image.read(offset, &mut Target::host(buf))
}

/// Writes a buffer, with the range checked.
pub fn write_from(image: &dyn Image, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
    let info = image.info();
    if info.read_only {
        return Err(DiskError::ReadOnly);
    }
    check_span(&info, offset, buf.len() as u64)?;
    image.write(offset, &mut Source::host(buf))
}

/// A shared image.
pub type SharedImage = Arc<dyn Image>;
