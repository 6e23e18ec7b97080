//! ROM, and RAM in its place: what a chipset's shadow registers do.

use crate::conformance::asm::guest;
use crate::conformance::layout::Entry;
use crate::conformance::{End, Guest};

// The ROM's functions (see `layout::ROM_CODE`) are copied to the RAM behind them and changed there;
// then loads, stores and code follow each change of the route.
guest!(
    shadow,
    r#"
    .macro ROUTE v
        movb $\v, %al
        outb %al, $0xe4
    .endm
    .code16
        cld
        movw $0xf000, %ax
        movw %ax, %ds
        movw %ax, %es
        # Loads from ROM, stores to RAM.
        ROUTE 2
        xorw %si, %si
        xorw %di, %di
        movw $0x20, %cx
        rep movsb
        movb $2, 2
        movb $2, 0x14
        movl 0, %eax
        TRACE_EAX
        lcall $0xf000, $0
        TRACE_EAX
        # RAM.
        ROUTE 3
        lcall $0xf000, $0
        TRACE_EAX
        movl 0, %eax
        TRACE_EAX
        # RAM that cannot be stored to: stores go to the bus.
        ROUTE 1
        movl $0x12345678, 4
        movl 4, %eax
        TRACE_EAX
        # The same call, over and over, to ROM and RAM by turns.
        movw $6, %bp
    1:  movw %bp, %ax
        negw %ax
        andw $1, %ax
        negw %ax
        andb $3, %al
        outb %al, $0xe4
        lcall $0xf000, $0
        TRACE_EAX
        decw %bp
        jnz 1b
        # Code that takes itself away: the instruction after OUT is another one.
        ROUTE 0
        movb $3, %al
        lcall $0xf000, $0x10
        TRACE_EAX
        movb $0, %al
        lcall $0xf000, $0x10
        TRACE_EAX
        # Permission to store is not remembered.
        ROUTE 3
        movl $0xaaaa5555, 0x100
        ROUTE 1
        movl $1, 0x100
        ROUTE 0
        movl $2, 0x100
        ROUTE 3
        movl 0x100, %eax
        TRACE_EAX
        lock incl 0x100
        ROUTE 1
        lock incl 0x100
        movl 0x100, %eax
        TRACE_EAX
        PASS
    .purgem ROUTE
    "#
);

pub(super) const GUESTS: &[Guest] = &[Guest {
    name: "rom/shadow",
    image: shadow,
    entry: Entry::Real,
    vcpus: 1,
    end: End::Pass,
    trace: &[
        0x0001_b866,
        1,
        2,
        0x0002_b866,
        0x000f_0404,
        0x1234_5678,
        0x00cb_0000,
        1,
        2,
        1,
        2,
        1,
        2,
        2,
        1,
        0x000f_0400,
        1,
        0x000f_0400,
        2,
        0xaaaa_5555,
        0x000f_0400,
        0xaaaa_5557,
        0xaaaa_5556,
    ],
}];
