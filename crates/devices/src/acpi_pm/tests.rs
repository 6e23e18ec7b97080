use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Host {
    sci: AtomicBool,
    events: Mutex<Vec<&'static str>>,
}
impl IrqSink for Host {
    fn set_level(&self, gsi: u32, level: bool) {
        assert_eq!(gsi, 9);
        self.sci.store(level, Ordering::Relaxed);
    }
}
impl MachineEvents for Host {
    fn power_off(&self) {
        lock(&self.events).push("power_off");
    }
    fn reset(&self) {
        lock(&self.events).push("reset");
    }
    fn suspend(&self) {
        lock(&self.events).push("suspend");
    }
    fn debug_exit(&self, _code: u32) {
        lock(&self.events).push("debug_exit");
    }
}

fn rig() -> (Arc<VmClock>, Arc<Host>, Arc<Mutex<AcpiPm>>) {
    let (clock, host) = (Arc::new(VmClock::default()), Arc::new(Host::default()));
    let pm = AcpiPm::new(&clock, IrqLine::new(host.clone(), 9), host.clone());
    (clock, host, pm)
}

fn inw(pm: &Mutex<AcpiPm>, port: u16) -> u16 {
    let mut b = [0; 2];
    lock(pm).pio_read(port, &mut b);
    u16::from_le_bytes(b)
}

#[test]
fn power_button_raises_sci_until_cleared() {
    let (_, host, pm) = rig();
    lock(&pm).press_power_button();
    assert!(!host.sci.load(Ordering::Relaxed), "not enabled");
    lock(&pm).pio_write(0x602, &0x100u16.to_le_bytes());
    assert!(host.sci.load(Ordering::Relaxed));
    assert_eq!(inw(&pm, 0x600), 0x100);
    lock(&pm).pio_write(0x600, &0x100u16.to_le_bytes());
    assert!(!host.sci.load(Ordering::Relaxed));
}

#[test]
fn sleep_control_reports_events() {
    let (_, host, pm) = rig();
    assert_eq!(inw(&pm, 0x604), 1, "SCI_EN");
    lock(&pm).pio_write(0x604, &(5u16 << 10).to_le_bytes());
    assert!(lock(&host.events).is_empty());
    lock(&pm).pio_write(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
    lock(&pm).pio_write(0x604, &(1u16 << 10 | 1 << 13).to_le_bytes());
    lock(&pm).pio_write(0x604, &(3u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(*lock(&host.events), ["power_off", "suspend"]);
    lock(&pm).set_off_type(0);
    lock(&pm).pio_write(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
    lock(&pm).pio_write(0x604, &(1u16 << 13).to_le_bytes());
    assert_eq!(*lock(&host.events), ["power_off", "suspend", "power_off"]);
    lock(&pm).wake();
    assert_eq!(inw(&pm, 0x600), 0x8000);
}

#[test]
fn timer_counts_at_3579545_hz_and_reports_its_upper_bit() {
    let (clock, host, pm) = rig();
    clock.advance(1_000_000_000);
    let mut b = [0; 4];
    lock(&pm).pio_read(0x608, &mut b);
    assert_eq!(u32::from_le_bytes(b), 3_579_545);
    lock(&pm).pio_write(0x602, &1u16.to_le_bytes());
    clock.advance(598_900_000_000);
    assert!(!host.sci.load(Ordering::Relaxed));
    clock.advance(100_000_000);
    assert!(host.sci.load(Ordering::Relaxed));
    lock(&pm).pio_write(0x600, &1u16.to_le_bytes());
    assert!(!host.sci.load(Ordering::Relaxed));
}

#[test]
fn general_purpose_events_have_status_and_enable() {
    let (_, host, pm) = rig();
    lock(&pm).pio_write(0x624, &(1u32 << 4).to_le_bytes());
    lock(&pm).raise_gpe(4);
    lock(&pm).raise_gpe(200);
    assert!(host.sci.load(Ordering::Relaxed));
    let saved = lock(&pm).save().unwrap();
    let (_, other_host, other) = rig();
    lock(&other).restore(&saved).unwrap();
    assert!(other_host.sci.load(Ordering::Relaxed));
    assert_eq!(lock(&other).save().unwrap(), saved);
    lock(&pm).pio_write(0x620, &(1u32 << 4).to_le_bytes());
    assert!(!host.sci.load(Ordering::Relaxed));
}
