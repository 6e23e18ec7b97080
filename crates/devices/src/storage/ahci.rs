//! AHCI host bus adapter of an ICH9 with six SATA ports. Serial ATA AHCI 1.3.1 is the standard
//! meant by section numbers here.
//!
//! ```text
//! BAR 5, 4 KiB: 000 generic host control, 100 + 80H · n port n
//!
//! PxCI bit ─► command header ─► command FIS ─► ata::Device ─► plan ─► back end
//!   (guest)     PRD table ──────────────────────────────────► buffers    │ any thread
//!                 received FIS, PxTFD, PxIS, PxCI/PxSACT ◄───────────────┘
//! ```
//!
//! Queued commands run side by side; any other command runs alone, as on the link. A port that is
//! stopped or reset with commands in flight says so (PxCMD.CR, no link) until the last one has
//! come back, so nothing writes to memory that the guest has been given back.

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::{Outcome, execute};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, PciIds, PciInterrupts};
use pyrite_vdev::{BarKind, Dma, IrqLine, Lifecycle, MsiSink, PciFunction};

use super::ata::Device;

mod fis;
mod port;
#[cfg(test)]
mod tests;

use port::{Job, Port, PortSaved};

const KIND: &str = "ahci";
const VERSION: u16 = 1;

/// Ports of a controller.
pub const PORTS: usize = 6;
/// The ABAR.
const BAR: u8 = 5;
const BAR_BYTES: u64 = 0x1000;
/// Offset of port 0, and bytes of a port.
const PORTS_AT: u64 = 0x100;
const PORT_BYTES: u64 = 0x80;

/// CAP, §3.1.1: 64-bit addresses, queuing, command list override, AHCI only, 3 Gb/s, 32 slots.
const CAP: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 1 << 18 | 2 << 20 | 31 << 8 | (PORTS as u32 - 1);
/// VS: 1.3.
const VS: u32 = 0x0001_0300;
/// GHC bits, §3.1.2.
const GHC_HR: u32 = 1 << 0;
const GHC_IE: u32 = 1 << 1;
const GHC_AE: u32 = 1 << 31;

struct State {
    /// GHC.IE.
    interrupts_on: bool,
    is: u32,
    ports: Vec<Port>,
    /// Between start and pause.
    running: bool,
    /// A thread is handing commands out.
    pumping: bool,
}

/// What completions need of the controller.
struct Hba {
    dma: Dma,
    memory: Arc<GuestMemory>,
    interrupts: PciInterrupts,
    // LOCK ORDER: Ahci < this < interrupt controllers. Not held while a back end is called.
    state: Mutex<State>,
}

impl State {
    /// Commands in flight, of this life of a port or an earlier one.
    fn in_flight(&self) -> u32 {
        self.ports.iter().map(Port::in_flight).sum()
    }
}

impl Hba {
    /// Starts every command that may start.
    fn pump(self: &Arc<Self>) {
        let mut s = lock(&self.state);
        if s.pumping {
            return; // that thread looks again before it ends
        }
        s.pumping = true;
        while let Some(Job {
            plan,
            bufs,
            started,
        }) = self.next(&mut s)
        {
            drop(s);
            let hba = Arc::clone(self);
            let done = Box::new(move |outcome| hba.complete(&started, &outcome));
            execute(plan, &self.memory, &bufs, done);
            s = lock(&self.state);
        }
        s.pumping = false;
    }

    fn next(&self, s: &mut State) -> Option<Job> {
        if !s.running {
            return None;
        }
        let memory = self.dma.memory().ok()?;
        let mut events = false;
        let mut job = None;
        for (n, p) in s.ports.iter_mut().enumerate() {
            job = p.next(n, memory, &mut events);
            if job.is_some() {
                break;
            }
        }
        if events {
            self.update(s, true);
        }
        job
    }

    fn complete(self: &Arc<Self>, started: &port::Started, outcome: &Outcome) {
        let mut s = lock(&self.state);
        if let Some(p) = s.ports.get_mut(started.port) {
            p.complete(&self.memory, started, outcome);
        }
        self.update(&mut s, true);
        drop(s);
        self.pump();
    }

