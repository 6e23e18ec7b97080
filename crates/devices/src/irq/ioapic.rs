//! IO-APIC with 24 pins and an EOI register (version 20H).
//! Intel 82093AA data sheet (order number 290566); EOI register: Intel ICH9 data sheet §13.5.6.

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{Lifecycle, MmioDevice, MsiMessage, MsiSink};

const KIND: &str = "ioapic";
const VERSION: u16 = 1;
const PINS: usize = 24;

// Memory-mapped registers, §3.1.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

// Indirect registers, §3.2.
const IOAPICID: u8 = 0x00;
const IOAPICVER: u8 = 0x01;
const IOAPICARB: u8 = 0x02;
const IOREDTBL: u8 = 0x10;

// Redirection table entry, §3.2.4.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE_SHIFT: u32 = 8;
const LOWEST_PRIORITY: u64 = 1;
const DESTINATION_LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits that software can write. Polarity (13) is kept but has no effect: lines carry
/// "asserted", not a voltage.
const WRITABLE: u64 = 0xff00_0000_0001_afff & !(1 << 12);

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    select: u8,
    #[n(1)]
    id: u8,
    #[n(2)]
    table: [u64; PINS],
    /// Asserted pins.
    #[n(3)]
    lines: u32,
}

impl Registers {
    fn power_on(id: u8) -> Registers {
        Registers {
            select: 0,
            id,
            table: [MASKED; PINS],
            lines: 0,
        }
    }

    fn read(&self) -> u32 {
        match self.select {
            IOAPICID | IOAPICARB => u32::from(self.id & 0xf) << 24,
            IOAPICVER => 0x20 | (PINS as u32 - 1) << 16,
            n => match self.table.get(usize::from(n.wrapping_sub(IOREDTBL) / 2)) {
                Some(e) if n >= IOREDTBL => (e >> (32 * (n & 1))) as u32,
                _ => 0,
            },
        }
    }

    fn write(&mut self, v: u32) -> Option<MsiMessage> {
        match self.select {
            IOAPICID => self.id = (v >> 24) as u8 & 0xf,
            n if n >= IOREDTBL => {
                let pin = usize::from((n - IOREDTBL) / 2);
                let e = self.table.get_mut(pin)?;
                let shift = 32 * (n & 1);
                let mask = WRITABLE & (0xffff_ffff << shift);
                *e = (*e & !mask) | (u64::from(v) << shift & mask);
                if *e & LEVEL == 0 {
                    *e &= !REMOTE_IRR;
                }
                return self.deliver_level(pin);
            }
            _ => {}
        }
        None
    }

    fn message(entry: u64) -> MsiMessage {
        let mode = entry >> DELIVERY_MODE_SHIFT & 7;
        let mut addr = 0xfee0_0000 | (entry >> 56) << 12;
        if entry & DESTINATION_LOGICAL != 0 {
            // Intel SDM Vol. 3A §10.11.1: destination mode (2); the redirection hint (3) would
            // turn a fixed message into lowest-priority delivery.
            addr |= if mode == LOWEST_PRIORITY { 0xc } else { 0x4 };
        }
        let trigger = if entry & LEVEL != 0 { 1 << 15 } else { 0 };
        let data = (entry & VECTOR) | mode << 8 | 1 << 14 | trigger;
        MsiMessage {
            addr,
            data: data as u32,
        }
    }

    /// Delivers a level-triggered pin that is asserted, unmasked and not being served.
    fn deliver_level(&mut self, pin: usize) -> Option<MsiMessage> {
        let e = self.table.get_mut(pin)?;
        if *e & (LEVEL | MASKED | REMOTE_IRR) != LEVEL || self.lines >> pin & 1 == 0 {
            return None;
        }
        *e |= REMOTE_IRR;
        Some(Registers::message(*e))
    }

    fn set_pin(&mut self, pin: usize, level: bool) -> Option<MsiMessage> {
        let bit = 1u32.checked_shl(pin as u32)?;
        let rose = level && self.lines & bit == 0;
        self.lines = if level {
            self.lines | bit
        } else {
            self.lines & !bit
        };
        let e = *self.table.get(pin)?;
        if e & LEVEL != 0 {
            return self.deliver_level(pin);
        }
        // §3.2.4: an edge on a masked pin is ignored, not remembered.
        (rose && e & MASKED == 0).then(|| Registers::message(e))
    }

