//! `CpuState` from and to KVM.
//!
//! Order matters when writing: CR4 and EFER before what they guard, XCR0 before the XSAVE area,
//! the APIC base before the APIC page, the deadline after the mode, and the activity last.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs as KvmMsrs, kvm_debugregs,
    kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use pyrite_x86::bits::{cr0, cr4, efer, msr};
use pyrite_x86::{
    Activity, CpuState, InterruptShadow, Msrs, PendingEvent, Segment, TableReg, XSAVE_AREA_BYTES,
    gpr, sreg,
};

use super::{KvmVcpu, ioctl, os};
use crate::EngineError;

const KVM_SREGS2_FLAGS_PDPTRS_VALID: u64 = 1;
const KVM_X86_SHADOW_INT_MOV_SS: u8 = 1;
const KVM_X86_SHADOW_INT_STI: u8 = 2;
/// x2APIC enabled, in IA32_APIC_BASE. Intel SDM Vol. 3A §10.12.1.
const APIC_BASE_EXTD: u64 = 1 << 10;

fn from_segment(s: &kvm_segment) -> Segment {
    let attr = u32::from(s.type_ & 0xf)
        | u32::from(s.s & 1) << 4
        | u32::from(s.dpl & 3) << 5
        | u32::from(s.present & 1) << 7
        | u32::from(s.avl & 1) << 12
        | u32::from(s.l & 1) << 13
        | u32::from(s.db & 1) << 14
        | u32::from(s.g & 1) << 15
        | u32::from(s.unusable & 1) << 16;
    Segment {
        base: s.base,
        limit: s.limit,
        attr,
        selector: s.selector,
        reserved: [0; 3],
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.attr >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attr & 0xf) as u8,
        s: bit(4),
        dpl: s.dpl(),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
        padding: 0,
    }
}

fn from_table(t: &kvm_dtable) -> TableReg {
    TableReg {
        base: t.base,
        limit: u32::from(t.limit),
        reserved: 0,
    }
}

fn to_table(t: &TableReg) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit as u16,
        padding: [0; 3],
    }
}

/// The MSRs of `Msrs` with their places, in the order of writing.
fn msr_fields(m: &mut Msrs) -> Vec<(u32, &mut u64)> {
    let mut v: Vec<(u32, &mut u64)> = vec![
        (msr::STAR, &mut m.star),
        (msr::LSTAR, &mut m.lstar),
        (msr::CSTAR, &mut m.cstar),
        (msr::SFMASK, &mut m.sfmask),
        (msr::KERNEL_GS_BASE, &mut m.kernel_gs_base),
        (msr::IA32_SYSENTER_CS, &mut m.sysenter_cs),
        (msr::IA32_SYSENTER_ESP, &mut m.sysenter_esp),
        (msr::IA32_SYSENTER_EIP, &mut m.sysenter_eip),
        (msr::TSC_AUX, &mut m.tsc_aux),
        (msr::IA32_TSC_ADJUST, &mut m.tsc_adjust),
        (msr::IA32_PAT, &mut m.pat),
        (msr::IA32_MISC_ENABLE, &mut m.misc_enable),
        (msr::IA32_SPEC_CTRL, &mut m.spec_ctrl),
        (msr::IA32_DEBUGCTL, &mut m.debugctl),
        (msr::IA32_MTRR_DEF_TYPE, &mut m.mtrr_def_type),
        (msr::IA32_BIOS_SIGN_ID, &mut m.bios_sign_id),
        (msr::IA32_MCG_STATUS, &mut m.mcg_status),
        (msr::KVM_WALL_CLOCK_NEW, &mut m.kvm_wall_clock),
        (msr::KVM_SYSTEM_TIME_NEW, &mut m.kvm_system_time),
        (msr::KVM_POLL_CONTROL, &mut m.kvm_poll_control),
    ];
    for (n, field) in m.mtrr_var.iter_mut().enumerate() {
        v.push((msr::IA32_MTRR_PHYSBASE0 + n as u32, field));
    }
    // 250H, 258H, 259H, 268H-26FH. Intel SDM Vol. 3A §11.11.2.2.
    for (n, field) in m.mtrr_fixed.iter_mut().enumerate() {
        let n = n as u32;
        let index = match n {
            0 => msr::IA32_MTRR_FIX64K_00000,
            1 | 2 => msr::IA32_MTRR_FIX16K_80000 + n - 1,
            _ => msr::IA32_MTRR_FIX4K_C0000 + n - 3,
        };
        v.push((index, field));
    }
    v
}

