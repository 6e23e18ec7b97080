use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::conformance;
use crate::image::{read_into, write_from};
use crate::raw::RawImage;
use crate::served::ImageDisk;
use crate::testing::{Random, Store};

/// The kinds of images that tests go through.
fn variants(size_bytes: u64) -> Vec<(&'static str, CreateOptions)> {
    let base = CreateOptions::new(size_bytes);
    let with = |f: &dyn Fn(&mut CreateOptions)| {
        let mut o = base.clone();
        f(&mut o);
        o
    };
    vec![
        ("default", base.clone()),
        ("small clusters", with(&|o| o.cluster_bytes = 512)),
        (
            "4 KiB, 1-bit refcounts",
            with(&|o| (o.cluster_bytes, o.refcount_bits) = (4096, 1)),
        ),
        (
            "1 KiB, 2-bit refcounts",
            with(&|o| (o.cluster_bytes, o.refcount_bits) = (1024, 2)),
        ),
        (
            "512 B, 64-bit refcounts",
            with(&|o| (o.cluster_bytes, o.refcount_bits) = (512, 64)),
        ),
        (
            "version 2",
            with(&|o| (o.cluster_bytes, o.version) = (4096, 2)),
        ),
        (
            "extended L2",
            with(&|o| (o.cluster_bytes, o.extended_l2) = (16 << 10, true)),
        ),
        (
            "zstd, lazy refcounts",
            with(&|o| {
                o.cluster_bytes = 8192;
                o.lazy_refcounts = true;
                o.compression = Compression::Zstd;
            }),
        ),
    ]
}

fn new_store(options: &CreateOptions) -> Store {
    let store = Store::default();
    create(&store, options).unwrap();
    store
}

fn reopen(store: &Store, backing: Option<Arc<dyn Image>>) -> Qcow2 {
    Qcow2::open(Box::new(store.clone()), backing, false).unwrap()
}

fn raw_backing(content: Vec<u8>) -> Arc<dyn Image> {
    let len = content.len() as u64;
    Arc::new(RawImage::with_storage(
        Box::new(Store::new(content)),
        len,
        true,
    ))
}

fn clean(store: &Store, what: &str) {
    let report = Qcow2::check(Box::new(store.clone()), None).unwrap();
    assert!(report.is_clean(), "{what}: {report:?}");
}

fn content(image: &dyn Image) -> Vec<u8> {
    let mut all = vec![0; image.info().size_bytes as usize];
    read_into(image, 0, &mut all).unwrap();
    all
}

#[test]
fn every_variant_conforms() {
    for (what, options) in variants(0) {
        eprintln!("{what}");
        conformance::check_all(&|size, read_only| {
            let store = new_store(&CreateOptions {
                size_bytes: size,
                ..options.clone()
            });
            let image = Qcow2::open(Box::new(store), None, read_only).unwrap();
            Arc::new(ImageDisk::new(Arc::new(image)).unwrap())
        });
    }
}

/// One step of a random load on image and model.
fn step(image: &Qcow2, model: &mut [u8], random: &mut Random) -> (u64, u64) {
    let size = model.len() as u64;
    let at = random.below(size / 512) * 512;
    let max = if random.below(4) == 0 { 400 } else { 24 };
    let len = ((1 + random.below(max)) * 512).min(size - at);
    let range = at as usize..(at + len) as usize;
    match random.below(8) {
        0..=4 => {
            let byte = random.next() as u8;
            let data: Vec<u8> = (0..len)
                .map(|n| byte.wrapping_add((n / 512) as u8))
                .collect();
            write_from(image, at, &data).unwrap();
            model[range].copy_from_slice(&data);
        }
        5 | 6 => {
            image.write_zeroes(at, len, random.below(2) == 0).unwrap();
            model[range].fill(0);
        }
        _ => {
            // What a discard leaves is old or zero: ask.
            image.discard(at, len).unwrap();
            let mut now = vec![0; len as usize];
            read_into(image, at, &mut now).unwrap();
            for (old, new) in model[range.clone()].iter().zip(&now) {
                assert!(old == new || *new == 0);
            }
            model[range].copy_from_slice(&now);
        }
    }
    (at, len)
}

