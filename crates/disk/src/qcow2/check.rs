//! Comparing refcounts with what refers to clusters.

use super::entry::{COPIED, OFFSET_MASK, Sub};
use super::header::{AUTOCLEAR_BITMAPS, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::{Meta, Qcow2, host, read_l1, snapshot};
use crate::DiskError;
use crate::storage::Storage;

/// LIMIT: clusters that can be counted: 4 TiB with 64 KiB clusters, 256 MiB of memory.
const MAX_CLUSTERS: u64 = 64 << 20;
/// LIMIT: problems that are told one by one.
const MAX_MESSAGES: usize = 20;

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that can lose data.
    pub errors: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
    /// Some of both, in words.
    pub messages: Vec<String>,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those that have data.
    pub allocated_clusters: u64,
    /// Those that have compressed data.
    pub compressed_clusters: u64,
    /// First byte behind the last cluster that is in use.
    pub image_end: u64,
    /// What was put right, in words.
    pub repaired: Vec<String>,
}

impl CheckReport {
    /// Nothing was found.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }

    pub(super) fn error(&mut self, text: String) {
        self.errors += 1;
        self.message(format!("error: {text}"));
    }

    fn message(&mut self, text: String) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(text);
        } else if self.messages.len() == MAX_MESSAGES {
            self.messages.push("and more".into());
        }
    }
}

/// What to put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Clusters that are lost: gives them back.
    Leaks,
    /// Also refcounts that are too low, flags that are wrong, and the marks of an unclean end.
    All,
}

/// References by cluster.
pub(super) struct Counted {
    pub(super) counts: Vec<u32>,
    cluster_bits: u32,
}

impl Counted {
    fn add(&mut self, at: u64, bytes: u64, what: &str, report: &mut CheckReport) {
        if bytes == 0 {
            return;
        }
        let (first, last) = (
            at >> self.cluster_bits,
            at.saturating_add(bytes - 1) >> self.cluster_bits,
        );
        if last >= self.counts.len() as u64 {
            report.error(format!("{what} at {at:#x} lies beyond the end of the file"));
            return;
        }
        for c in &mut self.counts[first as usize..=last as usize] {
            *c = c.saturating_add(1);
        }
    }
}

impl Qcow2 {
    /// Checks the image in `storage`, and repairs it if asked to. What is reported was found after
    /// the repair. Backing files are not looked at.
    pub fn check(
        storage: Box<dyn Storage>,
        repair: Option<Repair>,
    ) -> Result<CheckReport, DiskError> {
        let image = Qcow2::open_unbacked(storage, repair.is_none())?;
        let found = image.check_now()?;
        let Some(repair) = repair else {
            return Ok(found);
        };
        let mut repaired = Vec::new();
        let marks = image.meta().header.incompat & (INCOMPAT_CORRUPT | INCOMPAT_DIRTY);
        if repair == Repair::All && (found.errors > 0 || marks != 0) {
            image.rebuild_refcounts()?;
            repaired.push(format!(
                "counted all clusters anew ({} errors)",
                found.errors
            ));
        } else if found.leaks > 0 && found.errors == 0 {
            image.free_leaks()?;
            repaired.push(format!("gave back {} lost clusters", found.leaks));
        }
        let mut after = image.check_now()?;
        after.repaired = repaired;
        Ok(after)
    }

    /// Counts what refers to every cluster, except the refcount tables themselves.
    pub(super) fn count(
        &self,
        m: &mut Meta,
        report: &mut CheckReport,
    ) -> Result<Counted, DiskError> {
        let bits = self.layout.cluster_bits;
        let cluster = self.cluster_bytes();
        let clusters = self.storage.len().map_err(host)?.div_ceil(cluster);
        if clusters > MAX_CLUSTERS {
            return Err(DiskError::Unsupported(format!(
                "the image file has {clusters} clusters; at most {MAX_CLUSTERS} can be checked"
            )));
        }
        let mut counted = Counted {
            counts: vec![0; clusters as usize],
            cluster_bits: bits,
        };
        let c = &mut counted;
        c.add(0, cluster, "the header", report);
        let h = m.header.clone();
        c.add(
            h.l1_offset,
            u64::from(h.l1_entries) * 8,
            "the L1 table",
            report,
        );
        let l1 = m.l1.clone();
        self.count_l1(&l1, c, report, true)?;
        let table = snapshot::table_bytes(&m.snapshots);
        c.add(h.snapshots_offset, table, "the snapshot table", report);
        for s in m.snapshots.clone() {
            let what = format!("the L1 table of snapshot {:?}", s.name);
            c.add(s.l1_offset, u64::from(s.l1_entries) * 8, &what, report);
            match read_l1(
                &*self.storage,
                s.l1_offset,
                s.l1_entries.into(),
                self.layout,
            ) {
                Ok((l1, _)) => self.count_l1(&l1, c, report, false)?,
                Err(e) => report.error(format!("{what}: {e}")),
            }
        }
        if h.autoclear & AUTOCLEAR_BITMAPS != 0 {
            self.count_bitmaps(&h, &mut |at, bytes, what| c.add(at, bytes, what, report))?;
        }
        Ok(counted)
    }

