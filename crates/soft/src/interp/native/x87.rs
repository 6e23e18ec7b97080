//! What the host's x87 unit cannot do for the guest: environments in the guest's formats, the
//! last-instruction pointers, pending exceptions.
//!
//! The XSAVE area has the layout of FXSAVE64 in its first 512 bytes: FCW 0, FSW 2, abridged FTW 4,
//! FOP 6, FIP 8, FDP 16, MXCSR 24, ST0-ST7 from 32 in steps of 16. Intel SDM Vol. 1 §10.5.1.

use iced_x86::{Instruction, Mnemonic, OpKind};
use pyrite_x86::bits::cr0;
use pyrite_x86::sreg;

use crate::exception::Exception;
use crate::interp::integer::Done;
use crate::interp::native::registers::normalise;
use crate::interp::operand::{alignment_checked, mem_lin, offset, segment, split_fault};
use crate::interp::{Handler, Op};
use crate::mmu::Priv;
use crate::sys::Next;
use crate::sys::seg::SegAccess;
use crate::vcpu::SoftVcpu;

/// FSW.ES, FSW.B.
const ES: u16 = 1 << 7;
const BUSY: u16 = 1 << 15;

fn word(v: &SoftVcpu, at: usize) -> u16 {
    let a = &v.frame.cpu.xsave.0;
    u16::from_le_bytes([a[at], a[at + 1]])
}

fn set_word(v: &mut SoftVcpu, at: usize, x: u16) {
    v.frame.cpu.xsave.0[at..at + 2].copy_from_slice(&x.to_le_bytes());
}

/// FOP, FIP and FDP: bytes 6-23 of the area.
pub type Pointers = [u8; 18];

/// Reads the last-instruction pointers of an area.
pub fn pointers_of(area: &[u8]) -> Pointers {
    let mut p = [0; 18];
    p.copy_from_slice(&area[6..24]);
    p
}

/// The last-instruction pointers.
pub fn pointers(v: &SoftVcpu) -> Pointers {
    pointers_of(&v.frame.cpu.xsave.0)
}

/// Puts the last-instruction pointers back: the host's are those of a stub.
pub fn set_pointers(v: &mut SoftVcpu, p: Pointers) {
    v.frame.cpu.xsave.0[6..24].copy_from_slice(&p);
}

/// The x87 opcode (11 bits) if the instruction is one that sets the last-instruction pointers:
/// all but the control instructions. Intel SDM Vol. 1 §8.1.8.
pub fn opcode(i: &Instruction, bytes: u128) -> Option<u16> {
    use Mnemonic as M;
    if matches!(
        i.mnemonic(),
        M::Fninit
            | M::Fnclex
            | M::Fnstcw
            | M::Fnstsw
            | M::Fldcw
            | M::Fneni
            | M::Fndisi
            | M::Fnsetpm
            | M::Fstcw
            | M::Fstsw
            | M::Finit
            | M::Fclex
    ) {
        return None;
    }
    let raw = bytes.to_le_bytes();
    let at = raw.iter().position(|b| (0xd8..=0xdf).contains(b))?;
    let modrm = raw.get(at + 1)?;
    Some(u16::from(raw[at] & 7) << 8 | u16::from(*modrm))
}

/// Records the pointers after an x87 instruction. `fop`: from [`opcode`].
pub fn note_instruction(v: &mut SoftVcpu, i: &Instruction, fop: Option<u16>) {
    if i.mnemonic() == Mnemonic::Fninit {
        set_pointers(v, [0; 18]);
        return;
    }
    let Some(fop) = fop else { return };
    let wide = v.long64();
    let selector = |v: &SoftVcpu, n: usize| u64::from(v.frame.cpu.seg[n].selector) << 32;
    let mut fip = v.frame.cpu.rip;
    if !wide {
        fip = fip & 0xffff_ffff | selector(v, sreg::CS);
    }
    set_word(v, 6, fop);
    v.frame.cpu.xsave.0[8..16].copy_from_slice(&fip.to_le_bytes());
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        let mut fdp = offset(v, i);
        if !wide {
            fdp = fdp & 0xffff_ffff | selector(v, segment(i));
        }
        v.frame.cpu.xsave.0[16..24].copy_from_slice(&fdp.to_le_bytes());
    }
}

