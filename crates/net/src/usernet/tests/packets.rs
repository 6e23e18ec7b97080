//! Everything that is not a stream, and hostile input.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, dns, icmp, udp};
use smoltcp::wire::{
    DnsQueryType, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4DstUnreachable,
    Icmpv4Message, Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol,
    Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, NdiscRepr, TcpControl, TcpPacket, TcpRepr,
    TcpSeqNumber, UdpPacket, UdpRepr,
};

use super::guest::{GUEST_MAC, Guest, PATIENCE, open_config};
use crate::usernet::{Usernet, UsernetConfig, UsernetError, fuzz_one};

const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

fn udp_socket(guest: &mut Guest, port: u16) -> SocketHandle {
    let ring = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 65_536]);
    let handle = guest.sockets.add(udp::Socket::new(ring(), ring()));
    guest
        .sockets
        .get_mut::<udp::Socket<'_>>(handle)
        .bind(port)
        .unwrap();
    handle
}

#[test]
fn dhcp_leases_the_configured_address() {
    let mut guest = Guest::bare(UsernetConfig::default());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    guest.until("lease", |g| {
        if let Some(dhcpv4::Event::Configured(c)) =
            g.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
        {
            lease = Some((
                c.address.address(),
                c.address.prefix_len(),
                c.router,
                c.dns_servers,
            ));
        }
        lease.is_some()
    });
    let (address, prefix, router, dns) = lease.unwrap();
    assert_eq!((address, prefix, router), (GUEST, 24, Some(ROUTER)));
    assert_eq!(dns[..], [Ipv4Addr::new(10, 0, 2, 3)]);
    guest.until("published", |g| {
        g.net.inspect().leases == [(GUEST_MAC, GUEST)]
    });
}

#[test]
fn icmp_echo_is_answered_by_the_router() {
    let mut guest = Guest::new(UsernetConfig::default());
    let ring = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let handle = guest.sockets.add(icmp::Socket::new(ring(), ring()));
    let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let caps = ChecksumCapabilities::default();
    let ask = Icmpv4Repr::EchoRequest {
        ident: 77,
        seq_no: 5,
        data: b"are you there",
    };
    let out = socket.send(ask.buffer_len(), ROUTER.into()).unwrap();
    ask.emit(&mut Icmpv4Packet::new_unchecked(out), &caps);
    guest.until("echo", |g| {
        let socket = g.sockets.get_mut::<icmp::Socket<'_>>(handle);
        let Ok((data, from)) = socket.recv() else {
            return false;
        };
        assert_eq!(from, IpAddress::from(ROUTER));
        let packet = Icmpv4Packet::new_checked(data).unwrap();
        let reply = Icmpv4Repr::parse(&packet, &caps).unwrap();
        let want = Icmpv4Repr::EchoReply {
            ident: 77,
            seq_no: 5,
            data: b"are you there",
        };
        assert_eq!(reply, want);
        true
    });
}

/// A name server that knows one name, for `queries` queries.
fn fake_dns(queries: usize) -> (SocketAddr, std::thread::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let address = socket.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        for _ in 0..queries {
            let mut buf = [0; 512];
            let (len, from) = socket.recv_from(&mut buf).unwrap();
            let mut reply = buf[..len].to_vec();
            reply[2] |= 0x80;
            reply[3] = 0x80;
            reply[7] = 1;
            reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            socket.send_to(&reply, from).unwrap();
        }
    });
    (address, thread)
}

fn resolve(guest: &mut Guest, name: &str, kind: DnsQueryType) -> Option<Vec<IpAddress>> {
    let server = [IpAddress::v4(10, 0, 2, 3)];
    let handle = guest.sockets.add(dns::Socket::new(&server, vec![]));
    let socket = guest.sockets.get_mut::<dns::Socket<'_>>(handle);
    let query = socket
        .start_query(guest.iface.context(), name, kind)
        .unwrap();
    let mut outcome = None;
    guest.until("name", |g| {
        let socket = g.sockets.get_mut::<dns::Socket<'_>>(handle);
        outcome = match socket.get_query_result(query) {
            Err(dns::GetQueryResultError::Pending) => return false,
            Ok(list) => Some(list.to_vec()),
            Err(dns::GetQueryResultError::Failed) => None,
        };
        true
    });
    outcome
}

