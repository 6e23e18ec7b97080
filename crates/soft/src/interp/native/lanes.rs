//! Memory operands of which only some elements count: masked loads and stores, expansions and
//! compressions, gathers and scatters. Elements that do not count never fault.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use pyrite_x86::bits::rflags;
use pyrite_x86::gpr;

use crate::exception::Exception;
use crate::interp::integer::{Done, sign_extend};
use crate::interp::native::registers::{normalise, opmask, set_opmask, set_vector, vector};
use crate::interp::native::{check_vector, x87};
use crate::interp::operand::{
    address_mask, alignment_checked, offset, segment, segment_number, size_mask,
};
use crate::interp::{Handler, Op, memory};
use crate::mmu::Priv;
use crate::sys::seg::SegAccess;
use crate::sys::{Next, debug};
use crate::vcpu::SoftVcpu;

/// What decides which elements count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// All do.
    Nothing,
    /// Opmask bits, one per element; operands with fewer elements repeat.
    Opmask,
    /// The number of set opmask bits: as many elements from the start.
    Count,
    /// Sign bits of the elements of a vector register (operand 1).
    Vector,
}

/// The elements of a memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Lanes {
    by: By,
    /// Bytes of an element.
    pub element: usize,
    /// Opmask bits that matter.
    mask_bits: u32,
}

impl Lanes {
    /// Of memory operand `op` of an instruction.
    pub fn of(i: &Instruction, op: u32) -> Lanes {
        use Mnemonic as M;
        let bytes = i.memory_size().size();
        let all = Lanes {
            by: By::Nothing,
            element: bytes,
            mask_bits: 0,
        };
        // What a mask bit stands for, which may be several elements of the operand.
        let element = match i.mnemonic() {
            M::Vpdpbusd | M::Vpdpbusds | M::Vpdpwssd | M::Vpdpwssds | M::Vdpbf16ps => 4,
            M::Vpmuludq | M::Vpmuldq => 8,
            _ => i.memory_size().element_size(),
        };
        if matches!(
            i.mnemonic(),
            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
        ) {
            let element = match i.mnemonic() {
                M::Vmaskmovps | M::Vpmaskmovd => 4,
                _ => 8,
            };
            return Lanes {
                by: By::Vector,
                element,
                mask_bits: 0,
            };
        }
        if i.op_mask() == Register::None
            || element == 0
            || !bytes.is_multiple_of(element)
            || reads_all(i.mnemonic())
            || (op == 2 && is_shift_by_count(i.mnemonic()))
        {
            return all;
        }
        let by = if is_compression(i.mnemonic()) {
            By::Count
        } else {
            By::Opmask
        };
        let count = (bytes / element) as u32;
        // A scalar looks at bit 0; a broadcast element is used by any element of the result.
        let spread = matches!(
            i.mnemonic(),
            M::Vbroadcastss
                | M::Vbroadcastsd
                | M::Vpbroadcastb
                | M::Vpbroadcastw
                | M::Vpbroadcastd
                | M::Vpbroadcastq
        );
        // Operands of several elements that are used more than once (VBROADCASTF32X4 and its
        // like) are narrower than the result.
        let wide = op != 0
            && i.op0_kind() == OpKind::Register
            && i.op0_register().size() > bytes
            && format_is_block_broadcast(i.mnemonic());
        let mask_bits = if i.is_broadcast() {
            // As many as the operand without broadcast has.
            (i.code().op_code().memory_size().size() / element) as u32
        } else if spread || wide {
            let result = if i.op0_register().is_k() {
                64
            } else {
                i.op0_register().size()
            };
            (result / element.max(1)) as u32
        } else {
            count
        };
        Lanes {
            by,
            element,
            mask_bits: mask_bits.clamp(1, 64),
        }
    }

    /// The value of [`Lanes::active`] when every element counts.
    pub fn all(&self, bytes: usize) -> u64 {
        u64::MAX >> (64 - (bytes / self.element.max(1)).clamp(1, 64) as u32)
    }

    /// One bit for each element that counts.
    pub fn active(&self, v: &mut SoftVcpu, i: &Instruction, bytes: usize) -> u64 {
        let all = self.all(bytes);
        let count = 64 - all.leading_zeros();
        match self.by {
            By::Nothing => all,
            By::Vector => {
                normalise(v);
                let m = vector(v, register_number(i.op1_register()));
                (0..count as usize)
                    .filter(|n| m[(n + 1) * self.element - 1] & 0x80 != 0)
                    .fold(0, |a, n| a | 1 << n)
            }
            By::Opmask | By::Count => {
                let k = opmask(v, i.op_mask()) & (u64::MAX >> (64 - self.mask_bits));
                if self.by == By::Count {
                    let n = k.count_ones();
                    return if n == 0 {
                        0
                    } else {
                        u64::MAX >> (64 - n) & all
                    };
                }
                (0..self.mask_bits)
                    .filter(|n| k >> n & 1 != 0)
                    .fold(0, |a, n| a | 1 << (n % count))
            }
        }
    }

