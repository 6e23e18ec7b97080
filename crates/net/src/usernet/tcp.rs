//! TCP: the table of connections. What happens in one is in [`conn`].

mod conn;
mod ring;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

use smoltcp::wire::{TcpControl, TcpPacket, TcpRepr};

pub(super) use self::conn::Flow;
use self::conn::{Conn, ConnectFailure, Ctx, Outcome, State};
use self::ring::Budget;
use super::Env;
use super::counters::count;
use super::icmp::{self, Quote, Reason};
use super::slab::{Kind, Slab};
use super::sys;

/// The port of the DNS forwarder.
const DNS_PORT: u16 = 53;

/// All TCP connections of one guest.
pub(super) struct TcpTable {
    conns: Slab<Conn>,
    by_flow: HashMap<Flow, u64>,
    timers: BinaryHeap<Reverse<(Instant, u64)>>,
    /// Connections to handle before waiting again.
    queue: Vec<u64>,
    budget: Budget,
    /// Some connection could not send because the card was not ready.
    blocked: bool,
}

impl TcpTable {
    pub(super) fn new(buffer_bytes: usize) -> TcpTable {
        TcpTable {
            conns: Slab::new(Kind::Tcp),
            by_flow: HashMap::new(),
            timers: BinaryHeap::new(),
            queue: Vec::new(),
            budget: Budget::new(buffer_bytes),
            blocked: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.conns.len()
    }

    pub(super) fn buffer_bytes(&self) -> usize {
        self.budget.used
    }

    /// A segment from the guest. False if it is malformed.
    pub(super) fn receive(
        &mut self,
        env: &mut Env,
        src: IpAddr,
        dst: IpAddr,
        payload: &[u8],
    ) -> bool {
        let Ok(packet) = TcpPacket::new_checked(payload) else {
            return false;
        };
        let caps = env.link.checksums_in();
        let Ok(seg) = TcpRepr::parse(&packet, &src.into(), &dst.into(), &caps) else {
            return false;
        };
        let flow = Flow {
            guest: SocketAddr::new(src, seg.src_port),
            remote: SocketAddr::new(dst, seg.dst_port),
        };
        let is_open = seg.control == TcpControl::Syn && seg.ack_number.is_none();
        if let Some(&token) = self.by_flow.get(&flow) {
            let replaced = is_open
                && self
                    .conns
                    .get(token)
                    .is_some_and(|c| c.may_be_replaced_by(&seg));
            if !replaced {
                self.with(env, token, |conn, ctx| conn.segment(ctx, &seg));
                return true;
            }
            self.remove(token);
        }
        if is_open {
            self.open(env, flow, &seg);
        } else {
            // Also what a guest gets that was restored with connections open.
            conn::reset_for(&mut env.link, &env.shared.counters, flow, &seg);
        }
        true
    }

    /// The guest opens a connection.
    fn open(&mut self, env: &mut Env, flow: Flow, syn: &TcpRepr<'_>) {
        let refuse = |env: &mut Env| {
            conn::reset_for(&mut env.link, &env.shared.counters, flow, syn);
        };
        let Some(to) = destination(env, flow.remote) else {
            count(&env.shared.counters.denied);
            return refuse(env);
        };
        if !self.make_room(env) {
            count(&env.shared.counters.limit_drops);
            return refuse(env);
        }
        let socket = match sys::start_connect(to) {
            Ok(socket) => socket,
            Err(e) => return fail(env, flow, syn, conn::connect_failure(&e)),
        };
        count(&env.shared.counters.tcp_out);
        let limit = env.config.connection_buffer_bytes;
        let conn = Conn::outbound(flow, socket, syn, limit, env.now);
        self.insert(env, conn);
    }

    /// A port forward has accepted `socket`; the guest is to see it as coming from `remote`.
    pub(super) fn accept(&mut self, env: &mut Env, flow: Flow, socket: TcpStream) {
        if self.by_flow.contains_key(&flow) || !self.make_room(env) {
            count(&env.shared.counters.limit_drops);
            sys::reset_on_close(&socket);
            return;
        }
        count(&env.shared.counters.tcp_in);
        let limit = env.config.connection_buffer_bytes;
        let conn = Conn::inbound(flow, socket, limit, env.now);
        self.insert(env, conn);
    }

    /// True if `flow` is in use.
    pub(super) fn has(&self, flow: &Flow) -> bool {
        self.by_flow.contains_key(flow)
    }

    /// LIMIT: `tcp_connections`. Those that only wait for their end go first.
    fn make_room(&mut self, env: &Env) -> bool {
        if self.conns.len() < env.config.tcp_connections {
            return true;
        }
        let waiting = self.conns.iter().find(|(_, c)| c.state == State::TimeWait);
        let Some((token, _)) = waiting else {
            return false;
        };
        self.remove(token);
        true
    }

    fn insert(&mut self, env: &mut Env, conn: Conn) {
        let flow = conn.flow;
        let token = self.conns.insert(conn);
        self.by_flow.insert(flow, token);
        let added = match self.conns.get(token).and_then(Conn::socket) {
            Some(socket) => env.poller.add(socket, token),
            None => Ok(()),
        };
        if let Err(e) = added {
            tracing::warn!("cannot watch a connection: {e}");
            self.remove(token);
            return;
        }
        self.enqueue(token);
        self.arm(token);
    }

    fn enqueue(&mut self, token: u64) {
        if let Some(conn) = self.conns.get_mut(token)
            && !conn.queued
        {
            conn.queued = true;
            self.queue.push(token);
        }
    }

    fn remove(&mut self, token: u64) {
        if let Some(mut conn) = self.conns.remove(token) {
            self.by_flow.remove(&conn.flow);
            conn.release(&mut self.budget);
        }
    }

    /// Puts the connection's deadline into the heap. There is one entry per connection, at or
    /// before its deadline; an entry that comes too early is put back.
    fn arm(&mut self, token: u64) {
        let Some(conn) = self.conns.get_mut(token) else {
            return;
        };
        let Some(at) = conn.deadline() else { return };
        if conn.timer.is_none_or(|known| at < known) {
            conn.timer = Some(at);
            self.timers.push(Reverse((at, token)));
        }
        // Entries that were overtaken by earlier ones stay behind until their time: sweep them.
        if self.timers.len() > 4 * self.conns.len() + 64 {
            let conns = &self.conns;
            self.timers.retain(|Reverse((at, token))| {
                conns.get(*token).is_some_and(|c| c.timer == Some(*at))
            });
        }
    }

    /// Runs `f` on a connection and does what comes out of it.
    fn with(
        &mut self,
        env: &mut Env,
        token: u64,
        f: impl FnOnce(&mut Conn, &mut Ctx<'_>) -> Outcome,
    ) {
        let Some(conn) = self.conns.get_mut(token) else {
            return;
        };
        let mut ctx = Ctx {
            link: &mut env.link,
            budget: &mut self.budget,
            counters: &env.shared.counters,
            now: env.now,
        };
        match f(conn, &mut ctx) {
            Outcome::Keep => self.arm(token),
            Outcome::Again => {
                self.enqueue(token);
                self.arm(token);
            }
            Outcome::Remove => self.remove(token),
            Outcome::Failed(failure) => {
                let (flow, seq) = (conn.flow, conn.syn_of_guest());
                self.remove(token);
                let syn = syn_again(flow, seq);
                fail(env, flow, &syn, failure);
            }
        }
    }

    /// A host socket has something to say.
    pub(super) fn host_event(&mut self, event: &sys::Event) {
        if let Some(conn) = self.conns.get_mut(event.token) {
            conn.host_event(event);
            self.enqueue(event.token);
        }
    }

    /// Handles what is queued. True if there is more to do at once.
    pub(super) fn run(&mut self, env: &mut Env) -> bool {
        if std::mem::take(&mut env.link.learned) {
            self.for_all(
                env,
                |c| c.state != State::Open,
                |conn, ctx| {
                    conn.neighbor_learned(ctx);
                    Outcome::Keep
                },
            );
        }
        if self.blocked && env.link.ready() {
            self.blocked = false;
            let waiting: Vec<u64> = self
                .conns
                .iter()
                .filter(|(_, c)| c.wants_link())
                .map(|(t, _)| t)
                .collect();
            for token in waiting {
                self.enqueue(token);
            }
        }
        for token in std::mem::take(&mut self.queue) {
            if let Some(conn) = self.conns.get_mut(token) {
                conn.queued = false;
                self.with(env, token, Conn::advance);
            }
        }
        self.blocked |= !env.link.ready();
        !self.queue.is_empty()
    }

    fn for_all(
        &mut self,
        env: &mut Env,
        which: impl Fn(&Conn) -> bool,
        f: impl Fn(&mut Conn, &mut Ctx<'_>) -> Outcome,
    ) {
        let tokens: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| which(c))
            .map(|(t, _)| t)
            .collect();
        for token in tokens {
            self.with(env, token, &f);
        }
    }

    /// Runs timers that are due.
    pub(super) fn expire(&mut self, env: &mut Env) {
        while let Some(&Reverse((at, token))) = self.timers.peek()
            && at <= env.now
        {
            self.timers.pop();
            let Some(conn) = self.conns.get_mut(token) else {
                continue;
            };
            if conn.timer != Some(at) {
                continue;
            }
            conn.timer = None;
            if conn.deadline().is_some_and(|due| due <= env.now) {
                self.with(env, token, Conn::expired);
            } else {
                self.arm(token);
            }
        }
    }

    /// When [`TcpTable::expire`] should be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }
}

/// Where a connection to `remote` leads.
fn destination(env: &mut Env, remote: SocketAddr) -> Option<SocketAddr> {
    if env.is_dns(remote.ip()) {
        let served = remote.port() == DNS_PORT && !env.config.restrict;
        return env.resolvers.first().copied().filter(|_| served);
    }
    env.policy.outbound(remote, env.now)
}

/// The guest's SYN, as far as an answer needs it.
fn syn_again(flow: Flow, seq_number: smoltcp::wire::TcpSeqNumber) -> TcpRepr<'static> {
    TcpRepr {
        src_port: flow.guest.port(),
        dst_port: flow.remote.port(),
        control: TcpControl::Syn,
        seq_number,
        ack_number: None,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    }
}

/// Tells the guest that its connection cannot be made.
fn fail(env: &mut Env, flow: Flow, syn: &TcpRepr<'_>, failure: ConnectFailure) {
    match failure {
        ConnectFailure::Refused => {
            conn::reset_for(&mut env.link, &env.shared.counters, flow, syn);
        }
        ConnectFailure::Unreachable => {
            let mut head = [0; 8];
            head[..2].copy_from_slice(&flow.guest.port().to_be_bytes());
            head[2..4].copy_from_slice(&flow.remote.port().to_be_bytes());
            head[4..].copy_from_slice(&syn.seq_number.0.to_be_bytes());
            let quote = Quote {
                src: flow.guest.ip(),
                dst: flow.remote.ip(),
                protocol: smoltcp::wire::IpProtocol::Tcp,
                payload_len: smoltcp::wire::TCP_HEADER_LEN,
                head,
            };
            icmp::unreachable(&mut env.link, &quote, Reason::Host);
        }
    }
}
