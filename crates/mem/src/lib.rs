//! Guest-physical memory: RAM regions in one memfd, dirty log, code-page notices, discard.
//!
//! RAM is mapped once, contiguously, so that `host = base + ram_offset`. Guest-physical space
//! below 4 GiB has a hole for PCI; RAM that does not fit below it continues at 4 GiB.
//!
//! Every access is bounds-checked against the layout; guest memory is shared with running vCPUs,
//! so its content may change between two reads. Nothing here hands out references into it.
//!
//! # Read-only memory and shadow RAM
//!
//! A machine that starts with firmware ([`GuestMemory::with_rom`]) has ROM that ends at 4 GiB, in
//! the same mapping behind the RAM, and says for each page from A0000H to FFFFFH whether loads and
//! stores go to RAM, to ROM or to devices ([`GuestMemory::set_route`]). Other machines have RAM
//! there. What is not reached by a load or store is no RAM to it: engines take it to the bus.
//!
//! # Page flags
//!
//! One byte per 4 KiB page tells engines and devices what must happen on a write:
//! [`PAGE_CODE`] (translated code was made from this page), [`PAGE_WRITE_CACHED`] (a soft TLB may
//! hold a write entry), [`PAGE_DIRTY_LOGGED`] (writes must be logged). Device writes through
//! [`GuestMemory::write`] call the code listener for pages with `PAGE_CODE`.

// UNSAFETY: this crate owns the mapping of guest RAM; each block states why it is in bounds.
#![allow(
    unsafe_code,
    reason = "the only crate that touches guest RAM for everybody else"
)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

mod device;
mod route;
mod shared;
#[cfg(test)]
mod tests;

pub use device::{DeviceMemory, Layout};
pub use route::{LEGACY_END, LEGACY_START, Route};
pub use shared::SharedMemory;

/// Page size in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// End of RAM below 4 GiB of a machine that starts with firmware: firmware for this chipset puts
/// PCI Express configuration space at 2.75 GiB (B0000000H) or above, and BARs around it.
pub const FIRMWARE_LOW_RAM_END: u64 = 0x8000_0000;
/// First guest-physical address of the PCI hole: RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM that does not fit below the hole starts here.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Translated code was made from bytes in this page.
pub const PAGE_CODE: u8 = 1 << 0;
/// Some soft TLB may hold a write entry for this page.
pub const PAGE_WRITE_CACHED: u8 = 1 << 1;
/// Writes to this page are being logged and it is not dirty yet.
pub const PAGE_DIRTY_LOGGED: u8 = 1 << 2;

/// Why guest memory could not be created or accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The range is not entirely RAM.
    #[error("guest-physical range {gpa:#x}+{len:#x} is not RAM")]
    NotRam {
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The size is not a positive multiple of 4 KiB, or absurd.
    #[error("guest memory size {0} must be a multiple of 4 KiB between 1 MiB and 16 TiB")]
    BadSize(u64),
    /// The ROM is empty, not of whole pages, or too large for its place below 4 GiB.
    #[error("a ROM of {0} bytes must have whole 4 KiB pages, and 16 MiB at most")]
    BadRom(u64),
    /// The host refused.
    #[error("cannot {what} guest memory")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
}

/// One contiguous range of RAM in guest-physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Offset of the first byte in the memfd and in the mapping.
    pub ram_offset: u64,
}

/// A range of guest-physical space and the memory that is mapped there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Offset of the first byte in the memfd and in the mapping.
    pub ram_offset: u64,
    /// Stores do not reach it.
    pub read_only: bool,
}

/// What an engine is told of memory.
pub trait CodeListener: Send + Sync {
    /// The page at `page_gpa` (4 KiB aligned), which has [`PAGE_CODE`], was or is about to be
    /// written by something other than the engine itself: drop translations made from it.
    fn code_written(&self, page_gpa: u64);
    /// Other memory is mapped at the pages from `first` to `last` (4 KiB aligned): drop what was
    /// translated from them and what is known of where they are, before the calling vCPU goes on
    /// to its next instruction. Called by the vCPU thread that changed the mapping, or while all
    /// vCPUs are stopped.
    fn mapping_changed(&self, first: u64, last: u64);
}

