//! A complete Debian 12 under systemd, from a disk, on the software engine.
//!
//! The normal tests take a few minutes. `PYRITE_USER_SPACE=full` runs Python's own tests,
//! stress-ng's verified stressors, Java and Node.js as well, which takes about an hour.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use pyrite_tests::Scratch;
use pyrite_tests::user_space::{FULL, Guest, Image, Repository, SMALL};

/// The image, or a note why the test cannot be done here.
fn image(packages: &[&str], size: &str) -> Option<Image> {
    match Image::get(packages, size) {
        Ok(image) => Some(image),
        Err(why) => {
            pyrite_tests::skipped(why);
            None
        }
    }
}

fn full() -> bool {
    let asked = std::env::var("PYRITE_USER_SPACE").is_ok_and(|v| v == "full");
    if !asked {
        pyrite_tests::skipped("PYRITE_USER_SPACE is not \"full\"");
    }
    asked
}

/// The system came up without a complaint.
fn healthy(g: &mut Guest, cpus: &str) {
    assert_eq!(g.ok("nproc", 60), cpus);
    assert_eq!(g.ok("systemctl is-system-running --wait", 300), "running");
    assert_eq!(g.ok("systemctl --failed --no-legend --plain", 60), "");
    let time = g.ok("systemd-analyze | cat", 60);
    assert!(time.contains("Startup finished in"), "{time}");
    // Every CPU runs, time is kept, and the kernel did not stumble.
    let log = g.ok("journalctl -b -k --no-pager -o cat", 60);
    for complaint in [
        "BUG:",
        "WARNING:",
        "Call Trace",
        "soft lockup",
        "rcu_preempt detected",
        "general protection",
        "clocksource: Marking",
        "unable to handle",
        "I/O error",
    ] {
        assert!(!log.contains(complaint), "{complaint} in\n{log}");
    }
}

/// `apt-get install` through the NAT, from a repository that the host serves.
fn installs(g: &mut Guest, name: &str) {
    let repository = Repository::serve(name);
    g.ok("ip route | grep -q 'default via 10.0.2.2'", 60);
    g.ok(
        &format!(
            "echo 'deb [trusted=yes] http://10.0.2.2:{}/ ./' >/root/list",
            repository.port
        ),
        60,
    );
    let only = "-o Dir::Etc::SourceList=/root/list -o Dir::Etc::SourceParts=/dev/null";
    g.ok(&format!("apt-get -q {only} update"), 120);
    g.ok(&format!("apt-get -qy {only} install pyrite-greeting"), 240);
    assert_eq!(g.ok("pyrite-greeting", 60), "greetings from the package");
    // dpkg's own check of what was unpacked against the package's sums.
    assert_eq!(g.ok("dpkg --verify pyrite-greeting", 60), "");
}

/// Compiles the programs, runs them, and has the host run what the guest compiled.
fn programs(g: &mut Guest) {
    for program in ["jit", "signals", "threads", "fp", "native"] {
        g.ok(
            &format!("gcc -O2 -static -w -o {program} {program}.c -lm"),
            300,
        );
        let output = g.ok(&format!("./{program} | tee {program}.out"), 300);
        assert!(output.ends_with(&format!("{program} ok")), "{output}");
    }
}

/// OpenSSL, Python and Perl agree with themselves here and with what is known.
fn languages(g: &mut Guest) {
    let out = g.ok(
        "bash -o pipefail crypto.sh >crypto.out; tail -n 1 crypto.out",
        600,
    );
    assert_eq!(out, "crypto ok");
    g.ok("python3 check.py", 300);
    g.ok("perl check.pl", 300);
    // Compression there and back.
    g.ok(
        "tar -C /usr/share -cf /tmp/t.tar perl && for c in gzip xz zstd; do \
         $c -3 </tmp/t.tar | $c -d | cmp - /tmp/t.tar || exit; done",
        300,
    );
}

/// OpenSSL agrees with itself when its threads and processes move between processors.
fn crypto(g: &mut Guest) {
    let command = "bash -o pipefail crypto.sh >crypto.out; tail -n 1 crypto.out";
    assert_eq!(g.ok(command, 600), "crypto ok");
}

