//! Every form that CPUID announces, against the host.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, EncodingKind, Mnemonic};

use super::gen_::{self, Sequence};
use super::guest::{self, Guest};
use super::host::{self, Host};
use super::machine::{
    Components, END, END16, END32, End, Mode, Start, Tolerance, differences, fill,
};
use super::rng::Rng;

/// Undefined results that even two runs on hardware need not agree on, or that a documented
/// decision leaves open.
pub fn tolerance(code: Code, exact: bool) -> Tolerance {
    use Mnemonic::*;
    let big = matches!(
        code.mnemonic(),
        Xsave
            | Xsave64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
            | Xrstor
            | Xrstor64
            | Fxsave
            | Fxsave64
            | Fxrstor
            | Fxrstor64
            | Frstor
            | Fldenv
            | Fnsave
            | Fnstenv
    );
    Tolerance {
        flags: 0,
        flags_at_fault: !exact,
        cr2_page_only: big,
        partial_vectors: is_gather(code),
        may_wrap: false,
    }
}

/// Gathers: what an exception leaves above the elements done is not architectural.
pub fn is_gather(code: Code) -> bool {
    let op = code.op_code();
    let name = format!("{:?}", op.mnemonic());
    name.starts_with("Vgather") || name.starts_with("Vpgather")
}

#[derive(Default)]
struct Tally {
    tested: BTreeMap<Mode, usize>,
    through: BTreeMap<Mode, usize>,
    excluded: BTreeMap<(Mode, &'static str), usize>,
    failures: BTreeMap<String, (usize, String)>,
    untested: Vec<(Mode, Code)>,
    never_through: BTreeMap<Mode, Vec<Code>>,
    /// Forms that were compared in some mode.
    forms: BTreeSet<Code>,
    /// Forms that 64-bit mode lacks, with the reason why one of the other modes did not compare it.
    outside: BTreeMap<Code, &'static str>,
}

impl Tally {
    fn exclude(&mut self, code: Code, mode: Mode, why: &'static str) {
        *self.excluded.entry((mode, why)).or_default() += 1;
        if mode != Mode::Long && !code.op_code().mode64() {
            self.outside.insert(code, why);
        }
    }
}

/// Runs `rounds` encodings of each form on the host and on all engines, twice each; forms of 64-bit
/// mode a third as often in the other modes.
pub fn all_forms(seed: u64, rounds: usize, filter: Option<&str>) {
    let mut guests = guest::all();
    let mut host = Host::new();
    let components = Components::of_host();
    let mut tally = Tally::default();
    let mut place = 0usize;
    for code in Code::values() {
        if filter.is_some_and(|f| {
            !format!("{code:?}")
                .to_lowercase()
                .contains(&f.to_lowercase())
        }) {
            continue;
        }
        for mode in Mode::ALL {
            if let Some(why) = gen_::excluded(code, mode).or_else(|| host::lacks(mode)) {
                tally.exclude(code, mode, why);
                continue;
            }
            let again = mode != Mode::Long && code.op_code().mode64();
            let mut r = Rng::new(seed ^ (code as u64) << 32 ^ u64::from(mode.bits() & 63) << 16);
            one_form(
                code,
                mode,
                if again { rounds.div_ceil(3) } else { rounds },
                &mut r,
                &mut guests,
                &mut host,
                &components,
                &mut tally,
                &mut place,
            );
        }
    }
    report(&tally, filter.is_some());
}

#[allow(
    clippy::too_many_arguments,
    reason = "the engines and oracles of one form"
)]
fn one_form(
    code: Code,
    mode: Mode,
    rounds: usize,
    r: &mut Rng,
    guests: &mut [Guest],
    host: &mut Host,
    components: &Components,
    tally: &mut Tally,
    place: &mut usize,
) {
    let mut start = Start {
        mode,
        ..Start::zero()
    };
    fill(r, &mut start.data);
    let (mut found, mut through, mut announced) = (false, false, true);
    let mut round = 0;
    // More rounds for forms that have only raised exceptions so far.
    while round < rounds || (!through && found && announced && round < 8 * rounds) {
        round += 1;
        start.randomise(r, components, true);
        let Some(insn) = gen_::instruction(code, r, &start, 4000) else {
            continue;
        };
        found = true;
        let i = gen_::decoded(mode, &insn.bytes);
        prepare(&i, &mut start, r);
        // Without its announcement WBNOINVD is WBINVD: the prefix means nothing.
        announced = guests[0].vcpu().interp.allows(&i) || code == Code::Wbnoinvd;
        let mut seq = Sequence {
            mode,
            at: *place,
            insns: vec![insn],
        };
        let mut bytes = seq.bytes();
        if *place + bytes.len() > END16 {
            *place = 0;
            seq.at = 0;
            bytes = seq.bytes();
        }
        *place += bytes.len();
        let want = if announced {
            host.set_code(seq.at, &bytes);
            host.run(seq.at, &start)
        } else {
            undefined(&seq, &start)
        };
        through |= want.end == End::Through;
        for g in guests.iter_mut() {
            g.set_code(seq.at, &bytes);
            for time in 0..2 {
                let got = g.run(seq.at, &start);
                let t = tolerance(code, g.exact);
                let mut diff = differences(&want, &got, components, t);
                if !announced {
                    diff.truncate(usize::from(want.end != got.end));
                }
                if !diff.is_empty() && !super::fuzz::met_the_host(&got) {
                    let e = tally
                        .failures
                        .entry(format!("{code:?} ({mode:?}, {})", g.name))
                        .or_default();
                    e.0 += 1;
                    if e.1.is_empty() {
                        e.1 = format!(
                            "{:02x?} run {time} round {round} flags {:#x}\n      {}",
                            seq.insns[0].bytes,
                            start.rflags,
                            diff.join("\n      ")
                        );
                    }
                }
            }
        }
    }
    let mut bare = iced_x86::Instruction::default();
    bare.set_code(code);
    if !found {
        if !guests[0].vcpu().interp.allows(&bare) {
            tally.exclude(code, mode, "not announced");
        } else if matches!(
            code,
            Code::Ud0_r16_rm16
                | Code::Ud0_r32_rm32
                | Code::Ud0_r64_rm64
                | Code::Ud0
                | Code::Call_m1664
                | Code::Jmp_m1664
                | Code::Lss_r64_m1664
                | Code::Lfs_r64_m1664
                | Code::Lgs_r64_m1664
        ) {
            tally.exclude(code, mode, "the other vendor's encoding");
        } else if matches!(
            code.op_code().encoding(),
            EncodingKind::D3NOW | EncodingKind::MVEX
        ) {
            tally.exclude(code, mode, "an encoding of no processor that hosts this");
        } else {
            tally.untested.push((mode, code));
        }
    } else if !announced {
        tally.exclude(code, mode, "not announced: raises #UD");
    } else {
        tally.forms.insert(code);
        *tally.tested.entry(mode).or_default() += 1;
        *tally.through.entry(mode).or_default() += usize::from(through);
        if !through {
            tally.never_through.entry(mode).or_default().push(code);
        }
    }
}

