//! Console device with several ports. virtio 1.3 §5.3.
//!
//! Every port is a byte stream to a [`PortBackend`]. Both directions have flow control: output
//! that the back end does not take stays in the ring (the chain is given back and its consumed
//! part remembered), input that the guest has no buffers for stays with the back end.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError, Weak};

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, StateError};
use pyrite_vdev::bus::lock;

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::spec::VIRTIO_ID_CONSOLE;

mod control;
#[cfg(test)]
mod tests;

use control::{Event, Message};

const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;
const VIRTIO_CONSOLE_F_EMERG_WRITE: u32 = 2;

const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
const QUEUE_SIZE: u16 = 128;
/// LIMIT: ports of one device.
const MAX_PORTS: usize = 16;
/// LIMIT: control messages waiting for buffers; a driver that lets more pile up loses them.
const MAX_CONTROL_MESSAGES: usize = 128;
/// Bytes offered to a back end at a time.
const CHUNK_BYTES: usize = 4096;
/// Offset of emerg_wr in the configuration, §5.3.4.
const EMERG_WR: u64 = 8;

/// The host's end of a port. Called on vCPU threads: nothing may block.
pub trait PortBackend: Send + Sync {
    /// Connects the guest's side, once, before anything else.
    fn attach(&self, guest: Arc<dyn PortSink>);
    /// Bytes from the guest. Returns how many were taken; after fewer than all,
    /// [`PortSink::output_ready`] is due when there is room again.
    fn write(&self, bytes: &[u8]) -> usize;
    /// The guest has buffers again after [`PortSink::receive`] took fewer than all bytes.
    fn input_ready(&self);
    /// The guest opened or closed the port.
    fn guest_open(&self, open: bool);
}

/// The guest's end of a port, called by back-end threads.
pub trait PortSink: Send + Sync {
    /// Input for the guest. Returns how many bytes were taken.
    fn receive(&self, bytes: &[u8]) -> usize;
    /// The back end takes output again.
    fn output_ready(&self);
    /// The host side connected or hung up. Ports start connected.
    fn set_host_open(&self, open: bool);
    /// The terminal's size changed.
    fn resize(&self, cols: u16, rows: u16);
}

