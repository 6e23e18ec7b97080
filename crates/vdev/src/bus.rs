//! Address buses: an immutable sorted map behind an atomic swap, so a look-up takes no lock.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;

/// A device on the port I/O bus. The port is absolute. `data` is 1, 2 or 4 bytes long.
///
/// There is no error: hardware has none. A port or size that the device does not know reads as
/// all-ones and ignores writes; the bus fills `data` with FFH before the call.
pub trait PioDevice: Send {
    /// IN.
    fn pio_read(&mut self, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&mut self, port: u16, data: &[u8]);
}

/// A device on the memory bus. `offset` is relative to the registered range. `data` is 1 to 64
/// bytes long and need not be aligned; the same rule about errors holds.
pub trait MmioDevice: Send {
    /// Load.
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]);
    /// Store.
    fn mmio_write(&mut self, offset: u64, data: &[u8]);
}

/// Decodes a range of a bus further (PCI windows) or locks by itself (interrupt controllers).
///
/// Unlike a device it is called without a lock, by many threads at once.
pub trait AddressDecoder: Send + Sync {
    /// Load or IN at the absolute address. `data` is filled with FFH before the call.
    fn read(&self, addr: u64, data: &mut [u8]);
    /// Store or OUT.
    fn write(&self, addr: u64, data: &[u8]);
}

/// A range on a bus is taken.
#[derive(Debug, thiserror::Error)]
#[error("range {start:#x}+{len:#x} ({name}) overlaps {other}")]
pub struct BusOverlap {
    /// First address asked for.
    pub start: u64,
    /// Length.
    pub len: u64,
    /// Who asked.
    pub name: String,
    /// Who is there.
    pub other: String,
}

enum Target<D: ?Sized> {
    Device(Arc<Mutex<D>>),
    Decoder(Arc<dyn AddressDecoder>),
}

impl<D: ?Sized> Clone for Target<D> {
    fn clone(&self) -> Self {
        match self {
            Target::Device(d) => Target::Device(Arc::clone(d)),
            Target::Decoder(d) => Target::Decoder(Arc::clone(d)),
        }
    }
}

struct Entry<D: ?Sized> {
    start: u64,
    last: u64,
    name: String,
    target: Target<D>,
}

impl<D: ?Sized> Clone for Entry<D> {
    fn clone(&self) -> Self {
        Entry {
            start: self.start,
            last: self.last,
            name: self.name.clone(),
            target: self.target.clone(),
        }
    }
}

/// A bus of devices of one kind: `Bus<dyn PioDevice>` or `Bus<dyn MmioDevice>`.
pub struct Bus<D: ?Sized> {
    map: ArcSwap<Vec<Entry<D>>>,
    writer: Mutex<()>,
}

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Bus {
            map: ArcSwap::from_pointee(Vec::new()),
            writer: Mutex::new(()),
        }
    }
}

impl<D: ?Sized> Bus<D> {
    /// Puts a device at `start..start+len`. Fails if anything of it is taken or it wraps.
    pub fn insert(
        &self,
        start: u64,
        len: u64,
        name: &str,
        device: Arc<Mutex<D>>,
    ) -> Result<(), BusOverlap> {
        self.insert_target(start, len, name, Target::Device(device))
    }

    /// Puts a decoder at `start..start+len`, under the same conditions.
    pub fn insert_decoder(
        &self,
        start: u64,
        len: u64,
        name: &str,
        decoder: Arc<dyn AddressDecoder>,
    ) -> Result<(), BusOverlap> {
        self.insert_target(start, len, name, Target::Decoder(decoder))
    }

    fn insert_target(
        &self,
        start: u64,
        len: u64,
        name: &str,
        target: Target<D>,
    ) -> Result<(), BusOverlap> {
        let _guard = lock(&self.writer);
        let overlap = |other: &str| BusOverlap {
            start,
            len,
            name: name.to_owned(),
            other: other.to_owned(),
        };
        let last = len
            .checked_sub(1)
            .and_then(|n| start.checked_add(n))
            .ok_or_else(|| overlap("the end of the address space"))?;
        let mut map = Vec::clone(&self.map.load());
        let at = map.partition_point(|e| e.start < start);
        if let Some(e) = at
            .checked_sub(1)
            .and_then(|p| map.get(p))
            .filter(|e| e.last >= start)
        {
            return Err(overlap(&e.name));
        }
        if let Some(e) = map.get(at).filter(|e| e.start <= last) {
            return Err(overlap(&e.name));
        }
        map.insert(
            at,
            Entry {
                start,
                last,
                name: name.to_owned(),
                target,
            },
        );
        self.map.store(Arc::new(map));
        Ok(())
    }

    /// The device at `addr`, with the offset into its range and the bytes left in it. `None` too
    /// if the address belongs to a decoder.
    pub fn find(&self, addr: u64) -> Option<(Arc<Mutex<D>>, u64, u64)> {
        match self.find_target(addr)? {
            (Target::Device(d), offset, left) => Some((d, offset, left)),
            (Target::Decoder(_), ..) => None,
        }
    }

    fn find_target(&self, addr: u64) -> Option<(Target<D>, u64, u64)> {
        let map = self.map.load();
        let at = map.partition_point(|e| e.start <= addr);
        let e = map.get(at.checked_sub(1)?)?;
        // `last - addr` cannot overflow by the addition: a range of 2^64 bytes does not exist.
        (addr <= e.last).then(|| {
            (
                e.target.clone(),
                addr - e.start,
                (e.last - addr).saturating_add(1),
            )
        })
    }

    /// Names and ranges (first and last address), ascending.
    pub fn ranges(&self) -> Vec<(u64, u64, String)> {
        self.map
            .load()
            .iter()
            .map(|e| (e.start, e.last, e.name.clone()))
            .collect()
    }
}

impl Bus<dyn PioDevice> {
    /// IN: fills `data` (1, 2 or 4 bytes).
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match self.find_target(u64::from(port)) {
            Some((Target::Device(d), ..)) => lock(&d).pio_read(port, data),
            Some((Target::Decoder(d), ..)) => d.read(u64::from(port), data),
            None => {}
        }
    }
    /// OUT.
    pub fn write(&self, port: u16, data: &[u8]) {
        match self.find_target(u64::from(port)) {
            Some((Target::Device(d), ..)) => lock(&d).pio_write(port, data),
            Some((Target::Decoder(d), ..)) => d.write(u64::from(port), data),
            None => {}
        }
    }
}

impl Bus<dyn MmioDevice> {
    /// Load. Bytes past the end of a device read as FFH.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((target, off, left)) = self.find_target(addr) {
            let n = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match target {
                Target::Device(d) => lock(&d).mmio_read(off, &mut data[..n]),
                Target::Decoder(d) => d.read(addr, &mut data[..n]),
            }
        }
    }
    /// Store. Bytes past the end of a device are dropped.
    pub fn write(&self, addr: u64, data: &[u8]) {
        if let Some((target, off, left)) = self.find_target(addr) {
            let n = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match target {
                Target::Device(d) => lock(&d).mmio_write(off, &data[..n]),
                Target::Decoder(d) => d.write(addr, &data[..n]),
            }
        }
    }
}

/// Locks a mutex; a panic elsewhere ends the process anyway, so poison is not a state.
pub fn lock<T: ?Sized>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
