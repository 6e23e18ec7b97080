//! Facts of the x86 architecture that both engines and the machine share: registers, control
//! bits, descriptors, page walks and the CPU state that a VM saves.
//!
//! This crate performs no I/O, holds no unsafe code and knows nothing of engines or devices.
#![forbid(unsafe_code)]

pub mod bits;
pub mod cpuid;
pub mod paging;
pub mod state;

pub use state::*;
