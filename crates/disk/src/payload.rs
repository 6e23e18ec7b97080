//! Where the bytes of a request go to or come from: guest memory, or memory of the host.
//!
//! Both are consumed from the front, because every format goes through a request in the order of
//! its offsets. Guest memory and files exchange bytes without a copy.

use std::io;

use pyrite_mem::GuestMemory;

use crate::io::{AtEnd, Direction, map_error, transfer};
use crate::storage::Storage;
use crate::{DiskError, IoBuf};

/// A piece that is moved through a buffer when there is no file, in bytes.
const BOUNCE: usize = 256 << 10;

/// The rest of a list of guest buffers.
struct GuestBufs<'a> {
    memory: &'a GuestMemory,
    bufs: &'a [IoBuf],
    /// Bytes of the first buffer that are used up.
    skip: u32,
    remaining: u64,
}

impl<'a> GuestBufs<'a> {
    fn new(memory: &'a GuestMemory, bufs: &'a [IoBuf]) -> Self {
        GuestBufs {
            memory,
            bufs,
            skip: 0,
            remaining: bufs.iter().map(|b| u64::from(b.len)).sum(),
        }
    }

    /// Takes the first `len` bytes off.
    fn take(&mut self, len: u64) -> Vec<IoBuf> {
        let mut out = Vec::new();
        let mut left = len.min(self.remaining);
        self.remaining -= left;
        while left > 0 {
            let Some((first, rest)) = self.bufs.split_first() else {
                break;
            };
            let room = u64::from(first.len - self.skip);
            let n = left.min(room);
            if n > 0 {
                out.push(IoBuf {
                    gpa: first.gpa + u64::from(self.skip),
                    len: n as u32,
                });
            }
            left -= n;
            if n == room {
                self.bufs = rest;
                self.skip = 0;
            } else {
                self.skip += n as u32;
            }
        }
        out
    }
}

enum TargetKind<'a> {
    Guest(GuestBufs<'a>),
    Host(&'a mut [u8]),
}

/// Where the bytes of a read go, filled from the front.
pub struct Target<'a>(TargetKind<'a>);

