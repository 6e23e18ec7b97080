//! VHDX images, fixed and dynamic. Source: [MS-VHDX].
//!
//! Reading, and making new ones. A new image is filled without the log, which is for images that
//! are in use; so existing images are opened for reading only. An image whose log is not empty was
//! not closed cleanly and is refused.

use std::collections::BTreeSet;

use crate::DiskError;
use crate::bytes::{le16, le32, le64, put};
use crate::image::{Details, Format};
use crate::io::map_error;
use crate::mapped::{Block, Layout, MAX_BLOCKS, Mapped, Table};
use crate::storage::Storage;

const MIB: u64 = 1 << 20;
const KIB64: usize = 64 << 10;
const BLOCK_BYTES: u64 = 32 << 20;
const HEADER_PLACES: [u64; 2] = [64 << 10, 128 << 10];
const REGION_PLACES: [u64; 2] = [192 << 10, 256 << 10];
/// LIMIT: the largest disk of the format.
const MAX_BYTES: u64 = 64 << 40;
/// LIMIT: entries of the region and metadata tables.
const MAX_ENTRIES: usize = 2047;

type Guid = [u8; 16];

/// A GUID as it is stored, from its usual form.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6],
        d[7],
    ]
}

const BAT: Guid = guid(
    0x2dc2_7766,
    0xf623,
    0x4200,
    [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08],
);
const METADATA: Guid = guid(
    0x8b7c_a206,
    0x4790,
    0x4b9a,
    [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e],
);
const FILE_PARAMETERS: Guid = guid(
    0xcaa1_6737,
    0xfa36,
    0x4d43,
    [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b],
);
const DISK_SIZE: Guid = guid(
    0x2fa5_4224,
    0xcd1b,
    0x4876,
    [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8],
);
const DISK_ID: Guid = guid(
    0xbeca_12ab,
    0xb2e6,
    0x4523,
    [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46],
);
const LOGICAL_SECTOR: Guid = guid(
    0x8141_bf1d,
    0xa96f,
    0x4709,
    [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f],
);
const PHYSICAL_SECTOR: Guid = guid(
    0xcda3_48c7,
    0x445d,
    0x4471,
    [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56],
);

fn damaged<T>(what: impl std::fmt::Display) -> Result<T, DiskError> {
    Err(DiskError::Corrupt(format!("damaged VHDX image: {what}")))
}

/// CRC-32C of a structure whose checksum field, at 4, counts as zero.
fn checksum(b: &[u8]) -> u32 {
    let (head, rest) = b.split_at(8.min(b.len()));
    let crc = crc32c::crc32c(head.get(..4).unwrap_or_default());
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[0; 4]), rest)
}

fn read(storage: &dyn Storage, at: u64, bytes: usize) -> Result<Vec<u8>, DiskError> {
    let mut b = vec![0; bytes];
    storage.read_at(at, &mut b).map_err(map_error)?;
    Ok(b)
}

/// Payload blocks between two sector bitmap blocks. [MS-VHDX] 2.5.
fn chunk_ratio(sector_bytes: u64, block_bytes: u64) -> u64 {
    ((1 << 23) * sector_bytes / block_bytes).max(1)
}

struct VhdxTable {
    bat_at: u64,
    ratio: u64,
}

impl Table for VhdxTable {
    fn store(
        &mut self,
        storage: &dyn Storage,
        map: &[Block],
        changed: &BTreeSet<usize>,
    ) -> Result<(), DiskError> {
        for index in changed {
            if let Some(Block::At(at)) = map.get(*index) {
                let index = *index as u64;
                let entry = index + index / self.ratio;
                // PAYLOAD_BLOCK_FULLY_PRESENT; the offset is in MiB from bit 20 on.
                storage
                    .write_at(self.bat_at + entry * 8, &(at | 6).to_le_bytes())
                    .map_err(map_error)?;
            }
        }
        Ok(())
    }

    fn align(&self) -> u64 {
        MIB
    }
}

/// Finds a region: offset and bytes.
fn region(table: &[u8], wanted: Guid, file: u64) -> Result<(u64, u64), DiskError> {
    let count = le32(table, 8) as usize;
    if count > MAX_ENTRIES {
        return damaged(format!("{count} regions"));
    }
    let mut found = None;
    for n in 0..count {
        let at = 16 + n * 32;
        let id = table.get(at..at + 16).unwrap_or_default();
        let (offset, bytes) = (le64(table, at + 16), u64::from(le32(table, at + 24)));
        if id == wanted {
            if offset < MIB || !offset.is_multiple_of(MIB) || offset.saturating_add(bytes) > file {
                return damaged(format!("a region at {offset:#x}; the file is cut off?"));
            }
            found = Some((offset, bytes));
        } else if id != BAT && id != METADATA && le32(table, at + 28) & 1 != 0 {
            return Err(DiskError::Unsupported(
                "the VHDX image has an unknown region that is required".into(),
            ));
        }
    }
    match found {
        Some(r) => Ok(r),
        None => damaged("a region is missing"),
    }
}

