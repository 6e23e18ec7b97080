//! ATA and ATAPI drives, whatever host controller they hang on. ATA/ATAPI-6 (INCITS 361) and
//! ACS-3 (INCITS 522) are the standards meant by section numbers here.
//!
//! A controller gives the task file to [`Device::command`], moves the data that the plan asks for
//! by its own protocol (PIO, bus-master DMA, a PRD table of AHCI), and reports the registers that
//! [`Device::finish`] returns.

use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_disk::BlockBackend;
use pyrite_disk::medium::Tray;
use pyrite_disk::scsi::{Identity, Kind as ScsiKind, Outcome, Parameters, Plan, Sense};
use pyrite_disk::scsi::{Unit, UnitSaved};

mod disk;
mod identify;
#[cfg(test)]
mod tests;

/// Status register bits. ATA/ATAPI-6 §7.15.
#[allow(missing_docs, reason = "the standard's names")]
pub mod status {
    pub const ERR: u8 = 1 << 0;
    pub const DRQ: u8 = 1 << 3;
    pub const DSC: u8 = 1 << 4;
    pub const DF: u8 = 1 << 5;
    pub const DRDY: u8 = 1 << 6;
    pub const BSY: u8 = 1 << 7;
    /// What a drive says that waits for a command.
    pub const READY: u8 = DRDY | DSC;
}

/// Error register bits. ATA/ATAPI-6 §7.9.
#[allow(missing_docs, reason = "the standard's names")]
pub mod error {
    pub const ABRT: u8 = 1 << 2;
    pub const IDNF: u8 = 1 << 4;
    pub const UNC: u8 = 1 << 6;
}

/// Device register: addresses are logical blocks.
const DEVICE_LBA: u8 = 1 << 6;
/// Sectors of a DRQ block of READ and WRITE MULTIPLE at most.
pub const MAX_MULTIPLE: u8 = 16;
/// Commands that a controller with native command queuing may have in the drive.
pub const QUEUE_DEPTH: u8 = 32;
/// LIMIT: 512-byte blocks of ranges in one DATA SET MANAGEMENT.
const MAX_TRIM_BLOCKS: u16 = 8;
/// Bytes of a command packet.
pub const PACKET_BYTES: usize = 12;

/// What the host writes to start a command. Registers that a 48-bit command reads twice have the
/// value that was written first (HOB) in their upper half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TaskFile {
    /// Command register.
    #[n(0)]
    pub command: u8,
    /// Features register.
    #[n(1)]
    pub features: u16,
    /// Sector count register.
    #[n(2)]
    pub count: u16,
    /// LBA registers: low, mid, high, then the same written first.
    #[n(3)]
    pub lba: u64,
    /// Device register.
    #[n(4)]
    pub device: u8,
}

/// What the host reads after a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Registers {
    /// Status register.
    #[n(0)]
    pub status: u8,
    /// Error register.
    #[n(1)]
    pub error: u8,
    /// Sector count register; for packets the interrupt reason.
    #[n(2)]
    pub count: u16,
    /// LBA registers.
    #[n(3)]
    pub lba: u64,
    /// Device register.
    #[n(4)]
    pub device: u8,
}

/// How a command's data reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// There are none.
    NonData,
    /// Through the data register, in DRQ blocks of this many bytes, to the host.
    PioIn(u32),
    /// Through the data register, from the host.
    PioOut(u32),
    /// By DMA.
    Dma,
    /// By DMA as the queued command with this tag.
    Queued(u8),
    /// A command packet comes first; then [`Device::packet`] knows more.
    Packet {
        /// The packet's data go by DMA.
        dma: bool,
    },
}

/// A command that was taken.
pub struct Command {
    /// How its data move.
    pub protocol: Protocol,
    /// What is to be done.
    pub plan: Plan,
    /// To be given back with the outcome.
    pub pending: Pending,
}

/// What is known of a command that is being carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pending {
    /// Registers if it goes well.
    #[n(0)]
    good: Registers,
    /// First block, to be reported if it goes wrong.
    #[n(1)]
    lba: u64,
    /// It is a packet.
    #[n(2)]
    packet: bool,
    /// Tag of a queued command.
    #[n(3)]
    tag: Option<u8>,
}

/// The queued command that failed, for log page 10H. ACS-3 §A.14 (NCQ Command Error log).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct QueuedError {
    #[n(0)]
    tag: u8,
    #[n(1)]
    registers: Registers,
}

/// What a drive is called.
#[derive(Clone, Debug)]
pub struct Names {
    /// Model, up to 40 characters.
    pub model: String,
    /// Serial number, up to 20 characters.
    pub serial: String,
    /// Firmware revision, up to 8 characters.
    pub firmware: String,
}

enum Kind {
    Disk(Arc<dyn BlockBackend>),
    Cd(Unit),
}

