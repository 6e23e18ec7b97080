//! A folder of the host, and safe operations on what is in it.
//!
//! # What keeps the guest inside
//!
//! * A [`Node`] is an `O_PATH` descriptor. It stays the same object whatever is renamed or deleted.
//! * The only way to another node is one [`Name`] below a directory, opened with `O_NOFOLLOW` and
//!   `openat2`'s `RESOLVE_BENEATH`, `RESOLVE_NO_MAGICLINKS` and `RESOLVE_NO_XDEV`. So neither `..`
//!   nor a symbolic link nor a mount point leads out, whatever host programs do meanwhile.
//! * A node is opened for reading or writing through `/proc/self/fd`, which leads to that very
//!   object, and only if it is a file or a directory: devices, pipes and sockets are passive.
//!
//! # Owners
//!
//! With [`Owner::Passthrough`] new objects belong to the guest's user, which only root can grant.
//! With [`Owner::Squash`] they belong to the user of this process, changes of owner are accepted
//! without effect, and set-user-id bits are dropped. Who may do what is checked by the guest's
//! kernel against the owners and modes that it sees, and by the host's kernel against this process.
//!
//! Extended attributes are those of the namespace `user.`; others have a meaning to the host.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use minicbor::{Decode, Encode};
use rustix::fs::{
    self, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags,
    ResolveFlags, SeekFrom, Stat, Timestamps, Uid, XattrFlags,
};
use rustix::io;

use crate::locks;
use crate::{Errno, Result};

mod node;

//mod tests;

pub use crate::locks::Lock;
pub use node::{Attr, Entry, Kind, Name, SetAttr, SetTime, Space, Who};

const ESTALE: Errno = Errno(libc::ESTALE);
const EINVAL: Errno = Errno(libc::EINVAL);

/// LIMIT: bytes of an extended attribute, and of a list of their names: those of Linux.
pub const MAX_XATTR_BYTES: usize = 64 << 10;
/// LIMIT: bytes of a symbolic link's target.
pub const MAX_TARGET_BYTES: usize = 4095;
/// Bytes of directory entries fetched at a time.
const DIR_BYTES: usize = 32 << 10;
/// LIMIT: directories below each other on the way to an object of a saved state.
const MAX_DEPTH: usize = 2048;
/// Mode bits that a guest may set: permissions and the three above them.
const MODE_BITS: u32 = 0o7777;
/// Of these, what is left with [`Owner::Squash`].
const SQUASHED_BITS: u32 = 0o1777;

/// Flags of open(2) that a guest has a say in. The rest is ours or has no meaning here.
const OPEN_FLAGS: u32 =
    (libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC) as u32;

/// To whom new objects belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// To the guest's user, by number. Needs root.
    Passthrough,
    /// To the user of this process.
    Squash,
}

/// What is shared, and how.
#[derive(Clone, Debug)]
pub struct FolderConfig {
    /// The directory.
    pub path: PathBuf,
    /// The guest may not change anything.
    pub read_only: bool,
    /// To whom new objects belong.
    pub owner: Owner,
    /// LIMIT: descriptors that the guest may make this process hold.
    pub max_descriptors: usize,
}

/// Counts a descriptor until it is dropped.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An object in a folder.
#[derive(Debug)]
pub struct Node {
    /// Nothing: stale.
    fd: Option<(OwnedFd, Counted)>,
    kind: Kind,
    dev: u64,
    ino: u64,
    id: u64,
}

impl Node {
    fn fd(&self) -> Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(|(fd, _)| fd.as_fd()).ok_or(ESTALE)
    }
    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }
    /// A number that differs from those of all other objects in the folder, as long as it exists.
    pub fn id(&self) -> u64 {
        self.id
    }
    /// Device and inode of the host.
    pub fn identity(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }
}

/// A node that is open for reading or writing.
#[derive(Debug)]
pub struct Handle {
    fd: OwnedFd,
    _count: Counted,
    flags: u32,
    /// For locks that the descriptor's access mode does not allow.
    locks: OnceLock<(OwnedFd, Counted)>,
}