#[test]
fn random_load_matches_the_model_and_checks_clean() {
    const SIZE: u64 = 3 << 20;
    for (n, (what, options)) in variants(SIZE).into_iter().enumerate() {
        for backed in [false, true] {
            let mut random = Random(0x1234_5678_9abc + n as u64 * 77 + u64::from(backed));
            // The backing file is shorter than the disk.
            let below: Vec<u8> = (0..SIZE as usize - 70_000 / 512 * 512)
                .map(|b| (b / 700) as u8)
                .collect();
            let mut options = options.clone();
            let mut model = vec![0; SIZE as usize];
            let backing = backed.then(|| {
                options.backing = Some(("below".into(), "raw".into()));
                model[..below.len()].copy_from_slice(&below);
                raw_backing(below.clone())
            });
            let store = new_store(&options);
            let mut image = reopen(&store, backing.clone());
            for round in 0..120 {
                step(&image, &mut model, &mut random);
                if round % 40 == 39 {
                    image.close().unwrap();
                    assert!(content(&image) == model, "{what}, backed {backed}");
                    drop(image);
                    clean(&store, what);
                    image = reopen(&store, backing.clone());
                }
            }
            drop(image);
            clean(&store, what);
            let image = reopen(&store, backing.clone());
            assert!(content(&image) == model, "{what}, backed {backed}");
        }
    }
}

#[test]
fn power_loss_at_any_moment_keeps_what_was_flushed() {
    const SIZE: u64 = 1 << 20;
    for (n, (what, options)) in variants(SIZE).into_iter().enumerate() {
        let mut random = Random(0x5eed + n as u64 * 131);
        let store = new_store(&options);
        let image = reopen(&store, None);
        let mut model = vec![0; SIZE as usize];
        let mut flushed = model.clone();
        // Contents that sectors had since the flush.
        let mut since: HashMap<u64, Vec<Vec<u8>>> = HashMap::new();
        for round in 0..150 {
            let (at, len) = step(&image, &mut model, &mut random);
            for sector in at / 512..(at + len) / 512 {
                let range = sector as usize * 512..sector as usize * 512 + 512;
                let versions = since.entry(sector).or_default();
                versions.push(model[range].to_vec());
                // A discard may leave old content now and zeroes later.
                versions.push(vec![0; 512]);
            }
            if round % 9 == 8 {
                image.flush().unwrap();
                flushed.clone_from(&model);
                since.clear();
            }
            let lost = Store::new(store.after_power_loss(&mut random));
            let report = Qcow2::check(Box::new(lost.clone()), None).unwrap();
            assert_eq!(report.errors, 0, "{what}, round {round}: {report:?}");
            let after = Qcow2::open(Box::new(lost.clone()), None, false).unwrap();
            let there = content(&after);
            for (sector, have) in there.chunks(512).enumerate() {
                let was = &flushed[sector * 512..sector * 512 + 512];
                let versions = since.get(&(sector as u64));
                assert!(
                    have == was || versions.is_some_and(|v| v.iter().any(|v| v == have)),
                    "{what}, round {round}: sector {sector}"
                );
            }
            drop(after);
            if report.leaks > 0 {
                let report = Qcow2::check(Box::new(lost), Some(Repair::Leaks)).unwrap();
                assert!(report.is_clean(), "{what}: {report:?}");
            }
        }
    }
}

#[test]
fn failing_host_never_damages_the_image() {
    const SIZE: u64 = 1 << 20;
    for (n, (what, options)) in variants(SIZE).into_iter().enumerate() {
        let mut random = Random(0xfa11 + n as u64);
        let store = new_store(&options);
        for round in 0..40 {
            let image = reopen(&store, None);
            let before = content(&image);
            store.fail_after(Some(round));
            let data = vec![round as u8 + 1; 40 << 10];
            let at = random.below(SIZE / 512 - 80) * 512;
            let outcome = write_from(&image, at, &data).and_then(|()| image.flush());
            store.fail_after(None);
            // The same again, now that there is room.
            write_from(&image, at, &data).unwrap();
            let mut model = before;
            model[at as usize..at as usize + data.len()].copy_from_slice(&data);
            assert!(content(&image) == model, "{what}, {round}: {outcome:?}");
            drop(image);
            let report = Qcow2::check(Box::new(store.clone()), Some(Repair::Leaks)).unwrap();
            assert!(report.is_clean(), "{what}, {round}: {report:?}");
        }
    }
}

