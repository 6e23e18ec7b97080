//! One tiny kernel through the whole product, on each engine.

use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::{Scratch, Session, guest, pyrite};

const LIMIT: Duration = Duration::from_secs(60);

fn run(name: &str, engine: &str, code: &[u8], options: &[&str]) -> (i32, String, String) {
    let dir = Scratch::new(&format!("engine-{name}-{engine}"));
    let kernel = dir.file("kernel", &guest::pvh(code));
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--net", "none", "--memory", "32M", "--engine", engine,
    ]);
    command.args(options).arg("--kernel").arg(&kernel);
    Session::start(&mut command).end(LIMIT)
}

/// The engines that can be tried here; why not, for those that cannot.
fn engines() -> Vec<&'static str> {
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match kvm {
        Ok(_) => vec!["soft", "kvm"],
        Err(e) => {
            println!("SKIP the KVM engine: /dev/kvm: {e}");
            vec!["soft"]
        }
    }
}

#[test]
fn tiny_kernel_prints_and_exits_on_each_engine() {
    let code = [
        guest::print("hello\n"),
        guest::out8(0xf4, 21),
        guest::HALT.to_vec(),
    ]
    .concat();
    for engine in engines() {
        let (code, output, errors) = run("hello", engine, &code, &[]);
        assert_eq!(
            (code, output.as_str()),
            (43, "hello\n"),
            "{engine}: {errors}"
        );
    }
}

#[test]
fn what_an_engine_cannot_run_ends_with_its_state() {
    // An instruction fetch from a device: no engine runs code there.
    // mov eax, 0xfec00000; jmp eax
    let code = [0xb8, 0, 0, 0xc0, 0xfe, 0xff, 0xe0];
    for engine in engines() {
        let begin = Instant::now();
        let (code, _, errors) = run("fetch", engine, &code, &["--timeout", "5s", "--no-reboot"]);
        assert!([3, 5, 6].contains(&code), "{engine}: {code} {errors}");
        assert!(!errors.is_empty(), "{engine}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{engine}");
    }
}

#[test]
fn time_limit_ends_each_engine() {
    for engine in engines() {
        for (name, code) in [("halt", &guest::HALT[..]), ("spin", &guest::SPIN[..])] {
            let (code, _, errors) = run(name, engine, code, &["--timeout", "1s", "--cpus", "2"]);
            assert_eq!(code, 5, "{engine} {name}: {errors}");
        }
    }
}

#[test]
fn auto_says_which_engine_and_why() {
    let code = [guest::out8(0xf4, 0), guest::HALT.to_vec()].concat();
    let (code, _, errors) = run("auto", "auto", &code, &["--log", "info"]);
    assert_eq!(code, 1, "{errors}");
    let reason = errors
        .lines()
        .find(|l| l.contains("KVM is not used: ") || l.contains("KVM works at hardware speed"));
    assert!(reason.is_some(), "{errors}");
}
