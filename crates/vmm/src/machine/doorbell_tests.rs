//! Notifications and interrupts of a device through event descriptors of KVM.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use pyrite_api::v1::{NetKind, NetSpec};
use pyrite_engine::{StopReason, Vcpu};
use pyrite_state::Inspect;

use super::*;

const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
/// Where the guest puts the device.
const BAR: u64 = 0xd000_0000;
/// The same after it has moved it.
const MOVED: u64 = 0xd100_0000;
const VECTOR: u32 = 0x41;
const CODE: u64 = 0x8000;
const DESCRIPTORS: u64 = 0x4000;
const AVAILABLE: u64 = 0x5000;
const USED: u64 = 0x6000;
const BUFFER: u64 = 0x7000;

/// Tells of debug exits, with which a guest says that it is done.
struct Done(SyncSender<()>);

impl MachineEvents for Done {
    fn power_off(&self) {}
    fn reset(&self) {}
    fn suspend(&self) {}
    fn debug_exit(&self, _code: u32) {
        let _ = self.0.try_send(());
    }
}

struct Rig {
    machine: Machine,
    done: Receiver<()>,
    io: MachineIo,
    vcpu: Option<Box<dyn Vcpu>>,
    /// Chains given to the device.
    given: u16,
}

/// A machine on KVM whose only device, at 1.0, is the entropy source.
fn rig() -> Option<Rig> {
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(e) = device {
        println!("SKIP event descriptors of KVM: /dev/kvm: {e}");
        return None;
    }
    let spec = VmSpec {
        memory_bytes: 16 << 20,
        net: NetSpec {
            kind: NetKind::None,
            ..NetSpec::default()
        },
        console: ConsoleKind::None,
        ..VmSpec::default()
    };
    let (sender, done) = sync_channel(1);
    let cpuid = crate::engines::guest_cpuid(Engine::Kvm, "host", 1).unwrap();
    let console = Console::new(false, Box::new(|_| {}));
    let machine = Machine::build(&spec, Engine::Kvm, cpuid, console, Arc::new(Done(sender)));
    let Ok(machine) = machine else {
        panic!("no machine")
    };
    machine.chipset.pci.assign_bars().unwrap();
    let io = MachineIo(Arc::clone(&machine.chipset));
    let vcpu = machine.vm.take_vcpu(0).unwrap();
    Some(Rig {
        machine,
        done,
        io,
        vcpu: Some(vcpu),
        given: 0,
    })
}

impl Rig {
    fn config(&self, at: u64, data: &[u8]) {
        self.io.mmio_write(0, 0xe000_8000 + at, data);
    }

    fn config_u32(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        self.io.mmio_read(0, 0xe000_8000 + at, &mut b);
        u32::from_le_bytes(b)
    }

    fn move_bar(&self, to: u64) {
        self.config(COMMAND, &0u16.to_le_bytes());
        self.config(BAR0, &(to as u32).to_le_bytes());
        self.config(BAR0 + 4, &0u32.to_le_bytes());
        // Memory space and bus master.
        self.config(COMMAND, &6u16.to_le_bytes());
    }

    /// What a driver does: MSI-X, features, one queue. virtio 1.3 §4.1.4.3.
    fn drive(&self) {
        self.move_bar(BAR);
        let mut at = u64::from(self.config_u32(0x34) & 0xff);
        while self.config_u32(at) & 0xff != 0x11 {
            at = u64::from(self.config_u32(at) >> 8 & 0xff);
            assert_ne!(at, 0, "no MSI-X");
        }
        self.config(at + 2, &0x8000u16.to_le_bytes());
        let w = |at: u64, data: &[u8]| self.io.mmio_write(0, BAR + at, data);
        w(0x4010, &0xfee0_0000u64.to_le_bytes());
        w(0x4018, &VECTOR.to_le_bytes());
        w(0x401c, &0u32.to_le_bytes());
        w(20, &[3]);
        w(8, &1u32.to_le_bytes());
        w(12, &1u32.to_le_bytes());
        w(20, &[11]);
        w(22, &0u16.to_le_bytes());
        w(24, &8u16.to_le_bytes());
        w(26, &1u16.to_le_bytes());
        for (at, gpa) in [(32, DESCRIPTORS), (40, AVAILABLE), (48, USED)] {
            w(at, &(gpa as u32).to_le_bytes());
            w(at + 4, &0u32.to_le_bytes());
        }
        w(28, &1u16.to_le_bytes());
        w(20, &[15]);
    }

    fn start(&self) {
        for unit in &self.machine.units {
            lock(unit).start();
        }
        self.machine.clock.start();
    }

