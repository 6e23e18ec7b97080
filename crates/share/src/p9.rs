//! A server of 9P2000.L, the dialect of 9P that Linux speaks.
//!
//! There is no standard of it; what messages look like is in the manual pages intro(5) of Plan 9
//! and in the protocol notes of diod (`protocol.md`), cited as diod, and their numbers in Linux's
//! `include/net/9p/9p.h`.
//!
//! A fid is a number of the guest's for an object, which may be open. A message is answered before
//! the next one is looked at, so there is never anything to flush.

use std::collections::BTreeMap;
use std::sync::Arc;

use minicbor::{Decode, Encode};

use crate::folder::{
    Attr, Folder, Handle, Kind, Lock, MAX_XATTR_BYTES, Name, Node, SavedNode, SetAttr, SetTime, Who,
};
use crate::wire::{Put, Reader};
use crate::{Errno, FileServer, RestoreError, Result};

#[cfg(test)]
mod tests;

/// LIMIT: bytes of a message.
pub const MAX_MESSAGE_BYTES: u32 = 1 << 20;
/// Smallest message size that a client may ask for: room for every fixed reply.
const MIN_MESSAGE_BYTES: u32 = 4096;
/// LIMIT: fids of a client.
const MAX_FIDS: usize = 1 << 18;
/// LIMIT: fids that hold an extended attribute, of up to 64 KiB each.
const MAX_XATTR_FIDS: usize = 64;
/// LIMIT: names in one walk. intro(5), MAXWELEM.
const MAX_WALK: u16 = 16;
/// Bytes of size, type and tag.
const HEADER_BYTES: usize = 7;
const VERSION: &[u8] = b"9P2000.L";
/// "No fid", "no user".
const NONE: u32 = u32::MAX;
/// V9FS_MAGIC of Linux: what statfs(2) says the file system is.
const MAGIC: u32 = 0x0102_1997;
const STATX_BASIC: u64 = 0x7ff;

/// Types of requests; the reply's is one more.
mod op {
    pub(super) const RLERROR: u8 = 7;
    pub(super) const STATFS: u8 = 8;
    pub(super) const LOPEN: u8 = 12;
    pub(super) const LCREATE: u8 = 14;
    pub(super) const SYMLINK: u8 = 16;
    pub(super) const MKNOD: u8 = 18;
    pub(super) const RENAME: u8 = 20;
    pub(super) const READLINK: u8 = 22;
    pub(super) const GETATTR: u8 = 24;
    pub(super) const SETATTR: u8 = 26;
    pub(super) const XATTRWALK: u8 = 30;
    pub(super) const XATTRCREATE: u8 = 32;
    pub(super) const READDIR: u8 = 40;
    pub(super) const FSYNC: u8 = 50;
    pub(super) const LOCK: u8 = 52;
    pub(super) const GETLOCK: u8 = 54;
    pub(super) const LINK: u8 = 70;
    pub(super) const MKDIR: u8 = 72;
    pub(super) const RENAMEAT: u8 = 74;
    pub(super) const UNLINKAT: u8 = 76;
    pub(super) const VERSION: u8 = 100;
    pub(super) const ATTACH: u8 = 104;
    pub(super) const FLUSH: u8 = 108;
    pub(super) const WALK: u8 = 110;
    pub(super) const READ: u8 = 116;
    pub(super) const WRITE: u8 = 118;
    pub(super) const CLUNK: u8 = 120;
    pub(super) const REMOVE: u8 = 122;
}

const EBADF: Errno = Errno(libc::EBADF);
const EINVAL: Errno = Errno(libc::EINVAL);

/// What a fid is open for.
#[derive(Debug, Default)]
enum Open {
    #[default]
    Nothing,
    Handle(Handle),
    /// The value, or the names, of extended attributes, to be read.
    XattrRead(Vec<u8>),
    /// A value that is written, and set when the fid is clunked.
    XattrWrite {
        name: Vec<u8>,
        value: Vec<u8>,
        size: usize,
        flags: u32,
    },
}

