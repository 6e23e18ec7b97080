use std::sync::Arc;

use super::{Balloon, DEFLATE, INFLATE, STATS};
use crate::testing::{BUFFERS_AT, Bench, fuzz_one, noise};

const ALL: u64 = !(1 << 34);
const PFNS: u64 = BUFFERS_AT;
const VICTIM: u64 = BUFFERS_AT + 0x8_0000;

fn bench() -> (super::BalloonControl, Bench) {
    let balloon = Balloon::new().unwrap();
    let control = balloon.control();
    (control, Bench::new(balloon))
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let (control, mut b) = bench();
    b.up(ALL);
    control.set_target(8192);
    assert_eq!(b.config_bytes(0, 4), [2, 0, 0, 0]);
    assert_eq!(b.read_u8(0x1000), 2);
    b.memory.write(VICTIM, &[1; 3 * 4096]).unwrap();
    let first = (VICTIM >> 12) as u32;
    // Two pages downwards, and one that is not RAM.
    let pfns: Vec<u8> = [first + 1, first, u32::MAX]
        .iter()
        .flat_map(|p| p.to_le_bytes())
        .collect();
    b.memory.write(PFNS, &pfns).unwrap();
    b.add(INFLATE, &[(PFNS, 12, false)]);
    b.kick(INFLATE);
    b.wait_used(INFLATE);
    assert_eq!(b.bytes(VICTIM, 8192), [0; 8192]);
    assert_eq!(b.bytes(VICTIM + 8192, 1), [1]);
    b.write(0x2004, &2_u32.to_le_bytes());
    assert_eq!(control.actual(), 8192);
    b.add(DEFLATE, &[(PFNS, 8, false)]);
    b.kick(DEFLATE);
    assert!(b.used(DEFLATE).is_some());
}

#[test]
fn free_pages_reported_are_discarded() {
    let (_, mut b) = bench();
    b.up(ALL);
    b.memory.write(VICTIM, &[1; 4096]).unwrap();
    b.add(3, &[(VICTIM, 4096, true)]);
    b.kick(3);
    b.wait_used(3);
    assert_eq!(b.bytes(VICTIM, 4096), [0; 4096]);
}

#[test]
fn statistics_are_read_and_asked_for_again() {
    let (control, mut b) = bench();
    b.up(ALL);
    let mut stat = 4_u16.to_le_bytes().to_vec();
    stat.extend_from_slice(&1234_u64.to_le_bytes());
    b.memory.write(PFNS, &stat).unwrap();
    assert!(!control.request_stats());
    b.add(STATS, &[(PFNS, 10, false)]);
    b.kick(STATS);
    while control.stats().is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(control.stats(), [(4, 1234)]);
    assert_eq!(b.used(STATS), None);
    // The worker may still hold the buffer for a moment.
    while !control.request_stats() {
        std::thread::yield_now();
    }
    assert!(b.used(STATS).is_some());
}

#[test]
fn state_survives() {
    let (control, mut b) = bench();
    b.up(ALL);
    control.set_target(4096 * 7);
    let balloon = Balloon::new().unwrap();
    let restored = balloon.control();
    b.save_restore_save(&Bench::with_memory(Arc::clone(&b.memory), balloon));
    assert_eq!(restored.target(), 4096 * 7);
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..20 {
        fuzz_one(
            Balloon::new().unwrap(),
            !((seed & 1) << 34),
            &noise(seed, 4000),
        );
    }
}
