//! Real guests for tests: kernels and a busybox of several distribution releases.
//!
//! They come through the host's own package client, as an ordinary user, into an apt root of our
//! own under the target directory: the mirror and the keys are those of the host's configuration,
//! and the client verifies what it fetches against the signed index. Where that is not possible
//! (another distribution, no network) there is a reason instead of a guest.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use pyrite_vmm::boot::cpio::CpioWriter;

/// Why there is no fixture, in a sentence.
pub type Reason = String;

/// The stock guest's init script: the tests and the product start the same user space.
const INIT: &str = include_str!("../../crates/cli/src/stock/init.sh");
const UDHCPC: &str = include_str!("../../crates/cli/src/stock/udhcpc.sh");
const PROFILE: &str = "export PS1='\\u@\\h:\\w\\$ '\n";
/// Modules for the devices of the machine; what they depend on is added.
const MODULES: [&str; 8] = [
    "virtio_pci",
    "af_packet",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
    "virtio_balloon",
    "button",
    "evdev",
];
/// Changes when the same packages make another guest.
const RECIPE: u32 = 2;
/// Directories of the initial RAM disk.
const DIRS: [&str; 10] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "proc",
    "root",
    "sys",
    "tmp",
    "run",
];
/// LIMIT: directories below each other in a module tree.
const MAX_DEPTH: u32 = 12;

/// A kernel package of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelPackage {
    /// Debian suite.
    pub suite: &'static str,
    /// Debian architecture.
    pub arch: &'static str,
    /// Metapackage that depends on the kernel.
    pub package: &'static str,
}

/// A kernel and an initial RAM disk that boots to a shell.
#[derive(Clone, Debug)]
pub struct Guest {
    /// bzImage.
    pub kernel: PathBuf,
    /// cpio archive.
    pub initrd: PathBuf,
}

/// Tests of one binary run on several threads, and several binaries may run at once.
pub(crate) static FETCHING: Mutex<()> = Mutex::new(());

/// `target/pyrite-fixtures`, or what `PYRITE_FIXTURES` names.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("PYRITE_FIXTURES") {
        return dir.into();
    }
    let exe = std::env::current_exe().expect("path of the test");
    // target/PROFILE/deps/this-test
    let target = exe.ancestors().nth(3).expect("target directory");
    target.join("pyrite-fixtures")
}

/// The guest of `kernel`, made once and kept.
pub fn guest(kernel: KernelPackage) -> Result<Guest, Reason> {
    guest_with(kernel, "", &[])
}

/// Debian's standard kernel with the drivers of every storage controller.
pub fn storage_guest() -> Result<Guest, Reason> {
    let kernel = KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-amd64",
    };
    let modules = [
        "ahci",
        "ata_piix",
        "nvme",
        "virtio_blk",
        "virtio_scsi",
        "sd_mod",
        "sr_mod",
        "isofs",
        "floppy",
    ];
    guest_with(kernel, "-storage5", &modules)
}

/// The guest of `kernel` with more modules; `what` names them in the cache.
pub fn guest_with(kernel: KernelPackage, what: &str, more: &[&str]) -> Result<Guest, Reason> {
    let _one = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = cache_dir();
    let KernelPackage {
        suite,
        arch,
        package,
    } = kernel;
    let name = format!("{suite}-{arch}-{package}{what}-{RECIPE}");
    let done = cache.join("guests").join(&name);
    let guest = Guest {
        kernel: done.join("vmlinuz"),
        initrd: done.join("initrd.img"),
    };
    if guest.initrd.is_file() {
        return Ok(guest);
    }
    let root = cache.join(format!("root-{name}-{}", std::process::id()));
    let new = cache.join(format!("new-{name}-{}", std::process::id()));
    let made = make(&cache, kernel, more, &root, &new).and_then(|()| {
        fs::create_dir_all(cache.join("guests")).map_err(|e| e.to_string())?;
        // Another process may have been faster.
        match fs::rename(&new, &done) {
            Err(_) if guest.initrd.is_file() => Ok(()),
            result => result.map_err(|e| e.to_string()),
        }
    });
    for dir in [&root, &new, &download_dir(&cache)] {
        let _ = fs::remove_dir_all(dir);
    }
    made.map(|()| guest)
}

/// The standard kernel with the drivers of every network card.
pub fn network_guest() -> Result<Guest, Reason> {
    let kernel = KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-amd64",
    };
    let drivers = ["e1000", "8139too", "8139cp", "ne2k_pci"];
    guest_with(kernel, "-nics2", &drivers)
}

