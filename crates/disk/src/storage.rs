//! What an image format stores its bytes in: a file or block device of the host.
//!
//! Formats reach the host only through [`Storage`], so that tests can put a recording or failing
//! store in its place and cut the power between any two writes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::io::{is_unsupported, next_extent, punch};
use crate::raw::OpenError;

pub use crate::io::Punch;

/// Zeroes are written in pieces of this many bytes where the file system cannot zero a range.
const ZERO_PIECE: usize = 256 << 10;

/// Bytes at offsets. All methods may be called from several threads; concurrent writes to the
/// same bytes leave some mix. What was written is durable once a later [`sync`](Storage::sync)
/// has returned.
pub trait Storage: Send + Sync {
    /// The file for transfers to and from guest memory without a copy, if it is one.
    fn file(&self) -> Option<&File>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// True if there are no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills `buf`; bytes beyond the end are zeroes.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `buf`, extending the store if need be.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Cuts or extends with zeroes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable.
    fn sync(&self) -> io::Result<()>;
    /// Zeroes a range within the length without writing it. False if that cannot be done here.
    fn punch(&self, how: Punch, offset: u64, len: u64) -> io::Result<bool>;
    /// Whether there is data at `offset`, and where that changes (at most the length). A store
    /// that cannot tell says it is all data.
    fn extent_at(&self, offset: u64) -> io::Result<(bool, u64)> {
        let _ = offset;
        Ok((true, self.len()?))
    }
}

/// Makes a range read as zeroes, by writing them if there is no other way.
pub(crate) fn write_zeroes(
    storage: &dyn Storage,
    may_unmap: bool,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    if len == 0
        || (may_unmap && storage.punch(Punch::Hole, offset, len)?)
        || storage.punch(Punch::Zero, offset, len)?
    {
        return Ok(());
    }
    let zeroes = vec![0; ZERO_PIECE.min(len as usize)];
    let mut at = offset;
    let end = offset + len;
    while at < end {
        let n = (end - at).min(zeroes.len() as u64) as usize;
        storage.write_at(at, &zeroes[..n])?;
        at += n as u64;
    }
    Ok(())
}

/// A locked file or block device.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    path: PathBuf,
    block_device: bool,
    /// The file has said that it cannot punch holes: not asked again.
    no_holes: AtomicBool,
    /// As above, for zeroing a range.
    no_zero_range: AtomicBool,
    /// The host could not make something durable.
    sync_failed: AtomicBool,
}

impl HostFile {
    /// Opens and locks: exclusively, or shared with other readers if `read_only`.
    pub fn open(path: &Path, read_only: bool) -> Result<HostFile, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|source| OpenError::Open {
                path: path.into(),
                source,
            })?;
        HostFile::from_file(file, path, read_only)
    }

    /// Creates a file that must not exist yet, unless `overwrite`.
    pub fn create(path: &Path, overwrite: bool) -> Result<HostFile, OpenError> {
        let failed = |source| OpenError::Open {
            path: path.into(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if overwrite {
            options.create(true).truncate(false);
        } else {
            options.create_new(true);
        }
        let host = HostFile::from_file(options.open(path).map_err(failed)?, path, false)?;
        if overwrite && !host.block_device {
            // Only after the lock: nobody else's image is cut.
            host.file.set_len(0).map_err(failed)?;
        }
        Ok(host)
    }

    /// Takes an open file, which must permit writing unless `read_only`. `name` is for messages.
    pub fn from_file(file: File, name: &Path, read_only: bool) -> Result<HostFile, OpenError> {
        let path = || name.to_path_buf();
        let open = |source| OpenError::Open {
            path: path(),
            source,
        };
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path() });
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path: path() }),
            // File systems without locks: refusing them would refuse network shares.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!("disk {}: the file system has no locks", name.display());
            }
            Err(TryLockError::Error(source)) => return Err(open(source)),
        }
        Ok(HostFile {
            file,
            path: path(),
            block_device: kind.is_block_device(),
            no_holes: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            sync_failed: AtomicBool::new(false),
        })
    }

    /// The name it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes a file durable unless that has failed before: after an error Linux may drop what it could
/// not write and report success the next time (fsync(2)), so nothing that the file says of
/// durability can be believed any more.
fn sync_once(failed: &AtomicBool, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    if failed.load(Ordering::Acquire) {
        return Err(io::Error::other(
            "the host has failed to write this file before and may have lost what was written; \
             stop the VM and check the image",
        ));
    }
    sync().inspect_err(|_| failed.store(true, Ordering::Release))
}

impl Storage for HostFile {
    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn len(&self) -> io::Result<u64> {
        if self.block_device {
            // The length in the metadata of a block device is zero.
            (&self.file).seek(SeekFrom::End(0))
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.block_device {
            let have = self.len()?;
            return if len <= have {
                Ok(())
            } else {
                Err(io::ErrorKind::StorageFull.into())
            };
        }
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        sync_once(&self.sync_failed, || self.file.sync_data())
    }

    fn punch(&self, how: Punch, offset: u64, len: u64) -> io::Result<bool> {
        let refused = match how {
            Punch::Hole => &self.no_holes,
            Punch::Zero => &self.no_zero_range,
        };
        if refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match punch(&self.file, how, offset, len) {
            Ok(()) => Ok(true),
            Err(e) if is_unsupported(&e) => {
                refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    fn extent_at(&self, offset: u64) -> io::Result<(bool, u64)> {
        let len = self.len()?;
        if self.block_device || offset >= len {
            return Ok((true, len));
        }
        Ok(next_extent(&self.file, offset)?.unwrap_or((true, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_sync_is_not_forgotten() {
        let failed = AtomicBool::new(false);
        assert!(sync_once(&failed, || Ok(())).is_ok());
        let first = sync_once(&failed, || Err(io::Error::from_raw_os_error(libc::EIO)));
        assert_eq!(first.unwrap_err().raw_os_error(), Some(libc::EIO));
        let second = sync_once(&failed, || Ok(()));
        assert!(second.unwrap_err().to_string().contains("may have lost"));
    }
}
