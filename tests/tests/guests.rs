//! Old and other systems on a PC with SeaBIOS: boot loaders from floppy and CD, FreeDOS, GNU Mach,
//! memory testers, network boot. Used by screen and keyboard as a person would.
//!
//! `PYRITE_GUESTS=full` adds what takes minutes: whole passes of the memory testers, and iPXE as a
//! kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pyrite_tests::fixtures::{self, Reason};
use pyrite_tests::packages::{Mtools, Package};
use pyrite_tests::pc::Pc;
use pyrite_tests::{Scratch, Session, iso, pyrite};

const SEABIOS: Package = Package::Debian("bookworm", "amd64", "seabios");
const SYSLINUX: Package = Package::Debian("bookworm", "amd64", "syslinux-common");
const ISOLINUX: Package = Package::Debian("bookworm", "amd64", "isolinux");
const GRUB: Package = Package::Debian("bookworm", "amd64", "grub-rescue-pc");
const MACH: Package = Package::Debian("bookworm", "i386", "gnumach-image-1.8-486");
const MEMTEST_5: Package = Package::Debian("bullseye", "i386", "memtest86+");
const MEMTEST_6: Package = Package::Debian("bookworm", "amd64", "memtest86+");
const IPXE: Package = Package::Debian("bookworm", "amd64", "ipxe");
const UBOOT: Package = Package::Debian("bookworm", "amd64", "u-boot-qemu");
/// The last release with FreeDOS inside.
const DOSEMU: Package = Package::Ubuntu("bionic multiverse", "i386", "dosemu");

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

/// Runs a test, or says why it cannot be run.
fn with(test: impl FnOnce() -> Result<(), Reason>) {
    if let Err(why) = test() {
        pyrite_tests::skipped(why);
    }
}

/// What every PC has: its firmware and its video BIOS.
struct Board {
    bios: PathBuf,
    rom: PathBuf,
}

impl Board {
    fn new() -> Result<Board, Reason> {
        Ok(Board {
            bios: SEABIOS.file("usr/share/seabios/bios-256k.bin")?,
            rom: SEABIOS.file("usr/share/seabios/vgabios-stdvga.bin")?,
        })
    }

    /// A PC without network and serial console.
    fn start<'a>(&self, dir: &'a Scratch, options: &[&str]) -> Pc<'a> {
        let own = ["--net", "none", "--memory", "64M", "--timeout", "4m"];
        self.start_with(dir, &[&own, options].concat())
    }

    /// A PC with its firmware and no serial console.
    fn start_with<'a>(&self, dir: &'a Scratch, options: &[&str]) -> Pc<'a> {
        let own = ["--firmware", text(&self.bios), "--console", "none"];
        Pc::start(dir, &self.rom, &[&own, options].concat())
    }
}

/// A floppy disk with FreeDOS and some tools, without a boot sector of its own.
fn dos_files(dir: &Scratch, mtools: &Mtools) -> Result<PathBuf, Reason> {
    let image = dir.file("dos.img", &vec![0; 1440 << 10]);
    mtools.run("mformat", text(&image), &["-f", "1440", "::"]);
    for (from, name) in [
        ("kernel.sys", "KERNEL.SYS"),
        ("command.com", "COMMAND.COM"),
        ("bin/sys.com", "SYS.COM"),
        ("bin/mem.exe", "MEM.EXE"),
        ("bin/comp.com", "COMP.COM"),
    ] {
        let file = DOSEMU.file(&format!("usr/lib/dosemu/drive_z/{from}"))?;
        mtools.put(text(&image), &file, name);
    }
    let config = b"LASTDRIVE=Z\r\nSHELL=\\COMMAND.COM /P=\\FDAUTO.BAT\r\n";
    let auto = b"@ECHO OFF\r\nPROMPT $P$G\r\nECHO DOS is up\r\n";
    mtools.put(text(&image), &dir.file("config", config), "FDCONFIG.SYS");
    mtools.put(text(&image), &dir.file("auto", auto), "FDAUTO.BAT");
    Ok(image)
}

/// GRUB's rescue CD starts FreeDOS from a floppy disk, whose `sys` makes that disk bootable.
fn make_bootable(dir: &Scratch, board: &Board, mtools: &Mtools) -> Result<PathBuf, Reason> {
    let floppy = dos_files(dir, mtools)?;
    let cd = format!("{},bus=ide", text(&GRUB.file(&grub("cdrom.iso"))?));
    let mut pc = board.start(dir, &["--floppy", text(&floppy), "--cdrom", &cd]);
    pc.expect("GNU GRUB");
    pc.keys(&["c"]);
    pc.enter("grub> ", "freedos (fd0)/KERNEL.SYS");
    pc.enter("grub> ", "boot");
    pc.expect("DOS is up");
    pc.enter("A:\\>", "sys a:");
    pc.expect("System transferred");
    drop(pc);
    let sector = fs::read(&floppy).expect("floppy");
    assert!(sector[..512].windows(7).any(|w| w == b"FreeDOS"));
    Ok(floppy)
}

