//! Random sequences: host against engines, with a minimiser and cases that stay.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use iced_x86::{
    Code, CpuidFeature as F, EncodingKind, FlowControl, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};

use super::forms::is_gather;
use super::gen_::{self, Insn, Sequence};
use super::guest::{self, Guest};
use super::host::{self, CONTEXT, CONTEXT_BYTES, Host};
use super::machine::{
    Components, END, END16, End, Mode, Outcome, Start, Tolerance, differences, fill,
};
use super::rng::Rng;

/// Forms by kind, of those that the guest may execute.
struct Pool {
    integer: Vec<Code>,
    string: Vec<Code>,
    stack: Vec<Code>,
    branch: Vec<Code>,
    users: Vec<Code>,
    x87: Vec<Code>,
    sse: Vec<Code>,
    avx: Vec<Code>,
    evex: Vec<Code>,
}

/// Forms that only [`super::forms`] tests, because they need a state of their own.
fn unfit(code: Code, mode: Mode) -> bool {
    use Mnemonic::*;
    // A branch of 16 bits leaves the code pages of the others.
    let far_away = |name: String| {
        name.ends_with("rel8_16") || name.ends_with("rel16") || name.contains("_rel8_16_")
    };
    let op = code.op_code();
    gen_::takes_selectors(code)
        // What is refused in any case ends a sequence early.
        || op.is_privileged()
        || op.must_be_cpl0()
        || matches!(code.mnemonic(), In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd)
        || matches!(
            code.mnemonic(),
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64
            | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
            // The environment holds the pointers of the last instruction, which are not compared.
            | Fnstenv | Fnsave
            | Wrfsbase | Wrgsbase | Popf | Popfd | Popfq | Int3 | Ud0 | Ud1 | Ud2
            | Reservednop | Pause | Enter | Wrssd | Wrssq | Rstorssp | Saveprevssp
        )
        || matches!(
            code,
            Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16
        ) && mode != Mode::Seg16
        || mode != Mode::Seg16 && far_away(format!("{code:?}"))
}

impl Pool {
    fn new(g: &mut Guest, mode: Mode) -> Pool {
        let mut p = Pool {
            integer: vec![],
            string: vec![],
            stack: vec![],
            branch: vec![],
            users: vec![],
            x87: vec![],
            sse: vec![],
            avx: vec![],
            evex: vec![],
        };
        let start = Start {
            mode,
            ..Start::zero()
        };
        for code in Code::values() {
            if gen_::excluded(code, mode).is_some() || unfit(code, mode) {
                continue;
            }
            let mut r = Rng::new(code as u64);
            let Some(i) = gen_::instruction(code, &mut r, &start, 400) else {
                continue;
            };
            let i = gen_::decoded(mode, &i.bytes);
            if !g.vcpu().interp.allows(&i) {
                continue;
            }
            let x87 = code.cpuid_features().iter().any(|f| {
                matches!(
                    f,
                    F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY | F::MMX
                )
            });
            let list = if i.flow_control() != FlowControl::Next {
                &mut p.branch
            } else if i.is_string_instruction() {
                &mut p.string
            } else if i.is_stack_instruction() {
                &mut p.stack
            } else if x87 {
                &mut p.x87
            } else if i.encoding() == EncodingKind::EVEX {
                &mut p.evex
            } else if has_vectors(&i) {
                if i.encoding() == EncodingKind::VEX {
                    &mut p.avx
                } else {
                    &mut p.sse
                }
            } else {
                if i.rflags_read() != 0 {
                    p.users.push(code);
                }
                &mut p.integer
            };
            list.push(code);
        }
        p
    }
}

fn has_vectors(i: &iced_x86::Instruction) -> bool {
    (0..i.op_count()).any(|n| {
        i.op_kind(n) == iced_x86::OpKind::Register && {
            let r = i.op_register(n);
            r.is_vector_register() || r.is_k() || r.is_mm()
        }
    })
}

/// What all start states have in common.
fn base() -> Start {
    let mut s = Start::zero();
    fill(&mut Rng::new(0x5eed), &mut s.data);
    s
}

/// The start state of a seed.
fn start_of(base: &Start, c: &Components, seed: u64, mode: Mode) -> Start {
    let mut s = base.clone();
    s.mode = mode;
    let mut r = Rng::new(seed ^ 0x57a7e);
    s.randomise(&mut r, c, true);
    s
}

fn raw(bytes: &[u8]) -> Insn {
    Insn {
        bytes: bytes.to_vec(),
        branch: None,
        rip_data: None,
        id: 0,
    }
}

