//! What clients say: RFC 6143 §7.5, and the extensions that we offer.

use std::io;

use super::pixels::PixelFormat;
use super::wire::{Receiver, violation};

/// LIMIT: bytes of text from a client's clipboard; it is read and forgotten.
const CUT_TEXT_BYTES: u32 = 1 << 20;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    SetPixelFormat(PixelFormat),
    SetEncodings(Vec<i32>),
    UpdateRequest {
        incremental: bool,
        /// x, y, width, height.
        area: [u16; 4],
    },
    Key {
        is_down: bool,
        keysym: u32,
        /// XT key number, of clients that know it.
        number: Option<u32>,
    },
    Pointer {
        buttons: u8,
        x: u16,
        y: u16,
    },
    SetDesktopSize,
    /// Nothing that we act on.
    Other,
}

fn read<const N: usize>(from: &mut Receiver) -> io::Result<[u8; N]> {
    let mut b = [0; N];
    from.read(&mut b)?;
    Ok(b)
}

fn word(b: &[u8], at: usize) -> u32 {
    let bytes = b.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_be_bytes(bytes.unwrap_or_default())
}

fn half(b: &[u8], at: usize) -> u16 {
    let bytes = b.get(at..at + 2).and_then(|b| b.try_into().ok());
    u16::from_be_bytes(bytes.unwrap_or_default())
}

/// Reads the next message. What is none ends the connection, because where the next one would
/// begin is unknown.
pub(super) fn receive(from: &mut Receiver) -> io::Result<Message> {
    let [kind] = read(from)?;
    Ok(match kind {
        0 => {
            let b: [u8; 19] = read(from)?;
            let format = PixelFormat::parse(&b[3..]);
            Message::SetPixelFormat(format.map_err(violation)?)
        }
        2 => {
            let b: [u8; 3] = read(from)?;
            // LIMIT: 65535 by the width of the count; all but the first are forgotten at once.
            const KEPT: usize = 256;
            let mut encodings = Vec::new();
            for _ in 0..half(&b, 1) {
                let e: [u8; 4] = read(from)?;
                if encodings.len() < KEPT {
                    encodings.push(i32::from_be_bytes(e));
                }
            }
            Message::SetEncodings(encodings)
        }
        3 => {
            let b: [u8; 9] = read(from)?;
            Message::UpdateRequest {
                incremental: b[0] != 0,
                area: [half(&b, 1), half(&b, 3), half(&b, 5), half(&b, 7)],
            }
        }
        4 => {
            let b: [u8; 7] = read(from)?;
            Message::Key {
                is_down: b[0] != 0,
                keysym: word(&b, 3),
                number: None,
            }
        }
        5 => {
            let b: [u8; 5] = read(from)?;
            Message::Pointer {
                buttons: b[0],
                x: half(&b, 1),
                y: half(&b, 3),
            }
        }
        6 => {
            let b: [u8; 7] = read(from)?;
            let len = word(&b, 3);
            if len > CUT_TEXT_BYTES {
                return Err(violation(format!("a clipboard of {len} bytes")));
            }
            from.skip(len as usize)?;
            Message::Other
        }
        // The RFB protocol, "SetDesktopSize".
        251 => {
            let b: [u8; 7] = read(from)?;
            from.skip(usize::from(b[5]) * 16)?;
            Message::SetDesktopSize
        }
        // The RFB protocol, "QEMU Client Message".
        255 => {
            let [sub] = read(from)?;
            if sub != 0 {
                return Err(violation(format!("an unknown message 255.{sub}")));
            }
            let b: [u8; 10] = read(from)?;
            Message::Key {
                is_down: half(&b, 0) != 0,
                keysym: word(&b, 2),
                number: Some(word(&b, 6)),
            }
        }
        other => return Err(violation(format!("an unknown message {other}"))),
    })
}
