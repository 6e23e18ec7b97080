//! The system side of the processor: everything that is not plain computation on registers and
//! memory of the current segment setup.

pub mod debug;
pub mod event;
pub mod seg;

use iced_x86::{Instruction, Mnemonic};

use crate::exception::Trap;
use crate::vcpu::SoftVcpu;

/// What RIP must become after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// RIP goes on to the next instruction (the caller advances it).
    Sequential,
    /// The instruction has set RIP.
    Jumped,
}

/// True if [`execute`] implements the mnemonic; the interpreter does all others.
pub fn handles(mnemonic: Mnemonic) -> bool {
    let _ = mnemonic;
    false
}

/// Executes a system instruction. RIP still points at it.
pub fn execute(v: &mut SoftVcpu, i: &Instruction) -> Result<Next, Trap> {
    let _ = (v, i);
    Ok(Next::Sequential)
}