/// The first file of a package whose path is `dir` and whose name begins with `start`, unpacked
/// with `gzip` if need be.
pub fn file_of(
    suite: &str,
    arch: &str,
    package: &str,
    dir: &str,
    start: &str,
) -> Result<PathBuf, Reason> {
    let _one = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = cache_dir();
    let out = cache.join(format!("{suite}-{arch}-{package}-{start}"));
    if out.is_file() {
        return Ok(out);
    }
    unpacked([suite, arch, package], &cache, |root| {
        let bytes = fs::read(newest(&root.join(dir), start)?).map_err(|e| e.to_string())?;
        let bytes = if bytes.starts_with(&[0x1f, 0x8b]) {
            filter("gzip", &bytes)?
        } else {
            bytes
        };
        fs::write(&out, bytes).map_err(|e| e.to_string())
    })?;
    Ok(out)
}

/// A directory of a package, with all that is below it.
pub fn directory_of(suite: &str, arch: &str, package: &str, dir: &str) -> Result<PathBuf, Reason> {
    let _one = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = cache_dir();
    let out = cache.join(format!("{suite}-{arch}-{package}"));
    if !out.is_dir() {
        unpacked([suite, arch, package], &cache, |root| {
            match fs::rename(root.join(dir), &out) {
                // Another process may have been faster.
                Err(_) if out.is_dir() => Ok(()),
                result => result.map_err(|e| e.to_string()),
            }
        })?;
    }
    Ok(out)
}

/// Fetches a package, unpacks it, and leaves it to `take` as long as it is there.
fn unpacked(
    [suite, arch, package]: [&str; 3],
    cache: &Path,
    take: impl FnOnce(&Path) -> Result<(), Reason>,
) -> Result<(), Reason> {
    let deb = Apt::new(cache, suite, arch)?.download(cache, package)?;
    let root = cache.join(format!("root-{package}-{}", std::process::id()));
    fs::create_dir_all(&root).map_err(|e| e.to_string())?;
    let made =
        run(Command::new("dpkg-deb").arg("-x").args([&deb, &root])).and_then(|_| take(&root));
    for dir in [&root, &download_dir(cache)] {
        let _ = fs::remove_dir_all(dir);
    }
    made
}

/// The ELF kernel inside a guest's bzImage.
pub fn vmlinux(guest: &Guest) -> Result<PathBuf, Reason> {
    let _one = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let out = guest.kernel.with_file_name("vmlinux");
    if out.is_file() {
        return Ok(out);
    }
    let image = fs::read(&guest.kernel).map_err(|e| e.to_string())?;
    // Linux x86 boot protocol: setup_sects, payload_offset, payload_length.
    let word = |at: usize| {
        image
            .get(at..at + 4)?
            .try_into()
            .ok()
            .map(u32::from_le_bytes)
    };
    let setup = (usize::from(image.get(0x1f1).copied().unwrap_or(4)) + 1) * 512;
    let start = setup + word(0x248).unwrap_or(0) as usize;
    // The payload ends with its size when unpacked.
    let end = (start + word(0x24c).unwrap_or(0) as usize).saturating_sub(4);
    let payload = image.get(start..end).ok_or("the kernel has no payload")?;
    let program = match payload {
        [0x02, 0x21, ..] => "lz4",
        [0xfd, b'7', ..] => "xz",
        [0x28, 0xb5, ..] => "zstd",
        [0x1f, 0x8b, ..] => "gzip",
        _ => return Err("the kernel's compression is not known".into()),
    };
    let elf = filter(program, payload)?;
    let partial = out.with_extension(format!("{}", std::process::id()));
    fs::write(&partial, elf).map_err(|e| e.to_string())?;
    fs::rename(&partial, &out).map_err(|e| e.to_string())?;
    Ok(out)
}

/// Unpacks `bytes` with a program.
fn filter(program: &str, bytes: &[u8]) -> Result<Vec<u8>, Reason> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{program}: {e}"))?;
    let mut input = child.stdin.take().ok_or("no pipe")?;
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&bytes));
    let out = child.wait_with_output().map_err(|e| e.to_string())?;
    let written = writer.join().is_ok_and(|r| r.is_ok());
    if out.status.success() && written {
        Ok(out.stdout)
    } else {
        Err(format!("{program} cannot unpack it"))
    }
}

