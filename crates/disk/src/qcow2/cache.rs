//! A cache of slices of tables, by host offset.
//!
//! Slices that were changed stay until they are written back; the owner does that in an order that
//! keeps the image consistent, and makes room by doing so before an operation begins.

use std::collections::HashMap;
use std::io;

use crate::storage::Storage;

struct Slice {
    data: Box<[u8]>,
    dirty: bool,
    /// A flush is writing an older state of it.
    writing: bool,
    used: u64,
}

/// The cache.
pub(crate) struct Cache {
    slices: HashMap<u64, Slice>,
    slice_bytes: usize,
    /// LIMIT: slices kept; more only while all others are dirty.
    max: usize,
    dirty: usize,
    tick: u64,
}

impl Cache {
    /// Slices of `slice_bytes` (a power of two), at most `max_bytes` of them.
    pub(crate) fn new(slice_bytes: u64, max_bytes: u64) -> Cache {
        Cache {
            slices: HashMap::new(),
            slice_bytes: slice_bytes as usize,
            max: (max_bytes / slice_bytes).max(16) as usize,
            dirty: 0,
            tick: 0,
        }
    }

    fn base(&self, offset: u64) -> (u64, usize) {
        let inside = offset & (self.slice_bytes as u64 - 1);
        (offset - inside, inside as usize)
    }

    fn slice(&mut self, storage: &dyn Storage, offset: u64) -> io::Result<(&mut Slice, usize)> {
        let (base, inside) = self.base(offset);
        self.tick += 1;
        if !self.slices.contains_key(&base) {
            self.make_room();
            let mut data = vec![0; self.slice_bytes].into_boxed_slice();
            storage.read_at(base, &mut data)?;
            self.slices.insert(
                base,
                Slice {
                    data,
                    dirty: false,
                    writing: false,
                    used: 0,
                },
            );
        }
        let tick = self.tick;
        match self.slices.get_mut(&base) {
            Some(s) => {
                s.used = tick;
                Ok((s, inside))
            }
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Drops the least recently used quarter of what is clean, if the cache is full.
    fn make_room(&mut self) {
        if self.slices.len() < self.max {
            return;
        }
        let mut clean: Vec<(u64, u64)> = self
            .slices
            .iter()
            .filter(|(_, s)| !s.dirty && !s.writing)
            .map(|(base, s)| (s.used, *base))
            .collect();
        clean.sort_unstable();
        clean.truncate((self.max / 4).max(1));
        for (_, base) in clean {
            self.slices.remove(&base);
        }
    }

    /// The bytes from `offset` to the end of its slice.
    pub(crate) fn read(&mut self, storage: &dyn Storage, offset: u64) -> io::Result<&[u8]> {
        let (slice, inside) = self.slice(storage, offset)?;
        Ok(&slice.data[inside..])
    }

    /// The same, to be changed.
    pub(crate) fn write(&mut self, storage: &dyn Storage, offset: u64) -> io::Result<&mut [u8]> {
        let was = self.dirty;
        let (slice, inside) = self.slice(storage, offset)?;
        let now = was + usize::from(!slice.dirty);
        slice.dirty = true;
        // The borrow of the slice ends the use of `self`: find it again.
        let (base, _) = self.base(offset);
        self.dirty = now;
        match self.slices.get_mut(&base) {
            Some(s) => Ok(&mut s.data[inside..]),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// So much is dirty that it should be written before more is changed.
    pub(crate) fn is_pressed(&self) -> bool {
        self.dirty * 2 > self.max
    }

    /// Writes all dirty slices now.
    pub(crate) fn write_back(&mut self, storage: &dyn Storage) -> io::Result<()> {
        let mut bases: Vec<u64> = self
            .slices
            .iter()
            .filter(|(_, s)| s.dirty)
            .map(|(base, _)| *base)
            .collect();
        bases.sort_unstable();
        for base in bases {
            if let Some(s) = self.slices.get_mut(&base) {
                storage.write_at(base, &s.data)?;
                s.dirty = false;
                self.dirty -= 1;
            }
        }
        Ok(())
    }

    /// Copies of all dirty slices, which count as clean from now on but stay.
    pub(crate) fn take_dirty(&mut self) -> Vec<(u64, Box<[u8]>)> {
        let mut out: Vec<(u64, Box<[u8]>)> = Vec::with_capacity(self.dirty);
        for (base, s) in self.slices.iter_mut().filter(|(_, s)| s.dirty) {
            s.dirty = false;
            s.writing = true;
            out.push((*base, s.data.clone()));
        }
        self.dirty = 0;
        out.sort_unstable_by_key(|(base, _)| *base);
        out
    }

    /// What was taken is on the disk, or it is not and is dirty again.
    pub(crate) fn taken_done(&mut self, written: bool) {
        for s in self.slices.values_mut().filter(|s| s.writing) {
            s.writing = false;
            if !written && !s.dirty {
                s.dirty = true;
                self.dirty += 1;
            }
        }
    }

    /// Forgets a range, written or not: its clusters have another use now.
    pub(crate) fn forget(&mut self, offset: u64, len: u64) {
        let mut at = offset;
        while at < offset + len {
            if let Some(s) = self.slices.remove(&at) {
                self.dirty -= usize::from(s.dirty);
            }
            at += self.slice_bytes as u64;
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.slices.clear();
        self.dirty = 0;
    }
}
