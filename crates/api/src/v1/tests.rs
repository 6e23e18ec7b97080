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
