use pyrite_vdev::Lifecycle;
use pyrite_vdev::PciFunction;
use pyrite_vdev::bus::lock;

use super::*;
use crate::net::testing::{MAC, Rig as CardRig, conforms, frame};

type Rig = CardRig<Ne2k>;

fn get(r: &Rig, port: u64) -> u8 {
    let mut b = [0];
    lock(&r.card).bar_read(0, port, &mut b);
    b[0]
}
fn set(r: &Rig, port: u64, value: u8) {
    lock(&r.card).bar_write(0, port, &[value]);
}

/// Reads card memory by the data port, two bytes at a time.
fn remote_read(r: &Rig, at: u16, len: u16) -> Vec<u8> {
    let (a, n) = (at.to_le_bytes(), len.to_le_bytes());
    for (port, value) in [
        (0x0a, n[0]),
        (0x0b, n[1]),
        (0x08, a[0]),
        (0x09, a[1]),
        (0, 0x0a),
    ] {
        set(r, port, value);
    }
    let mut out = Vec::new();
    while out.len() < usize::from(len) {
        let mut b = [0; 2];
        lock(&r.card).bar_read(0, DATA_PORT, &mut b);
        out.extend_from_slice(&b);
    }
    assert_ne!(get(r, 7) & ISR_RDC, 0);
    set(r, 7, ISR_RDC);
    out
}

fn remote_write(r: &Rig, at: u16, data: &[u8]) {
    let (a, n) = (at.to_le_bytes(), (data.len() as u16).to_le_bytes());
    for (port, value) in [
        (0x0a, n[0]),
        (0x0b, n[1]),
        (0x08, a[0]),
        (0x09, a[1]),
        (0, 0x12),
    ] {
        set(r, port, value);
    }
    for part in data.chunks(4) {
        lock(&r.card).bar_write(0, DATA_PORT, part);
    }
}

/// A ring of pages 46H to 50H, transmission from page 40H.
fn driver() -> Rig {
    let r = Rig::new().up();
    get(&r, RESET_PORT);
    assert_ne!(get(&r, 7) & ISR_RST, 0);
    set(&r, 0, 0x21);
    for (port, value) in [
        (0x0e, 0x49),
        (0x0c, RCR_AB),
        (0x0d, 0),
        (0x04, 0x40),
        (0x01, 0x46),
        (0x02, 0x50),
        (0x03, 0x46),
        (0x07, 0xff),
        (0x0f, 0x3f),
    ] {
        set(&r, port, value);
    }
    set(&r, 0, 0x61);
    for (n, b) in MAC.iter().enumerate() {
        set(&r, 1 + n as u64, *b);
    }
    set(&r, 7, 0x47);
    set(&r, 0, 0x22);
    r
}

#[test]
fn conforms_to_the_rules_of_devices() {
    let hot: Vec<(u8, u64, usize)> = (0..32).map(|port| (0, port, 1)).collect();
    conforms::<Ne2k>(&hot);
}

#[test]
fn address_is_in_the_prom() {
    let r = driver();
    let prom = remote_read(&r, 0, 32);
    for (n, b) in MAC.iter().enumerate() {
        assert_eq!(prom[2 * n..2 * n + 2], [*b, *b]);
    }
    assert_eq!(prom[28..], [0x57; 4]);
    remote_write(&r, 0, &[1, 2, 3, 4]);
    assert_eq!(remote_read(&r, 0, 32), prom, "the PROM cannot be written");
    assert_eq!((get(&r, 0x0a), get(&r, 0x0b)), (0x50, 0x43));
}

