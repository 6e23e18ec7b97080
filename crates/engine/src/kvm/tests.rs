//! CPUID per vCPU; on machines with KVM also event descriptors, the dirty log and failures.

use std::os::fd::AsRawFd;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::{CpuidEntry, CpuidTable, StopReason, conformance};

#[test]
fn per_vcpu_leaves_carry_the_apic_id() {
    let mut table = conformance::cpuid();
    table.entries.push(CpuidEntry {
        leaf: 0xb,
        indexed: true,
        ..CpuidEntry::default()
    });
    table.entries.push(CpuidEntry {
        leaf: 0x8000_001e,
        ..CpuidEntry::default()
    });
    let t = cpuid::for_vcpu(&table, 5, 6, 2_000_000);
    let get = |leaf, sub| *t.get(leaf, sub).unwrap_or(&CpuidEntry::default());
    assert_eq!(get(1, 0).ebx >> 24, 5);
    assert_eq!(get(1, 0).ebx >> 16 & 0xff, 6);
    assert_eq!(
        (get(0xb, 0).eax, get(0xb, 0).ebx, get(0xb, 0).ecx),
        (0, 1, 0x100)
    );
    assert_eq!(
        (get(0xb, 1).eax, get(0xb, 1).ebx, get(0xb, 1).ecx),
        (3, 6, 0x201)
    );
    assert!((0..3).all(|n| get(0xb, n).edx == 5));
    assert_eq!(get(0x8000_001e, 0).eax, 5);
    assert_eq!(get(0x4000_0010, 0).eax, 2_000_000);
    assert_eq!(
        t.entries.iter().filter(|e| e.leaf == 0x1f).count(),
        0,
        "not invented"
    );
    // At most one entry per leaf and sub-leaf.
    for e in &t.entries {
        let same = |o: &&CpuidEntry| o.leaf == e.leaf && o.subleaf == e.subleaf;
        assert_eq!(t.entries.iter().filter(same).count(), 1);
    }
}

#[test]
fn a_hypervisor_leaf_of_the_table_is_kept() {
    let own = CpuidEntry {
        leaf: 0x4000_0000,
        eax: 7,
        ..CpuidEntry::default()
    };
    let t = cpuid::for_vcpu(&CpuidTable { entries: vec![own] }, 0, 1, 1);
    assert_eq!(t.entries, vec![own]);
}

/// Stops the vCPU at any OUT.
#[derive(Default)]
struct StopAtOut(Mutex<Option<Arc<dyn VcpuControl>>>);

