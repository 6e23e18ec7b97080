//! What runs in the process of an address space besides the guest's code: a program of one page.
//!
//! It has two threads of control that share memory and nothing else. The *manager* carries out
//! mappings that the VM process orders. The *runner* executes guest code; a filter hands every
//! system call of it to the VM process, which traces it.
//!
//! The guest's code shares memory with the manager, so the manager trusts no memory that can be
//! written there: its code, its orders and the answers that it gives are all mapped read-only, and
//! it has no stack. What it may do is limited once more by a filter of its own.

// UNSAFETY: assembly that becomes a program of its own, and reads of its bytes.
#![allow(unsafe_code, reason = "contains the program's code")]

use std::arch::global_asm;

/// Where the program is in its process; guests hardly ever map anything there.
pub const CODE: u64 = 0x5eed_0000_0000;
/// Where the orders are, behind the code.
pub const RING: u64 = CODE + 0x1000;
/// Size of the orders, in bytes.
pub const RING_BYTES: usize = 16 << 10;
/// End of what the guest cannot have at its place.
pub const END: u64 = RING + RING_BYTES as u64;
/// End of what a process may map, with four levels of page tables.
pub const TOP: u64 = 0x7fff_ffff_f000;

/// Descriptor of guest RAM in the process.
pub const RAM_FD: i32 = 3;
/// Descriptor of the orders.
pub const RING_FD: i32 = 4;
/// Descriptor of the pipe for answers.
pub const ANSWER_FD: i32 = 5;
/// Descriptor of the copies of pages, without instructions that must not run.
pub const PATCHED_FD: i32 = 6;

/// Offset of the argument of `PR_SET_TSC`, a `u32`.
pub const TSC_AT: usize = 8;
/// Offset of the first order; before it are the number of the batch and how many orders it has, as
/// `u32` each.
pub const ORDERS_AT: usize = 64;
/// Bytes of an order: the number of a system call and its six arguments, as `u64` each.
pub const ORDER_BYTES: usize = 64;
/// Orders of one batch.
pub const ORDERS_MAX: usize = (RING_BYTES - ORDERS_AT) / ORDER_BYTES;

/// An answer: all orders were carried out.
pub const DONE: u8 = b'k';

const PRCTL: u32 = libc::SYS_prctl as u32;
const MMAP: u32 = libc::SYS_mmap as u32;
const MUNMAP: u32 = libc::SYS_munmap as u32;
const SECCOMP: u32 = libc::SYS_seccomp as u32;
const WRITE: u32 = libc::SYS_write as u32;
const FUTEX: u32 = libc::SYS_futex as u32;
const CLOSE_RANGE: u32 = libc::SYS_close_range as u32;
const CLONE: u32 = libc::SYS_clone as u32;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

