//! The ZRLE encoding: RFC 6143 §7.7.6.

use std::io;

use flate2::{Compress, Compression, FlushCompress};

use super::pixels::PixelFormat;

/// Edge of a tile.
const TILE: usize = 64;
/// LIMIT of the encoding: colours of a packed palette, and of a palette with runs.
const PACKED: usize = 16;
const PALETTE: usize = 127;

const SOLID: u8 = 1;
const PLAIN_RUNS: u8 = 128;

/// The encoder of one client: one stream of compressed data as long as it is there.
pub(super) struct Zrle {
    stream: Compress,
    plain: Vec<u8>,
}

impl Zrle {
    pub(super) fn new() -> Zrle {
        Zrle {
            // Level 2: text and desktops shrink nearly as well as at 6, at a third of the time.
            stream: Compress::new(Compression::new(2), true),
            plain: Vec::new(),
        }
    }

    /// Appends a rectangle of `width` pixels a line.
    pub(super) fn encode(
        &mut self,
        pixels: &[u32],
        width: usize,
        format: PixelFormat,
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        self.plain.clear();
        let mut tile = Vec::with_capacity(TILE * TILE);
        for band in pixels.chunks(width.max(1) * TILE) {
            for x in (0..width).step_by(TILE) {
                let columns = TILE.min(width - x);
                tile.clear();
                for line in band.chunks(width) {
                    tile.extend_from_slice(line.get(x..x + columns).unwrap_or_default());
                }
                encode_tile(&tile, columns, format, &mut self.plain);
            }
        }
        let length_at = out.len();
        out.extend([0; 4]);
        self.compress(out)?;
        let length = (out.len() - length_at - 4) as u32;
        out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }

    fn compress(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        let mut input = &self.plain[..];
        loop {
            out.reserve(input.len() / 4 + 1024);
            let (before_in, before_out) = (self.stream.total_in(), out.len());
            self.stream
                .compress_vec(input, out, FlushCompress::Sync)
                .map_err(io::Error::other)?;
            let taken = (self.stream.total_in() - before_in) as usize;
            input = input.get(taken..).unwrap_or_default();
            // A flush is complete when it leaves room in the buffer.
            if input.is_empty() && (out.len() < out.capacity() || out.len() == before_out) {
                return Ok(());
            }
        }
    }
}

/// Lengths of runs are sums of bytes, the last of which is not 255.
fn put_length(length: usize, out: &mut Vec<u8>) {
    let rest = length - 1;
    out.extend(std::iter::repeat_n(255, rest / 255));
    out.push((rest % 255) as u8);
}

fn encode_tile(tile: &[u32], width: usize, format: PixelFormat, out: &mut Vec<u8>) {
    let mut runs: Vec<(u32, usize)> = Vec::new();
    let mut palette: Vec<u32> = Vec::new();
    for p in tile {
        match runs.last_mut() {
            Some((color, n)) if color == p => *n += 1,
            _ => {
                runs.push((*p, 1));
                if palette.len() <= PALETTE && !palette.contains(p) {
                    palette.push(*p);
                }
            }
        }
    }
    let pixel = format.compact_bytes();
    let height = tile.len() / width.max(1);
    let length_bytes = |n: usize| (n - 1) / 255 + 1;
    let with_runs: usize = runs.iter().map(|(_, n)| pixel + length_bytes(*n)).sum();
    let index_runs: usize = runs
        .iter()
        .map(|(_, n)| if *n == 1 { 1 } else { 1 + length_bytes(*n) })
        .sum();
    let bits = match palette.len() {
        0..=2 => 1,
        3..=4 => 2,
        _ => 4,
    };
    let never = usize::MAX;
    let sizes = [
        tile.len() * pixel,
        with_runs,
        match palette.len() {
            2..=PACKED => palette.len() * pixel + (width * bits).div_ceil(8) * height,
            _ => never,
        },
        match palette.len() {
            2..=PALETTE => palette.len() * pixel + index_runs,
            _ => never,
        },
    ];
    let best = (0..4).min_by_key(|n| sizes[*n]).unwrap_or(0);
    let index = |p: &u32| palette.iter().position(|c| c == p).unwrap_or(0) as u8;
    match best {
        _ if palette.len() == 1 => {
            out.push(SOLID);
            format.put_compact(palette[0], out);
        }
        1 => {
            out.push(PLAIN_RUNS);
            for (color, n) in runs {
                format.put_compact(color, out);
                put_length(n, out);
            }
        }
        2 => {
            out.push(palette.len() as u8);
            palette.iter().for_each(|c| format.put_compact(*c, out));
            for line in tile.chunks(width) {
                for part in line.chunks(8 / bits) {
                    let byte = part
                        .iter()
                        .enumerate()
                        .fold(0, |byte, (n, p)| byte | index(p) << (8 - bits * (n + 1)));
                    out.push(byte);
                }
            }
        }
        3 => {
            out.push(PLAIN_RUNS + palette.len() as u8);
            palette.iter().for_each(|c| format.put_compact(*c, out));
            for (color, n) in &runs {
                if *n == 1 {
                    out.push(index(color));
                } else {
                    out.push(index(color) | 0x80);
                    put_length(*n, out);
                }
            }
        }
        _ => {
            out.push(0);
            tile.iter().for_each(|p| format.put_compact(*p, out));
        }
    }
}
