//! Linear memory as a vCPU sees it: soft-TLB fills, checks, MMIO, code-page and dirty duties.
//!
//! Every access from Rust goes through here; translated code hits the soft TLB itself and comes
//! here only on a miss. Write entries are withheld while a page holds translated code (the store
//! must drop the translations) or is clean in the dirty log (the store must mark it).

// UNSAFETY: copies to and from guest RAM through host addresses that `GuestMemory` bounds.
#![allow(unsafe_code, reason = "the soft TLB holds host addresses of guest RAM")]

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pyrite_mem::{GuestMemory, PAGE_CODE, PAGE_DIRTY_LOGGED, PAGE_SIZE, PAGE_WRITE_CACHED};
use pyrite_x86::bits::{cr0, cr4, rflags};
use pyrite_x86::paging::{self, AccessKind, PageTables, PagingMode, Translation};

use crate::exception::Exception;
use crate::frame::{NO_PAGE, TLB_ENTRIES, TlbView, VIEWS, View, empty_tag, slot, slot2};
use crate::vcpu::SoftVcpu;

/// On whose behalf memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priv {
    /// The program, at its CPL.
    Current,
    /// The processor itself: descriptor tables, TSS, interrupt stacks' tables (implicit supervisor
    /// access, Intel SDM Vol. 3A §4.6.1).
    System,
}

/// Page-table access for the walk.
struct Tables<'a>(&'a GuestMemory);

impl PageTables for Tables<'_> {
    fn read_entry(&mut self, gpa: u64, size: u8) -> u64 {
        if size == 8 {
            self.0.load_u64(gpa, Ordering::Relaxed).unwrap_or(u64::MAX)
        } else {
            self.0
                .load_u32(gpa, Ordering::Relaxed)
                .map_or(u64::MAX, u64::from)
        }
    }
    fn set_bits(&mut self, gpa: u64, size: u8, old: u64, bits: u64) -> bool {
        let Some(p) = self.0.host_ptr(gpa, u64::from(size)) else {
            return true;
        };
        let done = if size == 8 {
            // SAFETY: in bounds (host_ptr) and aligned, because tables are page-aligned.
            let a = unsafe { AtomicU64::from_ptr(p.cast()) };
            a.compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        } else {
            // SAFETY: as above.
            let a = unsafe { AtomicU32::from_ptr(p.cast()) };
            a.compare_exchange(
                old as u32,
                (old | bits) as u32,
                Ordering::SeqCst,
                Ordering::SeqCst,
            )
            .is_ok()
        };
        if done && let Some(off) = self.0.ram_offset(gpa, u64::from(size)) {
            self.0.mark_written(off, u64::from(size));
        }
        done
    }
}

/// A translated page: where its byte is.
#[derive(Clone, Copy)]
enum Place {
    /// Host address of the byte asked for, and its RAM offset.
    Ram(*mut u8, u64),
    /// Guest-physical address outside RAM.
    Io(u64),
}

/// Side tables of the soft TLBs that emitted code does not read.
pub struct TlbNotes {
    /// Large pages that entries may have come from: page number and log2 of the size.
    large: HashSet<(u64, u8)>,
    /// Slots that may hold something, as (view, slot): non-global ones and global ones; those of
    /// the second level have VIEWS added to the view. A flush touches only these.
    filled: [Vec<(u8, u16)>; 2],
    /// What is in `filled`. Emitted code moves entries from the second level to the first, so what
    /// a slot holds does not tell.
    listed: [[[bool; TLB_ENTRIES]; 2 * VIEWS]; 2],
    /// Likewise for the fetch entries, as (user, slot).
    fetched: [Vec<(u8, u16)>; 2],
    fetch: [[FetchEntry; FETCH_ENTRIES]; 2],
}

const FETCH_ENTRIES: usize = 256;

/// LIMIT: large pages that are remembered; a guest can map more of them than the host has memory to
/// list. When it is reached everything is dropped, which is always allowed.
const LARGE_MAX: usize = 4096;

