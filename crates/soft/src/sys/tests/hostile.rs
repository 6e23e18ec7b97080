//! Random system instructions in every mode: whatever the guest does, the engine neither panics
//! nor hangs, and the state stays consistent.

use pyrite_x86::Activity;
use pyrite_x86::bits::{cr0, cr4, efer, rflags};

use super::bench::*;
use crate::interp;

/// xorshift64*: the same sequence every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// First bytes of the instructions of this module, prefixes included.
const STARTS: [&[u8]; 30] = [
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x34],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x48, 0xcf],
    &[0x48, 0x0f, 0x07],
    &[0x66, 0x9d],
    &[0x8e],
    &[0x9a],
    &[0xea],
    &[0xcf],
    &[0xcb],
    &[0xca],
    &[0xcd],
    &[0xcc],
    &[0xf1],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0xff],
    &[0x9c],
    &[0xfb],
];

fn consistent(c: &pyrite_x86::CpuState) {
    let long = c.efer & efer::LMA != 0;
    assert_eq!(long, c.efer & efer::LME != 0 && c.cr0 & cr0::PG != 0);
    assert!(c.cr0 & cr0::PG == 0 || c.cr0 & cr0::PE != 0);
    assert!(!long || c.cr4 & cr4::PAE != 0);
    assert_ne!(c.rflags & rflags::FIXED1, 0);
    assert_eq!(c.rflags & !rflags::ALL, 0);
    assert_ne!(c.xcr0 & 1, 0);
}

fn storm(bench: Bench, seed: u64) {
    let mut r = Random(seed);
    let start = bench.cpu.clone();
    let (_vm, mut v) = bench.into_vcpu();
    for _ in 0..4000 {
        v.frame.cpu = start.clone();
        v.flush_tlb(false);
        for g in &mut v.frame.cpu.gpr {
            // Selectors, small addresses and anything.
            *g = match r.next() % 4 {
                0 => r.next() & 0x7f,
                1 => r.next() & 0xffff,
                2 => 0xc000_0080 | (r.next() & 3),
                _ => r.next(),
            };
        }
        v.frame.cpu.rflags |= r.next() & (rflags::NT | rflags::IOPL | rflags::TF | rflags::ARITH);
        let mut code = [0u8; 16];
        code.iter_mut().for_each(|b| *b = r.next() as u8);
        let first = STARTS[(r.next() % STARTS.len() as u64) as usize];
        code[..first.len()].copy_from_slice(first);
        v.vm.memory.write(CODE, &code).unwrap();
        for _ in 0..4 {
            if interp::step(&mut v).is_err() || v.frame.cpu.activity == Activity::Shutdown {
                break;
            }
            consistent(&v.frame.cpu);
        }
    }
}

#[test]
fn real_mode_survives_anything() {
    storm(Bench::real(), 0x1234_5678_9abc_def1);
}

#[test]
fn protected_mode_survives_anything() {
    storm(Bench::protected(), 0x2234_5678_9abc_def1);
    storm(Bench::protected().user(), 0x3234_5678_9abc_def1);
}

#[test]
fn long_mode_survives_anything() {
    storm(Bench::long(), 0x4234_5678_9abc_def1);
    storm(Bench::long().user(), 0x5234_5678_9abc_def1);
}
