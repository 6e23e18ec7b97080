//! Packages through the host's own package client, as an ordinary user.
//!
//! The client reads the host's sources and keys, so what it accepts is what the host accepts, and
//! it verifies every package against the signed index. Nothing of the system is written: where the
//! host has no package lists, they go to a directory of our own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Packages whose dependency is a kernel for VMs: Debian's, then Ubuntu's.
const KERNEL_PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];
/// The user space of the stock guest.
const BUSYBOX: &str = "busybox-static";

/// What is needed to fetch and unpack.
pub const PROGRAMS: [&str; 3] = ["apt-get", "apt-cache", "dpkg-deb"];

/// Where the client finds its lists.
struct Apt {
    options: Vec<String>,
}

/// One file that the client would fetch.
#[derive(Debug, PartialEq, Eq)]
struct Remote {
    name: String,
    size_bytes: u64,
    sha256: String,
}

impl Apt {
    /// The host's own lists.
    fn host() -> Apt {
        Apt {
            options: Vec::new(),
        }
    }

    /// Lists of our own under `dir`.
    fn private(dir: &Path) -> Result<Apt> {
        let lists = dir.join("lists");
        let cache = dir.join("cache");
        for d in [lists.join("partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&d).with_context(|| format!("cannot make {}", d.display()))?;
        }
        Ok(Apt {
            options: vec![
                format!("Dir::State::Lists={}/", lists.display()),
                format!("Dir::Cache={}/", cache.display()),
                // Post-invoke hooks of the host are for its own lists, and need root.
                "APT::Update::Post-Invoke::=".into(),
                "APT::Update::Post-Invoke-Success::=".into(),
            ],
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut c = Command::new(program);
        // As root the client would drop to a user that cannot write here.
        c.args(["-q", "-o", "APT::Sandbox::User=root"])
            // More than one, with the client's pauses in between, keeps a person without a
            // network waiting for most of a minute.
            .args(["-o", "Acquire::Retries=1"])
            .stdin(Stdio::null())
            .env("LC_ALL", "C");
        for o in &self.options {
            c.args(["-o", o]);
        }
        c
    }

    /// The kernel package and what of its modules comes separately.
    fn kernel_packages(&self) -> Option<Vec<String>> {
        KERNEL_PACKAGES.iter().find_map(|meta| {
            let out = self
                .command("apt-cache")
                .args(["depends", "--important", meta])
                .output()
                .ok()?;
            let names = kernel_dependencies(&String::from_utf8_lossy(&out.stdout));
            names
                .iter()
                .any(|n| n.starts_with("linux-image-"))
                .then_some(names)
        })
    }

    fn update(&self) -> Result<()> {
        let bar = ProgressBar::new_spinner()
            .with_message("reading the package lists of the host's sources");
        bar.enable_steady_tick(Duration::from_millis(120));
        let out = self
            .command("apt-get")
            // Without this a client that reached no mirror at all reports success.
            .args(["-o", "APT::Update::Error-Mode=any", "update"])
            .output()
            .context("cannot run apt-get")?;
        bar.finish_and_clear();
        check("apt-get update", &out)
    }

    fn remotes(&self, packages: &[String]) -> Result<Vec<Remote>> {
        let out = self
            .command("apt-get")
            .args(["download", "--print-uris"])
            .args(packages)
            .current_dir("/")
            .output()
            .context("cannot run apt-get")?;
        check("apt-get download", &out)?;
        let remotes = parse_uris(&String::from_utf8_lossy(&out.stdout));
        if remotes.len() != packages.len() {
            bail!("the package client does not know {}", packages.join(", "));
        }
        Ok(remotes)
    }
}

/// Names in the output of `apt-cache depends` that belong to the kernel.
fn kernel_dependencies(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let Some(name) = line.trim().strip_prefix("Depends: ") else {
            continue;
        };
        let name = name.trim();
        let is_kernel = name.starts_with("linux-image-") || name.starts_with("linux-modules-");
        if is_kernel && !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// Lines `'URI' name size SHA256:hash`.
fn parse_uris(text: &str) -> Vec<Remote> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix('\'')?.split_once("' ")?.1.split(' ');
            let name = words
                .next()
                .filter(|n| n.ends_with(".deb") && !n.contains('/'))?;
            let size_bytes = words.next()?.parse().ok()?;
            let sha256 = words.next()?.strip_prefix("SHA256:")?;
            Some(Remote {
                name: name.into(),
                size_bytes,
                sha256: sha256.into(),
            })
        })
        .collect()
}

fn check(what: &str, out: &Output) -> Result<()> {
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    let lines: Vec<&str> = text
        .lines()
        .filter(|l| l.starts_with("E:"))
        .take(3)
        .collect();
    bail!(
        "{what} failed: {}",
        if lines.is_empty() {
            text.trim().into()
        } else {
            lines.join("; ")
        }
    )
}

/// True if a program can be started.
pub fn installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|d| d.join(program).is_file())
}

