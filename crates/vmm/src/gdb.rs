//! The GDB stub: a debugger outside the guest, by the GDB remote serial protocol (GDB manual,
//! appendix "GDB Remote Serial Protocol").
//!
//! Threads are vCPUs, numbered from 1. While the debugger has the guest stopped, all of the VM
//! stands still, time included. Breakpoints and watchpoints are the engine's
//! ([`pyrite_engine::DebugPlan`]); the guest cannot see them. Memory is what the page tables of the
//! selected vCPU show, or guest-physical if that is asked for in QEMU's words
//! (`maintenance packet Qqemu.PhyMemMode:1`) or ours (`monitor physical on`).
//!
//! A debugger can do everything to the guest, and whoever can connect is one: the stub is off unless
//! asked for, and listens on a Unix socket of its owner or on the loopback only. What comes through
//! the connection has limits all the same ([`packet`], [`command`]).
//!
//! Threads of the host: `gdb` takes connections, one debugger at a time. `gdb-client` reads packets
//! and answers them; `gdb-notices` tells the debugger when the guest stops. Both reach the VM
//! through the state driver's queue only.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use pyrite_api::v1::Listen;
use pyrite_engine::{CpuidTable, DebugCaps, DebugStop, Watch};
use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;

use crate::listen::{Stream, listen_unix};
use crate::run::Event;

mod command;
mod memory;
mod packet;
mod registers;
mod session;
#[cfg(test)]
mod tests;

pub use command::Go;

/// How long one that has just detached may take to be gone when the next one comes.
const LEAVES_WITHIN: Duration = Duration::from_secs(1);

/// What a debugger wants of the state driver.
#[derive(Debug)]
pub enum Request {
    /// It has come: the guest stops.
    Attach {
        /// Hears when the guest stops.
        notices: Sender<Notice>,
        /// Whether that went well.
        answer: Sender<Result<(), String>>,
    },
    /// The guest is to stop; that it has comes as a notice.
    Interrupt,
    /// The guest goes on.
    Resume(Resume),
    /// The registers of a vCPU.
    State {
        /// Which.
        vcpu: u32,
        /// For them.
        answer: Sender<Result<Box<CpuState>, String>>,
    },
    /// Other registers for a vCPU.
    SetState {
        /// Which.
        vcpu: u32,
        /// They.
        state: Box<CpuState>,
        /// Whether they make sense.
        answer: Sender<Result<(), String>>,
    },
    /// The reset button.
    Reset {
        /// Whether that went well.
        answer: Sender<Result<(), String>>,
    },
    /// It goes.
    Detach {
        /// Its connection broke.
        is_lost: bool,
    },
    /// The VM ends.
    Kill,
}

/// How the guest goes on.
#[derive(Clone, Debug)]
pub struct Resume {
    /// What each vCPU does; none stays where it is.
    pub goes: Vec<Option<Go>>,
    /// Breakpoints, as linear addresses.
    pub stops: Vec<u64>,
    /// Watchpoints.
    pub watches: Vec<Watch>,
    /// Interrupts wait while a vCPU steps.
    pub hold_interrupts: bool,
}

/// What the debugger is told.
#[derive(Debug)]
pub enum Notice {
    /// The guest has stopped.
    Stopped {
        /// The vCPU that is the reason.
        vcpu: u32,
        /// Why.
        cause: Cause,
        /// Its RIP: an offset in the code segment.
        rip: u64,
    },
    /// The VM ends.
    Ended {
        /// As it should.
        is_clean: bool,
        /// Disconnected when the debugger was told.
        told: Sender<()>,
    },
}

/// Why the guest has stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The debugger came.
    Attached,
    /// The debugger asked for it.
    Interrupted,
    /// Something that it waited for.
    Debug(DebugStop),
    /// It could not go on.
    Failed(String),
}

/// What the stub knows of the VM.
#[derive(Clone)]
pub struct Target {
    /// RAM.
    pub memory: Arc<GuestMemory>,
    /// The state driver's queue.
    pub driver: Sender<Event>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What the engine can do.
    pub caps: DebugCaps,
    /// The guest's CPUID.
    pub cpuid: CpuidTable,
}

enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// A stub that listens.
pub struct Server(Listener);

impl Server {
    /// Listens; debuggers wait until [`Server::serve`].
    pub fn listen(at: &Listen) -> io::Result<Server> {
        Ok(Server(match at {
            Listen::Unix(path) => Listener::Unix(listen_unix(path)?, path.clone()),
            Listen::Tcp(address) => Listener::Tcp(TcpListener::bind(address)?),
        }))
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        match &self.0 {
            Listener::Unix(_, path) => path.display().to_string(),
            Listener::Tcp(l) => l
                .local_addr()
                .map_or_else(|e| e.to_string(), |a| a.to_string()),
        }
    }

    /// Takes debuggers from now on, one at a time, on threads of its own.
    pub fn serve(self, target: Target) -> io::Result<()> {
        let is_busy = Arc::new(AtomicBool::new(false));
        std::thread::Builder::new()
            .name("gdb".into())
            .spawn(move || {
                loop {
                    let stream = match &self.0 {
                        Listener::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
                        Listener::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
                    };
                    match stream {
                        Ok(s) => take(&target, &is_busy, s),
                        // Out of descriptors, for instance: others may be closed meanwhile.
                        Err(e) => {
                            tracing::warn!("GDB stub: {e}");
                            std::thread::sleep(Duration::from_millis(200));
                        }
                    }
                }
            })?;
        Ok(())
    }
}

/// Serves a debugger, unless one is there.
fn take(target: &Target, is_busy: &Arc<AtomicBool>, stream: Stream) {
    let until = Instant::now() + LEAVES_WITHIN;
    while is_busy.swap(true, Ordering::AcqRel) {
        if Instant::now() > until {
            tracing::warn!("GDB stub: a second debugger is turned away");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let (target, busy) = (target.clone(), Arc::clone(is_busy));
    let started = std::thread::Builder::new()
        .name("gdb-client".into())
        .spawn(move || {
            if let Err(e) = session::run(&target, stream) {
                tracing::info!("GDB stub: {e}");
            }
            busy.store(false, Ordering::Release);
        });
    if let Err(e) = started {
        tracing::warn!("GDB stub: {e}");
        is_busy.store(false, Ordering::Release);
    }
}
