//! VHD images, fixed and dynamic. Source: Virtual Hard Disk Image Format Specification, 2006.

use std::collections::BTreeSet;

use crate::DiskError;
use crate::bytes::{be16, be32, be64, put};
use crate::image::{Details, Format};
use crate::io::map_error;
use crate::mapped::{Block, Layout, MAX_BLOCKS, Mapped, Table};
use crate::storage::Storage;

const FOOTER_BYTES: u64 = 512;
const HEADER_BYTES: u64 = 1024;
const BLOCK_BYTES: u64 = 2 << 20;
const ABSENT: u32 = 0xffff_ffff;
const TYPE_FIXED: u32 = 2;
const TYPE_DYNAMIC: u32 = 3;
/// LIMIT: what the geometry and sector offsets of the format can hold, in bytes (2040 GiB).
const MAX_BYTES: u64 = 2040 << 30;
/// The geometry that means "larger than it can say".
const MAX_GEOMETRY: u64 = 65535 * 16 * 255;
/// Bytes of a fixed image that are looked at as one block.
const FIXED_BLOCK: u64 = 1 << 30;

fn checksum(b: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().map(|b| u32::from(*b)).sum::<u32>();
    let own = b.get(at..at + 4).unwrap_or_default();
    !(sum(b).wrapping_sub(sum(own)))
}

fn damaged<T>(what: impl std::fmt::Display) -> Result<T, DiskError> {
    Err(DiskError::Corrupt(format!("damaged VHD image: {what}")))
}

struct VhdTable {
    table_at: u64,
    bitmap_bytes: u64,
    footer: Vec<u8>,
    /// Where the last block ends.
    end: u64,
    block_bytes: u64,
}

impl Table for VhdTable {
    fn store(
        &mut self,
        storage: &dyn Storage,
        map: &[Block],
        changed: &BTreeSet<usize>,
    ) -> Result<(), DiskError> {
        for index in changed {
            if let Some(Block::At(at)) = map.get(*index) {
                self.end = self.end.max(at + self.block_bytes);
            }
        }
        // The copy at the end moves on; the one at the beginning stays meanwhile.
        storage
            .write_at(self.end, &self.footer)
            .map_err(map_error)?;
        for index in changed {
            if let Some(Block::At(at)) = map.get(*index) {
                let entry = ((at - self.bitmap_bytes) / 512) as u32;
                storage
                    .write_at(self.table_at + *index as u64 * 4, &entry.to_be_bytes())
                    .map_err(map_error)?;
            }
        }
        Ok(())
    }

    fn prefix(&self) -> Vec<u8> {
        vec![0xff; self.bitmap_bytes as usize]
    }

    fn align(&self) -> u64 {
        512
    }
}

/// A fixed image has no table.
struct NoTable;

impl Table for NoTable {
    fn store(
        &mut self,
        _: &dyn Storage,
        _: &[Block],
        _: &BTreeSet<usize>,
    ) -> Result<(), DiskError> {
        Ok(())
    }

    fn align(&self) -> u64 {
        512
    }
}

/// The size that the footer means. Some programs mean the geometry, others the size field.
fn size_of(footer: &[u8]) -> u64 {
    let geometry = u64::from(be16(footer, 56))
        * u64::from(footer.get(58).copied().unwrap_or(0))
        * u64::from(footer.get(59).copied().unwrap_or(0));
    let by_size = [&b"win "[..], b"qem2", b"d2v ", b"tap\0", b"CTXS"];
    let creator = footer.get(28..32).unwrap_or_default();
    if by_size.contains(&creator) || geometry == MAX_GEOMETRY || geometry == 0 {
        be64(footer, 48)
    } else {
        geometry * 512
    }
}

