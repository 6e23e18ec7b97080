//! Mode pages. SPC-4 §6.13 and §7.5, SBC-3 §6.5, MMC-3 §5.5.10.

use super::{Kind, Parameters, Plan, Sense, Unit, be16, byte, reply};

impl Unit {
    pub(super) fn mode_sense(&self, cdb: &[u8]) -> Plan {
        let long = byte(cdb, 0) == 0x5a;
        let (page, subpage) = (byte(cdb, 2) & 0x3f, byte(cdb, 3));
        let which = byte(cdb, 2) >> 6;
        if which == 3 {
            return Plan::Fail(Sense::new(5, 0x39, 0)); // saving parameters not supported
        }
        if subpage != 0 && subpage != 0xff {
            return Plan::Fail(Sense::INVALID_FIELD);
        }
        let wanted: Vec<u8> = match (page, &self.kind) {
            (0x3f, Kind::Disk(_)) => vec![0x08, 0x0a],
            (0x3f, Kind::Cd(_)) => vec![0x01, 0x1a, 0x2a],
            (p, _) => vec![p],
        };
        let mut pages = Vec::new();
        for p in wanted {
            let Some(mut body) = self.mode_page(p) else {
                return Plan::Fail(Sense::INVALID_FIELD);
            };
            if which == 1 {
                body.fill(0); // nothing can be changed
            }
            pages.extend_from_slice(&[p, body.len() as u8]);
            pages.extend(body);
        }
        let info = self.info();
        let mut descriptor = Vec::new();
        if let (Kind::Disk(_), Some(info), true) = (&self.kind, info, byte(cdb, 1) & 8 == 0) {
            let blocks = info.size_bytes / u64::from(info.block_bytes.max(1));
            let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
            descriptor.extend_from_slice(&blocks.to_be_bytes());
            descriptor.extend_from_slice(&info.block_bytes.to_be_bytes());
        }
        let parameter = match &self.kind {
            // WP, DPOFUA
            Kind::Disk(_) => {
                0x10 | if info.is_some_and(|i| i.read_only) {
                    0x80
                } else {
                    0
                }
            }
            Kind::Cd(_) => 0,
        };
        let medium_type = match (&self.kind, info) {
            (Kind::Disk(_), _) => 0,
            (Kind::Cd(tray), None) => 0x70 + u8::from(tray.is_open()),
            (Kind::Cd(_), Some(_)) => 0x01,
        };
        let rest = descriptor.len() + pages.len();
        let mut data = Vec::new();
        if long {
            data.extend_from_slice(&((rest + 6) as u16).to_be_bytes());
            data.extend_from_slice(&[medium_type, parameter, 0, 0]);
            data.extend_from_slice(&(descriptor.len() as u16).to_be_bytes());
        } else {
            data.extend_from_slice(&[(rest + 3) as u8, medium_type, parameter]);
            data.push(descriptor.len() as u8);
        }
        data.extend(descriptor);
        data.extend(pages);
        let allocation = if long {
            be16(cdb, 7).into()
        } else {
            usize::from(byte(cdb, 4))
        };
        reply(data, allocation)
    }

    fn mode_page(&self, page: u8) -> Option<Vec<u8>> {
        Some(match (page, &self.kind) {
            // Caching: WCE.
            (0x08, Kind::Disk(d)) => {
                let mut b = vec![0; 18];
                b[0] = if d.info().read_only { 0 } else { 0x04 };
                b
            }
            // Control.
            (0x0a, Kind::Disk(_)) => vec![0; 10],
            // Read error recovery.
            (0x01, Kind::Cd(_)) => vec![0, 5, 0, 0, 0, 0, 0, 0, 0, 0],
            // Power condition.
            (0x1a, Kind::Cd(_)) => vec![0; 10],
            // Capabilities and mechanical status.
            (0x2a, Kind::Cd(tray)) => {
                let mut b = vec![0; 20];
                b[0] = 0x3b; // reads CD-R, CD-RW, method 2, DVD-ROM, DVD-R
                b[2] = 0x70; // multi-session, mode 2 form 1 and 2
                b[4] = 0x29 | u8::from(tray.is_locked()) << 1; // tray, eject, lock
                let speed = 2822_u16.to_be_bytes(); // 16x in kB/s
                b[6..8].copy_from_slice(&speed);
                b[10..12].copy_from_slice(&512_u16.to_be_bytes()); // buffer in KiB
                b[12..14].copy_from_slice(&speed);
                b
            }
            _ => return None,
        })
    }

    pub(super) fn mode_select(cdb: &[u8]) -> Plan {
        let (header, len) = if byte(cdb, 0) == 0x55 {
            (8, u32::from(be16(cdb, 7)))
        } else {
            (4, u32::from(byte(cdb, 4)))
        };
        if len == 0 {
            return Plan::Done;
        }
        Plan::Parameters {
            len,
            what: Parameters::Mode { header },
        }
    }
}

/// No page can be changed: a list of pages as they are reported is taken, and has no effect.
pub(super) fn select(data: &[u8], header: usize) -> Plan {
    if data.len() < header {
        return Plan::Fail(Sense::PARAMETER_LENGTH);
    }
    let descriptors = if header == 8 {
        be16(data, 6).into()
    } else {
        usize::from(byte(data, 3))
    };
    let mut at = header + descriptors;
    while at < data.len() {
        let Some(&[_, len]) = data.get(at..at + 2) else {
            return Plan::Fail(Sense::PARAMETER_LENGTH);
        };
        at += 2 + usize::from(len);
    }
    if at > data.len() {
        return Plan::Fail(Sense::PARAMETER_LENGTH);
    }
    Plan::Done
}
