//! Human interface devices. "HID" is the Device Class Definition for Human Interface Devices 1.11,
//! usages are those of the HID Usage Tables 1.12.

pub mod keyboard;
pub mod tablet;

use minicbor::{Decode, Encode};

use super::device::{
    Core, CoreSaved, Descriptors, Setup, Speed, configuration_descriptor, descriptor,
    device_descriptor,
};

/// Vendor and product: those that systems know virtual input devices by.
const VENDOR: u16 = 0x0627;
const PRODUCT: u16 = 0x0001;
/// The one endpoint, on which reports go to the host.
const REPORTS: u8 = 0x81;
/// The host asks every 2^(4 - 1) microframes: each millisecond.
const INTERVAL: u8 = 4;
/// A duration of SET_IDLE is counted in this unit, in ns. HID §7.2.4.
const IDLE_UNIT_NS: u64 = 4_000_000;

/// What tells the devices apart.
struct Kind {
    product: &'static str,
    /// Subclass and protocol of the interface: whether a BIOS can use it, and as what.
    boot: (u8, u8),
    /// Report descriptor.
    report: &'static [u8],
    /// Bytes of a report.
    bytes: u8,
}

/// State that both devices have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct CommonSaved {
    #[n(0)]
    core: CoreSaved,
    /// Idle time in units of 4 ms; 0: a report is sent only when something has changed.
    #[n(1)]
    idle: u8,
    /// The boot protocol was chosen.
    #[n(2)]
    boot_protocol: bool,
    /// When the last report was sent, in guest time.
    #[n(3)]
    told_ns: u64,
}

/// What a class request is to do with a device's own report.
enum Class {
    /// Answer this.
    Data(Vec<u8>),
    /// Answer with the current report.
    GetReport,
    /// Take an output report.
    SetReport,
    /// Refuse.
    Stall,
}

/// What both devices have.
struct Common {
    core: Core,
    kind: Kind,
    idle: u8,
    boot_protocol: bool,
    told_ns: u64,
}

impl Common {
    fn new(kind: Kind) -> Common {
        let speed = Speed::High;
        let [l0, l1] = (kind.report.len() as u16).to_le_bytes();
        let mut interface = vec![9, descriptor::INTERFACE, 0, 0, 1, 3, kind.boot.0];
        interface.extend([kind.boot.1, 0]);
        interface.extend(Common::hid_descriptor([l0, l1]));
        interface.extend([7, descriptor::ENDPOINT, REPORTS, 3, kind.bytes, 0, INTERVAL]);
        let descriptors = Descriptors {
            device: device_descriptor(speed, VENDOR, PRODUCT),
            configuration: configuration_descriptor(speed, &interface),
            bos: Vec::new(),
            strings: vec!["Pyrite".into(), kind.product.into(), "1".into()],
        };
        Common {
            core: Core::new(descriptors, &[REPORTS]),
            kind,
            idle: 0,
            boot_protocol: false,
            told_ns: 0,
        }
    }

    /// HID §6.2.1.
    fn hid_descriptor([l0, l1]: [u8; 2]) -> [u8; 9] {
        let report = descriptor::HID_REPORT;
        [9, descriptor::HID, 0x11, 1, 0, 1, report, l0, l1]
    }

    /// Serves what does not depend on the device. `None`: nothing is to be said.
    fn control(&mut self, s: Setup) -> Class {
        let or_stall = |d: Option<Vec<u8>>| d.map_or(Class::Stall, Class::Data);
        match (s.kind, s.request) {
            (0x81, 6) => match (s.value >> 8) as u8 {
                descriptor::HID_REPORT => Class::Data(self.kind.report.to_vec()),
                descriptor::HID => {
                    let length = (self.kind.report.len() as u16).to_le_bytes();
                    Class::Data(Common::hid_descriptor(length).to_vec())
                }
                _ => Class::Stall,
            },
            (0xa1, 1) => Class::GetReport,
            (0xa1, 2) => Class::Data(vec![self.idle]),
            (0xa1, 3) => Class::Data(vec![u8::from(!self.boot_protocol)]),
            (0x21, 9) => Class::SetReport,
            (0x21, 10) => {
                self.idle = (s.value >> 8) as u8;
                Class::Data(Vec::new())
            }
            (0x21, 11) => {
                self.boot_protocol = s.value == 0;
                Class::Data(Vec::new())
            }
            _ if s.kind & 0x60 == 0 => or_stall(self.core.standard(s)),
            _ => Class::Stall,
        }
    }

    /// When the last report is to be sent again.
    fn deadline(&self) -> Option<(u64, u8)> {
        let idle = u64::from(self.idle) * IDLE_UNIT_NS;
        (idle > 0 && self.core.is_open(REPORTS))
            .then(|| (self.told_ns.saturating_add(idle), REPORTS))
    }

    fn reset(&mut self) {
        self.core.reset();
        (self.idle, self.boot_protocol, self.told_ns) = (0, false, 0);
    }

    fn save(&self) -> CommonSaved {
        let Common {
            core,
            kind: _,
            idle,
            boot_protocol,
            told_ns,
        } = self;
        CommonSaved {
            core: core.save(),
            idle: *idle,
            boot_protocol: *boot_protocol,
            told_ns: *told_ns,
        }
    }

    fn restore(&mut self, saved: CommonSaved) {
        let CommonSaved {
            core,
            idle,
            boot_protocol,
            told_ns,
        } = saved;
        self.core.restore(core);
        (self.idle, self.boot_protocol, self.told_ns) = (idle, boot_protocol, told_ns);
    }
}
