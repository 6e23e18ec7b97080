//! The stock guest of `pyrite run` alone: a distribution's own kernel and a static busybox.
//!
//! ```text
//! cache/
//!   guests/<digest>/   vmlinuz, initrd.img, SHA256SUMS — one complete guest, made once
//!   current            digest of the guest in use
//!   apt/               package lists, only where the host has none of its own
//! ```
//!
//! The digest names what a guest is made from (packages and this recipe), so a guest is never
//! changed in place. What is in the cache is verified against its sums at every use.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pyrite_api::v1::{ConsoleKind, VmSpec};
use sha2::{Digest, Sha256};

mod fetch;
mod initramfs;
mod modules;

/// Changes when the same packages make another initrd.
const RECIPE: &str = "2";
const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd.img";
const SUMS: &str = "SHA256SUMS";

/// A guest in the cache.
#[derive(Debug)]
pub struct StockGuest {
    dir: PathBuf,
}

impl StockGuest {
    /// Completes a specification that has no kernel.
    pub fn fill(&self, spec: &mut VmSpec, console_chosen: bool) {
        if !console_chosen {
            spec.console = ConsoleKind::Virtio;
        }
        spec.boot.kernel = self.dir.join(KERNEL);
        spec.boot.initrd = Some(self.dir.join(INITRD));
        // The kernel's own messages go to the serial port in every case: the virtio console needs
        // a module first.
        let mut words = vec!["console=ttyS0".to_owned(), "quiet".into()];
        if spec.console == ConsoleKind::Virtio {
            words.push("pyrite.console=hvc0".into());
        }
        let term = std::env::var("TERM").unwrap_or_default();
        if !term.is_empty() && term.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            // The kernel hands words that it does not know to init's environment.
            words.push(format!("TERM={term}"));
        }
        if let Some((columns, rows)) = crate::terminal::size() {
            words.push(format!("pyrite.size={columns}x{rows}"));
        }
        // Words of the user come last and win.
        if !spec.boot.append.is_empty() {
            words.push(std::mem::take(&mut spec.boot.append));
        }
        spec.boot.append = words.join(" ");
    }
}

/// `$XDG_CACHE_HOME/pyrite` or `~/.cache/pyrite`.
pub fn cache_dir() -> Result<PathBuf> {
    // The base directory specification: a relative path is to be ignored.
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|h| h.join(".cache")))
        .map(|c| c.join("pyrite"))
        .context("no place for a cache: neither XDG_CACHE_HOME nor HOME is set")
}

/// Programs that fetching needs and that this host lacks.
pub fn missing_programs() -> Vec<&'static str> {
    fetch::PROGRAMS
        .into_iter()
        .filter(|p| !fetch::installed(p))
        .collect()
}

/// The stock guest: from the cache if it is there and whole, else fetched.
pub fn guest() -> Result<StockGuest> {
    let cache = cache_dir()?;
    if let Some(guest) = cached(&cache) {
        return Ok(guest);
    }
    make(&cache).map_err(|e| advice(&e, &cache))
}

/// What went wrong, and what a person can do about it.
fn advice(error: &anyhow::Error, cache: &Path) -> anyhow::Error {
    if fs::create_dir_all(cache).is_err() {
        return anyhow::anyhow!(
            "{error:#}.\nSet XDG_CACHE_HOME to a directory that can be written, or give a kernel \
             with --kernel FILE [--initrd FILE]."
        );
    }
    anyhow::anyhow!(
        "cannot get a kernel to run: {error:#}.\n\
         Give one with --kernel FILE [--initrd FILE], or put these two files into {}:\n\
         \x20 linux-image-*.deb     a Debian kernel package, e.g. the one that \
         linux-image-cloud-amd64 depends on\n\
         \x20 busybox-static_*.deb  the package busybox-static\n\
         On a Debian machine with a network, apt-get download fetches both.",
        cache.join("packages").display()
    )
}

/// The guest that `current` names, if it verifies.
fn cached(cache: &Path) -> Option<StockGuest> {
    let digest = fs::read_to_string(cache.join("current")).ok()?;
    let digest = digest.trim();
    if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let dir = cache.join("guests").join(digest);
    match verify(&dir) {
        Ok(()) => Some(StockGuest { dir }),
        Err(e) => {
            tracing::warn!("cached guest is not used: {e:#}");
            None
        }
    }
}

fn verify(dir: &Path) -> Result<()> {
    let sums = fs::read_to_string(dir.join(SUMS)).context("no sums")?;
    let mut found = 0;
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").context("sums are damaged")?;
        if name != KERNEL && name != INITRD {
            bail!("sums are damaged");
        }
        if sha256(&dir.join(name))? != sum {
            bail!("{name} is damaged");
        }
        found += 1;
    }
    if found != 2 {
        bail!("sums are damaged");
    }
    Ok(())
}

/// SHA-256 of a file, in hexadecimal.
fn sha256(path: &Path) -> Result<String> {
    let mut file =
        fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file
            .read(&mut buffer)
            .with_context(|| format!("reading {}", path.display()))?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(buffer.get(..n).unwrap_or_default());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A directory under construction; goes away unless it is kept.
struct Scratch(PathBuf);

impl Scratch {
    fn new(cache: &Path) -> Result<Scratch> {
        let dir = cache.join(format!("tmp-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Scratch(dir))
    }
    fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.0.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make(cache: &Path) -> Result<StockGuest> {
    let scratch = Scratch::new(cache)?;
    let packages = match fetch::provided(&cache.join("packages"))? {
        Some(p) => p,
        None => fetch::fetch(cache, &scratch.dir("download")?)?,
    };
    let mut hash = Sha256::new();
    hash.update(RECIPE);
    for p in &packages {
        hash.update(sha256(p)?);
    }
    let digest = hex(&hash.finalize());

    let bar = indicatif::ProgressBar::new_spinner().with_message("building the initial RAM disk");
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    let root = scratch.dir("root")?;
    for p in &packages {
        fetch::unpack(p, &root)?;
    }
    let new = scratch.dir("guest")?;
    let kernel = kernel_in(&root)?;
    fs::copy(&kernel, new.join(KERNEL)).context("cannot copy the kernel")?;
    initramfs::write(&root, &new.join(INITRD))?;
    bar.finish_and_clear();
    let sums = format!(
        "{}  {KERNEL}\n{}  {INITRD}\n",
        sha256(&new.join(KERNEL))?,
        sha256(&new.join(INITRD))?
    );
    fs::write(new.join(SUMS), sums).context("cannot write the sums")?;

    let guests = cache.join("guests");
    fs::create_dir_all(&guests).context("cannot make the cache")?;
    let dir = guests.join(&digest);
    // A damaged guest of the same digest gives way; another process may have been faster.
    if fs::rename(&new, &dir).is_err() && verify(&dir).is_err() {
        fs::remove_dir_all(&dir).context("cannot remove the damaged guest from the cache")?;
        fs::rename(&new, &dir).context("cannot move the guest into the cache")?;
    }
    let current = scratch.0.join("current");
    fs::write(&current, &digest).context("cannot write to the cache")?;
    fs::rename(&current, cache.join("current")).context("cannot write to the cache")?;
    Ok(StockGuest { dir })
}

/// The kernel of an unpacked package.
fn kernel_in(root: &Path) -> Result<PathBuf> {
    let boot = root.join("boot");
    let mut kernels: Vec<PathBuf> = fs::read_dir(&boot)
        .context("the kernel package has no /boot")?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-"))
        })
        .collect();
    kernels.sort();
    kernels
        .pop()
        .context("the kernel package has no /boot/vmlinuz-*")
}
