//! Entries of L2 tables. qcow2 specification, "Cluster mapping" and "Extended L2 Entries".

/// The refcount of what is referred to is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Host offsets in L1 and standard L2 entries.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster with extended L2 entries.
pub(crate) const SUBCLUSTERS: u32 = 32;

/// Properties that decide what an entry means.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) cluster_bits: u32,
    pub(crate) extended: bool,
    /// Version 3: there are zero clusters.
    pub(crate) zero_flag: bool,
}

impl Layout {
    pub(crate) fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the unit that is data, zero or absent.
    pub(crate) fn sub_bytes(self) -> u64 {
        if self.extended {
            self.cluster_bytes() / u64::from(SUBCLUSTERS)
        } else {
            self.cluster_bytes()
        }
    }

    /// Subclusters of a cluster.
    pub(crate) fn subs(self) -> u32 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }
}

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sub {
    /// The backing file decides.
    Absent,
    /// Zeroes.
    Zero,
    /// At its place in the host cluster.
    Data,
    /// Part of the compressed cluster.
    Compressed,
    /// The entry contradicts itself.
    Invalid,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    pub(crate) raw: u64,
    /// Of extended entries: allocation in the low half, zeroes in the high half.
    pub(crate) bitmap: u64,
}

impl Entry {
    /// A data cluster that nothing else refers to.
    pub(crate) fn data(host: u64) -> Entry {
        Entry {
            raw: host | COPIED,
            bitmap: 0xffff_ffff,
        }
    }

    /// Zeroes, with or without a host cluster (0).
    pub(crate) fn zero(host: u64, layout: Layout) -> Entry {
        let copied = if host == 0 { 0 } else { COPIED };
        if layout.extended {
            Entry {
                raw: host | copied,
                bitmap: 0xffff_ffff << 32,
            }
        } else {
            Entry {
                raw: host | copied | ZERO,
                bitmap: 0,
            }
        }
    }

    /// `bytes` of compressed data at `host`.
    pub(crate) fn compressed(host: u64, bytes: u64, layout: Layout) -> Entry {
        let shift = 62 - (layout.cluster_bits - 8);
        // The number of sectors beyond the one in which it begins.
        let sectors = (host + bytes - 1) / 512 - host / 512;
        Entry {
            raw: COMPRESSED | sectors << shift | host,
            bitmap: 0,
        }
    }

    pub(crate) fn is_compressed(self) -> bool {
        self.raw & COMPRESSED != 0
    }

    pub(crate) fn copied(self) -> bool {
        self.raw & COPIED != 0 && !self.is_compressed()
    }

    /// The host cluster of an entry that is not compressed.
    pub(crate) fn host(self) -> Option<u64> {
        if self.is_compressed() {
            return None;
        }
        Some(self.raw & OFFSET_MASK).filter(|o| *o != 0)
    }

    /// Where compressed data is: offset, and the most bytes it can have.
    pub(crate) fn compressed_at(self, layout: Layout) -> Option<(u64, u64)> {
        if !self.is_compressed() {
            return None;
        }
        let shift = 62 - (layout.cluster_bits - 8);
        let host = self.raw & ((1 << shift) - 1);
        let sectors = (self.raw & !(COPIED | COMPRESSED)) >> shift;
        Some((host, (sectors + 1) * 512 - (host & 511)))
    }

    pub(crate) fn sub(self, index: u32, layout: Layout) -> Sub {
        if self.is_compressed() {
            return Sub::Compressed;
        }
        let host = self.host().is_some();
        if !layout.extended {
            return match (layout.zero_flag && self.raw & ZERO != 0, host) {
                (true, _) => Sub::Zero,
                (false, true) => Sub::Data,
                (false, false) => Sub::Absent,
            };
        }
        match (
            self.bitmap >> index & 1 != 0,
            self.bitmap >> (32 + index) & 1 != 0,
        ) {
            (true, true) => Sub::Invalid,
            (true, false) if host => Sub::Data,
            (true, false) => Sub::Invalid,
            (false, true) => Sub::Zero,
            (false, false) => Sub::Absent,
        }
    }

    /// Marks subclusters `from..to` of an extended entry.
    pub(crate) fn mark(&mut self, from: u32, to: u32, sub: Sub) {
        for index in from..to {
            let (data, zero) = (1u64 << index, 1u64 << (32 + index));
            self.bitmap &= !(data | zero);
            match sub {
                Sub::Data => self.bitmap |= data,
                Sub::Zero => self.bitmap |= zero,
                _ => {}
            }
        }
    }

    /// No subcluster of an extended entry is data.
    pub(crate) fn no_data(self) -> bool {
        self.bitmap & 0xffff_ffff == 0
    }
}
