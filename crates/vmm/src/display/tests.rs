use std::io::Read;

use pyrite_devices::display::Surface;

use super::input::{Input, InputEvent};
use super::*;

fn picture(width: u32, height: u32, lit: &[(u32, u32)]) -> Surface {
    let mut s = Surface::new(width, height);
    for (x, y) in lit {
        s.line_mut(*y)[*x as usize] = 0x12_3456;
    }
    s
}

fn show(shown: &mut Shown, surface: Surface) {
    shown.next = surface;
    shown.turn();
}

#[test]
fn changes_are_found_in_tiles_and_joined() {
    let mut s = Shown::default();
    show(&mut s, picture(200, 50, &[]));
    let all = Rect {
        x: 0,
        y: 0,
        width: 200,
        height: 50,
    };
    assert_eq!(s.changes_since(0), [all]);
    assert!(s.resized_since(0) && !s.resized_since(1));
    let first = s.generation();
    show(&mut s, picture(200, 50, &[]));
    assert_eq!((s.generation(), s.changes_since(first)), (first, vec![]));
    // Two tiles next to each other, the one below the first, and the cut-off one in the corner.
    show(
        &mut s,
        picture(200, 50, &[(63, 0), (64, 3), (5, 17), (199, 49)]),
    );
    let rect = |x, y, width, height| Rect {
        x,
        y,
        width,
        height,
    };
    assert_eq!(
        s.changes_since(first),
        [
            rect(0, 0, 128, 16),
            rect(0, 16, 64, 16),
            rect(192, 48, 8, 2)
        ]
    );
    let second = s.generation();
    // The same columns one below another are one rectangle.
    show(&mut s, picture(200, 50, &[]));
    show(&mut s, picture(200, 50, &[(1, 1), (1, 17)]));
    assert!(s.changes_since(second).contains(&rect(0, 0, 128, 16)));
    let third = s.generation();
    show(&mut s, picture(100, 30, &[]));
    assert!(s.resized_since(third));
    assert_eq!(s.changes_since(third), [rect(0, 0, 100, 30)]);
}

#[test]
fn png_holds_the_pixels() {
    let s = picture(5, 3, &[(1, 0), (4, 0), (2, 2)]);
    let file = png::encode(&s).unwrap();
    let mut at = 8;
    let mut data = Vec::new();
    let mut kinds = Vec::new();
    while at < file.len() {
        let word = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
        let len = word(at) as usize;
        let (kind, body) = (&file[at + 4..at + 8], &file[at + 8..at + 8 + len]);
        let mut crc = flate2::Crc::new();
        crc.update(&file[at + 4..at + 8 + len]);
        assert_eq!(crc.sum(), word(at + 8 + len));
        if kind == b"IDAT" {
            flate2::read::ZlibDecoder::new(body)
                .read_to_end(&mut data)
                .unwrap();
        }
        kinds.push(String::from_utf8_lossy(kind).into_owned());
        at += 12 + len;
    }
    assert_eq!(kinds, ["IHDR", "IDAT", "IEND"]);
    assert_eq!(&file[16..26], [0, 0, 0, 5, 0, 0, 0, 3, 8, 2]);
    let mut lines: Vec<Vec<u8>> = data.chunks(16).map(<[u8]>::to_vec).collect();
    for n in 0..3_usize {
        let above = n.checked_sub(1).map(|n| lines[n].clone());
        let line = &mut lines[n];
        for i in 1..16 {
            let before = match line[0] {
                1 if i > 3 => line[i - 3],
                2 => above.as_ref().unwrap()[i],
                _ => 0,
            };
            line[i] = line[i].wrapping_add(before);
        }
    }
    for (y, line) in (0..).zip(&lines) {
        for (x, p) in line[1..].chunks(3).enumerate() {
            let rgb = s.line(y)[x].to_be_bytes();
            assert_eq!(p, &rgb[1..]);
        }
    }
}