global_asm!(
    ".pushsection .rodata.pyrite_direct, \"a\"",
    ".balign 64",
    ".globl pyrite_direct_stub_start",
    ".hidden pyrite_direct_stub_start",
    ".globl pyrite_direct_stub_end",
    ".hidden pyrite_direct_stub_end",
    "pyrite_direct_stub_start:",
    // The manager ends with the thread that made it.
    "mov eax, {PRCTL}",
    "mov edi, {PR_SET_PDEATHSIG}",
    "mov esi, 9",
    "syscall",
    "mov eax, {PRCTL}",
    "mov edi, {PR_SET_NO_NEW_PRIVS}",
    "mov esi, 1",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test eax, eax",
    "jnz 99f",
    "mov eax, {MMAP}",
    "movabs rdi, {RING}",
    "mov esi, {RING_BYTES}",
    "mov edx, 1",            // PROT_READ
    "mov r10d, 0x11",        // MAP_SHARED | MAP_FIXED
    "mov r8d, {RING_FD}",
    "xor r9d, r9d",
    "syscall",
    "cmp rax, rdi",
    "jne 99f",
    "mov eax, {CLOSE_RANGE}",
    "mov edi, {RING_FD}",
    "mov esi, {RING_FD}",
    "xor edx, edx",
    "syscall",
    "mov eax, {CLOSE_RANGE}",
    "xor edi, edi",
    "mov esi, 2",
    "xor edx, edx",
    "syscall",
    "mov eax, {CLOSE_RANGE}",
    "mov edi, {PATCHED_FD} + 1",
    "mov esi, -1",
    "xor edx, edx",
    "syscall",
    // The runner: the same memory, and a child of the VM process.
    "mov eax, {CLONE}",
    "mov edi, 0x8100 + 17",  // CLONE_PARENT | CLONE_VM, SIGCHLD
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test eax, eax",
    "js 99f",
    "jz 20f",
    // Its pid is the first answer. The stack is still there.
    "push rax",
    "mov eax, {WRITE}",
    "mov edi, {ANSWER_FD}",
    "mov rsi, rsp",
    "mov edx, 4",
    "syscall",
    // Nothing but this program stays mapped.
    "mov eax, {MUNMAP}",
    "xor edi, edi",
    "movabs rsi, {CODE}",
    "syscall",
    "mov eax, {MUNMAP}",
    "movabs rdi, {END}",
    "movabs rsi, {TOP} - {END}",
    "syscall",
    "test eax, eax",
    "jnz 99f",
    "mov eax, {SECCOMP}",
    "mov edi, 1",            // SECCOMP_SET_MODE_FILTER
    "xor esi, esi",
    "lea rdx, [rip + 70f]",
    "syscall",
    "test eax, eax",
    "jnz 99f",
    "xor r13d, r13d",        // the batch that was done last
    "movabs rbp, {RING}",
    "4:",
    "mov r12d, [rbp]",
    "cmp r12d, r13d",
    "jne 5f",
    "mov eax, {FUTEX}",
    "mov rdi, rbp",
    "xor esi, esi",          // FUTEX_WAIT, shared
    "mov edx, r13d",
    "xor r10d, r10d",
    "syscall",
    "jmp 4b",
    "5:",
    "mov r14d, [rbp + 4]",
    "lea r15, [rbp + {ORDERS_AT}]",
    "6:",
    "test r14d, r14d",
    "jz 7f",
    "mov rax, [r15]",
    "mov rdi, [r15 + 8]",
    "mov rsi, [r15 + 16]",
    "mov rdx, [r15 + 24]",
    "mov r10, [r15 + 32]",
    "mov r8, [r15 + 40]",
    "mov r9, [r15 + 48]",
    "syscall",
    "cmp rax, -4095",
    "jae 8f",
    "add r15, {ORDER_BYTES}",
    "dec r14d",
    "jmp 6b",
    "7:",
    "lea rsi, [rip + 60f]",
    "jmp 9f",
    "8:",
    "lea rsi, [rip + 61f]",
    "9:",
    "mov r13d, r12d",
    "mov eax, {WRITE}",
    "mov edi, {ANSWER_FD}",
    "mov edx, 1",
    "syscall",
    "jmp 4b",
    // The runner. It writes no memory at all.
    "20:",
    "mov eax, {CLOSE_RANGE}",
    "xor edi, edi",
    "mov esi, -1",
    "xor edx, edx",
    "syscall",
    "test eax, eax",
    "jnz 99f",
    "mov eax, {PRCTL}",
    "mov edi, {PR_SET_TSC}",
    "movabs rsi, {RING} + {TSC_AT}",
    "mov esi, [rsi]",
    "syscall",
    "test eax, eax",
    "jnz 99f",
    "mov eax, 39",           // getpid
    "syscall",
    "mov edi, eax",
    "mov esi, 19",           // SIGSTOP: until the tracer is there
    "mov eax, 62",           // kill
    "syscall",
    "mov eax, {SECCOMP}",
    "mov edi, 1",
    "xor esi, esi",
    "lea rdx, [rip + 71f]",
    "syscall",
    "21:",
    "ud2",
    "jmp 21b",
    "99:",
    "mov eax, 231",          // exit_group
    "mov edi, 1",
    "syscall",
    "hlt",
    "60: .byte {DONE}",
    "61: .byte 'e'",
    ".balign 8",
    // struct sock_fprog
    "70: .quad 9",
    ".quad {CODE} + (72f - pyrite_direct_stub_start)",
    "71: .quad 1",
    ".quad {CODE} + (73f - pyrite_direct_stub_start)",
    // What the manager may call.
    "72:",
    ".short 0x20", ".byte 0, 0", ".long 4", // architecture
    ".short 0x15", ".byte 0, 6", ".long {AUDIT_ARCH_X86_64}",
    ".short 0x20", ".byte 0, 0", ".long 0", // number
    ".short 0x15", ".byte 3, 0", ".long {MMAP}",
    ".short 0x15", ".byte 2, 0", ".long {MUNMAP}",
    ".short 0x15", ".byte 1, 0", ".long {FUTEX}",
    ".short 0x15", ".byte 0, 1", ".long {WRITE}",
    ".short 0x06", ".byte 0, 0", ".long 0x7fff0000", // allow
    ".short 0x06", ".byte 0, 0", ".long 0x80000000", // kill the process
    // What the runner may call: nothing; the tracer is told.
    "73:",
    ".short 0x06", ".byte 0, 0", ".long 0x7ff00000", // trace
    "pyrite_direct_stub_end:",
    ".popsection",
    PRCTL = const PRCTL,
    PR_SET_PDEATHSIG = const libc::PR_SET_PDEATHSIG,
    PR_SET_NO_NEW_PRIVS = const libc::PR_SET_NO_NEW_PRIVS,
    PR_SET_TSC = const libc::PR_SET_TSC,
    MMAP = const MMAP,
    MUNMAP = const MUNMAP,
    SECCOMP = const SECCOMP,
    WRITE = const WRITE,
    FUTEX = const FUTEX,
    CLOSE_RANGE = const CLOSE_RANGE,
    CLONE = const CLONE,
    AUDIT_ARCH_X86_64 = const AUDIT_ARCH_X86_64,
    RING = const RING,
    RING_BYTES = const RING_BYTES,
    RING_FD = const RING_FD,
    ANSWER_FD = const ANSWER_FD,
    PATCHED_FD = const PATCHED_FD,
    CODE = const CODE,
    END = const END,
    TOP = const TOP,
    TSC_AT = const TSC_AT,
    ORDERS_AT = const ORDERS_AT,
    ORDER_BYTES = const ORDER_BYTES,
    DONE = const DONE,
);

