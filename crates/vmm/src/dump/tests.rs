use pyrite_x86::bits::{cr0, cr4, efer};

use super::*;

fn word(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

/// Kind, offset, virtual and physical address, bytes of every program header.
fn segments(core: &[u8]) -> Vec<[u64; 5]> {
    let count = u16::from_le_bytes(core[56..58].try_into().unwrap());
    (0..usize::from(count))
        .map(|n| {
            let at = 64 + 56 * n;
            let kind = word(core, at) & 0xffff_ffff;
            [
                kind,
                word(core, at + 8),
                word(core, at + 16),
                word(core, at + 24),
                word(core, at + 32),
            ]
        })
        .collect()
}

/// Names, types and descriptions.
fn notes(core: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let all = segments(core);
    let (at, bytes) = (all[0][1] as usize, all[0][4] as usize);
    let mut rest = &core[at..at + bytes];
    let mut out = Vec::new();
    while !rest.is_empty() {
        let n = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap()) as usize;
        let (name, desc, kind) = (n(0), n(4), n(8));
        let from = 12 + name.next_multiple_of(4);
        let text = String::from_utf8_lossy(&rest[12..12 + name - 1]).into_owned();
        out.push((text, kind as u32, rest[from..from + desc].to_vec()));
        rest = &rest[from + desc.next_multiple_of(4)..];
    }
    out
}

fn dump(
    name: &str,
    memory: &GuestMemory,
    s: &CpuState,
    linear: bool,
    told: Option<&[u8]>,
) -> Vec<u8> {
    let path = std::env::temp_dir().join(format!("pyrite-dump-{name}-{}", std::process::id()));
    let states = [Box::new(s.clone()), Box::new(CpuState::reset(1, false))];
    write(&path, memory, &states, linear, told).unwrap();
    assert!(
        write(&path, memory, &states, linear, told).is_err(),
        "replaces a file"
    );
    let core = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    core
}

/// The note of a Linux kernel.
fn info(text: &str) -> Vec<u8> {
    let mut b = Vec::new();
    note(&mut b, b"VMCOREINFO\0", 0, text.as_bytes());
    b
}

#[test]
fn core_has_memory_and_registers() {
    let memory = GuestMemory::new(4 << 20).unwrap();
    memory.write(0x12_3456, b"here").unwrap();
    let mut s = CpuState::reset(0, true);
    s.gpr[gpr::RSP] = 0xffff_8000_1234_5678;
    s.cr3 = 0x5000;
    let core = dump("plain", &memory, &s, false, None);
    let all = segments(&core);
    assert_eq!(all.len(), 2);
    let [kind, at, linear, gpa, bytes] = all[1];
    assert_eq!((kind, linear, gpa, bytes), (1, 0, 0, 4 << 20));
    let at = at as usize + 0x12_3456;
    assert_eq!(&core[at..at + 4], b"here");
    let notes = notes(&core);
    let names: Vec<_> = notes
        .iter()
        .map(|(n, t, d)| (n.as_str(), *t, d.len()))
        .collect();
    let expected = [
        ("CORE", 1, 336),
        ("CORE", 1, 336),
        ("QEMU", 0, 440),
        ("QEMU", 0, 440),
    ];
    assert_eq!(names, expected);
    let first = &notes[0].2;
    assert_eq!(first[32..36], [1, 0, 0, 0]);
    assert_eq!(word(first, 112 + 8 * 16), 0xfff0);
    assert_eq!(word(first, 112 + 8 * 19), 0xffff_8000_1234_5678);
    let qemu = &notes[2].2;
    assert_eq!(u32::from_le_bytes(qemu[4..8].try_into().unwrap()), 440);
    assert_eq!(word(qemu, 440 - 24), 0x5000);
}

