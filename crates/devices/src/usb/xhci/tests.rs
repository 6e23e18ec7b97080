use std::sync::atomic::Ordering;

use pyrite_disk::scsi::{Identity, Kind, Unit};
use pyrite_disk::{DiskError, MemDisk};
use pyrite_vdev::conformance::{self, Target, fuzz_device, pseudo_random};

use super::*;
use crate::storage::testing::{Interrupts, enable, memory};
use crate::usb::hid::keyboard::Keyboard;
use crate::usb::hid::tablet::Tablet;
use crate::usb::storage::Storage;

mod hostile;
mod rig;

use rig::{Driver, IN_PIPE, OUT_PIPE, REPORTS};

const DATA: u64 = 0x10_0000;

#[test]
fn capabilities_and_ports() {
    let d = Driver::new();
    assert_eq!(lock(&d.xhci).config_read(8) >> 8, 0x0c_03_30);
    assert_eq!(lock(&d.xhci).config_read(0x60) & 0xffff, 0x2030);
    assert_eq!((d.read(0), d.read(4)), (0x0100_0040, 0x0c00_0840));
    // Both protocols, and after them nothing.
    let first = u64::from(d.read(0x10) >> 16) * 4;
    assert_eq!((d.read(first) & 0xff, d.read(first) >> 24), (2, 3));
    let second = first + u64::from(d.read(first) >> 8 & 0xff) * 4;
    assert_eq!((d.read(second) >> 24, d.read(second) >> 8 & 0xff), (2, 0));
    assert_eq!((d.read(first + 8), d.read(second + 8)), (0x0801, 0x0409));
    assert_eq!(d.read(0x44), 1, "halted");
    // A fast device is enabled by itself, a slower one waits for a reset, and one port is empty.
    assert_eq!(d.port(1), 0x0002_1203);
    assert_eq!(d.port(9), 0x0002_0ee1);
    assert_eq!(d.port(12), 0x0000_02a0);
    let mut d = d.up();
    let told: Vec<_> = std::iter::from_fn(|| d.event())
        .map(|e| (e.kind(), e.parameter >> 24))
        .collect();
    assert_eq!(told, [(34, 1), (34, 9), (34, 10)]);
    assert_eq!(d.read(0x44), 0x18, "event interrupt, port change");
    d.write(0x44, 0x18);
    assert_eq!(d.read(0x44), 0);
    d.reset_port(9);
    assert_eq!(d.port(9), 0x0022_0e03);
    assert_eq!(d.event().unwrap().parameter >> 24, 9);
    d.write_port(9, 0x0022_0200);
    assert_eq!(d.port(9), 0x0000_0e03);
    // Suspend and resume of a USB 2 port, disabling of a USB 3 port and back.
    d.write_port(9, 1 << 16 | 3 << 5 | 0x200);
    assert_eq!(d.port(9) >> 5 & 0xf, 3);
    d.write_port(9, 1 << 16 | 15 << 5 | 0x200);
    d.write_port(9, 1 << 16 | 0x200);
    assert_eq!(d.port(9), 0x0040_0e03);
    d.write_port(1, 2);
    assert_eq!(d.port(1) & 0x1e2, 4 << 5);
    d.write_port(1, 1 << 16 | 5 << 5);
    assert_eq!(d.port(1) & 0x1e2, 2);
}

