//! Two 8259A interrupt controllers in cascade, with the edge/level control registers of the PIIX.
//! Intel 8259A data sheet (order number 231468); ELCR: Intel 82371AB data sheet §4.2.1.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{IntrSink, Lifecycle, PioDevice};

const KIND: &str = "pic-8259";
const VERSION: u16 = 1;

/// The master's input that the slave's INT output drives.
const CASCADE: u8 = 2;

/// Registers of one 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Chip {
    /// Latched edges.
    #[n(0)]
    edges: u8,
    /// Input levels.
    #[n(1)]
    lines: u8,
    #[n(2)]
    isr: u8,
    #[n(3)]
    imr: u8,
    /// ICW2: upper five bits of the vector.
    #[n(4)]
    vector_base: u8,
    /// Input with the lowest priority.
    #[n(5)]
    lowest: u8,
    /// Next initialisation command word expected (2-4), 0 = operating.
    #[n(6)]
    icw: u8,
    /// ICW1.IC4: ICW4 will follow.
    #[n(7)]
    icw4_needed: bool,
    /// ICW1.SNGL: no ICW3.
    #[n(8)]
    single: bool,
    /// ICW1.LTIM: all inputs are level-triggered.
    #[n(9)]
    level_mode: bool,
    #[n(10)]
    auto_eoi: bool,
    /// OCW2: rotate in automatic EOI mode.
    #[n(11)]
    rotate_on_auto_eoi: bool,
    /// ICW4.SFNM.
    #[n(12)]
    fully_nested: bool,
    #[n(13)]
    special_mask: bool,
    /// OCW3.P: the next read is a poll.
    #[n(14)]
    poll: bool,
    /// OCW3.RIS: reads show ISR instead of IRR.
    #[n(15)]
    read_isr: bool,
    #[n(16)]
    elcr: u8,
}

impl Chip {
    fn power_on() -> Chip {
        Chip {
            lowest: 7,
            ..Chip::default()
        }
    }

    fn level_triggered(&self) -> u8 {
        if self.level_mode { 0xff } else { self.elcr }
    }

    fn irr(&self) -> u8 {
        let level = self.level_triggered();
        (self.lines & level) | (self.edges & !level)
    }

    fn set_line(&mut self, n: u8, level: bool) {
        let bit = 1 << (n & 7);
        if level && self.lines & bit == 0 {
            // An edge stays latched when the input falls before INTA: several of our devices
            // pulse their line, which the real chip would see as too short.
            self.edges |= bit;
        }
        self.lines = if level {
            self.lines | bit
        } else {
            self.lines & !bit
        };
    }

    /// The highest-priority bit of `set`, counted from the top priority (0) downwards.
    fn rank(&self, set: u8) -> Option<u32> {
        let top = (self.lowest + 1) & 7;
        (set != 0).then(|| set.rotate_right(u32::from(top)).trailing_zeros())
    }

    fn input_of_rank(&self, rank: u32) -> u8 {
        (self.lowest + 1 + rank as u8) & 7
    }

