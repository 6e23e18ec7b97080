//! Framing of the GDB remote serial protocol. GDB manual, appendix "GDB Remote Serial Protocol",
//! section "Overview".

/// LIMIT: bytes of a packet's content, either way; told to the debugger as `PacketSize`.
pub const MAX_PACKET_BYTES: usize = 16 << 10;

/// What comes from a debugger.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// `+`: the last packet arrived.
    Ack,
    /// `-`: the last packet is to be sent again.
    Nak,
    /// Control-C.
    Interrupt,
    /// A packet's content, still escaped.
    Packet(Vec<u8>),
    /// A packet whose checksum is wrong.
    Damaged,
    /// A packet that is longer than [`MAX_PACKET_BYTES`].
    TooLong,
}

enum At {
    Outside,
    Content,
    /// One digit of the checksum is known.
    Check(Option<u8>),
}

/// Cuts what a debugger sends into packets.
pub struct Parser {
    at: At,
    content: Vec<u8>,
    sum: u8,
    too_long: bool,
}

impl Default for Parser {
    fn default() -> Parser {
        Parser {
            at: At::Outside,
            content: Vec::new(),
            sum: 0,
            too_long: false,
        }
    }
}

impl Parser {
    /// Takes a byte; what it completes, if anything.
    pub fn feed(&mut self, byte: u8) -> Option<Incoming> {
        match self.at {
            At::Outside => {
                match byte {
                    b'$' => self.begin(),
                    b'+' => return Some(Incoming::Ack),
                    b'-' => return Some(Incoming::Nak),
                    3 => return Some(Incoming::Interrupt),
                    // Noise between packets.
                    _ => {}
                }
                None
            }
            // A new packet, whose beginning was cut off of the old one.
            At::Content if byte == b'$' => {
                self.begin();
                None
            }
            At::Content if byte == b'#' => {
                self.at = At::Check(None);
                None
            }
            At::Content => {
                self.sum = self.sum.wrapping_add(byte);
                if self.content.len() < MAX_PACKET_BYTES {
                    self.content.push(byte);
                } else {
                    self.too_long = true;
                }
                None
            }
            At::Check(None) => {
                self.at = At::Check(Some(byte));
                None
            }
            At::Check(Some(high)) => {
                self.at = At::Outside;
                let content = std::mem::take(&mut self.content);
                let sum = hex_digit(high)
                    .zip(hex_digit(byte))
                    .map(|(h, l)| h << 4 | l);
                Some(if sum != Some(self.sum) {
                    Incoming::Damaged
                } else if self.too_long {
                    Incoming::TooLong
                } else {
                    Incoming::Packet(content)
                })
            }
        }
    }

    fn begin(&mut self) {
        self.at = At::Content;
        self.content.clear();
        self.sum = 0;
        self.too_long = false;
    }
}

/// The value of a digit.
pub fn hex_digit(b: u8) -> Option<u8> {
    char::from(b).to_digit(16).map(|d| d as u8)
}

/// Puts content into a frame.
pub fn frame(content: &[u8]) -> Vec<u8> {
    let sum = content.iter().fold(0u8, |s, b| s.wrapping_add(*b));
    let mut out = Vec::with_capacity(content.len() + 4);
    out.push(b'$');
    out.extend_from_slice(content);
    out.push(b'#');
    out.extend(format!("{sum:02x}").bytes());
    out
}

/// Escapes binary data.
pub fn escape(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for b in bytes {
        // The last begins a run-length code in what a debugger receives.
        if matches!(b, b'$' | b'#' | b'}' | b'*') {
            out.extend([b'}', b ^ 0x20]);
        } else {
            out.push(*b);
        }
    }
    out
}

/// Undoes [`escape`]; `None` if the last byte is missing.
pub fn unescape(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut bytes = bytes.iter();
    while let Some(b) = bytes.next() {
        out.push(match b {
            b'}' => bytes.next()? ^ 0x20,
            other => *other,
        });
    }
    Some(out)
}

/// Bytes as digits.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, b| {
        // Writing to a string does not fail.
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// Digits as bytes; `None` if they are not pairs of digits.
pub fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks(2)
        .map(|pair| match pair {
            [h, l] => Some(hex_digit(*h)? << 4 | hex_digit(*l)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(bytes: &[u8]) -> Vec<Incoming> {
        let mut p = Parser::default();
        bytes.iter().filter_map(|b| p.feed(*b)).collect()
    }

    #[test]
    fn packets_come_out_whole() {
        let all = feed(b"+$g#67\x03xx-$m0,4#fd$#00");
        assert_eq!(
            all,
            [
                Incoming::Ack,
                Incoming::Packet(b"g".to_vec()),
                Incoming::Interrupt,
                Incoming::Nak,
                Incoming::Packet(b"m0,4".to_vec()),
                Incoming::Packet(Vec::new()),
            ]
        );
        assert_eq!(frame(b"m0,4"), b"$m0,4#fd");
    }

    #[test]
    fn damaged_and_long_packets_are_told() {
        assert_eq!(feed(b"$g#68"), [Incoming::Damaged]);
        assert_eq!(feed(b"$g#zz"), [Incoming::Damaged]);
        // The second begins where the first was cut off.
        assert_eq!(feed(b"$gar$g#67"), [Incoming::Packet(b"g".to_vec())]);
        let long = vec![b'a'; MAX_PACKET_BYTES + 1];
        assert_eq!(feed(&frame(&long)), [Incoming::TooLong]);
        assert_eq!(
            feed(&frame(&long[1..])),
            [Incoming::Packet(long[1..].to_vec())]
        );
        // However much comes, no more than that is kept.
        let mut p = Parser::default();
        p.feed(b'$');
        for _ in 0..1 << 20 {
            assert_eq!(p.feed(b'x'), None);
        }
        assert_eq!(p.content.len(), MAX_PACKET_BYTES);
    }

    #[test]
    fn binary_data_is_escaped() {
        let all: Vec<u8> = (0..=255).collect();
        let escaped = escape(&all);
        assert!(!escaped.iter().any(|b| matches!(b, b'$' | b'#' | b'*')));
        assert_eq!(unescape(&escaped), Some(all.clone()));
        assert_eq!(unescape(b"ab}"), None);
        assert_eq!(from_hex(to_hex(&all).as_bytes()), Some(all));
        assert_eq!(from_hex(b"abc"), None);
        assert_eq!(from_hex(b"g0"), None);
    }
}
