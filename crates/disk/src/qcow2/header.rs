//! The header and its extensions. qcow2 specification, "General" and "Header extensions".

use crate::DiskError;
use crate::bytes::{be32, be64, put};

pub(crate) const MAGIC: u32 = 0x5146_49fb;

/// Incompatible features: whoever does not know one must not open the image.
pub(crate) const INCOMPAT_DIRTY: u64 = 1 << 0;
pub(crate) const INCOMPAT_CORRUPT: u64 = 1 << 1;
pub(crate) const INCOMPAT_DATA_FILE: u64 = 1 << 2;
pub(crate) const INCOMPAT_COMPRESSION: u64 = 1 << 3;
pub(crate) const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
const INCOMPAT_KNOWN: u64 =
    INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;
pub(crate) const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear features: whoever writes without knowing one clears it.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

pub(crate) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;

/// LIMIT: bytes of the name of the backing file; the specification's.
const MAX_BACKING_NAME: u64 = 1023;
/// LIMIT: bytes of the active L1 table (32 MiB, as QEMU): 256 TiB with clusters of 64 KiB.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// LIMIT: bytes of the refcount table (8 MiB, as QEMU).
pub(crate) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// LIMIT: internal snapshots, as QEMU.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// Bytes of the file that the header can take up: the first cluster.
pub(crate) const MAX_HEADER_BYTES: usize = 64 << 10;
/// Offsets in tables have 56 bits.
pub(crate) const MAX_OFFSET: u64 = 1 << 56;

/// Byte offsets of the header's fields that are changed one by one.
pub(crate) mod field {
    pub(crate) const SIZE: u64 = 24;
    pub(crate) const REFTABLE: u64 = 48;
    pub(crate) const SNAPSHOTS: u64 = 60;
    pub(crate) const INCOMPAT: u64 = 72;
    pub(crate) const AUTOCLEAR: u64 = 88;
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Deflate without a header, window of 4 KiB.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapsExt {
    pub(crate) count: u32,
    pub(crate) directory_bytes: u64,
    pub(crate) directory_offset: u64,
}

/// The header.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size_bytes: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompat: u64,
    pub(crate) compat: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) bitmaps: Option<BitmapsExt>,
}

fn corrupt<T>(text: impl Into<String>) -> Result<T, DiskError> {
    Err(DiskError::Corrupt(format!(
        "damaged qcow2 image: {}",
        text.into()
    )))
}

fn unsupported<T>(text: impl Into<String>) -> Result<T, DiskError> {
    Err(DiskError::Unsupported(text.into()))
}

impl Header {
    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn extended_l2(&self) -> bool {
        self.incompat & INCOMPAT_EXTENDED_L2 != 0
    }