impl KvmVcpu {
    /// Reads the MSRs `indices`; `None` for those that this KVM does not have.
    fn get_msrs(&self, indices: &[u32]) -> Result<Vec<Option<u64>>, EngineError> {
        let mut values = Vec::with_capacity(indices.len());
        while let Some(rest) = indices.get(values.len()..).filter(|r| !r.is_empty()) {
            let entries: Vec<kvm_msr_entry> = rest
                .iter()
                .map(|i| kvm_msr_entry {
                    index: *i,
                    ..Default::default()
                })
                .collect();
            let mut list = KvmMsrs::from_entries(&entries)
                .map_err(|e| EngineError::Internal(format!("MSR list: {e:?}")))?;
            // KVM stops at the first register that it does not know.
            let n = self
                .fd
                .get_msrs(&mut list)
                .map_err(os("read MSRs from KVM"))?;
            values.extend(list.as_slice().iter().take(n).map(|e| Some(e.data)));
            if n < rest.len() {
                values.push(None);
            }
        }
        Ok(values)
    }

    fn set_msr(&self, index: u32, data: u64) -> Result<bool, EngineError> {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let list = KvmMsrs::from_entries(&[entry])
            .map_err(|e| EngineError::Internal(format!("MSR list: {e:?}")))?;
        Ok(self.fd.set_msrs(&list).map_err(os("write an MSR in KVM"))? == 1)
    }

    pub(super) fn read_state(&mut self) -> Result<CpuState, EngineError> {
        let mut s = CpuState::reset(self.index, self.index == 0);
        self.read_registers(&mut s)?;
        self.read_msrs(&mut s)?;
        self.read_apic(&mut s)?;
        self.read_events(&mut s)?;
        Ok(s)
    }

