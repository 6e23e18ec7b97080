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
                "lea rcx, [rcx + r10 + 1 + {view}]",
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
                jump = const layout::jump_cache($view), jump2 = const layout::JUMP_CACHE2,
                view = const $view,
            )
        }
    };
}

miss_in!(miss0, 0);
miss_in!(miss1, 1);
miss_in!(miss2, 2);

/// What the second-level jump cache is empty with: whoever asks for the last address goes to the
/// run loop.
pub fn no_jump() -> layout::JumpEntry {
    layout::JumpEntry {
        tag: 0,
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
/// [`bits`]: the instruction can do its store in a copy of its operand.
pub const SPLITTABLE: u8 = 16;

/// The bits of an access.
pub fn bits(write: bool, view: usize, flags_saved: bool) -> u8 {
    let saved = if flags_saved { FLAGS_SAVED } else { 0 };
    (if write { WRITE } else { 0 }) | (view as u8) << VIEW_SHIFT | saved
}

/// The linear address whose check failed, to R10: `slow` and `run` find it there less its tag, and in R11 the slot.
/// ECX = [`bits`]; makes RAX the view's soft TLB.
macro_rules! linear_address {
    () => {
        concat!(
            "mov eax, ecx\n",
            "shr eax, {view_shift}\n",
            "and eax, 3\n",
            "imul eax, eax, {tlb_size}\n",
            "lea rax, [rsp + rax + 8 + {tlb}]\n",
            "test cl, {write_bit}\n",
            "jnz 1f\n",
            "xor r10, [rax + r11*8 + {read}]\n",
            "jmp 3f\n",
            "1:\n",
            "xor r10, [rax + r11*8 + {write}]\n",
            "3:\n",
        )
    };
}

/// Copies the entry of R10's page from the second level to the first, whose address is in RAX; goes to label 8 if there is
/// none that serves. CL = [`bits`], R11D = bytes of the access. Uses RBX, RCX, RDX, R10 and R11.
macro_rules! from_second_level {
    () => {
        concat!(
            // The second level: RDX = slot there, RAX = the view's TLB, CL = bits.
            "mov edx, r10d\n",
            "and edx, 4095\n",
            "add edx, r11d\n",
            "cmp edx, 4096\n",
            "ja 8f\n",
            "mov rdx, r10\n",
            "mov rbx, r10\n",
            "shr rdx, 12\n",
            "shr rbx, 12 + {tlb_bits}\n",
            "xor edx, ebx\n",
            "and edx, {slots}\n",
            "mov rbx, r10\n",
            "and rbx, -4096\n",
            "test cl, {write_bit}\n",
            "lea rcx, [rax + {to_tlb2}]\n",
            "jnz 6f\n",
            "cmp rbx, [rcx + rdx*8 + {read}]\n",
            "jne 8f\n",
            "jmp 7f\n",
            "6:\n",
            "cmp rbx, [rcx + rdx*8 + {write}]\n",
            "jne 8f\n",
            "7:\n",
            "shr r10, 12\n",
            "and r10d, {slots}\n",
            "mov [rax + r10*8 + {read}], rbx\n",
            "mov r11, rbx\n",
            "mov rbx, [rcx + rdx*8 + {host}]\n",
            "mov [rax + r10*8 + {host}], rbx\n",
            "sub rbx, r11\n",
            "mov [rax + r10*8 + {delta}], rbx\n",
            "mov rbx, [rcx + rdx*8 + {write}]\n",
            "cmp rbx, 1\n",
            "jne 9f\n",
            "mov rbx, r10\n", // the empty tag of the first level
            "xor rbx, 1\n",
            "shl rbx, 12\n",
            "9:\n",
            "mov [rax + r10*8 + {write}], rbx\n",
        )
    };
}

/// Soft-TLB miss. Called with R11 = slot and R10 = linear address XOR the slot's tag. Before the
/// call stand three bytes: the distance from the check to what follows it, the operand's size, and
/// [`bits`]; after it a jump (5 bytes) to the check.
/// Returns to try again; or with the operand, which lies in two pages, copied to where R11 points,
/// and R10 = 0: after the check if it is only read, else to a copy of the instruction that ends with
/// [`split_done`]; or leaves translated code with `reason::INTERPRET`.
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
        linear_address!(),
        "movzx r11d, byte ptr [rbx - {call} - 2]", // size
        from_second_level!(),
        "mov rax, [rsp + 8 + {rax}]",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "ret",
        "8:",
        "mov [rsp + 8 + {rsi}], rsi",
        "mov [rsp + 8 + {rdi}], rdi",
        "mov [rsp + 8 + {r8}], r8",
        "mov [rsp + 8 + {r9}], r9",
        // An operand in two pages, both of which the first level has, is copied here; RBX = the
        // return address, CL = bits, RAX = the view's TLB.
        "mov edx, r10d",
        "and edx, 4095",
        "lea esi, [rdx + r11]",
        "cmp esi, 4096",
        "jbe 7f",
        "mov rsi, r10",
        "shr rsi, 12",
        "lea rdi, [rsi + 1]",
        "and esi, {slots}",
        "and edi, {slots}",
        "mov r9, r10",
        "and r9, -4096",
        "lea r8, [r9 + 4096]",
        "test cl, {write_bit}",
        "jnz 3f",
        "cmp [rax + rsi*8 + {read}], r9",
        "jne 7f",
        "cmp [rax + rdi*8 + {read}], r8",
        "jne 7f",
        "jmp 4f",
        "3:",
        "test cl, {splittable}",
        "jz 7f",
        "cmp [rax + rsi*8 + {write}], r9",
        "jne 7f",
        "cmp [rax + rdi*8 + {write}], r8",
        "jne 7f",
        "4:",
        // R8, R9: host addresses of the parts; EDX, ECX: their bytes.
        "mov r9, [rax + rsi*8 + {host}]",
        "mov r8, [rax + rdi*8 + {host}]",
        "add r9, rdx",
        "neg edx",
        "add edx, 4096",
        // Where it goes on.
        "movsxd rsi, dword ptr [rbx + 1]",
        "lea rsi, [rbx + rsi + 5]",
        "movzx edi, byte ptr [rbx - {call} - 3]",
        "add rsi, rdi",
        "test cl, {write_bit}",
        "mov ecx, r11d",
        "jz 6f",
        "mov edi, esi",
        "and edi, {split_slots}",
        "add edi, edi",
        "cmp rsi, [rsp + rdi*8 + 8 + {splits}]",
        "jne 7f",
        "mov rsi, [rsp + rdi*8 + 8 + {splits} + 8]",
        "mov [rsp + 8 + {to}], r9",
        "mov [rsp + 8 + {to} + 8], rdx",
        "mov [rsp + 8 + {to} + 16], r8",
        "sub ecx, edx",
        "mov [rsp + 8 + {to} + 24], rcx",
        "add ecx, edx",
        "6:",
        "mov [rsp], rsi",
        "sub ecx, edx",
        "and r10d, 63",
        "lea rdi, [rsp + r10 + 8 + {split}]",
        "mov r11, rdi",
        "mov [rsp + 8 + {split_at}], rdi",
        "mov rsi, r9",
        "xchg ecx, edx",
        "rep movsb",
        "mov rsi, r8",
        "mov ecx, edx",
        "rep movsb",
        "mov rsi, [rsp + 8 + {rsi}]",
        "mov rdi, [rsp + 8 + {rdi}]",
        "mov r8, [rsp + 8 + {r8}]",
        "mov r9, [rsp + 8 + {r9}]",
        "mov rax, [rsp + 8 + {rax}]",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "mov r10d, 0",
        "ret",
        "7:",
        "mov [rsp + 8 + {rsp}], r15",
        "mov [rsp + 8 + {rbp}], rbp",
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
        "movzx r9d, byte ptr [rax - {call} - 3]",
        "add r9, r8",
        "mov rsp, [rbx + {host_rsp}]",
        "call {slow_memory}",
        "cmp eax, 1",
        "je 5f",
        "lea rsp, [rbx - 8]",
        "jb 4f",
        "mov rcx, [rsp + 8 + {resume}]",
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
        split_at = const layout::SPLIT_AT, resume = const layout::SPLIT_RESUME,
        split = const layout::SPLIT, splittable = const SPLITTABLE, to = const layout::SPLIT_TO,
        splits = const layout::SPLITS, split_slots = const layout::SPLIT_SLOTS - 1, call = const super::front::STUB_CALL_BYTES,
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

/// A run's check failed; R10 and R11 are as in `slow`. Before the call stand two bytes: the run's
/// length, and [`bits`]; after it a jump (5 bytes) to the check. Returns to try again if the page
/// can be had, else after the jump.
///
/// # Safety
/// Only from translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn run() {
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
        linear_address!(),
        "movzx r11d, byte ptr [rbx - {call} - 2]", // length
        from_second_level!(),
        "jmp 9f",
        "8:",
        "mov edx, r10d",
        "and edx, 4095",
        "add edx, r11d",
        "cmp edx, 4096",
        "ja 7f",
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
        "mov rsp, [rbx + {host_rsp}]",
        "call {refill_run}",
        "lea rsp, [rbx - 8]",
        "mov ebx, eax",
        "cmp dword ptr [rsp + 8 + {live}], 0",
        "je 4f",
        "mov eax, [rsp + 8 + {mask}]",
        "xor edx, edx",
        "xrstor64 [rsp + 8 + {xsave}]",
        "4:",
        "mov rsi, [rsp + 8 + {rsi}]",
        "mov rdi, [rsp + 8 + {rdi}]",
        "mov r8, [rsp + 8 + {r8}]",
        "mov r9, [rsp + 8 + {r9}]",
        "test ebx, ebx",
        "jnz 9f",
        "7:",
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
        saved = const FLAGS_SAVED, write_bit = const WRITE, view_shift = const VIEW_SHIFT,
        host_rsp = const layout::HOST_RSP, live = const layout::FPU_LIVE,
        mask = const layout::XSAVE_MASK, xsave = const layout::XSAVE,
        mxcsr = const layout::MXCSR_HOST, refill_run = sym super::callbacks::refill_run,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
        tlb = const layout::tlb(0), to_tlb2 = const layout::TLB2 - layout::tlb(0),
        tlb_size = const layout::TLB_SIZE,
        tlb_bits = const crate::frame::TLB_BITS, slots = const crate::frame::TLB_ENTRIES - 1,
        read = const layout::TLB_READ, write = const layout::TLB_WRITE,
        host = const layout::TLB_HOST, delta = const layout::TLB_DELTA,
    )
}

/// Brings what a copied instruction stored in `FrameArea::split` to the two pages where it belongs.
/// Keeps everything, flags included.
///
/// # Safety
/// Only from translated code, by CALL, after `callbacks::slow_memory` prepared it.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn split_done() {
    naked_asm!(
        "mov [rsp + 8 + {rcx}], rcx",
        "mov r10, rsi",
        "mov r11, rdi",
        "mov rsi, [rsp + 8 + {split_at}]",
        "mov rdi, [rsp + 8 + {to}]",
        "mov rcx, [rsp + 8 + {to} + 8]",
        "rep movsb",
        "mov rdi, [rsp + 8 + {to} + 16]",
        "mov rcx, [rsp + 8 + {to} + 24]",
        "rep movsb",
        "mov rsi, r10",
        "mov rdi, r11",
        "mov rcx, [rsp + 8 + {rcx}]",
        "ret",
        rcx = const gpr(1), split_at = const layout::SPLIT_AT, to = const layout::SPLIT_TO,
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
