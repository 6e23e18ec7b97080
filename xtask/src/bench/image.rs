//! The guest's disk: a Debian 12 with the workloads' programs, made once and kept.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// The system tests make their disks with the same script.
const SCRIPT: &str = include_str!("../../../tests/fixtures/user-space.sh");
/// What becomes /bench in the guest.
const FILES: [(&str, &str); 11] = [
    ("setup.sh", include_str!("../../guest/setup.sh")),
    ("prepare.sh", include_str!("../../guest/prepare.sh")),
    ("agent.c", include_str!("../../guest/agent.c")),
    ("matrix.c", include_str!("../../guest/matrix.c")),
    ("memory.c", include_str!("../../guest/memory.c")),
    ("system.c", include_str!("../../guest/system.c")),
    ("generate.py", include_str!("../../guest/generate.py")),
    ("bench.py", include_str!("../../guest/bench.py")),
    ("bench.pl", include_str!("../../guest/bench.pl")),
    ("bench.js", include_str!("../../guest/bench.js")),
    ("Bench.java", include_str!("../../guest/Bench.java")),
];
const PACKAGES: [&str; 13] = [
    "gcc",
    "libc6-dev",
    "python3",
    "perl",
    "openssl",
    "sysbench",
    "p7zip",
    "sqlite3",
    "gzip",
    "xz-utils",
    "nodejs",
    "openjdk-17-jre-headless",
    "cpio",
];
const SIZE: &str = "3G";

/// A guest: what a machine boots, and the same tree for a chroot.
#[derive(Clone, Debug)]
pub struct Image {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// ext4, never written to.
    pub disk: PathBuf,
    pub tree: PathBuf,
    /// Locked shared while the image is in use, so that another checkout's run does not remove it.
    _lock: Arc<fs::File>,
}

/// The image, built if it is not there.
pub fn get() -> Result<Image, String> {
    let mut key = DefaultHasher::new();
    (SCRIPT, FILES, PACKAGES, SIZE).hash(&mut key);
    let all = super::target_dir()?.join("user-space");
    let dir = all.join(format!("bench-{:016x}", key.finish()));
    let fail = |e: std::io::Error| format!("{}: {e}", dir.display());
    fs::create_dir_all(&dir).map_err(fail)?;
    let lock = Arc::new(fs::File::create(dir.join("lock")).map_err(fail)?);
    let image = Image {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        disk: dir.join("root.ext4"),
        tree: dir.join("tree"),
        _lock: Arc::clone(&lock),
    };
    // Another run may be building it.
    lock.lock_shared().map_err(fail)?;
    if image.disk.is_file() {
        return Ok(image);
    }
    lock.unlock().and_then(|()| lock.lock()).map_err(fail)?;
    if !image.disk.is_file() {
        build(&dir)?;
        remove_others(&all, &dir);
    }
    lock.lock_shared().map_err(fail)?;
    Ok(image)
}

/// Fills `dir`.
fn build(dir: &Path) -> Result<(), String> {
    let fail = |e: std::io::Error| format!("{}: {e}", dir.display());
    eprintln!(
        "bench: building the guest's disk in {} (minutes)",
        dir.display()
    );
    let extra = dir.join("extra");
    fs::create_dir_all(&extra).map_err(fail)?;
    for (name, text) in FILES {
        fs::write(extra.join(name), text).map_err(fail)?;
    }
    let script = dir.join("build.sh");
    fs::write(&script, SCRIPT).map_err(fail)?;
    let log = dir.join("build.log");
    let errors = fs::File::create(&log).map_err(fail)?;
    let status = Command::new("sh")
        .arg(&script)
        .arg(dir)
        .arg(SIZE)
        .args(PACKAGES)
        .env("PYRITE_IMAGE_EXTRA", &extra)
        .stdin(Stdio::null())
        .stdout(errors.try_clone().map_err(fail)?)
        .stderr(errors)
        .status()
        .map_err(|e| format!("sh: {e}"))?;
    if !status.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(8).collect();
        let tail: Vec<&str> = lines.into_iter().rev().collect();
        return Err(format!(
            "no guest disk; the end of {}:\n  {}\nmend that (missing programs are named with their \
             package) and start again",
            log.display(),
            tail.join("\n  ")
        ));
    }
    Ok(())
}

/// Images that older sources made: gigabytes that nothing uses any more.
fn remove_others(all: &Path, keep: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with("bench-") && path != keep {
            // Not if another checkout's run holds it.
            let free = fs::File::open(path.join("lock")).is_ok_and(|l| l.try_lock().is_ok());
            if free {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}