/// Settings that the host makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Settings {
    /// Sectors of a DRQ block of READ and WRITE MULTIPLE; 0: not set.
    #[n(0)]
    multiple: u8,
    /// Heads and sectors per track of the geometry in use.
    #[n(1)]
    heads: u8,
    #[n(2)]
    sectors: u8,
    #[n(3)]
    write_cache: bool,
    #[n(4)]
    look_ahead: bool,
    /// Selected DMA mode, as SET FEATURES has it: 20H + multiword or 40H + Ultra mode.
    #[n(5)]
    dma_mode: u8,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            multiple: MAX_MULTIPLE,
            heads: 16,
            sectors: 63,
            write_cache: true,
            look_ahead: true,
            dma_mode: 0x45,
        }
    }
}

/// State of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DeviceSaved {
    #[n(0)]
    settings: Settings,
    #[n(1)]
    queued_error: Option<QueuedError>,
    /// Bytes of a disk.
    #[n(2)]
    size_bytes: u64,
    /// CD drives only.
    #[n(3)]
    unit: Option<UnitSaved>,
}

/// A drive.
pub struct Device {
    kind: Kind,
    names: Names,
    settings: Settings,
    queued_error: Option<QueuedError>,
    /// On a serial link, which has queuing.
    serial_link: bool,
}

impl Device {
    /// A disk in its power-on state.
    pub fn disk(backend: Arc<dyn BlockBackend>, names: Names, serial_link: bool) -> Device {
        Device {
            kind: Kind::Disk(backend),
            names,
            settings: Settings::default(),
            queued_error: None,
            serial_link,
        }
    }

    /// A CD/DVD drive in its power-on state.
    pub fn cd(tray: Arc<Tray>, names: Names, serial_link: bool) -> Device {
        let (vendor, product) = names
            .model
            .split_once(' ')
            .unwrap_or((names.model.as_str(), "CD-ROM"));
        let identity = Identity {
            vendor: vendor.into(),
            product: product.into(),
            revision: names.firmware.clone(),
            serial: names.serial.clone(),
        };
        Device {
            kind: Kind::Cd(Unit::new(ScsiKind::Cd(tray), identity, true)),
            names,
            settings: Settings::default(),
            queued_error: None,
            serial_link,
        }
    }

    /// It takes packets.
    pub fn is_packet(&self) -> bool {
        matches!(self.kind, Kind::Cd(_))
    }

    /// The disk's back end, or the medium in the drive if there is one.
    pub fn medium(&self) -> Option<Arc<dyn BlockBackend>> {
        match &self.kind {
            Kind::Disk(d) => Some(Arc::clone(d)),
            Kind::Cd(unit) => match unit.kind() {
                ScsiKind::Cd(tray) => tray.medium(),
                ScsiKind::Disk(d) => Some(Arc::clone(d)),
            },
        }
    }

    /// Power-on state.
    pub fn reset(&mut self) {
        self.settings = Settings::default();
        self.queued_error = None;
        if let Kind::Cd(unit) = &mut self.kind {
            unit.reset();
        }
    }

    /// A reset by the controller (COMRESET, SRST, DEVICE RESET): settings stay (ATA/ATAPI-6
    /// §9.2 lets them), what was going on is forgotten.
    pub fn bus_reset(&mut self) {
        self.queued_error = None;
        if let Kind::Cd(unit) = &mut self.kind {
            unit.transport_reset();
        }
    }

    /// Registers after a reset: the signature of the kind of device. ATA/ATAPI-6 §9.12.
    pub fn signature(&self) -> Registers {
        let packet = self.is_packet();
        Registers {
            // A packet device is not "ready" before its first packet.
            status: if packet { 0 } else { status::READY },
            error: 1,
            count: 1,
            lba: if packet { 0xeb_14_01 } else { 0x00_00_01 },
            device: 0,
        }
    }

    /// Takes a command.
    pub fn command(&mut self, t: &TaskFile) -> Command {
        let registers = Registers {
            status: status::READY,
            error: 0,
            count: t.count,
            lba: t.lba,
            device: t.device,
        };
        let mut c = Command {
            protocol: Protocol::NonData,
            plan: Plan::Done,
            pending: Pending {
                good: registers,
                lba: t.lba,
                packet: false,
                tag: None,
            },
        };
        match t.command {
            0x90 => {
                // EXECUTE DEVICE DIAGNOSTIC: passed.
                c.pending.good = self.signature();
                return c;
            }
            // SET FEATURES and the power commands, which both kinds know.
            0xef => {
                c.plan = self.set_features(t);
                return c;
            }
            0xe0..=0xe3 | 0xe6 | 0x94..=0x97 | 0x99 => return c,
            0xe5 | 0x98 => {
                c.pending.good.count = 0xff; // active
                return c;
            }
            _ => {}
        }
        match &mut self.kind {
            Kind::Disk(_) => self.disk_command(t, &mut c),
            Kind::Cd(unit) => match t.command {
                0xa0 => {
                    let dma = t.features & 1 != 0;
                    c.protocol = Protocol::Packet { dma };
                    c.pending.packet = true;
                    c.pending.good.count = 3; // I/O, C/D
                }
                0xa1 => {
                    c.protocol = Protocol::PioIn(512);
                    c.plan = Plan::Reply(identify::packet(&self.names, &self.settings, {
                        self.serial_link
                    }));
                }
                // DEVICE RESET ends without an interrupt; the controller sees to that.
                0x08 => {
                    unit.transport_reset();
                    c.pending.good = self.signature();
                }
                0x20 | 0xec => {
                    // A packet device aborts these and shows its signature. §8.15, §8.27.
                    c.plan = Plan::Fail(Sense::INVALID_COMMAND);
                    let s = self.signature();
                    (c.pending.good.lba, c.pending.lba) = (s.lba, s.lba);
                    c.pending.good.count = s.count;
                }
                _ => c.plan = Plan::Fail(Sense::INVALID_COMMAND),
            },
        }
        c
    }

