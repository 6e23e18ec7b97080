//! Benchmarks: `cargo xtask bench boot|disk|net|guest|show|compare`. `docs/benchmarks.md` says how to use them.

use std::path::PathBuf;

mod boot;
mod disk;
mod guest;
mod image;
mod machine;
mod net;
mod options;
mod report;
mod result;
mod shell;
mod usage;
mod workloads;

pub const USAGE: &str = "  bench boot [ROUNDS [CPUS]]
          time to the first shell prompt, against QEMU's TCG, in one run
  bench disk [--seconds N] [--json FILE] [CONTROLLER...]
          fio in a guest on a raw disk, against QEMU's TCG, in one run: virtio, nvme, ahci
  bench net [ROUNDS [SECONDS]]
          iperf3 between guest and host over the user network, against QEMU's TCG, in one run
  bench guest [OPTIONS]
          workloads in a Debian guest: native, QEMU's TCG, Pyrite (--help lists the options)
  bench show FILE.json [--clock wall|cpu]
          the report of an earlier run
  bench compare A.json B.json [--clock wall|cpu]
          two earlier runs, workload by workload";

/// Runs `cargo xtask bench ARGS`. `Ok(false)`: the arguments are wrong, and that was said.
pub fn main(args: &[String]) -> Result<bool, String> {
    match args.split_first() {
        Some((what, rest)) if what == "boot" => {
            let number = |n: usize, default| rest.get(n).map_or(Ok(default), |a| a.parse());
            let (Ok(rounds @ 1..), Ok(cpus @ 1..)) = (number(0, 7u32), number(1, 1u32)) else {
                eprintln!("bench boot [ROUNDS [CPUS]]: both are numbers from 1");
                return Ok(false);
            };
            boot::boot(rounds as usize, cpus)?;
        }
        Some((what, rest)) if what == "disk" => match disk::Options::parse(rest) {
            Ok(options) => disk::disk(&options)?,
            Err(e) => {
                eprintln!("bench disk: {e}");
                return Ok(false);
            }
        },
        Some((what, rest)) if what == "net" => {
            let number = |n: usize, default| rest.get(n).map_or(Ok(default), |a| a.parse());
            let (Ok(rounds @ 1..), Ok(seconds @ 1..)) = (number(0, 1u32), number(1, 5u32)) else {
                eprintln!("bench net [ROUNDS [SECONDS]]: both are numbers from 1");
                return Ok(false);
            };
            net::net(rounds as usize, seconds)?;
        }
        Some((what, rest)) if what == "guest" => {
            if rest.iter().any(|a| a == "--help" || a == "-h") {
                println!("{}", options::HELP);
                return Ok(true);
            }
            match options::Options::parse(rest) {
                Ok(options) => guest::run(&options)?,
                Err(e) => {
                    eprintln!("bench guest: {e}; --help lists the options");
                    return Ok(false);
                }
            }
        }
        Some((what, rest)) if what == "show" || what == "compare" => {
            let (files, clock) = match options::files(rest) {
                Ok(parsed) => parsed,
                Err(e) => {
                    eprintln!("bench {what}: {e}\n{USAGE}");
                    return Ok(false);
                }
            };
            match (what.as_str(), files.as_slice()) {
                ("show", [a]) => print!("{}", report::table(&result::Results::load(a)?, clock)),
                ("compare", [a, b]) => {
                    let (a, b) = (result::Results::load(a)?, result::Results::load(b)?);
                    print!("{}", report::compare(&a, &b, clock)?);
                }
                _ => {
                    eprintln!("{USAGE}");
                    return Ok(false);
                }
            }
        }
        _ => {
            eprintln!("usage: cargo xtask <command>\n\n{USAGE}");
            return Ok(false);
        }
    }
    Ok(true)
}

/// The target directory that this program was built into.
fn target_dir() -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    // target/PROFILE/xtask
    exe.ancestors()
        .nth(2)
        .map(PathBuf::from)
        .ok_or_else(|| "no target directory".into())
}

/// The optimised executable of this checkout, built if need be.
fn pyrite() -> Result<PathBuf, String> {
    let target = target_dir()?;
    let dir = target.to_string_lossy().into_owned();
    crate::cargo(&[
        "build",
        "--release",
        "--quiet",
        "-p",
        "pyrite-cli",
        "--target-dir",
        &dir,
    ])?;
    Ok(target.join("release/pyrite"))
}
