//! Waiting for descriptors, and connecting without waiting: what `std` does not offer.

// UNSAFETY: two system calls on descriptors that the caller owns, with buffers of this frame.
#![allow(unsafe_code, reason = "poll and a non-blocking connect are not in std")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// What a descriptor is waited for, then what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Both directions are closed, or broken. Reported without being asked for.
    pub(super) hung_up: bool,
}

/// Waits until something happens to one of the descriptors, and says what.
pub(super) fn wait(fds: &[(BorrowedFd<'_>, Ready)]) -> io::Result<Vec<Ready>> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|(fd, want)| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: (if want.readable { libc::POLLIN } else { 0 })
                | (if want.writable { libc::POLLOUT } else { 0 }),
            revents: 0,
        })
        .collect();
    let count = polled.len() as libc::nfds_t;
    // SAFETY: the array is exclusive and `count` entries long for the whole call.
    if unsafe { libc::poll(polled.as_mut_ptr(), count, -1) } < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
        return Ok(vec![Ready::default(); fds.len()]);
    }
    let happened = |p: &libc::pollfd| Ready {
        readable: p.revents & (libc::POLLIN | libc::POLLHUP) != 0 && p.events & libc::POLLIN != 0,
        writable: p.revents & libc::POLLOUT != 0,
        hung_up: p.revents & (libc::POLLHUP | libc::POLLERR) != 0,
    };
    Ok(polled.iter().map(happened).collect())
}

/// Connects to a listening socket, or fails at once if its backlog is full.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: plain system call.
    let raw = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is initialised, NUL-terminated and `len` bytes long.
    if unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UnixStream::from(fd))
}
