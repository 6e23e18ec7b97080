//! Ports of the root hub. §4.19 and §5.4.8.

use minicbor::{Decode, Encode};

use crate::usb::device::Speed;

/// Port status and control, §5.4.8.
pub(super) const CONNECTED: u32 = 1 << 0;
pub(super) const ENABLED: u32 = 1 << 1;
const RESET: u32 = 1 << 4;
const LINK: u32 = 0xf << 5;
const POWER: u32 = 1 << 9;
const SPEED: u32 = 0xf << 10;
const LINK_WRITE: u32 = 1 << 16;
const CONNECT_CHANGE: u32 = 1 << 17;
const ENABLE_CHANGE: u32 = 1 << 18;
const WARM_RESET_CHANGE: u32 = 1 << 19;
const RESET_CHANGE: u32 = 1 << 21;
const LINK_CHANGE: u32 = 1 << 22;
/// Bits that are cleared by writing 1.
const CHANGES: u32 = 0x7f << 17;
const WARM_RESET: u32 = 1 << 31;
/// Indicators, and what wakes the system.
const PLAIN: u32 = 3 << 14 | 7 << 25;

/// Link states, table 5-27.
mod link {
    pub const U0: u32 = 0;
    pub const U3: u32 = 3;
    pub const DISABLED: u32 = 4;
    pub const RX_DETECT: u32 = 5;
    pub const POLLING: u32 = 7;
    pub const RESUME: u32 = 15;
}

/// A port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Port {
    #[n(0)]
    pub status: u32,
    /// Power management status and control, which has no effect.
    #[n(1)]
    pub power: u32,
    /// A reset waits until nothing of the device is under way; `Some(true)`: a warm one.
    #[n(2)]
    pub resets: Option<bool>,
}

impl Port {
    /// After a reset of the controller, with what is plugged in.
    pub(super) fn power_on(device: Option<Speed>) -> Port {
        let mut p = Port {
            status: POWER,
            ..Port::default()
        };
        match device {
            None => p.set_link(link::RX_DETECT),
            Some(speed) => {
                p.status |= CONNECTED | CONNECT_CHANGE | (speed as u32) << 10;
                p.trained(speed);
            }
        }
        p
    }

    fn set_link(&mut self, state: u32) {
        self.status = self.status & !LINK | state << 5;
    }

    fn link(&self) -> u32 {
        (self.status & LINK) >> 5
    }

    /// What a port does by itself with a device: that of USB 3 is enabled, that of USB 2 waits for
    /// a reset.
    fn trained(&mut self, speed: Speed) {
        match speed {
            Speed::High => self.set_link(link::POLLING),
            Speed::Super => {
                self.status |= ENABLED;
                self.set_link(link::U0);
            }
        }
    }

    fn speed(&self) -> Speed {
        match (self.status & SPEED) >> 10 {
            4 => Speed::Super,
            _ => Speed::High,
        }
    }

    pub(super) fn has_changes(&self) -> bool {
        self.status & CHANGES != 0
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.status & ENABLED != 0
    }

    pub(super) fn read(&self) -> u32 {
        let resets = self.resets.map_or(0, |_| RESET);
        self.status | resets
    }

    /// `true`: a change is to be told.
    pub(super) fn write(&mut self, value: u32, mask: u32) -> bool {
        let v = value & mask;
        self.status &= !(v & CHANGES);
        let kept = self.status & CHANGES;
        self.status = self.status & !(PLAIN & mask) | v & PLAIN;
        if self.status & CONNECTED == 0 {
            return false;
        }
        let warm = v & WARM_RESET != 0 && self.speed() == Speed::Super;
        if warm || v & RESET != 0 {
            self.resets = Some(warm);
            return false;
        }
        if v & ENABLED != 0 && self.is_enabled() {
            self.status &= !ENABLED;
            self.set_link(match self.speed() {
                Speed::High => link::POLLING,
                Speed::Super => link::DISABLED,
            });
        }
        if v & LINK_WRITE != 0 {
            self.move_link(v >> 5 & 0xf);
        }
        self.status & CHANGES & !kept != 0
    }

    fn move_link(&mut self, to: u32) {
        match (self.link(), to) {
            (link::U3 | link::RESUME, link::U0) => {
                self.set_link(link::U0);
                self.status |= LINK_CHANGE;
            }
            (link::U0, link::U3) if self.is_enabled() => self.set_link(link::U3),
            (link::U3, link::RESUME) if self.speed() == Speed::High => {
                self.set_link(link::RESUME);
            }
            (link::U0, link::DISABLED) if self.speed() == Speed::Super => {
                self.status &= !ENABLED;
                self.set_link(link::DISABLED);
            }
            (link::DISABLED, link::RX_DETECT) => {
                self.trained(self.speed());
                self.status |= ENABLE_CHANGE;
            }
            _ => {}
        }
    }

    /// The reset that was waited for is over.
    pub(super) fn reset_done(&mut self, warm: bool) {
        self.resets = None;
        self.status |= ENABLED | RESET_CHANGE;
        if warm {
            self.status |= WARM_RESET_CHANGE;
        }
        self.set_link(link::U0);
    }
}
