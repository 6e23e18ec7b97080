//! Who gets a message: MSIs and interprocessor interrupts to local APICs.
//!
//! Each APIC is locked by itself and never while another is: two vCPUs may send to each other.

use std::sync::atomic::Ordering;

use super::regs::{Effect, LVT_MASKED, base, esr, mode, reg};
use crate::vm::{VmShared, event, lock};

/// A message on its way.
#[derive(Clone, Copy, Debug)]
struct Message {
    vector: u8,
    mode: u32,
    level: bool,
}

/// Whom a message means.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// A destination field.
    Dest {
        dest: u32,
        logical: bool,
        /// 32 bits wide.
        wide: bool,
    },
    All,
    AllBut(u32),
    One(u32),
}

impl Target {
    fn includes(self, vm: &VmShared, index: u32) -> bool {
        match self {
            Target::All => true,
            Target::AllBut(n) => n != index,
            Target::One(n) => n == index,
            Target::Dest {
                dest,
                logical,
                wide,
            } => {
                let regs = lock(&vm.vcpus[index as usize].apic.regs);
                regs.matches(dest, logical, wide)
            }
        }
    }
}

/// Delivers a message-signalled interrupt. Intel SDM Vol. 3A §10.11.
///
/// Addresses outside the interrupt window and reserved delivery modes are ignored.
pub fn deliver_msi(vm: &VmShared, addr: u64, data: u32) {
    if addr >> 20 != 0xfee {
        return;
    }
    let addr = addr as u32;
    let logical = addr & 1 << 2 != 0;
    let mut mode = data >> 8 & 7;
    if mode == mode::FIXED && logical && addr & 1 << 3 != 0 {
        // Redirection hint: one of the logical destination's processors.
        mode = mode::LOWEST;
    }
    let message = Message {
        vector: data as u8,
        mode,
        level: data & 1 << 15 != 0,
    };
    let target = Target::Dest {
        dest: addr >> 12 & 0xff,
        logical,
        wide: false,
    };
    send(vm, target, message);
}

/// Sends what was written to ICR of vCPU `from`. Intel SDM Vol. 3A §10.6.1.
pub(super) fn send_ipi(vm: &VmShared, from: u32, icr: u64, x2apic: bool) {
    let low = icr as u32;
    let message = Message {
        vector: low as u8,
        mode: low >> 8 & 7,
        level: false,
    };
    let shorthand = low >> 18 & 3;
    // INIT level de-assert does nothing since the Pentium 4. Bit 14 is the level, 15 the trigger.
    if message.mode == mode::INIT && low >> 14 & 3 == 0b10 {
        return;
    }
    if matches!(message.mode, mode::FIXED | mode::LOWEST) && message.vector < 16 {
        let wake = lock(&vm.vcpus[from as usize].apic.regs).error(esr::SEND_ILLEGAL_VECTOR);
        if wake {
            vm.vcpus[from as usize].raise(event::INTERRUPT);
        }
        return;
    }
    let target = match shorthand {
        // Only fixed interrupts can be sent to oneself by shorthand (table 10-3).
        1 if message.mode != mode::FIXED => return,
        1 => Target::One(from),
        2 if !matches!(message.mode, mode::FIXED | mode::LOWEST) => return,
        2 => Target::All,
        3 => Target::AllBut(from),
        _ => Target::Dest {
            dest: if x2apic {
                (icr >> 32) as u32
            } else {
                (icr >> 56) as u32
            },
            logical: low & 1 << 11 != 0,
            wide: x2apic,
        },
    };
    send(vm, target, message);
}

