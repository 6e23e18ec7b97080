//! Files that take what a guest writes to a serial port or the debug console.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pyrite_devices::uart::SerialBackend;

/// A file, named pipe or terminal. Nothing waits for it: what it does not take at once is lost,
/// and the loss is reported.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    file: File,
    lost: u64,
    failed: bool,
}

impl OutputFile {
    /// Opens `path`; a regular file is emptied, or made. The error says what to do about it.
    pub fn open(path: &Path) -> Result<OutputFile, String> {
        let file = open(path, true)?;
        Ok(OutputFile {
            path: path.to_owned(),
            file,
            lost: 0,
            failed: false,
        })
    }
}

fn open(path: &Path, make: bool) -> Result<File, String> {
    File::options()
        .write(true)
        .create(make)
        .truncate(make)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENXIO) => "nobody reads from this pipe; start its reader first".to_owned(),
            _ => e.to_string(),
        })
}

/// Whether `path` could be opened, without making or changing it.
pub fn check(path: &Path) -> Result<(), String> {
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => Err("is a directory; expected a file for output".into()),
        Ok(m) if m.file_type().is_block_device() => {
            Err("is a block device; expected a file for output".into())
        }
        Ok(m) if m.file_type().is_socket() => Err("is a socket; expected a file for output".into()),
        // A pipe would tell its reader that the writer has come and gone.
        Ok(m) if m.file_type().is_fifo() => Ok(()),
        Ok(_) => open(path, false).map(drop),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let dir = path.parent().filter(|p| !p.as_os_str().is_empty());
            match dir {
                Some(dir) if !dir.is_dir() => Err(format!("{} is no directory", dir.display())),
                _ => Ok(()),
            }
        }
        Err(e) => Err(e.to_string()),
    }
}

impl SerialBackend for OutputFile {
    fn write(&mut self, mut data: &[u8]) {
        while !data.is_empty() && !self.failed {
            match self.file.write(data) {
                Ok(n @ 1..) => data = data.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if self.lost == 0 {
                        tracing::warn!("{} is full; output is lost", self.path.display());
                    }
                    self.lost += data.len() as u64;
                    return;
                }
                end => {
                    let why = end
                        .err()
                        .map_or("takes nothing more".into(), |e| e.to_string());
                    tracing::warn!("{}: {why}; no more is written to it", self.path.display());
                    self.failed = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let name = format!("pyrite-output-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn output_replaces_what_the_file_held() {
        let dir = Dir::new("file");
        let path = dir.0.join("f");
        check(&path).unwrap();
        assert!(!path.exists(), "checking makes nothing");
        std::fs::write(&path, "old and longer").unwrap();
        check(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old and longer");
        let mut f = OutputFile::open(&path).unwrap();
        f.write(b"new");
        f.write(b"er");
        assert_eq!(std::fs::read(&path).unwrap(), b"newer");
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let dir = Dir::new("refused");
        assert!(check(&dir.0).unwrap_err().contains("directory"));
        let gone = dir.0.join("no").join("f");
        assert!(check(&gone).unwrap_err().contains("is no directory"));
        assert!(OutputFile::open(&gone).is_err());
    }

    #[test]
    fn a_full_device_ends_the_output_not_the_guest() {
        let mut f = OutputFile::open(Path::new("/dev/full")).unwrap();
        f.write(b"x");
        assert!(f.failed);
        f.write(b"y");
    }
}
