//! A PC that is used as a person would: by its screen, its keyboard and its drives.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::screen::{Pixels, Reader};
use crate::{Scratch, Session, ctl, pyrite};

/// How long anything on the screen may take.
const LIMIT: Duration = Duration::from_secs(90);

/// A running PC with a screen in text mode.
pub struct Pc<'a> {
    /// Its process, and its serial port if that is its console.
    pub session: Session,
    socket: PathBuf,
    dir: &'a Scratch,
    reader: Reader,
}

impl<'a> Pc<'a> {
    /// Starts one, on the software engine, whose video BIOS is `rom`.
    pub fn start(dir: &'a Scratch, rom: &Path, options: &[&str]) -> Pc<'a> {
        let socket = dir.0.join("control");
        let mut command = Command::new(pyrite());
        command
            .args(["run", "--engine", "soft"])
            .arg("--vga")
            .arg(format!("std,rom={}", rom.display()))
            .arg("--control")
            .arg(&socket)
            .args(options);
        let bytes = std::fs::read(rom).expect("video BIOS");
        Pc {
            session: Session::start(&mut command),
            socket,
            dir,
            reader: Reader::new(&bytes),
        }
    }

    /// The text on the screen; none while there is no screen yet, or in graphics.
    fn look(&self) -> Option<String> {
        let file = self.dir.0.join("screen.png");
        let shot = Command::new(pyrite())
            .arg("screenshot")
            .args([&self.socket, &file])
            .output()
            .expect("pyrite runs");
        let pixels = Pixels::from_png(&std::fs::read(&file).ok()?)?;
        shot.status.success().then(|| self.reader.read(&pixels))
    }

    /// Waits until the screen shows something that `wanted` accepts; the whole screen.
    pub fn wait(&mut self, what: &str, limit: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let until = Instant::now() + limit;
        loop {
            let text = self.look().unwrap_or_default();
            if wanted(&text) {
                return text;
            }
            let ended = self.session.ended();
            assert!(
                ended.is_none() && Instant::now() < until,
                "no {what} on the screen:\n{text}\nended: {ended:?}\n{}",
                self.session.errors()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the screen shows `text`.
    pub fn expect(&mut self, text: &str) -> String {
        self.wait(text, LIMIT, |screen| screen.contains(text))
    }

    /// Waits until the line with the cursor is `text`.
    pub fn prompt(&mut self, text: &str) -> String {
        self.wait(text, LIMIT, |screen| last_line(screen) == text)
    }

    /// Types a line behind `prompt`, a piece at a time: a BIOS keeps 15 keys that nobody has read.
    pub fn enter(&mut self, prompt: &str, line: &str) {
        self.prompt(prompt.trim_end());
        let mut there = prompt.to_owned();
        let letters: Vec<char> = line.chars().collect();
        for piece in letters.chunks(10) {
            let piece: String = piece.iter().collect();
            self.type_text(&piece.replace('\\', r"\\"));
            there.push_str(&piece);
            // What does not fit into the line is folded.
            let end: String = there.chars().skip(there.len().saturating_sub(12)).collect();
            self.wait(&there, LIMIT, |s| {
                last_line(s).ends_with(end.trim_end()) || end.trim_end().ends_with(last_line(s))
            });
        }
        self.type_text(r"\n");
    }

    /// Types.
    pub fn type_text(&self, text: &str) {
        self.keyboard("type", &[text]);
    }

    /// Presses keys, one after another.
    pub fn keys(&self, keys: &[&str]) {
        self.keyboard("key", keys);
    }

    fn keyboard(&self, command: &str, words: &[&str]) {
        let done = Command::new(pyrite())
            .arg(command)
            .arg(&self.socket)
            .args(words)
            .output()
            .expect("pyrite runs");
        assert!(done.status.success(), "{command} {words:?}: {done:?}");
    }

    /// Asks the VM for something that it does.
    pub fn done(&self, words: &[&str]) {
        let (code, text) = ctl(&self.socket, words);
        assert_eq!(code, 0, "{words:?}: {text}");
    }
}

fn last_line(screen: &str) -> &str {
    let mut lines = screen.lines().rev();
    lines.find(|l| !l.is_empty()).unwrap_or_default()
}
