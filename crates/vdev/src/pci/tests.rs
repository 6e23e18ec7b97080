use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::*;
use crate::bus::lock;
use crate::irq::{IrqLine, IrqSink, MsiMessage, MsiSink};

#[derive(Default)]
struct Recorder {
    messages: Mutex<Vec<MsiMessage>>,
    levels: Mutex<Vec<(u32, bool)>>,
}
impl MsiSink for Recorder {
    fn send(&self, msi: MsiMessage) {
        lock(&self.messages).push(msi);
    }
}
impl IrqSink for Recorder {
    fn set_level(&self, gsi: u32, level: bool) {
        lock(&self.levels).push((gsi, level));
    }
}

fn function() -> (ConfigSpace, Arc<Recorder>) {
    let r = Arc::new(Recorder::default());
    let mut c = ConfigSpace::new(PciIds {
        vendor_id: 0x1234,
        device_id: 0x5678,
        class: 0x01_80_00,
        ..PciIds::default()
    });
    c.add_bar(0, BarKind::Mem64, 0x4000);
    c.add_bar(2, BarKind::Io, 0x20);
    c.add_bar(3, BarKind::Mem32, 0x1000);
    c.add_msi(2, r.clone());
    let layout = MsixLayout {
        table_bar: 0,
        table_offset: 0x2000,
        pba_bar: 0,
        pba_offset: 0x3000,
    };
    c.add_msix(70, layout, r.clone());
    c.add_pci_express();
    c.set_intx(1, IrqLine::new(r.clone(), 17));
    (c, r)
}

fn find(c: &ConfigSpace, id: u8) -> u16 {
    let mut at = c.read(0x34) as u8;
    while at != 0 {
        let v = c.read(at.into());
        if v as u8 == id {
            return at.into();
        }
        at = (v >> 8) as u8;
    }
    panic!("capability {id:#x} is not in the list");
}

#[test]
fn bars_sized_show_their_mask_and_decode_when_enabled() {
    let (mut c, _) = function();
    for (at, mask) in [
        (0x10, 0xffff_c004u32),
        (0x14, 0xffff_ffff),
        (0x18, 0xffff_ffe1),
    ] {
        c.write(at, &[0xff; 4]);
        assert_eq!(c.read(at), mask);
    }
    c.write(0x1c, &[0xff; 4]);
    assert_eq!(c.read(0x1c), 0xffff_f000);
    c.write(0x20, &[0xff; 4]);
    assert_eq!(c.read(0x20), 0, "no BAR 4");
    c.write(0x10, &0x1234_4000u32.to_le_bytes());
    c.write(0x14, &0x80u32.to_le_bytes());
    c.write(0x18, &0xc040u32.to_le_bytes());
    assert_eq!((c.bar_address(0), c.bar_address(2)), (None, None));
    c.write(4, &[7]);
    assert_eq!(
        (c.bar_address(0), c.bar_address(2)),
        (Some(0x80_1234_4000), Some(0xc040))
    );
    assert!(c.bus_master().load(Ordering::Relaxed));
}

#[test]
fn intx_follows_disable_and_messages() {
    let (mut c, r) = function();
    let i = c.interrupts();
    assert!(!i.signal(0));
    i.set_intx(true);
    assert_eq!(c.read(4) >> 16 & 8, 8);
    c.write(5, &[4]);
    c.write(5, &[0]);
    let msix = find(&c, cap::MSIX);
    c.write(msix + 3, &[0x80]);
    i.set_intx(false);
    assert_eq!(
        *lock(&r.levels),
        [(17, true), (17, false), (17, true), (17, false)]
    );
    assert_eq!(c.read(0x3c) >> 8, 2, "INTB");
}

