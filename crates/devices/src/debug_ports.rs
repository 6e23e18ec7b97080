//! Ports for test programs and firmware: debug-exit (F4H), debug console (402H), POST code (80H).

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{Lifecycle, MachineEvents, PioDevice};
use std::sync::Arc;

use crate::uart::SerialBackend;

const KIND: &str = "debug-ports";
const VERSION: u16 = 1;

/// Exit port of test programs.
pub const DEBUG_EXIT: u16 = 0xf4;
/// Debug console: written bytes are text, it reads as [`DEBUGCON_PRESENT`].
pub const DEBUGCON: u16 = 0x402;
/// POST codes of firmware.
pub const POST: u16 = 0x80;
/// What a program reads to find the debug console.
const DEBUGCON_PRESENT: u8 = 0xe9;

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    /// Last POST code.
    #[n(0)]
    post: u8,
}

/// The three ports.
pub struct DebugPorts {
    regs: Registers,
    console: Box<dyn SerialBackend>,
    events: Arc<dyn MachineEvents>,
}

impl DebugPorts {
    /// Ports that write text to `console` and report exits to `events`.
    pub fn new(console: Box<dyn SerialBackend>, events: Arc<dyn MachineEvents>) -> DebugPorts {
        DebugPorts {
            regs: Registers::default(),
            console,
            events,
        }
    }
}

impl PioDevice for DebugPorts {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(b) = data.first_mut() {
            match port {
                DEBUGCON => *b = DEBUGCON_PRESENT,
                POST => *b = self.regs.post,
                _ => {}
            }
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        match port {
            // An exit status of 0 would look like a clean power-off, so the lowest bit is set.
            DEBUG_EXIT => self.events.debug_exit(u32::from_le_bytes(bytes) << 1 | 1),
            DEBUGCON => self.console.write(data),
            POST => self.regs.post = bytes[0],
            _ => {}
        }
    }
}

impl Lifecycle for DebugPorts {
    fn unit(&self) -> &str {
        "debug-ports"
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::default();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let DebugPorts {
            regs,
            console: _,
            events: _,
        } = self;
        Ok(Section::new("debug-ports", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        self.regs = section.decode(KIND, VERSION)?;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([("post", Inspect::Hex(self.regs.post.into()))])
    }
}
