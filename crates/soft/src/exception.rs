//! Exceptions on their way from the place that finds them to the place that delivers them.

use pyrite_engine::StopReason;
use pyrite_x86::bits::vector;

/// An exception found while executing an instruction. RIP still points at that instruction for
/// faults; the deliverer knows which vectors are traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0-31.
    pub vector: u8,
    /// Error code for the vectors that push one.
    pub error_code: Option<u32>,
    /// CR2 for #PF, the DR6 bits to set for #DB, else 0.
    pub payload: u64,
}

impl Exception {
    /// An exception without error code.
    pub const fn plain(vector: u8) -> Exception {
        Exception {
            vector,
            error_code: None,
            payload: 0,
        }
    }
    /// #UD.
    pub const UD: Exception = Exception::plain(vector::UD);
    /// #NM.
    pub const NM: Exception = Exception::plain(vector::NM);
    /// #DE.
    pub const DE: Exception = Exception::plain(vector::DE);
    /// #MF.
    pub const MF: Exception = Exception::plain(vector::MF);
    /// #XM.
    pub const XM: Exception = Exception::plain(vector::XM);
    /// #GP with an error code (0 or a selector index).
    pub const fn gp(code: u32) -> Exception {
        Exception {
            vector: vector::GP,
            error_code: Some(code),
            payload: 0,
        }
    }
    /// #SS with an error code.
    pub const fn ss(code: u32) -> Exception {
        Exception {
            vector: vector::SS,
            error_code: Some(code),
            payload: 0,
        }
    }
    /// #NP with an error code.
    pub const fn np(code: u32) -> Exception {
        Exception {
            vector: vector::NP,
            error_code: Some(code),
            payload: 0,
        }
    }
    /// #TS with an error code.
    pub const fn ts(code: u32) -> Exception {
        Exception {
            vector: vector::TS,
            error_code: Some(code),
            payload: 0,
        }
    }
    /// #AC.
    pub const AC: Exception = Exception {
        vector: vector::AC,
        error_code: Some(0),
        payload: 0,
    };
    /// #PF at `cr2`.
    pub const fn pf(cr2: u64, code: u32) -> Exception {
        Exception {
            vector: vector::PF,
            error_code: Some(code),
            payload: cr2,
        }
    }
    /// #DB with the DR6 bits that tell why.
    pub const fn db(dr6: u64) -> Exception {
        Exception {
            vector: vector::DB,
            error_code: None,
            payload: dr6,
        }
    }
}

/// What ends an instruction other than going on to the next.
#[derive(Debug)]
pub enum Trap {
    /// Deliver this to the guest.
    Exception(Exception),
    /// The vCPU cannot go on.
    Stop(StopReason),
}

impl From<Exception> for Trap {
    fn from(e: Exception) -> Trap {
        Trap::Exception(e)
    }
}
