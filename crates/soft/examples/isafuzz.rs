//! Random instruction sequences on the engines against the host: `cargo xtask isafuzz`.

#[path = "../tests/isa/mod.rs"]
mod isa;

use std::process::{Command, ExitCode};

const USAGE: &str = "usage: isafuzz [--seed S] [--count N] [--seconds T] [--jobs J] [--keep K]

Runs the sequences of seeds S, S+1, … and stores those on which an engine differs from the host in
crates/soft/tests/isa/cases. Jobs are processes that share the count.";

fn main() -> ExitCode {
    let (mut seed, mut count, mut seconds, mut jobs, mut keep) = (1u64, 100_000, u64::MAX, 1, 10);
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        let value = args.next().and_then(|v| v.parse::<u64>().ok());
        let (Some(v), place) = (
            value,
            match a.as_str() {
                "--seed" => &mut seed,
                "--count" => &mut count,
                "--seconds" => &mut seconds,
                "--jobs" => &mut jobs,
                "--keep" => &mut keep,
                _ => {
                    eprintln!("{USAGE}");
                    return ExitCode::from(2);
                }
            },
        ) else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        *place = v;
    }
    if jobs > 1 {
        return spread(seed, count, seconds, jobs, keep);
    }
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/isa/cases");
    match isa::fuzz::campaign(seed, count, seconds, keep as usize, Some(&dir)) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// One process per job: the layout has fixed addresses.
fn spread(seed: u64, count: u64, seconds: u64, jobs: u64, keep: u64) -> ExitCode {
    let Ok(me) = std::env::current_exe() else {
        return ExitCode::FAILURE;
    };
    let share = count.div_ceil(jobs);
    let children: Vec<_> = (0..jobs)
        .map(|n| {
            Command::new(&me)
                .args(["--seed", &(seed + n * share).to_string()])
                .args(["--count", &share.to_string()])
                .args(["--seconds", &seconds.to_string()])
                .args(["--keep", &keep.to_string()])
                .spawn()
        })
        .collect();
    let mut good = true;
    for c in children {
        good &= c.and_then(|mut c| c.wait()).is_ok_and(|s| s.success());
    }
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
