//! What of a guest address space is mapped in its process.
//!
//! The mappings are a TLB: an entry is made when an access faults, from what the guest's page tables
//! say at that moment with their accessed and dirty flags set, and it may stay until the guest
//! invalidates it. After an invalidation all entries are compared with the page tables before guest
//! code runs again, which costs far less than to make them anew.
//!
//! A page is writable only under the rules of the soft TLB's write entries: its dirty flag is set, it is
//! not clean in the dirty log, no translated code was made from it ([`crate::xlate`]).

use std::collections::{BTreeMap, HashMap};
use std::io::Result;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use pyrite_mem::{GuestMemory, PAGE_CODE, PAGE_DIRTY_LOGGED, PAGE_SIZE, PAGE_WRITE_CACHED};
use pyrite_x86::bits::efer;
use pyrite_x86::paging::AccessKind;

use super::process::{Order, Process};
use super::scan::{self, Nature, Rules};
use super::stub;
use crate::frame::View;
use crate::vcpu::SoftVcpu;
use crate::xlate;

/// Bits of an entry, whose page-aligned rest is the offset in guest RAM.
const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
/// Has an instruction that must not run there.
const SENSITIVE: u64 = 1 << 3;
/// What is mapped is a copy.
const PATCHED: u64 = 1 << 4;
const OFFSET: u64 = !(PAGE_SIZE - 1);

/// Pages of a chunk: what one page table of the guest maps.
const CHUNK_PAGES: usize = 512;
const CHUNK_SHIFT: u32 = 21;

/// Pages that are looked at around one that faults, at least and at most.
const WINDOW_MIN: u64 = 16;
const WINDOW_MAX: u64 = 512;

/// LIMIT: mappings of a process, a quarter of what Linux allows.
const MAPPINGS_MAX: usize = 16_000;

/// A page that was written and executed by turns this often stays both.
const BOUNCES_MAX: u8 = 8;

type Chunk = [u64; CHUNK_PAGES];

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The access can be tried again.
    Mapped,
    /// The interpreter must execute the instruction.
    Interpret,
    /// The page must not be executed here.
    Sensitive,
}

/// An address space and its process.
pub struct Space {
    /// Guest-physical address of the root of its page tables.
    pub root: u64,
    /// When it was used last, by a counter.
    pub used: u64,
    /// The process has the extended state that was read last.
    pub has_xstate: bool,
    /// What may have changed in the page tables.
    stale: bool,
    /// A page that the guest's kernel was asked for.
    expected: Option<u64>,
    /// Its process.
    pub process: Process,
    chunks: BTreeMap<u64, Box<Chunk>>,
    orders: Vec<Order>,
    mappings: usize,
    window: u64,
    /// Where the last window ended.
    window_end: u64,
    bounces: HashMap<u64, u8>,
    /// Offsets of the copies that are mapped, by their addresses.
    copies: HashMap<u64, u64>,
    rules: Rules,
    /// Pages mapped so far.
    pub pages: u64,
    /// Pages that may not be executed.
    pub sensitive: u64,
}

/// A page of the guest, by its tables.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    gpa: u64,
    writable: bool,
    executable: bool,
    dirty: bool,
}

/// What the tables say of the addresses of a chunk.
enum Level {
    Absent,
    /// A page of 2 MiB or more: guest-physical address of the chunk.
    Large(Leaf),
    /// A page table.
    Table {
        gpa: u64,
        writable: bool,
        executable: bool,
    },
}

/// Reads the guest's page tables without changing them. Four levels. Intel SDM Vol. 3A §4.5.
struct Peek<'a> {
    memory: &'a GuestMemory,
    root: u64,
    nxe: bool,
}

