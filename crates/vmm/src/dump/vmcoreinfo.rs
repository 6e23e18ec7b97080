//! VMCOREINFO: what a Linux kernel says of itself for those who read its memory. Linux,
//! Documentation/admin-guide/kdump/vmcoreinfo.rst.
//!
//! A guest may say where it is (the firmware file `etc/vmcoreinfo`; QEMU's documentation,
//! docs/specs/vmcoreinfo.rst); else it is looked for, since the kernel keeps it as an ELF note. It is
//! the guest's text: it is copied, and nothing here believes it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use pyrite_mem::GuestMemory;

use super::PIECE;

/// Firmware file in which a guest says where its note is.
pub const FILE: &str = "etc/vmcoreinfo";
/// FW_CFG_VMCOREINFO_FORMAT_ELF.
const FORMAT_ELF: u16 = 1;
/// What it holds before the guest writes it: the formats that the host knows and that the guest has
/// chosen (16 bits each), size (32 bits) and guest-physical address (64 bits) of the note.
pub const OFFER: [u8; 16] = {
    let mut b = [0; 16];
    b[0] = FORMAT_ELF as u8;
    b
};

/// LIMIT: bytes of the text; Linux has a page.
const INFO_BYTES_MAX: usize = 64 << 10;
const NAME: &[u8; 12] = b"VMCOREINFO\0\0";
/// Sizes of name and description, type; the name, padded.
const HEAD_BYTES: usize = 12 + NAME.len();
/// Its first line.
const BEGINS: &[u8] = b"OSRELEASE=";

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let b = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(b.try_into().ok()?))
}

/// Bytes of the text of the note at the beginning of `bytes`, if there is one.
fn text_bytes(bytes: &[u8]) -> Option<usize> {
    let is_note =
        word(bytes, 0)? == 11 && word(bytes, 8)? == 0 && bytes.get(12..)?.starts_with(NAME);
    let len = word(bytes, 4)? as usize;
    (is_note && (1..=INFO_BYTES_MAX).contains(&len)).then_some(len)
}

/// The text that a guest offers.
fn offered(memory: &GuestMemory, told: &[u8]) -> Option<Vec<u8>> {
    let format = u16::from_le_bytes(told.get(2..4)?.try_into().ok()?);
    let bytes = word(told, 4)? as usize;
    let at = u64::from_le_bytes(told.get(8..16)?.try_into().ok()?);
    if format != FORMAT_ELF || !(HEAD_BYTES..=HEAD_BYTES + INFO_BYTES_MAX).contains(&bytes) {
        return None;
    }
    let mut note = vec![0; bytes];
    memory.read(at, &mut note).ok()?;
    let len = text_bytes(&note)?;
    note.get(HEAD_BYTES..HEAD_BYTES + len).map(<[u8]>::to_vec)
}

/// The text that is somewhere in RAM.
fn somewhere(memory: &GuestMemory, ram: &File) -> Option<Vec<u8>> {
    let end = memory.size_bytes();
    let mut piece = vec![0; PIECE + HEAD_BYTES + BEGINS.len()];
    for at in (0..end).step_by(PIECE) {
        let n = (end - at).min(piece.len() as u64) as usize;
        let part = piece.get_mut(..n)?;
        ram.read_exact_at(part, at).ok()?;
        for (place, first) in part.chunks_exact(4).enumerate() {
            // Most words are something else.
            if first != [11, 0, 0, 0] {
                continue;
            }
            let here = part.get(4 * place..)?;
            let Some(len) = text_bytes(here) else {
                continue;
            };
            let begins = here
                .get(HEAD_BYTES..)
                .is_some_and(|t| t.starts_with(BEGINS));
            let from = at + (4 * place + HEAD_BYTES) as u64;
            if begins && from + len as u64 <= end {
                let mut text = vec![0; len];
                ram.read_exact_at(&mut text, from).ok()?;
                return Some(text);
            }
        }
    }
    None
}

/// The text, if there is one. `told`: the content of [`FILE`].
pub fn find(memory: &GuestMemory, ram: &File, told: Option<&[u8]>) -> Option<Vec<u8>> {
    told.and_then(|t| offered(memory, t))
        .or_else(|| somewhere(memory, ram))
}
