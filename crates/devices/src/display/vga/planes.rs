//! The window at A0000H-BFFFFH: how processor accesses reach the four planes.
//!
//! Memory holds the planes interleaved: byte 4n + p is byte n of plane p. Chain-four addresses are
//! then memory addresses. In odd/even addressing, address bit 0 selects the plane of a pair and the
//! address is halved, so that text occupies every double word.

use pyrite_mem::DeviceMemory;

use super::dispi::Dispi;
use super::regs::{Registers, gfx, seq};

/// First address of the window.
pub const WINDOW_START: u64 = 0xa_0000;
/// Its length in bytes.
pub const WINDOW_BYTES: u64 = 0x2_0000;

/// The window as the registers say it is.
pub(super) struct Window<'a> {
    pub regs: &'a mut Registers,
    pub dispi: &'a Dispi,
    pub memory: &'a DeviceMemory,
}

/// Each bit of a plane mask as a whole byte.
fn spread(bits: u8) -> u32 {
    (0..4).fold(0, |m, p| m | (u32::from(bits >> p & 1) * 0xff) << (8 * p))
}

/// A byte in all planes.
fn all_planes(byte: u8) -> u32 {
    u32::from(byte) * 0x0101_0101
}

impl Window<'_> {
    /// The address inside the memory map that the miscellaneous register chose.
    fn address(&self, offset: u64) -> Option<u64> {
        let (start, len) = match self.regs.graphics[gfx::MISCELLANEOUS] >> 2 & 3 {
            0 => (0, 0x2_0000),
            1 => (0, 0x1_0000),
            2 => (0x1_0000, 0x8000),
            _ => (0x1_8000, 0x8000),
        };
        let at = offset.checked_sub(start).filter(|at| *at < len)?;
        let bank = if self.dispi.is_on() {
            u64::from(self.dispi.bank) << 16
        } else {
            0
        };
        Some(at + bank)
    }

    fn load(&self, dword: u64) -> u32 {
        let mut b = [0; 4];
        self.memory.read(dword * 4, &mut b);
        u32::from_le_bytes(b)
    }

    fn is_chained(&self) -> bool {
        self.regs.sequencer[seq::MEMORY_MODE] & seq::CHAIN_4 != 0
    }

    /// Plane and byte for chained and odd/even addresses; `None` = planar.
    fn single(&self, at: u64) -> Option<(u8, u64)> {
        if self.is_chained() {
            return Some(((at & 3) as u8, at));
        }
        if self.regs.graphics[gfx::MODE] & gfx::ODD_EVEN != 0 {
            let plane = self.regs.graphics[gfx::READ_MAP_SELECT] & 2 | (at & 1) as u8;
            return Some((plane, (at & !1) << 1 | u64::from(plane)));
        }
        None
    }

    pub(super) fn read(&mut self, offset: u64) -> u8 {
        let Some(at) = self.address(offset) else {
            return 0xff;
        };
        if let Some((_, byte)) = self.single(at) {
            self.regs.latch = self.load(byte >> 2);
            return (self.regs.latch >> (8 * (byte & 3))) as u8;
        }
        let latch = self.load(at);
        self.regs.latch = latch;
        let g = &self.regs.graphics;
        if g[gfx::MODE] & gfx::READ_TYPE == 0 {
            return (latch >> (8 * (g[gfx::READ_MAP_SELECT] & 3))) as u8;
        }
        let differs = (latch ^ spread(g[gfx::COLOR_COMPARE])) & spread(g[gfx::COLOR_DONT_CARE]);
        !differs
            .to_le_bytes()
            .iter()
            .fold(0, |all, plane| all | plane)
    }

    pub(super) fn write(&mut self, offset: u64, v: u8) {
        let Some(at) = self.address(offset) else {
            return;
        };
        let map_mask = self.regs.sequencer[seq::MAP_MASK];
        if let Some((plane, byte)) = self.single(at) {
            if map_mask >> plane & 1 != 0 {
                self.memory.write(byte, &[v]);
            }
            return;
        }
        let value = self.planar_value(v);
        let mask = spread(map_mask);
        let new = if mask == u32::MAX {
            value
        } else {
            self.load(at) & !mask | value & mask
        };
        self.memory.write(at * 4, &new.to_le_bytes());
    }

    /// What the graphics controller makes of a written byte, for all planes.
    fn planar_value(&self, v: u8) -> u32 {
        let g = &self.regs.graphics;
        let latch = self.regs.latch;
        let rotated = v.rotate_right(u32::from(g[gfx::DATA_ROTATE] & 7));
        let set_reset = spread(g[gfx::SET_RESET]);
        let mut bit_mask = g[gfx::BIT_MASK];
        let value = match g[gfx::MODE] & 3 {
            0 => {
                let enabled = spread(g[gfx::ENABLE_SET_RESET]);
                all_planes(rotated) & !enabled | set_reset & enabled
            }
            1 => return latch,
            2 => spread(v),
            _ => {
                bit_mask &= rotated;
                set_reset
            }
        };
        let value = match g[gfx::DATA_ROTATE] >> 3 & 3 {
            0 => value,
            1 => value & latch,
            2 => value | latch,
            _ => value ^ latch,
        };
        let bits = all_planes(bit_mask);
        value & bits | latch & !bits
    }
}
