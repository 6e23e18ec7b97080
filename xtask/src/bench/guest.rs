//! `bench guest`: the same workloads natively, in QEMU's TCG and in Pyrite, one after the other.

use std::process::{Command, Stdio};

use super::machine::{Engine, Failure, Machine, QEMU, Setup};
use super::options::Options;
use super::result::{Entry, Results, Sample, Series, median};
use super::workloads::Workload;
use super::{image, machine, report, workloads};

/// A guest's clock and the host's may differ by this fraction ...
const DEVIATION_MAX: f64 = 0.02;
/// ... or by this many seconds, which the serial line and the host's scheduler account for.
const DEVIATION_MIN_S: f64 = 0.02;

pub fn run(o: &Options) -> Result<(), String> {
    if o.list {
        for w in workloads::ALL {
            println!("{:18} {:8} {}", w.name, w.group.name(), w.command(o.quick));
        }
        return Ok(());
    }
    let engines = engines(o)?;
    let setup = setup(o)?;
    let mut results = Results {
        about: about(o, &engines, &setup),
        engines: engines.iter().map(|e| e.name().to_owned()).collect(),
        cpus: o.cpus,
        boots: Vec::new(),
        entries: Vec::new(),
    };
    boots(o, &engines, &setup, &mut results)?;
    let mut machines = Vec::new();
    for e in &engines {
        eprintln!("bench: starting {}", e.name());
        machines.push(started(e, &setup)?);
    }
    for w in &o.workloads {
        let series = engines.iter().map(|e| Series {
            engine: e.name().to_owned(),
            samples: Vec::new(),
            failures: Vec::new(),
        });
        results.entries.push(Entry {
            name: w.name.to_owned(),
            group: w.group.name().to_owned(),
            unit: w.rate.map(str::to_owned),
            series: series.collect(),
        });
    }
    let copies: &[u32] = if o.cpus > 1 { &[1, o.cpus] } else { &[1] };
    for round in 1..=o.rounds {
        for (n, w) in o.workloads.iter().enumerate() {
            eprint!(
                "[{round}/{}] {:>2}/{} {:18}",
                o.rounds,
                n + 1,
                o.workloads.len(),
                w.name
            );
            for (m, machine) in machines.iter_mut().enumerate() {
                for &copies in copies {
                    let sample = one(o, w, copies, round == 1, machine, &setup);
                    let entry = results.entries.get_mut(n);
                    let Some(s) = entry.and_then(|e| e.series.get_mut(m)) else {
                        continue;
                    };
                    match sample {
                        Ok(sample) => {
                            eprint!("  {} {}", s.engine, report::shown(&sample, w.rate));
                            s.samples.push(sample);
                        }
                        Err(why) => {
                            eprint!("  {} FAILED ({why})", s.engine);
                            s.failures.push(why);
                        }
                    }
                }
            }
            eprintln!();
        }
        // What was measured is not lost if a later round is interrupted.
        if let Some(path) = &o.json {
            results.save(path)?;
        }
    }
    drop(machines);
    print!("{}", report::table(&results, o.clock));
    let failed = results.entries.iter().flat_map(|e| &e.series);
    match failed.map(|s| s.failures.len()).sum::<usize>() {
        0 => Ok(()),
        n => Err(format!("{n} runs of workloads failed; the table says why")),
    }
}

/// Runs a workload once; a machine that is lost is replaced.
fn one(
    o: &Options,
    w: &Workload,
    copies: u32,
    first: bool,
    machine: &mut Machine,
    setup: &Setup,
) -> Result<Sample, String> {
    let mut attempt = |quick| -> Result<Sample, String> {
        match machine.run(&w.command(quick), copies, o.limit_s) {
            Ok(s) if w.rate.is_some() && s.rate.is_none() => {
                Err("printed no rate for each copy".into())
            }
            Ok(s) => Ok(s),
            Err(Failure::Failed(why)) => Err(why),
            Err(Failure::Lost(why)) => {
                // Its log is of use; the next one would overwrite it.
                let kept = machine.log().with_extension("lost.log");
                let _ = std::fs::copy(machine.log(), &kept);
                *machine = started(&machine.engine.clone(), setup)?;
                Err(format!("{why}; a copy is {}", kept.display()))
            }
        }
    };
    if first && o.warm_up {
        // Programs and libraries come from the disk into the page cache.
        attempt(true)?;
    }
    attempt(o.quick)
}

/// By which fraction a guest's clock is off, if it is. The median: a line of a guest that the host
/// reads late is not the guest's clock.
pub fn deviation(samples: &[Sample]) -> Option<f64> {
    let by: Vec<f64> = samples.iter().map(|s| s.guest_s - s.host_s).collect();
    let fractions: Vec<f64> = samples
        .iter()
        .map(|s| (s.guest_s - s.host_s) / s.host_s)
        .collect();
    let fraction = median(&fractions)?;
    (median(&by)?.abs() > DEVIATION_MIN_S && fraction.abs() > DEVIATION_MAX).then_some(fraction)
}

