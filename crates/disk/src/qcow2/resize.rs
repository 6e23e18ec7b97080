//! Changing the size of the disk.

use std::sync::atomic::Ordering;

use super::header::MAX_L1_BYTES;
use super::{Qcow2, host};
use crate::DiskError;

impl Qcow2 {
    pub(super) fn resize_to(&self, size_bytes: u64) -> Result<(), DiskError> {
        if !size_bytes.is_multiple_of(512) || size_bytes >= 1 << 63 {
            return Err(DiskError::Unsupported(format!(
                "the size is {size_bytes} bytes; expected a multiple of 512"
            )));
        }
        let old = self.size();
        {
            let m = self.meta();
            if m.bitmaps.present(&m.header) {
                return Err(DiskError::Unsupported(
                    "the image has bitmaps, whose size cannot be changed; remove them first".into(),
                ));
            }
            if m.header.version == 2 && !m.snapshots.is_empty() {
                return Err(DiskError::Unsupported(
                    "a version 2 image with snapshots cannot be resized; delete them first".into(),
                ));
            }
        }
        if size_bytes < old {
            // What is cut off must not come back when the disk grows again.
            self.zero_range(size_bytes, old - size_bytes, true)?;
            self.flush_all()?;
            self.store_size(size_bytes)?;
            return self.flush_all();
        }
        self.grow_l1(size_bytes)?;
        // What the backing file has there was never part of this disk.
        let below = self.backing.as_ref().map_or(0, |b| b.info().size_bytes);
        if below.min(size_bytes) > old {
            self.size.store(size_bytes, Ordering::Release);
            let end = below.min(size_bytes);
            let outcome = self
                .zero_range(old, end - old, true)
                .and_then(|()| self.flush_all());
            if outcome.is_err() {
                self.size.store(old, Ordering::Release);
                return outcome;
            }
        }
        self.store_size(size_bytes)
    }

    fn store_size(&self, size_bytes: u64) -> Result<(), DiskError> {
        let _quiet = self.quiet()?;
        let mut m = self.meta();
        let offset = m.header.l1_offset;
        self.store_l1_place(&mut m, offset, size_bytes)
    }

    /// Moves the L1 table to a larger place if it is too small.
    fn grow_l1(&self, size_bytes: u64) -> Result<(), DiskError> {
        let needed = self.meta().header.l1_needed(size_bytes);
        if needed * 8 > MAX_L1_BYTES {
            return Err(DiskError::Unsupported(format!(
                "a disk of {size_bytes} bytes is too large for clusters of {} bytes; convert it \
                 to an image with larger ones",
                self.cluster_bytes()
            )));
        }
        let _quiet = self.quiet()?;
        let mut m = self.meta();
        let m = &mut *m;
        if needed <= m.l1.len() as u64 {
            return Ok(());
        }
        let mut l1 = m.l1.clone();
        l1.resize(needed as usize, 0);
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let offset = self.write_to_new(m, &bytes)?;
        m.refs.cache.write_back(&*self.storage).map_err(host)?;
        self.storage.sync().map_err(host)?;
        let old = (m.header.l1_offset, m.l1.len() as u64 * 8);
        m.l1 = l1;
        let size = self.size();
        self.store_l1_place(m, offset, size)?;
        self.release_run(m, old.0, old.1);
        Ok(())
    }
}
