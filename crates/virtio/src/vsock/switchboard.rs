//! The thread that connects packets and sockets.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::connection::{BUFFER_BYTES, Broken, Connection};
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, SHUTDOWN_F_RECEIVE, SHUTDOWN_F_SEND, VIRTIO_VSOCK_TYPE_STREAM,
    VMADDR_CID_HOST,
};
use super::poll::{self, Ready};
use super::{EVENT, Orders, RX, TX, VsockConfig};
use crate::link::DriverLink;

/// LIMIT: connections at a time.
const MAX_CONNECTIONS: usize = 512;
/// LIMIT: host programs that have connected but not said where to; the oldest goes first.
const MAX_CALLERS: usize = 32;
/// LIMIT: length of `CONNECT <port>\n`.
const MAX_LINE_BYTES: usize = 32;
/// LIMIT: packets without data that wait for buffers; beyond it the guest's packets wait.
const MAX_REPLIES: usize = 1024;
/// LIMIT: data in one packet.
const MAX_PACKET_BYTES: usize = 64 << 10;
/// First port given to connections of the host.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// A connection's name: guest port, host port.
type Key = (u32, u32);

/// A host program that has not sent its line yet.
struct Caller {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a polled descriptor is.
#[derive(Clone, Copy)]
enum Source {
    Wake,
    Listener,
    Caller(usize),
    Connection(Key),
}

pub(super) struct Switchboard {
    config: VsockConfig,
    orders: Arc<Orders>,
    listener: UnixListener,
    woken: UnixStream,
    callers: VecDeque<Caller>,
    connections: BTreeMap<Key, Connection>,
    /// Packets without data for the guest, in order; data follows when there are none.
    replies: VecDeque<Header>,
    next_host_port: u32,
    buffer: Vec<u8>,
}

impl Switchboard {
    pub(super) fn new(
        config: VsockConfig,
        orders: Arc<Orders>,
        listener: UnixListener,
        woken: UnixStream,
    ) -> Switchboard {
        Switchboard {
            config,
            orders,
            listener,
            woken,
            callers: VecDeque::new(),
            connections: BTreeMap::new(),
            replies: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            buffer: vec![0; MAX_PACKET_BYTES],
        }
    }

    /// Body of the thread.
    pub(super) fn run(mut self) {
        while !self.orders.stop.load(Ordering::SeqCst) {
            let link = self.orders.link.get().cloned();
            if self.orders.reset.swap(false, Ordering::SeqCst) {
                self.connections.clear();
                self.replies.clear();
            }
            if let Some(l) = link.as_ref().filter(|l| l.active()) {
                self.send_event(l);
                self.take_packets(l);
                self.send_replies(l);
            }
            self.orders
                .connections
                .store(self.connections.len(), Ordering::Relaxed);
            if let Err(e) = self.wait(link.as_deref()) {
                tracing::error!("vsock stops, cannot wait for its sockets: {e}");
                return;
            }
        }
    }

    fn wait(&mut self, link: Option<&DriverLink>) -> io::Result<()> {
        let active = link.is_some_and(DriverLink::active);
        let read = Ready {
            readable: true,
            ..Ready::default()
        };
        let mut fds: Vec<(BorrowedFd<'_>, Ready)> = vec![(self.woken.as_fd(), read)];
        let mut sources = vec![Source::Wake];
        if active {
            fds.push((self.listener.as_fd(), read));
            sources.push(Source::Listener);
            for (n, c) in self.callers.iter().enumerate() {
                fds.push((c.stream.as_fd(), read));
                sources.push(Source::Caller(n));
            }
            // Data must not overtake a reply; and it needs a buffer.
            let room = self.replies.is_empty() && link.is_some_and(|l| l.has_avail(RX));
            for (key, c) in &self.connections {
                let want = Ready {
                    readable: room && c.wants_input(),
                    writable: c.wants_output(),
                    hung_up: false,
                };
                // A descriptor that nothing is wanted of would report its end for ever.
                if want != Ready::default() || c.watches_end() {
                    fds.push((c.stream().as_fd(), want));
                    sources.push(Source::Connection(*key));
                }
            }
        }
        let ready = poll::wait(&fds)?;
        drop(fds);
        for (source, ready) in sources.into_iter().zip(ready) {
            if ready == Ready::default() {
                continue;
            }
            match (source, link) {
                (Source::Wake, _) => {
                    let mut b = [0; 64];
                    while matches!((&self.woken).read(&mut b), Ok(n) if n > 0) {}
                }
                (Source::Listener, _) => self.accept(),
                (Source::Caller(n), _) => self.read_line(n),
                (Source::Connection(key), Some(l)) => self.serve(l, key, ready),
                _ => {}
            }
        }
        self.callers.retain(|c| c.line.last() != Some(&b'\n'));
        Ok(())
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                if !matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) {
                    // Out of descriptors: the caller stays in the backlog, and asking again at
                    // once would only burn time.
                    tracing::warn!("vsock caller not accepted: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                return;
            }
        };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.callers.len() >= MAX_CALLERS {
            // Marked as answered: its number must stay what it is during this round.
            if let Some(c) = self
                .callers
                .iter_mut()
                .find(|c| c.line.last() != Some(&b'\n'))
            {
                c.line = vec![b'\n'];
            }
        }
        self.callers.push_back(Caller {
            stream,
            line: Vec::new(),
        });
    }

