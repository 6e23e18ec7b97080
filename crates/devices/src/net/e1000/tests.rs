use pyrite_net::Offload;
use pyrite_net::offload::{self, sample_segment};
use pyrite_vdev::bus::lock;
use pyrite_vdev::{Lifecycle, PciFunction};

use super::*;
use crate::net::testing::{MAC, Rig as CardRig, conforms, frame};

type Rig = CardRig<E1000>;

const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;
const RING: u32 = 16;

fn get(r: &Rig, register: u32) -> u32 {
    r.read(0, register.into())
}
fn set(r: &Rig, register: u32, value: u32) {
    r.write(0, register.into(), value);
}

/// What a driver does at first.
fn driver() -> Rig {
    let r = Rig::new().up();
    set(&r, CTRL, CTRL_RST);
    assert_eq!(get(&r, CTRL) & CTRL_RST, 0);
    set(&r, CTRL, CTRL_SLU | CTRL_FD);
    for n in 0..u64::from(RING) {
        let buffer = (RX_BUFFERS + n * 2048).to_le_bytes();
        r.memory.write(RX_RING + n * 16, &buffer).unwrap();
    }
    set(&r, RDBAL, RX_RING as u32);
    set(&r, RDLEN, RING * 16);
    set(&r, RDH, 0);
    set(&r, TDBAL, TX_RING as u32);
    set(&r, TDLEN, RING * 16);
    set(&r, TDH, 0);
    set(&r, TCTL, TCTL_EN | 1 << 3);
    set(&r, RCTL, RCTL_EN | RCTL_BAM);
    set(&r, RDT, RING - 1);
    get(&r, ICR);
    r
}

/// Puts descriptors at the tail and moves it.
fn submit(r: &Rig, descriptors: &[(u64, u32, u32)]) {
    let mut tail = get(r, TDT);
    for (address, low, high) in descriptors {
        let mut d = address.to_le_bytes().to_vec();
        d.extend_from_slice(&low.to_le_bytes());
        d.extend_from_slice(&high.to_le_bytes());
        r.memory.write(TX_RING + u64::from(tail) * 16, &d).unwrap();
        tail = (tail + 1) % RING;
    }
    set(r, TDT, tail);
}

const EOP_RS: u32 = 1 << 24 | 1 << 27;
const DEXT: u32 = 1 << 29;
const DATA: u32 = 1 << 20;
const TSE: u32 = 1 << 26;

fn send(r: &Rig, data: &[u8]) {
    r.memory.write(TX_BUFFERS, data).unwrap();
    submit(r, &[(TX_BUFFERS, data.len() as u32 | EOP_RS, 0)]);
}

/// Descriptor `n` of the receive ring: length, status, errors, special.
fn received(r: &Rig, n: u64) -> (usize, u8, u8, u16) {
    let d = r.bytes(RX_RING + n * 16, 16);
    let word = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
    (word(8).into(), d[12], d[13], word(14))
}

#[test]
fn conforms_to_the_rules_of_devices() {
    let hot = [
        CTRL, EECD, EERD, MDIC, VET, ICR, ITR, ICS, IMS, RCTL, TCTL, RDBAL, RDBAH, RDLEN, RDH, RDT,
        RDTR, RADV, TDBAL, TDLEN, TDH, TDT, TDT, TDT, TIDV, TADV, RXCSUM, MTA, RAL, VFTA,
    ];
    conforms::<E1000>(&hot.map(|r| (0, r.into(), 4)));
}

