//! Port and memory-mapped I/O of every size, string I/O.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

guest!(
    pio_sizes,
    r#"
    .code64
        movw $0xe0, %dx
        movl $0x89abcdef, %eax
        outb %al, %dx
        outw %ax, %dx
        outl %eax, %dx
        xorl %eax, %eax
        inb %dx, %al
        TRACE_EAX
        xorl %eax, %eax
        inw %dx, %ax
        TRACE_EAX
        inl %dx, %eax
        TRACE_EAX
        # IN AL leaves the rest of RAX, IN EAX clears the upper half.
        movq $-1, %rax
        inb $0xe0, %al
        TRACE_EAX
        shrq $32, %rax
        TRACE_EAX
        movq $-1, %rax
        inl $0xe0, %eax
        shrq $32, %rax
        TRACE_EAX
        PASS
    "#
);

guest!(
    pio_strings,
    r#"
    .code64
        movl $(5f - 9b + 0x8000), %esi
        movw $0xe0, %dx
        cld
        movl $3, %ecx
        rep outsb
        outsw
        outsl
        movl %ecx, %eax
        TRACE_EAX
        movl %esi, %eax
        subl $(5f - 9b + 0x8000), %eax
        TRACE_EAX
        # Backwards, over a page boundary.
        std
        movl $0x10ffe, %edi
        addl $4, %edi
        movw $0xe2, %dx
        movl $3, %ecx
        rep insw
        cld
        movl 0x10ffe, %eax
        TRACE_EAX
        movl %edi, %eax
        TRACE_EAX
        movl $0x10100, %edi
        movl $5, %ecx
        rep insb
        movl 0x10100, %eax
        TRACE_EAX
        # REP with a zero count does nothing.
        xorl %ecx, %ecx
        rep outsb
        PASS
    5:  .byte 1, 2, 3, 4, 5, 6, 7, 8, 9
    "#
);

guest!(
    mmio_sizes,
    r#"
    .code64
        movl $0xd0000000, %ebx
        movq $0x1122334455667788, %rax
        movb %al, (%rbx)
        movw %ax, 2(%rbx)
        movl %eax, 4(%rbx)
        movq %rax, 8(%rbx)
        movb $0x5a, 0x10(%rbx)
        movq $-2, 0x18(%rbx)
        xorl %eax, %eax
        movb 1(%rbx), %al
        TRACE_EAX
        movzwl 3(%rbx), %eax
        TRACE_EAX
        movl 0x20(%rbx), %eax
        TRACE_EAX
        movq 0x40(%rbx), %rax
        TRACE_EAX
        shrq $32, %rax
        TRACE_EAX
        movsbl 0x80(%rbx), %eax
        TRACE_EAX
        # Read-modify-write and a load as an operand.
        movl $1, %eax
        addl 0x20(%rbx), %eax
        TRACE_EAX
        orb $0x80, 0x10(%rbx)
        # A string store and a string load.
        movl $0xd0000030, %edi
        movl $0xa5a5a5a5, %eax
        movl $2, %ecx
        rep stosl
        movl $0xd0000050, %esi
        movl $0x10200, %edi
        movl $2, %ecx
        rep movsl
        movl 0x10204, %eax
        TRACE_EAX
        PASS
    "#
);

pub(super) const GUESTS: &[Guest] = &[
    Guest {
        name: "io/ports",
        image: pio_sizes,
        entry: Entry::Long,
        vcpus: 1,
        end: End::Pass,
        trace: &[
            0xe000_0001,
            0xef,
            0xe000_0002,
            0xcdef,
            0xe000_0004,
            0x89ab_cdef,
            0x11,
            0x2211,
            0x4433_2211,
            0xffff_ff11,
            0xffff_ffff,
            0,
        ],
    },
    Guest {
        name: "io/string-ports",
        image: pio_strings,
        entry: Entry::Long,
        vcpus: 1,
        end: End::Pass,
        trace: &[
            0xe000_0001,
            1,
            0xe000_0001,
            2,
            0xe000_0001,
            3,
            0xe000_0002,
            0x0504,
            0xe000_0004,
            0x0908_0706,
            0,
            9,
            0x0002_0003,
            0x1_0ffc,
            0x0706_0504,
        ],
    },
    Guest {
        name: "io/mmio",
        image: mmio_sizes,
        entry: Entry::Long,
        vcpus: 1,
        end: End::Pass,
        trace: &[
            0xd000_0100,
            0x88,
            0xd000_0202,
            0x7788,
            0xd000_0404,
            0x5566_7788,
            0xd000_0808,
            0x5566_7788,
            0x1122_3344,
            0xd000_0110,
            0x5a,
            0xd000_0818,
            0xffff_fffe,
            0xffff_ffff,
            1,
            0x0403,
            0x2322_2120,
            0x4342_4140,
            0x4746_4544,
            0xffff_ff80,
            0x2322_2121,
            0xd000_0110,
            0x90,
            0xd000_0430,
            0xa5a5_a5a5,
            0xd000_0434,
            0xa5a5_a5a5,
            0x5756_5554,
        ],
    },
];
