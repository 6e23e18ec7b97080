//! Memory with a descriptor, in large pages where the host can be got to give them.
//!
//! A memfd has pages of 4 KiB unless the administrator changed the policy for all shared memory
//! (`shmem_enabled`), which distributions do not. A tmpfs has a policy of its own (its option
//! `huge`), and an ordinary user may mount one in a user namespace. So a child process makes
//! namespaces, mounts a tmpfs that nobody else ever sees, opens one file in it that has no name, and
//! ends; the file, which is all that is left, keeps the file system alive. Where that is not allowed
//! there is a memfd.
//!
//! Large pages matter twice: translated code of a large program lies in thousands of small pages,
//! more than processors remember, and so does guest RAM. tmpfs(5), user_namespaces(7).

use std::ffi::CStr;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What is smaller has no large page, and is not worth a process.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Memory that can be mapped more than once.
#[derive(Debug)]
pub struct SharedMemory {
    /// The descriptor. Close-on-exec.
    pub fd: OwnedFd,
    /// The host gives pages of 2 MiB to mappings that ask by `MADV_HUGEPAGE`.
    pub large_pages: bool,
}

impl SharedMemory {
    /// Zeroed memory of a size in bytes. `name` is what the host shows of it if it has small pages.
    /// Pages are taken from the host when first touched.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(name: &CStr, size_bytes: u64) -> Result<SharedMemory> {
        let in_tmpfs = if size_bytes < LARGE_PAGE_BYTES {
            None
        } else {
            in_own_tmpfs().ok()
        };
        let (fd, large_pages) = match in_tmpfs {
            Some(fd) => (fd, true),
            None => (memfd(name)?, false),
        };
        let len =
            libc::off_t::try_from(size_bytes).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
        // SAFETY: plain system call on an owned descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), len) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(SharedMemory { fd, large_pages })
    }

    /// Maps all of it, asking for large pages if there are any.
    ///
    /// # Errors
    /// What the host says.
    pub fn map(&self, size_bytes: usize, protection: i32) -> Result<*mut u8> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_bytes,
                protection,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                self.fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        // SAFETY: the range was just mapped. Advice may be ignored.
        unsafe { libc::madvise(base, size_bytes, libc::MADV_HUGEPAGE) };
        Ok(base.cast())
    }
}

fn memfd(name: &CStr) -> Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated.
    let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if raw < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// "ID ID 1" for a file that maps identities of a user namespace.
fn id_map(id: u32) -> String {
    format!("{id} {id} 1")
}

