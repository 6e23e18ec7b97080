//! Mass storage, bulk-only transport: a SCSI unit whose commands come in wrappers. "BOT" is the USB
//! Mass Storage Class Bulk-Only Transport 1.0.
//!
//! ```text
//! out: CBW ──► Unit::plan ──► data phase, as many bytes as the host says ──► in: CSW
//! ```
//!
//! What the unit has less than the host asked for is filled up with zeroes and told as residue (BOT
//! §6.7.2 lets a device do so), so that no host has to clear a halt. Work without data is done when
//! the host asks for the status.

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::{Direction, Outcome, Plan, Unit, UnitSaved};
use pyrite_state::Inspect;

use super::device::{
    Answer, Buffers, Bus, Core, CoreSaved, Descriptors, Setup, Speed, UsbDevice, Work,
    configuration_descriptor, descriptor, device_descriptor,
};

/// Vendor and product: those that systems know virtual disks by.
const VENDOR: u16 = 0x46f4;
const PRODUCT: u16 = 0x0001;
const IN: u8 = 0x81;
const OUT: u8 = 0x02;
/// Command block wrapper, BOT §5.1.
const CBW_BYTES: usize = 31;
const CBW_SIGNATURE: u32 = 0x4342_5355;
/// Command status wrapper, BOT §5.2.
const CSW_BYTES: usize = 13;
const CSW_SIGNATURE: u32 = 0x5342_5355;
const PASSED: u8 = 0;
const FAILED: u8 = 1;
const PHASE_ERROR: u8 = 2;
/// LIMIT: bytes of a parameter list.
const MAX_PARAMETERS: u32 = 0xffff;

