use pyrite_net::Offload;
use pyrite_net::offload::{self, sample_segment};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{Lifecycle, PciFunction};

use super::*;
use crate::net::fcs::fcs;
use crate::net::testing::{MAC, Rig as CardRig, conforms, frame};

type Plus = CardRig<Rtl8139<true>>;
type Plain = CardRig<Rtl8139<false>>;

const RX: u64 = 0x10_0000;
const TX: u64 = 0x20_0000;
const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
const OWN: u32 = 1 << 31;
const EOR: u32 = 1 << 30;
const FS_LS: u32 = 3 << 28;

fn get<const P: bool>(r: &CardRig<Rtl8139<P>>, register: u8, size: usize) -> u32 {
    let mut b = [0; 4];
    lock(&r.card).bar_read(1, register.into(), &mut b[..size]);
    u32::from_le_bytes(b)
}
fn set<const P: bool>(r: &CardRig<Rtl8139<P>>, register: u8, size: usize, value: u32) {
    let bytes = value.to_le_bytes();
    lock(&r.card).bar_write(1, register.into(), &bytes[..size]);
}

/// A driver in C mode with a ring of 8 KiB.
fn c_driver() -> Plain {
    let r = Plain::new().up();
    set(&r, CR, 1, CR_RST);
    assert_eq!(get(&r, CR, 1), CR_BUFE);
    set(&r, RBSTART, 4, RX as u32);
    set(&r, CR, 1, CR_TE | CR_RE);
    set(&r, RCR, 4, RCR_APM | RCR_AB);
    set(&r, IMR, 2, 0xffff);
    r
}

/// A driver in C+ mode with rings of four descriptors.
fn plus_driver() -> Plus {
    let r = Plus::new().up();
    set(&r, CR, 1, CR_RST);
    set(
        &r,
        CPCR,
        2,
        CPCR_TX | CPCR_RX | CPCR_RX_CHECKSUM | CPCR_RX_VLAN,
    );
    for n in 0..4 {
        give_rx(&r, n, 0x600);
    }
    set(&r, RDSAR, 4, RX_RING as u32);
    set(&r, TSAD0, 4, TX_RING as u32);
    set(&r, CR, 1, CR_TE | CR_RE);
    set(&r, RCR, 4, RCR_APM | RCR_AB);
    set(&r, IMR, 2, 0xffff);
    r
}

fn put(r: &Plus, at: u64, opts1: u32, opts2: u32, address: u64) {
    let mut d = opts1.to_le_bytes().to_vec();
    d.extend_from_slice(&opts2.to_le_bytes());
    d.extend_from_slice(&address.to_le_bytes());
    r.memory.write(at, &d).unwrap();
}

fn give_rx(r: &Plus, n: u64, size: u32) {
    let end = if n == 3 { EOR } else { 0 };
    put(r, RX_RING + n * 16, OWN | end | size, 0, RX + n * 0x1000);
}

fn opts1(r: &Plus, at: u64) -> u32 {
    u32::from_le_bytes(r.bytes(at, 4).try_into().unwrap())
}

#[test]
fn conforms_to_the_rules_of_devices() {
    let hot = [
        (CR, 1),
        (RBSTART, 4),
        (CAPR, 2),
        (IMR, 2),
        (ISR, 2),
        (TCR, 4),
        (RCR, 4),
        (TCTR, 4),
        (TIMERINT, 4),
        (CR9346, 1),
        (TPPOLL, 1),
        (CPCR, 2),
        (RDSAR, 4),
        (TSAD0, 4),
        (TSD0, 4),
        (TSD0 + 4, 4),
    ];
    let hot = hot.map(|(r, size)| (1, u64::from(r), size));
    conforms::<Rtl8139<true>>(&hot);
    conforms::<Rtl8139<false>>(&hot);
}

