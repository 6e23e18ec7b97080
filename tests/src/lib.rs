//! System tests of the pyrite executable. The tests are in `tests/`; this library is their harness.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub mod drives;
pub mod firmware;
pub mod fixtures;
pub mod gdb;
pub mod guest;
pub mod iso;
pub mod packages;
pub mod pc;
pub mod screen;
pub mod user_space;
pub mod vm;

/// The pyrite executable of this build, built if need be.
pub fn pyrite() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // target/PROFILE/deps/this-test
        let exe = std::env::current_exe().expect("path of the test");
        let profile_dir = exe
            .parent()
            .and_then(Path::parent)
            .expect("target directory");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "pyrite-cli"]);
        if profile_dir.ends_with("release") {
            build.arg("--release");
        }
        if let Some(target) = profile_dir.parent() {
            build.arg("--target-dir").arg(target);
        }
        assert!(
            build.status().expect("cargo").success(),
            "pyrite does not build"
        );
        profile_dir.join("pyrite")
    })
}

/// Says that this test, or a part of it, is not done here, and why. What passing tests print is not
/// shown as a rule: the line also goes to the file that `PYRITE_SKIPPED` names, for who runs them all.
pub fn skipped(why: impl std::fmt::Display) {
    let thread = std::thread::current();
    let line = format!("skipped: {}: {why}\n", thread.name().unwrap_or("test"));
    print!("{line}");
    if let Some(path) = std::env::var_os("PYRITE_SKIPPED") {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path);
        let _ = file.and_then(|mut f| f.write_all(line.as_bytes()));
    }
}

/// A directory that goes away with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// A new one; `name` must differ between tests.
    pub fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("pyrite-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("temporary directory");
        Scratch(dir)
    }
    /// A file in it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("temporary file");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs pyrite to its end with empty input.
pub fn run(args: &[&str]) -> Output {
    Command::new(pyrite())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("pyrite runs")
}

/// Asks a running VM; the exit code, and all that was printed.
pub fn ctl(socket: &Path, words: &[&str]) -> (i32, String) {
    let done = Command::new(pyrite())
        .arg("ctl")
        .arg(socket)
        .args(words)
        .output()
        .expect("pyrite runs");
    let text = [done.stdout, done.stderr].concat();
    (
        done.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A running pyrite, talked to through pipes.
pub struct Session {
    child: Child,
    input: Option<ChildStdin>,
    pieces: Receiver<Vec<u8>>,
    /// Printed and not expected yet.
    seen: String,
    /// Printed.
    all: String,
    errors: Arc<Mutex<String>>,
    /// Disconnected when standard error has ended.
    errors_end: Receiver<()>,
}

impl Session {
    /// Starts pyrite.
    pub fn start(command: &mut Command) -> Session {
        Session::start_with(command, None)
    }

    /// Starts pyrite; what it prints also goes to the file `log`, as it comes.
    pub fn start_logged(command: &mut Command, log: &Path) -> Session {
        let log = std::fs::File::create(log).expect("log file");
        Session::start_with(command, Some(log))
    }

    fn start_with(command: &mut Command, mut log: Option<std::fs::File>) -> Session {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("pyrite starts");
        let mut output = child.stdout.take().expect("piped");
        let (sender, pieces) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                if let Some(log) = &mut log {
                    let _ = log.write_all(&buffer[..n]);
                }
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let errors: Arc<Mutex<String>> = Arc::default();
        let mut stderr = child.stderr.take().expect("piped");
        let kept = Arc::clone(&errors);
        let (end, errors_end) = channel();
        std::thread::spawn(move || {
            let _end = end;
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stderr.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
                kept.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&text);
            }
        });
        let input = child.stdin.take();
        Session {
            child,
            input,
            pieces,
            seen: String::new(),
            all: String::new(),
            errors,
            errors_end,
        }
    }

    /// Types.
    pub fn send(&mut self, text: &str) {
        let input = self.input.as_mut().expect("input is open");
        input
            .write_all(text.as_bytes())
            .and_then(|()| input.flush())
            .expect("input is taken");
    }

    /// Waits until the guest has printed `text` since the last call; panics with everything that
    /// was seen if that takes longer than `limit`.
    pub fn expect(&mut self, text: &str, limit: Duration) {
        self.until(text, limit);
    }

    /// As [`Session::expect`]; what was printed before `text`.
    pub fn until(&mut self, text: &str, limit: Duration) -> String {
        let until = Instant::now() + limit;
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return before;
            }
            match self
                .pieces
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(p) => self.take(&p),
                Err(e) => panic!(
                    "no {text:?} ({e}); seen:\n{}\nstandard error:\n{}",
                    self.seen,
                    self.errors()
                ),
            }
        }
    }

    /// Waits for `before`, digits and a full stop; the number.
    pub fn expect_number(&mut self, before: &str, limit: Duration) -> u64 {
        let until = Instant::now() + limit;
        loop {
            self.expect(before, until.saturating_duration_since(Instant::now()));
            let left = until.saturating_duration_since(Instant::now());
            while !self.seen.contains('.') {
                match self.pieces.recv_timeout(left) {
                    Ok(p) => self.take(&p),
                    Err(e) => panic!("no number after {before:?} ({e}); seen:\n{}", self.seen),
                }
            }
            if let Some(n) = self.seen.split('.').next().and_then(|t| t.parse().ok()) {
                return n;
            }
        }
    }

    /// All that was printed so far.
    pub fn all(&self) -> &str {
        &self.all
    }

    fn take(&mut self, piece: &[u8]) {
        let text = String::from_utf8_lossy(piece);
        self.seen.push_str(&text);
        self.all.push_str(&text);
    }

    /// What came on standard error so far.
    pub fn errors(&self) -> String {
        self.errors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Process id of pyrite.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit code, if pyrite has ended.
    pub fn ended(&mut self) -> Option<i32> {
        let status = self.child.try_wait().expect("pyrite can be waited for")?;
        // Its last words may still be in the pipe.
        let _ = self.errors_end.recv_timeout(Duration::from_secs(5));
        Some(status.code().unwrap_or(-1))
    }

    /// Waits for the end; the exit code and the rest of what was printed.
    pub fn end(mut self, limit: Duration) -> (i32, String, String) {
        let until = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait().expect("pyrite can be waited for") {
                Some(status) => break status,
                None if Instant::now() > until => {
                    panic!("does not end; seen:\n{}\n{}", self.seen, self.errors());
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        while let Ok(p) = self.pieces.recv_timeout(Duration::from_secs(5)) {
            self.seen.push_str(&String::from_utf8_lossy(&p));
        }
        // Its last words may still be in the pipe.
        let _ = self.errors_end.recv_timeout(Duration::from_secs(5));
        let errors = self.errors();
        (
            status.code().unwrap_or(-1),
            std::mem::take(&mut self.seen),
            errors,
        )
    }
}

/// True while a process does something, or holds files.
fn lives(pid: &str) -> bool {
    // The first thread may be dead while others still hold the files.
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().any(|t| {
        std::fs::read_to_string(t.path().join("stat")).is_ok_and(|s| {
            s.rsplit_once(')')
                .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
        })
    })
}

impl Drop for Session {
    fn drop(&mut self) {
        let pid = self.child.id();
        // None if it has ended and was waited for.
        let vm = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let vm = vm.unwrap_or_default();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The VM process follows, but not at once, and has its disks locked until then.
        let until = Instant::now() + Duration::from_secs(30);
        while vm.split_whitespace().any(lives) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
