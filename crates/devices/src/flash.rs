//! Parallel NOR flash with the Intel command set, which UEFI firmware keeps its variables in.
//! Intel StrataFlash data sheet (28F128J3), CFI publication 100, JEDEC JESD68.
//!
//! The chip is eight bits wide, with blocks of 4 KiB. Programming can only clear bits; erasing a
//! block sets them. Content goes to the host's file when the guest returns to reading: everything
//! that it has programmed until then becomes one write, so a killed process leaves the file as it
//! was before the operation or after it, as a real chip that loses power between two operations.
//!
//! One deviation, which firmware tells a flash from a ROM by: Clear Status makes the status
//! register 0, and the ready bit comes back with the next operation.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{Lifecycle, MmioDevice};

const KIND: &str = "flash-cfi";
const VERSION: u16 = 1;

/// Bytes of an erase block.
pub const BLOCK_BYTES: usize = 4096;
/// LIMIT: bytes of a chip.
pub const MAX_BYTES: usize = 16 << 20;
/// Bytes of the write buffer.
const BUFFER_BYTES: usize = 256;

// Commands.
const PROGRAM: u8 = 0x10;
const PROGRAM_ALTERNATE: u8 = 0x40;
const ERASE: u8 = 0x20;
const CONFIRM: u8 = 0xd0;
const WRITE_BUFFER: u8 = 0xe8;
const CLEAR_STATUS: u8 = 0x50;
const READ_STATUS: u8 = 0x70;
const READ_ID: u8 = 0x90;
const READ_CFI: u8 = 0x98;
const LOCK_SETUP: u8 = 0x60;
const READ_ARRAY: u8 = 0xff;

// Status register.
const READY: u8 = 1 << 7;
const ERASE_ERROR: u8 = 1 << 5;
const PROGRAM_ERROR: u8 = 1 << 4;

/// Intel.
const MANUFACTURER: u8 = 0x89;
/// 28F128J3.
const DEVICE: u8 = 0x18;

/// Where the content is kept.
pub trait FlashStore: Send {
    /// Writes `data` at `offset`, lastingly.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
}

impl FlashStore for File {
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)?;
        self.sync_data()
    }
}

/// Content that lives as long as the machine.
pub struct Volatile;