    /// Brings IS and the interrupt in line with the ports. `event`: something happened that may
    /// need a new message.
    fn update(&self, s: &mut State, event: bool) {
        for (n, p) in s.ports.iter().enumerate() {
            if p.interrupt() {
                s.is |= 1 << n;
            }
        }
        let level = s.interrupts_on && s.is != 0;
        self.interrupts.set_intx(level);
        if level && event {
            self.interrupts.signal(0);
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let s = lock(&self.state);
        match offset {
            0x00 => CAP,
            0x04 => {
                let resetting = s.ports.iter().any(|p| p.resetting());
                GHC_AE
                    | if s.interrupts_on { GHC_IE } else { 0 }
                    | if resetting { GHC_HR } else { 0 }
            }
            0x08 => s.is,
            0x0c => (1 << PORTS) - 1,
            0x10 => VS,
            _ => match port_at(offset) {
                Some((n, register)) => s.ports.get(n).map_or(0, |p| p.read(register)),
                None => 0,
            },
        }
    }

    /// `mask` has the bytes that are written.
    fn write(&self, offset: u64, value: u32, mask: u32) {
        let mut s = lock(&self.state);
        match offset {
            0x04 => {
                if value & mask & GHC_HR != 0 {
                    s.interrupts_on = false;
                    s.is = 0;
                    s.ports.iter_mut().for_each(Port::hba_reset);
                } else if mask & GHC_IE != 0 {
                    s.interrupts_on = value & GHC_IE != 0;
                }
            }
            0x08 => s.is &= !(value & mask),
            _ => {
                if let Some((n, register)) = port_at(offset)
                    && let Some(p) = s.ports.get_mut(n)
                {
                    p.write(&self.memory, register, value, mask);
                }
            }
        }
        self.update(&mut s, true);
    }
}

fn port_at(offset: u64) -> Option<(usize, u64)> {
    let at = offset.checked_sub(PORTS_AT)?;
    Some(((at / PORT_BYTES) as usize, at % PORT_BYTES))
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    config: ConfigSaved,
    #[n(1)]
    interrupts_on: bool,
    #[n(2)]
    is: u32,
    #[n(3)]
    ports: Vec<PortSaved>,
}

/// The controller: a PCI function and a unit of the machine.
pub struct Ahci {
    unit: String,
    config: ConfigSpace,
    hba: Arc<Hba>,
}

impl Ahci {
    /// A controller with these drives on its ports (at most [`PORTS`]).
    pub fn new(
        unit: &str,
        drives: Vec<Option<Device>>,
        memory: Arc<GuestMemory>,
        msi: Arc<dyn MsiSink>,
        intx: IrqLine,
    ) -> Arc<Mutex<Ahci>> {
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: 0x8086,
            device_id: 0x2922,
            revision: 2,
            class: 0x01_06_01,
            subsystem_vendor_id: 0x8086,
            subsystem_id: 0x2922,
        });
        config.add_bar(BAR, BarKind::Mem32, BAR_BYTES);
        config.add_msi(0, msi);
        config.set_intx(0, intx);
        let mut drives = drives.into_iter();
        let ports = (0..PORTS).map(|_| Port::new(drives.next().flatten()));
        let hba = Hba {
            dma: Dma::new(Arc::clone(&memory), config.bus_master()),
            memory,
            interrupts: config.interrupts(),
            state: Mutex::new(State {
                interrupts_on: false,
                is: 0,
                ports: ports.collect(),
                running: false,
                pumping: false,
            }),
        };
        Arc::new(Mutex::new(Ahci {
            unit: unit.to_owned(),
            config,
            hba: Arc::new(hba),
        }))
    }
}

impl PciFunction for Ahci {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        // Bus mastering may be on now.
        self.hba.pump();
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        if index != BAR {
            return;
        }
        super::read_dwords(offset, data, |at| self.hba.read(at));
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        if index != BAR {
            return;
        }
        super::write_dwords(offset, data, |at, value, mask| {
            self.hba.write(at, value, mask);
        });
        self.hba.pump();
    }
}

impl Lifecycle for Ahci {
    fn unit(&self) -> &str {
        &self.unit
    }
    fn start(&mut self) {
        lock(&self.hba.state).running = true;
        self.hba.pump();
    }
    fn pause(&mut self) {
        lock(&self.hba.state).running = false;
    }
    fn drained(&mut self) -> bool {
        let s = lock(&self.hba.state);
        !s.pumping && s.in_flight() == 0
    }
    fn reset(&mut self) {
        self.config.reset();
        let mut s = lock(&self.hba.state);
        s.interrupts_on = false;
        s.is = 0;
        s.ports.iter_mut().for_each(Port::power_on);
        self.hba.update(&mut s, false);
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let s = lock(&self.hba.state);
        let State {
            interrupts_on,
            is,
            ports,
            running: _,
            pumping: _,
        } = &*s;
        if s.in_flight() > 0 {
            return Err(StateError::Unsupported {
                unit: self.unit.clone(),
                reason: "commands are in flight".into(),
            });
        }
        let saved = Saved {
            config: self.config.save(),
            interrupts_on: *interrupts_on,
            is: *is,
            ports: ports.iter().map(Port::save).collect(),
        };
        Ok(Section::new(&self.unit, KIND, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let Saved {
            config,
            interrupts_on,
            is,
            ports,
        } = section
            .decode(KIND, VERSION)
            .inspect_err(|_| self.reset())?;
        let restored = self.config.restore(&config).and_then(|()| {
            let mut s = lock(&self.hba.state);
            if ports.len() != s.ports.len() {
                return Err(format!("{} ports", ports.len()));
            }
            for (n, (p, saved)) in s.ports.iter_mut().zip(&ports).enumerate() {
                p.restore(saved).map_err(|e| format!("port {n}: {e}"))?;
            }
            s.interrupts_on = interrupts_on;
            s.is = is & ((1 << PORTS) - 1);
            self.hba.update(&mut s, false);
            Ok(())
        });
        restored.map_err(|detail| {
            self.reset();
            StateError::Invalid {
                unit: self.unit.clone(),
                detail,
            }
        })
    }
    fn inspect(&self) -> Inspect {
        let s = lock(&self.hba.state);
        let ports = s.ports.iter().enumerate();
        let ports = ports.filter(|(_, p)| p.has_device());
        let ports = ports.map(|(n, p)| (n.to_string(), p.inspect())).collect();
        Inspect::node([
            ("pci", self.config.inspect()),
            ("is", Inspect::Hex(s.is.into())),
            ("interrupts_on", Inspect::Bool(s.interrupts_on)),
            ("ports", Inspect::Node(ports)),
        ])
    }
}
