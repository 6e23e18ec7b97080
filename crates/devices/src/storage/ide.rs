//! IDE controller like that of a PIIX3: two channels of two drives at the ports of a PC, with PIO
//! and bus-master DMA. Programming Interface for Bus Master IDE Controller 1.0 (BMIDE) and
//! ATA/ATAPI-6 are the standards meant by section numbers here.
//!
//! ```text
//! 1F0-1F7, 3F6, IRQ 14   channel 0      BAR 4: bus master, 8 ports a channel
//! 170-177, 376, IRQ 15   channel 1
//! ```

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::{Outcome, Plan, execute};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::{Bus, BusOverlap, lock};
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, PciIds};
use pyrite_vdev::{AddressDecoder, BarKind, Dma, IrqLine, Lifecycle, PciFunction, PioDevice};

use super::ata::Device;

mod channel;
mod data;
#[cfg(test)]
mod tests;

use channel::{Channel, ChannelSaved};

const KIND: &str = "ide";
const VERSION: u16 = 1;
/// Bus-master registers.
const BAR: u8 = 4;
const BAR_BYTES: u64 = 16;
/// Ports of a channel's bus-master registers.
const BM_BYTES: u64 = 8;
/// Command and control blocks of the channels.
const COMMAND_PORTS: [u64; 2] = [0x1f0, 0x170];
const CONTROL_PORTS: [u64; 2] = [0x3f6, 0x376];
/// Bytes of a channel's sector buffer: what is read ahead or collected in one request.
const BUFFER_BYTES: u32 = 128 << 10;
/// The least that guest memory, which the buffer is made of, comes in.
const BUFFER_MEMORY_BYTES: u64 = 1 << 20;

/// The drives: channel 0 master and slave, then channel 1.
pub type Drives = [[Option<Device>; 2]; 2];

/// Something for a back end, and whom it concerns.
struct Job {
    channel: usize,
    life: u64,
    plan: Plan,
    /// Guest memory or the channel's buffer.
    memory: Arc<GuestMemory>,
    bufs: Vec<pyrite_disk::IoBuf>,
}

/// What the ports and completions need of the controller.
struct Shared {
    dma: Dma,
    // LOCK ORDER: Ide < this < interrupt controllers. Not held while a back end is called.
    channels: [Mutex<Channel>; 2],
}

impl Shared {
    /// Does something with a channel, then what it wants of a back end.
    fn act<T>(self: &Arc<Self>, n: usize, act: impl FnOnce(&mut Channel, &Dma) -> T) -> Option<T> {
        let mut c = lock(self.channels.get(n)?);
        let result = act(&mut c, &self.dma);
        let job = c.take_job().map(|(plan, memory, bufs)| Job {
            channel: n,
            life: c.life(),
            plan,
            memory,
            bufs,
        });
        drop(c);
        if let Some(job) = job {
            self.run(job);
        }
        Some(result)
    }

    fn run(self: &Arc<Self>, job: Job) {
        let Job {
            channel,
            life,
            plan,
            memory,
            bufs,
        } = job;
        let shared = Arc::clone(self);
        let done = Box::new(move |outcome: Outcome| {
            shared.act(channel, |c, _| c.complete(life, &outcome));
        });
        execute(plan, &memory, &bufs, done);
    }
}

/// The ports of a PC, on the port bus.
struct LegacyPorts(Arc<Shared>);

fn port(addr: u64) -> Option<(usize, u64)> {
    (0..2).find_map(|n| match addr.checked_sub(COMMAND_PORTS[n]) {
        Some(at @ 0..8) => Some((n, at)),
        _ if addr == CONTROL_PORTS[n] => Some((n, 8)),
        _ => None,
    })
}

