//! User-mode network: NAT for one guest without any rights on the host.
//!
//! The guest sees a router at 10.0.2.2 with DHCP and DNS (10.0.2.3), and fec0::/64 for IPv6. Its
//! connections end here: each is carried on by an ordinary socket of this process, so the host's
//! firewall and routes apply to them as to any other program.
//!
//! # Threads
//!
//! One worker (`usernet`) owns all state and waits in epoll. [`NetBackend::transmit`] only copies
//! the frame into a bounded queue and wakes it. Frames to the guest are delivered on the worker.
//!
//! # What the guest may reach
//!
//! See [`policy`]: everything but the host itself. What the guest sends is hostile: every table
//! is bounded by a named limit, what cannot be handled is dropped and counted.
//!
//! # Saving and restoring
//!
//! Flows are sockets of this process and are not part of a VM's saved state. A restored guest
//! starts with a new network: segments of connections it still believes in are answered with
//! resets, DHCP renewals are granted for any free address, and UDP flows and neighbours form anew
//! with the first packet.

mod arp;
mod config;
mod counters;
mod dhcp;
mod dns;
mod forward;
mod fragment;
mod icmp;
mod link;
mod ndp;
mod policy;
mod slab;
mod sys;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use smoltcp::wire::{
    DHCP_SERVER_PORT, EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet,
    Ipv6Packet, Ipv6Repr, UdpPacket, UdpRepr,
};

use self::counters::{Counters, count, count_by};
use self::dhcp::Dhcp;
use self::dns::Dns;
use self::forward::{Forwards, Listener};
use self::fragment::{Reassembly, Taken};
use self::icmp::Pings;
use self::link::Link;
use self::policy::Policy;
use self::slab::Kind;
use self::sys::{Event, Poller, Waker};
use self::tcp::TcpTable;
use self::udp::UdpTable;
use crate::{FrameSink, MAX_FRAME_BYTES, NetBackend, Offload, Offloads};

pub use self::config::UsernetConfig;

/// True if the host gives this process ping sockets, so that a guest's echo requests can leave it.
/// `net.ipv4.ping_group_range` says who gets them.
pub fn ping_allowed() -> bool {
    sys::ping_socket(false).is_ok()
}
pub use self::counters::CounterValues;
pub use self::forward::{Forward, ForwardProtocol, ForwardSyntaxError};

/// LIMIT: bytes of frames from the guest that wait for the worker.
const QUEUE_BYTES: usize = 8 << 20;
/// LIMIT: frames from the guest that wait for the worker.
const QUEUE_FRAMES: usize = 4096;
/// Frame buffers kept for reuse.
const SPARE_FRAMES: usize = 256;
/// Frames handled before connections get their turn.
const TURN_FRAMES: usize = 256;
/// How often silent flows are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// How soon an accept that failed is tried again.
const RETRY: Duration = Duration::from_millis(100);
const DNS_PORT: u16 = 53;

/// Why a user-mode network could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum UsernetError {
    /// The settings contradict each other.
    #[error("user-mode network: {0}")]
    Config(String),
    /// A port of the host cannot be listened on.
    #[error("cannot listen for port forward {forward}")]
    Listen {
        /// What was asked for.
        forward: Forward,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The host refused.
    #[error("cannot {what} the user-mode network")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

/// A look at a running network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsernetStatus {
    /// What happened so far.
    pub counters: CounterValues,
    /// TCP connections, those that wait for their end included.
    pub tcp_connections: usize,
    /// Bytes allocated for their buffers.
    pub tcp_buffer_bytes: usize,
    /// UDP flows.
    pub udp_flows: usize,
    /// DNS queries under way.
    pub dns_queries: usize,
    /// Addresses leased by DHCP, with the Ethernet address that has them.
    pub leases: Vec<([u8; 6], Ipv4Addr)>,
}

#[derive(Default)]
struct Inbox {
    /// With each: its TCP or UDP checksum is not filled in.
    frames: VecDeque<(Vec<u8>, bool)>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    commands: Vec<Command>,
}

