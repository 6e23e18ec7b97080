use std::sync::Mutex;

use super::*;
use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Host {
    /// Rising edges.
    edges: Mutex<Vec<u32>>,
    high: Mutex<Vec<u32>>,
    resets: Mutex<u32>,
}
impl IrqSink for Host {
    fn set_level(&self, gsi: u32, level: bool) {
        let mut high = lock(&self.high);
        if level && !high.contains(&gsi) {
            lock(&self.edges).push(gsi);
            high.push(gsi);
        } else if !level {
            high.retain(|g| *g != gsi);
        }
    }
}
impl MachineEvents for Host {
    fn power_off(&self) {}
    fn reset(&self) {
        *lock(&self.resets) += 1;
    }
    fn suspend(&self) {}
    fn debug_exit(&self, _code: u32) {}
}

fn rig() -> (I8042, Arc<Host>) {
    let h = Arc::new(Host::default());
    let line = |gsi| IrqLine::new(h.clone(), gsi);
    (I8042::new(line(1), line(12), h.clone()), h)
}

fn status(d: &mut I8042) -> u8 {
    let mut b = [0];
    d.pio_read(0x64, &mut b);
    b[0]
}

/// Reads everything there is.
fn drain(d: &mut I8042) -> Vec<u8> {
    let mut out = Vec::new();
    while status(d) & 1 != 0 {
        let mut b = [0];
        d.pio_read(0x60, &mut b);
        out.push(b[0]);
    }
    out
}

fn ask(d: &mut I8042, port: u16, bytes: &[u8]) -> Vec<u8> {
    for b in bytes {
        d.pio_write(port, &[*b]);
    }
    drain(d)
}

fn aux(d: &mut I8042, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for b in bytes {
        d.pio_write(0x64, &[0xd4]);
        out.extend(ask(d, 0x60, &[*b]));
    }
    out
}

#[test]
fn controller_self_test_ports_and_command_byte() {
    let (mut d, h) = rig();
    assert_eq!(ask(&mut d, 0x64, &[0xaa]), [0x55]);
    assert_eq!(ask(&mut d, 0x64, &[0xab]), [0]);
    assert_eq!(ask(&mut d, 0x64, &[0xa9]), [0]);
    d.pio_write(0x64, &[0x60]);
    d.pio_write(0x60, &[0x30]);
    assert_eq!(ask(&mut d, 0x64, &[0x20]), [0x30]);
    lock(&h.edges).clear();
    d.pio_write(0x64, &[0xd3]);
    d.pio_write(0x60, &[0x5a]);
    assert_eq!(status(&mut d) & 0x21, 0x21);
    assert_eq!(drain(&mut d), [0x5a]);
    assert!(lock(&h.edges).is_empty(), "interrupts are off");
    d.pio_write(0x64, &[0xd1]);
    d.pio_write(0x60, &[0x03]);
    assert_eq!(ask(&mut d, 0x64, &[0xd0]), [0x03]);
    d.pio_write(0x64, &[0xfe]);
    assert_eq!(*lock(&h.resets), 1);
}

#[test]
fn keys_are_translated_to_set_1_with_one_edge_per_byte() {
    let (mut d, h) = rig();
    assert!(d.key(0x1e, true) && d.key(0x1e, false) && d.key(0xe048, true));
    assert_eq!(drain(&mut d), [0x1e, 0x9e, 0xe0, 0x48]);
    assert_eq!(*lock(&h.edges), [1; 4]);
    d.key(0xe11d, true);
    assert_eq!(drain(&mut d), [0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]);
    d.pio_write(0x64, &[0x60]);
    d.pio_write(0x60, &[0x05]);
    d.key(0x41, true);
    d.key(0x41, false);
    assert_eq!(drain(&mut d), [0x83, 0xf0, 0x83]);
    assert_eq!(ask(&mut d, 0x60, &[0xf2]), [0xfa, 0xab, 0x83]);
    assert_eq!(ask(&mut d, 0x60, &[0xf0, 1]), [0xfa, 0xfa]);
    d.key(0x1e, false);
    assert_eq!(drain(&mut d), [0x9e]);
    assert_eq!(ask(&mut d, 0x60, &[0xf0, 3]), [0xfa, 0xfe]);
}

