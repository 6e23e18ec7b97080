//! Reset control register (CF9H) and system control port A (92H).
//! Intel ICH9 data sheet §13.7.3 (RST_CNT) and §13.7.1 (PORT92).

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{Lifecycle, MachineEvents, PioDevice};
use std::sync::Arc;

const KIND: &str = "reset-ports";
const VERSION: u16 = 1;

/// Reset control register.
pub const RST_CNT: u16 = 0xcf9;
/// System control port A.
pub const PORT92: u16 = 0x92;

/// RST_CPU: a rising edge starts the reset.
const RST_CPU: u8 = 1 << 2;
/// SYS_RST and FULL_RST are kept.
const RST_KEPT: u8 = 0x0e;
/// INIT_NOW: a rising edge resets.
const INIT_NOW: u8 = 1 << 0;
/// ALT_A20_GATE: shown as written; address bit 20 is never masked.
const ALT_A20_GATE: u8 = 1 << 1;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    rst_cnt: u8,
    #[n(1)]
    port92: u8,
}

impl Registers {
    fn power_on() -> Registers {
        Registers {
            rst_cnt: 0,
            port92: ALT_A20_GATE,
        }
    }
}

/// The two ports.
pub struct ResetPorts {
    regs: Registers,
    events: Arc<dyn MachineEvents>,
}

impl ResetPorts {
    /// Ports that report resets to `events`.
    pub fn new(events: Arc<dyn MachineEvents>) -> ResetPorts {
        ResetPorts {
            regs: Registers::power_on(),
            events,
        }
    }
}

impl PioDevice for ResetPorts {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(b) = data.first_mut() {
            match port {
                RST_CNT => *b = self.regs.rst_cnt,
                PORT92 => *b = self.regs.port92,
                _ => {}
            }
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        let Some(&v) = data.first() else { return };
        let rose = match port {
            RST_CNT => {
                let old = std::mem::replace(&mut self.regs.rst_cnt, v & RST_KEPT);
                v & !old & RST_CPU
            }
            PORT92 => {
                let old = std::mem::replace(&mut self.regs.port92, v & (INIT_NOW | ALT_A20_GATE));
                v & !old & INIT_NOW
            }
            _ => 0,
        };
        if rose != 0 {
            self.events.reset();
        }
    }
}

impl Lifecycle for ResetPorts {
    fn unit(&self) -> &str {
        "reset-ports"
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::power_on();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let ResetPorts { regs, events: _ } = self;
        Ok(Section::new("reset-ports", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        self.regs = section.decode(KIND, VERSION)?;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([
            ("rst_cnt", Inspect::Hex(self.regs.rst_cnt.into())),
            ("port92", Inspect::Hex(self.regs.port92.into())),
        ])
    }
}
