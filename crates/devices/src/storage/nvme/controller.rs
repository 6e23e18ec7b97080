//! Registers, doorbells, and the way of a command. §3.1 and §7.

use std::collections::BTreeMap;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_disk::{BlockBackend, BlockRequest, DiskError};
use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;
use pyrite_vdev::{Dma, PciInterrupts};

use super::command::{Command, PAGE, Status};
use super::queue::{Completion, Completions, Submission};
use super::{Job, MAX_IO_QUEUES, MAX_NAMESPACES, MAX_QUEUE_ENTRIES, NvmeNames, Started};

/// CAP, §3.1.1: 1024 entries, contiguous queues, 10 s until ready, NVM command set, 4 KiB pages.
const CAP: u64 = 1 << 37 | 20 << 24 | 1 << 16 | (MAX_QUEUE_ENTRIES as u64 - 1);
/// VS: 1.4.
const VS: u32 = 0x0001_0400;
/// CC, §3.1.5.
const CC_EN: u32 = 1 << 0;
/// Command set, page size, arbitration: all must be 0.
const CC_UNSUPPORTED: u32 = 7 << 4 | 0xf << 7 | 7 << 11;
const CC_SHN: u32 = 3 << 14;
const CC_WRITABLE: u32 = 0x00ff_fff1;
/// CSTS, §3.1.6.
const CSTS_RDY: u32 = 1 << 0;
const CSTS_CFS: u32 = 1 << 1;
const CSTS_SHUTTING_DOWN: u32 = 1 << 2;
const CSTS_SHUT_DOWN: u32 = 2 << 2;
const DOORBELLS_AT: u64 = 0x1000;
/// LIMIT: Asynchronous Event Requests that are outstanding (AERL + 1).
pub(super) const MAX_ASYNC: usize = 4;

/// Registers that the host writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    cc: u32,
    #[n(1)]
    csts: u32,
    #[n(2)]
    aqa: u32,
    #[n(3)]
    asq: u64,
    #[n(4)]
    acq: u64,
    /// Interrupt mask, for INTx.
    #[n(5)]
    mask: u32,
}

/// Features that the host sets. §5.21.1.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Features {
    #[n(0)]
    pub write_cache: bool,
    /// Those that have no effect: value by feature identifier.
    #[n(1)]
    pub plain: BTreeMap<u8, u32>,
}

impl Default for Features {
    fn default() -> Features {
        Features {
            write_cache: true,
            plain: BTreeMap::from([(0x04, 0x0157)]),
        }
    }
}

/// State of a controller.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct ControllerSaved {
    #[n(0)]
    registers: Registers,
    #[n(1)]
    sqs: BTreeMap<u16, Submission>,
    #[n(2)]
    cqs: BTreeMap<u16, Completions>,
    #[n(3)]
    features: Features,
    #[n(4)]
    async_events: Vec<u16>,
    /// Bytes of each namespace.
    #[n(5)]
    sizes: Vec<u64>,
    #[n(6)]
    counters: Counters,
}

/// For the SMART log. §5.14.1.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Counters {
    #[n(0)]
    pub reads: u64,
    #[n(1)]
    pub writes: u64,
    /// Units of 512 bytes.
    #[n(2)]
    pub blocks_read: u64,
    #[n(3)]
    pub blocks_written: u64,
    #[n(4)]
    pub media_errors: u64,
}

pub(super) struct Controller {
    pub(super) names: NvmeNames,
    pub(super) namespaces: Vec<Arc<dyn BlockBackend>>,
    interrupts: PciInterrupts,
    r: Registers,
    pub(super) sqs: BTreeMap<u16, Submission>,
    pub(super) cqs: BTreeMap<u16, Completions>,
    pub(super) features: Features,
    /// Command identifiers of Asynchronous Event Requests, which never complete by themselves.
    pub(super) async_events: Vec<u16>,
    pub(super) counters: Counters,
    /// The submission queue that was served last.
    turn: u16,
    /// Commands and flushes in flight of this life.
    live: u32,
    /// Those of earlier lives: their outcome goes nowhere.
    stale: u32,
    life: u64,
    /// Namespaces to flush before the shutdown is over.
    to_flush: usize,
    flushing: u32,
    /// Between start and pause.
    pub(super) running: bool,
    /// A thread is handing commands out.
    pub(super) pumping: bool,
}

