//! A stock Debian kernel to a shell with network, on the software engine.
//!
//! The kernel comes the way a user gets it: through the host's package client, once, cached.

use std::process::Command;
use std::time::Duration;

use pyrite_tests::{Session, pyrite};

const BOOT: Duration = Duration::from_secs(180);
const STEP: Duration = Duration::from_secs(60);

fn boot(options: &[&str]) -> Session {
    let mut command = Command::new(pyrite());
    command
        .args(["run", "--engine", "soft", "--timeout", "5m"])
        .args(options);
    let mut s = Session::start(&mut command);
    s.expect("root@pyrite:~# ", BOOT);
    s
}

#[test]
fn stock_guest_reaches_a_shell_and_powers_off() {
    let mut s = boot(&[]);
    s.send("echo $((6 * 7)) $(nproc)\n");
    s.expect("42 1", STEP);
    s.send("ip -4 addr show dev eth0 | grep -o 'inet [0-9.]*'\n");
    s.expect("inet 10.0.2.15", STEP);
    s.send("ping -c 1 10.0.2.2 | grep -o '1 packets received'\n");
    s.expect("1 packets received", STEP);
    s.send("exit\n");
    let (code, _, errors) = s.end(STEP);
    assert_eq!(code, 0, "{errors}");
}

#[test]
fn stock_guest_boots_with_four_cpus_on_the_serial_console() {
    let mut s = boot(&["--cpus", "4", "--console", "serial", "--memory", "1G"]);
    s.send("echo $(nproc) CPUs\n");
    s.expect("4 CPUs", STEP);
    s.expect("root@pyrite:~# ", STEP);
    s.send("reboot -f\n");
    s.expect("root@pyrite:~# ", BOOT);
    s.send("poweroff -f\n");
    assert_eq!(s.end(STEP).0, 0);
}

#[test]
fn guest_kernel_panic_is_reported() {
    let mut s = boot(&["--console", "serial", "--append", "panic=0"]);
    s.send("echo c >/proc/sysrq-trigger\n");
    let (code, _, errors) = s.end(STEP);
    assert_eq!(code, 3, "{errors}");
    assert!(errors.contains("Kernel panic - not syncing"), "{errors}");
}

/// The key behind a break is the kernel's SysRq command, and does not overtake it.
#[test]
fn break_and_the_key_behind_it_reach_the_kernel() {
    let mut s = boot(&["--console", "serial"]);
    s.send("echo 1 >/proc/sys/kernel/sysrq; dmesg -n 8; echo re''ady\n");
    s.expect("ready", STEP);
    for _ in 0..5 {
        s.send("\x01bh");
        s.expect("sysrq: HELP", STEP);
    }
    s.send("\npoweroff -f\n");
    assert_eq!(s.end(STEP).0, 0);
}
