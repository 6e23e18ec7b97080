//! ARP: RFC 826. Answers for the router and the DNS forwarder only.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol};

use super::link::Link;

/// A packet from the guest. False if it is malformed.
pub(super) fn receive(link: &mut Link, payload: &[u8]) -> bool {
    let Ok(packet) = ArpPacket::new_checked(payload) else {
        return false;
    };
    let Ok(ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = ArpRepr::parse(&packet)
    else {
        return false;
    };
    if !source_hardware_addr.is_unicast() {
        return false;
    }
    link.learn(IpAddr::V4(source_protocol_addr), source_hardware_addr);
    if operation == ArpOperation::Request && link.is_ours(IpAddr::V4(target_protocol_addr)) {
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: link.router_mac(),
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        send(link, source_hardware_addr, reply);
    }
    true
}

/// Asks the link who has `ip`.
pub(super) fn ask(link: &mut Link, ip: Ipv4Addr) {
    let question = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: link.router_mac(),
        source_protocol_addr: link.config().router_v4,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: ip,
    };
    send(link, EthernetAddress::BROADCAST, question);
}

fn send(link: &mut Link, to: EthernetAddress, repr: ArpRepr) {
    link.send_frame(to, EthernetProtocol::Arp, repr.buffer_len(), |out| {
        repr.emit(&mut ArpPacket::new_unchecked(out));
    });
}
