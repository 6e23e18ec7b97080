//! Paging. Intel SDM Vol. 3A chapter 4.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

// 32-bit paging: 4 KiB and 4 MiB pages, not-present, read-only with and without WP, A and D.
guest!(
    paging_32,
    r#"
    .code32
        # 200000H -> 10000H read-only, 201000H not present
        movl $0x10005, 0x27000 + 4 * 0x200
        movl $0, 0x27000 + 4 * 0x201
        movl %cr3, %eax
        movl %eax, %cr3
        movl $0x12345678, 0x10000
        movl 0x200000, %eax
        TRACE_EAX
        movl 0x27000 + 4 * 0x200, %eax
        TRACE_EAX
        FAULT movl %eax, 0x200000
        FAULT movl 0x201004, %eax
        FAULT movl %eax, 0x201008
        # WP = 0: the supervisor writes anyway, and D appears
        movl %cr0, %eax
        andl $0xfffeffff, %eax
        movl %eax, %cr0
        movl $0x9abcdef0, 0x200000
        movl 0x10000, %eax
        TRACE_EAX
        movl 0x27000 + 4 * 0x200, %eax
        TRACE_EAX
        # a 4 MiB page: 400000H -> 0
        movl $0x83, 0x26000 + 4
        movl %cr3, %eax
        movl %eax, %cr3
        movl 0x410000, %eax
        TRACE_EAX
        movl 0x26000 + 4, %eax
        TRACE_EAX
        # reserved bit 21 of a 4 MiB page
        movl $0x200083, 0x26000 + 8
        movl %cr3, %eax
        movl %eax, %cr3
        FAULT movl 0x800000, %eax
        PASS
    "#
);

// PAE paging: XD, reserved bits.
// The PDPTE registers (next guest) are loaded with CR3 and not before, SDM Vol. 3A §4.4.1.
guest!(
    paging_pae,
    r#"
    .code32
        movl $0x10003, 0x2a000 + 8 * 0x100
        movl $0x80000000, 0x2a000 + 8 * 0x100 + 4
        movl %cr3, %eax
        movl %eax, %cr3
        movb $0xc3, 0x10000
        movzbl 0x100000, %eax
        TRACE_EAX
        # a fetch from a no-execute page
        movl %esp, 0x6008
        movl $0x100000, 0x6000
        movl $(1f - 9b + 0x8000), 0x6004
        movl $0x100000, %eax
        jmp *%eax
    1:  # an address bit above MAXPHYADDR
        movl $0x7fff0000, 0x2a000 + 8 * 0x101 + 4
        movl $0x10003, 0x2a000 + 8 * 0x101
        FAULT movl 0x101000, %eax
        PASS
    "#
);

guest!(
    paging_pdpte,
    r#"
    .code32
        movb $0xc3, 0x10000
        # the PDPTE registers change with CR3 only
        movl $0x29001, 0x28000 + 8
        FAULT movl 0x40010000, %eax
        movl %cr3, %eax
        movl %eax, %cr3
        movzbl 0x40010000, %eax
        TRACE_EAX
        # a reserved bit in a PDPTE: MOV to CR3 faults
        movl $0x29007, 0x28000 + 16
        movl %cr3, %ebx
        FAULT movl %ebx, %cr3
        PASS
    "#
);

// 4 levels: large pages, A and D at each level, not-present at each level, canonical addresses.
guest!(
    paging_long,
    r#"
    .code64
        movl 0x200000, %eax
        movl 0x22000 + 8, %eax
        andl $0x60, %eax
        TRACE_EAX
        movl %eax, 0x200000
        movl 0x22000 + 8, %eax
        andl $0x60, %eax
        TRACE_EAX
        # A at the upper levels
        movl 0x20000, %eax
        andl $0x60, %eax
        TRACE_EAX
        # not present: PDPT (2 GiB), PML4
        movl $0x80000000, %ebx
        FAULT movl (%rbx), %eax
        movq $0xffff800000000010, %rbx
        FAULT movl %eax, (%rbx)
        # not canonical: #GP(0), through RBP #SS(0), and no stack for it: #DF
        movq $0x0000800000000000, %rbx
        FAULT movl (%rbx), %eax
        movq %rbx, %rbp
        FAULT movl (%rbp), %eax
        movq %rsp, %rbp
        movq %rbx, %rsp
        movl $(1f - 9b + 0x8000), 0x6000
        movl $(2f - 9b + 0x8000), 0x6004
    1:  popq %rax
    2:  movq %rbp, %rsp
        # reserved bits: PS in the PML4
        movl $0x210a7, 0x20000 + 8
        movq %cr3, %rax
        movq %rax, %cr3
        movq $0x8000000000, %rbx
        FAULT movl (%rbx), %eax
        # read-only at an upper level only
        movl $0x22005, 0x21000 + 16
        movq %cr3, %rax
        movq %rax, %cr3
        movl $0xd1, 0x10000
        movl $0x80010000, %ebx
        movl (%rbx), %eax
        TRACE_EAX
        FAULT movl %eax, (%rbx)
        PASS
    "#
);

