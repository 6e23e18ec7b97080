//! Identify data and log pages. §5.15.2 and §5.14.1.

use pyrite_disk::DiskInfo;

use super::NvmeNames;
use super::command::MDTS;
use super::controller::{Counters, MAX_ASYNC};

/// PCI vendor of the controller.
pub(super) const VENDOR: u16 = 0x1b36;
/// Bytes of an Identify data structure.
pub(super) const BYTES: usize = 4096;

fn put(b: &mut [u8], at: usize, data: &[u8]) {
    b[at..at + data.len()].copy_from_slice(data);
}

/// ASCII, padded with spaces.
fn text(b: &mut [u8], at: usize, len: usize, text: &str) {
    let ascii = text
        .bytes()
        .map(|c| if (0x20..0x7f).contains(&c) { c } else { b'?' })
        .chain(std::iter::repeat(b' '));
    b[at..at + len]
        .iter_mut()
        .zip(ascii)
        .for_each(|(to, c)| *to = c);
}

pub(super) fn controller(names: &NvmeNames, namespaces: u32) -> Vec<u8> {
    let mut b = vec![0; BYTES];
    put(&mut b, 0, &VENDOR.to_le_bytes());
    put(&mut b, 2, &VENDOR.to_le_bytes());
    text(&mut b, 4, 20, &names.serial);
    text(&mut b, 24, 40, &names.model);
    text(&mut b, 64, 8, &names.firmware);
    put(&mut b, 73, &[0x00, 0x54, 0x52]); // IEEE OUI, locally administered
    b[77] = MDTS;
    put(&mut b, 80, &0x0001_0400_u32.to_le_bytes());
    b[111] = 1; // I/O controller
    b[258] = 3; // aborts at once, from 0
    b[259] = MAX_ASYNC as u8 - 1;
    b[260] = 0x03; // one firmware slot, read-only
    b[261] = 0x04; // log pages with offset
    put(&mut b, 266, &0x0157_u16.to_le_bytes()); // warning at 70 °C
    put(&mut b, 268, &0x0175_u16.to_le_bytes()); // critical at 100 °C
    b[512] = 0x66; // commands of 64 bytes
    b[513] = 0x44; // completions of 16 bytes
    put(&mut b, 516, &namespaces.to_le_bytes());
    put(&mut b, 520, &0x000c_u16.to_le_bytes()); // Dataset Management, Write Zeroes
    b[525] = 0x07; // volatile write cache; Flush of all namespaces
    let mut name = vec![0; 60];
    text(&mut name, 0, 20, &names.serial);
    text(&mut name, 20, 40, &names.model);
    // The name that §7.9 forms for controllers that do not have one.
    let nqn = format!(
        "nqn.2014.08.org.nvmexpress:{VENDOR:04x}{VENDOR:04x}{}",
        String::from_utf8_lossy(&name)
    );
    put(&mut b, 768, nqn.as_bytes());
    put(&mut b, 2048, &2500_u16.to_le_bytes()); // power state 0: 25 W
    b
}

/// What all namespaces have in common: their formats.
pub(super) fn namespace_common() -> Vec<u8> {
    let mut b = vec![0; BYTES];
    b[130] = 9;
    b
}

pub(super) fn namespace(info: &DiskInfo, names: &NvmeNames, id: u32) -> Vec<u8> {
    let block = info.block_bytes.max(1);
    let blocks = info.size_bytes / u64::from(block);
    let mut b = vec![0; BYTES];
    for at in [0, 8, 16] {
        put(&mut b, at, &blocks.to_le_bytes());
    }
    b[24] = 1 << 4; // preferred granularities are told
    b[33] = 1 << 3; // Write Zeroes may deallocate
    let preferred = (4096_u32.max(block) / block - 1) as u16;
    for at in [64, 66, 68, 70] {
        put(&mut b, at, &preferred.to_le_bytes());
    }
    b[99] = u8::from(info.read_only);
    put(&mut b, 120, &eui64(names, id));
    b[130] = block.trailing_zeros() as u8;
    b
}

/// An identifier that follows from the serial number, in the range of locally administered ones.
fn eui64(names: &NvmeNames, id: u32) -> [u8; 8] {
    // FNV-1a.
    let bytes = names.serial.bytes().chain(id.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let mut e = hash.to_be_bytes();
    e[..3].copy_from_slice(&[0x52, 0x54, 0x00]);
    e
}

/// Namespace Identification Descriptor list: EUI64.
pub(super) fn descriptors(names: &NvmeNames, id: u32) -> Vec<u8> {
    let mut b = vec![0; BYTES];
    b[..2].copy_from_slice(&[1, 8]);
    put(&mut b, 4, &eui64(names, id));
    b
}

pub(super) fn smart_log(c: &Counters) -> Vec<u8> {
    let mut b = vec![0; 512];
    put(&mut b, 1, &300_u16.to_le_bytes()); // 27 °C
    b[3] = 100; // spare
    b[4] = 10;
    // Data units are thousands of 512 bytes.
    for (at, v) in [
        (32, c.blocks_read.div_ceil(1000)),
        (48, c.blocks_written.div_ceil(1000)),
        (64, c.reads),
        (80, c.writes),
        (160, c.media_errors),
    ] {
        put(&mut b, at, &v.to_le_bytes());
    }
    b
}

pub(super) fn firmware_log(names: &NvmeNames) -> Vec<u8> {
    let mut b = vec![0; 512];
    b[0] = 1;
    text(&mut b, 8, 8, &names.firmware);
    b
}
