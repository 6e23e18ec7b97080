//! Paths in assembly for instructions that neither are plain computation nor should go to the
//! interpreter: repeated string moves, SYSCALL and SYSRET, the time-stamp counter, AC.
//!
//! Each does the common case and leaves everything else, before it has changed anything, to the
//! interpreter. Registers are as in `stubs.rs`.

// UNSAFETY: naked functions; the register contract is stated in `stubs.rs`.
#![allow(unsafe_code, reason = "paths between translated blocks")]

use std::arch::naked_asm;

use pyrite_x86::sreg;

use super::layout::{self, gpr};
use super::stubs;

/// Which path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Path {
    /// REP MOVSB and wider, by log2 of the size.
    Movs0,
    /// See `Movs0`.
    Movs1,
    /// See `Movs0`.
    Movs2,
    /// See `Movs0`.
    Movs3,
    /// REP STOSB and wider.
    Stos0,
    /// See `Stos0`.
    Stos1,
    /// See `Stos0`.
    Stos2,
    /// See `Stos0`.
    Stos3,
    /// RDTSC.
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
    /// STAC.
    Stac,
    /// CLAC.
    Clac,
    /// SYSCALL from 64-bit code at CPL 3.
    Syscall,
    /// SYSRET to 64-bit code.
    Sysret,
}

/// Number of [`Path`]s.
pub const PATHS: usize = 14;

/// Their addresses, for the frame.
pub fn addresses() -> [u64; PATHS] {
    let paths: [unsafe extern "sysv64" fn(); PATHS] = [
        movs0, movs1, movs2, movs3, stos0, stos1, stos2, stos3, rdtsc, rdtscp, stac, clac, syscall,
        sysret,
    ];
    paths.map(|f| f as *const () as u64)
}

/// Most bytes that a string path does: what stays in one page, and less than that would wrap.
const PAGE: u32 = 4096;

// In the paths below the stack holds a return address, so the frame is at RSP + 8.

/// REP MOVS within one page each, upwards. R11 = offset of the view's soft TLB in the frame.
macro_rules! movs {
    ($name:ident, $shift:literal, $op:literal) => {
        /// See the module documentation.
        ///
        /// # Safety
        /// Only from translated code, by CALL, prepared as for `stubs::step`.
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name() {
            naked_asm!(
                "mov [rsp + 8 + {rax}], rax",
                "lahf",
                "seto al",
                "mov [rsp + 8 + {flags}], rax",
                "test byte ptr [rsp + 8 + {rflags} + 1], 4", // DF
                "jnz 9f",
                "mov [rsp + 8 + {rdx}], rdx",
                "mov [rsp + 8 + {rbx}], rbx",
                "cmp rcx, {page}",
                "ja 8f",
                "mov eax, ecx",
                concat!("shl eax, ", $shift), // keeps the flags if it is by 0
                "test eax, eax",
                "jz 7f",
                "cmp eax, {page}",
                "ja 8f",
                "mov edx, edi",
                "and edx, {page} - 1",
                "add edx, eax",
                "cmp edx, {page}",
                "ja 8f",
                "mov edx, esi",
                "and edx, {page} - 1",
                "add edx, eax",
                "cmp edx, {page}",
                "ja 8f",
                "lea r10, [rsp + r11 + 8]",
                "mov rdx, rdi",
                "shr rdx, 12",
                "and edx, {slots}",
                "mov r11, rdi",
                "xor r11, [r10 + rdx*8 + {write}]",
                "cmp r11, {page} - 1",
                "ja 8f",
                "add r11, [r10 + rdx*8 + {host}]",
                "mov rdx, rsi",
                "shr rdx, 12",
                "and edx, {slots}",
                "mov rbx, rsi",
                "xor rbx, [r10 + rdx*8 + {read}]",
                "cmp rbx, {page} - 1",
                "ja 8f",
                "add rbx, [r10 + rdx*8 + {host}]",
                // A target just above the source repeats what was written: the interpreter's.
                "mov rdx, r11",
                "sub rdx, rbx",
                "dec rdx",
                "lea r10, [rax - 1]",
                "cmp rdx, r10",
                "jb 8f",
                "lea rdx, [rsi + rax]",
                "lea r10, [rdi + rax]",
                "mov rsi, rbx",
                "mov rdi, r11",
                $op,
                "mov rsi, rdx",
                "mov rdi, r10",
                "7:",
                "mov rdx, [rsp + 8 + {rdx}]",
                "mov rbx, [rsp + 8 + {rbx}]",
                "mov rax, [rsp + 8 + {flags}]",
                "add al, 0x7f",
                "sahf",
                "mov rax, [rsp + 8 + {rax}]",
                "ret",
                "8:",
                "mov rdx, [rsp + 8 + {rdx}]",
                "mov rbx, [rsp + 8 + {rbx}]",
                "9:",
                "mov rax, [rsp + 8 + {flags}]",
                "add al, 0x7f",
                "sahf",
                "mov rax, [rsp + 8 + {rax}]",
                "jmp {step}",
                rax = const gpr(0), rdx = const gpr(2), rbx = const gpr(3),
                flags = const layout::FLAGS, rflags = const layout::RFLAGS,
                page = const PAGE, slots = const crate::frame::TLB_ENTRIES - 1,
                read = const layout::TLB_READ, write = const layout::TLB_WRITE,
                host = const layout::TLB_HOST, step = sym stubs::step,
            )
        }
    };
}

