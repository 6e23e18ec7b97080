//! Commands of a disk. ACS-3 §7; those with CHS addresses ATA/ATAPI-6 §8.

use std::sync::Arc;

use pyrite_disk::scsi::{Direction, Parameters, Plan, Sense};
use pyrite_disk::{BlockBackend, BlockRequest};

use super::{Command, DEVICE_LBA, Device, MAX_MULTIPLE, MAX_TRIM_BLOCKS, Protocol, TaskFile};
use super::{Kind, identify};

/// Bytes of a log page.
const LOG_PAGE: usize = 512;
/// Directory of logs, and the log of the queued command that failed.
const LOG_DIRECTORY: u8 = 0x00;
const LOG_QUEUED_ERROR: u8 = 0x10;

/// Blocks of a disk, and bytes of a block.
pub(super) fn geometry(disk: &Arc<dyn BlockBackend>) -> (u64, u32) {
    let info = disk.info();
    let block = info.block_bytes.max(1);
    (info.size_bytes / u64::from(block), block)
}

/// What a read or write command is.
struct Access {
    write: bool,
    /// 48-bit address and 16-bit count.
    ext: bool,
    protocol: How,
    fua: bool,
}

enum How {
    Pio,
    Multiple,
    Dma,
}

fn access(command: u8) -> Option<Access> {
    use How::{Dma, Multiple, Pio};
    let (write, ext, protocol, fua) = match command {
        0x20 | 0x21 => (false, false, Pio, false),
        0x24 => (false, true, Pio, false),
        0xc4 => (false, false, Multiple, false),
        0x29 => (false, true, Multiple, false),
        0xc8 | 0xc9 => (false, false, Dma, false),
        0x25 => (false, true, Dma, false),
        0x30 | 0x31 => (true, false, Pio, false),
        0x34 => (true, true, Pio, false),
        0xc5 => (true, false, Multiple, false),
        0x39 => (true, true, Multiple, false),
        0xce => (true, true, Multiple, true),
        0xca | 0xcb => (true, false, Dma, false),
        0x35 => (true, true, Dma, false),
        0x3d => (true, true, Dma, true),
        _ => return None,
    };
    Some(Access {
        write,
        ext,
        protocol,
        fua,
    })
}

impl Device {
    /// First block and number of blocks that a task file names.
    fn range(&self, t: &TaskFile, ext: bool) -> Result<(u64, u64), Sense> {
        let count = match (ext, t.count, t.count & 0xff) {
            (true, 0, _) => 65536,
            (true, n, _) => u64::from(n),
            (false, _, 0) => 256,
            (false, _, n) => u64::from(n),
        };
        if ext {
            return Ok((t.lba & 0xffff_ffff_ffff, count));
        }
        let low = t.lba & 0xff_ffff;
        let high = u64::from(t.device & 0xf);
        if t.device & DEVICE_LBA != 0 {
            return Ok((high << 24 | low, count));
        }
        // Cylinder, head, sector; sectors count from 1. ATA/ATAPI-5 §6.2.
        let (heads, sectors) = (self.settings.heads.into(), self.settings.sectors.into());
        let (sector, cylinder) = (low & 0xff, low >> 8);
        if sector == 0 || sector > sectors || high >= heads {
            return Err(Sense::OUT_OF_RANGE);
        }
        Ok(((cylinder * heads + high) * sectors + sector - 1, count))
    }

    fn transfer(&self, lba: u64, count: u64, write: bool, fua: bool) -> Plan {
        let Kind::Disk(disk) = &self.kind else {
            return Plan::Fail(Sense::INVALID_COMMAND);
        };
        let (blocks, block) = geometry(disk);
        if write && disk.info().read_only {
            return Plan::Fail(Sense::WRITE_PROTECTED);
        }
        match lba.checked_add(count) {
            Some(end) if end <= blocks => {}
            _ => return Plan::Fail(Sense::OUT_OF_RANGE),
        }
        Plan::Transfer {
            backend: Arc::clone(disk),
            direction: if write { Direction::Out } else { Direction::In },
            offset: lba * u64::from(block),
            len: count * u64::from(block),
            fua: write && (fua || !self.settings.write_cache),
        }
    }

