//! Bytes to and from a client: plain, or in WebSocket frames (RFC 6455).

use std::io::{self, BufReader, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pyrite_vdev::bus::lock;
use sha1::{Digest, Sha1};

use crate::listen::Stream;

/// How long the opening may take, message by message.
const OPENING: Duration = Duration::from_secs(10);
/// How long a viewer is waited for that does not read.
const STALLED: Duration = Duration::from_secs(20);
/// A viewer that speaks first within this time speaks WebSocket; others wait for our version.
const SPEAKS_FIRST: Duration = Duration::from_millis(150);
/// LIMIT: bytes of an HTTP request.
const REQUEST_BYTES: usize = 8192;
/// LIMIT: bytes of a control frame. RFC 6455 §5.5.
const CONTROL_BYTES: u64 = 125;
/// RFC 6455 §1.3.
const ACCEPT_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

const OP_CONTINUATION: u8 = 0;
const OP_BINARY: u8 = 2;
const OP_CLOSE: u8 = 8;
const OP_PING: u8 = 9;
const OP_PONG: u8 = 10;

pub(super) fn violation(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// The sending half. Clones send to the same client.
#[derive(Clone)]
pub(super) struct Sender {
    stream: Arc<Mutex<Stream>>,
    framed: bool,
}

impl Sender {
    /// Sends all of `bytes` as one piece.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.frame(OP_BINARY, bytes)
    }

    fn frame(&self, op: u8, bytes: &[u8]) -> io::Result<()> {
        let mut stream = lock(&self.stream);
        if self.framed {
            let mut head = vec![0x80 | op];
            match bytes.len() {
                n @ 0..=125 => head.push(n as u8),
                n @ 126..=0xffff => {
                    head.push(126);
                    head.extend((n as u16).to_be_bytes());
                }
                n => {
                    head.push(127);
                    head.extend((n as u64).to_be_bytes());
                }
            }
            stream.write_all(&head)?;
        }
        stream.write_all(bytes)
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        lock(&self.stream).close();
    }
}

/// The receiving half.
pub(super) struct Receiver {
    stream: BufReader<Stream>,
    sender: Sender,
    /// Bytes left of the WebSocket frame being read.
    left: u64,
    mask: [u8; 4],
    mask_at: usize,
}

/// Both halves of a new connection, after the WebSocket handshake if the client wants one.
/// `has_password`: clients must prove that they know it, so that web pages may connect.
pub(super) fn open(stream: Stream, has_password: bool) -> io::Result<(Receiver, Sender)> {
    stream.set_write_timeout(STALLED)?;
    stream.set_read_timeout(Some(SPEAKS_FIRST))?;
    let out = Arc::new(Mutex::new(stream.try_clone()?));
    let mut from = BufReader::with_capacity(REQUEST_BYTES, stream);
    let speaks_first = match io::BufRead::fill_buf(&mut from) {
        Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) => true,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ) =>
        {
            false
        }
        Err(e) => return Err(e),
    };
    from.get_ref().set_read_timeout(Some(OPENING))?;
    let mut sender = Sender {
        stream: out,
        framed: false,
    };
    // A client that is quick with "RFB ..." needs no answer to be one of ours.
    if speaks_first && from.buffer().first() == Some(&b'G') {
        let answer = upgrade(&mut from, has_password)?;
        sender.send(answer.as_bytes())?;
        sender.framed = true;
    }
    let receiver = Receiver {
        stream: from,
        sender: sender.clone(),
        left: 0,
        mask: [0; 4],
        mask_at: 0,
    };
    Ok((receiver, sender))
}