    /// Ends `vector` and delivers what is still asserted.
    fn eoi(&mut self, vector: u8) -> Vec<MsiMessage> {
        let mut out = Vec::new();
        for pin in 0..PINS {
            let Some(e) = self.table.get_mut(pin) else {
                break;
            };
            if *e & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && *e & VECTOR == u64::from(vector) {
                *e &= !REMOTE_IRR;
                out.extend(self.deliver_level(pin));
            }
        }
        out
    }
}

/// The IO-APIC, shared by the router, the engine and the memory-mapped device.
pub struct IoApic {
    // LOCK ORDER: leaf. Never held while the sink is called.
    registers: Mutex<Registers>,
    sink: Arc<dyn MsiSink>,
    power_on_id: u8,
}

impl IoApic {
    /// An IO-APIC with this APIC id whose messages go to `sink`.
    pub fn new(id: u8, sink: Arc<dyn MsiSink>) -> Arc<IoApic> {
        let registers = Mutex::new(Registers::power_on(id));
        Arc::new(IoApic {
            registers,
            sink,
            power_on_id: id,
        })
    }

    /// Drives a pin (0-23).
    pub fn set_pin(&self, pin: u32, level: bool) {
        let message = lock(&self.registers).set_pin(pin as usize, level);
        if let Some(m) = message {
            self.sink.send(m);
        }
    }

    /// A local APIC ended level-triggered `vector`.
    pub fn eoi(&self, vector: u8) {
        let messages = lock(&self.registers).eoi(vector);
        for m in messages {
            self.sink.send(m);
        }
    }
}

/// The IO-APIC's registers in memory and its place in the machine's life.
pub struct IoApicDevice {
    ioapic: Arc<IoApic>,
}

impl IoApicDevice {
    /// The registers of `ioapic`.
    pub fn new(ioapic: Arc<IoApic>) -> IoApicDevice {
        IoApicDevice { ioapic }
    }
}

impl MmioDevice for IoApicDevice {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let r = lock(&self.ioapic.registers);
        let v = match offset & !3 {
            IOREGSEL => u32::from(r.select),
            IOWIN => r.read(),
            _ => 0,
        };
        let from = v.to_le_bytes();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(&from[(offset & 3) as usize..]) {
            *to = *from;
        }
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let v = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => lock(&self.ioapic.registers).select = v as u8,
            // §3.1: accesses are 32 bits wide; a narrower one would corrupt an entry.
            IOWIN if data.len() >= 4 => {
                let message = lock(&self.ioapic.registers).write(v);
                if let Some(m) = message {
                    self.ioapic.sink.send(m);
                }
            }
            EOI => self.ioapic.eoi(v as u8),
            _ => {}
        }
    }
}

impl Lifecycle for IoApicDevice {
    fn unit(&self) -> &str {
        "ioapic"
    }
    passive!();
    fn reset(&mut self) {
        *lock(&self.ioapic.registers) = Registers::power_on(self.ioapic.power_on_id);
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let IoApicDevice { ioapic } = self;
        let IoApic {
            registers,
            sink: _,
            power_on_id: _,
        } = &**ioapic;
        Ok(Section::new("ioapic", KIND, VERSION, &*lock(registers)))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let mut saved: Registers = section.decode(KIND, VERSION)?;
        for e in &mut saved.table {
            *e &= WRITABLE | REMOTE_IRR;
        }
        *lock(&self.ioapic.registers) = saved;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let r = lock(&self.ioapic.registers).clone();
        let table = r
            .table
            .iter()
            .enumerate()
            .map(|(n, e)| (n.to_string(), Inspect::Hex(*e)));
        Inspect::node([
            ("id", Inspect::Uint(r.id.into())),
            ("lines", Inspect::Hex(r.lines.into())),
            ("table", Inspect::Node(table.collect())),
        ])
    }
}
