//! The VM process: a machine assembled from a configuration, its boot image, and its life.
//!
//! - [`board`]: the guest-visible layout.
//! - [`boot`]: what is in memory and registers when the guest begins.

pub mod board;
pub mod boot;
