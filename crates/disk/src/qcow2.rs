//! qcow2 images, versions 2 and 3. Source: the qcow2 specification (docs/interop/qcow2 of QEMU).
//!
//! *Locks*, in this order: `flushing` (one flush at a time), `gate` (transfers hold it shared;
//! who takes clusters away from under them holds it alone), `meta` (all tables; never held during
//! transfers of data). A guest range that is being given clusters is in `Meta::allocating`; others
//! that want to change the same range wait for `done`.
//!
//! *Order on disk.* Data and refcounts are durable before an L2 table that refers to them is
//! written, that is durable before an L1 table that refers to it, and a cluster is given away only
//! after the last reference to it is durably gone. So the image is consistent at every moment,
//! with some clusters lost at worst, and holds every write that was flushed. See `flush`.
//!
//! *Lazy refcounts* need no writer: counts are always written. A reader needs to know the dirty
//! bit, which says that they are wrong: they are counted anew before anything is written.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use crate::bytes::{be64, put};
use crate::image::{Details, Extent, Format, Image, SnapshotInfo, Stored};
use crate::io::map_error;
use crate::payload::{Source, Target};
use crate::storage::Storage;
use crate::{DiskError, DiskInfo};

mod bitmaps;
mod cache;
mod check;
mod compress;
mod create;
mod entry;
mod flush;
pub(crate) mod header;
mod read;
mod refcount;
mod repair;
mod resize;
mod snapshot;
#[cfg(test)]
mod tests;
mod write;
mod zero;

pub use check::{CheckReport, Repair};
pub use compress::pack;
pub use create::{CreateOptions, create};
pub use header::Compression;

use cache::Cache;
use entry::{COPIED, Entry, Layout, OFFSET_MASK};
use header::{AUTOCLEAR_BITMAPS, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_OFFSET, field};
use refcount::Refcounts;
use snapshot::Snapshot;

/// LIMIT: bytes of L2 tables kept in memory per image: the map of 128 GiB with 64 KiB clusters.
const L2_CACHE_BYTES: u64 = 16 << 20;
/// LIMIT: ranges of clusters that wait to be given back before a flush is made for them.
const MAX_PENDING: usize = 4096;
/// Bytes of the L1 table that are written together.
const L1_CHUNK: usize = 512;

fn host(e: io::Error) -> DiskError {
    map_error(e)
}

fn damaged(what: impl std::fmt::Display) -> DiskError {
    DiskError::Corrupt(format!(
        "damaged qcow2 image: {what}; run `pyrite image check`"
    ))
}

/// Everything that changes.
struct Meta {
    header: Header,
    l1: Vec<u64>,
    /// Chunks of the L1 table that wait to be written.
    l1_dirty: BTreeSet<usize>,
    l2: Cache,
    /// Offsets of the L2 tables of the active L1 table.
    l2_tables: HashSet<u64>,
    refs: Refcounts,
    /// Runs of clusters that lose a reference with the next flush.
    pending: Vec<(u64, u64)>,
    /// Guest clusters that are being given host clusters.
    allocating: Vec<Range<u64>>,
    snapshots: Vec<Snapshot>,
    /// Where the next compressed cluster goes: an offset within a cluster, or 0.
    packing: u64,
    bitmaps: bitmaps::Bitmaps,
    /// The file ends behind this cluster at least.
    file_clusters: u64,
}