/// Finds a metadata item.
fn item(metadata: &[u8], wanted: Guid) -> Result<&[u8], DiskError> {
    let count = usize::from(le16(metadata, 10));
    for n in 0..count.min(MAX_ENTRIES) {
        let at = 32 + n * 32;
        if metadata.get(at..at + 16) == Some(&wanted[..]) {
            let (offset, bytes) = (
                le32(metadata, at + 16) as usize,
                le32(metadata, at + 20) as usize,
            );
            if offset < KIB64 {
                break;
            }
            if let Some(value) = offset
                .checked_add(bytes)
                .and_then(|end| metadata.get(offset..end))
            {
                return Ok(value);
            }
        }
    }
    damaged("a metadata item is missing")
}

pub(crate) fn open(storage: Box<dyn Storage>, read_only: bool) -> Result<Mapped, DiskError> {
    if !read_only {
        return Err(DiskError::Unsupported(
            "VHDX images can only be opened read-only; convert it to qcow2 or raw to write to it"
                .into(),
        ));
    }
    open_for(storage, true)
}

/// A new image, to be filled.
pub(crate) fn open_new(storage: Box<dyn Storage>) -> Result<Mapped, DiskError> {
    open_for(storage, false)
}

fn open_for(storage: Box<dyn Storage>, read_only: bool) -> Result<Mapped, DiskError> {
    let s = &*storage;
    let file = s.len().map_err(map_error)?;
    if !read(s, 0, 8)?.starts_with(b"vhdxfile") {
        return damaged("it does not begin as one; expected a VHDX image");
    }
    let mut current: Option<Vec<u8>> = None;
    for at in HEADER_PLACES {
        let h = read(s, at, 4096)?;
        let valid = h.starts_with(b"head") && le32(&h, 4) == checksum(&h);
        if valid && current.as_ref().is_none_or(|c| le64(&h, 8) > le64(c, 8)) {
            current = Some(h);
        }
    }
    let Some(header) = current else {
        return damaged("both headers are wrong");
    };
    if le16(&header, 66) != 1 {
        return Err(DiskError::Unsupported(format!(
            "VHDX version {} is not supported; expected 1",
            le16(&header, 66)
        )));
    }
    if header
        .get(48..64)
        .is_some_and(|log| log.iter().any(|b| *b != 0))
    {
        return Err(DiskError::Unsupported(
            "the VHDX image was not closed cleanly: its log is not empty; replay it first \
             (qemu-img check -r all)"
                .into(),
        ));
    }
    let mut regions = None;
    for at in REGION_PLACES {
        let t = read(s, at, KIB64)?;
        if t.starts_with(b"regi") && le32(&t, 4) == checksum(&t) {
            regions = Some(t);
            break;
        }
    }
    let Some(regions) = regions else {
        return damaged("both region tables are wrong");
    };
    let (bat_at, bat_bytes) = region(&regions, BAT, file)?;
    let (meta_at, meta_bytes) = region(&regions, METADATA, file)?;
    let metadata = read(s, meta_at, meta_bytes.min(2 * MIB) as usize)?;
    if !metadata.starts_with(b"metadata") {
        return damaged("the metadata table is wrong");
    }
    let parameters = item(&metadata, FILE_PARAMETERS)?;
    let (block_bytes, flags) = (u64::from(le32(parameters, 0)), le32(parameters, 4));
    if flags & 2 != 0 {
        return Err(DiskError::Unsupported(
            "VHDX images with a parent are not supported; merge it first".into(),
        ));
    }
    let size_bytes = le64(item(&metadata, DISK_SIZE)?, 0);
    let sector_bytes = u64::from(le32(item(&metadata, LOGICAL_SECTOR)?, 0));
    if !block_bytes.is_power_of_two()
        || !(MIB..=256 * MIB).contains(&block_bytes)
        || !matches!(sector_bytes, 512 | 4096)
        || size_bytes > MAX_BYTES
    {
        return damaged(format!(
            "blocks of {block_bytes}, sectors of {sector_bytes} and a disk of {size_bytes} bytes"
        ));
    }
    let blocks = size_bytes.div_ceil(block_bytes);
    let ratio = chunk_ratio(sector_bytes, block_bytes);
    let entries = blocks + blocks.saturating_sub(1) / ratio;
    if blocks > MAX_BLOCKS || entries * 8 > bat_bytes {
        return damaged(format!("a table of {bat_bytes} bytes for {blocks} blocks"));
    }
    let bat = read(s, bat_at, (entries * 8) as usize)?;
    let mut map = Vec::with_capacity(blocks as usize);
    let mut end = (bat_at + bat_bytes).max(meta_at + meta_bytes).max(file);
    for block in 0..blocks {
        let entry = le64(&bat, ((block + block / ratio) * 8) as usize);
        let at = entry & !(MIB - 1);
        map.push(match entry & 7 {
            0 | 1 => Block::Absent,
            2 | 3 => Block::Zero,
            // The last block may be cut where the disk ends.
            6 if at >= MIB && at < file => {
                end = end.max(at + block_bytes);
                Block::At(at)
            }
            state => return damaged(format!("a block in state {state} at {at:#x}")),
        });
    }
    let mut details = Details::plain(Format::Vhdx);
    details.cluster_bytes = Some(block_bytes);
    let name = if flags & 1 != 0 { "fixed" } else { "dynamic" };
    details.properties.push(("type", name.into()));
    let layout = Layout {
        size_bytes,
        block_bytes,
        map,
        end,
        table: Box::new(VhdxTable { bat_at, ratio }),
        details,
    };
    Mapped::new(storage, layout, read_only)
}

