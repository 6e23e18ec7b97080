use std::sync::atomic::AtomicU64;

use super::*;
use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Irq(AtomicBool);
impl IrqSink for Irq {
    fn set_level(&self, _gsi: u32, level: bool) {
        self.0.store(level, Ordering::Relaxed);
    }
}

struct Rig {
    clock: Arc<VmClock>,
    wall: Arc<AtomicU64>,
    irq: Arc<Irq>,
    rtc: Arc<Mutex<Rtc>>,
}

/// 2024-02-29 23:59:50 UTC, a Thursday.
const LEAP: u64 = 1_709_251_190;

fn rig() -> Rig {
    let clock = Arc::new(VmClock::default());
    let wall = Arc::new(AtomicU64::new(LEAP));
    let irq = Arc::new(Irq::default());
    let source = wall.clone();
    let wall_clock: WallClock = Arc::new(move || source.load(Ordering::Relaxed));
    let line = IrqLine::new(irq.clone(), 8);
    let ram = [3 << 30, 5 << 30];
    let rtc = Rtc::new(&clock, wall_clock, line, Arc::default(), ram);
    Rig {
        clock,
        wall,
        irq,
        rtc,
    }
}

impl Rig {
    fn read(&self, at: u8) -> u8 {
        let mut b = [0];
        let mut r = lock(&self.rtc);
        r.pio_write(0x70, &[at]);
        r.pio_read(0x71, &mut b);
        b[0]
    }
    fn write(&self, at: u8, v: u8) {
        lock(&self.rtc).pio_write(0x70, &[at, v]);
    }
    fn second(&self) {
        self.wall.fetch_add(1, Ordering::Relaxed);
        self.clock.advance(SECOND_NS);
    }
    fn irq(&self) -> bool {
        self.irq.0.load(Ordering::Relaxed)
    }
    fn date(&self) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|n| self.read(n))
    }
}

#[test]
fn time_is_the_hosts_in_bcd_and_binary() {
    let r = rig();
    assert_eq!(r.date(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x50]);
    r.write(0x0b, 0x04);
    assert_eq!(r.date(), [20, 24, 2, 29, 5, 0x80 | 11, 59, 50]);
    for _ in 0..10 {
        r.second();
    }
    r.write(0x0b, 0x06);
    assert_eq!(r.date(), [20, 24, 3, 1, 6, 0, 0, 0]);
    assert_eq!(r.read(0x0d), 0x80);
}

#[test]
fn time_set_by_the_guest_holds() {
    let r = rig();
    r.write(0x0b, 0x82);
    for (at, v) in [
        (9, 0x99),
        (0x32, 0x19),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
    ] {
        r.write(at, v);
    }
    r.second();
    assert_eq!(r.read(0), 0x58, "stopped while SET");
    r.write(0x0b, 0x02);
    r.second();
    assert_eq!(r.date(), [0x19, 0x99, 0x12, 0x31, 0x06, 0x23, 0x59, 0x59]);
    r.second();
    assert_eq!(r.date(), [0x20, 0x00, 0x01, 0x01, 0x07, 0, 0, 0]);
}

#[test]
fn update_alarm_and_periodic_interrupts() {
    let r = rig();
    r.write(0x0b, 0x12);
    r.second();
    assert!(r.irq());
    assert_eq!(r.read(0x0c) & 0x90, 0x90);
    assert!(!r.irq());
    r.write(0x0b, 0x22);
    for (at, v) in [(1, 0x55), (3, 0xff), (5, 0xc0)] {
        r.write(at, v);
    }
    for _ in 0..3 {
        r.second();
    }
    assert!(!r.irq());
    r.second();
    assert!(r.irq());
    assert_eq!(r.read(0x0c) & 0xa0, 0xa0);
    r.write(0x0b, 0x42);
    let mut n = 0;
    for _ in 0..1000 {
        r.clock.advance(100_000);
        if r.irq() {
            n += 1;
            assert_eq!(r.read(0x0c) & 0xc0, 0xc0);
        }
    }
    assert!((101..=103).contains(&n), "{n} of 1024 Hz in 100 ms");
    lock(&r.rtc).reset();
    r.clock.advance(10_000_000);
    assert!(!r.irq());
}

#[test]
fn update_in_progress_precedes_the_second() {
    let r = rig();
    r.clock.advance(SECOND_NS - UIP_NS - 1);
    assert_eq!(r.read(0x0a) & 0x80, 0);
    r.clock.advance(1);
    assert_eq!(r.read(0x0a) & 0x80, 0x80);
    r.wall.fetch_add(1, Ordering::Relaxed);
    assert_eq!(r.read(0), 0x50, "not before the update");
    r.clock.advance(UIP_NS);
    assert_eq!((r.read(0x0a) & 0x80, r.read(0)), (0, 0x51));
}

#[test]
fn cmos_tells_memory_and_has_two_banks() {
    let r = rig();
    assert_eq!((r.read(0x15), r.read(0x16)), (0x80, 2));
    assert_eq!((r.read(0x34), r.read(0x35)), (0x00, 0xbf));
    assert_eq!((r.read(0x5b), r.read(0x5c), r.read(0x5d)), (0, 0x40, 1));
    r.write(0x0f, 5);
    assert_eq!(lock(&r.rtc).shutdown_status(), 5);
    let mut b = [0];
    lock(&r.rtc).pio_write(0x72, &[0x0f, 9]);
    lock(&r.rtc).pio_read(0x73, &mut b);
    assert_eq!((b[0], r.read(0x0f)), (9, 5));
}

#[test]
fn every_day_of_a_century_round_trips() {
    for day in 0..36_525 {
        let t = DateTime::from_unix(day * 86_400 + 12_345);
        assert_eq!(t.to_unix(), day * 86_400 + 12_345);
    }
    assert_eq!(DateTime::from_unix(i64::MAX).year, 9999);
    assert_eq!(DateTime::from_unix(i64::MIN).year, 1970);
}

#[test]
fn save_restore_keeps_the_offset() {
    let r = rig();
    r.write(9, 0x30);
    let saved = lock(&r.rtc).save().unwrap();
    let o = rig();
    o.wall.fetch_add(3600, Ordering::Relaxed);
    lock(&o.rtc).restore(&saved).unwrap();
    assert_eq!(lock(&o.rtc).save().unwrap(), saved);
    o.clock.advance(SECOND_NS);
    assert_eq!((o.read(9), o.read(7), o.read(4)), (0x30, 0x02, 0x00));
}
