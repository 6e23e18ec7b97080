//! The conformance suite on the software engine's interpreter.

use std::sync::Arc;

use pyrite_engine::{EngineError, Vm, VmConfig, conformance};
use pyrite_soft::{SoftOptions, SoftVm};

fn interpreter(config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
    let options = SoftOptions {
        translate: false,
        ..SoftOptions::default()
    };
    Ok(SoftVm::with_options(config, options)?)
}

#[test]
fn interpreter_conforms() {
    let report = conformance::run_all(&interpreter);
    println!("{report}");
    assert!(report.passed() > 0);
    assert_eq!(report.failures().count(), 0, "{report}");
}
