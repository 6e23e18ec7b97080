//! Packet capture: every frame of a cable into a pcapng file, which tcpdump and Wireshark read.
//!
//! The format is that of draft-ietf-opsawg-pcapng: a section header, one interface, and an
//! enhanced packet block for each frame, with the direction as the guest sees it.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{FrameSink, NetBackend};

/// LIMIT: bytes of a capture file; what comes after is not captured.
pub const MAX_CAPTURE_BYTES: u64 = 4 << 30;

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const LINKTYPE_ETHERNET: u16 = 1;
const OPT_END: u16 = 0;
const OPT_IF_NAME: u16 = 2;
const OPT_IF_TSRESOL: u16 = 9;
const OPT_SHB_USERAPPL: u16 = 4;
const OPT_EPB_FLAGS: u16 = 2;

/// Direction of a frame as the guest sees it: the values of epb_flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Inbound = 1,
    Outbound = 2,
}

struct Output {
    file: File,
    written: u64,
    block: Vec<u8>,
    stopped: bool,
}

/// A capture file.
struct Writer {
    path: PathBuf,
    limit: u64,
    output: Mutex<Output>,
    frames: AtomicU64,
}

fn pad(block: &mut Vec<u8>) {
    block.resize(block.len().next_multiple_of(4), 0);
}

fn option(block: &mut Vec<u8>, code: u16, value: &[u8]) {
    block.extend_from_slice(&code.to_ne_bytes());
    block.extend_from_slice(&(value.len() as u16).to_ne_bytes());
    block.extend_from_slice(value);
    pad(block);
}

/// Makes a block of `kind` with the body that `fill` appends.
fn block(out: &mut Vec<u8>, kind: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    out.clear();
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    fill(out);
    pad(out);
    let total = (out.len() + 4) as u32;
    out[4..8].copy_from_slice(&total.to_ne_bytes());
    out.extend_from_slice(&total.to_ne_bytes());
}

impl Writer {
    fn create(path: &Path, interface: &str, limit: u64) -> io::Result<Writer> {
        let mut file = File::create(path)?;
        let mut out = Vec::new();
        block(&mut out, SECTION_HEADER, |b| {
            b.extend_from_slice(&BYTE_ORDER_MAGIC.to_ne_bytes());
            b.extend_from_slice(&1_u16.to_ne_bytes());
            b.extend_from_slice(&0_u16.to_ne_bytes());
            b.extend_from_slice(&u64::MAX.to_ne_bytes()); // length not given
            option(b, OPT_SHB_USERAPPL, b"pyrite");
            option(b, OPT_END, &[]);
        });
        file.write_all(&out)?;
        let mut written = out.len() as u64;
        block(&mut out, INTERFACE, |b| {
            b.extend_from_slice(&LINKTYPE_ETHERNET.to_ne_bytes());
            b.extend_from_slice(&[0; 2]);
            b.extend_from_slice(&0_u32.to_ne_bytes()); // frames are not cut
            option(b, OPT_IF_NAME, interface.as_bytes());
            option(b, OPT_IF_TSRESOL, &[9]); // nanoseconds
            option(b, OPT_END, &[]);
        });
        file.write_all(&out)?;
        written += out.len() as u64;
        Ok(Writer {
            path: path.to_owned(),
            limit,
            output: Mutex::new(Output {
                file,
                written,
                block: out,
                stopped: false,
            }),
            frames: AtomicU64::new(0),
        })
    }

    fn write(&self, frame: &[u8], direction: Direction) {
        let mut guard = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let output = &mut *guard;
        if output.stopped {
            return;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let ns = since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
        block(&mut output.block, ENHANCED_PACKET, |b| {
            let length = frame.len() as u32;
            for field in [0, (ns >> 32) as u32, ns as u32, length, length] {
                b.extend_from_slice(&field.to_ne_bytes());
            }
            b.extend_from_slice(frame);
            pad(b);
            option(b, OPT_EPB_FLAGS, &(direction as u32).to_ne_bytes());
            option(b, OPT_END, &[]);
        });
        let bytes = output.block.len() as u64;
        if output.written + bytes > self.limit {
            tracing::warn!(
                "{} has reached {} MiB: nothing more is captured",
                self.path.display(),
                self.limit >> 20
            );
            output.stopped = true;
            return;
        }
        // One write for a block: a reader never sees half of one for long.
        match output.file.write_all(&output.block) {
            Ok(()) => {
                output.written += bytes;
                self.frames.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) => {
                tracing::warn!("{}: {e}: nothing more is captured", self.path.display());
                output.stopped = true;
            }
        }
    }
}

/// A cable with a tap for a capture file: the back end behind it, unchanged.
pub struct Capture {
    inner: Arc<dyn NetBackend>,
    writer: Arc<Writer>,
}

impl Capture {
    /// Captures what passes between a card and `inner` into a new file, replacing one that is
    /// there. `interface` is what the capture calls the card.
    pub fn new(inner: Arc<dyn NetBackend>, path: &Path, interface: &str) -> io::Result<Capture> {
        Capture::limited(inner, path, interface, MAX_CAPTURE_BYTES)
    }