    fn count_l1(
        &self,
        l1: &[u64],
        counted: &mut Counted,
        report: &mut CheckReport,
        active: bool,
    ) -> Result<(), DiskError> {
        let cluster = self.cluster_bytes();
        let size = self.size();
        for (index, table) in l1.iter().map(|e| e & OFFSET_MASK).enumerate() {
            if table == 0 {
                continue;
            }
            counted.add(table, cluster, "an L2 table", report);
            if table >> self.layout.cluster_bits >= counted.counts.len() as u64 {
                continue;
            }
            let (_, entries) = self.table_entries(table)?;
            for (n, entry) in entries.into_iter().enumerate() {
                let guest = (index as u64 * self.l2_entries + n as u64) << self.layout.cluster_bits;
                if active && (entry.is_compressed() || entry.host().is_some()) && guest < size {
                    report.allocated_clusters += 1;
                    report.compressed_clusters += u64::from(entry.is_compressed());
                }
                if let Some((at, bytes)) = entry.compressed_at(self.layout) {
                    counted.add(at, bytes, "a compressed cluster", report);
                    if entry.raw & COPIED != 0 {
                        report.error(format!("the compressed cluster of {guest:#x} is flagged"));
                    }
                } else if let Some(at) = entry.host() {
                    if at.is_multiple_of(cluster) {
                        counted.add(at, cluster, "a data cluster", report);
                    } else {
                        report.error(format!("a data cluster is at {at:#x}"));
                    }
                }
                let invalid =
                    (0..self.layout.subs()).any(|s| entry.sub(s, self.layout) == Sub::Invalid);
                if invalid {
                    report.error(format!("the L2 entry of {guest:#x} contradicts itself"));
                }
            }
        }
        Ok(())
    }

    fn check_now(&self) -> Result<CheckReport, DiskError> {
        let mut m = self.meta();
        let m = &mut *m;
        let cluster = self.cluster_bytes();
        let bits = self.layout.cluster_bits;
        let mut report = CheckReport {
            total_clusters: self.size().div_ceil(cluster),
            ..CheckReport::default()
        };
        let mut counted = self.count(m, &mut report)?;
        counted.add(
            m.refs.table_offset,
            m.refs.table_clusters * cluster,
            "the refcount table",
            &mut report,
        );
        let mut blocks: Vec<u64> = m.refs.blocks.iter().copied().collect();
        blocks.sort_unstable();
        for block in blocks {
            counted.add(block, cluster, "a refcount block", &mut report);
        }
        let mut have = vec![0u64; counted.counts.len()];
        let mut beyond = 0u64;
        m.refs
            .for_each(&*self.storage, |c, value| match have.get_mut(c as usize) {
                Some(h) => *h = value,
                None => beyond += 1,
            })?;
        if beyond > 0 {
            report.leaks += beyond;
            report.message(format!(
                "leak: {beyond} clusters beyond the end of the file are counted"
            ));
        }
        for (n, (have, want)) in have.iter().zip(&counted.counts).enumerate() {
            let want = u64::from(*want);
            if *have != 0 || want != 0 {
                report.image_end = (n as u64 + 1) << bits;
            }
            let text = format!("cluster {n} has refcount {have}, but {want} refer to it");
            if *have > want {
                report.leaks += 1;
                report.message(format!("leak: {text}"));
            } else if *have < want {
                report.error(text);
            }
        }
        self.check_flags(m, &have, &mut report)?;
        for (bit, text) in [
            (INCOMPAT_CORRUPT, "the image is marked as corrupt"),
            (INCOMPAT_DIRTY, "the image was not closed cleanly"),
        ] {
            if m.header.incompat & bit != 0 {
                report.error(text.into());
            }
        }
        Ok(report)
    }

    /// The copied flag says that the refcount is exactly one.
    fn check_flags(
        &self,
        m: &mut Meta,
        have: &[u64],
        report: &mut CheckReport,
    ) -> Result<(), DiskError> {
        let bits = self.layout.cluster_bits;
        let wrong = |at: u64, flag: bool| match have.get((at >> bits) as usize) {
            Some(count) => (*count == 1) != flag,
            None => false,
        };
        for l1 in m.l1.clone() {
            let table = l1 & OFFSET_MASK;
            if table == 0 || table >> bits >= have.len() as u64 {
                continue;
            }
            if wrong(table, l1 & COPIED != 0) {
                report.error(format!("the flag of the L2 table at {table:#x} is wrong"));
            }
            for e in self.table_entries(table)?.1 {
                if let Some(at) = e.host()
                    && wrong(at, e.copied())
                {
                    report.error(format!("the flag of the data cluster at {at:#x} is wrong"));
                }
            }
        }
        Ok(())
    }

    /// Lowers counts that are too high.
    fn free_leaks(&self) -> Result<(), DiskError> {
        let mut m = self.meta();
        let m = &mut *m;
        let cluster = self.cluster_bytes();
        let mut report = CheckReport::default();
        let mut counted = self.count(m, &mut report)?;
        let table = (m.refs.table_offset, m.refs.table_clusters * cluster);
        counted.add(table.0, table.1, "", &mut report);
        for block in m.refs.blocks.clone() {
            counted.add(block, cluster, "", &mut report);
        }
        let mut lower = Vec::new();
        m.refs.for_each(&*self.storage, |c, value| {
            let want = counted.counts.get(c as usize).copied().unwrap_or(0);
            if value > u64::from(want) {
                lower.push((c, u64::from(want)));
            }
        })?;
        for (c, want) in lower {
            m.refs.set(&*self.storage, c, want)?;
        }
        self.extend_and_sync(m)
    }
}
