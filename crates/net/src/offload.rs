//! What a sender may leave to whoever is next: checksums and the cutting of large TCP segments.
//!
//! A card hands a frame on together with its [`Offload`]. Back ends and cards that can make use of
//! that do; for all others [`complete`] makes the frames that a wire would have carried.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Length of an Ethernet header without VLAN tag.
const ETHERNET_BYTES: usize = 14;
const VLAN_BYTES: usize = 4;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const IPV6_BYTES: usize = 40;
/// TCP flags, RFC 9293 §3.1 and RFC 3168.
const TCP_FIN: u8 = 1 << 0;
const TCP_PSH: u8 = 1 << 3;
const TCP_CWR: u8 = 1 << 7;
/// LIMIT: least payload of a segment that a frame is cut into.
const LEAST_SEGMENT: u16 = 64;

/// What is still to be done to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// A checksum is not filled in.
    pub checksum: Option<Checksum>,
    /// The frame is a TCP segment to be cut into several. Only together with `checksum`, whose
    /// `start` is that of the TCP header.
    pub segment: Option<Segment>,
}

/// A checksum that is not filled in: the ones' complement sum from `start` to the end of the
/// frame belongs at `start + offset`, where the sum of the pseudo-header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// First byte that is summed.
    pub start: u16,
    /// Place of the checksum, counted from `start`.
    pub offset: u16,
}

/// How a frame is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Payload of TCP in one frame, in bytes.
    pub payload_bytes: u16,
}

impl Offload {
    /// Nothing.
    pub const NONE: Offload = Offload {
        checksum: None,
        segment: None,
    };
    /// True if the frame is as a wire carries it.
    pub fn is_none(&self) -> bool {
        *self == Offload::NONE
    }
}

/// Sums 16-bit words in network order, an odd byte being the upper half of a word; not folded.
fn sum(data: &[u8]) -> u64 {
    // In the host's order, where it is fast; the sum of swapped words is the swapped sum
    // (RFC 1071 §2B).
    let (words, rest) = data.as_chunks::<4>();
    let mut sum: u64 = words
        .iter()
        .map(|w| u64::from(u32::from_ne_bytes(*w)))
        .sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_ne_bytes(last));
    u64::from(u16::from_be(fold(sum)))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The ones' complement sum of `data` as 16-bit words in network order (RFC 1071), folded and not
