//! The guest's side of the cable: who is there, and frames to it.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use smoltcp::phy::{Checksum, ChecksumCapabilities};
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr,
};

use super::Shared;
use super::config::UsernetConfig;
use super::counters::{count, count_by};
use super::{arp, ndp};
use crate::offload::{Checksum as Unfilled, Segment};
use crate::{FrameSink, Offload, Offloads};

/// LIMIT: frames kept for a guest without buffers. Of TCP data, one frame at most waits here.
const PENDING_FRAMES: usize = 256;
/// LIMIT: addresses of the guest that are remembered.
const NEIGHBORS: usize = 64;
/// Least time between two questions for the same address.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Hop limit of packets that come from beyond the router.
pub(super) const HOP_LIMIT: u8 = 64;

/// Frames to the guest.
pub(super) struct Link {
    shared: Arc<Shared>,
    sink: Option<Arc<dyn FrameSink>>,
    config: Arc<UsernetConfig>,
    /// The offloads in force; read once per turn of the worker.
    pub(super) offloads: Offloads,
    /// The frame being built; its allocation is reused.
    frame: Vec<u8>,
    /// What is left out of it.
    offload: Offload,
    pending: VecDeque<(Vec<u8>, Offload)>,
    /// The frame from the guest that is being handled has no checksum of TCP or UDP.
    pub(super) unchecked: bool,
    /// Most recently seen first.
    neighbors: Vec<(IpAddr, EthernetAddress)>,
    asked: Vec<(IpAddr, Instant)>,
    /// Set when an address became known that was asked for.
    pub(super) learned: bool,
    paused: bool,
    ident: u16,
    pub(super) now: Instant,
}

impl Link {
    pub(super) fn new(shared: Arc<Shared>, config: Arc<UsernetConfig>) -> Link {
        Link {
            shared,
            sink: None,
            config,
            offloads: Offloads::default(),
            frame: Vec::new(),
            offload: Offload::NONE,
            unchecked: false,
            pending: VecDeque::new(),
            neighbors: Vec::new(),
            asked: Vec::new(),
            learned: false,
            paused: false,
            ident: 0,
            now: Instant::now(),
        }
    }

    /// Takes over what other threads have set since the last turn.
    pub(super) fn begin_turn(&mut self, now: Instant) {
        self.now = now;
        self.paused = self.shared.paused.load(Ordering::Acquire);
        if self.sink.is_none() {
            self.sink = self.shared.sink.get().cloned();
        }
        self.offloads = *self
            .shared
            .offloads
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        self.drain_pending();
    }

    fn drain_pending(&mut self) {
        let Some(sink) = self.sink.as_ref().filter(|_| !self.paused) else {
            return;
        };
        while !self.pending.is_empty() && sink.ready() {
            let Some((frame, offload)) = self.pending.pop_front() else {
                break;
            };
            if !sink.receive_offloaded(&frame, &offload) {
                self.pending.push_front((frame, offload));
                break;
            }
            count(&self.shared.counters.frames_to_guest);
            count_by(&self.shared.counters.bytes_to_guest, frame.len());
        }
    }

    /// True if a frame sent now goes to the guest at once.
    pub(super) fn ready(&self) -> bool {
        !self.paused && self.pending.is_empty() && self.sink.as_ref().is_some_and(|s| s.ready())
    }

    /// Hands over the frame that was built; keeps a bounded number for later.
    fn deliver(&mut self) -> bool {
        let offload = std::mem::take(&mut self.offload);
        if self.ready()
            && let Some(sink) = &self.sink
            && sink.receive_offloaded(&self.frame, &offload)
        {
            count(&self.shared.counters.frames_to_guest);
            count_by(&self.shared.counters.bytes_to_guest, self.frame.len());
            return true;
        }
        // A card that is ready may still have no room for a long frame: it is the last one until
        // there is.
        if self.sink.is_some() && self.pending.len() < PENDING_FRAMES {
            self.pending.push_back((self.frame.clone(), offload));
            return true;
        }
        count(&self.shared.counters.guest_drops);
        false
    }

    /// Checksums to verify in what the guest sends.
    pub(super) fn checksums_in(&self) -> ChecksumCapabilities {
        let mut caps = ChecksumCapabilities::default();
        if self.unchecked {
            caps.tcp = Checksum::None;
            caps.udp = Checksum::None;
        }
        caps
    }

