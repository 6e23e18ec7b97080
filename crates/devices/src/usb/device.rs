//! What a device on the bus is to its host controller, and what all devices have in common.
//! Universal Serial Bus Specification 2.0, chapter 9, unless another one is named.

use minicbor::{Decode, Encode};
use pyrite_disk::scsi::{Outcome, Plan};
use pyrite_disk::{DiskError, IoBuf, scsi};
use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;

/// Speeds, with the identifiers that ports and slots have for them. xHCI 1.1 table 157.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// 480 Mb/s, USB 2.
    High = 3,
    /// 5 Gb/s, USB 3.
    Super = 4,
}

/// A request on the default pipe. §9.3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Setup {
    /// Direction, type and recipient.
    #[n(0)]
    pub kind: u8,
    /// Which request.
    #[n(1)]
    pub request: u8,
    /// Its parameter.
    #[n(2)]
    pub value: u16,
    /// Its parameter, often an interface or endpoint.
    #[n(3)]
    pub index: u16,
    /// Bytes of data.
    #[n(4)]
    pub length: u16,
}

impl Setup {
    /// From a setup packet.
    pub fn new(b: [u8; 8]) -> Setup {
        Setup {
            kind: b[0],
            request: b[1],
            value: u16::from_le_bytes([b[2], b[3]]),
            index: u16::from_le_bytes([b[4], b[5]]),
            length: u16::from_le_bytes([b[6], b[7]]),
        }
    }
    /// Data go to the host.
    pub fn is_in(&self) -> bool {
        self.kind & 0x80 != 0
    }
}

/// Where the data of a transfer are or go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Buffers {
    /// In guest memory.
    Memory(Vec<IoBuf>),
    /// In the descriptor itself, to the device.
    Immediate(Vec<u8>),
}

impl Buffers {
    /// Bytes that there is room for, or that there are.
    pub fn len(&self) -> u64 {
        match self {
            Buffers::Memory(bufs) => bufs.iter().map(|b| u64::from(b.len)).sum(),
            Buffers::Immediate(data) => data.len() as u64,
        }
    }
    /// A transfer without data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The pieces of guest memory; none of immediate data.
    pub fn pieces(&self) -> &[IoBuf] {
        match self {
            Buffers::Memory(bufs) => bufs,
            Buffers::Immediate(_) => &[],
        }
    }
    /// Reads what the host sends; how many bytes of `out` were filled.
    pub fn read(&self, memory: &GuestMemory, out: &mut [u8]) -> Result<usize, DiskError> {
        match self {
            Buffers::Memory(bufs) => scsi::gather(memory, bufs, out),
            Buffers::Immediate(data) => {
                let n = data.len().min(out.len());
                out[..n].copy_from_slice(&data[..n]);
                Ok(n)
            }
        }
    }
    /// Writes what the device sends; how many bytes there was room for.
    pub fn write(&self, memory: &GuestMemory, data: &[u8]) -> Result<u64, DiskError> {
        scsi::scatter(memory, self.pieces(), data)
    }
}

/// What a device needs to serve a transfer.
#[derive(Clone, Copy)]
pub struct Bus<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// Guest time.
    pub now_ns: u64,
}

/// Work for a disk.
pub struct Work {
    /// What is to be done.
    pub plan: Plan,
    /// The guest memory that takes part.
    pub bufs: Vec<IoBuf>,
}

/// What a device says to a transfer.
pub enum Answer {
    /// Not now: ask again when something has changed (NAK).
    Wait,
    /// So many bytes were moved; the transfer is over, also if that is less than it could be.
    Moved(u64),
    /// It refuses, and so does it all that follows until the halt is cleared.
    Stall,
    /// Memory of the transfer is not there.
    Fault,
    /// A disk works on it; then [`UsbDevice::finished`] says more.
    Work(Work),
}

/// What a device makes of an event of the outside world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is not for this device, or the guest does not listen to it.
    NotMine,
    /// There is no room for it now.
    Full,
    /// It will be told to the guest on this endpoint.
    On(u8),
}

/// What people do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A key goes down or up.
    Key {
        /// Its make code of scan code set 1; E0xxH for extended keys, E11DH for Pause.
        code: u16,
        /// Down.
        is_down: bool,
    },
    /// The pointer is somewhere.
    Pointer {
        /// From the left edge (0) to the right one (7FFFH).
        x: u16,
        /// From the upper edge (0) to the lower one (7FFFH).
        y: u16,
        /// Notches of the wheel towards the user.
        dz: i32,
        /// Buttons held: 1 left, 2 right, 4 middle, 8 and 16 side buttons.
        buttons: u8,
    },
}

