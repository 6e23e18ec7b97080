//! A running guest is saved, and goes on in a new machine where it was.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use pyrite_api::control::{
    Command, Ending, Event, Hello, Message, Outcome, PROTOCOL, Request, receive, send,
};
use pyrite_api::v1::{BootSpec, EngineKind, NetKind, NetSpec, VmSpec};

/// Answers each byte on the serial port with the next letter, which it keeps in a register:
///
/// ```text
///     mov bl, 'a'
/// l:  mov dx, LSR; in al, dx; test al, 1; jz l
///     mov dx, RBR; in al, dx; mov al, bl; out dx, al; inc bl; jmp l
/// ```
const LETTERS: [u8; 24] = [
    0xb3, b'a', 0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec,
    0x88, 0xd8, 0xee, 0xfe, 0xc3, 0xeb, 0xeb, 0x90,
];

/// An ELF with `code` behind its PVH entry at 1 MiB.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut k = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| k[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x01\x01\x01");
    put(16, &[2, 0, 3, 0]);
    put(24, &0x10_0000u32.to_le_bytes());
    put(28, &52u32.to_le_bytes());
    put(42, &[32, 0, 2, 0]);
    let n = code.len() as u32;
    let headers = [
        [1, 0x1000, 0x10_0000, 0x10_0000, n, n],
        [4, 0x200, 0, 0, 20, 20],
    ];
    for (i, w) in headers.iter().enumerate() {
        for (j, word) in w.iter().enumerate() {
            put(52 + i * 32 + j * 4, &u32::to_le_bytes(*word));
        }
    }
    for (i, w) in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000]
        .iter()
        .enumerate()
    {
        put(0x200 + i * 4, &w.to_le_bytes());
    }
    k.extend_from_slice(code);
    k
}

struct Vm {
    control: UnixStream,
    from: BufReader<UnixStream>,
    console: UnixStream,
    process: JoinHandle<()>,
}

impl Vm {
    fn start(spec: VmSpec) -> Vm {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (console, their_console) = UnixStream::pair().unwrap();
        console
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let process = std::thread::spawn(move || {
            pyrite_vmm::process::serve(theirs, their_console).unwrap();
        });
        let from = BufReader::new(control.try_clone().unwrap());
        let mut vm = Vm {
            control,
            from,
            console,
            process,
        };
        send(
            &mut vm.control,
            &Hello {
                protocol: PROTOCOL,
                spec,
                terminal_size: None,
            },
        )
        .unwrap();
        match receive::<Message>(&mut vm.from).unwrap() {
            Some(Message::Event(Event::Started { .. })) => vm,
            other => panic!("{other:?}"),
        }
    }

    fn ask(&mut self, command: Command) -> Outcome {
        send(&mut self.control, &Request { id: 1, command }).unwrap();
        match receive::<Message>(&mut self.from).unwrap() {
            Some(Message::Reply { outcome, .. }) => outcome,
            other => panic!("{other:?}"),
        }
    }

    /// Types `count` keys; what the guest answers.
    fn keys(&mut self, count: usize) -> String {
        let mut answer = vec![0; count];
        self.console.write_all(&vec![b'.'; count]).unwrap();
        self.console.read_exact(&mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    }

    fn stop(mut self) {
        assert_eq!(self.ask(Command::Stop), Outcome::Done);
        let end = receive::<Message>(&mut self.from).unwrap();
        assert_eq!(end, Some(Message::Event(Event::Ended(Ending::Stopped))));
        self.process.join().unwrap();
    }
}

struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn spec(dir: &Path) -> VmSpec {
    let path = dir.join("kernel");
    std::fs::write(&path, kernel(&LETTERS)).unwrap();
    VmSpec {
        cpus: 2,
        memory_bytes: 32 << 20,
        engine: EngineKind::Soft,
        boot: BootSpec {
            kernel: path,
            ..BootSpec::default()
        },
        net: NetSpec {
            kind: NetKind::None,
            ..NetSpec::default()
        },
        ..VmSpec::default()
    }
}

#[test]
fn guest_goes_on_where_it_was_saved() {
    let dir = Dir(std::env::temp_dir().join(format!("pyrite-snapshot-{}", std::process::id())));
    std::fs::create_dir_all(&dir.0).unwrap();
    let spec = spec(&dir.0);
    let saved = dir.0.join("saved");

    let mut vm = Vm::start(spec.clone());
    assert_eq!(vm.keys(3), "abc");
    assert_eq!(
        vm.ask(Command::Snapshot { dir: saved.clone() }),
        Outcome::Done
    );
    // The saved VM itself goes on too.
    assert_eq!(vm.keys(2), "de");
    // A snapshot is never overwritten.
    let again = vm.ask(Command::Snapshot { dir: saved.clone() });
    assert!(matches!(again, Outcome::Failed(_)), "{again:?}");
    vm.stop();

    let restored = VmSpec {
        restore: Some(saved),
        boot: BootSpec::default(),
        ..spec
    };
    let mut vm = Vm::start(restored);
    assert_eq!(vm.keys(3), "def");
    // Its kernel is known, so it can be reset.
    assert_eq!(vm.ask_reset(), Outcome::Done);
    assert_eq!(vm.keys(1), "a");
    vm.stop();
}

impl Vm {
    /// A reset is told before it is answered.
    fn ask_reset(&mut self) -> Outcome {
        send(
            &mut self.control,
            &Request {
                id: 2,
                command: Command::Reset,
            },
        )
        .unwrap();
        let told = receive::<Message>(&mut self.from).unwrap();
        assert_eq!(told, Some(Message::Event(Event::Reset { count: 1 })));
        match receive::<Message>(&mut self.from).unwrap() {
            Some(Message::Reply { outcome, .. }) => outcome,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn paused_guest_stands_still_and_is_inspected() {
    let dir = Dir(std::env::temp_dir().join(format!("pyrite-pause-{}", std::process::id())));
    std::fs::create_dir_all(&dir.0).unwrap();
    let mut vm = Vm::start(spec(&dir.0));
    assert_eq!(vm.keys(1), "a");
    assert_eq!(vm.ask(Command::Pause), Outcome::Done);
    let time = |vm: &mut Vm| {
        vm.ask(Command::Inspect {
            path: "time-ns".into(),
        })
    };
    let before = time(&mut vm);
    assert_eq!(time(&mut vm), before);
    let missing = vm.ask(Command::Inspect {
        path: "no/such".into(),
    });
    assert!(matches!(missing, Outcome::Failed(_)), "{missing:?}");
    assert!(matches!(
        vm.ask(Command::Inspect {
            path: "units".into()
        }),
        Outcome::Tree(_)
    ));
    assert_eq!(vm.ask(Command::Resume), Outcome::Done);
    assert_eq!(vm.keys(1), "b");
    vm.stop();
}
