//! The bench: a VM with a GDT, an IDT, a TSS and page tables at fixed places.

use std::sync::{Arc, Mutex, Weak};

use pyrite_engine::{CpuIo, CpuidEntry, CpuidTable, StopReason, Vcpu, Vm, VmConfig};
use pyrite_mem::GuestMemory;
use pyrite_x86::bits::{cr0, cr4, efer, rflags};
use pyrite_x86::{CpuState, Segment, TableReg, gpr, sreg};

use crate::vcpu::SoftVcpu;
use crate::vm::{SoftOptions, SoftVm};

pub(super) const GDT: u64 = 0x1000;
pub(super) const TSS: u64 = 0x2000;
pub(super) const TSS2: u64 = 0x2400;
pub(super) const IDT: u64 = 0x3000;
pub(super) const CODE: u64 = 0x5000;
pub(super) const GATE_TARGET: u64 = 0x6000;
pub(super) const STUBS: u64 = 0x7000;
pub(super) const STACK: u64 = 0x9000;
pub(super) const STACK0: u64 = 0xa000;
pub(super) const IST1: u64 = 0xb008;
pub(super) const TABLES: u64 = 0x1_0000;

pub(super) const CODE0: u16 = 0x08;
pub(super) const DATA0: u16 = 0x10;
pub(super) const CODE3: u16 = 0x1b;
pub(super) const DATA3: u16 = 0x23;
pub(super) const TR: u16 = 0x28;
pub(super) const TASK2: u16 = 0x30;
pub(super) const TASK_GATE: u16 = 0x38;
pub(super) const CALL_GATE: u16 = 0x40;
pub(super) const CONFORMING: u16 = 0x48;
pub(super) const ABSENT: u16 = 0x50;
pub(super) const CODE64: u16 = 0x58;
pub(super) const READ_ONLY: u16 = 0x60;
pub(super) const TR64: u16 = 0x70;
const GDT_ENTRIES: usize = 16;

/// A segment descriptor without base; `access` is bits 47:40, `flags` bits 55:52.
pub(super) fn flat(access: u64, flags: u64) -> u64 {
    0x000f_0000_0000_ffff | access << 40 | flags << 52
}

/// A descriptor with base and byte-granular limit.
pub(super) fn segment(base: u64, limit: u64, access: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | access << 40 | (base >> 24) << 56
}

/// An interrupt, call or task gate. `count` is bits 39:32.
pub(super) fn gate(selector: u16, offset: u64, access: u64, count: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | count << 32 | access << 40 | (offset >> 16) << 48
}

#[derive(Default)]
struct Outside {
    vm: Mutex<Option<Weak<SoftVm>>>,
    writes: Mutex<Vec<(u16, u32)>>,
}

impl CpuIo for Outside {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u32, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) {
        if port == 0xf4 {
            let vm = self.vm.lock().unwrap().as_ref().and_then(Weak::upgrade);
            vm.unwrap().control(0).stop();
            return;
        }
        let mut b = [0; 4];
        b[..data.len()].copy_from_slice(data);
        self.writes
            .lock()
            .unwrap()
            .push((port, u32::from_le_bytes(b)));
    }
    fn ack_pic(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// At port F4H.
    Stopped,
    /// Triple fault.
    Triple,
}

pub(super) struct Bench {
    memory: Arc<GuestMemory>,
    outside: Arc<Outside>,
    vcpu: Box<SoftVcpu>,
    vm: Arc<SoftVm>,
    /// The state that `run` starts from and leaves.
    pub(super) cpu: CpuState,
}