movs!(movs0, "0", "rep movsb");
movs!(movs1, "1", "rep movsw");
movs!(movs2, "2", "rep movsd");
movs!(movs3, "3", "rep movsq");

/// REP STOS within one page, upwards. R11 = offset of the view's soft TLB in the frame.
macro_rules! stos {
    ($name:ident, $shift:literal, $op:literal) => {
        /// See the module documentation.
        ///
        /// # Safety
        /// Only from translated code, by CALL, prepared as for `stubs::step`.
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name() {
            naked_asm!(
                "mov [rsp + 8 + {rax}], rax",
                "lahf",
                "seto al",
                "mov [rsp + 8 + {flags}], rax",
                "test byte ptr [rsp + 8 + {rflags} + 1], 4", // DF
                "jnz 9f",
                "mov [rsp + 8 + {rdx}], rdx",
                "cmp rcx, {page}",
                "ja 8f",
                "mov eax, ecx",
                concat!("shl eax, ", $shift), // keeps the flags if it is by 0
                "test eax, eax",
                "jz 7f",
                "cmp eax, {page}",
                "ja 8f",
                "mov edx, edi",
                "and edx, {page} - 1",
                "add edx, eax",
                "cmp edx, {page}",
                "ja 8f",
                "lea r10, [rsp + r11 + 8]",
                "mov rdx, rdi",
                "shr rdx, 12",
                "and edx, {slots}",
                "mov r11, rdi",
                "xor r11, [r10 + rdx*8 + {write}]",
                "cmp r11, {page} - 1",
                "ja 8f",
                "add r11, [r10 + rdx*8 + {host}]",
                "lea r10, [rdi + rax]",
                "mov rdi, r11",
                "mov rax, [rsp + 8 + {rax}]",
                $op,
                "mov rdi, r10",
                "7:",
                "mov rdx, [rsp + 8 + {rdx}]",
                "mov rax, [rsp + 8 + {flags}]",
                "add al, 0x7f",
                "sahf",
                "mov rax, [rsp + 8 + {rax}]",
                "ret",
                "8:",
                "mov rdx, [rsp + 8 + {rdx}]",
                "9:",
                "mov rax, [rsp + 8 + {flags}]",
                "add al, 0x7f",
                "sahf",
                "mov rax, [rsp + 8 + {rax}]",
                "jmp {step}",
                rax = const gpr(0), rdx = const gpr(2),
                flags = const layout::FLAGS, rflags = const layout::RFLAGS,
                page = const PAGE, slots = const crate::frame::TLB_ENTRIES - 1,
                write = const layout::TLB_WRITE,
                host = const layout::TLB_HOST, step = sym stubs::step,
            )
        }
    };
}

