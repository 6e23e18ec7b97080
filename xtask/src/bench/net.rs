//! `cargo xtask bench net`: what iperf3 in a guest measures to the host over the user network, in
//! Pyrite and in QEMU's TCG, in one run: same kernel, initial RAM disk, memory, alternating.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::shell::{Guest, add_program, directory, median};

const QEMU: &str = "qemu-system-x86_64";
const IPERF: &str = "/usr/bin/iperf3";
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
    let guest = directory("network_guest")?;
    let initrd = dir.join("initrd.img");
    add_program(&guest.join("initrd.img"), &initrd, IPERF)?;
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

/// Boots a machine and measures: Mbit/s in each direction.
fn one(mut command: Command, port: u16, seconds: u32) -> Result<[f64; 2], String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut guest = Guest::boot(&mut command)?;
    let mut rates = [0.0; 2];
    for ((_, option), rate) in DIRECTIONS.iter().zip(&mut rates) {
        let line = format!("{IPERF} -c 10.0.2.2 -p {port} -t {seconds} -f m {option}");
        let text = guest.ask(&line, Duration::from_secs(seconds.into()) + SLACK)?;
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
}
