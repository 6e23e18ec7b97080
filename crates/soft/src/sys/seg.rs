//! Segmentation: logical to linear addresses, descriptor loads.

use pyrite_x86::bits::{cr0, cr4, efer, rflags};
use pyrite_x86::{Segment, sreg};

use crate::exception::Exception;
use crate::vcpu::SoftVcpu;

/// What an access wants of its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegAccess {
    /// Load.
    Read,
    /// Store or read-modify-write.
    Write,
}

impl SoftVcpu {
    /// 64-bit mode: EFER.LMA and CS.L.
    pub fn long64(&self) -> bool {
        self.frame.cpu.efer & efer::LMA != 0 && self.frame.cpu.seg[sreg::CS].l()
    }

    /// Real or virtual-8086 mode.
    pub fn real_or_v86(&self) -> bool {
        self.frame.cpu.cr0 & cr0::PE == 0 || self.frame.cpu.rflags & rflags::VM != 0
    }

    /// True if `lin` is canonical under the current paging depth.
    pub fn canonical(&self, lin: u64) -> bool {
        let shift = if self.frame.cpu.cr4 & cr4::LA57 != 0 {
            7
        } else {
            16
        };
        ((lin << shift) as i64 >> shift) as u64 == lin
    }

    /// Linear address of `len` bytes at `seg:offset`, with all checks of the segment and of
    /// canonicality. `offset` is already truncated to the address size.
    pub fn linear(
        &self,
        seg: usize,
        offset: u64,
        len: usize,
        access: SegAccess,
    ) -> Result<u64, Exception> {
        let s = &self.frame.cpu.seg[seg];
        let fault = || {
            if seg == sreg::SS {
                Exception::ss(0)
            } else {
                Exception::gp(0)
            }
        };
        if self.long64() {
            let base = if seg >= sreg::FS { s.base } else { 0 };
            let lin = base.wrapping_add(offset);
            let last = lin.wrapping_add(len.max(1) as u64 - 1);
            if !self.canonical(lin) || !self.canonical(last) {
                return Err(fault());
            }
            return Ok(lin);
        }
        let offset = offset & 0xffff_ffff;
        if !self.real_or_v86() {
            if s.unusable() {
                return Err(Exception::gp(0));
            }
            let code = s.ty() & 8 != 0;
            let bad = match access {
                SegAccess::Read => code && s.ty() & 2 == 0,
                SegAccess::Write => code || s.ty() & 2 == 0,
            };
            if bad {
                return Err(fault());
            }
        }
        let last = offset + len.max(1) as u64 - 1;
        if !within_limit(s, offset, last) {
            return Err(fault());
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

/// Limit check, expand-down data segments included. Intel SDM Vol. 3A §5.3.
fn within_limit(s: &Segment, first: u64, last: u64) -> bool {
    let limit = u64::from(s.limit);
    // Expand-down: a data segment (type 01xx) whose valid range is above the limit.
    if s.attr & Segment::S != 0 && s.ty() & 0xc == 4 {
        let top = if s.db() { 0xffff_ffff } else { 0xffff };
        first > limit && last <= top
    } else {
        last <= limit
    }
}
