use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use pyrite_vdev::IrqSink;
use pyrite_vdev::bus::lock;

#[derive(Default)]
struct Host {
    out: Mutex<Vec<u8>>,
    irq: AtomicBool,
}
impl IrqSink for Host {
    fn set_level(&self, gsi: u32, level: bool) {
        assert_eq!(gsi, 4);
        self.irq.store(level, Ordering::Relaxed);
    }
}
struct Out(Arc<Host>);
impl SerialBackend for Out {
    fn write(&mut self, data: &[u8]) {
        lock(&self.0.out).extend_from_slice(data);
    }
}

fn uart() -> (Uart, Arc<Host>) {
    let h = Arc::new(Host::default());
    (
        Uart::new(
            "uart0",
            0x3f8,
            IrqLine::new(h.clone(), 4),
            Box::new(Out(h.clone())),
        ),
        h,
    )
}

fn inb(u: &mut Uart, r: u16) -> u8 {
    let mut b = [0xff];
    u.pio_read(0x3f8 + r, &mut b);
    b[0]
}
fn out(u: &mut Uart, r: u16, v: u8) {
    u.pio_write(0x3f8 + r, &[v]);
}

#[test]
fn autodetection_finds_a_16550a() {
    let (mut u, _) = uart();
    out(&mut u, 1, 0x0f);
    assert_eq!(inb(&mut u, 1), 0x0f);
    out(&mut u, 4, 0x1a);
    assert_eq!(inb(&mut u, 6) & 0xf0, 0x90);
    out(&mut u, 4, 0x08);
    out(&mut u, 2, 1);
    assert_eq!(inb(&mut u, 2) >> 6, 3);
    out(&mut u, 2, 0x21);
    assert_eq!(inb(&mut u, 2) & 0x20, 0, "not a 16750");
    out(&mut u, 3, 0x80);
    out(&mut u, 0, 0x34);
    out(&mut u, 1, 0x12);
    assert_eq!((inb(&mut u, 0), inb(&mut u, 1)), (0x34, 0x12));
    out(&mut u, 3, 3);
    out(&mut u, 7, 0xa5);
    assert_eq!(inb(&mut u, 7), 0xa5);
    assert_eq!(inb(&mut u, 5), 0x60);
}

#[test]
fn transmit_interrupt_comes_on_enable_and_after_each_byte() {
    let (mut u, h) = uart();
    out(&mut u, 4, MCR_OUT2);
    out(&mut u, 1, IER_THRE);
    assert!(h.irq.load(Ordering::Relaxed));
    assert_eq!(inb(&mut u, 2), IIR_THRE);
    assert!(!h.irq.load(Ordering::Relaxed), "reading IIR clears it");
    for b in b"ok" {
        out(&mut u, 0, *b);
    }
    assert_eq!(*lock(&h.out), b"ok");
    assert_eq!(inb(&mut u, 2), IIR_THRE);
    assert_eq!(inb(&mut u, 2), IIR_NONE);
    out(&mut u, 4, 0);
    out(&mut u, 0, b'x');
    assert!(!h.irq.load(Ordering::Relaxed), "OUT2 gates the interrupt");
}

#[test]
fn receive_has_flow_control_trigger_and_time_out() {
    let (mut u, h) = uart();
    assert_eq!(u.receive(b"ab"), 1);
    assert_eq!(inb(&mut u, 0), b'a');
    out(&mut u, 2, 0x81);
    out(&mut u, 1, IER_RDA);
    out(&mut u, 4, MCR_OUT2);
    assert_eq!(u.receive(b"123"), 3);
    assert!(h.irq.load(Ordering::Relaxed));
    assert_eq!(inb(&mut u, 2), 0xc0 | IIR_TIMEOUT);
    assert_eq!(u.receive(&[b'x'; 40]), 13);
    assert_eq!((u.room(), inb(&mut u, 2)), (0, 0xc0 | IIR_RDA));
    for _ in 0..16 {
        assert_eq!(inb(&mut u, 5) & 1, 1);
        inb(&mut u, 0);
    }
    assert!(!h.irq.load(Ordering::Relaxed));
    assert_eq!(inb(&mut u, 5), 0x60);
}

#[test]
fn break_and_overrun_are_line_status() {
    let (mut u, _) = uart();
    out(&mut u, 1, IER_RLS);
    assert!(u.receive_break());
    assert_eq!(inb(&mut u, 2), IIR_RLS);
    assert_eq!(inb(&mut u, 5) & 0x1f, LSR_BI | LSR_DR);
    assert_eq!(inb(&mut u, 2), IIR_NONE);
    inb(&mut u, 0);
    out(&mut u, 4, MCR_LOOP);
    out(&mut u, 0, 1);
    out(&mut u, 0, 2);
    assert_eq!(inb(&mut u, 5) & 0x1f, LSR_OE | LSR_DR);
    assert_eq!(inb(&mut u, 0), 1);
    assert_eq!(u.receive(b"x"), 0, "loopback cuts the line");
}
