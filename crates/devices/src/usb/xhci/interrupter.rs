//! Event rings and their interrupts. §4.9.4 and §4.17.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use minicbor::{Decode, Encode};
use pyrite_mem::{GuestMemory, MemError};

use super::code;
use super::ring::{TRB_BYTES, Trb, kind};

/// LIMIT: events that wait for room in a ring. Nothing is taken from other rings meanwhile, so that
/// they are those of one descriptor, and of ports.
const MAX_HELD: usize = 4096;
/// Blocks of a segment. Table 6-3 (Event Ring Segment Table Entry).
const SEGMENT_TRBS: std::ops::RangeInclusive<u32> = 16..=4096;

/// Interrupt pending, interrupt enable. §5.5.2.1.
const PENDING: u32 = 1 << 0;
const ENABLE: u32 = 1 << 1;
/// Event handler busy. §5.5.2.3.3.
const BUSY: u64 = 1 << 3;

/// A segment of an event ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Segment {
    #[n(0)]
    base: u64,
    #[n(1)]
    trbs: u32,
    /// Where the next event goes.
    #[n(2)]
    enqueue: u32,
    #[n(3)]
    cycle: bool,
}

/// An interrupter with its event ring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Interrupter {
    #[n(0)]
    management: u32,
    #[n(1)]
    moderation: u32,
    #[n(2)]
    table_size: u32,
    #[n(3)]
    table: u64,
    #[n(4)]
    dequeue: u64,
    /// The ring, once the first event has gone there.
    #[n(5)]
    segment: Option<Segment>,
    /// There is an event that is to interrupt (IPE).
    #[n(6)]
    event_pending: bool,
    /// Events that found the ring full, and whether they interrupt.
    #[n(7)]
    held: VecDeque<(Trb, bool)>,
}

