//! Segmentation, gates, task switches and SYSENTER in 32-bit protected mode.
//! Intel SDM Vol. 3A chapters 3, 5, 6 and 7.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

// Loading segment registers: which vector, which error code.
guest!(
    segment_loads,
    r#"
    .code32
        # 58 data to FFFH, 60 not present, 68 execute-only, 70 read-only, 78 expand-down
        movl $0x00000fff, 0x1058
        movl $0x00409300, 0x105c
        movl $0x0000ffff, 0x1060
        movl $0x00cf1300, 0x1064
        movl $0x0000ffff, 0x1068
        movl $0x00cf9900, 0x106c
        movl $0x0000ffff, 0x1070
        movl $0x00cf9100, 0x1074
        movl $0x00000fff, 0x1078
        movl $0x00409700, 0x107c
        # a null selector may be loaded but not used
        xorl %eax, %eax
        movw %ax, %fs
        FAULT movl %fs:0x6000, %eax
        xorl %eax, %eax
        FAULT movw %ax, %ss
        # beyond the limit of the GDT; RPL is not part of the error code
        movl $0x203, %eax
        FAULT movw %ax, %es
        # an LDT that is not there
        movl $0x5c, %eax
        FAULT movw %ax, %es
        movl $0x60, %eax
        FAULT movw %ax, %es
        movl $0x60, %eax
        FAULT movw %ax, %ss
        movl $0x68, %eax
        FAULT movw %ax, %es
        movl $0x70, %eax
        FAULT movw %ax, %ss
        # DPL 3 data as the stack of ring 0
        movl $0x28, %eax
        FAULT movw %ax, %ss
        # MOV to CS does not exist
        FAULT .byte 0x8e, 0xc8
        # TR: a busy TSS, not a TSS
        movl $0x48, %eax
        FAULT ltr %ax
        movl $0x10, %eax
        FAULT ltr %ax
        movl $0x10, %eax
        FAULT lldt %ax
        # far jumps: data, null, DPL 3 code that does not conform
        FAULT ljmpl $0x10, $0x8000
        FAULT ljmpl $0x3, $0x8000
        FAULT ljmpl $0x20, $0x8000
        PASS
    "#
);

guest!(
    segment_limits,
    r#"
    .code32
        movl $0x00000fff, 0x1058
        movl $0x00409300, 0x105c
        movl $0x0000ffff, 0x1070
        movl $0x00cf9100, 0x1074
        movl $0x00000fff, 0x1078
        movl $0x00409700, 0x107c
        movl $0x68676665, 0xffc
        movl $0x58, %eax
        movw %ax, %fs
        movl %fs:0xffc, %eax
        TRACE_EAX
        FAULT movl %fs:0xffd, %eax
        FAULT movb %fs:0x1000, %al
        # read-only
        movl $0x70, %eax
        movw %ax, %fs
        FAULT movl %eax, %fs:0x10000
        # expand-down: valid above the limit
        movl $0x78, %eax
        movw %ax, %fs
        FAULT movl %fs:0xffc, %eax
        FAULT movb %fs:0xfff, %al
        movl $0x9988, 0x10000
        movl %fs:0x10000, %eax
        TRACE_EAX
        # code is not writable
        FAULT movl %eax, %cs:0x10000
        # the stack segment: #SS
        movl $0x58, %eax
        movl $0xf00, %esp
        movw %ax, %ss
        xorl %ebp, %ebp
        FAULT movl 0x1000(%ebp), %eax
        movl $0x7f00, %esp
        # LSL, LAR, VERR, VERW
        movl $0x70, %eax
        lsl %eax, %eax
        TRACE_EAX
        movl $0x70, %eax
        lar %eax, %eax
        andl $0xf0ff00, %eax
        TRACE_EAX
        movl $0x70, %eax
        verw %ax
        setz %cl
        verr %ax
        setz %ch
        movzwl %cx, %eax
        TRACE_EAX
        PASS
    "#
);

