//! UEFI firmware (OVMF) of the host's distribution on the software engine: to its shell, through GRUB
//! to a Debian kernel, with variables that stay, a screen, secure boot, and in another process.

use std::path::Path;
use std::time::{Duration, Instant};

use pyrite_tests::firmware::{
    MINUTE, ask, ask_shell, esp, into_shell, kernel, package_directory, package_file, signed_grub,
    start, text, uefi,
};
use pyrite_tests::screen::{Pixels, screenshot};
use pyrite_tests::{Scratch, Session, ctl, pyrite};

const GUID: &str = "11112222-3333-4444-5555-666677778888";

/// What GRUB is to do: start the kernel that is next to it.
const GRUB_CFG: &str = "serial --unit=0\nterminal_output serial\nterminal_input serial\n\
                        echo this is GRUB\nlinux /vmlinuz console=ttyS0\n\
                        initrd /initrd.img\nboot\n";

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("a file")
}

#[test]
fn ovmf_reaches_its_shell() {
    let Some(uefi) = uefi() else { return };
    // OVMF believes an Intel processor about its physical addresses, and this AMD processor not.
    for (memory, cpus, model) in [
        ("128M", "2", "Haswell"),
        ("256M", "1", "EPYC"),
        ("2G", "4", "host"),
    ] {
        let machine = ["--memory", memory, "--cpus", cpus, "--cpu", model];
        let mut s = start(&uefi, &machine);
        s.expect("UEFI Interactive Shell", MINUTE);
        into_shell(&mut s);
        s.expect("Shell>", MINUTE);
        let said = ask_shell(&mut s, "ver");
        assert!(said.contains("EDK II"), "{machine:?}: {said}");
    }
}

#[test]
fn variables_and_boot_entries_stay() {
    let dir = Scratch::new("uefi-variables");
    let guest = kernel("-efivarfs", &["efivarfs"]);
    let (Some(uefi), Some(grub), Some(guest)) = (uefi(), signed_grub(), guest) else {
        return;
    };
    // Nothing boots by its name: only the entry that the script makes does.
    let script = format!(
        "setvar FromShell -guid {GUID} -bs -rt -nv =\"shell-77\"\r\n\
         bcfg boot addp 0 fs0:\\EFI\\debian\\grubx64.efi Pyrite\r\nreset -s\r\n"
    );
    let files: [(&str, &[u8]); 7] = [
        ("/EFI/", b""),
        ("/EFI/debian/", b""),
        ("/EFI/debian/grubx64.efi", &read(&grub)),
        ("/EFI/debian/grub.cfg", GRUB_CFG.as_bytes()),
        ("/startup.nsh", script.as_bytes()),
        ("/vmlinuz", &read(&guest.kernel)),
        ("/initrd.img", &read(&guest.initrd)),
    ];
    let Some(esp) = esp(&dir, "esp.img", &files) else {
        return;
    };
    let vars = dir.0.join("vars");
    let round = |disk: &str, machine: &[&str]| {
        let more = ["--disk", disk, "--firmware-vars", text(&vars)];
        start(&uefi, &[&more[..], machine].concat())
    };
    let mut s = round(text(&esp), &[]);
    into_shell(&mut s);
    let (code, out, _) = s.end(MINUTE);
    assert_eq!(code, 0, "it switches itself off: {out}");
    assert_eq!(read(&vars).len(), 540_672);

    let mount = "mount -t efivarfs none /sys/firmware/efi/efivars && \
                 cd /sys/firmware/efi/efivars";
    let identity = ["--cpus", "2", "--smbios", "serial=SN-43"];
    let mut s = round(text(&esp), &identity);
    s.expect("this is GRUB", MINUTE);
    s.expect("~# ", MINUTE);
    assert!(ask(&mut s, "ls /sys/firmware/efi").contains("systab"));
    assert!(ask(&mut s, "nproc").contains('2'));
    assert!(ask(&mut s, "cat /sys/class/dmi/id/product_serial").contains("SN-43"));
    let messages = ask(&mut s, "dmesg");
    assert!(messages.contains("efi: EFI v2"), "{messages}");
    for wrong in ["ACPI Error", "can't claim", "Unknown NMI", "BUG:"] {
        assert!(!messages.contains(wrong), "{wrong}: {messages}");
    }
    let said = ask(&mut s, &format!("{mount} && cat FromShell-{GUID}"));
    assert!(
        said.contains("s\0h\0e\0l\0l\0") || said.contains("shell-77"),
        "{said}"
    );
    ask(
        &mut s,
        &format!("printf '\\007\\000\\000\\000linux-78' >FromLinux-{GUID}"),
    );
    s.send("poweroff -f\n");
    let (code, out, _) = s.end(MINUTE);
    assert_eq!(code, 0, "{out}");

    // The entry names the partition, wherever its disk is.
    let mut s = round(&format!("{},bus=ahci", text(&esp)), &["--memory", "2G"]);
    s.expect("this is GRUB", MINUTE);
    s.expect("~# ", MINUTE);
    let said = ask(&mut s, &format!("{mount} && cat FromLinux-{GUID}"));
    assert!(said.contains("linux-78"), "{said}");
    // A reset leads through the firmware to the same entry.
    s.send("reboot -f\n");
    s.expect("this is GRUB", MINUTE);
}

