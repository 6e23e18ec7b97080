//! Placeholder.
use crate::conformance::Guest;
pub(super) const GUESTS: &[Guest] = &[];
