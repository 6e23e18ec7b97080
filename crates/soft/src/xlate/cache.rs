//! The code cache of one vCPU: memory for emitted code, blocks, links, look-up.
//!
//! Code is written through one mapping and executed through another (W^X). The cache is filled
//! from front to back; when it is full everything is dropped. Each vCPU has its own, so nothing
//! here is shared or locked.

// UNSAFETY: two mappings of one memfd; writes are bounds-checked.
#![allow(unsafe_code, reason = "owns executable memory")]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use pyrite_mem::SharedMemory;

use super::code_tlb::PageCheck;
use super::emit::Reloc;
use super::front::LOOKED_MAX;

/// What makes a translation reusable: where the code is, how it is addressed, in which mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// RIP of the first byte.
    pub rip: u64,
    /// Mode bits, see `mode`.
    pub mode: u32,
}

/// A direct exit of a block.
#[derive(Clone, Debug)]
pub struct Exit {
    /// Guest RIP it leads to.
    pub target: u64,
    /// It leads to the variant of the target without runs.
    pub plain: bool,
    /// Cache offset of the rel32 of its jump.
    pub patch_at: u32,
    /// Cache offset of its stub, to which the jump leads while unlinked.
    pub stub_at: u32,
    /// The block it is linked to.
    pub linked: Option<u32>,
    /// The block it belongs to.
    pub owner: u32,
}

/// Entries of a block besides the plain one; made when they are first needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OtherEntries {
    /// Cache offset of the entry for links from other pages, which checks the mapping.
    pub far: u32,
    /// Cache offset of the entry that compares R10 with the block's RIP, and then does the same.
    pub checked: u32,
}

impl OtherEntries {
    /// The same at a place that many bytes further.
    pub fn plus(self, by: u32) -> OtherEntries {
        OtherEntries {
            far: self.far + by,
            checked: self.checked + by,
        }
    }

    /// The same relative to a place.
    pub fn less(self, by: u32) -> OtherEntries {
        OtherEntries {
            far: self.far - by,
            checked: self.checked - by,
        }
    }
}

/// A translated block.
#[derive(Debug)]
pub struct Block {
    pub key: BlockKey,
    /// Cache offset of the entry for jumps that have proved the target.
    pub entry: u32,
    /// The same behind the poll.
    pub past_poll: u32,
    /// The other entries, if there are any yet.
    pub others: Option<OtherEntries>,
    /// The flags are live at the entries.
    pub flags_live: bool,
    /// Cache range of the body.
    pub start: u32,
    pub end: u32,
    /// What proves that its page is still mapped as it was.
    pub page: PageCheck,
    /// Guest-physical address of the second page that it was made from, and its check.
    pub second: Option<(u64, PageCheck)>,
    /// Number of guest bytes.
    pub guest_len: u32,
    /// Other parts of the page that the translation depends on: offset and length in bytes.
    pub looked: [(u16, u16); LOOKED_MAX],
    /// Guest instructions.
    pub insns: u32,
    /// Host offset from `start` at which each guest instruction begins, with its guest offset.
    pub map: Vec<(u32, u16)>,
    /// Indices into `Cache::exits` of the exits that are linked to this block.
    pub incoming: Vec<u32>,
    /// Its first instruction is one for the interpreter: entering the block is of no use.
    pub interpret_first: bool,
    /// The entry polls the exit request.
    pub polls: bool,
    /// Bytes that the RET that ends it takes from the stack; 0 if something else does.
    pub pops: u32,
    /// What to change for the same code at another RIP; `None` if that does not do.
    pub relocs: Option<Box<[Reloc]>>,
    /// Its exits in `Cache::exits`.
    pub first_exit: u32,
    pub exits: u32,
    pub dead: bool,
}

/// A multiplicative hash; keys are addresses, not hostile strings, and the map is bounded.
#[derive(Default)]
pub struct AddrHasher(u64);

impl Hasher for AddrHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(23) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

/// A map by addresses.
pub type AddrMap<K, V> = HashMap<K, V, BuildHasherDefault<AddrHasher>>;

