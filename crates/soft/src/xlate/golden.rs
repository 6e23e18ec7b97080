//! Golden files of emitted code: a change of what a typical guest sequence costs shows up in a diff.
//!
//! Each file has the guest's instructions, the host's up to the way out that is taken when every
//! check hits, and their number. `PYRITE_ACCEPT_GOLDEN=1` rewrites
//! the files.

use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::Path;

use iced_x86::{Decoder, FlowControl, Formatter, Instruction, IntelFormatter, OpKind, Register};

use super::cache::BlockKey;
use super::code_tlb::PageCheck;
use super::front::{Front, HostFeatures, Place, Tools};
use super::{layout, mode};
use crate::frame::{Frame, View};
use crate::vm::SoftOptions;

const RIP: u64 = 0x5555_5555_4456;
const BASE: u64 = 0x7f00_0000_0000;

/// Guest sequences, each with the bytes of one block.
const SEQUENCES: &[(&str, &[u8])] = &[
    // mov rax, [rdi + 8]; xor ecx, ecx; ret
    ("load", &[0x48, 0x8b, 0x47, 8, 0x31, 0xc9, 0xc3]),
    // mov [rdi + 8], rax; xor ecx, ecx; ret
    ("store", &[0x48, 0x89, 0x47, 8, 0x31, 0xc9, 0xc3]),
    // cmp eax, 5; mov rdx, [rdi]; je +16
    (
        "load-with-live-flags",
        &[0x83, 0xf8, 5, 0x48, 0x8b, 0x17, 0x74, 16],
    ),
    // two loads and a store through one base register: mov eax, [rbx]; mov edx, [rbx + 4];
    // mov [rbx + 8], eax; xor ecx, ecx; jmp -16
    (
        "fields-of-an-object",
        &[
            0x8b, 0x03, 0x8b, 0x53, 4, 0x89, 0x43, 8, 0x31, 0xc9, 0xeb, 0xf0,
        ],
    ),
    // a block that goes on behind a branch: test rdi, rdi; je +16; mov eax, [rdi + 8];
    // add eax, [rdi + 16]; mov [rdi + 24], eax; ret
    (
        "guarded-fields",
        &[
            0x48, 0x85, 0xff, 0x74, 16, 0x8b, 0x47, 8, 0x03, 0x47, 16, 0x89, 0x47, 24, 0xc3,
        ],
    ),
    // push rbp; push rbx; sub rsp, 24; mov [rsp + 8], rdi; call +100
    (
        "function-entry",
        &[
            0x55, 0x53, 0x48, 0x83, 0xec, 24, 0x48, 0x89, 0x7c, 0x24, 8, 0xe8, 100, 0, 0, 0,
        ],
    ),
    // add rsp, 24; pop rbx; pop rbp; ret
    ("function-exit", &[0x48, 0x83, 0xc4, 24, 0x5b, 0x5d, 0xc3]),
    // cmp rax, rbx; jb -16
    ("compare-and-branch", &[0x48, 0x39, 0xd8, 0x72, 0xf0]),
    // call [rax + 24]
    ("indirect-call", &[0xff, 0x50, 24]),
    // rep movsb; ret
    ("string-copy", &[0xf3, 0xa4, 0xc3]),
    // movups xmm0, [rsi]; mulps xmm0, [rsi + 16]; addps xmm1, xmm0; add rsi, 32; dec rcx; jnz -16
    (
        "sse-loop",
        &[
            0x0f, 0x10, 0x06, 0x0f, 0x59, 0x46, 16, 0x0f, 0x58, 0xc8, 0x48, 0x83, 0xc6, 32, 0x48,
            0xff, 0xc9, 0x75, 0xf0,
        ],
    ),
    // mov r10, [r11 + 8]; add r15, r10; ret
    (
        "registers-in-the-frame",
        &[0x4d, 0x8b, 0x53, 8, 0x4d, 0x01, 0xd7, 0xc3],
    ),
    // syscall
    ("system-call", &[0x0f, 0x05]),
    // inc byte [r11]; rcl al, 18; setg ch; jmp -16
    (
        "read-modify-write",
        &[
            0x3e, 0x41, 0xfe, 0x03, 0xc0, 0xd0, 0x52, 0x0f, 0x9f, 0xed, 0x67, 0x48, 0x09, 0xfd,
            0xeb, 0xf0,
        ],
    ),
];

/// Names of places in the frame.
fn frame_names() -> Vec<(usize, &'static str)> {
    let mut names = vec![
        (layout::gpr(0), "rax"),
        (layout::gpr(10), "r10"),
        (layout::gpr(11), "r11"),
        (layout::gpr(15), "r15"),
        (layout::RIP, "rip"),
        (layout::RFLAGS, "rflags"),
        (layout::EXIT_REQUEST, "exit_request"),
        (layout::FLAGS, "flags"),
        (layout::TARGET, "target"),
        (layout::VALUE, "value"),
        (layout::SAVE_RCX, "save_rcx"),
        (layout::REASON, "reason"),
        (layout::BRANCH, "branch"),
        (layout::FPU_LIVE, "fpu_live"),
        (layout::TLB_MASK, "tlb_mask"),
        (layout::JC_MASK_AT, "jc_mask"),
        (layout::run_delta(0), "run_delta[0]"),
        (layout::run_delta(1), "run_delta[1]"),
        (layout::run_delta(2), "run_delta[2]"),
        (layout::CANONICAL_MASK, "canonical_mask"),
        (layout::STUB_EXIT, "stub_exit"),
        (layout::stub_miss(2), "stub_miss"),
        (layout::STUB_SLOW, "stub_slow"),
        (layout::STUB_FPU, "stub_fpu"),
        (layout::STUB_STEP, "stub_step"),
        (layout::STUB_STEP_JUMP, "stub_step_jump"),
        (layout::STUB_RUN, "stub_run"),
        (layout::STUB_LINK, "stub_link"),
        (layout::STUB_POLL, "stub_poll"),
        (layout::STUB_MOVED, "stub_moved"),
        (layout::SAVE_RAX, "save_rax"),
        (layout::jump_cache(2), "jump_cache"),
        (layout::tlb_read(2), "tlb.read"),
        (layout::tlb_write(2), "tlb.write"),
        (layout::tlb_host(2), "tlb.host"),
        (layout::tlb_delta(2), "tlb.delta"),
        (layout::code_tlb(5), "code_tlb[5]"),
        (offset_of!(Frame, cpu), "cpu"),
    ];
    names.sort_unstable();
    names
}

