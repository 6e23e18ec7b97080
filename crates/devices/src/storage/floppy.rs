//! Floppy disk controller like an 82077AA, on ISA DMA channel 2 and IRQ 6. Intel 82077AA data sheet
//! (1994) is the standard meant by section numbers here.
//!
//! ```text
//! 3F0 SRA  3F1 SRB  3F2 DOR  3F3 TDR  3F4 MSR/DSR  3F5 FIFO  3F7 DIR/CCR
//!
//! command bytes ─► execution (back end, then DMA or FIFO) ─► result bytes
//! ```
//!
//! Commands that move data go to their cylinder by themselves, as if CONFIGURE had enabled implied
//! seeks: old firmware that was written for emulators expects it, and others have been there before.

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_disk::medium::{Tray, TraySaved};
use pyrite_disk::{BlockBackend, BlockRequest, DiskError, IoBuf};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::{Bus, BusOverlap, lock};
use pyrite_vdev::{IrqLine, Lifecycle, PioDevice};

use super::isa_dma::{DmaDirection, IsaDma};

mod command;
mod media;
#[cfg(test)]
mod tests;

use command::{Phase, Transfer};
pub use media::{DriveKind, Geometry};

const KIND: &str = "floppy-82077aa";
const VERSION: u16 = 1;
/// First port.
const PORT: u16 = 0x3f0;
/// DMA channel.
const CHANNEL: usize = 2;
/// Drives of a controller.
pub const DRIVES: usize = 2;
const SECTOR_BYTES: usize = 512;
/// The least that guest memory, which the track buffer is made of, comes in.
const BUFFER_MEMORY_BYTES: u64 = 1 << 20;

/// DOR, §2.1.3.
const DOR_NOT_RESET: u8 = 1 << 2;
const DOR_DMA: u8 = 1 << 3;
/// MSR, §2.1.5.
const MSR_RQM: u8 = 1 << 7;
const MSR_DIO: u8 = 1 << 6;
const MSR_NON_DMA: u8 = 1 << 5;
const MSR_BUSY: u8 = 1 << 4;
/// DIR, §2.1.7: the medium may have been changed.
const DIR_CHANGED: u8 = 1 << 7;

/// One drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct DriveRegisters {
    /// Where the head stands.
    #[n(0)]
    cylinder: u8,
    /// The change line: until the head is moved over a medium.
    #[n(1)]
    changed: bool,
}

struct Drive {
    /// Without, there is no drive.
    slot: Option<(DriveKind, Arc<Tray>)>,
    r: DriveRegisters,
}

impl Drive {
    fn tray(&self) -> Option<&Arc<Tray>> {
        self.slot.as_ref().map(|(_, tray)| tray)
    }

    /// What lies in it, if it can read that.
    fn medium(&self) -> Option<(Arc<dyn BlockBackend>, Geometry)> {
        let (kind, tray) = self.slot.as_ref()?;
        let medium = tray.medium()?;
        let format = kind.format_of(medium.info().size_bytes)?;
        Some((medium, format))
    }
}

/// Registers of the controller.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    dor: u8,
    #[n(1)]
    tdr: u8,
    /// Data rate.
    #[n(2)]
    ccr: u8,
    #[n(3)]
    irq: bool,
    #[n(4)]
    phase: Phase,
    /// Status register 0 of interrupts that SENSE INTERRUPT STATUS has not told yet, and cylinder.
    #[n(5)]
    pending: Vec<(u8, u8)>,
    /// SPECIFY: step rate, head times; bit 0 of the second byte: no DMA.
    #[n(6)]
    specify: [u8; 2],
    #[n(7)]
    configure: [u8; 2],
    #[n(8)]
    lock: bool,
    #[n(9)]
    perpendicular: u8,
}

impl Default for Registers {
    fn default() -> Self {
        Registers {
            dor: 0x0c,
            tdr: 0,
            ccr: 0,
            irq: false,
            phase: Phase::Idle,
            pending: Vec::new(),
            specify: [0; 2],
            configure: [0, 0],
            lock: false,
            perpendicular: 0,
        }
    }
}

/// A request for a back end.
struct Job {
    backend: Arc<dyn BlockBackend>,
    request: BlockRequest,
    life: u64,
}

struct State {
    drives: [Drive; DRIVES],
    r: Registers,
    irq: IrqLine,
    dma: Arc<Mutex<IsaDma>>,
    buffer: Arc<GuestMemory>,
    job: Option<Job>,
    /// What a back end works on.
    active: Option<Transfer>,
    /// Requests of a time before a reset: their outcome goes nowhere.
    stale: u32,
    life: u64,
}

/// The controller's ports.
struct Shared {
    // LOCK ORDER: Floppy < this < IsaDma and interrupt controllers. Not held while a back end is
    // called.
    state: Mutex<State>,
}

