//! Images that are a table of blocks: VDI, VHD, VHDX and sparse VMDK.
//!
//! The whole table is in memory. A block that is written for the first time is put at the end of
//! the file; its entry is written with the next flush, after a barrier, so that the table in the
//! file never names a block without its content.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::image::{Details, Extent, Image};
use crate::io::map_error;
use crate::payload::{Source, Target};
use crate::storage::Storage;
use crate::{DiskError, DiskInfo};

#[cfg(test)]
mod tests;

/// LIMIT: blocks of an image: 1 TiB with grains of 64 KiB, 128 MiB of memory.
pub(crate) const MAX_BLOCKS: u64 = 16 << 20;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Nowhere: zeroes.
    Absent,
    /// Said to be zeroes.
    Zero,
    /// At this offset of the file.
    At(u64),
    /// Compressed, with what surrounds it, at this offset of the file.
    Packed(u64),
}

/// What differs between formats.
pub(crate) trait Table: Send + Sync {
    /// Writes the entries of blocks that have got a place.
    fn store(
        &mut self,
        storage: &dyn Storage,
        map: &[Block],
        changed: &BTreeSet<usize>,
    ) -> Result<(), DiskError>;
    /// Bytes before a new block that belong to it, e.g. a bitmap of its sectors.
    fn prefix(&self) -> Vec<u8> {
        Vec::new()
    }
    /// A new block begins at a multiple of this many bytes.
    fn align(&self) -> u64;
    /// Unpacks the compressed block `index` at `at`.
    fn unpack(&self, _storage: &dyn Storage, index: u64, _at: u64) -> Result<Vec<u8>, DiskError> {
        Err(DiskError::Corrupt(format!("block {index} is compressed")))
    }
}

struct State {
    map: Vec<Block>,
    changed: BTreeSet<usize>,
    table: Box<dyn Table>,
    /// Where the next new block goes, before alignment.
    end: u64,
}

/// What a format has found out about an image.
pub(crate) struct Layout {
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u64,
    pub(crate) map: Vec<Block>,
    pub(crate) end: u64,
    pub(crate) table: Box<dyn Table>,
    pub(crate) details: Details,
}