/// Where a node is, to find it again.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedNode {
    /// Path from the folder, without a leading slash; nothing for what was deleted.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub path: Option<Vec<u8>>,
    /// Inode on the host.
    #[n(1)]
    pub ino: u64,
    /// The number that the guest knows.
    #[n(2)]
    pub id: u64,
    /// What it was: the file type bits of its mode.
    #[n(3)]
    pub file_type: u32,
}

/// A shared folder.
#[derive(Debug)]
pub struct Folder {
    root: Arc<Node>,
    read_only: bool,
    owner: Owner,
    proc_fds: OwnedFd,
    max_descriptors: usize,
    descriptors: Arc<AtomicUsize>,
    /// The limit was reached and that was said.
    full: AtomicBool,
    path: PathBuf,
    /// Devices of the host that objects were seen on: their inode numbers repeat.
    devices: Mutex<Vec<u64>>,
}

fn proc_name(fd: BorrowedFd<'_>) -> String {
    fd.as_raw_fd().to_string()
}

fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn mode_of(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & MODE_BITS)
}

/// A user's number; the one that means "leave it" to the kernel is none.
fn id_of(id: u32) -> Option<u32> {
    (id != u32::MAX).then_some(id)
}

impl Folder {
    /// Opens a folder. The error says what to do about it.
    pub fn open(config: &FolderConfig) -> std::result::Result<Folder, String> {
        let path = config.path.display();
        let path_only = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::openat(CWD, &config.path, path_only, Mode::empty()).map_err(|e| match e {
            io::Errno::NOTDIR => "is not a directory; expected a folder to share".to_owned(),
            e => e.to_string(),
        })?;
        let proc_fds = fs::openat(CWD, "/proc/self/fd", path_only, Mode::empty())
            .map_err(|e| format!("sharing needs /proc: {e}"))?;
        let kind = fs::fstatfs(&fd).map_err(|e| format!("{path}: {e}"))?.f_type;
        if kind == fs::PROC_SUPER_MAGIC {
            return Err("is of /proc, through which this process can be changed".into());
        }
        let stat = fs::fstat(&fd).map_err(|e| format!("{path}: {e}"))?;
        if config.owner == Owner::Passthrough && !rustix::process::geteuid().is_root() {
            return Err(
                "only root can make files of other users; leave owner=passthrough out".into(),
            );
        }
        let descriptors = Arc::new(AtomicUsize::new(1));
        let root = Arc::new(Node {
            fd: Some((fd, Counted(Arc::clone(&descriptors)))),
            kind: Kind::Directory,
            dev: stat.st_dev,
            ino: stat.st_ino,
            id: stat.st_ino,
        });
        let folder = Folder {
            devices: Mutex::new(vec![stat.st_dev]),
            root,
            read_only: config.read_only,
            owner: config.owner,
            proc_fds,
            max_descriptors: config.max_descriptors,
            descriptors,
            full: AtomicBool::new(false),
            path: config.path.clone(),
        };
        // Also finds out that the kernel has openat2.
        match folder.lookup_raw(folder.root.fd.as_ref().map(|f| f.0.as_fd()), b".") {
            Ok(_) => Ok(folder),
            Err(Errno(libc::ENOSYS)) => {
                Err("sharing needs openat2, which this host's kernel lacks (Linux 5.6)".into())
            }
            Err(e) => Err(e.to_string()),
        }
    }

    /// The folder itself.
    pub fn root(&self) -> Arc<Node> {
        Arc::clone(&self.root)
    }
    /// True if the guest may not change anything.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    /// Descriptors held, nodes and handles together.
    pub fn descriptors(&self) -> usize {
        self.descriptors.load(Ordering::Relaxed)
    }

