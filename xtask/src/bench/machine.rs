//! A running guest (or chroot) whose runner takes requests; `xtask/guest/agent.c` is the other end.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::image::Image;
use super::result::{Boot, Sample};
use super::usage;

pub const QEMU: &str = "qemu-system-x86_64";
/// LIMIT: a boot that takes longer has failed.
const BOOT_MAX: Duration = Duration::from_secs(600);
/// LIMIT: answers that need no work.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// LIMIT: bytes of a line; what is longer is cut.
const LINE_MAX: usize = 16 << 10;

/// What runs the workloads.
#[derive(Clone, Debug)]
pub enum Engine {
    /// A chroot.
    Native,
    Tcg,
    /// This executable's software engine, under this name.
    Pyrite(&'static str, PathBuf),
}

impl Engine {
    pub fn name(&self) -> &'static str {
        match self {
            Engine::Native => "native",
            Engine::Tcg => "tcg",
            Engine::Pyrite(name, _) => name,
        }
    }
}

/// What machines have in common.
#[derive(Clone, Debug)]
pub struct Setup {
    pub image: Image,
    pub cpus: u32,
    /// Host CPUs, as `taskset --cpu-list` takes them.
    pub cores: String,
    pub memory_mib: u32,
    pub log_dir: PathBuf,
}

const CHROOT: &str = r#"
set -e
mount --bind "$1" "$1"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc" 2>/dev/null || mount --rbind /proc "$1/proc"
mount -t tmpfs -o mode=1777 tmp "$1/tmp"
mount -o remount,bind,ro "$1"
exec chroot "$1" /bench/bin/agent native
"#;

