//! `pyrite profile`: where a running guest spends its time.
//!
//! The vCPUs of a running VM are asked for their instruction pointers many times a second. A vCPU
//! of the software engine answers at the next place where it takes interrupts: the head of a loop, a
//! function's entry or the place to which it returns. That is exact enough for functions, not for
//! instructions.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use pyrite_api::control::{self, Command, Message, Outcome, Request, Tree};

use crate::exit;

/// LIMIT: bytes of a file of symbols; a kernel with debug information has less.
const SYMBOLS_BYTES_MAX: u64 = 2 << 30;
/// The symbol whose address the guest's LSTAR register holds, by which a kernel that was moved at
/// boot (KASLR) is found.
const SYSTEM_CALL_ENTRY: &str = "entry_SYSCALL_64";

/// Arguments of `pyrite profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// The socket that the VM was given with --control
    socket: PathBuf,
    /// How long to watch
    #[arg(long, value_name = "N", default_value_t = 5.0)]
    seconds: f64,
    /// How often to look, per second
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    hz: u32,
    /// The guest kernel's System.map (or a copy of its /proc/kallsyms), or an ELF file with symbols
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// How many lines to show
    #[arg(long, value_name = "N", default_value_t = 30)]
    top: usize,
}

/// Watches, and prints what was seen. 0 if it could.
pub fn run(args: &ProfileArgs) -> u8 {
    match profile(args) {
        Ok(text) => {
            // A reader that has seen enough is no error.
            let _ = std::io::stdout().write_all(text.as_bytes());
            0
        }
        Err(e) => {
            eprintln!("pyrite: {e:#}");
            exit::BAD_INPUT
        }
    }
}

/// What was seen.
#[derive(Default)]
struct Samples {
    /// Instruction pointers, with whether they were of user code.
    at: BTreeMap<(u64, bool), u64>,
    /// Looks at vCPUs, and how many of them waited for an interrupt.
    looks: u64,
    halted: u64,
    lstar: u64,
}

impl Samples {
    /// Notes what each vCPU of a `vm` tree does.
    fn note(&mut self, tree: &Tree) {
        let Tree::Node(children) = tree else { return };
        for (name, cpu) in children {
            if !name.starts_with("vcpu") {
                continue;
            }
            let number = |field| match child(cpu, field) {
                Some(Tree::Hex(n) | Tree::Uint(n)) => Some(*n),
                _ => None,
            };
            let Some(rip) = number("rip") else { continue };
            self.looks += 1;
            self.lstar = number("lstar").unwrap_or(self.lstar);
            let running = Tree::Text("Running".into());
            if child(cpu, "activity").is_some_and(|a| *a != running) {
                self.halted += 1;
                continue;
            }
            let linear = rip.wrapping_add(number("cs-base").unwrap_or(0));
            let user = number("cpl") == Some(3);
            *self.at.entry((linear, user)).or_default() += 1;
        }
    }
}

fn child<'t>(tree: &'t Tree, name: &str) -> Option<&'t Tree> {
    match tree {
        Tree::Node(c) => c.iter().find(|(n, _)| n == name).map(|(_, t)| t),
        _ => None,
    }
}

fn profile(args: &ProfileArgs) -> Result<String> {
    if !(args.seconds > 0.0 && args.seconds <= 86_400.0) {
        bail!(
            "--seconds: is {}; expected more than 0, at most 86400",
            args.seconds
        );
    }
    let symbols = match &args.symbols {
        Some(path) => Symbols::read(path)?,
        None => Symbols::default(),
    };
    let mut stream = UnixStream::connect(&args.socket)
        .with_context(|| format!("no VM listens at {}", args.socket.display()))?;
    let mut from = BufReader::new(stream.try_clone().context("control socket")?);
    let mut samples = Samples::default();
    let began = Instant::now();
    let (length, pause) = (
        Duration::from_secs_f64(args.seconds),
        Duration::from_secs_f64(1.0 / f64::from(args.hz)),
    );
    let mut id = 0u64;
    while began.elapsed() < length {
        id += 1;
        let command = Command::Inspect { path: "vm".into() };
        control::send(&mut stream, &Request { id, command }).context("control socket")?;
        match control::receive::<Message>(&mut from).context("control socket")? {
            Some(Message::Reply { outcome, .. }) => match outcome {
                Outcome::Tree(tree) => samples.note(&tree),
                Outcome::Failed(why) => bail!("{why}"),
                Outcome::Done => {}
            },
            // What was seen until then is worth showing.
            _ => break,
        }
        let next = pause * u32::try_from(id).unwrap_or(u32::MAX);
        std::thread::sleep(next.saturating_sub(began.elapsed()).min(pause));
    }
    Ok(report(&samples, &symbols, args.top))
}

