//! Distribution kernels on the software engine: each boots to a shell, sees the machine it was
//! given, has a working network and no complaint about the machine in its log.
//!
//! A few run always; `PYRITE_BOOT_MATRIX=full` runs all and prints a table, and
//! `PYRITE_BOOT_MATRIX=full:TEXT` those whose name contains TEXT. Where the kernels cannot be
//! fetched a test says why and counts as skipped. The serial log of a failure is kept beside the
//! fixtures.

use std::io::Write;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pyrite_tests::fixtures::{self, KernelPackage};
use pyrite_tests::{Session, pyrite};

const BOOT: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_secs(60);
const PROMPT: &str = "root@pyrite:~# ";

/// Warnings that machines without fault give too.
const EXPECTED_WARNINGS: [&str; 5] = [
    // 32-bit kernels without PAE have neither.
    "NX (Execute Disable) protection cannot be enabled: non-PAE kernel!",
    "ignored, not CPU addressable",
    // The host gave its processor to somebody else for a while.
    "hrtimer: interrupt took",
    // Frequency scaling is the host's; hypervisors on AMD processors have no _CPC.
    "amd_pstate: ",
    "Please enable it if your BIOS has the CPPC option.",
];

const fn kernel(suite: &'static str, arch: &'static str, package: &'static str) -> KernelPackage {
    KernelPackage {
        suite,
        arch,
        package,
    }
}

const DEBIAN_11: KernelPackage = kernel("bullseye", "amd64", "linux-image-amd64");
const DEBIAN_11_CLOUD: KernelPackage = kernel("bullseye", "amd64", "linux-image-cloud-amd64");
const DEBIAN_11_686: KernelPackage = kernel("bullseye", "i386", "linux-image-686");
const DEBIAN_11_PAE: KernelPackage = kernel("bullseye", "i386", "linux-image-686-pae");
const DEBIAN_12: KernelPackage = kernel("bookworm", "amd64", "linux-image-amd64");
const DEBIAN_12_CLOUD: KernelPackage = kernel("bookworm", "amd64", "linux-image-cloud-amd64");
const DEBIAN_12_RT: KernelPackage = kernel("bookworm", "amd64", "linux-image-rt-amd64");
const DEBIAN_12_686: KernelPackage = kernel("bookworm", "i386", "linux-image-686");
const DEBIAN_12_PAE: KernelPackage = kernel("bookworm", "i386", "linux-image-686-pae");
const DEBIAN_13: KernelPackage = kernel("trixie", "amd64", "linux-image-amd64");
const DEBIAN_13_CLOUD: KernelPackage = kernel("trixie", "amd64", "linux-image-cloud-amd64");
const DEBIAN_13_RT: KernelPackage = kernel("trixie", "amd64", "linux-image-rt-amd64");

const KERNELS: [KernelPackage; 12] = [
    DEBIAN_11,
    DEBIAN_11_CLOUD,
    DEBIAN_11_686,
    DEBIAN_11_PAE,
    DEBIAN_12,
    DEBIAN_12_CLOUD,
    DEBIAN_12_RT,
    DEBIAN_12_686,
    DEBIAN_12_PAE,
    DEBIAN_13,
    DEBIAN_13_CLOUD,
    DEBIAN_13_RT,
];

/// A machine with a kernel.
#[derive(Clone, Copy)]
struct Case {
    kernel: KernelPackage,
    cpus: u32,
    memory_mib: u64,
}

impl Case {
    fn name(&self) -> String {
        let package = self.kernel.package.trim_start_matches("linux-image-");
        format!(
            "{}-{package}-{}cpu-{}M",
            self.kernel.suite, self.cpus, self.memory_mib
        )
    }
}

/// How a case ended that did not fail.
enum Outcome {
    Booted { seconds: f32 },
    Skipped,
}

static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// True where the fixture is there; else says why not.
fn or_skip<T>(name: &str, fixture: Result<T, fixtures::Reason>) -> Option<T> {
    fixture
        .map_err(|reason| {
            let n = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
            println!("skipped {name} ({n} so far): {reason}");
        })
        .ok()
}