    fn read_registers(&self, s: &mut CpuState) -> Result<(), EngineError> {
        let r = self.fd.get_regs().map_err(os("read registers from KVM"))?;
        s.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ];
        s.rip = r.rip;
        s.rflags = r.rflags;
        let q = self.read_sregs()?;
        for (n, seg) in [
            (sreg::ES, &q.es),
            (sreg::CS, &q.cs),
            (sreg::SS, &q.ss),
            (sreg::DS, &q.ds),
        ]
        .into_iter()
        .chain([(sreg::FS, &q.fs), (sreg::GS, &q.gs)])
        {
            s.seg[n] = from_segment(seg);
        }
        s.ldtr = from_segment(&q.ldt);
        s.tr = from_segment(&q.tr);
        s.gdtr = from_table(&q.gdt);
        s.idtr = from_table(&q.idt);
        s.cr0 = q.cr0;
        s.cr2 = q.cr2;
        s.cr3 = q.cr3;
        s.cr4 = q.cr4;
        s.cr8 = q.cr8;
        s.efer = q.efer;
        s.msrs.apic_base = q.apic_base;
        if q.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID != 0 {
            s.pdpte = q.pdptrs;
        }
        let d = self
            .fd
            .get_debug_regs()
            .map_err(os("read debug registers from KVM"))?;
        s.dr = [d.db[0], d.db[1], d.db[2], d.db[3], 0, 0, d.dr6, d.dr7];
        let x = self.fd.get_xcrs().map_err(os("read XCR0 from KVM"))?;
        if let Some(x) = x.xcrs.iter().take(x.nr_xcrs as usize).find(|x| x.xcr == 0) {
            s.xcr0 = x.value;
        }
        let area = ioctl::xsave(&self.fd, self.shared.xsave_bytes)
            .map_err(os("read the XSAVE area from KVM"))?;
        let n = area.len().min(XSAVE_AREA_BYTES);
        s.xsave.0[..n].copy_from_slice(&area[..n]);
        // Software-reserved bytes: KVM and the host kernel leave their own words there.
        s.xsave.0[416..512].fill(0);
        Ok(())
    }

    fn read_sregs(&self) -> Result<kvm_sregs2, EngineError> {
        if self.shared.has_sregs2 {
            return ioctl::sregs2(&self.fd).map_err(os("read system registers from KVM"));
        }
        let q = self
            .fd
            .get_sregs()
            .map_err(os("read system registers from KVM"))?;
        Ok(kvm_sregs2 {
            cs: q.cs,
            ds: q.ds,
            es: q.es,
            fs: q.fs,
            gs: q.gs,
            ss: q.ss,
            tr: q.tr,
            ldt: q.ldt,
            gdt: q.gdt,
            idt: q.idt,
            cr0: q.cr0,
            cr2: q.cr2,
            cr3: q.cr3,
            cr4: q.cr4,
            cr8: q.cr8,
            efer: q.efer,
            apic_base: q.apic_base,
            ..kvm_sregs2::default()
        })
    }

    fn read_msrs(&self, s: &mut CpuState) -> Result<(), EngineError> {
        let mut fields = msr_fields(&mut s.msrs);
        let indices: Vec<u32> = fields.iter().map(|(i, _)| *i).collect();
        for ((_, field), value) in fields.iter_mut().zip(self.get_msrs(&indices)?) {
            **field = value.unwrap_or(0);
        }
        let more = [msr::IA32_TSC, msr::IA32_XSS, msr::IA32_TSC_DEADLINE];
        let values = self.get_msrs(&more)?;
        let value = |n: usize| values.get(n).copied().flatten().unwrap_or(0);
        s.tsc = value(0);
        s.xss = value(1);
        s.apic.tsc_deadline = value(2);
        Ok(())
    }

    fn read_apic(&self, s: &mut CpuState) -> Result<(), EngineError> {
        let page = self
            .fd
            .get_lapic()
            .map_err(os("read the local APIC from KVM"))?;
        for (n, reg) in s.apic.regs.iter_mut().enumerate() {
            let mut b = [0u8; 4];
            for (k, b) in b.iter_mut().enumerate() {
                *b = page.regs[n * 16 + k] as u8;
            }
            *reg = u32::from_le_bytes(b);
        }
        // KVM's APIC timer counts a 1 GHz bus; the elapsed counts tell when it was started.
        let (initial, current) = (s.apic.regs[0x38], s.apic.regs[0x39]);
        let elapsed = u64::from(initial.saturating_sub(current)) * divisor(s.apic.regs[0x3e]);
        s.apic.timer_start_ns = (self.shared.clock)().saturating_sub(elapsed);
        Ok(())
    }

    fn read_events(&self, s: &mut CpuState) -> Result<(), EngineError> {
        let m = self
            .fd
            .get_mp_state()
            .map_err(os("read the activity state from KVM"))?;
        s.activity = match m.mp_state {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_INIT_RECEIVED
            | KVM_MP_STATE_SIPI_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        };
        if self.shut_down {
            s.activity = Activity::Shutdown;
        }
        let e = self
            .fd
            .get_vcpu_events()
            .map_err(os("read pending events from KVM"))?;
        if m.mp_state == KVM_MP_STATE_SIPI_RECEIVED {
            s.sipi_pending = Some(e.sipi_vector as u8);
        }
        s.interrupt_shadow = if e.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 {
            InterruptShadow::MovSs
        } else if e.interrupt.shadow & KVM_X86_SHADOW_INT_STI != 0 {
            InterruptShadow::Sti
        } else {
            InterruptShadow::None
        };
        s.nmi_blocked = e.nmi.masked != 0;
        s.nmi_pending = e.nmi.pending != 0 || e.nmi.injected != 0;
        s.pending_event = if e.exception.injected != 0 || e.exception.pending != 0 {
            Some(PendingEvent {
                vector: e.exception.nr,
                error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
                software: matches!(e.exception.nr, 3 | 4),
                external: false,
            })
        } else if e.interrupt.injected != 0 {
            Some(PendingEvent {
                vector: e.interrupt.nr,
                error_code: None,
                software: e.interrupt.soft != 0,
                external: e.interrupt.soft == 0,
            })
        } else {
            None
        };
        Ok(())
    }

    pub(super) fn write_state(&mut self, s: &CpuState) -> Result<(), EngineError> {
        self.write_sregs(s)?;
        self.write_registers(s)?;
        self.write_msrs(s)?;
        self.write_apic(s)?;
        self.write_events(s)?;
        self.shut_down = s.activity == Activity::Shutdown;
        Ok(())
    }

    fn write_sregs(&self, s: &CpuState) -> Result<(), EngineError> {
        let seg = |n: usize| to_segment(&s.seg[n]);
        let pae_paging = s.cr0 & cr0::PG != 0 && s.cr4 & cr4::PAE != 0 && s.efer & efer::LMA == 0;
        let q = kvm_sregs2 {
            cs: seg(sreg::CS),
            ds: seg(sreg::DS),
            es: seg(sreg::ES),
            fs: seg(sreg::FS),
            gs: seg(sreg::GS),
            ss: seg(sreg::SS),
            tr: to_segment(&s.tr),
            ldt: to_segment(&s.ldtr),
            gdt: to_table(&s.gdtr),
            idt: to_table(&s.idtr),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.msrs.apic_base,
            flags: if pae_paging {
                KVM_SREGS2_FLAGS_PDPTRS_VALID
            } else {
                0
            },
            pdptrs: if pae_paging { s.pdpte } else { [0; 4] },
        };
        let refused = |e: std::io::Error| {
            EngineError::BadState(format!(
                "KVM refuses the system registers ({e}): CR0 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x} \
                 APIC base {:#x}",
                s.cr0, s.cr3, s.cr4, s.efer, s.msrs.apic_base
            ))
        };
        if self.shared.has_sregs2 {
            return ioctl::set_sregs2(&self.fd, &q).map_err(refused);
        }
        let old = kvm_sregs {
            cs: q.cs,
            ds: q.ds,
            es: q.es,
            fs: q.fs,
            gs: q.gs,
            ss: q.ss,
            tr: q.tr,
            ldt: q.ldt,
            gdt: q.gdt,
            idt: q.idt,
            cr0: q.cr0,
            cr2: q.cr2,
            cr3: q.cr3,
            cr4: q.cr4,
            cr8: q.cr8,
            efer: q.efer,
            apic_base: q.apic_base,
            interrupt_bitmap: [0; 4],
        };
        self.fd.set_sregs(&old).map_err(|e| refused(e.into()))
    }

    fn write_registers(&self, s: &CpuState) -> Result<(), EngineError> {
        let g = |n: usize| s.gpr[n];
        let r = kvm_regs {
            rax: g(gpr::RAX),
            rbx: g(gpr::RBX),
            rcx: g(gpr::RCX),
            rdx: g(gpr::RDX),
            rsi: g(gpr::RSI),
            rdi: g(gpr::RDI),
            rsp: g(gpr::RSP),
            rbp: g(gpr::RBP),
            r8: g(gpr::R8),
            r9: g(gpr::R9),
            r10: g(gpr::R10),
            r11: g(gpr::R11),
            r12: g(gpr::R12),
            r13: g(gpr::R13),
            r14: g(gpr::R14),
            r15: g(gpr::R15),
            rip: s.rip,
            rflags: s.rflags,
        };
        self.fd.set_regs(&r).map_err(os("write registers to KVM"))?;
        let mut x = kvm_xcrs {
            nr_xcrs: 1,
            ..kvm_xcrs::default()
        };
        x.xcrs[0] = kvm_xcr {
            xcr: 0,
            value: s.xcr0,
            ..kvm_xcr::default()
        };
        self.fd
            .set_xcrs(&x)
            .map_err(|e| EngineError::BadState(format!("KVM refuses XCR0 = {:#x}: {e}", s.xcr0)))?;
        ioctl::set_xsave(&self.fd, self.shared.xsave_bytes, &s.xsave.0).map_err(|e| {
            EngineError::BadState(format!("KVM refuses the XSAVE area {:?}: {e}", s.xsave))
        })?;
        let d = kvm_debugregs {
            db: [s.dr[0], s.dr[1], s.dr[2], s.dr[3]],
            dr6: s.dr[6],
            dr7: s.dr[7],
            ..kvm_debugregs::default()
        };
        self.fd.set_debug_regs(&d).map_err(|e| {
            EngineError::BadState(format!(
                "KVM refuses DR6 {:#x}, DR7 {:#x}: {e}",
                s.dr[6], s.dr[7]
            ))
        })
    }

    fn write_msrs(&self, s: &CpuState) -> Result<(), EngineError> {
        let mut msrs = s.msrs.clone();
        let mut wanted: Vec<(u32, u64)> = msr_fields(&mut msrs)
            .into_iter()
            .map(|(i, v)| (i, *v))
            .collect();
        wanted.push((msr::IA32_XSS, s.xss));
        // Last: time goes on while the others are written.
        wanted.push((msr::IA32_TSC, s.tsc));
        for (index, value) in wanted {
            // A register that this KVM lacks may stay away as long as it holds nothing.
            if !self.set_msr(index, value)? && value != 0 {
                return Err(EngineError::BadState(format!(
                    "KVM refuses MSR {index:#x} = {value:#x}"
                )));
            }
        }
        Ok(())
    }

    fn write_apic(&self, s: &CpuState) -> Result<(), EngineError> {
        let mut regs = s.apic.regs;
        // The id register has two formats; the engine knows the id anyway.
        regs[0x2] = if s.msrs.apic_base & APIC_BASE_EXTD != 0 {
            self.index
        } else {
            self.index << 24
        };
        let mut page = kvm_lapic_state::default();
        for (n, reg) in regs.iter().enumerate() {
            for (k, b) in reg.to_le_bytes().into_iter().enumerate() {
                page.regs[n * 16 + k] = b as std::os::raw::c_char;
            }
        }
        self.fd
            .set_lapic(&page)
            .map_err(|e| EngineError::BadState(format!("KVM refuses the local APIC: {e}")))?;
        // Deadline mode: LVT timer bits 18:17 = 10b. Otherwise KVM ignores the register.
        if !self.set_msr(msr::IA32_TSC_DEADLINE, s.apic.tsc_deadline)? && s.apic.tsc_deadline != 0 {
            return Err(EngineError::BadState(
                "KVM refuses the TSC deadline".to_owned(),
            ));
        }
        Ok(())
    }

    fn write_events(&self, s: &CpuState) -> Result<(), EngineError> {
        let mp_state = match s.activity {
            Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
            Activity::Halted => KVM_MP_STATE_HALTED,
            Activity::WaitForSipi if s.sipi_pending.is_some() => KVM_MP_STATE_SIPI_RECEIVED,
            Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        };
        let mut e = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..kvm_vcpu_events::default()
        };
        e.interrupt.shadow = match s.interrupt_shadow {
            InterruptShadow::None => 0,
            InterruptShadow::Sti => KVM_X86_SHADOW_INT_STI,
            InterruptShadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS,
        };
        e.nmi.masked = u8::from(s.nmi_blocked);
        e.nmi.pending = u8::from(s.nmi_pending);
        if let Some(v) = s.sipi_pending {
            e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
            e.sipi_vector = u32::from(v);
        }
        match &s.pending_event {
            Some(p) if p.external || (p.software && !matches!(p.vector, 3 | 4)) => {
                e.interrupt.injected = 1;
                e.interrupt.nr = p.vector;
                e.interrupt.soft = u8::from(p.software);
            }
            Some(p) => {
                e.exception.injected = 1;
                e.exception.nr = p.vector;
                e.exception.has_error_code = u8::from(p.error_code.is_some());
                e.exception.error_code = p.error_code.unwrap_or(0);
            }
            None => {}
        }
        self.fd
            .set_vcpu_events(&e)
            .map_err(|e| EngineError::BadState(format!("KVM refuses the pending events: {e}")))?;
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(|e| EngineError::BadState(format!("KVM refuses the activity state: {e}")))
    }
}

/// Divide configuration register to divisor. Intel SDM Vol. 3A figure 10-10.
fn divisor(dcr: u32) -> u64 {
    match (dcr & 3) | (dcr >> 1 & 4) {
        7 => 1,
        n => 2 << n,
    }
}