#[test]
fn slots_are_given_addressed_and_taken_away() {
    let mut d = Driver::new().up();
    assert_eq!(d.command(0, 0, 23 << 10), (1, 0), "no operation");
    assert_eq!(d.command(0, 0, 63 << 10 | 1 << 24).0, 5);
    let slot = d.enable_slot();
    assert_eq!(slot, 1);
    // A port without device, one that is not enabled, one that there is not.
    for (port, code) in [(12, 4), (9, 4), (77, 4), (0, 17)] {
        d.input_context(port);
        assert_eq!(d.address(slot, false).0, code, "{port}");
    }
    d.reset_port(9);
    d.input_context(9);
    assert_eq!(d.address(slot, true).0, 1);
    assert_eq!(d.slot_word(slot, 3), 1 << 27, "default");
    assert_eq!(d.address(slot, true).0, 19);
    d.input_context(9);
    assert_eq!(d.address(slot, false).0, 1);
    assert_eq!(d.slot_word(slot, 3), 2 << 27 | 1, "addressed");
    assert_eq!(d.slot_word(slot, 8) & 7, 1, "pipe is running");
    // The device has one slot.
    let second = d.enable_slot();
    d.input_context(9);
    assert_eq!(d.address(second, false).0, 17);
    assert_eq!(d.address(9, false).0, 11);
    d.configure(slot, &[(REPORTS, 7)]);
    assert_eq!(d.slot_word(slot, 3) >> 27, 3, "configured");
    // Streams are not offered.
    d.write_words(rig::INPUT + 0x20 * u64::from(REPORTS + 1), &[1 << 10]);
    let control = 12 << 10 | u32::from(slot) << 24;
    assert_eq!(d.command(rig::INPUT, 0, control).0, 17);
    let reset = 17 << 10 | u32::from(slot) << 24;
    assert_eq!(d.command(0, 0, reset).0, 1);
    assert_eq!(d.slot_word(slot, 3), 1 << 27);
    assert_eq!(d.command(0, 0, reset).0, 19);
    assert_eq!(d.command(0, 0, 10 << 10 | u32::from(slot) << 24).0, 1);
    assert_eq!(d.command(0, 0, 10 << 10 | u32::from(slot) << 24).0, 11);
    assert_eq!(d.enable_slot(), 1);
    // There are as many as the driver has enabled.
    for n in 3..=rig::SLOTS {
        assert_eq!(d.enable_slot(), n);
    }
    assert_eq!(d.command(0, 0, 9 << 10).0, 9);
}

#[test]
fn descriptors_and_standard_requests() {
    let mut d = Driver::new().up();
    let slot = d.plug(9);
    let device = d.control_in(slot, 0x80, 6, 0x100, 0, 64).unwrap();
    assert_eq!(device.len(), 18);
    assert_eq!(device[..8], [18, 1, 0, 2, 0, 0, 0, 64]);
    let short = d.control_in(slot, 0x80, 6, 0x100, 0, 8).unwrap();
    assert_eq!(short, device[..8]);
    let c = d.control_in(slot, 0x80, 6, 0x200, 0, 255).unwrap();
    assert_eq!((c.len(), c[2], c[14..17].to_vec()), (34, 34, vec![3, 1, 1]));
    let name = d.control_in(slot, 0x80, 6, 0x302, 0x409, 255).unwrap();
    assert_eq!(name[2..10], [b'U', 0, b'S', 0, b'B', 0, b' ', 0]);
    // What is not there is refused, and the next request is served.
    assert_eq!(d.control_in(slot, 0x80, 6, 0x309, 0, 255), None);
    d.recover(slot, 1);
    assert_eq!(d.control_in(slot, 0x80, 8, 0, 0, 1).unwrap(), [0]);
    assert!(d.control_out(slot, 0, 9, 1, 0, &[]));
    assert_eq!(d.control_in(slot, 0x80, 8, 0, 0, 1).unwrap(), [1]);
    assert!(d.control_out(slot, 2, 3, 0, 0x81, &[]));
    assert_eq!(d.control_in(slot, 0x82, 0, 0, 0x81, 2).unwrap(), [1, 0]);
    assert!(!d.control_out(slot, 0, 9, 7, 0, &[]));
    d.recover(slot, 1);
    // The report descriptor of the keyboard, its LEDs, and the idle rate.
    let report = d.control_in(slot, 0x81, 6, 0x2200, 0, 255).unwrap();
    assert_eq!((report.len(), report[3]), (65, 6));
    assert!(d.control_out(slot, 0x21, 9, 0x200, 0, &[2]));
    assert!(d.control_out(slot, 0x21, 10, 0x0500, 0, &[]));
    assert_eq!(d.control_in(slot, 0xa1, 2, 0, 0, 1).unwrap(), [5]);
    let slot = d.plug(1);
    let device = d.control_in(slot, 0x80, 6, 0x100, 0, 64).unwrap();
    assert_eq!((device[3], device[7]), (3, 9));
    let c = d.control_in(slot, 0x80, 6, 0x200, 0, 255).unwrap();
    assert_eq!((c.len(), usize::from(c[2])), (44, 44));
    let bos = d.control_in(slot, 0x80, 6, 0xf00, 0, 255).unwrap();
    assert_eq!((bos.len(), usize::from(bos[2])), (22, 22));
}

