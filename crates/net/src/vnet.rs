//! The header that goes before frames on TAP devices and on a switch's sockets: struct
//! virtio_net_hdr without num_buffers (virtio 1.3 §5.1.6), in little-endian.

use crate::Offload;
use crate::offload::{Checksum, Segment, headers};

/// Its length.
pub const BYTES: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Which segmentation a header asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// TCP over IPv4.
    V4,
    /// TCP over IPv6.
    V6,
}

/// What a header says. `None` if it says what is not known, or contradicts itself.
pub fn decode(header: &[u8; BYTES]) -> Option<(Offload, Option<Gso>)> {
    let [flags, gso, _, _, s0, s1, c0, c1, o0, o1] = *header;
    let checksum = (flags & NEEDS_CSUM != 0).then(|| Checksum {
        start: u16::from_le_bytes([c0, c1]),
        offset: u16::from_le_bytes([o0, o1]),
    });
    let kind = match gso {
        GSO_NONE => None,
        GSO_TCPV4 => Some(Gso::V4),
        GSO_TCPV6 => Some(Gso::V6),
        _ => return None,
    };
    let payload_bytes = u16::from_le_bytes([s0, s1]);
    // "If gso_type differs from GSO_NONE the driver MUST also set NEEDS_CSUM."
    if kind.is_some() && (checksum.is_none() || payload_bytes == 0) {
        return None;
    }
    let segment = kind.map(|_| Segment { payload_bytes });
    Some((Offload { checksum, segment }, kind))
}

/// What a header says of this frame, from somebody who need not tell the truth.
pub fn decode_for(header: &[u8; BYTES], frame: &[u8]) -> Option<Offload> {
    let (offload, _) = decode(header)?;
    if let Some(c) = offload.checksum
        && usize::from(c.start) + usize::from(c.offset) + 2 > frame.len()
    {
        return None;
    }
    Some(offload)
}

/// The header of a frame. `None` if the frame is not what its offload says.
pub fn encode(frame: &[u8], offload: &Offload) -> Option<([u8; BYTES], Option<Gso>)> {
    let mut header = [0; BYTES];
    let Some(c) = offload.checksum else {
        return offload.segment.is_none().then_some((header, None));
    };
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&c.start.to_le_bytes());
    header[8..].copy_from_slice(&c.offset.to_le_bytes());
    let Some(s) = offload.segment else {
        return Some((header, None));
    };
    let (code, kind) = if headers(frame)?.v6 {
        (GSO_TCPV6, Gso::V6)
    } else {
        (GSO_TCPV4, Gso::V4)
    };
    let tcp_words = frame.get(usize::from(c.start) + 12)? >> 4;
    let length = c.start.checked_add(u16::from(tcp_words) * 4)?;
    header[1] = code;
    header[2..4].copy_from_slice(&length.to_le_bytes());
    header[4..6].copy_from_slice(&s.payload_bytes.to_le_bytes());
    Some((header, Some(kind)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::sample_segment;

    #[test]
    fn headers_come_back() {
        for v6 in [false, true] {
            let (frame, offload) = sample_segment(v6, &[1; 3000]);
            let (header, gso) = encode(&frame, &offload).unwrap();
            assert_eq!(gso, Some(if v6 { Gso::V6 } else { Gso::V4 }));
            assert_eq!(decode(&header), Some((offload, gso)));
            assert_eq!(decode_for(&header, &frame), Some(offload));
            assert_eq!(decode_for(&header, &frame[..40]), None);
        }
        assert_eq!(encode(&[0; 60], &Offload::NONE), Some(([0; BYTES], None)));
        // UDP fragmentation, segments without a checksum or of no length.
        for bad in [
            [1, 3, 0, 0, 9, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 9, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(decode(&bad), None);
        }
    }
}