    /// Takes the packet of a command whose protocol is [`Protocol::Packet`].
    pub fn packet(&mut self, cdb: &[u8]) -> Plan {
        match &mut self.kind {
            Kind::Cd(unit) => unit.plan(cdb),
            Kind::Disk(_) => Plan::Fail(Sense::INVALID_COMMAND),
        }
    }

    /// Takes data that a plan asked for.
    pub fn parameters(&mut self, what: Parameters, data: &[u8]) -> Plan {
        match &mut self.kind {
            Kind::Cd(unit) => unit.parameters(what, data),
            Kind::Disk(d) => disk::trim(d, data),
        }
    }

    /// Registers after a command.
    pub fn finish(&mut self, p: &Pending, outcome: &Outcome) -> Registers {
        let sense = match outcome.result {
            Ok(()) => return p.good,
            Err(sense) => sense,
        };
        let mut r = p.good;
        r.status = status::READY | status::ERR;
        if p.packet {
            if let Kind::Cd(unit) = &mut self.kind {
                unit.note(sense);
            }
            r.error = sense.key << 4 | if sense.key == 5 { error::ABRT } else { 0 };
            return r;
        }
        r.lba = p.lba;
        r.error = match sense {
            Sense::OUT_OF_RANGE => error::IDNF,
            Sense::READ_ERROR => error::UNC,
            Sense::WRITE_ERROR | Sense::SPACE_EXHAUSTED | Sense::TARGET_FAILURE => {
                r.status |= status::DF;
                error::ABRT
            }
            _ => error::ABRT,
        };
        if let Some(tag) = p.tag {
            self.queued_error = Some(QueuedError { tag, registers: r });
        }
        r
    }

    /// SET FEATURES, ACS-3 §7.45.
    fn set_features(&mut self, t: &TaskFile) -> Plan {
        let is_disk = !self.is_packet();
        let s = &mut self.settings;
        match t.features & 0xff {
            0x02 if is_disk => s.write_cache = true,
            0x82 if is_disk => s.write_cache = false,
            0xaa if is_disk => s.look_ahead = true,
            0x55 if is_disk => s.look_ahead = false,
            0x66 | 0xcc => {} // settings after software reset: always kept
            0x03 => match t.count & 0xff {
                // PIO modes need nothing to be done.
                0x00 | 0x01 | 0x08..=0x0c => {}
                mode @ (0x20..=0x22 | 0x40..=0x45) => s.dma_mode = mode as u8,
                _ => return Plan::Fail(Sense::INVALID_FIELD),
            },
            _ => return Plan::Fail(Sense::INVALID_FIELD),
        }
        Plan::Done
    }

    /// State to save.
    pub fn save(&self) -> DeviceSaved {
        let Device {
            kind,
            names: _,
            settings,
            queued_error,
            serial_link: _,
        } = self;
        DeviceSaved {
            settings: *settings,
            queued_error: *queued_error,
            size_bytes: match kind {
                Kind::Disk(d) => d.info().size_bytes,
                Kind::Cd(_) => 0,
            },
            unit: match kind {
                Kind::Disk(_) => None,
                Kind::Cd(u) => Some(u.save()),
            },
        }
    }

    /// Takes a state over; says what does not fit.
    pub fn restore(&mut self, saved: &DeviceSaved) -> Result<(), String> {
        let DeviceSaved {
            settings,
            queued_error,
            size_bytes,
            unit,
        } = saved;
        match (&mut self.kind, unit) {
            (Kind::Disk(d), None) => {
                let now = d.info().size_bytes;
                if now != *size_bytes {
                    return Err(format!("disk had {size_bytes} bytes, now has {now}"));
                }
            }
            (Kind::Cd(unit), Some(u)) => unit.restore(u)?,
            _ => return Err("a disk is a CD drive now, or the reverse".into()),
        }
        if settings.heads == 0 || settings.sectors == 0 || settings.multiple > MAX_MULTIPLE {
            return Err("impossible drive settings".into());
        }
        self.settings = *settings;
        self.queued_error = *queued_error;
        Ok(())
    }
}
