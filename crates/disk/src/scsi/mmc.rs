//! Commands of a CD/DVD drive. MMC-6 §6; CD only: MMC-3.

use std::sync::Arc;

use super::{CD_SECTOR_BYTES, Direction, Plan, Sense, be16, be24, be32, byte, reply};
use crate::BlockBackend;
use crate::medium::{MediaEvent, Tray};

/// Larger media are DVDs: a CD of 99 minutes has less than 900 MiB.
const DVD_FROM_BYTES: u64 = 900 << 20;
const PROFILE_CD_ROM: u16 = 0x0008;
const PROFILE_DVD_ROM: u16 = 0x0010;
/// Sectors before LBA 0 in minute-second-frame addresses.
const MSF_OFFSET: u32 = 150;

pub(super) fn plan(tray: &Arc<Tray>, cdb: &[u8]) -> Plan {
    let op = byte(cdb, 0);
    match op {
        0x1b => start_stop(tray, byte(cdb, 4)),
        0x1e => {
            tray.set_locked(byte(cdb, 4) & 1 != 0);
            Plan::Done
        }
        0x46 => configuration(tray, cdb),
        0x4a => event_status(tray, cdb),
        0xbd => {
            // MECHANISM STATUS: one slot, no changer.
            let mut data = vec![0; 8];
            data[1] = u8::from(tray.is_open()) << 4;
            reply(data, be16(cdb, 8).into())
        }
        0xbb => Plan::Done, // SET CD SPEED
        _ => match tray.medium() {
            Some(medium) => with_medium(&medium, cdb),
            None if known_with_medium(op) => Plan::Fail(if tray.is_open() {
                Sense::NO_MEDIUM_TRAY_OPEN
            } else {
                Sense::NO_MEDIUM
            }),
            None => Plan::Fail(Sense::INVALID_COMMAND),
        },
    }
}

fn known_with_medium(op: u8) -> bool {
    matches!(
        op,
        0x00 | 0x08
            | 0x25
            | 0x28
            | 0x2b
            | 0x2f
            | 0x42
            | 0x43
            | 0x44
            | 0x51
            | 0x52
            | 0xa8
            | 0xad
            | 0xb9
            | 0xbe
    )
}

fn sectors(medium: &Arc<dyn BlockBackend>) -> u32 {
    // What does not fill a sector cannot be read.
    u32::try_from(medium.info().size_bytes / CD_SECTOR_BYTES).unwrap_or(u32::MAX)
}

fn with_medium(medium: &Arc<dyn BlockBackend>, cdb: &[u8]) -> Plan {
    match byte(cdb, 0) {
        0x00 => Plan::Done,
        0x08 => {
            let count = match byte(cdb, 4) {
                0 => 256,
                n => n.into(),
            };
            read(medium, be24(cdb, 1) & 0x1f_ffff, count)
        }
        0x28 => read(medium, be32(cdb, 2), be16(cdb, 7).into()),
        0xa8 => read(medium, be32(cdb, 2), be32(cdb, 6)),
        // READ CD and READ CD MSF: user data of mode 1 sectors, or nothing.
        0xbe | 0xb9 => {
            if !matches!(byte(cdb, 1) >> 2 & 7, 0 | 2 | 4) {
                return Plan::Fail(Sense::new(5, 0x64, 0)); // illegal mode for this track
            }
            let (start, count) = if byte(cdb, 0) == 0xbe {
                (be32(cdb, 2), be24(cdb, 6))
            } else {
                let (Some(start), Some(end)) = (from_msf(cdb, 3), from_msf(cdb, 6)) else {
                    return Plan::Fail(Sense::INVALID_FIELD);
                };
                (start, end.saturating_sub(start))
            };
            match (byte(cdb, 9) & 0xf8, byte(cdb, 9) & 6, byte(cdb, 10) & 7) {
                (0x00, 0, 0) => read(medium, start, 0),
                (0x10, 0, 0) => read(medium, start, count),
                _ => Plan::Fail(Sense::INVALID_FIELD),
            }
        }
        // SEEK, VERIFY
        0x2b => read(medium, be32(cdb, 2), 0),
        0x2f => match read(medium, be32(cdb, 2), be16(cdb, 7).into()) {
            Plan::Fail(sense) => Plan::Fail(sense),
            _ => Plan::Done,
        },
        0x25 => {
            let mut data = sectors(medium).saturating_sub(1).to_be_bytes().to_vec();
            data.extend_from_slice(&(CD_SECTOR_BYTES as u32).to_be_bytes());
            Plan::Reply(data)
        }
        0x42 => sub_channel(cdb),
        0x43 => toc(medium, cdb),
        // READ HEADER: mode 1.
        0x44 => {
            let mut data = vec![1, 0, 0, 0];
            data.extend_from_slice(&address(be32(cdb, 2), byte(cdb, 1) & 2 != 0));
            reply(data, be16(cdb, 7).into())
        }
        0x51 => disc_information(cdb),
        0x52 => track_information(medium, cdb),
        0xad => dvd_structure(medium, cdb),
        _ => Plan::Fail(Sense::INVALID_COMMAND),
    }
}

