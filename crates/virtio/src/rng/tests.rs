use super::Rng;
use crate::testing::{BUFFERS_AT, Bench, fuzz_one, noise};

#[test]
fn host_entropy_fills_the_buffer_up_to_the_limit() {
    let mut b = Bench::new(Rng::new().unwrap());
    b.up(0);
    b.add(0, &[(BUFFERS_AT, 0x4000, true)]);
    b.kick(0);
    assert_eq!(b.used(0).map(|u| u.1), Some(4096));
    assert_ne!(b.bytes(BUFFERS_AT, 32), [0; 32]);
    assert_eq!(b.bytes(BUFFERS_AT + 4096, 32), [0; 32]);
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..40 {
        let device = Rng::from_source(Box::new(std::io::repeat(1)));
        fuzz_one(device, !(1 << 34), &noise(seed, 6000));
        // The packed ring reads the same bytes as other descriptors.
        let device = Rng::from_source(Box::new(std::io::repeat(1)));
        fuzz_one(device, u64::MAX, &noise(seed, 6000));
    }
}