#[test]
fn snapshots_keep_their_content() {
    const SIZE: u64 = 1 << 20;
    for (n, (what, options)) in variants(SIZE).into_iter().enumerate() {
        let mut random = Random(0xcafe + n as u64);
        let store = new_store(&options);
        let image = reopen(&store, None);
        let mut model = vec![0; SIZE as usize];
        for _ in 0..10 {
            step(&image, &mut model, &mut random);
        }
        if options.refcount_bits < 8 {
            let error = image.snapshot_create("a", 1);
            if options.refcount_bits == 1 {
                assert!(
                    matches!(error, Err(DiskError::Unsupported(_))),
                    "{what}: {error:?}"
                );
                drop(image);
                let report = Qcow2::check(Box::new(store), Some(Repair::All)).unwrap();
                assert!(report.is_clean(), "{what}: {report:?}");
            }
            continue;
        }
        let mut kept = Vec::new();
        for round in 0..4 {
            let name = format!("s{round}");
            image.snapshot_create(&name, 1_700_000_000 + round).unwrap();
            kept.push((name, model.clone()));
            for _ in 0..8 {
                step(&image, &mut model, &mut random);
            }
            assert!(content(&image) == model, "{what}");
            // What a flush gives back is counted so in the file by the next one.
            image.flush().unwrap();
            image.flush().unwrap();
            clean(&store, what);
        }
        image.snapshot_delete("s1").unwrap();
        kept.remove(1);
        assert!(content(&image) == model, "{what}: after a delete");
        image.flush().unwrap();
        image.flush().unwrap();
        clean(&store, what);
        for (name, then) in &kept {
            image.snapshot_apply(name).unwrap();
            assert!(content(&image) == *then, "{what}: {name}");
            model.clone_from(then);
            for _ in 0..4 {
                step(&image, &mut model, &mut random);
            }
            assert!(content(&image) == model, "{what}: after {name}");
        }
        assert_eq!(image.details().snapshots.len(), 3);
        image.close().unwrap();
        drop(image);
        clean(&store, what);
        let image = reopen(&store, None);
        assert!(content(&image) == model, "{what}");
        for (name, _) in kept {
            image.snapshot_delete(&name).unwrap();
        }
        assert!(image.snapshot_delete("s0").is_err());
        drop(image);
        clean(&store, what);
    }
}

#[test]
fn resize_shows_zeroes_and_nothing_old() {
    for (what, options) in variants(1 << 20) {
        let below = raw_backing(vec![0xbb; 2 << 20]);
        let v3 = options.version == 3;
        for backing in [None, v3.then_some(below)] {
            let mut options = options.clone();
            options.backing = backing.as_ref().map(|_| ("b".into(), "raw".into()));
            let store = new_store(&options);
            let image = reopen(&store, backing.clone());
            write_from(&image, (1 << 20) - 4096, &[7; 4096]).unwrap();
            image.resize((1 << 20) - 1024).unwrap();
            image.resize(40 << 20).unwrap();
            let mut model = vec![if backing.is_some() { 0xbb } else { 0 }; 1 << 20];
            let end = model.len();
            model[end - 4096..end - 1024].fill(7);
            model[end - 1024..].fill(0);
            model.resize(40 << 20, 0);
            assert!(content(&image) == model, "{what}, {}", backing.is_some());
            drop(image);
            clean(&store, what);
            let image = reopen(&store, backing.clone());
            assert!(content(&image) == model, "{what}, reopened");
        }
    }
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    for (what, options) in variants(1 << 20) {
        let store = new_store(&options);
        let image = reopen(&store, None);
        let cluster = options.cluster_bytes as usize;
        let mut model = vec![0; 1 << 20];
        for n in 0..(256 << 10) / cluster {
            let data: Vec<u8> = (0..cluster).map(|b| (b / 40 + n) as u8).collect();
            let Some(packed) = compress::pack(options.compression, &data) else {
                continue;
            };
            image
                .write_compressed((n * cluster) as u64, &packed)
                .unwrap();
            model[n * cluster..(n + 1) * cluster].copy_from_slice(&data);
        }
        assert!(content(&image) == model, "{what}");
        image.flush().unwrap();
        clean(&store, what);
        let mut random = Random(99);
        for _ in 0..40 {
            step(&image, &mut model, &mut random);
        }
        assert!(content(&image) == model, "{what}");
        drop(image);
        clean(&store, what);
    }
}