/// What a command comes to.
pub(super) enum Verdict {
    /// Done, with this result in doubleword 0.
    Done(u32),
    Fail(Status),
    /// It stays open.
    Open,
    /// A back end works on it.
    Work {
        backend: Arc<dyn BlockBackend>,
        requests: Vec<BlockRequest>,
        write: bool,
    },
}

impl From<Result<u32, Status>> for Verdict {
    fn from(r: Result<u32, Status>) -> Verdict {
        r.map_or_else(Verdict::Fail, Verdict::Done)
    }
}

impl Controller {
    pub(super) fn new(
        names: NvmeNames,
        mut namespaces: Vec<Arc<dyn BlockBackend>>,
        interrupts: PciInterrupts,
    ) -> Controller {
        namespaces.truncate(MAX_NAMESPACES);
        Controller {
            names,
            namespaces,
            interrupts,
            r: Registers::default(),
            sqs: BTreeMap::new(),
            cqs: BTreeMap::new(),
            features: Features::default(),
            async_events: Vec::new(),
            counters: Counters::default(),
            turn: 0,
            live: 0,
            stale: 0,
            life: 0,
            to_flush: 0,
            flushing: 0,
            running: false,
            pumping: false,
        }
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.live + self.stale
    }

    /// Queues and commands come to nothing. §7.3.2.
    fn controller_reset(&mut self) {
        self.life += 1;
        self.stale += std::mem::take(&mut self.live);
        self.sqs.clear();
        self.cqs.clear();
        self.features = Features::default();
        self.async_events.clear();
        (self.to_flush, self.flushing) = (0, 0);
        self.r.csts = 0;
        self.update_line();
    }

    pub(super) fn power_on(&mut self) {
        self.controller_reset();
        self.r = Registers::default();
        self.counters = Counters::default();
        self.turn = 0;
    }

    fn ready(&self) -> bool {
        self.r.csts & CSTS_RDY != 0
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let r = &self.r;
        match offset {
            0x00 => CAP as u32,
            0x04 => (CAP >> 32) as u32,
            0x08 => VS,
            0x0c | 0x10 => r.mask,
            0x14 => r.cc,
            // Disabled, but not at rest yet.
            0x1c if r.cc & CC_EN == 0 && self.stale > 0 => r.csts | CSTS_RDY,
            0x1c => r.csts,
            0x24 => r.aqa,
            0x28 => r.asq as u32,
            0x2c => (r.asq >> 32) as u32,
            0x30 => r.acq as u32,
            0x34 => (r.acq >> 32) as u32,
            _ => 0,
        }
    }

