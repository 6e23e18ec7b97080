//! Devices in a real guest: balloon and free-page reporting, entropy, power button, IPv6, pings,
//! and the files that take the output of the other ports.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::fixtures::{self, KernelPackage};
use pyrite_tests::{Scratch, Session, ctl, guest, pyrite};

const BOOT: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_secs(90);
const PROMPT: &str = "root@pyrite:~# ";

/// Boots Debian 12's cloud kernel to a shell; `None`, with the reason, where it cannot be fetched.
fn boot(options: &[&str]) -> Option<Session> {
    let kernel = KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-cloud-amd64",
    };
    let guest = match fixtures::guest(kernel) {
        Ok(guest) => guest,
        Err(why) => {
            pyrite_tests::skipped(why);
            return None;
        }
    };
    let mut command = Command::new(pyrite());
    command
        .args(["run", "--engine", "soft", "--timeout", "5m"])
        .args(["--append", "console=ttyS0 quiet"])
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initrd)
        .args(options);
    let mut s = Session::start(&mut command);
    s.expect(PROMPT, BOOT);
    // The shell's line editor shows what is typed, and breaks it at the edge.
    s.send("stty cols 1000\n");
    s.expect(PROMPT, STEP);
    Some(s)
}

/// What a command prints in the guest.
fn ask(s: &mut Session, command: &str) -> String {
    s.send(&format!("{command}; echo e''nd\n"));
    let all = s.until("end\r\n", STEP);
    s.expect(PROMPT, STEP);
    let (_, output) = all.split_once('\n').unwrap_or_default();
    output.trim().replace('\r', "")
}

/// KiB of shared memory (the guest's RAM) that the VM process has.
fn resident_kib(s: &Session) -> u64 {
    let pid = s.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let vm = children.expect("children of pyrite");
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.trim()));
    let status = status.expect("status of the VM process");
    let line = status.lines().find_map(|l| l.strip_prefix("RssShmem:"));
    let number = line.and_then(|l| l.split_whitespace().next());
    number.and_then(|n| n.parse().ok()).expect("RssShmem")
}

