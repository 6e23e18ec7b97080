//! The admin command set. §5.

use pyrite_disk::scsi::scatter;
use pyrite_mem::GuestMemory;

use super::command::{Command, PAGE, Status};
use super::controller::{Controller, MAX_ASYNC, Verdict};
use super::queue::{Completions, Submission};
use super::{MAX_IO_QUEUES, MAX_QUEUE_ENTRIES, identify};

/// LIMIT: bytes of a log page that are given at once.
const MAX_LOG_BYTES: u64 = 4096;

impl Controller {
    pub(super) fn admin(&mut self, memory: &GuestMemory, c: &Command) -> Verdict {
        match c.opcode() {
            0x00 => self.delete_submission(c),
            0x01 => self.create_submission(c).into(),
            0x02 => self.log_page(memory, c).into(),
            0x04 => self.delete_completion(c).into(),
            0x05 => self.create_completion(c).into(),
            0x06 => self.identify(memory, c).into(),
            0x08 => Verdict::Done(self.abort(memory, c)),
            0x09 => self.set_features(c).into(),
            0x0a => self.get_features(c).into(),
            0x0c if self.async_events.len() >= MAX_ASYNC => Verdict::Fail(Status::ASYNC_LIMIT),
            0x0c => {
                self.async_events.push(c.id());
                Verdict::Open
            }
            _ => Verdict::Fail(Status::INVALID_OPCODE),
        }
    }