impl FlashStore for Volatile {
    fn write(&mut self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// What a read shows, or what the next write is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
enum Mode {
    #[default]
    #[n(0)]
    Array,
    #[n(1)]
    Status,
    #[n(2)]
    Id,
    #[n(3)]
    Cfi,
    /// The next write is the byte to program.
    #[n(4)]
    Program,
    /// The next write confirms an erase.
    #[n(5)]
    Erase,
    /// The next write is the number of bytes less one.
    #[n(6)]
    BufferCount,
    /// Bytes for the buffer follow.
    #[n(7)]
    BufferFill,
    /// The next write confirms the buffer.
    #[n(8)]
    BufferConfirm,
    /// The next write says what to do with a block's lock.
    #[n(9)]
    Lock,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    mode: Mode,
    #[n(1)]
    status: u8,
    /// Bytes that are still to come for the buffer.
    #[n(2)]
    left: u16,
    /// The write buffer: offset and byte.
    #[n(3)]
    buffer: Vec<(u32, u8)>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    regs: Registers,
    #[cbor(n(1), with = "minicbor::bytes")]
    content: Vec<u8>,
    /// [`digest`] of the content, which outlives whatever is restored wrongly.
    #[n(2)]
    digest: u64,
}

/// FNV-1a, 64 bit.
fn digest(content: &[u8]) -> u64 {
    content.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The chip.
pub struct Flash {
    regs: Registers,
    content: Vec<u8>,
    /// What the store does not have yet.
    unsaved: Option<(usize, usize)>,
    store: Box<dyn FlashStore>,
}

impl Flash {
    /// A chip with this content, whose changes go to `store`. `None` if the size is not a positive
    /// number of blocks of at most [`MAX_BYTES`].
    pub fn new(content: Vec<u8>, store: Box<dyn FlashStore>) -> Option<Flash> {
        let whole = content.len().is_multiple_of(BLOCK_BYTES);
        (whole && !content.is_empty() && content.len() <= MAX_BYTES).then(|| Flash {
            regs: Registers::default(),
            content,
            unsaved: None,
            store,
        })
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.content.len() as u64
    }

    /// Brings all changes into the store. What cannot be stored is tried again at the next change.
    fn settle(&mut self) -> bool {
        let Some((from, to)) = self.unsaved else {
            return true;
        };
        let part = self.content.get(from..to).unwrap_or_default();
        match self.store.write(from as u64, part) {
            Ok(()) => {
                self.unsaved = None;
                true
            }
            Err(e) => {
                tracing::error!(
                    "the firmware's variables cannot be stored: {e}; make room for their file"
                );
                false
            }
        }
    }

    fn touch(&mut self, from: usize, to: usize) {
        let (a, b) = self.unsaved.unwrap_or((from, to));
        self.unsaved = Some((a.min(from), b.max(to)));
    }

    fn program(&mut self, at: usize, byte: u8) {
        let Some(b) = self.content.get_mut(at) else {
            self.regs.status |= PROGRAM_ERROR;
            return;
        };
        *b &= byte;
        self.touch(at, at + 1);
    }

    fn erase(&mut self, at: usize) {
        let from = at / BLOCK_BYTES * BLOCK_BYTES;
        match self.content.get_mut(from..from + BLOCK_BYTES) {
            Some(block) => {
                block.fill(0xff);
                self.touch(from, from + BLOCK_BYTES);
            }
            None => self.regs.status |= ERASE_ERROR,
        }
    }

    /// The CFI query structure: identification, geometry. CFI publication 100 §2.
    fn cfi(&self, at: usize) -> u8 {
        let blocks = (self.content.len() / BLOCK_BYTES).saturating_sub(1) as u32;
        match at & 0xff {
            0x10 => b'Q',
            0x11 => b'R',
            0x12 => b'Y',
            0x13 => 1, // Intel/Sharp extended command set
            0x15 => 0x31,
            0x1b => 0x45, // supply voltage
            0x1c => 0x55,
            0x1f => 7, // typical times, log2: byte in µs, buffer in µs, block in ms
            0x20 => 7,
            0x21 => 10,
            0x23..=0x25 => 4, // most of that, log2 of the multiple
            0x27 => self.content.len().next_power_of_two().trailing_zeros() as u8,
            0x2a => BUFFER_BYTES.trailing_zeros() as u8,
            0x2c => 1, // one region of equal blocks
            0x2d => blocks as u8,
            0x2e => (blocks >> 8) as u8,
            0x2f => (BLOCK_BYTES >> 8) as u8,
            0x30 => (BLOCK_BYTES >> 16) as u8,
            0x31 => b'P',
            0x32 => b'R',
            0x33 => b'I',
            0x34 => b'1',
            0x35 => b'0',
            _ => 0,
        }
    }

    fn read_byte(&self, at: usize) -> u8 {
        match self.regs.mode {
            Mode::Array => self.content.get(at).copied().unwrap_or(0xff),
            Mode::Id => match at & 0xff {
                0 => MANUFACTURER,
                1 => DEVICE,
                _ => 0, // blocks are not locked
            },
            Mode::Cfi => self.cfi(at),
            _ => self.regs.status,
        }
    }

    fn command(&mut self, command: u8) {
        self.regs.mode = match command {
            PROGRAM | PROGRAM_ALTERNATE => Mode::Program,
            ERASE => Mode::Erase,
            WRITE_BUFFER => {
                self.regs.status |= READY;
                Mode::BufferCount
            }
            READ_STATUS => Mode::Status,
            READ_ID => Mode::Id,
            READ_CFI => Mode::Cfi,
            LOCK_SETUP => Mode::Lock,
            CLEAR_STATUS => {
                self.regs.status = 0;
                Mode::Array
            }
            // READ_ARRAY, and what is no command.
            _ => Mode::Array,
        };
        if command == READ_ARRAY && !self.settle() {
            self.regs.status |= PROGRAM_ERROR;
        }
    }

    fn write_byte(&mut self, at: usize, v: u8) {
        match self.regs.mode {
            Mode::Array | Mode::Status | Mode::Id | Mode::Cfi => self.command(v),
            Mode::Program => {
                self.regs.status |= READY;
                self.program(at, v);
                self.regs.mode = Mode::Status;
            }
            Mode::Erase => {
                self.regs.status |= READY;
                if v == CONFIRM {
                    self.erase(at);
                } else {
                    self.regs.status |= ERASE_ERROR | PROGRAM_ERROR;
                }
                self.regs.mode = Mode::Status;
            }
            Mode::BufferCount => {
                self.regs.left = u16::from(v) + 1;
                self.regs.buffer.clear();
                self.regs.mode = Mode::BufferFill;
            }
            Mode::BufferFill => {
                self.regs.buffer.push((at as u32, v));
                self.regs.left = self.regs.left.saturating_sub(1);
                if self.regs.left == 0 {
                    self.regs.mode = Mode::BufferConfirm;
                }
            }
            Mode::BufferConfirm => {
                let buffer = std::mem::take(&mut self.regs.buffer);
                if v == CONFIRM {
                    for (at, byte) in buffer {
                        self.program(at as usize, byte);
                    }
                } else {
                    self.regs.status |= ERASE_ERROR | PROGRAM_ERROR;
                }
                self.regs.mode = Mode::Status;
            }
            // Blocks have no locks: setting and clearing them is done at once.
            Mode::Lock => {
                self.regs.status |= READY;
                self.regs.mode = Mode::Status;
            }
        }
    }
}

impl MmioDevice for Flash {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        for (n, b) in data.iter_mut().enumerate() {
            *b = self.read_byte((offset as usize).saturating_add(n));
        }
    }
    /// Wider stores than the chip are stores of the first byte.
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        if let Some(v) = data.first() {
            self.write_byte(offset as usize, *v);
        }
    }
}

impl Lifecycle for Flash {
    fn unit(&self) -> &str {
        "flash"
    }
    fn start(&mut self) {}
    fn pause(&mut self) {
        self.settle();
    }
    fn drained(&mut self) -> bool {
        true
    }
    /// The chip's reset pin: the content stays.
    fn reset(&mut self) {
        self.settle();
        self.regs = Registers::default();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let Flash {
            regs,
            content,
            unsaved: _,
            store: _,
        } = self;
        let saved = Saved {
            regs: regs.clone(),
            content: content.clone(),
            digest: digest(content),
        };
        Ok(Section::new("flash", KIND, VERSION, &saved))
    }
    /// The content becomes that of the moment of saving, in the file as well.
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.regs = Registers::default();
        let saved: Saved = section.decode(KIND, VERSION)?;
        let invalid = |detail: String| StateError::Invalid {
            unit: "flash".into(),
            detail,
        };
        if saved.content.len() != self.content.len() {
            let (is, was) = (self.content.len(), saved.content.len());
            return Err(invalid(format!("{was} bytes, but this chip has {is}")));
        }
        if saved.regs.buffer.len() > BUFFER_BYTES || usize::from(saved.regs.left) > BUFFER_BYTES {
            return Err(invalid("a write buffer that is too long".into()));
        }
        if digest(&saved.content) != saved.digest {
            return Err(invalid("content that is damaged".into()));
        }
        let Saved { regs, content, .. } = saved;
        if content != self.content {
            self.content = content;
            self.touch(0, self.content.len());
            if !self.settle() {
                return Err(invalid(
                    "the file of the variables cannot be written".into(),
                ));
            }
        }
        self.regs = regs;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([
            ("bytes", Inspect::Uint(self.content.len() as u64)),
            ("mode", Inspect::Text(format!("{:?}", self.regs.mode))),
            ("status", Inspect::Hex(self.regs.status.into())),
            ("unsaved", Inspect::Bool(self.unsaved.is_some())),
        ])
    }
}
