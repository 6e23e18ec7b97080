//! The conformance suite on KVM.

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
    let filter = std::env::var("PYRITE_GUEST").unwrap_or_default();
    let mut failed = 0;
    for name in conformance::names()
        .into_iter()
        .filter(|n| n.contains(&filter))
    {
        let outcome = conformance::run_one(name, &kvm::create, &kvm::create);
        println!("{name}: {outcome:?}");
        if !matches!(outcome, Some(conformance::Outcome::Pass)) {
            failed += 1;
        }
    }
    assert_eq!(failed, 0);
}
