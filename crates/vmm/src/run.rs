//! The state driver: the only place that changes what a VM does.
//!
//! ```text
//!            run            pause
//!   Paused ───────▶ Running ──────▶ Paused ──▶ save, restore, reset, end
//! ```
//!
//! One thread takes [`Event`]s from one queue. To pause: vCPUs stop, then time, then console
//! input, then every unit, and all work in flight is waited for. To run: the same backwards.

use std::collections::VecDeque;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pyrite_api::control::{
    self, Command, Ending, Event as Notice, MAX_STROKES, MAX_TEXT_CHARS, Message, Outcome, Request,
    Stroke, Tree,
};
use pyrite_api::v1::{
    ResetPolicy, SNAPSHOT_FORMAT, ScreenSpec, SnapshotManifest, SpecError, VmSpec,
};
use pyrite_engine::{StopReason, saved};
use pyrite_state::Inspect;
use pyrite_vdev::MachineEvents;
use pyrite_vdev::bus::lock;
use pyrite_x86::CpuState;

use crate::boot::BootImage;
use crate::display::input::Input;
use crate::machine::Machine;
use crate::snapshot;

pub mod console;
mod panic_line;
mod vcpus;

use vcpus::Vcpus;

/// More resets in a row than this, each sooner than [`LOOP_UPTIME_NS`], are a loop.
const LOOP_RESETS: u32 = 5;
/// A guest that ran this long has booted.
const LOOP_UPTIME_NS: u64 = 10_000_000_000;
/// How long a guest kernel is silent after it said that it panics before it counts as dead.
const PANIC_SILENCE: Duration = Duration::from_secs(2);
/// How long vCPUs may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(20);
/// How long work in flight may take to finish.
const DRAIN_WITHIN: Duration = Duration::from_secs(60);

/// What the driver reacts to. This list is closed: nothing else reaches it.
#[derive(Debug)]
pub enum Event {
    /// A vCPU came back.
    VcpuStopped {
        /// Which.
        index: u32,
        /// Why.
        reason: StopReason,
    },
    /// The guest wants something of the machine; see [`GuestRequests`].
    Guest,
    /// A request of the front process.
    Request(Request),
    /// The front process is gone.
    FrontGone,
    /// The guest kernel says that it panics, or (`None`) has gone on after all.
    Panic(Option<String>),
}

const POWER_OFF: u32 = 1 << 0;
const RESET: u32 = 1 << 1;
const SUSPEND: u32 = 1 << 2;
const DEBUG_EXIT: u32 = 1 << 3;

/// What devices tell of the machine: noted here at once, acted on by the driver. However often a
/// guest asks, one event waits.
pub struct GuestRequests {
    bits: AtomicU32,
    code: AtomicU32,
    events: Sender<Event>,
}

impl GuestRequests {
    /// Requests that wake the driver behind `events`.
    pub fn new(events: Sender<Event>) -> Arc<GuestRequests> {
        Arc::new(GuestRequests {
            bits: AtomicU32::new(0),
            code: AtomicU32::new(0),
            events,
        })
    }
    fn note(&self, bit: u32) {
        if self.bits.fetch_or(bit, Ordering::AcqRel) == 0 {
            // A driver that is gone needs no events.
            let _ = self.events.send(Event::Guest);
        }
    }
    fn take(&self) -> u32 {
        self.bits.swap(0, Ordering::AcqRel)
    }
    /// Something waits for the driver.
    fn any(&self) -> bool {
        self.bits.load(Ordering::Acquire) != 0
    }
}

impl MachineEvents for GuestRequests {
    fn power_off(&self) {
        self.note(POWER_OFF);
    }
    fn reset(&self) {
        self.note(RESET);
    }
    fn suspend(&self) {
        self.note(SUSPEND);
    }
    fn debug_exit(&self, code: u32) {
        self.code.store(code, Ordering::Release);
        self.note(DEBUG_EXIT);
    }
}

