//! `CpuState`: everything architectural about one vCPU, in one form for every engine.
//!
//! A VM saved on one engine restores on the other because both read and write this structure.
//! It is `repr(C)` so that translated code can address its fields by constant offsets.

/// General-purpose register numbers, in encoding order. Intel SDM Vol. 2A table 2-8.
#[allow(missing_docs, reason = "register names")]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// Segment register numbers, in encoding order (`Sreg`). Intel SDM Vol. 2D table B-8.
#[allow(missing_docs, reason = "register names")]
pub mod sreg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// A segment register with its hidden part.
///
/// `attr` has the layout of VMX access rights (Intel SDM Vol. 3C §24.4.1): bits 3:0 type, 4 S,
/// 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable (a null selector was loaded).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive, with granularity already applied.
    pub limit: u32,
    /// Access rights, see the type's documentation.
    pub attr: u32,
    /// The visible selector.
    pub selector: u16,
    /// Keeps the layout explicit.
    pub reserved: [u16; 3],
}

#[allow(missing_docs, reason = "bit names of the manual")]
impl Segment {
    pub const TYPE: u32 = 0xf;
    pub const S: u32 = 1 << 4;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;

    /// A segment as real mode and virtual-8086 mode load it: base = selector × 16, 64 KiB.
    pub fn real(selector: u16, attr: u32) -> Segment {
        Segment {
            base: u64::from(selector) << 4,
            limit: 0xffff,
            attr,
            selector,
            reserved: [0; 3],
        }
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attr >> 5) & 3) as u8
    }
    /// Descriptor type field (4 bits).
    pub fn ty(&self) -> u32 {
        self.attr & Self::TYPE
    }
    /// True when a null selector was loaded.
    pub fn unusable(&self) -> bool {
        self.attr & Self::UNUSABLE != 0
    }
    /// Default operand size (code) or stack size (SS): true = 32 bit.
    pub fn db(&self) -> bool {
        self.attr & Self::DB != 0
    }
    /// 64-bit code segment.
    pub fn l(&self) -> bool {
        self.attr & Self::L != 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableReg {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u32,
    /// Keeps the layout explicit.
    pub reserved: u32,
}

/// Model-specific registers that are plain storage or not held elsewhere in [`CpuState`].
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names of the manual")]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub apic_base: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    /// PHYSBASE0, PHYSMASK0, PHYSBASE1, …
    pub mtrr_var: [u64; 16],
    /// 64K_00000, 16K_80000, 16K_A0000, 4K_C0000 … 4K_F8000.
    pub mtrr_fixed: [u64; 11],
    pub bios_sign_id: u64,
    pub mcg_status: u64,
    pub kvm_wall_clock: u64,
    pub kvm_system_time: u64,
    pub kvm_poll_control: u64,
}

/// What the processor is doing between instructions.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running = 0,
    /// After HLT, until an interrupt.
    Halted = 1,
    /// After INIT, until a start-up IPI (an application processor's reset state).
    WaitForSipi = 2,
    /// After a triple fault.
    Shutdown = 3,
}

/// Blocking of events for one instruction. Intel SDM Vol. 3A §6.8.3.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InterruptShadow {
    /// No blocking.
    #[default]
    None = 0,
    /// The instruction after an STI that set IF.
    Sti = 1,
    /// The instruction after MOV SS or POP SS; also blocks debug traps.
    MovSs = 2,
}

/// The local APIC, in the layout of its register page.
///
/// `regs[n]` is the 32-bit register at offset `n * 16`. Intel SDM Vol. 3A table 10-1.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApicState {
    /// Register page, one word per 16 bytes.
    pub regs: [u32; 64],
    /// IA32_TSC_DEADLINE; 0 = disarmed.
    pub tsc_deadline: u64,
    /// Guest time, in ns of the VM clock, at which the count-down timer was last (re)started.
    pub timer_start_ns: u64,
}

impl Default for ApicState {
    fn default() -> Self {
        ApicState {
            regs: [0; 64],
            tsc_deadline: 0,
            timer_start_ns: 0,
        }
    }
}

/// Size in bytes of the XSAVE area: legacy 512, header 64, AVX, AVX-512, PKRU in the standard
/// (non-compacted) format. Intel SDM Vol. 1 §13.4.
pub const XSAVE_AREA_BYTES: usize = 4096;

/// XSAVE area in the standard (non-compacted) format.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct XsaveArea(pub [u8; XSAVE_AREA_BYTES]);

