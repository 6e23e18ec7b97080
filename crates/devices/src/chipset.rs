//! All platform devices of board version 1, built and wired with one call.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use pyrite_mem::GuestMemory;
use pyrite_vdev::bus::{BusOverlap, lock};
use pyrite_vdev::pci::DoorbellSink;
use pyrite_vdev::{
    Bus, IntrSink, IrqLine, IrqSink, Lifecycle, MachineEvents, MmioDevice, MsiSink, PciFunction,
    PioDevice, VmClock,
};

use crate::acpi_pm::{self, AcpiPm};
use crate::debug_ports::{DEBUG_EXIT, DEBUGCON, DebugPorts, POST};
use crate::flash::Flash;
use crate::fw_cfg::{self, FwCfg};
use crate::hpet::{Hpet, HpetLines};
use crate::i8042::{self, I8042};
use crate::irq::pirq::PirqRouter;
use crate::irq::{InterruptRouter, IoApic, IoApicDevice, Pic, PicDevice, SharedLines};
use crate::lpc::{self, Lpc};
use crate::pci_host::{
    self, ConfigPorts, Ecam, IoWindow, MemoryWindow, PciHost, PciHostUnit, SlotError, Windows,
};
use crate::pit::Pit;
use crate::reset_ports::{PORT92, RST_CNT, ResetPorts};
use crate::rtc::Rtc;
use crate::uart::{SerialBackend, Uart};

/// IO-APIC registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// HPET registers.
pub const HPET_START: u64 = 0xfed0_0000;

/// What the chipset is built from.
pub struct ChipsetConfig {
    /// Guest RAM: its size is told in CMOS, fw_cfg reaches it by DMA.
    pub memory: Arc<GuestMemory>,
    /// The machine's clock.
    pub clock: Arc<VmClock>,
    /// Where the IO-APIC, HPET and PCI functions send messages.
    pub msi: Arc<dyn MsiSink>,
    /// Where the PIC's INTR goes.
    pub intr: Arc<dyn IntrSink>,
    /// Who hears of power-off, reset, sleep and debug exit.
    pub events: Arc<dyn MachineEvents>,
    /// Host time of day in Unix seconds.
    pub wall_clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Number of vCPUs; the IO-APIC's id follows theirs.
    pub vcpus: u32,
    /// Output of COM1 and COM2.
    pub serial: [Box<dyn SerialBackend>; 2],
    /// Output of the debug console.
    pub debugcon: Box<dyn SerialBackend>,
    /// Wires doorbells of PCI functions into the engine.
    pub doorbells: Option<Arc<dyn DoorbellSink>>,
    /// What a machine that starts with firmware has instead of the plain root complex.
    pub firmware: Option<FirmwareBoard>,
}

/// The parts of a board that firmware knows: a Q35 host bridge, an ICH9 LPC bridge, and flash.
pub struct FirmwareBoard {
    /// Where functions may decode; configuration space may be put in the 32-bit window.
    pub windows: Windows,
    /// Flash for variables, and its address.
    pub flash: Option<(u64, Flash)>,
}

/// The platform devices, and handles to those that the machine talks to.
pub struct Chipset {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Port bus with all devices on it.
    pub io: Arc<Bus<dyn PioDevice>>,
    /// Memory bus with all devices on it.
    pub mmio: Arc<Bus<dyn MmioDevice>>,
    /// `CpuIo::ack_pic` → [`Pic::ack`].
    pub pic: Arc<Pic>,
    /// `CpuIo::eoi` → [`IoApic::eoi`].
    pub ioapic: Arc<IoApic>,
    /// GSI 0-23.
    pub router: Arc<InterruptRouter>,
    /// Lines that several devices drive (GSI 16-23).
    pub shared_lines: Arc<SharedLines>,
    /// PCI: plug functions in here, then call `assign_bars` for a direct boot.
    pub pci: Arc<PciHost>,
    /// Power button, general-purpose events, wake-up.
    pub pm: Arc<Mutex<AcpiPm>>,
    /// Time of day and CMOS.
    pub rtc: Arc<Mutex<Rtc>>,
    /// Timer chip.
    pub pit: Arc<Mutex<Pit>>,
    /// High precision timers.
    pub hpet: Arc<Mutex<Hpet>>,
    /// Keyboard and mouse.
    pub i8042: Arc<Mutex<I8042>>,
    /// Files for firmware.
    pub fw_cfg: Arc<Mutex<FwCfg>>,
    /// COM1 and COM2.
    pub uarts: [Arc<Mutex<Uart>>; 2],
    /// Every unit, in the order of restore. The clock must be set before units are restored, and
    /// PCI functions plugged in later must come before the last unit (`pci-host`).
    pub units: Vec<Arc<Mutex<dyn Lifecycle>>>,
}

