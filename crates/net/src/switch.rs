//! A switch between virtual machines: a process of its own, so that no machine depends on
//! another, and the end of its cable in a machine.
//!
//! A machine connects to the switch's socket (`SOCK_SEQPACKET`, one message for one frame), says
//! hello, and hears it back when it is connected. Each message after that is a header ([`crate::vnet`]) and a frame: segments pass
//! uncut between machines that can use them, and are completed by the machine that cannot.
//!
//! Who may open the socket's file is connected, nobody else; nothing of the host is. The switch
//! learns addresses, forwards, and floods what is for all or for an unknown address. A machine
//! that does not take its frames loses its own only. When the switch ends, machines keep trying to
//! connect to its successor.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::pump::{Port, Pump};
use crate::sys::{self, Interest, wait_for};
use crate::{FrameSink, MAX_FRAME_BYTES, NetBackend, Offload, Offloads, vnet};

/// What a machine and the switch say first.
const HELLO: &[u8] = b"pyrite switch 1\n";
/// LIMIT: machines on a switch.
const MAX_PORTS: usize = 256;
/// LIMIT: addresses learned from one machine.
const MAX_ADDRESSES: usize = 256;
/// How long an address is remembered without a frame from it. IEEE 802.1Q §8.8.3.
const AGEING: Duration = Duration::from_secs(300);
/// How long a machine may take to say hello.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// LIMIT: frames that wait for a machine.
const QUEUE_FRAMES: usize = 1024;
/// LIMIT: bytes of them.
const QUEUE_BYTES: usize = 8 << 20;
/// Frames taken from one machine before others get their turn.
const TURN_FRAMES: usize = 64;
/// How soon a lost switch is looked for again.
const RECONNECT: Duration = Duration::from_millis(500);
/// Destination, source and type.
const LEAST_FRAME: usize = 14;

type Mac = [u8; 6];

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One machine's connection.
struct Machine {
    id: u64,
    fd: OwnedFd,
    since: Instant,
    /// It has said hello.
    greeted: bool,
    queue: VecDeque<Vec<u8>>,
    queued_bytes: usize,
    addresses: usize,
    gone: bool,
}

impl Machine {
    fn send(&mut self, message: &[u8]) {
        if self.queue.is_empty() {
            match sys::write(self.fd.as_fd(), &[], message) {
                Ok(()) => return,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // A message that is too large for the socket, or the end of it.
                Err(e) => {
                    self.gone |= e.raw_os_error() != Some(libc::EMSGSIZE);
                    return;
                }
            }
        }
        let full = self.queued_bytes + message.len() > QUEUE_BYTES;
        if !full && self.queue.len() < QUEUE_FRAMES {
            self.queued_bytes += message.len();
            self.queue.push_back(message.to_vec());
        }
    }

    fn flush(&mut self) {
        while let Some(message) = self.queue.front() {
            match sys::write(self.fd.as_fd(), &[], message) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.gone = true,
            }
            self.queued_bytes -= message.len();
            self.queue.pop_front();
        }
    }
}

/// The switch.
pub struct Switch {
    listener: OwnedFd,
    machines: Vec<Machine>,
    /// Where an address is and when it was seen there.
    addresses: HashMap<Mac, (u64, Instant)>,
    next_id: u64,
    swept: Instant,
    stop: Arc<AtomicBool>,
}

impl Switch {
    /// Listens at a path where there is nothing. Who may connect is decided by the permissions of
    /// its directory and of the file that is made.
    pub fn listen(path: &Path) -> io::Result<Switch> {
        Ok(Switch {
            listener: sys::listen_packets(path)?,
            machines: Vec::new(),
            addresses: HashMap::new(),
            next_id: 0,
            swept: Instant::now(),
            stop: Arc::default(),
        })
    }

    /// True if a switch answers at a path.
    pub fn is_at(path: &Path) -> bool {
        sys::connect_packets(path).is_ok()
    }

