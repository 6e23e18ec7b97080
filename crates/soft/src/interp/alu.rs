//! Arithmetic with the host's own instructions, so that results and all flags, the undefined ones
//! included, are those of the processor underneath.
//!
//! Flags travel in AX: SF, ZF, AF, PF and CF in AH as LAHF and SAHF have them, OF in AL. That is
//! several times cheaper than PUSHFQ and POPFQ.

// UNSAFETY: asm blocks that touch only their operands' registers and the flags.
#![allow(
    unsafe_code,
    reason = "executes single arithmetic instructions of the host"
)]

use core::arch::asm;

use pyrite_x86::bits::rflags;

/// Flags that LAHF knows.
const LOW: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF;

#[inline(always)]
fn pack(flags: u64) -> u16 {
    ((flags & LOW) << 8 | flags >> 11 & 1) as u16
}

#[inline(always)]
fn unpack(flags: &mut u64, ax: u16) {
    let ax = u64::from(ax);
    *flags = *flags & !rflags::ARITH | ax >> 8 & LOW | (ax & 1) << 11;
}

/// One instruction `insn r, …` between loading and saving the flags.
macro_rules! run {
    ($f:ident, $insn:expr, $($operands:tt)*) => {
        // SAFETY: changes only its operands and the flags, which are not declared preserved.
        unsafe {
            asm!(
                "add al, 0x7f", "sahf", $insn, "lahf", "seto al",
                inout("ax") $f, $($operands)*,
                options(pure, nomem, nostack)
            )
        }
    };
}

/// `insn a, b` for every size: the new value of `a`.
macro_rules! two_operands {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " a, b` of `size` bytes.")]
        #[inline]
        pub fn $name(size: usize, a: u64, b: u64, flags: &mut u64) -> u64 {
            let mut f = pack(*flags);
            let r = match size {
                1 => {
                    let mut r = a as u8;
                    run!(f, concat!($insn, " {r}, {b}"), r = inout(reg_byte) r, b = in(reg_byte) b as u8);
                    u64::from(r)
                }
                2 => {
                    let mut r = a as u16;
                    run!(f, concat!($insn, " {r:x}, {b:x}"), r = inout(reg) r, b = in(reg) b as u16);
                    u64::from(r)
                }
                4 => {
                    let mut r = a as u32;
                    run!(f, concat!($insn, " {r:e}, {b:e}"), r = inout(reg) r, b = in(reg) b as u32);
                    u64::from(r)
                }
                _ => {
                    let mut r = a;
                    run!(f, concat!($insn, " {r}, {b}"), r = inout(reg) r, b = in(reg) b);
                    r
                }
            };
            unpack(flags, f);
            r
        }
    )*};
}

two_operands! {
    add "add"; or "or"; adc "adc"; sbb "sbb"; and "and"; sub "sub"; xor "xor"; cmp "cmp";
    test "test";
}

/// `insn a` for every size.
macro_rules! one_operand {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " a` of `size` bytes.")]
        #[inline]
        pub fn $name(size: usize, a: u64, flags: &mut u64) -> u64 {
            let mut f = pack(*flags);
            let r = match size {
                1 => {
                    let mut r = a as u8;
                    run!(f, concat!($insn, " {r}"), r = inout(reg_byte) r);
                    u64::from(r)
                }
                2 => {
                    let mut r = a as u16;
                    run!(f, concat!($insn, " {r:x}"), r = inout(reg) r);
                    u64::from(r)
                }
                4 => {
                    let mut r = a as u32;
                    run!(f, concat!($insn, " {r:e}"), r = inout(reg) r);
                    u64::from(r)
                }
                _ => {
                    let mut r = a;
                    run!(f, concat!($insn, " {r}"), r = inout(reg) r);
                    r
                }
            };
            unpack(flags, f);
            r
        }
    )*};
}

one_operand! { inc "inc"; dec "dec"; neg "neg"; }

/// `insn a, cl` for every size.
macro_rules! shift {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " a, cl` of `size` bytes; a masked count of 0 keeps the flags.")]
        #[inline]
        pub fn $name(size: usize, a: u64, count: u64, flags: &mut u64) -> u64 {
            // The form with a count of 1 is an instruction of its own and leaves other flags.
            let mut f = pack(*flags);
            let r = match size {
                1 => {
                    let mut r = a as u8;
                    run!(f, concat!($insn, " {r}, cl"), r = inout(reg_byte) r, in("cl") count as u8);
                    u64::from(r)
                }
                2 => {
                    let mut r = a as u16;
                    run!(f, concat!($insn, " {r:x}, cl"), r = inout(reg) r, in("cl") count as u8);
                    u64::from(r)
                }
                4 => {
                    let mut r = a as u32;
                    run!(f, concat!($insn, " {r:e}, cl"), r = inout(reg) r, in("cl") count as u8);
                    u64::from(r)
                }
                _ => {
                    let mut r = a;
                    run!(f, concat!($insn, " {r}, cl"), r = inout(reg) r, in("cl") count as u8);
                    r
                }
            };
            unpack(flags, f);
            r
        }
    )*};
}

