//! Writing data: in place, or to new clusters with what was around it.

use std::ops::Range;

use super::entry::{Entry, Sub};
use super::{Meta, Qcow2, host};
use crate::DiskError;
use crate::payload::{Source, Target};

/// LIMIT: bytes that are given clusters at a time.
const MAX_ALLOC_BYTES: u64 = 8 << 20;
/// Up to this many bytes are put together with what surrounds them and written at once.
const MERGE_BYTES: u64 = 256 << 10;

/// A write that needs clusters or changes what they are.
struct Plan {
    /// Guest clusters.
    clusters: Range<u64>,
    /// Place of the first cluster in the file.
    host: u64,
    /// The guest cluster had this host cluster before.
    reuse: bool,
    /// Guest bytes written.
    data: Range<u64>,
    /// Guest bytes that get content: the data and what shares its units.
    whole: Range<u64>,
    /// The host clusters read as zeroes.
    fresh: bool,
    /// What shares the units is zeroes and need not be written.
    blank: bool,
}

impl Qcow2 {
    /// Writes a first part of `source` to `at`; returns its bytes. The caller holds the gate.
    pub(super) fn write_some(&self, at: u64, source: &mut Source<'_>) -> Result<u64, DiskError> {
        let bits = self.layout.cluster_bits;
        let first = at >> bits;
        let table_end = ((first / self.l2_entries + 1) * self.l2_entries) << bits;
        let max = source.remaining().min(table_end - at);
        let mut m = self.meta();
        m = self.settled(m, &(first..first + 1));
        self.own_l2(&mut m, first)?;
        if let Some((place, len)) = self.in_place(&mut m, at, max)? {
            self.check_overlap(&m, place, len)?;
            m.bitmaps.mark(at, len);
            drop(m);
            source.write_to(&*self.storage, place, len)?;
            return Ok(len);
        }
        let plan = self.plan(&mut m, at, max)?;
        m.allocating.push(plan.clusters.clone());
        drop(m);
        let written = self.fill(&plan, source);
        let mut m = self.meta();
        let outcome = written.and_then(|()| self.link(&mut m, &plan));
        if outcome.is_err() && !plan.reuse {
            // Nothing refers to them.
            let n = plan.clusters.end - plan.clusters.start;
            m.pending.push((plan.host >> bits, n));
        }
        m.allocating.retain(|r| *r != plan.clusters);
        let len = plan.data.end - plan.data.start;
        m.bitmaps.mark(at, len);
        drop(m);
        self.done.notify_all();
        outcome.map(|()| len)
    }

    /// The longest run from `at` that can be overwritten where it is.
    fn in_place(&self, m: &mut Meta, at: u64, max: u64) -> Result<Option<(u64, u64)>, DiskError> {
        let sub_bytes = self.layout.sub_bytes();
        let mut run: Option<(u64, u64)> = None;
        loop {
            let len = run.map_or(0, |(_, len)| len);
            if len >= max {
                break;
            }
            let here = at + len;
            let entry = self.entry(m, here >> self.layout.cluster_bits)?;
            let inside = here & (self.cluster_bytes() - 1);
            let data = entry.sub((inside / sub_bytes) as u32, self.layout) == Sub::Data;
            let Some(cluster) = entry.host().filter(|_| data && entry.copied()) else {
                break;
            };
            let place = cluster + inside;
            let bytes = sub_bytes - inside % sub_bytes;
            run = match run {
                None => Some((place, bytes)),
                Some((start, len)) if start + len == place => Some((start, len + bytes)),
                _ => break,
            };
        }
        Ok(run.map(|(start, len)| (start, len.min(max))))
    }

    /// A cluster of its own, which only has to be filled or changed.
    fn own_host(entry: Entry) -> Option<u64> {
        entry.host().filter(|_| entry.copied())
    }

    /// Decides where the next bytes go, and takes clusters for them.
    fn plan(&self, m: &mut Meta, at: u64, max: u64) -> Result<Plan, DiskError> {
        let bits = self.layout.cluster_bits;
        let cluster_bytes = self.cluster_bytes();
        let first = at >> bits;
        let entry = self.entry(m, first)?;
        let (host, n, reuse, fresh) = if let Some(host) = Qcow2::own_host(entry) {
            self.check_overlap(m, host, cluster_bytes)?;
            (host, 1, true, false)
        } else {
            let last = (at + max - 1) >> bits;
            let limit = (MAX_ALLOC_BYTES >> bits).max(1);
            let mut n = 1;
            while n < limit && first + n <= last {
                let next = first + n;
                if m.allocating.iter().any(|r| r.contains(&next))
                    || Qcow2::own_host(self.entry(m, next)?).is_some()
                {
                    break;
                }
                n += 1;
            }
            let fresh = m.refs.high_water;
            let (host, n) = self.alloc(m, n)?;
            (host, n, false, host >> bits >= fresh)
        };
        let clusters = first..first + n;
        let data = at..(at + max).min(clusters.end << bits);
        let mut absent = true;
        // Where the content must begin (or end) for the unit that holds `edge` to be whole.
        let mut unit = |m: &mut Meta, edge: u64, cluster: u64| -> Result<Range<u64>, DiskError> {
            let entry = self.entry(m, cluster)?;
            let start = cluster << bits;
            let all = start..start + cluster_bytes;
            let sub_bytes = self.layout.sub_bytes();
            let sub = ((edge - start) / sub_bytes) as u32;
            let kind = entry.sub(sub, self.layout);
            absent &= kind == Sub::Absent || kind == Sub::Zero;
            if !self.layout.extended {
                return Ok(all);
            }
            let sub_start = start + u64::from(sub) * sub_bytes;
            if reuse {
                return Ok(if kind == Sub::Data {
                    edge..edge + 1
                } else {
                    sub_start..sub_start + sub_bytes
                });
            }
            if entry.is_compressed() || (entry.host().is_some() && !entry.no_data()) {
                absent = false;
                return Ok(all);
            }
            Ok(sub_start..sub_start + sub_bytes)
        };
        let head = unit(m, data.start, clusters.start)?;
        let tail = unit(m, data.end - 1, clusters.end - 1)?;
        Ok(Plan {
            whole: head.start..tail.end.max(data.end),
            clusters,
            host,
            reuse,
            data,
            fresh,
            blank: fresh && absent && self.backing.is_none(),
        })
    }

