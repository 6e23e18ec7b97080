//! Dirty bitmaps kept in the image. qcow2 specification, "Bitmaps".
//!
//! Bitmaps that record ("auto") are marked as in use while the image is open for writing, kept up
//! to date in memory, and written at the close. If that never comes, the mark tells others that
//! they cannot be trusted. Bitmaps that do not record are left alone.

use super::header::{AUTOCLEAR_BITMAPS, Header};
use super::{Meta, Qcow2, damaged, host};
use crate::DiskError;
use crate::bytes::{be16, be32, be64, put};

/// LIMIT: bytes of the directory, as QEMU.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// LIMIT: bitmaps, as QEMU.
const MAX_BITMAPS: u32 = 65535;
/// LIMIT: bytes of all bitmaps in memory. Those beyond are marked as not to be trusted.
const MAX_BITS_BYTES: u64 = 64 << 20;
const FLAG_IN_USE: u32 = 1 << 0;
const FLAG_AUTO: u32 = 1 << 1;
/// Type of a dirty bitmap.
const TYPE_DIRTY: u8 = 1;
/// An entry without a place: all bits are set.
const ALL_ONES: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry of the directory.
struct Entry {
    /// Where it is in the file.
    at: u64,
    table_offset: u64,
    table_entries: u32,
    flags: u32,
    kind: u8,
    granularity_bits: u8,
}

/// A bitmap that records.
struct Recording {
    entry: Entry,
    table: Vec<u64>,
    bits: Vec<u8>,
}

/// The bitmaps of an open image.
#[derive(Default)]
pub(super) struct Bitmaps {
    recording: Vec<Recording>,
}

impl Bitmaps {
    /// True if the image has valid bitmaps.
    pub(super) fn present(&self, header: &Header) -> bool {
        header.autoclear & AUTOCLEAR_BITMAPS != 0 && header.bitmaps.is_some()
    }

    /// Notes a change of guest bytes.
    pub(super) fn mark(&mut self, at: u64, len: u64) {
        if len == 0 {
            return;
        }
        for r in &mut self.recording {
            let shift = r.entry.granularity_bits;
            for bit in at >> shift..=(at + len - 1) >> shift {
                if let Some(byte) = r.bits.get_mut((bit / 8) as usize) {
                    *byte |= 1 << (bit % 8);
                }
            }
        }
    }
}