/// Sends back what comes until the sender has ended; what it was.
fn send_back(mut stream: UnixStream) -> std::io::Result<usize> {
    let mut buffer = [0; 8192];
    let mut total = 0;
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            stream.shutdown(Shutdown::Write)?;
            return Ok(total);
        }
        stream.write_all(&buffer[..n])?;
        total += n;
    }
}

/// Megabytes through the socket device in both directions, begun on either side.
fn streams(g: &mut Guest, socket: &Path) {
    g.ok("modprobe vmw_vsock_virtio_transport", 60);
    // The guest calls the host.
    let mut name = socket.as_os_str().to_owned();
    name.push("_5000");
    let listener = UnixListener::bind(&name).expect("a socket");
    let host = std::thread::spawn(move || listener.accept().and_then(|(s, _)| send_back(s)));
    assert_eq!(g.ok("python3 vsock.py call", 120), "same");
    assert_eq!(host.join().expect("host").expect("stream"), 3 << 20);

    // The host calls the guest.
    g.ok(
        "python3 vsock.py serve >served & until grep -q listening served; do sleep 0.1; done",
        60,
    );
    let mut stream = UnixStream::connect(socket).expect("the VM's socket");
    stream.write_all(b"CONNECT 1234\n").expect("sent");
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).expect("an answer");
        answer.extend(byte);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    let sent: Vec<u8> = (0..3u32 << 20).map(|n| (n * 7 + n / 256) as u8).collect();
    let mut writer = stream.try_clone().expect("stream");
    let (ours, back) = (
        sent.clone(),
        std::thread::scope(|s| {
            s.spawn(|| {
                writer.write_all(&sent).expect("sent");
                writer.shutdown(Shutdown::Write).expect("ended");
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back).expect("received");
            back
        }),
    );
    assert!(ours == back, "{} bytes came back", back.len());

    // Nobody listens: an answer, not silence.
    let mut stream = UnixStream::connect(socket).expect("the VM's socket");
    stream.write_all(b"CONNECT 4321\n").expect("sent");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("closed");
    assert!(rest.is_empty(), "{rest:?}");
}

/// What the guest computed is what the host computes: the guest's executable, and the script.
fn same_on_the_host(disk: &pyrite_tests::user_space::Disk) {
    let guest = std::fs::read_to_string(disk.file("/root/guest/fp.out")).expect("output");
    let host = Command::new(disk.file("/root/guest/fp"))
        .output()
        .expect("runs here");
    assert_eq!(String::from_utf8_lossy(&host.stdout), guest);
    let guest = std::fs::read_to_string(disk.file("/root/guest/crypto.out")).expect("output");
    let host = Command::new("sh")
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/fixtures/guest/crypto.sh"
        ))
        .output();
    match host {
        // Another OpenSSL may lack some of the ciphers.
        Ok(host) if host.status.success() => {
            assert_eq!(String::from_utf8_lossy(&host.stdout), guest);
        }
        _ => eprintln!("not compared: the host's openssl"),
    }
}

#[test]
fn a_debian_system_comes_up_and_works_on_one_cpu() {
    let Some(image) = image(SMALL, "3G") else {
        return;
    };
    let mut g = Guest::boot(&image, "debian-1", &["--cpus", "1", "--memory", "1G"]);
    healthy(&mut g, "1");
    installs(&mut g, "repository-1");
    programs(&mut g);
    languages(&mut g);
    healthy(&mut g, "1");
    let disk = g.power_off();
    disk.check();
    same_on_the_host(&disk);
}

#[test]
fn a_debian_system_comes_up_and_shuts_down_on_two_cpus() {
    let Some(image) = image(SMALL, "3G") else {
        return;
    };
    let dir = Scratch::new("vsock");
    let socket = dir.0.join("vm.sock");
    let path = socket.to_string_lossy().into_owned();
    let options = ["--cpus", "2", "--memory", "512M", "--vsock", &path];
    let mut g = Guest::boot(&image, "debian-2", &options);
    healthy(&mut g, "2");
    installs(&mut g, "repository-2");
    crypto(&mut g);
    streams(&mut g, &socket);
    g.power_off().check();
}

