//! virtio over PCI, modern interface only. virtio 1.3 §4.1.
//!
//! ```text
//! BAR 0 (64-bit memory, 32 KiB)          status machine (§3.1)
//!   0000 common configuration              0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK
//!   1000 ISR status                        ▲                                  │
//!   2000 device configuration              └── write 0: reset ── NEEDS_RESET ◄┘ driver's error
//!   3000 notifications, 4 bytes a queue
//!   4000 MSI-X table, 6000 pending bits
//! ```
//!
//! A reset while requests are in flight takes effect at once for the queues (what completes later
//! comes to nothing), but the status register reads 0 only when no request can touch memory any
//! more; §4.1.4.3.2 makes the driver wait for that.

use std::sync::{Arc, Mutex};

use pyrite_mem::GuestMemory;
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::bus::lock;
use pyrite_vdev::pci::{ConfigSpace, MsixLayout, PciIds, PciInterrupts, cap};
use pyrite_vdev::{BarKind, Dma, IrqLine, Lifecycle, MsiSink, PciFunction};

use crate::device::{VirtioDevice, read_config};
use crate::link::{DriverLink, Signal};
use crate::spec::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
    VIRTIO_MSI_NO_VECTOR, VIRTIO_PCI_DEVICE_BASE, VIRTIO_PCI_VENDOR,
};

mod common;
mod state;
#[cfg(test)]
mod tests;

/// Everything is in this BAR.
const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const COMMON_AT: u64 = 0;
const COMMON_BYTES: u32 = 64;
const ISR_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x2000;
const REGION_BYTES: u64 = 0x1000;
const NOTIFY_AT: u64 = 0x3000;
/// notify_off_multiplier: a doubleword for each queue.
const NOTIFY_STEP: u64 = 4;
const MSIX_TABLE_AT: u32 = 0x4000;
const MSIX_PBA_AT: u32 = 0x6000;
/// LIMIT: the table (16 bytes a vector) ends before the pending bits.
const MAX_VECTORS: usize = 512;

/// Capability types, virtio 1.3 §4.1.4.
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;

/// ISR status, virtio 1.3 §4.1.4.5: used buffers.
const ISR_QUEUE: u8 = 1;
/// Configuration change.
const ISR_CONFIG: u8 = 2;

struct Vectors {
    isr: u8,
    config: u16,
    queues: Vec<u16>,
}

/// Interrupts of the function.
struct PciSignal {
    interrupts: PciInterrupts,
    // LOCK ORDER: queue < this < PciInterrupts. Held while INTx is driven, so that a rise and the
    // fall by an ISR read cannot swap.
    vectors: Mutex<Vectors>,
}

impl PciSignal {
    fn raise(&self, vector: impl FnOnce(&Vectors) -> u16, isr: u8) {
        let mut v = lock(&self.vectors);
        if self.interrupts.msix_enabled() {
            let vector = vector(&v);
            drop(v);
            if vector != VIRTIO_MSI_NO_VECTOR {
                self.interrupts.signal(vector);
            }
        } else {
            v.isr |= isr;
            self.interrupts.set_intx(true);
        }
    }

    /// Reading the register acknowledges the interrupt.
    fn take_isr(&self) -> u8 {
        let mut v = lock(&self.vectors);
        self.interrupts.set_intx(false);
        std::mem::take(&mut v.isr)
    }

    fn reset(&self) {
        let mut v = lock(&self.vectors);
        v.isr = 0;
        v.config = VIRTIO_MSI_NO_VECTOR;
        v.queues.fill(VIRTIO_MSI_NO_VECTOR);
        self.interrupts.set_intx(false);
    }
}

impl Signal for PciSignal {
    fn queue(&self, index: u16) {
        let vector = |v: &Vectors| {
            v.queues
                .get(usize::from(index))
                .copied()
                .unwrap_or(VIRTIO_MSI_NO_VECTOR)
        };
        self.raise(vector, ISR_QUEUE);
    }
    fn config(&self) {
        self.raise(|v| v.config, ISR_CONFIG);
    }
}

/// A virtio device as a PCI function and a unit of the machine.
pub struct VirtioPciDevice {
    unit: String,
    device: Box<dyn VirtioDevice>,
    link: Arc<DriverLink>,
    memory: Arc<GuestMemory>,
    config: ConfigSpace,
    signal: Arc<PciSignal>,
    /// Offset of the PCI configuration access capability.
    pci_cfg: u16,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    /// What the status register reads while a reset waits for requests in flight.
    resetting: Option<u8>,
    /// Packed rings are offered.
    packed: bool,
}

fn region(kind: u8, at: u64, len: u32, extra: &[u8]) -> Vec<u8> {
    // struct virtio_pci_cap after cap_vndr and cap_next.
    let mut b = vec![(16 + extra.len()) as u8, kind, BAR, 0, 0, 0];
    b.extend_from_slice(&(at as u32).to_le_bytes());
    b.extend_from_slice(&len.to_le_bytes());
    b.extend_from_slice(extra);
    b
}