impl Qcow2 {
    fn bitmap_entries(&self, header: &Header) -> Result<Vec<Entry>, DiskError> {
        let Some(ext) = header
            .bitmaps
            .filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0)
        else {
            return Ok(Vec::new());
        };
        let file = self.storage.len().map_err(host)?;
        if ext.directory_bytes > MAX_DIRECTORY_BYTES
            || ext.count > MAX_BITMAPS
            || !ext.directory_offset.is_multiple_of(self.cluster_bytes())
            || ext.directory_offset.saturating_add(ext.directory_bytes)
                > file.next_multiple_of(self.cluster_bytes())
        {
            return Err(damaged("the bitmap directory is not where it can be"));
        }
        let mut b = vec![0; ext.directory_bytes as usize];
        self.storage
            .read_at(ext.directory_offset, &mut b)
            .map_err(host)?;
        let mut out = Vec::new();
        let mut at = 0;
        for _ in 0..ext.count {
            if at + 24 > b.len() {
                return Err(damaged("the bitmap directory is too short"));
            }
            let e = Entry {
                at: ext.directory_offset + at as u64,
                table_offset: be64(&b, at),
                table_entries: be32(&b, at + 8),
                flags: be32(&b, at + 12),
                kind: b.get(at + 16).copied().unwrap_or(0),
                granularity_bits: b.get(at + 17).copied().unwrap_or(0),
            };
            let table_bytes = u64::from(e.table_entries) * 8;
            if !e.table_offset.is_multiple_of(self.cluster_bytes())
                || e.table_offset.saturating_add(table_bytes)
                    > file.next_multiple_of(self.cluster_bytes())
            {
                return Err(damaged("a bitmap table is not where it can be"));
            }
            let len = 24 + u64::from(be32(&b, at + 20)) + u64::from(be16(&b, at + 18));
            at = at.saturating_add(len.next_multiple_of(8) as usize);
            out.push(e);
        }
        Ok(out)
    }

    fn bitmap_table(&self, e: &Entry) -> Result<Vec<u64>, DiskError> {
        let mut b = vec![0; e.table_entries as usize * 8];
        self.storage.read_at(e.table_offset, &mut b).map_err(host)?;
        Ok(b.chunks_exact(8).map(|c| be64(c, 0)).collect())
    }

    fn set_bitmap_flags(&self, e: &Entry, flags: u32) -> Result<(), DiskError> {
        self.storage
            .write_at(e.at + 12, &flags.to_be_bytes())
            .map_err(host)
    }

    /// Reads the bitmaps that record, and marks them as in use.
    pub(super) fn load_bitmaps(&self, m: &mut Meta) -> Result<(), DiskError> {
        let mut bytes_left = MAX_BITS_BYTES;
        let mut changed = false;
        for entry in self.bitmap_entries(&m.header)? {
            if entry.flags & FLAG_AUTO == 0 || entry.flags & FLAG_IN_USE != 0 {
                continue;
            }
            self.set_bitmap_flags(&entry, entry.flags | FLAG_IN_USE)?;
            changed = true;
            if entry.kind != TYPE_DIRTY || !(9..=31).contains(&entry.granularity_bits) {
                continue;
            }
            let bytes = self
                .size()
                .div_ceil(1 << entry.granularity_bits)
                .div_ceil(8);
            let fits = bytes.div_ceil(self.cluster_bytes()) == u64::from(entry.table_entries);
            if !fits || bytes > bytes_left {
                tracing::warn!("a bitmap of the qcow2 image cannot be kept up to date");
                continue;
            }
            bytes_left -= bytes;
            let table = self.bitmap_table(&entry)?;
            let mut bits = vec![0; bytes as usize];
            for (chunk, t) in bits.chunks_mut(self.cluster_bytes() as usize).zip(&table) {
                match t & OFFSET {
                    0 if *t == ALL_ONES => chunk.fill(0xff),
                    0 => {}
                    at if at.is_multiple_of(self.cluster_bytes()) => {
                        self.storage.read_at(at, chunk).map_err(host)?;
                    }
                    at => return Err(damaged(format!("a bitmap cluster is at {at:#x}"))),
                }
            }
            m.bitmaps.recording.push(Recording { entry, table, bits });
        }
        if changed {
            self.storage.sync().map_err(host)?;
        }
        Ok(())
    }

    /// Writes the bitmaps that record, and says that they can be trusted.
    pub(super) fn store_bitmaps(&self) -> Result<(), DiskError> {
        let mut m = self.meta();
        let m = &mut *m;
        let mut recording = std::mem::take(&mut m.bitmaps.recording);
        if recording.is_empty() {
            return Ok(());
        }
        let cluster = self.cluster_bytes() as usize;
        for r in &mut recording {
            for (chunk, t) in r.bits.chunks(cluster).zip(&mut r.table) {
                let mut at = *t & OFFSET;
                if at == 0 && chunk.iter().all(|b| *b == 0) {
                    *t = 0;
                    continue;
                }
                if at == 0 {
                    at = self.alloc(m, 1)?.0;
                    *t = at;
                }
                self.check_overlap(m, at, cluster as u64)?;
                let mut bytes = chunk.to_vec();
                bytes.resize(cluster, 0);
                self.storage.write_at(at, &bytes).map_err(host)?;
            }
        }
        self.extend_and_sync(m)?;
        for r in &recording {
            let mut bytes = vec![0; r.table.len() * 8];
            for (n, t) in r.table.iter().enumerate() {
                put(&mut bytes, n * 8, &t.to_be_bytes());
            }
            self.storage
                .write_at(r.entry.table_offset, &bytes)
                .map_err(host)?;
        }
        self.storage.sync().map_err(host)?;
        for r in &recording {
            self.set_bitmap_flags(&r.entry, r.entry.flags)?;
        }
        self.storage.sync().map_err(host)
    }

    /// Tells `each` what the bitmaps take up: offset, bytes, name.
    pub(super) fn count_bitmaps(
        &self,
        header: &Header,
        each: &mut dyn FnMut(u64, u64, &str),
    ) -> Result<(), DiskError> {
        let Some(ext) = header.bitmaps else {
            return Ok(());
        };
        let entries = self.bitmap_entries(header)?;
        each(
            ext.directory_offset,
            ext.directory_bytes,
            "the bitmap directory",
        );
        for e in entries {
            let bytes = u64::from(e.table_entries) * 8;
            each(e.table_offset, bytes, "a bitmap table");
            for at in self.bitmap_table(&e)?.iter().map(|t| t & OFFSET) {
                if at != 0 {
                    each(at, self.cluster_bytes(), "a bitmap cluster");
                }
            }
        }
        Ok(())
    }
}
