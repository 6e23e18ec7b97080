//! Signals as a stream of numbers, read by a thread, instead of handlers.

// UNSAFETY: the signal mask and signalfd, with local structures.
#![allow(
    unsafe_code,
    reason = "signal masks have no safe interface in the standard library"
)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};

/// What the front process listens to.
const WATCHED: [libc::c_int; 7] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGWINCH,
    libc::SIGTSTP,
    libc::SIGCONT,
];

/// The watched signals.
#[derive(Debug)]
pub struct Signals(File);

impl Signals {
    /// Takes the signals over. Called before threads are made: they inherit the mask.
    pub fn watch() -> std::io::Result<Signals> {
        // SAFETY: sigset_t is plain data, initialised by sigemptyset.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: a valid place.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in WATCHED {
            // SAFETY: a valid set and signal number.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: a valid set; the old mask is not wanted.
        let e =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if e != 0 {
            return Err(std::io::Error::from_raw_os_error(e));
        }
        // SAFETY: a valid set; -1 makes a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Signals(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Waits for the next one.
    pub fn next(&mut self) -> std::io::Result<libc::c_int> {
        // signalfd_siginfo begins with ssi_signo.
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info)?;
        let number = info
            .first_chunk::<4>()
            .map_or(0, |b| u32::from_ne_bytes(*b));
        Ok(libc::c_int::try_from(number).unwrap_or(0))
    }
}

/// Stops this process as an uncaught SIGTSTP would; returns when it goes on.
pub fn stop_self() {
    // SAFETY: no pointers.
    unsafe { libc::raise(libc::SIGSTOP) };
}
