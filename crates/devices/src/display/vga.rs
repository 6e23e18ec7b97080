//! Standard VGA on PCI with the Bochs display interface, ids 1234:1111.
//!
//! The device that QEMU calls `VGA` and Bochs `pcivga`: a complete VGA at its legacy addresses, the
//! [dispi](self::dispi) registers for linear modes of up to 32 bits, video memory in BAR 0,
//! registers again in BAR 2, and its BIOS in the expansion ROM. QEMU, docs/specs/standard-vga.
//!
//! Video memory is a memory of the machine ([`DeviceMemory`]): what the guest does in BAR 0 does
//! not reach this module. Accesses to the window at A0000H do, because they go through the planes.

mod dispi;
mod planes;
mod regs;
mod render;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use dispi::{DATA_PORT, Dispi, Effect, INDEX_PORT};
use minicbor::{Decode, Encode};
use planes::Window;
pub use planes::{WINDOW_BYTES, WINDOW_START};
use pyrite_mem::DeviceMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::pci::{ConfigSaved, EXPANSION_ROM};
use pyrite_vdev::{
    BarKind, BarMemory, ConfigSpace, Lifecycle, MmioDevice, PciFunction, PciIds, PioDevice,
};
use regs::{Registers, attr, crtc, gfx, seq};
pub use render::VgaPicture;

use super::{Display, Picture};

const KIND: &str = "vga";
const VERSION: u16 = 1;
const UNIT: &str = "vga";

/// First port of the VGA.
pub const PORTS_START: u16 = 0x3b0;
/// Number of its ports.
pub const PORTS_COUNT: u16 = 0x30;
/// First port of the dispi interface; there are three, because its data port is 16 bits wide.
pub const DISPI_PORTS_START: u16 = INDEX_PORT;
/// Number of dispi ports.
pub const DISPI_PORTS_COUNT: u16 = 3;
/// Usual size of video memory in bytes.
pub const VIDEO_MEMORY_BYTES: u64 = 16 << 20;

/// BAR of video memory.
const BAR_MEMORY: u8 = 0;
/// BAR of the registers.
const BAR_REGISTERS: u8 = 2;
const BAR_REGISTERS_BYTES: u64 = 4096;
/// In BAR 2: ports 3C0H to 3DFH.
const MMIO_PORTS: u64 = 0x400;
/// In BAR 2: dispi registers by index.
const MMIO_DISPI: u64 = 0x500;
const MMIO_DISPI_BYTES: u64 = 0x16;
/// In BAR 2: size of the extended registers, and byte order of the framebuffer.
const MMIO_EXTENDED: u64 = 0x600;
const LITTLE_ENDIAN: u32 = 0x1e1e_1e1e;

/// LIMIT: bytes of a video BIOS.
pub const MAX_ROM_BYTES: usize = 256 << 10;
const FONT_BYTES: usize = 256 * 16;

/// Why there can be no VGA.
#[derive(Debug, thiserror::Error)]
pub enum VgaError {
    /// The ROM is none.
    #[error("is no video BIOS: it does not begin with 55 AA, or has more than 256 KiB")]
    BadRom,
    /// It has no characters for the text mode.
    #[error("holds no 8x16 character set; expected the BIOS of a VGA, such as vgabios-stdvga.bin")]
    NoFont,
    /// Memory is no power of two between 256 KiB and 256 MiB.
    #[error("{0} bytes of video memory; expected a power of two from 1 MiB to 256 MiB")]
    BadMemory(u64),
}

/// A VGA.
pub struct Vga {
    regs: Registers,
    dispi: Dispi,
    config: ConfigSpace,
    memory: DeviceMemory,
    placement: Arc<dyn BarMemory>,
    rom: Vec<u8>,
    font: Box<[u8]>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    regs: Registers,
    #[n(1)]
    dispi: Dispi,
    #[n(2)]
    config: ConfigSaved,
}

