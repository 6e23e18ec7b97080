//! Transfers: from a descriptor in a ring to a device and back. §4.10 and §4.11.

use pyrite_disk::scsi::Outcome;
use pyrite_mem::GuestMemory;

use super::controller::Controller;
use super::ring::{Dequeue, RingError, Td, kind};
use super::slot::{Control, DEFAULT_PIPE, EndpointState};
use super::{Job, code};
use crate::usb::device::{Answer, Buffers, Bus, Setup};

/// A transfer that a disk works on.
pub(super) struct Flight {
    td: Td,
    buffers: Buffers,
}

/// What came of looking at an endpoint.
pub(super) enum Served {
    /// There is nothing more to do for it now.
    Idle,
    /// A transfer is over; another one may follow.
    Again,
    /// A disk is to do something.
    Job(Job),
}

/// The address of an endpoint on the bus.
fn address(endpoint: u8) -> u8 {
    (endpoint / 2) | ((endpoint & 1) << 7)
}

impl Controller {
    /// Serves commands and endpoints until a disk is needed or there is nothing to do.
    pub(super) fn next(&mut self, bus: Bus<'_>) -> Option<Job> {
        while self.running && self.budget > 0 && self.release_events(bus.memory) {
            self.reset_ports();
            if self.next_command(bus.memory) {
                continue;
            }
            let kicked = |(n, s): (&u8, &super::slot::Slot)| {
                (s.kicked != 0).then(|| (*n, s.kicked.trailing_zeros() as u8))
            };
            let (slot, endpoint) = self.slots.iter().find_map(kicked)?;
            match self.serve(bus, slot, endpoint) {
                Served::Again => {}
                Served::Idle => {
                    if let Some(s) = self.slots.get_mut(&slot) {
                        s.kicked &= !(1 << endpoint);
                    }
                }
                Served::Job(job) => return Some(job),
            }
        }
        None
    }

    fn serve(&mut self, bus: Bus<'_>, n: u8, endpoint: u8) -> Served {
        let Some(slot) = self.slots.get_mut(&n) else {
            return Served::Idle;
        };
        let port = usize::from(slot.port);
        let Some(e) = slot.endpoints.get(&endpoint) else {
            return Served::Idle;
        };
        if e.state != EndpointState::Running || self.flights.contains_key(&(n, endpoint)) {
            return Served::Idle;
        }
        slot.waiting &= !(1 << endpoint);
        let dequeue = e.dequeue;
        let td = match Td::read(bus.memory, dequeue) {
            Ok(Some(td)) => td,
            Ok(None) => return Served::Idle,
            Err(RingError::Memory) => {
                self.system_error();
                return Served::Idle;
            }
            Err(RingError::Malformed) => {
                let td = Td::empty(dequeue);
                return self.finish(bus.memory, n, endpoint, &td, code::TRB_ERROR, 0);
            }
        };
        self.budget = self.budget.saturating_sub(td.trbs.len() as u32);
        let Some(buffers) = td.buffers() else {
            return self.finish(bus.memory, n, endpoint, &td, code::TRB_ERROR, 0);
        };
        if matches!(td.kind(), kind::NO_OP | kind::EVENT_DATA) {
            return self.finish(bus.memory, n, endpoint, &td, code::SUCCESS, 0);
        }
        if endpoint == DEFAULT_PIPE {
            let answer = self.control_stage(bus, n, &td, &buffers);
            let (code, moved) = match answer {
                Ok(moved) => (code::SUCCESS, moved),
                Err(code) => (code, 0),
            };
            return self.finish(bus.memory, n, endpoint, &td, code, moved);
        }
        let device = self.devices.get_mut(port).and_then(Option::as_mut);
        let Some(device) = device.filter(|_| td.kind() == kind::NORMAL) else {
            return self.finish(bus.memory, n, endpoint, &td, code::TRB_ERROR, 0);
        };
        let answer = device.transfer(bus, address(endpoint), &buffers);
        self.answered(bus, (n, endpoint), Flight { td, buffers }, answer)
    }

    /// Does what a device has said.
    fn answered(
        &mut self,
        bus: Bus<'_>,
        (n, endpoint): (u8, u8),
        flight: Flight,
        answer: Answer,
    ) -> Served {
        let (code, moved) = match answer {
            Answer::Wait => {
                if let Some(s) = self.slots.get_mut(&n) {
                    s.waiting |= 1 << endpoint;
                }
                return Served::Idle;
            }
            Answer::Work(work) => {
                self.flights.insert((n, endpoint), flight);
                return Served::Job(Job {
                    life: self.life,
                    at: (n, endpoint),
                    work,
                });
            }
            Answer::Moved(moved) => (code::SUCCESS, moved),
            Answer::Stall => (code::STALL_ERROR, 0),
            Answer::Fault => (code::TRANSACTION_ERROR, 0),
        };
        // Its other pipes may have something to say now.
        if let Some(s) = self.slots.get_mut(&n) {
            s.kicked |= std::mem::take(&mut s.waiting);
        }
        self.finish(bus.memory, n, endpoint, &flight.td, code, moved)
    }

