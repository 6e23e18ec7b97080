use super::*;

fn ns(scale: Scale, cycles: u64) -> u64 {
    let shifted = if scale.shift < 0 {
        cycles >> -scale.shift
    } else {
        cycles << scale.shift
    };
    ((u128::from(shifted) * u128::from(scale.mul)) >> 32) as u64
}

#[test]
fn scale_turns_cycles_into_nanoseconds() {
    for khz in [
        100_000, 999_999, 1_000_000, 1_000_001, 2_596_120, 4_000_000, 9_000_000,
    ] {
        let s = Scale::of_khz(khz);
        // 100 seconds, within the 32 bits of the multiplier.
        let got = ns(s, khz * 1000 * 100);
        assert!(got.abs_diff(100_000_000_000) < 200, "{khz}: {got} {s:?}");
    }
}

#[test]
fn a_pause_separates_the_clocks_and_drift_does_not() {
    let base = (1_000, 1_000);
    // 1000 s at 1 GHz, 10 ppm off.
    assert!(still_together(
        base,
        (1_000_000_001_000, 1_000_010_001_000),
        1_000_000
    ));
    assert!(!still_together(
        base,
        (1_000_000_000, 500_000_000),
        1_000_000
    ));
    assert!(!still_together(base, (999, 2_000), 1_000_000));
}

#[test]
fn a_thread_that_was_interrupted_between_the_clocks_reads_them_again() {
    let mut tsc = [1_000, 90_000_000, 90_000_100, 90_000_500].into_iter();
    let mut ns = [50_000, 90_000].into_iter();
    let got = moment(|| tsc.next().unwrap(), || ns.next().unwrap(), 1_000);
    assert_eq!(got, (90_000_300, 90_000));
    // Never close enough: the closest.
    let mut n = 0;
    let mut tsc = || {
        n += 1;
        n * n * 1_000_000
    };
    assert_eq!(moment(&mut tsc, || 7, 10), (2_500_000, 7));
}

#[test]
fn published_structure_follows_the_version_protocol() {
    let m = GuestMemory::new(1 << 20).unwrap();
    let info = TimeInfo {
        tsc_timestamp: 0x1122_3344_5566_7788,
        system_time: 42,
        scale: Scale::of_khz(2_000_000),
    };
    m.write(0x1000, &7u32.to_le_bytes()).unwrap();
    info.publish(&m, 0x1000);
    assert_eq!(m.read_u32(0x1000).unwrap(), 10);
    assert_eq!(m.read_u64(0x1008).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(m.read_u64(0x1010).unwrap(), 42);
    let mut flags = [0];
    m.read(0x101d, &mut flags).unwrap();
    assert_eq!(flags[0], TSC_STABLE);
}

#[test]
fn hostile_addresses_are_ignored() {
    let m = GuestMemory::new(1 << 20).unwrap();
    let info = TimeInfo {
        tsc_timestamp: 1,
        system_time: 1,
        scale: Scale::of_khz(1),
    };
    for gpa in [0xf_fff0, 1 << 20, 0xfee0_0000, !3, 0x1002] {
        info.publish(&m, gpa);
    }
    assert_eq!(m.read_u64(0xf_fff0).unwrap(), 0);
    assert_eq!(m.read_u64(0x1008).unwrap(), 0);
}