impl<'a> Target<'a> {
    /// Guest buffers, which must have been checked to be RAM.
    pub fn guest(memory: &'a GuestMemory, bufs: &'a [IoBuf]) -> Target<'a> {
        Target(TargetKind::Guest(GuestBufs::new(memory, bufs)))
    }

    /// A buffer of the host.
    pub fn host(buf: &'a mut [u8]) -> Target<'a> {
        Target(TargetKind::Host(buf))
    }

    /// Bytes that are not filled yet.
    pub fn remaining(&self) -> u64 {
        match &self.0 {
            TargetKind::Guest(g) => g.remaining,
            TargetKind::Host(b) => b.len() as u64,
        }
    }

    /// Fills the next `len` bytes from `storage`; what lies beyond its end is an error.
    pub fn fill_exact(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        len: u64,
    ) -> Result<(), DiskError> {
        if matches!(self.0, TargetKind::Host(_)) || storage.file().is_none() {
            let end = storage.len().map_err(map_error)?;
            if offset.saturating_add(len) > end {
                return Err(DiskError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        self.fill_with(storage, offset, len, AtEnd::Error)
    }

    /// Fills the next `len` bytes from `storage`; what lies beyond its end is zeroes.
    pub fn fill_from(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        len: u64,
    ) -> Result<(), DiskError> {
        self.fill_with(storage, offset, len, AtEnd::Zeroes)
    }

    fn fill_with(
        &mut self,
        storage: &dyn Storage,
        mut offset: u64,
        len: u64,
        at_end: AtEnd,
    ) -> Result<(), DiskError> {
        match &mut self.0 {
            TargetKind::Guest(g) => {
                let memory = g.memory;
                if let Some(file) = storage.file() {
                    let bufs = g.take(len);
                    return transfer(file, memory, Direction::Read, offset, &bufs, at_end);
                }
                let mut left = len;
                let mut bounce = vec![0; BOUNCE.min(len as usize)];
                while left > 0 {
                    let n = left.min(bounce.len() as u64) as usize;
                    storage
                        .read_at(offset, &mut bounce[..n])
                        .map_err(map_error)?;
                    self.copy(&bounce[..n])?;
                    offset += n as u64;
                    left -= n as u64;
                }
                Ok(())
            }
            TargetKind::Host(_) => {
                let part = self.split_host(len);
                storage.read_at(offset, part).map_err(map_error)
            }
        }
    }

    /// Lets `fill` fill the next `len` bytes, all of them.
    pub fn with_part(
        &mut self,
        len: u64,
        fill: impl FnOnce(&mut Target<'_>) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        match &mut self.0 {
            TargetKind::Guest(g) => {
                let (memory, bufs) = (g.memory, g.take(len));
                fill(&mut Target::guest(memory, &bufs))
            }
            TargetKind::Host(_) => fill(&mut Target::host(self.split_host(len))),
        }
    }

    fn split_host(&mut self, len: u64) -> &'a mut [u8] {
        let TargetKind::Host(buf) = &mut self.0 else {
            return &mut [];
        };
        let n = (len as usize).min(buf.len());
        let (part, rest) = std::mem::take(buf).split_at_mut(n);
        *buf = rest;
        part
    }

    /// Fills the next `len` bytes with zeroes.
    pub fn zero(&mut self, len: u64) -> Result<(), DiskError> {
        match &mut self.0 {
            TargetKind::Guest(g) => {
                for b in g.take(len) {
                    g.memory
                        .fill_zero(b.gpa, u64::from(b.len))
                        .map_err(|_| DiskError::BadBuffer)?;
                }
            }
            TargetKind::Host(_) => self.split_host(len).fill(0),
        }
        Ok(())
    }

    /// Fills the next bytes with `data`.
    pub fn copy(&mut self, data: &[u8]) -> Result<(), DiskError> {
        match &mut self.0 {
            TargetKind::Guest(g) => {
                let mut data = data;
                for b in g.take(data.len() as u64) {
                    let (part, rest) = data.split_at(b.len as usize);
                    g.memory
                        .write(b.gpa, part)
                        .map_err(|_| DiskError::BadBuffer)?;
                    data = rest;
                }
            }
            TargetKind::Host(_) => {
                let part = self.split_host(data.len() as u64);
                let n = part.len();
                part.copy_from_slice(&data[..n]);
            }
        }
        Ok(())
    }
}

enum SourceKind<'a> {
    Guest(GuestBufs<'a>),
    Host(&'a [u8]),
}

/// Where the bytes of a write come from, taken from the front.
pub struct Source<'a>(SourceKind<'a>);

impl<'a> Source<'a> {
    /// Guest buffers, which must have been checked to be RAM.
    pub fn guest(memory: &'a GuestMemory, bufs: &'a [IoBuf]) -> Source<'a> {
        Source(SourceKind::Guest(GuestBufs::new(memory, bufs)))
    }

    /// A buffer of the host.
    pub fn host(buf: &'a [u8]) -> Source<'a> {
        Source(SourceKind::Host(buf))
    }

    /// Bytes that are not taken yet.
    pub fn remaining(&self) -> u64 {
        match &self.0 {
            SourceKind::Guest(g) => g.remaining,
            SourceKind::Host(b) => b.len() as u64,
        }
    }

    /// Writes the next `len` bytes to `storage`.
    pub fn write_to(
        &mut self,
        storage: &dyn Storage,
        mut offset: u64,
        len: u64,
    ) -> Result<(), DiskError> {
        match &mut self.0 {
            SourceKind::Guest(g) => {
                let memory = g.memory;
                if let Some(file) = storage.file() {
                    let bufs = g.take(len);
                    return transfer(file, memory, Direction::Write, offset, &bufs, AtEnd::Error);
                }
                let mut left = len;
                let mut bounce = vec![0; BOUNCE.min(len as usize)];
                while left > 0 {
                    let n = left.min(bounce.len() as u64) as usize;
                    self.copy(&mut bounce[..n])?;
                    storage.write_at(offset, &bounce[..n]).map_err(map_error)?;
                    offset += n as u64;
                    left -= n as u64;
                }
                Ok(())
            }
            SourceKind::Host(buf) => {
                let n = (len as usize).min(buf.len());
                let (part, rest) = buf.split_at(n);
                *buf = rest;
                storage.write_at(offset, part).map_err(map_error)
            }
        }
    }

    /// Takes the next bytes into `out`.
    pub fn copy(&mut self, out: &mut [u8]) -> Result<(), DiskError> {
        match &mut self.0 {
            SourceKind::Guest(g) => {
                let mut out = out;
                for b in g.take(out.len() as u64) {
                    let (part, rest) = std::mem::take(&mut out).split_at_mut(b.len as usize);
                    g.memory
                        .read(b.gpa, part)
                        .map_err(|_| DiskError::BadBuffer)?;
                    out = rest;
                }
            }
            SourceKind::Host(buf) => {
                let n = out.len().min(buf.len());
                let (part, rest) = buf.split_at(n);
                out[..n].copy_from_slice(part);
                *buf = rest;
            }
        }
        Ok(())
    }
}