#[test]
fn a_debian_system_comes_up_and_works_on_four_cpus() {
    let Some(image) = image(SMALL, "3G") else {
        return;
    };
    let mut g = Guest::boot(&image, "debian-4", &["--cpus", "4", "--memory", "1G"]);
    healthy(&mut g, "4");
    programs(&mut g);
    crypto(&mut g);
    healthy(&mut g, "4");
    g.power_off().check();
}

/// Every user program that can be executed directly is, whether it pays or not.
#[test]
fn programs_of_a_debian_system_run_on_the_processor_itself() {
    let Some(image) = image(SMALL, "3G") else {
        return;
    };
    let dir = Scratch::new("direct");
    let socket = dir.0.join("control");
    let path = socket.to_string_lossy().into_owned();
    let options = [
        "--cpus",
        "2",
        "--memory",
        "1G",
        "--direct",
        "always",
        "--control",
        &path,
    ];
    let mut g = Guest::boot(&image, "debian-direct", &options);
    healthy(&mut g, "2");
    programs(&mut g);
    crypto(&mut g);
    healthy(&mut g, "2");
    let (status, tree) = pyrite_tests::ctl(&socket, &["inspect"]);
    assert_eq!(status, 0, "{tree}");
    if tree.contains("available: no") {
        pyrite_tests::skipped("this host lets no process be traced");
    } else {
        let runs = (tree.lines())
            .filter_map(|l| l.trim().strip_prefix("runs: ")?.parse::<u64>().ok())
            .sum::<u64>();
        assert!(runs > 10_000, "{tree}");
    }
    g.power_off().check();
}

/// Modules of Python's test suite, of those that the package has.
const PYTHON: &[&str] = &[
    "math",
    "cmath",
    "float",
    "strtod",
    "long",
    "int",
    "complex",
    "decimal",
    "fractions",
    "random",
    "statistics",
    "struct",
    "array",
    "bytes",
    "unicode",
    "memoryview",
    "dict",
    "set",
    "sort",
    "heapq",
    "bisect",
    "itertools",
    "functools",
    "generators",
    "coroutines",
    "exceptions",
    "compile",
    "ast",
    "re",
    "json",
    "pickle",
    "marshal",
    "binascii",
    "hashlib",
    "zlib",
    "gzip",
    "bz2",
    "lzma",
    "zipfile",
    "tarfile",
    "ctypes",
    "mmap",
    "fcntl",
    "os",
    "posix",
    "time",
    "datetime",
    "signal",
    "faulthandler",
    "subprocess",
    "fork1",
    "wait4",
    "thread",
    "threading",
    "queue",
    "select",
    "selectors",
    "epoll",
    "socket",
    "ssl",
    "resource",
    "tempfile",
    "shutil",
];