    /// Bytes of an entry of an L2 table.
    pub(crate) fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / self.l2_entry_bytes()
    }

    /// Bytes of the disk that one L2 table describes.
    pub(crate) fn l2_covers(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Entries that the L1 table needs for a disk of this size.
    pub(crate) fn l1_needed(&self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.l2_covers())
    }

    /// Reads a header from the first bytes of a file of `file_bytes`.
    pub(crate) fn parse(b: &[u8], file_bytes: u64) -> Result<Header, DiskError> {
        if b.len() < 72 || be32(b, 0) != MAGIC {
            return corrupt("it does not begin as one; expected a qcow2 image");
        }
        let version = be32(b, 4);
        if !matches!(version, 2 | 3) {
            return unsupported(format!(
                "qcow2 version {version} is not supported; expected 2 or 3"
            ));
        }
        let cluster_bits = be32(b, 20);
        if !(9..=21).contains(&cluster_bits) {
            return corrupt(format!("cluster_bits is {cluster_bits}, not 9 to 21"));
        }
        let v3 = version == 3;
        let header_bytes = if v3 { u64::from(be32(b, 100)) } else { 72 };
        let cluster = 1u64 << cluster_bits;
        if v3 && (header_bytes < 104 || !header_bytes.is_multiple_of(8) || header_bytes > cluster) {
            return corrupt(format!("the header has {header_bytes} bytes"));
        }
        let if3 = |value: u64| if v3 { value } else { 0 };
        let incompat = if3(be64(b, 72));
        let (compat, autoclear) = (if3(be64(b, 80)), if3(be64(b, 88)));
        let refcount_order = if v3 { be32(b, 96) } else { 4 };
        let h = Header {
            version,
            cluster_bits,
            size_bytes: be64(b, 24),
            l1_entries: be32(b, 36),
            l1_offset: be64(b, 40),
            reftable_offset: be64(b, 48),
            reftable_clusters: be32(b, 56),
            snapshots: be32(b, 60),
            snapshots_offset: be64(b, 64),
            incompat,
            compat,
            autoclear,
            refcount_order,
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            bitmaps: None,
        };
        if be32(b, 32) != 0 {
            return unsupported(
                "encrypted qcow2 images are not supported; decrypt it first (qemu-img convert)",
            );
        }
        if incompat & INCOMPAT_DATA_FILE != 0 {
            return unsupported(
                "qcow2 images with an external data file are not supported; convert it first \
                 (qemu-img convert)",
            );
        }
        if incompat & !INCOMPAT_KNOWN != 0 {
            return unsupported(format!(
                "the qcow2 image uses unknown features (bits {:#x}); it needs a newer version",
                incompat & !INCOMPAT_KNOWN
            ));
        }
        h.check(file_bytes)?;
        let mut h = h;
        h.compression = match (
            incompat & INCOMPAT_COMPRESSION != 0,
            if header_bytes > 104 { b.get(104) } else { None },
        ) {
            (false, None | Some(0)) => Compression::Zlib,
            (true, Some(1)) => Compression::Zstd,
            (true, Some(0)) | (_, None) => return corrupt("the compression type is contradictory"),
            (_, Some(n)) => return unsupported(format!("qcow2 compression type {n} is unknown")),
        };
        h.backing = Header::parse_backing(b, cluster)?;
        h.parse_extensions(b, header_bytes as usize, cluster)?;
        Ok(h)
    }

    /// Sizes and places of the tables.
    fn check(&self, file_bytes: u64) -> Result<(), DiskError> {
        let cluster = self.cluster_bytes();
        if self.extended_l2() && self.cluster_bits < 14 {
            return corrupt("extended L2 entries need clusters of at least 16 KiB");
        }
        if self.refcount_order > 6 {
            return corrupt(format!("refcount_order is {}", self.refcount_order));
        }
        if !self.size_bytes.is_multiple_of(512) || self.size_bytes >= 1 << 63 {
            return unsupported(format!(
                "the disk has {} bytes; only multiples of 512 below 2^63 are supported",
                self.size_bytes
            ));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES || u64::from(self.l1_entries) < self.l1_needed(self.size_bytes) {
            return corrupt(format!(
                "an L1 table of {} entries does not fit a disk of {} bytes",
                self.l1_entries, self.size_bytes
            ));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) * cluster;
        if reftable_bytes == 0 || reftable_bytes > MAX_REFTABLE_BYTES.max(cluster) {
            return corrupt(format!("the refcount table has {reftable_bytes} bytes"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return corrupt(format!("{} snapshots", self.snapshots));
        }
        let snapshots = if self.snapshots == 0 {
            0
        } else {
            self.snapshots_offset
        };
        for (what, offset, bytes) in [
            ("L1 table", self.l1_offset, l1_bytes),
            ("refcount table", self.reftable_offset, reftable_bytes),
            ("snapshot table", snapshots, u64::from(self.snapshots) * 40),
        ] {
            if bytes == 0 {
                continue;
            }
            let inside = offset
                .checked_add(bytes)
                .is_some_and(|end| end <= file_bytes.next_multiple_of(cluster));
            if !inside {
                return corrupt(format!(
                    "the {what} ({bytes} bytes at {offset:#x}) lies beyond the end of the file \
                     ({file_bytes} bytes); the file is cut off"
                ));
            }
            if offset == 0 || !offset.is_multiple_of(cluster) {
                return corrupt(format!("the {what} is at {offset:#x}"));
            }
        }
        Ok(())
    }

    fn parse_backing(b: &[u8], cluster: u64) -> Result<Option<String>, DiskError> {
        let (offset, len) = (be64(b, 8), u64::from(be32(b, 16)));
        if offset == 0 || len == 0 {
            return Ok(None);
        }
        let end = offset.saturating_add(len);
        if len > MAX_BACKING_NAME || end > cluster {
            return corrupt("the name of the backing file is not in the first cluster");
        }
        match b.get(offset as usize..end as usize).map(str::from_utf8) {
            Some(Ok(name)) if !name.contains('\0') => Ok(Some(name.to_owned())),
            _ => corrupt("the name of the backing file is not text"),
        }
    }

    fn parse_extensions(&mut self, b: &[u8], start: usize, cluster: u64) -> Result<(), DiskError> {
        let mut at = start;
        // The name of the backing file, if there is one, ends the extensions.
        let end = match be64(b, 8) {
            0 => cluster as usize,
            offset => offset as usize,
        }
        .min(b.len());
        while at + 8 <= end {
            let (kind, len) = (be32(b, at), be32(b, at + 4) as usize);
            if kind == 0 {
                break;
            }
            let Some(data) = b.get(at + 8..(at + 8).saturating_add(len).min(end)) else {
                return corrupt("a header extension is too long");
            };
            if data.len() < len {
                return corrupt(format!("the header extension {kind:#x} is too long"));
            }
            match kind {
                EXT_BACKING_FORMAT => match str::from_utf8(data) {
                    Ok(name) if len < 16 => self.backing_format = Some(name.to_owned()),
                    _ => return corrupt("the format of the backing file is not text"),
                },
                EXT_BITMAPS if len >= 24 => {
                    self.bitmaps = Some(BitmapsExt {
                        count: be32(data, 0),
                        directory_bytes: be64(data, 8),
                        directory_offset: be64(data, 16),
                    });
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    /// The first bytes of a new image, at most a cluster.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, DiskError> {
        let header_bytes = if self.version == 3 { 112 } else { 72 };
        let mut b = vec![0; header_bytes];
        put(&mut b, 0, &MAGIC.to_be_bytes());
        put(&mut b, 4, &self.version.to_be_bytes());
        put(&mut b, 20, &self.cluster_bits.to_be_bytes());
        put(&mut b, 24, &self.size_bytes.to_be_bytes());
        put(&mut b, 36, &self.l1_entries.to_be_bytes());
        put(&mut b, 40, &self.l1_offset.to_be_bytes());
        put(&mut b, 48, &self.reftable_offset.to_be_bytes());
        put(&mut b, 56, &self.reftable_clusters.to_be_bytes());
        if self.version == 3 {
            put(&mut b, 72, &self.incompat.to_be_bytes());
            put(&mut b, 80, &self.compat.to_be_bytes());
            put(&mut b, 96, &self.refcount_order.to_be_bytes());
            put(&mut b, 100, &(header_bytes as u32).to_be_bytes());
            put(
                &mut b,
                104,
                &[u8::from(self.compression == Compression::Zstd)],
            );
        }
        let mut extension = |kind: u32, data: &[u8]| {
            b.extend_from_slice(&kind.to_be_bytes());
            b.extend_from_slice(&(data.len() as u32).to_be_bytes());
            b.extend_from_slice(data);
            b.resize(b.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extension(EXT_BACKING_FORMAT, format.as_bytes());
        }
        if self.version == 3 && self.cluster_bits > 9 {
            extension(EXT_FEATURE_NAMES, &feature_names());
        }
        extension(0, &[]);
        if let Some(name) = &self.backing {
            if name.len() as u64 > MAX_BACKING_NAME
                || (b.len() + name.len()) as u64 > self.cluster_bytes()
            {
                return unsupported("the name of the backing file is too long for the header");
            }
            let at = b.len() as u64;
            put(&mut b, 8, &at.to_be_bytes());
            put(&mut b, 16, &(name.len() as u32).to_be_bytes());
            b.extend_from_slice(name.as_bytes());
        }
        Ok(b)
    }
}

/// The feature name table, so that others can say what they lack.
fn feature_names() -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, bit, name) in [
        (0u8, 0u8, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ] {
        let mut entry = [0; 48];
        put(&mut entry, 0, &[kind, bit]);
        put(&mut entry, 2, name.as_bytes());
        out.extend_from_slice(&entry);
    }
    out
}
