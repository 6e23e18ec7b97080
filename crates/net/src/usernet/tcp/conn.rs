//! One TCP connection: the guest's peer on one side, a host socket on the other.
//!
//! ```text
//!   guest SYN ─▶ Connecting ─(host connected)─▶ SynReceived ─(ACK)─┐
//!   forward accepted ─▶ SynSent ─(SYN-ACK)────────────────────────▶├▶ Open ─▶ TimeWait ─▶ gone
//!                                        (any reset or failure)────┴────────────────────▶ gone
//! ```
//!
//! `Open` covers what RFC 9293 calls ESTABLISHED, FIN-WAIT, CLOSE-WAIT, CLOSING and LAST-ACK: the
//! two directions end independently, so two flags for each say more than six names.
//!
//! There is no congestion control: the link is memory, and the guest's window and the card's
//! buffers are what limits. Losses (a card without buffers) are repaired by retransmission.

use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use smoltcp::wire::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, TCP_HEADER_LEN, TcpControl, TcpPacket, TcpRepr,
    TcpSeqNumber,
};

use super::super::counters::{Counters, count};
use super::super::link::Link;
use super::super::sys;
use super::ring::{Budget, Ring};
use crate::offload;

/// Retransmission time-out limits. The lower one is above the delayed ACK of common guests.
const RTO_MIN: Duration = Duration::from_millis(250);
const RTO_MAX: Duration = Duration::from_secs(60);
const RTO_FIRST: Duration = Duration::from_secs(1);
/// LIMIT: unanswered retransmissions before the connection is given up.
const RETRIES: u32 = 12;
/// LIMIT: unanswered SYNs: about a minute.
const SYN_RETRIES: u32 = 5;
/// How long the end of a connection is remembered (shorter than 2 MSL: nothing gets lost on the
/// way for minutes here).
const TIME_WAIT: Duration = Duration::from_secs(10);
/// How long the host may take to connect. The kernel's own limit is two minutes.
const CONNECT: Duration = Duration::from_secs(130);
/// Silence after which the guest is asked whether it is still there (RFC 9293 §3.8.4).
const KEEP_ALIVE: Duration = Duration::from_secs(7200);
const KEEP_ALIVE_AGAIN: Duration = Duration::from_secs(75);
/// Our window scale: windows up to 1 GiB would need 14; the buffers fit into 8 MiB.
const WINDOW_SCALE: u8 = 7;
/// Bytes moved for one connection before others get their turn.
const TURN_BYTES: usize = 1 << 20;
/// What a guest without the option takes (RFC 9293 §3.7.1).
const DEFAULT_MSS: usize = 536;

/// Both ends, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::usernet) struct Flow {
    /// The guest's end.
    pub(in crate::usernet) guest: SocketAddr,
    /// The other end, or what stands for it.
    pub(in crate::usernet) remote: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host is connecting; the guest has had no answer yet.
    Connecting,
    /// Our SYN-ACK is on its way.
    SynReceived,
    /// Our SYN is on its way (port forward).
    SynSent,
    Open,
    TimeWait,
}

/// What is to be done with a connection after it was handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Keep,
    /// There is more to do now.
    Again,
    Remove,
    /// The host could not connect: remove and tell the guest why.
    Failed(ConnectFailure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectFailure {
    Refused,
    Unreachable,
}

/// `a - b` in sequence space.
fn distance(a: TcpSeqNumber, b: TcpSeqNumber) -> i32 {
    a.0.wrapping_sub(b.0)
}

/// What a connection needs from its surroundings while it is handled.
pub(super) struct Ctx<'a> {
    pub(super) link: &'a mut Link,
    pub(super) budget: &'a mut Budget,
    pub(super) counters: &'a Counters,
    pub(super) now: Instant,
}

pub(super) struct Conn {
    pub(super) flow: Flow,
    pub(super) state: State,
    socket: Option<TcpStream>,
    host_readable: bool,
    host_writable: bool,
    /// The host's peer may have ended its side: read until the end is seen.
    host_hangup: bool,
    host_eof: bool,
    host_shutdown: bool,

