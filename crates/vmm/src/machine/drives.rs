//! Drives that are not virtio block devices: controllers, and the media of CD drives.

use std::path::Path;
use std::sync::Arc;

use pyrite_api::v1::{DiskBus, VmSpec};
use pyrite_devices::storage::ahci::{self, Ahci};
use pyrite_devices::storage::ata::{Device, Names};
use pyrite_devices::storage::ide::Ide;
use pyrite_devices::storage::nvme::{Nvme, NvmeNames};
use pyrite_disk::medium::Tray;
use pyrite_disk::raw::RawImage;
use pyrite_disk::scsi::{Identity, Kind, Unit};
use pyrite_disk::storage::HostFile;
use pyrite_disk::{BlockBackend, ImageDisk};
use pyrite_state::Inspect;
use pyrite_vdev::bus::lock;
use pyrite_vdev::{IrqLine, IrqSink};
use pyrite_virtio::{Scsi, ScsiConfig};

use super::disks::Disks;
use super::{AssemblyError, Machine, Slots, input};

/// LIMIT: request queues of a SCSI host.
const MAX_SCSI_QUEUES: u16 = 16;

fn open_medium(path: &Path) -> Result<Arc<dyn BlockBackend>, String> {
    let problem = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    crate::inputs::check_medium(path).map_err(|e| problem(&e))?;
    let file = HostFile::open(path, true).map_err(|e| problem(&e))?;
    let image = RawImage::padded(file).map_err(|e| problem(&e))?;
    let served = ImageDisk::new(Arc::new(image)).map_err(|e| problem(&e))?;
    Ok(Arc::new(served))
}

/// The serial number of a drive that was given none: its number among all of its kind.
pub(super) fn serial(given: Option<&str>, n: usize) -> String {
    given.map_or_else(|| format!("PY{n:08}"), str::to_owned)
}

/// The ATA drives on a bus: disks in their order, then CD drives.
fn ata_drives(
    spec: &VmSpec,
    bus: DiskBus,
    trays: &[Arc<Tray>],
    disks: &mut Disks,
) -> Result<Vec<Device>, AssemblyError> {
    let serial_link = bus == DiskBus::Ahci;
    let names = |model: &str, serial: String| Names {
        model: model.into(),
        serial,
        firmware: "1.0".into(),
    };
    let mut drives = Vec::new();
    for (n, d) in spec.disks.iter().enumerate().filter(|(_, d)| d.bus == bus) {
        let backend = disks.open(spec, n)?;
        let names = names("PYRITE HARDDISK", serial(d.serial.as_deref(), n));
        drives.push(Device::disk(backend, names, serial_link));
    }
    let cdroms = spec.cdroms.iter().zip(trays).enumerate();
    for (n, (_, tray)) in cdroms.filter(|(_, (c, _))| c.bus == bus) {
        let names = names("PYRITE DVD-ROM", serial(None, n));
        drives.push(Device::cd(Arc::clone(tray), names, serial_link));
    }
    Ok(drives)
}

/// Names for boot orders of the drives on a bus, in their order.
pub(super) fn boot_names(spec: &VmSpec, bus: DiskBus) -> Vec<String> {
    let disks = spec.disks.iter().enumerate().filter(|(_, d)| d.bus == bus);
    let cdroms = spec.cdroms.iter().enumerate().filter(|(_, c)| c.bus == bus);
    let disks = disks.map(|(n, _)| format!("disk{n}"));
    disks
        .chain(cdroms.map(|(n, _)| format!("cdrom{n}")))
        .collect()
}

/// Plugs the controllers that the drives of a specification need; the trays of its CD drives.
pub(super) fn plug(
    spec: &VmSpec,
    slots: &mut Slots<'_>,
    disks: &mut Disks,
) -> Result<Vec<Arc<Tray>>, AssemblyError> {
    let mut trays = Vec::new();
    for (n, c) in spec.cdroms.iter().enumerate() {
        let medium = c.path.as_deref().map(open_medium).transpose();
        trays.push(Tray::new(
            medium.map_err(|e| input(format!("cdroms[{n}].path"), e))?,
        ));
    }
    let mut names = boot_names(spec, DiskBus::Ahci).into_iter();
    let mut drives = ata_drives(spec, DiskBus::Ahci, &trays, disks)?
        .into_iter()
        .peekable();
    for n in 0.. {
        if drives.peek().is_none() {
            break;
        }
        let ports = drives.by_ref().take(ahci::PORTS).map(Some).collect();
        let (memory, msi) = (Arc::clone(slots.memory), Arc::clone(&slots.msi));
        slots.plug_function(|line| Ahci::new(&format!("ahci{n}"), ports, memory, msi, line))?;
        for (port, name) in names.by_ref().take(ahci::PORTS).enumerate() {
            let unit = format!("/drive@{port:x}/disk@0");
            slots.name_boot_device(name, "pci8086,2922", &unit);
        }
    }
    let mut drives = ata_drives(spec, DiskBus::Ide, &trays, disks)?.into_iter();
    if drives.len() > 0 {
        // Master and slave of the first channel, then of the second.
        let drives = [(); 2].map(|()| [(); 2].map(|()| drives.next()));
        let sink: Arc<dyn IrqSink> = slots.chipset.router.clone();
        let irq = [14, 15].map(|n| IrqLine::new(Arc::clone(&sink), n));
        let ide = Ide::new("ide0", drives, Arc::clone(slots.memory), irq)
            .map_err(|e| AssemblyError::Host(e.into()))?;
        lock(&ide)
            .register(&slots.chipset.io)
            .map_err(|e| AssemblyError::Host(e.into()))?;
        // It does not use its INTx line.
        slots.plug_function(|_| ide)?;
        for (n, name) in boot_names(spec, DiskBus::Ide).into_iter().enumerate() {
            let unit = format!("/drive@{:x}/disk@{:x}", n / 2, n % 2);
            slots.name_boot_device(name, "ide", &unit);
        }
    }
    plug_nvme(spec, slots, disks)?;
    plug_scsi(spec, slots, &trays, disks)?;
    Ok(trays)
}