/// Packages that somebody put into `dir`, if both are there.
pub fn provided(dir: &Path) -> Result<Option<Vec<PathBuf>>> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(None);
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.sort();
    let named = |start: &str| {
        files.iter().rev().find(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(start) && name.ends_with(".deb")
        })
    };
    let (Some(kernel), Some(busybox)) = (named("linux-image-"), named("busybox-static_")) else {
        return Ok(None);
    };
    let modules = named("linux-modules-");
    Ok(Some(
        [Some(kernel), modules, Some(busybox)]
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
    ))
}

/// Fetches the packages into `into`; their paths.
pub fn fetch(cache: &Path, into: &Path) -> Result<Vec<PathBuf>> {
    for program in PROGRAMS {
        if !installed(program) {
            bail!("the package client {program} is not on this host (it is no Debian or Ubuntu)");
        }
    }
    let host = Apt::host();
    if let Some(kernel) = host.kernel_packages() {
        match download(&host, kernel, into) {
            Ok(files) => return Ok(files),
            // The host's lists may be older than what the mirrors still have.
            Err(e) => tracing::info!("with the host's package lists: {e:#}"),
        }
    }
    let private = Apt::private(&cache.join("apt"))?;
    let updated = private.update();
    // One source of many may be out of order; what counts is whether there is a kernel.
    let kernel = match (updated, private.kernel_packages()) {
        (_, Some(kernel)) => kernel,
        (Err(e), None) => return Err(e),
        (Ok(()), None) => bail!("the host's sources have none of {KERNEL_PACKAGES:?}"),
    };
    download(&private, kernel, into)
}

fn download(apt: &Apt, mut packages: Vec<String>, into: &Path) -> Result<Vec<PathBuf>> {
    packages.push(BUSYBOX.into());
    let remotes = apt.remotes(&packages)?;
    let total = remotes.iter().map(|r| r.size_bytes).sum();
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total)
        .with_style(style)
        .with_message("fetching a Debian kernel");
    let mut child = apt
        .command("apt-get")
        .arg("download")
        .args(&packages)
        .current_dir(into)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run apt-get")?;
    while child.try_wait().context("lost apt-get")?.is_none() {
        bar.set_position(bytes_in(into));
        std::thread::sleep(Duration::from_millis(50));
    }
    bar.finish_and_clear();
    check(
        "apt-get download",
        &child.wait_with_output().context("lost apt-get")?,
    )?;
    remotes.iter().map(|r| verified(into, r)).collect()
}

fn bytes_in(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .filter_map(|e| e.ok()?.metadata().ok())
        .map(|m| m.len())
        .sum()
}

/// The downloaded file, once more compared with the index: nothing that is not what the signed
/// index says may be unpacked.
fn verified(dir: &Path, remote: &Remote) -> Result<PathBuf> {
    let path = dir.join(&remote.name);
    if super::sha256(&path)? != remote.sha256 {
        bail!("{} is not what the package index says", remote.name);
    }
    Ok(path)
}

/// Unpacks a package.
pub fn unpack(package: &Path, root: &Path) -> Result<()> {
    let out = Command::new("dpkg-deb")
        .arg("-x")
        .args([package, root])
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .context("cannot run dpkg-deb")?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        bail!("cannot unpack {}: {}", package.display(), text.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_understood() {
        let text = "'http://x/y%2b.deb' busybox-static_1%3a1.35_amd64.deb 928188 SHA256:3d3f\n\
                    noise\n'http://x' ../evil.deb 1 SHA256:00\n";
        assert_eq!(
            parse_uris(text),
            [Remote {
                name: "busybox-static_1%3a1.35_amd64.deb".into(),
                size_bytes: 928_188,
                sha256: "3d3f".into(),
            }]
        );
    }

    #[test]
    fn kernel_dependencies_are_found() {
        let text = "linux-image-virtual\n  Depends: linux-image-6.8.0-1-generic\n  \
                    Depends: linux-modules-6.8.0-1-generic\n  Depends: wireless-regdb\n";
        let names = [
            "linux-image-6.8.0-1-generic",
            "linux-modules-6.8.0-1-generic",
        ];
        assert_eq!(kernel_dependencies(text), names);
    }
}