    /// Queue identifier, entries and place of a queue to be created.
    fn new_queue(c: &Command, taken: bool) -> Result<(u16, u32, u64), Status> {
        let (id, size) = (c.dword(10) as u16, (c.dword(10) >> 16) + 1);
        if id == 0 || id > MAX_IO_QUEUES || taken {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if !(2..=MAX_QUEUE_ENTRIES).contains(&size) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        // Physically contiguous, as CAP.CQR demands.
        if c.dword(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let base = c.qword(6);
        if !base.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        Ok((id, size, base))
    }

    fn create_completion(&mut self, c: &Command) -> Result<u32, Status> {
        let taken = self.cqs.contains_key(&(c.dword(10) as u16));
        let (id, size, base) = Controller::new_queue(c, taken)?;
        let (vector, interrupts) = ((c.dword(11) >> 16) as u16, c.dword(11) & 2 != 0);
        if vector > MAX_IO_QUEUES {
            return Err(Status::INVALID_VECTOR);
        }
        let q = Completions::new(base, size, vector, interrupts);
        self.cqs.insert(id, q);
        Ok(0)
    }

    fn create_submission(&mut self, c: &Command) -> Result<u32, Status> {
        let taken = self.sqs.contains_key(&(c.dword(10) as u16));
        let (id, size, base) = Controller::new_queue(c, taken)?;
        let cq = (c.dword(11) >> 16) as u16;
        if cq == 0 || !self.cqs.contains_key(&cq) {
            return Err(Status::CQ_INVALID);
        }
        self.sqs.insert(id, Submission::new(base, size, cq));
        Ok(0)
    }

    /// What is in flight comes back first, so that it touches no memory later. §5.6.
    fn delete_submission(&mut self, c: &Command) -> Verdict {
        let id = c.dword(10) as u16;
        match self.sqs.get_mut(&id) {
            Some(q) if id != 0 && q.deleted_by.is_none() => {
                if q.in_flight > 0 {
                    q.deleted_by = Some(c.id());
                    return Verdict::Open;
                }
                self.sqs.remove(&id);
                Verdict::Done(0)
            }
            _ => Verdict::Fail(Status::INVALID_QUEUE_ID),
        }
    }

    fn delete_completion(&mut self, c: &Command) -> Result<u32, Status> {
        let id = c.dword(10) as u16;
        if id == 0 || !self.cqs.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if self.sqs.values().any(|q| q.cq == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.cqs.remove(&id);
        Ok(0)
    }

    /// Only what waits for an event can be aborted; a result of 1 says that nothing was.
    fn abort(&mut self, memory: &GuestMemory, c: &Command) -> u32 {
        let (sq, id) = (c.dword(10) as u16, (c.dword(10) >> 16) as u16);
        let found = self.async_events.iter().position(|e| *e == id);
        let Some(at) = found.filter(|_| sq == 0) else {
            return 1;
        };
        self.async_events.remove(at);
        if let Some(q) = self.sqs.get_mut(&0) {
            q.in_flight += 1;
        }
        self.answer(memory, 0, id, 0, Status::ABORT_REQUESTED);
        0
    }

    fn give(memory: &GuestMemory, c: &Command, data: &[u8]) -> Result<u32, Status> {
        let bufs = c.buffers(memory, data.len() as u64)?;
        scatter(memory, &bufs, data).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        Ok(0)
    }

    /// Identify. §5.15.
    fn identify(&mut self, memory: &GuestMemory, c: &Command) -> Result<u32, Status> {
        let count = self.namespaces.len() as u32;
        let data = match c.dword(10) as u8 {
            0x00 if c.namespace() == u32::MAX => identify::namespace_common(),
            0x00 => match self.namespace(c.namespace()) {
                Ok(n) => identify::namespace(&n.info(), &self.names, c.namespace()),
                // One that could be there but is not is shown as zeroes.
                Err(e) if c.namespace() == 0 || c.namespace() as usize > super::MAX_NAMESPACES => {
                    return Err(e);
                }
                Err(_) => vec![0; identify::BYTES],
            },
            0x01 => identify::controller(&self.names, count),
            0x02 => {
                if c.namespace() >= 0xffff_fffe {
                    return Err(Status::INVALID_NAMESPACE);
                }
                let mut list: Vec<u8> = (c.namespace() + 1..=count)
                    .take(identify::BYTES / 4)
                    .flat_map(u32::to_le_bytes)
                    .collect();
                list.resize(identify::BYTES, 0);
                list
            }
            0x03 => {
                self.namespace(c.namespace())?;
                identify::descriptors(&self.names, c.namespace())
            }
            _ => return Err(Status::INVALID_FIELD),
        };
        Controller::give(memory, c, &data)
    }

    /// Get Log Page. §5.14.
    fn log_page(&mut self, memory: &GuestMemory, c: &Command) -> Result<u32, Status> {
        let dwords = u64::from(c.dword(10) >> 16) | u64::from(c.dword(11) & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = c.qword(12);
        let page = match c.dword(10) as u8 {
            0x01 => vec![0; 64], // error information: one entry, never used
            0x02 => identify::smart_log(&self.counters),
            0x03 => identify::firmware_log(&self.names),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        if offset & 3 != 0 || offset > page.len() as u64 || len > MAX_LOG_BYTES {
            return Err(Status::INVALID_FIELD);
        }
        let mut data = page[offset as usize..].to_vec();
        data.resize(len as usize, 0);
        Controller::give(memory, c, &data)
    }

    /// What a feature has now or by default; §5.21.1.
    fn feature(&self, id: u8, default: bool) -> Option<u32> {
        Some(match id {
            0x06 => u32::from(default || self.features.write_cache),
            0x07 => u32::from(MAX_IO_QUEUES - 1) << 16 | u32::from(MAX_IO_QUEUES - 1),
            0x01 | 0x02 | 0x05 | 0x08 | 0x0a | 0x0b | 0x04 => {
                let now = if default {
                    None
                } else {
                    self.features.plain.get(&id)
                };
                now.copied().unwrap_or(if id == 4 { 0x0157 } else { 0 })
            }
            // Interrupt vector configuration: no coalescing.
            0x09 => 1 << 16,
            _ => return None,
        })
    }

    fn set_features(&mut self, c: &Command) -> Result<u32, Status> {
        let (id, value) = (c.dword(10) as u8, c.dword(11));
        if c.dword(10) >> 31 != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        match id {
            0x06 => self.features.write_cache = value & 1 != 0,
            // As many as asked for; told are those that there are. 65535 is not allowed.
            0x07 if value & 0xffff == 0xffff || value >> 16 == 0xffff => {
                return Err(Status::INVALID_FIELD);
            }
            0x07 => {
                let have = u32::from(MAX_IO_QUEUES - 1);
                return Ok((value & 0xffff).min(have) | (value >> 16).min(have) << 16);
            }
            0x09 => {}
            // Another power state than 0 there is not.
            0x02 if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            id => {
                self.feature(id, false).ok_or(Status::INVALID_FIELD)?;
                self.features.plain.insert(id, value);
            }
        }
        Ok(0)
    }

    fn get_features(&mut self, c: &Command) -> Result<u32, Status> {
        let id = c.dword(10) as u8;
        let value = self.feature(id, true).ok_or(Status::INVALID_FIELD)?;
        match c.dword(10) >> 8 & 7 {
            0 => self.feature(id, false).ok_or(Status::INVALID_FIELD),
            1 => Ok(value),
            2 => Ok(value),
            // Supported capabilities: changeable, for the whole controller.
            3 => Ok(4),
            _ => Err(Status::INVALID_FIELD),
        }
    }
}
