//! Control messages. virtio 1.3 §5.3.6.2.

use minicbor::{Decode, Encode};

/// What a control message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    DeviceReady = 0,
    PortAdd = 1,
    PortReady = 3,
    ConsolePort = 4,
    Resize = 5,
    PortOpen = 6,
    PortName = 7,
}

impl Event {
    /// The events that a driver may send.
    pub(super) fn from_number(n: u16) -> Option<Event> {
        Some(match n {
            0 => Event::DeviceReady,
            3 => Event::PortReady,
            6 => Event::PortOpen,
            _ => return None,
        })
    }
}

/// A message for the driver, encoded.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Message {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub(super) bytes: Vec<u8>,
}

impl Message {
    pub(super) fn new(id: u32, event: Event, value: u16) -> Message {
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend_from_slice(&(event as u16).to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        Message { bytes }
    }

    /// The name follows without a terminator.
    pub(super) fn name(id: u32, name: &str) -> Message {
        let mut m = Message::new(id, Event::PortName, 1);
        m.bytes.extend_from_slice(name.as_bytes());
        m
    }

    pub(super) fn resize(id: u32, (cols, rows): (u16, u16)) -> Message {
        let mut m = Message::new(id, Event::Resize, 0);
        m.bytes.extend_from_slice(&cols.to_le_bytes());
        m.bytes.extend_from_slice(&rows.to_le_bytes());
        m
    }
}

/// Takes id, event and value apart.
pub(super) fn parse([i0, i1, i2, i3, e0, e1, v0, v1]: [u8; 8]) -> (u32, u16, u16) {
    (
        u32::from_le_bytes([i0, i1, i2, i3]),
        u16::from_le_bytes([e0, e1]),
        u16::from_le_bytes([v0, v1]),
    )
}
