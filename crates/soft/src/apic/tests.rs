use std::sync::atomic::AtomicU64;
use std::time::Duration;

use pyrite_engine::{CpuIo, CpuidTable, VmConfig};
use pyrite_mem::GuestMemory;
use pyrite_x86::CpuState;
use pyrite_x86::bits::msr as number;

use super::regs::base;
use super::*;
use crate::vm::SoftOptions;

/// Records which vectors were ended.
#[derive(Default)]
struct Outside {
    ended: Mutex<Vec<u8>>,
}

impl CpuIo for Outside {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) {}
    fn ack_pic(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, vector: u8) {
        lock(&self.ended).push(vector);
    }
}

/// A VM whose clock is stepped by hand. No timer thread looks at it unless asked to.
struct Bench {
    vm: Arc<VmShared>,
    outside: Arc<Outside>,
    now: Arc<AtomicU64>,
}

impl Bench {
    fn new(vcpus: u32) -> Bench {
        let outside = Arc::new(Outside::default());
        let now = Arc::new(AtomicU64::new(1_000));
        let clock = Arc::clone(&now);
        let io: Arc<dyn CpuIo> = Arc::<Outside>::clone(&outside);
        let vm = VmShared::new(
            VmConfig {
                memory: Arc::new(GuestMemory::new(1 << 20).unwrap()),
                vcpus,
                cpuid: CpuidTable::default(),
                io,
                clock: Arc::new(move || clock.load(Ordering::SeqCst)),
            },
            SoftOptions::default(),
        )
        .unwrap();
        let bench = Bench { vm, outside, now };
        for n in 0..vcpus {
            let s = CpuState::reset(n, n == 0);
            bench.apic(n).restore(&s.apic, s.msrs.apic_base);
            bench.write(n, reg::SVR, 0x1ff);
        }
        // The TSC counts while a vCPU runs.
        vcpu_starts(&bench.vm);
        bench
    }
    fn apic(&self, n: u32) -> &Apic {
        &self.vm.vcpus[n as usize].apic
    }
    fn write(&self, n: u32, r: usize, value: u32) {
        mmio_write(&self.vm, n, (r * 16) as u64, &value.to_le_bytes());
    }
    fn read(&self, n: u32, r: usize) -> u32 {
        let mut b = [0; 4];
        mmio_read(&self.vm, n, (r * 16) as u64, &mut b);
        u32::from_le_bytes(b)
    }
    fn wrmsr(&self, n: u32, r: usize, value: u64) -> Result<(), ()> {
        msr_write(&self.vm, n, number::X2APIC_FIRST + r as u32, value).unwrap()
    }
    fn rdmsr(&self, n: u32, r: usize) -> Result<u64, ()> {
        msr_read(&self.vm, n, number::X2APIC_FIRST + r as u32).unwrap()
    }
    fn x2apic(&self) {
        for n in 0..self.vm.vcpus.len() as u32 {
            let old = msr_read(&self.vm, n, number::IA32_APIC_BASE)
                .unwrap()
                .unwrap();
            set_apic_base(&self.vm, n, old | base::EXTD).unwrap();
        }
    }
    fn ack(&self, n: u32) -> Option<u8> {
        self.apic(n).acknowledge()
    }
    /// Takes the events of a vCPU.
    fn events(&self, n: u32) -> u32 {
        self.vm.vcpus[n as usize].events.swap(0, Ordering::SeqCst)
    }
    fn step(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::SeqCst);
        for n in 0..self.vm.vcpus.len() as u32 {
            poll_timer(&self.vm, n);
        }
    }
    fn ended(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.outside.ended))
    }
}

/// MSI address for a destination; `logical` sets the mode, the redirection hint stays clear.
fn msi(dest: u32, logical: bool) -> u64 {
    0xfee0_0000 | u64::from(dest) << 12 | u64::from(logical) << 2
}

const LEVEL: u32 = 1 << 15;

