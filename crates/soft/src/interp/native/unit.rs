//! The host's units: executing one host instruction on the guest's registers.

// UNSAFETY: executable memory and the call into it.
#![allow(unsafe_code, reason = "runs generated single instructions")]

use core::arch::global_asm;
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use pyrite_engine::EngineError;
use pyrite_x86::XsaveArea;
use pyrite_x86::bits::rflags;

use crate::signals;

/// Bytes of one stub: the longest instruction and RET.
const STUB_BYTES: usize = 16;
/// LIMIT: stubs of one vCPU.
pub const STUBS_MAX: usize = 8192;

/// State-component bits. Intel SDM Vol. 1 §13.1.
pub mod component {
    #![allow(missing_docs, reason = "names of the manual")]
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const OPMASK: u64 = 1 << 5;
    pub const ZMM_HI256: u64 = 1 << 6;
    pub const HI16_ZMM: u64 = 1 << 7;
    pub const AVX512: u64 = OPMASK | ZMM_HI256 | HI16_ZMM;
    pub const ALL: u64 = X87 | SSE | AVX | AVX512;
}

/// What the call stub loads and saves; the offsets are in its text.
#[repr(C, align(64))]
pub struct Call {
    /// Offset 0.
    pub gpr: [u64; 16],
    /// Offset 128: arithmetic flags.
    pub flags: u64,
    /// Offset 136.
    xsave: *mut u8,
    /// Offset 144: state components to load and save.
    mask: u64,
    /// Offset 152: the instruction.
    code: usize,
    /// Offset 160: 0, or the host's trap number plus 1.
    fault: u64,
    /// Offset 168: MXCSR of the engine.
    mxcsr: u32,
    /// Offset 172: x87 control word of the engine.
    fcw: u32,
    /// Offset 176: not 0 = VZEROUPPER exists.
    avx: u64,
    /// Aligns what follows to 64 bytes.
    padding: u64,
    /// Offset 192. Memory operands are copied here. An operand is put at its guest address modulo 64, so that
    /// the host checks its alignment.
    pub bounce: [u8; 256],
}

global_asm!(
    ".p2align 4",
    ".globl pyrite_soft_run_on_host_units",
    "pyrite_soft_run_on_host_units:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push qword ptr [rdi + 152]",
    "push rdi",
    "mov eax, [rdi + 144]",
    "xor edx, edx",
    "test eax, eax",
    "jz 2f",
    "stmxcsr [rdi + 168]",
    "fnstcw [rdi + 172]",
    "mov rcx, [rdi + 136]",
    "xrstor64 [rcx]",
    "2:",
    "push qword ptr [rdi + 128]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "call qword ptr [rsp + 8]",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "pop qword ptr [rdi + 56]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 88], r11",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    "pushfq",
    "pop qword ptr [rdi + 128]",
    "mov eax, [rdi + 144]",
    "xor edx, edx",
    "test eax, eax",
    "jz 3f",
    "mov rcx, [rdi + 136]",
    "xsave64 [rcx]",
    "test byte ptr [rdi + 144], 1",
    "jz 4f",
    "fninit",
    "fldcw [rdi + 172]",
    "4:",
    "ldmxcsr [rdi + 168]",
    "cmp qword ptr [rdi + 176], 0",
    "je 3f",
    "vzeroupper",
    "3:",
    "pop rdi",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

const _: () = assert!(std::mem::offset_of!(Call, bounce) == 192);
const _: () = assert!(std::mem::offset_of!(Call, avx) == 176);

unsafe extern "sysv64" {
    fn pyrite_soft_run_on_host_units(call: *mut Call);
}

/// Host facts and executable memory of one vCPU.
pub struct Unit {
    /// Boxed because its address is in registers while the instruction runs.
    pub call: Box<Call>,
    write: *mut u8,
    execute: *mut u8,
    used: usize,
    /// Components that the host has enabled, of those that we know.
    pub components: u64,
    /// Offsets of the components in the standard format, by number.
    pub offsets: [usize; 8],
    /// MXCSR bits that the host knows.
    pub(crate) mxcsr_mask: u32,
}

// SAFETY: the mappings belong to the value alone.
unsafe impl Send for Unit {}

/// Bytes of the mapping: stub 0 is a lone RET.
const MAP_BYTES: usize = (STUBS_MAX + 1) * STUB_BYTES;