// A 1 GiB page: contents, A and D.
guest!(
    paging_1g,
    r#"
    .code64
        movl $0x600d, 0x10000
        movl $0x40010000, %ebx
        movl (%rbx), %eax
        TRACE_EAX
        movl 0x21000 + 8, %eax
        andl $0x60, %eax
        TRACE_EAX
        movl $0xd1, (%rbx)
        movl 0x21000 + 8, %eax
        andl $0x60, %eax
        TRACE_EAX
        PASS
    "#
);

// XD, and that NXE off makes the bit reserved.
guest!(
    paging_nx,
    r#"
    .code64
        movb $0xc3, 0x10000
        movl $0x10000, %eax
        call *%rax
        movl $0x80000000, 0x23000 + 8 * 0x10 + 4
        invlpg 0x10000
        movzbl 0x10000, %eax
        TRACE_EAX
        movl %esp, 0x6008
        movl $0x10000, 0x6000
        movl $(1f - 9b + 0x8000), 0x6004
        movl $0x10000, %eax
        jmp *%rax
    1:  movl $0xc0000080, %ecx
        rdmsr
        btrl $11, %eax
        wrmsr
        invlpg 0x10000
        FAULT movzbl 0x10000, %eax
        PASS
    "#
);

// SMEP and SMAP with EFLAGS.AC; ring 3 accesses to supervisor pages.
guest!(
    smep_smap,
    r#"
    .code64
        # the code, variables and stack become supervisor pages
        movl $0x8003, 0x23000 + 8 * 8
        movl $0x6003, 0x23000 + 8 * 6
        movl $0x7003, 0x23000 + 8 * 7
        movl $0x4003, 0x23000 + 8 * 4
        movl $0x1003, 0x23000 + 8 * 1
        movl $0x2003, 0x23000 + 8 * 2
        movl $0x5003, 0x23000 + 8 * 5
        movl $0x1f003, 0x23000 + 8 * 0x1f
        movl $0x1e003, 0x23000 + 8 * 0x1e
        movl $0x20003, 0x23000 + 8 * 0x20
        movl $0x23003, 0x23000 + 8 * 0x23
        movb $0xc3, 0x10000
        movq %cr3, %rax
        movq %rax, %cr3
        movq %cr4, %rax
        orl $0x300000, %eax
        movq %rax, %cr4
        FAULT movzbl 0x10000, %eax
        FAULT movb %al, 0x10000
        stac
        movzbl 0x10000, %eax
        TRACE_EAX
        clac
        movl $0x10000, 0x6000
        movl %esp, 0x6008
        movl $(1f - 9b + 0x8000), 0x6004
        movl $0x10000, %eax
        jmp *%rax
    1:  # ring 3: read of a supervisor page
        movl $0x10000, 0x6000
        movl $(2f - 9b + 0x8000), 0x6004
        stac
        movb $0x8a, 0x10000
        movb $0x04, 0x10001
        movb $0x25, 0x10002
        movl $0x6020, 0x10003
        clac
        pushq $0x2b
        pushq $0x11000
        pushq $0x3002
        pushq $0x33
        pushq $0x10000
        iretq
    2:  PASS
    "#
);

// A stale TLB entry need not be there, but after the right invalidation it must not be.
guest!(
    global_pages,
    r#"
    .code64
        movl $0x11111111, 0x10000
        movl $0x22222222, 0x11000
        # global page at 100000H -> 10000H
        movl $0x10103, 0x23000 + 8 * 0x100
        movq %cr4, %rax
        orl $0x80, %eax
        movq %rax, %cr4
        movl 0x100000, %eax
        TRACE_EAX
        # INVLPG drops global entries
        movl $0x11103, 0x23000 + 8 * 0x100
        invlpg 0x100000
        movl 0x100000, %eax
        TRACE_EAX
        # toggling PGE drops them all
        movl $0x10103, 0x23000 + 8 * 0x100
        movq %cr4, %rax
        xorl $0x80, %eax
        movq %rax, %cr4
        xorl $0x80, %eax
        movq %rax, %cr4
        movl 0x100000, %eax
        TRACE_EAX
        PASS
    "#
);