#[test]
fn interrupts_nest_by_priority_class_and_end_in_order() {
    let b = Bench::new(1);
    deliver_msi(&b.vm, msi(0, false), 0x31);
    assert_ne!(b.events(0) & event::INTERRUPT, 0);
    assert_eq!(b.ack(0), Some(0x31));
    assert_eq!(b.read(0, reg::PPR), 0x30);
    // The same class waits, and does not even disturb the vCPU.
    b.events(0);
    deliver_msi(&b.vm, msi(0, false), 0x3f);
    assert_eq!(b.events(0), 0);
    assert_eq!(b.ack(0), None);
    deliver_msi(&b.vm, msi(0, false), 0x51);
    assert_eq!(b.ack(0), Some(0x51));
    b.write(0, reg::EOI, 0);
    assert_eq!(b.ack(0), None);
    b.events(0);
    b.write(0, reg::EOI, 0);
    assert_ne!(
        b.events(0) & event::INTERRUPT,
        0,
        "the waiting one wakes the vCPU"
    );
    assert_eq!(b.ack(0), Some(0x3f));
    assert_eq!(b.ended(), [], "edges are not told to the IO-APIC");
}

#[test]
fn task_priority_holds_interrupts_back() {
    let b = Bench::new(1);
    set_cr8(&b.vm, 0, 5);
    assert_eq!(b.read(0, reg::TPR), 0x50);
    deliver_msi(&b.vm, msi(0, false), 0x5f);
    assert_eq!((b.events(0), b.ack(0)), (0, None));
    b.write(0, reg::TPR, 0x4f);
    assert_eq!(b.apic(0).cr8(), 4);
    assert_ne!(b.events(0) & event::INTERRUPT, 0);
    assert_eq!(b.ack(0), Some(0x5f));
}

#[test]
fn level_interrupts_end_at_the_io_apic_unless_suppressed() {
    let b = Bench::new(1);
    deliver_msi(&b.vm, msi(0, false), 0x41 | LEVEL);
    assert_eq!(b.ack(0), Some(0x41));
    assert_eq!(b.read(0, reg::TMR0 + 2), 2);
    b.write(0, reg::EOI, 0);
    assert_eq!(b.ended(), [0x41]);
    b.write(0, reg::EOI, 0);
    assert_eq!(b.ended(), [], "nothing in service, nothing to end");
    // Version bit 24 makes SVR bit 12 exist.
    b.write(0, reg::SVR, 0x11ff);
    assert_eq!(b.read(0, reg::SVR), 0x1ff);
    let mut s = b.apic(0).save();
    s.regs[reg::VERSION] |= 1 << 24;
    b.apic(0).restore(&s, 0xfee0_0900);
    b.write(0, reg::SVR, 0x11ff);
    assert_eq!(b.read(0, reg::SVR), 0x11ff);
    deliver_msi(&b.vm, msi(0, false), 0x41 | LEVEL);
    assert_eq!(b.ack(0), Some(0x41));
    b.write(0, reg::EOI, 0);
    assert_eq!(b.ended(), []);
}

#[test]
fn an_edge_after_a_level_clears_tmr() {
    let b = Bench::new(1);
    deliver_msi(&b.vm, msi(0, false), 0x41 | LEVEL);
    b.ack(0);
    b.write(0, reg::EOI, 0);
    deliver_msi(&b.vm, msi(0, false), 0x41);
    assert_eq!(b.read(0, reg::TMR0 + 2), 0);
}

#[test]
fn ipis_reach_whom_the_shorthand_or_destination_names() {
    let b = Bench::new(3);
    let icr = |from, high: u32, low| {
        b.write(from, reg::ICR_HIGH, high << 24);
        b.write(from, reg::ICR_LOW, low);
    };
    let got = || [b.ack(0), b.ack(1), b.ack(2)];
    icr(0, 2, 0x41);
    assert_eq!(got(), [None, None, Some(0x41)]);
    icr(1, 0, 0x51 | 1 << 18);
    assert_eq!(got(), [None, Some(0x51), None]);
    icr(1, 0, 0x61 | 2 << 18);
    assert_eq!(got(), [Some(0x61); 3]);
    icr(1, 0, 0x71 | 3 << 18);
    assert_eq!(got(), [Some(0x71), None, Some(0x71)]);
    icr(1, 0xff, 0x81);
    assert_eq!(got(), [Some(0x81); 3], "physical broadcast");
    icr(0, 77, 0x91);
    assert_eq!(got(), [None; 3], "nobody has that id");
    assert_eq!(b.read(1, reg::ICR_LOW), 0x81);
    assert_eq!(b.read(1, reg::ICR_HIGH), 0xff00_0000);
}

