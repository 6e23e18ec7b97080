//! The host bridge that PC firmware knows: MCH of the Intel Q35, with its registers for PCI Express
//! configuration space and shadow RAM. Intel 3 Series Express Chipset Family data sheet §5.1.
//!
//! The subsystem is the one by which firmware for virtual machines recognises its platform. SMRAM
//! does not exist: its register (9DH) reads as locked and closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyrite_mem::{GuestMemory, LEGACY_END, LEGACY_START, Route};
use pyrite_vdev::pci::{ConfigSpace, PciIds};

/// Vendor and device.
pub(super) const IDS: PciIds = PciIds {
    vendor_id: 0x8086,
    device_id: 0x29c0,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor_id: 0x1af4,
    subsystem_id: 0x1100,
};

/// Bytes of PCI Express configuration space: the only length, 256 buses.
pub const ECAM_BYTES: u64 = 256 << 20;

const PCIEXBAR: u16 = 0x60;
/// PCIEXBAR: configuration space is decoded.
const PCIEXBAR_ENABLE: u64 = 1;
/// PCIEXBAR: base address, bits 35:28.
const PCIEXBAR_BASE: u64 = 0xf_f000_0000;
const PAM0: u16 = 0x90;
const PAM_BYTES: usize = 7;
const SMRAM: u16 = 0x9d;
/// D_LCK, and C_BASE_SEG, which always reads so.
const SMRAM_LOCKED: u8 = 1 << 4 | 0b010;

/// What the registers act on.
pub(super) struct Q35 {
    pub memory: Arc<GuestMemory>,
    /// Where configuration space is; 0 = nowhere.
    pub ecam: Arc<AtomicU64>,
}

impl Q35 {
    /// The configuration space of the bridge.
    pub(super) fn config() -> ConfigSpace {
        let mut c = ConfigSpace::new(IDS);
        let writable = (PCIEXBAR_BASE | PCIEXBAR_ENABLE).to_le_bytes();
        c.add_register(PCIEXBAR, &[0; 8], &writable);
        // PAM0 has only its upper half.
        c.add_register(PAM0, &[0], &[0x30]);
        c.add_register(PAM0 + 1, &[0; PAM_BYTES - 1], &[0x33; PAM_BYTES - 1]);
        c.add_register(SMRAM, &[SMRAM_LOCKED], &[0]);
        c
    }

    /// Does what the registers say.
    pub(super) fn apply(&self, config: &ConfigSpace) {
        let low = u64::from(config.read(PCIEXBAR));
        let bar = low | u64::from(config.read(PCIEXBAR + 4)) << 32;
        let base = if bar & PCIEXBAR_ENABLE != 0 {
            bar & PCIEXBAR_BASE
        } else {
            0
        };
        self.ecam.store(base, Ordering::Release);
        let low = u64::from(config.read(PAM0));
        let pam = (low | u64::from(config.read(PAM0 + 4)) << 32).to_le_bytes();
        // No RAM behind video memory.
        self.memory
            .set_route(LEGACY_START, 0xc_0000, Route::default());
        let route = |bits: u8| Route {
            read_ram: bits & 1 != 0,
            write_ram: bits & 2 != 0,
        };
        self.memory
            .set_route(0xf_0000, LEGACY_END, route(pam[0] >> 4));
        let mut at = 0xc_0000;
        for p in &pam[1..PAM_BYTES] {
            for bits in [p & 0xf, p >> 4] {
                self.memory.set_route(at, at + 0x4000, route(bits));
                at += 0x4000;
            }
        }
    }
}