/// A random sequence for a start state.
fn sequence(pool: &Pool, r: &mut Rng, start: &Start, at: usize) -> Sequence {
    let mut info = InstructionInfoFactory::new();
    let mode = start.mode;
    let count = 1 + r.below(12);
    // A counted loop around everything, on a register that nothing in it writes.
    let counter = (r.one_in(8)).then(|| {
        let n = r.below(if mode == Mode::Long { 16 } else { 8 }) as u8;
        if n == 4 { 1 } else { n }
    });
    // Code of 32 bits or its like.
    let in_mode = |long: &[u8], flat32: &[u8], seg16: &[u8]| {
        raw(match mode {
            Mode::Long => long,
            Mode::Flat32 => flat32,
            Mode::Seg16 => seg16,
        })
    };
    let mut insns = Vec::new();
    if let Some(n) = counter {
        let times = 1 + r.below(6) as u8;
        insns.push(in_mode(
            &[0x48 | n >> 3, 0xc7, 0xc0 | n & 7, times, 0, 0, 0],
            &[0xb8 | n, times, 0, 0, 0],
            &[0x66, 0xb8 | n, times, 0, 0, 0],
        ));
    }
    let first = insns.len();
    while insns.len() < first + count as usize {
        let list = match r.below(100) {
            0..=41 => &pool.integer,
            42..=50 => &pool.users,
            51..=60 => &pool.branch,
            61..=68 => &pool.stack,
            69..=72 => &pool.string,
            73..=78 => &pool.x87,
            79..=86 => &pool.sse,
            87..=92 => &pool.avx,
            93..=97 => &pool.evex,
            _ => {
                // Flags from an immediate, without TF, NT and AC.
                let f = (r.next() as u32 & 0x0020_3ed5).to_le_bytes();
                let long = [0x68, f[0], f[1], f[2], f[3]];
                insns.push(in_mode(&long, &long, &long[..3]));
                insns.push(raw(&[0x9d]));
                continue;
            }
        };
        if list.is_empty() {
            continue;
        }
        let code = *r.pick(list);
        let Some(insn) = gen_::instruction(code, r, start, 40) else {
            continue;
        };
        let i = gen_::decoded(mode, &insn.bytes);
        if let Some(n) = counter {
            let writes = info.info(&i).used_registers().iter().any(|u| {
                !matches!(u.access(), OpAccess::Read | OpAccess::CondRead)
                    && u.register().is_gpr()
                    && u.register().full_register() == Register::RAX + u32::from(n)
            });
            if writes {
                continue;
            }
        }
        insns.push(insn);
    }
    let body = insns.len();
    if let Some(n) = counter {
        if n == 1 && r.one_in(2) {
            insns.push(Insn {
                branch: Some((1, 1, 0)),
                ..raw(&[0xe2, 0])
            });
        } else {
            insns.push(in_mode(
                &[0x48 | n >> 3, 0xff, 0xc8 | n & 7],
                &[0x48 | n],
                &[0x66, 0x48 | n],
            ));
            let jump = [0x0f, 0x85, 0, 0, 0, 0];
            let width = if mode == Mode::Seg16 { 2 } else { 4 };
            insns.push(Insn {
                branch: Some((2, width, 0)),
                ..raw(&jump[..2 + width])
            });
        }
    }
    for (n, i) in insns.iter_mut().enumerate() {
        i.id = n as u32;
        if let Some((_, _, target)) = &mut i.branch {
            if n >= body {
                *target = first as u32;
            } else {
                // Forward, at most to what counts the loop down.
                let to = n as u64 + 1 + r.below(body as u64 - n as u64);
                *target = if to >= body as u64 && counter.is_none() {
                    u32::MAX
                } else {
                    to as u32
                };
            }
        }
    }
    Sequence { mode, at, insns }
}