impl Vga {
    /// A VGA with `memory` as its video memory, which `placement` shows to the guest where BAR 0
    /// decodes, and with `rom` as its BIOS.
    pub fn new(
        memory: DeviceMemory,
        placement: Arc<dyn BarMemory>,
        rom: &[u8],
    ) -> Result<Vga, VgaError> {
        let size = memory.size_bytes();
        if !size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&size) {
            return Err(VgaError::BadMemory(size));
        }
        let font = find_font(rom)?.into();
        let mut rom = rom.to_vec();
        rom.resize(rom.len().next_power_of_two(), 0xff);
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: 0x1234,
            device_id: 0x1111,
            revision: 2,
            class: 0x03_00_00,
            subsystem_vendor_id: 0x1af4,
            subsystem_id: 0x1100,
        });
        config.add_bar(BAR_MEMORY, BarKind::Mem32, size);
        config.add_bar(BAR_REGISTERS, BarKind::Mem32, BAR_REGISTERS_BYTES);
        config.add_rom(rom.len().max(2048) as u64);
        Ok(Vga {
            regs: Registers::power_on(),
            dispi: Dispi::power_on(),
            config,
            memory,
            placement,
            rom,
            font,
        })
    }

    /// Does what the BIOS does before an operating system is loaded: text mode 3 with its
    /// characters, and an empty screen. For machines that boot without firmware.
    pub fn set_text_mode(&mut self) {
        self.dispi = Dispi::power_on();
        self.regs = Registers::text_mode();
        // Blank, light grey on black.
        let blank = [b' ', 7, 0, 0].repeat(0x4000);
        self.memory.write(0, &blank);
        for (code, glyph) in (0u64..).zip(self.font.chunks(16)) {
            for (row, byte) in (0u64..).zip(glyph) {
                // Plane 2 of the character's double words.
                self.memory.write((code * 32 + row) * 4 + 2, &[*byte]);
            }
        }
    }

    /// The 256 characters of 8 × 16 dots in the BIOS, a row per byte.
    pub fn font(&self) -> &[u8] {
        &self.font
    }

    fn window(&mut self) -> Window<'_> {
        Window {
            regs: &mut self.regs,
            dispi: &self.dispi,
            memory: &self.memory,
        }
    }

    fn read_dispi(&self, index: u16) -> u16 {
        self.dispi.read(index, self.memory.size_bytes())
    }

    fn write_dispi(&mut self, index: u16, v: u16) {
        match self.dispi.write(index, v, self.memory.size_bytes()) {
            Effect::Nothing => {}
            Effect::On { clear } => {
                let zeroes = vec![0; clear.min(self.memory.size_bytes()) as usize];
                self.memory.write(0, &zeroes);
                self.follow_dispi();
            }
        }
    }

    /// The VGA's own registers in a linear mode: the window at A0000H shows a bank of it.
    fn follow_dispi(&mut self) {
        let r = &mut self.regs;
        let map = r.graphics[gfx::MISCELLANEOUS] & !0x0c;
        r.graphics[gfx::MISCELLANEOUS] = map | 0x04 | gfx::GRAPHICS;
        r.crtc[crtc::MODE_CONTROL] |= 3;
        r.crtc[crtc::START_ADDRESS_HIGH] = 0;
        r.crtc[crtc::START_ADDRESS_LOW] = 0;
        r.graphics[gfx::MODE] &= !0x70;
        if self.dispi.bpp == 4 {
            r.sequencer[seq::MEMORY_MODE] &= !seq::CHAIN_4;
        } else {
            r.graphics[gfx::MODE] |= 0x40;
            r.sequencer[seq::MEMORY_MODE] |= seq::CHAIN_4;
            r.sequencer[seq::MAP_MASK] = 0x0f;
        }
    }

    /// The port's number as that of a colour display; `None` if the miscellaneous register says
    /// that CRTC and status are at the other place.
    fn color_port(&self, port: u16) -> Option<u16> {
        let color = self.regs.misc & regs::MISC_COLOR != 0;
        match port {
            0x3b0..=0x3bf if color => None,
            0x3d0..=0x3df if !color => None,
            0x3b0..=0x3bf => Some(port + 0x20),
            _ => Some(port),
        }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let Some(port) = self.color_port(port) else {
            return 0xff;
        };
        let r = &mut self.regs;
        let at = |values: &[u8], index: u8| values.get(usize::from(index)).copied().unwrap_or(0);
        match port {
            0x3c0 if !r.attribute_data => r.attribute_index,
            0x3c0 => 0,
            0x3c1 => at(&r.attribute, r.attribute_index & 0x1f),
            0x3c2 => 0,
            0x3c4 => r.sequencer_index,
            0x3c5 => at(&r.sequencer, r.sequencer_index),
            0x3c6 => r.pel_mask,
            0x3c7 => r.pel_state,
            0x3c8 => r.pel_write,
            0x3c9 => {
                let entry = usize::from(r.pel_read) * 3 + usize::from(r.pel_component);
                let v = r.palette.get(entry).copied().unwrap_or(0);
                r.pel_component = (r.pel_component + 1) % 3;
                if r.pel_component == 0 {
                    r.pel_read = r.pel_read.wrapping_add(1);
                }
                v
            }
            0x3ca => r.feature,
            0x3cc => r.misc,
            0x3ce => r.graphics_index,
            0x3cf => at(&r.graphics, r.graphics_index),
            0x3d4 => r.crtc_index,
            0x3d5 => at(&r.crtc, r.crtc_index),
            0x3da => {
                r.attribute_data = false;
                // Whoever waits for a retrace or its end sees it soon.
                r.status1 ^= regs::STATUS1_DISABLED | regs::STATUS1_RETRACE;
                r.status1
            }
            _ => 0xff,
        }
    }

    fn write_port(&mut self, port: u16, v: u8) {
        let Some(port) = self.color_port(port) else {
            return;
        };
        let r = &mut self.regs;
        match port {
            0x3c0 => {
                if r.attribute_data {
                    let index = usize::from(r.attribute_index & 0x1f);
                    if let Some(to) = r.attribute.get_mut(index) {
                        *to = match index {
                            0..=0xf => v & 0x3f,
                            attr::MODE_CONTROL => v & 0xef,
                            attr::COLOR_PLANE_ENABLE => v & 0x3f,
                            attr::HORIZONTAL_PANNING | attr::COLOR_SELECT => v & 0x0f,
                            _ => v,
                        };
                    }
                } else {
                    r.attribute_index = v & 0x3f;
                }
                r.attribute_data = !r.attribute_data;
            }
            0x3c2 => r.misc = v & 0xef,
            0x3c4 => r.sequencer_index = v & 7,
            0x3c5 => {
                let index = usize::from(r.sequencer_index);
                if let Some((to, mask)) =
                    (r.sequencer.get_mut(index)).zip(regs::SEQUENCER_MASK.get(index))
                {
                    *to = v & mask;
                }
            }
            0x3c6 => r.pel_mask = v,
            0x3c7 => (r.pel_read, r.pel_component, r.pel_state) = (v, 0, 3),
            0x3c8 => (r.pel_write, r.pel_component, r.pel_state) = (v, 0, 0),
            0x3c9 => self.write_palette(v),
            0x3ce => r.graphics_index = v & 0x0f,
            0x3cf => {
                let index = usize::from(r.graphics_index);
                if let Some((to, mask)) =
                    (r.graphics.get_mut(index)).zip(regs::GRAPHICS_MASK.get(index))
                {
                    *to = v & mask;
                }
            }
            0x3d4 => r.crtc_index = v,
            0x3d5 => self.write_crtc(v),
            0x3da => r.feature = v & 0x10,
            _ => {}
        }
    }

    fn write_palette(&mut self, v: u8) {
        let wide = self.dispi.has_8bit_dac();
        let r = &mut self.regs;
        let component = usize::from(r.pel_component % 3);
        r.pel_pending[component] = if wide { v } else { v & 0x3f };
        r.pel_component = (r.pel_component + 1) % 3;
        if r.pel_component == 0 {
            // An entry changes as a whole.
            let entry = usize::from(r.pel_write) * 3;
            if let Some(to) = r.palette.get_mut(entry..entry + 3) {
                to.copy_from_slice(&r.pel_pending);
            }
            r.pel_write = r.pel_write.wrapping_add(1);
        }
    }

    fn write_crtc(&mut self, v: u8) {
        let r = &mut self.regs;
        let index = usize::from(r.crtc_index);
        let is_protected = r.crtc[crtc::VERTICAL_RETRACE_END] & crtc::PROTECT != 0;
        if let Some(to) = r.crtc.get_mut(index) {
            *to = match index {
                // Only the ninth bit of line compare.
                crtc::OVERFLOW if is_protected => *to & !0x10 | v & 0x10,
                0..crtc::OVERFLOW if is_protected => return,
                _ => v,
            };
        }
    }

    fn read_register_byte(&mut self, offset: u64) -> u8 {
        let extended = [8, LITTLE_ENDIAN].map(u32::to_le_bytes);
        match offset {
            MMIO_PORTS..0x420 => self.read_port(0x3c0 + (offset - MMIO_PORTS) as u16),
            MMIO_EXTENDED..0x608 => {
                let at = (offset - MMIO_EXTENDED) as usize;
                extended[at / 4][at % 4]
            }
            _ => 0xff,
        }
    }

    fn read_registers(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(index) = dispi_index(offset, data.len()) {
            data.copy_from_slice(&self.read_dispi(index).to_le_bytes());
            return;
        }
        for (at, b) in (offset..).zip(data) {
            *b = self.read_register_byte(at);
        }
    }

    fn write_registers(&mut self, offset: u64, data: &[u8]) {
        if let (Some(index), Ok(bytes)) = (dispi_index(offset, data.len()), data.try_into()) {
            self.write_dispi(index, u16::from_le_bytes(bytes));
            return;
        }
        for (at, b) in (offset..).zip(data) {
            if (MMIO_PORTS..0x420).contains(&at) {
                self.write_port(0x3c0 + (at - MMIO_PORTS) as u16, *b);
            }
        }
    }
}

