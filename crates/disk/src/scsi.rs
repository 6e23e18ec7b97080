//! The SCSI command set of a logical unit: a disk, or a CD/DVD drive (then also spoken by ATAPI).
//!
//! A transport gives a command descriptor block to [`Unit::plan`], finds out from the [`Plan`] how
//! much data moves which way, and lets [`execute`] move it. SPC-4, SBC-3 and MMC-6 are the
//! standards meant by the section numbers here.

use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_mem::GuestMemory;

use crate::batch::submit_all;
use crate::medium::{Tray, TraySaved};
use crate::{BlockBackend, BlockRequest, DiskError, DiskInfo, IoBuf};

mod block;
mod inquiry;
mod mmc;
mod mode;
pub mod sense;
#[cfg(test)]
mod tests;

pub use sense::Sense;

/// Bytes of a CD's sector.
pub const CD_SECTOR_BYTES: u64 = 2048;
/// LIMIT: blocks of one UNMAP or WRITE SAME range: 1 GiB of 512-byte blocks.
pub const MAX_RANGE_BLOCKS: u32 = 1 << 21;
/// LIMIT: ranges in one UNMAP.
pub const MAX_UNMAP_RANGES: usize = 256;

/// What INQUIRY tells of a unit.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Up to 8 characters.
    pub vendor: String,
    /// Up to 16 characters.
    pub product: String,
    /// Up to 4 characters.
    pub revision: String,
    /// Serial number; may be empty.
    pub serial: String,
}

/// What a unit is.
pub enum Kind {
    /// A disk.
    Disk(Arc<dyn BlockBackend>),
    /// A drive for CDs and DVDs, read-only.
    Cd(Arc<Tray>),
}

/// A logical unit.
pub struct Unit {
    kind: Kind,
    identity: Identity,
    /// Unit attention that is reported with the next command.
    attention: Option<Sense>,
    /// Sense data of the last command that failed, for REQUEST SENSE.
    sense: Sense,
    /// The unit is on ATAPI: no logical units, no autosense.
    atapi: bool,
}

/// State of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct UnitSaved {
    #[n(0)]
    attention: Option<Sense>,
    #[n(1)]
    sense: Sense,
    #[n(2)]
    tray: Option<TraySaved>,
    /// Size of a disk.
    #[n(3)]
    size_bytes: u64,
}

/// Which way data moves, seen from the host computer (the guest).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the unit.
    In,
    /// To the unit.
    Out,
}

/// Parameters that the guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameters {
    /// MODE SELECT with a header of 4 or 8 bytes.
    Mode {
        /// Length of the header.
        header: usize,
    },
    /// UNMAP.
    Unmap,
    /// WRITE SAME.
    Same {
        /// First block.
        lba: u64,
        /// Blocks.
        count: u64,
        /// Space may be given back.
        unmap: bool,
    },
    /// ATA's DATA SET MANAGEMENT; no SCSI command asks for it.
    Trim,
}

/// What a command comes to.
pub enum Plan {
    /// It is done, without data.
    Done,
    /// It failed.
    Fail(Sense),
    /// Bytes for the guest, already cut to the allocation length.
    Reply(Vec<u8>),
    /// Blocks of a medium.
    Transfer {
        /// From or to.
        backend: Arc<dyn BlockBackend>,
        /// Which way.
        direction: Direction,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// On the medium before it is done.
        fua: bool,
    },
    /// Work without data.
    Work {
        /// Who does it.
        backend: Arc<dyn BlockBackend>,
        /// All of it.
        requests: Vec<BlockRequest>,
    },
    /// The guest sends `len` bytes, which go to [`Unit::parameters`].
    Parameters {
        /// Bytes.
        len: u32,
        /// What they are.
        what: Parameters,
    },
}

