//! `cargo xtask bench net`: what iperf3 in a guest measures to the host over the user network, in
//! Pyrite and in QEMU's TCG, in one run: same kernel, initial RAM disk, memory, alternating.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
const IPERF: &str = "/usr/bin/iperf3";
const PROMPT: &str = "root@pyrite:~# ";
/// LIMIT: a boot that takes longer has failed.
const BOOT_MAX: Duration = Duration::from_secs(180);
/// LIMIT: what a measurement may take besides its own time.
const SLACK: Duration = Duration::from_secs(60);
/// Cards: their name here and in QEMU.
const CARDS: [(&str, &str); 3] = [
    ("virtio", "virtio-net-pci"),
    ("e1000", "e1000"),
    ("rtl8139", "rtl8139"),
];
/// Directions and their options.
const DIRECTIONS: [(&str, &str); 2] = [("from the guest", ""), ("to the guest", "-R")];

/// Measures each card in each direction for `seconds`, `rounds` times.
pub fn net(rounds: usize, seconds: u32) -> Result<(), String> {
    let pyrite = super::pyrite()?;
    let dir = super::target_dir()?.join(format!("bench-net-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let result = measure(&pyrite, &dir, rounds, seconds);
    let _ = fs::remove_dir_all(&dir);
    result
}

fn measure(pyrite: &Path, dir: &Path, rounds: usize, seconds: u32) -> Result<(), String> {
    let guest = guest()?;
    let initrd = dir.join("initrd.img");
    add_iperf(&guest.join("initrd.img"), &initrd)?;
    let server = Server::start()?;
    let kernel = guest.join("vmlinuz");
    let mut ratios = Vec::new();
    for (card, qemu_card) in CARDS {
        let mut all: [[Vec<f64>; 2]; 2] = Default::default();
        for _ in 0..rounds {
            let ours = ours(pyrite, &kernel, &initrd, card);
            let theirs = theirs(&kernel, &initrd, qemu_card);
            for (engine, command) in [ours, theirs].into_iter().enumerate() {
                let rates = one(command, server.port, seconds)?;
                for (direction, rate) in rates.into_iter().enumerate() {
                    all[engine][direction].push(rate);
                }
            }
        }
        let [ours, theirs] = all.map(|e| e.map(median));
        for (n, (direction, _)) in DIRECTIONS.iter().enumerate() {
            let ratio = ours[n] / theirs[n];
            ratios.push(ratio);
            println!(
                "{card:8} {direction:14}: pyrite {:8.0} Mbit/s, qemu tcg {:8.0} Mbit/s, ratio {ratio:.2}",
                ours[n], theirs[n]
            );
        }
    }
    let mean = ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64;
    println!("geometric mean of the ratios: {:.2}", mean.exp());
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Kernel and initial RAM disk of the system tests.
fn guest() -> Result<PathBuf, String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(program)
        .args([
            "run",
            "--quiet",
            "-p",
            "pyrite-tests",
            "--example",
            "network_guest",
        ])
        .arg("--target-dir")
        .arg(super::target_dir()?)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot start cargo: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    if out.status.success() && !text.is_empty() {
        Ok(text.into())
    } else {
        Err("no guest; see above".into())
    }
}

/// Files of iperf3 with its libraries.
fn iperf_files() -> Result<Vec<PathBuf>, String> {
    let missing = "needs iperf3 on this host; install the package iperf3";
    let out = Command::new("ldd")
        .arg(IPERF)
        .output()
        .map_err(|e| format!("ldd: {e}"))?;
    if !out.status.success() {
        return Err(missing.into());
    }
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let libraries = text.split_whitespace().filter(|w| w.starts_with('/'));
    let mut files: Vec<PathBuf> = libraries.map(PathBuf::from).collect();
    files.push(IPERF.into());
    Ok(files)
}

/// An initial RAM disk with iperf3 added: a kernel unpacks several archives one after the other.
fn add_iperf(from: &Path, to: &Path) -> Result<(), String> {
    let mut image = fs::read(from).map_err(|e| format!("{}: {e}", from.display()))?;
    image.resize(image.len().next_multiple_of(512), 0);
    let mut number = 1_000_000;
    let mut dirs: Vec<PathBuf> = Vec::new();
    for file in iperf_files()? {
        let parents: Vec<&Path> = file.ancestors().skip(1).collect();
        for dir in parents.into_iter().rev().skip(1) {
            if !dirs.iter().any(|d| d == dir) {
                entry(&mut image, &mut number, dir, 0o040_755, &[]);
                dirs.push(dir.to_owned());
            }
        }
        let data = fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        entry(&mut image, &mut number, &file, 0o100_755, &data);
    }
    entry(&mut image, &mut number, Path::new("TRAILER!!!"), 0, &[]);
    fs::write(to, image).map_err(|e| format!("{}: {e}", to.display()))
}

/// An entry of a cpio archive ("newc").
fn entry(out: &mut Vec<u8>, number: &mut u32, path: &Path, mode: u32, data: &[u8]) {
    let path = path.to_string_lossy();
    let name = format!("{}\0", path.trim_start_matches('/'));
    *number += 1;
    out.extend_from_slice(b"070701");
    let (size, name_size) = (data.len() as u32, name.len() as u32);
    for field in [*number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// iperf3 on the host's loopback.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start() -> Result<Server, String> {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
        let port = free.map_err(|e| e.to_string())?.port();
        let child = Command::new(IPERF)
            .args(["-s", "--bind", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("{IPERF}: {e}"))?;
        Ok(Server { child, port })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ours(pyrite: &Path, kernel: &Path, initrd: &Path, card: &str) -> Command {
    let mut c = Command::new(pyrite);
    c.args([
        "run",
        "--engine",
        "soft",
        "--memory",
        "512M",
        "--host-loopback",
    ])
    .args(["--net", &format!("user,model={card}")])
    .args(["--append", "console=ttyS0 quiet", "--kernel"])
    .arg(kernel)
    .arg("--initrd")
    .arg(initrd);
    c
}

fn theirs(kernel: &Path, initrd: &Path, card: &str) -> Command {
    let mut c = Command::new(QEMU);
    c.args(["-accel", "tcg", "-cpu", "max", "-machine", "q35"])
        .args(["-m", "512", "-nographic", "-no-reboot"])
        .args(["-nic", &format!("user,model={card}")])
        .args(["-append", "console=ttyS0 quiet", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd);
    c
}

/// A guest at its shell.
struct Guest {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Guest {
    fn until(&mut self, text: &str, limit: Duration) -> Result<String, String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return Ok(before);
            }
            let left = end.saturating_duration_since(Instant::now());
            let piece = self.output.recv_timeout(left).map_err(|e| {
                let tail: String = self
                    .seen
                    .lines()
                    .rev()
                    .take(5)
                    .collect::<Vec<_>>()
                    .join("\n");
                format!("the guest does not answer ({e}):\n{tail}")
            })?;
            self.seen.push_str(&String::from_utf8_lossy(&piece));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Boots a machine and measures: Mbit/s in each direction.
fn one(mut command: Command, port: u16, seconds: u32) -> Result<[f64; 2], String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{name}: {e}"))?;
    let (input, mut from) = child
        .stdin
        .take()
        .zip(child.stdout.take())
        .ok_or("no pipes")?;
    let (sender, output) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut guest = Guest {
        child,
        input,
        output,
        seen: String::new(),
    };
    guest.until(PROMPT, BOOT_MAX)?;
    let mut rates = [0.0; 2];
    for ((_, option), rate) in DIRECTIONS.iter().zip(&mut rates) {
        let line =
            format!("{IPERF} -c 10.0.2.2 -p {port} -t {seconds} -f m {option}; echo e''nd\n");
        guest
            .input
            .write_all(line.as_bytes())
            .map_err(|e| e.to_string())?;
        let text = guest.until("end\r\n", Duration::from_secs(seconds.into()) + SLACK)?;
        guest.until(PROMPT, SLACK)?;
        *rate = received(&text).ok_or_else(|| format!("{name}: iperf3 has failed:\n{text}"))?;
    }
    Ok(rates)
}

/// What the receiver has counted.
fn received(text: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.trim_end().ends_with("receiver"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.iter().position(|w| *w == "Mbits/sec")?;
    words.get(unit.checked_sub(1)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_rate_is_found() {
        let text = "x\r\n[  5]   0.00-4.00   sec   371 MBytes   777 Mbits/sec    5   sender\r\n\
                    [  5]   0.00-4.00   sec   367 MBytes   770 Mbits/sec        receiver\r\n";
        assert_eq!(received(text), Some(770.0));
        assert_eq!(received("iperf3: error"), None);
    }

    #[test]
    fn archive_entries_are_aligned() {
        let (mut out, mut number) = (Vec::new(), 0);
        entry(
            &mut out,
            &mut number,
            Path::new("/a/b"),
            0o100_755,
            b"12345",
        );
        assert_eq!(out.len() % 4, 0);
        assert!(out.starts_with(b"07070100000001000081ed"));
    }
}
