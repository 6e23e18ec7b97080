use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;

use super::{MAX_MESSAGE_BYTES, NONE, Server, op};
use crate::FileServer;
use crate::folder::{Folder, FolderConfig, Owner};
use crate::testing::{Ground, Noise, names};
use crate::wire::{Put, Reader};

const ROOT: u32 = 1;
const ROOM: usize = 8192;

/// A client that knows the root as fid 1.
struct Client(Server);

/// A field of a message.
enum F<'a> {
    B(u8),
    H(u16),
    W(u32),
    D(u64),
    S(&'a str),
    Raw(&'a [u8]),
}
use F::{B, D, H, Raw, S, W};

fn message(kind: u8, fields: &[F<'_>]) -> Vec<u8> {
    let mut m = vec![0, 0, 0, 0, kind, 7, 0];
    for f in fields {
        match f {
            B(v) => m.put_u8(*v),
            H(v) => m.put_u16(*v),
            W(v) => m.put_u32(*v),
            D(v) => m.put_u64(*v),
            S(v) => m.put_text(v.as_bytes()),
            Raw(v) => m.extend_from_slice(v),
        }
    }
    let n = m.len() as u32;
    m.set_u32(0, n);
    m
}

impl Client {
    fn new(folder: &Arc<Folder>) -> Client {
        let mut c = Client(Server::new(Arc::clone(folder)));
        let r = c.ask(op::VERSION, &[W(MAX_MESSAGE_BYTES * 2), S("9P2000.L")]);
        assert_eq!(
            r.unwrap()[..6],
            [&MAX_MESSAGE_BYTES.to_le_bytes()[..], &[8, 0]].concat()
        );
        let user = rustix::process::geteuid().as_raw();
        let attach = [W(ROOT), W(NONE), S("root"), S("/"), W(user)];
        assert_eq!(c.ask(op::ATTACH, &attach).unwrap()[0], 0x80);
        c
    }

    /// The body of the reply, or the error.
    fn ask(&mut self, kind: u8, fields: &[F<'_>]) -> Result<Vec<u8>, i32> {
        let mut reply = Vec::new();
        self.0.handle(&message(kind, fields), ROOM, &mut reply);
        let mut r = Reader(&reply);
        assert_eq!(r.u32().unwrap() as usize, reply.len());
        let (answer, tag) = (r.u8().unwrap(), r.u16().unwrap());
        assert_eq!(tag, 7);
        if answer == op::RLERROR {
            return Err(r.u32().unwrap() as i32);
        }
        assert_eq!(answer, kind + 1);
        Ok(r.0.to_vec())
    }

    fn walk(&mut self, new: u32, names: &[&str]) -> Result<usize, i32> {
        let mut fields = vec![W(ROOT), W(new), H(names.len() as u16)];
        fields.extend(names.iter().map(|n| S(n)));
        let reply = self.ask(op::WALK, &fields)?;
        Ok(reply[0].into())
    }

    fn open(&mut self, fid: u32, flags: i32) -> Result<(), i32> {
        self.ask(op::LOPEN, &[W(fid), W(flags as u32)]).map(|_| ())
    }

    fn create(&mut self, fid: u32, name: &str, flags: i32, mode: u32) -> Result<(), i32> {
        self.walk(fid, &[])?;
        let fields = [W(fid), S(name), W(flags as u32), W(mode), W(0)];
        self.ask(op::LCREATE, &fields).map(|_| ())
    }

    fn read(&mut self, fid: u32, offset: u64, len: u32) -> Result<Vec<u8>, i32> {
        let r = self.ask(op::READ, &[W(fid), D(offset), W(len)])?;
        assert_eq!(Reader(&r).u32().unwrap() as usize, r.len() - 4);
        Ok(r[4..].to_vec())
    }

    fn write(&mut self, fid: u32, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let fields = [W(fid), D(offset), W(data.len() as u32), Raw(data)];
        Ok(Reader(&self.ask(op::WRITE, &fields)?).u32().unwrap())
    }

    fn clunk(&mut self, fid: u32) -> Result<(), i32> {
        self.ask(op::CLUNK, &[W(fid)]).map(|_| ())
    }

    /// All names of an open directory, `count` bytes of entries at a time.
    fn names(&mut self, fid: u32, count: u32, mut each: impl FnMut(usize)) -> Vec<String> {
        let (mut all, mut offset) = (Vec::new(), 0);
        loop {
            let r = self
                .ask(op::READDIR, &[W(fid), D(offset), W(count)])
                .unwrap();
            let mut r = Reader(&r[4..]);
            if r.0.is_empty() {
                all.sort();
                return all;
            }
            while !r.0.is_empty() {
                r.bytes(13).unwrap();
                offset = r.u64().unwrap();
                r.u8().unwrap();
                all.push(String::from_utf8(r.text().unwrap().to_vec()).unwrap());
            }
            each(all.len());
        }
    }
}

const RDONLY: i32 = libc::O_RDONLY;
const RDWR: i32 = libc::O_RDWR;

#[test]
fn files_are_made_written_renamed_and_removed() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    c.create(2, "new", RDWR, 0o640).unwrap();
    assert_eq!(c.write(2, 3, b"abc"), Ok(3));
    assert_eq!(c.read(2, 0, 100).unwrap(), b"\0\0\0abc");
    assert_eq!(c.ask(op::FSYNC, &[W(2), W(0)]), Ok(vec![]));
    let mode = |name: &str| std::fs::metadata(ground.path(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode("new"), 0o640);
    // Whatever the umask of this process is.
    c.create(3, "open-to-all", RDWR, 0o666).unwrap();
    assert_eq!(mode("open-to-all"), 0o666);
    c.ask(op::RENAMEAT, &[W(ROOT), S("new"), W(ROOT), S("moved")])
        .unwrap();
    c.walk(4, &["dir"]).unwrap();
    c.ask(op::RENAME, &[W(2), W(4), S("deep")]).unwrap();
    c.ask(op::LINK, &[W(ROOT), W(2), S("second")]).unwrap();
    c.ask(op::MKDIR, &[W(ROOT), S("made"), W(0o2755), W(0)])
        .unwrap();
    assert_eq!(mode("made") & 0o777, 0o755);
    assert_eq!(std::fs::read(ground.path("second")).unwrap(), b"\0\0\0abc");
    // The name goes, the open file stays.
    c.ask(op::UNLINKAT, &[W(4), S("deep"), W(0)]).unwrap();
    c.ask(op::UNLINKAT, &[W(ROOT), S("second"), W(0)]).unwrap();
    assert_eq!(c.write(2, 6, b"def"), Ok(3));
    assert_eq!(c.read(2, 0, 100).unwrap(), b"\0\0\0abcdef");
    let attr = c.ask(op::GETATTR, &[W(2), D(u64::MAX)]).unwrap();
    assert_eq!(attr.len(), 8 + 13 + 12 + 40 + 8 * 10);
    assert_eq!(attr[33..41], [0; 8], "no names");
    assert_eq!(c.ask(op::RENAME, &[W(2), W(4), S("x")]), Err(libc::ESTALE));
    let removal = [W(ROOT), S("made"), W(libc::AT_REMOVEDIR as u32)];
    c.ask(op::UNLINKAT, &removal).unwrap();
    c.walk(5, &["file"]).unwrap();
    c.ask(op::REMOVE, &[W(5)]).unwrap();
    assert_eq!(c.clunk(5), Err(libc::EBADF));
    let left = names(&ground.path(""));
    assert_eq!(left, ["absolute", "dir", "open-to-all"]);
    let size = [W(3), W(8), W(0), W(0), W(0), D(9), D(0), D(0), D(0), D(0)];
    c.ask(op::SETATTR, &size).unwrap();
    let opened = std::fs::metadata(ground.path("open-to-all")).unwrap();
    assert_eq!(opened.len(), 9);
    let time = [
        W(3),
        W(0x1a0),
        W(0),
        W(0),
        W(0),
        D(0),
        D(0),
        D(0),
        D(1000),
        D(5),
    ];
    c.ask(op::SETATTR, &time).unwrap();
    let opened = std::fs::metadata(ground.path("open-to-all")).unwrap();
    assert_eq!((opened.mtime(), opened.mtime_nsec()), (1000, 5));
    let statfs = c.ask(op::STATFS, &[W(ROOT)]).unwrap();
    assert_eq!(statfs.len(), 4 + 4 + 48 + 4);
}

#[test]
fn no_name_leads_out_of_the_folder() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    let root = c.ask(op::GETATTR, &[W(ROOT), D(0)]).unwrap();
    assert_eq!(c.walk(2, &["..", "..", ".."]), Ok(3));
    assert_eq!(c.ask(op::GETATTR, &[W(2), D(0)]).unwrap()[..21], root[..21]);
    assert_eq!(c.walk(3, &["dir", "..", "..", "dir", "way-out"]), Ok(5));
    // A link is read, not followed.
    let target = c.ask(op::READLINK, &[W(3)]).unwrap();
    assert_eq!(target[2..], *b"../../secret");
    assert_eq!(c.open(3, RDONLY), Err(libc::ELOOP));
    assert_eq!(c.walk(4, &["dir", "way-out", "file"]), Ok(2));
    assert_eq!(c.clunk(4), Err(libc::EBADF), "half a walk makes no fid");
    for name in ["", ".", "../secret", "dir/way-out", "/etc", "a\0b", "dir/"] {
        assert_eq!(c.walk(5, &[name]), Err(libc::EINVAL), "{name:?}");
    }
    for name in ["", ".", "..", "../secret/x", "dir/way-out/x", "absolute/x"] {
        let why = Err(libc::EINVAL);
        assert_eq!(c.create(6, name, RDWR, 0o600), why, "{name:?}");
        c.clunk(6).unwrap();
        let fields = [W(ROOT), S(name), W(0o755), W(0)];
        assert_eq!(c.ask(op::MKDIR, &fields).map(|_| ()), why, "{name:?}");
        let fields = [W(ROOT), S("file"), W(ROOT), S(name)];
        assert_eq!(c.ask(op::RENAMEAT, &fields).map(|_| ()), why, "{name:?}");
    }
    // Making a file where a link is does not follow the link either.
    assert_eq!(
        c.create(6, "absolute", libc::O_RDWR | libc::O_TRUNC, 0o600),
        Err(libc::ELOOP)
    );
    let long = "x".repeat(256);
    assert_eq!(c.walk(7, &[&long]), Err(libc::ENAMETOOLONG));
    // A directory that a host program moves out is still that directory; `..` ends there.
    c.walk(8, &["dir"]).unwrap();
    std::fs::rename(ground.path("dir"), ground.0.join("moved")).unwrap();
    let up = [W(8), W(9), H(1), S("..")];
    assert_eq!(c.ask(op::WALK, &up), Err(libc::ESTALE));
    std::fs::rename(ground.0.join("moved"), ground.path("dir")).unwrap();
    ground.check();
}

#[test]
fn what_is_neither_file_nor_directory_is_never_opened() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    let node = |mode: u32| [W(ROOT), S("node"), W(mode | 0o666), W(1), W(3), W(0)];
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(c.ask(op::MKNOD, &node(kind)), Err(libc::EPERM));
    }
    for kind in [libc::S_IFIFO, libc::S_IFSOCK] {
        c.ask(op::MKNOD, &node(kind)).unwrap();
        c.walk(2, &["node"]).unwrap();
        // A pipe without a writer would block here.
        assert_eq!(c.open(2, RDONLY), Err(libc::ENXIO));
        assert_eq!(c.open(2, RDWR | libc::O_TRUNC), Err(libc::ENXIO));
        let found = c.create(3, "node", RDWR, 0o600);
        assert_eq!(found, Err(libc::ENXIO));
        c.clunk(3).unwrap();
        c.ask(op::REMOVE, &[W(2)]).unwrap();
    }
    c.walk(4, &["dir"]).unwrap();
    assert_eq!(c.open(4, RDWR), Err(libc::EISDIR));
}

