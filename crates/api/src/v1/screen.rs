//! The screen of a VM, and who may look at it.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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

/// Where a VNC server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VncListen {
    /// A Unix socket that only its owner can connect to.
    Unix(PathBuf),
    /// An address of the host's loopback.
    Tcp(SocketAddr),
}

/// A VNC server for the screen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VncSpec {
    /// Where it listens.
    pub listen: VncListen,
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
        match &vnc.listen {
            // sockaddr_un.sun_path.
            VncListen::Unix(p) if p.as_os_str().is_empty() || p.as_os_str().len() > 100 => bad(
                "screen.vnc.listen".into(),
                "expected a socket path of at most 100 bytes".into(),
            ),
            VncListen::Tcp(a) if !a.ip().is_loopback() => bad(
                "screen.vnc.listen".into(),
                format!(
                    "{a} can be reached from other hosts, and VNC is not encrypted; listen on \
                     127.0.0.1 and forward the port through ssh"
                ),
            ),
            _ => {}
        }
    }
}
