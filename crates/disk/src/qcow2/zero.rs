//! Making ranges zero or absent, without writing zeroes where that can be avoided.

use super::entry::{Entry, Sub};
use super::{Meta, Qcow2};
use crate::DiskError;
use crate::payload::Source;

/// A piece of zeroes that is written, in bytes.
const PIECE: u64 = 256 << 10;

/// What a range becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Become {
    /// Zeroes, and host clusters stay for later writes.
    ZeroKept,
    /// Zeroes, and host clusters are given back.
    Zero,
}

impl Qcow2 {
    pub(super) fn zero_range(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<(), DiskError> {
        self.before_write()?;
        let unit = self.layout.sub_bytes();
        let end = offset + len;
        let from = offset.next_multiple_of(unit);
        // The last unit of the disk is whole although the disk may end within it.
        let to = if end == self.size() {
            end.next_multiple_of(unit)
        } else {
            end & !(unit - 1)
        };
        if from >= to || !self.can_zero() {
            return self.zero_by_writing(offset, end);
        }
        self.zero_by_writing(offset, from)?;
        let what = if may_unmap {
            Become::Zero
        } else {
            Become::ZeroKept
        };
        self.change(from, to, what)?;
        self.zero_by_writing(to.min(end), end)
    }

    /// Zero clusters exist, or an absent cluster is one.
    fn can_zero(&self) -> bool {
        self.layout.zero_flag || self.backing.is_none()
    }

    pub(super) fn discard_range(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.before_write()?;
        if !self.can_zero() {
            // Version 2 with a backing file: its content would come back.
            return Ok(());
        }
        let unit = self.layout.sub_bytes();
        let end = offset + len;
        let from = offset.next_multiple_of(unit);
        let to = if end == self.size() {
            end.next_multiple_of(unit)
        } else {
            end & !(unit - 1)
        };
        if from < to {
            self.change(from, to, Become::Zero)?;
        }
        Ok(())
    }

    fn zero_by_writing(&self, from: u64, to: u64) -> Result<(), DiskError> {
        if from >= to {
            return Ok(());
        }
        {
            let _gate = self.shared_gate();
            if self.reads_zero(from, to - from)? {
                return Ok(());
            }
        }
        let zeroes = vec![0; PIECE.min(to - from) as usize];
        let mut at = from;
        while at < to {
            let n = (to - at).min(PIECE) as usize;
            let mut source = Source::host(&zeroes[..n]);
            while source.remaining() > 0 {
                self.before_write()?;
                let _gate = self.shared_gate();
                at += self.write_some(at, &mut source)?;
            }
        }
        Ok(())
    }

    /// Changes whole units, one L2 table at a time.
    fn change(&self, from: u64, to: u64, what: Become) -> Result<(), DiskError> {
        let bits = self.layout.cluster_bits;
        let covers = self.l2_entries << bits;
        let mut at = from;
        while at < to {
            let end = (at - at % covers + covers).min(to);
            self.before_write()?;
            let _gate = self.shared_gate();
            let first = at >> bits;
            let last = (end - 1) >> bits;
            let mut m = self.meta();
            m = self.settled(m, &(first..last + 1));
            // Without a table, and nothing below it, all is zeroes already.
            if self.slot(&m, first).is_some() || self.backing.is_some() {
                self.own_l2(&mut m, first)?;
                for cluster in first..=last {
                    let start = cluster << bits;
                    let part = at.max(start) - start..end.min(start + (1 << bits)) - start;
                    self.change_cluster(&mut m, cluster, part, what)?;
                }
                m.bitmaps.mark(at, end.min(self.size()).saturating_sub(at));
            }
            at = end;
        }
        Ok(())
    }

    /// `part`: bytes of the cluster, whole units.
    fn change_cluster(
        &self,
        m: &mut Meta,
        cluster: u64,
        part: std::ops::Range<u64>,
        what: Become,
    ) -> Result<(), DiskError> {
        let old = self.entry(m, cluster)?;
        let unit = self.layout.sub_bytes();
        let all = part == (0..self.cluster_bytes());
        let no_backing = self.backing.is_none();
        if all {
            let own = old.host().filter(|_| old.copied());
            let new = match (what, own) {
                (Become::ZeroKept, Some(host)) if self.layout.zero_flag => {
                    Entry::zero(host, self.layout)
                }
                // An absent cluster without a backing file is zeroes.
                _ if no_backing => Entry::default(),
                _ => Entry::zero(0, self.layout),
            };
            if new == old {
                return Ok(());
            }
            self.set_entry(m, cluster, new)?;
            if new.host().is_none() {
                self.release(m, old);
            }
            return Ok(());
        }
        // Subclusters of a cluster.
        if old.is_compressed() || (old.host().is_some() && !old.copied()) {
            // To be split it would have to be copied: zeroes are written like data, later.
            return self.zero_subclusters_by_copy(m, cluster, part);
        }
        let mut new = old;
        let sub = if no_backing { Sub::Absent } else { Sub::Zero };
        new.mark((part.start / unit) as u32, (part.end / unit) as u32, sub);
        if new == old {
            return Ok(());
        }
        if new.host().is_some() && new.no_data() && what == Become::Zero {
            new.raw = 0;
            self.release(m, old);
        }
        self.set_entry(m, cluster, new)
    }

    /// Copies a shared or compressed cluster without the part that becomes zeroes. Rare, so the
    /// tables stay locked.
    fn zero_subclusters_by_copy(
        &self,
        m: &mut Meta,
        cluster: u64,
        part: std::ops::Range<u64>,
    ) -> Result<(), DiskError> {
        let bytes = self.cluster_bytes();
        let start = cluster << self.layout.cluster_bits;
        let mut data = vec![0; bytes as usize];
        let end = (start + bytes).min(self.size());
        let mut at = start;
        while at < end {
            let (kind, len) = self.run_at(m, at, end - at)?;
            let inside = (at - start) as usize;
            let piece = &mut data[inside..inside + len as usize];
            self.read_kind(kind, at, piece)?;
            at += len;
        }
        data[part.start as usize..part.end as usize].fill(0);
        let old = self.entry(m, cluster)?;
        let (host, _) = self.alloc(m, 1)?;
        self.storage.write_at(host, &data).map_err(super::host)?;
        self.set_entry(m, cluster, Entry::data(host))?;
        self.release(m, old);
        Ok(())
    }
}
