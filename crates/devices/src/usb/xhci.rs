//! USB host controller. The eXtensible Host Controller Interface specification 1.1 is the standard
//! meant by section numbers here; the controller is one of version 1.0.
//!
//! ```text
//! BAR 0, 16 KiB: 0000 capabilities, 0040 operational, 0440 ports, 0600 protocols,
//!                1000 runtime, 2000 doorbells, 3000 MSI-X table, 3800 pending bits
//!
//! command ring ─► slots ─► contexts in memory
//! transfer rings ─► descriptors ─► device ─► (disk) ─► event ring ─► MSI-X, MSI or INTx
//! ```
//!
//! Ports 1 to 8 are those of USB 3, 9 to 12 those of USB 2. A controller that is reset with
//! transfers under way stays "not ready" until the last has come back: then nothing of it can touch
//! memory any more. Commands that would take an endpoint away wait in the same way.

use std::sync::{Arc, Mutex, Weak};

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::{Outcome, execute};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, MsixLayout, PciIds, PciInterrupts};
use pyrite_vdev::{
    BarKind, DeviceTimer, Dma, IrqLine, Lifecycle, MsiSink, PciFunction, TimedDevice, VmClock,
};

use super::device::{Heard, Input, UsbDevice, Work};
use crate::dwords::{read_dwords, write_dwords};

mod controller;
mod interrupter;
mod port;
mod ring;
mod slot;
#[cfg(test)]
mod tests;
mod transfer;

use controller::{BUDGET, Controller, ControllerSaved, PAUSE_NS};

const KIND: &str = "xhci";
const VERSION: u16 = 1;
const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x4000;
const OPERATIONAL_AT: u64 = 0x40;
const PORTS_AT: u64 = 0x440;
const PROTOCOLS_AT: u64 = 0x600;
const RUNTIME_AT: u64 = 0x1000;
const DOORBELLS_AT: u64 = 0x2000;
const MSIX_TABLE_AT: u32 = 0x3000;
const MSIX_PBA_AT: u32 = 0x3800;
/// Interrupters, each with an event ring.
const INTERRUPTERS: usize = 8;
/// LIMIT: device slots.
const MAX_SLOTS: u8 = 64;
/// Ports for devices of USB 3.
pub const USB3_PORTS: usize = 8;
/// Ports for devices of USB 2.
pub const USB2_PORTS: usize = 4;
const PORTS: usize = USB3_PORTS + USB2_PORTS;

/// Completion codes, table 6-90.
#[allow(missing_docs, reason = "the standard's names")]
mod code {
    pub const SUCCESS: u8 = 1;
    pub const TRANSACTION_ERROR: u8 = 4;
    pub const TRB_ERROR: u8 = 5;
    pub const STALL_ERROR: u8 = 6;
    pub const NO_SLOTS: u8 = 9;
    pub const SLOT_NOT_ENABLED: u8 = 11;
    pub const ENDPOINT_NOT_ENABLED: u8 = 12;
    pub const SHORT_PACKET: u8 = 13;
    pub const PARAMETER_ERROR: u8 = 17;
    pub const CONTEXT_STATE_ERROR: u8 = 19;
    pub const EVENT_RING_FULL: u8 = 21;
    pub const COMMAND_RING_STOPPED: u8 = 24;
    pub const STOPPED: u8 = 26;
}

/// Work for a disk, and the transfer that it belongs to.
struct Job {
    life: u64,
    /// Slot and endpoint.
    at: (u8, u8),
    work: Work,
}

/// What completions need of the controller.
struct Shared {
    dma: Dma,
    memory: Arc<GuestMemory>,
    timer: DeviceTimer,
    // LOCK ORDER: Xhci < this < interrupt controllers. Not held while a disk is called.
    controller: Mutex<Controller>,
}

impl Shared {
    /// Serves what there is to serve.
    fn pump(self: &Arc<Self>) {
        let mut c = lock(&self.controller);
        if c.pumping {
            return; // that thread looks again before it ends
        }
        c.pumping = true;
        c.budget = BUDGET;
        let now_ns = self.timer.now_ns();
        while let Ok(memory) = self.dma.memory()
            && let Some(job) = c.next(Controller::bus(memory, now_ns))
        {
            c.update_interrupts();
            drop(c);
            self.start(job);
            c = lock(&self.controller);
        }
        c.update_interrupts();
        c.pumping = false;
        let mut deadline = c.deadline(now_ns).filter(|_| c.running);
        if c.budget == 0 && c.running {
            let later = now_ns.saturating_add(PAUSE_NS);
            deadline = Some(deadline.map_or(later, |d| d.min(later)));
        }
        // With the controller locked: what another thread sets is newer.
        self.timer.set(deadline);
    }

