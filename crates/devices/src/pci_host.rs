//! The root complex: configuration access, decoding of BARs, INTx routing, BAR assignment.
//!
//! Configuration mechanism 1: PCI Local Bus Specification 3.0 §3.2.2.3.2. ECAM: PCI Express Base
//! Specification 3.0 §7.2.2.
//!
//! BAR accesses look up an immutable table behind an atomic swap and lock only the function that
//! they hit. The table is rebuilt when a configuration write moved something.

mod config_access;
mod decode;
mod q35;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
pub use config_access::{ConfigPorts, Ecam};
pub use decode::{BarSpaceError, IoWindow, MemoryWindow};
use decode::{DecodeTable, Function};
use minicbor::{Decode, Encode};
use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{ConfigSaved, ConfigSpace, DoorbellAt, DoorbellSink, PciIds};
use pyrite_vdev::{BarKind, IrqLine, Lifecycle, PciFunction};
pub use q35::ECAM_BYTES as Q35_ECAM_BYTES;

use crate::irq::SharedLines;

const KIND: &str = "pci-host";
const VERSION: u16 = 1;

/// First address of the window for 32-bit memory BARs.
pub const WINDOW32_START: u64 = 0xc000_0000;
/// Bytes of the 32-bit window.
pub const WINDOW32_BYTES: u64 = 0x2000_0000;
/// First address of the window for 64-bit memory BARs.
pub const WINDOW64_START: u64 = 0x80_0000_0000;
/// Bytes of the 64-bit window.
pub const WINDOW64_BYTES: u64 = 512 << 30;
/// First port of the window for I/O BARs.
pub const WINDOW_IO_START: u64 = 0xc000;
/// Ports of the I/O window.
pub const WINDOW_IO_BYTES: u64 = 0x4000;
/// First address of ECAM.
pub const ECAM_START: u64 = 0xe000_0000;
/// Bytes of ECAM: 256 buses.
pub const ECAM_BYTES: u64 = 256 << 20;

/// Where functions may decode: first address and length of each window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// For 32-bit memory BARs, and 64-bit ones that are put there.
    pub mem32: (u64, u64),
    /// For 64-bit memory BARs.
    pub mem64: (u64, u64),
    /// For I/O BARs.
    pub io: (u64, u64),
}

/// The windows of board version 1.
pub const BOARD_1: Windows = Windows {
    mem32: (WINDOW32_START, WINDOW32_BYTES),
    mem64: (WINDOW64_START, WINDOW64_BYTES),
    io: (WINDOW_IO_START, WINDOW_IO_BYTES),
};

/// The GSI of an interrupt pin (0 = INTA) of a slot.
pub fn intx_gsi(slot: u8, pin: u8) -> u32 {
    16 + (u32::from(slot) + u32::from(pin)) % 8
}

/// A function could not be plugged in.
#[derive(Debug, thiserror::Error)]
#[error("PCI slot 00:{:02x}.{} {reason}", devfn >> 3, devfn & 7)]
pub struct SlotError {
    devfn: u8,
    reason: &'static str,
}

/// What configuration writes change. Locked before any function, so that functions' registers and
/// the decode table stay in step.
struct Plugged {
    functions: BTreeMap<u8, Function>,
    /// CONFIG_ADDRESS.
    address: u32,
}

/// The root complex of the machine: PCI segment 0, bus 0.
pub struct PciHost {
    // LOCK ORDER: this < function < interrupt controllers. Not taken for BAR accesses.
    plugged: Mutex<Plugged>,
    memory: ArcSwap<DecodeTable>,
    io: ArcSwap<DecodeTable>,
    lines: Arc<SharedLines>,
    doorbells: Option<Arc<dyn DoorbellSink>>,
    bridge: Arc<Mutex<HostBridge>>,
    windows: Windows,
    /// Where configuration space is; 0 = nowhere.
    ecam: Arc<AtomicU64>,
}

impl PciHost {
    /// A root complex with only its host bridge, 00.0, as board version 1 has it.
    pub fn new(lines: Arc<SharedLines>, doorbells: Option<Arc<dyn DoorbellSink>>) -> Arc<PciHost> {
        let bridge = HostBridge {
            config: ConfigSpace::new(BRIDGE_IDS),
            q35: None,
        };
        let ecam = Arc::new(AtomicU64::new(ECAM_START));
        PciHost::build(bridge, BOARD_1, ecam, lines, doorbells)
    }

