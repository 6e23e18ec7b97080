//! The hand-written code around translated code: entry, exit, slow memory path, lazy FPU load.
//!
//! While translated code runs, RSP holds the frame's address; guest registers are in the host
//! registers of the same number, except RSP (in R15), R10, R11 and R15 (in the frame). R10 and R11
//! are scratch. See `front.rs`.

// UNSAFETY: naked functions; the register contract is stated above.
#![allow(unsafe_code, reason = "entry and exit of translated code")]

use std::arch::naked_asm;

use super::layout::{self, gpr, reason};
use crate::frame::Frame;

/// Guest registers and flags to their homes; the frame is at RSP plus a number.
macro_rules! save_registers {
    ($at:literal) => {
        concat!(
            "mov [rsp + ",
            $at,
            " + {rax}], rax\n",
            "lahf\n",
            "seto al\n",
            "mov [rsp + ",
            $at,
            " + {flags}], rax\n",
            "mov [rsp + ",
            $at,
            " + {rcx}], rcx\n",
            "mov [rsp + ",
            $at,
            " + {rdx}], rdx\n",
            "mov [rsp + ",
            $at,
            " + {rbx}], rbx\n",
            "mov [rsp + ",
            $at,
            " + {rsp}], r15\n",
            "mov [rsp + ",
            $at,
            " + {rbp}], rbp\n",
            "mov [rsp + ",
            $at,
            " + {rsi}], rsi\n",
            "mov [rsp + ",
            $at,
            " + {rdi}], rdi\n",
            "mov [rsp + ",
            $at,
            " + {r8}], r8\n",
            "mov [rsp + ",
            $at,
            " + {r9}], r9\n",
            "mov [rsp + ",
            $at,
            " + {r12}], r12\n",
            "mov [rsp + ",
            $at,
            " + {r13}], r13\n",
            "mov [rsp + ",
            $at,
            " + {r14}], r14\n",
        )
    };
}

/// The reverse of `save_registers`.
macro_rules! load_registers {
    ($at:literal) => {
        concat!(
            "mov rax, [rsp + ",
            $at,
            " + {flags}]\n",
            "add al, 0x7f\n", // OF from AL
            "sahf\n",
            "mov rcx, [rsp + ",
            $at,
            " + {rcx}]\n",
            "mov rdx, [rsp + ",
            $at,
            " + {rdx}]\n",
            "mov rbx, [rsp + ",
            $at,
            " + {rbx}]\n",
            "mov r15, [rsp + ",
            $at,
            " + {rsp}]\n",
            "mov rbp, [rsp + ",
            $at,
            " + {rbp}]\n",
            "mov rsi, [rsp + ",
            $at,
            " + {rsi}]\n",
            "mov rdi, [rsp + ",
            $at,
            " + {rdi}]\n",
            "mov r8, [rsp + ",
            $at,
            " + {r8}]\n",
            "mov r9, [rsp + ",
            $at,
            " + {r9}]\n",
            "mov r12, [rsp + ",
            $at,
            " + {r12}]\n",
            "mov r13, [rsp + ",
            $at,
            " + {r13}]\n",
            "mov r14, [rsp + ",
            $at,
            " + {r14}]\n",
            "mov rax, [rsp + ",
            $at,
            " + {rax}]\n",
        )
    };
}

/// Back to the caller of [`enter`]; the frame is where a register says.
macro_rules! to_host {
    ($frame:literal) => {
        concat!(
            "mov rsp, [",
            $frame,
            " + {host_rsp}]\n",
            "add rsp, 8\n",
            "pop r15\n",
            "pop r14\n",
            "pop r13\n",
            "pop r12\n",
            "pop rbp\n",
            "pop rbx\n",
            "ret\n",
        )
    };
}

/// Runs translated code at `Hot::target` until it exits. State goes from and to the frame.
///
/// # Safety
/// `frame` is initialised, `target` is the entry of a translated block of this vCPU.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(frame: *mut Frame) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov [rdi + {host_rsp}], rsp",
        "mov rsp, rdi",
        load_registers!("0"),
        "jmp qword ptr [rsp + {target}]",
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS, target = const layout::TARGET,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
    )
}

