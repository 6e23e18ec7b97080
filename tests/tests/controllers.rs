//! Storage controllers, driven by the drivers of Debian's standard kernel.
//!
//! For each: the disk says what it is, data written are read back and are in the file, flush and
//! discard work, a CD is mounted, ejected and changed, and a snapshot under load goes on.

use std::fs;

use pyrite_tests::Scratch;
use pyrite_tests::drives::{blank, cd_images, cd_works, disk_works, md5, snapshot_under_load};
use pyrite_tests::fixtures::{self, Guest};
use pyrite_tests::vm::{STEP, Vm, with};

const MIB: u64 = 1 << 20;

/// The standard kernel with the drivers of every controller.
fn guest() -> Option<Guest> {
    match fixtures::storage_guest() {
        Ok(guest) => Some(guest),
        Err(why) => {
            pyrite_tests::skipped(why);
            None
        }
    }
}

#[test]
fn ahci() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("ahci");
    let disk = blank(&dir, "disk", 64 * MIB);
    let cds = cd_images(&dir);
    let options = with(&[
        ("--net", "none".into()),
        (
            "--disk",
            format!("{},bus=ahci,serial=AHCI-1", disk.display()),
        ),
        ("--cdrom", cds[0].display().to_string()),
        ("--memory", "256M".into()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    assert_eq!(vm.ask("cat /sys/block/sda/device/model"), "PYRITE HARDDISK");
    assert_eq!(vm.ask("cat /sys/block/sda/device/queue_depth"), "32");
    assert_eq!(
        vm.ask("cat /sys/block/sda/queue/fua"),
        "0",
        "as libata has it by default"
    );
    disk_works(&mut vm, "sda", &disk, true);
    cd_works(&mut vm, &cds);
    snapshot_under_load(vm, &dir, "sda", &options);
}

#[test]
fn ide() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("ide");
    let disk = blank(&dir, "disk", 64 * MIB);
    let cds = cd_images(&dir);
    let options = with(&[
        ("--net", "none".into()),
        ("--disk", format!("{},bus=ide,serial=IDE-1", disk.display())),
        ("--cdrom", format!("{},bus=ide", cds[0].display())),
        ("--memory", "256M".into()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    assert_eq!(vm.ask("cat /sys/block/sda/device/model"), "PYRITE HARDDISK");
    let modes = "cat /sys/class/ata_device/dev*/dma_mode | sort -u";
    assert_eq!(vm.ask(modes), "XFER_MW_DMA_2", "a PIIX3 has no faster one");
    disk_works(&mut vm, "sda", &disk, true);
    cd_works(&mut vm, &cds);
    snapshot_under_load(vm, &dir, "sda", &options);
}

#[test]
fn nvme() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("nvme");
    let disk = blank(&dir, "disk", 64 * MIB);
    let large = blank(&dir, "large", 64 * MIB);
    let options = with(&[
        ("--net", "none".into()),
        (
            "--disk",
            format!("{},bus=nvme,serial=NVME-1", disk.display()),
        ),
        ("--disk", format!("{},bus=nvme,block=4096", large.display())),
        ("--memory", "256M".into()),
        ("--cpus", "2".into()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    assert_eq!(vm.ask("cat /sys/class/nvme/nvme0/model"), "PYRITE NVME");
    assert_eq!(vm.ask("cat /sys/class/nvme/nvme0/serial"), "NVME-1");
    let interrupts = "grep -c nvme0q /proc/interrupts";
    assert_eq!(vm.ask(interrupts), "3", "admin queue and one for each vCPU");
    let block = "cat /sys/block/nvme1n1/queue/logical_block_size";
    assert_eq!(vm.ask(block), "4096");
    disk_works(&mut vm, "nvme0n1", &disk, true);
    disk_works(&mut vm, "nvme1n1", &large, true);
    snapshot_under_load(vm, &dir, "nvme0n1", &options);
}

#[test]
fn virtio_scsi() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("scsi");
    let disk = blank(&dir, "disk", 64 * MIB);
    let cds = cd_images(&dir);
    let options = with(&[
        ("--net", "none".into()),
        (
            "--disk",
            format!("{},bus=scsi,serial=SCSI-1", disk.display()),
        ),
        ("--cdrom", format!("{},bus=scsi", cds[0].display())),
        ("--memory", "256M".into()),
        ("--cpus", "2".into()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    assert_eq!(vm.ask("cat /sys/block/sda/device/vendor"), "PYRITE");
    assert_eq!(vm.ask("cat /sys/block/sda/queue/fua"), "1");
    disk_works(&mut vm, "sda", &disk, true);
    cd_works(&mut vm, &cds);
    snapshot_under_load(vm, &dir, "sda", &options);
}

#[test]
fn floppy() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("floppy");
    let disk = blank(&dir, "disk", 1440 << 10);
    let options = with(&[
        ("--floppy", disk.display().to_string()),
        ("--floppy", "none,drive=1.2M".into()),
        ("--memory", "256M".into()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    let shown = vm.ask("cat /sys/bus/acpi/devices/PNP0700:00/path");
    assert!(shown.ends_with("PCI0.FDC0"), "{shown}");
    // The driver looks at the medium when the device is opened.
    assert_eq!(vm.ask("blockdev --getsz /dev/fd0"), "2880");
    vm.ask("dd if=/dev/urandom of=/tmp/x bs=1k count=200 2>/dev/null");
    let sum = vm.ask("md5sum </tmp/x");
    let wrote = "dd if=/tmp/x of=/dev/fd0 bs=1k seek=77 conv=fsync 2>/dev/null && echo wrote";
    assert_eq!(vm.ask(wrote), "wrote");
    assert_eq!(md5(&disk, 77 << 10, 200 << 10), sum[..32]);
    let read = "echo 3 >/proc/sys/vm/drop_caches; \
                dd if=/dev/fd0 bs=1k skip=77 count=200 2>/dev/null | md5sum";
    assert_eq!(vm.ask(read)[..32], sum[..32]);
    // Another disk, in another format and protected: the driver notices.
    let other = blank(&dir, "other", 720 << 10);
    let data: Vec<u8> = (0..720_u32 << 10).map(|n| (n / 3) as u8).collect();
    fs::write(&other, data).expect("disk");
    vm.done(&["insert", "fd0", "--ro", &other.display().to_string()]);
    assert_eq!(vm.ask("blockdev --getsz /dev/fd0"), "1440");
    let read = vm.ask("md5sum </dev/fd0");
    assert_eq!(read[..32], md5(&other, 0, 720 << 10));
    let wrote = "dd if=/tmp/x of=/dev/fd0 count=1 2>/dev/null || echo protected";
    assert!(vm.ask(wrote).ends_with("protected"));
    vm.done(&["eject", "fd0"]);
    let read = "dd if=/dev/fd0 of=/dev/null count=1 2>/dev/null || echo empty";
    // The kernel may complain in between.
    assert!(vm.ask(read).ends_with("empty"));
    // The second drive has narrow tracks, on which 40 of 360 KB lie at every second place.
    let old = blank(&dir, "old", 360 << 10);
    vm.done(&["insert", "fd1", &old.display().to_string()]);
    let wrote = "dd if=/tmp/x of=/dev/fd1 bs=1k seek=50 conv=fsync 2>/dev/null && echo wrote";
    assert_eq!(vm.ask(wrote), "wrote");
    assert_eq!(md5(&old, 50 << 10, 200 << 10), sum[..32]);
    for (drive, says) in [("fd1", "1228800 or 368640"), ("fd2", "no floppy drive fd2")] {
        let (code, text) = vm.control(&["insert", drive, &disk.display().to_string()]);
        assert!(code != 0 && text.contains(says), "{code} {text}");
    }
    // All of the first disk.
    vm.done(&["insert", "fd0", &disk.display().to_string()]);
    vm.ask("dd if=/dev/urandom of=/tmp/x bs=18k count=80 2>/dev/null");
    let sum = vm.ask("md5sum </tmp/x");
    let wrote = "dd if=/tmp/x of=/dev/fd0 bs=18k conv=fsync 2>/dev/null && echo wrote";
    assert_eq!(vm.ask(wrote), "wrote");
    assert_eq!(md5(&disk, 0, 1440 << 10), sum[..32]);
    // Saved while it is read.
    vm.done(&["eject", "fd1"]);
    vm.session.send(
        "while :; do echo 3 >/proc/sys/vm/drop_caches; \
        md5sum </dev/fd0 | cut -c1-32 | sed 's/^/S=/'; done &\n",
    );
    vm.session.expect("S=", STEP);
    vm.session.expect("S=", STEP);
    let snapshot = dir.0.join("snapshot").display().to_string();
    vm.done(&["pause"]);
    vm.done(&["snapshot", &snapshot]);
    vm.done(&["stop"]);
    vm.session.end(STEP);
    let mut options = options.clone();
    options.extend(["--restore".into(), snapshot]);
    let mut vm = Vm::start(&dir, "second", &options);
    let sum = md5(&disk, 0, 1440 << 10);
    for _ in 0..3 {
        vm.session.expect(&format!("S={sum}"), STEP);
    }
    vm.done(&["stop"]);
    vm.session.end(STEP);
}
