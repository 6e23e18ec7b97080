//! A missing, cut-off or foreign file for every option: one error that names the option, exit
//! code 2, nothing left behind.

use std::process::{Command, Stdio};

use pyrite_tests::{Scratch, guest, pyrite, run};

/// A good little kernel and other files.
struct Files {
    dir: Scratch,
    kernel: String,
}

impl Files {
    fn new(name: &str) -> Files {
        let dir = Scratch::new(name);
        let kernel = dir.file("kernel", &guest::pvh(&guest::power_off()));
        Files {
            kernel: kernel.display().to_string(),
            dir,
        }
    }
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        self.dir.file(name, bytes).display().to_string()
    }
}

/// Refused with exit code 2 and one line that begins with the option and contains `words`.
fn refused(args: &[&str], option: &str, words: &str) {
    let out = run(&[&["run"], args].concat());
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {errors}");
    assert_eq!(errors.lines().count(), 1, "{args:?}: {errors}");
    assert!(
        errors.starts_with(&format!("pyrite: {option}: ")),
        "{args:?}: {errors}"
    );
    assert!(errors.contains(words), "{args:?}: {errors} lacks {words:?}");
    assert!(out.stdout.is_empty(), "{args:?}");
}

#[test]
fn kernel_files_are_checked() {
    let f = Files::new("bad-kernel");
    let cut = std::fs::read(&f.kernel).expect("kernel");
    let cut = f.file("cut", &cut[..cut.len() - 1]);
    for (path, words) in [
        (
            f.dir.0.join("nothing").display().to_string(),
            "No such file",
        ),
        (f.dir.0.display().to_string(), "not a regular file"),
        (f.file("empty", b""), "empty"),
        (
            f.file("text", b"hello, world\n"),
            "expected a Linux bzImage",
        ),
        (f.file("gz", &[0x1f, 0x8b, 8, 0, 0, 0]), "gzip"),
        (cut, "truncated"),
    ] {
        refused(&["--kernel", &path], "--kernel", words);
    }
}

#[test]
fn initrd_modules_and_memory_are_checked() {
    let f = Files::new("bad-initrd");
    let nothing = f.dir.0.join("nothing").display().to_string();
    let k = ["--kernel", &f.kernel];
    refused(
        &[&k[..], &["--initrd", &nothing]].concat(),
        "--initrd",
        "No such file",
    );
    refused(
        &[&k[..], &["--module", &nothing]].concat(),
        "--module",
        "No such file",
    );
    let module = f.file("module", b"x");
    refused(
        &[&k[..], &["--module", &module]].concat(),
        "--module",
        "Multiboot",
    );
    refused(
        &[&k[..], &["--memory", "8M"]].concat(),
        "--memory",
        "16 MiB",
    );
    refused(&[&k[..], &["--cpus", "0"]].concat(), "--cpus", "expected 1");
    refused(
        &[&k[..], &["--cpu", "z80", "--engine", "soft"]].concat(),
        "--cpu",
        "z80",
    );
    let large = f.file("large", &vec![1; 40 << 20]);
    let args = [&k[..], &["--initrd", &large, "--memory", "32M"]].concat();
    refused(&args, "--initrd", "--memory");
}

#[test]
fn disks_are_checked() {
    let f = Files::new("bad-disk");
    let mut mbr = vec![0u8; 1 << 20];
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    mbr[446 + 4] = 0x83;
    mbr[446 + 8..446 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 0, 1, 0]);
    for (path, words) in [
        (
            f.dir.0.join("nothing").display().to_string(),
            "No such file",
        ),
        (f.dir.0.display().to_string(), "expected a disk image"),
        (f.file("empty", b""), "empty"),
        (f.file("odd", &[0; 700]), "multiple of 512"),
        (
            f.file("qcow2", &[b"QFI\xfb".as_slice(), &[0; 508]].concat()),
            "qcow2",
        ),
        (f.file("mbr", &mbr), "truncated"),
    ] {
        refused(&["--kernel", &f.kernel, "--disk", &path], "--disk", words);
    }
}

#[test]
fn disk_images_of_other_formats_are_checked() {
    let f = Files::new("bad-image");
    let raw = f.file("raw", &[0; 4096]);
    let top = f.dir.0.join("top").display().to_string();
    let made = run(&[
        "image", "create", "-f", "qcow2", "-b", &raw, "-F", "raw", &top,
    ]);
    assert!(made.status.success(), "{made:?}");
    let vhdx = f.dir.0.join("vhdx").display().to_string();
    assert!(
        run(&["image", "create", "-f", "vhdx", &vhdx, "8M"])
            .status
            .success()
    );
    for (disk, words) in [
        (top.clone(), "add ,format=qcow2"),
        (format!("{raw},format=qcow2"), "expected a qcow2 image"),
        (format!("{raw},format=vdi"), "expected a VDI image"),
        (format!("{top},format=qcow2"), "backing=allow"),
        (format!("{vhdx},format=vhdx"), "add ,ro"),
    ] {
        refused(&["--kernel", &f.kernel, "--disk", &disk], "--disk", words);
    }
}

#[test]
fn snapshot_and_socket_are_checked() {
    let f = Files::new("bad-restore");
    let dir = f.dir.0.display().to_string();
    refused(
        &["--restore", &dir],
        "--restore",
        "expected the directory of a complete snapshot",
    );
    f.file("manifest.json", b"{}");
    refused(&["--restore", &dir], "--restore", "damaged");
    refused(
        &["--kernel", &f.kernel, "--vsock", &f.kernel],
        "--vsock",
        "exists",
    );
    refused(
        &["--kernel", &f.kernel, "--vsock", "/nowhere/s"],
        "--vsock",
        "no directory",
    );
}

#[test]
fn taken_port_is_named() {
    let f = Files::new("bad-port");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port();
    refused(
        &["--kernel", &f.kernel, "-p", &format!("{port}:80")],
        "-p",
        &port.to_string(),
    );
}

#[test]
fn all_errors_are_told_at_once() {
    let out = run(&[
        "run",
        "--kernel",
        "/nowhere/k",
        "--initrd",
        "/nowhere/i",
        "--disk",
        "/nowhere/d",
    ]);
    let errors = String::from_utf8_lossy(&out.stderr);
    for option in ["--kernel", "--initrd", "--disk"] {
        assert!(errors.contains(option), "{errors}");
    }
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn offline_with_empty_cache_says_what_to_provide() {
    let dir = Scratch::new("offline");
    let cache = dir.0.join("cache");
    // No package client in reach.
    let out = Command::new(pyrite())
        .arg("run")
        .env("PATH", &dir.0)
        .env("XDG_CACHE_HOME", &cache)
        .stdin(Stdio::null())
        .output()
        .expect("pyrite runs");
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{errors}");
    for words in ["--kernel", "busybox-static", "linux-image-", "apt-get"] {
        assert!(errors.contains(words), "{errors} lacks {words}");
    }
    assert!(
        errors.contains(&cache.join("pyrite/packages").display().to_string()),
        "{errors}"
    );
    let left: Vec<_> = walk(&cache);
    assert!(left.is_empty(), "left behind: {left:?}");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .flat_map(|p| if p.is_dir() { walk(&p) } else { vec![p] })
        .collect()
}
