//! The screen of a VM, and who may look at it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Listen;

/// Display devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VgaKind {
    /// No screen.
    #[default]
    None,
    /// Standard VGA with linear modes of up to 32 bits.
    Std,
}

/// A VNC server for the screen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VncSpec {
    /// Where it listens.
    pub listen: Listen,
    /// File whose first line is the password; none is asked for without.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
}

/// The screen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScreenSpec {
    /// Its device.
    #[serde(default)]
    pub vga: VgaKind,
    /// Video BIOS of the device; the host's is looked for without.
    #[serde(default)]
    pub vga_rom: Option<PathBuf>,
    /// VNC server.
    #[serde(default)]
    pub vnc: Option<VncSpec>,
}

impl ScreenSpec {
    pub(super) fn validate(&self, bad: &mut dyn FnMut(String, String)) {
        if self.vga == VgaKind::None && self.vga_rom.is_some() {
            bad("screen.vga_rom".into(), "needs a VGA".into());
        }
        let Some(vnc) = &self.vnc else { return };
        if self.vga == VgaKind::None {
            bad("screen.vnc".into(), "needs a VGA".into());
        }
        let risk = "VNC is not encrypted";
        vnc.listen.validate("screen.vnc.listen", risk, bad);
    }
}
