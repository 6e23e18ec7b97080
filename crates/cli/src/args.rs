//! The command line, and how it becomes a [`VmSpec`].

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pyrite_api::v1::{
    BootSpec, CdromSpec, ConsoleKind, DirectKind, DiskBus, DiskFormat, DiskSpec, EngineKind,
    FloppyKind, FloppySpec, ForwardSpec, ModuleSpec, NetSpec, Protocol, ResetPolicy, SpecError,
    VmSpec,
};
use pyrite_disk::Format;

use crate::firmware::FirmwareArgs;
use crate::net::{LinkArg, NetArg};

/// Runs virtual machines, with or without hardware virtualisation.
#[derive(Debug, Parser)]
#[command(name = "pyrite", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM and attach the terminal to it.
    ///
    /// Without --kernel, a stock Debian kernel and a static busybox are fetched with the host's
    /// package client, cached, and booted to a shell with working network.
    #[command(after_help = crate::exit::HELP)]
    Run(Box<RunArgs>),
    /// Ask something of a running VM that was started with --control.
    Ctl(CtlArgs),
    /// Show where a running guest spends its time.
    Profile(crate::profile::ProfileArgs),
    /// Write what the screen of a running VM shows to a PNG file.
    Screenshot(crate::screen::ScreenshotArgs),
    /// Type a text on the keyboard of a running VM.
    Type(crate::screen::TypeArgs),
    /// Press keys of the keyboard of a running VM.
    Key(crate::screen::KeyArgs),
    /// Connect VMs to each other, and to nothing else, until stopped.
    ///
    /// VMs join with --net switch,path=SOCKET. Only the user who started the switch can join.
    Switch(crate::net::SwitchArgs),
    /// Make, look at, convert and check disk images.
    Image(crate::image::ImageArgs),
    /// Say what this host can do for VMs.
    Doctor,
    /// The process of one VM (started by `run`).
    #[command(hide = true)]
    Vmm,
}

/// Engines by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum EngineArg {
    /// KVM if it really works here, else soft
    Auto,
    /// Hardware virtualisation through the Linux kernel
    Kvm,
    /// Pyrite's own CPU engine
    Soft,
}

/// When user programs run on the host's processor itself.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DirectArg {
    /// Never
    Off,
    /// Those that compute for long
    Auto,
    /// Always; slow, for tests
    Always,
}

/// Consoles by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ConsoleArg {
    /// The first serial port, ttyS0
    Serial,
    /// The virtio console, hvc0
    Virtio,
    /// No console
    None,
}

/// Arguments of `pyrite ctl`.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The socket that the VM was given with --control
    pub socket: PathBuf,
    /// What to ask
    #[command(subcommand)]
    pub ask: Ask,
}

/// What can be asked of a running VM.
#[derive(Debug, Subcommand)]
pub enum Ask {
    /// Write memory and state to a new directory; the VM then goes on
    Snapshot {
        /// The directory, which must not exist
        dir: PathBuf,
    },
    /// Show what the machine is and does
    Inspect {
        /// Part of the tree, e.g. vm/vcpu0
        #[arg(default_value = "")]
        path: String,
    },
    /// Take this much memory from the guest, or give back what is more (needs --balloon)
    Balloon {
        /// E.g. 256M or 1G; 0 gives everything back
        #[arg(value_name = "SIZE", value_parser = parse_size)]
        bytes: u64,
    },
    /// Put another image into a CD drive or a floppy drive
    Insert {
        /// The drive: 0 is the first --cdrom, fd0 the first --floppy
        #[arg(value_parser = parse_drive)]
        drive: DriveName,
        /// CD image (ISO 9660), or raw image of a floppy disk
        file: PathBuf,
        /// Although the guest has locked the tray
        #[arg(long)]
        force: bool,
        /// The floppy disk is write-protected
        #[arg(long)]
        ro: bool,
    },
    /// Take the CD or the floppy disk out of a drive
    Eject {
        /// The drive: 0 is the first --cdrom, fd0 the first --floppy
        #[arg(value_parser = parse_drive)]
        drive: DriveName,
        /// Although the guest has locked the tray
        #[arg(long)]
        force: bool,
    },
    /// Plug the cable of a network card in or out
    Link {
        /// Number of the card: 0 is the first --net
        card: usize,
        /// In or out
        state: LinkArg,
    },
    /// Stop guest time
    Pause,
    /// Let a paused VM go on
    Resume,
    /// Press the reset button
    Reset,
    /// Press the power button
    Power,
    /// End the VM at once
    Stop,
}