enum Command {
    AddForward(Listener),
    RemoveForward(Forward),
}

/// What the worker shares with other threads.
// LOCK ORDER: none of the locks is taken while another is held.
struct Shared {
    inbox: Mutex<Inbox>,
    waker: Waker,
    sink: OnceLock<Arc<dyn FrameSink>>,
    offloads: Mutex<Offloads>,
    paused: AtomicBool,
    stop: AtomicBool,
    counters: Counters,
    /// Sizes of the worker's tables, written by it once per turn; its counters are live.
    status: Mutex<UsernetStatus>,
    answers: Mutex<Vec<dns::Answer>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves these plain values usable.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The user-mode network of one guest. Ends with its worker and all connections when dropped.
pub struct Usernet {
    shared: Arc<Shared>,
    forwards: Mutex<Vec<Forward>>,
    worker: Option<JoinHandle<()>>,
}

impl Usernet {
    /// Starts to listen for the port forwards and starts the worker.
    pub fn new(config: UsernetConfig) -> Result<Usernet, UsernetError> {
        config.check().map_err(UsernetError::Config)?;
        let os = |what| move |source| UsernetError::Os { what, source };
        let mut listeners = Vec::new();
        for forward in &config.forwards {
            listeners.push(listen(*forward)?);
        }
        let bound = listeners.iter().map(|l| l.forward).collect();
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            waker: Waker::new().map_err(os("set up"))?,
            sink: OnceLock::new(),
            offloads: Mutex::default(),
            paused: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            counters: Counters::default(),
            status: Mutex::default(),
            answers: Mutex::default(),
        });
        let mut stack = Stack::new(shared.clone(), Arc::new(config)).map_err(os("set up"))?;
        for listener in listeners {
            stack.forwards.add(&mut stack.env, listener);
        }
        let worker = std::thread::Builder::new()
            .name("usernet".into())
            .spawn(move || stack.run())
            .map_err(os("start"))?;
        Ok(Usernet {
            shared,
            forwards: Mutex::new(bound),
            worker: Some(worker),
        })
    }

    /// The port forwards in force, with the ports that the host chose.
    pub fn forwards(&self) -> Vec<Forward> {
        lock(&self.forwards).clone()
    }

    /// Adds a port forward; returns it with the port that the host chose.
    pub fn add_forward(&self, forward: Forward) -> Result<Forward, UsernetError> {
        let listener = listen(forward)?;
        let forward = listener.forward;
        lock(&self.forwards).push(forward);
        lock(&self.shared.inbox)
            .commands
            .push(Command::AddForward(listener));
        self.shared.waker.wake();
        Ok(forward)
    }

    /// Stops a port forward as returned by [`Usernet::forwards`]; its connections stay. False if
    /// there is no such forward.
    pub fn remove_forward(&self, forward: &Forward) -> bool {
        let mut forwards = lock(&self.forwards);
        let Some(index) = forwards.iter().position(|f| f == forward) else {
            return false;
        };
        forwards.remove(index);
        drop(forwards);
        lock(&self.shared.inbox)
            .commands
            .push(Command::RemoveForward(*forward));
        self.shared.waker.wake();
        true
    }

    /// What is going on. Table sizes are those at the end of the worker's last turn.
    pub fn inspect(&self) -> UsernetStatus {
        let mut status = lock(&self.shared.status).clone();
        status.counters = self.shared.counters.values();
        status
    }
}

fn listen(forward: Forward) -> Result<Listener, UsernetError> {
    Listener::bind(forward).map_err(|source| UsernetError::Listen { forward, source })
}

impl Drop for Usernet {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.waker.wake();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            tracing::error!("the user-mode network's worker has panicked");
        }
    }
}

