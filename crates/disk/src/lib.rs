//! Disk back ends: what a disk controller reads from and writes to.
//!
//! A back end is queue-style: [`BlockBackend::submit`] never blocks for I/O; the completion is
//! called exactly once, on any thread, possibly before `submit` returns. Requests that are in
//! flight together may be executed in any order; a `Flush` covers the writes whose completions
//! were called before it was submitted. The caller validates nothing: offset, length and alignment
//! are checked here and answered with [`DiskError`].

// Only `io` opts in.
#![deny(unsafe_code)]

use std::sync::Arc;

use pyrite_mem::GuestMemory;

pub mod batch;
pub mod blocks;
mod bytes;
mod check;
pub mod conformance;
pub mod faults;
pub mod guarded;
pub mod image;
mod io;
pub mod jobs;
pub mod limits;
mod mapped;
pub mod medium;
pub mod mem_disk;
pub mod open;
pub mod payload;
pub mod qcow2;
pub mod raw;
pub mod scsi;
pub mod served;
pub mod storage;
pub mod targets;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

pub use check::{MAX_TRANSFER_BYTES, check_request, check_span};
pub use image::{Format, Image, ImageError};
pub use mem_disk::MemDisk;
pub use raw::{OpenError, RawDisk};
pub use served::ImageDisk;

/// What is known of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Capacity in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Discard has an effect.
    pub discard: bool,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Beyond the end, or not a multiple of the block size.
    #[error("request {offset}+{len} is outside the disk or unaligned")]
    OutOfRange {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A write to a read-only disk.
    #[error("disk is read-only")]
    ReadOnly,
    /// The host is out of space.
    #[error("no space left on the host")]
    NoSpace,
    /// The guest buffer is not RAM.
    #[error("buffer is not guest RAM")]
    BadBuffer,
    /// The image contradicts itself. Nothing is written to it any more.
    #[error("{0}")]
    Corrupt(String),
    /// The format, or this image, cannot do that.
    #[error("{0}")]
    Unsupported(String),
    /// Anything else from the host.
    #[error("host I/O failed")]
    Io(#[source] std::io::Error),
}

/// A piece of guest memory that takes part in a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoBuf {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
}

/// What is asked of a disk. Offsets and lengths are bytes.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "named by their type")]
pub enum BlockRequest {
    Read {
        offset: u64,
        bufs: Vec<IoBuf>,
    },
    Write {
        offset: u64,
        bufs: Vec<IoBuf>,
        fua: bool,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        may_unmap: bool,
    },
}

/// Called once with the outcome.
pub type Completion = Box<dyn FnOnce(Result<(), DiskError>) + Send>;

/// A disk.
pub trait BlockBackend: Send + Sync {
    /// Size and properties.
    fn info(&self) -> DiskInfo;
    /// Starts a request.
    fn submit(&self, memory: &Arc<GuestMemory>, request: BlockRequest, done: Completion);
    /// Requests in flight.
    fn in_flight(&self) -> usize;
}
