use super::*;
use pyrite_api::v1::{DiskFormat, DiskSpec, NetSpec, UsbSpec};
use pyrite_state::Section;

/// Nobody listens.
struct Ignored;

impl MachineEvents for Ignored {
    fn power_off(&self) {}
    fn reset(&self) {}
    fn suspend(&self) {}
    fn debug_exit(&self, _code: u32) {}
}

struct TempFile(std::path::PathBuf);

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

const MEMORY: u64 = 64 << 20;

/// A machine with every device of board 1, and the file of its disk.
fn machine(name: &str) -> (Machine, TempFile) {
    machine_with(name, UsbSpec::default())
}

fn machine_with(name: &str, usb: UsbSpec) -> (Machine, TempFile) {
    let path = std::env::temp_dir().join(format!("pyrite-machine-{name}-{}", std::process::id()));
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let spec = VmSpec {
        cpus: 2,
        memory_bytes: MEMORY,
        disks: vec![DiskSpec {
            path: path.clone(),
            ..DiskSpec::default()
        }],
        net: NetSpec::default(),
        console: ConsoleKind::Virtio,
        balloon: true,
        usb,
        ..VmSpec::default()
    };
    let cpuid = crate::engines::guest_cpuid(Engine::Soft, "host", 2).unwrap();
    let console = Console::new(false, Box::new(|_| {}));
    let m = Machine::build(&spec, Engine::Soft, cpuid, console, Arc::new(Ignored));
    let Ok(m) = m else { panic!("no machine") };
    m.chipset.pci.assign_bars().unwrap();
    (m, TempFile(path))
}

#[test]
fn disks_are_flushed_without_the_guest() {
    let (_m, file) = machine("flush-raw");
    let image = TempFile(file.0.with_extension("qcow2"));
    let storage = pyrite_disk::storage::HostFile::create(&image.0, true).unwrap();
    let options = pyrite_disk::qcow2::CreateOptions::new(4 << 20);
    pyrite_disk::qcow2::create(&storage, &options).unwrap();
    drop(storage);
    let disk = DiskSpec {
        path: image.0.clone(),
        format: DiskFormat::Qcow2,
        ..DiskSpec::default()
    };
    let spec = VmSpec {
        memory_bytes: MEMORY,
        disks: vec![disk.clone()],
        ..VmSpec::default()
    };
    let cpuid = crate::engines::guest_cpuid(Engine::Soft, "host", 1).unwrap();
    let console = Console::new(false, Box::new(|_| {}));
    let m = Machine::build(&spec, Engine::Soft, cpuid, console, Arc::new(Ignored));
    let Ok(m) = m else { panic!("no machine") };
    m.memory.write(0x1000, &[0x77; 512]).unwrap();
    let bufs = vec![pyrite_disk::IoBuf {
        gpa: 0x1000,
        len: 512,
    }];
    let write = pyrite_disk::BlockRequest::Write {
        offset: 1 << 20,
        bufs,
        fua: false,
    };
    let (sender, receiver) = std::sync::mpsc::channel();
    let done = Box::new(move |r| sender.send(r).unwrap());
    m.disks.image(0).submit(&m.memory, write, done);
    receiver.recv().unwrap().unwrap();
    // What another process would find if this one were killed now.
    let found = || {
        let copy = TempFile(image.0.with_extension("copy"));
        std::fs::copy(&image.0, &copy.0).unwrap();
        let options = open_options(&disk).read_only();
        let there = pyrite_disk::open::open(&copy.0, options).unwrap();
        let mut sector = [0; 512];
        pyrite_disk::image::read_into(&*there, 1 << 20, &mut sector).unwrap();
        sector
    };
    assert_eq!(found(), [0; 512], "only in memory yet");
    m.disks.flush(&m.memory).unwrap();
    assert_eq!(found(), [0x77; 512]);
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// Values that devices take seriously more often than noise.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.below(256),
            4 => self.below(MEMORY) & !0xfff,
            _ => self.next(),
        }
    }
}

/// Ports with something behind them; the rest is tried as well.
const PORTS: &[u16] = &[
    0x20, 0x21, 0xa0, 0xa1, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0x2f8, 0x3f8, 0x3fc,
    0x402, 0x4d0, 0x510, 0x511, 0x514, 0x518, 0x600, 0x604, 0x608, 0x620, 0xcf8, 0xcfc, 0xc000,
];
const PAGES: &[u64] = &[
    0xc000_0000,
    0xe000_0000,
    0xe000_8000,
    0xe001_0000,
    0xe001_8000,
    0xfec0_0000,
    0xfed0_0000,
    0xfee0_0000,
    0x80_0000_0000,
];

/// One access of a hostile guest.
fn poke(io: &dyn CpuIo, r: &mut Random, bars: &[u64]) {
    let len = r.pick(&[1usize, 2, 4]);
    let mut data = r.value().to_le_bytes();
    if r.below(3) == 0 {
        let port = match r.below(4) {
            0 => r.next() as u16,
            _ => r.pick(PORTS).wrapping_add(r.below(8) as u16),
        };
        // Resets and the debug exit are told to the machine, which has its own tests.
        if r.below(2) == 0 {
            io.pio_read(0, port, &mut data[..len]);
        } else {
            io.pio_write(0, port, &data[..len]);
        }
        return;
    }
    let len = r.pick(&[1usize, 2, 4, 8]);
    let page = match r.below(8) {
        0 => r.pick(PAGES),
        1 => 0xe000_0000 + (r.below(10) << 15),
        2 => r.value(),
        _ => r.pick(bars),
    };
    let near = match r.below(3) {
        0 => r.below(0x40),
        1 => r.below(0x1000),
        _ => r.below(16) << 12 | r.below(0x40),
    };
    let gpa = page.wrapping_add(near);
    if r.below(3) == 0 {
        io.mmio_read(1, gpa, &mut data[..len]);
    } else {
        io.mmio_write(1, gpa, &data[..len]);
    }
}

