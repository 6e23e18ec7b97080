//! A server of FUSE, the protocol that virtio-fs carries: Linux's `include/uapi/linux/fuse.h`,
//! version 7.31.
//!
//! A node id is a number of ours for an object that the guest's kernel knows; it counts how often
//! it was told of it and forgets them by that count. Attributes may be kept for a second by the
//! guest, file contents while a file is open: what host programs change is seen after that.
//! File locks stay in the guest: programs of one guest are kept apart, guests and host are not.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use minicbor::{Decode, Encode};

use crate::folder::{
    Attr, Entry, Folder, Handle, Kind, MAX_XATTR_BYTES, Name, Node, SavedNode, SetAttr, SetTime,
    Who,
};
use crate::wire::{Put, Reader};
use crate::{Errno, FileServer, RestoreError, Result};

#[cfg(test)]
mod tests;

/// LIMIT: bytes of data in a read or write.
pub const MAX_DATA_BYTES: u32 = 1 << 20;
/// LIMIT: bytes of a message, with room for its header.
pub const MAX_MESSAGE_BYTES: u32 = MAX_DATA_BYTES + 4096;
/// LIMIT: open files and directories.
const MAX_HANDLES: usize = 1 << 17;
/// LIMIT: nodes that the guest knows.
const MAX_NODES: usize = 1 << 18;
/// Node id of the folder itself, FUSE_ROOT_ID.
const ROOT: u64 = 1;
/// Bytes of a request's and of a reply's header.
const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;
/// Version spoken: the last that changed what is used here.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// Oldest version that is answered: it brought `fuse_init_out` to its size.
const MIN_MINOR: u32 = 23;
/// How long the guest may keep attributes and names, in seconds.
const VALID_SECONDS: u64 = 1;

/// Operations.
mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const SETXATTR: u32 = 21;
    pub(super) const GETXATTR: u32 = 22;
    pub(super) const LISTXATTR: u32 = 23;
    pub(super) const REMOVEXATTR: u32 = 24;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const FSYNCDIR: u32 = 30;
    pub(super) const CREATE: u32 = 35;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const FALLOCATE: u32 = 43;
    pub(super) const READDIRPLUS: u32 = 44;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const LSEEK: u32 = 46;
    pub(super) const COPY_FILE_RANGE: u32 = 47;
}

/// What is asked for of the kernel's offers: ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES,
/// AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO, PARALLEL_DIROPS, MAX_PAGES.
const FLAGS: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22;

const EBADF: Errno = Errno(libc::EBADF);
const EINVAL: Errno = Errno(libc::EINVAL);
const ESTALE: Errno = Errno(libc::ESTALE);

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    /// How often the guest was told.
    lookups: u64,
}

#[derive(Debug)]
struct OpenFile {
    node: Arc<Node>,
    /// Nothing: could not be opened again after a restore.
    handle: Option<Handle>,
}

/// The server of one guest.
pub struct Server {
    folder: Arc<Folder>,
    nodes: BTreeMap<u64, Known>,
    by_identity: HashMap<(u64, u64), u64>,
    handles: BTreeMap<u64, OpenFile>,
    next_node: u64,
    next_handle: u64,
    ready: bool,
}

#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct SavedKnown {
    #[n(0)]
    id: u64,
    #[n(1)]
    node: SavedNode,
    #[n(2)]
    lookups: u64,
}

#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct SavedHandle {
    #[n(0)]
    id: u64,
    #[n(1)]
    node: SavedNode,
    #[n(2)]
    flags: u32,
}

#[derive(Debug, Encode, Decode)]
#[cbor(map)]
struct Saved {
    #[n(0)]
    ready: bool,
    #[n(1)]
    next_node: u64,
    #[n(2)]
    next_handle: u64,
    #[n(3)]
    nodes: Vec<SavedKnown>,
    #[n(4)]
    handles: Vec<SavedHandle>,
}

/// What the header of a request says.
struct Head {
    op: u32,
    node: u64,
    who: Who,
}

