use std::path::Path;
use std::sync::Arc;

use pyrite_disk::image::{References, read_into, write_from};
use pyrite_disk::open::{OpenOptions, open, open_qcow2};
use pyrite_disk::qcow2::{Compression, CreateOptions, Qcow2};
use pyrite_disk::targets::{self, TargetOptions};
use pyrite_disk::{Format, Image};

use super::{Dir, Random, has_qemu_img, qemu_img_ok};

const SIZE: u64 = 12 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Data of several kinds between zeroes.
fn sample(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut out = vec![0; SIZE as usize];
    for _ in 0..40 {
        let at = random.below(SIZE / 512) as usize * 512;
        let len = (1 + random.below(300) as usize) * 512;
        let end = (at + len).min(out.len());
        let noise = random.below(2) == 0;
        for (n, b) in out[at..end].iter_mut().enumerate() {
            *b = if noise {
                random.next() as u8
            } else {
                (n / 100) as u8
            };
        }
    }
    // The last sector too.
    let last = out.len() - 512;
    out[last..].fill(0xee);
    out
}

fn content(image: &dyn Image) -> Vec<u8> {
    let mut all = vec![0; image.info().size_bytes as usize];
    for (n, part) in all.chunks_mut(1 << 20).enumerate() {
        read_into(image, (n << 20) as u64, part).expect("read");
    }
    all
}

fn write_file(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("write");
}

fn load(image: &dyn Image, model: &mut [u8], random: &mut Random, steps: u32) {
    let size = model.len() as u64;
    for _ in 0..steps {
        let at = random.below(size / 512) * 512;
        let max = if random.below(5) == 0 { 600 } else { 20 };
        let len = ((1 + random.below(max)) * 512).min(size - at);
        let range = at as usize..(at + len) as usize;
        match random.below(8) {
            0..=5 => {
                let data: Vec<u8> = (0..len / 512)
                    .flat_map(|_| [random.next() as u8; 512])
                    .collect();
                write_from(image, at, &data).expect("write");
                model[range].copy_from_slice(&data);
            }
            6 => {
                let unmap = random.below(2) == 0;
                image.write_zeroes(at, len, unmap).expect("zeroes");
                model[range].fill(0);
            }
            _ => {
                image.discard(at, len).expect("discard");
                read_into(image, at, &mut model[range]).expect("read");
            }
        }
    }
}

#[test]
fn images_of_qemu_are_written_and_stay_good() {
    if !has_qemu_img() {
        return;
    }
    let dir = Dir::new("write");
    let (image, raw, base) = (dir.file("i.qcow2"), dir.file("model"), dir.file("base"));
    let base_content = sample(3);
    write_file(&base, &base_content[..(SIZE - 70_144) as usize]);
    for (n, options) in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on",
        "compression_type=zstd",
        "preallocation=metadata",
    ]
    .into_iter()
    .enumerate()
    {
        for backed in [false, true] {
            if backed && options.contains("preallocation") {
                continue;
            }
            let size = SIZE.to_string();
            let mut args = vec!["create", "-q", "-f", "qcow2"];
            if !options.is_empty() {
                args.extend(["-o", options]);
            }
            if backed {
                args.extend(["-b", text(&base), "-F", "raw"]);
            }
            args.extend([text(&image), &size]);
            qemu_img_ok(&args);
            let mut model = vec![0; SIZE as usize];
            if backed {
                let len = (SIZE - 70_144) as usize;
                model[..len].copy_from_slice(&base_content[..len]);
            }
            let mut random = Random(77 + n as u64 * 2 + u64::from(backed));
            let disk = open_qcow2(&image, false, References::Follow).expect("open");
            load(&disk, &mut model, &mut random, 60);
            let snapshots = options != "refcount_bits=1";
            let then = model.clone();
            if snapshots {
                disk.snapshot_create("mine", 1_700_000_000)
                    .expect("snapshot");
                load(&disk, &mut model, &mut random, 20);
            }
            disk.close().expect("close");
            drop(disk);
            let what = format!("{options}, backed {backed}");
            eprintln!("{what}");
            qemu_img_ok(&["check", "-q", "-f", "qcow2", text(&image)]);
            write_file(&raw, &model);
            let compare = ["compare", "-q", "-f", "raw", "-F", "qcow2"];
            qemu_img_ok(&[&compare[..], &[text(&raw), text(&image)]].concat());
            if snapshots {
                qemu_img_ok(&["snapshot", "-q", "-a", "mine", text(&image)]);
                qemu_img_ok(&["check", "-q", "-f", "qcow2", text(&image)]);
                write_file(&raw, &then);
                qemu_img_ok(&[&compare[..], &[text(&raw), text(&image)]].concat());
                // And QEMU's snapshot, looked at and deleted here.
                qemu_img_ok(&["snapshot", "-q", "-c", "theirs", text(&image)]);
                let disk = open_qcow2(&image, false, References::Follow).expect("open");
                load(&disk, &mut model, &mut random, 5);
                disk.snapshot_delete("mine").expect("delete");
                disk.close().expect("close");
                drop(disk);
                qemu_img_ok(&["check", "-q", "-f", "qcow2", text(&image)]);
                let disk = open_qcow2(&image, true, References::Follow).expect("open");
                let old = disk.at_snapshot("theirs").expect("snapshot");
                assert!(content(&old) == then, "{what}: QEMU's snapshot");
            }
        }
    }
}

