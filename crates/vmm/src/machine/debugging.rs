//! What a guest has to say that it crashed, and to be looked at then.

use std::sync::{Arc, Mutex};

use pyrite_api::v1::{PvpanicBus, VmSpec};
use pyrite_devices::pvpanic::{self, IsaPvpanic, PciPvpanic};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{MachineEvents, PciFunction};

use super::{AssemblyError, Slots, floppy_kinds};
use crate::boot::acpi::Extras;
use crate::dump;

/// The slot of a pvpanic function, away from those that are filled in order.
const SLOT: u8 = 28;

/// What the tables say of a specification beside its board.
pub(crate) fn acpi_extras(spec: &VmSpec) -> Extras {
    Extras {
        floppies: floppy_kinds(spec).unwrap_or_default(),
        has_pvpanic: (spec.pvpanic).is_some_and(|p| p.bus == PvpanicBus::Isa),
        has_fw_cfg: spec.vmcoreinfo,
    }
}

/// Adds a pvpanic device and the place for VMCOREINFO, if they are asked for.
pub(super) fn plug(
    spec: &VmSpec,
    slots: &mut Slots<'_>,
    events: &Arc<dyn MachineEvents>,
) -> Result<(), AssemblyError> {
    let events = Arc::clone(events);
    let chipset = slots.chipset;
    let failed = |e: anyhow::Error| AssemblyError::Host(e.context("the pvpanic device"));
    match spec.pvpanic.map(|p| p.bus) {
        None => {}
        Some(PvpanicBus::Isa) => {
            let device = Arc::new(Mutex::new(IsaPvpanic::new(events)));
            (chipset.io)
                .insert(pvpanic::PORT.into(), 1, "pvpanic", device.clone())
                .map_err(|e| failed(e.into()))?;
            lock(&chipset.fw_cfg)
                .add_file(pvpanic::PORT_FILE, pvpanic::PORT.to_le_bytes())
                .map_err(|e| failed(e.into()))?;
            slots.units.push(device);
        }
        Some(PvpanicBus::Pci) => {
            let device = Arc::new(Mutex::new(PciPvpanic::new(events)));
            let function: Arc<Mutex<dyn PciFunction>> = device.clone();
            (chipset.pci)
                .plug(SLOT, 0, function)
                .map_err(|e| failed(e.into()))?;
            slots.units.push(device);
        }
    }
    if spec.vmcoreinfo {
        lock(&chipset.fw_cfg)
            .add_writable_file(dump::VMCOREINFO_FILE, dump::VMCOREINFO_OFFER)
            .map_err(|e| AssemblyError::Host(e.into()))?;
    }
    Ok(())
}
