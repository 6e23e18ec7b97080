//! The DNS forwarder.
//!
//! Queries over UDP go, each from a fresh socket, to the host's name servers in turn; over TCP
//! the connection is carried like any other (see `tcp`). A host without name servers may still
//! know names (`/etc/hosts`): its own resolver then answers A and AAAA queries on one thread.
//! What cannot be answered gets SERVFAIL; a restricted network REFUSED.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use smoltcp::wire::{DnsFlags, DnsOpcode, DnsPacket, DnsQueryType, DnsQuestion};

use super::counters::count;
use super::slab::{Kind, Slab};
use super::{Env, Shared, udp};

/// LIMIT: queries under way; more are answered with SERVFAIL.
const QUERIES: usize = 256;
/// How long one server may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// LIMIT: servers asked for one query, all of them counted anew in each round.
const ATTEMPTS: usize = 4;
/// LIMIT: names waiting for the host's resolver.
const LOOKUPS: usize = 64;
/// LIMIT: name servers used, as in resolv.conf(5).
const SERVERS: usize = 3;
/// How long the list of name servers is believed.
const FRESH: Duration = Duration::from_secs(5);
/// Time to live of answers made from the host's resolver, in seconds.
const TTL_S: u32 = 30;
/// LIMIT: records in such an answer.
const RECORDS: usize = 16;
/// RFC 1035 §4.1.1.
const HEADER_LEN: usize = 12;
const NO_ERROR: u8 = 0;
const FORM_ERR: u8 = 1;
const SERV_FAIL: u8 = 2;
const REFUSED: u8 = 5;

struct Query {
    guest: SocketAddr,
    /// Our address that was asked.
    asked: SocketAddr,
    request: Vec<u8>,
    socket: UdpSocket,
    attempt: usize,
    due: Instant,
}

/// A question for the host's resolver.
struct Lookup {
    guest: SocketAddr,
    asked: SocketAddr,
    request: Vec<u8>,
    name: String,
    want_v6: bool,
}

/// An answer from the host's resolver, to be sent to the guest.
pub(super) struct Answer {
    guest: SocketAddr,
    asked: SocketAddr,
    reply: Vec<u8>,
    failed: bool,
}

/// Queries under way.
pub(super) struct Dns {
    queries: Slab<Query>,
    resolver: Option<SyncSender<Lookup>>,
    read_at: Option<Instant>,
    buf: Vec<u8>,
}