impl Plan {
    /// Bytes that move, and which way.
    pub fn data(&self) -> Option<(Direction, u64)> {
        match self {
            Plan::Done | Plan::Fail(_) | Plan::Work { .. } => None,
            Plan::Reply(b) if b.is_empty() => None,
            Plan::Reply(b) => Some((Direction::In, b.len() as u64)),
            Plan::Transfer { len: 0, .. } | Plan::Parameters { len: 0, .. } => None,
            Plan::Transfer { direction, len, .. } => Some((*direction, *len)),
            Plan::Parameters { len, .. } => Some((Direction::Out, u64::from(*len))),
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Good, or check condition with this sense data.
    pub result: Result<(), Sense>,
    /// Bytes moved.
    pub bytes: u64,
}

/// Called once with the outcome, on any thread.
pub type Done = Box<dyn FnOnce(Outcome) + Send>;

/// Writes bytes to the front of guest buffers; how many there was room for.
pub fn scatter(memory: &GuestMemory, bufs: &[IoBuf], mut data: &[u8]) -> Result<u64, DiskError> {
    let mut written = 0;
    for b in bufs {
        let n = data.len().min(b.len as usize);
        let (part, rest) = data.split_at(n);
        memory
            .write(b.gpa, part)
            .map_err(|_| DiskError::BadBuffer)?;
        written += n as u64;
        data = rest;
        if data.is_empty() {
            break;
        }
    }
    Ok(written)
}

/// Reads bytes off the front of guest buffers; how many there were.
pub fn gather(memory: &GuestMemory, bufs: &[IoBuf], out: &mut [u8]) -> Result<usize, DiskError> {
    let mut at = 0;
    for b in bufs {
        let n = (out.len() - at).min(b.len as usize);
        memory
            .read(b.gpa, &mut out[at..at + n])
            .map_err(|_| DiskError::BadBuffer)?;
        at += n;
        if at == out.len() {
            break;
        }
    }
    Ok(at)
}

/// The first `len` bytes of `bufs`; `None` if they are fewer.
pub fn front(bufs: &[IoBuf], len: u64) -> Option<Vec<IoBuf>> {
    let mut left = len;
    let mut out = Vec::new();
    for b in bufs {
        if left == 0 {
            break;
        }
        let n = left.min(u64::from(b.len));
        if n > 0 {
            out.push(IoBuf {
                gpa: b.gpa,
                len: n as u32,
            });
        }
        left -= n;
    }
    (left == 0).then_some(out)
}

/// If a plan asks for parameters, reads them off `bufs` and lets `take` say what they come to.
pub fn with_parameters(
    plan: Plan,
    memory: &GuestMemory,
    bufs: &[IoBuf],
    take: impl FnOnce(Parameters, &[u8]) -> Plan,
) -> Plan {
    let Plan::Parameters { len, what } = plan else {
        return plan;
    };
    // LIMIT: 64 KiB. No command's length field counts further.
    let mut data = vec![0; len.min(0xffff) as usize];
    match gather(memory, bufs, &mut data) {
        Ok(n) if n == data.len() => take(what, &data),
        _ => Plan::Fail(Sense::DATA_PHASE),
    }
}

/// Carries a plan out. `bufs` is where the guest's data is or goes; if it is too short for a
/// transfer nothing is done. Parameters must have been taken by [`Unit::parameters`].
pub fn execute(plan: Plan, memory: &Arc<GuestMemory>, bufs: &[IoBuf], done: Done) {
    let failed = |sense| Outcome {
        result: Err(sense),
        bytes: 0,
    };
    match plan {
        Plan::Done => done(Outcome {
            result: Ok(()),
            bytes: 0,
        }),
        Plan::Fail(sense) => done(failed(sense)),
        Plan::Reply(data) => done(match scatter(memory, bufs, &data) {
            Ok(bytes) => Outcome {
                result: Ok(()),
                bytes,
            },
            Err(e) => failed(Sense::of(&e, false)),
        }),
        Plan::Transfer {
            backend,
            direction,
            offset,
            len,
            fua,
        } => {
            let Some(bufs) = front(bufs, len) else {
                return done(failed(Sense::DATA_PHASE));
            };
            let writing = direction == Direction::Out;
            let request = if writing {
                BlockRequest::Write { offset, bufs, fua }
            } else {
                BlockRequest::Read { offset, bufs }
            };
            let end = move |result: Result<(), DiskError>| {
                done(Outcome {
                    bytes: if result.is_ok() { len } else { 0 },
                    result: result.map_err(|e| Sense::of(&e, writing)),
                });
            };
            backend.submit(memory, request, Box::new(end));
        }
        Plan::Work { backend, requests } => {
            let end = move |result: Result<(), DiskError>| {
                done(Outcome {
                    result: result.map_err(|e| Sense::of(&e, true)),
                    bytes: 0,
                });
            };
            submit_all(&*backend, memory, requests, Box::new(end));
        }
        Plan::Parameters { .. } => done(failed(Sense::TARGET_FAILURE)),
    }
}

/// Big-endian fields of a command.
pub(crate) fn be16(b: &[u8], at: usize) -> u16 {
    match b.get(at..at + 2) {
        Some(&[x, y]) => u16::from_be_bytes([x, y]),
        _ => 0,
    }
}
pub(crate) fn be24(b: &[u8], at: usize) -> u32 {
    u32::from(byte(b, at)) << 16 | u32::from(be16(b, at + 1))
}
pub(crate) fn be32(b: &[u8], at: usize) -> u32 {
    u32::from(be16(b, at)) << 16 | u32::from(be16(b, at + 2))
}
pub(crate) fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}
pub(crate) fn byte(b: &[u8], at: usize) -> u8 {
    b.get(at).copied().unwrap_or(0)
}

/// A reply cut to an allocation length.
fn reply(mut data: Vec<u8>, allocation: usize) -> Plan {
    data.truncate(allocation);
    Plan::Reply(data)
}

impl Unit {
    /// A unit in its power-on state.
    pub fn new(kind: Kind, identity: Identity, atapi: bool) -> Unit {
        Unit {
            kind,
            identity,
            attention: Some(Sense::POWER_ON),
            sense: Sense::NONE,
            atapi,
        }
    }

    /// What it is.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// What it is called.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Back to the power-on state.
    pub fn reset(&mut self) {
        self.attention = Some(Sense::POWER_ON);
        self.sense = Sense::NONE;
        if let Kind::Cd(tray) = &self.kind {
            tray.reset();
        }
    }