    fn count(&self) -> Result<Counted> {
        let before = self.descriptors.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&self.descriptors));
        if before >= self.max_descriptors {
            if !self.full.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "the guest knows {before} objects of {}, and may know no more: it is told that \
                     too many files are open. Raise this process's limit (ulimit -Hn), or share \
                     a smaller folder",
                    self.path.display()
                );
            }
            return Err(Errno(libc::ENFILE));
        }
        Ok(counted)
    }

    fn writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Errno(libc::EROFS));
        }
        Ok(())
    }

    /// The number of an inode: its own on the first device, with the device's number on others.
    fn id(&self, dev: u64, ino: u64) -> u64 {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match devices.iter().position(|d| *d == dev) {
            Some(n) => n,
            None if devices.len() < 1 << 15 => {
                devices.push(dev);
                devices.len() - 1
            }
            // More file systems than can be told apart.
            None => 1 << 15,
        };
        ino ^ (index as u64) << 48
    }

    fn lookup_raw(&self, dir: Option<BorrowedFd<'_>>, name: &[u8]) -> Result<Node> {
        let count = self.count()?;
        let fd = fs::openat2(
            dir.ok_or(ESTALE)?,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
        )?;
        self.node(fd, count)
    }

    fn node(&self, fd: OwnedFd, count: Counted) -> Result<Node> {
        let stat = fs::fstat(&fd)?;
        Ok(Node {
            fd: Some((fd, count)),
            kind: Kind::of(stat.st_mode),
            dev: stat.st_dev,
            ino: stat.st_ino,
            id: self.id(stat.st_dev, stat.st_ino),
        })
    }

    /// What `name` in a directory is.
    pub fn lookup(&self, dir: &Node, name: Name<'_>) -> Result<Arc<Node>> {
        Ok(Arc::new(self.lookup_raw(Some(dir.fd()?), name.bytes())?))
    }

    /// The attributes of a node.
    pub fn attr(&self, node: &Node) -> Result<Attr> {
        let stat = fs::fstat(node.fd()?)?;
        Ok(Attr::of(&stat, node.id))
    }

    /// The numbers of the file system that a node is on.
    pub fn space(&self, node: &Node) -> Result<Space> {
        let s = fs::fstatvfs(node.fd()?)?;
        Ok(Space {
            block_bytes: s.f_frsize,
            blocks: s.f_blocks,
            free: s.f_bfree,
            available: s.f_bavail,
            files: s.f_files,
            files_free: s.f_ffree,
            name_bytes: s.f_namemax,
        })
    }

    fn open_again(&self, node: &Node, flags: OFlags) -> Result<OwnedFd> {
        let fd = node.fd()?;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(fs::openat(
            &self.proc_fds,
            proc_name(fd),
            flags,
            Mode::empty(),
        )?)
    }

    /// Opens a file or a directory with flags of open(2).
    pub fn open_node(&self, node: &Node, flags: u32) -> Result<Handle> {
        let wants_write = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        let flags = match node.kind {
            Kind::Directory if wants_write => return Err(Errno(libc::EISDIR)),
            Kind::Directory => libc::O_DIRECTORY as u32,
            Kind::File => flags & OPEN_FLAGS,
            Kind::Symlink => return Err(Errno(libc::ELOOP)),
            Kind::Other(_) => return Err(Errno(libc::ENXIO)),
        };
        if wants_write || flags & libc::O_TRUNC as u32 != 0 {
            self.writable()?;
        }
        let count = self.count()?;
        let fd = self.open_again(node, OFlags::from_bits_retain(flags))?;
        Ok(Handle::new(fd, count, flags))
    }

    /// Makes a file in a directory, or opens the one that is there unless `flags` has `O_EXCL`.
    pub fn create(
        &self,
        dir: &Node,
        name: Name<'_>,
        flags: u32,
        mode: u32,
        who: Who,
    ) -> Result<(Arc<Node>, Handle)> {
        self.writable()?;
        let opened = flags & OPEN_FLAGS & !(libc::O_TRUNC as u32);
        let count = self.count()?;
        let made = fs::openat2(
            dir.fd()?,
            name.bytes(),
            OFlags::from_bits_retain(opened)
                | OFlags::CREATE
                | OFlags::EXCL
                | OFlags::NOFOLLOW
                | OFlags::NOCTTY
                | OFlags::CLOEXEC,
            mode_of(mode & 0o777),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
        );
        let fd = match made {
            Ok(fd) => fd,
            Err(io::Errno::EXIST) if flags & libc::O_EXCL as u32 == 0 => {
                let node = self.lookup(dir, name)?;
                let handle = self.open_node(&node, flags)?;
                return Ok((node, handle));
            }
            Err(e) => return Err(e.into()),
        };
        let path = fs::openat(
            &self.proc_fds,
            proc_name(fd.as_fd()),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let node = Arc::new(self.node(path, self.count()?)?);
        self.settle(dir, &node, mode, who)?;
        Ok((node, Handle::new(fd, count, opened)))
    }

    /// Gives a new object its owner and exact mode: the umask of this process took some of it, and
    /// a change of owner takes more.
    fn settle(&self, dir: &Node, node: &Node, mode: u32, who: Who) -> Result<()> {
        let fd = node.fd()?;
        let mut stat = fs::fstat(fd)?;
        if self.owner == Owner::Passthrough {
            // In such a directory, new objects have the group of the directory.
            let inherits = fs::fstat(dir.fd()?)?.st_mode & libc::S_ISGID != 0;
            let gid = id_of(who.gid).filter(|_| !inherits).map(Gid::from_raw);
            let uid = id_of(who.uid).map(Uid::from_raw);
            fs::chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?;
            stat = fs::fstat(fd)?;
        }
        if node.kind == Kind::Symlink {
            return Ok(());
        }
        let mut wanted = self.allowed_mode(mode);
        if node.kind == Kind::Directory {
            wanted |= stat.st_mode & libc::S_ISGID;
        }
        if stat.st_mode & MODE_BITS != wanted {
            self.chmod(node, wanted)?;
        }
        Ok(())
    }

    fn allowed_mode(&self, mode: u32) -> u32 {
        mode & match self.owner {
            Owner::Passthrough => MODE_BITS,
            Owner::Squash => SQUASHED_BITS,
        }
    }

    fn chmod(&self, node: &Node, mode: u32) -> Result<()> {
        let name = proc_name(node.fd()?);
        Ok(fs::chmodat(
            &self.proc_fds,
            name,
            mode_of(mode),
            AtFlags::empty(),
        )?)
    }

    /// Looks a new object up; `kind` tells it from what another program may have put there.
    fn made(
        &self,
        dir: &Node,
        name: Name<'_>,
        kind: Kind,
        mode: u32,
        who: Who,
    ) -> Result<Arc<Node>> {
        let node = self.lookup(dir, name)?;
        let stat = fs::fstat(node.fd()?)?;
        let ours =
            self.owner == Owner::Squash || stat.st_uid == rustix::process::geteuid().as_raw();
        let alone = kind == Kind::Directory || stat.st_nlink == 1;
        if node.kind != kind || !ours || !alone {
            return Err(ESTALE);
        }
        self.settle(dir, &node, mode, who)?;
        Ok(node)
    }

    /// Makes a directory.
    pub fn mkdir(&self, dir: &Node, name: Name<'_>, mode: u32, who: Who) -> Result<Arc<Node>> {
        self.writable()?;
        fs::mkdirat(dir.fd()?, name.bytes(), mode_of(mode & 0o777))?;
        self.made(dir, name, Kind::Directory, mode, who)
    }

    /// Makes a file, a pipe or a socket without opening it. Devices are refused: one on the host
    /// would be the host's.
    pub fn mknod(&self, dir: &Node, name: Name<'_>, mode: u32, who: Who) -> Result<Arc<Node>> {
        self.writable()?;
        let kind = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => {
                let flags = (libc::O_EXCL | libc::O_WRONLY) as u32;
                return Ok(self.create(dir, name, flags, mode, who)?.0);
            }
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            _ => return Err(Errno(libc::EPERM)),
        };
        fs::mknodat(dir.fd()?, name.bytes(), kind, mode_of(mode & 0o777), 0)?;
        self.made(dir, name, Kind::of(mode), mode, who)
    }

    /// Makes a symbolic link. Where it leads is never looked at here.
    pub fn symlink(
        &self,
        dir: &Node,
        name: Name<'_>,
        target: &[u8],
        who: Who,
    ) -> Result<Arc<Node>> {
        self.writable()?;
        if target.is_empty() || target.len() > MAX_TARGET_BYTES || target.contains(&0) {
            return Err(EINVAL);
        }
        fs::symlinkat(target, dir.fd()?, name.bytes())?;
        self.made(dir, name, Kind::Symlink, 0, who)
    }

    /// The target of a symbolic link, at most [`MAX_TARGET_BYTES`].
    pub fn readlink(&self, node: &Node) -> Result<Vec<u8>> {
        if node.kind != Kind::Symlink {
            return Err(EINVAL);
        }
        let target = fs::readlinkat(node.fd()?, "", Vec::new())?.into_bytes();
        if target.len() > MAX_TARGET_BYTES {
            return Err(Errno(libc::ENAMETOOLONG));
        }
        Ok(target)
    }

    /// Makes another name for a node.
    pub fn link(&self, node: &Node, dir: &Node, name: Name<'_>) -> Result<()> {
        self.writable()?;
        if node.kind == Kind::Directory {
            return Err(Errno(libc::EPERM));
        }
        // The link of /proc is followed, to the very object, and no further.
        Ok(fs::linkat(
            &self.proc_fds,
            proc_name(node.fd()?),
            dir.fd()?,
            name.bytes(),
            AtFlags::SYMLINK_FOLLOW,
        )?)
    }

    /// Removes a name: of an empty directory if `directory`, else of anything else.
    pub fn unlink(&self, dir: &Node, name: Name<'_>, directory: bool) -> Result<()> {
        self.writable()?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        Ok(fs::unlinkat(dir.fd()?, name.bytes(), flags)?)
    }

    /// Renames with the flags of renameat2(2), of which `RENAME_NOREPLACE` and `RENAME_EXCHANGE`
    /// are known.
    pub fn rename(
        &self,
        (from, old): (&Node, Name<'_>),
        (to, new): (&Node, Name<'_>),
        flags: u32,
    ) -> Result<()> {
        self.writable()?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        let flags = RenameFlags::from_bits(flags).ok_or(EINVAL)?;
        if !known.contains(flags) {
            return Err(EINVAL);
        }
        Ok(fs::renameat_with(
            from.fd()?,
            old.bytes(),
            to.fd()?,
            new.bytes(),
            flags,
        )?)
    }

    /// Changes attributes; `handle`, if it can write, is used to change the size.
    pub fn set_attr(&self, node: &Node, set: &SetAttr, handle: Option<&Handle>) -> Result<()> {
        self.writable()?;
        let fd = node.fd()?;
        if (set.uid.is_some() || set.gid.is_some()) && self.owner == Owner::Passthrough {
            let uid = set.uid.and_then(id_of).map(Uid::from_raw);
            let gid = set.gid.and_then(id_of).map(Gid::from_raw);
            fs::chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = set.mode {
            if node.kind == Kind::Symlink {
                return Err(Errno(libc::EOPNOTSUPP));
            }
            self.chmod(node, self.allowed_mode(mode))?;
        }
        if let Some(size) = set.size {
            match (node.kind, handle) {
                (Kind::File, Some(h)) if h.writes() => fs::ftruncate(&h.fd, size)?,
                (Kind::File, _) => fs::ftruncate(self.open_again(node, OFlags::WRONLY)?, size)?,
                (Kind::Directory, _) => return Err(Errno(libc::EISDIR)),
                _ => return Err(EINVAL),
            }
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps {
                last_access: SetTime::spec(set.atime)?,
                last_modification: SetTime::spec(set.mtime)?,
            };
            fs::utimensat(&self.proc_fds, proc_name(fd), &times, AtFlags::empty())?;
        }
        Ok(())
    }

    /// The part of an attribute's name that this crate lets through.
    fn xattr_name(node: &Node, name: &[u8]) -> Result<()> {
        // The kernel has them for files and directories only.
        let kind = matches!(node.kind, Kind::File | Kind::Directory);
        if !name.starts_with(b"user.") || !kind {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        if name.len() > 255 || name.contains(&0) {
            return Err(Errno(libc::ERANGE));
        }
        Ok(())
    }

    /// The value of an extended attribute.
    pub fn xattr(&self, node: &Node, name: &[u8]) -> Result<Vec<u8>> {
        Folder::xattr_name(node, name)?;
        let mut value = vec![0; MAX_XATTR_BYTES];
        let n = fs::getxattr(proc_path(node.fd()?), name, &mut value[..])?;
        value.truncate(n);
        Ok(value)
    }

    /// The names of the extended attributes, each with a NUL after it.
    pub fn xattrs(&self, node: &Node) -> Result<Vec<u8>> {
        if !matches!(node.kind, Kind::File | Kind::Directory) {
            return Ok(Vec::new());
        }
        let mut all = vec![0; MAX_XATTR_BYTES];
        let n = match fs::listxattr(proc_path(node.fd()?), &mut all[..]) {
            Err(io::Errno::OPNOTSUPP) => 0,
            other => other?,
        };
        let names = all.get(..n).unwrap_or_default();
        let ours = names
            .split_inclusive(|b| *b == 0)
            .filter(|name| name.starts_with(b"user."));
        Ok(ours.flatten().copied().collect())
    }

    /// Sets an extended attribute with the flags of setxattr(2).
    pub fn set_xattr(&self, node: &Node, name: &[u8], value: &[u8], flags: u32) -> Result<()> {
        self.writable()?;
        Folder::xattr_name(node, name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(EINVAL)?;
        let known = XattrFlags::CREATE | XattrFlags::REPLACE;
        if value.len() > MAX_XATTR_BYTES || !known.contains(flags) {
            return Err(EINVAL);
        }
        Ok(fs::setxattr(proc_path(node.fd()?), name, value, flags)?)
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&self, node: &Node, name: &[u8]) -> Result<()> {
        self.writable()?;
        Folder::xattr_name(node, name)?;
        Ok(fs::removexattr(proc_path(node.fd()?), name)?)
    }

    /// The descriptor for a lock of this kind. Locking for writing needs a descriptor that can
    /// write; on a folder that cannot be written, the guest's own kernel keeps its programs apart,
    /// and a lock for reading is enough to keep writers of the host away.
    fn lock_fd<'h>(
        &self,
        node: &Node,
        handle: &'h Handle,
        lock: &Lock,
    ) -> Result<(BorrowedFd<'h>, Lock)> {
        let mode = handle.flags & libc::O_ACCMODE as u32;
        let fits = match lock.kind {
            0 => mode != libc::O_WRONLY as u32,
            1 => mode != libc::O_RDONLY as u32,
            _ => true,
        };
        if node.kind != Kind::File {
            return Err(EINVAL);
        }
        // One descriptor for all locks of a handle: two would be in each other's way.
        if fits && handle.locks.get().is_none() {
            return Ok((handle.fd.as_fd(), *lock));
        }
        if handle.locks.get().is_none() {
            let wanted = if self.read_only {
                OFlags::RDONLY
            } else {
                OFlags::RDWR
            };
            let fd = match self.open_again(node, wanted) {
                Err(Errno(libc::EACCES | libc::EROFS | libc::EPERM)) => {
                    self.open_again(node, OFlags::RDONLY)?
                }
                other => other?,
            };
            let _ = handle.locks.set((fd, self.count()?));
        }
        let (fd, _) = handle.locks.get().ok_or(ESTALE)?;
        let writes = fs::fcntl_getfl(fd)?.contains(OFlags::RDWR);
        let kind = if lock.kind == 1 && !writes {
            0
        } else {
            lock.kind
        };
        Ok((fd.as_fd(), Lock { kind, ..*lock }))
    }

    /// Sets or releases a lock without waiting; `EAGAIN` if somebody else has one.
    pub fn lock(&self, node: &Node, handle: &Handle, lock: &Lock) -> Result<()> {
        if lock.kind == 2 {
            // Whatever descriptor it is held by.
            locks::set(handle.fd.as_fd(), lock)?;
            return match handle.locks.get() {
                Some((fd, _)) => locks::set(fd.as_fd(), lock),
                None => Ok(()),
            };
        }
        let (fd, lock) = self.lock_fd(node, handle, lock)?;
        if handle.locks.get().is_some() {
            let release = Lock { kind: 2, ..lock };
            locks::set(handle.fd.as_fd(), &release)?;
        }
        locks::set(fd, &lock)
    }

    /// The lock that is in the way of this one, if there is one.
    pub fn test_lock(&self, node: &Node, handle: &Handle, lock: &Lock) -> Result<Option<Lock>> {
        let (fd, lock) = self.lock_fd(node, handle, lock)?;
        locks::test(fd, &lock)
    }

    /// The path of a node below the folder, if it still has that one.
    fn path_of(&self, node: &Node) -> Option<Vec<u8>> {
        let path = |node: &Node| {
            let name = proc_name(node.fd().ok()?);
            let path = fs::readlinkat(&self.proc_fds, name, Vec::new()).ok()?;
            Some(path.into_bytes())
        };
        let root = path(&self.root)?;
        let full = path(node)?;
        let below = full.strip_prefix(root.as_slice())?;
        let below = below.strip_prefix(b"/").unwrap_or(below).to_vec();
        // A name that ends in " (deleted)" may be one, and the path may be of another namespace.
        let found = self.resolve(&below).ok()?;
        (found.identity() == node.identity()).then_some(below)
    }

    fn resolve(&self, path: &[u8]) -> Result<Arc<Node>> {
        let mut node = self.root();
        let names = path.split(|b| *b == b'/').filter(|n| !n.is_empty());
        for (depth, name) in names.enumerate() {
            if depth >= MAX_DEPTH {
                return Err(Errno(libc::ENAMETOOLONG));
            }
            node = self.lookup(&node, Name::new(name)?)?;
        }
        Ok(node)
    }

    /// The directory that a node is in and its name there; `None` for the folder itself.
    pub fn place(&self, node: &Node) -> Result<Option<(Arc<Node>, Vec<u8>)>> {
        if node.identity() == self.root.identity() {
            return Ok(None);
        }
        let path = self.path_of(node).ok_or(ESTALE)?;
        let (dir, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&[][..], &path[..]),
        };
        Ok(Some((self.resolve(dir)?, name.to_vec())))
    }

    /// The directory that a directory is in; that of the folder itself is the folder.
    pub fn parent(&self, node: &Node) -> Result<Arc<Node>> {
        if node.kind != Kind::Directory {
            return Err(Errno(libc::ENOTDIR));
        }
        Ok(self
            .place(node)?
            .map_or_else(|| self.root(), |(dir, _)| dir))
    }

    /// Where a node is, to find it again with [`Folder::find`].
    pub fn describe(&self, node: &Node) -> SavedNode {
        SavedNode {
            path: self.path_of(node),
            ino: node.ino,
            id: node.id,
            file_type: node.kind.bits(),
        }
    }

    /// The node that was described; a stale one if it is not there any more, or is another.
    pub fn find(&self, saved: &SavedNode) -> Arc<Node> {
        let found = saved.path.as_ref().and_then(|p| self.resolve(p).ok());
        let same = |n: &Arc<Node>| {
            let root = n.identity() == self.root.identity();
            n.kind.bits() == saved.file_type && (n.ino == saved.ino || root)
        };
        found.filter(same).unwrap_or_else(|| {
            Arc::new(Node {
                fd: None,
                kind: Kind::of(saved.file_type),
                dev: 0,
                ino: saved.ino,
                id: saved.id,
            })
        })
    }
}

impl Handle {
    fn new(fd: OwnedFd, count: Counted, flags: u32) -> Handle {
        Handle {
            fd,
            _count: count,
            flags,
            locks: OnceLock::new(),
        }
    }

    fn writes(&self) -> bool {
        self.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32
    }

    /// The flags to open it again with, as it is now.
    pub fn flags(&self) -> u32 {
        self.flags & !(libc::O_TRUNC as u32)
    }

    /// Appends up to `len` bytes from byte `offset` to `out`; returns how many.
    pub fn read(&self, offset: u64, len: usize, out: &mut Vec<u8>) -> Result<usize> {
        let start = out.len();
        out.resize(start + len, 0);
        let mut done = 0;
        let result = loop {
            let at = offset.saturating_add(done as u64);
            let to = out.get_mut(start + done..).unwrap_or_default();
            if to.is_empty() {
                break Ok(());
            }
            match io::pread(&self.fd, to, at) {
                Ok(0) => break Ok(()),
                Ok(n) => done += n,
                Err(io::Errno::INTR) => {}
                Err(_) if done > 0 => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        out.truncate(start + done);
        result?;
        Ok(done)
    }

    /// Writes at byte `offset`; returns how many bytes were written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<usize> {
        let mut done = 0;
        while done < data.len() {
            let at = offset.saturating_add(done as u64);
            match io::pwrite(&self.fd, &data[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(io::Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }

    /// Brings what was written to the disk.
    pub fn sync(&self, data_only: bool) -> Result<()> {
        if data_only {
            fs::fdatasync(&self.fd)?;
        } else {
            fs::fsync(&self.fd)?;
        }
        Ok(())
    }

    /// Goes through the entries of a directory from a position that an entry gave as its `next`,
    /// 0 for the first, until `take` returns false for one that it has no room for.
    pub fn entries(
        &self,
        dir: &Node,
        position: u64,
        mut take: impl FnMut(&Entry<'_>) -> bool,
    ) -> Result<()> {
        fs::seek(&self.fd, SeekFrom::Start(position))?;
        let mut buffer = Vec::with_capacity(DIR_BYTES);
        let mut all = RawDir::new(&self.fd, buffer.spare_capacity_mut());
        while let Some(entry) = all.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // The number of what is above the folder is not the guest's business.
            let dots = matches!(name, b"." | b"..");
            let entry = Entry {
                name,
                id: if dots {
                    dir.id
                } else {
                    dir.id ^ dir.ino ^ entry.ino()
                },
                file_type: entry.file_type().as_raw_mode(),
                next: entry.next_entry_cookie(),
            };
            if !take(&entry) {
                break;
            }
        }
        Ok(())
    }

    /// Reserves or frees room with the modes of fallocate(2) that keep the data elsewhere.
    pub fn allocate(&self, mode: u32, offset: u64, len: u64) -> Result<()> {
        let mode = FallocateFlags::from_bits(mode).ok_or(EINVAL)?;
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        Ok(fs::fallocate(&self.fd, mode, offset, len)?)
    }

    /// The next data or hole from a position.
    pub fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        let from = if hole {
            SeekFrom::Hole(offset)
        } else {
            SeekFrom::Data(offset)
        };
        Ok(fs::seek(&self.fd, from)?)
    }

    /// Copies bytes to another file within the host's kernel; returns how many.
    pub fn copy(&self, offset: u64, to: &Handle, to_offset: u64, len: usize) -> Result<usize> {
        let (mut from, mut into) = (offset, to_offset);
        Ok(fs::copy_file_range(
            &self.fd,
            Some(&mut from),
            &to.fd,
            Some(&mut into),
            len,
        )?)
    }
}
