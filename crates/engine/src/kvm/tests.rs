//! CPUID per vCPU; on machines with KVM also event descriptors, the dirty log and failures.

use std::time::Instant;

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
    let (a, b) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    let gsi = vm.register_irqfd(&a, 0xfee0_0000, 0x41).unwrap();
    assert!(gsi >= RESERVED_ROUTES);
    let other = vm.register_irqfd(&b, 0xfee0_0000, 0x42).unwrap();
    assert_ne!(gsi, other);
    vm.route_irqfd(gsi, 0xfee0_0000, 0x43).unwrap();
    vm.unregister_irqfd(&a, gsi).unwrap();
    assert!(vm.route_irqfd(gsi, 0xfee0_0000, 0x43).is_err());
    vm.unregister_irqfd(&b, other).unwrap();
    vm.register_ioeventfd(&a, 0xd000_0000).unwrap();
    vm.unregister_ioeventfd(&a, 0xd000_0000).unwrap();
    assert!(vm.unregister_ioeventfd(&a, 0xd000_0000).is_err());
}

#[test]
fn level_routes_are_bounded() {
    let Some((vm, _vcpu, _)) = vm(&[0xf4]) else {
        return;
    };
    for n in 0..100 {
        vm.send_msi(0xfee0_0000, 0xc020 + n);
    }
    assert_eq!(lock(&vm.routes).level.len(), RESERVED_ROUTES as usize);
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