#[test]
fn logical_destinations_flat_and_cluster() {
    let b = Bench::new(3);
    let got = || [b.ack(0), b.ack(1), b.ack(2)];
    for n in 0..3 {
        b.write(n, reg::LDR, 1 << (24 + n));
    }
    deliver_msi(&b.vm, msi(0b101, true), 0x41);
    assert_eq!(got(), [Some(0x41), None, Some(0x41)]);
    for (n, ldr) in [(0, 0x11u32), (1, 0x12), (2, 0x21)] {
        b.write(n, reg::DFR, 0x0fff_ffff);
        b.write(n, reg::LDR, ldr << 24);
    }
    deliver_msi(&b.vm, msi(0x13, true), 0x51);
    assert_eq!(got(), [Some(0x51), Some(0x51), None]);
    deliver_msi(&b.vm, msi(0x21, true), 0x61);
    assert_eq!(got(), [None, None, Some(0x61)]);
}

#[test]
fn lowest_priority_goes_to_one_that_is_least_busy() {
    let b = Bench::new(3);
    for n in 0..3 {
        b.write(n, reg::LDR, 1 << (24 + n));
    }
    b.write(0, reg::TPR, 0x20);
    b.write(2, reg::TPR, 0x10);
    b.write(1, reg::TPR, 0x20);
    deliver_msi(&b.vm, msi(7, true), 0x141);
    assert_eq!([b.ack(0), b.ack(1), b.ack(2)], [None, None, Some(0x41)]);
    // Disabled ones do not take part.
    b.write(2, reg::EOI, 0);
    b.write(2, reg::SVR, 0xff);
    b.write(0, reg::TPR, 0);
    deliver_msi(&b.vm, msi(7, true), 0x141);
    assert_eq!([b.ack(0), b.ack(1), b.ack(2)], [Some(0x41), None, None]);
    // A redirection hint asks for the same.
    b.write(0, reg::EOI, 0);
    deliver_msi(&b.vm, msi(7, true) | 8, 0x51);
    assert_eq!([b.ack(0), b.ack(1), b.ack(2)], [Some(0x51), None, None]);
    // Among equals each vector has its place, and different ones spread.
    b.write(0, reg::EOI, 0);
    b.write(1, reg::TPR, 0);
    for v in 0x60..0x64 {
        deliver_msi(&b.vm, msi(7, true), 0x100 | v);
        let at = u32::from(b.ack(1).is_some());
        if at == 0 {
            assert!(b.ack(0).is_some());
        }
        b.write(at, reg::EOI, 0);
        assert_eq!(at, v % 2);
    }
}

#[test]
fn nmi_init_and_sipi_become_events_even_when_disabled() {
    let b = Bench::new(2);
    b.write(1, reg::SVR, 0xff);
    let icr = |low| {
        b.write(0, reg::ICR_HIGH, 1 << 24);
        b.write(0, reg::ICR_LOW, low);
        b.events(1)
    };
    assert_eq!(icr(0x400), event::NMI);
    assert_eq!(icr(0xc500), event::INIT);
    assert_eq!(icr(0x8500), 0, "level de-assert");
    assert_eq!(icr(0x69a), event::SIPI);
    assert_eq!(b.vm.vcpus[1].sipi_vector.load(Ordering::SeqCst), 0x9a);
    assert_eq!(icr(0x200), 0, "SMI");
    assert_eq!(icr(0x41), 0, "fixed to a disabled APIC");
    assert_eq!(b.ack(1), None);
    // INIT, SIPI to all but self, as firmware starts processors.
    b.write(0, reg::ICR_LOW, 0xc4500);
    assert_eq!((b.events(0), b.events(1)), (0, event::INIT));
}

