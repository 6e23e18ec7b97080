//! What the screen shows: registers and memory as pixels.
//!
//! Nothing blinks: the text cursor is always drawn, and blinking characters stand still, so that a
//! picture changes only when the guest changes it.

use pyrite_mem::DeviceMemory;

use super::dispi::Dispi;
use super::regs::{Registers, attr, crtc, gfx, seq};
use crate::display::Surface;

/// A copy of what decides what is shown.
pub struct VgaPicture {
    pub(super) regs: Registers,
    pub(super) dispi: Dispi,
    pub(super) memory: DeviceMemory,
}

/// Size of the picture while the screen is off.
const BLANK_SIZE: (u32, u32) = (640, 400);

/// Dots of a character generator's row that is `width` wide, leftmost first.
fn bits(byte: u8) -> impl Iterator<Item = bool> {
    (0..8).map(move |n| byte << n & 0x80 != 0)
}

impl VgaPicture {
    /// Draws the picture; the surface takes its size.
    pub fn draw(&self, surface: &mut Surface) {
        let r = &self.regs;
        let linear = self.dispi.is_on() && self.dispi.bpp != 4;
        let off = !linear && r.sequencer[seq::CLOCKING_MODE] & seq::SCREEN_OFF != 0;
        if off || r.attribute_index & attr::PALETTE_ADDRESS_SOURCE == 0 {
            let (width, height) = match linear {
                true => (self.dispi.xres.into(), self.dispi.yres.into()),
                false => BLANK_SIZE,
            };
            surface.resize(width, height);
        } else if linear {
            self.draw_linear(surface);
        } else if r.graphics[gfx::MISCELLANEOUS] & gfx::GRAPHICS == 0 {
            self.draw_text(surface);
        } else {
            self.draw_graphics(surface);
        }
    }

    /// All 256 entries of the palette.
    fn palette(&self) -> [u32; 256] {
        let wide = self.dispi.is_on() && self.dispi.has_8bit_dac();
        let entries = self.regs.palette.as_chunks::<3>().0;
        std::array::from_fn(|n| {
            let entry = entries.get(n & usize::from(self.regs.pel_mask));
            entry.copied().unwrap_or_default().iter().fold(0, |rgb, c| {
                let c = if wide { *c } else { c << 2 | (c & 0x3f) >> 4 };
                rgb << 8 | u32::from(c)
            })
        })
    }

    /// The 16 colours of the attribute controller.
    fn colors(&self) -> [u32; 16] {
        let a = &self.regs.attribute;
        let palette = self.palette();
        let select = a[attr::COLOR_SELECT];
        std::array::from_fn(|n| {
            let entry = if a[attr::MODE_CONTROL] & attr::P54_SELECT != 0 {
                (select & 0xf) << 4 | a[n] & 0xf
            } else {
                (select & 0xc) << 4 | a[n] & 0x3f
            };
            palette[usize::from(entry)]
        })
    }

    fn draw_linear(&self, surface: &mut Surface) {
        let d = &self.dispi;
        surface.resize(d.xres.into(), d.yres.into());
        let width = usize::from(d.xres);
        let bytes = match d.bpp {
            8 => 1,
            15 | 16 => 2,
            24 => 3,
            _ => 4,
        };
        let palette = self.palette();
        let mut line = vec![0; width * bytes];
        for y in 0..surface.height() {
            let at = (u64::from(d.y_offset) + u64::from(y)) * u64::from(d.pitch())
                + u64::from(d.x_offset) * bytes as u64;
            self.memory.read(at, &mut line);
            let to = surface.line_mut(y).iter_mut();
            match d.bpp {
                8 => to
                    .zip(&line)
                    .for_each(|(p, b)| *p = palette[usize::from(*b)]),
                15 => to.zip(line.as_chunks::<2>().0).for_each(|(p, b)| {
                    let v = u32::from(u16::from_le_bytes(*b));
                    *p = wide5(v >> 10) << 16 | wide5(v >> 5) << 8 | wide5(v);
                }),
                16 => to.zip(line.as_chunks::<2>().0).for_each(|(p, b)| {
                    let v = u32::from(u16::from_le_bytes(*b));
                    let green = v >> 5 & 0x3f;
                    *p = wide5(v >> 11) << 16 | (green << 2 | green >> 4) << 8 | wide5(v);
                }),
                24 => to.zip(line.as_chunks::<3>().0).for_each(|(p, b)| {
                    *p = u32::from_le_bytes([b[0], b[1], b[2], 0]);
                }),
                _ => to.zip(line.as_chunks::<4>().0).for_each(|(p, b)| {
                    *p = u32::from_le_bytes(*b) & 0xff_ffff;
                }),
            }
        }
    }

