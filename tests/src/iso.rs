//! CD images, made by hand. ECMA-119 (ISO 9660) is meant by section numbers.

const SECTOR: usize = 2048;
/// First sector of files.
const FILES_AT: u32 = 20;

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
    let mut next = FILES_AT;
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
    pvd[140..144].copy_from_slice(&18_u32.to_le_bytes());
    let own = record(&[0], 19, SECTOR as u32, true);
    pvd[156..156 + own.len()].copy_from_slice(&own);
    pvd[190..813].fill(b' ');
    pvd[881] = 1;
    let mut put = |sector: usize, data: &[u8]| {
        image[sector * SECTOR..sector * SECTOR + data.len()].copy_from_slice(data);
    };
    put(16, &pvd);
    put(17, b"\xffCD001\x01");
    put(18, &[1, 0, 19, 0, 0, 0, 1, 0, 0, 0]);
    put(19, &root);
    let mut at = FILES_AT as usize;
    for (_, content) in files {
        put(at, content);
        at += content.len().div_ceil(SECTOR);
    }
    image
}
