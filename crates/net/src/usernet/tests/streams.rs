//! TCP and port forwards.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use smoltcp::socket::{tcp, udp};

use super::guest::{Guest, PATIENCE, open_config};
use crate::NetBackend;
use crate::Offloads;
use crate::usernet::{Forward, UsernetConfig};

const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// A byte that depends on its place, not in step with any power of two.
fn pattern(at: usize) -> u8 {
    (at % 251) as u8 ^ (at / 65_521) as u8
}

fn serve(
    listener: TcpListener,
    f: impl FnOnce(TcpStream) + Send + 'static,
) -> (u16, JoinHandle<()>) {
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        f(stream);
    });
    (port, thread)
}

fn echo(mut stream: TcpStream) {
    let mut buf = vec![0; 100_000];
    loop {
        let n = stream.read(&mut buf).unwrap();
        if n == 0 {
            return;
        }
        stream.write_all(&buf[..n]).unwrap();
    }
}

/// Sends `total` patterned bytes through `handle` and expects them back.
fn echo_through(guest: &mut Guest, handle: smoltcp::iface::SocketHandle, total: usize) {
    let (mut sent, mut got) = (0, 0);
    guest.until("echo", |g| {
        let socket = g.tcp(handle);
        while sent < total && socket.can_send() {
            let n = socket
                .send(|buf| {
                    let n = buf.len().min(total - sent);
                    for (i, b) in buf[..n].iter_mut().enumerate() {
                        *b = pattern(sent + i);
                    }
                    (n, n)
                })
                .unwrap();
            sent += n;
            if n == 0 {
                break;
            }
        }
        while socket.can_recv() {
            got += socket
                .recv(|buf| {
                    for (i, b) in buf.iter().enumerate() {
                        assert_eq!(*b, pattern(got + i), "at {}", got + i);
                    }
                    (buf.len(), buf.len())
                })
                .unwrap();
        }
        got == total
    });
    guest.tcp(handle).close();
    guest.until("close", |g| !g.tcp(handle).is_active());
}

#[test]
fn tcp_out_echoes_8_mib() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), echo);
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_000);
    echo_through(&mut guest, handle, 8 << 20);
    server.join().unwrap();
    let status = guest.net.inspect();
    assert_eq!(status.counters.tcp_out, 1);
    assert_eq!(status.counters.malformed, 0);
}

#[test]
fn tcp_out_echoes_8_mib_with_losses() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), echo);
    let mut guest = Guest::new(open_config());
    // The guest's stack needs a second or more for each of its losses.
    guest.card.lose_to_guest.store(97, Ordering::Relaxed);
    guest.card.lose_from_guest.store(2003, Ordering::Relaxed);
    let handle = guest.connect((ROUTER, port), 40_001);
    echo_through(&mut guest, handle, 8 << 20);
    server.join().unwrap();
    assert!(guest.net.inspect().counters.tcp_retransmits > 0);
}

#[test]
fn tcp_out_with_large_segments_echoes() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), echo);
    let mut guest = Guest::new(open_config());
    guest.net.set_offloads(Offloads {
        to_guest_unchecked: true,
        to_guest_segment_bytes: 65_535,
        ..Offloads::default()
    });
    let handle = guest.connect((ROUTER, port), 40_002);
    echo_through(&mut guest, handle, 4 << 20);
    server.join().unwrap();
    let counters = guest.net.inspect().counters;
    // The way to the guest took far fewer frames than the way from it.
    assert!(
        counters.bytes_to_guest / counters.frames_to_guest > 1514,
        "{counters:?}"
    );
}

#[test]
fn tcp_v6_echoes() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        return;
    };
    let (port, server) = serve(listener, echo);
    let mut guest = Guest::new(open_config());
    let router = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
    let handle = guest.connect((router, port), 40_003);
    echo_through(&mut guest, handle, 1 << 20);
    server.join().unwrap();
}

#[test]
fn tcp_out_refused_is_reset() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_004);
    guest.until("reset", |g| g.tcp(handle).state() == tcp::State::Closed);
    assert_eq!(guest.net.inspect().counters.tcp_resets, 1);
    guest.until("gone", |g| g.net.inspect().tcp_connections == 0);
}

#[test]
fn tcp_to_the_dns_forwarder_reaches_the_server() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = listener.local_addr().unwrap();
    let (_, thread) = serve(listener, echo);
    let config = UsernetConfig {
        dns_servers: Some(vec![server]),
        ..Default::default()
    };
    let mut guest = Guest::new(config);
    let handle = guest.connect((Ipv4Addr::new(10, 0, 2, 3), 53), 40_010);
    echo_through(&mut guest, handle, 1000);
    thread.join().unwrap();
}

