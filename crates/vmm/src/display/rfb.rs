//! The VNC server: the screen and input of a machine for viewers elsewhere.
//!
//! The Remote Framebuffer Protocol, version 3.8 (RFC 6143), older clients too, with the extensions
//! that viewers use: ZRLE, resize, extended key events. A viewer may speak WebSocket on the same
//! port. Where a section of "the RFB protocol" is named, that is the community's version of the
//! text (rfbproto), which registers the extensions.
//!
//! What a client sends is hostile: every message has a limit ([`messages`]), a client that is slow
//! to read is dropped, and there are at most [`CLIENTS`]. Each client has two threads, one that
//! reads and one that writes; nothing of the VM waits for them.
//!
//! - [`wire`]: bytes to and from a client, plain or in WebSocket frames.
//! - [`handshake`]: version, security, first sizes.
//! - [`messages`]: what clients say.
//! - [`pixels`]: pixel formats.
//! - [`zrle`]: the compressed encoding.
//! - [`session`]: one client after the handshake.
//! - [`testing`]: a viewer for tests.

mod handshake;
mod messages;
mod pixels;
mod session;
pub mod testing;
#[cfg(test)]
mod tests;
mod wire;
mod zrle;

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyrite_api::v1::VncListen;

use super::Screen;
use super::input::Input;
use wire::Stream;

/// LIMIT: clients at a time.
pub const CLIENTS: usize = 8;
/// A VNC password has this many characters; what follows is ignored. RFC 6143 §7.2.2.
const PASSWORD_BYTES: usize = 8;
/// LIMIT: bytes of a password file that are looked at.
const PASSWORD_FILE_BYTES: u64 = 4096;

/// What clients see and do.
pub struct Shared {
    /// The screen.
    pub screen: Arc<Screen>,
    /// Keyboard and mouse.
    pub input: Input,
    /// Shown by viewers as the title.
    pub name: String,
    /// Asked for, if there is one.
    password: Option<[u8; PASSWORD_BYTES]>,
    clients: AtomicUsize,
}

enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// A server that listens. Its socket's file goes away with it.
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
}

/// The first line of a password file.
pub fn read_password(path: &Path) -> Result<String, String> {
    use io::Read;
    let bad = |e: io::Error| format!("{}: {e}", path.display());
    let mut bytes = Vec::new();
    fs::File::open(path)
        .map_err(bad)?
        .take(PASSWORD_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(bad)?;
    let text = String::from_utf8_lossy(&bytes);
    match text.lines().next().map(str::trim_end) {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => Err(format!(
            "{}: the first line is empty; expected a password",
            path.display()
        )),
    }
}

impl Server {
    /// Listens; clients wait until [`Server::serve`].
    pub fn listen(
        at: &VncListen,
        screen: Arc<Screen>,
        input: Input,
        name: &str,
        password: Option<&str>,
    ) -> io::Result<Server> {
        let listener = match at {
            VncListen::Unix(path) => Listener::Unix(crate::socket::listen(path)?, path.clone()),
            VncListen::Tcp(address) => Listener::Tcp(TcpListener::bind(address)?),
        };
        let password = password.map(|p| {
            let mut key = [0; PASSWORD_BYTES];
            key.iter_mut().zip(p.bytes()).for_each(|(k, b)| *k = b);
            key
        });
        Ok(Server {
            listener,
            shared: Arc::new(Shared {
                screen,
                input,
                name: name.to_owned(),
                password,
                clients: AtomicUsize::new(0),
            }),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        match &self.listener {
            Listener::Unix(_, path) => path.display().to_string(),
            Listener::Tcp(l) => l
                .local_addr()
                .map_or_else(|e| e.to_string(), |a| a.to_string()),
        }
    }

    /// The number of clients now.
    pub fn clients(&self) -> usize {
        self.shared.clients.load(Ordering::Acquire)
    }

    /// Takes clients from now on, on threads of its own.
    pub fn serve(&self) -> io::Result<()> {
        let listener = match &self.listener {
            Listener::Unix(l, path) => Listener::Unix(l.try_clone()?, path.clone()),
            Listener::Tcp(l) => Listener::Tcp(l.try_clone()?),
        };
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("vnc".into())
            .spawn(move || {
                loop {
                    let stream = match &listener {
                        Listener::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
                        Listener::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
                    };
                    match stream {
                        Ok(s) => take(&shared, s),
                        // Out of descriptors, for instance: others may end meanwhile.
                        Err(e) => {
                            tracing::warn!("VNC: {e}");
                            std::thread::sleep(std::time::Duration::from_millis(200));
                        }
                    }
                }
            })?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = &self.listener {
            let _ = fs::remove_file(path);
        }
    }
}

/// Counts a client as long as it is there.
struct Seat(Arc<Shared>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn take(shared: &Arc<Shared>, stream: Stream) {
    if shared.clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS {
        shared.clients.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!("VNC: a client is turned away, {CLIENTS} are there");
        return;
    }
    let seat = Seat(Arc::clone(shared));
    let started = std::thread::Builder::new()
        .name("vnc-client".into())
        .spawn(move || {
            if let Err(e) = session::run(&seat.0, stream) {
                tracing::info!("VNC: {e}");
            }
        });
    if let Err(e) = started {
        tracing::warn!("VNC: {e}");
    }
}