impl Interrupter {
    pub(super) fn power_on() -> Interrupter {
        Interrupter {
            moderation: 4000, // 1 ms, table 5-38
            ..Interrupter::default()
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        let segment = self.segment.is_none_or(|s| {
            SEGMENT_TRBS.contains(&s.trbs)
                && s.enqueue < s.trbs
                && s.base.checked_add(TRB_BYTES * u64::from(s.trbs)).is_some()
        });
        segment && self.held.len() <= MAX_HELD
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.management,
            0x04 => self.moderation,
            0x08 => self.table_size,
            0x10 => self.table as u32,
            0x14 => (self.table >> 32) as u32,
            0x18 => self.dequeue as u32,
            0x1c => (self.dequeue >> 32) as u32,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u32, mask: u32) {
        let merge = |old: u32| old & !mask | value & mask;
        let low = |old: u64| old & !0xffff_ffff | u64::from(merge(old as u32));
        let high = |old: u64| old & 0xffff_ffff | u64::from(merge((old >> 32) as u32)) << 32;
        match offset {
            0x00 => {
                let cleared = value & mask & PENDING;
                self.management =
                    (self.management & !cleared) & PENDING | merge(self.management) & ENABLE;
            }
            // The counter runs down at once: interrupts come as soon as the handler is ready for
            // the next one.
            0x04 => self.moderation = merge(self.moderation) & 0xffff,
            0x08 => self.table_size = merge(self.table_size) & 0xffff,
            0x10 | 0x14 => {
                let table = match offset {
                    0x10 => low(self.table),
                    _ => high(self.table),
                };
                self.table = table & !0x3f;
                // The ring begins anew.
                self.segment = None;
            }
            0x18 => {
                let busy = self.dequeue & BUSY & !u64::from(value & mask);
                self.dequeue = low(self.dequeue) & !BUSY | busy;
            }
            0x1c => self.dequeue = high(self.dequeue),
            _ => {}
        }
    }

    /// Something waits for room.
    pub(super) fn is_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// Keeps an event until [`Interrupter::release`].
    pub(super) fn hold(&mut self, event: Trb) {
        if self.held.len() < MAX_HELD {
            self.held.push_back((event, true));
        }
    }

    /// Puts an event into the ring, or behind those that wait for room.
    pub(super) fn push(
        &mut self,
        memory: &GuestMemory,
        event: Trb,
        interrupts: bool,
    ) -> Result<(), MemError> {
        let waits = self.is_held() || !self.put(memory, event, interrupts, true)?;
        if waits && self.held.len() < MAX_HELD {
            self.held.push_back((event, interrupts));
        }
        Ok(())
    }

    /// Puts what waits into the ring, as far as there is room now.
    pub(super) fn release(&mut self, memory: &GuestMemory) -> Result<(), MemError> {
        while let Some((event, interrupts)) = self.held.front().copied() {
            if !self.put(memory, event, interrupts, false)? {
                break;
            }
            self.held.pop_front();
        }
        Ok(())
    }

    /// `false`: there is no room. `marks`: then a word about it takes the last place.
    fn put(
        &mut self,
        memory: &GuestMemory,
        event: Trb,
        interrupts: bool,
        marks: bool,
    ) -> Result<bool, MemError> {
        if self.table_size == 0 {
            return Ok(true); // there is no ring, and nobody to be told
        }
        let s = match self.segment {
            Some(s) => s,
            None => Self::open(memory, self.table)?,
        };
        let here = self.dequeue & !0xf;
        let after = |n: u32| (n + 1) % s.trbs;
        let at = |n: u32| s.base + TRB_BYTES * u64::from(n);
        self.segment = Some(s);
        if at(after(s.enqueue)) == here {
            return Ok(false);
        }
        let full = marks && at(after(after(s.enqueue))) == here;
        let event = if full {
            Trb {
                parameter: 0,
                status: u32::from(code::EVENT_RING_FULL) << 24,
                control: u32::from(kind::HOST_CONTROLLER) << 10,
            }
        } else {
            event
        };
        let control = event.control & !1 | u32::from(s.cycle);
        let mut b = [0; 16];
        b[..8].copy_from_slice(&event.parameter.to_le_bytes());
        b[8..12].copy_from_slice(&event.status.to_le_bytes());
        b[12..].copy_from_slice(&control.to_le_bytes());
        // The driver looks at the cycle bit, which must be the last to arrive.
        memory.write(at(s.enqueue), &b[..12])?;
        memory.write(at(s.enqueue) + 14, &b[14..])?;
        let low = u16::from_le_bytes([b[12], b[13]]);
        memory.store_u16(at(s.enqueue) + 12, low, Ordering::Release)?;
        self.segment = Some(Segment {
            enqueue: after(s.enqueue),
            cycle: s.cycle ^ (after(s.enqueue) == 0),
            ..s
        });
        self.event_pending |= interrupts || full;
        Ok(!full)
    }

    fn open(memory: &GuestMemory, table: u64) -> Result<Segment, MemError> {
        let bad = MemError::NotRam {
            gpa: table,
            len: 16,
        };
        let base = memory.read_u64(table)? & !0x3f;
        let trbs = memory.read_u32(table + 8)? & 0xffff;
        let there = base.checked_add(TRB_BYTES * u64::from(trbs)).is_some();
        if !SEGMENT_TRBS.contains(&trbs) || !there {
            return Err(bad);
        }
        Ok(Segment {
            base,
            trbs,
            enqueue: 0,
            cycle: true,
        })
    }

    /// Whether an interrupt is due; then it counts as raised.
    pub(super) fn take_due(&mut self) -> bool {
        let emptied = self
            .segment
            .is_some_and(|s| s.base + TRB_BYTES * u64::from(s.enqueue) == self.dequeue & !0xf);
        if emptied {
            self.event_pending = false;
        }
        if !self.event_pending || self.dequeue & BUSY != 0 {
            return false;
        }
        self.dequeue |= BUSY;
        self.management |= PENDING;
        true
    }

    /// The line is to be asserted for it.
    pub(super) fn asserts(&self) -> bool {
        self.management & (PENDING | ENABLE) == PENDING | ENABLE
    }

    /// A message was sent in place of the line. §4.17.5.
    pub(super) fn message_sent(&mut self) {
        self.management &= !PENDING;
    }
}
