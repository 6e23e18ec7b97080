//! Options of `pyrite run` about what of the host a guest is given: folders and channels.

use clap::Args;
use pyrite_api::v1::{ChannelSpec, ShareKind, ShareOwner, ShareSpec};

use crate::args::split_at_commas;

/// Tag of a folder that was given none.
const DEFAULT_TAG: &str = "share";

/// The options.
#[derive(Debug, Args)]
pub struct ShareArgs {
    /// Let the guest mount a folder of the host; repeatable
    ///
    /// The guest mounts it by its tag ("share" unless tag= says otherwise): with virtio-fs by
    /// `mount -t virtiofs TAG /mnt`, with type=9p by
    /// `mount -t 9p -o trans=virtio,version=9p2000.L TAG /mnt`. With ro it can only read. Nothing
    /// outside the folder can be reached, and no other file system that is mounted in it. New files
    /// belong to the guest's user if root runs the VM (owner=passthrough), else to the user who
    /// does (owner=squash).
    #[arg(
        long = "share",
        value_name = "DIR[,tag=NAME][,type=virtiofs|9p][,ro][,owner=squash|passthrough]",
        value_parser = parse_share
    )]
    pub shares: Vec<ShareSpec>,
    /// A port of the guest as a Unix socket; repeatable
    ///
    /// The guest has it as /dev/virtio-ports/NAME. With NAME org.qemu.guest_agent.0 it is that of
    /// the QEMU guest agent.
    #[arg(long = "channel", value_name = "NAME,path=SOCKET", value_parser = parse_channel)]
    pub channels: Vec<ChannelSpec>,
}

/// `DIR[,tag=NAME][,type=virtiofs|9p][,ro][,owner=squash|passthrough]`.
fn parse_share(text: &str) -> Result<ShareSpec, String> {
    let mut parts = split_at_commas(text).into_iter();
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("expected DIR[,tag=NAME][,type=virtiofs|9p][,ro][,owner=squash|passthrough]")?;
    let mut share = ShareSpec {
        path: path.into(),
        tag: DEFAULT_TAG.into(),
        kind: ShareKind::default(),
        read_only: false,
        owner: None,
    };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => share.read_only = true,
            None if part == "rw" => share.read_only = false,
            Some(("tag", tag)) => share.tag = tag.to_owned(),
            Some(("type", "virtiofs")) => share.kind = ShareKind::Virtiofs,
            Some(("type", "9p")) => share.kind = ShareKind::P9,
            Some(("owner", "squash")) => share.owner = Some(ShareOwner::Squash),
            Some(("owner", "passthrough")) => share.owner = Some(ShareOwner::Passthrough),
            _ => {
                return Err(format!(
                    "unknown setting {part:?}; expected tag=NAME, type=virtiofs, type=9p, ro, \
                     owner=squash or owner=passthrough (a comma in the folder's name is written ,,)"
                ));
            }
        }
    }
    Ok(share)
}

/// `NAME,path=SOCKET`.
fn parse_channel(text: &str) -> Result<ChannelSpec, String> {
    let parts = split_at_commas(text);
    match parts.as_slice() {
        [name, path] => match path.strip_prefix("path=") {
            Some(path) if !name.is_empty() && !path.is_empty() => Ok(ChannelSpec {
                name: name.clone(),
                path: path.into(),
            }),
            _ => Err("expected NAME,path=SOCKET".into()),
        },
        _ => Err("expected NAME,path=SOCKET".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_a_share_are_taken() {
        let s = parse_share("a,,b,tag=t,type=9p,ro,owner=squash").unwrap();
        assert_eq!(s.path.to_str(), Some("a,b"));
        assert_eq!(
            (s.tag.as_str(), s.kind, s.read_only),
            ("t", ShareKind::P9, true)
        );
        assert_eq!(s.owner, Some(ShareOwner::Squash));
        let s = parse_share("d").unwrap();
        assert_eq!((s.tag.as_str(), s.kind), (DEFAULT_TAG, ShareKind::Virtiofs));
        for bad in ["", ",ro", "d,type=nfs", "d,owner=me", "d,tag"] {
            assert!(parse_share(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_channel_has_a_name_and_a_socket() {
        let c = parse_channel("org.qemu.guest_agent.0,path=/tmp/s").unwrap();
        assert_eq!(c.name, "org.qemu.guest_agent.0");
        assert_eq!(c.path.to_str(), Some("/tmp/s"));
        for bad in ["", "n", "n,path=", ",path=s", "n,file=s", "n,path=s,x"] {
            assert!(parse_channel(bad).is_err(), "{bad}");
        }
    }
}