    /// The input that asks for service now.
    fn request(&self, is_master: bool) -> Option<u8> {
        if self.icw != 0 {
            return None;
        }
        let wanted = self.rank(self.irr() & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.fully_nested && is_master {
            serving &= !(1 << CASCADE);
        }
        (self.rank(serving).is_none_or(|s| wanted < s)).then(|| self.input_of_rank(wanted))
    }

    /// INTA for input `n`.
    fn begin_service(&mut self, n: u8) {
        self.edges &= !(1 << n);
        if !self.auto_eoi {
            self.isr |= 1 << n;
        } else if self.rotate_on_auto_eoi {
            self.lowest = n;
        }
    }

    fn write_command(&mut self, v: u8) {
        if v & 0x10 != 0 {
            // ICW1.
            *self = Chip {
                lines: self.lines,
                elcr: self.elcr,
                vector_base: self.vector_base,
                icw: 2,
                icw4_needed: v & 1 != 0,
                single: v & 2 != 0,
                level_mode: v & 8 != 0,
                ..Chip::power_on()
            };
        } else if v & 0x08 != 0 {
            // OCW3.
            if v & 0x40 != 0 {
                self.special_mask = v & 0x20 != 0;
            }
            if v & 0x04 != 0 {
                self.poll = true;
            } else if v & 0x02 != 0 {
                self.read_isr = v & 0x01 != 0;
            }
        } else {
            self.write_ocw2(v);
        }
    }

    fn write_ocw2(&mut self, v: u8) {
        let (rotate, specific, eoi) = (v & 0x80 != 0, v & 0x40 != 0, v & 0x20 != 0);
        let level = v & 7;
        match (specific, eoi) {
            (false, false) => self.rotate_on_auto_eoi = rotate,
            (true, false) if rotate => self.lowest = level,
            (true, false) => {} // no operation
            (false, true) => {
                // In special mask mode a non-specific EOI leaves masked levels in service.
                let set = if self.special_mask {
                    self.isr & !self.imr
                } else {
                    self.isr
                };
                if let Some(rank) = self.rank(set) {
                    let n = self.input_of_rank(rank);
                    self.isr &= !(1 << n);
                    if rotate {
                        self.lowest = n;
                    }
                }
            }
            (true, true) => {
                self.isr &= !(1 << level);
                if rotate {
                    self.lowest = level;
                }
            }
        }
    }

    fn write_data(&mut self, v: u8) {
        self.icw = match self.icw {
            2 => {
                self.vector_base = v & 0xf8;
                if !self.single {
                    3
                } else if self.icw4_needed {
                    4
                } else {
                    0
                }
            }
            // The cascade is wired; ICW3 only has to be taken.
            3 if self.icw4_needed => 4,
            3 => 0,
            4 => {
                self.auto_eoi = v & 2 != 0;
                self.fully_nested = v & 0x10 != 0;
                0
            }
            _ => {
                self.imr = v;
                0
            }
        }
    }
}

/// Registers of both chips.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    master: Chip,
    #[n(1)]
    slave: Chip,
    /// Level that the INTR output was last seen to have.
    #[n(2)]
    intr: bool,
}

impl Registers {
    fn power_on() -> Registers {
        Registers {
            master: Chip::power_on(),
            slave: Chip::power_on(),
            intr: false,
        }
    }

    /// Lets the slave's output reach the master, and gives INTR.
    fn settle(&mut self) -> bool {
        let cascade = self.slave.request(false).is_some();
        // The slave's INT stays high while it has more to serve, without a new edge.
        if cascade {
            self.master.edges |= 1 << CASCADE;
        }
        self.master.set_line(CASCADE, cascade);
        self.master.request(true).is_some()
    }

    /// INTA. `intr_seen`: the processor was told that INTR is high and not yet otherwise.
    fn ack(&mut self, intr_seen: bool) -> Option<u8> {
        self.settle();
        let Some(n) = self.master.request(true) else {
            // The request went away after the processor saw INTR: the master answers with its
            // lowest input, without setting ISR ("default IR7").
            return intr_seen.then_some(self.master.vector_base | 7);
        };
        self.master.begin_service(n);
        if n != CASCADE {
            return Some(self.master.vector_base | n);
        }
        match self.slave.request(false) {
            Some(n) => {
                self.slave.begin_service(n);
                Some(self.slave.vector_base | n)
            }
            None => Some(self.slave.vector_base | 7),
        }
    }

    fn read(&mut self, port: u16) -> Option<u8> {
        let is_master = port < 0x80;
        let chip = match port {
            0x20 | 0x21 => &mut self.master,
            0xa0 | 0xa1 => &mut self.slave,
            0x4d0 => return Some(self.master.elcr),
            0x4d1 => return Some(self.slave.elcr),
            _ => return None,
        };
        Some(if chip.poll {
            chip.poll = false;
            match chip.request(is_master) {
                Some(n) => {
                    chip.begin_service(n);
                    0x80 | n
                }
                None => 0,
            }
        } else if port & 1 != 0 {
            chip.imr
        } else if chip.read_isr {
            chip.isr
        } else {
            chip.irr()
        })
    }

    fn write(&mut self, port: u16, v: u8) {
        match port {
            0x20 => self.master.write_command(v),
            0x21 => self.master.write_data(v),
            0xa0 => self.slave.write_command(v),
            0xa1 => self.slave.write_data(v),
            // IRQ 0, 1, 2, 8 and 13 are always edge-triggered.
            0x4d0 => self.master.elcr = v & 0xf8,
            0x4d1 => self.slave.elcr = v & 0xde,
            _ => {}
        }
    }
}