    /// A root complex with only its host bridge, 00.0, which firmware knows, and which decides what
    /// of `memory` is seen below 1 MiB. `windows` may overlap configuration space, which wins.
    pub fn q35(
        memory: Arc<GuestMemory>,
        windows: Windows,
        lines: Arc<SharedLines>,
        doorbells: Option<Arc<dyn DoorbellSink>>,
    ) -> Arc<PciHost> {
        let ecam: Arc<AtomicU64> = Arc::default();
        let q35 = q35::Q35 {
            memory,
            ecam: Arc::clone(&ecam),
        };
        let bridge = HostBridge {
            config: q35::Q35::config(),
            q35: Some(q35),
        };
        PciHost::build(bridge, windows, ecam, lines, doorbells)
    }

    fn build(
        bridge: HostBridge,
        windows: Windows,
        ecam: Arc<AtomicU64>,
        lines: Arc<SharedLines>,
        doorbells: Option<Arc<dyn DoorbellSink>>,
    ) -> Arc<PciHost> {
        let bridge = Arc::new(Mutex::new(bridge));
        let function: Arc<Mutex<dyn PciFunction>> = bridge.clone();
        let functions = BTreeMap::from([(0, Function::new(function))]);
        Arc::new(PciHost {
            plugged: Mutex::new(Plugged {
                functions,
                address: 0,
            }),
            memory: ArcSwap::default(),
            io: ArcSwap::default(),
            lines,
            doorbells,
            bridge,
            windows,
            ecam,
        })
    }

    /// Where configuration space begins in memory, if it is there: for tables.
    pub fn ecam(&self) -> EcamBase {
        EcamBase(Arc::clone(&self.ecam))
    }

    /// The windows of functions.
    pub fn windows(&self) -> Windows {
        self.windows
    }

    /// The line of pin `pin` (0 = INTA) of `slot`, for the function's `ConfigSpace::set_intx`.
    pub fn intx_line(&self, slot: u8, pin: u8) -> Result<IrqLine, SlotError> {
        let reason = "has too many interrupt pins on one line";
        self.lines.line(intx_gsi(slot, pin)).ok_or(SlotError {
            devfn: slot << 3,
            reason,
        })
    }

    /// Plugs a function in at `slot` (0-31), `function` (0-7), before the machine starts.
    pub fn plug(
        &self,
        slot: u8,
        function: u8,
        device: Arc<Mutex<dyn PciFunction>>,
    ) -> Result<(), SlotError> {
        let devfn = slot << 3 | function & 7;
        if slot > 31 || function > 7 {
            return Err(SlotError {
                devfn,
                reason: "does not exist",
            });
        }
        let mut p = lock(&self.plugged);
        if p.functions.contains_key(&devfn) {
            return Err(SlotError {
                devfn,
                reason: "is taken",
            });
        }
        p.functions.insert(devfn, Function::new(device));
        self.rebuild(&mut p);
        Ok(())
    }

    /// Asks every function where it decodes. Needed after functions were reset or restored.
    pub fn refresh(&self) {
        let mut p = lock(&self.plugged);
        for f in p.functions.values_mut() {
            f.query();
        }
        self.rebuild(&mut p);
    }

    /// Gives every BAR an address, enables decoding and fills in the interrupt lines, as firmware
    /// would do. For machines that boot a kernel directly.
    pub fn assign_bars(&self) -> Result<(), BarSpaceError> {
        let mut p = lock(&self.plugged);
        let result = decode::assign(&p.functions);
        for f in p.functions.values_mut() {
            f.query();
        }
        self.rebuild(&mut p);
        result
    }

    fn rebuild(&self, p: &mut Plugged) {
        let memory = DecodeTable::build(&p.functions, &self.windows, |k| k != BarKind::Io);
        let io = DecodeTable::build(&p.functions, &self.windows, |k| k == BarKind::Io);
        // First everything is taken away, so that no two memories are ever at one address.
        let nothing = DecodeTable::default();
        for (devfn, f) in &mut p.functions {
            if f.memories_move(&memory, *devfn) {
                f.place_memories(&nothing, *devfn);
            }
        }
        for (devfn, f) in &mut p.functions {
            f.place_memories(&memory, *devfn);
        }
        if let Some(sink) = &self.doorbells {
            for (devfn, f) in &mut p.functions {
                let now = f.doorbells_in(&memory, *devfn);
                if now != f.doorbells {
                    sink.replace(*devfn, &now);
                    f.doorbells = now;
                }
            }
        }
        self.memory.store(Arc::new(memory));
        self.io.store(Arc::new(io));
    }

