//! The PHY of an 82540EM (an 88E1000 on the die) and the content of its EEPROM.

use minicbor::{Decode, Encode};

use crate::net::Mac;
use crate::net::microwire::WORDS;

/// The words add up to this. 8254x manual §5.6.35.
const CHECKSUM: u16 = 0xbaba;

/// PHY registers, IEEE 802.3 §22.2.4 and 8254x manual §13.5.
const PHY_CONTROL: usize = 0;
const PHY_STATUS: usize = 1;
const PHY_SPECIFIC_STATUS: usize = 17;
const CONTROL_RESET: u16 = 1 << 15;
const CONTROL_LOOPBACK: u16 = 1 << 14;
const CONTROL_POWER_DOWN: u16 = 1 << 11;
const CONTROL_RESTART: u16 = 1 << 9;
const STATUS_ANEG_DONE: u16 = 1 << 5;
const STATUS_LINK: u16 = 1 << 2;
/// Resolved: 1000 Mb/s, full duplex.
const SPECIFIC_RESOLVED: u16 = 0xac00;
const SPECIFIC_LINK: u16 = 1 << 10;

/// Content of the EEPROM of a card with this address. §5.6.
pub(super) fn eeprom(mac: Mac) -> [u16; WORDS] {
    let mut words = [0xffff; WORDS];
    for (word, pair) in words.iter_mut().zip(mac.as_chunks::<2>().0) {
        *word = u16::from_le_bytes(*pair);
    }
    words[0x03] = 0; // compatibility
    words[0x08] = 0x3000; // board number
    words[0x09] = 0x1000;
    words[0x0a] = 0x6403; // initialisation control 1: IDs come from here
    words[0x0b] = super::SUBSYSTEM_ID;
    words[0x0c] = super::VENDOR_ID;
    words[0x0d] = super::DEVICE_ID;
    words[0x0e] = super::VENDOR_ID;
    words[0x0f] = 0x3040; // initialisation control 2
    words[0x10] = 0x0008;
    words[0x11] = 0x2000;
    words[0x12] = 0x7e14;
    words[0x13] = 0x0048;
    words[0x14] = 0x1000;
    words[0x15] = 0x00d8;
    words[0x16] = 0x0000;
    words[0x17] = 0x2700;
    words[0x18] = 0x6cc9;
    words[0x19] = 0x3150;
    words[0x1a] = 0x0722;
    words[0x1b] = 0x040b;
    words[0x1c] = 0x0984;
    words[0x1e] = 0xc000;
    words[0x1f] = 0x0706;
    words[0x20] = 0x1008;
    words[0x21] = 0x0000;
    words[0x22] = 0x0f04;
    words[0x23] = 0x7fff;
    words[0x24] = 0x4d01;
    let sum = words[..WORDS - 1]
        .iter()
        .fold(0, |sum: u16, w| sum.wrapping_add(*w));
    words[WORDS - 1] = CHECKSUM.wrapping_sub(sum);
    words
}

/// The address in an EEPROM.
pub(super) fn eeprom_mac(words: &[u16; WORDS]) -> Mac {
    let [a, b] = words[0].to_le_bytes();
    let [c, d] = words[1].to_le_bytes();
    let [e, f] = words[2].to_le_bytes();
    [a, b, c, d, e, f]
}

/// Registers of the PHY.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub(super) struct Phy {
    #[n(0)]
    registers: Vec<u16>,
}

/// Values after reset.
const PHY_RESET: [u16; 32] = [
    0x1140, 0x7949, 0x0141, 0x0c20, 0x0de1, 0x45e1, 0x0001, 0x2001, //
    0x0000, 0x0e00, 0x3c00, 0x0000, 0x0000, 0x0000, 0x0000, 0x3000, //
    0x0360, 0x0000, 0x0000, 0x0000, 0x0d60, 0x0000, 0x0000, 0x0000, //
    0x4100, 0x0000, 0x000a, 0x848b, 0x0000, 0x0000, 0x0000, 0x0000,
];
/// Bits that the driver can set.
const PHY_WRITABLE: [u16; 32] = [
    0x7dff, 0, 0, 0, 0xffff, 0, 0, 0xffff, 0, 0xffff, 0, 0, 0, 0, 0, 0, //
    0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff,
    0xffff, 0xffff, 0xffff,
];

impl Phy {
    pub(super) fn new() -> Phy {
        Phy {
            registers: PHY_RESET.to_vec(),
        }
    }

    pub(super) fn valid(&self) -> bool {
        self.registers.len() == PHY_RESET.len()
    }

    fn control(&self) -> u16 {
        self.registers.first().copied().unwrap_or(0)
    }

    /// Frames come back where they went in.
    pub(super) fn loops_back(&self) -> bool {
        self.control() & CONTROL_LOOPBACK != 0
    }

    /// True if the PHY has a link over a cable that is plugged in.
    pub(super) fn link(&self, cable: bool) -> bool {
        (cable || self.loops_back()) && self.control() & CONTROL_POWER_DOWN == 0
    }

    pub(super) fn read(&self, register: usize, cable: bool) -> u16 {
        let value = self.registers.get(register).copied().unwrap_or(0);
        let link = self.link(cable);
        match register {
            PHY_STATUS if link => value | STATUS_LINK | STATUS_ANEG_DONE,
            PHY_SPECIFIC_STATUS if link => SPECIFIC_RESOLVED | SPECIFIC_LINK,
            _ => value,
        }
    }

    /// True if the link may have changed. Negotiation takes no time.
    pub(super) fn write(&mut self, register: usize, value: u16) -> bool {
        if register == PHY_CONTROL && value & CONTROL_RESET != 0 {
            *self = Phy::new();
            return true;
        }
        let (Some(r), Some(mask)) = (self.registers.get_mut(register), PHY_WRITABLE.get(register))
        else {
            return false;
        };
        *r = (*r & !mask) | (value & mask);
        let changes = CONTROL_RESTART | CONTROL_LOOPBACK | CONTROL_POWER_DOWN;
        register == PHY_CONTROL && value & changes != 0
    }
}