#[test]
fn dns_asks_the_configured_server() {
    let (server, thread) = fake_dns(1);
    let config = UsernetConfig {
        dns_servers: Some(vec![server]),
        ..Default::default()
    };
    let mut guest = Guest::new(config);
    let found = resolve(&mut guest, "www.example.test", DnsQueryType::A);
    assert_eq!(found, Some(vec![IpAddress::v4(192, 0, 2, 7)]));
    thread.join().unwrap();
}

#[test]
fn dns_asks_the_next_server_if_one_is_not_there() {
    let gone = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (server, thread) = fake_dns(1);
    let config = UsernetConfig {
        dns_servers: Some(vec![gone, server]),
        ..Default::default()
    };
    let mut guest = Guest::new(config);
    let found = resolve(&mut guest, "www.example.test", DnsQueryType::A);
    assert_eq!(found, Some(vec![IpAddress::v4(192, 0, 2, 7)]));
    thread.join().unwrap();
}

#[test]
fn dns_without_servers_uses_the_hosts_own_resolver() {
    let config = UsernetConfig {
        dns_servers: Some(vec![]),
        ..Default::default()
    };
    let mut guest = Guest::new(config);
    // The one name that every host knows without a server.
    let found = resolve(&mut guest, "localhost", DnsQueryType::A);
    assert_eq!(found, Some(vec![IpAddress::v4(127, 0, 0, 1)]));
}

#[test]
fn dns_of_a_restricted_network_refuses() {
    let config = UsernetConfig {
        restrict: true,
        ..Default::default()
    };
    let mut guest = Guest::new(config);
    assert_eq!(
        resolve(&mut guest, "www.example.test", DnsQueryType::A),
        None
    );
    assert_eq!(guest.net.inspect().counters.dns_failures, 1);
}

#[test]
fn resolv_conf_is_understood() {
    let text = "# comment\nsearch example.test\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 \n\
                nameserver bogus\nnameserver\noptions ndots:2\nnameserver 192.0.2.3\n\
                nameserver 192.0.2.4\n";
    let list = super::super::dns::parse_resolv_conf(text);
    let want: Vec<SocketAddr> = ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.3:53"]
        .map(|a| a.parse().unwrap())
        .to_vec();
    assert_eq!(list, want);
}

#[test]
fn udp_echoes() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = server.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let mut buf = [0; 2048];
        let (len, from) = server.recv_from(&mut buf).unwrap();
        server.send_to(&buf[..len], from).unwrap();
        // Nobody has asked this one: it must not get in.
        let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
        stranger.send_to(b"unasked", from).unwrap();
    });
    let mut guest = Guest::new(open_config());
    let handle = udp_socket(&mut guest, 5000);
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket.send_slice(&[9; 1400], (ROUTER, port)).unwrap();
    guest.until("echo", |g| {
        let socket = g.sockets.get_mut::<udp::Socket<'_>>(handle);
        let Ok((data, from)) = socket.recv() else {
            return false;
        };
        assert_eq!(data, [9; 1400]);
        assert_eq!(from.endpoint, (ROUTER, port).into());
        true
    });
    thread.join().unwrap();
    guest.until("stranger", |g| g.net.inspect().counters.denied == 1);
    assert!(!guest.sockets.get_mut::<udp::Socket<'_>>(handle).can_recv());
}

/// An Ethernet frame with (part of) an IPv4 packet.
fn frame_v4(protocol: IpProtocol, payload: &[u8], fragment: Option<(u16, bool)>) -> Vec<u8> {
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: ROUTER,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut out = vec![0; 14 + ip.buffer_len() + payload.len()];
    let mut frame = EthernetFrame::new_unchecked(&mut out[..]);
    frame.set_src_addr(EthernetAddress(GUEST_MAC));
    frame.set_dst_addr(EthernetAddress(UsernetConfig::default().router_mac));
    frame.set_ethertype(EthernetProtocol::Ipv4);
    let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet, &ChecksumCapabilities::default());
    if let Some((offset, more)) = fragment {
        packet.set_ident(99);
        packet.set_dont_frag(false);
        packet.set_frag_offset(offset);
        packet.set_more_frags(more);
        packet.fill_checksum();
    }
    packet.payload_mut().copy_from_slice(payload);
    out
}

fn datagram(port: u16, body: &[u8]) -> Vec<u8> {
    let repr = UdpRepr {
        src_port: 5001,
        dst_port: port,
    };
    let mut out = vec![0; 8 + body.len()];
    repr.emit(
        &mut UdpPacket::new_unchecked(&mut out[..]),
        &GUEST.into(),
        &ROUTER.into(),
        body.len(),
        |b| b.copy_from_slice(body),
        &ChecksumCapabilities::default(),
    );
    out
}

