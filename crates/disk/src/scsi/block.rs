//! Commands of a disk. SBC-3 §5.

use std::sync::Arc;

use super::{
    Direction, MAX_RANGE_BLOCKS, MAX_UNMAP_RANGES, Parameters, Plan, Sense, be16, be24, be32, be64,
    byte, reply,
};
use crate::{BlockBackend, BlockRequest};

pub(super) fn plan(disk: &Arc<dyn BlockBackend>, cdb: &[u8]) -> Plan {
    let op = byte(cdb, 0);
    let fua = byte(cdb, 1) & 8 != 0;
    match op {
        0x00 => Plan::Done,
        // START STOP UNIT: nothing spins. Ejecting is not for this device.
        0x1b if byte(cdb, 4) & 2 != 0 => Plan::Fail(Sense::INVALID_FIELD),
        0x1b => Plan::Done,
        0x08 | 0x0a => {
            let count = match byte(cdb, 4) {
                0 => 256,
                n => u64::from(n),
            };
            transfer(
                disk,
                u64::from(be24(cdb, 1) & 0x1f_ffff),
                count,
                op == 0x0a,
                false,
            )
        }
        0x28 | 0x2a => transfer(
            disk,
            be32(cdb, 2).into(),
            be16(cdb, 7).into(),
            op == 0x2a,
            fua,
        ),
        0xa8 | 0xaa => transfer(
            disk,
            be32(cdb, 2).into(),
            be32(cdb, 6).into(),
            op == 0xaa,
            fua,
        ),
        0x88 | 0x8a => transfer(disk, be64(cdb, 2), be32(cdb, 10).into(), op == 0x8a, fua),
        // VERIFY without data.
        0x2f | 0x8f if byte(cdb, 1) & 6 != 0 => Plan::Fail(Sense::INVALID_FIELD),
        0x2f => check(disk, be32(cdb, 2).into(), be16(cdb, 7).into()),
        0x8f => check(disk, be64(cdb, 2), be32(cdb, 10).into()),
        0x35 | 0x91 => Plan::Work {
            backend: Arc::clone(disk),
            requests: vec![BlockRequest::Flush],
        },
        0x25 => {
            let info = disk.info();
            let last = blocks(disk).saturating_sub(1);
            let last = u32::try_from(last).unwrap_or(u32::MAX);
            let mut data = last.to_be_bytes().to_vec();
            data.extend_from_slice(&info.block_bytes.to_be_bytes());
            Plan::Reply(data)
        }
        // SERVICE ACTION IN (16): READ CAPACITY (16).
        0x9e if byte(cdb, 1) & 0x1f == 0x10 => {
            let info = disk.info();
            let mut data = vec![0; 32];
            let last = blocks(disk).saturating_sub(1);
            data[..8].copy_from_slice(&last.to_be_bytes());
            data[8..12].copy_from_slice(&info.block_bytes.to_be_bytes());
            let physical = 4096_u32.max(info.block_bytes) / info.block_bytes.max(1);
            data[13] = physical.trailing_zeros() as u8;
            if info.discard && !info.read_only {
                data[14] = 0x80; // LBPME
            }
            reply(data, be32(cdb, 10) as usize)
        }
        0x42 | 0x41 | 0x93 if disk.info().read_only => Plan::Fail(Sense::WRITE_PROTECTED),
        0x42 => match be16(cdb, 7) {
            0 => Plan::Done,
            len => Plan::Parameters {
                len: len.into(),
                what: Parameters::Unmap,
            },
        },
        0x41 | 0x93 => {
            let (lba, count) = if op == 0x41 {
                (be32(cdb, 2).into(), u64::from(be16(cdb, 7)))
            } else {
                (be64(cdb, 2), u64::from(be32(cdb, 10)))
            };
            // "Until the end" is more than the limit that was announced, or little to write out.
            if count == 0 || count > MAX_RANGE_BLOCKS.into() {
                return Plan::Fail(Sense::INVALID_FIELD);
            }
            if byte(cdb, 1) & 0xe6 != 0 {
                return Plan::Fail(Sense::INVALID_FIELD);
            }
            let unmap = byte(cdb, 1) & 8 != 0;
            let what = Parameters::Same { lba, count, unmap };
            // NDOB: the block is zeroes and is not sent.
            if op == 0x93 && byte(cdb, 1) & 1 != 0 {
                return same(disk, lba, count, unmap, &[]);
            }
            Plan::Parameters {
                len: disk.info().block_bytes,
                what,
            }
        }
        _ => Plan::Fail(Sense::INVALID_COMMAND),
    }
}