#[test]
fn kernels_say_what_they_are() {
    let memory = GuestMemory::new(4 << 20).unwrap();
    let s = CpuState::reset(0, true);
    let found = |told: Option<&[u8]>| {
        let core = dump("info", &memory, &s, false, told);
        let last = notes(&core).pop().unwrap();
        (last.0 == "VMCOREINFO").then(|| String::from_utf8(last.2).unwrap())
    };
    assert_eq!(found(None), None);
    // Not one: another beginning, too long, cut off by the end of RAM.
    memory.write(0x1000, &info("OTHER=1")).unwrap();
    let mut long = info("OSRELEASE=0");
    long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    memory.write(0x2000, &long).unwrap();
    let mut cut = info("OSRELEASE=9");
    cut[4..8].copy_from_slice(&4096u32.to_le_bytes());
    memory.write((4 << 20) - 64, &cut).unwrap();
    assert_eq!(found(None), None);
    // Across the border of two pieces.
    memory
        .write(0x1_fff4, &info("OSRELEASE=6.1\nPAGESIZE=4096\n"))
        .unwrap();
    assert_eq!(found(None).unwrap(), "OSRELEASE=6.1\nPAGESIZE=4096\n");
    // A guest that says where is believed, if something is there.
    let note = info("BUILD-ID=told");
    memory.write(0x9004, &note).unwrap();
    let mut told = vec![0, 0, 1, 0];
    told.extend((note.len() as u32).to_le_bytes());
    told.extend(0x9004u64.to_le_bytes());
    assert_eq!(found(Some(&told)).unwrap(), "BUILD-ID=told");
    for (at, value) in [(2, 0u8), (4, 0), (7, 0xff), (15, 0xff), (8, 0)] {
        let mut wrong = told.clone();
        wrong[at] = value;
        assert!(
            found(Some(&wrong)).unwrap().starts_with("OSRELEASE=6.1"),
            "{at}"
        );
    }
    assert!(found(Some(&[])).is_some());
}

#[test]
fn linear_addresses_lead_to_the_same_bytes() {
    let memory = GuestMemory::new(8 << 20).unwrap();
    let put = |at: u64, v: u64| memory.write(at, &v.to_le_bytes()).unwrap();
    put(0x1000 + 8 * 256, 0x2003);
    put(0x2000, 0x3003);
    // 2 MiB at 4 MiB; a table of two neighbours and one page elsewhere; not RAM; half of it RAM.
    put(0x3000, 0x40_0083);
    put(0x3008, 0x4003);
    put(0x4000, 0x60_0003);
    put(0x4008, 0x60_1003);
    put(0x4010, 0x9003);
    put(0x4018, 0xfee0_0003);
    put(0x3010, 0xe000_0083);
    let mut s = CpuState::reset(0, true);
    s.cr0 |= cr0::PE | cr0::PG;
    s.cr3 = 0x1000;
    s.cr4 = cr4::PAE;
    s.efer = efer::LME | efer::LMA;
    let core = dump("linear", &memory, &s, true, None);
    let base = 0xffff_8000_0000_0000;
    let ram = segments(&core)[1][1];
    let expected = [
        // The end of the large page and the small ones behind it are contiguous.
        [1, ram + 0x40_0000, base, 0x40_0000, 0x20_2000],
        [1, ram + 0x9000, base + 0x20_2000, 0x9000, 0x1000],
    ];
    assert_eq!(segments(&core)[2..], expected);
    // Tables that refer to themselves end.
    put(0x1000 + 8 * 256, 0x1003);
    put(0x1000, 0x1003);
    let states = [Box::new(s.clone())];
    let path = std::env::temp_dir().join(format!("pyrite-dump-loop-{}", std::process::id()));
    let outcome = write(&path, &memory, &states, true, None);
    if outcome.is_ok() {
        fs::remove_file(&path).unwrap();
    }
    assert!(!path.exists());
    // 32-bit paging: a page of 4 MiB.
    memory.write(0x1000, &[0; 4096]).unwrap();
    memory
        .write(0x1000 + 4 * 768, &0x83u32.to_le_bytes())
        .unwrap();
    s.efer = 0;
    s.cr4 = cr4::PSE;
    let core = dump("narrow", &memory, &s, true, None);
    assert_eq!(segments(&core)[2][2..], [0xc000_0000, 0, 4 << 20]);
}