/// True if the engine's page fault is at an address where this process has memory of its own (its
/// program, libraries, stacks): there the host reads or writes what the guest does not have. The
/// layout's own addresses are never among these.
pub fn met_the_host(got: &Outcome) -> bool {
    let End::Exception {
        vector: 14, cr2, ..
    } = got.end
    else {
        return false;
    };
    if cr2 <= END + 0xfff && !(CONTEXT..CONTEXT + CONTEXT_BYTES as u64).contains(&cr2) {
        return false;
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().any(|l| {
        let range = l.split_whitespace().next().and_then(|r| r.split_once('-'));
        range.is_some_and(|(a, b)| {
            let address = |s| u64::from_str_radix(s, 16).unwrap_or(0);
            (address(a)..address(b)).contains(&cr2)
        })
    })
}

/// Host, engines, and what they share.
pub struct Fuzzer {
    host: Host,
    guests: Vec<Guest>,
    components: Components,
    pools: [Pool; 3],
    base: Start,
    place: usize,
    /// Sequences whose host run did not end.
    pub lost: u64,
    /// Sequences that ended with an exception.
    pub exceptions: u64,
    /// Instructions generated.
    pub instructions: u64,
}

/// A sequence on which an engine differs from the host.
pub struct Failure {
    pub seed: u64,
    pub engine: &'static str,
    pub sequence: Sequence,
    pub text: String,
}

impl Fuzzer {
    pub fn new() -> Fuzzer {
        let mut guests = guest::all();
        let pools = Mode::ALL.map(|m| Pool::new(&mut guests[0], m));
        Fuzzer {
            host: Host::new(),
            guests,
            components: Components::of_host(),
            pools,
            base: base(),
            place: 0,
            lost: 0,
            exceptions: 0,
            instructions: 0,
        }
    }

    fn tolerance(seq: &Sequence, g: &Guest) -> Tolerance {
        Tolerance {
            flags: 0,
            flags_at_fault: !g.exact,
            cr2_page_only: seq.insns.iter().any(|i| {
                matches!(
                    gen_::decoded(seq.mode, &i.bytes).mnemonic(),
                    Mnemonic::Frstor | Mnemonic::Fldenv
                )
            }),
            partial_vectors: seq
                .insns
                .iter()
                .any(|i| is_gather(gen_::decoded(seq.mode, &i.bytes).code())),
            may_wrap: seq.mode == Mode::Flat32,
        }
    }

    /// Runs bytes on the host and on the engines chosen; the first difference.
    fn compare(
        &mut self,
        seq: &Sequence,
        start: &Start,
        engines: &[usize],
    ) -> Option<(&'static str, String)> {
        let bytes = seq.bytes();
        let found = self.compare_bytes(seq, &bytes, start, engines);
        // Sequences may read the code pages: leave them as they were.
        let clean = vec![0xcc; bytes.len()];
        self.host.set_code(seq.at, &clean);
        for &n in engines {
            self.guests[n].set_code(seq.at, &clean);
        }
        found
    }

    fn compare_bytes(
        &mut self,
        seq: &Sequence,
        bytes: &[u8],
        start: &Start,
        engines: &[usize],
    ) -> Option<(&'static str, String)> {
        self.host.set_code(seq.at, bytes);
        let want = self.host.run(seq.at, start);
        match want.end {
            End::Lost => {
                self.lost += 1;
                if std::env::var_os("PYRITE_ISA_LOST").is_some() {
                    let at = want.rip.wrapping_sub(seq.mode.code()) as usize;
                    let b = bytes.get(at.wrapping_sub(seq.at)..).unwrap_or_default();
                    let i = gen_::decoded(seq.mode, b);
                    println!("LOST {:?} {:02x?} {:x?}", i.code(), &b[..i.len()], want.gpr);
                }
                return None;
            }
            End::Exception { .. } => self.exceptions += 1,
            End::Through => {}
        }
        for &n in engines {
            let g = &mut self.guests[n];
            g.set_code(seq.at, bytes);
            // The second time from the caches.
            for _ in 0..if n == 0 { 1 } else { 2 } {
                let got = g.run(seq.at, start);
                let t = Fuzzer::tolerance(seq, g);
                let diff = differences(&want, &got, &self.components, t);
                if !diff.is_empty() && !met_the_host(&got) {
                    return Some((g.name, format!("{:?}\n  {}", want.end, diff.join("\n  "))));
                }
            }
        }
        None
    }

    /// Makes and runs the sequence of a seed.
    pub fn one(&mut self, seed: u64) -> Option<Failure> {
        let mut r = Rng::new(seed);
        let mode = match seed % 32 {
            5 | 13 | 21 | 29 => Mode::Flat32,
            7 => Mode::Seg16,
            _ => Mode::Long,
        };
        let mode = if host::lacks(mode).is_some() {
            Mode::Long
        } else {
            mode
        };
        let start = start_of(&self.base, &self.components, seed, mode);
        let pool = &self.pools[mode as usize];
        let mut seq = sequence(pool, &mut r, &start, self.place);
        self.instructions += seq.insns.len() as u64;
        if seq.at + seq.bytes().len() > END16 {
            seq.at = 0;
        }
        self.place = seq.at + seq.bytes().len();
        let engines = [0, 1 + (seed % 5) as usize];
        let (engine, text) = self.compare(&seq, &start, &engines)?;
        let n = self
            .guests
            .iter()
            .position(|g| g.name == engine)
            .unwrap_or(0);
        let (seq, text) = self.minimise(seq, &start, n, text);
        Some(Failure {
            seed,
            engine,
            sequence: seq,
            text,
        })
    }

    /// Drops instructions while the engine still differs.
    fn minimise(
        &mut self,
        mut seq: Sequence,
        start: &Start,
        engine: usize,
        mut text: String,
    ) -> (Sequence, String) {
        let mut n = 0;
        while n < seq.insns.len() && seq.insns.len() > 1 {
            let mut fewer = seq.clone();
            fewer.insns.remove(n);
            match self.compare(&fewer, start, &[engine]) {
                Some((_, t)) => (seq, text) = (fewer, t),
                None => n += 1,
            }
        }
        (seq, text)
    }

    /// Runs a stored case on everything.
    pub fn replay(&mut self, text: &str) -> Result<(), String> {
        let field = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name).map(str::trim))
                .unwrap_or_default()
        };
        let seed = field("seed").parse().map_err(|e| format!("seed: {e}"))?;
        let at = field("at").parse().map_err(|e| format!("at: {e}"))?;
        let mut insns = Vec::new();
        for line in text.lines().filter_map(|l| l.strip_prefix("code")) {
            let mut bytes = Vec::new();
            for h in line.split_whitespace() {
                bytes.push(u8::from_str_radix(h, 16).map_err(|e| format!("code: {e}"))?);
            }
            insns.push(raw(&bytes));
        }
        let mode = match field("mode") {
            "" => Mode::Long,
            "Flat32" => Mode::Flat32,
            "Seg16" => Mode::Seg16,
            other => return Err(format!("mode: {other}")),
        };
        if let Some(why) = host::lacks(mode) {
            println!("skipped: a case of {mode:?}: {why}");
            return Ok(());
        }
        let start = start_of(&self.base, &self.components, seed, mode);
        // The last is the jump to the end, which `Sequence` makes anew.
        insns.pop();
        let all: Vec<usize> = (0..self.guests.len()).collect();
        match self.compare(&Sequence { mode, at, insns }, &start, &all) {
            None => Ok(()),
            Some((engine, text)) => Err(format!("{engine}: {text}")),
        }
    }
}

