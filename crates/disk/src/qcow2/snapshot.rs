//! Internal snapshots. qcow2 specification, "Snapshots".
//!
//! A snapshot is a copy of the L1 table; every cluster that it reaches has one reference more.
//! Each step is ordered so that counts in the file are never too low.

use super::entry::{COPIED, Entry, OFFSET_MASK};
use super::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS, field};
use super::{L1_CHUNK, Meta, Qcow2, damaged, host, read_l1};
use crate::DiskError;
use crate::bytes::{be16, be32, be64, put};
use crate::storage::Storage;
use std::sync::atomic::Ordering;

/// LIMIT: bytes of the snapshot table, as QEMU.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// LIMIT: bytes of unknown data of one snapshot, as QEMU.
const MAX_EXTRA_BYTES: u32 = 1024;
/// Extra data that is known: size of the VM state, size of the disk, instruction count.
const EXTRA_BYTES: usize = 24;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) unix_seconds: u32,
    nanoseconds: u32,
    vm_clock_ns: u64,
    pub(super) vm_state_bytes: u64,
    pub(super) disk_bytes: u64,
    /// Extra data as it is in the file.
    extra: Vec<u8>,
}

impl Snapshot {
    fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; 40];
        put(&mut b, 0, &self.l1_offset.to_be_bytes());
        put(&mut b, 8, &self.l1_entries.to_be_bytes());
        put(&mut b, 12, &(self.id.len() as u16).to_be_bytes());
        put(&mut b, 14, &(self.name.len() as u16).to_be_bytes());
        put(&mut b, 16, &self.unix_seconds.to_be_bytes());
        put(&mut b, 20, &self.nanoseconds.to_be_bytes());
        put(&mut b, 24, &self.vm_clock_ns.to_be_bytes());
        put(&mut b, 32, &(self.vm_state_bytes as u32).to_be_bytes());
        put(&mut b, 36, &(self.extra.len() as u32).to_be_bytes());
        b.extend_from_slice(&self.extra);
        b.extend_from_slice(self.id.as_bytes());
        b.extend_from_slice(self.name.as_bytes());
        b.resize(b.len().next_multiple_of(8), 0);
        b
    }
}

fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    snapshots.iter().flat_map(Snapshot::encode).collect()
}

/// Bytes of the table of these snapshots.
pub(super) fn table_bytes(snapshots: &[Snapshot]) -> u64 {
    let bytes =
        |s: &Snapshot| (40 + s.extra.len() + s.id.len() + s.name.len()).next_multiple_of(8) as u64;
    snapshots.iter().map(bytes).sum()
}

