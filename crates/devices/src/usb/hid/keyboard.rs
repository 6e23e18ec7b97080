//! A keyboard that a BIOS can use: eight bytes with the modifiers and six keys. HID appendix B.

use std::collections::VecDeque;

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::Outcome;
use pyrite_state::Inspect;

use super::{Class, Common, CommonSaved, Kind, REPORTS};
use crate::usb::device::{Answer, Buffers, Bus, Heard, Input, Setup, Speed, UsbDevice};

/// LIMIT: key changes that wait for the host.
const QUEUE: usize = 16;
/// LIMIT: keys held that are kept count of.
const HELD: usize = 32;
/// Keys of a report.
const KEYS: usize = 6;
/// Stands in every place of a report if more keys are held than it has places for.
const ROLL_OVER: u8 = 1;
/// First usage of the modifiers: left control.
const MODIFIERS: u8 = 0xe0;

/// Report descriptor: the one of HID appendix B.1, with keys up to 255.
#[rustfmt::skip]
const REPORT: [u8; 65] = [
    0x05, 0x01, 0x09, 0x06, 0xa1, 0x01,             // generic desktop: keyboard
    0x05, 0x07, 0x19, 0xe0, 0x29, 0xe7,             // modifiers
    0x15, 0x00, 0x25, 0x01, 0x75, 0x01, 0x95, 0x08, 0x81, 0x02,
    0x95, 0x01, 0x75, 0x08, 0x81, 0x01,             // a reserved byte
    0x95, 0x05, 0x75, 0x01, 0x05, 0x08, 0x19, 0x01, 0x29, 0x05, 0x91, 0x02, // five LEDs
    0x95, 0x01, 0x75, 0x03, 0x91, 0x01,
    0x95, 0x06, 0x75, 0x08, 0x15, 0x00, 0x26, 0xff, 0x00, // six keys
    0x05, 0x07, 0x19, 0x00, 0x2a, 0xff, 0x00, 0x81, 0x00,
    0xc0,
];

/// Usages of the make codes 01H to 58H. Keyboard page, 0 = there is no such key.
#[rustfmt::skip]
const PLAIN: [u8; 0x59] = [
    0x00, 0x29, 0x1e, 0x1f, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x2d, 0x2e, 0x2a, 0x2b,
    0x14, 0x1a, 0x08, 0x15, 0x17, 0x1c, 0x18, 0x0c, 0x12, 0x13, 0x2f, 0x30, 0x28, 0xe0, 0x04, 0x16,
    0x07, 0x09, 0x0a, 0x0b, 0x0d, 0x0e, 0x0f, 0x33, 0x34, 0x35, 0xe1, 0x31, 0x1d, 0x1b, 0x06, 0x19,
    0x05, 0x11, 0x10, 0x36, 0x37, 0x38, 0xe5, 0x55, 0xe2, 0x2c, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e,
    0x3f, 0x40, 0x41, 0x42, 0x43, 0x53, 0x47, 0x5f, 0x60, 0x61, 0x56, 0x5c, 0x5d, 0x5e, 0x57, 0x59,
    0x5a, 0x5b, 0x62, 0x63, 0x46, 0x00, 0x64, 0x44, 0x45,
];

/// Usages of the other make codes.
#[rustfmt::skip]
const OTHER: [(u16, u8); 28] = [
    (0x59, 0x67), (0x70, 0x88), (0x73, 0x87), (0x79, 0x8a), (0x7b, 0x8b), (0x7d, 0x89),
    (0xe01c, 0x58), (0xe01d, 0xe4), (0xe020, 0x7f), (0xe02e, 0x81), (0xe030, 0x80), (0xe035, 0x54),
    (0xe037, 0x46), (0xe038, 0xe6), (0xe047, 0x4a), (0xe048, 0x52), (0xe049, 0x4b), (0xe04b, 0x50),
    (0xe04d, 0x4f), (0xe04f, 0x4d), (0xe050, 0x51), (0xe051, 0x4e), (0xe052, 0x49), (0xe053, 0x4c),
    (0xe05b, 0xe3), (0xe05c, 0xe7), (0xe05d, 0x65), (0xe11d, 0x48),
];

/// The usage of a key; `None` if a keyboard has none.
fn usage(code: u16) -> Option<u8> {
    let plain = PLAIN.get(usize::from(code)).copied();
    let other = || OTHER.iter().find(|(c, _)| *c == code).map(|(_, u)| *u);
    plain.or_else(other).filter(|u| *u != 0)
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    common: CommonSaved,
    #[n(1)]
    waiting: VecDeque<(u8, bool)>,
    #[cbor(n(2), with = "minicbor::bytes")]
    held: Vec<u8>,
    #[n(3)]
    modifiers: u8,
    #[n(4)]
    leds: u8,
}

