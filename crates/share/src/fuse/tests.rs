use std::sync::Arc;

use super::{MAJOR, MINOR, ROOT, Server, op};
use crate::FileServer;
use crate::folder::Folder;
use crate::testing::{Ground, Noise, names};
use crate::wire::{Put, Reader};

const ROOM: usize = 8192;

/// A guest's kernel that has begun a session.
struct Client(Server);

fn words(all: &[u32]) -> Vec<u8> {
    all.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn longs(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn message(op: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut m = Vec::new();
    m.put_u32(40 + body.len() as u32);
    m.put_u32(op);
    m.put_u64(99);
    m.put_u64(node);
    for n in [0, 0, 1, 0] {
        m.put_u32(n);
    }
    m.extend_from_slice(body);
    m
}

fn init() -> Vec<u8> {
    let flags = [MAJOR, MINOR + 7, 1 << 17, u32::MAX];
    message(op::INIT, 0, &[words(&flags), vec![0; 48]].concat())
}

impl Client {
    fn new(folder: &Arc<Folder>) -> Client {
        let mut c = Client(Server::new(Arc::clone(folder)));
        let reply = c.send(&init()).unwrap();
        assert_eq!(reply.len(), 64);
        assert_eq!(reply[..8], words(&[7, 31]));
        c
    }

    fn send(&mut self, m: &[u8]) -> Result<Vec<u8>, i32> {
        let mut reply = Vec::new();
        self.0.handle(m, ROOM, &mut reply);
        let mut r = Reader(&reply);
        assert_eq!(r.u32().unwrap() as usize, reply.len());
        let error = r.u32().unwrap() as i32;
        assert_eq!(r.u64().unwrap(), 99);
        if error == 0 {
            Ok(r.0.to_vec())
        } else {
            Err(-error)
        }
    }

    fn ask(&mut self, op: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(&message(op, node, body))
    }

    fn lookup(&mut self, dir: u64, name: &str) -> Result<u64, i32> {
        let name = [name.as_bytes(), b"\0"].concat();
        let r = self.ask(op::LOOKUP, dir, &name)?;
        assert_eq!(r.len(), 128);
        Ok(Reader(&r).u64().unwrap())
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let r = self.ask(op::OPEN, node, &words(&[flags as u32, 0]))?;
        Ok(Reader(&r).u64().unwrap())
    }

    /// Node and handle of a new file.
    fn create(&mut self, dir: u64, name: &str, flags: i32) -> Result<(u64, u64), i32> {
        let head = words(&[flags as u32, 0o644, 0, 0]);
        let r = self.ask(op::CREATE, dir, &[&head, name.as_bytes(), b"\0"].concat())?;
        assert_eq!(r.len(), 144);
        let at = |n: usize| Reader(&r[n..]).u64().unwrap();
        Ok((at(0), at(128)))
    }

    fn read(&mut self, handle: u64, offset: u64) -> Result<Vec<u8>, i32> {
        let body = [longs(&[handle, offset]), words(&[4096; 6])].concat();
        self.ask(op::READ, ROOT, &body)
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let n = data.len() as u32;
        let head = [longs(&[handle, offset]), words(&[n, 0, 0, 0, 0, 0])].concat();
        let r = self.ask(op::WRITE, ROOT, &[&head, data].concat())?;
        Ok(Reader(&r).u32().unwrap())
    }

    fn forget(&mut self, node: u64, count: u64) {
        let mut reply = Vec::new();
        let m = message(op::FORGET, node, &longs(&[count]));
        self.0.handle(&m, 0, &mut reply);
        assert_eq!(reply, []);
    }

    /// Nodes (0 for none) and names of a directory, `size` bytes at a time.
    fn entries(&mut self, handle: u64, plus: bool, size: u32) -> Vec<(u64, String)> {
        let (mut all, mut offset) = (Vec::new(), 0);
        let op = if plus { op::READDIRPLUS } else { op::READDIR };
        loop {
            let body = [longs(&[handle, offset]), words(&[size, 0, 0, 0, 0, 0])].concat();
            let r = self.ask(op, ROOT, &body).unwrap();
            assert!(r.len() <= size as usize);
            let mut r = Reader(&r);
            if r.0.is_empty() {
                all.sort_by_key(|(_, name): &(u64, String)| name.clone());
                return all;
            }
            while !r.0.is_empty() {
                let node = if plus {
                    let node = r.u64().unwrap();
                    r.bytes(120).unwrap();
                    node
                } else {
                    0
                };
                r.u64().unwrap();
                offset = r.u64().unwrap();
                let (n, _kind) = (r.u32().unwrap() as usize, r.u32().unwrap());
                let name = String::from_utf8(r.bytes(n).unwrap().to_vec()).unwrap();
                r.bytes(n.next_multiple_of(8) - n).unwrap();
                all.push((node, name));
            }
        }
    }
}

fn opendir(c: &mut Client, node: u64) -> u64 {
    let r = c.ask(op::OPENDIR, node, &words(&[0, 0])).unwrap();
    Reader(&r).u64().unwrap()
}

#[test]
fn files_are_made_written_renamed_and_removed() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    let (node, handle) = c.create(ROOT, "new", libc::O_RDWR).unwrap();
    assert_eq!(c.write(handle, 2, b"abc"), Ok(3));
    assert_eq!(c.read(handle, 0).unwrap(), b"\0\0abc");
    assert_eq!(c.lookup(ROOT, "new"), Ok(node), "one number for one object");
    let dir = c.lookup(ROOT, "dir").unwrap();
    let rename = [&longs(&[dir])[..], b"new\0moved\0"].concat();
    c.ask(op::RENAME, ROOT, &rename).unwrap();
    assert_eq!(c.lookup(dir, "moved"), Ok(node));
    // RENAME_NOREPLACE.
    let again = [&longs(&[dir, 1])[..], b"file\0moved\0"].concat();
    assert_eq!(c.ask(op::RENAME2, ROOT, &again), Err(libc::EEXIST));
    let link = [&longs(&[node])[..], b"second\0"].concat();
    let r = c.ask(op::LINK, ROOT, &link).unwrap();
    assert_eq!(Reader(&r).u64(), Ok(node));
    c.ask(op::UNLINK, dir, b"moved\0").unwrap();
    c.ask(op::UNLINK, ROOT, b"second\0").unwrap();
    assert_eq!(c.write(handle, 5, b"!"), Ok(1));
    assert_eq!(c.read(handle, 0).unwrap(), b"\0\0abc!");
    c.ask(
        op::MKDIR,
        ROOT,
        &[&words(&[0o755, 0])[..], b"made\0"].concat(),
    )
    .unwrap();
    c.ask(op::RMDIR, ROOT, b"made\0").unwrap();
    let seek = [longs(&[handle, 0]), words(&[libc::SEEK_HOLE as u32, 0])].concat();
    assert_eq!(c.ask(op::LSEEK, node, &seek).unwrap(), longs(&[6]));
    let allocate = [longs(&[handle, 0, 4096]), words(&[0, 0])].concat();
    c.ask(op::FALLOCATE, node, &allocate).unwrap();
    let attr = c.ask(op::GETATTR, node, &[0; 16]).unwrap();
    assert_eq!((attr.len(), &attr[24..32]), (104, &longs(&[4096])[..]));
    c.ask(op::RELEASE, node, &[longs(&[handle]), vec![0; 16]].concat())
        .unwrap();
    assert_eq!(c.read(handle, 0), Err(libc::EBADF));
    assert_eq!(c.ask(op::STATFS, ROOT, &[]).unwrap().len(), 80);
    assert_eq!(c.ask(34, ROOT, &[0; 8]), Err(libc::ENOSYS));
    assert_eq!(names(&ground.path("")), ["absolute", "dir", "file"]);
}

#[test]
fn no_name_leads_out_of_the_folder() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    for name in ["", ".", "..", "../secret", "absolute/file", "/etc"] {
        assert_eq!(c.lookup(ROOT, name), Err(libc::EINVAL), "{name:?}");
        let made = c.create(ROOT, name, libc::O_RDWR);
        assert_eq!(made, Err(libc::EINVAL), "{name:?}");
    }
    let link = c.lookup(ROOT, "absolute").unwrap();
    let target = c.ask(op::READLINK, link, &[]).unwrap();
    assert_eq!(
        target,
        ground.0.join("secret").as_os_str().as_encoded_bytes()
    );
    assert_eq!(c.open(link, libc::O_RDONLY), Err(libc::ELOOP));
    assert!(c.lookup(link, "file").is_err());
    let found = c.create(ROOT, "absolute", libc::O_RDWR);
    assert_eq!(found, Err(libc::ELOOP));
    let pipe = [&words(&[libc::S_IFIFO | 0o666, 0, 0, 0])[..], b"pipe\0"].concat();
    let r = c.ask(op::MKNOD, ROOT, &pipe).unwrap();
    let pipe = Reader(&r).u64().unwrap();
    assert_eq!(c.open(pipe, libc::O_RDONLY), Err(libc::ENXIO));
    ground.check();
}

