//! The host as the oracle for instructions. Used by the test `isa` and the example `isafuzz`.

#![allow(
    dead_code,
    clippy::too_many_arguments,
    reason = "each of the two programs uses a part"
)]

pub mod forms;
pub mod fuzz;
#[path = "gen.rs"]
pub mod gen_;
pub mod guest;
pub mod host;
pub mod machine;
pub mod rng;
