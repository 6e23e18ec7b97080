//! `VmSpec`, version 1: everything about a VM that a person decides.
//!
//! Flags, files and requests all become this one type, and [`VmSpec::validate`] is the only place
//! that says which values are allowed. It does not look at files: whether a path holds what it
//! should is found out by opening it, by whoever opens it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod firmware;
mod nic;
mod screen;
mod share;
mod snapshot;
#[cfg(test)]
mod tests;

pub use firmware::{FirmwareSpec, SmbiosSpec};
pub use nic::{
    CableSpec, LOSS_UNIT, MAX_NIC_QUEUES, MAX_NICS, MacAddr, NicBackend, NicModel, NicSpec,
    RateSpec,
};
pub use screen::{ScreenSpec, VgaKind, VncListen, VncSpec};
pub use share::{
    ChannelSpec, MAX_CHANNEL_NAME_BYTES, MAX_CHANNELS, MAX_SHARES, MAX_TAG_BYTES, ShareKind,
    ShareOwner, ShareSpec,
};
pub use snapshot::{SNAPSHOT_FORMAT, SnapshotManifest};

/// LIMIT: most vCPUs of a VM.
pub const MAX_CPUS: u32 = 255;
/// LIMIT: code cache of a vCPU, in bytes.
pub const CODE_CACHE_BYTES: std::ops::RangeInclusive<u64> = 256 << 10..=1 << 30;
/// LIMIT: smallest memory in bytes.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// LIMIT: largest memory in bytes.
pub const MAX_MEMORY_BYTES: u64 = 8 << 40;
/// LIMIT: disks of a VM: one PCI slot each, with room for the other functions.
pub const MAX_DISKS: usize = 20;
/// LIMIT: CD/DVD drives of a VM.
pub const MAX_CDROMS: usize = 6;
/// LIMIT: floppy drives of a VM.
pub const MAX_FLOPPIES: usize = 2;
/// LIMIT: drives on IDE: two channels of two.
pub const MAX_IDE_DRIVES: usize = 4;
/// LIMIT: bytes in a disk's serial number. virtio 1.3 §5.2.6.
pub const MAX_SERIAL_BYTES: usize = 20;
/// LIMIT: port forwards.
pub const MAX_FORWARDS: usize = 256;
/// LIMIT: bytes of a kernel command line.
pub const MAX_APPEND_BYTES: usize = 65_535;

/// What executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// KVM if it really runs at hardware speed on this host, else the software engine.
    #[default]
    Auto,
    /// KVM only.
    Kvm,
    /// The software engine.
    Soft,
}

/// When the software engine lets user programs run on the host's processor itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectKind {
    /// Never.
    Off,
    /// Those that compute for long, if the host lets a process be traced.
    #[default]
    Auto,
    /// Always; slow, for tests.
    Always,
}

/// What the terminal is connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleKind {
    /// The first serial port, `ttyS0`.
    #[default]
    Serial,
    /// The virtio console, `hvc0`; the first serial port's output is shown too.
    Virtio,
    /// Nothing.
    None,
}

/// How the network card is connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetKind {
    /// User-mode NAT.
    #[default]
    User,
    /// No network card.
    None,
}

/// What a reset by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResetPolicy {
    /// The machine starts again.
    #[default]
    Reboot,
    /// The VM ends.
    Stop,
}

/// Transport protocol of a forwarded port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// Kernel file.
    #[serde(default)]
    pub kernel: PathBuf,
    /// Firmware that boots, instead of a kernel.
    #[serde(default)]
    pub firmware: Option<FirmwareSpec>,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub append: String,
    /// Multiboot modules.
    #[serde(default)]
    pub modules: Vec<ModuleSpec>,
}

/// A Multiboot module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleSpec {
    /// File.
    pub path: PathBuf,
    /// Its command line.
    #[serde(default)]
    pub args: String,
}

/// Formats of disk images. Never guessed from what is in a file: a guest may have written it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The file or block device is the disk.
    #[default]
    Raw,
    /// QEMU copy-on-write.
    Qcow2,
    /// VMware.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Virtual PC.
    Vhd,
    /// Hyper-V; only read-only.
    Vhdx,
}

/// How a drive is connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// A virtio block device of its own; not for CDs.
    #[default]
    Virtio,
    /// SATA: a port of an AHCI controller.
    Ahci,
    /// Parallel ATA at the ports of a PC; four drives at most.
    Ide,
    /// An NVMe controller of its own; not for CDs.
    Nvme,
    /// A target of a virtio SCSI host.
    Scsi,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Image file or block device.
    pub path: PathBuf,
    /// Its format.
    #[serde(default)]
    pub format: DiskFormat,
    /// Other files that the image refers to, such as a backing file, may be read.
    #[serde(default)]
    pub allow_backing: bool,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number that the guest sees.
    #[serde(default)]
    pub serial: Option<String>,
    /// How it is connected.
    #[serde(default)]
    pub bus: DiskBus,
    /// Bytes of a logical block, 512 or 4096; that of the image without.
    #[serde(default)]
    pub block_bytes: Option<u32>,
}