#[test]
fn tcp_segment_of_an_unknown_connection_is_reset() {
    // What a restored guest sends: the network knows nothing of its connections.
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), echo);
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_011);
    guest.until("connected", |g| g.tcp(handle).may_send());
    guest.replace_network(open_config());
    guest.tcp(handle).send_slice(b"still there?").unwrap();
    guest.until("reset", |g| g.tcp(handle).state() == tcp::State::Closed);
    server.join().unwrap();
}

#[test]
fn tcp_guest_ends_first_still_receives() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"question");
        stream.write_all(&vec![b'a'; 300_000]).unwrap();
    });
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_005);
    guest.until("connected", |g| g.tcp(handle).may_send());
    guest.tcp(handle).send_slice(b"question").unwrap();
    guest.tcp(handle).close();
    let mut got = 0;
    guest.until("answer", |g| {
        let socket = g.tcp(handle);
        while socket.can_recv() {
            got += socket.recv(|b| (b.len(), b.len())).unwrap();
        }
        got == 300_000 && !socket.may_recv()
    });
    server.join().unwrap();
}

#[test]
fn tcp_host_ends_first_still_receives() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), |mut stream| {
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 200_000);
    });
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_006);
    let mut got = Vec::new();
    guest.until("end of host", |g| {
        let socket = g.tcp(handle);
        while socket.can_recv() {
            socket
                .recv(|b| {
                    got.extend_from_slice(b);
                    (b.len(), ())
                })
                .unwrap();
        }
        got == b"hello" && socket.state() == tcp::State::CloseWait
    });
    let mut left = 200_000;
    guest.until("sent", |g| {
        let socket = g.tcp(handle);
        let n = socket.send_slice(&vec![1; left.min(10_000)]).unwrap();
        left -= n;
        left == 0
    });
    guest.tcp(handle).close();
    guest.until("closed", |g| g.tcp(handle).state() == tcp::State::Closed);
    server.join().unwrap();
}

#[test]
fn tcp_host_reset_reaches_the_guest() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), |stream| {
        super::super::sys::reset_on_close(&stream);
    });
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_007);
    guest.until("reset", |g| g.tcp(handle).state() == tcp::State::Closed);
    server.join().unwrap();
}

#[test]
fn tcp_slow_guest_stops_the_host() {
    let total = 6 << 20;
    let (port, server) = serve(
        TcpListener::bind("127.0.0.1:0").unwrap(),
        move |mut stream| {
            let all: Vec<u8> = (0..total).map(pattern).collect();
            stream.write_all(&all).unwrap();
        },
    );
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_008);
    // The guest does not read until its window is closed and has been probed.
    guest.until("probe", |g| {
        // The scaled window cannot tell of the last few bytes.
        let full = g.tcp(handle).recv_queue() > (256 << 10) - 64;
        full && g.net.inspect().tcp_buffer_bytes >= 1 << 20
    });
    assert!(guest.net.inspect().tcp_buffer_bytes <= 2 << 20);
    let mut got = 0;
    guest.until("all", |g| {
        let socket = g.tcp(handle);
        while socket.can_recv() {
            got += socket
                .recv(|buf| {
                    assert!(buf.iter().enumerate().all(|(i, b)| *b == pattern(got + i)));
                    (buf.len(), buf.len())
                })
                .unwrap();
        }
        got == total
    });
    server.join().unwrap();
}

#[test]
fn tcp_connections_are_limited() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = UsernetConfig {
        tcp_connections: 2,
        ..open_config()
    };
    let mut guest = Guest::new(config);
    let handles: Vec<_> = (0..3)
        .map(|n| guest.connect((ROUTER, port), 41_000 + n))
        .collect();
    guest.until("two of three", |g| {
        let states: Vec<_> = handles.iter().map(|h| g.tcp(*h).state()).collect();
        states
            .iter()
            .filter(|s| **s == tcp::State::Established)
            .count()
            == 2
            && states.contains(&tcp::State::Closed)
    });
    assert_eq!(guest.net.inspect().counters.limit_drops, 1);
}

#[test]
fn tcp_to_the_host_is_denied_by_default() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(UsernetConfig::default());
    for (n, to) in [
        ROUTER,
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(169, 254, 169, 254),
    ]
    .into_iter()
    .enumerate()
    {
        let handle = guest.connect((to, port), 42_000 + n as u16);
        guest.until("denied", |g| g.tcp(handle).state() == tcp::State::Closed);
        assert_eq!(guest.net.inspect().counters.denied, n as u64 + 1);
    }
}

#[test]
fn tcp_restricted_network_refuses_everything() {
    let config = UsernetConfig {
        restrict: true,
        ..open_config()
    };
    let mut guest = Guest::new(config);
    let handle = guest.connect((Ipv4Addr::new(192, 0, 2, 99), 80), 42_010);
    guest.until("denied", |g| g.tcp(handle).state() == tcp::State::Closed);
    assert_eq!(guest.net.inspect().counters.denied, 1);
}