fn put_attr(out: &mut Vec<u8>, a: &Attr) {
    for n in [a.id, a.size, a.blocks] {
        out.put_u64(n);
    }
    let times = [a.atime, a.mtime, a.ctime];
    times.iter().for_each(|(s, _)| out.put_u64(*s as u64));
    times.iter().for_each(|(_, ns)| out.put_u32(*ns));
    let links = u32::try_from(a.links).unwrap_or(u32::MAX);
    // As the kernel packs a device number into 32 bits.
    let (major, minor) = (libc::major(a.rdev), libc::minor(a.rdev));
    let rdev = minor & 0xff | major << 8 | (minor & !0xff) << 12;
    for n in [a.mode, links, a.uid, a.gid, rdev, a.block_bytes, 0] {
        out.put_u32(n);
    }
}

/// `fuse_attr_out`.
fn put_attr_out(out: &mut Vec<u8>, a: &Attr) {
    out.put_u64(VALID_SECONDS);
    out.put_u64(0);
    put_attr(out, a);
}

/// `fuse_entry_out`; node 0 is "not there".
fn put_entry(out: &mut Vec<u8>, node: u64, a: &Attr) {
    let valid = if node == 0 { 0 } else { VALID_SECONDS };
    for n in [node, 0, valid, valid, 0] {
        out.put_u64(n);
    }
    put_attr(out, a);
}

/// `fuse_dirent` with its name, to a multiple of 8 bytes.
fn put_dirent(out: &mut Vec<u8>, e: &Entry<'_>) {
    out.put_u64(e.id);
    out.put_u64(e.next);
    out.put_u32(e.name.len() as u32);
    out.put_u32(e.file_type >> 12);
    out.extend_from_slice(e.name);
    let padding = e.name.len().next_multiple_of(8) - e.name.len();
    out.extend_from_slice(&[0; 8][..padding]);
}

/// Bytes of `fuse_entry_out`.
const ENTRY_BYTES: usize = 128;
/// Bytes of `fuse_dirent` before the name.
const DIRENT_BYTES: usize = 24;

impl Server {
    /// A server of a folder.
    pub fn new(folder: Arc<Folder>) -> Server {
        let mut server = Server {
            folder,
            nodes: BTreeMap::new(),
            by_identity: HashMap::new(),
            handles: BTreeMap::new(),
            next_node: ROOT + 1,
            next_handle: 1,
            ready: false,
        };
        server.forget_all();
        server
    }

    fn forget_all(&mut self) {
        self.nodes.clear();
        self.by_identity.clear();
        self.handles.clear();
        self.next_node = ROOT + 1;
        self.next_handle = 1;
        self.ready = false;
        self.know(ROOT, self.folder.root(), 1);
    }

    fn know(&mut self, id: u64, node: Arc<Node>, lookups: u64) {
        self.by_identity.insert(node.identity(), id);
        self.nodes.insert(id, Known { node, lookups });
    }

    fn node(&self, id: u64) -> Result<Arc<Node>> {
        self.nodes
            .get(&id)
            .map(|k| Arc::clone(&k.node))
            .ok_or(ESTALE)
    }

    fn open_file(&self, id: u64) -> Result<(&Node, &Handle)> {
        let f = self.handles.get(&id).ok_or(EBADF)?;
        Ok((&f.node, f.handle.as_ref().ok_or(ESTALE)?))
    }

