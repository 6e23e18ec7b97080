//! One channel: the task files of its two drives, the protocol of the command in progress, and
//! its bus master.

use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_disk::IoBuf;
use pyrite_disk::scsi::{CD_SECTOR_BYTES, Direction, Outcome, Plan, Sense, with_parameters};
use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;
use pyrite_vdev::{Dma, IrqLine};

use super::BUFFER_BYTES;
use super::data::{Data, DmaWait, PacketWait, Phase, Span};
use crate::storage::ata::{
    Device, DeviceSaved, PACKET_BYTES, Pending, Protocol, Registers, TaskFile, status,
};

/// Device control register. ATA/ATAPI-6 §7.8.
const NIEN: u8 = 1 << 1;
const SRST: u8 = 1 << 2;
const HOB: u8 = 1 << 7;
/// Device register: drive 1.
const DEV: u8 = 1 << 4;
/// Interrupt reason of a packet command. §8.23.
const REASON_CD: u16 = 1;
const REASON_IO: u16 = 2;

/// Bus master command: start, and the direction (to memory). BMIDE §2.1.
const BM_START: u8 = 1 << 0;
const BM_COMMAND_WRITABLE: u8 = BM_START | 1 << 3;
/// Bus master status. BMIDE §2.2.
const BM_ACTIVE: u8 = 1 << 0;
const BM_ERROR: u8 = 1 << 1;
const BM_INTERRUPT: u8 = 1 << 2;
const BM_STATUS_WRITABLE: u8 = 3 << 5;
/// LIMIT: entries of a PRD table, which is at most 64 KiB long. BMIDE §1.2.
const MAX_PRDS: u64 = 8192;
const PRD_END: u32 = 1 << 31;

/// The registers of one drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct DriveRegisters {
    /// What was written, and what the drive has put there.
    #[n(0)]
    task: TaskFile,
    #[n(1)]
    status: u8,
    #[n(2)]
    error: u8,
}

struct Drive {
    device: Option<Device>,
    r: DriveRegisters,
}

impl Drive {
    fn show(&mut self, r: &Registers) {
        self.r.status = r.status;
        self.r.error = r.error;
        self.r.task.count = r.count;
        self.r.task.lba = r.lba;
        self.r.task.device = r.device;
    }

