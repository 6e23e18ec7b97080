//! Vector, x87 and other computation on the host's own units.
use crate::exception::Exception;
use crate::interp::Op;
use crate::vcpu::SoftVcpu;
use iced_x86::Instruction;
use pyrite_engine::EngineError;
/// Prepared host instructions.
pub struct Native {}
impl Native {
    /// Empty.
    pub fn new() -> Result<Native, EngineError> {
        Ok(Native {})
    }
}
/// Prepares.
pub fn prepare(_v: &mut SoftVcpu, _op: &mut Op, _bytes: u128) -> Result<(), Exception> {
    Ok(())
}
/// Announced.
pub fn announced(_v: &SoftVcpu, _i: &Instruction) -> bool {
    true
}
