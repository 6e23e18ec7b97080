//! Pictures as PNG files. Portable Network Graphics Specification, second edition (ISO/IEC 15948).

use std::io::Write;

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};
use pyrite_devices::display::Surface;

const SIGNATURE: [u8; 8] = [0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a];
/// Filter types, §9.2.
const FILTER_SUB: u8 = 1;
const FILTER_UP: u8 = 2;

/// A file of 8 bits per sample, without alpha.
pub fn encode(surface: &Surface) -> std::io::Result<Vec<u8>> {
    let mut header = Vec::new();
    header.extend(surface.width().to_be_bytes());
    header.extend(surface.height().to_be_bytes());
    // Bit depth 8, truecolour, deflate, adaptive filters, not interlaced.
    header.extend([8, 2, 0, 0, 0]);
    let mut data = ZlibEncoder::new(Vec::new(), Compression::default());
    let mut above: Vec<u8> = Vec::new();
    for y in 0..surface.height() {
        let line: Vec<u8> = surface
            .line(y)
            .iter()
            .flat_map(|p| p.to_be_bytes().into_iter().skip(1))
            .collect();
        // A line like the one above becomes zeroes.
        let filtered: Vec<u8> = if above.is_empty() {
            let left = [0; 3].iter().chain(&line);
            let sub = line.iter().zip(left).map(|(b, l)| b.wrapping_sub(*l));
            [FILTER_SUB].into_iter().chain(sub).collect()
        } else {
            let up = line.iter().zip(&above).map(|(b, a)| b.wrapping_sub(*a));
            [FILTER_UP].into_iter().chain(up).collect()
        };
        data.write_all(&filtered)?;
        above = line;
    }
    let mut file = SIGNATURE.to_vec();
    chunk(&mut file, b"IHDR", &header);
    chunk(&mut file, b"IDAT", &data.finish()?);
    chunk(&mut file, b"IEND", &[]);
    Ok(file)
}

fn chunk(file: &mut Vec<u8>, kind: &[u8; 4], body: &[u8]) {
    // Pictures are limited to 64 MiB, so that the length fits.
    file.extend((body.len() as u32).to_be_bytes());
    let mut crc = Crc::new();
    for part in [kind, body] {
        file.extend(part);
        crc.update(part);
    }
    file.extend(crc.sum().to_be_bytes());
}
