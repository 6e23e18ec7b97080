//! The model-specific registers of the APIC: IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC.

use pyrite_x86::bits::msr;

use super::regs::{Regs, base, reg};
use super::{deliver, timer};
use crate::vm::{VmShared, lock};

/// Reads an MSR of the APIC. `None`: not one of its MSRs; `Some(Err)`: #GP(0).
pub fn msr_read(vm: &VmShared, index: u32, number: u32) -> Option<Result<u64, ()>> {
    let apic = &vm.vcpus.get(index as usize)?.apic;
    match number {
        msr::IA32_APIC_BASE => Some(Ok(lock(&apic.regs).apic_base)),
        msr::IA32_TSC_DEADLINE => Some(Ok(lock(&apic.regs).tsc_deadline)),
        msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            let n = (number - msr::X2APIC_FIRST) as usize;
            let now_ns = super::now_for_read(vm, n);
            let mut regs = lock(&apic.regs);
            if !regs.x2apic() {
                return Some(Err(()));
            }
            Some(match n {
                reg::ICR_LOW => Ok(regs.icr()),
                _ => regs.read(n, || now_ns).map(u64::from).map_err(|_| ()),
            })
        }
        _ => None,
    }
}

/// Writes an MSR of the APIC other than IA32_APIC_BASE, for which see [`set_apic_base`].
/// `None`: not one of its MSRs; `Some(Err)`: #GP(0).
pub fn msr_write(vm: &VmShared, index: u32, number: u32, value: u64) -> Option<Result<(), ()>> {
    let apic = &vm.vcpus.get(index as usize)?.apic;
    match number {
        msr::IA32_TSC_DEADLINE => {
            let armed = lock(&apic.regs).set_tsc_deadline(value);
            if armed {
                timer::armed(vm, index);
            }
            Some(Ok(()))
        }
        msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            let n = (number - msr::X2APIC_FIRST) as usize;
            Some(x2apic_write(vm, index, n, value))
        }
        _ => None,
    }
}

fn x2apic_write(vm: &VmShared, index: u32, n: usize, value: u64) -> Result<(), ()> {
    let apic = &vm.vcpus[index as usize].apic;
    let now_ns = super::now_for_write(vm, n);
    let effect = {
        let mut regs = lock(&apic.regs);
        if !regs.x2apic() {
            return Err(());
        }
        if n == reg::ICR_LOW {
            // Reserved bits 31:20, 17:16 and 13. Delivery status does not exist any more.
            if value & 0xfff3_2000 != 0 {
                return Err(());
            }
            regs.write_icr(value)
        } else {
            let value = u32::try_from(value).map_err(|_| ())?;
            regs.write(n, value, || now_ns).map_err(|_| ())?
        }
    };
    if effect.timer {
        timer::armed(vm, index);
    }
    deliver::apply(vm, index, effect, true);
    Ok(())
}

/// Checks and performs a write to IA32_APIC_BASE. The caller stores the value in
/// `Msrs::apic_base` and flushes its soft TLB if this returns `Ok`; `Err` is #GP(0).
///
/// Intel SDM Vol. 3A §10.4.4, §10.12.5 (transitions).
#[allow(
    clippy::result_unit_err,
    reason = "there is one way to fail: #GP(0), as for all MSRs"
)]
pub fn set_apic_base(vm: &VmShared, index: u32, value: u64) -> Result<(), ()> {
    let apic = &vm.vcpus.get(index as usize).ok_or(())?.apic;
    let address = ((1u64 << vm.maxphyaddr) - 1) & !0xfff;
    if value & !(address | base::BSP | base::EXTD | base::EN) != 0 {
        return Err(());
    }
    let has_x2apic = vm.cpuid.get(1, 0).is_none_or(|e| e.ecx >> 21 & 1 != 0);
    let (en, extd) = (value & base::EN != 0, value & base::EXTD != 0);
    let mut regs = lock(&apic.regs);
    let was = (regs.enabled(), regs.x2apic());
    match (was, (en, extd)) {
        // EXTD without EN never is valid.
        (_, (false, true)) => return Err(()),
        // Out of x2APIC mode only by disabling; into it only from xAPIC mode.
        ((true, true), (true, false)) | ((false, _), (true, true)) => return Err(()),
        _ if extd && !has_x2apic => return Err(()),
        _ => {}
    }
    enter_mode(&mut regs, value, was);
    Ok(())
}

fn enter_mode(regs: &mut Regs, value: u64, was: (bool, bool)) {
    regs.apic_base = value;
    match (was, (regs.enabled(), regs.x2apic())) {
        // What a disabled APIC held is lost.
        ((true, _), (false, _)) => regs.reset(),
        ((true, false), (true, true)) => regs.enter_x2apic(),
        _ => {}
    }
}