/// Reads the snapshot table.
pub(super) fn load(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>, DiskError> {
    let mut out = Vec::new();
    let mut at = header.snapshots_offset;
    let cluster = header.cluster_bytes();
    for n in 0..header.snapshots {
        let mut fixed = [0; 40];
        storage.read_at(at, &mut fixed).map_err(host)?;
        let (id, name, extra) = (
            usize::from(be16(&fixed, 12)),
            usize::from(be16(&fixed, 14)),
            be32(&fixed, 36),
        );
        if extra > MAX_EXTRA_BYTES {
            return Err(damaged(format!("snapshot {n} has {extra} extra bytes")));
        }
        let extra = extra as usize;
        let mut rest = vec![0; extra + id + name];
        storage.read_at(at + 40, &mut rest).map_err(host)?;
        let text = |from: usize, len: usize| {
            let b = rest.get(from..from + len).unwrap_or_default();
            String::from_utf8_lossy(b).into_owned()
        };
        let s = Snapshot {
            l1_offset: be64(&fixed, 0),
            l1_entries: be32(&fixed, 8),
            id: text(extra, id),
            name: text(extra + id, name),
            unix_seconds: be32(&fixed, 16),
            nanoseconds: be32(&fixed, 20),
            vm_clock_ns: be64(&fixed, 24),
            vm_state_bytes: if extra >= 8 {
                be64(&rest, 0)
            } else {
                be32(&fixed, 32).into()
            },
            disk_bytes: if extra >= 16 {
                be64(&rest, 8)
            } else {
                header.size_bytes
            },
            extra: rest.get(..extra).unwrap_or_default().to_vec(),
        };
        let file = storage.len().map_err(host)?.next_multiple_of(cluster);
        let l1_bytes = u64::from(s.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES
            || !s.l1_offset.is_multiple_of(cluster)
            || s.l1_offset.saturating_add(l1_bytes) > file
            || !s.disk_bytes.is_multiple_of(512)
            || u64::from(s.l1_entries) < header.l1_needed(s.disk_bytes)
        {
            return Err(damaged(format!("snapshot {n} has a wrong L1 table")));
        }
        at += (40 + rest.len()).next_multiple_of(8) as u64;
        if at - header.snapshots_offset > MAX_TABLE_BYTES {
            return Err(damaged("the snapshot table is too long"));
        }
        out.push(s);
    }
    Ok(out)
}

impl Qcow2 {
    /// What an L2 table in the file says. The tables must have been flushed.
    pub(super) fn table_entries(&self, table: u64) -> Result<(Vec<u8>, Vec<Entry>), DiskError> {
        let mut bytes = vec![0; self.cluster_bytes() as usize];
        self.storage.read_at(table, &mut bytes).map_err(host)?;
        let step = self.l2_entry_bytes() as usize;
        let entries = bytes
            .chunks_exact(step)
            .map(|c| Entry {
                raw: be64(c, 0),
                bitmap: if step == 16 { be64(c, 8) } else { 0 },
            })
            .collect();
        Ok((bytes, entries))
    }

    /// Host clusters that an entry refers to: first and how many.
    pub(super) fn clusters_of(&self, entry: Entry) -> Option<(u64, u64)> {
        let bits = self.layout.cluster_bits;
        if let Some((at, bytes)) = entry.compressed_at(self.layout) {
            let (first, last) = (at >> bits, (at + bytes - 1) >> bits);
            return Some((first, last - first + 1));
        }
        entry.host().map(|at| (at >> bits, 1))
    }

    /// Calls `each` for every cluster that an L1 table reaches, once per reference.
    fn each_reference(
        &self,
        l1: &[u64],
        each: &mut dyn FnMut(u64) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let bits = self.layout.cluster_bits;
        for table in l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
            for entry in self.table_entries(table)?.1 {
                if let Some((first, n)) = self.clusters_of(entry) {
                    for cluster in first..first + n {
                        each(cluster)?;
                    }
                }
            }
            each(table >> bits)?;
        }
        Ok(())
    }

    fn add_references(&self, m: &mut Meta, l1: &[u64]) -> Result<(), DiskError> {
        let max = m.refs.max();
        let refs = &mut m.refs;
        let mut check = |c| {
            // One more for each there is cannot overflow.
            if refs.get(&*self.storage, c)? > max / 2 {
                return Err(DiskError::Unsupported(format!(
                    "refcounts of {} bits cannot count a snapshot more; convert the image to one \
                     with 16",
                    64 - max.leading_zeros()
                )));
            }
            Ok(())
        };
        self.each_reference(l1, &mut check)?;
        let mut add = |c| refs.add(&*self.storage, c, 1).map(|_| ());
        self.each_reference(l1, &mut add)?;
        m.refs.cache.write_back(&*self.storage).map_err(host)?;
        self.storage.sync().map_err(host)
    }

    /// Takes references away at once: nothing durable holds them any more.
    fn drop_references(&self, m: &mut Meta, l1: &[u64]) -> Result<(), DiskError> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut each = |c| {
            match runs.last_mut() {
                Some((first, n)) if *first + *n == c => *n += 1,
                _ => runs.push((c, 1)),
            }
            Ok(())
        };
        self.each_reference(l1, &mut each)?;
        m.pending.extend(runs);
        Ok(())
    }

    fn find(m: &Meta, name: &str) -> Result<usize, DiskError> {
        let by_id = m.snapshots.iter().position(|s| s.id == name);
        by_id
            .or_else(|| m.snapshots.iter().position(|s| s.name == name))
            .ok_or_else(|| {
                let names: Vec<&str> = m.snapshots.iter().map(|s| s.name.as_str()).collect();
                DiskError::Unsupported(if names.is_empty() {
                    format!("there is no snapshot {name:?}; the image has none")
                } else {
                    format!(
                        "there is no snapshot {name:?}; there are {}",
                        names.join(", ")
                    )
                })
            })
    }

    /// Writes an L1 table to new clusters.
    fn write_new_l1(&self, m: &mut Meta, l1: &[u64]) -> Result<u64, DiskError> {
        if l1.is_empty() {
            return Ok(0);
        }
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.write_to_new(m, &bytes)
    }

    /// Writes bytes to new clusters in a row, filled up with zeroes.
    pub(super) fn write_to_new(&self, m: &mut Meta, bytes: &[u8]) -> Result<u64, DiskError> {
        let cluster = self.cluster_bytes();
        let n = (bytes.len() as u64).div_ceil(cluster);
        let first = m.refs.alloc_exact(&*self.storage, n)?;
        let at = first << self.layout.cluster_bits;
        self.check_overlap(m, at, n * cluster)?;
        let mut all = bytes.to_vec();
        all.resize((n * cluster) as usize, 0);
        self.storage.write_at(at, &all).map_err(host)?;
        Ok(at)
    }

    pub(super) fn release_run(&self, m: &mut Meta, at: u64, bytes: u64) {
        if at != 0 && bytes > 0 {
            let n = bytes.div_ceil(self.cluster_bytes());
            m.pending.push((at >> self.layout.cluster_bits, n));
        }
    }

    /// Replaces the snapshot table.
    fn store_snapshots(&self, m: &mut Meta, new: Vec<Snapshot>) -> Result<(), DiskError> {
        let table = encode_table(&new);
        let at = if table.is_empty() {
            0
        } else {
            self.write_to_new(m, &table)?
        };
        self.extend_and_sync(m)?;
        let mut both = [0; 12];
        put(&mut both, 0, &(new.len() as u32).to_be_bytes());
        put(&mut both, 4, &at.to_be_bytes());
        self.storage
            .write_at(field::SNAPSHOTS, &both)
            .map_err(host)?;
        self.storage.sync().map_err(host)?;
        let old_bytes = table_bytes(&m.snapshots);
        let old_at = m.header.snapshots_offset;
        self.release_run(m, old_at, old_bytes);
        m.header.snapshots = new.len() as u32;
        m.header.snapshots_offset = at;
        m.snapshots = new;
        Ok(())
    }

    /// Refcounts and everything written so far become durable.
    pub(super) fn extend_and_sync(&self, m: &mut Meta) -> Result<(), DiskError> {
        m.refs.cache.write_back(&*self.storage).map_err(host)?;
        self.storage.sync().map_err(host)
    }

    /// Makes an internal snapshot of the disk. Requests wait meanwhile.
    pub fn snapshot_create(&self, name: &str, unix_seconds: u32) -> Result<(), DiskError> {
        self.before_write()?;
        if name.is_empty() || name.len() > 255 {
            return Err(DiskError::Unsupported(
                "a snapshot's name has 1 to 255 bytes".into(),
            ));
        }
        let _quiet = self.quiet()?;
        let mut m = self.meta();
        let m = &mut *m;
        if m.snapshots.iter().any(|s| s.name == name || s.id == name) {
            return Err(DiskError::Unsupported(format!(
                "there is a snapshot {name:?} already"
            )));
        }
        if m.snapshots.len() as u32 >= MAX_SNAPSHOTS {
            return Err(DiskError::Unsupported("too many snapshots".into()));
        }
        let l1 = m.l1.clone();
        // First the flags: one that is missing does no harm, one too many does.
        self.change_copied(m, &mut |_, _| Ok(false))?;
        self.add_references(m, &l1)?;
        let plain: Vec<u64> = l1.iter().map(|e| e & !COPIED).collect();
        let l1_offset = self.write_new_l1(m, &plain)?;
        let id = m
            .snapshots
            .iter()
            .filter_map(|s| s.id.parse::<u64>().ok())
            .max()
            .unwrap_or(0)
            + 1;
        let disk_bytes = self.size();
        let mut extra = vec![0; EXTRA_BYTES];
        put(&mut extra, 8, &disk_bytes.to_be_bytes());
        // No instruction count.
        put(&mut extra, 16, &u64::MAX.to_be_bytes());
        let mut new = m.snapshots.clone();
        new.push(Snapshot {
            l1_offset,
            l1_entries: plain.len() as u32,
            id: id.to_string(),
            name: name.to_owned(),
            unix_seconds,
            nanoseconds: 0,
            vm_clock_ns: 0,
            vm_state_bytes: 0,
            disk_bytes,
            extra,
        });
        let outcome = self.store_snapshots(m, new);
        self.note(outcome)
    }

    /// Sets the copied flags of the active tables, in the file: `flag` is told a host cluster.
    pub(super) fn change_copied(
        &self,
        m: &mut Meta,
        flag: &mut dyn FnMut(&mut Meta, u64) -> Result<bool, DiskError>,
    ) -> Result<(), DiskError> {
        m.l2.clear();
        let bits = self.layout.cluster_bits;
        let step = self.l2_entry_bytes() as usize;
        for index in 0..m.l1.len() {
            let old = m.l1.get(index).copied().unwrap_or(0);
            let table = old & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let (mut bytes, entries) = self.table_entries(table)?;
            let mut changed = false;
            for (n, e) in entries.iter().enumerate() {
                let Some(at) = e.host() else {
                    // Compressed clusters never have the flag; neither has nothing.
                    continue;
                };
                let raw = if flag(m, at >> bits)? {
                    e.raw | COPIED
                } else {
                    e.raw & !COPIED
                };
                if raw != e.raw {
                    put(&mut bytes, n * step, &raw.to_be_bytes());
                    changed = true;
                }
            }
            if changed {
                self.storage.write_at(table, &bytes).map_err(host)?;
            }
            let new = if flag(m, table >> bits)? {
                old | COPIED
            } else {
                old & !COPIED
            };
            if new != old {
                if let Some(e) = m.l1.get_mut(index) {
                    *e = new;
                }
                m.l1_dirty.insert(index * 8 / L1_CHUNK);
            }
        }
        for (at, bytes) in super::flush::l1_chunks(m) {
            self.storage.write_at(at, &bytes).map_err(host)?;
        }
        m.l1_dirty.clear();
        self.storage.sync().map_err(host)
    }

    /// Makes the disk what it was when a snapshot (id or name) was made.
    pub fn snapshot_apply(&self, name: &str) -> Result<(), DiskError> {
        self.before_write()?;
        let quiet = self.quiet()?;
        let mut guard = self.meta();
        let m = &mut *guard;
        let index = Qcow2::find(m, name)?;
        let Some(s) = m.snapshots.get(index).cloned() else {
            return Err(damaged("a snapshot is gone"));
        };
        if m.bitmaps.present(&m.header) && s.disk_bytes != self.size() {
            return Err(DiskError::Unsupported(
                "the snapshot has another size than the disk, which has bitmaps; remove them first"
                    .into(),
            ));
        }
        let (mut l1, tables) = read_l1(
            &*self.storage,
            s.l1_offset,
            s.l1_entries.into(),
            self.layout,
        )?;
        l1.iter_mut().for_each(|e| *e &= !COPIED);
        self.add_references(m, &l1)?;
        let offset = self.write_new_l1(m, &l1)?;
        self.extend_and_sync(m)?;
        let old = std::mem::replace(&mut m.l1, l1);
        let old_place = (m.header.l1_offset, u64::from(m.header.l1_entries) * 8);
        self.store_l1_place(m, offset, s.disk_bytes)?;
        m.l2.clear();
        m.l1_dirty.clear();
        m.l2_tables = tables;
        self.drop_references(m, &old)?;
        self.release_run(m, old_place.0, old_place.1);
        m.bitmaps.mark(0, s.disk_bytes);
        drop(guard);
        drop(quiet);
        self.flush_all()
    }

    /// Says in the header where the L1 table of `m` is, and how large the disk is: one write.
    pub(super) fn store_l1_place(
        &self,
        m: &mut Meta,
        offset: u64,
        size_bytes: u64,
    ) -> Result<(), DiskError> {
        let mut fields = [0; 24];
        put(&mut fields, 0, &size_bytes.to_be_bytes());
        put(&mut fields, 12, &(m.l1.len() as u32).to_be_bytes());
        put(&mut fields, 16, &offset.to_be_bytes());
        self.storage.write_at(field::SIZE, &fields).map_err(host)?;
        self.storage.sync().map_err(host)?;
        m.header.l1_offset = offset;
        m.header.l1_entries = m.l1.len() as u32;
        m.header.size_bytes = size_bytes;
        self.size.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// The image, for reading only, as it was when a snapshot (id or name) was made.
    pub fn at_snapshot(self, name: &str) -> Result<Qcow2, DiskError> {
        if !self.read_only {
            return Err(DiskError::Unsupported(
                "a snapshot is looked at in an image that is open for reading only".into(),
            ));
        }
        {
            let mut guard = self.meta();
            let m = &mut *guard;
            let index = Qcow2::find(m, name)?;
            let Some(s) = m.snapshots.get(index).cloned() else {
                return Err(damaged("a snapshot is gone"));
            };
            let (l1, tables) = read_l1(
                &*self.storage,
                s.l1_offset,
                s.l1_entries.into(),
                self.layout,
            )?;
            m.l1 = l1;
            m.l2_tables = tables;
            m.l2.clear();
            self.size.store(s.disk_bytes, Ordering::Release);
        }
        Ok(self)
    }

    /// Forgets all content: everything is absent. Snapshots stay.
    pub fn empty(&self) -> Result<(), DiskError> {
        self.before_write()?;
        let quiet = self.quiet()?;
        let mut guard = self.meta();
        let m = &mut *guard;
        let old = m.l1.clone();
        m.l1.fill(0);
        m.l2.clear();
        m.l2_tables.clear();
        m.l1_dirty = (0..(old.len() * 8).div_ceil(L1_CHUNK)).collect();
        for (at, bytes) in super::flush::l1_chunks(m) {
            self.storage.write_at(at, &bytes).map_err(host)?;
        }
        m.l1_dirty.clear();
        self.storage.sync().map_err(host)?;
        self.drop_references(m, &old)?;
        let size = self.size();
        m.bitmaps.mark(0, size);
        drop(guard);
        drop(quiet);
        self.flush_all()
    }

    /// Deletes a snapshot (id or name).
    pub fn snapshot_delete(&self, name: &str) -> Result<(), DiskError> {
        self.before_write()?;
        let quiet = self.quiet()?;
        let mut guard = self.meta();
        let m = &mut *guard;
        let index = Qcow2::find(m, name)?;
        let mut rest = m.snapshots.clone();
        let s = rest.remove(index);
        let (l1, _) = read_l1(
            &*self.storage,
            s.l1_offset,
            s.l1_entries.into(),
            self.layout,
        )?;
        self.store_snapshots(m, rest)?;
        self.drop_references(m, &l1)?;
        self.release_run(m, s.l1_offset, u64::from(s.l1_entries) * 8);
        drop(guard);
        self.flush_locked(true)?;
        let mut m = self.meta();
        // Counts first: a flag may say "one" only when it is one in the file too.
        self.extend_and_sync(&mut m)?;
        let outcome = self.change_copied(&mut m, &mut |m, cluster| {
            Ok(m.refs.get(&*self.storage, cluster)? == 1)
        });
        drop(quiet);
        self.note(outcome)
    }
}
