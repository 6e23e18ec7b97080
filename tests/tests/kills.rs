//! A VM process is killed at random moments while its guest writes to a qcow2 disk: the image has
//! no error, and everything that was flushed and acknowledged is there.
//!
//! 6 kills; PYRITE_KILLS=300 for more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::fixtures;
use pyrite_tests::vm::{STEP, Vm, with};
use pyrite_tests::{Scratch, run};
use pyrite_vmm::boot::cpio::CpioWriter;

#[path = "../fixtures/guest/flush_operations.rs"]
mod flush_operations;

use flush_operations::{GROUP, checksum, operation, sector};

const SIZE: u64 = 64 << 20;
/// How far the guest can be ahead of what it has told: operations whose acknowledgement was on its
/// way, or in the process that was killed.
const AHEAD: u64 = 4096;
/// Rounds with one image.
const ROUNDS: u32 = 12;

/// Kinds of image, one after the other.
const KINDS: [(&str, &[&str]); 4] = [
    ("default", &[]),
    ("4 KiB clusters", &["--cluster-size", "4K"]),
    ("extended L2", &["--extended-l2"]),
    ("version 2", &["--qcow2-version", "2"]),
];

/// The writer as a static program, or why there is none.
fn writer(dir: &Scratch) -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/guest/flush_writer.rs");
    let program = dir.0.join("flush_writer");
    let rustc = Path::new(env!("CARGO")).with_file_name("rustc");
    let rustc = if rustc.exists() {
        rustc
    } else {
        "rustc".into()
    };
    let out = Command::new(rustc)
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
        ])
        .args([
            "-C",
            "strip=symbols",
            "--target",
            "x86_64-unknown-linux-gnu",
        ])
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .output()
        .map_err(|e| format!("rustc: {e}"))?;
    if out.status.success() {
        Ok(program)
    } else {
        let text = String::from_utf8_lossy(&out.stderr);
        Err(format!("no static program can be made here: {text}"))
    }
}

/// The initial RAM disk with the writer added.
fn add(initrd: &Path, program: &Path, dir: &Scratch) -> PathBuf {
    let mut image = fs::read(initrd).expect("initrd");
    image.resize(image.len().next_multiple_of(512), 0);
    let mut more = CpioWriter::new(image);
    let data = fs::read(program).expect("program");
    more.file("bin/flush_writer", 0o755, &data).expect("cpio");
    let path = dir.0.join("initrd");
    fs::write(&path, more.finish().expect("cpio")).expect("initrd");
    path
}

/// What a sector holds: 0 as long as it was never written, else number of the operation + 1; and
/// whether that was zeroes.
#[derive(Clone, Copy, Default)]
struct Holds {
    by: u64,
    data: bool,
}

/// What is known of the disk.
struct Model {
    sectors: Vec<Holds>,
    /// Operations that are durable.
    done: u64,
}

impl Model {
    fn new(first: u64) -> Model {
        Model {
            sectors: vec![Holds::default(); (SIZE / 512) as usize],
            done: first,
        }
    }

    fn acknowledged(&mut self, done: u64) {
        for n in self.done..done {
            let (at, len, zero) = operation(n, SIZE);
            for s in &mut self.sectors[(at / 512) as usize..((at + len) / 512) as usize] {
                *s = Holds {
                    by: n + 1,
                    data: !zero,
                };
            }
        }
        self.done = self.done.max(done);
    }

    /// Compares the disk with what must be there, and learns what of the rest is.
    fn check(&mut self, disk: &[u8], what: &str) -> u64 {
        // Later operations that may have zeroed a sector.
        let mut zeroed = vec![0; self.sectors.len()];
        let mut last = self.done;
        for n in self.done..self.done + AHEAD {
            let (at, len, zero) = operation(n, SIZE);
            if zero {
                zeroed[(at / 512) as usize..((at + len) / 512) as usize].fill(n + 1);
            }
        }
        for (s, have) in (0_u64..).zip(disk.chunks_exact(512)) {
            let known = &mut self.sectors[s as usize];
            let by = u64::from_le_bytes(have[..8].try_into().expect("8 bytes"));
            if by == 0 {
                assert!(have.iter().all(|b| *b == 0), "{what}: sector {s} is torn");
                let fine = !known.data || zeroed[s as usize] != 0;
                assert!(fine, "{what}: sector {s} lost operation {}", known.by - 1);
                if known.data {
                    let by = zeroed[s as usize];
                    *known = Holds { by, data: false };
                }
                continue;
            }
            let n = by - 1;
            assert!(
                by >= known.by && n < self.done + AHEAD,
                "{what}: sector {s} has operation {n}, not {}",
                known.by.wrapping_sub(1)
            );
            let (at, len, zero) = operation(n, SIZE);
            let covers = !zero && (at / 512..(at + len) / 512).contains(&s);
            assert!(
                covers && have == sector(n, s),
                "{what}: sector {s} of {n} is foreign"
            );
            last = last.max(by);
            *known = Holds { by, data: true };
        }
        last
    }
}

/// Ends the VM process of a session as a crash would.
fn kill(vm: &Vm) {
    let pid = vm.session.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.expect("children");
    let child = children.split_whitespace().next().expect("a VM process");
    let done = Command::new("kill").args(["-KILL", child]).status();
    assert!(done.expect("kill").success());
}

