use super::*;
use pyrite_vdev::{IntrSink, Lifecycle, MmioDevice, MsiMessage, MsiSink, PioDevice};

#[derive(Default)]
struct Engine {
    intr: Mutex<bool>,
    messages: Mutex<Vec<MsiMessage>>,
}
impl IntrSink for Engine {
    fn set_intr(&self, level: bool) {
        *lock(&self.intr) = level;
    }
}
impl MsiSink for Engine {
    fn send(&self, msi: MsiMessage) {
        lock(&self.messages).push(msi);
    }
}

struct Rig {
    engine: Arc<Engine>,
    pic: Arc<Pic>,
    ports: PicDevice,
    ioapic: Arc<IoApic>,
    window: IoApicDevice,
    router: Arc<InterruptRouter>,
}

impl Rig {
    fn new() -> Rig {
        let engine = Arc::new(Engine::default());
        let pic = Pic::new(engine.clone());
        let ioapic = IoApic::new(2, engine.clone());
        Rig {
            ports: PicDevice::new(pic.clone()),
            window: IoApicDevice::new(ioapic.clone()),
            router: Arc::new(InterruptRouter::new(pic.clone(), ioapic.clone())),
            engine,
            pic,
            ioapic,
        }
    }
    fn out(&mut self, port: u16, v: u8) {
        self.ports.pio_write(port, &[v]);
    }
    fn inb(&mut self, port: u16) -> u8 {
        let mut b = [0xff];
        self.ports.pio_read(port, &mut b);
        b[0]
    }
    fn init(&mut self, icw4: u8) {
        for (port, v) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, icw4),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, icw4),
        ] {
            self.out(port, v);
        }
    }
    fn intr(&self) -> bool {
        *lock(&self.engine.intr)
    }
    fn redirect(&mut self, pin: u8, entry: u64) {
        for half in 0..2 {
            self.window.mmio_write(0, &[0x10 + 2 * pin + half]);
            self.window
                .mmio_write(0x10, &((entry >> (32 * half)) as u32).to_le_bytes());
        }
    }
    fn entry_low(&mut self, pin: u8) -> u32 {
        self.window.mmio_write(0, &[0x10 + 2 * pin]);
        let mut b = [0; 4];
        self.window.mmio_read(0x10, &mut b);
        u32::from_le_bytes(b)
    }
    fn sent(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut lock(&self.engine.messages))
    }
}

fn pulse(r: &Rig, gsi: u32) {
    r.router.set_level(gsi, true);
    r.router.set_level(gsi, false);
}

#[test]
fn pic_nested_priorities_and_cascade() {
    let mut r = Rig::new();
    r.init(1);
    pulse(&r, 4);
    assert!(r.intr());
    assert_eq!(r.pic.ack(), Some(0x24));
    assert!(!r.intr());
    pulse(&r, 5);
    assert!(!r.intr(), "IRQ 5 is lower than IRQ 4 in service");
    pulse(&r, 12);
    assert!(r.intr(), "the cascade is higher");
    assert_eq!(r.pic.ack(), Some(0x2c));
    r.out(0xa0, 0x20);
    r.out(0x20, 0x20);
    assert!(!r.intr());
    r.out(0x20, 0x64);
    assert_eq!(r.pic.ack(), Some(0x25));
    assert_eq!(r.pic.ack(), None);
    r.out(0x20, 0x0b);
    assert_eq!(r.inb(0x20), 0x20);
}

#[test]
fn pic_slave_with_two_requests_raises_intr_again_after_eoi() {
    let mut r = Rig::new();
    r.init(1);
    pulse(&r, 8);
    pulse(&r, 14);
    assert_eq!(r.pic.ack(), Some(0x28));
    assert!(!r.intr());
    r.out(0xa0, 0x20);
    assert!(!r.intr(), "the master still serves IR2");
    r.out(0x20, 0x20);
    assert_eq!(r.pic.ack(), Some(0x2e));
}

#[test]
fn pic_level_line_withdrawn_gives_nothing_and_slave_gives_spurious_15() {
    let mut r = Rig::new();
    r.init(1);
    r.out(0x4d0, 0xff);
    r.out(0x4d1, 0xff);
    assert_eq!((r.inb(0x4d0), r.inb(0x4d1)), (0xf8, 0xde));
    r.router.set_level(5, true);
    assert!(r.intr());
    assert_eq!(r.pic.ack(), Some(0x25));
    r.out(0x20, 0x20);
    assert!(r.intr(), "still asserted");
    r.router.set_level(5, false);
    assert!(!r.intr());
    assert_eq!(r.pic.ack(), None);
    r.router.set_level(10, true);
    r.router.set_level(10, false);
    assert_eq!(r.pic.ack(), Some(0x2f), "the master latched the cascade");
    r.out(0xa0, 0x0b);
    assert_eq!(r.inb(0xa0), 0, "a spurious interrupt is not in service");
}