/// An NVMe controller for each of its disks.
fn plug_nvme(spec: &VmSpec, slots: &mut Slots<'_>, disks: &mut Disks) -> Result<(), AssemblyError> {
    let all = spec.disks.iter().enumerate();
    let nvme = all.filter(|(_, d)| d.bus == DiskBus::Nvme);
    for (number, (n, d)) in nvme.enumerate() {
        let namespaces = vec![disks.open(spec, n)?];
        let names = NvmeNames {
            model: "PYRITE NVME".into(),
            serial: serial(d.serial.as_deref(), n),
            firmware: "1.0".into(),
        };
        let (memory, msi) = (Arc::clone(slots.memory), Arc::clone(&slots.msi));
        let unit = format!("nvme{number}");
        slots.plug_function(|line| Nvme::new(&unit, names, namespaces, memory, msi, line))?;
    }
    Ok(())
}

/// The SCSI units on a bus: disks in their order, then CD drives.
pub(super) fn scsi_units(
    spec: &VmSpec,
    bus: DiskBus,
    trays: &[Arc<Tray>],
    disks: &mut Disks,
) -> Result<Vec<Unit>, AssemblyError> {
    let identity = |product: &str, serial: String| Identity {
        vendor: "PYRITE".into(),
        product: product.into(),
        revision: "1.0".into(),
        serial,
    };
    let mut units = Vec::new();
    for (n, d) in spec.disks.iter().enumerate() {
        if d.bus == bus {
            let kind = Kind::Disk(disks.open(spec, n)?);
            let identity = identity("HARDDISK", serial(d.serial.as_deref(), n));
            units.push(Unit::new(kind, identity, false));
        }
    }
    for (n, (c, tray)) in spec.cdroms.iter().zip(trays).enumerate() {
        if c.bus == bus {
            let identity = identity("DVD-ROM", serial(None, n));
            units.push(Unit::new(Kind::Cd(Arc::clone(tray)), identity, false));
        }
    }
    Ok(units)
}

/// One SCSI host for all its disks and CD drives, with a request queue for each vCPU.
fn plug_scsi(
    spec: &VmSpec,
    slots: &mut Slots<'_>,
    trays: &[Arc<Tray>],
    disks: &mut Disks,
) -> Result<(), AssemblyError> {
    let units = scsi_units(spec, DiskBus::Scsi, trays, disks)?;
    if units.is_empty() {
        return Ok(());
    }
    let config = ScsiConfig {
        queues: u16::try_from(spec.cpus)
            .unwrap_or(u16::MAX)
            .min(MAX_SCSI_QUEUES),
        ..ScsiConfig::default()
    };
    slots.plug("virtio-scsi0", Box::new(Scsi::new(units, config)))
}

impl Machine {
    /// What a person may see of the trays of the CD drives.
    pub fn inspect_trays(&self) -> Inspect {
        let trays = self.trays.iter().enumerate().map(|(n, t)| {
            let node = Inspect::node([
                ("open", Inspect::Bool(t.is_open())),
                ("locked", Inspect::Bool(t.is_locked())),
                ("medium", Inspect::Bool(t.medium().is_some())),
            ]);
            (n.to_string(), node)
        });
        Inspect::Node(trays.collect())
    }

    /// Puts a medium into CD drive `drive`, or takes the one there is out. Fails, with what to do
    /// about it, if the guest has locked the tray, unless by `force`.
    pub fn change_medium(
        &self,
        drive: usize,
        path: Option<&Path>,
        force: bool,
    ) -> anyhow::Result<()> {
        let Some(tray) = self.trays.get(drive) else {
            anyhow::bail!(
                "this VM has no CD drive {drive}; it has {} (see --cdrom)",
                self.trays.len()
            );
        };
        match path {
            Some(p) => tray.insert(open_medium(p).map_err(anyhow::Error::msg)?, force)?,
            None => tray.remove(force)?,
        }
        Ok(())
    }
}