/// The keyboard.
pub struct Keyboard {
    common: Common,
    /// Changes that the host has not been told of: usage, and down.
    waiting: VecDeque<(u8, bool)>,
    /// Usages of the keys held, as told, without modifiers.
    held: Vec<u8>,
    modifiers: u8,
    leds: u8,
}

impl Keyboard {
    /// A keyboard on which nothing is held.
    pub fn new() -> Keyboard {
        Keyboard {
            common: Common::new(Kind {
                product: "USB Keyboard",
                boot: (1, 1),
                report: &REPORT,
                bytes: 8,
            }),
            waiting: VecDeque::new(),
            held: Vec::new(),
            modifiers: 0,
            leds: 0,
        }
    }

    fn report(&self) -> [u8; 8] {
        let mut r = [0; 8];
        r[0] = self.modifiers;
        if self.held.len() > KEYS {
            r[2..].fill(ROLL_OVER);
        } else {
            r[2..2 + self.held.len()].copy_from_slice(&self.held);
        }
        r
    }

    fn change(&mut self, usage: u8, is_down: bool) {
        if usage >= MODIFIERS {
            let bit = 1 << (usage & 7);
            self.modifiers = self.modifiers & !bit | if is_down { bit } else { 0 };
            return;
        }
        self.held.retain(|u| *u != usage);
        if is_down && self.held.len() < HELD {
            self.held.push(usage);
        }
    }
}

impl Default for Keyboard {
    fn default() -> Keyboard {
        Keyboard::new()
    }
}

impl UsbDevice for Keyboard {
    fn name(&self) -> &'static str {
        "keyboard"
    }
    fn speed(&self) -> Speed {
        Speed::High
    }
    fn control(&mut self, setup: Setup, data: &[u8]) -> Option<Vec<u8>> {
        match self.common.control(setup) {
            Class::Data(d) => Some(d),
            Class::GetReport => Some(self.report().to_vec()),
            Class::SetReport => {
                self.leds = data.first().copied()?;
                Some(Vec::new())
            }
            Class::Stall => None,
        }
    }
    fn transfer(&mut self, bus: Bus<'_>, endpoint: u8, buffers: &Buffers) -> Answer {
        if !self.common.core.is_open(endpoint) || self.common.core.is_halted(endpoint) {
            return Answer::Stall;
        }
        let due = self.common.deadline().is_some_and(|d| bus.now_ns >= d.0);
        match self.waiting.pop_front() {
            Some((usage, is_down)) => self.change(usage, is_down),
            None if due => {}
            None => return Answer::Wait,
        }
        self.common.told_ns = bus.now_ns;
        match buffers.write(bus.memory, &self.report()) {
            Ok(n) => Answer::Moved(n),
            Err(_) => Answer::Fault,
        }
    }
    fn finished(&mut self, _: Bus<'_>, _: u8, _: &Buffers, _: &Outcome) -> Answer {
        Answer::Stall // it gives no work
    }
    fn deadline(&self) -> Option<(u64, u8)> {
        self.common.deadline()
    }
    fn input(&mut self, event: &Input) -> Heard {
        let &Input::Key { code, is_down } = event else {
            return Heard::NotMine;
        };
        if !self.common.core.is_open(REPORTS) {
            return Heard::NotMine;
        }
        if self.waiting.len() >= QUEUE {
            return Heard::Full;
        }
        // A key that no USB keyboard has is on no other one of this machine either.
        if let Some(usage) = usage(code) {
            self.waiting.push_back((usage, is_down));
        }
        Heard::On(REPORTS)
    }
    fn reset(&mut self) {
        self.common.reset();
        self.waiting.clear();
        self.held.clear();
        (self.modifiers, self.leds) = (0, 0);
    }
    fn power_on(&mut self) {
        self.reset();
    }
    fn save(&self) -> Vec<u8> {
        let Keyboard {
            common,
            waiting,
            held,
            modifiers,
            leds,
        } = self;
        let saved = Saved {
            common: common.save(),
            waiting: waiting.clone(),
            held: held.clone(),
            modifiers: *modifiers,
            leds: *leds,
        };
        // Encoding into a Vec cannot fail.
        minicbor::to_vec(&saved).unwrap_or_default()
    }
    fn restore(&mut self, body: &[u8]) -> Result<(), String> {
        let saved: Saved = minicbor::decode(body).map_err(|e| format!("keyboard: {e}"))?;
        let Saved {
            common,
            waiting,
            held,
            modifiers,
            leds,
        } = saved;
        if waiting.len() > QUEUE || held.len() > HELD {
            return Err("keyboard: more keys than it has room for".into());
        }
        self.common.restore(common);
        (self.waiting, self.held) = (waiting, held);
        (self.modifiers, self.leds) = (modifiers, leds);
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([
            ("in_use", Inspect::Bool(self.common.core.is_configured())),
            ("waiting", Inspect::Uint(self.waiting.len() as u64)),
            ("leds", Inspect::Uint(self.leds.into())),
        ])
    }
}