#[test]
fn compressed_images_of_qemu_are_read() {
    if !has_qemu_img() {
        return;
    }
    let dir = Dir::new("compressed");
    let (raw, image) = (dir.file("raw"), dir.file("i.qcow2"));
    let data = sample(9);
    write_file(&raw, &data);
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=4k",
        "compression_type=zstd,extended_l2=on",
        "compression_type=zlib,cluster_size=2M",
    ] {
        let convert = ["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o"];
        qemu_img_ok(&[&convert[..], &[options, text(&raw), text(&image)]].concat());
        let disk = open_qcow2(&image, false, References::Refuse).expect("open");
        assert!(content(&disk) == data, "{options}");
        let mut model = data.clone();
        load(&disk, &mut model, &mut Random(5), 40);
        assert!(content(&disk) == model, "{options}");
        drop(disk);
        qemu_img_ok(&["check", "-q", "-f", "qcow2", text(&image)]);
    }
}

/// Name, format and options of everything that can be made here.
fn made_here() -> Vec<(&'static str, TargetOptions, bool, &'static str)> {
    let plain = |format| TargetOptions {
        format,
        size_bytes: SIZE,
        qcow2: CreateOptions::new(SIZE),
        flat: false,
        overwrite: true,
    };
    let qcow2 = |f: &dyn Fn(&mut CreateOptions)| {
        let mut o = plain(Format::Qcow2);
        f(&mut o.qcow2);
        o
    };
    let flat = |format| TargetOptions {
        flat: true,
        ..plain(format)
    };
    vec![
        ("raw", plain(Format::Raw), false, "raw"),
        ("qcow2", plain(Format::Qcow2), false, "qcow2"),
        ("zlib", plain(Format::Qcow2), true, "qcow2"),
        (
            "zstd",
            qcow2(&|o| o.compression = Compression::Zstd),
            true,
            "qcow2",
        ),
        (
            "zlib small",
            qcow2(&|o| o.cluster_bytes = 1024),
            true,
            "qcow2",
        ),
        ("version 2", qcow2(&|o| o.version = 2), false, "qcow2"),
        ("extended", qcow2(&|o| o.extended_l2 = true), false, "qcow2"),
        (
            "counts of 2 bits",
            qcow2(&|o| (o.refcount_bits, o.cluster_bytes) = (2, 512)),
            false,
            "qcow2",
        ),
        ("vmdk", plain(Format::Vmdk), false, "vmdk"),
        ("vmdk stream", plain(Format::Vmdk), true, "vmdk"),
        ("vmdk flat", flat(Format::Vmdk), false, "vmdk"),
        ("vdi", plain(Format::Vdi), false, "vdi"),
        ("vhd", plain(Format::Vhd), false, "vpc"),
        ("vhd fixed", flat(Format::Vhd), false, "vpc"),
        ("vhdx", plain(Format::Vhdx), false, "vhdx"),
    ]
}