fn make(
    cache: &Path,
    kernel: KernelPackage,
    more: &[&str],
    root: &Path,
    new: &Path,
) -> Result<(), Reason> {
    let apt = Apt::new(cache, kernel.suite, kernel.arch)?;
    let image = apt.image_of(kernel.package)?;
    for package in [&image, "busybox-static"] {
        let deb = apt.download(cache, package)?;
        fs::create_dir_all(root).map_err(|e| e.to_string())?;
        run(Command::new("dpkg-deb").arg("-x").args([&deb, root]))?;
        let _ = fs::remove_file(&deb);
    }
    fs::create_dir_all(new).map_err(|e| e.to_string())?;
    let vmlinuz = newest(&root.join("boot"), "vmlinuz-")?;
    fs::copy(vmlinuz, new.join("vmlinuz")).map_err(|e| e.to_string())?;
    write_initrd(root, more, &new.join("initrd.img"))
}

/// The package client with a root of its own for one suite and architecture.
pub(crate) struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(cache: &Path, suite: &str, arch: &str) -> Result<Apt, Reason> {
        let (mirror, signed_by) = host_mirror()?;
        let line = format!("deb{signed_by} {mirror} {suite} main\n");
        Apt::with_source(cache, &format!("{suite}-{arch}"), &line, arch)
    }

    /// With the one line `source` in its list; `name` is that of its directory.
    pub(crate) fn with_source(
        cache: &Path,
        name: &str,
        source: &str,
        arch: &str,
    ) -> Result<Apt, Reason> {
        let dir = cache.join(format!("apt-{name}"));
        let (lists, archives) = (dir.join("lists"), dir.join("cache"));
        for d in [lists.join("partial"), archives.join("archives/partial")] {
            fs::create_dir_all(&d).map_err(|e| format!("{}: {e}", d.display()))?;
        }
        let sources = dir.join("sources.list");
        fs::write(&sources, source).map_err(|e| e.to_string())?;
        let apt = Apt {
            options: vec![
                // As root the client would drop to a user that cannot write here.
                "APT::Sandbox::User=root".into(),
                format!("Dir::Etc::SourceList={}", sources.display()),
                "Dir::Etc::SourceParts=/dev/null".into(),
                format!("Dir::State::Lists={}/", lists.display()),
                "Dir::State::status=/dev/null".into(),
                format!("Dir::Cache={}/", archives.display()),
                format!("APT::Architecture={arch}"),
                format!("APT::Architectures={arch}"),
                "APT::Update::Post-Invoke::=".into(),
                "APT::Update::Post-Invoke-Success::=".into(),
                "Acquire::Languages=none".into(),
                "Acquire::Retries=2".into(),
                "Acquire::http::Timeout=20".into(),
            ],
        };
        let updated = dir.join("updated");
        if !updated.is_file() {
            run(apt.command("apt-get").args(["update", "--error-on=any"]))?;
            fs::write(updated, "").map_err(|e| e.to_string())?;
        }
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut c = Command::new(program);
        c.arg("-q").env("LC_ALL", "C");
        for o in &self.options {
            c.args(["-o", o]);
        }
        c
    }

    /// The kernel that a metapackage depends on.
    fn image_of(&self, package: &str) -> Result<String, Reason> {
        let text = run(self
            .command("apt-cache")
            .args(["depends", "--important", package]))?;
        text.lines()
            .filter_map(|l| l.trim().strip_prefix("Depends: "))
            .find(|n| n.starts_with("linux-image-"))
            .map(str::to_owned)
            .ok_or_else(|| format!("{package} depends on no kernel"))
    }

    pub(crate) fn download(&self, cache: &Path, package: &str) -> Result<PathBuf, Reason> {
        let into = download_dir(cache);
        let _ = fs::remove_dir_all(&into);
        fs::create_dir_all(&into).map_err(|e| e.to_string())?;
        run(self
            .command("apt-get")
            .args(["download", package])
            .current_dir(&into))?;
        newest(&into, package)
    }
}

pub(crate) fn download_dir(cache: &Path) -> PathBuf {
    cache.join(format!("download-{}", std::process::id()))
}

