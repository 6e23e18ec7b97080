//! 8042 keyboard controller with PS/2 keyboard and mouse.
//! IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device
//! Controller" (1988).

mod keyboard;
mod mouse;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use keyboard::Keyboard;
use minicbor::{Decode, Encode};
use mouse::Mouse;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{IrqLine, Lifecycle, MachineEvents, PioDevice};

const KIND: &str = "i8042";
const VERSION: u16 = 1;

/// Data port.
pub const DATA: u16 = 0x60;
/// Status (read) and command (write) port.
pub const COMMAND: u16 = 0x64;

// Status register.
const STATUS_OBF: u8 = 1 << 0;
const STATUS_SYS: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX_OBF: u8 = 1 << 5;

// Command byte.
const KBD_INTERRUPT: u8 = 1 << 0;
const AUX_INTERRUPT: u8 = 1 << 1;
const SYS_FLAG: u8 = 1 << 2;
const KBD_DISABLED: u8 = 1 << 4;
const AUX_DISABLED: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

// Output port.
const OUT_RESET_N: u8 = 1 << 0;
const OUT_A20: u8 = 1 << 1;

/// Where a byte in the output buffer came from; decides the interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
enum Origin {
    #[n(0)]
    Keyboard,
    #[n(1)]
    Aux,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    /// Internal RAM; byte 0 is the command byte.
    #[n(0)]
    ram: [u8; 32],
    /// Output port as written.
    #[n(1)]
    output_port: u8,
    /// Output buffer.
    #[n(2)]
    output: Option<(u8, Origin)>,
    /// What the data port read last; it reads so again while nothing new comes.
    #[n(3)]
    last_data: u8,
    /// The controller's own answer, sent before anything from the devices.
    #[n(4)]
    reply: Option<(u8, Origin)>,
    /// Command that waits for its data byte.
    #[n(5)]
    command: Option<u8>,
    /// The last write went to the command port.
    #[n(6)]
    last_was_command: bool,
    /// Translation has seen the break prefix F0H.
    #[n(7)]
    break_prefix: bool,
    #[n(8)]
    keyboard: Keyboard,
    #[n(9)]
    mouse: Mouse,
}

impl Registers {
    fn power_on() -> Registers {
        let mut ram = [0; 32];
        // As firmware leaves it: self-test passed, interrupts on, translation on.
        ram[0] = KBD_INTERRUPT | AUX_INTERRUPT | SYS_FLAG | TRANSLATE;
        Registers {
            ram,
            output_port: OUT_RESET_N | OUT_A20,
            output: None,
            last_data: 0,
            reply: None,
            command: None,
            last_was_command: false,
            break_prefix: false,
            keyboard: Keyboard::power_on(),
            mouse: Mouse::power_on(),
        }
    }

    fn config(&self) -> u8 {
        self.ram[0]
    }

    /// Fills the output buffer if it is empty.
    fn fill_output(&mut self) {
        while self.output.is_none() {
            if let Some(r) = self.reply.take() {
                self.output = Some(r);
            } else if self.config() & KBD_DISABLED == 0
                && let Some(byte) = self.keyboard.take()
            {
                self.output = self.translate(byte).map(|b| (b, Origin::Keyboard));
            } else if self.config() & AUX_DISABLED == 0
                && let Some(byte) = self.mouse.take()
            {
                self.output = Some((byte, Origin::Aux));
            } else {
                return;
            }
        }
    }

    /// Set 2 to set 1, if enabled. The break prefix becomes the upper bit of the next byte.
    fn translate(&mut self, byte: u8) -> Option<u8> {
        if self.config() & TRANSLATE == 0 {
            return Some(byte);
        }
        if byte == 0xf0 {
            self.break_prefix = true;
            return None;
        }
        let code = keyboard::set1_of_set2(byte);
        Some(if std::mem::take(&mut self.break_prefix) {
            code | 0x80
        } else {
            code
        })
    }

    fn status(&self) -> u8 {
        let mut s = STATUS_UNLOCKED;
        if let Some((_, from)) = self.output {
            s |= STATUS_OBF;
            if from == Origin::Aux {
                s |= STATUS_AUX_OBF;
            }
        }
        if self.config() & SYS_FLAG != 0 {
            s |= STATUS_SYS;
        }
        if self.last_was_command {
            s |= STATUS_COMMAND;
        }
        s
    }
}

/// The controller with both devices plugged in.
pub struct I8042 {
    regs: Registers,
    keyboard_line: IrqLine,
    mouse_line: IrqLine,
    events: Arc<dyn MachineEvents>,
}

impl I8042 {
    /// A controller that drives IRQ 1 and IRQ 12 and reports resets to `events`.
    pub fn new(
        keyboard_line: IrqLine,
        mouse_line: IrqLine,
        events: Arc<dyn MachineEvents>,
    ) -> I8042 {
        I8042 {
            regs: Registers::power_on(),
            keyboard_line,
            mouse_line,
            events,
        }
    }

    /// A key went down or up. `code` is the make code of scan code set 1, extended keys as
    /// `0xe0xx`, Pause as `0xe11d`. `false` = the queue is full: offer it again later.
    pub fn key(&mut self, code: u16, is_down: bool) -> bool {
        let taken = self.regs.keyboard.key(code, is_down);
        self.settle();
        taken
    }