#[test]
fn images_made_here_are_the_same_to_qemu_and_back() {
    let qemu = has_qemu_img();
    let dir = Dir::new("made");
    let raw = dir.file("raw");
    let data = sample(21);
    write_file(&raw, &data);
    let source = open(&raw, OpenOptions::new(Format::Raw).read_only()).expect("raw");
    for (n, (what, options, compress, qemu_name)) in made_here().into_iter().enumerate() {
        let image = dir.file(&format!("i{n}.img"));
        eprintln!("{what}");
        targets::convert(&*source, &image, &options, compress, &mut |_, _| true).expect(what);
        let back = OpenOptions::new(options.format).read_only().follow();
        let disk = open(&image, back).expect(what);
        assert!(content(&*disk) == data, "{what}: read back");
        drop(disk);
        if qemu {
            let compare = ["compare", "-q", "-f", "raw", "-F", qemu_name];
            qemu_img_ok(&[&compare[..], &[text(&raw), text(&image)]].concat());
            if matches!(qemu_name, "qcow2" | "vdi" | "vhdx" | "vmdk") && what != "vmdk flat" {
                qemu_img_ok(&["check", "-q", "-f", qemu_name, text(&image)]);
            }
        }
        if compress || options.format == Format::Vhdx {
            continue;
        }
        // Writing to what there is, as a guest would.
        let write = OpenOptions::new(options.format).follow();
        let disk = open(&image, write).expect(what);
        let mut model = data.clone();
        load(&*disk, &mut model, &mut Random(n as u64 + 1), 40);
        disk.close().expect(what);
        drop(disk);
        let disk = open(&image, back).expect(what);
        assert!(content(&*disk) == model, "{what}: written");
        drop(disk);
        if qemu {
            let changed = dir.file("changed");
            write_file(&changed, &model);
            let compare = ["compare", "-q", "-f", "raw", "-F", qemu_name];
            qemu_img_ok(&[&compare[..], &[text(&changed), text(&image)]].concat());
        }
    }
}

#[test]
fn images_of_qemu_in_every_format_are_read() {
    if !has_qemu_img() {
        return;
    }
    let dir = Dir::new("read");
    let raw = dir.file("raw");
    let data = sample(33);
    write_file(&raw, &data);
    for (n, (format, qemu_name, options)) in [
        (Format::Vmdk, "vmdk", "subformat=monolithicSparse"),
        (
            Format::Vmdk,
            "vmdk",
            "subformat=monolithicSparse,zeroed_grain=on",
        ),
        (Format::Vmdk, "vmdk", "subformat=monolithicFlat"),
        (Format::Vmdk, "vmdk", "subformat=twoGbMaxExtentSparse"),
        (Format::Vmdk, "vmdk", "subformat=twoGbMaxExtentFlat"),
        (Format::Vmdk, "vmdk", "subformat=streamOptimized"),
        (Format::Vdi, "vdi", "static=off"),
        (Format::Vdi, "vdi", "static=on"),
        (Format::Vhd, "vpc", "subformat=dynamic,force_size=on"),
        (Format::Vhd, "vpc", "subformat=fixed,force_size=on"),
        (Format::Vhd, "vpc", "subformat=dynamic"),
        (Format::Vhdx, "vhdx", "subformat=dynamic"),
        (Format::Vhdx, "vhdx", "subformat=fixed"),
        (Format::Vhdx, "vhdx", "subformat=dynamic,block_size=1M"),
    ]
    .into_iter()
    .enumerate()
    {
        let what = format!("{format} {options}");
        eprintln!("{what}");
        let image = dir.file(&format!("i{n}.{qemu_name}"));
        let convert = ["convert", "-q", "-f", "raw", "-O", qemu_name, "-o"];
        qemu_img_ok(&[&convert[..], &[options, text(&raw), text(&image)]].concat());
        let disk = open(&image, OpenOptions::new(format).read_only().follow()).expect(&what);
        let mut have = content(&*disk);
        // By its geometry a VHD image may be larger.
        assert!(have.len() >= data.len(), "{what}");
        assert!(have.split_off(data.len()).iter().all(|b| *b == 0), "{what}");
        assert!(have == data, "{what}");
        drop(disk);
        if matches!(format, Format::Vdi | Format::Vhd) {
            let disk = open(&image, OpenOptions::new(format)).expect(&what);
            let mut model = content(&*disk);
            load(&*disk, &mut model, &mut Random(n as u64 + 9), 30);
            disk.close().expect(&what);
            drop(disk);
            let changed = dir.file("changed");
            write_file(&changed, &model);
            let compare = ["compare", "-q", "-f", "raw", "-F", qemu_name];
            qemu_img_ok(&[&compare[..], &[text(&changed), text(&image)]].concat());
        }
    }
}