#[test]
fn what_is_no_folder_of_files_is_not_shared() {
    let ground = Ground::new();
    for (path, word) in [
        (ground.path("file"), "expected a folder"),
        (ground.path("nothing"), "No such file"),
        ("/proc/self".into(), "/proc"),
    ] {
        let config = FolderConfig {
            path,
            ..ground.config()
        };
        let why = Folder::open(&config).unwrap_err();
        assert!(why.contains(word), "{why}");
    }
}

#[test]
fn a_folder_that_is_read_only_stays_as_it_is() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.read_only());
    c.walk(2, &["file"]).unwrap();
    for flags in [
        RDWR,
        libc::O_WRONLY,
        RDONLY | libc::O_TRUNC,
        RDWR | libc::O_APPEND,
    ] {
        assert_eq!(c.open(2, flags), Err(libc::EROFS));
    }
    let file = || S("file");
    let all = [
        message(
            op::LCREATE,
            &[W(ROOT), S("n"), W(RDWR as u32), W(0o600), W(0)],
        ),
        message(
            op::LCREATE,
            &[W(ROOT), file(), W(RDONLY as u32), W(0o600), W(0)],
        ),
        message(op::MKDIR, &[W(ROOT), S("n"), W(0o700), W(0)]),
        message(op::SYMLINK, &[W(ROOT), S("n"), S("t"), W(0)]),
        message(op::MKNOD, &[W(ROOT), S("n"), W(0), W(0), W(0), W(0)]),
        message(op::LINK, &[W(ROOT), W(2), S("n")]),
        message(op::RENAMEAT, &[W(ROOT), file(), W(ROOT), S("n")]),
        message(op::RENAME, &[W(2), W(ROOT), S("n")]),
        message(op::UNLINKAT, &[W(ROOT), file(), W(0)]),
        message(op::XATTRCREATE, &[W(2), S("user.x"), D(1), W(0)]),
        message(
            op::SETATTR,
            &[
                W(2),
                W(1),
                W(0),
                W(0),
                W(0),
                D(0),
                D(0),
                D(0),
                D(0),
                D(0),
                D(0),
            ],
        ),
        // Last: the fid goes.
        message(op::REMOVE, &[W(2)]),
    ];
    for m in all {
        let mut reply = Vec::new();
        c.0.handle(&m, ROOM, &mut reply);
        let expected = [
            &[11, 0, 0, 0, op::RLERROR, 7, 0][..],
            &libc::EROFS.to_le_bytes(),
        ]
        .concat();
        assert_eq!(reply, expected, "{m:?}");
    }
    c.walk(3, &["file"]).unwrap();
    c.open(3, RDONLY).unwrap();
    assert_eq!(c.read(3, 1, 3).unwrap(), b"ell");
    assert_eq!(c.write(3, 0, b"x"), Err(libc::EBADF));
    assert_eq!(names(&ground.path("")), ["absolute", "dir", "file"]);
}

