//! The console: one byte stream to the front process, shared by the first serial port and the
//! first port of the virtio console.
//!
//! Output goes through a bounded buffer that a writer thread empties. A serial port has no way to
//! say "wait", so a vCPU that writes to a full buffer waits here, as it would for a slow line;
//! before the driver stops the vCPUs it opens the gate ([`Console::release`]) and the wait ends.
//! The virtio console has flow control and never waits.
//!
//! Input goes to the virtio console while the guest has it open, else to the serial port.
//!
//! LOCK ORDER: device < `Shared::state`. Input is delivered with no lock of this module held.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use pyrite_devices::uart::{SerialBackend, Uart};
use pyrite_vdev::bus::lock;
use pyrite_virtio::{PortBackend, PortSink};

use super::panic_line::PanicLine;

/// LIMIT: bytes of output that wait for the front process.
const OUTPUT_BYTES: usize = 256 << 10;
/// Bytes of input read at a time.
const INPUT_BYTES: usize = 4096;
/// How long a break waits for room in the serial port.
const BREAK_WITHIN: Duration = Duration::from_secs(1);
/// A lost wake-up costs at most this.
const RECHECK: Duration = Duration::from_millis(50);

/// What the guest's output said.
pub type PanicSink = Box<dyn Fn(Option<String>) + Send + Sync>;

struct State {
    output: VecDeque<u8>,
    /// A virtio port was told that the buffer is full.
    port_waits: bool,
    /// Nobody may wait: output that does not fit is dropped.
    released: bool,
    /// Input stays here.
    paused: bool,
    /// The guest has the virtio console open.
    port_open: bool,
    /// There is input that was read and not delivered.
    delivering: bool,
    /// Grows when input may be deliverable again.
    ticks: u64,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Output was added or removed, or the gate moved.
    output_changed: Condvar,
    /// `ticks` grew.
    input_changed: Condvar,
    uart: OnceLock<Weak<Mutex<Uart>>>,
    port: OnceLock<Arc<dyn PortSink>>,
    scanner: Mutex<PanicLine>,
    on_panic: PanicSink,
    /// Output is shown; without, it is only scanned.
    shown: bool,
}

/// The console of a machine. Clones are the same console.
#[derive(Clone)]
pub struct Console(Arc<Shared>);

impl Console {
    /// A console. `on_panic` hears `Some` line when the guest kernel says that it panics, and
    /// `None` when it prints on after that. `shown`: somebody looks at the output.
    pub fn new(shown: bool, on_panic: PanicSink) -> Console {
        Console(Arc::new(Shared {
            state: Mutex::new(State {
                output: VecDeque::new(),
                port_waits: false,
                released: false,
                paused: true,
                port_open: false,
                delivering: false,
                ticks: 0,
                closed: false,
            }),
            output_changed: Condvar::new(),
            input_changed: Condvar::new(),
            uart: OnceLock::new(),
            port: OnceLock::new(),
            scanner: Mutex::default(),
            on_panic,
            shown,
        }))
    }

    /// The serial port that takes input.
    pub fn connect_uart(&self, uart: &Arc<Mutex<Uart>>) {
        let _ = self.0.uart.set(Arc::downgrade(uart));
    }

    /// Output end for the first serial port.
    pub fn serial(&self) -> Box<dyn SerialBackend> {
        Box::new(SerialEnd(self.clone()))
    }

    /// Both ends for the virtio console's first port.
    pub fn port(&self) -> Arc<dyn PortBackend> {
        Arc::new(PortEnd(self.clone()))
    }

    /// Starts the threads that move bytes to and from the front process.
    pub fn serve(&self, stream: UnixStream) -> std::io::Result<()> {
        let from = stream.try_clone()?;
        let (reader, writer) = (self.clone(), self.clone());
        std::thread::Builder::new()
            .name("console-out".into())
            .spawn(move || writer.write_out(stream))?;
        std::thread::Builder::new()
            .name("console-in".into())
            .spawn(move || reader.read_in(from))?;
        Ok(())
    }

    /// True: vCPUs must not wait for the console any more (they are about to be stopped).
    pub fn release(&self, released: bool) {
        lock(&self.0.state).released = released;
        self.0.output_changed.notify_all();
    }

    /// Holds input back (true) or lets it through.
    pub fn pause(&self, paused: bool) {
        let mut s = lock(&self.0.state);
        s.paused = paused;
        s.ticks += 1;
        self.0.input_changed.notify_all();
    }