/// An image with a table of blocks.
pub(crate) struct Mapped {
    storage: Box<dyn Storage>,
    size_bytes: u64,
    block_bytes: u64,
    read_only: bool,
    details: Details,
    state: Mutex<State>,
    /// One flush at a time.
    flushing: Mutex<()>,
    unpacked: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

impl Mapped {
    pub(crate) fn new(
        storage: Box<dyn Storage>,
        layout: Layout,
        read_only: bool,
    ) -> Result<Mapped, DiskError> {
        let Layout {
            size_bytes,
            block_bytes,
            map,
            end,
            table,
            details,
        } = layout;
        let format = details.format;
        if !size_bytes.is_multiple_of(512) || size_bytes == 0 || size_bytes >= 1 << 62 {
            return Err(DiskError::Corrupt(format!(
                "the {format} image says that its disk has {size_bytes} bytes"
            )));
        }
        if (map.len() as u64) < size_bytes.div_ceil(block_bytes) {
            return Err(DiskError::Corrupt(format!(
                "the table of the {format} image is too short for {size_bytes} bytes"
            )));
        }
        let mut seen: Vec<u64> = map
            .iter()
            .filter_map(|b| match b {
                Block::At(at) => Some(*at),
                _ => None,
            })
            .collect();
        seen.sort_unstable();
        // Blocks that lie over one another would change each other.
        let clash = seen.windows(2).any(|w| match w {
            [a, b] => b - a < block_bytes,
            _ => false,
        });
        if clash && !read_only {
            return Err(DiskError::Corrupt(format!(
                "blocks of the {format} image lie over one another; open it read-only and convert \
                 it"
            )));
        }
        Ok(Mapped {
            storage,
            size_bytes,
            block_bytes,
            read_only,
            details,
            state: Mutex::new(State {
                map,
                changed: BTreeSet::new(),
                table,
                end,
            }),
            flushing: Mutex::new(()),
            unpacked: Mutex::new(None),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block(&self, index: u64) -> Block {
        self.state()
            .map
            .get(index as usize)
            .copied()
            .unwrap_or(Block::Absent)
    }

    fn unpack(&self, index: u64, at: u64) -> Result<Arc<Vec<u8>>, DiskError> {
        let lock = || self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((place, data)) = lock().as_ref()
            && *place == at
        {
            return Ok(Arc::clone(data));
        }
        let mut data = self.state().table.unpack(&*self.storage, index, at)?;
        data.resize(self.block_bytes as usize, 0);
        let data = Arc::new(data);
        *lock() = Some((at, Arc::clone(&data)));
        Ok(data)
    }

    /// Gives a block a place at the end, filled with zeroes.
    fn place(&self, s: &mut State, index: u64) -> Result<u64, DiskError> {
        let prefix = s.table.prefix();
        let start = s.end.next_multiple_of(s.table.align());
        let at = start + prefix.len() as u64;
        let end = at + self.block_bytes;
        let len = self.storage.len().map_err(map_error)?;
        if len < end {
            self.storage.set_len(end).map_err(map_error)?;
        }
        // What is there may be a footer, or what an unclean end has left.
        if len > start {
            let stale = len.min(end) - start;
            crate::storage::write_zeroes(&*self.storage, false, start, stale).map_err(map_error)?;
        }
        self.storage.write_at(start, &prefix).map_err(map_error)?;
        s.end = end;
        if let Some(b) = s.map.get_mut(index as usize) {
            *b = Block::At(at);
        }
        s.changed.insert(index as usize);
        Ok(at)
    }
}

impl Image for Mapped {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size_bytes: self.size_bytes,
            block_bytes: 512,
            read_only: self.read_only,
            discard: false,
        }
    }

    fn read(&self, offset: u64, target: &mut Target<'_>) -> Result<(), DiskError> {
        let mut at = offset;
        while target.remaining() > 0 {
            let (index, inside) = (at / self.block_bytes, at % self.block_bytes);
            let n = target.remaining().min(self.block_bytes - inside);
            match self.block(index) {
                Block::Absent | Block::Zero => target.zero(n)?,
                Block::At(place) => target.fill_from(&*self.storage, place + inside, n)?,
                Block::Packed(place) => {
                    let data = self.unpack(index, place)?;
                    let part = data.get(inside as usize..(inside + n) as usize);
                    target.copy(part.unwrap_or_default())?;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn write(&self, offset: u64, source: &mut Source<'_>) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        let mut at = offset;
        while source.remaining() > 0 {
            let (index, inside) = (at / self.block_bytes, at % self.block_bytes);
            let n = source.remaining().min(self.block_bytes - inside);
            let mut s = self.state();
            let place = match s.map.get(index as usize).copied() {
                Some(Block::At(place)) => place,
                Some(Block::Absent | Block::Zero) => self.place(&mut s, index)?,
                _ => {
                    return Err(DiskError::Unsupported(format!(
                        "compressed {} images cannot be written; convert it first",
                        self.details.format
                    )));
                }
            };
            drop(s);
            source.write_to(&*self.storage, place + inside, n)?;
            at += n;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<(), DiskError> {
        let mut at = offset;
        let zeroes = vec![0; len.min(256 << 10) as usize];
        while at < offset + len {
            let inside = at % self.block_bytes;
            let n = (offset + len - at).min(self.block_bytes - inside);
            if !matches!(
                self.block(at / self.block_bytes),
                Block::Absent | Block::Zero
            ) {
                let mut from = at;
                while from < at + n {
                    let part = (at + n - from).min(zeroes.len() as u64);
                    self.write(from, &mut Source::host(&zeroes[..part as usize]))?;
                    from += part;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<(), DiskError> {
        // Advice; these formats are copied to become smaller.
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.storage.sync().map_err(map_error)?;
        let mut s = self.state();
        if s.changed.is_empty() {
            return Ok(());
        }
        // Blocks that were placed since the barrier hold zeroes at worst: they were not flushed.
        let changed = std::mem::take(&mut s.changed);
        let State { map, table, .. } = &mut *s;
        let outcome = table.store(&*self.storage, map, &changed);
        if outcome.is_err() {
            s.changed.extend(changed);
            return outcome;
        }
        drop(s);
        self.storage.sync().map_err(map_error)
    }

    fn extent(&self, offset: u64, max: u64) -> Result<Extent, DiskError> {
        let inside = offset % self.block_bytes;
        let len = (self.block_bytes - inside).min(max);
        Ok(match self.block(offset / self.block_bytes) {
            Block::Absent => Extent::absent(len, 0),
            Block::Zero => Extent::zero(len),
            Block::At(place) => Extent::data(len, Some(place + inside)),
            Block::Packed(_) => Extent {
                compressed: true,
                ..Extent::data(len, None)
            },
        })
    }

    fn resize(&self, _size_bytes: u64) -> Result<(), DiskError> {
        Err(DiskError::Unsupported(format!(
            "{} images cannot be resized; convert it to qcow2 or raw first",
            self.details.format
        )))
    }

    fn details(&self) -> Details {
        self.details.clone()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(e) = self.flush() {
            tracing::error!("a disk image was not closed cleanly: {e}");
        }
    }
}