/// A CD/DVD drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CdromSpec {
    /// Image of the medium, raw (ISO 9660); the tray is empty without.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// How it is connected; not virtio and not NVMe.
    pub bus: DiskBus,
}

/// A kind of floppy drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FloppyKind {
    /// 5¼ inches, 1.2 MB and 360 KB.
    #[serde(rename = "1.2M")]
    D1200,
    /// 3½ inches, 1.44 MB and 720 KB.
    #[serde(rename = "1.44M")]
    D1440,
    /// 3½ inches, 2.88 MB, 1.44 MB and 720 KB.
    #[serde(rename = "2.88M")]
    D2880,
}

/// A floppy drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FloppySpec {
    /// Raw image of the medium: 360, 720, 1200, 1440 or 2880 KiB. The drive is empty without.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// The medium is write-protected.
    #[serde(default)]
    pub read_only: bool,
    /// The drive; without, the smallest one that reads the medium, or 1.44 MB if there is none.
    #[serde(default)]
    pub drive: Option<FloppyKind>,
}

/// A port of the host that leads into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardSpec {
    /// Protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Address of the host to listen on.
    #[serde(default = "loopback")]
    pub host_addr: IpAddr,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
}

fn loopback() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

/// The network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// What the one card is connected to if [`NetSpec::cards`] names none.
    #[serde(default)]
    pub kind: NetKind,
    /// Network cards; if there are none, a virtio card as [`NetSpec::kind`] says.
    #[serde(default)]
    pub cards: Vec<NicSpec>,
    /// Ports that lead into the guest, through its first card on a user network.
    #[serde(default)]
    pub forwards: Vec<ForwardSpec>,
    /// The guest may reach the host's loopback as the router's address.
    #[serde(default)]
    pub host_loopback: bool,
}

impl NetSpec {
    /// The network cards.
    pub fn all_cards(&self) -> Vec<NicSpec> {
        match self.kind {
            NetKind::User if self.cards.is_empty() => vec![NicSpec::default()],
            _ => self.cards.clone(),
        }
    }
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Engine.
    #[serde(default)]
    pub engine: EngineKind,
    /// Code cache of the software engine per vCPU, in bytes; nothing: its default.
    #[serde(default)]
    pub code_cache_bytes: Option<u64>,
    /// Direct execution of user programs by the software engine.
    #[serde(default)]
    pub direct: DirectKind,
    /// CPU model; `host` is what this host and the engine can run.
    #[serde(default = "host_model")]
    pub cpu_model: String,
    /// What is booted.
    pub boot: BootSpec,
    /// Who the machine says that it is.
    #[serde(default)]
    pub smbios: SmbiosSpec,
    /// Disks in PCI order.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// CD/DVD drives.
    #[serde(default)]
    pub cdroms: Vec<CdromSpec>,
    /// Floppy drives, A and B.
    #[serde(default)]
    pub floppies: Vec<FloppySpec>,
    /// Network card.
    #[serde(default)]
    pub net: NetSpec,
    /// Console.
    #[serde(default)]
    pub console: ConsoleKind,
    /// Screen.
    #[serde(default)]
    pub screen: ScreenSpec,
    /// Memory balloon.
    #[serde(default)]
    pub balloon: bool,
    /// Unix socket path of the vsock device; none without.
    #[serde(default)]
    pub vsock: Option<PathBuf>,
    /// Folders of the host that the guest can mount.
    #[serde(default)]
    pub shares: Vec<ShareSpec>,
    /// Ports of the guest as Unix sockets.
    #[serde(default)]
    pub channels: Vec<ChannelSpec>,
    /// File for what the guest sends on the second serial port; it is dropped without.
    #[serde(default)]
    pub serial2: Option<PathBuf>,
    /// File for what the guest writes to the debug console, port 402H; it is dropped without.
    #[serde(default)]
    pub debugcon: Option<PathBuf>,
    /// What a reset by the guest does.
    #[serde(default)]
    pub reset: ResetPolicy,
    /// The VM is ended after this time.
    #[serde(default)]
    pub time_limit_ms: Option<u64>,
    /// Directory of a snapshot to continue from instead of booting.
    #[serde(default)]
    pub restore: Option<PathBuf>,
    /// The VM stands still until it is told to go on.
    #[serde(default)]
    pub paused: bool,
}

