//! `cargo xtask bench disk`: what fio in a guest measures on a raw disk, in Pyrite and in QEMU's
//! TCG, in one run: same kernel, initial RAM disk, memory, file; one machine after the other.
//!
//! The file is in the host's page cache, so what is measured is the way from the guest's program
//! to the host's kernel and back, not a drive.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::shell::{Guest, add_program, directory};

const QEMU: &str = "qemu-system-x86_64";
const FIO: &str = "/usr/bin/fio";
/// LIMIT: what a measurement may take besides its own time.
const SLACK: Duration = Duration::from_secs(120);
/// Bytes of the disk.
const DISK_BYTES: usize = 512 << 20;

/// A controller: its name here, what QEMU calls it, and the disk in the guest.
struct Controller {
    name: &'static str,
    qemu: &'static str,
    device: &'static str,
    /// All cases, or only those with many requests at a time.
    all: bool,
}

const CONTROLLERS: [Controller; 3] = [
    Controller {
        name: "virtio",
        qemu: "virtio-blk-pci,drive=d",
        device: "vda",
        all: true,
    },
    Controller {
        name: "nvme",
        qemu: "nvme,serial=1,drive=d",
        device: "nvme0n1",
        all: false,
    },
    Controller {
        name: "ahci",
        qemu: "ide-hd,bus=ide.0,drive=d",
        device: "sda",
        all: false,
    },
];

/// One fio job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    how: &'static str,
    block: &'static str,
    depth: u32,
}

impl Case {
    fn name(self) -> String {
        format!("{}-{}-{}", self.how, self.block, self.depth)
    }
}

fn cases(all: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for depth in [1, 32] {
        for block in ["4k", "1M"] {
            for how in ["read", "write", "randread", "randwrite"] {
                if all || depth > 1 {
                    cases.push(Case { how, block, depth });
                }
            }
        }
    }
    cases
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    seconds: u32,
    json: Option<PathBuf>,
    controllers: Vec<String>,
    /// Format of the disk: raw, or qcow2.
    format: String,
}

