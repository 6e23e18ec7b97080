//! What tests of drives share: disks are written and read, discs are changed, and a machine moves while
//! it works.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::vm::{STEP, Vm};
use crate::{Scratch, iso};

const MIB: u64 = 1 << 20;

/// An empty disk.
pub fn blank(dir: &Scratch, name: &str, bytes: u64) -> PathBuf {
    let path = dir.0.join(name);
    let file = File::create(&path).expect("disk");
    file.set_len(bytes).expect("size");
    path
}

/// The checksum of a part of a file, as `md5sum` has it.
pub fn md5(file: &Path, offset: u64, len: u64) -> String {
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
pub fn disk_works(vm: &mut Vm, device: &str, file: &Path, discards: bool) {
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

/// Two discs.
pub fn cd_images(dir: &Scratch) -> [PathBuf; 2] {
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
pub fn cd_works(vm: &mut Vm, [one, two]: &[PathBuf; 2]) {
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
pub fn snapshot_under_load(mut vm: Vm, dir: &Scratch, device: &str, options: &[String]) {
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