fn blocks(disk: &Arc<dyn BlockBackend>) -> u64 {
    let info = disk.info();
    info.size_bytes / u64::from(info.block_bytes.max(1))
}

/// Byte offset and length of blocks that exist.
fn span(disk: &Arc<dyn BlockBackend>, lba: u64, count: u64) -> Result<(u64, u64), Sense> {
    let end = lba.checked_add(count).ok_or(Sense::OUT_OF_RANGE)?;
    if end > blocks(disk) {
        return Err(Sense::OUT_OF_RANGE);
    }
    let block = u64::from(disk.info().block_bytes);
    Ok((lba * block, count * block))
}

fn check(disk: &Arc<dyn BlockBackend>, lba: u64, count: u64) -> Plan {
    span(disk, lba, count).map_or_else(Plan::Fail, |_| Plan::Done)
}

fn transfer(disk: &Arc<dyn BlockBackend>, lba: u64, count: u64, write: bool, fua: bool) -> Plan {
    if write && disk.info().read_only {
        return Plan::Fail(Sense::WRITE_PROTECTED);
    }
    match span(disk, lba, count) {
        Ok((_, 0)) => Plan::Done,
        Ok((offset, len)) => Plan::Transfer {
            backend: Arc::clone(disk),
            direction: if write { Direction::Out } else { Direction::In },
            offset,
            len,
            fua,
        },
        Err(sense) => Plan::Fail(sense),
    }
}

/// The parameter list of UNMAP. SBC-3 §5.28.2.
pub(super) fn unmap(disk: &Arc<dyn BlockBackend>, data: &[u8]) -> Plan {
    if data.len() < 8 {
        return Plan::Fail(Sense::PARAMETER_LENGTH);
    }
    let len = usize::from(be16(data, 2)).min(data.len() - 8) & !15;
    if len / 16 > MAX_UNMAP_RANGES {
        return Plan::Fail(Sense::INVALID_PARAMETER);
    }
    let mut requests = Vec::new();
    for at in (8..8 + len).step_by(16) {
        let (lba, count) = (be64(data, at), be32(data, at + 8));
        if count > MAX_RANGE_BLOCKS {
            return Plan::Fail(Sense::INVALID_PARAMETER);
        }
        match span(disk, lba, count.into()) {
            Ok((_, 0)) => {}
            Ok((offset, len)) => requests.push(BlockRequest::Discard { offset, len }),
            Err(sense) => return Plan::Fail(sense),
        }
    }
    Plan::Work {
        backend: Arc::clone(disk),
        requests,
    }
}

/// WRITE SAME of zeroes, the only content that is taken: what else would be written out block by
/// block is left to the guest.
pub(super) fn same(
    disk: &Arc<dyn BlockBackend>,
    lba: u64,
    count: u64,
    unmap: bool,
    data: &[u8],
) -> Plan {
    if data.iter().any(|b| *b != 0) {
        return Plan::Fail(Sense::INVALID_FIELD);
    }
    match span(disk, lba, count) {
        Ok((offset, len)) => Plan::Work {
            backend: Arc::clone(disk),
            requests: vec![BlockRequest::WriteZeroes {
                offset,
                len,
                may_unmap: unmap,
            }],
        },
        Err(sense) => Plan::Fail(sense),
    }
}
