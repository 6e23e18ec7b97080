//! Memories of devices that the guest reaches like RAM, such as video memory.
//!
//! They lie behind RAM and ROM in the same file and mapping, so that engines treat their pages
//! alike. Where the guest sees one follows a base address register and may change.

// UNSAFETY: copies from the mapping of guest memory, within one device's part of it.
#![allow(
    unsafe_code,
    reason = "device memory is part of guest memory's mapping"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{GuestMemory, Mapping, MemError, PAGE_SIZE};

/// What guest memory is made of.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// RAM in bytes, with what devices hide.
    pub ram_bytes: u64,
    /// ROM: see [`GuestMemory::with_rom`]. Empty for a machine without firmware.
    pub rom: Vec<u8>,
    /// A0000H-BFFFFH belong to devices. They do in any case on a machine with ROM.
    pub has_video_window: bool,
    /// Sizes of the memories of devices, in bytes: whole pages.
    pub device_bytes: Vec<u64>,
}

/// First address of the video window.
pub(crate) const VIDEO_WINDOW_START: u64 = 0xa_0000;
/// End of the video window.
pub(crate) const VIDEO_WINDOW_END: u64 = 0xc_0000;

/// A memory of a device: where it is in the mapping, and where the guest sees it.
pub(crate) struct DeviceWindow {
    ram_offset: u64,
    size_bytes: u64,
    /// Guest-physical address; [`NOWHERE`] while it is not decoded.
    gpa: AtomicU64,
}

/// No guest-physical address: no range begins there.
const NOWHERE: u64 = u64::MAX;

impl DeviceWindow {
    /// Windows of these sizes, the first one at `ram_offset`; and the end of the last one.
    pub(crate) fn all(mut ram_offset: u64, sizes: &[u64]) -> Result<(Vec<Self>, u64), MemError> {
        let mut windows = Vec::new();
        for bytes in sizes {
            // LIMIT: 64 GiB per device memory.
            if !bytes.is_multiple_of(PAGE_SIZE) || !(PAGE_SIZE..=1 << 36).contains(bytes) {
                return Err(MemError::BadSize(*bytes));
            }
            windows.push(DeviceWindow {
                ram_offset,
                size_bytes: *bytes,
                gpa: AtomicU64::new(NOWHERE),
            });
            ram_offset += bytes;
        }
        Ok((windows, ram_offset))
    }

    pub(crate) fn mapping(&self) -> Option<Mapping> {
        let gpa = self.gpa.load(Ordering::Acquire);
        (gpa != NOWHERE).then_some(Mapping {
            gpa,
            size_bytes: self.size_bytes,
            ram_offset: self.ram_offset,
            read_only: false,
        })
    }

    /// The offset in the mapping of `len` bytes at `gpa`, if they lie in this window.
    pub(crate) fn offset(&self, gpa: u64, len: u64) -> Option<u64> {
        let off = gpa.checked_sub(self.gpa.load(Ordering::Acquire))?;
        let end = off.checked_add(len)?;
        (off < self.size_bytes && end <= self.size_bytes).then_some(self.ram_offset + off)
    }

    /// Where the guest sees an offset in the mapping.
    pub(crate) fn gpa_of(&self, ram_offset: u64) -> Option<u64> {
        let off = ram_offset.checked_sub(self.ram_offset)?;
        let gpa = self.gpa.load(Ordering::Acquire);
        (off < self.size_bytes && gpa != NOWHERE).then(|| gpa + off)
    }
}

/// A memory of a device, which the guest may see at an address of its choice. The owner sees it
/// always.
#[derive(Clone)]
pub struct DeviceMemory {
    memory: Arc<GuestMemory>,
    index: usize,
}

impl GuestMemory {
    /// The device memory `index` of the layout.
    pub fn device_memory(self: &Arc<Self>, index: usize) -> Option<DeviceMemory> {
        (index < self.windows.len()).then(|| DeviceMemory {
            memory: Arc::clone(self),
            index,
        })
    }
}

impl DeviceMemory {
    fn window(&self) -> &DeviceWindow {
        // `GuestMemory::device_memory` checked the index.
        &self.memory.windows[self.index]
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.window().size_bytes
    }

    /// Where the guest sees it.
    pub fn gpa(&self) -> Option<u64> {
        self.window().mapping().map(|m| m.gpa)
    }

    /// Shows it to the guest at the page-aligned address `gpa`, or nowhere, and tells the engine if
    /// that is a change. The address must be free. Called by a vCPU thread whose access moved it,
    /// or while all vCPUs are stopped.
    pub fn place(&self, gpa: Option<u64>) {
        let w = self.window();
        let aligned = gpa
            .filter(|g| g.is_multiple_of(PAGE_SIZE) && g.checked_add(w.size_bytes).is_some())
            .unwrap_or(NOWHERE);
        let old = w.gpa.swap(aligned, Ordering::AcqRel);
        if old == aligned {
            return;
        }
        if let Some(l) = self.memory.listener.get() {
            for start in [old, aligned].into_iter().filter(|s| *s != NOWHERE) {
                l.mapping_changed(start, start + w.size_bytes - PAGE_SIZE);
            }
        }
    }

    /// Copies out. What lies beyond the end reads as zero.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let w = self.window();
        let left = w.size_bytes.saturating_sub(offset);
        let n = out.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (inside, beyond) = out.split_at_mut(n);
        beyond.fill(0);
        if n > 0 {
            // SAFETY: offset + n is within the window, which is within the mapping.
            unsafe {
                let from = self.memory.base.add((w.ram_offset + offset) as usize);
                std::ptr::copy_nonoverlapping(from, inside.as_mut_ptr(), n);
            }
        }
    }

    /// Copies in, with the duties of [`GuestMemory::write`]. What lies beyond the end is dropped.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let w = self.window();
        let left = w.size_bytes.saturating_sub(offset);
        let n = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if n > 0 {
            // Cannot fail: the range is inside the window.
            let _ = self
                .memory
                .write_at_offset(w.ram_offset + offset, &data[..n]);
        }
    }
}
