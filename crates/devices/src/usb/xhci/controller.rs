//! Registers, the command ring, and what is told by events. §5 and §4.6.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use pyrite_mem::{GuestMemory, MemError};
use pyrite_state::Inspect;
use pyrite_vdev::PciInterrupts;

use super::interrupter::Interrupter;
use super::port::Port;
use super::ring::{Dequeue, Report, RingError, Trb, kind};
use super::slot::{DEFAULT_PIPE, EndpointState, Input, Slot, SlotState};
use super::transfer::Flight;
use super::{
    DOORBELLS_AT, INTERRUPTERS, MAX_SLOTS, OPERATIONAL_AT, PORTS, PORTS_AT, PROTOCOLS_AT,
    RUNTIME_AT, USB2_PORTS, USB3_PORTS, code,
};
use crate::usb::device::{self, Bus, Heard, Speed, UsbDevice};

/// LIMIT: blocks that are read for one reason. What is left, perhaps of a ring that leads on for
/// ever, is gone on with after [`PAUSE_NS`] of guest time.
pub(super) const BUDGET: u32 = 1 << 14;
/// See [`BUDGET`].
pub(super) const PAUSE_NS: u64 = 10_000_000;
/// Nanoseconds of a microframe.
const MICROFRAME_NS: u64 = 125_000;

/// USBCMD, §5.4.1.
const RUN: u32 = 1 << 0;
const RESET: u32 = 1 << 1;
const INTERRUPT_ENABLE: u32 = 1 << 2;
const LIGHT_RESET: u32 = 1 << 7;
const RESTORE_STATE: u32 = 1 << 9;
const COMMAND_WRITABLE: u32 = RUN | INTERRUPT_ENABLE | 1 << 3 | 1 << 10;
/// USBSTS, §5.4.2.
const HALTED: u32 = 1 << 0;
const SYSTEM_ERROR: u32 = 1 << 2;
const EVENT_INTERRUPT: u32 = 1 << 3;
const PORT_CHANGE: u32 = 1 << 4;
const RESTORE_ERROR: u32 = 1 << 10;
const NOT_READY: u32 = 1 << 11;
const STATUS_CLEARABLE: u32 = SYSTEM_ERROR | EVENT_INTERRUPT | PORT_CHANGE | RESTORE_ERROR;
/// CRCR, §5.4.5.
const RING_CYCLE: u32 = 1 << 0;
const RING_STOP: u32 = 1 << 1;
const RING_ABORT: u32 = 1 << 2;
const RING_RUNNING: u32 = 1 << 3;

/// Registers that the driver writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    command: u32,
    #[n(1)]
    status: u32,
    #[n(2)]
    notifications: u32,
    /// Device context base address array.
    #[n(3)]
    contexts: u64,
    #[n(4)]
    config: u32,
    #[n(5)]
    ring: Dequeue,
    #[n(6)]
    ring_running: bool,
}

/// State of a controller.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct ControllerSaved {
    #[n(0)]
    registers: Registers,
    #[n(1)]
    interrupters: Vec<Interrupter>,
    #[n(2)]
    ports: Vec<Port>,
    #[n(3)]
    slots: BTreeMap<u8, Slot>,
    /// By port.
    #[n(4)]
    devices: BTreeMap<u8, minicbor::bytes::ByteVec>,
}

pub(super) struct Controller {
    interrupts: PciInterrupts,
    r: Registers,
    interrupters: Vec<Interrupter>,
    ports: Vec<Port>,
    pub(super) slots: BTreeMap<u8, Slot>,
    pub(super) devices: Vec<Option<Box<dyn UsbDevice>>>,
    /// Transfers that disks work on, by slot and endpoint.
    pub(super) flights: BTreeMap<(u8, u8), Flight>,
    /// Those of earlier lives: their outcome goes nowhere.
    stale: u32,
    pub(super) life: u64,
    pub(super) budget: u32,
    /// Between start and pause.
    pub(super) running: bool,
    /// A thread is serving the rings.
    pub(super) pumping: bool,
}