/// Puts the root complex on the buses.
pub fn register_pci(
    host: &Arc<PciHost>,
    mmio: &Bus<dyn MmioDevice>,
    io: &Bus<dyn PioDevice>,
) -> Result<(), BusOverlap> {
    let ports = Arc::new(ConfigPorts(Arc::clone(host)));
    io.insert_decoder(0xcf8, 1, "pci-config-address", ports.clone())?;
    io.insert_decoder(0xcfc, 4, "pci-config-data", ports)?;
    let windows = host.windows();
    let window = Arc::new(IoWindow(Arc::clone(host)));
    io.insert_decoder(windows.io.0, windows.io.1, "pci-io", window)?;
    let window = Arc::new(MemoryWindow(Arc::clone(host)));
    let (start, len) = windows.mem32;
    mmio.insert_decoder(start, len, "pci-memory-32", window.clone())?;
    let (start, len) = windows.mem64;
    mmio.insert_decoder(start, len, "pci-memory-64", window)?;
    if windows == pci_host::BOARD_1 {
        let ecam = Arc::new(Ecam(Arc::clone(host)));
        mmio.insert_decoder(pci_host::ECAM_START, pci_host::ECAM_BYTES, "pci-ecam", ecam)?;
    }
    Ok(())
}

/// Debug and reset ports.
fn add_simple_ports(
    io: &Bus<dyn PioDevice>,
    units: &mut Vec<Arc<Mutex<dyn Lifecycle>>>,
    debugcon: Box<dyn SerialBackend>,
    events: &Arc<dyn MachineEvents>,
) -> Result<(), BusOverlap> {
    let debug = DebugPorts::new(debugcon, Arc::clone(events));
    let debug = Arc::new(Mutex::new(debug));
    for (port, name) in [
        (DEBUG_EXIT, "debug-exit"),
        (DEBUGCON, "debugcon"),
        (POST, "post"),
    ] {
        io.insert(
            port.into(),
            if port == DEBUG_EXIT { 4 } else { 1 },
            name,
            debug.clone(),
        )?;
    }
    units.push(debug);
    let reset = Arc::new(Mutex::new(ResetPorts::new(Arc::clone(events))));
    io.insert(RST_CNT.into(), 1, "reset-control", reset.clone())?;
    io.insert(PORT92.into(), 1, "port92", reset.clone())?;
    units.push(reset);
    Ok(())
}

