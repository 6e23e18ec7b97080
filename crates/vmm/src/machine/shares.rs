//! Folders of the host that a guest is given.

use std::sync::Arc;

use pyrite_api::v1::{ShareKind, ShareOwner, VmSpec};
use pyrite_share::{Folder, FolderConfig, Owner};
use pyrite_virtio::{Share, ShareProtocol};

use super::{AssemblyError, Slots, host, input};

/// Descriptors that are kept for everything else.
const RESERVED_DESCRIPTORS: u64 = 512;
/// LIMIT: descriptors that a guest may have held for a folder; one for each object it knows.
const MAX_DESCRIPTORS: u64 = 1 << 18;
/// Fewer are of no use.
const MIN_DESCRIPTORS: u64 = 64;

/// Plugs the folders of a specification into slots.
pub(super) fn plug(spec: &VmSpec, slots: &mut Slots<'_>) -> Result<(), AssemblyError> {
    if spec.shares.is_empty() {
        return Ok(());
    }
    let all = pyrite_share::raise_file_limit().saturating_sub(RESERVED_DESCRIPTORS);
    let each = (all / spec.shares.len() as u64).clamp(MIN_DESCRIPTORS, MAX_DESCRIPTORS);
    let root = rustix::process::geteuid().is_root();
    for (n, share) in spec.shares.iter().enumerate() {
        let passthrough = match share.owner {
            Some(owner) => owner == ShareOwner::Passthrough,
            None => root,
        };
        let config = FolderConfig {
            path: share.path.clone(),
            read_only: share.read_only,
            owner: if passthrough {
                Owner::Passthrough
            } else {
                Owner::Squash
            },
            max_descriptors: each as usize,
        };
        let folder = Folder::open(&config).map_err(|e| {
            let problem = format!("{}: {e}", share.path.display());
            input(format!("shares[{n}]"), problem)
        })?;
        let protocol = match share.kind {
            ShareKind::Virtiofs => ShareProtocol::Virtiofs,
            ShareKind::P9 => ShareProtocol::P9,
        };
        let device = Share::new(protocol, &share.tag, Arc::new(folder))
            .map_err(|e| host("the thread of a shared folder")(e.into()))?;
        slots.plug(&format!("virtio-share{n}"), Box::new(device))?;
    }
    Ok(())
}
