//! Requests to a running VM from other processes: the `--control` socket and `pyrite ctl`.
//!
//! The socket speaks the control protocol's [`Request`] and [`Message::Reply`], one JSON text per
//! line, so programs can use it directly. Only the user who started the VM can connect.

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context, Result, bail};
use pyrite_api::control::{self, Command, Message, Outcome, Request, Tree};

use crate::args::{Ask, CtlArgs, DriveName};
use crate::exit;
use crate::net::LinkArg;

/// LIMIT: connections at a time.
const CONNECTIONS: usize = 16;

/// A listening socket whose file goes away with it.
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Listens at `path`. The file of a VM that is gone is replaced, anything else there is not.
    pub fn bind(path: &Path) -> Result<Socket> {
        let lives = |p: &Path| UnixStream::connect(p).is_ok();
        let listener = bind_private(path, lives, |p| UnixListener::bind(p))
            .with_context(|| format!("--control: {}", path.display()))?;
        Ok(Socket {
            path: path.to_owned(),
            listener,
        })
    }

    /// Hands every request to `ask` with the place for its outcome; `ask` says whether anybody
    /// listens still.
    pub fn serve(
        &self,
        ask: impl Fn(Command, SyncSender<Outcome>) -> bool + Send + Sync + 'static,
    ) -> Result<()> {
        let listener = self.listener.try_clone().context("the control socket")?;
        let ask = Arc::new(ask);
        let open = Arc::new(AtomicUsize::new(0));
        std::thread::Builder::new()
            .name("requests".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS {
                        open.fetch_sub(1, Ordering::AcqRel);
                        continue;
                    }
                    let (ask, open) = (Arc::clone(&ask), Arc::clone(&open));
                    let ours = Arc::clone(&open);
                    let started =
                        std::thread::Builder::new()
                            .name("request".into())
                            .spawn(move || {
                                if let Err(e) = answer(stream, &*ask) {
                                    tracing::debug!("control socket: {e}");
                                }
                                open.fetch_sub(1, Ordering::AcqRel);
                            });
                    if started.is_err() {
                        ours.fetch_sub(1, Ordering::AcqRel);
                    }
                }
            })
            .context("cannot start the thread of the control socket")?;
        Ok(())
    }
}

/// Binds a socket at `path` that only its owner can connect to. The file of a listener that is gone
/// (`lives` says no) is replaced, anything else there is not.
pub fn bind_private<T>(
    path: &Path,
    lives: impl Fn(&Path) -> bool,
    bind: impl Fn(&Path) -> std::io::Result<T>,
) -> Result<T> {
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            bail!("is there already and is not a socket");
        }
        if lives(path) {
            bail!("is in use");
        }
        fs::remove_file(path)?;
    }
    // Made where nobody else can reach it, and moved when its permissions are right.
    let dir = path.with_added_extension(format!("{}.tmp", std::process::id()));
    fs::create_dir(&dir)?;
    let made = (|| {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        let inside = dir.join("s");
        let listener = bind(&inside)?;
        fs::set_permissions(&inside, fs::Permissions::from_mode(0o600))?;
        fs::rename(&inside, path)?;
        Ok::<_, std::io::Error>(listener)
    })();
    let _ = fs::remove_dir_all(&dir);
    Ok(made?)
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Answers the requests of one connection in order.
fn answer(
    mut stream: UnixStream,
    ask: &impl Fn(Command, SyncSender<Outcome>) -> bool,
) -> std::io::Result<()> {
    let mut from = BufReader::new(stream.try_clone()?);
    while let Some(request) = control::receive::<Request>(&mut from)? {
        let (to, outcome) = sync_channel(1);
        if !ask(request.command, to) {
            return Ok(());
        }
        // No outcome: the VM has ended, which closing the connection says.
        let Ok(outcome) = outcome.recv() else {
            return Ok(());
        };
        let reply = Message::Reply {
            id: request.id,
            outcome,
        };
        control::send(&mut stream, &reply)?;
    }
    Ok(())
}

/// `pyrite ctl`: asks, and shows the outcome. 0 if it was done.
pub fn run(args: CtlArgs) -> u8 {
    finish(ask(&args.socket, args.ask))
}

/// Shows an outcome. 0 if it was done.
pub fn finish(outcome: Result<Outcome>) -> u8 {
    match outcome {
        Ok(Outcome::Done) => 0,
        Ok(Outcome::Tree(tree)) => {
            // A reader that has seen enough is no error.
            let _ = std::io::stdout().write_all(show(&tree).as_bytes());
            0
        }
        Ok(Outcome::Failed(why)) => {
            eprintln!("pyrite: {why}");
            exit::FAILED
        }
        Err(e) => {
            eprintln!("pyrite: {e:#}");
            exit::BAD_INPUT
        }
    }
}

