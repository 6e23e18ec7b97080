//! PS/2 mouse with wheel and five buttons ("IntelliMouse Explorer" extensions).

use std::collections::VecDeque;

use minicbor::{Decode, Encode};
use pyrite_state::Inspect;

/// Packets wait while this many bytes are queued; movement adds up meanwhile.
const PACKET_BYTES: usize = 16;
/// Room above that for answers to commands.
const QUEUE_BYTES: usize = 64;
/// LIMIT: movement that adds up, in counts.
const MOST_COUNTS: i32 = 1 << 16;

const ACK: u8 = 0xfa;
const ERROR: u8 = 0xfc;
const RESEND: u8 = 0xfe;
const PLAIN: u8 = 0;
const WHEEL: u8 = 3;
const FIVE_BUTTONS: u8 = 4;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Mouse {
    #[n(0)]
    queue: VecDeque<u8>,
    /// Data reporting is enabled.
    #[n(1)]
    is_reporting: bool,
    #[n(2)]
    is_remote: bool,
    /// Echo mode.
    #[n(3)]
    is_wrapping: bool,
    #[n(4)]
    scaling_2_1: bool,
    #[n(5)]
    resolution: u8,
    #[n(6)]
    sample_rate: u8,
    /// Device id: which extensions are on.
    #[n(7)]
    id: u8,
    /// The last three sample rates; magic sequences switch extensions on.
    #[n(8)]
    rates: [u8; 3],
    #[n(9)]
    pending: Option<u8>,
    /// Movement not reported yet: right, up, wheel.
    #[n(10)]
    moved: [i32; 3],
    #[n(11)]
    buttons: u8,
    /// Buttons as last reported.
    #[n(12)]
    told_buttons: u8,
}

impl Mouse {
    pub(super) fn power_on() -> Mouse {
        Mouse {
            queue: VecDeque::new(),
            is_reporting: false,
            is_remote: false,
            is_wrapping: false,
            scaling_2_1: false,
            resolution: 2,
            sample_rate: 100,
            id: PLAIN,
            rates: [0; 3],
            pending: None,
            moved: [0; 3],
            buttons: 0,
            told_buttons: 0,
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        self.queue.len() <= QUEUE_BYTES
            && matches!(self.id, PLAIN | WHEEL | FIVE_BUTTONS)
            && self
                .moved
                .iter()
                .all(|m| (-MOST_COUNTS..=MOST_COUNTS).contains(m))
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        let b = self.queue.pop_front();
        self.report();
        b.or_else(|| self.queue.pop_front())
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= QUEUE_BYTES {
            self.queue.extend(bytes);
        }
    }

    pub(super) fn moved(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        self.buttons = buttons & 0x1f;
        for (sum, d) in self.moved.iter_mut().zip([dx, dy.saturating_neg(), dz]) {
            *sum = sum.saturating_add(d).clamp(-MOST_COUNTS, MOST_COUNTS);
        }
        if !self.is_reporting || self.is_remote {
            // What happens while nobody listens is not told later.
            if !self.is_remote {
                self.moved = [0; 3];
            }
            return;
        }
        self.report();
    }

    /// Queues packets while there is something to tell and room.
    fn report(&mut self) {
        while self.is_reporting
            && !self.is_remote
            && !self.is_wrapping
            && self.queue.len() < PACKET_BYTES
            && (self.moved != [0; 3] || self.buttons != self.told_buttons)
        {
            self.packet();
        }
    }

    fn packet(&mut self) {
        let mut part = |n: usize, least: i32, most: i32| {
            let v = self.moved[n].clamp(least, most);
            self.moved[n] -= v;
            v
        };
        let (x, y) = (part(0, -255, 255), part(1, -255, 255));
        let z = if self.id == PLAIN {
            part(2, -MOST_COUNTS, MOST_COUNTS)
        } else {
            part(2, -8, 7)
        };
        self.told_buttons = self.buttons;
        let signs = u8::from(x < 0) << 4 | u8::from(y < 0) << 5;
        let mut bytes = vec![self.buttons & 7 | 0x08 | signs, x as u8, y as u8];
        match self.id {
            WHEEL => bytes.push(z as u8),
            FIVE_BUTTONS => bytes.push(z as u8 & 0x0f | (self.buttons & 0x18) << 1),
            _ => {}
        }
        self.answer(&bytes);
    }

    pub(super) fn command(&mut self, v: u8) {
        if self.is_wrapping && !matches!(v, 0xec | 0xff) {
            self.answer(&[v]);
            return;
        }
        match (self.pending.take(), v) {
            (Some(0xe8), 0..=3) => {
                self.resolution = v;
                self.answer(&[ACK]);
            }
            (Some(0xf3), 1..=200) => {
                self.set_sample_rate(v);
                self.answer(&[ACK]);
            }
            (Some(_), 0x00..=0xe0) => self.answer(&[ERROR]),
            (_, 0xe6 | 0xe7) => {
                self.scaling_2_1 = v == 0xe7;
                self.answer(&[ACK]);
            }
            (_, 0xe8 | 0xf3) => {
                self.pending = Some(v);
                self.answer(&[ACK]);
            }
            (_, 0xe9) => {
                let b = self.buttons;
                let status = u8::from(self.is_remote) << 6
                    | u8::from(self.is_reporting) << 5
                    | u8::from(self.scaling_2_1) << 4
                    | (b & 1) << 2
                    | (b & 4) >> 1
                    | (b & 2) >> 1;
                let (resolution, rate) = (self.resolution, self.sample_rate);
                self.answer(&[ACK, status, resolution, rate]);
            }
            (_, 0xea | 0xf0) => {
                self.is_remote = v == 0xf0;
                self.answer(&[ACK]);
            }
            (_, 0xeb) => {
                self.answer(&[ACK]);
                self.packet();
            }
            (_, 0xec | 0xee) => {
                self.is_wrapping = v == 0xee;
                self.answer(&[ACK]);
            }
            (_, 0xf2) => {
                let id = self.id;
                self.answer(&[ACK, id]);
            }
            (_, 0xf4 | 0xf5) => {
                self.is_reporting = v == 0xf4;
                self.moved = [0; 3];
                self.answer(&[ACK]);
            }
            (_, 0xf6) => {
                *self = Mouse {
                    id: self.id,
                    buttons: self.buttons,
                    ..Mouse::power_on()
                };
                self.answer(&[ACK]);
            }
            (_, 0xff) => {
                *self = Mouse {
                    buttons: self.buttons,
                    ..Mouse::power_on()
                };
                self.answer(&[ACK, 0xaa, PLAIN]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn set_sample_rate(&mut self, rate: u8) {
        self.sample_rate = rate;
        self.rates.rotate_left(1);
        self.rates[2] = rate;
        match self.rates {
            [200, 100, 80] if self.id == PLAIN => self.id = WHEEL,
            [200, 200, 80] if self.id == WHEEL => self.id = FIVE_BUTTONS,
            _ => {}
        }
    }

    pub(super) fn inspect(&self) -> Inspect {
        Inspect::node([
            ("reporting", Inspect::Bool(self.is_reporting)),
            ("id", Inspect::Uint(self.id.into())),
            ("sample_rate", Inspect::Uint(self.sample_rate.into())),
            ("queued", Inspect::Uint(self.queue.len() as u64)),
        ])
    }
}
