//! Programming by drivers that mean no good, or know nothing.

use super::*;

/// Puts a block with a bit of sense into a ring.
fn block(d: &mut Driver, op: &[u8], slot: u8, endpoint: u8) {
    let word = |n: usize| u32::from_le_bytes([op[n], op[n + 1], op[n + 2], op[n + 3]]);
    let at = match op[0] & 7 {
        0 => u64::from(word(4)) << 32 | u64::from(word(8)),
        1 => u64::MAX - u64::from(op[4]),
        2 => rig::INPUT,
        // Packets with standard and class requests.
        3 => u64::from(word(4) & 0x0302_0fa3 | 0x80) | u64::from(word(8)) << 32,
        4 => DATA + 0x8000,
        _ => DATA + u64::from(op[5]) * 64,
    };
    let len = match op[1] & 3 {
        0 => word(12),
        1 => 31,
        2 => 13,
        _ => u32::from(op[6]) * 64,
    };
    let kind = if endpoint == 0 {
        9 + u32::from(op[2] % 16)
    } else {
        u32::from(op[2] % 10)
    };
    let mut control = kind << 10 | u32::from(op[3]) << 2 & 0x3f4;
    if endpoint == 0 {
        let which = u32::from(op[7] % 34);
        control = kind << 10 | u32::from(op[3] & 1) << 9 | which << 16 | u32::from(slot) << 24;
    }
    d.put(
        if endpoint == 0 { 0 } else { slot },
        endpoint,
        (at, len, control),
    );
}

/// Writes what contexts and wrappers are read from.
fn scribble(d: &Driver, op: &[u8], slot: u8) {
    let at = rig::INPUT + 4 * u64::from(op[1]);
    match op[0] & 3 {
        0 => d.memory.write(at, &op[2..18]).unwrap(),
        1 => d.input_context(u32::from(op[2] % 14)),
        2 => {
            let data = i32::from(op[2]) * 512 - 0x8000;
            let len = if op[3] & 7 == 0 { 3 } else { 10 };
            let mut cdb = [0; 16];
            cdb[0] = [0x28, 0x2a, 0x12, 0x25, 0x42, 0x35, 0x93, op[4]][usize::from(op[5] & 7)];
            cdb[5] = op[6];
            cdb[8] = op[7];
            let wrapper = rig::wrapper(op[8].into(), data, &cdb[..len]);
            d.memory.write(DATA + 0x8000, &wrapper).unwrap();
        }
        // The contexts that the controller has written.
        _ => {
            let at = 0x5000 + 0x400 * u64::from(slot) + 4 * u64::from(op[1]);
            d.memory.write(at, &op[2..10]).unwrap();
        }
    }
}

fn programme(seed: u64) {
    let mut d = Driver::new().up();
    let slot = d.plug([1, 9, 10][(seed % 3) as usize]);
    if seed & 8 == 0 {
        match seed % 3 {
            0 => d.open(slot, &[(IN_PIPE, 6), (OUT_PIPE, 2)]),
            _ => d.open(slot, &[(REPORTS, 7)]),
        }
    }
    let noise = pseudo_random(seed, 40_000);
    for op in noise.chunks_exact(32) {
        let slot = op[31] % 3;
        let endpoint = [1, 1, 3, 3, 3, 4, 4, op[29] % 34][usize::from(op[30] & 7)];
        match op[28] % 16 {
            0..=2 => scribble(&d, op, slot),
            3..=8 => {
                block(&mut d, op, slot.max(1), endpoint);
                d.doorbell(slot, endpoint);
            }
            9 | 10 => {
                block(&mut d, op, slot, 0);
                d.doorbell(0, 0);
            }
            11 => {
                let event = match op[0] & 1 {
                    0 => Input::Key {
                        code: u16::from_le_bytes([op[1], if op[2] & 1 == 0 { 0 } else { 0xe0 }]),
                        is_down: op[3] & 1 == 0,
                    },
                    _ => Input::Pointer {
                        x: u16::from_le_bytes([op[1], op[2]]),
                        y: u16::from_le_bytes([op[3], op[4]]),
                        dz: i32::from_le_bytes([op[5], op[6], op[7], op[8]]),
                        buttons: op[9],
                    },
                };
                lock(&d.xhci).input(&event);
            }
            12 => d.clock.advance(u64::from(op[0]) << 16),
            13 => d.disk.hold(op[0] & 1 == 0),
            14 => d.write_port(
                u64::from(op[0] % 13),
                u32::from_le_bytes([op[1], op[2], op[3], op[4]]),
            ),
            _ if op[0] & 15 == 0 => {
                fuzz_device(Target::Pci(&mut *lock(&d.xhci)), &noise[..2000], |_| {});
                d.disk.hold(false);
                d.start();
            }
            _ => drop(d.event()),
        }
        if d.read(0x44) & 4 != 0 {
            // Memory was missed: the driver starts anew.
            d.disk.hold(false);
            d.start();
        }
    }
    d.disk.hold(false);
    let mut x = lock(&d.xhci);
    x.pause();
    assert!(x.drained());
    let section = x.save().unwrap();
    x.restore(&section).unwrap();
    assert_eq!(x.save().unwrap(), section);
}

#[test]
fn random_programming_neither_panics_nor_hangs() {
    for seed in 0..48 {
        programme(seed);
    }
}

#[test]
fn odd_accesses_are_survived() {
    let d = Driver::new().up();
    for seed in 0..8 {
        let noise = pseudo_random(seed, 20_000);
        fuzz_device(Target::Pci(&mut *lock(&d.xhci)), &noise, |_| {});
    }
    lock(&d.xhci).reset();
    assert!(lock(&d.xhci).drained());
}