// BOUND, INTO, the alignment check in ring 3, #GP for the exception vectors' gates.
guest!(
    bound_into_align,
    r#"
    .code32
        movl $5, 0x10000
        movl $9, 0x10004
        movl $5, %eax
        .byte 0x62, 0x05, 0x00, 0x00, 0x01, 0x00
        movl $10, %eax
        FAULT .byte 0x62, 0x05, 0x00, 0x00, 0x01, 0x00
        # INTO is a trap
        movl $0x7fffffff, %eax
        incl %eax
        TRAP into
        xorl %eax, %eax
        into
        # #AC: CR0.AM, EFLAGS.AC, ring 3
        movl %cr0, %eax
        orl $0x40000, %eax
        movl %eax, %cr0
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(2f - 9b + 0x8000), 0x6004
        movl %esp, 0x6008
        pushl $0x2b
        pushl $0x10800
        pushl $0x40002
        pushl $0x23
        pushl $(3f - 9b + 0x8000)
        iretl
    3:  movl $0x2b, %eax
        movw %ax, %ds
        movl 0x10000, %eax
    1:  movl 0x10001, %eax
    2:  PASS
    "#
);

// A call gate to ring 0 with two parameters, and RETF n back.
guest!(
    call_gate,
    r#"
    .code32
        # 58: 32-bit call gate, DPL 3, 2 parameters, to 18:(5f)
        movl $(0x180000 + 5f - 9b + 0x8000), 0x1058
        movl $0x0000ec02, 0x105c
        pushl $0x2b
        pushl $0x10800
        pushl $0x3002
        pushl $0x23
        pushl $(1f - 9b + 0x8000)
        iretl
    1:  movl $0x2b, %eax
        movw %ax, %ds
        pushl $0x1111
        pushl $0x2222
        lcall $0x58, $0
        movl %cs, %eax
        TRACE_EAX
        movl %esp, %eax
        TRACE_EAX
        # RETF to ring 3 makes data segments null that ring 3 may not have
        movl %es, %eax
        TRACE_EAX
        # ring 0 code without a gate
        movl $(2f - 9b + 0x8000), 0x6000
        movl $(3f - 9b + 0x8000), 0x6004
        movl $0x7f00, 0x6008
    2:  ljmpl $0x18, $0x8000
    3:  PASS
    5:  # ring 0: CS, the parameters, the old stack
        movl %cs, %eax
        TRACE_EAX
        movl %ss, %eax
        TRACE_EAX
        movl 8(%esp), %eax
        TRACE_EAX
        movl 12(%esp), %eax
        TRACE_EAX
        movl 16(%esp), %eax
        TRACE_EAX
        movl %esp, %eax
        TRACE_EAX
        movl $0x10, %eax
        movw %ax, %es
        lretl $8
    "#
);

// Hardware task switches between two 32-bit TSSs: JMP, CALL and IRET, a task gate.
guest!(
    task_switch,
    r#"
    .code32
        # 60: task gate for TSS B
        movl $0x00580000, 0x1060
        movl $0x00008500, 0x1064
        movl $(5f - 9b + 0x8000), 0x11020
        movl $0x2, 0x11024
        movl $0xaaaa, 0x11028
        movl $0x10e00, 0x11038
        movl $0x10, 0x11048
        movl $0x18, 0x1104c
        movl $0x10, 0x11050
        movl $0x10, 0x11054
        movl $0, 0x11060
        movl $0x680000, 0x11064
        # 58: TSS B at 11000H
        movl $0x10000067, 0x1058
        movl $0x00008901, 0x105c
        # CALL: the new task is nested
        movl $0x5555, %ecx
        lcall $0x58, $0
        # back by IRET; all registers as before
        movl %ecx, %eax
        TRACE_EAX
        # TS is set by a task switch
        movl %cr0, %eax
        andl $8, %eax
        TRACE_EAX
        # busy bits: ours yes, B's no
        movl 0x104c, %eax
        andl $0x200, %eax
        TRACE_EAX
        movl 0x105c, %eax
        andl $0x200, %eax
        TRACE_EAX
        # a jump to a busy TSS
        FAULT ljmpl $0x48, $0
        # a task gate in the IDT: INT 22H goes to B where it left off
        movl $0x00580000, 0x3000 + 8 * 0x22
        movl $0x00008500, 0x3000 + 8 * 0x22 + 4
        int $0x22
        # JMP: B is not nested, we are no longer busy; it jumps back
        ljmpl $0x60, $0
        movl 0x105c, %eax
        andl $0x200, %eax
        TRACE_EAX
        movl 0x104c, %eax
        andl $0x200, %eax
        TRACE_EAX
        pushfl
        popl %eax
        andl $0x4000, %eax
        TRACE_EAX
        PASS
    5:  # task B
        TRACE 0xb1
        str %ax
        movzwl %ax, %eax
        TRACE_EAX
        pushfl
        popl %eax
        andl $0x4000, %eax
        TRACE_EAX
        movzwl 0x11000, %eax
        TRACE_EAX
        movl $0x7777, %ecx
        iretl
        TRACE 0xb2
        iretl
        TRACE 0xb3
        ljmpl $0x48, $0
    "#
);