/// Archive and key options of the host's first Debian source.
pub(crate) fn host_mirror() -> Result<(String, String), Reason> {
    const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed_by = if Path::new(KEYS).is_file() {
        format!(" [signed-by={KEYS}]")
    } else {
        String::new()
    };
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|e| e.ok().map(|e| e.path())));
    }
    files.sort();
    let texts = files.iter().filter_map(|f| fs::read_to_string(f).ok());
    texts
        .flat_map(|t| t.lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|l| l.starts_with("URIs:") || l.starts_with("deb "))
        .flat_map(|l| {
            l.split_whitespace()
                .filter(|w| w.contains("://"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .find(|u| u.trim_end_matches('/').ends_with("/debian"))
        .map(|u| (u, signed_by))
        .ok_or_else(|| "the host's package sources name no Debian archive".into())
}

/// Runs a program; its output, or what it complained about.
pub(crate) fn run(command: &mut Command) -> Result<String, Reason> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    Err(format!("{program}: {}", text.lines().next().unwrap_or("")))
}

/// The last entry of `dir` that begins with `start`.
fn newest(dir: &Path, start: &str) -> Result<PathBuf, Reason> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(start))
        })
        // A file that is called just so, else the newest version.
        .max_by_key(|p| (p.file_name() == Some(start.as_ref()), p.clone()))
        .ok_or_else(|| format!("{} has no {start}*", dir.display()))
}

fn write_initrd(root: &Path, more: &[&str], out: &Path) -> Result<(), Reason> {
    let busybox = ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .find_map(|p| fs::read(root.join(p)).ok())
        .ok_or("the busybox package has no busybox")?;
    let modules = modules(root, more)?;
    write_cpio(out, &busybox, &modules).map_err(|e| format!("{}: {e}", out.display()))
}

fn write_cpio(out: &Path, busybox: &[u8], modules: &[(String, Vec<u8>)]) -> std::io::Result<()> {
    let mut cpio = CpioWriter::new(std::io::BufWriter::new(File::create(out)?));
    for dir in DIRS {
        cpio.dir(dir)?;
    }
    cpio.char_device("dev/console", 5, 1)?;
    cpio.char_device("dev/null", 1, 3)?;
    cpio.file("bin/busybox", 0o755, busybox)?;
    cpio.symlink("bin/sh", "busybox")?;
    cpio.file("init", 0o755, INIT.as_bytes())?;
    cpio.file("etc/udhcpc.script", 0o755, UDHCPC.as_bytes())?;
    cpio.file("etc/profile", 0o644, PROFILE.as_bytes())?;
    cpio.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    let mut order = String::new();
    for (name, bytes) in modules {
        cpio.file(&format!("lib/modules/{name}.ko"), 0o644, bytes)?;
        order.push_str(name);
        order.push_str(".ko\n");
    }
    cpio.file("lib/modules/order", 0o644, order.as_bytes())?;
    cpio.finish().map(drop)
}

/// The modules of [`MODULES`] and `more` that are not built in, after what they depend on.
fn modules(root: &Path, more: &[&str]) -> Result<Vec<(String, Vec<u8>)>, Reason> {
    let tree = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|p| newest(&root.join(p), "").ok())
        .ok_or("the kernel package has no modules")?;
    let mut files = HashMap::new();
    collect(&tree, &mut files, 0);
    let mut out = Vec::new();
    for name in MODULES.iter().chain(more) {
        add(name, &files, &mut out, 0)?;
    }
    Ok(out)
}

fn collect(dir: &Path, files: &mut HashMap<String, PathBuf>, depth: u32) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for path in entries.filter_map(|e| e.ok().map(|e| e.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some((stem, _)) = name.split_once(".ko") {
            files.insert(stem.replace('-', "_"), path.clone());
        } else if depth < MAX_DEPTH && path.is_dir() && !path.is_symlink() {
            collect(&path, files, depth + 1);
        }
    }
}

fn add(
    name: &str,
    files: &HashMap<String, PathBuf>,
    out: &mut Vec<(String, Vec<u8>)>,
    depth: u32,
) -> Result<(), Reason> {
    const KEY: &[u8] = b"\0depends=";
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else {
        return Ok(());
    };
    if depth > MAX_DEPTH || out.iter().any(|(n, _)| *n == name) {
        return Ok(());
    }
    let bytes = if path.extension().is_some_and(|e| e == "xz") {
        let unpacked = Command::new("xz").arg("-dc").arg(path).output();
        unpacked.map_err(|e| format!("xz: {e}"))?.stdout
    } else {
        fs::read(path).map_err(|e| e.to_string())?
    };
    // A package has no modules.dep, so the module is asked itself.
    let at = bytes.windows(KEY.len()).position(|w| w == KEY);
    let list = at.map_or(&[][..], |at| &bytes[at + KEY.len()..]);
    let list = list.split(|b| *b == 0).next().unwrap_or_default();
    for needed in String::from_utf8_lossy(list).split(',') {
        add(needed, files, out, depth + 1)?;
    }
    out.push((name, bytes));
    Ok(())
}
