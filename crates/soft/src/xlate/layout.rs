//! Offsets that emitted code and the stubs use, and the translator's part of the frame.

use std::mem::offset_of;
use std::sync::atomic::AtomicU32;

use pyrite_x86::{CpuState, Msrs, Segment};

use crate::frame::{Frame, TlbView, VIEWS};

/// log2 of the entries of a jump cache.
pub const JC_BITS: u32 = 14;
/// Entries of a jump cache.
pub const JC_ENTRIES: usize = 1 << JC_BITS;
/// Mask of the bits of the folded RIP that select the jump-cache entry.
pub const JC_MASK: u64 = (1 << JC_BITS) - 1;
/// Slots of the code TLB.
pub const CODE_SLOTS: usize = 1 << 16;
/// Bits of a code-TLB value that are the guest-physical page number plus one; the units stand
/// above them. LIMIT: code in the first TiB is translated.
pub const CODE_PAGE_BITS: u32 = 28;

/// log2 of the entries of the second-level jump cache.
pub const JC2_BITS: u32 = 17;
/// Entries of the second-level jump cache.
pub const JC2_ENTRIES: usize = 1 << JC2_BITS;

/// An entry of the second-level jump cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct JumpEntry {
    /// The complement of the RIP plus the view's number: see [`JumpEntry::tag`].
    pub tag: u64,
    /// Host address of the checked entry.
    pub host: u64,
}

impl JumpEntry {
    /// What the entry of a RIP in a view is known by. The entry of another view's neighbouring RIP
    /// has the same; the checked entry there refuses it.
    pub const fn tag(rip: u64, view: usize) -> u64 {
        !rip.wrapping_add(view as u64)
    }
}

/// The entry of a RIP in the second level: another fold than [`jump_slot`].
pub const fn jump_slot2(rip: u64) -> usize {
    (rip.wrapping_add(rip.rotate_right(JC2_BITS + 5)) & (JC2_ENTRIES as u64 - 1)) as usize
}

/// The jump-cache entry of a RIP: the RIP and the same rotated by [`JC_BITS`], added, so that
/// targets at equal offsets of different pages as a rule do not collide. Two addresses that
/// differ by one never share an entry; the checked entry of a block relies on that.
pub const fn jump_slot(rip: u64) -> usize {
    (rip.wrapping_add(rip.rotate_right(JC_BITS)) & JC_MASK) as usize
}

/// Entries of [`FrameArea::splits`].
pub const SPLIT_SLOTS: usize = 64;

/// The entry of a host address in [`FrameArea::splits`].
pub const fn split_slot(done: u64) -> usize {
    done as usize & (SPLIT_SLOTS - 1)
}

/// See [`FrameArea::split`].
#[repr(C, align(64))]
pub struct SplitOperand(pub [u8; 128]);

/// Places for the distances of runs.
pub const RUN_PLACES: usize = 3;

/// The part of the [`Frame`] that emitted code touches all the time: it lies within the reach of a
/// displacement of one byte, which keeps the code small.
#[repr(C, align(64))]
pub struct Hot {
    /// PEXT mask for the soft-TLB slot.
    pub tlb_mask: u64,
    /// Host address less linear address, for the accesses of a run.
    pub run_delta: [u64; RUN_PLACES],
    /// [`crate::frame::EXIT_WANTED`]: leave translated code at the next poll; else 0. Set by any
    /// thread.
    pub exit_request: AtomicU32,
    /// Not 0: the guest's vector and x87 state is in the host's registers.
    pub fpu_live: u32,
    /// Arithmetic flags in LAHF form: AH as LAHF stores it, AL = OF.
    pub flags: u64,
    /// RAX while the flags are saved around a check.
    pub save_rax: u64,
    /// Spill slot for RCX in flag-free tests.
    pub save_rcx: u64,
    /// PEXT mask for the jump-cache entry.
    pub jc_mask: u64,
    /// Low half of the host address of the indirect JMP or RET that ran last in 64-bit mode.
    pub branch: u32,
    /// Why translated code was left: a [`reason`].
    pub reason: u32,
    /// Where to enter, or the target of an indirect branch in the making.
    pub target: u64,
    /// Spill slot for a value on its way from one memory operand to another.
    pub value: u64,
    /// Addresses of the stubs, because the code cache may be out of reach of a near call.
    pub stub_slow: u64,
    /// See `stub_slow`.
    pub stub_link: u64,
    /// See `stub_slow`.
    pub stub_poll: u64,
    /// See `stub_slow`.
    pub stub_run: u64,
}