fn ask(socket: &Path, what: Ask) -> Result<Outcome> {
    let command = match what {
        Ask::Snapshot { dir } => Command::Snapshot {
            // The VM process has a working directory of its own.
            dir: std::path::absolute(&dir).context("the directory of the snapshot")?,
        },
        Ask::Dump { linear, file } => Command::Dump {
            path: std::path::absolute(&file).context("the path of the core")?,
            linear,
        },
        Ask::Inspect { path } => Command::Inspect { path },
        Ask::Balloon { bytes } => Command::Balloon { bytes },
        Ask::Insert {
            drive,
            file,
            force,
            ro,
        } => {
            let path = std::path::absolute(&file).context("the image")?;
            medium(drive, Some(path), force, ro)
        }
        Ask::Eject { drive, force } => medium(drive, None, force, false),
        Ask::Disk { disk, changes } => Command::Disk { disk, changes },
        Ask::Link { card, state } => Command::Link {
            card,
            up: matches!(state, LinkArg::Up),
        },
        Ask::Pause => Command::Pause,
        Ask::Resume => Command::Resume,
        Ask::Reset => Command::Reset,
        Ask::Power => Command::PowerButton,
        Ask::Stop => Command::Stop,
    };
    request(socket, command)
}

fn medium(name: DriveName, path: Option<PathBuf>, force: bool, read_only: bool) -> Command {
    let (floppy, drive) = match name {
        DriveName::Cd(n) => (false, n),
        DriveName::Floppy(n) => (true, n),
    };
    Command::Medium {
        drive,
        floppy,
        read_only,
        path,
        force,
    }
}

/// Asks something of the VM that listens at `socket`.
pub fn request(socket: &Path, command: Command) -> Result<Outcome> {
    let stops = command == Command::Stop;
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no VM listens at {}", socket.display()))?;
    let mut from = BufReader::new(stream.try_clone().context("control socket")?);
    control::send(&mut stream, &Request { id: 1, command }).context("control socket")?;
    match control::receive::<Message>(&mut from).context("control socket")? {
        Some(Message::Reply { outcome, .. }) => Ok(outcome),
        None if stops => Ok(Outcome::Done),
        _ => Ok(Outcome::Failed("the VM ended meanwhile".into())),
    }
}

/// A tree as indented text.
pub fn show(tree: &Tree) -> String {
    let mut out = String::new();
    match tree {
        Tree::Node(children) => lines(children, 0, &mut out),
        leaf => {
            out = value(leaf);
            out.push('\n');
        }
    }
    out
}

fn lines(children: &[(String, Tree)], depth: usize, out: &mut String) {
    for (name, child) in children {
        out.push_str(&"  ".repeat(depth));
        out.push_str(name);
        out.push(':');
        match child {
            Tree::Node(c) => {
                out.push('\n');
                lines(c, depth + 1, out);
            }
            leaf => {
                out.push(' ');
                out.push_str(&value(leaf));
                out.push('\n');
            }
        }
    }
}

fn value(leaf: &Tree) -> String {
    match leaf {
        Tree::Node(_) => String::new(),
        Tree::Uint(n) => n.to_string(),
        Tree::Hex(n) => format!("{n:#x}"),
        Tree::Bool(true) => "yes".into(),
        Tree::Bool(false) => "no".into(),
        // What a guest may have named must not reach a terminal as control characters.
        Tree::Text(t) => t.chars().filter(|c| !c.is_control()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_shown_by_indentation() {
        let tree = Tree::Node(vec![
            ("a".into(), Tree::Uint(5)),
            (
                "b".into(),
                Tree::Node(vec![
                    ("c".into(), Tree::Hex(255)),
                    ("d".into(), Tree::Text("x\x1b[2J".into())),
                ]),
            ),
        ]);
        assert_eq!(show(&tree), "a: 5\nb:\n  c: 0xff\n  d: x[2J\n");
        assert_eq!(show(&Tree::Bool(true)), "yes\n");
    }

    #[test]
    fn socket_answers_and_refuses_foreign_files() {
        let dir = std::env::temp_dir().join(format!("pyrite-ctl-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("sock");
        {
            let socket = Socket::bind(&path).unwrap();
            assert_eq!(
                fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                0o600
            );
            assert!(Socket::bind(&path).is_err());
            socket
                .serve(|command, to| {
                    let outcome = match command {
                        Command::Pause => Outcome::Done,
                        other => Outcome::Failed(format!("{other:?}")),
                    };
                    to.try_send(outcome).is_ok()
                })
                .unwrap();
            assert_eq!(ask(&path, Ask::Pause).unwrap(), Outcome::Done);
            assert_eq!(
                ask(&path, Ask::Resume).unwrap(),
                Outcome::Failed("Resume".into())
            );
        }
        assert!(!path.exists());
        fs::write(&path, "data").unwrap();
        assert!(Socket::bind(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"data");
        fs::remove_dir_all(&dir).unwrap();
    }
}
