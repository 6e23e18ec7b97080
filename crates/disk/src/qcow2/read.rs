//! Reading, and what is where.

use std::sync::{Arc, PoisonError};

use super::entry::{Entry, Sub};
use super::{Meta, Qcow2, damaged, host, is_zero};
use crate::DiskError;
use crate::image::Extent;
use crate::payload::Target;

/// LIMIT: clusters looked up at a time, which bounds how long the tables are locked.
const MAX_RUN: u64 = 4096;

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Data at an offset of the file.
    Data(u64),
    /// Zeroes.
    Zero,
    /// The backing file decides.
    Absent,
    /// A compressed cluster, and how far into it the run begins.
    Compressed(Entry, u64),
}

impl Qcow2 {
    /// What is at `offset`, for as long as it is alike: kind and bytes, at most `max`.
    pub(super) fn run_at(
        &self,
        m: &mut Meta,
        offset: u64,
        max: u64,
    ) -> Result<(Kind, u64), DiskError> {
        let cluster_bytes = self.cluster_bytes();
        let sub_bytes = self.layout.sub_bytes();
        let mut run: Option<(Kind, u64)> = None;
        let limit = max.min(MAX_RUN * cluster_bytes);
        loop {
            let len = run.map_or(0, |(_, len)| len);
            if len >= limit {
                break;
            }
            let at = offset + len;
            let cluster = at / cluster_bytes;
            let inside = at % cluster_bytes;
            let (kind, bytes) = if self.slot(m, cluster).is_none() {
                let covers = self.l2_entries * cluster_bytes;
                (Kind::Absent, covers - at % covers)
            } else {
                let entry = self.entry(m, cluster)?;
                let sub = (inside / sub_bytes) as u32;
                let left = sub_bytes - inside % sub_bytes;
                match entry.sub(sub, self.layout) {
                    Sub::Absent => (Kind::Absent, left),
                    Sub::Zero => (Kind::Zero, left),
                    Sub::Data => (Kind::Data(entry.host().unwrap_or(0) + inside), left),
                    Sub::Compressed => (Kind::Compressed(entry, inside), cluster_bytes - inside),
                    Sub::Invalid => {
                        return Err(damaged(format!(
                            "the L2 entry of byte {at:#x} contradicts itself"
                        )));
                    }
                }
            };
            match run {
                None => run = Some((kind, bytes)),
                Some((first, len)) => {
                    let goes_on = match (first, kind) {
                        (Kind::Data(a), Kind::Data(b)) => a + len == b,
                        (Kind::Compressed(..), _) => false,
                        (a, b) => a == b,
                    };
                    if !goes_on {
                        break;
                    }
                    run = Some((first, len + bytes));
                }
            }
        }
        let (kind, len) = run.unwrap_or((Kind::Absent, max));
        Ok((kind, len.min(max)))
    }

    /// Reads with the gate held by the caller.
    pub(super) fn read_ungated(
        &self,
        offset: u64,
        target: &mut Target<'_>,
    ) -> Result<(), DiskError> {
        let mut at = offset;
        while target.remaining() > 0 {
            let (kind, len) = self.run_at(&mut self.meta(), at, target.remaining())?;
            self.fill_kind(kind, at, len, target)?;
            at += len;
        }
        Ok(())
    }

    fn fill_kind(
        &self,
        kind: Kind,
        at: u64,
        len: u64,
        target: &mut Target<'_>,
    ) -> Result<(), DiskError> {
        match kind {
            Kind::Data(host) => target.fill_from(&*self.storage, host, len),
            Kind::Zero => target.zero(len),
            Kind::Absent => self.read_backing(at, len, target),
            Kind::Compressed(entry, inside) => {
                let data = self.unpack(entry)?;
                let part = data.get(inside as usize..(inside + len) as usize);
                target.copy(part.unwrap_or_default())
            }
        }
    }

    /// Reads what a run at `at` is into `buf`, which has the run's length.
    pub(super) fn read_kind(&self, kind: Kind, at: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        self.fill_kind(kind, at, len, &mut Target::host(buf))
    }

    fn read_backing(
        &self,
        offset: u64,
        len: u64,
        target: &mut Target<'_>,
    ) -> Result<(), DiskError> {
        let there = match &self.backing {
            None => 0,
            Some(b) => b.info().size_bytes.saturating_sub(offset).min(len),
        };
        if let Some(b) = self.backing.as_ref().filter(|_| there > 0) {
            target.with_part(there, |part| b.read(offset, part))?;
        }
        target.zero(len - there)
    }

    /// The content of a compressed cluster.
    fn unpack(&self, entry: Entry) -> Result<Arc<Vec<u8>>, DiskError> {
        let lock = || self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((raw, data)) = lock().as_ref()
            && *raw == entry.raw
        {
            return Ok(Arc::clone(data));
        }
        let Some((at, bytes)) = entry.compressed_at(self.layout) else {
            return Err(damaged("a cluster is not compressed"));
        };
        let mut packed = vec![0; bytes as usize];
        self.storage.read_at(at, &mut packed).map_err(host)?;
        let data =
            super::compress::unpack(self.compression, &packed, self.cluster_bytes() as usize)
                .ok_or_else(|| damaged(format!("the compressed cluster at {at:#x} is damaged")))?;
        let data = Arc::new(data);
        *lock() = Some((entry.raw, Arc::clone(&data)));
        Ok(data)
    }

    /// See [`Image::extent`](crate::image::Image::extent).
    pub(super) fn extent_ungated(&self, offset: u64, max: u64) -> Result<Extent, DiskError> {
        let max = max.min(self.size().saturating_sub(offset)).max(1);
        let (kind, len) = self.run_at(&mut self.meta(), offset, max)?;
        Ok(match kind {
            Kind::Data(host) => Extent::data(len, Some(host)),
            Kind::Zero => Extent::zero(len),
            Kind::Compressed(..) => Extent {
                compressed: true,
                ..Extent::data(len, None)
            },
            Kind::Absent => match &self.backing {
                Some(b) if offset < b.info().size_bytes => {
                    let below = b.extent(offset, len.min(b.info().size_bytes - offset))?;
                    Extent {
                        depth: below.depth + 1,
                        ..below
                    }
                }
                _ => Extent::absent(len, 0),
            },
        })
    }

    /// True if a range reads as zeroes, as far as the tables tell.
    pub(super) fn reads_zero(&self, offset: u64, len: u64) -> Result<bool, DiskError> {
        let mut at = offset;
        let end = (offset + len).min(self.size());
        while at < end {
            let extent = self.extent_ungated(at, end - at)?;
            if !is_zero(extent.stored) {
                return Ok(false);
            }
            at += extent.len;
        }
        Ok(true)
    }
}
