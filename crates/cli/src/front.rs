//! The front process of `pyrite run`: owns the terminal, starts the VM process, says how it ended.
//!
//! The VM process is this program again (`pyrite vmm`), in a process group of its own so that keys
//! which the host's terminal turns into signals do not reach it. Its standard input is one end of
//! the control socket and its standard output one end of the console socket; both close when
//! either process dies, so neither outlives the other.
//!
//! Threads: this one (decides), one that reads control messages, one that reads what is typed, one
//! that shows what the guest prints, one that waits for signals; with `--control` one that accepts
//! connections and one per connection.

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pyrite_api::control::{
    self, Command, Ending, Event, Hello, Message, Outcome, PROTOCOL, Request,
};
use pyrite_api::v1::{ConsoleKind, VmSpec};

use crate::escape::{self, EscapeKey, Typed};
use crate::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{ctl, exit, log};

/// LIMIT: events waiting for the deciding thread.
const QUEUE: usize = 64;
/// How long a VM process may take to end when asked.
const END_WITHIN: Duration = Duration::from_secs(5);
/// How long what is typed behind a break waits for it.
const BREAK_WITHIN: Duration = Duration::from_secs(2);
/// How much later than its time limit a VM process is ended by force.
const LIMIT_GRACE: Duration = Duration::from_secs(10);

/// What the deciding thread hears.
enum Heard {
    Vm(Message),
    VmGone(Option<std::io::Error>),
    Typed(Typed),
    Signal(libc::c_int),
    /// A request from the `--control` socket, and where its outcome goes.
    Asked(Command, SyncSender<Outcome>),
}

/// A running VM, seen from the front.
struct Session {
    control: UnixStream,
    child: Child,
    terminal: Option<RawTerminal>,
    next_id: u64,
    /// Requests of others that wait for their outcome, by id.
    waiting: HashMap<u64, SyncSender<Outcome>>,
    /// The person has asked for the end.
    quitting: bool,
    /// When the VM process is ended by force.
    kill_at: Option<Instant>,
    ending: Option<Ending>,
}

/// Runs a VM to its end; the exit code.
pub fn run(spec: VmSpec, log_filter: &str, socket: Option<&Path>) -> Result<u8> {
    let mut signals = Signals::watch().context("cannot watch for signals")?;
    let interactive = spec.console != ConsoleKind::None;
    let socket = socket.map(ctl::Socket::bind).transpose()?;
    let (control, control_vm) = UnixStream::pair().context("cannot make the control socket")?;
    let (console, console_vm) = UnixStream::pair().context("cannot make the console socket")?;
    let terminal = if interactive {
        RawTerminal::enter()
    } else {
        None
    };
    let child = spawn(control_vm, console_vm, log_filter, terminal.is_some())?;

    let (heard, events) = sync_channel(QUEUE);
    let output = show_output(
        console
            .try_clone()
            .context("cannot share the console socket")?,
    )?;
    if interactive {
        read_keys(
            console
                .try_clone()
                .context("cannot share the console socket")?,
            &heard,
            terminal.is_some(),
        )?;
    }
    hear_vm(
        control
            .try_clone()
            .context("cannot share the control socket")?,
        &heard,
    )?;
    let from_signals = heard.clone();
    thread("signals", move || {
        while let Ok(signal) = signals.next() {
            if from_signals.send(Heard::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    if let Some(s) = &socket {
        let asked = heard.clone();
        s.serve(move |command, outcome| asked.send(Heard::Asked(command, outcome)).is_ok())?;
    }
    drop(heard);

    let kill_at = spec
        .time_limit_ms
        .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms) + LIMIT_GRACE));
    let time_limited = kill_at.is_some();
    let mut session = Session {
        control,
        child,
        terminal,
        next_id: 0,
        waiting: HashMap::new(),
        quitting: false,
        kill_at,
        ending: None,
    };
    let hello = Hello {
        protocol: PROTOCOL,
        spec,
        terminal_size: terminal::size(),
    };
    // A VM process that died already is noticed by its reader.
    let _ = control::send(&mut session.control, &hello);
    session.decide(&events);
    Ok(session.finish(output, &console, time_limited))
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .with_context(|| format!("cannot start the {name} thread"))
}

fn spawn(control: UnixStream, console: UnixStream, log_filter: &str, raw: bool) -> Result<Child> {
    // The running program itself, even if its file has been replaced or removed.
    let program = std::path::Path::new("/proc/self/exe");
    let mut process = Process::new(program);
    process
        .arg0("pyrite")
        .arg("vmm")
        .env(log::FILTER_VAR, log_filter)
        .env(log::RAW_VAR, if raw { "1" } else { "0" })
        .stdin(Stdio::from(OwnedFd::from(control)))
        .stdout(Stdio::from(OwnedFd::from(console)))
        .process_group(0);
    process.spawn().context("cannot start the VM process")
}

/// Copies what the guest prints to standard output until the VM process closes it.
fn show_output(mut console: UnixStream) -> Result<JoinHandle<()>> {
    thread("output", move || {
        let mut out = std::io::stdout();
        let mut buffer = [0; 16 << 10];
        let mut broken = false;
        loop {
            match console.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                // Goes on reading when nobody listens: the guest must not stop for that.
                Ok(n) if !broken => {
                    let part = buffer.get(..n).unwrap_or_default();
                    broken = out.write_all(part).and_then(|()| out.flush()).is_err();
                }
                Ok(_) => {}
            }
        }
    })
}

