use super::*;
use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Host {
    levels: Mutex<Vec<(u32, bool)>>,
    messages: Mutex<Vec<MsiMessage>>,
}
impl IrqSink for Host {
    fn set_level(&self, gsi: u32, level: bool) {
        let mut l = lock(&self.levels);
        let last = l
            .iter()
            .rev()
            .find(|(g, _)| *g == gsi)
            .is_some_and(|(_, v)| *v);
        if last != level {
            l.push((gsi, level));
        }
    }
}
impl MsiSink for Host {
    fn send(&self, msi: MsiMessage) {
        lock(&self.messages).push(msi);
    }
}

struct Rig {
    clock: Arc<VmClock>,
    host: Arc<Host>,
    hpet: Arc<Mutex<Hpet>>,
    legacy: Arc<AtomicBool>,
}

fn rig() -> Rig {
    let (clock, host) = (Arc::new(VmClock::default()), Arc::new(Host::default()));
    let legacy: Arc<AtomicBool> = Arc::default();
    let line = |gsi| IrqLine::new(host.clone(), gsi);
    let lines = HpetLines {
        irq0: line(0),
        irq8: line(8),
        routes: [line(20), line(21), line(22), line(23)],
    };
    let hpet = Hpet::new(&clock, lines, host.clone(), legacy.clone());
    Rig {
        clock,
        host,
        hpet,
        legacy,
    }
}

impl Rig {
    fn write(&self, at: u64, v: u64) {
        lock(&self.hpet).mmio_write(at, &v.to_le_bytes());
    }
    fn read(&self, at: u64) -> u64 {
        let mut b = [0; 8];
        lock(&self.hpet).mmio_read(at, &mut b);
        u64::from_le_bytes(b)
    }
    fn rises(&self) -> Vec<u32> {
        let l = std::mem::take(&mut *lock(&self.host.levels));
        l.into_iter().filter(|(_, v)| *v).map(|(g, _)| g).collect()
    }
}

#[test]
fn counter_runs_when_enabled() {
    let r = rig();
    assert_eq!(r.read(0), 0x0098_9680_8086_a201);
    r.clock.advance(1000);
    assert_eq!(r.read(0xf0), 0);
    r.write(0x10, 1);
    r.clock.advance(1000);
    assert_eq!(r.read(0xf0), 100);
    r.write(0x10, 0);
    r.clock.advance(1000);
    assert_eq!(r.read(0xf0), 100);
    r.write(0xf0, 0x1_0000_0000);
    let mut b = [0; 4];
    lock(&r.hpet).mmio_read(0xf4, &mut b);
    assert_eq!(b, [1, 0, 0, 0]);
}

#[test]
fn periodic_legacy_replacement_takes_irq_0() {
    let r = rig();
    r.write(0x10, 3);
    assert!(r.legacy.load(Ordering::Relaxed));
    r.write(0x100, TN_INT_ENB | TN_TYPE_PERIODIC | TN_VAL_SET);
    r.write(0x108, 100_000);
    r.write(0x108, 50_000);
    r.clock.advance(999_999);
    assert!(r.rises().is_empty());
    r.clock.advance(1);
    assert_eq!(r.rises(), [0]);
    r.clock.advance(1_500_000);
    assert_eq!(r.rises(), [0; 3]);
    r.clock.set_ns(1_000_003_000);
    r.clock.advance(0);
    assert_eq!(r.rises(), [0], "no burst");
    assert_eq!(r.read(0x108) % 50_000, 0);
    r.write(0x10, 0);
    assert!(!r.legacy.load(Ordering::Relaxed));
}

#[test]
fn a_periodic_comparator_without_interrupt_takes_no_wake_ups() {
    let r = rig();
    r.write(0x10, 3);
    r.write(0x100, TN_INT_ENB | TN_TYPE_PERIODIC | TN_VAL_SET);
    r.write(0x108, 100_000);
    r.write(0x108, 50_000);
    r.clock.advance(1_500_000);
    assert_eq!(r.rises(), [0, 0]);
    // As Linux leaves it when it has found a better clock event device.
    r.write(0x100, TN_TYPE_PERIODIC);
    assert_eq!(r.clock.next_deadline_ns(), None);
    r.clock.advance(10_250_000);
    assert!(r.rises().is_empty());
    // The comparator has gone on, and interrupts again in its old rhythm.
    assert_eq!(r.read(0x108), 1_200_000);
    r.write(0x100, TN_INT_ENB | TN_TYPE_PERIODIC);
    assert_eq!(r.clock.next_deadline_ns(), Some(12_000_000));
    r.clock.advance(250_000);
    assert_eq!(r.rises(), [0]);
}

#[test]
fn tiny_period_is_merged() {
    let r = rig();
    r.write(0x10, 3);
    r.write(0x100, TN_INT_ENB | TN_TYPE_PERIODIC | TN_VAL_SET);
    r.write(0x108, 1);
    r.clock.advance(1_000_000);
    assert!((45..=51).contains(&r.rises().len()), "not 100 000");
}

#[test]
fn level_interrupt_stays_until_cleared_and_late_comparator_fires_at_once() {
    let r = rig();
    r.write(0x10, 1);
    r.write(
        0x120,
        TN_INT_ENB | TN_INT_TYPE_LEVEL | 21 << TN_INT_ROUTE_SHIFT,
    );
    r.clock.advance(10_000);
    r.write(0x128, 10);
    r.clock.advance(0);
    assert_eq!(*lock(&r.host.levels), [(21, true)]);
    assert_eq!(r.read(0x20), 2);
    r.write(0x20, 2);
    assert_eq!(*lock(&r.host.levels), [(21, true), (21, false)]);
}

#[test]
fn message_delivery_and_32_bit_wrap() {
    let r = rig();
    r.write(0x150, 0xfee0_1000u64 << 32 | 0x45);
    r.write(0x140, TN_INT_ENB | TN_FSB_EN | TN_32MODE);
    r.write(0xf0, 0xffff_fff0);
    r.write(0x148, 0x10);
    r.write(0x10, 1);
    r.clock.advance(319);
    assert!(lock(&r.host.messages).is_empty());
    r.clock.advance(1);
    assert_eq!(
        lock(&r.host.messages).pop(),
        Some(MsiMessage {
            addr: 0xfee0_1000,
            data: 0x45
        })
    );
    r.clock.advance((1 << 32) * TICK_NS);
    assert_eq!(lock(&r.host.messages).len(), 1);
}

#[test]
fn save_restore_keeps_deadlines() {
    let r = rig();
    r.write(0x10, 3);
    r.write(0x100, TN_INT_ENB);
    r.write(0x108, 1000);
    r.clock.advance(5_000);
    let saved = lock(&r.hpet).save().unwrap();
    let o = rig();
    o.clock.set_ns(5_000);
    lock(&o.hpet).restore(&saved).unwrap();
    assert_eq!(lock(&o.hpet).save().unwrap(), saved);
    assert!(o.legacy.load(Ordering::Relaxed));
    o.clock.advance(5_000);
    assert_eq!(o.rises(), [0]);
}