impl AddressDecoder for LegacyPorts {
    fn read(&self, addr: u64, data: &mut [u8]) {
        if let Some((n, register)) = port(addr) {
            self.0.act(n, |c, _| c.read(register, data));
        }
    }
    fn write(&self, addr: u64, data: &[u8]) {
        if let Some((n, register)) = port(addr) {
            self.0.act(n, |c, dma| c.write(dma, register, data));
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    config: ConfigSaved,
    #[n(1)]
    channels: Vec<ChannelSaved>,
}

/// The controller: a PCI function and a unit of the machine.
pub struct Ide {
    unit: String,
    config: ConfigSpace,
    shared: Arc<Shared>,
}

impl Ide {
    /// A controller with these drives. `irq`: lines of IRQ 14 and 15. Fails if the host gives no
    /// memory for the sector buffers.
    pub fn new(
        unit: &str,
        drives: Drives,
        memory: Arc<GuestMemory>,
        irq: [IrqLine; 2],
    ) -> Result<Arc<Mutex<Ide>>, pyrite_mem::MemError> {
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: 0x8086,
            device_id: 0x7010,
            revision: 0,
            // IDE with bus master, both channels at the ports of a PC.
            class: 0x01_01_80,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config.add_bar(BAR, BarKind::Io, BAR_BYTES);
        // IDETIM: timings that have no effect, and the channels' decoding, which is on.
        config.add_registers(0x40, &[0, 0x80, 0, 0x80], &[0xff; 4]);
        let dma = Dma::new(memory, config.bus_master());
        let [first, second] = drives;
        let [irq14, irq15] = irq;
        let buffer = || GuestMemory::new(BUFFER_MEMORY_BYTES).map(Arc::new);
        let channels = [
            Mutex::new(Channel::new(first, buffer()?, irq14)),
            Mutex::new(Channel::new(second, buffer()?, irq15)),
        ];
        Ok(Arc::new(Mutex::new(Ide {
            unit: unit.to_owned(),
            config,
            shared: Arc::new(Shared { dma, channels }),
        })))
    }

    /// Puts the channels' ports on the port bus.
    pub fn register(&self, io: &Bus<dyn PioDevice>) -> Result<(), BusOverlap> {
        let ports = Arc::new(LegacyPorts(Arc::clone(&self.shared)));
        for n in 0..2 {
            let name = format!("{}-channel{n}", self.unit);
            io.insert_decoder(COMMAND_PORTS[n], 8, &name, ports.clone())?;
            io.insert_decoder(CONTROL_PORTS[n], 1, &name, ports.clone())?;
        }
        Ok(())
    }
}

impl PciFunction for Ide {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        for n in 0..2 {
            // Bus mastering may be on now.
            self.shared.act(n, |c, dma| c.try_dma(dma));
        }
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
        for (at, b) in (offset..).zip(data) {
            let n = (at / BM_BYTES) as usize;
            let value = self.shared.act(n, |c, _| c.bm_read(at % BM_BYTES));
            *b = value.unwrap_or(0xff);
        }
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        if index != BAR {
            return;
        }
        for (at, b) in (offset..).zip(data) {
            let n = (at / BM_BYTES) as usize;
            self.shared
                .act(n, |c, dma| c.bm_write(dma, at % BM_BYTES, *b));
        }
    }
}

impl Lifecycle for Ide {
    fn unit(&self) -> &str {
        &self.unit
    }
    fn start(&mut self) {
        for n in 0..2 {
            self.shared.act(n, |c, _| c.drive_line());
        }
    }
    // Only the guest starts anything, and it stands still by now.
    fn pause(&mut self) {}
    fn drained(&mut self) -> bool {
        self.shared.channels.iter().all(|c| !lock(c).in_flight())
    }
    fn reset(&mut self) {
        self.config.reset();
        for c in &self.shared.channels {
            lock(c).power_on();
        }
    }
    fn save(&mut self) -> Result<Section, StateError> {
        if !self.drained() {
            return Err(StateError::Unsupported {
                unit: self.unit.clone(),
                reason: "a command is in flight".into(),
            });
        }
        let saved = Saved {
            config: self.config.save(),
            channels: self
                .shared
                .channels
                .iter()
                .map(|c| lock(c).save())
                .collect(),
        };
        Ok(Section::new(&self.unit, KIND, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let Saved { config, channels } = section
            .decode(KIND, VERSION)
            .inspect_err(|_| self.reset())?;
        let restored = self.config.restore(&config).and_then(|()| {
            if channels.len() != self.shared.channels.len() {
                return Err(format!("{} channels", channels.len()));
            }
            for (n, (c, saved)) in self.shared.channels.iter().zip(channels).enumerate() {
                let mut c = lock(c);
                c.restore(saved).map_err(|e| format!("channel {n}: {e}"))?;
            }
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
        let channels = self.shared.channels.iter().enumerate();
        let channels = channels.map(|(n, c)| (n.to_string(), lock(c).inspect()));
        Inspect::node([
            ("pci", self.config.inspect()),
            ("channels", Inspect::Node(channels.collect())),
        ])
    }
}
