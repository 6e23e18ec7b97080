//! Display devices, and the picture that they show.
//!
//! A device says what it shows ([`Picture`]: a copy of its registers and a handle of its memory);
//! whoever wants to see it draws that into a [`Surface`] without holding the device.

pub mod vga;

use vga::VgaPicture;

/// LIMIT: most pixels of a line, and most lines.
pub const MAX_SIZE: u32 = 4096;

/// A picture in memory. One pixel is `0x00RRGGBB`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surface {
    width: u32,
    height: u32,
    pixels: Vec<u32>,
}

impl Surface {
    /// A black picture. Sizes are limited to 1 to [`MAX_SIZE`].
    pub fn new(width: u32, height: u32) -> Surface {
        let mut s = Surface::default();
        s.resize(width, height);
        s
    }
    /// Makes it `width` × `height` and black.
    pub fn resize(&mut self, width: u32, height: u32) {
        self.width = width.clamp(1, MAX_SIZE);
        self.height = height.clamp(1, MAX_SIZE);
        self.pixels.clear();
        self.pixels
            .resize(self.width as usize * self.height as usize, 0);
    }
    /// Pixels of a line.
    pub fn width(&self) -> u32 {
        self.width
    }
    /// Lines.
    pub fn height(&self) -> u32 {
        self.height
    }
    /// All pixels, line by line from the top.
    pub fn pixels(&self) -> &[u32] {
        &self.pixels
    }
    /// The pixels of line `y`; empty below the last line.
    pub fn line(&self, y: u32) -> &[u32] {
        let start = y as usize * self.width as usize;
        self.pixels
            .get(start..start + self.width as usize)
            .unwrap_or_default()
    }
    /// The pixels of line `y`; empty below the last line.
    pub fn line_mut(&mut self, y: u32) -> &mut [u32] {
        let start = y as usize * self.width as usize;
        self.pixels
            .get_mut(start..start + self.width as usize)
            .unwrap_or_default()
    }
}

/// What a display device shows at one moment.
pub enum Picture {
    /// Of a VGA.
    Vga(Box<VgaPicture>),
}

impl Picture {
    /// Draws it. The surface gets the size of the picture.
    pub fn draw(&self, surface: &mut Surface) {
        match self {
            Picture::Vga(p) => p.draw(surface),
        }
    }
}

/// A device with a screen.
pub trait Display: Send {
    /// What it shows now.
    fn picture(&self) -> Picture;
}