#[derive(Debug)]
struct Fid {
    node: Arc<Node>,
    uid: u32,
    open: Open,
}

/// The server of one client.
pub struct Server {
    folder: Arc<Folder>,
    message_bytes: u32,
    fids: BTreeMap<u32, Fid>,
    /// At least so many fids that hold the value of an extended attribute.
    xattr_fids: usize,
}

#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct SavedFid {
    #[n(0)]
    fid: u32,
    #[n(1)]
    node: SavedNode,
    #[n(2)]
    uid: u32,
    /// Flags of the open handle.
    #[n(3)]
    flags: Option<u32>,
    /// An extended attribute that is read.
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    xattr_read: Option<Vec<u8>>,
    /// One that is written: name, and what there is of the value.
    #[n(5)]
    #[cbor(with = "minicbor::bytes")]
    xattr_name: Option<Vec<u8>>,
    #[n(6)]
    #[cbor(with = "minicbor::bytes")]
    xattr_value: Option<Vec<u8>>,
    #[n(7)]
    xattr_size: Option<u32>,
    #[n(8)]
    xattr_flags: Option<u32>,
}

#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    message_bytes: u32,
    #[n(1)]
    fids: Vec<SavedFid>,
}

fn put_qid(out: &mut Vec<u8>, kind: Kind, id: u64, version: u32) {
    // intro(5): QTDIR, QTSYMLINK, QTFILE.
    out.put_u8(match kind {
        Kind::Directory => 0x80,
        Kind::Symlink => 0x02,
        _ => 0,
    });
    out.put_u32(version);
    out.put_u64(id);
}

/// Changes when the contents do, as caches want it.
fn version_of(attr: &Attr) -> u32 {
    let (s, ns) = attr.mtime;
    (s as u32).rotate_left(16) ^ ns ^ attr.size as u32
}

fn put_attr_qid(out: &mut Vec<u8>, attr: &Attr) {
    put_qid(out, Kind::of(attr.mode), attr.id, version_of(attr));
}

impl Server {
    /// A server of a folder.
    pub fn new(folder: Arc<Folder>) -> Server {
        Server {
            folder,
            message_bytes: MAX_MESSAGE_BYTES,
            fids: BTreeMap::new(),
            xattr_fids: MAX_XATTR_FIDS,
        }
    }

    fn fid(&self, fid: u32) -> Result<&Fid> {
        self.fids.get(&fid).ok_or(EBADF)
    }

    fn node(&self, fid: u32) -> Result<Arc<Node>> {
        self.fid(fid).map(|f| Arc::clone(&f.node))
    }

    fn open_handle(&self, fid: u32) -> Result<(&Node, &Handle)> {
        match self.fid(fid)? {
            Fid {
                node,
                open: Open::Handle(h),
                ..
            } => Ok((node, h)),
            _ => Err(EBADF),
        }
    }

    fn who(&self, fid: u32, gid: u32) -> Result<Who> {
        let uid = self.fid(fid)?.uid;
        Ok(Who { uid, gid })
    }

    fn insert(&mut self, fid: u32, node: Arc<Node>, uid: u32, open: Open) -> Result<()> {
        if fid == NONE || self.fids.contains_key(&fid) {
            return Err(EBADF);
        }
        if self.fids.len() >= MAX_FIDS {
            return Err(Errno(libc::ENFILE));
        }
        self.fids.insert(fid, Fid { node, uid, open });
        Ok(())
    }

    fn put_node_qid(&self, out: &mut Vec<u8>, node: &Node) -> Result<()> {
        put_attr_qid(out, &self.folder.attr(node)?);
        Ok(())
    }

