//! One stream between a guest port and a host socket, with its credit. virtio 1.3 §5.10.6.3.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, SHUTDOWN_F_RECEIVE, SHUTDOWN_F_SEND};

/// LIMIT: bytes from the guest that wait for the host's program; the credit that the guest gets.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;

/// The connection is over.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

pub(super) struct Connection {
    stream: UnixStream,
    /// False until the guest has answered a connection of the host.
    pub(super) established: bool,
    /// Bytes from the guest that the socket did not take yet.
    waiting: VecDeque<u8>,
    /// Bytes from the guest that the socket took.
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told_forwarded: u32,
    /// Bytes sent to the guest.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The host's program sends no more.
    host_done: bool,
    /// The host's program is gone.
    pub(super) host_gone: bool,
    /// Shutdown flags that the guest has sent.
    guest_shutdown: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, established: bool) -> Connection {
        Connection {
            stream,
            established,
            waiting: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            host_done: false,
            host_gone: false,
            guest_shutdown: 0,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Takes over the credit that each packet of the guest carries.
    pub(super) fn note_credit(&mut self, h: &Header) {
        self.guest_buffer = h.buf_alloc;
        self.guest_forwarded = h.fwd_cnt;
    }

    /// Fills in our credit.
    pub(super) fn put_credit(&mut self, h: &mut Header) {
        h.buf_alloc = BUFFER_BYTES;
        h.fwd_cnt = self.forwarded;
        self.told_forwarded = self.forwarded;
    }

    /// True if the guest should hear that there is room again.
    pub(super) fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told_forwarded) >= BUFFER_BYTES / 2
    }

    /// Bytes that the guest has room for; none if it says that it used more than it has.
    fn credit(&self) -> u32 {
        self.guest_buffer
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// True if data of the host can go to the guest.
    pub(super) fn wants_input(&self) -> bool {
        self.established
            && !self.host_done
            && self.guest_shutdown & SHUTDOWN_F_RECEIVE == 0
            && self.credit() > 0
    }

    /// True if data of the guest waits for the socket.
    pub(super) fn wants_output(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// True if only the end of the host's program is of interest.
    pub(super) fn watches_end(&self) -> bool {
        self.host_done && !self.host_gone
    }

    /// Reads data for the guest. `Ok(None)`: nothing now. `Ok(Some(0))`: the host sends no more.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Broken> {
        let n = buffer.len().min(self.credit() as usize);
        match self.stream.read(&mut buffer[..n]) {
            Ok(0) => {
                self.host_done = true;
                Ok(Some(0))
            }
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                Ok(Some(n))
            }
            Err(e) if is_later(&e) => Ok(None),
            Err(_) => Err(Broken),
        }
    }

    /// Data of the guest.
    pub(super) fn write(&mut self, data: &[u8]) -> Result<(), Broken> {
        // "The sender MUST NOT transmit more than the peer's free buffer space": one that does
        // is cut off.
        let room = (BUFFER_BYTES as usize).saturating_sub(self.waiting.len());
        if data.len() > room || self.guest_shutdown & SHUTDOWN_F_SEND != 0 {
            return Err(Broken);
        }
        self.waiting.extend(data);
        self.flush()
    }

    /// Moves waiting data to the socket.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match self.stream.write(front) {
                Ok(n) => {
                    self.waiting.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if is_later(&e) => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
        self.apply_shutdown();
        Ok(())
    }

    /// Sends text of our own to the host's program, which has read nothing yet.
    pub(super) fn greet(&mut self, text: &str) -> Result<(), Broken> {
        match self.stream.write(text.as_bytes()) {
            Ok(n) if n == text.len() => Ok(()),
            _ => Err(Broken),
        }
    }

    /// The guest sends or receives no more. True if that ends the connection now.
    pub(super) fn shut_down(&mut self, flags: u32) -> bool {
        self.guest_shutdown |= flags & (SHUTDOWN_F_RECEIVE | SHUTDOWN_F_SEND);
        self.apply_shutdown();
        self.finished()
    }

    /// True if the guest is done in both directions and its data is delivered.
    pub(super) fn finished(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_F_RECEIVE | SHUTDOWN_F_SEND && self.waiting.is_empty()
    }

    fn apply_shutdown(&self) {
        if self.waiting.is_empty() && self.guest_shutdown & SHUTDOWN_F_SEND != 0 {
            // Fails only if the other end is gone, which a read tells.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }
}

fn is_later(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
