use super::*;

fn good() -> VmSpec {
    VmSpec {
        boot: BootSpec {
            kernel: "vmlinuz".into(),
            ..BootSpec::default()
        },
        ..VmSpec::default()
    }
}

#[test]
fn default_with_kernel_is_valid() {
    good().validate().unwrap();
}

#[test]
fn spec_survives_json() {
    let mut spec = good();
    spec.disks.push(DiskSpec {
        path: "d".into(),
        read_only: true,
        serial: Some("x".into()),
        ..DiskSpec::default()
    });
    spec.net.forwards.push(ForwardSpec {
        protocol: Protocol::Udp,
        host_addr: loopback(),
        host_port: 1,
        guest_port: 2,
    });
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec);
}

#[test]
fn unknown_field_is_refused() {
    let text = r#"{"cpus":1,"memory_bytes":536870912,"boot":{"kernel":"k"},"colour":"red"}"#;
    assert!(
        serde_json::from_str::<VmSpec>(text)
            .unwrap_err()
            .to_string()
            .contains("colour")
    );
}

#[test]
fn all_errors_are_listed_by_path() {
    let mut spec = VmSpec {
        cpus: 0,
        memory_bytes: 1,
        ..VmSpec::default()
    };
    spec.cpu_model = "a b".into();
    spec.disks = vec![
        DiskSpec {
            path: "d".into(),
            read_only: false,
            serial: Some("x".repeat(21)),
            ..DiskSpec::default()
        },
        DiskSpec {
            path: "d".into(),
            ..DiskSpec::default()
        },
    ];
    spec.net.kind = NetKind::None;
    let forward = ForwardSpec {
        protocol: Protocol::Tcp,
        host_addr: loopback(),
        host_port: 80,
        guest_port: 0,
    };
    spec.net.forwards = vec![forward, forward];
    spec.time_limit_ms = Some(0);
    let paths: Vec<String> = spec
        .validate()
        .unwrap_err()
        .into_iter()
        .map(|e| e.path)
        .collect();
    assert_eq!(
        paths,
        [
            "cpus",
            "memory_bytes",
            "cpu_model",
            "boot.kernel",
            "time_limit_ms",
            "disks[0].serial",
            "disks[1].path",
            "net.forwards",
            "net.forwards[0]",
            "net.forwards[1]",
            "net.forwards[1].host_port",
        ]
    );
}

#[test]
fn firmware_and_identity_are_checked() {
    let firmware = FirmwareSpec {
        code: "bios.bin".into(),
        ..FirmwareSpec::default()
    };
    let mut spec = VmSpec::default();
    spec.boot.firmware = Some(firmware.clone());
    spec.smbios.uuid = Some("00112233-4455-6677-8899-aabbccddeeff".into());
    spec.smbios.vendor = Some("A. Maker".into());
    spec.validate().unwrap();
    let bytes = spec.smbios.uuid_bytes().unwrap();
    assert_eq!((bytes[0], bytes[4], bytes[15]), (0, 0x44, 0xff));
    let wrong = |change: &dyn Fn(&mut VmSpec), path: &str| {
        let mut s = spec.clone();
        change(&mut s);
        let errors = s.validate().unwrap_err();
        assert_eq!(errors[0].path, path, "{errors:?}");
    };
    wrong(&|s| s.boot.kernel = "k".into(), "boot.firmware");
    wrong(&|s| s.smbios.vendor = Some("é".into()), "smbios.vendor");
    wrong(&|s| s.smbios.serial = Some(String::new()), "smbios.serial");
    for uuid in [
        "",
        "0011",
        "+0112233-4455-6677-8899-aabbccddeeff",
        "é0112233-4455-6677-8899-aabbccddeeff",
    ] {
        wrong(&|s| s.smbios.uuid = Some(uuid.into()), "smbios.uuid");
    }
    let with = |f: FirmwareSpec| move |s: &mut VmSpec| s.boot.firmware = Some(f.clone());
    let f = FirmwareSpec {
        vars: Some("v".into()),
        ..firmware.clone()
    };
    wrong(&with(f), "boot.firmware.vars");
    let f = FirmwareSpec {
        menu_ms: Some(70_000),
        ..firmware
    };
    wrong(&with(f), "boot.firmware.menu_ms");
    wrong(&with(FirmwareSpec::default()), "boot.firmware.code");
}

#[test]
fn shares_and_channels_are_told_apart() {
    let share = |tag: &str| ShareSpec {
        path: "d".into(),
        tag: tag.into(),
        kind: ShareKind::P9,
        read_only: false,
        owner: None,
    };
    let channel = |name: &str, path: &str| ChannelSpec {
        name: name.into(),
        path: path.into(),
    };
    let mut spec = good();
    spec.shares = vec![share("a"), share("b")];
    spec.channels = vec![channel("x", "s1"), channel("y", "s2")];
    spec.validate().unwrap();
    spec.shares
        .extend([share("a"), share(""), share(&"t".repeat(37))]);
    let more = [channel("x", "s3"), channel("z", "s2"), channel("a/b", "s4")];
    spec.channels.extend(more);
    let errors = spec.validate().unwrap_err();
    let paths: Vec<&str> = errors.iter().map(|e| e.path.as_str()).collect();
    let expected = [
        "shares[2].tag",
        "shares[3].tag",
        "shares[4].tag",
        "channels[2].name",
        "channels[3].path",
        "channels[4].name",
    ];
    assert_eq!(paths, expected);
}
