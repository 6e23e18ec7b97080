//! Debug registers, single step, breakpoints. Intel SDM Vol. 3B chapter 17.

use pyrite_x86::CpuState;

/// DR6 bits B0-B3 of the enabled data breakpoints that an access of `len` bytes at `lin` hits.
pub fn data_breakpoints(cpu: &CpuState, lin: u64, len: usize, write: bool) -> u64 {
    let _ = (cpu, lin, len, write);
    0
}
