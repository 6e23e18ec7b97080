//! Debug registers, single step, breakpoints. Intel SDM Vol. 3B chapter 17.

use pyrite_x86::CpuState;

/// DR6 bits B0-B3 of the enabled data breakpoints that an access of `len` bytes at `lin` hits.
pub fn data_breakpoints(cpu: &CpuState, lin: u64, len: usize, write: bool) -> u64 {
    let _ = (cpu, lin, len, write);
    0
}

/// Instruction breakpoints at CS:RIP (#DB before the instruction). Called when DR7 enables any
/// breakpoint and RF is clear.
pub fn before_instruction(
    v: &mut crate::vcpu::SoftVcpu,
) -> Result<(), crate::exception::Exception> {
    let _ = v;
    Ok(())
}
