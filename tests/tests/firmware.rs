//! Firmware of the host's distribution on the software engine: SeaBIOS boots from disks, through GRUB,
//! to a Debian kernel.

use std::process::Command;
use std::time::Duration;

use pyrite_tests::firmware::{MINUTE, ask, bios, grub_disks, start, text, type_slowly};
use pyrite_tests::{Scratch, Session, ctl, pyrite};

const TWO_MINUTES: Duration = Duration::from_secs(120);

/// A boot sector that says `words` through the BIOS and stops.
fn boot_sector(words: &str) -> Vec<u8> {
    // xor ax,ax; mov ds,ax; mov si,message; cld
    let mut code = vec![0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x16, 0x7c, 0xfc];
    // next: lodsb; test al,al; jz stop; mov ah,0eh; mov bx,7; int 10h; jmp next
    code.extend([
        0xac, 0x84, 0xc0, 0x74, 0x0a, 0xb4, 0x0e, 0xbb, 7, 0, 0xcd, 0x10,
    ]);
    code.extend([0xeb, 0xf2]);
    // stop: hlt; jmp stop
    assert_eq!(code.len(), 0x16);
    code.extend(words.bytes());
    code.extend([0, 0xf4, 0xeb, 0xfd]);
    // The loop leaves behind the text.
    code[0x0c] = (code.len() - 3 - 0x0d) as u8;
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code.resize(1 << 20, 0);
    code
}

#[test]
fn seabios_starts_grub_which_starts_debian() {
    let dir = Scratch::new("firmware-grub");
    let (Some(bios), Some((grub, tar))) = (bios(), grub_disks(&dir)) else {
        return;
    };
    let log = dir.0.join("debug");
    let identity = "vendor=ACME Works,product=Board 7,serial=SN-42,\
                    uuid=00112233-4455-6677-8899-aabbccddeeff";
    let disks = ["--disk", text(&grub), "--disk", text(&tar)];
    let mut more = disks.to_vec();
    more.extend([
        "--cpus",
        "2",
        "--smbios",
        identity,
        "--debugcon",
        text(&log),
    ]);
    let mut s = start(&bios, &more);
    s.expect("SeaBIOS (version", MINUTE);
    // The rescue image's menu; C leads to the prompt.
    s.expect("GNU/Linux", MINUTE);
    s.send("c");
    s.expect("grub>", MINUTE);
    type_slowly(&mut s, "configfile (hd1)/g");
    s.expect("~# ", TWO_MINUTES);
    let said = ask(
        &mut s,
        "cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_*",
    );
    for word in [
        "ACME Works",
        "Board 7",
        "SN-42",
        "00112233-4455-6677-8899-aabbccddeeff",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(ask(&mut s, "cat /sys/class/dmi/id/bios_vendor").contains("SeaBIOS"));
    assert!(ask(&mut s, "nproc").contains('2'), "the second processor");
    let messages = ask(&mut s, "dmesg");
    for word in ["ECAM", "MMCONFIG"] {
        // The kernel calls it the one or the other.
        if messages.contains(word) {
            assert!(messages.contains("b0000000-0xbfffffff"), "{messages}");
        }
    }
    assert!(
        messages.contains("ECAM") || messages.contains("MMCONFIG"),
        "{messages}"
    );
    assert!(!messages.contains("ACPI Error"), "{messages}");
    // Every device has the room that firmware gave it.
    assert!(!messages.contains("can't claim"), "{messages}");
    assert!(ask(&mut s, "ls /sys/bus/pci/devices").contains("0000:00:1f.0"));
    let debug = std::fs::read_to_string(&log).expect("debug output");
    assert!(debug.contains("Running on QEMU (q35)"), "{debug}");
    // The reset leads through the firmware again.
    s.send("reboot -f\n");
    s.expect("SeaBIOS (version", MINUTE);
    s.expect("GNU/Linux", MINUTE);
}

#[test]
fn boot_order_and_one_shot_boot() {
    let dir = Scratch::new("firmware-order");
    let Some(bios) = bios() else { return };
    let first = dir.file("first.img", &boot_sector("this is the first disk"));
    let second = dir.file("second.img", &boot_sector("this is the second disk"));
    let disks = ["--disk", text(&first), "--disk", text(&second)];
    let with = |boot: Option<&'static str>| {
        let mut more = disks.to_vec();
        more.extend(boot.iter().flat_map(|b| ["--boot", b]));
        more
    };
    let mut s = start(&bios, &with(None));
    s.expect("this is the first disk", MINUTE);
    drop(s);
    let socket = dir.0.join("control");
    let mut more = with(Some("order=disk1:disk0,once=disk0"));
    more.extend(["--control", text(&socket)]);
    let mut s = start(&bios, &more);
    s.expect("this is the first disk", MINUTE);
    assert_eq!(ctl(&socket, &["reset"]).0, 0);
    s.expect("this is the second disk", MINUTE);
    assert_eq!(ctl(&socket, &["reset"]).0, 0);
    s.expect("this is the second disk", MINUTE);
    drop(s);
    let mut s = start(&bios, &with(Some("menu=60000")));
    s.expect("Press ESC for boot menu", MINUTE);
    s.send("\x1b");
    s.expect("Select boot device", MINUTE);
    s.send("2");
    s.expect("this is the second disk", MINUTE);
}

#[test]
fn a_machine_with_firmware_moves_to_another_process() {
    let dir = Scratch::new("firmware-snapshot");
    let Some(bios) = bios() else { return };
    let disk = dir.file("disk.img", &boot_sector("this is the disk"));
    let (socket, saved) = (dir.0.join("control"), dir.0.join("snapshot"));
    let more = ["--disk", text(&disk), "--control", text(&socket)];
    let mut s = start(&bios, &[&more[..], &["--boot", "menu=60000"]].concat());
    s.expect("Press ESC for boot menu", MINUTE);
    assert_eq!(
        ctl(&socket, &["snapshot", text(&saved)]),
        (0, String::new())
    );
    drop(s);
    let mut command = Command::new(pyrite());
    command.args(["run", "--engine", "soft", "--restore", text(&saved)]);
    let mut s = Session::start(&mut command);
    // SeaBIOS waits for the key in shadow RAM, and writes there.
    s.send("\x1b");
    s.expect("Select boot device", MINUTE);
    s.send("1");
    s.expect("this is the disk", MINUTE);
}

#[test]
fn wrong_firmware_is_refused() {
    let dir = Scratch::new("firmware-wrong");
    let odd = dir.file("odd.bin", &[0; 1000]);
    let run = |args: &[&str]| {
        let out = pyrite_tests::run(&[&["run"], args].concat());
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    assert!(run(&["--firmware", text(&odd)]).contains("expected a firmware image"));
    assert!(run(&["--firmware", "/nowhere/x"]).contains("--firmware: /nowhere/x"));
    let whole = dir.file("whole.bin", &[0xf4; 0x1_0000]);
    let said = run(&[
        "--firmware",
        text(&whole),
        "--net",
        "none",
        "--boot",
        "once=disk3",
    ]);
    assert!(said.contains("--boot: there is no disk3"), "{said}");
    let said = run(&["--firmware", text(&whole), "--firmware-vars", "v"]);
    assert!(said.contains("keeps no variables"), "{said}");
    assert!(run(&["--smbios", "uuid=1"]).contains("--smbios: expected a UUID"));
}
