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

/// Runs translated code at `FrameArea::target` until it exits. State goes from and to the frame.
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
        "mov rax, [rsp + {flags}]",
        "add al, 0x7f", // OF from AL
        "sahf",
        "mov rcx, [rsp + {rcx}]",
        "mov rdx, [rsp + {rdx}]",
        "mov rbx, [rsp + {rbx}]",
        "mov r15, [rsp + {rsp}]",
        "mov rbp, [rsp + {rbp}]",
        "mov rsi, [rsp + {rsi}]",
        "mov rdi, [rsp + {rdi}]",
        "mov r8, [rsp + {r8}]",
        "mov r9, [rsp + {r9}]",
        "mov r12, [rsp + {r12}]",
        "mov r13, [rsp + {r13}]",
        "mov r14, [rsp + {r14}]",
        "mov rax, [rsp + {rax}]",
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
        "mov [rsp + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + {flags}], rax",
        "mov [rsp + {rcx}], rcx",
        "mov [rsp + {rdx}], rdx",
        "mov [rsp + {rbx}], rbx",
        "mov [rsp + {rsp}], r15",
        "mov [rsp + {rbp}], rbp",
        "mov [rsp + {rsi}], rsi",
        "mov [rsp + {rdi}], rdi",
        "mov [rsp + {r8}], r8",
        "mov [rsp + {r9}], r9",
        "mov [rsp + {r12}], r12",
        "mov [rsp + {r13}], r13",
        "mov [rsp + {r14}], r14",
        "cmp dword ptr [rsp + {live}], 0",
        "je 2f",
        "mov dword ptr [rsp + {live}], 0",
        "mov eax, [rsp + {mask}]",
        "xor edx, edx",
        "xsave64 [rsp + {xsave}]",
        "ldmxcsr [rsp + {mxcsr}]",
        "2:",
        "mov rsp, [rsp + {host_rsp}]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
    )
}

/// A jump-cache miss: R10 = guest RIP to go on at.
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

/// Bit of the descriptor in R11: the flags are already in `FrameArea::flags`.
pub const DESC_FLAGS_SAVED: u32 = 1 << 24;

/// Soft-TLB miss. Called with R10 = linear address, R11 = descriptor (size in bits 0-7, write in
/// bit 8, view in bits 16-17, [`DESC_FLAGS_SAVED`]) and the instruction's RIP in the frame.
/// Returns to try again, or leaves translated code with `reason::INTERPRET`.
///
/// # Safety
/// Only from translated code.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn slow() {
    naked_asm!(
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "bt r11d, 24",
        "jc 2f",
        "mov [rsp + 8 + {flags}], rax",
        "2:",
        "mov [rsp + 8 + {rcx}], rcx",
        "mov [rsp + 8 + {rdx}], rdx",
        "mov [rsp + 8 + {rbx}], rbx",
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
        "lea rbx, [rsp + 8]",
        "mov rdi, rbx",
        "mov rsi, r10",
        "mov edx, r11d",
        "mov rsp, [rbx + {host_rsp}]",
        "call {slow_memory}",
        "test eax, eax",
        "jnz 5f",
        "lea rsp, [rbx - 8]",
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
        "ret",
        "5:",
        "mov dword ptr [rbx + {live}], 0",
        "mov rsp, [rbx + {host_rsp}]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        slow_memory = sym super::slow_memory,
        rax = const gpr(0), rcx = const gpr(1), rdx = const gpr(2), rbx = const gpr(3),
        rsp = const gpr(4), rbp = const gpr(5), rsi = const gpr(6), rdi = const gpr(7),
        r8 = const gpr(8), r9 = const gpr(9), r12 = const gpr(12), r13 = const gpr(13),
        r14 = const gpr(14),
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
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + 8 + {flags}], rax",
        "mov [rsp + 8 + {rcx}], rcx",
        "mov [rsp + 8 + {rdx}], rdx",
        "mov [rsp + 8 + {rbx}], rbx",
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
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "mov r15, [rsp + 8 + {rsp}]",
        "mov rbp, [rsp + 8 + {rbp}]",
        "mov rsi, [rsp + 8 + {rsi}]",
        "mov rdi, [rsp + 8 + {rdi}]",
        "mov r8, [rsp + 8 + {r8}]",
        "mov r9, [rsp + 8 + {r9}]",
        "mov r12, [rsp + 8 + {r12}]",
        "mov r13, [rsp + 8 + {r13}]",
        "mov r14, [rsp + 8 + {r14}]",
        "mov rax, [rsp + 8 + {rax}]",
        "ret",
        "5:",
        "mov dword ptr [rbx + {live}], 0",
        "mov rsp, [rbx + {host_rsp}]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        step_in_place = sym super::step_in_place,
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
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + 8 + {flags}], rax",
        "mov [rsp + 8 + {rcx}], rcx",
        "mov [rsp + 8 + {rdx}], rdx",
        "mov [rsp + 8 + {rbx}], rbx",
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
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rcx, [rsp + 8 + {rcx}]",
        "mov rdx, [rsp + 8 + {rdx}]",
        "mov rbx, [rsp + 8 + {rbx}]",
        "mov r15, [rsp + 8 + {rsp}]",
        "mov rbp, [rsp + 8 + {rbp}]",
        "mov rsi, [rsp + 8 + {rsi}]",
        "mov rdi, [rsp + 8 + {rdi}]",
        "mov r8, [rsp + 8 + {r8}]",
        "mov r9, [rsp + 8 + {r9}]",
        "mov r12, [rsp + 8 + {r12}]",
        "mov r13, [rsp + 8 + {r13}]",
        "mov r14, [rsp + 8 + {r14}]",
        "mov rax, [rsp + 8 + {rax}]",
        "lea rsp, [rsp + 8]",
        "mov r10, [rsp + {rip}]",
        "jmp qword ptr [rsp + {target}]",
        "5:",
        "mov dword ptr [rbx + {live}], 0",
        "mov rsp, [rbx + {host_rsp}]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = const layout::HOST_RSP, flags = const layout::FLAGS,
        target = const layout::TARGET, rip = const layout::RIP,
        live = const layout::FPU_LIVE, mask = const layout::XSAVE_MASK,
        xsave = const layout::XSAVE, mxcsr = const layout::MXCSR_HOST,
        step_and_jump = sym super::step_and_jump,
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
