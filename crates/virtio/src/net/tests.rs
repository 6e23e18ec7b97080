use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyrite_vdev::Lifecycle;
use pyrite_vdev::bus::lock;

use super::{CTRL, Net, NetConfig, RX, TX};
use crate::testing::{BUFFERS_AT, Bench, LoopbackNet, fuzz_one, noise};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TX_AT: u64 = BUFFERS_AT;
const RX_AT: u64 = BUFFERS_AT + 0x1_0000;
const ALL: u64 = !(1 << 34);

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
