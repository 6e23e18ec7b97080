//! Frames between host and drive, as they lie in memory. Serial ATA 3.0 §10.3, AHCI §4.2.

use crate::storage::ata::{Registers, TaskFile};

/// Host to device register frame.
pub(super) const HOST_TO_DEVICE: u8 = 0x27;
/// Where frames lie in the received FIS area. §4.2.1.
pub(super) const PIO_SETUP_AT: u64 = 0x20;
pub(super) const D2H_AT: u64 = 0x40;
pub(super) const SDB_AT: u64 = 0x58;
/// Control register: software reset.
pub(super) const SRST: u8 = 1 << 2;
/// A drive asks for an interrupt.
const INTERRUPT: u8 = 0x40;

/// What a register frame from the host asks for.
pub(super) enum FromHost {
    Command(TaskFile),
    Control(u8),
}

/// Reads a frame of the host; `None` if it is another one.
pub(super) fn parse(f: &[u8; 64]) -> Option<FromHost> {
    if f[0] != HOST_TO_DEVICE {
        return None;
    }
    if f[1] & 0x80 == 0 {
        return Some(FromHost::Control(f[15]));
    }
    let lba = [f[4], f[5], f[6], f[8], f[9], f[10], 0, 0];
    Some(FromHost::Command(TaskFile {
        command: f[2],
        features: u16::from_le_bytes([f[3], f[11]]),
        count: u16::from_le_bytes([f[12], f[13]]),
        lba: u64::from_le_bytes(lba),
        device: f[7],
    }))
}

fn registers(kind: u8, flags: u8, r: &Registers) -> [u8; 20] {
    let lba = r.lba.to_le_bytes();
    let count = r.count.to_le_bytes();
    let mut f = [0; 20];
    f[0] = kind;
    f[1] = flags;
    f[2] = r.status;
    f[3] = r.error;
    f[4..7].copy_from_slice(&lba[..3]);
    f[7] = r.device;
    f[8..11].copy_from_slice(&lba[3..6]);
    f[12..14].copy_from_slice(&count);
    f
}

/// Register frame of a drive.
pub(super) fn d2h(r: &Registers) -> [u8; 20] {
    registers(0x34, INTERRUPT, r)
}

/// PIO setup frame before the last `bytes` that the drive sends.
pub(super) fn pio_setup(r: &Registers, bytes: u16) -> [u8; 20] {
    const TO_HOST: u8 = 0x20;
    const DRQ: u8 = 0x58;
    let mut f = registers(0x5f, INTERRUPT | TO_HOST, r);
    f[2] = DRQ;
    f[15] = r.status; // E_Status: the status after the data
    f[16..18].copy_from_slice(&bytes.to_le_bytes());
    f
}

/// Set device bits frame for queued commands that are done.
pub(super) fn set_device_bits(r: &Registers, tags: u32) -> [u8; 8] {
    let mut f = [0xa1, INTERRUPT, r.status & 0x77, r.error, 0, 0, 0, 0];
    f[4..].copy_from_slice(&tags.to_le_bytes());
    f
}