/// The arguments of `unshare` with which a chroot works here, or what to do.
pub fn unshare_args() -> Result<Vec<&'static str>, String> {
    let mut args = vec!["--mount", "--pid", "--fork", "--kill-child=KILL"];
    let try_it = |args: &[&str]| {
        Command::new("unshare")
            .args(args)
            .args(["--", "true"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
    };
    if try_it(&args) {
        return Ok(args);
    }
    args.extend(["--user", "--map-auto", "--map-root-user"]);
    if try_it(&args) {
        return Ok(args);
    }
    Err(
        "no native runs: a chroot needs root, or user namespaces with subordinate ids (package \
         uidmap, a range for you in /etc/subuid and /etc/subgid); or leave native out with \
         --engines tcg,pyrite"
            .into(),
    )
}

fn command(engine: &Engine, s: &Setup) -> Result<Command, String> {
    let mut c = Command::new("taskset");
    c.args(["--cpu-list", &s.cores]);
    // The early console shows the kernel's first line when it is written.
    let append = "console=ttyS0 earlyprintk=ttyS0,115200 loglevel=7";
    let (cpus, mib) = (s.cpus.to_string(), s.memory_mib.to_string());
    let disk = s.image.disk.display();
    match engine {
        Engine::Native => {
            c.arg("unshare").args(unshare_args()?);
            c.args(["--", "sh", "-c", CHROOT, "sh"]).arg(&s.image.tree);
        }
        Engine::Tcg => {
            let accel = if s.cpus > 1 {
                "tcg,thread=multi"
            } else {
                "tcg"
            };
            c.args([QEMU, "-accel", accel, "-cpu", "max", "-machine", "q35"])
                .args(["-smp", &cpus, "-m", &mib, "-nodefaults", "-no-reboot"])
                .args(["-display", "none", "-serial", "stdio", "-append", append])
                .arg("-drive")
                .arg(format!("file={disk},format=raw,if=virtio,readonly=on"))
                .arg("-kernel")
                .arg(&s.image.kernel)
                .arg("-initrd")
                .arg(&s.image.initrd);
        }
        Engine::Pyrite(_, path) => {
            c.arg(path)
                .args(["run", "--engine", "soft", "--console", "serial"])
                .args(["--net", "none", "--no-reboot", "--cpus", &cpus])
                .args(["--memory", &format!("{mib}M"), "--append", append])
                .arg("--disk")
                .arg(format!("{disk},ro"))
                .arg("--kernel")
                .arg(&s.image.kernel)
                .arg("--initrd")
                .arg(&s.image.initrd);
        }
    }
    Ok(c)
}

/// One that runs. It goes away with this.
pub struct Machine {
    pub engine: Engine,
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<(Instant, String)>,
    started: Instant,
    log: PathBuf,
    requests: u64,
}

impl Machine {
    /// Starts it; it is not ready yet.
    pub fn start(engine: &Engine, setup: &Setup) -> Result<Machine, String> {
        let log = setup.log_dir.join(format!("{}.log", engine.name()));
        let fail = |e| format!("{}: {e}", log.display());
        let mut copy = File::create(&log).map_err(fail)?;
        let errors = copy.try_clone().map_err(fail)?;
        let started = Instant::now();
        let mut child = command(engine, setup)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(|e| format!("cannot start taskset (package util-linux): {e}"))?;
        let input = child.stdin.take();
        let mut output = child.stdout.take().ok_or("no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            let mut line = Vec::new();
            while let Ok(n @ 1..) = output.read(&mut piece) {
                let now = Instant::now();
                let piece = piece.get(..n).unwrap_or_default();
                let _ = copy.write_all(piece);
                for &b in piece {
                    if b != b'\n' {
                        if line.len() < LINE_MAX {
                            line.push(b);
                        }
                        continue;
                    }
                    let text = String::from_utf8_lossy(&line).trim().to_owned();
                    line.clear();
                    if sender.send((now, text)).is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Machine {
            engine: engine.clone(),
            child,
            input,
            lines,
            started,
            log,
            requests: 0,
        })
    }

    /// Waits for a line that `wanted` takes.
    fn line<T>(
        &self,
        limit: Duration,
        what: &str,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<(Instant, T), String> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((_, line)) if line.contains("@fatal") => {
                    return Err(format!("{}: {line}", self.engine.name()));
                }
                Ok((at, line)) => {
                    if let Some(found) = wanted(&line) {
                        return Ok((at, found));
                    }
                }
                Err(e) => {
                    let why = match e {
                        RecvTimeoutError::Timeout => "does not answer",
                        RecvTimeoutError::Disconnected => "has ended",
                    };
                    return Err(format!(
                        "{} {why} (waiting for {what}); see {}",
                        self.engine.name(),
                        self.log.display()
                    ));
                }
            }
        }
    }

    fn cpu_time(&self) -> Duration {
        usage::cpu_time(&usage::family(self.child.id()))
    }

    /// Follows a boot up to the first line of init.
    pub fn boot(&self) -> Result<Boot, String> {
        let holds = |text: &'static str| move |l: &str| l.contains(text).then_some(());
        let (first, ()) = self.line(BOOT_MAX, "the kernel", holds("Linux version "))?;
        let cpu = self.cpu_time();
        let (init, ()) = self.line(BOOT_MAX, "init", holds("@init"))?;
        Ok(Boot {
            before_s: (first - self.started).as_secs_f64(),
            kernel_s: (init - first).as_secs_f64(),
            kernel_cpu_s: (self.cpu_time() - cpu).as_secs_f64(),
        })
    }

    /// Waits until it takes requests.
    pub fn ready(&self) -> Result<(), String> {
        self.line(BOOT_MAX, "the runner", |l| {
            l.contains("@ready").then_some(())
        })?;
        Ok(())
    }

    fn send(&mut self, line: &str) -> Result<(), String> {
        let name = self.engine.name();
        let input = self.input.as_mut().ok_or("no input")?;
        writeln!(input, "{line}")
            .and_then(|()| input.flush())
            .map_err(|e| format!("{name}: {e}; see {}", self.log.display()))
    }

    /// Runs `copies` of a command at once. `Err(Lost)`: this machine is of no use any more.
    pub fn run(&mut self, command: &str, copies: u32, limit_s: u32) -> Result<Sample, Failure> {
        self.requests += 1;
        let id = self.requests;
        let before = self.cpu_time();
        let lost = Failure::Lost;
        self.send(&format!("{id} {copies} {limit_s} {command}"))
            .map_err(lost)?;
        let mark = format!("@B {id} ");
        let (begin, guest_begin) = self
            .line(ANSWER_MAX, "a start", |l| number(l, &mark))
            .map_err(lost)?;
        let (mark, value, output) = (
            format!("@E {id} "),
            format!("@V {id} "),
            format!("@O {id} "),
        );
        let (mut rates, mut words) = (Vec::new(), Vec::new());
        // The runner keeps the limit; this is for a guest that hangs.
        let limit = Duration::from_secs(u64::from(limit_s)) + ANSWER_MAX;
        let (end, (guest_end, status, own)) = self
            .line(limit, "an end", |l| {
                if let Some((_, rest)) = l.split_once(&value) {
                    rates.push(rest.trim().parse::<f64>().ok());
                } else if let Some((_, rest)) = l.split_once(&output) {
                    words.push(rest.trim().to_owned());
                }
                let (_, rest) = l.split_once(&mark)?;
                let mut n = rest.split_whitespace().map(str::parse::<i64>);
                Some((n.next()?.ok()?, n.next()?.ok()?, n.next()?.ok()?))
            })
            .map_err(lost)?;
        let cpu_s = match self.engine {
            Engine::Native => own as f64 / 1e9,
            _ => (self.cpu_time() - before).as_secs_f64(),
        };
        self.send("clean").map_err(lost)?;
        self.line(ANSWER_MAX, "clean-up", |l| {
            l.contains("@clean").then_some(())
        })
        .map_err(lost)?;
        if status == 124 {
            return Err(Failure::Failed(format!("took more than {limit_s} s")));
        }
        if status != 0 {
            return Err(Failure::Failed(format!(
                "exit status {status}: {}",
                words.join("; ")
            )));
        }
        let rates: Option<Vec<f64>> = rates.into_iter().collect();
        let rates = rates.ok_or_else(|| Failure::Failed("a rate is not a number".into()))?;
        Ok(Sample {
            copies,
            guest_s: (guest_end - guest_begin) as f64 / 1e9,
            host_s: (end - begin).as_secs_f64(),
            cpu_s,
            rate: (rates.len() == copies as usize).then(|| rates.iter().sum()),
        })
    }

    /// Where its console went.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

/// Why there is no sample.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The workload failed.
    Failed(String),
    /// The machine does not answer.
    Lost(String),
}

fn number(line: &str, mark: &str) -> Option<i64> {
    line.split_once(mark)?
        .1
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.send("quit");
        self.input = None;
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
