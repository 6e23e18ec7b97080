//! The probe comes to an end, with words for the user, whatever KVM this machine has.

use pyrite_engine::probe::{KvmVerdict, probe_kvm};

#[test]
fn probe_ends_with_a_verdict() {
    let verdict = probe_kvm();
    println!("engine: {verdict}");
    match &verdict {
        KvmVerdict::Usable {
            instructions_per_second,
        } => assert!(*instructions_per_second > 0),
        KvmVerdict::Unusable { reason } => {
            assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
        }
    }
}