#[test]
fn directories_are_read_with_and_without_their_nodes() {
    let ground = Ground::new();
    for n in 0..100 {
        std::fs::write(ground.path(&format!("dir/{n:03}")), "").unwrap();
    }
    let folder = ground.folder();
    let mut c = Client::new(&folder);
    let dir = c.lookup(ROOT, "dir").unwrap();
    let handle = opendir(&mut c, dir);
    let plain = c.entries(handle, false, 400);
    let plus = c.entries(handle, true, 4096);
    assert_eq!(plain.len(), 103);
    let bare = |all: &[(u64, String)]| all.iter().map(|(_, n)| n.clone()).collect::<Vec<_>>();
    assert_eq!(bare(&plain), bare(&plus));
    assert!(plus[..2].iter().all(|(node, _)| *node == 0), "dots");
    // Told of once by the listing, and once more by each of these.
    for (node, name) in &plus[2..] {
        assert_eq!(c.lookup(dir, name), Ok(*node));
    }
    let held = folder.descriptors();
    for (node, _) in &plus[2..] {
        c.forget(*node, 1);
    }
    assert_eq!(folder.descriptors(), held);
    for (node, _) in &plus[2..] {
        c.forget(*node, 1);
    }
    assert_eq!(folder.descriptors(), held - 101);
    assert_eq!(c.ask(op::GETATTR, plus[3].0, &[0; 16]), Err(libc::ESTALE));
    c.forget(ROOT, 10);
    assert_eq!(c.lookup(ROOT, "dir"), Ok(dir));
}