#[test]
fn msix_masked_vector_becomes_pending_and_is_sent_when_unmasked() {
    let (mut c, r) = function();
    let i = c.interrupts();
    let msix = find(&c, cap::MSIX);
    assert_eq!(c.read(msix) >> 16, 69);
    c.write(msix + 2, &0x8000u16.to_le_bytes());
    let entry = 0x2000 + 66 * 16;
    assert!(c.msix_write(0, entry, &0xfee0_1000u64.to_le_bytes()));
    assert!(c.msix_write(0, entry + 8, &0x41u32.to_le_bytes()));
    assert!(i.signal(66));
    assert!(lock(&r.messages).is_empty());
    let mut b = [0; 8];
    assert!(c.msix_read(0, 0x3008, &mut b));
    assert_eq!(b, [4, 0, 0, 0, 0, 0, 0, 0]);
    c.msix_write(0, entry + 12, &[0, 0, 0, 0]);
    assert_eq!(
        lock(&r.messages).pop(),
        Some(MsiMessage {
            addr: 0xfee0_1000,
            data: 0x41
        })
    );
    assert!(i.signal(66));
    assert_eq!(lock(&r.messages).len(), 1);
    c.write(msix + 2, &0xc000u16.to_le_bytes());
    i.signal(66);
    assert_eq!(lock(&r.messages).len(), 1);
    c.write(msix + 2, &0x8000u16.to_le_bytes());
    assert_eq!(lock(&r.messages).len(), 2);
    assert!(i.signal(5000), "a vector that is not there is dropped");
    assert!(!c.msix_read(1, 0x2000, &mut b));
    assert!(!c.msix_read(0, 0x2000 + 70 * 16, &mut b));
}

#[test]
fn msi_uses_granted_vectors_and_mask() {
    let (mut c, r) = function();
    let i = c.interrupts();
    let msi = find(&c, cap::MSI);
    c.write(msi + 4, &0xfee0_2003u32.to_le_bytes());
    c.write(msi + 12, &0x0053u16.to_le_bytes());
    c.write(msi + 2, &0x0011u16.to_le_bytes());
    i.signal(3);
    assert_eq!(
        lock(&r.messages).pop(),
        Some(MsiMessage {
            addr: 0xfee0_2000,
            data: 0x53
        })
    );
    c.write(msi + 16, &2u32.to_le_bytes());
    i.signal(1);
    assert_eq!(c.read(msi + 20), 2);
    assert!(lock(&r.messages).is_empty());
    c.write(msi + 16, &[0]);
    assert_eq!(lock(&r.messages).len(), 1);
}

#[test]
fn save_restore_save_is_equal_and_reset_is_power_on() {
    let (mut c, _) = function();
    let fresh = c.save();
    c.write(0x10, &[0, 0, 0x30, 0xc0]);
    c.write(4, &[7]);
    c.msix_write(0, 0x2010, &[0xff; 16]);
    c.interrupts().set_intx(true);
    let saved = c.save();
    let (mut other, r) = function();
    other.restore(&saved).unwrap();
    assert_eq!(other.save(), saved);
    assert_eq!(*lock(&r.levels), [(17, true)]);
    c.reset();
    assert_eq!(c.save(), fresh);
    let bad = ConfigSaved {
        bytes: vec![0; 3],
        ..saved
    };
    assert!(other.restore(&bad).is_err());
    assert_eq!(other.save(), fresh);
}

struct Whole(ConfigSpace);
impl PciFunction for Whole {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.0.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.0.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.0.bar_address(index)
    }
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        self.0.msix_read(index, offset, data);
    }
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        self.0.msix_write(index, offset, data);
    }
}

#[test]
fn arbitrary_accesses_keep_read_only_registers_and_restorable_state() {
    use crate::conformance::{self, Target};
    for seed in 0..20 {
        let (c, _) = function();
        let fresh = [0, 8, 0x2c, 0x34].map(|n| c.read(n));
        let interrupts = c.interrupts();
        let mut f = Whole(c);
        let bytes = conformance::pseudo_random(seed, 20_000);
        conformance::fuzz_device(Target::Pci(&mut f), &bytes, |b| {
            if !interrupts.signal(b.into()) {
                interrupts.set_intx(b & 1 != 0);
            }
        });
        assert_eq!([0, 8, 0x2c, 0x34].map(|n| f.0.read(n)), fresh);
        let saved = f.0.save();
        let (mut other, _) = function();
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
    }
}

