//! UDP: one host socket per guest endpoint, as RFC 4787 wants it of a NAT.
//!
//! Mapping is endpoint-independent (REQ-1); datagrams are let in only from addresses that the
//! guest has sent to (address-dependent filtering, REQ-8).

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use smoltcp::wire::{IpProtocol, UDP_HEADER_LEN, UdpPacket, UdpRepr};

use super::Env;
use super::counters::count;
use super::link::Link;
use super::slab::{Kind, Slab};

/// REQ-5: a mapping must not end within two minutes of silence.
const IDLE: Duration = Duration::from_secs(120);
/// LIMIT: addresses that may answer one guest endpoint; the oldest makes room.
const PEERS: usize = 64;
/// LIMIT: datagrams handled per event and flow.
const BURST: usize = 64;

struct UdpFlow {
    guest: SocketAddr,
    socket: UdpSocket,
    /// Addresses the guest has sent to, latest first: the host's view and the guest's.
    peers: Vec<(IpAddr, IpAddr)>,
    used: Instant,
}

/// All UDP flows that the guest has begun.
pub(super) struct UdpTable {
    flows: Slab<UdpFlow>,
    by_guest: HashMap<SocketAddr, u64>,
    buf: Vec<u8>,
}

/// Sends a datagram to the guest.
pub(super) fn send(link: &mut Link, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> bool {
    if payload.len() > usize::from(u16::MAX) - UDP_HEADER_LEN {
        return false;
    }
    let caps = link.checksums_out();
    let repr = UdpRepr {
        src_port: from.port(),
        dst_port: to.port(),
    };
    let len = UDP_HEADER_LEN + payload.len();
    let (src, dst) = (from.ip(), to.ip());
    link.send_ip(src, dst, IpProtocol::Udp, len, |out| {
        let mut packet = UdpPacket::new_unchecked(out);
        let write = |out: &mut [u8]| out.copy_from_slice(payload);
        repr.emit(
            &mut packet,
            &src.into(),
            &dst.into(),
            payload.len(),
            write,
            &caps,
        );
    })
}

impl UdpTable {
    pub(super) fn new() -> UdpTable {
        UdpTable {
            flows: Slab::new(Kind::Udp),
            by_guest: HashMap::new(),
            buf: vec![0; usize::from(u16::MAX)],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A datagram from the guest to the outside.
    pub(super) fn transmit(
        &mut self,
        env: &mut Env,
        guest: SocketAddr,
        remote: SocketAddr,
        payload: &[u8],
    ) {
        let Some(to) = env.policy.outbound(remote, env.now) else {
            count(&env.shared.counters.denied);
            return;
        };
        let token = match self.by_guest.get(&guest) {
            Some(token) => *token,
            None => match self.open(env, guest) {
                Ok(token) => token,
                Err(e) => {
                    tracing::debug!("no socket for a UDP flow: {e}");
                    count(&env.shared.counters.limit_drops);
                    return;
                }
            },
        };
        let Some(flow) = self.flows.get_mut(token) else {
            return;
        };
        flow.used = env.now;
        let pair = (to.ip(), remote.ip());
        if flow.peers.first() != Some(&pair) {
            flow.peers.retain(|p| *p != pair);
            flow.peers.insert(0, pair);
            flow.peers.truncate(PEERS);
        }
        // A full socket buffer loses the datagram, as a full wire does.
        if flow.socket.send_to(payload, to).is_ok() {
            count(&env.shared.counters.udp_out);
        }
    }

    fn open(&mut self, env: &mut Env, guest: SocketAddr) -> std::io::Result<u64> {
        // LIMIT: `udp_flows`.
        if self.flows.len() >= env.config.udp_flows.max(1)
            && let Some((oldest, _)) = self.flows.iter().min_by_key(|(_, f)| f.used)
        {
            count(&env.shared.counters.limit_drops);
            self.remove(oldest);
        }
        let any: IpAddr = if guest.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        let token = self.flows.insert(UdpFlow {
            guest,
            socket,
            peers: Vec::new(),
            used: env.now,
        });
        self.by_guest.insert(guest, token);
        if let Some(flow) = self.flows.get(token)
            && let Err(e) = env.poller.add(&flow.socket, token)
        {
            self.remove(token);
            return Err(e);
        }
        Ok(token)
    }

    fn remove(&mut self, token: u64) {
        if let Some(flow) = self.flows.remove(token) {
            self.by_guest.remove(&flow.guest);
        }
    }

    /// Datagrams have come from the outside.
    pub(super) fn host_event(&mut self, env: &mut Env, token: u64) {
        let Some(flow) = self.flows.get_mut(token) else {
            return;
        };
        for _ in 0..BURST {
            let (len, from) = match flow.socket.recv_from(&mut self.buf) {
                Ok(got) => got,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                // An ICMP error for something sent before; more datagrams may follow.
                Err(_) => continue,
            };
            let Some((_, seen)) = flow.peers.iter().find(|(host, _)| *host == from.ip()) else {
                count(&env.shared.counters.denied);
                continue;
            };
            let from = SocketAddr::new(*seen, from.port());
            flow.used = env.now;
            if send(&mut env.link, from, flow.guest, &self.buf[..len]) {
                count(&env.shared.counters.udp_in);
            }
        }
        env.again.push(token);
    }

    /// Closes what has been silent. Called every few seconds.
    pub(super) fn sweep(&mut self, now: Instant) {
        let old: Vec<u64> = self
            .flows
            .iter()
            .filter(|(_, f)| now.duration_since(f.used) > IDLE)
            .map(|(t, _)| t)
            .collect();
        for token in old {
            self.remove(token);
        }
    }
}
