//! Self-modifying and cross-modifying code. Intel SDM Vol. 3A §8.1.3: on the same processor a
//! store to code takes effect after the next taken branch at the latest.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

guest!(
    same_page,
    r#"
    .code64
        xorl %esi, %esi
        movl $3, %edi
        # the immediate of MOV changes in each round, before it runs again
    1:  jmp 2f
    2:  movl $0x100, %eax
        addl %eax, %esi
        incl 2b - 9b + 0x8001
        decl %edi
        jnz 1b
        movl %esi, %eax
        TRACE_EAX
        # the very next instruction, over a jump
        movb $0xc3, 3f - 9b + 0x8000
        movl $0x11, %eax
        call 3f
        TRACE_EAX
        PASS
    3:  movl $0x22, %eax
        ret
    "#
);

// An instruction over a page boundary; the second page is changed, then mapped elsewhere.
guest!(
    page_crossing,
    r#"
    .code64
        # MOV EAX, imm32; RET at 10FFDH: the last two bytes of the immediate lie in 11000H
        movb $0xb8, 0x10ffd
        movl $0x44332211, 0x10ffe
        movb $0xc3, 0x11002
        movl $0x10ffd, %ebx
        call *%rbx
        TRACE_EAX
        movb $0x99, 0x11001
        call *%rbx
        TRACE_EAX
        # another page at 11000H
        movl $0xc3c3c3aa, 0x12000
        movl $0x12007, 0x23000 + 8 * 0x11
        invlpg 0x11000
        call *%rbx
        TRACE_EAX
        # written through an alias: linear 13000H is the same page as 12000H
        movl $0x12007, 0x23000 + 8 * 0x13
        invlpg 0x13000
        movb $0xbb, 0x13000
        call *%rbx
        TRACE_EAX
        PASS
    "#
);

// REP STOS and REP MOVS over code.
guest!(
    string_store,
    r#"
    .code64
        movb $0xb8, 0x10000
        movl $0x1, 0x10001
        movb $0xc3, 0x10005
        movl $0x10000, %ebx
        call *%rbx
        TRACE_EAX
        movl $0x10001, %edi
        movb $0x5a, %al
        movl $4, %ecx
        rep stosb
        call *%rbx
        TRACE_EAX
        movl $(5f - 9b + 0x8000), %esi
        movl $0x10000, %edi
        movl $6, %ecx
        rep movsb
        call *%rbx
        TRACE_EAX
        PASS
    5:  .byte 0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3
    "#
);

// Another processor changes the code that this one runs in a loop without a serialising
// instruction; it must see the change in the end.
guest!(
    cross_modifying,
    r#"
    .code64
        # AP trampoline at 7000H: real mode, far jump to 0:(2f)
        movl $0x0000ea90, 0x10000
        movb $0xea, 0x7000
        movw $(2f - 9b + 0x8000), 0x7001
        movw $0, 0x7003
        movl $0xfee00000, %ebx
        movl $0x000c4500, 0x300(%rbx)
        movl $0x000c4607, 0x300(%rbx)
    1:  call 3f
        testl %eax, %eax
        jz 1b
        TRACE_EAX
        PASS
    3:  movl $0, %eax
        ret
    .code16
    2:  movw $1000, %cx
    4:  loop 4b
        # the low byte of the immediate, in one store
        movb $0x66, %cs:(3b - 9b + 0x8001)
    5:  jmp 5b
    "#
);

const fn guest(
    name: &'static str,
    image: fn() -> &'static [u8; 4096],
    vcpus: u32,
    trace: &'static [u32],
) -> Guest {
    Guest {
        name,
        image,
        entry: Entry::Long,
        vcpus,
        end: End::Pass,
        trace,
    }
}

pub(super) const GUESTS: &[Guest] = &[
    guest("smc/same-page", same_page, 1, &[0x303, 0x11]),
    guest(
        "smc/page-crossing",
        page_crossing,
        1,
        &[
            0x4433_2211,
            0x9933_2211 & 0x99ff_ffff,
            0xc3aa_2211,
            0xc3bb_2211,
        ],
    ),
    guest(
        "smc/string-store",
        string_store,
        1,
        &[1, 0x5a5a_5a5a, 0x1234_5678],
    ),
    guest("smc/cross-modifying", cross_modifying, 2, &[0x66]),
];
