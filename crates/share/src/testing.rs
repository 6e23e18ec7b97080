//! A folder beside something that the guest must not reach, and hostile input.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::folder::{Folder, FolderConfig, Owner};

/// A temporary directory with `shared` and, beside it, `secret`. It goes away when dropped.
pub(crate) struct Ground(pub(crate) PathBuf);

impl Ground {
    pub(crate) fn new() -> Ground {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("pyrite-share-{}-{n}", std::process::id()));
        std::fs::create_dir_all(dir.join("shared/dir")).unwrap();
        std::fs::create_dir(dir.join("secret")).unwrap();
        std::fs::write(dir.join("secret/file"), "secret").unwrap();
        std::fs::write(dir.join("shared/file"), "hello").unwrap();
        symlink("../../secret", dir.join("shared/dir/way-out")).unwrap();
        symlink(dir.join("secret"), dir.join("shared/absolute")).unwrap();
        Ground(dir)
    }

    /// A path in the shared folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join("shared").join(name)
    }

    pub(crate) fn config(&self) -> FolderConfig {
        FolderConfig {
            path: self.0.join("shared"),
            read_only: false,
            owner: Owner::Squash,
            max_descriptors: 200,
        }
    }

    pub(crate) fn folder(&self) -> Arc<Folder> {
        Arc::new(Folder::open(&self.config()).unwrap())
    }

    pub(crate) fn read_only(&self) -> Arc<Folder> {
        let config = FolderConfig {
            read_only: true,
            ..self.config()
        };
        Arc::new(Folder::open(&config).unwrap())
    }

    /// Nothing outside the folder was changed, added or removed.
    pub(crate) fn check(&self) {
        assert_eq!(names(&self.0), ["secret", "shared"]);
        assert_eq!(names(&self.0.join("secret")), ["file"]);
        let secret = self.0.join("secret/file");
        assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
        let meta = std::fs::metadata(&secret).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!((meta.nlink(), meta.mode() & 0o7000), (1, 0));
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let all = std::fs::read_dir(dir).unwrap();
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
    let mut all: Vec<String> = all
        .map(|e| name(e).to_string_lossy().into_owned())
        .collect();
    all.sort();
    all
}

/// Pseudo-random numbers, the same every time. xorshift64.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// Changes some bytes of a message, or its length.
    pub(crate) fn spoil(&mut self, message: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            let at = self.below(message.len());
            message[at] = match self.below(4) {
                0 => 0xff,
                1 => 0,
                2 => message[at].wrapping_add(1),
                _ => self.next() as u8,
            };
        }
        match self.below(8) {
            0 => message.truncate(self.below(message.len()) + 1),
            1 => message.extend([self.next() as u8; 9]),
            _ => {}
        }
    }
}