#[test]
fn eeprom_is_read_both_ways_and_adds_up() {
    let r = Rig::new().up();
    let by_register = |word: u32| {
        set(&r, EERD, word << 8 | EERD_START);
        let v = get(&r, EERD);
        assert_ne!(v & EERD_DONE, 0);
        v >> 16
    };
    let pin = |pins: u32| set(&r, EECD, EECD_REQ | pins);
    let by_pins = |word: u32| {
        pin(0);
        assert_ne!(get(&r, EECD) & (EECD_GNT | EECD_PRES), 0);
        pin(EECD_CS);
        for bit in (0..9).rev() {
            let di = if (0b110 << 6 | word) >> bit & 1 != 0 {
                EECD_DI
            } else {
                0
            };
            pin(EECD_CS | di);
            pin(EECD_CS | di | EECD_SK);
            pin(EECD_CS | di);
        }
        (0..16).fold(0, |value, _| {
            pin(EECD_CS | EECD_SK);
            let bit = u32::from(get(&r, EECD) & EECD_DO != 0);
            pin(EECD_CS);
            value << 1 | bit
        })
    };
    let mut sum = 0_u16;
    for word in 0..64 {
        let v = by_register(word);
        assert_eq!(v, by_pins(word), "word {word}");
        sum = sum.wrapping_add(v as u16);
    }
    assert_eq!(sum, 0xbaba);
    assert_eq!(
        by_register(0),
        u32::from(u16::from_le_bytes([MAC[0], MAC[1]]))
    );
    assert_eq!(
        get(&r, RAL),
        u32::from_le_bytes([MAC[0], MAC[1], MAC[2], MAC[3]])
    );
}

#[test]
fn phy_tells_of_the_cable() {
    let r = driver();
    let phy = |register: u32| {
        set(&r, MDIC, register << 16 | 1 << 21 | 2 << 26);
        let v = get(&r, MDIC);
        assert_ne!(v & MDIC_READY, 0);
        v as u16
    };
    assert_eq!((phy(2), phy(3)), (0x0141, 0x0c20));
    assert_eq!(phy(1) & 0x24, 0x24, "link and negotiated");
    assert_ne!(get(&r, STATUS) & STATUS_LU, 0);
    set(&r, IMS, ICR_LSC);
    let cable = lock(&r.card).cable();
    cable.set_link(false);
    assert!(r.line());
    assert_eq!(phy(1) & 4, 0);
    assert_eq!(get(&r, STATUS) & STATUS_LU, 0);
    assert!(!r.ready() && !r.deliver(&frame(MAC, 60)));
    send(&r, &frame(MAC, 60));
    assert!(r.sent().is_empty());
    assert_eq!(get(&r, ICR) & ICR_LSC, ICR_LSC);
    assert!(!r.line());
    cable.set_link(true);
    assert!(r.line() && r.ready());
    // Another address on MDIO has nobody.
    set(&r, MDIC, 1 << 16 | 2 << 21 | 2 << 26);
    assert_ne!(get(&r, MDIC) & MDIC_ERROR, 0);
}

#[test]
fn legacy_descriptors_send() {
    let r = driver();
    set(&r, IMS, ICR_TXDW);
    send(&r, &frame([1; 6], 100));
    assert_eq!(r.sent(), [(frame([1; 6], 100), Offload::NONE)]);
    assert_eq!(r.bytes(TX_RING + 12, 1)[0] & 1, 1, "DD");
    assert!(r.line());
    assert_eq!(get(&r, ICR), ICR_TXDW | ICR_TXQE);
    assert!(!r.line());
    // In three pieces, with a checksum over the last two bytes, and padded.
    let data = frame([1; 6], 30);
    r.memory.write(TX_BUFFERS, &data).unwrap();
    submit(
        &r,
        &[
            (TX_BUFFERS, 10, 0),
            (TX_BUFFERS + 10, 10, 0),
            (TX_BUFFERS + 20, 10 | 20 << 16 | EOP_RS | 1 << 26, 28 << 8),
        ],
    );
    let mut whole = data.clone();
    let sum = !u16::from_be_bytes([data[28], data[29]]);
    whole[20..22].copy_from_slice(&sum.to_be_bytes());
    whole.resize(60, 0);
    assert_eq!(r.sent()[0].0, whole);
    assert_eq!(get(&r, GPTC), 2);
    assert_eq!(get(&r, GPTC), 0, "statistics are cleared by reading");
}

/// A context descriptor for the sample's headers.
fn context(v6: bool, segment: bool, payload: usize, mss: u16) -> (u64, u32, u32) {
    let (ip, tcp) = if v6 { (14, 54) } else { (14, 34_u64) };
    let address = ip | (ip + 10) << 8 | (tcp - 1) << 16 | tcp << 32 | (tcp + 16) << 40;
    let tucmd = 1 << 24 | u32::from(!v6) << 25 | if segment { TSE } else { 0 };
    let low = payload as u32 | tucmd | DEXT;
    (address, low, (tcp as u32 + 20) << 8 | u32::from(mss) << 16)
}

