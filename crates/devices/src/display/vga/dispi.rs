//! The "VBE dispi" interface of the Bochs display: linear modes without timing registers.
//! Bochs VBE Display API, doc/vbe-dispi (interface B0C5H).

use minicbor::{Decode, Encode};

use crate::display::MAX_SIZE;

/// Port of the index register.
pub(super) const INDEX_PORT: u16 = 0x1ce;
/// Port of the data register, 16 bits wide.
pub(super) const DATA_PORT: u16 = 0x1cf;

pub(super) const ID: u16 = 0;
pub(super) const XRES: u16 = 1;
pub(super) const YRES: u16 = 2;
pub(super) const BPP: u16 = 3;
pub(super) const ENABLE: u16 = 4;
pub(super) const BANK: u16 = 5;
pub(super) const VIRT_WIDTH: u16 = 6;
pub(super) const VIRT_HEIGHT: u16 = 7;
pub(super) const X_OFFSET: u16 = 8;
pub(super) const Y_OFFSET: u16 = 9;
pub(super) const VIDEO_MEMORY_64K: u16 = 10;

/// Newest interface; drivers may write an older one (B0C0H …) to ask for it.
const ID5: u16 = 0xb0c5;

/// The mode is on.
pub(super) const ENABLED: u16 = 1 << 0;
/// Resolution registers read the maxima.
const GET_CAPS: u16 = 1 << 1;
/// Palette entries have 8 bits per component.
const DAC_8BIT: u16 = 1 << 5;
/// Memory is not cleared.
const NO_CLEAR: u16 = 1 << 7;
const ENABLE_BITS: u16 = ENABLED | GET_CAPS | DAC_8BIT | 1 << 6 | NO_CLEAR;

/// The registers, which are also the saved form.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Dispi {
    #[n(0)]
    pub index: u16,
    #[n(1)]
    id: u16,
    #[n(2)]
    pub xres: u16,
    #[n(3)]
    pub yres: u16,
    #[n(4)]
    pub bpp: u16,
    #[n(5)]
    enable: u16,
    #[n(6)]
    pub bank: u16,
    #[n(7)]
    pub virt_width: u16,
    #[n(8)]
    pub x_offset: u16,
    #[n(9)]
    pub y_offset: u16,
}

/// What a write to a register makes necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// A mode was switched on; the first `clear` bytes of memory are to be zero.
    On {
        clear: u64,
    },
}

impl Dispi {
    pub(super) fn power_on() -> Dispi {
        Dispi {
            index: 0,
            id: ID5,
            xres: 0,
            yres: 0,
            bpp: 0,
            enable: 0,
            bank: 0,
            virt_width: 0,
            x_offset: 0,
            y_offset: 0,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.enable & ENABLED != 0
    }

    pub(super) fn has_8bit_dac(&self) -> bool {
        self.enable & DAC_8BIT != 0
    }

    /// True if [`Dispi::fit`] has nothing to correct.
    pub(super) fn is_valid(&self, memory_bytes: u64) -> bool {
        let mut same = self.clone();
        if self.is_on() {
            same.fit(memory_bytes);
        }
        same == *self && (0xb0c0..=ID5).contains(&self.id)
    }

    /// Bytes from one line to the next; of the 4-bit mode, those of all planes together.
    pub(super) fn pitch(&self) -> u32 {
        let width = u32::from(self.virt_width);
        match self.bpp {
            4 => width / 8 * 4,
            15 => width * 2,
            bits => width * u32::from(bits) / 8,
        }
    }

    /// Makes the registers describe a picture that lies in memory.
    fn fit(&mut self, memory_bytes: u64) {
        if !matches!(self.bpp, 4 | 8 | 15 | 16 | 24 | 32) {
            self.bpp = 8;
        }
        let most = MAX_SIZE as u16;
        self.xres = self.xres.clamp(8, most) & !7;
        self.yres = self.yres.clamp(1, most);
        self.virt_width = self.virt_width.clamp(self.xres, 4 * most) & !7;
        let lines = self.lines(memory_bytes);
        self.yres = self.yres.min(lines.max(1));
        if u32::from(self.x_offset) + u32::from(self.xres) > u32::from(self.virt_width) {
            self.x_offset = 0;
        }
        if u32::from(self.y_offset) + u32::from(self.yres) > u32::from(lines) {
            self.y_offset = 0;
        }
    }

    /// Lines that there is memory for.
    fn lines(&self, memory_bytes: u64) -> u16 {
        let lines = memory_bytes / u64::from(self.pitch().max(1));
        u16::try_from(lines).unwrap_or(u16::MAX)
    }

    pub(super) fn read(&self, index: u16, memory_bytes: u64) -> u16 {
        let caps = self.enable & GET_CAPS != 0;
        match index {
            ID => self.id,
            XRES | YRES if caps => MAX_SIZE as u16,
            BPP if caps => 32,
            XRES => self.xres,
            YRES => self.yres,
            BPP => self.bpp,
            ENABLE => self.enable,
            BANK => self.bank,
            VIRT_WIDTH => self.virt_width,
            VIRT_HEIGHT => self.lines(memory_bytes),
            X_OFFSET => self.x_offset,
            Y_OFFSET => self.y_offset,
            VIDEO_MEMORY_64K => (memory_bytes >> 16) as u16,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, index: u16, v: u16, memory_bytes: u64) -> Effect {
        match index {
            ID if (0xb0c0..=ID5).contains(&v) => self.id = v,
            // The resolution is taken over when the mode is switched on.
            XRES if !self.is_on() => self.xres = v,
            YRES if !self.is_on() => self.yres = v,
            BPP if !self.is_on() => self.bpp = if v == 0 { 8 } else { v },
            BANK => self.bank = v & ((memory_bytes >> 16) as u16).wrapping_sub(1),
            VIRT_WIDTH => self.virt_width = v,
            X_OFFSET => self.x_offset = v,
            Y_OFFSET => self.y_offset = v,
            ENABLE => return self.switch(v & ENABLE_BITS, memory_bytes),
            _ => {}
        }
        if self.is_on() {
            self.fit(memory_bytes);
        }
        Effect::Nothing
    }

    fn switch(&mut self, v: u16, memory_bytes: u64) -> Effect {
        let was_on = self.is_on();
        self.enable = v;
        if !self.is_on() {
            self.bank = 0;
            return Effect::Nothing;
        }
        if was_on {
            return Effect::Nothing;
        }
        self.virt_width = 0;
        self.x_offset = 0;
        self.y_offset = 0;
        self.fit(memory_bytes);
        let bytes = u64::from(self.pitch()) * u64::from(self.yres);
        Effect::On {
            clear: if v & NO_CLEAR == 0 { bytes } else { 0 },
        }
    }
}