fn read(medium: &Arc<dyn BlockBackend>, lba: u32, count: u32) -> Plan {
    match lba.checked_add(count) {
        Some(end) if end <= sectors(medium) => {}
        _ => return Plan::Fail(Sense::OUT_OF_RANGE),
    }
    if count == 0 {
        return Plan::Done;
    }
    Plan::Transfer {
        backend: Arc::clone(medium),
        direction: Direction::In,
        offset: u64::from(lba) * CD_SECTOR_BYTES,
        len: u64::from(count) * CD_SECTOR_BYTES,
        fua: false,
    }
}

/// START STOP UNIT, MMC-6 §6.42.
fn start_stop(tray: &Arc<Tray>, action: u8) -> Plan {
    let (start, load_eject) = (action & 1 != 0, action & 2 != 0);
    // A power condition alone changes nothing.
    if action >> 4 != 0 || !load_eject {
        return Plan::Done;
    }
    match tray.set_open(!start) {
        Ok(()) => Plan::Done,
        Err(_) => Plan::Fail(Sense::REMOVAL_PREVENTED),
    }
}

/// A logical block address, as minute, second and frame if asked. MMC-3 §4.2.
fn address(lba: u32, msf: bool) -> [u8; 4] {
    if !msf {
        return lba.to_be_bytes();
    }
    let frames = lba.saturating_add(MSF_OFFSET);
    let minutes = (frames / 75 / 60).min(255);
    [
        0,
        minutes as u8,
        (frames / 75 % 60) as u8,
        (frames % 75) as u8,
    ]
}

fn from_msf(cdb: &[u8], at: usize) -> Option<u32> {
    let [m, s, f] = [0, 1, 2].map(|n| u32::from(byte(cdb, at + n)));
    ((m * 60 + s) * 75 + f).checked_sub(MSF_OFFSET)
}

/// READ TOC/PMA/ATIP: one data track, one session. MMC-6 §6.26.
fn toc(medium: &Arc<dyn BlockBackend>, cdb: &[u8]) -> Plan {
    let msf = byte(cdb, 1) & 2 != 0;
    let end = sectors(medium);
    let start = byte(cdb, 6);
    // Old drivers put the format into the control byte.
    let format = match byte(cdb, 2) & 0xf {
        0 => byte(cdb, 9) >> 6,
        f => f,
    };
    let track = |number: u8, lba: u32| {
        let mut t = vec![0, 0x14, number, 0];
        t.extend_from_slice(&address(lba, msf));
        t
    };
    let (first, last, body) = match format {
        0 => {
            if start > 1 && start != 0xaa {
                return Plan::Fail(Sense::INVALID_FIELD);
            }
            let mut b = Vec::new();
            if start <= 1 {
                b.extend(track(1, 0));
            }
            b.extend(track(0xaa, end));
            (1, 1, b)
        }
        1 => (1, 1, track(1, 0)),
        2 => {
            // Full TOC: first and last track, lead-out, track 1; always in MSF form.
            let entry = |point: u8, at: [u8; 3]| {
                let mut e = vec![1, 0x14, 0, point, 0, 0, 0, 0];
                e.extend_from_slice(&at);
                e
            };
            let [_, m, s, f] = address(end, true);
            let mut b = entry(0xa0, [1, 0, 0]);
            b.extend(entry(0xa1, [1, 0, 0]));
            b.extend(entry(0xa2, [m, s, f]));
            b.extend(entry(1, [0, 2, 0]));
            (1, 1, b)
        }
        _ => return Plan::Fail(Sense::INVALID_FIELD),
    };
    let mut data = ((body.len() + 2) as u16).to_be_bytes().to_vec();
    data.extend_from_slice(&[first, last]);
    data.extend(body);
    reply(data, be16(cdb, 7).into())
}