pub(crate) fn open(storage: Box<dyn Storage>, read_only: bool) -> Result<Mapped, DiskError> {
    let file = storage.len().map_err(map_error)?;
    if file < FOOTER_BYTES {
        return damaged("the file is too short");
    }
    let mut footer = vec![0; FOOTER_BYTES as usize];
    storage.read_at(0, &mut footer).map_err(map_error)?;
    if !footer.starts_with(b"conectix") {
        storage
            .read_at(file - FOOTER_BYTES, &mut footer)
            .map_err(map_error)?;
    }
    if !footer.starts_with(b"conectix") {
        return damaged("there is no footer; expected a VHD image");
    }
    if checksum(&footer, 64) != be32(&footer, 64) {
        return damaged("the checksum of the footer is wrong");
    }
    let size_bytes = size_of(&footer);
    if size_bytes > MAX_BYTES {
        return damaged(format!("a disk of {size_bytes} bytes"));
    }
    let mut details = Details::plain(Format::Vhd);
    match be32(&footer, 60) {
        TYPE_FIXED => {
            if size_bytes > file - FOOTER_BYTES {
                return damaged(format!(
                    "the file has {file} bytes, for a disk of {size_bytes}; it is cut off"
                ));
            }
            details.properties.push(("type", "fixed".into()));
            let map = (0..size_bytes.div_ceil(FIXED_BLOCK))
                .map(|n| Block::At(n * FIXED_BLOCK))
                .collect();
            let layout = Layout {
                size_bytes,
                block_bytes: FIXED_BLOCK,
                map,
                end: file,
                table: Box::new(NoTable),
                details,
            };
            Mapped::new(storage, layout, read_only)
        }
        TYPE_DYNAMIC => open_dynamic(storage, footer, size_bytes, file, details, read_only),
        4 => Err(DiskError::Unsupported(
            "VHD images with a parent are not supported; merge it first".into(),
        )),
        n => damaged(format!("disk type {n}")),
    }
}

fn open_dynamic(
    storage: Box<dyn Storage>,
    footer: Vec<u8>,
    size_bytes: u64,
    file: u64,
    mut details: Details,
    read_only: bool,
) -> Result<Mapped, DiskError> {
    let header_at = be64(&footer, 16);
    let mut h = vec![0; HEADER_BYTES as usize];
    if header_at.saturating_add(HEADER_BYTES) > file {
        return damaged("the header lies beyond the end of the file");
    }
    storage.read_at(header_at, &mut h).map_err(map_error)?;
    if !h.starts_with(b"cxsparse") || checksum(&h, 36) != be32(&h, 36) {
        return damaged("the header of the dynamic disk is wrong");
    }
    let table_at = be64(&h, 16);
    let blocks = u64::from(be32(&h, 28));
    let block_bytes = u64::from(be32(&h, 32));
    if !block_bytes.is_power_of_two() || !(4096..=1 << 28).contains(&block_bytes) {
        return damaged(format!("blocks of {block_bytes} bytes"));
    }
    if blocks > MAX_BLOCKS || table_at.saturating_add(blocks * 4) > file {
        return damaged(format!("a table of {blocks} entries at {table_at:#x}"));
    }
    let bitmap_bytes = (block_bytes / 512 / 8).next_multiple_of(512);
    let mut bytes = vec![0; blocks as usize * 4];
    storage.read_at(table_at, &mut bytes).map_err(map_error)?;
    let mut end = (table_at + blocks * 4)
        .next_multiple_of(512)
        .max(header_at + HEADER_BYTES);
    let first = end.min(header_at).max(FOOTER_BYTES);
    let mut map = Vec::with_capacity(blocks as usize);
    for c in bytes.chunks_exact(4) {
        map.push(match be32(c, 0) {
            ABSENT => Block::Absent,
            sector => {
                let at = u64::from(sector) * 512 + bitmap_bytes;
                if at < first || at + block_bytes > file.next_multiple_of(512) {
                    return damaged(format!("a block is at {at:#x}"));
                }
                end = end.max(at + block_bytes);
                Block::At(at)
            }
        });
    }
    details.cluster_bytes = Some(block_bytes);
    details.properties.push(("type", "dynamic".into()));
    let table = VhdTable {
        table_at,
        bitmap_bytes,
        footer,
        end,
        block_bytes,
    };
    let layout = Layout {
        size_bytes,
        block_bytes,
        map,
        end,
        table: Box::new(table),
        details,
    };
    Mapped::new(storage, layout, read_only)
}