    fn draw_text(&self, surface: &mut Surface) {
        let r = &self.regs;
        let clocking = r.sequencer[seq::CLOCKING_MODE];
        let dots: u32 = match clocking {
            c if c & seq::HALF_DOT_CLOCK != 0 => 16,
            c if c & seq::DOTS_8 == 0 => 9,
            _ => 8,
        };
        let cell_lines = u32::from(r.crtc[crtc::MAXIMUM_SCAN_LINE] & 0x1f) + 1;
        let (columns, rows) = (r.columns(), (r.lines() / cell_lines).max(1));
        surface.resize(columns * dots, rows * cell_lines);
        let colors = self.colors();
        let fonts = self.fonts();
        let start = u64::from(r.start_address());
        let cursor = self.cursor();
        let mut cells = vec![0; columns as usize * 4];
        for row in 0..rows {
            let at = start * 4 + u64::from(row) * u64::from(r.pitch());
            self.memory.read(at, &mut cells);
            for (column, cell) in (0..).zip(cells.as_chunks::<4>().0) {
                let [code, attribute, ..] = *cell;
                let cell = Cell {
                    code,
                    glyph: glyph(&fonts[usize::from(attribute >> 3 & 1)], code),
                    foreground: colors[usize::from(attribute & 0xf)],
                    background: colors[self.background(attribute)],
                    cursor: cursor
                        .filter(|(place, ..)| *place == (at / 4 + column) & 0xffff)
                        .map(|(_, first, last)| (first, last)),
                };
                let (x, y) = (column as u32 * dots, row * cell_lines);
                self.draw_cell(surface, &cell, (x, y), (dots, cell_lines));
            }
        }
    }

    /// Entry of the background colour. While bit 7 means blinking it is no colour.
    fn background(&self, attribute: u8) -> usize {
        let blinks = self.regs.attribute[attr::MODE_CONTROL] & attr::BLINK != 0;
        usize::from(attribute >> 4 & if blinks { 7 } else { 15 })
    }

    /// Address, first and last line of the text cursor.
    fn cursor(&self) -> Option<(u64, u32, u32)> {
        let c = &self.regs.crtc;
        let first = c[crtc::CURSOR_START];
        let last = u32::from(c[crtc::CURSOR_END] & 0x1f);
        let place =
            u64::from(c[crtc::CURSOR_LOCATION_HIGH]) << 8 | u64::from(c[crtc::CURSOR_LOCATION_LOW]);
        (first & crtc::CURSOR_OFF == 0).then_some((place, u32::from(first & 0x1f), last))
    }

    /// The character sets for attribute bit 3 clear and set.
    fn fonts(&self) -> [Vec<u8>; 2] {
        let select = self.regs.sequencer[seq::CHARACTER_MAP_SELECT];
        let maps = [
            select >> 4 & 1 | select << 1 & 6,
            select >> 5 & 1 | select >> 1 & 6,
        ];
        maps.map(|map| {
            let mut planes = vec![0; 8192 * 4];
            self.memory.read(u64::from(map) * 8192 * 4, &mut planes);
            planes.iter().skip(2).step_by(4).copied().collect()
        })
    }

    fn draw_cell(&self, s: &mut Surface, cell: &Cell<'_>, at: (u32, u32), size: (u32, u32)) {
        let repeats_eighth = self.regs.attribute[attr::MODE_CONTROL] & attr::LINE_GRAPHICS != 0
            && (0xc0..=0xdf).contains(&cell.code);
        for line in 0..size.1 {
            let byte = cell.glyph.get(line as usize).copied().unwrap_or(0);
            let in_cursor = cell
                .cursor
                .is_some_and(|(first, last)| (first..=last).contains(&line));
            let byte = if in_cursor { 0xff } else { byte };
            let to = s.line_mut(at.1 + line);
            let to = to.get_mut(at.0 as usize..(at.0 + size.0) as usize);
            let to = to.unwrap_or_default();
            let color = |on| if on { cell.foreground } else { cell.background };
            if size.0 == 16 {
                for (pair, on) in to.as_chunks_mut::<2>().0.iter_mut().zip(bits(byte)) {
                    pair.fill(color(on));
                }
            } else {
                for (dot, on) in to.iter_mut().zip(bits(byte)) {
                    *dot = color(on);
                }
                if let Some(ninth) = to.get_mut(8) {
                    *ninth = color(in_cursor || repeats_eighth && byte & 1 != 0);
                }
            }
        }
    }

