//! Storage controllers and the drives behind them.
//!
//! ```text
//!        ahci        ide         nvme       floppy        host controllers
//!           \        /             |           |
//!            ata::Device           |           |          one drive, two ways to it
//!           /        \             |           |
//!   disk commands   disk::scsi     |           |          ATAPI is SCSI (MMC) in packets
//!           \        /             |           |
//!            disk::BlockBackend ───┴───────────┘
//! ```
//!
//! A controller decides under its lock what a command comes to (a [`pyrite_disk::scsi::Plan`]) and
//! carries it out without the lock, because a back end may complete before `submit` returns.

pub mod ahci;
pub mod ata;
pub mod floppy;
pub mod ide;
pub mod isa_dma;
pub mod nvme;
#[cfg(test)]
pub(crate) mod testing;

use crate::dwords::{read_dwords, write_dwords};
