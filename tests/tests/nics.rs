//! Network cards, driven by the drivers of Debian's standard kernel, and what is between a card
//! and the network.
//!
//! For each card: it gets an address, the router answers pings, 10 MiB go each way unharmed, the
//! cable is pulled, and a snapshot goes on.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use pyrite_tests::fixtures::{self, Guest};
use pyrite_tests::vm::{STEP, Vm, with};
use pyrite_tests::{Scratch, Session, pyrite};

const TRANSFER_BYTES: usize = 10 << 20;

fn guest() -> Option<Guest> {
    match fixtures::network_guest() {
        Ok(guest) => Some(guest),
        Err(why) => {
            pyrite_tests::skipped(why);
            None
        }
    }
}

/// Noise, and its checksum.
fn noise() -> (Vec<u8>, String) {
    let mut x = 0x1234_5678_9abc_def1_u64;
    let data: Vec<u8> = (0..TRANSFER_BYTES)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 56) as u8
        })
        .collect();
    let sum = md5(&data);
    (data, sum)
}

fn md5(data: &[u8]) -> String {
    let mut sum = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("md5sum");
    sum.stdin
        .take()
        .expect("pipe")
        .write_all(data)
        .expect("data");
    let out = sum.wait_with_output().expect("md5sum");
    String::from_utf8_lossy(&out.stdout[..32]).into_owned()
}

/// A server for one connection: sends `data` and returns what it received.
fn serve(data: Vec<u8>) -> (u16, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("address").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("connection");
        let mut sender = stream.try_clone().expect("socket");
        let sending = std::thread::spawn(move || {
            let sent = sender.write_all(&data);
            // The guest's end goes away with ours, whatever it has still to send.
            if !data.is_empty() {
                let _ = sender.shutdown(std::net::Shutdown::Write);
            }
            sent
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("data");
        sending.join().expect("sender").expect("all sent");
        received
    });
    (port, server)
}

/// What every card must do on the user network.
fn network_works(vm: &mut Vm) {
    let address = vm.ask("ip -4 -o addr show dev eth0 | awk '{ print $4 }'");
    assert_eq!(address, "10.0.2.15/24");
    let pings = vm.ask("ping -c 5 -i 0.2 -s 1400 10.0.2.2");
    assert!(pings.contains("5 packets received"), "{pings}");
    let (data, sum) = noise();
    // To the guest.
    let (port, server) = serve(data.clone());
    let got = vm.ask(&format!(
        "nc 10.0.2.2 {port} </dev/null | tee /tmp/x | md5sum"
    ));
    assert_eq!(got.get(..32), Some(sum.as_str()), "{got}");
    server.join().expect("server");
    // From the guest.
    let (port, server) = serve(Vec::new());
    vm.ask(&format!("nc 10.0.2.2 {port} </tmp/x"));
    assert_eq!(md5(&server.join().expect("server")), sum);
    // The interface itself has lost nothing.
    for counter in ["rx_errors", "tx_errors", "rx_crc_errors", "tx_dropped"] {
        let file = format!("cat /sys/class/net/eth0/statistics/{counter}");
        assert_eq!(vm.ask(&file), "0", "{counter}");
    }
}

/// The cable is pulled and plugged in again.
fn cable_works(vm: &mut Vm, carrier: bool) {
    let wait = |vm: &mut Vm, state: &str| {
        let loops = "i=0; while [ $i -lt 100 ]; do i=$((i+1))";
        let test = format!("[ $(cat /sys/class/net/eth0/carrier) = {state} ] && break");
        vm.ask(&format!(
            "{loops}; {test}; usleep 100000; done; cat /sys/class/net/eth0/carrier"
        ))
    };
    vm.done(&["link", "0", "down"]);
    if carrier {
        assert_eq!(wait(vm, "0"), "0");
    }
    let lost = vm.ask("ping -c 1 -W 1 10.0.2.2");
    assert!(
        lost.contains("0 packets received") || lost.contains("unreachable"),
        "{lost}"
    );
    vm.done(&["link", "0", "up"]);
    if carrier {
        assert_eq!(wait(vm, "1"), "1");
    }
    let back = vm.ask("ping -c 1 -W 10 10.0.2.2");
    assert!(back.contains("1 packets received"), "{back}");
    let (code, text) = vm.control(&["link", "7", "up"]);
    assert!(code != 0 && text.contains("no network card 7"), "{text}");
}

