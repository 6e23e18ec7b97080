//! Copies of pages of code in which instructions are replaced ([`super::scan`]).
//!
//! A copy is a translation of the page: the page is marked as such ([`crate::xlate`]), so that whoever
//! writes to it makes all vCPUs drop what was made from it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use pyrite_mem::PAGE_SIZE;

use super::process;
use super::scan::UD2;
use crate::vcpu::SoftVcpu;
use crate::vm::lock;
use crate::xlate;

/// LIMIT: copies that are ever made. A place is not used again, because a vCPU may be on its way out of
/// an old copy.
const COPIES_MAX: u64 = 8192;

/// The copies of a VM, which its processes map.
#[derive(Default)]
pub struct Patched(Mutex<State>);

#[derive(Default)]
struct State {
    /// Made when a process wants it.
    file: Option<File>,
    used: u64,
    /// Offset of the copy in the file, by the page's offset in RAM.
    copies: HashMap<u64, u64>,
}

impl Patched {
    /// The file of the copies.
    pub fn file(&self) -> Result<File> {
        let mut s = lock(&self.0);
        if s.file.is_none() {
            s.file = Some(File::from(process::memfd(c"pyrite-patched")?));
        }
        match &s.file {
            Some(f) => f.try_clone(),
            None => Err(std::io::ErrorKind::NotFound.into()),
        }
    }

    /// Offset in the file of the copy of the page at `off` in RAM.
    pub fn find(&self, off: u64) -> Option<u64> {
        lock(&self.0).copies.get(&off).copied()
    }

    /// The page at `off` in RAM was written, or is to be.
    pub fn forget(&self, off: u64) {
        lock(&self.0).copies.remove(&off);
    }

    /// Makes the copy. `page`: what the places were found in. `None`: there is no room, or the page has
    /// changed.
    pub fn make(&self, v: &SoftVcpu, off: u64, page: &[u8], places: &[u16]) -> Option<u64> {
        if let Some(at) = self.find(off) {
            return Some(at);
        }
        // Mark first, read second: a store that came before is seen, a later one sees the mark.
        xlate::claim_page(v, off)?;
        let gpa = v.vm.memory.gpa_of_offset(off)?;
        let mut copy = [0; PAGE_SIZE as usize];
        v.vm.memory.read(gpa, &mut copy).ok()?;
        if copy != page {
            return None;
        }
        for place in places {
            let at = usize::from(*place);
            copy.get_mut(at..at + UD2.len())?.copy_from_slice(&UD2);
        }
        let mut s = lock(&self.0);
        if s.used >= COPIES_MAX {
            return None;
        }
        let at = s.used * PAGE_SIZE;
        s.file.as_ref()?.write_all_at(&copy, at).ok()?;
        s.used += 1;
        s.copies.insert(off, at);
        Some(at)
    }
}
