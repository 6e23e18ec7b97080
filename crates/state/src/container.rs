//! The container: one file that holds the sections of a machine.
//!
//! ```text
//! 0   8  magic, with the version of the container in its last byte
//! 8   4  bytes of the header, little-endian
//! 12  4  CRC-32C of the header
//! 16     header: CBOR list of what the sections are, with length and CRC-32C of each body
//!        bodies, in the order of the header, up to the end of the file
//! ```
//!
//! The header alone says what the file holds; no body need be read or understood for that. The
//! file is hostile until every check has passed: nothing is allocated for a length that the file
//! does not have, and there is no byte that no checksum covers.

use minicbor::{Decode, Encode};

use crate::Section;

/// Magic and version.
const MAGIC: &[u8; 8] = b"PYRITE\x00\x02";
/// Bytes before the header.
const FIXED_BYTES: usize = 16;
/// LIMIT: bytes of the header.
const MAX_HEADER_BYTES: usize = 1 << 20;
/// LIMIT: sections.
pub const MAX_SECTIONS: usize = 4096;
/// LIMIT: bytes of a name.
pub const MAX_NAME_BYTES: usize = 64;
/// LIMIT: bytes of a container.
pub const MAX_CONTAINER_BYTES: usize = 256 << 20;

/// Why bytes are no container.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    /// It does not begin as a container does.
    #[error("this is no state file")]
    Magic,
    /// It is of another version.
    #[error("state files of version {0} are unknown to this program")]
    Version(u8),
    /// It ends too early.
    #[error("the state file is cut off")]
    CutOff,
    /// Bytes follow that belong to nothing.
    #[error("the state file goes on after its end")]
    TooLong,
    /// A checksum or a form is wrong.
    #[error("the state file is damaged: {0}")]
    Damaged(String),
}

/// What the header says of a section.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Entry {
    /// Name of the unit.
    #[n(0)]
    pub unit: String,
    /// Kind of the unit.
    #[n(1)]
    pub kind: String,
    /// Version of the kind's saved form.
    #[n(2)]
    pub version: u16,
    /// Oldest version of a reader that may read it.
    #[n(3)]
    pub min_reader: u16,
    /// Bytes of the body.
    #[n(4)]
    pub body_bytes: u32,
    /// CRC-32C of the body.
    #[n(5)]
    pub crc: u32,
}

/// The bytes of a container with these sections.
pub fn write(sections: &[Section]) -> Result<Vec<u8>, ContainerError> {
    let entry = |s: &Section| {
        let too_large = |_| ContainerError::Damaged(format!("the section of {} is huge", s.unit));
        Ok(Entry {
            unit: s.unit.clone(),
            kind: s.kind.clone(),
            version: s.version,
            min_reader: s.min_reader,
            body_bytes: u32::try_from(s.body.len()).map_err(too_large)?,
            crc: crc32c::crc32c(&s.body),
        })
    };
    let entries = sections.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
    check(&entries)?;
    let header = minicbor::to_vec(&entries).map_err(|e| ContainerError::Damaged(e.to_string()))?;
    let size = u32::try_from(header.len()).unwrap_or(u32::MAX);
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    out.extend_from_slice(&header);
    for s in sections {
        out.extend_from_slice(&s.body);
    }
    // What would not be read is not written.
    if header.len() > MAX_HEADER_BYTES || out.len() > MAX_CONTAINER_BYTES {
        return Err(ContainerError::Damaged("the state is too large".into()));
    }
    Ok(out)
}

/// What a container holds, and where its bodies begin. The bodies are not looked at.
pub fn read_header(bytes: &[u8]) -> Result<(Vec<Entry>, usize), ContainerError> {
    let (magic, rest) = bytes
        .split_first_chunk::<8>()
        .ok_or(ContainerError::Magic)?;
    if magic[..7] != MAGIC[..7] {
        return Err(ContainerError::Magic);
    }
    if magic != MAGIC {
        return Err(ContainerError::Version(magic[7]));
    }
    let (size, rest) = rest
        .split_first_chunk::<4>()
        .ok_or(ContainerError::CutOff)?;
    let (crc, rest) = rest
        .split_first_chunk::<4>()
        .ok_or(ContainerError::CutOff)?;
    let size = u32::from_le_bytes(*size) as usize;
    if size > MAX_HEADER_BYTES {
        return Err(ContainerError::Damaged(format!("a header of {size} bytes")));
    }
    let header = rest.get(..size).ok_or(ContainerError::CutOff)?;
    if crc32c::crc32c(header) != u32::from_le_bytes(*crc) {
        return Err(ContainerError::Damaged("its header's checksum".into()));
    }
    let mut decoder = minicbor::Decoder::new(header);
    let damaged = |e: minicbor::decode::Error| ContainerError::Damaged(e.to_string());
    let entries: Vec<Entry> = decoder.decode().map_err(damaged)?;
    if decoder.position() != header.len() {
        return Err(ContainerError::Damaged("its header has a tail".into()));
    }
    check(&entries)?;
    Ok((entries, FIXED_BYTES + size))
}

/// What holds of every header that is written.
fn check(entries: &[Entry]) -> Result<(), ContainerError> {
    if entries.len() > MAX_SECTIONS {
        let n = entries.len();
        return Err(ContainerError::Damaged(format!("{n} sections")));
    }
    let mut names: Vec<&str> = entries.iter().map(|e| e.unit.as_str()).collect();
    names.sort_unstable();
    if let Some(name) = names.windows(2).find(|w| w[0] == w[1]).map(|w| w[0]) {
        return Err(ContainerError::Damaged(format!("two sections of {name:?}")));
    }
    let bad = |s: &&str| s.is_empty() || s.len() > MAX_NAME_BYTES;
    let kinds = entries.iter().map(|e| e.kind.as_str());
    if let Some(name) = names.into_iter().chain(kinds).find(bad) {
        let start: String = name.chars().take(16).collect();
        return Err(ContainerError::Damaged(format!("the name {start:?}")));
    }
    Ok(())
}

