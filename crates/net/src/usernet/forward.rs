//! Port forwards: ports of the host that lead into the guest.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::Env;
use super::counters::count;
use super::slab::{Kind, Slab};
use super::tcp::{Flow, TcpTable};
use super::udp;

/// LIMIT: peers of one UDP forward; the oldest makes room.
const UDP_PEERS: usize = 256;
/// How long a peer of a UDP forward is remembered.
const UDP_IDLE: Duration = Duration::from_secs(120);
/// LIMIT: connections or datagrams taken per event.
const BURST: usize = 64;

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ForwardProtocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// One port of the host that leads into the guest.
///
/// As text: `[HOSTADDR:]HOSTPORT:[GUESTADDR:]GUESTPORT[/tcp|/udp]`, for instance `8080:80` or
/// `0.0.0.0:5353:53/udp`. IPv6 addresses are put in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    /// What is forwarded.
    pub protocol: ForwardProtocol,
    /// Where the host listens. Port 0: the host chooses.
    pub listen: SocketAddr,
    /// The guest's address; `None`: the one leased first by DHCP.
    pub guest: Option<IpAddr>,
    /// The guest's port.
    pub guest_port: u16,
}

/// A forward that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "port forward {0:?} is not [HOSTADDR:]HOSTPORT:[GUESTADDR:]GUESTPORT[/tcp|/udp] with ports \
     up to 65535"
)]
pub struct ForwardSyntaxError(String);

impl FromStr for Forward {
    type Err = ForwardSyntaxError;

    fn from_str(text: &str) -> Result<Forward, ForwardSyntaxError> {
        parse(text).ok_or_else(|| ForwardSyntaxError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Forward> {
    let (addresses, protocol) = match text.rsplit_once('/') {
        Some((a, "tcp")) => (a, ForwardProtocol::Tcp),
        Some((a, "udp")) => (a, ForwardProtocol::Udp),
        Some(_) => return None,
        None => (text, ForwardProtocol::Tcp),
    };
    let mut rest = Some(addresses);
    let (host, host_port) = parse_end(&mut rest)?;
    let (guest, guest_port) = parse_end(&mut rest)?;
    if rest.is_some() || guest_port == 0 {
        return None;
    }
    let listen = SocketAddr::new(host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), host_port);
    Some(Forward {
        protocol,
        listen,
        guest,
        guest_port,
    })
}

/// Takes `[ADDR:]PORT` from the front.
fn parse_end(rest: &mut Option<&str>) -> Option<(Option<IpAddr>, u16)> {
    let mut address = None;
    if let Some(inner) = (*rest)?.strip_prefix('[') {
        let (ip, after) = inner.split_once("]:")?;
        address = Some(IpAddr::V6(ip.parse().ok()?));
        *rest = Some(after);
    }
    let mut field = next_field(rest)?;
    if address.is_none() && field.contains('.') {
        address = Some(IpAddr::V4(field.parse().ok()?));
        field = next_field(rest)?;
    }
    Some((address, field.parse().ok()?))
}

fn next_field<'a>(rest: &mut Option<&'a str>) -> Option<&'a str> {
    let text = (*rest)?;
    let (field, after) = match text.split_once(':') {
        Some((field, after)) => (field, Some(after)),
        None => (text, None),
    };
    *rest = after;
    Some(field)
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.listen)?;
        match self.guest {
            Some(IpAddr::V6(a)) => write!(f, "[{a}]:")?,
            Some(IpAddr::V4(a)) => write!(f, "{a}:")?,
            None => {}
        }
        let protocol = if self.protocol == ForwardProtocol::Tcp {
            "tcp"
        } else {
            "udp"
        };
        write!(f, "{}/{protocol}", self.guest_port)
    }
}

enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// A forward that listens.
pub(super) struct Listener {
    /// With the port that the host chose.
    pub(super) forward: Forward,
    socket: Socket,
    /// UDP only: the guest's view of each peer, and the peer.
    peers: HashMap<SocketAddr, (SocketAddr, Instant)>,
}

impl Listener {
    /// Starts to listen on the host.
    pub(super) fn bind(mut forward: Forward) -> io::Result<Listener> {
        let socket = match forward.protocol {
            ForwardProtocol::Tcp => {
                let socket = TcpListener::bind(forward.listen)?;
                socket.set_nonblocking(true)?;
                forward.listen = socket.local_addr()?;
                Socket::Tcp(socket)
            }
            ForwardProtocol::Udp => {
                let socket = UdpSocket::bind(forward.listen)?;
                socket.set_nonblocking(true)?;
                forward.listen = socket.local_addr()?;
                Socket::Udp(socket)
            }
        };
        Ok(Listener {
            forward,
            socket,
            peers: HashMap::new(),
        })
    }
}

/// The forwards of one network.
pub(super) struct Forwards {
    listeners: Slab<Listener>,
    buf: Vec<u8>,
}

