//! New images.

use super::header::{
    COMPAT_LAZY_REFCOUNTS, Compression, Header, INCOMPAT_COMPRESSION, INCOMPAT_EXTENDED_L2,
    MAX_L1_BYTES,
};
use super::{host, refcount};
use crate::DiskError;
use crate::bytes::put;
use crate::storage::Storage;

/// What a new image is like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster_bytes: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bits of a refcount: 1, 2, 4, … 64.
    pub refcount_bits: u32,
    /// How clusters are compressed, if any are.
    pub compression: Compression,
    /// Clusters have 32 subclusters.
    pub extended_l2: bool,
    /// Others may write refcounts late.
    pub lazy_refcounts: bool,
    /// Name and format of the backing file, as they are to be in the image.
    pub backing: Option<(String, String)>,
}

impl CreateOptions {
    /// The usual: version 3, clusters of 64 KiB, refcounts of 16 bits.
    pub fn new(size_bytes: u64) -> CreateOptions {
        CreateOptions {
            size_bytes,
            cluster_bytes: 64 << 10,
            version: 3,
            refcount_bits: 16,
            compression: Compression::Zlib,
            extended_l2: false,
            lazy_refcounts: false,
            backing: None,
        }
    }

    fn check(&self) -> Result<(), DiskError> {
        let bad = |text: String| Err(DiskError::Unsupported(text));
        let min = if self.extended_l2 { 16 << 10 } else { 512 };
        if !self.cluster_bytes.is_power_of_two() || !(min..=2 << 20).contains(&self.cluster_bytes) {
            return bad(format!(
                "clusters of {} bytes are not possible; expected a power of two from {min} to \
                 2097152",
                self.cluster_bytes
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return bad(format!(
                "refcounts of {} bits are not possible; expected 1, 2, 4, 8, 16, 32 or 64",
                self.refcount_bits
            ));
        }
        if !matches!(self.version, 2 | 3) {
            return bad(format!("there is no qcow2 version {}", self.version));
        }
        if self.version == 2
            && (self.refcount_bits != 16
                || self.extended_l2
                || self.lazy_refcounts
                || self.compression != Compression::Zlib)
        {
            return bad(
                "version 2 has only refcounts of 16 bits, zlib, and no extended L2 entries or \
                 lazy refcounts; use version 3"
                    .into(),
            );
        }
        if !self.size_bytes.is_multiple_of(512) || self.size_bytes >= 1 << 63 {
            return bad(format!(
                "the size is {} bytes; expected a multiple of 512",
                self.size_bytes
            ));
        }
        Ok(())
    }
}

/// Makes an empty image in `storage`, which must be empty.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<(), DiskError> {
    options.check()?;
    let v3 = options.version == 3;
    let flag = |set: bool, bit: u64| if set { bit } else { 0 };
    let cluster = options.cluster_bytes;
    let mut header = Header {
        version: options.version,
        cluster_bits: cluster.trailing_zeros(),
        size_bytes: options.size_bytes,
        l1_entries: 0,
        l1_offset: 0,
        reftable_offset: 0,
        reftable_clusters: 0,
        snapshots: 0,
        snapshots_offset: 0,
        incompat: flag(
            options.compression == Compression::Zstd,
            INCOMPAT_COMPRESSION,
        ) | flag(options.extended_l2, INCOMPAT_EXTENDED_L2),
        compat: flag(v3 && options.lazy_refcounts, COMPAT_LAZY_REFCOUNTS),
        autoclear: 0,
        refcount_order: options.refcount_bits.trailing_zeros(),
        compression: options.compression,
        backing: options.backing.as_ref().map(|(name, _)| name.clone()),
        backing_format: options.backing.as_ref().map(|(_, format)| format.clone()),
        bitmaps: None,
    };
    let l1_entries = header.l1_needed(options.size_bytes).max(1);
    if l1_entries * 8 > MAX_L1_BYTES {
        return Err(DiskError::Unsupported(format!(
            "a disk of {} bytes is too large for clusters of {cluster} bytes; use larger ones",
            options.size_bytes
        )));
    }
    // Header, refcount table, refcount blocks, L1 table.
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let per_block = (8 * cluster) >> header.refcount_order;
    let (mut table, mut blocks) = (1, 1);
    loop {
        let used = 1 + table + blocks + l1_clusters;
        let needed_blocks = used.div_ceil(per_block);
        let needed_table = (needed_blocks * 8).div_ceil(cluster);
        if needed_blocks <= blocks && needed_table <= table {
            break;
        }
        blocks = blocks.max(needed_blocks);
        table = table.max(needed_table);
    }
    let used = 1 + table + blocks + l1_clusters;
    header.reftable_offset = cluster;
    header.reftable_clusters = table as u32;
    header.l1_offset = (1 + table + blocks) * cluster;
    header.l1_entries = l1_entries as u32;
    let first = header.encode()?;
    storage.set_len(used * cluster).map_err(host)?;
    let mut bytes = vec![0; (table * cluster) as usize];
    for n in 0..blocks {
        let at = (1 + table + n) * cluster;
        put(&mut bytes, n as usize * 8, &at.to_be_bytes());
        let mut block = vec![0; cluster as usize];
        for index in 0..per_block.min(used.saturating_sub(n * per_block)) {
            refcount::encode(&mut block, index, header.refcount_order, 1);
        }
        storage.write_at(at, &block).map_err(host)?;
    }
    storage.write_at(cluster, &bytes).map_err(host)?;
    let l1 = vec![0; (l1_clusters * cluster) as usize];
    storage.write_at(header.l1_offset, &l1).map_err(host)?;
    storage.sync().map_err(host)?;
    storage.write_at(0, &first).map_err(host)?;
    storage.sync().map_err(host)
}
