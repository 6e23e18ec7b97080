//! SCSI host. virtio 1.3 §5.6.
//!
//! A target is a disk or a CD drive with one logical unit, whose commands
//! [`pyrite_disk::scsi`] understands. As in the block device, a notification takes every
//! available chain and nothing waits; task management alone waits until the unit's commands are
//! back, which is what it is for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::{
    Direction, Outcome, Plan, Sense, Unit, UnitSaved, execute, with_parameters,
};
use pyrite_state::{Inspect, StateError};
use pyrite_vdev::bus::lock;

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::queue::Chain;
use crate::spec::VIRTIO_ID_SCSI;

#[cfg(test)]
mod tests;

const VIRTIO_SCSI_F_HOTPLUG: u32 = 1;
const VIRTIO_SCSI_F_CHANGE: u32 = 2;

const CONTROL: usize = 0;
const EVENT: usize = 1;
const FIRST_REQUEST: usize = 2;

/// LIMIT: targets of a host.
pub const MAX_TARGETS: u8 = 64;
/// LIMIT: events that wait for a buffer; more are told as missed.
const MAX_EVENTS: usize = 64;
/// Bytes of a request before its command block, and of a response before its sense data. §5.6.6.1.
const REQUEST_HEADER: usize = 19;
const RESPONSE_HEADER: usize = 12;
/// Sizes of command block and sense data until the driver changes them, and their places in the
/// configuration. §5.6.4.
const SENSE_SIZE: u32 = 96;
const CDB_SIZE: u32 = 32;
const CONFIG_SENSE_SIZE: u64 = 20;
const CONFIG_CDB_SIZE: u64 = 24;
/// LIMIT: what the driver may set them to.
const MAX_SENSE_SIZE: u32 = 252;
const MAX_CDB_SIZE: u32 = 255;

const STATUS_CHECK_CONDITION: u8 = 2;

const VIRTIO_SCSI_S_OK: u8 = 0;
const VIRTIO_SCSI_S_OVERRUN: u8 = 1;
const VIRTIO_SCSI_S_BAD_TARGET: u8 = 3;
const VIRTIO_SCSI_S_FUNCTION_SUCCEEDED: u8 = 10;
const VIRTIO_SCSI_S_FUNCTION_REJECTED: u8 = 11;
const VIRTIO_SCSI_S_INCORRECT_LUN: u8 = 12;

const VIRTIO_SCSI_T_NO_EVENT: u32 = 0;
const VIRTIO_SCSI_T_TRANSPORT_RESET: u32 = 1;
const VIRTIO_SCSI_T_PARAM_CHANGE: u32 = 3;
const VIRTIO_SCSI_T_EVENTS_MISSED: u32 = 0x8000_0000;
const VIRTIO_SCSI_EVT_RESET_RESCAN: u32 = 1;
const VIRTIO_SCSI_EVT_RESET_REMOVED: u32 = 2;

/// How a SCSI host is shown to the guest.
#[derive(Clone, Debug)]
pub struct ScsiConfig {
    /// Number of request queues, 1 to 62.
    pub queues: u16,
    /// Entries of each queue, a power of two up to 1024.
    pub queue_size: u16,
}

impl Default for ScsiConfig {
    fn default() -> Self {
        ScsiConfig {
            queues: 1,
            queue_size: 256,
        }
    }
}

/// A target.
struct Target {
    unit: Unit,
    /// Commands that a back end works on.
    busy: u32,
    /// Task management that waits for them.
    waiting: Vec<(Chain, bool)>,
    /// The host has taken it away; the last command ends it.
    removed: bool,
}

/// An event for the driver. §5.6.6.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Event {
    #[n(0)]
    event: u32,
    #[n(1)]
    target: u8,
    #[n(2)]
    reason: u32,
}