/// READ SUB-CHANNEL: no audio is playing. MMC-3 §5.26.
fn sub_channel(cdb: &[u8]) -> Plan {
    let mut data = vec![0, 0x15, 0, 0];
    if byte(cdb, 2) & 0x40 != 0 {
        let format = byte(cdb, 3);
        let len = match format {
            1 => 12,
            2 | 3 => 20,
            _ => return Plan::Fail(Sense::INVALID_FIELD),
        };
        let mut body = vec![0; len];
        body[0] = format;
        data[3] = len as u8;
        data.extend(body);
    }
    reply(data, be16(cdb, 7).into())
}

fn profile(tray: &Tray) -> u16 {
    match tray.medium() {
        None => 0,
        Some(m) if m.info().size_bytes >= DVD_FROM_BYTES => PROFILE_DVD_ROM,
        Some(_) => PROFILE_CD_ROM,
    }
}

/// GET CONFIGURATION, MMC-6 §6.5 and §5.3.
fn configuration(tray: &Tray, cdb: &[u8]) -> Plan {
    let request = byte(cdb, 1) & 3;
    let from = be16(cdb, 2);
    let current = profile(tray);
    let mut features: Vec<(u16, u8, bool, Vec<u8>)> = Vec::new();
    let mut list = Vec::new();
    for p in [PROFILE_DVD_ROM, PROFILE_CD_ROM] {
        list.extend_from_slice(&p.to_be_bytes());
        list.extend_from_slice(&[u8::from(p == current), 0]);
    }
    features.push((0x0000, 0x03, true, list));
    // Core: ATAPI interface, DBE.
    features.push((0x0001, 0x0b, true, vec![0, 0, 0, 2, 1, 0, 0, 0]));
    // Morphing: asynchronous events are polled.
    features.push((0x0002, 0x07, true, vec![0x02, 0, 0, 0]));
    // Removable medium: tray, eject, lock.
    features.push((0x0003, 0x03, true, vec![0x29, 0, 0, 0]));
    // Random readable, 2048-byte blocks, one at a time.
    let random = vec![0, 0, 8, 0, 0, 1, 0, 0];
    features.push((0x0010, 0x01, current != 0, random));
    features.push((0x001d, 0x01, current != 0, Vec::new())); // multi-read
    features.push((0x001e, 0x09, current == PROFILE_CD_ROM, vec![0; 4])); // CD read
    features.push((0x001f, 0x09, current == PROFILE_DVD_ROM, vec![0; 4])); // DVD read
    let mut data = vec![0; 8];
    data[6..8].copy_from_slice(&current.to_be_bytes());
    for (code, flags, is_current, body) in features {
        let wanted = match request {
            0 => code >= from,
            1 => code >= from && is_current,
            2 => code == from,
            _ => return Plan::Fail(Sense::INVALID_FIELD),
        };
        if !wanted {
            continue;
        }
        data.extend_from_slice(&code.to_be_bytes());
        data.push(flags & !1 | u8::from(is_current));
        data.push(body.len() as u8);
        data.extend(body);
    }
    let len = (data.len() - 4) as u32;
    data[..4].copy_from_slice(&len.to_be_bytes());
    reply(data, be16(cdb, 7).into())
}