fn report(samples: &Samples, symbols: &Symbols, top: usize) -> String {
    let offset = symbols.offset(samples.lstar);
    let mut named: BTreeMap<String, u64> = BTreeMap::new();
    for (&(at, user), &n) in &samples.at {
        let name = symbols
            .name(at.wrapping_sub(offset))
            .filter(|_| !user || offset == 0)
            .map_or_else(|| format!("{at:#x}"), str::to_owned);
        let whose = if user { "user  " } else { "kernel" };
        *named.entry(format!("{whose}  {name}")).or_default() += n;
    }
    let mut lines: Vec<(u64, String)> = named.into_iter().map(|(name, n)| (n, name)).collect();
    lines.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let running = samples.looks - samples.halted;
    let mut out = format!(
        "{} looks at vCPUs: {running} running, {} halted\n",
        samples.looks, samples.halted
    );
    let rest: u64 = lines.iter().skip(top).map(|l| l.0).sum();
    lines.truncate(top);
    if rest > 0 {
        lines.push((rest, "(others)".into()));
    }
    for (n, name) in lines {
        let share = 100.0 * n as f64 / running.max(1) as f64;
        out.push_str(&format!("{share:6.1} %  {n:7}  {name}\n"));
    }
    out
}

/// Names of addresses, sorted by them.
#[derive(Default)]
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    fn read(path: &Path) -> Result<Symbols> {
        let what = || format!("--symbols: {}", path.display());
        let file = std::fs::metadata(path).with_context(what)?;
        if file.len() > SYMBOLS_BYTES_MAX {
            bail!("{} is larger than 2 GiB", what());
        }
        let bytes = std::fs::read(path).with_context(what)?;
        let symbols = if bytes.starts_with(b"\x7fELF") {
            Symbols::from_elf(&bytes)
        } else {
            Symbols::from_map(&bytes)
        };
        symbols.with_context(|| {
            format!(
                "{} is no System.map and no 64-bit ELF file with symbols",
                what()
            )
        })
    }

    fn sorted(mut list: Vec<(u64, String)>) -> Option<Symbols> {
        list.sort();
        list.dedup_by_key(|s| s.0);
        (!list.is_empty()).then_some(Symbols(list))
    }

    /// Lines of address, type and name. nm(1).
    fn from_map(bytes: &[u8]) -> Option<Symbols> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut list = Vec::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let kind = words.next()?;
            let name = words.next()?;
            if matches!(kind, "t" | "T" | "w" | "W") && address != 0 {
                list.push((address, name.to_owned()));
            }
        }
        Symbols::sorted(list)
    }

    /// The functions of an ELF file's symbol table. System V ABI, chapter 4 (gABI "Symbol Table").
    fn from_elf(bytes: &[u8]) -> Option<Symbols> {
        const SYMTAB: u32 = 2;
        const SYMBOL_BYTES: usize = 24;
        const FUNCTION: u8 = 2;
        let get = |at: u64, len: usize| {
            let at = usize::try_from(at).ok()?;
            bytes.get(at..at.checked_add(len)?)
        };
        let u16_at = |at| Some(u16::from_le_bytes(get(at, 2)?.try_into().ok()?));
        let u32_at = |at| Some(u32::from_le_bytes(get(at, 4)?.try_into().ok()?));
        let u64_at = |at| Some(u64::from_le_bytes(get(at, 8)?.try_into().ok()?));
        // 64 bits, little-endian.
        if get(4, 2)? != [2, 1] {
            return None;
        }
        let (sections, size, count) = (u64_at(0x28)?, u64::from(u16_at(0x3a)?), u16_at(0x3c)?);
        let header = |n: u32| sections.checked_add(u64::from(n).checked_mul(size)?);
        let mut list = Vec::new();
        for n in 0..u32::from(count) {
            let h = header(n)?;
            if u32_at(h.checked_add(4)?)? != SYMTAB {
                continue;
            }
            let (at, len, names) = (u64_at(h + 0x18)?, u64_at(h + 0x20)?, u32_at(h + 0x28)?);
            let strings = header(names)?;
            let strings = get(
                u64_at(strings.checked_add(0x18)?)?,
                usize::try_from(u64_at(strings.checked_add(0x20)?)?).ok()?,
            )?;
            let table = get(at, usize::try_from(len).ok()?)?;
            for symbol in table.chunks_exact(SYMBOL_BYTES) {
                let name = u32::from_le_bytes(symbol[..4].try_into().ok()?) as usize;
                let value = u64::from_le_bytes(symbol[8..16].try_into().ok()?);
                let name = strings.get(name..)?.split(|b| *b == 0).next()?;
                if symbol[4] & 15 == FUNCTION && value != 0 {
                    list.push((value, String::from_utf8_lossy(name).into_owned()));
                }
            }
        }
        Symbols::sorted(list)
    }

    /// By how much the guest's kernel lies above where the symbols say.
    fn offset(&self, lstar: u64) -> u64 {
        let entry = self.0.iter().find(|(_, name)| name == SYSTEM_CALL_ENTRY);
        match entry {
            Some((address, _)) if lstar != 0 => lstar.wrapping_sub(*address),
            _ => 0,
        }
    }

    fn name(&self, at: u64) -> Option<&str> {
        /// No function is longer than this.
        const LONGEST: u64 = 1 << 20;
        let n = self.0.partition_point(|(a, _)| *a <= at).checked_sub(1)?;
        let (begins, name) = &self.0[n];
        (at - begins < LONGEST).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
0000000000000000 A nothing
ffffffff81000000 T _text
ffffffff81001000 T entry_SYSCALL_64
ffffffff81002000 t helper
ffffffff82000000 D data
";

    #[test]
    fn symbols_of_a_moved_kernel_are_found() {
        let s = Symbols::from_map(MAP.as_bytes()).unwrap();
        assert_eq!(s.name(0xffff_ffff_8100_0fff), Some("_text"));
        assert_eq!(s.name(0xffff_ffff_8100_2004), Some("helper"));
        assert_eq!(s.name(0xffff_ffff_80ff_ffff), None);
        assert_eq!(s.name(0xffff_ffff_9000_0000), None);
        assert_eq!(s.offset(0xffff_ffff_9100_1000), 0x1000_0000);
        assert_eq!(s.offset(0), 0);
    }

    #[test]
    fn other_files_have_no_symbols() {
        for bytes in [&b""[..], b"hello", b"zz T x", b"\xff\xff", b"10 T"] {
            assert!(Symbols::from_map(bytes).is_none(), "{bytes:?}");
        }
        assert!(Symbols::from_elf(b"\x7fELF").is_none());
        let exe = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let whole = Symbols::from_elf(&exe).unwrap();
        assert!(whole.0.iter().any(|(_, n)| n == "main"));
        // Cut off or damaged anywhere: no panic.
        for cut in (0..exe.len().min(4096)).step_by(7) {
            let _ = Symbols::from_elf(&exe[..cut]);
            let mut damaged = exe[..4096].to_vec();
            damaged[cut] ^= 0xff;
            let _ = Symbols::from_elf(&damaged);
        }
    }

    #[test]
    fn time_is_told_apart() {
        let cpu = |activity: &str, rip: u64, cpl: u64| {
            Tree::Node(vec![
                ("activity".into(), Tree::Text(activity.into())),
                ("rip".into(), Tree::Hex(rip)),
                ("cs-base".into(), Tree::Hex(0)),
                ("cpl".into(), Tree::Uint(cpl)),
                ("lstar".into(), Tree::Hex(0xffff_ffff_8100_1000)),
            ])
        };
        let mut s = Samples::default();
        let helper = 0xffff_ffff_8100_2010;
        s.note(&Tree::Node(vec![
            ("tsc-khz".into(), Tree::Uint(1)),
            ("vcpu0".into(), cpu("Running", helper, 0)),
            ("vcpu1".into(), cpu("Halted", helper, 0)),
        ]));
        s.note(&Tree::Node(vec![
            ("vcpu0".into(), cpu("Running", helper + 1, 0)),
            ("vcpu1".into(), cpu("Running", 0x5555_0000, 3)),
        ]));
        let map = Symbols::from_map(MAP.as_bytes()).unwrap();
        let text = report(&s, &map, 10);
        assert!(
            text.contains("4 looks at vCPUs: 3 running, 1 halted"),
            "{text}"
        );
        assert!(text.contains("66.7 %        2  kernel  helper"), "{text}");
        assert!(
            text.contains("33.3 %        1  user    0x55550000"),
            "{text}"
        );
        assert!(report(&s, &map, 1).contains("(others)"));
    }
}
