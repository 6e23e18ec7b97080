//! A debugger outside the guest, in the interpreter and in the translator.

use std::sync::Arc;

use pyrite_engine::{DebugPlan, DebugStop, StopReason, Vcpu, Vm, Watch, WatchKind};
use pyrite_x86::{CpuState, gpr};

use super::bench::*;
use crate::vcpu::SoftVcpu;
use crate::vm::SoftVm;

const CALLED: u64 = GATE_TARGET;
const DATA: u64 = 0x8000;
/// Calls per loop, enough for the translator to know the code.
const CALLS: u32 = 50;

/// Two loops of calls of `inc dword [DATA]; mov eax, [DATA + 4]; ret`, and a NOP behind each.
fn program() -> Vec<u8> {
    let one = |at: u64| {
        let mut code = vec![0xb9];
        code.extend(CALLS.to_le_bytes()); // mov ecx, CALLS
        let call = at + 5;
        code.push(0xe8);
        code.extend(((CALLED - (call + 5)) as u32).to_le_bytes());
        code.extend([0xff, 0xc9, 0x75, 0xf7, 0x90]); // dec ecx; jnz call; nop
        code
    };
    let first = one(CODE);
    let second = one(CODE + first.len() as u64);
    [first, second, vec![0xe6, 0xf4]].concat()
}

const NOP1: u64 = CODE + 14;
const NOP2: u64 = CODE + 29;
const END: u64 = CODE + 32;

fn machine(translate: bool) -> (Arc<SoftVm>, Box<SoftVcpu>) {
    let mut b = Bench::long_in(translate);
    b.write(CODE, &program());
    // inc dword [DATA]; mov eax, [DATA + 4]; ret
    let (d, e) = (DATA as u8, (DATA >> 8) as u8);
    b.write(CALLED, &[0xff, 0x04, 0x25, d, e, 0, 0]);
    b.write(CALLED + 7, &[0x8b, 0x04, 0x25, d + 4, e, 0, 0, 0xc3]);
    b.into_vcpu()
}

fn stops(at: &[u64]) -> DebugPlan {
    DebugPlan {
        stops: at.to_vec(),
        ..DebugPlan::default()
    }
}

fn watch(at: u64, len: u64, kind: WatchKind) -> DebugPlan {
    DebugPlan {
        watches: vec![Watch { at, len, kind }],
        ..DebugPlan::default()
    }
}

/// Runs with a plan; why the vCPU came back, and its state.
fn run(v: &mut SoftVcpu, plan: &DebugPlan) -> (Option<DebugStop>, CpuState) {
    v.set_debug(plan).unwrap();
    let stop = match v.run() {
        StopReason::Debug(stop) => Some(stop),
        StopReason::Requested => None,
        other => panic!("{other:?}"),
    };
    (stop, v.state().unwrap())
}

#[test]
fn stops_before_an_instruction_that_is_translated_already() {
    for translate in [false, true] {
        let (vm, mut v) = machine(translate);
        let (stop, s) = run(&mut v, &stops(&[NOP1]));
        assert_eq!((stop, s.rip), (Some(DebugStop::Breakpoint), NOP1));
        assert_eq!(s.gpr[gpr::RCX], 0);
        // Still there, unless it is to be passed.
        let (stop, s) = run(&mut v, &stops(&[NOP1]));
        assert_eq!((stop, s.rip), (Some(DebugStop::Breakpoint), NOP1));
        let middle = CALLED + 7;
        for n in 0..CALLS {
            let plan = DebugPlan {
                pass: true,
                ..stops(&[NOP1, middle])
            };
            let (stop, s) = run(&mut v, &plan);
            assert_eq!((stop, s.rip), (Some(DebugStop::Breakpoint), middle));
            assert_eq!(s.gpr[gpr::RCX], u64::from(CALLS - n));
            assert_eq!(v.vm.memory.read_u32(DATA).unwrap(), CALLS + n + 1);
        }
        let (stop, s) = run(&mut v, &DebugPlan::default());
        assert_eq!((stop, s.rip), (None, END));
        drop(vm);
    }
}