/// The RAM of one VM.
pub struct GuestMemory {
    base: *mut u8,
    /// RAM; the ROM follows it in the mapping.
    size_bytes: u64,
    rom_bytes: u64,
    /// RAM, ROM and memories of devices.
    mapped_bytes: u64,
    /// Where A0000H-FFFFFH lead, if they are not just RAM.
    routes: Option<route::Routes>,
    windows: Vec<device::DeviceWindow>,
    fd: OwnedFd,
    large_pages: bool,
    regions: Vec<RamRegion>,
    page_flags: Box<[AtomicU8]>,
    dirty: Box<[AtomicU64]>,
    dirty_logging: AtomicBool,
    listener: OnceLock<Box<dyn CodeListener>>,
}

// SAFETY: the mapping lives as long as the value, is only reached through raw copies and atomics,
// and all bookkeeping is atomic.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Reserves `size_bytes` of zeroed RAM. Pages are taken from the host when first touched.
    pub fn new(size_bytes: u64) -> Result<GuestMemory, MemError> {
        GuestMemory::with_layout(&Layout {
            ram_bytes: size_bytes,
            ..Layout::default()
        })
    }

    /// True if the host gives large pages to it.
    pub fn large_pages(&self) -> bool {
        self.large_pages
    }

    /// RAM as [`GuestMemory::new`], but below 4 GiB it ends at [`FIRMWARE_LOW_RAM_END`], and with
    /// `rom` (whole pages, at most 16 MiB) just below 4 GiB. Loads from A0000H-FFFFFH go to the
    /// ROM's last pages or to devices, as after power-on.
    pub fn with_rom(size_bytes: u64, rom: &[u8]) -> Result<GuestMemory, MemError> {
        if rom.is_empty() {
            return Err(MemError::BadRom(0));
        }
        GuestMemory::with_layout(&Layout {
            ram_bytes: size_bytes,
            rom: rom.to_vec(),
            ..Layout::default()
        })
    }

    /// Everything that `layout` names; RAM and device memories are zeroed. Device memories are seen
    /// nowhere at first.
    pub fn with_layout(layout: &Layout) -> Result<GuestMemory, MemError> {
        let (size_bytes, rom) = (layout.ram_bytes, &layout.rom[..]);
        // LIMIT: what is between the local APICs' page and 4 GiB.
        let bytes = rom.len() as u64;
        if bytes > 16 << 20 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemError::BadRom(bytes));
        }
        let low_end = match bytes {
            0 => LOW_RAM_END,
            _ => FIRMWARE_LOW_RAM_END,
        };
        // LIMIT: 1 MiB (real-mode memory map) to 16 TiB.
        if !size_bytes.is_multiple_of(PAGE_SIZE) || !(1 << 20..=1 << 44).contains(&size_bytes) {
            return Err(MemError::BadSize(size_bytes));
        }
        let after_rom = size_bytes + rom.len() as u64;
        let (windows, mapped_bytes) = device::DeviceWindow::all(after_rom, &layout.device_bytes)?;
        let os = |what| move |source| MemError::Os { what, source };
        let shared = SharedMemory::new(c"guest-ram", mapped_bytes).map_err(os("create"))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let base = shared
            .map(mapped_bytes as usize, protection)
            .map_err(os("map"))?;
        // SAFETY: the ROM's bytes follow the RAM's in the range just mapped.
        unsafe {
            let at = base.add(size_bytes as usize);
            std::ptr::copy_nonoverlapping(rom.as_ptr(), at, rom.len());
        }
        let low = size_bytes.min(low_end);
        let mut regions = Vec::new();
        let mut add = |gpa: u64, end: u64| {
            if end > gpa {
                regions.push(RamRegion {
                    gpa,
                    size_bytes: end - gpa,
                    ram_offset: gpa,
                });
            }
        };
        // With ROM, routes say what the window is.
        if layout.has_video_window && rom.is_empty() {
            add(0, low.min(device::VIDEO_WINDOW_START));
            add(device::VIDEO_WINDOW_END, low);
        } else {
            add(0, low);
        }
        if size_bytes > low {
            regions.push(RamRegion {
                gpa: HIGH_RAM_START,
                size_bytes: size_bytes - low,
                ram_offset: low,
            });
        }
        let pages = (mapped_bytes / PAGE_SIZE) as usize;
        Ok(GuestMemory {
            base,
            size_bytes,
            rom_bytes: rom.len() as u64,
            mapped_bytes,
            windows,
            routes: (!rom.is_empty()).then(route::Routes::default),
            fd: shared.fd,
            large_pages: shared.large_pages,
            regions,
            page_flags: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            dirty_logging: AtomicBool::new(false),
            listener: OnceLock::new(),
        })
    }

    /// Total RAM in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of the mapping: RAM, ROM and device memories. Offsets are less than this.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes
    }

    /// End of RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        let mut low = self.regions.iter().filter(|r| r.gpa < HIGH_RAM_START);
        low.next_back().map_or(0, |r| r.gpa + r.size_bytes)
    }

    /// The RAM ranges, ascending. RAM at A0000H-FFFFFH is among them whether it is mapped or not.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The memfd behind the RAM.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Host address of RAM offset 0. The mapping is `mapped_bytes` long and lives with `self`.
    pub fn host_base(&self) -> *mut u8 {
        self.base
    }

    /// Who hears of device writes to code pages. May be set once; later calls are ignored.
    pub fn set_code_listener(&self, listener: Box<dyn CodeListener>) {
        let _ = self.listener.set(listener);
    }

    /// RAM offset of `gpa` if `len` bytes from there are RAM in one region, for loads and stores.
    pub fn ram_offset(&self, gpa: u64, len: u64) -> Option<u64> {
        let at = self.write_offset(gpa, len)?;
        (self.read_offset(gpa, len) == Some(at)).then_some(at)
    }

    /// Offset of what loads of `len` bytes from `gpa` reach, if it is RAM or ROM in one piece.
    pub fn read_offset(&self, gpa: u64, len: u64) -> Option<u64> {
        match &self.routes {
            None => self.in_regions(gpa, len),
            Some(r) => self.routed(r, gpa, len, false),
        }
        .or_else(|| self.in_windows(gpa, len))
    }

    /// Offset of what stores of `len` bytes to `gpa` reach, if it is RAM in one piece.
    pub fn write_offset(&self, gpa: u64, len: u64) -> Option<u64> {
        match &self.routes {
            None => self.in_regions(gpa, len),
            Some(r) => self.routed(r, gpa, len, true),
        }
        .or_else(|| self.in_windows(gpa, len))
    }

    fn in_windows(&self, gpa: u64, len: u64) -> Option<u64> {
        self.windows.iter().find_map(|w| w.offset(gpa, len))
    }

    fn in_regions(&self, gpa: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let off = gpa.checked_sub(r.gpa)?;
            let end = off.checked_add(len)?;
            (off < r.size_bytes && end <= r.size_bytes).then_some(r.ram_offset + off)
        })
    }

    /// Host address of `gpa` if `len` bytes from there are RAM in one region, for loads and
    /// stores.
    ///
    /// The caller takes over the duties of a write: dirty log and code notice.
    pub fn host_ptr(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        self.at(self.ram_offset(gpa, len)?)
    }

    /// Host address of what loads of `len` bytes from `gpa` reach, if it is in one piece.
    pub fn read_ptr(&self, gpa: u64, len: u64) -> Option<*const u8> {
        self.at(self.read_offset(gpa, len)?)
            .map(<*mut u8>::cast_const)
    }

    fn at(&self, off: u64) -> Option<*mut u8> {
        // SAFETY: offsets that the look-ups return are within the mapping.
        (off < self.mapped_bytes()).then(|| unsafe { self.base.add(off as usize) })
    }

    /// Guest-physical address of a RAM offset, of ROM the one below 4 GiB.
    pub fn gpa_of_offset(&self, ram_offset: u64) -> Option<u64> {
        if let Some(off) = ram_offset.checked_sub(self.size_bytes) {
            let rom = (off < self.rom_bytes).then(|| HIGH_RAM_START - self.rom_bytes + off);
            return rom.or_else(|| self.windows.iter().find_map(|w| w.gpa_of(ram_offset)));
        }
        self.regions.iter().find_map(|r| {
            let off = ram_offset.checked_sub(r.ram_offset)?;
            (off < r.size_bytes).then_some(r.gpa + off)
        })
    }

    /// The flags of the page at a RAM offset. Panics if the offset is outside RAM.
    pub fn page_flags(&self, ram_offset: u64) -> &AtomicU8 {
        &self.page_flags[(ram_offset / PAGE_SIZE) as usize]
    }

    /// Copies guest memory out. Nothing is copied if any part of the range is not RAM.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), MemError> {
        let len = out.len() as u64;
        let p = self
            .read_ptr(gpa, len)
            .ok_or(MemError::NotRam { gpa, len })?;
        // SAFETY: p..p+len is mapped; out is exclusive. The guest may race: bytes are just bytes.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies into guest memory, logs the pages dirty and tells the engine about code pages.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemError> {
        let len = data.len() as u64;
        let off = self
            .write_offset(gpa, len)
            .ok_or(MemError::NotRam { gpa, len })?;
        // SAFETY: write_offset proved the bounds.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.base.add(off as usize), data.len());
        };
        self.mark_written(off, len);
        Ok(())
    }

    /// Fills guest memory with zeroes, with the duties of [`GuestMemory::write`].
    pub fn fill_zero(&self, gpa: u64, len: u64) -> Result<(), MemError> {
        let off = self
            .ram_offset(gpa, len)
            .ok_or(MemError::NotRam { gpa, len })?;
        // SAFETY: ram_offset proved the bounds.
        unsafe { std::ptr::write_bytes(self.base.add(off as usize), 0, len as usize) };
        self.mark_written(off, len);
        Ok(())
    }

    /// The duties after a write that did not go through [`GuestMemory::write`]: dirty log and code
    /// notice for `len` bytes at `ram_offset`. Also right for writes by the host kernel into RAM.
    pub fn mark_written(&self, ram_offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = ram_offset / PAGE_SIZE;
        let last = (ram_offset + len - 1) / PAGE_SIZE;
        for page in first..=last {
            let Some(flags) = self.page_flags.get(page as usize) else {
                return;
            };
            if self.dirty_logging.load(Ordering::Relaxed) {
                self.log_dirty(page);
            }
            if flags.load(Ordering::Acquire) & PAGE_CODE != 0
                && let (Some(l), Some(gpa)) =
                    (self.listener.get(), self.gpa_of_offset(page * PAGE_SIZE))
            {
                l.code_written(gpa);
            }
        }
    }

    /// Marks one page (number within RAM) dirty.
    pub fn log_dirty(&self, page: u64) {
        if let Some(w) = self.dirty.get((page / 64) as usize) {
            w.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
        if let Some(f) = self.page_flags.get(page as usize) {
            f.fetch_and(!PAGE_DIRTY_LOGGED, Ordering::Relaxed);
        }
    }

    /// Starts logging: every page counts as clean. The engine must drop its write entries after.
    pub fn start_dirty_log(&self) {
        for w in &self.dirty {
            w.store(0, Ordering::Relaxed);
        }
        for f in &self.page_flags {
            f.fetch_or(PAGE_DIRTY_LOGGED, Ordering::Relaxed);
        }
        self.dirty_logging.store(true, Ordering::SeqCst);
    }

    /// True while writes are logged.
    pub fn dirty_logging(&self) -> bool {
        self.dirty_logging.load(Ordering::SeqCst)
    }

    /// Stops logging.
    pub fn stop_dirty_log(&self) {
        self.dirty_logging.store(false, Ordering::SeqCst);
        for f in &self.page_flags {
            f.fetch_and(!PAGE_DIRTY_LOGGED, Ordering::Relaxed);
        }
    }

    /// Takes the dirty bitmap (one bit per page of RAM) and starts the next round.
    /// The engine must drop its write entries after.
    pub fn take_dirty_log(&self) -> Vec<u64> {
        let words: Vec<u64> = self
            .dirty
            .iter()
            .map(|w| w.swap(0, Ordering::AcqRel))
            .collect();
        for (n, w) in words.iter().enumerate() {
            for bit in 0..64 {
                if w >> bit & 1 != 0
                    && let Some(f) = self.page_flags.get(n * 64 + bit)
                {
                    f.fetch_or(PAGE_DIRTY_LOGGED, Ordering::Relaxed);
                }
            }
        }
        words
    }

    /// Copies into the mapping at an offset, with the duties of [`GuestMemory::write`].
    pub fn write_at_offset(&self, ram_offset: u64, data: &[u8]) -> Result<(), MemError> {
        let len = data.len() as u64;
        let end = ram_offset.checked_add(len);
        if end.is_none_or(|e| e > self.mapped_bytes) {
            return Err(MemError::NotRam {
                gpa: ram_offset,
                len,
            });
        }
        // SAFETY: the range was just found to be inside the mapping.
        unsafe {
            let to = self.base.add(ram_offset as usize);
            std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
        };
        self.mark_written(ram_offset, len);
        Ok(())
    }

    /// Gives all RAM and the memories of devices back to the host; they read as zero afterwards.
    /// ROM and routes stay.
    pub fn discard_all(&self) -> Result<(), MemError> {
        let devices = self.size_bytes + self.rom_bytes;
        for (start, end) in [(0, self.size_bytes), (devices, self.mapped_bytes)] {
            if end > start {
                self.punch(start, end - start)?;
                self.mark_written(start, end - start);
            }
        }
        Ok(())
    }

    /// Gives whole pages back to the host; they read as zero afterwards. Returns the bytes freed.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<u64, MemError> {
        let start = gpa
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or(MemError::NotRam { gpa, len })?;
        let end = gpa.checked_add(len).ok_or(MemError::NotRam { gpa, len })? & !(PAGE_SIZE - 1);
        if start >= end {
            return Ok(0);
        }
        let n = end - start;
        let off = self
            .ram_offset(start, n)
            .ok_or(MemError::NotRam { gpa, len })?;
        self.punch(off, n)?;
        self.mark_written(off, n);
        Ok(n)
    }

    /// Makes a range of the memfd a hole.
    fn punch(&self, off: u64, len: u64) -> Result<(), MemError> {
        // SAFETY: an owned memfd; the range is inside it.
        let r = unsafe {
            libc::fallocate(
                self.fd.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                off as libc::off_t,
                len as libc::off_t,
            )
        };
        if r != 0 {
            let source = std::io::Error::last_os_error();
            return Err(MemError::Os {
                what: "discard",
                source,
            });
        }
        Ok(())
    }

    /// Host address for an aligned atomic load.
    fn load_ptr(&self, gpa: u64, size: u64) -> Result<*mut u8, MemError> {
        if !gpa.is_multiple_of(size) {
            return Err(MemError::NotRam { gpa, len: size });
        }
        self.read_ptr(gpa, size)
            .map(<*const u8>::cast_mut)
            .ok_or(MemError::NotRam { gpa, len: size })
    }

    fn atomic_ptr(&self, gpa: u64, size: u64) -> Result<*mut u8, MemError> {
        if !gpa.is_multiple_of(size) {
            return Err(MemError::NotRam { gpa, len: size });
        }
        self.host_ptr(gpa, size)
            .ok_or(MemError::NotRam { gpa, len: size })
    }

    /// Atomic 16-bit load; the address must be aligned.
    pub fn load_u16(&self, gpa: u64, order: Ordering) -> Result<u16, MemError> {
        let p = self.load_ptr(gpa, 2)?;
        // SAFETY: in bounds, aligned, and atomics may race with guest stores.
        Ok(unsafe { AtomicU16::from_ptr(p.cast()) }.load(order))
    }

    /// Atomic 16-bit store; the address must be aligned.
    pub fn store_u16(&self, gpa: u64, value: u16, order: Ordering) -> Result<(), MemError> {
        let p = self.atomic_ptr(gpa, 2)?;
        // SAFETY: as in load_u16.
        unsafe { AtomicU16::from_ptr(p.cast()) }.store(value, order);
        self.mark_written(self.ram_offset(gpa, 2).unwrap_or(0), 2);
        Ok(())
    }

    /// Atomic 32-bit load; the address must be aligned.
    pub fn load_u32(&self, gpa: u64, order: Ordering) -> Result<u32, MemError> {
        let p = self.load_ptr(gpa, 4)?;
        // SAFETY: as in load_u16.
        Ok(unsafe { AtomicU32::from_ptr(p.cast()) }.load(order))
    }

    /// Atomic 64-bit load; the address must be aligned.
    pub fn load_u64(&self, gpa: u64, order: Ordering) -> Result<u64, MemError> {
        let p = self.load_ptr(gpa, 8)?;
        // SAFETY: as in load_u16.
        Ok(unsafe { AtomicU64::from_ptr(p.cast()) }.load(order))
    }

    /// Reads a little-endian `u32`.
    pub fn read_u32(&self, gpa: u64) -> Result<u32, MemError> {
        let mut b = [0; 4];
        self.read(gpa, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads a little-endian `u64`.
    pub fn read_u64(&self, gpa: u64) -> Result<u64, MemError> {
        let mut b = [0; 8];
        self.read(gpa, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this size and nobody can reach it any more.
        unsafe { libc::munmap(self.base.cast(), self.mapped_bytes() as usize) };
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}
