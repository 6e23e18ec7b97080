//! A store for tests that can lose its power: what was not synced may or may not be there.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::storage::{Punch, Storage};

/// LIMIT: bytes of a store.
const MAX_BYTES: u64 = 64 << 20;

/// xorshift64.
#[derive(Clone)]
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Len(u64),
}

#[derive(Default)]
struct State {
    durable: Vec<u8>,
    now: Vec<u8>,
    since: Vec<Change>,
    /// Writes and syncs until all fail.
    left: Option<u64>,
}

/// The store; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Store(Arc<Mutex<State>>);

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, data) => {
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at as usize..end].copy_from_slice(data);
        }
        Change::Zero(at, len) => {
            let end = ((*at + *len) as usize).min(bytes.len());
            let at = (*at as usize).min(end);
            bytes[at..end].fill(0);
        }
        Change::Len(len) => bytes.resize(*len as usize, 0),
    }
}

impl Store {
    pub(crate) fn new(bytes: Vec<u8>) -> Store {
        Store(Arc::new(Mutex::new(State {
            durable: bytes.clone(),
            now: bytes,
            since: Vec::new(),
            left: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.lock().now.clone()
    }

    /// All writes and syncs fail after `n` more.
    pub(crate) fn fail_after(&self, n: Option<u64>) {
        self.lock().left = n;
    }

    /// What could be there after a loss of power now: every sector written since the last sync is
    /// old or new, in any combination.
    pub(crate) fn after_power_loss(&self, random: &mut Random) -> Vec<u8> {
        let state = self.lock();
        let mut out = state.durable.clone();
        // Sometimes nothing arrived, sometimes everything, mostly some.
        let chance = random.below(5);
        for change in &state.since {
            match change {
                Change::Write(at, data) => {
                    let mut from = 0;
                    while from < data.len() {
                        let here = *at as usize + from;
                        let to = (from + 512 - here % 512).min(data.len());
                        if random.below(4) < chance {
                            let part = Change::Write(here as u64, data[from..to].to_vec());
                            apply(&mut out, &part);
                        }
                        from = to;
                    }
                }
                other => {
                    if random.below(4) < chance {
                        apply(&mut out, other);
                    }
                }
            }
        }
        out
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.lock();
        state.spend()?;
        let end = match &change {
            Change::Write(at, data) => at.saturating_add(data.len() as u64),
            Change::Len(len) => *len,
            Change::Zero(..) => 0,
        };
        if end > MAX_BYTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        apply(&mut state.now, &change);
        state.since.push(change);
        Ok(())
    }
}

impl State {
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(io::ErrorKind::StorageFull.into()),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Storage for Store {
    fn file(&self) -> Option<&File> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().now.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.lock();
        let from = offset.min(state.now.len() as u64) as usize;
        let n = buf.len().min(state.now.len() - from);
        buf[..n].copy_from_slice(&state.now[from..from + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.change(Change::Write(offset, buf.to_vec()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Len(len))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.spend()?;
        let since = std::mem::take(&mut state.since);
        for change in &since {
            apply(&mut state.durable, change);
        }
        Ok(())
    }

    fn punch(&self, _how: Punch, offset: u64, len: u64) -> io::Result<bool> {
        self.change(Change::Zero(offset, len))?;
        Ok(true)
    }
}