/// complemented: FFFFH for data that hold a right checksum.
pub fn ones_sum(data: &[u8]) -> u16 {
    fold(sum(data))
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

fn put(frame: &mut [u8], at: usize, value: u16) -> Option<()> {
    *frame.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// Where the headers of a frame begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// True for IPv6.
    pub v6: bool,
    /// Offset of the IP header.
    pub ip: usize,
    /// Offset of what comes after it.
    pub transport: usize,
    /// Protocol after the IP header: 6 is TCP, 17 is UDP.
    pub protocol: u8,
    /// End of the IP packet as its header says, at most the end of the frame.
    pub end: usize,
    /// An IPv4 fragment: what comes after the IP header is not a transport header.
    pub fragment: bool,
}

/// Finds the headers of an IP packet in an Ethernet frame with at most one VLAN tag.
pub fn headers(frame: &[u8]) -> Option<Headers> {
    let mut ip = ETHERNET_BYTES;
    let mut ethertype = word(frame, ip - 2)?;
    if ethertype == ETHERTYPE_VLAN {
        ip += VLAN_BYTES;
        ethertype = word(frame, ip - 2)?;
    }
    let first = *frame.get(ip)?;
    match ethertype {
        ETHERTYPE_IPV4 if first >> 4 == 4 => {
            let length = usize::from(first & 15) * 4;
            let transport = ip + length;
            if length < 20 || transport > frame.len() {
                return None;
            }
            let total = usize::from(word(frame, ip + 2)?);
            Some(Headers {
                v6: false,
                ip,
                transport,
                protocol: *frame.get(ip + 9)?,
                end: (ip + total).clamp(transport, frame.len()),
                fragment: word(frame, ip + 6)? & 0x3fff != 0,
            })
        }
        ETHERTYPE_IPV6 if first >> 4 == 6 => {
            let transport = ip + IPV6_BYTES;
            if transport > frame.len() {
                return None;
            }
            let payload = usize::from(word(frame, ip + 4)?);
            Some(Headers {
                v6: true,
                ip,
                transport,
                protocol: *frame.get(ip + 6)?,
                end: (transport + payload).min(frame.len()),
                fragment: false,
            })
        }
        _ => None,
    }
}

impl Headers {
    /// Folded sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1) of `length` bytes.
    pub fn pseudo_sum(&self, frame: &[u8], protocol: u8, length: usize) -> u16 {
        let addresses = if self.v6 {
            self.ip + 8..self.ip + 40
        } else {
            self.ip + 12..self.ip + 20
        };
        let addresses = frame.get(addresses).unwrap_or_default();
        let rest = u64::from(protocol) + (length as u64 & 0xffff) + (length as u64 >> 16);
        fold(sum(addresses) + rest)
    }

    /// The checksum field of the transport, from its header on.
    pub fn checksum_offset(&self) -> Option<u16> {
        match self.protocol {
            PROTOCOL_TCP => Some(16),
            PROTOCOL_UDP => Some(6),
            _ => None,
        }
    }

    /// Writes the length of the packet that ends with the frame into the IP header, and the
    /// header's checksum.
    pub fn set_length(&self, frame: &mut [u8]) -> Option<()> {
        // A larger packet than IP knows is cut before anybody looks.
        let length = |from: usize| u16::try_from(frame.len() - from).unwrap_or(0);
        if self.v6 {
            let payload = length(self.ip + IPV6_BYTES);
            return put(frame, self.ip + 4, payload);
        }
        let total = length(self.ip);
        put(frame, self.ip + 2, total)?;
        put(frame, self.ip + 10, 0)?;
        let header = frame.get(self.ip..self.transport)?;
        let checksum = !ones_sum(header);
        put(frame, self.ip + 10, checksum)
    }

    /// Checks the checksum of the IPv4 header.
    pub fn ip_checksum_right(&self, frame: &[u8]) -> bool {
        self.v6 || frame.get(self.ip..self.transport).map(ones_sum) == Some(0xffff)
    }

    /// Checks the checksum of TCP or UDP; `None` if there is none to check.
    pub fn transport_checksum_right(&self, frame: &[u8]) -> Option<bool> {
        let field = usize::from(self.checksum_offset()?);
        let body = frame.get(self.transport..self.end)?;
        let given = word(body, field)?;
        if self.fragment || (self.protocol == PROTOCOL_UDP && given == 0) {
            return None;
        }
        let pseudo = self.pseudo_sum(frame, self.protocol, body.len());
        Some(fold(sum(body) + u64::from(pseudo)) == 0xffff)
    }
}

/// Fills in a checksum. `None` if it lies outside the frame.
pub fn fill_checksum(frame: &mut [u8], checksum: Checksum) -> Option<()> {
    let start = usize::from(checksum.start);
    let at = start + usize::from(checksum.offset);
    let mut value = !ones_sum(frame.get(start..)?);
    // RFC 768: a sum of zero is sent as all ones; it means the same for TCP.
    if value == 0 {
        value = 0xffff;
    }
    put(frame, at, value)
}

/// Does what is still to be done to `frame` and hands the result on. False if the frame is not
/// what its offload says.
pub fn complete(frame: &[u8], offload: &Offload, send: &mut dyn FnMut(&[u8])) -> bool {
    let Some(checksum) = offload.checksum else {
        if offload.segment.is_none() {
            send(frame);
        }
        return offload.segment.is_none();
    };
    match offload.segment {
        Some(segment) => cut(frame, checksum.start.into(), segment, send).is_some(),
        None => {
            let mut whole = frame.to_vec();
            let filled = fill_checksum(&mut whole, checksum).is_some();
            if filled {
                send(&whole);
            }
            filled
        }
    }
}

/// Cuts a TCP segment whose header is at `tcp`.
fn cut(frame: &[u8], tcp: usize, segment: Segment, send: &mut dyn FnMut(&[u8])) -> Option<()> {
    let mut headers = headers(frame)?;
    // IPv6 extension headers are between: the sender knows where TCP begins.
    if tcp < headers.transport || segment.payload_bytes < LEAST_SEGMENT {
        return None;
    }
    if !headers.v6 {
        // IPv4 options are counted in the header's own length.
        if tcp != headers.transport {
            return None;
        }
    }
    headers.protocol = PROTOCOL_TCP;
    let length = usize::from(frame.get(tcp + 12)? >> 4) * 4;
    let payload_at = tcp + length;
    if length < 20 {
        return None;
    }
    let payload = frame.get(payload_at..)?;
    let flags = *frame.get(tcp + 13)?;
    let sequence = u32::from_be_bytes(*frame.get(tcp + 4..)?.first_chunk()?);
    let ident = word(frame, headers.ip + 4)?;
    let step = usize::from(segment.payload_bytes);
    let count = payload.len().div_ceil(step).max(1);
    let mut out = Vec::with_capacity(payload_at + step);
    for n in 0..count {
        let from = n * step;
        let part = payload.get(from..payload.len().min(from + step))?;
        out.clear();
        out.extend_from_slice(frame.get(..payload_at)?);
        out.extend_from_slice(part);
        if !headers.v6 {
            put(&mut out, headers.ip + 4, ident.wrapping_add(n as u16))?;
        }
        headers.set_length(&mut out)?;
        let seq = sequence.wrapping_add(from as u32);
        *out.get_mut(tcp + 4..)?.first_chunk_mut()? = seq.to_be_bytes();
        let mut now = flags;
        if n > 0 {
            now &= !TCP_CWR;
        }
        if n + 1 < count {
            now &= !(TCP_FIN | TCP_PSH);
        }
        *out.get_mut(tcp + 13)? = now;
        let pseudo = headers.pseudo_sum(&out, PROTOCOL_TCP, out.len() - tcp);
        put(&mut out, tcp + 16, pseudo)?;
        let checksum = Checksum {
            start: u16::try_from(tcp).ok()?,
            offset: 16,
        };
        fill_checksum(&mut out, checksum)?;
        send(&out);
    }
    Some(())
}

/// An IP address pair's frame for tests of cards: TCP from 10.0.0.1 to 10.0.0.2, or the same in
/// IPv6, with right lengths and the pseudo-header's sum in place of the checksum.
#[doc(hidden)]
pub fn sample_segment(v6: bool, payload: &[u8]) -> (Vec<u8>, Offload) {
    let mut f = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if v6 {
        f.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, PROTOCOL_TCP, 64]);
        f.extend_from_slice(&Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets());
        f.extend_from_slice(&Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2).octets());
    } else {
        f.extend_from_slice(&[8, 0, 0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0]);
        f.extend_from_slice(&[64, PROTOCOL_TCP, 0, 0]);
        f.extend_from_slice(&Ipv4Addr::new(10, 0, 0, 1).octets());
        f.extend_from_slice(&Ipv4Addr::new(10, 0, 0, 2).octets());
    }
    let tcp = f.len();
    f.extend_from_slice(&[0x10, 0, 0x20, 0, 0xff, 0xff, 0xff, 0, 0, 0, 0, 9]);
    f.extend_from_slice(&[0x50, TCP_PSH | 0x10, 1, 0, 0, 0, 0, 0]);
    f.extend_from_slice(payload);
    let h = headers(&f).expect("an IP packet");
    h.set_length(&mut f).expect("an IP header");
    let pseudo = h.pseudo_sum(&f, PROTOCOL_TCP, f.len() - tcp);
    put(&mut f, tcp + 16, pseudo).expect("a TCP header");
    let offload = Offload {
        checksum: Some(Checksum {
            start: tcp as u16,
            offset: 16,
        }),
        segment: Some(Segment {
            payload_bytes: 1000,
        }),
    };
    (f, offload)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the letter of RFC 1071.
    fn slow_sum(data: &[u8]) -> u16 {
        let words = data
            .chunks(2)
            .map(|c| u64::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])));
        fold(words.sum())
    }

    #[test]
    fn sums_are_those_of_the_rfc() {
        let data: Vec<u8> = (0..2000_u32).map(|n| ((n * n) >> 3) as u8).collect();
        for len in (0..40).chain([1499, 1500, 2000]) {
            for at in 0..3 {
                let d = &data[at.min(len)..len];
                assert_eq!(ones_sum(d), slow_sum(d), "{at} {len}");
            }
        }
        assert_eq!(ones_sum(&[0xff; 1000]), 0xffff);
    }

    #[test]
    fn segments_are_cut_as_a_stack_would() {
        let payload: Vec<u8> = (0..3500_u32).map(|n| (n / 3) as u8).collect();
        for v6 in [false, true] {
            let (frame, offload) = sample_segment(v6, &payload);
            let mut out: Vec<Vec<u8>> = Vec::new();
            assert!(complete(&frame, &offload, &mut |f| out.push(f.to_vec())));
            assert_eq!(out.len(), 4);
            let mut seen = Vec::new();
            for (n, f) in out.iter().enumerate() {
                let h = headers(f).unwrap();
                assert!(h.ip_checksum_right(f), "{n}");
                assert_eq!(h.transport_checksum_right(f), Some(true), "{n}");
                assert_eq!(h.end, f.len());
                let tcp = h.transport;
                let seq = u32::from_be_bytes(*f[tcp + 4..].first_chunk().unwrap());
                assert_eq!(seq, 0xffff_ff00_u32.wrapping_add(n as u32 * 1000));
                assert_eq!(f[tcp + 13] & TCP_PSH != 0, n == 3);
                if !v6 {
                    assert_eq!(word(f, h.ip + 4), Some(0x1234 + n as u16));
                }
                seen.extend_from_slice(&f[tcp + 20..]);
            }
            assert_eq!(seen, payload);
            // One damaged byte shows.
            out[1][70] ^= 1;
            let h = headers(&out[1]).unwrap();
            assert_eq!(h.transport_checksum_right(&out[1]), Some(false));
        }
    }

    #[test]
    fn a_checksum_alone_is_filled_in() {
        let (frame, offload) = sample_segment(false, b"hello");
        let only = Offload {
            segment: None,
            ..offload
        };
        let mut out = Vec::new();
        assert!(complete(&frame, &only, &mut |f| out = f.to_vec()));
        let h = headers(&out).unwrap();
        assert_eq!(h.transport_checksum_right(&out), Some(true));
        assert_eq!(out.len(), frame.len());
    }

    #[test]
    fn lies_are_refused() {
        let (frame, good) = sample_segment(false, &[7; 3000]);
        let with = |start, offset, segment: Option<u16>| Offload {
            checksum: Some(Checksum { start, offset }),
            segment: segment.map(|payload_bytes| Segment { payload_bytes }),
        };
        let lies = [
            with(0, 16, Some(1000)),
            with(20, 16, Some(1000)),
            with(60_000, 16, Some(1000)),
            with(3040, 16, None),
            with(34, 60_000, None),
            with(34, 16, Some(0)),
            with(34, 16, Some(1)),
            Offload {
                checksum: None,
                ..good
            },
        ];
        for lie in lies {
            let mut sent = 0;
            assert!(!complete(&frame, &lie, &mut |_| sent += 1), "{lie:?}");
            assert_eq!(sent, 0, "{lie:?}");
        }
        for len in 0..60 {
            complete(&frame[..len], &good, &mut |_| {});
            headers(&frame[..len]);
        }
    }
}