stos!(stos0, "0", "rep stosb");
stos!(stos1, "1", "rep stosw");
stos!(stos2, "2", "rep stosd");
stos!(stos3, "3", "rep stosq");

/// CR4.TSD.
const TSD: u32 = 1 << 2;

/// RDTSC: the host's counter, the VM's offset, the vCPU's adjustment. See `apic::tsc`.
///
/// # Safety
/// Only from translated code, by CALL, prepared as for `stubs::step`.
#[unsafe(naked)]
unsafe extern "sysv64" fn rdtsc() {
    naked_asm!(
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + 8 + {flags}], rax",
        "test byte ptr [rsp + 8 + {cr4}], {tsd}",
        "jnz 9f",
        "mov r11, [rsp + 8 + {offset_at}]",
        "rdtsc",
        "shl rdx, 32",
        "or rdx, rax",
        "add rdx, [r11]",
        "add rdx, [rsp + 8 + {adjust}]",
        "mov r10d, edx",
        "shr rdx, 32",
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, r10",
        "ret",
        "9:",
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + 8 + {rax}]",
        "jmp {step}",
        rax = const gpr(0), flags = const layout::FLAGS, cr4 = const layout::CR4, tsd = const TSD,
        offset_at = const layout::TSC_OFFSET_AT, adjust = const layout::TSC_ADJUST,
        step = sym stubs::step,
    )
}

/// RDTSCP: as RDTSC, after all earlier instructions, with IA32_TSC_AUX in ECX.
///
/// # Safety
/// Only from translated code, by CALL, prepared as for `stubs::step`.
#[unsafe(naked)]
unsafe extern "sysv64" fn rdtscp() {
    naked_asm!(
        "mov [rsp + 8 + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + 8 + {flags}], rax",
        "test byte ptr [rsp + 8 + {cr4}], {tsd}",
        "jnz 9f",
        "mov r11, [rsp + 8 + {offset_at}]",
        "rdtscp",
        "mov ecx, [rsp + 8 + {aux}]",
        "shl rdx, 32",
        "or rdx, rax",
        "add rdx, [r11]",
        "add rdx, [rsp + 8 + {adjust}]",
        "mov r10d, edx",
        "shr rdx, 32",
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, r10",
        "ret",
        "9:",
        "mov rax, [rsp + 8 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + 8 + {rax}]",
        "jmp {step}",
        rax = const gpr(0), flags = const layout::FLAGS, cr4 = const layout::CR4, tsd = const TSD,
        offset_at = const layout::TSC_OFFSET_AT, adjust = const layout::TSC_ADJUST,
        aux = const layout::TSC_AUX, step = sym stubs::step,
    )
}

/// STAC at CPL 0: goes on at R10 in the view without SMAP. R11 = offset of the jump-cache entry
/// of R10 in a jump cache.
///
/// # Safety
/// Only from translated code, by JMP.
#[unsafe(naked)]
unsafe extern "sysv64" fn stac() {
    naked_asm!(
        "mov [rsp + {rax}], rax",
        "lahf",
        "seto al",
        "or byte ptr [rsp + {rflags} + 2], 4",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "jmp qword ptr [rsp + r11 + {supervisor}]",
        rax = const gpr(0), rflags = const layout::RFLAGS,
        supervisor = const layout::jump_cache(crate::frame::View::Supervisor as usize),
    )
}

/// CLAC at CPL 0: goes on at R10 in the view that CR4.SMAP asks for. R11 as for `stac`.
///
/// # Safety
/// Only from translated code, by JMP.
#[unsafe(naked)]
unsafe extern "sysv64" fn clac() {
    naked_asm!(
        "mov [rsp + {rax}], rax",
        "lahf",
        "seto al",
        "and byte ptr [rsp + {rflags} + 2], 0xfb",
        "test byte ptr [rsp + {cr4} + 2], 0x20",
        "jz 2f",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "jmp qword ptr [rsp + r11 + {smap}]",
        "2:",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "jmp qword ptr [rsp + r11 + {supervisor}]",
        rax = const gpr(0), rflags = const layout::RFLAGS, cr4 = const layout::CR4,
        supervisor = const layout::jump_cache(crate::frame::View::Supervisor as usize),
        smap = const layout::jump_cache(crate::frame::View::SupervisorSmap as usize),
    )
}