    /// Answers a request; on error what was appended is dropped.
    fn answer(
        &mut self,
        kind: u8,
        m: &mut Reader<'_>,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        match kind {
            op::VERSION => self.version(m, out),
            op::ATTACH => self.attach(m, out),
            op::FLUSH => m.u16().map(|_| ()),
            op::WALK => self.walk(m, out),
            op::CLUNK => self.clunk(m.u32()?),
            op::REMOVE => self.remove(m.u32()?),
            op::STATFS => self.statfs(m.u32()?, out),
            op::GETATTR => self.getattr(m.u32()?, out),
            op::SETATTR => self.setattr(m),
            op::READLINK => {
                let target = self.folder.readlink(&*self.node(m.u32()?)?)?;
                out.put_text(&target);
                Ok(())
            }
            op::LOPEN => self.lopen(m, out),
            op::READ => self.read(m, room, out),
            op::WRITE => self.write(m, out),
            op::READDIR => self.readdir(m, room, out),
            op::FSYNC => {
                let (_, handle) = self.open_handle(m.u32()?)?;
                // Older clients leave it out.
                handle.sync(m.u32().unwrap_or(0) != 0)
            }
            op::LOCK | op::GETLOCK => self.lock(kind == op::GETLOCK, m, out),
            op::XATTRWALK => self.xattrwalk(m, out),
            op::XATTRCREATE => self.xattrcreate(m),
            op::LCREATE | op::SYMLINK | op::MKNOD | op::MKDIR => self.make(kind, m, out),
            op::LINK | op::RENAME | op::RENAMEAT | op::UNLINKAT => self.change_name(kind, m),
            // The other dialects' messages, and authentication.
            _ => Err(Errno(libc::EOPNOTSUPP)),
        }
    }

    /// version(5): begins a session; everything of the last one is gone.
    fn version(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (size, version) = (m.u32()?, m.text()?);
        if size < MIN_MESSAGE_BYTES {
            return Err(Errno(libc::EMSGSIZE));
        }
        self.fids.clear();
        self.message_bytes = size.min(MAX_MESSAGE_BYTES);
        out.put_u32(self.message_bytes);
        out.put_text(if version == VERSION {
            VERSION
        } else {
            b"unknown"
        });
        Ok(())
    }

    fn attach(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, _afid, _uname, aname) = (m.u32()?, m.u32()?, m.text()?, m.text()?);
        let uid = m.u32()?;
        if !matches!(aname, b"" | b"/") {
            return Err(Errno(libc::ENOENT));
        }
        let root = self.folder.root();
        self.put_node_qid(out, &root)?;
        let uid = if uid == NONE { 0 } else { uid };
        self.insert(fid, root, uid, Open::Nothing)
    }

    /// walk(5): the new fid is there only if the whole way could be gone.
    fn walk(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, new, count) = (m.u32()?, m.u32()?, m.u16()?);
        if count > MAX_WALK {
            return Err(EINVAL);
        }
        let (mut node, uid) = {
            let f = self.fid(fid)?;
            if matches!(f.open, Open::XattrRead(_) | Open::XattrWrite { .. }) {
                return Err(EBADF);
            }
            (Arc::clone(&f.node), f.uid)
        };
        let at = out.len();
        out.put_u16(0);
        let mut walked = 0_u16;
        for _ in 0..count {
            let name = m.text()?;
            let step = match name {
                b".." => self.folder.parent(&node),
                _ => Name::new(name).and_then(|n| self.folder.lookup(&node, n)),
            };
            let step = step.and_then(|next| self.put_node_qid(out, &next).map(|()| next));
            match step {
                Ok(next) => node = next,
                Err(e) if walked == 0 => return Err(e),
                Err(_) => break,
            }
            walked += 1;
        }
        out[at..at + 2].copy_from_slice(&walked.to_le_bytes());
        if walked < count {
            return Ok(());
        }
        if fid == new {
            self.fids.remove(&fid);
        }
        self.insert(new, node, uid, Open::Nothing)
    }

    fn clunk(&mut self, fid: u32) -> Result<()> {
        let f = self.fids.remove(&fid).ok_or(EBADF)?;
        match f.open {
            Open::XattrWrite {
                name,
                value,
                size,
                flags,
            } => {
                if value.len() != size {
                    return Err(EINVAL);
                }
                // diod: a value of no bytes removes the attribute, unless it is to be made.
                if size == 0 && flags == 0 {
                    self.folder.remove_xattr(&f.node, &name)
                } else {
                    self.folder.set_xattr(&f.node, &name, &value, flags)
                }
            }
            _ => Ok(()),
        }
    }

    /// remove(5): the fid is clunked even if the object cannot be removed.
    fn remove(&mut self, fid: u32) -> Result<()> {
        let f = self.fids.remove(&fid).ok_or(EBADF)?;
        let (dir, name) = self.folder.place(&f.node)?.ok_or(Errno(libc::EBUSY))?;
        let directory = f.node.kind() == Kind::Directory;
        self.folder.unlink(&dir, Name::new(&name)?, directory)
    }

    fn statfs(&self, fid: u32, out: &mut Vec<u8>) -> Result<()> {
        let s = self.folder.space(&*self.node(fid)?)?;
        out.put_u32(MAGIC);
        out.put_u32(u32::try_from(s.block_bytes).unwrap_or(4096));
        for n in [s.blocks, s.free, s.available, s.files, s.files_free, 0] {
            out.put_u64(n);
        }
        out.put_u32(u32::try_from(s.name_bytes).unwrap_or(255));
        Ok(())
    }

    fn getattr(&self, fid: u32, out: &mut Vec<u8>) -> Result<()> {
        let a = self.folder.attr(&*self.node(fid)?)?;
        out.put_u64(STATX_BASIC);
        put_attr_qid(out, &a);
        for n in [a.mode, a.uid, a.gid] {
            out.put_u32(n);
        }
        let room = [a.links, a.rdev, a.size, a.block_bytes.into(), a.blocks];
        room.into_iter().for_each(|n| out.put_u64(n));
        for (s, ns) in [a.atime, a.mtime, a.ctime] {
            out.put_u64(s as u64);
            out.put_u64(ns.into());
        }
        // Time of birth, generation and data version are not among the basic ones.
        for _ in 0..4 {
            out.put_u64(0);
        }
        Ok(())
    }

    fn setattr(&mut self, m: &mut Reader<'_>) -> Result<()> {
        let (fid, valid) = (m.u32()?, m.u32()?);
        let (mode, uid, gid, size) = (m.u32()?, m.u32()?, m.u32()?, m.u64()?);
        let [atime, mtime] = [(m.u64()?, m.u64()?), (m.u64()?, m.u64()?)];
        // diod: mode 1, uid 2, gid 4, size 8, atime 10H, mtime 20H, ctime 40H, and whether atime
        // (80H) and mtime (100H) are given or now.
        let on = |bit: u32| valid & bit != 0;
        let time = |bit, given, (s, ns): (u64, u64)| {
            let at = || SetTime::At(s as i64, u32::try_from(ns).unwrap_or(u32::MAX));
            on(bit).then(|| if on(given) { at() } else { SetTime::Now })
        };
        let set = SetAttr {
            mode: on(1).then_some(mode),
            uid: on(2).then_some(uid),
            gid: on(4).then_some(gid),
            size: on(8).then_some(size),
            atime: time(0x10, 0x80, atime),
            mtime: time(0x20, 0x100, mtime),
        };
        let f = self.fid(fid)?;
        let handle = match &f.open {
            Open::Handle(h) => Some(h),
            _ => None,
        };
        self.folder.set_attr(&f.node, &set, handle)
    }

    fn lopen(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, flags) = (m.u32()?, m.u32()?);
        let f = self.fids.get_mut(&fid).ok_or(EBADF)?;
        if !matches!(f.open, Open::Nothing) {
            return Err(EBADF);
        }
        f.open = Open::Handle(self.folder.open_node(&f.node, flags)?);
        put_attr_qid(out, &self.folder.attr(&f.node)?);
        // As much at a time as fits into a message.
        out.put_u32(0);
        Ok(())
    }

    fn read(&mut self, m: &mut Reader<'_>, room: usize, out: &mut Vec<u8>) -> Result<()> {
        let (fid, offset, count) = (m.u32()?, m.u64()?, m.u32()?);
        let len = (count as usize).min(room.saturating_sub(HEADER_BYTES + 4));
        let at = out.len();
        out.put_u32(0);
        let n = match &self.fid(fid)?.open {
            Open::Handle(h) => h.read(offset, len, out)?,
            Open::XattrRead(value) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = value.get(from..).unwrap_or_default();
                let part = rest.get(..len).unwrap_or(rest);
                out.extend_from_slice(part);
                part.len()
            }
            _ => return Err(EBADF),
        };
        out.set_u32(at, n as u32);
        Ok(())
    }

    fn write(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, offset, count) = (m.u32()?, m.u64()?, m.u32()?);
        let data = m.bytes(count as usize)?;
        let n = match &mut self.fids.get_mut(&fid).ok_or(EBADF)?.open {
            Open::Handle(h) => h.write(offset, data)?,
            Open::XattrWrite { value, size, .. } => {
                // In order, and never more than was announced.
                if offset != value.len() as u64 || value.len() + data.len() > *size {
                    return Err(EINVAL);
                }
                value.extend_from_slice(data);
                data.len()
            }
            _ => return Err(EBADF),
        };
        out.put_u32(n as u32);
        Ok(())
    }

    fn readdir(&self, m: &mut Reader<'_>, room: usize, out: &mut Vec<u8>) -> Result<()> {
        let (fid, offset, count) = (m.u32()?, m.u64()?, m.u32()?);
        let (node, handle) = self.open_handle(fid)?;
        let room = (count as usize).min(room.saturating_sub(HEADER_BYTES + 4));
        let at = out.len();
        out.put_u32(0);
        let start = out.len();
        let mut full = false;
        handle.entries(node, offset, |e| {
            if out.len() - start + 24 + e.name.len() > room {
                full = true;
                return false;
            }
            put_qid(out, Kind::of(e.file_type), e.id, 0);
            out.put_u64(e.next);
            // DT_*, which are the file type bits of the mode shifted.
            out.put_u8((e.file_type >> 12) as u8);
            out.put_text(e.name);
            true
        })?;
        if full && out.len() == start {
            return Err(EINVAL);
        }
        let n = out.len() - start;
        out.set_u32(at, n as u32);
        Ok(())
    }

    /// diod: lock types are those of fcntl(2); status 0 is success, 1 blocked, 2 an error.
    fn lock(&self, test: bool, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, kind) = (m.u32()?, m.u8()?);
        if !test {
            // Whether the client would wait: it asks again by itself.
            m.u32()?;
        }
        let (start, len) = (m.u64()?, m.u64()?);
        let (process, client) = (m.u32()?, m.text()?);
        let lock = Lock { kind, start, len };
        let (node, handle) = self.open_handle(fid)?;
        if test {
            let other = self.folder.test_lock(node, handle, &lock)?;
            let shown = other.unwrap_or(Lock { kind: 2, ..lock });
            out.put_u8(shown.kind);
            out.put_u64(shown.start);
            out.put_u64(shown.len);
            out.put_u32(process);
            out.put_text(client);
            return Ok(());
        }
        match self.folder.lock(node, handle, &lock) {
            Ok(()) => out.put_u8(0),
            Err(Errno(libc::EAGAIN | libc::EACCES)) => out.put_u8(1),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Counts one more fid that holds the value of an attribute; fails if there are too many.
    fn room_for_xattr(&mut self) -> Result<()> {
        if self.xattr_fids >= MAX_XATTR_FIDS {
            // It is counted up only; most have been clunked since.
            let holds = |f: &&Fid| matches!(f.open, Open::XattrRead(_) | Open::XattrWrite { .. });
            self.xattr_fids = self.fids.values().filter(holds).count();
        }
        if self.xattr_fids >= MAX_XATTR_FIDS {
            return Err(Errno(libc::ENFILE));
        }
        self.xattr_fids += 1;
        Ok(())
    }

    fn xattrwalk(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, new, name) = (m.u32()?, m.u32()?, m.text()?);
        let (node, uid) = {
            let f = self.fid(fid)?;
            (Arc::clone(&f.node), f.uid)
        };
        let value = if name.is_empty() {
            self.folder.xattrs(&node)?
        } else {
            self.folder.xattr(&node, name)?
        };
        self.room_for_xattr()?;
        out.put_u64(value.len() as u64);
        self.insert(new, node, uid, Open::XattrRead(value))
    }

    fn xattrcreate(&mut self, m: &mut Reader<'_>) -> Result<()> {
        let (fid, name, size, flags) = (m.u32()?, m.text()?, m.u64()?, m.u32()?);
        if self.folder.read_only() {
            return Err(Errno(libc::EROFS));
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_XATTR_BYTES {
            return Err(Errno(libc::E2BIG));
        }
        self.room_for_xattr()?;
        let f = self.fids.get_mut(&fid).ok_or(EBADF)?;
        if !matches!(f.open, Open::Nothing) {
            return Err(EBADF);
        }
        f.open = Open::XattrWrite {
            name: name.to_vec(),
            value: Vec::new(),
            size,
            flags,
        };
        Ok(())
    }

    fn make(&mut self, kind: u8, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (fid, name) = (m.u32()?, Name::new(m.text()?)?);
        let dir = self.node(fid)?;
        let node = match kind {
            op::LCREATE => {
                let (flags, mode, gid) = (m.u32()?, m.u32()?, m.u32()?);
                let who = self.who(fid, gid)?;
                if !matches!(self.fid(fid)?.open, Open::Nothing) {
                    return Err(EBADF);
                }
                let (node, handle) = self.folder.create(&dir, name, flags, mode, who)?;
                // The fid is now that of the new file.
                let f = self.fids.get_mut(&fid).ok_or(EBADF)?;
                f.node = Arc::clone(&node);
                f.open = Open::Handle(handle);
                node
            }
            op::SYMLINK => {
                let (target, gid) = (m.text()?, m.u32()?);
                let who = self.who(fid, gid)?;
                self.folder.symlink(&dir, name, target, who)?
            }
            op::MKNOD => {
                let (mode, _major, _minor, gid) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
                let who = self.who(fid, gid)?;
                self.folder.mknod(&dir, name, mode, who)?
            }
            _ => {
                let (mode, gid) = (m.u32()?, m.u32()?);
                let who = self.who(fid, gid)?;
                self.folder.mkdir(&dir, name, mode, who)?
            }
        };
        self.put_node_qid(out, &node)?;
        if kind == op::LCREATE {
            out.put_u32(0);
        }
        Ok(())
    }

    fn change_name(&mut self, kind: u8, m: &mut Reader<'_>) -> Result<()> {
        match kind {
            op::LINK => {
                let (dir, node) = (self.node(m.u32()?)?, self.node(m.u32()?)?);
                self.folder.link(&node, &dir, Name::new(m.text()?)?)
            }
            op::RENAME => {
                let (node, to) = (self.node(m.u32()?)?, self.node(m.u32()?)?);
                let new = Name::new(m.text()?)?;
                let (from, old) = self.folder.place(&node)?.ok_or(Errno(libc::EBUSY))?;
                self.folder.rename((&from, Name::new(&old)?), (&to, new), 0)
            }
            op::RENAMEAT => {
                let (from, old) = (self.node(m.u32()?)?, Name::new(m.text()?)?);
                let (to, new) = (self.node(m.u32()?)?, Name::new(m.text()?)?);
                self.folder.rename((&from, old), (&to, new), 0)
            }
            _ => {
                let (dir, name) = (self.node(m.u32()?)?, Name::new(m.text()?)?);
                let directory = m.u32()? & libc::AT_REMOVEDIR as u32 != 0;
                self.folder.unlink(&dir, name, directory)
            }
        }
    }

    fn saved_fid(&self, fid: u32, f: &Fid) -> SavedFid {
        let mut saved = SavedFid {
            fid,
            node: self.folder.describe(&f.node),
            uid: f.uid,
            flags: None,
            xattr_read: None,
            xattr_name: None,
            xattr_value: None,
            xattr_size: None,
            xattr_flags: None,
        };
        match &f.open {
            Open::Nothing => {}
            Open::Handle(h) => saved.flags = Some(h.flags()),
            Open::XattrRead(value) => saved.xattr_read = Some(value.clone()),
            Open::XattrWrite {
                name,
                value,
                size,
                flags,
            } => {
                saved.xattr_name = Some(name.clone());
                saved.xattr_value = Some(value.clone());
                saved.xattr_size = Some(*size as u32);
                saved.xattr_flags = Some(*flags);
            }
        }
        saved
    }

    fn restored(&self, s: SavedFid) -> std::result::Result<(u32, Fid), RestoreError> {
        let node = self.folder.find(&s.node);
        let open = if let Some(flags) = s.flags {
            // Stale if it cannot be opened: reading from the fid then fails.
            match self.folder.open_node(&node, flags) {
                Ok(h) => Open::Handle(h),
                Err(_) => Open::Nothing,
            }
        } else if let Some(value) = s.xattr_read {
            Open::XattrRead(value)
        } else if let (Some(name), Some(value), Some(size)) =
            (s.xattr_name, s.xattr_value, s.xattr_size)
        {
            let size = size as usize;
            if size > MAX_XATTR_BYTES || value.len() > size {
                return Err(RestoreError(format!("fid {} is damaged", s.fid)));
            }
            Open::XattrWrite {
                name,
                value,
                size,
                flags: s.xattr_flags.unwrap_or(0),
            }
        } else {
            Open::Nothing
        };
        let uid = s.uid;
        Ok((s.fid, Fid { node, uid, open }))
    }
}