    /// To the guest: bytes from `snd_una` on.
    tx: Ring,
    snd_una: TcpSeqNumber,
    snd_nxt: TcpSeqNumber,
    /// The highest `snd_nxt` ever: what acknowledgements may cover.
    snd_max: TcpSeqNumber,
    snd_wnd: usize,
    snd_scale: u8,
    mss: usize,
    fin_sent: bool,
    fin_acked: bool,
    dup_acks: u32,
    recover: Option<TcpSeqNumber>,

    /// From the guest: bytes not yet taken by the host socket.
    rx: Ring,
    rcv_nxt: TcpSeqNumber,
    /// Right edge of the window that was advertised.
    rcv_edge: TcpSeqNumber,
    rcv_scale: u8,
    fin_received: bool,
    ack_now: bool,

    srtt: Option<Duration>,
    rttvar: Duration,
    rto: Duration,
    timed: Option<(TcpSeqNumber, Instant)>,
    retries: u32,
    /// Retransmission, or what else the state waits for.
    resend_at: Option<Instant>,
    last_heard: Instant,
    probes: u32,
    /// Where this connection's entry in the timer heap is, if it has one.
    pub(super) timer: Option<Instant>,
    /// Set while it is in the list of connections to handle.
    pub(super) queued: bool,
}

impl Conn {
    fn new(flow: Flow, socket: TcpStream, state: State, limit: usize, now: Instant) -> Conn {
        let iss = TcpSeqNumber(sys::random_u32() as i32);
        let _ = socket.set_nodelay(true);
        Conn {
            flow,
            state,
            socket: Some(socket),
            host_readable: false,
            host_writable: false,
            host_hangup: false,
            host_eof: false,
            host_shutdown: false,
            tx: Ring::new(limit),
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            snd_wnd: 0,
            snd_scale: 0,
            mss: DEFAULT_MSS,
            fin_sent: false,
            fin_acked: false,
            dup_acks: 0,
            recover: None,
            rx: Ring::new(limit),
            rcv_nxt: TcpSeqNumber(0),
            rcv_edge: TcpSeqNumber(0),
            rcv_scale: 0,
            fin_received: false,
            ack_now: false,
            srtt: None,
            rttvar: Duration::ZERO,
            rto: RTO_FIRST,
            timed: None,
            retries: 0,
            resend_at: None,
            last_heard: now,
            probes: 0,
            timer: None,
            queued: false,
        }
    }

    /// The guest's SYN has come and the host has started to connect.
    pub(super) fn outbound(
        flow: Flow,
        socket: TcpStream,
        syn: &TcpRepr<'_>,
        limit: usize,
        now: Instant,
    ) -> Conn {
        let mut conn = Conn::new(flow, socket, State::Connecting, limit, now);
        conn.take_syn(syn);
        conn.resend_at = Some(now + CONNECT);
        conn
    }

    /// A port forward has accepted a connection.
    pub(super) fn inbound(flow: Flow, socket: TcpStream, limit: usize, now: Instant) -> Conn {
        let mut conn = Conn::new(flow, socket, State::SynSent, limit, now);
        conn.host_writable = true;
        conn.host_readable = true;
        conn.rcv_scale = WINDOW_SCALE;
        conn
    }

    pub(super) fn socket(&self) -> Option<&TcpStream> {
        self.socket.as_ref()
    }

    /// What a SYN says of the guest.
    fn take_syn(&mut self, syn: &TcpRepr<'_>) {
        self.rcv_nxt = syn.seq_number + 1;
        self.rcv_edge = self.rcv_nxt;
        // RFC 7323 §2.2: scaling is on only if both have sent the option; never in the SYN itself.
        self.snd_wnd = usize::from(syn.window_len);
        match syn.window_scale {
            Some(scale) => (self.snd_scale, self.rcv_scale) = (scale, WINDOW_SCALE),
            None => (self.snd_scale, self.rcv_scale) = (0, 0),
        }
        // LIMIT: a tiny MSS would make us send a frame per byte.
        self.mss = syn
            .max_seg_size
            .map_or(DEFAULT_MSS, |m| usize::from(m).max(64));
    }

    /// The sequence number of the guest's SYN; meaningful while connecting.
    pub(super) fn syn_of_guest(&self) -> TcpSeqNumber {
        TcpSeqNumber(self.rcv_nxt.0.wrapping_sub(1))
    }