/// Options of `pyrite run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Kernel: Linux bzImage, ELF vmlinux or PVH kernel, or Multiboot 1 kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Multiboot module, with its arguments after a space; repeatable
    #[arg(long = "module", value_name = "FILE[ ARGS]", requires = "kernel")]
    pub modules: Vec<String>,
    /// Firmware.
    #[command(flatten)]
    pub firmware: FirmwareArgs,
    /// Disk image; repeatable
    ///
    /// FILE is raw unless format=FORMAT says otherwise (qcow2, vmdk, vdi, vhd, vhdx); the format
    /// is never guessed. backing=allow lets the image name other files that are then read, such
    /// as a backing file. bus= says how the disk is connected: virtio (the default), ahci,
    /// ide, nvme or scsi (virtio-scsi). block=4096 shows it with blocks of 4 KiB.
    #[arg(
        long = "disk",
        value_name = "FILE[,format=FORMAT][,ro][,backing=allow][,serial=TEXT][,bus=BUS][,block=BYTES]",
        value_parser = parse_disk
    )]
    pub disks: Vec<DiskSpec>,
    /// CD/DVD drive; repeatable
    ///
    /// FILE is the image of the medium (ISO 9660), or none for an empty tray; `pyrite ctl` changes
    /// it. bus= says how the drive is connected: ahci (the default),
    /// ide or scsi.
    #[arg(long = "cdrom", value_name = "FILE[,bus=BUS]", value_parser = parse_cdrom)]
    pub cdroms: Vec<CdromSpec>,
    /// Floppy drive; repeatable, for A and B
    ///
    /// FILE is a raw image of a floppy disk of 360, 720, 1200, 1440 or 2880 KiB, or none for an
    /// empty drive; `pyrite ctl` changes it. ro protects it; then less than the whole disk is
    /// enough. drive= says which drive it is: by default the smallest one that reads the disk.
    #[arg(
        long = "floppy",
        value_name = "FILE[,ro][,drive=1.2M|1.44M|2.88M]",
        value_parser = parse_floppy
    )]
    pub floppies: Vec<FloppySpec>,
    /// Network card; repeatable [default: user]
    #[arg(
        long,
        value_name = "BACKEND[,SETTING=VALUE]...",
        value_parser = crate::net::parse,
        long_help = crate::net::HELP
    )]
    pub net: Vec<NetArg>,
    /// Forward a port of the host into the guest; repeatable
    #[arg(
        short = 'p',
        long = "publish",
        value_name = "[ADDR:]HOST:GUEST[/udp]",
        value_parser = parse_forward
    )]
    pub forwards: Vec<ForwardSpec>,
    /// Let the guest reach servers on the host's loopback, as 10.0.2.2
    #[arg(long)]
    pub host_loopback: bool,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory, e.g. 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// What executes the guest
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineArg,
    /// Most memory for translated code, per vCPU, of the software engine [default: 64M]
    ///
    /// Memory is taken as it fills; what describes the code takes about twice as much again. A small one
    /// makes a VM of a small footprint: a kernel boots with 2M, but large programs get slow.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub code_cache: Option<u64>,
    /// When the software engine runs user programs of the guest on the processor itself
    ///
    /// Such a program gets a process of its own on the host, in which only its memory is mapped and which
    /// cannot make system calls. Where processes may not be traced (ptrace), programs are translated.
    #[arg(long, value_enum, default_value = "auto")]
    pub direct: DirectArg,
    /// CPU model
    #[arg(long, value_name = "MODEL", default_value = "host")]
    pub cpu: String,
    /// What the terminal is connected to [default: serial; virtio without --kernel]
    #[arg(long, value_enum)]
    pub console: Option<ConsoleArg>,
    /// End the VM after this time, e.g. 90, 90s, 5m
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
    /// File for what the guest sends on its second serial port, ttyS1
    #[arg(long, value_name = "FILE")]
    pub serial2: Option<PathBuf>,
    /// File for what the guest writes to the debug console, port 0x402
    #[arg(long, value_name = "FILE")]
    pub debugcon: Option<PathBuf>,
    /// Unix socket for connections to and from the guest (vsock)
    #[arg(long, value_name = "SOCKET")]
    pub vsock: Option<PathBuf>,
    /// Folders and channels
    #[command(flatten)]
    pub share: crate::share::ShareArgs,
    /// The screen
    #[command(flatten)]
    pub screen: crate::screen::ScreenArgs,
    /// Add a memory balloon
    #[arg(long)]
    pub balloon: bool,
    /// End the VM when the guest resets the machine
    #[arg(long)]
    pub no_reboot: bool,
    /// Unix socket on which the VM takes requests of `pyrite ctl`
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Stand still until `pyrite ctl SOCKET resume`
    #[arg(long, requires = "control")]
    pub paused: bool,
    /// Go on from a snapshot instead of booting
    ///
    /// The guest's wall clock goes on from where it was; `hwclock --hctosys` in the guest, or its
    /// time daemon, puts it right.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "initrd", "append", "modules"])]
    pub restore: Option<PathBuf>,
    /// What to log to standard error, e.g. info or pyrite_vmm=debug
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    pub log: String,
}

