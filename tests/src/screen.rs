//! What is on a guest's screen, as text.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Scratch, pyrite};

/// A decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    /// Pixels of a line.
    pub width: usize,
    /// `0x00RRGGBB`, line by line.
    pub pixels: Vec<u32>,
}

impl Pixels {
    /// Lines.
    pub fn height(&self) -> usize {
        self.pixels.len() / self.width.max(1)
    }

    /// A binary PPM file.
    pub fn from_ppm(file: &[u8]) -> Option<Pixels> {
        let mut words = file.splitn(4, |b| b.is_ascii_whitespace());
        let (magic, width, height) = (words.next()?, words.next()?, words.next()?);
        let body = words.next()?.splitn(2, |b| *b == b'\n').nth(1)?;
        let number = |w: &[u8]| std::str::from_utf8(w).ok()?.parse::<usize>().ok();
        let (width, height) = (number(width)?, number(height)?);
        let pixels: Vec<u32> = body
            .as_chunks::<3>()
            .0
            .iter()
            .map(|p| u32::from_be_bytes([0, p[0], p[1], p[2]]))
            .collect();
        (magic == b"P6" && pixels.len() == width * height).then_some(Pixels { width, pixels })
    }

    /// An own PNG file: see the writer for what it can hold.
    pub fn from_png(file: &[u8]) -> Option<Pixels> {
        let word = |at: usize| Some(u32::from_be_bytes(file.get(at..at + 4)?.try_into().ok()?));
        let (mut at, mut data) = (8, Vec::new());
        while let Some(len) = word(at) {
            let body = file.get(at + 8..at + 8 + len as usize)?;
            if file.get(at + 4..at + 8)? == b"IDAT" {
                data.extend_from_slice(body);
            }
            at += 12 + len as usize;
        }
        let (width, height) = (word(16)? as usize, word(20)? as usize);
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::ZlibDecoder::new(&data[..]), &mut bytes)
            .ok()?;
        let mut pixels = Vec::new();
        let mut above = vec![0; width * 3];
        for line in bytes.chunks(width * 3 + 1) {
            let (filter, rest) = line.split_first()?;
            let mut line = rest.to_vec();
            for n in 0..line.len() {
                let before = match (filter, n) {
                    (1, 3..) => line[n - 3],
                    (2, _) => above[n],
                    _ => 0,
                };
                line[n] = line[n].wrapping_add(before);
            }
            let rgb = line.as_chunks::<3>().0.iter();
            pixels.extend(rgb.map(|p| u32::from_be_bytes([0, p[0], p[1], p[2]])));
            above = line;
        }
        (pixels.len() == width * height).then_some(Pixels { width, pixels })
    }
}

/// The video BIOS of the host.
pub fn video_bios() -> Option<Vec<u8>> {
    std::fs::read("/usr/share/seabios/vgabios-stdvga.bin").ok()
}

/// Reads text modes: the characters of a video BIOS.
pub struct Reader {
    glyphs: HashMap<Vec<u8>, char>,
}

impl Reader {
    /// For the characters of `rom`.
    pub fn new(rom: &[u8]) -> Reader {
        let font = pyrite_devices::display::vga::find_font(rom).expect("characters");
        let ascii = 0x20..0x7f_u8;
        let glyphs = ascii.map(|c| {
            let at = usize::from(c) * 16;
            (font[at..at + 16].to_vec(), char::from(c))
        });
        Reader {
            glyphs: glyphs.collect(),
        }
    }

    /// The text on a screen of 9 × 16 dots per character; `?` where there is something else. The
    /// cursor's lines count as empty.
    pub fn read(&self, p: &Pixels) -> String {
        let mut text = String::new();
        for row in 0..p.height() / 16 {
            let mut line = String::new();
            for column in 0..p.width / 9 {
                let cell = |x: usize, y: usize| p.pixels[(row * 16 + y) * p.width + column * 9 + x];
                // The ninth dot of a letter is background.
                let background = cell(8, 0);
                let glyph: Vec<u8> = (0..16)
                    .map(|y| {
                        (0..8).fold(0, |byte, x| byte << 1 | u8::from(cell(x, y) != background))
                    })
                    .collect();
                line.push(match self.glyphs.get(&glyph) {
                    Some(c) => *c,
                    None if glyph[..12].iter().all(|b| *b == 0) => ' ',
                    None => '?',
                });
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// What the screen of a running VM shows.
pub fn screenshot(socket: &Path, dir: &Scratch) -> Pixels {
    let file = dir.0.join("screen.png");
    let done = Command::new(pyrite())
        .arg("screenshot")
        .args([socket, &file])
        .output()
        .expect("pyrite runs");
    assert!(done.status.success(), "{done:?}");
    let bytes = std::fs::read(&file).expect("picture");
    Pixels::from_png(&bytes).expect("a PNG file")
}

/// Waits until the screen has a line that `wanted` accepts; the text of the screen.
pub fn wait_for_text(
    socket: &Path,
    dir: &Scratch,
    reader: &Reader,
    limit: Duration,
    wanted: impl Fn(&str) -> bool,
) -> String {
    let until = Instant::now() + limit;
    loop {
        let text = reader.read(&screenshot(socket, dir));
        if text.lines().any(&wanted) {
            return text;
        }
        assert!(Instant::now() < until, "not on the screen:\n{text}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