#[test]
fn address_is_in_the_eeprom_and_the_registers() {
    let r = Plus::new().up();
    let pin = |pins: u32| set(&r, CR9346, 1, CR9346_PROGRAM | pins);
    let word = |n: u32| {
        pin(CR9346_EECS);
        for bit in (0..9).rev() {
            let one = (0b110 << 6 | n) >> bit & 1 != 0;
            let di = if one { CR9346_EEDI } else { 0 };
            pin(CR9346_EECS | di);
            pin(CR9346_EECS | di | CR9346_EESK);
        }
        let v = (0..16).fold(0, |v, _| {
            pin(CR9346_EECS);
            pin(CR9346_EECS | CR9346_EESK);
            v << 1 | get(&r, CR9346, 1) & 1
        });
        pin(0);
        v
    };
    assert_eq!(word(0), 0x8129);
    for n in 0..3 {
        let expected = u16::from_le_bytes([MAC[2 * n], MAC[2 * n + 1]]);
        assert_eq!(word(7 + n as u32), u32::from(expected));
    }
    assert_eq!(get(&r, IDR0, 4).to_le_bytes(), MAC[..4]);
    // Locked until the mode says otherwise.
    set(&r, IDR0, 4, 7);
    assert_eq!(get(&r, IDR0, 4).to_le_bytes(), MAC[..4]);
    set(&r, CR9346, 1, CR9346_CONFIG);
    set(&r, IDR0, 4, 7);
    assert_eq!(get(&r, IDR0, 4), 7);
    assert_eq!(get(&r, TCR, 4) & TCR_VERSION_MASK, TCR_VERSION_PLUS);
}

#[test]
fn four_buffers_send() {
    let r = c_driver();
    for n in 0..4_u8 {
        let data = frame([1; 6], 70 + usize::from(n));
        r.memory.write(TX + 0x1000 * u64::from(n), &data).unwrap();
        set(&r, TSAD0 + 4 * n, 4, TX as u32 + 0x1000 * u32::from(n));
        set(&r, TSD0 + 4 * n, 4, data.len() as u32);
        assert_eq!(r.sent(), [(data, Offload::NONE)]);
        assert_eq!(get(&r, TSD0 + 4 * n, 4) & 0xa000, 0xa000, "OWN and TOK");
    }
    assert!(r.line());
    assert_eq!(get(&r, ISR, 2), ISR_TOK);
    set(&r, ISR, 2, ISR_TOK);
    assert!(!r.line());
    assert_eq!(get(&r, TSAD, 2), 0xf00f);
    // Too long, or not in memory.
    set(&r, TSD0, 4, 1793);
    set(&r, TSAD0 + 4, 4, 0xffff_f000);
    set(&r, TSD0 + 4, 4, 100);
    assert!(r.sent().is_empty());
    assert_eq!(get(&r, ISR, 2), ISR_TER);
}

#[test]
fn receive_ring_goes_round() {
    let r = c_driver();
    let mut place = 0_usize;
    for n in 0..40 {
        let data = frame(MAC, 400 + 13 * n);
        assert!(r.ready() && r.deliver(&data), "{n}");
        assert_eq!(get(&r, CR, 1) & CR_BUFE, 0);
        let mut packet = vec![0x01, 0x40];
        packet.extend_from_slice(&(data.len() as u16 + 4).to_le_bytes());
        packet.extend_from_slice(&data);
        packet.extend_from_slice(&fcs(&data));
        let all = r.bytes(RX, 8192);
        let seen: Vec<u8> = (0..packet.len()).map(|i| all[(place + i) % 8192]).collect();
        assert_eq!(seen, packet, "{n}");
        place = (place + packet.len().next_multiple_of(4)) % 8192;
        assert_eq!(get(&r, CBR, 2) as usize, place);
        set(&r, CAPR, 2, (place as u32).wrapping_sub(16) & 0xffff);
        assert_ne!(get(&r, CR, 1) & CR_BUFE, 0);
    }
    // With WRAP the last packet is in one piece.
    set(&r, RCR, 4, RCR_APM | RCR_WRAP);
    set(&r, CAPR, 2, 0xfff0);
    set(&r, RBSTART, 4, RX as u32);
    for _ in 0..5 {
        assert!(r.deliver(&frame(MAC, 1500)));
    }
    assert!(!r.ready() && !r.deliver(&frame(MAC, 1500)));
    assert_ne!(get(&r, ISR, 2) & ISR_RXOVW, 0);
    assert_eq!(get(&r, MPC, 4), 1);
    r.told();
    set(&r, CAPR, 2, 3 * 1508 - 16);
    assert_eq!(r.told(), 1);
    assert!(r.deliver(&frame(MAC, 1500)));
    assert_eq!(r.bytes(RX + 5 * 1508 + 4, 1500), frame(MAC, 1500));
    assert_eq!(get(&r, CBR, 2), 6 * 1508 - 8192);
}

