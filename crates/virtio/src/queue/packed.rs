//! The packed ring. virtio 1.3 §2.8.

use std::sync::atomic::{Ordering, fence};

use pyrite_mem::GuestMemory;

use super::{
    Chain, Collector, Descriptor, Queue, QueueError, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE, vring_need_event,
};

/// virtio 1.3 §2.8.1: wrap-counter bits of a descriptor's flags.
const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
const VIRTQ_DESC_F_USED: u16 = 1 << 15;

/// virtio 1.3 §2.8.10: event suppression flags.
const RING_EVENT_FLAGS_ENABLE: u16 = 0;
const RING_EVENT_FLAGS_DISABLE: u16 = 1;
const RING_EVENT_FLAGS_DESC: u16 = 2;

fn parse(b: [u8; 16]) -> Descriptor {
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
        i0,
        i1,
        f0,
        f1,
    ] = b;
    Descriptor {
        addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        len: u32::from_le_bytes([l0, l1, l2, l3]),
        flags: u16::from_le_bytes([f0, f1]),
        tag: u16::from_le_bytes([i0, i1]),
    }
}

impl Queue {
    fn slot(&self, index: u16) -> u64 {
        self.s.desc + 16 * u64::from(index)
    }

    /// Steps a ring position.
    fn step(&self, (at, wrap): (u16, bool), by: u16) -> (u16, bool) {
        let n = u32::from(at) + u32::from(by);
        let size = u32::from(self.s.size);
        if n >= size {
            ((n - size) as u16, !wrap)
        } else {
            (n as u16, wrap)
        }
    }

    fn is_avail(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let flags = memory.load_u16(self.slot(self.s.next_avail) + 14, Ordering::Acquire)?;
        let avail = flags & VIRTQ_DESC_F_AVAIL != 0;
        let used = flags & VIRTQ_DESC_F_USED != 0;
        Ok(avail != used && avail == self.s.avail_wrap)
    }

    pub(super) fn has_avail_packed(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if self.is_avail(memory)? {
            return Ok(true);
        }
        if !self.event_idx {
            return Ok(false);
        }
        let off_wrap = self.s.next_avail | u16::from(self.s.avail_wrap) << 15;
        memory.store_u16(self.s.device, off_wrap, Ordering::Relaxed)?;
        memory.store_u16(self.s.device + 2, RING_EVENT_FLAGS_DESC, Ordering::SeqCst)?;
        fence(Ordering::SeqCst);
        self.is_avail(memory)
    }

    pub(super) fn enable_notifications_packed(
        &self,
        memory: &GuestMemory,
    ) -> Result<(), QueueError> {
        memory.store_u16(self.s.device + 2, RING_EVENT_FLAGS_ENABLE, Ordering::SeqCst)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn pop_packed(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if !self.has_avail_packed(memory)? {
            return Ok(None);
        }
        let mut out = Collector::default();
        let mut at = (self.s.next_avail, self.s.avail_wrap);
        // LIMIT: a chain takes each slot of the ring at most once.
        for slots in 1..=self.s.size {
            let mut b = [0; 16];
            memory.read(self.slot(at.0), &mut b)?;
            let d = parse(b);
            at = self.step(at, 1);
            let last = if d.flags & VIRTQ_DESC_F_INDIRECT != 0 {
                // virtio 1.3 §2.8.7: an indirect descriptor is a chain of its own.
                if !self.indirect || d.flags & VIRTQ_DESC_F_NEXT != 0 || slots != 1 {
                    return Err(QueueError::Indirect);
                }
                walk_indirect(memory, d, &mut out)?;
                true
            } else {
                out.add(memory, d)?;
                d.flags & VIRTQ_DESC_F_NEXT == 0
            };
            if last {
                // The id is in the last descriptor of a chain (§2.8.6).
                let chain = out.finish(d.tag, slots, self.epoch);
                (self.s.next_avail, self.s.avail_wrap) = at;
                return Ok(Some(chain));
            }
        }
        Err(QueueError::ChainTooLong)
    }

    pub(super) fn unpop_packed(&mut self, slots: u16) {
        let (at, size) = (self.s.next_avail, self.s.size);
        if let Some(n) = at.checked_sub(slots) {
            self.s.next_avail = n;
        } else {
            self.s.next_avail = (u32::from(at) + u32::from(size) - u32::from(slots)) as u16;
            self.s.avail_wrap = !self.s.avail_wrap;
        }
    }

    pub(super) fn push_packed(
        &mut self,
        memory: &GuestMemory,
        id: u16,
        slots: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let at = self.slot(self.s.next_used);
        let mut b = [0; 6];
        b[..4].copy_from_slice(&written.to_le_bytes());
        b[4..].copy_from_slice(&id.to_le_bytes());
        memory.write(at + 8, &b)?;
        let mut flags = if written != 0 { VIRTQ_DESC_F_WRITE } else { 0 };
        if self.s.used_wrap {
            flags |= VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;
        }
        // Release: length and id are visible before the flags that make them valid.
        memory.store_u16(at + 14, flags, Ordering::Release)?;
        (self.s.next_used, self.s.used_wrap) =
            self.step((self.s.next_used, self.s.used_wrap), slots);
        Ok(())
    }

    pub(super) fn needs_signal_packed(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let new = (self.s.next_used, self.s.used_wrap);
        let old = self.signalled.replace(new);
        let flags = memory.load_u16(self.s.driver + 2, Ordering::Acquire)?;
        let off_wrap = memory.load_u16(self.s.driver, Ordering::Acquire)?;
        match flags & 3 {
            RING_EVENT_FLAGS_DISABLE => Ok(false),
            RING_EVENT_FLAGS_DESC if self.event_idx => {
                let Some(old) = old else { return Ok(true) };
                // Positions count as if the other lap lay one ring below (§2.8.10 and the
                // reference code in §2.8.21.3).
                let size = self.s.size;
                let lap = |(at, wrap): (u16, bool)| {
                    if wrap == new.1 {
                        at
                    } else {
                        at.wrapping_sub(size)
                    }
                };
                let event = (off_wrap & 0x7fff, off_wrap >> 15 != 0);
                Ok(vring_need_event(lap(event), new.0, lap(old)))
            }
            _ => Ok(true),
        }
    }
}

/// virtio 1.3 §2.8.7: the entries of an indirect table follow each other, NEXT is reserved.
fn walk_indirect(
    memory: &GuestMemory,
    table: Descriptor,
    out: &mut Collector,
) -> Result<(), QueueError> {
    if !table.len.is_multiple_of(16)
        || table.len == 0
        || memory
            .ram_offset(table.addr, u64::from(table.len))
            .is_none()
    {
        return Err(QueueError::Indirect);
    }
    for n in 0..u64::from(table.len / 16) {
        let mut b = [0; 16];
        memory.read(table.addr + 16 * n, &mut b)?;
        let d = parse(b);
        if d.flags & VIRTQ_DESC_F_INDIRECT != 0 {
            return Err(QueueError::Indirect);
        }
        out.add(memory, d)?;
    }
    Ok(())
}
