//! 16550A UART. National Semiconductor PC16550D data sheet (June 1995).
//!
//! Transmission takes no time: a byte written to THR is handed to the backend at once and THR is
//! empty again. Input is accepted only as far as the receive FIFO has room, so nothing is lost.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{IrqLine, Lifecycle, PioDevice};

const KIND: &str = "uart-16550";
const VERSION: u16 = 1;
/// Bytes of each FIFO.
const FIFO_BYTES: usize = 16;

// §8.4 Interrupt Enable Register.
const IER_RDA: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IER_RLS: u8 = 1 << 2;
const IER_MSI: u8 = 1 << 3;
// §8.5 FIFO Control Register.
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;
// §8.6 Interrupt Identification Register.
const IIR_NONE: u8 = 0x01;
const IIR_MSI: u8 = 0x00;
const IIR_THRE: u8 = 0x02;
const IIR_RDA: u8 = 0x04;
const IIR_RLS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;
// §8.1 Line Control Register.
const LCR_DLAB: u8 = 1 << 7;
// §8.7 Modem Control Register.
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
// §8.3 Line Status Register.
const LSR_DR: u8 = 1 << 0;
const LSR_OE: u8 = 1 << 1;
const LSR_BI: u8 = 1 << 4;
const LSR_ERRORS: u8 = 0x1e;
const LSR_THRE: u8 = 1 << 5;
const LSR_TEMT: u8 = 1 << 6;
const LSR_FIFO_ERROR: u8 = 1 << 7;
// §8.8 Modem Status Register: CTS, DSR and DCD of a peer that is there.
const MSR_CONNECTED: u8 = 0xb0;

/// Where a UART's output goes. Called with the UART locked; must not block for long.
pub trait SerialBackend: Send {
    /// Takes bytes that the guest sent.
    fn write(&mut self, data: &[u8]);
    /// The guest has taken input: [`Uart::receive`] would accept more. May be called often.
    fn room(&mut self) {}
}

/// A backend that drops everything.
pub struct NoSerial;

impl SerialBackend for NoSerial {
    fn write(&mut self, _data: &[u8]) {}
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    ier: u8,
    #[n(1)]
    fcr: u8,
    #[n(2)]
    lcr: u8,
    #[n(3)]
    mcr: u8,
    /// Error bits of LSR; the others follow from the FIFO.
    #[n(4)]
    lsr_errors: u8,
    /// Modem lines (upper half) and their changes since the last read (lower half).
    #[n(5)]
    msr: u8,
    #[n(6)]
    scr: u8,
    #[n(7)]
    divisor: u16,
    /// Receive FIFO: byte and its error bits.
    #[n(8)]
    rx: VecDeque<(u8, u8)>,
    /// THR became empty and that was not reported yet.
    #[n(9)]
    thre_pending: bool,
}

impl Registers {
    fn power_on() -> Registers {
        Registers {
            msr: MSR_CONNECTED,
            divisor: 12,
            ..Registers::default()
        }
    }

    fn fifo_size(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 {
            FIFO_BYTES
        } else {
            1
        }
    }