#[test]
fn watched_data_stops_behind_the_access() {
    for translate in [false, true] {
        let (vm, mut v) = machine(translate);
        run(&mut v, &stops(&[NOP1]));
        let written = DebugStop::Watchpoint {
            at: DATA,
            kind: WatchKind::Write,
        };
        for n in 1..4 {
            let (stop, s) = run(&mut v, &watch(DATA, 4, WatchKind::Write));
            assert_eq!((stop, s.rip), (Some(written), CALLED + 7), "{translate}");
            assert_eq!(v.vm.memory.read_u32(DATA).unwrap(), CALLS + n);
        }
        // The load of the word behind it.
        let (stop, s) = run(&mut v, &watch(DATA + 6, 1, WatchKind::Read));
        let read = DebugStop::Watchpoint {
            at: DATA + 6,
            kind: WatchKind::Read,
        };
        assert_eq!((stop, s.rip), (Some(read), CALLED + 14));
        // Nobody writes there.
        let plan = DebugPlan {
            stops: vec![NOP2],
            ..watch(DATA + 4, 8, WatchKind::Write)
        };
        let (stop, s) = run(&mut v, &plan);
        assert_eq!((stop, s.rip), (Some(DebugStop::Breakpoint), NOP2));
        drop(vm);
    }
}

#[test]
fn steps_are_one_instruction_and_leave_no_trace() {
    for translate in [false, true] {
        let (vm, mut v) = machine(translate);
        run(&mut v, &stops(&[NOP1]));
        let step = DebugPlan {
            step: true,
            hold_interrupts: true,
            ..stops(&[NOP1, NOP1 + 1])
        };
        let mut places = Vec::new();
        for _ in 0..5 {
            let (stop, s) = run(&mut v, &step);
            assert_eq!(stop, Some(DebugStop::Step));
            assert_eq!(s.rflags & 0x100, 0);
            places.push(s.rip);
        }
        let call = NOP1 + 6;
        let expected = [NOP1 + 1, call, CALLED, CALLED + 7, CALLED + 14];
        assert_eq!(places, expected);
        drop(vm);
    }
}

#[test]
fn interrupts_wait_for_the_end_of_a_step_if_that_is_wanted() {
    let (vm, mut v) = machine(true);
    run(&mut v, &stops(&[NOP1]));
    vm.send_nmi(0);
    let hold = DebugPlan {
        step: true,
        hold_interrupts: true,
        ..DebugPlan::default()
    };
    assert_eq!(run(&mut v, &hold).1.rip, NOP1 + 1);
    let take = DebugPlan {
        hold_interrupts: false,
        ..hold
    };
    // PUSH 2 of its stub has been executed.
    assert_eq!(run(&mut v, &take).1.rip, STUBS + 8 * 2 + 2);
}

#[test]
fn exceptions_end_a_step_at_their_handler() {
    let mut b = Bench::long_in(true);
    b.write(CODE, &[0x0f, 0x0b]);
    let (_vm, mut v) = b.into_vcpu();
    let step = DebugPlan {
        step: true,
        ..DebugPlan::default()
    };
    let (stop, s) = run(&mut v, &step);
    assert_eq!((stop, s.rip), (Some(DebugStop::Step), STUBS + 8 * 6));
}

#[test]
fn code_that_changes_itself_keeps_its_stops() {
    for translate in [false, true] {
        let mut b = Bench::long_in(translate);
        // L: inc byte [N]; N: mov al, 0; cmp al, 9; jb L; out F4H, al
        let n = CODE + 7;
        let code = [
            0xfe,
            0x04,
            0x25,
            n as u8 + 1,
            (n >> 8) as u8,
            0,
            0,
            0xb0,
            0,
            0x3c,
            9,
            0x72,
            0xf3,
            0xe6,
            0xf4,
        ];
        b.write(CODE, &code);
        let (vm, mut v) = b.into_vcpu();
        for count in 1..=9 {
            let plan = DebugPlan {
                pass: true,
                ..stops(&[n])
            };
            let (stop, s) = run(&mut v, &plan);
            assert_eq!((stop, s.rip), (Some(DebugStop::Breakpoint), n));
            let mut byte = [0; 2];
            v.vm.memory.read(n, &mut byte).unwrap();
            assert_eq!(byte, [0xb0, count]);
        }
        assert_eq!(run(&mut v, &stops(&[])).0, None);
        drop(vm);
    }
}