    /// What is in a range now; zeroes beyond the end of the disk.
    fn old(&self, range: Range<u64>) -> Result<Vec<u8>, DiskError> {
        let mut buf = vec![0; (range.end - range.start) as usize];
        let there = range.end.min(self.size()).saturating_sub(range.start) as usize;
        if let Some(part) = buf.get_mut(..there).filter(|p| !p.is_empty()) {
            self.read_ungated(range.start, &mut Target::host(part))?;
        }
        Ok(buf)
    }

    /// Writes the data and what surrounds it.
    fn fill(&self, plan: &Plan, source: &mut Source<'_>) -> Result<(), DiskError> {
        let place = |guest: u64| plan.host + (guest - (plan.clusters.start << self.bits()));
        let len = plan.data.end - plan.data.start;
        if plan.blank {
            return source.write_to(&*self.storage, place(plan.data.start), len);
        }
        let needed = |buf: Vec<u8>| {
            if plan.fresh && buf.iter().all(|b| *b == 0) {
                Vec::new()
            } else {
                buf
            }
        };
        let head = needed(self.old(plan.whole.start..plan.data.start)?);
        let tail = needed(self.old(plan.data.end..plan.whole.end)?);
        if head.is_empty() && tail.is_empty() {
            return source.write_to(&*self.storage, place(plan.data.start), len);
        }
        if len <= MERGE_BYTES {
            let from = plan.data.start - head.len() as u64;
            let mut all = head;
            let at = all.len();
            all.resize(at + len as usize, 0);
            source.copy(&mut all[at..])?;
            all.extend_from_slice(&tail);
            return self.storage.write_at(place(from), &all).map_err(host);
        }
        if !head.is_empty() {
            self.storage
                .write_at(place(plan.whole.start), &head)
                .map_err(host)?;
        }
        source.write_to(&*self.storage, place(plan.data.start), len)?;
        if !tail.is_empty() {
            self.storage
                .write_at(place(plan.data.end), &tail)
                .map_err(host)?;
        }
        Ok(())
    }

    fn bits(&self) -> u32 {
        self.layout.cluster_bits
    }

    /// Makes the L2 entries say what was written.
    fn link(&self, m: &mut Meta, plan: &Plan) -> Result<(), DiskError> {
        let cluster_bytes = self.cluster_bytes();
        for (n, cluster) in plan.clusters.clone().enumerate() {
            let old = self.entry(m, cluster)?;
            let host = plan.host + n as u64 * cluster_bytes;
            let mut new = Entry::data(host);
            if self.layout.extended {
                let start = cluster << self.bits();
                let from = plan.whole.start.max(start) - start;
                let to = plan.whole.end.min(start + cluster_bytes) - start;
                let sub_bytes = self.layout.sub_bytes();
                new.bitmap = if old.is_compressed() { 0 } else { old.bitmap };
                new.mark(
                    (from / sub_bytes) as u32,
                    to.div_ceil(sub_bytes) as u32,
                    Sub::Data,
                );
            } else {
                new.bitmap = 0;
            }
            self.set_entry(m, cluster, new)?;
            if !plan.reuse {
                self.release(m, old);
            }
        }
        Ok(())
    }

    /// Stores a whole cluster compressed, which must not have been written before. False if it
    /// would not become smaller; then nothing was done. For filling a new image.
    pub fn write_compressed(&self, offset: u64, packed: &[u8]) -> Result<(), DiskError> {
        self.before_write()?;
        let _gate = self.shared_gate();
        let cluster = offset >> self.bits();
        let mut m = self.meta();
        m = self.settled(m, &(cluster..cluster + 1));
        self.own_l2(&mut m, cluster)?;
        let place = self.alloc_packed(&mut m, packed.len() as u64)?;
        self.storage.write_at(place, packed).map_err(host)?;
        let old = self.entry(&mut m, cluster)?;
        let entry = Entry::compressed(place, packed.len() as u64, self.layout);
        self.set_entry(&mut m, cluster, entry)?;
        self.release(&mut m, old);
        m.bitmaps.mark(offset, self.cluster_bytes());
        Ok(())
    }

    /// Room for compressed data: behind the last if its cluster, or the next, has room.
    fn alloc_packed(&self, m: &mut Meta, bytes: u64) -> Result<u64, DiskError> {
        let bits = self.bits();
        let cluster_bytes = self.cluster_bytes();
        let max = m.refs.max();
        let mut at = m.packing;
        let left = if at == 0 {
            0
        } else {
            cluster_bytes - at % cluster_bytes
        };
        let shared = left > 0 && m.refs.get(&*self.storage, at >> bits)? < max;
        if shared && bytes <= left {
            m.refs.add(&*self.storage, at >> bits, 1)?;
        } else {
            let (new, _) = self.alloc(m, 1)?;
            if shared && new == (at & !(cluster_bytes - 1)) + cluster_bytes {
                m.refs.add(&*self.storage, at >> bits, 1)?;
            } else {
                at = new;
            }
        }
        let end = at + bytes;
        m.packing = if end.is_multiple_of(cluster_bytes) {
            0
        } else {
            end
        };
        Ok(at)
    }
}
