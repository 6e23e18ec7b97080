//! Storage controllers, driven by the drivers of Debian's standard kernel.
//!
//! For each: the disk says what it is, data written are read back and are in the file, flush and
//! discard work, a CD is mounted, ejected and changed, and a snapshot under load goes on.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pyrite_tests::fixtures::{self, Guest};
use pyrite_tests::vm::{STEP, Vm, with};
use pyrite_tests::{Scratch, iso};

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

fn blank(dir: &Scratch, name: &str, bytes: u64) -> PathBuf {
    let path = dir.0.join(name);
    let file = File::create(&path).expect("disk");
    file.set_len(bytes).expect("size");
    path
}

fn md5(file: &Path, offset: u64, len: u64) -> String {
    let mut f = File::open(file).expect("disk");
    f.seek(SeekFrom::Start(offset)).expect("seek");
    let mut data = vec![0; len as usize];
    f.read_exact(&mut data).expect("read");
    let mut sum = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("md5sum");
    sum.stdin
        .take()
        .expect("pipe")
        .write_all(&data)
        .expect("data");
    let out = sum.wait_with_output().expect("md5sum");
    String::from_utf8_lossy(&out.stdout[..32]).into_owned()
}

/// A disk is written, read, flushed and discarded; what the host's file has is right.
fn disk_works(vm: &mut Vm, device: &str, file: &Path, discards: bool) {
    let sectors = fs::metadata(file).expect("disk").len() / 512;
    let size = vm.ask(&format!("cat /sys/block/{device}/size"));
    assert_eq!(size, sectors.to_string());
    vm.ask("dd if=/dev/urandom of=/tmp/x bs=1M count=12 2>/dev/null");
    let sum = vm.ask("md5sum </tmp/x");
    let sum = &sum[..32];
    // Through the cache with a flush, past it, and at an odd place in small pieces.
    for (n, how) in [
        "bs=1M seek=4 conv=fsync",
        "bs=1M seek=20 oflag=direct",
        "bs=12k seek=3600 conv=fsync",
    ]
    .iter()
    .enumerate()
    {
        let wrote = vm.ask(&format!(
            "dd if=/tmp/x of=/dev/{device} {how} 2>/dev/null && echo wrote"
        ));
        assert_eq!(wrote, "wrote", "{how}");
        let at = [4 * MIB, 20 * MIB, 3600 * 12 * 1024][n];
        assert_eq!(md5(file, at, 12 * MIB), sum, "{how}: in the file");
        let block = if n == 2 { 12 << 10 } else { 1 << 20 };
        let back = vm.ask(&format!(
            "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/{device} bs={block} skip={} count={} \
             2>/dev/null | md5sum",
            at / block,
            12 * MIB / block
        ));
        assert_eq!(&back[..32], sum, "{how}: read back");
    }
    if discards {
        let done = vm.ask(&format!(
            "blkdiscard -o 4194304 -l 4194304 /dev/{device} && echo discarded"
        ));
        assert_eq!(done, "discarded");
        let zeroes = md5(file, 60 * MIB, 4 * MIB);
        assert_eq!(md5(file, 4 * MIB, 4 * MIB), zeroes);
    }
}

fn cd_images(dir: &Scratch) -> [PathBuf; 2] {
    let long: Vec<u8> = (0..300_000_u32).map(|n| (n / 7) as u8).collect();
    [
        dir.file(
            "one.iso",
            &iso::image(
                "ONE",
                &[("HELLO.TXT", b"first disc\n"), ("LONG.BIN", &long)],
            ),
        ),
        dir.file(
            "two.iso",
            &iso::image("TWO", &[("HELLO.TXT", b"second disc\n")]),
        ),
    ]
}

/// A CD is mounted, ejected by guest and host, and changed.
fn cd_works(vm: &mut Vm, [one, two]: &[PathBuf; 2]) {
    vm.ask("mkdir -p /mnt");
    let mount = "mount -t iso9660 -o ro /dev/sr0 /mnt && cat /mnt/hello.txt";
    assert_eq!(vm.ask(mount), "first disc");
    let sum = vm.ask("md5sum </mnt/long.bin");
    assert_eq!(&sum[..32], md5(one, 23 * 2048, 300_000));
    // Mounted, the tray is locked: the host can ask, and is told what to do.
    let second = two.display().to_string();
    let (code, text) = vm.control(&["insert", "0", &second]);
    assert!(code != 0 && text.contains("force"), "{code} {text}");
    vm.ask("umount /mnt");
    vm.done(&["insert", "0", &second]);
    assert_eq!(vm.ask(mount), "second disc");
    // The kernel ejects after use if it is told to, and closes the tray to use it.
    let open = |vm: &Vm| vm.control(&["inspect", "trays/0/open"]).1;
    let auto = |on: u8| format!("echo {on} >/proc/sys/dev/cdrom/autoeject");
    vm.ask(&format!("{}; umount /mnt", auto(1)));
    assert_eq!(open(vm), "yes\n");
    vm.ask(&auto(0));
    assert_eq!(vm.ask(mount), "second disc");
    assert_eq!(open(vm), "no\n");
    vm.ask("umount /mnt");
    vm.done(&["insert", "0", &one.display().to_string()]);
    assert_eq!(vm.ask(mount), "first disc");
    vm.ask("umount /mnt");
    vm.done(&["eject", "0"]);
    let failed = vm.ask("mount -t iso9660 -o ro /dev/sr0 /mnt 2>&1 || true");
    assert!(failed.contains("No medium"), "{failed}");
    assert_eq!(vm.ask("mount | grep -c sr0"), "0");
    let (code, text) = vm.control(&["eject", "7"]);
    assert!(code != 0 && text.contains("no CD drive 7"), "{text}");
}

/// Saved under load, the guest goes on in another process.
fn snapshot_under_load(mut vm: Vm, dir: &Scratch, device: &str, options: &[String]) {
    let load = format!(
        r#"cat >/load <<'X'
i=0
while :; do
i=$((i+1))
dd if=/dev/urandom of=/tmp/b bs=16k count=16 2>/dev/null
a=$(md5sum </tmp/b)
dd if=/tmp/b of=/dev/{device} bs=256k seek=$((i%200)) conv=notrunc,fsync 2>/dev/null || echo BAD"WRITE"
b=$(dd if=/dev/{device} bs=64k skip=$((i%200*4)) count=4 iflag=direct 2>/dev/null | md5sum)
[ "$a" = "$b" ] || echo BAD"DISK" $i
echo "C=$i."
done
X
sh /load &
"#
    );
    vm.session.send(&load);
    vm.session.expect("C=3.", STEP);
    let snapshot = dir.0.join("snapshot").display().to_string();
    vm.done(&["pause"]);
    vm.done(&["snapshot", &snapshot]);
    let before = vm.session.all().to_owned();
    vm.done(&["stop"]);
    vm.session.end(STEP);
    let mut options = options.to_vec();
    options.extend(["--restore".into(), snapshot]);
    let mut vm = Vm::start(dir, "second", &options);
    let count = vm.session.expect_number("C=", STEP);
    vm.session.expect(&format!("C={}.", count + 6), STEP);
    for text in [before.as_str(), vm.session.all()] {
        for bad in [
            "BADDISK",
            "BADWRITE",
            "I/O error",
            "Oops",
            "BUG:",
            "timed out",
        ] {
            assert!(!text.contains(bad), "{bad}:\n{text}");
        }
    }
    vm.done(&["stop"]);
    vm.session.end(STEP);
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