/// What a VM is driven with.
pub struct Driver {
    /// What it is.
    pub spec: VmSpec,
    /// The machine, standing still in its power-on state.
    pub machine: Machine,
    /// What it boots; none after a restore whose kernel is gone.
    pub image: Option<BootImage>,
    /// Requests of the guest.
    pub guest: Arc<GuestRequests>,
    /// To the front process.
    pub control: UnixStream,
    /// The queue.
    pub events: Receiver<Event>,
    /// Its other end.
    pub sender: Sender<Event>,
    /// Engine and why it was chosen.
    pub engine: (&'static str, String),
}

/// A driver at work.
struct Running {
    d: Driver,
    vcpus: Vcpus,
    running: bool,
    /// Events that came while something else was waited for.
    deferred: VecDeque<Event>,
    resets: u32,
    resets_in_a_row: u32,
    booted_at_ns: u64,
    /// Frequency that the guest takes its TSC to have; of a restored guest, what it was told then,
    /// because every process measures the host's anew.
    tsc_khz: u64,
    panic: Option<(String, Instant)>,
}

/// A queue for a driver.
pub fn queue() -> (Sender<Event>, Receiver<Event>) {
    channel()
}

/// Feeds requests of the front process into the queue.
pub fn hear_front(mut from: BufReader<UnixStream>, events: Sender<Event>) -> Result<()> {
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            loop {
                let event = match control::receive::<Request>(&mut from) {
                    Ok(Some(request)) => Event::Request(request),
                    Ok(None) => Event::FrontGone,
                    Err(e) => {
                        tracing::error!("control socket: {e}");
                        Event::FrontGone
                    }
                };
                let last = matches!(event, Event::FrontGone);
                if events.send(event).is_err() || last {
                    return;
                }
            }
        })
        .context("cannot start the control thread")?;
    Ok(())
}

impl Driver {
    /// Drives the VM from its first instruction (or from `spec.restore`) to its end.
    pub fn drive(self) -> Ending {
        let clock = Arc::clone(&self.machine.clock);
        let timers = std::thread::Builder::new()
            .name("timers".into())
            .spawn(move || clock.run_timers());
        let vcpus = Vcpus::spawn(&self.machine.vm, self.machine.vcpus, &self.sender);
        let (Ok(_), Ok(vcpus)) = (timers, vcpus) else {
            return Ending::Failed {
                reason: "cannot start the VM's threads".into(),
            };
        };
        let tsc_khz = self.machine.vm.caps().tsc_khz;
        let mut running = Running {
            d: self,
            vcpus,
            running: false,
            deferred: VecDeque::new(),
            resets: 0,
            resets_in_a_row: 0,
            booted_at_ns: 0,
            tsc_khz,
            panic: None,
        };
        let ending = running.until_the_end();
        if running.running {
            // Units hold host resources that their drop releases; vCPUs must not touch them then.
            if let Err(e) = running.pause() {
                tracing::warn!("while ending: {e:#}");
            }
        }
        if let Err(e) = running.d.machine.flush_disks() {
            tracing::error!("while ending: {e:#}");
        }
        running.d.machine.clock.shut_down();
        ending
    }
}

/// A failure of what the driver needs.
fn failed(e: &anyhow::Error) -> Ending {
    Ending::Failed {
        reason: format!("{e:#}"),
    }
}

impl Running {
    fn until_the_end(&mut self) -> Ending {
        let begun = match self.d.spec.restore.clone() {
            Some(dir) => self.restore(&dir).map_err(|e| Ending::BadInput {
                errors: vec![SpecError::new(
                    "restore",
                    format!("{}: {e:#}", dir.display()),
                )],
            }),
            None => self.boot(),
        };
        if let Err(ending) = begun {
            return ending;
        }
        if !self.d.spec.paused {
            self.run();
        }
        let (engine, why) = (self.d.engine.0.to_owned(), self.d.engine.1.clone());
        self.notice(Notice::Started { engine, why });
        let limit = self
            .d
            .spec
            .time_limit_ms
            .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
        loop {
            let quiet = self.panic.as_ref().map(|(_, since)| *since + PANIC_SILENCE);
            let wake = match (limit, quiet) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            match self.next(wake) {
                Some(event) => {
                    if let Some(ending) = self.react(event) {
                        return ending;
                    }
                }
                None if limit.is_some_and(|l| Instant::now() >= l) => return Ending::TimeLimit,
                None => {
                    if let Some((line, since)) = &self.panic
                        && since.elapsed() >= PANIC_SILENCE
                    {
                        return Ending::Crashed {
                            reason: line.clone(),
                        };
                    }
                }
            }
        }
    }