#[test]
fn segmentation_gives_the_frames_of_a_stack() {
    for v6 in [false, true] {
        let r = driver();
        let payload: Vec<u8> = (0..5000_u32).map(|n| (n / 5) as u8).collect();
        let (whole, given) = sample_segment(v6, &payload);
        // As drivers give it: no lengths.
        let mut data = whole.clone();
        let (length_at, tcp) = if v6 { (18, 54) } else { (16, 34) };
        data[length_at..length_at + 2].fill(0);
        data[tcp + 16..tcp + 18].fill(0x55);
        r.memory.write(TX_BUFFERS, &data).unwrap();
        let head = tcp as u32 + 20;
        submit(
            &r,
            &[
                context(v6, true, 5000, 1000),
                (TX_BUFFERS, head | DATA | DEXT | TSE, 3 << 8),
                (
                    TX_BUFFERS + u64::from(head),
                    5000 | DATA | DEXT | TSE | EOP_RS,
                    3 << 8,
                ),
            ],
        );
        let sent = r.sent();
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].1, given);
        let mut cut = [Vec::new(), Vec::new()];
        for ((f, o), out) in [(&sent[0].0, &sent[0].1), (&whole, &given)]
            .iter()
            .zip(&mut cut)
        {
            assert!(offload::complete(f, o, &mut |f| out.push(f.to_vec())));
        }
        assert_eq!(cut[0], cut[1]);
        assert_eq!(cut[0].len(), 5);
        assert_eq!(get(&r, TSCTC), 1);
    }
}

#[test]
fn checksums_are_left_to_the_back_end_or_filled_in() {
    let r = driver();
    let (data, _) = sample_segment(false, b"some text");
    r.memory.write(TX_BUFFERS, &data).unwrap();
    let mut c = context(false, false, 0, 0);
    submit(
        &r,
        &[
            c,
            (TX_BUFFERS, data.len() as u32 | DATA | DEXT | EOP_RS, 2 << 8),
        ],
    );
    let (f, o) = r.sent().remove(0);
    assert_eq!(
        (o.checksum.map(|c| (c.start, c.offset)), o.segment),
        (Some((34, 16)), None)
    );
    assert_eq!(
        f,
        [&data[..], &[0; 60][..60_usize.saturating_sub(data.len())]].concat()
    );
    // With an end before the packet's the card does it itself.
    c.0 |= 40 << 48;
    submit(
        &r,
        &[
            c,
            (TX_BUFFERS, data.len() as u32 | DATA | DEXT | EOP_RS, 2 << 8),
        ],
    );
    let (f, o) = r.sent().remove(0);
    assert!(o.is_none());
    assert_eq!(
        f[50..52],
        (!offload::ones_sum(&data[34..=40])).to_be_bytes()
    );
}

#[test]
fn frames_arrive_and_the_back_end_waits_for_buffers() {
    let r = driver();
    set(&r, IMS, ICR_RXT0 | ICR_RXO);
    assert!(r.ready());
    assert!(r.deliver(&frame(MAC, 100)));
    assert!(r.line());
    // With the FCS.
    assert_eq!(received(&r, 0), (104, 0x07, 0, 0));
    assert_eq!(r.bytes(RX_BUFFERS, 100), frame(MAC, 100));
    assert_eq!(get(&r, ICR) & ICR_RXT0, ICR_RXT0);
    // Short ones are padded, others' are not taken.
    assert!(r.deliver(&frame(MAC, 20)));
    assert_eq!(received(&r, 1).0, 64);
    assert!(r.deliver(&frame([2, 0, 0, 0, 0, 7], 100)));
    assert!(r.deliver(&frame([0xff; 6], 100)));
    assert_eq!(received(&r, 2).0, 104);
    for _ in 3..RING - 1 {
        assert!(r.deliver(&frame(MAC, 60)));
    }
    assert!(!r.deliver(&frame(MAC, 60)));
    assert_ne!(get(&r, ICR) & ICR_RXO, 0);
    assert!(!r.ready());
    r.told();
    set(&r, RDT, 3);
    assert_eq!(r.told(), 1);
    assert!(r.ready() && r.deliver(&frame(MAC, 60)));
    assert_eq!(get(&r, GPRC), RING);
    assert_eq!(get(&r, MPC), 1);
}