impl NetBackend for Usernet {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        let _ = self.shared.sink.set(sink);
        self.shared.waker.wake();
    }

    fn transmit(&self, frame: &[u8]) {
        self.transmit_offloaded(frame, &Offload::NONE);
    }

    // Segments of any length go into their streams as they are.
    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        let counters = &self.shared.counters;
        if frame.len() > MAX_FRAME_BYTES {
            return count(&counters.malformed);
        }
        let mut inbox = lock(&self.shared.inbox);
        if inbox.frames.len() >= QUEUE_FRAMES || inbox.bytes + frame.len() > QUEUE_BYTES {
            return count(&counters.queue_drops);
        }
        let mut copy = inbox.spare.pop().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(frame);
        inbox.bytes += copy.len();
        inbox.frames.push_back((copy, offload.checksum.is_some()));
        let first = inbox.frames.len() == 1;
        drop(inbox);
        if first {
            self.shared.waker.wake();
        }
    }

    fn receive_ready(&self) {
        self.shared.waker.wake();
    }

    fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Release);
        self.shared.waker.wake();
    }

    fn set_offloads(&self, offloads: Offloads) {
        *lock(&self.shared.offloads) = offloads;
    }
}

/// What every protocol needs.
struct Env {
    link: Link,
    poller: Poller,
    policy: Policy,
    shared: Arc<Shared>,
    config: Arc<UsernetConfig>,
    /// Name servers.
    resolvers: Vec<SocketAddr>,
    /// The address that port forwards lead to.
    guest_v4: Ipv4Addr,
    now: Instant,
    /// Tokens whose sockets may have more, handled in the next turn without waiting.
    again: Vec<u64>,
    /// Tokens to try again a little later.
    retry: Vec<u64>,
}

impl Env {
    fn is_dns(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => a == self.config.dns_v4,
            IpAddr::V6(a) => self.config.ipv6 && a == self.config.dns_v6,
        }
    }

    /// How a guest with address `guest` sees `peer`.
    fn seen_as(&self, guest: IpAddr, peer: SocketAddr) -> SocketAddr {
        let ip = self.policy.inbound(peer.ip().to_canonical());
        let ip = match (guest, ip) {
            (IpAddr::V4(_), IpAddr::V6(_)) => IpAddr::V4(self.config.router_v4),
            (IpAddr::V6(_), IpAddr::V4(_)) => IpAddr::V6(self.config.router_v6),
            _ => ip,
        };
        SocketAddr::new(ip, peer.port())
    }
}

/// The worker's state.
struct Stack {
    env: Env,
    tcp: TcpTable,
    udp: UdpTable,
    pings: Pings,
    dns: Dns,
    dhcp: Dhcp,
    forwards: Forwards,
    fragments: Reassembly,
    swept: Instant,
    frames: Vec<(Vec<u8>, bool)>,
}

impl Stack {
    fn new(shared: Arc<Shared>, config: Arc<UsernetConfig>) -> io::Result<Stack> {
        let poller = Poller::new()?;
        poller.add(shared.waker.fd(), 0)?;
        let now = Instant::now();
        Ok(Stack {
            tcp: TcpTable::new(config.buffer_bytes),
            udp: UdpTable::new(),
            pings: Pings::new(),
            dns: Dns::new(),
            dhcp: Dhcp::default(),
            forwards: Forwards::new(),
            fragments: Reassembly::default(),
            swept: now,
            frames: Vec::new(),
            env: Env {
                link: Link::new(shared.clone(), config.clone()),
                poller,
                policy: Policy::new(config.clone()),
                shared,
                resolvers: config.dns_servers.clone().unwrap_or_default(),
                guest_v4: config.guest_v4,
                config,
                now,
                again: Vec::new(),
                retry: Vec::new(),
            },
        })
    }