fn grub(file: &str) -> String {
    format!("usr/lib/grub-rescue/grub-rescue-{file}")
}

/// FreeDOS on a floppy disk that boots, made once and copied for every test.
fn dos_floppy(dir: &Scratch, board: &Board, mtools: &Mtools) -> Result<PathBuf, Reason> {
    let kept = fixtures::cache_dir().join("freedos-1.img");
    if !kept.is_file() {
        let made = make_bootable(dir, board, mtools)?;
        let new = kept.with_extension(format!("{}", std::process::id()));
        fs::copy(made, &new).expect("floppy");
        fs::rename(&new, &kept).expect("floppy");
    }
    let copy = dir.0.join("floppy.img");
    fs::copy(kept, &copy).expect("floppy");
    Ok(copy)
}

/// Sectors before the only partition of [`hard_disk`].
const PARTITION: usize = 63;

/// A hard disk of 32 MiB with one FAT partition, and boot code that starts the active one.
fn hard_disk(dir: &Scratch, mtools: &Mtools) -> Result<PathBuf, Reason> {
    let sectors = 65 * 16 * PARTITION;
    let mut disk = vec![0; sectors * 512];
    let code = fs::read(SYSLINUX.file("usr/lib/syslinux/mbr/mbr.bin")?).expect("boot code");
    disk[..code.len()].copy_from_slice(&code);
    let size = (sectors - PARTITION) as u32;
    // Active, begins at 0/1/1, FAT16, ends at 64/15/63.
    disk[446..454].copy_from_slice(&[0x80, 1, 1, 0, 6, 15, 63, 64]);
    disk[454..458].copy_from_slice(&(PARTITION as u32).to_le_bytes());
    disk[458..462].copy_from_slice(&size.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = dir.file("disk.img", &disk);
    let (size, hidden) = (size.to_string(), PARTITION.to_string());
    let options = ["-T", &size, "-h", "16", "-s", "63", "-H", &hidden, "::"];
    mtools.run("mformat", &partition(&path), &options);
    Ok(path)
}

/// As mtools wants it.
fn partition(disk: &Path) -> String {
    format!("{}@@{}", text(disk), PARTITION * 512)
}

#[test]
fn grub_cd_starts_freedos_which_makes_its_floppy_bootable() {
    with(|| {
        let dir = Scratch::new("freedos-grub");
        make_bootable(&dir, &Board::new()?, &Mtools::new()?).map(drop)
    });
}

/// Files are copied and compared between the drives; the host finds them.
#[test]
fn freedos_from_floppy_and_from_a_disk_made_bootable_by_its_sys() {
    with(|| {
        let (board, mtools) = (Board::new()?, Mtools::new()?);
        let dir = Scratch::new("freedos-disk");
        let floppy = dos_floppy(&dir, &board, &mtools)?;
        let disk = hard_disk(&dir, &mtools)?;
        let ide = format!("{},bus=ide", text(&disk));
        let drives = ["--floppy", text(&floppy), "--disk", &ide];
        let mut pc = board.start(&dir, &[&drives[..], &["--boot", "order=floppy0"]].concat());
        pc.expect("DOS is up");
        pc.enter("A:\\>", "sys c:");
        pc.expect("System transferred");
        pc.enter("A:\\>", "copy fdconfig.sys c:\\");
        pc.enter("A:\\>", "copy fdauto.bat c:\\");
        pc.enter("A:\\>", "copy sys.com c:\\");
        pc.enter("A:\\>", "mem");
        let shown = pc.prompt("A:\\>");
        assert!(shown.contains("Conventional"), "{shown}");
        drop(pc);
        // Now from the disk, with the floppy disk as another drive.
        let mut pc = board.start(&dir, &drives);
        pc.expect("DOS is up");
        pc.enter("C:\\>", "md sub");
        pc.enter("C:\\>", "copy a:\\*.* sub");
        pc.enter("C:\\>", "a:comp a:\\kernel.sys sub\\kernel.sys");
        pc.prompt("C:\\>");
        pc.enter("C:\\>", "dir sub >a:listing.txt");
        pc.enter("C:\\>", "echo from DOS >note.txt");
        pc.enter("C:\\>", "cls");
        pc.prompt("C:\\>");
        drop(pc);
        assert_eq!(mtools.get(&partition(&disk), "NOTE.TXT"), "from DOS \r\n");
        assert!(mtools.get(text(&floppy), "LISTING.TXT").contains("KERNEL"));
        let (there, back) = (dir.0.join("there"), dir.0.join("back"));
        for (image, name, to) in [
            (text(&floppy).to_owned(), "::KERNEL.SYS", &there),
            (partition(&disk), "::SUB/KERNEL.SYS", &back),
        ] {
            mtools.run("mcopy", &image, &[name, text(to)]);
        }
        assert!(fs::read(there).expect("file") == fs::read(back).expect("file"));
        // GRUB's rescue floppy starts what is on the disk.
        let rescue = format!("{},ro", text(&GRUB.file(&grub("floppy.img"))?));
        let drives = ["--floppy", &rescue, "--disk", &ide];
        let mut pc = board.start(&dir, &[&drives[..], &["--boot", "order=floppy0"]].concat());
        pc.expect("GNU GRUB");
        pc.keys(&["c"]);
        pc.enter("grub> ", "set root=(hd0,msdos1)");
        pc.enter("grub> ", "chainloader +1");
        pc.enter("grub> ", "boot");
        pc.expect("DOS is up");
        pc.enter("C:\\>", "type note.txt");
        pc.expect("\nfrom DOS");
        Ok(())
    });
}

#[test]
fn isolinux_starts_freedos_in_a_memory_disk() {
    with(|| {
        let (board, mtools) = (Board::new()?, Mtools::new()?);
        let dir = Scratch::new("freedos-memdisk");
        let floppy = fs::read(dos_floppy(&dir, &board, &mtools)?).expect("floppy");
        let read = |p: PathBuf| fs::read(p).expect("file of a package");
        let loader = read(ISOLINUX.file("usr/lib/ISOLINUX/isolinux.bin")?);
        let library = read(SYSLINUX.file("usr/lib/syslinux/modules/bios/ldlinux.c32")?);
        let memdisk = read(SYSLINUX.file("usr/lib/syslinux/memdisk")?);
        let config = b"DEFAULT dos\nLABEL dos\n LINUX memdisk\n INITRD dos.img\n";
        let image = iso::bootable(
            "DOS",
            &loader,
            &[
                ("DOS.IMG", &floppy),
                ("ISOLINUX.CFG", config),
                ("LDLINUX.C32", &library),
                ("MEMDISK.", &memdisk),
            ],
        );
        let cd = dir.file("cd.iso", &image);
        let mut pc = board.start(&dir, &["--cdrom", text(&cd)]);
        // There is no floppy drive but the one in memory.
        pc.expect("DOS is up");
        pc.enter("A:\\>", "dir /w");
        pc.expect("bytes free");
        Ok(())
    });
}

/// The kernel, and its complaint about what it should start.
fn mach_complains(pc: &mut Pc<'_>) {
    let shown = pc.expect("No bootstrap code loaded");
    assert!(shown.contains("RTC time is "), "{shown}");
}

#[test]
fn gnu_mach_without_firmware_and_through_grub_from_a_floppy() {
    with(|| {
        let (board, mtools) = (Board::new()?, Mtools::new()?);
        let dir = Scratch::new("mach");
        let packed = MACH.file("boot/gnumach-1.8-486.gz")?;
        let kernel = dir.0.join("gnumach");
        let output = fs::File::create(&kernel).expect("file");
        let done = Command::new("gzip")
            .arg("-dc")
            .arg(&packed)
            .stdout(output)
            .status();
        assert!(done.expect("gzip").success());
        let options = [
            "--kernel",
            text(&kernel),
            "--net",
            "none",
            "--timeout",
            "4m",
        ];
        let options = [&options[..], &["--memory", "64M", "--console", "none"]].concat();
        let mut pc = Pc::start(&dir, &board.rom, &options);
        mach_complains(&mut pc);
        drop(pc);
        let floppy = dir.file("mach.img", &vec![0; 1440 << 10]);
        mtools.run("mformat", text(&floppy), &["-f", "1440", "::"]);
        mtools.put(text(&floppy), &packed, "mach.gz");
        let cd = format!("{},bus=ide", text(&GRUB.file(&grub("cdrom.iso"))?));
        let mut pc = board.start(&dir, &["--floppy", text(&floppy), "--cdrom", &cd]);
        pc.expect("GNU GRUB");
        pc.keys(&["c"]);
        pc.enter("grub> ", "multiboot (fd0)/mach.gz");
        pc.enter("grub> ", "boot");
        mach_complains(&mut pc);
        Ok(())
    });
}

/// True if what takes minutes is to be done.
fn full() -> bool {
    std::env::var("PYRITE_GUESTS").is_ok_and(|v| v == "full")
}

/// `memory` on a small machine: the tests run and find no errors; in a full run, all of them.
fn memtest(name: &str, cd: &Path, version: &str, no_errors: &[&str]) -> Result<(), Reason> {
    let board = Board::new()?;
    let dir = Scratch::new(name);
    let cd = format!("{},bus=ide", text(cd));
    let memory = if full() { "16M" } else { "32M" };
    let options = ["--cdrom", &cd, "--memory", memory, "--net", "none"];
    let mut pc = board.start_with(&dir, &options);
    // The first three tests are done.
    let shown = pc.wait("tests", Duration::from_secs(120), |s| {
        (3..=10).any(|n| s.contains(&format!("Test #{n} ")))
    });
    assert!(shown.contains(version), "{shown}");
    if full() {
        let pass = |s: &str| s.contains("Pass complete") || s.contains("Pass:  1");
        let shown = pc.wait("pass", Duration::from_secs(800), pass);
        assert!(no_errors.iter().any(|e| shown.contains(e)), "{shown}");
    }
    Ok(())
}

#[test]
fn memtest86_plus_6_runs_its_tests() {
    with(|| {
        let cd = MEMTEST_6.file("usr/lib/memtest86+/memtest86+x64.iso")?;
        memtest("memtest-6", &cd, "Memtest86+ v6.10", &["Errors: 0 "])
    });
}

#[test]
fn memtest86_plus_5_runs_its_tests() {
    with(|| {
        let cd = MEMTEST_5.file("usr/lib/memtest86+/memtest86+.iso")?;
        memtest("memtest-5", &cd, "Memtest86+ 5.01", &["Errors:      0"])
    });
}

/// U-Boot is firmware too: it comes to its prompt on the serial port and knows the machine.
#[test]
fn u_boot_comes_to_its_prompt() {
    with(|| {
        let rom = UBOOT.file("usr/lib/u-boot/qemu-x86/u-boot.rom")?;
        let mut command = Command::new(pyrite());
        command
            .args(["run", "--engine", "soft", "--net", "none"])
            .args(["--memory", "128M", "--timeout", "3m", "--console", "serial"])
            .args(["--firmware", text(&rom)]);
        let mut s = Session::start(&mut command);
        let limit = Duration::from_secs(90);
        s.expect("DRAM:  128 MiB", limit);
        s.expect("Hit any key", limit);
        s.send(" ");
        s.expect("=> ", limit);
        s.send("pci\r");
        s.expect("0x8086     0x29c0", limit);
        s.expect("=> ", limit);
        s.send("mw.l 2000000 cafe1234 4; md.l 2000000 1\r");
        s.expect("02000000: cafe1234", limit);
        Ok(())
    });
}

/// iPXE gets an address from the user-mode network on the virtio card.
fn ipxe(board: &Board, dir: &Scratch, cd: &str) {
    let options = ["--cdrom", cd, "--memory", "64M", "--timeout", "4m"];
    let mut pc = board.start_with(dir, &options);
    // It unpacks itself in 16-bit code, which is interpreted.
    let shown = pc.wait("address", Duration::from_secs(200), |s| {
        s.contains("net0: 10.0.2.15/255.255.255.0 gw 10.0.2.2")
    });
    assert!(shown.contains("using virtio-net"), "{shown}");
}

#[test]
fn ipxe_gets_an_address() {
    with(|| {
        let (board, dir) = (Board::new()?, Scratch::new("ipxe"));
        let cd = format!("{},bus=ide", text(&IPXE.file("usr/lib/ipxe/ipxe.iso")?));
        ipxe(&board, &dir, &cd);
        if !full() {
            return Ok(());
        }
        // As a Linux kernel, from another boot loader.
        let read = |p: PathBuf| fs::read(p).expect("file of a package");
        let loader = read(ISOLINUX.file("usr/lib/ISOLINUX/isolinux.bin")?);
        let library = read(SYSLINUX.file("usr/lib/syslinux/modules/bios/ldlinux.c32")?);
        let kernel = read(IPXE.file("boot/ipxe.lkrn")?);
        let files: [(&str, &[u8]); 3] = [
            ("ISOLINUX.CFG", b"DEFAULT x\nLABEL x\n LINUX ipxe.krn\n"),
            ("LDLINUX.C32", &library),
            ("IPXE.KRN", &kernel),
        ];
        let cd = dir.file("cd.iso", &iso::bootable("IPXE", &loader, &files));
        ipxe(&board, &dir, text(&cd));
        Ok(())
    });
}