#[test]
fn pic_spurious_7_when_the_request_goes_between_intr_and_ack() {
    // The processor acknowledges after the line fell and before it hears that INTR fell too.
    #[derive(Default)]
    struct LateAck(Mutex<Option<Arc<Pic>>>, Mutex<Vec<Option<u8>>>);
    impl IntrSink for LateAck {
        fn set_intr(&self, level: bool) {
            let pic = lock(&self.0).clone();
            if let Some(pic) = pic.filter(|_| !level) {
                let vector = pic.ack();
                lock(&self.1).push(vector);
            }
        }
    }
    let sink = Arc::new(LateAck::default());
    let pic = Pic::new(sink.clone());
    let mut ports = PicDevice::new(pic.clone());
    for (p, v) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x4d0, 8)] {
        ports.pio_write(p, &[v]);
    }
    *lock(&sink.0) = Some(pic.clone());
    pic.set_line(3, true);
    pic.set_line(3, false);
    assert_eq!(*lock(&sink.1), [Some(0x27)]);
    assert_eq!(pic.ack(), None, "now the processor knows");
    *lock(&sink.0) = None;
}

#[test]
fn pic_poll_special_mask_rotation_and_auto_eoi() {
    let mut r = Rig::new();
    r.init(1);
    r.out(0x20, 0x0c);
    assert_eq!(r.inb(0x20), 0);
    pulse(&r, 3);
    r.out(0x20, 0x0c);
    assert_eq!(r.inb(0x20), 0x83);
    pulse(&r, 6);
    assert!(!r.intr());
    r.out(0x20, 0x68);
    r.out(0x21, 0x08);
    assert!(
        r.intr(),
        "special mask: IRQ 3 in service and masked blocks nothing"
    );
    assert_eq!(r.pic.ack(), Some(0x26));
    r.out(0x20, 0x48);
    r.out(0x20, 0x63);
    r.out(0x20, 0xe6);
    r.out(0x21, 0);
    pulse(&r, 6);
    pulse(&r, 7);
    assert_eq!(r.pic.ack(), Some(0x27), "after rotation on 6, 7 is first");
    r.init(3);
    pulse(&r, 1);
    assert_eq!(r.pic.ack(), Some(0x21));
    pulse(&r, 5);
    assert_eq!(r.pic.ack(), Some(0x25), "nothing stays in service");
}

#[test]
fn ioapic_identifies_itself() {
    let mut r = Rig::new();
    let mut b = [0; 4];
    r.window.mmio_write(0, &[1]);
    r.window.mmio_read(0x10, &mut b);
    assert_eq!(u32::from_le_bytes(b), 0x0017_0020);
    r.window.mmio_write(0, &[0]);
    r.window.mmio_read(0x10, &mut b);
    assert_eq!(u32::from_le_bytes(b), 2 << 24);
    assert_eq!(r.entry_low(23), 1 << 16);
}

#[test]
fn ioapic_edge_fires_once_and_not_while_masked() {
    let mut r = Rig::new();
    pulse(&r, 4);
    r.redirect(4, 0x41 | 3 << 56);
    assert!(r.sent().is_empty(), "the edge came while masked");
    r.router.set_level(4, true);
    r.router.set_level(4, true);
    assert_eq!(
        r.sent(),
        [MsiMessage {
            addr: 0xfee0_3000,
            data: 0x4041
        }]
    );
    r.redirect(2, 0x30 | 1 << 8 | 1 << 11 | 0xff << 56);
    pulse(&r, 0);
    assert_eq!(
        r.sent(),
        [MsiMessage {
            addr: 0xfeef_f00c,
            data: 0x4130
        }]
    );
}

#[test]
fn ioapic_level_is_delivered_again_at_eoi_while_asserted() {
    let mut r = Rig::new();
    r.router.set_level(17, true);
    r.redirect(17, 0x52 | 1 << 15 | 1 << 13);
    assert_eq!(r.sent().len(), 1, "unmasking an asserted line delivers");
    assert_eq!(r.entry_low(17) & 1 << 14, 1 << 14);
    r.router.set_level(17, true);
    assert!(r.sent().is_empty());
    r.ioapic.eoi(0x51);
    assert!(r.sent().is_empty(), "another vector");
    r.ioapic.eoi(0x52);
    assert_eq!(
        r.sent(),
        [MsiMessage {
            addr: 0xfee0_0000,
            data: 0xc052
        }]
    );
    r.router.set_level(17, false);
    r.window.mmio_write(0x40, &0x52u32.to_le_bytes());
    assert!(r.sent().is_empty());
    assert_eq!(r.entry_low(17) & 1 << 14, 0);
}

#[test]
fn shared_line_falls_when_the_last_driver_releases_it() {
    let mut r = Rig::new();
    r.redirect(16, 0x60 | 1 << 15);
    let shared = SharedLines::new(r.router.clone());
    let (a, b) = (shared.line(16).unwrap(), shared.line(16).unwrap());
    a.set(true);
    b.set(true);
    a.set(false);
    assert_eq!(r.sent().len(), 1);
    r.ioapic.eoi(0x60);
    assert_eq!(r.sent().len(), 1);
    b.set(false);
    r.ioapic.eoi(0x60);
    assert!(r.sent().is_empty());
    assert!(shared.line(24).is_none());
}

#[test]
fn controllers_save_restore() {
    let mut r = Rig::new();
    r.init(1);
    r.router.set_level(9, true);
    r.redirect(9, 0x39 | 1 << 15);
    let (pic, ioapic) = (r.ports.save().unwrap(), r.window.save().unwrap());
    let mut other = Rig::new();
    other.ports.restore(&pic).unwrap();
    other.window.restore(&ioapic).unwrap();
    assert_eq!(
        (other.ports.save().unwrap(), other.window.save().unwrap()),
        (pic, ioapic)
    );
    assert!(other.intr(), "INTR is stated again");
    assert_eq!(other.pic.ack(), Some(0x29));
    other.ports.reset();
    assert!(!other.intr());
}
