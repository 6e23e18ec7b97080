//! The VGA of a machine.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pyrite_api::v1::{Listen, ScreenSpec, VgaKind, VmSpec};
use pyrite_devices::display::vga::{
    DISPI_PORTS_COUNT, DISPI_PORTS_START, MAX_ROM_BYTES, PORTS_COUNT, PORTS_START,
    VIDEO_MEMORY_BYTES, Vga, WINDOW_BYTES, WINDOW_START, find_font,
};
use pyrite_mem::{DeviceMemory, Layout};
use pyrite_vdev::{BarMemory, PciFunction};

use super::{AssemblyError, Slots, host, input};
use crate::display::Screen;
use crate::display::input::Input;
use crate::display::rfb::{self, Server};

/// Its slot, away from those that are filled in order.
const SLOT: u8 = 30;
/// Where distributions have the video BIOS.
const ROMS: [&str; 3] = [
    "/usr/share/seabios/vgabios-stdvga.bin",
    "/usr/share/qemu/vgabios-stdvga.bin",
    "/usr/share/qemu-kvm/vgabios-stdvga.bin",
];

/// The guest-physical space of a machine.
pub(crate) fn memory_layout(spec: &VmSpec) -> Layout {
    let mut layout = Layout {
        ram_bytes: spec.memory_bytes,
        ..Layout::default()
    };
    if spec.screen.vga == VgaKind::Std {
        layout.has_video_window = true;
        layout.device_bytes.push(VIDEO_MEMORY_BYTES);
    }
    layout
}

/// Says what is wrong with the video BIOS.
pub(crate) fn check_video_bios(screen: &ScreenSpec) -> Result<(), String> {
    video_bios(screen).map(|_| ())
}

/// Reads the video BIOS; says what is wrong with it otherwise.
fn video_bios(screen: &ScreenSpec) -> Result<Vec<u8>, String> {
    let path = match &screen.vga_rom {
        Some(path) => path.clone(),
        None => ROMS
            .iter()
            .map(PathBuf::from)
            .find(|p| p.is_file())
            .ok_or_else(|| {
                format!(
                    "no video BIOS at {}; install the package seabios, or name the file with \
                     rom=FILE",
                    ROMS.join(", ")
                )
            })?,
    };
    let rom = read_rom(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    find_font(&rom).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(rom)
}

fn read_rom(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut rom = Vec::new();
    // One byte more than allowed shows that there is more.
    std::fs::File::open(path)?
        .take(MAX_ROM_BYTES as u64 + 1)
        .read_to_end(&mut rom)?;
    Ok(rom)
}

/// Video memory, to be shown where its BAR decodes.
struct Placement(DeviceMemory);

impl BarMemory for Placement {
    fn place(&self, gpa: Option<u64>) {
        self.0.place(gpa);
    }
}

/// A screen with its device.
pub(super) type Plugged = Option<(Arc<Screen>, Arc<Mutex<Vga>>)>;

/// Plugs the VGA in, if there is to be one.
pub(super) fn plug(spec: &VmSpec, slots: &mut Slots<'_>) -> Result<Plugged, AssemblyError> {
    if spec.screen.vga == VgaKind::None {
        return Ok(None);
    }
    let rom = video_bios(&spec.screen).map_err(|e| input("screen.vga_rom", e))?;
    let memory = slots.memory.device_memory(0);
    let memory = memory.ok_or_else(|| host("video memory")(anyhow::anyhow!("is missing")))?;
    let placement = Arc::new(Placement(memory.clone()));
    let vga =
        Vga::new(memory, placement, &rom).map_err(|e| input("screen.vga_rom", e.to_string()))?;
    let vga = Arc::new(Mutex::new(vga));
    let full = |e: anyhow::Error| host("the VGA")(e);
    let c = slots.chipset;
    for (start, len, name) in [
        (PORTS_START, PORTS_COUNT, "vga"),
        (DISPI_PORTS_START, DISPI_PORTS_COUNT, "vga-dispi"),
    ] {
        c.io.insert(start.into(), len.into(), name, vga.clone())
            .map_err(|e| full(e.into()))?;
    }
    c.mmio
        .insert(WINDOW_START, WINDOW_BYTES, "vga-window", vga.clone())
        .map_err(|e| full(e.into()))?;
    let function: Arc<Mutex<dyn PciFunction>> = vga.clone();
    c.pci.plug(SLOT, 0, function).map_err(|e| full(e.into()))?;
    slots.units.push(vga.clone());
    let screen = Screen::new(vga.clone());
    Ok(Some((Arc::new(screen), vga)))
}

/// The VNC server, listening, if there is to be one.
pub(super) fn listen(
    spec: &VmSpec,
    screen: &Plugged,
    input_queue: &Input,
) -> Result<Option<Server>, AssemblyError> {
    let (Some(vnc), Some((screen, _))) = (&spec.screen.vnc, screen) else {
        return Ok(None);
    };
    let password = vnc.password_file.as_deref().map(rfb::read_password);
    let password = password
        .transpose()
        .map_err(|e| input("screen.vnc.password_file", e))?;
    let server = Server::listen(
        &vnc.listen,
        Arc::clone(screen),
        input_queue.clone(),
        "Pyrite",
        password.as_deref(),
    );
    let server = server.map_err(|e| {
        let at = match &vnc.listen {
            Listen::Unix(path) => path.display().to_string(),
            Listen::Tcp(address) => address.to_string(),
        };
        input("screen.vnc.listen", format!("cannot listen on {at}: {e}"))
    })?;
    server
        .serve()
        .map_err(|e| host("the VNC server")(e.into()))?;
    tracing::info!(address = server.address(), "VNC");
    Ok(Some(server))
}