    pub(super) fn disk_command(&mut self, t: &TaskFile, c: &mut Command) {
        if let Some(a) = access(t.command) {
            return self.read_write(t, &a, c);
        }
        let Kind::Disk(disk) = &self.kind else { return };
        let (blocks, _) = geometry(disk);
        match t.command {
            0xec => {
                c.protocol = Protocol::PioIn(512);
                let (names, link) = (&self.names, self.serial_link);
                c.plan = Plan::Reply(identify::disk(disk, names, &self.settings, link));
            }
            // READ and WRITE FPDMA QUEUED: count in features, tag in count. ACS-3 §7.22.
            0x60 | 0x61 if self.serial_link => {
                let tag = (t.count >> 3) as u8 & 31;
                let count = match t.features {
                    0 => 65536,
                    n => u64::from(n),
                };
                let (write, fua) = (t.command == 0x61, t.device & 0x80 != 0);
                c.protocol = Protocol::Queued(tag);
                c.pending.tag = Some(tag);
                c.plan = self.transfer(t.lba & 0xffff_ffff_ffff, count, write, fua);
            }
            0x40..=0x42 => {
                c.plan = match self.range(t, t.command == 0x42) {
                    Ok((lba, count)) => match self.transfer(lba, count, false, false) {
                        Plan::Fail(sense) => Plan::Fail(sense),
                        _ => Plan::Done,
                    },
                    Err(sense) => Plan::Fail(sense),
                };
            }
            0xe7 | 0xea => {
                c.plan = Plan::Work {
                    backend: Arc::clone(disk),
                    requests: vec![BlockRequest::Flush],
                };
            }
            // READ NATIVE MAX ADDRESS (EXT)
            0xf8 => {
                let last = blocks.saturating_sub(1).min(0x0fff_ffff);
                c.pending.good.lba = last & 0xff_ffff;
                c.pending.good.device = t.device & 0xf0 | (last >> 24) as u8;
            }
            0x27 => c.pending.good.lba = blocks.saturating_sub(1),
            // SET MULTIPLE MODE
            0xc6 => match (t.count & 0xff) as u8 {
                n if n <= MAX_MULTIPLE && (n == 0 || n.is_power_of_two()) => {
                    self.settings.multiple = n;
                }
                _ => c.plan = Plan::Fail(Sense::INVALID_FIELD),
            },
            // INITIALIZE DEVICE PARAMETERS, ATA/ATAPI-5 §8.16.
            0x91 => match (t.count & 0xff) as u8 {
                0 => c.plan = Plan::Fail(Sense::INVALID_FIELD),
                sectors => {
                    self.settings.sectors = sectors;
                    self.settings.heads = (t.device & 0xf) + 1;
                }
            },
            0x10..=0x1f | 0x70 => {} // RECALIBRATE, SEEK
            // DATA SET MANAGEMENT: trim.
            0x06 if disk.info().discard => {
                if t.features & 1 == 0 || t.count == 0 || t.count > MAX_TRIM_BLOCKS {
                    c.plan = Plan::Fail(Sense::INVALID_FIELD);
                } else if disk.info().read_only {
                    c.plan = Plan::Fail(Sense::WRITE_PROTECTED);
                } else {
                    c.protocol = Protocol::Dma;
                    c.plan = Plan::Parameters {
                        len: u32::from(t.count) * LOG_PAGE as u32,
                        what: Parameters::Trim,
                    };
                }
            }
            // READ LOG (DMA) EXT
            0x2f | 0x47 => {
                c.protocol = if t.command == 0x2f {
                    Protocol::PioIn(LOG_PAGE as u32)
                } else {
                    Protocol::Dma
                };
                c.plan = self.read_log(t);
            }
            _ => c.plan = Plan::Fail(Sense::INVALID_COMMAND),
        }
    }