/// An open image.
pub struct Qcow2 {
    storage: Box<dyn Storage>,
    layout: Layout,
    l2_entries: u64,
    compression: Compression,
    backing: Option<Arc<dyn Image>>,
    read_only: bool,
    size: AtomicU64,
    /// Something did not fit together: nothing is written any more.
    broken: AtomicBool,
    closed: AtomicBool,
    flushing: Mutex<()>,
    gate: RwLock<()>,
    meta: Mutex<Meta>,
    done: Condvar,
    unpacked: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

/// What a header says of other files, before the image is opened.
#[derive(Clone, Debug)]
pub struct BackingName {
    /// As it is in the image.
    pub name: String,
    /// The format that the image records for it.
    pub format: Option<String>,
}

/// The backing file that an image names.
pub fn backing_name(storage: &dyn Storage) -> Result<Option<BackingName>, DiskError> {
    let header = read_header(storage)?;
    Ok(header.backing.map(|name| BackingName {
        name,
        format: header.backing_format,
    }))
}

fn read_header(storage: &dyn Storage) -> Result<Header, DiskError> {
    let len = storage.len().map_err(host)?;
    let mut bytes = vec![0; header::MAX_HEADER_BYTES.min(len as usize)];
    storage.read_at(0, &mut bytes).map_err(host)?;
    Header::parse(&bytes, len)
}

impl Qcow2 {
    /// Opens what is in `storage`. The backing file must be given if and only if the image names
    /// one, see [`backing_name`]. An image that was not closed cleanly is repaired first, unless
    /// it is opened read-only.
    pub fn open(
        storage: Box<dyn Storage>,
        backing: Option<Arc<dyn Image>>,
        read_only: bool,
    ) -> Result<Qcow2, DiskError> {
        Qcow2::open_as_is(storage, backing, read_only)?.ready()
    }

    /// Opens for writing without the backing file: what is not in the image itself is absent.
    pub fn open_top(storage: Box<dyn Storage>) -> Result<Qcow2, DiskError> {
        Qcow2::open_unbacked(storage, false)?.ready()
    }

    /// Opens for its details only.
    pub fn open_details(storage: Box<dyn Storage>) -> Result<Qcow2, DiskError> {
        Qcow2::open_unbacked(storage, true)
    }

    /// How new clusters of this image would be compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Sees to what must be done before writing.
    fn ready(self) -> Result<Qcow2, DiskError> {
        let image = self;
        if image.read_only {
            return Ok(image);
        }
        let incompat = image.meta().header.incompat;
        if incompat & INCOMPAT_CORRUPT != 0 {
            return Err(DiskError::Corrupt(
                "the qcow2 image is marked as corrupt; run `pyrite image check --repair all`, or \
                 open it read-only"
                    .into(),
            ));
        }
        if incompat & INCOMPAT_DIRTY != 0 {
            tracing::warn!("the qcow2 image was not closed cleanly: counting its clusters");
            image.rebuild_refcounts()?;
        }
        image.begin_writing()?;
        Ok(image)
    }

    /// Opens without repairing anything.
    fn open_as_is(
        storage: Box<dyn Storage>,
        backing: Option<Arc<dyn Image>>,
        read_only: bool,
    ) -> Result<Qcow2, DiskError> {
        let header = read_header(&*storage)?;
        if header.backing.is_some() != backing.is_some() {
            return Err(DiskError::Unsupported(
                "the image has a backing file, which may not be opened; allow it".into(),
            ));
        }
        Qcow2::with_header(storage, header, backing, read_only)
    }

    /// Opens without the backing file, for `check`: guest data must not be read.
    fn open_unbacked(storage: Box<dyn Storage>, read_only: bool) -> Result<Qcow2, DiskError> {
        let header = read_header(&*storage)?;
        Qcow2::with_header(storage, header, None, read_only)
    }

    fn with_header(
        storage: Box<dyn Storage>,
        header: Header,
        backing: Option<Arc<dyn Image>>,
        read_only: bool,
    ) -> Result<Qcow2, DiskError> {
        let layout = Layout {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            zero_flag: header.version >= 3,
        };
        let cluster = layout.cluster_bytes();
        let (l1, l2_tables) = read_l1(
            &*storage,
            header.l1_offset,
            header.l1_entries.into(),
            layout,
        )?;
        let refs = Refcounts::load(
            &*storage,
            header.reftable_offset,
            header.reftable_clusters.into(),
            header.refcount_order,
            header.cluster_bits,
        )?;
        let snapshots = snapshot::load(&*storage, &header)?;
        let file_clusters = storage.len().map_err(host)?.div_ceil(cluster);
        Ok(Qcow2 {
            layout,
            l2_entries: header.l2_entries(),
            compression: header.compression,
            backing,
            read_only,
            size: AtomicU64::new(header.size_bytes),
            broken: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            flushing: Mutex::new(()),
            gate: RwLock::new(()),
            done: Condvar::new(),
            unpacked: Mutex::new(None),
            meta: Mutex::new(Meta {
                l1,
                l1_dirty: BTreeSet::new(),
                l2: Cache::new(cluster.min(4096), L2_CACHE_BYTES),
                l2_tables,
                refs,
                pending: Vec::new(),
                allocating: Vec::new(),
                snapshots,
                packing: 0,
                bitmaps: bitmaps::Bitmaps::default(),
                file_clusters,
                header,
            }),
            storage,
        })
    }

