//! One debugger, from its first packet to its last.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pyrite_engine::{DebugPlan, DebugStop, Watch, WatchKind};
use pyrite_vdev::bus::lock;
use pyrite_x86::CpuState;

use super::command::{Command, Go, Point, Thread, parse};
use super::memory::{View, translate};
use super::packet::{self, Incoming, MAX_PACKET_BYTES, Parser, to_hex};
use super::registers::{Arch, Registers};
use super::{Cause, Notice, Request, Resume, Target};
use crate::listen::Stream;
use crate::run::Event;

/// How long a debugger is waited for that does not read.
const STALLED: Duration = Duration::from_secs(20);
/// `qqemu.sstep`: single steps; interrupts wait meanwhile; so do timers. They are not told apart
/// here: what waits are interrupts. QEMU's documentation, docs/system/gdb.rst.
const SSTEP_ENABLE: u64 = 1;
const SSTEP_NOIRQ: u64 = 2;
const SSTEP_NOTIMER: u64 = 4;

const OK: &[u8] = b"OK";
/// EFAULT.
const BAD_ADDRESS: &[u8] = b"E0e";
/// EINVAL.
const BAD_PACKET: &[u8] = b"E16";
/// ESRCH.
const NO_THREAD: &[u8] = b"E03";

const MONITOR_HELP: &str = "\
physical [on|off]    memory addresses are guest-physical
translate ADDR       the guest-physical address behind a linear one
interrupts [on|off]  interrupts come while single-stepping
reset                press the reset button; the guest stays stopped
";

/// What both threads of a session have.
struct Shared {
    wire: Mutex<Wire>,
    status: Mutex<Status>,
}

/// The way to the debugger.
struct Wire {
    stream: Stream,
    /// Packets are acknowledged.
    acks: bool,
    /// In case it must be sent again.
    last: Vec<u8>,
}

struct Status {
    /// The guest is stopped, and the debugger knows it or is just told.
    halted: bool,
    /// What was told last.
    stop: (u32, Cause),
    /// RIP at that time.
    rip: u64,
    swbreak: bool,
    hwbreak: bool,
    /// Breakpoints, and those that the debugger set as hardware ones.
    software: BTreeSet<u64>,
    hardware: BTreeSet<u64>,
}

impl Wire {
    fn send(&mut self, content: &[u8]) -> io::Result<()> {
        self.last = packet::frame(content);
        self.stream.write_all(&self.last)
    }
}

/// A debugger's session.
struct Session<'a> {
    target: &'a Target,
    shared: Arc<Shared>,
    registers: Registers,
    /// Registers of vCPUs that were looked at since the guest stopped.
    states: BTreeMap<u32, Box<CpuState>>,
    /// The vCPU that packets about state are about.
    selected: u32,
    /// The thread that steps; see `Command::SelectForGo`.
    goes: Thread,
    stops: BTreeSet<u64>,
    hardware: BTreeSet<u64>,
    watches: Vec<Watch>,
    physical: bool,
    sstep: u64,
}

/// How a session ended.
enum End {
    Detached,
    Killed,
    Lost(Option<io::Error>),
}

fn gone<T>(_: T) -> String {
    "the VM has ended".into()
}

/// Asks the state driver something.
fn ask<T>(
    target: &Target,
    request: impl FnOnce(Sender<Result<T, String>>) -> Request,
) -> Result<T, String> {
    let (answer, from) = channel();
    let event = Event::Debugger(request(answer));
    target.driver.send(event).map_err(gone)?;
    from.recv().map_err(gone)?
}

/// Where AVX state is in the guest's XSAVE area, if it has any. Intel SDM Vol. 2A, CPUID leaf 0DH.
fn avx_at(target: &Target) -> Option<usize> {
    let user = target.cpuid.get(0xd, 0)?;
    let component = target.cpuid.get(0xd, 2)?;
    (user.eax & 4 != 0 && component.ebx != 0).then_some(component.ebx as usize)
}

