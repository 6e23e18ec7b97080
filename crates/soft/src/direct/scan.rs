//! Instructions that at CPL 3 tell of the host's processor and not of the guest's.
//!
//! Most of what the guest must not do by itself faults in its process. What does not (CPUID where
//! the host cannot make it fault, descriptor-table limits, ...) must not be executed there.
//!
//! Bytes that look like such an instruction are not always one. Where the pattern is found, decoding from
//! several places before it tells: streams of x86 instructions fall into step within a few instructions.
//! If all of the surroundings decode as a program's code would, the process gets a copy of the page in which
//! the instruction is UD2 ([`Nature::Patched`]); in doubt the page is not executed there at all, because a
//! copy in which data were changed would be worse than slow.
//!
//! A program that hides such an instruction inside another one is told of the host's processor; it gains
//! nothing by that.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Mnemonic, OpAccess, Register,
};

use crate::vm::lock;

/// What is looked for depends on this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rules {
    /// XGETBV gives the guest's value.
    pub xgetbv: bool,
    /// The host does not let user code read descriptor-table registers and the like (CR4.UMIP), and
    /// Linux gives it made-up values as it would in the guest.
    pub umip: bool,
    /// RDTSC and RDTSCP do not trap, because the host's counter is the guest's. What RDTSCP says of the
    /// processor is the host's, though.
    pub tsc: bool,
    /// The program can write the page: code that it made itself, among data. Only what is certain counts.
    pub made: bool,
}

/// Bytes before a page that are looked at: decoding from so far before a pattern is in step there.
pub const BEFORE: usize = 128;
/// Bytes after a page that are looked at.
pub const AFTER: usize = 16;
/// Decoding starts from this many places.
const STARTS: usize = 16;

/// What a page of code is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nature {
    /// It may run as it is.
    Plain,
    /// It may run with UD2 at these offsets.
    Patched(Arc<[u16]>),
    /// It must not run.
    Sensitive,
}

/// Opcode of UD2.
pub const UD2: [u8; 2] = [0x0f, 0x0b];

/// Looks for instructions that must not run on the host in a page of 64-bit code. `before` and
/// `next`: what is around the page, as far as it is known.
pub fn nature(before: &[u8], page: &[u8], next: &[u8], rules: Rules) -> Nature {
    let mut bytes = [0u8; BEFORE + 4096 + AFTER];
    let mut n = 0;
    let before = &before[before.len().saturating_sub(BEFORE)..];
    for part in [
        before,
        &page[..page.len().min(4096)],
        &next[..next.len().min(AFTER)],
    ] {
        bytes[n..n + part.len()].copy_from_slice(part);
        n += part.len();
    }
    let bytes = &bytes[..n];
    let end = before.len() + page.len().min(4096);
    // An instruction that begins before the page may end in it.
    let mut from = before.len().saturating_sub(2);
    let mut patches = Vec::new();
    while let Some(at) = (bytes[from..end].iter()).position(|b| *b == 0x0f) {
        let at = from + at;
        from = at + 1;
        if !looks_sensitive(bytes, at, rules) {
            continue;
        }
        match judge(bytes, at) {
            Verdict::Other => {}
            Verdict::Possible if rules.made => {}
            // A template, or data: at worst RDTSCP says which processor of the host it ran on.
            Verdict::Possible if bytes[at + 1..].starts_with(&[0x01, 0xf9]) => {}
            Verdict::Certain
                if at >= before.len() && at + UD2.len() <= end && may_replace(bytes, at) =>
            {
                patches.push((at - before.len()) as u16);
            }
            _ => return Nature::Sensitive,
        }
    }
    if patches.is_empty() {
        Nature::Plain
    } else {
        Nature::Patched(patches.into())
    }
}

/// What was found in pages, by what is in them: the same libraries are mapped over and over.
#[derive(Default)]
pub struct Found(Mutex<HashMap<u64, Nature>>);

