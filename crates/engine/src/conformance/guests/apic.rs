//! Local APIC, interrupts from outside, start-up of a second processor, saving and restoring.
//! Intel SDM Vol. 3A chapters 6, 8.4 and 10.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

guest!(
    timer_one_shot,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0xb, 0x3e0(%rbx)
        movl $0x30, 0x320(%rbx)
        movl $100000, 0x380(%rbx)
        sti
        hlt
        cli
        movl 0x390(%rbx), %eax
        TRACE_EAX
        # masked: the count runs out, nothing arrives
        movl $0x10030, 0x320(%rbx)
        movl $1000, 0x380(%rbx)
    1:  movl 0x390(%rbx), %eax
        testl %eax, %eax
        jnz 1b
        WINDOW
        PASS
    "#
);

guest!(
    timer_periodic,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0xb, 0x3e0(%rbx)
        movl $0x20030, 0x320(%rbx)
        movl $20000000, 0x380(%rbx)
    1:  sti
        hlt
        cli
        cmpl $3, 0x6100 + 4 * 0x30
        jb 1b
        movl $0x30030, 0x320(%rbx)
        PASS
    "#
);

guest!(
    timer_tsc_deadline,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x40030, 0x320(%rbx)
        rdtsc
        shlq $32, %rdx
        addq %rdx, %rax
        addq $3000000, %rax
        movq %rax, %rdx
        shrq $32, %rdx
        movl $0x6e0, %ecx
        wrmsr
        sti
        hlt
        cli
        rdmsr
        orl %edx, %eax
        TRACE_EAX
        # a deadline in the past fires at once
        movl $1, %eax
        xorl %edx, %edx
        wrmsr
        sti
        hlt
        cli
        PASS
    "#
);

guest!(
    self_ipi,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x00044025, 0x300(%rbx)
        movl $0x00044035, 0x300(%rbx)
        # IRR bits 25H and 35H are in the word at 210H
        movl 0x210(%rbx), %eax
        TRACE_EAX
        # the higher vector first
        WINDOW
        # TPR 30H holds back classes 2 and 3, CR8 is the same register
        movl $0x30, 0x80(%rbx)
        movq %cr8, %rax
        TRACE_EAX
        movl $0x00044035, 0x300(%rbx)
        movl $0x00044025, 0x300(%rbx)
        WINDOW
        TRACE 0x77
        movl $2, %eax
        movq %rax, %cr8
        WINDOW
        movl 0x80(%rbx), %eax
        TRACE_EAX
        xorl %eax, %eax
        movq %rax, %cr8
        WINDOW
        # physical destination 0
        movl $0, 0x310(%rbx)
        movl $0x00004033, 0x300(%rbx)
        WINDOW
        # CR8 has four bits
        movl $0x10, %eax
        FAULT movq %rax, %cr8
        PASS
    "#
);

guest!(
    x2apic,
    r#"
    .code64
        movl $2, 0x6010
        movl $0x1b, %ecx
        rdmsr
        orl $0xc00, %eax
        wrmsr
        movl $0x802, %ecx
        rdmsr
        TRACE_EAX
        movl $0x80f, %ecx
        movl $0x1ff, %eax
        xorl %edx, %edx
        wrmsr
        movl $0x83f, %ecx
        movl $0x31, %eax
        wrmsr
        WINDOW
        # ICR is one register: destination 0 in the upper half
        movl $0x830, %ecx
        movl $0x4032, %eax
        xorl %edx, %edx
        wrmsr
        WINDOW
        # SELF IPI is write-only; 80EH (DFR) does not exist
        movl $0x83f, %ecx
        FAULT rdmsr
        movl $0x80e, %ecx
        FAULT rdmsr
        # from x2APIC mode there is no way straight to xAPIC mode
        movl $0x1b, %ecx
        rdmsr
        andl $0xfffffbff, %eax
        FAULT wrmsr
        PASS
    "#
);

// EOI takes only zero in x2APIC mode. Intel SDM Vol. 3A §10.12.1.2.
guest!(
    x2apic_eoi,
    r#"
    .code64
        movl $0x1b, %ecx
        rdmsr
        orl $0xc00, %eax
        wrmsr
        movl $0x80b, %ecx
        movl $1, %eax
        xorl %edx, %edx
        FAULT wrmsr
        PASS
    "#
);