/// Saved while packets fly, the guest goes on in another process and still has its network.
fn snapshot_under_load(mut vm: Vm, dir: &Scratch, options: &[String]) {
    vm.session
        .send("ping -i 0.05 10.0.2.2 | sed -n 's/.*seq=\\([0-9]*\\) .*/S=\\1./p' &\n");
    vm.session.expect("S=20.", STEP);
    let snapshot = dir.0.join("snapshot").display().to_string();
    vm.done(&["pause"]);
    vm.done(&["snapshot", &snapshot]);
    let before = vm.session.all().to_owned();
    vm.stop();
    let mut options = options.to_vec();
    options.extend(["--restore".into(), snapshot]);
    let mut vm = Vm::start(dir, "second", &options);
    let count = vm.session.expect_number("S=", STEP);
    vm.session.expect(&format!("S={}.", count + 20), STEP);
    for text in [before.as_str(), vm.session.all()] {
        for bad in ["Oops", "BUG:", "NETDEV WATCHDOG", "Tx Unit Hang"] {
            assert!(!text.contains(bad), "{bad}:\n{text}");
        }
    }
    vm.stop();
}

/// The whole course with a card of this model and driver.
fn card(model: &str, driver: &str, carrier: bool) {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new(&format!("nic-{model}"));
    let options = with(&[
        ("--net", format!("user,model={model},mac=52:54:00:00:00:77")),
        ("--memory", "256M".into()),
    ]);
    let mut all = options.clone();
    all.push("--host-loopback".into());
    let mut vm = Vm::boot(&dir, &guest, &all);
    let found = vm.ask("basename $(readlink /sys/class/net/eth0/device/driver)");
    assert_eq!(found, driver);
    let mac = vm.ask("cat /sys/class/net/eth0/address");
    assert_eq!(mac, "52:54:00:00:00:77");
    network_works(&mut vm);
    cable_works(&mut vm, carrier);
    snapshot_under_load(vm, &dir, &options);
}

#[test]
fn virtio() {
    card("virtio", "virtio_net", true);
}

#[test]
fn e1000() {
    card("e1000", "e1000", true);
}

/// True if cards that are known not to work yet are to be tried: `PYRITE_NICS=all`.
fn unfinished() -> bool {
    let asked = std::env::var("PYRITE_NICS").is_ok_and(|v| v == "all");
    if !asked {
        pyrite_tests::skipped("this card is not finished; PYRITE_NICS is not \"all\"");
    }
    asked
}

/// Known defect: a download stops when the ring has been full.
#[test]
fn ne2k_pci() {
    // The chip does not tell its driver of the cable.
    if unfinished() {
        card("ne2k_pci", "ne2k-pci", false);
    }
}

#[test]
fn rtl8139_plus() {
    card("rtl8139", "8139cp", true);
}

/// Known defect: the driver does not notice that the cable is pulled.
#[test]
fn rtl8139_plain() {
    if unfinished() {
        card("rtl8139c", "8139too", true);
    }
}

/// The guest waits for a connection and sends or takes what is there.
fn offer(vm: &mut Vm, port: u16, file: &str) {
    vm.session
        .send(&format!("nc -l -p {port} {file}; echo o''ffered\n"));
}

fn offered(vm: &mut Vm) {
    vm.session.expect("offered\r\n", STEP);
    vm.session.expect("root@pyrite:~# ", STEP);
}

const ADDRESS: &str = "ip addr flush dev eth0; ip addr add";