    /// After a reset of the transport: what was going on is forgotten, the tray is unlocked.
    pub fn transport_reset(&mut self) {
        self.attention = Some(Sense::POWER_ON);
        self.sense = Sense::NONE;
        if let Kind::Cd(tray) = &self.kind {
            tray.set_locked(false);
        }
    }

    /// Remembers the sense data of a failed command, for REQUEST SENSE.
    pub fn note(&mut self, sense: Sense) {
        self.sense = sense;
    }

    /// State to save.
    pub fn save(&self) -> UnitSaved {
        let Unit {
            kind,
            identity: _,
            attention,
            sense,
            atapi: _,
        } = self;
        UnitSaved {
            attention: *attention,
            sense: *sense,
            tray: match kind {
                Kind::Cd(t) => Some(t.save()),
                Kind::Disk(_) => None,
            },
            size_bytes: match kind {
                Kind::Disk(d) => d.info().size_bytes,
                Kind::Cd(_) => 0,
            },
        }
    }

    /// Takes a state over; says what does not fit. Then nothing has changed.
    pub fn restore(&mut self, saved: &UnitSaved) -> Result<(), String> {
        match (&self.kind, &saved.tray) {
            (Kind::Cd(tray), Some(t)) => tray.restore(t),
            (Kind::Disk(d), None) => {
                let (was, now) = (saved.size_bytes, d.info().size_bytes);
                if was != now {
                    return Err(format!("disk had {was} bytes, now has {now}"));
                }
            }
            _ => return Err("a disk is a CD drive now, or the reverse".into()),
        }
        self.attention = saved.attention;
        self.sense = saved.sense;
        Ok(())
    }

    /// Decides what a command comes to. Short command blocks are as if filled up with zeroes.
    pub fn plan(&mut self, cdb: &[u8]) -> Plan {
        let op = byte(cdb, 0);
        if let Kind::Cd(tray) = &self.kind
            && tray.take_changed()
            && self.attention.is_none()
        {
            self.attention = Some(Sense::MEDIUM_CHANGED);
        }
        // INQUIRY, REPORT LUNS and REQUEST SENSE are answered whatever is to be reported; so are
        // GET CONFIGURATION and GET EVENT STATUS NOTIFICATION (MMC-6 §4.1.6.1).
        let is_cd = matches!(self.kind, Kind::Cd(_));
        let exempt = matches!(op, 0x03 | 0x12 | 0xa0) || (is_cd && matches!(op, 0x46 | 0x4a));
        if !exempt && let Some(sense) = self.attention.take() {
            return self.failed(sense);
        }
        if op == 0x03 {
            return self.request_sense(cdb);
        }
        self.sense = Sense::NONE;
        let plan = match op {
            0x12 => self.inquiry(cdb),
            0xa0 if !self.atapi => self.report_luns(cdb),
            0x1a | 0x5a => self.mode_sense(cdb),
            0x15 | 0x55 => Self::mode_select(cdb),
            _ => match &self.kind {
                Kind::Disk(disk) => block::plan(disk, cdb),
                Kind::Cd(tray) => mmc::plan(tray, cdb),
            },
        };
        match plan {
            Plan::Fail(sense) => self.failed(sense),
            plan => plan,
        }
    }

    fn failed(&mut self, sense: Sense) -> Plan {
        self.sense = sense;
        Plan::Fail(sense)
    }

    /// Takes parameters that a plan asked for.
    pub fn parameters(&mut self, what: Parameters, data: &[u8]) -> Plan {
        let plan = match (what, &self.kind) {
            (Parameters::Mode { header }, _) => mode::select(data, header),
            (Parameters::Unmap, Kind::Disk(disk)) => block::unmap(disk, data),
            (Parameters::Same { lba, count, unmap }, Kind::Disk(disk)) => {
                block::same(disk, lba, count, unmap, data)
            }
            (Parameters::Trim, _) | (_, Kind::Cd(_)) => Plan::Fail(Sense::INVALID_COMMAND),
        };
        match plan {
            Plan::Fail(sense) => self.failed(sense),
            plan => plan,
        }
    }

    /// REQUEST SENSE, SPC-4 §6.39.
    fn request_sense(&mut self, cdb: &[u8]) -> Plan {
        let mut sense = std::mem::take(&mut self.sense);
        if sense == Sense::NONE {
            sense = self.attention.take().unwrap_or_default();
        }
        let data = if byte(cdb, 1) & 1 != 0 {
            sense.descriptor().to_vec()
        } else {
            sense.fixed().to_vec()
        };
        reply(data, byte(cdb, 4).into())
    }

    /// REPORT LUNS: this one only. SPC-4 §6.33.
    fn report_luns(&self, cdb: &[u8]) -> Plan {
        let mut data = vec![0; 16];
        data[3] = 8;
        reply(data, be32(cdb, 6) as usize)
    }

    fn info(&self) -> Option<DiskInfo> {
        match &self.kind {
            Kind::Disk(d) => Some(d.info()),
            Kind::Cd(t) => t.medium().map(|m| m.info()),
        }
    }
}