/// See the module documentation.
pub struct Cache {
    rw: *mut u8,
    rx: *const u8,
    size: usize,
    used: usize,
    pub blocks: Vec<Block>,
    /// [`Block::start`] of each block: what is searched.
    starts: Vec<u32>,
    pub exits: Vec<Exit>,
    /// Entries that lie outside of their blocks: from, to, block. In the order of their places.
    entries: Vec<(u32, u32, u32)>,
    by_key: AddrMap<BlockKey, u32>,
    by_page: AddrMap<u64, Vec<u32>>,
    /// The latest block made from the code at a guest-physical address in a mode, whatever its RIP.
    by_place: AddrMap<(u64, u32), u32>,
    /// How often everything was dropped.
    pub flushes: u64,
}

// SAFETY: the mappings belong to this value; it moves between threads with its vCPU.
unsafe impl Send for Cache {}

impl Cache {
    /// Maps a cache of `size` bytes.
    pub fn new(size: usize) -> std::io::Result<Cache> {
        let size = size.next_multiple_of(4096);
        let memory = SharedMemory::new(c"code-cache", size as u64)?;
        let rw = memory.map(size, libc::PROT_READ | libc::PROT_WRITE)?;
        let rx = match memory.map(size, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(rx) => rx,
            Err(e) => {
                // SAFETY: mapped just now and used by nobody.
                unsafe { libc::munmap(rw.cast(), size) };
                return Err(e);
            }
        };
        {
            Ok(Cache {
                rw,
                rx,
                size,
                used: 0,
                blocks: Vec::new(),
                starts: Vec::new(),
                exits: Vec::new(),
                entries: Vec::new(),
                by_key: AddrMap::default(),
                by_page: AddrMap::default(),
                by_place: AddrMap::default(),
                flushes: 0,
            })
        }
    }

    /// Address at which cache offset 0 executes.
    pub fn base(&self) -> u64 {
        self.rx as u64
    }

