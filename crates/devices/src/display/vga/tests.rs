use pyrite_mem::{GuestMemory, Layout};
use pyrite_vdev::conformance::{self, Target};

use super::*;
use crate::display::Surface;

struct Nowhere;
impl BarMemory for Nowhere {
    fn place(&self, _gpa: Option<u64>) {}
}

/// A video BIOS of which only the characters are there: row `r` of character `c` is `c ^ r`.
fn rom() -> Vec<u8> {
    let mut font: Vec<u8> = (0..4096).map(|n| (n >> 4 ^ n & 15) as u8).collect();
    font[..16].fill(0);
    let face = [
        0, 0, 0x7e, 0x81, 0xa5, 0x81, 0x81, 0xbd, 0x99, 0x81, 0x81, 0x7e, 0, 0, 0, 0,
    ];
    font[16..32].copy_from_slice(&face);
    font[0x200..0x210].fill(0);
    let mut rom = vec![0x55, 0xaa, 0x14];
    rom.extend(font);
    rom
}

fn vga() -> Vga {
    let layout = Layout {
        ram_bytes: 1 << 20,
        has_video_window: true,
        rom: Vec::new(),
        device_bytes: vec![1 << 20],
    };
    let memory = Arc::new(GuestMemory::with_layout(&layout).unwrap());
    Vga::new(memory.device_memory(0).unwrap(), Arc::new(Nowhere), &rom()).unwrap()
}

fn drawn(v: &Vga) -> Surface {
    let mut s = Surface::default();
    v.picture().draw(&mut s);
    s
}

fn out(v: &mut Vga, port: u16, value: u8) {
    v.pio_write(port, &[value]);
}

fn set(v: &mut Vga, index_port: u16, index: u8, value: u8) {
    v.pio_write(index_port, &[index, value]);
}

fn dispi(v: &mut Vga, index: u16, value: u16) {
    v.pio_write(INDEX_PORT, &index.to_le_bytes());
    v.pio_write(DATA_PORT, &value.to_le_bytes());
}

fn dispi_read(v: &mut Vga, index: u16) -> u16 {
    v.pio_write(INDEX_PORT, &index.to_le_bytes());
    let mut b = [0; 2];
    v.pio_read(DATA_PORT, &mut b);
    u16::from_le_bytes(b)
}

/// A linear mode that is shown.
fn linear(v: &mut Vga, width: u16, height: u16, bpp: u16) {
    out(v, 0x3c2, 1);
    dispi(v, dispi::ENABLE, 0);
    for (index, value) in [(1, width), (2, height), (3, bpp), (4, 0x41)] {
        dispi(v, index, value);
    }
    v.pio_read(0x3da, &mut [0]);
    out(v, 0x3c0, 0x20);
}

#[test]
fn rom_without_characters_or_signature_is_refused() {
    let v = vga();
    let new = |rom: &[u8]| Vga::new(v.memory.clone(), Arc::new(Nowhere), rom).err();
    assert!(matches!(new(&[]), Some(VgaError::BadRom)));
    assert!(matches!(new(&[0x55, 0xaa, 0]), Some(VgaError::NoFont)));
    let long = [rom(), vec![0; MAX_ROM_BYTES]].concat();
    assert!(matches!(new(&long), Some(VgaError::BadRom)));
}

