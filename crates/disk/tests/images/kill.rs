//! A process writes to an image and is killed at any moment.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pyrite_disk::image::{Image as _, References, read_into, write_from};
use pyrite_disk::open::open_qcow2;
use pyrite_disk::qcow2::{CreateOptions, Qcow2, Repair};
use pyrite_disk::storage::HostFile;

use super::{Dir, Random, has_qemu_img, qemu_img};

const SIZE: u64 = 64 << 20;
const PATH_VAR: &str = "PYRITE_TEST_KILLED_IMAGE";
const FIRST_VAR: &str = "PYRITE_TEST_KILLED_FIRST";
/// Operations between two flushes.
const GROUP: u64 = 6;

/// Operation `n` of the load: offset, bytes, and whether it writes zeroes.
fn operation(n: u64) -> (u64, u64, bool) {
    let mut random = Random(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    let at = random.below(SIZE / 512) * 512;
    let max = if random.below(6) == 0 { 700 } else { 16 };
    let len = ((1 + random.below(max)) * 512).min(SIZE - at);
    (at, len, random.below(4) == 0)
}

fn sector(n: u64, sector: u64) -> [u8; 512] {
    let mut out = [0; 512];
    for c in out.chunks_exact_mut(16) {
        c[..8].copy_from_slice(&(n + 1).to_le_bytes());
        c[8..].copy_from_slice(&sector.to_le_bytes());
    }
    out
}

/// What the process that is killed does. Does nothing when it is run as a test.
#[test]
fn killed_process() {
    let (Ok(path), Ok(first)) = (std::env::var(PATH_VAR), std::env::var(FIRST_VAR)) else {
        return;
    };
    let image = open_qcow2(Path::new(&path), false, References::Refuse).expect("open");
    let mut out = std::io::stdout().lock();
    let mut n: u64 = first.parse().expect("number");
    writeln!(out, "\nready").expect("pipe");
    loop {
        let (at, len, zero) = operation(n);
        if zero {
            image.write_zeroes(at, len, true).expect("zeroes");
        } else {
            let data: Vec<u8> = (at / 512..(at + len) / 512)
                .flat_map(|s| sector(n, s))
                .collect();
            write_from(&image, at, &data).expect("write");
        }
        if n % GROUP == GROUP - 1 {
            image.flush().expect("flush");
            writeln!(out, "flushed {n}").expect("pipe");
            out.flush().expect("pipe");
        }
        n += 1;
    }
}

/// What sectors hold: which operation wrote them last, and those that may have since.
#[derive(Default)]
struct Model {
    last: HashMap<u64, u64>,
    done: u64,
}

impl Model {
    fn content(n: Option<u64>, s: u64) -> [u8; 512] {
        match n {
            Some(n) if !operation(n).2 => sector(n, s),
            _ => [0; 512],
        }
    }

    fn advance(&mut self, to: u64) {
        for n in self.done..to {
            let (at, len, _) = operation(n);
            for s in at / 512..(at + len) / 512 {
                self.last.insert(s, n);
            }
        }
        self.done = self.done.max(to);
    }
}

fn rounds() -> u32 {
    let wanted = std::env::var("PYRITE_KILLS");
    wanted.ok().and_then(|n| n.parse().ok()).unwrap_or(10)
}

/// 10 kills; PYRITE_KILLS=300 for more.
#[test]
fn killed_writer_loses_nothing_that_was_flushed() {
    let dir = Dir::new("kill");
    let mut random = Random(0xdead_beef ^ u64::from(std::process::id()));
    for (what, options) in [
        ("default", CreateOptions::new(SIZE)),
        (
            "small clusters",
            CreateOptions {
                cluster_bytes: 4096,
                ..CreateOptions::new(SIZE)
            },
        ),
    ] {
        let path = dir.file(what);
        let file = HostFile::create(&path, false).expect("create");
        pyrite_disk::qcow2::create(&file, &options).expect("create");
        drop(file);
        let mut model = Model::default();
        let mut acknowledged = 0;
        for round in 0..rounds().div_ceil(2) {
            let next = model.done;
            let mut child = Command::new(std::env::current_exe().expect("own name"))
                .args(["--exact", "kill::killed_process", "--nocapture"])
                .env(PATH_VAR, &path)
                .env(FIRST_VAR, next.to_string())
                .stdout(Stdio::piped())
                .spawn()
                .expect("start");
            let mut lines = BufReader::new(child.stdout.take().expect("pipe")).lines();
            loop {
                let line = lines.next().expect("the process lives").expect("pipe");
                if line.contains("ready") {
                    break;
                }
            }
            std::thread::sleep(Duration::from_millis(1 + random.below(250)));
            child.kill().expect("kill");
            child.wait().expect("wait");
            let mut flushed = next;
            for line in lines.map_while(Result::ok) {
                if let Some(n) = line.strip_prefix("flushed ") {
                    flushed = n.parse::<u64>().expect("number") + 1;
                    acknowledged += 1;
                }
            }
            model.advance(flushed);
            let open = |read_only| Box::new(HostFile::open(&path, read_only).expect("open"));
            let report = Qcow2::check(open(true), None).expect("check");
            assert_eq!(report.errors, 0, "{what}, round {round}: {report:?}");
            if has_qemu_img() {
                let out = qemu_img(&["check", "-f", "qcow2", path.to_str().expect("text")]);
                // 3: clusters are lost, but nothing is wrong.
                let code = out.status.code();
                assert!(
                    matches!(code, Some(0 | 3)),
                    "{what}, round {round}: {}",
                    String::from_utf8_lossy(&out.stdout)
                );
            }
            let report = Qcow2::check(open(false), Some(Repair::Leaks)).expect("repair");
            assert!(report.is_clean(), "{what}, round {round}: {report:?}");
            // The next flush may have been done and not been told; then one more was begun.
            let mut maybe: HashMap<u64, Vec<u64>> = HashMap::new();
            let last_possible = flushed + 2 * GROUP;
            for n in flushed..last_possible {
                let (at, len, _) = operation(n);
                for s in at / 512..(at + len) / 512 {
                    maybe.entry(s).or_default().push(n);
                }
            }
            let image = open_qcow2(&path, false, References::Refuse).expect("open");
            let mut part = vec![0; 1 << 20];
            for at in (0..SIZE).step_by(1 << 20) {
                read_into(&image, at, &mut part).expect("read");
                for (n, have) in part.chunks(512).enumerate() {
                    let s = at / 512 + n as u64;
                    let was = model.last.get(&s).copied();
                    let fine = have == Model::content(was, s)
                        || maybe.get(&s).is_some_and(|later| {
                            later.iter().any(|n| have == Model::content(Some(*n), s))
                        });
                    assert!(
                        fine,
                        "{what}, round {round}: sector {s} lost operation {was:?}"
                    );
                }
            }
            // What was not acknowledged becomes known again.
            for (s, _) in maybe {
                let was = model.last.get(&s).copied();
                write_from(&image, s * 512, &Model::content(was, s)).expect("write");
            }
            image.close().expect("close");
        }
        assert!(acknowledged > 0, "{what}: nothing was ever flushed");
        eprintln!("{what}: {acknowledged} flushes acknowledged");
    }
}
