//! Instructions on the engines against the same instructions on the host's processor.

mod isa {
    #[path = "gen.rs"]
    pub mod gen_;
    pub mod forms;
    pub mod guest;
    pub mod host;
    pub mod machine;
    pub mod rng;
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn every_form_agrees_with_the_host() {
    let filter = std::env::var("PYRITE_ISA_FORM").ok();
    let (seed, rounds) = (number("PYRITE_ISA_SEED", 1), number("PYRITE_ISA_ROUNDS", 6));
    isa::forms::all_forms(seed, rounds as usize, filter.as_deref());
}