/// Waits until the VM process has at most this much; the last value otherwise.
fn falls_to(s: &Session, kib: u64) -> Result<(), u64> {
    let until = Instant::now() + STEP;
    loop {
        let now = resident_kib(s);
        if now <= kib {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(now);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn control(socket: &Path, words: &[&str]) -> String {
    let (code, text) = ctl(socket, words);
    assert_eq!(code, 0, "{words:?}: {text}");
    text
}

#[test]
fn memory_goes_to_the_host_and_comes_back() {
    let dir = Scratch::new("balloon");
    let socket = dir.0.join("control");
    let path = socket.to_string_lossy().into_owned();
    let options = ["--balloon", "--memory", "384M", "--control", &path];
    let Some(mut s) = boot(&options) else { return };
    let fill = "dd if=/dev/zero bs=1M count=150 2>/dev/null | tr '\\0' 'x' >/tmp/f; \
                md5sum </tmp/f; free -m | awk '/Mem/ { print $4 }'";
    let sum = |text: &str| text.split_whitespace().next().map(str::to_owned);

    // The guest frees memory: free-page reporting gives it back by itself.
    let first = ask(&mut s, fill);
    let full = resident_kib(&s);
    ask(&mut s, "rm /tmp/f");
    let reported = falls_to(&s, full - (120 << 10));
    assert_eq!(
        reported,
        Ok(()),
        "free pages were reported, from {full} KiB"
    );

    // The host takes memory, and the guest knows.
    let free = "awk '/MemAvailable/ { print int($2 / 1024) }' /proc/meminfo";
    let number = |text: String| text.trim().parse::<i64>().expect("MiB");
    let before = number(ask(&mut s, free));
    control(&socket, &["balloon", "160M"]);
    let until = Instant::now() + STEP;
    let actual = "units/virtio-balloon0/device/actual_bytes";
    while control(&socket, &["inspect", actual]).trim() != (160u64 << 20).to_string() {
        assert!(Instant::now() < until, "the guest gives nothing");
        std::thread::sleep(Duration::from_millis(100));
    }
    let after = number(ask(&mut s, free));
    assert!((140..=180).contains(&(before - after)), "{before} {after}");
    let (code, text) = ctl(&socket, &["balloon", "384M"]);
    assert!(code != 0 && text.contains("384 MiB in all"), "{text}");

    // And it comes back as good as it was.
    control(&socket, &["balloon", "0"]);
    while control(&socket, &["inspect", actual]).trim() != "0" {
        assert!(Instant::now() < until, "the guest takes nothing back");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(sum(&ask(&mut s, fill)), sum(&first));
    s.send("exit\n");
    assert_eq!(s.end(STEP).0, 0);
}

#[test]
fn a_vm_without_balloon_says_so() {
    let dir = Scratch::new("no-balloon");
    let kernel = dir.file("kernel", &guest::pvh(&guest::HALT));
    let socket = dir.0.join("control");
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command.arg("--control").arg(&socket);
    let s = Session::start(command.arg("--kernel").arg(&kernel));
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (code, text) = ctl(&socket, &["balloon", "1M"]);
    assert!(code != 0 && text.contains("--balloon"), "{code} {text}");
    drop(s);
}

#[test]
fn entropy_ipv6_ping_and_power_button() {
    let host = TcpListener::bind("[::1]:0");
    let port = host
        .as_ref()
        .ok()
        .and_then(|h| Some(h.local_addr().ok()?.port()));
    if let Ok(host) = host {
        std::thread::spawn(move || {
            while let Ok((mut guest, _)) = host.accept() {
                let _ = guest.write_all(b"hello over IPv6\n");
            }
        });
    }
    let Some(mut s) = boot(&["--memory", "160M", "--host-loopback"]) else {
        return;
    };
    // A megabyte in pieces, from the device: random bytes do not compress.
    assert_eq!(
        ask(&mut s, "cat /sys/class/misc/hw_random/rng_current"),
        "virtio_rng.0"
    );
    let packed = ask(
        &mut s,
        "dd if=/dev/hwrng bs=4k count=256 2>/dev/null | gzip | wc -c",
    );
    let packed: u64 = packed.parse().expect("a number of bytes");
    assert!(packed > 1_000_000, "{packed}");

    let answered = "| grep -o '1 packets received'";
    assert_eq!(
        // The address comes with the router's first advertisement, a moment after the boot.
        ask(
            &mut s,
            &format!(
                "for n in 1 2 3 4 5 6 7 8 9; do ping6 -c 1 fec0::2 2>/dev/null {answered} && break; \
                 sleep 1; done"
            )
        ),
        "1 packets received"
    );
    match port {
        Some(port) => {
            let got = ask(&mut s, &format!("nc -w 9 fec0::2 {port} </dev/null"));
            assert_eq!(got, "hello over IPv6");
        }
        None => pyrite_tests::skipped("the host has no IPv6 loopback"),
    }

    // Beyond the router a ping needs the host's permission; without, the person is told.
    let ping = |s: &mut Session| ask(s, "ping -c 1 -W 3 192.0.2.1 >/dev/null; echo done");
    assert_eq!(ping(&mut s), "done");
    let doctor = Command::new(pyrite())
        .arg("doctor")
        .output()
        .expect("pyrite");
    let allowed = String::from_utf8_lossy(&doctor.stdout).contains("guests can ping other hosts");
    let told = s.errors().contains("ping_group_range");
    assert_eq!(told, !allowed, "{}", s.errors());
    ping(&mut s);
    assert!(
        s.errors().matches("ping_group_range").count() <= 1,
        "told once"
    );

    s.send("\x01p");
    assert_eq!(s.end(STEP).0, 0, "the power button ends the guest");
}

#[test]
fn other_ports_write_to_files() {
    let dir = Scratch::new("ports");
    let to = |port: u16, text: &str| -> Vec<u8> {
        text.bytes().flat_map(|b| guest::out8(port, b)).collect()
    };
    let code = [
        to(0x2f8, "second port\n"),
        to(0x402, "debug console\n"),
        guest::print("first port\n"),
        guest::power_off(),
    ]
    .concat();
    let kernel = dir.file("kernel", &guest::pvh(&code));
    let serial2 = dir.file(
        "serial2",
        b"what was here before, and longer than what comes",
    );
    let debugcon = dir.0.join("debugcon");
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command.arg("--kernel").arg(&kernel);
    command.arg("--serial2").arg(&serial2);
    command.arg("--debugcon").arg(&debugcon);
    let (code, shown, errors) = Session::start(&mut command).end(STEP);
    assert_eq!((code, shown.as_str()), (0, "first port\n"), "{errors}");
    let read = |p: &Path| std::fs::read_to_string(p).expect("output");
    assert_eq!(read(&serial2), "second port\n");
    assert_eq!(read(&debugcon), "debug console\n");

    let nowhere = dir.0.join("no").join("file");
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command
        .arg("--kernel")
        .arg(&kernel)
        .arg("--serial2")
        .arg(&nowhere);
    let (code, _, errors) = Session::start(&mut command).end(STEP);
    assert_eq!(code, 2);
    assert!(
        errors.contains("--serial2") && errors.contains("is no directory"),
        "{errors}"
    );
}