#[derive(Default)]
struct State {
    targets: BTreeMap<u8, Target>,
    events: VecDeque<Event>,
    missed: bool,
    reads: u64,
    writes: u64,
    others: u64,
    errors: u64,
}

/// What the device shares with completions and the host's control.
#[derive(Default)]
struct Shared {
    link: Mutex<Option<Arc<DriverLink>>>,
    // LOCK ORDER: this < queue. Not held while a back end is called.
    state: Mutex<State>,
}

/// The host's hand on the targets.
#[derive(Clone)]
pub struct ScsiControl {
    shared: Arc<Shared>,
}

/// A target could not be plugged in or taken out.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The number is taken or too large.
    #[error("SCSI target {0} is taken, or beyond the {MAX_TARGETS} that there can be")]
    Taken(u8),
    /// There is no such target.
    #[error("there is no SCSI target {0}")]
    Missing(u8),
}

impl ScsiControl {
    /// Plugs a unit in and tells the driver.
    pub fn plug(&self, target: u8, unit: Unit) -> Result<(), PlugError> {
        let mut s = self.shared.lock();
        if target >= MAX_TARGETS || s.targets.contains_key(&target) {
            return Err(PlugError::Taken(target));
        }
        s.targets.insert(target, Target::new(unit));
        self.shared.tell(
            s,
            Event {
                event: VIRTIO_SCSI_T_TRANSPORT_RESET,
                target,
                reason: VIRTIO_SCSI_EVT_RESET_RESCAN,
            },
        );
        Ok(())
    }

    /// Takes a unit out and tells the driver. Commands in flight still finish.
    pub fn unplug(&self, target: u8) -> Result<(), PlugError> {
        let mut s = self.shared.lock();
        match s.targets.get_mut(&target) {
            Some(t) if !t.removed => t.removed = true,
            _ => return Err(PlugError::Missing(target)),
        }
        s.targets.retain(|_, t| !t.removed || t.busy > 0);
        self.shared.tell(
            s,
            Event {
                event: VIRTIO_SCSI_T_TRANSPORT_RESET,
                target,
                reason: VIRTIO_SCSI_EVT_RESET_REMOVED,
            },
        );
        Ok(())
    }

    /// Tells the driver that the medium of a drive was changed.
    pub fn medium_changed(&self, target: u8) {
        let s = self.shared.lock();
        let Sense { asc, ascq, .. } = Sense::MEDIUM_CHANGED;
        self.shared.tell(
            s,
            Event {
                event: VIRTIO_SCSI_T_PARAM_CHANGE,
                target,
                reason: u32::from(asc) | u32::from(ascq) << 8,
            },
        );
    }
}

impl Target {
    fn new(unit: Unit) -> Target {
        Target {
            unit,
            busy: 0,
            waiting: Vec::new(),
            removed: false,
        }
    }
}

/// The address of the only logical unit of a target. §5.6.6.1.
fn lun_of(target: u8) -> [u8; 8] {
    [1, target, 0x40, 0, 0, 0, 0, 0]
}

/// Target and logical unit of an address; `None` if it is not one of this host.
fn address(lun: &[u8]) -> Option<(u8, u16)> {
    match lun {
        [1, target, high, low, 0, 0, 0, 0] if high & 0x80 == 0 => {
            Some((*target, u16::from_be_bytes([high & 0x3f, *low])))
        }
        _ => None,
    }
}

/// What goes back to the driver.
struct Answer {
    response: u8,
    sense: Option<Sense>,
    /// Bytes that moved, and those that the driver had room for.
    moved: u64,
    expected: u64,
    /// Bytes of them that were written to the guest.
    written: u64,
}

