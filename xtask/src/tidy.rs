//! House rules: layers, where `unsafe` may be, file sizes, forbidden words.

use std::path::{Path, PathBuf};

/// Crates by layer; a crate may depend on lower layers, and on the named exceptions of its own.
const LAYERS: &[(&str, u8)] = &[
    ("x86", 0),
    ("state", 0),
    ("mem", 1),
    ("engine", 2),
    ("vdev", 2),
    ("disk", 2),
    ("net", 2),
    ("share", 2),
    ("api", 2),
    ("soft", 3),
    ("devices", 3),
    ("virtio", 3),
    ("vmm", 4),
    ("cli", 5),
];

/// What a layer must not reach although it is lower.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("devices", &["engine"]),
    ("virtio", &["engine"]),
    ("soft", &["vdev", "disk", "net", "api"]),
    ("vdev", &["x86"]),
    ("disk", &["x86"]),
    ("net", &["x86"]),
    ("share", &["x86", "mem", "state"]),
    ("api", &["x86", "state", "mem"]),
];

/// Longest source file in lines; generated tables and tests may be longer.
const FILE_LINES_MAX: usize = 1000;

/// Words that must not appear in sources, put together so that this file does not hold them.
fn forbidden_words() -> Vec<String> {
    [
        "to".to_owned() + "do!(",
        "unimplemented".to_owned() + "!(",
        "#[ig".to_owned() + "nore",
    ]
    .into()
}

/// Checks everything and lists all violations.
pub fn check() -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .ok_or("no workspace root")?;
    let mut bad = Vec::new();
    layers(root, &mut bad)?;
    let mut files = Vec::new();
    for dir in ["crates", "tests", "xtask"] {
        sources(&root.join(dir), &mut files)?;
    }
    for f in &files {
        file(root, f, &mut bad)?;
    }
    readme(root, &mut bad)?;
    if bad.is_empty() {
        Ok(())
    } else {
        Err(format!("\n  {}", bad.join("\n  ")))
    }
}

fn read(p: &Path) -> Result<String, String> {
    std::fs::read_to_string(p).map_err(|e| format!("{}: {e}", p.display()))
}

fn layers(root: &Path, bad: &mut Vec<String>) -> Result<(), String> {
    let level = |name: &str| LAYERS.iter().find(|(n, _)| *n == name).map(|(_, l)| *l);
    for (name, own) in LAYERS {
        let text = read(&root.join("crates").join(name).join("Cargo.toml"))?;
        let deps = text.split("[dev-dependencies]").next().unwrap_or("");
        for line in deps.lines() {
            let Some(dep) = line.strip_prefix("pyrite-") else {
                continue;
            };
            let dep = dep.split(['.', ' ', '=']).next().unwrap_or("");
            match level(dep) {
                None => bad.push(format!("{name}: unknown crate pyrite-{dep}")),
                Some(l) if l >= *own => {
                    bad.push(format!(
                        "{name} (layer {own}) must not depend on {dep} (layer {l})"
                    ));
                }
                Some(_) => {}
            }
            if FORBIDDEN.iter().any(|(n, f)| n == name && f.contains(&dep)) {
                bad.push(format!("{name} must not depend on {dep}"));
            }
        }
    }
    Ok(())
}

fn sources(dir: &Path, out: &mut Vec<PathBuf>) -> Result<(), String> {
    for e in std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))? {
        let p = e.map_err(|e| e.to_string())?.path();
        if p.is_dir() {
            sources(&p, out)?;
        } else if p.extension().is_some_and(|x| x == "rs") {
            out.push(p);
        }
    }
    Ok(())
}

fn file(root: &Path, path: &Path, bad: &mut Vec<String>) -> Result<(), String> {
    let text = read(path)?;
    let shown = path.strip_prefix(root).unwrap_or(path).display();
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX && !shown.to_string().contains("tests") {
        bad.push(format!("{shown}: {lines} lines, at most {FILE_LINES_MAX}"));
    }
    for w in forbidden_words() {
        if text.contains(&w) {
            bad.push(format!("{shown}: contains {w}"));
        }
    }
    // A module that opts in to unsafe code says why in its header.
    if text.contains("allow(unsafe_code") && !text.contains("UNSAFETY:") {
        bad.push(format!(
            "{shown}: allows unsafe code without an UNSAFETY comment"
        ));
    }
    Ok(())
}

/// README.md names exactly two set-up commands, in fenced `sh` blocks.
fn readme(root: &Path, bad: &mut Vec<String>) -> Result<(), String> {
    let text = read(&root.join("README.md"))?;
    let blocks = text.matches("```sh\n").count();
    if blocks != 2 {
        bad.push(format!(
            "README.md: {blocks} set-up commands (```sh blocks), must be 2"
        ));
    }
    if !text.contains("cargo xtask test") {
        bad.push("README.md: the test command is not there".to_owned());
    }
    Ok(())
}