impl Peek<'_> {
    const P: u64 = 1;
    const RW: u64 = 1 << 1;
    const US: u64 = 1 << 2;
    const A: u64 = 1 << 5;
    const D: u64 = 1 << 6;
    const PS: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// An entry that user code can go through, and that was accessed.
    fn entry(&self, table: u64, index: u64) -> Option<u64> {
        let e = (self.memory)
            .load_u64(table + 8 * index, Ordering::Relaxed)
            .ok()?;
        let needed = Self::P | Self::US | Self::A;
        (e & needed == needed).then_some(e)
    }

    fn executable(&self, e: u64) -> bool {
        !self.nxe || e >> 63 == 0
    }

    fn chunk(&self, number: u64) -> Level {
        let va = number << CHUNK_SHIFT;
        let mut table = self.root;
        let (mut writable, mut executable) = (true, true);
        for shift in [39, 30, 21] {
            let Some(e) = self.entry(table, va >> shift & 511) else {
                return Level::Absent;
            };
            writable &= e & Self::RW != 0;
            executable &= self.executable(e);
            table = e & Self::ADDRESS;
            if shift != 39 && e & Self::PS != 0 {
                let size = 1u64 << shift;
                return Level::Large(Leaf {
                    gpa: table & !(size - 1) | va & (size - 1),
                    writable,
                    executable,
                    dirty: e & Self::D != 0,
                });
            }
        }
        Level::Table {
            gpa: table,
            writable,
            executable,
        }
    }

    fn leaf(&self, level: &Level, index: usize) -> Option<Leaf> {
        match *level {
            Level::Absent => None,
            Level::Large(leaf) => Some(Leaf {
                gpa: leaf.gpa + index as u64 * PAGE_SIZE,
                ..leaf
            }),
            Level::Table {
                gpa,
                writable,
                executable,
            } => {
                let e = self.entry(gpa, index as u64)?;
                Some(Leaf {
                    gpa: e & Self::ADDRESS,
                    writable: writable && e & Self::RW != 0,
                    executable: executable && self.executable(e),
                    dirty: e & Self::D != 0,
                })
            }
        }
    }
}

/// Offset in RAM of a page that is plain RAM for loads and stores.
fn ram(memory: &GuestMemory, gpa: u64) -> Option<u64> {
    let off = memory.read_offset(gpa, PAGE_SIZE)?;
    let plain = memory.write_offset(gpa, PAGE_SIZE) == Some(off) && off < memory.size_bytes();
    plain.then_some(off)
}

/// Claims a page for direct stores. False: it must not be written past the engine now.
fn claim_write(memory: &GuestMemory, off: u64) -> bool {
    let flags = memory.page_flags(off);
    if flags.load(Ordering::SeqCst) & (PAGE_CODE | PAGE_DIRTY_LOGGED) != 0 {
        return false;
    }
    // As in `mmu`: say "cached" first, look for code second.
    flags.fetch_or(PAGE_WRITE_CACHED, Ordering::SeqCst);
    flags.load(Ordering::SeqCst) & (PAGE_CODE | PAGE_DIRTY_LOGGED) == 0
}

fn unmap(va: u64, bytes: u64) -> Order {
    [libc::SYS_munmap as u64, va, bytes, 0, 0, 0, 0]
}

impl Space {
    /// A process for the address space with the page tables at `root`.
    /// `tsc`: as for [`Process::start`].
    pub fn new(v: &SoftVcpu, root: u64, tsc: bool) -> Result<Space> {
        let patched = v.vm.patched.file()?;
        let process = Process::start(v.vm.memory.fd().as_fd(), patched.as_fd(), tsc)?;
        Ok(Space {
            root,
            used: 0,
            has_xstate: false,
            stale: false,
            expected: None,
            process,
            chunks: BTreeMap::new(),
            orders: Vec::new(),
            mappings: 0,
            window: WINDOW_MIN,
            window_end: 0,
            bounces: HashMap::new(),
            copies: HashMap::new(),
            rules: Rules {
                xgetbv: true,
                umip: host_has_umip(),
                tsc,
                made: false,
            },
            pages: 0,
            sensitive: 0,
        })
    }