/// Sends what is typed to the guest, and escape keys to the deciding thread. `raw`: a terminal,
/// whose input only ends when it is gone. That is a hang-up, of which a process that does not lead
/// its session need not get a signal (under su, for one).
fn read_keys(mut console: UnixStream, heard: &SyncSender<Heard>, raw: bool) -> Result<()> {
    let heard = heard.clone();
    thread("input", move || {
        let mut keys = EscapeKey::default();
        let mut input = std::io::stdin();
        let mut buffer = [0; 4096];
        loop {
            let n = match input.read(&mut buffer) {
                Ok(0) | Err(_) => {
                    if raw {
                        // A deciding thread that is gone ends the VM anyway.
                        let _ = heard.send(Heard::Signal(libc::SIGHUP));
                    }
                    return;
                }
                Ok(n) => n,
            };
            for typed in keys.feed(buffer.get(..n).unwrap_or_default()) {
                let gone = match typed {
                    Typed::Bytes(b) => console.write_all(&b).is_err(),
                    Typed::Break => {
                        // It goes another way than the keys: those behind it wait until it is there.
                        let (to, outcome) = sync_channel(1);
                        let asked = heard.send(Heard::Asked(Command::Break, to));
                        let _ = outcome.recv_timeout(BREAK_WITHIN);
                        asked.is_err()
                    }
                    other => heard.send(Heard::Typed(other)).is_err(),
                };
                if gone {
                    return;
                }
            }
        }
    })?;
    Ok(())
}

fn hear_vm(control: UnixStream, heard: &SyncSender<Heard>) -> Result<()> {
    let heard = heard.clone();
    thread("control", move || {
        let mut from = BufReader::new(control);
        loop {
            let (what, last) = match control::receive(&mut from) {
                Ok(Some(m)) => (Heard::Vm(m), false),
                Ok(None) => (Heard::VmGone(None), true),
                Err(e) => (Heard::VmGone(Some(e)), true),
            };
            if heard.send(what).is_err() || last {
                return;
            }
        }
    })?;
    Ok(())
}