impl Shared {
    fn act<T>(self: &Arc<Self>, act: impl FnOnce(&mut State) -> T) -> T {
        let mut s = lock(&self.state);
        let result = act(&mut s);
        let job = s.job.take().map(|job| (job, Arc::clone(&s.buffer)));
        drop(s);
        if let Some((job, buffer)) = job {
            self.run(job, &buffer);
        }
        result
    }

    fn run(self: &Arc<Self>, job: Job, buffer: &Arc<GuestMemory>) {
        let Job {
            backend,
            request,
            life,
        } = job;
        let shared = Arc::clone(self);
        let done = Box::new(move |outcome: Result<(), DiskError>| {
            shared.act(|s| s.complete(life, outcome));
        });
        backend.submit(buffer, request, done);
    }
}

impl State {
    fn set_irq(&mut self, on: bool) {
        self.r.irq = on;
        self.drive_line();
    }

    fn drive_line(&self) {
        self.irq.set(self.r.irq && self.r.dor & DOR_DMA != 0);
    }

    fn selected(&self) -> usize {
        usize::from(self.r.dor & 3)
    }

    fn medium(&self, drive: usize) -> Option<(Arc<dyn BlockBackend>, Geometry)> {
        self.drives.get(drive)?.medium()
    }

    /// A change that the tray has seen goes to the change line.
    fn look_for_change(&mut self) {
        for d in &mut self.drives {
            let Some(tray) = d.tray() else { continue };
            if tray.take_changed() || tray.medium().is_none() {
                d.r.changed = true;
            }
        }
    }

    fn forget(&mut self) {
        if self.active.take().is_some() && self.job.take().is_none() {
            self.stale += 1;
        }
        self.life += 1;
    }

    /// As after the reset pin or DOR's reset bit. §6.
    fn reset_controller(&mut self) {
        self.forget();
        self.r.phase = Phase::Idle;
        self.r.pending.clear();
        if !self.r.lock {
            self.r.configure = [0; 2];
        }
        self.r.specify[1] &= !1;
        self.set_irq(false);
    }

    fn msr(&self) -> u8 {
        if self.r.dor & DOR_NOT_RESET == 0 || self.stale > 0 {
            return 0;
        }
        match &self.r.phase {
            Phase::Idle => MSR_RQM,
            Phase::Command(_) => MSR_RQM | MSR_BUSY,
            Phase::Busy => MSR_BUSY,
            Phase::ToHost(_) => MSR_RQM | MSR_DIO | MSR_NON_DMA | MSR_BUSY,
            Phase::FromHost(_) => MSR_RQM | MSR_NON_DMA | MSR_BUSY,
            Phase::Result(_) => MSR_RQM | MSR_DIO | MSR_BUSY,
        }
    }

    fn read(&mut self, port: u16) -> u8 {
        match port - PORT {
            // SRA: interrupt pending, no second drive when there is none.
            0 => u8::from(self.r.irq) << 7 | u8::from(self.drives[1].slot.is_none()) << 6,
            1 => 0xc0,
            2 => self.r.dor,
            3 => self.r.tdr,
            4 => self.msr(),
            5 => self.read_fifo(),
            7 => {
                self.look_for_change();
                let drive = self.drives.get(self.selected());
                let motor = self.r.dor >> (4 + self.selected()) & 1 != 0;
                let changed = drive.is_some_and(|d| d.slot.is_some() && d.r.changed && motor);
                if changed { DIR_CHANGED } else { 0 }
            }
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u16, v: u8) {
        match port - PORT {
            2 => {
                let was = std::mem::replace(&mut self.r.dor, v);
                if was & DOR_NOT_RESET != 0 && v & DOR_NOT_RESET == 0 {
                    self.reset_controller();
                }
                if was & DOR_NOT_RESET == 0 && v & DOR_NOT_RESET != 0 {
                    self.reset_ends();
                }
                self.drive_line();
            }
            3 => self.r.tdr = v & 3,
            4 => {
                self.r.ccr = v & 3;
                if v & 0x80 != 0 {
                    self.reset_controller();
                    self.reset_ends();
                }
            }
            5 => self.write_fifo(v),
            7 => self.r.ccr = v & 3,
            _ => {}
        }
    }

    /// The drives are polled: each has an interrupt to tell. §6.
    fn reset_ends(&mut self) {
        self.r.pending = (0..4_u8)
            .map(|n| {
                let at = self.drives.get(usize::from(n)).map_or(0, |d| d.r.cylinder);
                (0xc0 | n, at)
            })
            .collect();
        self.set_irq(true);
    }
}

struct FloppyPorts(Arc<Shared>);

impl PioDevice for FloppyPorts {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        for (at, b) in (port..).zip(data) {
            *b = self.0.act(|s| s.read(at));
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        for (at, b) in (port..).zip(data) {
            self.0.act(|s| s.write(at, *b));
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    registers: Registers,
    #[n(1)]
    drives: Vec<DriveRegisters>,
    #[n(2)]
    trays: Vec<Option<TraySaved>>,
    #[n(3)]
    kinds: Vec<Option<DriveKind>>,
}

/// The controller as a unit of the machine.
pub struct Floppy {
    unit: String,
    shared: Arc<Shared>,
}

impl Floppy {
    /// A controller with these drives. `irq` is the line of IRQ 6. Fails if the host gives no
    /// memory for the buffer.
    pub fn new(
        unit: &str,
        drives: [Option<(DriveKind, Arc<Tray>)>; DRIVES],
        dma: Arc<Mutex<IsaDma>>,
        irq: IrqLine,
    ) -> Result<Arc<Mutex<Floppy>>, pyrite_mem::MemError> {
        let drives = drives.map(|slot| Drive {
            slot,
            r: DriveRegisters {
                cylinder: 0,
                changed: true,
            },
        });
        let state = State {
            drives,
            r: Registers::default(),
            irq,
            dma,
            buffer: Arc::new(GuestMemory::new(BUFFER_MEMORY_BYTES)?),
            job: None,
            active: None,
            stale: 0,
            life: 0,
        };
        Ok(Arc::new(Mutex::new(Floppy {
            unit: unit.to_owned(),
            shared: Arc::new(Shared {
                state: Mutex::new(state),
            }),
        })))
    }

