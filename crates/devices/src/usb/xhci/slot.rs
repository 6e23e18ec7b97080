//! Device slots and their contexts in memory. §4.5, §4.8 and §6.2.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use pyrite_mem::{GuestMemory, MemError};

use super::code;
use super::ring::Dequeue;
use crate::usb::device::Setup;

/// Bytes of a context (HCCPARAMS1.CSZ is 0).
const CONTEXT_BYTES: u64 = 32;
/// Device context index of the default pipe, and the largest there is.
pub(super) const DEFAULT_PIPE: u8 = 1;
pub(super) const LAST_ENDPOINT: u8 = 31;
/// LIMIT: bytes of a control transfer's data, by the size of its length.
const MAX_CONTROL_BYTES: usize = 0xffff;

/// Slot states, table 6-7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(super) enum SlotState {
    #[default]
    #[n(0)]
    Enabled,
    #[n(1)]
    Default,
    #[n(2)]
    Addressed,
    #[n(3)]
    Configured,
}

/// Endpoint states, table 6-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(super) enum EndpointState {
    #[n(1)]
    Running = 1,
    #[n(2)]
    Halted = 2,
    #[n(3)]
    Stopped = 3,
    #[n(4)]
    Error = 4,
}

/// An endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Endpoint {
    #[n(0)]
    pub state: EndpointState,
    #[n(1)]
    pub dequeue: Dequeue,
}

/// A control transfer between its stages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Control {
    #[n(0)]
    pub setup: Setup,
    /// What the device has said, or what the host has sent so far.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub data: Vec<u8>,
    /// Bytes that the host has got.
    #[n(2)]
    pub sent: u32,
    /// The device refuses; told with the next stage.
    #[n(3)]
    pub refused: bool,
}

/// A slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Slot {
    #[n(0)]
    pub state: SlotState,
    /// Index of the root hub's port.
    #[n(1)]
    pub port: u8,
    /// Device context.
    #[n(2)]
    pub context: u64,
    /// By device context index.
    #[n(3)]
    pub endpoints: BTreeMap<u8, Endpoint>,
    #[n(4)]
    pub control: Option<Control>,
    /// Endpoints that are to be looked at, and those whose device had nothing to say; bits by
    /// device context index.
    #[n(5)]
    pub kicked: u32,
    #[n(6)]
    pub waiting: u32,
}

/// Completion codes of commands.
pub(super) type CommandResult = Result<(), u8>;

fn words(memory: &GuestMemory, at: u64) -> Result<[u32; 8], MemError> {
    let mut b = [0; CONTEXT_BYTES as usize];
    memory.read(at, &mut b)?;
    Ok(std::array::from_fn(|n| {
        u32::from_le_bytes([b[4 * n], b[4 * n + 1], b[4 * n + 2], b[4 * n + 3]])
    }))
}

fn put_words(memory: &GuestMemory, at: u64, words: &[u32; 8]) -> Result<(), MemError> {
    let b: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    memory.write(at, &b)
}

/// An input context. §6.2.5.
pub(super) struct Input {
    pub drop: u32,
    pub add: u32,
    at: u64,
}

impl Input {
    pub(super) fn read(memory: &GuestMemory, at: u64) -> Result<Input, u8> {
        // The largest is 33 contexts.
        let at = at & !0xf;
        if at.checked_add(33 * CONTEXT_BYTES).is_none() {
            return Err(code::PARAMETER_ERROR);
        }
        let w = words(memory, at).map_err(|_| code::PARAMETER_ERROR)?;
        Ok(Input {
            drop: w[0],
            add: w[1],
            at,
        })
    }
    /// Context `n` of those that are put in.
    fn context(&self, memory: &GuestMemory, n: u8) -> Result<[u32; 8], u8> {
        words(memory, self.at + CONTEXT_BYTES * (1 + u64::from(n)))
            .map_err(|_| code::PARAMETER_ERROR)
    }
    /// The endpoints that `set` names.
    fn named(set: u32) -> impl Iterator<Item = u8> {
        (2..=LAST_ENDPOINT).filter(move |n| set & 1 << n != 0)
    }
}