impl Dns {
    pub(super) fn new() -> Dns {
        Dns {
            queries: Slab::new(Kind::Dns),
            resolver: None,
            read_at: None,
            buf: vec![0; usize::from(u16::MAX)],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.queries.len()
    }

    /// Reads the host's list of name servers again if it is old.
    pub(super) fn refresh(&mut self, env: &mut Env) {
        if env.config.dns_servers.is_some()
            || self
                .read_at
                .is_some_and(|at| env.now.duration_since(at) < FRESH)
        {
            return;
        }
        self.read_at = Some(env.now);
        // Not readable (any more): what is known stays.
        if let Ok(text) = std::fs::read_to_string("/etc/resolv.conf") {
            env.resolvers = parse_resolv_conf(&text);
        }
    }

    /// A query from the guest.
    pub(super) fn receive(
        &mut self,
        env: &mut Env,
        guest: SocketAddr,
        asked: SocketAddr,
        request: &[u8],
    ) {
        count(&env.shared.counters.dns_queries);
        // RFC 1035 §4.1: answers are not answered.
        let is_query =
            DnsPacket::new_checked(request).is_ok_and(|p| !p.flags().contains(DnsFlags::RESPONSE));
        if !is_query {
            count(&env.shared.counters.malformed);
            return;
        }
        if env.config.restrict {
            return self.refuse(env, guest, asked, request, REFUSED);
        }
        if env.resolvers.is_empty() {
            return self.look_up(env, guest, asked, request);
        }
        if self.queries.len() >= QUERIES {
            count(&env.shared.counters.limit_drops);
            return self.refuse(env, guest, asked, request, SERV_FAIL);
        }
        self.ask(env, guest, asked, request.to_vec(), 0);
    }

    /// Asks the next server that can be asked.
    fn ask(
        &mut self,
        env: &mut Env,
        guest: SocketAddr,
        asked: SocketAddr,
        request: Vec<u8>,
        first: usize,
    ) {
        for attempt in first..ATTEMPTS {
            let Some(server) = env.resolvers.get(attempt % env.resolvers.len().max(1)) else {
                break;
            };
            let Ok(socket) = query_socket(*server) else {
                continue;
            };
            if socket.send(&request).is_err() {
                continue;
            }
            let due = env.now + PATIENCE;
            let query = Query {
                guest,
                asked,
                request,
                socket,
                attempt,
                due,
            };
            let token = self.queries.insert(query);
            if let Some(query) = self.queries.get(token)
                && let Err(e) = env.poller.add(&query.socket, token)
            {
                tracing::debug!("cannot watch a DNS query: {e}");
            }
            return;
        }
        self.refuse(env, guest, asked, &request, SERV_FAIL);
    }

    fn refuse(
        &self,
        env: &mut Env,
        guest: SocketAddr,
        asked: SocketAddr,
        request: &[u8],
        rcode: u8,
    ) {
        count(&env.shared.counters.dns_failures);
        let reply = response(request, rcode, &[]);
        udp::send(&mut env.link, asked, guest, &reply);
    }

    /// A server has answered, or cannot be reached.
    pub(super) fn host_event(&mut self, env: &mut Env, token: u64) {
        let Some(query) = self.queries.get(token) else {
            return;
        };
        loop {
            match query.socket.recv(&mut self.buf) {
                Ok(len) => {
                    let reply = &self.buf[..len];
                    // The kernel has checked the sender; the identifier is the other half.
                    if len < HEADER_LEN || reply.get(..2) != query.request.get(..2) {
                        continue;
                    }
                    udp::send(&mut env.link, query.asked, query.guest, reply);
                    self.queries.remove(token);
                    return;
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return self.ask_again(env, token),
            }
        }
    }

    fn ask_again(&mut self, env: &mut Env, token: u64) {
        if let Some(q) = self.queries.remove(token) {
            self.ask(env, q.guest, q.asked, q.request, q.attempt + 1);
        }
    }

    /// When [`Dns::expire`] should be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.queries.iter().map(|(_, q)| q.due).min()
    }

    /// Gives queries to the next server whose time is over.
    pub(super) fn expire(&mut self, env: &mut Env) {
        let late: Vec<u64> = self
            .queries
            .iter()
            .filter(|(_, q)| q.due <= env.now)
            .map(|(t, _)| t)
            .collect();
        for token in late {
            self.ask_again(env, token);
        }
    }

    /// Hands a query to the host's own resolver.
    fn look_up(&mut self, env: &mut Env, guest: SocketAddr, asked: SocketAddr, request: &[u8]) {
        let Some((name, kind)) = parse_question(request) else {
            return self.refuse(env, guest, asked, request, FORM_ERR);
        };
        let want_v6 = match kind {
            DnsQueryType::A => false,
            DnsQueryType::Aaaa => true,
            _ => return self.refuse(env, guest, asked, request, SERV_FAIL),
        };
        let sender = self
            .resolver
            .get_or_insert_with(|| start_resolver(env.shared.clone()));
        let lookup = Lookup {
            guest,
            asked,
            request: request.to_vec(),
            name,
            want_v6,
        };
        if sender.try_send(lookup).is_err() {
            count(&env.shared.counters.limit_drops);
            self.refuse(env, guest, asked, request, SERV_FAIL);
        }
    }

    /// Sends what the host's resolver has found.
    pub(super) fn deliver(&mut self, env: &mut Env) {
        let answers =
            std::mem::take(&mut *env.shared.answers.lock().unwrap_or_else(|e| e.into_inner()));
        for answer in answers {
            if answer.failed {
                count(&env.shared.counters.dns_failures);
            }
            udp::send(&mut env.link, answer.asked, answer.guest, &answer.reply);
        }
    }
}

fn query_socket(server: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(server)?;
    Ok(socket)
}

/// The `nameserver` lines of resolv.conf(5).
pub(super) fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            if words.next() != Some("nameserver") {
                return None;
            }
            let ip: IpAddr = words.next()?.parse().ok()?;
            Some(SocketAddr::new(ip, 53))
        })
        .take(SERVERS)
        .collect()
}