impl VirtioPciDevice {
    /// Puts `device` behind a PCI function. `intx` is the line of its INTA pin.
    pub fn new(
        unit: &str,
        mut device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        msi: Arc<dyn MsiSink>,
        intx: IrqLine,
    ) -> Arc<Mutex<VirtioPciDevice>> {
        let sizes = device.queue_sizes();
        let id = VIRTIO_PCI_DEVICE_BASE + device.device_type();
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: VIRTIO_PCI_VENDOR,
            device_id: id,
            // virtio 1.3 §4.1.2.1: "The device MUST have a PCI Revision ID of 1 or higher".
            revision: 1,
            class: device.class_code(),
            subsystem_vendor_id: VIRTIO_PCI_VENDOR,
            // virtio 1.3 §4.1.2.1: 0x40 or higher.
            subsystem_id: id,
        });
        config.add_bar(BAR, BarKind::Mem64, BAR_BYTES);
        let vectors = (sizes.len() + 1).min(MAX_VECTORS) as u16;
        let layout = MsixLayout {
            table_bar: BAR,
            table_offset: MSIX_TABLE_AT,
            pba_bar: BAR,
            pba_offset: MSIX_PBA_AT,
        };
        config.add_msix(vectors, layout, msi);
        config.set_intx(0, intx);
        let notify_bytes = sizes.len() as u32 * NOTIFY_STEP as u32;
        let step = (NOTIFY_STEP as u32).to_le_bytes();
        for (kind, at, len, extra) in [
            (VIRTIO_PCI_CAP_COMMON_CFG, COMMON_AT, COMMON_BYTES, &[][..]),
            (VIRTIO_PCI_CAP_ISR_CFG, ISR_AT, 4, &[]),
            (
                VIRTIO_PCI_CAP_DEVICE_CFG,
                DEVICE_AT,
                REGION_BYTES as u32,
                &[],
            ),
            (VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY_AT, notify_bytes, &step),
        ] {
            config.add_capability(cap::VENDOR, &region(kind, at, len, extra), &[]);
        }
        // §4.1.4.9: the driver writes bar, offset and length, then accesses pci_cfg_data.
        let body = region(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, &[0; 4]);
        let mut writable = vec![0; body.len()];
        writable[2] = 0xff;
        writable[6..14].fill(0xff);
        let pci_cfg = config.add_capability(cap::VENDOR, &body, &writable);
        let signal = Arc::new(PciSignal {
            interrupts: config.interrupts(),
            vectors: Mutex::new(Vectors {
                isr: 0,
                config: VIRTIO_MSI_NO_VECTOR,
                queues: vec![VIRTIO_MSI_NO_VECTOR; sizes.len()],
            }),
        });
        let dma = Dma::new(Arc::clone(&memory), config.bus_master());
        let sink: Arc<dyn Signal> = Arc::clone(&signal) as Arc<dyn Signal>;
        let link = DriverLink::new(unit, Arc::clone(&memory), dma, sink, &sizes);
        device.attach(Arc::clone(&link));
        Arc::new(Mutex::new(VirtioPciDevice {
            unit: unit.to_owned(),
            device,
            link,
            memory,
            config,
            signal,
            pci_cfg: u16::from(pci_cfg),
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            resetting: None,
            packed: false,
        }))
    }

    /// Offers packed rings (VIRTIO_F_RING_PACKED) or not, the default: drivers prefer them when
    /// offered, and split rings are what every driver is tested with. Before the first start.
    pub fn offer_packed_rings(&mut self, offer: bool) {
        self.packed = offer;
    }

    /// The link between device and driver, for tests and inspection.
    pub fn link(&self) -> &Arc<DriverLink> {
        &self.link
    }

    /// Features offered to the driver.
    fn offered(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_F_INDIRECT_DESC
            | 1 << VIRTIO_F_EVENT_IDX
            | u64::from(self.packed) << VIRTIO_F_RING_PACKED
    }

    /// Queue layout under the negotiated features: packed, event index, indirect.
    fn ring_features(&self) -> (bool, bool, bool) {
        (
            self.link.has(VIRTIO_F_RING_PACKED),
            self.link.has(VIRTIO_F_EVENT_IDX),
            self.link.has(VIRTIO_F_INDIRECT_DESC),
        )
    }

    fn reset_device(&mut self) {
        let old = self.link.status();
        self.link.reset();
        self.signal.reset();
        self.device.reset();
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.resetting = (self.link.in_flight() > 0).then_some(old);
    }

    /// What the status register reads.
    fn status(&mut self) -> u8 {
        if let Some(old) = self.resetting {
            if self.link.in_flight() > 0 {
                return old;
            }
            self.resetting = None;
        }
        self.link.status()
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        // A driver that goes on without waiting gets a device whose queues are reset.
        self.resetting = None;
        let old = self.link.status();
        // §2.1.1: the driver must not clear a bit; NEEDS_RESET is the device's.
        let mut new = old | (value & !VIRTIO_CONFIG_S_NEEDS_RESET);
        let rising = new & !old;
        if rising & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let offered = self.offered();
            let f = self.driver_features;
            // §2.2.2 and §6.2: a subset of what is offered, and VERSION_1.
            if f & !offered != 0 || f >> VIRTIO_F_VERSION_1 & 1 == 0 {
                tracing::debug!(device = %self.unit, "features {f:#x} refused");
                new &= !VIRTIO_CONFIG_S_FEATURES_OK;
            } else {
                self.link.set_features(f);
            }
        }
        if new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.link.set_status(new);
        if new & !old & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.device.activate();
            self.notify_all();
        }
    }

    fn notify_all(&mut self) {
        for n in 0..self.link.queue_count() {
            self.notify(n);
        }
    }

    fn notify(&mut self, queue: usize) {
        if self.link.active() {
            self.device.notify(queue);
        }
    }

    fn enable_queue(&mut self) {
        let (packed, event_idx, indirect) = self.ring_features();
        let index = usize::from(self.queue_select);
        if self.link.status() & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return;
        }
        let result = match self.link.queue(index) {
            Some(mut q) if !q.ready() => q.enable(&self.memory, packed, event_idx, indirect),
            _ => return,
        };
        if let Err(e) = result {
            self.link.fail(&format_args!("queue {index}: {e}"));
        }
    }

    /// The access that pci_cfg_data stands for: BAR, offset, length.
    fn pci_cfg_window(&self) -> Option<(u8, u64, usize)> {
        let bar = self.config.read(self.pci_cfg + 4) as u8;
        let offset = u64::from(self.config.read(self.pci_cfg + 8));
        let len = self.config.read(self.pci_cfg + 12);
        // "pci_cfg_data … length 1, 2 or 4", aligned, inside a structure of this device.
        let ok = bar == BAR
            && matches!(len, 1 | 2 | 4)
            && offset % u64::from(len) == 0
            && offset < BAR_BYTES;
        ok.then_some((bar, offset, len as usize))
    }
}