impl FileServer for Server {
    fn handle(&mut self, message: &[u8], room: usize, reply: &mut Vec<u8>) {
        let mut m = Reader(message);
        // The size is not looked at: clients before Linux 6.2 leave out the data of a write. What
        // the message has is known.
        let head = m.u32().and_then(|_| Ok((m.u8()?, m.u16()?)));
        // Nobody could tell what an answer is to, or it would not fit.
        let Ok((kind, tag)) = head else { return };
        let room = room.min(self.message_bytes as usize);
        if room < HEADER_BYTES + 4 {
            return;
        }
        let start = reply.len();
        reply.put_u32(0);
        reply.put_u8(kind.wrapping_add(1));
        reply.put_u16(tag);
        let mut done = self.answer(kind, &mut m, room, reply);
        if done.is_ok() && reply.len() - start > room {
            done = Err(Errno(libc::EMSGSIZE));
        }
        if let Err(Errno(e)) = done {
            reply.truncate(start);
            reply.put_u32(0);
            reply.put_u8(op::RLERROR);
            reply.put_u16(tag);
            reply.put_u32(e as u32);
        }
        let size = reply.len() - start;
        reply.set_u32(start, size as u32);
    }

    fn reset(&mut self) {
        self.fids.clear();
        self.message_bytes = MAX_MESSAGE_BYTES;
    }

    fn save(&self) -> Vec<u8> {
        let saved = Saved {
            message_bytes: self.message_bytes,
            fids: self
                .fids
                .iter()
                .map(|(n, f)| self.saved_fid(*n, f))
                .collect(),
        };
        // Encoding into a Vec cannot fail.
        minicbor::to_vec(&saved).unwrap_or_default()
    }

    fn restore(&mut self, saved: &[u8]) -> std::result::Result<(), RestoreError> {
        let saved: Saved = minicbor::decode(saved).map_err(|e| RestoreError(e.to_string()))?;
        let sizes = MIN_MESSAGE_BYTES..=MAX_MESSAGE_BYTES;
        if !sizes.contains(&saved.message_bytes) || saved.fids.len() > MAX_FIDS {
            return Err(RestoreError("the session has wrong sizes".into()));
        }
        self.reset();
        self.message_bytes = saved.message_bytes;
        for s in saved.fids {
            let (number, fid) = self.restored(s)?;
            self.fids.insert(number, fid);
        }
        Ok(())
    }

    fn counts(&self) -> (usize, usize) {
        let open = self.fids.values();
        let open = open.filter(|f| matches!(f.open, Open::Handle(_)));
        (self.fids.len(), open.count())
    }
}