/// One port.
pub struct PortConfig {
    /// Name shown in the guest (`/dev/virtio-ports/NAME`); empty for none.
    pub name: String,
    /// A console (hvc) rather than a plain byte channel.
    pub console: bool,
    /// The host's end.
    pub backend: Arc<dyn PortBackend>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct PortState {
    /// The driver is ready for the port.
    #[n(0)]
    ready: bool,
    /// The guest has it open.
    #[n(1)]
    guest_open: bool,
    /// What the guest was told of the host's side.
    #[n(2)]
    told_host_open: bool,
    /// Bytes of the next output chain that the back end has already.
    #[n(3)]
    consumed: u64,
}

struct Port {
    config: PortConfig,
    // LOCK ORDER: out/input < Shared::state < queue. Whoever holds one moves bytes that way.
    out: Mutex<()>,
    input: Mutex<()>,
    /// Output was asked for while somebody else held `out`.
    again: AtomicBool,
    starved: AtomicBool,
}

struct State {
    ports: Vec<PortState>,
    host_open: Vec<bool>,
    size: (u16, u16),
    to_driver: VecDeque<Message>,
}

struct Shared {
    link: OnceLock<Arc<DriverLink>>,
    ports: Vec<Port>,
    state: Mutex<State>,
    /// Serialises takers of the control receive queue.
    sending: Mutex<()>,
}

/// Queues of a port: input, output.
fn queues(port: usize) -> (usize, usize) {
    if port == 0 {
        (0, 1)
    } else {
        (2 + 2 * port, 3 + 2 * port)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn multiport(&self) -> bool {
        self.link
            .get()
            .is_some_and(|l| l.has(VIRTIO_CONSOLE_F_MULTIPORT))
    }

    /// Moves output of a port to its back end until one of them has no more.
    fn pump_out(&self, index: usize) {
        let Some(port) = self.ports.get(index) else {
            return;
        };
        port.again.store(true, Ordering::SeqCst);
        // A back end may ask for more from within `write`, or from its own thread while a vCPU is
        // here: whoever holds the lock looks again.
        while port.again.load(Ordering::SeqCst) {
            let _out = match port.out.try_lock() {
                Ok(g) => g,
                Err(TryLockError::Poisoned(p)) => p.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            port.again.store(false, Ordering::SeqCst);
            self.move_out(index, port);
        }
    }

    fn move_out(&self, index: usize, port: &Port) {
        let Some(link) = self.link.get() else { return };
        let queue = queues(index).1;
        let mut buffer = [0; CHUNK_BYTES];
        'chains: while let Some(chain) = link.pop(queue) {
            let mut at = self.state().ports.get(index).map_or(0, |p| p.consumed);
            while at < chain.readable_len() {
                let n = chain.read_at(link.memory(), at, &mut buffer);
                let taken = port.config.backend.write(&buffer[..n]).min(n);
                at += taken as u64;
                if taken < n || n == 0 {
                    self.set_consumed(index, at);
                    link.unpop(queue, vec![chain]);
                    break 'chains;
                }
            }
            self.set_consumed(index, 0);
            link.push(queue, chain, 0);
        }
        link.signal(queue);
    }

    fn set_consumed(&self, index: usize, at: u64) {
        if let Some(p) = self.state().ports.get_mut(index) {
            p.consumed = at;
        }
    }

    fn receive(&self, index: usize, bytes: &[u8]) -> usize {
        let (Some(link), Some(port)) = (self.link.get(), self.ports.get(index)) else {
            return 0;
        };
        let _input = lock(&port.input);
        // Set first: a buffer added after the queue was found empty must find it.
        port.starved.store(true, Ordering::SeqCst);
        let open = self.state().ports.get(index).is_some_and(|p| p.guest_open);
        if self.multiport() && !port.config.console && !open {
            return 0;
        }
        let queue = queues(index).0;
        let mut done = 0;
        while done < bytes.len() {
            let Some(chain) = link.pop(queue) else { break };
            let n = chain.write_at(link.memory(), 0, &bytes[done..]);
            done += n;
            link.push(queue, chain, n as u32);
        }
        if done == bytes.len() {
            port.starved.store(false, Ordering::SeqCst);
        }
        if done > 0 {
            link.signal(queue);
        }
        done
    }

    /// The driver may have added input buffers, or opened the port.
    fn input_ready(&self, index: usize) {
        if let Some(p) = self.ports.get(index)
            && p.starved.swap(false, Ordering::SeqCst)
        {
            p.config.backend.input_ready();
        }
    }

    fn send(&self, messages: impl IntoIterator<Item = Message>) {
        {
            let mut s = self.state();
            for m in messages {
                if s.to_driver.len() < MAX_CONTROL_MESSAGES {
                    s.to_driver.push_back(m);
                }
            }
        }
        self.flush_control();
    }

    fn flush_control(&self) {
        let Some(link) = self.link.get() else { return };
        let _sending = lock(&self.sending);
        let mut any = false;
        while !self.state().to_driver.is_empty() {
            let Some(chain) = link.pop(CONTROL_RX) else {
                break;
            };
            let Some(m) = self.state().to_driver.pop_front() else {
                link.unpop(CONTROL_RX, vec![chain]);
                break;
            };
            let n = chain.write_at(link.memory(), 0, &m.bytes);
            link.push(CONTROL_RX, chain, n as u32);
            any = true;
        }
        if any {
            link.signal(CONTROL_RX);
        }
    }

    fn control_from_driver(&self) {
        let Some(link) = self.link.get() else { return };
        while let Some(chain) = link.pop(CONTROL_TX) {
            let mut b = [0; 8];
            if chain.read_at(link.memory(), 0, &mut b) == b.len() {
                self.handle(control::parse(b));
            }
            link.push(CONTROL_TX, chain, 0);
        }
        link.signal(CONTROL_TX);
    }

    fn handle(&self, (id, event, value): (u32, u16, u16)) {
        let index = id as usize;
        match Event::from_number(event) {
            Some(Event::DeviceReady) if value == 1 => {
                let n = self.ports.len() as u32;
                self.send((0..n).map(|id| Message::new(id, Event::PortAdd, 1)));
            }
            Some(Event::PortReady) if value == 1 => self.introduce(index),
            Some(Event::PortOpen) => {
                let Some(port) = self.ports.get(index) else {
                    return;
                };
                if let Some(p) = self.state().ports.get_mut(index) {
                    p.guest_open = value != 0;
                }
                port.config.backend.guest_open(value != 0);
                if value != 0 {
                    self.input_ready(index);
                }
            }
            _ => {}
        }
    }

    /// Tells the driver what there is to know of a port.
    fn introduce(&self, index: usize) {
        let Some(port) = self.ports.get(index) else {
            return;
        };
        let id = index as u32;
        let mut messages = Vec::new();
        {
            let mut s = self.state();
            let host_open = s.host_open.get(index).copied().unwrap_or(false);
            let size = s.size;
            if let Some(p) = s.ports.get_mut(index) {
                p.ready = true;
                p.told_host_open = host_open;
            }
            if port.config.console {
                messages.push(Message::new(id, Event::ConsolePort, 1));
                if size != (0, 0) {
                    messages.push(Message::resize(id, size));
                }
            }
            if !port.config.name.is_empty() {
                messages.push(Message::name(id, &port.config.name));
            }
            if host_open {
                messages.push(Message::new(id, Event::PortOpen, 1));
            }
        }
        self.send(messages);
    }

    /// Tells the driver of ports whose host side is not as it knows.
    fn tell_host_open(&self) {
        let mut messages = Vec::new();
        {
            let mut s = self.state();
            let State {
                ports, host_open, ..
            } = &mut *s;
            for (id, (p, open)) in ports.iter_mut().zip(host_open.iter()).enumerate() {
                if p.ready && p.told_host_open != *open {
                    p.told_host_open = *open;
                    messages.push(Message::new(id as u32, Event::PortOpen, u16::from(*open)));
                }
            }
        }
        self.send(messages);
    }
}

struct Sink {
    shared: Weak<Shared>,
    port: usize,
}

impl PortSink for Sink {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.shared
            .upgrade()
            .map_or(0, |s| s.receive(self.port, bytes))
    }

    fn output_ready(&self) {
        if let Some(s) = self.shared.upgrade() {
            s.pump_out(self.port);
        }
    }

    fn set_host_open(&self, open: bool) {
        let Some(s) = self.shared.upgrade() else {
            return;
        };
        if let Some(o) = s.state().host_open.get_mut(self.port) {
            *o = open;
        }
        if s.link.get().is_some_and(|l| l.running()) {
            s.tell_host_open();
        }
    }

    fn resize(&self, cols: u16, rows: u16) {
        let Some(s) = self.shared.upgrade() else {
            return;
        };
        let ready = {
            let mut state = s.state();
            state.size = (cols, rows);
            state.ports.get(self.port).is_some_and(|p| p.ready)
        };
        if ready {
            s.send([Message::resize(self.port as u32, (cols, rows))]);
        }
        if let Some(l) = s.link.get() {
            l.config_changed();
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedConsole {
    #[n(0)]
    ports: Vec<PortState>,
    #[n(1)]
    cols: u16,
    #[n(2)]
    rows: u16,
    #[n(3)]
    to_driver: Vec<Message>,
}

/// The device.
pub struct Console {
    shared: Arc<Shared>,
}

impl Console {
    /// A device with these ports, 1 to 16; port 0 is also what a driver without multi-port
    /// support uses.
    pub fn new(mut ports: Vec<PortConfig>) -> Console {
        ports.truncate(MAX_PORTS);
        let count = ports.len();
        let shared = Arc::new(Shared {
            link: OnceLock::new(),
            ports: ports
                .into_iter()
                .map(|config| Port {
                    config,
                    out: Mutex::new(()),
                    input: Mutex::new(()),
                    again: AtomicBool::new(false),
                    starved: AtomicBool::new(true),
                })
                .collect(),
            state: Mutex::new(State {
                ports: vec![PortState::default(); count],
                host_open: vec![true; count],
                size: (0, 0),
                to_driver: VecDeque::new(),
            }),
            sending: Mutex::new(()),
        });
        Console { shared }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_CONSOLE
    }

    fn class_code(&self) -> u32 {
        0x07_80_00
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_CONSOLE_F_SIZE
            | 1 << VIRTIO_CONSOLE_F_MULTIPORT
            | 1 << VIRTIO_CONSOLE_F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Two for port 0, two for control, two for each further port.
        vec![QUEUE_SIZE; 2 * (self.shared.ports.len().max(1) + 1)]
    }

    fn attach(&mut self, link: Arc<DriverLink>) {
        let _ = self.shared.link.set(link);
        for (port, p) in self.shared.ports.iter().enumerate() {
            p.config.backend.attach(Arc::new(Sink {
                shared: Arc::downgrade(&self.shared),
                port,
            }));
        }
    }

    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        // virtio 1.3 §5.3.4: cols, rows, max_nr_ports, emerg_wr.
        let (cols, rows) = self.shared.state().size;
        let mut image = [0; 12];
        image[..2].copy_from_slice(&cols.to_le_bytes());
        image[2..4].copy_from_slice(&rows.to_le_bytes());
        image[4..8].copy_from_slice(&(self.shared.ports.len() as u32).to_le_bytes());
        read_config(&image, offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        // §5.3.6.1: emergency write, works before the driver is set up.
        if let (EMERG_WR, Some(b), Some(p)) = (offset, data.first(), self.shared.ports.first()) {
            p.config.backend.write(&[*b]);
        }
    }

    fn activate(&mut self) {}

    fn notify(&mut self, queue: usize) {
        match queue {
            CONTROL_RX => self.shared.flush_control(),
            CONTROL_TX => self.shared.control_from_driver(),
            _ => {
                let port = if queue < CONTROL_RX {
                    0
                } else {
                    (queue - CONTROL_RX) / 2
                };
                if queue.is_multiple_of(2) {
                    self.shared.input_ready(port);
                } else {
                    self.shared.pump_out(port);
                }
            }
        }
    }

    fn reset(&mut self) {
        let open: Vec<bool> = {
            let mut s = self.shared.state();
            s.to_driver.clear();
            let open = s.ports.iter().map(|p| p.guest_open).collect();
            s.ports.fill(PortState::default());
            open
        };
        for (p, open) in self.shared.ports.iter().zip(open) {
            p.starved.store(true, Ordering::SeqCst);
            if open {
                p.config.backend.guest_open(false);
            }
        }
    }

    fn start(&mut self) {
        for p in &self.shared.ports {
            p.starved.store(true, Ordering::SeqCst);
        }
        self.shared.tell_host_open();
    }

    fn pause(&mut self) {}

    fn drained(&mut self) -> bool {
        true
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let s = self.shared.state();
        // host_open is the host's own and compared with what was told at the next start.
        let State {
            ports,
            host_open: _,
            size,
            to_driver,
        } = &*s;
        Ok(encode_body(&SavedConsole {
            ports: ports.clone(),
            cols: size.0,
            rows: size.1,
            to_driver: to_driver.iter().cloned().collect(),
        }))
    }

    fn restore(&mut self, body: &[u8], _active: bool) -> Result<(), StateError> {
        let unit = self
            .shared
            .link
            .get()
            .map_or("virtio-console", |l| l.name());
        let SavedConsole {
            ports,
            cols,
            rows,
            to_driver,
        } = decode_body(unit, body)?;
        let ours = self.shared.ports.len();
        if ports.len() != ours || to_driver.len() > MAX_CONTROL_MESSAGES {
            return Err(StateError::Invalid {
                unit: unit.to_owned(),
                detail: format!("has {} ports, here are {ours}", ports.len()),
            });
        }
        let open: Vec<bool> = ports.iter().map(|p| p.guest_open).collect();
        {
            let mut s = self.shared.state();
            s.ports = ports;
            s.size = (cols, rows);
            s.to_driver = to_driver.into();
        }
        for (p, _) in self.shared.ports.iter().zip(open).filter(|(_, open)| *open) {
            p.config.backend.guest_open(true);
        }
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let s = self.shared.state();
        let ports = self
            .shared
            .ports
            .iter()
            .zip(&s.ports)
            .enumerate()
            .map(|(n, (port, p))| {
                let node = Inspect::node([
                    ("name", Inspect::Text(port.config.name.clone())),
                    ("console", Inspect::Bool(port.config.console)),
                    ("ready", Inspect::Bool(p.ready)),
                    ("guest_open", Inspect::Bool(p.guest_open)),
                ]);
                (n.to_string(), node)
            })
            .collect();
        Inspect::node([
            ("cols", Inspect::Uint(u64::from(s.size.0))),
            ("rows", Inspect::Uint(u64::from(s.size.1))),
            ("ports", Inspect::Node(ports)),
        ])
    }
}