#[test]
fn secure_boot_starts_only_what_is_signed() {
    let dir = Scratch::new("uefi-secure");
    let (Some(uefi), Some(grub), Some(guest)) = (uefi(), signed_grub(), kernel("", &[])) else {
        return;
    };
    let shim = package_file("shim-signed", "usr/lib/shim", "shimx64.efi.signed");
    let keys = package_file("ovmf", "usr/share/OVMF", "OVMF_VARS_4M.ms.fd");
    let (Some(shim), Some(keys)) = (shim, keys) else {
        return;
    };
    // GRUB is signed by Debian, which the firmware does not know: shim does.
    let grub = read(&grub);
    let alone: [(&str, &[u8]); 3] = [
        ("/EFI/", b""),
        ("/EFI/BOOT/", b""),
        ("/EFI/BOOT/BOOTX64.EFI", &grub),
    ];
    let with_shim: [(&str, &[u8]); 8] = [
        ("/EFI/", b""),
        ("/EFI/BOOT/", b""),
        ("/EFI/debian/", b""),
        ("/EFI/BOOT/BOOTX64.EFI", &read(&shim)),
        ("/EFI/BOOT/grubx64.efi", &grub),
        ("/EFI/debian/grub.cfg", GRUB_CFG.as_bytes()),
        ("/vmlinuz", &read(&guest.kernel)),
        ("/initrd.img", &read(&guest.initrd)),
    ];
    let (Some(alone), Some(with_shim)) = (
        esp(&dir, "alone.img", &alone),
        esp(&dir, "shim.img", &with_shim),
    ) else {
        return;
    };
    let vars = format!("{},template={}", text(&dir.0.join("vars")), text(&keys));
    let disks = ["--disk", text(&alone), "--disk", text(&with_shim)];
    let mut s = start(
        &uefi,
        &[&disks[..], &["--firmware-vars", vars.as_str()]].concat(),
    );
    let before = s.until("this is GRUB", MINUTE);
    assert!(before.contains("Access Denied"), "{before}");
    s.expect("~# ", MINUTE);
    let messages = ask(&mut s, "dmesg");
    assert!(messages.contains("Secure boot enabled"), "{messages}");
}

#[test]
fn the_screen_shows_the_shell() {
    let dir = Scratch::new("uefi-screen");
    let Some(uefi) = uefi() else { return };
    let socket = dir.0.join("control");
    let mut s = start(&uefi, &["--vga", "std", "--control", text(&socket)]);
    into_shell(&mut s);
    s.expect("Shell>", MINUTE);
    // Red, with what the shell writes in grey.
    ask_shell(&mut s, "cls 4");
    const RED: u32 = 0x98_0000;
    const GREY: u32 = 0x98_9898;
    let count = |p: &Pixels, colour| p.pixels.iter().filter(|c| **c == colour).count();
    let before = screenshot(&socket, &dir);
    assert!(before.width >= 640 && before.height() >= 480);
    let red = count(&before, RED);
    assert!(red > before.pixels.len() / 10 * 9, "{red} dots are red");
    // The firmware hears the keyboard.
    let done = std::process::Command::new(pyrite())
        .arg("type")
        .args([text(&socket), "echo typed-here\\n"])
        .output()
        .expect("pyrite runs");
    assert!(done.status.success(), "{done:?}");
    s.expect("typed-here", MINUTE);
    s.expect("Shell>", MINUTE);
    let after = screenshot(&socket, &dir);
    let grey = count(&after, GREY).saturating_sub(count(&before, GREY));
    assert!(grey > 100, "{grey} new dots are grey");
}