/// Leaked clusters; anything worse fails.
fn check(image: &Path, what: &str) -> u64 {
    let text = image.display().to_string();
    let ours = run(&["image", "check", "-f", "qcow2", &text]);
    let code = ours.status.code();
    let shown = String::from_utf8_lossy(&ours.stdout).into_owned();
    // 4: clusters are lost, but nothing is wrong.
    assert!(matches!(code, Some(0 | 4)), "{what}: {code:?} {shown}");
    let Ok(out) = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", &text])
        .output()
    else {
        pyrite_tests::skipped("there is no qemu-img here to check with");
        return u64::from(code == Some(4));
    };
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    // 3: the same.
    match out.status.code() {
        Some(0) => 0,
        Some(3) => {
            let leaks = shown
                .lines()
                .find(|l| l.contains("leaked clusters were found"));
            let count = leaks.and_then(|l| l.split_whitespace().next()?.parse().ok());
            count.unwrap_or_else(|| panic!("{what}: {shown}"))
        }
        code => panic!("{what}: {code:?} {shown}"),
    }
}

fn pyrite_image(args: &[&str]) {
    let out = run(&[&["image"], args].concat());
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {error}");
}

fn rounds() -> u32 {
    let wanted = std::env::var("PYRITE_KILLS");
    wanted.ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

#[test]
fn a_killed_vm_loses_nothing_that_was_flushed() {
    let dir = Scratch::new("kills");
    let made = fixtures::storage_guest().and_then(|g| Ok((g, writer(&dir)?)));
    let (guest, program) = match made {
        Ok(made) => made,
        Err(why) => return pyrite_tests::skipped(why),
    };
    let initrd = add(&guest.initrd, &program, &dir);
    let seed = std::process::id() as u64 ^ 0x1234_5678_9abc;
    let began = Instant::now();
    let (mut next, mut model) = (0_u64, Model::new(0));
    let (mut flushes, mut leaking, mut leaked, mut unacknowledged) = (0_u64, 0_u64, 0_u64, 0_u64);
    let image = dir.0.join("disk.qcow2");
    let text = image.display().to_string();
    let kills = rounds();
    // Booted once: the guest at its shell, which has not touched the disk.
    pyrite_image(&["create", "-f", "qcow2", &text, "64M"]);
    let boot = with(&[
        ("--net", "none".into()),
        ("--memory", "128M".into()),
        ("--disk", format!("{text},format=qcow2")),
    ]);
    let guest = fixtures::Guest { initrd, ..guest };
    let vm = Vm::boot(&dir, &guest, &boot);
    let snapshot = dir.0.join("snapshot").display().to_string();
    vm.done(&["snapshot", &snapshot]);
    vm.stop();
    let restore = with(&[("--restore", snapshot)]);
    let each = ROUNDS.min(kills.div_ceil(KINDS.len() as u32)).max(1);
    for round in 0..kills {
        let (kind, options) = KINDS[(round / each) as usize % KINDS.len()];
        let what = format!("kill {round}, {kind}");
        if round % each == 0 {
            let _ = fs::remove_file(&image);
            let create = ["create", "-f", "qcow2"];
            pyrite_image(&[&create[..], options, &[&text, "64M"]].concat());
            model = Model::new(next);
        }
        let mut vm = Vm::start(&dir, "control", &restore);
        vm.session
            .send(&format!("flush_writer /dev/vda {SIZE} {next}\n"));
        vm.session.expect("\nF ", STEP);
        // A fraction of a second that every run of this test chooses anew.
        let x = (seed.wrapping_add(u64::from(round))).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        std::thread::sleep(Duration::from_millis((x >> 40) % 700));
        kill(&vm);
        let mut done = next;
        let said = format!("\nF {}", ended(vm));
        for line in said.lines().filter_map(|l| l.strip_prefix("F ")) {
            // The last line may be cut off.
            let Some((n, sum)) = line
                .trim_end()
                .strip_suffix('.')
                .and_then(|l| l.split_once(' '))
            else {
                continue;
            };
            let n: u64 = n.parse().expect("a number");
            assert_eq!(
                sum,
                format!("{:016x}", checksum(n / GROUP, SIZE)),
                "{what}: {n}"
            );
            assert_eq!(n + 1, done + GROUP, "{what}: one group after the other");
            done = n + 1;
            flushes += 1;
        }
        assert!(done > next, "{what}: nothing was acknowledged:\n{said}");
        model.acknowledged(done);
        let leaks = check(&image, &what);
        leaking += u64::from(leaks > 0);
        leaked += leaks;
        if leaks > 0 {
            pyrite_image(&["check", "-f", "qcow2", "--repair", "leaks", &text]);
            assert_eq!(check(&image, &what), 0, "{what}: repaired");
        }
        let raw = dir.0.join("raw");
        pyrite_image(&[
            "convert",
            "-q",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "--overwrite",
            &text,
            &raw.display().to_string(),
        ]);
        let last = model.check(&fs::read(&raw).expect("raw"), &what);
        unacknowledged += last - done;
        // What was begun and not acknowledged is over: new operations from here.
        next = (done + AHEAD).next_multiple_of(GROUP);
        model.done = next;
    }
    println!(
        "{kills} kills in {:.0} s: {flushes} flushes acknowledged, none lost; {unacknowledged} \
         later operations found; after {leaking} kills clusters were leaked, {leaked} in all",
        began.elapsed().as_secs_f64()
    );
}

/// The rest of what a killed VM has printed.
fn ended(vm: Vm) -> String {
    vm.session.end(STEP).1
}
