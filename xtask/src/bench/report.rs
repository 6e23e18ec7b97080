//! Tables of results.

use std::fmt::Write;

use super::guest::deviation;
use super::result::{Clock, Entry, Results, Sample, median, spread};
use super::workloads::Group;

/// The engine that others are measured against, the one to beat, and ours.
const NATIVE: &str = "native";
const TCG: &str = "tcg";
const PYRITE: &str = "pyrite";
const PYRITE_B: &str = "pyrite-b";

/// A sample in a line of progress.
pub fn shown(s: &Sample, unit: Option<&str>) -> String {
    match (s.rate, unit) {
        (Some(rate), Some(unit)) => format!("{} {unit}", scaled(rate)),
        _ => format!("{:.3} s", s.host_s),
    }
}

/// A number with at least three digits, and k, M or G.
fn scaled(n: f64) -> String {
    let (n, suffix) = match n.abs() {
        x if x >= 1e9 => (n / 1e9, "G"),
        x if x >= 1e6 => (n / 1e6, "M"),
        x if x >= 1e4 => (n / 1e3, "k"),
        _ => (n, ""),
    };
    format!("{n:.*}{suffix}", if n < 10.0 { 2 } else { 1 })
}

/// A speed as it is read: a rate with its unit, or the seconds of a run.
fn value(e: &Entry, speed: Option<f64>) -> String {
    match (speed, &e.unit) {
        (None, _) => "-".into(),
        (Some(s), Some(unit)) => format!("{} {unit}", scaled(s)),
        (Some(s), None) => format!("{:.3} s", 1.0 / s),
    }
}

fn percent(r: Option<f64>) -> String {
    r.map_or("-".into(), |r| format!("{:.1} %", 100.0 * r))
}

fn times(r: Option<f64>) -> String {
    r.map_or("-".into(), |r| format!("{r:.2}"))
}