#[test]
fn filter_follows_its_registers() {
    let r = c_driver();
    let taken = |f: &[u8]| {
        let before = get(&r, CBR, 2);
        assert!(r.deliver(f));
        let after = get(&r, CBR, 2);
        set(&r, CAPR, 2, after.wrapping_sub(16) & 0xffff);
        after != before
    };
    let group = [1, 0, 0x5e, 0, 0, 0xfb];
    assert!(taken(&frame(MAC, 60)) && taken(&frame([0xff; 6], 60)));
    assert!(!taken(&frame([2, 0, 0, 0, 0, 7], 60)) && !taken(&frame(group, 60)));
    set(&r, RCR, 4, RCR_AM);
    assert!(!taken(&frame(group, 60)) && !taken(&frame(MAC, 60)));
    let bit = multicast_bit(&group);
    set(&r, MAR0 + 4 * (bit / 32) as u8, 4, 1 << (bit % 32));
    assert!(taken(&frame(group, 60)));
    set(&r, RCR, 4, RCR_AAP);
    assert!(taken(&frame([2, 0, 0, 0, 0, 7], 60)));
}

#[test]
fn rings_send_packets_of_several_pieces() {
    let r = plus_driver();
    let data = frame([1; 6], 500);
    r.memory.write(TX, &data).unwrap();
    put(&r, TX_RING, OWN | 1 << 29 | 100, 0, TX);
    let r = {
        set(&r, TPPOLL, 1, 0x40);
        assert!(r.sent().is_empty());
        // Half a packet moves along.
        r.move_state()
    };
    put(
        &r,
        TX_RING + 16,
        OWN | EOR | 1 << 28 | 400,
        1 << 17 | 0x0500,
        TX + 100,
    );
    set(&r, TPPOLL, 1, 0x40);
    let mut expected = data;
    expected.splice(12..12, [0x81, 0, 0, 5]);
    assert_eq!(r.sent()[0].0, expected);
    assert_eq!(opts1(&r, TX_RING + 16) & OWN, 0);
    assert_ne!(get(&r, ISR, 2) & ISR_TOK, 0);
}

#[test]
fn segmentation_gives_the_frames_of_a_stack() {
    let r = plus_driver();
    let payload: Vec<u8> = (0..5000_u32).map(|n| (n / 5) as u8).collect();
    let (whole, given) = sample_segment(false, &payload);
    let mut data = whole.clone();
    data[24..26].fill(0);
    data[50..52].fill(0x77);
    r.memory.write(TX, &data).unwrap();
    let lgsen = 1 << 27 | 1000 << 16;
    put(
        &r,
        TX_RING,
        OWN | EOR | FS_LS | lgsen | data.len() as u32,
        0,
        TX,
    );
    set(&r, TPPOLL, 1, 0x40);
    let (f, o) = r.sent().remove(0);
    let mut cut = [Vec::new(), Vec::new()];
    assert!(offload::complete(&f, &o, &mut |f| cut[0].push(f.to_vec())));
    assert!(offload::complete(&whole, &given, &mut |f| cut[1].push(f.to_vec())));
    assert_eq!(cut[0], cut[1]);
    // Checksums without segmentation.
    let (small, _) = sample_segment(false, b"text that is long enough");
    let mut data = small.clone();
    data[24..26].fill(0);
    data[50..52].fill(0);
    r.memory.write(TX, &data).unwrap();
    let sums = 1 << 18 | 1 << 16;
    put(
        &r,
        TX_RING,
        OWN | EOR | FS_LS | sums | data.len() as u32,
        0,
        TX,
    );
    set(&r, TPPOLL, 1, 0x40);
    let (f, o) = r.sent().remove(0);
    assert_eq!(f, small);
    assert_eq!(o.checksum, given.checksum);
    assert_eq!(o.segment, None);
}

