use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyrite_net::offload::sample_segment;
use pyrite_vdev::Lifecycle;
use pyrite_vdev::bus::lock;

use pyrite_net::Cable;

use super::{Net, NetConfig, TX};
use crate::testing::{BUFFERS_AT, Bench, LoopbackNet, fuzz_one, noise};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TX_AT: u64 = BUFFERS_AT;
const RX_AT: u64 = BUFFERS_AT + 0x1_0000;
const ALL: u64 = !(1 << 34);
const RX: usize = 0;
const CTRL: usize = 2;

fn bench() -> (Arc<LoopbackNet>, Bench) {
    let net = Arc::new(LoopbackNet::default());
    let b = Bench::new(Net::new(Arc::clone(&net) as _, NetConfig::new(MAC)));
    (net, b)
}

fn frame(len: usize) -> Vec<u8> {
    let mut f: Vec<u8> = MAC.to_vec();
    f.extend((6..len).map(|n| n as u8));
    f
}

fn send(b: &mut Bench, frame: &[u8]) {
    b.memory.fill_zero(TX_AT, 12).unwrap();
    b.memory.write(TX_AT + 12, frame).unwrap();
    b.add(
        TX,
        &[(TX_AT, 12, false), (TX_AT + 12, frame.len() as u32, false)],
    );
    b.kick(TX);
    assert!(b.used(TX).is_some());
}

fn command(b: &mut Bench, bytes: &[u8]) -> u8 {
    b.memory.write(TX_AT, bytes).unwrap();
    b.add(
        CTRL,
        &[(TX_AT, bytes.len() as u32, false), (RX_AT, 1, true)],
    );
    b.kick(CTRL);
    assert_eq!(b.used(CTRL).map(|u| u.1), Some(1));
    b.bytes(RX_AT, 1)[0]
}

