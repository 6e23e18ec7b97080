//! Virtqueues, device side: split and packed rings. virtio 1.3 §2.6–§2.8.
//!
//! The rings are guest memory and hostile: every index, address and length is checked when it is
//! read, once, and copied before use. What breaks the rules is a [`QueueError`]; the owner marks
//! the device `DEVICE_NEEDS_RESET` and takes nothing more from the queue.
//!
//! A [`Chain`] holds validated guest-physical ranges, not references: the guest may change what
//! they contain at any time, so parsers copy first and check the copy.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use minicbor::{Decode, Encode};
use pyrite_disk::IoBuf;
use pyrite_mem::{GuestMemory, MemError};
use pyrite_state::Inspect;

mod packed;
mod split;
#[cfg(test)]
mod tests;

/// LIMIT: descriptors in one chain, the entries of an indirect table included.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1024;
/// LIMIT: largest ring offered to a driver. virtio 1.3 §2.6 allows 32768.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// LIMIT: total length of a chain. virtio 1.3 §2.6.5: "drivers MUST NOT add a descriptor chain
/// longer than 2^32 bytes in total".
const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// virtio 1.3 §2.6.5: the buffer continues via the next field.
const VIRTQ_DESC_F_NEXT: u16 = 1;
/// The buffer is device write-only.
const VIRTQ_DESC_F_WRITE: u16 = 2;
/// The buffer contains a list of descriptors.
const VIRTQ_DESC_F_INDIRECT: u16 = 4;

/// What a driver did wrong with a queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Size zero, too large, or (split) not a power of two.
    #[error("queue size {0} is invalid")]
    BadSize(u16),
    /// A part of the ring is misaligned or outside RAM.
    #[error("ring at {0:#x} is misaligned or outside RAM")]
    BadRing(u64),
    /// More chains are made available than the ring holds.
    #[error("available index {avail} is more than the ring ahead of {next}")]
    AvailIndex {
        /// The driver's index.
        avail: u16,
        /// The next one that the device would take.
        next: u16,
    },
    /// A descriptor number beyond its table.
    #[error("descriptor {index} is beyond the table of {size}")]
    DescriptorIndex {
        /// The number.
        index: u16,
        /// Entries in the table.
        size: u32,
    },
    /// A loop, or an unreasonable number of descriptors.
    #[error("descriptor chain is too long or loops")]
    ChainTooLong,
    /// More bytes than a chain may have.
    #[error("descriptor chain is longer than 4 GiB")]
    ChainTooLarge,
    /// A device-readable descriptor after a device-writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// An indirect table that is nested, badly sized, or not negotiated.
    #[error("invalid indirect descriptor")]
    Indirect,
    /// A buffer or ring outside RAM.
    #[error(transparent)]
    Memory(#[from] MemError),
}

/// A range of guest-physical RAM, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub gpa: u64,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// Counts a chain as in flight until it is dropped.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<AtomicUsize>);

