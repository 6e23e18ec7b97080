//! ICMP and ICMPv6: echo, and errors about what the guest has sent.
//!
//! Echoes to the router are answered here. Echoes beyond it need a ping socket of the host, which
//! the host permits to the groups in `net.ipv4.ping_group_range`; without one the guest is told
//! that the destination is unreachable.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use smoltcp::wire::{
    EthernetAddress, Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable,
    Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Repr, Ipv6Repr,
};

use super::Env;
use super::counters::count;
use super::link::{HOP_LIMIT, Link};
use super::ndp;
use super::slab::{Kind, Slab};
use super::sys;

/// LIMIT: ping sockets at a time; the oldest makes room.
const PINGS: usize = 64;
/// How long a ping socket waits for answers.
const PING_IDLE: Duration = Duration::from_secs(30);
/// LIMIT: answers handled per event.
const BURST: usize = 64;
/// Echo header: type, code, checksum, identifier, sequence number.
const ECHO_HEADER_LEN: usize = 8;

/// What an ICMP error quotes: the packet that caused it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quote {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: IpProtocol,
    pub(super) payload_len: usize,
    /// The first bytes after the IP header, which name the flow.
    pub(super) head: [u8; 8],
}

/// Why a packet did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Host,
    Prohibited,
}

/// Sends a destination-unreachable message to the guest.
pub(super) fn unreachable(link: &mut Link, quote: &Quote, reason: Reason) {
    let (from, to) = (IpAddr::V4(link.config().router_v4), quote.src);
    let caps = link.checksums_out();
    match (quote.src, quote.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let repr = Icmpv4Repr::DstUnreachable {
                reason: match reason {
                    Reason::Host => Icmpv4DstUnreachable::HostUnreachable,
                    Reason::Prohibited => Icmpv4DstUnreachable::HostProhibited,
                },
                header: Ipv4Repr {
                    src_addr: src,
                    dst_addr: dst,
                    next_header: quote.protocol,
                    payload_len: quote.payload_len.min(60_000),
                    hop_limit: HOP_LIMIT,
                },
                data: &quote.head,
            };
            link.send_ip(from, to, IpProtocol::Icmp, repr.buffer_len(), |out| {
                repr.emit(&mut Icmpv4Packet::new_unchecked(out), &caps);
            });
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let from = link.config().router_v6;
            let repr = Icmpv6Repr::DstUnreachable {
                reason: match reason {
                    Reason::Host => Icmpv6DstUnreachable::AddrUnreachable,
                    Reason::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
                },
                header: Ipv6Repr {
                    src_addr: src,
                    dst_addr: dst,
                    next_header: quote.protocol,
                    payload_len: quote.payload_len.min(60_000),
                    hop_limit: HOP_LIMIT,
                },
                data: &quote.head,
            };
            send_v6(link, from, src, &repr);
        }
        _ => {}
    }
}

fn send_v6(link: &mut Link, src: Ipv6Addr, dst: Ipv6Addr, repr: &Icmpv6Repr<'_>) {
    let caps = link.checksums_out();
    let len = repr.buffer_len();
    link.send_ip(
        IpAddr::V6(src),
        IpAddr::V6(dst),
        IpProtocol::Icmpv6,
        len,
        |out| {
            repr.emit(&src, &dst, &mut Icmpv6Packet::new_unchecked(out), &caps);
        },
    );
}

fn send_v4(link: &mut Link, src: Ipv4Addr, dst: Ipv4Addr, repr: &Icmpv4Repr<'_>) {
    let caps = link.checksums_out();
    link.send_ip(
        IpAddr::V4(src),
        IpAddr::V4(dst),
        IpProtocol::Icmp,
        repr.buffer_len(),
        |out| {
            repr.emit(&mut Icmpv4Packet::new_unchecked(out), &caps);
        },
    );
}

/// One stream of echo requests.
struct Ping {
    guest: IpAddr,
    ident: u16,
    target: IpAddr,
    socket: UdpSocket,
    used: Instant,
}

/// Echo requests that are under way through the host.
pub(super) struct Pings {
    slab: Slab<Ping>,
    /// It was said that the host permits no pings.
    told: bool,
}

impl Pings {
    pub(super) fn new() -> Pings {
        Pings {
            slab: Slab::new(Kind::Ping),
            told: false,
        }
    }

    /// An ICMP packet from the guest. False if it is malformed.
    pub(super) fn receive_v4(
        &mut self,
        env: &mut Env,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        payload: &[u8],
    ) -> bool {
        let Ok(packet) = Icmpv4Packet::new_checked(payload) else {
            return false;
        };
        if !packet.verify_checksum() {
            return false;
        }
        let caps = env.link.checksums_in();
        match Icmpv4Repr::parse(&packet, &caps) {
            Ok(Icmpv4Repr::EchoRequest {
                ident,
                seq_no,
                data,
            }) => {
                if env.link.is_ours(IpAddr::V4(dst)) {
                    let reply = Icmpv4Repr::EchoReply {
                        ident,
                        seq_no,
                        data,
                    };
                    send_v4(&mut env.link, dst, src, &reply);
                } else {
                    let (guest, target) = (IpAddr::V4(src), IpAddr::V4(dst));
                    self.forward(env, guest, target, ident, IpProtocol::Icmp, payload);
                }
            }
            // Errors and answers from the guest concern nothing that is kept here.
            _ => count(&env.shared.counters.unsupported),
        }
        true
    }