#[derive(Clone, Copy)]
struct FetchEntry {
    /// Linear page address; odd = empty.
    tag: u64,
    /// Guest-physical address of the page.
    gpa: u64,
    global: bool,
    shift: u8,
}

/// Where code is fetched from.
#[derive(Clone, Copy, Debug)]
pub struct Fetched {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    /// The page is global.
    pub global: bool,
    /// log2 of the page's size.
    pub shift: u8,
}

const NO_FETCH: FetchEntry = FetchEntry {
    tag: 1,
    gpa: 0,
    global: false,
    shift: 12,
};

impl Default for TlbNotes {
    fn default() -> Self {
        TlbNotes {
            listed: [[[false; TLB_ENTRIES]; 2 * VIEWS]; 2],
            large: HashSet::new(),
            filled: [Vec::new(), Vec::new()],
            fetched: [Vec::new(), Vec::new()],
            fetch: [[NO_FETCH; FETCH_ENTRIES]; 2],
        }
    }
}

impl TlbNotes {
    /// Notes that a slot may hold something from a global page, or from one that is not.
    fn list(&mut self, global: bool, v: usize, n: usize) {
        let k = usize::from(global);
        if !std::mem::replace(&mut self.listed[k][v][n], true) {
            self.filled[k].push((v as u8, n as u16));
        }
    }
}

fn clear_slot(t: &mut TlbView, n: usize) {
    t.read[n] = empty_tag(n);
    t.write[n] = empty_tag(n);
}

fn clear_slot2(t: &mut TlbView, n: usize) {
    t.read[n] = NO_PAGE;
    t.write[n] = NO_PAGE;
}

impl SoftVcpu {
    /// The view that data accesses on behalf of `who` use now.
    pub fn view(&self, who: Priv) -> View {
        let cpu = &self.frame.cpu;
        if who == Priv::Current && cpu.cpl() == 3 {
            View::User
        } else if cpu.cr4 & cr4::SMAP != 0 && (who == Priv::System || cpu.rflags & rflags::AC == 0)
        {
            View::SupervisorSmap
        } else {
            View::Supervisor
        }
    }

    fn paging_mode(&self, view: View) -> PagingMode {
        let c = &self.frame.cpu;
        PagingMode {
            cr0: c.cr0,
            cr3: c.cr3,
            cr4: c.cr4,
            efer: c.efer,
            ac: view == View::Supervisor,
            pdpte: c.pdpte,
            maxphyaddr: self.vm.maxphyaddr,
        }
    }

    /// Walks the page tables for a data access or a fetch; sets A/D bits.
    pub fn walk(
        &mut self,
        lin: u64,
        kind: AccessKind,
        view: View,
    ) -> Result<Translation, Exception> {
        let mode = self.paging_mode(view);
        let user = view == View::User;
        paging::walk(&mode, &mut Tables(&self.vm.memory), lin, kind, user, false)
            .map_err(|code| Exception::pf(lin, code))
    }