    /// Gives the device a buffer, notifies it from the guest at `bar`, and waits there until the
    /// buffer has come back.
    fn request(&mut self, bar: u64) {
        let memory = Arc::clone(&self.machine.memory);
        memory.write(BUFFER, &[0; 64]).unwrap();
        let descriptor: Vec<u8> = [BUFFER, 64 | 2 << 32].map(u64::to_le_bytes).concat();
        memory.write(DESCRIPTORS, &descriptor).unwrap();
        self.given += 1;
        memory
            .write(AVAILABLE + 2, &self.given.to_le_bytes())
            .unwrap();
        let [n0, n1] = self.given.to_le_bytes();
        let [b0, b1, b2, b3] = (bar as u32 + 0x3000).to_le_bytes();
        let [u0, u1, u2, u3] = (USED as u32 + 2).to_le_bytes();
        let code = [
            // mov word [bar + 3000H], 0; wait: cmp word [used.idx], given; jne wait;
            0x66, 0xc7, 0x05, b0, b1, b2, b3, 0, 0, 0x66, 0x81, 0x3d, u0, u1, u2, u3, n0, n1, 0x75,
            0xf5, // out 0xf4, al; jmp .
            0xe6, 0xf4, 0xeb, 0xfe,
        ];
        memory.write(CODE, &code).unwrap();
        let mut state = crate::boot::entry::protected_32(&memory, CODE).unwrap();
        crate::boot::firmware_registers(&mut state, &self.machine.cpuid, true);
        // Software-enabled: it takes messages.
        state.apic.regs[0xf] = 0x1ff;
        let mut vcpu = self.vcpu.take().unwrap();
        vcpu.set_state(&state).unwrap();
        let control = self.machine.vm.control(0);
        let thread = std::thread::spawn(move || {
            let reason = vcpu.run();
            (vcpu, reason)
        });
        let done = self.done.recv_timeout(Duration::from_secs(20));
        control.stop();
        let (vcpu, reason) = thread.join().unwrap();
        assert!(matches!(reason, StopReason::Requested), "{reason:?}");
        done.expect("the guest gets its buffer back");
        self.vcpu = Some(vcpu);
        let mut got = [0; 64];
        memory.read(BUFFER, &mut got).unwrap();
        assert_ne!(got, [0; 64]);
    }

    /// True if the interrupt waits in the local APIC.
    fn interrupted(&mut self) -> bool {
        // The device pushes the buffer before it signals.
        let waits = |rig: &mut Rig| {
            rig.machine.vm.settle_irqfds();
            let state = rig.vcpu.as_mut().map(|v| v.state().unwrap());
            state.is_some_and(|s| {
                s.apic.regs[0x20 + (VECTOR / 32) as usize] >> (VECTOR % 32) & 1 != 0
            })
        };
        (0..500).any(|_| {
            let there = waits(self);
            if !there {
                std::thread::sleep(Duration::from_millis(2));
            }
            there
        })
    }

    fn number(&self, of: &str) -> u64 {
        let tree = if of == "irqfds" {
            self.machine.vm.inspect()
        } else {
            let mut units = self.machine.units.iter();
            let unit = units.find(|u| lock(u).unit() == "virtio-rng0").unwrap();
            lock(unit).inspect()
        };
        match tree.at(of) {
            Some(Inspect::Uint(n)) => *n,
            other => panic!("{of}: {other:?}"),
        }
    }
}

#[test]
fn a_guest_on_kvm_rings_and_is_interrupted_by_descriptors() {
    let Some(mut r) = rig() else { return };
    r.drive();
    r.start();
    assert_eq!((r.number("doorbell_rings"), r.number("irqfds")), (0, 0));
    r.request(BAR);
    assert!(r.interrupted());
    assert_eq!((r.number("doorbell_rings"), r.number("irqfds")), (1, 1));
    // The doorbell goes where the guest moves the device.
    r.move_bar(MOVED);
    r.request(MOVED);
    assert!(r.interrupted());
    assert_eq!((r.number("doorbell_rings"), r.number("irqfds")), (2, 1));
}

#[test]
fn a_restored_machine_on_kvm_has_its_descriptors_again() {
    let (Some(mut a), Some(mut b)) = (rig(), rig()) else {
        return;
    };
    a.drive();
    a.start();
    a.request(BAR);
    assert!(a.interrupted());
    a.machine.clock.stop();
    for unit in &a.machine.units {
        lock(unit).pause();
    }
    for unit in &a.machine.units {
        while !lock(unit).drained() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let mut ram = vec![0; 0x10_0000];
    a.machine.memory.read(0, &mut ram[..0xa_0000]).unwrap();
    b.machine.memory.write(0, &ram[..0xa_0000]).unwrap();
    for unit in b.machine.restore_order() {
        let name = lock(unit).unit().to_owned();
        let same = |u: &&Unit| lock(u).unit() == name;
        let section = lock(a.machine.units.iter().find(same).unwrap()).save();
        lock(unit).restore(&section.unwrap()).unwrap();
    }
    b.machine.chipset.pci.refresh();
    b.given = a.given;
    b.start();
    b.request(BAR);
    assert!(b.interrupted());
    assert_eq!((b.number("doorbell_rings"), b.number("irqfds")), (1, 1));
}