#[test]
fn a_directory_is_read_in_parts_while_it_changes() {
    let ground = Ground::new();
    let expected: Vec<String> = (0..300).map(|n| format!("file-{n:03}")).collect();
    for name in &expected {
        std::fs::write(ground.path("dir").join(name), "").unwrap();
    }
    let mut c = Client::new(&ground.folder());
    c.walk(2, &["dir"]).unwrap();
    c.open(2, RDONLY).unwrap();
    let all = c.names(2, 500, |_| {});
    assert_eq!(all[..2], [".", ".."]);
    assert_eq!(all[2..302], expected);
    assert_eq!(c.names(2, 8000, |_| {}), all);
    // What was there all the time is there once, whatever goes meanwhile.
    let mut gone = 0..300;
    let seen = c.names(2, 500, |_| {
        let n = gone.next().unwrap();
        std::fs::remove_file(ground.path("dir").join(&expected[n])).unwrap();
    });
    let stayed: Vec<_> = expected.iter().skip(gone.start).collect();
    let mut twice = seen.clone();
    twice.dedup();
    assert_eq!(twice, seen);
    assert!(stayed.iter().all(|n| seen.contains(n)));
    // Not even one entry fits: an end would be a lie.
    assert_eq!(c.ask(op::READDIR, &[W(2), D(0), W(20)]), Err(libc::EINVAL));
}