#[test]
fn keys_become_reports() {
    let mut d = Driver::new().up();
    let key = |code, is_down| Input::Key { code, is_down };
    let press = |d: &Driver, code, is_down| lock(&d.xhci).input(&key(code, is_down));
    assert_eq!(press(&d, 0x1e, true), Heard::NotMine, "nobody listens");
    let slot = d.plug(9);
    d.open(slot, &[(REPORTS, 7)]);
    // A report that is asked for waits until there is one.
    d.normal(slot, REPORTS, &[(DATA, 8)]);
    d.doorbell(slot, REPORTS);
    assert!(d.event().is_none());
    assert_eq!(press(&d, 0x1e, true), Heard::On(0x81));
    let e = d.event().unwrap();
    assert_eq!((e.kind(), e.status, e.slot()), (32, 1 << 24, slot));
    assert_eq!(d.bytes(DATA, 8), [0, 0, 4, 0, 0, 0, 0, 0]);
    // Modifiers, extended keys, more than six keys, and all up again, in order.
    let codes = [0x2a, 0xe048, 0x02, 0x03, 0x04, 0x05, 0x06];
    for c in codes {
        press(&d, c, true);
    }
    let mut seen = Vec::new();
    for _ in codes {
        d.normal(slot, REPORTS, &[(DATA, 8)]);
        d.doorbell(slot, REPORTS);
        assert_eq!(d.event().unwrap().status >> 24, 1);
        seen.push(d.bytes(DATA, 8));
    }
    assert_eq!(seen[0], [2, 0, 4, 0, 0, 0, 0, 0]);
    assert_eq!(seen[1], [2, 0, 4, 0x52, 0, 0, 0, 0]);
    assert_eq!(seen[5], [2, 0, 4, 0x52, 0x1e, 0x1f, 0x20, 0x21]);
    assert_eq!(seen[6], [2, 0, 1, 1, 1, 1, 1, 1], "roll over");
    // There is room for so many.
    let taken = (0..99).take_while(|_| press(&d, 0x10, true) != Heard::Full);
    assert_eq!(taken.count(), 16);
    // The halted endpoint refuses.
    assert!(d.control_out(slot, 2, 3, 0, 0x81, &[]));
    d.normal(slot, REPORTS, &[(DATA, 8)]);
    d.doorbell(slot, REPORTS);
    assert_eq!(d.event().unwrap().status >> 24, 6);
    assert_eq!(d.slot_word(slot, 8 * u64::from(REPORTS)) & 7, 2, "halted");
    // A reset of the port forgets all of it.
    d.reset_port(9);
    assert_eq!(press(&d, 0x10, true), Heard::NotMine);
}

#[test]
fn idle_reports_come_by_the_clock() {
    let mut d = Driver::new().up();
    let slot = d.plug(9);
    d.open(slot, &[(REPORTS, 7)]);
    assert!(d.control_out(slot, 0x21, 10, 0x0200, 0, &[]));
    for n in 0..3 {
        d.normal(slot, REPORTS, &[(DATA, 8)]);
        d.doorbell(slot, REPORTS);
        // The first is due at once: none was ever sent.
        if n > 0 {
            assert!(d.event().is_none());
            d.clock.advance(7_999_000);
            assert!(d.event().is_none());
            d.clock.advance(1_000);
        } else {
            d.clock.advance(8_000_000);
        }
        assert_eq!(d.event().unwrap().status >> 24, 1, "{n}");
    }
}

#[test]
fn the_tablet_says_where_the_pointer_is() {
    let mut d = Driver::new().up();
    let slot = d.plug(10);
    let move_to =
        |d: &Driver, x, y, dz, buttons| lock(&d.xhci).input(&Input::Pointer { x, y, dz, buttons });
    assert!(!lock(&d.xhci).wants_pointer());
    assert_eq!(move_to(&d, 1, 2, 0, 0), Heard::NotMine);
    d.open(slot, &[(REPORTS, 7)]);
    assert!(lock(&d.xhci).wants_pointer());
    // Movement alone adds up to the last place; presses and the wheel are kept.
    for x in 0..50 {
        move_to(&d, x * 100, 5, 1, 0);
    }
    move_to(&d, 0xffff, 0x1234, 0, 1);
    move_to(&d, 3, 4, -2, 0);
    let mut seen = Vec::new();
    for _ in 0..3 {
        d.normal(slot, REPORTS, &[(DATA, 6)]);
        d.doorbell(slot, REPORTS);
        assert_eq!(d.event().unwrap().status >> 24, 1);
        seen.push(d.bytes(DATA, 6));
    }
    assert_eq!(
        seen[0],
        [0, 0x24, 0x13, 5, 0, 0xce],
        "50 notches towards the user"
    );
    assert_eq!(seen[1], [1, 0xff, 0x7f, 0x34, 0x12, 0]);
    assert_eq!(seen[2], [0, 3, 0, 4, 0, 2]);
    // A flood is bounded; the last place is told.
    for n in 0..1000_u16 {
        move_to(&d, n, n, 0, (n & 1) as u8);
    }
    let mut last = Vec::new();
    for n in 0.. {
        d.normal(slot, REPORTS, &[(DATA, 6)]);
        d.doorbell(slot, REPORTS);
        if d.event().is_none() {
            assert_eq!(n, 16);
            break;
        }
        last = d.bytes(DATA, 6);
    }
    assert_eq!(last, [1, 0xe7, 3, 0xe7, 3, 0]);
}

