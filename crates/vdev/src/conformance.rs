//! What every device must do, as plain functions that a device's tests call.
//!
//! They assert: a failure panics with the unit's name. Bytes for the fuzz rig may come from
//! [`pseudo_random`] in unit tests or from a fuzzer.

use pyrite_state::{Section, StateError};

use crate::{Lifecycle, MmioDevice, PciFunction, PioDevice};

/// A device to drive, with the range that it is registered at.
pub enum Target<'a> {
    /// Ports `first..=last`.
    Pio {
        /// The device.
        device: &'a mut dyn PioDevice,
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
    /// Offsets `0..len`.
    Mmio {
        /// The device.
        device: &'a mut dyn MmioDevice,
        /// Length of its range.
        len: u64,
    },
    /// Configuration space and BARs.
    Pci(&'a mut dyn PciFunction),
}

/// Bytes that look random and are the same for the same seed (xorshift64*).
pub fn pseudo_random(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x >> 12;
            x ^= x << 25;
            x ^= x >> 27;
            (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        })
        .collect()
}

/// Takes values off the front of the fuzzer's bytes; zeroes when they run out.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }
    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }
    fn below(&mut self, end: u64) -> u64 {
        // Small devices are reached by one byte, so that short inputs do much.
        let v = if end <= 256 {
            u64::from(self.byte())
        } else {
            self.word()
        };
        v % end.max(1)
    }
    fn fill(&mut self, data: &mut [u8]) {
        data.iter_mut().for_each(|b| *b = self.byte());
    }
}

/// Drives a device with accesses made from `bytes`: any place in its range, legal sizes for ports
/// and configuration space, any size from 1 to 64 for memory. Calls `between` with a byte of the
/// input after each access, for instance to step the clock.
pub fn fuzz_device(mut target: Target<'_>, bytes: &[u8], mut between: impl FnMut(u8)) {
    let mut input = Bytes(bytes);
    while !input.0.is_empty() {
        let op = input.byte();
        match &mut target {
            Target::Pio {
                device,
                first,
                last,
            } => {
                let port = *first + input.below(u64::from(*last - *first) + 1) as u16;
                fuzz_pio(*device, port, op, &mut input);
            }
            Target::Mmio { device, len } => {
                let offset = input.below(*len);
                fuzz_mmio(*device, offset, *len, op, &mut input);
            }
            Target::Pci(function) => fuzz_pci(*function, op, &mut input),
        }
        between(input.byte());
    }
}

fn fuzz_pio(device: &mut dyn PioDevice, port: u16, op: u8, input: &mut Bytes<'_>) {
    let mut data = [0xff; 4];
    let data = &mut data[..[1, 1, 2, 4][usize::from(op >> 1 & 3)]];
    if op & 1 == 0 {
        device.pio_read(port, data);
    } else {
        input.fill(data);
        device.pio_write(port, data);
    }
}

fn fuzz_mmio(d: &mut dyn MmioDevice, offset: u64, len: u64, op: u8, input: &mut Bytes<'_>) {
    let mut data = [0xff; 64];
    let sizes = [1, 2, 4, 4, 4, 8, 8, usize::from(op >> 2) % 64 + 1];
    // The bus never lets an access leave the range.
    let size = sizes[usize::from(op >> 1 & 7)].min((len - offset) as usize);
    let offset = if op & 0x80 != 0 { offset & !7 } else { offset };
    if op & 1 == 0 {
        d.mmio_read(offset, &mut data[..size]);
    } else {
        input.fill(&mut data[..size]);
        d.mmio_write(offset, &data[..size]);
    }
}

