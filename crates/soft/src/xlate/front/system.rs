//! Instructions with a path of their own in `fast.rs`, or that are a few moves in the frame.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::{Depends, Front, T0, T1};
use crate::xlate::fast::Path;
use crate::xlate::{layout, mode};

/// How an instruction is done without the interpreter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// A path that returns here.
    Call(Path),
    /// A path that goes on elsewhere, from an instruction that changes the view.
    View(Path),
    /// A path that goes on elsewhere.
    Jump(Path),
    /// SWAPGS.
    Swapgs,
    /// CLD.
    Cld,
}

/// What serves an instruction in a mode, if anything does.
pub fn handles(i: &Instruction, m: u32) -> Option<System> {
    use System::{Call, Cld, Jump, Swapgs, View};
    if m & mode::CODE64 == 0 {
        return None;
    }
    let user = m & mode::VIEW == crate::frame::View::User as u32;
    // The processor has BMI2 or not; the paths need none of it.
    let repeated = i.has_rep_prefix() && !i.has_repne_prefix();
    let moves = repeated
        && i.op0_kind() == OpKind::MemoryESRDI
        && i.op1_kind() == OpKind::MemorySegRSI
        && i.memory_segment() == Register::DS;
    let fills = repeated && i.op0_kind() == OpKind::MemoryESRDI;
    Some(match i.code() {
        Code::Movsb_m8_m8 if moves => Call(Path::Movs0),
        Code::Movsw_m16_m16 if moves => Call(Path::Movs1),
        Code::Movsd_m32_m32 if moves => Call(Path::Movs2),
        Code::Movsq_m64_m64 if moves => Call(Path::Movs3),
        Code::Stosb_m8_AL if fills => Call(Path::Stos0),
        Code::Stosw_m16_AX if fills => Call(Path::Stos1),
        Code::Stosd_m32_EAX if fills => Call(Path::Stos2),
        Code::Stosq_m64_RAX if fills => Call(Path::Stos3),
        Code::Rdtsc => Call(Path::Rdtsc),
        Code::Rdtscp => Call(Path::Rdtscp),
        Code::Stac if !user => View(Path::Stac),
        Code::Clac if !user => View(Path::Clac),
        Code::Syscall if user => Jump(Path::Syscall),
        Code::Sysretq if !user => Jump(Path::Sysret),
        Code::Swapgs if !user => Swapgs,
        Code::Cld => Cld,
        _ => return None,
    })
}

impl System {
    /// The interpreter may get to do it.
    pub fn may_step(self) -> bool {
        !matches!(self, System::Swapgs | System::Cld)
    }

    /// The block ends with it.
    pub fn ends_block(self) -> bool {
        matches!(self, System::View(_) | System::Jump(_))
    }
}

impl Front<'_> {
    pub(super) fn system(&mut self, i: &Instruction, what: System, flags_live: bool) {
        let next = self.wrap_ip(i.next_ip());
        self.t1_run = None;
        match what {
            System::Call(path) => {
                self.prepare_step(i);
                self.t.e.mov_imm(T1, layout::tlb(self.view) as u64);
                self.t.e.call_frame(layout::fast(path));
            }
            System::View(path) => {
                // Not of user code, which alone is moved.
                self.t.e.fixed = true;
                self.t.e.mov_imm(T0, next);
                self.t.e.mov_imm(T1, 8 * layout::jump_slot(next) as u64);
                self.t.e.jmp_frame(layout::fast(path));
            }
            System::Jump(path) => {
                self.t.e.store_rip(layout::RIP, i.ip(), T0);
                self.t.e.mov_rip(T0, next, Depends::Rip);
                self.t.e.jmp_frame(layout::fast(path));
            }
            System::Swapgs => {
                let gs = layout::seg_base(pyrite_x86::sreg::GS);
                self.t.e.load(T0, gs);
                self.t.e.load(T1, layout::KERNEL_GS_BASE);
                self.t.e.store(gs, T1);
                self.t.e.store(layout::KERNEL_GS_BASE, T0);
            }
            System::Cld => {
                if flags_live {
                    self.t.e.save_flags();
                }
                self.t.e.and_frame8(layout::RFLAGS + 1, !4);
                if flags_live {
                    self.t.e.restore_flags();
                }
            }
        }
    }
}
