//! Snapshots: a stopped machine as a directory, and back.
//!
//! ```text
//! manifest.json  what the VM is; written last, so a directory without it is incomplete
//! state          sections of all units and vCPUs, see [`container`]
//! memory         RAM, ROM and memories of devices by offset, sparse
//! ```
//!
//! Disks are not part of it: a snapshot goes with the disks as they were.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pyrite_api::v1::SnapshotManifest;
use pyrite_engine::{CpuidEntry, CpuidTable};
use pyrite_mem::GuestMemory;
use pyrite_state::{Section, container};

#[cfg(test)]
mod tests;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
/// LIMIT: bytes of a manifest.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Memory is copied in pieces of this size; a piece of zeroes is not written.
const PIECE: usize = 64 << 10;

/// The manifest with what only this crate knows.
#[derive(Clone, Debug)]
pub struct Manifest(pub SnapshotManifest);

impl Manifest {
    /// Reads and checks the manifest of a snapshot.
    pub fn read(dir: &Path) -> Result<Manifest, String> {
        let path = dir.join(MANIFEST);
        let file = File::open(&path).map_err(|e| {
            format!("{e}; expected the directory of a complete snapshot, with its {MANIFEST}")
        })?;
        let mut text = String::new();
        file.take(MAX_MANIFEST_BYTES)
            .read_to_string(&mut text)
            .map_err(|e| format!("the manifest cannot be read: {e}"))?;
        let m = SnapshotManifest::from_json(&text)?;
        if m.board != crate::board::BOARD_VERSION {
            return Err(format!("board version {} is unknown", m.board));
        }
        let memory = fs::metadata(dir.join(MEMORY)).map_err(|e| format!("its memory: {e}"))?;
        // ROM and memories of devices follow the RAM.
        if memory.len() < m.spec.memory_bytes {
            return Err(format!(
                "its memory file has {} bytes instead of at least {}",
                memory.len(),
                m.spec.memory_bytes
            ));
        }
        if !dir.join(STATE).is_file() {
            return Err("its state file is missing".into());
        }
        Ok(Manifest(m))
    }

    /// The guest's CPUID.
    pub fn cpuid(&self) -> CpuidTable {
        let entry = |&[leaf, subleaf, indexed, eax, ebx, ecx, edx]: &[u32; 7]| CpuidEntry {
            leaf,
            subleaf,
            indexed: indexed != 0,
            eax,
            ebx,
            ecx,
            edx,
        };
        CpuidTable {
            entries: self.0.cpuid.iter().map(entry).collect(),
        }
    }
}

/// A CPUID table as a manifest holds it.
pub fn cpuid_rows(table: &CpuidTable) -> Vec<[u32; 7]> {
    let row = |e: &CpuidEntry| {
        [
            e.leaf,
            e.subleaf,
            u32::from(e.indexed),
            e.eax,
            e.ebx,
            e.ecx,
            e.edx,
        ]
    };
    table.entries.iter().map(row).collect()
}

/// LIMIT: how far the TSC may be from what the guest measured at its boot, in parts per million:
/// what a clock daemon in the guest can make up for, and more than two measurements differ by.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether a guest that knows a TSC of `theirs` kHz can go on with one of `here` kHz. It reads the
/// counter without asking anybody, so nothing can be put right under it.
pub fn same_tsc(theirs: u64, here: u64) -> Result<()> {
    let mhz = |khz: u64| format!("{}.{:03}", khz / 1000, khz % 1000);
    if u128::from(theirs.abs_diff(here)) * 1_000_000
        > u128::from(theirs) * u128::from(TSC_TOLERANCE_PPM)
    {
        bail!(
            "its guest counts time with a TSC of {} MHz, and this host's TSC runs at {} MHz: its \
             clocks would be wrong. Restore it on a host of the same frequency",
            mhz(theirs),
            mhz(here)
        );
    }
    Ok(())
}

/// Writes a snapshot into the new directory `dir`. On error nothing is left behind.
pub fn write(
    dir: &Path,
    manifest: &SnapshotManifest,
    sections: &[Section],
    memory: &GuestMemory,
) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let done = write_files(dir, manifest, sections, memory);
    if done.is_err() {
        let _ = fs::remove_dir_all(dir);
    }
    done
}

