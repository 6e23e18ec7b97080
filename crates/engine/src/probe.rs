//! Is the KVM of this machine worth using?
//!
//! A device node proves nothing: there are KVMs without hardware behind them that interpret ring 0
//! and stop at instructions they do not know. So micro-guests are run: a timed loop in ring 0, and
//! the instructions that kernels use early. Every run has a time limit.

use std::fmt;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use pyrite_mem::GuestMemory;

use crate::conformance::{ProbeGuest, cpuid, probe_guest};
use crate::{CpuIo, StopReason, VcpuControl, Vm, VmConfig, kvm};

/// Instructions between the two time stamps of the speed guest.
const LOOP_INSTRUCTIONS: u64 = 200_000;
/// LIMIT: of one micro-guest. A hardware KVM needs well under a millisecond.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Slower than this is not hardware: a hundredth of what any processor with VMX or SVM does, and
/// ten times what an interpreter does.
const MIN_INSTRUCTIONS_PER_SECOND: u64 = 20_000_000;

/// What [`probe_kvm`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmVerdict {
    /// Use it.
    Usable {
        /// Measured in ring 0.
        instructions_per_second: u64,
    },
    /// Do not; why, in words that fit into one line after "engine: soft (…)".
    Unusable {
        /// Why.
        reason: String,
    },
}

impl KvmVerdict {
    /// True for [`KvmVerdict::Usable`].
    pub fn usable(&self) -> bool {
        matches!(self, KvmVerdict::Usable { .. })
    }
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmVerdict::Usable { .. } => write!(f, "kvm"),
            KvmVerdict::Unusable { reason } => write!(f, "soft ({reason})"),
        }
    }
}

fn unusable(reason: impl Into<String>) -> KvmVerdict {
    KvmVerdict::Unusable {
        reason: reason.into(),
    }
}

/// Probes `/dev/kvm`. Takes milliseconds with hardware, at most a few seconds otherwise.
pub fn probe_kvm() -> KvmVerdict {
    if let Err(e) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return unusable(match e.kind() {
            ErrorKind::NotFound => "there is no /dev/kvm".to_owned(),
            ErrorKind::PermissionDenied => "no permission to open /dev/kvm".to_owned(),
            _ => format!("/dev/kvm cannot be opened: {e}"),
        });
    }
    let speed = match run(ProbeGuest::Speed) {
        Ok(t) => {
            LOOP_INSTRUCTIONS * 1_000_000_000 / u64::try_from(t.as_nanos()).unwrap_or(1).max(1)
        }
        Err(why) => return unusable(format!("KVM here does not run a guest: {why}")),
    };
    if speed < MIN_INSTRUCTIONS_PER_SECOND {
        return unusable(format!(
            "KVM here is emulated: {:.1} M instructions/s in ring 0",
            speed as f64 / 1e6
        ));
    }
    for (guest, name) in [
        (ProbeGuest::Cmpxchg16b, "cmpxchg16b"),
        (ProbeGuest::Xsave, "xsave"),
    ] {
        if let Err(why) = run(guest) {
            return unusable(format!("KVM here cannot run {name} in ring 0: {why}"));
        }
    }
    KvmVerdict::Usable {
        instructions_per_second: speed,
    }
}

#[derive(Default)]
struct Seen {
    stamps: Vec<Instant>,
    exit: Option<u8>,
    control: Option<Arc<dyn VcpuControl>>,
}

/// The board of a probe: two time stamps, then the end.
#[derive(Default)]
struct Stamps {
    inner: Mutex<Seen>,
}

impl CpuIo for Stamps {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) {
        let now = Instant::now();
        let mut i = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        match port {
            // LIMIT: a guest that goes astray may not fill memory.
            0xf1 if i.stamps.len() < 2 => i.stamps.push(now),
            0xf4 => {
                i.exit = data.first().copied();
                if let Some(c) = &i.control {
                    c.stop();
                }
            }
            _ => {}
        }
    }
    fn ack_pic(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

/// Runs one micro-guest; the time between its two stamps.
fn run(guest: ProbeGuest) -> Result<Duration, String> {
    let board = Arc::<Stamps>::default();
    let (memory, state) = probe_guest(guest).map_err(|e| e.to_string())?;
    let memory: Arc<GuestMemory> = Arc::new(memory);
    let start = Instant::now();
    let config = VmConfig {
        memory,
        vcpus: 1,
        cpuid: cpuid(),
        io: Arc::<Stamps>::clone(&board),
        clock: Arc::new(move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)),
    };
    let vm = kvm::KvmVm::new(config).map_err(|e| e.to_string())?;
    let control = vm.control(0);
    board
        .inner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .control = Some(Arc::clone(&control));
    let mut vcpu = vm.take_vcpu(0).map_err(|e| e.to_string())?;
    vcpu.set_state(&state).map_err(|e| e.to_string())?;
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || {
        let reason = vcpu.run();
        // Nobody listens any more if the time was up.
        let _ = tx.send(reason);
    });
    let reason = match rx.recv_timeout(TIMEOUT) {
        Ok(r) => r,
        Err(_) => {
            control.stop();
            return Err(match rx.recv_timeout(TIMEOUT) {
                Ok(_) => format!("no result within {} s", TIMEOUT.as_secs()),
                Err(_) => "its processor does not stop".to_owned(),
            });
        }
    };
    let inner = board.inner.lock().unwrap_or_else(PoisonError::into_inner);
    match (reason, inner.exit) {
        (StopReason::Requested, Some(1)) => {}
        // The first line says what; the registers after it are for a log.
        (StopReason::Failed(e), _) => {
            let text = e.to_string();
            tracing::debug!("{text}");
            return Err(text.lines().next().unwrap_or_default().to_owned());
        }
        (StopReason::TripleFault, _) => return Err("triple fault".to_owned()),
        _ => return Err("wrong result".to_owned()),
    }
    match inner.stamps.as_slice() {
        [a, b, ..] => Ok(b.duration_since(*a)),
        _ => Ok(Duration::ZERO),
    }
}