unsafe extern "C" {
    static pyrite_direct_stub_start: u8;
    static pyrite_direct_stub_end: u8;
}

/// The program's code and constants.
fn code() -> &'static [u8] {
    let start = &raw const pyrite_direct_stub_start;
    let end = &raw const pyrite_direct_stub_end;
    // SAFETY: both labels are in one section, in this order, and the bytes are never written.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The program as an ELF executable with one segment. ELF-64 Object File Format, versions 1.5.
pub fn image() -> Vec<u8> {
    const PAGE: u64 = 4096;
    let code = code();
    let mut e = Vec::with_capacity(2 * PAGE as usize);
    // Identification: 64 bits, little-endian.
    e.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let half = |e: &mut Vec<u8>, v: u16| e.extend_from_slice(&v.to_le_bytes());
    let word = |e: &mut Vec<u8>, v: u32| e.extend_from_slice(&v.to_le_bytes());
    let quad = |e: &mut Vec<u8>, v: u64| e.extend_from_slice(&v.to_le_bytes());
    half(&mut e, 2); // executable
    half(&mut e, 62); // x86-64
    word(&mut e, 1);
    quad(&mut e, CODE);
    quad(&mut e, 64); // program headers
    quad(&mut e, 0);
    word(&mut e, 0);
    half(&mut e, 64);
    half(&mut e, 56);
    half(&mut e, 1);
    half(&mut e, 64);
    half(&mut e, 0);
    half(&mut e, 0);
    word(&mut e, 1); // PT_LOAD
    word(&mut e, 5); // read, execute
    quad(&mut e, PAGE);
    quad(&mut e, CODE);
    quad(&mut e, CODE);
    quad(&mut e, code.len() as u64);
    quad(&mut e, code.len() as u64);
    quad(&mut e, PAGE);
    e.resize(PAGE as usize, 0);
    e.extend_from_slice(code);
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_fits_its_page() {
        assert!(code().len() < (RING - CODE) as usize);
        assert!(image().starts_with(b"\x7fELF"));
    }
}
