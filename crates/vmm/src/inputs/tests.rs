use super::*;

struct Temp(std::path::PathBuf);

impl Temp {
    fn new(name: &str, bytes: &[u8]) -> Temp {
        let path = std::env::temp_dir().join(format!("pyrite-{name}-{}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Temp(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn disk(name: &str, bytes: &[u8]) -> Result<(), String> {
    let file = Temp::new(name, bytes);
    check_disk(&DiskSpec {
        path: file.0.clone(),
        ..DiskSpec::default()
    })
}

#[test]
fn complete_disks_pass() {
    disk("zeroes", &[0; 4096]).unwrap();
    let mut gpt = vec![0u8; 1 << 20];
    gpt[512..520].copy_from_slice(b"EFI PART");
    gpt[544..552].copy_from_slice(&2047u64.to_le_bytes());
    disk("gpt", &gpt).unwrap();
}

#[test]
fn cut_off_file_system_and_gpt_are_truncated() {
    let mut ext = vec![0u8; 8192];
    ext[1080..1082].copy_from_slice(&[0x53, 0xef]);
    ext[1028..1032].copy_from_slice(&100u32.to_le_bytes());
    assert!(disk("ext", &ext).unwrap_err().contains("truncated"));
    let mut gpt = vec![0u8; 8192];
    gpt[512..520].copy_from_slice(b"EFI PART");
    gpt[544..552].copy_from_slice(&u64::MAX.to_le_bytes());
    // A last sector that cannot be: nothing is claimed about it.
    disk("gpt-odd", &gpt).unwrap();
    gpt[544..552].copy_from_slice(&100u64.to_le_bytes());
    assert!(disk("gpt-cut", &gpt).unwrap_err().contains("truncated"));
}

#[test]
fn initrd_is_followed_to_its_trailer() {
    let mut w = crate::boot::cpio::CpioWriter::new(Vec::new());
    w.file("a", 0o644, &[1; 1000]).unwrap();
    let whole = w.finish().unwrap();
    let file = Temp::new("whole", &whole);
    check_initrd(&file.0).unwrap();
    let cut = Temp::new("cut", &whole[..600]);
    assert!(check_initrd(&cut.0).unwrap_err().contains("truncated"));
    let foreign = Temp::new(
        "foreign",
        b"#!/bin/sh\necho hello world, this is not an initrd\n",
    );
    assert!(
        check_initrd(&foreign.0)
            .unwrap_err()
            .contains("expected a cpio")
    );
    let gz = Temp::new("gz", &[0x1f, 0x8b, 8, 0]);
    check_initrd(&gz.0).unwrap();
}