    /// Tells the guest of a node once more; its id.
    fn tell(&mut self, node: Arc<Node>) -> Result<u64> {
        if let Some(id) = self.by_identity.get(&node.identity())
            && let Some(known) = self.nodes.get_mut(id)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(*id);
        }
        if self.nodes.len() >= MAX_NODES {
            return Err(Errno(libc::ENFILE));
        }
        let id = self.next_node;
        self.next_node += 1;
        self.know(id, node, 1);
        Ok(id)
    }

    fn forget(&mut self, id: u64, count: u64) {
        if id == ROOT {
            return;
        }
        if let Some(known) = self.nodes.get_mut(&id) {
            known.lookups = known.lookups.saturating_sub(count);
            if known.lookups == 0 {
                let identity = known.node.identity();
                self.nodes.remove(&id);
                if self.by_identity.get(&identity) == Some(&id) {
                    self.by_identity.remove(&identity);
                }
            }
        }
    }

    /// Tells of a node in the reply.
    fn put_told(&mut self, out: &mut Vec<u8>, node: Arc<Node>) -> Result<()> {
        let attr = self.folder.attr(&node)?;
        let id = self.tell(node)?;
        put_entry(out, id, &attr);
        Ok(())
    }

    fn put_open(&mut self, out: &mut Vec<u8>, node: Arc<Node>, handle: Handle) -> Result<()> {
        if self.handles.len() >= MAX_HANDLES {
            return Err(Errno(libc::ENFILE));
        }
        let id = self.next_handle;
        self.next_handle += 1;
        let handle = Some(handle);
        self.handles.insert(id, OpenFile { node, handle });
        out.put_u64(id);
        out.put_u64(0);
        Ok(())
    }

    fn answer(
        &mut self,
        head: &Head,
        m: &mut Reader<'_>,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if head.op == op::INIT {
            return self.init(m, out);
        }
        if !self.ready {
            return Err(Errno(libc::EIO));
        }
        match head.op {
            op::DESTROY => self.forget_all(),
            op::LOOKUP => {
                let dir = self.node(head.node)?;
                let node = self.folder.lookup(&dir, Name::new(m.c_text()?)?)?;
                self.put_told(out, node)?;
            }
            op::GETATTR => put_attr_out(out, &self.folder.attr(&*self.node(head.node)?)?),
            op::SETATTR => self.setattr(head.node, m, out)?,
            op::READLINK => out.extend(self.folder.readlink(&*self.node(head.node)?)?),
            op::SYMLINK | op::MKNOD | op::MKDIR | op::LINK => self.make(head, m, out)?,
            op::CREATE => self.create(head, m, out)?,
            op::UNLINK | op::RMDIR => {
                let name = Name::new(m.c_text()?)?;
                let dir = self.node(head.node)?;
                self.folder.unlink(&dir, name, head.op == op::RMDIR)?;
            }
            op::RENAME | op::RENAME2 => {
                let to = self.node(m.u64()?)?;
                let flags = if head.op == op::RENAME2 {
                    m.u64()? as u32
                } else {
                    0
                };
                let (old, new) = (Name::new(m.c_text()?)?, Name::new(m.c_text()?)?);
                let from = self.node(head.node)?;
                self.folder.rename((&from, old), (&to, new), flags)?;
            }
            op::OPEN | op::OPENDIR => {
                let flags = m.u32()?;
                let node = self.node(head.node)?;
                if (node.kind() == Kind::Directory) != (head.op == op::OPENDIR) {
                    return Err(EINVAL);
                }
                let handle = self.folder.open_node(&node, flags)?;
                self.put_open(out, node, handle)?;
            }
            op::READ => {
                let (id, offset, size) = (m.u64()?, m.u64()?, m.u32()?);
                let (_, handle) = self.open_file(id)?;
                let len = size.min(MAX_DATA_BYTES) as usize;
                handle.read(offset, len.min(room.saturating_sub(OUT_HEADER_BYTES)), out)?;
            }
            op::WRITE => {
                let (id, offset, size) = (m.u64()?, m.u64()?, m.u32()?);
                let (_flags, _owner, _more) = (m.u32()?, m.u64()?, m.u64()?);
                let data = m.bytes(size as usize)?;
                let n = self.open_file(id)?.1.write(offset, data)?;
                out.put_u32(n as u32);
                out.put_u32(0);
            }
            op::STATFS => self.statfs(head.node, out)?,
            op::RELEASE | op::RELEASEDIR => {
                self.handles.remove(&m.u64()?).ok_or(EBADF)?;
            }
            op::FLUSH => {
                self.open_file(m.u64()?)?;
            }
            op::FSYNC | op::FSYNCDIR => {
                let (id, flags) = (m.u64()?, m.u32()?);
                self.open_file(id)?.1.sync(flags & 1 != 0)?;
            }
            op::SETXATTR | op::GETXATTR | op::LISTXATTR | op::REMOVEXATTR => {
                self.xattr(head, m, room, out)?;
            }
            op::READDIR | op::READDIRPLUS => {
                self.readdir(head.op == op::READDIRPLUS, m, room, out)?;
            }
            op::FALLOCATE => {
                let (id, offset, len, mode) = (m.u64()?, m.u64()?, m.u64()?, m.u32()?);
                self.open_file(id)?.1.allocate(mode, offset, len)?;
            }
            op::LSEEK => {
                let (id, offset, whence) = (m.u64()?, m.u64()?, m.u32()?);
                let hole = match whence as i32 {
                    libc::SEEK_DATA => false,
                    libc::SEEK_HOLE => true,
                    _ => return Err(EINVAL),
                };
                let at = self.open_file(id)?.1.seek(offset, hole)?;
                out.put_u64(at);
            }
            op::COPY_FILE_RANGE => {
                let (from, offset, _node) = (m.u64()?, m.u64()?, m.u64()?);
                let (to, to_offset, len) = (m.u64()?, m.u64()?, m.u64()?);
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                // A copy must not keep the others waiting: the guest asks for the rest.
                let len = len.min(64 << 20);
                let to = self.open_file(to)?.1;
                let n = self.open_file(from)?.1.copy(offset, to, to_offset, len)?;
                out.put_u32(n as u32);
                out.put_u32(0);
            }
            // The guest's kernel then does without, or by itself (locks).
            _ => return Err(Errno(libc::ENOSYS)),
        }
        Ok(())
    }

    fn init(&mut self, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (major, minor) = (m.u32()?, m.u32()?);
        if major > MAJOR {
            // fuse.h: "If the major versions don't match ... reply with the one supported".
            out.put_u32(MAJOR);
            out.put_u32(MINOR);
            out.extend_from_slice(&[0; 56]);
            return Ok(());
        }
        if major < MAJOR || minor < MIN_MINOR {
            return Err(Errno(libc::EPROTO));
        }
        let (read_ahead, flags) = (m.u32()?, m.u32()?);
        self.forget_all();
        self.ready = true;
        for n in [MAJOR, MINOR.min(minor), read_ahead, flags & FLAGS] {
            out.put_u32(n);
        }
        // max_background and congestion_threshold: the queue is the limit.
        out.put_u16(64);
        out.put_u16(48);
        out.put_u32(MAX_DATA_BYTES);
        // Granularity of times in nanoseconds.
        out.put_u32(1);
        out.put_u16((MAX_DATA_BYTES / 4096) as u16);
        out.extend_from_slice(&[0; 34]);
        Ok(())
    }

    fn setattr(&mut self, node: u64, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (valid, _) = (m.u32()?, m.u32()?);
        let (id, size, _owner) = (m.u64()?, m.u64()?, m.u64()?);
        let (atime, mtime, _ctime) = (m.u64()?, m.u64()?, m.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (m.u32()?, m.u32()?, m.u32()?);
        let (mode, _) = (m.u32()?, m.u32()?);
        let (uid, gid) = (m.u32()?, m.u32()?);
        // FATTR_*.
        let on = |bit: u32| valid >> bit & 1 != 0;
        let time = |given, now, s: u64, ns| {
            let at = || SetTime::At(s as i64, ns);
            on(given).then(|| if on(now) { SetTime::Now } else { at() })
        };
        let set = SetAttr {
            mode: on(0).then_some(mode),
            uid: on(1).then_some(uid),
            gid: on(2).then_some(gid),
            size: on(3).then_some(size),
            atime: time(4, 7, atime, atime_ns),
            mtime: time(5, 8, mtime, mtime_ns),
        };
        let node = self.node(node)?;
        let handle = if on(6) { self.handles.get(&id) } else { None };
        // Only one of the same object: the size is changed through it.
        let handle = handle.filter(|f| f.node.identity() == node.identity());
        let handle = handle.and_then(|f| f.handle.as_ref());
        self.folder.set_attr(&node, &set, handle)?;
        put_attr_out(out, &self.folder.attr(&node)?);
        Ok(())
    }

    fn make(&mut self, head: &Head, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let dir = self.node(head.node)?;
        let node = match head.op {
            op::SYMLINK => {
                let (name, target) = (Name::new(m.c_text()?)?, m.c_text()?);
                self.folder.symlink(&dir, name, target, head.who)?
            }
            op::MKNOD => {
                // The guest's kernel has applied the umask.
                let (mode, _device, _umask, _) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
                let name = Name::new(m.c_text()?)?;
                self.folder.mknod(&dir, name, mode, head.who)?
            }
            op::MKDIR => {
                let (mode, _umask) = (m.u32()?, m.u32()?);
                let name = Name::new(m.c_text()?)?;
                self.folder.mkdir(&dir, name, mode, head.who)?
            }
            _ => {
                let node = self.node(m.u64()?)?;
                let name = Name::new(m.c_text()?)?;
                self.folder.link(&node, &dir, name)?;
                node
            }
        };
        self.put_told(out, node)
    }

    fn create(&mut self, head: &Head, m: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (flags, mode, _umask, _) = (m.u32()?, m.u32()?, m.u32()?, m.u32()?);
        let name = Name::new(m.c_text()?)?;
        let dir = self.node(head.node)?;
        let (node, handle) = self.folder.create(&dir, name, flags, mode, head.who)?;
        if node.kind() != Kind::File {
            return Err(Errno(libc::EISDIR));
        }
        self.put_told(out, Arc::clone(&node))?;
        self.put_open(out, node, handle)
    }

    /// `fuse_kstatfs`.
    fn statfs(&self, node: u64, out: &mut Vec<u8>) -> Result<()> {
        let s = self.folder.space(&*self.node(node)?)?;
        for n in [s.blocks, s.free, s.available, s.files, s.files_free] {
            out.put_u64(n);
        }
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let block = small(s.block_bytes);
        for n in [block, small(s.name_bytes), block, 0, 0, 0, 0, 0, 0, 0] {
            out.put_u32(n);
        }
        Ok(())
    }

    fn xattr(
        &mut self,
        head: &Head,
        m: &mut Reader<'_>,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let node = self.node(head.node)?;
        match head.op {
            op::SETXATTR => {
                let (size, flags) = (m.u32()? as usize, m.u32()?);
                let name = m.c_text()?;
                if size > MAX_XATTR_BYTES {
                    return Err(Errno(libc::E2BIG));
                }
                return self.folder.set_xattr(&node, name, m.bytes(size)?, flags);
            }
            op::REMOVEXATTR => return self.folder.remove_xattr(&node, m.c_text()?),
            _ => {}
        }
        let (size, _) = (m.u32()? as usize, m.u32()?);
        let value = if head.op == op::GETXATTR {
            self.folder.xattr(&node, m.c_text()?)?
        } else {
            self.folder.xattrs(&node)?
        };
        if size == 0 {
            // Only how much there is.
            out.put_u32(value.len() as u32);
            out.put_u32(0);
        } else if value.len() > size.min(room.saturating_sub(OUT_HEADER_BYTES)) {
            return Err(Errno(libc::ERANGE));
        } else {
            out.extend(value);
        }
        Ok(())
    }

    fn readdir(
        &mut self,
        plus: bool,
        m: &mut Reader<'_>,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let (id, offset, size) = (m.u64()?, m.u64()?, m.u32()?);
        let size = size.min(MAX_DATA_BYTES) as usize;
        let room = size.min(room.saturating_sub(OUT_HEADER_BYTES));
        let extra = if plus { ENTRY_BYTES } else { 0 };
        // Telling of a node needs the whole server, and going through the entries a part of it.
        let f = self.handles.remove(&id).ok_or(EBADF)?;
        let done = f.handle.as_ref().ok_or(ESTALE).and_then(|handle| {
            let start = out.len();
            let mut full = false;
            handle.entries(&f.node, offset, |e| {
                let bytes = extra + (DIRENT_BYTES + e.name.len()).next_multiple_of(8);
                if out.len() - start + bytes > room {
                    full = true;
                    return false;
                }
                if plus {
                    self.put_entry_of(&f.node, e, out);
                }
                put_dirent(out, e);
                true
            })?;
            if full && out.len() == start {
                return Err(EINVAL);
            }
            Ok(())
        });
        self.handles.insert(id, f);
        done
    }

    /// The node of a directory's entry; none if it cannot be told of, which is no error here.
    fn put_entry_of(&mut self, dir: &Node, e: &Entry<'_>, out: &mut Vec<u8>) {
        // `.` and `..` are no names, so they are not told of.
        let node = Name::new(e.name).and_then(|name| self.folder.lookup(dir, name));
        let told = node.and_then(|node| {
            let attr = self.folder.attr(&node)?;
            Ok((self.tell(node)?, attr))
        });
        let (id, attr) = told.unwrap_or_default();
        put_entry(out, id, &attr);
    }
}

