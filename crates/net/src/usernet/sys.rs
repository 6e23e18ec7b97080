//! The system calls that the standard library does not offer, behind safe functions.

// UNSAFETY: plain system calls on owned descriptors with buffers of known size.
#![allow(
    unsafe_code,
    reason = "epoll, eventfd, non-blocking connect and getifaddrs"
)]

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

pub(super) use crate::sys::Waker;
use crate::sys::{check, own};

/// What happened to a registered descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Event {
    /// The number given at registration.
    pub(super) token: u64,
    /// Data or end of stream can be read.
    pub(super) readable: bool,
    /// Space to write, or a finished connect.
    pub(super) writable: bool,
    /// The peer will send no more, or the socket failed.
    pub(super) hangup: bool,
}

/// An edge-triggered epoll set. Closing a descriptor removes it.
pub(super) struct Poller {
    epoll: OwnedFd,
    raw: Vec<libc::epoll_event>,
}

impl Poller {
    /// Events taken from the kernel at once.
    const BATCH: usize = 256;

    pub(super) fn new() -> io::Result<Poller> {
        // SAFETY: no pointers.
        let epoll = own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        Ok(Poller {
            epoll,
            raw: vec![libc::epoll_event { events: 0, u64: 0 }; Self::BATCH],
        })
    }

    /// Registers for everything, edge-triggered: an event tells of a change, once.
    pub(super) fn add(&self, fd: &impl AsFd, token: u64) -> io::Result<()> {
        let wanted = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
        let mut event = libc::epoll_event {
            events: wanted as u32,
            u64: token,
        };
        // SAFETY: both descriptors are borrowed for the call and `event` outlives it.
        check(unsafe {
            libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd.as_fd().as_raw_fd(),
                &mut event,
            )
        })?;
        Ok(())
    }

    /// Waits and replaces the content of `events`. Without time-out: until something happens.
    pub(super) fn wait(
        &mut self,
        events: &mut Vec<Event>,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        events.clear();
        let ms = timeout.map_or(-1, |t| {
            t.as_micros().div_ceil(1000).min(i32::MAX as u128) as libc::c_int
        });
        // SAFETY: `raw` has room for BATCH events.
        let n = unsafe {
            libc::epoll_wait(
                self.epoll.as_raw_fd(),
                self.raw.as_mut_ptr(),
                Self::BATCH as libc::c_int,
                ms,
            )
        };
        let n = match check(n) {
            Ok(n) => n as usize,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        events.extend(self.raw.iter().take(n).map(|e| {
            let bits = e.events as libc::c_int;
            let failed = bits & (libc::EPOLLHUP | libc::EPOLLERR) != 0;
            Event {
                token: e.u64,
                readable: bits & (libc::EPOLLIN | libc::EPOLLRDHUP) != 0 || failed,
                writable: bits & libc::EPOLLOUT != 0 || failed,
                hangup: bits & libc::EPOLLRDHUP != 0 || failed,
            }
        }));
        Ok(())
    }
}

fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    own(unsafe { libc::socket(domain, kind, protocol) })
}

fn set_option<T>(
    fd: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the option value is read from `value`, whose size is passed.
    check(unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// Starts a TCP connection without waiting; writability tells the end, `take_error` the outcome.
pub(super) fn start_connect(to: SocketAddr) -> io::Result<TcpStream> {
    let domain = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let fd = socket(domain, libc::SOCK_STREAM, 0)?;
    let _ = set_option(&fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1_i32);
    let result = match to {
        SocketAddr::V4(a) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: a.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from(*a.ip()).to_be(),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: `raw` is a complete address of the size passed.
            unsafe {
                libc::connect(
                    fd.as_raw_fd(),
                    (&raw const raw).cast(),
                    size_of::<libc::sockaddr_in>() as libc::socklen_t,
                )
            }
        }
        SocketAddr::V6(a) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: a.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: a.ip().octets(),
                },
                sin6_scope_id: 0,
            };
            // SAFETY: as above.
            unsafe {
                libc::connect(
                    fd.as_raw_fd(),
                    (&raw const raw).cast(),
                    size_of::<libc::sockaddr_in6>() as libc::socklen_t,
                )
            }
        }
    };
    match check(result) {
        Ok(_) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(e) => return Err(e),
    }
    Ok(TcpStream::from(fd))
}

/// Makes the next close send a reset instead of an orderly end.
pub(super) fn reset_on_close(stream: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let _ = set_option(stream, libc::SOL_SOCKET, libc::SO_LINGER, &linger);
}

/// An unprivileged ping socket. Refused unless `net.ipv4.ping_group_range` has our group.
pub(super) fn ping_socket(v6: bool) -> io::Result<UdpSocket> {
    let fd = if v6 {
        socket(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6)?
    } else {
        socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?
    };
    Ok(UdpSocket::from(fd))
}

/// The addresses of the host's interfaces.
pub(super) fn local_addresses() -> io::Result<Vec<IpAddr>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` receives a list that is freed below.
    check(unsafe { libc::getifaddrs(&mut list) })?;
    let mut out = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: a node of the list, which is alive until freeifaddrs.
        let node = unsafe { &*next };
        if !node.ifa_addr.is_null() {
            // SAFETY: a non-null address starts with its family.
            let family = libc::c_int::from(unsafe { (*node.ifa_addr).sa_family });
            if family == libc::AF_INET {
                // SAFETY: the family says which structure it is; it may be unaligned for it.
                let a = unsafe { node.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                out.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr))));
            } else if family == libc::AF_INET6 {
                // SAFETY: as above.
                let a = unsafe { node.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                out.push(IpAddr::V6(Ipv6Addr::from(a.sin6_addr.s6_addr)));
            }
        }
        next = node.ifa_next;
    }
    // SAFETY: the list came from getifaddrs and is not used after.
    unsafe { libc::freeifaddrs(list) };
    Ok(out)
}

/// Bytes nobody can guess: initial sequence numbers.
pub(super) fn random_u32() -> u32 {
    let mut value = 0_u32;
    // SAFETY: four bytes of a live value. Short reads do not happen for so few bytes.
    unsafe { libc::getrandom((&raw mut value).cast(), size_of::<u32>(), 0) };
    value
}