#[test]
fn fragments_are_put_together_and_taken_apart() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let body: Vec<u8> = (0..4000_u32).map(|n| (n / 7) as u8).collect();
    let whole = datagram(server.local_addr().unwrap().port(), &body);
    let guest = Guest::new(open_config());
    // Out of order, the last one first.
    for (start, end) in [(2960, whole.len()), (0, 1480), (1480, 2960)] {
        let more = end != whole.len();
        let fragment = Some((start as u16, more));
        guest.send_raw(&frame_v4(IpProtocol::Udp, &whole[start..end], fragment));
    }
    let mut buf = [0; 8192];
    let (len, from) = server.recv_from(&mut buf).unwrap();
    assert!(buf[..len] == body);
    server.send_to(&body, from).unwrap();
    // The answer is longer than the MTU: three fragments, the offsets in order.
    let mut starts = Vec::new();
    let begin = std::time::Instant::now();
    while starts.len() < 3 && begin.elapsed() < PATIENCE {
        guest.card.wait(PATIENCE / 100);
        let Some(frame) = guest.card.take() else {
            continue;
        };
        assert!(frame.len() <= 1514);
        let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
        if frame.ethertype() != EthernetProtocol::Ipv4 {
            continue;
        }
        let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
        assert!(packet.verify_checksum());
        starts.push((
            packet.frag_offset(),
            packet.more_frags(),
            packet.payload().len(),
        ));
    }
    assert_eq!(
        starts,
        [(0, true, 1480), (1480, true, 1480), (2960, false, 1048)]
    );
}

#[test]
fn overlapping_fragments_are_dropped() {
    let mut guest = Guest::new(open_config());
    let bytes = datagram(9, &[0; 3000]);
    guest.send_raw(&frame_v4(IpProtocol::Udp, &bytes[..1480], Some((0, true))));
    guest.send_raw(&frame_v4(
        IpProtocol::Udp,
        &bytes[800..1600],
        Some((800, true)),
    ));
    guest.until("drop", |g| g.net.inspect().counters.fragment_drops == 1);
}

#[test]
fn many_begun_datagrams_stay_bounded() {
    let mut guest = Guest::new(open_config());
    for port in 0..500_u16 {
        let mut frame = frame_v4(IpProtocol::Udp, &datagram(port, &[0; 8]), Some((0, true)));
        let mut frame = EthernetFrame::new_unchecked(&mut frame[..]);
        let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
        packet.set_ident(port);
        packet.fill_checksum();
        guest.send_raw(frame.into_inner());
    }
    guest.until("all", |g| {
        let c = g.net.inspect().counters;
        c.frames_from_guest + c.queue_drops >= 500
    });
    assert_eq!(guest.net.inspect().counters.malformed, 0);
}

#[test]
fn wrong_checksums_are_counted() {
    let mut guest = Guest::new(open_config());
    let mut frame = frame_v4(IpProtocol::Udp, &datagram(9, b"x"), None);
    let last = frame.len() - 1;
    frame[last] ^= 1;
    guest.send_raw(&frame);
    guest.until("malformed", |g| g.net.inspect().counters.malformed == 1);
}

#[test]
fn udp_flows_are_limited() {
    let config = UsernetConfig {
        udp_flows: 4,
        ..open_config()
    };
    let mut guest = Guest::new(config);
    for n in 0..20_u16 {
        let mut bytes = datagram(9, b"x");
        let mut packet = UdpPacket::new_unchecked(&mut bytes[..]);
        packet.set_src_port(6000 + n);
        packet.fill_checksum(&GUEST.into(), &ROUTER.into());
        guest.send_raw(&frame_v4(IpProtocol::Udp, &bytes, None));
    }
    guest.until("flows", |g| g.net.inspect().counters.limit_drops == 16);
    assert_eq!(guest.net.inspect().udp_flows, 4);
}

