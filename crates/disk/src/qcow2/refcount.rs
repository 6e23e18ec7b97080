//! Refcounts of host clusters, and who gets a free one. qcow2 specification, "Host cluster
//! management".
//!
//! Increments may reach the file at any time. Decrements are made only after what referred to the
//! cluster is durably gone (see `flush`), so that the count in the file is never too low.

use std::collections::HashSet;
use std::io;

use super::cache::Cache;
use super::header::{MAX_OFFSET, MAX_REFTABLE_BYTES, field};
use super::{damaged, host};
use crate::DiskError;
use crate::bytes::{be16, be32, be64, put};
use crate::storage::Storage;

/// LIMIT: bytes of refcounts kept in memory per image.
const CACHE_BYTES: u64 = 4 << 20;

/// The refcounts of one image.
pub(crate) struct Refcounts {
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    pub(crate) table_clusters: u64,
    order: u32,
    cluster_bits: u32,
    slice_bytes: u64,
    pub(crate) cache: Cache,
    /// Where to look for a free cluster: all before it were in use.
    pub(crate) hint: u64,
    /// First cluster that nothing was ever written to: it reads as zeroes.
    pub(crate) high_water: u64,
    /// Offsets of refcount blocks.
    pub(crate) blocks: HashSet<u64>,
}

impl Refcounts {
    /// Reads the table. Blocks are looked at when they are needed.
    pub(crate) fn load(
        storage: &dyn Storage,
        offset: u64,
        clusters: u64,
        order: u32,
        cluster_bits: u32,
    ) -> Result<Refcounts, DiskError> {
        let mut bytes = vec![0; (clusters << cluster_bits) as usize];
        storage.read_at(offset, &mut bytes).map_err(host)?;
        let cluster = 1u64 << cluster_bits;
        let table: Vec<u64> = bytes.chunks_exact(8).map(|c| be64(c, 0)).collect();
        let mut blocks = HashSet::new();
        for block in table.iter().filter(|b| **b != 0) {
            if !block.is_multiple_of(cluster) || *block >= MAX_OFFSET {
                return Err(damaged(format!("a refcount block is at {block:#x}")));
            }
            if !blocks.insert(*block) {
                return Err(damaged(format!(
                    "the refcount block at {block:#x} is used twice"
                )));
            }
        }
        let slice_bytes = cluster.min(4096);
        let file = storage.len().map_err(host)?;
        Ok(Refcounts {
            table,
            table_offset: offset,
            table_clusters: clusters,
            order,
            cluster_bits,
            slice_bytes,
            cache: Cache::new(slice_bytes, CACHE_BYTES),
            hint: 0,
            high_water: file.div_ceil(cluster),
            blocks,
        })
    }