    fn run(&mut self) {
        let mut events = Vec::new();
        let mut busy = false;
        while !self.env.shared.stop.load(Ordering::Acquire) {
            let timeout = if busy {
                Some(Duration::ZERO)
            } else {
                self.timeout()
            };
            if let Err(e) = self.env.poller.wait(&mut events, timeout) {
                tracing::error!("the user-mode network has stopped: {e}");
                return;
            }
            busy = self.turn(&events);
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        // The VM's time stands still: nothing is due.
        if self.env.shared.paused.load(Ordering::Acquire) {
            return None;
        }
        let mut at = [self.tcp.deadline(), self.dns.deadline()]
            .into_iter()
            .flatten()
            .min();
        if !self.env.retry.is_empty() {
            at = Some(at.map_or(now + RETRY, |t| t.min(now + RETRY)));
        }
        let sweep = self.swept + SWEEP;
        let idle = self.udp.len() == 0 && self.tcp.len() == 0;
        if !idle {
            at = Some(at.map_or(sweep, |t| t.min(sweep)));
        }
        at.map(|t| t.saturating_duration_since(now))
    }

    /// Handles events, frames and timers. True if there is more to do at once.
    fn turn(&mut self, events: &[Event]) -> bool {
        let now = Instant::now();
        self.env.now = now;
        self.env.link.begin_turn(now);
        for event in events {
            if Kind::of(event.token) == Some(Kind::Waker) {
                self.env.shared.waker.drain();
            } else {
                self.host_event(event);
            }
        }
        // The VM is stopped. What came from the host is remembered by its flow.
        let mut more = false;
        if !self.env.shared.paused.load(Ordering::Acquire) {
            for token in std::mem::take(&mut self.env.again) {
                self.host_event(&Event {
                    token,
                    readable: true,
                    ..Event::default()
                });
            }
            if now.duration_since(self.swept) >= RETRY {
                for token in std::mem::take(&mut self.env.retry) {
                    self.host_event(&Event {
                        token,
                        readable: true,
                        ..Event::default()
                    });
                }
            }
            more = self.take_frames();
            self.dns.deliver(&mut self.env);
            self.tcp.expire(&mut self.env);
            self.dns.expire(&mut self.env);
            more |= self.tcp.run(&mut self.env) | !self.env.again.is_empty();
            self.sweep();
        }
        self.publish();
        more
    }

    fn host_event(&mut self, event: &Event) {
        let token = event.token;
        let kind = Kind::of(token);
        // Datagrams stay in their sockets while the VM is stopped.
        if kind != Some(Kind::Tcp) && self.env.shared.paused.load(Ordering::Acquire) {
            self.env.again.push(token);
            return;
        }
        match kind {
            Some(Kind::Tcp) => self.tcp.host_event(event),
            Some(Kind::Udp) if event.readable => self.udp.host_event(&mut self.env, token),
            Some(Kind::Forward) if event.readable => {
                self.forwards
                    .host_event(&mut self.env, &mut self.tcp, token);
            }
            Some(Kind::Dns) if event.readable => self.dns.host_event(&mut self.env, token),
            Some(Kind::Ping) if event.readable => self.pings.host_event(&mut self.env, token),
            _ => {}
        }
    }

    fn sweep(&mut self) {
        let now = self.env.now;
        if now.duration_since(self.swept) < SWEEP {
            return;
        }
        self.swept = now;
        self.udp.sweep(now);
        self.pings.sweep(now);
        self.forwards.sweep(now);
    }

    fn publish(&self) {
        let mut status = lock(&self.env.shared.status);
        status.tcp_connections = self.tcp.len();
        status.tcp_buffer_bytes = self.tcp.buffer_bytes();
        status.udp_flows = self.udp.len();
        status.dns_queries = self.dns.len();
        status.leases.clear();
        status.leases.extend(self.dhcp.leases());
    }

    /// Handles a bounded number of frames. True if there are more.
    fn take_frames(&mut self) -> bool {
        let mut frames = std::mem::take(&mut self.frames);
        let (more, commands) = {
            let mut inbox = lock(&self.env.shared.inbox);
            let n = inbox.frames.len().min(TURN_FRAMES);
            frames.extend(inbox.frames.drain(..n));
            inbox.bytes -= frames.iter().map(|(f, _)| f.len()).sum::<usize>();
            (
                !inbox.frames.is_empty(),
                std::mem::take(&mut inbox.commands),
            )
        };
        for command in commands {
            match command {
                Command::AddForward(listener) => self.forwards.add(&mut self.env, listener),
                Command::RemoveForward(forward) => self.forwards.remove(&forward),
            }
        }
        let counters = self.env.shared.clone();
        for (frame, unchecked) in &frames {
            self.env.link.unchecked = *unchecked;
            count(&counters.counters.frames_from_guest);
            count_by(&counters.counters.bytes_from_guest, frame.len());
            if !self.receive(frame) {
                count(&counters.counters.malformed);
            }
        }
        let mut inbox = lock(&self.env.shared.inbox);
        let room = SPARE_FRAMES.saturating_sub(inbox.spare.len());
        inbox
            .spare
            .extend(frames.drain(..).take(room).map(|(f, _)| f));
        drop(inbox);
        self.frames = frames;
        more
    }

    /// A frame from the guest. False if it is malformed.
    fn receive(&mut self, frame: &[u8]) -> bool {
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return false;
        };
        let (src, dst) = (frame.src_addr(), frame.dst_addr());
        if !src.is_unicast() {
            return false;
        }
        if !dst.is_multicast() && dst != self.env.link.router_mac() {
            count(&self.env.shared.counters.unsupported);
            return true;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => arp::receive(&mut self.env.link, frame.payload()),
            EthernetProtocol::Ipv4 => self.receive_v4(src, frame.payload()),
            EthernetProtocol::Ipv6 if self.env.config.ipv6 => self.receive_v6(src, frame.payload()),
            _ => {
                count(&self.env.shared.counters.unsupported);
                true
            }
        }
    }

