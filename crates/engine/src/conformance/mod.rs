//! The conformance suite of CPU engines: micro-guests that check themselves.
//!
//! Every engine runs the same guests through [`Vm`] and [`Vcpu`]. A guest reports words through
//! port F0H and ends with port F4H; the words must be exactly those that the manuals say, in
//! order. A guest never decides by itself what an engine may lack: an engine that is known to be
//! incomplete passes a table of names with reasons, and what it skips is in the [`Report`].
//!
//! Host commands on port E1H let a guest ask for an event at a known moment, see [`Board`].

// UNSAFETY: `global_asm!` and the declarations of its read-only data; no unsafe operations.
#![allow(unsafe_code, reason = "micro-guests are assembled into read-only data")]

mod asm;
mod board;
mod guests;
mod layout;
mod patience;
mod probes;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};

use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;

use crate::{CpuidEntry, CpuidTable, EngineError, StopReason, Vcpu, Vm, VmConfig};
use board::Board;
use layout::Entry;
use patience::Patience;
pub(crate) use probes::{ProbeGuest, probe_guest};

/// Makes a VM of the engine under test.
pub type Factory<'a> = &'a dyn Fn(VmConfig) -> Result<Arc<dyn Vm>, EngineError>;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As the manuals say.
    Pass,
    /// Otherwise, and how.
    Fail(String),
    /// Not run, and why.
    Skip(String),
}

/// What came of a run of the suite.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Guests by name.
    pub results: Vec<(&'static str, Outcome)>,
}

impl Report {
    /// The guests that failed.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.results.iter().filter_map(|(n, o)| match o {
            Outcome::Fail(why) => Some((*n, why.as_str())),
            _ => None,
        })
    }
    /// The guests that were not run.
    pub fn skipped(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.results.iter().filter_map(|(n, o)| match o {
            Outcome::Skip(why) => Some((*n, why.as_str())),
            _ => None,
        })
    }
    /// How many passed.
    pub fn passed(&self) -> usize {
        self.results
            .iter()
            .filter(|(_, o)| *o == Outcome::Pass)
            .count()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, outcome) in &self.results {
            match outcome {
                Outcome::Pass => writeln!(f, "pass {name}")?,
                Outcome::Fail(why) => writeln!(f, "FAIL {name}: {why}")?,
                Outcome::Skip(why) => writeln!(f, "skip {name}: {why}")?,
            }
        }
        write!(f, "{} passed", self.passed())?;
        write!(
            f,
            ", {} failed, {} skipped",
            self.failures().count(),
            self.skipped().count()
        )
    }
}

/// How a guest must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// With 1 on port F4H.
    Pass,
    /// With a triple fault.
    TripleFault,
}

/// One micro-guest.
pub(crate) struct Guest {
    name: &'static str,
    image: fn() -> &'static [u8; 4096],
    entry: Entry,
    vcpus: u32,
    end: End,
    trace: &'static [u32],
}

/// Runs all guests.
pub fn run_all(factory: Factory<'_>) -> Report {
    run_except(factory, &[])
}

/// Runs all guests but those in `skips`, a table of (name, reason).
pub fn run_except(factory: Factory<'_>, skips: &[(&str, &str)]) -> Report {
    run_across(factory, factory, skips)
}

/// Like [`run_except`]; guests that ask for it are saved in the middle and restored into a VM of
/// the `second` factory.
pub fn run_across(first: Factory<'_>, second: Factory<'_>, skips: &[(&str, &str)]) -> Report {
    let results = guests::all()
        .into_iter()
        .map(|g| {
            let outcome = match skips.iter().find(|(name, _)| *name == g.name) {
                Some((_, why)) => Outcome::Skip((*why).to_owned()),
                None => match run(g, first, second) {
                    Ok(()) => Outcome::Pass,
                    Err(why) => Outcome::Fail(why),
                },
            };
            (g.name, outcome)
        })
        .collect();
    Report { results }
}

/// Names of all guests, in order.
pub fn names() -> Vec<&'static str> {
    guests::all().into_iter().map(|g| g.name).collect()
}

/// Runs one guest by name; `None` if there is no such guest.
pub fn run_one(name: &str, first: Factory<'_>, second: Factory<'_>) -> Option<Outcome> {
    let g = guests::all().into_iter().find(|g| g.name == name)?;
    Some(match run(g, first, second) {
        Ok(()) => Outcome::Pass,
        Err(why) => Outcome::Fail(why),
    })
}

