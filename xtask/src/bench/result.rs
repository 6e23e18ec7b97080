//! What a run measured, in memory and as JSON.

use std::path::Path;

use serde_json::{Value, json};

/// Version of the JSON form.
const SCHEMA: u64 = 1;

/// What a report counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Time that passed.
    Wall,
    /// Processor time: of all threads of the VM, or of the native processes.
    Cpu,
}

impl Clock {
    pub fn parse(text: &str) -> Result<Clock, String> {
        match text {
            "wall" => Ok(Clock::Wall),
            "cpu" => Ok(Clock::Cpu),
            _ => Err(format!("--clock: {text:?} is neither wall nor cpu")),
        }
    }
    pub fn name(self) -> &'static str {
        match self {
            Clock::Wall => "time that passed",
            Clock::Cpu => "processor time",
        }
    }
}

/// One run of one workload on one engine.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub copies: u32,
    /// Seconds by the guest's CLOCK_MONOTONIC.
    pub guest_s: f64,
    /// Seconds by the host's clock.
    pub host_s: f64,
    /// Processor seconds on the host.
    pub cpu_s: f64,
    /// What the workload says it did per second, summed over the copies.
    pub rate: Option<f64>,
}

impl Sample {
    /// Work per second: of what `rate` counts, else runs.
    pub fn speed(&self, clock: Clock) -> f64 {
        let wall = self
            .rate
            .unwrap_or(f64::from(self.copies) / self.host_s.max(1e-9));
        match clock {
            Clock::Wall => wall,
            // A rate is work by time that passed.
            Clock::Cpu => wall * self.host_s / self.cpu_s.max(1e-9),
        }
    }
}

/// All runs of one workload on one engine.
#[derive(Clone, Debug)]
pub struct Series {
    pub engine: String,
    pub samples: Vec<Sample>,
    /// Why there are fewer than there should be.
    pub failures: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub group: String,
    /// Of a rate; without one, times are shown.
    pub unit: Option<String>,
    pub series: Vec<Series>,
}

impl Entry {
    pub fn speeds(&self, engine: &str, copies: u32, clock: Clock) -> Vec<f64> {
        self.series
            .iter()
            .filter(|s| s.engine == engine)
            .flat_map(|s| &s.samples)
            .filter(|s| s.copies == copies)
            .map(|s| s.speed(clock))
            .collect()
    }
    pub fn median(&self, engine: &str, copies: u32, clock: Clock) -> Option<f64> {
        median(&self.speeds(engine, copies, clock))
    }
}

/// Timed boots of one engine.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Seconds from the start of the process to the kernel's first line.
    pub before_s: f64,
    /// Seconds from the kernel's first line to the first line of init.
    pub kernel_s: f64,
    /// Processor seconds of that.
    pub kernel_cpu_s: f64,
}

#[derive(Clone, Debug)]
pub struct Results {
    pub about: Vec<(String, String)>,
    pub engines: Vec<String>,
    pub cpus: u32,
    pub boots: Vec<(String, Vec<Boot>)>,
    pub entries: Vec<Entry>,
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut v = values.to_vec();
    v.sort_by(f64::total_cmp);
    let upper = *v.get(v.len() / 2)?;
    if v.len() % 2 == 1 {
        return Some(upper);
    }
    Some((v[v.len() / 2 - 1] + upper) / 2.0)
}

/// Largest minus smallest, as a fraction of the median.
pub fn spread(values: &[f64]) -> Option<f64> {
    let max = values.iter().copied().reduce(f64::max)?;
    let min = values.iter().copied().reduce(f64::min)?;
    median(values).map(|m| (max - min) / m)
}

impl Results {
    pub fn save(&self, path: &Path) -> Result<(), String> {
        let mut text = serde_json::to_string_pretty(&self.to_json()).map_err(|e| e.to_string())?;
        text.push('\n');
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
    }

    pub fn load(path: &Path) -> Result<Results, String> {
        let bad = |e: String| {
            format!(
                "{}: {e}; give a file that `bench guest --json FILE` wrote",
                path.display()
            )
        };
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        Results::from_json(&value).map_err(bad)
    }

    fn to_json(&self) -> Value {
        let series = |s: &Series| {
            let samples: Vec<Value> = s
                .samples
                .iter()
                .map(|s| {
                    json!({ "copies": s.copies, "guest_s": s.guest_s, "host_s": s.host_s,
                            "cpu_s": s.cpu_s, "rate": s.rate })
                })
                .collect();
            json!({ "engine": s.engine, "samples": samples, "failures": s.failures })
        };
        let entries: Vec<Value> = self
            .entries
            .iter()
            .map(|e| {
                json!({ "name": e.name, "group": e.group, "unit": e.unit,
                        "series": e.series.iter().map(series).collect::<Vec<_>>() })
            })
            .collect();
        let boots: Vec<Value> = self
            .boots
            .iter()
            .map(|(engine, boots)| {
                let boots: Vec<Value> = boots
                    .iter()
                    .map(|b| {
                        json!({ "before_s": b.before_s, "kernel_s": b.kernel_s,
                                "kernel_cpu_s": b.kernel_cpu_s })
                    })
                    .collect();
                json!({ "engine": engine, "boots": boots })
            })
            .collect();
        let about: Vec<Value> = self.about.iter().map(|(k, v)| json!([k, v])).collect();
        json!({ "schema": SCHEMA, "about": about, "engines": self.engines, "cpus": self.cpus,
                "boots": boots, "workloads": entries })
    }