impl Options {
    pub fn parse(args: &[String]) -> Result<Options, String> {
        let mut options = Options {
            seconds: 3,
            json: None,
            controllers: Vec::new(),
            format: "raw".into(),
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value"));
            match arg.as_str() {
                "--seconds" => {
                    let n = value()?.parse().ok().filter(|n| *n > 0);
                    options.seconds = n.ok_or("--seconds is a number from 1")?;
                }
                "--json" => options.json = Some(value()?.into()),
                "--format" => {
                    let format = value()?;
                    if format != "raw" && format != "qcow2" {
                        return Err(format!("--format {format}: expected raw or qcow2"));
                    }
                    options.format.clone_from(format);
                }
                name if CONTROLLERS.iter().any(|c| c.name == name) => {
                    options.controllers.push(name.to_owned());
                }
                other => {
                    return Err(format!(
                        "{other:?}: expected --seconds N, --format raw|qcow2, --json FILE, or \
                         virtio, nvme, ahci"
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// Measures and prints.
pub fn disk(options: &Options) -> Result<(), String> {
    let pyrite = super::pyrite()?;
    let dir = super::target_dir()?.join(format!("bench-disk-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let result = measure(&pyrite, &dir, options);
    let _ = fs::remove_dir_all(&dir);
    result
}

/// A disk full of data.
fn make_disk(dir: &Path, format: &str) -> Result<PathBuf, String> {
    let path = dir.join("disk");
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = fs::File::create(&path).map_err(failed)?;
    let mut part = vec![0_u8; 1 << 20];
    let mut state = 1_u64;
    for _ in 0..DISK_BYTES >> 20 {
        for c in part.chunks_exact_mut(8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            c.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&part).map_err(failed)?;
    }
    if format == "raw" {
        return Ok(path);
    }
    let image = dir.join("image");
    let done = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", format])
        .args([&path, &image])
        .status()
        .map_err(|e| format!("qemu-img: {e}"))?;
    fs::remove_file(&path).map_err(failed)?;
    if done.success() {
        Ok(image)
    } else {
        Err("qemu-img has failed".into())
    }
}

fn measure(pyrite: &Path, dir: &Path, options: &Options) -> Result<(), String> {
    let guest = directory("storage_guest")?;
    let initrd = dir.join("initrd.img");
    add_program(&guest.join("initrd.img"), &initrd, FIO)?;
    let kernel = guest.join("vmlinuz");
    let disk = make_disk(dir, &options.format)?;
    let (mut ratios, mut rows) = (Vec::new(), Vec::new());
    for c in &CONTROLLERS {
        if !options.controllers.is_empty() && !options.controllers.iter().any(|n| n == c.name) {
            continue;
        }
        let ours = Machine::pyrite(pyrite, &kernel, &initrd, &disk, &options.format, c);
        let theirs = Machine::qemu(&kernel, &initrd, &disk, &options.format, c);
        let ours = one(ours.0, c, options.seconds)?;
        let theirs = one(theirs.0, c, options.seconds)?;
        for (n, case) in cases(c.all).into_iter().enumerate() {
            let (ours, theirs) = (ours[n], theirs[n]);
            let ratio = ours / theirs;
            ratios.push(ratio);
            println!(
                "{:7} {:9} {:>2} x{:2}: pyrite {ours:7.1} MiB/s, qemu tcg {theirs:7.1} MiB/s, \
                 ratio {ratio:5.2}",
                c.name, case.how, case.block, case.depth
            );
            rows.push(json!({
                "controller": c.name, "rw": case.how, "block": case.block, "depth": case.depth,
                "pyrite_mib_per_s": ours, "tcg_mib_per_s": theirs, "ratio": ratio,
            }));
        }
    }
    let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    println!("geometric mean of the ratios: {mean:.2}; the least: {least:.2}");
    if let Some(path) = &options.json {
        let all = json!({
            "format": options.format, "seconds": options.seconds, "cases": rows,
            "mean_ratio": mean, "least_ratio": least,
        });
        let text = serde_json::to_string_pretty(&all).map_err(|e| e.to_string())?;
        fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

struct Machine(Command);

impl Machine {
    fn pyrite(
        pyrite: &Path,
        kernel: &Path,
        initrd: &Path,
        disk: &Path,
        format: &str,
        c: &Controller,
    ) -> Machine {
        let mut m = Command::new(pyrite);
        m.args(["run", "--engine", "soft", "--memory", "1G", "--net", "none"])
            .arg("--disk")
            .arg(format!("{},format={format},bus={}", disk.display(), c.name))
            .args(["--append", "console=ttyS0 quiet", "--kernel"])
            .arg(kernel)
            .arg("--initrd")
            .arg(initrd);
        Machine(m)
    }

    fn qemu(kernel: &Path, initrd: &Path, disk: &Path, format: &str, c: &Controller) -> Machine {
        let mut m = Command::new(QEMU);
        m.args(["-accel", "tcg", "-cpu", "max", "-machine", "q35"])
            .args(["-m", "1G", "-nographic", "-no-reboot", "-nic", "none"])
            .arg("-drive")
            .arg(format!(
                "file={},format={format},if=none,id=d",
                disk.display()
            ))
            .args(["-device", c.qemu])
            .args(["-append", "console=ttyS0 quiet", "-kernel"])
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd);
        Machine(m)
    }
}

/// Boots a machine and runs fio: MiB/s of each case.
fn one(mut command: Command, c: &Controller, seconds: u32) -> Result<Vec<f64>, String> {
    let mut guest = Guest::boot(&mut command)?;
    let cases = cases(c.all);
    let mut line = format!(
        "{FIO} --output-format=terse --terse-version=3 --ioengine=libaio --direct=1 \
         --filename=/dev/{} --time_based --runtime={seconds} --ramp_time=1 --thread --stonewall \
         --invalidate=0 --randrepeat=1 --gtod_reduce=1",
        c.device
    );
    for case in &cases {
        line += &format!(
            " --name={} --rw={} --bs={} --iodepth={} --stonewall",
            case.name(),
            case.how,
            case.block,
            case.depth
        );
    }
    // The line editor of the shell is not made for this.
    let script = format!(
        "cat >/bench <<'X'\n{}\nX",
        line.replace(" --name", " \\\n--name")
    );
    guest.ask(&script, SLACK)?;
    let time = Duration::from_secs(u64::from(seconds + 2) * cases.len() as u64) + SLACK;
    let text = guest.ask("sh /bench 2>&1", time)?;
    cases
        .iter()
        .map(|case| rate(&text, *case).ok_or_else(|| format!("fio has failed:\n{text}")))
        .collect()
}

/// MiB/s of a case in fio's terse output, version 3.
fn rate(text: &str, case: Case) -> Option<f64> {
    let mut lines = text.lines().map(|l| l.split(';').collect::<Vec<_>>());
    let name = case.name();
    let fields = lines.find(|f| f.first() == Some(&"3") && f.get(2) == Some(&name.as_str()))?;
    if fields.get(4) != Some(&"0") {
        return None;
    }
    let at = if case.how.ends_with("read") { 6 } else { 47 };
    let kib: f64 = fields.get(at)?.parse().ok()?;
    (kib > 0.0).then_some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_found_in_fios_output() {
        let mut fields = vec!["0"; 130];
        (fields[0], fields[2], fields[6], fields[47]) = ("3", "read-4k-1", "2048", "4096");
        let mut text = format!("fio: warning\r\n{}\r\n", fields.join(";"));
        fields[2] = "randwrite-1M-32";
        text += &format!("{}\r\n", fields.join(";"));
        let case = |how, block, depth| Case { how, block, depth };
        assert_eq!(rate(&text, case("read", "4k", 1)), Some(2.0));
        assert_eq!(rate(&text, case("randwrite", "1M", 32)), Some(4.0));
        assert_eq!(rate(&text, case("write", "1M", 32)), None);
        assert_eq!(cases(true).len(), 16);
        assert_eq!(cases(false).len(), 8);
    }

    #[test]
    fn options_are_understood() {
        let parse = |text: &str| {
            let args: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            Options::parse(&args)
        };
        let o = parse("--seconds 5 nvme --json x --format qcow2").unwrap();
        assert_eq!((o.seconds, o.controllers), (5, vec!["nvme".to_owned()]));
        for wrong in ["--seconds", "--seconds 0", "floppy", "--format vdi"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