#[test]
fn tcp_pause_stops_delivery() {
    let (port, server) = serve(TcpListener::bind("127.0.0.1:0").unwrap(), echo);
    let mut guest = Guest::new(open_config());
    let handle = guest.connect((ROUTER, port), 40_009);
    guest.until("connected", |g| g.tcp(handle).may_send());
    guest.net.pause(true);
    guest.tcp(handle).send_slice(b"x").unwrap();
    guest.net.pause(false);
    echo_end(&mut guest, handle);
    server.join().unwrap();
}

fn echo_end(guest: &mut Guest, handle: smoltcp::iface::SocketHandle) {
    guest.until("one byte", |g| g.tcp(handle).can_recv());
    guest.tcp(handle).close();
    guest.until("closed", |g| !g.tcp(handle).is_active());
}

#[test]
fn tcp_forward_leads_into_the_guest() {
    let config = UsernetConfig {
        forwards: vec!["0:80".parse().unwrap()],
        ..Default::default()
    };
    let mut guest = Guest::new(config);
    let forward = guest.net.forwards()[0];
    assert!(forward.listen.ip().is_loopback() && forward.listen.port() != 0);
    let handle = guest.tcp_socket(64 << 10);
    guest.tcp(handle).listen(80).unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(forward.listen).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET").unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"GET OK");
    });
    guest.until("request", |g| g.tcp(handle).recv_queue() == 3);
    assert_eq!(
        guest.tcp(handle).remote_endpoint().unwrap().addr,
        ROUTER.into()
    );
    guest.tcp(handle).send_slice(b"GET OK").unwrap();
    guest.tcp(handle).close();
    guest.until("closed", |g| !g.tcp(handle).is_active());
    client.join().unwrap();
    assert_eq!(guest.net.inspect().counters.tcp_in, 1);
}

#[test]
fn tcp_forward_to_a_closed_port_is_reset() {
    let mut guest = Guest::new(UsernetConfig::default());
    let forward = guest
        .net
        .add_forward("127.0.0.1:0:81/tcp".parse().unwrap())
        .unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(forward.listen).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read(&mut [0]).map(|n| n == 0).unwrap_or(true)
    });
    guest.until("reset", |_| client.is_finished());
    assert!(client.join().unwrap());
    assert!(guest.net.remove_forward(&forward));
    assert!(!guest.net.remove_forward(&forward));
}

#[test]
fn udp_forward_answers_go_back() {
    let mut guest = Guest::new(UsernetConfig::default());
    let forward = guest.net.add_forward("0:69/udp".parse().unwrap()).unwrap();
    let ring = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
    let handle = guest.sockets.add(udp::Socket::new(ring(), ring()));
    guest
        .sockets
        .get_mut::<udp::Socket<'_>>(handle)
        .bind(69)
        .unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    // Until the guest's address is known, datagrams are lost, as on any first contact.
    let mut tries = 0;
    guest.until("datagram", |g| {
        if tries % 20 == 0 {
            client.send_to(b"ping", forward.listen).unwrap();
        }
        tries += 1;
        let socket = g.sockets.get_mut::<udp::Socket<'_>>(handle);
        let Ok((data, from)) = socket.recv() else {
            return false;
        };
        assert_eq!((data, from.endpoint.addr), (&b"ping"[..], ROUTER.into()));
        socket.send_slice(b"pong", from.endpoint).unwrap();
        true
    });
    let mut buf = [0; 16];
    assert_eq!(client.recv_from(&mut buf).unwrap(), (4, forward.listen));
    assert_eq!(&buf[..4], b"pong");
}

#[test]
fn forward_text_round_trips() {
    for (text, shown) in [
        ("8080:80", "127.0.0.1:8080:80/tcp"),
        ("0.0.0.0:53:53/udp", "0.0.0.0:53:53/udp"),
        ("22:10.0.2.16:2222", "127.0.0.1:22:10.0.2.16:2222/tcp"),
        (
            "[::1]:80:[fec0::15]:8080/tcp",
            "[::1]:80:[fec0::15]:8080/tcp",
        ),
    ] {
        let forward: Forward = text.parse().unwrap();
        assert_eq!(forward.to_string(), shown);
        assert_eq!(shown.parse::<Forward>().unwrap(), forward);
    }
    for text in [
        "",
        "80",
        "80:0",
        "x:80",
        "80:80:80",
        "80:80/sctp",
        "[::1]80:80",
        "70000:1",
    ] {
        assert!(text.parse::<Forward>().is_err(), "{text}");
    }
    let _: SocketAddr = "8080:80".parse::<Forward>().unwrap().listen;
}