/// A sink with routes.
#[derive(Default)]
struct Router {
    /// Messages sent without a route.
    plain: Mutex<Vec<MsiMessage>>,
    /// What routes did.
    log: Arc<Mutex<Vec<(&'static str, u32)>>>,
    refuse: bool,
}
struct Route(Arc<Mutex<Vec<(&'static str, u32)>>>, Mutex<u32>);
impl crate::irq::MsiRoute for Route {
    fn trigger(&self) {
        lock(&self.0).push(("trigger", *lock(&self.1)));
    }
    fn change(&self, msi: MsiMessage) -> bool {
        lock(&self.0).push(("change", msi.data));
        *lock(&self.1) = msi.data;
        msi.data != 0xbad
    }
}
impl MsiSink for Router {
    fn send(&self, msi: MsiMessage) {
        lock(&self.plain).push(msi);
    }
    fn open_route(&self, msi: MsiMessage) -> Option<Box<dyn crate::irq::MsiRoute>> {
        lock(&self.log).push(("open", msi.data));
        let route = Route(Arc::clone(&self.log), Mutex::new(msi.data));
        (!self.refuse).then(|| Box::new(route) as Box<_>)
    }
}

fn routed(refuse: bool) -> (ConfigSpace, Arc<Router>) {
    let r = Arc::new(Router {
        refuse,
        ..Router::default()
    });
    let mut c = ConfigSpace::new(PciIds::default());
    c.add_bar(0, BarKind::Mem64, 0x4000);
    let layout = MsixLayout {
        table_bar: 0,
        table_offset: 0x2000,
        pba_bar: 0,
        pba_offset: 0x3000,
    };
    c.add_msix(4, layout, r.clone());
    let at = find(&c, cap::MSIX);
    c.write(at + 2, &0x8000u16.to_le_bytes());
    (c, r)
}

fn set_vector(c: &mut ConfigSpace, vector: u64, data: u32, control: u32) {
    let at = 0x2000 + vector * 16;
    c.msix_write(0, at, &0xfee0_0000u64.to_le_bytes());
    c.msix_write(0, at + 8, &data.to_le_bytes());
    c.msix_write(0, at + 12, &control.to_le_bytes());
}

#[test]
fn msix_routes_are_opened_once_and_follow_the_table() {
    let (mut c, r) = routed(false);
    let irq = c.interrupts();
    set_vector(&mut c, 1, 0x41, 0);
    assert!(irq.signal(1) && irq.signal(1));
    set_vector(&mut c, 1, 0x42, 0);
    assert!(irq.signal(1));
    let want = [
        ("open", 0x41),
        ("trigger", 0x41),
        ("trigger", 0x41),
        ("change", 0x42),
        ("trigger", 0x42),
    ];
    assert_eq!(*lock(&r.log), want);
    // Masked: nothing is sent; unmasked: what was pending goes the plain way.
    set_vector(&mut c, 1, 0x42, 1);
    assert!(irq.signal(1));
    assert_eq!(*lock(&r.log), want);
    set_vector(&mut c, 1, 0x42, 0);
    assert_eq!(lock(&r.plain).pop().map(|m| m.data), Some(0x42));
    // A message that the route does not take goes the plain way as well.
    set_vector(&mut c, 1, 0xbad, 0);
    assert!(irq.signal(1));
    assert_eq!(lock(&r.plain).pop().map(|m| m.data), Some(0xbad));
}

#[test]
fn a_sink_without_routes_is_asked_once() {
    let (mut c, r) = routed(true);
    let irq = c.interrupts();
    set_vector(&mut c, 2, 0x51, 0);
    assert!(irq.signal(2) && irq.signal(2));
    assert_eq!(*lock(&r.log), [("open", 0x51)]);
    assert_eq!(lock(&r.plain).len(), 2);
}