fn operands(i: &Instruction, names: &[(usize, &str)]) -> String {
    let mut text = String::new();
    let mut f = IntelFormatter::new();
    f.options_mut().set_space_after_operand_separator(true);
    f.options_mut().set_rip_relative_addresses(false);
    f.format(i, &mut text);
    if i.memory_base() == Register::RSP && (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
    {
        let disp = i.memory_displacement64() as usize;
        if let Ok(n) = names.binary_search_by_key(&disp, |n| n.0) {
            let shown = text;
            let hex = format!("{disp:X}h");
            return match disp {
                0 => shown.replace("[rsp]", &format!("[rsp+{}]", names[n].1)),
                1..=9 => shown.replace(&format!("+{disp}]"), &format!("+{}]", names[n].1)),
                _ => shown
                    .replace(&format!("0{hex}"), names[n].1)
                    .replace(&hex, names[n].1),
            };
        }
    }
    text
}

/// The golden text of one sequence, and the number of instructions on the way where checks hit.
fn golden(bytes: &[u8]) -> String {
    let options = SoftOptions::default();
    let host = HostFeatures {
        bmi2: true,
        decoder: 0,
    };
    let units = mode::CODE64 | mode::X87 | mode::SSE | mode::AVX;
    let place = Place {
        key: BlockKey {
            gpa: 0x12_3456,
            rip: RIP,
            mode: View::User as u32 | units,
        },
        base: BASE,
        first_exit: 7,
        id: 3,
        force_poll: false,
        page: PageCheck { slot: 5, value: 77 },
        second: None,
        entries: true,
    };
    // What follows and what is jumped back to kills the flags: xor ecx, ecx.
    let at = (RIP & 0xfff) as usize;
    let mut page = [0x31, 0xc9].repeat(2048);
    page[at..at + bytes.len()].copy_from_slice(bytes);
    let mut tools = Tools::new();
    let t = Front::translate(&mut tools, bytes, &page, place, &|_| true, &options, host);
    let names = frame_names();
    let mut out = String::new();
    let mut guest = Decoder::with_ip(64, bytes, RIP, 0);
    let (mut insns, mut text) = (0, String::new());
    while guest.can_decode() {
        let i = guest.decode();
        let mut line = String::new();
        IntelFormatter::new().format(&i, &mut line);
        let _ = writeln!(text, "    {line}");
        insns += 1;
    }
    let _ = writeln!(
        out,
        "guest: {insns} instructions, {} bytes\n{text}",
        bytes.len()
    );
    let mut d = Decoder::with_ip(64, t.code, BASE, 0);
    let (mut body, mut hot, mut lines) = (0usize, true, String::new());
    let mut hot_bytes = 0;
    // What is out of the way is mixed with data.
    while d.can_decode() && hot {
        let i = d.decode();
        let at = i.ip() - BASE;
        let others = t.block.others.expect("asked for");
        if at == u64::from(others.checked) {
            let _ = writeln!(lines, "  checked entry:");
        }
        if at == u64::from(others.far) {
            let _ = writeln!(lines, "  entry from other pages:");
        }
        if at == u64::from(t.block.entry) {
            let _ = writeln!(lines, "  entry:");
        }
        if at >= u64::from(t.block.entry) {
            body += 1;
        }
        let _ = writeln!(lines, "    {}", operands(&i, &names));
        // The way out is the first jump that always leaves.
        let leaves = matches!(
            i.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch
        );
        // A jump over the next instructions stays.
        let near = i.is_jmp_short();
        if at >= u64::from(t.block.entry) && leaves && !near {
            hot = false;
            hot_bytes = i.next_ip() - BASE;
        }
    }
    let _ = writeln!(
        out,
        "host: {body} instructions from the entry to the way out; {hot_bytes} bytes with all \
         entries, {} bytes cold\n{lines}",
        t.code.len() as u64 - hot_bytes
    );
    out
}

#[test]
fn emitted_code_is_what_the_golden_files_show() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/xlate/golden");
    let mut changed = Vec::new();
    for (name, bytes) in SEQUENCES {
        let path = dir.join(format!("{name}.txt"));
        let text = golden(bytes);
        if std::env::var_os("PYRITE_ACCEPT_GOLDEN").is_some() {
            std::fs::write(&path, &text).expect("written");
        }
        let accepted = std::fs::read_to_string(&path).unwrap_or_default();
        if accepted != text {
            changed.push(format!("{}:\n{text}", path.display()));
        }
    }
    assert!(
        changed.is_empty(),
        "emitted code changed (PYRITE_ACCEPT_GOLDEN=1 accepts it):\n{}",
        changed.join("\n")
    );
}