impl InFlight {
    pub(crate) fn new(counter: &Arc<AtomicUsize>) -> InFlight {
        counter.fetch_add(1, Ordering::AcqRel);
        InFlight(Arc::clone(counter))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A descriptor chain that the driver made available.
#[derive(Debug)]
pub struct Chain {
    /// Split: head descriptor. Packed: buffer id.
    id: u16,
    /// Packed: ring slots that the chain takes.
    slots: u16,
    /// The queue's life that it belongs to.
    pub(crate) epoch: u64,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    pub(crate) in_flight: Option<InFlight>,
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// The part of `segments` that is `len` bytes from byte `offset`; shorter if they end before.
fn slice(segments: &[Segment], mut offset: u64, mut len: u64) -> Vec<Segment> {
    let mut out = Vec::new();
    for s in segments {
        let here = u64::from(s.len);
        if offset >= here {
            offset -= here;
            continue;
        }
        if len == 0 {
            break;
        }
        let n = (here - offset).min(len);
        out.push(Segment {
            gpa: s.gpa + offset,
            len: n as u32,
        });
        len -= n;
        offset = 0;
    }
    out
}

impl Chain {
    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        total(&self.readable)
    }
    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        total(&self.writable)
    }
    /// The device-readable ranges.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }
    /// The device-writable ranges.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }
    /// Copies out of the readable part from byte `offset`; returns how many bytes there were.
    pub fn read_at(&self, memory: &GuestMemory, offset: u64, out: &mut [u8]) -> usize {
        let mut done = 0;
        for s in slice(&self.readable, offset, out.len() as u64) {
            let part = &mut out[done..done + s.len as usize];
            if memory.read(s.gpa, part).is_err() {
                break;
            }
            done += s.len as usize;
        }
        done
    }
    /// Copies into the writable part from byte `offset`; returns how many bytes fitted.
    pub fn write_at(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for s in slice(&self.writable, offset, data.len() as u64) {
            if memory
                .write(s.gpa, &data[done..done + s.len as usize])
                .is_err()
            {
                break;
            }
            done += s.len as usize;
        }
        done
    }
    /// The readable part from `offset`, as a transfer list.
    pub fn readable_bufs(&self, offset: u64, len: u64) -> Vec<IoBuf> {
        slice(&self.readable, offset, len)
            .into_iter()
            .map(|s| IoBuf {
                gpa: s.gpa,
                len: s.len,
            })
            .collect()
    }
    /// The writable part from `offset`, as a transfer list.
    pub fn writable_bufs(&self, offset: u64, len: u64) -> Vec<IoBuf> {
        slice(&self.writable, offset, len)
            .into_iter()
            .map(|s| IoBuf {
                gpa: s.gpa,
                len: s.len,
            })
            .collect()
    }
}

/// The saved form of a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct QueueState {
    /// Entries, as the driver chose.
    #[n(0)]
    pub size: u16,
    /// Enabled by the driver.
    #[n(1)]
    pub ready: bool,
    /// Descriptor area.
    #[n(2)]
    pub desc: u64,
    /// Driver area (available ring, or driver event suppression).
    #[n(3)]
    pub driver: u64,
    /// Device area (used ring, or device event suppression).
    #[n(4)]
    pub device: u64,
    /// Split: free-running available index. Packed: ring position.
    #[n(5)]
    pub next_avail: u16,
    /// Split: free-running used index. Packed: ring position.
    #[n(6)]
    pub next_used: u16,
    /// Packed: the device's wrap counter for available descriptors.
    #[n(7)]
    pub avail_wrap: bool,
    /// Packed: the device's wrap counter for used descriptors.
    #[n(8)]
    pub used_wrap: bool,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Queue {
    max_size: u16,
    s: QueueState,
    packed: bool,
    event_idx: bool,
    indirect: bool,
    /// Used index (split) or position and wrap (packed) when a signal was last considered.
    signalled: Option<(u16, bool)>,
    /// Something was pushed that the driver has not been told of.
    unsignalled: bool,
    /// Counts lives: what was taken before a reset must not be returned after it.
    epoch: u64,
}

impl Queue {
    /// A queue of up to `max_size` entries, a power of two.
    pub fn new(max_size: u16) -> Queue {
        let max_size = max_size.min(MAX_QUEUE_SIZE);
        Queue {
            max_size,
            s: QueueState {
                size: max_size,
                avail_wrap: true,
                used_wrap: true,
                ..QueueState::default()
            },
            packed: false,
            event_idx: false,
            indirect: false,
            signalled: None,
            unsignalled: false,
            epoch: 0,
        }
    }

    /// Power-on state. Chains taken before are forgotten.
    pub fn reset(&mut self) {
        let epoch = self.epoch + 1;
        *self = Queue {
            epoch,
            ..Queue::new(self.max_size)
        };
    }