#[test]
fn locks_keep_fids_and_the_host_apart() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    let lock = |fid, kind, start, len| [W(fid), B(kind), W(1), D(start), D(len), W(9), S("guest")];
    for fid in [2, 3] {
        c.walk(fid, &["file"]).unwrap();
        c.open(fid, RDWR).unwrap();
    }
    c.walk(4, &["file"]).unwrap();
    c.open(4, RDONLY).unwrap();
    let (taken, blocked) = (Ok(vec![0]), Ok(vec![1]));
    assert_eq!(c.ask(op::LOCK, &lock(2, 1, 0, 10)), taken);
    assert_eq!(c.ask(op::LOCK, &lock(3, 0, 5, 10)), blocked);
    assert_eq!(c.ask(op::LOCK, &lock(3, 1, 10, 10)), taken);
    let test = [W(4), B(0), D(0), D(0), W(9), S("guest")];
    let first = c.ask(op::GETLOCK, &test).unwrap();
    assert_eq!(first[..10], [1, 0, 0, 0, 0, 0, 0, 0, 0, 10]);
    assert_eq!(c.ask(op::LOCK, &lock(2, 2, 0, 0)), taken);
    // A lock for writing on a fid that only reads, as flock(2) has it.
    assert_eq!(c.ask(op::LOCK, &lock(4, 1, 0, 10)), taken);
    assert_eq!(c.ask(op::LOCK, &lock(2, 0, 0, 1)), blocked);
    c.clunk(4).unwrap();
    assert_eq!(c.ask(op::LOCK, &lock(2, 0, 0, 1)), taken);
    let bad = c.ask(op::LOCK, &lock(2, 1, u64::MAX, 2));
    assert_eq!(bad, Err(libc::EINVAL));
}

