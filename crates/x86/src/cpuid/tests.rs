use super::*;

/// A host on which every known feature is present.
fn host(vendor: Vendor) -> HostCpuid {
    HostCpuid::read_with(2_596_120, |leaf, subleaf| {
        let mut e = CpuidEntry::default();
        for f in FEATURES {
            if (f.leaf, f.subleaf) == (leaf, subleaf) {
                *e.register_mut(f.register) |= 1 << f.bit;
            }
        }
        let mut r = [e.eax, e.ebx, e.ecx, e.edx];
        match (leaf, subleaf) {
            (0, 0) if vendor == Vendor::Amd => r = [0x1c, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            (0, 0) => r = [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (1, 0) => {
                r[0] = 0x00b0_0f21;
                // VMX, MONITOR, HTT and what else must not come through.
                r[2] |= 0xffff;
                r[3] = u32::MAX;
            }
            (7, 0) => {
                r[0] = 1;
                // TSX, MPX, SGX, protection keys, shadow stacks, AMX.
                r[1] |= 1 << 2 | 1 << 4 | 1 << 11 | 1 << 14;
                r[2] |= 1 << 7 | 1 << 16 | 1 << 30;
                r[3] |= 0b111 << 22;
            }
            (0xa, 0) => r = [u32::MAX; 4],
            (0xd, 0) => r = [0x6_02e7, 2440, 11008, 0],
            (0xd, 2) => r = [256, 576, 0, 0],
            (0xd, 5) => r = [64, 832, 0, 0],
            (0xd, 6) => r = [512, 896, 0, 0],
            (0xd, 7) => r = [1024, 1408, 0, 0],
            (0xd, 9) => r = [8, 2432, 0, 0],
            (0x8000_0000, 0) => r[0] = 0x8000_0021,
            (0x8000_0001, 0) => r[2] |= 1 << 2,
            (0x8000_0002..=0x8000_0004, 0) => r = [0x2058_5858; 4],
            (0x8000_0008, 0) => r[0] = 52 | 57 << 8,
            _ => {}
        }
        r
    })
}

fn text(t: &CpuidTable) -> String {
    (0x8000_0002..=0x8000_0004)
        .filter_map(|l| t.get(l, 0))
        .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|b| *b != 0)
        .map(char::from)
        .collect()
}

fn all_specs() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|m| m.name).chain(["host"])
}

#[test]
fn feature_table_has_no_doubles_and_models_only_name_what_is_in_it() {
    for (n, f) in FEATURES.iter().enumerate() {
        assert!(FEATURES[..n].iter().all(|g| g.name != f.name), "{}", f.name);
        assert!(
            FEATURES[..n].iter().all(|g| {
                (g.leaf, g.subleaf, g.register, g.bit) != (f.leaf, f.subleaf, f.register, f.bit)
            }),
            "{}",
            f.name
        );
    }
    for m in MODELS {
        for name in m.features.iter().flat_map(|l| l.iter()) {
            assert!(feature(name).is_some(), "{} {name}", m.name);
        }
    }
    for (a, b) in REQUIRES {
        assert!(feature(a).is_some() && feature(b).is_some(), "{a} {b}");
    }
}

#[test]
fn every_model_is_consistent_on_a_full_host() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let host = host(vendor);
        for spec in all_specs() {
            for engine in [EngineKind::Soft, EngineKind::Kvm] {
                for vcpus in [1, 2, 3, 64, 255] {
                    let g = guest_cpuid(spec, &host, engine, vcpus).unwrap();
                    check(spec, &g, vcpus);
                }
            }
        }
    }
}

fn check(spec: &str, g: &GuestCpuid, vcpus: u32) {
    let t = &g.table;
    for (n, e) in t.entries.iter().enumerate() {
        let double = t.entries[..n]
            .iter()
            .any(|o| o.leaf == e.leaf && (!o.indexed || o.subleaf == e.subleaf));
        assert!(!double, "{spec}: {e:x?}");
    }
    let shown: FeatureSet = g.features.iter().copied().collect();
    for f in FEATURES {
        assert_eq!(t.has(f), shown.has(f.name), "{spec}: {}", f.name);
    }
    for (name, needs) in REQUIRES {
        assert!(
            !shown.has(name) || shown.has(needs),
            "{spec}: {name} {needs}"
        );
    }
    let max = t.get(0, 0).unwrap().eax;
    let max_ext = t.get(0x8000_0000, 0).unwrap().eax;
    for e in &t.entries {
        let ok = e.leaf <= max
            || (0x4000_0000..=0x4000_0010).contains(&e.leaf)
            || (0x8000_0000..=max_ext).contains(&e.leaf);
        assert!(ok, "{spec}: {e:x?}");
    }
    let l1 = t.get(1, 0).unwrap();
    assert_eq!(l1.ebx >> 16 & 0xff, vcpus);
    assert_ne!(l1.ecx & 1 << 31, 0, "hypervisor");
    assert_eq!(l1.ecx & (1 << 3 | 1 << 5), 0, "MONITOR, VMX");
    let core = t.get(0xb, 1).unwrap();
    assert_eq!(core.ebx, vcpus);
    assert!(1u32 << core.eax >= vcpus);
    let bits = t.get(0x8000_0008, 0).unwrap().eax;
    assert_eq!(bits & 0xff, 46);
    for (limit, left) in [(39, 39), (52, 46)] {
        let mut t = t.clone();
        t.limit_physical_bits(limit);
        let limited = t.get(0x8000_0008, 0).unwrap().eax;
        assert_eq!(limited, bits & !0xff | left, "{spec}");
    }
    assert_eq!(t.get(0xa, 0), None, "no performance counters");
    let d = t.get(0xd, 0).copied().unwrap_or_default();
    assert_eq!(d.edx, 0);
    assert!(d.ecx as usize <= crate::XSAVE_AREA_BYTES);
    assert_eq!(d.eax & 0x6_0000, 0, "no AMX");
    assert_eq!(d.eax & 4 != 0, shown.has("avx"));
    assert_eq!(d.eax & 0xe0 == 0xe0, shown.has("avx512f"));
}