    /// Clusters that one block counts.
    pub(crate) fn per_block(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    fn per_slice(&self) -> u64 {
        (8 * self.slice_bytes) >> self.order
    }

    /// The largest count.
    pub(crate) fn max(&self) -> u64 {
        if self.order == 6 {
            u64::MAX
        } else {
            (1 << (1 << self.order)) - 1
        }
    }

    fn decode(&self, slice: &[u8], index: u64) -> u64 {
        decode(slice, index, self.order)
    }

    /// Byte offset of the slice of a cluster's count, if it has a block.
    fn slice_of(&self, cluster: u64) -> Option<(u64, u64)> {
        let block = *self.table.get((cluster / self.per_block()) as usize)?;
        if block == 0 {
            return None;
        }
        let index = cluster % self.per_block();
        let slice = index / self.per_slice();
        Some((block + slice * self.slice_bytes, index % self.per_slice()))
    }

    /// The count of a cluster.
    pub(crate) fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64, DiskError> {
        let Some((offset, index)) = self.slice_of(cluster) else {
            return Ok(0);
        };
        self.spill(storage)?;
        let slice = self.cache.read(storage, offset).map_err(host)?;
        Ok(decode(slice, index, self.order))
    }

    /// Writes blocks back when too many have changed. Never wrong: see the module.
    fn spill(&mut self, storage: &dyn Storage) -> Result<(), DiskError> {
        if self.cache.is_pressed() {
            self.cache.write_back(storage).map_err(host)?;
        }
        Ok(())
    }

    /// Sets the count of a cluster that has a block.
    pub(crate) fn set(
        &mut self,
        storage: &dyn Storage,
        cluster: u64,
        value: u64,
    ) -> Result<(), DiskError> {
        if value > self.max() {
            return Err(DiskError::Unsupported(format!(
                "a refcount of {value} does not fit this image's {} bits; create one with larger \
                 refcounts and convert",
                1 << self.order
            )));
        }
        let Some((offset, index)) = self.slice_of(cluster) else {
            return Err(damaged(format!("cluster {cluster} has no refcount block")));
        };
        self.spill(storage)?;
        let order = self.order;
        let slice = self.cache.write(storage, offset).map_err(host)?;
        encode(slice, index, order, value);
        Ok(())
    }

    /// Adds to the count of a cluster.
    pub(crate) fn add(
        &mut self,
        storage: &dyn Storage,
        cluster: u64,
        delta: i64,
    ) -> Result<u64, DiskError> {
        let value = self
            .get(storage, cluster)?
            .checked_add_signed(delta)
            .ok_or_else(|| damaged(format!("the refcount of cluster {cluster} is too low")))?;
        self.set(storage, cluster, value)?;
        Ok(value)
    }

    /// Finds at most `max` free clusters in a row.
    fn find_free(
        &mut self,
        storage: &dyn Storage,
        max: u64,
        exact: bool,
    ) -> Result<(u64, u64), DiskError> {
        let per_block = self.per_block();
        let covered = self.table.len() as u64 * per_block;
        let mut first = self.hint;
        let mut n = 0;
        while n < max {
            let at = first + n;
            if at >= covered {
                // A run does not cross the end of the table: it would have to grow in between.
                if n == 0 || exact {
                    first = at;
                    n = max;
                }
                break;
            }
            let Some((offset, index)) = self.slice_of(at) else {
                n = (n + per_block - at % per_block).min(max);
                continue;
            };
            self.spill(storage)?;
            let (order, per_slice) = (self.order, self.per_slice());
            let slice = self
                .cache
                .read(storage, offset - offset % self.slice_bytes)
                .map_err(host)?;
            let mut i = index;
            while i < per_slice && n < max {
                if decode(slice, i, order) == 0 {
                    n += 1;
                } else if n > 0 && !exact {
                    return Ok((first, n));
                } else if n > 0 {
                    first += n + 1;
                    n = 0;
                } else {
                    first += 1;
                }
                i += 1;
            }
        }
        Ok((first, n))
    }

    /// Takes up to `max` free clusters in a row, at least one, and counts them once.
    pub(crate) fn alloc(
        &mut self,
        storage: &dyn Storage,
        max: u64,
    ) -> Result<(u64, u64), DiskError> {
        let (first, n) = self.take(storage, max, false)?;
        self.hint = first + n;
        Ok((first, n))
    }

    /// Takes `n` free clusters in a row; returns the first.
    pub(crate) fn alloc_exact(&mut self, storage: &dyn Storage, n: u64) -> Result<u64, DiskError> {
        Ok(self.take(storage, n, true)?.0)
    }

    fn take(
        &mut self,
        storage: &dyn Storage,
        max: u64,
        exact: bool,
    ) -> Result<(u64, u64), DiskError> {
        loop {
            let (first, n) = self.find_free(storage, max, exact)?;
            if (first + n) << self.cluster_bits >= MAX_OFFSET {
                return Err(DiskError::NoSpace);
            }
            let per_block = self.per_block();
            let missing = (first / per_block..=(first + n - 1) / per_block)
                .find(|b| self.table.get(*b as usize).is_none_or(|o| *o == 0));
            match missing {
                None => {
                    for cluster in first..first + n {
                        self.set(storage, cluster, 1)?;
                    }
                    self.high_water = self.high_water.max(first + n);
                    return Ok((first, n));
                }
                Some(block) if (block as usize) < self.table.len() => {
                    self.create_block(storage, block, first)?;
                }
                Some(_) => self.grow_table(storage, first)?,
            }
        }
    }

    /// Makes a refcount block of the free cluster `place`, whose own block exists or is this one.
    fn create_block(
        &mut self,
        storage: &dyn Storage,
        block: u64,
        place: u64,
    ) -> Result<(), DiskError> {
        let offset = place << self.cluster_bits;
        let mut bytes = vec![0; 1 << self.cluster_bits];
        if place / self.per_block() == block {
            encode(&mut bytes, place % self.per_block(), self.order, 1);
        } else {
            self.set(storage, place, 1)?;
        }
        self.cache.forget(offset, 1 << self.cluster_bits);
        storage.write_at(offset, &bytes).map_err(host)?;
        self.cache.write_back(storage).map_err(host)?;
        // The block is whole, and counted, before the table names it.
        storage.sync().map_err(host)?;
        let entry = self.table_offset + block * 8;
        storage
            .write_at(entry, &offset.to_be_bytes())
            .map_err(host)?;
        if let Some(e) = self.table.get_mut(block as usize) {
            *e = offset;
        }
        self.blocks.insert(offset);
        self.high_water = self.high_water.max(place + 1);
        Ok(())
    }

    /// Moves the table to a larger place that begins at `start`, which no block counts yet.
    fn grow_table(&mut self, storage: &dyn Storage, start: u64) -> Result<(), DiskError> {
        let cluster = 1u64 << self.cluster_bits;
        let per_block = self.per_block();
        let entries_per_cluster = cluster / 8;
        let first_block = start / per_block;
        let mut blocks = 1;
        let (table_clusters, blocks) = loop {
            let least = (self.table.len() as u64 * 3 / 2).max(first_block + blocks);
            let table = (least + 1).div_ceil(entries_per_cluster);
            let needed = (start + blocks + table - 1) / per_block - first_block + 1;
            if needed <= blocks {
                break (table, blocks);
            }
            blocks = needed;
        };
        if table_clusters * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(DiskError::Unsupported(
                "the qcow2 image is as large as its cluster size allows; convert it to one with \
                 larger clusters"
                    .into(),
            ));
        }
        let used = blocks + table_clusters;
        let mut table = self.table.clone();
        table.resize((table_clusters * entries_per_cluster) as usize, 0);
        for n in 0..blocks {
            let offset = (start + n) << self.cluster_bits;
            let mut bytes = vec![0; cluster as usize];
            let base = (first_block + n) * per_block;
            for c in (start..start + used).filter(|c| (base..base + per_block).contains(c)) {
                encode(&mut bytes, c - base, self.order, 1);
            }
            self.cache.forget(offset, cluster);
            storage.write_at(offset, &bytes).map_err(host)?;
            if let Some(e) = table.get_mut((first_block + n) as usize) {
                *e = offset;
            }
            self.blocks.insert(offset);
        }
        let table_offset = (start + blocks) << self.cluster_bits;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        storage.write_at(table_offset, &bytes).map_err(host)?;
        self.cache.write_back(storage).map_err(host)?;
        storage.sync().map_err(host)?;
        write_reftable_field(storage, table_offset, table_clusters).map_err(host)?;
        storage.sync().map_err(host)?;
        let old = (self.table_offset >> self.cluster_bits, self.table_clusters);
        self.table = table;
        self.table_offset = table_offset;
        self.table_clusters = table_clusters;
        self.high_water = self.high_water.max(start + used);
        for c in old.0..old.0 + old.1 {
            self.set(storage, c, 0)?;
            self.hint = self.hint.min(c);
        }
        Ok(())
    }