#[test]
fn errors_are_latched_by_a_write_and_interrupt_once() {
    let b = Bench::new(1);
    b.write(0, reg::LVT_ERROR, 0xfe);
    b.write(0, reg::ICR_LOW, 0x05);
    assert_eq!(b.read(0, reg::ESR), 0);
    assert_eq!(b.ack(0), Some(0xfe));
    b.write(0, reg::EOI, 0);
    b.write(0, reg::ICR_LOW, 0x05);
    assert_eq!(b.ack(0), None, "already reported");
    b.write(0, reg::ESR, 0);
    assert_eq!(b.read(0, reg::ESR), 1 << 5);
    deliver_msi(&b.vm, msi(0, false), 3);
    assert_eq!(b.ack(0), Some(0xfe));
    let _ = b.read(0, 0x3c);
    b.write(0, reg::ESR, 0);
    assert_eq!(b.read(0, reg::ESR), 1 << 6 | 1 << 7);
    b.write(0, reg::ESR, 0);
    assert_eq!(b.read(0, reg::ESR), 0);
}

#[test]
fn software_disable_masks_the_lvt_for_good() {
    let b = Bench::new(1);
    b.write(0, reg::LVT_TIMER, 0x41);
    b.write(0, reg::SVR, 0xff);
    assert_eq!(b.read(0, reg::LVT_TIMER), 0x1_0041);
    b.write(0, reg::LVT_TIMER, 0x42);
    assert_eq!(b.read(0, reg::LVT_TIMER), 0x1_0042);
    b.write(0, reg::SVR, 0x1ff);
    assert_eq!(b.read(0, reg::LVT_TIMER), 0x1_0042);
}

#[test]
fn lint0_lets_the_pic_through_when_it_is_a_virtual_wire() {
    let b = Bench::new(1);
    assert!(!b.apic(0).accepts_extint());
    b.write(0, reg::LVT_LINT0, 0x700);
    assert!(b.apic(0).accepts_extint());
    b.write(0, reg::LVT_LINT0, 0x1_0700);
    assert!(!b.apic(0).accepts_extint());
    deliver_msi(&b.vm, msi(0, false), 0x700);
    assert!(b.apic(0).accepts_extint(), "an ExtINT message opens it");
    assert!(!b.apic(0).accepts_extint(), "for one acknowledge");
    set_apic_base(&b.vm, 0, 0xfee0_0100).unwrap();
    assert!(
        b.apic(0).accepts_extint(),
        "without an APIC the wire is direct"
    );
}

#[test]
fn lint0_as_an_ordinary_input_turns_edges_into_messages() {
    let b = Bench::new(1);
    lint0_edge(&b.vm);
    assert_eq!((b.events(0), b.ack(0)), (0, None), "masked");
    b.write(0, reg::LVT_LINT0, 0x31);
    lint0_edge(&b.vm);
    assert_eq!(b.ack(0), Some(0x31));
    b.events(0);
    b.write(0, reg::LVT_LINT0, 0x400);
    lint0_edge(&b.vm);
    assert_eq!(b.events(0), event::NMI);
}

#[test]
fn one_shot_timer_counts_down_and_fires_once() {
    let b = Bench::new(1);
    b.write(0, reg::DIVIDE, 0b0011); // 16
    b.write(0, reg::LVT_TIMER, 0x41);
    b.write(0, reg::INITIAL_COUNT, 1000);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 1000);
    b.step(160);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 990);
    assert_eq!(time_to_timer(&b.vm, 0), Some(Duration::from_nanos(15_840)));
    b.step(15_839);
    assert_eq!(b.ack(0), None);
    b.step(1);
    assert_eq!(b.ack(0), Some(0x41));
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 0);
    b.step(1 << 40);
    assert_eq!((b.ack(0), time_to_timer(&b.vm, 0)), (None, None));
}

#[test]
fn periodic_timer_keeps_its_phase_and_loses_missed_ticks() {
    let b = Bench::new(1);
    b.write(0, reg::DIVIDE, 0b1011); // 1
    b.write(0, reg::LVT_TIMER, 1 << 17 | 0x41);
    b.write(0, reg::INITIAL_COUNT, 1_000_000);
    let tick = || {
        let v = b.ack(0);
        b.write(0, reg::EOI, 0);
        v
    };
    b.step(1_000_000);
    assert_eq!(tick(), Some(0x41));
    b.step(3_500_000);
    assert_eq!(tick(), Some(0x41));
    assert_eq!(tick(), None);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 500_000);
    assert_eq!(time_to_timer(&b.vm, 0), Some(Duration::from_micros(500)));
    b.write(0, reg::INITIAL_COUNT, 0);
    assert_eq!(time_to_timer(&b.vm, 0), None);
    // A period of one cycle cannot flood the host.
    b.write(0, reg::INITIAL_COUNT, 1);
    assert!(time_to_timer(&b.vm, 0).unwrap() >= Duration::from_micros(50));
}

