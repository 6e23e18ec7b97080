//! Vector and opmask registers in the XSAVE area, for handlers that work in Rust.

// UNSAFETY: runs the empty stub.
#![allow(
    unsafe_code,
    reason = "brings the XSAVE area to a form with every component written"
)]

use iced_x86::{Mnemonic, Register};

use crate::interp::Op;
use crate::interp::integer::Done;
use crate::interp::native::unit::component;
use crate::sys::Next;
use crate::vcpu::SoftVcpu;

/// Writes out every component that is in its initial state, so that the bytes of the area are the
/// registers.
pub fn normalise(v: &mut SoftVcpu) {
    let unit = &mut v.interp.native.unit;
    let (code, mask) = (unit.empty_stub(), component::ALL);
    let pointers = super::x87::pointers_of(&v.frame.cpu.xsave.0);
    // SAFETY: the stub only returns.
    unsafe { unit.run(code, mask, &mut v.frame.cpu.xsave) };
    super::x87::set_pointers(v, pointers);
    // The bytes now say everything, so every component counts as present.
    let components = v.interp.native.unit.components;
    let bv = &mut v.frame.cpu.xsave.0[512];
    *bv |= components as u8;
}

/// Where 16-byte piece `piece` (0-3) of vector register `n` is.
fn place(v: &SoftVcpu, n: usize, piece: usize) -> Option<usize> {
    let unit = &v.interp.native.unit;
    let (component, at) = match (n, piece) {
        (16.., _) => (7, unit.offsets[7] + 64 * (n - 16) + 16 * piece),
        (_, 0) => (1, 160 + 16 * n),
        (_, 1) => (2, unit.offsets[2] + 16 * n),
        (_, p) => (6, unit.offsets[6] + 32 * n + 16 * (p - 2)),
    };
    (unit.components >> component & 1 != 0 && n < 32).then_some(at)
}

/// Reads all 64 bytes of a vector register. [`normalise`] first.
pub fn vector(v: &SoftVcpu, n: usize) -> [u8; 64] {
    let mut out = [0; 64];
    for piece in 0..4 {
        if let Some(at) = place(v, n, piece)
            && let Some(b) = v.frame.cpu.xsave.0.get(at..at + 16)
        {
            out[16 * piece..16 * piece + 16].copy_from_slice(b);
        }
    }
    out
}

/// Writes all 64 bytes of a vector register. [`normalise`] first.
pub fn set_vector(v: &mut SoftVcpu, n: usize, value: &[u8; 64]) {
    for piece in 0..4 {
        if let Some(at) = place(v, n, piece)
            && let Some(b) = v.frame.cpu.xsave.0.get_mut(at..at + 16)
        {
            b.copy_from_slice(&value[16 * piece..16 * piece + 16]);
        }
    }
}

/// VZEROALL and VZEROUPPER outside 64-bit mode, where they reach registers 0 to 7 only. Intel SDM
/// Vol. 2C.
pub fn zero_low(v: &mut SoftVcpu, op: &Op) -> Done {
    super::check_vector(v, &op.i)?;
    normalise(v);
    let from = if op.i.mnemonic() == Mnemonic::Vzeroall {
        0
    } else {
        16
    };
    for n in 0..8 {
        let mut x = vector(v, n);
        x[from..].fill(0);
        set_vector(v, n, &x);
    }
    Ok(Next::Sequential)
}

fn opmask_place(v: &SoftVcpu, r: Register) -> Option<usize> {
    let n = (r as usize).checked_sub(Register::K0 as usize)?;
    let unit = &v.interp.native.unit;
    (n < 8 && unit.components & component::OPMASK != 0).then(|| unit.offsets[5] + 8 * n)
}

/// Reads an opmask register without [`normalise`].
pub fn opmask(v: &SoftVcpu, r: Register) -> u64 {
    if u64::from(v.frame.cpu.xsave.0[512]) & component::OPMASK == 0 {
        return 0;
    }
    let Some(b) = opmask_place(v, r).and_then(|at| v.frame.cpu.xsave.0.get(at..at + 8)) else {
        return 0;
    };
    let mut x = [0; 8];
    x.copy_from_slice(b);
    u64::from_le_bytes(x)
}

/// Writes an opmask register. [`normalise`] first.
pub fn set_opmask(v: &mut SoftVcpu, r: Register, value: u64) {
    if let Some(at) = opmask_place(v, r)
        && let Some(b) = v.frame.cpu.xsave.0.get_mut(at..at + 8)
    {
        b.copy_from_slice(&value.to_le_bytes());
    }
}