/// The dispi register that a 16-bit access in BAR 2 reaches.
fn dispi_index(offset: u64, len: usize) -> Option<u16> {
    let at = offset.checked_sub(MMIO_DISPI)?;
    (len == 2 && at < MMIO_DISPI_BYTES && at & 1 == 0).then_some((at / 2) as u16)
}

/// The 8 × 16 character set in a video BIOS: it begins with an empty character and the outline of a
/// face, the first two of code page 437.
pub fn find_font(rom: &[u8]) -> Result<&[u8], VgaError> {
    const FACE: [u8; 16] = [
        0x00, 0x00, 0x7e, 0x81, 0xa5, 0x81, 0x81, 0xbd, 0x99, 0x81, 0x81, 0x7e, 0x00, 0x00, 0x00,
        0x00,
    ];
    if !rom.starts_with(&[0x55, 0xaa]) || rom.len() > MAX_ROM_BYTES {
        return Err(VgaError::BadRom);
    }
    rom.windows(FONT_BYTES)
        .find(|w| w[..16] == [0; 16] && w[16..32] == FACE)
        .ok_or(VgaError::NoFont)
}

impl Display for Vga {
    fn picture(&self) -> Picture {
        Picture::Vga(Box::new(VgaPicture {
            regs: self.regs.clone(),
            dispi: self.dispi.clone(),
            memory: self.memory.clone(),
        }))
    }
}

