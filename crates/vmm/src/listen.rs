//! Sockets on which the VM process listens for people and programs of the host.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Listens at a path, for its owner only. The socket of a program that is gone is replaced, anything
/// else there is not.
pub(crate) fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let taken = |what: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, what));
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            return taken("is there already and is not a socket; name another path");
        }
        if UnixStream::connect(path).is_ok() {
            return taken("is in use by another program; name another path");
        }
        fs::remove_file(path)?;
    }
    // Made where nobody else can reach it, and moved when its permissions are right.
    let dir = path.with_added_extension(format!("{}.tmp", std::process::id()));
    fs::create_dir(&dir)?;
    let made = (|| {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        let inside = dir.join("s");
        let listener = UnixListener::bind(&inside)?;
        fs::set_permissions(&inside, fs::Permissions::from_mode(0o600))?;
        fs::rename(&inside, path)?;
        Ok(listener)
    })();
    let _ = fs::remove_dir_all(&dir);
    made
}

/// A connection.
pub enum Stream {
    /// To a Unix socket.
    Unix(UnixStream),
    /// To a port.
    Tcp(TcpStream),
}

impl Stream {
    /// The same connection once more.
    pub fn try_clone(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Unix(s) => Stream::Unix(s.try_clone()?),
            Stream::Tcp(s) => Stream::Tcp(s.try_clone()?),
        })
    }
    /// How long a read may take.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_read_timeout(limit),
            Stream::Tcp(s) => s.set_read_timeout(limit),
        }
    }
    /// How long a write may take; small ones go at once.
    pub fn set_write_timeout(&self, limit: Duration) -> io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_write_timeout(Some(limit)),
            Stream::Tcp(s) => {
                s.set_nodelay(true)?;
                s.set_write_timeout(Some(limit))
            }
        }
    }
    /// Ends it, for all that have it.
    pub fn close(&self) {
        let _ = match self {
            Stream::Unix(s) => s.shutdown(Shutdown::Both),
            Stream::Tcp(s) => s.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buffer),
            Stream::Tcp(s) => s.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(bytes),
            Stream::Tcp(s) => s.write(bytes),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
