//! The engine interface: what runs vCPUs, seen from the machine, and the KVM implementation of it.
//!
//! An engine never sees devices, only [`CpuIo`]. The machine never sees a concrete engine, only
//! [`Vm`], [`Vcpu`] and [`EngineCaps`].
//!
//! Both engines own the local APICs (in-kernel for KVM in split mode, `pyrite-soft`'s own for the
//! software engine). PIC, IO-APIC and timers are devices of the machine; they reach the engine by
//! [`Vm::send_msi`] and [`Vm::set_pic_intr`] and are reached by [`CpuIo::ack_pic`] and
//! [`CpuIo::eoi`].

use std::os::fd::RawFd;
use std::sync::Arc;

pub mod conformance;
pub mod debug;
#[cfg(target_os = "linux")]
pub mod kvm;
#[cfg(target_os = "linux")]
pub mod probe;
pub mod saved;

pub use debug::{DebugCaps, DebugPlan, DebugStop, Watch, WatchKind};
pub use pyrite_x86 as x86;
use pyrite_x86::CpuState;
pub use pyrite_x86::cpuid::{CpuidEntry, CpuidTable};

/// How a vCPU reaches everything outside the processor. Called on vCPU threads, concurrently.
pub trait CpuIo: Send + Sync {
    /// Load from guest-physical memory that is not RAM. `data` is 1-64 bytes.
    fn mmio_read(&self, vcpu: u32, gpa: u64, data: &mut [u8]);
    /// Store.
    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8]);
    /// IN. `data` is 1, 2 or 4 bytes.
    fn pio_read(&self, vcpu: u32, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, vcpu: u32, port: u16, data: &[u8]);
    /// Interrupt acknowledge cycle to the PIC: the vector, `None` if it has nothing (any more).
    fn ack_pic(&self) -> Option<u8>;
    /// A level-triggered `vector` was ended at a local APIC: tell the IO-APICs.
    fn eoi(&self, vector: u8);
}

/// Why `Vcpu::run` came back.
#[derive(Debug)]
pub enum StopReason {
    /// `VcpuControl::stop` was called.
    Requested,
    /// Triple fault: hardware would reset the machine.
    TripleFault,
    /// Something that [`Vcpu::set_debug`] asked for.
    Debug(DebugStop),
    /// The engine cannot go on; the message says why and shows the guest's state.
    Failed(EngineError),
}

/// Something the engine could not do.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host lacks something.
    #[error("{0}")]
    Unsupported(String),
    /// A system call failed.
    #[error("{what}")]
    Os {
        /// What was tried.
        what: String,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
    /// The engine met a situation it cannot continue from.
    #[error("{0}")]
    Internal(String),
    /// A state that cannot be loaded.
    #[error("invalid CPU state: {0}")]
    BadState(String),
}

/// What an engine can do, asked instead of guessed.
#[derive(Clone, Debug)]
pub struct EngineCaps {
    /// `kvm` or `soft`.
    pub name: &'static str,
    /// Most vCPUs of a VM.
    pub max_vcpus: u32,
    /// Frequency of the guest TSC in kHz.
    pub tsc_khz: u64,
    /// What debuggers may ask for.
    pub debug: DebugCaps,
}

/// What a VM is created from.
pub struct VmConfig {
    /// Its RAM.
    pub memory: Arc<pyrite_mem::GuestMemory>,
    /// Number of vCPUs, 1 or more. APIC ids are 0…n-1.
    pub vcpus: u32,
    /// What CPUID says, common to all vCPUs.
    pub cpuid: CpuidTable,
    /// Everything outside the processors.
    pub io: Arc<dyn CpuIo>,
    /// Guest time in ns, for APIC timers and kvmclock. Stands still while the VM is paused.
    pub clock: Arc<dyn Fn() -> u64 + Send + Sync>,
}

/// A VM of one engine. Shared between threads.
pub trait Vm: Send + Sync {
    /// Capabilities.
    fn caps(&self) -> &EngineCaps;
    /// The vCPU `index` (0…n-1), once; it is then owned by the thread that runs it.
    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;
    /// Control of the vCPU from other threads.
    fn control(&self, index: u32) -> Arc<dyn VcpuControl>;
    /// A message-signalled interrupt to the local APICs. Never blocks.
    fn send_msi(&self, addr: u64, data: u32);
    /// Level of the PIC's INTR output, wired to LINT0 of vCPU 0.
    fn set_pic_intr(&self, level: bool);
    /// An NMI to one vCPU.
    fn send_nmi(&self, index: u32);
    /// Guest memory's page flags changed (dirty logging began or was taken): drop cached write
    /// permission in all vCPUs before returning. Only while all vCPUs are stopped.
    fn drop_write_permission(&self);
    /// Brings pages that vCPUs wrote into `GuestMemory`'s dirty log, for engines whose log lives
    /// elsewhere. Call before `GuestMemory::take_dirty_log`, while all vCPUs are stopped.
    fn sync_dirty_log(&self) {}
    /// Signals the eventfd `event` at each store of the guest to guest-physical address `gpa`, of
    /// any size, without leaving to user space; such stores do not reach [`CpuIo`] any more.
    /// `event` may be closed afterwards. Engines that cannot do this refuse.
    fn add_ioeventfd(&self, gpa: u64, event: RawFd) -> Result<(), EngineError> {
        let _ = (gpa, event);
        Err(EngineError::Unsupported(
            "this engine signals no event descriptors".to_owned(),
        ))
    }
    /// Undoes [`Vm::add_ioeventfd`] with the same address and event.
    fn remove_ioeventfd(&self, gpa: u64, event: RawFd) -> Result<(), EngineError> {
        let _ = (gpa, event);
        Ok(())
    }
    /// A message that is looked up once and then sent often; `None` if this engine gains nothing
    /// by it, or has no more of them: [`Vm::send_msi`] always works.
    fn open_irqfd(&self, addr: u64, data: u32) -> Option<Box<dyn Irqfd>> {
        let _ = (addr, data);
        None
    }
    /// What irqfds sent before has reached the local APICs when this returns. Call before state is
    /// read, while all vCPUs are stopped and no irqfd is triggered.
    fn settle_irqfds(&self) {}
    /// What a person may see.
    fn inspect(&self) -> pyrite_state::Inspect;
}

/// A message-signalled interrupt behind an event descriptor. Dropping it gives its place back.
pub trait Irqfd: Send + Sync {
    /// Sends the message. Never blocks.
    fn trigger(&self);
    /// Sends another message from now on.
    fn route(&self, addr: u64, data: u32) -> Result<(), EngineError>;
}

/// Control of a running vCPU from another thread.
pub trait VcpuControl: Send + Sync {
    /// Makes `run` return `StopReason::Requested` soon; the request stays until `run` returns.
    fn stop(&self);
}

/// One vCPU, owned by its thread.
pub trait Vcpu: Send {
    /// Runs until there is a reason to stop. HLT and waiting for start-up IPIs happen inside.
    fn run(&mut self) -> StopReason;
    /// The architectural state. Only between `run`s.
    fn state(&mut self) -> Result<CpuState, EngineError>;
    /// Replaces the architectural state. Only between `run`s.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// What the following `run`s stop for, until it is replaced. Only between `run`s.
    fn set_debug(&mut self, plan: &DebugPlan) -> Result<(), EngineError>;
}