    /// The next event; `None` when `wake` has come.
    fn next(&mut self, wake: Option<Instant>) -> Option<Event> {
        if let Some(e) = self.deferred.pop_front() {
            return Some(e);
        }
        let got = match wake {
            Some(w) => self
                .d
                .events
                .recv_timeout(w.saturating_duration_since(Instant::now())),
            None => self
                .d
                .events
                .recv()
                .map_err(|_| RecvTimeoutError::Disconnected),
        };
        got.ok()
    }

    fn notice(&mut self, notice: Notice) {
        // A front that is gone is noticed by its reader.
        let _ = control::send(&mut self.d.control, &Message::Event(notice));
    }

    fn react(&mut self, event: Event) -> Option<Ending> {
        match event {
            Event::VcpuStopped { index, reason } => self.vcpu_stopped(index, reason),
            Event::Guest => self.guest_asked(),
            Event::Request(r) => self.request(r),
            Event::FrontGone => Some(Ending::Stopped),
            Event::Panic(Some(line)) => {
                self.notice(Notice::KernelPanic { line: line.clone() });
                self.panic = Some((line, Instant::now()));
                None
            }
            Event::Panic(None) => {
                self.panic = None;
                None
            }
        }
    }

    fn vcpu_stopped(&mut self, index: u32, reason: StopReason) -> Option<Ending> {
        self.vcpus.stopped(index);
        match reason {
            StopReason::Requested | StopReason::Debug => {
                if self.running {
                    self.vcpus.run();
                }
                None
            }
            StopReason::TripleFault => {
                tracing::warn!(vcpu = index, "triple fault");
                if self.d.spec.reset == ResetPolicy::Stop {
                    let reason = match self.panic.take() {
                        Some((line, _)) => line,
                        None => format!("triple fault on vCPU {index}"),
                    };
                    return Some(Ending::Crashed { reason });
                }
                self.guest_reset()
            }
            StopReason::Failed(e) => {
                let e = anyhow::Error::new(e);
                Some(Ending::Failed {
                    reason: format!("vCPU {index}: {e:#}"),
                })
            }
        }
    }

    fn guest_asked(&mut self) -> Option<Ending> {
        let bits = self.d.guest.take();
        if bits & DEBUG_EXIT != 0 {
            let code = self.d.guest.code.load(Ordering::Acquire) as u8;
            return Some(Ending::DebugExit { code });
        }
        if bits & POWER_OFF != 0 {
            return Some(Ending::PowerOff);
        }
        if bits & SUSPEND != 0 {
            // The tables offer no S3; a guest that enters it all the same wakes at once.
            tracing::warn!("the guest went to sleep and is woken");
            lock(&self.d.machine.acpi_pm).wake();
        }
        if bits & RESET != 0 {
            if self.d.spec.reset == ResetPolicy::Stop {
                return Some(match self.panic.take() {
                    Some((line, _)) => Ending::Crashed { reason: line },
                    None => Ending::ResetStopped,
                });
            }
            return self.guest_reset();
        }
        None
    }

    /// A reset that the guest caused: counts towards a reset loop.
    fn guest_reset(&mut self) -> Option<Ending> {
        let uptime = self
            .d
            .machine
            .clock
            .now_ns()
            .saturating_sub(self.booted_at_ns);
        self.resets_in_a_row = if uptime < LOOP_UPTIME_NS {
            self.resets_in_a_row + 1
        } else {
            1
        };
        if self.resets_in_a_row > LOOP_RESETS {
            return Some(Ending::ResetLoop {
                count: self.resets_in_a_row,
            });
        }
        self.reset()
    }

