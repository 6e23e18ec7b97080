//! The VM process: a machine assembled from a specification, its boot image, and its life.
//!
//! - [`board`]: the guest-visible layout.
//! - [`boot`]: what is in memory and registers when the guest begins.
//! - [`firmware`]: what a machine starts with that boots no kernel directly.
//! - [`inputs`]: looks at the files of a specification before anything starts.
//! - [`display`]: the screen and input for people and programs outside.
//! - [`engines`]: which engine, and what CPUID says.
//! - [`output`]: files that take what the guest writes to serial ports.
//! - [`machine`]: memory, chipset, devices and engine, put together.
//! - [`run`]: the state driver, the only place that changes what the VM does.
//! - [`snapshot`]: a stopped machine as a directory.
//! - [`process`]: the entry of the VM process.
//!
//! # Threads
//!
//! The state driver (the process's first thread), one thread per vCPU (`vcpu0` …), `timers`,
//! `control`, `console-in`, `console-out`, `input`, `vnc` and two for each
//! of its clients, `channel-in` and `channel-out` for each channel, on KVM one per virtio device that waits for its doorbells
//! (`bell-blk0` …), and those of back ends. Everything that changes the
//! state of the VM goes through the driver's queue.
#![deny(unsafe_code)]

pub mod board;
pub mod boot;
pub mod display;
pub mod engines;
pub mod firmware;
mod footprint;
pub mod inputs;
pub mod machine;
pub mod output;
pub mod process;
pub mod run;
pub mod snapshot;
mod socket;
