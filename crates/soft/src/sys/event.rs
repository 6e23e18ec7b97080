//! Delivery of exceptions, interrupts, INIT and start-up IPIs. Intel SDM Vol. 3A chapter 6.

use crate::exception::{Exception, Trap};
use crate::vcpu::SoftVcpu;

/// Delivers an exception to the guest: double and triple faults included. `Err` only for a stop.
pub fn exception(v: &mut SoftVcpu, e: Exception) -> Result<(), Trap> {
    let _ = (v, e);
    Ok(())
}

/// Delivers an external interrupt or NMI between two instructions.
pub fn interrupt(v: &mut SoftVcpu, vector: u8) -> Result<(), Trap> {
    let _ = (v, vector);
    Ok(())
}

/// INIT: to the reset state but for the caches, FPU and most MSRs. Intel SDM Vol. 3A table 9-1.
pub fn init(v: &mut SoftVcpu) {
    let _ = v;
}

/// Start-up IPI with `vector`: starts a waiting processor at `vector << 12` in real mode.
pub fn startup(v: &mut SoftVcpu, vector: u8) {
    let _ = (v, vector);
}