    /// The largest run of whole entries in a slice, for checks: see `check`.
    pub(crate) fn for_each(
        &self,
        storage: &dyn Storage,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), DiskError> {
        let mut bytes = vec![0; 1 << self.cluster_bits];
        for (block, offset) in self.table.iter().enumerate().filter(|(_, o)| **o != 0) {
            storage.read_at(*offset, &mut bytes).map_err(host)?;
            let base = block as u64 * self.per_block();
            for index in 0..self.per_block() {
                let value = self.decode(&bytes, index);
                if value != 0 {
                    each(base + index, value);
                }
            }
        }
        Ok(())
    }
}

/// Says in the header where the table is: both fields in one write.
pub(crate) fn write_reftable_field(
    storage: &dyn Storage,
    offset: u64,
    clusters: u64,
) -> io::Result<()> {
    let mut bytes = [0; 12];
    put(&mut bytes, 0, &offset.to_be_bytes());
    put(&mut bytes, 8, &(clusters as u32).to_be_bytes());
    storage.write_at(field::REFTABLE, &bytes)
}

/// A count of `1 << order` bits. The specification: counts of less than a byte begin at the least
/// significant bit.
pub(crate) fn decode(slice: &[u8], index: u64, order: u32) -> u64 {
    let i = index as usize;
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per_byte = 8 / bits;
            let byte = slice.get(i / per_byte).copied().unwrap_or(0);
            u64::from(byte) >> (i % per_byte * bits) & ((1 << bits) - 1)
        }
        3 => u64::from(slice.get(i).copied().unwrap_or(0)),
        4 => u64::from(be16(slice, i * 2)),
        5 => u64::from(be32(slice, i * 4)),
        _ => be64(slice, i * 8),
    }
}

/// The reverse; the value must fit.
pub(crate) fn encode(slice: &mut [u8], index: u64, order: u32, value: u64) {
    let i = index as usize;
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per_byte = 8 / bits;
            let shift = i % per_byte * bits;
            let mask = ((1u8 << bits) - 1) << shift;
            if let Some(byte) = slice.get_mut(i / per_byte) {
                *byte = *byte & !mask | (value as u8) << shift & mask;
            }
        }
        3 => put(slice, i, &[value as u8]),
        4 => put(slice, i * 2, &(value as u16).to_be_bytes()),
        5 => put(slice, i * 4, &(value as u32).to_be_bytes()),
        _ => put(slice, i * 8, &value.to_be_bytes()),
    }
}