/// Arithmetic flags.
const ARITH: u32 = 0x8d5;
/// EFLAGS.RF.
const RF: u32 = 1 << 16;

/// SYSCALL from 64-bit code at CPL 3: R10 = RIP of the next instruction; RIP of this one is in
/// the frame. Intel SDM Vol. 2B, SYSCALL.
///
/// # Safety
/// Only from translated code, by JMP.
#[unsafe(naked)]
unsafe extern "sysv64" fn syscall() {
    naked_asm!(
        "mov [rsp + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + {flags}], rax",
        "inc qword ptr [rsp + {calls}]",
        "test byte ptr [rsp + {efer}], 1", // SCE
        "jz 9f",
        // The image of the flags, for R11.
        "movzx ecx, ah",
        "shl eax, 11",
        "and eax, 0x800",
        "or ecx, eax",
        "and ecx, {arith}",
        "mov rax, [rsp + {rflags}]",
        "and eax, {others}",
        "or ecx, eax",
        "mov [rsp + {r11}], rcx",
        "mov rax, [rsp + {sfmask}]",
        "not rax",
        "and rcx, rax",
        "or ecx, 2",
        "mov [rsp + {rflags}], rcx",
        // Flat segments of the selectors in STAR.
        "mov eax, [rsp + {star} + 4]",
        "and eax, 0xfffc",
        "mov [rsp + {cs_selector}], ax",
        "add eax, 8",
        "mov [rsp + {ss_selector}], ax",
        "mov rax, 0xa09bffffffff",
        "mov [rsp + {cs_limit}], rax",
        "mov rax, 0xc093ffffffff",
        "mov [rsp + {ss_limit}], rax",
        "xor eax, eax",
        "mov [rsp + {cs_base}], rax",
        "mov [rsp + {ss_base}], rax",
        // The view: SMAP is on and AC is clear?
        "mov r11d, {supervisor}",
        "test byte ptr [rsp + {cr4} + 2], 0x20",
        "jz 3f",
        "bt ecx, 18",
        "jc 3f",
        "mov r11d, {smap}",
        "3:",
        // The host's flags.
        "mov eax, ecx",
        "shl eax, 8",
        "mov al, 0",
        "bt ecx, 11",
        "adc al, 0",
        "mov [rsp + {flags}], rax",
        "mov rax, rcx",
        "mov rcx, r10",
        "mov r10, [rsp + {lstar}]",
        // An interrupt that waits for IF is the run loop's.
        "test eax, 0x200",
        "jnz 4f",
        "lea r11, [rsp + r11]",
        "mov rax, r10",
        "ror rax, {jc_bits}",
        "add rax, r10",
        "and eax, {jc_mask}",
        "lea r11, [r11 + rax*8]",
        "mov rax, [rsp + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "jmp qword ptr [r11]",
        "4:",
        "mov rax, [rsp + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "jmp {miss}",
        "9:",
        "mov rax, [rsp + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "call {step_jump}",
        rax = const gpr(0), r11 = const gpr(11), flags = const layout::FLAGS,
        calls = const layout::SYSTEM_CALLS,
        rflags = const layout::RFLAGS, efer = const layout::EFER, cr4 = const layout::CR4,
        star = const layout::STAR, lstar = const layout::LSTAR, sfmask = const layout::SFMASK,
        cs_base = const layout::seg_base(sreg::CS), ss_base = const layout::seg_base(sreg::SS),
        cs_limit = const layout::seg_limit(sreg::CS), ss_limit = const layout::seg_limit(sreg::SS),
        cs_selector = const layout::seg_selector(sreg::CS),
        ss_selector = const layout::seg_selector(sreg::SS),
        arith = const ARITH, others = const !(ARITH | RF),
        supervisor = const layout::jump_cache(crate::frame::View::Supervisor as usize),
        smap = const layout::jump_cache(crate::frame::View::SupervisorSmap as usize),
        jc_bits = const layout::JC_BITS, jc_mask = const layout::JC_MASK,
        miss = sym stubs::miss, step_jump = sym stubs::step_jump,
    )
}

