//! Saved vCPU state: round trip, and what must be refused.

use super::*;

const FEATURES: u64 = 0x7;

fn refused(name: &str, change: impl FnOnce(&mut CpuState)) {
    let mut s = CpuState::reset(0, true);
    change(&mut s);
    let r = load(&save("vcpu0", &s), FEATURES);
    assert!(
        matches!(r, Err(StateError::Invalid { .. })),
        "{name} was accepted"
    );
}

#[test]
fn reset_state_round_trips() {
    for bootstrap in [true, false] {
        let s = CpuState::reset(3, bootstrap);
        assert_eq!(load(&save("vcpu3", &s), FEATURES).ok().as_ref(), Some(&s));
    }
}

#[test]
fn every_kind_of_field_round_trips() {
    let mut s = CpuState::reset(1, false);
    s.gpr = std::array::from_fn(|n| 0x0101_0101 * n as u64);
    s.sipi_pending = Some(0x9a);
    s.nmi_pending = true;
    s.interrupt_shadow = InterruptShadow::MovSs;
    s.pending_event = Some(PendingEvent {
        vector: 14,
        error_code: Some(2),
        software: false,
        external: false,
    });
    s.msrs.mtrr_fixed[10] = 0x0606_0606_0606_0606;
    s.msrs.mtrr_var[15] = 7;
    s.apic.regs[0x3f] = 5;
    s.apic.tsc_deadline = 1 << 40;
    s.xsave.0[XSAVE_AREA_BYTES - 1] = 0xee;
    assert_eq!(load(&save("vcpu1", &s), FEATURES).ok().as_ref(), Some(&s));
}

#[test]
fn impossible_states_are_refused() {
    refused("CR0 reserved bit", |s| s.cr0 |= 1 << 7);
    refused("PG without PE", |s| s.cr0 |= cr0::PG);
    refused("CR4 reserved bit", |s| s.cr4 |= 1 << 40);
    refused("VMXE", |s| s.cr4 |= cr4::VMXE);
    refused("LMA without paging", |s| s.efer |= efer::LMA | efer::LME);
    refused("EFER reserved bit", |s| s.efer |= 1 << 1);
    refused("CR3 above 52 bits", |s| s.cr3 = 1 << 60);
    refused("CR8", |s| s.cr8 = 16);
    refused("RFLAGS bit 1", |s| s.rflags = 0);
    refused("RFLAGS reserved", |s| s.rflags |= 1 << 40);
    refused("GDTR not canonical", |s| s.gdtr.base = 1 << 50);
    refused("LSTAR not canonical", |s| s.msrs.lstar = 1 << 60);
    refused("RIP beyond 4 GiB in real mode", |s| s.rip = 1 << 33);
    refused("IDTR limit", |s| s.idtr.limit = 0x1_0000);
    refused("segment reserved attributes", |s| s.seg[0].attr |= 1 << 20);
    refused("null CS", |s| s.seg[1].attr |= Segment::UNUSABLE);
    refused("TR that is a gate", |s| s.tr.attr = 0x8c);
    refused("XCR0 without x87", |s| s.xcr0 = 2);
    refused("AVX without SSE", |s| s.xcr0 = 5);
    refused("XCR0 beyond CPUID", |s| s.xcr0 = 0xe7);
    refused("MXCSR", |s| s.xsave.0[27] = 1);
    refused("compacted XSAVE header", |s| s.xsave.0[527] = 0x80);
    refused("PAT type", |s| s.msrs.pat = 2);
    refused("x2APIC without APIC", |s| s.msrs.apic_base = 0xfee0_0400);
    refused("SIPI for a running processor", |s| s.sipi_pending = Some(1));
    refused("external event with an error code", |s| {
        s.pending_event = Some(PendingEvent {
            vector: 0x30,
            error_code: Some(1),
            software: false,
            external: true,
        });
    });
}

#[test]
fn damaged_bodies_are_errors() {
    let good = save("vcpu0", &CpuState::reset(0, true));
    for n in (0..good.body.len()).step_by(7) {
        let mut cut = good.clone();
        cut.body.truncate(n);
        assert!(load(&cut, FEATURES).is_err());
    }
    // Any flipped byte either decodes to a checked state or is an error; it never panics.
    for n in 0..good.body.len() {
        let mut flipped = good.clone();
        flipped.body[n] ^= 0xff;
        let _ = load(&flipped, FEATURES);
    }
    let mut newer = good.clone();
    newer.min_reader = VERSION + 1;
    assert!(matches!(
        load(&newer, FEATURES),
        Err(StateError::TooNew { .. })
    ));
}