#[test]
fn router_solicitation_is_answered_with_prefix_and_dns() {
    let guest = Guest::bare(UsernetConfig::default());
    let src = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe12, 0x3456);
    let dst = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let ask = Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: None });
    let ip = Ipv6Repr {
        src_addr: src,
        dst_addr: dst,
        next_header: IpProtocol::Icmpv6,
        payload_len: ask.buffer_len(),
        hop_limit: 255,
    };
    let mut out = vec![0; 54 + ask.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(&mut out[..]);
    frame.set_src_addr(EthernetAddress(GUEST_MAC));
    frame.set_dst_addr(EthernetAddress([0x33, 0x33, 0, 0, 0, 2]));
    frame.set_ethertype(EthernetProtocol::Ipv6);
    let mut packet = Ipv6Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet);
    let caps = ChecksumCapabilities::default();
    ask.emit(
        &src,
        &dst,
        &mut Icmpv6Packet::new_unchecked(packet.payload_mut()),
        &caps,
    );
    guest.send_raw(&out);
    guest.card.wait(PATIENCE);
    let reply = guest.card.take().unwrap();
    let frame = EthernetFrame::new_checked(&reply[..]).unwrap();
    let packet = Ipv6Packet::new_checked(frame.payload()).unwrap();
    let ip = Ipv6Repr::parse(&packet).unwrap();
    assert_eq!((ip.next_header, ip.hop_limit), (IpProtocol::Icmpv6, 255));
    let config = UsernetConfig::default();
    assert!(packet.payload().ends_with(&config.dns_v6.octets()));
    let icmp = Icmpv6Packet::new_checked(packet.payload()).unwrap();
    let parsed = Icmpv6Repr::parse(&ip.src_addr, &ip.dst_addr, &icmp, &caps).unwrap();
    let Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
        mtu,
        prefix_info,
        lladdr,
        ..
    }) = parsed
    else {
        panic!("{parsed:?}");
    };
    assert_eq!(mtu, Some(1500));
    assert_eq!(prefix_info.unwrap().prefix, config.network_v6);
    assert_eq!(lladdr.unwrap().as_bytes(), config.router_mac);
}

#[test]
fn echo_that_the_policy_denies_is_unreachable() {
    let guest = Guest::new(UsernetConfig {
        restrict: true,
        ..UsernetConfig::default()
    });
    let caps = ChecksumCapabilities::default();
    let ask = Icmpv4Repr::EchoRequest {
        ident: 1,
        seq_no: 2,
        data: b"out there?",
    };
    let mut body = vec![0; ask.buffer_len()];
    ask.emit(&mut Icmpv4Packet::new_unchecked(&mut body[..]), &caps);
    let mut bytes = frame_v4(IpProtocol::Icmp, &body, None);
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes[14..]);
    packet.set_dst_addr(Ipv4Addr::new(192, 0, 2, 99));
    packet.fill_checksum();
    guest.send_raw(&bytes);
    guest.card.wait(PATIENCE);
    let reply = guest.card.take().unwrap();
    let packet = Ipv4Packet::new_checked(&reply[14..]).unwrap();
    let icmp = Icmpv4Packet::new_checked(packet.payload()).unwrap();
    assert!(icmp.verify_checksum());
    assert_eq!(icmp.msg_type(), Icmpv4Message::DstUnreachable);
    assert_eq!(
        icmp.msg_code(),
        u8::from(Icmpv4DstUnreachable::HostProhibited)
    );
    // RFC 792: the header and eight bytes of the packet that caused it.
    let quoted = Ipv4Packet::new_unchecked(icmp.data());
    assert_eq!(
        (quoted.src_addr(), quoted.dst_addr()),
        (GUEST, Ipv4Addr::new(192, 0, 2, 99))
    );
    assert_eq!(icmp.data()[20..], body[..8]);
}