impl CpuIo for StopAtOut {
    fn mmio_read(&self, _: u32, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u32, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) {
        if let Some(c) = lock(&self.0).as_ref() {
            c.stop();
        }
    }
    fn ack_pic(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

/// A VM whose vCPU 0 starts at 0:8000H in real mode with `code`; `None` where there is no KVM.
fn vm(code: &[u8]) -> Option<(KvmVm, Box<dyn Vcpu>, Arc<GuestMemory>)> {
    if let Err(e) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        println!("SKIP: /dev/kvm: {e}");
        return None;
    }
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    memory.write(0x8000, code).unwrap();
    let start = Instant::now();
    let io = Arc::<StopAtOut>::default();
    let vm = KvmVm::new(VmConfig {
        memory: Arc::clone(&memory),
        vcpus: 1,
        cpuid: conformance::cpuid(),
        io: Arc::<StopAtOut>::clone(&io),
        clock: Arc::new(move || start.elapsed().as_nanos() as u64),
    })
    .unwrap();
    *lock(&io.0) = Some(vm.control(0));
    let mut vcpu = vm.take_vcpu(0).unwrap();
    let mut s = pyrite_x86::CpuState::reset(0, true);
    s.seg[1] = pyrite_x86::Segment::real(0, 0x9b);
    s.rip = 0x8000;
    vcpu.set_state(&s).unwrap();
    Some((vm, vcpu, memory))
}

#[test]
fn a_vcpu_is_taken_once() {
    let Some((vm, _vcpu, _)) = vm(&[0xf4]) else {
        return;
    };
    assert!(vm.take_vcpu(0).is_err());
    assert!(vm.take_vcpu(1).is_err());
    vm.control(9).stop();
}

#[test]
fn a_stop_before_run_is_not_lost() {
    // jmp .
    let Some((vm, mut vcpu, _)) = vm(&[0xeb, 0xfe]) else {
        return;
    };
    vm.control(0).stop();
    assert!(matches!(vcpu.run(), StopReason::Requested));
    // And it was used up: the next run goes on until it is stopped again.
    let control = vm.control(0);
    let t = std::thread::spawn(move || vcpu.run());
    control.stop();
    assert!(matches!(t.join(), Ok(StopReason::Requested)));
}

#[test]
fn writes_of_vcpus_reach_the_dirty_log() {
    // mov %ax, 0x9000; out %al, $0xf4; jmp .
    let code = [0xa3, 0x00, 0x90, 0xe6, 0xf4, 0xeb, 0xfe];
    let Some((vm, mut vcpu, memory)) = vm(&code) else {
        return;
    };
    memory.start_dirty_log();
    vm.drop_write_permission();
    assert!(matches!(vcpu.run(), StopReason::Requested));
    // The OUT is complete: the state is that after it.
    assert_eq!(vcpu.state().unwrap().rip, 0x8005);
    vm.sync_dirty_log();
    let log = memory.take_dirty_log();
    vm.drop_write_permission();
    assert_ne!(log[0] & 1 << 9, 0, "page 9 is dirty: {log:x?}");
    assert_eq!(log[0] & 1 << 0x20, 0, "page 20H is clean");
    assert_eq!(memory.take_dirty_log()[0] & 1 << 9, 0, "taken once");
    memory.stop_dirty_log();
    vm.drop_write_permission();
}

#[test]
fn a_processor_that_shut_down_stays_so() {
    let Some((_vm, mut vcpu, _)) = vm(&[0xf4]) else {
        return;
    };
    let mut s = vcpu.state().unwrap();
    s.activity = pyrite_x86::Activity::Shutdown;
    vcpu.set_state(&s).unwrap();
    assert!(matches!(vcpu.run(), StopReason::TripleFault));
    assert_eq!(
        vcpu.state().unwrap().activity,
        pyrite_x86::Activity::Shutdown
    );
}

#[test]
fn event_descriptors_come_and_go() {
    let Some((vm, _vcpu, _)) = vm(&[0xf4]) else {
        return;
    };
    let open = |data| events::KvmIrqfd::open(&vm.shared, 0xfee0_0000, data).unwrap();
    let (a, b) = (open(0x41), open(0x42));
    assert!(a.gsi >= RESERVED_ROUTES);
    assert_ne!(a.gsi, b.gsi);
    a.route(0xfee0_0000, 0x43).unwrap();
    vm.settle_irqfds();
    drop(a);
    assert_eq!(lock(&vm.shared.routes).irqfds.len(), 1);
    drop(b);
    assert_eq!(lock(&vm.shared.routes).irqfds.len(), 0);
    let event = EventFd::new(0).unwrap();
    let fd = event.as_raw_fd();
    vm.add_ioeventfd(0xd000_0000, fd).unwrap();
    assert!(vm.add_ioeventfd(0xd000_0000, fd).is_err(), "taken");
    vm.remove_ioeventfd(0xd000_0000, fd).unwrap();
    assert!(vm.remove_ioeventfd(0xd000_0000, fd).is_err());
    assert!(vm.add_ioeventfd(0xd000_0000, -1).is_err());
}

/// The vectors that wait in a local APIC.
fn irr(vcpu: &mut dyn Vcpu) -> Vec<u32> {
    let regs = vcpu.state().unwrap().apic.regs;
    (0..256)
        .filter(|v| regs[0x20 + (v / 32) as usize] >> (v % 32) & 1 != 0)
        .collect()
}

#[test]
fn a_store_signals_and_a_trigger_interrupts() {
    // mov $0xffff, %ax; mov %ax, %ds; mov %ax, 0x20 (= 0x100010); out %al, $0xf4; jmp .
    let code = [
        0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa3, 0x20, 0x00, 0xe6, 0xf4, 0xeb, 0xfe,
    ];
    let Some((vm, mut vcpu, _)) = vm(&code) else {
        return;
    };
    let mut s = vcpu.state().unwrap();
    s.apic.regs[0xf] |= 1 << 8;
    vcpu.set_state(&s).unwrap();
    let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    vm.add_ioeventfd(0x10_0010, event.as_raw_fd()).unwrap();
    assert!(matches!(vcpu.run(), StopReason::Requested));
    assert_eq!(event.read().unwrap(), 1);

    let irqfd = vm.open_irqfd(0xfee0_0000, 0x41).unwrap();
    irqfd.trigger();
    vm.settle_irqfds();
    assert_eq!(irr(&mut *vcpu), [0x41]);
    irqfd.route(0xfee0_0000, 0x52).unwrap();
    vm.settle_irqfds();
    assert_eq!(irr(&mut *vcpu), [0x41], "settling sends nothing");
    irqfd.trigger();
    vm.settle_irqfds();
    assert_eq!(irr(&mut *vcpu), [0x41, 0x52]);
}

#[test]
fn level_routes_are_bounded() {
    let Some((vm, _vcpu, _)) = vm(&[0xf4]) else {
        return;
    };
    for n in 0..100 {
        vm.send_msi(0xfee0_0000, 0xc020 + n);
    }
    assert_eq!(
        lock(&vm.shared.routes).level.len(),
        RESERVED_ROUTES as usize
    );
}

#[test]
fn impossible_states_are_refused_not_fatal() {
    let Some((_vm, mut vcpu, _)) = vm(&[0xf4]) else {
        return;
    };
    let good = vcpu.state().unwrap();
    let mut bad = good.clone();
    bad.cr4 = 1 << 40;
    assert!(matches!(
        vcpu.set_state(&bad),
        Err(EngineError::BadState(_))
    ));
    vcpu.set_state(&good).unwrap();
    let mut again = vcpu.state().unwrap();
    again.tsc = good.tsc;
    again.apic.timer_start_ns = good.apic.timer_start_ns;
    assert_eq!(again, good);
}
