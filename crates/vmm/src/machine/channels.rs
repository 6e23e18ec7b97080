//! Ports of the guest as Unix sockets of the host, one client at a time.
//!
//! What the guest writes while nobody is connected is dropped; while a client is slow, the guest
//! waits. What a client writes waits until the guest has opened the port; if the client leaves
//! before that, it goes with it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use pyrite_api::v1::VmSpec;
use pyrite_vdev::bus::lock;
use pyrite_virtio::{Console as VirtioConsole, PortBackend, PortConfig, PortSink};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{AssemblyError, Slots, host, input};

/// LIMIT: bytes from the guest that wait for the client.
const OUTPUT_BYTES: usize = 64 << 10;
/// Bytes taken from a client at a time.
const INPUT_BYTES: usize = 4096;
/// How often a guest that takes nothing is asked again: after a pause it may not call.
const RECHECK: Duration = Duration::from_millis(100);

/// Plugs the device with the channels of a specification into a slot.
pub(super) fn plug(spec: &VmSpec, slots: &mut Slots<'_>) -> Result<(), AssemblyError> {
    let mut ports = Vec::new();
    for (n, c) in spec.channels.iter().enumerate() {
        let listener = crate::socket::listen(&c.path).map_err(|e| {
            let problem = format!("cannot listen on {}: {e}", c.path.display());
            input(format!("channels[{n}]"), problem)
        })?;
        let channel = Channel::start(listener, c.path.clone())
            .map_err(|e| host("the threads of a channel")(e.into()))?;
        ports.push(PortConfig {
            name: c.name.clone(),
            console: false,
            backend: Arc::new(channel),
        });
    }
    if ports.is_empty() {
        return Ok(());
    }
    slots.plug("virtio-serial0", Box::new(VirtioConsole::new(ports)))
}

#[derive(Default)]
struct State {
    client: Option<Arc<UnixStream>>,
    /// From the guest.
    output: VecDeque<u8>,
    /// The guest has more, for which there was no room.
    guest_waits: bool,
    guest_open: bool,
    /// Counts calls of the guest's side.
    ticks: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    guest: OnceLock<Arc<dyn PortSink>>,
}

/// The host's end of a port. Its threads last as long as the process.
struct Channel {
    shared: Arc<Shared>,
    path: PathBuf,
}

impl Channel {
    fn start(listener: UnixListener, path: PathBuf) -> io::Result<Channel> {
        let shared: Arc<Shared> = Arc::default();
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into());
            thread.spawn(body).map(drop)
        };
        let s = Arc::clone(&shared);
        spawn("channel-in", Box::new(move || s.take_clients(&listener)))?;
        let s = Arc::clone(&shared);
        spawn("channel-out", Box::new(move || s.write_out()))?;
        Ok(Channel { shared, path })
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl PortBackend for Channel {
    fn attach(&self, guest: Arc<dyn PortSink>) {
        // Nobody is connected yet.
        guest.set_host_open(false);
        let _ = self.shared.guest.set(guest);
    }

    fn write(&self, bytes: &[u8]) -> usize {
        let mut s = lock(&self.shared.state);
        if s.client.is_none() {
            return bytes.len();
        }
        let n = bytes.len().min(OUTPUT_BYTES - s.output.len());
        s.output.extend(bytes.iter().take(n));
        s.guest_waits |= n < bytes.len();
        self.shared.changed.notify_all();
        n
    }

    fn input_ready(&self) {
        lock(&self.shared.state).ticks += 1;
        self.shared.changed.notify_all();
    }

    fn guest_open(&self, open: bool) {
        let mut s = lock(&self.shared.state);
        s.guest_open = open;
        s.ticks += 1;
        self.shared.changed.notify_all();
    }
}

/// True if the other end is closed, although there may be bytes left to read.
fn hung_up(client: &UnixStream) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec::default();
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}