/// Serves a debugger until it goes.
pub fn run(target: &Target, mut stream: Stream) -> io::Result<()> {
    stream.set_write_timeout(STALLED)?;
    let (notices, stopped) = channel();
    ask(target, |answer| Request::Attach { notices, answer }).map_err(io::Error::other)?;
    let state = ask(target, |answer| Request::State { vcpu: 0, answer });
    let has_long_mode = (target.cpuid.get(0x8000_0001, 0)).is_some_and(|e| e.edx >> 29 & 1 != 0);
    let arch = state.map_or(Arch::Amd64, |s| Arch::of(&s, has_long_mode));
    let shared = Arc::new(Shared {
        wire: Mutex::new(Wire {
            stream: stream.try_clone()?,
            acks: true,
            last: Vec::new(),
        }),
        status: Mutex::new(Status {
            halted: true,
            stop: (0, Cause::Attached),
            rip: 0,
            software: BTreeSet::new(),
            swbreak: false,
            hwbreak: false,
            hardware: BTreeSet::new(),
        }),
    });
    let told = Arc::clone(&shared);
    let listening = std::thread::Builder::new()
        .name("gdb-notices".into())
        .spawn(move || tell(&told, &stopped));
    let mut session = Session {
        target,
        shared,
        registers: Registers::new(arch, avx_at(target)),
        states: BTreeMap::new(),
        selected: 0,
        goes: Thread::Any,
        stops: BTreeSet::new(),
        hardware: BTreeSet::new(),
        watches: Vec::new(),
        physical: false,
        sstep: SSTEP_ENABLE | SSTEP_NOIRQ | SSTEP_NOTIMER,
    };
    let end = match listening {
        Ok(_) => session.listen(&mut stream),
        Err(e) => End::Lost(Some(e)),
    };
    stream.close();
    let last = match end {
        End::Killed => Request::Kill,
        End::Detached => Request::Detach { is_lost: false },
        End::Lost(_) => Request::Detach { is_lost: true },
    };
    // A driver that is gone needs no requests.
    let _ = target.driver.send(Event::Debugger(last));
    match end {
        End::Lost(Some(e)) => Err(e),
        _ => Ok(()),
    }
}

/// Tells the debugger what the driver says, until it forgets about the debugger.
fn tell(shared: &Shared, stopped: &Receiver<Notice>) {
    while let Ok(notice) = stopped.recv() {
        let mut status = lock(&shared.status);
        let was_running = !status.halted;
        let content = match &notice {
            Notice::Stopped { vcpu, cause, rip } => {
                status.halted = true;
                status.rip = *rip;
                status.stop = (*vcpu, cause.clone());
                stop_reply(&status)
            }
            Notice::Ended { is_clean, .. } => {
                status.halted = true;
                format!("W{:02x}", u8::from(!is_clean))
            }
        };
        // A debugger that has not let the guest go on waits for the answer to something else.
        if was_running {
            let mut wire = lock(&shared.wire);
            if let Cause::Failed(why) = &status.stop.1 {
                let text = format!("pyrite: {why}\n");
                let _ = wire.send(format!("O{}", to_hex(text.as_bytes())).as_bytes());
            }
            // The reader notices if the connection is gone.
            let _ = wire.send(content.as_bytes());
        }
    }
}