/// Name and type of the only question of a query.
fn parse_question(request: &[u8]) -> Option<(String, DnsQueryType)> {
    let packet = DnsPacket::new_checked(request).ok()?;
    if packet.opcode() != DnsOpcode::Query || packet.question_count() != 1 {
        return None;
    }
    let (_, question) = DnsQuestion::parse(packet.payload()).ok()?;
    let mut name = String::new();
    for label in packet.parse_name(question.name) {
        let label = label.ok()?;
        let plain = label
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(b));
        // LIMIT: RFC 1035 §2.3.4.
        if !plain || name.len() + label.len() > 253 {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(std::str::from_utf8(label).ok()?);
    }
    (!name.is_empty()).then_some((name, question.type_))
}

/// A response to `request` with its question repeated and `addresses` as answers.
fn response(request: &[u8], rcode: u8, addresses: &[IpAddr]) -> Vec<u8> {
    let question = DnsPacket::new_checked(request).ok().and_then(|p| {
        let payload = request.get(HEADER_LEN..)?;
        let (rest, _) = DnsQuestion::parse(payload)
            .ok()
            .filter(|_| p.question_count() == 1)?;
        payload.get(..payload.len() - rest.len())
    });
    let mut out = vec![0; HEADER_LEN];
    out[..2].copy_from_slice(request.get(..2).unwrap_or(&[0, 0]));
    // Opcode and RD are copied; QR and RA are set (RFC 1035 §4.1.1).
    out[2] = request.get(2).map_or(0, |b| b & 0x79) | 0x80;
    out[3] = 0x80 | rcode;
    if let Some(question) = question {
        out[5] = 1;
        out.extend_from_slice(question);
        for address in addresses.iter().take(RECORDS) {
            // The name is the question's, which starts right after the header.
            out.extend_from_slice(&[0xc0, HEADER_LEN as u8]);
            let (kind, data) = match address {
                IpAddr::V4(a) => (DnsQueryType::A, a.octets().to_vec()),
                IpAddr::V6(a) => (DnsQueryType::Aaaa, a.octets().to_vec()),
            };
            out.extend_from_slice(&u16::from(kind).to_be_bytes());
            out.extend_from_slice(&[0, 1]);
            out.extend_from_slice(&TTL_S.to_be_bytes());
            out.extend_from_slice(&(data.len() as u16).to_be_bytes());
            out.extend_from_slice(&data);
            out[7] += 1;
        }
    }
    out
}

/// Starts the thread that may block in the host's resolver. It ends with the sender.
fn start_resolver(shared: Arc<Shared>) -> SyncSender<Lookup> {
    let (sender, receiver) = sync_channel(LOOKUPS);
    let spawned = std::thread::Builder::new()
        .name("usernet-resolver".into())
        .spawn(move || resolve_all(&receiver, &shared));
    if let Err(e) = spawned {
        // The receiver is gone with the closure: every query is answered with SERVFAIL.
        tracing::warn!("cannot start the resolver thread: {e}");
    }
    sender
}

fn resolve_all(receiver: &Receiver<Lookup>, shared: &Shared) {
    while let Ok(lookup) = receiver.recv() {
        let found = (lookup.name.as_str(), 0).to_socket_addrs();
        let (rcode, addresses) = match found {
            Ok(list) => {
                let mut wanted: Vec<IpAddr> = list
                    .map(|a| a.ip())
                    .filter(|a| a.is_ipv6() == lookup.want_v6)
                    .collect();
                wanted.dedup();
                (NO_ERROR, wanted)
            }
            Err(_) => (SERV_FAIL, Vec::new()),
        };
        let answer = Answer {
            guest: lookup.guest,
            asked: lookup.asked,
            reply: response(&lookup.request, rcode, &addresses),
            failed: rcode != NO_ERROR,
        };
        shared
            .answers
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push(answer);
        shared.waker.wake();
    }
}