impl Shared {
    fn take_clients(&self, listener: &UnixListener) {
        loop {
            match listener.accept() {
                Ok((client, _)) => self.serve(Arc::new(client)),
                // Out of descriptors, for instance: others may end meanwhile.
                Err(e) => {
                    tracing::warn!("channel: {e}");
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        }
    }

    fn set_host_open(&self, open: bool) {
        if let Some(guest) = self.guest.get() {
            guest.set_host_open(open);
        }
    }

    fn serve(&self, client: Arc<UnixStream>) {
        lock(&self.state).client = Some(Arc::clone(&client));
        self.set_host_open(true);
        self.read_in(&client);
        let waits = {
            let mut s = lock(&self.state);
            s.client = None;
            s.output.clear();
            std::mem::take(&mut s.guest_waits)
        };
        // Ends a write that waits for the client.
        let _ = client.shutdown(Shutdown::Both);
        self.set_host_open(false);
        if waits && let Some(guest) = self.guest.get() {
            guest.output_ready();
        }
    }

    /// Brings what the client writes to the guest, until the client leaves.
    fn read_in(&self, client: &UnixStream) {
        let mut stream = client;
        let mut buffer = [0; INPUT_BYTES];
        loop {
            let n = match stream.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => return,
                Ok(n) => n,
            };
            let mut rest = buffer.get(..n).unwrap_or_default();
            while !rest.is_empty() {
                let ticks = lock(&self.state).ticks;
                let taken = self.guest.get().map_or(0, |g| g.receive(rest));
                rest = rest.get(taken..).unwrap_or_default();
                if taken > 0 {
                    continue;
                }
                let s = lock(&self.state);
                if !s.guest_open && hung_up(client) {
                    return;
                }
                let same = |s: &mut State| s.ticks == ticks;
                drop(self.changed.wait_timeout_while(s, RECHECK, same));
            }
        }
    }

    /// Brings what the guest writes to the client.
    fn write_out(&self) {
        let mut piece = Vec::new();
        loop {
            let (client, wake) = {
                let s = lock(&self.state);
                let idle = |s: &mut State| s.output.is_empty() || s.client.is_none();
                let wait = self.changed.wait_while(s, idle);
                let mut s = wait.unwrap_or_else(PoisonError::into_inner);
                piece.clear();
                let n = s.output.len().min(INPUT_BYTES);
                piece.extend(s.output.drain(..n));
                let wake = s.guest_waits && s.output.len() < OUTPUT_BYTES / 2;
                if wake {
                    s.guest_waits = false;
                }
                (s.client.clone(), wake)
            };
            if let Some(client) = client
                && (&*client).write_all(&piece).is_err()
            {
                // Its reader sees the end, too.
                let _ = client.shutdown(Shutdown::Both);
            }
            if wake && let Some(guest) = self.guest.get() {
                guest.output_ready();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that takes so many bytes, once it has opened the port.
    #[derive(Default)]
    struct Guest {
        taken: Mutex<Vec<u8>>,
        room: Mutex<usize>,
        host_open: Mutex<Vec<bool>>,
        ready: Mutex<u32>,
    }

    impl PortSink for Guest {
        fn receive(&self, bytes: &[u8]) -> usize {
            let mut room = lock(&self.room);
            let n = bytes.len().min(*room);
            *room -= n;
            lock(&self.taken).extend_from_slice(&bytes[..n]);
            n
        }
        fn output_ready(&self) {
            *lock(&self.ready) += 1;
        }
        fn set_host_open(&self, open: bool) {
            lock(&self.host_open).push(open);
        }
        fn resize(&self, _cols: u16, _rows: u16) {}
    }

    fn until(what: &str, mut is: impl FnMut() -> bool) {
        let start = std::time::Instant::now();
        while !is() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn channel(name: &str) -> (Channel, Arc<Guest>) {
        let path =
            std::env::temp_dir().join(format!("pyrite-channel-{name}-{}", std::process::id()));
        let listener = crate::socket::listen(&path).unwrap();
        let channel = Channel::start(listener, path).unwrap();
        let guest: Arc<Guest> = Arc::default();
        channel.attach(guest.clone());
        (channel, guest)
    }

    #[test]
    fn bytes_go_both_ways_and_the_guest_knows_who_is_there() {
        let (channel, guest) = channel("both");
        assert_eq!(channel.write(b"nobody hears this"), 17);
        let mut client = UnixStream::connect(&channel.path).unwrap();
        until("connected", || *lock(&guest.host_open) == [false, true]);
        client.write_all(b"to the guest").unwrap();
        // In pieces, as the guest has room.
        *lock(&guest.room) = 3;
        until("first bytes", || *lock(&guest.taken) == b"to ");
        *lock(&guest.room) = 100;
        channel.input_ready();
        until("the rest", || *lock(&guest.taken) == b"to the guest");
        assert_eq!(channel.write(b"to the host"), 11);
        let mut got = [0; 11];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"to the host");
        drop(client);
        until("gone", || *lock(&guest.host_open) == [false, true, false]);
        let path = channel.path.clone();
        drop(channel);
        assert!(!path.exists());
    }

    #[test]
    fn a_slow_client_makes_the_guest_wait_and_one_that_leaves_does_not() {
        let (channel, guest) = channel("slow");
        let client = UnixStream::connect(&channel.path).unwrap();
        until("connected", || lock(&guest.host_open).len() == 2);
        let piece = [7; 5000];
        let mut sent = 0;
        until("full", || {
            let n = channel.write(&piece);
            sent += n;
            if n == 0 {
                // Twice in a row: the thread may just have made room.
                std::thread::sleep(Duration::from_millis(50));
            }
            n == 0 && channel.write(&[7]) == 0
        });
        assert!(sent >= OUTPUT_BYTES, "{sent}");
        drop(client);
        until("asked again", || *lock(&guest.ready) > 0);
        until("gone", || lock(&guest.host_open).len() == 3);
        assert_eq!(channel.write(&piece), 5000);
    }

    #[test]
    fn what_a_client_left_for_a_closed_port_goes_with_it() {
        let (channel, guest) = channel("left");
        let mut first = UnixStream::connect(&channel.path).unwrap();
        first.write_all(b"lost").unwrap();
        drop(first);
        until("gone", || *lock(&guest.host_open) == [false, true, false]);
        let mut second = UnixStream::connect(&channel.path).unwrap();
        second.write_all(b"kept").unwrap();
        *lock(&guest.room) = 9;
        until("kept", || *lock(&guest.taken) == b"kept");
    }
}
