//! DHCP server: RFC 2131.
//!
//! Addresses follow from the order in which Ethernet addresses appear, the first one always
//! getting the configured guest address; nothing has to survive a restore, because a renewal of a
//! free address is granted.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr,
    EthernetAddress, IpProtocol, UDP_HEADER_LEN, UdpPacket, UdpRepr,
};

use super::link::{HOP_LIMIT, Link};

/// LIMIT: leases at a time; the guest may have several cards bridged or nested guests.
const LEASES: usize = 64;
/// The interface MTU option (RFC 2132 §5.1).
const OPTION_MTU: u8 = 26;
/// The domain name option (RFC 2132 §3.17).
const OPTION_DOMAIN: u8 = 15;
/// The message option of a refusal (RFC 2132 §9.9).
const OPTION_MESSAGE: u8 = 56;

/// Who has which address.
#[derive(Default)]
pub(super) struct Dhcp {
    /// Oldest first.
    leases: Vec<(EthernetAddress, Ipv4Addr)>,
}

impl Dhcp {
    /// A datagram to the server port. True if it was answered.
    pub(super) fn receive(&mut self, link: &mut Link, payload: &[u8]) -> bool {
        let Ok(packet) = DhcpPacket::new_checked(payload) else {
            return false;
        };
        let Ok(asked) = DhcpRepr::parse(&packet) else {
            return false;
        };
        let mac = asked.client_hardware_address;
        if !mac.is_unicast() {
            return false;
        }
        let server = link.config().router_v4;
        match asked.message_type {
            DhcpMessageType::Discover => {
                let Some(ip) = self.offer(link, mac, asked.requested_ip) else {
                    return false;
                };
                reply(link, &asked, DhcpMessageType::Offer, Some(ip));
            }
            DhcpMessageType::Request => {
                // RFC 2131 §4.3.2: the client chose another server.
                if asked.server_identifier.is_some_and(|s| s != server) {
                    self.leases.retain(|(m, _)| *m != mac);
                    return true;
                }
                let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
                if self.offer(link, mac, Some(wanted)) == Some(wanted) {
                    link.learn(IpAddr::V4(wanted), mac);
                    reply(link, &asked, DhcpMessageType::Ack, Some(wanted));
                } else {
                    reply(link, &asked, DhcpMessageType::Nak, None);
                }
            }
            DhcpMessageType::Inform => {
                link.learn(IpAddr::V4(asked.client_ip), mac);
                reply(link, &asked, DhcpMessageType::Ack, None);
            }
            DhcpMessageType::Release | DhcpMessageType::Decline => {
                self.leases.retain(|(m, _)| *m != mac);
                return true;
            }
            _ => return false,
        }
        true
    }

    /// The address for `mac`: what it has, else what it wants, else the first free one.
    fn offer(
        &mut self,
        link: &Link,
        mac: EthernetAddress,
        wanted: Option<Ipv4Addr>,
    ) -> Option<Ipv4Addr> {
        if let Some((_, ip)) = self.leases.iter().find(|(m, _)| *m == mac) {
            return Some(*ip);
        }
        let config = link.config();
        let usable = |ip: Ipv4Addr| {
            config.on_link_v4(ip)
                && ip != config.network_v4
                && ip != config.broadcast_v4()
                && !link.is_ours(IpAddr::V4(ip))
                && !self.leases.iter().any(|(_, taken)| *taken == ip)
        };
        let first = u32::from(config.guest_v4);
        let ip = wanted
            .filter(|ip| usable(*ip))
            .or_else(|| {
                (0..=LEASES as u32)
                    .filter_map(|n| first.checked_add(n).map(Ipv4Addr::from))
                    .find(|ip| usable(*ip))
            })
            .or_else(|| self.leases.first().map(|(_, ip)| *ip))?;
        self.leases.retain(|(_, taken)| *taken != ip);
        if self.leases.len() >= LEASES {
            self.leases.remove(0);
        }
        self.leases.push((mac, ip));
        Some(ip)
    }

    /// The leased addresses.
    pub(super) fn leases(&self) -> impl Iterator<Item = ([u8; 6], Ipv4Addr)> + '_ {
        self.leases.iter().map(|(m, ip)| (m.0, *ip))
    }
}

fn reply(link: &mut Link, asked: &DhcpRepr<'_>, kind: DhcpMessageType, ip: Option<Ipv4Addr>) {
    let config = link.config().clone();
    let granted = kind != DhcpMessageType::Nak;
    let mtu = config.mtu.to_be_bytes();
    let mut options = Vec::new();
    if granted {
        options.push(DhcpOption {
            kind: OPTION_MTU,
            data: &mtu,
        });
        if let Some(domain) = &config.domain {
            options.push(DhcpOption {
                kind: OPTION_DOMAIN,
                data: domain.as_bytes(),
            });
        }
    } else {
        options.push(DhcpOption {
            kind: OPTION_MESSAGE,
            data: b"address is not available",
        });
    }
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: if granted {
            asked.client_ip
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        your_ip: ip.unwrap_or(Ipv4Addr::UNSPECIFIED),
        server_ip: config.router_v4,
        router: granted.then_some(config.router_v4),
        subnet_mask: granted.then(|| config.netmask_v4()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(config.router_v4),
        parameter_request_list: None,
        dns_servers: granted.then(|| [config.dns_v4].into_iter().collect()),
        max_size: None,
        // RFC 2131 §4.3.5: an answer to DHCPINFORM has no lease time.
        lease_duration: ip.map(|_| config.lease_s),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    // RFC 2131 §4.1: to the client's own address if it has one, else to its hardware address,
    // else (flag set, or refused) to everybody.
    let (mac, dst) = if !granted || (asked.broadcast && asked.client_ip.is_unspecified()) {
        (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST)
    } else if !asked.client_ip.is_unspecified() {
        (asked.client_hardware_address, asked.client_ip)
    } else {
        (
            asked.client_hardware_address,
            ip.unwrap_or(Ipv4Addr::BROADCAST),
        )
    };
    let udp = UdpRepr {
        src_port: DHCP_SERVER_PORT,
        dst_port: DHCP_CLIENT_PORT,
    };
    let body = repr.buffer_len();
    let caps = link.checksums_out();
    let (src, dst) = (IpAddr::V4(config.router_v4), IpAddr::V4(dst));
    let len = UDP_HEADER_LEN + body;
    link.send_ip_to(mac, src, dst, IpProtocol::Udp, len, HOP_LIMIT, |out| {
        let mut packet = UdpPacket::new_unchecked(out);
        let write = |out: &mut [u8]| {
            if repr.emit(&mut DhcpPacket::new_unchecked(out)).is_err() {
                tracing::debug!("a DHCP answer did not fit its buffer");
            }
        };
        udp.emit(&mut packet, &src.into(), &dst.into(), body, write, &caps);
    });
}