#[test]
fn descriptors_receive() {
    let r = plus_driver();
    assert!(r.ready());
    let (data, o) = sample_segment(false, b"hello");
    let only = Offload { segment: None, ..o };
    let mut good = Vec::new();
    offload::complete(&data, &only, &mut |f| good = f.to_vec());
    good[..6].copy_from_slice(&MAC);
    good.resize(60, 0);
    assert!(r.deliver(&good));
    let status = opts1(&r, RX_RING);
    assert_eq!(status, FS_LS | 1 << 26 | 1 << 16 | 64, "{status:#x}");
    assert_eq!(r.bytes(RX, 60), good);
    assert_eq!(r.bytes(RX + 60, 4), fcs(&good));
    assert!(r.line());
    good[56] ^= 1;
    assert!(r.deliver(&good));
    assert_eq!(opts1(&r, RX_RING + 16) & 0xe000, 0x2000);
    // A tag is taken out; a long packet takes two descriptors, to the end of the ring.
    let mut tagged = frame(MAC, 1600);
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    assert!(r.deliver(&tagged));
    assert_eq!(opts1(&r, RX_RING + 32), 1 << 29 | 1 << 26 | 1604);
    assert_eq!(opts1(&r, RX_RING + 48), EOR | 1 << 28 | 1 << 26 | 1604);
    assert_eq!(r.bytes(RX_RING + 36, 4), [0, 5, 1, 0]);
    assert_eq!(r.bytes(RX + 0x3000, 64), frame(MAC, 1600)[0x600..]);
    // Nothing left; the driver's next access tells of more.
    assert!(!r.ready() && !r.deliver(&good));
    assert_ne!(get(&r, ISR, 2) & ISR_RXOVW, 0);
    r.told();
    give_rx(&r, 0, 0x600);
    set(&r, ISR, 2, 0xffff);
    assert_eq!(r.told(), 1);
    assert!(r.deliver(&frame(MAC, 60)));
}

#[test]
fn timer_link_and_loopback() {
    let r = plus_driver();
    set(&r, TIMERINT, 4, 33_000);
    set(&r, TCTR, 4, 0);
    r.clock.advance(990_000);
    assert!(!r.line());
    r.clock.advance(20_000);
    assert!(r.line());
    assert_eq!(get(&r, ISR, 2), ISR_TIMEOUT);
    assert!((33_000..34_000).contains(&get(&r, TCTR, 4)));
    set(&r, ISR, 2, 0xffff);
    let cable = lock(&r.card).cable();
    cable.set_link(false);
    assert_eq!(get(&r, ISR, 2), ISR_PUN);
    assert_eq!((get(&r, MSR, 1) & 4, get(&r, BMSR, 2) & 4), (4, 0));
    assert!(!r.deliver(&frame(MAC, 60)));
    cable.set_link(true);
    assert_eq!((get(&r, MSR, 1) & 4, get(&r, BMSR, 2) & 4), (0, 4));
    set(&r, TCR, 4, TCR_LBK);
    r.memory.write(TX, &frame(MAC, 80)).unwrap();
    put(&r, TX_RING, OWN | EOR | FS_LS | 80, 0, TX);
    set(&r, TPPOLL, 1, 0x40);
    assert!(r.sent().is_empty());
    assert_eq!(r.bytes(RX, 80), frame(MAC, 80));
    lock(&r.card).pause();
    lock(&r.card).reset();
    assert_eq!(get(&r, CPCR, 2), 0);
}

#[test]
fn rings_that_cannot_be_do_no_harm() {
    let r = plus_driver();
    // A ring without an end that is always the card's.
    for n in 0..64 {
        put(&r, TX_RING + n * 16, OWN | FS_LS | 60, 0, TX);
    }
    set(&r, TPPOLL, 1, 0xc0);
    assert!(r.sent().len() <= 64);
    set(&r, TSAD0 + 4, 4, 0xffff_ffff);
    set(&r, TPPOLL, 1, 0x40);
    set(&r, RDSAR + 4, 4, 0xffff_ffff);
    assert!(!r.ready() && !r.deliver(&frame(MAC, 60)));
}
