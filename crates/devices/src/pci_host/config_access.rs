//! The two ways to configuration space.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyrite_vdev::AddressDecoder;
use pyrite_vdev::bus::lock;

use super::{ECAM_BYTES, PciHost};

const CONFIG_ADDRESS: u64 = 0xcf8;
const CONFIG_DATA: u64 = 0xcfc;
/// CONFIG_ADDRESS: configuration cycles are enabled.
const ENABLE: u32 = 1 << 31;

/// Calls `f(offset, part)` for each piece of `len` bytes at `offset` inside one double word.
fn pieces(offset: u16, len: usize, mut f: impl FnMut(u16, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = usize::from(offset) + done;
        let n = (4 - at % 4).min(len - done);
        if at >= 4096 {
            return;
        }
        f(at as u16, done..done + n);
        done += n;
    }
}

impl PciHost {
    fn read_bytes(&self, bus: u8, devfn: u8, offset: u16, data: &mut [u8]) {
        pieces(offset, data.len(), |at, part| {
            let v = self.config_read(bus, devfn, at).to_le_bytes();
            let from = usize::from(at % 4);
            data[part.clone()].copy_from_slice(&v[from..from + part.len()]);
        });
    }
    fn write_bytes(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        pieces(offset, data.len(), |at, part| {
            self.config_write(bus, devfn, at, &data[part])
        });
    }

    /// The target of a CONFIG_DATA access: bus, function, offset.
    fn mechanism1(&self, port: u64) -> Option<(u8, u8, u16)> {
        let address = lock(&self.plugged).address;
        let offset = (address & 0xfc) as u16 + (port & 3) as u16;
        (address & ENABLE != 0).then_some(((address >> 16) as u8, (address >> 8) as u8, offset))
    }
}

/// Ports CF8H and CFCH-CFFH.
pub struct ConfigPorts(pub Arc<PciHost>);

impl AddressDecoder for ConfigPorts {
    fn read(&self, port: u64, data: &mut [u8]) {
        if port == CONFIG_ADDRESS && data.len() == 4 {
            data.copy_from_slice(&lock(&self.0.plugged).address.to_le_bytes());
        } else if port >= CONFIG_DATA
            && let Some((bus, devfn, offset)) = self.0.mechanism1(port)
        {
            // An access that leaves the double word does not reach the next register.
            let n = data.len().min(4 - usize::from(offset & 3));
            self.0.read_bytes(bus, devfn, offset, &mut data[..n]);
        }
    }
    fn write(&self, port: u64, data: &[u8]) {
        if port == CONFIG_ADDRESS {
            // Narrower accesses are no configuration accesses; they pass on to the I/O bus.
            if let Ok(bytes) = data.try_into() {
                lock(&self.0.plugged).address = u32::from_le_bytes(bytes) & 0x80ff_fffc;
            }
        } else if port >= CONFIG_DATA
            && let Some((bus, devfn, offset)) = self.0.mechanism1(port)
        {
            let n = data.len().min(4 - usize::from(offset & 3));
            self.0.write_bytes(bus, devfn, offset, &data[..n]);
        }
    }
}

/// The memory-mapped configuration space.
pub struct Ecam(pub Arc<PciHost>);

impl PciHost {
    /// True if `addr` is in configuration space.
    pub(super) fn is_ecam(&self, addr: u64) -> bool {
        let base = self.ecam.load(Ordering::Acquire);
        base != 0 && addr.wrapping_sub(base) < ECAM_BYTES
    }

    fn ecam_target(&self, addr: u64) -> (u8, u8, u16) {
        let offset = addr.wrapping_sub(self.ecam.load(Ordering::Acquire));
        (
            (offset >> 20) as u8,
            (offset >> 12) as u8,
            (offset & 0xfff) as u16,
        )
    }
}

impl AddressDecoder for Ecam {
    fn read(&self, addr: u64, data: &mut [u8]) {
        let (bus, devfn, offset) = self.0.ecam_target(addr);
        self.0.read_bytes(bus, devfn, offset, data);
    }
    fn write(&self, addr: u64, data: &[u8]) {
        let (bus, devfn, offset) = self.0.ecam_target(addr);
        self.0.write_bytes(bus, devfn, offset, data);
    }
}