    /// What the specification wants of a writer before its first write.
    fn begin_writing(&self) -> Result<(), DiskError> {
        let mut m = self.meta();
        let known = m.header.autoclear & AUTOCLEAR_BITMAPS;
        if m.header.autoclear != known {
            m.header.autoclear = known;
            self.storage
                .write_at(field::AUTOCLEAR, &known.to_be_bytes())
                .map_err(host)?;
        }
        let cluster = self.cluster_bytes();
        // Tables that lie over one another would be overwritten by each other's changes.
        let l1 = m.header.l1_offset;
        let l1_end = l1 + u64::from(m.header.l1_entries) * 8;
        let table = m.refs.table_offset;
        let table_end = table + m.refs.table_clusters * cluster;
        let clash = |at: &u64| {
            *at < cluster || (l1..l1_end).contains(at) || (table..table_end).contains(at)
        };
        if m.l2_tables.iter().any(|t| m.refs.blocks.contains(t))
            || m.l2_tables.iter().any(clash)
            || m.refs.blocks.iter().any(clash)
            || (l1 < table_end && table < l1_end)
        {
            return Err(damaged("tables lie over one another"));
        }
        self.load_bitmaps(&mut m)?;
        Ok(())
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared_gate(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn sole_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_bytes(&self) -> u64 {
        self.layout.cluster_bytes()
    }

    /// An error if nothing may be written; else makes room in the caches.
    fn before_write(&self) -> Result<(), DiskError> {
        if self.read_only || self.closed.load(Ordering::Acquire) {
            return Err(DiskError::ReadOnly);
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(damaged("writing has stopped"));
        }
        let m = self.meta();
        if m.l2.is_pressed() || m.pending.len() > MAX_PENDING {
            drop(m);
            self.flush_all()?;
        }
        Ok(())
    }

    /// Notes that the image contradicts itself.
    fn note<T>(&self, outcome: Result<T, DiskError>) -> Result<T, DiskError> {
        if let Err(DiskError::Corrupt(_)) = &outcome {
            self.broken.store(true, Ordering::Release);
        }
        outcome
    }

    fn l2_entry_bytes(&self) -> u64 {
        if self.layout.extended { 16 } else { 8 }
    }

    /// Where the L2 entry of a guest cluster is in the file, if there is a table for it.
    fn slot(&self, m: &Meta, cluster: u64) -> Option<u64> {
        let table = *m.l1.get((cluster / self.l2_entries) as usize)? & OFFSET_MASK;
        (table != 0).then(|| table + cluster % self.l2_entries * self.l2_entry_bytes())
    }

    fn entry(&self, m: &mut Meta, cluster: u64) -> Result<Entry, DiskError> {
        let Some(slot) = self.slot(m, cluster) else {
            return Ok(Entry::default());
        };
        let bytes = m.l2.read(&*self.storage, slot).map_err(host)?;
        let entry = Entry {
            raw: be64(bytes, 0),
            bitmap: if self.layout.extended {
                be64(bytes, 8)
            } else {
                0
            },
        };
        if let Some(at) = entry.host()
            && !at.is_multiple_of(self.cluster_bytes())
        {
            return Err(damaged(format!("a cluster is at {at:#x}")));
        }
        Ok(entry)
    }

    fn set_entry(&self, m: &mut Meta, cluster: u64, entry: Entry) -> Result<(), DiskError> {
        let Some(slot) = self.slot(m, cluster) else {
            return Err(damaged("an L2 table is missing"));
        };
        let bytes = m.l2.write(&*self.storage, slot).map_err(host)?;
        put(bytes, 0, &entry.raw.to_be_bytes());
        if self.layout.extended {
            put(bytes, 8, &entry.bitmap.to_be_bytes());
        }
        Ok(())
    }

    /// Fails if a host range holds tables that are in use: then the refcounts or the L2 tables
    /// are wrong, and writing there would make it worse.
    fn check_overlap(&self, m: &Meta, at: u64, len: u64) -> Result<(), DiskError> {
        let cluster = self.cluster_bytes();
        let end = at.saturating_add(len);
        let hits = |offset: u64, bytes: u64| bytes > 0 && at < offset + bytes && offset < end;
        let h = &m.header;
        if at < cluster
            || end > MAX_OFFSET
            || hits(h.l1_offset, u64::from(h.l1_entries) * 8)
            || hits(m.refs.table_offset, m.refs.table_clusters * cluster)
            || hits(h.snapshots_offset, snapshot::table_bytes(&m.snapshots))
            || m.snapshots
                .iter()
                .any(|s| hits(s.l1_offset, u64::from(s.l1_entries) * 8))
        {
            return Err(damaged(format!("data at {at:#x} lies over a table")));
        }
        let mut c = at & !(cluster - 1);
        while c < end {
            if m.refs.blocks.contains(&c) || m.l2_tables.contains(&c) {
                return Err(damaged(format!("data at {c:#x} lies over a table")));
            }
            c += cluster;
        }
        Ok(())
    }

    /// Takes clusters for data or tables: offset in the file and how many.
    fn alloc(&self, m: &mut Meta, max: u64) -> Result<(u64, u64), DiskError> {
        let (first, n) = m.refs.alloc(&*self.storage, max)?;
        let at = first << self.layout.cluster_bits;
        self.check_overlap(m, at, n << self.layout.cluster_bits)?;
        Ok((at, n))
    }

    /// Gives back whatever an entry refers to, with the next flush.
    fn release(&self, m: &mut Meta, entry: Entry) {
        let bits = self.layout.cluster_bits;
        if let Some((at, bytes)) = entry.compressed_at(self.layout) {
            let (first, last) = (at >> bits, (at + bytes - 1) >> bits);
            m.pending.push((first, last - first + 1));
        } else if let Some(at) = entry.host() {
            match m.pending.last_mut() {
                Some((first, n)) if *first + *n == at >> bits => *n += 1,
                _ => m.pending.push((at >> bits, 1)),
            }
        }
    }

    /// Waits until nobody is giving clusters to a range of guest clusters.
    fn settled<'a>(
        &'a self,
        mut m: MutexGuard<'a, Meta>,
        range: &Range<u64>,
    ) -> MutexGuard<'a, Meta> {
        while m
            .allocating
            .iter()
            .any(|r| r.start < range.end && range.start < r.end)
        {
            m = self.done.wait(m).unwrap_or_else(PoisonError::into_inner);
        }
        m
    }