impl Default for XsaveArea {
    /// Power-on: FCW = 037FH as after FNINIT would be wrong; RESET gives 0040H. MXCSR = 1F80H.
    fn default() -> Self {
        let mut a = [0u8; XSAVE_AREA_BYTES];
        a[0] = 0x40; // FCW after RESET, SDM Vol. 3A table 9-1
        a[4] = 0xff; // abridged FTW: RESET tags all registers valid (FTW = 5555H)
        a[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        // XSTATE_BV: x87 and SSE hold non-initial or explicit values.
        a[512] = 0x3;
        XsaveArea(a)
    }
}

impl std::fmt::Debug for XsaveArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bv = u64::from_le_bytes(self.0[512..520].try_into().unwrap_or([0; 8]));
        write!(f, "XsaveArea(XSTATE_BV={bv:#x})")
    }
}

/// The complete architectural state of one vCPU.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names of the manual")]
pub struct CpuState {
    /// In encoding order: RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub xss: u64,
    /// In encoding order: ES CS SS DS FS GS.
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableReg,
    pub idtr: TableReg,
    /// DR0-DR3 at their numbers, DR6 and DR7 at theirs.
    pub dr: [u64; 8],
    /// The PDPTEs that PAE paging loads with CR3. Intel SDM Vol. 3A §4.4.1.
    pub pdpte: [u64; 4],
    pub msrs: Msrs,
    /// Guest TSC at the moment the state was read, in cycles.
    pub tsc: u64,
    pub activity: Activity,
    pub interrupt_shadow: InterruptShadow,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// An NMI is latched.
    pub nmi_pending: bool,
    /// A start-up IPI is latched: its vector.
    pub sipi_pending: Option<u8>,
    /// An event whose delivery was interrupted by the save and must be taken up again.
    pub pending_event: Option<PendingEvent>,
    pub apic: ApicState,
    pub xsave: XsaveArea,
}

/// An exception or interrupt that was accepted but not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingEvent {
    /// Vector, 0-255.
    pub vector: u8,
    /// Error code, for the exceptions that push one.
    pub error_code: Option<u32>,
    /// INT n, INT3 or INTO.
    pub software: bool,
    /// Accepted from the APIC or the PIC.
    pub external: bool,
}

impl CpuState {
    /// State after RESET. Intel SDM Vol. 3A table 9-1.
    ///
    /// `bootstrap`: the processor starts at FFFF_FFF0H; others wait for a start-up IPI.
    /// `apic_id` is both the x2APIC id and, in its low byte, the xAPIC id.
    pub fn reset(apic_id: u32, bootstrap: bool) -> CpuState {
        let data = Segment::real(0, 0x93);
        let mut s = CpuState {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: bits::rflags::FIXED1,
            cr0: bits::cr0::ET | bits::cr0::NW | bits::cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            xcr0: 1,
            xss: 0,
            seg: [data; 6],
            ldtr: Segment::real(0, 0x82),
            tr: Segment::real(0, 0x8b),
            gdtr: TableReg {
                base: 0,
                limit: 0xffff,
                reserved: 0,
            },
            idtr: TableReg {
                base: 0,
                limit: 0xffff,
                reserved: 0,
            },
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            pdpte: [0; 4],
            msrs: Msrs::default(),
            tsc: 0,
            activity: if bootstrap {
                Activity::Running
            } else {
                Activity::WaitForSipi
            },
            interrupt_shadow: InterruptShadow::None,
            nmi_blocked: false,
            nmi_pending: false,
            sipi_pending: None,
            pending_event: None,
            apic: ApicState::default(),
            xsave: XsaveArea::default(),
        };
        s.seg[sreg::CS] = Segment {
            base: 0xffff_0000,
            limit: 0xffff,
            attr: 0x9b,
            selector: 0xf000,
            reserved: [0; 3],
        };
        s.msrs.pat = 0x0007_0406_0007_0406;
        s.msrs.misc_enable = 1;
        s.msrs.apic_base = 0xfee0_0000 | 1 << 11 | if bootstrap { 1 << 8 } else { 0 };
        s.apic.regs[0x2] = apic_id << 24;
        s.apic.regs[0x3] = 0x0005_0014; // version 14H, 6 LVT entries
        s.apic.regs[0xe] = 0xffff_ffff; // DFR: flat
        s.apic.regs[0xf] = 0xff; // SVR: software-disabled
        for lvt in 0x32..=0x37 {
            s.apic.regs[lvt] = 1 << 16; // masked
        }
        s
    }

    /// Current privilege level: the DPL of SS (Intel SDM Vol. 3A §5.5), 3 in virtual-8086 mode.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & bits::cr0::PE == 0 {
            0
        } else if self.rflags & bits::rflags::VM != 0 {
            3
        } else {
            self.seg[sreg::SS].dpl()
        }
    }
}

use crate::bits;