#[test]
fn text_is_drawn_with_attributes_and_cursor() {
    let mut v = vga();
    v.set_text_mode();
    assert_eq!((drawn(&v).width(), drawn(&v).height()), (720, 400));
    // "A" in bright red on blue in row 2, column 3; line graphics in column 4.
    let at = 0x1_8000 + (2 * 80 + 3) * 2;
    v.mmio_write(at, &[b'A', 0x1c, 0xcd, 0x07]);
    let mut back = [0; 4];
    v.mmio_read(at, &mut back);
    assert_eq!(back, [b'A', 0x1c, 0xcd, 0x07]);
    let s = drawn(&v);
    for row in 0..16u32 {
        let line = s.line(32 + row);
        let byte = b'A' ^ row as u8;
        for x in 0..8 {
            let on = byte >> (7 - x) & 1 != 0;
            assert_eq!(
                line[27 + x],
                if on { 0xff5555 } else { 0xaa },
                "row {row} dot {x}"
            );
        }
        assert_eq!(line[35], 0xaa, "the ninth dot is background");
        let byte = 0xcd ^ row as u8;
        assert_eq!(line[44] != 0, byte & 1 != 0, "line graphics go on");
    }
    assert_eq!(s.line(0)[0], 0, "cursor lines are the last ones");
    assert_eq!(s.line(13)[..9], [0xaaaaaa; 9]);
    set(&mut v, 0x3d4, 0x0a, 0x20);
    assert_eq!(drawn(&v).line(13)[..9], [0; 9]);
    // Scrolled by one row.
    v.pio_write(0x3d4, &[0x0d, 80]);
    assert_eq!(drawn(&v).line(16), s.line(32));
    set(&mut v, 0x3c4, 1, 0x20);
    assert!(drawn(&v).pixels().iter().all(|p| *p == 0), "screen off");
}

#[test]
fn characters_are_loaded_through_plane_2() {
    let mut v = vga();
    v.set_text_mode();
    // As operating systems do it: planar access to plane 2 at A0000H.
    for (port, index, value) in [(0x3c4, 2, 4), (0x3c4, 4, 7), (0x3ce, 5, 0), (0x3ce, 6, 0)] {
        set(&mut v, port, index, value);
    }
    v.mmio_write(32 * u64::from(b'x'), &[0xf0; 16]);
    for (port, index, value) in [
        (0x3c4, 2, 3),
        (0x3c4, 4, 2),
        (0x3ce, 5, 0x10),
        (0x3ce, 6, 0x0e),
    ] {
        set(&mut v, port, index, value);
    }
    v.mmio_write(0x1_8000 + 160, b"x\x0f");
    let s = drawn(&v);
    let half = [[0xff_ffff; 4], [0; 4]].concat();
    assert!((16..32).all(|y| s.line(y)[..8] == half));
}

#[test]
fn planar_writes_follow_the_modes() {
    let mut v = vga();
    v.set_text_mode();
    let (g, s) = (0x3ce, 0x3c4);
    for (port, index, value) in [(s, 2, 0xf), (s, 4, 6), (g, 5, 0), (g, 6, 5), (g, 1, 0)] {
        set(&mut v, port, index, value);
    }
    let planes = |v: &Vga, at: u64| {
        let mut b = [0; 4];
        v.memory.read(at * 4, &mut b);
        b
    };
    v.mmio_write(100, &[0x81]);
    assert_eq!(planes(&v, 100), [0x81; 4]);
    // Map mask and rotation.
    set(&mut v, s, 2, 0b0101);
    set(&mut v, g, 3, 1);
    v.mmio_write(100, &[0x02]);
    assert_eq!(planes(&v, 100), [0x01, 0x81, 0x01, 0x81]);
    set(&mut v, s, 2, 0xf);
    // Set/reset through a bit mask, the other bits from the latches.
    set(&mut v, g, 3, 0);
    set(&mut v, g, 0, 0b0010);
    set(&mut v, g, 1, 0xf);
    set(&mut v, g, 8, 0x0f);
    v.mmio_read(100, &mut [0]);
    v.mmio_write(100, &[0]);
    assert_eq!(planes(&v, 100), [0x00, 0x8f, 0x00, 0x80]);
    // Write mode 1 copies latches, mode 2 colours, mode 3 masks with the data.
    v.mmio_read(100, &mut [0]);
    set(&mut v, g, 5, 1);
    v.mmio_write(101, &[0]);
    assert_eq!(planes(&v, 101), [0x00, 0x8f, 0x00, 0x80]);
    set(&mut v, g, 5, 2);
    set(&mut v, g, 8, 0xff);
    v.mmio_write(102, &[0b1001]);
    assert_eq!(planes(&v, 102), [0xff, 0, 0, 0xff]);
    set(&mut v, g, 5, 3);
    v.mmio_read(102, &mut [0]);
    v.mmio_write(102, &[0x3c]);
    assert_eq!(planes(&v, 102), [0xc3, 0x3c, 0, 0xc3]);
    // XOR with the latches, and reading by colour.
    set(&mut v, g, 5, 0);
    set(&mut v, g, 1, 0);
    set(&mut v, g, 3, 0x18);
    v.mmio_read(102, &mut [0]);
    v.mmio_write(102, &[0xff]);
    assert_eq!(planes(&v, 102), [0x3c, 0xc3, 0xff, 0x3c]);
    set(&mut v, g, 5, 8);
    set(&mut v, g, 7, 0b0101);
    set(&mut v, g, 2, 0b0101);
    let mut b = [0];
    v.mmio_read(102, &mut b);
    assert_eq!(b, [0x3c]);
    // Shown as 16 colours.
    set(&mut v, 0x3d4, 0x13, 40);
    set(&mut v, 0x3d4, 0x09, 0x40);
    set(&mut v, 0x3d4, 0x11, 0);
    let s = drawn(&v);
    // 80 addresses per line: byte 102 is in line 1.
    let colors: Vec<u32> = s.line(1)[22 * 8..23 * 8].to_vec();
    // Planes 3C C3 FF 3C: colours 0110 (brown is entry 6 = 14H) and 1101.
    assert_eq!(
        colors,
        [
            0xaa5500, 0xaa5500, 0xff55ff, 0xff55ff, 0xff55ff, 0xff55ff, 0xaa5500, 0xaa5500
        ]
    );
}

