//! Kernel modules in the order in which they must be loaded.
//!
//! A package has no `modules.dep` (that is made at installation), so the modules are asked
//! themselves: each names what it depends on in its `.modinfo` section.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// LIMIT: directories below each other in a module tree.
const MAX_DEPTH: u32 = 12;

/// A module: its name, and its uncompressed bytes.
pub struct Module {
    /// Name as the kernel knows it, with underscores.
    pub name: String,
    /// ELF object.
    pub bytes: Vec<u8>,
}

/// The modules among `wanted` that exist under `tree` (`lib/modules/VERSION`), preceded by what
/// they depend on. What is built into the kernel or not there is left out.
pub fn in_load_order(tree: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    collect(tree, &mut files, 0)?;
    let mut out = Vec::new();
    for name in wanted {
        add(name, &files, &mut out, 0)?;
    }
    Ok(out)
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`.
fn module_name(file: &str) -> Option<String> {
    let (stem, end) = file.split_once(".ko")?;
    matches!(end, "" | ".xz" | ".zst" | ".gz").then(|| stem.replace('-', "_"))
}

fn collect(dir: &Path, files: &mut HashMap<String, PathBuf>, depth: u32) -> Result<()> {
    if depth > MAX_DEPTH {
        return Ok(());
    }
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files, depth + 1)?;
        } else if let Some(name) = module_name(&entry.file_name().to_string_lossy()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

fn add(
    name: &str,
    files: &HashMap<String, PathBuf>,
    out: &mut Vec<Module>,
    depth: u32,
) -> Result<()> {
    let name = name.replace('-', "_");
    if depth > MAX_DEPTH || out.iter().any(|m| m.name == name) {
        return Ok(());
    }
    let Some(path) = files.get(&name) else {
        return Ok(());
    };
    let bytes = read(path)?;
    for dependency in dependencies(&bytes) {
        add(&dependency, files, out, depth + 1)?;
    }
    out.push(Module { name, bytes });
    Ok(())
}

/// The words after `depends=` in the `.modinfo` strings.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let list = module.get(at + KEY.len()..).unwrap_or_default();
    let list = list.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(list)
        .split(',')
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let out = Command::new(program)
        .arg("-dc")
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .with_context(|| {
            format!("the kernel's modules are compressed; {program} is needed to unpack them")
        })?;
    if !out.status.success() {
        bail!("{program} cannot unpack {}", path.display());
    }
    Ok(out.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dir = std::env::temp_dir().join(format!("pyrite-modules-{}", std::process::id()));
        let sub = dir.join("kernel/drivers");
        fs::create_dir_all(&sub).unwrap();
        for (file, info) in [
            (
                "virtio-net.ko",
                "\0depends=failover,virtio\0name=virtio_net\0",
            ),
            ("failover.ko", "\0depends=\0"),
            ("virtio.ko", "\0depends=virtio-net\0"), // a cycle must not hang
            ("other.ko", "\0depends=\0"),
        ] {
            fs::write(sub.join(file), info).unwrap();
        }
        let order = in_load_order(&dir, &["virtio_net", "built_in", "virtio"]).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let mut names: Vec<&str> = order.iter().map(|m| m.name.as_str()).collect();
        names.dedup();
        assert_eq!(names[0], "failover");
        assert!(names.contains(&"virtio") && names.contains(&"virtio_net"));
        assert!(!names.contains(&"other"));
    }

    #[test]
    fn names_have_underscores() {
        assert_eq!(
            module_name("virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(module_name("modules.order"), None);
    }
}
