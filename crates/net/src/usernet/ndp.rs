//! IPv6 neighbour discovery: RFC 4861, with the DNS option of RFC 8106.
//!
//! The router advertises one /64 for address autoconfiguration; there is no DHCPv6.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::time::Duration;
use smoltcp::wire::{
    EthernetAddress, Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscNeighborFlags,
    NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
};

use super::link::Link;

/// RFC 4861: packets with another hop limit came through a router and are not genuine.
pub(super) const HOP_LIMIT: u8 = 255;
/// The recursive DNS server option (RFC 8106 §5.1): type 25, three units of eight bytes.
const RDNSS: [u8; 4] = [25, 3, 0, 0];
/// How long a guest may use the router and the DNS server without another advertisement.
const LIFETIME_S: u32 = 9000;

/// A message from the guest.
pub(super) fn receive(link: &mut Link, from: EthernetAddress, src: Ipv6Addr, repr: &NdiscRepr<'_>) {
    match *repr {
        NdiscRepr::RouterSolicit { .. } => {
            link.learn(IpAddr::V6(src), from);
            advertise(link);
        }
        NdiscRepr::NeighborSolicit { target_addr, .. } => {
            link.learn(IpAddr::V6(src), from);
            if link.is_ours(IpAddr::V6(target_addr)) {
                answer(link, from, src, target_addr);
            }
        }
        NdiscRepr::NeighborAdvert { target_addr, .. } => {
            link.learn(IpAddr::V6(target_addr), from);
        }
        NdiscRepr::RouterAdvert { .. } | NdiscRepr::Redirect { .. } => {}
    }
}

fn answer(link: &mut Link, to: EthernetAddress, asker: Ipv6Addr, target: Ipv6Addr) {
    // RFC 4861 §7.2.4: duplicate address detection is answered to all nodes, unsolicited.
    let (dst, flags) = if asker.is_unspecified() {
        (
            all_nodes(),
            NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE,
        )
    } else {
        let all = NdiscNeighborFlags::ROUTER
            | NdiscNeighborFlags::SOLICITED
            | NdiscNeighborFlags::OVERRIDE;
        (asker, all)
    };
    let repr = NdiscRepr::NeighborAdvert {
        flags,
        target_addr: target,
        lladdr: Some(link.router_mac().into()),
    };
    send(link, to, target, dst, repr, &[]);
}

/// Asks the link who has `ip`.
pub(super) fn ask(link: &mut Link, ip: Ipv6Addr) {
    let repr = NdiscRepr::NeighborSolicit {
        target_addr: ip,
        lladdr: Some(link.router_mac().into()),
    };
    // RFC 4291 §2.7.1: the solicited-node group of an address is ff02::1:ff00:0 plus 24 bits.
    let o = ip.octets();
    let low = u16::from_be_bytes([o[14], o[15]]);
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(o[13]), low);
    let mac = EthernetAddress([0x33, 0x33, 0xff, o[13], o[14], o[15]]);
    let src = link.config().router_link_local();
    send(link, mac, src, group, repr, &[]);
}

fn all_nodes() -> Ipv6Addr {
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)
}

fn advertise(link: &mut Link) {
    let config = link.config().clone();
    let lifetime = Duration::from_secs(u64::from(LIFETIME_S));
    let repr = NdiscRepr::RouterAdvert {
        hop_limit: super::link::HOP_LIMIT,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: lifetime,
        reachable_time: Duration::ZERO,
        retrans_time: Duration::ZERO,
        lladdr: Some(link.router_mac().into()),
        mtu: Some(u32::from(config.mtu)),
        prefix_info: Some(NdiscPrefixInformation {
            prefix_len: 64,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: Duration::from_secs(86_400),
            preferred_lifetime: Duration::from_secs(14_400),
            prefix: config.network_v6,
        }),
    };
    let mut dns = [0; 24];
    dns[..4].copy_from_slice(&RDNSS);
    dns[4..8].copy_from_slice(&LIFETIME_S.to_be_bytes());
    dns[8..].copy_from_slice(&config.dns_v6.octets());
    let mac = EthernetAddress([0x33, 0x33, 0, 0, 0, 1]);
    send(
        link,
        mac,
        config.router_link_local(),
        all_nodes(),
        repr,
        &dns,
    );
}

fn send(
    link: &mut Link,
    mac: EthernetAddress,
    src: Ipv6Addr,
    dst: Ipv6Addr,
    repr: NdiscRepr<'_>,
    option: &[u8],
) {
    let repr = Icmpv6Repr::Ndisc(repr);
    let own = repr.buffer_len();
    let len = own + option.len();
    let caps = link.checksums_out();
    let (from, to) = (IpAddr::V6(src), IpAddr::V6(dst));
    link.send_ip_to(mac, from, to, IpProtocol::Icmpv6, len, HOP_LIMIT, |out| {
        let (head, tail) = out.split_at_mut(own);
        repr.emit(&src, &dst, &mut Icmpv6Packet::new_unchecked(head), &caps);
        tail.copy_from_slice(option);
        Icmpv6Packet::new_unchecked(out).fill_checksum(&src, &dst);
    });
}
