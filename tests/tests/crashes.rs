//! Guests that crash, and what is kept of them: pvpanic, ELF cores.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pyrite_tests::fixtures::{self, Guest, KernelPackage};
use pyrite_tests::gdb::Gdb;
use pyrite_tests::vm::{Vm, with};
use pyrite_tests::{Scratch, Session, ctl, guest, pyrite, skipped};

const LIMIT: Duration = Duration::from_secs(60);
/// The vCPU's state after the guest's code below.
const MARK: u32 = 0x1234_5678;

/// Debian 12's kernel with the drivers of what is tested here.
fn debian_12() -> Option<Guest> {
    let kernel = KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-cloud-amd64",
    };
    let drivers = ["pvpanic_mmio", "pvpanic_pci", "qemu_fw_cfg"];
    match fixtures::guest_with(kernel, "-crashes", &drivers) {
        Ok(g) => Some(g),
        Err(why) => {
            skipped(why);
            None
        }
    }
}

/// Runs a guest's code with options.
fn start(dir: &Scratch, code: &[u8], options: &[&str]) -> Session {
    let kernel = dir.file("kernel", &guest::pvh(code));
    let mut command = Command::new(pyrite());
    command.args([
        "run", "--engine", "soft", "--net", "none", "--memory", "32M",
    ]);
    command.args(["--timeout", "1m", "--kernel"]).arg(&kernel);
    Session::start(command.args(options))
}

/// `mov dx, 505H; mov al, bits; out dx, al`.
fn report(bits: u8) -> Vec<u8> {
    guest::out8(0x505, bits)
}

#[test]
fn panic_ends_the_vm_unless_something_else_is_asked_for() {
    let dir = Scratch::new("pvpanic");
    let code = [report(1), guest::print("alive\n"), guest::power_off()].concat();
    // Without the device the port is nothing.
    assert_eq!(start(&dir, &code, &[]).end(LIMIT).0, 0);
    let (code_of, _, errors) = start(&dir, &code, &["--pvpanic", "isa"]).end(LIMIT);
    assert_eq!(code_of, 3, "{errors}");
    assert!(errors.contains("the guest kernel panicked"), "{errors}");
    let options = ["--pvpanic", "isa,action=continue"];
    let (code_of, output, errors) = start(&dir, &code, &options).end(LIMIT);
    assert_eq!((code_of, output.as_str()), (0, "alive\n"), "{errors}");
    assert!(errors.contains("the guest has panicked"), "{errors}");
    // Another kernel is started: that is no end.
    let code = [report(2), guest::print("alive\n"), guest::power_off()].concat();
    let (code_of, output, errors) = start(&dir, &code, &["--pvpanic", "isa"]).end(LIMIT);
    assert_eq!((code_of, output.as_str()), (0, "alive\n"), "{errors}");
    assert!(errors.contains("crash kernel"), "{errors}");
    // What a guest says it can be told: the events that are known.
    let read = [
        &[0x66, 0xba, 5, 5, 0xec][..],
        &[0x66, 0xba, 0xf4, 0, 0xee],
        &guest::HALT,
    ]
    .concat();
    assert_eq!(start(&dir, &read, &["--pvpanic", "isa"]).end(LIMIT).0, 15);
}