// INIT and SIPI; the AP runs in real mode, both processors interrupt each other.
guest!(
    startup,
    r#"
    .code64
        movl $1, 0x6010
        movb $0xea, 0x7000
        movw $(3f - 9b + 0x8000), 0x7001
        movw $0, 0x7003
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x01000000, 0x310(%rbx)
        movl $0x00004500, 0x300(%rbx)
        movl $0x00004607, 0x300(%rbx)
    1:  pause
        cmpl $1, 0x6020
        jne 1b
        movl 0x6028, %eax
        TRACE_EAX
        movl $0x01000000, 0x310(%rbx)
        movl $0x00004041, 0x300(%rbx)
        # the AP answers with vector 31H
        sti
    1:  pause
        cmpl $1, 0x6100 + 4 * 0x31
        jne 1b
        cli
        movl 0x6024, %eax
        TRACE_EAX
        PASS
    .code16
    3:  cli
        xorw %ax, %ax
        movw %ax, %ss
        movw $0x6f00, %sp
        movw %ax, %ds
        movzwl %sp, %eax
        # unreal mode, to reach the APIC
        lgdtl 7f - 9b + 0x8000
        movl %cr0, %eax
        orb $1, %al
        movl %eax, %cr0
        jmp 4f
    4:  movw $0x10, %dx
        movw %dx, %ds
        andb $0xfe, %al
        movl %eax, %cr0
        ljmpw $0, $(5f - 9b + 0x8000)
    5:  xorw %ax, %ax
        movw %ax, %ds
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%ebx)
        movw $(6f - 9b + 0x8000), 4 * 0x41
        movw $0, 4 * 0x41 + 2
        movl 0x20(%ebx), %eax
        movl %eax, 0x6028
        movl $1, 0x6020
        sti
    1:  hlt
        jmp 1b
    6:  incl 0x6024
        movl $0xfee00000, %ebx
        movl $0, 0xb0(%ebx)
        movl $0, 0x310(%ebx)
        movl $0x00004031, 0x300(%ebx)
        iretw
        .balign 4
    7:  .word 0x47
        .long 0x1000
    "#
);

guest!(
    msi,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        HOST 1
        TRACE 0x11
        WINDOW
        # software-disabled: nothing is accepted
        movl $0xff, 0xf0(%rbx)
        HOST 1
        WINDOW
        TRACE 0x12
        PASS
    "#
);

guest!(
    level_eoi,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        HOST 4
        # TMR says level
        WINDOW
        TRACE 0x22
        HOST 4
        WINDOW
        # the end of an edge interrupt is nobody's business
        HOST 1
        WINDOW
        PASS
    "#
);

guest!(
    nmi,
    r#"
    .code64
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        cli
        HOST 3
        nop
        TRACE 0x11
        HOST 3
        nop
        TRACE 0x12
        PASS
    "#
);

guest!(
    pic,
    r#"
    .code64
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        # LINT0 masked: the PIC is not heard
        HOST 2
        WINDOW
        TRACE 0x11
        # ExtINT
        movl $0x700, 0x350(%rbx)
        WINDOW
        TRACE 0x12
        HOST 2
        TRACE 0x13
        WINDOW
        # it wakes a halted processor
        HOST 7
        sti
        hlt
        cli
        TRACE 0x14
        PASS
    "#
);

guest!(
    halt_wake_up,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        HOST 6
        sti
        hlt
        cli
        TRACE 0x11
        # an interrupt that is pending already
        HOST 1
        sti
        hlt
        cli
        TRACE 0x12
        PASS
    "#
);

// STI and MOV SS keep interrupts out for one instruction; STI with IF already set does not.
guest!(
    shadows,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x00044031, 0x300(%rbx)
        sti
        movl 0x6100 + 4 * 0x31, %esi
        movl 0x6100 + 4 * 0x31, %edi
        cli
        movl %esi, %eax
        TRACE_EAX
        movl %edi, %eax
        TRACE_EAX
        # STI; CLI lets nothing in
        movl $0x00044031, 0x300(%rbx)
        sti
        cli
        nop
        movl 0x6100 + 4 * 0x31, %eax
        TRACE_EAX
        # POPF and IRET have no shadow
        pushq $0x202
        popfq
        cli
        movl 0x6100 + 4 * 0x31, %eax
        TRACE_EAX
        PASS
    "#
);