impl FileServer for Server {
    fn handle(&mut self, message: &[u8], room: usize, reply: &mut Vec<u8>) {
        let mut m = Reader(message);
        let mut parse = || {
            let (len, op, unique) = (m.u32()? as usize, m.u32()?, m.u64()?);
            let (node, uid, gid) = (m.u64()?, m.u32()?, m.u32()?);
            let (_process, _extensions) = (m.u32()?, m.u32()?);
            if len < IN_HEADER_BYTES || len > message.len() {
                return Err(EINVAL);
            }
            let who = Who { uid, gid };
            Ok((Head { op, node, who }, unique))
        };
        // Nobody could tell what an answer is to.
        let Ok((head, unique)) = parse() else { return };
        match head.op {
            op::FORGET => {
                if let Ok(count) = m.u64() {
                    self.forget(head.node, count);
                }
                return;
            }
            op::BATCH_FORGET => {
                let count = m.u64().unwrap_or(0) as u32;
                for _ in 0..count {
                    let (Ok(node), Ok(n)) = (m.u64(), m.u64()) else {
                        return;
                    };
                    self.forget(node, n);
                }
                return;
            }
            // What it is about has been answered already.
            op::INTERRUPT => return,
            _ => {}
        }
        if room < OUT_HEADER_BYTES {
            return;
        }
        let start = reply.len();
        reply.put_u32(0);
        reply.put_u32(0);
        reply.put_u64(unique);
        let mut done = self.answer(&head, &mut m, room, reply);
        if done.is_ok() && reply.len() - start > room {
            done = Err(Errno(libc::EIO));
        }
        if let Err(Errno(e)) = done {
            reply.truncate(start + OUT_HEADER_BYTES);
            reply.set_u32(start + 4, (-e) as u32);
        }
        let len = reply.len() - start;
        reply.set_u32(start, len as u32);
    }