#[test]
fn long_frames_are_spread_over_buffers() {
    let r = driver();
    let long = frame(MAC, 4000);
    assert!(r.deliver(&long));
    assert_eq!(get(&r, RDH), 0, "a long packet without LPE");
    set(&r, RCTL, RCTL_EN | RCTL_LPE);
    // 4096 bytes with the FCS would need two buffers; 4094 leave the FCS in pieces.
    let long = frame(MAC, 4094);
    assert!(r.deliver(&long));
    assert_eq!(received(&r, 0), (2048, 0x05, 0, 0));
    assert_eq!(received(&r, 1), (2048, 0x05, 0, 0));
    assert_eq!(received(&r, 2), (2, 0x07, 0, 0));
    assert_eq!(r.bytes(RX_BUFFERS, 4094), long);
    let check = crate::net::fcs::fcs(&long);
    assert_eq!(r.bytes(RX_BUFFERS + 4094, 4), check);
}

#[test]
fn filters_do_what_they_are_told() {
    let r = driver();
    let group = [0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb];
    let tagged = |id: u16| {
        let mut f = frame(MAC, 100);
        let [a, b] = id.to_be_bytes();
        f.splice(12..12, [0x81, 0, a, b]);
        f
    };
    let taken = |f: &[u8]| {
        let before = get(&r, RDH);
        assert!(r.deliver(f));
        let after = get(&r, RDH);
        if after != before {
            set(&r, RDT, before);
        }
        after != before
    };
    assert!(!taken(&frame(group, 80)));
    // 12 bits of the last two bytes, from bit 4 on: FB00H >> 4.
    set(&r, MTA + (0xfb0 >> 5) * 4, 1 << (0xfb0 & 31));
    assert!(taken(&frame(group, 80)));
    set(&r, MTA + (0xfb0 >> 5) * 4, 0);
    assert!(!taken(&frame(group, 80)));
    set(&r, RCTL, RCTL_EN | RCTL_MPE);
    assert!(taken(&frame(group, 80)));
    set(&r, RCTL, RCTL_EN | RCTL_UPE);
    assert!(taken(&frame([2, 0, 0, 0, 0, 7], 80)));
    // A second address.
    set(&r, RCTL, RCTL_EN);
    set(&r, RAL + 8, u32::from_le_bytes([2, 0, 0, 0]));
    set(&r, RAL + 12, u32::from_le_bytes([0, 7, 0, 0x80]));
    assert!(taken(&frame([2, 0, 0, 0, 0, 7], 80)));
    // VLANs.
    assert!(taken(&tagged(5)));
    set(&r, RCTL, RCTL_EN | RCTL_VFE);
    assert!(!taken(&tagged(5)));
    set(&r, VFTA, 1 << 5);
    assert!(taken(&tagged(5)));
    set(&r, CTRL, get(&r, CTRL) | CTRL_VME);
    let at = get(&r, RDH);
    assert!(taken(&tagged(5)));
    let (len, status, _, special) = received(&r, at.into());
    assert_eq!((len, status & 8, special), (104, 8, 5));
    assert_eq!(
        r.bytes(RX_BUFFERS + u64::from(at) * 2048, 100),
        frame(MAC, 100)
    );
    // And out.
    let data = frame([1; 6], 100);
    r.memory.write(TX_BUFFERS, &data).unwrap();
    submit(&r, &[(TX_BUFFERS, 100 | EOP_RS | 1 << 30, 5 << 16)]);
    let mut expected = data;
    expected.splice(12..12, [0x81, 0, 0, 5]);
    assert_eq!(r.sent()[0].0, expected);
}

#[test]
fn received_checksums_are_looked_at() {
    let r = driver();
    set(&r, RXCSUM, RXCSUM_IPOFLD | RXCSUM_TUOFLD);
    set(&r, RCTL, RCTL_EN | RCTL_UPE);
    let (data, o) = sample_segment(false, b"hello");
    let only = Offload { segment: None, ..o };
    let mut good = Vec::new();
    offload::complete(&data, &only, &mut |f| good = f.to_vec());
    assert!(r.deliver(&good));
    assert_eq!((received(&r, 0).1, received(&r, 0).2), (0x63, 0));
    let mut bad = good.clone();
    bad[56] ^= 1;
    assert!(r.deliver(&bad));
    assert_eq!((received(&r, 1).1, received(&r, 1).2), (0x63, 0x20));
    good[20] ^= 1;
    assert!(r.deliver(&good));
    assert_eq!(received(&r, 2).2 & 0x40, 0x40);
}

