//! What tests of controllers share: memory, interrupt sinks, drives.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pyrite_disk::{BlockBackend, MemDisk};
use pyrite_mem::GuestMemory;
use pyrite_vdev::{IrqLine, IrqSink, MsiMessage, MsiSink, PciFunction};

use super::ata::Names;

pub(crate) const RAM_BYTES: u64 = 4 << 20;

/// Counts messages and shows the level of a line.
#[derive(Default)]
pub(crate) struct Interrupts {
    pub(crate) messages: AtomicUsize,
    pub(crate) level: AtomicBool,
}

impl MsiSink for Interrupts {
    fn send(&self, _: MsiMessage) {
        self.messages.fetch_add(1, Ordering::SeqCst);
    }
}

impl IrqSink for Interrupts {
    fn set_level(&self, _: u32, level: bool) {
        self.level.store(level, Ordering::SeqCst);
    }
}

impl Interrupts {
    pub(crate) fn line(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), 16)
    }
    pub(crate) fn is_up(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }
}

pub(crate) fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(RAM_BYTES).expect("memory"))
}

pub(crate) fn names(model: &str) -> Names {
    Names {
        model: model.into(),
        serial: "serial-1".into(),
        firmware: "1.0".into(),
    }
}

/// A read-only medium whose sectors start with their number.
pub(crate) fn cd_medium(sectors: u32) -> Arc<dyn BlockBackend> {
    let mut content = vec![0x5a; sectors as usize * 2048];
    for (n, s) in content.chunks_mut(2048).enumerate() {
        s[..4].copy_from_slice(&(n as u32).to_le_bytes());
    }
    Arc::new(MemDisk::with_content(content, true))
}

/// Turns decoding and bus mastering on.
pub(crate) fn enable(f: &Mutex<impl PciFunction>) {
    pyrite_vdev::bus::lock(f).config_write(4, &7_u16.to_le_bytes());
}

/// Enables MSI with one vector.
pub(crate) fn enable_msi(f: &Mutex<impl PciFunction>) {
    let mut f = pyrite_vdev::bus::lock(f);
    let mut cap = (f.config_read(0x34) & 0xff) as u16;
    while f.config_read(cap) & 0xff != 5 {
        cap = (f.config_read(cap) >> 8 & 0xff) as u16;
        assert_ne!(cap, 0, "no MSI");
    }
    f.config_write(cap + 4, &0xfee0_0000_u32.to_le_bytes());
    f.config_write(cap + 2, &1_u16.to_le_bytes());
}
