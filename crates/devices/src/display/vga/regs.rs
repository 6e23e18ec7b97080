//! Registers of the VGA: IBM Personal System/2 Hardware Interface Technical Reference, "Video
//! Subsystem" (1992). Index and bit names are those of that book.

use minicbor::{Decode, Encode};

pub(super) const ATTRIBUTE_COUNT: usize = 0x15;
pub(super) const SEQUENCER_COUNT: usize = 5;
pub(super) const GRAPHICS_COUNT: usize = 9;
pub(super) const CRTC_COUNT: usize = 0x19;
pub(super) const PALETTE_BYTES: usize = 768;

pub(super) mod seq {
    pub const CLOCKING_MODE: usize = 1;
    pub const MAP_MASK: usize = 2;
    pub const CHARACTER_MAP_SELECT: usize = 3;
    pub const MEMORY_MODE: usize = 4;

    /// Clocking mode: characters are 8 dots wide instead of 9.
    pub const DOTS_8: u8 = 1 << 0;
    /// Clocking mode: dot clock divided by two.
    pub const HALF_DOT_CLOCK: u8 = 1 << 3;
    /// Clocking mode: screen off.
    pub const SCREEN_OFF: u8 = 1 << 5;
    /// Memory mode: chain four.
    pub const CHAIN_4: u8 = 1 << 3;
}

pub(super) mod gfx {
    pub const SET_RESET: usize = 0;
    pub const ENABLE_SET_RESET: usize = 1;
    pub const COLOR_COMPARE: usize = 2;
    pub const DATA_ROTATE: usize = 3;
    pub const READ_MAP_SELECT: usize = 4;
    pub const MODE: usize = 5;
    pub const MISCELLANEOUS: usize = 6;
    pub const COLOR_DONT_CARE: usize = 7;
    pub const BIT_MASK: usize = 8;

    /// Mode: read type 1, colour compare.
    pub const READ_TYPE: u8 = 1 << 3;
    /// Mode: odd/even addressing.
    pub const ODD_EVEN: u8 = 1 << 4;
    /// Miscellaneous: graphics mode.
    pub const GRAPHICS: u8 = 1 << 0;
}

pub(super) mod crtc {
    pub const HORIZONTAL_DISPLAY_END: usize = 0x01;
    pub const OVERFLOW: usize = 0x07;
    pub const MAXIMUM_SCAN_LINE: usize = 0x09;
    pub const CURSOR_START: usize = 0x0a;
    pub const CURSOR_END: usize = 0x0b;
    pub const START_ADDRESS_HIGH: usize = 0x0c;
    pub const START_ADDRESS_LOW: usize = 0x0d;
    pub const CURSOR_LOCATION_HIGH: usize = 0x0e;
    pub const CURSOR_LOCATION_LOW: usize = 0x0f;
    pub const VERTICAL_RETRACE_END: usize = 0x11;
    pub const VERTICAL_DISPLAY_END: usize = 0x12;
    pub const OFFSET: usize = 0x13;
    pub const MODE_CONTROL: usize = 0x17;
    pub const LINE_COMPARE: usize = 0x18;

    /// Vertical retrace end: registers 0 to 7 are read-only.
    pub const PROTECT: u8 = 1 << 7;
    /// Cursor start: the cursor is off.
    pub const CURSOR_OFF: u8 = 1 << 5;
}

pub(super) mod attr {
    pub const MODE_CONTROL: usize = 0x10;
    pub const COLOR_PLANE_ENABLE: usize = 0x12;
    pub const HORIZONTAL_PANNING: usize = 0x13;
    pub const COLOR_SELECT: usize = 0x14;

    /// Address register: the palette belongs to the screen, which is else blank.
    pub const PALETTE_ADDRESS_SOURCE: u8 = 1 << 5;
    /// Mode control: the ninth dot of line graphics repeats the eighth.
    pub const LINE_GRAPHICS: u8 = 1 << 2;
    /// Mode control: attribute bit 7 blinks instead of brightening the background.
    pub const BLINK: u8 = 1 << 3;
    /// Mode control: palette bits 5 and 4 come from the colour select register.
    pub const P54_SELECT: u8 = 1 << 7;
}

/// Miscellaneous output: CRTC at 3DxH instead of 3BxH.
pub(super) const MISC_COLOR: u8 = 1 << 0;
/// Input status 1: display disabled.
pub(super) const STATUS1_DISABLED: u8 = 1 << 0;
/// Input status 1: vertical retrace.
pub(super) const STATUS1_RETRACE: u8 = 1 << 3;

/// Bits of the sequencer's registers that exist.
pub(super) const SEQUENCER_MASK: [u8; SEQUENCER_COUNT] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e];
/// Bits of the graphics controller's registers that exist.
pub(super) const GRAPHICS_MASK: [u8; GRAPHICS_COUNT] =
    [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff];