#[test]
fn keys_have_names_characters_and_keysyms() {
    assert_eq!(
        keys::of_chord("ctrl-alt-delete").unwrap(),
        [0x1d, 0x38, 0xe053]
    );
    assert_eq!(keys::of_chord("F12").unwrap(), [0x58]);
    assert_eq!(keys::of_chord("ctrl--").unwrap(), [0x1d, 0x0c]);
    assert_eq!(keys::of_chord("-").unwrap(), [0x0c]);
    assert_eq!(keys::of_chord("shift-a").unwrap(), [0x2a, 0x1e]);
    for wrong in ["", "ctrl-", "hyper", "ctrl-nokey", "a-b-c-d-e-f-g-h-i"] {
        assert!(keys::of_chord(wrong).is_err(), "{wrong:?}");
    }
    for c in ' '..='~' {
        let (code, _) = keys::of_char(c).unwrap();
        assert_eq!(keys::of_keysym(c as u32), Some(code));
    }
    assert_eq!(keys::of_char('A'), Some((0x1e, true)));
    assert_eq!(keys::of_char('~'), Some((0x29, true)));
    assert_eq!(keys::of_char('\''), Some((0x28, false)));
    assert_eq!(keys::of_char('|'), Some((0x2b, true)));
    assert_eq!(keys::of_char('é'), None);
    assert_eq!(keys::of_keysym(0xff0d), Some(0x1c));
    assert_eq!(keys::of_keysym(0), None);
    assert_eq!(keys::of_xt(0x9c), Some(0xe01c));
    assert_eq!(keys::of_xt(0x100), None);
}

#[test]
fn typed_text_reaches_the_keyboard_in_order_and_waits_while_paused() {
    struct Nobody;
    impl pyrite_vdev::IrqSink for Nobody {
        fn set_level(&self, _gsi: u32, _level: bool) {}
    }
    impl pyrite_vdev::MsiSink for Nobody {
        fn send(&self, _: pyrite_vdev::MsiMessage) {}
    }
    impl pyrite_vdev::MachineEvents for Nobody {
        fn power_off(&self) {}
        fn reset(&self) {}
        fn suspend(&self) {}
        fn debug_exit(&self, _code: u32) {}
    }
    use pyrite_vdev::PioDevice;
    let line = |n| pyrite_vdev::IrqLine::new(Arc::new(Nobody), n);
    let device = pyrite_devices::i8042::I8042::new(line(1), line(12), Arc::new(Nobody));
    let device = Arc::new(Mutex::new(device));
    // The guest does not use the keyboard on USB.
    let memory = Arc::new(pyrite_mem::GuestMemory::new(1 << 20).unwrap());
    let clock = Arc::default();
    let keyboard = Box::new(pyrite_devices::usb::hid::keyboard::Keyboard::new());
    let usb = pyrite_devices::usb::xhci::Xhci::new(
        "xhci0",
        vec![keyboard],
        memory,
        &clock,
        Arc::new(Nobody),
        line(16),
    );
    let input = Input::new(&device, Some(&usb)).unwrap();
    assert!(!input.wants_place());
    // More than the keyboard holds at once.
    let text = "Hello, 8042! ".repeat(5);
    assert!(input.send(&Input::text(&text).unwrap()));
    assert!(Input::text("naïve").is_err());
    let status = || {
        let mut b = [0];
        lock(&device).pio_read(0x64, &mut b);
        b[0] & 1 != 0
    };
    std::thread::sleep(Duration::from_millis(20));
    assert!(!status(), "held back");
    input.pause(false);
    let mut codes = Vec::new();
    let until = Instant::now() + Duration::from_secs(20);
    let expected: usize = text
        .chars()
        .map(|c| if keys::of_char(c).unwrap().1 { 4 } else { 2 })
        .sum();
    while codes.len() < expected && Instant::now() < until {
        if status() {
            let mut b = [0];
            lock(&device).pio_read(0x60, &mut b);
            codes.push(b[0]);
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert_eq!(codes[..8], [0x2a, 0x23, 0xa3, 0xaa, 0x12, 0x92, 0x26, 0xa6]);
    assert_eq!(codes.len(), expected);
    let most = vec![InputEvent::Gap; 1 << 17];
    assert!(!input.send(&most), "more than there is room for");
}

#[test]
fn places_on_the_screen_are_shares_of_it() {
    use super::input::share;
    assert_eq!(
        [share(0, 640), share(639, 640), share(9999, 640)],
        [0, 0x7fff, 0x7fff]
    );
    assert_eq!([share(0, 1), share(7, 0)], [0, 0x7fff]);
    let events = Input::point((1, 2), 4, -3);
    let pointer = |buttons, dz| InputEvent::Pointer {
        dx: 0,
        dy: 0,
        dz,
        buttons,
        at: Some((1, 2)),
    };
    assert_eq!(events[0], pointer(0, -3));
    assert_eq!(
        events[1..],
        [
            InputEvent::Gap,
            pointer(4, 0),
            InputEvent::Gap,
            pointer(0, 0),
        ]
    );
}