// A 16-bit TSS: CALL from the 32-bit task, IRET back, INT through a task gate.
guest!(
    task_switch_16,
    r#"
    .code32
        movl $0x1000002b, 0x1058
        movl $0x00008101, 0x105c
        movw $(5f - 9b + 0x8000), 0x1100e
        movw $0x2, 0x11010
        movw $0xaaaa, 0x11012
        movw $0xbbbb, 0x11014
        movw $0xe000, 0x1101a
        movw $0x40, 0x11022
        movw $0x38, 0x11024
        movw $0x40, 0x11026
        movw $0x40, 0x11028
        movl $0x12345678, %ecx
        lcall $0x58, $0
        movl %ecx, %eax
        TRACE_EAX
        movl 0x105c, %eax
        andl $0x200, %eax
        TRACE_EAX
        # what the task left in its TSS: CX, and IP after the IRET
        movzwl 0x11014, %eax
        TRACE_EAX
        movzwl 0x1100e, %eax
        subl $(6f - 9b + 0x8000), %eax
        TRACE_EAX
        lcall $0x58, $0
        PASS
    .code16
    5:  movzwl %cx, %eax
        TRACE_EAX
        movzwl %sp, %eax
        TRACE_EAX
        movl %cs, %eax
        TRACE_EAX
        movw $0xcccc, %cx
        iretw
    6:  movzwl %cx, %eax
        TRACE_EAX
        iretw
    "#
);

// IOPL and the I/O permission bitmap. Intel SDM Vol. 1 §19.5.
guest!(
    io_permission,
    r#"
    .code32
        # port 84H is denied; 0-FFH else are allowed, 100H-107H are denied
        movb $0x10, 0x5600 + 0x68 + 0x10
        movl $(1f - 9b + 0x8000), %ecx
        movl $(2f - 9b + 0x8000), 0x6000
        call 8f
        movl $(3f - 9b + 0x8000), %ecx
        movl %ecx, 0x6000
        call 8f
        # a word of which the second byte is denied
        movl $(4f - 9b + 0x8000), %ecx
        movl %ecx, 0x6000
        call 8f
        # beyond the limit of the TSS
        movl $(5f - 9b + 0x8000), %ecx
        movl $(6f - 9b + 0x8000), 0x6000
        call 8f
        # CLI needs IOPL, POPF leaves IF and IOPL alone without saying so
        movl $(7f - 9b + 0x8000), %ecx
        movl %ecx, 0x6000
        call 8f
        movl $(10f - 9b + 0x8000), %ecx
        movl $(12f - 9b + 0x8000), 0x6000
        call 8f
        PASS
    1:  TRACE 0x31
        outb %al, $0x83
        movw $0x100, %dx
    2:  outb %al, %dx
    3:  inb $0x84, %al
    4:  outw %ax, $0x83
    5:  movw $0x110, %dx
    6:  outb %al, %dx
    7:  cli
    10: pushl $0x3202
        popfl
        pushfl
        popl %eax
        andl $0x3200, %eax
        TRACE_EAX
    12: ud2
        # to ring 3 at ECX; the exception goes on after the call
    8:  popl %ebx
        movl %ebx, 0x6004
        movl %esp, 0x6008
        pushl $0x2b
        pushl $0x10800
        pushl $0x2
        pushl $0x23
        pushl %ecx
        iretl
    "#
);