    fn reset(&mut self) -> Option<Ending> {
        if let Err(e) = self.pause() {
            return Some(failed(&e));
        }
        // What the guest asked for before the reset has gone with it.
        self.d.guest.take();
        self.panic = None;
        self.resets += 1;
        if let Err(ending) = self.boot() {
            return Some(ending);
        }
        self.run();
        self.notice(Notice::Reset { count: self.resets });
        None
    }

    fn request(&mut self, request: Request) -> Option<Ending> {
        let mut ending = None;
        let done = match request.command {
            Command::Stop => {
                ending = Some(Ending::Stopped);
                Ok(Outcome::Done)
            }
            Command::PowerButton => {
                lock(&self.d.machine.acpi_pm).press_power_button();
                Ok(Outcome::Done)
            }
            Command::Reset => {
                ending = self.reset();
                self.resets_in_a_row = 0;
                Ok(Outcome::Done)
            }
            Command::Pause => self.pause().map(|()| Outcome::Done),
            Command::Resume => {
                self.run();
                Ok(Outcome::Done)
            }
            Command::Resize { columns, rows } => {
                self.d.machine.console.resize(columns, rows);
                Ok(Outcome::Done)
            }
            Command::Break => {
                if self.d.machine.console.send_break() {
                    Ok(Outcome::Done)
                } else {
                    Err(anyhow::anyhow!(
                        "the break was not sent: the guest does not read its first serial port"
                    ))
                }
            }
            Command::Balloon { bytes } => self.balloon(bytes).map(|()| Outcome::Done),
            Command::Screenshot { path } => self.screenshot(&path).map(|()| Outcome::Done),
            Command::Keys { strokes } => self.keys(&strokes).map(|()| Outcome::Done),
            Command::Medium {
                drive,
                floppy,
                read_only,
                path,
                force,
            } => {
                let m = &self.d.machine;
                let changed = if floppy {
                    m.change_floppy(drive, path.as_deref(), read_only)
                } else {
                    m.change_medium(drive, path.as_deref(), force)
                };
                changed.map(|()| Outcome::Done)
            }
            Command::Link { card, up } => {
                let set = self.d.machine.set_link(card, up);
                set.map(|()| Outcome::Done)
            }
            // Often asked for, and much cheaper alone.
            Command::Inspect { path } if path == "vm" => {
                Ok(Outcome::Tree(tree(&self.d.machine.vm.inspect())))
            }
            Command::Inspect { path } => match self.inspect().at(&path) {
                Some(t) => Ok(Outcome::Tree(tree(t))),
                None => Ok(Outcome::Failed(format!("there is no {path}"))),
            },
            Command::Snapshot { dir } => self.snapshot(&dir).map(|()| Outcome::Done),
        };
        let outcome = done.unwrap_or_else(|e| Outcome::Failed(format!("{e:#}")));
        // A front that is gone is noticed by its reader.
        let _ = control::send(
            &mut self.d.control,
            &Message::Reply {
                id: request.id,
                outcome,
            },
        );
        ending
    }

    /// Takes memory from the guest; how fast it gives it is up to its driver.
    fn balloon(&self, bytes: u64) -> Result<()> {
        let m = &self.d.machine;
        let Some(balloon) = &m.balloon else {
            bail!("this VM has no balloon; start it with --balloon");
        };
        if bytes >= m.memory.size_bytes() {
            bail!(
                "the guest has {} MiB in all; ask for less",
                m.memory.size_bytes() >> 20
            );
        }
        balloon.set_target(bytes);
        Ok(())
    }

