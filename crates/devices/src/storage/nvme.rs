//! NVMe controller. NVM Express 1.4 is the standard meant by section numbers here.
//!
//! ```text
//! BAR 0, 16 KiB: 0000 registers, 1000 doorbells, 2000 MSI-X table, 3000 pending bits
//!
//! submission queues ─► command ─► admin: done here
//!                                 NVM:   PRPs ─► back end ─► completion queue ─► MSI-X or INTx
//! ```
//!
//! A controller that is disabled with commands in flight stays ready (CSTS.RDY) until the last has
//! come back: then nothing of it can touch memory any more.

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_disk::batch::submit_all;
use pyrite_disk::{BlockBackend, BlockRequest, DiskError};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, MsixLayout, PciIds, PciInterrupts};
use pyrite_vdev::{BarKind, Dma, IrqLine, Lifecycle, MsiSink, PciFunction};

mod admin;
mod command;
mod controller;
mod identify;
mod queue;
#[cfg(test)]
mod tests;

use controller::{Controller, ControllerSaved};

const KIND: &str = "nvme";
const VERSION: u16 = 1;
const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x4000;
const MSIX_TABLE_AT: u32 = 0x2000;
const MSIX_PBA_AT: u32 = 0x3000;
/// LIMIT: I/O queue pairs.
pub const MAX_IO_QUEUES: u16 = 16;
/// LIMIT: entries of a queue.
const MAX_QUEUE_ENTRIES: u32 = 1024;
/// LIMIT: namespaces of a controller.
pub const MAX_NAMESPACES: usize = 64;

/// What a controller is called.
#[derive(Clone, Debug)]
pub struct NvmeNames {
    /// Model, up to 40 characters.
    pub model: String,
    /// Serial number, up to 20 characters.
    pub serial: String,
    /// Firmware revision, up to 8 characters.
    pub firmware: String,
}

/// A command for a back end.
struct Job {
    backend: Option<Arc<dyn BlockBackend>>,
    requests: Vec<BlockRequest>,
    started: Started,
}

/// A command that was started.
#[derive(Clone, Copy)]
enum Started {
    /// To be completed in the queue of submission queue `sq`.
    Command {
        life: u64,
        sq: u16,
        id: u16,
        write: bool,
    },
    /// The flush before a shutdown; so many are under way.
    Shutdown { life: u64 },
}

/// What completions need of the controller.
struct Shared {
    dma: Dma,
    memory: Arc<GuestMemory>,
    // LOCK ORDER: Nvme < this < interrupt controllers. Not held while a back end is called.
    controller: Mutex<Controller>,
}

impl Shared {
    /// Starts every command that may start.
    fn pump(self: &Arc<Self>) {
        let mut c = lock(&self.controller);
        if c.pumping {
            return; // that thread looks again before it ends
        }
        c.pumping = true;
        while let Some(job) = c.next(&self.dma) {
            drop(c);
            self.start(job);
            c = lock(&self.controller);
        }
        c.pumping = false;
    }

    fn start(self: &Arc<Self>, job: Job) {
        let shared = Arc::clone(self);
        let started = job.started;
        let done = Box::new(move |result: Result<(), DiskError>| {
            lock(&shared.controller).complete(&shared.memory, started, result.err().as_ref());
            shared.pump();
        });
        match job.backend {
            Some(backend) => submit_all(&*backend, &self.memory, job.requests, done),
            None => done(Ok(())),
        }
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
pub struct Nvme {
    unit: String,
    config: ConfigSpace,
    interrupts: PciInterrupts,
    shared: Arc<Shared>,
}

impl Nvme {
    /// A controller with these namespaces (at most [`MAX_NAMESPACES`]), numbered from 1.
    pub fn new(
        unit: &str,
        names: NvmeNames,
        namespaces: Vec<Arc<dyn BlockBackend>>,
        memory: Arc<GuestMemory>,
        msi: Arc<dyn MsiSink>,
        intx: IrqLine,
    ) -> Arc<Mutex<Nvme>> {
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: identify::VENDOR,
            device_id: 0x0010,
            revision: 2,
            class: 0x01_08_02,
            subsystem_vendor_id: identify::VENDOR,
            subsystem_id: 0x1100,
        });
        config.add_bar(BAR, BarKind::Mem64, BAR_BYTES);
        let layout = MsixLayout {
            table_bar: BAR,
            table_offset: MSIX_TABLE_AT,
            pba_bar: BAR,
            pba_offset: MSIX_PBA_AT,
        };
        config.add_msix(MAX_IO_QUEUES + 1, layout, msi);
        config.set_intx(0, intx);
        let interrupts = config.interrupts();
        let dma = Dma::new(Arc::clone(&memory), config.bus_master());
        let controller = Controller::new(names, namespaces, interrupts.clone());
        Arc::new(Mutex::new(Nvme {
            unit: unit.to_owned(),
            config,
            interrupts,
            shared: Arc::new(Shared {
                dma,
                memory,
                controller: Mutex::new(controller),
            }),
        }))
    }
}

impl PciFunction for Nvme {
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
        let c = lock(&self.shared.controller);
        super::read_dwords(offset, data, |at| c.read(at));
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        if index != BAR || self.config.msix_write(index, offset, data) {
            return;
        }
        {
            let mut c = lock(&self.shared.controller);
            super::write_dwords(offset, data, |at, value, mask| {
                c.write(&self.shared.dma, at, value, mask);
            });
        }
        self.shared.pump();
    }
}

impl Lifecycle for Nvme {
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
                reason: "commands are in flight".into(),
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
