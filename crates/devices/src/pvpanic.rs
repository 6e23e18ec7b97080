//! pvpanic: a register through which a guest says that it has panicked. QEMU's documentation,
//! docs/specs/pvpanic.rst.
//!
//! It is a port that ACPI tables tell of, or a PCI function. Reading gives the events that are
//! understood; writing reports some.

use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, PciIds};
use pyrite_vdev::{BarKind, Lifecycle, MachineEvents, PciFunction, PioDevice};

const KIND_ISA: &str = "pvpanic-isa";
const KIND_PCI: &str = "pvpanic-pci";
const VERSION: u16 = 1;

/// The port.
pub const PORT: u16 = 0x505;
/// Firmware file that has [`PORT`], 16 bits.
pub const PORT_FILE: &str = "etc/pvpanic-port";

/// The guest has panicked.
pub const PANICKED: u8 = 1 << 0;
/// The guest has panicked and starts a kernel that it has for this.
pub const CRASH_LOADED: u8 = 1 << 1;
/// The guest has shut down and wants to be switched off.
pub const SHUTDOWN: u8 = 1 << 2;
const KNOWN: u8 = PANICKED | CRASH_LOADED | SHUTDOWN;

/// Bytes of BAR 0; the register is the first.
const BAR_BYTES: u64 = 16;

const IDS: PciIds = PciIds {
    vendor_id: 0x1b36,
    device_id: 0x0011,
    revision: 1,
    // System peripheral, other.
    class: 0x08_80_00,
    subsystem_vendor_id: 0x1af4,
    subsystem_id: 0x1100,
};

/// What was reported since the machine's reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    reported: u8,
}

impl Registers {
    fn report(&mut self, bits: u8, events: &dyn MachineEvents) {
        let bits = bits & KNOWN;
        self.reported |= bits;
        if bits & (PANICKED | CRASH_LOADED) != 0 {
            events.panicked(bits & PANICKED == 0);
        }
        if bits & SHUTDOWN != 0 {
            events.power_off();
        }
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([("reported", Inspect::Hex(self.reported.into()))])
    }
}

/// The port.
pub struct IsaPvpanic {
    regs: Registers,
    events: Arc<dyn MachineEvents>,
}

impl IsaPvpanic {
    /// A port that reports to `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> IsaPvpanic {
        IsaPvpanic {
            regs: Registers::default(),
            events,
        }
    }
}

impl PioDevice for IsaPvpanic {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) {
        if let Some(b) = data.first_mut() {
            *b = KNOWN;
        }
    }
    fn pio_write(&mut self, _port: u16, data: &[u8]) {
        if let Some(b) = data.first() {
            self.regs.report(*b, &*self.events);
        }
    }
}

impl Lifecycle for IsaPvpanic {
    fn unit(&self) -> &str {
        "pvpanic"
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::default();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let IsaPvpanic { regs, events: _ } = self;
        Ok(Section::new("pvpanic", KIND_ISA, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        self.regs = section.decode(KIND_ISA, VERSION)?;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        self.regs.inspect()
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    config: ConfigSaved,
    #[n(1)]
    regs: Registers,
}

/// The PCI function.
pub struct PciPvpanic {
    config: ConfigSpace,
    regs: Registers,
    events: Arc<dyn MachineEvents>,
}

impl PciPvpanic {
    /// A function that reports to `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> PciPvpanic {
        let mut config = ConfigSpace::new(IDS);
        config.add_bar(0, BarKind::Mem32, BAR_BYTES);
        PciPvpanic {
            config,
            regs: Registers::default(),
            events,
        }
    }
}

impl PciFunction for PciPvpanic {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) {
        for (n, b) in (0..).zip(data) {
            *b = if offset + n == 0 { KNOWN } else { 0 };
        }
    }
    fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) {
        if let (0, Some(b)) = (offset, data.first()) {
            self.regs.report(*b, &*self.events);
        }
    }
}