#[test]
fn transfers_end_as_their_blocks_say() {
    let mut d = Driver::new().up();
    let slot = d.plug(10);
    d.open(slot, &[(REPORTS, 7)]);
    let place = |n| Input::Pointer {
        x: n,
        y: n,
        dz: 0,
        buttons: 0,
    };
    let normal = |at: u64, len: u32, flags: u32| (at, len, 1 << 10 | flags);
    let (chain, on_completion, on_short) = (1 << 4, 1 << 5, 1 << 2);
    // Six bytes arrive in a descriptor of 4 + 1 + 4 + 4; who told is by flags.
    type Case = (u32, u32, u32, Vec<(u8, u64, u32)>);
    let cases: [Case; 4] = [
        (0, 0, on_completion, vec![(13, 3, 4)]),
        (on_completion, 0, on_completion, vec![(1, 0, 0), (13, 3, 4)]),
        (0, on_short, on_completion, vec![(13, 2, 3)]),
        (0, 0, 0, vec![]),
    ];
    for (n, (first, third, fourth, wanted)) in cases.into_iter().enumerate() {
        let base = d.ring_at(slot, REPORTS);
        for trb in [
            normal(DATA, 4, chain | first),
            normal(DATA + 4, 1, chain),
            normal(DATA + 8, 4, chain | third),
            normal(DATA + 12, 4, fourth),
        ] {
            d.put(slot, REPORTS, trb);
        }
        d.doorbell(slot, REPORTS);
        lock(&d.xhci).input(&place(n as u16));
        for (code, block, left) in wanted {
            let e = d.event().unwrap();
            assert_eq!((e.status >> 24) as u8, code, "{n}");
            assert_eq!(
                (e.parameter, e.status & 0xff_ffff),
                (base + 16 * block, left)
            );
        }
        assert!(d.event().is_none(), "{n}");
    }
    assert_eq!(d.bytes(DATA + 8, 2), [0, 0]);
    // An event with data of the driver's own tells how much arrived.
    d.put(slot, REPORTS, normal(DATA, 64, chain));
    d.put(
        slot,
        REPORTS,
        (0x1234_5678_9abc, 0, 7 << 10 | on_completion),
    );
    d.put(slot, REPORTS, (0, 0, 8 << 10 | on_completion));
    d.doorbell(slot, REPORTS);
    lock(&d.xhci).input(&place(9));
    let e = d.event().unwrap();
    assert_eq!((e.parameter, e.status), (0x1234_5678_9abc, 13 << 24 | 6));
    assert_eq!(e.control & 4, 4);
    assert_eq!(d.event().unwrap().status, 1 << 24, "no operation");
    // A descriptor that is not all there yet is left alone.
    d.put(slot, REPORTS, normal(DATA, 4, chain));
    d.doorbell(slot, REPORTS);
    lock(&d.xhci).input(&place(10));
    assert!(d.event().is_none());
    d.put(slot, REPORTS, normal(DATA + 4, 4, on_completion));
    d.doorbell(slot, REPORTS);
    assert_eq!(d.event().unwrap().status, 13 << 24 | 2);
    // A stop tells what was under way; the ring goes on from there or from elsewhere.
    let at = d.ring_at(slot, REPORTS);
    d.normal(slot, REPORTS, &[(DATA, 6)]);
    d.doorbell(slot, REPORTS);
    let stop = 15 << 10 | u32::from(slot) << 24 | u32::from(REPORTS) << 16;
    d.queue_command(0, 0, stop);
    let e = d.event().unwrap();
    assert_eq!((e.kind(), e.parameter, e.status), (32, at, 26 << 24 | 6));
    assert_eq!(d.event().unwrap().status >> 24, 1);
    let word = 8 * u64::from(REPORTS);
    assert_eq!(d.slot_word(slot, word) & 7, 3);
    assert_eq!(u64::from(d.slot_word(slot, word + 2)), at | 1);
    assert_eq!(d.command(0, 0, stop).0, 19);
    lock(&d.xhci).input(&place(11));
    assert!(d.event().is_none());
    d.doorbell(slot, REPORTS);
    assert_eq!(d.event().unwrap().status, 1 << 24);
    assert_eq!(
        d.slot_word(slot, word) & 7,
        3,
        "shown when it changes by itself"
    );
}

