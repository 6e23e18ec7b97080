use super::*;
use pyrite_vdev::pci::{Doorbell, reg};
use pyrite_vdev::{AddressDecoder, BarMemory, Bus, IrqSink, MmioDevice, PioDevice};

struct NoIrq;
impl IrqSink for NoIrq {
    fn set_level(&self, _gsi: u32, _level: bool) {}
}

/// A function whose BARs are memory.
struct Scratch {
    config: ConfigSpace,
    cells: [u8; 64],
    placed: Arc<Placed>,
}

/// Where the memory of BAR 2 was told that it is.
#[derive(Default)]
struct Placed(Mutex<Vec<Option<u64>>>);
impl BarMemory for Placed {
    fn place(&self, gpa: Option<u64>) {
        lock(&self.0).push(gpa);
    }
}
impl Scratch {
    fn plug(host: &PciHost, slot: u8, function: u8) -> Arc<Mutex<Scratch>> {
        Scratch::plug_sized(host, slot, function, 0x1000)
    }
    fn plug_sized(host: &PciHost, slot: u8, function: u8, bar0: u64) -> Arc<Mutex<Scratch>> {
        let mut config = ConfigSpace::new(PciIds {
            vendor_id: 0xabcd,
            ..PciIds::default()
        });
        config.add_bar(0, BarKind::Mem64, bar0);
        config.add_bar(2, BarKind::Mem32, 0x2000);
        config.add_bar(3, BarKind::Io, 0x40);
        config.add_rom(0x800);
        config.set_intx(function & 3, host.intx_line(slot, function & 3).unwrap());
        let s = Arc::new(Mutex::new(Scratch {
            config,
            cells: [0; 64],
            placed: Arc::default(),
        }));
        host.plug(slot, function, s.clone()).unwrap();
        s
    }
}
impl PciFunction for Scratch {
    fn config_read(&mut self, offset: u16) -> u32 {
        self.config.read(offset)
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn bar(&self, index: u8) -> Option<(BarKind, u64)> {
        self.config.bar(index)
    }
    fn bar_address(&self, index: u8) -> Option<u64> {
        self.config.bar_address(index)
    }
    fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) {
        for (n, b) in (offset as usize..).zip(data) {
            *b = self.cells[n % 64];
        }
    }
    fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) {
        for (n, b) in (offset as usize..).zip(data) {
            self.cells[n % 64] = *b;
        }
    }
    fn bar_memory(&self, index: u8) -> Option<Arc<dyn BarMemory>> {
        (index == 2).then(|| Arc::<Placed>::clone(&self.placed) as Arc<dyn BarMemory>)
    }
    fn doorbells(&self) -> Vec<Doorbell> {
        vec![Doorbell {
            bar: 0,
            offset: 0x10,
            size_bytes: 2,
            datamatch: None,
            fd: 77,
        }]
    }
}

#[derive(Default)]
struct Bells(Mutex<Vec<(u8, Vec<u64>)>>);
impl DoorbellSink for Bells {
    fn replace(&self, devfn: u8, doorbells: &[DoorbellAt]) {
        lock(&self.0).push((devfn, doorbells.iter().map(|d| d.gpa).collect()));
    }
}

struct Rig {
    host: Arc<PciHost>,
    bells: Arc<Bells>,
    memory: Bus<dyn MmioDevice>,
    io: Bus<dyn PioDevice>,
}

fn rig() -> Rig {
    let bells = Arc::new(Bells::default());
    let host = PciHost::new(SharedLines::new(Arc::new(NoIrq)), Some(bells.clone()));
    let (memory, io) = (Bus::default(), Bus::default());
    crate::chipset::register_pci(&host, &memory, &io).unwrap();
    Rig {
        host,
        bells,
        memory,
        io,
    }
}

impl Rig {
    fn read32(&self, devfn: u32, offset: u32) -> u32 {
        self.io.write(
            0xcf8,
            &(0x8000_0000 | devfn << 8 | offset & 0xfc).to_le_bytes(),
        );
        let mut b = [0; 4];
        self.io.read(0xcfc, &mut b);
        u32::from_le_bytes(b)
    }
}