impl PciFunction for VirtioPciDevice {
    fn config_read(&mut self, offset: u16) -> u32 {
        if offset == self.pci_cfg + 16
            && let Some((bar, at, len)) = self.pci_cfg_window()
        {
            let mut b = [0; 4];
            self.bar_read(bar, at, &mut b[..len]);
            return u32::from_le_bytes(b);
        }
        self.config.read(offset)
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        if offset == self.pci_cfg + 16
            && let Some((bar, at, len)) = self.pci_cfg_window()
        {
            if let Some(d) = data.get(..len) {
                self.bar_write(bar, at, d);
            }
            return;
        }
        self.config.write(offset, data);
    }

    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }

    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }

    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        if index != BAR || self.config.msix_read(index, offset, data) {
            return;
        }
        data.fill(0);
        let at = offset % REGION_BYTES;
        match offset - at {
            COMMON_AT => {
                let image = self.common_image();
                read_config(&image, at, data);
            }
            ISR_AT if at == 0 => {
                if let Some(b) = data.first_mut() {
                    *b = self.signal.take_isr();
                }
            }
            DEVICE_AT => self.device.config_read(at, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        if index != BAR || self.config.msix_write(index, offset, data) {
            return;
        }
        let at = offset % REGION_BYTES;
        match offset - at {
            COMMON_AT => self.common_write(at, data),
            DEVICE_AT => self.device.config_write(at, data),
            NOTIFY_AT => self.notify((at / NOTIFY_STEP) as usize),
            _ => {}
        }
    }
}

impl Lifecycle for VirtioPciDevice {
    fn unit(&self) -> &str {
        &self.unit
    }

    fn start(&mut self) {
        self.link.set_running(true);
        if self.link.driver_ok() {
            (0..self.link.queue_count()).for_each(|n| self.link.signal(n));
        }
        self.device.start();
        self.notify_all();
    }

    fn pause(&mut self) {
        self.link.set_running(false);
        self.device.pause();
    }

    fn drained(&mut self) -> bool {
        !self.link.running() && self.link.in_flight() == 0 && self.device.drained()
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
    }

    fn save(&mut self) -> Result<Section, StateError> {
        self.save_section()
    }

    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let result = self.restore_section(section);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn inspect(&self) -> Inspect {
        let queues = (0..self.link.queue_count())
            .filter_map(|n| {
                let q = self.link.queue(n)?;
                Some((n.to_string(), q.inspect(&self.memory)))
            })
            .collect();
        Inspect::node([
            ("status", Inspect::Hex(u64::from(self.link.status()))),
            ("isr", Inspect::Hex(lock(&self.signal.vectors).isr.into())),
            ("features", Inspect::Hex(self.link.features())),
            ("in_flight", Inspect::Uint(self.link.in_flight() as u64)),
            ("driver_errors", Inspect::Uint(self.link.errors())),
            ("queues", Inspect::Node(queues)),
            ("device", self.device.inspect()),
            ("pci", self.config.inspect()),
        ])
    }
}
