//! Stack frames that are built, checked and written as a whole: a far call or an event either
//! happens completely or leaves no trace in the guest's registers.

use pyrite_x86::{Segment, gpr, sreg};

use crate::exception::Exception;
use crate::mmu::Priv;
use crate::vcpu::SoftVcpu;

/// Most values of one frame: a call gate copies up to 31 parameters, and pushes four more.
const VALUES_MAX: usize = 36;

/// Values to push on a stack, current or new.
pub struct Frame {
    /// The stack segment they go to.
    pub ss: Segment,
    /// Stack pointer before the first push.
    sp: u64,
    mask: u64,
    size: usize,
    count: usize,
    values: [u64; VALUES_MAX],
}

impl Frame {
    /// On the current stack, elements of `size` bytes.
    pub fn current(v: &SoftVcpu, size: usize) -> Frame {
        let mut f = Frame::on(v.frame.cpu.seg[sreg::SS], v.frame.cpu.gpr[gpr::RSP], size);
        if v.long64() {
            f.mask = u64::MAX;
        }
        f
    }

    /// On the stack `ss:sp` (legacy modes).
    pub fn on(ss: Segment, sp: u64, size: usize) -> Frame {
        Frame {
            ss,
            sp,
            mask: if ss.db() { 0xffff_ffff } else { 0xffff },
            size,
            count: 0,
            values: [0; VALUES_MAX],
        }
    }

    /// On a 64-bit stack.
    pub fn on64(rsp: u64) -> Frame {
        Frame {
            mask: u64::MAX,
            ..Frame::on(Segment::default(), rsp, 8)
        }
    }

    /// Adds a value.
    pub fn push(&mut self, value: u64) {
        self.values[self.count] = value;
        self.count += 1;
    }

    /// Offset of the value pushed as number `n`.
    fn offset(&self, n: usize) -> u64 {
        self.sp.wrapping_sub(((n + 1) * self.size) as u64) & self.mask
    }

    fn slot(&self, v: &SoftVcpu, n: usize) -> Option<u64> {
        let at = self.offset(n);
        if self.mask == u64::MAX {
            let last = at.wrapping_add(self.size as u64 - 1);
            (v.canonical(at) && v.canonical(last)).then_some(at)
        } else {
            v.stack_slot(&self.ss, at, self.size as u64)
        }
    }

    /// All slots lie inside the segment; `#SS(code)` if not.
    pub fn check(&self, v: &SoftVcpu, code: u32) -> Result<(), Exception> {
        for n in 0..self.count {
            self.slot(v, n).ok_or(Exception::ss(code))?;
        }
        Ok(())
    }

    /// Writes all values, or none if a page faults.
    pub fn write(&self, v: &mut SoftVcpu, who: Priv) -> Result<(), Exception> {
        let mut at = [0u64; VALUES_MAX];
        for (n, a) in at[..self.count].iter_mut().enumerate() {
            *a = self.slot(v, n).ok_or(Exception::ss(0))?;
        }
        for &a in &at[..self.count] {
            v.probe_write(a, self.size, who)?;
        }
        for (&a, &value) in at[..self.count].iter().zip(&self.values) {
            v.write_uint(a, value, self.size, who)?;
        }
        Ok(())
    }

    /// Moves the stack pointer below the frame. Bits outside the stack's width are kept.
    pub fn commit(&self, v: &mut SoftVcpu) {
        let sp = self.sp.wrapping_sub((self.count * self.size) as u64);
        set_sp(v, sp, self.mask);
    }

    /// On whose behalf a stack at `cpl` is written.
    pub fn who(v: &SoftVcpu, cpl: u8) -> Priv {
        if cpl < 3 && v.frame.cpu.cpl() == 3 {
            Priv::System
        } else {
            Priv::Current
        }
    }
}

/// Sets the stack pointer's low bits.
pub fn set_sp(v: &mut SoftVcpu, sp: u64, mask: u64) {
    let r = &mut v.frame.cpu.gpr[gpr::RSP];
    *r = if mask == 0xffff {
        *r & !0xffff | sp & 0xffff
    } else {
        sp & mask
    };
}
