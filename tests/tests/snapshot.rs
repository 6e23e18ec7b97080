//! A running Linux is written to disk and goes on in another process, whatever it was doing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pyrite_tests::{Scratch, Session, ctl, pyrite};

const BOOT: Duration = Duration::from_secs(180);
const STEP: Duration = Duration::from_secs(120);
const PROMPT: &str = "root@pyrite:~# ";

/// Writes random blocks to the disk and reads them back past the page cache, talks to the
/// gateway, counts, and keeps the processors busy. The messages are spelled so that their echo
/// does not match.
const LOAD: &str = r#"cat >/load <<'X'
i=0
while :; do
i=$((i+1))
dd if=/dev/urandom of=/tmp/b bs=16k count=4 2>/dev/null
a=$(md5sum </tmp/b)
dd if=/tmp/b of=/dev/vda bs=64k seek=$((i%400)) conv=notrunc 2>/dev/null
sync
b=$(dd if=/dev/vda bs=64k skip=$((i%400)) count=1 iflag=direct 2>/dev/null | md5sum)
[ "$a" = "$b" ] || echo BAD"DISK" $i
ping -c 1 -W 5 10.0.2.2 >/dev/null || echo NO"PING" $i
echo "C=$i."
done
X
sh /load &
yes >/dev/null &
"#;

fn start(socket: &Path, options: &[&str]) -> Session {
    let mut command = Command::new(pyrite());
    command.args(["run", "--engine", "soft", "--timeout", "10m"]);
    command.arg("--control").arg(socket).args(options);
    Session::start(&mut command)
}

fn ask(socket: &Path, words: &[&str]) {
    let (code, text) = ctl(socket, words);
    assert_eq!(code, 0, "{words:?}: {text}");
}

fn same(a: &Path, b: &Path) {
    for name in ["state", "memory", "manifest.json"] {
        let [x, y] = [a, b].map(|dir| fs::read(dir.join(name)).expect("file"));
        if x == y {
            continue;
        }
        let differing: Vec<usize> = (0..x.len().min(y.len()))
            .filter(|&n| x[n] != y[n])
            .collect();
        let shown = |all: &[u8]| {
            let from = differing.first().map_or(0, |n| n & !15);
            all.get(from..(from + 64).min(all.len()))
                .map(<[u8]>::to_vec)
        };
        panic!(
            "{name} differs between {} and {}: {} and {} bytes, {} differ, from {:x?} on: {:x?}, {:x?}",
            a.display(),
            b.display(),
            x.len(),
            y.len(),
            differing.len(),
            differing.first(),
            shown(&x),
            shown(&y),
        );
    }
}