#[test]
fn mode_13h_shows_bytes_twice_in_both_directions() {
    let mut v = vga();
    v.set_text_mode();
    set(&mut v, 0x3d4, 0x11, 0x0e);
    for (port, index, value) in [
        (0x3c4, 1, 1),
        (0x3c4, 2, 0xf),
        (0x3c4, 4, 0xe),
        (0x3ce, 5, 0x40),
        (0x3ce, 6, 5),
        (0x3d4, 0x09, 0x41),
        (0x3d4, 0x13, 40),
    ] {
        set(&mut v, port, index, value);
    }
    v.memory.write(0, &[0; 64000]);
    out(&mut v, 0x3c8, 200);
    for c in [63, 32, 0] {
        out(&mut v, 0x3c9, c);
    }
    v.mmio_write(320 * 7 + 5, &[200]);
    let s = drawn(&v);
    assert_eq!((s.width(), s.height()), (640, 400));
    for (x, y) in [(10, 14), (11, 14), (10, 15), (11, 15)] {
        assert_eq!(s.line(y)[x], 0xff8200);
    }
    assert_eq!((s.line(13)[10], s.line(14)[9], s.line(16)[10]), (0, 0, 0));
}

#[test]
fn linear_modes_show_what_is_in_memory() {
    for (bpp, bytes, pixel) in [
        (8, &[3u8][..], 0x0000a8),
        (15, &[0x1f, 0x7c][..], 0xff00ff),
        (16, &[0xe0, 0x07], 0x00ff00),
        (24, &[1, 2, 3], 0x030201),
        (32, &[1, 2, 3, 0xff], 0x030201),
    ] {
        let mut v = vga();
        linear(&mut v, 64, 32, bpp);
        for index in 0..4 {
            out(&mut v, 0x3c8, index);
            for c in [0, 0, 14 * index] {
                out(&mut v, 0x3c9, c);
            }
        }
        v.bar_write(0, (64 * 5 + 9) * bytes.len() as u64, bytes);
        let s = drawn(&v);
        assert_eq!((s.width(), s.height()), (64, 32));
        let lit: Vec<_> = s
            .pixels()
            .iter()
            .enumerate()
            .filter(|(_, p)| **p != 0)
            .collect();
        let pixel = if bpp == 8 { 0x0000aa } else { pixel };
        assert_eq!(lit, [(64 * 5 + 9, &pixel)], "{bpp} bits");
        // Blanked by the attribute controller's address register.
        v.pio_read(0x3da, &mut [0]);
        out(&mut v, 0x3c0, 0);
        assert!(drawn(&v).pixels().iter().all(|p| *p == 0));
    }
}

