//! CLI, STI, PUSHF and POPF at the privilege levels where they cannot fault on IOPL.
//!
//! The translator runs at CPL 0 and 3 only. At CPL 3, CLI and STI depend on IOPL and PVI and are
//! left to the interpreter; POPF changes neither IF nor IOPL there.

use iced_x86::{Code, Instruction};
use pyrite_x86::bits::rflags;

use super::{Cold, Decoded, Front, HOST_SP};
use crate::xlate::emit::{T0, T1};
use crate::xlate::{layout, mode};

/// Flags whose change by POPF changes how the following code runs: left to the interpreter.
const RARE: u64 = rflags::TF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::RF
    | rflags::VM
    | rflags::AC
    | rflags::ID;

/// True for the instructions of this module, in the modes where they are handled.
pub fn handles(i: &Instruction, m: u32) -> bool {
    let code64 = m & mode::CODE64 != 0;
    let user = m & mode::VIEW == crate::frame::View::User as u32;
    match i.code() {
        Code::Cli | Code::Sti => !user,
        Code::Pushfq | Code::Popfq => code64,
        Code::Pushfd | Code::Popfd => !code64,
        _ => false,
    }
}

impl Front<'_> {
    pub(super) fn flag_insn(&mut self, d: &Decoded) {
        let i = &d.i;
        let next = self.wrap_ip(i.next_ip());
        match i.code() {
            Code::Cli => {
                if d.live != 0 {
                    self.t.e.save_flags();
                }
                self.t.e.and_frame8(layout::RFLAGS + 1, !2);
                if d.live != 0 {
                    self.t.e.restore_flags();
                }
            }
            Code::Sti => {
                // The flags that leave with `Waiting` are live after STI, whatever the block does.
                self.t.e.save_flags();
                self.t.e.or_frame8(layout::RFLAGS + 1, 2);
                self.t.e.cmp_frame32_zero(layout::IRQ_WAITING);
                let at = self.t.e.label();
                self.t.e.restore_flags_if_nonzero(at);
                self.t.cold.push(Cold::Waiting {
                    at,
                    rip: next,
                    shadow: true,
                });
            }
            Code::Pushfq | Code::Pushfd => {
                self.t.e.save_flags();
                self.t.e.host_flags_to(T0);
                self.t.e.and32(T0, rflags::ARITH as u32);
                self.t.e.load(T1, layout::RFLAGS);
                self.t
                    .e
                    .and32(T1, !(rflags::ARITH | rflags::VM | rflags::RF) as u32);
                self.t.e.or(T0, T1);
                self.t.e.store(layout::VALUE, T0);
                self.t.e.restore_flags();
                self.push_frame(d, layout::VALUE, d.live != 0);
            }
            _ => self.popf(d, next),
        }
    }

    fn popf(&mut self, d: &Decoded, next: u64) {
        let user = self.view == crate::frame::View::User as usize;
        let slot = self.slot() as i32;
        // POPF overwrites all arithmetic flags, but until it has succeeded they must survive.
        let from = self.pop_check(HOST_SP, true);
        self.t.e.load_mem(T0, from, self.code64);
        self.t.e.save_flags();
        self.t.e.mov(T1, T0, false);
        self.t.e.xor_frame32(T1, layout::RFLAGS);
        let rare = if user {
            RARE & !(rflags::IOPL | rflags::RF | rflags::VM)
        } else {
            RARE
        };
        self.t.e.test32(T1, rare as u32);
        let (refuse, waiting) = (self.t.e.label(), self.t.e.label());
        self.t.e.restore_flags_if_nonzero(refuse);
        self.t.cold.push(Cold::Interpret {
            at: refuse,
            rip: d.i.ip(),
        });
        self.move_sp(slot);
        if !user {
            // IF: bit 9 of the image to bit 9 of RFLAGS, through T1.
            self.t.e.load(T1, layout::RFLAGS);
            self.t.e.and32(T1, !(rflags::IF as u32));
            self.t.e.store(layout::VALUE, T0);
            self.t.e.and32(T0, rflags::IF as u32);
            self.t.e.or(T1, T0);
            self.t.e.store(layout::RFLAGS, T1);
            // Waiting and now enabled?
            self.t.e.load32(T1, layout::IRQ_WAITING);
            self.t.e.shl32(T1, 9);
            self.t.e.and(T0, T1);
            self.t.e.store(layout::TARGET, T0);
            self.t.e.load(T0, layout::VALUE);
        }
        self.t.e.image_to_flags(T0);
        if !user {
            self.t.e.store(layout::SAVE_RCX, 1);
            self.t.e.load(1, layout::TARGET);
            self.t.e.jrcxz_over(|e| {
                e.load(1, layout::SAVE_RCX);
                e.jmp(waiting);
            });
            self.t.e.load(1, layout::SAVE_RCX);
            self.t.cold.push(Cold::Waiting {
                at: waiting,
                rip: next,
                shadow: false,
            });
        }
    }
}
