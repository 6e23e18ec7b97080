//! The manifest of a snapshot directory.

use serde::{Deserialize, Serialize};

use super::VmSpec;

/// Version of the directory's form.
pub const SNAPSHOT_FORMAT: u32 = 2;
/// The last field, in the text; the checksum is over everything before its name.
const CRC_FIELD: &str = "\"manifest_crc\"";

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
    /// Frequency in kHz of the TSC that the guest knows.
    pub tsc_khz: u64,
    /// CRC-32C of the text before this field. [`SnapshotManifest::to_json`] fills it in.
    pub manifest_crc: u32,
}

impl SnapshotManifest {
    /// As text, with its checksum.
    pub fn to_json(&self) -> Result<String, String> {
        let text =
            |m: &SnapshotManifest| serde_json::to_string_pretty(m).map_err(|e| e.to_string());
        let manifest_crc = text_crc(&text(self)?).ok_or("the manifest has no checksum")?;
        text(&SnapshotManifest {
            manifest_crc,
            ..self.clone()
        })
    }

    /// From text, of a form and with values that this program knows.
    pub fn from_json(text: &str) -> Result<SnapshotManifest, String> {
        /// What every form has.
        #[derive(Deserialize)]
        struct Form {
            format: u32,
        }
        let damaged = |e: serde_json::Error| format!("the manifest is damaged: {e}");
        let Form { format } = serde_json::from_str(text).map_err(damaged)?;
        if format != SNAPSHOT_FORMAT {
            return Err(format!(
                "it has form {format} of snapshots, and this program reads form {SNAPSHOT_FORMAT}; \
                 restore it with the version of pyrite that wrote it"
            ));
        }
        let m: SnapshotManifest = serde_json::from_str(text).map_err(damaged)?;
        if text_crc(text) != Some(m.manifest_crc) {
            return Err(
                "the manifest is damaged or was changed: its text does not have its checksum"
                    .into(),
            );
        }
        m.spec.validate().map_err(|e| {
            let all: Vec<String> = e.iter().map(ToString::to_string).collect();
            format!("the manifest is damaged: {}", all.join("; "))
        })?;
        Ok(m)
    }
}

/// CRC-32C of what comes before the checksum.
fn text_crc(text: &str) -> Option<u32> {
    let (before, _) = text.rsplit_once(CRC_FIELD)?;
    Some(crc32c::crc32c(before.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        let manifest = SnapshotManifest {
            format: SNAPSHOT_FORMAT,
            board: 1,
            spec: VmSpec {
                boot: crate::v1::BootSpec {
                    kernel: "/k".into(),
                    // A command line may say anything.
                    append: "\"manifest_crc\": 7".into(),
                    ..Default::default()
                },
                ..VmSpec::default()
            },
            engine: "soft".into(),
            clock_ns: 123_456,
            state_crc: 1,
            memory_crc: 2,
            cpuid: vec![[1, 0, 0, 1, 2, 3, 4]],
            tsc_khz: 2_000_000,
            manifest_crc: 0,
        };
        manifest.to_json().unwrap()
    }

    #[test]
    fn text_comes_back() {
        let m = SnapshotManifest::from_json(&text()).unwrap();
        assert_eq!((m.clock_ns, m.tsc_khz), (123_456, 2_000_000));
        assert_eq!(m.to_json().unwrap(), text());
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let good = text();
        let end = good.rfind(CRC_FIELD).unwrap();
        for at in 0..end {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1;
            let Ok(bad) = String::from_utf8(bad) else {
                continue;
            };
            assert!(SnapshotManifest::from_json(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_form_is_named() {
        let e = SnapshotManifest::from_json("{\"format\": 1, \"board\": 1}").unwrap_err();
        assert!(e.contains("form 1"), "{e}");
    }
}