/// An unnamed file in a tmpfs with large pages that has no other file.
fn in_own_tmpfs() -> Result<OwnedFd> {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: fresh descriptors that nobody else owns.
    let [from_child, to_parent] = pipe.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: plain system calls.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let (uid_map, gid_map) = (id_map(uid), id_map(gid));
    // The child shares the table of descriptors, so what it opens is open here; it has a copy of
    // the memory. No signal announces its end.
    // SAFETY: the child does nothing but system calls, which is all that may be done in a copy of a
    // process with threads, and ends without returning.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) };
    if child < 0 {
        return Err(Error::last_os_error());
    }
    if child == 0 {
        let answer = open_in_namespaces(uid_map.as_bytes(), gid_map.as_bytes());
        // SAFETY: writes from a local; ends the child.
        unsafe {
            libc::write(to_parent.as_raw_fd(), (&raw const answer).cast(), 4);
            libc::_exit(0);
        }
    }
    // The child needs its end of the pipe, which is also ours, until it has ended: a signal must not
    // cut the wait short.
    // SAFETY: waits for the child just made.
    while unsafe { libc::waitpid(child as i32, std::ptr::null_mut(), libc::__WALL) } < 0
        && Error::last_os_error().kind() == ErrorKind::Interrupted
    {}
    drop(to_parent);
    let mut answer = -1i32;
    // SAFETY: reads into a local of that size.
    let n = unsafe { libc::read(from_child.as_raw_fd(), (&raw mut answer).cast(), 4) };
    if n != 4 || answer < 0 {
        let code = if n == 4 {
            answer.wrapping_neg()
        } else {
            libc::EIO
        };
        return Err(Error::from_raw_os_error(code));
    }
    // SAFETY: the child opened it in our table and knew no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// A descriptor, or an error number made negative. Only system calls: see [`in_own_tmpfs`].
fn open_in_namespaces(uid_map: &[u8], gid_map: &[u8]) -> i32 {
    /// Commands of fsconfig(2) and a flag of fsopen(2) and fsmount(2), `linux/mount.h`.
    const SET_STRING: i32 = 1;
    const CREATE: i32 = 6;
    const CLOEXEC: i32 = 1;
    /// MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV.
    const ATTRIBUTES: i32 = 2 | 4;
    // SAFETY: constant strings with a NUL; nothing is written to memory.
    unsafe {
        // SAFETY (errno): set by the system call that failed just before.
        let failed = || -(*libc::__errno_location());
        if libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) != 0 {
            return failed();
        }
        let write = |path: &CStr, text: &[u8]| {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            let n = libc::write(fd, text.as_ptr().cast(), text.len());
            libc::close(fd);
            n == text.len() as isize
        };
        if !write(c"/proc/self/uid_map", uid_map)
            || !write(c"/proc/self/setgroups", b"deny")
            || !write(c"/proc/self/gid_map", gid_map)
        {
            return -libc::EPERM;
        }
        let fs = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) as i32;
        if fs < 0 {
            return failed();
        }
        // No limits: the file's size is the caller's affair.
        for (key, value) in [(c"huge", c"advise"), (c"size", c"0"), (c"nr_inodes", c"0")] {
            let (key, value) = (key.as_ptr(), value.as_ptr());
            if libc::syscall(libc::SYS_fsconfig, fs, SET_STRING, key, value, 0) != 0 {
                let e = failed();
                libc::close(fs);
                return e;
            }
        }
        let null = std::ptr::null::<u8>();
        let made = libc::syscall(libc::SYS_fsconfig, fs, CREATE, null, null, 0) == 0;
        let mount = if made {
            libc::syscall(libc::SYS_fsmount, fs, CLOEXEC, ATTRIBUTES) as i32
        } else {
            -1
        };
        let mut answer = failed();
        libc::close(fs);
        if mount >= 0 {
            let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
            let file = libc::openat(mount, c".".as_ptr(), flags, 0o600);
            answer = if file < 0 { failed() } else { file };
            libc::close(mount);
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_seen_through_both_mappings() {
        let size = 4 << 20;
        let m = SharedMemory::new(c"test", size as u64).expect("memory");
        let a = m
            .map(size, libc::PROT_READ | libc::PROT_WRITE)
            .expect("mapped");
        let b = m
            .map(size, libc::PROT_READ | libc::PROT_EXEC)
            .expect("mapped");
        // SAFETY: inside the mappings just made.
        unsafe {
            a.add(123_456).write_volatile(7);
            assert_eq!(b.add(123_456).read_volatile(), 7);
            assert_eq!(b.add(size - 1).read_volatile(), 0);
            libc::munmap(a.cast(), size);
            libc::munmap(b.cast(), size);
        }
    }

    #[test]
    fn the_child_leaves_nothing_behind_and_no_file_is_left_open_twice() {
        let open = || std::fs::read_dir("/proc/self/fd").expect("list").count();
        let before = open();
        let all: Vec<_> = (0..10)
            .map(|_| SharedMemory::new(c"test", LARGE_PAGE_BYTES).expect("memory"))
            .collect();
        drop(all);
        // Other tests of this process may open something meanwhile, but not as many.
        assert!(open() < before + 10);
        // SAFETY: asks for any child; there is none.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
        assert!(pid <= 0);
    }
}