    /// What epoll has said of the host socket.
    pub(super) fn host_event(&mut self, event: &sys::Event) {
        self.host_readable |= event.readable;
        self.host_writable |= event.writable;
        self.host_hangup |= event.hangup;
    }

    fn ip_header_len(&self) -> usize {
        if self.flow.guest.is_ipv4() {
            IPV4_HEADER_LEN
        } else {
            IPV6_HEADER_LEN
        }
    }

    /// The longest payload of one segment to the guest.
    fn segment_limit(&self, link: &Link) -> usize {
        let headers = self.ip_header_len() + TCP_HEADER_LEN;
        let by_mtu = usize::from(link.config().mtu) - headers;
        let large = link
            .large_segment(self.flow.guest.is_ipv4())
            .min(usize::from(u16::MAX))
            .saturating_sub(headers);
        self.mss.min(by_mtu).max(large)
    }

    fn window(&mut self) -> u16 {
        let room = self.rx.room();
        // A promise once made is kept: the right edge never moves back.
        let promised = distance(self.rcv_edge, self.rcv_nxt).max(0) as usize;
        let scaled = (room.max(promised) >> self.rcv_scale).min(usize::from(u16::MAX));
        let edge = self.rcv_nxt + (scaled << self.rcv_scale);
        if distance(edge, self.rcv_edge) > 0 {
            self.rcv_edge = edge;
        }
        scaled as u16
    }