fn write_files(
    dir: &Path,
    manifest: &SnapshotManifest,
    sections: &[Section],
    memory: &GuestMemory,
) -> Result<()> {
    let bytes = container::write(sections).context("cannot encode the state")?;
    let mut state = File::create_new(dir.join(STATE)).context("cannot make the state file")?;
    state.write_all(&bytes).context("cannot write the state")?;
    state.sync_all().context("cannot write the state")?;

    let out = File::create_new(dir.join(MEMORY)).context("cannot make the memory file")?;
    out.set_len(memory.mapped_bytes())
        .context("cannot size the memory file")?;
    let mut crc = 0;
    let ram = memory
        .fd()
        .try_clone()
        .context("cannot read guest memory")?;
    let ram = File::from(ram);
    let mut piece = vec![0; PIECE];
    for at in (0..memory.mapped_bytes()).step_by(PIECE) {
        let n = (memory.mapped_bytes() - at).min(PIECE as u64) as usize;
        let part = piece.get_mut(..n).unwrap_or_default();
        // Through the file: reading what the guest never touched takes no memory.
        ram.read_exact_at(part, at)
            .context("cannot read guest memory")?;
        if part.iter().any(|b| *b != 0) {
            out.write_all_at(part, at)
                .context("cannot write the memory")?;
            crc = add_piece(crc, part, at);
        }
    }
    out.sync_all().context("cannot write the memory")?;

    let manifest = SnapshotManifest {
        state_crc: crc32c::crc32c(&bytes),
        memory_crc: crc,
        ..manifest.clone()
    };
    let text = manifest.to_json().map_err(anyhow::Error::msg)?;
    let mut file = File::create_new(dir.join(MANIFEST)).context("cannot make the manifest")?;
    file.write_all(text.as_bytes())
        .context("cannot write the manifest")?;
    file.sync_all().context("cannot write the manifest")
}

/// The checksum of memory with one more piece.
fn add_piece(crc: u32, piece: &[u8], offset: u64) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc, piece), &offset.to_le_bytes())
}

/// Reads the sections of a snapshot.
pub fn read_sections(dir: &Path, manifest: &Manifest) -> Result<Vec<Section>> {
    let file = File::open(dir.join(STATE)).context("cannot open the state file")?;
    let mut bytes = Vec::new();
    // One byte more than allowed shows that there is more.
    file.take(container::MAX_CONTAINER_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .context("cannot read the state file")?;
    if bytes.len() > container::MAX_CONTAINER_BYTES {
        bail!("the state file is too large");
    }
    let sections = container::read(&bytes)?;
    if crc32c::crc32c(&bytes) != manifest.0.state_crc {
        bail!("the state file does not belong to the manifest");
    }
    Ok(sections)
}

/// Fills zeroed memory from a snapshot.
pub fn read_memory(dir: &Path, manifest: &Manifest, memory: &GuestMemory) -> Result<()> {
    let file = File::open(dir.join(MEMORY)).context("cannot open the memory file")?;
    let bytes = file
        .metadata()
        .context("cannot read the memory file")?
        .len();
    if bytes != memory.mapped_bytes() {
        bail!(
            "the memory file has {bytes} bytes instead of {}",
            memory.mapped_bytes()
        );
    }
    let mut crc = 0;
    let mut piece = vec![0; PIECE];
    for at in (0..memory.mapped_bytes()).step_by(PIECE) {
        let n = (memory.mapped_bytes() - at).min(PIECE as u64) as usize;
        let part = piece.get_mut(..n).unwrap_or_default();
        file.read_exact_at(part, at)
            .context("cannot read the memory file")?;
        if part.iter().any(|b| *b != 0) {
            memory
                .write_at_offset(at, part)
                .context("cannot write guest memory")?;
            crc = add_piece(crc, part, at);
        }
    }
    if crc != manifest.0.memory_crc {
        bail!("the memory file is damaged");
    }
    Ok(())
}
