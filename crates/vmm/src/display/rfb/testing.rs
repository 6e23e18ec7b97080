//! A small viewer, for tests: it decodes what the server sends.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use flate2::{Decompress, FlushDecompress};

use super::handshake::response;
use super::wire::violation;

/// Raw pixels.
pub const RAW: i32 = 0;
/// ZRLE.
pub const ZRLE: i32 = 16;
/// DesktopSize.
pub const DESKTOP_SIZE: i32 = -223;
/// ExtendedDesktopSize.
pub const EXTENDED_DESKTOP_SIZE: i32 = -308;
/// QEMU extended key event.
pub const EXTENDED_KEY: i32 = -258;

/// How long the server may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a server and the picture that it sent.
pub struct Viewer<S> {
    stream: S,
    inflate: Decompress,
    /// Width and height.
    pub size: (usize, usize),
    /// `0x00RRGGBB`, line by line.
    pub pixels: Vec<u32>,
    /// The title.
    pub name: String,
    /// Encodings of rectangles as they came.
    pub encodings: Vec<i32>,
    /// Bytes of rectangles so far.
    pub bytes: usize,
}

impl Viewer<UnixStream> {
    /// Connects to a Unix socket.
    pub fn connect(path: &Path, password: Option<&str>) -> io::Result<Viewer<UnixStream>> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Viewer::open(stream, password)
    }
}

