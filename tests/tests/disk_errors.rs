//! Errors and limits of disks, as the drivers of Debian's standard kernel see them.
//!
//! For every controller: a sector that cannot be read or written, a full host and a failed flush
//! reach the guest as the controller would tell of them; with `on-error=`, the VM is paused
//! instead, and what failed is tried again.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyrite_tests::Scratch;
use pyrite_tests::fixtures::{self, Guest};
use pyrite_tests::vm::{STEP, Vm, with};

const MIB: u64 = 1 << 20;
const EIO: &str = "Input/output error";

fn guest() -> Option<Guest> {
    match fixtures::storage_guest() {
        Ok(guest) => Some(guest),
        Err(why) => {
            pyrite_tests::skipped(why);
            None
        }
    }
}

fn blank(dir: &Scratch, name: &str) -> PathBuf {
    let path = dir.0.join(name);
    let file = File::create(&path).expect("disk");
    file.set_len(64 * MIB).expect("size");
    path
}

fn boot(dir: &Scratch, guest: &Guest, disk: String) -> Vm {
    let options = with(&[
        ("--net", "none".into()),
        ("--disk", disk),
        ("--memory", "256M".into()),
    ]);
    let mut vm = Vm::boot(dir, guest, &options);
    // The kernel's complaints would stand between the answers.
    vm.ask("dmesg -n 1");
    vm
}

/// What the guest's kernel says of errors on a bus.
struct Said {
    /// Of a sector that cannot be read.
    read: &'static str,
    /// Of one that cannot be written.
    write: &'static str,
    /// Of a host without space.
    full: &'static str,
    /// What a program is told of the latter.
    full_error: &'static str,
}

/// The part of the kernel's log that a command adds, and what the command printed.
fn with_log(vm: &mut Vm, command: &str) -> (String, String) {
    vm.ask("dmesg -c >/dev/null");
    let out = vm.ask(command);
    let log = vm.ask("dmesg -c");
    (out, log)
}

fn errors_reach_the_guest(vm: &mut Vm, dev: &str, said: &Said) {
    let read = format!("dd if=/dev/{dev} of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>&1");
    let write = format!("dd if=/dev/zero of=/dev/{dev} bs=4k seek=512 count=1 oflag=direct 2>&1");
    let full = format!("dd if=/dev/zero of=/dev/{dev} bs=4k seek=8192 count=1 oflag=direct 2>&1");
    let flush = format!("dd if=/dev/zero of=/dev/{dev} bs=4k count=1 conv=fsync 2>&1");
    let cases = [
        ("fail-read=2050-2051", &read, EIO, said.read, "sector 2048"),
        ("fail-write=4100", &write, EIO, said.write, "sector 4096"),
        (
            "full-at=32M",
            &full,
            said.full_error,
            said.full,
            "sector 65536",
        ),
        ("fail-flush=on", &flush, EIO, "", ""),
    ];
    for (fault, command, error, told, place) in cases {
        assert!(
            vm.ask(command).contains("1+0 records out"),
            "{fault}: before"
        );
        vm.done(&["disk", "0", fault]);
        let (out, log) = with_log(vm, command);
        // ENODATA is what Linux makes of a medium error.
        let medium = error == EIO && out.contains("No data available");
        assert!(medium || out.contains(error), "{fault}: {out}\n{log}");
        assert!(log.contains(told) && log.contains(place), "{fault}: {log}");
        let none = format!("{}=none", fault.split('=').next().unwrap_or_default());
        vm.done(&["disk", "0", &none]);
        assert!(
            vm.ask(command).contains("1+0 records out"),
            "{fault}: after"
        );
    }
    assert_ne!(inspect(vm, "failed-on-purpose"), "0");
    assert_eq!(inspect(vm, "kept-so-far"), "0");
}

fn inspect(vm: &Vm, what: &str) -> String {
    let (code, text) = vm.control(&["inspect", &format!("disks/0/{what}")]);
    assert_eq!(code, 0, "{text}");
    text.trim().to_owned()
}

fn is_running(vm: &Vm) -> bool {
    vm.control(&["inspect", "running"]).1 == "yes\n"
}

fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + STEP;
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn error_pauses(vm: &mut Vm, dir: &Scratch, dev: &str) {
    vm.ask("dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null");
    let sum = vm.ask("md5sum </tmp/x");
    let sum = sum[..32].to_owned();
    vm.done(&["disk", "0", "on-error=enospc", "full-at=36M"]);
    vm.ask("dmesg -c >/dev/null");
    vm.session.send(&format!(
        "dd if=/tmp/x of=/dev/{dev} bs=1M seek=32 conv=fsync && echo WRI''TTEN\n"
    ));
    until("the VM is paused", || !is_running(vm));
    until("the error is told", || {
        vm.session.errors().contains("no space left on the host")
    });
    let told = vm.session.errors();
    assert!(
        told.contains("disk 0 (") && told.contains("resume"),
        "{told}"
    );
    assert!(inspect(vm, "error").contains("no space left"));
    let there = dir.0.join("none").display().to_string();
    let (code, text) = vm.control(&["snapshot", &there]);
    assert!(code != 0 && text.contains("on-error=report"), "{text}");
    // It is tried again, with the same outcome.
    let kept = |vm: &Vm| inspect(vm, "kept-so-far").parse::<u64>().expect("a number");
    let before = kept(vm);
    vm.done(&["resume"]);
    until("it has failed again", || {
        kept(vm) > before && !is_running(vm)
    });
    // Now there is room.
    vm.done(&["disk", "0", "full-at=none"]);
    vm.done(&["resume"]);
    vm.session.expect("WRITTEN", STEP);
    let log = vm.ask("dmesg -c");
    assert!(!log.contains("error"), "the guest has seen it: {log}");
    let back = vm.ask(&format!(
        "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/{dev} bs=1M skip=32 count=8 2>/dev/null | md5sum"
    ));
    assert_eq!(&back[..32], sum);
    // Another error is reported by enospc, and pauses by pause; then the guest may see it.
    let read = format!("dd if=/dev/{dev} of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>&1");
    vm.done(&["disk", "0", "fail-read=2048"]);
    let out = vm.ask(&read);
    assert!(
        out.contains(EIO) || out.contains("No data available"),
        "{out}"
    );
    vm.done(&["disk", "0", "on-error=pause"]);
    vm.session.send(&format!("{read}; echo RE''AD\n"));
    until("the VM is paused", || !is_running(vm));
    assert!(inspect(vm, "error").contains(EIO));
    vm.done(&["disk", "0", "on-error=report"]);
    vm.done(&["resume"]);
    let out = vm.session.until("READ", STEP);
    assert!(
        out.contains(EIO) || out.contains("No data available"),
        "{out}"
    );
    vm.ask("true");
    assert!(is_running(vm));
}