impl Answer {
    fn failed(response: u8, expected: u64) -> Answer {
        Answer {
            response,
            sense: None,
            moved: 0,
            expected,
            written: 0,
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn link(&self) -> Option<Arc<DriverLink>> {
        lock(&self.link).clone()
    }

    /// Queues an event and gives out what there are buffers for.
    fn tell(&self, mut s: MutexGuard<'_, State>, event: Event) {
        let wanted = match event.event {
            VIRTIO_SCSI_T_TRANSPORT_RESET => VIRTIO_SCSI_F_HOTPLUG,
            _ => VIRTIO_SCSI_F_CHANGE,
        };
        let Some(link) = self.link().filter(|l| l.driver_ok() && l.has(wanted)) else {
            return; // a driver that comes later looks for itself
        };
        if s.events.len() < MAX_EVENTS {
            s.events.push_back(event);
        } else {
            s.missed = true;
        }
        self.send_events(&link, &mut s);
    }

    fn send_events(&self, link: &Arc<DriverLink>, s: &mut State) {
        while !s.events.is_empty() || s.missed {
            let Some(chain) = link.pop(EVENT) else { return };
            let mut event = s.events.pop_front().unwrap_or(Event {
                event: VIRTIO_SCSI_T_NO_EVENT,
                target: 0,
                reason: 0,
            });
            if std::mem::take(&mut s.missed) {
                event.event |= VIRTIO_SCSI_T_EVENTS_MISSED;
            }
            let mut b = event.event.to_le_bytes().to_vec();
            b.extend(lun_of(event.target));
            b.extend(event.reason.to_le_bytes());
            let n = chain.write_at(link.memory(), 0, &b);
            link.complete(EVENT, chain, n as u32);
        }
    }

    /// Ends a request. Its data are in place already.
    fn answer(
        &self,
        link: &Arc<DriverLink>,
        queue: usize,
        chain: Chain,
        sense_size: u32,
        a: &Answer,
    ) {
        let mut b = vec![0; RESPONSE_HEADER + sense_size as usize];
        let left = a.expected.saturating_sub(a.moved);
        b[4..8].copy_from_slice(&u32::try_from(left).unwrap_or(u32::MAX).to_le_bytes());
        if let Some(sense) = a.sense {
            let data = sense.fixed();
            let n = data.len().min(sense_size as usize);
            b[..4].copy_from_slice(&(n as u32).to_le_bytes());
            b[10] = STATUS_CHECK_CONDITION;
            b[RESPONSE_HEADER..RESPONSE_HEADER + n].copy_from_slice(&data[..n]);
        }
        b[11] = a.response;
        let n = chain.write_at(link.memory(), 0, &b) as u64 + a.written;
        link.complete(queue, chain, u32::try_from(n).unwrap_or(u32::MAX));
    }

    /// A command of a target has come back: what waited for the last one goes on.
    fn released(&self, link: &Arc<DriverLink>, target: u8) {
        let mut s = self.lock();
        let Some(t) = s.targets.get_mut(&target) else {
            return;
        };
        t.busy = t.busy.saturating_sub(1);
        if t.busy > 0 {
            return;
        }
        let waiting = std::mem::take(&mut t.waiting);
        for (_, resets) in &waiting {
            if *resets {
                t.unit.transport_reset();
            }
        }
        if t.removed {
            s.targets.remove(&target);
        }
        drop(s);
        for (chain, _) in waiting {
            control_done(link, chain, VIRTIO_SCSI_S_FUNCTION_SUCCEEDED);
        }
    }
}

/// Ends a task management request: one byte.
fn control_done(link: &Arc<DriverLink>, chain: Chain, response: u8) {
    let n = chain.write_at(link.memory(), 0, &[response]);
    link.complete(CONTROL, chain, n as u32);
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedScsi {
    #[n(0)]
    targets: BTreeMap<u8, UnitSaved>,
    #[n(1)]
    events: Vec<Event>,
    #[n(2)]
    missed: bool,
    #[n(3)]
    sense_size: u32,
    #[n(4)]
    cdb_size: u32,
}

/// The device.
pub struct Scsi {
    shared: Arc<Shared>,
    config: ScsiConfig,
    link: Option<Arc<DriverLink>>,
    sense_size: u32,
    cdb_size: u32,
}

impl Scsi {
    /// A host with these targets, numbered from 0; at most [`MAX_TARGETS`].
    pub fn new(units: Vec<Unit>, mut config: ScsiConfig) -> Scsi {
        config.queues = config.queues.clamp(1, 62);
        config.queue_size = config.queue_size.clamp(4, 1024).next_power_of_two();
        let shared = Arc::new(Shared::default());
        let targets = (0..MAX_TARGETS).zip(units.into_iter().map(Target::new));
        shared.lock().targets = targets.collect();
        Scsi {
            shared,
            config,
            link: None,
            sense_size: SENSE_SIZE,
            cdb_size: CDB_SIZE,
        }
    }

    /// The host's hand on the targets.
    pub fn control(&self) -> ScsiControl {
        ScsiControl {
            shared: Arc::clone(&self.shared),
        }
    }

    fn image(&self) -> [u8; 36] {
        // virtio 1.3 §5.6.4, struct virtio_scsi_config.
        let mut c = [0; 36];
        let mut put = |at: usize, v: u32| c[at..at + 4].copy_from_slice(&v.to_le_bytes());
        put(0, self.config.queues.into());
        // Request and response take two descriptors of the ring.
        put(4, u32::from(self.config.queue_size) - 2);
        put(8, 0xffff); // max_sectors: 32 MiB
        put(12, 128); // cmd_per_lun
        put(16, 16); // event_info_size
        put(CONFIG_SENSE_SIZE as usize, self.sense_size);
        put(CONFIG_CDB_SIZE as usize, self.cdb_size);
        // max_channel 0, max_target
        put(28, u32::from(MAX_TARGETS - 1) << 16);
        put(32, 0); // max_lun
        c
    }

    /// A request: a command for a logical unit. §5.6.6.1.
    fn request(&self, link: &Arc<DriverLink>, queue: usize, chain: Chain) {
        let memory = link.memory();
        let (head, response) = (
            REQUEST_HEADER + self.cdb_size as usize,
            RESPONSE_HEADER + self.sense_size as usize,
        );
        let mut h = vec![0; head];
        if chain.read_at(memory, 0, &mut h) != head || chain.writable_len() < response as u64 {
            // Without a place for the response the request cannot be answered.
            return link.fail(&"SCSI request without header or response");
        }
        let data_out = chain.readable_len() - head as u64;
        let data_in = chain.writable_len() - response as u64;
        let expected = data_out.max(data_in);
        let answer = |chain, a: &Answer| {
            self.shared.answer(link, queue, chain, self.sense_size, a);
        };
        let refuse = |chain, response| answer(chain, &Answer::failed(response, expected));
        let Some((target, lun)) = address(&h[..8]) else {
            return refuse(chain, VIRTIO_SCSI_S_BAD_TARGET);
        };
        let mut s = self.shared.lock();
        let Some(t) = s.targets.get_mut(&target).filter(|t| !t.removed) else {
            drop(s);
            return refuse(chain, VIRTIO_SCSI_S_BAD_TARGET);
        };
        let cdb = &h[REQUEST_HEADER..];
        let plan = if lun == 0 {
            t.unit.plan(cdb)
        } else {
            other_lun(cdb)
        };
        let (direction, len) = plan.data().unwrap_or((Direction::In, 0));
        let (bufs, room) = match direction {
            Direction::In => (chain.writable_bufs(response as u64, data_in), data_in),
            Direction::Out => (chain.readable_bufs(head as u64, data_out), data_out),
        };
        if len > room && !matches!(plan, Plan::Reply(_)) {
            drop(s);
            return refuse(chain, VIRTIO_SCSI_S_OVERRUN);
        }
        let plan = with_parameters(plan, memory, &bufs, |w, data| t.unit.parameters(w, data));
        t.busy += 1;
        match (&plan, direction) {
            (Plan::Transfer { .. }, Direction::In) => s.reads += 1,
            (Plan::Transfer { .. }, Direction::Out) => s.writes += 1,
            _ => s.others += 1,
        }
        drop(s);
        let shared = Arc::clone(&self.shared);
        let (link_then, sense_size) = (Arc::clone(link), self.sense_size);
        let done = move |outcome: Outcome| {
            if outcome.result.is_err() {
                shared.lock().errors += 1;
            }
            let a = Answer {
                response: VIRTIO_SCSI_S_OK,
                sense: outcome.result.err(),
                moved: outcome.bytes,
                expected,
                written: match direction {
                    Direction::In => outcome.bytes,
                    Direction::Out => 0,
                },
            };
            shared.answer(&link_then, queue, chain, sense_size, &a);
            shared.released(&link_then, target);
        };
        execute(plan, memory, &bufs, Box::new(done));
    }

    /// Task management and asynchronous notification. §5.6.6.2.
    fn control_request(&self, link: &Arc<DriverLink>, chain: Chain) {
        const TMF: u32 = 0;
        const AN_QUERY: u32 = 1;
        const AN_SUBSCRIBE: u32 = 2;
        let memory = link.memory();
        let mut h = [0; 24];
        let n = chain.read_at(memory, 0, &mut h);
        let word = |at: usize| u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
        match word(0) {
            TMF if n == h.len() && chain.writable_len() >= 1 => {
                self.manage(link, chain, word(4), address(&h[8..16]));
            }
            // No event can be subscribed to.
            AN_QUERY | AN_SUBSCRIBE if n >= 16 && chain.writable_len() >= 5 => {
                let n = chain.write_at(memory, 0, &[0, 0, 0, 0, VIRTIO_SCSI_S_OK]);
                link.complete(CONTROL, chain, n as u32);
            }
            _ => link.fail(&"SCSI control request that is none"),
        }
    }

    fn manage(&self, link: &Arc<DriverLink>, chain: Chain, function: u32, at: Option<(u8, u16)>) {
        let Some((target, lun)) = at else {
            return control_done(link, chain, VIRTIO_SCSI_S_BAD_TARGET);
        };
        let mut s = self.shared.lock();
        let Some(t) = s.targets.get_mut(&target).filter(|t| !t.removed) else {
            drop(s);
            return control_done(link, chain, VIRTIO_SCSI_S_BAD_TARGET);
        };
        let response = match function {
            _ if lun != 0 => VIRTIO_SCSI_S_INCORRECT_LUN,
            // Abort task (set), clear task set, nexus and logical unit reset: commands are not
            // called back, they are waited for.
            0 | 1 | 3 | 4 | 5 => {
                let resets = matches!(function, 4 | 5);
                if t.busy > 0 {
                    return t.waiting.push((chain, resets));
                }
                if resets {
                    t.unit.transport_reset();
                }
                VIRTIO_SCSI_S_FUNCTION_SUCCEEDED
            }
            // Query task (set): succeeded says that there are some.
            6 | 7 if t.busy > 0 => VIRTIO_SCSI_S_FUNCTION_SUCCEEDED,
            6 | 7 => VIRTIO_SCSI_S_OK,
            _ => VIRTIO_SCSI_S_FUNCTION_REJECTED,
        };
        drop(s);
        control_done(link, chain, response);
    }
}

/// What a logical unit answers that is not there. SPC-4 §6.6.2.
fn other_lun(cdb: &[u8]) -> Plan {
    match cdb {
        [0x12, evpd, _, high, low, ..] if evpd & 1 == 0 => {
            let mut data = vec![0x7f, 0, 5, 2, 31];
            data.resize(36, 0);
            data.truncate(u16::from_be_bytes([*high, *low]).into());
            Plan::Reply(data)
        }
        _ => Plan::Fail(Sense::NO_SUCH_LUN),
    }
}

impl VirtioDevice for Scsi {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_SCSI
    }

    fn class_code(&self) -> u32 {
        0x01_00_00
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_SCSI_F_HOTPLUG | 1 << VIRTIO_SCSI_F_CHANGE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.config.queue_size; FIRST_REQUEST + usize::from(self.config.queues)]
    }

    fn attach(&mut self, link: Arc<DriverLink>) {
        *lock(&self.shared.link) = Some(Arc::clone(&link));
        self.link = Some(link);
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        read_config(&self.image(), offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            CONFIG_SENSE_SIZE => self.sense_size = value.min(MAX_SENSE_SIZE),
            CONFIG_CDB_SIZE => self.cdb_size = value.min(MAX_CDB_SIZE),
            _ => {}
        }
    }

    fn activate(&mut self) {}

    fn notify(&mut self, queue: usize) {
        let Some(link) = self.link.clone() else {
            return;
        };
        if queue == EVENT {
            self.shared.send_events(&link, &mut self.shared.lock());
            return;
        }
        while let Some(chain) = link.pop(queue) {
            match queue {
                CONTROL => self.control_request(&link, chain),
                _ => self.request(&link, queue, chain),
            }
        }
    }

    fn reset(&mut self) {
        self.sense_size = SENSE_SIZE;
        self.cdb_size = CDB_SIZE;
        let mut s = self.shared.lock();
        s.events.clear();
        s.missed = false;
        for t in s.targets.values_mut() {
            t.waiting.clear();
            t.unit.transport_reset();
        }
    }

    fn start(&mut self) {}

    fn pause(&mut self) {}

    fn drained(&mut self) -> bool {
        self.shared.lock().targets.values().all(|t| t.busy == 0)
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let s = self.shared.lock();
        let targets = s.targets.iter().map(|(n, t)| (*n, t.unit.save()));
        Ok(encode_body(&SavedScsi {
            targets: targets.collect(),
            events: s.events.iter().copied().collect(),
            missed: s.missed,
            sense_size: self.sense_size,
            cdb_size: self.cdb_size,
        }))
    }

    fn restore(&mut self, body: &[u8], _active: bool) -> Result<(), StateError> {
        let unit = self.link.as_ref().map_or("virtio-scsi", |l| l.name());
        let SavedScsi {
            targets,
            events,
            missed,
            sense_size,
            cdb_size,
        } = decode_body(unit, body)?;
        let invalid = |detail: String| StateError::Invalid {
            unit: unit.to_owned(),
            detail,
        };
        let mut s = self.shared.lock();
        if !s.targets.keys().eq(targets.keys()) {
            let list: Vec<_> = targets.keys().collect();
            return Err(invalid(format!("it had the targets {list:?}")));
        }
        for (n, t) in &mut s.targets {
            if let Some(saved) = targets.get(n) {
                t.unit
                    .restore(saved)
                    .map_err(|e| invalid(format!("target {n}: {e}")))?;
            }
        }
        s.events = events.into_iter().take(MAX_EVENTS).collect();
        s.missed = missed;
        drop(s);
        self.sense_size = sense_size.min(MAX_SENSE_SIZE);
        self.cdb_size = cdb_size.min(MAX_CDB_SIZE);
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let s = self.shared.lock();
        let targets = s.targets.iter().map(|(n, t)| {
            let node = Inspect::node([
                ("product", Inspect::Text(t.unit.identity().product.clone())),
                ("busy", Inspect::Uint(t.busy.into())),
            ]);
            (n.to_string(), node)
        });
        Inspect::node([
            ("reads", Inspect::Uint(s.reads)),
            ("writes", Inspect::Uint(s.writes)),
            ("others", Inspect::Uint(s.others)),
            ("errors", Inspect::Uint(s.errors)),
            ("targets", Inspect::Node(targets.collect())),
        ])
    }
}