#[test]
fn discard_gives_space_back_and_it_is_used_again() {
    let options = CreateOptions::new(8 << 20);
    let store = new_store(&options);
    let image = reopen(&store, None);
    write_from(&image, 0, &vec![1; 4 << 20]).unwrap();
    image.flush().unwrap();
    let full = store.content();
    image.discard(0, 4 << 20).unwrap();
    image.flush().unwrap();
    let holes = |b: &[u8]| b.chunks(4096).filter(|c| c.iter().all(|b| *b == 0)).count();
    assert!(holes(&store.content()) >= holes(&full) + 1024);
    write_from(&image, 4 << 20, &vec![2; 4 << 20]).unwrap();
    image.flush().unwrap();
    assert!(store.content().len() <= full.len() + 65536);
    drop(image);
    clean(&store, "discard");
}

#[test]
fn unclean_end_is_repaired_on_opening() {
    let options = CreateOptions {
        lazy_refcounts: true,
        ..CreateOptions::new(4 << 20)
    };
    let store = new_store(&options);
    let image = reopen(&store, None);
    write_from(&image, 0, &[5; 100 * 512]).unwrap();
    drop(image);
    // What a writer with lazy refcounts leaves behind: no counts, and the dirty bit.
    let mut bytes = store.content();
    let block = be64(&bytes, be64(&bytes, 48) as usize) as usize;
    bytes[block + 6..block + 4096].fill(0);
    bytes[79] |= 1;
    let store = Store::new(bytes);
    let report = Qcow2::check(Box::new(store.clone()), None).unwrap();
    assert!(report.errors > 0);
    let image = reopen(&store, None);
    write_from(&image, 1 << 20, &[6; 512]).unwrap();
    let mut head = vec![0; 100 * 512];
    read_into(&image, 0, &mut head).unwrap();
    assert!(head.iter().all(|b| *b == 5));
    drop(image);
    clean(&store, "repaired");
}

#[test]
fn marks_and_unknown_features_are_respected() {
    let store = new_store(&CreateOptions::new(1 << 20));
    let with = |at: usize, bits: u8| {
        let mut bytes = store.content();
        bytes[at] |= bits;
        Store::new(bytes)
    };
    let open = |s: &Store, read_only| Qcow2::open(Box::new(s.clone()), None, read_only);
    // Corrupt: only for reading.
    let corrupt = with(79, 2);
    let error = open(&corrupt, false).err().unwrap().to_string();
    assert!(error.contains("check --repair"), "{error}");
    open(&corrupt, true).unwrap();
    // An unknown incompatible feature, an external data file, encryption: never.
    for (at, bits) in [(72, 1), (79, 4), (35, 1)] {
        assert!(open(&with(at, bits), true).is_err());
    }
    // Unknown autoclear features are cleared by a writer, and only by one.
    let auto = with(95, 0xf0);
    drop(open(&auto, true).unwrap());
    assert_eq!(auto.content()[95], 0xf0);
    drop(open(&auto, false).unwrap());
    assert_eq!(auto.content()[95], 0);
}

#[test]
fn backing_file_must_be_given() {
    let store = new_store(&CreateOptions {
        backing: Some(("base.img".into(), "raw".into())),
        ..CreateOptions::new(1 << 20)
    });
    let error = Qcow2::open(Box::new(store.clone()), None, true)
        .err()
        .unwrap();
    assert!(error.to_string().contains("backing file"), "{error}");
    let name = backing_name(&store).unwrap().unwrap();
    assert_eq!(
        (name.name.as_str(), name.format.as_deref()),
        ("base.img", Some("raw"))
    );
}