    /// §8.5: FIFO fill level of the "received data available" interrupt.
    fn trigger(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            return 1;
        }
        [1, 4, 8, 14]
            .get(usize::from(self.fcr >> 6))
            .copied()
            .unwrap_or(1)
    }

    fn lsr(&self) -> u8 {
        let mut v = LSR_THRE | LSR_TEMT | self.lsr_errors;
        if let Some((_, errors)) = self.rx.front() {
            v |= LSR_DR | errors;
        }
        if self.fcr & FCR_ENABLE != 0 && self.rx.iter().any(|(_, e)| *e != 0) {
            v |= LSR_FIFO_ERROR;
        }
        v
    }

    /// The interrupt of the highest priority (§8.6, table IV), without the FIFO bits.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_RLS != 0 && self.lsr() & LSR_ERRORS != 0 {
            IIR_RLS
        } else if self.ier & IER_RDA != 0 && self.rx.len() >= self.trigger() {
            IIR_RDA
        } else if self.ier & IER_RDA != 0 && !self.rx.is_empty() {
            // The time-out of four character times is taken as over at once: the sender does not
            // know how the driver counts, and waiting would only delay a typed character.
            IIR_TIMEOUT
        } else if self.ier & IER_THRE != 0 && self.thre_pending {
            IIR_THRE
        } else if self.ier & IER_MSI != 0 && self.msr & 0x0f != 0 {
            IIR_MSI
        } else {
            IIR_NONE
        }
    }

    fn push(&mut self, byte: u8, errors: u8) -> bool {
        if self.rx.len() < self.fifo_size() {
            self.rx.push_back((byte, errors));
            true
        } else {
            false
        }
    }

    /// Brings the modem inputs up to date: §8.7, in loopback they come from MCR's outputs.
    fn update_msr(&mut self) {
        let lines = if self.mcr & MCR_LOOP != 0 {
            // DTR → DSR, RTS → CTS, OUT1 → RI, OUT2 → DCD.
            (self.mcr & 0x01) << 5 | (self.mcr & 0x02) << 3 | (self.mcr & 0x0c) << 4
        } else {
            MSR_CONNECTED
        };
        let old = self.msr;
        let changed = (old ^ lines) & 0xf0;
        // RI counts only its trailing edge.
        let rose_ri = lines & changed & 0x40;
        self.msr = lines | (old & 0x0f) | (changed & !rose_ri) >> 4;
    }
}

/// One UART at a base port.
pub struct Uart {
    unit: String,
    base: u16,
    regs: Registers,
    line: IrqLine,
    /// Level that the line was last told; most accesses do not change it. `None` = tell it again.
    driven: Option<bool>,
    backend: Box<dyn SerialBackend>,
}

impl Uart {
    /// A UART at ports `base..base + 8`.
    pub fn new(unit: &str, base: u16, line: IrqLine, backend: Box<dyn SerialBackend>) -> Uart {
        Uart {
            unit: unit.to_owned(),
            base,
            regs: Registers::power_on(),
            line,
            driven: None,
            backend,
        }
    }

    /// Input from outside. Returns how many bytes fitted; offer the rest again after
    /// [`SerialBackend::room`].
    pub fn receive(&mut self, data: &[u8]) -> usize {
        if self.regs.mcr & MCR_LOOP != 0 {
            return 0;
        }
        let n = data.iter().take_while(|b| self.regs.push(**b, 0)).count();
        self.drive();
        n
    }

    /// Bytes that [`Uart::receive`] would accept now.
    pub fn room(&self) -> usize {
        if self.regs.mcr & MCR_LOOP != 0 {
            return 0;
        }
        self.regs.fifo_size().saturating_sub(self.regs.rx.len())
    }

    /// A break condition from outside (SysRq on Linux). `false` = no room now.
    pub fn receive_break(&mut self) -> bool {
        let taken = self.regs.mcr & MCR_LOOP == 0 && self.regs.push(0, LSR_BI);
        self.drive();
        taken
    }

    /// On a PC, OUT2 connects the interrupt to the bus.
    fn drive(&mut self) {
        let pending = self.regs.interrupt() != IIR_NONE;
        let level = pending && self.regs.mcr & MCR_OUT2 != 0;
        if self.driven.replace(level) != Some(level) {
            self.line.set(level);
        }
    }

    fn transmit(&mut self, byte: u8) {
        if self.regs.mcr & MCR_LOOP != 0 {
            if !self.regs.push(byte, 0) {
                self.regs.lsr_errors |= LSR_OE;
            }
        } else {
            self.backend.write(&[byte]);
        }
        self.regs.thre_pending = true;
    }

