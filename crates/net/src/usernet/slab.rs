//! A table whose entries have a number that epoll can carry.

/// What kind of entry a token names; the value is its top byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Waker = 0,
    Tcp = 1,
    Udp = 2,
    Forward = 3,
    Dns = 4,
    Ping = 5,
}

impl Kind {
    pub(super) fn of(token: u64) -> Option<Kind> {
        Some(match token >> 56 {
            0 => Kind::Waker,
            1 => Kind::Tcp,
            2 => Kind::Udp,
            3 => Kind::Forward,
            4 => Kind::Dns,
            5 => Kind::Ping,
            _ => return None,
        })
    }
}

/// Numbered entries. A token of a removed entry finds nothing, even when the slot is used again.
pub(super) struct Slab<T> {
    kind: Kind,
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new(kind: Kind) -> Slab<T> {
        Slab {
            kind,
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds an entry and returns its token.
    pub(super) fn insert(&mut self, value: T) -> u64 {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push((0, None));
                (self.slots.len() - 1) as u32
            }
        };
        let slot = &mut self.slots[index as usize];
        slot.1 = Some(value);
        (self.kind as u64) << 56 | u64::from(slot.0 & 0xff_ffff) << 32 | u64::from(index)
    }

    fn slot(&self, token: u64) -> Option<usize> {
        let index = (token & 0xffff_ffff) as usize;
        let generation = (token >> 32) as u32 & 0xff_ffff;
        self.slots
            .get(index)
            .filter(|s| s.0 & 0xff_ffff == generation)
            .map(|_| index)
    }

    pub(super) fn get(&self, token: u64) -> Option<&T> {
        self.slot(token).and_then(|n| self.slots[n].1.as_ref())
    }

    pub(super) fn get_mut(&mut self, token: u64) -> Option<&mut T> {
        self.slot(token).and_then(|n| self.slots[n].1.as_mut())
    }

    pub(super) fn remove(&mut self, token: u64) -> Option<T> {
        let index = self.slot(token)?;
        let slot = &mut self.slots[index];
        let value = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1);
        self.free.push(index as u32);
        Some(value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let kind = (self.kind as u64) << 56;
        self.slots
            .iter()
            .enumerate()
            .filter_map(move |(index, (generation, value))| {
                let token = kind | u64::from(generation & 0xff_ffff) << 32 | index as u64;
                value.as_ref().map(|v| (token, v))
            })
    }
}
