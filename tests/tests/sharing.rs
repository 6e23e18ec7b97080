//! What of the host a guest is given: folders through 9p and virtio-fs, byte channels, vsock.
//! Debian's standard kernel is the guest, because the cloud kernel has no 9p.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pyrite_tests::fixtures::{self, Guest, KernelPackage};
use pyrite_tests::packages::Package;
use pyrite_tests::vm::{STEP, Vm, with};
use pyrite_tests::{Scratch, pyrite, skipped};

/// The guest; `None`, with the reason, where it cannot be fetched.
fn guest() -> Option<Guest> {
    let kernel = KernelPackage {
        suite: "bookworm",
        arch: "amd64",
        package: "linux-image-amd64",
    };
    let modules = [
        "9p",
        "9pnet_virtio",
        "virtiofs",
        "vmw_vsock_virtio_transport",
    ];
    fixtures::guest_with(kernel, "-share", &modules)
        .map_err(skipped)
        .ok()
}

/// A folder to share beside something that nobody may reach.
fn folder(dir: &Scratch) -> PathBuf {
    let shared = dir.0.join("shared");
    fs::create_dir_all(shared.join("tree/deep")).expect("directory");
    dir.file("secret", b"secret");
    fs::write(shared.join("hello"), "hello from the host\n").expect("file");
    let mut state = 1_u64;
    for n in 0..40 {
        let bytes: Vec<u8> = (0..n * 5003)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let place = if n % 2 == 0 { "tree" } else { "tree/deep" };
        fs::write(shared.join(place).join(format!("f{n}")), bytes).expect("file");
    }
    symlink("../secret", shared.join("way-out")).expect("link");
    symlink(dir.0.join("secret"), shared.join("absolute")).expect("link");
    shared
}

const SUM: &str = "find . -type f | sort | xargs md5sum | md5sum";

fn sum_here(dir: &Path) -> String {
    let done = Command::new("sh")
        .args(["-c", SUM])
        .current_dir(dir)
        .output();
    String::from_utf8_lossy(&done.expect("md5sum").stdout)
        .trim()
        .to_owned()
}

/// How a program of the folder that [`tools`] fills is run in the guest.
const RUN_TOOL: &str = "/mnt/tools/ld-linux-x86-64.so.2 --library-path /mnt/tools";