fn host_model() -> String {
    "host".into()
}

impl Default for VmSpec {
    fn default() -> VmSpec {
        VmSpec {
            cpus: 1,
            memory_bytes: 512 << 20,
            engine: EngineKind::Auto,
            code_cache_bytes: None,
            direct: DirectKind::Auto,
            cpu_model: host_model(),
            boot: BootSpec::default(),
            smbios: SmbiosSpec::default(),
            disks: Vec::new(),
            cdroms: Vec::new(),
            floppies: Vec::new(),
            net: NetSpec::default(),
            console: ConsoleKind::Serial,
            screen: ScreenSpec::default(),
            balloon: false,
            vsock: None,
            shares: Vec::new(),
            channels: Vec::new(),
            serial2: None,
            debugcon: None,
            reset: ResetPolicy::Reboot,
            time_limit_ms: None,
            restore: None,
            paused: false,
        }
    }
}

/// One thing that is wrong with a specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct SpecError {
    /// Path of the field, e.g. `disks[1].serial`.
    pub path: String,
    /// What is wrong and what was expected.
    pub problem: String,
}

impl SpecError {
    /// An error about the field at `path`.
    pub fn new(path: impl Into<String>, problem: impl Into<String>) -> SpecError {
        SpecError {
            path: path.into(),
            problem: problem.into(),
        }
    }
}