#[test]
fn extended_attributes_are_those_of_users() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    let set = |c: &mut Client, name: &str, value: &[u8]| {
        c.walk(2, &["file"])?;
        c.ask(
            op::XATTRCREATE,
            &[W(2), S(name), D(value.len() as u64), W(0)],
        )?;
        c.write(2, 0, value)?;
        c.clunk(2)
    };
    match set(&mut c, "user.colour", b"red") {
        // The file system of the temporary directory may have none.
        Err(libc::EOPNOTSUPP) => return,
        other => assert_eq!(other, Ok(())),
    }
    c.walk(3, &["file"]).unwrap();
    let size = c.ask(op::XATTRWALK, &[W(3), W(4), S("user.colour")]);
    assert_eq!(size.unwrap(), 3_u64.to_le_bytes());
    assert_eq!(c.read(4, 0, 9).unwrap(), b"red");
    c.ask(op::XATTRWALK, &[W(3), W(5), S("")]).unwrap();
    assert_eq!(c.read(5, 0, 99).unwrap(), b"user.colour\0");
    for name in [
        "security.capability",
        "trusted.x",
        "system.posix_acl_access",
    ] {
        assert_eq!(set(&mut c, name, b"x"), Err(libc::EOPNOTSUPP));
    }
    // Less than was announced.
    c.walk(6, &["file"]).unwrap();
    c.ask(op::XATTRCREATE, &[W(6), S("user.x"), D(4), W(0)])
        .unwrap();
    assert_eq!(c.write(6, 0, b"abcde"), Err(libc::EINVAL));
    c.write(6, 0, b"abc").unwrap();
    assert_eq!(c.clunk(6), Err(libc::EINVAL));
    // A fid each, up to a limit.
    let mut made = 0;
    while c
        .ask(op::XATTRWALK, &[W(3), W(100 + made), S("user.colour")])
        .is_ok()
    {
        made += 1;
    }
    assert!((50..64).contains(&made), "{made}");
    c.clunk(100).unwrap();
    c.ask(op::XATTRWALK, &[W(3), W(100), S("user.colour")])
        .unwrap();
}