fn lost(_: MemError) -> u8 {
    code::PARAMETER_ERROR
}

impl Slot {
    pub(super) fn is_valid(&self, ports: usize) -> bool {
        let control = self
            .control
            .as_ref()
            .is_none_or(|c| c.data.len() <= MAX_CONTROL_BYTES && c.sent as usize <= c.data.len());
        control
            && usize::from(self.port) < ports
            && self
                .endpoints
                .keys()
                .all(|n| (1..=LAST_ENDPOINT).contains(n))
            && self.context.checked_add(CONTEXT_BYTES * 32).is_some()
    }

    fn place(&self, n: u8) -> u64 {
        self.context + CONTEXT_BYTES * u64::from(n)
    }

    /// Route, speed and port of a slot context: the port's index.
    pub(super) fn port_of(memory: &GuestMemory, input: &Input) -> Result<u8, u8> {
        let w = input.context(memory, 0)?;
        let port = (w[1] >> 16 & 0xff) as u8;
        // There are no hubs that a route could lead through.
        if w[0] & 0xf_ffff != 0 || port == 0 {
            return Err(code::PARAMETER_ERROR);
        }
        Ok(port - 1)
    }

    /// Writes slot context and default pipe from an input context. §4.6.5.
    pub(super) fn address(
        &mut self,
        memory: &GuestMemory,
        input: &Input,
        address: u8,
        state: SlotState,
    ) -> CommandResult {
        let mut slot = input.context(memory, 0)?;
        let pipe = input.context(memory, DEFAULT_PIPE)?;
        slot[3] = u32::from(address) | (state as u32) << 27;
        self.endpoints.clear();
        self.control = None;
        (self.kicked, self.waiting) = (0, 0);
        self.state = state;
        self.open(memory, DEFAULT_PIPE, pipe)?;
        put_words(memory, self.place(0), &slot).map_err(lost)
    }

    fn open(&mut self, memory: &GuestMemory, n: u8, mut context: [u32; 8]) -> CommandResult {
        let (kind, streams) = (context[1] >> 3 & 7, context[0] >> 10 & 0x1f);
        let fits = if n == DEFAULT_PIPE {
            kind == 4
        } else {
            kind != 0
        };
        if !fits || streams != 0 {
            return Err(code::PARAMETER_ERROR);
        }
        let raw = u64::from(context[3]) << 32 | u64::from(context[2]);
        let endpoint = Endpoint {
            state: EndpointState::Running,
            dequeue: Dequeue::new(raw),
        };
        context[0] = context[0] & !7 | EndpointState::Running as u32;
        put_words(memory, self.place(n), &context).map_err(lost)?;
        self.endpoints.insert(n, endpoint);
        Ok(())
    }

    fn close(&mut self, memory: &GuestMemory, n: u8) -> CommandResult {
        self.endpoints.remove(&n);
        self.kicked &= !(1 << n);
        self.waiting &= !(1 << n);
        let at = self.place(n);
        let mut w = words(memory, at).map_err(lost)?;
        w[0] &= !7;
        put_words(memory, at, &w).map_err(lost)
    }

    /// Drops and adds endpoints. §4.6.6.
    pub(super) fn configure(
        &mut self,
        memory: &GuestMemory,
        input: Option<&Input>,
    ) -> CommandResult {
        if !matches!(self.state, SlotState::Addressed | SlotState::Configured) {
            return Err(code::CONTEXT_STATE_ERROR);
        }
        let Some(input) = input else {
            // Deconfigure: all but the default pipe.
            return self.only_default_pipe(memory, SlotState::Addressed);
        };
        if input.drop & 3 != 0 {
            return Err(code::PARAMETER_ERROR);
        }
        let added: Vec<(u8, [u32; 8])> = Input::named(input.add)
            .map(|n| Ok((n, input.context(memory, n)?)))
            .collect::<Result<_, u8>>()?;
        for n in Input::named(input.drop) {
            self.close(memory, n)?;
        }
        for (n, context) in added {
            self.open(memory, n, context)?;
        }
        let any = self.endpoints.keys().any(|n| *n != DEFAULT_PIPE);
        self.state = if any {
            SlotState::Configured
        } else {
            SlotState::Addressed
        };
        let entries = match input.add & 1 {
            0 => None,
            _ => Some(input.context(memory, 0)?[0] & 0xf800_0000),
        };
        self.publish_slot(memory, entries, None)
    }

