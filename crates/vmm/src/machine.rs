//! A machine assembled from a specification: memory, chipset, virtio devices, engine.
//!
//! Assembling starts nothing. The [state driver](crate::run) owns the machine and is the only one
//! that changes what it does.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use pyrite_api::v1::{ConsoleKind, DiskBus, DiskFormat, DiskSpec, SpecError, VmSpec};
use pyrite_devices::acpi_pm::AcpiPm;
use pyrite_devices::chipset::{Chipset, ChipsetConfig};
use pyrite_devices::display::vga::Vga;
use pyrite_devices::uart::{NoSerial, SerialBackend};
use pyrite_disk::image::References;
use pyrite_disk::medium::Tray;
use pyrite_disk::open::{OpenOptions, open};
use pyrite_disk::raw::RawDisk;
use pyrite_disk::{BlockBackend, BlockRequest, Format, ImageDisk};
use pyrite_engine::{CpuIo, CpuidTable, Irqfd, Vm, VmConfig};
use pyrite_mem::{GuestMemory, LEGACY_END, LEGACY_START};
use pyrite_net::Cable;
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{DoorbellAt, DoorbellSink};
use pyrite_vdev::{
    IntrSink, IrqLine, Lifecycle, MachineEvents, MsiMessage, MsiRoute, MsiSink, PciFunction,
    VmClock,
};
use pyrite_virtio::{
    Balloon, BalloonControl, Blk, BlkConfig, Console as VirtioConsole, PortConfig, Rng,
    VirtioDevice, VirtioPciDevice, Vsock, VsockConfig,
};

use crate::display::Screen;
use crate::display::input::Input;
use crate::display::rfb::Server;
use crate::engines::Engine;
use crate::firmware::{BootDevices, Firmware, LogLines};
use crate::output::OutputFile;
use crate::run::console::Console;

mod channels;
#[cfg(test)]
mod doorbell_tests;
mod drives;
mod floppies;
mod nics;
mod screen;
mod shares;
#[cfg(test)]
mod tests;

pub(crate) use floppies::kinds as floppy_kinds;
pub(crate) use screen::{check_video_bios, memory_layout};

/// How long a flush of the disks may take.
const FLUSH_WITHIN: Duration = Duration::from_secs(60);
/// First PCI slot of configured devices.
const FIRST_SLOT: u8 = 1;
/// Context id of the guest on its vsock: the first that is not reserved.
const GUEST_CID: u32 = 3;

/// Why a machine could not be assembled.
#[derive(Debug)]
pub enum AssemblyError {
    /// The specification or a file is wrong.
    Input(Vec<SpecError>),
    /// The host or the engine refused.
    Host(anyhow::Error),
}

impl From<anyhow::Error> for AssemblyError {
    fn from(e: anyhow::Error) -> AssemblyError {
        AssemblyError::Host(e)
    }
}

fn input(path: impl Into<String>, problem: impl Into<String>) -> AssemblyError {
    AssemblyError::Input(vec![SpecError::new(path, problem)])
}

fn host(what: &str) -> impl FnOnce(anyhow::Error) -> AssemblyError {
    move |e| AssemblyError::Host(e.context(what.to_owned()))
}

/// A unit with its state driver's view.
pub type Unit = Arc<Mutex<dyn Lifecycle>>;

/// Everything of a VM but its threads.
pub struct Machine {
    /// RAM.
    pub memory: Arc<GuestMemory>,
    /// Guest time.
    pub clock: Arc<VmClock>,
    /// Platform devices.
    pub chipset: Arc<Chipset>,
    /// The ACPI power management registers: the power button.
    pub acpi_pm: Arc<Mutex<AcpiPm>>,
    /// Every unit in the order of save and reset.
    pub units: Vec<Unit>,
    /// What the machine starts with, if that is firmware, and names of devices for its boot order.
    pub firmware: Option<(Firmware, BootDevices)>,
    /// Back ends of the disks that keep tables in memory: all whose format is not raw.
    pub image_disks: Vec<Arc<dyn BlockBackend>>,
    /// Trays of the CD drives.
    trays: Vec<Arc<Tray>>,
    floppies: floppies::FloppyDrives,
    /// Cables of the network cards.
    cables: Vec<Arc<dyn Cable>>,
    /// The engine's VM.
    pub vm: Arc<dyn Vm>,
    /// Its CPUID, before per-vCPU fields.
    pub cpuid: CpuidTable,
    /// The console.
    pub console: Console,
    /// The balloon, if the VM has one.
    pub balloon: Option<BalloonControl>,
    /// The screen, if the VM has one, and its VGA.
    pub screen: Option<(Arc<Screen>, Arc<Mutex<Vga>>)>,
    /// Keyboard and mouse.
    pub input: Input,
    /// The VNC server, if the screen has one.
    pub vnc: Option<Server>,
    /// Number of vCPUs.
    pub vcpus: u32,
}

