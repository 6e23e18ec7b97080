//! The checks that every back end makes before it starts a request.

use pyrite_mem::GuestMemory;

use crate::{BlockRequest, DiskError, DiskInfo, IoBuf};

/// LIMIT: bytes of one read or write. virtio and NVMe frontends stay far below.
pub const MAX_TRANSFER_BYTES: u64 = 1 << 30;

/// Checks a request against the disk and guest memory.
pub fn check_request(
    info: &DiskInfo,
    memory: &GuestMemory,
    request: &BlockRequest,
) -> Result<(), DiskError> {
    match request {
        BlockRequest::Read { offset, bufs } => {
            check_span(info, *offset, check_bufs(memory, *offset, bufs)?)
        }
        BlockRequest::Write { offset, bufs, .. } => {
            check_writable(info)?;
            check_span(info, *offset, check_bufs(memory, *offset, bufs)?)
        }
        BlockRequest::Flush => Ok(()),
        BlockRequest::Discard { offset, len } | BlockRequest::WriteZeroes { offset, len, .. } => {
            check_writable(info)?;
            check_span(info, *offset, *len)
        }
    }
}

fn check_writable(info: &DiskInfo) -> Result<(), DiskError> {
    if info.read_only {
        Err(DiskError::ReadOnly)
    } else {
        Ok(())
    }
}

/// Checks that a range lies within the disk and is a multiple of its blocks.
pub fn check_span(info: &DiskInfo, offset: u64, len: u64) -> Result<(), DiskError> {
    let block = u64::from(info.block_bytes.max(1));
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= info.size_bytes);
    if inside && offset.is_multiple_of(block) && len.is_multiple_of(block) {
        Ok(())
    } else {
        Err(DiskError::OutOfRange { offset, len })
    }
}

/// The length of all buffers together.
fn check_bufs(memory: &GuestMemory, offset: u64, bufs: &[IoBuf]) -> Result<u64, DiskError> {
    let mut total = 0_u64;
    for buf in bufs {
        let len = u64::from(buf.len);
        if len > 0 && memory.ram_offset(buf.gpa, len).is_none() {
            return Err(DiskError::BadBuffer);
        }
        total = total.saturating_add(len);
    }
    if total > MAX_TRANSFER_BYTES {
        return Err(DiskError::OutOfRange { offset, len: total });
    }
    Ok(total)
}