/// Stressors that check their results, or that press on what an engine finds hard. Not `env`, which
/// takes all memory, so that the kernel ends the shell that waits for it.
const STRESS: &[&str] = &[
    "matrix",
    "matrix-3d",
    "fp",
    "fp-error",
    "fpunch",
    "vecmath",
    "vecwide",
    "vecshuf",
    "vecfp",
    "futex",
    "mutex",
    "atomic",
    "cacheline",
    "dekker",
    "peterson",
    "lockbus",
    "mcontend",
    "membarrier",
    "mmap",
    "mmapfork",
    "mremap",
    "mprotect",
    "madvise",
    "munmap",
    "stack",
    "stackmmap",
    "tlb-shootdown",
    "userfaultfd",
    "fork",
    "vfork",
    "clone",
    "exec",
    "pthread",
    "switch",
    "yield",
    "sigfpe",
    "sigsegv",
    "sigtrap",
    "sigabrt",
    "sigchld",
    "sigq",
    "sigrt",
    "sigsuspend",
    "bad-altstack",
    "far-branch",
    "branch",
    "funccall",
    "funcret",
    "goto",
    "longjmp",
    "nop",
    "opcode",
    "misaligned",
    "priv-instr",
    "usersyscall",
    "x86cpuid",
    "x86syscall",
    "regs",
    "tsc",
    "rdrand",
    "timer",
    "timerfd",
    "itimer",
    "hrtimers",
    "clock",
    "nanosleep",
    "alarm",
    "cpu-online",
    "memcpy",
    "memrate",
    "str",
    "wcs",
    "malloc",
    "brk",
    "bigheap",
    "bsearch",
    "qsort",
    "hsearch",
    "hash",
    "heapsort",
    "mergesort",
    "radixsort",
    "shellsort",
    "skiplist",
    "tree",
    "judy",
    "list",
    "sparsematrix",
    "zlib",
    "crypt",
    "jpeg",
    "pipe",
    "poll",
    "eventfd",
    "sem",
    "sem-sysv",
    "shm",
    "msg",
    "sock",
    "sockpair",
    "udp",
    "splice",
    "tee",
    "vm-rw",
    "vm-splice",
    "vm-segv",
    "hdd",
    "io",
    "iomix",
    "aio",
    "dentry",
    "rename",
    "fallocate",
    "readahead",
    "seccomp",
    "ptrace",
    "procfs",
    "sysinfo",
    "rseq",
    "uprobe",
    "icache",
    "flushcache",
    "prefetch",
    "rmap",
    "memfd",
    "remap",
    "numa",
    "physpage",
    "null",
    "zero",
    "urandom",
    "context",
];

/// Options of a stressor; the one that might stop the machine is refused without a word more.
fn stressor(name: &str, cpus: &str) -> String {
    let sure = if name == "cpu-online" {
        "--pathological "
    } else {
        ""
    };
    format!("{sure}--{name} {cpus}")
}

fn everything(cpus: &str) {
    if !full() {
        return;
    }
    let Some(image) = image(FULL, "6G") else {
        return;
    };
    let name = format!("debian-full-{cpus}");
    let mut g = Guest::boot(&image, &name, &["--cpus", cpus, "--memory", "2G"]);
    healthy(&mut g, cpus);
    installs(&mut g, &format!("repository-full-{cpus}"));
    programs(&mut g);
    languages(&mut g);
    // A stressor that takes all memory is to be ended itself, not the shell that waits for it.
    g.ok("choom -n -900 -p $$", 60);
    let mut bad = Vec::new();
    let mut note = |g: &mut Guest, command: String, seconds| {
        let (status, output) = g.run(&command, seconds);
        eprintln!("{status:3}  {command}");
        // stress-ng(1): 3 and 4 are what the system cannot do, whatever runs it.
        let lacks = command.contains("stress-ng") && matches!(status, 3 | 4);
        if status != 0 && !lacks {
            bad.push(format!("{command}: {status}\n{output}"));
        }
    };
    note(&mut g, "node node.js".into(), 600);
    note(&mut g, "java -Xshare:auto Check.java".into(), 900);
    note(
        &mut g,
        format!("stress-ng --cpu {cpus} --cpu-method all --verify -t 60"),
        300,
    );
    note(
        &mut g,
        format!("stress-ng --vm {cpus} --vm-bytes 128M --vm-method all --verify -t 60"),
        300,
    );
    for s in STRESS {
        note(
            &mut g,
            format!(
                "choom -n 0 -- timeout -k 5 90 stress-ng --verify -t 4 {}",
                stressor(s, cpus)
            ),
            300,
        );
    }
    for m in PYTHON {
        note(
            &mut g,
            format!(
                "timeout -k 5 900 python3 -m test -u none test_{m} 2>&1 | tail -n 30; [ ${{PIPESTATUS[0]}} = 0 ]"
            ),
            1000,
        );
    }
    note(&mut g, "fio --name=check --size=200M --rw=randrw --bs=4k-64k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --filename=/root/fio >/dev/null".into(), 900);
    healthy(&mut g, cpus);
    let disk = g.power_off();
    disk.check();
    same_on_the_host(&disk);
    assert!(bad.is_empty(), "{} failed:\n{}", bad.len(), bad.join("\n"));
}

#[test]
fn everything_works_on_one_cpu() {
    everything("1");
}

#[test]
fn everything_works_on_four_cpus() {
    everything("4");
}
