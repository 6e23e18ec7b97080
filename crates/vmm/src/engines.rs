//! Which engine runs a VM, why, and with which CPUID.

use std::sync::Arc;

use pyrite_api::v1::{DirectKind, EngineKind, VmSpec};
use pyrite_engine::probe::{self, KvmVerdict};
use pyrite_engine::{CpuidTable, EngineError, Vm, VmConfig, kvm};
use pyrite_soft::{DirectPolicy, SoftOptions, SoftVm};
use pyrite_x86::cpuid::{self, CpuidError, HostCpuid};

/// An engine, decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// KVM.
    Kvm,
    /// The software engine.
    Soft,
}

impl Engine {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Kvm => "kvm",
            Engine::Soft => "soft",
        }
    }

    /// True if its VMs signal event descriptors (ioeventfd) at stores of the guest.
    pub fn signals_descriptors(self) -> bool {
        match self {
            Engine::Kvm => true,
            // Its vCPU threads call devices, which costs no exit.
            Engine::Soft => false,
        }
    }

    /// Creates a VM, with what the specification says of the engine.
    pub fn create(self, config: VmConfig, spec: &VmSpec) -> Result<Arc<dyn Vm>, EngineError> {
        match self {
            Engine::Kvm => kvm::create(config),
            Engine::Soft => {
                let mut options = SoftOptions {
                    direct: match spec.direct {
                        DirectKind::Off => DirectPolicy::Never,
                        DirectKind::Auto => DirectPolicy::WhenItPays,
                        DirectKind::Always => DirectPolicy::Always,
                    },
                    ..SoftOptions::default()
                };
                if let Some(n) = spec.code_cache_bytes.and_then(|n| usize::try_from(n).ok()) {
                    options.code_cache_bytes = n;
                }
                Ok(SoftVm::with_options(config, options)?)
            }
        }
    }
}

/// Whether KVM works at hardware speed here; if not, why.
pub fn probe_kvm() -> Result<(), String> {
    match probe::probe_kvm() {
        KvmVerdict::Usable { .. } => Ok(()),
        KvmVerdict::Unusable { reason } => Err(reason),
    }
}

/// Whether guests can ping other hosts through the user network.
pub fn guests_can_ping() -> bool {
    pyrite_net::usernet::ping_allowed()
}

/// Decides, and says why in one line.
pub fn choose(kind: EngineKind) -> (Engine, String) {
    match kind {
        EngineKind::Kvm => (Engine::Kvm, "asked for".into()),
        EngineKind::Soft => (Engine::Soft, "asked for".into()),
        EngineKind::Auto => match probe_kvm() {
            Ok(()) => (Engine::Kvm, "KVM works at hardware speed".into()),
            Err(why) => (Engine::Soft, format!("KVM is not used: {why}")),
        },
    }
}

/// What a guest of this engine is told about its processor; a wrong model is described.
pub fn guest_cpuid(engine: Engine, model: &str, vcpus: u32) -> Result<CpuidTable, String> {
    let (host, kind) = host(engine)?;
    let guest =
        cpuid::guest_cpuid(model, &host, kind, vcpus).map_err(|e: CpuidError| e.to_string())?;
    if !guest.dropped.is_empty() {
        tracing::warn!(
            model,
            missing = guest.dropped.join(" "),
            "the CPU model is not complete"
        );
    }
    Ok(guest.table)
}

/// The processor that an engine has to offer.
fn host(engine: Engine) -> Result<(HostCpuid, cpuid::EngineKind), String> {
    Ok(match engine {
        Engine::Soft => {
            // The guest's TSC is the host's; its frequency is not always known.
            let tsc_khz = pyrite_soft::apic::host_tsc_khz();
            (HostCpuid::read(tsc_khz), cpuid::EngineKind::Soft)
        }
        Engine::Kvm => {
            let (table, tsc_khz) = kvm_cpuid()?;
            (HostCpuid { table, tsc_khz }, cpuid::EngineKind::Kvm)
        }
    })
}

/// Whether a guest that was told `saved` of its processor can go on here; if not, why.
pub fn can_continue(engine: Engine, saved: &CpuidTable) -> Result<(), String> {
    let (host, kind) = host(engine)?;
    let theirs = HostCpuid {
        table: saved.clone(),
        tsc_khz: 0,
    };
    let here = cpuid::available(&host, kind, theirs.vendor());
    let missing: Vec<&str> = cpuid::FEATURES
        .iter()
        .filter(|f| saved.has(f) && !here.has(f.name))
        .map(|f| f.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "its guest uses processor features that are not available here: {}",
        missing.join(" ")
    ))
}

/// What KVM offers here; the frequency is filled in by the engine.
fn kvm_cpuid() -> Result<(CpuidTable, u64), String> {
    let device = kvm_ioctls::Kvm::new().map_err(|e| format!("cannot open /dev/kvm: {e}"))?;
    let table = kvm::cpuid::supported(&device).map_err(|e| e.to_string())?;
    Ok((table, 0))
}
