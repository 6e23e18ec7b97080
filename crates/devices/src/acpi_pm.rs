//! ACPI fixed hardware: PM1 events and control, PM timer, GPE0, power button.
//! ACPI Specification 6.4 §4.8.3 and §4.8.4.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, Section, StateError};
use pyrite_vdev::{
    DeviceTimer, IrqLine, Lifecycle, MachineEvents, PioDevice, TimedDevice, VmClock,
};

const KIND: &str = "acpi-pm";
const VERSION: u16 = 1;

/// PM1a_EVT_BLK: status and enable, 4 ports.
pub const PM1A_EVT: u16 = 0x600;
/// PM1a_CNT_BLK, 2 ports.
pub const PM1A_CNT: u16 = 0x604;
/// PM_TMR_BLK, 4 ports.
pub const PM_TMR: u16 = 0x608;
/// GPE0_BLK: 32 status and 32 enable bits, 8 ports.
pub const GPE0: u16 = 0x620;
/// SLP_TYPx of S5 (power off).
pub const SLP_TYP_S5: u16 = 5;
/// SLP_TYPx of S3 (suspend to RAM).
pub const SLP_TYP_S3: u16 = 1;

// §4.8.3.1 PM1 Event Grouping.
const TMR_STS: u16 = 1 << 0;
const PWRBTN_STS: u16 = 1 << 8;
const WAK_STS: u16 = 1 << 15;
/// TMR, BM, GBL, PWRBTN, SLPBTN, RTC, PCIEXP_WAKE, WAK.
const STS_BITS: u16 = 0xc731;
/// TMR, GBL, PWRBTN, SLPBTN, RTC, PCIEXP_WAKE_DIS.
const EN_BITS: u16 = 0x4721;
// §4.8.3.2 PM1 Control.
const SCI_EN: u16 = 1 << 0;
const BM_RLD: u16 = 1 << 1;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_EN: u16 = 1 << 13;

/// §4.8.3.3: frequency of the PM timer.
const PM_TMR_HZ: u128 = 3_579_545;

