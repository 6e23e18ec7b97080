//! Every form that CPUID announces, against the host.

use std::collections::BTreeMap;

use iced_x86::{Code, EncodingKind, Mnemonic};

use super::gen_::{self, Sequence};
use super::guest::{self, Guest};
use super::host::Host;
use super::machine::{CODE_BYTES, Components, End, Start, Tolerance, differences, fill};
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
    );
    Tolerance {
        flags: 0,
        flags_at_fault: !exact,
        cr2_page_only: big,
        masked_alignment: false,
        partial_vectors: is_gather(code),
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
    tested: usize,
    through: usize,
    excluded: BTreeMap<&'static str, usize>,
    failures: BTreeMap<String, (usize, String)>,
    untested: Vec<Code>,
    never_through: Vec<Code>,
}

/// Runs `rounds` encodings of each form on the host and on all engines, twice each.
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
        if let Some(why) = gen_::excluded(code) {
            *tally.excluded.entry(why).or_default() += 1;
            continue;
        }
        let mut r = Rng::new(seed ^ (code as u64) << 32);
        one_form(
            code,
            rounds,
            &mut r,
            &mut guests,
            &mut host,
            &components,
            &mut tally,
            &mut place,
        );
    }
    report(&tally, filter.is_some());
}

#[allow(
    clippy::too_many_arguments,
    reason = "the engines and oracles of one form"
)]
fn one_form(
    code: Code,
    rounds: usize,
    r: &mut Rng,
    guests: &mut [Guest],
    host: &mut Host,
    components: &Components,
    tally: &mut Tally,
    place: &mut usize,
) {
    let mut start = Start::zero();
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
        let i = gen_::decoded(&insn.bytes);
        prepare(&i, &mut start);
        announced = guests[0].vcpu().interp.allows(&i);
        let mut seq = Sequence {
            at: *place,
            insns: vec![insn],
        };
        let mut bytes = seq.bytes();
        if *place + bytes.len() > CODE_BYTES {
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
                if !diff.is_empty() {
                    let e = tally
                        .failures
                        .entry(format!("{code:?} ({})", g.name))
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
            *tally.excluded.entry("not announced").or_default() += 1;
        } else if matches!(
            code,
            Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64 | Code::Ud0
        ) {
            *tally
                .excluded
                .entry("the other vendor's encoding")
                .or_default() += 1;
        } else if matches!(
            code.op_code().encoding(),
            EncodingKind::D3NOW | EncodingKind::MVEX
        ) {
            *tally
                .excluded
                .entry("an encoding of no processor that hosts this")
                .or_default() += 1;
        } else {
            tally.untested.push(code);
        }
    } else if !announced {
        *tally
            .excluded
            .entry("not announced: raises #UD")
            .or_default() += 1;
    } else {
        tally.tested += 1;
        tally.through += usize::from(through);
        if !through {
            tally.never_through.push(code);
        }
    }
}

/// Makes the start fit the instruction.
fn prepare(i: &iced_x86::Instruction, start: &mut Start) {
    let at = (start.gpr[4] - super::machine::DATA) as usize;
    if matches!(
        i.mnemonic(),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
    ) {
        // No single-stepping; not the nested-task flag, on which the host's kernel looks.
        start.data[at + 1] &= !0x41;
    }
    if i.mnemonic() == Mnemonic::Ret {
        let end = super::machine::END.to_le_bytes();
        start.data[at..at + 8].copy_from_slice(&end);
    }
    if i.is_jmp_near_indirect() || i.is_call_near_indirect() {
        let by_register = i.op0_kind() == iced_x86::OpKind::Register;
        for g in start.gpr.iter_mut().filter(|_| by_register) {
            if *g < 1 << 20 {
                *g = super::machine::END;
            }
        }
        let end = super::machine::END.to_le_bytes();
        for w in start.data.chunks_mut(8) {
            w.copy_from_slice(&end);
        }
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
        rip: super::machine::CODE + seq.at as u64,
        rflags: start.rflags,
        fs_base: start.fs_base,
        gs_base: start.gs_base,
        xsave: start.xsave.clone(),
        data: start.data.clone(),
    }
}

fn report(t: &Tally, partial: bool) {
    println!(
        "forms tested against the host: {} ({} of them to the end)",
        t.tested, t.through
    );
    for (why, n) in &t.excluded {
        println!("  excluded: {n:5} {why}");
    }
    println!("  only exceptions: {:?}", t.never_through);
    println!("  silently untested: {:?}", t.untested);
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
    assert!(partial || t.tested > 1000, "only {} forms", t.tested);
}