impl RunArgs {
    /// The specification without a kernel, which is either given or the stock one.
    pub fn spec(&self) -> VmSpec {
        let modules = self.modules.iter().map(|text| {
            let (path, args) = text.split_once(' ').unwrap_or((text, ""));
            ModuleSpec {
                path: path.into(),
                args: args.into(),
            }
        });
        let console = self.console.map(|c| match c {
            ConsoleArg::Serial => ConsoleKind::Serial,
            ConsoleArg::Virtio => ConsoleKind::Virtio,
            ConsoleArg::None => ConsoleKind::None,
        });
        let mut spec = VmSpec {
            cpus: self.cpus,
            memory_bytes: self.memory,
            engine: match self.engine {
                EngineArg::Auto => EngineKind::Auto,
                EngineArg::Kvm => EngineKind::Kvm,
                EngineArg::Soft => EngineKind::Soft,
            },
            code_cache_bytes: self.code_cache,
            direct: match self.direct {
                DirectArg::Off => DirectKind::Off,
                DirectArg::Auto => DirectKind::Auto,
                DirectArg::Always => DirectKind::Always,
            },
            cpu_model: self.cpu.clone(),
            boot: BootSpec {
                kernel: self.kernel.clone().unwrap_or_default(),
                initrd: self.initrd.clone(),
                append: self.append.clone().unwrap_or_default(),
                modules: modules.collect(),
                ..BootSpec::default()
            },
            disks: self.disks.clone(),
            cdroms: self.cdroms.clone(),
            floppies: self.floppies.clone(),
            net: NetSpec {
                forwards: self.forwards.clone(),
                host_loopback: self.host_loopback,
                ..crate::net::spec(&self.net)
            },
            console: console.unwrap_or_default(),
            screen: self.screen.spec(),
            balloon: self.balloon,
            vsock: self.vsock.clone(),
            shares: self.share.shares.clone(),
            channels: self.share.channels.clone(),
            serial2: self.serial2.clone(),
            debugcon: self.debugcon.clone(),
            reset: if self.no_reboot {
                ResetPolicy::Stop
            } else {
                ResetPolicy::Reboot
            },
            time_limit_ms: self
                .timeout
                .map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
            restore: self.restore.clone(),
            paused: self.paused,
            ..VmSpec::default()
        };
        self.firmware.fill(&mut spec);
        spec
    }
}

