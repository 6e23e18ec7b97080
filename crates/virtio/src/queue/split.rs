//! The split ring. virtio 1.3 §2.7.

use std::sync::atomic::{Ordering, fence};

use pyrite_mem::GuestMemory;

use super::{
    Chain, Collector, Descriptor, Queue, QueueError, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT,
    vring_need_event,
};

/// virtio 1.3 §2.7.6: in the available ring's flags, the driver wants no interrupt.
const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;

fn read_descriptor(
    memory: &GuestMemory,
    table: u64,
    index: u16,
    size: u32,
) -> Result<Descriptor, QueueError> {
    if u32::from(index) >= size {
        return Err(QueueError::DescriptorIndex { index, size });
    }
    let mut b = [0; 16];
    memory.read(table + 16 * u64::from(index), &mut b)?;
    let [
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        l0,
        l1,
        l2,
        l3,
        f0,
        f1,
        n0,
        n1,
    ] = b;
    Ok(Descriptor {
        addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        len: u32::from_le_bytes([l0, l1, l2, l3]),
        flags: u16::from_le_bytes([f0, f1]),
        tag: u16::from_le_bytes([n0, n1]),
    })
}

impl Queue {
    /// Address of `used_event`: behind the available ring.
    fn used_event(&self) -> u64 {
        self.s.driver + 4 + 2 * u64::from(self.s.size)
    }
    /// Address of `avail_event`: behind the used ring.
    fn avail_event(&self) -> u64 {
        self.s.device + 4 + 8 * u64::from(self.s.size)
    }

    /// The ring's indices and wishes in memory, by name.
    pub(super) fn split_words(&self) -> [(&'static str, u64); 6] {
        [
            ("avail_index", self.s.driver + 2),
            ("used_index", self.s.device + 2),
            ("avail_flags", self.s.driver),
            ("used_flags", self.s.device),
            ("used_event", self.used_event()),
            ("avail_event", self.avail_event()),
        ]
    }

    fn avail_index(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        Ok(memory.load_u16(self.s.driver + 2, Ordering::Acquire)?)
    }

    pub(super) fn arm_split(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        let now = self.avail_index(memory)?;
        memory.store_u16(self.avail_event(), now, Ordering::SeqCst)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Chains available now.
    pub(super) fn avail_split(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let next = self.s.next_avail;
        let mut avail = self.avail_index(memory)?;
        if avail == next && self.event_idx {
            // Ask for a notification, then look again: the driver may have added one before it
            // could see the wish.
            memory.store_u16(self.avail_event(), next, Ordering::SeqCst)?;
            fence(Ordering::SeqCst);
            avail = self.avail_index(memory)?;
        }
        let n = avail.wrapping_sub(next);
        if n > self.s.size {
            return Err(QueueError::AvailIndex { avail, next });
        }
        Ok(n)
    }

    pub(super) fn pop_split(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if self.avail_split(memory)? == 0 {
            return Ok(None);
        }
        let slot = u64::from(self.s.next_avail % self.s.size);
        let head = memory.load_u16(self.s.driver + 4 + 2 * slot, Ordering::Relaxed)?;
        let chain = self.walk_split(memory, head)?;
        self.s.next_avail = self.s.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    fn walk_split(&self, memory: &GuestMemory, head: u16) -> Result<Chain, QueueError> {
        let size = u32::from(self.s.size);
        let mut out = Collector::default();
        let mut index = head;
        // LIMIT: a chain visits each descriptor of the table at most once.
        for _ in 0..size {
            let d = read_descriptor(memory, self.s.desc, index, size)?;
            if d.flags & VIRTQ_DESC_F_INDIRECT != 0 {
                // virtio 1.3 §2.6.5.3.1: "A driver MUST NOT set both VIRTQ_DESC_F_INDIRECT and
                // VIRTQ_DESC_F_NEXT in flags."
                if !self.indirect || d.flags & VIRTQ_DESC_F_NEXT != 0 {
                    return Err(QueueError::Indirect);
                }
                walk_indirect(memory, d, &mut out)?;
                return Ok(out.finish(head, 1, self.epoch));
            }
            out.add(memory, d)?;
            if d.flags & VIRTQ_DESC_F_NEXT == 0 {
                return Ok(out.finish(head, 1, self.epoch));
            }
            index = d.tag;
        }
        Err(QueueError::ChainTooLong)
    }

    pub(super) fn push_split(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let slot = u64::from(self.s.next_used % self.s.size);
        let mut b = [0; 8];
        b[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        b[4..].copy_from_slice(&written.to_le_bytes());
        memory.write(self.s.device + 4 + 8 * slot, &b)?;
        self.s.next_used = self.s.next_used.wrapping_add(1);
        // Release: the entry is visible before the index that covers it.
        memory.store_u16(self.s.device + 2, self.s.next_used, Ordering::Release)?;
        Ok(())
    }

    pub(super) fn needs_signal_split(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let new = self.s.next_used;
        let old = self.signalled.replace((new, false));
        if !self.event_idx {
            let flags = memory.load_u16(self.s.driver, Ordering::Acquire)?;
            return Ok(flags & VIRTQ_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = memory.load_u16(self.used_event(), Ordering::Acquire)?;
        // After a restore it is unknown what was signalled: one spurious interrupt is allowed.
        Ok(old.is_none_or(|(old, _)| vring_need_event(event, new, old)))
    }
}

fn walk_indirect(
    memory: &GuestMemory,
    table: Descriptor,
    out: &mut Collector,
) -> Result<(), QueueError> {
    let entries = table.len / 16;
    if !table.len.is_multiple_of(16) || entries == 0 || entries > u32::from(u16::MAX) {
        return Err(QueueError::Indirect);
    }
    if memory
        .ram_offset(table.addr, u64::from(table.len))
        .is_none()
    {
        return Err(QueueError::Indirect);
    }
    let mut index = 0;
    loop {
        let d = read_descriptor(memory, table.addr, index, entries)?;
        // virtio 1.3 §2.6.5.3.1: no table within a table.
        if d.flags & VIRTQ_DESC_F_INDIRECT != 0 {
            return Err(QueueError::Indirect);
        }
        // Counts, so that a loop ends at MAX_CHAIN_DESCRIPTORS.
        out.add(memory, d)?;
        if d.flags & VIRTQ_DESC_F_NEXT == 0 {
            return Ok(());
        }
        index = d.tag;
    }
}