#[test]
fn a_disk_is_read_and_written() {
    let mut d = Driver::new().up();
    let slot = d.plug(1);
    d.open(slot, &[(IN_PIPE, 6), (OUT_PIPE, 2)]);
    assert_eq!(d.control_in(slot, 0xa1, 0xfe, 0, 0, 1).unwrap(), [0]);
    // The first command is told of the power-on.
    assert_eq!(d.scsi(slot, &[0; 6], 0, &[]), (1, 0));
    let (status, residue) = d.scsi(slot, &[3, 0, 0, 0, 18, 0], 18, &[]);
    assert_eq!((status, residue, d.bytes(DATA + 2, 1)), (0, 0, vec![6]));
    assert_eq!(d.scsi(slot, &[0; 6], 0, &[]), (0, 0));
    // Less than was asked for: the rest is zeroes, and told.
    d.memory.write(DATA, &[0xee; 255]).unwrap();
    let (status, residue) = d.scsi(slot, &[0x12, 0, 0, 0, 255, 0], 255, &[]);
    let b = d.bytes(DATA, 255);
    assert_eq!((status, &b[8..14]), (0, &b"PYRITE"[..]));
    let len = 255 - residue as usize;
    assert_eq!(usize::from(b[4]) + 5, len);
    assert!(b[len..].iter().all(|b| *b == 0));
    assert_eq!(
        d.scsi(slot, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8, &[]),
        (0, 0)
    );
    assert_eq!(d.bytes(DATA, 8), [0, 0, 0x3f, 0xff, 0, 0, 2, 0]);
    let blocks: Vec<u8> = (0..8192).map(|n| (n / 5) as u8).collect();
    d.memory.write(DATA, &blocks).unwrap();
    let write = [0x2a, 0, 0, 0, 0, 9, 0, 0, 16, 0];
    assert_eq!(d.scsi(slot, &write, -8192, &[3072, 5120]), (0, 0));
    assert_eq!(d.disk.content()[9 * 512..25 * 512], blocks);
    let flush = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        (d.scsi(slot, &flush, 0, &[]), d.disk.flushes()),
        ((0, 0), 1)
    );
    let read = [0x28, 0, 0, 0, 0, 9, 0, 0, 16, 0];
    d.memory.fill_zero(DATA, 8192).unwrap();
    assert_eq!(d.scsi(slot, &read, 8192, &[512, 1024, 6656]), (0, 0));
    assert_eq!(d.bytes(DATA, 8192), blocks);
    // Unmap has parameters.
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend([0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 2, 0, 0, 0, 0]);
    d.memory.write(DATA, &list).unwrap();
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(d.scsi(slot, &unmap, -24, &[7, 17]), (0, 0));
    assert_eq!(d.disk.content()[10 * 512..12 * 512], [0; 1024]);
    assert_eq!(d.scsi(slot, &unmap, -10, &[]), (2, 10), "not all of it");
    // Errors of the disk, blocks that there are not, more data than blocks.
    d.disk.fail_request(0, DiskError::NoSpace);
    assert_eq!(d.scsi(slot, &write, -8192, &[]), (1, 8192));
    d.scsi(slot, &[3, 0, 0, 0, 18, 0], 18, &[]);
    assert_eq!(d.bytes(DATA + 12, 2), [0x27, 7]);
    let beyond = [0x28, 0, 0, 1, 0, 0, 0, 0, 1, 0];
    assert_eq!(d.scsi(slot, &beyond, 512, &[]), (1, 512));
    d.memory.write(DATA, &[0xee; 1024]).unwrap();
    let one = [0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0];
    assert_eq!(d.scsi(slot, &one, 1024, &[]), (0, 512));
    assert_eq!(d.bytes(DATA, 1024), [&blocks[..512], &[0; 512]].concat());
    let write_one = [0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0];
    assert_eq!(d.scsi(slot, &write_one, -1024, &[]), (0, 512));
    // The host and the command do not agree.
    assert_eq!(d.scsi(slot, &read, 512, &[]), (2, 512));
    assert_eq!(d.scsi(slot, &read, -8192, &[]), (2, 8192));
    assert_eq!(d.scsi(slot, &read, 0, &[]), (2, 0));
    assert_eq!(d.scsi(slot, &write, 8192, &[]), (2, 8192));
    assert_eq!(
        d.scsi(slot, &read, 8192, &[100, 8092]),
        (2, 8192),
        "odd pieces"
    );
    assert_eq!(d.scsi(slot, &[0xff; 6], 64, &[]), (1, 64));
    assert_eq!(d.scsi(slot, &read, 8192, &[]), (0, 0), "none of it stays");
}