#[test]
fn frames_are_sent_from_the_buffer() {
    let r = driver();
    let data = frame([1; 6], 301);
    remote_write(&r, 0x4000, &data);
    set(&r, 5, 0x2d);
    set(&r, 6, 0x01);
    set(&r, 0, 0x26);
    assert_eq!(r.sent(), [(data, Offload::NONE)]);
    assert_eq!((get(&r, 4) & TSR_PTX, get(&r, 7) & ISR_PTX), (1, 2));
    assert!(r.line());
    set(&r, 7, 0xff);
    assert!(!r.line());
    // From outside the buffer, and too long.
    set(&r, 4, 0x00);
    set(&r, 0, 0x26);
    set(&r, 4, 0x40);
    set(&r, 6, 0x06);
    set(&r, 0, 0x26);
    assert!(r.sent().is_empty());
    assert_ne!(get(&r, 7) & ISR_TXE, 0);
}

#[test]
fn receive_ring_goes_round() {
    let r = driver();
    let mut page = 0x47_u8;
    for n in 0..30 {
        let data = frame(MAC, 300 + 37 * n);
        assert!(r.ready() && r.deliver(&data), "{n}");
        let head = remote_read(&r, u16::from(page) << 8, 4);
        let total = u16::from_le_bytes([head[2], head[3]]);
        assert_eq!((head[0], usize::from(total)), (1, data.len() + 4));
        let body = remote_read(&r, (u16::from(page) << 8) + 4, total - 4 + (total & 1));
        assert_eq!(body[..data.len()], data, "{n}");
        page = head[1];
        let before = if page == 0x46 { 0x4f } else { page - 1 };
        set(&r, 3, before);
        set(&r, 7, ISR_PRX);
    }
    // Full, until the driver moves on.
    while r.deliver(&frame(MAC, 1000)) {}
    assert!(!r.ready());
    assert_ne!(get(&r, 7) & ISR_OVW, 0);
    assert_eq!(get(&r, 0x0f), 1);
    r.told();
    let r = r.move_state();
    assert!(!r.ready());
    set(&r, 3, if page == 0x46 { 0x4f } else { page - 1 });
    let full = get(&r, 3);
    set(&r, 0, 0x62);
    let curr = get(&r, 7);
    set(&r, 0, 0x22);
    assert_ne!(full, curr);
    set(&r, 3, if curr == 0x46 { 0x4f } else { curr - 1 });
    assert!(r.told() > 0);
    assert!(r.deliver(&frame(MAC, 1000)));
}

#[test]
fn filter_and_loopback() {
    let r = driver();
    let taken = |f: &[u8]| {
        set(&r, 7, ISR_PRX);
        assert!(r.deliver(f));
        let taken = get(&r, 7) & ISR_PRX != 0;
        set(&r, 0, 0x62);
        let curr = get(&r, 7);
        set(&r, 0, 0x22);
        set(&r, 3, if curr == 0x46 { 0x4f } else { curr - 1 });
        taken
    };
    let group = [1, 0, 0x5e, 0, 0, 0xfb];
    assert!(taken(&frame(MAC, 60)) && taken(&frame([0xff; 6], 60)));
    assert!(!taken(&frame([2, 0, 0, 0, 0, 7], 60)) && !taken(&frame(group, 60)));
    set(&r, 0x0c, RCR_AM);
    assert!(!taken(&frame(group, 60)) && !taken(&frame([0xff; 6], 60)));
    let bit = multicast_bit(&group);
    set(&r, 0, 0x62);
    set(&r, 8 + u64::from(bit / 8), 1 << (bit % 8));
    set(&r, 0, 0x22);
    assert!(taken(&frame(group, 60)));
    set(&r, 0x0c, RCR_PRO);
    assert!(taken(&frame([2, 0, 0, 0, 0, 7], 60)));
    set(&r, 0x0c, RCR_MON);
    assert!(!taken(&frame(MAC, 60)));
    set(&r, 0x0c, RCR_AB);
    set(&r, 0x0d, 2);
    set(&r, 7, 0xff);
    remote_write(&r, 0x4000, &frame(MAC, 64));
    set(&r, 5, 64);
    set(&r, 6, 0);
    set(&r, 0, 0x26);
    assert!(r.sent().is_empty());
    assert_ne!(get(&r, 7) & ISR_PRX, 0);
    lock(&r.card).pause();
    lock(&r.card).reset();
    assert!(!r.ready());
}