    /// Largest size.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }
    /// The registers and indices.
    pub fn state(&self) -> &QueueState {
        &self.s
    }
    /// True once enabled.
    pub fn ready(&self) -> bool {
        self.s.ready
    }
    /// Which life of the queue this is.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Registers that the driver sets; ignored once enabled (virtio 1.3 §4.1.4.3.2).
    pub fn configure(&mut self, change: impl FnOnce(&mut QueueState)) {
        if !self.s.ready {
            let mut s = self.s.clone();
            change(&mut s);
            self.s.size = s.size;
            self.s.desc = s.desc;
            self.s.driver = s.driver;
            self.s.device = s.device;
        }
    }

    /// Enables the queue with the negotiated features.
    pub fn enable(
        &mut self,
        memory: &GuestMemory,
        packed: bool,
        event_idx: bool,
        indirect: bool,
    ) -> Result<(), QueueError> {
        self.packed = packed;
        self.event_idx = event_idx;
        self.indirect = indirect;
        self.check_rings(memory)?;
        self.s.ready = true;
        self.signalled = None;
        Ok(())
    }

    /// Takes a saved queue over.
    pub fn restore(
        &mut self,
        memory: &GuestMemory,
        state: &QueueState,
        packed: bool,
        event_idx: bool,
        indirect: bool,
    ) -> Result<(), QueueError> {
        self.reset();
        self.s = state.clone();
        self.s.ready = false;
        if state.ready {
            if packed && (state.next_avail >= state.size || state.next_used >= state.size) {
                return Err(QueueError::AvailIndex {
                    avail: state.next_used,
                    next: state.next_avail,
                });
            }
            self.enable(memory, packed, event_idx, indirect)?;
            // A signal may have been on its way when the state was saved; once too often is
            // allowed, once too few is a hang.
            self.unsignalled = true;
        }
        Ok(())
    }

    fn check_rings(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        let n = u64::from(self.s.size);
        if n == 0 || self.s.size > self.max_size || (!self.packed && !self.s.size.is_power_of_two())
        {
            return Err(QueueError::BadSize(self.s.size));
        }
        // virtio 1.3 §2.6 and §2.8: alignment and length of the three areas.
        let (driver, device) = if self.packed {
            ((4, 4), (4, 4))
        } else {
            ((2, 6 + 2 * n), (4, 6 + 8 * n))
        };
        for (at, (align, len)) in [
            (self.s.desc, (16, 16 * n)),
            (self.s.driver, driver),
            (self.s.device, device),
        ] {
            if at % align != 0 || memory.ram_offset(at, len).is_none() {
                return Err(QueueError::BadRing(at));
            }
        }
        Ok(())
    }

    /// Takes the next available chain; arms the driver's notification when there is none.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if !self.s.ready {
            return Ok(None);
        }
        if self.packed {
            self.pop_packed(memory)
        } else {
            self.pop_split(memory)
        }
    }

    /// True if a chain is available; arms the driver's notification otherwise.
    pub fn has_avail(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.s.ready {
            return Ok(false);
        }
        if self.packed {
            self.has_avail_packed(memory)
        } else {
            Ok(self.avail_split(memory)? > 0)
        }
    }

    /// Gives the chain taken last back, as if it had never been taken.
    pub fn unpop(&mut self, chain: Chain) {
        if chain.epoch != self.epoch || !self.s.ready {
            return;
        }
        if self.packed {
            self.unpop_packed(chain.slots);
        } else {
            self.s.next_avail = self.s.next_avail.wrapping_sub(1);
        }
    }

    /// Asks for a notification when the driver adds something to what is available now.
    pub fn arm(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.s.ready && self.event_idx && !self.packed {
            self.arm_split(memory)?;
        }
        // Packed: notifications were armed at the position of the last empty look; a chain that
        // does not suffice leaves the driver's flag at ENABLE, set here.
        if self.s.ready && self.packed {
            self.enable_notifications_packed(memory)?;
        }
        Ok(())
    }

    /// Returns a chain with `written` bytes filled in. False if the queue was reset meanwhile.
    pub fn push(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<bool, QueueError> {
        if chain.epoch != self.epoch || !self.s.ready {
            return Ok(false);
        }
        if self.packed {
            self.push_packed(memory, chain.id, chain.slots, written)?;
        } else {
            self.push_split(memory, chain.id, written)?;
        }
        self.unsignalled = true;
        Ok(true)
    }

    /// True if the driver wants to hear of what was pushed since the last call.
    pub fn needs_signal(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.s.ready || !std::mem::take(&mut self.unsignalled) {
            return Ok(false);
        }
        // The used entries must be visible before the driver's wish is read: a driver that
        // enables interrupts and then looks at the ring must find either the entry or a signal.
        fence(Ordering::SeqCst);
        if self.packed {
            self.needs_signal_packed(memory)
        } else {
            self.needs_signal_split(memory)
        }
    }
}

