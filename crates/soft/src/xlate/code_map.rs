//! What of guest memory has been translated.

use std::sync::atomic::{AtomicU64, Ordering};

use pyrite_mem::{GuestMemory, PAGE_SIZE};

use crate::vm::VmShared;

/// Which 64-byte parts of each page of RAM and ROM have been translated by any vCPU.
pub struct CodeMap(Box<[AtomicU64]>);

impl CodeMap {
    /// Nothing translated.
    pub fn new(memory: &GuestMemory) -> CodeMap {
        let pages = (memory.mapped_bytes() / PAGE_SIZE) as usize;
        CodeMap((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn page(&self, ram_offset: u64) -> Option<&AtomicU64> {
        self.0.get((ram_offset / PAGE_SIZE) as usize)
    }
}

/// Bits of the 64-byte parts that `len` bytes at page offset `at` touch.
pub(super) fn parts(at: u64, len: usize) -> u64 {
    let first = (at & (PAGE_SIZE - 1)) / 64;
    let last = ((at & (PAGE_SIZE - 1)) + len.max(1) as u64 - 1).min(PAGE_SIZE - 1) / 64;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Marks bytes of a page as translated, or looked at by a translation.
pub(super) fn mark(vm: &VmShared, page_off: u64, at: u64, len: usize) -> Option<()> {
    if len > 0 {
        let marks = vm.code_map.page(page_off)?;
        marks.fetch_or(parts(at, len), Ordering::SeqCst);
    }
    Some(())
}

/// True if a translation was made from any of these bytes of RAM.
pub fn covers(vm: &VmShared, ram_offset: u64, len: usize) -> bool {
    vm.code_map
        .page(ram_offset)
        .is_some_and(|m| m.load(Ordering::SeqCst) & parts(ram_offset, len) != 0)
}