/// The answer to a WebSocket request. RFC 6455 §4.2.
fn upgrade(from: &mut BufReader<Stream>, has_password: bool) -> io::Result<String> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        request.push(byte[0]);
        // LIMIT: REQUEST_BYTES.
        if request.len() > REQUEST_BYTES {
            return Err(violation("an HTTP request that is too long"));
        }
    }
    let text = String::from_utf8_lossy(&request);
    let field = |name: &str| {
        text.lines().skip(1).find_map(|l| {
            let (n, v) = l.split_once(':')?;
            n.trim().eq_ignore_ascii_case(name).then(|| v.trim())
        })
    };
    let is_websocket = text.starts_with("GET ")
        && field("upgrade").is_some_and(|u| u.eq_ignore_ascii_case("websocket"));
    let key = field("sec-websocket-key").filter(|k| is_websocket && k.len() == 24);
    let key = key.ok_or_else(|| violation("an HTTP request that is none for a WebSocket"))?;
    // Any web page that the user looks at can open a WebSocket to the loopback.
    if let Some(origin) = field("origin").filter(|_| !has_password) {
        let host = origin.split_once("://").map_or(origin, |(_, rest)| rest);
        let host = match host.strip_prefix('[') {
            Some(v6) => v6.split(']').next(),
            None => host.split([':', '/']).next(),
        };
        if !matches!(host, Some("localhost" | "127.0.0.1" | "::1")) {
            return Err(violation(format!(
                "a web page of {origin:?} is refused; set a password to allow pages of others"
            )));
        }
    }
    let accept = base64(&Sha1::digest(format!("{key}{ACCEPT_GUID}")));
    let mut answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n"
    );
    let protocols = field("sec-websocket-protocol").unwrap_or_default();
    if protocols.split(',').any(|p| p.trim() == "binary") {
        answer.push_str("Sec-WebSocket-Protocol: binary\r\n");
    }
    answer.push_str("\r\n");
    Ok(answer)
}

/// RFC 4648 §4.
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for part in bytes.chunks(3) {
        let word = part.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - part.len()));
        for n in 0..4 {
            let letter = ALPHABET[(word >> (18 - 6 * n) & 63) as usize];
            out.push(if n <= part.len() { letter.into() } else { '=' });
        }
    }
    out
}

impl Receiver {
    /// The opening is over: the client may be silent for as long as it likes.
    pub(super) fn set_patient(&self) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(None)
    }

    /// Reads exactly as many bytes.
    pub(super) fn read(&mut self, out: &mut [u8]) -> io::Result<()> {
        if !self.sender.framed {
            return self.stream.read_exact(out);
        }
        let mut done = 0;
        while done < out.len() {
            if self.left == 0 {
                self.next_frame()?;
                continue;
            }
            let n = (out.len() - done).min(usize::try_from(self.left).unwrap_or(usize::MAX));
            let part = &mut out[done..done + n];
            self.stream.read_exact(part)?;
            for b in part {
                *b ^= self.mask[self.mask_at & 3];
                self.mask_at += 1;
            }
            self.left -= n as u64;
            done += n;
        }
        Ok(())
    }

    /// Reads and forgets.
    pub(super) fn skip(&mut self, mut count: usize) -> io::Result<()> {
        let mut piece = [0; 512];
        while count > 0 {
            let n = count.min(piece.len());
            self.read(&mut piece[..n])?;
            count -= n;
        }
        Ok(())
    }

    /// Goes on to the next data frame, answering control frames in between. RFC 6455 §5.2.
    fn next_frame(&mut self) -> io::Result<()> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head)?;
        let op = head[0] & 0x0f;
        let mut len = u64::from(head[1] & 0x7f);
        if head[0] & 0x70 != 0 || head[1] & 0x80 == 0 {
            return Err(violation(
                "a WebSocket frame with extensions or without mask",
            ));
        }
        match len {
            126 => {
                let mut b = [0; 2];
                self.stream.read_exact(&mut b)?;
                len = u16::from_be_bytes(b).into();
            }
            127 => {
                let mut b = [0; 8];
                self.stream.read_exact(&mut b)?;
                len = u64::from_be_bytes(b);
            }
            _ => {}
        }
        self.stream.read_exact(&mut self.mask)?;
        self.mask_at = 0;
        match op {
            OP_CONTINUATION | OP_BINARY => self.left = len,
            OP_CLOSE => return Err(io::ErrorKind::UnexpectedEof.into()),
            OP_PING | OP_PONG if len <= CONTROL_BYTES => {
                let mut body = vec![0; len as usize];
                self.stream.read_exact(&mut body)?;
                body.iter_mut()
                    .zip(self.mask.iter().cycle())
                    .for_each(|(b, m)| *b ^= m);
                if op == OP_PING {
                    self.sender.frame(OP_PONG, &body)?;
                }
            }
            _ => return Err(violation(format!("a WebSocket frame of kind {op}"))),
        }
        Ok(())
    }
}
