//! Taking messages apart and putting replies together. Numbers are little-endian.

use crate::{Errno, Result};

const BAD: Errno = Errno(libc::EINVAL);

/// A message being read from front to back; what is missing is `EINVAL`.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(BAD)?;
        self.0 = rest;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or(BAD)?;
        self.0 = rest;
        Ok(*head)
    }
    pub(crate) fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }
    pub(crate) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }
    pub(crate) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }
    /// A string of 9P: its length in two bytes, then that many bytes.
    pub(crate) fn text(&mut self) -> Result<&'a [u8]> {
        let n = self.u16()?;
        self.bytes(n.into())
    }
    /// A string of FUSE: up to its NUL.
    pub(crate) fn c_text(&mut self) -> Result<&'a [u8]> {
        let n = self.0.iter().position(|b| *b == 0).ok_or(BAD)?;
        let text = self.bytes(n)?;
        self.bytes(1)?;
        Ok(text)
    }
}

/// A reply being written.
pub(crate) trait Put {
    fn put_u8(&mut self, v: u8);
    fn put_u16(&mut self, v: u16);
    fn put_u32(&mut self, v: u32);
    fn put_u64(&mut self, v: u64);
    /// A string of 9P. Callers have at most 65535 bytes.
    fn put_text(&mut self, text: &[u8]);
    /// Overwrites four bytes that are there.
    fn set_u32(&mut self, at: usize, v: u32);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, v: u8) {
        self.push(v);
    }
    fn put_u16(&mut self, v: u16) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_u32(&mut self, v: u32) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_u64(&mut self, v: u64) {
        self.extend_from_slice(&v.to_le_bytes());
    }
    fn put_text(&mut self, text: &[u8]) {
        let n = text.len().min(usize::from(u16::MAX));
        self.put_u16(n as u16);
        self.extend_from_slice(&text[..n]);
    }
    fn set_u32(&mut self, at: usize, v: u32) {
        if let Some(to) = self.get_mut(at..at + 4) {
            to.copy_from_slice(&v.to_le_bytes());
        }
    }
}
