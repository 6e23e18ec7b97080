//! Random instructions against the host, and by hand what the host cannot show in 64-bit mode.

// UNSAFETY: the oracle runs instructions on the host.
#![allow(unsafe_code, reason = "the host is the oracle")]

use std::sync::Arc;

use core::arch::x86_64::__cpuid_count;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use pyrite_engine::{CpuIo, CpuidEntry, CpuidTable, VmConfig};
use pyrite_mem::GuestMemory;
use pyrite_x86::bits::{cr0, cr4, efer, rflags, vector as vec_no};
use pyrite_x86::{Segment, XsaveArea, gpr, sreg};

use crate::exception::{Exception, Trap};
use crate::interp::native::feature::Announced;
use crate::interp::native::registers::{normalise, opmask, set_opmask, set_vector, vector};
use crate::interp::native::unit::{Unit, component};
use crate::interp::native::{State, state_of};
use crate::interp::{one, select};
use crate::vcpu::SoftVcpu;
use crate::vm::{SoftOptions, SoftVm};

struct Nothing;

impl CpuIo for Nothing {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xee);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) {}
    fn ack_pic(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
/// A page that is not mapped in long mode follows this one.
const LAST_PAGE: u64 = 0x1f_f000;

fn host_cpuid() -> CpuidTable {
    let leaves = [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0), (0x8000_0008, 0)];
    let entries = leaves
        .into_iter()
        .map(|(leaf, subleaf)| {
            let r = __cpuid_count(leaf, subleaf);
            CpuidEntry {
                leaf,
                subleaf,
                indexed: leaf == 7,
                eax: r.eax,
                ebx: r.ebx,
                ecx: r.ecx,
                edx: r.edx,
            }
        })
        .collect();
    CpuidTable { entries }
}

/// A vCPU in real mode with flat-ish segments at CODE.
fn machine() -> (Arc<SoftVm>, Box<SoftVcpu>) {
    let config = VmConfig {
        memory: Arc::new(GuestMemory::new(2 << 20).expect("memory")),
        vcpus: 1,
        cpuid: host_cpuid(),
        io: Arc::new(Nothing),
        clock: Arc::new(|| 0),
    };
    let vm = SoftVm::with_options(config, SoftOptions::default()).expect("vm");
    let v = vm.take_soft(0).expect("vcpu");
    (vm, v)
}

fn long_mode() -> (Arc<SoftVm>, Box<SoftVcpu>) {
    let (vm, mut v) = machine();
    let m = Arc::clone(&v.vm.memory);
    m.write(0x1000, &0x2003u64.to_le_bytes()).expect("ram");
    m.write(0x2000, &0x3003u64.to_le_bytes()).expect("ram");
    m.write(0x3000, &0x83u64.to_le_bytes()).expect("ram");
    let c = &mut v.frame.cpu;
    c.cr3 = 0x1000;
    c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET;
    c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    c.efer = efer::LME | efer::LMA;
    c.xcr0 = 0xe7;
    for s in &mut c.seg {
        *s = Segment {
            base: 0,
            limit: 0xffff_ffff,
            attr: 0xc093,
            selector: 0x10,
            reserved: [0; 3],
        };
    }
    c.seg[sreg::CS].attr = 0xa09b;
    c.rip = CODE;
    v.flush_tlb(false);
    (vm, v)
}

fn protected_32() -> (Arc<SoftVm>, Box<SoftVcpu>) {
    let (vm, mut v) = long_mode();
    let c = &mut v.frame.cpu;
    c.cr0 = cr0::PE | cr0::NE;
    c.efer = 0;
    c.seg[sreg::CS].attr = 0xc09b;
    v.flush_tlb(false);
    (vm, v)
}

fn real_mode() -> (Arc<SoftVm>, Box<SoftVcpu>) {
    let (vm, mut v) = machine();
    v.frame.cpu.seg[sreg::CS] = Segment::real(0x1000, 0x9b);
    v.frame.cpu.seg[sreg::SS] = Segment::real(0x2000, 0x93);
    v.frame.cpu.rip = 0;
    (vm, v)
}