#[test]
fn every_set_1_code_survives_the_way_through_set_2() {
    let (mut d, _) = rig();
    for code in (1..=0x58u16).filter(|c| !(0x55..0x57).contains(c)) {
        assert!(d.key(code, true));
        assert_eq!(drain(&mut d), [code as u8], "{code:#x}");
    }
}

#[test]
fn keyboard_queue_is_bounded_and_commands_answer() {
    let (mut d, _) = rig();
    let taken = (0..100).filter(|_| d.key(0x1e, true)).count();
    assert_eq!(taken, 33, "32 in the queue, one in the output buffer");
    drain(&mut d);
    assert_eq!(ask(&mut d, 0x60, &[0xed, 0x02]), [0xfa, 0xfa]);
    assert_eq!(ask(&mut d, 0x60, &[0xee]), [0xee]);
    assert_eq!(ask(&mut d, 0x60, &[0xf5]), [0xfa]);
    assert!(d.key(0x1e, true));
    assert!(drain(&mut d).is_empty(), "not scanning");
    assert_eq!(ask(&mut d, 0x60, &[0xff]), [0xfa, 0xaa]);
    d.pio_write(0x64, &[0xad]);
    d.key(0x1e, true);
    assert!(drain(&mut d).is_empty(), "interface disabled");
    d.pio_write(0x64, &[0xae]);
    assert_eq!(drain(&mut d), [0x1e]);
}

#[test]
fn mouse_reports_movement_wheel_and_buttons() {
    let (mut d, h) = rig();
    d.mouse(5, 5, 0, 0);
    assert_eq!(aux(&mut d, &[0xff]), [0xfa, 0xaa, 0]);
    assert_eq!(aux(&mut d, &[0xf4]), [0xfa]);
    lock(&h.edges).clear();
    d.mouse(300, 2, 1, 1);
    assert_eq!(drain(&mut d), [0x29, 255, 0xfe, 0x09, 45, 0]);
    assert_eq!(*lock(&h.edges), [12; 6]);
    aux(&mut d, &[0xf3, 200, 0xf3, 100, 0xf3, 80]);
    assert_eq!(aux(&mut d, &[0xf2]), [0xfa, 3]);
    d.mouse(0, 0, -1, 0);
    assert_eq!(drain(&mut d), [0x08, 0, 0, 0xff]);
    aux(&mut d, &[0xf3, 200, 0xf3, 200, 0xf3, 80]);
    assert_eq!(aux(&mut d, &[0xf2]), [0xfa, 4]);
    d.mouse(0, 0, 0, 0x10);
    assert_eq!(drain(&mut d), [0x08, 0, 0, 0x20]);
    assert_eq!(aux(&mut d, &[0xe9]), [0xfa, 0x20, 2, 80]);
}

#[test]
fn mouse_movement_adds_up_while_the_guest_is_slow() {
    let (mut d, _) = rig();
    aux(&mut d, &[0xf4]);
    for _ in 0..100_000 {
        d.mouse(1, 0, 0, 0);
    }
    let bytes = drain(&mut d);
    let x: u32 = bytes.chunks(3).map(|p| u32::from(p[1])).sum();
    assert_eq!(bytes.len() % 3, 0);
    assert!(
        (65_000..=66_000).contains(&x),
        "bounded, nothing lost below the bound: {x}"
    );
}

#[test]
fn save_restore_keeps_queues() {
    let (mut d, _) = rig();
    d.key(0x1e, true);
    d.key(0x1f, true);
    aux(&mut d, &[0xf4]);
    d.key(0x20, true);
    d.mouse(1, 1, 0, 0);
    let saved = d.save().unwrap();
    let (mut o, h) = rig();
    o.restore(&saved).unwrap();
    assert_eq!(o.save().unwrap(), saved);
    assert_eq!(*lock(&h.edges), [1]);
    assert_eq!(drain(&mut o), [0x20, 0x28, 1, 0xff]);
}
