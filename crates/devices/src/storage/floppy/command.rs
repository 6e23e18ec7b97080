//! Commands: their bytes, their execution, their results. §5.

use std::sync::Arc;

use minicbor::{Decode, Encode};
use pyrite_disk::{BlockRequest, DiskError};
use pyrite_vdev::bus::lock;

use super::media::{Geometry, HEADS, MAX_CYLINDERS, MAX_SECTORS};
use super::{CHANNEL, DmaDirection, Job, SECTOR_BYTES, State, buffer_bufs};

/// Status register 0: interrupt code, seek end, equipment check. §4.1.
const ST0_ABNORMAL: u8 = 0x40;
const ST0_INVALID: u8 = 0x80;
const ST0_SEEK_END: u8 = 0x20;
const ST0_EQUIPMENT: u8 = 0x10;
/// Status register 1: end of cylinder, CRC error, overrun, no data, write-protected.
const ST1_END_OF_CYLINDER: u8 = 0x80;
const ST1_DATA_ERROR: u8 = 0x20;
const ST1_OVERRUN: u8 = 0x10;
const ST1_NO_DATA: u8 = 0x04;
const ST1_NOT_WRITABLE: u8 = 0x02;
const ST1_MISSING_MARK: u8 = 0x01;
/// Status register 3: write-protected, ready, track 0, two sides.
const ST3_FIXED: u8 = 0x28;
const ST3_PROTECTED: u8 = 0x40;
const ST3_TRACK_0: u8 = 0x10;
/// Bytes that FORMAT TRACK gets for each sector.
const ID_BYTES: usize = 4;
/// Bytes of the longest command.
const MAX_COMMAND: usize = 9;
/// N of 512-byte sectors.
const N_512: u8 = 2;

