use super::*;
use crate::image::{read_into, write_from};
use crate::jobs::{Filler, Plain};
use crate::testing::{Random, Store};
use crate::{vdi, vhd, vhdx, vmdk};

const SIZE: u64 = 9 << 20;

type Open = fn(Box<dyn Storage>, bool) -> Result<Mapped, DiskError>;

/// Name, an image with some data, how to open it, and where its tables are (from, to).
type Sample = (&'static str, Vec<u8>, Open, Vec<(usize, usize)>);

fn images() -> Vec<Sample> {
    let id = [7; 16];
    let fill = |store: &Store, open: Open| {
        let image = open(Box::new(store.clone()), false).unwrap();
        let mut filler = Plain(&image);
        filler.put(1 << 20, &[1; 200 << 10]).unwrap();
        filler.put(SIZE - 512, &[2; 512]).unwrap();
        filler.finish().unwrap();
        store.content()
    };
    let new = || Store::default();
    let (a, b, c, d, e) = (new(), new(), new(), new(), new());
    vdi::create(&a, SIZE, id).unwrap();
    vhd::create(&b, SIZE, false, id).unwrap();
    vhdx::create(&c, SIZE, [id; 3]).unwrap();
    vmdk::create_sparse(&d, SIZE, "name", 1).unwrap();
    let mut stream = vmdk::Stream::new(&e, SIZE, "name", 1).unwrap();
    stream.put(1 << 20, &[1; 200 << 10]).unwrap();
    stream.finish().unwrap();
    let stream_bytes = e.content();
    let end = stream_bytes.len();
    let new_vhdx: Open = |s, _| vhdx::open_new(s);
    vec![
        (
            "vdi",
            fill(&a, vdi::open),
            vdi::open as Open,
            vec![(0, 600)],
        ),
        ("vhd", fill(&b, vhd::open), vhd::open, vec![(0, 1600)]),
        (
            "vhdx",
            fill(&c, new_vhdx),
            new_vhdx,
            vec![
                (2 << 20, (2 << 20) + 256),
                (0x21_0000, 0x21_0040),
                (3 << 20, (3 << 20) + 64),
            ],
        ),
        (
            "vmdk",
            fill(&d, vmdk::open_sparse),
            vmdk::open_sparse,
            vec![(0, 80), (21 * 512, 27 * 512)],
        ),
        (
            "stream",
            stream_bytes,
            vmdk::open_sparse,
            vec![(0, 80), (65536, 65700), (end - 8192, end)],
        ),
    ]
}

#[test]
fn damaged_images_are_errors() {
    for (n, (what, good, open, places)) in images().into_iter().enumerate() {
        let mut random = Random(0x77 + n as u64);
        let mut opened = 0;
        // Blocks of VHDX are large, and every round copies them.
        let rounds = if good.len() > 16 << 20 { 15 } else { 200 };
        for _ in 0..rounds {
            let mut bytes = good.clone();
            for _ in 0..=random.below(2) {
                let (from, to) = places[random.below(places.len() as u64) as usize];
                let at = from + random.below((to - from) as u64) as usize;
                match random.below(3) {
                    0 => bytes[at] ^= 1 << random.below(8),
                    1 => bytes[at] = random.next() as u8,
                    _ => bytes[at..at + 4].fill(0xff),
                }
            }
            if what == "vhd" {
                vhd::fix_checksums(&mut bytes);
            }
            if random.below(12) == 0 {
                bytes.truncate(random.below(good.len() as u64) as usize);
            }
            let store = Store::new(bytes);
            for read_only in [true, false] {
                let Ok(image) = open(Box::new(store.clone()), read_only) else {
                    continue;
                };
                opened += 1;
                let size = image.info().size_bytes;
                let mut buf = vec![0; 8192];
                for _ in 0..3 {
                    let at = random.below(size / 512) * 512;
                    let len = (size - at).min(8192) as usize;
                    let _ = read_into(&image, at, &mut buf[..len]);
                    let _ = image.extent(at, len as u64);
                    if image.block_bytes <= 4 << 20 {
                        let _ = write_from(&image, at, &buf[..len]);
                    }
                }
                let _ = image.close();
            }
        }
        assert!(opened > rounds / 15, "{what}: {opened}");
    }
}

#[test]
fn new_block_is_named_only_after_its_data() {
    let store = Store::default();
    vdi::create(&store, SIZE, [1; 16]).unwrap();
    let image = vdi::open(Box::new(store.clone()), false).unwrap();
    let mut random = Random(42);
    let mut flushed = vec![0; SIZE as usize];
    for n in 0..60u64 {
        let at = random.below(SIZE / 4096) * 4096;
        write_from(&image, at, &[n as u8 + 1; 4096]).unwrap();
        let lost = Store::new(store.after_power_loss(&mut random));
        let after = vdi::open(Box::new(lost), true).unwrap();
        let mut all = vec![0; SIZE as usize];
        read_into(&after, 0, &mut all).unwrap();
        for (sector, (have, was)) in all.chunks(512).zip(flushed.chunks(512)).enumerate() {
            let written = (at..at + 4096).contains(&(sector as u64 * 512));
            assert!(have == was || written, "write {n}, sector {sector}");
        }
        image.flush().unwrap();
        flushed[at as usize..at as usize + 4096].fill(n as u8 + 1);
    }
}