const _: () = assert!(size_of::<Hot>() == 128 && offset_of!(Frame, hot) == 0);

/// What emitted code and its stubs keep for themselves in the [`Frame`].
#[repr(C)]
pub struct FrameArea {
    /// The host stack while translated code runs.
    pub host_rsp: u64,
    /// Host address of the instruction that raised a signal.
    pub fault_rip: u64,
    /// Host address after the call of `stub_link`, `stub_poll` or `stub_moved` that left.
    pub left_at: u64,
    /// Component mask for XSAVE and XRSTOR.
    pub xsave_mask: u32,
    /// Not 0: an interrupt waits for IF.
    pub irq_waiting: u32,
    /// As `Hot::stub_slow`.
    pub stub_exit: u64,
    /// See `stub_exit`.
    pub stub_moved: u64,
    /// See `stub_exit`.
    pub stub_fpu: u64,
    /// See `stub_exit`.
    pub stub_miss: [u64; VIEWS],
    /// See `stub_exit`.
    pub stub_step: u64,
    /// See `stub_exit`.
    pub stub_step_jump: u64,
    /// Addresses of the paths of `fast.rs`, by [`super::fast::Path`].
    pub fast: [u64; super::fast::PATHS],
    /// A copy of an operand that lies in two pages, at its own alignment.
    pub split: SplitOperand,
    /// Address of that copy.
    pub split_at: u64,
    /// Where the copy of an operand that is stored belongs: host address and bytes, of both parts.
    pub split_to: [u64; 4],
    /// Where translated code goes on with the copy.
    pub split_resume: u64,
    /// What of `Translator::splits` was used last, by [`split_slot`]: key and value.
    pub splits: [[u64; 2]; SPLIT_SLOTS],
    /// See `stub_exit`.
    pub stub_split_done: u64,
    /// PEXT mask for the entry of a second-level jump cache.
    pub jc2_mask: u64,
    /// PEXT mask of the bits that are equal in a canonical address.
    pub canonical_mask: u64,
    /// Where the VM's TSC offset is, an `AtomicI64`.
    pub tsc_offset_at: u64,
    /// RIP after the instruction that `stub_step` runs, if the block is to go on.
    pub expected: u64,
    /// Mode word of the block that runs.
    pub mode: u32,
    /// Not 0: user code of the current address space is executed directly.
    pub direct: u32,
    /// System calls by SYSCALL in translated code.
    pub system_calls: u64,
    /// The owning `SoftVcpu`, while it runs.
    pub vcpu: u64,
    /// MXCSR that Rust code expects.
    pub mxcsr_host: u32,
    /// Keeps the layout explicit.
    pub reserved: u32,
    /// Host addresses of checked entries, by view and [`jump_slot`].
    pub jump_cache: [[u64; JC_ENTRIES]; VIEWS],
    /// The same, more of them, of all views, by [`jump_slot2`]: where a miss looks.
    pub jump_cache2: [JumpEntry; JC2_ENTRIES],
    /// The code TLB: for each page of linear addresses that code was translated from, which
    /// guest-physical page it is mapped to and in which mode; 0 = not known. See `code_tlb.rs`.
    pub code_tlb: [u32; CODE_SLOTS],
}

/// Why translated code was left.
pub mod reason {
    /// A direct exit that is not linked yet: `FrameArea::left_at` tells which.
    pub const LINK: u32 = 1;
    /// A branch whose target must be looked up.
    pub const LOOKUP: u32 = 2;
    /// The exit request was seen, at RIP.
    pub const POLL: u32 = 3;
    /// The instruction at RIP needs the interpreter.
    pub const INTERPRET: u32 = 4;
    /// An instruction was interpreted in place and the block cannot go on.
    pub const STEPPED: u32 = 6;
    /// As `POLL`, at the entry of the block around `FrameArea::left_at`.
    pub const POLL_ENTRY: u32 = 7;
    /// The page of the block around `FrameArea::left_at` must be looked up.
    pub const MOVED: u32 = 8;
    /// A host signal: `FrameArea::fault_rip` tells where.
    pub const SIGNAL: u32 = 5;
}