#[test]
fn mechanism_1_and_ecam_show_the_same() {
    let r = rig();
    Scratch::plug(&r.host, 3, 0);
    assert_eq!(r.read32(0, 0), 0x0008_1b36);
    assert_eq!(r.read32(3 << 3, 0), 0x0000_abcd);
    assert_eq!(r.read32(4 << 3, 0), u32::MAX);
    r.io.write(0xcf8, &(0x8000_1800u32 | 0x3c).to_le_bytes());
    r.io.write(0xcfc, &[0x55]);
    let mut b = [0; 2];
    r.io.read(0xcfc, &mut b);
    assert_eq!(b, [0x55, 1]);
    r.memory.read(ECAM_START + (3 << 15) + 0x3c, &mut b);
    assert_eq!(b, [0x55, 1]);
    let mut wide = [0; 8];
    r.memory.read(ECAM_START + (3 << 15) + 0x3a, &mut wide);
    assert_eq!(wide, [0, 0, 0x55, 1, 0, 0, 0, 0]);
    r.memory.read(ECAM_START + (1 << 20), &mut wide);
    assert_eq!(wide, [0xff; 8]);
    r.io.write(0xcf8, &[0; 4]);
    r.io.read(0xcfc, &mut b);
    assert_eq!(b, [0xff; 2], "disabled");
}

/// Where the 64-bit BAR of the first of two [`Scratch`] functions goes.
const BAR0: u64 = WINDOW32_START + 0x4000;

#[test]
fn only_large_bars_go_above_4_gib() {
    // 32-bit kernels either cannot map what is there or, with PAE, map something else.
    let r = rig();
    let small = Scratch::plug(&r.host, 1, 0);
    let large = Scratch::plug_sized(&r.host, 2, 0, 4 << 30);
    r.host.assign_bars().unwrap();
    assert!(lock(&small).bar_address(0).unwrap() < ECAM_START);
    assert_eq!(lock(&large).bar_address(0), Some(WINDOW64_START));
}

#[test]
fn assigned_bars_decode_and_follow_configuration_writes() {
    let r = rig();
    let f = Scratch::plug(&r.host, 1, 0);
    Scratch::plug(&r.host, 2, 0);
    r.host.assign_bars().unwrap();
    let at = |n| lock(&f).bar_address(n).unwrap();
    assert_eq!(
        (at(0), at(2), at(3)),
        (BAR0, WINDOW32_START, WINDOW_IO_START)
    );
    assert_eq!(r.read32(8, 0x3c) & 0xff, 17);
    r.memory.write(at(2) + 4, &[1, 2, 3]);
    assert_eq!(lock(&f).cells[4..7], [1, 2, 3]);
    let mut b = [0; 4];
    r.io.read(at(3) as u16 + 4, &mut b[..2]);
    assert_eq!(b[..2], [1, 2]);
    assert_eq!(
        *lock(&r.bells.0),
        [(8, vec![BAR0 + 0x10]), (16, vec![BAR0 + 0x1010])]
    );
    r.memory.write(
        ECAM_START + (1 << 15) + 0x10,
        &(BAR0 as u32 + 0x9000).to_le_bytes(),
    );
    r.memory.read(BAR0 + 4, &mut b);
    assert_eq!(b, [0xff; 4], "moved away");
    r.memory.read(BAR0 + 0x9004, &mut b);
    assert_eq!(b[..3], [1, 2, 3]);
    assert_eq!(lock(&r.bells.0).last(), Some(&(8, vec![BAR0 + 0x9010])));
    r.memory.write(ECAM_START + (1 << 15) + 4, &[0]);
    r.memory.read(BAR0 + 0x9004, &mut b);
    assert_eq!(b, [0xff; 4], "decoding is off");
    assert_eq!(lock(&r.bells.0).last(), Some(&(8, vec![])));
}