// Registers, segment bases, a pending interrupt and the APIC survive a move to another VM.
guest!(
    save_restore,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0xc0000100, %ecx
        movl $0x00010000, %eax
        xorl %edx, %edx
        wrmsr
        movl $0xc0000082, %ecx
        movl $0x12345678, %eax
        wrmsr
        movl $0xcafe0001, 0x10010
        movq $0x0f0f0f0f, %r8
        movabsq $0x1111222233334444, %r15
        movl $0x1234, %eax
        movq %rax, %cr2
        movl $0x4321, %eax
        movq %rax, %dr2
        movl $0x00044031, 0x300(%rbx)
        stc
        HOST 5
        setc %al
        movzbl %al, %eax
        TRACE_EAX
        movl %r8d, %eax
        TRACE_EAX
        movq %r15, %rax
        shrq $32, %rax
        TRACE_EAX
        movl %fs:0x10, %eax
        TRACE_EAX
        movq %cr2, %rax
        TRACE_EAX
        movq %dr2, %rax
        TRACE_EAX
        movl $0xc0000082, %ecx
        rdmsr
        TRACE_EAX
        # IRR, then its delivery
        movl 0x210(%rbx), %eax
        TRACE_EAX
        WINDOW
        # again, in the middle of a loop
        xorl %esi, %esi
        movl $10, %edi
    1:  addl %edi, %esi
        cmpl $5, %edi
        jne 2f
        HOST 5
    2:  decl %edi
        jnz 1b
        movl %esi, %eax
        TRACE_EAX
        PASS
    "#
);

// A one-shot timer that is running when the machine moves still fires, once.
guest!(
    save_timer,
    r#"
    .code64
        movl $1, 0x6010
        movl $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0xb, 0x3e0(%rbx)
        movl $0x30, 0x320(%rbx)
        movl $50000000, 0x380(%rbx)
        HOST 5
        movl 0x380(%rbx), %eax
        TRACE_EAX
        sti
        hlt
        cli
        movl 0x390(%rbx), %eax
        TRACE_EAX
        PASS
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
    guest("apic/timer-one-shot", timer_one_shot, 1, &[0x130, 0]),
    guest(
        "apic/timer-periodic",
        timer_periodic,
        1,
        &[0x130, 0x130, 0x130],
    ),
    guest(
        "apic/timer-tsc-deadline",
        timer_tsc_deadline,
        1,
        &[0x130, 0, 0x130],
    ),
    guest(
        "apic/self-ipi",
        self_ipi,
        1,
        &[
            0x0020_0020,
            0x135,
            0x125,
            3,
            0x77,
            0x135,
            0x20,
            0x125,
            0x133,
            13,
            0,
        ],
    ),
    guest(
        "apic/x2apic",
        x2apic,
        1,
        &[0, 0x131, 0x132, 13, 0, 13, 0, 13, 0],
    ),
    guest("apic/x2apic-eoi", x2apic_eoi, 1, &[13, 0]),
    guest("apic/startup-ipi", startup, 2, &[0x0100_0000, 0x131, 1]),
    guest("apic/msi", msi, 1, &[0x11, 0x131, 0x12]),
    guest(
        "apic/level-eoi",
        level_eoi,
        1,
        &[0x132, 0xe010_0032, 0x22, 0x132, 0xe010_0032, 0x131],
    ),
    guest("apic/nmi", nmi, 1, &[0x102, 0x11, 0x102, 0x12]),
    guest(
        "apic/pic",
        pic,
        1,
        &[0x11, 0x135, 0x12, 0x13, 0x135, 0x135, 0x14],
    ),
    guest(
        "apic/halt-wake-up",
        halt_wake_up,
        1,
        &[0x131, 0x11, 0x131, 0x12],
    ),
    guest(
        "apic/interrupt-shadows",
        shadows,
        1,
        &[0x131, 0, 1, 1, 0x131, 2],
    ),
    guest(
        "state/save-restore",
        save_restore,
        1,
        &[
            1,
            0x0f0f_0f0f,
            0x1111_2222,
            0xcafe_0001,
            0x1234,
            0x4321,
            0x1234_5678,
            0x0002_0000,
            0x131,
            55,
        ],
    ),
    guest(
        "state/running-timer",
        save_timer,
        1,
        &[50_000_000, 0x130, 0],
    ),
];