    /// The terminal has another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        if let Some(port) = self.0.port.get() {
            port.resize(columns, rows);
        }
    }

    /// A break on the serial line, behind the input that came before. Waits a moment for room; false
    /// if the guest does not read.
    pub fn send_break(&self) -> bool {
        let Some(uart) = self.0.uart.get().and_then(Weak::upgrade) else {
            return false;
        };
        let until = Instant::now() + BREAK_WITHIN;
        loop {
            let ticks = {
                let s = lock(&self.0.state);
                if s.delivering { None } else { Some(s.ticks) }
            };
            if ticks.is_some() && lock(&uart).receive_break() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            let s = lock(&self.0.state);
            let same = |s: &mut State| s.delivering || ticks == Some(s.ticks);
            drop(self.0.input_changed.wait_timeout_while(s, RECHECK, same));
        }
    }

    /// Waits until all output has been handed over, or `limit` has passed; then closes.
    pub fn finish(&self, limit: Duration) {
        let s = lock(&self.0.state);
        let (mut s, _) = self
            .0
            .output_changed
            .wait_timeout_while(s, limit, |s| !s.output.is_empty() && !s.closed)
            .unwrap_or_else(PoisonError::into_inner);
        s.closed = true;
        self.0.output_changed.notify_all();
        self.0.input_changed.notify_all();
    }

    fn tick(&self) {
        lock(&self.0.state).ticks += 1;
        self.0.input_changed.notify_all();
    }

    fn scan(&self, bytes: &[u8]) {
        let found = lock(&self.0.scanner).feed(bytes);
        if let Some(what) = found {
            (self.0.on_panic)(what);
        }
    }

    /// Takes what fits; all of it when nobody looks.
    fn push(&self, bytes: &[u8]) -> usize {
        if !self.0.shown {
            return bytes.len();
        }
        let mut s = lock(&self.0.state);
        let n = bytes.len().min(OUTPUT_BYTES.saturating_sub(s.output.len()));
        s.output.extend(bytes.iter().take(n));
        if n > 0 {
            self.0.output_changed.notify_all();
        }
        n
    }

    fn push_waiting(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = self.push(bytes);
            bytes = bytes.get(n..).unwrap_or_default();
            if bytes.is_empty() {
                return;
            }
            let s = lock(&self.0.state);
            let full = |s: &mut State| s.output.len() >= OUTPUT_BYTES && !s.released && !s.closed;
            let s = self.0.output_changed.wait_while(s, full);
            let s = s.unwrap_or_else(PoisonError::into_inner);
            if s.released || s.closed {
                return;
            }
        }
    }

    fn write_out(&self, mut stream: UnixStream) {
        let mut piece = Vec::new();
        loop {
            let wake_port = {
                let s = lock(&self.0.state);
                let mut s = self
                    .0
                    .output_changed
                    .wait_while(s, |s| s.output.is_empty() && !s.closed)
                    .unwrap_or_else(PoisonError::into_inner);
                if s.output.is_empty() {
                    return;
                }
                piece.clear();
                let n = s.output.len().min(INPUT_BYTES);
                piece.extend(s.output.drain(..n));
                s.port_waits && s.output.len() < OUTPUT_BYTES / 2
            };
            let gone = stream.write_all(&piece).is_err();
            {
                let mut s = lock(&self.0.state);
                s.closed |= gone;
                if wake_port {
                    s.port_waits = false;
                }
            }
            self.0.output_changed.notify_all();
            if gone {
                return;
            }
            if wake_port && let Some(port) = self.0.port.get() {
                port.output_ready();
            }
        }
    }

    fn read_in(&self, mut stream: UnixStream) {
        let mut buffer = [0; INPUT_BYTES];
        loop {
            let n = match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(n) => n,
            };
            let mut rest = buffer.get(..n).unwrap_or_default();
            lock(&self.0.state).delivering = true;
            while !rest.is_empty() {
                let (ticks, to_port, paused) = {
                    let s = lock(&self.0.state);
                    if s.closed {
                        return;
                    }
                    (s.ticks, s.port_open, s.paused)
                };
                let taken = if paused {
                    0
                } else {
                    self.deliver(rest, to_port)
                };
                rest = rest.get(taken..).unwrap_or_default();
                if taken == 0 {
                    let s = lock(&self.0.state);
                    let same = |s: &mut State| s.ticks == ticks && !s.closed;
                    drop(self.0.input_changed.wait_timeout_while(s, RECHECK, same));
                }
            }
            lock(&self.0.state).delivering = false;
            self.0.input_changed.notify_all();
        }
    }

    fn deliver(&self, bytes: &[u8], to_port: bool) -> usize {
        match (self.0.port.get(), self.0.uart.get().and_then(Weak::upgrade)) {
            (Some(port), _) if to_port => port.receive(bytes),
            (_, Some(uart)) => lock(&uart).receive(bytes),
            // Nobody will ever take it.
            _ => bytes.len(),
        }
    }
}

struct SerialEnd(Console);

impl SerialBackend for SerialEnd {
    fn write(&mut self, data: &[u8]) {
        self.0.scan(data);
        self.0.push_waiting(data);
    }
    fn room(&mut self) {
        self.0.tick();
    }
}

struct PortEnd(Console);

impl PortBackend for PortEnd {
    fn attach(&self, guest: Arc<dyn PortSink>) {
        let _ = self.0.0.port.set(guest);
    }
    fn write(&self, bytes: &[u8]) -> usize {
        let n = self.0.push(bytes);
        if n < bytes.len() {
            lock(&self.0.0.state).port_waits = true;
            self.0.0.output_changed.notify_all();
        }
        n
    }
    fn input_ready(&self) {
        self.0.tick();
    }
    fn guest_open(&self, open: bool) {
        lock(&self.0.0.state).port_open = open;
        self.0.tick();
    }
}