#[test]
fn levels_show_what_the_psabi_demands() {
    let host = host(Vendor::Amd);
    let shows = |spec: &str, names: &[&str]| {
        let g = guest_cpuid(spec, &host, EngineKind::Soft, 2).unwrap();
        assert_eq!(g.dropped, Vec::<&str>::new(), "{spec}");
        names.iter().all(|n| g.features.contains(n))
    };
    let v2 = ["cx16", "lahf_lm", "popcnt", "sse4_2", "ssse3"];
    let v3 = [
        "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
    ];
    let v4 = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];
    assert!(shows("x86-64-v2", &v2) && !shows("x86-64", &v2[..1]));
    assert!(shows("x86-64-v3", &v2) && shows("x86-64-v3", &v3) && !shows("x86-64-v2", &["avx"]));
    assert!(
        shows("x86-64-v4", &v3) && shows("x86-64-v4", &v4) && !shows("x86-64-v3", &["avx512f"])
    );
    assert!(shows("X86-64-V4", &v4), "names are found in any case");
}

#[test]
fn host_keeps_its_identity_and_models_have_their_own() {
    let host = host(Vendor::Amd);
    let g = guest_cpuid("host", &host, EngineKind::Soft, 1).unwrap();
    assert_eq!(g.table.get(1, 0).unwrap().eax, 0x00b0_0f21);
    assert_eq!(g.table.get(0, 0).unwrap().ebx, 0x6874_7541);
    assert!(text(&g.table).starts_with("XXX "));
    let g = guest_cpuid("Haswell", &host, EngineKind::Soft, 1).unwrap();
    // Family 6, model 3CH, stepping 4; GenuineIntel.
    assert_eq!(g.table.get(1, 0).unwrap().eax, 0x0003_06c4);
    assert_eq!(g.table.get(0, 0).unwrap().ebx, 0x756e_6547);
    assert_eq!(text(&g.table), "Pyrite Virtual CPU Haswell");
    let g = guest_cpuid("EPYC-Milan", &host, EngineKind::Soft, 1).unwrap();
    // Family 19H = 15 + 10.
    assert_eq!(g.table.get(1, 0).unwrap().eax, 0x00a0_0f11);
}

#[test]
fn what_the_host_lacks_is_not_shown() {
    let mut poor = host(Vendor::Intel);
    for e in &mut poor.table.entries {
        if e.leaf == 1 {
            // No AVX.
            e.ecx &= !(1 << 28);
        }
    }
    let g = guest_cpuid("host", &poor, EngineKind::Soft, 1).unwrap();
    for gone in [
        "avx",
        "avx2",
        "fma",
        "f16c",
        "vaes",
        "avx512f",
        "avx512_vnni",
    ] {
        assert!(!g.features.contains(&gone), "{gone}");
    }
    assert!(g.features.contains(&"bmi2") && g.features.contains(&"xsave"));
    assert_eq!(g.table.get(0xd, 0).unwrap().eax, 3);
    let g = guest_cpuid("x86-64-v3", &poor, EngineKind::Soft, 1).unwrap();
    assert_eq!(g.dropped, ["fma", "avx", "f16c", "avx2"]);
    assert_eq!(
        guest_cpuid("x86-64-v2,+avx2", &poor, EngineKind::Soft, 1),
        Err(CpuidError::Unavailable(vec!["avx2"]))
    );
}