    /// Translates the byte at `lin` and fills the soft TLB when the page is plain RAM.
    /// With `Write`, the dirty log has been told; code pages are the caller's duty.
    fn locate(&mut self, lin: u64, kind: AccessKind, view: View) -> Result<Place, Exception> {
        if let Some(place) = self.second_level(lin, kind, view) {
            return Ok(place);
        }
        let t = self.walk(lin, kind, view)?;
        let page_gpa = t.gpa & !(PAGE_SIZE - 1);
        let in_page = t.gpa & (PAGE_SIZE - 1);
        if self.is_apic_page(page_gpa) {
            return Ok(Place::Io(t.gpa));
        }
        let memory = &self.vm.memory;
        let Some(off) = memory.read_offset(page_gpa, PAGE_SIZE) else {
            return Ok(Place::Io(t.gpa));
        };
        // Stores that do not reach what loads reach go to the bus: to ROM, or past it to RAM.
        if kind == AccessKind::Write && memory.write_offset(page_gpa, PAGE_SIZE) != Some(off) {
            return Ok(Place::Io(t.gpa));
        }
        // SAFETY: read_offset proved that the page is inside the mapping.
        let host_page = unsafe { self.vm.memory.host_base().add(off as usize) };
        let flags = self.vm.memory.page_flags(off);
        let logged = flags.load(Ordering::Relaxed) & PAGE_DIRTY_LOGGED != 0;
        // A page that is dirty already may as well be written from now on: one walk less.
        let store = kind == AccessKind::Write
            || t.writable
                && t.dirty
                && !logged
                && memory.write_offset(page_gpa, PAGE_SIZE) == Some(off);
        let mut may_write = false;
        if store {
            if logged {
                self.vm.memory.log_dirty(off / PAGE_SIZE);
            }
            // Say "cached" first, look for code second: a translator sets "code" first and looks
            // for "cached" second, so one of the two sees the other.
            flags.fetch_or(PAGE_WRITE_CACHED, Ordering::SeqCst);
            may_write = flags.load(Ordering::SeqCst) & PAGE_CODE == 0;
        }
        self.fill(lin, view, host_page, &t, may_write);
        // SAFETY: in_page < PAGE_SIZE.
        Ok(Place::Ram(
            unsafe { host_page.add(in_page as usize) },
            off + in_page,
        ))
    }

    fn fill(&mut self, lin: u64, view: View, host: *mut u8, t: &Translation, may_write: bool) {
        // A page with a data breakpoint is never cached: every access must be looked at.
        if self.has_data_breakpoint(lin) {
            return;
        }
        let (v, n) = (view as usize, slot(lin));
        let page = lin & !(PAGE_SIZE - 1);
        let entry = &mut self.frame.tlb[v];
        let host = host as u64;
        let same = entry.read[n] == page && entry.host[n] == host;
        entry.read[n] = page;
        entry.host[n] = host;
        entry.delta[n] = host.wrapping_sub(page);
        if may_write {
            entry.write[n] = page;
        } else if !same {
            entry.write[n] = empty_tag(n);
        }
        self.notes.list(t.global, v, n);
        let write = self.frame.tlb[v].write[n];
        let n2 = slot2(lin);
        let second = &mut self.frame.tlb2[v];
        self.notes.list(t.global, v + VIEWS, n2);
        second.read[n2] = page;
        second.host[n2] = host;
        second.write[n2] = if write == page { page } else { NO_PAGE };
        self.note_large(lin, t.page_shift);
    }

    fn note_large(&mut self, lin: u64, shift: u8) {
        if shift > 12 {
            if self.notes.large.len() >= LARGE_MAX {
                self.flush_tlb(false);
            }
            self.notes.large.insert((lin >> shift, shift));
        }
    }

    /// Serves an access from the second level, and puts the entry into the first.
    fn second_level(&mut self, lin: u64, kind: AccessKind, view: View) -> Option<Place> {
        let (v, n, n2) = (view as usize, slot(lin), slot2(lin));
        let page = lin & !(PAGE_SIZE - 1);
        let second = &self.frame.tlb2[v];
        let found = match kind {
            AccessKind::Read => second.read[n2] == page,
            AccessKind::Write => second.write[n2] == page,
            AccessKind::Execute => false,
        };
        if !found {
            return None;
        }
        let (write, host) = (second.write[n2], second.host[n2]);
        let first = &mut self.frame.tlb[v];
        first.read[n] = page;
        first.write[n] = if write == page { page } else { empty_tag(n) };
        first.host[n] = host;
        first.delta[n] = host.wrapping_sub(page);
        let at = host + (lin & (PAGE_SIZE - 1));
        let off = at - self.vm.memory.host_base() as u64;
        Some(Place::Ram(at as *mut u8, off))
    }

    pub(crate) fn has_data_breakpoint(&self, lin: u64) -> bool {
        if self.debug.watches_page(lin) {
            return true;
        }
        let c = &self.frame.cpu;
        if c.dr[7] & 0xff == 0 {
            return false;
        }
        (0..4).any(|n| {
            c.dr[7] >> (2 * n) & 3 != 0
                && c.dr[7] >> (16 + 4 * n) & 3 != 0
                && (c.dr[n] ^ lin) >> 12 == 0
        })
    }

