//! A Debian 12 user space under systemd: its image, and a guest that is driven over the serial
//! port like a person would.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::{Scratch, Session, pyrite};

const SCRIPT: &str = include_str!("../fixtures/user-space.sh");

/// What tests of a normal length need.
pub const SMALL: &[&str] = &[
    "gcc",
    "libc6-dev",
    "python3",
    "perl",
    "openssl",
    "curl",
    "xz-utils",
];

/// What the long tests need besides.
pub const FULL: &[&str] = &[
    "gcc",
    "libc6-dev",
    "python3",
    "libpython3.11-testsuite",
    "perl",
    "perl-modules-5.36",
    "openssl",
    "curl",
    "netbase",
    "xz-utils",
    "bzip2",
    "make",
    "stress-ng",
    "fio",
    "sysbench",
    "sqlite3",
    "nodejs",
    "openjdk-17-jre-headless",
];

/// An installed system: kernel, initial RAM disk and root file system.
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The system with these packages, built by the first test that asks for it and kept in the
    /// target directory. The error says why there can be none here.
    pub fn get(packages: &[&str], size: &str) -> Result<Image, String> {
        static BUILD: Mutex<()> = Mutex::new(());
        let _one_at_a_time = BUILD.lock().map_err(|e| e.to_string())?;
        let mut key = DefaultHasher::new();
        (SCRIPT, packages, size).hash(&mut key);
        let dir = target_dir().join(format!("user-space/{:016x}", key.finish()));
        if !dir.join("root.ext4").exists() {
            std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
            // Another test program may be at it.
            let lock = std::fs::File::create(dir.join("lock")).map_err(|e| e.to_string())?;
            lock.lock().map_err(|e| e.to_string())?;
            if !dir.join("root.ext4").exists() {
                build(&dir, packages, size)?;
            }
        }
        Ok(Image { dir })
    }

    /// A copy of the root disk to boot from.
    fn disk(&self, scratch: &Scratch) -> PathBuf {
        let copy = scratch.0.join("root.ext4");
        let done = Command::new("cp")
            .arg("--sparse=always")
            .arg(self.dir.join("root.ext4"))
            .arg(&copy)
            .status();
        assert!(done.expect("cp").success(), "no copy of the root disk");
        copy
    }
}

fn target_dir() -> PathBuf {
    pyrite()
        .parent()
        .and_then(Path::parent)
        .expect("target directory")
        .to_path_buf()
}

fn build(dir: &Path, packages: &[&str], size: &str) -> Result<(), String> {
    let script = dir.join("build.sh");
    std::fs::write(&script, SCRIPT).map_err(|e| e.to_string())?;
    let out = Command::new("sh")
        .arg(&script)
        .arg(dir)
        .arg(size)
        .args(packages)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    if out.status.success() {
        return Ok(());
    }
    let log = String::from_utf8_lossy(&out.stderr);
    let tail: Vec<&str> = log.lines().rev().take(5).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    Err(format!("no Debian 12 image: {}", tail.join("; ")))
}

/// A running guest with a root shell on its serial port.
pub struct Guest {
    session: Session,
    commands: u32,
    disk: PathBuf,
    scratch: Scratch,
}

impl Guest {
    /// Boots a copy of `image` to its login prompt and logs in. The programs in
    /// `fixtures/guest` are in its `/root/guest`.
    pub fn boot(image: &Image, name: &str, options: &[&str]) -> Guest {
        let scratch = Scratch::new(name);
        let disk = image.disk(&scratch);
        let programs = scratch.0.join("guest.tar");
        let packed = Command::new("tar")
            .args(["--create", "--file"])
            .arg(&programs)
            .args([
                "--directory",
                concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures"),
                "guest",
            ])
            .status();
        assert!(packed.expect("tar").success());
        let mut command = Command::new(pyrite());
        command
            .args([
                "run",
                "--engine",
                "soft",
                "--console",
                "serial",
                "--host-loopback",
            ])
            .arg("--kernel")
            .arg(image.dir.join("vmlinuz"))
            .arg("--initrd")
            .arg(image.dir.join("initrd"))
            .args(["--append", "root=/dev/vda rw console=ttyS0", "--disk"])
            .arg(&disk)
            .arg("--disk")
            .arg(format!("{},ro", programs.display()))
            .args(options);
        let mut session = Session::start(&mut command);
        session.expect("guest login: ", Duration::from_secs(300));
        session.send("root\n");
        session.expect("Password: ", Duration::from_secs(60));
        session.send("pyrite\n");
        session.expect("root@guest:~# ", Duration::from_secs(60));
        let mut guest = Guest {
            session,
            commands: 0,
            disk,
            scratch,
        };
        // No echo, no prompt: what comes is what commands print.
        guest.run(
            "stty -echo; PS1= PS2=; bind 'set enable-bracketed-paste off'; dmesg -n 1",
            60,
        );
        guest.ok("tar -xf /dev/vdb && cd guest", 60);
        guest
    }