#[test]
fn a_folder_that_is_read_only_stays_as_it_is() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.read_only());
    let file = c.lookup(ROOT, "file").unwrap();
    let rofs = Err(libc::EROFS);
    assert_eq!(c.open(file, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(c.open(file, libc::O_TRUNC), Err(libc::EROFS));
    assert_eq!(c.create(ROOT, "new", 0), Err(libc::EROFS));
    assert_eq!(c.ask(op::UNLINK, ROOT, b"file\0"), rofs);
    assert_eq!(c.ask(op::SETATTR, file, &[0; 88]), rofs);
    let set = [&words(&[1, 0])[..], b"user.a\0x"].concat();
    assert_eq!(c.ask(op::SETXATTR, file, &set), rofs);
    assert_eq!(c.ask(op::REMOVEXATTR, file, b"user.a\0"), rofs);
    let handle = c.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(handle, 0).unwrap(), b"hello");
    let allocate = [longs(&[handle, 0, 4096]), words(&[0, 0])].concat();
    assert_eq!(c.ask(op::FALLOCATE, file, &allocate), Err(libc::EBADF));
}

#[test]
fn a_session_begins_with_versions_that_fit() {
    let ground = Ground::new();
    let mut c = Client(Server::new(ground.folder()));
    assert_eq!(c.lookup(ROOT, "file"), Err(libc::EIO), "before INIT");
    let newer = c.ask(op::INIT, 0, &words(&[8, 0, 0, 0])).unwrap();
    assert_eq!(newer[..8], words(&[7, 31]));
    let older = c.ask(op::INIT, 0, &words(&[7, 8, 0, 0]));
    assert_eq!(older, Err(libc::EPROTO));
    assert_eq!(c.lookup(ROOT, "file"), Err(libc::EIO));
}