/// Devices are built before the engine's VM, which needs their buses; their interrupts go here and
/// on to the engine once there is one.
#[derive(Default)]
struct EngineLink {
    vm: OnceLock<Arc<dyn Vm>>,
    /// Doorbells that the engine answers, by PCI function. LOCK ORDER: root complex < this.
    doorbells: Mutex<BTreeMap<u8, Vec<DoorbellAt>>>,
}

impl MsiSink for EngineLink {
    fn send(&self, msi: MsiMessage) {
        if let Some(vm) = self.vm.get() {
            vm.send_msi(msi.addr, msi.data);
        }
    }
    fn open_route(&self, msi: MsiMessage) -> Option<Box<dyn MsiRoute>> {
        let irqfd = self.vm.get()?.open_irqfd(msi.addr, msi.data)?;
        Some(Box::new(IrqfdRoute(irqfd)))
    }
}

/// A device's message as the engine's irqfd.
struct IrqfdRoute(Box<dyn Irqfd>);

impl MsiRoute for IrqfdRoute {
    fn trigger(&self) {
        self.0.trigger();
    }
    fn change(&self, msi: MsiMessage) -> bool {
        self.0
            .route(msi.addr, msi.data)
            .inspect_err(|e| tracing::debug!("{e}"))
            .is_ok()
    }
}

impl DoorbellSink for EngineLink {
    fn replace(&self, devfn: u8, doorbells: &[DoorbellAt]) {
        // Without a VM no guest has enabled a BAR yet.
        let Some(vm) = self.vm.get() else { return };
        let mut all = lock(&self.doorbells);
        for d in all.remove(&devfn).unwrap_or_default() {
            if let Err(e) = vm.remove_ioeventfd(d.gpa, d.doorbell.fd) {
                tracing::warn!("{e}");
            }
        }
        let mut there = Vec::new();
        for d in doorbells {
            match vm.add_ioeventfd(d.gpa, d.doorbell.fd) {
                Ok(()) => there.push(*d),
                // The guest put two devices at one address, perhaps. Stores arrive by the bus.
                Err(e) => tracing::debug!(devfn, "{e}"),
            }
        }
        all.insert(devfn, there);
    }
}

impl IntrSink for EngineLink {
    fn set_intr(&self, level: bool) {
        if let Some(vm) = self.vm.get() {
            vm.set_pic_intr(level);
        }
    }
}

/// What the processors see: the chipset's buses and interrupt controllers.
struct MachineIo(Arc<Chipset>);

impl CpuIo for MachineIo {
    fn mmio_read(&self, _vcpu: u32, gpa: u64, data: &mut [u8]) {
        self.0.mmio.read(gpa, data);
    }
    fn mmio_write(&self, _vcpu: u32, gpa: u64, data: &[u8]) {
        // Stores to RAM whose loads reach ROM arrive here; see `GuestMemory::mappings`.
        if (LEGACY_START..LEGACY_END).contains(&gpa) && self.0.memory.write(gpa, data).is_ok() {
            return;
        }
        self.0.mmio.write(gpa, data);
    }
    fn pio_read(&self, _vcpu: u32, port: u16, data: &mut [u8]) {
        self.0.io.read(port, data);
    }
    fn pio_write(&self, _vcpu: u32, port: u16, data: &[u8]) {
        self.0.io.write(port, data);
    }
    fn ack_pic(&self) -> Option<u8> {
        self.0.pic.ack()
    }
    fn eoi(&self, vector: u8) {
        self.0.ioapic.eoi(vector);
    }
}