impl Session {
    fn decide(&mut self, events: &Receiver<Heard>) {
        while self.ending.is_none() {
            let event = match self.kill_at {
                Some(at) => events.recv_timeout(at.saturating_duration_since(Instant::now())),
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Heard::Vm(Message::Event(e))) => self.vm_event(e),
                Ok(Heard::Vm(Message::Reply { id, outcome })) => self.reply(id, outcome),
                Ok(Heard::Asked(command, outcome)) => {
                    let id = self.ask(command);
                    self.waiting.insert(id, outcome);
                }
                Ok(Heard::Typed(t)) => self.typed(t),
                Ok(Heard::Signal(s)) => self.signal(s),
                Ok(Heard::VmGone(e)) => {
                    if let Some(e) = e {
                        self.say(&format!("lost the VM process: {e}"));
                    }
                    return;
                }
                // Out of time: `finish` ends it by force.
                Err(_) => return,
            }
        }
    }

    fn vm_event(&mut self, event: Event) {
        match event {
            Event::Started { engine, why } => tracing::info!(engine, why, "the guest runs"),
            Event::Reset { count } => tracing::info!(count, "the guest reset the machine"),
            Event::DiskError { disk, problem } => self.say(&format!(
                "the VM is paused because of an error of the host\n{problem}\n\
                 When it can be read and written again, resume the VM (pyrite ctl SOCKET resume); \
                 what failed is then tried again. To let the guest see the error instead: \
                 pyrite ctl SOCKET disk {disk} on-error=report, then resume"
            )),
            Event::KernelPanic { line } => self.say(&format!("guest kernel panic: {line}")),
            Event::GuestPanicked {
                crash_kernel,
                is_paused,
            } => self.say(match (crash_kernel, is_paused) {
                (true, _) => "the guest has panicked and starts its crash kernel",
                (false, true) => {
                    "the guest has panicked and is paused; pyrite ctl SOCKET dump FILE writes its \
                     memory, and resume lets it go on"
                }
                (false, false) => "the guest has panicked",
            }),
            Event::Ended(ending) => self.ending = Some(ending),
        }
    }

    fn reply(&mut self, id: u64, outcome: Outcome) {
        match (self.waiting.remove(&id), outcome) {
            // One who asked and went away does not want to know.
            (Some(to), outcome) => drop(to.try_send(outcome)),
            (None, Outcome::Failed(why)) => self.say(&why),
            (None, Outcome::Tree(tree)) => {
                let text = ctl::show(&tree).replace('\n', self.newline());
                let mut out = std::io::stdout();
                let _ = write!(out, "{}{text}", self.newline()).and_then(|()| out.flush());
            }
            (None, Outcome::Done) => {}
        }
    }

    fn typed(&mut self, typed: Typed) {
        match typed {
            // The thread that reads them has dealt with them.
            Typed::Bytes(_) | Typed::Break => {}
            Typed::Help => {
                let text = escape::HELP.replace('\n', self.newline());
                let mut out = std::io::stdout();
                let _ = write!(out, "{}{text}", self.newline()).and_then(|()| out.flush());
            }
            Typed::Quit => self.quit(),
            Typed::Reset => drop(self.ask(Command::Reset)),
            Typed::PowerButton => drop(self.ask(Command::PowerButton)),
            Typed::Inspect => drop(self.ask(Command::Inspect {
                path: String::new(),
            })),
        }
    }

    fn signal(&mut self, signal: libc::c_int) {
        match signal {
            libc::SIGWINCH => {
                if let Some((columns, rows)) = terminal::size() {
                    self.ask(Command::Resize { columns, rows });
                }
            }
            libc::SIGTSTP => {
                if let Some(t) = &self.terminal {
                    t.suspend();
                }
                signals::stop_self();
            }
            libc::SIGCONT => {
                if let Some(t) = &self.terminal {
                    t.again();
                }
            }
            _ => self.quit(),
        }
    }

    fn quit(&mut self) {
        self.quitting = true;
        self.ask(Command::Stop);
        let at = Instant::now() + END_WITHIN;
        self.kill_at = Some(self.kill_at.map_or(at, |k| k.min(at)));
    }

    /// Sends a request; its id.
    fn ask(&mut self, command: Command) -> u64 {
        self.next_id += 1;
        // A VM process that is gone is noticed by its reader.
        let _ = control::send(
            &mut self.control,
            &Request {
                id: self.next_id,
                command,
            },
        );
        self.next_id
    }

    fn newline(&self) -> &'static str {
        if self.terminal.is_some() {
            "\r\n"
        } else {
            "\n"
        }
    }

    fn say(&self, text: &str) {
        let nl = self.newline();
        eprint!("{nl}pyrite: {}{nl}", text.trim_end().replace('\n', nl));
    }

    /// Waits for the VM process, puts the terminal back, reports.
    fn finish(mut self, output: JoinHandle<()>, console: &UnixStream, time_limited: bool) -> u8 {
        let forced = self.ending.is_none() && self.kill_at.is_some_and(|k| Instant::now() >= k);
        let end_by = Instant::now() + if forced { Duration::ZERO } else { END_WITHIN };
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if Instant::now() < end_by => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => {
                    let _ = self.child.kill();
                    break self.child.wait().ok();
                }
            }
        };
        // The output thread ends when it has shown everything: the VM process has closed its end.
        let drained = Instant::now() + END_WITHIN;
        while !output.is_finished() && Instant::now() < drained {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = console.shutdown(Shutdown::Both);
        drop(self.terminal.take());
        let ending = self.ending.unwrap_or_else(|| match status {
            _ if self.quitting => Ending::Stopped,
            _ if forced && time_limited => Ending::TimeLimit,
            Some(s) => Ending::Failed {
                reason: match s.signal() {
                    Some(n) => format!("the VM process was killed by signal {n}"),
                    None => format!("the VM process ended unexpectedly ({s})"),
                },
            },
            None => Ending::Failed {
                reason: "the VM process was lost".into(),
            },
        });
        if let Some(text) = exit::message(&ending) {
            eprintln!("pyrite: {text}");
        }
        exit::code(&ending)
    }
}