#[test]
fn a_guest_holds_no_more_descriptors_than_it_may() {
    let ground = Ground::new();
    let folder = ground.folder();
    let mut c = Client::new(&folder);
    let mut fid = 10;
    let why = loop {
        match c.walk(fid, &["file"]) {
            Ok(_) => fid += 1,
            Err(e) => break e,
        }
    };
    assert_eq!((why, folder.descriptors()), (libc::ENFILE, 200));
    assert_eq!(c.open(10, RDONLY), Err(libc::ENFILE));
    c.0.reset();
    assert_eq!(folder.descriptors(), 1);
}

#[test]
fn squashed_files_are_ours_and_never_set_user_id() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    c.create(2, "tool", RDWR, 0o6755).unwrap();
    let chmod = |mode| {
        [
            W(2),
            W(7),
            W(mode),
            W(1234),
            W(1234),
            D(0),
            D(0),
            D(0),
            D(0),
            D(0),
        ]
    };
    c.ask(op::SETATTR, &chmod(0o7711)).unwrap();
    let meta = std::fs::metadata(ground.path("tool")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o1711);
    assert_eq!(meta.uid(), rustix::process::geteuid().as_raw());
}

#[test]
fn passed_through_files_are_the_guests() {
    let ground = Ground::new();
    let config = FolderConfig {
        owner: Owner::Passthrough,
        ..ground.config()
    };
    if !rustix::process::geteuid().is_root() {
        let why = Folder::open(&config).unwrap_err();
        assert!(why.contains("owner=passthrough"), "{why}");
        return;
    }
    let mut c = Client::new(&Arc::new(Folder::open(&config).unwrap()));
    let attach = [W(9), W(NONE), S(""), S(""), W(1234)];
    c.ask(op::ATTACH, &attach).unwrap();
    for (name, kind) in [("n1", op::MKDIR), ("n2", op::SYMLINK), ("n3", op::MKNOD)] {
        let fields = match kind {
            op::SYMLINK => vec![W(9), S(name), S("target"), W(77)],
            op::MKNOD => vec![W(9), S(name), W(0o4711), W(0), W(0), W(77)],
            _ => vec![W(9), S(name), W(0o750), W(77)],
        };
        c.ask(kind, &fields).unwrap();
        let meta = std::fs::symlink_metadata(ground.path(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 77), "{name}");
    }
    let meta = std::fs::metadata(ground.path("n3")).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o4711);
}

#[test]
fn a_session_goes_on_in_another_process() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    c.create(2, "moved", RDWR | libc::O_TRUNC, 0o600).unwrap();
    c.write(2, 0, b"kept").unwrap();
    c.ask(op::RENAMEAT, &[W(ROOT), S("moved"), W(ROOT), S("there")])
        .unwrap();
    c.create(3, "gone", RDWR, 0o600).unwrap();
    c.ask(op::UNLINKAT, &[W(ROOT), S("gone"), W(0)]).unwrap();
    c.walk(4, &["dir"]).unwrap();
    c.open(4, RDONLY).unwrap();
    c.walk(5, &["file"]).unwrap();
    let saved = c.0.save();
    // Another file at the same path is another file.
    std::fs::rename(ground.path("file"), ground.path("old")).unwrap();
    std::fs::write(ground.path("file"), "new").unwrap();
    let mut d = Client(Server::new(ground.folder()));
    d.0.restore(&saved).unwrap();
    assert_eq!(d.read(2, 0, 9).unwrap(), b"kept");
    assert_eq!(d.write(2, 4, b"!"), Ok(1));
    assert_eq!(d.names(4, 500, |_| {}), [".", "..", "way-out"]);
    assert_eq!(d.read(3, 0, 9), Err(libc::EBADF));
    for stale in [3, 5] {
        let attr = d.ask(op::GETATTR, &[W(stale), D(0)]);
        assert_eq!(attr, Err(libc::ESTALE));
    }
    assert_eq!(d.walk(6, &["file"]), Ok(1));
    assert_eq!(std::fs::read(ground.path("there")).unwrap(), b"kept!");
    // Damage is told, or harmless.
    let mut noise = Noise::new(5);
    for _ in 0..2000 {
        let mut bad = saved.clone();
        noise.spoil(&mut bad);
        let _ = d.0.restore(&bad);
    }
    ground.check();
}