impl PioDevice for Vga {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        match port {
            INDEX_PORT if data.len() == 2 => {
                data.copy_from_slice(&self.dispi.index.to_le_bytes());
            }
            // The data port is also at 1D0H, for processors that split unaligned accesses.
            DATA_PORT | 0x1d0 if data.len() == 2 => {
                data.copy_from_slice(&self.read_dispi(self.dispi.index).to_le_bytes());
            }
            DISPI_PORTS_START..=0x1d0 => {}
            _ => {
                for (port, b) in (port..0x3e0).zip(data) {
                    *b = self.read_port(port);
                }
            }
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        match (port, <[u8; 2]>::try_from(data)) {
            (INDEX_PORT, Ok(v)) => self.dispi.index = u16::from_le_bytes(v),
            (DATA_PORT | 0x1d0, Ok(v)) => {
                self.write_dispi(self.dispi.index, u16::from_le_bytes(v));
            }
            (DISPI_PORTS_START..=0x1d0, _) => {}
            _ => {
                for (port, b) in (port..0x3e0).zip(data) {
                    self.write_port(port, *b);
                }
            }
        }
    }
}

impl MmioDevice for Vga {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let mut window = self.window();
        for (at, b) in (offset..).zip(data) {
            *b = window.read(at);
        }
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let mut window = self.window();
        for (at, b) in (offset..).zip(data) {
            window.write(at, *b);
        }
    }
}

impl PciFunction for Vga {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        match index {
            BAR_MEMORY => self.memory.read(offset, data),
            BAR_REGISTERS => self.read_registers(offset, data),
            EXPANSION_ROM => {
                let from = self.rom.get(offset as usize..).unwrap_or_default();
                for (b, v) in data.iter_mut().zip(from) {
                    *b = *v;
                }
            }
            _ => {}
        }
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        match index {
            BAR_MEMORY => self.memory.write(offset, data),
            BAR_REGISTERS => self.write_registers(offset, data),
            _ => {}
        }
    }
    fn bar_memory(&self, index: u8) -> Option<Arc<dyn BarMemory>> {
        (index == BAR_MEMORY).then(|| Arc::clone(&self.placement))
    }
}

impl Lifecycle for Vga {
    fn unit(&self) -> &str {
        UNIT
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::power_on();
        self.dispi = Dispi::power_on();
        self.config.reset();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        // Video memory is saved with the machine's memory.
        let Vga {
            regs,
            dispi,
            config,
            memory: _,
            placement: _,
            rom: _,
            font: _,
        } = self;
        let saved = Saved {
            regs: regs.clone(),
            dispi: dispi.clone(),
            config: config.save(),
        };
        Ok(Section::new(UNIT, KIND, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let Saved {
            regs,
            dispi,
            config,
        } = section.decode(KIND, VERSION)?;
        let invalid = |detail: String| StateError::Invalid {
            unit: UNIT.into(),
            detail,
        };
        if !regs.is_valid() || !dispi.is_valid(self.memory.size_bytes()) {
            return Err(invalid("registers that cannot be".into()));
        }
        self.config.restore(&config).map_err(invalid)?;
        self.regs = regs;
        self.dispi = dispi;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let d = &self.dispi;
        let mode = if d.is_on() {
            format!("{}x{}, {} bits", d.xres, d.yres, d.bpp)
        } else if self.regs.graphics[gfx::MISCELLANEOUS] & gfx::GRAPHICS != 0 {
            "VGA graphics".to_owned()
        } else {
            "text".to_owned()
        };
        Inspect::node([
            ("mode", Inspect::Text(mode)),
            ("memory-bytes", Inspect::Uint(self.memory.size_bytes())),
            ("pci", self.config.inspect()),
        ])
    }
}