/// The CPUID of micro-guests: what the guests need, from an invented but consistent processor.
pub fn cpuid() -> CpuidTable {
    let word = |b: &[u8; 4]| u32::from_le_bytes(*b);
    let e = |leaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    };
    let sub = |leaf, subleaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        subleaf,
        indexed: true,
        eax,
        ebx,
        ecx,
        edx,
    };
    CpuidTable {
        entries: vec![
            e(0, 0xd, word(b"Auth"), word(b"cAMD"), word(b"enti")),
            // SSE3, CX16, PCID, x2APIC, TSC deadline, XSAVE; FPU VME DE PSE TSC MSR PAE CX8 APIC
            // SEP MTRR PGE CMOV PAT PSE-36 CLFSH MMX FXSR SSE SSE2.
            e(1, 0x00a2_0f10, 0x0000_0800, 0x0522_2001, 0x078b_bb7f),
            // FSGSBASE, TSC_ADJUST, SMEP, INVPCID, SMAP; UMIP, RDPID.
            sub(7, 0, 0, 0x0010_0483, 0x0040_0004, 0),
            sub(0xd, 0, 0x3, 0x240, 0x240, 0),
            sub(0xd, 1, 0, 0, 0, 0),
            e(
                0x8000_0000,
                0x8000_0008,
                word(b"Auth"),
                word(b"cAMD"),
                word(b"enti"),
            ),
            // LAHF; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
            e(0x8000_0001, 0x00a2_0f10, 0, 0x1, 0x2c10_0800),
            e(0x8000_0007, 0, 0, 0, 0x100),
            e(0x8000_0008, 0x3028, 0, 0, 0),
        ],
    }
}

/// vCPUs that have stopped, and why.
type Stopped = Vec<(Box<dyn Vcpu>, StopReason)>;

/// A VM with its board, ready to run.
struct Rig {
    vm: Arc<dyn Vm>,
    memory: Arc<GuestMemory>,
    board: Arc<Board>,
}

impl Rig {
    fn new(factory: Factory<'_>, vcpus: u32, board: Arc<Board>) -> Result<Rig, String> {
        let memory = Arc::new(layout::memory().map_err(|e| e.to_string())?);
        let clock = Arc::clone(&board);
        let vm = factory(VmConfig {
            memory: Arc::clone(&memory),
            vcpus,
            cpuid: cpuid(),
            io: Arc::<Board>::clone(&board),
            clock: Arc::new(move || clock.now_ns()),
        })
        .map_err(|e| format!("no VM: {e}"))?;
        board.connect(&vm, vcpus, &memory);
        Ok(Rig { vm, memory, board })
    }

    fn load(&self, states: &[CpuState]) -> Result<Vec<Box<dyn Vcpu>>, String> {
        let mut vcpus = Vec::new();
        for (n, s) in states.iter().enumerate() {
            let mut v = self.vm.take_vcpu(n as u32).map_err(|e| e.to_string())?;
            v.set_state(s)
                .map_err(|e| format!("set_state of vCPU {n}: {e}"))?;
            vcpus.push(v);
        }
        Ok(vcpus)
    }

    /// A number that changes when the guest reports something or changes its variables.
    fn progress(&self) -> u64 {
        let mut variables = [0u8; layout::VARIABLES_BYTES];
        let mut hash = DefaultHasher::new();
        // RAM is there; without, the reports alone count.
        let _ = self.memory.read(layout::VARIABLES, &mut variables);
        (self.board.trace().len(), variables).hash(&mut hash);
        hash.finish()
    }

