//! Whole packages, unpacked: boot loaders, firmware, old systems, and the tools to prepare disks for
//! them. They come as the guests of [`crate::fixtures`] do.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::PoisonError;

use crate::fixtures::{Apt, FETCHING, Reason, cache_dir, download_dir, host_mirror, run};

/// A package of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Package {
    /// Of Debian: suite, architecture, name.
    Debian(&'static str, &'static str, &'static str),
    /// Of Ubuntu, from a mirror that has it beside Debian: suite and component, architecture, name.
    Ubuntu(&'static str, &'static str, &'static str),
}

/// Keys of Ubuntu's archive, as Debian packages them.
const UBUNTU_KEYS: Package = Package::Debian("trixie", "amd64", "ubuntu-keyring");

impl Package {
    /// The directory into which it is unpacked, once.
    pub fn unpacked(self) -> Result<PathBuf, Reason> {
        let (signed_by, archive, (suite, arch, name)) = match self {
            Package::Debian(suite, arch, name) => {
                let (mirror, signed_by) = host_mirror()?;
                (signed_by, mirror, (format!("{suite} main"), arch, name))
            }
            Package::Ubuntu(suite, arch, name) => {
                let (mirror, _) = host_mirror()?;
                let mirror = mirror.trim_end_matches('/').trim_end_matches("/debian");
                let keys = UBUNTU_KEYS.file("usr/share/keyrings/ubuntu-archive-keyring.gpg")?;
                let signed_by = format!(" [signed-by={}]", keys.display());
                let archive = format!("{mirror}/ubuntu");
                (signed_by, archive, (suite.to_owned(), arch, name))
            }
        };
        let cache = cache_dir();
        let source = format!("deb{signed_by} {archive} {suite}\n");
        let root = format!(
            "{}-{arch}",
            suite.replace(' ', "-").trim_end_matches("-main")
        );
        let done = cache.join("packages").join(format!("{root}-{name}"));
        if done.is_dir() {
            return Ok(done);
        }
        let _one = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
        fs::create_dir_all(cache.join("packages")).map_err(|e| e.to_string())?;
        // Tests are processes; the client takes no second one.
        let lock = File::create(cache.join("packages/.lock")).map_err(|e| e.to_string())?;
        lock.lock().map_err(|e| e.to_string())?;
        if done.is_dir() {
            return Ok(done);
        }
        let deb = Apt::with_source(&cache, &root, &source, arch)?.download(&cache, name)?;
        let new = done.with_extension(format!("new-{}", std::process::id()));
        let made = fs::create_dir_all(&new)
            .map_err(|e| e.to_string())
            .and_then(|()| run(Command::new("dpkg-deb").arg("-x").args([&deb, &new])))
            .and_then(|_| fs::rename(&new, &done).map_err(|e| e.to_string()));
        for dir in [&new, &download_dir(&cache)] {
            let _ = fs::remove_dir_all(dir);
        }
        made.map(|()| done)
    }

    /// A file of it.
    pub fn file(self, path: &str) -> Result<PathBuf, Reason> {
        let file = self.unpacked()?.join(path);
        match file.is_file() {
            true => Ok(file),
            false => Err(format!("{self:?} has no {path}")),
        }
    }
}

/// The tools for FAT disks of the package mtools.
pub struct Mtools(PathBuf);

impl Mtools {
    /// Fetched.
    pub fn new() -> Result<Mtools, Reason> {
        let package = Package::Debian("bookworm", "amd64", "mtools");
        package.file("usr/bin/mtools").map(Mtools)
    }

    /// Runs one of them on a disk image (perhaps with `@@` and an offset); what it prints.
    pub fn run(&self, tool: &str, image: &str, args: &[&str]) -> String {
        let done = Command::new(&self.0)
            .args(["-c", tool, "-i", image])
            .args(args)
            .env("MTOOLS_SKIP_CHECK", "1")
            .env("MTOOLSRC", "/dev/null")
            .output()
            .expect("mtools runs");
        assert!(done.status.success(), "{tool} {image} {args:?}: {done:?}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// Puts a file of the host on a disk.
    pub fn put(&self, image: &str, file: &Path, name: &str) {
        let file = file.to_str().expect("a path of text");
        self.run("mcopy", image, &["-o", file, &format!("::{name}")]);
    }

    /// What a file on a disk holds.
    pub fn get(&self, image: &str, name: &str) -> String {
        self.run("mtype", image, &[&format!("::{name}")])
    }
}
