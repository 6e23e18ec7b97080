//! Pixel formats: RFC 6143 §7.4.

/// How a client wants pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PixelFormat {
    bytes: u8,
    depth: u8,
    big_endian: bool,
    /// Colours are components; else entries of a colour map, which is then sent.
    true_color: bool,
    max: [u16; 3],
    shift: [u8; 3],
}

impl PixelFormat {
    /// As pixels are in a surface.
    pub(super) const NATIVE: PixelFormat = PixelFormat {
        bytes: 4,
        depth: 24,
        big_endian: false,
        true_color: true,
        max: [255; 3],
        shift: [16, 8, 0],
    };

    /// The colours of the map that a client without true colour gets: 3, 3 and 2 bits.
    const MAPPED: PixelFormat = PixelFormat {
        bytes: 1,
        depth: 8,
        big_endian: false,
        true_color: false,
        max: [7, 7, 3],
        shift: [5, 2, 0],
    };

    pub(super) fn parse(b: &[u8]) -> Result<PixelFormat, String> {
        let at = |n: usize| b.get(n).copied().unwrap_or(0);
        let max = |n: usize| u16::from_be_bytes([at(n), at(n + 1)]);
        let bits = at(0);
        if !matches!(bits, 8 | 16 | 32) {
            return Err(format!("pixels of {bits} bits"));
        }
        if at(3) == 0 {
            return match bits {
                8 => Ok(PixelFormat::MAPPED),
                _ => Err("a colour map with more than 8 bits".into()),
            };
        }
        let f = PixelFormat {
            bytes: bits / 8,
            depth: at(1),
            big_endian: at(2) != 0,
            true_color: true,
            max: [max(4), max(6), max(8)],
            shift: [at(10), at(11), at(12)],
        };
        let fits = |(max, shift): (&u16, &u8)| {
            (u32::from(*max) + 1).is_power_of_two()
                && *shift < bits
                && u64::from(*max) << shift < 1u64 << bits
        };
        if f.max.iter().zip(&f.shift).all(fits) {
            Ok(f)
        } else {
            Err("components that do not fit into a pixel".into())
        }
    }

    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[0] = self.bytes * 8;
        b[1] = self.depth;
        b[2] = self.big_endian.into();
        b[3] = self.true_color.into();
        for (n, m) in self.max.iter().enumerate() {
            b[4 + 2 * n..6 + 2 * n].copy_from_slice(&m.to_be_bytes());
        }
        b[10..13].copy_from_slice(&self.shift);
        b
    }

    /// SetColourMapEntries, for a client that needs it. §7.6.2.
    pub(super) fn color_map(self) -> Option<Vec<u8>> {
        if self.true_color {
            return None;
        }
        let mut out = vec![1, 0, 0, 0, 1, 0];
        for entry in 0..256u32 {
            for (max, shift) in self.max.iter().zip(self.shift) {
                let max = u32::from(*max);
                let v = (entry >> shift & max) * 0xffff / max;
                out.extend((v as u16).to_be_bytes());
            }
        }
        Some(out)
    }

    fn value(self, rgb: u32) -> u32 {
        if self == PixelFormat::NATIVE {
            return rgb;
        }
        let component = |n: usize| {
            let c = rgb >> (16 - 8 * n) & 0xff;
            let max = u32::from(self.max[n]);
            // Rounded to the nearest.
            ((c * max + 127) / 255) << self.shift[n]
        };
        component(0) | component(1) | component(2)
    }

    /// Appends a pixel.
    pub(super) fn put(self, rgb: u32, out: &mut Vec<u8>) {
        let v = self.value(rgb);
        match (self.bytes, self.big_endian) {
            (1, _) => out.push(v as u8),
            (2, false) => out.extend((v as u16).to_le_bytes()),
            (2, true) => out.extend((v as u16).to_be_bytes()),
            (_, false) => out.extend(v.to_le_bytes()),
            (_, true) => out.extend(v.to_be_bytes()),
        }
    }

    /// Which three bytes of four carry the colour: CPIXEL of ZRLE, §7.7.5. `true` = the last three.
    fn compact(self) -> Option<bool> {
        if self.bytes != 4 || !self.true_color || self.depth > 24 {
            return None;
        }
        let all = (self.max.iter().zip(self.shift)).fold(0, |all, (m, s)| all | u32::from(*m) << s);
        match all {
            a if a & 0xff00_0000 == 0 => Some(self.big_endian),
            a if a & 0x0000_00ff == 0 => Some(!self.big_endian),
            _ => None,
        }
    }

    /// Appends a pixel as ZRLE has it.
    pub(super) fn put_compact(self, rgb: u32, out: &mut Vec<u8>) {
        let at = out.len();
        self.put(rgb, out);
        match self.compact() {
            Some(true) => {
                out.remove(at);
            }
            Some(false) => {
                out.pop();
            }
            None => {}
        }
    }

    /// Bytes that [`PixelFormat::put_compact`] appends.
    pub(super) fn compact_bytes(self) -> usize {
        match self.compact() {
            Some(_) => 3,
            None => self.bytes.into(),
        }
    }
}