#[test]
fn changing_divider_or_mode_keeps_the_count() {
    let b = Bench::new(1);
    b.write(0, reg::DIVIDE, 0b1011);
    b.write(0, reg::LVT_TIMER, 0x41);
    b.write(0, reg::INITIAL_COUNT, 1000);
    b.step(400);
    b.write(0, reg::DIVIDE, 0);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 600);
    b.step(200);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 500);
    b.write(0, reg::LVT_TIMER, 1 << 17 | 0x41);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 500);
    // Deadline mode disarms, and knows neither count.
    b.write(0, reg::LVT_TIMER, 2 << 17 | 0x41);
    b.write(0, reg::INITIAL_COUNT, 77);
    assert_eq!(b.read(0, reg::CURRENT_COUNT), 0);
    assert_eq!(time_to_timer(&b.vm, 0), None);
}

#[test]
fn tsc_deadline_fires_once_and_only_in_its_mode() {
    let b = Bench::new(1);
    let deadline = || {
        msr_read(&b.vm, 0, number::IA32_TSC_DEADLINE)
            .unwrap()
            .unwrap()
    };
    let arm = |v| {
        msr_write(&b.vm, 0, number::IA32_TSC_DEADLINE, v)
            .unwrap()
            .unwrap()
    };
    arm(5);
    assert_eq!(deadline(), 0, "ignored in one-shot mode");
    b.write(0, reg::LVT_TIMER, 2 << 17 | 0x41);
    arm(u64::MAX);
    assert_eq!(deadline(), u64::MAX);
    b.step(1);
    assert_eq!(b.ack(0), None);
    arm(1);
    assert_eq!(time_to_timer(&b.vm, 0), Some(Duration::ZERO));
    b.step(0);
    assert_eq!((b.ack(0), deadline()), (Some(0x41), 0));
    b.write(0, reg::EOI, 0);
    // The deadline is in the TSC of the vCPU.
    arm(1 << 61);
    b.apic(0).set_tsc_adjust(1 << 62);
    b.step(0);
    assert_eq!(b.ack(0), Some(0x41));
    // Changing the mode disarms.
    arm(u64::MAX);
    b.write(0, reg::LVT_TIMER, 0x41);
    assert_eq!((deadline(), time_to_timer(&b.vm, 0)), (0, None));
}

#[test]
fn a_saved_apic_continues_where_it_was() {
    let b = Bench::new(1);
    b.write(0, reg::DIVIDE, 0b1011);
    b.write(0, reg::LVT_TIMER, 0x41);
    b.write(0, reg::INITIAL_COUNT, 1_000_000);
    b.write(0, reg::LVT_LINT0, 0x700);
    b.write(0, reg::TPR, 0x10);
    deliver_msi(&b.vm, msi(0, false), 0x61 | LEVEL);
    assert_eq!(b.ack(0), Some(0x61));
    deliver_msi(&b.vm, msi(0, false), 0x51);
    b.write(0, reg::ICR_LOW, 0x01);
    b.step(300_000);
    let s = b.apic(0).save();
    let c = Bench::new(1);
    c.now.store(b.now.load(Ordering::SeqCst), Ordering::SeqCst);
    c.apic(0).restore(&s, 0xfee0_0900);
    assert_eq!(c.apic(0).save(), s);
    for b in [&b, &c] {
        assert_eq!(b.read(0, reg::CURRENT_COUNT), 700_000);
        b.step(699_999);
        b.write(0, reg::EOI, 0);
        assert_eq!(b.ended(), [0x61]);
        assert_eq!(b.ack(0), Some(0x51));
        b.write(0, reg::EOI, 0);
        b.step(1);
        assert_eq!(b.ack(0), Some(0x41));
        b.write(0, reg::ESR, 0);
        assert_eq!(b.read(0, reg::ESR), 1 << 5);
        // What has fired does not fire again.
        let s = b.apic(0).save();
        assert_eq!(s.timer_start_ns, 0);
        b.write(0, reg::EOI, 0);
        b.apic(0).restore(&s, 0xfee0_0900);
        b.write(0, reg::EOI, 0);
        b.step(1 << 40);
        assert_eq!(b.ack(0), None);
    }
}