/// #MF for a pending unmasked exception. With CR0.NE clear it is dropped: see the parent module.
pub fn check_pending(v: &mut SoftVcpu) -> Result<(), Exception> {
    // XSTATE_BV bit 0 clear: the initial state, in which nothing is pending.
    if v.frame.cpu.xsave.0[512] & 1 == 0 {
        return Ok(());
    }
    let fsw = word(v, 2);
    if fsw & ES == 0 {
        return Ok(());
    }
    if v.frame.cpu.cr0 & cr0::NE != 0 {
        return Err(Exception::MF);
    }
    set_word(v, 2, fsw & !(0x7f | ES | BUSY));
    Ok(())
}

/// Handlers of the x87 instructions that work in Rust.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Wait => wait,
        Mnemonic::Fnstenv | Mnemonic::Fstenv => store_environment,
        Mnemonic::Fldenv => load_environment,
        Mnemonic::Fnsave | Mnemonic::Fsave => save,
        Mnemonic::Frstor => restore,
        _ => return None,
    })
}

/// FWAIT.
fn wait(v: &mut SoftVcpu, _: &Op) -> Done {
    const MP_TS: u64 = cr0::MP | cr0::TS;
    if v.frame.cpu.cr0 & MP_TS == MP_TS {
        return Err(Exception::NM.into());
    }
    check_pending(v)?;
    Ok(Next::Sequential)
}