    fn from_json(v: &Value) -> Result<Results, String> {
        if v["schema"].as_u64() != Some(SCHEMA) {
            return Err(format!("not results in form {SCHEMA}"));
        }
        let results = || -> Option<Results> {
            let about = v["about"].as_array()?.iter();
            let entries = v["workloads"].as_array()?.iter();
            let boots = v["boots"].as_array()?.iter();
            let engines = v["engines"].as_array()?.iter();
            Some(Results {
                about: about
                    .map(|p| Some((string(&p[0])?, string(&p[1])?)))
                    .collect::<Option<_>>()?,
                engines: engines.map(string).collect::<Option<_>>()?,
                cpus: u32::try_from(v["cpus"].as_u64()?).ok()?,
                boots: boots.map(boots_of).collect::<Option<_>>()?,
                entries: entries.map(entry_of).collect::<Option<_>>()?,
            })
        };
        results().ok_or_else(|| "fields are missing".to_owned())
    }
}

fn string(v: &Value) -> Option<String> {
    v.as_str().map(str::to_owned)
}

fn boots_of(v: &Value) -> Option<(String, Vec<Boot>)> {
    let boots = v["boots"].as_array()?.iter().map(|b| {
        Some(Boot {
            before_s: b["before_s"].as_f64()?,
            kernel_s: b["kernel_s"].as_f64()?,
            kernel_cpu_s: b["kernel_cpu_s"].as_f64()?,
        })
    });
    Some((string(&v["engine"])?, boots.collect::<Option<_>>()?))
}

fn entry_of(v: &Value) -> Option<Entry> {
    let series = v["series"].as_array()?.iter().map(|s| {
        let samples = s["samples"].as_array()?.iter().map(|x| {
            Some(Sample {
                copies: u32::try_from(x["copies"].as_u64()?).ok()?,
                guest_s: x["guest_s"].as_f64()?,
                host_s: x["host_s"].as_f64()?,
                cpu_s: x["cpu_s"].as_f64()?,
                rate: x["rate"].as_f64(),
            })
        });
        let failures = s["failures"].as_array()?.iter().map(string);
        Some(Series {
            engine: string(&s["engine"])?,
            samples: samples.collect::<Option<_>>()?,
            failures: failures.collect::<Option<_>>()?,
        })
    });
    Some(Entry {
        name: string(&v["name"])?,
        group: string(&v["group"])?,
        unit: string(&v["unit"]),
        series: series.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(host_s: f64, cpu_s: f64, rate: Option<f64>) -> Sample {
        Sample {
            copies: 1,
            guest_s: host_s,
            host_s,
            cpu_s,
            rate,
        }
    }

    #[test]
    fn medians_and_spreads() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(spread(&[2.0, 1.0, 4.0]), Some(1.5));
    }

    #[test]
    fn a_host_that_others_use_does_not_change_the_speed_by_processor_time() {
        // Half of the time the processor did something else.
        assert_eq!(sample(4.0, 2.0, None).speed(Clock::Wall), 0.25);
        assert_eq!(sample(4.0, 2.0, None).speed(Clock::Cpu), 0.5);
        assert_eq!(sample(4.0, 2.0, Some(100.0)).speed(Clock::Cpu), 200.0);
    }

    #[test]
    fn results_survive_json() {
        let results = Results {
            about: vec![("host".into(), "a".into())],
            engines: vec!["native".into(), "tcg".into()],
            cpus: 2,
            boots: vec![(
                "tcg".into(),
                vec![Boot {
                    before_s: 0.5,
                    kernel_s: 1.5,
                    kernel_cpu_s: 1.25,
                }],
            )],
            entries: vec![Entry {
                name: "x".into(),
                group: "JIT".into(),
                unit: Some("B/s".into()),
                series: vec![Series {
                    engine: "tcg".into(),
                    samples: vec![sample(1.0, 0.5, Some(7.0)), sample(2.0, 0.5, None)],
                    failures: vec!["why".into()],
                }],
            }],
        };
        let again = Results::from_json(&results.to_json()).expect("reads");
        assert_eq!(format!("{again:?}"), format!("{results:?}"));
        assert!(Results::from_json(&json!({ "schema": 2 })).is_err());
        assert!(Results::from_json(&json!({ "schema": 1 })).is_err());
    }
}