impl<S: Read + Write> Viewer<S> {
    /// Opens the protocol.
    pub fn open(stream: S, password: Option<&str>) -> io::Result<Viewer<S>> {
        let mut v = Viewer {
            stream,
            inflate: Decompress::new(true),
            size: (0, 0),
            pixels: Vec::new(),
            name: String::new(),
            encodings: Vec::new(),
            bytes: 0,
        };
        let version: [u8; 12] = v.read()?;
        v.stream.write_all(&version)?;
        let [count] = v.read()?;
        let kinds = v.read_vec(count.into())?;
        let kind = if password.is_some() { 2 } else { 1 };
        if !kinds.contains(&kind) {
            return Err(violation(format!("security types {kinds:?}")));
        }
        v.stream.write_all(&[kind])?;
        if let Some(password) = password {
            let challenge: [u8; 16] = v.read()?;
            let mut key = [0; 8];
            key.iter_mut()
                .zip(password.bytes())
                .for_each(|(k, b)| *k = b);
            v.stream.write_all(&response(&key, &challenge))?;
        }
        if u32::from_be_bytes(v.read()?) != 0 {
            let length = u32::from_be_bytes(v.read()?);
            let why = v.read_vec(length as usize)?;
            let why = String::from_utf8_lossy(&why).into_owned();
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        v.stream.write_all(&[1])?;
        let init: [u8; 24] = v.read()?;
        let half = |at: usize| usize::from(u16::from_be_bytes([init[at], init[at + 1]]));
        v.resize(half(0), half(2));
        let length = u32::from_be_bytes([init[20], init[21], init[22], init[23]]);
        let name = v.read_vec(length as usize)?;
        v.name = String::from_utf8_lossy(&name).into_owned();
        Ok(v)
    }

    fn resize(&mut self, width: usize, height: usize) {
        self.size = (width, height);
        self.pixels = vec![0; width * height];
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut b = [0; N];
        self.stream.read_exact(&mut b)?;
        Ok(b)
    }

    fn read_vec(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut b = vec![0; len];
        self.stream.read_exact(&mut b)?;
        Ok(b)
    }

    /// The connection, without the viewer.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// SetEncodings.
    pub fn set_encodings(&mut self, encodings: &[i32]) -> io::Result<()> {
        let mut out = vec![2, 0];
        out.extend((encodings.len() as u16).to_be_bytes());
        encodings.iter().for_each(|e| out.extend(e.to_be_bytes()));
        self.send(&out)
    }

    /// FramebufferUpdateRequest for the whole screen.
    pub fn request(&mut self, incremental: bool) -> io::Result<()> {
        let mut out = vec![3, incremental.into(), 0, 0, 0, 0];
        out.extend((self.size.0 as u16).to_be_bytes());
        out.extend((self.size.1 as u16).to_be_bytes());
        self.send(&out)
    }

    /// KeyEvent.
    pub fn key(&mut self, keysym: u32, is_down: bool) -> io::Result<()> {
        let mut out = vec![4, is_down.into(), 0, 0];
        out.extend(keysym.to_be_bytes());
        self.send(&out)
    }

    /// Presses and lets go the keys of a text of lower-case letters and others without shift.
    pub fn type_text(&mut self, text: &str) -> io::Result<()> {
        for c in text.chars() {
            let keysym = if c == '\n' { 0xff0d } else { u32::from(c) };
            self.key(keysym, true)?;
            self.key(keysym, false)?;
        }
        Ok(())
    }

    /// Receives one FramebufferUpdate and draws it.
    pub fn update(&mut self) -> io::Result<()> {
        let [kind, _, high, low] = self.read()?;
        if kind != 0 {
            return Err(violation(format!("message {kind}")));
        }
        for _ in 0..u16::from_be_bytes([high, low]) {
            let head: [u8; 12] = self.read()?;
            let half = |n: usize| usize::from(u16::from_be_bytes([head[2 * n], head[2 * n + 1]]));
            let encoding = i32::from_be_bytes([head[8], head[9], head[10], head[11]]);
            self.encodings.push(encoding);
            let area = [half(0), half(1), half(2), half(3)];
            match encoding {
                RAW => {
                    let data = self.read_vec(area[2] * area[3] * 4)?;
                    self.bytes += data.len();
                    let pixels = data
                        .as_chunks::<4>()
                        .0
                        .iter()
                        .map(|b| u32::from_le_bytes(*b));
                    self.draw(area, &pixels.collect::<Vec<_>>())?;
                }
                ZRLE => {
                    let length = u32::from_be_bytes(self.read()?);
                    let data = self.read_vec(length as usize)?;
                    self.bytes += data.len();
                    let plain = self.inflate(&data)?;
                    self.draw_zrle(area, &mut &plain[..])?;
                }
                DESKTOP_SIZE => self.resize(area[2], area[3]),
                EXTENDED_DESKTOP_SIZE => {
                    let [screens, ..] = self.read::<4>()?;
                    self.read_vec(usize::from(screens) * 16)?;
                    if (area[2], area[3]) != self.size {
                        self.resize(area[2], area[3]);
                    }
                }
                _ if area[2] == 0 && area[3] == 0 => {}
                other => return Err(violation(format!("encoding {other}"))),
            }
        }
        Ok(())
    }

    fn inflate(&mut self, data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(1 << 16);
        let start = self.inflate.total_in();
        loop {
            out.reserve(1 << 16);
            let done = (self.inflate.total_in() - start) as usize;
            let rest = data.get(done..).unwrap_or_default();
            let before = out.len();
            self.inflate
                .decompress_vec(rest, &mut out, FlushDecompress::Sync)
                .map_err(io::Error::other)?;
            if rest.is_empty() && out.len() == before {
                return Ok(out);
            }
        }
    }

    fn draw(&mut self, area: [usize; 4], pixels: &[u32]) -> io::Result<()> {
        let [x, y, width, _] = area;
        for (n, line) in pixels.chunks(width.max(1)).enumerate() {
            let at = (y + n) * self.size.0 + x;
            let to = self.pixels.get_mut(at..at + width);
            let to = to.filter(|_| x + width <= self.size.0);
            to.ok_or_else(|| violation("a rectangle outside of the screen"))?
                .copy_from_slice(line);
        }
        Ok(())
    }

    fn draw_zrle(&mut self, area: [usize; 4], plain: &mut &[u8]) -> io::Result<()> {
        let [x, y, width, height] = area;
        for top in (0..height).step_by(64) {
            for left in (0..width).step_by(64) {
                let (columns, lines) = ((width - left).min(64), (height - top).min(64));
                let tile = zrle_tile(plain, columns, lines)?;
                self.draw([x + left, y + top, columns, lines], &tile)?;
            }
        }
        if plain.is_empty() {
            Ok(())
        } else {
            Err(violation("bytes behind the last tile"))
        }
    }
}

fn byte(from: &mut &[u8]) -> io::Result<u8> {
    let mut b = [0];
    from.read_exact(&mut b)?;
    Ok(b[0])
}

fn color(from: &mut &[u8]) -> io::Result<u32> {
    let mut b = [0; 4];
    from.read_exact(&mut b[..3])?;
    Ok(u32::from_le_bytes(b))
}

fn length(from: &mut &[u8]) -> io::Result<usize> {
    let mut n = 1;
    loop {
        let b = byte(from)?;
        n += usize::from(b);
        if b != 255 {
            return Ok(n);
        }
    }
}

fn zrle_tile(from: &mut &[u8], columns: usize, lines: usize) -> io::Result<Vec<u32>> {
    let count = columns * lines;
    let kind = byte(from)?;
    let colors = usize::from(kind & 0x7f);
    let palette: Vec<u32> = (0..if kind == 128 { 0 } else { colors })
        .map(|_| color(from))
        .collect::<io::Result<_>>()?;
    let entry = |n: u8| {
        let c = palette.get(usize::from(n)).copied();
        c.ok_or_else(|| violation("a colour outside of the palette"))
    };
    let mut tile = Vec::new();
    match kind {
        0 => {
            for _ in 0..count {
                tile.push(color(from)?);
            }
        }
        1 => tile.resize(count, entry(0)?),
        2..=16 => {
            let bits = match kind {
                2 => 1,
                3 | 4 => 2,
                _ => 4,
            };
            for _ in 0..lines {
                let mut left = 0;
                let mut bits_of = 0;
                for _ in 0..columns {
                    if left == 0 {
                        (bits_of, left) = (byte(from)?, 8);
                    }
                    left -= bits;
                    tile.push(entry(bits_of >> left & ((1 << bits) - 1))?);
                }
            }
        }
        128.. => {
            while tile.len() < count {
                let (c, n) = if kind == 128 {
                    (color(from)?, length(from)?)
                } else {
                    match byte(from)? {
                        b if b & 0x80 != 0 => (entry(b & 0x7f)?, length(from)?),
                        b => (entry(b)?, 1),
                    }
                };
                tile.resize(tile.len() + n, c);
            }
        }
        _ => return Err(violation(format!("a tile of kind {kind}"))),
    }
    if tile.len() == count {
        Ok(tile)
    } else {
        Err(violation("a run that leaves its tile"))
    }
}