impl Forwards {
    pub(super) fn new() -> Forwards {
        Forwards {
            listeners: Slab::new(Kind::Forward),
            buf: vec![0; usize::from(u16::MAX)],
        }
    }

    pub(super) fn add(&mut self, env: &mut Env, listener: Listener) {
        let token = self.listeners.insert(listener);
        let Some(listener) = self.listeners.get(token) else {
            return;
        };
        let added = match &listener.socket {
            Socket::Tcp(s) => env.poller.add(s, token),
            Socket::Udp(s) => env.poller.add(s, token),
        };
        if let Err(e) = added {
            tracing::warn!("cannot watch port forward {}: {e}", listener.forward);
            self.listeners.remove(token);
        }
    }

    /// Stops a forward. Connections made through it stay.
    pub(super) fn remove(&mut self, forward: &Forward) {
        let token = self
            .listeners
            .iter()
            .find(|(_, l)| l.forward == *forward)
            .map(|(t, _)| t);
        if let Some(token) = token {
            self.listeners.remove(token);
        }
    }

    /// Somebody has come.
    pub(super) fn host_event(&mut self, env: &mut Env, tcp: &mut TcpTable, token: u64) {
        let Some(listener) = self.listeners.get_mut(token) else {
            return;
        };
        let guest_ip = listener.forward.guest.unwrap_or(IpAddr::V4(env.guest_v4));
        let guest = SocketAddr::new(guest_ip, listener.forward.guest_port);
        for _ in 0..BURST {
            match &listener.socket {
                Socket::Tcp(socket) => match socket.accept() {
                    Ok((stream, peer)) => {
                        if stream.set_nonblocking(true).is_err() {
                            continue;
                        }
                        let seen = env.seen_as(guest_ip, peer);
                        let free = free_port(seen, |remote| tcp.has(&Flow { guest, remote }));
                        match free {
                            Some(remote) => tcp.accept(env, Flow { guest, remote }, stream),
                            None => count(&env.shared.counters.limit_drops),
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                    // The peer has gone again, or descriptors are short: tried again next turn.
                    Err(e) => {
                        tracing::debug!("port forward {}: {e}", listener.forward);
                        env.retry.push(token);
                        return;
                    }
                },
                Socket::Udp(socket) => match socket.recv_from(&mut self.buf) {
                    Ok((len, peer)) => {
                        let seen = env.seen_as(guest_ip, peer);
                        let peers = &mut listener.peers;
                        let Some(seen) = free_port(seen, |remote| {
                            peers.get(&remote).is_some_and(|(known, _)| *known != peer)
                        }) else {
                            continue;
                        };
                        if peers.len() >= UDP_PEERS && !peers.contains_key(&seen) {
                            let oldest = peers.iter().min_by_key(|(_, (_, at))| *at);
                            if let Some(oldest) = oldest.map(|(k, _)| *k) {
                                peers.remove(&oldest);
                            }
                        }
                        peers.insert(seen, (peer, env.now));
                        if udp::send(&mut env.link, seen, guest, &self.buf[..len]) {
                            count(&env.shared.counters.udp_in);
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                    Err(_) => {}
                },
            }
        }
        env.again.push(token);
    }

    /// A datagram from the guest: if it answers one that came through a forward, sends it back
    /// there and returns true.
    pub(super) fn answer(
        &mut self,
        env: &Env,
        guest: SocketAddr,
        remote: SocketAddr,
        payload: &[u8],
    ) -> bool {
        let found = self.listeners.iter().find_map(|(token, l)| {
            let here = l.forward.guest_port == guest.port() && l.peers.contains_key(&remote);
            here.then_some(token)
        });
        let Some(listener) = found.and_then(|t| self.listeners.get_mut(t)) else {
            return false;
        };
        let (Socket::Udp(socket), Some((peer, used))) =
            (&listener.socket, listener.peers.get_mut(&remote))
        else {
            return false;
        };
        *used = env.now;
        if socket.send_to(payload, *peer).is_ok() {
            count(&env.shared.counters.udp_out);
        }
        true
    }

    /// Forgets UDP peers that have been silent. Called every few seconds.
    pub(super) fn sweep(&mut self, now: Instant) {
        let tokens: Vec<u64> = self.listeners.iter().map(|(t, _)| t).collect();
        for token in tokens {
            if let Some(l) = self.listeners.get_mut(token) {
                l.peers
                    .retain(|_, (_, at)| now.duration_since(*at) < UDP_IDLE);
            }
        }
    }
}

/// `seen`, or the next port with the same address that is not `taken`.
fn free_port(seen: SocketAddr, taken: impl Fn(SocketAddr) -> bool) -> Option<SocketAddr> {
    // LIMIT: a few tries; ports of one peer rarely collide.
    (0..1024)
        .map(|n| SocketAddr::new(seen.ip(), seen.port().wrapping_add(n).max(1)))
        .find(|a| !taken(*a))
}