/// A device on the bus.
pub trait UsbDevice: Send {
    /// What it is called for people.
    fn name(&self) -> &str;
    /// Its speed. Constant.
    fn speed(&self) -> Speed;
    /// A request on the default pipe, with the data that came with it: data for the host, which are
    /// cut to what it asked for, or `None` for a stall.
    fn control(&mut self, setup: Setup, data: &[u8]) -> Option<Vec<u8>>;
    /// A transfer on another pipe. `endpoint` is its address: number, and bit 7 for "in".
    fn transfer(&mut self, bus: Bus<'_>, endpoint: u8, buffers: &Buffers) -> Answer;
    /// The disk has done the work of a transfer.
    fn finished(
        &mut self,
        bus: Bus<'_>,
        endpoint: u8,
        buffers: &Buffers,
        outcome: &Outcome,
    ) -> Answer;
    /// When it is to be asked again although nothing has happened, and for which endpoint.
    fn deadline(&self) -> Option<(u64, u8)> {
        None
    }
    /// Something happens outside.
    fn input(&mut self, event: &Input) -> Heard {
        let _ = event;
        Heard::NotMine
    }
    /// It knows where the pointer is, and the guest uses it.
    fn wants_pointer(&self) -> bool {
        false
    }
    /// A reset of the bus.
    fn reset(&mut self);
    /// Back to the power-on state.
    fn power_on(&mut self);
    /// State to save.
    fn save(&self) -> Vec<u8>;
    /// Takes a state over, or says what does not fit.
    fn restore(&mut self, body: &[u8]) -> Result<(), String>;
    /// What a person may see.
    fn inspect(&self) -> Inspect;
}

/// Descriptor types. Table 9-5; USB 3.1 table 9-6.
pub mod descriptor {
    #![allow(missing_docs, reason = "the standard's names")]
    pub const DEVICE: u8 = 1;
    pub const CONFIGURATION: u8 = 2;
    pub const STRING: u8 = 3;
    pub const INTERFACE: u8 = 4;
    pub const ENDPOINT: u8 = 5;
    pub const BOS: u8 = 15;
    pub const DEVICE_CAPABILITY: u8 = 16;
    pub const HID: u8 = 0x21;
    pub const HID_REPORT: u8 = 0x22;
    pub const SUPERSPEED_ENDPOINT_COMPANION: u8 = 48;
}

/// The descriptors of a device.
#[derive(Clone, Debug)]
pub struct Descriptors {
    /// Device descriptor.
    pub device: [u8; 18],
    /// Configuration descriptor with all that belongs to it.
    pub configuration: Vec<u8>,
    /// Binary device object store; empty = none.
    pub bos: Vec<u8>,
    /// Strings, from index 1 on.
    pub strings: Vec<String>,
}

/// A device descriptor: vendor 0 strings 1 (manufacturer), 2 (product) and 3 (serial number).
pub fn device_descriptor(speed: Speed, vendor: u16, product: u16) -> [u8; 18] {
    let (version, packet) = match speed {
        Speed::High => (2, 64),
        // An exponent.
        Speed::Super => (3, 9),
    };
    let [v0, v1] = vendor.to_le_bytes();
    let [p0, p1] = product.to_le_bytes();
    [
        18,
        descriptor::DEVICE,
        0,
        version,
        0,
        0,
        0,
        packet,
        v0,
        v1,
        p0,
        p1,
        0,
        1,
        1,
        2,
        3,
        1,
    ]
}

/// A configuration descriptor in front of the `interface` and what belongs to it: self-powered, 100
/// mA at most.
pub fn configuration_descriptor(speed: Speed, interface: &[u8]) -> Vec<u8> {
    let [l0, l1] = (9 + interface.len() as u16).to_le_bytes();
    let current = match speed {
        Speed::High => 50,
        Speed::Super => 12,
    };
    let mut d = vec![9, descriptor::CONFIGURATION, l0, l1, 1, 1, 0, 0xc0, current];
    d.extend_from_slice(interface);
    d
}

/// State that every device has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CoreSaved {
    #[n(0)]
    configuration: u8,
    /// Halted endpoints: bit n is "out" n, bit 16 + n is "in" n.
    #[n(1)]
    halted: u32,
}

/// The part of a device that answers standard requests.
pub struct Core {
    descriptors: Descriptors,
    /// Endpoint addresses.
    endpoints: Vec<u8>,
    state: CoreSaved,
}