/// The sections in a container.
pub fn read(bytes: &[u8]) -> Result<Vec<Section>, ContainerError> {
    let (entries, start) = read_header(bytes)?;
    let mut rest = bytes.get(start..).ok_or(ContainerError::CutOff)?;
    let mut sections = Vec::with_capacity(entries.len());
    for e in entries {
        let size = e.body_bytes as usize;
        let (body, after) = rest.split_at_checked(size).ok_or(ContainerError::CutOff)?;
        rest = after;
        if crc32c::crc32c(body) != e.crc {
            let what = format!("the checksum of {}", e.unit);
            return Err(ContainerError::Damaged(what));
        }
        sections.push(Section {
            unit: e.unit,
            kind: e.kind,
            version: e.version,
            min_reader: e.min_reader,
            body: body.to_vec(),
        });
    }
    if rest.is_empty() {
        Ok(sections)
    } else {
        Err(ContainerError::TooLong)
    }
}

/// Body of a fuzz target: arbitrary bytes never panic, and what is read is written as the same
/// bytes or, had the header another encoding, as the same sections.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(sections) = read(bytes) {
        let again = write(&sections).map(|b| read(&b));
        assert_eq!(again, Ok(Ok(sections)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sections() -> Vec<Section> {
        vec![
            Section::new("uart0", "uart-16550", 3, &7u32),
            Section::new("vcpu0", "vcpu", 1, &"a longer body than before"),
            Section::new("empty", "nothing", 1, &()),
        ]
    }

    /// `bytes` with a header that was changed and its checksum put right.
    fn with_header(bytes: &[u8], change: impl FnOnce(&mut Vec<Entry>)) -> Vec<u8> {
        let (mut entries, start) = read_header(bytes).unwrap();
        change(&mut entries);
        let header = minicbor::to_vec(&entries).unwrap();
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&(header.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(&bytes[start..]);
        out
    }

    #[test]
    fn sections_come_back_and_the_header_is_readable_alone() {
        let bytes = write(&sections()).unwrap();
        assert_eq!(read(&bytes).unwrap(), sections());
        let (entries, start) = read_header(&bytes).unwrap();
        assert_eq!(entries[1].unit, "vcpu0");
        assert_eq!(read_header(&bytes[..start]).unwrap().0, entries);
        assert_eq!(read(&write(&[]).unwrap()).unwrap(), []);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_an_error() {
        let bytes = write(&sections()).unwrap();
        for n in 0..bytes.len() {
            assert!(read(&bytes[..n]).is_err(), "{n} bytes");
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[n] ^= 1 << bit;
                assert!(read(&bad).is_err(), "byte {n} bit {bit}");
            }
        }
        let long = [&bytes[..], b"x"].concat();
        assert_eq!(read(&long), Err(ContainerError::TooLong));
        let mut newer = bytes;
        newer[7] = 9;
        assert_eq!(read(&newer), Err(ContainerError::Version(9)));
    }

    #[test]
    fn lying_headers_are_refused() {
        let bytes = write(&sections()).unwrap();
        assert!(read(&with_header(&bytes, |_| {})).is_ok());
        let lies: [fn(&mut Vec<Entry>); 6] = [
            |e| e[2].body_bytes = u32::MAX,
            |e| e[0].body_bytes += 1,
            |e| e[1].unit = "uart0".into(),
            |e| e[1].unit = "x".repeat(65),
            |e| e[1].kind = String::new(),
            |e| drop(e.pop()),
        ];
        for (n, lie) in lies.into_iter().enumerate() {
            let bad = with_header(&bytes, lie);
            assert!(read(&bad).is_err(), "lie {n}");
            fuzz(&bad);
        }
        // A length of 4 GiB in front of nothing.
        let mut huge = MAGIC.to_vec();
        huge.extend_from_slice(&[0xff; 8]);
        assert!(read(&huge).is_err());
        // CBOR that claims 2^64 entries.
        let header = [0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let mut claim = MAGIC.to_vec();
        claim.extend_from_slice(&9u32.to_le_bytes());
        claim.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
        claim.extend_from_slice(&header);
        assert!(read(&claim).is_err());
    }

    #[test]
    fn mutated_containers_never_panic() {
        let bytes = write(&sections()).unwrap();
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as usize
        };
        for _ in 0..20_000 {
            let mut b = bytes.clone();
            for _ in 0..1 + random() % 4 {
                let at = random() % b.len();
                match random() % 4 {
                    0 => b[at] = random() as u8,
                    1 => b.truncate(at.max(1)),
                    2 => b.insert(at, random() as u8),
                    _ => drop(b.remove(at)),
                }
                if b.is_empty() {
                    b.push(0);
                }
            }
            // With checksums put right, so that the decoder sees it.
            if b.len() > FIXED_BYTES {
                let size = u32::from_le_bytes([b[8], b[9], b[10], b[11]]) as usize;
                if let Some(h) = b.get(FIXED_BYTES..FIXED_BYTES.saturating_add(size)) {
                    let crc = crc32c::crc32c(h).to_le_bytes();
                    b[12..16].copy_from_slice(&crc);
                }
            }
            fuzz(&b);
        }
    }
}
