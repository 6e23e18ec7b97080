//! Guests that are asked over a shell on the serial port, with a program of the host in their
//! initial RAM disk.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PROMPT: &str = "root@pyrite:~# ";
/// LIMIT: a boot that takes longer has failed.
const BOOT_MAX: Duration = Duration::from_secs(180);

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// The directory of a guest of the system tests (`vmlinuz`, `initrd.img`), which that example
/// makes.
pub fn directory(example: &str) -> Result<PathBuf, String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(program)
        .args(["run", "--quiet", "-p", "pyrite-tests", "--example", example])
        .arg("--target-dir")
        .arg(super::target_dir()?)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot start cargo: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    if out.status.success() && !text.is_empty() {
        Ok(text.into())
    } else {
        Err("no guest; see above".into())
    }
}

/// A program of the host with its libraries; its package has its name.
fn files_of(program: &str) -> Result<Vec<PathBuf>, String> {
    let name = program.rsplit('/').next().unwrap_or(program);
    let missing = format!("needs {name} on this host; install the package {name}");
    let out = Command::new("ldd")
        .arg(program)
        .output()
        .map_err(|e| format!("ldd: {e}"))?;
    if !out.status.success() {
        return Err(missing);
    }
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let libraries = text.split_whitespace().filter(|w| w.starts_with('/'));
    let mut files: Vec<PathBuf> = libraries.map(PathBuf::from).collect();
    files.push(program.into());
    Ok(files)
}

/// An initial RAM disk with a program of the host added: a kernel unpacks several archives one
/// after the other.
pub fn add_program(from: &Path, to: &Path, program: &str) -> Result<(), String> {
    let mut image = fs::read(from).map_err(|e| format!("{}: {e}", from.display()))?;
    image.resize(image.len().next_multiple_of(512), 0);
    let mut number = 1_000_000;
    let mut dirs: Vec<PathBuf> = Vec::new();
    for file in files_of(program)? {
        let parents: Vec<&Path> = file.ancestors().skip(1).collect();
        for dir in parents.into_iter().rev().skip(1) {
            if !dirs.iter().any(|d| d == dir) {
                entry(&mut image, &mut number, dir, 0o040_755, &[]);
                dirs.push(dir.to_owned());
            }
        }
        let data = fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        entry(&mut image, &mut number, &file, 0o100_755, &data);
    }
    entry(&mut image, &mut number, Path::new("TRAILER!!!"), 0, &[]);
    fs::write(to, image).map_err(|e| format!("{}: {e}", to.display()))
}

/// An entry of a cpio archive ("newc").
fn entry(out: &mut Vec<u8>, number: &mut u32, path: &Path, mode: u32, data: &[u8]) {
    let path = path.to_string_lossy();
    let name = format!("{}\0", path.trim_start_matches('/'));
    *number += 1;
    out.extend_from_slice(b"070701");
    let (size, name_size) = (data.len() as u32, name.len() as u32);
    for field in [*number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A guest at its shell.
pub struct Guest {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Guest {
    /// Boots a machine to its shell.
    pub fn boot(command: &mut Command) -> Result<Guest, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{name}: {e}"))?;
        let (input, mut from) = child
            .stdin
            .take()
            .zip(child.stdout.take())
            .ok_or("no pipes")?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut guest = Guest {
            child,
            input,
            output,
            seen: String::new(),
        };
        guest.until(PROMPT, BOOT_MAX)?;
        Ok(guest)
    }

    /// What a command prints.
    pub fn ask(&mut self, command: &str, limit: Duration) -> Result<String, String> {
        let line = format!("{command}; echo e''nd\n");
        self.input
            .write_all(line.as_bytes())
            .map_err(|e| e.to_string())?;
        let text = self.until("end\r\n", limit)?;
        self.until(PROMPT, limit)?;
        Ok(text)
    }

    fn until(&mut self, text: &str, limit: Duration) -> Result<String, String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return Ok(before);
            }
            let left = end.saturating_duration_since(Instant::now());
            let piece = self.output.recv_timeout(left).map_err(|e| {
                let tail: String = self
                    .seen
                    .lines()
                    .rev()
                    .take(5)
                    .collect::<Vec<_>>()
                    .join("\n");
                format!("the guest does not answer ({e}):\n{tail}")
            })?;
            self.seen.push_str(&String::from_utf8_lossy(&piece));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_entries_are_aligned() {
        let (mut out, mut number) = (Vec::new(), 0);
        entry(
            &mut out,
            &mut number,
            Path::new("/a/b"),
            0o100_755,
            b"12345",
        );
        assert_eq!(out.len() % 4, 0);
        assert!(out.starts_with(b"07070100000001000081ed"));
    }
}