    fn draw_graphics(&self, surface: &mut Surface) {
        let r = &self.regs;
        let on = self.dispi.is_on();
        let shift = r.graphics[gfx::MODE] >> 5 & 3;
        let (width, lines, pitch) = if on {
            let d = &self.dispi;
            (u32::from(d.xres), u32::from(d.yres), d.pitch())
        } else {
            (r.columns() * 8, r.lines(), r.pitch())
        };
        // Two dots per pixel: 256 colours always, others with the halved dot clock.
        let halved = r.sequencer[seq::CLOCKING_MODE] & seq::HALF_DOT_CLOCK != 0;
        let doubled = !on && shift < 2 && halved;
        surface.resize(if doubled { width * 2 } else { width }, lines);
        let scan = r.crtc[crtc::MAXIMUM_SCAN_LINE];
        let repeat = match (on, shift) {
            (true, _) => 0,
            // The row address lines that CGA modes use are no repetitions.
            (_, 1) => u32::from(scan >> 7),
            _ => ((u32::from(scan & 0x1f) + 1) << (scan >> 7)) - 1,
        };
        let mode = if on { 3 } else { r.crtc[crtc::MODE_CONTROL] };
        let first = if on {
            u64::from(self.dispi.y_offset) * u64::from(pitch)
                + u64::from(self.dispi.x_offset) / 8 * 4
        } else {
            u64::from(r.start_address()) * 4
        };
        let line_compare = if on { u32::MAX } else { r.line_compare() };
        let colors = self.colors();
        let palette = self.palette();
        let (mut base, mut row, mut left) = (first, 0u64, repeat);
        for y in 0..lines {
            let mut at = base;
            if mode & 1 == 0 {
                // Row address bit 0 in place of address bit 13 or 14 (times four).
                let bit = 14 + (mode >> 6 & 1);
                at = at & !(1 << bit) | (row & 1) << bit;
            }
            if mode & 2 == 0 {
                at = at & !0x8000 | (row & 2) << 14;
            }
            let dots = surface.line_mut(y);
            match shift {
                0 => self.line_planar(at, dots, doubled, &colors),
                1 => self.line_pairs(at, dots, doubled, &colors),
                _ => self.line_bytes(at, dots, &palette),
            }
            if left > 0 {
                left -= 1;
            } else {
                let mask = u64::from(mode & 3 ^ 3);
                if row & mask == mask {
                    base += u64::from(pitch);
                }
                row += 1;
                left = repeat;
            }
            if y == line_compare {
                base = 0;
            }
        }
    }

    fn read_line(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut line = vec![0; bytes];
        self.memory.read(at, &mut line);
        line
    }

    /// 16 colours, one bit in each plane.
    fn line_planar(&self, at: u64, dots: &mut [u32], doubled: bool, colors: &[u32; 16]) {
        let enabled = self.regs.attribute[attr::COLOR_PLANE_ENABLE] & 0xf;
        let pixels = if doubled { dots.len() / 2 } else { dots.len() };
        let panning = if self.dispi.is_on() {
            0
        } else {
            usize::from(self.regs.attribute[attr::HORIZONTAL_PANNING] & 7)
        };
        let line = self.read_line(at, (pixels / 8 + 2) * 4);
        let pixel = |x: usize| {
            let x = x + panning;
            let planes = line.get(x / 8 * 4..x / 8 * 4 + 4).unwrap_or_default();
            let index = (0..)
                .zip(planes)
                .fold(0, |index, (p, byte)| index | (byte >> (7 - x % 8) & 1) << p);
            colors[usize::from(index & enabled)]
        };
        for (x, dot) in dots.iter_mut().enumerate() {
            *dot = pixel(if doubled { x / 2 } else { x });
        }
    }

    /// Four colours, two bits of one plane; the pairs of the even plane come first.
    fn line_pairs(&self, at: u64, dots: &mut [u32], doubled: bool, colors: &[u32; 16]) {
        let enabled = self.regs.attribute[attr::COLOR_PLANE_ENABLE] & 0xf;
        let pixels = if doubled { dots.len() / 2 } else { dots.len() };
        let line = self.read_line(at, (pixels / 8 + 1) * 4);
        for (x, dot) in dots.iter_mut().enumerate() {
            let x = if doubled { x / 2 } else { x };
            // Planes 0 and 1 give the low bits of the first and second four pixels.
            let plane = x % 8 / 4;
            let low = line.get(x / 8 * 4 + plane).copied().unwrap_or(0);
            let high = line.get(x / 8 * 4 + plane + 2).copied().unwrap_or(0);
            let by = 6 - 2 * (x % 4);
            let index = low >> by & 3 | (high >> by & 3) << 2;
            *dot = colors[usize::from(index & enabled)];
        }
    }

    /// 256 colours, two dots for each.
    fn line_bytes(&self, at: u64, dots: &mut [u32], palette: &[u32; 256]) {
        let line = self.read_line(at, dots.len().div_ceil(2));
        for (pair, byte) in dots.chunks_mut(2).zip(line) {
            pair.fill(palette[usize::from(byte)]);
        }
    }
}

/// One character on the screen.
struct Cell<'a> {
    code: u8,
    glyph: &'a [u8],
    foreground: u32,
    background: u32,
    /// First and last line of the cursor, if it is here.
    cursor: Option<(u32, u32)>,
}

fn wide5(v: u32) -> u32 {
    let v = v & 0x1f;
    v << 3 | v >> 2
}

fn glyph(font: &[u8], code: u8) -> &[u8] {
    let at = usize::from(code) * 32;
    font.get(at..at + 32).unwrap_or_default()
}