    fn reset(&mut self) {
        self.forget_all();
    }

    fn save(&self) -> Vec<u8> {
        let nodes = self.nodes.iter().map(|(id, k)| SavedKnown {
            id: *id,
            node: self.folder.describe(&k.node),
            lookups: k.lookups,
        });
        let handles = self.handles.iter().map(|(id, f)| SavedHandle {
            id: *id,
            node: self.folder.describe(&f.node),
            flags: f.handle.as_ref().map_or(0, Handle::flags),
        });
        let saved = Saved {
            ready: self.ready,
            next_node: self.next_node,
            next_handle: self.next_handle,
            nodes: nodes.collect(),
            handles: handles.collect(),
        };
        // Encoding into a Vec cannot fail.
        minicbor::to_vec(&saved).unwrap_or_default()
    }

    fn restore(&mut self, saved: &[u8]) -> std::result::Result<(), RestoreError> {
        let saved: Saved = minicbor::decode(saved).map_err(|e| RestoreError(e.to_string()))?;
        let too_many = saved.nodes.len() > MAX_NODES || saved.handles.len() > MAX_HANDLES;
        let below = |ids: u64| (1..=1 << 62).contains(&ids);
        if too_many || !below(saved.next_node) || !below(saved.next_handle) {
            return Err(RestoreError("the session has wrong sizes".into()));
        }
        self.forget_all();
        for k in saved.nodes {
            if k.id == ROOT {
                continue;
            }
            let node = self.folder.find(&k.node);
            if k.id >= saved.next_node {
                return Err(RestoreError(format!("node {} is not there yet", k.id)));
            }
            self.know(k.id, node, k.lookups);
        }
        for h in saved.handles {
            if h.id >= saved.next_handle {
                return Err(RestoreError(format!("handle {} is not there yet", h.id)));
            }
            let node = self.folder.find(&h.node);
            let handle = self.folder.open_node(&node, h.flags).ok();
            self.handles.insert(h.id, OpenFile { node, handle });
        }
        self.next_node = saved.next_node;
        self.next_handle = saved.next_handle;
        self.ready = saved.ready;
        Ok(())
    }

    fn counts(&self) -> (usize, usize) {
        (self.nodes.len(), self.handles.len())
    }
}