    fn receive_v4(&mut self, mac: EthernetAddress, packet: &[u8]) -> bool {
        let Ok(packet) = Ipv4Packet::new_checked(packet) else {
            return false;
        };
        if packet.version() != 4 || packet.header_len() < 20 || !packet.verify_checksum() {
            return false;
        }
        let (src, dst) = (packet.src_addr(), packet.dst_addr());
        // RFC 1122 §3.2.1.3: these are never a source; 0.0.0.0 is, for DHCP.
        if src.is_multicast() || src.is_broadcast() || src.is_loopback() {
            return false;
        }
        self.env.link.learn(IpAddr::V4(src), mac);
        if packet.more_frags() || packet.frag_offset() != 0 {
            return match self.fragments.take(&packet, self.env.now) {
                Taken::Whole(w) => self.dispatch_v4(w.src, w.dst, w.protocol, &w.payload),
                Taken::Waiting => true,
                Taken::Dropped => {
                    count(&self.env.shared.counters.fragment_drops);
                    true
                }
            };
        }
        self.dispatch_v4(src, dst, packet.next_header(), packet.payload())
    }

    fn dispatch_v4(
        &mut self,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        protocol: IpProtocol,
        payload: &[u8],
    ) -> bool {
        if protocol == IpProtocol::Udp {
            return self.receive_udp(src.into(), dst.into(), payload);
        }
        // A spoofed source could only make us talk to somebody who is not there.
        if !self.env.config.on_link_v4(src) || self.env.link.is_ours(src.into()) {
            count(&self.env.shared.counters.denied);
            return true;
        }
        match protocol {
            IpProtocol::Tcp => self
                .tcp
                .receive(&mut self.env, src.into(), dst.into(), payload),
            IpProtocol::Icmp => self.pings.receive_v4(&mut self.env, src, dst, payload),
            _ => {
                count(&self.env.shared.counters.unsupported);
                true
            }
        }
    }

