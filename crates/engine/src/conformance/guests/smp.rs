//! Several processors that sleep and wake each other: nothing may get lost on the way.
//! Intel SDM Vol. 3A §10.6 (IPIs), §10.11 (MSIs), §10.5.4.1 (TSC deadline); Vol. 2B, STI.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

// Six tokens wander over four processors. A token travels as an interrupt whose vector names it
// (30H + token), so nothing merges: by IPI, by an MSI that the host sends for it, or by the TSC
// deadline of the processor that has it. A processor without a token halts, and nothing but the
// next token wakes it. An interrupt or a wake-up that is lost stops its token for ever.
//
// An interrupt between STI and HLT would be such a loss: the processor would halt although its
// token is there. The handlers report BADH if they find that they came in there. Half of the
// times HLT is the first instruction of another page than STI.
//
// R15: this processor's words: tokens here, tokens that wait for the timer. R12: random numbers.
// 6400H: hops of each token; 6440H: tokens that still wander; 6444H: processors that are ready.
guest!(
    wake_ups,
    r#"
    .code64
        movl %edi, %eax
        shll $10, %eax
        leal 0x10000(%rax), %r15d
        movabsq $0x5851f42d4c957f2d, %r13
        leal 1(%rdi), %r12d
        imulq %r13, %r12
        movl $0x1b, %ecx
        rdmsr
        orl $0xc00, %eax
        wrmsr
        movl $0x80f, %ecx
        movl $0x1ff, %eax
        xorl %edx, %edx
        wrmsr
        movl $0x832, %ecx
        movl $0x40038, %eax
        wrmsr
        testl %edi, %edi
        jnz 2f
        # gates of the tokens and of the timer: the stubs are below 64 KiB
        movl $(20f - 9b + 0x8000), %eax
        movl $0x2300, %edx
    1:  movw %ax, (%rdx)
        addl $8, %eax
        addl $16, %edx
        cmpl $0x2360, %edx
        jne 1b
        movw $(22f - 9b + 0x8000), 0x2380
        # hlt; ret
        movw $0xc3f4, 0x9000
        movl $6, 0x6440
        movl $0x3f, (%r15)
    2:  lock incl 0x6444
    1:  pause
        cmpl $4, 0x6444
        jne 1b

    10: cli
        imulq %r13, %r12
        incq %r12
        # at every moment of the way to HLT
        movq %r12, %rax
        shrq $57, %rax
    1:  decl %eax
        jns 1b
        cmpl $0, (%r15)
        jne 11f
        testl $0x40000, %r12d
        jnz 1f
        sti
    16: hlt
        jmp 10b
    1:  movl $0x8fff, %eax
        call *%rax
        jmp 10b

    11: bsfl (%r15), %esi
        btrl %esi, (%r15)
        incl 0x6400(,%rsi,4)
        cmpl $1500, 0x6400(,%rsi,4)
        jae 14f
        movq %r12, %rax
        shrq $33, %rax
        movl %eax, %ebx
        shrl $2, %ebx
        andl $3, %ebx
        testl $0x3f0, %eax
        jnz 1f
        # a locked access of two pages stops the world
        lock incl 0x11ffe
    1:  andl $3, %eax
        cmpl $2, %eax
        je 12f
        ja 13f
        leal 0x4030(%rsi), %eax
        movl %ebx, %edx
        movl $0x830, %ecx
        wrmsr
        jmp 15f
    12: btsl %esi, 4(%r15)
        rdtsc
        shlq $32, %rdx
        orq %rdx, %rax
        movq %r12, %rdx
        shrq $47, %rdx
        addq %rdx, %rax
        movq %rax, %rdx
        shrq $32, %rdx
        movl $0x6e0, %ecx
        wrmsr
        jmp 15f
    13: shll $8, %ebx
        leal 0x30(%rbx,%rsi), %eax
        outl %eax, $0xe3
        jmp 15f
    14: lock decl 0x6440
        jnz 15f
        PASS
    15: testl $0x10000, %r12d
        jz 10b
        sti
        nop
        testl $0x20000, %r12d
        jz 10b
        pushfq
        cli
        popfq
        jmp 10b

        .balign 8
    20: .irp n,0,1,2,3,4,5
        pushq $\n
        jmp 21f
        .balign 8
        .endr
    21: pushq %rax
        pushq %rcx
        pushq %rdx
        movl 24(%rsp), %eax
        btsl %eax, (%r15)
        movl 32(%rsp), %eax
        call 23f
        movl $0x80b, %ecx
        xorl %eax, %eax
        xorl %edx, %edx
        wrmsr
        popq %rdx
        popq %rcx
        popq %rax
        addq $8, %rsp
        iretq
    22: pushq %rax
        pushq %rcx
        pushq %rdx
        movl 4(%r15), %eax
        orl %eax, (%r15)
        movl $0, 4(%r15)
        movl 24(%rsp), %eax
        call 23f
        movl $0x80b, %ecx
        xorl %eax, %eax
        xorl %edx, %edx
        wrmsr
        popq %rdx
        popq %rcx
        popq %rax
        iretq
    23: cmpl $(16b - 9b + 0x8000), %eax
        je 1f
        cmpl $0x9000, %eax
        jne 2f
    1:  movl $0xbad, %eax
        outl %eax, $0xf0
    2:  ret
        .org 9b + 4095, 0xcc
        sti
    "#
);

pub(super) const GUESTS: &[Guest] = &[Guest {
    name: "smp/wake-ups",
    image: wake_ups,
    entry: Entry::LongTogether,
    vcpus: 4,
    end: End::Pass,
    trace: &[],
}];