#[test]
fn interrupts_are_throttled_and_delayed() {
    let r = driver();
    set(&r, IMS, ICR_RXT0 | ICR_TXDW);
    set(&r, ITR, 200); // 51.2 µs
    assert!(r.deliver(&frame(MAC, 60)));
    assert!(r.line());
    get(&r, ICR);
    assert!(r.deliver(&frame(MAC, 60)));
    assert!(!r.line(), "too early");
    r.clock.advance(51_000);
    assert!(!r.line());
    r.clock.advance(300);
    assert!(r.line());
    get(&r, ICR);
    set(&r, ITR, 0);
    r.clock.advance(100_000);
    // Receive delay: as long as frames keep coming, up to RADV.
    set(&r, RDTR, 10);
    set(&r, RADV, 25);
    for _ in 0..3 {
        assert!(r.deliver(&frame(MAC, 60)));
        r.clock.advance(8_000);
        assert!(!r.line());
    }
    let saved = r.move_state();
    saved.clock.advance(2_000);
    assert!(saved.line(), "absolute limit, also after a restore");
    get(&saved, ICR);
    // Transmit delay only where the descriptor allows it.
    set(&saved, TIDV, 10);
    saved.memory.write(TX_BUFFERS, &frame(MAC, 60)).unwrap();
    submit(&saved, &[(TX_BUFFERS, 60 | EOP_RS | 1 << 31, 0)]);
    assert!(!saved.line());
    saved.clock.advance(11_000);
    assert!(saved.line());
}

#[test]
fn loopback_stays_in_the_card() {
    let r = driver();
    set(&r, MDIC, 0x4140 | 1 << 21 | 1 << 26);
    send(&r, &frame(MAC, 200));
    assert!(r.sent().is_empty());
    assert_eq!(r.bytes(RX_BUFFERS, 200), frame(MAC, 200));
    assert!(r.deliver(&frame(MAC, 60)));
    assert_eq!(get(&r, RDH), 1);
}

#[test]
fn rings_that_cannot_be_do_no_harm() {
    let r = driver();
    // A tail beyond the ring.
    set(&r, TDT, 0xffff);
    assert!(r.sent().len() <= RING as usize);
    set(&r, RDT, 0xffff);
    assert!(!r.deliver(&frame(MAC, 60)));
    // A ring that is not in memory.
    set(&r, RDT, 4);
    set(&r, RDBAH, 0xffff_ffff);
    r.deliver(&frame(MAC, 60));
    set(&r, TDBAH, 0xffff_ffff);
    set(&r, TDT, 3);
    // Without bus mastering nothing moves, and goes on with it.
    let r = driver();
    lock(&r.card).config_write(4, &3_u16.to_le_bytes());
    send(&r, &frame(MAC, 60));
    assert!(r.sent().is_empty() && !r.ready());
    lock(&r.card).config_write(4, &7_u16.to_le_bytes());
    assert_eq!(r.sent().len(), 1);
}

#[test]
fn a_packet_in_pieces_survives_save_and_restore() {
    let r = driver();
    let data = frame([1; 6], 300);
    r.memory.write(TX_BUFFERS, &data).unwrap();
    submit(&r, &[(TX_BUFFERS, 100, 0)]);
    let r = r.move_state();
    submit(&r, &[(TX_BUFFERS + 100, 200 | EOP_RS, 0)]);
    assert_eq!(r.sent()[0].0, data);
    lock(&r.card).pause();
    lock(&r.card).reset();
    assert_eq!(get(&r, TDLEN), 0);
}

#[test]
fn registers_are_reached_through_ports() {
    let r = driver();
    r.write(2, 0, RAL);
    assert_eq!(r.read(2, 4), get(&r, RAL));
    r.write(2, 0, ITR);
    r.write(2, 4, 77);
    assert_eq!(get(&r, ITR), 77);
}