    /// Puts the ports on the port bus; 3F6H belongs to IDE.
    pub fn register(&self, io: &Bus<dyn PioDevice>) -> Result<(), BusOverlap> {
        let ports = Arc::new(Mutex::new(FloppyPorts(Arc::clone(&self.shared))));
        io.insert(PORT.into(), 6, &self.unit, ports.clone())?;
        io.insert(u64::from(PORT) + 7, 1, &self.unit, ports)
    }
}

impl Lifecycle for Floppy {
    fn unit(&self) -> &str {
        &self.unit
    }
    fn start(&mut self) {
        lock(&self.shared.state).drive_line();
    }
    // Only the guest starts anything, and it stands still by now.
    fn pause(&mut self) {}
    fn drained(&mut self) -> bool {
        let s = lock(&self.shared.state);
        s.active.is_none() && s.stale == 0
    }
    fn reset(&mut self) {
        let mut s = lock(&self.shared.state);
        s.forget();
        s.r = Registers::default();
        for d in &mut s.drives {
            d.r = DriveRegisters {
                cylinder: 0,
                changed: true,
            };
            if let Some(t) = d.tray() {
                t.reset();
            }
        }
        s.drive_line();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        if !self.drained() {
            return Err(StateError::Unsupported {
                unit: self.unit.clone(),
                reason: "a command is in flight".into(),
            });
        }
        let s = lock(&self.shared.state);
        let State {
            drives,
            r,
            irq: _,
            dma: _,
            buffer: _,
            job: _,
            active: _,
            stale: _,
            life: _,
        } = &*s;
        let saved = Saved {
            registers: r.clone(),
            drives: drives.iter().map(|d| d.r).collect(),
            trays: drives.iter().map(|d| d.tray().map(|t| t.save())).collect(),
            kinds: drives
                .iter()
                .map(|d| d.slot.as_ref().map(|(kind, _)| *kind))
                .collect(),
        };
        Ok(Section::new(&self.unit, KIND, VERSION, &saved))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let Saved {
            registers,
            drives,
            trays,
            kinds,
        } = section
            .decode(KIND, VERSION)
            .inspect_err(|_| self.reset())?;
        self.reset();
        let mut s = lock(&self.shared.state);
        let same = [drives.len(), trays.len(), kinds.len()] == [DRIVES; 3]
            && s.drives
                .iter()
                .zip(&kinds)
                .all(|(d, k)| d.slot.as_ref().map(|(kind, _)| *kind) == *k);
        if !same || !registers.phase.is_sound() || registers.pending.len() > 4 {
            return Err(StateError::Invalid {
                unit: self.unit.clone(),
                detail: "other drives, or a command in an impossible state".into(),
            });
        }
        s.r = registers;
        for ((d, r), t) in s.drives.iter_mut().zip(drives).zip(&trays) {
            d.r = r;
            if let (Some(tray), Some(saved)) = (d.tray(), t) {
                tray.restore(saved);
            }
        }
        s.drive_line();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let s = lock(&self.shared.state);
        let drives = s.drives.iter().enumerate();
        let drives = drives.filter(|(_, d)| d.slot.is_some()).map(|(n, d)| {
            let node = Inspect::node([
                ("cylinder", Inspect::Uint(d.r.cylinder.into())),
                ("changed", Inspect::Bool(d.r.changed)),
                ("medium", Inspect::Bool(d.medium().is_some())),
            ]);
            (n.to_string(), node)
        });
        Inspect::node([
            ("dor", Inspect::Hex(s.r.dor.into())),
            ("msr", Inspect::Hex(s.msr().into())),
            ("irq", Inspect::Bool(s.r.irq)),
            ("drives", Inspect::Node(drives.collect())),
        ])
    }
}

/// The buffer as a back end sees it.
fn buffer_bufs(len: usize) -> Vec<IoBuf> {
    vec![IoBuf {
        gpa: 0,
        len: len as u32,
    }]
}
