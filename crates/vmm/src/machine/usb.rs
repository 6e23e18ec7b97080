//! The USB controller with its devices, if there are any.

use std::sync::{Arc, Mutex};

use pyrite_api::v1::{DiskBus, VmSpec};
use pyrite_devices::usb::device::UsbDevice;
use pyrite_devices::usb::hid::keyboard::Keyboard;
use pyrite_devices::usb::hid::tablet::Tablet;
use pyrite_devices::usb::storage::Storage;
use pyrite_devices::usb::xhci::Xhci;
use pyrite_disk::medium::Tray;

use super::disks::Disks;
use super::{AssemblyError, Slots, drives};

/// Plugs the controller: ports of USB 3 have the drives in their order, those of USB 2 keyboard and
/// tablet.
pub(super) fn plug(
    spec: &VmSpec,
    slots: &mut Slots<'_>,
    trays: &[Arc<Tray>],
    disks: &mut Disks,
) -> Result<Option<Arc<Mutex<Xhci>>>, AssemblyError> {
    let mut devices: Vec<Box<dyn UsbDevice>> = Vec::new();
    if spec.usb.keyboard {
        devices.push(Box::new(Keyboard::new()));
    }
    if spec.usb.tablet {
        devices.push(Box::new(Tablet::new()));
    }
    for unit in drives::scsi_units(spec, DiskBus::Usb, trays, disks)? {
        devices.push(Box::new(Storage::new(unit)));
    }
    if devices.is_empty() {
        return Ok(None);
    }
    let (memory, clock) = (Arc::clone(slots.memory), Arc::clone(slots.clock));
    let msi = Arc::clone(&slots.msi);
    let mut kept = None;
    slots.plug_function(|line| {
        let xhci = Xhci::new("xhci0", devices, memory, &clock, msi, line);
        kept = Some(Arc::clone(&xhci));
        xhci
    })?;
    // Firmware counts the ports of each generation from 1.
    for (n, name) in drives::boot_names(spec, DiskBus::Usb)
        .into_iter()
        .enumerate()
    {
        let unit = format!("/storage@{:x}/channel@0/disk@0,0", n + 1);
        slots.name_boot_device(name, "usb", &unit);
    }
    Ok(kept)
}