/// Seconds since 1970 on the host.
fn wall_clock() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

impl Machine {
    /// Assembles a machine.
    pub fn build(
        spec: &VmSpec,
        engine: Engine,
        cpuid: CpuidTable,
        console: Console,
        events: Arc<dyn MachineEvents>,
    ) -> Result<Machine, AssemblyError> {
        let mut firmware = match &spec.boot.firmware {
            Some(f) => Some(Firmware::open(f).map_err(|e| AssemblyError::Input(vec![e]))?),
            None => None,
        };
        let mut layout = memory_layout(spec);
        if let Some(f) = &mut firmware {
            layout.rom = std::mem::take(&mut f.code);
        }
        let memory = GuestMemory::with_layout(&layout)
            .map_err(|e| AssemblyError::Host(anyhow::Error::new(e)))?;
        let memory = Arc::new(memory);
        let clock: Arc<VmClock> = Arc::default();
        let link: Arc<EngineLink> = Arc::default();
        let chipset = Chipset::build(ChipsetConfig {
            memory: Arc::clone(&memory),
            clock: Arc::clone(&clock),
            msi: link.clone(),
            intr: link.clone(),
            events,
            wall_clock: Arc::new(wall_clock),
            vcpus: spec.cpus,
            serial: [
                console.serial(),
                output("serial2", spec.serial2.as_deref())?,
            ],
            debugcon: match &firmware {
                Some(_) if spec.debugcon.is_none() => Box::new(LogLines::default()),
                _ => output("debugcon", spec.debugcon.as_deref())?,
            },
            doorbells: Some(link.clone()),
            firmware: firmware.as_mut().map(|f| f.board(&memory)),
        })
        .map_err(|e| AssemblyError::Host(e.into()))?;
        console.connect_uart(&chipset.uarts[0]);

        let mut units = chipset.units.clone();
        // Restoring the root complex rebuilds its decode tables from the functions.
        let pci_host = units.pop();
        let mut slots = Slots {
            chipset: &chipset,
            memory: &memory,
            clock: &clock,
            msi: link.clone(),
            doorbells: engine.signals_descriptors(),
            next: FIRST_SLOT,
            units: &mut units,
            boot: BootDevices::new(),
        };
        let Plugged {
            balloon,
            mut image_disks,
            cables,
        } = plug_devices(spec, &console, &mut slots)?;
        let screen = screen::plug(spec, &mut slots)?;
        let input = Input::new(&chipset.i8042).map_err(|e| host("input")(e.into()))?;
        let trays = drives::plug(spec, &mut slots, &mut image_disks)?;
        let floppies = floppies::plug(spec, &mut slots)?;
        let vnc = screen::listen(spec, &screen, &input)?;
        let boot_devices = std::mem::take(&mut slots.boot);
        units.extend(pci_host);
        if let Some(f) = &firmware {
            f.check_order(&boot_devices)
                .map_err(|e| AssemblyError::Input(vec![e]))?;
            f.describe(spec, &chipset)
                .map_err(|e| AssemblyError::Host(e.into()))?;
        }

        let acpi_pm = Arc::clone(&chipset.pm);
        let chipset = Arc::new(chipset);
        let time = Arc::clone(&clock);
        let vm = engine
            .create(
                VmConfig {
                    memory: Arc::clone(&memory),
                    vcpus: spec.cpus,
                    cpuid: cpuid.clone(),
                    io: Arc::new(MachineIo(Arc::clone(&chipset))),
                    clock: Arc::new(move || time.now_ns()),
                },
                spec,
            )
            .map_err(|e| AssemblyError::Host(e.into()))
            .map_err(|e| match e {
                AssemblyError::Host(e) => {
                    AssemblyError::Host(e.context(format!("the {} engine", engine.name())))
                }
                other => other,
            })?;
        if link.vm.set(Arc::clone(&vm)).is_err() {
            return Err(AssemblyError::Host(anyhow::anyhow!("engine linked twice")));
        }
        Ok(Machine {
            memory,
            clock,
            chipset,
            acpi_pm,
            units,
            firmware: firmware.map(|f| (f, boot_devices)),
            image_disks,
            trays,
            floppies,
            cables,
            vm,
            cpuid,
            console,
            balloon,
            screen,
            input,
            vnc,
            vcpus: spec.cpus,
        })
    }
}