/// `flock`, which busybox does not have, and what it needs.
fn tools(dir: &Scratch) -> Result<PathBuf, String> {
    let tools = dir.0.join("tools");
    fs::create_dir_all(&tools).map_err(|e| e.to_string())?;
    let libc = Package::Debian("bookworm", "amd64", "libc6").unpacked()?;
    let util = Package::Debian("bookworm", "amd64", "util-linux").unpacked()?;
    for (from, name) in [
        (libc.join("lib/x86_64-linux-gnu"), "ld-linux-x86-64.so.2"),
        (libc.join("lib/x86_64-linux-gnu"), "libc.so.6"),
        (util.join("usr/bin"), "flock"),
    ] {
        let copied = fs::copy(from.join(name), tools.join(name));
        copied.map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(tools)
}

fn mount(vm: &mut Vm, tag: &str, kind: &str) -> String {
    let options = match kind {
        "9p" => "-o trans=virtio,version=9p2000.L,msize=262144",
        _ => "",
    };
    let at = format!("/mnt/{tag}");
    let command = format!("mkdir -p {at} && mount -t {kind} {options} {tag} {at}");
    assert_eq!(vm.ask(&command), "");
    at
}

/// Everything that a program does with files, on a folder mounted at `at` and, without being told
/// to cache the same things, at `again`.
fn use_folder(vm: &mut Vm, shared: &Path, at: &str, again: &str) {
    let host = |name: &str| fs::read_to_string(shared.join(name)).expect("file");
    assert_eq!(vm.ask(&format!("cat {at}/hello")), "hello from the host");
    // A tree there and back.
    let sum = sum_here(&shared.join("tree"));
    assert_eq!(vm.ask(&format!("cd {at}/tree; {SUM}; cd")), sum);
    assert_eq!(
        vm.ask(&format!("cp -r {at}/tree {at}/copy && echo ok")),
        "ok"
    );
    assert_eq!(sum_here(&shared.join("copy")), sum);
    vm.ask(&format!(
        "echo 3 >/proc/sys/vm/drop_caches; cd {at}/copy; {SUM}; cd"
    ));
    assert_eq!(vm.ask(&format!("cd {at}/copy; {SUM}; cd")), sum);
    assert_eq!(vm.ask(&format!("ls {at}/copy/deep | wc -l")), "20");
    assert_eq!(vm.ask(&format!("rm -r {at}/copy && ls {at} | wc -l")), "4");

    // Written, appended to, renamed, linked; synchronous, with modes and times.
    vm.ask(&format!(
        "cd {at}; umask 027; echo one >a; echo two >>a; mv a b; ln b c; sync; cd"
    ));
    assert_eq!(host("c"), "one\ntwo\n");
    let meta = fs::metadata(shared.join("b")).expect("metadata");
    assert_eq!((meta.mode() & 0o777, meta.nlink()), (0o640, 2));
    vm.ask(&format!(
        "chmod 4751 {at}/b; touch -d '2001-02-03 00:00:00' {at}/b"
    ));
    let meta = fs::metadata(shared.join("b")).expect("metadata");
    assert_eq!((meta.mode() & 0o777, meta.mtime()), (0o751, 981_158_400));
    assert_eq!(vm.ask(&format!("stat -c '%h %s' {at}/c")), "2 8");
    vm.ask(&format!(
        "truncate -s 3 {at}/c; mkfifo {at}/pipe; (echo through >{at}/pipe &)"
    ));
    assert_eq!(host("b"), "one");
    // Within the guest a pipe works; on the host nobody has opened it.
    assert_eq!(vm.ask(&format!("cat {at}/pipe; rm {at}/pipe")), "through");
    // A name that is gone does not take the open file with it.
    let open = format!(
        "exec 5<>{at}/b; rm {at}/b {at}/c; echo more >&5; cat {at}/../$(basename {at})/hello >/dev/null; wc -c </proc/self/fd/5; exec 5>&-"
    );
    assert_eq!(vm.ask(&open), "5");
    // What the host makes is seen, soon.
    fs::write(shared.join("new"), "new").expect("file");
    let wait = format!(
        "for n in 1 2 3 4 5; do cat {at}/new 2>/dev/null && break; sleep 1; done; rm {at}/new"
    );
    assert_eq!(vm.ask(&wait), "new");
    assert!(!shared.join("new").exists());

    // Two mounts, that only the host can keep apart.
    // The holder must not fork: Linux's 9p client gives a lock up when any process closes the file.
    let locks = format!(
        "flock() {{ {RUN_TOOL} /mnt/tools/flock \"$@\"; }}; (flock -F {at}/hello sleep 6 &); \
         for n in 1 2 3 4 5 6 7 8 9; do ps | grep -v flock | grep -q '[s]leep 6' && break; \
         usleep 300000; done; flock -n -F {again}/hello echo both; \
         for n in 1 2 3 4 5 6 7 8 9; do flock -n -F {again}/hello echo after && break; sleep 1; done"
    );
    let held = vm.ask(&locks);
    assert!(held.ends_with("after"), "{held}");
    // virtio-fs leaves locks to the guest.
    assert_eq!(held.contains("both"), !at.contains("nine"), "{held}");
    // Room is that of the host's file system.
    let blocks = vm.ask(&format!("stat -f -c '%b %l' {at}"));
    let (blocks, name) = blocks.split_once(' ').expect("two numbers");
    assert!(blocks.parse::<u64>().is_ok_and(|n| n > 1000) && name == "255");

    // Links are the guest's to follow, in its own tree; `..` ends at the mount.
    assert_eq!(vm.ask(&format!("readlink {at}/way-out")), "../secret");
    vm.ask("echo inner >/mnt/secret");
    assert_eq!(vm.ask(&format!("cat {at}/way-out")), "inner");
    let outside = shared.with_file_name("secret");
    assert_eq!(
        vm.ask(&format!("cat {at}/absolute 2>&1 | grep -c 'No such file'")),
        "1",
        "{} is not in the guest",
        outside.display()
    );
    assert_eq!(
        vm.ask(&format!(
            "ls -d {at}/../secret {at}/../../mnt/secret | wc -l"
        )),
        "2"
    );
    vm.ask(&format!(
        "echo changed >{at}/way-out; rm -f {at}/way-out/x; ln -s /etc {at}/etc; rm {at}/etc"
    ));
    assert_eq!(fs::read(outside).expect("file"), b"secret");
}

#[test]
fn folders_are_shared_by_9p_and_virtiofs() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("sharing");
    let shared = folder(&dir);
    let path = shared.display().to_string();
    let tools = match tools(&dir) {
        Ok(t) => t,
        Err(why) => return skipped(why),
    };
    let options = with(&[
        ("--net", "none".into()),
        ("--memory", "256M".into()),
        ("--share", format!("{},tag=tools,ro", tools.display())),
        ("--share", format!("{path},tag=nine,type=9p,owner=squash")),
        ("--share", format!("{path},tag=nine2,type=9p,owner=squash")),
        ("--share", format!("{path},tag=fs,owner=squash")),
        ("--share", format!("{path},tag=fs2,owner=squash")),
        ("--share", format!("{path},tag=ro9,type=9p,ro")),
        ("--share", format!("{path},tag=rofs,ro")),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    mount(&mut vm, "tools", "virtiofs");
    for (kind, tags) in [
        ("9p", ["nine", "nine2", "ro9"]),
        ("virtiofs", ["fs", "fs2", "rofs"]),
    ] {
        let [at, again, ro] = tags.map(|tag| mount(&mut vm, tag, kind));
        use_folder(&mut vm, &shared, &at, &again);
        // Read-only, whatever the guest's mount says.
        let refused = "grep -c 'Read-only file system'";
        for command in [
            format!("echo x >>{ro}/hello"),
            format!("rm {ro}/hello"),
            format!("mkdir {ro}/new"),
            format!("mv {ro}/hello {ro}/bye"),
            format!("chmod 777 {ro}/hello"),
        ] {
            assert_eq!(
                vm.ask(&format!("({command}) 2>&1 | {refused}")),
                "1",
                "{command}"
            );
        }
        assert_eq!(vm.ask(&format!("cat {ro}/hello")), "hello from the host");
        vm.ask(&format!("umount {at} {again} {ro}"));
    }
    let (code, text) = vm.control(&["inspect", "units/virtio-share1/device"]);
    assert!(code == 0 && text.contains("nine"), "{text}");
    vm.stop();
}

#[test]
fn a_mounted_folder_goes_on_after_a_restore() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("sharing-restore");
    let shared = folder(&dir);
    let path = shared.display().to_string();
    let shares = [
        ("--share", format!("{path},tag=nine,type=9p")),
        ("--share", format!("{path},tag=fs")),
    ];
    let options = [
        &with(&[("--net", "none".into()), ("--memory", "256M".into())])[..],
        &with(&shares),
    ]
    .concat();
    let mut vm = Vm::boot(&dir, &guest, &options);
    for (tag, kind) in [("nine", "9p"), ("fs", "virtiofs")] {
        let at = mount(&mut vm, tag, kind);
        vm.ask(&format!(
            "cd {at}/tree/deep; exec 5<>{at}/{tag}; echo before >&5; cd"
        ));
        // Renamed and removed meanwhile.
        vm.ask(&format!("mv {at}/{tag} {at}/{tag}-moved; echo x >{at}/gone; exec 6<{at}/gone; rm {at}/gone; exec 6<&-"));
        vm.ask(&format!(
            "exec {}<>{at}/{tag}-moved",
            if tag == "fs" { 8 } else { 7 }
        ));
    }
    let snapshot = dir.0.join("snapshot");
    let name = snapshot.display().to_string();
    vm.done(&["snapshot", &name]);
    vm.stop();

    // A file grants nothing: the folders are named again.
    let refused = pyrite_tests::run(&["run", "--restore", &name]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert!(text.contains("--share DIR,tag=nine,type=9p"), "{text}");

    let restore = [("--restore", name)];
    let mut vm = Vm::start(
        &dir,
        "second",
        &[&with(&restore)[..], &with(&shares)].concat(),
    );
    let start = Instant::now();
    while vm.control(&["inspect", "running"]).1.trim() != "yes" {
        assert!(start.elapsed() < STEP, "{}", vm.session.errors());
        std::thread::sleep(Duration::from_millis(20));
    }
    vm.session.send("\n");
    vm.session.expect("# ", STEP);
    vm.session.send("\n");
    vm.session.expect("# ", STEP);
    for (tag, fd) in [("nine", 7), ("fs", 8)] {
        let after = vm.ask(&format!(
            "echo after >&{fd}; cat /mnt/{tag}/hello; ls /mnt/{tag}/tree/deep | wc -l"
        ));
        assert_eq!(after, "hello from the host\n20");
        let text = fs::read_to_string(shared.join(format!("{tag}-moved"))).expect("file");
        // Over the beginning of what was there: "before".
        assert_eq!(text, "after\n\n", "{tag}");
    }
    vm.stop();
}

/// QEMU's guest agent and its libraries, as a folder to share.
fn agent(dir: &Scratch) -> Result<PathBuf, String> {
    let root = dir.0.join("agent");
    fs::create_dir_all(&root).map_err(|e| e.to_string())?;
    let packages = [
        "qemu-guest-agent",
        "libc6",
        "libglib2.0-0",
        "libnuma1",
        "libudev1",
        "liburing2",
        "libpcre2-8-0",
        "libcap2",
    ];
    for name in packages {
        let from = Package::Debian("bookworm", "amd64", name).unpacked()?;
        let copied = Command::new("sh")
            .arg("-c")
            .arg("cp -r --dereference \"$0\"/lib \"$0\"/usr \"$1\" 2>/dev/null; true")
            .args([&from, &root])
            .status();
        copied.map_err(|e| e.to_string())?;
    }
    Ok(root)
}

/// Asks an agent over a connection; the line that it answers.
fn ask_agent(stream: &UnixStream, reader: &mut impl BufRead, request: &str) -> String {
    let mut to = stream;
    to.write_all(format!("{request}\n").as_bytes())
        .expect("request");
    let mut line = String::new();
    reader.read_line(&mut line).expect("answer");
    line.trim().to_owned()
}

#[test]
fn the_guest_agent_answers_through_a_channel_and_through_vsock() {
    let Some(guest) = guest() else { return };
    let dir = Scratch::new("channel");
    let agent = match agent(&dir) {
        Ok(a) => a,
        Err(why) => return skipped(why),
    };
    let channel = dir.0.join("agent.sock");
    let vsock = dir.0.join("vsock");
    let options = with(&[
        ("--net", "none".into()),
        ("--memory", "256M".into()),
        ("--share", format!("{},tag=agent,ro", agent.display())),
        (
            "--channel",
            format!("org.qemu.guest_agent.0,path={}", channel.display()),
        ),
        (
            "--channel",
            format!("org.example.other,path={}", dir.0.join("other").display()),
        ),
        ("--vsock", vsock.display().to_string()),
    ]);
    let mut vm = Vm::boot(&dir, &guest, &options);
    let at = mount(&mut vm, "agent", "virtiofs");
    let port = vm
        .ask("cd /sys/class/virtio-ports; grep -l org.qemu.guest_agent.0 */name | cut -d/ -f1; cd");
    assert_eq!(
        port,
        "vport4p0".replace('4', &port[5..6]),
        "the port has its name"
    );
    let run = format!(
        "{at}/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path {at}/lib/x86_64-linux-gnu:{at}/usr/lib/x86_64-linux-gnu {at}/usr/sbin/qemu-ga -t /tmp"
    );
    vm.ask("mkdir -p /var/run /run");
    vm.ask(&format!(
        "({run} -m virtio-serial -p /dev/{port} >/tmp/log1 2>&1 &)"
    ));
    vm.ask(&format!(
        "({run} -m vsock-listen -p 3:1024 -f /tmp/second.pid >/tmp/log2 2>&1 &); sleep 2"
    ));
    let logs = vm.ask("cat /tmp/log1 /tmp/log2");

    let ping = "{\"execute\":\"guest-ping\"}";
    let limit = Some(Duration::from_secs(60));
    let stream = UnixStream::connect(&channel).expect("channel");
    stream.set_read_timeout(limit).expect("limit");
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    assert_eq!(
        ask_agent(&stream, &mut reader, ping),
        "{\"return\": {}}",
        "{logs}"
    );
    let info = ask_agent(&stream, &mut reader, "{\"execute\":\"guest-info\"}");
    assert!(
        info.contains("guest-shutdown") && info.len() > 3000,
        "{info}"
    );
    // The next client finds the agent as the first one did.
    drop((stream, reader));
    let stream = UnixStream::connect(&channel).expect("channel");
    stream.set_read_timeout(limit).expect("limit");
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    assert_eq!(ask_agent(&stream, &mut reader, ping), "{\"return\": {}}");

    let stream = UnixStream::connect(&vsock).expect("vsock");
    stream.set_read_timeout(limit).expect("limit");
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    let answer = ask_agent(&stream, &mut reader, "CONNECT 1024");
    assert!(answer.starts_with("OK "), "{answer:?} {logs}");
    assert_eq!(ask_agent(&stream, &mut reader, ping), "{\"return\": {}}");
    vm.stop();
    assert!(!channel.exists(), "the socket goes with the VM");
}

#[test]
fn folders_that_cannot_be_shared_are_refused_with_2() {
    let dir = Scratch::new("sharing-refused");
    let file = dir.file("file", b"");
    let kernel = dir.file(
        "kernel",
        &pyrite_tests::guest::pvh(&pyrite_tests::guest::HALT),
    );
    for (share, words) in [
        (file.display().to_string(), "expected a folder"),
        (format!("{}/nothing", dir.0.display()), "No such file"),
        (
            format!("{},tag={}", dir.0.display(), "t".repeat(37)),
            "1 to 36",
        ),
    ] {
        let out = Command::new(pyrite())
            .args([
                "run", "--engine", "soft", "--net", "none", "--share", &share, "--kernel",
            ])
            .arg(&kernel)
            .output()
            .expect("pyrite runs");
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{text}");
        assert!(text.contains("--share") && text.contains(words), "{text}");
    }
}
