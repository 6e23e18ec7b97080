//! Options of `bench guest`.

use std::path::PathBuf;

use super::result::Clock;
use super::workloads::{self, Workload};

pub const HELP: &str = "usage: cargo xtask bench guest [OPTIONS]

Runs workloads of a Debian 12 user space natively (chroot), in QEMU's TCG and in Pyrite's software
engine, one after the other for each workload, and prints how they compare.

  --rounds N            how often everything runs [3]
  --only NAME,NAME      these workloads
  --list                print the names and commands of the workloads
  --engines LIST        of native,tcg,pyrite [all three]
  --skip-tcg            the same as leaving tcg out
  --quick               small sizes: a check that everything works, not a measurement
  --cpus N              N above 1: guests with N vCPUs; N copies at once against one copy
  --pyrite PATH         a pyrite executable [built from this checkout, optimised]
  --pyrite-b PATH       a second one, measured in the same run
  --clock wall|cpu      what the report counts: time that passed, or processor time of the whole VM;
                        the latter for a host that others use too [wall]
  --core N              the host CPU to run on; with --cpus, the first of N in a row [the last]
  --memory MIB          memory of a guest [1536]
  --boots N             boots that are timed, per engine [3]
  --limit SECONDS       a workload that takes longer has failed [600]
  --no-warm-up          do not run every workload once with its small size first
  --json FILE           write the results";

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub rounds: u32,
    pub workloads: Vec<&'static Workload>,
    pub list: bool,
    pub native: bool,
    pub tcg: bool,
    pub soft: bool,
    pub quick: bool,
    pub cpus: u32,
    pub pyrite: Option<PathBuf>,
    pub pyrite_b: Option<PathBuf>,
    pub clock: Clock,
    pub core: Option<u32>,
    pub memory_mib: u32,
    pub boots: u32,
    pub limit_s: u32,
    pub warm_up: bool,
    pub json: Option<PathBuf>,
}

impl Options {
    pub fn parse(args: &[String]) -> Result<Options, String> {
        let mut o = Options {
            rounds: 3,
            workloads: workloads::ALL.iter().collect(),
            list: false,
            native: true,
            tcg: true,
            soft: true,
            quick: false,
            cpus: 1,
            pyrite: None,
            pyrite_b: None,
            clock: Clock::Wall,
            core: None,
            memory_mib: 1536,
            boots: 3,
            limit_s: 600,
            warm_up: true,
            json: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let (name, mut inline) = match arg.split_once('=') {
                Some((n, v)) => (n, Some(v.to_owned())),
                None => (arg.as_str(), None),
            };
            let mut value = || {
                inline
                    .take()
                    .or_else(|| args.next().cloned())
                    .ok_or_else(|| format!("{name} needs a value"))
            };
            let number = |text: String, least: u32, most: u32| {
                text.parse()
                    .ok()
                    .filter(|n| (least..=most).contains(n))
                    .ok_or_else(|| {
                        format!("{name}: {text:?} is not a number from {least} to {most}")
                    })
            };
            match name {
                "--rounds" => o.rounds = number(value()?, 1, 1000)?,
                "--only" => o.workloads = workloads::named(&value()?)?,
                "--list" => o.list = true,
                "--engines" => {
                    let list = value()?;
                    (o.native, o.tcg, o.soft) = (false, false, false);
                    for e in list.split(',') {
                        match e {
                            "native" => o.native = true,
                            "tcg" => o.tcg = true,
                            "pyrite" => o.soft = true,
                            _ => return Err(format!("--engines: no engine {e:?}")),
                        }
                    }
                }
                "--skip-tcg" => o.tcg = false,
                "--quick" => o.quick = true,
                "--cpus" => o.cpus = number(value()?, 1, 64)?,
                "--pyrite" => o.pyrite = Some(value()?.into()),
                "--pyrite-b" => o.pyrite_b = Some(value()?.into()),
                "--clock" => o.clock = Clock::parse(&value()?)?,
                "--core" => o.core = Some(number(value()?, 0, 4095)?),
                "--memory" => o.memory_mib = number(value()?, 512, 65536)?,
                "--boots" => o.boots = number(value()?, 0, 1000)?,
                "--limit" => o.limit_s = number(value()?, 1, 86400)?,
                "--no-warm-up" => o.warm_up = false,
                "--json" => o.json = Some(value()?.into()),
                _ => return Err(format!("unknown option {name:?}")),
            }
            if let Some(v) = inline {
                return Err(format!("{name} takes no value ({v:?})"));
            }
        }
        if let Some(p) = [&o.pyrite, &o.pyrite_b]
            .into_iter()
            .flatten()
            .find(|p| !p.is_file())
        {
            return Err(format!(
                "{}: no such executable; give the path of a pyrite",
                p.display()
            ));
        }
        Ok(o)
    }
}

/// Arguments of `show` and `compare`.
pub fn files(args: &[String]) -> Result<(Vec<PathBuf>, Clock), String> {
    let mut clock = Clock::Wall;
    let mut files = Vec::new();
    let mut args = args.iter();
    while let Some(a) = args.next() {
        match a.as_str() {
            "--clock" => clock = Clock::parse(args.next().ok_or("--clock needs a value")?)?,
            _ if a.starts_with('-') => return Err(format!("unknown option {a:?}")),
            _ => files.push(a.into()),
        }
    }
    Ok((files, clock))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(&args)
    }

    #[test]
    fn options_mean_what_they_say() {
        let o = parse("--rounds 5 --only=gcc,java --skip-tcg --clock cpu").expect("parses");
        assert_eq!(o.rounds, 5);
        let names: Vec<&str> = o.workloads.iter().map(|w| w.name).collect();
        assert_eq!(names, ["gcc", "java"]);
        assert!(o.native && !o.tcg && o.soft);
        assert_eq!(o.clock, Clock::Cpu);
        let o = parse("--engines tcg").expect("parses");
        assert!(!o.native && o.tcg && !o.soft);
    }

    #[test]
    fn wrong_options_are_errors() {
        for line in [
            "--rounds",
            "--rounds 0",
            "--rounds many",
            "--only nothing",
            "--engines kvm",
            "--quick=yes",
            "--clock sun",
            "--pyrite /nowhere/pyrite",
            "rounds",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