// SYSENTER and SYSEXIT. Intel SDM Vol. 2B.
guest!(
    sysenter,
    r#"
    .code32
        movl $0x174, %ecx
        xorl %eax, %eax
        xorl %edx, %edx
        wrmsr
        # a null selector in SYSENTER_CS
        FAULT sysenter
        movl $0x174, %ecx
        movl $0x18, %eax
        xorl %edx, %edx
        wrmsr
        incl %ecx
        movl $0x10f00, %eax
        wrmsr
        incl %ecx
        movl $(5f - 9b + 0x8000), %eax
        wrmsr
        pushl $0x2b
        pushl $0x10800
        pushl $0x3202
        pushl $0x23
        pushl $(1f - 9b + 0x8000)
        iretl
    1:  movl %esp, %ecx
        movl $(2f - 9b + 0x8000), %edx
        sysenter
    2:  movl %cs, %eax
        TRACE_EAX
        movl %ss, %eax
        TRACE_EAX
        movl %esp, %eax
        TRACE_EAX
        movl $(3f - 9b + 0x8000), %ss:0x6000
        movl $(4f - 9b + 0x8000), %ss:0x6004
        movl $0x7f00, %ss:0x6008
        # SYSEXIT is for ring 0
    3:  sysexit
    4:  PASS
    5:  movl %cs, %eax
        TRACE_EAX
        movl %ss, %eax
        TRACE_EAX
        movl %esp, %eax
        TRACE_EAX
        pushfl
        popl %eax
        andl $0x200, %eax
        TRACE_EAX
        sysexit
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
        entry: Entry::Protected,
        vcpus: 1,
        end: End::Pass,
        trace,
    }
}

pub(super) const GUESTS: &[Guest] = &[
    guest(
        "segments/loads",
        segment_loads,
        &[
            13, 0, 13, 0, 13, 0x200, 13, 0x5c, 11, 0x60, 12, 0x60, 13, 0x68, 13, 0x70, 13, 0x28, 6,
            0, 13, 0x48, 13, 0x10, 13, 0x10, 13, 0x10, 13, 0, 13, 0x20,
        ],
    ),
    guest(
        "segments/limits",
        segment_limits,
        &[
            0x6867_6665,
            13,
            0,
            13,
            0,
            13,
            0,
            13,
            0,
            13,
            0,
            0x9988,
            13,
            0,
            12,
            0,
            0xffff_ffff,
            0x00c0_9100,
            0x0100,
        ],
    ),
    guest(
        "segments/bound-into-align",
        bound_into_align,
        &[5, 0, 4, 0, 17, 0],
    ),
    guest(
        "segments/call-gate",
        call_gate,
        &[
            0x18, 0x10, 0x2222, 0x1111, 0x107f8, 0x1_efe8, 0x23, 0x10800, 0, 13, 0x18,
        ],
    ),
    guest(
        "segments/task-switch",
        task_switch,
        &[
            0xb1, 0x58, 0x4000, 0x48, 0x5555, 8, 0x200, 0, 13, 0x48, 0xb2, 0xb3, 0, 0x200, 0,
        ],
    ),
    guest(
        "segments/task-switch-16",
        task_switch_16,
        &[0xbbbb, 0xe000, 0x38, 0x1234_5678, 0, 0xcccc, 0, 0xcccc],
    ),
    guest(
        "segments/io-permission",
        io_permission,
        &[0x31, 13, 0, 13, 0, 13, 0, 13, 0, 13, 0, 0, 6, 0],
    ),
    guest(
        "segments/sysenter",
        sysenter,
        &[13, 0, 0x18, 0x20, 0x10f00, 0, 0x2b, 0x33, 0x10800, 13, 0],
    ),
];
