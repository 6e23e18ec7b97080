//! A stock gdb, driven through its command line.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::Session;

const PROMPT: &str = "(gdb) ";
const LIMIT: Duration = Duration::from_secs(60);

/// A running gdb.
pub struct Gdb(Session);

impl Gdb {
    /// Starts one; none (and that is said) where there is no gdb.
    pub fn start() -> Option<Gdb> {
        if Command::new("gdb").arg("--version").output().is_err() {
            crate::skipped("there is no gdb here; install the package gdb");
            return None;
        }
        let mut command = Command::new("gdb");
        command
            .args([
                "-nx",
                "-q",
                "-ex",
                "set pagination off",
                "-ex",
                "set confirm off",
            ])
            .args(["-ex", "set style enabled off", "-ex", "set width 0"])
            .env("DEBUGINFOD_URLS", "")
            .env("TERM", "dumb");
        let mut gdb = Gdb(Session::start(&mut command));
        gdb.0.until(PROMPT, LIMIT);
        Some(gdb)
    }

    /// What a command shows, with what it complains about.
    pub fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    /// Gives a command that takes until something happens.
    pub fn send(&mut self, command: &str) {
        self.0.send(&format!("{command}\n"));
    }

    /// What has been shown until the next prompt.
    pub fn answer(&mut self) -> String {
        let shown = self.0.until(PROMPT, LIMIT);
        format!("{shown}{}", self.0.errors())
    }

    /// The value of an expression.
    pub fn value(&mut self, expression: &str) -> u64 {
        self.send(&format!("output/d (unsigned long)({expression})"));
        let shown = self.0.until(PROMPT, LIMIT);
        match shown.trim().parse::<i64>() {
            Ok(value) => value.cast_unsigned(),
            Err(_) => panic!("{expression}: {shown}{}", self.0.errors()),
        }
    }

    /// What a stub says to a command of its own, which must have `text` in it: gdb shows it among its
    /// complaints, which come by another pipe.
    pub fn monitor(&mut self, command: &str, text: &str) {
        let shown = self.ask(&format!("monitor {command}"));
        let until = Instant::now() + LIMIT;
        while !shown.contains(text) && !self.0.errors().contains(text) {
            assert!(
                Instant::now() < until,
                "{command}: {shown}{}",
                self.0.errors()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Connects to a stub.
    pub fn connect(&mut self, socket: &Path) -> String {
        self.ask(&format!("target remote {}", socket.display()))
    }

    /// Presses Control-C.
    pub fn interrupt(&mut self) {
        let pid = self.0.pid().to_string();
        let done = Command::new("kill").args(["-INT", &pid]).status();
        assert!(done.expect("kill").success());
    }

    /// Leaves.
    pub fn quit(mut self) {
        self.send("quit");
        self.0.end(LIMIT);
    }
}
