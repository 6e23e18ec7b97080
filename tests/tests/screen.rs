//! The screen and the keyboard: a Debian kernel's text console, seen and typed on from outside.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pyrite_tests::fixtures::{self, KernelPackage};
use pyrite_tests::screen::{Reader, screenshot, video_bios, wait_for_text};
use pyrite_tests::{Scratch, Session, pyrite};

const BOOT: Duration = Duration::from_secs(180);
const STEP: Duration = Duration::from_secs(60);
/// The cloud kernel has no screen.
const DEBIAN_12: KernelPackage = KernelPackage {
    suite: "bookworm",
    arch: "amd64",
    package: "linux-image-amd64",
};

/// Debian's kernel with its shell on the first virtual terminal.
fn boot(socket: &Path, options: &[&str]) -> Option<Session> {
    let guest = match fixtures::guest(DEBIAN_12) {
        Ok(g) => g,
        Err(why) => {
            eprintln!("skipped: {why}");
            return None;
        }
    };
    let mut command = Command::new(pyrite());
    command
        .args([
            "run",
            "--engine",
            "soft",
            "--net",
            "none",
            "--timeout",
            "5m",
        ])
        .arg("--control")
        .arg(socket)
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initrd)
        .args(["--append", "quiet console=tty0 pyrite.console=tty1"])
        .args(options);
    Some(Session::start(&mut command))
}

fn ask(command: &str, socket: &Path, words: &[&str]) -> (i32, String) {
    let done = Command::new(pyrite())
        .arg(command)
        .arg(socket)
        .args(words)
        .output()
        .expect("pyrite runs");
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    (done.status.code().unwrap_or(-1), text)
}

#[test]
fn debian_shows_its_console_and_takes_what_is_typed() {
    let Some(rom) = video_bios() else {
        eprintln!("skipped: the package seabios is not installed");
        return;
    };
    let reader = Reader::new(&rom);
    let dir = Scratch::new("screen");
    let socket = dir.0.join("control");
    let Some(_s) = boot(&socket, &["--vga", "std"]) else {
        return;
    };
    let prompt = |line: &str| line.starts_with("root@pyrite:~#");
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(50));
    }
    let text = wait_for_text(&socket, &dir, &reader, BOOT, prompt);
    assert!(text.contains("BusyBox v1."), "{text}");
    assert!(
        !text.contains('?'),
        "every character is one of the BIOS:\n{text}"
    );
    let typed = ask(
        "type",
        &socket,
        &[r"echo $((6 * 7)) {a..z} ~'!@#$%^&*()_+|<>?:' \\\n"],
    );
    assert_eq!(typed, (0, String::new()));
    // The backslash before the end of the line asks for another one.
    assert_eq!(ask("key", &socket, &["e", "n", "d", "enter"]).0, 0);
    let result = |line: &str| line == "42 {a..z} ~!@#$%^&*()_+|<>?: end";
    wait_for_text(&socket, &dir, &reader, STEP, result);
    // Scrolling, colours, an erased screen.
    ask(
        "type",
        &socket,
        &[r"clear; seq 100; printf '\\033[1;37;44mwhite on blue\\033[0m\\n'\n"],
    );
    wait_for_text(&socket, &dir, &reader, STEP, |l| l == "white on blue");
    let shot = screenshot(&socket, &dir);
    assert!(shot.pixels.contains(&0xff_ffff) && shot.pixels.contains(&0x00_00aa));
    let (code, error) = ask("key", &socket, &["ctrl-nokey"]);
    assert!(code != 0 && error.contains("there is no key"), "{error}");
}

#[test]
fn vm_without_a_screen_says_so() {
    let dir = Scratch::new("no-screen");
    let socket = dir.0.join("control");
    let kernel = dir.file(
        "kernel",
        &pyrite_tests::guest::pvh(&pyrite_tests::guest::SPIN),
    );
    let mut command = Command::new(pyrite());
    command
        .args([
            "run", "--engine", "soft", "--net", "none", "--memory", "32M",
        ])
        .arg("--control")
        .arg(&socket)
        .arg("--kernel")
        .arg(&kernel);
    let _s = Session::start(&mut command);
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let file = dir.0.join("x.png");
    let (code, error) = ask("screenshot", &socket, &[file.to_str().unwrap_or_default()]);
    assert!(code != 0 && error.contains("--vga std"), "{error}");
    assert!(!file.exists());
}