/// Puts code at CS:RIP and executes one instruction.
fn run(v: &mut SoftVcpu, code: &[u8]) -> Result<(), Exception> {
    let at = v.frame.cpu.seg[sreg::CS].base + v.frame.cpu.rip;
    v.vm.memory.write(at, code).expect("ram");
    match one(v) {
        Ok(()) => Ok(()),
        Err(Trap::Exception(e)) => Err(e),
        Err(Trap::Stop(r)) => panic!("{r:?}"),
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
    /// Values with many zeroes and ones, and floating-point ones.
    fn value(&mut self) -> u64 {
        let x = self.next();
        match self.below(6) {
            0 => x >> self.below(64),
            1 => ((x as i64) >> self.below(64)) as u64,
            2 => f64::from(x as u32 >> 16).to_bits(),
            3 => {
                u64::from((x as u32 as f32).to_bits()) << 32
                    | u64::from((x as u16 as f32).to_bits())
            }
            4 => 1 << self.below(64),
            _ => x,
        }
    }
}

#[repr(C, align(64))]
struct Buffer([u8; 4096]);

fn allowed(i: &iced_x86::Instruction, info: &mut InstructionInfoFactory) -> bool {
    use Mnemonic as M;
    let m = i.mnemonic();
    let known = match state_of(i) {
        Some(State::Integer) => !matches!(m, M::Rdrand | M::Rdseed),
        Some(_) => !matches!(
            m,
            M::Wait
                | M::Fnstenv
                | M::Fldenv
                | M::Fnsave
                | M::Frstor
                | M::Fldcw
                | M::Ldmxcsr
                | M::Vldmxcsr
                | M::Maskmovq
                | M::Maskmovdqu
                | M::Vmaskmovdqu
        ),
        None => select::arithmetic(m).or_else(|| select::other(m)).is_some(),
    };
    let skip = matches!(
        m,
        // Not the same instruction for the oracle, or needs DS:RDI, RBX or more of memory.
        M::Clzero | M::Movdir64b | M::Xlatb | M::Ud0 | M::Ud1 | M::Ud2 | M::Clflush
            | M::Clflushopt | M::Clwb | M::Cld | M::Std | M::Rdsspd | M::Rdsspq
            // May write its register operand or not, which the decoder counts as RSP use.
            | M::Serialize
    );
    if !known || skip || i.is_vsib() || i.is_privileged() || i.flow_control() != FlowControl::Next {
        return false;
    }
    for op in 0..i.op_count() {
        match i.op_kind(op) {
            OpKind::Memory => {
                let near = i.memory_base() == Register::RSI
                    && i.memory_index() == Register::None
                    && (-256..1024).contains(&(i.memory_displacement64() as i64))
                    && i.segment_prefix() == Register::None;
                // A bit string reaches anywhere.
                let string = matches!(m, M::Bt | M::Bts | M::Btr | M::Btc)
                    && i.op1_kind() == OpKind::Register;
                if m != M::Lea && (!near || string) {
                    return false;
                }
            }
            OpKind::Register => {
                let r = i.op_register(op).full_register();
                if r == Register::RSP
                    || r == Register::RSI
                    || i.op_register(op).is_segment_register()
                {
                    return false;
                }
            }
            _ => {}
        }
    }
    info.info(i).used_registers().iter().all(|r| {
        let full = r.register().full_register();
        full != Register::RSP && (full != Register::RSI || r.access() == OpAccess::Read)
    })
}

/// A random instruction that the oracle can run.
fn random_instruction(
    r: &mut Random,
    info: &mut InstructionInfoFactory,
    announced: &Announced,
) -> Vec<u8> {
    loop {
        let mut b: Vec<u8> = Vec::new();
        let modrm = |r: &mut Random| match r.below(3) {
            0 => (r.next() as u8 & 0x38) | 0x06,
            1 => (r.next() as u8 & 0x38) | 0x46,
            _ => r.next() as u8 | 0xc0,
        };
        match r.below(8) {
            0..=4 => {
                for p in [0x66, 0xf2, 0xf3, 0xf0] {
                    if r.below(6) == 0 {
                        b.push(p);
                    }
                }
                if r.below(2) == 0 {
                    b.push(0x40 | r.next() as u8 & 0xe);
                }
                match r.below(6) {
                    0 | 1 => {}
                    2 | 3 => b.push(0x0f),
                    4 => b.extend([0x0f, 0x38]),
                    _ => b.extend([0x0f, 0x3a]),
                }
                b.push(r.next() as u8);
            }
            5 | 6 => {
                let x = r.next();
                b.extend([
                    0xc4,
                    (x as u8 & 0xc0) | 0x20 | (1 + r.below(3) as u8),
                    (x >> 8) as u8,
                ]);
                b.push(r.next() as u8);
            }
            _ => {
                let x = r.next();
                b.extend([
                    0x62,
                    (x as u8 & 0xd0) | 0x20 | (1 + r.below(3) as u8),
                    (x >> 8) as u8 | 4,
                    (x >> 16) as u8,
                ]);
                b.push(r.next() as u8);
            }
        }
        b.push(modrm(r));
        b.push(r.next() as u8);
        b.extend(((r.next() as i32) >> r.below(32)).to_le_bytes());
        b.extend(r.next().to_le_bytes());
        b.resize(15, 0);
        let mut d = Decoder::with_ip(64, &b, CODE, DecoderOptions::NONE);
        let i = d.decode();
        if !i.is_invalid() && allowed(&i, info) && announced.all(i.cpuid_features()) {
            b.truncate(i.len());
            return b;
        }
    }
}

fn random_area(r: &mut Random, unit: &Unit) -> XsaveArea {
    let mut a = XsaveArea::default();
    for n in 0..8 {
        let at = 32 + 16 * n;
        let x = r.value() | 1 << 63;
        a.0[at..at + 8].copy_from_slice(&x.to_le_bytes());
        let e = 0x3fff + r.below(64) as u16 - 32;
        a.0[at + 8..at + 10].copy_from_slice(&e.to_le_bytes());
    }
    for at in (160..416).step_by(8) {
        a.0[at..at + 8].copy_from_slice(&r.value().to_le_bytes());
    }
    for (n, bytes) in [(2, 256), (5, 64), (6, 512), (7, 1024)] {
        if unit.components >> n & 1 != 0 {
            let from = unit.offsets[n];
            for at in (from..from + bytes).step_by(8) {
                a.0[at..at + 8].copy_from_slice(&r.value().to_le_bytes());
            }
        }
    }
    a.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    let top = (r.below(8) as u16) << 11;
    a.0[2..4].copy_from_slice(&top.to_le_bytes());
    a.0[4] = r.next() as u8 | r.next() as u8;
    a.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    a.0[512] = unit.components as u8;
    a
}

/// What is compared of an area: no last-instruction pointers, no header.
fn visible(a: &XsaveArea, unit: &Unit) -> Vec<u8> {
    let mut out = a.0[0..5].to_vec();
    out.extend(&a.0[24..28]);
    for n in 0..8 {
        out.extend(&a.0[32 + 16 * n..42 + 16 * n]);
    }
    out.extend(&a.0[160..416]);
    for (n, bytes) in [(2, 256), (5, 64), (6, 512), (7, 1024)] {
        if unit.components >> n & 1 != 0 {
            out.extend(&a.0[unit.offsets[n]..unit.offsets[n] + bytes]);
        }
    }
    out
}

#[test]
fn random_instructions_do_what_the_host_does() {
    let (_vm, mut v) = long_mode();
    let mut unit = Unit::new().expect("unit");
    let mut info = InstructionInfoFactory::new();
    let mut r = Random(0x1234_5678_9abc_def1);
    let announced = Announced::new(&host_cpuid());
    let mut stubs = 0;
    let mut seen = std::collections::HashSet::new();
    for round in 0..60_000 {
        let code = random_instruction(&mut r, &mut info, &announced);
        let i = Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE).decode();
        let mut gprs = [0u64; 16];
        gprs.iter_mut().for_each(|x| *x = r.value());
        if r.below(2) == 0 {
            // Make divisions succeed now and then.
            gprs[gpr::RDX] = if r.below(2) == 0 {
                0
            } else {
                ((gprs[0] as i64) >> 63) as u64
            };
        }
        let flags = r.next() & rflags::ARITH;
        let mut host_data = Buffer([0; 4096]);
        host_data
            .0
            .chunks_mut(8)
            .for_each(|c| c.copy_from_slice(&r.value().to_le_bytes()));
        let before = host_data.0;
        let off = 1024 + if r.below(2) == 0 { 0 } else { r.below(64) };
        let area = random_area(&mut r, &unit);

        // The host.
        stubs += 1;
        if stubs >= crate::interp::native::unit::STUBS_MAX - 2 {
            unit.clear();
            stubs = 0;
        }
        let stub = unit.add(&code).expect("room");
        unit.call.gpr = gprs;
        unit.call.gpr[gpr::RSI] = host_data.0.as_mut_ptr() as u64 + off;
        unit.call.flags = flags;
        let mut host_area = area.clone();
        // SAFETY: `allowed` lets only computation on registers and [RSI + small] through.
        let host_fault = unsafe { unit.run(stub, component::ALL, &mut host_area) };
        let host_gpr = unit.call.gpr;
        let host_flags = unit.call.flags & rflags::ARITH;

        // The guest.
        v.vm.memory.write(DATA, &before).expect("ram");
        v.frame.cpu.rip = CODE;
        v.frame.cpu.gpr = gprs;
        v.frame.cpu.gpr[gpr::RSI] = DATA + off;
        v.frame.cpu.rflags = flags | rflags::FIXED1;
        v.frame.cpu.xsave = area.clone();
        let result = run(&mut v, &code);
        let what = || format!("round {round}: {:?} {code:02x?} off {off:#x}", i.code());
        seen.insert(i.mnemonic());
        assert_eq!(result.err().map(|e| e.vector), host_fault, "{}", what());
        let c = &v.frame.cpu;
        for n in 0..16 {
            if n != gpr::RSI && n != gpr::RSP {
                let mut want = host_gpr[n];
                if i.mnemonic() == Mnemonic::Lea && want != gprs[n] {
                    want = c.gpr[n]; // an address on either side
                }
                assert_eq!(
                    c.gpr[n],
                    want,
                    "register {n}: {} was {:#x}",
                    what(),
                    gprs[n]
                );
            }
        }
        assert_eq!(
            c.rflags & rflags::ARITH,
            host_flags,
            "flags: {} {gprs:x?}",
            what()
        );
        assert_eq!(
            c.rip,
            CODE + if host_fault.is_none() {
                code.len() as u64
            } else {
                0
            }
        );
        let mut after = [0; 4096];
        v.vm.memory.read(DATA, &mut after).expect("ram");
        assert!(after == host_data.0, "memory: {}", what());
        normalise(&mut v);
        // SAFETY: the empty stub.
        unsafe { unit.run(unit.empty_stub(), component::ALL, &mut host_area) };
        let (a, b) = (
            visible(&v.frame.cpu.xsave, &unit),
            visible(&host_area, &unit),
        );
        assert!(
            a == b,
            "vector state: {} first at {:?}",
            what(),
            a.iter().zip(&b).position(|(x, y)| x != y)
        );
    }
    assert!(seen.len() > 400, "only {} mnemonics", seen.len());
}