impl Found {
    /// [`nature`], remembered.
    pub fn nature(&self, before: &[u8], page: &[u8], next: &[u8], rules: Rules) -> Nature {
        /// LIMIT: pages that are remembered: 256 MiB of code.
        const PAGES_MAX: usize = 1 << 16;
        let mut hasher = DefaultHasher::new();
        rules.hash(&mut hasher);
        let key =
            hasher.finish() ^ hash(before) ^ hash(page).rotate_left(1) ^ hash(next).rotate_left(2);
        if let Some(found) = lock(&self.0).get(&key) {
            return found.clone();
        }
        let found = nature(before, page, next, rules);
        let mut all = lock(&self.0);
        if all.len() >= PAGES_MAX {
            all.clear();
        }
        all.insert(key, found.clone());
        found
    }
}

/// A fast hash. Who makes two pages collide deceives only a program of his own.
fn hash(bytes: &[u8]) -> u64 {
    (bytes.chunks_exact(8)).fold(0, |h: u64, word| {
        let mut b = [0; 8];
        b.copy_from_slice(word);
        (h ^ u64::from_le_bytes(b))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    })
}

/// True for CPUID, RDPID and RDTSCP. Programs do use them, and data hardly ever look like them; what is left is
/// too rare for a risk.
fn may_replace(bytes: &[u8], at: usize) -> bool {
    matches!(
        bytes.get(at + 1..at + 3),
        Some([0xa2 | 0xc7, _] | [0x01, 0xf9])
    )
}

/// True if an instruction of the kind may have its opcode here. Intel SDM Vol. 2D, table A-3.
///
/// Only forms that programs use: of two bytes and any memory operand, data would be full. SYSENTER and
/// INT 80H need not be looked for, because they stop the program as SYSCALL does.
fn looks_sensitive(bytes: &[u8], at: usize, rules: Rules) -> bool {
    // What is not known is looked at when the page that it is in comes.
    let after = |n: usize| bytes.get(at + n).copied().unwrap_or(0xff);
    let modrm = after(2);
    let (memory, reg) = (modrm < 0xc0, modrm >> 3 & 7);
    match after(1) {
        // VERR, VERW; SLDT, STR.
        0x00 => matches!(reg, 4 | 5) && !memory && !rules.made || reg < 2 && !rules.umip,
        // LAR, LSL, which no compiler makes at run time.
        0x02 | 0x03 => !memory && !rules.made,
        // CPUID.
        0xa2 => true,
        0x01 => match modrm {
            // VMCALL, VMMCALL, XGETBV, RDTSCP.
            0xc1 | 0xd9 => true,
            0xd0 => !rules.xgetbv,
            0xf9 => rules.tsc && !is_dead_after(bytes, at + 3),
            // SMSW, SGDT, SIDT.
            _ => (reg == 4 || memory && reg < 2) && !rules.umip,
        },
        // RDPID; with another prefix it is RDSEED.
        0xc7 => modrm >= 0xf8 && bytes[at.saturating_sub(4)..at].contains(&0xf3),
        _ => false,
    }
}

/// True if the code at `at` overwrites ECX before it reads it, whichever way it goes: clocks only want
/// to know the time.
fn is_dead_after(bytes: &[u8], at: usize) -> bool {
    /// LIMIT: instructions that are looked at.
    const STEPS_MAX: usize = 64;
    let mut factory = InstructionInfoFactory::new();
    let mut ways = vec![at];
    let mut seen = Vec::new();
    let mut steps = 0;
    while let Some(mut here) = ways.pop() {
        loop {
            steps += 1;
            if steps > STEPS_MAX || here + 15 > bytes.len() {
                return false;
            }
            if seen.contains(&here) {
                break;
            }
            seen.push(here);
            let mut d = Decoder::with_ip(64, &bytes[here..], here as u64, DecoderOptions::NONE);
            let i = d.decode();
            if i.is_invalid() {
                return false;
            }
            let mut written = false;
            for r in factory.info(&i).used_registers() {
                if r.register().full_register() != Register::RCX {
                    continue;
                }
                let wide = matches!(r.register(), Register::RCX | Register::ECX);
                match r.access() {
                    OpAccess::Write if wide => written = true,
                    OpAccess::None => {}
                    _ => return false,
                }
            }
            if written {
                break;
            }
            let target = i.near_branch_target() as usize;
            match i.flow_control() {
                FlowControl::Next => here += i.len(),
                FlowControl::UnconditionalBranch => here = target,
                FlowControl::ConditionalBranch => {
                    ways.push(target);
                    here += i.len();
                }
                // Functions do not answer in RCX.
                FlowControl::Return => break,
                _ => return false,
            }
            if here >= bytes.len() {
                return false;
            }
        }
    }
    true
}

