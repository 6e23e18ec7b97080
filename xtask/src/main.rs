//! Repository chores: `cargo xtask <command>`.
//!
//! - `test`: everything CI checks: formatting, lints, tidy, all tests.
//! - `tidy`: house rules that no compiler checks.
//! - `bench`: time to the first shell prompt, workloads in a guest; against QEMU's TCG and native.
//! - `isafuzz`: random instruction sequences, software engine against this processor.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

mod bench;
mod tidy;

const USAGE: &str = "usage: cargo xtask <command>

  test    formatting, lints, house rules and all tests (what CI runs)
  quick   the same without the tests that boot whole guests
  tidy    house rules only
  bench boot|net|guest|show|compare
          how fast guests are, against QEMU's TCG and native, in one run
  isafuzz random instruction sequences on the engine against this processor
          [--seed S] [--count N] [--seconds T] [--jobs J] [--keep K]";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("test") => steps(true),
        Some("quick") => steps(false),
        Some("tidy") => report("tidy", tidy::check()),
        Some("bench") => match bench::main(args.get(1..).unwrap_or_default()) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(2),
            Err(e) => report("bench", Err(e)),
        },
        Some("isafuzz") => {
            let mut all = vec![
                "run",
                "--release",
                "-p",
                "pyrite-soft",
                "--example",
                "isafuzz",
                "--",
            ];
            all.extend(args.iter().skip(1).map(String::as_str));
            report("isafuzz", cargo(&all))
        }
        Some("--help" | "-h" | "help") | None => {
            eprintln!("{USAGE}");
            ExitCode::SUCCESS
        }
        Some(other) => {
            eprintln!("unknown command {other:?}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn report(what: &str, result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {what} failed: {e}");
            ExitCode::FAILURE
        }
    }
}

fn cargo(args: &[&str]) -> Result<(), String> {
    cargo_with(args, &[])
}

fn cargo_with(args: &[&str], variables: &[(&str, &OsStr)]) -> Result<(), String> {
    eprintln!("xtask: cargo {}", args.join(" "));
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .args(args)
        .envs(variables.iter().copied())
        .status()
        .map_err(|e| format!("cannot start cargo: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cargo {}: {status}", args.join(" ")))
    }
}

/// True if `cargo <name>` is installed.
fn has(name: &str) -> bool {
    Command::new("cargo")
        .args([name, "--version"])
        .output()
        .is_ok_and(|o| o.status.success())
}

fn steps(guests: bool) -> ExitCode {
    let run = || -> Result<(), String> {
        cargo(&["fmt", "--all", "--check"])?;
        tidy::check()?;
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ])?;
        // The system tests run this binary.
        cargo(&["build", "--quiet", "-p", "pyrite-cli"])?;
        let mut args = if has("nextest") {
            vec!["nextest", "run", "--workspace"]
        } else {
            vec!["test", "--workspace"]
        };
        if !guests {
            args.extend(["--exclude", "pyrite-tests"]);
        }
        let skipped = Skipped::begin()?;
        let done = cargo_with(&args, &[("PYRITE_SKIPPED", skipped.0.as_os_str())]);
        skipped.show();
        done
    };
    report("test", run())
}

/// Where tests write what they left out: what passing tests print is not shown.
struct Skipped(PathBuf);

impl Skipped {
    fn begin() -> Result<Skipped, String> {
        let path = std::env::temp_dir().join(format!("pyrite-skipped-{}", std::process::id()));
        std::fs::write(&path, "").map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Skipped(path))
    }

    fn show(&self) {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        let _ = std::fs::remove_file(&self.0);
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        lines.dedup();
        println!(
            "xtask: {} tests or parts of tests were not done here",
            lines.len()
        );
        for line in lines {
            println!("  {line}");
        }
    }
}