#[test]
fn settings_that_contradict_are_refused() {
    let base = UsernetConfig::default;
    for config in [
        UsernetConfig {
            dns_v4: ROUTER,
            ..base()
        },
        UsernetConfig {
            guest_v4: Ipv4Addr::new(10, 0, 3, 15),
            ..base()
        },
        UsernetConfig {
            prefix_v4: 31,
            ..base()
        },
        UsernetConfig { mtu: 100, ..base() },
        UsernetConfig {
            network_v4: GUEST,
            ..base()
        },
    ] {
        assert!(matches!(Usernet::new(config), Err(UsernetError::Config(_))));
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let forward = format!("{}:80", taken.local_addr().unwrap().port())
        .parse()
        .unwrap();
    let config = UsernetConfig {
        forwards: vec![forward],
        ..base()
    };
    assert!(matches!(
        Usernet::new(config),
        Err(UsernetError::Listen { .. })
    ));
}

#[test]
fn hostile_frames_do_no_harm() {
    // Valid frames of every protocol, cut and with bits flipped.
    let mut seeds = vec![
        frame_v4(IpProtocol::Udp, &datagram(67, &[1; 300]), None),
        frame_v4(
            IpProtocol::Udp,
            &datagram(53, &[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12]),
            None,
        ),
        frame_v4(IpProtocol::Tcp, &[0x50; 40], None),
        frame_v4(IpProtocol::Icmp, &[8, 0, 0, 0, 1, 2, 3, 4, 5], None),
        frame_v4(IpProtocol::Udp, &[0; 64], Some((65_528, true))),
    ];
    let mut v6 = vec![0; 200];
    v6[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
    v6[6..12].copy_from_slice(&GUEST_MAC);
    v6[..6].copy_from_slice(&UsernetConfig::default().router_mac);
    (v6[19], v6[20], v6[21]) = (146, 58, 255);
    (v6[22], v6[54]) = (0xfe, 135);
    seeds.push(v6);
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..300 {
        let mut input = Vec::new();
        for _ in 0..1 + next() % 20 {
            let mut frame = seeds[next() as usize % seeds.len()].clone();
            for _ in 0..next() % 12 {
                let at = next() as usize % frame.len();
                frame[at] = next() as u8;
            }
            frame.truncate(
                frame.len() - (next() as usize % 64).min(frame.len()) * (next() as usize % 2),
            );
            if next() % 2 == 0 && frame.len() > 34 && frame[12..14] == [8, 0] {
                // Past the IP checksum, to where it is interesting.
                let mut packet = Ipv4Packet::new_unchecked(&mut frame[14..]);
                packet.set_version(4);
                packet.set_header_len(20);
                packet.fill_checksum();
            }
            input.extend_from_slice(&(frame.len() as u16).to_le_bytes());
            input.extend_from_slice(&frame);
        }
        fuzz_one(&input);
    }
}

/// A TCP segment from the guest's port 7000.
fn segment(repr: &TcpRepr<'_>) -> Vec<u8> {
    let mut out = vec![0; repr.buffer_len()];
    repr.emit(
        &mut TcpPacket::new_unchecked(&mut out[..]),
        &GUEST.into(),
        &ROUTER.into(),
        &ChecksumCapabilities::default(),
    );
    frame_v4(IpProtocol::Tcp, &out, None)
}

#[test]
fn hostile_segments_of_live_connections_do_no_harm() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::new(open_config());
    let mut random = 0x0bad_cafe_dead_beef_u64;
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut ours = 0;
    for round in 0..5000 {
        // Mostly near what the other side expects, which it tells in every answer.
        while let Some(frame) = guest.card.take() {
            if let Some(ack) = acknowledged(&frame) {
                ours = ack;
            }
        }
        let control = match next(8) {
            0 => TcpControl::Syn,
            1 => TcpControl::Fin,
            2 if next(16) == 0 => TcpControl::Rst,
            _ => TcpControl::Psh,
        };
        let body = [7; 1400];
        let near = next(6000) as i32 - 3000;
        let ack = (next(10) != 0).then(|| TcpSeqNumber(next(u64::from(u32::MAX)) as u32 as i32));
        let repr = TcpRepr {
            src_port: 7000,
            dst_port: port,
            control,
            seq_number: TcpSeqNumber(if next(3) == 0 {
                ours
            } else {
                ours.wrapping_add(near)
            }),
            ack_number: if round % 50 == 0 { None } else { ack },
            window_len: next(65_536) as u16,
            window_scale: (next(2) == 0).then(|| next(15) as u8),
            max_seg_size: (next(2) == 0).then(|| next(65_536) as u16),
            sack_permitted: next(2) == 0,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &body[..next(1400) as usize],
        };
        guest.send_raw(&segment(&repr));
    }
    guest.until("all taken", |g| {
        let c = g.net.inspect().counters;
        c.frames_from_guest + c.queue_drops >= 5000
    });
    assert!(guest.net.inspect().counters.tcp_out > 0);
    // It still works.
    let (target, thread) = fake_dns(1);
    let handle = udp_socket(&mut guest, 5005);
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket
        .send_slice(&[0; 12], (ROUTER, target.port()))
        .unwrap();
    guest.until("answer", |g| {
        g.sockets.get_mut::<udp::Socket<'_>>(handle).can_recv()
    });
    thread.join().unwrap();
}

/// The acknowledgement number of a TCP frame.
fn acknowledged(frame: &[u8]) -> Option<i32> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 || packet.next_header() != IpProtocol::Tcp {
        return None;
    }
    let tcp = TcpPacket::new_checked(packet.payload()).ok()?;
    tcp.ack().then(|| tcp.ack_number().0)
}