    /// Reads configuration space; all ones where there is no function.
    fn config_read(&self, bus: u8, devfn: u8, offset: u16) -> u32 {
        let (device, many) = {
            let p = lock(&self.plugged);
            match p.functions.get(&devfn).filter(|_| bus == 0) {
                Some(f) => {
                    let slot = devfn & !7;
                    (
                        Arc::clone(&f.device),
                        p.functions.range(slot | 1..=slot | 7).next().is_some(),
                    )
                }
                None => return u32::MAX,
            }
        };
        let v = lock(&device).config_read(offset & 0xffc);
        // Header Type bit 7: the slot has more than one function.
        if many && offset & 0xffc == 0x0c {
            v | 0x0080_0000
        } else {
            v
        }
    }

    /// Writes 1 to 4 bytes inside one double word of configuration space.
    fn config_write(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        let mut p = lock(&self.plugged);
        if bus != 0 {
            return;
        }
        if let Some(f) = p.functions.get_mut(&devfn) {
            // Three bytes are no width that a function has to know.
            let (first, rest) = if data.len() == 3 {
                data.split_at(1)
            } else {
                (data, &[][..])
            };
            let moved = {
                let mut device = lock(&f.device);
                device.config_write(offset, first);
                if !rest.is_empty() {
                    device.config_write(offset + 1, rest);
                }
                drop(device);
                f.query()
            };
            if moved {
                self.rebuild(&mut p);
            }
        }
    }
}

/// Vendor and device of the host bridge.
const BRIDGE_IDS: PciIds = PciIds {
    vendor_id: 0x1b36,
    device_id: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor_id: 0x1b36,
    subsystem_id: 0x0008,
};

/// Where PCI Express configuration space begins, at any time.
#[derive(Clone)]
pub struct EcamBase(Arc<AtomicU64>);

impl EcamBase {
    /// The address; `None` while it is not decoded.
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|a| *a != 0)
    }
}

/// Function 00.0. That of board version 1 has only its header.
struct HostBridge {
    config: ConfigSpace,
    q35: Option<q35::Q35>,
}

impl HostBridge {
    fn apply(&self) {
        if let Some(q) = &self.q35 {
            q.apply(&self.config);
        }
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.apply();
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, _index: u8, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&mut self, _index: u8, _offset: u64, _data: &[u8]) {}
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    address: u32,
    #[n(1)]
    bridge: ConfigSaved,
}

/// The root complex in the machine's life. Functions are units of their own; this unit comes after
/// them, because it asks them where they decode.
pub struct PciHostUnit {
    host: Arc<PciHost>,
}

impl PciHostUnit {
    /// The unit of `host`.
    pub fn new(host: Arc<PciHost>) -> PciHostUnit {
        PciHostUnit { host }
    }
}

impl Lifecycle for PciHostUnit {
    fn unit(&self) -> &str {
        "pci-host"
    }
    fn start(&mut self) {
        // Functions may have been reset or restored after this unit was.
        self.host.refresh();
    }
    fn pause(&mut self) {}
    fn drained(&mut self) -> bool {
        true
    }
    fn reset(&mut self) {
        lock(&self.host.plugged).address = 0;
        {
            let mut bridge = lock(&self.host.bridge);
            bridge.config.reset();
            bridge.apply();
        }
        self.host.refresh();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let PciHostUnit { host } = self;
        let PciHost {
            plugged,
            memory: _,
            io: _,
            lines: _,
            doorbells: _,
            bridge,
            windows: _,
            ecam: _,
        } = &**host;
        let address = lock(plugged).address;
        let HostBridge { config, q35: _ } = &*lock(bridge);
        Ok(Section::new(
            "pci-host",
            KIND,
            VERSION,
            &Saved {
                address,
                bridge: config.save(),
            },
        ))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let Saved { address, bridge } = section.decode(KIND, VERSION)?;
        {
            let mut here = lock(&self.host.bridge);
            let restored = here.config.restore(&bridge);
            restored.map_err(|detail| StateError::Invalid {
                unit: "pci-host".into(),
                detail,
            })?;
            here.apply();
        }
        lock(&self.host.plugged).address = address;
        self.host.refresh();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let p = lock(&self.host.plugged);
        let functions = p.functions.iter().map(|(devfn, f)| {
            let name = format!("{:02x}.{}", devfn >> 3, devfn & 7);
            let bars = f
                .addresses()
                .map(|(n, at)| (format!("bar{n}"), Inspect::Hex(at)));
            (name, Inspect::Node(bars.collect()))
        });
        Inspect::Node(functions.collect())
    }
}

/// Doorbells told to the sink, kept to tell only changes.
type ToldDoorbells = Vec<DoorbellAt>;