/// What bytes are that look like a sensitive instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// A part of another instruction.
    Other,
    /// Perhaps one.
    Possible,
    /// One, in the middle of a program's code.
    Certain,
}

/// Judges by decoding from before whether the opcode at `at` is that of an instruction.
fn judge(bytes: &[u8], at: usize) -> Verdict {
    /// Prefixes before an opcode that are looked at.
    const PREFIXES: usize = 4;
    let begin = at.saturating_sub(BEFORE);
    // Where streams that were followed came by, and what they led to.
    let mut known: [Option<bool>; BEFORE + 1] = [None; BEFORE + 1];
    let (mut hits, mut tries) = (0, 0);
    for start in begin..(begin + STARTS).min(at + 1) {
        let mut d = Decoder::new(64, &bytes[start..], DecoderOptions::NONE);
        let mut path = [0u8; BEFORE + 1];
        let mut steps = 0;
        let hit = loop {
            let here = start + d.position();
            if here >= at {
                break here == at;
            }
            if let Some(hit) = known[here - begin] {
                break hit;
            }
            path[steps] = (here - begin) as u8;
            steps += 1;
            let _ = d.decode();
            // Prefixes belong to the instruction, whose opcode comes after them.
            if start + d.position() > at {
                break at - here <= PREFIXES && prefixes_only(&bytes[here..at]);
            }
        };
        for place in &path[..steps] {
            known[usize::from(*place)] = Some(hit);
        }
        hits += usize::from(hit);
        tries += 1;
    }
    if hits * 5 < tries * 4 {
        Verdict::Other
    } else if bytes[at + 1] == 0xc7 {
        // Four bytes of RDPID do not occur by chance.
        Verdict::Certain
    } else if tries == STARTS && is_code(bytes, begin, at) {
        Verdict::Certain
    } else {
        Verdict::Possible
    }
}

/// True if what is around `at` decodes as a program's code does, from one of the places. Of random bytes,
/// one instruction in seven is invalid or privileged.
fn is_code(bytes: &[u8], begin: usize, at: usize) -> bool {
    /// Bytes behind the instruction that are looked at.
    const BEHIND: usize = 48;
    let end = (at + BEHIND).min(bytes.len().saturating_sub(15));
    (begin..begin + STARTS).any(|start| {
        let mut d = Decoder::new(64, &bytes[start..], DecoderOptions::NONE);
        let mut count = 0;
        while start + d.position() < end {
            let i = d.decode();
            // Between functions there may be HLT.
            if i.is_invalid() || i.is_privileged() && i.mnemonic() != Mnemonic::Hlt {
                return false;
            }
            count += 1;
        }
        count >= 24
    })
}