    /// Runs all vCPUs until they have stopped.
    fn run(&self, vcpus: Vec<Box<dyn Vcpu>>) -> Result<Stopped, String> {
        let (tx, rx) = mpsc::channel();
        let (name_tx, names) = mpsc::channel();
        let count = vcpus.len();
        for (n, mut v) in vcpus.into_iter().enumerate() {
            let (tx, name_tx) = (tx.clone(), name_tx.clone());
            std::thread::spawn(move || {
                // The receiver waits for all.
                let _ = name_tx.send(patience::this_thread());
                drop(name_tx);
                let reason = v.run();
                // The receiver is gone only if this test has already failed.
                let _ = tx.send((n, v, reason));
            });
        }
        let mut done: Vec<Option<(Box<dyn Vcpu>, StopReason)>> = (0..count).map(|_| None).collect();
        drop((tx, name_tx));
        let mut patience = Patience::new(names.iter().flatten().collect());
        let mut timed_out = None;
        for _ in 0..count {
            patience.renew();
            let got = loop {
                match rx.recv_timeout(patience::TICK) {
                    Ok(got) => break Some(got),
                    Err(RecvTimeoutError::Disconnected) => break None,
                    Err(RecvTimeoutError::Timeout) => {}
                }
                if let Some(why) = patience.lost(self.progress()) {
                    if timed_out.is_some() {
                        break None;
                    }
                    timed_out = Some(why);
                    patience.renew();
                    self.board.stop_all();
                }
            };
            let Some((n, v, reason)) = got else {
                return Err(format!(
                    "a vCPU does not stop; trace {}",
                    self.board.trace_text()
                ));
            };
            if !matches!(reason, StopReason::Requested) {
                self.board.stop_all();
            }
            done[n] = Some((v, reason));
        }
        let mut done: Vec<_> = done.into_iter().flatten().collect();
        if let Some(why) = timed_out {
            let at: Vec<String> = done
                .iter_mut()
                .map(|(v, _)| match v.state() {
                    Ok(s) => format!("{:x}:{:x} {:?}", s.seg[1].selector, s.rip, s.activity),
                    Err(e) => e.to_string(),
                })
                .collect();
            let trace = self.board.trace_text();
            return Err(format!("{why}, at {}; trace {trace}", at.join(", ")));
        }
        Ok(done)
    }
}

fn run(g: &Guest, first: Factory<'_>, second: Factory<'_>) -> Result<(), String> {
    let board = Arc::new(Board::new());
    let mut rig = Rig::new(first, g.vcpus, Arc::clone(&board))?;
    layout::fill(&rig.memory, (g.image)(), g.entry).map_err(|e| e.to_string())?;
    let states: Vec<CpuState> = (0..g.vcpus)
        .map(|n| layout::start_state(g.entry, n))
        .collect();
    let mut vcpus = rig.load(&states)?;
    loop {
        let mut done = rig.run(vcpus)?;
        if board.take_save_request() {
            // Stop, copy everything into a new VM, go on there.
            let mut states = Vec::new();
            for (v, _) in &mut done {
                states.push(v.state().map_err(|e| format!("state: {e}"))?);
            }
            let next = Rig::new(second, g.vcpus, Arc::clone(&board))?;
            let mut page = [0u8; 4096];
            for gpa in (0..layout::RAM_BYTES).step_by(page.len()) {
                rig.memory.read(gpa, &mut page).map_err(|e| e.to_string())?;
                next.memory.write(gpa, &page).map_err(|e| e.to_string())?;
            }
            rig = next;
            vcpus = rig.load(&states)?;
            continue;
        }
        return judge(g, &board, &mut done);
    }
}

fn judge(g: &Guest, board: &Board, done: &mut [(Box<dyn Vcpu>, StopReason)]) -> Result<(), String> {
    let trace = board.trace();
    let mut wrong = Vec::new();
    for (n, (vcpu, reason)) in done.iter_mut().enumerate() {
        match (&*reason, g.end) {
            (StopReason::Requested, End::Pass) | (StopReason::TripleFault, End::TripleFault) => {}
            (StopReason::Failed(e), _) => wrong.push(format!("vCPU {n}: {e}")),
            (r, _) => {
                let rip = vcpu.state().map(|s| s.rip).unwrap_or_default();
                wrong.push(format!("vCPU {n} stopped at RIP {rip:#x}: {r:?}"));
            }
        }
    }
    match (board.exit_code(), g.end) {
        (Some(1), End::Pass) | (None, End::TripleFault) => {}
        (code, _) => wrong.push(format!("exit code {code:?}")),
    }
    if trace != g.trace {
        let at = trace
            .iter()
            .zip(g.trace)
            .take_while(|(a, b)| a == b)
            .count();
        let near = |t: &[u32]| format!("{:x?}", t.iter().skip(at).take(12).collect::<Vec<_>>());
        wrong.push(format!(
            "trace differs at word {at}: got {}, expected {}",
            near(&trace),
            near(g.trace)
        ));
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}
