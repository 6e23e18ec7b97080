//! Sense data: why a command did not do what it should. SPC-4 §4.5.

use minicbor::{Decode, Encode};

use crate::DiskError;

/// A sense key with additional sense code and qualifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Sense {
    /// Sense key, 0-15.
    #[n(0)]
    pub key: u8,
    /// Additional sense code.
    #[n(1)]
    pub asc: u8,
    /// Additional sense code qualifier.
    #[n(2)]
    pub ascq: u8,
}

#[allow(missing_docs, reason = "the standard's names, SPC-4 annex D")]
impl Sense {
    pub const NONE: Sense = Sense::new(0, 0, 0);
    pub const NO_MEDIUM: Sense = Sense::new(2, 0x3a, 0);
    pub const NO_MEDIUM_TRAY_OPEN: Sense = Sense::new(2, 0x3a, 2);
    pub const READ_ERROR: Sense = Sense::new(3, 0x11, 0);
    pub const WRITE_ERROR: Sense = Sense::new(3, 0x0c, 0);
    pub const TARGET_FAILURE: Sense = Sense::new(4, 0x44, 0);
    pub const INVALID_COMMAND: Sense = Sense::new(5, 0x20, 0);
    pub const OUT_OF_RANGE: Sense = Sense::new(5, 0x21, 0);
    pub const INVALID_FIELD: Sense = Sense::new(5, 0x24, 0);
    pub const NO_SUCH_LUN: Sense = Sense::new(5, 0x25, 0);
    pub const PARAMETER_LENGTH: Sense = Sense::new(5, 0x1a, 0);
    pub const INVALID_PARAMETER: Sense = Sense::new(5, 0x26, 0);
    pub const REMOVAL_PREVENTED: Sense = Sense::new(5, 0x53, 2);
    pub const MEDIUM_CHANGED: Sense = Sense::new(6, 0x28, 0);
    pub const POWER_ON: Sense = Sense::new(6, 0x29, 0);
    pub const CAPACITY_CHANGED: Sense = Sense::new(6, 0x2a, 9);
    pub const WRITE_PROTECTED: Sense = Sense::new(7, 0x27, 0);
    pub const SPACE_EXHAUSTED: Sense = Sense::new(7, 0x27, 7);
    pub const ABORTED: Sense = Sense::new(0xb, 0, 0);
    pub const DATA_PHASE: Sense = Sense::new(0xb, 0x4b, 0);
}

impl Sense {
    /// From key, code and qualifier.
    pub const fn new(key: u8, asc: u8, ascq: u8) -> Sense {
        Sense { key, asc, ascq }
    }

    /// Fixed format, current error, 18 bytes. SPC-4 §4.5.3.
    pub fn fixed(self) -> [u8; 18] {
        let mut b = [0; 18];
        b[0] = 0x70;
        b[2] = self.key & 0xf;
        b[7] = 10;
        b[12] = self.asc;
        b[13] = self.ascq;
        b
    }

    /// Descriptor format without descriptors, 8 bytes. SPC-4 §4.5.2.
    pub fn descriptor(self) -> [u8; 8] {
        [0x72, self.key & 0xf, self.asc, self.ascq, 0, 0, 0, 0]
    }

    /// What a failed request of a back end means.
    pub fn of(error: &DiskError, writing: bool) -> Sense {
        match error {
            DiskError::OutOfRange { .. } => Sense::OUT_OF_RANGE,
            DiskError::ReadOnly => Sense::WRITE_PROTECTED,
            DiskError::NoSpace => Sense::SPACE_EXHAUSTED,
            DiskError::BadBuffer => Sense::DATA_PHASE,
            DiskError::Corrupt(_) | DiskError::Unsupported(_) => Sense::TARGET_FAILURE,
            DiskError::Io(_) if writing => Sense::WRITE_ERROR,
            DiskError::Io(_) => Sense::READ_ERROR,
        }
    }
}
