use std::sync::{Arc, Mutex};

use super::*;

const RAM: Route = Route {
    read_ram: true,
    write_ram: true,
};
const READ_ONLY: Route = Route {
    read_ram: true,
    write_ram: false,
};
const WRITE_ONLY: Route = Route {
    read_ram: false,
    write_ram: true,
};

/// 4 MiB of RAM and 256 KiB of ROM whose bytes tell their page.
fn memory() -> GuestMemory {
    let rom: Vec<u8> = (0..256u32 << 10).map(|n| (n >> 12) as u8 + 0x80).collect();
    GuestMemory::with_rom(4 << 20, &rom).unwrap()
}

fn byte(m: &GuestMemory, gpa: u64) -> Option<u8> {
    let mut b = [0];
    m.read(gpa, &mut b).ok().map(|()| b[0])
}

#[test]
fn rom_is_below_4_gib_and_at_the_end_of_the_first_mib() {
    let m = memory();
    assert_eq!(byte(&m, 0xfffc_0000), Some(0x80));
    assert_eq!(byte(&m, 0xffff_ffff), Some(0xbf));
    assert_eq!(byte(&m, 0xfffb_ffff), None);
    assert_eq!(byte(&m, 0xf_ffff), Some(0xbf));
    assert_eq!(byte(&m, 0xe_0000), Some(0xa0), "its last 128 KiB");
    assert_eq!(byte(&m, 0xd_ffff), None);
    assert_eq!(byte(&m, 0xa_0000), None);
    assert!(m.write(0xf_0000, &[1]).is_err());
    assert!(m.write(0xfffc_0000, &[1]).is_err());
    assert!(
        m.read(0xffff_fffc, &mut [0; 8]).is_err(),
        "not past the end"
    );
    assert_eq!(m.gpa_of_offset(4 << 20), Some(0xfffc_0000));
}

#[test]
fn a_segment_is_routed_for_loads_and_stores_apart() {
    let m = memory();
    let at = 0xf_0000;
    m.set_route(at, at + 0x1_0000, WRITE_ONLY);
    m.write(at, &[0x11]).unwrap();
    assert_eq!(byte(&m, at), Some(0xb0), "loads still reach the ROM");
    assert!(m.host_ptr(at, 1).is_none());
    m.set_route(at, at + 0x1_0000, RAM);
    assert_eq!(byte(&m, at), Some(0x11));
    assert!(m.host_ptr(at, 0x1_0000).is_some());
    assert!(m.host_ptr(at - 1, 2).is_none(), "the segment before is ROM");
    assert!(m.host_ptr(at, 0x1_0001).is_some(), "RAM goes on after it");
    m.set_route(at, at + 0x1_0000, READ_ONLY);
    assert!(m.write(at, &[0x22]).is_err());
    assert_eq!(byte(&m, at), Some(0x11));
}

#[test]
fn ranges_around_the_routed_pages() {
    let m = memory();
    assert_eq!(m.ram_offset(0, 0xa_0000), Some(0));
    assert!(m.ram_offset(0x9_ffff, 2).is_none());
    assert!(m.ram_offset(0, 4 << 20).is_none());
    assert_eq!(m.ram_offset(0x10_0000, 0x10_0000), Some(0x10_0000));
    m.set_route(LEGACY_START, LEGACY_END, RAM);
    assert_eq!(m.ram_offset(0, 4 << 20), Some(0));
    assert!(m.ram_offset(0, (4 << 20) + 1).is_none());
    assert!(m.ram_offset(0x9_f000, u64::MAX - 5).is_none());
    m.set_route(0xc_0000, 0xc_1000, READ_ONLY);
    assert!(m.ram_offset(0, 4 << 20).is_none());
    assert_eq!(m.read_offset(0, 4 << 20), Some(0));
}

#[test]
fn mappings_follow_the_routes() {
    let m = memory();
    let brief = |m: &GuestMemory| -> Vec<(u64, u64, u64, bool)> {
        let all = m.mappings();
        all.iter()
            .map(|m| (m.gpa, m.size_bytes, m.ram_offset, m.read_only))
            .collect()
    };
    let (low, high, rom) = (
        (0, 0xa_0000, 0, false),
        (0x10_0000, 0x30_0000, 0x10_0000, false),
        (0xfffc_0000, 0x4_0000, 4 << 20, true),
    );
    let alias = (0xe_0000, 0x2_0000, (4 << 20) + 0x2_0000, true);
    assert_eq!(brief(&m), [low, alias, high, rom]);
    m.set_route(0xc_0000, 0xd_0000, RAM);
    m.set_route(0xf_0000, 0x10_0000, READ_ONLY);
    let expected = [
        low,
        (0xc_0000, 0x1_0000, 0xc_0000, false),
        (0xe_0000, 0x1_0000, (4 << 20) + 0x2_0000, true),
        (0xf_0000, 0x1_0000, 0xf_0000, true),
        high,
        rom,
    ];
    assert_eq!(brief(&m), expected);
    let flat = GuestMemory::new(4 << 20).unwrap();
    assert_eq!(brief(&flat), [(0, 4 << 20, 0, false)]);
}

#[derive(Default)]
struct Heard(Arc<Mutex<Vec<(u64, u64)>>>);

impl CodeListener for Heard {
    fn code_written(&self, _page_gpa: u64) {}
    fn mapping_changed(&self, first: u64, last: u64) {
        self.0.lock().unwrap().push((first, last));
    }
}

