//! A session with a debugger of few words, and a VM that is a thread.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use pyrite_engine::{CpuidTable, DebugCaps, DebugStop, WatchKind};
use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;

use super::packet::{Incoming, MAX_PACKET_BYTES, Parser, frame, from_hex, to_hex};
use super::*;

/// What the VM was asked for, in order.
type Log = Vec<String>;

struct Debugger {
    stream: UnixStream,
    parser: Parser,
    vm: Option<JoinHandle<Log>>,
    memory: Arc<GuestMemory>,
}

/// A VM of two vCPUs: a step ends as a step, the first continue at a watchpoint, the others go on
/// until they are interrupted.
fn vm(driver: std::sync::mpsc::Receiver<Event>) -> Log {
    let mut log = Log::new();
    let mut notices = None;
    let mut states = [CpuState::reset(0, true), CpuState::reset(1, false)];
    let mut continues = 0;
    while let Ok(Event::Debugger(request)) = driver.recv() {
        let told = |cause| {
            let stopped = Notice::Stopped {
                vcpu: 1,
                cause,
                rip: 0,
            };
            notices.as_ref().map(|n: &Sender<Notice>| n.send(stopped));
        };
        match request {
            Request::Attach { notices: n, answer } => {
                notices = Some(n);
                answer.send(Ok(())).unwrap();
                continue;
            }
            Request::State { vcpu, answer } => {
                let state = states[vcpu as usize].clone();
                answer.send(Ok(Box::new(state))).unwrap();
                continue;
            }
            Request::SetState {
                vcpu,
                state,
                answer,
            } => {
                states[vcpu as usize] = *state;
                answer.send(Ok(())).unwrap();
            }
            Request::Resume(how) => {
                log.push(format!(
                    "{:?} {:x?} {:x?}",
                    how.goes, how.stops, how.watches
                ));
                if how.goes.contains(&Some(Go::Step)) {
                    told(Cause::Debug(DebugStop::Step));
                    continue;
                }
                continues += 1;
                if continues == 1 {
                    told(Cause::Debug(DebugStop::Watchpoint {
                        at: 0x1234,
                        kind: WatchKind::Access,
                    }));
                }
            }
            Request::Interrupt => told(Cause::Interrupted),
            Request::Reset { answer } => answer.send(Ok(())).unwrap(),
            Request::Detach { is_lost } => {
                log.push(format!("gone, lost: {is_lost}"));
                return log;
            }
            Request::Kill => {
                log.push("killed".into());
                return log;
            }
        }
    }
    log
}