/// A processor with everything that the tests look at; XSAVE is the host's.
fn cpuid() -> CpuidTable {
    let e = |leaf, eax, ebx, ecx, edx| CpuidEntry {
        leaf,
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    };
    let mut entries = vec![
        e(0, 0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
        e(1, 0x000a_0671, 0x0800, 0x1522_2001, 0x078b_bb7f),
        CpuidEntry {
            indexed: true,
            ..e(7, 0, 0x0010_0483, 0x0040_0004, 0)
        },
        e(0x8000_0000, 0x8000_0008, 0, 0, 0),
        e(0x8000_0001, 0, 0, 1, 0x2c10_0800),
        e(0x8000_0008, 0x3028, 0, 0, 0),
    ];
    for n in 0..3 {
        let r = std::arch::x86_64::__cpuid_count(0xd, n);
        let (eax, edx) = match n {
            0 => (r.eax & 7, 0),
            1 => (r.eax & 0xf, 0),
            _ => (r.eax, r.edx),
        };
        entries.push(CpuidEntry {
            leaf: 0xd,
            subleaf: n,
            indexed: true,
            eax,
            ebx: r.ebx,
            ecx: if n == 1 { 0 } else { r.ecx },
            edx,
        });
    }
    CpuidTable { entries }
}

impl Bench {
    fn new(translate: bool) -> Bench {
        let memory = Arc::new(GuestMemory::new(4 << 20).unwrap());
        let outside = Arc::new(Outside::default());
        let config = VmConfig {
            memory: Arc::clone(&memory),
            vcpus: 1,
            cpuid: cpuid(),
            io: Arc::<Outside>::clone(&outside),
            clock: Arc::new(|| 0),
        };
        let options = SoftOptions {
            translate,
            ..SoftOptions::default()
        };
        let vm = SoftVm::with_options(config, options).unwrap();
        *outside.vm.lock().unwrap() = Some(Arc::downgrade(&vm));
        let vcpu = vm.take_soft(0).unwrap();
        let mut b = Bench {
            memory,
            outside,
            vcpu,
            vm,
            cpu: CpuState::reset(0, true),
        };
        for n in 0..256u64 {
            // PUSH n; OUT F4H, AL.
            b.write(STUBS + 8 * n, &[0x6a, n as u8, 0xe6, 0xf4]);
        }
        b.gdt();
        b
    }

    fn gdt(&mut self) {
        let entries: [u64; GDT_ENTRIES] = [
            0,
            flat(0x9b, 0xc),
            flat(0x93, 0xc),
            flat(0xfb, 0xc),
            flat(0xf3, 0xc),
            segment(TSS, 0x2ff, 0x8b),
            segment(TSS2, 0x67, 0x89),
            gate(TASK2, 0, 0xe5, 0),
            gate(CODE0, GATE_TARGET, 0xec, 2),
            flat(0x9e, 0xc),
            flat(0x13, 0xc),
            flat(0x9b, 0xa),
            flat(0xf1, 0xc),
            0,
            segment(TSS, 0x2ff, 0x8b),
            0,
        ];
        for (n, e) in entries.into_iter().enumerate() {
            self.write(GDT + 8 * n as u64, &e.to_le_bytes());
        }
    }

    /// Ring 0, 32-bit, flat, paging off.
    pub(super) fn protected() -> Bench {
        Bench::protected_in(false)
    }

    fn protected_in(translate: bool) -> Bench {
        let mut b = Bench::new(translate);
        for n in 0..256 {
            let dpl = if n == 0x80 { 0xee } else { 0x8e };
            b.write(
                IDT + 8 * n,
                &gate(CODE0, STUBS + 8 * n, dpl, 0).to_le_bytes(),
            );
        }
        b.write(TSS + 4, &(STACK0 as u32).to_le_bytes());
        b.write(TSS + 8, &u32::from(DATA0).to_le_bytes());
        // The I/O bit map: ports 0-7 free, the rest not; the redirection map lies below it.
        b.write(TSS + 102, &0x100u16.to_le_bytes());
        b.write(TSS + 0x100, &[0u8]);
        b.write(TSS + 0x101, &[0xff; 0x1ff]);
        let c = &mut b.cpu;
        c.cr0 = cr0::PE | cr0::ET | cr0::NE;
        c.seg = [flat_register(DATA0, 0xc093); 6];
        c.seg[sreg::CS] = flat_register(CODE0, 0xc09b);
        c.tr = Segment {
            base: TSS,
            limit: 0x2ff,
            attr: 0x8b,
            selector: TR,
            reserved: [0; 3],
        };
        c.ldtr = super::super::seg::null_segment(0, 0);
        c.gdtr = TableReg {
            base: GDT,
            limit: 8 * GDT_ENTRIES as u32 - 1,
            reserved: 0,
        };
        c.idtr = TableReg {
            base: IDT,
            limit: 0x7ff,
            reserved: 0,
        };
        c.gpr[gpr::RSP] = STACK;
        c.rip = CODE;
        b
    }

    /// Ring 0, 64-bit, identity-mapped.
    pub(super) fn long() -> Bench {
        Bench::long_in(false)
    }

    /// The same, in the interpreter or in the translator.
    pub(super) fn long_in(translate: bool) -> Bench {
        let mut b = Bench::protected_in(translate);
        for n in 0..128u64 {
            let access = if n == 0x60 { 0xee } else { 0x8e };
            let ist = u64::from(n == 0x61);
            let low = gate(CODE64, STUBS + 8 * n, access, ist);
            b.write(IDT + 16 * n, &low.to_le_bytes());
            b.write(IDT + 16 * n + 8, &[0; 8]);
        }
        b.write(TSS, &[0; 0x68]);
        b.write(TSS + 4, &STACK0.to_le_bytes());
        b.write(TSS + 0x24, &IST1.to_le_bytes());
        b.write(TSS + 102, &0x100u16.to_le_bytes());
        b.write(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
        b.write(TABLES + 0x1000, &((TABLES + 0x2000) | 7).to_le_bytes());
        for n in 0..2u64 {
            b.write(TABLES + 0x2000 + 8 * n, &(n << 21 | 0x87).to_le_bytes());
        }
        let c = &mut b.cpu;
        c.cr0 |= cr0::PG;
        c.cr3 = TABLES;
        c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE;
        c.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        c.seg[sreg::CS] = flat_register(CODE64, 0xa09b);
        c.tr.selector = TR64;
        b
    }

    /// Real mode, everything at 0.
    pub(super) fn real() -> Bench {
        let mut b = Bench::new(false);
        for n in 0..256u64 {
            let entry = (STUBS + 8 * n) as u32;
            b.write(4 * n, &entry.to_le_bytes());
        }
        b.cpu.seg = [Segment::real(0, 0x93); 6];
        b.cpu.cr0 = cr0::ET;
        b.cpu.gpr[gpr::RSP] = STACK;
        b.cpu.rip = CODE;
        b
    }

    /// Goes to ring 3 (32-bit).
    pub(super) fn user(mut self) -> Bench {
        let long = self.cpu.efer & efer::LMA != 0;
        let c = &mut self.cpu;
        c.seg = [flat_register(DATA3, 0xc0f3); 6];
        c.seg[sreg::CS] = if long {
            flat_register(CODE64 | 3, 0xa0fb)
        } else {
            flat_register(CODE3, 0xc0fb)
        };
        self
    }

    /// The vCPU in the bench's state, to be stepped; the VM must be kept.
    pub(super) fn into_vcpu(mut self) -> (Arc<SoftVm>, Box<SoftVcpu>) {
        self.vcpu.set_state(&self.cpu).unwrap();
        (self.vm, self.vcpu)
    }

    pub(super) fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.memory.write(gpa, bytes).unwrap();
    }

    pub(super) fn read32(&self, gpa: u64) -> u32 {
        self.memory.read_u32(gpa).unwrap()
    }

    pub(super) fn read64(&self, gpa: u64) -> u64 {
        self.memory.read_u64(gpa).unwrap()
    }

    /// Values written to ports other than F4H.
    pub(super) fn port_writes(&self) -> Vec<(u16, u32)> {
        self.outside.writes.lock().unwrap().clone()
    }

    /// Runs `code` at CODE, followed by OUT F4H, AL.
    pub(super) fn run(&mut self, code: &[u8]) -> End {
        self.write(CODE, code);
        self.write(CODE + code.len() as u64, &[0xe6, 0xf4]);
        self.resume()
    }

    pub(super) fn resume(&mut self) -> End {
        self.vcpu.set_state(&self.cpu).unwrap();
        let end = match self.vcpu.run() {
            StopReason::Requested => End::Stopped,
            StopReason::TripleFault => End::Triple,
            other => panic!("{other:?}"),
        };
        self.cpu = self.vcpu.state().unwrap();
        end
    }

    /// Runs `code`, which must end in a stub: the vector and what lies above it on the stack.
    pub(super) fn frame(&mut self, code: &[u8]) -> Vec<u32> {
        assert_eq!(self.run(code), End::Stopped);
        self.stack32(10)
    }

    pub(super) fn stack32(&self, count: u64) -> Vec<u32> {
        let sp = self.cpu.gpr[gpr::RSP];
        (0..count).map(|n| self.read32(sp + 4 * n)).collect()
    }

    pub(super) fn stack64(&self, count: u64) -> Vec<u64> {
        let sp = self.cpu.gpr[gpr::RSP];
        (0..count).map(|n| self.read64(sp + 8 * n)).collect()
    }

    /// Vector and error code of the exception that `code` raises.
    pub(super) fn fault(&mut self, code: &[u8]) -> (u32, u32) {
        let f = self.frame(code);
        (f[0], f[1])
    }

    /// True if `code` runs to its end at CPL 0 or 3 as it began.
    pub(super) fn passes(&mut self, code: &[u8]) -> bool {
        self.run(code) == End::Stopped && self.cpu.rip == CODE + code.len() as u64 + 2
    }

    pub(super) fn set_iopl(&mut self, iopl: u64) {
        self.cpu.rflags = self.cpu.rflags & !rflags::IOPL | iopl << 12;
    }
}

pub(super) fn flat_register(selector: u16, attr: u32) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        attr,
        selector,
        reserved: [0; 3],
    }
}