/// Leaves translated code: jumped to with the reason in the frame.
///
/// # Safety
/// Only from translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn exit() {
    naked_asm!(
        save_registers!("0"),
        "cmp dword ptr [rsp + {live}], 0",
        "je 2f",
        "mov dword ptr [rsp + {live}], 0",
        "mov eax, [rsp + {mask}]",
        "xor edx, edx",
        "xsave64 [rsp + {xsave}]",
        "ldmxcsr [rsp + {mxcsr}]",
        "2:",
        to_host!("rsp"),
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
    )
}

/// Jump-cache misses by view: R10 = guest RIP to go on at. Looks in the second level, and notes what
/// it finds there in the first. Keeps the flags, which may be live.
macro_rules! miss_in {
    ($name:ident, $view:literal) => {
        /// A jump-cache miss in this view.
        ///
        /// # Safety
        /// Only from translated code, by JMP, on a host with BMI2.
        #[unsafe(naked)]
        pub unsafe extern "sysv64" fn $name() {
            naked_asm!(
                "mov [rsp + {save}], rcx",
                "rorx r11, r10, {bits2}",
                "lea r11, [r11 + r10]",
                "pext r11, r11, [rsp + {mask2}]",
                "lea r11, [r11 + r11]",
                "mov rcx, [rsp + r11*8 + {jump2}]",
                "lea rcx, [rcx + r10 + 1]",
                "jrcxz 2f",
                "mov rcx, [rsp + {save}]",
                "jmp {miss}",
                "2:",
                "mov r11, [rsp + r11*8 + {jump2} + 8]",
                "rorx rcx, r10, {bits}",
                "lea rcx, [rcx + r10]",
                "pext rcx, rcx, [rsp + {mask}]",
                "mov [rsp + rcx*8 + {jump}], r11",
                "mov rcx, [rsp + {save}]",
                "jmp r11",
                save = const layout::SAVE_RCX, miss = sym miss,
                bits = const layout::JC_BITS, bits2 = const layout::JC2_BITS + 5,
                mask = const layout::JC_MASK_AT, mask2 = const layout::JC2_MASK_AT,
                jump = const layout::jump_cache($view), jump2 = const layout::jump_cache2($view),
            )
        }
    };
}

miss_in!(miss0, 0);
miss_in!(miss1, 1);
miss_in!(miss2, 2);

/// What the second-level jump caches are empty with: whoever asks for the last address goes to the
/// run loop.
pub fn no_jump() -> layout::JumpEntry {
    layout::JumpEntry {
        not_rip: 0,
        host: miss as *const () as u64,
    }
}

/// The addresses of what the jump caches are empty with, by view.
pub fn misses(bmi2: bool) -> [u64; 3] {
    let all: [unsafe extern "sysv64" fn(); 3] = if bmi2 {
        [miss0, miss1, miss2]
    } else {
        [miss; 3]
    };
    all.map(|f| f as *const () as u64)
}

/// What a jump-cache miss ends in: R10 = guest RIP to go on at.
///
/// # Safety
/// Only from translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn miss() {
    naked_asm!(
        "mov [rsp + {rip}], r10",
        "mov dword ptr [rsp + {reason}], {lookup}",
        "jmp {exit}",
        rip = const layout::RIP, reason = const layout::REASON,
        lookup = const reason::LOOKUP, exit = sym exit,
    )
}

/// Where the signal handler sends a vCPU whose translated code faulted.
///
/// # Safety
/// Only as the resume address of a signal in translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn signal_exit() {
    naked_asm!(
        "mov dword ptr [rsp + {reason}], {signal}",
        "jmp {exit}",
        reason = const layout::REASON, signal = const reason::SIGNAL, exit = sym exit,
    )
}

