//! Submission and completion queues. §4.1.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use minicbor::{Decode, Encode};
use pyrite_mem::{GuestMemory, MemError};

/// Bytes of a command and of a completion.
pub(super) const COMMAND_BYTES: u64 = 64;
pub(super) const COMPLETION_BYTES: u64 = 16;

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Submission {
    #[n(0)]
    pub base: u64,
    /// Entries.
    #[n(1)]
    pub size: u32,
    #[n(2)]
    pub head: u32,
    #[n(3)]
    pub tail: u32,
    /// Completion queue.
    #[n(4)]
    pub cq: u16,
    /// Commands taken and not completed; none while it is saved but the held ones.
    #[n(5)]
    pub in_flight: u32,
    /// Identifier of the command that deletes the queue once nothing of it is in flight.
    #[n(6)]
    pub deleted_by: Option<u16>,
}

impl Submission {
    pub(super) fn new(base: u64, size: u32, cq: u16) -> Submission {
        Submission {
            base,
            size,
            head: 0,
            tail: 0,
            cq,
            in_flight: 0,
            deleted_by: None,
        }
    }

    /// The next command. LIMIT: as many in flight as the queue has entries, however fast the
    /// driver moves the tail.
    pub(super) fn pop(
        &mut self,
        memory: &GuestMemory,
    ) -> Result<Option<[u8; COMMAND_BYTES as usize]>, MemError> {
        if self.deleted_by.is_some() || self.head == self.tail || self.in_flight >= self.size {
            return Ok(None);
        }
        let mut command = [0; COMMAND_BYTES as usize];
        memory.read(
            self.base + COMMAND_BYTES * u64::from(self.head),
            &mut command,
        )?;
        self.head = (self.head + 1) % self.size;
        self.in_flight += 1;
        Ok(Some(command))
    }
}

/// A completion without its phase and queue head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Completion {
    /// Command specific.
    #[n(0)]
    pub result: u32,
    #[n(1)]
    pub sq: u16,
    #[n(2)]
    pub id: u16,
    /// Status field, 15 bits.
    #[n(3)]
    pub status: u16,
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Completions {
    #[n(0)]
    pub base: u64,
    #[n(1)]
    pub size: u32,
    #[n(2)]
    pub head: u32,
    #[n(3)]
    pub tail: u32,
    /// Phase tag of what is written now. §4.6.
    #[n(4)]
    pub phase: bool,
    #[n(5)]
    pub vector: u16,
    #[n(6)]
    pub interrupts: bool,
    /// What found the queue full.
    #[n(7)]
    pub held: VecDeque<Completion>,
}

impl Completions {
    pub(super) fn new(base: u64, size: u32, vector: u16, interrupts: bool) -> Completions {
        Completions {
            base,
            size,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            interrupts,
            held: VecDeque::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    pub(super) fn is_full(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    /// Writes a completion. `sq_head`: how far its submission queue was read.
    pub(super) fn push(
        &mut self,
        memory: &GuestMemory,
        c: &Completion,
        sq_head: u32,
    ) -> Result<(), MemError> {
        let mut e = [0; 14];
        e[..4].copy_from_slice(&c.result.to_le_bytes());
        e[8..10].copy_from_slice(&(sq_head as u16).to_le_bytes());
        e[10..12].copy_from_slice(&c.sq.to_le_bytes());
        e[12..14].copy_from_slice(&c.id.to_le_bytes());
        let status = c.status << 1 | u16::from(self.phase);
        let at = self.base + COMPLETION_BYTES * u64::from(self.tail);
        // The driver polls the phase, which must be the last to arrive.
        memory.write(at, &e[..14])?;
        memory.store_u16(at + 14, status, Ordering::Release)?;
        self.tail = (self.tail + 1) % self.size;
        self.phase ^= self.tail == 0;
        Ok(())
    }
}