impl Debugger {
    fn new() -> Debugger {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let (driver, events) = channel();
        let target = Target {
            memory: Arc::clone(&memory),
            driver,
            vcpus: 2,
            caps: DebugCaps {
                points: 4,
                registers: false,
            },
            cpuid: CpuidTable::default(),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        std::thread::spawn(move || session::run(&target, Stream::Unix(theirs)));
        Debugger {
            stream: ours,
            parser: Parser::default(),
            vm: Some(std::thread::spawn(move || vm(events))),
            memory,
        }
    }

    fn hear(&mut self) -> Option<Incoming> {
        loop {
            let mut byte = [0];
            if self.stream.read(&mut byte).unwrap() == 0 {
                return None;
            }
            if let Some(i) = self.parser.feed(byte[0]) {
                return Some(i);
            }
        }
    }

    fn packet(&mut self) -> String {
        loop {
            match self.hear() {
                Some(Incoming::Packet(p)) => return String::from_utf8_lossy(&p).into_owned(),
                Some(Incoming::Ack) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn send(&mut self, packet: &str) {
        self.stream.write_all(&frame(packet.as_bytes())).unwrap();
    }

    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.packet()
    }

    fn end(mut self) -> Log {
        drop(self.stream);
        self.vm.take().unwrap().join().unwrap()
    }
}

#[test]
fn debugger_sees_and_changes_the_guest() {
    let mut d = Debugger::new();
    assert!(d.ask("qSupported:swbreak+").contains("PacketSize=4000"));
    assert_eq!(d.ask("QStartNoAckMode"), "OK");
    assert_eq!(d.ask("vMustReplyEmpty"), "");
    assert_eq!(d.ask("?"), "T05thread:1;");
    assert_eq!(d.ask("qfThreadInfo"), "m1,2");
    assert_eq!(d.ask("Hg3"), "E03");
    // The description comes in pieces.
    let mut xml = String::new();
    loop {
        let part = d.ask(&format!(
            "qXfer:features:read:target.xml:{:x},100",
            xml.len()
        ));
        xml += &part[1..];
        if part.starts_with('l') {
            break;
        }
    }
    assert!(xml.starts_with("<?xml") && xml.ends_with("</target>\n"));
    let all = from_hex(d.ask("g").as_bytes()).unwrap();
    // The reset vector of a processor without long mode: EIP is the ninth.
    assert_eq!(all[32..36], [0xf0, 0xff, 0, 0]);
    assert_eq!(d.ask("P8=00100000"), "OK");
    assert_eq!(d.ask("p8"), "00100000");
    assert_eq!(d.ask("p999"), "E16");
    assert!(d.ask("P2=00").starts_with("E."));
    assert_eq!(d.ask("M1000,3:010203"), "OK");
    assert_eq!(d.ask("m1000,4"), "01020300");
    assert_eq!(d.ask("mffff0000,4"), "E0e");
    assert_eq!(d.ask("X2000,0:"), "OK");
    let mut byte = [0; 3];
    d.memory.read(0x1000, &mut byte).unwrap();
    assert_eq!(byte, [1, 2, 3]);
    assert_eq!(d.ask("qqemu.PhyMemMode"), "0");
    assert_eq!(d.ask("Qqemu.PhyMemMode:1"), "OK");
    assert_eq!(d.ask("qqemu.PhyMemMode"), "1");
    assert_eq!(d.ask("qqemu.sstepbits"), "ENABLE=1,NOIRQ=2,NOTIMER=4");
    let help = d.ask(&format!("qRcmd,{}", to_hex(b"help")));
    assert!(
        String::from_utf8(from_hex(help.as_bytes()).unwrap())
            .unwrap()
            .contains("translate")
    );
    assert_eq!(d.end(), ["gone, lost: true"]);
}

#[test]
fn guest_runs_and_stops() {
    let mut d = Debugger::new();
    d.ask("qSupported:swbreak+;hwbreak+");
    assert_eq!(d.ask("Z0,100,1"), "OK");
    assert_eq!(d.ask("Z1,100,1"), "OK");
    assert_eq!(d.ask("Z0,200,1"), "OK");
    assert_eq!(d.ask("Z4,1230,8"), "OK");
    assert_eq!(d.ask("Z0,300,1"), "OK");
    // The engine has no more than four.
    assert!(d.ask("Z0,400,1").starts_with("E.more than 4"));
    assert_eq!(d.ask("z0,300,1"), "OK");
    assert_eq!(d.ask("vCont?"), "vCont;c;C;s;S");
    assert_eq!(d.ask("vCont;s:1"), "T05thread:2;");
    assert_eq!(d.ask("vCont;c"), "T05awatch:1234;thread:2;");
    // It runs: nothing but an interrupt is understood.
    d.send("vCont;c:-1");
    assert!(d.ask("g").starts_with("E."));
    d.stream.write_all(&[3]).unwrap();
    assert_eq!(d.packet(), "T02thread:2;");
    // One that comes late does nothing.
    d.stream.write_all(&[3]).unwrap();
    assert_eq!(d.ask("qC"), "QC1");
    assert_eq!(d.ask("D"), "OK");
    let log = d.end();
    let points = "[100, 200] [Watch { at: 1230, len: 8, kind: Access }]";
    assert_eq!(log[0], format!("[Some(Step), None] {points}"));
    assert_eq!(log[1], format!("[Some(Continue), Some(Continue)] {points}"));
    assert_eq!(log[3..], ["gone, lost: false"]);
}

#[test]
fn packets_are_acknowledged_until_it_is_agreed_that_they_are_not() {
    let mut d = Debugger::new();
    d.stream.write_all(b"$qC#00").unwrap();
    assert_eq!(d.hear(), Some(Incoming::Nak));
    d.send("qC");
    assert_eq!(d.hear(), Some(Incoming::Ack));
    assert_eq!(d.hear(), Some(Incoming::Packet(b"QC1".to_vec())));
    d.stream.write_all(b"-").unwrap();
    assert_eq!(d.packet(), "QC1");
    d.send("k");
    assert_eq!(d.end(), ["killed"]);
}

/// Whatever comes, the session answers and goes on.
#[test]
fn hostile_debugger_is_survived() {
    let mut d = Debugger::new();
    assert_eq!(d.ask("QStartNoAckMode"), "OK");
    let long = "m".repeat(3 * MAX_PACKET_BYTES);
    assert_eq!(d.ask(&long), "E16");
    let letters = b"gGpPmMXZz0123456789abcdef,;:=-+HTqQRcmd}*\x00\xff";
    let mut x = 0x2545_f491_4f6c_dd1du64;
    for _ in 0..5_000 {
        let mut packet = Vec::new();
        loop {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            packet.push(letters[(x >> 32) as usize % letters.len()]);
            if x.is_multiple_of(13) {
                break;
            }
        }
        // The guest would go on, which is answered when it stops.
        if packet.starts_with(b"c") {
            continue;
        }
        d.stream.write_all(&frame(&packet)).unwrap();
        let answer = d.packet();
        assert!(answer.len() <= MAX_PACKET_BYTES, "{}", answer.len());
    }
    for odd in [
        "m0,ffffffffffffffff",
        "Mffffffffffffffff,2:0000",
        "mffffffffffffffff,10",
        "Z2,ffffffffffffffff,ffffffffffffffff",
        "Z2,0,0",
        "qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff",
        "vCont;s:ff",
        "qThreadExtraInfo,ffffffff",
    ] {
        let answer = d.ask(odd);
        assert!(answer.len() <= MAX_PACKET_BYTES, "{odd}: {answer}");
    }
    assert_eq!(d.ask("qC"), "QC1");
    d.end();
}
