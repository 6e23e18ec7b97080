//! What of the host a guest is given beside disks and networks: folders and byte channels.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// LIMIT: shared folders of a VM.
pub const MAX_SHARES: usize = 8;
/// LIMIT: channels of a VM: ports of one virtio console device.
pub const MAX_CHANNELS: usize = 15;
/// LIMIT: bytes of a folder's tag. virtio 1.3 §5.11.4.
pub const MAX_TAG_BYTES: usize = 36;
/// LIMIT: bytes of a channel's name.
pub const MAX_CHANNEL_NAME_BYTES: usize = 64;

/// How a guest reaches a shared folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShareKind {
    /// virtio-fs: Linux since 5.4.
    #[default]
    #[serde(rename = "virtiofs")]
    Virtiofs,
    /// 9P2000.L over virtio: older Linux, and other systems.
    #[serde(rename = "9p")]
    P9,
}

/// To whom objects belong that the guest makes in a shared folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareOwner {
    /// To the guest's user, by number; only root can do that.
    Passthrough,
    /// To the user who runs the VM.
    Squash,
}

/// A folder of the host that the guest can mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// The folder.
    pub path: PathBuf,
    /// What the guest mounts it by.
    pub tag: String,
    /// How the guest reaches it.
    #[serde(default)]
    pub kind: ShareKind,
    /// The guest may not change anything in it.
    #[serde(default)]
    pub read_only: bool,
    /// To whom new objects belong; without, to the guest's user if root runs the VM, else to the
    /// user who does.
    #[serde(default)]
    pub owner: Option<ShareOwner>,
}

/// A port of the guest, such as that of its guest agent, as a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelSpec {
    /// Its name in the guest, `/dev/virtio-ports/NAME`.
    pub name: String,
    /// The socket, which is made.
    pub path: PathBuf,
}

pub(super) fn validate_shares(shares: &[ShareSpec], bad: &mut dyn FnMut(String, String)) {
    if shares.len() > MAX_SHARES {
        let text = format!("{} shared folders; at most {MAX_SHARES}", shares.len());
        bad("shares".into(), text);
    }
    for (n, s) in shares.iter().enumerate() {
        if s.path.as_os_str().is_empty() {
            let text = "expected the path of a folder";
            bad(format!("shares[{n}].path"), text.into());
        }
        let printable = s.tag.chars().all(|c| c.is_ascii_graphic());
        if s.tag.is_empty() || s.tag.len() > MAX_TAG_BYTES || !printable {
            let text = format!("expected 1 to {MAX_TAG_BYTES} printable ASCII characters");
            bad(format!("shares[{n}].tag"), text);
        }
        if shares.iter().take(n).any(|o| o.tag == s.tag) {
            let text = format!("two folders have the tag {}; give each its own tag=", s.tag);
            bad(format!("shares[{n}].tag"), text);
        }
    }
}

pub(super) fn validate_channels(channels: &[ChannelSpec], bad: &mut dyn FnMut(String, String)) {
    if channels.len() > MAX_CHANNELS {
        let text = format!("{} channels; at most {MAX_CHANNELS}", channels.len());
        bad("channels".into(), text);
    }
    for (n, c) in channels.iter().enumerate() {
        let printable = c.name.chars().all(|c| c.is_ascii_graphic() && c != '/');
        if c.name.is_empty() || c.name.len() > MAX_CHANNEL_NAME_BYTES || !printable {
            let text = format!(
                "expected 1 to {MAX_CHANNEL_NAME_BYTES} printable ASCII characters without /"
            );
            bad(format!("channels[{n}].name"), text);
        }
        // sockaddr_un.sun_path.
        if c.path.as_os_str().is_empty() || c.path.as_os_str().len() > 100 {
            let text = "expected a socket path of at most 100 bytes";
            bad(format!("channels[{n}].path"), text.into());
        }
        let before = channels.iter().take(n);
        if before.clone().any(|o| o.name == c.name) {
            let text = format!("two channels have the name {}", c.name);
            bad(format!("channels[{n}].name"), text);
        }
        if before.clone().any(|o| o.path == c.path) {
            let text = "two channels have this socket; give each its own path=";
            bad(format!("channels[{n}].path"), text.into());
        }
    }
}