/// The PIC pair, shared by the router, the engine and the port device.
pub struct Pic {
    // LOCK ORDER: leaf. Never held while the sink is called.
    registers: Mutex<Registers>,
    /// The level that the sink was last told. Changes only with `registers` locked.
    told: AtomicBool,
    sink: Arc<dyn IntrSink>,
}

impl Pic {
    /// A PIC whose INTR output goes to `sink`.
    pub fn new(sink: Arc<dyn IntrSink>) -> Arc<Pic> {
        let registers = Mutex::new(Registers::power_on());
        Arc::new(Pic {
            registers,
            told: AtomicBool::new(false),
            sink,
        })
    }

    /// Drives input `irq` (0-15).
    pub fn set_line(&self, irq: u8, level: bool) {
        self.change(|r| match irq {
            0..8 => r.master.set_line(irq, level),
            8..16 => r.slave.set_line(irq - 8, level),
            _ => {}
        });
    }

    /// Interrupt acknowledge cycle: the vector, `None` if INTR is not asserted.
    pub fn ack(&self) -> Option<u8> {
        self.change(|r| r.ack(self.told.load(Ordering::Relaxed)))
    }

    /// Changes registers and then states INTR if it changed.
    ///
    /// Two threads may call the sink in the wrong order; so each looks again after its call and
    /// repeats if the level it stated is no longer right. The last call is thus always right.
    fn change<T>(&self, f: impl FnOnce(&mut Registers) -> T) -> T {
        let (result, mut changed, mut level) = {
            let mut r = lock(&self.registers);
            let result = f(&mut r);
            let level = r.settle();
            let changed = r.intr != level;
            r.intr = level;
            (result, changed, level)
        };
        while changed {
            self.sink.set_intr(level);
            let r = lock(&self.registers);
            self.told.store(level, Ordering::Relaxed);
            let now = r.intr;
            changed = now != level;
            level = now;
        }
        result
    }
}

/// The PIC's ports (20H, 21H, A0H, A1H, 4D0H, 4D1H) and its place in the machine's life.
pub struct PicDevice {
    pic: Arc<Pic>,
}

impl PicDevice {
    /// The ports of `pic`.
    pub fn new(pic: Arc<Pic>) -> PicDevice {
        PicDevice { pic }
    }
}

impl PioDevice for PicDevice {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        for (port, b) in (port..).zip(data) {
            if let Some(v) = self.pic.change(|r| r.read(port)) {
                *b = v;
            }
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        for (port, b) in (port..).zip(data) {
            self.pic.change(|r| r.write(port, *b));
        }
    }
}

impl Lifecycle for PicDevice {
    fn unit(&self) -> &str {
        "pic"
    }
    passive!();
    fn reset(&mut self) {
        self.pic.change(|r| {
            *r = Registers {
                intr: r.intr,
                ..Registers::power_on()
            };
        });
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let PicDevice { pic } = self;
        let Pic {
            registers,
            told: _,
            sink: _,
        } = &**pic;
        Ok(Section::new("pic", KIND, VERSION, &*lock(registers)))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let mut saved: Registers = section.decode(KIND, VERSION)?;
        for chip in [&mut saved.master, &mut saved.slave] {
            if chip.lowest > 7 || !matches!(chip.icw, 0 | 2..=4) {
                let detail = format!("priority {} or ICW state {}", chip.lowest, chip.icw);
                return Err(StateError::Invalid {
                    unit: "pic".into(),
                    detail,
                });
            }
        }
        self.pic.change(|r| {
            *r = Registers {
                intr: r.intr,
                ..saved
            }
        });
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let r = lock(&self.pic.registers).clone();
        let chip = |c: &Chip| {
            Inspect::node([
                ("irr", Inspect::Hex(c.irr().into())),
                ("isr", Inspect::Hex(c.isr.into())),
                ("imr", Inspect::Hex(c.imr.into())),
                ("elcr", Inspect::Hex(c.elcr.into())),
                ("vector_base", Inspect::Hex(c.vector_base.into())),
            ])
        };
        Inspect::node([
            ("master", chip(&r.master)),
            ("slave", chip(&r.slave)),
            ("intr", Inspect::Bool(r.intr)),
        ])
    }
}
