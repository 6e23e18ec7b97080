//! The types that operations on a folder take and give.

use super::Stat;
use rustix::fs::{Timespec, UTIME_NOW, UTIME_OMIT};

use crate::{Errno, Result};

/// LIMIT: bytes of a name, as Linux has it.
const MAX_NAME_BYTES: usize = 255;

/// One component of a path: not empty, without slash and NUL, neither `.` nor `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// Checks a name that the guest gave.
    pub fn new(name: &'a [u8]) -> Result<Name<'a>> {
        if name.len() > MAX_NAME_BYTES {
            return Err(Errno(libc::ENAMETOOLONG));
        }
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|b| matches!(b, b'/' | 0)) {
            return Err(Errno(libc::EINVAL));
        }
        Ok(Name(name))
    }

    pub(super) fn bytes(self) -> &'a [u8] {
        self.0
    }
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A pipe, socket or device: there, but never opened. The file type bits of its mode.
    Other(u32),
}

impl Kind {
    /// From a mode.
    pub fn of(mode: u32) -> Kind {
        match mode & libc::S_IFMT {
            libc::S_IFREG => Kind::File,
            libc::S_IFDIR => Kind::Directory,
            libc::S_IFLNK => Kind::Symlink,
            other => Kind::Other(other),
        }
    }
    /// The file type bits of a mode.
    pub fn bits(self) -> u32 {
        match self {
            Kind::File => libc::S_IFREG,
            Kind::Directory => libc::S_IFDIR,
            Kind::Symlink => libc::S_IFLNK,
            Kind::Other(bits) => bits,
        }
    }
}

/// The guest's user in whose name something is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Who {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Attributes. Times are seconds since 1970 and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// See [`super::Node::id`].
    pub id: u64,
    /// File type and permissions.
    pub mode: u32,
    /// Names.
    pub links: u64,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a device: which.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Preferred bytes of a transfer.
    pub block_bytes: u32,
    /// Room taken, in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: (i64, u32),
    /// Last change of the contents.
    pub mtime: (i64, u32),
    /// Last change of the attributes.
    pub ctime: (i64, u32),
}

impl Attr {
    pub(super) fn of(s: &Stat, id: u64) -> Attr {
        Attr {
            id,
            mode: s.st_mode,
            links: s.st_nlink,
            uid: s.st_uid,
            gid: s.st_gid,
            rdev: s.st_rdev,
            size: s.st_size as u64,
            block_bytes: u32::try_from(s.st_blksize).unwrap_or(4096),
            blocks: s.st_blocks as u64,
            atime: (s.st_atime, s.st_atime_nsec as u32),
            mtime: (s.st_mtime, s.st_mtime_nsec as u32),
            ctime: (s.st_ctime, s.st_ctime_nsec as u32),
        }
    }
}

/// A time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's time.
    Now,
    /// Seconds since 1970 and nanoseconds.
    At(i64, u32),
}

impl SetTime {
    pub(super) fn spec(time: Option<SetTime>) -> Result<Timespec> {
        let (tv_sec, tv_nsec) = match time {
            None => (0, UTIME_OMIT),
            Some(SetTime::Now) => (0, UTIME_NOW),
            // Beyond a second there are numbers with a meaning of their own.
            Some(SetTime::At(_, ns)) if ns >= 1_000_000_000 => return Err(Errno(libc::EINVAL)),
            Some(SetTime::At(s, ns)) => (s, i64::from(ns)),
        };
        Ok(Timespec { tv_sec, tv_nsec })
    }
}

/// Attributes to be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permissions.
    pub mode: Option<u32>,
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change.
    pub mtime: Option<SetTime>,
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its name; `.` and `..` are among them.
    pub name: &'a [u8],
    /// See [`super::Node::id`].
    pub id: u64,
    /// The file type bits of its mode; 0 if the file system does not say.
    pub file_type: u32,
    /// Position after it.
    pub next: u64,
}

/// Numbers of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Blocks in all.
    pub blocks: u64,
    /// Free ones.
    pub free: u64,
    /// Free ones for users other than root.
    pub available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free ones.
    pub files_free: u64,
    /// Longest name in bytes.
    pub name_bytes: u64,
}
