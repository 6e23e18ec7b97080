//! Finds a Linux kernel's last words in its console output.

/// LIMIT: bytes of a line that are looked at.
const MAX_LINE: usize = 512;
const PANIC: &str = "Kernel panic - not syncing";

/// Follows console output line by line.
///
/// A line of the kernel begins with its text or with a time stamp in brackets; text in the middle
/// of a line is somebody quoting it. Any text may still be a quotation (of a log file, say), so a
/// finding counts only while nothing that a panicking kernel would not print comes after it.
#[derive(Debug, Default)]
pub struct PanicLine {
    line: Vec<u8>,
    panicked: bool,
}

impl PanicLine {
    /// Takes output. `Some(Some(line))`: the kernel says that it panics. `Some(None)`: something
    /// else was printed after that.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<Option<String>> {
        let mut found = None;
        for &b in bytes {
            match b {
                b'\n' => {
                    let line = std::mem::take(&mut self.line);
                    found = self.line(&line).or(found);
                }
                b'\r' => {}
                _ if self.line.len() < MAX_LINE => self.line.push(b),
                _ => {}
            }
        }
        // A prompt is an unfinished line that the kernel would not leave.
        if self.panicked && !self.line.is_empty() && !self.line.starts_with(b"[") && found.is_none()
        {
            self.panicked = false;
            found = Some(None);
        }
        found
    }

    fn line(&mut self, line: &[u8]) -> Option<Option<String>> {
        let text = String::from_utf8_lossy(line);
        let stamped = text.starts_with('[');
        let said = match text.strip_prefix('[').and_then(|t| t.split_once("] ")) {
            Some((stamp, said))
                if stamp
                    .chars()
                    .all(|c| c.is_ascii_digit() || " .CT".contains(c)) =>
            {
                said
            }
            _ => text.as_ref(),
        };
        if said.starts_with(PANIC) {
            self.panicked = true;
            return Some(Some(said.trim_end().to_owned()));
        }
        let from_kernel = stamped || text.trim().is_empty() || said.starts_with("---[ ");
        if self.panicked && !from_kernel {
            self.panicked = false;
            return Some(None);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_is_found_across_pieces() {
        let mut p = PanicLine::default();
        assert_eq!(p.feed(b"boot\r\n[    0.92] Kernel pan"), None);
        let line = "Kernel panic - not syncing: VFS: Unable to mount root fs";
        assert_eq!(
            p.feed(b"ic - not syncing: VFS: Unable to mount root fs\r\n[    0.93] CPU: 0\r\n"),
            Some(Some(line.into()))
        );
        assert_eq!(
            p.feed(b"[ 1.0] ---[ end Kernel panic - not syncing: VFS ]---\r\n"),
            None
        );
    }

    #[test]
    fn quotation_before_a_prompt_does_not_count() {
        let mut p = PanicLine::default();
        assert!(
            p.feed(b"Kernel panic - not syncing: old\n")
                .is_some_and(|f| f.is_some())
        );
        assert_eq!(p.feed(b"root@x:~# "), Some(None));
        assert_eq!(p.feed(b"grep 'Kernel panic - not syncing' log\n"), None);
    }

    #[test]
    fn endless_line_takes_no_memory() {
        let mut p = PanicLine::default();
        for _ in 0..1000 {
            assert_eq!(p.feed(&[b'x'; 4096]), None);
        }
        assert!(p.line.len() <= MAX_LINE);
    }
}
