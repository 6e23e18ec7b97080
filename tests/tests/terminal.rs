//! Console and escape keys through pipes and on a terminal, signals, and the end of the VM process.

use std::process::Command;
use std::time::Duration;

use pyrite_tests::fixtures::{self, KernelPackage};
use pyrite_tests::{Scratch, Session, guest, pyrite};

const LIMIT: Duration = Duration::from_secs(60);

fn echo(dir: &Scratch) -> Session {
    let code = [&guest::print("ready\n")[..], &guest::ECHO].concat();
    let kernel = dir.file("kernel", &guest::pvh(&code));
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M", "--kernel",
    ]);
    let mut s = Session::start(command.arg(&kernel));
    s.expect("ready", LIMIT);
    s
}

#[test]
fn input_reaches_the_guest_and_ctrl_a_x_is_130() {
    let dir = Scratch::new("echo");
    let mut s = echo(&dir);
    s.send("hello");
    s.expect("hello", LIMIT);
    // Longer than every buffer on the way.
    let long: String = (0..20_000)
        .map(|n| char::from(b'a' + (n % 26) as u8))
        .collect();
    s.send(&long);
    s.send("END");
    s.expect(&format!("{long}END"), LIMIT);
    s.send("\x01\x01!");
    s.expect("\x01!", LIMIT);
    s.send("\x01h");
    s.expect("Ctrl-A x", LIMIT);
    s.send("\x01x");
    assert_eq!(s.end(LIMIT).0, 130);
}

#[test]
fn ctrl_a_r_resets_the_machine() {
    let dir = Scratch::new("reset-key");
    let mut s = echo(&dir);
    s.send("\x01r");
    s.expect("ready", LIMIT);
    s.send("again");
    s.expect("again", LIMIT);
    s.send("\x01x");
    assert_eq!(s.end(LIMIT).0, 130);
}

#[test]
fn sigterm_ends_the_vm() {
    let dir = Scratch::new("sigterm");
    let s = echo(&dir);
    let kill = Command::new("kill")
        .arg(s.pid().to_string())
        .status()
        .expect("kill");
    assert!(kill.success());
    assert_eq!(s.end(LIMIT).0, 130);
}

#[test]
fn death_of_the_vm_process_is_6() {
    let dir = Scratch::new("vm-death");
    let s = echo(&dir);
    let children = format!("/proc/{0}/task/{0}/children", s.pid());
    let vm = std::fs::read_to_string(children).expect("children of pyrite");
    let kill = Command::new("kill")
        .args(["-9", vm.trim()])
        .status()
        .expect("kill");
    assert!(kill.success());
    let (code, _, errors) = s.end(LIMIT);
    assert_eq!(code, 6, "{errors}");
    assert!(
        errors.contains("VM process was killed by signal 9"),
        "{errors}"
    );
}

#[test]
fn vm_process_ends_with_its_front() {
    let dir = Scratch::new("front-death");
    let s = echo(&dir);
    let children = format!("/proc/{0}/task/{0}/children", s.pid());
    let vm = std::fs::read_to_string(children)
        .expect("children of pyrite")
        .trim()
        .to_owned();
    drop(s); // killed
    let gone = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        // A zombie that nobody waits for has no command line.
        std::fs::read(format!("/proc/{vm}/cmdline")).map_or(true, |c| c.is_empty())
    });
    assert!(gone, "the VM process {vm} lives on");
}

#[test]
fn a_terminal_is_raw_resized_suspended_and_put_back() {
    if Command::new("python3").arg("--version").output().is_err() {
        pyrite_tests::skipped("needs python3, which opens the terminal");
        return;
    }
    let dir = Scratch::new("pty");
    let code = [&guest::print("ready\n")[..], &guest::ECHO].concat();
    let kernel = dir.file("kernel", &guest::pvh(&code));
    let mut command = Command::new("python3");
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/terminal.py"))
        .arg(pyrite())
        .arg(&kernel);
    let linux = fixtures::guest(KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-cloud-amd64",
    });
    match linux {
        Ok(linux) => {
            command.arg(linux.kernel).arg(linux.initrd);
        }
        Err(why) => println!("skipped resizing: {why}"),
    }
    let done = command.output().expect("python3 runs");
    let text = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{text}\n{errors}");
    assert!(text.contains("SIGTERM"), "{text}");
}
