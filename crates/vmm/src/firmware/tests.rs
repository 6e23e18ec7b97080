use std::path::PathBuf;

use super::*;

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("pyrite-fw-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn spec(dir: &Dir) -> FirmwareSpec {
    FirmwareSpec {
        code: dir.file("code", &[0x90; 0x2_0000]),
        vars_template: Some(dir.file("template", &[0xff; 0x4000])),
        ..FirmwareSpec::default()
    }
}

#[test]
fn variables_are_made_kept_and_locked() {
    let dir = Dir::new("vars");
    let path = dir.0.join("vars");
    let spec = FirmwareSpec {
        vars: Some(path.clone()),
        ..spec(&dir)
    };
    check(&spec).unwrap();
    assert!(!path.exists(), "looking makes no files");
    let first = Firmware::open(&spec).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [0xff; 0x4000]);
    let Err(e) = Firmware::open(&spec) else {
        panic!("two VMs with the same variables");
    };
    assert!(e.problem.contains("another VM"), "{e}");
    drop(first);
    std::fs::write(&path, [0x55; 0x4000]).unwrap();
    let kept = Firmware::open(&spec).unwrap();
    assert_eq!(kept.vars.unwrap().size_bytes(), 0x4000);
    assert_eq!(std::fs::read(&path).unwrap(), [0x55; 0x4000]);
    assert_eq!(
        std::fs::read_dir(&dir.0).unwrap().count(),
        3,
        "nothing is left behind"
    );
}

#[test]
fn files_that_are_no_firmware() {
    let dir = Dir::new("wrong");
    let good = spec(&dir);
    let problem = |s: &FirmwareSpec| {
        let e = check(s).unwrap_err();
        assert_eq!(Firmware::open(s).err(), Some(e.clone()));
        e.to_string()
    };
    for (name, bytes) in [("empty", 0), ("odd", 4095), ("large", (16 << 20) + 4096)] {
        let s = FirmwareSpec {
            code: dir.file(name, &vec![0; bytes]),
            ..good.clone()
        };
        assert!(problem(&s).contains("expected a firmware image"), "{name}");
    }
    let s = FirmwareSpec {
        code: dir.0.clone(),
        ..good.clone()
    };
    assert!(problem(&s).contains("regular file"));
    let s = FirmwareSpec {
        code: dir.file("most", &vec![0; 16 << 20]),
        ..good.clone()
    };
    assert!(problem(&s).contains("together"));
    let s = FirmwareSpec {
        vars: Some(dir.file("other", &[0; 0x2000])),
        ..good
    };
    assert!(problem(&s).contains("another firmware"));
}

#[test]
fn order_and_one_shot_boot() {
    let dir = Dir::new("order");
    let devices = BootDevices::from([
        ("disk0".to_owned(), "/a".to_owned()),
        ("disk1".to_owned(), "/b".to_owned()),
        ("net0".to_owned(), "/c".to_owned()),
    ]);
    let spec = FirmwareSpec {
        order: vec!["disk1".into(), "disk0".into()],
        once: Some("net0".into()),
        ..spec(&dir)
    };
    let f = Firmware::open(&spec).unwrap();
    f.check_order(&devices).unwrap();
    let memory = std::sync::Arc::new(GuestMemory::new(1 << 20).unwrap());
    let mut fw_cfg = FwCfg::new(memory);
    f.tell_order(&mut fw_cfg, &devices, true).unwrap();
    assert_eq!(fw_cfg.file("bootorder"), Some(&b"/c\n/b\n/a\0"[..]));
    f.tell_order(&mut fw_cfg, &devices, false).unwrap();
    assert_eq!(fw_cfg.file("bootorder"), Some(&b"/b\n/a\0"[..]));
    let wrong = FirmwareSpec {
        once: Some("disk7".into()),
        ..spec
    };
    let e = Firmware::open(&wrong)
        .unwrap()
        .check_order(&devices)
        .unwrap_err();
    assert_eq!(e.path, "boot.firmware.once");
    assert!(e.problem.contains("disk0, disk1, net0"), "{e}");
}

