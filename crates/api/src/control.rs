//! Messages between the front process and the process of one VM: JSON, one per line.
//!
//! The front sends a [`Hello`] first and [`Request`]s after; the VM process answers each request
//! with one [`Message::Reply`] and tells what happens by [`Message::Event`]. The last event is
//! [`Event::Ended`]. When the front's end closes, the VM ends.

use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::v1::{DiskSetting, SpecError, VmSpec};

#[cfg(test)]
mod tests;

/// LIMIT: bytes of one message with its newline.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Version of the protocol; both ends are the same program, so they must agree.
pub const PROTOCOL: u32 = 1;

/// The first message to a VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The VM to make.
    pub spec: VmSpec,
    /// Columns and rows of the terminal, if there is one.
    pub terminal_size: Option<(u16, u16)>,
}

/// Asks the VM process for something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Comes back in the reply.
    pub id: u64,
    /// What is asked.
    pub command: Command,
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do", deny_unknown_fields)]
pub enum Command {
    /// Ends the VM at once, as pulling the plug.
    Stop,
    /// Presses the power button.
    PowerButton,
    /// Presses the reset button.
    Reset,
    /// Stops guest time.
    Pause,
    /// Lets it go on.
    Resume,
    /// The terminal has another size.
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Sends a serial break.
    Break,
    /// Sets how much memory the balloon takes from the guest.
    Balloon {
        /// In bytes.
        bytes: u64,
    },
    /// Writes what the screen shows to a PNG file.
    Screenshot {
        /// The file, which is replaced.
        path: PathBuf,
    },
    /// Types on the keyboard.
    Keys {
        /// What.
        strokes: Vec<Stroke>,
    },
    /// Moves the pointer of the tablet, and perhaps clicks there.
    Point {
        /// Dots from the left edge of the screen.
        x: u32,
        /// Dots from its upper edge.
        y: u32,
        /// Buttons that are pressed and let go there: 1 left, 2 right, 4 middle.
        #[serde(default)]
        buttons: u8,
        /// Notches of the wheel towards the user, turned there.
        #[serde(default)]
        wheel: i32,
    },
    /// Shows the tree of what the machine is, below `path`.
    Inspect {
        /// `/`-separated; empty for all.
        path: String,
    },
    /// Changes the medium of a CD drive or a floppy drive.
    Medium {
        /// Number of the drive, from 0.
        drive: usize,
        /// It is a floppy drive.
        #[serde(default)]
        floppy: bool,
        /// A floppy disk is write-protected.
        #[serde(default)]
        read_only: bool,
        /// The new medium; none ejects.
        path: Option<PathBuf>,
        /// Although the guest has locked the tray.
        force: bool,
    },
    /// Changes limits of a disk, or what errors do.
    Disk {
        /// Number of the disk, from 0.
        disk: usize,
        /// What changes, in this order: all of it or, if something is wrong, nothing.
        changes: Vec<DiskSetting>,
    },
    /// Plugs the cable of a network card in or out.
    Link {
        /// Number of the card, from 0.
        card: usize,
        /// In.
        up: bool,
    },
    /// Writes memory and registers to a new ELF core; the VM then goes on.
    Dump {
        /// The file, which must not exist.
        path: PathBuf,
        /// With the linear addresses of the first vCPU.
        #[serde(default)]
        linear: bool,
    },
    /// Writes memory and state to a new directory; the VM then goes on.
    Snapshot {
        /// The directory, which must not exist.
        dir: PathBuf,
    },
}

/// LIMIT: strokes of one request.
pub const MAX_STROKES: usize = 64;
/// LIMIT: characters of a text to type.
pub const MAX_TEXT_CHARS: usize = 16_384;

/// Something to type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stroke {
    /// Characters of a US keyboard, one after the other.
    Text(String),
    /// Keys by name, held down together: `ctrl-alt-delete`.
    Chord(String),
}

/// From the VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// Answer to a request.
    Reply {
        /// Of the request.
        id: u64,
        /// The outcome.
        outcome: Outcome,
    },
    /// Something happened.
    Event(Event),
}

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Done,
    /// The tree that was asked for.
    Tree(Tree),
    /// Not done, and why.
    Failed(String),
}

/// What a VM shows of itself: a tree of named values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tree {
    /// Named children, in order.
    Node(Vec<(String, Tree)>),
    /// A count or size.
    Uint(u64),
    /// An address or register.
    Hex(u64),
    /// A yes or no.
    Bool(bool),
    /// Text.
    Text(String),
}

/// What happens to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// The guest runs.
    Started {
        /// `kvm` or `soft`.
        engine: String,
        /// Why it was chosen, one line.
        why: String,
    },
    /// The guest reset the machine, which starts again.
    Reset {
        /// How often so far.
        count: u32,
    },
    /// The VM was paused because of an error of the host; what failed waits.
    DiskError {
        /// Number of the disk, from 0.
        disk: usize,
        /// Which disk and what is wrong, in a line.
        problem: String,
    },
    /// The guest kernel printed that it panicked.
    KernelPanic {
        /// What it said.
        line: String,
    },
    /// The guest said through its pvpanic device that it panicked.
    GuestPanicked {
        /// It starts another kernel to look at itself.
        crash_kernel: bool,
        /// The VM was paused for it.
        is_paused: bool,
    },
    /// The VM has ended; nothing follows.
    Ended(Ending),
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ending")]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// It was asked to.
    Stopped,
    /// The guest reset the machine and the specification says that this ends the VM.
    ResetStopped,
    /// The guest wrote to the debug-exit port.
    DebugExit {
        /// The value.
        code: u8,
    },
    /// The guest crashed.
    Crashed {
        /// How.
        reason: String,
    },
    /// The guest resets again and again.
    ResetLoop {
        /// Resets.
        count: u32,
    },
    /// The time limit has passed.
    TimeLimit,
    /// The specification or a file named in it is wrong.
    BadInput {
        /// What is wrong.
        errors: Vec<SpecError>,
    },
    /// The engine or the process failed.
    Failed {
        /// How.
        reason: String,
    },
}

/// Writes one message.
pub fn send<T: Serialize>(out: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    if line.len() > MAX_MESSAGE_BYTES {
        return Err(io::Error::other("control message too long"));
    }
    out.write_all(&line)?;
    out.flush()
}

/// Reads the next message; `None` at the end of the stream. A message that is too long or not
/// understood is an error, after which the stream should be closed.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let limit = MAX_MESSAGE_BYTES as u64;
    from.by_ref().take(limit).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        let text = if line.len() as u64 == limit {
            "too long"
        } else {
            "cut off"
        };
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("control message is {text}"),
        ));
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("control message not understood: {e}"),
        )
    })
}
