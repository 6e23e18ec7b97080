//! Transfer request blocks and the rings that they come in. §4.9 and §6.4.

use std::sync::atomic::Ordering;

use minicbor::{Decode, Encode};
use pyrite_disk::IoBuf;
use pyrite_mem::{GuestMemory, MemError};

use super::code;
use crate::usb::device::Buffers;

/// Bytes of a block.
pub(super) const TRB_BYTES: u64 = 16;
/// LIMIT: blocks of a transfer descriptor: 64 MiB in pieces of 64 KiB.
const MAX_TD_TRBS: usize = 1024;
/// LIMIT: links that follow each other.
const MAX_LINKS: usize = 16;

/// TRB types, table 6-91.
#[allow(missing_docs, reason = "the standard's names")]
pub(super) mod kind {
    pub const NORMAL: u8 = 1;
    pub const SETUP_STAGE: u8 = 2;
    pub const DATA_STAGE: u8 = 3;
    pub const STATUS_STAGE: u8 = 4;
    pub const LINK: u8 = 6;
    pub const EVENT_DATA: u8 = 7;
    pub const NO_OP: u8 = 8;
    pub const ENABLE_SLOT: u8 = 9;
    pub const DISABLE_SLOT: u8 = 10;
    pub const ADDRESS_DEVICE: u8 = 11;
    pub const CONFIGURE_ENDPOINT: u8 = 12;
    pub const EVALUATE_CONTEXT: u8 = 13;
    pub const RESET_ENDPOINT: u8 = 14;
    pub const STOP_ENDPOINT: u8 = 15;
    pub const SET_TR_DEQUEUE: u8 = 16;
    pub const RESET_DEVICE: u8 = 17;
    pub const NO_OP_COMMAND: u8 = 23;
    pub const TRANSFER_EVENT: u8 = 32;
    pub const COMMAND_COMPLETION: u8 = 33;
    pub const PORT_STATUS_CHANGE: u8 = 34;
    pub const HOST_CONTROLLER: u8 = 37;
}

const CYCLE: u32 = 1 << 0;
/// In a link: the cycle state changes there.
const TOGGLE_CYCLE: u32 = 1 << 1;
const SHORT_PACKET: u32 = 1 << 2;
const CHAIN: u32 = 1 << 4;
const ON_COMPLETION: u32 = 1 << 5;
const IMMEDIATE: u32 = 1 << 6;

/// A block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Trb {
    #[n(0)]
    pub parameter: u64,
    #[n(1)]
    pub status: u32,
    #[n(2)]
    pub control: u32,
}

impl Trb {
    pub(super) fn kind(&self) -> u8 {
        (self.control >> 10 & 0x3f) as u8
    }
    /// Bytes that it transfers.
    pub(super) fn bytes(&self) -> u32 {
        match self.kind() {
            kind::NORMAL | kind::DATA_STAGE => self.status & 0x1_ffff,
            _ => 0,
        }
    }
    pub(super) fn interrupter(&self) -> u16 {
        (self.status >> 22) as u16
    }
    pub(super) fn wants_completion(&self) -> bool {
        self.control & ON_COMPLETION != 0
    }
    pub(super) fn wants_short(&self) -> bool {
        self.control & SHORT_PACKET != 0
    }
    /// An event of it interrupts (BEI is not set).
    pub(super) fn interrupts(&self) -> bool {
        self.control & 1 << 9 == 0
    }
    pub(super) fn slot(&self) -> u8 {
        (self.control >> 24) as u8
    }
    pub(super) fn endpoint(&self) -> u8 {
        (self.control >> 16 & 0x1f) as u8
    }
}

/// Where a ring is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Dequeue {
    #[n(0)]
    pub at: u64,
    /// The cycle bit of blocks that are there to be read.
    #[n(1)]
    pub cycle: bool,
}

impl Dequeue {
    /// From the form that contexts and commands have: an address with the cycle state in bit 0.
    pub(super) fn new(raw: u64) -> Dequeue {
        Dequeue {
            at: raw & !0xf,
            cycle: raw & 1 != 0,
        }
    }
    pub(super) fn raw(self) -> u64 {
        self.at | u64::from(self.cycle)
    }

    /// The next block that is no link, and where it is; `None` if there is none yet. Links that
    /// lead on for ever are an error.
    pub(super) fn next(&mut self, memory: &GuestMemory) -> Result<Option<(u64, Trb)>, RingError> {
        for _ in 0..MAX_LINKS {
            let control = memory.load_u32(self.at + 12, Ordering::Acquire)?;
            if (control & CYCLE != 0) != self.cycle {
                return Ok(None);
            }
            let mut b = [0; 12];
            memory.read(self.at, &mut b)?;
            let [a, b, c] =
                [0, 4, 8].map(|n| u32::from_le_bytes([b[n], b[n + 1], b[n + 2], b[n + 3]]));
            let trb = Trb {
                parameter: u64::from(b) << 32 | u64::from(a),
                status: c,
                control,
            };
            if trb.kind() == kind::LINK {
                self.at = trb.parameter & !0xf;
                self.cycle ^= control & TOGGLE_CYCLE != 0;
                continue;
            }
            let at = self.at;
            self.at = at.checked_add(TRB_BYTES).ok_or(RingError::Malformed)?;
            return Ok(Some((at, trb)));
        }
        Err(RingError::Malformed)
    }
}

