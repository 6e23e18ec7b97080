//! A tablet: a pointer with an absolute position, five buttons and a wheel.

use std::collections::VecDeque;

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::Outcome;
use pyrite_state::Inspect;

use super::{Class, Common, CommonSaved, Kind, REPORTS};
use crate::usb::device::{Answer, Buffers, Bus, Heard, Input, Setup, Speed, UsbDevice};

/// Largest coordinate.
const MOST: u16 = 0x7fff;
/// LIMIT: positions that wait for the host. The last one follows the pointer when there are as many.
const QUEUE: usize = 16;

/// Report descriptor: a byte of buttons, two words of position, a byte of wheel.
#[rustfmt::skip]
const REPORT: [u8; 74] = [
    0x05, 0x01, 0x09, 0x02, 0xa1, 0x01,             // generic desktop: mouse
    0x09, 0x01, 0xa1, 0x00,                         // pointer, physical
    0x05, 0x09, 0x19, 0x01, 0x29, 0x05,             // five buttons
    0x15, 0x00, 0x25, 0x01, 0x95, 0x05, 0x75, 0x01, 0x81, 0x02,
    0x95, 0x01, 0x75, 0x03, 0x81, 0x01,
    0x05, 0x01, 0x09, 0x30, 0x09, 0x31,             // X and Y, absolute
    0x15, 0x00, 0x26, 0xff, 0x7f, 0x35, 0x00, 0x46, 0xff, 0x7f,
    0x75, 0x10, 0x95, 0x02, 0x81, 0x02,
    0x05, 0x01, 0x09, 0x38,                         // wheel, relative
    0x15, 0x81, 0x25, 0x7f, 0x35, 0x00, 0x45, 0x00, 0x75, 0x08, 0x95, 0x01, 0x81, 0x06,
    0xc0, 0xc0,
];

/// What the pointer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Place {
    #[n(0)]
    x: u16,
    #[n(1)]
    y: u16,
    #[n(2)]
    buttons: u8,
    /// Notches away from the user.
    #[n(3)]
    wheel: i8,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    common: CommonSaved,
    #[n(1)]
    waiting: VecDeque<Place>,
    #[n(2)]
    told: Place,
}

/// The tablet.
pub struct Tablet {
    common: Common,
    waiting: VecDeque<Place>,
    /// What the host was told last, without the wheel.
    told: Place,
}

impl Tablet {
    /// A tablet whose pointer is in the upper left corner.
    pub fn new() -> Tablet {
        Tablet {
            common: Common::new(Kind {
                product: "USB Tablet",
                boot: (0, 0),
                report: &REPORT,
                bytes: 6,
            }),
            waiting: VecDeque::new(),
            told: Place::default(),
        }
    }
}

impl Default for Tablet {
    fn default() -> Tablet {
        Tablet::new()
    }
}

fn report(p: &Place) -> [u8; 6] {
    let ([x0, x1], [y0, y1]) = (p.x.to_le_bytes(), p.y.to_le_bytes());
    [p.buttons, x0, x1, y0, y1, p.wheel as u8]
}

impl UsbDevice for Tablet {
    fn name(&self) -> &'static str {
        "tablet"
    }
    fn speed(&self) -> Speed {
        Speed::High
    }
    fn control(&mut self, setup: Setup, _: &[u8]) -> Option<Vec<u8>> {
        match self.common.control(setup) {
            Class::Data(d) => Some(d),
            Class::GetReport => Some(report(&self.told).to_vec()),
            // It has no output report.
            Class::SetReport | Class::Stall => None,
        }
    }
    fn transfer(&mut self, bus: Bus<'_>, endpoint: u8, buffers: &Buffers) -> Answer {
        if !self.common.core.is_open(endpoint) || self.common.core.is_halted(endpoint) {
            return Answer::Stall;
        }
        let due = self.common.deadline().is_some_and(|d| bus.now_ns >= d.0);
        let now = match self.waiting.pop_front() {
            Some(p) => p,
            None if due => self.told,
            None => return Answer::Wait,
        };
        self.told = Place { wheel: 0, ..now };
        self.common.told_ns = bus.now_ns;
        match buffers.write(bus.memory, &report(&now)) {
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
        let &Input::Pointer { x, y, dz, buttons } = event else {
            return Heard::NotMine;
        };
        if !self.common.core.is_open(REPORTS) {
            return Heard::NotMine;
        }
        let mut new = Place {
            x: x.min(MOST),
            y: y.min(MOST),
            buttons: buttons & 0x1f,
            wheel: dz.saturating_neg().clamp(-127, 127) as i8,
        };
        // Movement alone only says where the pointer is now.
        let full = self.waiting.len() >= QUEUE;
        match self.waiting.back_mut() {
            Some(last) if full || last.buttons == new.buttons => {
                new.wheel = last.wheel.saturating_add(new.wheel).max(-127);
                *last = new;
            }
            _ => self.waiting.push_back(new),
        }
        Heard::On(REPORTS)
    }
    fn wants_pointer(&self) -> bool {
        self.common.core.is_open(REPORTS)
    }
    fn reset(&mut self) {
        self.common.reset();
        self.waiting.clear();
        self.told = Place::default();
    }
    fn power_on(&mut self) {
        self.reset();
    }
    fn save(&self) -> Vec<u8> {
        let Tablet {
            common,
            waiting,
            told,
        } = self;
        let saved = Saved {
            common: common.save(),
            waiting: waiting.clone(),
            told: *told,
        };
        // Encoding into a Vec cannot fail.
        minicbor::to_vec(&saved).unwrap_or_default()
    }
    fn restore(&mut self, body: &[u8]) -> Result<(), String> {
        let saved: Saved = minicbor::decode(body).map_err(|e| format!("tablet: {e}"))?;
        let Saved {
            common,
            waiting,
            told,
        } = saved;
        if waiting.len() > QUEUE {
            return Err("tablet: more positions than it has room for".into());
        }
        self.common.restore(common);
        (self.waiting, self.told) = (waiting, told);
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([
            ("in_use", Inspect::Bool(self.common.core.is_configured())),
            ("x", Inspect::Uint(self.told.x.into())),
            ("y", Inspect::Uint(self.told.y.into())),
            ("buttons", Inspect::Uint(self.told.buttons.into())),
            ("waiting", Inspect::Uint(self.waiting.len() as u64)),
        ])
    }
}