    /// The mouse moved by `dx` to the right and `dy` downwards, its wheel by `dz` towards the
    /// user; `buttons` are the ones held now: 1 left, 2 right, 4 middle, 8 and 16 side buttons.
    /// Movement that the guest is too slow for adds up.
    pub fn mouse(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        self.regs.mouse.moved(dx, dy, dz, buttons);
        self.settle();
    }

    /// Fills the output buffer and drives the interrupt lines.
    fn settle(&mut self) {
        self.regs.fill_output();
        let from = self.regs.output.map(|(_, from)| from);
        let config = self.regs.config();
        self.keyboard_line
            .set(from == Some(Origin::Keyboard) && config & KBD_INTERRUPT != 0);
        self.mouse_line
            .set(from == Some(Origin::Aux) && config & AUX_INTERRUPT != 0);
    }

    fn read_data(&mut self) -> u8 {
        if let Some((byte, _)) = self.regs.output.take() {
            self.regs.last_data = byte;
            // The line falls before the next byte raises it: each byte is one edge.
            self.keyboard_line.set(false);
            self.mouse_line.set(false);
        }
        self.regs.last_data
    }

    fn write_output_port(&mut self, v: u8) {
        self.regs.output_port = v;
        if v & OUT_RESET_N == 0 {
            self.events.reset();
        }
    }

    fn write_command(&mut self, v: u8) {
        let r = &mut self.regs;
        r.last_was_command = true;
        r.command = None;
        let mut reply = |byte| r.reply = Some((byte, Origin::Keyboard));
        match v {
            0x20..=0x3f => {
                let byte = r.ram[usize::from(v & 0x1f)];
                r.reply = Some((byte, Origin::Keyboard));
            }
            0x60..=0x7f | 0xd1..=0xd4 => r.command = Some(v),
            0xa7 => r.ram[0] |= AUX_DISABLED,
            0xa8 => r.ram[0] &= !AUX_DISABLED,
            0xa9 | 0xab => reply(0x00), // interface tests: no error
            0xaa => {
                reply(0x55);
                r.ram[0] |= SYS_FLAG;
            }
            0xad => r.ram[0] |= KBD_DISABLED,
            0xae => r.ram[0] &= !KBD_DISABLED,
            0xc0 => reply(0xa0), // input port: not inhibited, colour display
            0xd0 => {
                let from = r.output.map(|(_, from)| from);
                let buffers = u8::from(from == Some(Origin::Keyboard)) << 4
                    | u8::from(from == Some(Origin::Aux)) << 5;
                let port = r.output_port & !0x30 | buffers;
                r.reply = Some((port, Origin::Keyboard));
            }
            0xdd => r.output_port &= !OUT_A20,
            0xdf => r.output_port |= OUT_A20,
            0xe0 => reply(0x00), // test inputs
            // Pulses the output port's low bits that are 0 here; bit 0 is the reset line.
            0xf0..=0xff if v & OUT_RESET_N == 0 => self.events.reset(),
            _ => {}
        }
    }

    fn write_data(&mut self, v: u8) {
        let r = &mut self.regs;
        r.last_was_command = false;
        match r.command.take() {
            Some(c @ 0x60..=0x7f) => r.ram[usize::from(c & 0x1f)] = v,
            Some(0xd1) => self.write_output_port(v),
            Some(0xd2) => r.reply = Some((v, Origin::Keyboard)),
            Some(0xd3) => r.reply = Some((v, Origin::Aux)),
            Some(0xd4) => {
                r.ram[0] &= !AUX_DISABLED;
                r.mouse.command(v);
            }
            _ => {
                // Talking to the keyboard enables its interface.
                r.ram[0] &= !KBD_DISABLED;
                r.keyboard.command(v);
            }
        }
    }
}

impl PioDevice for I8042 {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(b) = data.first_mut() {
            match port {
                DATA => *b = self.read_data(),
                COMMAND => *b = self.regs.status(),
                _ => {}
            }
        }
        self.settle();
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        if let Some(v) = data.first() {
            match port {
                DATA => self.write_data(*v),
                COMMAND => self.write_command(*v),
                _ => {}
            }
        }
        self.settle();
    }
}

impl Lifecycle for I8042 {
    fn unit(&self) -> &str {
        "i8042"
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::power_on();
        self.settle();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let I8042 {
            regs,
            keyboard_line: _,
            mouse_line: _,
            events: _,
        } = self;
        Ok(Section::new("i8042", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let saved: Registers = section.decode(KIND, VERSION)?;
        if !saved.keyboard.is_valid() || !saved.mouse.is_valid() {
            let detail = "a queue is too long or a mode does not exist".into();
            return Err(StateError::Invalid {
                unit: "i8042".into(),
                detail,
            });
        }
        self.regs = saved;
        self.settle();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let r = &self.regs;
        Inspect::node([
            ("status", Inspect::Hex(r.status().into())),
            ("command_byte", Inspect::Hex(r.config().into())),
            ("output_port", Inspect::Hex(r.output_port.into())),
            ("keyboard", r.keyboard.inspect()),
            ("mouse", r.mouse.inspect()),
        ])
    }
}
