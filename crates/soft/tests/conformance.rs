//! The conformance suite on the software engine: interpreter, and translator in several settings.

use std::sync::Arc;

use pyrite_engine::{EngineError, Vm, VmConfig, conformance};
use pyrite_soft::{SoftOptions, SoftVm};

fn conforms(options: &SoftOptions) {
    let make = |config: VmConfig| -> Result<Arc<dyn Vm>, EngineError> {
        Ok(SoftVm::with_options(config, options.clone())?)
    };
    // One guest by name, for debugging.
    if let Ok(name) = std::env::var("PYRITE_CONFORMANCE_GUEST") {
        let outcome = conformance::run_one(&name, &make, &make);
        assert_eq!(outcome, Some(conformance::Outcome::Pass), "{name}");
        return;
    }
    let report = conformance::run_all(&make);
    println!("{report}");
    assert!(report.passed() > 0);
    assert_eq!(report.failures().count(), 0, "{report}");
}

#[test]
fn interpreter_conforms() {
    conforms(&SoftOptions {
        translate: false,
        translate_at_once: true,
        ..SoftOptions::default()
    });
}

#[test]
fn translator_conforms() {
    conforms(&SoftOptions::default());
}

#[test]
fn translator_without_links_conforms() {
    conforms(&SoftOptions {
        link: false,
        translate_at_once: true,
        ..SoftOptions::default()
    });
}

#[test]
fn translator_with_single_instruction_blocks_conforms() {
    conforms(&SoftOptions {
        block_insns_max: 1,
        translate_at_once: true,
        ..SoftOptions::default()
    });
}

#[test]
fn translator_with_a_tiny_cache_conforms() {
    conforms(&SoftOptions {
        code_cache_bytes: 64 << 10,
        translate_at_once: true,
        ..SoftOptions::default()
    });
}

#[test]
fn translator_without_runs_moves_and_long_blocks_conforms() {
    conforms(&SoftOptions {
        share_checks: false,
        branches_max: 0,
        move_blocks: false,
        translate_at_once: true,
        ..SoftOptions::default()
    });
}