impl Lifecycle for PciPvpanic {
    fn unit(&self) -> &str {
        "pvpanic"
    }
    passive!();
    fn reset(&mut self) {
        self.config.reset();
        self.regs = Registers::default();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let PciPvpanic {
            config,
            regs,
            events: _,
        } = self;
        let saved = Saved {
            config: config.save(),
            regs: regs.clone(),
        };
        Ok(Section::new("pvpanic", KIND_PCI, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let Saved { config, regs } = section.decode(KIND_PCI, VERSION)?;
        self.config
            .restore(&config)
            .map_err(|detail| StateError::Invalid {
                unit: "pvpanic".into(),
                detail,
            })?;
        self.regs = regs;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        self.regs.inspect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<&'static str>>);

    impl MachineEvents for Heard {
        fn power_off(&self) {
            self.0.lock().unwrap().push("off");
        }
        fn reset(&self) {}
        fn suspend(&self) {}
        fn debug_exit(&self, _code: u32) {}
        fn panicked(&self, crash_kernel: bool) {
            let text = if crash_kernel {
                "crash kernel"
            } else {
                "panic"
            };
            self.0.lock().unwrap().push(text);
        }
    }

    #[test]
    fn events_are_reported_once_each() {
        let heard: Arc<Heard> = Arc::default();
        let mut isa = IsaPvpanic::new(heard.clone());
        let mut pci = PciPvpanic::new(heard.clone());
        let mut b = [0; 2];
        isa.pio_read(PORT, &mut b[..1]);
        pci.bar_read(0, 0, &mut b[1..]);
        assert_eq!(b, [7, 7]);
        isa.pio_write(PORT, &[PANICKED]);
        pci.bar_write(0, 0, &[CRASH_LOADED, 0xff]);
        pci.bar_write(0, 1, &[PANICKED]);
        pci.bar_write(0, 0, &[SHUTDOWN]);
        isa.pio_write(PORT, &[0xf8]);
        isa.pio_write(PORT, &[]);
        // Both: it panicked, and there is no telling whether the other kernel starts.
        isa.pio_write(PORT, &[PANICKED | CRASH_LOADED]);
        let all = heard.0.lock().unwrap().clone();
        assert_eq!(all, ["panic", "crash kernel", "off", "panic"]);
    }

    #[test]
    fn devices_conform() {
        use pyrite_vdev::conformance::{Target, fuzz_device, pseudo_random, state_moves};
        let heard: Arc<Heard> = Arc::default();
        let bytes = pseudo_random(1, 4000);
        let mut isas = [0, 1].map(|_| IsaPvpanic::new(heard.clone()));
        let mut pcis = [0, 1].map(|_| PciPvpanic::new(heard.clone()));
        let device = &mut isas[0];
        let (first, last) = (PORT, PORT);
        fuzz_device(
            Target::Pio {
                device,
                first,
                last,
            },
            &bytes,
            |_| {},
        );
        fuzz_device(Target::Pci(&mut pcis[0]), &bytes, |_| {});
        let [a, b] = &mut isas;
        state_moves(a, b);
        let [a, b] = &mut pcis;
        state_moves(a, b);
        let mut pci = PciPvpanic::new(heard.clone());
        pci.config_write(0x10, &0xffff_ffffu32.to_le_bytes());
        assert_eq!(pci.config_read(0x10), 0xffff_fff0);
        assert_eq!(pci.config_read(0), 0x0011_1b36);
        pci.bar_write(0, 0, &[PANICKED]);
        let section = pci.save().unwrap();
        let mut again = PciPvpanic::new(heard.clone());
        again.restore(&section).unwrap();
        assert_eq!(again.regs.reported, PANICKED);
        assert_eq!(again.config_read(0x10), 0xffff_fff0);
        again.reset();
        assert_eq!(again.regs.reported, 0);
        let mut isa = IsaPvpanic::new(heard);
        assert!(isa.restore(&section).is_err());
    }
}