    /// `mask` has the bytes that are written.
    pub(super) fn write(&mut self, dma: &Dma, offset: u64, value: u32, mask: u32) {
        let merge = |old: u32| old & !mask | value & mask;
        let low = |old: u64| old & !0xffff_ffff | u64::from(merge(old as u32) & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(merge((old >> 32) as u32)) << 32;
        let enabled = self.r.cc & CC_EN != 0;
        let r = &mut self.r;
        match offset {
            0x0c => r.mask |= value & mask,
            0x10 => r.mask &= !(value & mask),
            0x14 => {
                let new = merge(r.cc) & CC_WRITABLE;
                self.write_cc(new);
            }
            // Only while it is disabled. §3.1.8.
            0x24 if !enabled => r.aqa = merge(r.aqa) & 0x0fff_0fff,
            0x28 if !enabled => r.asq = low(r.asq),
            0x2c if !enabled => r.asq = high(r.asq),
            0x30 if !enabled => r.acq = low(r.acq),
            0x34 if !enabled => r.acq = high(r.acq),
            at if at >= DOORBELLS_AT && mask == u32::MAX => {
                let n = (at - DOORBELLS_AT) / 4;
                self.doorbell(dma, (n / 2) as u16, n & 1 != 0, value);
            }
            _ => {}
        }
        self.update_line();
    }

    fn write_cc(&mut self, new: u32) {
        let old = std::mem::replace(&mut self.r.cc, new);
        if old & CC_EN != 0 && new & CC_EN == 0 {
            self.controller_reset();
        }
        if old & CC_SHN == 0 && new & CC_SHN != 0 && new & CC_EN != 0 {
            self.r.csts |= CSTS_SHUTTING_DOWN;
            self.to_flush = self.namespaces.len();
        } else if old & CC_SHN != 0
            && new & CC_SHN == 0
            && self.to_flush + self.flushing as usize == 0
        {
            self.r.csts &= !(CSTS_SHUTTING_DOWN | CSTS_SHUT_DOWN);
        }
        self.settle();
    }

    /// Becomes ready when it was enabled and the last command of an earlier life has come back.
    fn settle(&mut self) {
        if self.r.cc & CC_EN == 0 || self.stale > 0 || self.r.csts & (CSTS_RDY | CSTS_CFS) != 0 {
            return;
        }
        let (sq_size, cq_size) = ((self.r.aqa & 0xfff) + 1, (self.r.aqa >> 16) + 1);
        let fine = |n: u32| (2..=4096).contains(&n);
        if self.r.cc & CC_UNSUPPORTED != 0 || !fine(sq_size) || !fine(cq_size) {
            tracing::debug!(
                "NVMe: enabled with CC {:#x}, AQA {:#x}",
                self.r.cc,
                self.r.aqa
            );
            self.r.csts |= CSTS_CFS;
            return;
        }
        self.sqs.insert(0, Submission::new(self.r.asq, sq_size, 0));
        self.cqs
            .insert(0, Completions::new(self.r.acq, cq_size, 0, true));
        self.r.csts |= CSTS_RDY;
    }

    fn doorbell(&mut self, dma: &Dma, queue: u16, completion: bool, value: u32) {
        // §3.1.24: a value that the queue does not have, or a queue that is not there, is an
        // error of the host, and has no effect.
        if completion {
            let Some(q) = self.cqs.get_mut(&queue).filter(|q| value < q.size) else {
                return;
            };
            q.head = value;
            if let Ok(memory) = dma.memory() {
                self.post_held(memory, queue);
                self.delete_idle(memory);
            }
        } else if let Some(q) = self.sqs.get_mut(&queue).filter(|q| value < q.size) {
            q.tail = value;
        }
    }

    /// INTx is asserted while a completion queue has something for the host. §7.5.1.1.
    fn update_line(&self) {
        let wants = |q: &Completions| {
            let masked = self.r.mask >> (q.vector & 31) & 1 != 0;
            q.interrupts && !q.is_empty() && !masked
        };
        self.interrupts.set_intx(self.cqs.values().any(wants));
    }

    /// Fatal: the controller must be reset.
    fn fatal(&mut self, why: &str) {
        tracing::debug!("NVMe: {why}");
        self.r.csts |= CSTS_CFS;
    }

    fn post(&mut self, memory: &GuestMemory, c: Completion) {
        let Some(cq) = self.sqs.get(&c.sq).map(|q| q.cq) else {
            return;
        };
        if let Some(q) = self.cqs.get_mut(&cq) {
            q.held.push_back(c);
        }
        self.post_held(memory, cq);
    }

    /// Writes completions as far as there is room.
    fn post_held(&mut self, memory: &GuestMemory, cq: u16) {
        let Some(q) = self.cqs.get_mut(&cq) else {
            return;
        };
        let mut posted = false;
        let mut failed = false;
        while !q.is_full() {
            let Some(c) = q.held.pop_front() else { break };
            let Some(sq) = self.sqs.get_mut(&c.sq) else {
                continue;
            };
            sq.in_flight = sq.in_flight.saturating_sub(1);
            failed = q.push(memory, &c, sq.head).is_err();
            if failed {
                break;
            }
            posted = true;
        }
        let vector = (posted && q.interrupts).then_some(q.vector);
        if failed {
            self.fatal("a completion queue is not RAM");
        }
        self.update_line();
        if let Some(v) = vector {
            self.interrupts.signal(v);
        }
    }

    /// The next thing for a back end. Commands without are done on the way.
    pub(super) fn next(&mut self, dma: &Dma) -> Option<Job> {
        if !self.running {
            return None;
        }
        if self.to_flush > 0 {
            self.to_flush -= 1;
            self.flushing += 1;
            self.live += 1;
            let backend = self.namespaces.get(self.to_flush).cloned();
            return Some(Job {
                backend,
                requests: vec![BlockRequest::Flush],
                started: Started::Shutdown { life: self.life },
            });
        }
        let memory = Arc::clone(dma.memory().ok()?);
        // LIMIT: commands without work are answered for a while only; the next doorbell goes on.
        for _ in 0..4 * MAX_QUEUE_ENTRIES {
            if !self.ready() || self.r.csts & CSTS_CFS != 0 {
                return None;
            }
            let (sq, command) = self.pop(&memory)?;
            let command = Command(command);
            let id = command.id();
            let verdict = if !command.plain() {
                Verdict::Fail(Status::INVALID_FIELD)
            } else if sq == 0 {
                self.admin(&memory, &command)
            } else {
                self.nvm(&memory, &command)
            };
            let (result, status) = match verdict {
                Verdict::Done(result) => (result, Status::SUCCESS),
                Verdict::Fail(status) => (0, status),
                Verdict::Open => {
                    if let Some(q) = self.sqs.get_mut(&sq) {
                        q.in_flight = q.in_flight.saturating_sub(1);
                    }
                    continue;
                }
                Verdict::Work {
                    backend,
                    requests,
                    write,
                } => {
                    self.live += 1;
                    return Some(Job {
                        backend: Some(backend),
                        requests,
                        started: Started::Command {
                            life: self.life,
                            sq,
                            id,
                            write,
                        },
                    });
                }
            };
            self.answer(&memory, sq, id, result, status);
        }
        None
    }

    pub(super) fn answer(
        &mut self,
        memory: &GuestMemory,
        sq: u16,
        id: u16,
        result: u32,
        status: Status,
    ) {
        let c = Completion {
            result,
            sq,
            id,
            status: status.0,
        };
        self.post(memory, c);
    }

    /// Takes a command, queues in turn.
    fn pop(&mut self, memory: &GuestMemory) -> Option<(u16, [u8; 64])> {
        let after = self.turn.saturating_add(1);
        let order: Vec<u16> = self
            .sqs
            .range(after..)
            .chain(self.sqs.range(..after))
            .filter(|(_, q)| q.head != q.tail)
            .map(|(id, _)| *id)
            .collect();
        for id in order {
            let Some(q) = self.sqs.get_mut(&id) else {
                continue;
            };
            match q.pop(memory) {
                Ok(Some(command)) => {
                    self.turn = id;
                    return Some((id, command));
                }
                Ok(None) => {}
                Err(_) => self.fatal("a submission queue is not RAM"),
            }
        }
        None
    }

    pub(super) fn complete(
        &mut self,
        memory: &GuestMemory,
        started: Started,
        error: Option<&DiskError>,
    ) {
        let life = match started {
            Started::Command { life, .. } | Started::Shutdown { life } => life,
        };
        if life != self.life {
            self.stale = self.stale.saturating_sub(1);
            return self.settle();
        }
        self.live = self.live.saturating_sub(1);
        match started {
            Started::Shutdown { .. } => {
                self.flushing = self.flushing.saturating_sub(1);
                if self.to_flush == 0 && self.flushing == 0 {
                    self.r.csts &= !CSTS_SHUTTING_DOWN;
                    self.r.csts |= CSTS_SHUT_DOWN;
                }
            }
            Started::Command { sq, id, write, .. } => {
                let status = error.map_or(Status::SUCCESS, |e| {
                    if let DiskError::Io(_) = e {
                        self.counters.media_errors += 1;
                    }
                    Status::of(e, write)
                });
                self.answer(memory, sq, id, 0, status);
                self.delete_idle(memory);
            }
        }
    }

    /// Deletes the queues that waited for their last command.
    fn delete_idle(&mut self, memory: &GuestMemory) {
        let idle = |(id, q): (&u16, &Submission)| {
            let by = q.deleted_by.filter(|_| q.in_flight == 0)?;
            Some((*id, by))
        };
        while let Some((queue, command)) = self.sqs.iter().find_map(idle) {
            self.sqs.remove(&queue);
            // It was taken off the count while it stayed open.
            if let Some(admin) = self.sqs.get_mut(&0) {
                admin.in_flight += 1;
            }
            self.answer(memory, 0, command, 0, Status::SUCCESS);
        }
    }

    pub(super) fn namespace(&self, id: u32) -> Result<&Arc<dyn BlockBackend>, Status> {
        let n = (id as usize).checked_sub(1);
        n.and_then(|n| self.namespaces.get(n))
            .ok_or(Status::INVALID_NAMESPACE)
    }

    /// A command of the NVM command set. §6.
    fn nvm(&mut self, memory: &GuestMemory, c: &Command) -> Verdict {
        match self.nvm_work(memory, c) {
            Ok(verdict) => verdict,
            Err(status) => Verdict::Fail(status),
        }
    }

    fn nvm_work(&mut self, memory: &GuestMemory, c: &Command) -> Result<Verdict, Status> {
        const ALL: u32 = u32::MAX;
        if c.opcode() == 0x00 && c.namespace() == ALL && self.namespaces.len() == 1 {
            return self.flush(1);
        }
        let backend = Arc::clone(self.namespace(c.namespace())?);
        let info = backend.info();
        let block = u64::from(info.block_bytes.max(1));
        let blocks = info.size_bytes / block;
        let lba = c.qword(10);
        let count = u64::from(c.dword(12) & 0xffff) + 1;
        let inside = |lba: u64, count: u64| {
            lba.checked_add(count)
                .filter(|end| *end <= blocks)
                .map(|_| (lba * block, count * block))
                .ok_or(Status::LBA_OUT_OF_RANGE)
        };
        let (requests, write) = match c.opcode() {
            0x00 => return self.flush(c.namespace()),
            // Write and Read.
            opcode @ (0x01 | 0x02) => {
                let write = opcode == 0x01;
                if write && info.read_only {
                    return Err(Status::WRITE_PROTECTED);
                }
                // MDTS first: a driver that goes over it is told so, wherever it writes.
                let bufs = c.buffers(memory, count * block)?;
                let (offset, len) = inside(lba, count)?;
                let counters = &mut self.counters;
                let request = if write {
                    counters.writes += 1;
                    counters.blocks_written += len / 512;
                    let fua = c.dword(12) >> 30 & 1 != 0 || !self.features.write_cache;
                    BlockRequest::Write { offset, bufs, fua }
                } else {
                    counters.reads += 1;
                    counters.blocks_read += len / 512;
                    BlockRequest::Read { offset, bufs }
                };
                (vec![request], write)
            }
            // Write Zeroes; DEAC lets space go.
            0x08 => {
                if info.read_only {
                    return Err(Status::WRITE_PROTECTED);
                }
                let (offset, len) = inside(lba, count)?;
                let may_unmap = c.dword(12) >> 25 & 1 != 0;
                let request = BlockRequest::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                };
                (vec![request], true)
            }
            // Dataset Management. §6.7.
            0x09 => {
                let ranges = u64::from(c.dword(10) & 0xff) + 1;
                let bufs = c.buffers(memory, ranges * 16)?;
                let mut list = vec![0; ranges as usize * 16];
                pyrite_disk::scsi::gather(memory, &bufs, &mut list)
                    .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                let mut requests = Vec::new();
                let deallocate = c.dword(11) & 4 != 0;
                for r in list.as_chunks::<16>().0 {
                    let v = u128::from_le_bytes(*r);
                    let (offset, len) = inside((v >> 64) as u64, (v >> 32) as u64 & 0xffff_ffff)?;
                    if len > 0 && deallocate {
                        requests.push(BlockRequest::Discard { offset, len });
                    }
                }
                if deallocate && info.read_only {
                    return Err(Status::WRITE_PROTECTED);
                }
                (requests, true)
            }
            _ => return Err(Status::INVALID_OPCODE),
        };
        Ok(Verdict::Work {
            backend,
            requests,
            write,
        })
    }