    fn start(self: &Arc<Self>, job: Job) {
        let shared = Arc::clone(self);
        let Job { life, at, work } = job;
        let done = Box::new(move |outcome: Outcome| {
            let bus = Controller::bus(&shared.memory, shared.timer.now_ns());
            let again = lock(&shared.controller).complete(bus, life, at, &outcome);
            match again {
                Some(job) => shared.start(job),
                None => shared.pump(),
            }
        });
        execute(work.plan, &self.memory, &work.bufs, done);
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    config: ConfigSaved,
    #[n(1)]
    controller: ControllerSaved,
}

/// The controller: a PCI function and a unit of the machine.
pub struct Xhci {
    unit: String,
    config: ConfigSpace,
    interrupts: PciInterrupts,
    shared: Arc<Shared>,
}

impl Xhci {
    /// A controller with these devices (at most [`USB3_PORTS`] and [`USB2_PORTS`]), which are
    /// plugged into its ports in this order.
    pub fn new(
        unit: &str,
        devices: Vec<Box<dyn UsbDevice>>,
        memory: Arc<GuestMemory>,
        clock: &Arc<VmClock>,
        msi: Arc<dyn MsiSink>,
        intx: IrqLine,
    ) -> Arc<Mutex<Xhci>> {
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: 0x1b36,
            device_id: 0x000d,
            revision: 1,
            class: 0x0c_03_30,
            subsystem_vendor_id: 0x1b36,
            subsystem_id: 0x1100,
        });
        config.add_bar(BAR, BarKind::Mem64, BAR_BYTES);
        // SBRN: 3.0; FLADJ. §5.2.3 and §5.2.4.
        config.add_registers(0x60, &[0x30, 0x20], &[0, 0x3f]);
        let layout = MsixLayout {
            table_bar: BAR,
            table_offset: MSIX_TABLE_AT,
            pba_bar: BAR,
            pba_offset: MSIX_PBA_AT,
        };
        config.add_msi(0, Arc::clone(&msi));
        config.add_msix(INTERRUPTERS as u16, layout, msi);
        config.set_intx(0, intx);
        let interrupts = config.interrupts();
        let dma = Dma::new(Arc::clone(&memory), config.bus_master());
        let controller = Controller::new(devices, interrupts.clone());
        Arc::new_cyclic(|me: &Weak<Mutex<Xhci>>| {
            Mutex::new(Xhci {
                unit: unit.to_owned(),
                config,
                interrupts,
                shared: Arc::new(Shared {
                    dma,
                    memory,
                    timer: DeviceTimer::new(clock, me),
                    controller: Mutex::new(controller),
                }),
            })
        })
    }

    /// Something happens outside: a device that the guest uses takes it, has no room for it now, or
    /// there is none.
    pub fn input(&self, event: &Input) -> Heard {
        let heard = lock(&self.shared.controller).input(event);
        self.shared.pump();
        heard
    }

    /// The guest uses a device that knows where the pointer is.
    pub fn wants_pointer(&self) -> bool {
        lock(&self.shared.controller).wants_pointer()
    }
}

impl TimedDevice for Xhci {
    fn timer_fired(&mut self, now_ns: u64) {
        lock(&self.shared.controller).timer_fired(now_ns);
        self.shared.pump();
    }
}

impl PciFunction for Xhci {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        // Bus mastering may be on now.
        self.shared.pump();
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        if index != BAR || self.config.msix_read(index, offset, data) {
            return;
        }
        let now_ns = self.shared.timer.now_ns();
        let c = lock(&self.shared.controller);
        read_dwords(offset, data, |at| c.read(at, now_ns));
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        if index != BAR || self.config.msix_write(index, offset, data) {
            return;
        }
        {
            let mut c = lock(&self.shared.controller);
            write_dwords(offset, data, |at, value, mask| c.write(at, value, mask));
        }
        self.shared.pump();
    }
}

impl Lifecycle for Xhci {
    fn unit(&self) -> &str {
        &self.unit
    }
    fn start(&mut self) {
        lock(&self.shared.controller).running = true;
        self.shared.pump();
    }
    fn pause(&mut self) {
        lock(&self.shared.controller).running = false;
    }
    fn drained(&mut self) -> bool {
        let c = lock(&self.shared.controller);
        !c.pumping && c.in_flight() == 0
    }
    fn reset(&mut self) {
        self.config.reset();
        lock(&self.shared.controller).power_on();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let c = lock(&self.shared.controller);
        if c.in_flight() > 0 {
            return Err(StateError::Unsupported {
                unit: self.unit.clone(),
                reason: "transfers are under way".into(),
            });
        }
        let saved = Saved {
            config: self.config.save(),
            controller: c.save(),
        };
        Ok(Section::new(&self.unit, KIND, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let Saved { config, controller } = section
            .decode(KIND, VERSION)
            .inspect_err(|_| self.reset())?;
        let restored = self
            .config
            .restore(&config)
            .and_then(|()| lock(&self.shared.controller).restore(controller));
        restored.map_err(|detail| {
            self.reset();
            StateError::Invalid {
                unit: self.unit.clone(),
                detail,
            }
        })
    }
    fn inspect(&self) -> Inspect {
        let c = lock(&self.shared.controller);
        Inspect::node([
            ("pci", self.config.inspect()),
            (
                "messages",
                Inspect::Bool(self.interrupts.messages_enabled()),
            ),
            ("controller", c.inspect()),
        ])
    }
}
