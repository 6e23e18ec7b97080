//! A VM whose shell is asked over the serial port and which is controlled from outside.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::fixtures::Guest;
use crate::{Scratch, Session, ctl, pyrite};

/// How long a boot may take.
pub const BOOT: Duration = Duration::from_secs(240);
/// How long a command may take.
pub const STEP: Duration = Duration::from_secs(120);
const PROMPT: &str = "root@pyrite:~# ";

/// A running VM.
pub struct Vm {
    /// Its console.
    pub session: Session,
    socket: PathBuf,
}

impl Vm {
    /// Starts a VM on the software engine; `name` is that of its control socket.
    pub fn start(dir: &Scratch, name: &str, options: &[String]) -> Vm {
        let socket = dir.0.join(name);
        let mut command = Command::new(pyrite());
        command
            .args(["run", "--engine", "soft", "--timeout", "8m"])
            .arg("--control")
            .arg(&socket)
            .args(options);
        let session = Session::start(&mut command);
        Vm { session, socket }
    }

    /// Boots a guest to its shell.
    pub fn boot(dir: &Scratch, guest: &Guest, options: &[String]) -> Vm {
        Vm::boot_as(dir, "first", guest, options)
    }

    /// Boots one of several guests to its shell.
    pub fn boot_as(dir: &Scratch, name: &str, guest: &Guest, options: &[String]) -> Vm {
        let mut all = options.to_vec();
        for (option, value) in [("--kernel", &guest.kernel), ("--initrd", &guest.initrd)] {
            all.extend([option.to_owned(), value.display().to_string()]);
        }
        all.extend(["--append".into(), "console=ttyS0 quiet".into()]);
        let mut vm = Vm::start(dir, name, &all);
        vm.greet();
        vm
    }

    /// A guest that boots in a session of the caller's, without control from outside.
    pub fn talk(session: Session) -> Vm {
        let socket = PathBuf::new();
        let mut vm = Vm { session, socket };
        vm.greet();
        vm
    }

    /// Waits for the shell.
    fn greet(&mut self) {
        self.session.expect(PROMPT, BOOT);
        // The shell's line editor shows what is typed, and breaks it at the edge.
        self.session.send("stty cols 1000\n");
        self.session.expect(PROMPT, STEP);
    }

    /// What a command prints in the guest.
    pub fn ask(&mut self, command: &str) -> String {
        self.session.send(&format!("{command}; echo e''nd\n"));
        let all = self.session.until("end\r\n", STEP);
        self.session.expect(PROMPT, STEP);
        let (_, output) = all.split_once('\n').unwrap_or_default();
        output.trim_end_matches("end\r\n").trim().replace('\r', "")
    }

    /// The address of a symbol of the guest's kernel.
    pub fn symbol(&mut self, name: &str) -> u64 {
        let shown = self.ask(&format!("grep ' {name}$' /proc/kallsyms"));
        let digits = shown.split_whitespace().next().unwrap_or_default();
        u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{name}: {shown}"))
    }

    /// Asks from outside: exit code and output.
    pub fn control(&self, words: &[&str]) -> (i32, String) {
        ctl(&self.socket, words)
    }

    /// Asks from outside for something that must be done.
    pub fn done(&self, words: &[&str]) {
        let (code, text) = self.control(words);
        assert_eq!(code, 0, "{words:?}: {text}");
    }

    /// Ends the VM at once.
    pub fn stop(self) {
        self.done(&["stop"]);
        self.session.end(STEP);
    }
}

/// Options with their values, as they stand on a command line.
pub fn with(pairs: &[(&str, String)]) -> Vec<String> {
    let pair = |(o, v): &(&str, String)| [(*o).to_owned(), v.clone()];
    pairs.iter().flat_map(pair).collect()
}