    /// Makes sure that there is an L2 table for a guest cluster, and that it is ours alone.
    fn own_l2(&self, m: &mut Meta, cluster: u64) -> Result<(), DiskError> {
        let index = (cluster / self.l2_entries) as usize;
        let Some(&old) = m.l1.get(index) else {
            return Err(damaged("the L1 table is too short"));
        };
        let old_table = old & OFFSET_MASK;
        if old_table != 0 && old & COPIED != 0 {
            return Ok(());
        }
        let bytes = self.cluster_bytes();
        let fresh = m.refs.high_water;
        let (at, _) = self.alloc(m, 1)?;
        m.l2.forget(at, bytes);
        if old_table != 0 {
            // Shared with a snapshot: copy it, with what is not written yet.
            let mut copy = Vec::with_capacity(bytes as usize);
            while (copy.len() as u64) < bytes {
                let part =
                    m.l2.read(&*self.storage, old_table + copy.len() as u64)
                        .map_err(host)?;
                copy.extend_from_slice(part);
            }
            self.storage.write_at(at, &copy).map_err(host)?;
            self.release(
                m,
                Entry {
                    raw: old_table,
                    bitmap: 0,
                },
            );
            m.l2_tables.remove(&old_table);
        } else if at >> self.layout.cluster_bits < fresh {
            self.storage
                .write_at(at, &vec![0; bytes as usize])
                .map_err(host)?;
        }
        m.l2_tables.insert(at);
        if let Some(e) = m.l1.get_mut(index) {
            *e = at | COPIED;
        }
        m.l1_dirty.insert(index * 8 / L1_CHUNK);
        Ok(())
    }
}

/// Reads an L1 table and checks every entry.
fn read_l1(
    storage: &dyn Storage,
    offset: u64,
    entries: u64,
    layout: Layout,
) -> Result<(Vec<u64>, HashSet<u64>), DiskError> {
    let mut bytes = vec![0; entries as usize * 8];
    storage.read_at(offset, &mut bytes).map_err(host)?;
    let l1: Vec<u64> = bytes.chunks_exact(8).map(|c| be64(c, 0)).collect();
    let mut tables = HashSet::new();
    for table in l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
        if !table.is_multiple_of(layout.cluster_bytes()) || table < layout.cluster_bytes() {
            return Err(damaged(format!("an L2 table is at {table:#x}")));
        }
        if !tables.insert(table) {
            return Err(damaged(format!("the L2 table at {table:#x} is used twice")));
        }
    }
    Ok((l1, tables))
}

