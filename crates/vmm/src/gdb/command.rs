//! What debuggers ask for. GDB manual, appendix "GDB Remote Serial Protocol", sections "Packets",
//! "General Query Packets"; QEMU's documentation, docs/system/gdb.rst, for its own ones.

use pyrite_engine::{Watch, WatchKind};

use super::packet::{MAX_PACKET_BYTES, from_hex, unescape};

/// LIMIT: actions of a `vCont`.
const MAX_ACTIONS: usize = 1024;

/// Which threads a packet is about. Thread n is vCPU n - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Any; the one before, if there is one.
    Any,
    /// All.
    All,
    /// One, by number from 1.
    One(u32),
}

/// How a thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// It runs.
    Continue,
    /// One instruction.
    Step,
}

/// A breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// `Z0`.
    Software(u64),
    /// `Z1`.
    Hardware(u64),
    /// `Z2` to `Z4`.
    Watch(Watch),
}

/// A packet, understood.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// `qSupported`: the debugger's features.
    Supported {
        /// It knows `swbreak`.
        swbreak: bool,
        /// It knows `hwbreak`.
        hwbreak: bool,
    },
    /// `QStartNoAckMode`.
    NoAck,
    /// `?`.
    WhyStopped,
    /// `g`.
    ReadRegisters,
    /// `G`.
    WriteRegisters(Vec<u8>),
    /// `p`.
    ReadRegister(usize),
    /// `P`.
    WriteRegister(usize, Vec<u8>),
    /// `m`: address and length.
    ReadMemory(u64, usize),
    /// `M` and `X`.
    WriteMemory(u64, Vec<u8>),
    /// `Z`.
    Insert(Point),
    /// `z`.
    Remove(Point),
    /// `vCont?`.
    GoKinds,
    /// `vCont`, `c`, `s`, `C`, `S`: what threads do, the first that names one decides; threads that
    /// none names stay. With `c` and `s`, where the thread goes on.
    Go(Vec<(Go, Thread)>, Option<u64>),
    /// `Hg`.
    SelectForState(Thread),
    /// `Hc`.
    SelectForGo(Thread),
    /// `T`.
    IsAlive(Thread),
    /// `qC`.
    CurrentThread,
    /// `qfThreadInfo`.
    Threads,
    /// `qsThreadInfo`.
    MoreThreads,
    /// `qThreadExtraInfo`.
    ThreadName(Thread),
    /// `qAttached`.
    Attached,
    /// `qXfer:features:read:target.xml`: offset and length.
    Description(usize, usize),
    /// `qRcmd`.
    Monitor(String),
    /// `qqemu.PhyMemMode`.
    IsPhysical,
    /// `Qqemu.PhyMemMode`.
    SetPhysical(bool),
    /// `qqemu.sstepbits`.
    StepBits,
    /// `qqemu.sstep`.
    Step,
    /// `Qqemu.sstep`.
    SetStep(u64),
    /// `D`.
    Detach,
    /// `k`, `vKill`.
    Kill,
    /// Not known; the answer is empty.
    Unknown,
    /// Known, but not written as it should be.
    Bad,
}