#[test]
fn two_machines_over_a_switch() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("nic-switch");
    let socket = dir.0.join("switch");
    let mut start = Command::new(pyrite());
    start.arg("switch").arg(&socket).stderr(Stdio::null());
    let mut switch = Child(start.spawn().expect("pyrite starts"));
    while !socket.exists() {
        assert!(switch.0.try_wait().expect("switch").is_none(), "no switch");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let options = |model: &str, mac: u8| {
        let net = format!(
            "switch,path={},model={model},mac=52:54:00:00:00:{mac:02x}",
            socket.display()
        );
        with(&[("--net", net), ("--memory", "256M".into())])
    };
    let (mut a, mut b) = std::thread::scope(|s| {
        let boot = |name: &'static str, o: Vec<String>| {
            let (dir, guest) = (&dir, &guest);
            s.spawn(move || Vm::boot_as(dir, name, guest, &o))
        };
        let (a, b) = (
            boot("a", options("virtio", 1)),
            boot("b", options("e1000", 2)),
        );
        (a.join().expect("boots"), b.join().expect("boots"))
    });
    a.ask(&format!("{ADDRESS} 10.1.0.1/24 dev eth0"));
    b.ask(&format!("{ADDRESS} 10.1.0.2/24 dev eth0"));
    let pings = a.ask("ping -c 3 -i 0.2 -s 1400 10.1.0.2");
    assert!(pings.contains("3 packets received"), "{pings}");
    // Segments of the one are cut for the other, and the other way round.
    let transfer = |from: &mut Vm, to: &mut Vm, address: &str| {
        from.ask("dd if=/dev/urandom of=/tmp/x bs=1M count=10 2>/dev/null");
        let sum = from.ask("md5sum </tmp/x");
        offer(to, 5000, ">/tmp/y");
        from.ask(&format!(
            "until nc {address} 5000 </tmp/x; do usleep 200000; done"
        ));
        offered(to);
        assert_eq!(to.ask("md5sum </tmp/y"), sum);
    };
    transfer(&mut a, &mut b, "10.1.0.2");
    transfer(&mut b, &mut a, "10.1.0.1");
    // Nothing of the host is there.
    let host = a.ask("ping -c 1 -W 1 10.1.0.254 | grep -c 'bytes from'");
    assert_eq!(host, "0");
    // The other survives the end of the one, and the switch that of its own.
    b.stop();
    assert_eq!(a.ask("cat /sys/class/net/eth0/carrier"), "1");
    let _ = switch.0.kill();
    let _ = switch.0.wait();
    let mut switch = Child(start.spawn().expect("pyrite starts"));
    let mut b = Vm::boot_as(&dir, "b2", &guest, &options("rtl8139", 3));
    b.ask(&format!("{ADDRESS} 10.1.0.3/24 dev eth0"));
    let pings = b.ask("ping -c 3 -i 0.2 10.1.0.1");
    assert!(pings.contains("3 packets received"), "{pings}");
    assert!(switch.0.try_wait().expect("switch").is_none());
    a.stop();
    b.stop();
}

/// A program that ends with the test.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A TAP interface in a network namespace of the test's own, with the VM in it.
#[test]
fn tap_in_a_namespace() {
    let Some(guest) = guest() else { return };
    let set_up = "ip tuntap add tap7 mode tap && ip addr add 10.9.0.1/24 dev tap7 && \
                  ip link set tap7 up";
    let unshare = ["--user", "--map-root-user", "--net", "bash", "-c"];
    let can = Command::new("unshare").args(unshare).arg(set_up).output();
    match can {
        Ok(o) if o.status.success() => {}
        Ok(o) => {
            let why = String::from_utf8_lossy(&o.stderr).into_owned();
            pyrite_tests::skipped(format_args!("no TAP interface in a namespace: {why}"));
            return;
        }
        Err(e) => {
            pyrite_tests::skipped(format_args!("unshare: {e}"));
            return;
        }
    }
    let dir = Scratch::new("nic-tap");
    let (data, sum) = noise();
    let sent = dir.file("sent", &data);
    let received = dir.0.join("received");
    // The other end: tries until the guest listens.
    let other_end = format!(
        "(until cat {} >/dev/tcp/10.9.0.2/5000; do sleep 0.3; done; \
          until cat </dev/tcp/10.9.0.2/5001 >{}; do sleep 0.3; done) 2>/dev/null &",
        sent.display(),
        received.display()
    );
    let mut command = Command::new("unshare");
    command.args(unshare).arg(format!(
        "{set_up}; {other_end} exec {} run --engine soft --timeout 8m --memory 256M \
         --net tap,ifname=tap7 --append 'console=ttyS0 quiet' --kernel {} --initrd {}",
        pyrite().display(),
        guest.kernel.display(),
        guest.initrd.display()
    ));
    let mut vm = Vm::talk(Session::start(&mut command));
    vm.ask(&format!("{ADDRESS} 10.9.0.2/24 dev eth0"));
    let pings = vm.ask("ping -c 3 -i 0.2 -s 4000 10.9.0.1");
    assert!(pings.contains("3 packets received"), "{pings}");
    offer(&mut vm, 5000, ">/tmp/y");
    offered(&mut vm);
    assert_eq!(vm.ask("md5sum </tmp/y").get(..32), Some(sum.as_str()));
    offer(&mut vm, 5001, "</tmp/y");
    offered(&mut vm);
    let arrived = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        std::fs::read(&received).is_ok_and(|d| d.len() == data.len())
    });
    assert!(arrived);
    assert!(std::fs::read(&received).expect("file") == data);
}

