//! IDENTIFY DEVICE and IDENTIFY PACKET DEVICE data. ACS-3 §7.12 and §7.13.

use std::sync::Arc;

use pyrite_disk::BlockBackend;

use super::disk::{checksum, geometry};
use super::{MAX_MULTIPLE, MAX_TRIM_BLOCKS, Names, QUEUE_DEPTH, Settings};

struct Words([u16; 256]);

impl Words {
    /// Two characters in a word, the first in its upper half, padded with spaces.
    fn text(&mut self, at: usize, words: usize, text: &str) {
        let mut bytes = text
            .bytes()
            .map(|b| if (0x20..0x7f).contains(&b) { b } else { b'?' })
            .chain(std::iter::repeat(b' '));
        for w in &mut self.0[at..at + words] {
            let mut next = || u16::from(bytes.next().unwrap_or(b' '));
            *w = next() << 8 | next();
        }
    }

    fn bytes(mut self) -> Vec<u8> {
        self.0[255] = 0x00a5;
        let mut out: Vec<u8> = self.0.iter().flat_map(|w| w.to_le_bytes()).collect();
        out[511] = checksum(&out);
        out
    }

    /// What both kinds of device say in the same way.
    fn common(&mut self, names: &Names, s: &Settings, serial_link: bool) {
        self.text(10, 10, &names.serial);
        self.text(23, 4, &names.firmware);
        self.text(27, 20, &names.model);
        self.0[49] = 0x0f00; // IORDY, may be disabled; LBA; DMA
        self.0[53] = 7; // words 54-58, 64-70 and 88 mean something
        let selected = |base: u8| {
            if s.dma_mode & 0xf0 == base {
                0x100 << (s.dma_mode & 7)
            } else {
                0
            }
        };
        self.0[63] = 0x07 | selected(0x20);
        self.0[88] = 0x3f | selected(0x40);
        self.0[64] = 3; // PIO 3 and 4
        self.0[65..69].fill(120); // ns of a cycle
        self.0[80] = 0x01f0; // ATA/ATAPI-4 to ATA8-ACS
        if serial_link {
            self.0[76] = 0x0006; // 1.5 and 3 Gb/s
            self.0[222] = 0x1020; // SATA 2.6
        } else {
            self.0[93] = 0x6001; // 80 wires, found by jumper
        }
    }
}

pub(super) fn disk(
    disk: &Arc<dyn BlockBackend>,
    names: &Names,
    s: &Settings,
    serial_link: bool,
) -> Vec<u8> {
    let (blocks, block) = geometry(disk);
    let info = disk.info();
    let mut w = Words([0; 256]);
    w.common(names, s, serial_link);
    let cylinders = (blocks / (16 * 63)).clamp(1, 16383) as u16;
    w.0[0] = 0x0040;
    (w.0[1], w.0[3], w.0[6]) = (cylinders, 16, 63);
    w.0[47] = 0x8000 | u16::from(MAX_MULTIPLE);
    w.0[50] = 0x4000;
    let track = u64::from(s.heads) * u64::from(s.sectors);
    let now = (blocks / track.max(1)).min(65535);
    (w.0[54], w.0[55], w.0[56]) = (now as u16, s.heads.into(), s.sectors.into());
    let capacity = (now * track) as u32;
    (w.0[57], w.0[58]) = (capacity as u16, (capacity >> 16) as u16);
    if s.multiple > 0 {
        w.0[59] = 0x0100 | u16::from(s.multiple);
    }
    let short = blocks.min(0x0fff_ffff) as u32;
    (w.0[60], w.0[61]) = (short as u16, (short >> 16) as u16);
    if serial_link {
        w.0[75] = u16::from(QUEUE_DEPTH) - 1;
        w.0[76] |= 1 << 8; // native command queuing
    }
    // Power management, write cache, look-ahead, NOP.
    w.0[82] = 0x4068;
    // 48-bit addresses, FLUSH CACHE (EXT).
    w.0[83] = 0x7400;
    // General purpose logs, WRITE DMA FUA EXT.
    w.0[84] = 0x4060;
    w.0[85] = 0x4008 | u16::from(s.write_cache) << 5 | u16::from(s.look_ahead) << 6;
    w.0[86] = 0x3400;
    w.0[87] = 0x4060;
    for (n, word) in w.0[100..104].iter_mut().enumerate() {
        *word = (blocks >> (16 * n)) as u16;
    }
    let physical = 4096_u32.max(block) / block;
    w.0[106] = 0x4000 | if physical > 1 { 0x2000 } else { 0 } | physical.trailing_zeros() as u16;
    if block > 512 {
        w.0[106] |= 0x1000;
        (w.0[117], w.0[118]) = ((block / 2) as u16, (block >> 17) as u16);
    }
    (w.0[119], w.0[120]) = (0x4000, 0x4000);
    if info.discard && !info.read_only {
        w.0[105] = MAX_TRIM_BLOCKS;
        w.0[169] = 1;
    }
    w.0[217] = 1; // does not rotate
    w.bytes()
}

pub(super) fn packet(names: &Names, s: &Settings, serial_link: bool) -> Vec<u8> {
    let mut w = Words([0; 256]);
    w.common(names, s, serial_link);
    // Packet device, CD-ROM, removable medium, DRQ within 50 µs, packets of 12 bytes.
    w.0[0] = 0x85c0;
    (w.0[71], w.0[72]) = (30, 30);
    // NOP, DEVICE RESET, PACKET.
    (w.0[82], w.0[83], w.0[84]) = (0x4210, 0x4000, 0x4000);
    (w.0[85], w.0[86], w.0[87]) = (0x4210, 0, 0x4000);
    w.bytes()
}