/// Boots a case and checks it; panics with the place of the serial log if something is wrong.
fn check(case: Case) -> Outcome {
    let Some(guest) = or_skip(&case.name(), fixtures::guest(case.kernel)) else {
        return Outcome::Skipped;
    };
    let log = fixtures::cache_dir().join(format!("{}.log", case.name()));
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| boot(case, &guest, &log)));
    match result {
        Ok(()) => {
            let _ = std::fs::remove_file(&log);
            let seconds = started.elapsed().as_secs_f32();
            Outcome::Booted { seconds }
        }
        Err(cause) => {
            println!(
                "{} failed; the serial log is {}",
                case.name(),
                log.display()
            );
            std::panic::resume_unwind(cause);
        }
    }
}

fn boot(case: Case, guest: &fixtures::Guest, log: &std::path::Path) {
    let host = TcpListener::bind("127.0.0.1:0").expect("a port of the host");
    let port = host.local_addr().expect("its number").port();
    std::thread::spawn(move || {
        while let Ok((mut guest, _)) = host.accept() {
            let _ = guest.write_all(b"hello from the host\n");
        }
    });
    let mut command = Command::new(pyrite());
    command
        .args(["run", "--engine", "soft", "--timeout", "8m", "--no-reboot"])
        .args(["--console", "serial", "--host-loopback"])
        .args(["--append", "console=ttyS0 panic=-1"])
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initrd)
        .args(["--cpus", &case.cpus.to_string()])
        .args(["--memory", &format!("{}M", case.memory_mib)]);
    let mut s = Session::start_logged(&mut command, log);
    s.expect(PROMPT, BOOT);
    s.send("dmesg -n 1\n");
    s.expect(PROMPT, STEP);

    s.send("echo cpus=$(nproc)=\n");
    s.expect(&format!("cpus={}=", case.cpus), STEP);
    s.send("echo kib=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)=\n");
    s.expect("print $2", STEP);
    s.expect("\nkib=", STEP);
    let kib: u64 = s.until("=", STEP).parse().expect("MemTotal");
    // What the kernel takes for itself differs; a lost bank would be more.
    let least = (case.memory_mib << 10) * 15 / 16;
    assert!(
        kib + (56 << 10) > least,
        "the guest has only {kib} KiB of {} MiB",
        case.memory_mib
    );

    s.send("ip -4 addr show dev eth0 | grep -o 'inet [0-9.]*'\n");
    s.expect("inet 10.0.2.15", STEP);
    s.send("ping -c 1 10.0.2.2 | grep -o '1 packets received'\n");
    s.expect("\n1 packets received", STEP);
    s.send(&format!("nc -w 9 10.0.2.2 {port} </dev/null\n"));
    s.expect("hello from the host", STEP);
    s.send("nslookup nowhere.invalid >/dev/null 2>&1; echo dns=$?=\n");
    // No such name, or no name server: an answer, not silence. Older busyboxes exit with 0.
    s.expect("\ndns=", STEP);

    s.send("dmesg -r | grep '^<[0-4]>'; echo end=$?=\n");
    s.expect("=$?=", STEP);
    let warnings = s.until("end=", STEP);
    let warnings: Vec<&str> = warnings
        .lines()
        .filter(|l| l.starts_with('<'))
        .filter(|l| !EXPECTED_WARNINGS.iter().any(|e| l.contains(e)))
        .filter(|l| !is_processor_list(l))
        .collect();
    assert!(warnings.is_empty(), "the kernel warns:\n{warnings:#?}");
    s.send("cat /proc/sys/kernel/tainted | sed s/^/tainted=/\n");
    s.expect("tainted=0", STEP);
    s.send("exit\n");
    let (code, _, errors) = s.end(STEP);
    assert_eq!(code, 0, "{errors}");
}

/// Kernel 5.10 continues its line about processors that come up (`#1 #2 …`) without a level; a
/// message in between makes a line of its own of the rest, at the default level.
fn is_processor_list(line: &str) -> bool {
    let text = line.split_once(']').map_or("", |(_, text)| text);
    let mut words = text.split_whitespace().peekable();
    words.peek().is_some()
        && words.all(|w| {
            w.strip_prefix('#')
                .is_some_and(|n| n.parse::<u32>().is_ok())
        })
}