#[test]
fn the_engine_hears_of_changes_only() {
    let m = memory();
    let heard = Heard::default();
    let said = Arc::clone(&heard.0);
    m.set_code_listener(Box::new(heard));
    m.set_route(0xf_0000, 0x10_0000, RAM);
    m.set_route(0xf_0000, 0x10_0000, RAM);
    m.set_route(0xe_c000, 0x10_0000, RAM);
    assert_eq!(
        *said.lock().unwrap(),
        [(0xf_0000, 0xf_f000), (0xe_c000, 0xe_f000)]
    );
}

#[test]
fn all_ram_is_given_back_and_the_rom_stays() {
    let m = memory();
    m.set_route(0xf_0000, 0x10_0000, RAM);
    m.write(0xf_8000, &[7]).unwrap();
    m.write(0x20_0000, &[7]).unwrap();
    m.discard_all().unwrap();
    assert_eq!(byte(&m, 0xf_8000), Some(0));
    assert_eq!(byte(&m, 0x20_0000), Some(0));
    assert_eq!(byte(&m, 0xffff_0000), Some(0xb0));
}

#[test]
fn roms_that_cannot_be() {
    for bytes in [0, 1, 4095, 4097, (16 << 20) + 4096] {
        assert!(
            GuestMemory::with_rom(4 << 20, &vec![0; bytes]).is_err(),
            "{bytes}"
        );
    }
    let m = GuestMemory::with_rom(3 << 30, &[0; 4096]).unwrap();
    assert_eq!(m.low_ram_end(), FIRMWARE_LOW_RAM_END);
    assert_eq!(m.regions()[1].size_bytes, 1 << 30);
    assert!(m.read_offset(0xe_0000, 1).is_none(), "a small ROM");
    assert!(m.read_offset(0xf_f000, 1).is_some());
}

fn with_devices(rom: Vec<u8>) -> Arc<GuestMemory> {
    let layout = Layout {
        ram_bytes: 4 << 20,
        rom,
        has_video_window: true,
        device_bytes: vec![PAGE_SIZE, 1 << 20],
    };
    Arc::new(GuestMemory::with_layout(&layout).unwrap())
}

#[test]
fn video_window_is_not_ram_and_what_surrounds_it_keeps_its_offsets() {
    let m = with_devices(Vec::new());
    assert_eq!(m.ram_offset(0x9_ffff, 1), Some(0x9_ffff));
    assert_eq!(m.ram_offset(0x9_ffff, 2), None);
    assert_eq!(m.ram_offset(0xa_0000, 1), None);
    assert_eq!(m.ram_offset(0xb_ffff, 1), None);
    assert_eq!(m.ram_offset(0xc_0000, 1), Some(0xc_0000));
    assert_eq!((m.regions().len(), m.mappings().len()), (2, 2));
    assert_eq!((m.size_bytes(), m.low_ram_end()), (4 << 20, 4 << 20));
    assert_eq!(m.mapped_bytes(), (5 << 20) + PAGE_SIZE);
}

#[test]
fn device_memory_is_seen_where_it_is_placed_and_engines_hear_of_it() {
    for rom in [Vec::new(), vec![0x90; 4096]] {
        let m = with_devices(rom);
        let plain = m.mappings();
        let heard: Arc<Mutex<Vec<_>>> = Arc::default();
        m.set_code_listener(Box::new(Heard(Arc::clone(&heard))));
        let d = m.device_memory(1).unwrap();
        assert!(m.device_memory(2).is_none() && d.gpa().is_none());
        d.write(0x1000, b"pixels");
        let mut seen = [0; 6];
        assert!(m.read(0xc000_1000, &mut seen).is_err());
        d.place(Some(0xc000_0000));
        d.place(Some(0xc000_0000));
        assert_eq!(*heard.lock().unwrap(), [(0xc000_0000, 0xc00f_f000)]);
        m.read(0xc000_1000, &mut seen).unwrap();
        assert_eq!(&seen, b"pixels");
        m.write(0xc010_0000 - 2, b"xy").unwrap();
        assert!(m.write(0xc010_0000 - 1, b"xy").is_err());
        let offset = m.ram_offset(0xc000_0000, 1).unwrap();
        assert_eq!(m.gpa_of_offset(offset + 5), Some(0xc000_0005));
        assert_eq!(m.mappings().len(), plain.len() + 1);
        assert!(m.mappings().is_sorted_by_key(|m| m.gpa));
        d.place(Some(0xd000_0000));
        assert!(m.ram_offset(0xc000_0000, 1).is_none());
        d.read(d.size_bytes() - 2, &mut seen);
        assert_eq!(&seen, b"xy\0\0\0\0");
        m.discard_all().unwrap();
        d.read(d.size_bytes() - 2, &mut seen);
        assert_eq!(seen, [0; 6]);
        // Not page-aligned, and one that wraps: seen nowhere.
        d.place(Some(0xd000_0001));
        assert_eq!(d.gpa(), None);
        d.place(Some(u64::MAX - 0xfff));
        assert_eq!(m.mappings(), plain);
    }
}

#[test]
fn device_writes_are_logged() {
    let m = with_devices(Vec::new());
    let d = m.device_memory(1).unwrap();
    m.start_dirty_log();
    d.write(0x2000, &[1]);
    let page = (m.size_bytes() + PAGE_SIZE + 0x2000) / PAGE_SIZE;
    let log = m.take_dirty_log();
    assert_eq!(log[(page / 64) as usize], 1 << (page % 64));
    assert!(m.write_at_offset(m.mapped_bytes() - 1, &[1, 2]).is_err());
}
