//! Instructions on the engines against the same instructions on the host's processor.

#[path = "isa/mod.rs"]
mod isa;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

#[test]
fn every_form_agrees_with_the_host() {
    let filter = std::env::var("PYRITE_ISA_FORM").ok();
    let (seed, rounds) = (number("PYRITE_ISA_SEED", 1), number("PYRITE_ISA_ROUNDS", 6));
    isa::forms::all_forms(seed, rounds as usize, filter.as_deref());
}

#[test]
fn random_sequences_agree_with_the_host() {
    assert_eq!(isa::fuzz::campaign(1, 60_000, 30, 5, None), 0);
}

#[test]
fn former_failures_agree_with_the_host() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/isa/cases");
    let mut fuzzer = isa::fuzz::Fuzzer::new();
    let mut bad = Vec::new();
    for entry in std::fs::read_dir(dir).expect("the cases") {
        let path = entry.expect("a case").path();
        if path.extension().is_none_or(|x| x != "txt") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a case");
        if let Err(e) = fuzzer.replay(&text) {
            bad.push(format!("{}: {e}", path.display()));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
