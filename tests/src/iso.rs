//! CD images, made by hand. ECMA-119 (ISO 9660) is meant by section numbers.

const SECTOR: usize = 2048;
/// Sectors of the path table and of the boot catalog.
const PATHS_AT: u32 = 20;
const CATALOG_AT: u32 = 21;
/// First sector of files.
const FILES_AT: u32 = 22;

/// A number in both byte orders. §7.3.3.
fn both(v: u32) -> [u8; 8] {
    let mut b = [0; 8];
    b[..4].copy_from_slice(&v.to_le_bytes());
    b[4..].copy_from_slice(&v.to_be_bytes());
    b
}

/// A directory record. §9.1.
fn record(name: &[u8], at: u32, len: u32, directory: bool) -> Vec<u8> {
    let mut r = vec![0, 0];
    r.extend(both(at));
    r.extend(both(len));
    r.extend([100, 1, 1, 0, 0, 0, 0]); // 2000-01-01
    r.extend([u8::from(directory) << 1, 0, 0, 1, 0, 0, 1, name.len() as u8]);
    r.extend(name);
    if r.len() % 2 == 1 {
        r.push(0);
    }
    r[0] = r.len() as u8;
    r
}

/// An image whose root directory has these files. Names are like `README.TXT`.
pub fn image(volume: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    build(volume, None, files)
}

/// As [`image`], and a BIOS starts `loader` from it without emulating a disk, as El Torito 1.0 has it.
/// The loader finds out where it is from a boot information table at its start.
pub fn bootable(volume: &str, loader: &[u8], files: &[(&str, &[u8])]) -> Vec<u8> {
    build(volume, Some(loader), files)
}

fn sectors(bytes: &[u8]) -> u32 {
    bytes.len().div_ceil(SECTOR) as u32
}

fn build(volume: &str, loader: Option<&[u8]>, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut next = FILES_AT;
    let mut loader = loader.map(<[u8]>::to_vec);
    if let Some(loader) = &mut loader {
        // The boot information table: volume descriptor, file, length, sum of the words behind it.
        let words = loader.get(64..).unwrap_or_default().chunks(4);
        let sum = words.fold(0_u32, |sum, w| {
            let mut word = [0; 4];
            word[..w.len()].copy_from_slice(w);
            sum.wrapping_add(u32::from_le_bytes(word))
        });
        for (n, v) in [16, next, loader.len() as u32, sum].into_iter().enumerate() {
            loader[8 + n * 4..12 + n * 4].copy_from_slice(&v.to_le_bytes());
        }
        next += sectors(loader);
    }
    let mut root = record(&[0], 19, SECTOR as u32, true);
    root.extend(record(&[1], 19, SECTOR as u32, true));
    for (name, content) in files {
        let name = format!("{name};1");
        root.extend(record(name.as_bytes(), next, content.len() as u32, false));
        next += content.len().div_ceil(SECTOR) as u32;
    }
    assert!(root.len() <= SECTOR, "too many files");
    let mut image = vec![0; next as usize * SECTOR];
    // Primary volume descriptor. §8.4.
    let mut pvd = vec![0; SECTOR];
    pvd[..7].copy_from_slice(b"\x01CD001\x01");
    pvd[8..72].fill(b' ');
    pvd[40..40 + volume.len()].copy_from_slice(volume.as_bytes());
    pvd[80..88].copy_from_slice(&both(next));
    for (at, v) in [(120, 1_u16), (124, 1), (128, SECTOR as u16)] {
        pvd[at..at + 2].copy_from_slice(&v.to_le_bytes());
        pvd[at + 2..at + 4].copy_from_slice(&v.to_be_bytes());
    }
    pvd[132..140].copy_from_slice(&both(10)); // path table
    pvd[140..144].copy_from_slice(&PATHS_AT.to_le_bytes());
    let own = record(&[0], 19, SECTOR as u32, true);
    pvd[156..156 + own.len()].copy_from_slice(&own);
    pvd[190..813].fill(b' ');
    pvd[881] = 1;
    let mut put = |sector: usize, data: &[u8]| {
        image[sector * SECTOR..sector * SECTOR + data.len()].copy_from_slice(data);
    };
    put(16, &pvd);
    let mut at = FILES_AT as usize;
    if let Some(loader) = &loader {
        // El Torito §2: where the catalog is; the catalog with one entry: no emulation, 4 sectors
        // of 512 bytes.
        let mut boot = [0; 75];
        boot[..39].copy_from_slice(b"\0CD001\x01EL TORITO SPECIFICATION\0\0\0\0\0\0\0\0\0");
        boot[71..75].copy_from_slice(&CATALOG_AT.to_le_bytes());
        put(17, &boot);
        let mut catalog = [0; 64];
        catalog[0] = 1;
        catalog[28..32].copy_from_slice(&[0xaa, 0x55, 0x55, 0xaa]);
        catalog[32] = 0x88;
        catalog[38] = 4;
        catalog[40..44].copy_from_slice(&FILES_AT.to_le_bytes());
        put(CATALOG_AT as usize, &catalog);
        put(at, loader);
        at += sectors(loader) as usize;
    }
    put(18 - usize::from(loader.is_none()), b"\xffCD001\x01");
    put(PATHS_AT as usize, &[1, 0, 19, 0, 0, 0, 1, 0, 0, 0]);
    put(19, &root);
    for (_, content) in files {
        put(at, content);
        at += content.len().div_ceil(SECTOR);
    }
    image
}