#[test]
fn an_expiry_that_nobody_served_yet_survives_a_save() {
    let b = Bench::new(1);
    b.write(0, reg::DIVIDE, 0b1011);
    b.write(0, reg::LVT_TIMER, 0x41);
    b.write(0, reg::INITIAL_COUNT, 1000);
    b.now.fetch_add(5000, Ordering::SeqCst);
    let mut s = b.apic(0).save();
    b.apic(0).restore(&s, 0xfee0_0900);
    b.step(0);
    assert_eq!(b.ack(0), Some(0x41));
    // KVM says by a current count of 0 that its one-shot timer has fired.
    b.write(0, reg::EOI, 0);
    s.regs[reg::CURRENT_COUNT] = 0;
    b.apic(0).restore(&s, 0xfee0_0900);
    b.step(0);
    assert_eq!(b.ack(0), None);
}

#[test]
fn a_hostile_saved_state_is_tamed() {
    let b = Bench::new(2);
    let s = ApicState {
        regs: [u32::MAX; 64],
        tsc_deadline: u64::MAX,
        timer_start_ns: u64::MAX,
    };
    for apic_base in [0, u64::MAX, 0xfee0_0800, 0xfee0_0c00, 0xfee0_0400] {
        b.apic(1).restore(&s, apic_base);
        b.step(1);
        for r in 0..64 {
            let _ = (b.read(1, r), b.rdmsr(1, r));
            b.write(1, r, u32::MAX);
            let _ = b.wrmsr(1, r, u64::MAX);
        }
        let _ = (b.ack(1), b.apic(1).save());
    }
}

#[test]
fn init_resets_all_but_identity() {
    let b = Bench::new(2);
    b.x2apic();
    b.wrmsr(1, reg::TPR, 0x30).unwrap();
    deliver_msi(&b.vm, msi(1, false), 0x61);
    b.apic(1).init_reset();
    assert_eq!(b.ack(1), None);
    assert_eq!(b.rdmsr(1, reg::TPR), Ok(0));
    assert_eq!(b.rdmsr(1, reg::ID), Ok(1));
    assert_eq!(b.rdmsr(1, reg::LDR), Ok(2));
    assert_eq!(b.rdmsr(1, reg::SVR), Ok(0xff));
}

#[test]
fn mode_transitions_follow_the_manual() {
    let b = Bench::new(1);
    let set = |v| set_apic_base(&b.vm, 0, v);
    let (off, x1, bad, x2) = (0xfee0_0100u64, 0xfee0_0900, 0xfee0_0500, 0xfee0_0d00);
    assert_eq!(set(bad), Err(()));
    assert_eq!(set(x1), Ok(()));
    assert_eq!(b.rdmsr(0, reg::ID), Err(()), "no MSRs in xAPIC mode");
    assert_eq!(set(x2), Ok(()));
    assert_eq!(set(x1), Err(()));
    assert_eq!(set(bad), Err(()));
    assert_eq!(b.rdmsr(0, reg::SVR), Ok(0x1ff), "registers survive");
    assert_eq!(set(off), Ok(()));
    assert_eq!(set(x2), Err(()));
    assert_eq!(set(x1), Ok(()));
    assert_eq!(b.read(0, reg::SVR), 0xff, "registers were lost");
    assert_eq!(set(x1 | 1), Err(()), "reserved bits");
    assert_eq!(set(x1 | 1 << 60), Err(()), "wider than physical addresses");
}