    /// Reads a caller's line, byte by byte so that nothing of its data is taken.
    fn read_line(&mut self, index: usize) {
        let Some(c) = self.callers.get_mut(index) else {
            return;
        };
        while c.line.last() != Some(&b'\n') {
            let mut b = [0];
            match c.stream.read(&mut b) {
                Ok(1) if c.line.len() < MAX_LINE_BYTES => c.line.push(b[0]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // Too long, closed or broken: an empty line, which names no port.
                _ => c.line = vec![b'\n'],
            }
        }
        let port = std::str::from_utf8(&c.line)
            .ok()
            .and_then(|l| l.strip_prefix("CONNECT "))
            .and_then(|p| p.trim_end().parse::<u32>().ok());
        let stream = c.stream.try_clone();
        if let (Some(port), Ok(stream)) = (port, stream)
            && self.connections.len() < MAX_CONNECTIONS
        {
            let key = (port, self.free_host_port());
            self.connections.insert(key, Connection::new(stream, false));
            self.reply(key, OP_REQUEST, 0);
        }
    }

    fn free_host_port(&mut self) -> u32 {
        // Ends: there are more ports than connections.
        loop {
            let port = self.next_host_port;
            self.next_host_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.connections.keys().any(|k| k.1 == port) {
                return port;
            }
        }
    }

    /// A header from the host to the guest.
    fn header(&self, (guest_port, host_port): Key, op: u16, flags: u32) -> Header {
        Header {
            src_cid: VMADDR_CID_HOST,
            dst_cid: u64::from(self.config.guest_cid),
            src_port: host_port,
            dst_port: guest_port,
            kind: VIRTIO_VSOCK_TYPE_STREAM,
            op,
            flags,
            ..Header::default()
        }
    }

    fn reply(&mut self, key: Key, op: u16, flags: u32) {
        let h = self.header(key, op, flags);
        self.replies.push_back(h);
    }

    fn cut(&mut self, key: Key) {
        self.connections.remove(&key);
        self.reply(key, OP_RST, 0);
    }

    /// Tells a restored guest that its connections are gone. §5.10.6.7.
    fn send_event(&mut self, link: &DriverLink) {
        if self.orders.transport_reset.load(Ordering::SeqCst)
            && let Some(chain) = link.pop(EVENT)
        {
            // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
            let n = chain.write_at(link.memory(), 0, &0_u32.to_le_bytes());
            self.orders.transport_reset.store(false, Ordering::SeqCst);
            link.complete(EVENT, chain, n as u32);
        }
    }

    fn take_packets(&mut self, link: &DriverLink) {
        while self.replies.len() < MAX_REPLIES {
            let Some(chain) = link.pop(TX) else { break };
            let mut b = [0; HEADER_BYTES];
            if chain.read_at(link.memory(), 0, &mut b) == b.len() {
                let h = Header::parse(&b);
                let rest = chain.readable_len() - HEADER_BYTES as u64;
                // What is longer than any credit is refused by its length alone.
                let len = u64::from(h.len).min(rest).min(u64::from(BUFFER_BYTES) + 1);
                let mut data = vec![0; len as usize];
                let n = chain.read_at(link.memory(), HEADER_BYTES as u64, &mut data);
                link.push(TX, chain, 0);
                self.handle(&h, data.get(..n).unwrap_or_default());
            } else {
                link.push(TX, chain, 0);
            }
        }
        link.signal(TX);
    }

    fn handle(&mut self, h: &Header, data: &[u8]) {
        if h.dst_cid != VMADDR_CID_HOST || h.src_cid != u64::from(self.config.guest_cid) {
            return;
        }
        let key = (h.src_port, h.dst_port);
        if h.op == OP_RST {
            self.connections.remove(&key);
            return;
        }
        if h.kind != VIRTIO_VSOCK_TYPE_STREAM {
            return self.reply(key, OP_RST, 0);
        }
        if h.op == OP_REQUEST {
            return self.connect(key, h);
        }
        let Some(c) = self.connections.get_mut(&key) else {
            // §5.10.6.4.2: a packet for no connection is answered with RST.
            return self.reply(key, OP_RST, 0);
        };
        c.note_credit(h);
        let result = match h.op {
            OP_RESPONSE if !c.established => {
                c.established = true;
                c.greet(&format!("OK {}\n", h.dst_port))
            }
            _ if !c.established => Err(Broken),
            OP_RW => c.write(data),
            OP_CREDIT_UPDATE => Ok(()),
            OP_CREDIT_REQUEST => {
                self.reply(key, OP_CREDIT_UPDATE, 0);
                Ok(())
            }
            OP_SHUTDOWN if !c.shut_down(h.flags) => Ok(()),
            _ => Err(Broken),
        };
        match result {
            Ok(()) => self.offer_credit(key),
            Err(Broken) => self.cut(key),
        }
    }

    fn connect(&mut self, key: Key, h: &Header) {
        if self.connections.contains_key(&key) || self.connections.len() >= MAX_CONNECTIONS {
            return self.cut(key);
        }
        let mut path = OsString::from(&self.config.base);
        path.push(format!("_{}", key.1));
        match poll::connect(&PathBuf::from(path)) {
            Ok(stream) => {
                let mut c = Connection::new(stream, true);
                c.note_credit(h);
                self.connections.insert(key, c);
                self.reply(key, OP_RESPONSE, 0);
            }
            Err(e) => {
                tracing::debug!("vsock port {} refused: {e}", key.1);
                self.reply(key, OP_RST, 0);
            }
        }
    }

    fn offer_credit(&mut self, key: Key) {
        if self
            .connections
            .get(&key)
            .is_some_and(Connection::owes_credit)
            && !self.replies.iter().any(|r| (r.dst_port, r.src_port) == key)
        {
            self.reply(key, OP_CREDIT_UPDATE, 0);
        }
    }

    fn send_replies(&mut self, link: &DriverLink) {
        while !self.replies.is_empty() {
            let Some(chain) = link.pop(RX) else { break };
            let Some(mut h) = self.replies.pop_front() else {
                break;
            };
            if let Some(c) = self.connections.get_mut(&(h.dst_port, h.src_port)) {
                c.put_credit(&mut h);
            }
            let n = chain.write_at(link.memory(), 0, &h.encode());
            link.push(RX, chain, n as u32);
        }
        link.signal(RX);
    }

    /// Something happened to a connection's socket.
    fn serve(&mut self, link: &DriverLink, key: Key, ready: Ready) {
        let Some(c) = self.connections.get_mut(&key) else {
            return;
        };
        let flushed = if ready.writable { c.flush() } else { Ok(()) };
        if flushed.is_err() || c.finished() {
            return self.cut(key);
        }
        if ready.readable {
            // A reply made in this round goes first; the socket stays readable.
            if self.replies.is_empty() && self.send_data(link, key).is_err() {
                return self.cut(key);
            }
        } else if ready.hung_up
            && let Some(c) = self.connections.get_mut(&key)
            && c.watches_end()
        {
            c.host_gone = true;
            self.reply(key, OP_SHUTDOWN, SHUTDOWN_F_RECEIVE | SHUTDOWN_F_SEND);
        }
        self.offer_credit(key);
    }

    fn send_data(&mut self, link: &DriverLink, key: Key) -> Result<(), Broken> {
        let Some(chain) = link.pop(RX) else {
            return Ok(());
        };
        let room = chain.writable_len().saturating_sub(HEADER_BYTES as u64);
        let max = usize::try_from(room)
            .unwrap_or(usize::MAX)
            .min(MAX_PACKET_BYTES);
        let mut h = self.header(key, OP_RW, 0);
        let read = match self.connections.get_mut(&key) {
            Some(c) if max > 0 => {
                let read = c.read(&mut self.buffer[..max]);
                c.put_credit(&mut h);
                read
            }
            Some(_) => Err(Broken),
            None => Ok(None),
        };
        match read {
            Ok(Some(n)) if n > 0 => {
                h.len = n as u32;
                let head = chain.write_at(link.memory(), 0, &h.encode());
                let data = self.buffer.get(..n).unwrap_or_default();
                let written = head + chain.write_at(link.memory(), head as u64, data);
                link.complete(RX, chain, written as u32);
                return Ok(());
            }
            Ok(Some(_)) => self.reply(key, OP_SHUTDOWN, SHUTDOWN_F_SEND),
            Ok(None) => {}
            Err(Broken) => {
                link.unpop(RX, vec![chain]);
                return Err(Broken);
            }
        }
        link.unpop(RX, vec![chain]);
        Ok(())
    }
}