    fn show_signature(&mut self) {
        if let Some(s) = self.device.as_ref().map(Device::signature) {
            self.show(&s);
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct DriveSaved {
    #[n(0)]
    registers: DriveRegisters,
    #[n(1)]
    device: Option<DeviceSaved>,
}

/// State of a channel.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct ChannelSaved {
    #[n(0)]
    drives: Vec<DriveSaved>,
    #[n(1)]
    select: u8,
    #[n(2)]
    control: u8,
    #[n(3)]
    irq: bool,
    #[n(4)]
    phase: Phase,
    #[n(5)]
    bm_command: u8,
    #[n(6)]
    bm_status: u8,
    #[n(7)]
    bm_table: u32,
}

/// What is to be done with a job's outcome.
enum After {
    /// The command is over.
    Finish(Pending),
    /// The command is over; these bytes were to be moved by the bus master, of a table of so many.
    FinishDma {
        pending: Pending,
        /// The table has room for more than there was.
        table_longer: bool,
    },
    /// Bytes from the medium are in the buffer.
    Fetched(Data),
    /// Bytes in the buffer have gone to the medium.
    Stored(Data),
}

type Work = (Plan, Arc<GuestMemory>, Vec<IoBuf>);

pub(super) struct Channel {
    drives: [Drive; 2],
    /// Device register as it was written.
    select: u8,
    control: u8,
    /// The selected drive asks for an interrupt.
    irq: bool,
    phase: Phase,
    bm_command: u8,
    bm_status: u8,
    bm_table: u32,
    line: IrqLine,
    /// Guest memory of our own, because that is where back ends put data.
    buffer: Arc<GuestMemory>,
    job: Option<Work>,
    after: Option<After>,
    /// Jobs in flight of a time before a reset: their outcome goes nowhere.
    stale: u32,
    life: u64,
}

impl Channel {
    pub(super) fn new(
        devices: [Option<Device>; 2],
        buffer: Arc<GuestMemory>,
        line: IrqLine,
    ) -> Channel {
        let drives = devices.map(|device| Drive {
            device,
            r: DriveRegisters::default(),
        });
        let mut c = Channel {
            drives,
            select: 0,
            control: 0,
            irq: false,
            phase: Phase::Idle,
            bm_command: 0,
            bm_status: 0,
            bm_table: 0,
            line,
            buffer,
            job: None,
            after: None,
            stale: 0,
            life: 0,
        };
        c.power_on();
        c
    }

    pub(super) fn life(&self) -> u64 {
        self.life
    }

    pub(super) fn take_job(&mut self) -> Option<Work> {
        self.job.take()
    }

    pub(super) fn in_flight(&self) -> bool {
        self.after.is_some() || self.stale > 0
    }

    /// The command in progress comes to nothing.
    fn forget(&mut self) {
        if self.after.take().is_some() {
            // One that was not even handed out is gone at once.
            if self.job.take().is_none() {
                self.stale += 1;
            }
        }
        self.life += 1;
        self.phase = Phase::Idle;
        self.bm_status &= !BM_ACTIVE;
    }

    pub(super) fn power_on(&mut self) {
        self.forget();
        for d in &mut self.drives {
            if let Some(device) = &mut d.device {
                device.reset();
            }
            d.r = DriveRegisters::default();
            d.show_signature();
        }
        (self.select, self.control) = (0, 0);
        (self.bm_command, self.bm_table) = (0, 0);
        // Whoever set the drives up would say here that they can do DMA.
        self.bm_status = BM_STATUS_WRITABLE;
        self.irq = false;
        self.drive_line();
    }

    fn selected(&self) -> usize {
        usize::from(self.select & DEV != 0)
    }

    fn drive(&mut self) -> &mut Drive {
        let n = self.selected();
        &mut self.drives[n]
    }

    pub(super) fn drive_line(&self) {
        self.line.set(self.irq && self.control & NIEN == 0);
    }

    fn set_irq(&mut self, on: bool) {
        self.irq = on;
        if on {
            self.bm_status |= BM_INTERRUPT;
        }
        self.drive_line();
    }

    fn status(&mut self) -> u8 {
        if self.stale > 0 || self.control & SRST != 0 {
            return status::BSY;
        }
        self.drive().r.status
    }

    /// Registers 0 to 7 are the command block, 8 is the alternate status.
    pub(super) fn read(&mut self, register: u64, data: &mut [u8]) {
        if self.drive().device.is_none() {
            data.fill(0);
            return;
        }
        if register == 0 {
            return self.read_data(data);
        }
        let high = self.control & HOB != 0;
        let (select, r) = (self.select, self.drive().r);
        let shift = if high { 8 } else { 0 };
        let lba = |n: u32| (r.task.lba >> (8 * n + if high { 24 } else { 0 })) as u8;
        let value = match register {
            1 => r.error,
            2 => (r.task.count >> shift) as u8,
            3 => lba(0),
            4 => lba(1),
            5 => lba(2),
            6 => r.task.device & !DEV | select & DEV | 0xa0,
            7 => {
                let s = self.status();
                self.set_irq_off();
                s
            }
            _ => self.status(),
        };
        if let Some(b) = data.first_mut() {
            *b = value;
        }
    }

    fn set_irq_off(&mut self) {
        self.irq = false;
        self.drive_line();
    }

    pub(super) fn write(&mut self, dma: &Dma, register: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match register {
            0 => return self.write_data(dma, data),
            7 => return self.command(dma, value),
            8 => return self.write_control(value),
            6 => self.select = value,
            _ => {}
        }
        // Any write of the task file takes HOB back. ATA/ATAPI-6 §7.8.
        self.control &= !HOB;
        if !matches!(self.phase, Phase::Idle) || self.stale > 0 || self.control & SRST != 0 {
            return; // BSY or DRQ: writes are ignored
        }
        // Both drives take what is written.
        for d in &mut self.drives {
            let t = &mut d.r.task;
            let two = |old: u16| old << 8 | u16::from(value);
            match register {
                1 => t.features = two(t.features),
                2 => t.count = two(t.count),
                3..=5 => {
                    let at = 8 * (register - 3);
                    let was = t.lba >> at & 0xff;
                    t.lba &= !(0xff << at | 0xff << (at + 24));
                    t.lba |= u64::from(value) << at | was << (at + 24);
                }
                _ => t.device = value,
            }
        }
    }

    fn write_control(&mut self, value: u8) {
        let was = std::mem::replace(&mut self.control, value);
        if value & SRST != 0 && was & SRST == 0 {
            self.forget();
            for d in &mut self.drives {
                if let Some(device) = &mut d.device {
                    device.bus_reset();
                }
            }
            self.set_irq_off();
        }
        if value & SRST == 0 && was & SRST != 0 {
            self.select &= !DEV;
            self.drives.iter_mut().for_each(Drive::show_signature);
        }
        self.drive_line();
    }

    fn command(&mut self, dma: &Dma, command: u8) {
        if self.control & SRST != 0 || self.stale > 0 {
            return;
        }
        let mut task = self.drive().r.task;
        task.command = command;
        task.device = self.select;
        let idle = matches!(self.phase, Phase::Idle);
        let Some(device) = &mut self.drive().device else {
            return;
        };
        if command == 0x08 && device.is_packet() {
            // DEVICE RESET is taken at any time, and ends without an interrupt. §8.7.
            device.command(&task);
            self.forget();
            self.set_irq_off();
            return self.drive().show_signature();
        }
        if !idle {
            return;
        }
        let c = device.command(&task);
        self.set_irq_off();
        if command == 0x90 {
            // EXECUTE DEVICE DIAGNOSTIC: both drives answer, drive 0 is selected. §8.11.
            self.select &= !DEV;
            self.drives.iter_mut().for_each(Drive::show_signature);
            return self.set_irq(true);
        }
        match (c.protocol, c.plan) {
            (_, Plan::Fail(sense)) => self.fail(&c.pending, sense),
            (Protocol::Packet { dma }, _) => {
                let t = &mut self.drive().r;
                t.task.count = REASON_CD;
                t.status = status::READY | status::DRQ;
                self.phase = Phase::Packet(PacketWait {
                    task,
                    dma,
                    bytes: Vec::new(),
                    pending: c.pending,
                });
            }
            (Protocol::Dma | Protocol::Queued(_), plan) => {
                self.wait_dma(dma, task, Vec::new(), plan, c.pending);
            }
            (Protocol::PioIn(block) | Protocol::PioOut(block), plan) => {
                let data = Data {
                    block,
                    pending: c.pending,
                    task,
                    ..Data::default()
                };
                self.pio(plan, data);
            }
            (Protocol::NonData, plan) => self.work(plan, c.pending),
        }
    }

    /// Something for a back end that moves no data.
    fn work(&mut self, plan: Plan, pending: Pending) {
        self.busy();
        self.job = Some((plan, Arc::clone(&self.buffer), Vec::new()));
        self.after = Some(After::Finish(pending));
    }

    fn busy(&mut self) {
        self.phase = Phase::Busy;
        self.drive().r.status = status::BSY;
    }

    fn fail(&mut self, pending: &Pending, sense: Sense) {
        let outcome = Outcome {
            result: Err(sense),
            bytes: 0,
        };
        self.finish(pending, &outcome);
        self.set_irq(true);
    }

    fn finish(&mut self, pending: &Pending, outcome: &Outcome) {
        self.phase = Phase::Idle;
        let select = self.select;
        let d = self.drive();
        if let Some(device) = &mut d.device {
            let mut r = device.finish(pending, outcome);
            r.device |= select & 0xf0;
            d.show(&r);
        }
    }

    /// Starts a transfer through the data register.
    fn pio(&mut self, plan: Plan, mut data: Data) {
        let pending = data.pending;
        match plan {
            Plan::Fail(sense) => self.fail(&pending, sense),
            Plan::Reply(bytes) if !bytes.is_empty() => {
                data.bytes = bytes;
                self.next_in_block(data, true);
            }
            Plan::Transfer {
                direction,
                offset,
                len,
                fua,
                ..
            } if len > 0 => {
                data.rest = Span { offset, len, fua };
                match direction {
                    Direction::In => self.fetch(data),
                    Direction::Out => {
                        let first_irq = data.packet;
                        self.next_piece(&mut data);
                        self.next_out_block(data, first_irq);
                    }
                }
            }
            Plan::Parameters { len, .. } if len > 0 => {
                data.piece = len.min(0xffff);
                data.place = None;
                let first_irq = data.packet;
                self.next_out_block(data, first_irq);
            }
            plan => self.work(plan, pending),
        }
    }

    /// Reads the next piece from the medium.
    fn fetch(&mut self, mut data: Data) {
        let Some(backend) = self.medium() else {
            return self.fail(&data.pending, Sense::NO_MEDIUM);
        };
        let len = data.rest.len.min(BUFFER_BYTES.into());
        let plan = Plan::Transfer {
            backend,
            direction: Direction::In,
            offset: data.rest.offset,
            len,
            fua: false,
        };
        data.rest.offset += len;
        data.rest.len -= len;
        data.bytes = vec![0; len as usize];
        (data.pos, data.block_end) = (0, 0);
        self.submit(plan, len, After::Fetched(data));
    }

    fn submit(&mut self, plan: Plan, len: u64, after: After) {
        self.busy();
        let bufs = vec![IoBuf {
            gpa: 0,
            len: len as u32,
        }];
        self.job = Some((plan, Arc::clone(&self.buffer), bufs));
        self.after = Some(after);
    }

    fn medium(&mut self) -> Option<Arc<dyn pyrite_disk::BlockBackend>> {
        self.drive().device.as_ref().and_then(Device::medium)
    }

    /// A write's next piece: its place and size.
    fn next_piece(&mut self, data: &mut Data) {
        let len = data.rest.len.min(BUFFER_BYTES.into());
        data.place = Some(data.rest.offset);
        data.rest.offset += len;
        data.rest.len -= len;
        data.piece = len as u32;
        data.bytes = Vec::new();
        data.block_end = 0;
    }

    /// Shows the host the next DRQ block of what it reads.
    fn next_in_block(&mut self, mut data: Data, irq: bool) {
        let left = data.bytes.len() as u32 - data.pos;
        let n = left.min(data.block.max(1));
        data.block_end = data.pos + n;
        self.drq(&data, n, REASON_IO);
        self.phase = Phase::In(data);
        if irq {
            self.set_irq(true);
        }
    }

    fn next_out_block(&mut self, mut data: Data, irq: bool) {
        let n = (data.piece - data.block_end).min(data.block.max(1));
        data.block_end += n;
        self.drq(&data, n, 0);
        self.phase = Phase::Out(data);
        if irq {
            self.set_irq(true);
        }
    }

    /// For packets, the byte count and the reason are told with each block. §8.23.
    fn drq(&mut self, data: &Data, bytes: u32, reason: u16) {
        let packet = data.packet;
        let r = &mut self.drive().r;
        r.status = status::READY | status::DRQ;
        if packet {
            r.task.count = reason;
            r.task.lba = r.task.lba & !0xff_ff00 | u64::from(bytes & 0xffff) << 8;
        }
    }

    fn read_data(&mut self, out: &mut [u8]) {
        let Phase::In(data) = &mut self.phase else {
            return;
        };
        let (from, end) = (data.pos as usize, data.block_end as usize);
        let n = out.len().min(end - from);
        out[..n].copy_from_slice(&data.bytes[from..from + n]);
        out[n..].fill(0);
        data.pos += n as u32;
        if data.pos < data.block_end {
            return;
        }
        let Phase::In(data) = std::mem::replace(&mut self.phase, Phase::Busy) else {
            return;
        };
        if (data.pos as usize) < data.bytes.len() {
            self.next_in_block(data, true);
        } else if data.rest.len > 0 {
            self.fetch(data);
        } else {
            let outcome = Outcome {
                result: Ok(()),
                bytes: data.pos.into(),
            };
            self.finish(&data.pending, &outcome);
            // After the last block only a packet command interrupts. §9.4 and §9.8.
            if data.packet {
                self.set_irq(true);
            }
        }
    }

    fn write_data(&mut self, dma: &Dma, input: &[u8]) {
        match &mut self.phase {
            Phase::Packet(wait) => {
                let n = input.len().min(PACKET_BYTES - wait.bytes.len());
                wait.bytes.extend_from_slice(&input[..n]);
                if wait.bytes.len() == PACKET_BYTES
                    && let Phase::Packet(wait) = std::mem::replace(&mut self.phase, Phase::Busy)
                {
                    self.packet(dma, wait);
                }
            }
            Phase::Out(data) => {
                let n = input.len().min(data.block_end as usize - data.bytes.len());
                data.bytes.extend_from_slice(&input[..n]);
                if data.bytes.len() < data.block_end as usize {
                    return;
                }
                let Phase::Out(data) = std::mem::replace(&mut self.phase, Phase::Busy) else {
                    return;
                };
                if data.block_end < data.piece {
                    self.next_out_block(data, true);
                } else {
                    self.store(data);
                }
            }
            _ => {}
        }
    }

    /// The host has written a whole piece.
    fn store(&mut self, data: Data) {
        let Some(offset) = data.place else {
            return self.parameters(data);
        };
        let Some(backend) = self.medium() else {
            return self.fail(&data.pending, Sense::NO_MEDIUM);
        };
        if self.buffer.write(0, &data.bytes).is_err() {
            return self.fail(&data.pending, Sense::TARGET_FAILURE);
        }
        let len = data.bytes.len() as u64;
        let plan = Plan::Transfer {
            backend,
            direction: Direction::Out,
            offset,
            len,
            fua: data.rest.fua,
        };
        self.submit(plan, len, After::Stored(data));
    }

    /// The host has written the parameters of a command, which is asked again what it is.
    fn parameters(&mut self, data: Data) {
        let Data {
            bytes,
            pending,
            task,
            cdb,
            ..
        } = data;
        let plan = self.plan_again(&task, &cdb);
        let Some(device) = &mut self.drive().device else {
            return;
        };
        let plan = match plan {
            Plan::Parameters { what, .. } => device.parameters(what, &bytes),
            _ => Plan::Fail(Sense::ABORTED),
        };
        match plan {
            Plan::Fail(sense) => self.fail(&pending, sense),
            plan => self.work(plan, pending),
        }
    }

    fn plan_again(&mut self, task: &TaskFile, cdb: &[u8]) -> Plan {
        match &mut self.drive().device {
            Some(d) if cdb.is_empty() => d.command(task).plan,
            Some(d) => d.packet(cdb),
            None => Plan::Fail(Sense::ABORTED),
        }
    }

    /// A command packet is complete.
    fn packet(&mut self, dma: &Dma, wait: PacketWait) {
        let PacketWait {
            task,
            dma: by_dma,
            bytes: cdb,
            pending,
        } = wait;
        let Some(device) = &mut self.drive().device else {
            return;
        };
        let plan = device.packet(&cdb);
        match plan {
            Plan::Fail(sense) => self.fail(&pending, sense),
            plan if plan.data().is_none() => self.work(plan, pending),
            plan if by_dma => self.wait_dma(dma, task, cdb, plan, pending),
            plan => {
                // Byte count limit: even, and 0 is taken as the most. §8.23.
                let limit = match (task.lba >> 8) as u16 {
                    0 | 0xffff => 0xfffe,
                    1 => 2,
                    n => n & !1,
                };
                let data = Data {
                    block: limit.into(),
                    packet: true,
                    pending,
                    task,
                    cdb,
                    ..Data::default()
                };
                self.pio(plan, data);
            }
        }
    }

    /// A command whose data the bus master is to move.
    fn wait_dma(&mut self, dma: &Dma, task: TaskFile, cdb: Vec<u8>, plan: Plan, pending: Pending) {
        let reply = match plan {
            Plan::Fail(sense) => return self.fail(&pending, sense),
            plan if plan.data().is_none() => return self.work(plan, pending),
            Plan::Reply(bytes) => bytes,
            _ => Vec::new(),
        };
        self.drive().r.status = status::READY | status::DRQ;
        self.phase = Phase::Dma(DmaWait {
            task,
            cdb,
            reply,
            pending,
        });
        self.try_dma(dma);
    }

    /// Moves data if drive, bus master and PCI command register all want it.
    pub(super) fn try_dma(&mut self, dma: &Dma) {
        if self.bm_command & BM_START == 0 {
            return;
        }
        let (Phase::Dma(_), Ok(memory)) = (&self.phase, dma.memory()) else {
            return;
        };
        let Phase::Dma(wait) = std::mem::replace(&mut self.phase, Phase::Busy) else {
            return;
        };
        let DmaWait {
            task,
            cdb,
            reply,
            pending,
        } = wait;
        let plan = if reply.is_empty() {
            self.plan_again(&task, &cdb)
        } else {
            Plan::Reply(reply)
        };
        let len = plan.data().map_or(0, |(_, len)| len);
        let (bufs, total, ended) = prd_table(memory, self.bm_table.into(), len);
        let Some(device) = &mut self.drive().device else {
            return;
        };
        let plan = with_parameters(plan, memory, &bufs, |w, data| device.parameters(w, data));
        self.busy();
        self.bm_status |= BM_ACTIVE;
        self.job = Some((plan, Arc::clone(memory), bufs));
        self.after = Some(After::FinishDma {
            pending,
            table_longer: total > len || !ended,
        });
    }

    /// The outcome of a job.
    pub(super) fn complete(&mut self, life: u64, outcome: &Outcome) {
        if life != self.life {
            self.stale = self.stale.saturating_sub(1);
            return;
        }
        match self.after.take() {
            None => {}
            Some(After::Finish(pending)) => {
                self.finish(&pending, outcome);
                self.set_irq(true);
            }
            Some(After::FinishDma {
                pending,
                table_longer,
            }) => {
                // The bus master stays active if its table has not ended. BMIDE §2.2, table.
                if outcome.result.is_err() || !table_longer {
                    self.bm_status &= !BM_ACTIVE;
                }
                if outcome.result == Err(Sense::DATA_PHASE) {
                    self.bm_status |= BM_ERROR;
                }
                self.finish(&pending, outcome);
                self.set_irq(true);
            }
            Some(After::Fetched(mut data)) => match outcome.result {
                Ok(()) if self.buffer.read(0, &mut data.bytes).is_ok() => {
                    self.next_in_block(data, true);
                }
                Ok(()) => self.fail(&data.pending, Sense::TARGET_FAILURE),
                Err(sense) => self.fail(&data.pending, sense),
            },
            Some(After::Stored(mut data)) => match outcome.result {
                Ok(()) if data.rest.len > 0 => {
                    self.next_piece(&mut data);
                    self.next_out_block(data, true);
                }
                _ => {
                    self.finish(&data.pending, outcome);
                    self.set_irq(true);
                }
            },
        }
    }

    pub(super) fn bm_read(&self, register: u64) -> u8 {
        match register {
            0 => self.bm_command,
            2 => self.bm_status,
            at @ 4..8 => self.bm_table.to_le_bytes()[(at - 4) as usize],
            _ => 0,
        }
    }

    pub(super) fn bm_write(&mut self, dma: &Dma, register: u64, value: u8) {
        match register {
            0 => {
                self.bm_command = value & BM_COMMAND_WRITABLE;
                if value & BM_START == 0 {
                    if self.after.is_none() {
                        self.bm_status &= !BM_ACTIVE;
                    }
                } else {
                    self.bm_status |= BM_ACTIVE;
                    self.try_dma(dma);
                }
            }
            2 => {
                let clear = value & (BM_ERROR | BM_INTERRUPT);
                self.bm_status &= !clear & !BM_STATUS_WRITABLE;
                self.bm_status |= value & BM_STATUS_WRITABLE;
            }
            at @ 4..8 => {
                let mut b = self.bm_table.to_le_bytes();
                b[(at - 4) as usize] = value;
                self.bm_table = u32::from_le_bytes(b) & !3;
            }
            _ => {}
        }
    }

    pub(super) fn save(&self) -> ChannelSaved {
        let Channel {
            drives,
            select,
            control,
            irq,
            phase,
            bm_command,
            bm_status,
            bm_table,
            line: _,
            buffer: _,
            job: _,
            after: _,
            stale: _,
            life: _,
        } = self;
        let drives = drives.iter().map(|d| DriveSaved {
            registers: d.r,
            device: d.device.as_ref().map(Device::save),
        });
        ChannelSaved {
            drives: drives.collect(),
            select: *select,
            control: *control,
            irq: *irq,
            phase: phase.clone(),
            bm_command: *bm_command,
            bm_status: *bm_status,
            bm_table: *bm_table,
        }
    }

    pub(super) fn restore(&mut self, saved: ChannelSaved) -> Result<(), String> {
        let ChannelSaved {
            drives,
            select,
            control,
            irq,
            phase,
            bm_command,
            bm_status,
            bm_table,
        } = saved;
        if drives.len() != 2 {
            return Err(format!("{} drives", drives.len()));
        }
        check(&phase)?;
        self.forget();
        for (d, s) in self.drives.iter_mut().zip(drives) {
            match (&mut d.device, &s.device) {
                (Some(device), Some(saved)) => device.restore(saved)?,
                (None, None) => {}
                _ => return Err("a drive is missing or new".into()),
            }
            d.r = s.registers;
        }
        (self.select, self.control, self.irq) = (select, control, irq);
        if !matches!(phase, Phase::Idle) && self.drive().device.is_none() {
            return Err("a command of a drive that is missing".into());
        }
        self.phase = phase;
        self.bm_command = bm_command & BM_COMMAND_WRITABLE;
        self.bm_status = bm_status & (BM_STATUS_WRITABLE | BM_ACTIVE | BM_ERROR | BM_INTERRUPT);
        self.bm_table = bm_table & !3;
        self.drive_line();
        Ok(())
    }

    pub(super) fn inspect(&self) -> Inspect {
        let phase = match &self.phase {
            Phase::Idle => "idle",
            Phase::Busy => "busy",
            Phase::Packet(_) => "packet",
            Phase::In(_) => "data to the host",
            Phase::Out(_) => "data from the host",
            Phase::Dma(_) => "waits for DMA",
        };
        let drives = self.drives.iter().enumerate();
        let drives = drives.filter_map(|(n, d)| {
            let packet = Inspect::Bool(d.device.as_ref()?.is_packet());
            let drive = Inspect::node([
                ("packet", packet),
                ("status", Inspect::Hex(d.r.status.into())),
                ("error", Inspect::Hex(d.r.error.into())),
            ]);
            Some((n.to_string(), drive))
        });
        Inspect::node([
            ("phase", Inspect::Text(phase.into())),
            ("irq", Inspect::Bool(self.irq)),
            ("bus_master_status", Inspect::Hex(self.bm_status.into())),
            ("drives", Inspect::Node(drives.collect())),
        ])
    }
}

/// Refuses a saved command that the protocol could not have come to.
fn check(phase: &Phase) -> Result<(), String> {
    let sound = match phase {
        Phase::Idle => true,
        Phase::Busy => false, // it was drained
        Phase::Packet(p) => p.bytes.len() < PACKET_BYTES,
        Phase::Dma(d) => d.reply.len() <= BUFFER_BYTES as usize && d.cdb.len() <= PACKET_BYTES,
        Phase::In(d) => {
            d.bytes.len() <= BUFFER_BYTES as usize
                && d.pos < d.block_end
                && d.block_end as usize <= d.bytes.len()
                && sound_rest(d)
        }
        Phase::Out(d) => {
            d.piece <= BUFFER_BYTES
                && d.block_end <= d.piece
                && d.bytes.len() < d.block_end as usize
                && sound_rest(d)
        }
    };
    if sound {
        Ok(())
    } else {
        Err("a command in an impossible state".into())
    }
}

fn sound_rest(d: &Data) -> bool {
    // LIMIT: what a packet can ask for: 2^32 sectors of a CD.
    const MOST: u64 = CD_SECTOR_BYTES << 32;
    d.cdb.len() <= PACKET_BYTES && d.rest.len <= MOST && d.rest.offset <= MOST << 16
}

/// The buffers of a PRD table until they hold `len` bytes, how much they hold, and whether the
/// last one was the table's last. BMIDE §1.2.
fn prd_table(memory: &GuestMemory, at: u64, len: u64) -> (Vec<IoBuf>, u64, bool) {
    let mut bufs: Vec<IoBuf> = Vec::new();
    let mut total = 0;
    for n in 0..MAX_PRDS {
        let mut e = [0; 8];
        if total >= len || memory.read(at + 8 * n, &mut e).is_err() {
            break;
        }
        let v = u64::from_le_bytes(e);
        let gpa = v & 0xffff_fffe;
        let bytes = match (v >> 32) as u32 & 0xfffe {
            0 => 0x1_0000,
            n => n,
        };
        total += u64::from(bytes);
        match bufs.last_mut() {
            Some(b) if b.gpa + u64::from(b.len) == gpa => b.len += bytes,
            _ => bufs.push(IoBuf { gpa, len: bytes }),
        }
        if (v >> 32) as u32 & PRD_END != 0 {
            return (bufs, total, true);
        }
    }
    (bufs, total, false)
}