/// True if these bytes are all legacy or REX prefixes.
fn prefixes_only(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| {
        matches!(
            b,
            0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of instructions that are harmless, with `middle` among them.
    fn page(middle: &[u8]) -> Vec<u8> {
        // mov rax, [rbx+8]; add rax, rcx; lea rdx, [rax+rax*2+1000]; ret-like filler
        let filler = b"\x48\x8b\x43\x08\x48\x01\xc8\x48\x8d\x94\x40\xe8\x03\0\0";
        let mut p: Vec<u8> = filler.iter().copied().cycle().take(15 * 100).collect();
        p.extend_from_slice(middle);
        p.extend(filler.iter().copied().cycle().take(15 * 100));
        p.resize(4096, 0x90);
        p
    }

    #[test]
    fn instructions_are_found() {
        let all = Rules::default();
        for i in [
            &b"\x0f\xa2"[..],        // cpuid
            b"\xf3\x0f\xc7\xf8",     // rdpid rax
            b"\xf3\x48\x0f\xc7\xf8", // the same with a prefix
        ] {
            // Behind its prefixes, after 100 rounds of the filler.
            let opcode = 1500 + i.iter().position(|b| *b == 0x0f).expect("one");
            let patched = Nature::Patched([opcode as u16].into());
            assert_eq!(nature(&[], &page(i), &[], all), patched, "{i:02x?}");
        }
        for i in [
            &b"\x0f\x03\xc1"[..], // lsl eax, ecx
            b"\x48\x0f\x03\xc1",  // lsl rax, rcx
            b"\x0f\x01\xe0",      // smsw eax
            b"\x0f\x01\x45\x08",  // sgdt [rbp+8]
            b"\x0f\x00\xc8",      // str eax
            b"\x0f\x00\xe8",      // verw eax
            b"\x0f\x01\xd0",      // xgetbv
            b"\x0f\x01\xd9",      // vmmcall
        ] {
            let found = nature(&[], &page(i), &[], all);
            assert_eq!(found, Nature::Sensitive, "{i:02x?}");
        }
        let host = Rules {
            xgetbv: true,
            umip: true,
            tsc: true,
            made: false,
        };
        let made = Rules { made: true, ..host };
        assert_eq!(
            nature(&[], &page(b"\x0f\x03\xc1"), &[], made),
            Nature::Plain
        );
        assert_ne!(nature(&[], &page(b"\x0f\xa2"), &[], made), Nature::Plain);
        // rdtscp; then ECX is read, or written first.
        let reads = nature(&[], &page(b"\x0f\x01\xf9\x89\xc8"), &[], host);
        assert_eq!(reads, Nature::Patched([1500].into()));
        let writes = nature(&[], &page(b"\x0f\x01\xf9\x31\xdb\xb9\0\0\0\0"), &[], host);
        assert_eq!(writes, Nature::Plain);
        assert_eq!(
            nature(&[], &page(b"\x0f\x01\xf9\x89\xc8"), &[], all),
            Nature::Plain
        );
        for i in [
            &b"\x0f\x01\xd0"[..],
            b"\x0f\x01\xe0",
            b"\x0f\x00\xc8",
            b"\x0f\0\0\0\x0f\0\0\0", // a table of numbers
        ] {
            assert_eq!(nature(&[], &page(i), &[], host), Nature::Plain, "{i:02x?}");
        }
    }

    #[test]
    fn constants_are_not() {
        for i in [
            &b"\xb8\x0f\xa2\0\0"[..],      // mov eax, 0a20fh
            b"\xb9\x0f\0\0\0",             // mov ecx, 15
            b"\x48\x81\xc1\x0f\x03\xc1\0", // add rcx, 0c1030fh
            b"\x0f\xc7\xf8",               // rdseed eax
            b"\xe8\xcd\x80\0\0",           // call
            b"",
        ] {
            let found = nature(&[], &page(i), &[], Rules::default());
            assert_eq!(found, Nature::Plain, "{i:02x?}");
        }
    }

    #[test]
    fn what_lies_across_the_end_is_found() {
        let mut p = page(b"");
        p.truncate(4095);
        p.push(0x0f);
        let rules = Rules::default();
        assert_eq!(nature(&[], &p, b"\xa2\x90", rules), Nature::Sensitive);
        assert_eq!(nature(&[], &p, b"\xaf\xc1", rules), Nature::Plain);
        let mut after = page(b"");
        after[0] = 0xa2;
        after[1] = 0x90;
        let before = &p[p.len() - BEFORE..];
        assert_eq!(nature(before, &after, &[], rules), Nature::Sensitive);
    }

    #[test]
    fn tables_among_code_are_not_changed() {
        // Bytes like those of a table of constants, with each pattern at each place.
        let mut x = 1u64;
        let mut random = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 56) as u8
        };
        for round in 0..2000 {
            let mut table: Vec<u8> = (0..640).map(|_| random()).collect();
            let at = 100 + round % 400;
            table[at..at + 2].copy_from_slice(b"\x0f\xa2");
            let found = nature(&[], &page(&table), &[], Rules::default());
            assert!(!matches!(found, Nature::Patched(_)), "{round}");
        }
    }
}