/// GET EVENT STATUS NOTIFICATION, polled; media events only. MMC-6 §6.6.
fn event_status(tray: &Tray, cdb: &[u8]) -> Plan {
    const MEDIA: u8 = 4;
    if byte(cdb, 1) & 1 == 0 {
        return Plan::Fail(Sense::INVALID_FIELD);
    }
    let allocation = usize::from(be16(cdb, 7));
    if byte(cdb, 4) & 1 << MEDIA == 0 {
        // No event available of the classes asked for.
        return reply(vec![0, 2, 0x80, 1 << MEDIA], allocation);
    }
    // An answer that has no room for the event leaves it there.
    let event = if allocation > 4 {
        tray.take_event()
    } else {
        MediaEvent::None
    };
    let code = match event {
        MediaEvent::None => 0,
        MediaEvent::EjectRequest => 1,
        MediaEvent::NewMedia => 2,
        MediaEvent::Removal => 3,
    };
    let status = u8::from(tray.is_open()) | u8::from(tray.medium().is_some()) << 1;
    reply(
        vec![0, 6, MEDIA, 1 << MEDIA, code, status, 0, 0],
        allocation,
    )
}

/// READ DISC INFORMATION: complete, one session. MMC-6 §6.22.
fn disc_information(cdb: &[u8]) -> Plan {
    if byte(cdb, 1) & 7 != 0 {
        return Plan::Fail(Sense::INVALID_FIELD);
    }
    let mut data = vec![0; 34];
    data[1] = 32;
    data[2] = 0x0e; // last session complete, disc finalized
    data[3] = 1;
    data[4] = 1;
    data[5] = 1;
    data[6] = 1;
    data[7] = 0x20; // URU
    data[17..20].fill(0xff);
    data[20..24].fill(0xff);
    reply(data, be16(cdb, 7).into())
}

/// READ TRACK INFORMATION. MMC-6 §6.27.
fn track_information(medium: &Arc<dyn BlockBackend>, cdb: &[u8]) -> Plan {
    let number = be32(cdb, 2);
    let exists = match byte(cdb, 1) & 3 {
        0 => number < sectors(medium),
        _ => number == 1,
    };
    if !exists {
        return Plan::Fail(Sense::INVALID_FIELD);
    }
    let mut data = vec![0; 36];
    data[1] = 34;
    data[2] = 1;
    data[3] = 1;
    data[5] = 4; // data track
    data[6] = 1; // mode 1
    data[24..28].copy_from_slice(&sectors(medium).to_be_bytes());
    reply(data, be16(cdb, 7).into())
}

/// READ DISC STRUCTURE of a DVD: physical format and copyright. MMC-6 §6.23.
fn dvd_structure(medium: &Arc<dyn BlockBackend>, cdb: &[u8]) -> Plan {
    if medium.info().size_bytes < DVD_FROM_BYTES {
        return Plan::Fail(Sense::new(5, 0x30, 2)); // incompatible format
    }
    if byte(cdb, 6) != 0 {
        return Plan::Fail(Sense::INVALID_FIELD);
    }
    let body = match byte(cdb, 7) {
        0 => {
            let mut b = vec![0; 2048];
            b[0] = 0x01; // DVD-ROM, part version 1
            b[1] = 0x0f; // 120 mm, no maximum rate
            b[2] = 0x01; // one layer, read-only
            // Data area begins at physical sector 30000H.
            b[5..8].copy_from_slice(&[3, 0, 0]);
            let last = sectors(medium).saturating_add(0x2_ffff);
            b[9..12].copy_from_slice(&last.to_be_bytes()[1..]);
            b
        }
        1 => vec![0; 4],
        _ => return Plan::Fail(Sense::INVALID_FIELD),
    };
    let mut data = ((body.len() + 2) as u16).to_be_bytes().to_vec();
    data.extend_from_slice(&[0, 0]);
    data.extend(body);
    reply(data, be16(cdb, 8).into())
}
