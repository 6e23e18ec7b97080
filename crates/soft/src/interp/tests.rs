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
    let leaves = [
        (0, 0),
        (1, 0),
        (7, 0),
        (7, 1),
        (0x8000_0001, 0),
        (0x8000_0008, 0),
    ];
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
    // The guest of this test runs in ring 0, where LSS takes a null selector.
    let system = crate::sys::handles(m);
    if !known
        || skip
        || system
        || i.is_vsib()
        || i.is_privileged()
        || i.flow_control() != FlowControl::Next
    {
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

fn fault(v: &mut SoftVcpu, code: &[u8]) -> u8 {
    let rip = v.frame.cpu.rip;
    let e = run(v, code).expect_err("a fault");
    assert_eq!(v.frame.cpu.rip, rip, "a fault leaves RIP");
    e.vector
}

#[test]
fn decimal_adjustments() {
    let (_vm, mut v) = real_mode();
    let mut go = |code: &[u8], ax: u64, flags: u64| {
        v.frame.cpu.rip = 0;
        v.frame.cpu.gpr[gpr::RAX] = ax;
        v.frame.cpu.rflags = rflags::FIXED1 | flags;
        run(&mut v, code).map(|()| (v.frame.cpu.gpr[gpr::RAX], v.frame.cpu.rflags))
    };
    let (ax, f) = go(&[0x27], 0xae, 0).expect("daa");
    assert_eq!((ax, f & rflags::CF), (0x14, rflags::CF));
    assert_eq!(go(&[0x2f], 0x47, rflags::AF).expect("das").0, 0x41);
    assert_eq!(go(&[0x37], 0x00f, 0).expect("aaa").0, 0x105);
    assert_eq!(go(&[0x3f], 0x20f, 0).expect("aas").0, 0x109);
    assert_eq!(go(&[0xd4, 10], 97, 0).expect("aam").0, 0x907);
    assert_eq!(go(&[0xd5, 10], 0x907, 0).expect("aad").0, 97);
    assert_eq!(go(&[0xd4, 0], 97, 0).expect_err("aam 0").vector, vec_no::DE);
    assert_eq!(go(&[0xd6], 0, rflags::CF).expect("salc").0, 0xff);
}

#[test]
fn sixteen_bit_stack_and_branches() {
    let (_vm, mut v) = real_mode();
    v.frame.cpu.gpr[gpr::RSP] = 0xffff_0000;
    run(&mut v, &[0x68, 0x34, 0x12]).expect("push imm16");
    assert_eq!(v.frame.cpu.gpr[gpr::RSP], 0xffff_fffe);
    run(&mut v, &[0x5b]).expect("pop bx");
    assert_eq!(
        (v.frame.cpu.gpr[gpr::RBX], v.frame.cpu.gpr[gpr::RSP]),
        (0x1234, 0xffff_0000)
    );
    v.frame.cpu.rip = 0x100;
    run(&mut v, &[0xe8, 0xfd, 0xfe]).expect("call back to 0");
    assert_eq!(v.frame.cpu.rip, 0);
    run(&mut v, &[0xc2, 2, 0]).expect("ret 2");
    assert_eq!(
        (v.frame.cpu.rip, v.frame.cpu.gpr[gpr::RSP]),
        (0x103, 0xffff_0002)
    );
    // LOOP counts CX alone.
    v.frame.cpu.gpr[gpr::RCX] = 0x5_0000;
    run(&mut v, &[0xe2, 0xfe]).expect("loop");
    assert_eq!(
        (v.frame.cpu.rip, v.frame.cpu.gpr[gpr::RCX]),
        (0x103, 0x5_ffff)
    );
    // A target beyond the limit faults, with the counter as it was.
    v.frame.cpu.seg[sreg::CS].limit = 0x110;
    assert_eq!(fault(&mut v, &[0xe2, 0x20]), vec_no::GP);
    assert_eq!(v.frame.cpu.gpr[gpr::RCX], 0x5_ffff);
    // A word at FFFFH crosses the segment's end.
    v.frame.cpu.gpr[gpr::RBX] = 0xffff;
    assert_eq!(fault(&mut v, &[0x8b, 0x07]), vec_no::GP);
    // PUSHA and POPA keep everything but SP.
    v.frame.cpu.seg[sreg::CS].limit = 0xffff;
    let before = v.frame.cpu.gpr;
    run(&mut v, &[0x60]).expect("pusha");
    assert_eq!(v.frame.cpu.gpr[gpr::RSP], 0xffff_fff2);
    run(&mut v, &[0x61]).expect("popa");
    assert_eq!(v.frame.cpu.gpr, before);
}

#[test]
fn enter_nests_and_rolls_back() {
    let (_vm, mut v) = protected_32();
    v.frame.cpu.gpr[gpr::RSP] = DATA + 0x100;
    v.frame.cpu.gpr[gpr::RBP] = DATA + 0x200;
    v.vm.memory
        .write(DATA + 0x1fc, &0xabcdu32.to_le_bytes())
        .expect("ram");
    run(&mut v, &[0xc8, 0x10, 0, 2]).expect("enter 16, 2");
    assert_eq!(v.frame.cpu.gpr[gpr::RBP], DATA + 0xfc);
    assert_eq!(v.frame.cpu.gpr[gpr::RSP], DATA + 0x100 - 12 - 16);
    assert_eq!(v.vm.memory.read_u32(DATA + 0xf8).expect("ram"), 0xabcd);
    assert_eq!(
        v.vm.memory.read_u32(DATA + 0xf4).expect("ram"),
        DATA as u32 + 0xfc
    );
    run(&mut v, &[0xc9]).expect("leave");
    assert_eq!(v.frame.cpu.gpr[gpr::RBP], DATA + 0x200);
    v.frame.cpu.seg[sreg::SS].limit = DATA as u32;
    let rsp = v.frame.cpu.gpr[gpr::RSP];
    assert_eq!(fault(&mut v, &[0xc8, 0x10, 0, 0]), vec_no::SS);
    assert_eq!(v.frame.cpu.gpr[gpr::RSP], rsp);
}

#[test]
fn illegal_encodings() {
    let (_vm, mut v) = long_mode();
    assert_eq!(
        fault(&mut v, &[0xf0, 0x01, 0xc0]),
        vec_no::UD,
        "lock add eax, eax"
    );
    assert_eq!(fault(&mut v, &[0xf0, 0x8b, 0x06]), vec_no::UD, "lock mov");
    assert_eq!(fault(&mut v, &[0x66; 16]), vec_no::GP, "too long");
    assert_eq!(fault(&mut v, &[0x0f, 0x0b]), vec_no::UD);
    v.frame.cpu.rip = 0x8000_0000_0000;
    let e = match one(&mut v) {
        Err(Trap::Exception(e)) => e.vector,
        r => panic!("{r:?}"),
    };
    assert_eq!(e, vec_no::GP, "RIP not canonical");
    // An instruction that reaches into a page that is not there.
    v.frame.cpu.rip = 0x1f_fffe;
    let e = run(&mut v, &[0x48, 0xb8]).expect_err("page fault");
    assert_eq!((e.vector, e.payload), (vec_no::PF, 0x20_0000));
    v.frame.cpu.rip = 0x1f_fffe;
    run(&mut v, &[0x66, 0x90]).expect("ends at the page's end");
}

#[test]
fn self_modifying_code_is_seen() {
    let (_vm, mut v) = long_mode();
    run(&mut v, &[0xb0, 1]).expect("mov al, 1");
    v.frame.cpu.rip = CODE;
    run(&mut v, &[0xb0, 2]).expect("mov al, 2");
    assert_eq!(v.frame.cpu.gpr[gpr::RAX], 2);
}

#[test]
fn locked_and_wide_exchange() {
    let (_vm, mut v) = long_mode();
    v.frame.cpu.gpr[gpr::RSI] = DATA;
    v.frame.cpu.gpr[gpr::RAX] = 5;
    run(&mut v, &[0xf0, 0x48, 0x0f, 0xc1, 0x06]).expect("lock xadd");
    run(&mut v, &[0xf0, 0x48, 0x0f, 0xc1, 0x06]).expect("lock xadd");
    assert_eq!(v.vm.memory.read_u64(DATA).expect("ram"), 5);
    assert_eq!(v.frame.cpu.gpr[gpr::RAX], 5);
    v.frame.cpu.gpr[gpr::RBX] = 7;
    v.frame.cpu.gpr[gpr::RCX] = 8;
    run(&mut v, &[0xf0, 0x48, 0x0f, 0xc7, 0x0e]).expect("lock cmpxchg16b");
    assert_eq!(v.frame.cpu.rflags & rflags::ZF, rflags::ZF);
    assert_eq!(v.vm.memory.read_u64(DATA).expect("ram"), 7);
    assert_eq!(v.vm.memory.read_u64(DATA + 8).expect("ram"), 8);
    v.frame.cpu.gpr[gpr::RSI] = DATA + 8;
    assert_eq!(
        fault(&mut v, &[0x48, 0x0f, 0xc7, 0x0e]),
        vec_no::GP,
        "misaligned"
    );
    // BTS with a negative bit index reaches below its base.
    v.frame.cpu.gpr[gpr::RCX] = -3i64 as u64;
    run(&mut v, &[0xf0, 0x48, 0x0f, 0xab, 0x0e]).expect("lock bts");
    assert_eq!(v.vm.memory.read_u64(DATA).expect("ram"), 7 | 1 << 61);
}

#[test]
fn strings() {
    let (_vm, mut v) = long_mode();
    let text: Vec<u8> = (0..20_000u32).map(|n| (n * 7 + n / 256) as u8).collect();
    v.vm.memory.write(DATA, &text).expect("ram");
    let c = &mut v.frame.cpu;
    (c.gpr[gpr::RSI], c.gpr[gpr::RDI], c.gpr[gpr::RCX]) = (DATA + 3, DATA + 0x8001, 15_000);
    while v.frame.cpu.gpr[gpr::RCX] != 0 {
        v.frame.cpu.rip = CODE;
        run(&mut v, &[0xf3, 0xa4]).expect("rep movsb");
    }
    assert_eq!(v.frame.cpu.rip, CODE + 2);
    let mut out = vec![0; 15_000];
    v.vm.memory.read(DATA + 0x8001, &mut out).expect("ram");
    assert!(out == text[3..15_003]);
    // A target just above the source repeats its first bytes.
    let c = &mut v.frame.cpu;
    (c.gpr[gpr::RSI], c.gpr[gpr::RDI], c.gpr[gpr::RCX], c.rip) = (DATA, DATA + 2, 100, CODE);
    run(&mut v, &[0xf3, 0xa4]).expect("rep movsb");
    v.vm.memory.read(DATA, &mut out[..102]).expect("ram");
    assert!((0..102).all(|n| out[n] == text[n % 2]));
    // STOS over the end of memory: the fault leaves the registers at the element.
    let c = &mut v.frame.cpu;
    (c.gpr[gpr::RDI], c.gpr[gpr::RCX], c.gpr[gpr::RAX], c.rip) =
        (LAST_PAGE + 0xff0, 9, 0x55aa, CODE);
    assert_eq!(fault(&mut v, &[0xf3, 0xab]), vec_no::PF);
    assert_eq!(
        (v.frame.cpu.gpr[gpr::RDI], v.frame.cpu.gpr[gpr::RCX]),
        (0x20_0000, 5)
    );
    // SCAS stops behind the match; DF runs down; 32-bit addresses are truncated.
    v.vm.memory.write(DATA, b"hello").expect("ram");
    let c = &mut v.frame.cpu;
    (c.gpr[gpr::RDI], c.gpr[gpr::RCX], c.gpr[gpr::RAX]) = (DATA | 1 << 40, 9, u64::from(b'l'));
    run(&mut v, &[0xf2, 0x67, 0xae]).expect("repne scasb");
    assert_eq!(
        (v.frame.cpu.gpr[gpr::RDI], v.frame.cpu.gpr[gpr::RCX]),
        (DATA + 3, 6)
    );
    v.frame.cpu.rflags |= rflags::DF;
    let c = &mut v.frame.cpu;
    (c.gpr[gpr::RSI], c.gpr[gpr::RCX]) = (DATA + 4, 2);
    run(&mut v, &[0xf3, 0xac]).expect("rep lodsb");
    assert_eq!(
        (v.frame.cpu.gpr[gpr::RSI], v.frame.cpu.gpr[gpr::RAX] as u8),
        (DATA + 2, b'l')
    );
}

#[test]
fn state_checks_of_vector_instructions() {
    const ADDPS: [u8; 3] = [0x0f, 0x58, 0xc1];
    let (_vm, mut v) = long_mode();
    v.frame.cpu.cr0 |= cr0::TS;
    assert_eq!(fault(&mut v, &ADDPS), vec_no::NM);
    assert_eq!(fault(&mut v, &[0xd9, 0xe8]), vec_no::NM, "fld1");
    v.frame.cpu.cr0 = v.frame.cpu.cr0 & !cr0::TS | cr0::EM;
    assert_eq!(fault(&mut v, &ADDPS), vec_no::UD);
    assert_eq!(fault(&mut v, &[0xd9, 0xe8]), vec_no::NM);
    v.frame.cpu.cr0 &= !cr0::EM;
    v.frame.cpu.cr4 &= !cr4::OSFXSR;
    assert_eq!(fault(&mut v, &ADDPS), vec_no::UD);
    v.frame.cpu.cr4 |= cr4::OSFXSR;
    run(&mut v, &ADDPS).expect("enabled");
    v.frame.cpu.xcr0 = 3;
    assert_eq!(
        fault(&mut v, &[0xc5, 0xf0, 0x58, 0xc2]),
        vec_no::UD,
        "vaddps"
    );
    run(&mut v, &[0xc4, 0xe2, 0x70, 0xf2, 0xc2]).expect("andn needs no XCR0");
}

#[test]
fn unmasked_exceptions_become_the_guests() {
    let (_vm, mut v) = long_mode();
    // 1/0 with the divide exception unmasked in MXCSR.
    v.frame.cpu.xsave.0[24..28].copy_from_slice(&0x1d80u32.to_le_bytes());
    normalise(&mut v);
    let mut one_ps = [0; 64];
    one_ps[..4].copy_from_slice(&1f32.to_le_bytes());
    set_vector(&mut v, 0, &one_ps);
    set_vector(&mut v, 1, &[0; 64]);
    assert_eq!(
        fault(&mut v, &[0xf3, 0x0f, 0x5e, 0xc1]),
        vec_no::XM,
        "divss"
    );
    assert_eq!(v.frame.cpu.xsave.0[24] & 4, 4, "MXCSR.ZE");
    assert_eq!(vector(&v, 0), one_ps);
    v.frame.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(fault(&mut v, &[0xf3, 0x0f, 0x5e, 0xc1]), vec_no::UD);
    // x87: the exception waits for the next instruction.
    v.frame.cpu.gpr[gpr::RSI] = DATA;
    v.vm.memory
        .write(DATA, &0x037bu16.to_le_bytes())
        .expect("ram");
    for code in [
        &[0xdb, 0xe3][..],
        &[0xd9, 0x2e],
        &[0xd9, 0xe8],
        &[0xd9, 0xee],
        &[0xde, 0xf9],
    ] {
        run(&mut v, code).expect("fninit, fldcw, fld1, fldz, fdivp");
    }
    let fdivp = v.frame.cpu.rip - 2;
    assert_eq!(fault(&mut v, &[0xd9, 0xe8]), vec_no::MF);
    assert_eq!(fault(&mut v, &[0x9b]), vec_no::MF);
    // The environment tells which instruction it was.
    run(&mut v, &[0xd9, 0x76, 0x10]).expect("fnstenv");
    assert_eq!(
        u64::from(v.vm.memory.read_u32(DATA + 0x10 + 12).expect("ram")),
        fdivp
    );
    assert_eq!(
        v.vm.memory.read_u32(DATA + 0x14).expect("ram") & 0x84,
        0x84,
        "FSW.ES, ZE"
    );
    run(&mut v, &[0xdb, 0xe2]).expect("fnclex");
    run(&mut v, &[0xd9, 0xe8]).expect("nothing pending");
}

#[test]
fn x87_save_and_restore_round_trip() {
    for size in [2, 4] {
        let (_vm, mut v) = protected_32();
        v.frame.cpu.gpr[gpr::RSI] = DATA;
        for code in [
            &[0xdb, 0xe3][..],
            &[0xd9, 0xe8],
            &[0xd9, 0xeb],
            &[0xd9, 0xee],
        ] {
            run(&mut v, code).expect("fninit, fld1, fldpi, fldz");
        }
        normalise(&mut v);
        let before = v.frame.cpu.xsave.clone();
        let prefix: &[u8] = if size == 2 { &[0x66] } else { &[] };
        run(&mut v, &[prefix, &[0xdd, 0x36]].concat()).expect("fnsave");
        let tags = 2 * size;
        let w = v.vm.memory.read_u32(DATA + tags).expect("ram") & 0xffff;
        assert_eq!(w, 0b00_00_01_11_11_11_11_11, "zero, pi, one from the top");
        assert_eq!(v.frame.cpu.xsave.0[4], 0, "all empty");
        run(&mut v, &[prefix, &[0xdd, 0x26]].concat()).expect("frstor");
        let a = &v.frame.cpu.xsave.0;
        assert!(a[0..5] == before.0[0..5] && a[32..160] == before.0[32..160]);
    }
}

#[test]
fn lanes_that_are_off_do_not_fault() {
    let (_vm, mut v) = long_mode();
    let host = Unit::new().expect("unit").components;
    v.vm.memory
        .write(0x20_0000 - 8, &[1, 2, 3, 4, 5, 6, 7, 8])
        .expect("ram");
    v.frame.cpu.gpr[gpr::RSI] = 0x20_0000 - 8;
    if host & component::AVX != 0 {
        // vmaskmovps xmm0, xmm1, [rsi]: two of four elements are there.
        normalise(&mut v);
        let mut m = [0; 64];
        m[..8].fill(0x80);
        set_vector(&mut v, 1, &m);
        run(&mut v, &[0xc4, 0xe2, 0x71, 0x2c, 0x06]).expect("masked load");
        normalise(&mut v);
        assert_eq!(
            vector(&v, 0)[..16],
            [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        run(&mut v, &[0xc4, 0xe2, 0x71, 0x2e, 0x0e]).expect("masked store");
        assert_eq!(
            v.vm.memory.read_u64(0x20_0000 - 8).expect("ram"),
            0x8080_8080_8080_8080
        );
        m[..12].fill(0x80);
        set_vector(&mut v, 1, &m);
        assert_eq!(fault(&mut v, &[0xc4, 0xe2, 0x71, 0x2c, 0x06]), vec_no::PF);
    }
    if host & component::AVX512 == component::AVX512 {
        normalise(&mut v);
        set_opmask(&mut v, Register::K1, 3);
        // vmovdqu32 zmm2{k1}{z}, [rsi]
        run(&mut v, &[0x62, 0xf1, 0x7e, 0xc9, 0x6f, 0x16]).expect("masked load");
        normalise(&mut v);
        assert_eq!(
            vector(&v, 2)[..9],
            [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0]
        );
        set_opmask(&mut v, Register::K1, 7);
        assert_eq!(
            fault(&mut v, &[0x62, 0xf1, 0x7e, 0xc9, 0x6f, 0x16]),
            vec_no::PF
        );
        // vpgatherdd zmm3{k1}, [rsi + zmm4]: the third element faults, two are done.
        let mut index = [0; 64];
        index[4..8].copy_from_slice(&(-16i32).to_le_bytes());
        index[8..12].copy_from_slice(&4096i32.to_le_bytes());
        set_vector(&mut v, 4, &index);
        assert_eq!(
            fault(&mut v, &[0x62, 0xf2, 0x7d, 0x49, 0x90, 0x1c, 0x26]),
            vec_no::PF
        );
        normalise(&mut v);
        assert_eq!(opmask(&v, Register::K1), 4);
        assert_eq!(vector(&v, 3)[..8], [0x80, 0x80, 0x80, 0x80, 0, 0, 0, 0]);
    }
}

#[test]
fn narrow_rdseed_gives_random_bits_and_keeps_the_rest() {
    let (_vm, mut v) = long_mode();
    if !crate::sys::cpuid::feature(&v, 7, crate::sys::cpuid::Reg::Ebx, 18) {
        return;
    }
    // RDSEED may fail now and then, and may be zero once in a while, but not always.
    let mut tries = |code: &[u8], keep: u64| {
        let mut seen = 0u64;
        for _ in 0..10_000 {
            v.frame.cpu.gpr[gpr::RBX] = u64::MAX;
            run(&mut v, code).expect("rdseed");
            let value = v.frame.cpu.gpr[gpr::RBX];
            if v.frame.cpu.rflags & rflags::CF != 0 {
                assert_eq!(
                    value & !keep,
                    if keep >> 16 == 0 { u64::MAX << 16 } else { 0 }
                );
                seen |= value & keep;
                if seen == keep {
                    return;
                }
            }
        }
        panic!("bits that are never set: {:#x}", keep & !seen);
    };
    tries(&[0x66, 0x0f, 0xc7, 0xfb], 0xffff);
    tries(&[0x0f, 0xc7, 0xfb], 0xffff_ffff);
}
