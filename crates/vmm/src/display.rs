//! The machine's screen and input for people and programs outside: what it shows, as last looked
//! at, and the queue of keys and pointer movements.
//!
//! - [`keys`]: names, characters and X11 keysyms as keys.
//! - [`input`]: the queue to the guest's keyboard and mouse.
//! - [`png`]: files of screenshots.
//! - [`rfb`]: the VNC server.
//!
//! Nobody looks, nothing is drawn: a picture is made when somebody asks, at most [`FRAME`] after the
//! last one, and compared with the one before to find what changed. The guest is not involved: it
//! writes to video memory at full speed and is never stopped or trapped for the screen's sake.
//!
//! LOCK ORDER: [`Screen`] < display device.

pub mod input;
pub mod keys;
pub mod png;
pub mod rfb;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pyrite_devices::display::{Display, Surface};
use pyrite_vdev::bus::lock;

/// Shortest time from one picture to the next.
pub const FRAME: Duration = Duration::from_millis(33);
/// Changes are found in tiles of this many pixels.
const TILE_WIDTH: usize = 64;
/// Lines of a tile.
const TILE_HEIGHT: usize = 16;

/// A part of the screen, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

/// Pictures are numbered, from 1.
pub type Generation = u64;

/// The picture as last looked at, and when its parts changed.
#[derive(Default)]
pub struct Shown {
    surface: Surface,
    /// The next picture is drawn here.
    next: Surface,
    generation: Generation,
    /// When each tile changed last, line by line.
    changed: Vec<Generation>,
    /// When the size changed last.
    resized: Generation,
    looked: Option<Instant>,
}

impl Shown {
    /// The pixels.
    pub fn surface(&self) -> &Surface {
        &self.surface
    }
    /// The number of this picture.
    pub fn generation(&self) -> Generation {
        self.generation
    }
    /// The size is another one than in picture `since`.
    pub fn resized_since(&self, since: Generation) -> bool {
        self.resized > since
    }

    fn columns(&self) -> usize {
        (self.surface.width() as usize).div_ceil(TILE_WIDTH)
    }

    /// What differs from picture `since`: rectangles without overlap, from the top.
    pub fn changes_since(&self, since: Generation) -> Vec<Rect> {
        let mut rects: Vec<Rect> = Vec::new();
        for (n, row) in self.changed.chunks(self.columns().max(1)).enumerate() {
            let y = (n * TILE_HEIGHT) as u32;
            let height = (TILE_HEIGHT as u32).min(self.surface.height() - y);
            let mut column = 0;
            while column < row.len() {
                let is_new = |t: &&Generation| **t > since;
                let run = row.iter().skip(column).take_while(is_new).count();
                if run == 0 {
                    column += 1;
                    continue;
                }
                let x = (column * TILE_WIDTH) as u32;
                let width = ((run * TILE_WIDTH) as u32).min(self.surface.width() - x);
                // One below another of the same width is the same one.
                match rects
                    .iter_mut()
                    .rev()
                    .find(|r| (r.x, r.width, r.y + r.height) == (x, width, y))
                {
                    Some(above) => above.height += height,
                    None => rects.push(Rect {
                        x,
                        y,
                        width,
                        height,
                    }),
                }
                column += run;
            }
        }
        rects
    }

    /// Takes `next` over, noting what differs.
    fn turn(&mut self) {
        let generation = self.generation + 1;
        let (new, old) = (&self.next, &self.surface);
        let mut any = false;
        if (new.width(), new.height()) != (old.width(), old.height()) || self.generation == 0 {
            let columns = (new.width() as usize).div_ceil(TILE_WIDTH);
            let rows = (new.height() as usize).div_ceil(TILE_HEIGHT);
            self.changed.clear();
            self.changed.resize(columns * rows, generation);
            self.resized = generation;
            any = true;
        } else {
            let columns = self.columns();
            for y in 0..new.height() {
                let (from, to) = (old.line(y), new.line(y));
                if from == to {
                    continue;
                }
                any = true;
                let row = y as usize / TILE_HEIGHT * columns;
                let tiles = self.changed.get_mut(row..row + columns);
                let parts = from.chunks(TILE_WIDTH).zip(to.chunks(TILE_WIDTH));
                for (tile, (from, to)) in tiles.unwrap_or_default().iter_mut().zip(parts) {
                    if from != to {
                        *tile = generation;
                    }
                }
            }
        }
        if any {
            self.generation = generation;
            std::mem::swap(&mut self.surface, &mut self.next);
        }
    }
}

/// The screen of a machine.
pub struct Screen {
    device: Arc<Mutex<dyn Display>>,
    shown: Mutex<Shown>,
}

impl Screen {
    /// The screen of `device`.
    pub fn new(device: Arc<Mutex<dyn Display>>) -> Screen {
        Screen {
            device,
            shown: Mutex::default(),
        }
    }

    /// Calls `f` with a picture that is not older than `age`.
    pub fn look<R>(&self, age: Duration, f: impl FnOnce(&Shown) -> R) -> R {
        let mut shown = lock(&self.shown);
        if shown.looked.is_none_or(|at| at.elapsed() >= age) {
            let picture = lock(&self.device).picture();
            picture.draw(&mut shown.next);
            shown.turn();
            shown.looked = Some(Instant::now());
        }
        f(&shown)
    }

    /// What the screen shows now, as a PNG file.
    pub fn screenshot(&self) -> std::io::Result<Vec<u8>> {
        let surface = self.look(Duration::ZERO, |s| s.surface.clone());
        png::encode(&surface)
    }
}
