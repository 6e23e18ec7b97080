use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pyrite_devices::display::vga::Vga;
use pyrite_devices::i8042::I8042;
use pyrite_mem::{GuestMemory, Layout};
use pyrite_vdev::bus::lock;
use pyrite_vdev::conformance::pseudo_random;
use pyrite_vdev::{BarMemory, IrqLine, IrqSink, MachineEvents, MmioDevice, PciFunction, PioDevice};

use super::testing::{self, Viewer};
use super::*;

struct Nobody;
impl IrqSink for Nobody {
    fn set_level(&self, _gsi: u32, _level: bool) {}
}
impl MachineEvents for Nobody {
    fn power_off(&self) {}
    fn reset(&self) {}
    fn suspend(&self) {}
    fn debug_exit(&self, _code: u32) {}
}
impl BarMemory for Nobody {
    fn place(&self, _gpa: Option<u64>) {}
}

/// A screen, a keyboard and a server for them.
struct Rig {
    vga: Arc<Mutex<Vga>>,
    keyboard: Arc<Mutex<I8042>>,
    server: Server,
    path: PathBuf,
}

/// A video BIOS with nothing but characters.
fn rom() -> Vec<u8> {
    let mut font: Vec<u8> = (0..4096).map(|n| (n >> 4 ^ n & 15) as u8).collect();
    font[..16].fill(0);
    let face = [
        0, 0, 0x7e, 0x81, 0xa5, 0x81, 0x81, 0xbd, 0x99, 0x81, 0x81, 0x7e,
    ];
    font[16..32].fill(0);
    font[16..28].copy_from_slice(&face);
    [&[0x55, 0xaa, 9][..], &font].concat()
}

fn rig(name: &str, tcp: bool, password: Option<&str>) -> Rig {
    let layout = Layout {
        ram_bytes: 1 << 20,
        has_video_window: true,
        device_bytes: vec![4 << 20],
        ..Layout::default()
    };
    let memory = Arc::new(GuestMemory::with_layout(&layout).unwrap());
    let memory = memory.device_memory(0).unwrap();
    let mut vga = Vga::new(memory, Arc::new(Nobody), &rom()).unwrap();
    vga.set_text_mode();
    let vga = Arc::new(Mutex::new(vga));
    let line = |n| IrqLine::new(Arc::new(Nobody), n);
    let keyboard = Arc::new(Mutex::new(I8042::new(line(1), line(12), Arc::new(Nobody))));
    let input = Input::new(&keyboard).unwrap();
    input.pause(false);
    let screen = Arc::new(Screen::new(vga.clone()));
    let path = std::env::temp_dir().join(format!("pyrite-vnc-{name}-{}", std::process::id()));
    let at = if tcp {
        VncListen::Tcp("127.0.0.1:0".parse().unwrap())
    } else {
        VncListen::Unix(path.clone())
    };
    let server = Server::listen(&at, screen, input, "a guest", password).unwrap();
    server.serve().unwrap();
    Rig {
        vga,
        keyboard,
        server,
        path,
    }
}

