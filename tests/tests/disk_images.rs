//! `pyrite image`, against qemu-img where there is one.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use pyrite_tests::{Scratch, run};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Runs `pyrite image`, which must end with `code`; all that it printed.
fn image(args: &[&str], code: i32) -> String {
    let out = run(&[&["image"], args].concat());
    let all = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert_eq!(out.status.code(), Some(code), "{args:?}: {all}");
    all
}

/// What qemu-img prints; None without one.
fn qemu_img(args: &[&str]) -> Option<String> {
    let Ok(out) = Command::new("qemu-img").args(args).output() else {
        pyrite_tests::skipped("there is no qemu-img here to compare with");
        return None;
    };
    assert!(
        out.status.success(),
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Some(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A disk with data, zeroes and text.
fn sample() -> Vec<u8> {
    let mut out = vec![0; 5 << 20];
    for (n, b) in out[1 << 20..(2 << 20) + 512].iter_mut().enumerate() {
        *b = (n / 33) as u8;
    }
    out[4_500_480..4_501_504].fill(0xa5);
    out
}

/// The objects of a JSON list of flat objects, without regard to the order of their members.
fn objects(json: &str) -> Vec<BTreeSet<String>> {
    let plain: String = json.chars().filter(|c| !c.is_whitespace()).collect();
    plain
        .split('}')
        .filter_map(|o| o.split_once('{'))
        .map(|(_, members)| members.split(',').map(str::to_owned).collect())
        .collect()
}

#[test]
fn images_go_through_every_format_and_back() {
    let dir = Scratch::new("image-formats");
    let raw = text(&dir.file("raw", &sample()));
    for (n, format) in ["qcow2", "vmdk", "vdi", "vhd", "vhdx", "raw"]
        .into_iter()
        .enumerate()
    {
        let there = text(&dir.0.join(format!("there{n}")));
        let back = text(&dir.0.join(format!("back{n}")));
        image(
            &["convert", "-q", "-f", "raw", "-O", format, &raw, &there],
            0,
        );
        image(
            &["convert", "-q", "-f", format, "-O", "raw", &there, &back],
            0,
        );
        assert!(std::fs::read(&back).expect("read") == sample(), "{format}");
        let info = image(&["info", "--json", &there], 0);
        assert!(
            info.contains(&format!("\"format\": \"{format}\"")),
            "{info}"
        );
        assert!(info.contains("\"size_bytes\": 5242880"), "{info}");
        image(&["check", "-f", format, &there], 0);
        // An existing file is not replaced unless that is said.
        let error = image(
            &["convert", "-q", "-f", "raw", "-O", format, &raw, &there],
            2,
        );
        assert!(error.contains("exists"), "{error}");
    }
}

#[test]
fn map_says_what_qemu_says() {
    let dir = Scratch::new("image-map");
    // Whole clusters: QEMU also tells where a cluster is a hole of the file in part.
    let mut content = vec![0; 5 << 20];
    content[1 << 20..(1 << 20) + 5 * 65536].fill(0x11);
    content[3 << 20..(3 << 20) + 65536].fill(0x22);
    let raw = text(&dir.file("raw", &content));
    for (n, options) in [&["-c"][..], &[], &["--extended-l2"]]
        .into_iter()
        .enumerate()
    {
        let file = text(&dir.0.join(format!("i{n}")));
        let convert = ["convert", "-q", "-f", "raw", "-O", "qcow2"];
        image(&[&convert[..], options, &[&raw, &file]].concat(), 0);
        let ours = objects(&image(&["map", "-f", "qcow2", "--json", &file], 0));
        assert!(ours.len() >= 3, "{ours:?}");
        if let Some(theirs) = qemu_img(&["map", "--output=json", "-f", "qcow2", &file]) {
            assert_eq!(ours, objects(&theirs), "{options:?}");
        }
    }
}

#[test]
fn overlay_is_made_written_committed_and_resized() {
    let dir = Scratch::new("image-overlay");
    let base = text(&dir.file("base", &sample()));
    let top = text(&dir.0.join("top"));
    image(
        &["create", "-f", "qcow2", "-b", "base", "-F", "raw", &top],
        0,
    );
    let info = image(&["info", "-f", "qcow2", &top], 0);
    assert!(info.contains("base (raw)"), "{info}");
    // Nothing beside the image is opened unless that is allowed.
    let error = image(&["map", "-f", "qcow2", &top], 2);
    assert!(error.contains("--allow-references"), "{error}");
    let map = image(&["map", "-f", "qcow2", "--allow-references", &top], 0);
    assert!(map.contains("data 1"), "{map}");
    let error = image(
        &["resize", "-f", "qcow2", "--allow-references", &top, "1M"],
        2,
    );
    assert!(error.contains("--shrink"), "{error}");
    image(
        &["resize", "-f", "qcow2", "--allow-references", &top, "+3M"],
        0,
    );
    image(&["commit", "-q", "-f", "qcow2", &top], 0);
    let bytes = std::fs::read(&base).expect("read");
    assert_eq!(bytes.len(), 8 << 20);
    assert!(bytes[..5 << 20] == sample() && bytes[5 << 20..].iter().all(|b| *b == 0));
    image(&["check", "-f", "qcow2", &top], 0);
    qemu_img(&["check", "-q", "-f", "qcow2", &top]);
}

#[test]
fn snapshots_and_damage_are_handled() {
    let dir = Scratch::new("image-snapshots");
    let raw = text(&dir.file("raw", &sample()));
    let file = text(&dir.0.join("i.qcow2"));
    image(
        &["convert", "-q", "-f", "raw", "-O", "qcow2", &raw, &file],
        0,
    );
    image(&["snapshot", "create", &file, "first"], 0);
    let list = image(&["snapshot", "list", &file], 0);
    assert!(list.starts_with("1 first 5242880 "), "{list}");
    image(&["resize", "-f", "qcow2", &file, "6M"], 0);
    let old = text(&dir.0.join("old"));
    let convert = ["convert", "-q", "-f", "qcow2", "-O", "raw"];
    image(
        &[&convert[..], &["--snapshot", "first", &file, &old]].concat(),
        0,
    );
    assert!(std::fs::read(&old).expect("read") == sample());
    image(&["snapshot", "apply", &file, "first"], 0);
    image(&["snapshot", "delete", &file, "first"], 0);
    let error = image(&["snapshot", "delete", &file, "first"], 2);
    assert!(error.contains("has none"), "{error}");
    qemu_img(&["check", "-q", "-f", "qcow2", &file]);
    // A cluster that nobody uses is counted, then one that is used is not.
    let good = std::fs::read(&file).expect("read");
    let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().expect("bytes"));
    let block = be64(be64(48) as usize) as usize;
    for (was, becomes, code, repair) in [(0u8, 1u8, 4, "leaks"), (1, 0, 3, "all")] {
        let mut bad = good.clone();
        let last = good.len() / 65536;
        let place = (8..last)
            .map(|n| block + n * 2 + 1)
            .find(|at| bad[*at] == was);
        bad[place.expect("a cluster")] = becomes;
        std::fs::write(&file, &bad).expect("write");
        image(&["check", "-f", "qcow2", &file], code);
        image(&["check", "-f", "qcow2", "--repair", repair, &file], 0);
        image(&["check", "-f", "qcow2", &file], 0);
        qemu_img(&["check", "-q", "-f", "qcow2", &file]);
    }
}

#[test]
fn formats_are_not_guessed() {
    let dir = Scratch::new("image-guess");
    let raw = text(&dir.file("raw", &sample()));
    let file = text(&dir.0.join("i.qcow2"));
    image(
        &["convert", "-q", "-f", "raw", "-O", "qcow2", &raw, &file],
        0,
    );
    let out = text(&dir.0.join("out"));
    // Without a format nothing is converted; with the wrong one, the bytes are taken as they are.
    image(&["convert", "-q", "-O", "raw", &file, &out], 2);
    let said = image(&["convert", "-q", "-f", "raw", "-O", "raw", &file, &out], 0);
    assert!(said.contains("looks like a qcow2 image"), "{said}");
    assert!(std::fs::read(&out).expect("read").starts_with(b"QFI\xfb"));
    let error = image(&["check", "-f", "qcow2", &raw], 2);
    assert!(error.contains("expected a qcow2 image"), "{error}");
}