    /// Runs a command of the shell; its exit status and what it printed.
    pub fn run(&mut self, command: &str, seconds: u64) -> (i32, String) {
        self.commands += 1;
        let mark = format!("@END{}=", self.commands);
        // On one line, so that no command takes the next one as its input (apt-get reads it).
        // The mark is not in what is typed, so an echo is not taken for it.
        self.session
            .send(&format!("{command}; echo \"@\"END{}=$?.\n", self.commands));
        let limit = Duration::from_secs(seconds);
        let output = self.session.until(&mark, limit);
        let status = self.session.until(".", limit);
        let output = output.replace('\r', "");
        (status.parse().unwrap_or(-1), output.trim().to_owned())
    }

    /// Runs a command that must succeed; what it printed.
    pub fn ok(&mut self, command: &str, seconds: u64) -> String {
        let began = Instant::now();
        let (status, output) = self.run(command, seconds);
        assert_eq!(status, 0, "{command}\n{output}");
        eprintln!("{:7.1} s  {command}", began.elapsed().as_secs_f64());
        output
    }

    /// Shuts the system down; the VM must end by itself, in good order.
    pub fn power_off(mut self) -> Disk {
        self.session.send("systemctl poweroff\n");
        let (code, seen, errors) = self.session.end(Duration::from_secs(180));
        assert_eq!(code, 0, "{errors}\n{seen}");
        Disk {
            path: self.disk,
            scratch: self.scratch,
        }
    }
}

/// The root disk of a guest that was shut down.
pub struct Disk {
    path: PathBuf,
    scratch: Scratch,
}

impl Disk {
    /// A file of the guest, copied to the host.
    pub fn file(&self, path: &str) -> PathBuf {
        let copy = self.scratch.0.join(path.replace('/', "_"));
        let done = self
            .tool("debugfs")
            .arg("-R")
            .arg(format!("dump -p {path} {}", copy.display()))
            .arg(&self.path)
            .output();
        let done = done.expect("debugfs");
        assert!(copy.exists(), "{}", String::from_utf8_lossy(&done.stderr));
        copy
    }

    /// The file system must be clean and without errors.
    pub fn check(&self) {
        let out = self
            .tool("e2fsck")
            .arg("-fn")
            .arg(&self.path)
            .output()
            .expect("e2fsck");
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stdout)
        );
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command
    }
}

/// A Debian repository with one package, served on the host's loopback.
pub struct Repository {
    /// The port of 127.0.0.1.
    pub port: u16,
    _files: Scratch,
}

impl Repository {
    /// Makes and serves one with the package `pyrite-greeting`, which has a program of that name.
    pub fn serve(name: &str) -> Repository {
        let files = Scratch::new(name);
        let tree = files.0.join("tree");
        std::fs::create_dir_all(tree.join("DEBIAN")).expect("directory");
        std::fs::create_dir_all(tree.join("usr/bin")).expect("directory");
        std::fs::create_dir_all(tree.join("usr/share/pyrite-greeting")).expect("directory");
        let control = "Package: pyrite-greeting\nVersion: 1.2\nArchitecture: all\n\
            Maintainer: Pyrite <nobody@example.org>\nDescription: greets\n";
        std::fs::write(tree.join("DEBIAN/control"), control).expect("control");
        let program = tree.join("usr/bin/pyrite-greeting");
        std::fs::write(&program, "#!/bin/sh\necho greetings from the package\n").expect("program");
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("mode");
        // Some megabytes that do not compress, so that the network has something to do.
        let mut state = 1u64;
        let noise: Vec<u8> = (0..4 << 20)
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        std::fs::write(tree.join("usr/share/pyrite-greeting/noise"), noise).expect("noise");
        let deb = files.0.join("greeting.deb");
        let packed = Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zgzip", "--build"])
            .arg(&tree)
            .arg(&deb)
            .stdout(Stdio::null())
            .status();
        assert!(packed.expect("dpkg-deb").success());
        let sum = Command::new("sha256sum")
            .arg(&deb)
            .output()
            .expect("sha256sum");
        let sum = String::from_utf8_lossy(&sum.stdout)[..64].to_owned();
        let size = std::fs::metadata(&deb).expect("package").len();
        let index = format!("{control}Filename: ./greeting.deb\nSize: {size}\nSHA256: {sum}\n");
        std::fs::write(files.0.join("Packages"), index).expect("index");

        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("address").port();
        let root = files.0.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let root = root.clone();
                std::thread::spawn(move || answer(&root, stream));
            }
        });
        Repository {
            port,
            _files: files,
        }
    }
}

/// Serves GET requests of one connection.
fn answer(root: &Path, stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request).ok()? == 0 {
            return None;
        }
        let mut line = String::new();
        while reader.read_line(&mut line).ok()? > 2 {
            line.clear();
        }
        let path = request.split(' ').nth(1)?.rsplit('/').next()?;
        let (status, body) = match std::fs::read(root.join(path)) {
            Ok(body) => ("200 OK", body),
            Err(_) => ("404 Not Found", Vec::new()),
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .ok()?;
        stream.write_all(&body).ok()?;
    }
}