/// Addresses of the memory BARs of all functions.
fn bars(m: &Machine) -> Vec<u64> {
    let io = MachineIo(Arc::clone(&m.chipset));
    let mut found = Vec::new();
    let read = |at: u64| {
        let mut b = [0; 4];
        io.mmio_read(0, 0xe000_0000 + at, &mut b);
        u32::from_le_bytes(b)
    };
    for slot in 0..32u64 {
        for n in 0..6 {
            let at = (slot << 15) | (0x10 + n * 4);
            let low = read(at);
            if low & 1 == 0 && low & !0xf != 0 && low != u32::MAX {
                let high = if low & 4 != 0 { read(at + 4) } else { 0 };
                found.push(u64::from(high) << 32 | u64::from(low & !0xf));
            }
        }
    }
    assert!(found.len() >= 5, "{found:x?}");
    found
}

fn settle(m: &Machine) {
    for u in &m.units {
        lock(u).pause();
    }
    for u in &m.units {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !lock(u).drained() {
            assert!(std::time::Instant::now() < until, "{}", lock(u).unit());
            std::thread::yield_now();
        }
    }
}

fn save(m: &Machine) -> Vec<Section> {
    m.units.iter().map(|u| lock(u).save().unwrap()).collect()
}

/// Whatever a guest writes wherever: nothing panics or hangs, devices come to rest, and their
/// state survives a save and a restore as it is.
#[test]
fn hostile_guests_leave_machines_that_can_be_saved() {
    for seed in 1..=6u64 {
        let usb = UsbSpec {
            keyboard: true,
            tablet: true,
        };
        let (m, _file) = machine_with(&format!("a{seed}"), usb);
        let io = MachineIo(Arc::clone(&m.chipset));
        let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let bars = bars(&m);
        for u in &m.units {
            lock(u).start();
        }
        let mut text = vec![0; 4096];
        for round in 0..40 {
            // Queues and descriptors of noise.
            text.iter_mut().for_each(|b| *b = r.value() as u8);
            m.memory.write(r.below(MEMORY - 4096), &text).unwrap();
            for _ in 0..1500 {
                poke(&io, &mut r, &bars);
            }
            m.clock.advance(r.below(5_000_000));
            if round % 10 == 9 {
                settle(&m);
                for u in &m.units {
                    lock(u).start();
                }
            }
        }
        settle(&m);
        let first = save(&m);
        assert_eq!(first, save(&m), "seed {seed}: saved twice");
        let (other, _file) = machine_with(&format!("b{seed}"), usb);
        other.clock.set_ns(m.clock.now_ns());
        let mut page = vec![0; 1 << 20];
        for gpa in (0..MEMORY).step_by(page.len()) {
            m.memory.read(gpa, &mut page).unwrap();
            other.memory.write(gpa, &page).unwrap();
        }
        for u in other.restore_order() {
            let mut u = lock(u);
            let s = first.iter().find(|s| s.unit == u.unit()).unwrap();
            let done = u.restore(s);
            assert!(done.is_ok(), "seed {seed}: {done:?}");
        }
        for (a, b) in first.iter().zip(save(&other)) {
            assert_eq!(*a, b, "seed {seed}: restored {}", a.unit);
        }
        for u in &other.units {
            lock(u).reset();
        }
    }
}

/// What a guest sees of board version 1: address ranges, PCI functions with their registers.
fn layout(m: &Machine) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    for (first, last, name) in m.chipset.io.ranges() {
        writeln!(out, "port {first:04x}-{last:04x} {name}").unwrap();
    }
    for (first, last, name) in m.chipset.mmio.ranges() {
        writeln!(out, "memory {first:010x}-{last:010x} {name}").unwrap();
    }
    let io = MachineIo(Arc::clone(&m.chipset));
    for function in 0..256u64 {
        let read = |at: u64| {
            let mut b = [0; 4];
            io.mmio_read(0, 0xe000_0000 + (function << 12) + at, &mut b);
            u32::from_le_bytes(b)
        };
        if read(0) == u32::MAX {
            continue;
        }
        writeln!(out, "pci {:02x}.{}", function >> 3, function & 7).unwrap();
        for at in (0..256).step_by(16) {
            let line: Vec<String> = (0..4)
                .map(|n| format!("{:08x}", read(at + 4 * n)))
                .collect();
            if line.iter().any(|w| w != "00000000") {
                writeln!(out, "  {at:02x}: {}", line.join(" ")).unwrap();
            }
        }
    }
    out
}

/// A change here moves things under guests that are installed or saved: it needs a new board
/// version. `PYRITE_ACCEPT_GOLDEN=1` rewrites the file.
#[test]
fn guest_visible_layout_is_the_golden_board() {
    let (m, _file) = machine("golden");
    let seen = layout(&m);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/board-1.txt");
    if std::env::var_os("PYRITE_ACCEPT_GOLDEN").is_some() {
        std::fs::write(path, &seen).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    assert!(seen == golden, "a guest would see another board:\n{seen}");
}