impl Image for Qcow2 {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size_bytes: self.size(),
            block_bytes: 512,
            read_only: self.read_only,
            discard: !self.read_only,
        }
    }

    fn read(&self, offset: u64, target: &mut Target<'_>) -> Result<(), DiskError> {
        let _gate = self.shared_gate();
        self.read_ungated(offset, target)
    }

    fn write(&self, offset: u64, source: &mut Source<'_>) -> Result<(), DiskError> {
        let mut at = offset;
        while source.remaining() > 0 {
            self.before_write()?;
            let _gate = self.shared_gate();
            let outcome = self.write_some(at, source);
            at += self.note(outcome)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), DiskError> {
        let outcome = self.zero_range(offset, len, may_unmap);
        self.note(outcome)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let outcome = self.discard_range(offset, len);
        self.note(outcome)
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.flush_all()
    }

    fn extent(&self, offset: u64, max: u64) -> Result<Extent, DiskError> {
        let _gate = self.shared_gate();
        self.extent_ungated(offset, max)
    }

    fn resize(&self, size_bytes: u64) -> Result<(), DiskError> {
        self.before_write()?;
        let outcome = self.resize_to(size_bytes);
        self.note(outcome)
    }

    fn details(&self) -> Details {
        let m = self.meta();
        let h = &m.header;
        let yes = |b: bool| if b { "yes" } else { "no" }.to_owned();
        let mut properties = vec![
            ("version", h.version.to_string()),
            (
                "compression",
                match h.compression {
                    Compression::Zlib => "zlib",
                    Compression::Zstd => "zstd",
                }
                .to_owned(),
            ),
            ("refcount bits", (1u32 << h.refcount_order).to_string()),
            (
                "lazy refcounts",
                yes(h.compat & header::COMPAT_LAZY_REFCOUNTS != 0),
            ),
            ("extended L2", yes(h.extended_l2())),
            ("dirty", yes(h.incompat & INCOMPAT_DIRTY != 0)),
            ("corrupt", yes(h.incompat & INCOMPAT_CORRUPT != 0)),
        ];
        if let Some(b) = &h.bitmaps {
            properties.push(("bitmaps", b.count.to_string()));
        }
        Details {
            format: Format::Qcow2,
            cluster_bytes: Some(h.cluster_bytes()),
            backing: h
                .backing
                .clone()
                .map(|name| (name, h.backing_format.clone())),
            snapshots: m
                .snapshots
                .iter()
                .map(|s| SnapshotInfo {
                    id: s.id.clone(),
                    name: s.name.clone(),
                    disk_bytes: s.disk_bytes,
                    vm_state_bytes: s.vm_state_bytes,
                    unix_seconds: s.unix_seconds,
                })
                .collect(),
            properties,
        }
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.read_only || self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush_all()?;
        self.closed.store(true, Ordering::Release);
        if !self.broken.load(Ordering::Acquire) {
            self.store_bitmaps()?;
        }
        // The clusters that the last flush gave back.
        self.flush_all()
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::error!("a qcow2 image was not closed cleanly: {e}");
        }
    }
}

/// True if an extent of a backing image reads as zeroes.
fn is_zero(stored: Stored) -> bool {
    stored == Stored::Zero
}
