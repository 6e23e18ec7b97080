//! What host memory the VM process uses: the guest's memory, and what it costs besides.

use pyrite_mem::GuestMemory;
use pyrite_state::Inspect;

/// Bytes of host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Use {
    /// Of guest memory.
    guest: u64,
    /// Of everything else; what several processes share counts for each in part.
    other: u64,
}

/// What the host says of this process.
pub fn inspect(memory: &GuestMemory) -> Inspect {
    let start = memory.host_base() as u64;
    let range = start..start + memory.size_bytes();
    let Some(n) = std::fs::read_to_string("/proc/self/smaps")
        .ok()
        .map(|text| parse(&text, &range))
    else {
        return Inspect::Text("the host does not say".into());
    };
    Inspect::node([
        ("guest-bytes", Inspect::Uint(n.guest)),
        ("overhead-bytes", Inspect::Uint(n.other)),
    ])
}

/// Sums the proportional set sizes of `/proc/PID/smaps`; mappings in `ram` are the guest's. proc(5).
fn parse(text: &str, ram: &std::ops::Range<u64>) -> Use {
    let mut sum = Use::default();
    let mut guest = false;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            let to = if guest {
                &mut sum.guest
            } else {
                &mut sum.other
            };
            *to += kib << 10;
        } else if let Some((from, _)) = line.split_once('-')
            && let Ok(from) = u64::from_str_radix(from, 16)
        {
            guest = ram.contains(&from);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart() {
        let text = "\
5000-6000 r-xp 00000000 08:01 1 /usr/bin/pyrite
Rss:                  40 kB
Pss:                  20 kB
Pss_Dirty:             8 kB
7f0000000000-7f0000200000 rw-s 00000000 00:01 2 /memory
Pss:                2048 kB
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
Pss:                   4 kB
VmFlags: rd wr
";
        let n = parse(text, &(0x7f00_0000_0000..0x7f00_0020_0000));
        assert_eq!((n.guest, n.other), (2 << 20, 24 << 10));
        assert_eq!(parse("nonsense\n-\nPss: x kB\n", &(0..1)), Use::default());
    }

    #[test]
    fn this_process_has_both() {
        let memory = GuestMemory::new(16 << 20).unwrap();
        memory.write(0, &[1; 4096]).unwrap();
        let Inspect::Node(n) = inspect(&memory) else {
            panic!("no figures")
        };
        for (name, value) in n {
            assert!(matches!(value, Inspect::Uint(n) if n > 0), "{name}");
        }
    }
}