const X: usize = offset_of!(Frame, xlate);
const H: usize = offset_of!(Frame, hot);
const C: usize = offset_of!(Frame, cpu);

/// Offset of a guest register's home.
pub const fn gpr(n: usize) -> usize {
    C + offset_of!(CpuState, gpr) + 8 * n
}
pub const RIP: usize = C + offset_of!(CpuState, rip);
pub const XSAVE: usize = C + offset_of!(CpuState, xsave);
/// Offset of a path of `fast.rs`.
pub const fn fast(path: super::fast::Path) -> usize {
    X + offset_of!(FrameArea, fast) + 8 * path as usize
}
pub const SPLIT_AT: usize = X + offset_of!(FrameArea, split_at);
pub const SPLITS: usize = X + offset_of!(FrameArea, splits);
pub const SPLIT: usize = X + offset_of!(FrameArea, split);
pub const SPLIT_TO: usize = X + offset_of!(FrameArea, split_to);
pub const SPLIT_RESUME: usize = X + offset_of!(FrameArea, split_resume);
pub const STUB_SPLIT_DONE: usize = X + offset_of!(FrameArea, stub_split_done);
/// Offset of a place of `Hot::run_delta`.
pub const fn run_delta(place: u8) -> usize {
    H + offset_of!(Hot, run_delta) + 8 * place as usize
}
pub const CANONICAL_MASK: usize = X + offset_of!(FrameArea, canonical_mask);
pub const STUB_RUN: usize = H + offset_of!(Hot, stub_run);
pub const TSC_OFFSET_AT: usize = X + offset_of!(FrameArea, tsc_offset_at);
pub const CR4: usize = C + offset_of!(CpuState, cr4);
pub const EFER: usize = C + offset_of!(CpuState, efer);
const M: usize = C + offset_of!(CpuState, msrs);
pub const STAR: usize = M + offset_of!(Msrs, star);
pub const LSTAR: usize = M + offset_of!(Msrs, lstar);
pub const SFMASK: usize = M + offset_of!(Msrs, sfmask);
pub const KERNEL_GS_BASE: usize = M + offset_of!(Msrs, kernel_gs_base);
pub const TSC_ADJUST: usize = M + offset_of!(Msrs, tsc_adjust);
pub const TSC_AUX: usize = M + offset_of!(Msrs, tsc_aux);
/// Offset of a segment's limit; the access rights follow it.
pub const fn seg_limit(n: usize) -> usize {
    C + offset_of!(CpuState, seg) + n * size_of::<Segment>() + offset_of!(Segment, limit)
}
/// Offset of a segment's selector.
pub const fn seg_selector(n: usize) -> usize {
    C + offset_of!(CpuState, seg) + n * size_of::<Segment>() + offset_of!(Segment, selector)
}
/// Offset of a view's soft TLB.
pub const fn tlb(view: usize) -> usize {
    offset_of!(Frame, tlb) + view * size_of::<TlbView>()
}
/// Offset of the second level of the soft TLBs.
pub const TLB2: usize = offset_of!(Frame, tlb2);
/// Size of a soft TLB of a view.
pub const TLB_SIZE: usize = size_of::<TlbView>();
/// Offsets in a soft TLB.
pub const TLB_READ: usize = offset_of!(TlbView, read);
/// See [`TLB_READ`].
pub const TLB_WRITE: usize = offset_of!(TlbView, write);
/// See [`TLB_READ`].
pub const TLB_HOST: usize = offset_of!(TlbView, host);
/// Offset of a segment's base.
pub const fn seg_base(n: usize) -> usize {
    C + offset_of!(CpuState, seg) + n * size_of::<Segment>() + offset_of!(Segment, base)
}
pub const RFLAGS: usize = C + offset_of!(CpuState, rflags);
pub const SHADOW: usize = C + offset_of!(CpuState, interrupt_shadow);
pub const IRQ_WAITING: usize = X + offset_of!(FrameArea, irq_waiting);
pub const BRANCH: usize = H + offset_of!(Hot, branch);
pub const EXIT_REQUEST: usize = H + offset_of!(Hot, exit_request);
pub const SAVE_RAX: usize = H + offset_of!(Hot, save_rax);
pub const STUB_LINK: usize = H + offset_of!(Hot, stub_link);
pub const STUB_POLL: usize = H + offset_of!(Hot, stub_poll);
pub const STUB_MOVED: usize = X + offset_of!(FrameArea, stub_moved);
pub const LEFT_AT: usize = X + offset_of!(FrameArea, left_at);
pub const FLAGS: usize = H + offset_of!(Hot, flags);
pub const HOST_RSP: usize = X + offset_of!(FrameArea, host_rsp);
pub const TARGET: usize = H + offset_of!(Hot, target);
pub const VALUE: usize = H + offset_of!(Hot, value);
pub const SAVE_RCX: usize = H + offset_of!(Hot, save_rcx);
pub const REASON: usize = H + offset_of!(Hot, reason);
pub const FPU_LIVE: usize = H + offset_of!(Hot, fpu_live);
pub const XSAVE_MASK: usize = X + offset_of!(FrameArea, xsave_mask);
pub const TLB_MASK: usize = H + offset_of!(Hot, tlb_mask);
pub const JC_MASK_AT: usize = H + offset_of!(Hot, jc_mask);
pub const JC2_MASK_AT: usize = X + offset_of!(FrameArea, jc2_mask);
pub const STUB_EXIT: usize = X + offset_of!(FrameArea, stub_exit);
/// Offset of the address of the stub for jump-cache misses.
pub const fn stub_miss(view: usize) -> usize {
    X + offset_of!(FrameArea, stub_miss) + 8 * view
}
/// Offset of the second-level jump cache.
pub const JUMP_CACHE2: usize = X + offset_of!(FrameArea, jump_cache2);
pub const STUB_SLOW: usize = H + offset_of!(Hot, stub_slow);
pub const STUB_FPU: usize = X + offset_of!(FrameArea, stub_fpu);
pub const STUB_STEP: usize = X + offset_of!(FrameArea, stub_step);
pub const STUB_STEP_JUMP: usize = X + offset_of!(FrameArea, stub_step_jump);
pub const EXPECTED: usize = X + offset_of!(FrameArea, expected);
pub const DIRECT: usize = X + offset_of!(FrameArea, direct);
pub const SYSTEM_CALLS: usize = X + offset_of!(FrameArea, system_calls);
pub const MODE: usize = X + offset_of!(FrameArea, mode);
pub const MXCSR_HOST: usize = X + offset_of!(FrameArea, mxcsr_host);