impl Queue {
    /// What the queue shows of itself: the device's indices, and the driver's as they stand in
    /// memory now.
    pub fn inspect(&self, memory: &GuestMemory) -> Inspect {
        let mut tree = vec![
            ("ready".to_owned(), Inspect::Bool(self.s.ready)),
            ("size".to_owned(), Inspect::Uint(self.s.size.into())),
            (
                "next_avail".to_owned(),
                Inspect::Uint(self.s.next_avail.into()),
            ),
            (
                "next_used".to_owned(),
                Inspect::Uint(self.s.next_used.into()),
            ),
            ("unsignalled".to_owned(), Inspect::Bool(self.unsignalled)),
        ];
        if let Some((at, _)) = self.signalled {
            tree.push(("signalled".to_owned(), Inspect::Uint(at.into())));
        }
        if self.s.ready && !self.packed {
            for (name, gpa) in self.split_words() {
                let value = memory.load_u16(gpa, Ordering::Acquire);
                tree.extend(value.map(|v| (name.to_owned(), Inspect::Uint(v.into()))));
            }
        }
        Inspect::Node(tree)
    }
}

/// virtio 1.3 §2.6.7.1: true if the step from `old` to `new` passes `event`.
fn vring_need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A descriptor as it is in memory, either layout.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    /// Split: next. Packed: buffer id.
    tag: u16,
}

/// Collects the validated segments of one chain.
#[derive(Default)]
struct Collector {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    descriptors: usize,
    bytes: u64,
}

impl Collector {
    fn count(&mut self) -> Result<(), QueueError> {
        self.descriptors += 1;
        if self.descriptors > MAX_CHAIN_DESCRIPTORS {
            return Err(QueueError::ChainTooLong);
        }
        Ok(())
    }

    fn add(&mut self, memory: &GuestMemory, d: Descriptor) -> Result<(), QueueError> {
        self.count()?;
        if d.len != 0 {
            let len = u64::from(d.len);
            if memory.ram_offset(d.addr, len).is_none() {
                return Err(MemError::NotRam { gpa: d.addr, len }.into());
            }
            self.bytes += len;
            if self.bytes > MAX_CHAIN_BYTES {
                return Err(QueueError::ChainTooLarge);
            }
        }
        let segment = Segment {
            gpa: d.addr,
            len: d.len,
        };
        if d.flags & VIRTQ_DESC_F_WRITE != 0 {
            // A descriptor of no bytes says nothing but its direction.
            self.writable.extend((d.len != 0).then_some(segment));
        } else {
            // virtio 1.3 §2.6.4.2: "The driver MUST place any device-writable descriptor elements
            // after any device-readable descriptor elements."
            if !self.writable.is_empty() {
                return Err(QueueError::Order);
            }
            self.readable.extend((d.len != 0).then_some(segment));
        }
        Ok(())
    }

    fn finish(self, id: u16, slots: u16, epoch: u64) -> Chain {
        Chain {
            id,
            slots,
            epoch,
            readable: self.readable,
            writable: self.writable,
            in_flight: None,
        }
    }
}
