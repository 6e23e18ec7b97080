//! The software engine: runs x86 guests on an x86 host without hardware virtualisation.
//!
//! # Parts
//!
//! - [`frame`]: the memory of one vCPU that translated code addresses by constant offsets:
//!   `CpuState`, soft TLBs, exit request.
//! - [`mmu`]: linear → guest-physical → host, the soft TLB's slow path, code-page bookkeeping.
//! - [`interp`]: the complete interpreter, reference for everything. Computation (SSE, AVX, x87 …)
//!   runs on the host's own units, one instruction at a time.
//! - [`sys`]: what makes it a machine: segmentation, exceptions and interrupts, task switches, far
//!   transfers, control/debug/model-specific registers, CPUID, XSAVE.
//! - [`apic`]: local APICs, IPIs, timers.
//! - [`xlate`]: the translator, a cache of the interpreter.
//! - [`debug`]: a debugger outside the guest.
//! - [`vcpu`], [`vm`]: the run loop and what vCPUs share.
//!
//! # Threads
//!
//! One host thread per vCPU owns its `SoftVcpu`. Others reach it only through [`vm::VcpuShared`]:
//! atomic event flags, an exit request that translated code polls, and the APIC's own lock.

pub mod apic;
pub mod debug;
pub mod direct;
pub mod exception;
pub mod frame;
pub mod interp;
pub mod kvmclock;
pub mod mmu;
pub mod signals;
pub mod sys;
pub mod vcpu;
pub mod vm;
pub mod xlate;

pub use exception::{Exception, Trap};
pub use frame::Frame;
pub use vcpu::SoftVcpu;
pub use vm::{DirectPolicy, SoftOptions, SoftVm};
