//! Segmentation: logical to linear addresses, descriptor loads. Intel SDM Vol. 3A chapter 3, 5.

use pyrite_x86::bits::{cr0, cr4, efer, rflags};
use pyrite_x86::{Segment, sreg};

use crate::exception::Exception;
use crate::mmu::Priv;
use crate::vcpu::SoftVcpu;

/// System descriptor types. Intel SDM Vol. 3A table 3-2.
#[allow(missing_docs, reason = "names of the manual")]
pub mod system {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS32: u32 = 9;
    pub const TSS32_BUSY: u32 = 11;
    pub const CALL_GATE32: u32 = 12;
    pub const INT_GATE32: u32 = 14;
    pub const TRAP_GATE32: u32 = 15;
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// The first eight bytes.
    pub low: u64,
    /// Bytes 8-15 of a 16-byte system descriptor, else 0.
    pub high: u64,
    /// Its linear address.
    pub addr: u64,
}

impl Descriptor {
    /// Type field.
    pub fn ty(&self) -> u32 {
        (self.low >> 40 & 0xf) as u32
    }
    /// A code or data segment (S = 1).
    pub fn is_segment(&self) -> bool {
        self.low & 1 << 44 != 0
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.is_segment() && self.ty() & 8 != 0
    }
    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.ty() & 4 != 0
    }
    /// A writable data segment.
    pub fn is_writable_data(&self) -> bool {
        self.is_segment() && self.ty() & 0xa == 2
    }
    /// A data segment or a readable code segment.
    pub fn is_readable(&self) -> bool {
        self.is_segment() && (self.ty() & 8 == 0 || self.ty() & 2 != 0)
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    /// Present.
    pub fn present(&self) -> bool {
        self.low & 1 << 47 != 0
    }
    /// 64-bit code segment.
    pub fn l(&self) -> bool {
        self.low & 1 << 53 != 0
    }
    /// D/B.
    pub fn db(&self) -> bool {
        self.low & 1 << 54 != 0
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let raw = (self.low & 0xffff | self.low >> 32 & 0xf_0000) as u32;
        if self.low & 1 << 55 != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }
    /// Base address.
    pub fn base(&self) -> u64 {
        (self.low >> 16 & 0xff_ffff) | (self.low >> 32 & 0xff00_0000) | (self.high << 32)
    }
    /// Gates: the selector.
    pub fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    /// Gates: the offset.
    pub fn gate_offset(&self) -> u64 {
        let low = self.low & 0xffff;
        if self.ty() & 8 == 0 {
            low
        } else {
            low | (self.low >> 32 & 0xffff_0000) | (self.high << 32)
        }
    }
    /// The segment register that a load of this descriptor makes; `accessed` was set.
    pub fn segment(&self, selector: u16) -> Segment {
        let accessed = u32::from(self.is_segment());
        Segment {
            base: self.base(),
            limit: self.limit(),
            attr: (self.low >> 40) as u32 & 0xf0ff | accessed,
            selector,
            reserved: [0; 3],
        }
    }
}

/// A segment register that holds a null selector; `dpl` matters for SS, whose DPL is the CPL.
pub fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: 0,
        attr: Segment::UNUSABLE | u32::from(dpl) << 5,
        selector,
        reserved: [0; 3],
    }
}

/// Access rights of segments in virtual-8086 mode: present, DPL 3, read/write data, accessed.
pub const V86_ATTR: u32 = 0xf3;

/// Makes the exception for a selector: `Exception::gp` and its siblings.
pub type Fault = fn(u32) -> Exception;

