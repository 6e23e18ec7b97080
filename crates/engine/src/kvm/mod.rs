//! The KVM engine.
//!
//! Split irqchip: the local APICs live in the kernel; PIC, IO-APIC and PIT are devices of the
//! machine. A level-triggered interrupt must tell the IO-APIC when it ends, and KVM only reports
//! the EOI of vectors that its routing table names as level-triggered; so [`KvmVm::send_msi`]
//! keeps the last 24 level messages as routes of the 24 reserved GSIs.
//!
//! # Threads
//!
//! [`KvmVcpu`] is owned by its thread. Others reach it by a kick: `immediate_exit` is set in the
//! shared `kvm_run` page and a signal is sent, both under the lock that `run` takes when it
//! publishes and withdraws the page, so a kick can neither be lost nor hit a stale thread.
//!
//! # Dirty log
//!
//! KVM logs writes of vCPUs itself; [`Vm::sync_dirty_log`] merges its log into `GuestMemory`'s.

// UNSAFETY: ioctls that kvm-ioctls lacks, the kvm_run union, the kick signal, memory slots.
#![allow(
    unsafe_code,
    reason = "the ioctl boundary; each block says why it is sound"
)]

pub mod cpuid;
mod debug;
mod events;
mod ioctl;
mod limits;
mod slots;
mod state;
mod vcpu;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, kvm_clock_data, kvm_enable_cap, kvm_msi,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;

use crate::{CpuIo, EngineCaps, EngineError, Irqfd, Vcpu, VcpuControl, Vm, VmConfig};
use events::{RESERVED_ROUTES, Routes};
pub use limits::known_limits;
pub use vcpu::KvmVcpu;

/// Level-triggered, in the data word of an MSI. Intel SDM Vol. 3A §10.11.2.
const MSI_LEVEL: u32 = 1 << 15;

pub(crate) fn os<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> EngineError + '_ {
    move |e| {
        let source: io::Error = e.into();
        EngineError::Os {
            what: format!("cannot {what}: {source}"),
            source,
        }
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How other threads reach a vCPU.
#[derive(Default)]
struct Remote {
    stop: AtomicBool,
    /// Where the running thread can be kicked; `None` outside of `run`.
    running: Mutex<Option<vcpu::KickTarget>>,
}

impl Remote {
    fn kick(&self) {
        if let Some(t) = lock(&self.running).as_ref() {
            t.kick();
        }
    }
}

impl VcpuControl for Remote {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
    }
}

/// What the VM and its vCPUs share.
struct Shared {
    fd: VmFd,
    memory: Arc<GuestMemory>,
    io: Arc<dyn CpuIo>,
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    pic_intr: AtomicBool,
    remotes: Vec<Arc<Remote>>,
    /// vCPUs inside `run`. LOCK ORDER: taken alone.
    running: Mutex<u32>,
    xsave_bytes: usize,
    has_sregs2: bool,
    routes: Mutex<Routes>,
    slots: Mutex<slots::Slots>,
}

impl Shared {
    /// The first vCPU that enters after all were out sets kvmclock to the VM clock, which stood
    /// still meanwhile.
    fn entered(&self) {
        let mut n = lock(&self.running);
        if *n == 0 {
            let data = kvm_clock_data {
                clock: (self.clock)(),
                ..kvm_clock_data::default()
            };
            if let Err(e) = self.fd.set_clock(&data) {
                tracing::warn!("cannot set kvmclock: {e}");
            }
        }
        *n += 1;
    }
    fn left(&self) {
        let mut n = lock(&self.running);
        *n = n.saturating_sub(1);
    }
}

/// A VM on KVM.
pub struct KvmVm {
    shared: Arc<Shared>,
    caps: EngineCaps,
    vcpus: Mutex<Vec<Option<KvmVcpu>>>,
    failed_msis: AtomicU32,
}

/// Creates a VM on `/dev/kvm`. Whether this KVM is worth using is the question of
/// [`crate::probe`], not of this function.
pub fn create(config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
    Ok(Arc::new(KvmVm::new(config)?))
}

