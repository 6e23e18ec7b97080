//! Exceptions, MSRs, system calls, debug registers, extended state in long mode.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

// Vectors, error codes, saved RIPs. Intel SDM Vol. 3A §6.15.
guest!(
    exceptions,
    r#"
    .code64
        xorl %ecx, %ecx
        FAULT divl %ecx
        FAULT ud2
        TRAP int3
        int $0x21
        FAULT .byte 0xce
        FAULT int $0x50
        # a gate that is not present
        movl $0x0e00, 0x2000 + 16 * 0x51 + 4
        FAULT int $0x51
        # INT n does not check the DPL for ring 0; a privileged register that is not there
        FAULT .byte 0x0f, 0x20, 0xc8
        FAULT .byte 0xf0, 0x90
        # CR4 and CR0: reserved bits, PG without PE
        movq %cr4, %rbx
        btsq $30, %rbx
        FAULT movq %rbx, %cr4
        movq %cr0, %rbx
        btcq $0, %rbx
        FAULT movq %rbx, %cr0
        # CR4.PAE cannot be cleared in long mode
        movq %cr4, %rbx
        btcq $5, %rbx
        FAULT movq %rbx, %cr4
        PASS
    "#
);

guest!(
    double_fault,
    r#"
    .code64
        # #GP whose gate is not present: #NP while #GP is delivered is a double fault
        andl $0xffff7fff, 0x2000 + 16 * 13 + 4
        movq $0x0000800000000000, %rbx
        FAULT movl (%rbx), %eax
        # #PF while #PF is delivered: the stack is not there
        movl $0, 0x23000 + 8 * 0x100
        invlpg 0x100000
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(2f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        movl $0x100800, %esp
    1:  movl 0x100900, %eax
    2:  # #NP while a benign INT n is delivered is just #NP
        movl $0x0e00, 0x2000 + 16 * 0x51 + 4
        FAULT int $0x51
        PASS
    "#
);

guest!(
    triple_fault,
    r#"
    .code64
        TRACE 0x77
        pushq $0
        pushq $0
        lidt (%rsp)
        int3
        TRACE 0x78
        PASS
    "#
);

// SYSCALL and SYSRET to 64-bit and compatibility mode. Intel SDM Vol. 2B; AMD APM Vol. 3.
guest!(
    syscall_sysret,
    r#"
    .code64
        movl $0xc0000081, %ecx
        xorl %eax, %eax
        movl $0x00200008, %edx
        wrmsr
        movl $0xc0000082, %ecx
        movl $(5f - 9b + 0x8000), %eax
        xorl %edx, %edx
        wrmsr
        movl $0xc0000084, %ecx
        movl $0x600, %eax
        wrmsr
        xorl %edi, %edi
        movl $(4f - 9b + 0x8000), 0x6000
        movl $(8f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        pushq $0x2b
        pushq $0x10800
        pushq $0x3602
        pushq $0x33
        pushq $(1f - 9b + 0x8000)
        iretq
    1:  # ring 3, 64 bit, IOPL 3, DF
        movl %cs, %eax
        TRACE_EAX
        syscall
    2:  movl %cs, %eax
        shll $16, %eax
        movl %ss, %edx
        orl %edx, %eax
        TRACE_EAX
        pushfq
        popq %rax
        andl $0x3600, %eax
        TRACE_EAX
        incl %edi
        syscall
    .code32
    3:  # ring 3, compatibility mode
        movl %cs, %eax
        TRACE_EAX
        # 48H is DEC EAX here and a prefix in 64-bit mode
        movl $5, %eax
        .byte 0x48
        TRACE_EAX
    4:  ud2
    .code64
    5:  leal -(2b - 9b + 0x8000)(%rcx), %eax
        testl %edi, %edi
        jz 6f
        leal -(3b - 9b + 0x8000)(%rcx), %eax
    6:  TRACE_EAX
        movl %cs, %eax
        shll $16, %eax
        movl %ss, %edx
        orl %edx, %eax
        TRACE_EAX
        pushfq
        popq %rax
        andl $0x3600, %eax
        TRACE_EAX
        movl %r11d, %eax
        andl $0x3600, %eax
        TRACE_EAX
        testl %edi, %edi
        jnz 7f
        sysretq
    7:  sysretl
    8:  # a non-canonical target of LSTAR is refused
        movl $0xc0000082, %ecx
        movl $0x80000000, %edx
        FAULT wrmsr
        # without SCE there is no SYSCALL
        movl $0xc0000080, %ecx
        rdmsr
        btrl $0, %eax
        wrmsr
        FAULT syscall
        PASS
    "#
);

// IRET and far transfers between 64-bit and compatibility mode, INT from ring 3.
guest!(
    rings_long,
    r#"
    .code64
        movl $(3f - 9b + 0x8000), 0x6000
        movl $(4f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        pushq $0x2b
        pushq $0x10800
        pushq $0x3002
        pushq $0x23
        pushq $(1f - 9b + 0x8000)
        iretq
    .code32
    1:  movl %cs, %eax
        TRACE_EAX
        int $0x3f
        movl %esp, %eax
        TRACE_EAX
        pushl $0x12345678
        popl %eax
        TRACE_EAX
        ljmpl $0x33, $(2f - 9b + 0x8000)
    .code64
    2:  movl %cs, %eax
        TRACE_EAX
        # INT with a gate of DPL 0: #GP with the gate's index
    3:  int $0x21
    4:  movl %cs, %eax
        TRACE_EAX
        # privileged in ring 3
        movl $(5f - 9b + 0x8000), 0x6000
        movl $(6f - 9b + 0x8000), 0x6004
        pushq $0x2b
        pushq $0x10800
        pushq $0x2
        pushq $0x33
        pushq $(5f - 9b + 0x8000)
        iretq
    5:  hlt
    6:  movl $(5f - 9b + 0x8000), 0x6000
        # IRET to ring 3 with a ring 0 stack selector
        pushq $0x10
        pushq $0x10800
        pushq $0x2
        pushq $0x33
        pushq $(5b - 9b + 0x8000)
        FAULT iretq
    5:  PASS
    "#
);

// MSRs: reading back, refusing. FS/GS bases, SWAPGS.
guest!(
    msrs,
    r#"
    .code64
        movl $0xc0000100, %ecx
        movl $0x00010000, %eax
        xorl %edx, %edx
        wrmsr
        movl $0x1badb002, 0x10010
        movl %fs:0x10, %eax
        TRACE_EAX
        movl $0xc0000101, %ecx
        movl $0x10000, %eax
        wrmsr
        incl %ecx
        movl $0x11000, %eax
        wrmsr
        movl $0x5eed, 0x11010
        swapgs
        movl %gs:0x10, %eax
        TRACE_EAX
        rdmsr
        TRACE_EAX
        # bases must be canonical
        movl $0x00008000, %edx
        FAULT wrmsr
        # bus and processor speed, which old programs read without being ready for a fault
        movl $0x2a, %ecx
        rdmsr
        movl $0x2c, %ecx
        rdmsr
        TRACE_EAX
        movl $0x198, %ecx
        rdmsr
        TRACE_EAX
        # an MSR that does not exist
        movl $0x12345, %ecx
        FAULT rdmsr
        FAULT wrmsr
        # EFER: a reserved bit; LME cannot change while paging is on
        movl $0xc0000080, %ecx
        rdmsr
        btsl $1, %eax
        FAULT wrmsr
        movl $0xc0000080, %ecx
        rdmsr
        btrl $8, %eax
        FAULT wrmsr
        # PAT: type 2 is reserved
        movl $0x277, %ecx
        rdmsr
        TRACE_EAX
        movl $2, %eax
        FAULT wrmsr
        # loading a null selector in 64-bit mode leaves or clears the base; a flat one clears it
        movl $0x10, %eax
        movl %eax, %fs
        movl $0xc0000100, %ecx
        rdmsr
        TRACE_EAX
        PASS
    "#
);

guest!(
    fsgsbase,
    r#"
    .code64
        # without CR4.FSGSBASE: #UD
        FAULT rdfsbase %rax
        movq %cr4, %rax
        btsl $16, %eax
        movq %rax, %cr4
        movabsq $0xffff800012345678, %rbx
        wrgsbase %rbx
        rdgsbase %rax
        TRACE_EAX
        shrq $32, %rax
        TRACE_EAX
        # 32-bit form clears the upper half
        movl $0x10000, %ebx
        wrfsbase %ebx
        rdfsbase %rax
        TRACE_EAX
        movabsq $0x0000800000000000, %rbx
        FAULT wrfsbase %rbx
        PASS
    "#
);

guest!(
    rdtscp_rdpid,
    r#"
    .code64
        movl $0xc0000103, %ecx
        movl $0x77, %eax
        xorl %edx, %edx
        wrmsr
        rdtscp
        movl %ecx, %eax
        TRACE_EAX
        rdpid %rax
        TRACE_EAX
        # the counter does not go back
        rdtsc
        movl %eax, %esi
        movl %edx, %edi
        shlq $32, %rdi
        orq %rsi, %rdi
        rdtsc
        shlq $32, %rdx
        orq %rdx, %rax
        cmpq %rdi, %rax
        setae %al
        movzbl %al, %eax
        TRACE_EAX
        PASS
    "#
);

guest!(
    cpuid_leaves,
    r#"
    .code64
        xorl %eax, %eax
        cpuid
        TRACE_EAX
        movl %ebx, %eax
        TRACE_EAX
        movl $1, %eax
        cpuid
        movl %ebx, %eax
        shrl $24, %eax
        TRACE_EAX
        # CPUID.OSXSAVE follows CR4.OSXSAVE
        movl %ecx, %eax
        shrl $27, %eax
        andl $1, %eax
        TRACE_EAX
        movq %cr4, %rax
        btsl $18, %eax
        movq %rax, %cr4
        movl $1, %eax
        cpuid
        movl %ecx, %eax
        shrl $27, %eax
        andl $1, %eax
        TRACE_EAX
        # a sub-leaf that is not there is all zeroes
        movl $7, %eax
        movl $9, %ecx
        cpuid
        orl %ebx, %eax
        orl %ecx, %eax
        orl %edx, %eax
        TRACE_EAX
        movl $0x80000001, %eax
        cpuid
        movl %edx, %eax
        andl $0x20000000, %eax
        TRACE_EAX
        PASS
    "#
);

guest!(
    xsave_xrstor,
    r#"
    .code64
        # XGETBV without OSXSAVE: #UD
        xorl %ecx, %ecx
        FAULT xgetbv
        movq %cr4, %rax
        orl $0x40600, %eax
        movq %rax, %cr4
        xorl %ecx, %ecx
        xgetbv
        TRACE_EAX
        # x87 cannot be switched off
        xorl %ecx, %ecx
        movl $2, %eax
        xorl %edx, %edx
        FAULT xsetbv
        xorl %ecx, %ecx
        movl $3, %eax
        xorl %edx, %edx
        xsetbv
        movabsq $0x0123456789abcdef, %rbx
        movq %rbx, %xmm3
        movl $3, %eax
        xsave 0x10000
        movl 0x10000 + 160 + 48, %eax
        TRACE_EAX
        movl 0x10000 + 512, %eax
        andl $2, %eax
        TRACE_EAX
        pxor %xmm3, %xmm3
        movl $3, %eax
        xorl %edx, %edx
        xrstor 0x10000
        movd %xmm3, %eax
        TRACE_EAX
        # XSTATE_BV says initial: the register becomes zero whatever the area holds
        andl $0xfffffffd, 0x10000 + 512
        movl $3, %eax
        xrstor 0x10000
        movd %xmm3, %eax
        TRACE_EAX
        # an area that is not 64-byte aligned
        movl $3, %eax
        FAULT xsave 0x10008
        # a reserved bit of XSTATE_BV
        orb $0x80, 0x10000 + 513
        movl $3, %eax
        FAULT xrstor 0x10000
        PASS
    "#
);

guest!(
    cmpxchg16b,
    r#"
    .code64
        movq $7, 0x10000
        movq $8, 0x10008
        xorl %eax, %eax
        xorl %edx, %edx
        movl $1, %ebx
        movl $2, %ecx
        lock cmpxchg16b 0x10000
        setz %sil
        shll $4, %eax
        orl %edx, %eax
        shll $4, %eax
        orb %sil, %al
        TRACE_EAX
        movl $7, %eax
        movl $8, %edx
        lock cmpxchg16b 0x10000
        setz %al
        movzbl %al, %eax
        TRACE_EAX
        movl 0x10008, %eax
        TRACE_EAX
        FAULT cmpxchg16b 0x10008
        PASS
    "#
);

// #NM with CR0.TS and CR0.EM, UMIP. Intel SDM Vol. 3A §2.5.
guest!(
    task_switched,
    r#"
    .code64
        movq %cr0, %rax
        orl $0x8, %eax
        movq %rax, %cr0
        FAULT fnop
        FAULT movaps %xmm0, %xmm1
        clts
        # the x87 unit under EM
        movq %cr0, %rax
        orl $0x4, %eax
        movq %rax, %cr0
        FAULT fnop
        # SSE under EM is #UD
        FAULT movaps %xmm0, %xmm1
        PASS
    "#
);

guest!(
    umip,
    r#"
    .code64
        movq %cr4, %rax
        btsl $11, %eax
        movq %rax, %cr4
        # ring 0 may
        sgdt 0x10000
        movl 0x10002, %eax
        TRACE_EAX
        smsw %ax
        andl $1, %eax
        TRACE_EAX
        # ring 3 may not
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(2f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        pushq $0x2b
        pushq $0x10800
        pushq $0x2
        pushq $0x33
        pushq $(1f - 9b + 0x8000)
        iretq
    1:  sidt 0x10020
    2:  PASS
    "#
);

// #DB. Intel SDM Vol. 3B §17.2, §17.3.
guest!(
    debug,
    r#"
    .code64
        # single step
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(1f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        pushfq
        orl $0x100, (%rsp)
        popfq
        nop
    1:  movl $0xffff0ff0, %eax
        movq %rax, %dr6
        # MOV SS holds the trap back by one instruction
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(1f - 9b + 0x8000), 0x6004
        movl $0x10, %ebx
        pushfq
        orl $0x100, (%rsp)
        popfq
        movl %ebx, %ss
        nop
    1:  movl $0xffff0ff0, %eax
        movq %rax, %dr6
        # INT1: DR6 stays
        TRAP .byte 0xf1
        # a data write breakpoint on 4 bytes at 10000H, reported after the write
        movl $0x10000, %eax
        movq %rax, %dr0
        movl $0xd0402, %eax
        movq %rax, %dr7
        movl 0x10000, %eax
        TRAP movb $1, 0x10003
        movl $0xffff0ff0, %eax
        movq %rax, %dr6
        # an instruction breakpoint is a fault
        movl $(1f - 9b + 0x8000), %eax
        movq %rax, %dr1
        movl $0x408, %eax
        movq %rax, %dr7
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(2f - 9b + 0x8000), 0x6004
    1:  nop
    2:  movl $0xffff0ff0, %eax
        movq %rax, %dr6
        # general detect
        movl $0x2400, %eax
        movq %rax, %dr7
        FAULT movq %dr0, %rax
        movq %dr7, %rax
        TRACE_EAX
        # DR4 with CR4.DE: #UD
        movq %cr4, %rax
        btsl $3, %eax
        movq %rax, %cr4
        FAULT .byte 0x0f, 0x21, 0xe0
        PASS
    "#
);

const fn guest(
    name: &'static str,
    image: fn() -> &'static [u8; 4096],
    trace: &'static [u32],
) -> Guest {
    Guest {
        name,
        image,
        entry: Entry::Long,
        vcpus: 1,
        end: End::Pass,
        trace,
    }
}

pub(super) const GUESTS: &[Guest] = &[
    guest(
        "system/exceptions",
        exceptions,
        &[
            0, 0, 6, 0, 3, 0, 0x121, 6, 0, 13, 0x282, 11, 0x28a, 6, 0, 6, 0, 13, 0, 13, 0, 13, 0,
        ],
    ),
    guest(
        "system/double-fault",
        double_fault,
        &[8, 0, 8, 0, 11, 0x28a],
    ),
    Guest {
        name: "system/triple-fault",
        image: triple_fault,
        entry: Entry::Long,
        vcpus: 1,
        end: End::TripleFault,
        trace: &[0x77],
    },
    guest(
        "system/syscall-sysret",
        syscall_sysret,
        &[
            0x33,
            0,
            0x0008_0010,
            0x3000,
            0x3600,
            0x0033_002b,
            0x3600,
            0,
            0x0008_0010,
            0x3000,
            0x3600,
            0x23,
            4,
            6,
            0,
            13,
            0,
            6,
            0,
        ],
    ),
    guest(
        "system/rings",
        rings_long,
        &[
            0x23,
            0x13f,
            0x10800,
            0x1234_5678,
            0x33,
            13,
            0x10a,
            8,
            13,
            0,
            13,
            0x10,
        ],
    ),
    guest(
        "system/msrs",
        msrs,
        &[
            0x1bad_b002,
            0x5eed,
            0x10000,
            13,
            0,
            0x0100_0000,
            1000,
            13,
            0,
            13,
            0,
            13,
            0,
            13,
            0,
            0x0007_0406,
            13,
            0,
            0,
        ],
    ),
    guest(
        "system/fsgsbase",
        fsgsbase,
        &[6, 0, 0x1234_5678, 0xffff_8000, 0x10000, 13, 0],
    ),
    guest("system/rdtscp-rdpid", rdtscp_rdpid, &[0x77, 0x77, 1]),
    guest(
        "system/cpuid",
        cpuid_leaves,
        &[0xd, 0x6874_7541, 0, 0, 1, 0, 0x2000_0000],
    ),
    guest(
        "system/xsave",
        xsave_xrstor,
        &[6, 0, 1, 13, 0, 0x89ab_cdef, 2, 0x89ab_cdef, 0, 13, 0, 13, 0],
    ),
    guest("system/cmpxchg16b", cmpxchg16b, &[0x780, 1, 2, 13, 0]),
    guest(
        "system/device-not-available",
        task_switched,
        &[7, 0, 7, 0, 7, 0, 6, 0],
    ),
    guest("system/umip", umip, &[0x1000, 1, 13, 0]),
    guest(
        "system/debug",
        debug,
        &[
            1,
            0,
            0xffff_4ff0,
            1,
            0,
            0xffff_4ff0,
            1,
            0,
            0xffff_0ff0,
            1,
            0,
            0xffff_0ff1,
            1,
            0,
            0xffff_0ff2,
            1,
            0,
            0xffff_2ff0,
            0x400,
            6,
            0,
        ],
    ),
];