#[test]
fn a_session_goes_on_in_another_process() {
    let ground = Ground::new();
    let mut c = Client::new(&ground.folder());
    let (node, handle) = c.create(ROOT, "new", libc::O_RDWR).unwrap();
    c.write(handle, 0, b"kept").unwrap();
    let (gone, gone_handle) = c.create(ROOT, "gone", libc::O_RDWR).unwrap();
    c.ask(op::UNLINK, ROOT, b"gone\0").unwrap();
    let rename = [&longs(&[ROOT])[..], b"new\0moved\0"].concat();
    c.ask(op::RENAME, ROOT, &rename).unwrap();
    let dir = opendir(&mut c, ROOT);
    let mut d = Client(Server::new(ground.folder()));
    d.0.restore(&c.0.save()).unwrap();
    assert_eq!(d.read(handle, 0).unwrap(), b"kept");
    assert_eq!(d.lookup(ROOT, "moved"), Ok(node));
    assert_eq!(d.read(gone_handle, 0), Err(libc::ESTALE));
    assert_eq!(d.ask(op::GETATTR, gone, &[0; 16]), Err(libc::ESTALE));
    assert_eq!(d.entries(dir, false, 4096).len(), 6);
    let (_, next) = d.create(ROOT, "next", libc::O_RDWR).unwrap();
    assert!(next > dir);
    let saved = c.0.save();
    let mut noise = Noise::new(7);
    for _ in 0..2000 {
        let mut bad = saved.clone();
        noise.spoil(&mut bad);
        let _ = d.0.restore(&bad);
    }
    ground.check();
}

#[test]
fn hostile_messages_neither_panic_nor_escape() {
    let text = |op, body: &[u8], name: &[u8]| message(op, ROOT, &[body, name].concat());
    let mut examples = vec![
        init(),
        text(op::LOOKUP, &[], b"file\0"),
        text(op::LOOKUP, &[], b"dir\0"),
        text(op::LOOKUP, &[], b"absolute\0"),
        text(op::SYMLINK, &[], b"link\0../../secret\0"),
        text(op::MKNOD, &words(&[0o010600, 0, 0, 0]), b"pipe\0"),
        text(op::MKDIR, &words(&[0o700, 0]), b"made\0"),
        text(op::UNLINK, &[], b"file\0"),
        text(op::RMDIR, &[], b"made\0"),
        text(op::RENAME, &longs(&[2]), b"file\0moved\0"),
        text(op::RENAME2, &longs(&[2, 2]), b"file\0dir\0"),
        text(op::LINK, &longs(&[2]), b"hard\0"),
        text(op::CREATE, &words(&[2, 0o644, 0, 0]), b"new\0"),
        message(op::OPENDIR, ROOT, &words(&[0, 0])),
        message(op::STATFS, ROOT, &[]),
        message(op::DESTROY, 0, &[]),
        message(op::BATCH_FORGET, 0, &longs(&[2, 2, 1, 3, 1])),
    ];
    for node in 1..6 {
        let io = [longs(&[node, 0]), words(&[8, 0, 0, 0, 0, 0])].concat();
        examples.extend([
            message(op::OPEN, node, &words(&[2, 0])),
            message(op::READ, node, &io),
            message(op::WRITE, node, &[io.clone(), vec![7; 8]].concat()),
            message(op::READDIR, node, &longs(&[node, 0, 4096, 0, 0])),
            message(op::READDIRPLUS, node, &longs(&[node, 0, 4096, 0, 0])),
            message(op::GETATTR, node, &[0; 16]),
            message(
                op::SETATTR,
                node,
                &[words(&[0x1ff, 0]), vec![0; 80]].concat(),
            ),
            message(op::READLINK, node, &[]),
            message(op::FSYNC, node, &longs(&[node, 0])),
            message(
                op::GETXATTR,
                node,
                &[&longs(&[64])[..], b"user.a\0"].concat(),
            ),
            message(
                op::SETXATTR,
                node,
                &[&longs(&[1])[..], b"user.a\0x"].concat(),
            ),
            message(op::LISTXATTR, node, &longs(&[64])),
            message(op::FALLOCATE, node, &longs(&[node, 0, 64, 0])),
            message(op::LSEEK, node, &longs(&[node, 0, 3])),
            message(op::COPY_FILE_RANGE, node, &longs(&[1, 0, 2, node, 0, 9, 0])),
            message(op::FORGET, node, &longs(&[1])),
            message(op::RELEASE, node, &longs(&[node, 0, 0])),
        ]);
    }
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
