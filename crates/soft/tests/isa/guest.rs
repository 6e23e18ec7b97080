//! The engines under test: a VM of the software engine whose only code is the sequence, in ring 3
//! of 64-bit mode, with the address layout of [`super::machine`].

// UNSAFETY: copies to and from guest memory through its host address.
#![allow(
    unsafe_code,
    reason = "pokes guest RAM without the bookkeeping of device writes"
)]

use std::sync::{Arc, OnceLock};

use pyrite_engine::{CpuIo, StopReason, Vcpu, VcpuControl, Vm, VmConfig};
use pyrite_mem::GuestMemory;
use pyrite_soft::{SoftOptions, SoftVcpu, SoftVm};
use pyrite_x86::cpuid::{EngineKind, HostCpuid, guest_cpuid};
use pyrite_x86::{Activity, CpuState, InterruptShadow, Segment, TableReg, XsaveArea};

use super::host;
use super::machine::{
    CODE, CODE_BYTES, Components, DATA, DATA_BYTES, END, END16, END32, End, LDT, Mode, Outcome,
    RO_BYTES, Start,
};

/// Linear address of the first 64 KiB of guest-physical memory, for ring 0.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const GDT: u64 = 0x8000;
const LDT_AT: u64 = 0x8100;
const IDT: u64 = 0x9000;
const TSS: u64 = 0xa000;
const HANDLERS: u64 = 0xb000;
const STACK_TOP: u64 = 0xd000;
const CODE_GPA: u64 = 0x20000;
const DATA_GPA: u64 = 0x30000;
const END_GPA: u64 = 0x40000;
/// Tables for it.
const END_PD: u64 = 0xe000;
const END_PT: u64 = 0xf000;
/// The port that ends a run.
pub const PORT: u8 = 0xf4;

/// Stops the vCPU at a write to [`PORT`].
#[derive(Default)]
struct Stopper(OnceLock<Arc<dyn VcpuControl>>);

