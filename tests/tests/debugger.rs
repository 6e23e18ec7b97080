//! A stock gdb debugs guests from outside, on the software engine.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::fixtures::{self, KernelPackage};
use pyrite_tests::gdb::Gdb;
use pyrite_tests::vm::{Vm, with};
use pyrite_tests::{Scratch, Session, guest, pyrite, skipped};

const DEBIAN_12: KernelPackage = KernelPackage {
    suite: "bookworm",
    arch: "amd64",
    package: "linux-image-cloud-amd64",
};
const LIMIT: Duration = Duration::from_secs(60);

/// What the first CPU of the micro-guest counts in a loop, and the copy that a function makes.
const COUNT: u64 = 0x9000;
const COPY: u64 = 0x9004;
/// What the second CPU counts, in real mode.
const OTHER: u64 = 0x7000;
const START: u64 = 0x10_0000;
const LOOP: u64 = START + 55;
const FUNCTION: u64 = LOOP + 13;
const STORE: u64 = FUNCTION + 5;
const RETURN: u64 = STORE + 5;

/// Two CPUs that count.
fn counters() -> Vec<u8> {
    let mut code = vec![0xbc, 0, 0, 9, 0]; // mov esp, 90000H
    let mut store = |at: u32, value: u32| {
        code.extend([0xc7, 0x05]);
        code.extend(at.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    // 8000H, in real mode: lock inc word [7000H]; jmp 8000H
    store(0x8000, u32::from_le_bytes([0xf0, 0xff, 0x06, 0x00]));
    store(0x8004, u32::from_le_bytes([0x70, 0xeb, 0xf9, 0x90]));
    // INIT and start-up IPI to APIC 1.
    store(0xfee0_0310, 1 << 24);
    store(0xfee0_0300, 0x4500);
    store(0xfee0_0300, 0x4608);
    assert_eq!(START + code.len() as u64, LOOP);
    code.extend([0xff, 0x05, 0, 0x90, 0, 0]); // inc dword [COUNT]
    code.extend([0xe8, 2, 0, 0, 0]); // call FUNCTION
    code.extend([0xeb, 0xf3]); // jmp LOOP
    assert_eq!(START + code.len() as u64, FUNCTION);
    code.extend([0xa1, 0, 0x90, 0, 0]); // mov eax, [COUNT]
    code.extend([0xa3, 4, 0x90, 0, 0]); // mov [COPY], eax
    code.push(0xc3);
    code
}

/// Starts the counters with a stub at `listen`.
fn start(dir: &Scratch, listen: &str, options: &[&str]) -> Session {
    let kernel = dir.file("kernel", &guest::pvh(&counters()));
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command.args(["--cpus", "2", "--timeout", "3m", "--console", "none"]);
    command.args(["--gdb", listen, "--kernel"]);
    command.arg(&kernel).args(options);
    Session::start(&mut command)
}

/// Waits for a socket.
fn appears(socket: &Path, vm: &mut Session) {
    let until = Instant::now() + LIMIT;
    while !socket.exists() {
        assert!(
            vm.ended().is_none() && Instant::now() < until,
            "{}",
            vm.errors()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn gdb_drives_two_cpus() {
    let Some(mut gdb) = Gdb::start() else { return };
    let dir = Scratch::new("gdb-counters");
    let socket = dir.0.join("gdb");
    let mut vm = start(&dir, &format!("unix:{},wait", socket.display()), &[]);
    appears(&socket, &mut vm);
    gdb.connect(&socket);
    // Before its first instruction.
    assert_eq!(gdb.value("$rip"), START);
    assert_eq!(gdb.value("$cr0 & 0x80000001"), 1);

    // A breakpoint, again and again; a step over the instruction that it is at.
    let shown = gdb.ask(&format!("break *{FUNCTION:#x}"));
    assert!(shown.contains("Breakpoint 1"), "{shown}");
    for n in 1..=3 {
        gdb.ask("continue");
        assert_eq!(
            (gdb.value("$rip"), gdb.value("*(int*)0x9000")),
            (FUNCTION, n)
        );
    }
    gdb.ask("stepi");
    assert_eq!((gdb.value("$rip"), gdb.value("$rax")), (STORE, 3));
    // Nothing was written into the guest.
    gdb.ask("maintenance packet Qqemu.PhyMemMode:1");
    let shown = gdb.ask(&format!("maintenance packet m{FUNCTION:x},5"));
    assert!(shown.contains("a100900000"), "{shown}");
    gdb.ask("maintenance packet Qqemu.PhyMemMode:0");

    // A hardware breakpoint beside it.
    gdb.ask(&format!("hbreak *{RETURN:#x}"));
    gdb.ask("continue");
    assert_eq!((gdb.value("$rip"), gdb.value("*(int*)0x9004")), (RETURN, 3));

    // Memory and registers change.
    gdb.ask("delete");
    gdb.ask("set var *(int*)0x9000 = 1000");
    gdb.ask("set var $rbx = 0x12345678");
    assert_eq!(gdb.value("$rbx"), 0x1234_5678);

    // Watchpoints: the instruction behind the one that stored, or loaded.
    gdb.ask(&format!("watch *(int*){COPY:#x}"));
    let shown = gdb.ask("continue");
    assert!(shown.contains("New value = 1001"), "{shown}");
    assert_eq!(gdb.value("$rip"), RETURN);
    gdb.ask("delete");
    gdb.ask(&format!("rwatch *(int*){COUNT:#x}"));
    let shown = gdb.ask("continue");
    assert!(
        shown.contains("Value = 1001") || shown.contains("Value = 1002"),
        "{shown}"
    );
    gdb.ask("delete");

    // Both CPUs are threads, and both have gone on.
    let shown = gdb.ask("info threads");
    assert!(
        shown.contains("vcpu 0 [running]") && shown.contains("vcpu 1 [running]"),
        "{shown}"
    );
    gdb.ask("thread 2");
    assert_eq!(gdb.value("$cs_base"), 0x8000);
    assert!(gdb.value("$rip") <= 5);
    let before = gdb.value(&format!("*(unsigned short*){OTHER:#x}"));
    gdb.ask("break *0x8000 thread 2");
    gdb.ask("continue");
    gdb.ask("continue");
    let after = gdb.value(&format!("*(unsigned short*){OTHER:#x}"));
    assert_eq!(after.wrapping_sub(before) & 0xffff, 1, "{before} {after}");
    assert_eq!(gdb.value("$cs_base + $rip"), 0x8000);
    gdb.ask("delete");

    // It runs until it is interrupted, and then stands still, time included.
    let before = gdb.value(&format!("*(unsigned*){COUNT:#x}"));
    gdb.send("continue");
    std::thread::sleep(Duration::from_millis(300));
    gdb.interrupt();
    let shown = gdb.answer();
    assert!(shown.contains("SIGINT"), "{shown}");
    let stopped = gdb.value(&format!("*(unsigned*){COUNT:#x}"));
    assert!(stopped > before + 1000, "{before} {stopped}");
    std::thread::sleep(Duration::from_millis(50));
    gdb.ask("maintenance flush dcache");
    assert_eq!(gdb.value(&format!("*(unsigned*){COUNT:#x}")), stopped);
    gdb.monitor("translate 0x9000", "0x9000, in a page of");

    // Without it the guest goes on, and another one can come.
    gdb.ask("detach");
    gdb.connect(&socket);
    assert!(gdb.value(&format!("*(unsigned*){COUNT:#x}")) > stopped);
    gdb.ask("kill");
    gdb.quit();
    assert_eq!(vm.end(LIMIT).0, 130);
    assert!(!socket.exists());
}

#[test]
fn guest_that_powers_off_is_an_exited_process() {
    let Some(mut gdb) = Gdb::start() else { return };
    let dir = Scratch::new("gdb-exit");
    let socket = dir.0.join("gdb");
    let kernel = dir.file("kernel", &guest::pvh(&guest::power_off()));
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command
        .arg("--gdb")
        .arg(format!("unix:{},wait", socket.display()));
    command.arg("--kernel").arg(kernel);
    let mut vm = Session::start(&mut command);
    appears(&socket, &mut vm);
    gdb.connect(&socket);
    let shown = gdb.ask("continue");
    assert!(shown.contains("exited normally"), "{shown}");
    gdb.quit();
    assert_eq!(vm.end(LIMIT).0, 0);
}

#[test]
fn stub_is_refused_where_others_could_reach_it() {
    let dir = Scratch::new("gdb-refused");
    let (code, _, errors) = start(&dir, "0.0.0.0:0", &[]).end(LIMIT);
    assert_eq!(code, 2, "{errors}");
    assert!(
        errors.contains("--gdb") && errors.contains("127.0.0.1"),
        "{errors}"
    );
    let file = dir.file("file", b"data");
    let (code, _, errors) = start(&dir, &format!("unix:{}", file.display()), &[]).end(LIMIT);
    assert_eq!(code, 2, "{errors}");
    assert_eq!(std::fs::read(&file).expect("read"), b"data");
}

#[test]
fn gdb_stops_a_linux_kernel_at_virtual_addresses() {
    let Some(mut gdb) = Gdb::start() else { return };
    let linux = match fixtures::guest(DEBIAN_12) {
        Ok(g) => g,
        Err(e) => return skipped(e),
    };
    let dir = Scratch::new("gdb-linux");
    let socket = dir.0.join("gdb");
    let options = with(&[
        ("--gdb", format!("unix:{}", socket.display())),
        ("--cpus", "2".into()),
        ("--net", "none".into()),
    ]);
    let mut vm = Vm::boot(&dir, &linux, &options);
    let uname = vm.symbol("__x64_sys_newuname");
    let uts = vm.symbol("init_uts_ns");
    gdb.connect(&socket);
    gdb.ask(&format!("break *{uname:#x}"));
    gdb.send("continue");
    std::thread::sleep(Duration::from_millis(200));
    vm.session.send("uname -r; echo d''one\n");
    gdb.answer();
    assert_eq!(gdb.value("$rip"), uname);
    assert_eq!(gdb.value("$cs & 3"), 0);
    // Its first argument: where the program's registers are, on this task's stack.
    assert!(gdb.value("$rdi") > 0xffff_8000_0000_0000);
    assert_eq!(gdb.value("($rdi - (long)$rsp) < 0x4000"), 1);
    let shown = gdb.ask(&format!("find /b {uts:#x}, +400, 'L', 'i', 'n', 'u', 'x'"));
    assert!(shown.contains("1 pattern found"), "{shown}");
    // A step stays in this function, although the timer's interrupt is due.
    std::thread::sleep(Duration::from_millis(50));
    gdb.ask("stepi");
    assert!((uname + 1..uname + 16).contains(&gdb.value("$rip")));
    gdb.ask("delete");
    // The kernel copies the names to the program.
    let release = release_of(&mut gdb, uts);
    gdb.ask(&format!("rwatch *(char*){release:#x}"));
    gdb.ask("continue");
    assert!(gdb.value("$rip") > 0xffff_8000_0000_0000);
    gdb.ask("delete");
    gdb.ask("detach");
    vm.session.expect("done", LIMIT);
    vm.stop();
    gdb.quit();
}

/// Where the kernel's release is in its names.
fn release_of(gdb: &mut Gdb, uts: u64) -> u64 {
    let shown = gdb.ask(&format!("find /b {uts:#x}, +600, '6', '.'"));
    let digits = shown.split(['\n', ' ', '<']).next().unwrap_or_default();
    let digits = digits.trim_start_matches("0x");
    u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{shown}"))
}