    fn flush(&self, namespace: u32) -> Result<Verdict, Status> {
        Ok(Verdict::Work {
            backend: Arc::clone(self.namespace(namespace)?),
            requests: vec![BlockRequest::Flush],
            write: true,
        })
    }

    pub(super) fn save(&self) -> ControllerSaved {
        let Controller {
            names: _,
            namespaces,
            interrupts: _,
            r,
            sqs,
            cqs,
            features,
            async_events,
            counters,
            turn: _,
            live: _,
            stale: _,
            life: _,
            to_flush: _,
            flushing: _,
            running: _,
            pumping: _,
        } = self;
        ControllerSaved {
            registers: r.clone(),
            sqs: sqs.clone(),
            cqs: cqs.clone(),
            features: features.clone(),
            async_events: async_events.clone(),
            sizes: namespaces.iter().map(|n| n.info().size_bytes).collect(),
            counters: *counters,
        }
    }

    pub(super) fn restore(&mut self, saved: ControllerSaved) -> Result<(), String> {
        let ControllerSaved {
            registers,
            sqs,
            cqs,
            features,
            async_events,
            sizes,
            counters,
        } = saved;
        let now: Vec<u64> = self
            .namespaces
            .iter()
            .map(|n| n.info().size_bytes)
            .collect();
        if sizes != now {
            return Err(format!("namespaces had {sizes:?} bytes, now have {now:?}"));
        }
        let size = |n: u32| (2..=4096).contains(&n);
        let sound_sq = |(id, q): (&u16, &Submission)| {
            let inside = q.head < q.size && q.tail < q.size && q.in_flight <= q.size;
            *id <= MAX_IO_QUEUES && size(q.size) && inside && cqs.contains_key(&q.cq)
        };
        let sound_cq = |(id, q): (&u16, &Completions)| {
            let inside = q.head < q.size && q.tail < q.size && q.vector <= MAX_IO_QUEUES;
            let held = q.held.len() <= usize::from(MAX_IO_QUEUES + 1) * 4096;
            *id <= MAX_IO_QUEUES && size(q.size) && inside && held
        };
        let sound = sqs.iter().all(sound_sq)
            && cqs.iter().all(sound_cq)
            && async_events.len() <= MAX_ASYNC
            && features.plain.len() <= 16
            && (registers.csts & CSTS_RDY == 0 || sqs.contains_key(&0));
        if !sound {
            return Err("impossible queues or features".into());
        }
        self.controller_reset();
        // Saved while it was shutting down: what was not flushed then is flushed now.
        if registers.csts & CSTS_SHUTTING_DOWN != 0 && registers.csts & CSTS_SHUT_DOWN == 0 {
            self.to_flush = self.namespaces.len();
        }
        self.r = registers;
        self.r.cc &= CC_WRITABLE;
        self.r.asq &= !(PAGE - 1);
        self.r.acq &= !(PAGE - 1);
        (self.sqs, self.cqs) = (sqs, cqs);
        self.features = features;
        self.async_events = async_events;
        self.counters = counters;
        self.update_line();
        Ok(())
    }

    pub(super) fn inspect(&self) -> Inspect {
        let queues = self.sqs.iter().map(|(id, q)| {
            let node = Inspect::node([
                ("entries", Inspect::Uint(q.size.into())),
                ("head", Inspect::Uint(q.head.into())),
                ("tail", Inspect::Uint(q.tail.into())),
                ("in_flight", Inspect::Uint(q.in_flight.into())),
                ("completions_in", Inspect::Uint(q.cq.into())),
            ]);
            (id.to_string(), node)
        });
        Inspect::node([
            ("cc", Inspect::Hex(self.r.cc.into())),
            ("csts", Inspect::Hex(self.r.csts.into())),
            ("namespaces", Inspect::Uint(self.namespaces.len() as u64)),
            ("reads", Inspect::Uint(self.counters.reads)),
            ("writes", Inspect::Uint(self.counters.writes)),
            ("media_errors", Inspect::Uint(self.counters.media_errors)),
            ("queues", Inspect::Node(queues.collect())),
        ])
    }
}