#[test]
fn the_debian_installer_draws_and_takes_keys() {
    const PACKAGE: &str = "debian-installer-12-netboot-amd64";
    const DIR: &str = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
    let dir = Scratch::new("uefi-installer");
    let (Some(uefi), Some(grub)) = (uefi(), signed_grub()) else {
        return;
    };
    let Some(installer) = package_directory(PACKAGE, DIR) else {
        return;
    };
    let file = |name: &str| read(&installer.join(name));
    let start_menu = "set prefix=($root)/debian-installer/amd64/grub\n\
                      configfile $prefix/grub.cfg\n";
    let files: [(&str, &[u8]); 12] = [
        ("/EFI/", b""),
        ("/EFI/BOOT/", b""),
        ("/EFI/debian/", b""),
        ("/EFI/BOOT/BOOTX64.EFI", &read(&grub)),
        ("/EFI/debian/grub.cfg", start_menu.as_bytes()),
        ("/debian-installer/", b""),
        ("/debian-installer/amd64/", b""),
        ("/debian-installer/amd64/grub/", b""),
        ("/debian-installer/amd64/linux", &file("linux")),
        ("/debian-installer/amd64/initrd.gz", &file("initrd.gz")),
        (
            "/debian-installer/amd64/grub/grub.cfg",
            &file("grub/grub.cfg"),
        ),
        (
            "/debian-installer/amd64/grub/font.pf2",
            &file("grub/font.pf2"),
        ),
    ];
    let Some(esp) = esp(&dir, "esp.img", &files) else {
        return;
    };
    let socket = dir.0.join("control");
    let _s = start(
        &uefi,
        &[
            "--vga",
            "std",
            "--memory",
            "1G",
            "--disk",
            text(&esp),
            "--control",
            text(&socket),
        ],
    );
    let key = |name: &str| {
        let pressed = std::process::Command::new(pyrite())
            .arg("key")
            .args([text(&socket), name])
            .output();
        assert!(pressed.expect("pyrite runs").status.success(), "{name}");
    };
    let wait = |what: &str, wanted: &dyn Fn(&Pixels) -> bool| {
        let until = Instant::now() + 2 * MINUTE;
        while !ctl(&socket, &["inspect"]).1.contains("vcpu0") || !wanted(&screenshot(&socket, &dir))
        {
            assert!(Instant::now() < until, "the screen shows no {what}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    // GRUB's menu, in the graphics mode that its configuration asks for, has a cyan frame on blue.
    let share = |p: &Pixels, colour| {
        100 * p.pixels.iter().filter(|c| **c == colour).count() / p.pixels.len()
    };
    wait("menu of GRUB", &|p| p.width == 800 && share(p, 0xa8) > 50);
    key("enter");
    // The kernel's own console on the framebuffer: a grey window, and the chosen line in red.
    let chosen = |p: &Pixels| {
        let red = |line: &[u32]| line.iter().filter(|c| **c == 0xaa_0000).count() > p.width / 4;
        p.pixels.chunks(p.width).position(red)
    };
    wait("list of languages", &|p| {
        share(p, 0xaa_aaaa) > 50 && chosen(p).is_some()
    });
    let first = chosen(&screenshot(&socket, &dir)).expect("a chosen line");
    key("down");
    wait("line below", &|p| chosen(p).is_some_and(|l| l > first));
}

#[test]
fn a_machine_moves_in_the_middle_of_uefi() {
    let dir = Scratch::new("uefi-snapshot");
    let Some(uefi) = uefi() else { return };
    let (socket, saved) = (dir.0.join("control"), dir.0.join("snapshot"));
    let vars = dir.0.join("vars");
    let more = ["--control", text(&socket), "--firmware-vars", text(&vars)];
    let mut s = start(&uefi, &[&more[..], &["--cpus", "2"]].concat());
    // The console is there, and drivers and boot options are still to come.
    s.expect("\x1b[2J", MINUTE);
    assert_eq!(
        ctl(&socket, &["snapshot", text(&saved)]),
        (0, String::new())
    );
    drop(s);
    let mut command = std::process::Command::new(pyrite());
    command.args(["run", "--engine", "soft", "--restore", text(&saved)]);
    let mut s = Session::start(&mut command);
    into_shell(&mut s);
    s.expect("Shell>", MINUTE);
    ask_shell(
        &mut s,
        &format!("setvar Moved -guid {GUID} -bs -nv =\"kept-79\""),
    );
    let said = ask_shell(&mut s, &format!("setvar Moved -guid {GUID}"));
    assert!(said.contains("6B 65 70 74 2D 37 39"), "{said}");
}
