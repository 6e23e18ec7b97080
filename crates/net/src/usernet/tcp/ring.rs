//! A byte queue whose memory comes from a shared budget.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};

/// Bytes that all rings of a network may take together.
pub(in crate::usernet) struct Budget {
    /// Bytes taken.
    pub(in crate::usernet) used: usize,
    limit: usize,
}

impl Budget {
    pub(in crate::usernet) fn new(limit: usize) -> Budget {
        Budget { used: 0, limit }
    }

    fn take(&mut self, bytes: usize) -> bool {
        let fits = self
            .used
            .checked_add(bytes)
            .is_some_and(|n| n <= self.limit);
        if fits {
            self.used += bytes;
        }
        fits
    }

    /// True if memory should be given back as soon as it is not needed.
    fn tight(&self) -> bool {
        self.used > self.limit / 2
    }
}

/// First allocation of a ring in bytes.
const FIRST: usize = 16 << 10;

/// A queue of bytes, growing by doubling up to a limit.
pub(super) struct Ring {
    buf: Box<[u8]>,
    head: usize,
    len: usize,
    limit: usize,
}

impl Ring {
    pub(super) fn new(limit: usize) -> Ring {
        Ring {
            buf: Box::default(),
            head: 0,
            len: 0,
            limit,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes that can be added before the limit.
    pub(super) fn room(&self) -> usize {
        self.limit - self.len
    }

    /// Allocates, budget permitting, so that up to `extra` more bytes fit. Returns what fits.
    pub(super) fn reserve(&mut self, extra: usize, budget: &mut Budget) -> usize {
        let wanted = (self.len + extra).min(self.limit);
        if wanted > self.buf.len() {
            let size = wanted.next_power_of_two().max(FIRST).min(self.limit);
            if budget.take(size - self.buf.len()) {
                let mut buf = vec![0; size].into_boxed_slice();
                let (a, b) = self.filled(0, self.len);
                let (x, y) = (a.len(), b.len());
                buf[..x].copy_from_slice(a);
                buf[x..x + y].copy_from_slice(b);
                self.buf = buf;
                self.head = 0;
            }
        }
        (self.buf.len() - self.len).min(extra)
    }

    /// Gives the memory back if it is empty and memory is short, or if `always`.
    pub(super) fn release(&mut self, budget: &mut Budget, always: bool) {
        if always {
            self.len = 0;
        }
        if self.len == 0 && (always || budget.tight()) {
            budget.used -= self.buf.len();
            self.buf = Box::default();
            self.head = 0;
        }
    }

    /// `len` bytes from `offset` on, in two pieces. The range is cut to what is there.
    pub(super) fn filled(&self, offset: usize, len: usize) -> (&[u8], &[u8]) {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        if len == 0 {
            return (&[], &[]);
        }
        let start = (self.head + offset) % self.buf.len();
        let first = len.min(self.buf.len() - start);
        (&self.buf[start..start + first], &self.buf[..len - first])
    }

    fn free(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.buf.is_empty() {
            return (&mut [], &mut []);
        }
        let free = self.buf.len() - self.len;
        let start = (self.head + self.len) % self.buf.len();
        let first = free.min(self.buf.len() - start);
        let (low, high) = self.buf.split_at_mut(start);
        (&mut high[..first], &mut low[..free - first])
    }

    /// Adds what fits of `data` into the allocated space; returns how much.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let (a, b) = self.free();
        let first = data.len().min(a.len());
        a[..first].copy_from_slice(&data[..first]);
        let rest = &data[first..];
        let second = rest.len().min(b.len());
        b[..second].copy_from_slice(&rest[..second]);
        self.len += first + second;
        first + second
    }

    /// Drops bytes at the front.
    pub(super) fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head = if self.len == 0 {
            0
        } else {
            (self.head + n) % self.buf.len()
        };
    }

    /// Reads once into the free space. Zero: end of stream (or no space).
    pub(super) fn fill_from(&mut self, source: &mut impl Read) -> io::Result<usize> {
        let (a, b) = self.free();
        let n = if b.is_empty() {
            source.read(a)?
        } else {
            source.read_vectored(&mut [IoSliceMut::new(a), IoSliceMut::new(b)])?
        };
        self.len += n;
        Ok(n)
    }

    /// Writes once from the front and drops what was taken.
    pub(super) fn drain_to(&mut self, sink: &mut impl Write) -> io::Result<usize> {
        let (a, b) = self.filled(0, self.len);
        let n = if b.is_empty() {
            sink.write(a)?
        } else {
            sink.write_vectored(&[IoSlice::new(a), IoSlice::new(b)])?
        };
        self.consume(n);
        Ok(n)
    }
}