#[test]
fn the_software_engine_provides_what_it_emulates_and_nothing_that_needs_kvm() {
    let bare = HostCpuid::read_with(0, |leaf, _| match leaf {
        0 => [1, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
        _ => [0; 4],
    });
    let g = guest_cpuid("host", &bare, EngineKind::Soft, 1).unwrap();
    for there in [
        "x2apic", "pcid", "smep", "smap", "nx", "pdpe1gb", "autoibrs",
    ] {
        assert!(g.features.contains(&there), "{there}");
    }
    for not in [
        "sse3",
        "avx",
        "pku",
        "ibpb",
        "md_clear",
        "arch_capabilities",
    ] {
        assert!(!g.features.contains(&not), "{not}");
    }
    let g = guest_cpuid("host", &bare, EngineKind::Kvm, 1).unwrap();
    assert_eq!(g.features, Vec::<&str>::new());
}

#[test]
fn modifiers_take_their_dependants_along() {
    let host = host(Vendor::Intel);
    let g = guest_cpuid("host,-avx", &host, EngineKind::Soft, 1).unwrap();
    assert!(!g.features.contains(&"avx512bw"));
    assert_eq!(
        g.dropped,
        Vec::<&str>::new(),
        "asked for, so not worth a warning"
    );
    let g = guest_cpuid("x86-64, +sse3 ,+ssse3", &host, EngineKind::Soft, 1).unwrap();
    assert!(g.features.contains(&"ssse3"));
    // The last word counts.
    let g = guest_cpuid("x86-64-v3,-avx2,+avx2", &host, EngineKind::Soft, 1).unwrap();
    assert!(g.features.contains(&"avx2"));
    assert_eq!(
        guest_cpuid("x86-64-v2,+avx2", &host, EngineKind::Soft, 1),
        Err(CpuidError::MissingRequirement {
            feature: "avx2",
            needs: "avx"
        })
    );
}

#[test]
fn mistakes_are_named() {
    let host = host(Vendor::Intel);
    let err = |spec| guest_cpuid(spec, &host, EngineKind::Soft, 1).unwrap_err();
    assert_eq!(
        err("pentium9"),
        CpuidError::UnknownModel("pentium9".to_owned())
    );
    assert!(err("pentium9").to_string().contains("EPYC-Milan"));
    assert_eq!(err(""), CpuidError::UnknownModel(String::new()));
    assert_eq!(
        err("host,+warp"),
        CpuidError::UnknownFeature("warp".to_owned())
    );
    assert!(err("host,+warp").to_string().contains("avx512f"));
    assert_eq!(err("host,avx"), CpuidError::BadModifier("avx".to_owned()));
    assert_eq!(err("host,"), CpuidError::BadModifier(String::new()));
    for n in [0, 256, u32::MAX] {
        assert_eq!(
            guest_cpuid("host", &host, EngineKind::Soft, n),
            Err(CpuidError::BadCount(n))
        );
    }
}

#[test]
fn answers_carry_what_belongs_to_the_vcpu() {
    let host = host(Vendor::Amd);
    let t = guest_cpuid("host", &host, EngineKind::Soft, 4)
        .unwrap()
        .table;
    let v = VcpuView {
        apic_id: 3,
        cr4: crate::bits::cr4::OSXSAVE,
        xcr0: 0xe7,
        xss: 0,
    };
    let l1 = t.answer(1, 0, &v);
    assert_eq!(l1.ebx >> 24, 3);
    assert_ne!(l1.ecx & 1 << 27, 0);
    assert_eq!(t.answer(1, 0, &VcpuView::default()).ecx & 1 << 27, 0);
    let b = t.answer(0xb, 7, &v);
    assert_eq!((b.eax, b.ebx, b.ecx, b.edx), (0, 0, 7, 3));
    let e = t.answer(0x8000_001e, 0, &v);
    assert_eq!((e.eax, e.ebx & 0xff), (3, 3));
    // Standard format: the end of the last component; compacted: one after the other.
    assert_eq!(t.answer(0xd, 0, &v).ebx, 2432);
    assert_eq!(t.answer(0xd, 1, &v).ebx, 576 + 256 + 64 + 512 + 1024);
    assert_eq!(t.answer(0xd, 0, &VcpuView { xcr0: 3, ..v }).ebx, 576);
    assert_eq!(t.answer(0x1234, 0, &v).eax, 0);
    assert_eq!(t.answer(0xffff_ffff, 9, &v).edx, 0);
}

#[test]
fn frequencies_agree_with_each_other() {
    let host = host(Vendor::Intel);
    let t = guest_cpuid("host", &host, EngineKind::Soft, 1)
        .unwrap()
        .table;
    let e = t.get(0x15, 0).unwrap();
    // As guests compute it, in 32 bits.
    let khz = (e.ecx / 1000).checked_mul(e.ebx).unwrap() / e.eax;
    assert!(khz.abs_diff(2_596_120) <= 3, "{khz}");
    let h = t.get(0x4000_0010, 0).unwrap();
    assert_eq!((h.eax, h.ebx), (2_596_120, 1_000_000));
}

#[test]
fn this_host_gets_a_table() {
    let host = HostCpuid::read(0);
    for spec in all_specs() {
        let g = guest_cpuid(spec, &host, EngineKind::Soft, 2).unwrap();
        assert!(g.features.contains(&"lm"), "{spec}");
    }
}