/// Offset of a jump cache.
pub const fn jump_cache(which: usize) -> usize {
    X + offset_of!(FrameArea, jump_cache) + which * 8 * JC_ENTRIES
}
/// Offset of a code-TLB slot.
pub const fn code_tlb(slot: u32) -> usize {
    X + offset_of!(FrameArea, code_tlb) + 4 * slot as usize
}
/// Offset of a view's read tags.
pub const fn tlb_read(view: usize) -> usize {
    offset_of!(Frame, tlb) + view * size_of::<TlbView>() + offset_of!(TlbView, read)
}
/// Offset of a view's write tags.
pub const fn tlb_write(view: usize) -> usize {
    offset_of!(Frame, tlb) + view * size_of::<TlbView>() + offset_of!(TlbView, write)
}
/// Offset of a view's distances between host and linear addresses.
pub const fn tlb_delta(view: usize) -> usize {
    offset_of!(Frame, tlb) + view * size_of::<TlbView>() + offset_of!(TlbView, delta)
}
/// See [`TLB_READ`].
pub const TLB_DELTA: usize = offset_of!(TlbView, delta);
/// Offset of a view's host addresses.
pub const fn tlb_host(view: usize) -> usize {
    offset_of!(Frame, tlb) + view * size_of::<TlbView>() + offset_of!(TlbView, host)
}

// XSAVE and XRSTOR need a 64-byte aligned area.
const _: () = assert!(XSAVE.is_multiple_of(64));
