//! VDI images, version 1.1, dynamic and static. Source: VirtualBox, VDICore.h.

use std::collections::BTreeSet;

use crate::DiskError;
use crate::bytes::{le32, le64, put};
use crate::image::{Details, Format};
use crate::io::map_error;
use crate::mapped::{Block, Layout, MAX_BLOCKS, Mapped, Table};
use crate::storage::Storage;

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
const BLOCK_BYTES: u64 = 1 << 20;
const ABSENT: u32 = 0xffff_ffff;
const ZERO: u32 = 0xffff_fffe;
const TYPE_DYNAMIC: u32 = 1;
const TYPE_STATIC: u32 = 2;
/// Where the table of a new image is.
const TABLE_AT: u64 = 512;

struct VdiTable {
    table_at: u64,
    data_at: u64,
    block_bytes: u64,
}

impl Table for VdiTable {
    fn store(
        &mut self,
        storage: &dyn Storage,
        map: &[Block],
        changed: &BTreeSet<usize>,
    ) -> Result<(), DiskError> {
        for index in changed {
            if let Some(Block::At(at)) = map.get(*index) {
                let entry = ((at - self.data_at) / self.block_bytes) as u32;
                storage
                    .write_at(self.table_at + *index as u64 * 4, &entry.to_le_bytes())
                    .map_err(map_error)?;
            }
        }
        let used = map.iter().filter(|b| matches!(b, Block::At(_))).count() as u32;
        storage
            .write_at(388, &used.to_le_bytes())
            .map_err(map_error)
    }

    fn align(&self) -> u64 {
        // `end` is at a block already.
        1
    }
}

fn damaged<T>(what: impl std::fmt::Display) -> Result<T, DiskError> {
    Err(DiskError::Corrupt(format!("damaged VDI image: {what}")))
}

pub(crate) fn open(storage: Box<dyn Storage>, read_only: bool) -> Result<Mapped, DiskError> {
    let file = storage.len().map_err(map_error)?;
    let mut h = [0; 512];
    storage.read_at(0, &mut h).map_err(map_error)?;
    if le32(&h, 64) != SIGNATURE {
        return damaged("it does not begin as one; expected a VDI image");
    }
    if le32(&h, 68) != VERSION {
        return Err(DiskError::Unsupported(format!(
            "VDI version {:#x} is not supported; expected 1.1",
            le32(&h, 68)
        )));
    }
    let kind = le32(&h, 76);
    if !matches!(kind, TYPE_DYNAMIC | TYPE_STATIC) || h[440..456].iter().any(|b| *b != 0) {
        return Err(DiskError::Unsupported(
            "only dynamic and static VDI images without a parent are supported".into(),
        ));
    }
    let (table_at, data_at) = (u64::from(le32(&h, 340)), u64::from(le32(&h, 344)));
    let size_bytes = le64(&h, 368);
    let block_bytes = u64::from(le32(&h, 376));
    let blocks = u64::from(le32(&h, 384));
    if le32(&h, 360) != 512 || !(4096..=1 << 28).contains(&block_bytes) {
        return damaged(format!(
            "sectors of {} or blocks of {block_bytes} bytes",
            le32(&h, 360)
        ));
    }
    if !block_bytes.is_power_of_two() || blocks > MAX_BLOCKS {
        return damaged(format!("{blocks} blocks of {block_bytes} bytes"));
    }
    if table_at < 512 || table_at + blocks * 4 > file || data_at < table_at + blocks * 4 {
        return damaged("the table is not where it can be; the file is cut off?");
    }
    let mut bytes = vec![0; blocks as usize * 4];
    storage.read_at(table_at, &mut bytes).map_err(map_error)?;
    let mut map = Vec::with_capacity(blocks as usize);
    let mut end = data_at;
    for c in bytes.chunks_exact(4) {
        map.push(match le32(c, 0) {
            ABSENT => Block::Absent,
            ZERO => Block::Zero,
            n if u64::from(n) < blocks => {
                let at = data_at + u64::from(n) * block_bytes;
                end = end.max(at + block_bytes);
                Block::At(at)
            }
            n => return damaged(format!("block {n} of {blocks}")),
        });
    }
    let mut details = Details::plain(Format::Vdi);
    details.cluster_bytes = Some(block_bytes);
    let name = if kind == TYPE_STATIC {
        "static"
    } else {
        "dynamic"
    };
    details.properties.push(("type", name.into()));
    let table = VdiTable {
        table_at,
        data_at,
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

/// Makes an empty dynamic image.
pub(crate) fn create(
    storage: &dyn Storage,
    size_bytes: u64,
    id: [u8; 16],
) -> Result<(), DiskError> {
    let blocks = size_bytes.div_ceil(BLOCK_BYTES);
    if blocks > MAX_BLOCKS || size_bytes == 0 {
        return Err(DiskError::Unsupported(format!(
            "a VDI image of {size_bytes} bytes is not possible; at most 16 TiB"
        )));
    }
    let data_at = (TABLE_AT + blocks * 4).next_multiple_of(BLOCK_BYTES);
    let mut h = vec![0; 512];
    put(&mut h, 0, b"<<< Oracle VM VirtualBox Disk Image >>>\n");
    for (at, value) in [
        (64, SIGNATURE),
        (68, VERSION),
        (72, 400),
        (76, TYPE_DYNAMIC),
        (340, TABLE_AT as u32),
        (344, data_at as u32),
        (360, 512),
        (376, BLOCK_BYTES as u32),
        (384, blocks as u32),
    ] {
        put(&mut h, at, &value.to_le_bytes());
    }
    put(&mut h, 368, &size_bytes.to_le_bytes());
    put(&mut h, 392, &id);
    storage.set_len(data_at).map_err(map_error)?;
    let table = vec![0xff; blocks as usize * 4];
    storage.write_at(TABLE_AT, &table).map_err(map_error)?;
    storage.write_at(0, &h).map_err(map_error)?;
    storage.sync().map_err(map_error)
}
