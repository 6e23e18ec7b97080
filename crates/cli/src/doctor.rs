//! `pyrite doctor`: what this host can do, in plain words.

use std::fs;
use std::path::Path;

use pyrite_vmm::engines;

use crate::stock;

/// How a finding is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Good,
    Note,
    Bad,
}

/// Prints the findings; 0 if VMs can run here, else 1.
pub fn run() -> u8 {
    let findings = [
        processor(),
        kvm(),
        memory(),
        user_namespaces(),
        ping(),
        cache(),
        package_client(),
    ];
    for (mark, text) in &findings {
        let sign = match mark {
            Mark::Good => "ok  ",
            Mark::Note => "note",
            Mark::Bad => "BAD ",
        };
        println!("{sign}  {text}");
    }
    if findings.iter().any(|(m, _)| *m == Mark::Bad) {
        println!("\nVMs cannot run on this host until what is marked BAD is put right.");
        1
    } else {
        println!("\nVMs can run on this host.");
        0
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn processor() -> (Mark, String) {
    macro_rules! have {
        ($($name:tt),*) => {
            [$(($name, std::arch::is_x86_feature_detected!($name))),*]
        };
    }
    let needed = have!("sse4.2", "popcnt", "cmpxchg16b", "xsave");
    let wanted = have!(
        "avx",
        "avx2",
        "fma",
        "bmi1",
        "bmi2",
        "aes",
        "pclmulqdq",
        "sha",
        "avx512f"
    );
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("an x86-64 processor", |l| {
            l.trim_start_matches([' ', '\t', ':'])
        });
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let list = |features: &[(&str, bool)], there: bool| {
        let names = features
            .iter()
            .filter(|(_, h)| *h == there)
            .map(|(n, _)| *n);
        names.collect::<Vec<_>>().join(" ")
    };
    let missing = list(&needed, false);
    if !missing.is_empty() {
        let text = format!("Processor: {name} lacks {missing}, which the software engine needs.");
        return (Mark::Bad, text);
    }
    let has = list(&wanted, true);
    let lacks = match list(&wanted, false) {
        s if s.is_empty() => String::new(),
        s => format!(" Not there, so guests will not see it either: {s}."),
    };
    (
        Mark::Good,
        format!("Processor: {name}, {cpus} CPUs, with {has}.{lacks}"),
    )
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> (Mark, String) {
    (
        Mark::Bad,
        "Processor: this is not an x86-64 host, and nothing else is supported yet.".into(),
    )
}

fn kvm() -> (Mark, String) {
    match engines::probe_kvm() {
        Ok(()) => (
            Mark::Good,
            "KVM: works at hardware speed; --engine auto uses it.".into(),
        ),
        Err(why) => (
            Mark::Note,
            format!("KVM: not used: {why}. VMs run on the software engine, which needs nothing."),
        ),
    }
}

fn memory() -> (Mark, String) {
    let info = read("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        info.lines()
            .find_map(|l| {
                l.strip_prefix(key)?
                    .trim_start_matches(':')
                    .trim()
                    .split(' ')
                    .next()
            })
            .and_then(|n| n.parse::<u64>().ok())
    };
    let Some(available) = kib("MemAvailable").map(|k| k >> 10) else {
        return (
            Mark::Note,
            "Memory: /proc/meminfo does not say how much is available.".into(),
        );
    };
    let limited = cgroup_limit_mib().filter(|l| *l < available);
    let mib = limited.unwrap_or(available);
    let limit = if limited.is_some() {
        " (limit of this control group)"
    } else {
        ""
    };
    let mark = match mib {
        0..128 => Mark::Bad,
        128..1024 => Mark::Note,
        _ => Mark::Good,
    };
    let text = format!(
        "Memory: {mib} MiB available{limit}. A VM takes what its guest touches, up to --memory, \
         and some 100 MiB for itself."
    );
    (mark, text)
}

fn cgroup_limit_mib() -> Option<u64> {
    let limit = read("/sys/fs/cgroup/memory.max")?.parse::<u64>().ok()?;
    let used = read("/sys/fs/cgroup/memory.current")?.parse::<u64>().ok()?;
    Some(limit.saturating_sub(used) >> 20)
}

fn user_namespaces() -> (Mark, String) {
    let off = read("/proc/sys/user/max_user_namespaces").is_some_and(|n| n == "0")
        || read("/proc/sys/kernel/unprivileged_userns_clone").is_some_and(|n| n == "0");
    if !Path::new("/proc/self/ns/user").exists() || off {
        let text = "User namespaces: switched off. VMs run, but cannot be locked into one.";
        (Mark::Note, text.into())
    } else if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
        .is_some_and(|n| n == "1")
    {
        let text = "User namespaces: AppArmor restricts them. VMs run, but cannot be locked into \
                    one.";
        (Mark::Note, text.into())
    } else {
        (Mark::Good, "User namespaces: available.".into())
    }
}

/// Whether a guest's pings can leave the host.
fn ping() -> (Mark, String) {
    if engines::guests_can_ping() {
        let text = "Ping: guests can ping other hosts through the user network.";
        return (Mark::Good, text.into());
    }
    let text = "Ping: guests can ping the router but no other host, because this host gives your \
                groups no ping sockets. TCP and UDP are not affected. To allow it, as root: sysctl \
                -w net.ipv4.ping_group_range=\"0 2147483647\".";
    (Mark::Note, text.into())
}

fn cache() -> (Mark, String) {
    let dir = match stock::cache_dir() {
        Ok(d) => d,
        Err(e) => {
            return (
                Mark::Note,
                format!("Cache: {e}. pyrite run needs --kernel."),
            );
        }
    };
    // The nearest directory that exists decides; nothing is made here.
    let there = dir
        .ancestors()
        .find(|d| d.is_dir())
        .unwrap_or(Path::new("/"));
    let writable = fs::metadata(there).is_ok_and(|m| !m.permissions().readonly());
    if writable {
        (Mark::Good, format!("Cache: {}.", dir.display()))
    } else {
        let text = format!(
            "Cache: {} cannot be written. Set XDG_CACHE_HOME, or give --kernel.",
            there.display()
        );
        (Mark::Note, text)
    }
}

fn package_client() -> (Mark, String) {
    match stock::missing_programs().as_slice() {
        [] => {
            let text = "Package client: apt-get is there; pyrite run alone can fetch a kernel.";
            (Mark::Good, text.into())
        }
        missing => (
            Mark::Note,
            format!(
                "Package client: {} missing. pyrite run works with --kernel; alone it needs the \
                 files that it names.",
                missing.join(", ")
            ),
        ),
    }
}