guest!(
    pcid,
    r#"
    .code64
        movl $0x11111111, 0x10000
        movl $0x22222222, 0x11000
        # PCID: CR4.PCIDE with CR3[11:0] = 0, then PCID 5 with a copy of the PML4
        movq %cr4, %rax
        btsl $17, %eax
        movq %rax, %cr4
        movl $0x3, 0x23000 + 8 * 0x102
        movl $0x10003, 0x23000 + 8 * 0x102
        movl 0x102000, %eax
        TRACE_EAX
        movq $0x20005, %rax
        movq %rax, %cr3
        movq %cr3, %rax
        TRACE_EAX
        movl $0x11003, 0x23000 + 8 * 0x102
        # INVPCID type 0: one address of PCID 5
        movq $5, 0x10800
        movq $0x102000, 0x10808
        xorl %eax, %eax
        invpcid 0x10800, %rax
        movl 0x102000, %eax
        TRACE_EAX
        # bit 63 keeps the entries of the new PCID; it is not stored
        movabsq $0x8000000000020000, %rax
        movq %rax, %cr3
        movq %cr3, %rax
        shrq $32, %rax
        TRACE_EAX
        # INVPCID type 2: everything, also global entries
        movl $2, %eax
        invpcid 0x10800, %rax
        movl 0x102000, %eax
        TRACE_EAX
        # type 4 does not exist: #GP
        movl $4, %eax
        FAULT invpcid 0x10800, %rax
        PASS
    "#
);

const fn guest(
    name: &'static str,
    image: fn() -> &'static [u8; 4096],
    entry: Entry,
    trace: &'static [u32],
) -> Guest {
    Guest {
        name,
        image,
        entry,
        vcpus: 1,
        end: End::Pass,
        trace,
    }
}

pub(super) const GUESTS: &[Guest] = &[
    guest(
        "paging/32-bit",
        paging_32,
        Entry::Paging32,
        &[
            0x1234_5678,
            0x10025,
            14,
            3,
            0x20_0000,
            14,
            0,
            0x20_1004,
            14,
            2,
            0x20_1008,
            0x9abc_def0,
            0x10065,
            0x9abc_def0,
            0xa3,
            14,
            9,
            0x80_0000,
        ],
    ),
    guest(
        "paging/pae",
        paging_pae,
        Entry::Pae,
        &[0xc3, 14, 0x11, 0x10_0000, 14, 9, 0x10_1000],
    ),
    guest(
        "paging/pae-pdpte",
        paging_pdpte,
        Entry::Pae,
        &[14, 0, 0x4001_0000, 0xc3, 13, 0],
    ),
    guest(
        "paging/long",
        paging_long,
        Entry::Long,
        &[
            0x20,
            0x60,
            0x20,
            14,
            0,
            0x8000_0000,
            14,
            2,
            0x10,
            13,
            0,
            12,
            0,
            8,
            0,
            14,
            9,
            0,
            0xd1,
            14,
            3,
            0x8001_0000,
        ],
    ),
    guest(
        "paging/1-gib-page",
        paging_1g,
        Entry::Long,
        &[0x600d, 0x20, 0x60],
    ),
    guest(
        "paging/no-execute",
        paging_nx,
        Entry::Long,
        &[0xc3, 14, 0x11, 0x1_0000, 14, 9, 0x1_0000],
    ),
    guest(
        "paging/smep-smap",
        smep_smap,
        Entry::Long,
        &[
            14, 1, 0x1_0000, 14, 3, 0x1_0000, 0xc3, 14, 0x11, 0x1_0000, 14, 5, 0x6020,
        ],
    ),
    guest(
        "paging/global-pages",
        global_pages,
        Entry::Long,
        &[0x1111_1111, 0x2222_2222, 0x1111_1111],
    ),
    guest(
        "paging/pcid",
        pcid,
        Entry::Long,
        &[0x1111_1111, 0x20005, 0x2222_2222, 0, 0x2222_2222, 13, 0],
    ),
];
