//! PS/2 keyboard with 101 keys and scan code sets 1 and 2.

use std::collections::VecDeque;

use minicbor::{Decode, Encode};
use pyrite_state::Inspect;

/// Bytes of keys that wait to be read. A real keyboard holds 16.
const KEY_BYTES: usize = 32;
/// Room above that for answers to commands.
const QUEUE_BYTES: usize = 64;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// The controller's translation of set 2 into set 1. Codes from 80H on stand for themselves,
/// except 83H (F7) and 84H (SysRq).
#[rustfmt::skip]
const SET1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

pub(super) fn set1_of_set2(code: u8) -> u8 {
    match code {
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET1.get(usize::from(code)).copied().unwrap_or(code),
    }
}

fn set2_of_set1(code: u8) -> Option<u8> {
    match code {
        0x41 => Some(0x83),
        0x54 => Some(0x84),
        _ => SET1.iter().position(|c| *c == code).map(|n| n as u8),
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Keyboard {
    #[n(0)]
    queue: VecDeque<u8>,
    #[n(1)]
    scan_set: u8,
    #[n(2)]
    is_scanning: bool,
    #[n(3)]
    leds: u8,
    #[n(4)]
    typematic: u8,
    /// Command that waits for its data byte.
    #[n(5)]
    pending: Option<u8>,
    /// For Resend.
    #[n(6)]
    last_sent: u8,
}

impl Keyboard {
    pub(super) fn power_on() -> Keyboard {
        Keyboard {
            queue: VecDeque::new(),
            scan_set: 2,
            is_scanning: true,
            leds: 0,
            typematic: 0x2b,
            pending: None,
            last_sent: SELF_TEST_PASSED,
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        self.queue.len() <= QUEUE_BYTES && matches!(self.scan_set, 1 | 2)
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        let b = self.queue.pop_front()?;
        if b != RESEND {
            self.last_sent = b;
        }
        Some(b)
    }

    fn answer(&mut self, bytes: &[u8]) {
        // LIMIT: QUEUE_BYTES; a guest that commands without reading loses answers.
        if self.queue.len() + bytes.len() <= QUEUE_BYTES {
            self.queue.extend(bytes);
        }
    }

    pub(super) fn key(&mut self, code: u16, is_down: bool) -> bool {
        if !self.is_scanning {
            return true;
        }
        let Some(bytes) = self.scan_codes(code, is_down) else {
            return true;
        };
        // LIMIT: KEY_BYTES; a key goes in whole or not at all.
        if self.queue.len() + bytes.len() > KEY_BYTES {
            return false;
        }
        self.queue.extend(bytes);
        true
    }

    fn scan_codes(&self, code: u16, is_down: bool) -> Option<Vec<u8>> {
        let [prefix, key] = code.to_be_bytes();
        if prefix == 0xe1 {
            // Pause sends make and break together when it goes down.
            let bytes: &[u8] = match (is_down, self.scan_set) {
                (false, _) => &[],
                (true, 1) => &[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5],
                (true, _) => &[0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77],
            };
            return Some(bytes.to_vec());
        }
        let mut out = Vec::with_capacity(3);
        if prefix == 0xe0 {
            out.push(0xe0);
        }
        if key == 0 || key >= 0x80 {
            return None;
        }
        if self.scan_set == 1 {
            out.push(if is_down { key } else { key | 0x80 });
        } else {
            if !is_down {
                out.push(0xf0);
            }
            out.push(set2_of_set1(key)?);
        }
        Some(out)
    }

    pub(super) fn command(&mut self, v: u8) {
        match (self.pending.take(), v) {
            (Some(0xed), leds) if leds < 0x80 => {
                self.leds = leds & 7;
                self.answer(&[ACK]);
            }
            (Some(0xf0), 0) => {
                let set = self.scan_set;
                self.answer(&[ACK, set]);
            }
            (Some(0xf0), set @ 1..=2) => {
                self.scan_set = set;
                self.answer(&[ACK]);
            }
            (Some(0xf3), rate) if rate < 0x80 => {
                self.typematic = rate;
                self.answer(&[ACK]);
            }
            (_, 0xed | 0xf0 | 0xf3) => {
                self.pending = Some(v);
                self.answer(&[ACK]);
            }
            (_, 0xee) => self.answer(&[0xee]),
            (_, 0xf2) => self.answer(&[ACK, 0xab, 0x83]),
            (_, 0xf4) => {
                self.queue.clear();
                self.is_scanning = true;
                self.answer(&[ACK]);
            }
            (_, 0xf5 | 0xf6) => {
                *self = Keyboard {
                    is_scanning: v == 0xf6,
                    leds: self.leds,
                    ..Keyboard::power_on()
                };
                self.answer(&[ACK]);
            }
            (_, 0xfe) => {
                let b = self.last_sent;
                self.answer(&[b]);
            }
            (_, 0xff) => {
                *self = Keyboard::power_on();
                self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            // Scan code set 3 and what only it has are not offered.
            _ => self.answer(&[RESEND]),
        }
    }

    pub(super) fn inspect(&self) -> Inspect {
        Inspect::node([
            ("scan_set", Inspect::Uint(self.scan_set.into())),
            ("scanning", Inspect::Bool(self.is_scanning)),
            ("leds", Inspect::Hex(self.leds.into())),
            ("queued", Inspect::Uint(self.queue.len() as u64)),
        ])
    }
}