impl Unit {
    /// Maps the stubs and asks the host what it has.
    pub fn new() -> Result<Unit, EngineError> {
        let os = |what: &str| EngineError::Os {
            what: what.to_owned(),
            source: std::io::Error::last_os_error(),
        };
        // SAFETY: the name is a NUL-terminated literal.
        let raw = unsafe { libc::memfd_create(c"host-units".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(os("cannot create memory for code"));
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: a plain system call on an owned descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), MAP_BYTES as libc::off_t) } != 0 {
            return Err(os("cannot size memory for code"));
        }
        let map = |prot| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    MAP_BYTES,
                    prot,
                    libc::MAP_SHARED,
                    fd.as_raw_fd(),
                    0,
                )
            }
        };
        let write = map(libc::PROT_READ | libc::PROT_WRITE);
        if write == libc::MAP_FAILED {
            return Err(os("cannot map memory for code"));
        }
        let execute = map(libc::PROT_READ | libc::PROT_EXEC);
        if execute == libc::MAP_FAILED {
            // SAFETY: just mapped.
            unsafe { libc::munmap(write, MAP_BYTES) };
            return Err(os("cannot map executable memory"));
        }
        let (components, offsets) = host_components()?;
        let mut unit = Unit {
            call: Box::new(Call {
                gpr: [0; 16],
                flags: 0,
                xsave: std::ptr::null_mut(),
                mask: 0,
                code: 0,
                fault: 0,
                mxcsr: 0,
                fcw: 0,
                avx: u64::from(components & component::AVX != 0),
                padding: 0,
                bounce: [0; 256],
            }),
            write: write.cast(),
            execute: execute.cast(),
            used: 0,
            components,
            offsets,
            mxcsr_mask: mxcsr_mask(),
        };
        unit.add(&[]);
        signals::install_signal_handlers();
        Ok(unit)
    }

    /// Forgets all stubs but the empty one.
    pub fn clear(&mut self) {
        self.used = 1;
    }

    /// Appends a stub; `None` if there is no room or the instruction is too long.
    pub fn add(&mut self, insn: &[u8]) -> Option<usize> {
        if self.used > STUBS_MAX || insn.len() >= STUB_BYTES {
            return None;
        }
        let at = self.used * STUB_BYTES;
        let mut bytes = [0xcc; STUB_BYTES];
        bytes[..insn.len()].copy_from_slice(insn);
        bytes[insn.len()] = 0xc3;
        // SAFETY: inside the mapping, because used <= STUBS_MAX.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.add(at), STUB_BYTES);
        }
        // Code written through another address needs a serialising instruction before it runs.
        let _ = __cpuid(0);
        self.used += 1;
        // SAFETY: as above.
        Some(unsafe { self.execute.add(at) } as usize)
    }

    /// The stub that does nothing.
    pub fn empty_stub(&self) -> usize {
        self.execute as usize
    }

    /// Runs a stub with `call.gpr` and `call.flags`, on the vector and x87 registers in `area`.
    /// `mask`: components that it may use. `Some` = the host's trap number.
    ///
    /// # Safety
    /// `code` is a stub whose only instruction touches nothing but general-purpose registers other
    /// than RSP, flags, the components in `mask`, and `call.bounce`.
    pub unsafe fn run(&mut self, code: usize, mask: u64, area: &mut XsaveArea) -> Option<u8> {
        let mask = mask & self.components;
        if mask != 0 {
            self.sanitise(area);
        }
        let c = &mut *self.call;
        c.flags = c.flags & rflags::ARITH | rflags::FIXED1 | rflags::IF;
        c.xsave = area.0.as_mut_ptr();
        c.mask = mask;
        c.code = code;
        c.fault = 0;
        let c: *mut Call = c;
        // SAFETY: `call` outlives the run, and the stub was called.
        unsafe {
            signals::expect_fault_at(code, std::ptr::addr_of_mut!((*c).fault));
            pyrite_soft_run_on_host_units(c);
            signals::expect_fault_at(0, std::ptr::null_mut());
        }
        self.call.fault.checked_sub(1).map(|n| n as u8)
    }

    /// Makes XRSTOR unable to fault, whatever a saved state held: compacted format, reserved
    /// header bits, unknown components, reserved MXCSR bits.
    fn sanitise(&self, area: &mut XsaveArea) {
        let a = &mut area.0;
        let mut bv = [0; 8];
        bv.copy_from_slice(&a[512..520]);
        // Components outside ours keep their bits for whoever owns them; XRSTOR looks only at
        // those that XCR0 has.
        let known = u64::from_le_bytes(bv) & (self.components | 1 << 9);
        a[512..520].copy_from_slice(&known.to_le_bytes());
        a[520..576].fill(0);
        let mut m = [0; 4];
        m.copy_from_slice(&a[24..28]);
        let m = u32::from_le_bytes(m) & self.mxcsr_mask;
        a[24..28].copy_from_slice(&m.to_le_bytes());
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours and nobody executes in them any more.
        unsafe {
            libc::munmap(self.write.cast(), MAP_BYTES);
            libc::munmap(self.execute.cast(), MAP_BYTES);
        }
    }
}

/// Components the host has enabled and their offsets in the standard format.
fn host_components() -> Result<(u64, [usize; 8]), EngineError> {
    // CPUID.1:ECX.OSXSAVE.
    if __cpuid(1).ecx & 1 << 27 == 0 {
        return Err(EngineError::Unsupported(
            "the host processor lacks XSAVE, or its kernel does not enable it".to_owned(),
        ));
    }
    // SAFETY: OSXSAVE says that XGETBV is there.
    let xcr0 = unsafe { xcr0() };
    let mut offsets = [0; 8];
    for (n, o) in offsets.iter_mut().enumerate().skip(2) {
        *o = __cpuid_count(0xd, n as u32).ebx as usize;
    }
    let mut components = xcr0 & component::ALL;
    if components & component::AVX512 != component::AVX512 {
        components &= !component::AVX512;
    }
    Ok((components, offsets))
}

/// # Safety
/// The processor has XGETBV.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// MXCSR_MASK of the host. Intel SDM Vol. 1 §11.6.6.
fn mxcsr_mask() -> u32 {
    #[repr(C, align(16))]
    struct Area([u8; 512]);
    let mut a = Area([0; 512]);
    // SAFETY: FXSAVE writes the 512 aligned bytes.
    unsafe { core::arch::asm!("fxsave64 [{}]", in(reg) a.0.as_mut_ptr(), options(nostack)) };
    let mut m = [0; 4];
    m.copy_from_slice(&a.0[28..32]);
    match u32::from_le_bytes(m) {
        0 => 0xffbf,
        m => m,
    }
}