    /// The guest has invalidated translations, or what makes a page writable has changed.
    pub fn invalidate(&mut self) {
        self.stale = true;
    }

    fn peek<'a>(&self, v: &'a SoftVcpu) -> Peek<'a> {
        Peek {
            memory: &v.vm.memory,
            root: self.root,
            nxe: v.frame.cpu.efer & efer::NXE != 0,
        }
    }

    fn entry(&self, va: u64) -> u64 {
        let chunk = self.chunks.get(&(va >> CHUNK_SHIFT));
        chunk.map_or(0, |c| c[index(va)])
    }

    fn set_entry(&mut self, va: u64, entry: u64) {
        let chunk = self.chunks.entry(va >> CHUNK_SHIFT);
        chunk.or_insert_with(|| Box::new([0; CHUNK_PAGES]))[index(va)] = entry;
    }

    /// The program may read the host's time-stamp counter.
    pub fn reads_tsc(&self) -> bool {
        self.rules.tsc
    }

    /// Makes the mappings agree with the page tables before guest code runs.
    pub fn catch_up(&mut self, v: &SoftVcpu) -> Result<()> {
        // The guest may have put something where the program is.
        if self.mappings > MAPPINGS_MAX {
            self.forget()?;
        }
        if std::mem::take(&mut self.stale) {
            self.compare(v);
        }
        if let Some(va) = self.expected.take() {
            self.look_around(v, va);
        }
        self.carry_out().map(|_| ())
    }

    /// Unmaps what the page tables no longer say.
    fn compare(&mut self, v: &SoftVcpu) {
        let peek = self.peek(v);
        let memory = &v.vm.memory;
        let mut chunks = std::mem::take(&mut self.chunks);
        let mut gone: Option<(u64, u64)> = None;
        let mut orders = std::mem::take(&mut self.orders);
        for (number, chunk) in &mut chunks {
            let level = peek.chunk(*number);
            for (n, entry) in chunk.iter_mut().enumerate() {
                let e = *entry;
                if e & PRESENT == 0 {
                    continue;
                }
                let valid = peek.leaf(&level, n).is_some_and(|leaf| {
                    ram(memory, leaf.gpa) == Some(e & OFFSET)
                        && (e & EXECUTE == 0 || leaf.executable)
                        && (e & PATCHED == 0 || self.copy_is_current(v, *number, n, e))
                        && (e & WRITE == 0
                            || leaf.writable && leaf.dirty && claim_write(memory, e & OFFSET))
                });
                if valid {
                    continue;
                }
                *entry = 0;
                let va = (*number << CHUNK_SHIFT) + n as u64 * PAGE_SIZE;
                gone = match gone {
                    Some((start, end)) if end == va => Some((start, va + PAGE_SIZE)),
                    Some((start, end)) => {
                        orders.push(unmap(start, end - start));
                        Some((va, va + PAGE_SIZE))
                    }
                    None => Some((va, va + PAGE_SIZE)),
                };
            }
        }
        if let Some((start, end)) = gone {
            orders.push(unmap(start, end - start));
        }
        chunks.retain(|_, c| c.iter().any(|e| *e != 0));
        self.chunks = chunks;
        self.orders = orders;
    }

    /// True if the copy that an entry maps has not been replaced.
    fn copy_is_current(&self, v: &SoftVcpu, number: u64, n: usize, entry: u64) -> bool {
        let va = (number << CHUNK_SHIFT) + n as u64 * PAGE_SIZE;
        let copy = self.copies.get(&va);
        copy.is_some() && copy == v.vm.patched.find(entry & OFFSET).as_ref()
    }

    /// Unmaps everything.
    fn forget(&mut self) -> Result<()> {
        self.chunks.clear();
        self.bounces.clear();
        self.copies.clear();
        self.mappings = 0;
        self.process.order(&[
            unmap(0, stub::CODE),
            unmap(stub::END, stub::TOP - stub::END),
        ])
    }

    /// Carries out what was ordered. False: the host refused, and nothing is mapped now.
    fn carry_out(&mut self) -> Result<bool> {
        if self.orders.is_empty() {
            return Ok(true);
        }
        let orders = std::mem::take(&mut self.orders);
        let done = self.process.order(&orders);
        self.orders = orders;
        self.orders.clear();
        match done {
            // Too many mappings, or an address that the host does not give away.
            Err(e) if e.kind() == std::io::ErrorKind::OutOfMemory => {
                self.forget()?;
                Ok(false)
            }
            r => r.map(|()| true),
        }
    }

    /// Serves a fault of the guest's code at an address. `rip`: of the instruction, on demand.
    pub fn fault(
        &mut self,
        v: &mut SoftVcpu,
        address: u64,
        rip: impl FnOnce(&Process) -> Result<u64>,
    ) -> Result<Outcome> {
        let va = address & OFFSET;
        if va >= stub::TOP || (stub::CODE..stub::END).contains(&va) {
            return Ok(Outcome::Interpret);
        }
        let known = self.entry(va);
        let kind = if known & PRESENT == 0 {
            AccessKind::Read
        } else if known & WRITE != 0 {
            AccessKind::Execute
        } else if known & EXECUTE != 0 || rip(&self.process)? & OFFSET != va {
            AccessKind::Write
        } else {
            AccessKind::Execute
        };
        // What sets the flags in the tables, or fails as the guest is to see it.
        let Ok(t) = v.walk(address, kind, View::User) else {
            self.expected = (known & PRESENT == 0).then_some(va);
            return Ok(Outcome::Interpret);
        };
        let gpa = t.gpa & OFFSET;
        let Some(off) = ram(&v.vm.memory, gpa) else {
            return Ok(Outcome::Interpret);
        };
        if known & PRESENT != 0 && known & OFFSET != off {
            // The guest changed its tables and did not say so yet: an entry that may go.
            self.orders.push(unmap(va, PAGE_SIZE));
            self.set_entry(va, 0);
            self.carry_out()?;
            return Ok(Outcome::Mapped);
        }
        let mut bits = PRESENT;
        match kind {
            AccessKind::Execute => {
                if known & SENSITIVE != 0 {
                    return Ok(Outcome::Sensitive);
                }
                bits |= known & WRITE;
                if known & WRITE != 0 && !self.bounces_enough(va) {
                    bits &= !WRITE;
                }
                let code = self.code(v, va, gpa, off, t.writable);
                if code & SENSITIVE != 0 {
                    self.set_entry(va, known | SENSITIVE);
                    return Ok(Outcome::Sensitive);
                }
                bits |= code;
                if code & PATCHED != 0 {
                    bits &= !WRITE;
                }
            }
            AccessKind::Write => {
                if !self.may_write(v, off) {
                    return Ok(Outcome::Interpret);
                }
                bits |= WRITE;
                if t.executable && known & EXECUTE != 0 && self.bounces_enough(va) {
                    bits |= EXECUTE;
                }
            }
            AccessKind::Read => {
                let level = Level::Large(Leaf {
                    gpa,
                    writable: t.writable,
                    executable: t.executable,
                    dirty: t.dirty,
                });
                let leaf = self.peek(v).leaf(&level, 0);
                match leaf.and_then(|l| self.wanted(v, va, l)) {
                    Some(e) => bits = e & !OFFSET,
                    None => return Ok(Outcome::Interpret),
                }
            }
        }
        let mut run = Run::default();
        self.add(v, &mut run, va, off | bits);
        self.end(&mut run);
        if known & PRESENT == 0 {
            self.look_around(v, va);
        }
        Ok(match self.carry_out()? {
            true => Outcome::Mapped,
            false => Outcome::Interpret,
        })
    }

    /// True when a page has been written and executed by turns so often that it shall be both.
    fn bounces_enough(&mut self, va: u64) -> bool {
        // LIMIT: pages that are counted.
        if self.bounces.len() > 4096 {
            self.bounces.clear();
        }
        let n = self.bounces.entry(va).or_insert(0);
        *n = n.saturating_add(1);
        *n >= BOUNCES_MAX
    }

    /// Makes a page that the guest stores to fit for direct stores.
    fn may_write(&self, v: &SoftVcpu, off: u64) -> bool {
        let memory = &v.vm.memory;
        let flags = memory.page_flags(off);
        if flags.load(Ordering::SeqCst) & PAGE_DIRTY_LOGGED != 0 {
            memory.log_dirty(off / PAGE_SIZE);
        }
        if flags.load(Ordering::SeqCst) & PAGE_CODE != 0 {
            // The program's data, or code that it makes: what was translated from it goes.
            v.vm.exclusive(v.index, || xlate::drop_page(&v.vm, off));
        }
        claim_write(memory, off)
    }

    /// The entry for a page that is not mapped yet, as far as it can be had without changing the
    /// tables.
    fn wanted(&mut self, v: &SoftVcpu, va: u64, leaf: Leaf) -> Option<u64> {
        let memory = &v.vm.memory;
        let off = ram(memory, leaf.gpa)?;
        let mut bits = PRESENT;
        if leaf.writable && leaf.dirty && claim_write(memory, off) {
            bits |= WRITE;
        } else if leaf.executable && !(leaf.writable && leaf.dirty) {
            bits |= self.code(v, va, leaf.gpa, off, leaf.writable);
        }
        Some(off | bits)
    }

    /// How a page may be executed, as bits of an entry. `writable`: by the program.
    fn code(&mut self, v: &SoftVcpu, va: u64, gpa: u64, off: u64, writable: bool) -> u64 {
        let memory = &v.vm.memory;
        let mut page = [0; PAGE_SIZE as usize];
        if memory.read(gpa, &mut page).is_err() {
            return SENSITIVE;
        }
        let peek = self.peek(v);
        let gpa_of = |va: u64| {
            peek.leaf(&peek.chunk(va >> CHUNK_SHIFT), index(va))
                .map(|l| l.gpa)
        };
        let mut before = [0; scan::BEFORE];
        let before = match va.checked_sub(PAGE_SIZE).and_then(gpa_of) {
            Some(gpa) => {
                let at = gpa + PAGE_SIZE - before.len() as u64;
                memory.read(at, &mut before).map_or(&[][..], |()| &before)
            }
            None => &[],
        };
        let mut next = [0; scan::AFTER];
        let next = match gpa_of(va + PAGE_SIZE) {
            Some(gpa) => memory.read(gpa, &mut next).map_or(&[][..], |()| &next),
            None => &[],
        };
        let rules = Rules {
            made: writable,
            ..self.rules
        };
        let patched = match v.vm.found.nature(before, &page, next, rules) {
            Nature::Plain => return EXECUTE,
            Nature::Patched(places) => v.vm.patched.make(v, off, &page, &places),
            Nature::Sensitive => None,
        };
        if patched.is_some() {
            return EXECUTE | PATCHED;
        }
        self.sensitive += 1;
        SENSITIVE
    }

    /// Maps what is around a page that faulted and has been used before.
    fn look_around(&mut self, v: &SoftVcpu, va: u64) {
        let near = va.wrapping_sub(self.window_end) < self.window * PAGE_SIZE
            || self.window_end.wrapping_sub(va) < 2 * self.window * PAGE_SIZE;
        self.window = if near {
            (2 * self.window).min(WINDOW_MAX)
        } else {
            WINDOW_MIN
        };
        let bytes = self.window * PAGE_SIZE;
        let start = va & !(bytes - 1);
        let end = (start + bytes).min(stub::TOP);
        self.window_end = end;
        let mut run = Run::default();
        let mut level = Level::Absent;
        let mut number = u64::MAX;
        let mut at = start;
        while at < end {
            let here = at;
            at += PAGE_SIZE;
            if self.entry(here) & PRESENT != 0 || (stub::CODE..stub::END).contains(&here) {
                continue;
            }
            let peek = self.peek(v);
            if number != here >> CHUNK_SHIFT {
                number = here >> CHUNK_SHIFT;
                level = peek.chunk(number);
            }
            let Some(leaf) = peek.leaf(&level, index(here)) else {
                continue;
            };
            if let Some(entry) = self.wanted(v, here, leaf) {
                self.add(v, &mut run, here, entry);
            }
        }
        self.end(&mut run);
    }

    fn add(&mut self, v: &SoftVcpu, run: &mut Run, va: u64, entry: u64) {
        self.set_entry(va, entry);
        self.pages += 1;
        let bits = entry & (PRESENT | WRITE | EXECUTE | PATCHED);
        let off = entry & OFFSET;
        let joins = run.bytes != 0
            && bits & PATCHED == 0
            && run.va + run.bytes == va
            && run.off + run.bytes == off
            && run.bits == bits;
        if !joins {
            self.end(run);
            *run = Run {
                va,
                off,
                bits,
                bytes: 0,
                copy: match bits & PATCHED {
                    0 => None,
                    _ => v.vm.patched.find(off),
                },
            };
        }
        run.bytes += PAGE_SIZE;
    }

    fn end(&mut self, run: &mut Run) {
        let run = std::mem::take(run);
        if run.bytes == 0 {
            return;
        }
        let mut protection = libc::PROT_READ;
        if run.bits & WRITE != 0 {
            protection |= libc::PROT_WRITE;
        }
        if run.bits & EXECUTE != 0 {
            protection |= libc::PROT_EXEC;
        }
        self.mappings += 1;
        let (file, off) = match run.bits & PATCHED {
            0 => (stub::RAM_FD, Some(run.off)),
            _ => (stub::PATCHED_FD, run.copy),
        };
        let Some(off) = off else {
            // Written at this very moment: the next fault finds out.
            self.set_entry(run.va, 0);
            return;
        };
        if run.bits & PATCHED != 0 {
            self.copies.insert(run.va, off);
        }
        self.orders.push([
            libc::SYS_mmap as u64,
            run.va,
            run.bytes,
            protection as u64,
            (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64,
            file as u64,
            off,
        ]);
    }

    /// Mappings made since all were dropped.
    pub fn mappings(&self) -> usize {
        self.mappings
    }
}

/// Pages that one mapping serves.
#[derive(Default)]
struct Run {
    va: u64,
    off: u64,
    bytes: u64,
    bits: u64,
    /// Offset of the copy.
    copy: Option<u64>,
}

/// The host keeps user code from reading system registers. CPUID 7, ECX bit 2; Linux then enables it.
fn host_has_umip() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & 1 << 2 != 0
}

/// What tells address spaces apart that have their roots at the same place by turns: where the first
/// two levels of their tables lead.
pub fn fingerprint(memory: &GuestMemory, root: u64) -> u64 {
    let entry = |table: u64, n: u64| {
        let e = memory.load_u64(table + 8 * n, Ordering::Relaxed).ok()?;
        (e & Peek::P != 0).then_some(e & Peek::ADDRESS)
    };
    let mut sum = 0u64;
    // The lower half is the program's.
    for (n, table) in (0..256).filter_map(|n| Some((n, entry(root, n)?))) {
        for (m, e) in (0..512).filter_map(|m| Some((m, entry(table, m)?))) {
            sum = (sum ^ e ^ n << 9 ^ m)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(17);
        }
    }
    sum
}

fn index(va: u64) -> usize {
    (va >> 12) as usize & (CHUNK_PAGES - 1)
}