/// Cylinders, heads and sectors. The specification, appendix "CHS Calculation".
fn geometry(size_bytes: u64) -> (u16, u8, u8) {
    let sectors = (size_bytes / 512).min(MAX_GEOMETRY);
    if sectors >= 65535 * 16 * 63 {
        return ((sectors / 255 / 16) as u16, 16, 255);
    }
    let mut per_track = 17;
    let mut by_heads = sectors / per_track;
    let mut heads = by_heads.div_ceil(1024).max(4);
    if by_heads >= heads * 1024 || heads > 16 {
        per_track = 31;
        heads = 16;
        by_heads = sectors / per_track;
    }
    if by_heads >= heads * 1024 {
        per_track = 63;
        heads = 16;
        by_heads = sectors / per_track;
    }
    ((by_heads / heads) as u16, heads as u8, per_track as u8)
}

fn footer(size_bytes: u64, kind: u32, id: [u8; 16]) -> Vec<u8> {
    let mut f = vec![0; FOOTER_BYTES as usize];
    put(&mut f, 0, b"conectix");
    put(&mut f, 8, &2u32.to_be_bytes());
    put(&mut f, 12, &0x0001_0000u32.to_be_bytes());
    let data_at = if kind == TYPE_FIXED {
        u64::MAX
    } else {
        FOOTER_BYTES
    };
    put(&mut f, 16, &data_at.to_be_bytes());
    // Of this creator readers believe the size rather than the geometry.
    put(&mut f, 28, b"win ");
    put(&mut f, 32, &0x0006_0001u32.to_be_bytes());
    put(&mut f, 36, b"Wi2k");
    put(&mut f, 40, &size_bytes.to_be_bytes());
    put(&mut f, 48, &size_bytes.to_be_bytes());
    let (cylinders, heads, per_track) = geometry(size_bytes);
    put(&mut f, 56, &cylinders.to_be_bytes());
    put(&mut f, 58, &[heads, per_track]);
    put(&mut f, 60, &kind.to_be_bytes());
    put(&mut f, 68, &id);
    let sum = checksum(&f, 64);
    put(&mut f, 64, &sum.to_be_bytes());
    f
}

/// Makes an empty image.
pub(crate) fn create(
    storage: &dyn Storage,
    size_bytes: u64,
    fixed: bool,
    id: [u8; 16],
) -> Result<(), DiskError> {
    if size_bytes == 0 || size_bytes > MAX_BYTES {
        return Err(DiskError::Unsupported(format!(
            "a VHD image of {size_bytes} bytes is not possible; at most 2040 GiB"
        )));
    }
    if fixed {
        storage.set_len(size_bytes).map_err(map_error)?;
        let f = footer(size_bytes, TYPE_FIXED, id);
        storage.write_at(size_bytes, &f).map_err(map_error)?;
        return storage.sync().map_err(map_error);
    }
    let blocks = size_bytes.div_ceil(BLOCK_BYTES);
    let table_at = FOOTER_BYTES + HEADER_BYTES;
    let f = footer(size_bytes, TYPE_DYNAMIC, id);
    let mut h = vec![0; HEADER_BYTES as usize];
    put(&mut h, 0, b"cxsparse");
    put(&mut h, 8, &u64::MAX.to_be_bytes());
    put(&mut h, 16, &table_at.to_be_bytes());
    put(&mut h, 24, &0x0001_0000u32.to_be_bytes());
    put(&mut h, 28, &(blocks as u32).to_be_bytes());
    put(&mut h, 32, &(BLOCK_BYTES as u32).to_be_bytes());
    let sum = checksum(&h, 36);
    put(&mut h, 36, &sum.to_be_bytes());
    let table = vec![0xff; (blocks * 4).next_multiple_of(512) as usize];
    let end = table_at + table.len() as u64;
    storage.write_at(end, &f).map_err(map_error)?;
    storage.write_at(table_at, &table).map_err(map_error)?;
    storage.write_at(FOOTER_BYTES, &h).map_err(map_error)?;
    storage.write_at(0, &f).map_err(map_error)?;
    storage.sync().map_err(map_error)
}

/// Makes the checksums right again, so that tests reach what lies behind them.
#[cfg(test)]
pub(crate) fn fix_checksums(b: &mut [u8]) {
    for (from, to, at) in [(0, 512, 64), (512, 1536, 36)] {
        if let Some(part) = b.get_mut(from..to) {
            let sum = checksum(part, at);
            put(part, at, &sum.to_be_bytes());
        }
    }
}