fn engines(o: &Options) -> Result<Vec<Engine>, String> {
    let mut engines = Vec::new();
    if o.native {
        match machine::unshare_args() {
            Ok(_) => engines.push(Engine::Native),
            Err(why) => eprintln!("bench: {why}"),
        }
    }
    if o.tcg {
        version(QEMU).ok_or_else(|| {
            format!(
                "{QEMU} does not start: install the package qemu-system-x86 (the newest that the \
                 host's sources have), or leave it out with --skip-tcg"
            )
        })?;
        engines.push(Engine::Tcg);
    }
    if o.soft {
        let path = match &o.pyrite {
            Some(path) => std::path::absolute(path).map_err(|e| e.to_string())?,
            None => super::pyrite()?,
        };
        engines.push(Engine::Pyrite("pyrite", path));
    }
    if let Some(path) = &o.pyrite_b {
        let path = std::path::absolute(path).map_err(|e| e.to_string())?;
        engines.push(Engine::Pyrite("pyrite-b", path));
    }
    if engines.is_empty() {
        return Err("nothing to measure: no engine is left".into());
    }
    Ok(engines)
}

fn setup(o: &Options) -> Result<Setup, String> {
    let host = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    if o.cpus > host {
        return Err(format!(
            "--cpus {}: this host has {host} CPUs, and a vCPU that waits for another measures nothing",
            o.cpus
        ));
    }
    let first = o.core.unwrap_or(host - o.cpus);
    let log_dir = super::target_dir()?.join("bench");
    std::fs::create_dir_all(&log_dir).map_err(|e| format!("{}: {e}", log_dir.display()))?;
    Ok(Setup {
        image: image::get()?,
        cpus: o.cpus,
        cores: format!("{first}-{}", first + o.cpus - 1),
        memory_mib: o.memory_mib,
        log_dir,
    })
}

fn started(engine: &Engine, setup: &Setup) -> Result<Machine, String> {
    let machine = Machine::start(engine, setup)?;
    machine.ready()?;
    Ok(machine)
}

fn boots(
    o: &Options,
    engines: &[Engine],
    setup: &Setup,
    results: &mut Results,
) -> Result<(), String> {
    let guests: Vec<&Engine> = engines
        .iter()
        .filter(|e| !matches!(e, Engine::Native))
        .collect();
    results.boots = guests
        .iter()
        .map(|e| (e.name().to_owned(), Vec::new()))
        .collect();
    for n in 1..=o.boots {
        eprint!("[boot {n}/{}]", o.boots);
        for (engine, (name, all)) in guests.iter().zip(&mut results.boots) {
            let machine = Machine::start(engine, setup)?;
            let boot = machine.boot()?;
            eprint!("  {name} {:.2} s", boot.kernel_s);
            all.push(boot);
            // Ends it in good order.
            machine.ready()?;
        }
        eprintln!();
    }
    Ok(())
}

/// First line that `program --version` prints.
fn version(program: &str) -> Option<String> {
    output(Command::new(program).arg("--version"))
}

fn output(command: &mut Command) -> Option<String> {
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().next()?.trim().to_owned();
    (out.status.success() && !line.is_empty()).then_some(line)
}

/// What a reader of the results must know.
fn about(o: &Options, engines: &[Engine], setup: &Setup) -> Vec<(String, String)> {
    let mut about = Vec::new();
    let mut note = |name: &str, value: Option<String>| {
        about.extend(value.map(|v| (name.to_owned(), v)));
    };
    note(
        "date",
        output(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])),
    );
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name"));
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let model = model.and_then(|m| m.split_once(": "));
    note("host", model.map(|(_, m)| format!("{m}, {count} CPUs")));
    note("host kernel", output(Command::new("uname").args(["-sr"])));
    for e in engines {
        match e {
            Engine::Native => note("native", Some("chroot on the host".into())),
            Engine::Tcg => note("tcg", version(QEMU)),
            Engine::Pyrite(name, path) => {
                let own = if path.starts_with(super::target_dir().unwrap_or_default()) {
                    output(Command::new("git").args(["describe", "--always", "--dirty"]))
                } else {
                    version(&path.to_string_lossy())
                };
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                note(name, Some(format!("{file}, {}", own.unwrap_or_default())));
            }
        }
    }
    note(
        "guest",
        Some(format!(
            "Debian 12, {} vCPU, {} MiB",
            setup.cpus, setup.memory_mib
        )),
    );
    let quick = if o.quick { ", quick sizes" } else { "" };
    note("rounds", Some(format!("{}{quick}", o.rounds)));
    about
}