/// Follows the loader's script as firmware does, with the files at these addresses.
fn link(files: &acpi::Files, tables_at: u64, rsdp_at: u64) -> (Vec<u8>, Vec<u8>) {
    let (mut tables, mut rsdp) = (files.tables.clone(), files.rsdp.clone());
    for c in files.loader.chunks(128) {
        let word = |at: usize| u32::from_le_bytes(c[at..at + 4].try_into().unwrap()) as usize;
        let file = |at: usize| c[at..at + 56].starts_with(b"etc/acpi/tables\0");
        let target = if file(4) { &mut tables } else { &mut rsdp };
        match word(0) {
            1 => assert!(word(60).is_power_of_two()),
            2 => {
                let base = if file(60) { tables_at } else { rsdp_at };
                let (offset, size) = (word(116), usize::from(c[120]));
                let mut v = [0; 8];
                v[..size].copy_from_slice(&target[offset..offset + size]);
                let v = u64::from_le_bytes(v) + base;
                target[offset..offset + size].copy_from_slice(&v.to_le_bytes()[..size]);
            }
            3 => {
                let (offset, start, length) = (word(60), word(64), word(68));
                let sum = target[start..start + length]
                    .iter()
                    .fold(0u8, |s, b| s.wrapping_add(*b));
                target[offset] = target[offset].wrapping_sub(sum);
            }
            other => panic!("command {other}"),
        }
    }
    (tables, rsdp)
}

#[test]
fn linked_tables_are_right_wherever_they_are_put() {
    let memory = GuestMemory::with_rom(64 << 20, &[0; 4096]).unwrap();
    let board = |at| acpi_board(at, windows(&memory));
    let sums = |t: &[u8]| t.iter().fold(0u8, |s, b| s.wrapping_add(*b));
    let at = 0x3fe_0000u64;
    let (tables, rsdp) = link(&acpi::files(&board(Some(0xe000_0000)), 3), at, 0xf_6000);
    assert_eq!((sums(&rsdp[..20]), sums(&rsdp)), (0, 0));
    let table = |address: u64| {
        let from = &tables[(address - at) as usize..];
        let length = u32::from_le_bytes(from[4..8].try_into().unwrap()) as usize;
        &from[..length]
    };
    let wide = |b: &[u8]| u64::from_le_bytes(b[..8].try_into().unwrap());
    let narrow = |b: &[u8]| u64::from(u32::from_le_bytes(b[..4].try_into().unwrap()));
    let (rsdt, xsdt) = (table(narrow(&rsdp[16..])), table(wide(&rsdp[24..])));
    assert!(rsdt.starts_with(b"RSDT") && xsdt.starts_with(b"XSDT"));
    assert_eq!((sums(rsdt), sums(xsdt)), (0, 0));
    let mut names = Vec::new();
    for (a, b) in xsdt[36..].chunks(8).zip(rsdt[36..].chunks(4)) {
        assert_eq!(wide(a), narrow(b));
        let t = table(wide(a));
        assert_eq!(sums(t), 0);
        names.push(String::from_utf8_lossy(&t[..4]).into_owned());
        match &t[..4] {
            b"FACP" => {
                assert_eq!(narrow(&t[40..]), wide(&t[140..]));
                assert!(table(wide(&t[140..])).starts_with(b"DSDT"));
                assert!(table(narrow(&t[36..])).starts_with(b"FACS"));
            }
            b"MCFG" => assert_eq!(wide(&t[44..]), 0xe000_0000),
            _ => {}
        }
    }
    assert_eq!(names, ["FACP", "APIC", "HPET", "MCFG"]);
    // Sizes do not depend on what firmware programs.
    let size = |e| acpi::files(&board(e), 3).tables.len();
    for odd in [
        None,
        Some(0xb000_0000),
        Some(0x8000_0000),
        Some(0xf000_0000),
        Some(1 << 35),
    ] {
        assert_eq!(size(odd), tables.len(), "{odd:x?}");
    }
}

#[test]
fn pci_has_room_within_what_the_processor_addresses() {
    // All that is allowed; the processor is told before there is memory.
    for (ram_end, bits) in [(1 << 32, 39), (256 << 30, 39), ((8 << 40) + (4 << 30), 45)] {
        assert_eq!(board::physical_bits(ram_end), bits);
        assert!((1 << bits) - ram_end >= ram_end);
    }
    let mut cpuid = crate::engines::guest_cpuid(crate::engines::Engine::Soft, "host", 1).unwrap();
    limit_cpuid(&mut cpuid, 512 << 20);
    assert_eq!(cpuid.get(0x8000_0008, 0).unwrap().eax & 0xff, 39);
    let memory = GuestMemory::with_rom(64 << 20, &[0; 4096]).unwrap();
    let (start, len) = windows(&memory).mem64;
    assert_eq!((start, start + len), (HIGH_RAM_START, 1 << 39));
}

#[test]
fn builds_that_need_management_mode_are_known_by_their_name() {
    let dir = std::env::temp_dir().join(format!("pyrite-secboot-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (build, link) = (dir.join("X_CODE.secboot.fd"), dir.join("X_CODE.ms.fd"));
    std::fs::write(&build, "").unwrap();
    std::os::unix::fs::symlink(&build, &link).unwrap();
    assert!(needs_smm(&build) && needs_smm(&link));
    assert!(!needs_smm(&dir.join("X_CODE.fd")));
    std::fs::remove_dir_all(&dir).unwrap();
}