impl CpuIo for Stopper {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) {
        if let Some(c) = self.0.get() {
            c.stop();
        }
    }
    fn ack_pic(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

/// One engine in one setting.
pub struct Guest {
    pub name: &'static str,
    /// Arithmetic flags are exact at every exception.
    pub exact: bool,
    vcpu: Box<SoftVcpu>,
    memory: Arc<GuestMemory>,
    components: Components,
    base: CpuState,
    _vm: Arc<SoftVm>,
}

/// The settings that the tests run.
pub fn settings() -> Vec<(&'static str, SoftOptions)> {
    let d = || SoftOptions {
        translate_at_once: true,
        ..SoftOptions::default()
    };
    vec![
        (
            "interpreter",
            SoftOptions {
                translate: false,
                ..d()
            },
        ),
        (
            "translator",
            SoftOptions {
                code_cache_bytes: 1 << 20,
                ..d()
            },
        ),
        (
            "translator, no links",
            SoftOptions {
                link: false,
                code_cache_bytes: 1 << 20,
                ..d()
            },
        ),
        (
            "translator, single instructions",
            SoftOptions {
                block_insns_max: 1,
                code_cache_bytes: 1 << 20,
                ..d()
            },
        ),
        (
            "translator, tiny cache",
            SoftOptions {
                code_cache_bytes: 64 << 10,
                ..d()
            },
        ),
        (
            "translator, no runs, short blocks",
            SoftOptions {
                share_checks: false,
                branches_max: 0,
                code_cache_bytes: 1 << 20,
                ..d()
            },
        ),
        (
            "translator, precise flags",
            SoftOptions {
                precise_flags: true,
                code_cache_bytes: 1 << 20,
                ..d()
            },
        ),
    ]
}

/// All engines.
pub fn all() -> Vec<Guest> {
    settings()
        .into_iter()
        .map(|(n, o)| Guest::new(n, o))
        .collect()
}

impl Guest {
    pub fn new(name: &'static str, options: SoftOptions) -> Guest {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let io = Arc::new(Stopper::default());
        let host = HostCpuid::read(0);
        let cpuid = guest_cpuid("host", &host, EngineKind::Soft, 1)
            .unwrap()
            .table;
        let exact = !options.translate || options.precise_flags;
        let vm = SoftVm::with_options(
            VmConfig {
                memory: Arc::clone(&memory),
                vcpus: 1,
                cpuid,
                io: Arc::<Stopper>::clone(&io),
                clock: Arc::new(|| 0),
            },
            options,
        )
        .unwrap();
        let _ = io.0.set(vm.control(0));
        layout(&memory);
        let mut vcpu = vm.take_soft_vcpu(0).unwrap();
        let base = base_state();
        vcpu.set_state(&base).unwrap();
        Guest {
            name,
            exact,
            vcpu,
            memory,
            components: Components::of_host(),
            base,
            _vm: vm,
        }
    }

    /// The guest's answer to what it may execute.
    pub fn vcpu(&mut self) -> &mut SoftVcpu {
        &mut self.vcpu
    }

    /// Puts code at `CODE + at`, as a device would.
    pub fn set_code(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= END16);
        self.memory.write(CODE_GPA + at as u64, bytes).unwrap();
    }

    fn host(&self, gpa: u64, len: usize) -> *mut u8 {
        self.memory.host_ptr(gpa, len as u64).unwrap()
    }

    /// Runs the code at `CODE + at`.
    pub fn run(&mut self, at: usize, start: &Start) -> Outcome {
        let data = self.host(DATA_GPA, DATA_BYTES + RO_BYTES);
        // SAFETY: host_ptr proved the range; no vCPU runs.
        unsafe { std::ptr::copy_nonoverlapping(start.data.as_ptr(), data, start.data.len()) };
        let c = &mut self.vcpu.frame.cpu;
        c.gpr = start.gpr;
        c.rip = start.mode.code() + at as u64;
        c.rflags = start.rflags;
        c.cr2 = 0;
        c.seg = start.mode.selectors().map(segment);
        c.seg[4].base = start.fs_base;
        c.seg[5].base = start.gs_base;
        c.xsave.0.copy_from_slice(&start.xsave.0);
        c.activity = Activity::Running;
        c.interrupt_shadow = InterruptShadow::None;
        let reason = self.vcpu.run();
        self.outcome(&reason)
    }

    fn outcome(&mut self, reason: &StopReason) -> Outcome {
        let mut data = vec![0u8; DATA_BYTES + RO_BYTES];
        let c = &self.vcpu.frame.cpu;
        // SAFETY: host_ptr proved the range; no vCPU runs.
        unsafe {
            let from = self.host(DATA_GPA, data.len());
            std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len());
        }
        let mut xsave = XsaveArea(c.xsave.0);
        self.components.normalise(&mut xsave);
        let mut out = Outcome {
            end: End::Lost,
            gpr: c.gpr,
            rip: c.rip,
            rflags: c.rflags,
            fs_base: c.seg[4].base,
            gs_base: c.seg[5].base,
            selectors: (c.seg).map(|s| if s.selector < 4 { 0 } else { s.selector }),
            xsave,
            data,
        };
        if !matches!(reason, StopReason::Requested) {
            println!("{}: {reason:?} at {:#x}", self.name, c.rip);
            return out;
        }
        if [END + 2, END32 + 2].contains(&c.rip) {
            out.end = End::Through;
            out.rip = END;
            out.selectors[1] = 0;
            return out;
        }
        let vector = c.rip.wrapping_sub(KERNEL + HANDLERS);
        if vector >= 32 * 16 || vector % 16 != 2 {
            return out;
        }
        let vector = (vector / 16) as u8;
        let word = |n: u64| {
            self.memory
                .read_u64(c.gpr[4].wrapping_sub(KERNEL).wrapping_add(8 * n))
                .unwrap_or(0)
        };
        let with_code = matches!(vector, 8 | 10..=14 | 17);
        let n = u64::from(with_code);
        out.end = End::Exception {
            vector,
            code: if with_code { word(0) as u32 } else { 0 },
            cr2: if vector == 14 { c.cr2 } else { 0 },
        };
        out.rip = word(n);
        out.selectors[1] = word(n + 1) as u16;
        out.rflags = word(n + 2);
        out.gpr[4] = word(n + 3);
        out.selectors[2] = word(n + 4) as u16;
        out
    }
}