#[test]
fn overlapping_and_stray_bars_do_not_decode() {
    let r = rig();
    Scratch::plug(&r.host, 1, 0);
    let g = Scratch::plug(&r.host, 2, 0);
    r.host.assign_bars().unwrap();
    r.memory
        .write(ECAM_START + (2 << 15) + 0x10, &(BAR0 as u32).to_le_bytes());
    r.memory.write(BAR0, &[9]);
    assert_eq!(lock(&g).cells[0], 0, "the lower function keeps the range");
    r.memory
        .write(ECAM_START + (2 << 15) + 0x18, &0xfee0_0000u32.to_le_bytes());
    MemoryWindow(r.host.clone()).write(0xfee0_0000, &[9]);
    assert_eq!(lock(&g).cells[0], 0);
}

#[test]
fn multi_function_slots_say_so() {
    let r = rig();
    Scratch::plug(&r.host, 5, 0);
    assert_eq!(r.read32(5 << 3, 0x0c), 0);
    Scratch::plug(&r.host, 5, 2);
    assert_eq!(r.read32(5 << 3, 0x0c), 0x0080_0000);
    assert_eq!(r.read32(5 << 3 | 2, 0x3c) >> 8, 3);
    let again = lock(&r.host.plugged).functions[&40].device.clone();
    assert!(r.host.plug(5, 0, again.clone()).is_err());
    assert!(r.host.plug(32, 0, again).is_err());
    assert_eq!((intx_gsi(1, 0), intx_gsi(7, 3)), (17, 18));
}

#[test]
fn host_save_restore_and_reset() {
    let r = rig();
    let mut unit = PciHostUnit::new(r.host.clone());
    let fresh = unit.save().unwrap();
    r.read32(0, 0x3c);
    r.io.write(0xcfc, &[7]);
    let saved = unit.save().unwrap();
    assert_ne!(saved, fresh);
    unit.reset();
    assert_eq!(unit.save().unwrap(), fresh);
    unit.restore(&saved).unwrap();
    assert_eq!(unit.save().unwrap(), saved);
}

#[test]
fn memory_behind_a_bar_hears_where_it_decodes() {
    let r = rig();
    let s = Scratch::plug(&r.host, 3, 0);
    let other = Scratch::plug(&r.host, 4, 0);
    let heard = |s: &Arc<Mutex<Scratch>>| std::mem::take(&mut *lock(&lock(s).placed.0));
    r.host.assign_bars().unwrap();
    let at = |r: &Rig, slot: u32| u64::from(r.read32(slot << 3, 0x18) & !0xf);
    let (here, there) = (at(&r, 3), at(&r, 4));
    assert_eq!(
        (heard(&s), heard(&other)),
        (vec![Some(here)], vec![Some(there)])
    );
    // On the place of the other, which comes after it: the other one loses.
    r.host
        .config_write(0, 3 << 3, 0x18, &(there as u32).to_le_bytes());
    assert_eq!(heard(&s).last(), Some(&Some(there)));
    assert_eq!(heard(&other), [None]);
    r.host.config_write(0, 3 << 3, reg::COMMAND, &[0, 0]);
    assert_eq!((heard(&s), heard(&other)), (vec![None], vec![Some(there)]));
}

#[test]
fn expansion_rom_decodes_when_it_is_enabled() {
    let r = rig();
    let s = Scratch::plug(&r.host, 3, 0);
    r.host.assign_bars().unwrap();
    lock(&s).cells = [0x5a; 64];
    let rom = r.read32(3 << 3, 0x30);
    assert_eq!(rom & 0x7ff, 0, "assigned and disabled");
    let read = |at: u32| {
        let mut b = [0];
        r.memory.read(u64::from(at), &mut b);
        b[0]
    };
    assert_eq!(read(rom), 0xff);
    r.host
        .config_write(0, 3 << 3, 0x30, &(rom | 1).to_le_bytes());
    assert_eq!((read(rom), read(rom + 0x7ff)), (0x5a, 0x5a));
    // Sizing.
    r.host
        .config_write(0, 3 << 3, 0x30, &0xffff_fffeu32.to_le_bytes());
    assert_eq!(r.read32(3 << 3, 0x30), 0xffff_f800);
}