impl Rig {
    fn write(&self, row: u64, text: &[u8]) {
        let cells: Vec<u8> = text.iter().flat_map(|c| [*c, 0x1e]).collect();
        lock(&self.vga).mmio_write(0x1_8000 + row * 160, &cells);
    }
    /// A linear mode with noise, gradients and plain areas.
    fn show_graphics(&self, width: u16, height: u16, seed: u64) {
        let mut v = lock(&self.vga);
        for (index, value) in [(4u16, 0), (1, width), (2, height), (3, 32), (4, 0x41)] {
            v.pio_write(0x1ce, &index.to_le_bytes());
            v.pio_write(0x1cf, &value.to_le_bytes());
        }
        let noise = pseudo_random(seed, 64 * 64 * 3);
        for y in 0..u64::from(height) {
            for x in 0..u64::from(width) {
                let n = ((y % 64 * 64 + x % 64) * 3) as usize;
                let rgb = match (x / 64 + y / 64) % 6 {
                    0 => [noise[n], noise[n + 1], noise[n + 2]],
                    1 => [(x / 9) as u8, 0, 0],
                    2 => [noise[n] & 7, 1, 2],
                    3 => [noise[n] & 1, 1, 2],
                    4 => [noise[n] & 63, 0, (y & 1) as u8],
                    _ => [9, 9, 9],
                };
                v.bar_write(0, (y * u64::from(width) + x) * 4, &rgb);
            }
        }
        v.pio_read(0x3da, &mut [0]);
        v.pio_write(0x3c0, &[0x20]);
    }
    fn pixels(&self) -> Vec<u32> {
        let screen = &self.server.shared.screen;
        screen.look(Duration::ZERO, |s| s.surface().pixels().to_vec())
    }
    fn scan_codes(&self, count: usize) -> Vec<u8> {
        let mut codes = Vec::new();
        let until = Instant::now() + Duration::from_secs(20);
        while codes.len() < count && Instant::now() < until {
            let mut k = lock(&self.keyboard);
            let mut b = [0];
            k.pio_read(0x64, &mut b);
            if b[0] & 1 != 0 {
                k.pio_read(0x60, &mut b);
                codes.push(b[0]);
            } else {
                drop(k);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        codes
    }
    fn wait_for_clients(&self, count: usize) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.server.clients() != count {
            assert!(Instant::now() < until, "{} clients", self.server.clients());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn raw_and_zrle_show_the_same_picture_and_follow_it() {
    let r = rig("encodings", false, None);
    r.write(3, b"hello");
    for encoding in [testing::RAW, testing::ZRLE] {
        let mut v = Viewer::connect(&r.path, None).unwrap();
        assert_eq!((v.size, v.name.as_str()), ((720, 400), "a guest"));
        v.set_encodings(&[encoding, testing::DESKTOP_SIZE]).unwrap();
        v.request(false).unwrap();
        v.update().unwrap();
        assert!(v.pixels == r.pixels(), "another picture");
        assert_eq!(v.encodings, [encoding]);
        let all = v.bytes;
        // An incremental request is answered when something changes, with that only.
        v.request(true).unwrap();
        r.write(7, if encoding == testing::RAW { b"x" } else { b"y" });
        v.update().unwrap();
        assert!(v.pixels == r.pixels(), "another picture");
        assert!(v.bytes - all < 64 * 32 * 4, "{} bytes", v.bytes - all);
        // Another mode: first the size, then its picture.
        r.show_graphics(904, 517, encoding as u64);
        v.request(true).unwrap();
        v.update().unwrap();
        assert_eq!(v.size, (904, 517));
        v.request(true).unwrap();
        v.update().unwrap();
        assert!(v.pixels == r.pixels(), "another picture");
        lock(&r.vga).set_text_mode();
        r.write(3, b"hello");
    }
    r.wait_for_clients(0);
}

#[test]
fn clients_without_resize_keep_their_size_and_others_hear_of_it() {
    let r = rig("resize", false, None);
    let mut old = Viewer::connect(&r.path, None).unwrap();
    let mut new = Viewer::connect(&r.path, None).unwrap();
    new.set_encodings(&[testing::ZRLE, testing::EXTENDED_DESKTOP_SIZE])
        .unwrap();
    new.request(false).unwrap();
    new.update().unwrap();
    assert_eq!(new.encodings, [testing::EXTENDED_DESKTOP_SIZE]);
    // SetDesktopSize is answered, and refused.
    new.send(&[251, 0, 4, 0, 3, 0, 1, 0]).unwrap();
    new.send(&[0; 16]).unwrap();
    new.update().unwrap();
    assert_eq!(new.size, (720, 400));
    r.show_graphics(800, 200, 1);
    old.request(false).unwrap();
    old.update().unwrap();
    assert_eq!(old.size, (720, 400));
    let shown = r.pixels();
    for y in 0..200 {
        assert!(
            old.pixels[y * 720..][..720] == shown[y * 800..][..720],
            "line {y}"
        );
    }
    new.request(true).unwrap();
    new.update().unwrap();
    assert_eq!(new.size, (800, 200));
}

#[test]
fn keys_and_pointer_reach_the_guest_and_are_let_go() {
    let r = rig("input", false, None);
    let mut v = Viewer::connect(&r.path, None).unwrap();
    v.type_text("a\n").unwrap();
    assert_eq!(r.scan_codes(4), [0x1e, 0x9e, 0x1c, 0x9c]);
    // QEMU extended key event: right control, by number.
    v.send(&[255, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x9d]).unwrap();
    assert_eq!(r.scan_codes(2), [0xe0, 0x1d]);
    // A client that goes away holds no key.
    drop(v);
    assert_eq!(r.scan_codes(2), [0xe0, 0x9d]);
    // The mouse, switched on as drivers do.
    {
        let mut k = lock(&r.keyboard);
        k.pio_write(0x64, &[0xd4]);
        k.pio_write(0x60, &[0xf4]);
    }
    assert_eq!(r.scan_codes(1), [0xfa]);
    let mut v = Viewer::connect(&r.path, None).unwrap();
    v.send(&[5, 0, 0, 100, 0, 100]).unwrap();
    v.send(&[5, 0, 0, 103, 0, 98]).unwrap();
    v.send(&[5, 4, 0, 103, 0, 98]).unwrap();
    let packets = r.scan_codes(6);
    assert_eq!(packets, [0x08, 3, 2, 0x0a, 0, 0]);
}

#[test]
fn password_is_asked_for_and_checked() {
    let r = rig("password", false, Some("secret99 and more"));
    assert!(Viewer::connect(&r.path, None).is_err());
    let e = Viewer::connect(&r.path, Some("wrong")).err().unwrap();
    assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
    Viewer::connect(&r.path, Some("secret99")).unwrap();
    // DES with mirrored keys: a known answer, computed by another implementation.
    let key = *b"COW\0\0\0\0\0";
    let challenge = [0x11; 16];
    let answer = super::handshake::response(&key, &challenge);
    assert_eq!(answer[..8], answer[8..]);
}

#[test]
fn socket_is_private_and_goes_away() {
    let r = rig("socket", false, None);
    let mode = fs::metadata(&r.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = crate::socket::listen(&r.path).err().unwrap();
    assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
    let path = r.path.clone();
    drop(r);
    assert!(!path.exists());
    fs::write(&path, "data").unwrap();
    assert!(crate::socket::listen(&path).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"data");
    fs::remove_file(&path).unwrap();
}

#[test]
fn clients_beyond_the_limit_are_turned_away() {
    let r = rig("crowd", false, None);
    let crowd: Vec<_> = (0..CLIENTS)
        .map(|_| Viewer::connect(&r.path, None).unwrap())
        .collect();
    assert!(Viewer::connect(&r.path, None).is_err());
    drop(crowd);
    r.wait_for_clients(0);
    Viewer::connect(&r.path, None).unwrap();
}

/// A WebSocket as a viewer's stream.
struct Socket(TcpStream, Vec<u8>);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.1.is_empty() {
            let mut head = [0; 2];
            self.0.read_exact(&mut head)?;
            assert_eq!(head[0] & 0x80, 0x80);
            let len = match head[1] {
                126 => {
                    let mut b = [0; 2];
                    self.0.read_exact(&mut b)?;
                    u16::from_be_bytes(b).into()
                }
                127 => {
                    let mut b = [0; 8];
                    self.0.read_exact(&mut b)?;
                    u64::from_be_bytes(b) as usize
                }
                n => usize::from(n),
            };
            let mut body = vec![0; len];
            self.0.read_exact(&mut body)?;
            match head[0] & 15 {
                2 => self.1 = body,
                10 => assert_eq!(body, b"there?"),
                other => panic!("frame {other}"),
            }
        }
        let n = buffer.len().min(self.1.len());
        buffer[..n].copy_from_slice(&self.1[..n]);
        self.1.drain(..n);
        Ok(n)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mask = [1, 2, 3, 4];
        let frame = |op: u8, body: &[u8]| {
            let mut out = vec![0x80 | op, 0x80 | body.len() as u8];
            out.extend(mask);
            out.extend(body.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
            out
        };
        // Cut as it comes, with pings in between.
        let n = bytes.len().min(5);
        self.0.write_all(&frame(9, b"there?"))?;
        self.0.write_all(&frame(2, &bytes[..n]))?;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn upgrade(r: &Rig, origin: &str) -> (TcpStream, String) {
    let mut s = TcpStream::connect(r.server.address()).unwrap();
    let request = format!(
        "GET /websockify HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Protocol: binary\r\nOrigin: {origin}\r\n\r\n"
    );
    s.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") && s.read(&mut byte).unwrap_or(0) == 1 {
        answer.push(byte[0]);
    }
    (s, String::from_utf8(answer).unwrap())
}

#[test]
fn websocket_works_on_the_same_port() {
    let r = rig("websocket", true, None);
    r.write(1, b"through a WebSocket");
    // The example of RFC 6455 §1.3.
    let (s, answer) = upgrade(&r, "http://localhost:6080");
    assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
    assert!(answer.contains("Protocol: binary"), "{answer}");
    let mut v = Viewer::open(Socket(s, Vec::new()), None).unwrap();
    v.set_encodings(&[testing::ZRLE]).unwrap();
    v.request(false).unwrap();
    v.update().unwrap();
    assert!(v.pixels == r.pixels(), "another picture");
    let plain = TcpStream::connect(r.server.address()).unwrap();
    Viewer::open(plain, None).unwrap();
    // A page of somebody else gets nothing, unless it must know a password.
    let (_, answer) = upgrade(&r, "https://example.com");
    assert_eq!(answer, "");
    let r = rig("websocket-2", true, Some("x"));
    let (_, answer) = upgrade(&r, "https://example.com");
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
}

#[test]
fn pixel_formats_are_obeyed() {
    let r = rig("formats", false, None);
    r.show_graphics(64, 64, 7);
    let format = |b: [u8; 13]| [&[0, 0, 0, 0][..], &b, &[0; 3]].concat();
    // 16 bits, big-endian, 5-6-5.
    let mut v = Viewer::connect(&r.path, None).unwrap();
    v.send(&format([16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0]))
        .unwrap();
    v.request(false).unwrap();
    let mut s = v.into_stream();
    let mut head = [0; 16];
    s.read_exact(&mut head).unwrap();
    let mut data = vec![0; 64 * 64 * 2];
    s.read_exact(&mut data).unwrap();
    for (p, b) in r.pixels().iter().zip(data.chunks(2)) {
        let part = |by: u32, max: u32| ((p >> by & 255) * max + 127) / 255;
        let expected = part(16, 31) << 11 | part(8, 63) << 5 | part(0, 31);
        assert_eq!(u32::from(u16::from_be_bytes([b[0], b[1]])), expected);
    }
    // A colour map.
    let mut v = Viewer::connect(&r.path, None).unwrap();
    v.send(&format([8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
        .unwrap();
    v.request(false).unwrap();
    let mut s = v.into_stream();
    let mut map = vec![0; 6 + 256 * 6];
    s.read_exact(&mut map).unwrap();
    assert_eq!(map[..6], [1, 0, 0, 0, 1, 0]);
    assert_eq!(map[map.len() - 6..], [0xff; 6]);
    for wrong in [
        [24, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0],
        [32, 24, 0, 1, 0, 254, 0, 255, 0, 255, 16, 8, 0],
        [8, 8, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0],
        [32, 24, 0, 0, 0, 255, 0, 255, 0, 255, 16, 8, 0],
    ] {
        let mut v = Viewer::connect(&r.path, None).unwrap();
        v.send(&format(wrong)).unwrap();
        // It may be gone by now.
        let _ = v.request(false);
        assert!(v.update().is_err(), "{wrong:?}");
    }
}

#[test]
fn hostile_clients_end_and_hurt_nobody() {
    let r = rig("hostile", false, None);
    let mut witness = Viewer::connect(&r.path, None).unwrap();
    for seed in 0..27 {
        let noise = pseudo_random(seed, 2000);
        if seed % 3 == 0 {
            // Instead of an opening.
            let mut s = UnixStream::connect(&r.path).unwrap();
            let begin: &[u8] = [
                &b"GET / HTTP/1.1\r\n"[..],
                b"RFB 003.003\n",
                b"RFB 003.008\n",
            ][(seed / 3 % 3) as usize];
            let _ = s.write_all(begin);
            let _ = s.write_all(&noise);
            let _ = s.shutdown(std::net::Shutdown::Write);
            let _ = s.read_to_end(&mut Vec::new());
            continue;
        }
        let mut v = Viewer::connect(&r.path, None).unwrap();
        let mut bytes = Vec::new();
        for part in noise.chunks(40) {
            // Messages that exist, with any content.
            bytes.push([0, 2, 3, 4, 5, 6, 251, 255][usize::from(part[0] & 7)]);
            bytes.extend(&part[1..part.len().min(usize::from(part[1] & 31) + 2)]);
        }
        let _ = v.send(&bytes);
        drop(v);
    }
    // A clipboard without end.
    let mut v = Viewer::connect(&r.path, None).unwrap();
    v.send(&[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).unwrap();
    assert!(v.update().is_err());
    drop(v);
    r.wait_for_clients(1);
    witness.set_encodings(&[testing::ZRLE]).unwrap();
    witness.request(false).unwrap();
    witness.update().unwrap();
    assert!(witness.pixels == r.pixels(), "another picture");
}
