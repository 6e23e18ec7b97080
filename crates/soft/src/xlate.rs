//! The translator.

use pyrite_engine::EngineError;

use crate::exception::Trap;
use crate::vcpu::{FrameRef, SoftVcpu};
use crate::vm::VmShared;

/// Scratch space of emitted code.
#[repr(C)]
pub struct FrameArea {
    scratch: [u64; 8],
}

/// The translator of one vCPU.
pub struct Translator {}

impl Translator {
    /// Empty.
    pub fn new(vm: &VmShared, frame: &mut FrameRef) -> Result<Translator, EngineError> {
        let _ = (vm, frame);
        Ok(Translator {})
    }
}

/// True if the current mode is one that the translator handles.
pub fn can_run(v: &SoftVcpu) -> bool {
    let _ = v;
    false
}

/// Runs translated code until something needs the run loop.
pub fn run(v: &mut SoftVcpu) -> Result<(), Trap> {
    crate::interp::step(v)
}

/// Signal handlers for the calling thread.
pub fn prepare_thread() {}

/// Forgets targets of indirect jumps.
pub fn forget_jumps(v: &mut SoftVcpu) {
    let _ = v;
}

/// True if a translation was made from any of these bytes of RAM.
pub fn covers(vm: &VmShared, ram_offset: u64, len: usize) -> bool {
    let _ = (vm, ram_offset, len);
    false
}

/// Tells all vCPUs to drop the translations of a page. Inside an exclusive section.
pub fn drop_page(vm: &VmShared, ram_offset: u64) {
    let _ = (vm, ram_offset);
}

/// Drops this vCPU's translations of some guest-physical pages (`None` = all).
pub fn drop_stale(v: &mut SoftVcpu, pages: Option<Vec<u64>>) {
    let _ = (v, pages);
}

/// Drops all translations of this vCPU.
pub fn drop_everything(v: &mut SoftVcpu) {
    let _ = v;
}
