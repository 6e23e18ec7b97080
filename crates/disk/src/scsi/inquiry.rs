//! INQUIRY and its vital product data. SPC-4 §6.6 and §7.8, SBC-3 §6.6.

use super::{Kind, MAX_RANGE_BLOCKS, MAX_UNMAP_RANGES, Plan, Sense, Unit, be16, byte, reply};

/// Text padded with spaces, without characters that INQUIRY cannot have.
pub(super) fn padded(text: &str, len: usize) -> Vec<u8> {
    let ascii = text
        .bytes()
        .map(|b| if (0x20..0x7f).contains(&b) { b } else { b'?' });
    let mut out: Vec<u8> = ascii.take(len).collect();
    out.resize(len, b' ');
    out
}

impl Unit {
    fn device_type(&self) -> u8 {
        match self.kind {
            Kind::Disk(_) => 0,
            Kind::Cd(_) => 5,
        }
    }

    pub(super) fn inquiry(&self, cdb: &[u8]) -> Plan {
        let (evpd, page) = (byte(cdb, 1) & 1 != 0, byte(cdb, 2));
        let allocation = be16(cdb, 3).into();
        if evpd {
            return match self.vital_page(page) {
                Some(body) => {
                    let mut data = vec![self.device_type(), page];
                    data.extend_from_slice(&(body.len() as u16).to_be_bytes());
                    data.extend(body);
                    reply(data, allocation)
                }
                None => Plan::Fail(Sense::INVALID_FIELD),
            };
        }
        if page != 0 {
            return Plan::Fail(Sense::INVALID_FIELD);
        }
        let mut data = vec![0; 36];
        data[0] = self.device_type();
        data[1] = if self.device_type() == 5 { 0x80 } else { 0 }; // RMB
        // Version: MMC drives on ATAPI say 0 (MMC-6 §6.8.2), others SPC-3.
        data[2] = if self.atapi { 0 } else { 5 };
        data[3] = if self.atapi { 0x32 } else { 0x12 }; // HISUP, response data format 2
        data[4] = 31;
        data[7] = if self.atapi { 0 } else { 0x02 }; // CMDQUE
        data[8..16].copy_from_slice(&padded(&self.identity.vendor, 8));
        data[16..32].copy_from_slice(&padded(&self.identity.product, 16));
        data[32..36].copy_from_slice(&padded(&self.identity.revision, 4));
        reply(data, allocation)
    }

    fn vital_page(&self, page: u8) -> Option<Vec<u8>> {
        let serial = &self.identity.serial;
        let disk = match &self.kind {
            Kind::Disk(d) => Some(d.info()),
            Kind::Cd(_) => None,
        };
        Some(match page {
            0x00 => {
                let mut pages = vec![0x00];
                if !serial.is_empty() {
                    pages.push(0x80);
                }
                pages.push(0x83);
                if disk.is_some() {
                    pages.extend_from_slice(&[0xb0, 0xb1, 0xb2]);
                }
                pages
            }
            0x80 if !serial.is_empty() => padded(serial, serial.len().min(64)),
            0x83 => {
                // One designator: T10 vendor identification, ASCII. §7.8.6.4.
                let mut id = padded(&self.identity.vendor, 8);
                id.extend(padded(&self.identity.product, 16));
                id.extend(padded(serial, serial.len().min(64)));
                let mut d = vec![0x02, 0x01, 0, id.len() as u8];
                d.extend(id);
                d
            }
            // Block limits, SBC-3 §6.6.3.
            0xb0 => {
                let info = disk?;
                let mut b = vec![0; 60];
                let mut put = |at: usize, v: u32| b[at..at + 4].copy_from_slice(&v.to_be_bytes());
                put(16, MAX_RANGE_BLOCKS); // maximum unmap LBA count
                put(20, MAX_UNMAP_RANGES as u32);
                put(24, 4096_u32.max(info.block_bytes) / info.block_bytes.max(1));
                // Maximum write same length, 64 bits.
                put(36, MAX_RANGE_BLOCKS);
                b
            }
            // Block device characteristics: does not rotate.
            0xb1 => {
                disk?;
                let mut b = vec![0; 60];
                b[1] = 1;
                b
            }
            // Logical block provisioning: UNMAP and WRITE SAME (16), thin.
            0xb2 => {
                let info = disk?;
                let thin = info.discard && !info.read_only;
                vec![0, if thin { 0xc0 } else { 0 }, if thin { 2 } else { 0 }, 0]
            }
            _ => return None,
        })
    }
}