impl VmSpec {
    /// Checks every field; lists all errors.
    pub fn validate(&self) -> Result<(), Vec<SpecError>> {
        let mut errors = Vec::new();
        let mut bad = |path: String, problem: String| errors.push(SpecError { path, problem });
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            bad(
                "cpus".into(),
                format!("is {}; expected 1 to {MAX_CPUS}", self.cpus),
            );
        }
        if let Some(n) = self.code_cache_bytes
            && !CODE_CACHE_BYTES.contains(&n)
        {
            bad(
                "code_cache_bytes".into(),
                format!("is {n} bytes; expected 256 KiB to 1 GiB"),
            );
        }
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes) {
            bad(
                "memory_bytes".into(),
                format!("is {} bytes; expected 16 MiB to 8 TiB", self.memory_bytes),
            );
        } else if !self.memory_bytes.is_multiple_of(1 << 20) {
            bad(
                "memory_bytes".into(),
                "must be a whole number of MiB".into(),
            );
        }
        let word = |s: &str| {
            !s.is_empty()
                && s.len() <= 64
                && s.chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.,+=".contains(c))
        };
        if !word(&self.cpu_model) {
            bad(
                "cpu_model".into(),
                "expected the name of a CPU model, e.g. host".into(),
            );
        }
        let no_kernel = self.boot.kernel.as_os_str().is_empty();
        match &self.boot.firmware {
            Some(f) => {
                f.validate(&mut bad);
                if !no_kernel {
                    let problem = "is given together with a kernel; expected one of them";
                    bad("boot.firmware".into(), problem.into());
                }
            }
            None if no_kernel && self.restore.is_none() => {
                bad("boot.kernel".into(), "expected the path of a kernel".into());
            }
            None => {}
        }
        self.smbios.validate(&mut bad);
        if self.boot.append.len() > MAX_APPEND_BYTES || self.boot.append.contains('\0') {
            let text = format!("expected at most {MAX_APPEND_BYTES} bytes without NUL");
            bad("boot.append".into(), text);
        }
        for (n, m) in self.boot.modules.iter().enumerate() {
            if m.path.as_os_str().is_empty() || m.args.contains('\0') {
                bad(
                    format!("boot.modules[{n}]"),
                    "expected the path of a module".into(),
                );
            }
        }
        if self.time_limit_ms == Some(0) {
            bad("time_limit_ms".into(), "must be more than 0".into());
        }
        self.validate_disks(&mut bad);
        self.validate_cdroms(&mut bad);
        if self.floppies.len() > MAX_FLOPPIES {
            let text = format!(
                "{} floppy drives; at most {MAX_FLOPPIES}",
                self.floppies.len()
            );
            bad("floppies".into(), text);
        }
        self.validate_net(&mut bad);
        self.screen.validate(&mut bad);
        if let Some(v) = &self.vsock {
            // sockaddr_un.sun_path, with room for a port suffix.
            if v.as_os_str().is_empty() || v.as_os_str().len() > 90 {
                bad(
                    "vsock".into(),
                    "expected a socket path of at most 90 bytes".into(),
                );
            }
        }
        share::validate_shares(&self.shares, &mut bad);
        share::validate_channels(&self.channels, &mut bad);
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    fn validate_disks(&self, bad: &mut dyn FnMut(String, String)) {
        if self.disks.len() > MAX_DISKS {
            bad(
                "disks".into(),
                format!("{} disks; at most {MAX_DISKS}", self.disks.len()),
            );
        }
        for (n, d) in self.disks.iter().enumerate() {
            if d.path.as_os_str().is_empty() {
                bad(
                    format!("disks[{n}].path"),
                    "expected the path of a disk image".into(),
                );
            }
            if let Some(serial) = &d.serial
                && (serial.is_empty()
                    || serial.len() > MAX_SERIAL_BYTES
                    || !serial.chars().all(|c| c.is_ascii_graphic()))
            {
                let text = format!("expected 1 to {MAX_SERIAL_BYTES} printable ASCII characters");
                bad(format!("disks[{n}].serial"), text);
            }
            if d.block_bytes.is_some_and(|b| b != 512 && b != 4096) {
                let text = "expected 512 or 4096";
                bad(format!("disks[{n}].block_bytes"), text.into());
            }
            let same = |o: &DiskSpec| o.path == d.path && !(o.read_only && d.read_only);
            if self.disks.iter().take(n).any(same) {
                bad(
                    format!("disks[{n}].path"),
                    "is given twice and not read-only".into(),
                );
            }
        }
    }

    fn validate_cdroms(&self, bad: &mut dyn FnMut(String, String)) {
        if self.cdroms.len() > MAX_CDROMS {
            bad(
                "cdroms".into(),
                format!("{} CD drives; at most {MAX_CDROMS}", self.cdroms.len()),
            );
        }
        for (n, c) in self.cdroms.iter().enumerate() {
            if c.path.as_ref().is_some_and(|p| p.as_os_str().is_empty()) {
                let text = "expected the path of a CD image";
                bad(format!("cdroms[{n}].path"), text.into());
            }
            if matches!(c.bus, DiskBus::Virtio | DiskBus::Nvme) {
                let text = "a CD drive cannot be there; expected ahci, ide or scsi";
                bad(format!("cdroms[{n}].bus"), text.into());
            }
        }
        let buses = self.disks.iter().map(|d| d.bus);
        let buses = buses.chain(self.cdroms.iter().map(|c| c.bus));
        let ide = buses.filter(|b| *b == DiskBus::Ide).count();
        if ide > MAX_IDE_DRIVES {
            let text = format!("{ide} drives on ide; at most {MAX_IDE_DRIVES}");
            bad("disks".into(), text);
        }
    }

    fn validate_net(&self, bad: &mut dyn FnMut(String, String)) {
        let cards = &self.net.cards;
        if self.net.kind == NetKind::None && !cards.is_empty() {
            let text = "none excludes network cards; leave it out";
            bad("net.kind".into(), text.into());
        }
        if cards.len() > MAX_NICS {
            let text = format!("{} network cards; at most {MAX_NICS}", cards.len());
            bad("net.cards".into(), text);
        }
        for (n, c) in cards.iter().enumerate() {
            c.validate(&format!("net.cards[{n}]"), bad);
            let same = |(m, o): (usize, &NicSpec)| o.mac_of(m) == c.mac_of(n);
            if cards.iter().enumerate().take(n).any(same) {
                let text = "two cards have this address; give them different ones with mac=";
                bad(format!("net.cards[{n}].mac"), text.into());
            }
            let same = |o: &NicSpec| c.pcap.is_some() && o.pcap == c.pcap;
            if cards.iter().take(n).any(same) {
                let text = "two cards have this file; give each one of its own";
                bad(format!("net.cards[{n}].pcap"), text.into());
            }
        }
        let all = self.net.all_cards();
        let user = all.iter().any(|c| c.backend == NicBackend::User);
        if !user && self.net.host_loopback {
            bad("net.host_loopback".into(), "needs the user network".into());
        }
        let forwards = &self.net.forwards;
        if !user && !forwards.is_empty() {
            bad("net.forwards".into(), "need the user network".into());
        }
        if forwards.len() > MAX_FORWARDS {
            bad("net.forwards".into(), format!("at most {MAX_FORWARDS}"));
        }
        for (n, f) in forwards.iter().enumerate() {
            if f.host_port == 0 || f.guest_port == 0 {
                bad(format!("net.forwards[{n}]"), "ports are 1 to 65535".into());
            }
            let same = |o: &ForwardSpec| {
                (o.protocol, o.host_addr, o.host_port) == (f.protocol, f.host_addr, f.host_port)
            };
            if forwards.iter().take(n).any(same) {
                bad(
                    format!("net.forwards[{n}].host_port"),
                    "is forwarded twice".into(),
                );
            }
        }
    }
}
