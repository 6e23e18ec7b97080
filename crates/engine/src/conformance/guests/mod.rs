//! The micro-guests, by subject.

mod apic;
mod io;
mod paging;
mod real;
mod rom;
mod segments;
mod smc;
mod smp;
mod system;

use super::Guest;

/// All guests, in the order they run.
pub(super) fn all() -> Vec<&'static Guest> {
    [
        real::GUESTS,
        io::GUESTS,
        paging::GUESTS,
        segments::GUESTS,
        system::GUESTS,
        apic::GUESTS,
        smc::GUESTS,
        smp::GUESTS,
        rom::GUESTS,
    ]
    .into_iter()
    .flatten()
    .collect()
}
