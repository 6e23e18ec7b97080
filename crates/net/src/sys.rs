//! System calls of back ends behind descriptors, behind safe functions.

// UNSAFETY: plain system calls on owned or borrowed descriptors with buffers of known size.
#![allow(
    unsafe_code,
    reason = "poll, eventfd, vectored I/O, TAP devices and packet sockets of the Unix family"
)]

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

pub(crate) fn own(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: callers pass the result of a call that made a new descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Wakes a thread that waits for its descriptor, in [`wait`] or another call.
pub(crate) struct Waker(OwnedFd);

impl Waker {
    pub(crate) fn new() -> io::Result<Waker> {
        // SAFETY: no pointers.
        Ok(Waker(own(unsafe {
            libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
        })?))
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.0
    }

    pub(crate) fn wake(&self) {
        let one = 1_u64;
        // SAFETY: eight bytes of a live value. A full counter means it is awake already.
        unsafe {
            libc::write(
                self.0.as_raw_fd(),
                (&raw const one).cast(),
                size_of::<u64>(),
            )
        };
    }

    pub(crate) fn drain(&self) {
        let mut count = 0_u64;
        // SAFETY: eight bytes of a live value. Nothing to read is fine.
        unsafe {
            libc::read(
                self.0.as_raw_fd(),
                (&raw mut count).cast(),
                size_of::<u64>(),
            )
        };
    }
}

/// A descriptor to wait for, and for what.
#[derive(Clone, Copy)]
pub(crate) struct Interest<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// Waits until one of the descriptors is ready (or broken) or the time is over. Which ones are, in
/// their order: readable or broken, writable.
pub(crate) fn wait_for(interests: &[Interest<'_>], timeout: Option<Duration>) -> Vec<(bool, bool)> {
    let mut fds: Vec<libc::pollfd> = interests
        .iter()
        .map(|i| libc::pollfd {
            fd: i.fd.as_raw_fd(),
            events: if i.read { libc::POLLIN } else { 0 } | if i.write { libc::POLLOUT } else { 0 },
            revents: 0,
        })
        .collect();
    let ms = timeout.map_or(-1, |t| {
        t.as_micros().div_ceil(1000).min(i32::MAX as u128) as libc::c_int
    });
    // SAFETY: the array has as many entries as are passed. An error (a signal) is as a time-out.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) };
    let broken = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
    fds.iter()
        .map(|f| {
            let has = |bits| f.revents & bits != 0;
            (has(libc::POLLIN | broken), has(libc::POLLOUT))
        })
        .collect()
}

/// Waits for a descriptor, if there is one, or the waker.
pub(crate) fn wait(
    fd: Option<BorrowedFd<'_>>,
    read: bool,
    write: bool,
    waker: &Waker,
    timeout: Option<Duration>,
) {
    let waker = Interest {
        fd: waker.0.as_fd(),
        read: true,
        write: false,
    };
    match fd {
        // A broken descriptor is always ready: it is not waited for without interest in it.
        Some(fd) if read || write => {
            wait_for(&[waker, Interest { fd, read, write }], timeout);
        }
        _ => {
            wait_for(&[waker], timeout);
        }
    }
}

/// Reads once.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as is passed.
    size(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// Writes a header and a frame in one piece.
pub(crate) fn write(fd: BorrowedFd<'_>, header: &[u8], frame: &[u8]) -> io::Result<()> {
    let parts = [IoSlice::new(header), IoSlice::new(frame)];
    let parts = if header.is_empty() {
        &parts[1..]
    } else {
        &parts[..]
    };
    // SAFETY: IoSlice has the form of iovec, and as many are passed as there are.
    let n = size(unsafe {
        libc::writev(
            fd.as_raw_fd(),
            parts.as_ptr().cast(),
            parts.len() as libc::c_int,
        )
    })?;
    if n == header.len() + frame.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Makes reads and writes return at once.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

/// A copy of a descriptor that this process was given by its number.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a number that is no descriptor fails.
    own(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
/// Checksums, segments over IPv4 and IPv6.
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;

/// struct ifreq with its flags.
#[repr(C)]
struct IfreqFlags {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Opens the TAP interface `name`, making it if need be and allowed.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let fd = OwnedFd::from(file);
    let mut request = IfreqFlags {
        name: [0; libc::IFNAMSIZ],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    if name.len() >= request.name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request is a whole struct ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(fd)
}

/// Whether the interface behind a TAP descriptor puts headers before frames; sets their length.
pub(crate) fn prepare_tap(fd: BorrowedFd<'_>, header_bytes: usize) -> io::Result<bool> {
    let mut request = IfreqFlags {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: the request is a whole struct ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    if request.flags & IFF_TAP == 0 || request.flags & IFF_NO_PI == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no TAP interface without packet information (IFF_TAP | IFF_NO_PI)",
        ));
    }
    if request.flags & IFF_VNET_HDR == 0 {
        return Ok(false);
    }
    let bytes = header_bytes as libc::c_int;
    // SAFETY: an int that lives during the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) })?;
    Ok(true)
}

/// Tells a TAP interface what may be left out of frames that it hands over.
pub(crate) fn set_tap_offloads(
    fd: BorrowedFd<'_>,
    checksum: bool,
    v4: bool,
    v6: bool,
) -> io::Result<()> {
    let bit = |on: bool, bit| if on { bit } else { 0 };
    let bits = bit(checksum, TUN_F_CSUM)
        | bit(checksum && v4, TUN_F_TSO4)
        | bit(checksum && v6, TUN_F_TSO6);
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) })?;
    Ok(())
}

fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as libc::sa_family_t,
        sun_path: [0; 108],
    };
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "expected a socket path of at most 107 bytes",
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    own(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })
}

/// Asks for room for some of the largest messages.
fn set_room(fd: &OwnedFd) {
    let bytes: libc::c_int = 1 << 20;
    for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
        // SAFETY: an int that lives during the call. The kernel may give less.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                (&raw const bytes).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
    }
}

/// Connects a packet socket to a path.
pub(crate) fn connect_packets(path: &Path) -> io::Result<OwnedFd> {
    let (address, len) = unix_address(path)?;
    let fd = packet_socket()?;
    set_room(&fd);
    // SAFETY: a whole address of the length passed.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(fd)
}

/// Listens at a path for packet sockets. The file is made with the process's file mode mask.
pub(crate) fn listen_packets(path: &Path) -> io::Result<OwnedFd> {
    let (address, len) = unix_address(path)?;
    let fd = packet_socket()?;
    // SAFETY: a whole address of the length passed.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), 64) })?;
    Ok(fd)
}

/// Takes a connection.
pub(crate) fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no address is asked for.
    let peer = own(unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        )
    })?;
    set_room(&peer);
    Ok(peer)
}