/// The socket of a VM, there and answering.
fn ready(vm: &mut Session, socket: PathBuf) -> PathBuf {
    for _ in 0..6000 {
        if let Some(code) = vm.ended() {
            panic!("ended with {code}: {}", vm.errors());
        }
        if socket.exists() && ctl(&socket, &["inspect", "time-ns"]).0 == 0 {
            return socket;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no control socket: {}", vm.errors());
}

/// Nothing went wrong so far.
fn clean(vm: &Session) {
    for bad in [
        "BADDISK",
        "NOPING",
        "Oops",
        "BUG:",
        "unstable",
        "stall",
        "lockup",
        "Call Trace",
    ] {
        let lines = vm.all().lines();
        let lines = lines.filter(|l| l.contains(bad) && !l.contains("dmesg | grep"));
        assert_eq!(lines.collect::<Vec<_>>(), Vec::<&str>::new(), "{bad}");
    }
}

/// Saves twice, restores in a new process, saves a third time, goes on there. The new process's
/// session, its socket, and the last count that the old one printed.
fn move_on(dir: &Scratch, name: &str, old: Session, socket: &Path) -> (Session, PathBuf) {
    let path = |what: &str| dir.0.join(format!("{name}-{what}"));
    let text = |p: &Path| p.to_str().expect("text").to_owned();
    ask(socket, &["pause"]);
    for what in ["a", "b"] {
        ask(socket, &["snapshot", &text(&path(what))]);
    }
    same(&path("a"), &path("b"));
    clean(&old);
    // The disk stays as it is: the old process never runs again.
    drop(old);
    let _ = fs::remove_file(socket);
    let socket = dir.0.join(format!("{name}-socket"));
    let mut new = start(&socket, &["--restore", &text(&path("a")), "--paused"]);
    let socket = ready(&mut new, socket);
    ask(&socket, &["snapshot", &text(&path("c"))]);
    same(&path("a"), &path("c"));
    ask(&socket, &["resume"]);
    for what in ["a", "b", "c"] {
        fs::remove_dir_all(path(what)).expect("removed");
    }
    (new, socket)
}

fn survives_moves(name: &str, cpus: &str, delays_ms: &[u64]) {
    let dir = Scratch::new(name);
    let disk = dir.0.join("disk");
    fs::File::create(&disk)
        .and_then(|f| f.set_len(32 << 20))
        .expect("disk");
    let disk = disk.to_str().expect("text");
    let mut socket = dir.0.join("socket");
    let options = ["--cpus", cpus, "--memory", "256M", "--disk", disk];
    let mut vm = start(&socket, &options);
    socket = ready(&mut vm, socket);
    // During the boot, at moments that no two runs share.
    for (n, ms) in delays_ms.iter().enumerate() {
        std::thread::sleep(Duration::from_millis(*ms));
        (vm, socket) = move_on(&dir, &format!("boot{n}"), vm, &socket);
    }
    vm.send("\n");
    vm.expect(PROMPT, BOOT);
    vm.send(LOAD);
    vm.expect("C=2.", STEP);
    let mut count = 2;
    for (n, ms) in delays_ms.iter().enumerate() {
        std::thread::sleep(Duration::from_millis(*ms));
        (vm, socket) = move_on(&dir, &format!("load{n}"), vm, &socket);
        // The counter goes on where it was, not from the start: it never repeats what was seen.
        let next = vm.expect_number("C=", STEP);
        assert!(next > count, "{next} after {count}");
        vm.expect(&format!("C={}.", next + 2), STEP);
        count = next + 2;
    }
    vm.send("dmesg | grep -E 'Oops|BUG:|unstable|stall|lockup|I/O error|Call Trace'; echo CHE\"CKED\"\n");
    vm.expect("CHECKED", STEP);
    clean(&vm);
    vm.send("poweroff -f\n");
    assert_eq!(vm.end(STEP).0, 0);
}

#[test]
fn linux_on_one_cpu_survives_moves_between_processes() {
    survives_moves("moves-1", "1", &[90, 400, 230, 610]);
}

#[test]
fn linux_on_four_cpus_survives_moves_between_processes() {
    survives_moves("moves-4", "4", &[150, 350, 700, 50]);
}

#[test]
fn damaged_snapshots_are_refused_with_2() {
    let dir = Scratch::new("damaged-snapshot");
    let socket = dir.0.join("socket");
    let kernel = pyrite_tests::guest::pvh(&pyrite_tests::guest::HALT);
    let kernel = dir.file("kernel", &kernel);
    let kernel = kernel.to_str().expect("text");
    let mut vm = start(
        &socket,
        &["--net", "none", "--memory", "32M", "--kernel", kernel],
    );
    let socket = ready(&mut vm, socket);
    let snapshot = dir.0.join("s");
    let name = snapshot.to_str().expect("text").to_owned();
    ask(&socket, &["snapshot", &name]);
    assert_eq!(
        ctl(&socket, &["snapshot", &name]).0,
        6,
        "a directory that is there"
    );
    ask(&socket, &["stop"]);
    assert_eq!(vm.end(STEP).0, 130);
    for file in ["manifest.json", "state", "memory"] {
        let path = snapshot.join(file);
        let good = fs::read(&path).expect("file");
        let mut flipped = good.clone();
        let at = good.iter().position(|b| *b != 0).expect("content");
        flipped[at] ^= 4;
        for bad in [&flipped[..], &good[..good.len() / 2], &[]] {
            fs::write(&path, bad).expect("written");
            let out = pyrite_tests::run(&["run", "--restore", &name]);
            let text = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.code(), Some(2), "{file}: {text}");
            assert_eq!(text.lines().count(), 1, "{file}: {text}");
        }
        fs::write(&path, good).expect("written");
    }
    let out = pyrite_tests::run(&["run", "--restore", &name, "--timeout", "1s"]);
    assert_eq!(
        out.status.code(),
        Some(5),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}
