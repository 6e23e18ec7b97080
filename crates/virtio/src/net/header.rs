//! struct virtio_net_hdr, and what it says about a frame. virtio 1.3 §5.1.6.

use pyrite_net::vnet::{self, Gso};
use pyrite_net::{Offload, Offloads};

use super::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

/// Bytes of the header with num_buffers, which version 1 always has.
pub(super) const HEADER_BYTES: usize = 12;
/// Longest IP packet in one frame for a guest that takes segments of any length.
const MAX_PACKET_BYTES: u32 = 65_535;

/// The features that the driver can turn off and on while it runs. §5.1.6.5.6.
pub(super) const GUEST_OFFLOADS: u64 =
    1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;

/// What a frame from the guest leaves to us, by its header. `None` if the header says what was not
/// negotiated.
pub(super) fn from_guest(header: &[u8; HEADER_BYTES], features: u64) -> Option<Offload> {
    let has = |bit: u32| features >> bit & 1 != 0;
    let (offload, gso) = vnet::decode(header.first_chunk()?)?;
    let allowed = match gso {
        None => true,
        Some(Gso::V4) => has(VIRTIO_NET_F_HOST_TSO4),
        Some(Gso::V6) => has(VIRTIO_NET_F_HOST_TSO6),
    };
    let checksum = offload.checksum.is_none() || has(VIRTIO_NET_F_CSUM);
    (allowed && checksum).then_some(offload)
}

/// The header of a frame for a guest with these offloads on. `None` if it cannot take the frame
/// like that.
pub(super) fn to_guest(
    frame: &[u8],
    offload: &Offload,
    offloads: u64,
) -> Option<[u8; HEADER_BYTES]> {
    let has = |bit: u32| offloads >> bit & 1 != 0;
    let (start, gso) = vnet::encode(frame, offload)?;
    let allowed = match gso {
        None => true,
        Some(Gso::V4) => has(VIRTIO_NET_F_GUEST_TSO4),
        Some(Gso::V6) => has(VIRTIO_NET_F_GUEST_TSO6),
    };
    let checksum = offload.checksum.is_none() || has(VIRTIO_NET_F_GUEST_CSUM);
    let mut header = [0; HEADER_BYTES];
    header[..vnet::BYTES].copy_from_slice(&start);
    (allowed && checksum).then_some(header)
}

/// True if a guest with these offloads on takes a frame with this left out, whatever its IP version.
pub(super) fn takes(offload: &Offload, offloads: u64) -> bool {
    let segments = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
    let checksum = offload.checksum.is_none() || offloads >> VIRTIO_NET_F_GUEST_CSUM & 1 != 0;
    checksum && (offload.segment.is_none() || offloads & segments == segments)
}

/// What a back end may leave out with these offloads on.
pub(super) fn offloads(on: u64) -> Offloads {
    let has = |bit: u32| on >> bit & 1 != 0;
    let segment = |bit| {
        if has(bit) { MAX_PACKET_BYTES } else { 0 }
    };
    Offloads {
        to_guest_unchecked: has(VIRTIO_NET_F_GUEST_CSUM),
        to_guest_segment_bytes: segment(VIRTIO_NET_F_GUEST_TSO4),
        to_guest_segment_bytes_v6: segment(VIRTIO_NET_F_GUEST_TSO6),
    }
}