    fn limited(
        inner: Arc<dyn NetBackend>,
        path: &Path,
        interface: &str,
        limit: u64,
    ) -> io::Result<Capture> {
        let writer = Arc::new(Writer::create(path, interface, limit)?);
        Ok(Capture { inner, writer })
    }

    /// Frames in the file.
    pub fn frames(&self) -> u64 {
        self.writer.frames.load(Ordering::Relaxed)
    }
}

/// The guest's side.
struct Tap {
    sink: Arc<dyn FrameSink>,
    writer: Arc<Writer>,
}

impl FrameSink for Tap {
    fn receive(&self, frame: &[u8]) -> bool {
        let taken = self.sink.receive(frame);
        if taken {
            self.writer.write(frame, Direction::Inbound);
        }
        taken
    }
    fn ready(&self) -> bool {
        self.sink.ready()
    }
}

// Frames with something left out reach `transmit` completed, and none are asked for: a capture
// shows what a wire would carry.
impl NetBackend for Capture {
    fn attach(&self, sink: Arc<dyn FrameSink>) {
        let writer = Arc::clone(&self.writer);
        self.inner.attach(Arc::new(Tap { sink, writer }));
    }
    fn transmit(&self, frame: &[u8]) {
        self.writer.write(frame, Direction::Outbound);
        self.inner.transmit(frame);
    }
    fn receive_ready(&self) {
        self.inner.receive_ready();
    }
    fn pause(&self, paused: bool) {
        self.inner.pause(paused);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Collector, Recorder};

    /// Blocks of a file: kind and body.
    fn blocks(bytes: &[u8]) -> Vec<(u32, &[u8])> {
        let word = |at: usize| u32::from_ne_bytes(*bytes[at..].first_chunk().unwrap());
        let mut at = 0;
        let mut out = Vec::new();
        while at < bytes.len() {
            let len = word(at + 4) as usize;
            assert_eq!(len % 4, 0);
            assert_eq!(word(at + len - 4) as usize, len, "length at both ends");
            out.push((word(at), &bytes[at + 8..at + len - 4]));
            at += len;
        }
        out
    }

    fn file(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("pyrite-{name}-{}.pcapng", std::process::id()))
    }

    #[test]
    fn both_directions_are_in_the_file() {
        let path = file("capture");
        let inner = Arc::new(Recorder::default());
        let capture = Capture::new(inner.clone(), &path, "net0").unwrap();
        let sink = Arc::new(Collector::default());
        capture.attach(sink.clone());
        capture.transmit(&[1; 61]);
        inner.deliver(&[2; 70]);
        sink.refuse(true);
        inner.deliver(&[3; 70]);
        let (frame, offload) = crate::offload::sample_segment(false, &[5; 2500]);
        capture.transmit_offloaded(&frame, &offload);
        assert_eq!(inner.sent().len(), 4);
        assert_eq!(sink.frames(), [vec![2; 70]]);
        let bytes = std::fs::read(&path).unwrap();
        let blocks = blocks(&bytes);
        let kinds: Vec<u32> = blocks.iter().map(|b| b.0).collect();
        assert_eq!(kinds, [SECTION_HEADER, INTERFACE, 6, 6, 6, 6, 6]);
        let packet = blocks[2].1;
        assert_eq!(packet[12..20], [61_u32.to_ne_bytes(); 2].concat()[..]);
        assert_eq!(packet[20..81], [1; 61]);
        assert_eq!(packet[84..92], [2, 0, 4, 0, 2, 0, 0, 0], "outbound");
        assert_eq!(blocks[3].1[92..100], [2, 0, 4, 0, 1, 0, 0, 0], "inbound");
        assert_eq!(capture.frames(), 5);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn capture_ends_at_its_limit_and_frames_go_on() {
        let path = file("capture-limit");
        let inner = Arc::new(Recorder::default());
        let capture = Capture::limited(inner.clone(), &path, "net0", 1000).unwrap();
        for _ in 0..20 {
            capture.transmit(&[1; 100]);
        }
        assert_eq!(inner.sent().len(), 20);
        assert!(capture.frames() < 10);
        assert!(std::fs::metadata(&path).unwrap().len() <= 1000);
        std::fs::remove_file(&path).unwrap();
    }
}