/// An image with everything in it.
fn rich_image(options: &CreateOptions) -> Vec<u8> {
    let store = new_store(options);
    let image = reopen(&store, None);
    let mut random = Random(4711);
    let mut model = vec![0; options.size_bytes as usize];
    for _ in 0..6 {
        step(&image, &mut model, &mut random);
    }
    let cluster = options.cluster_bytes;
    let data = vec![0x5a; cluster as usize];
    if let Some(packed) = compress::pack(options.compression, &data) {
        let at = options.size_bytes / 2 / cluster * cluster;
        image.write_compressed(at, &packed).unwrap();
    }
    if options.refcount_bits > 4 {
        image.snapshot_create("snap", 1).unwrap();
    }
    for _ in 0..6 {
        step(&image, &mut model, &mut random);
    }
    drop(image);
    store.content()
}

/// Opens and uses what may be damaged: anything may fail, nothing may panic or hang.
fn use_damaged(bytes: Vec<u8>, random: &mut Random) {
    let store = Store::new(bytes);
    if let Ok(image) = Qcow2::open(Box::new(store.clone()), None, true) {
        let size = image.info().size_bytes;
        let mut buf = vec![0; 64 << 10];
        for _ in 0..4 {
            let at = random.below((size / 512).max(1)) * 512;
            let n = (size.saturating_sub(at)).min(buf.len() as u64) as usize;
            let _ = read_into(&image, at, &mut buf[..n]);
            if n > 0 {
                let _ = image.extent(at, n as u64);
            }
        }
        let _ = image.details();
    }
    let _ = Qcow2::check(Box::new(store.clone()), None);
    if let Ok(image) = Qcow2::open(Box::new(store.clone()), None, false) {
        let size = image.info().size_bytes;
        for _ in 0..4 {
            let at = random.below((size / 512).max(1)) * 512;
            let n = (size.saturating_sub(at)).min(20 << 10);
            let _ = write_from(&image, at, &vec![1; n as usize]);
            let _ = image.write_zeroes(at, n, random.below(2) == 0);
            let _ = image.discard(at, n);
        }
        let _ = image.flush();
        let _ = image.snapshot_create("x", 0);
        let _ = image.snapshot_apply("snap");
        let _ = image.snapshot_delete("snap");
        if size < 16 << 20 {
            let _ = image.resize(size / 2 / 512 * 512);
        }
        let _ = image.close();
    }
    let _ = Qcow2::check(Box::new(store), Some(Repair::All));
}

#[test]
fn damaged_tables_are_errors() {
    let rounds = std::env::var("PYRITE_FUZZ_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(250);
    for (n, (_, mut options)) in variants(1 << 20).into_iter().enumerate() {
        options.size_bytes = 512 << 10;
        let good = rich_image(&options);
        let cluster = options.cluster_bytes as usize;
        let mut random = Random(0xf022 + n as u64);
        // Where tables are: the header, and clusters that look like tables.
        let mut places = Vec::new();
        places.push(0..112);
        for (c, bytes) in good.chunks(cluster).enumerate() {
            let table = |b: &[u8]| be64(b, 0) != 0 && be64(b, 0) & 0x3fff_ff00_0000_01ff == 0;
            if c > 0 && bytes.chunks(8).any(table) {
                places.push(c * cluster..c * cluster + bytes.len().min(4096));
            }
        }
        for _ in 0..rounds {
            let mut bytes = good.clone();
            for _ in 0..=random.below(3) {
                let place = &places[random.below(places.len() as u64) as usize];
                let at = place.start + random.below((place.end - place.start) as u64) as usize;
                match random.below(4) {
                    0 => bytes[at] ^= 1 << random.below(8),
                    1 => bytes[at] = random.next() as u8,
                    2 => {
                        // Another table's offset, or nearly.
                        let to = random.below(good.len() as u64 * 2) & !(cluster as u64 - 1);
                        let at = at & !7;
                        put(&mut bytes, at, &(to | COPIED).to_be_bytes());
                    }
                    _ => {
                        let from = random.below(good.len() as u64 - 8) as usize & !7;
                        let word = be64(&good, from);
                        put(&mut bytes, at & !7, &word.to_be_bytes());
                    }
                }
            }
            if random.below(10) == 0 {
                bytes.truncate(random.below(good.len() as u64) as usize);
            }
            use_damaged(bytes, &mut random);
        }
    }
}
