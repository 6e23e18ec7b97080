use std::sync::atomic::AtomicU32;

use super::*;
use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Edges(AtomicU32);
impl IrqSink for Edges {
    fn set_level(&self, gsi: u32, level: bool) {
        assert_eq!(gsi, 0);
        self.0.fetch_add(u32::from(level), Ordering::Relaxed);
    }
}

struct Rig {
    clock: Arc<VmClock>,
    edges: Arc<Edges>,
    pit: Arc<Mutex<Pit>>,
}

fn rig() -> Rig {
    let (clock, edges) = (Arc::new(VmClock::default()), Arc::new(Edges::default()));
    let pit = Pit::new(&clock, IrqLine::new(edges.clone(), 0), Arc::default());
    Rig { clock, edges, pit }
}

impl Rig {
    fn out(&self, port: u16, v: u8) {
        lock(&self.pit).pio_write(port, &[v]);
    }
    fn inb(&self, port: u16) -> u8 {
        let mut b = [0];
        lock(&self.pit).pio_read(port, &mut b);
        b[0]
    }
    fn count(&self, n: u16) -> u16 {
        self.out(0x43, (n as u8) << 6);
        u16::from_le_bytes([self.inb(0x40 + n), self.inb(0x40 + n)])
    }
    fn edges(&self) -> u32 {
        self.edges.0.swap(0, Ordering::Relaxed)
    }
}

#[test]
fn counter_0_in_rate_mode_interrupts_each_period_without_drift() {
    let r = rig();
    for (port, v) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        r.out(port, v); // 11932: 100 Hz
    }
    for _ in 0..100 {
        r.clock.advance(10_000_000);
    }
    assert!((99..=100).contains(&r.edges()));
    r.clock.set_ns(5_000_000_000);
    r.clock.advance(0);
    assert_eq!(r.edges(), 1, "missed periods are one interrupt");
    r.clock.advance(10_000_000);
    assert_eq!(r.edges(), 1);
}

#[test]
fn one_shot_interrupts_once() {
    let r = rig();
    for (port, v) in [(0x43, 0x30), (0x40, 0xa9), (0x40, 0x04)] {
        r.out(port, v); // 1193 ticks: 1 ms
    }
    assert_eq!(r.inb(0x43), 0xff);
    r.clock.advance(900_000);
    assert_eq!(r.edges(), 0);
    r.clock.advance(200_000);
    assert_eq!(r.edges(), 1);
    r.clock.advance(1_000_000_000);
    assert_eq!(r.edges(), 0);
}

#[test]
fn counter_2_gated_by_port_61_shows_out_on_bit_5() {
    let r = rig();
    r.out(0x61, 0);
    for (port, v) in [(0x43, 0xb0), (0x42, 0xff), (0x42, 0xff)] {
        r.out(port, v);
    }
    r.clock.advance(100_000_000);
    assert_eq!(r.inb(0x61) & 0x20, 0);
    assert_eq!(r.count(2), 0xffff, "the gate is low");
    r.out(0x61, 1);
    r.clock.advance(54_000_000);
    assert_eq!(r.inb(0x61) & 0x21, 1);
    r.clock.advance(1_000_000);
    assert_eq!(r.inb(0x61) & 0x21, 0x21);
}

#[test]
fn gate_low_holds_a_mode_0_count() {
    let r = rig();
    r.out(0x61, 1);
    for (port, v) in [(0x43, 0xb0), (0x42, 0), (0x42, 0x80)] {
        r.out(port, v);
    }
    r.clock.advance(10_000_000);
    let before = r.count(2);
    r.out(0x61, 0);
    r.clock.advance(10_000_000);
    assert_eq!(r.count(2), before);
    r.out(0x61, 1);
    r.clock.advance(1_000_000);
    assert!((before - 1200..before - 1180).contains(&r.count(2)));
}

#[test]
fn mode_1_is_triggered_by_the_gate_and_mode_3_is_a_square_wave() {
    let r = rig();
    for (port, v) in [(0x43, 0xb2), (0x42, 0xa9), (0x42, 4)] {
        r.out(port, v);
    }
    assert_eq!(r.inb(0x61) & 0x20, 0x20);
    r.out(0x61, 1);
    assert_eq!(r.inb(0x61) & 0x20, 0);
    r.clock.advance(1_100_000);
    assert_eq!(r.inb(0x61) & 0x20, 0x20);
    for (port, v) in [(0x43, 0xb6), (0x42, 0xa8), (0x42, 4)] {
        r.out(port, v);
    }
    let highs = (0..100)
        .filter(|_| {
            r.clock.advance(37_000);
            r.inb(0x61) & 0x20 != 0
        })
        .count();
    assert!((40..60).contains(&highs));
}

#[test]
fn bcd_counts_in_decimal_and_read_back_latches() {
    let r = rig();
    for (port, v) in [(0x43, 0x35), (0x40, 0x00), (0x40, 0x50)] {
        r.out(port, v); // 5000
    }
    r.clock.advance(838_095);
    let c = r.count(0);
    assert!((0x3999..=0x4001).contains(&c), "{c:x}");
    r.out(0x43, 0xc2);
    r.clock.advance(1_000_000);
    assert_eq!(r.inb(0x40) & 0x3f, 0x35);
    let late = u16::from_le_bytes([r.inb(0x40), r.inb(0x40)]);
    assert_eq!(late, c, "latched before the wait");
    r.out(0x43, 0x24);
    r.out(0x43, 0xe2);
    assert_eq!(r.inb(0x40), 0x80 | 0x40 | 0x24, "null count");
}

#[test]
fn save_restore_keeps_the_beat() {
    let r = rig();
    for (port, v) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
        r.out(port, v);
    }
    r.clock.advance(20_000_000);
    let saved = lock(&r.pit).save().unwrap();
    let other = rig();
    other.clock.set_ns(20_000_000);
    lock(&other.pit).restore(&saved).unwrap();
    assert_eq!(lock(&other.pit).save().unwrap(), saved);
    other.clock.advance(34_000_000);
    assert_eq!(other.edges(), 0);
    other.clock.advance(1_000_000);
    assert_eq!(other.edges(), 1);
}
