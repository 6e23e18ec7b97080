use super::*;

struct Dir(std::path::PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn written(name: &str) -> (Dir, GuestMemory) {
    let dir = Dir(std::env::temp_dir().join(format!("pyrite-snap-{name}-{}", std::process::id())));
    let memory = GuestMemory::new(16 << 20).unwrap();
    memory.write(0x12_3456, b"hello").unwrap();
    let manifest = SnapshotManifest {
        format: pyrite_api::v1::SNAPSHOT_FORMAT,
        board: crate::board::BOARD_VERSION,
        spec: pyrite_api::v1::VmSpec {
            memory_bytes: 16 << 20,
            boot: pyrite_api::v1::BootSpec {
                kernel: "k".into(),
                ..Default::default()
            },
            ..Default::default()
        },
        engine: "soft".into(),
        clock_ns: 5,
        state_crc: 0,
        memory_crc: 0,
        cpuid: vec![[1, 0, 0, 1, 2, 3, 4], [7, 1, 1, 5, 6, 7, 8]],
        tsc_khz: 1_000_000,
        manifest_crc: 0,
    };
    let sections = [Section::new("u", "kind", 1, &7u32)];
    write(&dir.0, &manifest, &sections, &memory).unwrap();
    (dir, memory)
}

#[test]
fn snapshot_comes_back() {
    let (dir, _) = written("back");
    let m = Manifest::read(&dir.0).unwrap();
    assert_eq!(m.0.clock_ns, 5);
    assert_eq!(cpuid_rows(&m.cpuid()), m.0.cpuid);
    let sections = read_sections(&dir.0, &m).unwrap();
    assert_eq!(sections[0].decode::<u32>("kind", 1).unwrap(), 7);
    let memory = GuestMemory::new(16 << 20).unwrap();
    read_memory(&dir.0, &m, &memory).unwrap();
    let mut text = [0; 5];
    memory.read(0x12_3456, &mut text).unwrap();
    assert_eq!(&text, b"hello");
}

#[test]
fn damaged_and_incomplete_snapshots_are_refused() {
    let (dir, memory) = written("damaged");
    let m = Manifest::read(&dir.0).unwrap();
    let state = dir.0.join(STATE);
    let good = fs::read(&state).unwrap();
    for at in [0, 8, 12, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&state, &bad).unwrap();
        assert!(read_sections(&dir.0, &m).is_err(), "byte {at}");
    }
    fs::write(&state, &good[..10]).unwrap();
    assert!(read_sections(&dir.0, &m).is_err());
    fs::write(&state, &good).unwrap();
    let ram = File::options()
        .write(true)
        .open(dir.0.join(MEMORY))
        .unwrap();
    for at in [0x12_3456, 0x70_0000] {
        ram.write_all_at(b"x", at).unwrap();
        let fresh = GuestMemory::new(16 << 20).unwrap();
        assert!(read_memory(&dir.0, &m, &fresh).is_err(), "{at:#x}");
        ram.write_all_at(if at == 0x12_3456 { b"h" } else { b"\0" }, at)
            .unwrap();
    }
    // The state of another snapshot, in itself whole.
    let other = container::write(&[Section::new("u", "kind", 1, &8u32)]).unwrap();
    fs::write(&state, other).unwrap();
    assert!(read_sections(&dir.0, &m).is_err());
    File::options()
        .write(true)
        .open(dir.0.join(MEMORY))
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert!(Manifest::read(&dir.0).unwrap_err().contains("memory file"));
    assert!(read_memory(&dir.0, &m, &memory).is_err());
    fs::remove_file(dir.0.join(MANIFEST)).unwrap();
    assert!(
        Manifest::read(&dir.0)
            .unwrap_err()
            .contains("complete snapshot")
    );
}

#[test]
fn a_changed_manifest_is_refused() {
    let (dir, _) = written("manifest");
    let path = dir.0.join(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    let bad = good.replace("\"clock_ns\": 5", "\"clock_ns\": 6");
    assert_ne!(good, bad);
    fs::write(&path, bad).unwrap();
    let e = Manifest::read(&dir.0).unwrap_err();
    assert!(e.contains("checksum"), "{e}");
}

#[test]
fn another_tsc_frequency_is_refused() {
    same_tsc(2_399_999, 2_400_300).unwrap();
    same_tsc(2_400_300, 2_399_999).unwrap();
    let e = same_tsc(2_400_000, 2_601_000).unwrap_err().to_string();
    assert!(
        e.contains("2400.000 MHz") && e.contains("2601.000 MHz"),
        "{e}"
    );
    assert!(same_tsc(0, 1).is_err());
    assert!(same_tsc(u64::MAX, 1).is_err());
}
