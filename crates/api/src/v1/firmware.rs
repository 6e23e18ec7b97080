//! Firmware, the order in which it boots, and what it says of the machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// LIMIT: devices in a boot order.
const MAX_ORDER: usize = 32;
/// LIMIT: bytes of an SMBIOS text.
const MAX_TEXT_BYTES: usize = 64;
/// LIMIT: how long a boot menu may wait in milliseconds: firmware counts it in 16 bits.
const MAX_MENU_MS: u32 = 0xffff;

/// Firmware that a machine starts with, instead of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareSpec {
    /// Image that ends at 4 GiB.
    pub code: PathBuf,
    /// Image of empty variables, for flash below the code; none without.
    #[serde(default)]
    pub vars_template: Option<PathBuf>,
    /// File that keeps the variables, made from the template; they are lost at the end without.
    #[serde(default)]
    pub vars: Option<PathBuf>,
    /// Devices to boot from, best first; the firmware decides if it is empty. `disk0` is the first
    /// disk, `cdrom0` the first CD drive, `net0` the network card.
    #[serde(default)]
    pub order: Vec<String>,
    /// Device to boot from until the machine is reset for the first time.
    #[serde(default)]
    pub once: Option<String>,
    /// The firmware shows its boot menu for this time in milliseconds.
    #[serde(default)]
    pub menu_ms: Option<u32>,
}

/// Who the machine says that it is (SMBIOS type 1). What is not set has a value of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmbiosSpec {
    /// Manufacturer.
    #[serde(default)]
    pub vendor: Option<String>,
    /// Product name.
    #[serde(default)]
    pub product: Option<String>,
    /// Version.
    #[serde(default)]
    pub version: Option<String>,
    /// Serial number.
    #[serde(default)]
    pub serial: Option<String>,
    /// UUID, e.g. `123e4567-e89b-12d3-a456-426614174000`.
    #[serde(default)]
    pub uuid: Option<String>,
}

impl SmbiosSpec {
    /// The UUID's bytes in the order of its text.
    pub fn uuid_bytes(&self) -> Option<[u8; 16]> {
        let text = self.uuid.as_deref()?;
        let lengths: Vec<usize> = text.split('-').map(str::len).collect();
        if lengths != [8, 4, 4, 4, 12] {
            return None;
        }
        let digits: String = text.split('-').collect();
        let n = u128::from_str_radix(&digits, 16).ok()?;
        (!digits.starts_with('+')).then(|| n.to_be_bytes())
    }

    pub(super) fn validate(&self, bad: &mut dyn FnMut(String, String)) {
        let fields = [
            ("vendor", &self.vendor),
            ("product", &self.product),
            ("version", &self.version),
            ("serial", &self.serial),
        ];
        for (name, text) in fields {
            let is_text = |t: &String| {
                (1..=MAX_TEXT_BYTES).contains(&t.len())
                    && t.bytes().all(|b| (0x20..0x7f).contains(&b))
            };
            if text.as_ref().is_some_and(|t| !is_text(t)) {
                let problem = format!("expected 1 to {MAX_TEXT_BYTES} printable ASCII characters");
                bad(format!("smbios.{name}"), problem);
            }
        }
        if self.uuid.is_some() && self.uuid_bytes().is_none() {
            let problem = "expected a UUID, e.g. 123e4567-e89b-12d3-a456-426614174000";
            bad("smbios.uuid".into(), problem.into());
        }
    }
}

impl FirmwareSpec {
    pub(super) fn validate(&self, bad: &mut dyn FnMut(String, String)) {
        if self.code.as_os_str().is_empty() {
            let problem = "expected the path of a firmware image";
            bad("boot.firmware.code".into(), problem.into());
        }
        if self.vars.is_some() && self.vars_template.is_none() {
            let problem = "this firmware keeps no variables";
            bad("boot.firmware.vars".into(), problem.into());
        }
        if self.order.len() > MAX_ORDER {
            let problem = format!("at most {MAX_ORDER} devices");
            bad("boot.firmware.order".into(), problem);
        }
        if self.menu_ms.is_some_and(|ms| ms > MAX_MENU_MS) {
            let problem = format!("expected at most {MAX_MENU_MS} milliseconds");
            bad("boot.firmware.menu_ms".into(), problem);
        }
    }
}