impl Chipset {
    /// Builds the devices and puts them on their buses. All are in their power-on state.
    pub fn build(config: ChipsetConfig) -> Result<Chipset, BusOverlap> {
        let io: Arc<Bus<dyn PioDevice>> = Arc::default();
        let mmio: Arc<Bus<dyn MmioDevice>> = Arc::default();
        let mut units: Vec<Arc<Mutex<dyn Lifecycle>>> = Vec::new();

        let pic = Pic::new(config.intr);
        let ioapic = IoApic::new(config.vcpus as u8, Arc::clone(&config.msi));
        let router = Arc::new(InterruptRouter::new(Arc::clone(&pic), Arc::clone(&ioapic)));
        let pirqs = config
            .firmware
            .as_ref()
            .map(|_| PirqRouter::new(Arc::clone(&router), Arc::clone(&pic)));
        let sink: Arc<dyn IrqSink> = match &pirqs {
            Some(p) => p.clone(),
            None => router.clone(),
        };
        let line = |gsi| IrqLine::new(Arc::clone(&sink), gsi);
        let shared_lines = SharedLines::new(Arc::clone(&sink));

        let ports = Arc::new(Mutex::new(PicDevice::new(Arc::clone(&pic))));
        for (start, name) in [(0x20, "pic-master"), (0xa0, "pic-slave"), (0x4d0, "elcr")] {
            io.insert(start, 2, name, ports.clone())?;
        }
        units.push(ports);
        let device = Arc::new(Mutex::new(IoApicDevice::new(Arc::clone(&ioapic))));
        mmio.insert(IOAPIC_START, 0x1000, "ioapic", device.clone())?;
        units.push(device);

        let legacy_replaced: Arc<AtomicBool> = Arc::default();
        let pit = Pit::new(&config.clock, line(0), Arc::clone(&legacy_replaced));
        io.insert(0x40, 4, "pit", pit.clone())?;
        io.insert(0x61, 1, "port61", pit.clone())?;
        units.push(pit.clone());
        let route = |gsi| {
            // The HPET is the first to ask for a driver; a line always has room for it.
            shared_lines.line(gsi).unwrap_or_else(|| line(gsi))
        };
        let lines = HpetLines {
            irq0: line(0),
            irq8: line(8),
            routes: [route(20), route(21), route(22), route(23)],
        };
        let replaced = Arc::clone(&legacy_replaced);
        let hpet = Hpet::new(&config.clock, lines, Arc::clone(&config.msi), replaced);
        mmio.insert(HPET_START, 0x400, "hpet", hpet.clone())?;
        units.push(hpet.clone());
        let low = config.memory.low_ram_end();
        let ram = [low, config.memory.size_bytes() - low];
        let rtc = Rtc::new(
            &config.clock,
            config.wall_clock,
            line(8),
            legacy_replaced,
            ram,
        );
        io.insert(0x70, 4, "rtc", rtc.clone())?;
        units.push(rtc.clone());
        let pm = AcpiPm::new(&config.clock, line(9), Arc::clone(&config.events));
        io.insert(acpi_pm::PM1A_EVT.into(), 6, "acpi-pm1", pm.clone())?;
        io.insert(acpi_pm::PM_TMR.into(), 4, "acpi-pm-timer", pm.clone())?;
        io.insert(acpi_pm::GPE0.into(), 8, "acpi-gpe0", pm.clone())?;
        units.push(pm.clone());

        let [com1, com2] = config.serial;
        let uart = |unit: &str, base: u16, gsi, backend| {
            let uart = Arc::new(Mutex::new(Uart::new(unit, base, line(gsi), backend)));
            io.insert(base.into(), 8, unit, uart.clone()).map(|()| uart)
        };
        let uarts = [
            uart("uart0", 0x3f8, 4, com1)?,
            uart("uart1", 0x2f8, 3, com2)?,
        ];
        for u in &uarts {
            units.push(u.clone());
        }

        add_simple_ports(&io, &mut units, config.debugcon, &config.events)?;

        let keyboard = I8042::new(line(1), line(12), Arc::clone(&config.events));
        let i8042 = Arc::new(Mutex::new(keyboard));
        io.insert(i8042::DATA.into(), 1, "i8042-data", i8042.clone())?;
        io.insert(i8042::COMMAND.into(), 1, "i8042-command", i8042.clone())?;
        units.push(i8042.clone());
        let fw_cfg = Arc::new(Mutex::new(FwCfg::new(Arc::clone(&config.memory))));
        io.insert(fw_cfg::SELECTOR.into(), 2, "fw-cfg", fw_cfg.clone())?;
        io.insert(fw_cfg::DMA.into(), 8, "fw-cfg-dma", fw_cfg.clone())?;
        units.push(fw_cfg.clone());

        let lines = Arc::clone(&shared_lines);
        let mut bridge = None;
        let pci = match config.firmware {
            None => PciHost::new(lines, config.doorbells),
            Some(board) => {
                let memory = Arc::clone(&config.memory);
                if let Some((at, flash)) = board.flash {
                    let len = flash.size_bytes();
                    let flash = Arc::new(Mutex::new(flash));
                    mmio.insert(at, len, "flash", flash.clone())?;
                    units.push(flash);
                }
                if let Some(pirqs) = pirqs {
                    let lpc = Arc::new(Mutex::new(Lpc::new(pirqs)));
                    io.insert(lpc::SMI_PORT.into(), 8, "smi", lpc.clone())?;
                    units.push(lpc.clone());
                    bridge = Some(lpc);
                }
                PciHost::q35(memory, board.windows, lines, config.doorbells)
            }
        };
        register_pci(&pci, &mmio, &io)?;
        if let Some(lpc) = bridge {
            // The slot is free: nothing was plugged in yet.
            let _ = pci.plug(lpc::SLOT, 0, lpc);
        }
        units.push(Arc::new(Mutex::new(PciHostUnit::new(Arc::clone(&pci)))));
        Ok(Chipset {
            memory: config.memory,
            io,
            mmio,
            pic,
            ioapic,
            router,
            shared_lines,
            pci,
            pm,
            rtc,
            pit,
            hpet,
            i8042,
            fw_cfg,
            uarts,
            units,
        })
    }

    /// Plugs a PCI function in and lists it among the units, before the root complex.
    pub fn plug<T: PciFunction + Lifecycle + 'static>(
        &mut self,
        slot: u8,
        function: u8,
        device: Arc<Mutex<T>>,
    ) -> Result<(), SlotError> {
        self.pci.plug(slot, function, device.clone())?;
        let root_complex = self.units.len().saturating_sub(1);
        self.units.insert(root_complex, device);
        Ok(())
    }

    /// Resets every unit, in order.
    pub fn reset(&self) {
        for u in &self.units {
            lock(u).reset();
        }
    }
}
