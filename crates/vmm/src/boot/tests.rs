use std::io::Write;
use std::path::PathBuf;

use pyrite_api::v1::SmbiosSpec;
use pyrite_devices::storage::floppy::DriveKind;
use pyrite_mem::GuestMemory;
use pyrite_x86::bits::{cr0, efer};
use pyrite_x86::state::gpr;

use super::e820::{RangeKind, memory_map};
use super::{BootError, BootFile, BootImage, BootInput, KernelFormat, acpi, mptable, smbios};
use crate::board::low;

const MIB: u64 = 1 << 20;

/// A directory that goes away with the test.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("pyrite-boot-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::File::create(&path)
            .unwrap()
            .write_all(bytes)
            .unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn image(dir: &Dir, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> BootImage {
    BootImage {
        kernel: BootFile::open(BootInput::Kernel, &dir.file("kernel", kernel)).unwrap(),
        initrd: initrd.map(|b| BootFile::open(BootInput::Initrd, &dir.file("initrd", b)).unwrap()),
        modules: Vec::new(),
        identity: SmbiosSpec::default(),
        cmdline: cmdline.into(),
        has_text_screen: false,
        extras: acpi::Extras::default(),
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of protocol 2.15 whose code is `AA…`.
fn bzimage(xloadflags: u16, code_bytes: usize) -> Vec<u8> {
    let mut k = vec![0u8; 1024 + code_bytes];
    k[1024..].fill(0xaa);
    k[0x1f1] = 1;
    put(&mut k, 0x1f4, &((code_bytes / 16) as u32).to_le_bytes());
    put(&mut k, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut k, 0x202, b"HdrS");
    put(&mut k, 0x206, &0x020fu16.to_le_bytes());
    k[0x211] = 1;
    put(&mut k, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut k, 0x230, &0x20_0000u32.to_le_bytes());
    k[0x234] = 1;
    put(&mut k, 0x236, &xloadflags.to_le_bytes());
    put(&mut k, 0x238, &100u32.to_le_bytes());
    put(&mut k, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut k, 0x260, &0x80_0000u32.to_le_bytes());
    k
}

/// An ELF-32 with one segment at 1 MiB and optionally a PVH note; `head` starts the segment.
fn elf32(head: &[u8], pvh: Option<u32>) -> Vec<u8> {
    let mut k = vec![0u8; 0x2000];
    put(&mut k, 0, b"\x7fELF\x01\x01\x01");
    put(&mut k, 16, &[2, 0, 3, 0]);
    put(&mut k, 24, &0x10_0010u32.to_le_bytes());
    put(&mut k, 28, &52u32.to_le_bytes());
    put(&mut k, 42, &[32, 0, 2, 0]);
    let segment = |k: &mut Vec<u8>, n: usize, words: [u32; 6]| {
        for (i, w) in words.iter().enumerate() {
            put(k, 52 + n * 32 + i * 4, &w.to_le_bytes());
        }
    };
    segment(&mut k, 0, [1, 0x1000, 0x10_0000, 0x10_0000, 0x1000, 0x2000]);
    put(&mut k, 0x1000, head);
    if let Some(entry) = pvh {
        segment(&mut k, 1, [4, 0x200, 0, 0, 20, 20]);
        for (i, w) in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry]
            .iter()
            .enumerate()
        {
            put(&mut k, 0x200 + i * 4, &w.to_le_bytes());
        }
    }
    k
}

fn problem(image: &BootImage, memory_mib: u64) -> BootError {
    image
        .load(&GuestMemory::new(memory_mib * MIB).unwrap(), 1)
        .unwrap_err()
}

/// Compares with a golden file. `PYRITE_ACCEPT_GOLDEN=1` rewrites it instead.
fn check_golden(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("src/boot/golden")
        .join(name);
    let text: String = bytes
        .chunks(32)
        .map(|line| line.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n")
        .collect();
    if std::env::var_os("PYRITE_ACCEPT_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == text,
        "{name} changed: a guest would see another board"
    );
}

fn assert_sums_to_zero(table: &[u8]) {
    assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
}

#[test]
fn acpi_tables_are_the_golden_board() {
    let none = acpi::Extras::default();
    check_golden("acpi-1.hex", &acpi::build(low::ACPI, 1, &none));
    check_golden("acpi-4.hex", &acpi::build(low::ACPI, 4, &none));
    let drives = acpi::Extras {
        floppies: vec![DriveKind::D1440, DriveKind::D1200],
        ..acpi::Extras::default()
    };
    check_golden("acpi-floppy.hex", &acpi::build(low::ACPI, 1, &drives));
    let debugging = acpi::Extras {
        has_pvpanic: true,
        has_fw_cfg: true,
        ..acpi::Extras::default()
    };
    check_golden("acpi-debugging.hex", &acpi::build(low::ACPI, 1, &debugging));
}

#[test]
fn smbios_tables_are_the_golden_board() {
    let facts = smbios::Facts {
        vcpus: 4,
        identity: &SmbiosSpec::default(),
        ram: &[(0, 3 << 30), (4 << 30, 2 << 40)],
    };
    check_golden("smbios-4.hex", &smbios::build(low::SMBIOS, &facts));
}

#[test]
fn smbios_tables_are_found_and_walk_to_their_end() {
    let facts = smbios::Facts {
        vcpus: 1024,
        identity: &SmbiosSpec::default(),
        ram: &[(0, 512 << 20)],
    };
    let t = smbios::build(low::SMBIOS, &facts);
    assert!(t.len() as u64 <= low::SMBIOS_BYTES);
    let sum = |b: &[u8]| b.iter().fold(0u8, |s, x| s.wrapping_add(*x));
    assert!(t.starts_with(b"_SM_") && t[0x20..].starts_with(b"_SM3_"));
    assert_eq!((sum(&t[..31]), sum(&t[16..31]), sum(&t[32..56])), (0, 0, 0));
    let mut s = &t[0x40..];
    let mut kinds = Vec::new();
    while !s.is_empty() {
        kinds.push(s[0]);
        let strings = &s[usize::from(s[1])..];
        let end = strings.windows(2).position(|w| w == [0, 0]).unwrap();
        s = &strings[end + 2..];
    }
    assert_eq!(kinds, [0, 1, 3, 4, 16, 17, 19, 32, 127]);
    assert_eq!(
        u16::from_le_bytes([t[28], t[29]]),
        9,
        "number of structures"
    );
}

#[test]
fn mp_tables_are_the_golden_board() {
    check_golden("mp-1.hex", &mptable::build(low::MP_TABLE, 1));
    check_golden("mp-4.hex", &mptable::build(low::MP_TABLE, 4));
}

#[test]
fn acpi_tables_have_right_checksums_and_pointers() {
    for vcpus in [1, 4, 254, 255, 256, 1024] {
        let t = acpi::build(low::ACPI, vcpus, &acpi::Extras::default());
        assert!(
            t.len() as u64 <= low::ACPI_BYTES,
            "{vcpus} vCPUs need {} bytes",
            t.len()
        );
        assert_eq!(&t[..8], b"RSD PTR ");
        assert_sums_to_zero(&t[..20]);
        assert_sums_to_zero(&t[..36]);
        let at = |gpa: u64| &t[(gpa - low::ACPI) as usize..];
        let len = |t: &[u8]| u32::from_le_bytes(t[4..8].try_into().unwrap()) as usize;
        let xsdt = at(u64::from_le_bytes(t[24..32].try_into().unwrap()));
        let rsdt = at(u64::from(u32::from_le_bytes(t[16..20].try_into().unwrap())));
        assert_sums_to_zero(&xsdt[..len(xsdt)]);
        assert_sums_to_zero(&rsdt[..len(rsdt)]);
        let names: Vec<&[u8]> = xsdt[36..len(xsdt)]
            .chunks(8)
            .map(|p| {
                let t = at(u64::from_le_bytes(p.try_into().unwrap()));
                assert_sums_to_zero(&t[..len(t)]);
                &t[..4]
            })
            .collect();
        assert_eq!(names, [b"FACP", b"APIC", b"HPET", b"MCFG"]);
    }
}

#[test]
fn memory_map_is_right_for_every_size() {
    for mib in [
        16,
        64,
        128,
        512,
        2048,
        3071,
        3072,
        3073,
        4096,
        6144,
        1 << 20,
    ] {
        let memory = GuestMemory::new(mib * MIB).unwrap();
        let map = memory_map(&memory);
        for w in map.windows(2) {
            assert!(
                w[0].start + w[0].size_bytes <= w[1].start,
                "{mib} MiB: {w:x?}"
            );
        }
        let ram: u64 = map
            .iter()
            .filter(|r| r.kind == RangeKind::Ram)
            .map(|r| r.size_bytes)
            .sum();
        // Only the EBDA and A0000-FFFFF are taken from RAM.
        assert_eq!(ram, mib * MIB - (0x10_0000 - low::EBDA), "{mib} MiB");
        for r in map.iter().filter(|r| r.kind == RangeKind::Ram) {
            assert!(
                memory.ram_offset(r.start, r.size_bytes).is_some(),
                "{mib} MiB: {r:x?}"
            );
        }
    }
}

#[test]
fn bzimage_64_enters_long_mode_at_preferred_address() {
    let dir = Dir::new("bz64");
    let memory = GuestMemory::new(256 * MIB).unwrap();
    let s = image(&dir, &bzimage(1, 4096), Some(&[7; 5000]), "console=ttyS0")
        .load(&memory, 2)
        .unwrap();
    assert_eq!(s.rip, 0x100_0200);
    assert_eq!(s.efer, efer::LMA | efer::LME);
    assert_ne!(s.cr0 & cr0::PG, 0);
    assert_eq!(s.gpr[gpr::RSI], low::ZERO_PAGE);
    assert_eq!(memory.read_u32(0x100_0000).unwrap(), 0xaaaa_aaaa);
    // One to one below 4 GiB: PML4 → PDPT → PD.
    let pdpt = memory.read_u64(s.cr3).unwrap() & !0xfff;
    let pd = memory.read_u64(pdpt + 3 * 8).unwrap() & !0xfff;
    assert_eq!(memory.read_u64(pd + 511 * 8).unwrap(), 0xffe0_0083);
    // Command line, initrd at the top of RAM, E820.
    let cmdline = memory.read_u32(low::ZERO_PAGE + 0x228).unwrap();
    let mut text = [0; 14];
    memory.read(u64::from(cmdline), &mut text).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");
    let initrd = memory.read_u32(low::ZERO_PAGE + 0x218).unwrap();
    assert_eq!(u64::from(initrd), 256 * MIB - 8192);
    assert_eq!(memory.read_u32(low::ZERO_PAGE + 0x21c).unwrap(), 5000);
    assert_eq!(memory.read_u64(low::ZERO_PAGE + 0x70).unwrap(), low::ACPI);
    let mut n = [0];
    memory.read(low::ZERO_PAGE + 0x1e8, &mut n).unwrap();
    assert_eq!(usize::from(n[0]), memory_map(&memory).len());
}

#[test]
fn bzimage_32_enters_protected_mode() {
    let dir = Dir::new("bz32");
    let memory = GuestMemory::new(64 * MIB).unwrap();
    let s = image(&dir, &bzimage(0, 4096), None, "")
        .load(&memory, 1)
        .unwrap();
    assert_eq!(s.rip, 0x100_0000);
    assert_eq!(s.cr0 & (cr0::PG | cr0::PE), cr0::PE);
    assert_eq!(s.efer, 0);
}

#[test]
fn bzimage_moves_down_when_memory_is_small() {
    let dir = Dir::new("bzsmall");
    let memory = GuestMemory::new(16 * MIB).unwrap();
    let s = image(&dir, &bzimage(0, 4096), None, "")
        .load(&memory, 1)
        .unwrap();
    assert_eq!(s.rip, 0x20_0000);
}

#[test]
fn pvh_kernel_gets_start_info() {
    let dir = Dir::new("pvh");
    let memory = GuestMemory::new(64 * MIB).unwrap();
    let i = image(&dir, &elf32(b"", Some(0x10_0020)), Some(b"x"), "hello");
    assert_eq!(i.format().unwrap(), KernelFormat::Pvh);
    let s = i.load(&memory, 1).unwrap();
    assert_eq!(s.rip, 0x10_0020);
    let info = s.gpr[gpr::RBX];
    assert_eq!(memory.read_u32(info).unwrap(), 0x336e_c578);
    assert_eq!(memory.read_u32(info + 12).unwrap(), 1);
    let modules = memory.read_u64(info + 16).unwrap();
    assert_eq!(memory.read_u64(modules + 8).unwrap(), 1);
    assert_eq!(memory.read_u64(info + 32).unwrap(), low::ACPI);
    let map = memory.read_u64(info + 40).unwrap();
    assert_eq!(memory.read_u64(map + 8).unwrap(), low::EBDA);
}

#[test]
fn multiboot_kernel_gets_modules() {
    let dir = Dir::new("mb");
    let memory = GuestMemory::new(64 * MIB).unwrap();
    let magic = 0x1bad_b002u32;
    let mut head = magic.to_le_bytes().to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend(0u32.wrapping_sub(magic).wrapping_sub(3).to_le_bytes());
    let mut i = image(&dir, &elf32(&head, None), None, "root=x");
    let module = BootFile::open(BootInput::Module, &dir.file("m", &[9; 4097])).unwrap();
    i.modules.push((module, "m args".into()));
    let s = i.load(&memory, 1).unwrap();
    assert_eq!((s.rip, s.gpr[gpr::RAX]), (0x10_0010, 0x2bad_b002));
    let info = s.gpr[gpr::RBX];
    assert_eq!(memory.read_u32(info + 20).unwrap(), 1);
    let mods = u64::from(memory.read_u32(info + 24).unwrap());
    let (start, end) = (
        memory.read_u32(mods).unwrap(),
        memory.read_u32(mods + 4).unwrap(),
    );
    assert_eq!((start % 4096, end - start), (0, 4097));
    assert_eq!(memory.read_u32(u64::from(start)).unwrap(), 0x0909_0909);
    let mut name = [0; 7];
    memory
        .read(u64::from(memory.read_u32(mods + 8).unwrap()), &mut name)
        .unwrap();
    assert_eq!(&name, b"m args\0");
    assert_eq!(memory.read_u32(info + 8).unwrap(), 63 * 1024);
}

#[test]
fn virtual_entry_of_a_multiboot_kernel_becomes_physical() {
    let dir = Dir::new("mb-virtual");
    let magic = 0x1bad_b002u32;
    let mut head = magic.to_le_bytes().to_vec();
    head.extend([0; 4]);
    head.extend(0u32.wrapping_sub(magic).to_le_bytes());
    let mut k = elf32(&head, None);
    put(&mut k, 52 + 8, &0xc010_0000u32.to_le_bytes());
    put(&mut k, 24, &0xc010_0010u32.to_le_bytes());
    let memory = GuestMemory::new(64 * MIB).unwrap();
    let s = image(&dir, &k, None, "").load(&memory, 1).unwrap();
    assert_eq!(s.rip, 0x10_0010);
    put(&mut k, 24, &0xd000_0000u32.to_le_bytes());
    let e = problem(&image(&dir, &k, None, ""), 64);
    assert!(e.problem.contains("entry point"), "{e}");
}

#[test]
fn foreign_and_truncated_kernels_are_named_errors() {
    let dir = Dir::new("bad");
    let mut cut = bzimage(1, 4096);
    cut.truncate(2000);
    let mut arm = elf32(b"", None);
    arm[18] = 40;
    let mut short_elf = elf32(b"", None);
    short_elf.truncate(0x1800);
    for (bytes, words) in [
        (Vec::new(), "empty"),
        (b"hello world".to_vec(), "not a kernel"),
        (vec![0x1f, 0x8b, 8, 0], "gzip"),
        (b"!<arch>\ndebian-binary".to_vec(), "package"),
        (cut, "truncated"),
        (arm, "not for x86"),
        (short_elf, "truncated"),
        (b"\x7fELF".to_vec(), "class"),
    ] {
        let e = problem(&image(&dir, &bytes, None, ""), 64);
        assert_eq!(e.input, BootInput::Kernel, "{e}");
        assert!(e.problem.contains(words), "{e} lacks {words}");
    }
}

#[test]
fn limits_are_named_errors() {
    let dir = Dir::new("limits");
    let k = bzimage(1, 4096);
    let long = "x".repeat(101);
    assert_eq!(
        problem(&image(&dir, &k, None, &long), 64).input,
        BootInput::Append
    );
    let big = vec![1; 20 * MIB as usize];
    assert_eq!(
        problem(&image(&dir, &k, Some(&big), ""), 32).input,
        BootInput::Initrd
    );
    assert_eq!(
        problem(&image(&dir, &k, Some(&[]), ""), 64).input,
        BootInput::Initrd
    );
    assert_eq!(
        problem(&image(&dir, &k, None, ""), 8).input,
        BootInput::Memory
    );
    let missing = BootFile::open(BootInput::Kernel, &dir.0.join("nothing")).unwrap_err();
    assert!(missing.problem.contains("nothing"), "{missing}");
    assert!(BootFile::open(BootInput::Initrd, &dir.0).is_err());
}

#[test]
fn mangled_kernels_never_panic() {
    let dir = Dir::new("mangled");
    let memory = GuestMemory::new(64 * MIB).unwrap();
    let seeds = [
        bzimage(1, 4096),
        elf32(b"", Some(0x10_0020)),
        elf32(b"", None),
    ];
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for seed in &seeds {
        for _ in 0..150 {
            let mut k = seed.clone();
            for _ in 0..8 {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                // Headers are where the offsets are.
                let at = (x >> 16) as usize % 0x300;
                k[at] = x as u8;
            }
            let _ = image(&dir, &k, Some(b"initrd"), "a").load(&memory, 1);
        }
    }
}

#[test]
fn cpio_archive_has_aligned_entries_and_trailer() {
    let mut w = super::cpio::CpioWriter::new(Vec::new());
    w.dir("bin").unwrap();
    w.file("bin/x", 0o755, b"hello").unwrap();
    w.symlink("bin/y", "x").unwrap();
    w.char_device("console", 5, 1).unwrap();
    let a = w.finish().unwrap();
    assert_eq!(a.len() % 4, 0);
    assert!(a.starts_with(b"070701"));
    let text = String::from_utf8_lossy(&a);
    assert_eq!(text.matches("070701").count(), 5);
    assert!(text.contains("TRAILER!!!"));
    // Second entry: mode of a regular executable file, 5 bytes.
    let second = text.match_indices("070701").nth(1).unwrap().0;
    assert_eq!(&text[second + 14..second + 22], "000081ed");
    assert_eq!(&text[second + 54..second + 62], "00000005");
}

#[test]
fn tables_of_the_firmware_board_are_the_golden_ones() {
    let memory = GuestMemory::with_rom(3 << 30, &[0; 4096]).unwrap();
    let board = crate::firmware::acpi_board(Some(0xb000_0000), crate::firmware::windows(&memory));
    let files = acpi::files(&board, 2);
    check_golden("firmware-1-acpi.hex", &files.tables);
    check_golden("firmware-1-rsdp.hex", &files.rsdp);
    check_golden("firmware-1-loader.hex", &files.loader);
}

#[test]
fn identity_is_in_the_smbios_tables() {
    let identity = SmbiosSpec {
        vendor: Some("A. Maker".into()),
        serial: Some("S-1".into()),
        uuid: Some("00112233-4455-6677-8899-aabbccddeeff".into()),
        ..SmbiosSpec::default()
    };
    let facts = smbios::Facts {
        vcpus: 1,
        identity: &identity,
        ram: &[(0, 1 << 30)],
    };
    let (anchor, tables) = smbios::files(&facts);
    assert!(anchor.starts_with(b"_SM_") && anchor.len() == 31);
    assert_sums_to_zero(&anchor);
    assert_eq!(tables[0], 1, "firmware says itself who it is");
    let uuid = [
        0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
    ];
    assert_eq!(tables[8..24], uuid);
    let strings = &tables[27..];
    assert!(strings.starts_with(b"A. Maker\0Pyrite VM\0board 1\0S-1\0\0"));
    assert_eq!(tables[7], 4, "the serial number's string");
}
