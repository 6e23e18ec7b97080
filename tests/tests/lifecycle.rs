//! Resets in every way, pause, and what the control socket shows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pyrite_tests::{Scratch, Session, ctl, guest, pyrite};

const STEP: Duration = Duration::from_secs(30);

/// Starts a tiny guest with a control socket.
fn start(dir: &Scratch, code: &[u8], options: &[&str]) -> (Session, PathBuf) {
    let kernel = dir.file("kernel", &guest::pvh(code));
    let socket = dir.0.join("control");
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command.args(options);
    command
        .arg("--control")
        .arg(&socket)
        .arg("--kernel")
        .arg(&kernel);
    (Session::start(&mut command), socket)
}

/// Asks and expects that it was done.
fn ask(socket: &Path, words: &[&str]) -> String {
    let (code, text) = ctl(socket, words);
    assert_eq!(code, 0, "{words:?}: {text}");
    text
}

/// Prints `A`, then does what the next byte says: `k` keyboard controller, `c` reset control
/// register, `p` port 92H, anything else a triple fault.
fn resetting() -> Vec<u8> {
    let mut code = guest::print("A");
    // wait: mov dx, LSR; in al, dx; test al, DR; jz wait; mov dx, RBR; in al, dx
    code.extend([0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7]);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xec]);
    for (key, port, value) in [(b'k', 0x64, 0xfe), (b'c', 0xcf9, 6), (b'p', 0x92, 1)] {
        let act = [guest::out8(port, value), guest::HALT.to_vec()].concat();
        // cmp al, key; jne past
        code.extend([0x3c, key, 0x75, act.len() as u8]);
        code.extend(act);
    }
    // ud2 without an IDT.
    code.extend([0x0f, 0x0b]);
    code
}

/// The VM process of a session.
fn vm_process(s: &Session) -> u32 {
    let pid = s.pid();
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
    let mut children = text.split_whitespace();
    children
        .next()
        .and_then(|c| c.parse().ok())
        .expect("a VM process")
}

/// Open files and threads of a process.
fn holdings(pid: u32) -> (usize, usize) {
    let count = |what: &str| {
        fs::read_dir(format!("/proc/{pid}/{what}"))
            .expect("process")
            .count()
    };
    (count("fd"), count("task"))
}

#[test]
fn a_hundred_resets_of_every_kind_leak_nothing() {
    let dir = Scratch::new("resets");
    let (mut s, socket) = start(&dir, &resetting(), &["--cpus", "2"]);
    s.expect("A", STEP);
    let vm = vm_process(&s);
    let before = holdings(vm);
    for n in 0..100 {
        match n % 5 {
            // From outside: also ends the count towards a reset loop.
            0 => drop(ask(&socket, &["reset"])),
            k => s.send(["k", "c", "p", "t"][k - 1]),
        }
        s.expect("A", STEP);
    }
    assert!(ask(&socket, &["inspect", "resets"]).contains("100"));
    assert_eq!(holdings(vm), before);
    ask(&socket, &["stop"]);
    assert_eq!(s.end(STEP).0, 130);
    assert!(!socket.exists());
}

#[test]
fn pause_stops_the_guest_and_its_time() {
    let dir = Scratch::new("pause");
    let (mut s, socket) = start(&dir, &guest::ECHO, &["--paused"]);
    let time = || ask(&socket, &["inspect", "time-ns"]);
    s.send("x");
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(time(), "0\n");
    ask(&socket, &["resume"]);
    s.expect("x", STEP);
    for _ in 0..50 {
        ask(&socket, &["pause"]);
        assert_eq!(time(), time());
        ask(&socket, &["pause"]);
        s.send("y");
        ask(&socket, &["resume"]);
        s.expect("y", STEP);
    }
    ask(&socket, &["pause"]);
    ask(&socket, &["stop"]);
    assert_eq!(s.end(STEP).0, 130);
}

#[test]
fn paused_guest_is_ended_by_its_time_limit() {
    let dir = Scratch::new("paused-limit");
    let (s, _) = start(&dir, &guest::SPIN, &["--paused", "--timeout", "1s"]);
    assert_eq!(s.end(STEP).0, 5);
}

#[test]
fn tree_shows_what_runs() {
    let dir = Scratch::new("tree");
    let code = [&guest::print("A")[..], &guest::SPIN].concat();
    let (mut s, socket) = start(&dir, &code, &["--cpus", "2"]);
    s.expect("A", STEP);
    let tree = ask(&socket, &["inspect"]);
    for part in [
        "engine: soft",
        "vcpu0:",
        "translator:",
        "uart0:",
        "virtio-rng0:",
    ] {
        assert!(tree.contains(part), "no {part} in\n{tree}");
    }
    assert!(ask(&socket, &["inspect", "vm/vcpu0/activity"]).contains("Running"));
    assert!(ask(&socket, &["inspect", "vm/vcpu1/activity"]).contains("WaitForSipi"));
    let (code, text) = ctl(&socket, &["inspect", "nothing"]);
    assert_eq!(
        (code, text.contains("there is no nothing")),
        (6, true),
        "{text}"
    );
    assert_eq!(ctl(&dir.0.join("nobody"), &["pause"]).0, 2);
}
