//! Drives, and the formats of media that they read.

use minicbor::{Decode, Encode};

use super::SECTOR_BYTES;

/// How a medium is recorded, always in sectors of 512 bytes on two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u8,
    /// Sectors of a track.
    pub sectors: u8,
    /// Data rate as CCR has it. Data sheet §2.1.8.
    pub(super) rate: u8,
    /// Steps of the head from one cylinder to the next: two where the drive's tracks are narrower
    /// than the medium's.
    pub(super) steps: u8,
}

/// Data rates, as CCR has them.
const RATE_500K: u8 = 0;
const RATE_300K: u8 = 1;
const RATE_250K: u8 = 2;
const RATE_1M: u8 = 3;

/// Sides.
pub(super) const HEADS: u8 = 2;
/// LIMIT: of all formats.
pub(super) const MAX_CYLINDERS: u8 = 80;
pub(super) const MAX_SECTORS: u8 = 36;

impl Geometry {
    const fn new(cylinders: u8, sectors: u8, rate: u8, steps: u8) -> Geometry {
        Geometry {
            cylinders,
            sectors,
            rate,
            steps,
        }
    }

    /// Bytes of the medium.
    pub const fn bytes(&self) -> u64 {
        self.cylinders as u64 * HEADS as u64 * self.sectors as u64 * SECTOR_BYTES as u64
    }
}

const M_360: Geometry = Geometry::new(40, 9, RATE_300K, 2);
const M_720: Geometry = Geometry::new(80, 9, RATE_250K, 1);
const M_1200: Geometry = Geometry::new(80, 15, RATE_500K, 1);
const M_1440: Geometry = Geometry::new(80, 18, RATE_500K, 1);
const M_2880: Geometry = Geometry::new(80, 36, RATE_1M, 1);

/// A kind of drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum DriveKind {
    /// 5¼ inches, 1.2 MB; reads 360 KB too.
    #[n(0)]
    D1200,
    /// 3½ inches, 1.44 MB; reads 720 KB too.
    #[default]
    #[n(1)]
    D1440,
    /// 3½ inches, 2.88 MB; reads 1.44 MB and 720 KB too.
    #[n(2)]
    D2880,
}

impl DriveKind {
    /// All.
    pub const ALL: [DriveKind; 3] = [DriveKind::D1440, DriveKind::D1200, DriveKind::D2880];

    /// The formats that it reads, its own first.
    pub fn formats(self) -> &'static [Geometry] {
        match self {
            DriveKind::D1200 => &[M_1200, M_360],
            DriveKind::D1440 => &[M_1440, M_720],
            DriveKind::D2880 => &[M_2880, M_1440, M_720],
        }
    }

    /// How a medium of `bytes` bytes is recorded; none if this drive cannot read it.
    pub fn format_of(self, bytes: u64) -> Option<Geometry> {
        self.formats().iter().find(|g| g.bytes() == bytes).copied()
    }

    /// The smallest drive for a medium of `bytes` bytes.
    pub fn for_medium(bytes: u64) -> Option<DriveKind> {
        Self::ALL.into_iter().find(|k| k.format_of(bytes).is_some())
    }

    /// Its own format.
    pub fn own_format(self) -> Geometry {
        self.formats().first().copied().unwrap_or(M_1440)
    }

    /// Its number in CMOS (byte 10H) and in `INT 13H`.
    pub fn bios_type(self) -> u8 {
        match self {
            DriveKind::D1200 => 2,
            DriveKind::D1440 => 4,
            DriveKind::D2880 => 5,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_find_their_drives() {
        for (kib, kind, rate, steps) in [
            (360, DriveKind::D1200, RATE_300K, 2),
            (720, DriveKind::D1440, RATE_250K, 1),
            (1200, DriveKind::D1200, RATE_500K, 1),
            (1440, DriveKind::D1440, RATE_500K, 1),
            (2880, DriveKind::D2880, RATE_1M, 1),
        ] {
            assert_eq!(DriveKind::for_medium(kib << 10), Some(kind), "{kib}");
            let g = kind.format_of(kib << 10).unwrap();
            assert_eq!((g.bytes(), g.rate, g.steps), (kib << 10, rate, steps));
            assert!(g.cylinders <= MAX_CYLINDERS && g.sectors <= MAX_SECTORS);
        }
        assert_eq!(DriveKind::for_medium((1440 << 10) + 512), None);
        assert_eq!(DriveKind::D1440.format_of(2880 << 10), None);
        assert!(DriveKind::D2880.format_of(720 << 10).is_some());
    }
}