fn check_available(v: &SoftVcpu) -> Result<(), Exception> {
    if v.frame.cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

/// The full tag word from the abridged one. Intel SDM Vol. 1 §10.5.1.1.
fn full_tags(v: &SoftVcpu) -> u16 {
    let abridged = v.frame.cpu.xsave.0[4];
    let top = usize::from(word(v, 2) >> 11 & 7);
    let mut tags = 0u16;
    for n in 0..8usize {
        let tag = if abridged >> n & 1 == 0 {
            3
        } else {
            let at = 32 + 16 * ((n + 8 - top) & 7);
            let a = &v.frame.cpu.xsave.0[at..at + 10];
            let exponent = u16::from_le_bytes([a[8], a[9]]) & 0x7fff;
            let fraction_zero = a[..8].iter().all(|&b| b == 0);
            match exponent {
                0 if fraction_zero => 1,
                0 | 0x7fff => 2,
                _ if a[7] & 0x80 == 0 => 2,
                _ => 0,
            }
        };
        tags |= tag << (2 * n);
    }
    tags
}

/// The environment in the format of the operand size and mode, as dwords or words.
/// Intel SDM Vol. 1 figures 8-9 to 8-12.
fn environment(v: &SoftVcpu, bytes: usize) -> [u8; 28] {
    let a = &v.frame.cpu.xsave.0;
    let dword = |at: usize| u32::from_le_bytes([a[at], a[at + 1], a[at + 2], a[at + 3]]);
    let (fcw, fsw, tags) = (word(v, 0), word(v, 2), full_tags(v));
    let (fop, fip, fcs) = (
        u32::from(word(v, 6) & 0x7ff),
        dword(8),
        u32::from(word(v, 12)),
    );
    let (fdp, fds) = (dword(16), u32::from(word(v, 20)));
    // In 64-bit mode the selector fields of the area are upper halves of the pointers.
    let (fcs, fds) = if v.long64() { (0, 0) } else { (fcs, fds) };
    let real = v.real_or_v86();
    let mut out = [0u8; 28];
    if bytes == 14 {
        let words = if real {
            let ip = fip.wrapping_add(fcs << 4);
            let dp = fdp.wrapping_add(fds << 4);
            [ip, ip >> 4 & 0xf000 | fop, dp, dp >> 4 & 0xf000]
        } else {
            [fip, fcs, fdp, fds]
        };
        let all = [
            u32::from(fcw),
            u32::from(fsw),
            u32::from(tags),
            words[0],
            words[1],
            words[2],
            words[3],
        ];
        for (n, w) in all.iter().enumerate() {
            out[2 * n..2 * n + 2].copy_from_slice(&(*w as u16).to_le_bytes());
        }
        return out;
    }
    let tail = if real {
        let ip = fip.wrapping_add(fcs << 4);
        let dp = fdp.wrapping_add(fds << 4);
        [
            0xffff_0000 | ip & 0xffff,
            (ip >> 16) << 12 | fop,
            0xffff_0000 | dp & 0xffff,
            (dp >> 16) << 12,
        ]
    } else {
        [fip, fcs | fop << 16, fdp, fds | 0xffff_0000]
    };
    let upper = 0xffff_0000;
    let all = [
        upper | u32::from(fcw),
        upper | u32::from(fsw),
        upper | u32::from(tags),
        tail[0],
        tail[1],
        tail[2],
        tail[3],
    ];
    for (n, d) in all.iter().enumerate() {
        out[4 * n..4 * n + 4].copy_from_slice(&d.to_le_bytes());
    }
    out
}

/// Moves the registers so that the same physical ones are found after TOP has become `top`:
/// the area holds them relative to TOP.
pub(crate) fn rotate_to(v: &mut SoftVcpu, top: u16) {
    let old = word(v, 2) >> 11 & 7;
    let by = usize::from(top.wrapping_sub(old) & 7);
    v.frame.cpu.xsave.0[32..160].rotate_left(16 * by);
    let fsw = word(v, 2) & !(7 << 11) | top << 11;
    set_word(v, 2, fsw);
}

/// ES and B follow from what is pending and not masked; the reserved bits of FCW read as on the
/// processor: bit 6 is 1.
pub(crate) fn settle(v: &mut SoftVcpu) {
    let (fcw, mut fsw) = (word(v, 0), word(v, 2) & !(ES | BUSY));
    if fsw & !fcw & 0x3f != 0 {
        fsw |= ES | BUSY;
    }
    set_word(v, 0, fcw & 0x1f3f | 0x40);
    set_word(v, 2, fsw);
}

/// Takes an environment over. The area is normalised and x87 counts as present.
fn take_environment(v: &mut SoftVcpu, e: &[u8]) {
    let step = if e.len() == 14 { 2 } else { 4 };
    let w = |n: usize| u16::from_le_bytes([e[step * n], e[step * n + 1]]);
    let (fcw, mut fsw, tags) = (w(0), w(1), w(2));
    // ES and B follow from what is pending and not masked.
    fsw &= !(ES | BUSY);
    if fsw & !fcw & 0x3f != 0 {
        fsw |= ES | BUSY;
    }
    let mut abridged = 0u8;
    for n in 0..8 {
        if tags >> (2 * n) & 3 != 3 {
            abridged |= 1 << n;
        }
    }
    let real = v.real_or_v86();
    let d = |n: usize| match step {
        2 => u64::from(w(n)),
        _ => u64::from(w(n)) | u64::from(u16::from_le_bytes([e[4 * n + 2], e[4 * n + 3]])) << 16,
    };
    let (fip, fdp, fop) = match (real, step) {
        (true, 2) => (
            d(3) | (d(4) & 0xf000) << 4,
            d(5) | (d(6) & 0xf000) << 4,
            d(4) & 0x7ff,
        ),
        (true, _) => (
            d(3) & 0xffff | (d(4) >> 12 & 0xffff) << 16,
            d(5) & 0xffff | (d(6) >> 12 & 0xffff) << 16,
            d(4) & 0x7ff,
        ),
        (false, 2) => (d(3) | d(4) << 32, d(5) | d(6) << 32, 0),
        (false, _) if v.long64() => (d(3), d(5), d(4) >> 16 & 0x7ff),
        (false, _) => (
            d(3) | (d(4) & 0xffff) << 32,
            d(5) | (d(6) & 0xffff) << 32,
            d(4) >> 16 & 0x7ff,
        ),
    };
    // The reserved bits of FCW read as on the processor: bit 6 is 1.
    set_word(v, 0, fcw & 0x1f3f | 0x40);
    set_word(v, 2, fsw);
    v.frame.cpu.xsave.0[4] = abridged;
    set_word(v, 6, fop as u16);
    v.frame.cpu.xsave.0[8..16].copy_from_slice(&fip.to_le_bytes());
    v.frame.cpu.xsave.0[16..24].copy_from_slice(&fdp.to_le_bytes());
}

/// Bytes of the environment of this instruction.
fn environment_bytes(i: &Instruction) -> usize {
    match i.memory_size().size() {
        14 | 94 => 14,
        _ => 28,
    }
}

/// Address of an environment or state of `bytes`, whose fields are `step` bytes wide.
fn environment_lin(
    v: &mut SoftVcpu,
    i: &Instruction,
    bytes: usize,
    step: usize,
    access: SegAccess,
) -> Result<u64, Exception> {
    let lin = match mem_lin(v, i, bytes, access) {
        Ok(lin) => lin,
        Err(e) => return Err(split_fault(v, i, 0, step, access, e)),
    };
    if alignment_checked(v) && !lin.is_multiple_of(step as u64) {
        return Err(Exception::AC);
    }
    Ok(lin)
}

/// FNSTENV: stores the environment, then masks all exceptions.
fn store_environment(v: &mut SoftVcpu, op: &Op) -> Done {
    check_available(v)?;
    normalise(v);
    let bytes = environment_bytes(&op.i);
    let lin = environment_lin(v, &op.i, bytes, bytes / 7, SegAccess::Write)?;
    let e = environment(v, bytes);
    v.write_bytes(lin, &e[..bytes], Priv::Current)?;
    let fcw = word(v, 0) | 0x3f;
    set_word(v, 0, fcw);
    let fsw = word(v, 2) & !(ES | BUSY);
    set_word(v, 2, fsw);
    Ok(Next::Sequential)
}

/// FLDENV.
fn load_environment(v: &mut SoftVcpu, op: &Op) -> Done {
    check_available(v)?;
    check_pending(v)?;
    let bytes = environment_bytes(&op.i);
    let lin = environment_lin(v, &op.i, bytes, bytes / 7, SegAccess::Read)?;
    let mut e = [0u8; 28];
    v.read_bytes(lin, &mut e[..bytes], Priv::Current)?;
    normalise(v);
    let step = bytes / 7;
    rotate_to(v, u16::from_le_bytes([e[step], e[step + 1]]) >> 11 & 7);
    take_environment(v, &e[..bytes]);
    Ok(Next::Sequential)
}

/// FNSAVE: environment and registers, then FNINIT.
fn save(v: &mut SoftVcpu, op: &Op) -> Done {
    check_available(v)?;
    normalise(v);
    let head = environment_bytes(&op.i);
    let lin = environment_lin(v, &op.i, head + 80, head / 7, SegAccess::Write)?;
    let mut out = [0u8; 108];
    out[..head].copy_from_slice(&environment(v, head)[..head]);
    for n in 0..8 {
        let from = 32 + 16 * n;
        out[head + 10 * n..head + 10 * n + 10]
            .copy_from_slice(&v.frame.cpu.xsave.0[from..from + 10]);
    }
    v.write_bytes(lin, &out[..head + 80], Priv::Current)?;
    // FNINIT keeps the registers' contents and tags them empty.
    rotate_to(v, 0);
    set_word(v, 0, 0x37f);
    set_word(v, 2, 0);
    v.frame.cpu.xsave.0[4] = 0;
    set_pointers(v, [0; 18]);
    Ok(Next::Sequential)
}

/// FRSTOR.
fn restore(v: &mut SoftVcpu, op: &Op) -> Done {
    check_available(v)?;
    check_pending(v)?;
    let head = environment_bytes(&op.i);
    let lin = environment_lin(v, &op.i, head + 80, head / 7, SegAccess::Read)?;
    let mut data = [0u8; 108];
    v.read_bytes(lin, &mut data[..head + 80], Priv::Current)?;
    normalise(v);
    take_environment(v, &data[..head]);
    for n in 0..8 {
        let to = 32 + 16 * n;
        v.frame.cpu.xsave.0[to..to + 16].fill(0);
        v.frame.cpu.xsave.0[to..to + 10].copy_from_slice(&data[head + 10 * n..head + 10 * n + 10]);
    }
    Ok(Next::Sequential)
}
