//! Real mode, unreal mode, virtual-8086 mode. Intel SDM Vol. 3A chapter 20.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

// ALU flags, 16-bit wrap-around of offsets, string moves, stack.
guest!(
    real_arithmetic,
    r#"
    .code16
        movw $0x7fff, %ax
        addw $1, %ax
        pushfw
        popw %bx
        movzwl %bx, %eax
        andl $0x8d5, %eax
        TRACE_EAX
        movw $0x1234, %ax
        movw $0x10, %bx
        mulw %bx
        movzwl %ax, %eax
        shll $16, %edx
        orl %edx, %eax
        TRACE_EAX
        movw $0x1000, %ax
        movw %ax, %es
        movw $(5f - 9b + 0x8000), %si
        movw $0x20, %di
        movw $4, %cx
        cld
        rep movsw
        movl %es:0x24, %eax
        TRACE_EAX
        # FFFF:0010 is physical 100000H with A20 on.
        movw $0xffff, %ax
        movw %ax, %fs
        movl $0xcafe1234, %fs:0x10
        movl $0x100000, %eax
        movl %fs:0x10, %eax
        TRACE_EAX
        movl $1000000, %eax
        xorl %edx, %edx
        movl $7, %ecx
        divl %ecx
        TRACE_EAX
        movl %edx, %eax
        TRACE_EAX
        PASS
    5:  .long 0x11223344, 0x55667788
    "#
);

// DAA, DAS, AAA, AAS, AAM, AAD. Intel SDM Vol. 1 §7.3.4.
guest!(
    real_bcd,
    r#"
    .code16
        movb $0x79, %al
        addb $0x35, %al
        daa
        movzbl %al, %eax
        TRACE_EAX
        movb $0x35, %al
        subb $0x47, %al
        das
        movzbl %al, %eax
        TRACE_EAX
        movw $0x0107, %ax
        addb $6, %al
        aaa
        movzwl %ax, %eax
        TRACE_EAX
        movw $0x0205, %ax
        subb $8, %al
        aas
        movzwl %ax, %eax
        TRACE_EAX
        movb $63, %al
        aam
        movzwl %ax, %eax
        TRACE_EAX
        movw $0x0603, %ax
        aad
        movzwl %ax, %eax
        TRACE_EAX
        PASS
    "#
);

// INT n, #DE as a fault, IRET, nested, FLAGS.IF cleared, far call and return.
guest!(
    real_interrupts,
    r#"
    .code16
        movw $(2f - 9b + 0x8000), %ax
        movw %ax, 4 * 0x21
        movw $0, 4 * 0x21 + 2
        movw $(3f - 9b + 0x8000), %ax
        movw %ax, 0
        movw $0, 2
        sti
        int $0x21
        pushfw
        popw %ax
        movzwl %ax, %eax
        andl $0x200, %eax
        TRACE_EAX
        xorw %cx, %cx
        movw $5, %ax
    4:  divw %cx
        TRACE 0x33
        lcall $0x800, $(6f - 9b)
        movzwl %sp, %eax
        TRACE_EAX
        PASS
    2:  pushfw
        popw %ax
        movzwl %ax, %eax
        andl $0x200, %eax
        orl $0x2100, %eax
        TRACE_EAX
        iretw
    3:  # a fault: the saved IP is the DIV itself; go over it
        movw %sp, %bp
        movw (%bp), %ax
        subw $(4b - 9b + 0x8000), %ax
        movzwl %ax, %eax
        orl $0xd000, %eax
        TRACE_EAX
        addw $2, (%bp)
        iretw
    6:  movl $0x800, %eax
        movw %cs, %ax
        TRACE_EAX
        lretw
    "#
);

// A 4 GiB limit loaded in protected mode survives the way back to real mode; CS stays 64 KiB.
guest!(
    unreal_mode,
    r#"
    .code16
        cli
        lgdtl 7f - 9b + 0x8000
        movl %cr0, %eax
        orb $1, %al
        movl %eax, %cr0
        jmp 1f
    1:  movw $8, %bx
        movw %bx, %ds
        andb $0xfe, %al
        movl %eax, %cr0
        ljmpw $0, $(2f - 9b + 0x8000)
    2:  movl $0x200000, %ebx
        movl $0x13572468, (%ebx)
        movl (%ebx), %eax
        TRACE_EAX
        # Loading a selector in real mode changes the base but not the limit.
        movw $0x1000, %ax
        movw %ax, %ds
        movl 0x1f0000(,%esi,1), %eax
        TRACE_EAX
        PASS
    7:  .word 15
        .long 8f - 9b + 0x8000
        .balign 8
    8:  .quad 0, 0x00cf93000000ffff
    "#
);

// Virtual-8086 mode: entered by IRET, IOPL 3: CLI, PUSHF, INT through the IDT to ring 0; IOPL 0:
// #GP on CLI.
guest!(
    virtual_8086,
    r#"
    .code32
        movl $(3f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        # IOPL 3
        movl $(2f - 9b), 0x6000
        pushl $0
        pushl $0
        pushl $0x1000
        pushl $0
        pushl $0
        pushl $0x7000
        pushl $0x23002
        pushl $0x800
        pushl $(1f - 9b)
        iretl
    .code16
    1:  cli
        pushfw
        popw %ax
        movzwl %ax, %eax
        andl $0x3200, %eax
        TRACE_EAX
        sti
        movw %ds, %ax
        movw %cs, %bx
        shll $16, %eax
        movw %bx, %ax
        TRACE_EAX
    2:  ud2
    .code32
    3:  # IOPL 0
        movl $(5f - 9b), 0x6000
        movl $(6f - 9b + 0x8000), 0x6004
        pushl $0
        pushl $0
        pushl $0
        pushl $0
        pushl $0
        pushl $0x7000
        pushl $0x20002
        pushl $0x800
        pushl $(5f - 9b)
        iretl
    .code16
    5:  cli
    .code32
    6:  pushfl
        popl %eax
        andl $0x20000, %eax
        TRACE_EAX
        PASS
    "#
);

pub(super) const GUESTS: &[Guest] = &[
    Guest {
        name: "real/arithmetic",
        image: real_arithmetic,
        entry: Entry::Real,
        vcpus: 1,
        end: End::Pass,
        trace: &[0x894, 0x0001_2340, 0x5566_7788, 0xcafe_1234, 142_857, 1],
    },
    Guest {
        name: "real/bcd",
        image: real_bcd,
        entry: Entry::Real,
        vcpus: 1,
        end: End::Pass,
        trace: &[0x14, 0x88, 0x0203, 0x0107, 0x0603, 0x3f],
    },
    Guest {
        name: "real/interrupts",
        image: real_interrupts,
        entry: Entry::Real,
        vcpus: 1,
        end: End::Pass,
        trace: &[0x2100, 0x200, 0xd000, 0x33, 0x800, 0x7f00],
    },
    Guest {
        name: "real/unreal-mode",
        image: unreal_mode,
        entry: Entry::Real,
        vcpus: 1,
        end: End::Pass,
        trace: &[0x1357_2468, 0x1357_2468],
    },
    Guest {
        name: "real/virtual-8086",
        image: virtual_8086,
        entry: Entry::Protected,
        vcpus: 1,
        end: End::Pass,
        trace: &[0x3000, 0x1000_0800, 6, 0, 13, 0, 0],
    },
];