    /// True if sign bits of a vector register decide (VMASKMOV and its like).
    pub fn by_vector(&self) -> bool {
        self.by == By::Vector
    }

    /// True if an opmask decides.
    pub fn by_opmask(&self) -> bool {
        matches!(self.by, By::Opmask | By::Count)
    }

    /// Calls `f` for each run of active elements: byte offset and length.
    fn runs(
        &self,
        active: u64,
        mut f: impl FnMut(usize, usize) -> Result<(), Exception>,
    ) -> Result<(), Exception> {
        let mut rest = active;
        while rest != 0 {
            let first = rest.trailing_zeros();
            let len = (rest >> first).trailing_ones();
            f(first as usize * self.element, len as usize * self.element)?;
            rest &= !((u64::MAX >> (64 - len)) << first);
        }
        Ok(())
    }

    /// Loads the active elements.
    pub fn load(
        &self,
        v: &mut SoftVcpu,
        lin: u64,
        out: &mut [u8],
        active: u64,
    ) -> Result<(), Exception> {
        self.runs(active, |at, len| {
            v.read_bytes(
                lin.wrapping_add(at as u64),
                &mut out[at..at + len],
                Priv::Current,
            )
        })
    }

    /// Checks that the active elements may be stored.
    pub fn probe(
        &self,
        v: &mut SoftVcpu,
        lin: u64,
        bytes: usize,
        active: u64,
    ) -> Result<(), Exception> {
        if active == self.all(bytes) {
            return v.probe_write(lin, bytes, Priv::Current);
        }
        self.runs(active, |at, len| {
            v.probe_write(lin.wrapping_add(at as u64), len, Priv::Current)
        })
    }

    /// Stores the active elements.
    pub fn store(
        &self,
        v: &mut SoftVcpu,
        lin: u64,
        data: &[u8],
        active: u64,
    ) -> Result<(), Exception> {
        if active == self.all(data.len()) {
            return v.write_bytes(lin, data, Priv::Current);
        }
        self.runs(active, |at, len| {
            v.write_bytes(
                lin.wrapping_add(at as u64),
                &data[at..at + len],
                Priv::Current,
            )
        })
    }
}

/// Stores of which a mask suppresses no fault. Intel SDM Vol. 2A §2.8.8, exception type E6NF.
pub fn stores_check_all(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vextractf32x4
            | M::Vextractf32x8
            | M::Vextractf64x2
            | M::Vextractf64x4
            | M::Vextracti32x4
            | M::Vextracti32x8
            | M::Vextracti64x2
            | M::Vextracti64x4
    )
}

/// Instructions whose elements move between lanes, so that a mask suppresses no fault.
/// Intel SDM Vol. 2A §2.8.6, exception types E4NF and E6NF.
fn reads_all(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Valignd
            | M::Valignq
            | M::Vcvtne2ps2bf16
            | M::Vpconflictd
            | M::Vpconflictq
            | M::Vpmaddubsw
            | M::Vpmaddwd
            | M::Vgf2p8affineqb
            | M::Vgf2p8affineinvqb
            | M::Vinsertf32x4
            | M::Vinsertf32x8
            | M::Vinsertf64x2
            | M::Vinsertf64x4
            | M::Vinserti32x4
            | M::Vinserti32x8
            | M::Vinserti64x2
            | M::Vinserti64x4
            | M::Vdbpsadbw
            | M::Vmovddup
            | M::Vmovshdup
            | M::Vmovsldup
            | M::Vpackssdw
            | M::Vpacksswb
            | M::Vpackusdw
            | M::Vpackuswb
            | M::Vpalignr
            | M::Vpermb
            | M::Vpermd
            | M::Vpermi2b
            | M::Vpermi2d
            | M::Vpermi2pd
            | M::Vpermi2ps
            | M::Vpermi2q
            | M::Vpermi2w
            | M::Vpermilpd
            | M::Vpermilps
            | M::Vpermpd
            | M::Vpermps
            | M::Vpermq
            | M::Vpermt2b
            | M::Vpermt2d
            | M::Vpermt2pd
            | M::Vpermt2ps
            | M::Vpermt2q
            | M::Vpermt2w
            | M::Vpermw
            | M::Vpmultishiftqb
            | M::Vpshufb
            | M::Vpshufd
            | M::Vpshufhw
            | M::Vpshuflw
            | M::Vpunpckhbw
            | M::Vpunpckhdq
            | M::Vpunpckhqdq
            | M::Vpunpckhwd
            | M::Vpunpcklbw
            | M::Vpunpckldq
            | M::Vpunpcklqdq
            | M::Vpunpcklwd
            | M::Vshuff32x4
            | M::Vshuff64x2
            | M::Vshufi32x4
            | M::Vshufi64x2
            | M::Vshufpd
            | M::Vshufps
            | M::Vunpckhpd
            | M::Vunpckhps
            | M::Vunpcklpd
            | M::Vunpcklps
    )
}

