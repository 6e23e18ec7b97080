use std::sync::atomic::Ordering;

use pyrite_mem::GuestMemory;

use super::*;

const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const BUFFER: u64 = 0x1_0000;
const SIZE: u16 = 8;

fn queue(packed: bool, event_idx: bool) -> (GuestMemory, Queue) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let mut q = Queue::new(16);
    q.configure(|s| {
        (s.size, s.desc, s.driver, s.device) = (SIZE, DESC, DRIVER, DEVICE);
    });
    q.enable(&memory, packed, event_idx, true).unwrap();
    (memory, q)
}

fn put(memory: &GuestMemory, at: u64, addr: u64, len: u32, a: u16, b: u16) {
    let mut d = addr.to_le_bytes().to_vec();
    d.extend_from_slice(&len.to_le_bytes());
    d.extend_from_slice(&a.to_le_bytes());
    d.extend_from_slice(&b.to_le_bytes());
    memory.write(at, &d).unwrap();
}

/// Split: descriptors from 0 on, one chain with head 0.
fn offer(memory: &GuestMemory, descriptors: &[(u64, u32, u16, u16)]) {
    for (n, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
        put(memory, DESC + 16 * n as u64, addr, len, flags, next);
    }
    memory.write(DRIVER + 4, &[0, 0]).unwrap();
    memory.store_u16(DRIVER + 2, 1, Ordering::Release).unwrap();
}

fn pop_error(descriptors: &[(u64, u32, u16, u16)]) -> QueueError {
    let (memory, mut q) = queue(false, false);
    offer(&memory, descriptors);
    q.pop(&memory).unwrap_err()
}

#[test]
fn chain_of_several_buffers_is_read_and_written_across_them() {
    let (memory, mut q) = queue(false, false);
    memory.write(BUFFER, b"abcdef").unwrap();
    // A descriptor of no bytes in the middle counts for nothing.
    offer(
        &memory,
        &[
            (BUFFER, 2, 1, 1),
            (0, 0, 1, 2),
            (BUFFER + 2, 4, 1, 3),
            (BUFFER + 0x100, 3, 3, 4),
            (BUFFER + 0x200, 8, 2, 0),
        ],
    );
    let c = q.pop(&memory).unwrap().unwrap();
    assert_eq!((c.readable_len(), c.writable_len()), (6, 11));
    let mut b = [0; 8];
    assert_eq!(c.read_at(&memory, 1, &mut b), 5);
    assert_eq!(&b[..5], b"bcdef");
    assert_eq!(c.write_at(&memory, 1, b"vwxyz"), 5);
    assert_eq!(
        memory.read_u32(BUFFER + 0x200).unwrap().to_le_bytes(),
        *b"xyz\0"
    );
    assert_eq!(c.write_at(&memory, 10, b"123"), 1);
    assert!(q.push(&memory, &c, 6).unwrap());
    assert_eq!(memory.read_u32(DEVICE).unwrap() >> 16, 1);
    assert!(q.pop(&memory).unwrap().is_none());
}

#[test]
fn malformed_chains_are_errors() {
    assert!(matches!(
        pop_error(&[(BUFFER, 1, 1, 0)]),
        QueueError::ChainTooLong
    ));
    assert!(matches!(
        pop_error(&[(BUFFER, 1, 1, 99)]),
        QueueError::DescriptorIndex { .. }
    ));
    assert!(matches!(
        pop_error(&[(1 << 40, 1, 0, 0)]),
        QueueError::Memory(_)
    ));
    assert!(matches!(
        pop_error(&[(u64::MAX, 2, 0, 0)]),
        QueueError::Memory(_)
    ));
    assert!(matches!(
        pop_error(&[(0, u32::MAX, 0, 0)]),
        QueueError::Memory(_)
    ));
    assert!(matches!(
        pop_error(&[(BUFFER, 1, 3, 1), (BUFFER, 1, 0, 0)]),
        QueueError::Order
    ));
    // Indirect: with NEXT, of odd length, empty, outside RAM.
    for d in [
        (TABLE, 16, 5, 0),
        (TABLE, 15, 4, 0),
        (TABLE, 0, 4, 0),
        (1 << 50, 16, 4, 0),
    ] {
        assert!(matches!(pop_error(&[d]), QueueError::Indirect));
    }
}