    /// First free offset, aligned for a block's start.
    pub fn free_at(&self) -> usize {
        self.used.next_multiple_of(16)
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// True if `len` more bytes fit.
    pub fn fits(&self, len: usize) -> bool {
        self.free_at() + len <= self.size
    }

    /// Copies emitted code to [`Cache::free_at`].
    pub fn append(&mut self, code: &[u8]) {
        let at = self.free_at();
        assert!(at + code.len() <= self.size, "caller checked that it fits");
        // SAFETY: bounds asserted.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(at), code.len()) };
        self.used = at + code.len();
    }

    /// Writes the rel32 at offset `at` so that the jump leads to offset `to`.
    fn patch(&mut self, at: u32, to: u32) {
        let rel = to.wrapping_sub(at + 4);
        assert!((at as usize) + 4 <= self.used);
        // SAFETY: bounds asserted.
        unsafe { self.rw.add(at as usize).cast::<u32>().write_unaligned(rel) };
    }

    /// The block for a key.
    pub fn find(&self, key: &BlockKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// A block made from the same code in the same mode, at whatever RIP, that can be moved.
    pub fn movable(&self, key: &BlockKey) -> Option<u32> {
        let id = self.by_place.get(&(key.gpa, key.mode)).copied()?;
        (!self.blocks[id as usize].dead).then_some(id)
    }

    /// The code between two host addresses, if that is where code is.
    pub fn bytes(&self, from: u64, to: u64) -> Option<&[u8]> {
        let start = usize::try_from(from.checked_sub(self.base())?).ok()?;
        let end = usize::try_from(to.checked_sub(self.base())?).ok()?;
        if start > end || end > self.used {
            return None;
        }
        // SAFETY: bounds checked; nothing writes while the reference lives, because that takes
        // `&mut self`.
        Some(unsafe { std::slice::from_raw_parts(self.rw.add(start), end - start) })
    }

    /// The code of a block.
    pub fn code(&self, id: u32) -> &[u8] {
        let b = &self.blocks[id as usize];
        let (start, end) = (b.start as usize, b.end as usize);
        assert!(start <= end && end <= self.used);
        // SAFETY: bounds asserted; nothing writes while the reference lives, because that takes
        // `&mut self`.
        unsafe { std::slice::from_raw_parts(self.rw.add(start), end - start) }
    }

    /// Adds a block whose code was appended.
    pub fn insert(&mut self, block: Block) -> u32 {
        let id = self.blocks.len() as u32;
        self.by_key.insert(block.key, id);
        if block.relocs.is_some() {
            self.by_place.insert((block.key.gpa, block.key.mode), id);
        }
        let second = block.second.map(|(gpa, _)| gpa);
        for page in [Some(block.key.gpa & !0xfff), second].into_iter().flatten() {
            self.by_page.entry(page).or_default().push(id);
        }
        self.starts.push(block.start);
        self.blocks.push(block);
        id
    }

    /// Makes an exit jump straight to a block; `near`: from the same page. From another page only if
    /// it has an entry for that.
    pub fn link(&mut self, exit: u32, to: u32, near: bool) {
        let b = &self.blocks[to as usize];
        let owner = &self.blocks[self.exits[exit as usize].owner as usize];
        let entry = match b.others {
            // Onwards within a page comes to an end without polls.
            _ if near && b.second.is_none() && b.key.rip > owner.key.rip => b.past_poll,
            _ if near && b.second.is_none() => b.entry,
            Some(o) => o.far,
            None => return,
        };
        let e = &mut self.exits[exit as usize];
        e.linked = Some(to);
        let at = e.patch_at;
        self.patch(at, entry);
        self.blocks[to as usize].incoming.push(exit);
    }

    /// Drops one block: nothing leads to it any more. Its code stays until the cache is emptied.
    pub fn kill(&mut self, id: u32) {
        let b = &mut self.blocks[id as usize];
        if b.dead {
            return;
        }
        b.dead = true;
        let key = b.key;
        let incoming = std::mem::take(&mut b.incoming);
        if self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        for x in incoming {
            let e = &mut self.exits[x as usize];
            if e.linked == Some(id) {
                e.linked = None;
                let (at, stub) = (e.patch_at, e.stub_at);
                self.patch(at, stub);
            }
        }
    }

    /// Drops the blocks made from a guest-physical page, and tells which they are.
    pub fn kill_page(&mut self, page_gpa: u64) -> Vec<u32> {
        let ids = self.by_page.remove(&page_gpa).unwrap_or_default();
        for &id in &ids {
            self.kill(id);
        }
        ids
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.used = 0;
        self.blocks.clear();
        self.starts.clear();
        self.exits.clear();
        self.entries.clear();
        self.by_key.clear();
        self.by_page.clear();
        self.by_place.clear();
        self.flushes += 1;
    }

    /// Adds entries that lie outside of their block.
    pub fn add_entries(&mut self, id: u32, code: &[u8], others: OtherEntries) {
        let start = self.free_at() as u32;
        self.append(code);
        self.entries.push((start, self.used as u32, id));
        self.blocks[id as usize].others = Some(others.plus(start));
    }

    /// The block whose code, or entry, holds an executable address.
    pub fn block_at(&self, addr: u64) -> Option<&Block> {
        let off = u32::try_from(addr.checked_sub(self.base())?).ok()?;
        let n = self.starts.partition_point(|start| *start <= off);
        let b = self.blocks.get(n.checked_sub(1)?)?;
        if off < b.end {
            return Some(b);
        }
        let n = self.entries.partition_point(|e| e.0 <= off);
        let &(_, end, id) = self.entries.get(n.checked_sub(1)?)?;
        (off < end).then(|| &self.blocks[id as usize])
    }

    /// The block whose index stands at an executable address.
    pub fn block_named_at(&self, addr: u64) -> Option<u32> {
        let off = usize::try_from(addr.checked_sub(self.base())?).ok()?;
        if off + 4 > self.used {
            return None;
        }
        // SAFETY: bounds checked; nothing writes meanwhile, because that takes `&mut self`.
        let id = unsafe { self.rw.add(off).cast::<u32>().read_unaligned() };
        ((id as usize) < self.blocks.len()).then_some(id)
    }

    /// The exit whose stub holds an executable address.
    pub fn exit_at(&self, addr: u64) -> Option<u32> {
        let off = u32::try_from(addr.checked_sub(self.base())?).ok()?;
        let b = self.block_at(addr)?;
        let exits = b.first_exit..b.first_exit + b.exits;
        exits.into_iter().find(|x| {
            self.exits
                .get(*x as usize)
                .is_some_and(|e| e.stub_at == off)
        })
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in `new` with this size.
        unsafe {
            libc::munmap(self.rw.cast(), self.size);
            libc::munmap(self.rx.cast_mut().cast(), self.size);
        }
    }
}
