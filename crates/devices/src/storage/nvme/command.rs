//! A command's fields, status codes, and the places in memory that it names.

use pyrite_disk::{DiskError, IoBuf};
use pyrite_mem::GuestMemory;

/// Bytes of a memory page: CC.MPS is always 0.
pub(super) const PAGE: u64 = 4096;
/// Largest transfer, as MDTS says it: 2^9 pages, 2 MiB.
pub(super) const MDTS: u8 = 9;
pub(super) const MAX_TRANSFER: u64 = PAGE << MDTS;

/// Status field without phase: code in bits 7-0, type in bits 10-8, do not retry in bit 14.
/// §4.6.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status(pub u16);

const DNR: u16 = 1 << 14;

#[allow(missing_docs, reason = "the standard's names")]
impl Status {
    pub const SUCCESS: Status = Status(0);
    pub const INVALID_OPCODE: Status = Status(0x01 | DNR);
    pub const INVALID_FIELD: Status = Status(0x02 | DNR);
    pub const DATA_TRANSFER_ERROR: Status = Status(0x04 | DNR);
    pub const INTERNAL_ERROR: Status = Status(0x06 | DNR);
    pub const ABORT_REQUESTED: Status = Status(0x07);
    pub const INVALID_NAMESPACE: Status = Status(0x0b | DNR);
    pub const PRP_OFFSET_INVALID: Status = Status(0x13 | DNR);
    pub const WRITE_PROTECTED: Status = Status(0x20 | DNR);
    pub const LBA_OUT_OF_RANGE: Status = Status(0x80 | DNR);
    pub const CAPACITY_EXCEEDED: Status = Status(0x81 | DNR);
    pub const CQ_INVALID: Status = Status(0x100 | DNR);
    pub const INVALID_QUEUE_ID: Status = Status(0x101 | DNR);
    pub const INVALID_QUEUE_SIZE: Status = Status(0x102 | DNR);
    pub const ASYNC_LIMIT: Status = Status(0x105 | DNR);
    pub const INVALID_VECTOR: Status = Status(0x108 | DNR);
    pub const INVALID_LOG_PAGE: Status = Status(0x109 | DNR);
    pub const INVALID_QUEUE_DELETION: Status = Status(0x10c | DNR);
    pub const FEATURE_NOT_SAVEABLE: Status = Status(0x10d | DNR);
    pub const WRITE_FAULT: Status = Status(0x280 | DNR);
    pub const UNRECOVERED_READ: Status = Status(0x281 | DNR);

    /// What a failed request of a back end means.
    pub(super) fn of(error: &DiskError, write: bool) -> Status {
        match error {
            DiskError::OutOfRange { .. } => Status::LBA_OUT_OF_RANGE,
            DiskError::ReadOnly => Status::WRITE_PROTECTED,
            DiskError::NoSpace => Status::CAPACITY_EXCEEDED,
            DiskError::BadBuffer => Status::DATA_TRANSFER_ERROR,
            DiskError::Corrupt(_) | DiskError::Unsupported(_) => Status::INTERNAL_ERROR,
            DiskError::Io(_) if write => Status::WRITE_FAULT,
            DiskError::Io(_) => Status::UNRECOVERED_READ,
        }
    }
}

/// A submission queue entry. §4.2.
pub(super) struct Command(pub [u8; 64]);

impl Command {
    pub(super) fn dword(&self, n: usize) -> u32 {
        let at = 4 * n;
        match self.0.get(at..at + 4) {
            Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
            _ => 0,
        }
    }
    pub(super) fn qword(&self, n: usize) -> u64 {
        u64::from(self.dword(n)) | u64::from(self.dword(n + 1)) << 32
    }
    pub(super) fn opcode(&self) -> u8 {
        self.0[0]
    }
    pub(super) fn id(&self) -> u16 {
        (self.dword(0) >> 16) as u16
    }
    pub(super) fn namespace(&self) -> u32 {
        self.dword(1)
    }

    /// No fused operation, and PRPs instead of SGLs, which this controller does not take.
    pub(super) fn plain(&self) -> bool {
        self.0[1] & 0xc3 == 0
    }

    /// The `len` bytes that PRP 1 and 2 name. §4.3.
    pub(super) fn buffers(&self, memory: &GuestMemory, len: u64) -> Result<Vec<IoBuf>, Status> {
        // LIMIT: MDTS, so a list has at most 512 entries and one link.
        if len > MAX_TRANSFER {
            return Err(Status::INVALID_FIELD);
        }
        let (prp1, prp2) = (self.qword(6), self.qword(8));
        let mut bufs = Vec::new();
        let mut left = len;
        let mut add = |gpa: u64, room: u64| {
            let n = left.min(room);
            if n > 0 {
                push(&mut bufs, gpa, n as u32);
            }
            left -= n;
            left
        };
        if prp1 & 3 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let left = add(prp1, PAGE - prp1 % PAGE);
        if left == 0 {
            return Ok(bufs);
        }
        if left <= PAGE {
            if prp2 % PAGE != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            add(prp2, PAGE);
            return Ok(bufs);
        }
        // A list; its last entry in a page links to the next page if more follow.
        let mut at = prp2;
        let mut left = left;
        if at & 7 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        while left > 0 {
            let entry = memory
                .read_u64(at)
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            let last_in_page = at % PAGE == PAGE - 8;
            if entry % PAGE != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            if last_in_page && left > PAGE {
                // LIMIT: a link of links does not end; each page must bring an entry.
                at = entry;
                let first = memory
                    .read_u64(at)
                    .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                if first % PAGE != 0 {
                    return Err(Status::PRP_OFFSET_INVALID);
                }
                left = add(first, PAGE);
            } else {
                left = add(entry, PAGE);
            }
            at += 8;
        }
        Ok(bufs)
    }
}

/// Adds a piece; neighbours become one.
fn push(bufs: &mut Vec<IoBuf>, gpa: u64, len: u32) {
    match bufs.last_mut() {
        Some(b) if b.gpa.checked_add(u64::from(b.len)) == Some(gpa) => b.len += len,
        _ => bufs.push(IoBuf { gpa, len }),
    }
}