#[test]
fn x2apic_registers_fault_where_they_should() {
    let b = Bench::new(2);
    b.x2apic();
    assert_eq!(b.rdmsr(1, reg::ID), Ok(1));
    for (r, v) in [
        (reg::ID, 0),
        (reg::EOI, 1),
        (reg::ESR, 1),
        (reg::TPR, 0x100),
        (reg::LDR, 1),
        (reg::DFR, 0),
        (reg::ICR_HIGH, 0),
        (reg::LVT_TIMER, 1 << 20),
        (reg::INITIAL_COUNT, 1 << 32),
        (reg::ICR_LOW, 1 << 13),
        (reg::SELF_IPI, 0x100),
        (0x3a, 0),
        (0xff, 0),
    ] {
        assert_eq!(b.wrmsr(0, r, v), Err(()), "{r:#x}");
    }
    for r in [
        reg::EOI,
        reg::DFR,
        reg::ICR_HIGH,
        reg::SELF_IPI,
        reg::APR,
        0,
        0xff,
    ] {
        assert_eq!(b.rdmsr(0, r), Err(()), "{r:#x}");
    }
    assert_eq!(msr_read(&b.vm, 0, 0x7ff), None);
    assert_eq!(msr_write(&b.vm, 0, 0x900, 0), None);
}

#[test]
fn x2apic_ipis() {
    let b = Bench::new(18);
    b.x2apic();
    assert_eq!(b.rdmsr(17, reg::LDR), Ok(1 << 16 | 2));
    b.wrmsr(0, reg::ICR_LOW, 17 << 32 | 0x41).unwrap();
    assert_eq!(b.ack(17), Some(0x41));
    assert_eq!(b.rdmsr(0, reg::ICR_LOW), Ok(17 << 32 | 0x41));
    // Logical: cluster 1, members 0 and 1.
    b.wrmsr(0, reg::ICR_LOW, 0x0001_0003u64 << 32 | 1 << 11 | 0x51)
        .unwrap();
    assert_eq!((b.ack(16), b.ack(17)), (Some(0x51), Some(0x51)));
    assert_eq!((b.ack(0), b.ack(1)), (None, None));
    b.wrmsr(3, reg::ICR_LOW, 0xffff_ffff << 32 | 0x61).unwrap();
    assert!((0..18).all(|n| b.ack(n) == Some(0x61)));
    b.wrmsr(5, reg::SELF_IPI, 0x71).unwrap();
    assert_eq!(b.ack(5), Some(0x71));
    b.wrmsr(5, reg::EOI, 0).unwrap();
    // A message from outside has 8 bits, 255 is everybody.
    deliver_msi(&b.vm, msi(0xff, false), 0x81);
    assert!((0..18).all(|n| b.ack(n) == Some(0x81)));
}

#[test]
fn odd_accesses_do_nothing_bad() {
    let b = Bench::new(1);
    let mut wide = [0xaa; 64];
    mmio_read(&b.vm, 0, 0x20, &mut wide);
    assert!(wide.iter().all(|x| *x == 0));
    mmio_write(&b.vm, 0, 0x80, &[0xff]);
    mmio_write(&b.vm, 0, 0x84, &[0xff; 4]);
    mmio_write(&b.vm, 0, 0x80, &[0xff; 8]);
    assert_eq!(b.read(0, reg::TPR), 0);
    b.write(0, reg::TPR, 0x35);
    let mut byte = [0];
    mmio_read(&b.vm, 0, 0x80, &mut byte);
    assert_eq!(byte, [0x35]);
    mmio_read(&b.vm, 9, 0x80, &mut byte);
    deliver_msi(&b.vm, 0xfed0_0000, 0x41);
    deliver_msi(&b.vm, u64::MAX, 0x41);
    assert_eq!(b.ack(0), None);
}

#[test]
fn the_thread_fires_the_timers_of_running_vcpus_and_ends_with_the_vm() {
    let b = Bench::new(2);
    start_timer_thread(&b.vm).unwrap();
    let weak = Arc::downgrade(&b.vm);
    b.write(1, reg::LVT_TIMER, 2 << 17 | 0x41);
    b.events(1);
    let in_2_ms = guest_tsc(&b.vm) + host_tsc_khz() * 2;
    msr_write(&b.vm, 1, number::IA32_TSC_DEADLINE, in_2_ms)
        .unwrap()
        .unwrap();
    // Parks like a vCPU; the thread's event ends the wait. The limit is for a broken thread.
    b.vm.vcpus[1].park(Some(Duration::from_secs(20)));
    assert_ne!(b.events(1) & event::INTERRUPT, 0);
    assert!(guest_tsc(&b.vm) >= in_2_ms);
    assert_eq!(b.ack(1), Some(0x41));
    drop(b);
    // The thread holds the VM only while it serves timers.
    while weak.strong_count() != 0 {
        std::thread::yield_now();
    }
}