#[test]
fn bitmaps_are_kept_up_to_date() {
    if !has_qemu_img() {
        return;
    }
    let dir = Dir::new("bitmaps");
    let image = dir.file("i.qcow2");
    let info = || qemu_img_ok(&["info", "--output=json", text(&image)]);
    qemu_img_ok(&["create", "-q", "-f", "qcow2", text(&image), "64M"]);
    qemu_img_ok(&["bitmap", "--add", text(&image), "on"]);
    qemu_img_ok(&["bitmap", "--add", "--disable", text(&image), "off"]);
    let disk = open_qcow2(&image, false, References::Refuse).expect("open");
    write_from(&disk, 10 << 20, &[1; 4096]).expect("write");
    disk.flush().expect("flush");
    assert!(info().contains("in-use"), "marked while open");
    disk.close().expect("close");
    drop(disk);
    let text_now = info();
    assert!(!text_now.contains("in-use"), "{text_now}");
    assert!(text_now.contains("\"on\"") && text_now.contains("\"off\""));
    qemu_img_ok(&["check", "-q", "-f", "qcow2", text(&image)]);
    // The bit of the write is in the table: bit 160 of 64 KiB each.
    let bytes = std::fs::read(&image).expect("read");
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let set: Vec<usize> = bytes
        .chunks(65536)
        .enumerate()
        .filter(|(_, c)| c[20] == 1 && c.iter().map(|b| u32::from(*b)).sum::<u32>() == 1)
        .map(|(n, _)| n * 65536)
        .collect();
    assert_eq!(set.len(), 1, "one cluster has just that bit");
    let named = (0..bytes.len())
        .step_by(8)
        .any(|at| be64(at) == set[0] as u64);
    assert!(named, "a bitmap table names it");
}

#[test]
fn chains_need_permission_and_a_recorded_format() {
    if !has_qemu_img() {
        return;
    }
    let dir = Dir::new("chain");
    let (base, mid, top) = (dir.file("base"), dir.file("mid"), dir.file("top"));
    let data = sample(4);
    write_file(&base, &data);
    qemu_img_ok(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        text(&mid),
    ]);
    qemu_img_ok(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "mid",
        "-F",
        "qcow2",
        text(&top),
    ]);
    let read = OpenOptions::new(Format::Qcow2).read_only();
    let error = open(&top, read).err().expect("refused").to_string();
    assert!(error.contains("allow it"), "{error}");
    let disk = open(&top, read.follow()).expect("open");
    assert!(content(&*disk) == data);
    let extent = disk.extent(SIZE - 512, 512).expect("extent");
    assert_eq!((extent.depth, extent.host_offset), (2, Some(SIZE - 512)));
    drop(disk);
    // A chain that leads back to itself.
    qemu_img_ok(&[
        "rebase",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "top",
        "-F",
        "qcow2",
        text(&mid),
    ]);
    let error = open(&top, read.follow())
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("leads back"), "{error}");
    // A format that is not recorded is not guessed: the extension is removed by hand.
    qemu_img_ok(&[
        "rebase",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        text(&mid),
    ]);
    let mut bytes = std::fs::read(&mid).expect("read");
    let extension = [0xe2, 0x79, 0x2a, 0xca];
    let at = bytes
        .windows(4)
        .position(|w| w == extension)
        .expect("there");
    bytes[at] = 0;
    write_file(&mid, &bytes);
    let error = open(&top, read.follow())
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("not guessed"), "{error}");
}

#[test]
fn commit_moves_content_down() {
    let dir = Dir::new("commit");
    let (base, top) = (dir.file("base"), dir.file("top"));
    let mut model = sample(5);
    write_file(&base, &model[..(8 << 20)]);
    model[8 << 20..].fill(0);
    let mut qcow2 = CreateOptions::new(SIZE);
    qcow2.backing = Some(("base".into(), "raw".into()));
    let options = TargetOptions {
        format: Format::Qcow2,
        size_bytes: SIZE,
        qcow2,
        flat: false,
        overwrite: false,
    };
    targets::create(&top, &options).expect("create");
    let disk = open(&top, OpenOptions::new(Format::Qcow2).follow()).expect("open");
    load(&*disk, &mut model, &mut Random(8), 40);
    disk.close().expect("close");
    drop(disk);
    let file = pyrite_disk::storage::HostFile::open(&top, false).expect("open");
    let overlay = Qcow2::open_top(Box::new(file)).expect("open");
    let below = open(&base, OpenOptions::new(Format::Raw)).expect("open");
    pyrite_disk::jobs::commit(&overlay, &*below, &mut |_, _| true).expect("commit");
    drop((overlay, below));
    assert!(std::fs::read(&base).expect("read") == model, "all is below");
    let disk: Arc<dyn Image> = open(&top, OpenOptions::new(Format::Qcow2).follow()).expect("open");
    assert!(content(&*disk) == model, "and seen from above");
    assert_eq!(disk.extent(0, SIZE).expect("extent").depth, 1);
    drop(disk);
    if has_qemu_img() {
        qemu_img_ok(&["check", "-q", "-f", "qcow2", text(&top)]);
    }
}