    /// Host address of `len` bytes at `lin` from the soft TLB alone.
    #[inline]
    pub(crate) fn hit(&self, lin: u64, len: usize, view: View, write: bool) -> Option<*mut u8> {
        let t = &self.frame.tlb[view as usize];
        let n = slot(lin);
        let tag = if write { t.write[n] } else { t.read[n] };
        let off = lin ^ tag;
        (off <= PAGE_SIZE - len as u64).then(|| (t.host[n] + off) as *mut u8)
    }

    /// Makes the soft TLB able to serve an access, for translated code.
    ///
    /// True: try again. False: the access needs the interpreter (MMIO, page crossing, code page).
    pub fn refill(
        &mut self,
        lin: u64,
        len: usize,
        write: bool,
        view: View,
    ) -> Result<bool, Exception> {
        if (lin & (PAGE_SIZE - 1)) as usize + len > PAGE_SIZE as usize {
            return Ok(false);
        }
        let kind = if write {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        self.locate(lin, kind, view)?;
        Ok(self.hit(lin, len, view, write).is_some())
    }

    /// Reads linear memory. On an exception nothing was read.
    #[inline]
    pub fn read_bytes(&mut self, lin: u64, out: &mut [u8], who: Priv) -> Result<(), Exception> {
        let view = self.view(who);
        if let Some(p) = self.hit(lin, out.len(), view, false) {
            // SAFETY: a hit proves that len bytes at p are inside one page of guest RAM.
            unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), out.len()) };
            return Ok(());
        }
        self.read_slow(lin, out, view)
    }

    #[cold]
    fn read_slow(&mut self, lin: u64, out: &mut [u8], view: View) -> Result<(), Exception> {
        let mut done = 0;
        while done < out.len() {
            let at = self.wrap(lin.wrapping_add(done as u64));
            let room = (PAGE_SIZE - (at & (PAGE_SIZE - 1))) as usize;
            let n = room.min(out.len() - done);
            self.note_data_access(at, n, false);
            match self.locate(at, AccessKind::Read, view)? {
                Place::Ram(p, _) => {
                    // SAFETY: n bytes from p stay inside the page.
                    unsafe {
                        std::ptr::copy_nonoverlapping(p, out[done..].as_mut_ptr(), n);
                    }
                }
                Place::Io(gpa) => self.io_read(gpa, &mut out[done..done + n]),
            }
            done += n;
        }
        Ok(())
    }

    /// Writes linear memory. On an exception nothing was written.
    #[inline]
    pub fn write_bytes(&mut self, lin: u64, data: &[u8], who: Priv) -> Result<(), Exception> {
        let view = self.view(who);
        if let Some(p) = self.hit(lin, data.len(), view, true) {
            store(p, data);
            return Ok(());
        }
        self.write_slow(lin, data, view)
    }

    #[cold]
    fn write_slow(&mut self, lin: u64, data: &[u8], view: View) -> Result<(), Exception> {
        // LIMIT: an operand is at most 4 KiB (callers pass registers), so it spans two pages.
        let lin = self.wrap(lin);
        let first = ((PAGE_SIZE - (lin & (PAGE_SIZE - 1))) as usize).min(data.len());
        let p1 = self.locate(lin, AccessKind::Write, view)?;
        let p2 = if first < data.len() {
            let at = self.wrap(lin.wrapping_add(first as u64));
            Some((at, self.locate(at, AccessKind::Write, view)?))
        } else {
            None
        };
        self.note_data_access(lin, first, true);
        self.store_place(p1, &data[..first]);
        if let Some((at, p)) = p2 {
            self.note_data_access(at, data.len() - first, true);
            self.store_place(p, &data[first..]);
        }
        Ok(())
    }

    fn store_place(&mut self, place: Place, data: &[u8]) {
        match place {
            Place::Ram(p, off) => {
                if self.vm.memory.page_flags(off).load(Ordering::SeqCst) & PAGE_CODE == 0 {
                    store(p, data);
                } else {
                    self.store_to_code_page(off, data.len(), || store(p, data));
                }
            }
            Place::Io(gpa) => self.io_write(gpa, data),
        }
    }

    /// Performs a store into a page that holds translated code. If the bytes themselves were
    /// translated, all vCPUs drop those translations before any of them runs on.
    fn store_to_code_page(&mut self, ram_offset: u64, len: usize, store: impl FnOnce()) {
        let vm = std::sync::Arc::clone(&self.vm);
        if crate::xlate::covers(&vm, ram_offset, len) {
            vm.exclusive(self.index, || {
                store();
                crate::xlate::drop_page(&vm, ram_offset);
            });
            return;
        }
        store();
        // A translator marks first and reads second; we store first and look second. If it read
        // the old bytes, its mark is visible here.
        std::sync::atomic::fence(Ordering::SeqCst);
        if crate::xlate::covers(&vm, ram_offset, len) {
            vm.exclusive(self.index, || crate::xlate::drop_page(&vm, ram_offset));
        }
    }

    /// Host address for a read-modify-write of `len` bytes, checked as a write.
    ///
    /// `None`: not one page of RAM without translated code; the caller reads, computes and writes
    /// (inside [`SoftVcpu::exclusive`] for a locked instruction).
    pub fn rmw_ptr(
        &mut self,
        lin: u64,
        len: usize,
        who: Priv,
    ) -> Result<Option<*mut u8>, Exception> {
        let view = self.view(who);
        if let Some(p) = self.hit(lin, len, view, true) {
            return Ok(Some(p));
        }
        self.probe_write(lin, len, who)?;
        Ok(self.hit(lin, len, view, true))
    }

    /// Checks that a write of `len` bytes would succeed, without writing.
    pub fn probe_write(&mut self, lin: u64, len: usize, who: Priv) -> Result<(), Exception> {
        self.probe(lin, len, AccessKind::Write, who)
    }

    /// Checks that an access of `len` bytes (at most 4 KiB) would succeed.
    pub fn probe(
        &mut self,
        lin: u64,
        len: usize,
        kind: AccessKind,
        who: Priv,
    ) -> Result<(), Exception> {
        let view = self.view(who);
        self.locate(lin, kind, view)?;
        let last = self.wrap(lin.wrapping_add(len.max(1) as u64 - 1));
        if (last ^ lin) & !(PAGE_SIZE - 1) != 0 {
            self.locate(last & !(PAGE_SIZE - 1), kind, view)?;
        }
        Ok(())
    }

    /// Linear addresses are 32 bits wide outside IA-32e mode.
    fn wrap(&self, lin: u64) -> u64 {
        if self.frame.cpu.efer & pyrite_x86::bits::efer::LMA != 0 {
            lin
        } else {
            lin & 0xffff_ffff
        }
    }

    /// Guest-physical address of the code byte at linear `lin`, checked as a fetch at the CPL.
    pub fn fetch_gpa(&mut self, lin: u64) -> Result<u64, Exception> {
        self.fetch_page(lin).map(|f| f.gpa)
    }

    /// Like [`SoftVcpu::fetch_gpa`], and what kind of page it is.
    pub fn fetch_page(&mut self, lin: u64) -> Result<Fetched, Exception> {
        let user = self.frame.cpu.cpl() == 3;
        let n = (lin >> 12) as usize & (FETCH_ENTRIES - 1);
        let page = lin & !(PAGE_SIZE - 1);
        let e = self.notes.fetch[usize::from(user)][n];
        if e.tag == page {
            return Ok(Fetched {
                gpa: e.gpa | (lin & (PAGE_SIZE - 1)),
                global: e.global,
                shift: e.shift,
            });
        }
        let view = if user { View::User } else { View::Supervisor };
        let t = self.walk(lin, AccessKind::Execute, view)?;
        self.note_large(lin, t.page_shift);
        if e.tag == NO_FETCH.tag || e.global != t.global {
            self.notes.fetched[usize::from(t.global)].push((u8::from(user), n as u16));
        }
        self.notes.fetch[usize::from(user)][n] = FetchEntry {
            tag: page,
            gpa: t.gpa & !(PAGE_SIZE - 1),
            global: t.global,
            shift: t.page_shift,
        };
        Ok(Fetched {
            gpa: t.gpa,
            global: t.global,
            shift: t.page_shift,
        })
    }

    /// Fetches up to 15 code bytes at linear `lin`. Returns how many could be read and, when a
    /// second page is needed but faults, its fault, which counts only if the instruction reaches
    /// into it.
    pub fn fetch(
        &mut self,
        lin: u64,
        out: &mut [u8; 15],
    ) -> Result<(usize, Option<Exception>), Exception> {
        let gpa = self.fetch_gpa(lin)?;
        let room = ((PAGE_SIZE - (lin & (PAGE_SIZE - 1))) as usize).min(15);
        self.read_phys(gpa, &mut out[..room]);
        if room == 15 {
            return Ok((15, None));
        }
        match self.fetch_gpa(self.wrap(lin.wrapping_add(room as u64))) {
            Ok(gpa2) => {
                self.read_phys(gpa2, &mut out[room..]);
                Ok((15, None))
            }
            Err(e) => Ok((room, Some(e))),
        }
    }

    /// Reads guest-physical memory, RAM or not.
    pub fn read_phys(&mut self, gpa: u64, out: &mut [u8]) {
        if self.vm.memory.read(gpa, out).is_err() {
            self.io_read(gpa, out);
        }
    }

    fn io_read(&mut self, gpa: u64, out: &mut [u8]) {
        self.stats.mmio_reads += 1;
        if self.is_apic_page(gpa & !(PAGE_SIZE - 1)) {
            crate::apic::mmio_read(&self.vm, self.index, gpa & 0xfff, out);
        } else {
            for part in out.chunks_mut(8).enumerate() {
                self.vm
                    .io
                    .mmio_read(self.index, gpa + 8 * part.0 as u64, part.1);
            }
        }
    }

    fn io_write(&mut self, gpa: u64, data: &[u8]) {
        self.stats.mmio_writes += 1;
        if self.is_apic_page(gpa & !(PAGE_SIZE - 1)) {
            crate::apic::mmio_write(&self.vm, self.index, gpa & 0xfff, data);
            // What was masked may be deliverable now.
            self.irq_waiting = true;
        } else {
            for part in data.chunks(8).enumerate() {
                self.vm
                    .io
                    .mmio_write(self.index, gpa + 8 * part.0 as u64, part.1);
            }
        }
    }

    /// The xAPIC page is enabled and here. Intel SDM Vol. 3A §10.4.4.
    fn is_apic_page(&self, page_gpa: u64) -> bool {
        let base = self.frame.cpu.msrs.apic_base;
        // Enabled (bit 11) and not in x2APIC mode (bit 10).
        base & 0xc00 == 0x800 && page_gpa == base & 0x000f_ffff_ffff_f000
    }

    /// Runs `f` while no other vCPU runs; for locked instructions that cannot be the host's.
    pub fn exclusive<R>(&mut self, f: impl FnOnce(&mut SoftVcpu) -> R) -> R {
        let vm = std::sync::Arc::clone(&self.vm);
        vm.exclusive(self.index, || f(self))
    }

    /// Empties the soft TLBs: MOV to CR3 (`keep_global`), changes of CR0, CR4, EFER, INVPCID.
    pub fn flush_tlb(&mut self, keep_global: bool) {
        self.stats.tlb_flushes += 1;
        self.direct.invalidate();
        let lists = if keep_global { 1 } else { 2 };
        for k in 0..lists {
            // A slot may be in both lists, and twice in one. What the first level holds may have
            // come from the second, so all slots of the list go.
            let mut filled = std::mem::take(&mut self.notes.filled[k]);
            for (v, n) in filled.drain(..) {
                let (v, n) = (usize::from(v), usize::from(n));
                self.notes.listed[k][v][n] = false;
                if v < VIEWS {
                    clear_slot(&mut self.frame.tlb[v], n);
                } else {
                    clear_slot2(&mut self.frame.tlb2[v - VIEWS], n);
                }
            }
            self.notes.filled[k] = filled;
            let mut fetched = std::mem::take(&mut self.notes.fetched[k]);
            for (u, n) in fetched.drain(..) {
                let e = &mut self.notes.fetch[usize::from(u)][usize::from(n)];
                if !keep_global || !e.global {
                    *e = NO_FETCH;
                }
            }
            self.notes.fetched[k] = fetched;
        }
        if !keep_global {
            self.notes.large.clear();
        }
        crate::xlate::forget_code_pages(self, keep_global);
    }

    /// INVLPG: drops what is cached for the page around `lin`, large pages included.
    pub fn flush_page(&mut self, lin: u64) {
        // A part of a large page goes with all of it; that is rare enough to drop everything.
        let sizes = [21, 22, 30];
        if (sizes.iter()).any(|&shift| self.notes.large.contains(&(lin >> shift, shift))) {
            self.flush_tlb(false);
            return;
        }
        if lin >> 47 == 0 {
            self.direct.invalidate();
        }
        let page = lin & !(PAGE_SIZE - 1);
        for v in 0..VIEWS {
            if self.frame.tlb[v].read[slot(lin)] == page {
                clear_slot(&mut self.frame.tlb[v], slot(lin));
            }
            if self.frame.tlb2[v].read[slot2(lin)] == page {
                clear_slot2(&mut self.frame.tlb2[v], slot2(lin));
            }
        }
        for side in &mut self.notes.fetch {
            for e in side.iter_mut().filter(|e| e.tag == page) {
                *e = NO_FETCH;
            }
        }
        crate::xlate::forget_code_page(self, lin);
        // LIMIT: INVLPG in a loop refills slots that are in the lists already.
        if self.notes.fetched.iter().map(Vec::len).sum::<usize>() > 16 * FETCH_ENTRIES {
            self.flush_tlb(false);
        }
    }

    /// Drops all write permission (dirty logging begins a round).
    pub fn drop_write_entries(&mut self) {
        self.direct.invalidate();
        for v in 0..VIEWS {
            for n in 0..TLB_ENTRIES {
                self.frame.tlb[v].write[n] = empty_tag(n);
                self.frame.tlb2[v].write[n] = NO_PAGE;
            }
        }
    }

    /// Reads a little-endian value of 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn read_uint(&mut self, lin: u64, size: usize, who: Priv) -> Result<u64, Exception> {
        let mut b = [0u8; 8];
        self.read_bytes(lin, &mut b[..size], who)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Writes the low `size` (1, 2, 4 or 8) bytes of a value.
    #[inline]
    pub fn write_uint(
        &mut self,
        lin: u64,
        value: u64,
        size: usize,
        who: Priv,
    ) -> Result<(), Exception> {
        self.write_bytes(lin, &value.to_le_bytes()[..size], who)
    }

    /// True when linear addresses are translated.
    pub fn paging(&self) -> bool {
        self.frame.cpu.cr0 & cr0::PG != 0
    }
}

/// Stores with the atomicity that x86 promises: naturally aligned 2-, 4- and 8-byte stores are
/// single accesses.
#[inline]
fn store(p: *mut u8, data: &[u8]) {
    // SAFETY: callers pass p with data.len() bytes of guest RAM behind it.
    unsafe {
        match (data.len(), p as usize % data.len().max(1)) {
            (8, 0) => {
                let mut b = [0; 8];
                b.copy_from_slice(data);
                AtomicU64::from_ptr(p.cast()).store(u64::from_ne_bytes(b), Ordering::Release);
            }
            (4, 0) => {
                let mut b = [0; 4];
                b.copy_from_slice(data);
                AtomicU32::from_ptr(p.cast()).store(u32::from_ne_bytes(b), Ordering::Release);
            }
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()),
        }
    }
}