/// Flags that SYSRET loads. Intel SDM Vol. 2B, SYSRET.
const SYSRET_FLAGS: u32 = 0x3c_7fd7;
/// Flags under which translated code does not run, or not in this mode word: TF, VIF, VIP and AC.
const SYSRET_RARE: u32 = 1 << 8 | 1 << 18 | 1 << 19 | 1 << 20;

/// SYSRET to 64-bit code from CPL 0: the RIP of this instruction is in the frame.
///
/// # Safety
/// Only from translated code, by JMP.
#[unsafe(naked)]
unsafe extern "sysv64" fn sysret() {
    naked_asm!(
        "mov [rsp + {rax}], rax",
        "lahf",
        "seto al",
        "mov [rsp + {flags}], rax",
        "test byte ptr [rsp + {efer}], 1", // SCE
        "jz 9f",
        // Not to a program that is executed directly.
        "cmp dword ptr [rsp + {direct}], 0",
        "jne 9f",
        // A user address, and as such canonical.
        "mov r10, rcx",
        "shr r10, 47",
        "jnz 9f",
        "mov r11d, [rsp + {r11}]",
        "test r11d, {rare}",
        "jnz 9f",
        "and r11d, {loaded}",
        "or r11d, 2",
        "bt r11d, 9",
        "jnc 3f",
        "cmp dword ptr [rsp + {waiting}], 0",
        "jne 9f",
        "3:",
        "mov [rsp + {rflags}], r11",
        "movzx eax, word ptr [rsp + {star} + 6]",
        "lea r10d, [rax + 16]",
        "or r10d, 3",
        "mov [rsp + {cs_selector}], r10w",
        "add eax, 8",
        "or eax, 3",
        "mov [rsp + {ss_selector}], ax",
        "mov rax, 0xa0fbffffffff",
        "mov [rsp + {cs_limit}], rax",
        "mov rax, 0xc0f3ffffffff",
        "mov [rsp + {ss_limit}], rax",
        "xor eax, eax",
        "mov [rsp + {cs_base}], rax",
        "mov [rsp + {ss_base}], rax",
        "mov r10, rcx",
        "mov eax, r11d",
        "shl eax, 8",
        "mov al, 0",
        "bt r11d, 11",
        "adc al, 0",
        "mov [rsp + {flags}], rax",
        "mov rax, rcx",
        "ror rax, {jc_bits}",
        "add rax, rcx",
        "and eax, {jc_mask}",
        "lea r11, [rsp + rax*8 + {user}]",
        "mov rax, [rsp + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "jmp qword ptr [r11]",
        "9:",
        "mov rax, [rsp + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rsp + {rax}]",
        "call {step_jump}",
        rax = const gpr(0), r11 = const gpr(11), flags = const layout::FLAGS,
        rflags = const layout::RFLAGS, efer = const layout::EFER, waiting = const layout::IRQ_WAITING,
        direct = const layout::DIRECT, star = const layout::STAR,
        cs_base = const layout::seg_base(sreg::CS), ss_base = const layout::seg_base(sreg::SS),
        cs_limit = const layout::seg_limit(sreg::CS), ss_limit = const layout::seg_limit(sreg::SS),
        cs_selector = const layout::seg_selector(sreg::CS),
        ss_selector = const layout::seg_selector(sreg::SS),
        rare = const SYSRET_RARE, loaded = const SYSRET_FLAGS,
        user = const layout::jump_cache(crate::frame::View::User as usize),
        jc_bits = const layout::JC_BITS, jc_mask = const layout::JC_MASK,
        step_jump = sym stubs::step_jump,
    )
}