fn fuzz_pci(f: &mut dyn PciFunction, op: u8, input: &mut Bytes<'_>) {
    let mut data = [0xff; 64];
    match op & 3 {
        0 => {
            f.config_read(input.below(4096) as u16 & !3);
        }
        1 => {
            let size = [1, 2, 4, 4][usize::from(op >> 2 & 3)];
            // Mostly the header and capabilities, where something happens.
            let end = if op & 0x80 != 0 { 4096 } else { 256 };
            let offset = input.below(end) as u16 & !(size as u16 - 1);
            input.fill(&mut data[..size]);
            f.config_write(offset, &data[..size]);
        }
        access => {
            let index = op >> 2 & 7;
            let Some((_, len)) = f.bar(index) else { return };
            let offset = input.below(len);
            let size = [1, 2, 4, 8][usize::from(op >> 5 & 3)].min((len - offset) as usize);
            if access == 2 {
                f.bar_read(index, offset, &mut data[..size]);
            } else {
                input.fill(&mut data[..size]);
                f.bar_write(index, offset, &data[..size]);
            }
        }
    }
}

/// Accesses of every size at every place of a port range, also past its end: nothing may panic.
pub fn odd_port_accesses(device: &mut dyn PioDevice, first: u16, last: u16) {
    for port in first..=last {
        for size in [0, 1, 2, 3, 4, 8] {
            let mut data = vec![0xff; size];
            device.pio_read(port, &mut data);
            data.fill(0);
            device.pio_write(port, &data);
        }
    }
}

/// Accesses of every size from 0 to 64 around the start and the end of a memory range.
pub fn odd_memory_accesses(device: &mut dyn MmioDevice, len: u64) {
    for offset in (0..len.min(64)).chain(len.saturating_sub(64)..len) {
        for size in 0..=64 {
            let mut data = vec![0xff; size];
            device.mmio_read(offset, &mut data);
            data.fill(0);
            device.mmio_write(offset, &data);
        }
    }
}

fn saved(unit: &mut dyn Lifecycle) -> Section {
    let name = unit.unit().to_owned();
    match unit.save() {
        Ok(s) => {
            assert_eq!(s.unit, name, "a section is named after its unit");
            s
        }
        Err(e) => panic!("{name} does not save: {e}"),
    }
}

/// A second reset changes nothing.
pub fn reset_is_idempotent(unit: &mut dyn Lifecycle) {
    unit.reset();
    let once = saved(unit);
    unit.reset();
    assert_eq!(
        saved(unit),
        once,
        "{} changes in a second reset",
        unit.unit()
    );
}

/// `fresh`, built like `used`, takes over its state exactly; saving changes nothing.
pub fn state_moves(used: &mut dyn Lifecycle, fresh: &mut dyn Lifecycle) {
    used.pause();
    assert!(used.drained(), "{} is not drained", used.unit());
    let section = saved(used);
    assert_eq!(saved(used), section, "{} changes by saving", used.unit());
    if let Err(e) = fresh.restore(&section) {
        panic!("{} does not restore its own state: {e}", used.unit());
    }
    assert_eq!(
        saved(fresh),
        section,
        "{} differs after restore",
        used.unit()
    );
}

/// Damaged sections are refused or taken, but never panic; a refused one leaves the power-on
/// state. `bytes` says where and how to damage.
pub fn damaged_state_is_survived(unit: &mut dyn Lifecycle, bytes: &[u8]) {
    let name = unit.unit().to_owned();
    let section = saved(unit);
    let wrong = Section {
        kind: "something-else".to_owned(),
        ..section.clone()
    };
    let refused = unit.restore(&wrong);
    assert!(
        matches!(refused, Err(StateError::WrongKind { .. })),
        "{name} takes another kind"
    );
    unit.reset();
    let power_on = saved(unit);
    let newer = Section {
        min_reader: u16::MAX,
        ..section.clone()
    };
    let refused = unit.restore(&newer);
    assert!(
        matches!(refused, Err(StateError::TooNew { .. })),
        "{name} takes a newer version"
    );
    let mut input = Bytes(bytes);
    while !input.0.is_empty() {
        let mut damaged = section.clone();
        let at = input.word() as usize;
        if let Some(n) = at.checked_rem(damaged.body.len()) {
            match input.byte() & 3 {
                0 => damaged.body.truncate(n),
                _ => damaged.body[n] = input.byte(),
            }
        }
        if unit.restore(&damaged).is_err() {
            assert_eq!(
                saved(unit),
                power_on,
                "{name} keeps parts of a refused state"
            );
        } else {
            saved(unit);
        }
    }
}