#[test]
fn dispi_keeps_the_picture_inside_memory() {
    let mut v = vga();
    assert_eq!(dispi_read(&mut v, 0), 0xb0c5);
    assert_eq!(dispi_read(&mut v, 10), 16);
    v.bar_write(0, 0, &[0xff; 16]);
    linear(&mut v, 1027, 4000, 32);
    assert_eq!((dispi_read(&mut v, 1), dispi_read(&mut v, 2)), (1024, 256));
    assert!(drawn(&v).pixels().iter().all(|p| *p == 0), "cleared");
    dispi(&mut v, dispi::VIRT_WIDTH, 2048);
    assert_eq!(dispi_read(&mut v, 7), 128);
    dispi(&mut v, dispi::X_OFFSET, 1025);
    assert_eq!(dispi_read(&mut v, 8), 0);
    linear(&mut v, 640, 100, 32);
    dispi(&mut v, dispi::Y_OFFSET, 300);
    v.bar_write(0, 640 * 4 * 300, &[1, 0, 0, 0]);
    assert_eq!(drawn(&v).pixels()[0], 1);
    dispi(&mut v, dispi::Y_OFFSET, 310);
    assert_eq!(dispi_read(&mut v, 9), 0);
    // The same registers in BAR 2, and a bank of memory in the window.
    let mut b = [0; 2];
    v.bar_read(2, 0x502, &mut b);
    assert_eq!(u16::from_le_bytes(b), 640);
    v.bar_write(2, 0x50a, &2u16.to_le_bytes());
    v.mmio_write(7, &[0x77]);
    v.bar_read(0, 0x2_0007, &mut b[..1]);
    assert_eq!(b[0], 0x77);
}

/// Drives all its interfaces.
fn exercise(v: &mut Vga, seed: u64) {
    let mut surface = Surface::default();
    for round in 0..6 {
        let bytes = conformance::pseudo_random(seed << 8 | round, 3000);
        conformance::fuzz_device(Target::Pci(v), &bytes, |_| {});
        let (first, last) = (PORTS_START, PORTS_START + PORTS_COUNT - 1);
        conformance::fuzz_device(
            Target::Pio {
                device: v,
                first,
                last,
            },
            &bytes,
            |_| {},
        );
        let (first, last) = (DISPI_PORTS_START, DISPI_PORTS_START + 2);
        // Small numbers, as resolutions are.
        let small: Vec<u8> = bytes.iter().map(|b| b & 0x43).collect();
        conformance::fuzz_device(
            Target::Pio {
                device: v,
                first,
                last,
            },
            &small[..500],
            |_| {},
        );
        let len = WINDOW_BYTES;
        conformance::fuzz_device(Target::Mmio { device: v, len }, &bytes, |_| {});
        v.picture().draw(&mut surface);
    }
    conformance::odd_memory_accesses(v, WINDOW_BYTES);
    conformance::odd_port_accesses(v, PORTS_START, PORTS_START + PORTS_COUNT - 1);
    conformance::odd_port_accesses(v, DISPI_PORTS_START, DISPI_PORTS_START + 2);
    v.picture().draw(&mut surface);
}

#[test]
fn arbitrary_accesses_are_survived_and_state_moves() {
    for seed in 1..25 {
        let (mut used, mut fresh) = (vga(), vga());
        if seed & 1 == 0 {
            used.set_text_mode();
        }
        exercise(&mut used, seed);
        conformance::state_moves(&mut used, &mut fresh);
        let bytes = conformance::pseudo_random(seed, 2000);
        conformance::damaged_state_is_survived(&mut fresh, &bytes);
        exercise(&mut fresh, seed);
        conformance::reset_is_idempotent(&mut used);
    }
}