/// The option that sets a field.
fn option_of(path: &str) -> &'static str {
    let field = path.split(['[', '.']).next().unwrap_or_default();
    match (field, path) {
        ("boot", p) if p.starts_with("boot.initrd") => "--initrd",
        ("boot", p) if p.starts_with("boot.append") => "--append",
        ("boot", p) if p.starts_with("boot.modules") => "--module",
        ("boot", "boot.firmware.vars") => "--firmware-vars",
        ("boot", "boot.firmware.order" | "boot.firmware.once" | "boot.firmware.menu_ms") => {
            "--boot"
        }
        ("boot", p) if p.starts_with("boot.firmware") => "--firmware",
        ("smbios", _) => "--smbios",
        ("boot", _) => "--kernel",
        ("cpus", _) => "--cpus",
        ("memory_bytes", _) => "--memory",
        ("engine", _) => "--engine",
        ("code_cache_bytes", _) => "--code-cache",
        ("cpu_model", _) => "--cpu",
        ("disks", _) => "--disk",
        ("cdroms", _) => "--cdrom",
        ("floppies", _) => "--floppy",
        ("net", p) if p.starts_with("net.forwards") => "-p",
        ("net", p) if p.starts_with("net.host_loopback") => "--host-loopback",
        ("net", _) => "--net",
        ("console", _) => "--console",
        ("screen", p) if p.starts_with("screen.vnc") => "--vnc",
        ("screen", _) => "--vga",
        ("balloon", _) => "--balloon",
        ("vsock", _) => "--vsock",
        ("shares", _) => "--share",
        ("channels", _) => "--channel",
        ("serial2", _) => "--serial2",
        ("debugcon", _) => "--debugcon",
        ("time_limit_ms", _) => "--timeout",
        ("restore", _) => "--restore",
        _ => "the VM specification",
    }
}

/// An error in the words of the command line.
pub fn describe(error: &SpecError) -> String {
    format!("{}: {}", option_of(&error.path), error.problem)
}

/// The parts between single commas; a comma in a part is written twice.
pub fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

/// `FILE[,format=FORMAT][,ro][,backing=allow][,serial=TEXT][,bus=BUS]`.
fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let mut parts = split_at_commas(text).into_iter();
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("expected FILE[,format=FORMAT][,ro][,backing=allow][,serial=TEXT][,bus=BUS]")?;
    let mut disk = DiskSpec {
        path: path.into(),
        ..DiskSpec::default()
    };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => disk.read_only = true,
            None if part == "rw" => disk.read_only = false,
            Some(("serial", s)) => disk.serial = Some(s.to_owned()),
            Some(("format", f)) => disk.format = parse_disk_format(f)?,
            Some(("bus", b)) => disk.bus = parse_bus(b)?,
            Some(("block", b)) => {
                let bytes = b.parse().map_err(|_| "expected block=512 or block=4096")?;
                disk.block_bytes = Some(bytes);
            }
            Some(("backing", "allow")) => disk.allow_backing = true,
            Some(("backing", "refuse")) => disk.allow_backing = false,
            _ => {
                return Err(format!(
                    "unknown setting {part:?}; expected format=FORMAT, ro, backing=allow, \
                     serial=TEXT, bus=BUS or block=BYTES (a comma in the file name is written ,,)"
                ));
            }
        }
    }
    Ok(disk)
}

/// `FILE[,bus=BUS]`; `none` is an empty tray.
fn parse_cdrom(text: &str) -> Result<CdromSpec, String> {
    let mut parts = split_at_commas(text).into_iter();
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("expected FILE[,bus=BUS], or none for an empty tray")?;
    let mut cdrom = CdromSpec {
        path: (path != "none").then(|| path.into()),
        bus: DiskBus::Ahci,
    };
    for part in parts {
        match part.split_once('=') {
            Some(("bus", b)) => cdrom.bus = parse_bus(b)?,
            _ => {
                return Err(format!(
                    "unknown setting {part:?}; expected bus=BUS (a comma in the file name is \
                     written ,,)"
                ));
            }
        }
    }
    Ok(cdrom)
}