/// Frames of a capture as a reader of the format sees them; `None` if there is no such program.
fn read_capture(file: &Path, filter: &str) -> Option<Vec<String>> {
    let out = Command::new("tcpdump")
        .args(["-n", "-e", "-r"])
        .arg(file)
        .arg(filter)
        .output()
        .ok()?;
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
    let text = String::from_utf8_lossy(&out.stdout);
    Some(text.lines().map(str::to_owned).collect())
}

#[test]
fn cables_capture_delay_and_limit() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("nic-cable");
    let capture = dir.0.join("net0.pcapng");
    let options = with(&[
        (
            "--net",
            format!("user,pcap={},delay=30ms,rate=500K", capture.display()),
        ),
        ("--net", "open,model=e1000".into()),
        ("--memory", "256M".into()),
    ]);
    let mut all = options.clone();
    all.push("--host-loopback".into());
    let mut vm = Vm::boot(&dir, &guest, &all);
    assert_eq!(vm.ask("ls /sys/class/net | tr '\\n' ' '"), "eth0 eth1 lo");
    let macs = vm.ask("cat /sys/class/net/eth[01]/address");
    assert_eq!(macs, "52:54:00:12:34:56\n52:54:00:12:34:57");
    let pings = vm.ask("ping -c 3 -i 0.2 10.0.2.2 | sed -n 's/.*time=\\([0-9]*\\).*/\\1/p'");
    for ms in pings.lines() {
        let ms: u64 = ms.trim().parse().expect("milliseconds");
        assert!(ms >= 60, "{pings}: 30 ms each way");
    }
    assert_eq!(pings.lines().count(), 3);
    // 1 MiB at 500 KiB/s, 50 KiB of them at once.
    let (port, server) = serve(vec![7; 1 << 20]);
    let began = std::time::Instant::now();
    let got = vm.ask(&format!("nc 10.0.2.2 {port} </dev/null | wc -c"));
    assert_eq!(got, "1048576");
    let took = began.elapsed().as_secs_f64();
    assert!(took > 1.8, "{took} s");
    server.join().expect("server");
    vm.stop();
    let Some(frames) = read_capture(&capture, "icmp") else {
        pyrite_tests::skipped("no tcpdump to read the capture");
        return;
    };
    assert_eq!(frames.len(), 6, "{frames:?}");
    assert!(frames[0].contains("echo request") && frames[1].contains("echo reply"));
    let dhcp = read_capture(&capture, "udp port 67").unwrap_or_default();
    assert!(dhcp.len() >= 4, "{dhcp:?}");
    // What the network card left to others is filled in: a reader finds no bad checksums.
    let out = Command::new("tcpdump")
        .args(["-n", "-vv", "-r"])
        .arg(&capture)
        .output()
        .expect("tcpdump");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        text.contains("Flags [S]") && !text.contains("incorrect"),
        "bad checksum"
    );
}