/// A hexadecimal number of at most 64 bits.
fn number(text: &[u8]) -> Option<u64> {
    // from_str_radix takes a sign.
    if text.is_empty() || !text.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

fn split(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let n = text.iter().position(|b| *b == at)?;
    Some((text.get(..n)?, text.get(n + 1..)?))
}

fn thread(text: &[u8]) -> Option<Thread> {
    match text {
        b"-1" => Some(Thread::All),
        _ => match number(text)? {
            0 => Some(Thread::Any),
            n => Some(Thread::One(n.try_into().ok()?)),
        },
    }
}

/// Address and length of memory, no more than fits into a packet.
fn range(text: &[u8]) -> Option<(u64, usize)> {
    let (at, len) = split(text, b',')?;
    let len = usize::try_from(number(len)?).ok()?;
    Some((number(at)?, len.min(MAX_PACKET_BYTES / 2)))
}

/// `KIND,ADDR,LEN`, perhaps with conditions, which are for agents that are not here.
fn point(text: &[u8]) -> Option<Point> {
    let (kind, rest) = split(text, b',')?;
    let (at, len) = split(rest, b',')?;
    let (at, len) = (number(at)?, number(len)?);
    let watch = |kind| Some(Point::Watch(Watch { at, len, kind }));
    match kind {
        b"0" => Some(Point::Software(at)),
        b"1" => Some(Point::Hardware(at)),
        b"2" => watch(WatchKind::Write),
        b"3" => watch(WatchKind::Read),
        b"4" => watch(WatchKind::Access),
        _ => None,
    }
}

/// `;ACTION[:THREAD]...`. Signals that `C` and `S` would send are not sent: a processor has none.
fn actions(text: &[u8]) -> Option<Vec<(Go, Thread)>> {
    let mut all = Vec::new();
    for part in text.split(|b| *b == b';').skip(1) {
        let (action, who) = match split(part, b':') {
            Some((action, who)) => (action, thread(who)?),
            None => (part, Thread::All),
        };
        let go = match (action.first()?, action.get(1..)?) {
            (b'c', []) => Go::Continue,
            (b's', []) => Go::Step,
            (b'C', signal) => number(signal).map(|_| Go::Continue)?,
            (b'S', signal) => number(signal).map(|_| Go::Step)?,
            _ => return None,
        };
        if all.len() >= MAX_ACTIONS {
            return None;
        }
        all.push((go, who));
    }
    (!all.is_empty()).then_some(all)
}

/// Where `c` and `s` go on, and where `C` and `S` do, behind their signal.
fn target(first: u8, rest: &[u8]) -> Option<Option<u64>> {
    let at = match first {
        b'c' | b's' => rest,
        _ => match split(rest, b';') {
            Some((signal, at)) => number(signal).map(|_| at)?,
            None => number(rest).map(|_| &b""[..])?,
        },
    };
    if at.is_empty() {
        return Some(None);
    }
    number(at).map(Some)
}

/// Understands a packet.
pub fn parse(packet: &[u8]) -> Command {
    let Some((first, rest)) = packet.split_first() else {
        return Command::Unknown;
    };
    let known = match first {
        b'?' if rest.is_empty() => Some(Command::WhyStopped),
        b'g' if rest.is_empty() => Some(Command::ReadRegisters),
        b'G' => from_hex(rest).map(Command::WriteRegisters),
        b'p' => register(rest).map(Command::ReadRegister),
        b'P' => split(rest, b'=')
            .and_then(|(n, v)| Some(Command::WriteRegister(register(n)?, from_hex(v)?))),
        b'm' => range(rest).map(|(at, len)| Command::ReadMemory(at, len)),
        b'M' => write_memory(rest, from_hex),
        b'X' => write_memory(rest, unescape),
        b'Z' => point(rest).map(Command::Insert),
        b'z' => point(rest).map(Command::Remove),
        b'c' | b'C' => {
            target(*first, rest).map(|at| Command::Go(vec![(Go::Continue, Thread::All)], at))
        }
        // The thread of Hc; see there.
        b's' | b'S' => {
            target(*first, rest).map(|at| Command::Go(vec![(Go::Step, Thread::Any)], at))
        }
        b'H' => match rest.split_first() {
            Some((b'g', t)) => thread(t).map(Command::SelectForState),
            Some((b'c', t)) => thread(t).map(Command::SelectForGo),
            _ => None,
        },
        b'T' => thread(rest).map(Command::IsAlive),
        b'D' => Some(Command::Detach),
        b'k' => Some(Command::Kill),
        b'q' => return query(rest),
        b'Q' => return set(rest),
        b'v' => return verb(rest),
        _ => return Command::Unknown,
    };
    known.unwrap_or(Command::Bad)
}

fn register(text: &[u8]) -> Option<usize> {
    usize::try_from(number(text)?).ok()
}

fn write_memory(text: &[u8], decode: fn(&[u8]) -> Option<Vec<u8>>) -> Option<Command> {
    let (place, data) = split(text, b':')?;
    let (at, len) = split(place, b',')?;
    let data = decode(data)?;
    (number(len)? == data.len() as u64).then_some(Command::WriteMemory(number(at)?, data))
}

fn verb(text: &[u8]) -> Command {
    match text {
        b"Cont?" => Command::GoKinds,
        _ if text.starts_with(b"Cont") => {
            let all = text.get(4..).and_then(actions);
            all.map_or(Command::Bad, |a| Command::Go(a, None))
        }
        _ if text.starts_with(b"Kill") => Command::Kill,
        _ => Command::Unknown,
    }
}

fn query(text: &[u8]) -> Command {
    let after = |word: &[u8]| text.strip_prefix(word);
    if let Some(features) = after(b"Supported") {
        let has = |name: &[u8]| {
            let mut all = features.split(|b| matches!(b, b':' | b';'));
            all.any(|f| f == name)
        };
        return Command::Supported {
            swbreak: has(b"swbreak+"),
            hwbreak: has(b"hwbreak+"),
        };
    }
    if let Some(place) = after(b"Xfer:features:read:target.xml:") {
        return match range(place) {
            Some((at, len)) => Command::Description(at.try_into().unwrap_or(usize::MAX), len),
            None => Command::Bad,
        };
    }
    if let Some(line) = after(b"Rcmd,") {
        return match from_hex(line) {
            Some(line) => Command::Monitor(String::from_utf8_lossy(&line).into_owned()),
            None => Command::Bad,
        };
    }
    if let Some(who) = after(b"ThreadExtraInfo,") {
        return thread(who).map_or(Command::Bad, Command::ThreadName);
    }
    match text {
        b"C" => Command::CurrentThread,
        b"fThreadInfo" => Command::Threads,
        b"sThreadInfo" => Command::MoreThreads,
        b"qemu.PhyMemMode" => Command::IsPhysical,
        b"qemu.sstepbits" => Command::StepBits,
        b"qemu.sstep" => Command::Step,
        _ if text == b"Attached" || text.starts_with(b"Attached:") => Command::Attached,
        _ => Command::Unknown,
    }
}

fn set(text: &[u8]) -> Command {
    if let Some(on) = text.strip_prefix(b"qemu.PhyMemMode:") {
        return match on {
            b"0" => Command::SetPhysical(false),
            b"1" => Command::SetPhysical(true),
            _ => Command::Bad,
        };
    }
    if let Some(bits) = text.strip_prefix(b"qemu.sstep=") {
        return number(bits).map_or(Command::Bad, Command::SetStep);
    }
    match text {
        b"StartNoAckMode" => Command::NoAck,
        _ => Command::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_understood() {
        let watch = |kind| {
            Point::Watch(Watch {
                at: 0xffff_8000_0000_0000,
                len: 8,
                kind,
            })
        };
        for (text, command) in [
            ("?", Command::WhyStopped),
            ("g", Command::ReadRegisters),
            ("p1f", Command::ReadRegister(31)),
            ("P2=0011", Command::WriteRegister(2, vec![0, 0x11])),
            (
                "mffffffff81000000,40",
                Command::ReadMemory(0xffff_ffff_8100_0000, 0x40),
            ),
            ("M10,2:abcd", Command::WriteMemory(16, vec![0xab, 0xcd])),
            ("X10,2:}\u{3}a", Command::WriteMemory(16, vec![b'#', b'a'])),
            ("Z0,1000,1", Command::Insert(Point::Software(0x1000))),
            ("z1,1000,1", Command::Remove(Point::Hardware(0x1000))),
            (
                "Z2,ffff800000000000,8",
                Command::Insert(watch(WatchKind::Write)),
            ),
            (
                "Z3,ffff800000000000,8",
                Command::Insert(watch(WatchKind::Read)),
            ),
            (
                "Z4,ffff800000000000,8",
                Command::Insert(watch(WatchKind::Access)),
            ),
            ("vCont?", Command::GoKinds),
            (
                "vCont;s:2;c",
                Command::Go(
                    vec![(Go::Step, Thread::One(2)), (Go::Continue, Thread::All)],
                    None,
                ),
            ),
            (
                "vCont;C05:-1",
                Command::Go(vec![(Go::Continue, Thread::All)], None),
            ),
            ("s", Command::Go(vec![(Go::Step, Thread::Any)], None)),
            (
                "c100",
                Command::Go(vec![(Go::Continue, Thread::All)], Some(0x100)),
            ),
            (
                "C05;100",
                Command::Go(vec![(Go::Continue, Thread::All)], Some(0x100)),
            ),
            ("Hg2", Command::SelectForState(Thread::One(2))),
            ("Hc-1", Command::SelectForGo(Thread::All)),
            ("T1", Command::IsAlive(Thread::One(1))),
            (
                "qSupported:multiprocess+;swbreak+;hwbreak+;xmlRegisters=i386",
                Command::Supported {
                    swbreak: true,
                    hwbreak: true,
                },
            ),
            (
                "qXfer:features:read:target.xml:0,ffb",
                Command::Description(0, 0xffb),
            ),
            ("qRcmd,68656c70", Command::Monitor("help".into())),
            ("qAttached:1", Command::Attached),
            ("QStartNoAckMode", Command::NoAck),
            ("Qqemu.PhyMemMode:1", Command::SetPhysical(true)),
            ("Qqemu.sstep=7", Command::SetStep(7)),
            ("D", Command::Detach),
            ("D;1", Command::Detach),
            ("vKill;1", Command::Kill),
            ("vMustReplyEmpty", Command::Unknown),
            ("qTStatus", Command::Unknown),
            ("", Command::Unknown),
            ("!", Command::Unknown),
        ] {
            assert_eq!(parse(text.as_bytes()), command, "{text}");
        }
    }

    #[test]
    fn wrong_packets_are_refused() {
        for text in [
            "p",
            "pfffffffffffffffff",
            "P1",
            "P1=0",
            "m",
            "m1",
            "m1,",
            "m+1,2",
            "m-1,2",
            "m10000000000000000,1",
            "M0,2:ab",
            "M0,1:xy",
            "X0,1:}",
            "X0,ffffffffffffffff:",
            "Z5,0,1",
            "Z0",
            "Z0,1",
            "z0,x,1",
            "Hx1",
            "H",
            "Hg",
            "T",
            "Tx",
            "vCont",
            "vCont;",
            "vCont;x",
            "vCont;c:p1.1",
            "vCont;C",
            "cxyz",
            "C",
            "qXfer:features:read:target.xml:",
            "qRcmd,0",
            "Qqemu.PhyMemMode:2",
            "Qqemu.sstep=",
            "G0",
        ] {
            assert_eq!(parse(text.as_bytes()), Command::Bad, "{text}");
        }
        let many = format!("vCont{}", ";c:1".repeat(MAX_ACTIONS + 1));
        assert_eq!(parse(many.as_bytes()), Command::Bad);
        // No more than a packet can bring back.
        assert_eq!(
            parse(b"m0,ffffffff"),
            Command::ReadMemory(0, MAX_PACKET_BYTES / 2)
        );
    }

    /// Packets of the right letters in the wrong order.
    #[test]
    fn noise_is_answered() {
        let letters = b"?gGpPmMXZz0123456789abcdef,;:=-+HcsCSTDkqQvCont}$#*\x00\xff";
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..200_000 {
            let mut packet = Vec::new();
            loop {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                packet.push(letters[(x >> 32) as usize % letters.len()]);
                if x.is_multiple_of(11) {
                    break;
                }
            }
            let _ = parse(&packet);
        }
    }
}