/// Why the guest stands still, as a packet.
fn stop_reply(status: &Status) -> String {
    let (vcpu, cause) = &status.stop;
    let thread = format!("thread:{:x};", vcpu + 1);
    match cause {
        Cause::Interrupted => format!("T02{thread}"),
        Cause::Debug(DebugStop::Watchpoint { at, kind }) => {
            let kind = match kind {
                WatchKind::Write => "watch",
                WatchKind::Read => "rwatch",
                WatchKind::Access => "awatch",
            };
            format!("T05{kind}:{at:x};{thread}")
        }
        Cause::Debug(DebugStop::Breakpoint) => {
            // A debugger that finds no breakpoint of its own at RIP takes the reason for a late one
            // and goes on, so it is told only if RIP is the address: not in a segment with a base.
            let reason = if status.hwbreak && status.hardware.contains(&status.rip) {
                "hwbreak:;"
            } else if status.swbreak && status.software.contains(&status.rip) {
                "swbreak:;"
            } else {
                ""
            };
            format!("T05{reason}{thread}")
        }
        Cause::Attached | Cause::Debug(DebugStop::Step) | Cause::Failed(_) => {
            format!("T05{thread}")
        }
    }
}

/// What follows an answer.
enum After {
    GoOn,
    End(End),
}

