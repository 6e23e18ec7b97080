//! Where log lines go: standard error, with line ends that a raw terminal understands.

use std::io::{self, Write};

use tracing_subscriber::EnvFilter;

/// Environment variable that carries the filter to the VM process.
pub const FILTER_VAR: &str = "PYRITE_LOG";
/// Environment variable: "1" if the terminal is raw.
pub const RAW_VAR: &str = "PYRITE_LOG_RAW";

/// Standard error that ends lines with CR LF.
struct RawStderr;

impl Write for RawStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = Vec::with_capacity(bytes.len() + 8);
        for &b in bytes {
            if b == b'\n' {
                text.push(b'\r');
            }
            text.push(b);
        }
        io::stderr().write_all(&text)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A filter from its text, or what is wrong with it.
pub fn parse_filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(text)
        .map_err(|e| format!("--log: {e}"))
}

/// Starts logging with `filter`. `raw`: lines end for a raw terminal.
pub fn start(filter: EnvFilter, raw: bool) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false);
    let started = if raw {
        builder.with_writer(|| RawStderr).try_init()
    } else {
        builder.with_writer(io::stderr).try_init()
    };
    // Logging twice in one process does not happen; losing it would not matter.
    let _ = started;
}