/// The error code that names a selector.
pub fn code(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

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

impl SoftVcpu {
    /// IA-32e mode: EFER.LMA.
    pub fn lma(&self) -> bool {
        self.frame.cpu.efer & efer::LMA != 0
    }

    /// Virtual-8086 mode.
    pub fn v86(&self) -> bool {
        self.frame.cpu.cr0 & cr0::PE != 0 && self.frame.cpu.rflags & rflags::VM != 0
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.frame.cpu.rflags >> 12 & 3) as u8
    }

    /// Linear address of a descriptor's `len` bytes, if the table holds it.
    fn descriptor_address(&self, selector: u16, len: u64) -> Option<u64> {
        let c = &self.frame.cpu;
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 == 0 {
            (c.gdtr.base, c.gdtr.limit)
        } else if c.ldtr.unusable() {
            return None;
        } else {
            (c.ldtr.base, c.ldtr.limit)
        };
        (offset + len - 1 <= u64::from(limit)).then(|| self.wrap_system(base.wrapping_add(offset)))
    }

    /// Linear addresses of tables are 32 bits wide outside IA-32e mode.
    pub fn wrap_system(&self, lin: u64) -> u64 {
        if self.lma() { lin } else { lin & 0xffff_ffff }
    }

    /// Reads an 8-byte descriptor; `fault(selector)` if it lies outside its table.
    pub fn descriptor(&mut self, selector: u16, fault: Fault) -> Result<Descriptor, Exception> {
        let addr = self
            .descriptor_address(selector, 8)
            .ok_or_else(|| fault(code(selector)))?;
        let low = self.read_uint(addr, 8, Priv::System)?;
        Ok(Descriptor { low, high: 0, addr })
    }

    /// Adds bytes 8-15 of a system descriptor in IA-32e mode. Intel SDM Vol. 3A §5.8.3.1: the
    /// type field of the upper half must be 0.
    pub fn widen(
        &mut self,
        d: Descriptor,
        selector: u16,
        fault: Fault,
    ) -> Result<Descriptor, Exception> {
        if !self.lma() {
            return Ok(d);
        }
        let addr = self
            .descriptor_address(selector, 16)
            .ok_or_else(|| fault(code(selector)))?;
        let upper = self.read_uint(addr.wrapping_add(8), 8, Priv::System)?;
        if upper >> 40 & 0x1f != 0 {
            return Err(fault(code(selector)));
        }
        Ok(Descriptor {
            high: upper & 0xffff_ffff,
            ..d
        })
    }

    /// Changes the type byte (bits 47:40) of a descriptor in memory, atomically.
    pub fn update_type(&mut self, addr: u64, set: u8, clear: u8) -> Result<(), Exception> {
        let at = self.wrap_system(addr.wrapping_add(5));
        self.probe_write(at, 1, Priv::System)?;
        self.exclusive(|v| {
            let old = v.read_uint(at, 1, Priv::System)?;
            let new = old & !u64::from(clear) | u64::from(set);
            v.write_uint(at, new, 1, Priv::System)
        })
    }

    /// Sets the accessed bit of a segment descriptor if it is clear.
    pub fn set_accessed(&mut self, d: &Descriptor) -> Result<(), Exception> {
        if d.is_segment() && d.ty() & 1 == 0 {
            self.update_type(d.addr, 1, 0)?;
        }
        Ok(())
    }

    /// What a load of ES, SS, DS, FS or GS puts into the register: all checks, no state changed
    /// but the accessed bit. Intel SDM Vol. 2B, MOV.
    pub fn data_segment(&mut self, n: usize, selector: u16) -> Result<Segment, Exception> {
        if self.frame.cpu.cr0 & cr0::PE == 0 {
            let old = self.frame.cpu.seg[n];
            if old.unusable() {
                return Ok(Segment::real(selector, 0x93));
            }
            // Only the base changes: limits outlive a switch to real mode ("unreal mode").
            return Ok(Segment {
                base: u64::from(selector) << 4,
                selector,
                ..old
            });
        }
        if self.v86() {
            return Ok(Segment::real(selector, V86_ATTR));
        }
        if n == sreg::SS {
            return self.stack_segment(selector, self.frame.cpu.cpl(), Exception::gp, 0);
        }
        if selector & 0xfffc == 0 {
            return Ok(null_segment(selector, 0));
        }
        let d = self.descriptor(selector, Exception::gp)?;
        let rpl = (selector & 3) as u8;
        let too_low = !d.is_conforming() && (rpl > d.dpl() || self.frame.cpu.cpl() > d.dpl());
        if !d.is_readable() || too_low {
            return Err(Exception::gp(code(selector)));
        }
        if !d.present() {
            return Err(Exception::np(code(selector)));
        }
        self.set_accessed(&d)?;
        Ok(d.segment(selector))
    }

    /// Checks a stack segment for use at `cpl`. `fault` is #GP, or #TS where the selector comes
    /// from a TSS; `ext` is added to error codes. A null selector is good only for MOV SS and
    /// returns to 64-bit mode, which is decided by [`SoftVcpu::long64`] of the present mode.
    pub fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: Fault,
        ext: u32,
    ) -> Result<Segment, Exception> {
        let rpl = (selector & 3) as u8;
        if selector & 0xfffc == 0 {
            if self.long64() && cpl < 3 && rpl == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(fault(ext));
        }
        let err = code(selector) | ext;
        let d = self
            .descriptor(selector, fault)
            .map_err(|e| e.with_ext(ext))?;
        if rpl != cpl || d.dpl() != cpl || !d.is_writable_data() {
            return Err(fault(err));
        }
        if !d.present() {
            return Err(Exception::ss(err));
        }
        self.set_accessed(&d)?;
        Ok(d.segment(selector))
    }

    /// Loads a data segment register or SS.
    pub fn load_segment(&mut self, n: usize, selector: u16) -> Result<(), Exception> {
        self.frame.cpu.seg[n] = self.data_segment(n, selector)?;
        Ok(())
    }

    /// Linear address of a stack slot in a segment that is not loaded yet (legacy modes).
    pub fn stack_slot(&self, ss: &Segment, offset: u64, len: u64) -> Option<u64> {
        within_limit(ss, offset, offset + len - 1)
            .then(|| ss.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Return to an outer level: data segments that it may not use become null. Intel SDM Vol. 2,
    /// RET.
    pub fn drop_inner_segments(&mut self, cpl: u8) {
        for n in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            let s = &self.frame.cpu.seg[n];
            if s.unusable() || s.ty() & 0xc == 0xc || s.dpl() >= cpl {
                continue;
            }
            self.frame.cpu.seg[n] = null_segment(0, 0);
        }
    }

    /// Loads CS in real or virtual-8086 mode. `ip` was checked.
    pub fn load_cs_real(&mut self, selector: u16, ip: u64) {
        let protected = self.frame.cpu.cr0 & cr0::PE != 0;
        let cs = &mut self.frame.cpu.seg[sreg::CS];
        if protected {
            *cs = Segment::real(selector, V86_ATTR);
        } else {
            cs.base = u64::from(selector) << 4;
            cs.selector = selector;
            cs.attr &= !Segment::UNUSABLE;
        }
        self.frame.cpu.rip = ip;
    }
}

impl Exception {
    /// Sets the EXT bit in the error code of an exception that names a selector (not of #PF).
    pub fn with_ext(mut self, ext: u32) -> Exception {
        use pyrite_x86::bits::vector;
        if matches!(self.vector, vector::TS..=vector::GP)
            && let Some(c) = self.error_code.as_mut()
        {
            *c |= ext;
        }
        self
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
