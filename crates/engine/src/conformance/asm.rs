//! The assembly language of the micro-guests: one macro that puts a guest into the binary, and
//! the instructions that all guests share.
//!
//! A guest is assembled by the Rust compiler into a page of read-only data and copied to
//! [`LOAD`](super::layout::LOAD). Label `9` is its first byte, so `$(1f - 9b + 0x8000)` is the
//! address of the next label `1` at run time.

/// Assembles a micro-guest named `$name`: AT&T syntax, at most 4096 bytes.
///
/// Macros inside: `TRACE v` reports a constant, `TRACE_EAX` EAX; `PASS` ends; `FAULT insn` runs an
/// instruction that must fault (the handler reports vector, error code and, for #PF, CR2);
/// `WINDOW` lets pending interrupts in; `TRAP insn` is the same for an instruction whose exception is reported after it.
macro_rules! guest {
    ($name:ident, $($text:expr),* $(,)?) => {
        std::arch::global_asm!(
            concat!(
                ".pushsection .rodata.conformance,\"a\",@progbits\n",
                ".balign 4096\n",
                ".globl pyrite_conformance_", stringify!($name), "\n",
                ".hidden pyrite_conformance_", stringify!($name), "\n",
                "pyrite_conformance_", stringify!($name), ":\n",
                "9:\n",
                ".macro TRACE v\n movl $\\v, %eax\n outl %eax, $0xf0\n .endm\n",
                ".macro TRACE_EAX\n outl %eax, $0xf0\n .endm\n",
                ".macro HOST v\n movb $\\v, %al\n outb %al, $0xe1\n .endm\n",
                ".macro WINDOW\n sti\n nop\n outb %al, $0x80\n nop\n outb %al, $0x80\n cli\n .endm\n",
                ".macro PASS\n movb $1, %al\n outb %al, $0xf4\n 880: jmp 880b\n .endm\n",
                ".macro FAULT insn:vararg\n",
                " movl $(881f - 9b + 0x8000), 0x6000\n movl $(882f - 9b + 0x8000), 0x6004\n",
                " movl %esp, 0x6008\n 881: \\insn\n 882:\n .endm\n",
                ".macro TRAP insn:vararg\n",
                " movl $(882f - 9b + 0x8000), 0x6000\n movl $(882f - 9b + 0x8000), 0x6004\n",
                " movl %esp, 0x6008\n \\insn\n 882:\n .endm\n",
            ),
            $($text,)*
            concat!(
                "\n.org 9b + 4096, 0xcc\n",
                ".purgem TRACE\n.purgem TRACE_EAX\n.purgem HOST\n.purgem PASS\n.purgem FAULT\n",
                ".purgem TRAP\n.purgem WINDOW\n",
                ".code64\n",
                ".popsection\n",
            ),
            options(att_syntax, raw)
        );
        pub(super) fn $name() -> &'static [u8; 4096] {
            unsafe extern "C" {
                #[link_name = concat!("pyrite_conformance_", stringify!($name))]
                safe static IMAGE: [u8; 4096];
            }
            &IMAGE
        }
    };
}
pub(super) use guest;

// Exception and interrupt handlers. The host puts a 16-byte stub per vector in front of them that
// pushes a zero where the processor pushes no error code, then the vector, and jumps here.
//
// 6000H: expected RIP. 6004H: where to go on. 6008H: ESP there. 6010H: how to end an interrupt
// (0 not at all, 1 APIC page, 2 MSR). 6100H + 4n: number of interrupts with vector n.
// Vectors from 20H and NMI (2) count, report 100H + n and return; others report vector, error
// code (CR2 for #PF, DR6 for #DB), the word BADH if RIP is not the expected one, and do not return.
guest!(
    handlers64,
    r#"
    .code64
        pushq %rax
        pushq %rcx
        pushq %rdx
        movl 24(%rsp), %ecx
        cmpl $2, %ecx
        je 2f
        cmpl $0x20, %ecx
        jae 2f
        movl %ecx, %eax
        outl %eax, $0xf0
        movl 32(%rsp), %eax
        outl %eax, $0xf0
        cmpl $14, %ecx
        jne 1f
        movq %cr2, %rax
        outl %eax, $0xf0
    1:  cmpl $1, %ecx
        jne 1f
        movq %dr6, %rax
        outl %eax, $0xf0
    1:  movl 0x6000, %eax
        cmpq %rax, 40(%rsp)
        je 1f
        movl $0xbad, %eax
        outl %eax, $0xf0
        movl 40(%rsp), %eax
        outl %eax, $0xf0
    1:  movl $0x10, %eax
        movl %eax, %ss
        movl %eax, %ds
        movl %eax, %es
        movl 0x6008, %esp
        movl 0x6004, %eax
        movl $0x4700, 0x6004
        jmp *%rax
    2:  incl 0x6100(,%rcx,4)
        movl %ecx, %eax
        orl $0x100, %eax
        outl %eax, $0xf0
        cmpl $2, %ecx
        je 4f
        cmpl $1, 0x6010
        jne 3f
        movl $0xfee000b0, %eax
        movl $0, (%rax)
    3:  cmpl $2, 0x6010
        jne 4f
        movl $0x80b, %ecx
        xorl %eax, %eax
        xorl %edx, %edx
        wrmsr
    4:  popq %rdx
        popq %rcx
        popq %rax
        addq $16, %rsp
        iretq
    "#
);

guest!(
    handlers32,
    r#"
    .code32
        pushl %eax
        pushl %ecx
        pushl %ds
        movl $0x10, %eax
        movl %eax, %ds
        movl 12(%esp), %ecx
        cmpl $2, %ecx
        je 2f
        cmpl $0x20, %ecx
        jae 2f
        movl %eax, %es
        movl %ecx, %eax
        outl %eax, $0xf0
        movl 16(%esp), %eax
        outl %eax, $0xf0
        cmpl $14, %ecx
        jne 1f
        movl %cr2, %eax
        outl %eax, $0xf0
    1:  cmpl $1, %ecx
        jne 1f
        movl %dr6, %eax
        outl %eax, $0xf0
    1:  movl 0x6000, %eax
        cmpl %eax, 20(%esp)
        je 1f
        movl $0xbad, %eax
        outl %eax, $0xf0
        movl 20(%esp), %eax
        outl %eax, $0xf0
    1:  movl $0x10, %eax
        movl %eax, %ss
        movl 0x6008, %esp
        movl 0x6004, %eax
        movl $0x4700, 0x6004
        jmp *%eax
    2:  incl 0x6100(,%ecx,4)
        movl %ecx, %eax
        orl $0x100, %eax
        outl %eax, $0xf0
        cmpl $2, %ecx
        je 4f
        cmpl $1, 0x6010
        jne 4f
        movl $0, 0xfee000b0
    4:  popl %ds
        popl %ecx
        popl %eax
        addl $8, %esp
        iretl
    "#
);
