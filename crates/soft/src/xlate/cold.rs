//! Places that were met once.
//!
//! A boot runs most of its code once. Translating costs several times what interpreting does, so a
//! block is translated when it is met again. What is remembered is a hash in a table that newer
//! places overwrite: a mistake costs time, never correctness.

use std::hash::{BuildHasher, BuildHasherDefault};

use super::cache::{AddrHasher, BlockKey, Cache};
use super::front::INSNS_MAX;
use super::{INSN_BYTES_MAX, run_loop_wanted};
use crate::exception::Trap;
use crate::interp;
use crate::vcpu::SoftVcpu;

/// Entries of the table.
const PLACES: usize = 1 << 17;

/// The places that were met last.
pub struct ColdPlaces {
    /// Hashes of keys; empty if nothing is to be remembered.
    met: Box<[u32]>,
}

impl ColdPlaces {
    /// None yet; `at_once`: none ever.
    pub fn new(at_once: bool) -> ColdPlaces {
        let len = if at_once { 0 } else { PLACES };
        ColdPlaces {
            met: vec![0; len].into_boxed_slice(),
        }
    }

    /// True if the block of a key is translated, can be copied, is a variant of one, or was met before. `note`: it is met
    /// now.
    pub fn is_ripe(&mut self, cache: &Cache, key: &BlockKey, note: bool) -> bool {
        let variant = key.mode & super::mode::PLAIN != 0;
        if self.met.is_empty() || variant || cache.find(key).is_some() {
            return true;
        }
        let hash = BuildHasherDefault::<AddrHasher>::default().hash_one(key);
        let tag = (hash >> 32) as u32 | 1;
        let met = &mut self.met[hash as usize & (PLACES - 1)];
        if *met == tag || cache.movable(key).is_some() {
            return true;
        }
        if note {
            *met = tag;
        }
        false
    }
}

/// Interprets up to where a block would end: the next instruction that is not the one behind. True
/// when the run loop has something to do.
pub fn interpret_block(v: &mut SoftVcpu) -> Result<bool, Trap> {
    for _ in 0..INSNS_MAX {
        let rip = v.frame.cpu.rip;
        v.xlate.stats.interpreted_cold += 1;
        interp::step(v)?;
        if run_loop_wanted(v) {
            return Ok(true);
        }
        let by = v.frame.cpu.rip.wrapping_sub(rip);
        let behind = by != 0 && by <= INSN_BYTES_MAX as u64;
        if !behind || (v.frame.cpu.rip ^ rip) >> 12 != 0 {
            break;
        }
    }
    Ok(false)
}
