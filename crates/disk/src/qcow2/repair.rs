//! Counting all clusters anew: after an unclean end with lazy refcounts, or when counts are wrong.

use super::check::CheckReport;
use super::header::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_REFTABLE_BYTES, field};
use super::refcount::{Refcounts, encode, write_reftable_field};
use super::{Qcow2, damaged, host};
use crate::DiskError;
use crate::bytes::put;

impl Qcow2 {
    /// Writes new refcount tables behind everything else and switches to them in one write; then
    /// the copied flags, then the marks of an unclean end go.
    pub(super) fn rebuild_refcounts(&self) -> Result<(), DiskError> {
        let mut m = self.meta();
        let m = &mut *m;
        let mut report = CheckReport::default();
        let counted = self.count(m, &mut report)?;
        let cluster = self.cluster_bytes();
        let bits = self.layout.cluster_bits;
        let per_block = m.refs.per_block();
        let max = m.refs.max();
        let start = counted.counts.len() as u64;
        let order = m.header.refcount_order;
        // Blocks of which clusters are in use, and those of the new tables themselves.
        let used_blocks: Vec<u64> = counted
            .counts
            .chunks(per_block as usize)
            .enumerate()
            .filter(|(_, c)| c.iter().any(|n| *n > 0))
            .map(|(n, _)| n as u64)
            .collect();
        let (mut blocks, mut table) = (used_blocks.clone(), 1);
        loop {
            let end = start + blocks.len() as u64 + table;
            let own = start / per_block..=(end - 1) / per_block;
            let mut all = used_blocks.clone();
            all.extend(own);
            all.sort_unstable();
            all.dedup();
            let entries = all.last().copied().unwrap_or(0) + 1;
            let needed = (entries * 8).div_ceil(cluster);
            if all.len() == blocks.len() && needed <= table {
                break;
            }
            blocks = all;
            table = table.max(needed);
        }
        if table * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(damaged("it is too large for refcounts of its own"));
        }
        let end = start + blocks.len() as u64 + table;
        let mut entries = vec![0; (table * cluster) as usize];
        for (n, block) in blocks.iter().enumerate() {
            let mut bytes = vec![0; cluster as usize];
            for index in 0..per_block {
                let c = block * per_block + index;
                let count = if (start..end).contains(&c) {
                    1
                } else {
                    u64::from(counted.counts.get(c as usize).copied().unwrap_or(0))
                };
                if count > max {
                    return Err(damaged(format!(
                        "cluster {c} has {count} references, more than its refcount can hold"
                    )));
                }
                encode(&mut bytes, index, order, count);
            }
            let at = (start + n as u64) << bits;
            self.storage.write_at(at, &bytes).map_err(host)?;
            put(&mut entries, *block as usize * 8, &at.to_be_bytes());
        }
        let table_at = (start + blocks.len() as u64) << bits;
        self.storage.write_at(table_at, &entries).map_err(host)?;
        self.storage.sync().map_err(host)?;
        write_reftable_field(&*self.storage, table_at, table).map_err(host)?;
        self.storage.sync().map_err(host)?;
        m.header.reftable_offset = table_at;
        m.header.reftable_clusters = table as u32;
        m.refs = Refcounts::load(&*self.storage, table_at, table, order, bits)?;
        self.change_copied(m, &mut |m, c| Ok(m.refs.get(&*self.storage, c)? == 1))?;
        if m.header.version >= 3 {
            m.header.incompat &= !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
            self.storage
                .write_at(field::INCOMPAT, &m.header.incompat.to_be_bytes())
                .map_err(host)?;
            self.storage.sync().map_err(host)?;
        }
        Ok(())
    }
}