#[test]
fn indirect_tables_are_walked_but_not_in_circles_or_nested() {
    let (memory, mut q) = queue(false, false);
    put(&memory, TABLE, BUFFER, 4, 1, 1);
    put(&memory, TABLE + 16, BUFFER, 4, 2, 0);
    offer(&memory, &[(TABLE, 32, 4, 0)]);
    let c = q.pop(&memory).unwrap().unwrap();
    assert_eq!((c.readable_len(), c.writable_len()), (4, 4));
    for (flags, next) in [(1, 0), (4, 0), (1, 2)] {
        let (memory, mut q) = queue(false, false);
        put(&memory, TABLE, BUFFER, 4, 1, 1);
        put(&memory, TABLE + 16, BUFFER, 4, flags, next);
        offer(&memory, &[(TABLE, 32, 4, 0)]);
        assert!(q.pop(&memory).is_err());
    }
}

#[test]
fn avail_index_that_runs_away_is_an_error() {
    let (memory, mut q) = queue(false, false);
    memory
        .store_u16(DRIVER + 2, SIZE + 1, Ordering::Release)
        .unwrap();
    assert!(matches!(q.pop(&memory), Err(QueueError::AvailIndex { .. })));
}

#[test]
fn rings_outside_ram_or_of_wrong_size_are_refused() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    for (size, desc, driver, device) in [
        (0, DESC, DRIVER, DEVICE),
        (6, DESC, DRIVER, DEVICE),
        (32, DESC, DRIVER, DEVICE),
        (8, DESC + 8, DRIVER, DEVICE),
        (8, DESC, (1 << 20) - 4, DEVICE),
        (8, DESC, DRIVER, u64::MAX - 3),
    ] {
        let mut q = Queue::new(16);
        q.configure(|s| (s.size, s.desc, s.driver, s.device) = (size, desc, driver, device));
        assert!(q.enable(&memory, false, false, false).is_err());
        assert!(!q.ready());
    }
}

#[test]
fn event_idx_signals_only_when_the_event_is_passed() {
    let (memory, mut q) = queue(false, true);
    let used_event = DRIVER + 4 + 2 * u64::from(SIZE);
    put(&memory, DESC, BUFFER, 4, 2, 0);
    memory.store_u16(used_event, 1, Ordering::SeqCst).unwrap();
    let mut signals = Vec::new();
    for n in 1..=4 {
        memory.store_u16(DRIVER + 2, n, Ordering::Release).unwrap();
        let c = q.pop(&memory).unwrap().unwrap();
        q.push(&memory, &c, 0).unwrap();
        signals.push(q.needs_signal(&memory).unwrap());
        // Nothing new: nothing to say.
        assert!(!q.needs_signal(&memory).unwrap());
    }
    // The first is unconditional; then event 1 is passed by used index 2.
    assert_eq!(signals, [true, true, false, false]);
    assert!(q.pop(&memory).unwrap().is_none());
    let avail_event = DEVICE + 4 + 8 * u64::from(SIZE);
    assert_eq!(memory.load_u16(avail_event, Ordering::SeqCst).unwrap(), 4);
}

#[test]
fn chain_given_back_is_taken_again_and_late_completion_after_reset_is_dropped() {
    for packed in [false, true] {
        let (memory, mut q) = queue(packed, false);
        if packed {
            put(&memory, DESC, BUFFER, 4, 7, 1 << 7);
        } else {
            offer(&memory, &[(BUFFER, 4, 0, 0)]);
        }
        let c = q.pop(&memory).unwrap().unwrap();
        q.unpop(c);
        let c = q.pop(&memory).unwrap().unwrap();
        assert!(q.pop(&memory).unwrap().is_none());
        q.reset();
        assert!(!q.push(&memory, &c, 4).unwrap());
    }
}