/// A stub that leaves translated code, noting where it was called from.
macro_rules! leave {
    ($(#[$doc:meta])* $name:ident, $reason:expr) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// Only from translated code, by CALL; does not return.
        #[unsafe(naked)]
        pub unsafe extern "sysv64" fn $name() {
            naked_asm!(
                "pop qword ptr [rsp + {left_at}]",
                "mov dword ptr [rsp + {reason}], {why}",
                "jmp {exit}",
                left_at = const layout::LEFT_AT, reason = const layout::REASON,
                why = const $reason, exit = sym exit,
            )
        }
    };
}

leave!(
    /// A direct exit that is not linked: called from where the exit's jump leads.
    link,
    reason::LINK
);
leave!(
    /// The exit request was seen at a block's entry.
    poll,
    reason::POLL_ENTRY
);
leave!(
    /// The page of a block that was jumped to must be looked up.
    moved,
    reason::MOVED
);

/// Bit of an access: a store.
pub const WRITE: u8 = 1;
/// Where the view is in the bits of an access.
pub const VIEW_SHIFT: u8 = 1;
/// Bit of an access: the flags are already in `Hot::flags`.
pub const FLAGS_SAVED: u8 = 8;

/// The bits of an access.
pub fn bits(write: bool, view: usize, flags_saved: bool) -> u8 {
    let saved = if flags_saved { FLAGS_SAVED } else { 0 };
    (if write { WRITE } else { 0 }) | (view as u8) << VIEW_SHIFT | saved
}

/// Soft-TLB miss. Called with R11 = slot and R10 = linear address XOR the slot's tag. Before the
/// call stand three bytes: the distance from the check to what follows it, the operand's size, and
/// [`bits`]; after it a jump (5 bytes) to the check.
/// Returns to try again; or after the check, with the operand, which lies in two pages and is only
/// read, copied to where R11 points, and R10 = 0; or leaves translated code with
/// `reason::INTERPRET`.
///
/// # Safety
/// Only from translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn slow() {
    naked_asm!(
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + 8 + {rcx}], rcx",
        "mov [rsp + 8 + {rdx}], rdx",
        "mov [rsp + 8 + {rbx}], rbx",
        "mov rbx, [rsp]",
        "movzx ecx, byte ptr [rbx - {call} - 1]", // bits
        "test cl, {saved}",
        "jnz 2f",
        "mov [rsp + 8 + {flags}], rax",
        "2:",
        // The linear address again.
        "mov eax, ecx",
        "shr eax, {view_shift}",
        "and eax, 3",
        "imul eax, eax, {tlb_size}",
        "lea rax, [rsp + rax + 8 + {tlb}]",
        "test cl, {write_bit}",
        "jnz 1f",
        "xor r10, [rax + r11*8 + {read}]",
        "jmp 3f",
        "1:",
        "xor r10, [rax + r11*8 + {write}]",
        "3:",
        "movzx r11d, byte ptr [rbx - {call} - 2]", // size
        // The second level: RDX = slot there, RAX = the view's TLB, CL = bits.
        "mov edx, r10d",
        "and edx, 4095",
        "add edx, r11d",
        "cmp edx, 4096",
        "ja 8f",
        "mov rdx, r10",
        "mov rbx, r10",
        "shr rdx, 12",
        "shr rbx, 12 + {tlb_bits}",
        "xor edx, ebx",
        "and edx, {slots}",
        "mov rbx, r10",
        "and rbx, -4096",
        "test cl, {write_bit}",
        "lea rcx, [rax + {to_tlb2}]",
        "jnz 6f",
        "cmp rbx, [rcx + rdx*8 + {read}]",
        "jne 8f",
        "jmp 7f",
        "6:",
        "cmp rbx, [rcx + rdx*8 + {write}]",
        "jne 8f",
        "7:",
        "shr r10, 12",
        "and r10d, {slots}",
        "mov [rax + r10*8 + {read}], rbx",
        "mov r11, rbx",
        "mov rbx, [rcx + rdx*8 + {host}]",
        "mov [rax + r10*8 + {host}], rbx",
        "sub rbx, r11",
        "mov [rax + r10*8 + {delta}], rbx",
        "mov rbx, [rcx + rdx*8 + {write}]",
        "cmp rbx, 1",
        "jne 9f",
        "mov rbx, r10", // the empty tag of the first level
        "xor rbx, 1",
        "shl rbx, 12",
        "9:",
        "mov [rax + r10*8 + {write}], rbx",
        "mov rax, [rsp + 8 + {rax}]",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "ret",
        "8:",
        "mov [rsp + 8 + {rsp}], r15",
        "mov [rsp + 8 + {rbp}], rbp",
        "mov [rsp + 8 + {rsi}], rsi",
        "mov [rsp + 8 + {rdi}], rdi",
        "mov [rsp + 8 + {r8}], r8",
        "mov [rsp + 8 + {r9}], r9",
        "mov [rsp + 8 + {r12}], r12",
        "mov [rsp + 8 + {r13}], r13",
        "mov [rsp + 8 + {r14}], r14",
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 3f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xsave64 [rsp + 8 + {xsave}]",
        "ldmxcsr [rsp + 8 + {mxcsr}]",
        "3:",
        "mov rax, [rsp]",
        "lea rbx, [rsp + 8]",
        "mov rdi, rbx",
        "mov rsi, r10",
        "mov edx, r11d",
        "movzx ecx, byte ptr [rax - {call} - 1]",
        "movsxd r8, dword ptr [rax + 1]",
        "lea r8, [rax + r8 + 5]",
        "mov rsp, [rbx + {host_rsp}]",
        "call {slow_memory}",
        "cmp eax, 1",
        "je 5f",
        "lea rsp, [rbx - 8]",
        "jb 4f",
        // To what follows the check.
        "mov rax, [rsp]",
        "movsxd rcx, dword ptr [rax + 1]",
        "movzx edx, byte ptr [rax - {call} - 3]",
        "lea rcx, [rax + rcx + 5]",
        "add rcx, rdx",
        "mov [rsp], rcx",
        "4:",
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 4f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xrstor64 [rsp + 8 + {xsave}]",
        "4:",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rsi, [rsp + 8 + {rsi}]",
        "mov rdi, [rsp + 8 + {rdi}]",
        "mov r8, [rsp + 8 + {r8}]",
        "mov r9, [rsp + 8 + {r9}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "mov rax, [rsp + 8 + {rax}]",
        "mov r11, [rsp + 8 + {split_at}]",
        "mov r10d, 0",
        "ret",
        "5:",
        "mov dword ptr [rbx + {live}], 0",
        to_host!("rbx"),
        split_at = const layout::SPLIT_AT, call = const super::front::STUB_CALL_BYTES,
        saved = const FLAGS_SAVED, write_bit = const WRITE, view_shift = const VIEW_SHIFT,
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        slow_memory = sym super::callbacks::slow_memory,
        tlb = const layout::tlb(0), to_tlb2 = const layout::TLB2 - layout::tlb(0),
        tlb_size = const layout::TLB_SIZE,
        tlb_bits = const crate::frame::TLB_BITS, slots = const crate::frame::TLB_ENTRIES - 1,
        read = const layout::TLB_READ, write = const layout::TLB_WRITE,
        host = const layout::TLB_HOST, delta = const layout::TLB_DELTA,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
    )
}

