//! Debug registers, single step, breakpoints. Intel SDM Vol. 3B chapter 17.

use pyrite_x86::CpuState;

/// DR6 bits B0-B3 of the enabled data breakpoints that an access of `len` bytes at `lin` hits.
pub fn data_breakpoints(cpu: &CpuState, lin: u64, len: usize, write: bool) -> u64 {
    let _ = (cpu, lin, len, write);
    0
}

/// Instruction breakpoints. Call before the fetch of the instruction at CS:RIP.
pub fn before_instruction(v: &crate::SoftVcpu) -> Result<(), crate::Exception> {
    let _ = v;
    Ok(())
}

/// Debug traps of an instruction that has completed (RIP is past it).
pub fn after_instruction(
    v: &mut crate::SoftVcpu,
    tf_at_start: bool,
) -> Result<(), crate::Exception> {
    let _ = (v, tf_at_start);
    Ok(())
}
