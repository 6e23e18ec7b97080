//! Which queue pair a flow belongs to: that which the driver sends it by. virtio 1.3 §5.1.6.5.5.

use pyrite_net::offload::headers;

/// Flows are told apart by this many hashes.
const ENTRIES: usize = 256;
/// No frame of the flow was sent yet.
const UNKNOWN: u8 = u8::MAX;

/// Pairs by hash of the flow.
pub(super) struct Steering {
    pairs: Box<[u8; ENTRIES]>,
}

impl Default for Steering {
    fn default() -> Steering {
        Steering {
            pairs: Box::new([UNKNOWN; ENTRIES]),
        }
    }
}

/// The same for both directions of a flow. `None` if it is not IP.
fn hash(frame: &[u8]) -> Option<usize> {
    let h = headers(frame)?;
    let (addresses, size) = if h.v6 { (h.ip + 8, 16) } else { (h.ip + 12, 4) };
    let end = |at: usize, len: usize| frame.get(at..at + len);
    let mut mixed = 0_u32;
    let (from, to) = (end(addresses, size)?, end(addresses + size, size)?);
    for (a, b) in from.iter().zip(to) {
        mixed = mixed.rotate_left(5) ^ u32::from(a ^ b);
    }
    if !h.fragment && h.checksum_offset().is_some() {
        let ports = end(h.transport, 4)?;
        let port = |at: usize| u32::from(u16::from_be_bytes([ports[at], ports[at + 1]]));
        mixed = mixed.wrapping_add((port(0) ^ port(2)).wrapping_mul(0x9e37_79b1));
    }
    Some((mixed.wrapping_mul(0x85eb_ca6b) >> 24) as usize % ENTRIES)
}

impl Steering {
    /// The driver has sent a frame by `pair`.
    pub(super) fn note(&mut self, frame: &[u8], pair: usize) {
        if let Some(h) = hash(frame) {
            self.pairs[h] = u8::try_from(pair).unwrap_or(UNKNOWN);
        }
    }

    /// The pair, of `pairs`, that a frame for the guest goes to.
    pub(super) fn pair(&self, frame: &[u8], pairs: usize) -> usize {
        if pairs <= 1 {
            return 0;
        }
        let Some(h) = hash(frame) else { return 0 };
        match usize::from(self.pairs[h]) {
            known if known < pairs => known,
            _ => h % pairs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pyrite_net::offload::sample_segment;

    #[test]
    fn answers_come_where_the_flow_is_sent() {
        for v6 in [false, true] {
            let (sent, _) = sample_segment(v6, b"x");
            let mut answer = sent.clone();
            let (at, size, tcp) = if v6 { (22, 16, 54) } else { (26, 4, 34) };
            for n in 0..size {
                answer.swap(at + n, at + size + n);
            }
            answer.swap(tcp, tcp + 2);
            answer.swap(tcp + 1, tcp + 3);
            let mut s = Steering::default();
            s.note(&sent, 3);
            assert_eq!(s.pair(&answer, 4), 3);
            assert!(s.pair(&answer, 2) < 2, "pairs that are not used");
            assert_eq!(s.pair(&answer, 1), 0);
        }
        assert_eq!(Steering::default().pair(&[0; 14], 4), 0);
    }
}
