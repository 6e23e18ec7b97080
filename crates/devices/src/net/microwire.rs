//! A 93C46: an EEPROM of 64 words behind a serial port of four pins (Microwire).

use minicbor::{Decode, Encode};

/// Words of the EEPROM.
pub(super) const WORDS: usize = 64;
/// Bits of a command: start, operation, address.
const COMMAND_BITS: u32 = 9;
/// Start and operation of READ.
const READ: u32 = 0b110;

/// Where the port is in a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Microwire {
    /// The clock pin.
    #[n(0)]
    clock: bool,
    /// Rising clock edges since the start bit.
    #[n(1)]
    edges: u32,
    /// Bits shifted in.
    #[n(2)]
    shifted: u32,
    /// The data output.
    #[n(3)]
    out: bool,
}

impl Microwire {
    /// The pins change. Writing and erasing have no effect: the chip is protected.
    pub(super) fn pins(&mut self, words: &[u16; WORDS], select: bool, clock: bool, data: bool) {
        let rises = clock && !self.clock;
        self.clock = clock;
        if !select {
            *self = Microwire {
                clock,
                ..Microwire::default()
            };
            return;
        }
        if !rises {
            return;
        }
        if self.edges < COMMAND_BITS {
            // Zeroes before the start bit are no command.
            if self.edges == 0 && !data {
                return;
            }
            self.shifted = (self.shifted << 1 | u32::from(data)) & 0x1ff;
            self.edges += 1;
            self.out = false;
            return;
        }
        let n = self.edges - COMMAND_BITS;
        if self.shifted >> 6 == READ {
            let word = (self.shifted & 0x3f).wrapping_add(n / 16) as usize % WORDS;
            self.out = words[word] >> (15 - n % 16) & 1 != 0;
        } else {
            self.out = true; // ready
        }
        // A read goes on through all words.
        self.edges = COMMAND_BITS + (n + 1) % (16 * WORDS as u32);
    }

    /// The data output.
    pub(super) fn out(&self) -> bool {
        self.out
    }

    /// False for a saved state that no port could have.
    pub(super) fn valid(&self) -> bool {
        self.edges <= COMMAND_BITS + 16 * WORDS as u32
    }
}