    /// An ICMPv6 packet from the guest. False if it is malformed.
    pub(super) fn receive_v6(
        &mut self,
        env: &mut Env,
        mac: EthernetAddress,
        header: &Ipv6Repr,
        payload: &[u8],
    ) -> bool {
        let (src, dst) = (header.src_addr, header.dst_addr);
        let Ok(packet) = Icmpv6Packet::new_checked(payload) else {
            return false;
        };
        if !packet.verify_checksum(&src, &dst) {
            return false;
        }
        let caps = env.link.checksums_in();
        match Icmpv6Repr::parse(&src, &dst, &packet, &caps) {
            Ok(Icmpv6Repr::Ndisc(repr)) => {
                // RFC 4861 §6.1.1, §7.1.1: the hop limit MUST be 255.
                if header.hop_limit != ndp::HOP_LIMIT {
                    return false;
                }
                ndp::receive(&mut env.link, mac, src, &repr);
            }
            Ok(Icmpv6Repr::EchoRequest {
                ident,
                seq_no,
                data,
            }) => {
                if env.link.is_ours(IpAddr::V6(dst)) {
                    let reply = Icmpv6Repr::EchoReply {
                        ident,
                        seq_no,
                        data,
                    };
                    send_v6(&mut env.link, dst, src, &reply);
                } else if !dst.is_multicast() {
                    let (guest, target) = (IpAddr::V6(src), IpAddr::V6(dst));
                    self.forward(env, guest, target, ident, IpProtocol::Icmpv6, payload);
                }
            }
            _ => count(&env.shared.counters.unsupported),
        }
        true
    }

    fn forward(
        &mut self,
        env: &mut Env,
        guest: IpAddr,
        target: IpAddr,
        ident: u16,
        protocol: IpProtocol,
        payload: &[u8],
    ) {
        let mut head = [0; 8];
        head.copy_from_slice(&payload[..ECHO_HEADER_LEN]);
        let quote = Quote {
            src: guest,
            dst: target,
            protocol,
            payload_len: payload.len(),
            head,
        };
        // Any port: the policy is about addresses.
        let Some(to) = env.policy.outbound(SocketAddr::new(target, 1), env.now) else {
            count(&env.shared.counters.denied);
            return unreachable(&mut env.link, &quote, Reason::Prohibited);
        };
        let to = SocketAddr::new(to.ip(), 0);
        let known = self
            .slab
            .iter()
            .find(|(_, p)| p.guest == guest && p.ident == ident && p.target == target)
            .map(|(token, _)| token);
        let token = match known {
            Some(token) => token,
            None => match self.open(env, guest, target, ident) {
                Ok(token) => token,
                Err(e) => {
                    self.tell(&e);
                    return unreachable(&mut env.link, &quote, Reason::Prohibited);
                }
            },
        };
        let Some(ping) = self.slab.get_mut(token) else {
            return;
        };
        ping.used = env.now;
        if let Err(e) = ping.socket.send_to(payload, to)
            && e.kind() != std::io::ErrorKind::WouldBlock
        {
            unreachable(&mut env.link, &quote, Reason::Host);
        }
    }

    /// Says once why pings go nowhere: the guest's ping seldom shows what it is told.
    fn tell(&mut self, e: &std::io::Error) {
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                "the guest's pings to other hosts are refused: no ping socket ({e}); to allow them, \
                 as root: sysctl -w net.ipv4.ping_group_range=\"0 2147483647\""
            );
        }
    }

    fn open(
        &mut self,
        env: &mut Env,
        guest: IpAddr,
        target: IpAddr,
        ident: u16,
    ) -> std::io::Result<u64> {
        if self.slab.len() >= PINGS
            && let Some((oldest, _)) = self.slab.iter().min_by_key(|(_, p)| p.used)
        {
            self.slab.remove(oldest);
        }
        let socket = sys::ping_socket(target.is_ipv6())?;
        let ping = Ping {
            guest,
            ident,
            target,
            socket,
            used: env.now,
        };
        let token = self.slab.insert(ping);
        if let Some(ping) = self.slab.get(token) {
            env.poller.add(&ping.socket, token)?;
        }
        Ok(token)
    }

    /// Answers have come.
    pub(super) fn host_event(&mut self, env: &mut Env, token: u64) {
        let Some(ping) = self.slab.get_mut(token) else {
            return;
        };
        let mut buf = vec![0; usize::from(u16::MAX)];
        for _ in 0..BURST {
            let Ok((len, from)) = ping.socket.recv_from(&mut buf) else {
                return;
            };
            if env.policy.inbound(from.ip()) != env.policy.inbound(ping.target) {
                continue;
            }
            let Some(reply) = buf.get(..len).filter(|r| r.len() >= ECHO_HEADER_LEN) else {
                continue;
            };
            // The kernel has put its own identifier in place of the guest's.
            match (ping.target, ping.guest) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    let packet = Icmpv4Packet::new_unchecked(reply);
                    let (ident, seq_no, data) = (ping.ident, packet.echo_seq_no(), packet.data());
                    let repr = Icmpv4Repr::EchoReply {
                        ident,
                        seq_no,
                        data,
                    };
                    send_v4(&mut env.link, src, dst, &repr);
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let packet = Icmpv6Packet::new_unchecked(reply);
                    let (ident, seq_no) = (ping.ident, packet.echo_seq_no());
                    let repr = Icmpv6Repr::EchoReply {
                        ident,
                        seq_no,
                        data: packet.payload(),
                    };
                    send_v6(&mut env.link, src, dst, &repr);
                }
                _ => {}
            }
        }
        // More may be waiting, and the edge is gone.
        env.again.push(token);
    }

    /// Closes what has been silent. Called every few seconds.
    pub(super) fn sweep(&mut self, now: Instant) {
        let old: Vec<u64> = self
            .slab
            .iter()
            .filter(|(_, p)| now.duration_since(p.used) > PING_IDLE)
            .map(|(t, _)| t)
            .collect();
        for token in old {
            self.slab.remove(token);
        }
    }
}
