//! LPC bridge of an ICH9, 00:1f.0, as far as firmware programs it: PCI interrupt routing, and where
//! the power management registers are. Intel ICH9 data sheet §13.1 and §13.8.3.
//!
//! The power management registers are always at 600H, where firmware for this chipset puts them,
//! and ACPI mode is always on. There is no system management mode: `SMI_EN` says that it was set up
//! already, which is how such firmware is told to leave it alone. The root complex's register block
//! (RCBA) does not exist.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, PciIds};
use pyrite_vdev::{BarKind, Lifecycle, PciFunction, PioDevice};

use crate::irq::pirq::{PIRQS, PirqRouter, ROUTE_OFF};

const KIND: &str = "lpc-ich9";
const VERSION: u16 = 1;

/// Device number on bus 0.
pub const SLOT: u8 = 31;
/// SMI_EN and SMI_STS, four bytes each.
pub const SMI_PORT: u16 = 0x630;
/// SMI_EN: writes to port B2H raise an SMI.
const APMC_EN: u32 = 1 << 5;

// Registers.
const PMBASE: u16 = 0x40;
const ACPI_CNTL: u16 = 0x44;
const PIRQA_ROUT: u16 = 0x60;
const PIRQE_ROUT: u16 = 0x68;
/// Bits of PIRQx_ROUT that can be written.
const ROUTE_BITS: u8 = 0x8f;

const IDS: PciIds = PciIds {
    vendor_id: 0x8086,
    device_id: 0x2918,
    revision: 2,
    class: 0x06_01_00,
    subsystem_vendor_id: 0x1af4,
    subsystem_id: 0x1100,
};

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    config: ConfigSaved,
}

/// The bridge.
pub struct Lpc {
    config: ConfigSpace,
    pirqs: Arc<PirqRouter>,
}

impl Lpc {
    /// A bridge that programs `pirqs`.
    pub fn new(pirqs: Arc<PirqRouter>) -> Lpc {
        let mut config = ConfigSpace::new(IDS);
        // Bit 0: these are ports.
        let pm_base = u32::from(crate::acpi_pm::PM1A_EVT) | 1;
        config.add_register(PMBASE, &pm_base.to_le_bytes(), &[0; 4]);
        // ACPI_EN; the SCI is IRQ 9.
        config.add_register(ACPI_CNTL, &[0x80], &[0]);
        for at in [PIRQA_ROUT, PIRQE_ROUT] {
            config.add_register(at, &[ROUTE_OFF; 4], &[ROUTE_BITS; 4]);
        }
        Lpc { config, pirqs }
    }

    fn apply(&self) {
        let mut routes = [0; PIRQS];
        let (a, e) = routes.split_at_mut(4);
        a.copy_from_slice(&self.config.read(PIRQA_ROUT).to_le_bytes());
        e.copy_from_slice(&self.config.read(PIRQE_ROUT).to_le_bytes());
        self.pirqs.set_routes(routes);
    }
}

impl PciFunction for Lpc {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.apply();
    }
    fn bar(&self, _index: u8) -> Option<(BarKind, u64)> {
        None
    }
    fn bar_address(&self, _index: u8) -> Option<u64> {
        None
    }
    fn bar_read(&mut self, _index: u8, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&mut self, _index: u8, _offset: u64, _data: &[u8]) {}
}

/// SMI_EN cannot be written, SMI_STS is always 0.
impl PioDevice for Lpc {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        let value = u64::from(APMC_EN).to_le_bytes();
        let at = usize::from(port.saturating_sub(SMI_PORT));
        for (b, v) in data.iter_mut().zip(value.iter().skip(at)) {
            *b = *v;
        }
    }
    fn pio_write(&mut self, _port: u16, _data: &[u8]) {}
}

impl Lifecycle for Lpc {
    fn unit(&self) -> &str {
        "lpc"
    }
    passive!();
    fn reset(&mut self) {
        self.config.reset();
        self.apply();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let Lpc { config, pirqs: _ } = self;
        let config = config.save();
        Ok(Section::new("lpc", KIND, VERSION, &Saved { config }))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let Saved { config } = section.decode(KIND, VERSION)?;
        self.config
            .restore(&config)
            .map_err(|detail| StateError::Invalid {
                unit: "lpc".into(),
                detail,
            })?;
        self.apply();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        self.config.inspect()
    }
}