#[test]
fn paused_guest_is_dumped_and_goes_on() {
    let dir = Scratch::new("dump");
    let socket = dir.0.join("control");
    let options = ["--pvpanic", "isa,action=pause", "--cpus", "2", "--control"];
    let mut mark = vec![0xbb];
    mark.extend(MARK.to_le_bytes()); // mov ebx, MARK
    mark.extend([0x89, 0x1d, 0, 0, 2, 0]); // mov [20000H], ebx
    // The machine stops a moment after the report: `mov ecx, N; dec ecx; jnz` until then.
    let wait = vec![0xb9, 0, 0, 0, 0x40, 0xff, 0xc9, 0x75, 0xfc];
    let code = [
        mark,
        report(1),
        wait,
        guest::print("alive\n"),
        guest::power_off(),
    ]
    .concat();
    let at = socket.display().to_string();
    let mut vm = start(&dir, &code, &[&options[..], &[&at]].concat());
    while !vm.errors().contains("is paused") {
        assert!(vm.ended().is_none(), "{}", vm.errors());
        std::thread::sleep(Duration::from_millis(20));
    }
    let core = dir.0.join("core");
    let path = core.display().to_string();
    let (code, text) = ctl(&socket, &["dump", &path]);
    assert_eq!(code, 0, "{text}");
    // A file that is there is not replaced.
    assert_ne!(ctl(&socket, &["dump", &path]).0, 0);
    let bytes = std::fs::read(&core).expect("core");
    assert!(bytes.starts_with(b"\x7fELF\x02"));
    assert_eq!(ctl(&socket, &["resume"]).0, 0);
    let (code, output, errors) = vm.end(LIMIT);
    assert_eq!((code, output.as_str()), (0, "alive\n"), "{errors}");

    let Some(mut gdb) = Gdb::start() else { return };
    gdb.ask(&format!("core-file {path}"));
    let shown = gdb.ask("info threads");
    assert_eq!(
        shown
            .matches("Thread ")
            .count()
            .max(shown.matches("LWP ").count()),
        2,
        "{shown}"
    );
    gdb.ask("thread 1");
    assert_eq!(gdb.value("$rbx"), u64::from(MARK));
    assert_eq!(gdb.value("*(unsigned*)0x20000"), u64::from(MARK));
    assert_eq!(gdb.value("*(unsigned char*)0x100000"), 0xbb);
    // Behind the OUT that reported it; how far is a matter of time.
    let rip = gdb.value("$rip");
    assert!((0x10_0000 + 18..0x10_0200).contains(&rip), "{rip:#x}");
    gdb.quit();
}

/// The lines of a core's VMCOREINFO.
fn vmcoreinfo(core: &Path) -> String {
    let bytes = std::fs::read(core).expect("core");
    let head = &bytes[..(1 << 20).min(bytes.len())];
    let text = String::from_utf8_lossy(head);
    let from = text.find("OSRELEASE=").unwrap_or(text.len());
    text[from..]
        .split('\0')
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// A panic of Linux arrives by both devices, and the core is what a debugger needs: the kernel's
/// own description, and its addresses.
#[test]
fn linux_that_panics_is_kept() {
    let Some(linux) = debian_12() else { return };
    for (bus, other) in [("pci", &[][..]), ("isa", &["--vmcoreinfo"])] {
        let dir = Scratch::new(&format!("linux-panic-{bus}"));
        let mut options = with(&[
            ("--pvpanic", format!("{bus},action=pause")),
            ("--net", "none".into()),
            ("--memory", "256M".into()),
            ("--cpus", "2".into()),
        ]);
        options.extend(other.iter().map(|o| (*o).to_owned()));
        let mut vm = Vm::boot(&dir, &linux, &options);
        let release = vm.ask("uname -r");
        let banner = vm.symbol("linux_banner");
        if bus == "isa" {
            // The guest itself says where its description is.
            let files = vm.ask("ls /sys/firmware/qemu_fw_cfg/by_name/etc");
            assert!(
                files.contains("vmcoreinfo") && files.contains("pvpanic-port"),
                "{files}"
            );
        }
        vm.session.send("echo c >/proc/sysrq-trigger\n");
        vm.session.expect("Kernel panic - not syncing", LIMIT);
        let until = std::time::Instant::now() + LIMIT;
        while !vm.session.errors().contains("is paused") {
            assert!(std::time::Instant::now() < until, "{}", vm.session.errors());
            std::thread::sleep(Duration::from_millis(20));
        }
        // It stays, although the console showed the panic long ago.
        std::thread::sleep(Duration::from_secs(3));
        let core = dir.0.join("core");
        let path = core.display().to_string();
        vm.done(&["dump", "--virtual", &path]);
        let info = vmcoreinfo(&core);
        assert!(
            info.starts_with(&format!("OSRELEASE={release}\n")),
            "{info:.200}"
        );
        assert!(
            info.contains("SYMBOL(init_uts_ns)=") && info.contains("KERNELOFFSET="),
            "{info:.200}"
        );
        vm.stop();

        let Some(mut gdb) = Gdb::start() else { return };
        gdb.ask(&format!("core-file {path}"));
        let shown = gdb.ask(&format!("x/s {banner:#x}"));
        assert!(
            shown.contains(&format!("Linux version {release}")),
            "{shown}"
        );
        gdb.ask("thread 1");
        assert!(gdb.value("$rip") > 0xffff_8000_0000_0000);
        // Its stack is there.
        gdb.value("*(unsigned long*)$rsp");
        gdb.quit();
    }
}