impl Controller {
    /// Devices are plugged into the ports of their speed, in their order; those without a port are
    /// left out.
    pub(super) fn new(devices: Vec<Box<dyn UsbDevice>>, interrupts: PciInterrupts) -> Controller {
        let mut ports: Vec<Option<Box<dyn UsbDevice>>> = (0..PORTS).map(|_| None).collect();
        for d in devices {
            let range = match d.speed() {
                Speed::Super => 0..USB3_PORTS,
                Speed::High => USB3_PORTS..PORTS,
            };
            if let Some(port) = ports[range].iter_mut().find(|p| p.is_none()) {
                *port = Some(d);
            }
        }
        let mut c = Controller {
            interrupts,
            r: Registers::default(),
            interrupters: Vec::new(),
            ports: Vec::new(),
            slots: BTreeMap::new(),
            devices: ports,
            flights: BTreeMap::new(),
            stale: 0,
            life: 0,
            budget: 0,
            running: false,
            pumping: false,
        };
        c.power_on();
        c
    }

    /// Transfers under way.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len() + self.stale as usize
    }

    /// HCRST: all but what is plugged in. §5.4.1.
    fn host_reset(&mut self) {
        self.life += 1;
        self.stale += self.flights.len() as u32;
        self.flights.clear();
        self.slots.clear();
        self.r = Registers::default();
        self.interrupters = (0..INTERRUPTERS).map(|_| Interrupter::power_on()).collect();
        let devices = self.devices.iter_mut();
        self.ports = devices
            .map(|d| {
                Port::power_on(d.as_mut().map(|d| {
                    d.reset();
                    d.speed()
                }))
            })
            .collect();
        self.interrupts.set_intx(false);
    }

    pub(super) fn power_on(&mut self) {
        self.host_reset();
        for d in self.devices.iter_mut().flatten() {
            d.power_on();
        }
    }

    /// A transfer of an earlier life has come back.
    pub(super) fn stale_done(&mut self) {
        self.stale = self.stale.saturating_sub(1);
    }

    fn is_running(&self) -> bool {
        self.r.command & RUN != 0
    }

    pub(super) fn read(&self, offset: u64, now_ns: u64) -> u32 {
        let r = &self.r;
        let high = |v: u64| (v >> 32) as u32;
        match offset {
            // Capabilities, §5.3: version 1.0, 64-bit addresses, contexts of 32 bytes, one segment
            // for an event ring, no streams, no scratchpad.
            0x00 => 0x0100_0000 | OPERATIONAL_AT as u32,
            0x04 => (PORTS as u32) << 24 | (INTERRUPTERS as u32) << 8 | u32::from(MAX_SLOTS),
            0x08 => 0xf,
            0x10 => (PROTOCOLS_AT as u32 / 4) << 16 | 1,
            0x14 => DOORBELLS_AT as u32,
            0x18 => RUNTIME_AT as u32,
            // Supported protocols, §7.2: those of USB 3 have the first ports.
            0x600 => 0x0300_0402,
            0x610 => 0x0200_0002,
            0x604 | 0x614 => u32::from_le_bytes(*b"USB "),
            0x608 => (USB3_PORTS as u32) << 8 | 1,
            0x618 => ((PORTS - USB3_PORTS) as u32) << 8 | (USB3_PORTS as u32 + 1),
            0x40 => r.command | if self.stale > 0 { RESET } else { 0 },
            0x44 => {
                let rest = !self.is_running() && self.flights.is_empty();
                let halted = if rest { HALTED } else { 0 };
                r.status | halted | if self.stale > 0 { NOT_READY } else { 0 }
            }
            0x48 => 1, // pages of 4 KiB
            0x54 => r.notifications,
            0x58 => u32::from(r.ring_running) * RING_RUNNING,
            0x70 => r.contexts as u32,
            0x74 => high(r.contexts),
            0x78 => r.config,
            PORTS_AT..0x600 => {
                let (n, register) = port_place(offset);
                let port = self.ports.get(n);
                port.map_or(0, |p| match register {
                    0 => p.read(),
                    4 => p.power,
                    _ => 0,
                })
            }
            RUNTIME_AT => (now_ns / MICROFRAME_NS) as u32 & 0x3fff,
            _ => match interrupter_place(offset) {
                Some((n, register)) => self.interrupters[n].read(register),
                None => 0,
            },
        }
    }

    /// `mask` has the bytes that are written.
    pub(super) fn write(&mut self, offset: u64, value: u32, mask: u32) {
        let merge = |old: u32| old & !mask | value & mask;
        let low = |old: u64| old & !0xffff_ffff | u64::from(merge(old as u32) & !0x3f);
        let high = |old: u64| old & 0xffff_ffff | u64::from(merge((old >> 32) as u32)) << 32;
        let v = value & mask;
        match offset {
            0x40 => self.command(v, merge(self.r.command)),
            0x44 => self.r.status &= !(v & STATUS_CLEARABLE),
            0x54 => self.r.notifications = merge(self.r.notifications) & 0xffff,
            0x58 if self.r.ring_running => {
                if v & (RING_STOP | RING_ABORT) != 0 {
                    self.r.ring_running = false;
                    let at = self.r.ring.at;
                    self.tell(command_event(at, code::COMMAND_RING_STOPPED, 0));
                }
            }
            0x58 => {
                self.r.ring.at = low(self.r.ring.at);
                if mask & 0xff != 0 {
                    self.r.ring.cycle = v & RING_CYCLE != 0;
                }
            }
            0x5c if !self.r.ring_running => self.r.ring.at = high(self.r.ring.at),
            0x70 => self.r.contexts = low(self.r.contexts),
            0x74 => self.r.contexts = high(self.r.contexts),
            0x78 => self.r.config = merge(self.r.config) & 0xff,
            PORTS_AT..0x600 => self.port_write(offset, value, mask),
            DOORBELLS_AT.. => self.doorbell((offset - DOORBELLS_AT) / 4, v),
            _ => {
                if let Some((n, register)) = interrupter_place(offset) {
                    self.interrupters[n].write(register, value, mask);
                }
            }
        }
    }

    fn command(&mut self, v: u32, merged: u32) {
        if v & (RESET | LIGHT_RESET) != 0 {
            return self.host_reset();
        }
        if v & RESTORE_STATE != 0 {
            // Nothing was saved (CSS keeps nothing): the driver starts anew.
            self.r.status |= RESTORE_ERROR;
        }
        let was = self.is_running();
        self.r.command = merged & COMMAND_WRITABLE;
        if self.is_running() && !was {
            // What happened to ports before is told now. §4.19.3.
            for n in 0..PORTS {
                if self.ports[n].has_changes() {
                    self.port_changed(n);
                }
            }
        }
        if !self.is_running() {
            self.r.ring_running = false;
        }
    }

    fn port_write(&mut self, offset: u64, value: u32, mask: u32) {
        let (n, register) = port_place(offset);
        let Some(port) = self.ports.get_mut(n) else {
            return;
        };
        match register {
            0 => {
                if port.write(value, mask) {
                    self.port_changed(n);
                }
                self.reset_ports();
            }
            4 => port.power = (port.power & !mask | value & mask) & 0x1_ffff,
            _ => {}
        }
    }

    /// Resets ports that wait for it and whose device has nothing under way.
    pub(super) fn reset_ports(&mut self) {
        for n in 0..PORTS {
            let Some(warm) = self.ports[n].resets else {
                continue;
            };
            let busy = |slot: &u8| {
                self.slots
                    .get(slot)
                    .is_some_and(|s| usize::from(s.port) == n)
            };
            if self.flights.keys().any(|(slot, _)| busy(slot)) {
                continue;
            }
            if let Some(d) = &mut self.devices[n] {
                d.reset();
            }
            self.ports[n].reset_done(warm);
            self.port_changed(n);
        }
    }

    fn port_changed(&mut self, n: usize) {
        self.r.status |= PORT_CHANGE;
        if !self.is_running() {
            return;
        }
        self.tell(Trb {
            parameter: (n as u64 + 1) << 24,
            status: u32::from(code::SUCCESS) << 24,
            control: u32::from(kind::PORT_STATUS_CHANGE) << 10,
        });
    }

    fn doorbell(&mut self, n: u64, value: u32) {
        if !self.is_running() {
            return;
        }
        if n == 0 {
            self.r.ring_running |= value & 0xff == 0;
            return;
        }
        let Some(slot) = u8::try_from(n).ok().and_then(|n| self.slots.get_mut(&n)) else {
            return;
        };
        let endpoint = (value & 0xff) as u8;
        if let Some(e) = slot.endpoints.get_mut(&endpoint) {
            if e.state == EndpointState::Stopped {
                e.state = EndpointState::Running;
            }
            slot.kicked |= 1 << endpoint;
        }
    }

    /// Puts an event that is not of a transfer into the first ring, at the next chance.
    fn tell(&mut self, event: Trb) {
        self.interrupters[0].hold(event);
    }

    pub(super) fn report(&mut self, memory: &GuestMemory, reports: Vec<Report>) {
        for r in reports {
            let n = usize::from(r.interrupter).min(INTERRUPTERS - 1);
            let put = self.interrupters[n].push(memory, r.event, r.interrupts);
            self.or_system_error(put);
        }
    }

    /// Memory that the controller itself needs is not there. §4.10.2.6.
    pub(super) fn or_system_error<T>(&mut self, r: Result<T, MemError>) -> Option<T> {
        r.map_err(|_| self.system_error()).ok()
    }

    pub(super) fn system_error(&mut self) {
        self.r.status |= SYSTEM_ERROR;
        self.r.command &= !RUN;
        self.r.ring_running = false;
    }

    /// Brings held events out; whether all went.
    pub(super) fn release_events(&mut self, memory: &GuestMemory) -> bool {
        if !self.is_running() {
            return false;
        }
        for n in 0..INTERRUPTERS {
            let released = self.interrupters[n].release(memory);
            self.or_system_error(released);
        }
        self.is_running() && !self.interrupters.iter().any(Interrupter::is_held)
    }

    /// Raises and lowers interrupts. §4.17.
    pub(super) fn update_interrupts(&mut self) {
        let enabled = self.r.command & INTERRUPT_ENABLE != 0;
        let mut level = false;
        for (n, i) in (0..).zip(&mut self.interrupters) {
            if i.take_due() {
                self.r.status |= EVENT_INTERRUPT;
            }
            if enabled && i.asserts() {
                if self.interrupts.signal(n) {
                    i.message_sent();
                } else {
                    level = true;
                }
            }
        }
        self.interrupts.set_intx(level);
    }

    /// Something of the slot is under way.
    fn is_busy(&self, slot: u8) -> bool {
        self.flights
            .range((slot, 0)..=(slot, u8::MAX))
            .next()
            .is_some()
    }

    /// Takes the next command, if there is one and it can be done now.
    pub(super) fn next_command(&mut self, memory: &GuestMemory) -> bool {
        if !self.r.ring_running {
            return false;
        }
        let mut ring = self.r.ring;
        let (at, trb) = match ring.next(memory) {
            Ok(Some(t)) => t,
            Ok(None) => return false,
            Err(RingError::Memory | RingError::Malformed) => {
                self.system_error();
                return false;
            }
        };
        // A transfer cannot be called back: what would take its endpoint away waits for it.
        if self.is_busy(trb.slot()) {
            return false;
        }
        self.r.ring = ring;
        self.budget = self.budget.saturating_sub(1);
        let mut slot = trb.slot();
        let result = match trb.kind() {
            kind::ENABLE_SLOT => self.enable_slot().map(|n| slot = n),
            kind::NO_OP_COMMAND => {
                slot = 0;
                Ok(())
            }
            _ => self.slot_command(memory, &trb),
        };
        let code = result.err().unwrap_or(code::SUCCESS);
        self.report(memory, vec![command_event_report(at, code, slot)]);
        true
    }

    fn enable_slot(&mut self) -> Result<u8, u8> {
        let most = (self.r.config & 0xff).min(MAX_SLOTS.into()) as u8;
        let free = (1..=most).find(|n| !self.slots.contains_key(n));
        let n = free.ok_or(code::NO_SLOTS)?;
        self.slots.insert(n, Slot::default());
        Ok(n)
    }

    fn slot_command(&mut self, memory: &GuestMemory, trb: &Trb) -> Result<(), u8> {
        let n = trb.slot();
        if !(kind::DISABLE_SLOT..=kind::RESET_DEVICE).contains(&trb.kind()) {
            return Err(code::TRB_ERROR);
        }
        if !self.slots.contains_key(&n) {
            return Err(code::SLOT_NOT_ENABLED);
        }
        if trb.kind() == kind::ADDRESS_DEVICE {
            return self.address_device(memory, trb);
        }
        let Some(slot) = self.slots.get_mut(&n) else {
            return Err(code::SLOT_NOT_ENABLED);
        };
        match trb.kind() {
            kind::DISABLE_SLOT => {
                slot.disabled(memory);
                self.slots.remove(&n);
                Ok(())
            }
            kind::CONFIGURE_ENDPOINT => {
                let deconfigure = trb.control & 1 << 9 != 0;
                let input = match deconfigure {
                    true => None,
                    false => Some(Input::read(memory, trb.parameter)?),
                };
                slot.configure(memory, input.as_ref())
            }
            kind::EVALUATE_CONTEXT => {
                let input = Input::read(memory, trb.parameter)?;
                slot.evaluate(memory, &input)
            }
            kind::RESET_DEVICE => slot.reset(memory),
            _ => self.endpoint_command(memory, trb),
        }
    }

    /// §4.6.5.
    fn address_device(&mut self, memory: &GuestMemory, trb: &Trb) -> Result<(), u8> {
        let n = trb.slot();
        let only_default = trb.control & 1 << 9 != 0;
        let input = Input::read(memory, trb.parameter)?;
        if input.add & 3 != 3 {
            return Err(code::PARAMETER_ERROR);
        }
        let port = Slot::port_of(memory, &input)?;
        let at = self.r.contexts.checked_add(8 * u64::from(n));
        let context = at
            .and_then(|at| memory.read_u64(at).ok())
            .map(|c| c & !0x3f);
        let context = context.filter(|c| c.checked_add(0x400).is_some());
        let context = context.ok_or(code::PARAMETER_ERROR)?;
        let state = self.slots.get(&n).map(|s| s.state);
        let fits = match state {
            Some(SlotState::Enabled) => true,
            Some(SlotState::Default) => !only_default,
            _ => false,
        };
        if !fits {
            return Err(code::CONTEXT_STATE_ERROR);
        }
        if self
            .slots
            .iter()
            .any(|(m, s)| *m != n && s.port == port && s.state != SlotState::Enabled)
        {
            return Err(code::PARAMETER_ERROR);
        }
        let there = self
            .devices
            .get(usize::from(port))
            .is_some_and(Option::is_some)
            && self.ports[usize::from(port)].is_enabled();
        if !there {
            return Err(code::TRANSACTION_ERROR);
        }
        let Some(slot) = self.slots.get_mut(&n) else {
            return Err(code::SLOT_NOT_ENABLED);
        };
        (slot.port, slot.context) = (port, context);
        let (address, state) = match only_default {
            true => (0, SlotState::Default),
            false => (n, SlotState::Addressed),
        };
        slot.address(memory, &input, address, state)
    }

    /// Reset, stop, and where an endpoint goes on. §4.6.8 to §4.6.10.
    fn endpoint_command(&mut self, memory: &GuestMemory, trb: &Trb) -> Result<(), u8> {
        let (n, endpoint) = (trb.slot(), trb.endpoint());
        let Some(slot) = self.slots.get_mut(&n) else {
            return Err(code::SLOT_NOT_ENABLED);
        };
        let Some(e) = slot.endpoints.get_mut(&endpoint) else {
            return Err(code::ENDPOINT_NOT_ENABLED);
        };
        let mut stopped = None;
        match (trb.kind(), e.state) {
            (kind::RESET_ENDPOINT, EndpointState::Halted) => e.state = EndpointState::Stopped,
            (kind::STOP_ENDPOINT, EndpointState::Running) => {
                e.state = EndpointState::Stopped;
                // The device was asked and has said nothing: that transfer was under way.
                if slot.waiting & 1 << endpoint != 0 {
                    stopped = Some(e.dequeue);
                }
            }
            (kind::SET_TR_DEQUEUE, EndpointState::Stopped | EndpointState::Error) => {
                // No streams.
                if trb.status >> 16 != 0 {
                    return Err(code::TRB_ERROR);
                }
                e.dequeue = Dequeue::new(trb.parameter);
                e.state = EndpointState::Stopped;
                if endpoint == DEFAULT_PIPE {
                    slot.control = None;
                }
            }
            _ => return Err(code::CONTEXT_STATE_ERROR),
        }
        slot.waiting &= !(1 << endpoint);
        slot.kicked &= !(1 << endpoint);
        slot.publish(memory, endpoint)
            .map_err(|_| code::PARAMETER_ERROR)?;
        if let Some(d) = stopped {
            self.report_stopped(memory, n, endpoint, d);
        }
        Ok(())
    }

    /// Something happens outside.
    pub(super) fn input(&mut self, event: &device::Input) -> Heard {
        for port in 0..PORTS {
            let heard = match &mut self.devices[port] {
                Some(d) => d.input(event),
                None => Heard::NotMine,
            };
            if let Heard::On(endpoint) = heard {
                self.kick_device(port, endpoint);
            }
            if heard != Heard::NotMine {
                return heard;
            }
        }
        Heard::NotMine
    }

    /// The guest uses a device that knows where the pointer is.
    pub(super) fn wants_pointer(&self) -> bool {
        self.devices.iter().flatten().any(|d| d.wants_pointer())
    }

    /// An endpoint of the device at `port` is to be looked at.
    fn kick_device(&mut self, port: usize, endpoint: u8) {
        let index = 2 * (endpoint & 0xf) + (endpoint >> 7);
        for s in self.slots.values_mut() {
            if usize::from(s.port) == port && s.state != SlotState::Enabled {
                s.kicked |= 1 << index;
            }
        }
    }

    /// When the next device is to be asked although nothing happens.
    pub(super) fn deadline(&self, now_ns: u64) -> Option<u64> {
        let all = self.devices.iter().flatten().filter_map(|d| d.deadline());
        // One that has passed is served when the driver asks.
        all.map(|(at, _)| at).filter(|at| *at > now_ns).min()
    }

    /// Looks at the devices whose time has come.
    pub(super) fn timer_fired(&mut self, now_ns: u64) {
        for port in 0..PORTS {
            let due = self.devices[port].as_ref().and_then(|d| d.deadline());
            if let Some((_, endpoint)) = due.filter(|(at, _)| *at <= now_ns) {
                self.kick_device(port, endpoint);
            }
        }
    }

    pub(super) fn save(&self) -> ControllerSaved {
        let devices = (0..).zip(&self.devices);
        ControllerSaved {
            registers: self.r.clone(),
            interrupters: self.interrupters.clone(),
            ports: self.ports.clone(),
            slots: self.slots.clone(),
            devices: devices
                .filter_map(|(n, d)| Some((n, d.as_ref()?.save().into())))
                .collect(),
        }
    }

    /// Takes a state over; says what does not fit.
    pub(super) fn restore(&mut self, saved: ControllerSaved) -> Result<(), String> {
        let ControllerSaved {
            registers,
            interrupters,
            ports,
            slots,
            devices,
        } = saved;
        if interrupters.len() != INTERRUPTERS || ports.len() != PORTS {
            return Err("another number of ports or interrupters".into());
        }
        if !interrupters.iter().all(Interrupter::is_valid) {
            return Err("impossible event ring".into());
        }
        let possible = |(n, s): (&u8, &Slot)| (1..=MAX_SLOTS).contains(n) && s.is_valid(PORTS);
        if !slots.iter().all(possible) {
            return Err("impossible device slot".into());
        }
        let there = |(n, d): (u8, &Option<_>)| d.as_ref().map(|_| n);
        let mine = (0..).zip(&self.devices).filter_map(there);
        if !mine.eq(devices.keys().copied()) {
            let list: Vec<_> = devices.keys().collect();
            return Err(format!("it had devices at the ports {list:?}"));
        }
        for (n, body) in &devices {
            if let Some(d) = &mut self.devices[usize::from(*n)] {
                d.restore(body).map_err(|e| format!("port {n}: {e}"))?;
            }
        }
        self.r = registers;
        self.interrupters = interrupters;
        self.ports = ports;
        self.slots = slots;
        Ok(())
    }

    pub(super) fn inspect(&self) -> Inspect {
        let devices = self.devices.iter().enumerate().filter_map(|(n, d)| {
            let d = d.as_ref()?;
            let node = Inspect::node([
                ("port", Inspect::Uint(n as u64 + 1)),
                ("status", Inspect::Hex(self.ports[n].read().into())),
                ("state", d.inspect()),
            ]);
            Some((format!("{}-{}", n + 1, d.name()), node))
        });
        let slots = self.slots.iter().map(|(n, s)| {
            let node = Inspect::node([
                ("port", Inspect::Uint(u64::from(s.port) + 1)),
                ("state", Inspect::Text(format!("{:?}", s.state))),
                ("endpoints", Inspect::Uint(s.endpoints.len() as u64)),
            ]);
            (n.to_string(), node)
        });
        Inspect::node([
            ("command", Inspect::Hex(self.r.command.into())),
            ("status", Inspect::Hex(self.read(0x44, 0).into())),
            ("in_flight", Inspect::Uint(self.in_flight() as u64)),
            ("devices", Inspect::Node(devices.collect())),
            ("slots", Inspect::Node(slots.collect())),
        ])
    }

    /// What devices need.
    pub(super) fn bus(memory: &GuestMemory, now_ns: u64) -> Bus<'_> {
        Bus { memory, now_ns }
    }
}

/// Index of a port and offset in its registers.
fn port_place(offset: u64) -> (usize, u64) {
    (((offset - PORTS_AT) / 16) as usize, offset & 0xf)
}

/// Index of an interrupter and offset in its registers. §5.5.2.
fn interrupter_place(offset: u64) -> Option<(usize, u64)> {
    let at = offset.checked_sub(RUNTIME_AT + 0x20)?;
    let n = (at / 0x20) as usize;
    (n < INTERRUPTERS).then_some((n, at & 0x1f))
}

/// A Command Completion Event. §6.4.2.2.
fn command_event(at: u64, code: u8, slot: u8) -> Trb {
    Trb {
        parameter: at,
        status: u32::from(code) << 24,
        control: u32::from(slot) << 24 | u32::from(kind::COMMAND_COMPLETION) << 10,
    }
}

fn command_event_report(at: u64, code: u8, slot: u8) -> Report {
    Report {
        interrupter: 0,
        interrupts: true,
        event: command_event(at, code, slot),
    }
}

const _: () = assert!(USB2_PORTS + USB3_PORTS == PORTS && OPERATIONAL_AT == 0x40);