/// A driver of a packed ring with one buffer a chain, of two descriptors.
#[test]
fn packed_ring_wraps_and_signals() {
    for event_idx in [false, true] {
        let (memory, mut q) = queue(true, event_idx);
        let (mut at, mut wrap) = (0_u16, true);
        let (mut used_at, mut used_wrap) = (0_u16, true);
        let step = |at: &mut u16, wrap: &mut bool| {
            *at += 1;
            if *at == SIZE {
                (*at, *wrap) = (0, !*wrap);
            }
        };
        for round in 0..30_u16 {
            let first = (at, wrap);
            let mut first_flags = 0;
            for n in 0..3 {
                let bits = if wrap { 1 << 7 } else { 1 << 15 };
                let flags = bits | u16::from(n < 2) | u16::from(n == 2) << 1;
                let addr = BUFFER + 0x100 * n;
                let slot = DESC + 16 * u64::from(at);
                // The first descriptor's flags are written last.
                let now = if n == 0 { bits ^ 0x8080 } else { flags };
                if n == 0 {
                    first_flags = flags;
                }
                put(&memory, slot, addr, 4, round, now);
                step(&mut at, &mut wrap);
            }
            assert!(q.pop(&memory).unwrap().is_none());
            memory
                .store_u16(
                    DESC + 16 * u64::from(first.0) + 14,
                    first_flags,
                    Ordering::Release,
                )
                .unwrap();
            let c = q.pop(&memory).unwrap().unwrap();
            assert_eq!((c.readable_len(), c.writable_len()), (8, 4));
            // The driver waits for just this buffer.
            let off_wrap = used_at | u16::from(used_wrap) << 15;
            memory
                .store_u16(DRIVER, off_wrap, Ordering::SeqCst)
                .unwrap();
            memory
                .store_u16(DRIVER + 2, if event_idx { 2 } else { 0 }, Ordering::SeqCst)
                .unwrap();
            q.push(&memory, &c, 4).unwrap();
            assert!(q.needs_signal(&memory).unwrap(), "round {round}");
            let slot = DESC + 16 * u64::from(used_at);
            let mut d = [0; 16];
            memory.read(slot, &mut d).unwrap();
            assert_eq!(u16::from_le_bytes([d[12], d[13]]), round);
            let flags = u16::from_le_bytes([d[14], d[15]]);
            assert_eq!(flags & 0x8080, if used_wrap { 0x8080 } else { 0 });
            for _ in 0..3 {
                step(&mut used_at, &mut used_wrap);
            }
            // With interrupts off there is no signal.
            memory.store_u16(DRIVER + 2, 1, Ordering::SeqCst).unwrap();
            assert!(!q.needs_signal(&memory).unwrap());
        }
    }
}

#[test]
fn packed_chain_without_end_is_an_error() {
    let (memory, mut q) = queue(true, false);
    for n in 0..u64::from(SIZE) {
        put(&memory, DESC + 16 * n, BUFFER, 4, 0, 1 << 7 | 1);
    }
    assert!(matches!(q.pop(&memory), Err(QueueError::ChainTooLong)));
}

#[test]
fn restored_queue_goes_on_and_hostile_state_is_refused() {
    for packed in [false, true] {
        let (memory, q) = queue(packed, true);
        let mut other = Queue::new(16);
        other
            .restore(&memory, q.state(), packed, true, true)
            .unwrap();
        assert_eq!(other.state(), q.state());
        let bad = QueueState {
            desc: u64::MAX,
            ..q.state().clone()
        };
        assert!(other.restore(&memory, &bad, packed, true, true).is_err());
        let bad = QueueState {
            next_used: 1000,
            ..q.state().clone()
        };
        assert_eq!(
            other.restore(&memory, &bad, packed, true, true).is_err(),
            packed
        );
    }
}
