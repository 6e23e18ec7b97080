//! Transfers between a file and guest memory, without a copy.

// UNSAFETY: vectored I/O on guest RAM and fallocate.
#![allow(unsafe_code, reason = "the kernel reads and writes guest RAM directly")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use pyrite_mem::GuestMemory;

use crate::{DiskError, IoBuf};

/// LIMIT: pieces per system call (IOV_MAX of Linux).
const PIECES: usize = 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// File to guest.
    Read,
    /// Guest to file.
    Write,
}

/// What a read does at the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtEnd {
    /// The file is too short for what it should hold.
    Error,
    /// What was never written is zeroes.
    Zeroes,
}

/// Moves all of `bufs` from or to `file` at `offset`.
///
/// The guest may change the memory meanwhile: what is written is then some mix, as with a real
/// controller. After a failed read, part of the buffers may have been written.
pub(crate) fn transfer(
    file: &File,
    memory: &GuestMemory,
    direction: Direction,
    mut offset: u64,
    bufs: &[IoBuf],
    at_end: AtEnd,
) -> Result<(), DiskError> {
    let mut pieces = Vec::with_capacity(bufs.len());
    for buf in bufs.iter().filter(|b| b.len > 0) {
        let len = u64::from(buf.len);
        let host = memory.host_ptr(buf.gpa, len).ok_or(DiskError::BadBuffer)?;
        pieces.push(libc::iovec {
            iov_base: host.cast(),
            iov_len: buf.len as usize,
        });
    }
    let mut next = 0;
    let mut outcome = Ok(());
    while let Some(rest) = pieces.get_mut(next..).filter(|r| !r.is_empty()) {
        let count = rest.len().min(PIECES) as libc::c_int;
        let at = offset as libc::off_t;
        let fd = file.as_raw_fd();
        // SAFETY: every piece lies within the mapping of guest RAM (host_ptr has checked it, and
        // consuming below only shortens pieces), which lives as long as `memory`. The memory is
        // only ever accessed through raw pointers, so the kernel may read and write it.
        let n = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd, rest.as_ptr(), count, at),
                Direction::Write => libc::pwritev(fd, rest.as_ptr(), count, at),
            }
        };
        if n < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            outcome = Err(map_error(error));
            break;
        }
        if n == 0 && direction == Direction::Read && at_end == AtEnd::Zeroes {
            for piece in rest.iter().take(count as usize) {
                // SAFETY: as above; nobody holds a reference into guest RAM.
                unsafe { piece.iov_base.cast::<u8>().write_bytes(0, piece.iov_len) };
            }
            next += count as usize;
            continue;
        }
        if n == 0 {
            let kind = match direction {
                Direction::Read => io::ErrorKind::UnexpectedEof,
                Direction::Write => io::ErrorKind::WriteZero,
            };
            outcome = Err(DiskError::Io(kind.into()));
            break;
        }
        offset += n as u64;
        let mut done = n as usize;
        for piece in rest.iter_mut() {
            let here = done.min(piece.iov_len);
            // SAFETY: `here` is at most the piece's length.
            piece.iov_base = unsafe { piece.iov_base.byte_add(here) };
            piece.iov_len -= here;
            done -= here;
            if piece.iov_len > 0 {
                break;
            }
            next += 1;
        }
    }
    if direction == Direction::Read {
        // The kernel wrote behind the dirty log's back, even if it failed half-way.
        for buf in bufs {
            let len = u64::from(buf.len);
            if let Some(ram_offset) = memory.ram_offset(buf.gpa, len) {
                memory.mark_written(ram_offset, len);
            }
        }
    }
    outcome
}

/// What fallocate(2) is to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Punch {
    /// Give the space back; reads as zeroes.
    Hole,
    /// Keep the space; reads as zeroes.
    Zero,
}

/// Zeroes a range without writing it. The file keeps its size.
pub(crate) fn punch(file: &File, how: Punch, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_KEEP_SIZE
        | match how {
            Punch::Hole => libc::FALLOC_FL_PUNCH_HOLE,
            Punch::Zero => libc::FALLOC_FL_ZERO_RANGE,
        };
    loop {
        // SAFETY: no pointers.
        let result = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                mode,
                offset as libc::off_t,
                len as libc::off_t,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether there is data at `offset` of a file, and where that ends. None if the file system
/// does not tell.
pub(crate) fn next_extent(file: &File, offset: u64) -> io::Result<Option<(bool, u64)>> {
    let seek = |whence| {
        // SAFETY: no pointers.
        let at = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
        if at < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(at as u64)
        }
    };
    let data = match seek(libc::SEEK_DATA) {
        Ok(at) => at,
        // No data up to the end.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {
            return Ok(Some((false, file.metadata()?.len())));
        }
        Err(e) if is_unsupported(&e) => return Ok(None),
        Err(e) => return Err(e),
    };
    if data > offset {
        return Ok(Some((false, data)));
    }
    match seek(libc::SEEK_HOLE) {
        Ok(at) if at > offset => Ok(Some((true, at))),
        Ok(_) => Ok(None),
        Err(e) => Err(e),
    }
}

/// True if fallocate(2) has said that this file, or this mode, cannot be done.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    // EOPNOTSUPP and ENOTSUP are one number on Linux; block devices also say EINVAL.
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

/// The host's error in the terms of a disk.
pub(crate) fn map_error(error: io::Error) -> DiskError {
    match error.kind() {
        // ENOSPC and EDQUOT.
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DiskError::NoSpace,
        _ => DiskError::Io(error),
    }
}
