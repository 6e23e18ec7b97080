//! Places that were met once.
//!
//! A boot runs most of its code once. Translating costs several times what interpreting does, so a
//! block is translated when it is met again. What is remembered is a hash in a table that newer
//! places overwrite: a mistake costs time, never correctness.

use std::hash::{BuildHasher, BuildHasherDefault};

use super::cache::{AddrHasher, BlockKey, Cache};

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
        if self.met.is_empty()
            || variant
            || cache.find(key).is_some()
            || cache.movable(key).is_some()
        {
            return true;
        }
        let hash = BuildHasherDefault::<AddrHasher>::default().hash_one(key);
        let tag = (hash >> 32) as u32 | 1;
        let met = &mut self.met[hash as usize & (PLACES - 1)];
        let ripe = *met == tag;
        if note {
            *met = tag;
        }
        ripe
    }
}