impl Failure {
    /// The text of a case file.
    pub fn text(&self) -> String {
        let mut s = format!("# {}\n", self.engine);
        for l in self.text.lines() {
            let _ = writeln!(s, "# {l}");
        }
        let mode = self.sequence.mode;
        if mode != Mode::Long {
            let _ = writeln!(s, "mode {mode:?}");
        }
        let _ = writeln!(s, "seed {}\nat {}", self.seed, self.sequence.at);
        let bytes = self.sequence.bytes();
        let mut at = 0;
        let lens = self
            .sequence
            .insns
            .iter()
            .map(|i| i.bytes.len())
            .chain([mode.way_out(0).len()]);
        for n in lens {
            let hex: Vec<String> = bytes[at..at + n]
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            let i = gen_::decoded(mode, &bytes[at..at + n]);
            let _ = writeln!(s, "# {:?}\ncode {}", i.code(), hex.join(" "));
            at += n;
        }
        s
    }
}

static PROGRESS: AtomicU64 = AtomicU64::new(0);

/// Ends the process if one sequence takes for ever on an engine.
fn watch() {
    std::thread::spawn(|| {
        let mut last = u64::MAX;
        loop {
            std::thread::sleep(Duration::from_secs(10));
            let now = PROGRESS.load(Ordering::Relaxed);
            if now == last && now != 0 {
                eprintln!("sequence of seed {now} does not end");
                std::process::abort();
            }
            last = now;
        }
    });
}

/// Runs seeds `first`… until `count` or `seconds` is over. Returns the failures (at most `keep`).
pub fn campaign(first: u64, count: u64, seconds: u64, keep: usize, save: Option<&Path>) -> usize {
    watch();
    let mut f = Fuzzer::new();
    let begin = Instant::now();
    let mut failures = 0;
    let mut done = 0;
    while done < count && begin.elapsed().as_secs() < seconds && failures < keep {
        let seed = first.wrapping_add(done);
        PROGRESS.store(seed.max(1), Ordering::Relaxed);
        if let Some(x) = f.one(seed) {
            failures += 1;
            println!("{}", x.text());
            if let Some(dir) = save {
                let path = dir.join(format!("{:016x}.txt", x.seed));
                if let Err(e) = std::fs::write(&path, x.text()) {
                    eprintln!("{}: {e}", path.display());
                }
            }
        }
        done += 1;
    }
    PROGRESS.store(0, Ordering::Relaxed);
    let t = begin.elapsed().as_secs_f64();
    println!(
        "seeds {first}+{done}: {failures} failures; {} instructions, {} exceptions, {} without end; \
         {:.0} sequences/s",
        f.instructions,
        f.exceptions,
        f.lost,
        done as f64 / t
    );
    failures
}