fn layout(m: &GuestMemory) {
    let w = |gpa: u64, v: u64| m.write(gpa, &v.to_le_bytes()).unwrap();
    const P: u64 = 1;
    const W: u64 = 2;
    const U: u64 = 4;
    const NX: u64 = 1 << 63;
    let (pml4, pdpt, pd, pt) = (0x1000u64, 0x2000u64, 0x3000u64, 0x4000u64);
    let (kpdpt, kpd, kpt) = (0x5000u64, 0x6000u64, 0x7000u64);
    w(pml4, pdpt | P | W | U);
    w(pdpt, pd | P | W | U);
    w(pd + (CODE >> 21) * 8, pt | P | W | U);
    let page = |lin: u64, gpa: u64, bits: u64| w(pt + (lin >> 12 & 511) * 8, gpa | bits);
    for n in 0..(CODE_BYTES as u64 >> 12) {
        page(CODE + (n << 12), CODE_GPA + (n << 12), P | U);
    }
    for n in 0..(DATA_BYTES as u64 >> 12) {
        page(DATA + (n << 12), DATA_GPA + (n << 12), P | W | U | NX);
    }
    page(
        DATA + DATA_BYTES as u64,
        DATA_GPA + DATA_BYTES as u64,
        P | U | NX,
    );
    w(pdpt + (END >> 30) * 8, END_PD | P | W | U);
    w(END_PD + (END >> 21 & 511) * 8, END_PT | P | W | U);
    w(END_PT + (END >> 12 & 511) * 8, END_GPA | P | U);
    w(pml4 + 256 * 8, kpdpt | P | W);
    w(kpdpt, kpd | P | W);
    w(kpd, kpt | P | W);
    for n in 0..16u64 {
        w(kpt + n * 8, n << 12 | P | W);
    }
    // GDT: 10H code, 18H data, 23H code 32, 2BH data, 33H code 64, 40H TSS.
    w(GDT + 0x10, 0x00af_9b00_0000_ffff);
    w(GDT + 0x18, 0x00cf_9300_0000_ffff);
    w(GDT + 0x20, 0x00cf_fb00_0000_ffff);
    w(GDT + 0x28, 0x00cf_f300_0000_ffff);
    w(GDT + 0x30, 0x00af_fb00_0000_ffff);
    for v in 0..32u64 {
        let h = KERNEL + HANDLERS + 16 * v;
        let dpl = if v == 3 || v == 4 { 3 } else { 0 };
        w(
            IDT + 16 * v,
            h & 0xffff | 0x10 << 16 | (0x8e00 | dpl << 13) << 32 | (h >> 16 & 0xffff) << 48,
        );
        w(IDT + 16 * v + 8, h >> 32);
        m.write(HANDLERS + 16 * v, &[0xe6, PORT]).unwrap();
    }
    w(TSS + 4, KERNEL + STACK_TOP);
    m.write(TSS + 0x66, &0x68u16.to_le_bytes()).unwrap();
    let mut bitmap = [0xffu8; 0x21];
    bitmap[usize::from(PORT / 8)] &= !(1 << (PORT % 8));
    m.write(TSS + 0x68, &bitmap).unwrap();
    m.write(CODE_GPA, &[0xcc; CODE_BYTES]).unwrap();
    m.write(CODE_GPA + END16 as u64, &Mode::Seg16.way_out(0))
        .unwrap();
    m.write(END_GPA, &[0xcc; 4096]).unwrap();
    m.write(END_GPA, &[0xe6, PORT]).unwrap();
    m.write(END_GPA + (END32 - END), &[0xe6, PORT]).unwrap();
    for (n, (base, limit, access, flags)) in LDT.into_iter().enumerate() {
        let d = u64::from(limit & 0xffff)
            | (base & 0xff_ffff) << 16
            | u64::from(access) << 40
            | u64::from(limit >> 16 & 15) << 48
            | u64::from(flags) << 52
            | (base >> 24) << 56;
        w(LDT_AT + 8 * n as u64, d);
    }
}

const NULL: Segment = Segment {
    base: 0,
    limit: 0,
    attr: Segment::UNUSABLE,
    selector: 0,
    reserved: [0; 3],
};

/// A segment register as loading the selector leaves it.
fn segment(selector: u16) -> Segment {
    let (base, limit, attr) = match selector {
        0 => return NULL,
        0x23 => (0, u32::MAX, 0xc0fbu16),
        0x2b => (0, u32::MAX, 0xc0f3),
        0x33 => (0, u32::MAX, 0xa0fb),
        n => {
            let (base, limit, access, flags) = LDT[usize::from(n >> 3)];
            (base, limit, flags << 12 | access)
        }
    };
    Segment {
        base,
        limit,
        attr: u32::from(attr),
        selector,
        ..NULL
    }
}

/// Ring 3 of 64-bit mode with the selectors that the host's kernel gives its processes.
fn base_state() -> CpuState {
    use pyrite_x86::bits::{cr0, cr4, efer};
    let mut s = CpuState::reset(0, true);
    s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    s.cr4 = cr4::PAE
        | cr4::PGE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::OSXSAVE
        | cr4::FSGSBASE
        | cr4::UMIP;
    s.cr3 = 0x1000;
    s.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    s.xcr0 = u64::from(pyrite_soft::xlate::host_xsave_mask());
    s.seg = Mode::Long.selectors().map(segment);
    s.tr = Segment {
        base: KERNEL + TSS,
        limit: 0x88,
        attr: 0x8b,
        selector: 0x40,
        ..NULL
    };
    // As on the host, where a selector of the table faults if the kernel has none to give.
    s.ldtr = if host::has_descriptors() {
        Segment {
            base: KERNEL + LDT_AT,
            limit: 8 * LDT.len() as u32 - 1,
            attr: 0x82,
            selector: 0x50,
            ..NULL
        }
    } else {
        NULL
    };
    s.gdtr = TableReg {
        base: KERNEL + GDT,
        limit: 0x4f,
        reserved: 0,
    };
    s.idtr = TableReg {
        base: KERNEL + IDT,
        limit: 0x1ff,
        reserved: 0,
    };
    s.rflags = 0x202;
    s
}
