//! Writing tables back, in the order that keeps the image consistent at every moment.
//!
//! 1. Data is in the file already. Refcounts are written: they only ever grew since the last flush.
//! 2. Barrier. Then L2 tables, as they were at step 1: they refer to durable data only.
//! 3. If the L1 table has changed: barrier, then its chunks.
//! 4. Barrier. Now nothing durable refers to what was given up before step 1: it loses its
//!    reference, and can be used again. Those lower counts are written by the next flush; if that
//!    never comes, clusters are lost but nothing else.
//!
//! Other requests go on meanwhile; what they change is written by the next flush.

use std::sync::{MutexGuard, PoisonError, RwLockWriteGuard};

use super::{L1_CHUNK, Meta, Qcow2, host};
use crate::DiskError;
use crate::storage::Punch;

type Chunks = Vec<(u64, Box<[u8]>)>;

impl Qcow2 {
    /// Makes everything durable that was completed before. Must not be called with the gate held.
    pub(super) fn flush_all(&self) -> Result<(), DiskError> {
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.flush_locked(false)
    }

    /// Nothing else happens to the image while the guards live; everything is written back.
    pub(super) fn quiet(
        &self,
    ) -> Result<(MutexGuard<'_, ()>, RwLockWriteGuard<'_, ()>), DiskError> {
        let one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let gate = self.sole_gate();
        self.flush_locked(true)?;
        Ok((one, gate))
    }

    /// The caller holds `flushing`, and if `sole` the gate too.
    pub(super) fn flush_locked(&self, sole: bool) -> Result<(), DiskError> {
        let (l2, l1, given_up) = {
            let mut m = self.meta();
            self.extend_file(&mut m)?;
            m.refs.cache.write_back(&*self.storage).map_err(host)?;
            let l1 = l1_chunks(&m);
            m.l1_dirty.clear();
            (m.l2.take_dirty(), l1, std::mem::take(&mut m.pending))
        };
        let outcome = self.write_tables(&l2, &l1);
        {
            let mut m = self.meta();
            m.l2.taken_done(outcome.is_ok());
            if outcome.is_err() {
                let base = m.header.l1_offset;
                for (at, _) in &l1 {
                    m.l1_dirty.insert((at - base) as usize / L1_CHUNK);
                }
                m.pending.extend(given_up);
                return outcome;
            }
        }
        if given_up.is_empty() {
            return Ok(());
        }
        // Transfers that looked a cluster up before it was given up must have ended.
        let _gate = (!sole).then(|| self.sole_gate());
        let mut m = self.meta();
        let outcome = self.give_back(&mut m, &given_up);
        self.note(outcome)
    }

    /// The file is at least as long as its clusters.
    fn extend_file(&self, m: &mut Meta) -> Result<(), DiskError> {
        if m.refs.high_water > m.file_clusters {
            let want = m.refs.high_water << self.layout.cluster_bits;
            if self.storage.len().map_err(host)? < want {
                self.storage.set_len(want).map_err(host)?;
            }
            m.file_clusters = m.refs.high_water;
        }
        Ok(())
    }

    fn write_tables(&self, l2: &Chunks, l1: &Chunks) -> Result<(), DiskError> {
        for chunks in [l2, l1] {
            if chunks.is_empty() {
                continue;
            }
            self.storage.sync().map_err(host)?;
            for (at, bytes) in chunks {
                self.storage.write_at(*at, bytes).map_err(host)?;
            }
        }
        self.storage.sync().map_err(host)
    }

    /// Takes a reference from each cluster of the runs, and punches those that have none left.
    fn give_back(&self, m: &mut Meta, runs: &[(u64, u64)]) -> Result<(), DiskError> {
        let bits = self.layout.cluster_bits;
        let mut free: Option<(u64, u64)> = None;
        let punch = |(first, n): (u64, u64)| {
            // Advice: a host that cannot do it keeps the space.
            if let Err(e) = self.storage.punch(Punch::Hole, first << bits, n << bits) {
                tracing::debug!("cannot give space back: {e}");
            }
        };
        for cluster in runs.iter().flat_map(|(first, n)| *first..*first + *n) {
            if m.refs.add(&*self.storage, cluster, -1)? > 0 {
                continue;
            }
            m.refs.hint = m.refs.hint.min(cluster);
            m.l2.forget(cluster << bits, 1 << bits);
            if m.packing >> bits == cluster {
                m.packing = 0;
            }
            free = match free {
                Some((first, n)) if first + n == cluster => Some((first, n + 1)),
                old => {
                    old.into_iter().for_each(&punch);
                    Some((cluster, 1))
                }
            };
        }
        free.into_iter().for_each(&punch);
        *self.unpacked.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
}

pub(super) fn l1_chunks(m: &Meta) -> Chunks {
    let per_chunk = L1_CHUNK / 8;
    m.l1_dirty
        .iter()
        .filter_map(|chunk| {
            let from = chunk * per_chunk;
            let to = (from + per_chunk).min(m.l1.len());
            let bytes: Box<[u8]> =
                m.l1.get(from..to)?
                    .iter()
                    .flat_map(|e| e.to_be_bytes())
                    .collect();
            Some((m.header.l1_offset + from as u64 * 8, bytes))
        })
        .collect()
}