fn bus(bus: &str, dev: &str, said: &Said) {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new(&format!("errors-{bus}"));
    let disk = blank(&dir, "disk");
    let mut vm = boot(&dir, &guest, format!("{},bus={bus}", disk.display()));
    errors_reach_the_guest(&mut vm, dev, said);
    error_pauses(&mut vm, &dir, dev);
    // A reset gives up what waits.
    vm.done(&["disk", "0", "fail-read=2048", "on-error=pause"]);
    vm.session.send(&format!(
        "dd if=/dev/{dev} of=/dev/null bs=4k skip=256 count=1 iflag=direct\n"
    ));
    until("the VM is paused", || !is_running(&vm));
    vm.done(&["reset"]);
    vm.session.expect("Leave with exit", STEP * 4);
    vm.stop();
}

#[test]
fn virtio_blk() {
    bus(
        "virtio",
        "vda",
        &Said {
            read: "I/O error, dev vda",
            write: "I/O error, dev vda",
            full: "I/O error, dev vda",
            // VIRTIO_BLK_S_IOERR is all there is.
            full_error: EIO,
        },
    );
}

#[test]
fn virtio_scsi() {
    bus(
        "scsi",
        "sda",
        &Said {
            read: "Unrecovered read error",
            write: "Write error",
            full: "Space allocation failed write protect",
            full_error: "No space left on device",
        },
    );
}

#[test]
fn nvme() {
    bus(
        "nvme",
        "nvme0n1",
        &Said {
            read: "critical medium error",
            write: "critical medium error",
            full: "critical space allocation error",
            full_error: "No space left on device",
        },
    );
}

#[test]
fn ahci() {
    bus(
        "ahci",
        "sda",
        &Said {
            read: "{ UNC }",
            write: "{ DRDY DF ERR }",
            full: "{ DRDY DF ERR }",
            full_error: EIO,
        },
    );
}

#[test]
fn ide() {
    bus(
        "ide",
        "sda",
        &Said {
            read: "{ UNC }",
            write: "{ DRDY DF ERR }",
            full: "{ DRDY DF ERR }",
            full_error: EIO,
        },
    );
}

#[test]
fn limits_hold_and_change() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("limits");
    let disk = blank(&dir, "disk");
    let mut vm = boot(
        &dir,
        &guest,
        format!("{},iops-read=20,iops-read-burst=2", disk.display()),
    );
    let timed = |vm: &mut Vm, command: &str| {
        let began = Instant::now();
        let out = vm.ask(&format!("{command} 2>&1"));
        assert!(out.contains("records out"), "{out}");
        began.elapsed().as_secs_f64()
    };
    // Each of them far from the others, so that every one is a request: the burst, one more, and
    // then as the rate allows, so the time cannot be shorter. (dd of busybox has no aligned buffer,
    // which direct reads need.)
    let reads = "for n in $(seq 40); do dd if=/dev/vda of=/dev/null bs=4k count=1 skip=$((n*397)); \
                 done";
    let took = timed(&mut vm, reads);
    assert!(took >= 37.0 / 20.0, "40 reads at 20/s took {took} s");
    assert_ne!(inspect(&vm, "delayed"), "0");
    vm.done(&[
        "disk",
        "0",
        "iops-read=none",
        "bps-write=4M",
        "bps-write-burst=512K",
    ]);
    let writes = "dd if=/dev/zero of=/dev/vda bs=256k count=32 conv=fsync";
    let took = timed(&mut vm, writes);
    // 8 MiB without the burst and a request, which has at most 1280 KiB.
    assert!(took >= 6.25 / 4.0, "8 MiB at 4 MiB/s took {took} s");
    assert_eq!(inspect(&vm, "limited"), "yes");
    // Much that waits is no reason not to pause.
    vm.done(&["disk", "0", "bps-write=16K"]);
    vm.session
        .send("dd if=/dev/zero of=/dev/vda bs=1M count=8; sync; echo SYN''CED\n");
    until("something waits", || inspect(&vm, "waiting") != "0");
    vm.done(&["pause"]);
    assert_eq!(inspect(&vm, "waiting"), "0");
    let (code, text) = vm.control(&["disk", "0", "iops=0"]);
    assert!(code != 0 && text.contains("more than 0"), "{text}");
    let (code, text) = vm.control(&["disk", "7", "iops=5"]);
    assert!(code != 0 && text.contains("no disk 7"), "{text}");
    vm.done(&["disk", "0", "bps-write=none"]);
    vm.done(&["resume"]);
    vm.session.expect("SYNCED", STEP);
    assert_eq!(inspect(&vm, "limited"), "no");
    vm.stop();
}
