//! Locks of open file descriptions, fcntl(2) `F_OFD_SETLK` and `F_OFD_GETLK`.

// UNSAFETY: two fcntl calls on a descriptor that the caller owns, with a `flock` of this frame.
#![allow(
    unsafe_code,
    reason = "locks of open file descriptions are not in rustix"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{Errno, Result};

/// A range of a file and how it is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// `F_RDLCK` (0), `F_WRLCK` (1) or `F_UNLCK` (2).
    pub kind: u8,
    /// First byte.
    pub start: u64,
    /// Bytes; 0 is up to the end, wherever that comes to be.
    pub len: u64,
}

fn flock(lock: &Lock) -> Result<libc::flock> {
    let offset = |n: u64| libc::off_t::try_from(n).map_err(|_| Errno(libc::EINVAL));
    // SAFETY: all-zero bytes are a valid flock; l_pid must be 0.
    let mut f: libc::flock = unsafe { std::mem::zeroed() };
    f.l_type = match lock.kind {
        0 => libc::F_RDLCK as _,
        1 => libc::F_WRLCK as _,
        2 => libc::F_UNLCK as _,
        _ => return Err(Errno(libc::EINVAL)),
    };
    f.l_whence = libc::SEEK_SET as _;
    f.l_start = offset(lock.start)?;
    f.l_len = offset(lock.len)?;
    Ok(f)
}

fn call(fd: BorrowedFd<'_>, command: i32, f: &mut libc::flock) -> Result<()> {
    // SAFETY: the command takes a pointer to a flock, which is exclusive for the whole call.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(f)) } < 0 {
        let e = std::io::Error::last_os_error();
        return Err(Errno(e.raw_os_error().unwrap_or(libc::EIO)));
    }
    Ok(())
}

/// Sets or releases a lock without waiting; `EAGAIN` if somebody else has one.
pub(crate) fn set(fd: BorrowedFd<'_>, lock: &Lock) -> Result<()> {
    call(fd, libc::F_OFD_SETLK, &mut flock(lock)?)
}

/// The lock that is in the way of this one, if there is one.
pub(crate) fn test(fd: BorrowedFd<'_>, lock: &Lock) -> Result<Option<Lock>> {
    let mut f = flock(lock)?;
    call(fd, libc::F_OFD_GETLK, &mut f)?;
    let kind = match i32::from(f.l_type) {
        libc::F_RDLCK => 0,
        libc::F_WRLCK => 1,
        _ => return Ok(None),
    };
    Ok(Some(Lock {
        kind,
        start: f.l_start as u64,
        len: f.l_len as u64,
    }))
}