fn timer_ticks(ns: u64) -> u64 {
    (u128::from(ns) * PM_TMR_HZ / 1_000_000_000) as u64
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Registers {
    #[n(0)]
    pm1_sts: u16,
    #[n(1)]
    pm1_en: u16,
    /// SLP_TYP and BM_RLD. SCI_EN is always set: there is no legacy mode.
    #[n(2)]
    pm1_cnt: u16,
    #[n(3)]
    gpe_sts: u32,
    #[n(4)]
    gpe_en: u32,
    /// Value of the timer's most significant bit that was last seen, as a count of its changes.
    #[n(5)]
    msb_changes: u64,
}

/// The fixed hardware.
pub struct AcpiPm {
    regs: Registers,
    timer: DeviceTimer,
    sci: IrqLine,
    events: Arc<dyn MachineEvents>,
    /// SLP_TYPx of power off on this board.
    off_type: u16,
}

impl AcpiPm {
    /// Fixed hardware that raises `sci` (level) and reports sleep states to `events`.
    pub fn new(
        clock: &Arc<VmClock>,
        sci: IrqLine,
        events: Arc<dyn MachineEvents>,
    ) -> Arc<Mutex<AcpiPm>> {
        Arc::new_cyclic(|me| {
            let timer = DeviceTimer::new(clock, me);
            Mutex::new(AcpiPm {
                regs: Registers::default(),
                timer,
                sci,
                events,
                off_type: SLP_TYP_S5,
            })
        })
    }

    /// Makes `slp_typ` (0-7) what switches the machine off, instead of [`SLP_TYP_S5`]: firmware for
    /// virtual machines has a value built in.
    pub fn set_off_type(&mut self, slp_typ: u16) {
        self.off_type = slp_typ & 7;
    }

    /// The power button was pressed: the guest is asked to shut down.
    pub fn press_power_button(&mut self) {
        self.regs.pm1_sts |= PWRBTN_STS;
        self.drive();
    }

    /// A general-purpose event (0-31).
    pub fn raise_gpe(&mut self, gpe: u8) {
        if let Some(bit) = 1u32.checked_shl(gpe.into()) {
            self.regs.gpe_sts |= bit;
            self.drive();
        }
    }

    /// The machine wakes from S3: tells the guest so.
    pub fn wake(&mut self) {
        self.regs.pm1_sts |= WAK_STS;
        self.drive();
    }

    fn catch_up(&mut self) {
        // TMR_STS: set whenever the most significant bit of the 32-bit timer changes.
        let changes = timer_ticks(self.timer.now_ns()) >> 31;
        if changes != self.regs.msb_changes {
            self.regs.msb_changes = changes;
            self.regs.pm1_sts |= TMR_STS;
        }
    }

    fn drive(&mut self) {
        self.catch_up();
        let r = &self.regs;
        self.sci
            .set(r.pm1_sts & r.pm1_en & EN_BITS & !(1 << 14) != 0 || r.gpe_sts & r.gpe_en != 0);
        let wanted = r.pm1_en & TMR_STS != 0 && r.pm1_sts & TMR_STS == 0;
        let next = u128::from(r.msb_changes + 1) << 31;
        let deadline = (next * 1_000_000_000).div_ceil(PM_TMR_HZ);
        self.timer
            .set(wanted.then(|| u64::try_from(deadline).unwrap_or(u64::MAX)));
    }

    fn read(&mut self, port: u16) -> u8 {
        let r = &self.regs;
        let byte = |v: u32, first: u16| v.to_le_bytes()[usize::from((port - first) & 3)];
        match port {
            0x600..=0x603 => byte(u32::from(r.pm1_en) << 16 | u32::from(r.pm1_sts), PM1A_EVT),
            0x604..=0x605 => byte((r.pm1_cnt | SCI_EN).into(), PM1A_CNT),
            0x620..=0x623 => byte(r.gpe_sts, GPE0),
            0x624..=0x627 => byte(r.gpe_en, GPE0),
            _ => 0,
        }
    }

    fn write(&mut self, port: u16, v: u8) {
        let r = &mut self.regs;
        let set = |old: u32, first: u16| {
            let shift = 8 * u32::from((port - first) & 3);
            old & !(0xff << shift) | u32::from(v) << shift
        };
        match port {
            0x600..=0x601 => r.pm1_sts &= !(set(0, PM1A_EVT) as u16),
            0x602..=0x603 => r.pm1_en = set(r.pm1_en.into(), 0x602) as u16 & EN_BITS,
            0x604 => r.pm1_cnt = r.pm1_cnt & 0xff00 | u16::from(v) & BM_RLD,
            0x605 => {
                let value = u16::from(v) << 8;
                r.pm1_cnt = r.pm1_cnt & 0x00ff | value & 7 << SLP_TYP_SHIFT;
                if value & SLP_EN != 0 {
                    match value >> SLP_TYP_SHIFT & 7 {
                        t if t == self.off_type => self.events.power_off(),
                        SLP_TYP_S3 => self.events.suspend(),
                        other => tracing::warn!(slp_typ = other, "no such sleep state"),
                    }
                }
            }
            0x620..=0x623 => r.gpe_sts &= !set(0, GPE0),
            0x624..=0x627 => r.gpe_en = set(r.gpe_en, 0x624),
            _ => {}
        }
    }
}

impl TimedDevice for AcpiPm {
    fn timer_fired(&mut self, _now_ns: u64) {
        self.drive();
    }
}

impl PioDevice for AcpiPm {
    fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if (PM_TMR..PM_TMR + 4).contains(&port) {
            // One reading for all bytes.
            let now = timer_ticks(self.timer.now_ns()) as u32;
            let from = &now.to_le_bytes()[usize::from(port - PM_TMR)..];
            for (to, from) in data.iter_mut().zip(from) {
                *to = *from;
            }
            return;
        }
        self.catch_up();
        for (port, b) in (port..).zip(data) {
            *b = self.read(port);
        }
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) {
        self.catch_up();
        for (port, b) in (port..).zip(data) {
            self.write(port, *b);
        }
        self.drive();
    }
}

impl Lifecycle for AcpiPm {
    fn unit(&self) -> &str {
        "acpi-pm"
    }
    passive!();
    fn reset(&mut self) {
        let msb_changes = timer_ticks(self.timer.now_ns()) >> 31;
        self.regs = Registers {
            msb_changes,
            ..Registers::default()
        };
        self.drive();
    }
    fn save(&mut self) -> Result<Section, StateError> {
        let AcpiPm {
            regs,
            timer: _,
            sci: _,
            events: _,
            off_type: _,
        } = self;
        Ok(Section::new("acpi-pm", KIND, VERSION, regs))
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        self.reset();
        let mut saved: Registers = section.decode(KIND, VERSION)?;
        saved.pm1_sts &= STS_BITS;
        saved.pm1_en &= EN_BITS;
        // A hostile count would only overflow the deadline.
        saved.msb_changes = saved.msb_changes.min(u64::from(u32::MAX));
        self.regs = saved;
        self.drive();
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        let r = &self.regs;
        Inspect::node([
            ("pm1_sts", Inspect::Hex(r.pm1_sts.into())),
            ("pm1_en", Inspect::Hex(r.pm1_en.into())),
            ("pm1_cnt", Inspect::Hex((r.pm1_cnt | SCI_EN).into())),
            ("gpe_sts", Inspect::Hex(r.gpe_sts.into())),
            ("gpe_en", Inspect::Hex(r.gpe_en.into())),
        ])
    }
}
