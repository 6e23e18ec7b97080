//! The manifest of a snapshot directory.

use serde::{Deserialize, Serialize};

use super::VmSpec;

/// Version of the directory's form.
pub const SNAPSHOT_FORMAT: u32 = 1;

/// What a snapshot directory holds besides the state and the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotManifest {
    /// [`SNAPSHOT_FORMAT`].
    pub format: u32,
    /// Version of the guest-visible board.
    pub board: u32,
    /// The VM.
    pub spec: VmSpec,
    /// Engine that it ran on.
    pub engine: String,
    /// Guest time in ns.
    pub clock_ns: u64,
    /// CRC-32C of the state file, so that files of two snapshots are not mixed.
    pub state_crc: u32,
    /// CRC-32C of the memory file: of its 64 KiB pieces that are not all zero, each followed by
    /// its offset as 8 bytes, little-endian.
    pub memory_crc: u32,
    /// CPUID table: leaf, sub-leaf, depends on sub-leaf (0 or 1), EAX, EBX, ECX, EDX.
    pub cpuid: Vec<[u32; 7]>,
}

impl SnapshotManifest {
    /// As text.
    pub fn to_json(&self) -> Result<String, String> {
        serde_json::to_string_pretty(self).map_err(|e| e.to_string())
    }

    /// From text, of a form and with values that this program knows.
    pub fn from_json(text: &str) -> Result<SnapshotManifest, String> {
        let m: SnapshotManifest =
            serde_json::from_str(text).map_err(|e| format!("the manifest is damaged: {e}"))?;
        if m.format != SNAPSHOT_FORMAT {
            return Err(format!("form {} of snapshots is unknown", m.format));
        }
        m.spec.validate().map_err(|e| {
            let all: Vec<String> = e.iter().map(ToString::to_string).collect();
            format!("the manifest is damaged: {}", all.join("; "))
        })?;
        Ok(m)
    }
}