    fn read(&mut self, register: u16) -> u8 {
        let r = &mut self.regs;
        match register {
            0 if r.lcr & LCR_DLAB != 0 => r.divisor as u8,
            1 if r.lcr & LCR_DLAB != 0 => (r.divisor >> 8) as u8,
            0 => {
                let byte = r.rx.pop_front().map_or(0, |(b, _)| b);
                self.backend.room();
                byte
            }
            1 => r.ier,
            2 => {
                let id = r.interrupt();
                if id == IIR_THRE {
                    r.thre_pending = false;
                }
                id | if r.fcr & FCR_ENABLE != 0 {
                    IIR_FIFOS
                } else {
                    0
                }
            }
            3 => r.lcr,
            4 => r.mcr,
            5 => {
                let v = r.lsr();
                r.lsr_errors = 0;
                if let Some((_, errors)) = r.rx.front_mut() {
                    *errors = 0;
                }
                v
            }
            6 => {
                let v = r.msr;
                r.msr &= 0xf0;
                v
            }
            _ => r.scr,
        }
    }

    fn write(&mut self, register: u16, v: u8) {
        let r = &mut self.regs;
        match register {
            0 if r.lcr & LCR_DLAB != 0 => r.divisor = r.divisor & 0xff00 | u16::from(v),
            1 if r.lcr & LCR_DLAB != 0 => r.divisor = r.divisor & 0x00ff | u16::from(v) << 8,
            0 => self.transmit(v),
            1 => {
                // Enabling the interrupt while THR is empty raises it; drivers test for this.
                if v & !r.ier & IER_THRE != 0 {
                    r.thre_pending = true;
                }
                r.ier = v & 0x0f;
            }
            2 => {
                let toggled = (v ^ r.fcr) & FCR_ENABLE != 0;
                if toggled || v & FCR_CLEAR_RX != 0 {
                    r.rx.clear();
                    self.backend.room();
                }
                r.fcr = if v & FCR_ENABLE != 0 { v & 0xc9 } else { 0 };
            }
            3 => r.lcr = v,
            4 => {
                r.mcr = v & 0x1f;
                r.update_msr();
                self.backend.room();
            }
            // LSR and MSR are read-only.
            7 => r.scr = v,
            _ => {}
        }
    }
}

impl PioDevice for Uart {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        for (register, b) in (port.wrapping_sub(self.base)..8).zip(data) {
            *b = self.read(register);
        }
        self.drive();
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        for (register, b) in (port.wrapping_sub(self.base)..8).zip(data) {
            self.write(register, *b);
        }
        self.drive();
    }
}

impl Lifecycle for Uart {
    fn unit(&self) -> &str {
        &self.unit
    }
    passive!();
    fn reset(&mut self) {
        self.regs = Registers::power_on();
        // The interrupt controllers may have forgotten the level in their own reset.
        self.driven = None;
        self.drive();
        self.backend.room();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let Uart {
            unit,
            base: _,
            regs,
            line: _,
            driven: _,
            backend: _,
        } = self;
        Ok(Section::new(unit, KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let saved: Registers = section.decode(KIND, VERSION)?;
        if saved.rx.len() > FIFO_BYTES {
            let detail = format!("receive FIFO of {} bytes", saved.rx.len());
            return Err(StateError::Invalid {
                unit: self.unit.clone(),
                detail,
            });
        }
        self.regs = saved;
        self.driven = None;
        self.drive();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let r = &self.regs;
        Inspect::node([
            ("ier", Inspect::Hex(r.ier.into())),
            // As a read would give it, without the effect of one.
            ("iir", Inspect::Hex(r.interrupt().into())),
            ("fcr", Inspect::Hex(r.fcr.into())),
            ("lcr", Inspect::Hex(r.lcr.into())),
            ("mcr", Inspect::Hex(r.mcr.into())),
            ("lsr", Inspect::Hex(r.lsr().into())),
            ("msr", Inspect::Hex(r.msr.into())),
            ("thre_pending", Inspect::Bool(r.thre_pending)),
            ("line", Inspect::Bool(self.driven.unwrap_or(false))),
            ("divisor", Inspect::Uint(r.divisor.into())),
            ("received", Inspect::Uint(r.rx.len() as u64)),
        ])
    }
}
