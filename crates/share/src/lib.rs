//! Back ends of shared folders: one file system core, two protocols in front of it.
//!
//! ```text
//! 9P2000.L message ─▶ p9::Server   ─┐
//!                                    ├─▶ folder::Folder ─▶ the host's kernel
//! FUSE message     ─▶ fuse::Server ─┘
//! ```
//!
//! [`Folder`] is what the guest may reach and nothing else: every object is a descriptor opened
//! with `O_PATH`, every new one is opened by a single name below a directory that is known
//! already, with `openat2` told not to leave it. Names have no slash and are not `..`, symbolic
//! links are never followed (the guest does that, in its own tree), and what is not a file or a
//! directory is never opened. The servers hold the guest's numbers (fids, node ids, handles) and
//! take messages apart; they make no system calls themselves.
//!
//! Messages are the guest's, so hostile: they are parsed from a copy, everything has a limit, and
//! an error is a number of `errno.h` in the reply, as the protocols have it.
//!
//! No function here starts a thread. A server is called with one message at a time; a call lasts
//! as long as the host's file system takes.
#![deny(unsafe_code)]

pub mod folder;
pub mod fuse;
mod locks;
pub mod p9;
#[cfg(test)]
mod testing;
mod wire;

pub use folder::{Folder, FolderConfig, Owner};

/// An error number, as in `errno.h` of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl From<rustix::io::Errno> for Errno {
    fn from(e: rustix::io::Errno) -> Errno {
        Errno(e.raw_os_error())
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}

/// What an operation comes to.
pub type Result<T> = std::result::Result<T, Errno>;

/// Why the saved state of a server cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RestoreError(pub String);

/// A protocol in front of a [`Folder`].
pub trait FileServer: Send {
    /// Answers one message. The reply is appended to `reply` and has at most `room` bytes;
    /// nothing is appended to a message without a reply. May block.
    fn handle(&mut self, message: &[u8], room: usize, reply: &mut Vec<u8>);
    /// Forgets everything that the guest has open.
    fn reset(&mut self);
    /// What the guest has open, by path: see [`Folder`].
    fn save(&self) -> Vec<u8>;
    /// Opens again what was saved. What is not there any more is stale: the guest reads ESTALE.
    fn restore(&mut self, saved: &[u8]) -> std::result::Result<(), RestoreError>;
    /// Objects that the guest knows, and open files among them.
    fn counts(&self) -> (usize, usize);
}

/// Lets this process open as many files as the host allows it, and says how many that is. What a
/// guest knows of a folder is a descriptor each.
pub fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Lowering nothing, this cannot fail for lack of rights.
    let _ = setrlimit(Resource::Nofile, raised);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
