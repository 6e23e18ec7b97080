//! The frame: what translated code reaches by constant offsets from the host's RSP.
//!
//! ```text
//!   low address                                                          high address
//!   [ guard page | entry stack (returns of stubs) | Frame …                         ]
//!                                                 ^ RSP while translated code runs
//! ```
//!
//! The mapping is owned by an `Arc` because other threads set `exit_request`.

// UNSAFETY: owns a mapping that both Rust and emitted code use.
#![allow(unsafe_code, reason = "the frame is shared with emitted code")]

use std::sync::atomic::AtomicU32;

use pyrite_x86::CpuState;

/// log2 of the number of entries of one soft TLB.
pub const TLB_BITS: u32 = 12;
/// Entries of one soft TLB.
pub const TLB_ENTRIES: usize = 1 << TLB_BITS;

/// A privilege view of memory. Each has a soft TLB of its own, so that a change of CPL or AC
/// needs no flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum View {
    /// CPL 0-2 where user pages are accessible (SMAP off, or EFLAGS.AC set).
    Supervisor = 0,
    /// CPL 0-2 under SMAP with AC clear, and implicit supervisor accesses under SMAP.
    SupervisorSmap = 1,
    /// CPL 3.
    User = 2,
}

/// Number of [`View`]s.
pub const VIEWS: usize = 3;

/// One direct-mapped soft TLB. The slot of a linear address is bits 12 to 12+TLB_BITS-1.
///
/// A tag is the linear page address; an access of n bytes hits when
/// `(address ^ tag) <= 4096 - n`, which also refuses page-crossing accesses. An empty slot holds a
/// tag that belongs to another slot ([`empty_tag`]), which no address of this slot can match.
#[repr(C)]
pub struct TlbView {
    /// Tags for loads.
    pub read: [u64; TLB_ENTRIES],
    /// Tags for stores; also empty while the page has code, is dirty-logged and clean, or its D
    /// bit is clear.
    pub write: [u64; TLB_ENTRIES],
    /// Host address of the page's first byte; valid if either tag is.
    pub host: [u64; TLB_ENTRIES],
    /// Host address less linear address; in the first level only.
    pub delta: [u64; TLB_ENTRIES],
}

/// The tag that marks slot `n` empty.
pub const fn empty_tag(n: usize) -> u64 {
    ((n as u64) ^ 1) << 12
}

/// Slot of a linear address.
pub const fn slot(lin: u64) -> usize {
    ((lin >> 12) as usize) & (TLB_ENTRIES - 1)
}

/// The tag of an empty slot of the second level.
pub const NO_PAGE: u64 = 1;

/// Slot of a linear address in the second level.
pub const fn slot2(lin: u64) -> usize {
    ((lin >> 12 ^ lin >> (12 + TLB_BITS)) as usize) & (TLB_ENTRIES - 1)
}

impl TlbView {
    /// Empties every slot, of the second level.
    pub fn flush2(&mut self) {
        self.read.fill(NO_PAGE);
        self.write.fill(NO_PAGE);
    }

    /// Empties every slot, of the first level.
    pub fn flush(&mut self) {
        for n in 0..TLB_ENTRIES {
            self.read[n] = empty_tag(n);
            self.write[n] = empty_tag(n);
        }
    }
}

/// See the module documentation.
#[repr(C, align(64))]
pub struct Frame {
    /// What emitted code reaches with displacements of one byte.
    pub hot: crate::xlate::Hot,
    /// The architectural state. While translated code runs, the general-purpose registers and the
    /// arithmetic flags of `rflags` are in host registers instead, and `xsave` may be.
    pub cpu: CpuState,
    /// Soft TLBs by [`View`].
    pub tlb: [TlbView; VIEWS],
    /// The second level of the soft TLBs: holds all that the first holds, in slots by another hash
    /// ([`slot2`]), so that pages that displace each other in the first are found without a walk.
    /// Read by the stub that a miss calls. Tags are compared for equality; empty = [`NO_PAGE`].
    pub tlb2: [TlbView; VIEWS],
    /// What emitted code and its stubs keep for themselves.
    pub xlate: crate::xlate::FrameArea,
}

/// See `Hot::exit_request`. No difference of two code-TLB values, so that translated code can
/// test the sum of both for zero.
pub const EXIT_WANTED: u32 = 1 << 31;

const STACK_BYTES: usize = 64 * 1024;
const GUARD_BYTES: usize = 4096;

/// Owner of the mapping that holds a [`Frame`] and the entry stack below it.
pub struct FrameMapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory; who may touch what is stated at `frame` and `exit_request`.
unsafe impl Send for FrameMapping {}
// SAFETY: as above.
unsafe impl Sync for FrameMapping {}

impl FrameMapping {
    /// Maps a zeroed frame; the caller initialises it through [`FrameMapping::frame_ptr`].
    pub fn new() -> std::io::Result<FrameMapping> {
        let len = GUARD_BYTES + STACK_BYTES + size_of::<Frame>().next_multiple_of(4096);
        // SAFETY: a new anonymous mapping.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the first page of the mapping just made.
        unsafe { libc::mprotect(base, GUARD_BYTES, libc::PROT_NONE) };
        Ok(FrameMapping {
            base: base.cast(),
            len,
        })
    }

    /// Where the frame is. Only the vCPU's thread may make references from it.
    pub fn frame_ptr(&self) -> *mut Frame {
        // SAFETY: inside the mapping by construction.
        unsafe { self.base.add(GUARD_BYTES + STACK_BYTES).cast() }
    }

    /// The exit request, for any thread.
    pub fn exit_request(&self) -> &AtomicU32 {
        // SAFETY: the field is atomic, inside the mapping, and lives as long as `self`.
        unsafe { &*std::ptr::addr_of!((*self.frame_ptr()).hot.exit_request) }
    }
}

impl Drop for FrameMapping {
    fn drop(&mut self) {
        // SAFETY: made in `new`; nobody holds references any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