    /// Takes what may change. §4.6.7.
    pub(super) fn evaluate(&mut self, memory: &GuestMemory, input: &Input) -> CommandResult {
        if self.state == SlotState::Enabled {
            return Err(code::CONTEXT_STATE_ERROR);
        }
        if input.add & 1 != 0 {
            let new = input.context(memory, 0)?;
            let at = self.place(0);
            let mut w = words(memory, at).map_err(lost)?;
            // Max exit latency, interrupter target.
            w[1] = w[1] & !0xffff | new[1] & 0xffff;
            w[2] = w[2] & !0xffc0_0000 | new[2] & 0xffc0_0000;
            put_words(memory, at, &w).map_err(lost)?;
        }
        if input.add & 2 != 0 {
            let new = input.context(memory, DEFAULT_PIPE)?;
            let at = self.place(DEFAULT_PIPE);
            let mut w = words(memory, at).map_err(lost)?;
            // Max packet size.
            w[1] = w[1] & 0xffff | new[1] & 0xffff_0000;
            put_words(memory, at, &w).map_err(lost)?;
        }
        Ok(())
    }

    /// Closes all other endpoints.
    fn only_default_pipe(&mut self, memory: &GuestMemory, state: SlotState) -> CommandResult {
        let others: Vec<u8> = self.endpoints.keys().copied().collect();
        for n in others.into_iter().filter(|n| *n != DEFAULT_PIPE) {
            self.close(memory, n)?;
        }
        self.state = state;
        self.publish_slot(memory, Some(1 << 27), None)
    }

    /// The device was reset. §4.6.11.
    pub(super) fn reset(&mut self, memory: &GuestMemory) -> CommandResult {
        if !matches!(self.state, SlotState::Addressed | SlotState::Configured) {
            return Err(code::CONTEXT_STATE_ERROR);
        }
        self.control = None;
        self.only_default_pipe(memory, SlotState::Default)?;
        self.publish_slot(memory, None, Some(0))
    }

    /// The slot is disabled. §4.6.4.
    pub(super) fn disabled(&self, memory: &GuestMemory) {
        if self.context != 0 {
            let at = self.place(0) + 12;
            // Software has the context back; if it is not there, nobody looks.
            let _ = memory.write(at, &[0; 4]);
        }
    }

    fn publish_slot(
        &self,
        memory: &GuestMemory,
        entries: Option<u32>,
        address: Option<u8>,
    ) -> CommandResult {
        let at = self.place(0);
        let mut w = words(memory, at).map_err(lost)?;
        if let Some(e) = entries {
            w[0] = w[0] & !0xf800_0000 | e;
        }
        if let Some(a) = address {
            w[3] = w[3] & !0xff | u32::from(a);
        }
        w[3] = w[3] & !0xf800_0000 | (self.state as u32) << 27;
        put_words(memory, at, &w).map_err(lost)
    }

    /// Shows state and place of an endpoint.
    pub(super) fn publish(&self, memory: &GuestMemory, n: u8) -> Result<(), MemError> {
        let Some(e) = self.endpoints.get(&n) else {
            return Ok(());
        };
        let at = self.place(n);
        let w = memory.read_u32(at)?;
        let w = w & !7 | e.state as u32;
        memory.write(at, &w.to_le_bytes())?;
        memory.write(at + 8, &e.dequeue.raw().to_le_bytes())
    }
}