impl Machine {
    /// Brings everything that the guest has written into the files. Image formats keep tables in
    /// memory: without this, what the guest has not flushed is not in the file, and a snapshot
    /// would not fit its disks. Fails with the first disk that fails.
    pub fn flush_disks(&self) -> anyhow::Result<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        for (n, disk) in self.image_disks.iter().enumerate() {
            let sender = sender.clone();
            let done = move |outcome| {
                // Nobody waits any more if another disk was too slow.
                let _ = sender.send((n, outcome));
            };
            disk.submit(&self.memory, BlockRequest::Flush, Box::new(done));
        }
        for _ in &self.image_disks {
            let (n, outcome) = receiver
                .recv_timeout(FLUSH_WITHIN)
                .map_err(|_| anyhow::anyhow!("a disk does not finish its flush"))?;
            outcome.map_err(|e| anyhow::Error::new(e).context(format!("image {n}")))?;
        }
        Ok(())
    }

    /// Every unit in the order of restore: interrupt controllers last. The restore of a device
    /// may move its interrupt lines, and a controller must not keep an edge of that.
    pub fn restore_order(&self) -> Vec<&Unit> {
        let is_controller = |u: &&Unit| matches!(lock(u).unit(), "pic" | "ioapic");
        let (controllers, mut order): (Vec<_>, Vec<_>) = self.units.iter().partition(is_controller);
        order.extend(controllers);
        order
    }
}

/// PCI slots being filled in order.
struct Slots<'a> {
    chipset: &'a Chipset,
    memory: &'a Arc<GuestMemory>,
    clock: &'a Arc<VmClock>,
    msi: Arc<dyn MsiSink>,
    /// Devices are notified by event descriptors.
    doorbells: bool,
    next: u8,
    units: &'a mut Vec<Unit>,
    boot: BootDevices,
}

impl Slots<'_> {
    /// Plugs a function that `build` makes for its interrupt line into the next slot.
    fn plug_function<T: PciFunction + Lifecycle + 'static>(
        &mut self,
        build: impl FnOnce(IrqLine) -> Arc<Mutex<T>>,
    ) -> Result<(), AssemblyError> {
        let full = |e: pyrite_devices::pci_host::SlotError| AssemblyError::Host(e.into());
        let slot = self.next;
        let function = build(self.chipset.pci.intx_line(slot, 0).map_err(full)?);
        let pci: Arc<Mutex<dyn PciFunction>> = function.clone();
        self.chipset.pci.plug(slot, 0, pci).map_err(full)?;
        self.units.push(function);
        self.next += 1;
        Ok(())
    }

    /// Names the device that was plugged last for boot orders; `kind` and `unit` are what its path
    /// has for firmware.
    fn name_boot_device(&mut self, name: String, kind: &str, unit: &str) {
        let slot = self.next - 1;
        let path = format!("/pci@i0cf8/{kind}@{slot:x}{unit}");
        self.boot.insert(name, path);
    }

    /// Plugs a virtio device into the next slot.
    fn plug(&mut self, unit: &str, device: Box<dyn VirtioDevice>) -> Result<(), AssemblyError> {
        let full = |e: pyrite_devices::pci_host::SlotError| AssemblyError::Host(e.into());
        let slot = self.next;
        let line = self.chipset.pci.intx_line(slot, 0).map_err(full)?;
        let function = VirtioPciDevice::new(
            unit,
            device,
            Arc::clone(self.memory),
            Arc::clone(&self.msi),
            line,
        );
        if self.doorbells {
            VirtioPciDevice::take_doorbells(&function)
                .map_err(|e| host("event descriptors of a device")(e.into()))?;
        }
        let pci: Arc<Mutex<dyn PciFunction>> = function.clone();
        self.chipset.pci.plug(slot, 0, pci).map_err(full)?;
        self.units.push(function);
        self.next += 1;
        Ok(())
    }
}