/// All registers that software sees, which is also the saved form.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Registers {
    #[n(0)]
    pub misc: u8,
    #[n(1)]
    pub feature: u8,
    #[n(2)]
    pub sequencer_index: u8,
    #[cbor(n(3), with = "minicbor::bytes")]
    pub sequencer: [u8; SEQUENCER_COUNT],
    #[n(4)]
    pub graphics_index: u8,
    #[cbor(n(5), with = "minicbor::bytes")]
    pub graphics: [u8; GRAPHICS_COUNT],
    #[n(6)]
    pub crtc_index: u8,
    #[cbor(n(7), with = "minicbor::bytes")]
    pub crtc: [u8; CRTC_COUNT],
    #[n(8)]
    pub attribute_index: u8,
    /// The next write to the attribute controller is data.
    #[n(9)]
    pub attribute_data: bool,
    #[cbor(n(10), with = "minicbor::bytes")]
    pub attribute: [u8; ATTRIBUTE_COUNT],
    #[n(11)]
    pub pel_mask: u8,
    #[n(12)]
    pub pel_read: u8,
    #[n(13)]
    pub pel_write: u8,
    /// Component of the entry being read or written: 0 red, 1 green, 2 blue.
    #[n(14)]
    pub pel_component: u8,
    /// What the DAC state register reads: 3 after a read address was set, else 0.
    #[n(15)]
    pub pel_state: u8,
    #[cbor(n(16), with = "minicbor::bytes")]
    pub palette: [u8; PALETTE_BYTES],
    /// Components being written.
    #[cbor(n(17), with = "minicbor::bytes")]
    pub pel_pending: [u8; 3],
    /// The four planes' bytes as last read.
    #[n(18)]
    pub latch: u32,
    /// What input status 1 read last; display and retrace alternate.
    #[n(19)]
    pub status1: u8,
}

impl Registers {
    pub(super) fn power_on() -> Registers {
        Registers {
            misc: 0,
            feature: 0,
            sequencer_index: 0,
            sequencer: [0; SEQUENCER_COUNT],
            graphics_index: 0,
            graphics: [0; GRAPHICS_COUNT],
            crtc_index: 0,
            crtc: [0; CRTC_COUNT],
            attribute_index: 0,
            attribute_data: false,
            attribute: [0; ATTRIBUTE_COUNT],
            pel_mask: 0xff,
            pel_read: 0,
            pel_write: 0,
            pel_component: 0,
            pel_state: 0,
            palette: [0; PALETTE_BYTES],
            pel_pending: [0; 3],
            latch: 0,
            status1: 0,
        }
    }

    /// The registers of text mode 3: 80 × 25 characters of 9 × 16 dots.
    pub(super) fn text_mode() -> Registers {
        let mut r = Registers {
            misc: 0x67,
            sequencer: [0x03, 0x00, 0x03, 0x00, 0x02],
            graphics: [0, 0, 0, 0, 0, gfx::ODD_EVEN, 0x0e, 0x0f, 0xff],
            crtc: [
                0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00,
                0x00, 0x00, 0x9c, 0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
            ],
            attribute_index: attr::PALETTE_ADDRESS_SOURCE,
            attribute: [
                0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d,
                0x3e, 0x3f, 0x0c, 0x00, 0x0f, 0x08, 0x00,
            ],
            ..Registers::power_on()
        };
        // The 64 colours of an EGA monitor: two bits per component, the weaker ones above.
        for (n, entry) in r
            .palette
            .as_chunks_mut::<3>()
            .0
            .iter_mut()
            .take(64)
            .enumerate()
        {
            for (component, (strong, weak)) in entry.iter_mut().zip([(2, 5), (1, 4), (0, 3)]) {
                *component = 0x2a * (n >> strong & 1) as u8 + 0x15 * (n >> weak & 1) as u8;
            }
        }
        r
    }

    pub(super) fn is_valid(&self) -> bool {
        self.pel_component < 3
    }

    /// Lines of the picture.
    pub(super) fn lines(&self) -> u32 {
        let c = &self.crtc;
        let over = u32::from(c[crtc::OVERFLOW]);
        1 + (u32::from(c[crtc::VERTICAL_DISPLAY_END]) | (over & 0x02) << 7 | (over & 0x40) << 3)
    }

    /// Line at which the picture begins again at address 0.
    pub(super) fn line_compare(&self) -> u32 {
        let c = &self.crtc;
        u32::from(c[crtc::LINE_COMPARE])
            | (u32::from(c[crtc::OVERFLOW]) & 0x10) << 4
            | (u32::from(c[crtc::MAXIMUM_SCAN_LINE]) & 0x40) << 3
    }

    /// Characters (of 8 or 9 dots) of a line.
    pub(super) fn columns(&self) -> u32 {
        u32::from(self.crtc[crtc::HORIZONTAL_DISPLAY_END]) + 1
    }

    /// Bytes of memory from one line to the next, all planes together.
    pub(super) fn pitch(&self) -> u32 {
        u32::from(self.crtc[crtc::OFFSET]) * 8
    }

    /// First address of the picture, in double words of memory.
    pub(super) fn start_address(&self) -> u32 {
        u32::from(self.crtc[crtc::START_ADDRESS_HIGH]) << 8
            | u32::from(self.crtc[crtc::START_ADDRESS_LOW])
    }
}