fn send(vm: &VmShared, target: Target, message: Message) {
    // A physical destination is an index: no need to ask everybody.
    if let Target::Dest {
        dest,
        logical: false,
        wide,
    } = target
        && dest != if wide { u32::MAX } else { 0xff }
    {
        if (dest as usize) < vm.vcpus.len() {
            let mut message = message;
            if message.mode == mode::LOWEST {
                message.mode = mode::FIXED;
            }
            accept(vm, dest, message);
        }
        return;
    }
    let all = 0..vm.vcpus.len() as u32;
    if message.mode == mode::LOWEST {
        if let Some(n) = lowest(vm, target, message.vector) {
            accept(
                vm,
                n,
                Message {
                    mode: mode::FIXED,
                    ..message
                },
            );
        }
        return;
    }
    for n in all.filter(|n| target.includes(vm, *n)) {
        accept(vm, n, message);
    }
}

/// The listed processor of lowest arbitration priority. Among equals the vector decides, so that
/// different interrupts spread over processors and one interrupt stays where its data is cached.
fn lowest(vm: &VmShared, target: Target, vector: u8) -> Option<u32> {
    let mut best = u32::MAX;
    let mut equals: u64 = 0;
    // LIMIT: arbitration looks at the first 64 processors, which is the engine's maximum.
    for n in 0..vm.vcpus.len().min(64) as u32 {
        if !target.includes(vm, n) {
            continue;
        }
        let apr = {
            let regs = lock(&vm.vcpus[n as usize].apic.regs);
            if !regs.accepts_fixed() {
                continue;
            }
            regs.apr()
        };
        if apr < best {
            best = apr;
            equals = 0;
        }
        if apr == best {
            equals |= 1 << n;
        }
    }
    let count = equals.count_ones();
    if count == 0 {
        return None;
    }
    let mut skip = u32::from(vector) % count;
    (0..64).find(|n| {
        let here = equals >> n & 1 != 0;
        let found = here && skip == 0;
        skip = skip.wrapping_sub(u32::from(here));
        found
    })
}

/// One APIC takes a message.
fn accept(vm: &VmShared, index: u32, message: Message) {
    let v = &vm.vcpus[index as usize];
    let wake = {
        let mut regs = lock(&v.apic.regs);
        if regs.apic_base & base::EN == 0
            && message.mode != mode::INIT
            && message.mode != mode::SIPI
        {
            return;
        }
        match message.mode {
            mode::FIXED => u32::from(regs.accept(message.vector, message.level)) * event::INTERRUPT,
            mode::EXTINT => {
                regs.extint = true;
                event::INTERRUPT
            }
            mode::NMI => event::NMI,
            mode::INIT => event::INIT,
            mode::SIPI => {
                v.sipi_vector
                    .store(u32::from(message.vector), Ordering::SeqCst);
                event::SIPI
            }
            // No SMM; 3 is reserved.
            _ => 0,
        }
    };
    if wake != 0 {
        v.raise(wake);
    }
}

/// The PIC's INTR output, wired to LINT0 of vCPU 0, has gone high. As an ExtINT input it is a
/// level that the vCPU looks at by itself; in the other modes the edge is a message.
/// Intel SDM Vol. 3A §10.5.1.
pub fn lint0_edge(vm: &VmShared) {
    let Some(v) = vm.vcpus.first() else { return };
    let message = {
        let mut regs = lock(&v.apic.regs);
        let Ok(lvt) = regs.read(reg::LVT_LINT0, || 0) else {
            return;
        };
        if lvt & LVT_MASKED != 0 {
            return;
        }
        Message {
            vector: lvt as u8,
            mode: lvt >> 8 & 7,
            level: false,
        }
    };
    if matches!(message.mode, mode::FIXED | mode::NMI | mode::INIT) {
        accept(vm, 0, message);
    }
}

/// Does what a register write asked for, with no APIC locked.
pub(super) fn apply(vm: &VmShared, index: u32, effect: Effect, x2apic: bool) {
    if let Some(vector) = effect.eoi {
        vm.io.eoi(vector);
    }
    if let Some(icr) = effect.send {
        send_ipi(vm, index, icr, x2apic);
    }
    if effect.interrupt {
        vm.vcpus[index as usize].raise(event::INTERRUPT);
    }
}