/// How many times faster `a` is than `b`.
fn ratio(e: &Entry, a: &str, b: &str, clock: Clock) -> Option<f64> {
    Some(e.median(a, 1, clock)? / e.median(b, 1, clock)?)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

/// Rows with columns of equal width: the first to the left, the others to the right.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |n: usize| {
        let cells = rows.iter().filter_map(|r| r.get(n));
        cells.map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (n, cell) in row.iter().enumerate() {
            let w = width(n);
            let _ = match n {
                0 => write!(line, "{cell:<w$}"),
                _ => write!(line, "  {cell:>w$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Pairs of engines that are compared: heading, A, B, and whether as per cent.
fn pairs(r: &Results) -> Vec<(&'static str, &'static str, &'static str, bool)> {
    let has = |e: &str| r.engines.iter().any(|x| x == e);
    let all = [
        ("Pyrite/native", PYRITE, NATIVE, true),
        ("Pyrite/TCG", PYRITE, TCG, false),
        ("B/native", PYRITE_B, NATIVE, true),
        ("B/TCG", PYRITE_B, TCG, false),
        ("B/Pyrite", PYRITE_B, PYRITE, false),
        // Without Pyrite, what there is to beat.
        ("TCG/native", TCG, NATIVE, true),
    ];
    let mut pairs: Vec<_> = all
        .into_iter()
        .filter(|(_, a, b, _)| has(a) && has(b))
        .collect();
    if pairs.len() > 1 {
        pairs.retain(|(heading, ..)| *heading != "TCG/native");
    }
    pairs
}

fn cell(r: Option<f64>, as_percent: bool) -> String {
    if as_percent { percent(r) } else { times(r) }
}

/// Everything about one run.
pub fn table(r: &Results, clock: Clock) -> String {
    let mut text = String::new();
    for (name, value) in &r.about {
        let _ = writeln!(text, "{name}: {value}");
    }
    let _ = writeln!(text, "counted: {}\n", clock.name());
    let pairs = pairs(r);
    let mut head = vec!["workload".to_owned()];
    head.extend(r.engines.iter().cloned());
    head.extend(pairs.iter().map(|(heading, ..)| (*heading).to_owned()));
    head.push("spread".into());
    let mut rows = vec![head];
    for e in &r.entries {
        let mut row = vec![e.name.clone()];
        row.extend(r.engines.iter().map(|x| value(e, e.median(x, 1, clock))));
        row.extend(
            pairs
                .iter()
                .map(|(_, a, b, p)| cell(ratio(e, a, b, clock), *p)),
        );
        let spreads = r.engines.iter().map(|x| {
            spread(&e.speeds(x, 1, clock)).map_or("-".into(), |s| format!("{:.0}", 100.0 * s))
        });
        row.push(format!("{} %", spreads.collect::<Vec<_>>().join("/")));
        rows.push(row);
    }
    text.push_str(&columns(&rows));
    text.push_str("spread: (largest - smallest) / median, by engine\n\n");
    means(r, &pairs, clock, &mut text);
    if r.cpus > 1 {
        scaling(r, &mut text);
    }
    boots(r, clock, &mut text);
    remarks(r, clock, &mut text);
    text
}

fn means(
    r: &Results,
    pairs: &[(&'static str, &'static str, &'static str, bool)],
    clock: Clock,
    text: &mut String,
) {
    let mut rows = vec![vec!["geometric mean".to_owned()]];
    rows[0].extend(pairs.iter().map(|(heading, ..)| (*heading).to_owned()));
    let groups = std::iter::once(None).chain(Group::ALL.into_iter().map(Some));
    for group in groups {
        let of = || {
            r.entries
                .iter()
                .filter(move |e| group.is_none_or(|g| Group::of(&e.group) == Some(g)))
        };
        if of().next().is_none() {
            continue;
        }
        let mut row = vec![group.map_or("all", Group::name).to_owned()];
        row.extend(
            pairs
                .iter()
                .map(|(_, a, b, p)| cell(mean(of().filter_map(|e| ratio(e, a, b, clock))), *p)),
        );
        rows.push(row);
    }
    text.push_str(&columns(&rows));
    text.push('\n');
}

/// What the second vCPU is worth.
fn scaling(r: &Results, text: &mut String) {
    let n = r.cpus;
    let mut rows = vec![vec![format!("{n} copies / 1 copy")]];
    rows[0].extend(r.engines.iter().cloned());
    let factor = |e: &Entry, engine: &str| {
        Some(e.median(engine, n, Clock::Wall)? / e.median(engine, 1, Clock::Wall)?)
    };
    for e in &r.entries {
        let mut row = vec![e.name.clone()];
        row.extend(r.engines.iter().map(|x| times(factor(e, x))));
        rows.push(row);
    }
    let mut row = vec!["geometric mean".to_owned()];
    row.extend(
        r.engines
            .iter()
            .map(|x| times(mean(r.entries.iter().filter_map(|e| factor(e, x))))),
    );
    rows.push(row);
    text.push_str(&columns(&rows));
    text.push_str(
        "throughput by time that passed; only true where that many host CPUs were free\n\n",
    );
}

fn boots(r: &Results, clock: Clock, text: &mut String) {
    let of = |boots: &[super::result::Boot]| -> Vec<f64> {
        boots
            .iter()
            .map(|b| match clock {
                Clock::Wall => b.kernel_s,
                Clock::Cpu => b.kernel_cpu_s,
            })
            .collect()
    };
    let mut tcg = None;
    for (name, boots) in &r.boots {
        let times = of(boots);
        let Some(m) = median(&times) else { continue };
        let before: Vec<f64> = boots.iter().map(|b| b.before_s).collect();
        let _ = write!(
            text,
            "boot, kernel's first line to init: {name} {m:.2} s (spread {}; {:.2} s before that)",
            percent(spread(&times)),
            median(&before).unwrap_or(0.0)
        );
        match tcg {
            _ if name == TCG => tcg = Some(m),
            Some(t) => {
                let _ = write!(text, ", {:.2} of TCG's", m / t);
            }
            None => {}
        }
        text.push('\n');
    }
}

/// What makes a reader doubt.
fn remarks(r: &Results, clock: Clock, text: &mut String) {
    for e in &r.entries {
        if ratio(e, PYRITE, TCG, clock).is_some_and(|x| x < 1.0) {
            let _ = writeln!(text, "SLOWER THAN TCG: {}", e.name);
        }
        for s in &e.series {
            for why in &s.failures {
                let _ = writeln!(text, "FAILED: {} on {}: {why}", e.name, s.engine);
            }
            if let Some(d) = deviation(&s.samples) {
                let _ = writeln!(
                    text,
                    "CLOCK: {} on {}: the guest's clock is off by {:+.1} %",
                    e.name,
                    s.engine,
                    100.0 * d
                );
            }
        }
    }
    // One copy of native work that has a CPU to itself uses all of the time; pipes of several
    // processes on one CPU do too.
    let native = r.entries.iter().flat_map(|e| &e.series);
    let shares: Vec<f64> = native
        .filter(|s| s.engine == NATIVE)
        .flat_map(|s| &s.samples)
        .filter(|s| s.copies == 1)
        .map(|s| s.cpu_s / s.host_s)
        .collect();
    if let Some(share) = median(&shares).filter(|s| *s < 0.95) {
        let _ = writeln!(
            text,
            "BUSY HOST: native work had its CPU for {:.0} % of the time (median); --clock cpu leaves \
             the rest out",
            100.0 * share
        );
    }
}

/// Two runs: how much faster the second one's Pyrite is.
pub fn compare(a: &Results, b: &Results, clock: Clock) -> Result<String, String> {
    let mut text = String::new();
    for (name, r) in [("A", a), ("B", b)] {
        let about: Vec<String> = r.about.iter().map(|(k, v)| format!("{k}: {v}")).collect();
        let _ = writeln!(text, "{name}: {}", about.join("; "));
    }
    let _ = writeln!(text, "counted: {}\n", clock.name());
    let engine = |r: &Results| {
        let found = [PYRITE, PYRITE_B]
            .into_iter()
            .find(|e| r.engines.iter().any(|x| x == e));
        found.ok_or("a run without Pyrite has nothing to compare; leave pyrite in --engines")
    };
    let (ours_a, ours_b) = (engine(a)?, engine(b)?);
    let mut rows = vec![
        [
            "workload",
            "A",
            "B",
            "B/A",
            "A/native",
            "B/native",
            "B/A by native",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    let (mut plain, mut fair) = (Vec::new(), Vec::new());
    for ea in &a.entries {
        let Some(eb) = b.entries.iter().find(|e| e.name == ea.name) else {
            continue;
        };
        let (sa, sb) = (ea.median(ours_a, 1, clock), eb.median(ours_b, 1, clock));
        let change = sa.zip(sb).map(|(a, b)| b / a);
        let (fa, fb) = (
            ratio(ea, ours_a, NATIVE, clock),
            ratio(eb, ours_b, NATIVE, clock),
        );
        let by_native = fa.zip(fb).map(|(a, b)| b / a);
        plain.extend(change);
        fair.extend(by_native);
        rows.push(vec![
            ea.name.clone(),
            value(ea, sa),
            value(eb, sb),
            times(change),
            percent(fa),
            percent(fb),
            times(by_native),
        ]);
    }
    if rows.len() == 1 {
        return Err("the two runs have no workload in common".into());
    }
    let mut row = vec!["geometric mean".to_owned(), String::new(), String::new()];
    row.push(times(mean(plain.into_iter())));
    row.extend([String::new(), String::new(), times(mean(fair.into_iter()))]);
    rows.push(row);
    text.push_str(&columns(&rows));
    text.push_str("B/A: above 1, B is faster; by native: each against the native runs beside it\n");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::result::{Boot, Series};
    use super::*;

    fn series(engine: &str, times: &[f64]) -> Series {
        let samples = times.iter().map(|&t| Sample {
            copies: 1,
            guest_s: t,
            host_s: t,
            cpu_s: t,
            rate: None,
        });
        Series {
            engine: engine.into(),
            samples: samples.collect(),
            failures: Vec::new(),
        }
    }

    fn results(pyrite: &[f64]) -> Results {
        let boot = |kernel_s| Boot {
            before_s: 1.0,
            kernel_s,
            kernel_cpu_s: kernel_s,
        };
        Results {
            about: Vec::new(),
            engines: [NATIVE, TCG, PYRITE].map(str::to_owned).to_vec(),
            cpus: 1,
            boots: vec![
                (TCG.into(), vec![boot(2.0)]),
                (PYRITE.into(), vec![boot(0.5)]),
            ],
            entries: vec![Entry {
                name: "work".into(),
                group: Group::Jit.name().into(),
                unit: None,
                series: vec![
                    series(NATIVE, &[1.0, 1.0, 1.0]),
                    series(TCG, &[8.0]),
                    series(PYRITE, pyrite),
                ],
            }],
        }
    }

    #[test]
    fn a_table_has_medians_ratios_means_and_boots() {
        let text = table(&results(&[2.0, 1.9, 2.1]), Clock::Wall);
        let row = text.lines().find(|l| l.starts_with("work ")).expect("row");
        let cells: Vec<&str> = row.split_whitespace().collect();
        let want = "work 1.000 s 8.000 s 2.000 s 50.0 % 4.00 0/0/10 %";
        assert_eq!(cells.join(" "), want);
        for group in ["all", "JIT"] {
            let row = text.lines().find(|l| l.starts_with(group)).expect("mean");
            assert!(row.contains("50.0 %") && row.contains("4.00"), "{row}");
        }
        assert!(!text.contains("crypto"), "a mean over nothing: {text}");
        assert!(
            text.contains("pyrite 0.50 s") && text.contains("0.25 of TCG's"),
            "{text}"
        );
        assert!(!text.contains("SLOWER"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut r = results(&[9.0]);
        let text = table(&r, Clock::Wall);
        assert!(text.contains("SLOWER THAN TCG: work"), "{text}");
        assert!(!text.contains("CLOCK"), "{text}");
        let s = &mut r.entries[0].series[2];
        s.samples[0].guest_s = 8.5;
        s.failures.push("exit status 1".into());
        let text = table(&r, Clock::Wall);
        assert!(
            text.contains("CLOCK: work on pyrite: the guest's clock is off by -5.6 %"),
            "{text}"
        );
        assert!(
            text.contains("FAILED: work on pyrite: exit status 1"),
            "{text}"
        );
    }

    #[test]
    fn two_runs_are_compared_also_by_their_native_runs() {
        let a = results(&[4.0]);
        let mut b = results(&[4.0]);
        // The second host was half as fast.
        b.entries[0].series[0] = series(NATIVE, &[2.0]);
        let text = compare(&a, &b, Clock::Wall).expect("compares");
        let row = text.lines().find(|l| l.starts_with("work ")).expect("row");
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(
            cells.join(" "),
            "work 4.000 s 4.000 s 1.00 25.0 % 50.0 % 2.00"
        );
        b.entries[0].name = "other".into();
        assert!(compare(&a, &b, Clock::Wall).is_err());
    }
}