/// A run's check failed. Before the call stand six bytes: the run's first byte relative to RSP (32
/// bits), its length, and [`bits`]; after it a jump (5 bytes) to the check. Returns to try again if
/// the second level has the page, else after the jump.
///
/// # Safety
/// Only from translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn stack() {
    naked_asm!(
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + 8 + {rcx}], rcx",
        "mov [rsp + 8 + {rdx}], rdx",
        "mov [rsp + 8 + {rbx}], rbx",
        "mov rbx, [rsp]",
        "movzx ecx, byte ptr [rbx - {call} - 1]", // bits
        "test cl, {saved}",
        "jnz 2f",
        "mov [rsp + 8 + {flags}], rax",
        "2:",
        "movsxd r10, dword ptr [rbx - {call} - 6]",
        "add r10, r15",
        "movzx edx, byte ptr [rbx - {call} - 2]",
        "mov eax, r10d",
        "and eax, 4095",
        "add eax, edx",
        "cmp eax, 4096",
        "ja 8f",
        "mov rdx, r10",
        "mov rax, r10",
        "shr rdx, 12",
        "shr rax, 12 + {tlb_bits}",
        "xor edx, eax",
        "and edx, {slots}",
        "shr ecx, {view_shift}",
        "and ecx, 3",
        "imul eax, ecx, {tlb_size}",
        "lea rcx, [rsp + rax + 8 + {tlb2}]",
        "lea rax, [rsp + rax + 8 + {tlb}]",
        "mov rbx, r10",
        "and rbx, -4096",
        "cmp rbx, [rcx + rdx*8 + {write}]",
        "jne 8f",
        "shr r10, 12",
        "and r10d, {slots}",
        "mov [rax + r10*8 + {read}], rbx",
        "mov [rax + r10*8 + {write}], rbx",
        "mov r11, rbx",
        "mov rbx, [rcx + rdx*8 + {host}]",
        "mov [rax + r10*8 + {host}], rbx",
        "sub rbx, r11",
        "mov [rax + r10*8 + {delta}], rbx",
        "jmp 9f",
        "8:",
        // To the instruction after the jump, whose length is 5.
        "add qword ptr [rsp], 5",
        "9:",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + 8 + {rax}]",
        "ret",
        flags = const layout::FLAGS, call = const super::front::STUB_CALL_BYTES,
        saved = const FLAGS_SAVED, view_shift = const VIEW_SHIFT,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        tlb = const layout::tlb(0), tlb2 = const layout::TLB2, tlb_size = const layout::TLB_SIZE,
        tlb_bits = const crate::frame::TLB_BITS, slots = const crate::frame::TLB_ENTRIES - 1,
        read = const layout::TLB_READ, write = const layout::TLB_WRITE,
        host = const layout::TLB_HOST, delta = const layout::TLB_DELTA,
    )
}

