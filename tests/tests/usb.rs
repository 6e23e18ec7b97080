//! USB: Debian's standard kernel finds keyboard, tablet, disks and CD drive behind the xHCI, and uses
//! them; firmware boots from a disk there.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::drives::{blank, cd_images, cd_works, disk_works, snapshot_under_load};
use pyrite_tests::firmware::{
    MINUTE, ask, ask_shell, bios, esp, grub_disks, into_shell, kernel, signed_grub, start, text,
    type_slowly, uefi,
};
use pyrite_tests::fixtures::{self, Guest, KernelPackage};
use pyrite_tests::vm::{Vm, with};
use pyrite_tests::{Scratch, ctl, pyrite};
use pyrite_vmm::display::rfb::testing::Viewer;

const MIB: u64 = 1 << 20;

/// The standard kernel with the drivers of the controller and its devices.
fn guest() -> Option<Guest> {
    let kernel = KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-amd64",
    };
    let modules = [
        "xhci_pci",
        "usbhid",
        "hid_generic",
        "usb_storage",
        "sd_mod",
        "sr_mod",
        "isofs",
    ];
    match fixtures::guest_with(kernel, "-usb1", &modules) {
        Ok(guest) => Some(guest),
        Err(why) => {
            pyrite_tests::skipped(why);
            None
        }
    }
}

/// The event device of an input device by its name.
fn event_device(vm: &mut Vm, name: &str) -> String {
    let find = format!("grep -l '{name}' /sys/class/input/event*/device/name | cut -d/ -f5");
    let device = vm.ask(&find);
    assert!(device.starts_with("event"), "{name}: {device:?}");
    device
}

/// What a device tells from now on: triples of type, code and value, without the ends of reports.
struct Events(String);

type Event = (u16, u16, i32);

impl Events {
    fn listen(vm: &mut Vm, device: &str) -> Events {
        let file = format!("/tmp/{device}");
        vm.ask(&format!(
            "dd if=/dev/input/{device} of={file} bs=24 2>/dev/null & sleep 1"
        ));
        Events(file)
    }

    fn so_far(&self, vm: &mut Vm) -> Vec<Event> {
        let dump = vm.ask(&format!(
            "hexdump -v -e '24/1 \"%02x \" \"\\n\"' {}",
            self.0
        ));
        let mut events = Vec::new();
        for line in dump.lines() {
            let b: Vec<u8> = line
                .split_whitespace()
                .filter_map(|w| u8::from_str_radix(w, 16).ok())
                .collect();
            if b.len() == 24 {
                let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
                let value = i32::from_le_bytes([b[20], b[21], b[22], b[23]]);
                events.push((half(16), half(18), value));
            }
        }
        events.retain(|e| e.0 != 0);
        events
    }

    /// Waits for all of `wanted`; what came.
    fn wait(self, vm: &mut Vm, wanted: &[Event]) -> Vec<Event> {
        let until = Instant::now() + MINUTE;
        loop {
            let events = self.so_far(vm);
            if wanted.iter().all(|w| events.contains(w)) {
                vm.ask("kill %%");
                return events;
            }
            assert!(Instant::now() < until, "{wanted:?}: {events:?}");
        }
    }
}

const KEY: u16 = 1;
const RELATIVE: u16 = 2;
const ABSOLUTE: u16 = 3;
const BUTTON_LEFT: u16 = 0x110;

fn type_text(socket: &Path, words: &str) {
    let done = Command::new(pyrite())
        .arg("type")
        .args([text(socket), words])
        .output()
        .expect("pyrite runs");
    assert!(done.status.success(), "{done:?}");
}