    /// A disk has done its work. A job that comes of it again, or `None`.
    pub(super) fn complete(
        &mut self,
        bus: Bus<'_>,
        life: u64,
        at: (u8, u8),
        outcome: &Outcome,
    ) -> Option<Job> {
        if life != self.life {
            self.stale_done();
            return None;
        }
        let flight = self.flights.remove(&at)?;
        let port = self.slots.get(&at.0).map_or(0, |s| usize::from(s.port));
        let answer = match self.devices.get_mut(port) {
            Some(Some(d)) => d.finished(bus, address(at.1), &flight.buffers, outcome),
            _ => Answer::Fault,
        };
        if let Some(s) = self.slots.get_mut(&at.0) {
            s.kicked |= 1 << at.1;
        }
        match self.answered(bus, at, flight, answer) {
            Served::Job(job) => Some(job),
            _ => None,
        }
    }

    /// A stage of a control transfer: bytes moved, or how it failed. USB 2.0 §8.5.3.
    fn control_stage(
        &mut self,
        bus: Bus<'_>,
        n: u8,
        td: &Td,
        buffers: &Buffers,
    ) -> Result<u64, u8> {
        let Some(slot) = self.slots.get_mut(&n) else {
            return Err(code::TRB_ERROR);
        };
        let device = self.devices.get_mut(usize::from(slot.port));
        let Some(Some(device)) = device else {
            return Err(code::TRANSACTION_ERROR);
        };
        if td.kind() == kind::SETUP_STAGE {
            let Some((_, trb)) = td.trbs.first() else {
                return Err(code::TRB_ERROR);
            };
            let setup = Setup::new(trb.parameter.to_le_bytes());
            let mut c = Control {
                setup,
                ..Control::default()
            };
            if setup.is_in() {
                match device.control(setup, &[]) {
                    Some(mut data) => {
                        data.truncate(setup.length.into());
                        c.data = data;
                    }
                    None => c.refused = true,
                }
            }
            slot.control = Some(c);
            return Ok(0);
        }
        // A stage without a setup is answered by nothing.
        let c = slot.control.as_mut().ok_or(code::TRANSACTION_ERROR)?;
        match td.kind() {
            kind::DATA_STAGE | kind::NORMAL => {
                if c.refused {
                    return Err(code::STALL_ERROR);
                }
                let lost = |_| code::TRANSACTION_ERROR;
                if c.setup.is_in() {
                    let rest = c.data.get(c.sent as usize..).unwrap_or_default();
                    let moved = buffers.write(bus.memory, rest).map_err(lost)?;
                    c.sent += moved as u32;
                    return Ok(moved);
                }
                let room = usize::from(c.setup.length).saturating_sub(c.data.len());
                let mut part = vec![0; room.min(buffers.len() as usize)];
                let moved = buffers.read(bus.memory, &mut part).map_err(lost)?;
                part.truncate(moved);
                c.data.extend(part);
                Ok(moved as u64)
            }
            kind::STATUS_STAGE => {
                let Some(c) = slot.control.take() else {
                    return Err(code::TRANSACTION_ERROR);
                };
                if !c.setup.is_in() && device.control(c.setup, &c.data).is_none() || c.refused {
                    return Err(code::STALL_ERROR);
                }
                // A request may open other pipes or clear their halt.
                slot.kicked |= std::mem::take(&mut slot.waiting);
                Ok(0)
            }
            _ => Err(code::TRB_ERROR),
        }
    }

    /// Ends a transfer: tells it, and moves the endpoint on or stops it.
    fn finish(
        &mut self,
        memory: &GuestMemory,
        n: u8,
        endpoint: u8,
        td: &Td,
        code: u8,
        moved: u64,
    ) -> Served {
        let Some(slot) = self.slots.get_mut(&n) else {
            return Served::Idle;
        };
        if let Some(e) = slot.endpoints.get_mut(&endpoint) {
            match code {
                code::SUCCESS => e.dequeue = td.next,
                code::TRB_ERROR => e.state = EndpointState::Error,
                _ => e.state = EndpointState::Halted,
            }
        }
        if code != code::SUCCESS {
            let published = slot.publish(memory, endpoint);
            self.or_system_error(published);
        }
        let events = td.events(n, endpoint, code, moved);
        self.report(memory, events);
        Served::Again
    }

    /// Tells that a transfer that was under way at `dequeue` was stopped. §4.6.9.
    pub(super) fn report_stopped(
        &mut self,
        memory: &GuestMemory,
        n: u8,
        endpoint: u8,
        dequeue: Dequeue,
    ) {
        if let Ok(Some(td)) = Td::read(memory, dequeue) {
            let events = td.events(n, endpoint, code::STOPPED, 0);
            self.report(memory, events);
        }
    }
}