#[test]
fn what_is_no_command_is_refused_until_the_reset() {
    let mut d = Driver::new().up();
    let slot = d.plug(1);
    d.open(slot, &[(IN_PIPE, 6), (OUT_PIPE, 2)]);
    d.scsi(slot, &[0; 6], 0, &[]);
    for (len, damage) in [(31, 0), (30, 99), (512, 99), (31, 13), (31, 14)] {
        let mut wrapper = rig::wrapper(7, 0, &[0; 6]);
        wrapper.resize(len, 0);
        if let Some(b) = wrapper.get_mut(damage) {
            *b ^= 0x40;
        }
        d.memory.write(DATA, &wrapper).unwrap();
        d.normal(slot, OUT_PIPE, &[(DATA, len as u32)]);
        d.doorbell(slot, OUT_PIPE);
        assert_eq!(d.event().unwrap().status >> 24, 6, "{len} {damage}");
        for _ in 0..2 {
            d.recover(slot, OUT_PIPE);
            assert!(d.control_out(slot, 2, 1, 0, 2, &[]));
            d.memory.write(DATA, &rig::wrapper(7, 0, &[0; 6])).unwrap();
            d.normal(slot, OUT_PIPE, &[(DATA, 31)]);
            d.doorbell(slot, OUT_PIPE);
            assert_eq!(d.event().unwrap().status >> 24, 6, "still");
        }
        d.recover(slot, OUT_PIPE);
        assert!(d.control_out(slot, 0x21, 0xff, 0, 0, &[]));
        assert!(d.control_out(slot, 2, 1, 0, 2, &[]));
        assert_eq!(d.scsi(slot, &[0; 6], 0, &[]), (0, 0));
    }
}

#[test]
fn what_disks_work_on_is_waited_for() {
    let mut d = Driver::new().up();
    let slot = d.plug(1);
    d.open(slot, &[(IN_PIPE, 6), (OUT_PIPE, 2)]);
    d.scsi(slot, &[0; 6], 0, &[]);
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let begin = |d: &mut Driver| {
        d.disk.hold(true);
        d.memory
            .write(DATA + 0x1000, &rig::wrapper(7, 512, &read))
            .unwrap();
        d.normal(slot, OUT_PIPE, &[(DATA + 0x1000, 31)]);
        d.doorbell(slot, OUT_PIPE);
        assert_eq!(d.event().unwrap().status >> 24, 1);
        d.normal(slot, IN_PIPE, &[(DATA, 512)]);
        d.doorbell(slot, IN_PIPE);
        assert!(d.event().is_none());
    };
    // Stop Endpoint comes after it.
    begin(&mut d);
    let stop = 15 << 10 | u32::from(slot) << 24 | u32::from(IN_PIPE) << 16;
    d.queue_command(0, 0, stop);
    assert!(d.event().is_none());
    d.disk.hold(false);
    assert_eq!(d.event().unwrap().kind(), 32);
    assert_eq!(d.event().unwrap().status >> 24, 1);
    d.normal(slot, IN_PIPE, &[(DATA, 13)]);
    d.doorbell(slot, IN_PIPE);
    assert_eq!(d.event().unwrap().status, 1 << 24);
    // So does the reset of its port.
    begin(&mut d);
    d.write_port(1, 0x0020_0200);
    d.reset_port(1);
    assert_eq!(d.port(1) & 0x20_0010, 0x10);
    d.disk.hold(false);
    assert_eq!(d.port(1) & 0x20_0010, 0x20_0000);
    assert_eq!(d.event().unwrap().kind(), 32);
    assert_eq!(d.event().unwrap().kind(), 34);
    // A controller that is stopped, and one that is reset, is not at rest before.
    d.command(0, 0, 10 << 10 | u32::from(slot) << 24);
    d.plug(1);
    d.open(slot, &[(IN_PIPE, 6), (OUT_PIPE, 2)]);
    d.scsi(slot, &[0; 6], 0, &[]);
    begin(&mut d);
    d.write(0x40, 4);
    assert_eq!(d.read(0x44) & 1, 0);
    d.disk.hold(false);
    assert_eq!(d.read(0x44) & 1, 1);
    d.write(0x40, 5);
    assert_eq!(d.event().unwrap().kind(), 32, "told when it runs");
    d.drain();
    d.normal(slot, IN_PIPE, &[(DATA, 13)]);
    d.doorbell(slot, IN_PIPE);
    assert_eq!(d.event().unwrap().status, 1 << 24);
    begin(&mut d);
    d.write(0x40, 2);
    assert_eq!((d.read(0x40) & 2, d.read(0x44) & 0x800), (2, 0x800));
    assert!(!lock(&d.xhci).drained() && lock(&d.xhci).save().is_err());
    d.disk.hold(false);
    assert_eq!((d.read(0x40), d.read(0x44)), (0, 1));
    assert!(lock(&d.xhci).drained());
}