    fn read_write(&mut self, t: &TaskFile, a: &Access, c: &mut Command) {
        let Kind::Disk(disk) = &self.kind else { return };
        let (_, block) = geometry(disk);
        let pio = |bytes| {
            if a.write {
                Protocol::PioOut(bytes)
            } else {
                Protocol::PioIn(bytes)
            }
        };
        c.protocol = match a.protocol {
            How::Pio => pio(block),
            How::Dma => Protocol::Dma,
            How::Multiple if self.settings.multiple == 0 => {
                c.plan = Plan::Fail(Sense::INVALID_COMMAND);
                return;
            }
            How::Multiple => pio(block * u32::from(self.settings.multiple)),
        };
        c.plan = match self.range(t, a.ext) {
            Ok((lba, count)) => {
                // The last block's address, and nothing left to transfer.
                let last = lba + count - 1;
                if a.ext || t.device & DEVICE_LBA != 0 {
                    c.pending.lba = lba;
                    c.pending.good.lba = if a.ext { last } else { last & 0xff_ffff };
                    if !a.ext {
                        c.pending.good.device = t.device & 0xf0 | (last >> 24) as u8 & 0xf;
                    }
                }
                c.pending.good.count = 0;
                self.transfer(lba, count, a.write, a.fua)
            }
            Err(sense) => Plan::Fail(sense),
        };
    }

    /// READ LOG EXT. ACS-3 §7.23 and §A.
    fn read_log(&mut self, t: &TaskFile) -> Plan {
        let (log, page) = (
            (t.lba & 0xff) as u8,
            t.lba >> 8 & 0xff | t.lba >> 24 & 0xff00,
        );
        let mut data = [0; LOG_PAGE];
        match log {
            _ if t.count != 1 || page != 0 => return Plan::Fail(Sense::INVALID_FIELD),
            LOG_DIRECTORY => {
                data[0] = 1; // version 1
                data[2 * usize::from(LOG_QUEUED_ERROR)] = 1; // one page
            }
            LOG_QUEUED_ERROR if self.serial_link => match self.queued_error.take() {
                None => data[0] = 0x80, // no queued command has failed
                Some(e) => {
                    let r = e.registers;
                    let lba = r.lba.to_le_bytes();
                    data[0] = e.tag;
                    data[2] = r.status;
                    data[3] = r.error;
                    data[4..7].copy_from_slice(&lba[..3]);
                    data[7] = r.device;
                    data[8..11].copy_from_slice(&lba[3..6]);
                    data[12..14].copy_from_slice(&r.count.to_le_bytes());
                }
            },
            _ => return Plan::Fail(Sense::INVALID_FIELD),
        }
        if log == LOG_QUEUED_ERROR {
            data[LOG_PAGE - 1] = checksum(&data);
        }
        Plan::Reply(data.to_vec())
    }
}

/// What makes the sum of all bytes zero.
pub(super) fn checksum(data: &[u8]) -> u8 {
    data.iter()
        .fold(0_u8, |s, b| s.wrapping_add(*b))
        .wrapping_neg()
}

/// The ranges of DATA SET MANAGEMENT: 48 bits of address and 16 bits of count. ACS-3 §7.5.3.
pub(super) fn trim(disk: &Arc<dyn BlockBackend>, data: &[u8]) -> Plan {
    let (blocks, block) = geometry(disk);
    let mut requests = Vec::new();
    for entry in data.as_chunks::<8>().0 {
        let v = u64::from_le_bytes(*entry);
        let (lba, count) = (v & 0xffff_ffff_ffff, v >> 48);
        if count == 0 {
            continue;
        }
        if lba + count > blocks {
            return Plan::Fail(Sense::OUT_OF_RANGE);
        }
        let (offset, len) = (lba * u64::from(block), count * u64::from(block));
        // Neighbouring ranges become one request.
        if let Some(BlockRequest::Discard { offset: o, len: l }) = requests.last_mut()
            && *o + *l == offset
        {
            *l += len;
            continue;
        }
        requests.push(BlockRequest::Discard { offset, len });
    }
    Plan::Work {
        backend: Arc::clone(disk),
        requests,
    }
}