/// Shifts of all elements by one count, which operand 2 holds.
fn is_shift_by_count(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vpslld
            | M::Vpsllq
            | M::Vpsllw
            | M::Vpsrad
            | M::Vpsraq
            | M::Vpsraw
            | M::Vpsrld
            | M::Vpsrlq
            | M::Vpsrlw
    )
}

fn is_compression(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vcompressps
            | M::Vcompresspd
            | M::Vpcompressb
            | M::Vpcompressw
            | M::Vpcompressd
            | M::Vpcompressq
            | M::Vexpandps
            | M::Vexpandpd
            | M::Vpexpandb
            | M::Vpexpandw
            | M::Vpexpandd
            | M::Vpexpandq
    )
}

fn format_is_block_broadcast(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
    )
}

/// Number of a vector register of any width.
fn register_number(r: Register) -> usize {
    let n = r as usize;
    let first = if r.is_zmm() {
        Register::ZMM0
    } else if r.is_ymm() {
        Register::YMM0
    } else {
        Register::XMM0
    };
    n.wrapping_sub(first as usize) & 31
}

/// Handlers of the instructions whose memory side is done here.
pub fn handler(i: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => masked_bytes,
        M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd
        | M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq => gather,
        M::Vscatterdps
        | M::Vscatterdpd
        | M::Vscatterqps
        | M::Vscatterqpd
        | M::Vpscatterdd
        | M::Vpscatterdq
        | M::Vpscatterqd
        | M::Vpscatterqq => scatter,
        _ => return None,
    })
}

