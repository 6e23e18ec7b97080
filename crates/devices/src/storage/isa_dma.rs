//! The two 8237 DMA controllers of a PC, with their page registers.
//!
//! ```text
//! 00-0F  channels 0-3, bytes        81 82 83 87  pages of channels 2 3 1 0
//! C0-DF  channels 4-7, words        89 8A 8B 8F  pages of channels 6 7 5 (4)
//! ```
//!
//! Intel 8237A data sheet. Channel 4 is the cascade. There is no bus to arbitrate: a device asks
//! for its data and gets or gives them at once.

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::{Bus, BusOverlap};
use pyrite_vdev::{Lifecycle, PioDevice};

const KIND: &str = "isa-dma";
const VERSION: u16 = 1;

/// Command register: controller disable.
const COMMAND_DISABLE: u8 = 1 << 2;
/// Mode register: transfer type, autoinitialise, address decrement.
const MODE_TYPE: u8 = 3 << 2;
const MODE_AUTO: u8 = 1 << 4;
const MODE_DOWN: u8 = 1 << 5;
/// Transfer types, seen from memory.
const TYPE_WRITE: u8 = 1 << 2;
const TYPE_READ: u8 = 2 << 2;

/// Which way data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaDirection {
    /// From the device to memory.
    ToMemory,
    /// From memory to the device.
    FromMemory,
    /// The device checks only; memory is not touched.
    Verify,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Channel {
    #[n(0)]
    base_address: u16,
    #[n(1)]
    base_count: u16,
    #[n(2)]
    address: u16,
    /// Transfers left, less one.
    #[n(3)]
    count: u16,
    #[n(4)]
    mode: u8,
    #[n(5)]
    page: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Controller {
    #[n(0)]
    channels: [Channel; 4],
    #[n(1)]
    command: u8,
    /// Channels that reached their last transfer.
    #[n(2)]
    done: u8,
    #[n(3)]
    mask: u8,
    /// The next byte of an address or count is the high one.
    #[n(4)]
    high: bool,
}

impl Default for Controller {
    fn default() -> Self {
        Controller {
            channels: [Channel::default(); 4],
            command: 0,
            done: 0,
            mask: 0xf,
            high: false,
        }
    }
}

impl Controller {
    fn master_clear(&mut self) {
        self.command = 0;
        self.done = 0;
        self.mask = 0xf;
        self.high = false;
    }

    fn read(&mut self, register: u16) -> u8 {
        match register {
            0..=7 => {
                let c = &self.channels[usize::from(register >> 1)];
                let v = if register & 1 == 0 {
                    c.address
                } else {
                    c.count
                };
                let high = self.high;
                self.high = !high;
                v.to_le_bytes()[usize::from(high)]
            }
            8 => std::mem::take(&mut self.done),
            0xf => self.mask | 0xf0,
            _ => 0,
        }
    }

    fn write(&mut self, register: u16, v: u8) {
        let chosen = usize::from(v & 3);
        match register {
            0..=7 => {
                let high = self.high;
                self.high = !high;
                let c = &mut self.channels[usize::from(register >> 1)];
                let base = if register & 1 == 0 {
                    &mut c.base_address
                } else {
                    &mut c.base_count
                };
                let mut b = base.to_le_bytes();
                b[usize::from(high)] = v;
                *base = u16::from_le_bytes(b);
                // Both registers take each byte.
                c.address = c.base_address;
                c.count = c.base_count;
            }
            8 => self.command = v,
            // Software requests are for memory to memory, which a PC does not have.
            9 => {}
            0xa if v & 4 != 0 => self.mask |= 1 << chosen,
            0xa => self.mask &= !(1 << chosen),
            0xb => self.channels[chosen].mode = v,
            0xc => self.high = false,
            0xd => self.master_clear(),
            0xe => self.mask = 0,
            _ => self.mask = v & 0xf,
        }
    }
}

/// The controllers.
pub struct IsaDma {
    memory: Arc<GuestMemory>,
    controllers: [Controller; 2],
    /// Page registers without a channel: only remembered.
    spare: [u8; 16],
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    controllers: [Controller; 2],
    #[n(1)]
    spare: [u8; 16],
}

/// The channel of a page register.
fn page_channel(port: u16) -> Option<(usize, usize)> {
    Some(match port {
        0x87 => (0, 0),
        0x83 => (0, 1),
        0x81 => (0, 2),
        0x82 => (0, 3),
        0x8b => (1, 1),
        0x89 => (1, 2),
        0x8a => (1, 3),
        _ => return None,
    })
}

impl IsaDma {
    /// Controllers in their power-on state.
    pub fn new(memory: Arc<GuestMemory>) -> Arc<Mutex<IsaDma>> {
        Arc::new(Mutex::new(IsaDma {
            memory,
            controllers: [Controller::default(), Controller::default()],
            spare: [0; 16],
        }))
    }

    /// Puts them on the port bus.
    pub fn register(this: &Arc<Mutex<IsaDma>>, io: &Bus<dyn PioDevice>) -> Result<(), BusOverlap> {
        for (start, len) in [
            (0x00, 0x10),
            (0x81, 3),
            (0x87, 1),
            (0x89, 3),
            (0x8f, 1),
            (0xc0, 0x20),
        ] {
            io.insert(start, len, "isa-dma", this.clone())?;
        }
        Ok(())
    }

    /// Moves data between a device and memory by channel `channel` (0 to 3, bytes), until either
    /// has no more. How many bytes were moved, and whether the channel reached its end (TC).
    /// Without a channel that is programmed for it nothing moves.
    pub fn transfer(
        &mut self,
        channel: usize,
        direction: DmaDirection,
        data: &mut [u8],
    ) -> (usize, bool) {
        let controller = &mut self.controllers[0];
        let masked = controller.mask >> channel & 1 != 0;
        let Some(c) = controller.channels.get_mut(channel) else {
            return (0, false);
        };
        let wanted = match direction {
            DmaDirection::ToMemory => TYPE_WRITE,
            DmaDirection::FromMemory => TYPE_READ,
            DmaDirection::Verify => 0,
        };
        // A channel that only verifies goes with any device.
        let kind = c.mode & MODE_TYPE;
        if masked || controller.command & COMMAND_DISABLE != 0 || (kind != wanted && kind != 0) {
            return (0, false);
        }
        let n = data.len().min(usize::from(c.count) + 1);
        let mut at = 0;
        while at < n {
            // The address wraps in its page.
            let gpa = u64::from(c.page) << 16 | u64::from(c.address);
            let piece = if c.mode & MODE_DOWN != 0 {
                1
            } else {
                (n - at).min(0x1_0000 - usize::from(c.address))
            };
            let part = &mut data[at..at + piece];
            // What is no RAM reads as ones and takes nothing.
            match kind {
                TYPE_WRITE => drop(self.memory.write(gpa, part)),
                TYPE_READ if self.memory.read(gpa, part).is_err() => part.fill(0xff),
                _ => {}
            }
            c.address = if c.mode & MODE_DOWN != 0 {
                c.address.wrapping_sub(1)
            } else {
                c.address.wrapping_add(piece as u16)
            };
            at += piece;
        }
        let ended = n == usize::from(c.count) + 1;
        c.count = c.count.wrapping_sub(n as u16);
        if ended {
            controller.done |= 1 << channel;
            if c.mode & MODE_AUTO != 0 {
                c.address = c.base_address;
                c.count = c.base_count;
            } else {
                controller.mask |= 1 << channel;
            }
        }
        (n, ended)
    }

    fn read(&mut self, port: u16) -> u8 {
        match port {
            0x00..=0x0f => self.controllers[0].read(port),
            0xc0..=0xdf => self.controllers[1].read((port - 0xc0) >> 1),
            _ => match page_channel(port) {
                Some((n, c)) => self.controllers[n].channels[c].page,
                None => self.spare[usize::from(port & 0xf)],
            },
        }
    }

    fn write(&mut self, port: u16, v: u8) {
        match port {
            0x00..=0x0f => self.controllers[0].write(port, v),
            0xc0..=0xdf => self.controllers[1].write((port - 0xc0) >> 1, v),
            _ => match page_channel(port) {
                Some((n, c)) => self.controllers[n].channels[c].page = v,
                None => self.spare[usize::from(port & 0xf)] = v,
            },
        }
    }
}

impl PioDevice for IsaDma {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        for (at, b) in (port..).zip(data) {
            *b = self.read(at);
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        for (at, b) in (port..).zip(data) {
            self.write(at, *b);
        }
    }
}

impl Lifecycle for IsaDma {
    fn unit(&self) -> &str {
        "isa-dma"
    }
    passive!();
    fn reset(&mut self) {
        self.controllers = [Controller::default(), Controller::default()];
        self.spare = [0; 16];
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let IsaDma {
            memory: _,
            controllers,
            spare,
        } = self;
        let saved = Saved {
            controllers: controllers.clone(),
            spare: *spare,
        };
        Ok(Section::new("isa-dma", KIND, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let Saved { controllers, spare } = section
            .decode(KIND, VERSION)
            .inspect_err(|_| self.reset())?;
        self.controllers = controllers;
        for c in &mut self.controllers {
            c.mask &= 0xf;
            c.done &= 0xf;
        }
        self.spare = spare;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let channels = self.controllers[0]
            .channels
            .iter()
            .enumerate()
            .map(|(n, c)| {
                let node = Inspect::node([
                    ("page", Inspect::Hex(c.page.into())),
                    ("address", Inspect::Hex(c.address.into())),
                    ("count", Inspect::Uint(c.count.into())),
                    ("mode", Inspect::Hex(c.mode.into())),
                ]);
                (n.to_string(), node)
            });
        Inspect::node([
            ("mask", Inspect::Hex(self.controllers[0].mask.into())),
            ("channels", Inspect::Node(channels.collect())),
        ])
    }
}

#[cfg(test)]
mod tests {
    use pyrite_vdev::conformance::{self, Target, fuzz_device, pseudo_random};

    use super::*;

    fn dma() -> (Arc<GuestMemory>, IsaDma) {
        let memory = Arc::new(GuestMemory::new(4 << 20).unwrap());
        let d = IsaDma {
            memory: memory.clone(),
            controllers: [Controller::default(), Controller::default()],
            spare: [0; 16],
        };
        (memory, d)
    }

    /// Programs channel 2 as a driver of a floppy does.
    fn program(d: &mut IsaDma, mode: u8, page: u8, address: u16, count: u16) {
        d.write(0x0a, 6);
        d.write(0x0c, 0);
        d.write(0x0b, mode | 2);
        for b in address.to_le_bytes() {
            d.write(4, b);
        }
        d.write(0x81, page);
        for b in count.to_le_bytes() {
            d.write(5, b);
        }
        d.write(0x0a, 2);
    }

    #[test]
    fn a_device_moves_data_until_the_count_ends() {
        let (memory, mut d) = dma();
        program(&mut d, 0x44, 0x12, 0x3456, 511);
        assert_eq!(
            d.transfer(2, DmaDirection::ToMemory, &mut [7; 300]),
            (300, false)
        );
        assert_eq!(
            d.transfer(2, DmaDirection::FromMemory, &mut [7; 300]),
            (0, false)
        );
        assert_eq!(
            d.transfer(2, DmaDirection::ToMemory, &mut [8; 300]),
            (212, true)
        );
        let mut b = [0; 514];
        memory.read(0x12_3456, &mut b).unwrap();
        assert_eq!((b[0], b[299], b[300], b[511], b[512]), (7, 7, 8, 8, 0));
        assert_eq!(
            d.transfer(2, DmaDirection::ToMemory, &mut [9; 1]),
            (0, false),
            "masked"
        );
        assert_eq!((d.read(8), d.read(8)), (4, 0));
        assert_eq!(d.read(0x0f), 0xff);
        // Back, with a wrap at the end of the page.
        program(&mut d, 0x48, 0x12, 0xfffe, 3);
        memory.write(0x12_fffe, &[1, 2]).unwrap();
        memory.write(0x12_0000, &[3, 4]).unwrap();
        let mut b = [0; 8];
        assert_eq!(d.transfer(2, DmaDirection::FromMemory, &mut b), (4, true));
        assert_eq!(b[..4], [1, 2, 3, 4]);
        // Autoinitialised, and read back byte by byte.
        program(&mut d, 0x54, 0, 0x2000, 1);
        assert_eq!(
            d.transfer(2, DmaDirection::ToMemory, &mut [5; 4]),
            (2, true)
        );
        d.write(0x0c, 0);
        assert_eq!(
            [d.read(4), d.read(4), d.read(5), d.read(5)],
            [0, 0x20, 1, 0]
        );
        assert_eq!(
            d.transfer(2, DmaDirection::ToMemory, &mut [5; 4]),
            (2, true)
        );
        // Memory that is none.
        program(&mut d, 0x48, 0xff, 0, 1);
        let mut b = [0; 2];
        assert_eq!(d.transfer(2, DmaDirection::FromMemory, &mut b), (2, true));
        assert_eq!(b, [0xff; 2]);
    }

    #[test]
    fn it_conforms() {
        let (_, mut d) = dma();
        for first in [0x00_u16, 0x81, 0xc0] {
            conformance::odd_port_accesses(&mut d, first, first + 2);
        }
        for seed in 0..20 {
            let target = Target::Pio {
                device: &mut d,
                first: 0,
                last: 0x0f,
            };
            fuzz_device(target, &pseudo_random(seed, 4000), |_| {});
            for direction in [
                DmaDirection::ToMemory,
                DmaDirection::FromMemory,
                DmaDirection::Verify,
            ] {
                d.transfer(2, direction, &mut [0; 0x3000]);
            }
        }
        let (_, mut other) = dma();
        conformance::state_moves(&mut d, &mut other);
        conformance::reset_is_idempotent(&mut other);
        conformance::damaged_state_is_survived(&mut d, &pseudo_random(1, 2000));
    }
}
