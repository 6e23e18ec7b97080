//! Unix sockets that only their owner can connect to.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens at `path`. A socket that nobody listens on any more is replaced.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
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