/// Selectors that mean the same to the host and to the guest, or nothing to either.
const SELECTORS: [u16; 14] = [
    0, 3, 0x23, 0x2b, 0x2b, 0x33, 0x2a, 0x07, 0x0f, 0x0f, 0x17, 0x1f, 0x27, 0x203,
];

/// Writes a value over and over.
fn pattern(data: &mut [u8], bytes: &[u8]) {
    for w in data.chunks_mut(bytes.len()) {
        w.copy_from_slice(&bytes[..w.len()]);
    }
}

/// Makes the start fit the instruction.
fn prepare(i: &iced_x86::Instruction, start: &mut Start, r: &mut Rng) {
    let at = start.stack_at();
    let mode = start.mode;
    let size = i.op_code().operand_size() as usize / 8;
    if matches!(
        i.mnemonic(),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
    ) {
        // No single-stepping; not the nested-task flag, on which the host's kernel looks.
        start.data[at + 1] &= !0x41;
    }
    let near = match mode {
        Mode::Long => END,
        Mode::Flat32 => END32,
        Mode::Seg16 => END16 as u64,
    };
    if i.mnemonic() == Mnemonic::Ret {
        start.data[at..at + 8].copy_from_slice(&near.to_le_bytes());
    }
    if matches!(
        i.mnemonic(),
        Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq
    ) {
        let size = if size == 0 { 4 } else { size };
        let far = gen_::far_pointer(size);
        let sp = start.gpr[4] + 0x40;
        let words = [0, 0, 0x202, sp, mode.selectors()[2].into()];
        for (n, w) in words.into_iter().enumerate() {
            let to = at + n * size;
            start.data[to..to + size].copy_from_slice(&w.to_le_bytes()[..size]);
        }
        start.data[at..at + size + 2].copy_from_slice(&far);
    } else if gen_::is_far(i.code()) {
        let mut far = gen_::far_pointer(if size == 0 { 4 } else { size });
        far.resize(16, 0);
        if i.op0_kind() == iced_x86::OpKind::Memory {
            pattern(&mut start.data, &far);
        }
    } else if gen_::takes_selectors(i.code()) {
        let s = *r.pick(&SELECTORS);
        pattern(&mut start.data, &s.to_le_bytes());
        let by_register = (0..i.op_count()).any(|n| {
            i.op_kind(n) == iced_x86::OpKind::Register && !i.op_register(n).is_segment_register()
        });
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == iced_x86::OpKind::Memory);
        if by_register && !memory {
            for g in &mut start.gpr {
                *g = *g & !0xffff | u64::from(s);
            }
        }
    }
    if i.is_jmp_near_indirect() || i.is_call_near_indirect() {
        let by_register = i.op0_kind() == iced_x86::OpKind::Register;
        for g in start.gpr.iter_mut().filter(|_| by_register) {
            if *g < 1 << 20 {
                *g = near;
            }
        }
        let width = if mode == Mode::Long { 8 } else { 4 };
        pattern(&mut start.data, &near.to_le_bytes()[..width]);
    }
    if matches!(i.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64) {
        // A header that is valid, wherever the image may be.
        for image in start.data.chunks_mut(64) {
            image[8..].fill(0);
            image[0] &= 0xe7;
            image[24..26].copy_from_slice(&0x1f80u16.to_le_bytes());
        }
        for image in start.data.chunks_mut(64) {
            image[1..8].fill(0);
        }
        start.gpr[0] |= 0xe7;
    }
    if i.has_rep_prefix() || i.has_repne_prefix() {
        start.gpr[1] &= 0x3f;
    }
}