#[test]
fn a_full_event_ring_holds_everything_back() {
    let mut d = Driver::new().up();
    d.drain();
    for _ in 0..rig::EVENTS + 10 {
        d.queue_command(0, 0, 23 << 10);
    }
    // All but one place is filled, and the last event says so.
    d.write(0x44, 0);
    let mut kinds = Vec::new();
    for n in 0..rig::EVENTS - 1 {
        let at = rig::EVENT_RING + 16 * ((d.event_index() + n) % rig::EVENTS);
        kinds.push(d.memory.read_u32(at + 12).unwrap() >> 10 & 0x3f);
    }
    assert_eq!(kinds.pop(), Some(37), "event ring full");
    assert!(kinds.iter().all(|k| *k == 33));
    let mut seen = 0;
    while let Some(e) = d.event() {
        seen += u64::from(e.kind() == 33);
    }
    assert_eq!(seen, rig::EVENTS + 10, "none is lost");
}

#[test]
fn interrupts_by_line_and_message() {
    let mut d = Driver::new().up();
    d.drain();
    d.end_of_handler(false);
    let interrupter = 0x1020;
    d.write(0x40, 5); // INTE
    d.write(interrupter, 3);
    d.queue_command(0, 0, 23 << 10);
    assert!(d.interrupts.is_up());
    // Pending is cleared, and comes again only when the handler is ready for it.
    d.write(interrupter, 3);
    assert!(!d.interrupts.is_up());
    d.queue_command(0, 0, 23 << 10);
    assert!(!d.interrupts.is_up());
    assert!(d.event().is_some(), "and the driver has moved on by one");
    d.end_of_handler(false);
    assert!(d.interrupts.is_up(), "there is another one");
    d.write(interrupter, 3);
    d.drain();
    d.end_of_handler(false);
    assert!(!d.interrupts.is_up());
    assert_eq!(lock(&d.xhci).config_read(4) & 1 << 19, 0);
    d.enable_msix();
    let sent = |d: &Driver| d.interrupts.messages.load(Ordering::SeqCst);
    d.queue_command(0, 0, 23 << 10);
    assert_eq!((sent(&d), d.read(interrupter)), (1, 2));
    d.queue_command(0, 0, 23 << 10);
    assert_eq!(sent(&d), 1, "the handler is busy");
    d.drain();
    d.end_of_handler(false);
    d.queue_command(0, 0, 23 << 10);
    assert_eq!(sent(&d), 2);
}