/// Where a command stands.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum Phase {
    #[n(0)]
    Idle,
    /// Bytes of a command so far.
    #[n(1)]
    Command(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// A back end works on it.
    #[n(2)]
    Busy,
    /// The host reads data from the FIFO.
    #[n(3)]
    ToHost(#[n(0)] Fifo),
    /// The host writes data to the FIFO.
    #[n(4)]
    FromHost(#[n(0)] Fifo),
    /// Bytes of the result that are left, the next one last.
    #[n(5)]
    Result(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Fifo {
    #[n(0)]
    transfer: Transfer,
    #[cbor(n(1), with = "minicbor::bytes")]
    data: Vec<u8>,
    #[n(2)]
    pos: u32,
}

impl Phase {
    /// A saved phase that could have come about.
    pub(super) fn is_sound(&self) -> bool {
        // LIMIT: both sides of a cylinder.
        const MOST: usize = MAX_SECTORS as usize * HEADS as usize * SECTOR_BYTES;
        let fifo = |f: &Fifo| f.data.len() <= MOST && (f.pos as usize) < f.data.len();
        match self {
            Phase::Idle => true,
            Phase::Busy => false, // it was drained
            Phase::Command(bytes) => match bytes.split_first() {
                Some((&op, _)) => bytes.len() < length(op),
                None => false,
            },
            Phase::ToHost(f) | Phase::FromHost(f) => fifo(f) && f.transfer.is_sound(),
            Phase::Result(bytes) => (1..=16).contains(&bytes.len()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
enum Kind {
    #[n(0)]
    Read,
    #[n(1)]
    Write,
    #[n(2)]
    Verify,
    #[n(3)]
    Format,
}

/// A data transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Transfer {
    #[n(0)]
    kind: Kind,
    #[n(1)]
    drive: u8,
    /// Address of the first sector.
    #[n(2)]
    cylinder: u8,
    #[n(3)]
    head: u8,
    #[n(4)]
    sector: u8,
    /// Last sector of the track.
    #[n(5)]
    end: u8,
    /// Goes on with head 1.
    #[n(6)]
    both: bool,
    /// Sectors until the end.
    #[n(7)]
    count: u8,
    /// Terminal count came.
    #[n(8)]
    ended: bool,
    /// Sectors moved.
    #[n(9)]
    moved: u8,
    /// What FORMAT TRACK fills sectors with.
    #[n(10)]
    filler: u8,
}

impl Transfer {
    fn is_sound(&self) -> bool {
        self.head < HEADS
            && self.cylinder < MAX_CYLINDERS
            && (1..=MAX_SECTORS).contains(&self.sector)
            && self.count <= MAX_SECTORS * HEADS
            && self.moved <= self.count
    }

    /// Where it begins on a medium; none if it is not all there.
    fn offset(&self, g: &Geometry) -> Option<u64> {
        let track = u64::from(self.cylinder) * u64::from(HEADS) + u64::from(self.head);
        let block = track * u64::from(g.sectors) + u64::from(self.sector) - 1;
        let offset = block * SECTOR_BYTES as u64;
        (self.sector <= g.sectors && offset + self.bytes() as u64 <= g.bytes()).then_some(offset)
    }

    fn bytes(&self) -> usize {
        usize::from(self.count) * SECTOR_BYTES
    }

    /// Address after the sectors that were moved. §5.1, table 5-6.
    fn next(&self) -> (u8, u8, u8) {
        let (mut c, mut h, mut r) = (self.cylinder, self.head, self.sector);
        for _ in 0..self.moved {
            if r < self.end {
                r += 1;
                continue;
            }
            r = 1;
            if self.both && h == 0 {
                h = 1;
            } else {
                c += 1;
                if self.both {
                    h = 0;
                }
            }
        }
        (c, h, r)
    }
}

/// Bytes of a command.
fn length(op: u8) -> usize {
    match op & 0x1f {
        0x02 | 0x05 | 0x06 | 0x09 | 0x0c | 0x11 | 0x16 | 0x19 | 0x1d => 9,
        0x03 if op & 0x80 == 0 => 3,
        0x0f => 3, // SEEK, RELATIVE SEEK
        0x0d => 6,
        0x04 | 0x07 | 0x0a | 0x12 => 2,
        0x13 => 4,
        _ => 1,
    }
}

impl State {
    pub(super) fn write_fifo(&mut self, v: u8) {
        if self.r.dor & super::DOR_NOT_RESET == 0 || self.stale > 0 {
            return;
        }
        match &mut self.r.phase {
            Phase::Idle => self.r.phase = Phase::Command(vec![v]),
            Phase::Command(bytes) => bytes.push(v),
            Phase::FromHost(f) => {
                if let Some(b) = f.data.get_mut(f.pos as usize) {
                    *b = v;
                }
                f.pos += 1;
                if f.pos as usize == f.data.len()
                    && let Phase::FromHost(f) = std::mem::replace(&mut self.r.phase, Phase::Busy)
                {
                    self.set_irq(false);
                    match f.transfer.kind {
                        Kind::Format => self.fill(f.transfer),
                        _ => self.store(f.transfer, &f.data),
                    }
                }
                return;
            }
            _ => return,
        }
        let Phase::Command(bytes) = &self.r.phase else {
            return;
        };
        if bytes.len() == length(bytes[0])
            && let Phase::Command(bytes) = std::mem::replace(&mut self.r.phase, Phase::Idle)
        {
            let mut all = [0; MAX_COMMAND];
            for (to, from) in all.iter_mut().zip(bytes) {
                *to = from;
            }
            self.execute(&all);
        }
    }

    pub(super) fn read_fifo(&mut self) -> u8 {
        match &mut self.r.phase {
            Phase::Result(left) => {
                let b = left.pop().unwrap_or(0);
                if left.is_empty() {
                    self.r.phase = Phase::Idle;
                }
                // The first byte of a result takes the interrupt back.
                self.set_irq(false);
                b
            }
            Phase::ToHost(f) => {
                let b = f.data.get(f.pos as usize).copied().unwrap_or(0);
                f.pos += 1;
                if f.pos as usize >= f.data.len() {
                    let mut t = f.transfer;
                    t.moved = t.count;
                    self.end(t, 0, 0);
                }
                b
            }
            _ => 0,
        }
    }

    fn result(&mut self, bytes: &[u8]) {
        self.r.phase = Phase::Result(bytes.iter().rev().copied().collect());
    }

    fn execute(&mut self, b: &[u8; MAX_COMMAND]) {
        let op = b[0];
        let drive = b[1] & 3;
        let head = b[1] >> 2 & 1;
        match op & 0x1f {
            0x06 | 0x0c => self.transfer(Kind::Read, b),
            0x02 => self.transfer(Kind::Read, b), // READ TRACK, from its first sector
            0x05 | 0x09 => self.transfer(Kind::Write, b),
            0x16 | 0x11 | 0x19 | 0x1d => self.transfer(Kind::Verify, b),
            0x0d => self.format(b),
            0x03 if op & 0x80 == 0 => self.r.specify = [b[1], b[2]],
            0x04 => {
                let at = self.drives.get(usize::from(drive));
                let track_0 = at.is_some_and(|d| d.r.cylinder == 0);
                let protected = self
                    .medium(drive.into())
                    .is_some_and(|(m, _)| m.info().read_only);
                let st3 = ST3_FIXED
                    | head << 2
                    | drive
                    | if track_0 { ST3_TRACK_0 } else { 0 }
                    | if protected { ST3_PROTECTED } else { 0 };
                self.result(&[st3]);
            }
            0x07 => self.seek(drive, head, Some(0)),
            0x0f if op & 0x80 != 0 => {
                let now = self
                    .drives
                    .get(usize::from(drive))
                    .map_or(0, |d| d.r.cylinder);
                let to = if op & 0x40 != 0 {
                    now.saturating_add(b[2])
                } else {
                    now.saturating_sub(b[2])
                };
                self.seek(drive, head, Some(to));
            }
            0x0f => self.seek(drive, head, Some(b[2])),
            0x08 => self.sense_interrupt(),
            0x0a => self.read_id(drive, head),
            0x10 => self.result(&[0x90]), // VERSION: 82077
            0x18 => self.result(&[0x41]), // PART ID
            0x12 => self.r.perpendicular = b[1],
            0x13 => self.r.configure = [b[2], b[3]],
            0x14 => {
                self.r.lock = op & 0x80 != 0;
                self.result(&[u8::from(self.r.lock) << 4]);
            }
            0x0e => {
                let at = |n: usize| self.drives.get(n).map_or(0, |d| d.r.cylinder);
                let end = self.medium(self.selected()).map_or(0, |(_, g)| g.sectors);
                let dump = [
                    at(0),
                    at(1),
                    0,
                    0,
                    self.r.specify[0],
                    self.r.specify[1],
                    end,
                    u8::from(self.r.lock) << 7 | self.r.perpendicular & 0x7f,
                    self.r.configure[0],
                    self.r.configure[1],
                ];
                self.result(&dump);
            }
            _ => self.result(&[ST0_INVALID]),
        }
    }

    /// SENSE INTERRUPT STATUS. §5.2.5.
    fn sense_interrupt(&mut self) {
        if self.r.pending.is_empty() {
            return self.result(&[ST0_INVALID]);
        }
        let (st0, cylinder) = self.r.pending.remove(0);
        self.result(&[st0, cylinder]);
        self.set_irq(false);
    }

    fn seek(&mut self, drive: u8, head: u8, to: Option<u8>) {
        let mut st0 = ST0_SEEK_END | head << 2 | drive;
        self.look_for_change();
        let has_medium = self.medium(drive.into()).is_some();
        let mut at = 0;
        match self.drives.get_mut(usize::from(drive)) {
            Some(d) if d.slot.is_some() => {
                // The head stops a little behind the last cylinder.
                d.r.cylinder = to.unwrap_or(0).min(MAX_CYLINDERS + 2);
                at = d.r.cylinder;
                // A step over a medium takes the change line back.
                d.r.changed &= !has_medium;
            }
            // No drive answers at track 0.
            _ => st0 |= ST0_ABNORMAL | ST0_EQUIPMENT,
        }
        self.r.pending.truncate(3);
        self.r.pending.push((st0, at));
        self.set_irq(true);
    }

    fn read_id(&mut self, drive: u8, head: u8) {
        let st0 = head << 2 | drive;
        let at = self
            .drives
            .get(usize::from(drive))
            .map_or(0, |d| d.r.cylinder);
        // Only what is recorded at the chosen rate is found.
        let under_head = self
            .medium(drive.into())
            .filter(|(_, g)| g.rate == self.r.ccr)
            .map(|(_, g)| (at / g.steps, g))
            .filter(|(c, g)| *c < g.cylinders);
        let r = match under_head {
            Some((c, _)) => [st0, 0, 0, c, head, 1, N_512],
            None => [st0 | ST0_ABNORMAL, ST1_MISSING_MARK, 0, at, head, 1, N_512],
        };
        self.result(&r);
        self.set_irq(true);
    }

    /// The end of a data transfer: its result. `st1` 0 means that all is well.
    fn end(&mut self, t: Transfer, st1: u8, st2: u8) {
        let (c, h, r) = t.next();
        let mut st0 = h << 2 | t.drive;
        if st1 | st2 != 0 {
            st0 |= ST0_ABNORMAL;
        }
        if let Some(d) = self.drives.get_mut(usize::from(t.drive))
            && let Some((_, g)) = d.medium()
            && t.cylinder < g.cylinders
        {
            d.r.cylinder = t.cylinder * g.steps;
        }
        self.result(&[st0, st1, st2, c, h, r, N_512]);
        self.set_irq(true);
    }

    fn uses_dma(&self) -> bool {
        self.r.specify[1] & 1 == 0
    }

    /// READ, WRITE, VERIFY: command, head and drive, C, H, R, N, EOT, gap, length. §5.1.
    fn transfer(&mut self, kind: Kind, b: &[u8; MAX_COMMAND]) {
        let read_track = b[0] & 0x1f == 2;
        let mut t = Transfer {
            kind,
            drive: b[1] & 3,
            cylinder: b[2],
            head: b[3] & 1,
            sector: if read_track { 1 } else { b[4] },
            end: b[6],
            both: b[0] & 0x80 != 0 && !read_track,
            count: 0,
            ended: false,
            moved: 0,
            filler: 0,
        };
        self.look_for_change();
        let Some((medium, g)) = self
            .medium(t.drive.into())
            .filter(|(_, g)| g.rate == self.r.ccr)
        else {
            return self.end(t, ST1_MISSING_MARK, 0);
        };
        t.end = t.end.min(g.sectors);
        let there = t.cylinder < g.cylinders
            && b[5] == N_512
            && (1..=g.sectors).contains(&t.sector)
            && t.sector <= t.end
            && b[3] & 1 == b[1] >> 2 & 1;
        if !there {
            return self.end(t, ST1_NO_DATA, 0);
        }
        t.count = t.end - t.sector + 1;
        if t.both && t.head == 0 {
            t.count += t.end;
        }
        if t.end < g.sectors && t.both && t.head == 0 {
            // Two pieces of a track in one request are not one piece of the medium.
            t.count = t.end - t.sector + 1;
        }
        match kind {
            Kind::Write if medium.info().read_only => self.end(t, ST1_NOT_WRITABLE, 0),
            Kind::Write if self.uses_dma() => {
                let mut data = vec![0; t.bytes()];
                let (n, ended) =
                    lock(&self.dma).transfer(CHANNEL, DmaDirection::FromMemory, &mut data);
                // A sector that is not complete is filled up with zeroes.
                t.count = n.div_ceil(SECTOR_BYTES) as u8;
                t.ended = ended;
                data.truncate(t.bytes());
                self.store(t, &data);
            }
            Kind::Write => {
                let data = vec![0; t.bytes()];
                self.r.phase = Phase::FromHost(Fifo {
                    transfer: t,
                    data,
                    pos: 0,
                });
                self.set_irq(true);
            }
            _ => {
                let Some(offset) = t.offset(&g) else {
                    return self.end(t, ST1_NO_DATA, 0);
                };
                let bufs = buffer_bufs(t.bytes());
                self.submit(medium, BlockRequest::Read { offset, bufs }, t);
            }
        }
    }

    fn submit(
        &mut self,
        backend: Arc<dyn pyrite_disk::BlockBackend>,
        request: BlockRequest,
        t: Transfer,
    ) {
        self.r.phase = Phase::Busy;
        self.active = Some(t);
        self.job = Some(Job {
            backend,
            request,
            life: self.life,
        });
    }

    /// The host's data are complete: they go to the medium.
    fn store(&mut self, t: Transfer, data: &[u8]) {
        if t.count == 0 {
            // Nobody answered the requests for data.
            return self.end(t, ST1_OVERRUN, 0);
        }
        let Some((medium, g)) = self.medium(t.drive.into()) else {
            return self.end(t, ST1_MISSING_MARK, 0);
        };
        let Some(offset) = t.offset(&g) else {
            return self.end(t, ST1_NO_DATA, 0);
        };
        if self.buffer.write(0, data).is_err() {
            return self.end(t, ST1_DATA_ERROR, 0);
        }
        let request = BlockRequest::Write {
            offset,
            bufs: buffer_bufs(t.bytes()),
            fua: true,
        };
        self.submit(medium, request, t);
    }

    /// FORMAT TRACK: command, head and drive, N, sectors, gap, filler. §5.1.7. The host sends C, H,
    /// R and N of each sector, which are what they always are; the track is filled.
    fn format(&mut self, b: &[u8; MAX_COMMAND]) {
        let drive = b[1] & 3;
        let at = self
            .drives
            .get(usize::from(drive))
            .map_or(0, |d| d.r.cylinder);
        let mut t = Transfer {
            kind: Kind::Format,
            drive,
            cylinder: at,
            head: b[1] >> 2 & 1,
            sector: 1,
            end: b[3],
            both: false,
            count: 0,
            ended: true,
            moved: 0,
            filler: b[5],
        };
        self.look_for_change();
        let Some((medium, g)) = self.medium(drive.into()) else {
            return self.end(t, ST1_MISSING_MARK, 0);
        };
        t.cylinder = at / g.steps;
        if medium.info().read_only {
            return self.end(t, ST1_NOT_WRITABLE, 0);
        }
        // An image cannot become one of another format.
        if b[2] != N_512 || b[3] != g.sectors || t.cylinder >= g.cylinders || self.r.ccr != g.rate {
            return self.end(t, ST1_NO_DATA, 0);
        }
        t.count = g.sectors;
        let mut data = vec![0; ID_BYTES * usize::from(g.sectors)];
        if self.uses_dma() {
            let (n, _) = lock(&self.dma).transfer(CHANNEL, DmaDirection::FromMemory, &mut data);
            if n == 0 {
                return self.end(t, ST1_OVERRUN, 0);
            }
            return self.fill(t);
        }
        self.r.phase = Phase::FromHost(Fifo {
            transfer: t,
            data,
            pos: 0,
        });
        self.set_irq(true);
    }

    /// The addresses of a track's sectors are complete.
    fn fill(&mut self, t: Transfer) {
        let data = vec![t.filler; t.bytes()];
        self.store(t, &data);
    }

    /// The outcome of a request.
    pub(super) fn complete(&mut self, life: u64, outcome: Result<(), DiskError>) {
        if life != self.life {
            self.stale = self.stale.saturating_sub(1);
            return;
        }
        let Some(mut t) = self.active.take() else {
            return;
        };
        match outcome {
            Err(DiskError::ReadOnly) => return self.end(t, ST1_NOT_WRITABLE, 0),
            Err(_) => return self.end(t, ST1_DATA_ERROR, ST1_DATA_ERROR),
            Ok(()) => {}
        }
        if matches!(t.kind, Kind::Write | Kind::Format) {
            t.moved = t.count;
            return self.end(t, 0, 0);
        }
        let mut data = vec![0; t.bytes()];
        if self.buffer.read(0, &mut data).is_err() {
            return self.end(t, ST1_DATA_ERROR, 0);
        }
        if t.kind == Kind::Verify {
            t.moved = t.count;
            return self.end(t, 0, 0);
        }
        if !self.uses_dma() {
            self.r.phase = Phase::ToHost(Fifo {
                transfer: t,
                data,
                pos: 0,
            });
            return self.set_irq(true);
        }
        let (n, ended) = lock(&self.dma).transfer(CHANNEL, DmaDirection::ToMemory, &mut data);
        t.moved = (n / SECTOR_BYTES) as u8;
        // Without terminal count the controller runs into the end of the track.
        let st1 = if ended { 0 } else { ST1_END_OF_CYLINDER };
        self.end(t, st1, 0);
    }
}
