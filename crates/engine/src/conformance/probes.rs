//! The micro-guests of [`crate::probe`].

use pyrite_mem::{GuestMemory, MemError};
use pyrite_x86::CpuState;

use super::asm::guest;
use super::layout::{self, Entry};

// 200 000 instructions between two writes to port F1H.
guest!(
    probe_speed,
    r#"
    .code64
        movl $100000, %ecx
        outb %al, $0xf1
    1:  subl $1, %ecx
        jnz 1b
        outb %al, $0xf1
        PASS
    "#
);

guest!(
    probe_cmpxchg16b,
    r#"
    .code64
        xorl %eax, %eax
        xorl %edx, %edx
        movl $1, %ebx
        movl $2, %ecx
        lock cmpxchg16b 0x10000
        jne 2f
        lock cmpxchg16b 0x10000
        je 2f
        cmpl $1, %eax
        jne 2f
        cmpl $2, %edx
        jne 2f
        PASS
    2:  movb $2, %al
        outb %al, $0xf4
    3:  jmp 3b
    "#
);

guest!(
    probe_xsave,
    r#"
    .code64
        movq %cr4, %rax
        orl $0x40600, %eax
        movq %rax, %cr4
        movl $3, %eax
        xorl %edx, %edx
        xorl %ecx, %ecx
        xsetbv
        movabsq $0x0123456789abcdef, %rbx
        movq %rbx, %xmm3
        xsave 0x10000
        pxor %xmm3, %xmm3
        xrstor 0x10000
        movq %xmm3, %rcx
        cmpq %rbx, %rcx
        jne 2f
        PASS
    2:  movb $2, %al
        outb %al, $0xf4
    3:  jmp 3b
    "#
);

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProbeGuest {
    Speed,
    Cmpxchg16b,
    Xsave,
}

/// Memory and start state of a probe.
pub(crate) fn probe_guest(which: ProbeGuest) -> Result<(GuestMemory, CpuState), MemError> {
    let image = match which {
        ProbeGuest::Speed => probe_speed(),
        ProbeGuest::Cmpxchg16b => probe_cmpxchg16b(),
        ProbeGuest::Xsave => probe_xsave(),
    };
    let memory = GuestMemory::new(layout::RAM_BYTES)?;
    layout::fill(&memory, image, Entry::Long)?;
    Ok((memory, layout::start_state(Entry::Long, 0)))
}
