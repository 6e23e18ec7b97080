//! A vCPU state that one engine saved goes on on the other.

use std::sync::Arc;

use pyrite_engine::probe::probe_kvm;
use pyrite_engine::{EngineError, Vm, VmConfig, conformance, kvm};
use pyrite_soft::SoftVm;

fn soft(config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
    Ok(SoftVm::new(config)?)
}

#[test]
fn state_crosses_engines_in_both_directions() {
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(e) = device {
        println!("SKIP crossing between engines: /dev/kvm: {e}");
        return;
    }
    let limits = kvm::known_limits(!probe_kvm().usable());
    for (what, first, second) in [
        (
            "soft to kvm",
            &soft as conformance::Factory<'_>,
            &kvm::create as conformance::Factory<'_>,
        ),
        ("kvm to soft", &kvm::create, &soft),
    ] {
        let report = conformance::run_across(first, second, &limits);
        println!("{what}\n{report}\n");
        assert!(report.passed() > 0);
        assert_eq!(report.failures().count(), 0, "{what}\n{report}");
    }
}