/// What the host holds of devices that were plugged.
struct Plugged {
    /// The balloon's control, if there is one.
    balloon: Option<BalloonControl>,
    /// The disks whose images hold state in memory.
    image_disks: Vec<Arc<dyn BlockBackend>>,
    /// Cables of the network cards.
    cables: Vec<Arc<dyn Cable>>,
}

/// The virtio devices of a specification, in slot order: disks, network (any cards), console,
/// entropy, balloon, vsock, channels, shared folders.
fn plug_devices(
    spec: &VmSpec,
    console: &Console,
    slots: &mut Slots<'_>,
) -> Result<Plugged, AssemblyError> {
    let mut image_disks = Vec::new();
    for (n, d) in spec.disks.iter().enumerate() {
        if d.bus != DiskBus::Virtio {
            continue;
        }
        let backend = drives::open_listed(spec, n, &mut image_disks)?;
        let config = BlkConfig {
            serial: d.serial.clone().unwrap_or_default(),
            ..BlkConfig::default()
        };
        slots.plug(
            &format!("virtio-blk{n}"),
            Box::new(Blk::new(backend, config)),
        )?;
        slots.name_boot_device(format!("disk{n}"), "scsi", "/disk@0,0");
    }
    let cables = nics::plug(spec, slots)?;
    if spec.console == ConsoleKind::Virtio {
        let port = PortConfig {
            name: String::new(),
            console: true,
            backend: console.port(),
        };
        slots.plug("virtio-console0", Box::new(VirtioConsole::new(vec![port])))?;
    }
    let rng = Rng::new().map_err(|e| host("entropy source")(e.into()))?;
    slots.plug("virtio-rng0", Box::new(rng))?;
    let mut balloon_control = None;
    if spec.balloon {
        let balloon = Balloon::new().map_err(|e| host("memory balloon")(e.into()))?;
        balloon_control = Some(balloon.control());
        slots.plug("virtio-balloon0", Box::new(balloon))?;
    }
    if let Some(path) = &spec.vsock {
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            base: path.clone(),
        };
        let vsock = Vsock::new(config)
            .map_err(|e| input("vsock", format!("cannot listen on {}: {e}", path.display())))?;
        slots.plug("virtio-vsock0", Box::new(vsock))?;
    }
    channels::plug(spec, slots)?;
    shares::plug(spec, slots)?;
    Ok(Plugged {
        balloon: balloon_control,
        image_disks,
        cables,
    })
}

/// The file for the output of a port, or nothing.
fn output(field: &str, path: Option<&Path>) -> Result<Box<dyn SerialBackend>, AssemblyError> {
    let Some(path) = path else {
        return Ok(Box::new(NoSerial));
    };
    let file =
        OutputFile::open(path).map_err(|e| input(field, format!("{}: {e}", path.display())))?;
    Ok(Box::new(file))
}

fn open_disk(disk: &DiskSpec) -> Result<Arc<dyn BlockBackend>, String> {
    let path = &disk.path;
    if disk.format == DiskFormat::Raw {
        let raw =
            RawDisk::open(path, disk.read_only).map_err(|e| format!("{}: {e}", path.display()))?;
        return Ok(Arc::new(raw));
    }
    let image = open(path, open_options(disk)).map_err(|e| e.to_string())?;
    let served = ImageDisk::new(image)
        .map_err(|e| format!("cannot start the threads of disk {}: {e}", path.display()))?;
    Ok(Arc::new(served))
}

/// How the image of a disk is opened.
pub(crate) fn open_options(disk: &DiskSpec) -> OpenOptions {
    OpenOptions {
        format: match disk.format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
            DiskFormat::Vmdk => Format::Vmdk,
            DiskFormat::Vdi => Format::Vdi,
            DiskFormat::Vhd => Format::Vhd,
            DiskFormat::Vhdx => Format::Vhdx,
        },
        read_only: disk.read_only,
        references: if disk.allow_backing {
            References::Follow
        } else {
            References::Refuse
        },
    }
}