/// Waits until the guest uses the keyboard on USB: what is typed then goes there.
fn keyboard_in_use(socket: &Path) {
    let path = "units/xhci0/controller/devices/9-keyboard/state/in_use";
    let until = Instant::now() + MINUTE;
    loop {
        let (_, said) = ctl(socket, &["inspect", path]);
        if said.trim() == "yes" {
            return;
        }
        assert!(Instant::now() < until, "{said}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Keys typed and a pointer moved from outside arrive as what they are.
fn people_are_heard(vm: &mut Vm, socket: &Path, vnc: &Path) {
    let keyboard = event_device(vm, "Pyrite USB Keyboard");
    let tablet = event_device(vm, "Pyrite USB Tablet");
    let heard = Events::listen(vm, &keyboard);
    type_text(socket, "a7");
    let strokes = [(KEY, 30, 1), (KEY, 30, 0), (KEY, 8, 1), (KEY, 8, 0)];
    let mut events = heard.wait(vm, &strokes);
    events.retain(|e| e.0 == KEY);
    assert_eq!(events, strokes);
    let mut viewer = Viewer::connect(vnc, None).expect("VNC");
    let (width, height) = viewer.size;
    assert!(width > 100 && height > 100, "{width}x{height}");
    // The middle, a press, the wheel, and the last dot.
    let heard = Events::listen(vm, &tablet);
    let mut point = |buttons: u8, x: usize, y: usize| {
        let mut m = vec![5, buttons];
        m.extend((x as u16).to_be_bytes());
        m.extend((y as u16).to_be_bytes());
        viewer.send(&m).expect("VNC");
        std::thread::sleep(Duration::from_millis(300));
    };
    point(0, (width - 1) / 2, (height - 1) / 2);
    point(1, (width - 1) / 2, (height - 1) / 2);
    point(0, (width - 1) / 2, (height - 1) / 2);
    point(8, width - 1, height - 1);
    let middle = |size: usize| ((size - 1) / 2 * 0x7fff / (size - 1)) as i32;
    let wanted = [
        (ABSOLUTE, 0, middle(width)),
        (ABSOLUTE, 1, middle(height)),
        (KEY, BUTTON_LEFT, 1),
        (KEY, BUTTON_LEFT, 0),
        (ABSOLUTE, 0, 0x7fff),
        (ABSOLUTE, 1, 0x7fff),
        (RELATIVE, 8, 1),
    ];
    heard.wait(vm, &wanted);
}

#[test]
fn debian_uses_keyboard_tablet_disks_and_cd() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("usb");
    let disk = blank(&dir, "disk", 64 * MIB);
    let large = blank(&dir, "large", 64 * MIB);
    let cds = cd_images(&dir);
    let vnc = dir.0.join("vnc");
    let options = with(&[
        ("--net", "none".into()),
        ("--usb", "keyboard,tablet".into()),
        ("--vnc", format!("unix:{}", vnc.display())),
        (
            "--disk",
            format!("{},bus=usb,serial=123456789ABC", disk.display()),
        ),
        ("--disk", format!("{},bus=usb,block=4096", large.display())),
        ("--cdrom", format!("{},bus=usb", cds[0].display())),
        ("--memory", "256M".into()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    // The kernel waits a second before it asks a drive what it is.
    vm.ask("n=0; until [ -e /sys/block/sr0 -o $n = 60 ]; do sleep 1; n=$((n+1)); done");
    let speeds = vm.ask("cat /sys/bus/usb/devices/[0-9]*-[0-9]/speed | sort | tr '\\n' ' '");
    assert_eq!(speeds, "480 480 5000 5000 5000");
    assert_eq!(vm.ask("cat /sys/block/sda/device/model"), "HARDDISK");
    let serials = vm.ask("cat /sys/bus/usb/devices/*/serial");
    assert!(serials.contains("123456789ABC"), "{serials}");
    assert!(vm.ask("grep -c xhci /proc/interrupts") != "0");
    people_are_heard(&mut vm, &dir.0.join("first"), &vnc);
    disk_works(&mut vm, "sda", &disk, false);
    disk_works(&mut vm, "sdb", &large, false);
    cd_works(&mut vm, &cds);
    let errors = vm.ask("dmesg | grep -ciE 'xhci.*(error|warn|halt|died)|reset .*USB device'");
    assert_eq!(
        errors,
        "0",
        "{}",
        vm.ask("dmesg | grep -iE 'xhci|usb' | tail -40")
    );
    let options: Vec<String> = options
        .into_iter()
        .filter(|o| !o.starts_with("unix:") && o != "--vnc")
        .collect();
    snapshot_under_load(vm, &dir, "sda", &options);
}

#[test]
fn seabios_boots_from_a_disk_and_hears_the_keyboard() {
    let dir = Scratch::new("usb-bios");
    let (Some(bios), Some((grub, tar))) = (bios(), grub_disks(&dir)) else {
        return;
    };
    let socket = dir.0.join("control");
    // GRUB reads kernel and initial RAM disk through the BIOS, from the second disk.
    let disks = [&grub, &tar].map(|d| format!("{},bus=usb", text(d)));
    let more = [
        "--disk", &disks[0], "--disk", &disks[1], "--usb", "keyboard",
    ];
    let order = ["--boot", "order=disk0", "--control", text(&socket)];
    let mut s = start(&bios, &[&more[..], &order[..]].concat());
    s.expect("SeaBIOS (version", MINUTE);
    s.expect("GNU/Linux", 2 * MINUTE);
    keyboard_in_use(&socket);
    type_text(&socket, "c");
    s.expect("grub>", MINUTE);
    type_slowly(&mut s, "configfile (hd1)/g");
    s.expect("~# ", 3 * MINUTE);
    assert!(ask(&mut s, "cat /sys/class/dmi/id/bios_vendor").contains("SeaBIOS"));
}

#[test]
fn ovmf_lists_a_disk_and_boots_grub_from_it() {
    let dir = Scratch::new("usb-uefi");
    let (Some(uefi), Some(grub), Some(guest)) = (uefi(), signed_grub(), kernel("", &[])) else {
        return;
    };
    let read = |path: &Path| std::fs::read(path).expect("a file");
    let script = "serial --unit=0\nterminal_output serial\nterminal_input serial\n\
                  echo this is GRUB\nlinux /vmlinuz console=ttyS0\ninitrd /initrd.img\nboot\n";
    let files: [(&str, &[u8]); 7] = [
        ("/EFI/", b""),
        ("/EFI/BOOT/", b""),
        ("/EFI/debian/", b""),
        ("/EFI/BOOT/BOOTX64.EFI", &read(&grub)),
        ("/EFI/debian/grub.cfg", script.as_bytes()),
        ("/vmlinuz", &read(&guest.kernel)),
        ("/initrd.img", &read(&guest.initrd)),
    ];
    let hello: [(&str, &[u8]); 1] = [("/hello.txt", b"hello from the disk\r\n")];
    let (Some(boots), Some(data)) = (
        esp(&dir, "boots.img", &files),
        esp(&dir, "data.img", &hello),
    ) else {
        return;
    };
    // The shell, with a keyboard.
    let socket = dir.0.join("control");
    let disk = format!("{},bus=usb", text(&data));
    let machine = [
        "--disk",
        &disk,
        "--usb",
        "keyboard,tablet",
        "--control",
        text(&socket),
    ];
    let mut s = start(&uefi, &machine);
    into_shell(&mut s);
    s.expect("Shell>", MINUTE);
    let said = ask_shell(&mut s, "map -r");
    assert!(said.contains("USB(0x0,0x0)"), "{said}");
    keyboard_in_use(&socket);
    type_text(&socket, "type fs0:\\\\hello.txt\\n");
    s.expect("hello from the disk", MINUTE);
    drop(s);
    let (first, second) = (
        format!("{},bus=usb", text(&data)),
        format!("{},bus=usb", text(&boots)),
    );
    let disks = ["--disk", &first, "--disk", &second, "--boot", "order=disk1"];
    let mut s = start(&uefi, &disks);
    s.expect("this is GRUB", 2 * MINUTE);
    s.expect("~# ", 2 * MINUTE);
    assert!(ask(&mut s, "ls /sys/firmware/efi").contains("systab"));
}