fn check_one(kernel: KernelPackage, cpus: u32, memory_mib: u64) {
    check(Case {
        kernel,
        cpus,
        memory_mib,
    });
}

#[test]
fn debian_12_cloud_with_one_vcpu() {
    check_one(DEBIAN_12_CLOUD, 1, 128);
}

#[test]
fn debian_12_cloud_with_four_vcpus() {
    check_one(DEBIAN_12_CLOUD, 4, 512);
}

#[test]
fn debian_12_pae_with_little_memory() {
    check_one(DEBIAN_12_PAE, 1, 64);
}

#[test]
fn debian_12_686_without_pae() {
    check_one(DEBIAN_12_686, 1, 512);
}

#[test]
fn debian_13_cloud_with_memory_above_4_gib() {
    check_one(DEBIAN_13_CLOUD, 4, 6144);
}

#[test]
fn debian_11_standard() {
    check_one(DEBIAN_11, 1, 512);
}

#[test]
fn elf_kernel_enters_by_pvh() {
    let guest = fixtures::guest(DEBIAN_12_CLOUD)
        .and_then(|g| fixtures::vmlinux(&g).map(|kernel| fixtures::Guest { kernel, ..g }));
    let Some(guest) = or_skip("vmlinux", guest) else {
        return;
    };
    let log = fixtures::cache_dir().join("vmlinux.log");
    let case = Case {
        kernel: DEBIAN_12_CLOUD,
        cpus: 2,
        memory_mib: 256,
    };
    boot(case, &guest, &log);
}

#[test]
fn multiboot_kernel_runs_until_it_misses_its_modules() {
    let package = "gnumach-image-1.8-486";
    let mach = fixtures::file_of("bookworm", "i386", package, "boot", "gnumach");
    let Some(mach) = or_skip("GNU Mach", mach) else {
        return;
    };
    let mut command = Command::new(pyrite());
    command
        .args([
            "run",
            "--engine",
            "soft",
            "--timeout",
            "2m",
            "--memory",
            "256M",
        ])
        .args([
            "--console",
            "serial",
            "--append",
            "console=com0",
            "--kernel",
        ])
        .arg(mach);
    let mut s = Session::start(&mut command);
    s.expect("No bootstrap code loaded with the kernel!", STEP);
}

/// All machines of the matrix.
fn full_matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for kernel in KERNELS {
        let is_32 = kernel.arch == "i386";
        let sizes: &[u64] = if is_32 {
            &[64, 512, 2048]
        } else {
            &[128, 512, 2048, 4096, 6144]
        };
        for &memory_mib in sizes {
            for cpus in [1, 4] {
                // The standard kernels' per-CPU data and initrd leave nothing of 64 MiB.
                if memory_mib > 64 || cpus == 1 {
                    cases.push(Case {
                        kernel,
                        cpus,
                        memory_mib,
                    });
                }
            }
        }
    }
    cases.push(Case {
        kernel: DEBIAN_12_CLOUD,
        cpus: 8,
        memory_mib: 1024,
    });
    cases
}

#[test]
fn matrix() {
    let wanted = std::env::var("PYRITE_BOOT_MATRIX").unwrap_or_default();
    let Some(filter) = wanted.strip_prefix("full") else {
        return;
    };
    let filter = filter.trim_start_matches(':');
    let mut table = String::new();
    let mut failed = 0;
    for case in full_matrix() {
        if !case.name().contains(filter) {
            continue;
        }
        let line = match catch_unwind(AssertUnwindSafe(|| check(case))) {
            Ok(Outcome::Booted { seconds }) => format!("{:44} ok {seconds:6.1} s", case.name()),
            Ok(Outcome::Skipped) => format!("{:44} skipped", case.name()),
            Err(_) => {
                failed += 1;
                format!("{:44} FAILED", case.name())
            }
        };
        println!("{line}");
        table.push_str(&line);
        table.push('\n');
    }
    println!("{table}");
    assert_eq!(failed, 0, "machines that do not boot:\n{table}");
}