/// What an instruction that is not announced does.
fn undefined(seq: &Sequence, start: &Start) -> super::machine::Outcome {
    super::machine::Outcome {
        end: End::Exception {
            vector: 6,
            code: 0,
            cr2: 0,
        },
        gpr: start.gpr,
        rip: seq.mode.code() + seq.at as u64,
        rflags: start.rflags,
        fs_base: start.fs_base,
        gs_base: start.gs_base,
        selectors: seq.mode.selectors(),
        xsave: start.xsave.clone(),
        data: start.data.clone(),
    }
}

fn report(t: &Tally, partial: bool) {
    println!("forms compared with the host: {}", t.forms.len());
    for mode in Mode::ALL {
        let of = |m: &BTreeMap<Mode, usize>| m.get(&mode).copied().unwrap_or(0);
        println!(
            "{mode:?}: {} forms ({} of them to the end)",
            of(&t.tested),
            of(&t.through)
        );
        for ((m, why), n) in &t.excluded {
            if *m == mode {
                println!("  excluded: {n:5} {why}");
            }
        }
        println!("  only exceptions: {:?}", t.never_through.get(&mode));
    }
    let outside = t.forms.iter().filter(|c| !c.op_code().mode64());
    println!("forms that 64-bit mode lacks: {} compared", outside.count());
    let mut reasons: BTreeMap<&str, Vec<Code>> = BTreeMap::new();
    for (c, why) in t.outside.iter().filter(|(c, _)| !t.forms.contains(c)) {
        reasons.entry(why).or_default().push(*c);
    }
    for (why, codes) in reasons {
        println!("  not compared: {} {why}: {codes:?}", codes.len());
    }
    println!("silently untested: {:?}", t.untested);
    for (what, (n, first)) in &t.failures {
        println!("FAIL {what}: {n} times, first {first}");
    }
    assert!(
        t.failures.is_empty(),
        "{} form/engine pairs differ",
        t.failures.len()
    );
    assert!(
        t.untested.is_empty(),
        "forms without a test: {:?}",
        t.untested
    );
    assert!(partial || t.forms.len() > 1200, "{} forms", t.forms.len());
}