    /// Checksums to fill in for the guest, but those of TCP.
    pub(super) fn checksums_out(&self) -> ChecksumCapabilities {
        ChecksumCapabilities::default()
    }

    /// Longest IP packet with TCP for the guest, if it is larger than the MTU.
    pub(super) fn large_segment(&self, v4: bool) -> usize {
        let o = &self.offloads;
        match (o.to_guest_unchecked, v4) {
            (false, _) => 0,
            (true, true) => o.to_guest_segment_bytes as usize,
            (true, false) => o.to_guest_segment_bytes_v6 as usize,
        }
    }

    /// Leaves the TCP checksum of the next segment out if the guest wants it so; a segment of
    /// `len` bytes with more than `segment_bytes` of payload is to be seen as several of those.
    /// True if the pseudo-header's sum goes in place of the checksum.
    pub(super) fn leave_out(
        &mut self,
        v4: bool,
        payload_bytes: usize,
        segment_bytes: usize,
    ) -> bool {
        if !self.offloads.to_guest_unchecked {
            return false;
        }
        let ip = if v4 { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN };
        self.offload = Offload {
            checksum: Some(Unfilled {
                start: (ETHERNET_HEADER_LEN + ip) as u16,
                offset: 16,
            }),
            segment: (payload_bytes > segment_bytes).then_some(Segment {
                payload_bytes: segment_bytes.min(usize::from(u16::MAX)) as u16,
            }),
        };
        true
    }

    /// Remembers that `ip` is at `mac`.
    pub(super) fn learn(&mut self, ip: IpAddr, mac: EthernetAddress) {
        if let Some((known, at)) = self.neighbors.first()
            && *known == ip
            && *at == mac
        {
            return;
        }
        if !mac.is_unicast() || ip.is_unspecified() || ip.is_multicast() || self.is_ours(ip) {
            return;
        }
        let on_link = match ip {
            IpAddr::V4(a) => self.config.on_link_v4(a),
            IpAddr::V6(a) => self.config.on_link_v6(a) || a.is_unicast_link_local(),
        };
        if !on_link {
            return;
        }
        self.neighbors.retain(|(a, _)| *a != ip);
        self.neighbors.insert(0, (ip, mac));
        self.neighbors.truncate(NEIGHBORS);
        let before = self.asked.len();
        self.asked.retain(|(a, _)| *a != ip);
        self.learned |= self.asked.len() != before;
    }

    /// True for the addresses of the router and its DNS forwarder.
    pub(super) fn is_ours(&self, ip: IpAddr) -> bool {
        let c = &self.config;
        match ip {
            IpAddr::V4(a) => a == c.router_v4 || a == c.dns_v4,
            IpAddr::V6(a) => {
                c.ipv6 && (a == c.router_v6 || a == c.dns_v6 || a == c.router_link_local())
            }
        }
    }

    /// Where `ip` is, asking the link if it is not known.
    fn resolve(&mut self, ip: IpAddr) -> Option<EthernetAddress> {
        match ip {
            IpAddr::V4(a) if a.is_broadcast() || a == self.config.broadcast_v4() => {
                return Some(EthernetAddress::BROADCAST);
            }
            IpAddr::V6(a) if a.is_multicast() => {
                let o = a.octets();
                return Some(EthernetAddress([0x33, 0x33, o[12], o[13], o[14], o[15]]));
            }
            _ => {}
        }
        if let Some((_, mac)) = self.neighbors.iter().find(|(a, _)| *a == ip) {
            return Some(*mac);
        }
        let now = self.now;
        match self.asked.iter().position(|(a, _)| *a == ip) {
            Some(n) if now.duration_since(self.asked[n].1) < ASK_AGAIN => return None,
            Some(n) => self.asked[n].1 = now,
            None => {
                if self.asked.len() >= NEIGHBORS {
                    self.asked.remove(0);
                }
                self.asked.push((ip, now));
            }
        }
        match ip {
            IpAddr::V4(a) => arp::ask(self, a),
            IpAddr::V6(a) => ndp::ask(self, a),
        }
        None
    }

    pub(super) fn config(&self) -> &Arc<UsernetConfig> {
        &self.config
    }

    pub(super) fn router_mac(&self) -> EthernetAddress {
        EthernetAddress(self.config.router_mac)
    }