/// Why a ring cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RingError {
    /// It is not in memory.
    Memory,
    /// It is no ring.
    Malformed,
}

impl From<MemError> for RingError {
    fn from(_: MemError) -> RingError {
        RingError::Memory
    }
}

/// A transfer descriptor: blocks that are chained.
#[derive(Clone, Debug)]
pub(super) struct Td {
    /// With their addresses.
    pub trbs: Vec<(u64, Trb)>,
    /// What follows it.
    pub next: Dequeue,
}

impl Td {
    /// The descriptor at `from`; `None` if it is not all there yet.
    pub(super) fn read(memory: &GuestMemory, from: Dequeue) -> Result<Option<Td>, RingError> {
        let (mut trbs, mut next) = (Vec::new(), from);
        loop {
            let Some((at, trb)) = next.next(memory)? else {
                return Ok(None);
            };
            if trbs.len() >= MAX_TD_TRBS {
                return Err(RingError::Malformed);
            }
            trbs.push((at, trb));
            if trb.control & CHAIN == 0 {
                return Ok(Some(Td { trbs, next }));
            }
        }
    }

    /// Stands for one that cannot be read.
    pub(super) fn empty(at: Dequeue) -> Td {
        Td {
            trbs: vec![(at.at, Trb::default())],
            next: at,
        }
    }

    /// The type of its first block.
    pub(super) fn kind(&self) -> u8 {
        self.trbs.first().map_or(0, |(_, t)| t.kind())
    }

    /// Its data. `None` if they cannot be there.
    pub(super) fn buffers(&self) -> Option<Buffers> {
        let mut bufs = Vec::new();
        for (_, t) in &self.trbs {
            let len = t.bytes();
            if len == 0 {
                continue;
            }
            if t.control & IMMEDIATE != 0 {
                let data = t.parameter.to_le_bytes();
                // It stands alone, and has eight bytes. §6.4.1.2.1.
                let alone = self.trbs.iter().all(|(_, o)| o.bytes() == 0 || o == t);
                let data = data.get(..len as usize).filter(|_| alone)?;
                return Some(Buffers::Immediate(data.to_vec()));
            }
            t.parameter.checked_add(len.into())?;
            bufs.push(IoBuf {
                gpa: t.parameter,
                len,
            });
        }
        Some(Buffers::Memory(bufs))
    }

    /// What its end is to tell: events with their interrupters, and whether they interrupt. `moved`
    /// bytes were transferred. §4.10.1 and §4.11.5.2.
    pub(super) fn events(&self, slot: u8, endpoint: u8, code: u8, moved: u64) -> Vec<Report> {
        let mut events = Vec::new();
        let (mut left, mut since, mut told) = (moved, 0, false);
        let mut code_now = code;
        let failed = self.failed_at(code, moved);
        for (n, (at, t)) in self.trbs.iter().enumerate() {
            let bytes = u64::from(t.bytes());
            let done = left.min(bytes);
            left -= done;
            since += done;
            let short = bytes > done;
            if short && failed.is_none() {
                code_now = code::SHORT_PACKET;
            }
            let report = |parameter, length: u64, code, flags: u32| Report {
                interrupter: t.interrupter(),
                interrupts: t.interrupts(),
                event: Trb {
                    parameter,
                    status: u32::from(code) << 24 | length as u32 & 0xff_ffff,
                    control: u32::from(slot) << 24
                        | u32::from(endpoint) << 16
                        | u32::from(kind::TRANSFER_EVENT) << 10
                        | flags,
                },
            };
            if failed == Some(n) {
                events.push(report(*at, bytes - done, code, 0));
                break;
            }
            if failed.is_some() {
                code_now = code::SUCCESS;
            }
            if t.kind() == kind::EVENT_DATA {
                if t.wants_completion() {
                    events.push(report(t.parameter, since, code_now, 1 << 2));
                }
                since = 0;
            } else if !told && (t.wants_completion() || short && t.wants_short()) {
                events.push(report(*at, bytes - done, code_now, 0));
                // What lies behind a short packet is skipped.
                told = code_now == code::SHORT_PACKET;
            }
        }
        events
    }

    /// The block at which a failed transfer ended: the first that is not done, or the last.
    fn failed_at(&self, code: u8, moved: u64) -> Option<usize> {
        if code == code::SUCCESS {
            return None;
        }
        let mut left = moved;
        let unfinished = self.trbs.iter().position(|(_, t)| {
            let bytes = u64::from(t.bytes());
            let short = bytes > left;
            left = left.saturating_sub(bytes);
            short
        });
        let last = || {
            let data = |(_, t): &(u64, Trb)| t.kind() != kind::EVENT_DATA;
            self.trbs.iter().rposition(data)
        };
        unfinished.or_else(last).or(Some(0))
    }
}

/// An event and who gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub interrupter: u16,
    pub interrupts: bool,
    pub event: Trb,
}
