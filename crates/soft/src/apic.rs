//! Local APICs, inter-processor interrupts, APIC timers, guest TSC.

use std::sync::Arc;
use std::time::Duration;

use pyrite_engine::EngineError;
use pyrite_x86::ApicState;

use crate::vm::VmShared;

/// One local APIC. Interior lock: any thread may deliver to it.
pub struct Apic {}

impl Apic {
    /// In its reset state.
    pub fn new(id: u32) -> Apic {
        let _ = id;
        Apic {}
    }
    /// Takes the highest pending interrupt above the processor priority: IRR to ISR.
    pub fn acknowledge(&self) -> Option<u8> {
        None
    }
    /// LINT0 passes the PIC's interrupts (virtual wire), or the APIC is disabled.
    pub fn accepts_extint(&self) -> bool {
        true
    }
    /// Saved form.
    pub fn save(&self) -> ApicState {
        ApicState::default()
    }
    /// Takes a saved form and IA32_APIC_BASE over.
    pub fn restore(&self, state: &ApicState, apic_base: u64) {
        let _ = (state, apic_base);
    }
}

/// Register load in the xAPIC page.
pub fn mmio_read(vm: &VmShared, index: u32, offset: u64, out: &mut [u8]) {
    let _ = (vm, index, offset);
    out.fill(0);
}

/// Register store in the xAPIC page.
pub fn mmio_write(vm: &VmShared, index: u32, offset: u64, data: &[u8]) {
    let _ = (vm, index, offset, data);
}

/// Delivers a message-signalled interrupt.
pub fn deliver_msi(vm: &VmShared, addr: u64, data: u32) {
    let _ = (vm, addr, data);
}

/// Time until the APIC timer of a vCPU expires.
pub fn time_to_timer(vm: &VmShared, index: u32) -> Option<Duration> {
    let _ = (vm, index);
    None
}

/// Fires the APIC timer if it has expired.
pub fn poll_timer(vm: &VmShared, index: u32) {
    let _ = (vm, index);
}

/// Starts the thread that watches the APIC timers of running vCPUs.
pub fn start_timer_thread(vm: &Arc<VmShared>) -> Result<(), EngineError> {
    let _ = vm;
    Ok(())
}

/// Frequency of the host's TSC in kHz.
pub fn host_tsc_khz() -> u64 {
    1_000_000
}

/// Offset that makes the guest TSC start near 0.
pub fn initial_tsc_offset() -> i64 {
    0
}

/// The guest TSC now.
pub fn guest_tsc(vm: &VmShared) -> u64 {
    let _ = vm;
    0
}

/// Sets the guest TSC (restore).
pub fn set_guest_tsc(vm: &VmShared, tsc: u64) {
    let _ = (vm, tsc);
}