/// Where the bytes of the data phase come from or go to.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
enum Data {
    /// Nowhere: zeroes for the host, or what it sends is dropped.
    #[n(0)]
    None,
    /// The unit's answer, and how much of it was sent.
    #[n(1)]
    Reply(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>, #[n(1)] u32),
    /// Blocks of the medium: what is left of them.
    #[n(2)]
    Blocks(#[n(0)] Span),
    /// Parameters from the host: how many belong to the command, and those that came.
    #[n(3)]
    Parameters(#[n(0)] u32, #[cbor(n(1), with = "minicbor::bytes")] Vec<u8>),
    /// Nothing moves, but there is work to do before the status.
    #[n(4)]
    Work,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Span {
    #[n(0)]
    offset: u64,
    #[n(1)]
    len: u64,
    #[n(2)]
    fua: bool,
}

/// A command on its way.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Command {
    #[n(0)]
    tag: u32,
    /// The data phase is to the host.
    #[n(1)]
    is_in: bool,
    /// Bytes that the host still expects to move.
    #[n(2)]
    left: u32,
    /// Bytes that the host expected and the unit has not used.
    #[n(3)]
    residue: u32,
    #[n(4)]
    status: u8,
    #[cbor(n(5), with = "minicbor::bytes")]
    cdb: Vec<u8>,
    #[n(6)]
    data: Data,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
enum Phase {
    /// The host is to send a command.
    #[n(0)]
    Idle,
    /// Data, then status.
    #[n(1)]
    Command(#[n(0)] Command),
    /// What came was no command: everything is refused until the reset. BOT §6.6.1.
    #[n(2)]
    Lost,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    core: CoreSaved,
    #[n(1)]
    phase: Phase,
    #[n(2)]
    unit: UnitSaved,
}

/// A disk or a CD drive on the bus.
pub struct Storage {
    core: Core,
    unit: Unit,
    phase: Phase,
}

fn descriptors(serial: &str, product: &str) -> Descriptors {
    let speed = Speed::Super;
    let mut interface = vec![9, descriptor::INTERFACE, 0, 0, 2, 8, 6, 0x50, 0];
    for endpoint in [IN, OUT] {
        interface.extend([7, descriptor::ENDPOINT, endpoint, 2, 0, 4, 0]);
        // Bursts of 16 packets.
        interface.extend([6, descriptor::SUPERSPEED_ENDPOINT_COMPANION, 15, 0, 0, 0]);
    }
    let capability = descriptor::DEVICE_CAPABILITY;
    // USB 2.0 extension without link power management; SuperSpeed, which works from 5 Gb/s on and
    // leaves U1 and U2 at once. USB 3.1 §9.6.2.
    let mut bos = vec![5, descriptor::BOS, 22, 0, 2];
    bos.extend([7, capability, 2, 0, 0, 0, 0]);
    bos.extend([10, capability, 3, 0, 8, 0, 3, 0, 0, 0]);
    Descriptors {
        device: device_descriptor(speed, VENDOR, PRODUCT),
        configuration: configuration_descriptor(speed, &interface),
        bos,
        strings: vec!["Pyrite".into(), product.into(), serial.into()],
    }
}

fn word(b: &[u8], at: usize) -> u32 {
    match b.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    }
}

impl Storage {
    /// A device with one logical unit. Its serial number should have at least 12 digits of base 16
    /// (BOT §4.1.1).
    pub fn new(unit: Unit) -> Storage {
        let (serial, product) = (&unit.identity().serial, &unit.identity().product);
        Storage {
            core: Core::new(descriptors(serial, product), &[IN, OUT]),
            unit,
            phase: Phase::Idle,
        }
    }

    /// Takes a command block wrapper.
    fn command(&mut self, bus: Bus<'_>, buffers: &Buffers) -> Answer {
        let mut b = [0; CBW_BYTES];
        match buffers.read(bus.memory, &mut b) {
            Ok(_) => {}
            Err(_) => return Answer::Fault,
        }
        let (lun, cdb_bytes) = (b[13], usize::from(b[14]));
        let valid = buffers.len() == CBW_BYTES as u64
            && word(&b, 0) == CBW_SIGNATURE
            && lun == 0
            && (1..=16).contains(&cdb_bytes);
        if !valid {
            self.phase = Phase::Lost;
            return self.stall(OUT);
        }
        let cdb = b[15..15 + cdb_bytes].to_vec();
        let (left, is_in) = (word(&b, 8), b[12] & 0x80 != 0);
        let mut c = Command {
            tag: word(&b, 4),
            is_in,
            left,
            residue: left,
            status: PASSED,
            data: Data::None,
            cdb,
        };
        let plan = self.unit.plan(&c.cdb);
        // The thirteen cases, BOT §6.7: what the unit wants to move must be what the host expects,
        // or less.
        if let Some((direction, len)) = plan.data() {
            let fits = match &plan {
                // Cut to what the host takes, if it takes any.
                Plan::Reply(_) => left > 0,
                _ => len <= left.into(),
            };
            if !fits || is_in != (direction == Direction::In) {
                c.status = PHASE_ERROR;
                self.phase = Phase::Command(c);
                return Answer::Moved(CBW_BYTES as u64);
            }
        }
        match plan {
            Plan::Fail(_) => c.status = FAILED,
            Plan::Done => {}
            Plan::Reply(mut data) => {
                data.truncate(left as usize);
                c.data = Data::Reply(data, 0);
            }
            Plan::Transfer {
                offset, len, fua, ..
            } => c.data = Data::Blocks(Span { offset, len, fua }),
            Plan::Work { .. } => c.data = Data::Work,
            Plan::Parameters { len, .. } => {
                c.data = Data::Parameters(len.min(MAX_PARAMETERS), Vec::new());
            }
        }
        self.phase = Phase::Command(c);
        Answer::Moved(CBW_BYTES as u64)
    }

    fn stall(&mut self, endpoint: u8) -> Answer {
        self.core.halt(endpoint);
        Answer::Stall
    }

    /// A transfer of the data phase.
    fn data(&mut self, bus: Bus<'_>, buffers: &Buffers) -> Answer {
        let Phase::Command(c) = &mut self.phase else {
            return Answer::Stall;
        };
        let room = buffers.len().min(c.left.into());
        match &mut c.data {
            Data::Blocks(span) if span.len > 0 && room > 0 => {
                let n = room.min(span.len);
                let plan = self.unit.plan(&c.cdb);
                let Plan::Transfer {
                    backend, direction, ..
                } = plan
                else {
                    // The medium was taken out, or something is to be reported first.
                    c.status = FAILED;
                    c.data = Data::None;
                    return self.data(bus, buffers);
                };
                // LIMIT: transfers are whole blocks. Each but the last is whole packets, and the
                // drivers that there are use whole blocks, or 64 KiB.
                let block = u64::from(backend.info().block_bytes.max(1));
                if !n.is_multiple_of(block) || matches!(buffers, Buffers::Immediate(_)) {
                    c.status = PHASE_ERROR;
                    c.data = Data::None;
                    return self.data(bus, buffers);
                }
                let plan = Plan::Transfer {
                    backend,
                    direction,
                    offset: span.offset,
                    len: n,
                    fua: span.fua,
                };
                let bufs = buffers.pieces().to_vec();
                return Answer::Work(Work { plan, bufs });
            }
            Data::Reply(data, sent) if c.is_in => {
                let from = (*sent as usize).min(data.len());
                let part = &data[from..data.len().min(from + room as usize)];
                if buffers.write(bus.memory, part).is_err() {
                    return Answer::Fault;
                }
                *sent += part.len() as u32;
                c.residue -= (part.len() as u32).min(c.residue);
                let used = part.len() as u64;
                return self.filled(bus, buffers, used, room);
            }
            Data::Parameters(wanted, data) if !c.is_in => {
                let n = room.min(u64::from(*wanted) - (data.len() as u64).min((*wanted).into()));
                let mut part = vec![0; n as usize];
                match buffers.read(bus.memory, &mut part) {
                    Ok(n) => part.truncate(n),
                    Err(_) => return Answer::Fault,
                }
                c.residue -= (part.len() as u32).min(c.residue);
                data.extend(part);
            }
            _ => {
                if c.is_in {
                    return self.filled(bus, buffers, 0, room);
                }
            }
        }
        self.moved(room)
    }

    /// Fills the transfer with zeroes from `used` to `room`.
    fn filled(&mut self, bus: Bus<'_>, buffers: &Buffers, used: u64, room: u64) -> Answer {
        let mut at = 0;
        for b in buffers.pieces() {
            let end = at + u64::from(b.len);
            let (from, to) = (used.max(at), room.min(end));
            if from < to && bus.memory.fill_zero(b.gpa + from - at, to - from).is_err() {
                return Answer::Fault;
            }
            at = end;
        }
        self.moved(room)
    }

    /// So many bytes of the data phase are over.
    fn moved(&mut self, n: u64) -> Answer {
        if let Phase::Command(c) = &mut self.phase {
            c.left = c.left.saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
        }
        Answer::Moved(n)
    }

    /// The host asks for the status.
    fn status(&mut self, bus: Bus<'_>, buffers: &Buffers) -> Answer {
        let Phase::Command(c) = &mut self.phase else {
            return Answer::Stall;
        };
        let work = match std::mem::replace(&mut c.data, Data::None) {
            Data::Work => Some(self.unit.plan(&c.cdb)),
            Data::Parameters(wanted, data) => match self.unit.plan(&c.cdb) {
                Plan::Parameters { what, .. } if data.len() == wanted as usize => {
                    Some(self.unit.parameters(what, &data))
                }
                Plan::Parameters { .. } => {
                    c.status = PHASE_ERROR;
                    None
                }
                other => Some(other),
            },
            _ => None,
        };
        match work {
            None | Some(Plan::Done) => {}
            Some(plan @ Plan::Work { .. }) => {
                let bufs = Vec::new();
                return Answer::Work(Work { plan, bufs });
            }
            Some(_) => c.status = FAILED,
        }
        self.wrapper(bus, buffers)
    }

    /// Sends the command status wrapper.
    fn wrapper(&mut self, bus: Bus<'_>, buffers: &Buffers) -> Answer {
        let Phase::Command(c) = &self.phase else {
            return Answer::Stall;
        };
        let mut b = [0; CSW_BYTES];
        b[..4].copy_from_slice(&CSW_SIGNATURE.to_le_bytes());
        b[4..8].copy_from_slice(&c.tag.to_le_bytes());
        b[8..12].copy_from_slice(&c.residue.to_le_bytes());
        b[12] = c.status;
        match buffers.write(bus.memory, &b) {
            Ok(n) => {
                self.phase = Phase::Idle;
                Answer::Moved(n)
            }
            Err(_) => Answer::Fault,
        }
    }
}

impl UsbDevice for Storage {
    fn name(&self) -> &'static str {
        "storage"
    }
    fn speed(&self) -> Speed {
        Speed::Super
    }
    fn control(&mut self, s: Setup, _: &[u8]) -> Option<Vec<u8>> {
        match (s.kind, s.request) {
            // Get Max LUN and Bulk-Only Mass Storage Reset, BOT §3.
            (0xa1, 0xfe) if s.index == 0 => Some(vec![0]),
            (0x21, 0xff) if s.index == 0 => {
                self.phase = Phase::Idle;
                Some(Vec::new())
            }
            _ if s.kind & 0x60 == 0 => self.core.standard(s),
            _ => None,
        }
    }
    fn transfer(&mut self, bus: Bus<'_>, endpoint: u8, buffers: &Buffers) -> Answer {
        if !self.core.is_open(endpoint) || self.core.is_halted(endpoint) {
            return Answer::Stall;
        }
        match (&self.phase, endpoint) {
            (Phase::Lost, _) => self.stall(endpoint),
            (Phase::Command(c), OUT) if c.left > 0 && !c.is_in => self.data(bus, buffers),
            // A host that has given a command up begins with another one.
            (_, OUT) => self.command(bus, buffers),
            (Phase::Command(c), _) if c.left > 0 && c.is_in => self.data(bus, buffers),
            (Phase::Command(c), _) if c.left == 0 => self.status(bus, buffers),
            (_, _) => Answer::Wait,
        }
    }
    fn finished(
        &mut self,
        bus: Bus<'_>,
        _endpoint: u8,
        buffers: &Buffers,
        outcome: &Outcome,
    ) -> Answer {
        let Phase::Command(c) = &mut self.phase else {
            return Answer::Stall; // it was reset meanwhile
        };
        if let Err(sense) = outcome.result {
            self.unit.note(sense);
            c.status = FAILED;
        }
        let Data::Blocks(span) = &mut c.data else {
            return self.wrapper(bus, buffers);
        };
        let n = outcome.bytes.min(span.len);
        span.offset += n;
        span.len -= n;
        c.residue = c.residue.saturating_sub(n as u32);
        if outcome.result.is_err() {
            c.data = Data::None;
        }
        let room = buffers.len().min(c.left.into());
        if c.is_in {
            return self.filled(bus, buffers, n, room);
        }
        self.moved(room)
    }
    fn reset(&mut self) {
        self.core.reset();
        self.unit.transport_reset();
        self.phase = Phase::Idle;
    }
    fn power_on(&mut self) {
        self.core.reset();
        self.unit.reset();
        self.phase = Phase::Idle;
    }
    fn save(&self) -> Vec<u8> {
        let Storage { core, unit, phase } = self;
        let saved = Saved {
            core: core.save(),
            phase: phase.clone(),
            unit: unit.save(),
        };
        // Encoding into a Vec cannot fail.
        minicbor::to_vec(&saved).unwrap_or_default()
    }
    fn restore(&mut self, body: &[u8]) -> Result<(), String> {
        let saved: Saved = minicbor::decode(body).map_err(|e| format!("storage: {e}"))?;
        let Saved { core, phase, unit } = saved;
        if let Phase::Command(c) = &phase {
            let fits = match &c.data {
                Data::Reply(data, sent) => *sent as usize <= data.len(),
                Data::Parameters(wanted, data) => {
                    *wanted <= MAX_PARAMETERS && data.len() <= *wanted as usize
                }
                Data::Blocks(s) => s.offset.checked_add(s.len).is_some(),
                Data::None | Data::Work => true,
            };
            if !fits || c.cdb.len() > 16 {
                return Err("storage: an impossible command".into());
            }
        }
        self.unit.restore(&unit)?;
        self.core.restore(core);
        self.phase = phase;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let phase = match &self.phase {
            Phase::Idle => "idle",
            Phase::Command(_) => "command",
            Phase::Lost => "lost",
        };
        let product = self.unit.identity().product.clone();
        Inspect::node([
            ("product", Inspect::Text(product)),
            ("in_use", Inspect::Bool(self.core.is_configured())),
            ("phase", Inspect::Text(phase.into())),
        ])
    }
}