/// `FILE[,ro][,drive=KIND]`; `none` is an empty drive.
fn parse_floppy(text: &str) -> Result<FloppySpec, String> {
    let mut parts = split_at_commas(text).into_iter();
    let path = parts
        .next()
        .filter(|p| !p.is_empty())
        .ok_or("expected FILE[,ro][,drive=KIND], or none for an empty drive")?;
    let mut floppy = FloppySpec {
        path: (path != "none").then(|| path.into()),
        ..FloppySpec::default()
    };
    for part in parts {
        match part.as_str() {
            "ro" => floppy.read_only = true,
            "drive=1.2M" => floppy.drive = Some(FloppyKind::D1200),
            "drive=1.44M" => floppy.drive = Some(FloppyKind::D1440),
            "drive=2.88M" => floppy.drive = Some(FloppyKind::D2880),
            _ => {
                return Err(format!(
                    "unknown setting {part:?}; expected ro, drive=1.2M, drive=1.44M or \
                     drive=2.88M (a comma in the file name is written ,,)"
                ));
            }
        }
    }
    Ok(floppy)
}

/// A drive whose medium is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveName {
    /// A CD drive, by number.
    Cd(usize),
    /// A floppy drive, by number.
    Floppy(usize),
}

fn parse_drive(text: &str) -> Result<DriveName, String> {
    let (kind, number): (fn(usize) -> DriveName, &str) = match text.strip_prefix("fd") {
        Some(n) => (DriveName::Floppy, n),
        None => (DriveName::Cd, text),
    };
    let number = number.parse().map_err(|_| {
        "expected the number of a CD drive, e.g. 0, or of a floppy drive, e.g. fd0".to_owned()
    })?;
    Ok(kind(number))
}

fn parse_bus(text: &str) -> Result<DiskBus, String> {
    Ok(match text {
        "virtio" => DiskBus::Virtio,
        "ahci" => DiskBus::Ahci,
        "ide" => DiskBus::Ide,
        "nvme" => DiskBus::Nvme,
        "scsi" => DiskBus::Scsi,
        _ => {
            return Err(format!(
                "unknown bus {text:?}; expected virtio, ahci, ide, nvme or scsi"
            ));
        }
    })
}

fn parse_disk_format(text: &str) -> Result<DiskFormat, String> {
    Ok(match text.parse()? {
        Format::Raw => DiskFormat::Raw,
        Format::Qcow2 => DiskFormat::Qcow2,
        Format::Vmdk => DiskFormat::Vmdk,
        Format::Vdi => DiskFormat::Vdi,
        Format::Vhd => DiskFormat::Vhd,
        Format::Vhdx => DiskFormat::Vhdx,
    })
}

/// `[ADDR:]HOST:GUEST[/tcp|/udp]`.
fn parse_forward(text: &str) -> Result<ForwardSpec, String> {
    const EXPECTED: &str = "expected [ADDR:]HOST:GUEST[/udp], e.g. 8080:80";
    let (ports, protocol) = match text.rsplit_once('/') {
        Some((p, "udp")) => (p, Protocol::Udp),
        Some((p, "tcp")) => (p, Protocol::Tcp),
        Some(_) => return Err(EXPECTED.into()),
        None => (text, Protocol::Tcp),
    };
    let (host, guest) = ports.rsplit_once(':').ok_or(EXPECTED)?;
    let (addr, host) = match host.rsplit_once(':') {
        Some((addr, host)) => {
            let addr = addr.trim_start_matches('[').trim_end_matches(']');
            (addr.parse::<IpAddr>().map_err(|_| EXPECTED)?, host)
        }
        None => (IpAddr::from([127, 0, 0, 1]), host),
    };
    let port = |s: &str| s.parse::<u16>().ok().filter(|p| *p != 0).ok_or(EXPECTED);
    Ok(ForwardSpec {
        protocol,
        host_addr: addr,
        host_port: port(host)?,
        guest_port: port(guest)?,
    })
}

/// Bytes from `512M`, `2G`, `2GiB`; a plain number is MiB.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const EXPECTED: &str = "expected a size such as 512M or 2G";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| EXPECTED)?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "K" | "KB" | "KIB" => 10,
        "" | "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(EXPECTED.into()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| EXPECTED.into())
}