/// MASKMOVQ, MASKMOVDQU: bytes whose mask byte has its sign bit set go to DS:rDI.
fn masked_bytes(v: &mut SoftVcpu, op: &Op) -> Done {
    check_vector(v, &op.i)?;
    normalise(v);
    let address_bytes = match op.i.op0_kind() {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let (data, mask, count) = if op.i.op1_register().is_mm() {
        (mmx(v, op.i.op1_register()), mmx(v, op.i.op2_register()), 8)
    } else {
        let of = |r| vector(v, register_number(r));
        (of(op.i.op1_register()), of(op.i.op2_register()), 16)
    };
    let o = v.frame.cpu.gpr[gpr::RDI] & size_mask(address_bytes);
    let lanes = Lanes {
        by: By::Nothing,
        element: 1,
        mask_bits: 0,
    };
    let active = (0..count)
        .filter(|&n| mask[n] & 0x80 != 0)
        .fold(0u64, |a, n| a | 1 << n);
    if op.i.op1_register().is_mm() {
        // As every MMX instruction: TOP becomes 0 and all registers valid.
        x87::rotate_to(v, 0);
        v.frame.cpu.xsave.0[4] = 0xff;
    }
    // The whole operand is checked, whatever the mask says, 8 bytes after 8 bytes: the manuals
    // leave that open, the processors at hand do it.
    let seg = segment_number(op.i.memory_segment());
    let lin = v.linear(seg, o, 8, SegAccess::Write)?;
    for at in (0..count as u64).step_by(8) {
        let o = o.wrapping_add(at) & size_mask(address_bytes);
        let part = v.linear(seg, o, 8, SegAccess::Write)?;
        // Alignment is checked even where nothing is stored.
        if alignment_checked(v) && !part.is_multiple_of(8) {
            return Err(Exception::AC.into());
        }
        v.probe_write(part, 8, Priv::Current)?;
    }
    lanes.store(v, lin, &data[..count], active)?;
    Ok(Next::Sequential)
}

/// An MMX register: the low 8 bytes of the physical x87 register, found by TOP, which MMX
/// instructions set to 0.
fn mmx(v: &SoftVcpu, r: Register) -> [u8; 64] {
    let a = &v.frame.cpu.xsave.0;
    let top = usize::from(a[3] >> 3 & 7);
    let n = (r as usize).wrapping_sub(Register::MM0 as usize) & 7;
    let at = 32 + 16 * ((n + 8 - top) & 7);
    let mut out = [0; 64];
    out[..8].copy_from_slice(&a[at..at + 8]);
    out
}

/// What gathers and scatters have in common.
struct Indexed {
    count: usize,
    element: usize,
    index_bytes: usize,
    indices: [u8; 64],
}

impl Indexed {
    fn new(v: &SoftVcpu, i: &Instruction, data: Register) -> Indexed {
        let element = i.memory_size().size();
        let index_bytes = if i.is_vsib64() { 8 } else { 4 };
        let r = i.memory_index();
        Indexed {
            count: (r.size() / index_bytes).min(data.size() / element.max(1)),
            element,
            index_bytes,
            indices: vector(v, register_number(r)),
        }
    }

    fn lin(
        &self,
        v: &SoftVcpu,
        i: &Instruction,
        n: usize,
        access: SegAccess,
    ) -> Result<u64, Exception> {
        let mut x = [0; 8];
        let at = n * self.index_bytes;
        x[..self.index_bytes].copy_from_slice(&self.indices[at..at + self.index_bytes]);
        let index = sign_extend(u64::from_le_bytes(x), self.index_bytes) as u64;
        let scaled = index.wrapping_mul(u64::from(i.memory_index_scale()));
        let o = offset(v, i).wrapping_add(scaled) & address_mask(i);
        v.linear(segment(i), o, self.element, access)
    }
}

/// Gathers with a vector mask (AVX2) or an opmask (AVX-512). Elements complete one by one: a fault
/// leaves those before it done and their mask bits clear.
fn gather(v: &mut SoftVcpu, op: &Op) -> Done {
    let i = &op.i;
    check_vector(v, i)?;
    normalise(v);
    let (by_opmask, dest) = (i.op_mask() != Register::None, i.op0_register());
    let x = Indexed::new(v, i, dest);
    let (d, m) = (
        register_number(dest),
        register_number(if by_opmask {
            Register::None
        } else {
            i.op2_register()
        }),
    );
    let mut out = vector(v, d);
    let mut mask = vector(v, m);
    let mut k = opmask(v, i.op_mask());
    let mut fault = None;
    let mut progress = false;
    for n in 0..x.count {
        let top = (n + 1) * x.element - 1;
        let on = if by_opmask {
            k >> n & 1 != 0
        } else {
            mask[top] & 0x80 != 0
        };
        if on {
            let value = x
                .lin(v, i, n, SegAccess::Read)
                .and_then(|lin| memory::load(v, lin, x.element));
            match value {
                Ok(value) => {
                    out[top + 1 - x.element..=top]
                        .copy_from_slice(&value.to_le_bytes()[..x.element]);
                    progress = true;
                }
                Err(e) => {
                    fault = Some(e);
                    break;
                }
            }
        }
        k &= !(1 << n);
        mask[top + 1 - x.element..=top].fill(0);
    }
    if fault.is_none() {
        out[x.count * x.element..].fill(0);
        mask.fill(0);
        k = 0;
    }
    set_vector(v, d, &out);
    if by_opmask {
        set_opmask(v, i.op_mask(), k);
    } else {
        set_vector(v, m, &mask);
    }
    ended(v, fault, progress)
}

/// Scatters: in order of the elements, each completing on its own.
fn scatter(v: &mut SoftVcpu, op: &Op) -> Done {
    let i = &op.i;
    check_vector(v, i)?;
    normalise(v);
    let source = i.op1_register();
    let x = Indexed::new(v, i, source);
    let data = vector(v, register_number(source));
    let mut k = opmask(v, i.op_mask());
    let mut fault = None;
    let mut progress = false;
    for n in 0..x.count {
        if k >> n & 1 != 0 {
            let mut b = [0; 8];
            b[..x.element].copy_from_slice(&data[n * x.element..(n + 1) * x.element]);
            let done = x
                .lin(v, i, n, SegAccess::Write)
                .and_then(|lin| memory::store(v, lin, u64::from_le_bytes(b), x.element));
            if let Err(e) = done {
                fault = Some(e);
                break;
            }
            progress = true;
            k &= !(1 << n);
        }
    }
    if fault.is_none() {
        k = 0;
    }
    set_opmask(v, i.op_mask(), k);
    ended(v, fault, progress)
}

/// The end of a gather or scatter. Debug traps of elements that are done are delivered in lieu of
/// the fault of the next one, with RIP at the instruction. Intel SDM Vol. 2C, VPSCATTERDD.
fn ended(v: &mut SoftVcpu, fault: Option<Exception>, progress: bool) -> Done {
    let Some(fault) = fault else {
        return Ok(Next::Sequential);
    };
    if progress {
        let single_step = v.frame.cpu.rflags & rflags::TF != 0;
        debug::after_instruction(v, single_step)?;
    }
    Err(fault.into())
}
