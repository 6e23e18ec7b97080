//! The stock guest's initial RAM disk: busybox, an init script, and the modules for our devices.

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pyrite_vmm::boot::cpio::CpioWriter;

use super::modules;

/// Modules for the devices of the machine, in the order of their use; dependencies are added.
const MODULES: [&str; 11] = [
    "virtio_pci",
    "virtio_console",
    "af_packet",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "ext4",
    // The power button, for the shell's acpid.
    "button",
    "evdev",
];

const INIT: &str = include_str!("init.sh");
const UDHCPC: &str = include_str!("udhcpc.sh");
const PROFILE: &str = "export PS1='\\u@\\h:\\w\\$ '\n";

/// Makes the initrd at `out` from the packages unpacked in `root`.
pub fn write(root: &Path, out: &Path) -> Result<()> {
    let busybox = ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .find_map(|p| fs::read(root.join(p)).ok())
        .context("the busybox package has no busybox")?;
    let modules = match module_tree(root) {
        Some(tree) => modules::in_load_order(&tree, &MODULES)?,
        None => Vec::new(),
    };
    let file = fs::File::create(out).context("cannot make the initrd")?;
    let mut cpio = CpioWriter::new(BufWriter::new(file));
    for dir in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "proc",
        "root",
        "sys",
        "tmp",
        "var",
        "run",
    ] {
        cpio.dir(dir)?;
    }
    // The kernel opens these before init can mount anything.
    cpio.char_device("dev/console", 5, 1)?;
    cpio.char_device("dev/null", 1, 3)?;
    cpio.file("bin/busybox", 0o755, &busybox)?;
    cpio.symlink("bin/sh", "busybox")?;
    cpio.file("init", 0o755, INIT.as_bytes())?;
    cpio.file("etc/udhcpc.script", 0o755, UDHCPC.as_bytes())?;
    cpio.file("etc/profile", 0o644, PROFILE.as_bytes())?;
    cpio.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    cpio.file("etc/group", 0o644, b"root:x:0:\n")?;
    cpio.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
    let mut order = String::new();
    for m in &modules {
        let name = format!("{}.ko", m.name);
        cpio.file(&format!("lib/modules/{name}"), 0o644, &m.bytes)?;
        order.push_str(&name);
        order.push('\n');
    }
    cpio.file("lib/modules/order", 0o644, order.as_bytes())?;
    cpio.finish().context("cannot write the initrd")?;
    Ok(())
}

/// `lib/modules/VERSION` of the unpacked kernel package.
fn module_tree(root: &Path) -> Option<PathBuf> {
    ["lib/modules", "usr/lib/modules"].iter().find_map(|p| {
        let mut trees: Vec<PathBuf> = fs::read_dir(root.join(p))
            .ok()?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .collect();
        trees.sort();
        trees.pop()
    })
}