    fn receive_v6(&mut self, mac: EthernetAddress, packet: &[u8]) -> bool {
        let Ok(packet) = Ipv6Packet::new_checked(packet) else {
            return false;
        };
        let Ok(header) = Ipv6Repr::parse(&packet) else {
            return false;
        };
        let (src, dst) = (header.src_addr, header.dst_addr);
        if src.is_multicast() || src.is_loopback() {
            return false;
        }
        let payload = packet.payload();
        // Neighbour discovery learns for itself, after its own checks.
        if header.next_header == IpProtocol::Icmpv6 {
            return self.pings.receive_v6(&mut self.env, mac, &header, payload);
        }
        let known = self.env.config.on_link_v6(src) || src.is_unicast_link_local();
        if !known || self.env.link.is_ours(src.into()) {
            count(&self.env.shared.counters.denied);
            return true;
        }
        self.env.link.learn(IpAddr::V6(src), mac);
        match header.next_header {
            IpProtocol::Tcp => self
                .tcp
                .receive(&mut self.env, src.into(), dst.into(), payload),
            IpProtocol::Udp => self.receive_udp(src.into(), dst.into(), payload),
            // Hop-by-hop options (multicast reports), routing and fragment headers.
            _ => {
                count(&self.env.shared.counters.unsupported);
                true
            }
        }
    }

    fn receive_udp(&mut self, src: IpAddr, dst: IpAddr, payload: &[u8]) -> bool {
        let Ok(packet) = UdpPacket::new_checked(payload) else {
            return false;
        };
        let caps = self.env.link.checksums_in();
        let Ok(repr) = UdpRepr::parse(&packet, &src.into(), &dst.into(), &caps) else {
            return false;
        };
        let data = packet.payload();
        let config = self.env.config.clone();
        let guest = SocketAddr::new(src, repr.src_port);
        let remote = SocketAddr::new(dst, repr.dst_port);
        if let IpAddr::V4(dst) = dst
            && repr.dst_port == DHCP_SERVER_PORT
            && (dst.is_broadcast() || dst == config.router_v4 || dst == config.broadcast_v4())
        {
            let ok = self.dhcp.receive(&mut self.env.link, data);
            if ok {
                count(&self.env.shared.counters.dhcp_replies);
                let leased = self.dhcp.leases().next().map(|(_, ip)| ip);
                self.env.guest_v4 = leased.unwrap_or(config.guest_v4);
            }
            return ok;
        }
        let from_link = match src {
            IpAddr::V4(a) => config.on_link_v4(a),
            IpAddr::V6(a) => config.on_link_v6(a) || a.is_unicast_link_local(),
        };
        if !from_link || self.env.link.is_ours(src) || repr.src_port == 0 {
            count(&self.env.shared.counters.denied);
            return true;
        }
        if self.env.is_dns(dst) && repr.dst_port == DNS_PORT {
            self.dns.refresh(&mut self.env);
            self.dns.receive(&mut self.env, guest, remote, data);
        } else if !self.forwards.answer(&self.env, guest, remote, data) {
            self.udp.transmit(&mut self.env, guest, remote, data);
        }
        true
    }
}

/// Feeds arbitrary bytes to a network that talks to nobody: a sequence of frames, each preceded
/// by its length (two bytes, little-endian). For fuzzing; must never panic.
pub fn fuzz_one(data: &[u8]) {
    let config = UsernetConfig {
        restrict: true,
        ..UsernetConfig::default()
    };
    let Ok(waker) = Waker::new() else { return };
    let shared = Arc::new(Shared {
        inbox: Mutex::default(),
        waker,
        sink: OnceLock::new(),
        offloads: Mutex::default(),
        paused: AtomicBool::new(false),
        stop: AtomicBool::new(false),
        counters: Counters::default(),
        status: Mutex::default(),
        answers: Mutex::default(),
    });
    struct Nowhere;
    impl FrameSink for Nowhere {
        fn receive(&self, _: &[u8]) -> bool {
            true
        }
        fn ready(&self) -> bool {
            true
        }
    }
    let _ = shared.sink.set(Arc::new(Nowhere));
    let Ok(mut stack) = Stack::new(shared, Arc::new(config)) else {
        return;
    };
    stack.env.link.begin_turn(Instant::now());
    // Half of the inputs get past checksums more easily.
    stack.env.link.unchecked = data.len().is_multiple_of(2);
    let mut rest = data;
    while let Some((len, after)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len)).min(after.len());
        let (frame, next) = after.split_at(len);
        stack.receive(frame);
        rest = next;
    }
    stack.turn(&[]);
}
