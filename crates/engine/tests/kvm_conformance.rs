//! The conformance suite on KVM, if this machine has one.

use pyrite_engine::probe::probe_kvm;
use pyrite_engine::{conformance, kvm};

#[test]
fn kvm_conforms() {
    if let Err(e) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        println!("SKIP the conformance suite on KVM: /dev/kvm: {e}");
        return;
    }
    let skips = kvm::known_limits(!probe_kvm().usable());
    let report = conformance::run_except(&kvm::create, &skips);
    println!("{report}");
    assert!(report.passed() > 0);
    assert_eq!(report.failures().count(), 0, "{report}");
}

#[test]
fn every_known_limit_names_a_guest() {
    let names = conformance::names();
    for (name, _) in kvm::known_limits(true)
        .into_iter()
        .chain(kvm::known_limits(false))
    {
        assert!(names.contains(&name), "{name} is not a guest");
    }
}