/// Runs the instruction at the RIP in the frame in the interpreter, without leaving the block.
/// Called with `FrameArea::expected` = the RIP that must come out for the block to go on; any
/// other outcome leaves translated code.
///
/// # Safety
/// Only from translated code, by CALL.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn step() {
    naked_asm!(
        save_registers!("8"),
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 3f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xsave64 [rsp + 8 + {xsave}]",
        "ldmxcsr [rsp + 8 + {mxcsr}]",
        "3:",
        "lea rbx, [rsp + 8]",
        "mov rdi, rbx",
        "mov rsp, [rbx + {host_rsp}]",
        "call {step_in_place}",
        "test eax, eax",
        "jnz 5f",
        "lea rsp, [rbx - 8]",
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 4f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xrstor64 [rsp + 8 + {xsave}]",
        "4:",
        load_registers!("8"),
        "ret",
        "5:",
        "mov dword ptr [rbx + {live}], 0",
        to_host!("rbx"),
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        step_in_place = sym super::callbacks::step_in_place,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
    )
}

/// Runs the instruction at the RIP in the frame in the interpreter and goes on where it leads, or
/// leaves translated code.
///
/// # Safety
/// Only from translated code, by CALL; does not return.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn step_jump() {
    naked_asm!(
        save_registers!("8"),
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 3f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xsave64 [rsp + 8 + {xsave}]",
        "ldmxcsr [rsp + 8 + {mxcsr}]",
        "3:",
        "lea rbx, [rsp + 8]",
        "mov rdi, rbx",
        "mov rsp, [rbx + {host_rsp}]",
        "call {step_and_jump}",
        "test rax, rax",
        "jz 5f",
        "mov [rbx + {target}], rax",
        "lea rsp, [rbx - 8]",
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 4f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xrstor64 [rsp + 8 + {xsave}]",
        "4:",
        load_registers!("8"),
        "lea rsp, [rsp + 8]",
        "mov r10, [rsp + {rip}]",
        "jmp qword ptr [rsp + {target}]",
        "5:",
        "mov dword ptr [rbx + {live}], 0",
        to_host!("rbx"),
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        target = const layout::TARGET, rip = const layout::RIP,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        step_and_jump = sym super::callbacks::step_and_jump,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
    )
}

/// Loads the guest's vector and x87 state into the host's registers. Keeps everything else,
/// flags included.
///
/// # Safety
/// Only from translated code, by CALL.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn fpu_load() {
    naked_asm!(
        "mov r10, rax",
        "mov r11, rdx",
        "mov dword ptr [rsp + 8 + {live}], 1",
        "mov eax, [rsp + 8 + {mask}]",
        "mov edx, 0",
        "xrstor64 [rsp + 8 + {xsave}]",
        "mov rax, r10",
        "mov rdx, r11",
        "ret",
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE,
    )
}