#[test]
fn memory_that_is_not_there_stops_the_controller() {
    // The event ring, the command ring, the contexts, a transfer ring, data.
    let nowhere = 1_u64 << 40;
    let d = Driver::new().up();
    d.write64(0x1030, nowhere);
    d.write(0x2000, 0);
    let mut d = d;
    d.queue_command(0, 0, 23 << 10);
    assert_eq!(d.read(0x44) & 5, 5);
    let d = Driver::new().up();
    d.write64(0x58, nowhere | 1);
    d.write(0x2000, 0);
    assert_eq!(d.read(0x44) & 5, 5);
    let mut d = Driver::new().up();
    d.write64(0x70, nowhere);
    let slot = d.enable_slot();
    d.input_context(1);
    assert_eq!(d.address(slot, false).0, 17);
    assert_eq!(d.command(nowhere, 0, 11 << 10 | 1 << 24).0, 17);
    assert_eq!(d.command(!0xf, 0, 11 << 10 | 1 << 24).0, 17);
    let mut d = Driver::new().up();
    let slot = d.plug(10);
    d.open(slot, &[(REPORTS, 7)]);
    d.normal(slot, REPORTS, &[(nowhere, 6)]);
    d.doorbell(slot, REPORTS);
    let place = Input::Pointer {
        x: 1,
        y: 1,
        dz: 0,
        buttons: 0,
    };
    lock(&d.xhci).input(&place);
    assert_eq!(d.event().unwrap().status >> 24, 4);
    d.recover(slot, REPORTS);
    d.normal(slot, REPORTS, &[(u64::MAX, 6)]);
    d.doorbell(slot, REPORTS);
    assert_eq!(d.event().unwrap().status >> 24, 5);
    // A ring that only leads back to itself.
    let link = DATA + 0x2000;
    d.write_words(link, &[link as u32, 0, 0, 6 << 10 | 1]);
    let set = 16 << 10 | u32::from(slot) << 24 | u32::from(REPORTS) << 16;
    assert_eq!(d.command(link | 1, 0, set).0, 1);
    d.doorbell(slot, REPORTS);
    assert_eq!(d.event().unwrap().status >> 24, 5);
    // One of no-operations that leads on for ever comes to rest, and commands go on.
    d.write_words(link, &[0, 0, 0, 8 << 10 | 1]);
    d.write_words(link + 16, &[link as u32, 0, 0, 6 << 10 | 1]);
    assert_eq!(d.command(link | 1, 0, set).0, 1);
    d.doorbell(slot, REPORTS);
    assert_eq!(d.command(0, 0, 23 << 10).0, 1);
    d.clock.advance(100_000_000);
    assert_eq!(d.command(0, 0, 23 << 10).0, 1);
    // Without bus mastering nothing moves.
    lock(&d.xhci).config_write(4, &3_u16.to_le_bytes());
    d.queue_command(0, 0, 23 << 10);
    assert!(d.event().is_none());
}

#[test]
fn state_moves_in_the_middle_of_things() {
    let mut d = Driver::new().up();
    let slot = d.plug(1);
    d.open(slot, &[(IN_PIPE, 6), (OUT_PIPE, 2)]);
    d.scsi(slot, &[0; 6], 0, &[]);
    let keys = d.plug(9);
    d.open(keys, &[(REPORTS, 7)]);
    d.normal(keys, REPORTS, &[(DATA + 0x800, 8)]);
    d.doorbell(keys, REPORTS);
    // Between command and data, and with a control transfer between its stages.
    let read = [0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0];
    d.memory.write(DATA, &rig::wrapper(7, 1024, &read)).unwrap();
    d.normal(slot, OUT_PIPE, &[(DATA, 31)]);
    d.doorbell(slot, OUT_PIPE);
    assert_eq!(d.event().unwrap().status >> 24, 1);
    d.put(
        keys,
        1,
        (0x0012_0000_0100_0680, 8, 2 << 10 | 1 << 6 | 3 << 16),
    );
    d.doorbell(keys, 1);
    lock(&d.xhci).pause();
    d.normal(slot, IN_PIPE, &[(DATA, 512)]);
    d.doorbell(slot, IN_PIPE);
    assert!(d.event().is_none());
    let other = Driver::with(d.memory.clone(), d.disk.clone());
    conformance::state_moves(&mut *lock(&d.xhci), &mut *lock(&other.xhci));
    let mut d = d.moved_to(other);
    lock(&d.xhci).start();
    assert_eq!(
        d.event().unwrap().status,
        1 << 24,
        "the data that were asked for"
    );
    assert_eq!(d.bytes(DATA, 1), [3]);
    d.put(keys, 1, (DATA, 18, 3 << 10 | 1 << 16));
    d.put(keys, 1, (0, 0, 4 << 10 | 1 << 5));
    d.doorbell(keys, 1);
    assert_eq!(d.event().unwrap().status, 1 << 24);
    assert_eq!(d.bytes(DATA, 2), [18, 1]);
    let event = Input::Key {
        code: 0x1e,
        is_down: true,
    };
    lock(&d.xhci).input(&event);
    assert_eq!(d.event().unwrap().slot(), keys);
    assert_eq!(d.bytes(DATA + 0x802, 1), [4]);
    lock(&d.xhci).pause();
    conformance::damaged_state_is_survived(&mut *lock(&d.xhci), &pseudo_random(4, 6000));
    conformance::reset_is_idempotent(&mut *lock(&d.xhci));
}
