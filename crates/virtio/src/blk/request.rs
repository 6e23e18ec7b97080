//! Block requests as the driver lays them out. virtio 1.3 §5.2.6.

use pyrite_disk::{BlockRequest, IoBuf};
use pyrite_mem::GuestMemory;

use super::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR_BYTES, VIRTIO_BLK_S_UNSUPP as UNSUPP};
use crate::queue::Chain;

pub(super) const VIRTIO_BLK_S_OK: u8 = 0;
pub(super) const VIRTIO_BLK_S_IOERR: u8 = 1;
pub(super) const VIRTIO_BLK_S_UNSUPP: u8 = 2;

const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const VIRTIO_BLK_T_GET_ID: u32 = 8;
const VIRTIO_BLK_T_DISCARD: u32 = 11;
const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;

/// Bytes of type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// Bytes of struct virtio_blk_discard_write_zeroes.
const RANGE_BYTES: u64 = 16;

/// A request that cannot even be answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("block request without a header")]
    NoHeader,
    #[error("block request without a status byte")]
    NoStatus,
    #[error("block request of more than 4 GiB")]
    TooLarge,
}

/// What the driver wants.
#[derive(Debug)]
pub(super) enum Request {
    Read {
        sector: u64,
        bufs: Vec<IoBuf>,
    },
    Write {
        sector: u64,
        bufs: Vec<IoBuf>,
    },
    Flush,
    GetId,
    /// Discard or write-zeroes.
    Ranges {
        requests: Vec<BlockRequest>,
    },
    /// Answer with this status.
    Failed(u8),
}

/// A request and where its answer goes.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) status_gpa: u64,
    /// Length of the writable part without the status byte.
    pub(super) data_written: u32,
    pub(super) request: Request,
}

impl Request {
    /// Copies the header out of the chain and checks it.
    pub(super) fn parse(memory: &GuestMemory, chain: &Chain) -> Result<Parsed, RequestError> {
        let mut h = [0; 16];
        if chain.read_at(memory, 0, &mut h) != h.len() {
            return Err(RequestError::NoHeader);
        }
        let [t0, t1, t2, t3, _, _, _, _, s @ ..] = h;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(s);
        // The status is the last writable byte.
        let last = chain.writable().last().ok_or(RequestError::NoStatus)?;
        let status_gpa = last.gpa + u64::from(last.len) - 1;
        let room = chain.writable_len() - 1;
        let data_written = u32::try_from(room).map_err(|_| RequestError::TooLarge)?;
        let data_len = chain.readable_len() - HEADER_BYTES;
        let in_range = sector <= u64::MAX / SECTOR_BYTES;
        let request = match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT if !in_range => Request::Failed(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_IN => Request::Read {
                sector,
                bufs: chain.writable_bufs(0, room),
            },
            VIRTIO_BLK_T_OUT => Request::Write {
                sector,
                bufs: chain.readable_bufs(HEADER_BYTES, data_len),
            },
            // virtio 1.3 §5.2.6.1: "A driver MUST set sector to 0 for a VIRTIO_BLK_T_FLUSH
            // request"; nothing depends on it.
            VIRTIO_BLK_T_FLUSH => Request::Flush,
            VIRTIO_BLK_T_GET_ID => Request::GetId,
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                parse_ranges(memory, chain, data_len, kind == VIRTIO_BLK_T_DISCARD)
            }
            _ => Request::Failed(UNSUPP),
        };
        Ok(Parsed {
            status_gpa,
            data_written,
            request,
        })
    }
}

fn parse_ranges(memory: &GuestMemory, chain: &Chain, data_len: u64, discard: bool) -> Request {
    let count = data_len / RANGE_BYTES;
    if !data_len.is_multiple_of(RANGE_BYTES) || count == 0 || count > u64::from(MAX_RANGES) {
        return Request::Failed(VIRTIO_BLK_S_IOERR);
    }
    let mut requests = Vec::new();
    for n in 0..count {
        let mut b = [0; 16];
        if chain.read_at(memory, HEADER_BYTES + n * RANGE_BYTES, &mut b) != b.len() {
            return Request::Failed(VIRTIO_BLK_S_IOERR);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f @ ..] = b;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(f);
        let unmap = flags & 1 != 0;
        // virtio 1.3 §5.2.6.2: unknown flags, and unmap in a discard, are VIRTIO_BLK_S_UNSUPP.
        if flags & !1 != 0 || (discard && unmap) {
            return Request::Failed(UNSUPP);
        }
        let Some(offset) = sector.checked_mul(SECTOR_BYTES) else {
            return Request::Failed(VIRTIO_BLK_S_IOERR);
        };
        if sectors > MAX_RANGE_SECTORS {
            return Request::Failed(VIRTIO_BLK_S_IOERR);
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        requests.push(if discard {
            BlockRequest::Discard { offset, len }
        } else {
            BlockRequest::WriteZeroes {
                offset,
                len,
                may_unmap: unmap,
            }
        });
    }
    Request::Ranges { requests }
}