    /// Sends one Ethernet frame whose payload `fill` writes.
    pub(super) fn send_frame(
        &mut self,
        to: EthernetAddress,
        ethertype: EthernetProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        self.frame.clear();
        self.frame.resize(ETHERNET_HEADER_LEN + len, 0);
        let header = EthernetRepr {
            src_addr: self.router_mac(),
            dst_addr: to,
            ethertype,
        };
        let mut frame = EthernetFrame::new_unchecked(&mut self.frame[..]);
        header.emit(&mut frame);
        fill(frame.payload_mut());
        self.deliver()
    }

    /// Sends an IP packet to the guest; `fill` writes its payload. Longer IPv4 packets than the
    /// MTU go out as fragments, except TCP, whose segments are made to fit what the guest takes.
    pub(super) fn send_ip(
        &mut self,
        src: IpAddr,
        dst: IpAddr,
        protocol: IpProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        // Asking for the address sends frames of its own.
        let offload = std::mem::take(&mut self.offload);
        let Some(mac) = self.resolve(dst) else {
            count(&self.shared.counters.guest_drops);
            return false;
        };
        self.offload = offload;
        self.send_ip_to(mac, src, dst, protocol, len, HOP_LIMIT, fill)
    }

    /// [`Link::send_ip`] to a known Ethernet address.
    #[allow(clippy::too_many_arguments, reason = "the fields of the two headers")]
    pub(super) fn send_ip_to(
        &mut self,
        mac: EthernetAddress,
        src: IpAddr,
        dst: IpAddr,
        protocol: IpProtocol,
        len: usize,
        hop_limit: u8,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        let mtu = usize::from(self.config.mtu);
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                if len > usize::from(u16::MAX) - IPV4_HEADER_LEN {
                    return self.drop_for_guest();
                }
                if len + IPV4_HEADER_LEN > mtu && protocol != IpProtocol::Tcp {
                    return self.send_fragments(mac, src, dst, protocol, len, fill);
                }
                let ip = Ipv4Repr {
                    src_addr: src,
                    dst_addr: dst,
                    next_header: protocol,
                    payload_len: len,
                    hop_limit,
                };
                self.send_frame(mac, EthernetProtocol::Ipv4, IPV4_HEADER_LEN + len, |out| {
                    let mut packet = Ipv4Packet::new_unchecked(out);
                    ip.emit(&mut packet, &ChecksumCapabilities::default());
                    fill(packet.payload_mut());
                })
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let fits = len + IPV6_HEADER_LEN <= mtu;
                if len > usize::from(u16::MAX) || (!fits && protocol != IpProtocol::Tcp) {
                    return self.drop_for_guest();
                }
                let ip = Ipv6Repr {
                    src_addr: src,
                    dst_addr: dst,
                    next_header: protocol,
                    payload_len: len,
                    hop_limit,
                };
                self.send_frame(mac, EthernetProtocol::Ipv6, IPV6_HEADER_LEN + len, |out| {
                    let mut packet = Ipv6Packet::new_unchecked(out);
                    ip.emit(&mut packet);
                    fill(packet.payload_mut());
                })
            }
            _ => self.drop_for_guest(),
        }
    }

    fn drop_for_guest(&mut self) -> bool {
        self.offload = Offload::NONE;
        count(&self.shared.counters.guest_drops);
        false
    }

    fn send_fragments(
        &mut self,
        mac: EthernetAddress,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        protocol: IpProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        let mut payload = vec![0; len];
        fill(&mut payload);
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        // RFC 791: offsets count units of eight bytes.
        let step = (usize::from(self.config.mtu) - IPV4_HEADER_LEN) & !7;
        for (n, part) in payload.chunks(step).enumerate() {
            let offset = n * step;
            let ip = Ipv4Repr {
                src_addr: src,
                dst_addr: dst,
                next_header: protocol,
                payload_len: part.len(),
                hop_limit: HOP_LIMIT,
            };
            let total = IPV4_HEADER_LEN + part.len();
            let sent = self.send_frame(mac, EthernetProtocol::Ipv4, total, |out| {
                let mut packet = Ipv4Packet::new_unchecked(out);
                ip.emit(&mut packet, &ChecksumCapabilities::ignored());
                packet.set_ident(ident);
                packet.set_dont_frag(false);
                packet.set_more_frags(offset + part.len() < len);
                packet.set_frag_offset(offset as u16);
                packet.fill_checksum();
                packet.payload_mut().copy_from_slice(part);
            });
            if !sent {
                return false;
            }
        }
        true
    }
}