impl Session<'_> {
    fn listen(&mut self, stream: &mut Stream) -> End {
        let mut parser = Parser::default();
        let mut buffer = [0; 4096];
        loop {
            let n = match stream.read(&mut buffer) {
                Ok(0) => return End::Lost(None),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return End::Lost(Some(e)),
            };
            for byte in buffer.get(..n).unwrap_or_default() {
                let Some(incoming) = parser.feed(*byte) else {
                    continue;
                };
                match self.hear(incoming) {
                    Ok(After::GoOn) => {}
                    Ok(After::End(end)) => return end,
                    Err(e) => return End::Lost(Some(e)),
                }
            }
        }
    }

    fn hear(&mut self, incoming: Incoming) -> io::Result<After> {
        match incoming {
            Incoming::Ack => {}
            Incoming::Nak => {
                let mut wire = lock(&self.shared.wire);
                let last = std::mem::take(&mut wire.last);
                wire.stream.write_all(&last)?;
                wire.last = last;
            }
            Incoming::Interrupt => {
                // One that crosses the notice that the guest has stopped is late.
                if !lock(&self.shared.status).halted {
                    let event = Event::Debugger(Request::Interrupt);
                    self.target.driver.send(event).map_err(io::Error::other)?;
                }
            }
            Incoming::Damaged => {
                let mut wire = lock(&self.shared.wire);
                if wire.acks {
                    wire.stream.write_all(b"-")?;
                }
            }
            Incoming::TooLong => self.answer(BAD_PACKET)?,
            Incoming::Packet(content) => {
                {
                    let mut wire = lock(&self.shared.wire);
                    if wire.acks {
                        // One that only wants the VM to end may be gone already.
                        let _ = wire.stream.write_all(b"+");
                    }
                }
                return self.obey(parse(&content));
            }
        }
        Ok(After::GoOn)
    }

    fn answer(&self, content: &[u8]) -> io::Result<()> {
        lock(&self.shared.wire).send(content)
    }

    fn obey(&mut self, command: Command) -> io::Result<After> {
        match command {
            // A debugger may be gone before it is answered; it has what it wants all the same.
            Command::Detach => {
                let _ = self.answer(OK);
                return Ok(After::End(End::Detached));
            }
            Command::Kill => {
                let _ = self.answer(OK);
                return Ok(After::End(End::Killed));
            }
            Command::NoAck => {
                self.answer(OK)?;
                lock(&self.shared.wire).acks = false;
                return Ok(After::GoOn);
            }
            _ => {}
        }
        if !lock(&self.shared.status).halted {
            self.answer(b"E.the guest runs; interrupt it first")?;
            return Ok(After::GoOn);
        }
        if let Command::Go(actions, at) = &command {
            match self.resume(actions, *at) {
                // The answer is the notice that the guest has stopped.
                Ok(()) => {}
                Err(text) => self.answer(&text)?,
            }
            return Ok(After::GoOn);
        }
        let text = self.reply(command);
        self.answer(&text)?;
        Ok(After::GoOn)
    }

    /// The answer to a command that neither ends the session nor lets the guest go on.
    fn reply(&mut self, command: Command) -> Vec<u8> {
        match command {
            Command::Supported { swbreak, hwbreak } => {
                let mut status = lock(&self.shared.status);
                (status.swbreak, status.hwbreak) = (swbreak, hwbreak);
                let most = MAX_PACKET_BYTES;
                format!(
                    "PacketSize={most:x};QStartNoAckMode+;qXfer:features:read+;vContSupported+;\
                     swbreak+;hwbreak+"
                )
                .into()
            }
            Command::WhyStopped => stop_reply(&lock(&self.shared.status)).into(),
            Command::ReadRegisters
            | Command::ReadRegister(_)
            | Command::WriteRegisters(_)
            | Command::WriteRegister(..) => self.registers_reply(command),
            Command::ReadMemory(at, len) => match self.view(|v| v.read(at, len)) {
                Ok(bytes) if !bytes.is_empty() || len == 0 => to_hex(&bytes).into(),
                _ => BAD_ADDRESS.into(),
            },
            Command::WriteMemory(at, data) => match self.view(|v| v.write(at, &data)) {
                Ok(true) => OK.into(),
                _ => BAD_ADDRESS.into(),
            },
            Command::Insert(point) => self.insert(point),
            Command::Remove(point) => {
                self.remove(point);
                OK.into()
            }
            Command::GoKinds => b"vCont;c;C;s;S".into(),
            Command::SelectForState(t) => match self.one(t) {
                Some(vcpu) => {
                    self.selected = vcpu;
                    OK.into()
                }
                None => NO_THREAD.into(),
            },
            Command::SelectForGo(t) => {
                if self.one(t).is_none() {
                    return NO_THREAD.into();
                }
                self.goes = t;
                OK.into()
            }
            Command::IsAlive(t) => match self.one(t) {
                Some(_) => OK.into(),
                None => NO_THREAD.into(),
            },
            Command::CurrentThread => format!("QC{:x}", self.selected + 1).into(),
            Command::Threads => {
                let all: Vec<String> = (1..=self.target.vcpus).map(|n| format!("{n:x}")).collect();
                format!("m{}", all.join(",")).into()
            }
            Command::MoreThreads => b"l".into(),
            Command::ThreadName(t) => self.thread_name(t),
            // It was there before the debugger: leaving means to let it go on.
            Command::Attached => b"1".into(),
            Command::Description(at, len) => {
                let all = self.registers.description().into_bytes();
                let rest = all.get(at..).unwrap_or_default();
                let (more, part) = match rest.get(..len) {
                    Some(part) if part.len() < rest.len() => (b'm', part),
                    _ => (b'l', rest),
                };
                let mut reply = vec![more];
                reply.extend(packet::escape(part));
                reply
            }
            Command::Monitor(line) => match self.monitor(&line) {
                text if text.is_empty() => OK.into(),
                text => to_hex(text.as_bytes()).into(),
            },
            Command::IsPhysical => if self.physical { b"1" } else { b"0" }.into(),
            Command::SetPhysical(on) => {
                self.physical = on;
                OK.into()
            }
            Command::StepBits => {
                let all = [
                    ("ENABLE", SSTEP_ENABLE),
                    ("NOIRQ", SSTEP_NOIRQ),
                    ("NOTIMER", SSTEP_NOTIMER),
                ];
                let all: Vec<String> = all.iter().map(|(n, b)| format!("{n}={b:x}")).collect();
                all.join(",").into()
            }
            Command::Step => format!("0x{:x}", self.sstep).into(),
            Command::SetStep(bits) => {
                if bits & !(SSTEP_ENABLE | SSTEP_NOIRQ | SSTEP_NOTIMER) != 0 {
                    return BAD_PACKET.into();
                }
                self.sstep = bits;
                OK.into()
            }
            Command::Bad => BAD_PACKET.into(),
            // The rest was dealt with before.
            Command::Unknown
            | Command::NoAck
            | Command::Go(..)
            | Command::Detach
            | Command::Kill => Vec::new(),
        }
    }

    /// The vCPU that a thread stands for where one is meant.
    fn one(&self, t: Thread) -> Option<u32> {
        match t {
            Thread::Any | Thread::All => Some(self.selected),
            Thread::One(n) if (1..=self.target.vcpus).contains(&n) => Some(n - 1),
            Thread::One(_) => None,
        }
    }

    /// Registers of a vCPU.
    fn state(&mut self, vcpu: u32) -> Result<&mut Box<CpuState>, String> {
        use std::collections::btree_map::Entry;
        match self.states.entry(vcpu) {
            Entry::Occupied(there) => Ok(there.into_mut()),
            Entry::Vacant(place) => {
                let state = ask(self.target, |answer| Request::State { vcpu, answer })?;
                Ok(place.insert(state))
            }
        }
    }

    fn view<R>(&mut self, f: impl FnOnce(&View<'_>) -> R) -> Result<R, String> {
        let (target, physical) = (self.target, self.physical);
        let state = self.state(self.selected)?;
        Ok(f(&View {
            memory: &target.memory,
            tables: (!physical).then_some(state),
            physical_bits: physical_bits(target),
        }))
    }

    fn registers_reply(&mut self, command: Command) -> Vec<u8> {
        let error = |e: &str| format!("E.{e}").into();
        let vcpu = self.selected;
        let mut state = match self.state(vcpu) {
            Ok(s) => s.clone(),
            Err(e) => return error(&e),
        };
        let changed = match command {
            Command::ReadRegister(n) => {
                return match self.registers.read(&state, n) {
                    Some(value) => to_hex(&value).into(),
                    None => BAD_PACKET.into(),
                };
            }
            Command::WriteRegisters(bytes) => self.registers.write_all(&mut state, &bytes),
            Command::WriteRegister(n, bytes) => self.registers.write(&mut state, n, &bytes),
            _ => return to_hex(&self.registers.read_all(&state)).into(),
        };
        if let Err(e) = changed {
            return error(e);
        }
        let new = state.clone();
        let done = ask(self.target, |answer| Request::SetState {
            vcpu,
            state: new,
            answer,
        });
        match done {
            Ok(()) => {
                self.states.insert(vcpu, state);
                OK.into()
            }
            Err(e) => error(&e),
        }
    }

    fn insert(&mut self, point: Point) -> Vec<u8> {
        let mut plan = self.plan();
        match point {
            Point::Software(at) | Point::Hardware(at) => plan.stops.push(at),
            Point::Watch(w) => plan.watches.push(w),
        }
        plan.stops.sort_unstable();
        plan.stops.dedup();
        if let Err(e) = self.target.caps.check(&plan) {
            return format!("E.{e}").into();
        }
        match point {
            Point::Software(at) => drop(self.stops.insert(at)),
            Point::Hardware(at) => drop(self.hardware.insert(at)),
            Point::Watch(w) if self.watches.contains(&w) => {}
            Point::Watch(w) => self.watches.push(w),
        }
        OK.into()
    }

    fn remove(&mut self, point: Point) {
        match point {
            Point::Software(at) => drop(self.stops.remove(&at)),
            Point::Hardware(at) => drop(self.hardware.remove(&at)),
            Point::Watch(w) => self.watches.retain(|there| *there != w),
        }
    }

    /// All breakpoints and watchpoints.
    fn plan(&self) -> DebugPlan {
        DebugPlan {
            stops: self.stops.union(&self.hardware).copied().collect(),
            watches: self.watches.clone(),
            ..DebugPlan::default()
        }
    }

    fn resume(&mut self, actions: &[(Go, Thread)], at: Option<u64>) -> Result<(), Vec<u8>> {
        let mut goes = vec![None; self.target.vcpus as usize];
        for (go, thread) in actions {
            let who = match (thread, self.goes) {
                (Thread::Any, Thread::One(n)) => Thread::One(n),
                (Thread::Any, _) => Thread::One(lock(&self.shared.status).stop.0 + 1),
                (t, _) => *t,
            };
            if self.one(who).is_none() {
                return Err(NO_THREAD.into());
            }
            for (n, g) in (1..).zip(&mut goes) {
                if g.is_none() && (who == Thread::All || who == Thread::One(n)) {
                    *g = Some(*go);
                }
            }
        }
        if let Some(at) = at {
            let vcpu = lock(&self.shared.status).stop.0;
            let mut state = self.state(vcpu).map_err(|e| format!("E.{e}"))?.clone();
            state.rip = at;
            ask(self.target, |answer| Request::SetState {
                vcpu,
                state,
                answer,
            })
            .map_err(|e| format!("E.{e}"))?;
        }
        let plan = self.plan();
        self.states.clear();
        {
            let mut status = lock(&self.shared.status);
            status.halted = false;
            status.hardware.clone_from(&self.hardware);
            status.software.clone_from(&self.stops);
        }
        let resume = Resume {
            goes,
            stops: plan.stops,
            watches: plan.watches,
            hold_interrupts: self.sstep & SSTEP_NOIRQ != 0,
        };
        let event = Event::Debugger(Request::Resume(resume));
        // A VM that has ended says so by a notice, or by closing the connection.
        let _ = self.target.driver.send(event);
        Ok(())
    }

    fn thread_name(&mut self, t: Thread) -> Vec<u8> {
        let Some(vcpu) = self.one(t) else {
            return NO_THREAD.into();
        };
        let text = match self.state(vcpu) {
            Ok(s) => format!("vCPU {vcpu} [{:?}]", s.activity).to_lowercase(),
            Err(e) => e,
        };
        to_hex(text.as_bytes()).into()
    }

    /// `monitor` of the debugger; what it shows.
    fn monitor(&mut self, line: &str) -> String {
        let on_off = |text: &str| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        let said = |on| if on { "on\n" } else { "off\n" }.to_owned();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["physical"] => said(self.physical),
            ["physical", word] if on_off(word).is_some() => {
                self.physical = on_off(word) == Some(true);
                String::new()
            }
            ["interrupts"] => said(self.sstep & SSTEP_NOIRQ == 0),
            ["interrupts", word] if on_off(word).is_some() => {
                self.sstep |= SSTEP_NOIRQ;
                if on_off(word) == Some(true) {
                    self.sstep &= !SSTEP_NOIRQ;
                }
                String::new()
            }
            ["translate", address] => self.translate(address),
            ["reset"] => {
                self.states.clear();
                match ask(self.target, |answer| Request::Reset { answer }) {
                    Ok(()) => "the machine was reset; `maintenance flush register-cache` shows \
                               its new registers\n"
                        .into(),
                    Err(e) => format!("{e}\n"),
                }
            }
            [] | ["help"] => MONITOR_HELP.into(),
            _ => format!("{line}: unknown\n{MONITOR_HELP}"),
        }
    }

    fn translate(&mut self, address: &str) -> String {
        let digits = address.strip_prefix("0x").unwrap_or(address);
        let Ok(lin) = u64::from_str_radix(digits, 16) else {
            return format!("{address}: expected a hexadecimal address\n");
        };
        let target = self.target;
        match self.state(self.selected) {
            Err(e) => format!("{e}\n"),
            Ok(s) => match translate(&target.memory, s, physical_bits(target), lin) {
                Some((gpa, shift)) => {
                    format!("{gpa:#x}, in a page of {} KiB\n", (1u64 << shift) >> 10)
                }
                None => "not mapped\n".into(),
            },
        }
    }
}

/// Width of a guest-physical address. Intel SDM Vol. 2A, CPUID leaf 8000_0008H.
fn physical_bits(target: &Target) -> u8 {
    let leaf = target.cpuid.get(0x8000_0008, 0);
    leaf.map_or(40, |e| (e.eax & 0xff) as u8).clamp(32, 52)
}