    /// Set to true, it ends [`Switch::run`] within a second.
    pub fn stop(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Forwards frames until it is stopped.
    pub fn run(mut self) {
        let mut buffer = vec![0; vnet::BYTES + MAX_FRAME_BYTES];
        while !self.stop.load(Ordering::Acquire) {
            let ready = {
                let mut interests = vec![Interest {
                    fd: self.listener.as_fd(),
                    read: self.machines.len() < MAX_PORTS,
                    write: false,
                }];
                interests.extend(self.machines.iter().map(|m| Interest {
                    fd: m.fd.as_fd(),
                    read: true,
                    write: !m.queue.is_empty(),
                }));
                wait_for(&interests, Some(Duration::from_secs(1)))
            };
            let mut ready = ready.into_iter();
            let (connects, _) = ready.next().unwrap_or_default();
            for (n, (readable, writable)) in ready.enumerate() {
                if writable && let Some(m) = self.machines.get_mut(n) {
                    m.flush();
                }
                if readable {
                    self.take_from(n, &mut buffer);
                }
            }
            if connects {
                self.accept();
            }
            self.sweep();
        }
    }

    fn accept(&mut self) {
        match sys::accept(self.listener.as_fd()) {
            Ok(fd) => {
                self.next_id += 1;
                self.machines.push(Machine {
                    id: self.next_id,
                    fd,
                    since: Instant::now(),
                    greeted: false,
                    queue: VecDeque::new(),
                    queued_bytes: 0,
                    addresses: 0,
                    gone: false,
                });
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                // No descriptors left, perhaps: not again at once.
                tracing::warn!("the switch cannot take a machine: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn take_from(&mut self, n: usize, buffer: &mut [u8]) {
        for _ in 0..TURN_FRAMES {
            let Some(m) = self.machines.get_mut(n) else {
                return;
            };
            let message = match sys::read(m.fd.as_fd(), buffer) {
                Ok(0) => {
                    m.gone = true;
                    return;
                }
                Ok(len) => buffer.get(..len).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    m.gone = true;
                    return;
                }
            };
            if !m.greeted {
                m.greeted = message == HELLO;
                m.gone = !m.greeted;
                if m.gone {
                    return;
                }
                m.send(HELLO);
                continue;
            }
            self.forward(n, message);
        }
    }

    fn forward(&mut self, from: usize, message: &[u8]) {
        let Some((_, frame)) = message.split_first_chunk::<{ vnet::BYTES }>() else {
            return;
        };
        let (Some(to), Some(source)) = (
            frame.first_chunk::<6>().copied(),
            frame.get(6..).and_then(|f| f.first_chunk::<6>()).copied(),
        ) else {
            return;
        };
        if frame.len() < LEAST_FRAME || source[0] & 1 != 0 {
            return;
        }
        self.learn(from, source);
        let known = self
            .addresses
            .get(&to)
            .filter(|_| to[0] & 1 == 0)
            .map(|(id, _)| *id);
        for (n, m) in self.machines.iter_mut().enumerate() {
            if n != from && m.greeted && known.is_none_or(|id| m.id == id) {
                m.send(message);
            }
        }
    }

    fn learn(&mut self, from: usize, source: Mac) {
        let now = Instant::now();
        let Some(id) = self.machines.get(from).map(|m| m.id) else {
            return;
        };
        match self.addresses.get_mut(&source) {
            Some((at, seen)) if *at == id => *seen = now,
            other => {
                let before = other.map(|(at, _)| *at);
                let Some(m) = self.machines.get_mut(from) else {
                    return;
                };
                // One that is not learned is flooded: no other machine suffers.
                if m.addresses >= MAX_ADDRESSES {
                    return;
                }
                m.addresses += 1;
                self.addresses.insert(source, (id, now));
                if let Some(m) = self.machines.iter_mut().find(|m| Some(m.id) == before) {
                    m.addresses -= 1;
                }
            }
        }
    }

    /// Takes out machines that are gone and addresses that are old.
    fn sweep(&mut self) {
        let now = Instant::now();
        let mut changed = false;
        self.machines.retain(|m| {
            let silent = !m.greeted && now.duration_since(m.since) > HELLO_WITHIN;
            changed |= m.gone || silent;
            !m.gone && !silent
        });
        if !changed && now.duration_since(self.swept) < AGEING / 10 {
            return;
        }
        self.swept = now;
        for m in &mut self.machines {
            m.addresses = 0;
        }
        let machines = &mut self.machines;
        self.addresses.retain(|_, (id, seen)| {
            let Some(m) = machines.iter_mut().find(|m| m.id == *id) else {
                return false;
            };
            let young = now.duration_since(*seen) < AGEING;
            m.addresses += usize::from(young);
            young
        });
    }
}

struct CablePort {
    path: PathBuf,
    fd: Mutex<Option<Arc<OwnedFd>>>,
}

fn connect(path: &Path) -> io::Result<Arc<OwnedFd>> {
    let fd = sys::connect_packets(path)?;
    sys::write(fd.as_fd(), &[], HELLO)?;
    let answer = Interest {
        fd: fd.as_fd(),
        read: true,
        write: false,
    };
    wait_for(&[answer], Some(HELLO_WITHIN));
    let mut hello = [0; HELLO.len()];
    match sys::read(fd.as_fd(), &mut hello) {
        Ok(n) if hello.get(..n) == Some(HELLO) => Ok(Arc::new(fd)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        Err(e) => Err(e),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "what listens there is no switch of this version",
        )),
    }
}

impl Port for CablePort {
    fn fd(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.fd).clone()
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<(usize, usize, Offload)> {
        let fd = self.fd().ok_or(io::ErrorKind::NotConnected)?;
        let n = sys::read(fd.as_fd(), buffer)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let message = buffer.get(..n).unwrap_or_default();
        let (header, frame) = message.split_first_chunk().ok_or_else(invalid)?;
        let offload = vnet::decode_for(header, frame).ok_or_else(invalid)?;
        Ok((vnet::BYTES, frame.len(), offload))
    }

    fn write(&self, frame: &[u8], offload: &Offload) -> io::Result<()> {
        let fd = self.fd().ok_or(io::ErrorKind::NotConnected)?;
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let (header, _) = vnet::encode(frame, offload).ok_or_else(invalid)?;
        sys::write(fd.as_fd(), &header, frame)
    }

    // What this guest wants is nothing to the others: frames are completed here if need be.
    fn set_offloads(&self, _: Offloads) {}

    fn failed(&self, error: &io::Error) -> Duration {
        tracing::warn!("the switch at {} is gone: {error}", self.path.display());
        *lock(&self.fd) = None;
        RECONNECT
    }

    fn connect(&self) -> bool {
        match connect(&self.path) {
            Ok(fd) => {
                *lock(&self.fd) = Some(fd);
                true
            }
            Err(_) => false,
        }
    }
}

/// A cable to a switch.
pub struct SwitchCable(Pump<CablePort>);

impl SwitchCable {
    /// Connects to the switch that listens at `path`.
    pub fn connect(path: &Path) -> io::Result<SwitchCable> {
        let port = CablePort {
            path: path.to_owned(),
            fd: Mutex::new(Some(connect(path)?)),
        };
        Ok(SwitchCable(Pump::new(port, "net-switch")?))
    }
}

impl NetBackend for SwitchCable {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        self.0.attach(sink);
    }
    fn transmit(&self, frame: &[u8]) {
        self.0.transmit(frame);
    }
    fn transmit_offloaded(&self, frame: &[u8], offload: &Offload) {
        self.0.transmit_offloaded(frame, offload);
    }
    fn receive_ready(&self) {
        self.0.receive_ready();
    }
    fn pause(&self, paused: bool) {
        self.0.pause(paused);
    }
    fn set_offloads(&self, offloads: Offloads) {
        self.0.set_offloads(offloads);
    }
}

#[cfg(test)]
mod tests;
