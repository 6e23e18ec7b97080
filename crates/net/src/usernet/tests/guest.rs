//! The guest: smoltcp's stack on the other end of the cable.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{EthernetAddress, IpCidr};

use crate::usernet::{Usernet, UsernetConfig};
use crate::{FrameSink, NetBackend};

pub(super) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// Long enough for a loaded machine; a passing test never waits for it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// The network card: frames that have arrived.
#[derive(Default)]
pub(super) struct Card {
    frames: Mutex<VecDeque<Vec<u8>>>,
    arrived: Condvar,
    /// Every n-th frame to the guest is lost. Zero: none.
    pub(super) lose_to_guest: AtomicU32,
    /// Every n-th frame from the guest is lost. Zero: none.
    pub(super) lose_from_guest: AtomicU32,
    received: AtomicU32,
    sent: AtomicU32,
}

/// More than this and the card has no buffers.
const CARD_FRAMES: usize = 256;

/// Counts a frame; true if it is the n-th.
fn loses(every: &AtomicU32, count: &AtomicU32) -> bool {
    let n = every.load(Ordering::Relaxed);
    n != 0 && count.fetch_add(1, Ordering::Relaxed) % n == n - 1
}

impl Card {
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    /// Waits until there is a frame or `timeout` is over.
    pub(super) fn wait(&self, timeout: Duration) {
        let frames = self.frames.lock().unwrap();
        if frames.is_empty() {
            let _ = self.arrived.wait_timeout(frames, timeout).unwrap();
        }
    }
}

impl FrameSink for Card {
    fn receive(&self, frame: &[u8]) -> bool {
        if loses(&self.lose_to_guest, &self.received) {
            return true;
        }
        let mut frames = self.frames.lock().unwrap();
        if frames.len() >= CARD_FRAMES {
            return false;
        }
        frames.push_back(frame.to_vec());
        self.arrived.notify_all();
        true
    }

    fn ready(&self) -> bool {
        self.frames.lock().unwrap().len() < CARD_FRAMES
    }
}

struct Port {
    card: Arc<Card>,
    net: Arc<Usernet>,
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sending<'a>(&'a Port);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        let card = &self.0.card;
        if !loses(&card.lose_from_guest, &card.sent) {
            self.0.net.transmit(&frame);
        }
        result
    }
}

impl Device for Port {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: SmolInstant) -> Option<(Received, Sending<'_>)> {
        let frame = self.card.take()?;
        self.net.receive_ready();
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _: SmolInstant) -> Option<Sending<'_>> {
        Some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1514;
        caps
    }
}

pub(super) struct Guest {
    pub(super) net: Arc<Usernet>,
    pub(super) card: Arc<Card>,
    port: Port,
    pub(super) iface: Interface,
    pub(super) sockets: SocketSet<'static>,
    began: Instant,
}

/// A network with the host's loopback granted.
pub(super) fn open_config() -> UsernetConfig {
    UsernetConfig {
        host_loopback: true,
        ..UsernetConfig::default()
    }
}

impl Guest {
    /// A guest without addresses.
    pub(super) fn bare(config: UsernetConfig) -> Guest {
        let net = Arc::new(Usernet::new(config).unwrap());
        let card = Arc::new(Card::default());
        net.attach(card.clone());
        let mut port = Port {
            card: card.clone(),
            net: net.clone(),
        };
        let mut config = Config::new(EthernetAddress(GUEST_MAC).into());
        config.random_seed = 7;
        let iface = Interface::new(config, &mut port, SmolInstant::ZERO);
        let sockets = SocketSet::new(vec![]);
        Guest {
            net,
            card,
            port,
            iface,
            sockets,
            began: Instant::now(),
        }
    }

    /// A guest that is configured by hand.
    pub(super) fn new(config: UsernetConfig) -> Guest {
        let mut guest = Guest::bare(config);
        guest.iface.update_ip_addrs(|addrs| {
            addrs
                .push(IpCidr::new(Ipv4Addr::new(10, 0, 2, 15).into(), 24))
                .unwrap();
            let v6 = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15);
            addrs.push(IpCidr::new(v6.into(), 64)).unwrap();
        });
        let routes = guest.iface.routes_mut();
        routes
            .add_default_ipv4_route(Ipv4Addr::new(10, 0, 2, 2))
            .unwrap();
        routes
            .add_default_ipv6_route(Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2))
            .unwrap();
        guest
    }

    /// Plugs the cable into a new network, as after a restore.
    pub(super) fn replace_network(&mut self, config: UsernetConfig) {
        let net = Arc::new(Usernet::new(config).unwrap());
        net.attach(self.card.clone());
        self.port.net = net.clone();
        self.net = net;
    }

    fn now(&self) -> SmolInstant {
        SmolInstant::from_micros(self.began.elapsed().as_micros() as i64)
    }

    /// Runs the guest until `done` says so.
    pub(super) fn until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let begin = Instant::now();
        loop {
            let now = self.now();
            self.iface.poll(now, &mut self.port, &mut self.sockets);
            if done(self) {
                let now = self.now();
                self.iface.poll(now, &mut self.port, &mut self.sockets);
                return;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "{what}: {:?}",
                self.net.inspect()
            );
            let now = self.now();
            let delay = self.iface.poll_delay(now, &self.sockets);
            let delay = delay.map_or(50_000, |d| d.total_micros().min(50_000));
            self.card.wait(Duration::from_micros(delay));
        }
    }

    pub(super) fn tcp_socket(&mut self, buffer: usize) -> SocketHandle {
        let ring = || tcp::SocketBuffer::new(vec![0; buffer]);
        self.sockets.add(tcp::Socket::new(ring(), ring()))
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn connect(
        &mut self,
        to: (impl Into<smoltcp::wire::IpAddress>, u16),
        from: u16,
    ) -> SocketHandle {
        let handle = self.tcp_socket(256 << 10);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.iface.context(), to, from).unwrap();
        handle
    }

    /// Sends `frame` as it is.
    pub(super) fn send_raw(&self, frame: &[u8]) {
        self.net.transmit(frame);
    }
}
