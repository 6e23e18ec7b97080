//! The interpreter.

use pyrite_engine::EngineError;

use crate::exception::Trap;
use crate::vcpu::SoftVcpu;

/// The interpreter's caches.
pub struct Interp {}

impl Interp {
    /// Empty caches.
    pub fn new() -> Result<Interp, EngineError> {
        Ok(Interp {})
    }
    /// True if the guest's CPUID advertises the instruction.
    pub fn allows(&self, i: &iced_x86::Instruction) -> bool {
        let _ = i;
        true
    }
}

/// Executes one instruction at CS:RIP and delivers the exception it raises, if any.
pub fn step(v: &mut SoftVcpu) -> Result<(), Trap> {
    let _ = v;
    Ok(())
}
