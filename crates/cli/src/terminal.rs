//! The terminal in raw mode, and back on every way out.

// UNSAFETY: termios and window-size calls on descriptor 0 with local structures.
#![allow(
    unsafe_code,
    reason = "termios has no safe interface in the standard library"
)]

use std::io::IsTerminal;
use std::sync::Mutex;

/// The settings to go back to, while the terminal is raw. Global because a panic hook and the
/// guard must agree on who restores, and there is one terminal per process.
static COOKED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Standard input as a raw terminal; cooked again when dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw if it is a terminal and this process may use it now.
    pub fn enter() -> Option<RawTerminal> {
        if !std::io::stdin().is_terminal() || !in_foreground() {
            return None;
        }
        // SAFETY: termios is plain data; all-zero is a value of it.
        let mut t: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: descriptor 0 is open (it is a terminal) and `t` is a valid place.
        if unsafe { libc::tcgetattr(0, &raw mut t) } != 0 {
            return None;
        }
        *COOKED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(t);
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            hook(info);
        }));
        set_raw(t);
        Some(RawTerminal(()))
    }

    /// Raw again, after the process was stopped and went on.
    pub fn again(&self) {
        let cooked = *COOKED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(t) = cooked {
            set_raw(t);
        }
    }

    /// Cooked for a while, before the process stops.
    pub fn suspend(&self) {
        let cooked = *COOKED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(t) = cooked {
            set(&t);
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// A background job must not touch the terminal: it would be stopped for it.
fn in_foreground() -> bool {
    // SAFETY: both calls take no pointers.
    unsafe { libc::tcgetpgrp(0) == libc::getpgrp() }
}

fn set(t: &libc::termios) {
    // SAFETY: descriptor 0 and a valid structure; failure leaves the terminal as it is.
    unsafe { libc::tcsetattr(0, libc::TCSANOW, t) };
}

fn set_raw(cooked: libc::termios) {
    let mut raw = cooked;
    // SAFETY: changes only the structure.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    set(&raw);
}

/// Puts the terminal back, once.
pub fn restore() {
    let cooked = COOKED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .take();
    if let Some(t) = cooked {
        set(&t);
    }
}

/// Columns and rows of the terminal.
pub fn size() -> Option<(u16, u16)> {
    // SAFETY: winsize is plain data.
    let mut w: libc::winsize = unsafe { std::mem::zeroed() };
    for fd in [1, 0] {
        // SAFETY: TIOCGWINSZ writes one winsize; a descriptor that is no terminal fails.
        let done = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut w) };
        if done == 0 && w.ws_col > 0 && w.ws_row > 0 {
            return Some((w.ws_col, w.ws_row));
        }
    }
    None
}