/// One valid message of every kind.
fn examples() -> Vec<Vec<u8>> {
    let zeroes = [0; 44];
    let mut all = vec![
        message(op::VERSION, &[W(8192), S("9P2000.L")]),
        message(op::ATTACH, &[W(2), W(NONE), S("u"), S(""), W(0)]),
        message(op::FLUSH, &[H(1)]),
        message(op::STATFS, &[W(ROOT)]),
        message(op::GETATTR, &[W(2), D(0x7ff)]),
        message(op::READLINK, &[W(5)]),
        message(op::LOPEN, &[W(3), W(2)]),
        message(op::LOPEN, &[W(4), W(0)]),
        message(op::READ, &[W(3), D(0), W(4096)]),
        message(op::WRITE, &[W(3), D(0), W(4), Raw(b"data")]),
        message(op::READDIR, &[W(4), D(0), W(4096)]),
        message(op::FSYNC, &[W(3), W(0)]),
        message(op::XATTRWALK, &[W(3), W(6), S("user.a")]),
        message(op::XATTRCREATE, &[W(2), S("user.a"), D(4), W(0)]),
        message(op::LCREATE, &[W(2), S("new"), W(2), W(0o600), W(0)]),
        message(op::SYMLINK, &[W(ROOT), S("link"), S("../.."), W(0)]),
        message(
            op::MKNOD,
            &[W(ROOT), S("node"), W(0o010600), W(0), W(0), W(0)],
        ),
        message(op::MKDIR, &[W(ROOT), S("made"), W(0o700), W(0)]),
        message(op::LINK, &[W(ROOT), W(3), S("hard")]),
        message(op::RENAME, &[W(3), W(4), S("moved")]),
        message(op::RENAMEAT, &[W(ROOT), S("file"), W(4), S("file")]),
        message(op::UNLINKAT, &[W(ROOT), S("hard"), W(0)]),
        message(op::LOCK, &[W(3), B(1), W(0), D(0), D(1), W(1), S("c")]),
        message(op::GETLOCK, &[W(3), B(1), D(0), D(1), W(1), S("c")]),
        message(op::SETATTR, &[W(3), W(0x1ff), W(0o600), Raw(&zeroes)]),
        message(op::CLUNK, &[W(2)]),
        message(op::REMOVE, &[W(3)]),
    ];
    for (fid, names) in [
        (2, &[][..]),
        (3, &["file"]),
        (4, &["dir"]),
        (5, &["absolute"]),
    ] {
        let mut fields = vec![W(ROOT), W(fid), H(names.len() as u16)];
        fields.extend(names.iter().map(|n| S(n)));
        all.push(message(op::WALK, &fields));
        all.push(message(op::WALK, &[W(fid), W(fid), H(1), S("..")]));
    }
    all
}

#[test]
fn hostile_messages_neither_panic_nor_escape() {
    let examples = examples();
    for seed in 0..60 {
        let ground = Ground::new();
        let folder = ground.folder();
        let mut c = Client::new(&folder);
        let mut noise = Noise::new(seed);
        let mut reply = Vec::new();
        for _ in 0..800 {
            let mut m = examples[noise.below(examples.len())].clone();
            if noise.below(3) != 0 {
                noise.spoil(&mut m);
            }
            if noise.below(10) == 0 {
                let n = noise.below(64);
                m = (0..n).map(|_| noise.next() as u8).collect();
            }
            reply.clear();
            let room = [ROOM, noise.below(64), 1 << 20][noise.below(3)];
            c.0.handle(&m, room, &mut reply);
            assert!(reply.len() <= room, "{m:?}");
        }
        assert!(folder.descriptors() <= 200);
        let saved = c.0.save();
        Server::new(ground.folder()).restore(&saved).unwrap();
        c.0.reset();
        assert_eq!(folder.descriptors(), 1);
        ground.check();
    }
}