    /// Sends one segment; `len` bytes of `tx` from `snd_una + offset` on.
    fn emit(
        &mut self,
        ctx: &mut Ctx<'_>,
        control: TcpControl,
        seq: TcpSeqNumber,
        offset: usize,
        len: usize,
    ) -> bool {
        let syn = control == TcpControl::Syn;
        let headers = self.ip_header_len() + TCP_HEADER_LEN;
        let with_ack = self.state != State::SynSent;
        // RFC 7323 §2.2: the window of a SYN is not scaled.
        let window_len = if syn {
            let bytes = self.rx.room().min(usize::from(u16::MAX));
            self.rcv_edge = self.rcv_nxt + bytes;
            bytes as u16
        } else {
            self.window()
        };
        let repr = TcpRepr {
            src_port: self.flow.remote.port(),
            dst_port: self.flow.guest.port(),
            control,
            seq_number: seq,
            ack_number: with_ack.then_some(self.rcv_nxt),
            window_len,
            window_scale: (syn && self.rcv_scale != 0).then_some(self.rcv_scale),
            max_seg_size: syn.then(|| {
                (usize::from(ctx.link.config().mtu) - headers).min(usize::from(u16::MAX)) as u16
            }),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        self.ack_now = false;
        let (a, b) = self.tx.filled(offset, len);
        let mss = self.mss.min(usize::from(ctx.link.config().mtu) - headers);
        send_segment(ctx.link, self.flow, &repr, a, b, mss)
    }

    fn emit_ack(&mut self, ctx: &mut Ctx<'_>) {
        let seq = if distance(self.snd_max, self.snd_nxt) > 0 {
            self.snd_max
        } else {
            self.snd_nxt
        };
        self.emit(ctx, TcpControl::None, seq, 0, 0);
    }

    /// Tells the guest that the connection is over and the host too.
    pub(super) fn abort(&mut self, ctx: &mut Ctx<'_>) {
        if self.state != State::TimeWait && self.state != State::Connecting {
            count(&ctx.counters.tcp_resets);
            self.emit(ctx, TcpControl::Rst, self.snd_max, 0, 0);
        }
        self.reset_host();
    }

    /// Ends the host's side with a reset.
    pub(super) fn reset_host(&mut self) {
        if let Some(socket) = self.socket.take() {
            sys::reset_on_close(&socket);
        }
    }

    /// A segment of this connection from the guest.
    pub(super) fn segment(&mut self, ctx: &mut Ctx<'_>, seg: &TcpRepr<'_>) -> Outcome {
        self.last_heard = ctx.now;
        self.probes = 0;
        match self.state {
            // The SYN again: an answer follows when the host has connected.
            State::Connecting => {
                if seg.control == TcpControl::Rst && seg.seq_number == self.rcv_nxt {
                    self.reset_host();
                    return Outcome::Remove;
                }
                Outcome::Keep
            }
            State::SynSent => self.segment_in_syn_sent(ctx, seg),
            State::SynReceived | State::Open | State::TimeWait => self.segment_in_open(ctx, seg),
        }
    }

    /// RFC 9293 §3.10.7.3.
    fn segment_in_syn_sent(&mut self, ctx: &mut Ctx<'_>, seg: &TcpRepr<'_>) -> Outcome {
        let Some(ack) = seg.ack_number else {
            return Outcome::Keep;
        };
        if distance(ack, self.snd_una) != 1 {
            if seg.control != TcpControl::Rst {
                reset_for(ctx.link, ctx.counters, self.flow, seg);
            }
            return Outcome::Keep;
        }
        match seg.control {
            TcpControl::Rst => {
                self.reset_host();
                Outcome::Remove
            }
            TcpControl::Syn => {
                self.take_syn(seg);
                self.established(ack);
                self.ack_now = true;
                Outcome::Again
            }
            _ => Outcome::Keep,
        }
    }

    fn established(&mut self, ack: TcpSeqNumber) {
        self.state = State::Open;
        self.snd_una = ack;
        self.snd_nxt = ack;
        self.snd_max = ack;
        self.retries = 0;
        self.rto = RTO_FIRST;
        self.resend_at = None;
    }

    /// RFC 9293 §3.10.7.4 with the checks of RFC 5961.
    fn segment_in_open(&mut self, ctx: &mut Ctx<'_>, seg: &TcpRepr<'_>) -> Outcome {
        let start = distance(seg.seq_number, self.rcv_nxt);
        let window = distance(self.rcv_edge, self.rcv_nxt).max(0);
        if seg.control == TcpControl::Rst {
            if start == 0 {
                self.reset_host();
                return Outcome::Remove;
            }
            if (0..window).contains(&start) {
                self.emit_ack(ctx);
            }
            return Outcome::Keep;
        }
        if seg.control == TcpControl::Syn {
            if self.state == State::SynReceived && start == -1 {
                self.send_syn(ctx);
            } else {
                self.emit_ack(ctx);
            }
            return Outcome::Keep;
        }
        let len = seg.segment_len() as i32;
        // A keep-alive probe is one byte (or none) before the window; it is answered as well.
        if start > window || start.saturating_add(len) < 0 || (start < 0 && len == 0) {
            self.emit_ack(ctx);
            return Outcome::Keep;
        }
        if seg.ack_number.is_none() {
            return Outcome::Keep;
        }
        if !self.take_ack(ctx, seg) {
            self.emit_ack(ctx);
            return Outcome::Keep;
        }
        self.take_payload(ctx, seg, start);
        Outcome::Again
    }

    /// Handles the acknowledgement. False if it covers what was never sent.
    fn take_ack(&mut self, ctx: &mut Ctx<'_>, seg: &TcpRepr<'_>) -> bool {
        let Some(ack) = seg.ack_number else {
            return false;
        };
        if distance(ack, self.snd_max) > 0 {
            return false;
        }
        let mut advance = distance(ack, self.snd_una);
        if self.state == State::SynReceived {
            if advance < 1 {
                return false;
            }
            let iss = self.snd_una;
            self.established(iss + 1);
            advance -= 1;
        }
        if advance < 0 {
            // Old, but the segment's data may be new.
            return true;
        }
        let window = usize::from(seg.window_len) << self.snd_scale;
        if advance == 0 {
            let in_flight = distance(self.snd_max, self.snd_una) > 0;
            let pure = seg.payload.is_empty() && seg.control == TcpControl::None;
            if in_flight && pure && window == self.snd_wnd && window != 0 {
                self.dup_acks += 1;
                // RFC 5681 §3.2.
                if self.dup_acks == 3 && self.recover.is_none() {
                    self.recover = Some(self.snd_max);
                    self.resend_first(ctx);
                }
            }
            if self.snd_wnd == 0 && window > 0 {
                // What probed the closed window was not taken.
                self.snd_nxt = self.snd_una;
            }
            self.snd_wnd = window;
            self.retries = 0;
            return true;
        }
        self.snd_wnd = window;
        let mut acked = advance as usize;
        if self.fin_sent && ack == self.snd_max && acked > self.tx.len() {
            self.fin_acked = true;
            acked -= 1;
        }
        self.tx.consume(acked);
        self.tx.release(ctx.budget, false);
        self.snd_una = ack;
        if distance(self.snd_nxt, ack) < 0 {
            self.snd_nxt = ack;
        }
        self.dup_acks = 0;
        self.retries = 0;
        self.measure(ack, ctx.now);
        if let Some(recover) = self.recover {
            // RFC 6582: a partial acknowledgement shows the next hole.
            if distance(ack, recover) >= 0 {
                self.recover = None;
            } else {
                self.resend_first(ctx);
            }
        }
        self.resend_at = None;
        true
    }

    /// RFC 6298 §2, with Karn's rule: only segments sent once are timed.
    fn measure(&mut self, ack: TcpSeqNumber, now: Instant) {
        let rtt = match self.timed {
            Some((seq, at)) if distance(ack, seq) >= 0 => {
                self.timed = None;
                now.duration_since(at)
            }
            _ => {
                // Progress ends the backing off.
                if let Some(srtt) = self.srtt {
                    self.rto = (srtt + self.rttvar * 4).clamp(RTO_MIN, RTO_MAX);
                }
                return;
            }
        };
        let srtt = match self.srtt {
            None => {
                self.rttvar = rtt / 2;
                rtt
            }
            Some(srtt) => {
                self.rttvar = (self.rttvar * 3 + srtt.abs_diff(rtt)) / 4;
                (srtt * 7 + rtt) / 8
            }
        };
        self.srtt = Some(srtt);
        self.rto = (srtt + self.rttvar * 4).clamp(RTO_MIN, RTO_MAX);
    }

    /// Handles data and FIN. `start` is the segment's distance from `rcv_nxt`.
    fn take_payload(&mut self, ctx: &mut Ctx<'_>, seg: &TcpRepr<'_>, start: i32) {
        let has_fin = seg.control == TcpControl::Fin;
        if seg.payload.is_empty() && !has_fin {
            return;
        }
        self.ack_now = true;
        if start > 0 {
            // A hole: the repeated acknowledgement makes the guest send it again.
            self.emit_ack(ctx);
            return;
        }
        if self.fin_received {
            return;
        }
        let skip = start.unsigned_abs() as usize;
        let Some(data) = seg.payload.get(skip..) else {
            return;
        };
        let window = distance(self.rcv_edge, self.rcv_nxt).max(0) as usize;
        let data = data.get(..window).unwrap_or(data);
        let all = skip + data.len() == seg.payload.len();
        let mut taken = data.len();
        if self.host_shutdown || self.socket.is_none() {
            // Nobody will read it.
        } else {
            self.rx.reserve(data.len(), ctx.budget);
            taken = self.rx.push(data);
        }
        self.rcv_nxt += taken;
        if has_fin && all && taken == data.len() {
            self.rcv_nxt += 1;
            self.fin_received = true;
        }
    }

    /// Moves what can be moved in both directions. Called when anything may have changed.
    pub(super) fn advance(&mut self, ctx: &mut Ctx<'_>) -> Outcome {
        match self.state {
            State::Connecting => return self.finish_connect(ctx),
            State::SynSent if self.resend_at.is_none() => {
                self.send_syn(ctx);
                return Outcome::Keep;
            }
            State::SynSent | State::SynReceived => return Outcome::Keep,
            State::TimeWait => {
                if self.ack_now {
                    self.emit_ack(ctx);
                }
                return Outcome::Keep;
            }
            State::Open => {}
        }
        if self.drain_to_host().is_err() {
            self.abort(ctx);
            return Outcome::Remove;
        }
        let again = match self.feed_guest(ctx) {
            Ok(again) => again,
            Err(_) => {
                self.abort(ctx);
                return Outcome::Remove;
            }
        };
        let grown = distance(self.rcv_nxt + self.rx.room(), self.rcv_edge);
        // RFC 9293 §3.8.6.2.2: a window update when it is worth a segment or two.
        let closed = distance(self.rcv_edge, self.rcv_nxt) < (2 * self.mss) as i32;
        if self.ack_now || (closed && grown >= (2 * self.mss) as i32) {
            self.emit_ack(ctx);
        }
        if self.fin_received && self.fin_acked && self.rx.len() == 0 {
            return self.finish(ctx);
        }
        if again { Outcome::Again } else { Outcome::Keep }
    }

    /// Both directions have ended.
    fn finish(&mut self, ctx: &mut Ctx<'_>) -> Outcome {
        self.socket = None;
        self.tx.release(ctx.budget, true);
        self.rx.release(ctx.budget, true);
        self.state = State::TimeWait;
        self.resend_at = Some(ctx.now + TIME_WAIT);
        Outcome::Keep
    }

    fn finish_connect(&mut self, ctx: &mut Ctx<'_>) -> Outcome {
        if !self.host_writable {
            return Outcome::Keep;
        }
        let Some(socket) = &self.socket else {
            return Outcome::Remove;
        };
        let error = match socket.take_error() {
            Ok(None) if socket.peer_addr().is_ok() => {
                self.state = State::SynReceived;
                self.resend_at = None;
                self.send_syn(ctx);
                return Outcome::Keep;
            }
            // An early event: not connected yet, but no failure either.
            Ok(None) => {
                self.host_writable = false;
                return Outcome::Keep;
            }
            Ok(Some(e)) | Err(e) => e,
        };
        Outcome::Failed(connect_failure(&error))
    }

    fn send_syn(&mut self, ctx: &mut Ctx<'_>) {
        self.snd_nxt = self.snd_una + 1;
        self.snd_max = self.snd_nxt;
        self.resend_at = Some(ctx.now + self.rto);
        self.emit(ctx, TcpControl::Syn, self.snd_una, 0, 0);
    }

    /// The guest's address became known: its SYN need not wait for the timer.
    pub(super) fn neighbor_learned(&mut self, ctx: &mut Ctx<'_>) {
        if matches!(self.state, State::SynSent | State::SynReceived) {
            self.send_syn(ctx);
        }
    }

    /// Guest to host.
    fn drain_to_host(&mut self) -> std::io::Result<()> {
        let Some(socket) = &mut self.socket else {
            return Ok(());
        };
        while self.host_writable && self.rx.len() > 0 {
            match self.rx.drain_to(socket) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => self.host_writable = false,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.fin_received && !self.host_shutdown && self.rx.len() == 0 {
            self.host_shutdown = true;
            // The peer may be gone already: that shows when reading.
            let _ = socket.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Host to guest: fills the ring and sends what window and card take. True if there is more
    /// to do at once.
    fn feed_guest(&mut self, ctx: &mut Ctx<'_>) -> std::io::Result<bool> {
        let mut moved = 0;
        loop {
            let got = self.read_host(ctx)?;
            moved += got;
            self.send_data(ctx);
            if got == 0 || !ctx.link.ready() {
                return Ok(false);
            }
            if moved >= TURN_BYTES {
                return Ok(true);
            }
        }
    }

    fn read_host(&mut self, ctx: &mut Ctx<'_>) -> std::io::Result<usize> {
        if !self.host_readable || self.host_eof {
            return Ok(0);
        }
        let Some(socket) = &mut self.socket else {
            return Ok(0);
        };
        // Room for what the guest takes soon, but not the whole limit for every idle connection.
        let want = self.tx.room().min(self.tx.len().max(64 << 10));
        let space = self.tx.reserve(want, ctx.budget);
        if space == 0 {
            return Ok(0);
        }
        match self.tx.fill_from(socket) {
            Ok(0) => {
                self.host_eof = true;
                Ok(0)
            }
            Ok(n) => {
                // epoll(7): a short read of a stream shows that it is empty.
                if n < space && !self.host_hangup {
                    self.host_readable = false;
                }
                Ok(n)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                self.host_readable = false;
                self.tx.release(ctx.budget, false);
                Ok(0)
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Sends new segments while the guest's window and card take them.
    fn send_data(&mut self, ctx: &mut Ctx<'_>) {
        let limit = self.segment_limit(ctx.link);
        while !self.fin_acked && ctx.link.ready() {
            let sent = distance(self.snd_nxt, self.snd_una).max(0) as usize;
            let unsent = self.tx.len().saturating_sub(sent);
            let fin = self.host_eof && sent + unsent == self.tx.len() && sent <= self.tx.len();
            if unsent == 0 && !fin {
                break;
            }
            let usable = self.snd_wnd.saturating_sub(sent);
            let len = unsent.min(limit).min(usable);
            // RFC 9293 §3.8.6.2.1: no silly windows; a closed window is probed by the timer.
            if len < unsent && len < limit && (sent > 0 || len == 0) && len < self.mss {
                break;
            }
            let last = len == unsent;
            let control = match (last, fin) {
                (true, true) => TcpControl::Fin,
                (true, false) => TcpControl::Psh,
                _ => TcpControl::None,
            };
            let seq = self.snd_nxt;
            let ok = self.emit(ctx, control, seq, sent, len);
            let fresh = distance(seq, self.snd_max) >= 0;
            self.snd_nxt = seq + len + usize::from(control == TcpControl::Fin);
            self.fin_sent |= control == TcpControl::Fin;
            if distance(self.snd_nxt, self.snd_max) > 0 {
                self.snd_max = self.snd_nxt;
            }
            if fresh && ok && self.timed.is_none() {
                self.timed = Some((self.snd_nxt, ctx.now));
            }
            if !fresh {
                count(&ctx.counters.tcp_retransmits);
                self.timed = None;
            }
            if !ok {
                break;
            }
        }
        let waiting = distance(self.snd_max, self.snd_una) > 0 || self.tx.len() > 0;
        if waiting && self.resend_at.is_none() {
            self.resend_at = Some(ctx.now + self.rto);
        } else if !waiting {
            self.resend_at = None;
        }
    }

    /// Sends the first unacknowledged segment again.
    fn resend_first(&mut self, ctx: &mut Ctx<'_>) {
        let limit = self.segment_limit(ctx.link);
        let len = self.tx.len().min(limit);
        let fin = self.fin_sent && len == self.tx.len();
        if len == 0 && !fin {
            return;
        }
        count(&ctx.counters.tcp_retransmits);
        self.timed = None;
        let control = if fin {
            TcpControl::Fin
        } else {
            TcpControl::Psh
        };
        self.emit(ctx, control, self.snd_una, 0, len);
        self.resend_at = Some(ctx.now + self.rto);
    }

    /// When this connection wants to hear of the time.
    pub(super) fn deadline(&self) -> Option<Instant> {
        if self.state == State::Open {
            let idle = self.last_heard + KEEP_ALIVE + KEEP_ALIVE_AGAIN * self.probes;
            return Some(self.resend_at.map_or(idle, |at| at.min(idle)));
        }
        self.resend_at
    }

    /// The time given by [`Conn::deadline`] has come.
    pub(super) fn expired(&mut self, ctx: &mut Ctx<'_>) -> Outcome {
        match self.state {
            State::Connecting => return Outcome::Failed(ConnectFailure::Unreachable),
            State::TimeWait => return Outcome::Remove,
            _ => {}
        }
        if self.resend_at.is_some_and(|at| at <= ctx.now) {
            return self.resend(ctx);
        }
        // Keep-alive: a segment before the window, which must be acknowledged.
        self.probes += 1;
        if self.probes > RETRIES {
            self.abort(ctx);
            return Outcome::Remove;
        }
        let seq = TcpSeqNumber(self.snd_una.0.wrapping_sub(1));
        self.emit(ctx, TcpControl::None, seq, 0, 0);
        Outcome::Keep
    }

    fn resend(&mut self, ctx: &mut Ctx<'_>) -> Outcome {
        if self.state == State::Open && !ctx.link.ready() {
            // The card has no buffers (or the VM is paused): that is not the guest's silence.
            self.resend_at = Some(ctx.now + self.rto);
            return Outcome::Keep;
        }
        self.retries += 1;
        if self.retries
            > if self.state == State::Open {
                RETRIES
            } else {
                SYN_RETRIES
            }
        {
            self.abort(ctx);
            return Outcome::Remove;
        }
        self.rto = (self.rto * 2).min(RTO_MAX);
        self.timed = None;
        self.recover = None;
        self.dup_acks = 0;
        if self.state != State::Open {
            self.send_syn(ctx);
            return Outcome::Keep;
        }
        self.resend_at = None;
        if self.snd_wnd == 0 && self.tx.len() > 0 {
            // RFC 9293 §3.8.6.1: one byte beyond a closed window.
            self.emit(ctx, TcpControl::None, self.snd_una, 0, 1);
            if distance(self.snd_max, self.snd_una) == 0 {
                self.snd_nxt = self.snd_una + 1;
                self.snd_max = self.snd_nxt;
            }
            self.resend_at = Some(ctx.now + self.rto);
            return Outcome::Keep;
        }
        // Everything from the first unacknowledged byte on goes out again as the window permits.
        self.snd_nxt = self.snd_una;
        Outcome::Again
    }

    /// True while the connection holds a host socket and can carry data.
    pub(super) fn wants_link(&self) -> bool {
        self.state == State::Open
            && (self.tx.len() > 0 || self.host_readable || (self.host_eof && !self.fin_sent))
    }

    pub(super) fn release(&mut self, budget: &mut Budget) {
        self.tx.release(budget, true);
        self.rx.release(budget, true);
    }

    /// Where the next connection with the same addresses must begin at least (RFC 9293 §3.6.1).
    pub(super) fn may_be_replaced_by(&self, syn: &TcpRepr<'_>) -> bool {
        self.state == State::TimeWait && distance(syn.seq_number, self.rcv_nxt) > 0
    }
}

/// What a failed connect means for the guest.
pub(super) fn connect_failure(error: &std::io::Error) -> ConnectFailure {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED | libc::ECONNRESET) => ConnectFailure::Refused,
        _ => ConnectFailure::Unreachable,
    }
}

/// Sends a segment with a payload in two pieces. The guest, if it takes more than `mss` bytes in
/// one frame, is to see several segments of that length.
fn send_segment(
    link: &mut Link,
    flow: Flow,
    repr: &TcpRepr<'_>,
    a: &[u8],
    b: &[u8],
    mss: usize,
) -> bool {
    let (src, dst): (IpAddr, IpAddr) = (flow.remote.ip(), flow.guest.ip());
    let left_out = link.leave_out(src.is_ipv4(), a.len() + b.len(), mss);
    let header = repr.header_len();
    let length = header + a.len() + b.len();
    link.send_ip(src, dst, IpProtocol::Tcp, length, |out| {
        let mut packet = TcpPacket::new_unchecked(&mut *out);
        let ignored = smoltcp::phy::ChecksumCapabilities::ignored();
        repr.emit(&mut packet, &src.into(), &dst.into(), &ignored);
        let body = packet.payload_mut();
        body[..a.len()].copy_from_slice(a);
        body[a.len()..].copy_from_slice(b);
        let pseudo = pseudo_sum(src, dst, length);
        let sum = if left_out {
            pseudo
        } else {
            packet.set_checksum(0);
            let body = u32::from(offload::ones_sum(out)) + u32::from(pseudo);
            !((body & 0xffff) + (body >> 16)) as u16
        };
        TcpPacket::new_unchecked(out).set_checksum(sum);
    })
}

/// Sum of the pseudo-header of a segment (RFC 9293 §3.1), folded.
fn pseudo_sum(src: IpAddr, dst: IpAddr, length: usize) -> u16 {
    let mut addresses = [0; 32];
    match (src, dst) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            addresses[..4].copy_from_slice(&a.octets());
            addresses[4..8].copy_from_slice(&b.octets());
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            addresses[..16].copy_from_slice(&a.octets());
            addresses[16..].copy_from_slice(&b.octets());
        }
        _ => {}
    }
    let sum = u32::from(offload::ones_sum(&addresses)) + u32::from(u8::from(IpProtocol::Tcp));
    let sum = sum + (length as u32 & 0xffff) + (length as u32 >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Answers a segment that belongs to no connection with a reset (RFC 9293 §3.10.7.1).
pub(super) fn reset_for(link: &mut Link, counters: &Counters, flow: Flow, seg: &TcpRepr<'_>) {
    if seg.control == TcpControl::Rst {
        return;
    }
    count(&counters.tcp_resets);
    let (seq_number, ack_number) = match seg.ack_number {
        Some(ack) => (ack, None),
        None => (TcpSeqNumber(0), Some(seg.seq_number + seg.segment_len())),
    };
    let repr = TcpRepr {
        src_port: flow.remote.port(),
        dst_port: flow.guest.port(),
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    send_segment(link, flow, &repr, &[], &[], DEFAULT_MSS);
}