/// A time from `90`, `90s`, `1500ms`, `5m`, `2h`.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    const EXPECTED: &str = "expected a time such as 90s or 5m";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| EXPECTED)?;
    let ms = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => None,
    };
    ms.filter(|n| *n > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| EXPECTED.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<VmSpec, clap::Error> {
        let all = ["pyrite", "run"].iter().chain(args);
        match Cli::try_parse_from(all)?.command {
            Command::Run(a) => Ok(a.spec()),
            _ => unreachable!("run was asked for"),
        }
    }

    #[test]
    fn flags_become_a_spec() {
        let spec = run(&[
            "--kernel",
            "k",
            "--initrd",
            "i",
            "--append",
            "-a b",
            "--disk",
            "d,ro,serial=S1",
            "--disk",
            "a,,b,format=qcow2,backing=allow,bus=ahci",
            "--floppy",
            "f.img,ro",
            "--floppy",
            "none,drive=2.88M",
            "--cdrom",
            "c.iso",
            "--cdrom",
            "none,bus=ahci",
            "-p",
            "8080:80",
            "-p",
            "0.0.0.0:53:53/udp",
            "--cpus",
            "4",
            "--memory",
            "2G",
            "--engine",
            "soft",
            "--cpu",
            "x",
            "--console",
            "virtio",
            "--timeout",
            "2m",
            "--no-reboot",
            "--balloon",
            "--host-loopback",
            "--module",
            "m a b",
        ])
        .unwrap();
        assert_eq!(
            (spec.cpus, spec.memory_bytes, spec.engine),
            (4, 2 << 30, EngineKind::Soft)
        );
        assert_eq!(spec.boot.append, "-a b");
        assert_eq!(spec.boot.modules[0].args, "a b");
        assert_eq!(spec.disks[0].serial.as_deref(), Some("S1"));
        assert!(spec.disks[0].read_only && !spec.disks[1].read_only);
        assert_eq!(spec.disks[1].path, PathBuf::from("a,b"));
        assert_eq!(
            (spec.disks[0].format, spec.disks[1].format),
            (DiskFormat::Raw, DiskFormat::Qcow2)
        );
        assert_eq!(
            (spec.disks[0].bus, spec.disks[1].bus),
            (DiskBus::Virtio, DiskBus::Ahci)
        );
        assert!(spec.floppies[0].read_only && !spec.floppies[1].read_only);
        assert_eq!(spec.floppies[1].drive, Some(FloppyKind::D2880));
        let media: Vec<_> = spec.floppies.iter().map(|f| f.path.clone()).collect();
        assert_eq!(media, [Some(PathBuf::from("f.img")), None]);
        let media: Vec<_> = spec.cdroms.iter().map(|c| c.path.clone()).collect();
        assert_eq!(media, [Some(PathBuf::from("c.iso")), None]);
        assert!(spec.disks[1].allow_backing && !spec.disks[0].allow_backing);
        assert!(spec.net.host_loopback);
        assert_eq!(spec.net.forwards[1].protocol, Protocol::Udp);
        assert_eq!(spec.time_limit_ms, Some(120_000));
        assert_eq!(spec.reset, ResetPolicy::Stop);
        spec.validate().unwrap();
    }

    #[test]
    fn wrong_values_are_refused() {
        for args in [
            ["--memory", "lots"],
            ["--memory", "99999999999T"],
            ["--disk", ",ro"],
            ["--disk", "d,colour=red"],
            ["--disk", "d,format=qcow3"],
            ["--disk", "d,bus=mfm"],
            ["--cdrom", ",bus=ahci"],
            ["--cdrom", "c,ro"],
            ["--floppy", "f,rw"],
            ["--floppy", "f,drive=8M"],
            ["--floppy", ",ro"],
            ["-p", "80"],
            ["-p", "0:80"],
            ["-p", "80:70000"],
            ["-p", "80:80/sctp"],
            ["--timeout", "0"],
            ["--timeout", "soon"],
            ["--engine", "tcg"],
            ["--cpus", "x"],
        ] {
            assert_eq!(run(&args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn errors_name_the_option() {
        let e = SpecError::new("disks[1].path", "is missing");
        assert_eq!(describe(&e), "--disk: is missing");
        assert_eq!(option_of("boot.initrd"), "--initrd");
        assert_eq!(option_of("net.forwards[0].host_port"), "-p");
    }

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