#[test]
fn frame_goes_out_and_comes_back() {
    let (net, mut b) = bench();
    b.up(ALL);
    b.add(RX, &[(RX_AT, 2000, true)]);
    send(&mut b, &frame(100));
    assert_eq!(net.sent.load(Ordering::SeqCst), 1);
    assert_eq!(b.used(RX).map(|u| u.1), Some(112));
    assert_eq!(b.bytes(RX_AT, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(b.bytes(RX_AT + 12, 100), frame(100));
}

#[test]
fn large_frame_is_merged_from_several_buffers() {
    let (net, mut b) = bench();
    b.up(ALL);
    for n in 0..2 {
        b.add(RX, &[(RX_AT + 0x1000 * n, 0x400, true)]);
    }
    // Not enough yet: the buffers stay where they are.
    assert!(!net.deliver(&frame(3000)));
    assert_eq!(b.used(RX), None);
    b.add(RX, &[(RX_AT + 0x2000, 0x400, true)]);
    assert!(net.deliver(&frame(3000)));
    let lens: Vec<u32> = (0..3).filter_map(|_| b.used(RX)).map(|u| u.1).collect();
    assert_eq!(lens, [1024, 1024, 3012 - 2048]);
    assert_eq!(b.bytes(RX_AT + 10, 2), [3, 0]);
    assert_eq!(b.bytes(RX_AT + 0x1000, 4), frame(3000)[1012..1016]);
}

#[test]
fn backend_hears_of_new_buffers_after_it_found_none() {
    let (net, mut b) = bench();
    b.up(0);
    assert!(!net.ready());
    send(&mut b, &frame(60));
    assert_eq!(lock(&net.waiting).len(), 1);
    b.add(RX, &[(RX_AT, 2000, true)]);
    b.kick(RX);
    assert_eq!(b.used(RX).map(|u| u.1), Some(72));
    // Without mergeable buffers a frame that does not fit never will: it is dropped.
    b.add(RX, &[(RX_AT, 100, true)]);
    assert!(net.deliver(&frame(1000)));
    assert_eq!(b.used(RX), None);
    assert!(net.ready());
}

#[test]
fn filter_follows_the_commands() {
    let (net, mut b) = bench();
    b.up(ALL);
    b.add(RX, &[(RX_AT + 0x100, 2000, true)]);
    let mut other = frame(60);
    other[0] = 6;
    assert_eq!(command(&mut b, &[0, 0, 0]), 0);
    assert!(net.deliver(&other));
    assert_eq!(b.used(RX), None);
    // The table lets it in.
    let mut table = vec![1, 0, 1, 0, 0, 0];
    table.extend_from_slice(&other[..6]);
    table.extend_from_slice(&[0; 4]);
    assert_eq!(command(&mut b, &table), 0);
    assert!(net.deliver(&other));
    assert!(b.used(RX).is_some());
    assert_eq!(command(&mut b, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    assert_eq!(b.config_bytes(0, 6), [2, 0, 0, 0, 0, 9]);
    // Malformed: a table that is cut off, an unknown class, nothing.
    assert_eq!(command(&mut b, &[1, 0, 255, 255, 255, 255]), 1);
    assert_eq!(command(&mut b, &[99, 0]), 1);
    assert_eq!(command(&mut b, &[0]), 1);
}

#[test]
fn link_state_is_told_and_stops_frames() {
    let net = Arc::new(LoopbackNet::default());
    let card = Net::new(Arc::clone(&net) as _, NetConfig::new(MAC));
    let control = card.control();
    let mut b = Bench::new(card);
    b.up(ALL);
    b.add(RX, &[(RX_AT, 2000, true)]);
    assert_eq!(b.config_bytes(6, 2), [1, 0]);
    let generation = b.read_u8(21);
    control.set_link(false);
    assert_ne!(b.read_u8(21), generation);
    assert_eq!(b.read_u8(0x1000), 2);
    assert_eq!(b.config_bytes(6, 2), [0, 0]);
    assert!(!net.deliver(&frame(60)));
}

#[test]
fn odd_frames_are_dropped() {
    let (net, mut b) = bench();
    b.up(ALL);
    b.add(TX, &[(TX_AT, 5, false)]);
    b.add(TX, &[(TX_AT, 0x2_0000, false)]);
    b.kick(TX);
    assert!(b.used(TX).is_some() && b.used(TX).is_some());
    assert_eq!(net.sent.load(Ordering::SeqCst), 0);
    assert!(!net.deliver(&[0; 3]));
    assert_eq!(b.status(), 15);
}

#[test]
fn restored_guest_is_asked_to_announce_itself() {
    let (_, mut b) = bench();
    b.up(ALL);
    assert_eq!(command(&mut b, &[0, 1, 1]), 0);
    let net = Arc::new(LoopbackNet::default());
    let device = Net::new(Arc::clone(&net) as _, NetConfig::new(MAC));
    let mut other = Bench::with_memory(Arc::clone(&b.memory), device);
    b.save_restore_save(&other);
    assert!(!net.ready());
    std::mem::swap(&mut other.rings, &mut b.rings);
    lock(&other.device).start();
    assert_eq!(other.config_bytes(6, 1), [3]);
    assert_eq!(command(&mut other, &[3, 0]), 0);
    assert_eq!(other.config_bytes(6, 1), [1]);
}

/// Sends a frame behind a header.
fn send_with(b: &mut Bench, queue: usize, header: &[u8; 12], frame: &[u8]) {
    b.memory.write(TX_AT, header).unwrap();
    b.memory.write(TX_AT + 12, frame).unwrap();
    b.add(queue, &[(TX_AT, 12 + frame.len() as u32, false)]);
    b.kick(queue);
    assert!(b.used(queue).is_some());
}

#[test]
fn segments_go_out_whole_and_come_back_as_the_driver_wants_them() {
    for v6 in [false, true] {
        let (net, mut b) = bench();
        b.up(ALL);
        let (segment, offload) = sample_segment(v6, &[7; 5000]);
        let (start, _) = pyrite_net::vnet::encode(&segment, &offload).unwrap();
        let mut header = [0; 12];
        header[..10].copy_from_slice(&start);
        b.add(RX, &[(RX_AT, 8000, true)]);
        send_with(&mut b, TX, &header, &segment);
        // The other end of the cable is the card itself.
        assert_eq!(net.sent.load(Ordering::SeqCst), 1);
        assert_eq!(b.used(RX).map(|u| u.1), Some(segment.len() as u32 + 12));
        assert_eq!(b.bytes(RX_AT, 10), start);
        assert_eq!(b.bytes(RX_AT + 12, segment.len()), segment);
        // Turned off, the guest gets frames of a wire.
        assert_eq!(command(&mut b, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
        for n in 0..6 {
            b.add(RX, &[(RX_AT + n * 0x800, 2000, true)]);
        }
        send_with(&mut b, TX, &header, &segment);
        for n in 0..5 {
            let (id, len) = b.used(RX).map(|u| (u.0, u.1)).unwrap();
            let f = b.bytes(RX_AT + n * 0x800 + 12, len as usize - 12);
            let h = pyrite_net::offload::headers(&f).unwrap();
            assert_eq!(h.transport_checksum_right(&f), Some(true), "{n} {id}");
            assert_eq!(b.bytes(RX_AT + n * 0x800, 1), [0]);
        }
        // What was not negotiated cannot be turned on.
        assert_eq!(command(&mut b, &[5, 0, 0, 4, 0, 0, 0, 0, 0, 0]), 1);
    }
}

#[test]
fn headers_that_were_not_negotiated_are_dropped() {
    let (net, mut b) = bench();
    b.up(ALL & !(1 << 11 | 1 << 0));
    let (segment, offload) = sample_segment(false, &[7; 5000]);
    let (start, _) = pyrite_net::vnet::encode(&segment, &offload).unwrap();
    let mut header = [0; 12];
    header[..10].copy_from_slice(&start);
    send_with(&mut b, TX, &header, &segment);
    header[1] = 0;
    send_with(&mut b, TX, &header, &segment);
    header[0] = 0;
    header[1] = 3;
    send_with(&mut b, TX, &header, &segment);
    assert_eq!(net.sent.load(Ordering::SeqCst), 0);
}

#[test]
fn flows_come_back_in_the_pair_that_sends_them() {
    let net = Arc::new(LoopbackNet::default());
    let config = NetConfig {
        pairs: 2,
        ..NetConfig::new(MAC)
    };
    let mut b = Bench::new(Net::new(Arc::clone(&net) as _, config.clone()));
    b.up(ALL);
    assert_eq!(b.config_bytes(8, 2), [2, 0]);
    let control = 4;
    let pairs = |b: &mut Bench, n: u8| {
        b.memory.write(TX_AT, &[4, 0, n, 0]).unwrap();
        b.add(control, &[(TX_AT, 4, false), (RX_AT, 1, true)]);
        b.kick(control);
        assert!(b.used(control).is_some());
        b.bytes(RX_AT, 1)[0]
    };
    assert_eq!(
        (pairs(&mut b, 0), pairs(&mut b, 3), pairs(&mut b, 2)),
        (1, 1, 0)
    );
    let (f, _) = sample_segment(false, b"hello");
    for (rx, tx) in [(0, 1), (2, 3), (0, 1)] {
        b.add(rx, &[(RX_AT, 2000, true)]);
        send_with(&mut b, tx, &[0; 12], &f);
        assert!(b.used(rx).is_some(), "{rx}");
    }
    // The number of pairs moves along.
    let net = Arc::new(LoopbackNet::default());
    let other = Bench::with_memory(Arc::clone(&b.memory), Net::new(net, config));
    b.save_restore_save(&other);
    // Without the feature there is one pair, and the control queue comes after it.
    let mut b = Bench::new(Net::new(
        Arc::new(LoopbackNet::default()),
        NetConfig {
            pairs: 2,
            ..NetConfig::new(MAC)
        },
    ));
    b.up(ALL & !(1 << 22));
    assert_eq!(command(&mut b, &[0, 1, 1]), 0);
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..40 {
        let net = Arc::new(LoopbackNet::default());
        fuzz_one(
            Net::new(net, NetConfig::new(MAC)),
            !((seed & 1) << 34),
            &noise(seed, 6000),
        );
    }
}