    /// Writes what the screen shows to a file.
    fn screenshot(&self, path: &std::path::Path) -> Result<()> {
        let Some((screen, _)) = &self.d.machine.screen else {
            bail!("this VM has no screen; start it with --vga std");
        };
        let png = screen.screenshot()?;
        std::fs::write(path, png).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Types on the guest's keyboard.
    fn keys(&self, strokes: &[Stroke]) -> Result<()> {
        if strokes.len() > MAX_STROKES {
            bail!("{} strokes; at most {MAX_STROKES}", strokes.len());
        }
        let mut events = Vec::new();
        for s in strokes {
            let more = match s {
                Stroke::Text(t) if t.chars().count() > MAX_TEXT_CHARS => {
                    bail!("a text of more than {MAX_TEXT_CHARS} characters; type it in parts")
                }
                Stroke::Text(t) => Input::text(t),
                Stroke::Chord(keys) => Input::chord(keys),
            };
            events.extend(more.map_err(anyhow::Error::msg)?);
        }
        if !self.d.machine.input.send(&events) {
            bail!("the guest has not yet taken what was typed before; try again later");
        }
        Ok(())
    }

    /// Lets everything run.
    fn run(&mut self) {
        if self.running {
            return;
        }
        for unit in &self.d.machine.units {
            lock(unit).start();
        }
        self.d.machine.console.release(false);
        self.d.machine.console.pause(false);
        self.d.machine.input.pause(false);
        self.d.machine.clock.start();
        self.vcpus.run();
        self.running = true;
    }

    /// Stops everything and waits until nothing is in flight. If that fails, the VM goes on.
    fn pause(&mut self) -> Result<()> {
        if !self.running {
            return Ok(());
        }
        let stopped = self.stop_all();
        self.running = false;
        if stopped.is_err() {
            self.run();
        }
        stopped
    }

    fn stop_all(&mut self) -> Result<()> {
        self.d.machine.console.release(true);
        self.stop_vcpus()?;
        self.d.machine.clock.stop();
        self.pause_units();
        let until = Instant::now() + DRAIN_WITHIN;
        for unit in &self.d.machine.units {
            while !lock(unit).drained() {
                if Instant::now() > until {
                    bail!("{} does not finish its work", lock(unit).unit());
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        self.d.machine.vm.settle_irqfds();
        Ok(())
    }

    /// Has every unit take nothing more from outside.
    fn pause_units(&self) {
        self.d.machine.console.pause(true);
        self.d.machine.input.pause(true);
        for unit in &self.d.machine.units {
            lock(unit).pause();
        }
    }

    fn stop_vcpus(&mut self) -> Result<()> {
        self.vcpus.ask_to_stop();
        let until = Instant::now() + STOP_WITHIN;
        while !self.vcpus.all_stopped() {
            let left = until.saturating_duration_since(Instant::now());
            match self.d.events.recv_timeout(left) {
                Ok(Event::VcpuStopped { index, reason }) => {
                    self.vcpus.stopped(index);
                    if !matches!(reason, StopReason::Requested) {
                        self.deferred
                            .push_back(Event::VcpuStopped { index, reason });
                    }
                }
                Ok(other) => self.deferred.push_back(other),
                Err(_) => bail!("a vCPU does not stop"),
            }
        }
        Ok(())
    }

    /// Power-on state of everything, and the boot image in memory and registers.
    fn boot(&mut self) -> Result<(), Ending> {
        let m = &self.d.machine;
        let Some(image) = &self.d.image else {
            if m.firmware.is_some() {
                return self.start_firmware();
            }
            let reason = "the kernel that this VM was booted from is gone".into();
            return Err(Ending::Failed { reason });
        };
        for unit in &m.units {
            lock(unit).reset();
        }
        m.memory.discard_all().map_err(|e| failed(&e.into()))?;
        let mut first = image
            .load(&m.memory, m.vcpus)
            .map_err(|e| Ending::BadInput {
                errors: vec![crate::inputs::spec_error(&e)],
            })?;
        m.input.clear();
        if let Some((_, vga)) = &m.screen {
            lock(vga).set_text_mode();
        }
        m.chipset.pci.assign_bars().map_err(|e| failed(&e.into()))?;
        crate::boot::firmware_registers(&mut first, &m.cpuid, true);
        let mut states = vec![Box::new(first)];
        for index in 1..m.vcpus {
            let mut s = CpuState::reset(index, false);
            crate::boot::firmware_registers(&mut s, &m.cpuid, false);
            states.push(Box::new(s));
        }
        self.begin(states)
    }

    /// Power-on state of everything; the processor begins in the ROM. RAM keeps its content over a
    /// reset, as that of a PC does.
    fn start_firmware(&mut self) -> Result<(), Ending> {
        let m = &self.d.machine;
        for unit in &m.units {
            lock(unit).reset();
        }
        if let Some((firmware, devices)) = &m.firmware {
            let mut fw_cfg = lock(&m.chipset.fw_cfg);
            firmware
                .tell_order(&mut fw_cfg, devices, self.resets == 0)
                .map_err(|e| failed(&e.into()))?;
        }
        let states = (0..m.vcpus).map(|index| {
            let mut s = CpuState::reset(index, index == 0);
            crate::boot::microcode(&mut s, &m.cpuid);
            Box::new(s)
        });
        let states = states.collect();
        self.begin(states)
    }

    /// Gives the vCPUs their first states.
    fn begin(&mut self, states: Vec<Box<CpuState>>) -> Result<(), Ending> {
        let m = &self.d.machine;
        for (index, state) in (0..).zip(states) {
            self.vcpus
                .set_state(index, state)
                .map_err(|e| failed(&e.into()))?;
        }
        // A vCPU that stopped for a reason of the time before the reset is heard no more.
        self.deferred
            .retain(|e| !matches!(e, Event::VcpuStopped { .. } | Event::Guest));
        self.booted_at_ns = m.clock.now_ns();
        Ok(())
    }

    fn inspect(&self) -> Inspect {
        let m = &self.d.machine;
        let units = m.units.iter().map(|u| {
            let u = lock(u);
            (u.unit().to_owned(), u.inspect())
        });
        let vnc = m.vnc.as_ref().map(|v| {
            Inspect::node([
                ("address", Inspect::Text(v.address())),
                ("clients", Inspect::Uint(v.clients() as u64)),
            ])
        });
        Inspect::node([
            ("engine", Inspect::Text(self.d.engine.0.into())),
            ("running", Inspect::Bool(self.running)),
            ("time-ns", Inspect::Uint(m.clock.now_ns())),
            ("memory-bytes", Inspect::Uint(m.memory.size_bytes())),
            ("footprint", crate::footprint::inspect(&m.memory)),
            ("resets", Inspect::Uint(self.resets.into())),
            ("vnc", vnc.unwrap_or(Inspect::Bool(false))),
            ("vm", m.vm.inspect()),
            ("trays", m.inspect_trays()),
            ("units", Inspect::Node(units.collect())),
        ])
    }

    /// Writes a snapshot; the VM goes on as before.
    fn snapshot(&mut self, dir: &std::path::Path) -> Result<()> {
        let was_running = self.running;
        self.pause()?;
        let done = self.save(dir);
        if was_running {
            self.run();
        }
        done
    }

    fn save(&self, dir: &std::path::Path) -> Result<()> {
        if self.d.guest.any() {
            // The wish is not part of any unit's state; it is granted a moment later.
            bail!("the guest is just being reset or switched off");
        }
        let m = &self.d.machine;
        m.flush_disks().context("the disks")?;
        let mut sections = Vec::new();
        for index in 0..m.vcpus {
            sections.push(saved::save(&vcpu_unit(index), &*self.vcpus.state(index)?));
        }
        for unit in &m.units {
            sections.push(lock(unit).save()?);
        }
        let manifest = SnapshotManifest {
            format: SNAPSHOT_FORMAT,
            board: crate::board::BOARD_VERSION,
            spec: portable(&self.d.spec)?,
            engine: self.d.engine.0.to_owned(),
            clock_ns: m.clock.now_ns(),
            state_crc: 0,
            memory_crc: 0,
            cpuid: snapshot::cpuid_rows(&m.cpuid),
            tsc_khz: self.tsc_khz,
            manifest_crc: 0,
        };
        snapshot::write(dir, &manifest, &sections, &m.memory)
    }

    /// Takes a snapshot over into this machine, which is new.
    fn restore(&mut self, dir: &std::path::Path) -> Result<()> {
        let manifest = snapshot::Manifest::read(dir).map_err(anyhow::Error::msg)?;
        let mut sections = snapshot::read_sections(dir, &manifest)?;
        // What arrives before the machine runs must not change what is restored.
        self.pause_units();
        let m = &self.d.machine;
        snapshot::same_tsc(manifest.0.tsc_khz, m.vm.caps().tsc_khz)?;
        m.clock.set_ns(manifest.0.clock_ns);
        self.booted_at_ns = manifest.0.clock_ns;
        self.tsc_khz = manifest.0.tsc_khz;
        snapshot::read_memory(dir, &manifest, &m.memory)?;
        let mut take = |unit: &str| {
            let at = sections.iter().position(|s| s.unit == unit);
            at.map(|n| sections.remove(n))
                .with_context(|| format!("the snapshot has no state of {unit}"))
        };
        for unit in m.restore_order() {
            let mut unit = lock(unit);
            let section = take(unit.unit())?;
            unit.restore(&section)?;
        }
        for index in 0..m.vcpus {
            let section = take(&vcpu_unit(index))?;
            let state = saved::load(&section, xsave_components(&m.cpuid))?;
            self.vcpus.set_state(index, Box::new(state))?;
        }
        if let Some(left) = sections.first() {
            bail!(
                "the snapshot has state of {}, which this machine does not have",
                left.unit
            );
        }
        m.chipset.pci.refresh();
        Ok(())
    }
}

/// A specification that means the same wherever it is read.
fn portable(spec: &VmSpec) -> Result<VmSpec> {
    let mut s = VmSpec {
        restore: None,
        paused: false,
        serial2: None,
        debugcon: None,
        screen: ScreenSpec {
            vnc: None,
            ..spec.screen.clone()
        },
        ..spec.clone()
    };
    let boot = &mut s.boot;
    let files = [&mut boot.kernel].into_iter().chain(&mut boot.initrd);
    let files = files.chain(boot.modules.iter_mut().map(|m| &mut m.path));
    let files = files.chain(s.disks.iter_mut().map(|d| &mut d.path));
    let files = files.chain(&mut s.screen.vga_rom);
    let files = files.chain(s.shares.iter_mut().map(|d| &mut d.path));
    let files = files.chain(s.channels.iter_mut().map(|c| &mut c.path));
    let firmware = boot.firmware.iter_mut();
    let files = files.chain(firmware.flat_map(|f| {
        let vars = f.vars_template.iter_mut().chain(&mut f.vars);
        std::iter::once(&mut f.code).chain(vars)
    }));
    for path in files.chain(&mut s.vsock) {
        if !path.as_os_str().is_empty() {
            *path = std::path::absolute(&path).context("the working directory")?;
        }
    }
    Ok(s)
}

fn vcpu_unit(index: u32) -> String {
    format!("vcpu{index}")
}

/// XSAVE components that a guest with this CPUID may enable, user and supervisor.
fn xsave_components(cpuid: &pyrite_engine::CpuidTable) -> u64 {
    let user = cpuid
        .get(0xd, 0)
        .map_or(3, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
    let supervisor = cpuid
        .get(0xd, 1)
        .map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.ecx));
    user | supervisor
}

fn tree(t: &Inspect) -> Tree {
    match t {
        Inspect::Node(c) => Tree::Node(c.iter().map(|(k, v)| (k.clone(), tree(v))).collect()),
        Inspect::Uint(n) => Tree::Uint(*n),
        Inspect::Hex(n) => Tree::Hex(*n),
        Inspect::Bool(b) => Tree::Bool(*b),
        Inspect::Text(s) => Tree::Text(s.clone()),
    }
}
