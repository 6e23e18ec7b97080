//! `cargo xtask bench boot`: time from start to the first shell prompt, against QEMU's TCG, in one
//! run: same kernel, initramfs, memory and CPUs, alternating.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROMPT: &[u8] = b"root@pyrite:";
/// LIMIT: a boot that takes longer has failed.
const BOOT_MAX: Duration = Duration::from_secs(120);
const QEMU: &str = "qemu-system-x86_64";

/// Times `rounds` boots of each with `cpus` vCPUs and prints medians and their ratio.
pub fn boot(rounds: usize, cpus: u32) -> Result<(), String> {
    let pyrite = super::pyrite()?;
    Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .map_err(|e| format!("{QEMU}: {e}; install the package qemu-system-x86"))?;
    let ours = || {
        let mut c = Command::new(&pyrite);
        c.args([
            "run",
            "--engine",
            "soft",
            "--memory",
            "512M",
            "--cpus",
            &cpus.to_string(),
        ]);
        c
    };
    // The first boot fetches the guest if need be; it does not count.
    time(ours())?;
    let guest = guest_dir()?;
    let qemu = |g: &Path| {
        let mut c = Command::new(QEMU);
        let accel = if cpus > 1 { "tcg,thread=multi" } else { "tcg" };
        c.args([
            "-accel",
            accel,
            "-cpu",
            "max",
            "-m",
            "512",
            "-nographic",
            "-no-reboot",
        ])
        .args(["-smp", &cpus.to_string(), "-append", "console=ttyS0"])
        .args(["-nic", "user,model=virtio-net-pci"])
        .arg("-kernel")
        .arg(g.join("vmlinuz"))
        .arg("-initrd")
        .arg(g.join("initrd.img"));
        c
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for n in 1..=rounds {
        let (p, q) = (time(ours())?, time(qemu(&guest))?);
        println!(
            "round {n}: pyrite {:.2} s, qemu tcg {:.2} s",
            p.as_secs_f64(),
            q.as_secs_f64()
        );
        a.push(p);
        b.push(q);
    }
    let (a, b) = (median(a), median(b));
    println!(
        "median of {rounds}, {cpus} vCPU: pyrite {a:.2} s, qemu tcg {b:.2} s, ratio {:.2}",
        a / b
    );
    Ok(())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times
        .get(times.len() / 2)
        .map_or(0.0, Duration::as_secs_f64)
}

/// Where `pyrite run` keeps the guest that it fetched: the newest one.
fn guest_dir() -> Result<PathBuf, String> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")));
    let dir = cache
        .ok_or("neither XDG_CACHE_HOME nor HOME is set")?
        .join("pyrite/guests");
    let newest = std::fs::read_dir(&dir)
        .map_err(|e| format!("{}: {e}", dir.display()))?
        .flatten()
        .filter(|e| e.path().join("vmlinuz").is_file())
        .max_by_key(|e| e.metadata().and_then(|m| m.modified()).ok());
    newest
        .map(|e| e.path())
        .ok_or_else(|| format!("no guest in {}", dir.display()))
}

/// Starts a machine, waits for the prompt, ends it.
fn time(mut command: Command) -> Result<Duration, String> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot start {:?}: {e}", command.get_program()))?;
    let mut out = child.stdout.take().ok_or("no output")?;
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut buf = [0; 4096];
        while let Ok(n) = out.read(&mut buf) {
            if n == 0 {
                break;
            }
            seen.extend_from_slice(&buf[..n]);
            if seen.windows(PROMPT.len()).any(|w| w == PROMPT) {
                let _ = tx.send(());
                break;
            }
        }
        // Keep reading so that the machine is not blocked while it is ended.
        while out.read(&mut buf).is_ok_and(|n| n > 0) {}
    });
    let reached = rx.recv_timeout(BOOT_MAX).is_ok();
    let took = start.elapsed();
    end(&mut child);
    if reached {
        Ok(took)
    } else {
        Err(format!("{:?}: no prompt", command.get_program()))
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