shift! { rol "rol"; ror "ror"; rcl "rcl"; rcr "rcr"; shl "shl"; shr "shr"; sar "sar"; }

/// `insn a, b, cl` for 16 bits and more.
macro_rules! double_shift {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " a, b, cl` of `size` bytes.")]
        #[inline]
        pub fn $name(size: usize, a: u64, b: u64, count: u64, flags: &mut u64) -> u64 {
            let mut f = pack(*flags);
            let r = match size {
                2 => {
                    let mut r = a as u16;
                    run!(f, concat!($insn, " {r:x}, {b:x}, cl"), r = inout(reg) r,
                        b = in(reg) b as u16, in("cl") count as u8);
                    u64::from(r)
                }
                4 => {
                    let mut r = a as u32;
                    run!(f, concat!($insn, " {r:e}, {b:e}, cl"), r = inout(reg) r,
                        b = in(reg) b as u32, in("cl") count as u8);
                    u64::from(r)
                }
                _ => {
                    let mut r = a;
                    run!(f, concat!($insn, " {r}, {b}, cl"), r = inout(reg) r, b = in(reg) b,
                        in("cl") count as u8);
                    r
                }
            };
            unpack(flags, f);
            r
        }
    )*};
}

double_shift! { shld "shld"; shrd "shrd"; }

/// `insn a, b` for 16 bits and more, where the old value of `a` may survive (BSF of 0). All 64
/// bits of `a` go in and come out.
macro_rules! wide {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " a, b` of `size` (2, 4 or 8) bytes on a 64-bit `a`.")]
        #[inline]
        pub fn $name(size: usize, a: u64, b: u64, flags: &mut u64) -> u64 {
            let mut f = pack(*flags);
            let mut r = a;
            match size {
                2 => run!(f, concat!($insn, " {r:x}, {b:x}"), r = inout(reg) r, b = in(reg) b),
                4 => run!(f, concat!($insn, " {r:e}, {b:e}"), r = inout(reg) r, b = in(reg) b),
                _ => run!(f, concat!($insn, " {r}, {b}"), r = inout(reg) r, b = in(reg) b),
            }
            unpack(flags, f);
            r
        }
    )*};
}

wide! {
    bsf "bsf"; bsr "bsr"; tzcnt "tzcnt"; lzcnt "lzcnt"; popcnt "popcnt"; imul2 "imul";
    bt "bt"; bts "bts"; btr "btr"; btc "btc";
}

/// One-operand multiplications: RDX:RAX (AX for bytes: low half in `lo`) = `lo` × `b`.
macro_rules! multiply {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " b` with `lo` in the accumulator: (low, high).")]
        #[inline]
        pub fn $name(size: usize, lo: u64, b: u64, flags: &mut u64) -> (u64, u64) {
            let mut f = pack(*flags);
            let mut lo = lo;
            let mut hi = 0u64;
            macro_rules! go {
                ($text:expr) => {
                    run!(f, concat!("mov rax, {lo}\n", $text, "\nmov {lo}, rax"),
                        lo = inout(reg) lo, b = in(reg) b, inout("rdx") hi)
                };
            }
            match size {
                1 => {
                    run!(f, concat!("mov rax, {lo}\n", $insn, " {b}\nmov {lo}, rax"),
                        lo = inout(reg) lo, b = in(reg_byte) b as u8);
                    lo &= 0xffff;
                }
                2 => go!(concat!($insn, " {b:x}")),
                4 => go!(concat!($insn, " {b:e}")),
                _ => go!(concat!($insn, " {b}")),
            }
            unpack(flags, f);
            (lo, hi)
        }
    )*};
}

multiply! { mul "mul"; imul "imul"; }

/// One-operand divisions. The caller has proved that the quotient fits.
macro_rules! divide {
    ($($name:ident $insn:literal;)*) => {$(
        #[doc = concat!("`", $insn, " b` of hi:lo (AX for bytes): (quotient or AX, remainder).")]
        ///
        /// # Safety
        /// The divisor is not 0 and the quotient fits its register.
        #[inline]
        pub unsafe fn $name(size: usize, lo: u64, hi: u64, b: u64, flags: &mut u64) -> (u64, u64) {
            let mut f = pack(*flags);
            let mut lo = lo;
            let mut hi = hi;
            macro_rules! go {
                ($text:expr) => {
                    run!(f, concat!("mov rax, {lo}\n", $text, "\nmov {lo}, rax"),
                        lo = inout(reg) lo, b = in(reg) b, inout("rdx") hi)
                };
            }
            match size {
                1 => {
                    run!(f, concat!("mov rax, {lo}\n", $insn, " {b}\nmov {lo}, rax"),
                        lo = inout(reg) lo, b = in(reg_byte) b as u8);
                    lo &= 0xffff;
                }
                2 => go!(concat!($insn, " {b:x}")),
                4 => go!(concat!($insn, " {b:e}")),
                _ => go!(concat!($insn, " {b}")),
            }
            unpack(flags, f);
            (lo, hi)
        }
    )*};
}

divide! { div "div"; idiv "idiv"; }
