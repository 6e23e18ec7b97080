//! The screen and the keyboard: a Debian kernel's text console, seen and typed on from outside.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::fixtures::{self, KernelPackage};
use pyrite_tests::screen::{Pixels, Reader, screenshot, video_bios, wait_for_text};
use pyrite_tests::{Scratch, Session, pyrite};
use pyrite_vmm::display::rfb::testing::{self, Viewer};

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
            pyrite_tests::skipped(why);
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
        pyrite_tests::skipped("the package seabios is not installed");
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

/// Updates a viewer until its picture has a line that `wanted` accepts.
fn watch(
    v: &mut Viewer<UnixStream>,
    reader: &Reader,
    limit: Duration,
    wanted: impl Fn(&str) -> bool,
) {
    let until = Instant::now() + limit;
    loop {
        let text = reader.read(&Pixels {
            width: v.size.0,
            pixels: v.pixels.clone(),
        });
        if text.lines().any(&wanted) {
            return;
        }
        assert!(Instant::now() < until, "not seen:\n{text}");
        v.request(true).expect("server");
        v.update().expect("update");
    }
}

#[test]
fn shell_is_used_through_vnc() {
    let Some(rom) = video_bios() else {
        pyrite_tests::skipped("the package seabios is not installed");
        return;
    };
    let reader = Reader::new(&rom);
    let dir = Scratch::new("vnc");
    let (socket, vnc) = (dir.0.join("control"), dir.0.join("vnc"));
    let password = dir.file("password", b"letmein\n");
    let option = format!(
        "unix:{},password-file={}",
        vnc.display(),
        password.display()
    );
    let Some(mut s) = boot(&socket, &["--vnc", &option]) else {
        return;
    };
    while !socket.exists() || !vnc.exists() {
        assert!(s.ended().is_none(), "{}", s.errors());
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut v = Viewer::connect(&vnc, Some("letmein")).expect("server");
    v.set_encodings(&[testing::ZRLE, testing::DESKTOP_SIZE])
        .expect("server");
    v.request(false).expect("server");
    v.update().expect("update");
    watch(&mut v, &reader, BOOT, |l| l.starts_with("root@pyrite:~#"));
    v.type_text("expr 12345 - 67; cat /proc/version\n")
        .expect("server");
    watch(&mut v, &reader, STEP, |l| l == "12278");
    watch(&mut v, &reader, STEP, |l| {
        l.starts_with("Linux version 6.1.")
    });
    // Another viewer, another encoding, the same picture; and the same as a screenshot.
    let mut raw = Viewer::connect(&vnc, Some("letmein")).expect("server");
    let mut same = false;
    for _ in 0..20 {
        for v in [&mut raw, &mut v] {
            v.request(false).expect("server");
            v.update().expect("update");
        }
        let shot = screenshot(&socket, &dir);
        same = raw.pixels == v.pixels && raw.pixels == shot.pixels;
        if same {
            break;
        }
    }
    assert!(same, "Raw, ZRLE and the screenshot differ");
    assert_eq!(raw.encodings.first(), Some(&testing::RAW));
    assert!(v.encodings.contains(&testing::ZRLE));
    let (code, shown) = pyrite_tests::ctl(&socket, &["inspect", "vnc/clients"]);
    assert_eq!((code, shown.trim()), (0, "2"));
    assert!(Viewer::connect(&vnc, None).is_err());
    v.type_text("poweroff -f\n").expect("server");
    let (code, _, errors) = s.end(STEP);
    assert_eq!(code, 0, "{errors}");
    assert!(!vnc.exists(), "the socket goes away with the VM");
}

#[test]
fn vnc_is_not_offered_to_the_world() {
    let done = pyrite_tests::run(&["run", "--kernel", "/nonexistent", "--vnc", "0.0.0.0:5900"]);
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(2), "{errors}");
    assert!(
        errors.contains("--vnc: 0.0.0.0:5900 can be reached"),
        "{errors}"
    );
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