/// Makes an empty dynamic image. `ids`: of the file, of its data, of the disk.
pub(crate) fn create(
    storage: &dyn Storage,
    size_bytes: u64,
    ids: [Guid; 3],
) -> Result<(), DiskError> {
    if size_bytes == 0 || size_bytes > MAX_BYTES {
        return Err(DiskError::Unsupported(format!(
            "a VHDX image of {size_bytes} bytes is not possible; at most 64 TiB"
        )));
    }
    let write = |at: u64, b: &[u8]| storage.write_at(at, b).map_err(map_error);
    // 1 MiB of headers, the log, the metadata, the table.
    let (log_at, meta_at, bat_at) = (MIB, 2 * MIB, 3 * MIB);
    let blocks = size_bytes.div_ceil(BLOCK_BYTES);
    let ratio = chunk_ratio(512, BLOCK_BYTES);
    let entries = blocks + (blocks - 1) / ratio;
    let bat_bytes = (entries * 8).next_multiple_of(MIB);
    storage.set_len(bat_at + bat_bytes).map_err(map_error)?;
    let mut id = vec![0; 520];
    put(&mut id, 0, b"vhdxfile");
    for (n, c) in "pyrite".encode_utf16().enumerate() {
        put(&mut id, 8 + n * 2, &c.to_le_bytes());
    }
    let mut metadata = vec![0; KIB64 + 64];
    put(&mut metadata, 0, b"metadata");
    put(&mut metadata, 10, &5u16.to_le_bytes());
    let mut offset = KIB64;
    // Flags: 2 virtual disk, 4 required.
    for (n, (item, value, flags)) in [
        (
            FILE_PARAMETERS,
            u64::from(BLOCK_BYTES as u32).to_le_bytes().to_vec(),
            4u32,
        ),
        (DISK_SIZE, size_bytes.to_le_bytes().to_vec(), 6),
        (DISK_ID, ids[2].to_vec(), 6),
        (LOGICAL_SECTOR, 512u32.to_le_bytes().to_vec(), 6),
        (PHYSICAL_SECTOR, 4096u32.to_le_bytes().to_vec(), 6),
    ]
    .into_iter()
    .enumerate()
    {
        let at = 32 + n * 32;
        put(&mut metadata, at, &item);
        put(&mut metadata, at + 16, &(offset as u32).to_le_bytes());
        put(&mut metadata, at + 20, &(value.len() as u32).to_le_bytes());
        put(&mut metadata, at + 24, &flags.to_le_bytes());
        put(&mut metadata, offset, &value);
        offset += value.len();
    }
    let mut regions = vec![0; KIB64];
    put(&mut regions, 0, b"regi");
    put(&mut regions, 8, &2u32.to_le_bytes());
    for (n, (region, at, bytes)) in [(BAT, bat_at, bat_bytes), (METADATA, meta_at, MIB)]
        .into_iter()
        .enumerate()
    {
        let place = 16 + n * 32;
        put(&mut regions, place, &region);
        put(&mut regions, place + 16, &at.to_le_bytes());
        put(&mut regions, place + 24, &(bytes as u32).to_le_bytes());
        put(&mut regions, place + 28, &1u32.to_le_bytes());
    }
    let sum = checksum(&regions);
    put(&mut regions, 4, &sum.to_le_bytes());
    write(meta_at, &metadata)?;
    for at in REGION_PLACES {
        write(at, &regions)?;
    }
    for (n, at) in HEADER_PLACES.into_iter().enumerate() {
        let mut h = vec![0; 4096];
        put(&mut h, 0, b"head");
        put(&mut h, 8, &(n as u64 + 1).to_le_bytes());
        put(&mut h, 16, &ids[0]);
        put(&mut h, 32, &ids[1]);
        put(&mut h, 66, &1u16.to_le_bytes());
        put(&mut h, 68, &(MIB as u32).to_le_bytes());
        put(&mut h, 72, &log_at.to_le_bytes());
        let sum = checksum(&h);
        put(&mut h, 4, &sum.to_le_bytes());
        write(at, &h)?;
    }
    write(0, &id)?;
    storage.sync().map_err(map_error)
}