fn halt_bit(endpoint: u8) -> u32 {
    1 << (u32::from(endpoint & 0xf) + if endpoint & 0x80 != 0 { 16 } else { 0 })
}

impl Core {
    /// Of a device with one configuration and one interface with these endpoints.
    pub fn new(descriptors: Descriptors, endpoints: &[u8]) -> Core {
        Core {
            descriptors,
            endpoints: endpoints.to_vec(),
            state: CoreSaved::default(),
        }
    }

    /// The guest uses the device.
    pub fn is_configured(&self) -> bool {
        self.state.configuration != 0
    }

    /// The endpoint can transfer: it exists, and the device is configured.
    pub fn is_open(&self, endpoint: u8) -> bool {
        self.is_configured() && self.endpoints.contains(&endpoint)
    }

    /// The endpoint refuses transfers.
    pub fn is_halted(&self, endpoint: u8) -> bool {
        self.state.halted & halt_bit(endpoint) != 0
    }

    /// From now on the endpoint refuses transfers.
    pub fn halt(&mut self, endpoint: u8) {
        self.state.halted |= halt_bit(endpoint);
    }

    /// A reset of the bus.
    pub fn reset(&mut self) {
        self.state = CoreSaved::default();
    }

    /// State to save.
    pub fn save(&self) -> CoreSaved {
        self.state.clone()
    }

    /// Takes a state over.
    pub fn restore(&mut self, saved: CoreSaved) {
        self.state = saved;
        self.state.configuration = self.state.configuration.min(1);
    }

    /// Answers a standard request: `None` is a stall.
    pub fn standard(&mut self, s: Setup) -> Option<Vec<u8>> {
        let nothing = Some(Vec::new());
        let endpoint = (s.index & 0x8f) as u8;
        let there = endpoint & 0xf == 0 || self.endpoints.contains(&endpoint);
        match (s.kind, s.request) {
            // GET_STATUS: self-powered; an interface has none; halted.
            (0x80, 0) => Some(vec![1, 0]),
            (0x81, 0) => Some(vec![0, 0]),
            (0x82, 0) if there => Some(vec![self.is_halted(endpoint).into(), 0]),
            // CLEAR_FEATURE and SET_FEATURE: ENDPOINT_HALT.
            (0x02, 1) if there && s.value == 0 => {
                self.state.halted &= !halt_bit(endpoint);
                nothing
            }
            (0x02, 3) if there && s.value == 0 && endpoint & 0xf != 0 => {
                self.halt(endpoint);
                nothing
            }
            // U1_ENABLE, U2_ENABLE; FUNCTION_SUSPEND. USB 3.1 §9.4.9: nothing to be done.
            (0x00, 1 | 3) if matches!(s.value, 48 | 49) => nothing,
            (0x01, 1 | 3) if s.value == 0 => nothing,
            (0x80, 6) => self.descriptor((s.value >> 8) as u8, (s.value & 0xff) as u8),
            (0x80, 8) => Some(vec![self.state.configuration]),
            (0x00, 9) if s.value <= 1 => {
                self.state.configuration = s.value as u8;
                self.state.halted = 0;
                nothing
            }
            // GET_INTERFACE, SET_INTERFACE: there is one setting.
            (0x81, 10) if s.index == 0 => Some(vec![0]),
            (0x01, 11) if s.index == 0 && s.value == 0 => {
                self.state.halted = 0;
                nothing
            }
            // SET_SEL, SET_ISOCH_DELAY. USB 3.1 §9.4.12 and §9.4.11.
            (0x00, 0x30 | 0x31) => nothing,
            _ => None,
        }
    }

    fn descriptor(&self, kind: u8, index: u8) -> Option<Vec<u8>> {
        let d = &self.descriptors;
        match (kind, index) {
            (descriptor::DEVICE, 0) => Some(d.device.to_vec()),
            (descriptor::CONFIGURATION, 0) => Some(d.configuration.clone()),
            (descriptor::BOS, 0) if !d.bos.is_empty() => Some(d.bos.clone()),
            // Languages: US English.
            (descriptor::STRING, 0) => Some(vec![4, descriptor::STRING, 9, 4]),
            (descriptor::STRING, n) => {
                let text = d.strings.get(usize::from(n) - 1)?;
                // LIMIT: a descriptor's length is a byte.
                let units = text.encode_utf16().take(126);
                let units: Vec<u8> = units.flat_map(u16::to_le_bytes).collect();
                let mut s = vec![2 + units.len() as u8, descriptor::STRING];
                s.extend(units);
                Some(s)
            }
            _ => None,
        }
    }
}