impl KvmVm {
    /// See [`create`].
    pub fn new(config: VmConfig) -> Result<KvmVm, EngineError> {
        let kvm = Kvm::new().map_err(os("open /dev/kvm"))?;
        let max_vcpus = u32::try_from(kvm.get_max_vcpus())
            .unwrap_or(u32::MAX)
            .min(254);
        if config.vcpus == 0 || config.vcpus > max_vcpus {
            return Err(EngineError::Unsupported(format!(
                "{} vCPUs were asked for, KVM here can have 1 to {max_vcpus}",
                config.vcpus
            )));
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::Xcrs, "KVM_CAP_XCRS"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(EngineError::Unsupported(format!("KVM here lacks {name}")));
            }
        }
        ioctl::kick_signal().map_err(os("install the kick signal's handler"))?;
        let fd = kvm.create_vm().map_err(os("create a VM in KVM"))?;
        // Three pages that VMX without unrestricted guest needs; below the BIOS, in no one's way.
        fd.set_tss_address(0xfffb_d000)
            .map_err(os("place KVM's TSS"))?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = u64::from(RESERVED_ROUTES);
        fd.enable_cap(&split)
            .map_err(os("enable KVM_CAP_SPLIT_IRQCHIP"))?;
        // 32-bit APIC ids in KVM_GET/SET_LAPIC and no broadcast quirk, where KVM has it.
        let mut x2 = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        x2.args[0] = 3;
        if let Err(e) = fd.enable_cap(&x2) {
            tracing::debug!("KVM_CAP_X2APIC_API: {e}");
        }
        let shared = Arc::new(Shared {
            xsave_bytes: usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            has_sregs2: fd.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_SREGS2)) > 0,
            fd,
            memory: config.memory,
            io: config.io,
            clock: config.clock,
            pic_intr: AtomicBool::new(false),
            remotes: (0..config.vcpus).map(|_| Arc::default()).collect(),
            running: Mutex::new(0),
            routes: Mutex::default(),
            slots: Mutex::default(),
        });
        let debug = debug::caps(&shared.fd);
        let mut vm = KvmVm {
            shared,
            caps: EngineCaps {
                name: "kvm",
                max_vcpus,
                tsc_khz: 0,
                debug,
            },
            vcpus: Mutex::new(Vec::new()),
            failed_msis: AtomicU32::new(0),
        };
        vm.shared.map_memory(false)?;
        slots::follow_routes(&vm.shared);
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let v = KvmVcpu::new(&vm.shared, index)?;
            if index == 0 {
                vm.caps.tsc_khz = v.tsc_khz()?;
            }
            let table = cpuid::for_vcpu(&config.cpuid, index, config.vcpus, vm.caps.tsc_khz);
            v.set_cpuid(&table)?;
            vcpus.push(Some(v));
        }
        vm.vcpus = Mutex::new(vcpus);
        Ok(vm)
    }
}

impl Vm for KvmVm {
    fn caps(&self) -> &EngineCaps {
        &self.caps
    }

    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let v = lock(&self.vcpus)
            .get_mut(index as usize)
            .and_then(Option::take);
        match v {
            Some(v) => Ok(Box::new(v)),
            None => Err(EngineError::Internal(format!(
                "vCPU {index} is not there or taken"
            ))),
        }
    }

    fn control(&self, index: u32) -> Arc<dyn VcpuControl> {
        match self.shared.remotes.get(index as usize) {
            Some(r) => Arc::<Remote>::clone(r),
            // A control of nothing: stopping it has no effect.
            None => Arc::new(Remote::default()),
        }
    }

    fn send_msi(&self, addr: u64, data: u32) {
        if data & MSI_LEVEL != 0 {
            self.shared.keep_level_route(addr, data);
        }
        let msi = kvm_msi {
            address_lo: addr as u32,
            address_hi: (addr >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        // An error is a message that nobody takes, which hardware drops as well.
        if self.shared.fd.signal_msi(msi).is_err() {
            self.failed_msis.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn set_pic_intr(&self, level: bool) {
        let was = self.shared.pic_intr.swap(level, Ordering::SeqCst);
        if level
            && !was
            && let Some(r) = self.shared.remotes.first()
        {
            r.kick();
        }
    }

    fn send_nmi(&self, index: u32) {
        // KVM_NMI would wait until the vCPU leaves KVM_RUN; a message with delivery mode NMI does
        // not. Physical destination, bits 19:12; ids are below 255.
        let msi = kvm_msi {
            address_lo: 0xfee0_0000 | (index & 0xff) << 12,
            data: 0b100 << 8,
            ..kvm_msi::default()
        };
        if self.shared.fd.signal_msi(msi).is_err() {
            self.failed_msis.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn drop_write_permission(&self) {
        if let Err(e) = self.shared.begin_dirty_round() {
            tracing::error!("dirty log: {e}");
        }
    }

    fn sync_dirty_log(&self) {
        if let Err(e) = self.shared.sync_dirty_log() {
            tracing::error!("dirty log: {e}");
        }
    }

    fn add_ioeventfd(&self, gpa: u64, event: RawFd) -> Result<(), EngineError> {
        self.shared.add_ioeventfd(gpa, event)
    }

    fn remove_ioeventfd(&self, gpa: u64, event: RawFd) -> Result<(), EngineError> {
        self.shared.remove_ioeventfd(gpa, event)
    }

    fn open_irqfd(&self, addr: u64, data: u32) -> Option<Box<dyn Irqfd>> {
        match events::KvmIrqfd::open(&self.shared, addr, data) {
            Ok(irqfd) => Some(Box::new(irqfd)),
            Err(e) => {
                tracing::debug!("no irqfd: {e}");
                None
            }
        }
    }

    fn settle_irqfds(&self) {
        if let Err(e) = self.shared.settle_irqfds() {
            tracing::error!("irqfds: {e}");
        }
    }

    fn inspect(&self) -> Inspect {
        let routes = lock(&self.shared.routes);
        Inspect::node([
            ("engine", Inspect::Text("kvm".to_owned())),
            ("vcpus", Inspect::Uint(self.shared.remotes.len() as u64)),
            ("tsc-khz", Inspect::Uint(self.caps.tsc_khz)),
            (
                "pic-intr",
                Inspect::Bool(self.shared.pic_intr.load(Ordering::Relaxed)),
            ),
            ("level-routes", Inspect::Uint(routes.level.len() as u64)),
            ("irqfds", Inspect::Uint(routes.irqfds.len() as u64)),
            (
                "untaken-messages",
                Inspect::Uint(u64::from(self.failed_msis.load(Ordering::Relaxed))),
            ),
        ])
    }
}

#[cfg(test)]
mod tests;
